//! `sparse24 eval`: how good a model's embeddings are, by tasks that people gave answers to, and beside another
//! model's; and how many pictures a classifier has right.
//!
//! Every figure comes with the interval that other samples of its texts would have put it in, and with the file that it
//! is of; differences between two models are of the same draws. What the weights say of the data that they were made
//! from is printed, too, and a file that is among them is warned of. Invariant: a row of a CSV file counts in full or
//! the command fails.

mod figures;
mod inputs;
mod pictures;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::figures::{Accuracy, Agreement, Classification, Correlations, Tasks};
pub(super) use self::inputs::Pairs;
use self::inputs::{Labelled, Lines};
use super::args::{Json, name_of, one_stdin, whole};
use super::command::command_line;
use super::sensitivity::identity_of;
use super::{Outcome, model, say};
use sparse24::engine::{Device, DeviceInfo};
use sparse24::io::Provenance;
use sparse24::report::Environment;

/// Evaluate a model's embeddings on pairs that people scored, on classes of texts, or against another model's; or a
/// classifier on pictures.
///
/// --pairs takes a CSV file with the columns sentence, sentence, score, and prints Spearman's and Pearson's correlation
/// of the scores with the similarity of the embeddings: the cosine, unless the model's folder names another. --classify
/// takes texts and labels, and prints how many labels a linear probe of the embeddings predicts right. --texts takes
/// plain text, and prints the cosine between the embeddings of the model and of the one that --against names. --images
/// takes a folder of pictures, and prints how many a classifier of images has right.
///
/// Behind each figure stands a 95 % interval: what the middle 95 % of 1000 samples span that are drawn from the pairs
/// or texts with replacement. With --against, both models are evaluated, and the interval of their difference is of the
/// same draws for both; where it has 0 in it, they are called equal. What the weights' file says of how they were made
/// is printed: a figure on texts that weights were calibrated on or settings chosen on flatters them, and is warned of.
///
/// The sentences per second are those of all batches but the first of each shape (a shape is a number of sentences and
/// of tokens): while that one runs, pipelines are compiled and weights uploaded, and its seconds are printed apart.
/// Tokenising is a part of the seconds, loading the model is not. The schema of the JSON is sparse24-eval/1.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 eval --model model/minilm --pairs stsb-dev.csv
  sparse24 eval model/minilm --sparsity 2:4 --vector 32 --pairs stsb-dev.csv --json eval.json
  sparse24 eval pruned --against model/minilm --pairs stsb-dev.csv --texts wikitext2-valid.txt
  sparse24 eval pruned --against model/minilm --classify bbc-news/leads.csv
  sparse24 eval model/efficientnet-lite0 --sparsity 2:4 --images pictures")]
// In two lines, as clap breaks none.
#[command(override_usage = "sparse24 eval [OPTIONS] <MODEL|--model <DIR>>
                     <--pairs <CSV>|--texts <TXT>|--classify <CSV>|--images <DIR>>")]
#[command(group = clap::ArgGroup::new("data").required(true).multiple(true).args(["pairs", "texts", "classify", "images"]))]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::ModelArgs,
    #[command(flatten)]
    sparsity: model::SparsityArgs,
    /// CSV file, UTF-8, or `-` for stdin: two sentences and a score on each line. A first line whose third column is no
    /// number is a header.
    #[arg(long, value_name = "CSV")]
    pairs: Option<PathBuf>,
    /// Another model to compare with, usually the dense one that this was made from: a folder or a name, as --model
    /// takes it. It runs as its folder has it, whatever --sparsity and --weights say.
    #[arg(long, value_name = "DIR")]
    against: Option<String>,
    /// File with a text on each line, UTF-8, or `-` for stdin: the cosine between both models' embeddings of each.
    /// Lines of fewer than 5 words with a letter, and those that begin with `=` as WikiText's headings do, are left
    /// out.
    #[arg(long, value_name = "TXT", requires = "against")]
    texts: Option<PathBuf>,
    /// CSV file, UTF-8, or `-` for stdin: a text and its label on each line. A first line whose second column is
    /// `label` is a header. Each label is predicted by a linear probe (ridge regression) of the texts in the other four
    /// of five folds.
    #[arg(long, value_name = "CSV")]
    classify: Option<PathBuf>,
    /// Fit the probe to all texts of --classify, and report it on those of this file instead of in folds.
    #[arg(long, value_name = "CSV", requires = "classify")]
    classify_test: Option<PathBuf>,
    /// Folder of pictures, JPEG or PNG, in folders named by their classes or named by these themselves: a number, as in
    /// 0017.jpg, or a name that the model's config has.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["pairs", "texts", "classify", "against"])]
    images: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

/// A run as JSON.
#[derive(Serialize)]
struct Evaluation {
    schema: &'static str,
    version: &'static str,
    environment: Environment,
    model: String,
    weights: Option<String>,
    /// Of all linear layers as they ran: `none`, `2:4`, `V:2:4`, `masked` or `mixed`.
    sparsity: String,
    linear_layers: Vec<model::Form>,
    /// What the weights' files say of how they were made, such as `calibrated_on`.
    provenance: Provenance,
    /// Files of this evaluation that weights were made from, and how: figures on them flatter.
    seen: Vec<String>,
    /// What was put in front of every sentence.
    prompt: Option<String>,
    /// What of two embeddings the correlations are of.
    similarity: &'static str,
    dtype: String,
    device: String,
    threads: Option<usize>,
    batch: usize,
    pairs_file: Option<String>,
    pairs: Option<usize>,
    #[serde(flatten)]
    correlations: Option<Correlations>,
    classification: Option<Classification>,
    against: Option<Against>,
    sentences: usize,
    truncated: usize,
    /// Of all sentences, from the first one's tokens to the last one's embedding.
    seconds: f64,
    /// Of them, those in the first batch of each shape, and the time that these batches took.
    first_batches: FirstBatches,
    /// Without the first batches; of all sentences where there are no others.
    sentences_per_second: f64,
}

/// The model that the first one is compared with: what it has otherwise, its figures, and the differences.
#[derive(Serialize)]
struct Against {
    model: String,
    sparsity: String,
    linear_layers: Vec<model::Form>,
    provenance: Provenance,
    prompt: Option<String>,
    similarity: &'static str,
    #[serde(flatten)]
    correlations: Option<Correlations>,
    accuracy: Option<Accuracy>,
    /// The first model's figures less this one's.
    difference: figures::Differences,
    /// The cosine between both models' embeddings.
    texts: Option<Agreement>,
}

/// The first batch of each shape, which compiles pipelines and uploads weights.
#[derive(Serialize)]
struct FirstBatches {
    shapes: usize,
    sentences: usize,
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    if let Some(folder) = &args.images {
        return pictures::run(args, folder);
    }
    let sparsity = args.sparsity.get()?;
    args.json.file()?;
    let (tasks, files) = args.read()?;
    let encoder = args.model.open(sparsity)?;
    // Before the first one runs: what is wrong with the other is said at once.
    let other = args.against.as_deref().map(|folder| args.model.open_other(folder)).transpose().context("--against")?;
    let environment = Environment::unsampled(&encoder.device, command_line());
    let ran = tasks.run(&encoder)?;
    let similarity = encoder.similarity.name();
    let (device, threads) = (encoder.device.info().name().to_owned(), threads(&encoder.device));
    let model::Encoder { prompt, forms, provenance, .. } = encoder;
    let correlations = tasks.correlations(&ran)?;
    let other = args.against.as_deref().zip(other);
    let against = other.map(|(name, encoder)| args.against(name, encoder, &tasks, &ran)).transpose()?;

    let named = |path: &Option<PathBuf>| path.as_deref().map(name_of);
    let first_batches = FirstBatches {
        shapes: ran.passed.shapes,
        sentences: ran.passed.first_texts,
        seconds: ran.passed.first_time.as_secs_f64(),
    };
    let (timed, in_seconds) = match ran.sentences - first_batches.sentences {
        0 => (ran.sentences, ran.seconds),
        others => (others, ran.seconds - first_batches.seconds),
    };
    let evaluation = Evaluation {
        schema: "sparse24-eval/1",
        version: env!("CARGO_PKG_VERSION"),
        environment,
        model: args.model.name.get().to_owned(),
        weights: args.model.weights.as_ref().map(|path| path.display().to_string()),
        sparsity: model::sparsity_of(&forms),
        linear_layers: forms,
        seen: seen(&files, &provenance),
        provenance,
        prompt,
        similarity,
        dtype: sparse24::DType::from(args.model.dtype).to_string(),
        device,
        threads,
        batch: args.model.running.batch.get(),
        pairs_file: named(&args.pairs),
        pairs: tasks.pairs(),
        correlations,
        classification: tasks.classification(&ran, named(&args.classify), named(&args.classify_test)),
        against,
        sentences: ran.sentences,
        truncated: ran.passed.truncated,
        seconds: ran.seconds,
        first_batches,
        sentences_per_second: timed as f64 / in_seconds,
    };
    for seen in &evaluation.seen {
        say(&format!("warning: {seen}: figures on it flatter these weights"));
    }
    args.json.emit(&evaluation.text(), &evaluation)?;
    Ok(Outcome::Fine)
}

/// An input's name, and what tells its contents from others.
type Identified = (String, String);

impl Args {
    fn read(&self) -> Result<(Tasks, Vec<Identified>)> {
        let inputs = [
            ("--pairs", self.pairs.as_deref()),
            ("--texts", self.texts.as_deref()),
            ("--classify", self.classify.as_deref()),
            ("--classify-test", self.classify_test.as_deref()),
        ];
        one_stdin(&inputs)?;
        let mut files = Vec::new();
        let mut read = |path: &Path| -> Result<Vec<u8>> {
            let bytes = whole(path)?;
            files.push((name_of(path), identity_of(&bytes)));
            Ok(bytes)
        };
        let mut tasks = Tasks::default();
        if let Some(path) = &self.pairs {
            let pairs = Pairs::parse(&read(path)?[..]).with_context(|| name_of(path))?;
            tasks.pairs = Some((name_of(path), pairs));
        }
        if let Some(path) = &self.texts {
            tasks.texts = Some((name_of(path), Lines::parse(&read(path)?).with_context(|| name_of(path))?));
        }
        if let Some(path) = &self.classify {
            let labelled = Labelled::parse(read(path)?).with_context(|| name_of(path))?;
            if let Some(path) = &self.classify_test {
                let test = Labelled::parse_of(read(path)?, &labelled.classes).with_context(|| name_of(path))?;
                ensure!(
                    test.texts != labelled.texts,
                    "--classify-test: {} has the texts that the probe is fitted to: others are needed to report on",
                    name_of(path)
                );
                tasks.test = Some((name_of(path), test));
            }
            tasks.labelled = Some((name_of(path), labelled));
        }
        Ok((tasks, files))
    }

    /// Evaluates another model, and compares the first one with it.
    fn against(&self, model: &str, encoder: model::Encoder, tasks: &Tasks, first: &figures::Ran) -> Result<Against> {
        let ran = tasks.run(&encoder).context("--against")?;
        let widths = first.texts.as_ref().zip(ran.texts.as_ref()).map(|(a, b)| (a.cols(), b.cols()));
        if let Some((width, other)) = widths {
            ensure!(
                width == other,
                "--texts: embeddings of {} have {width} features, those of {model} {other}: there is no cosine between them",
                self.model.name.get()
            );
        }
        Ok(Against {
            model: model.to_owned(),
            sparsity: model::sparsity_of(&encoder.forms),
            correlations: tasks.correlations(&ran).context("--against")?,
            accuracy: tasks.accuracy(&ran),
            difference: tasks.differences(first, &ran)?,
            texts: tasks.agreement(first, &ran),
            linear_layers: encoder.forms,
            provenance: encoder.provenance,
            prompt: encoder.prompt,
            similarity: encoder.similarity.name(),
        })
    }
}

/// Which of these files weights were made from, and how, as far as their record names them.
fn seen(files: &[Identified], provenance: &Provenance) -> Vec<String> {
    let of = |(name, identity): &Identified| -> Vec<String> {
        let noted = provenance.entries().iter().filter(|(_, what)| what.contains(identity.as_str()));
        noted.map(|(step, _)| format!("{name} is what the weights were {}", step.replace('_', " "))).collect()
    };
    files.iter().flat_map(of).collect()
}

fn threads(device: &Device) -> Option<usize> {
    match device.info() {
        DeviceInfo::Cpu(cpu) => Some(cpu.threads),
        DeviceInfo::Gpu(_) => None,
    }
}

/// What is put in front of texts and how embeddings are compared, where that is said.
fn use_text(prompt: Option<&str>, similarity: &str) -> String {
    let prompt = prompt.map_or_else(String::new, |prompt| format!(", prompt {prompt:?}"));
    let similarity = match similarity {
        "cosine" => String::new(),
        other => format!(", embeddings compared by {other}"),
    };
    prompt + &similarity
}

impl Evaluation {
    fn text(&self) -> String {
        let Self { sentences, seconds, first_batches: first, .. } = self;
        let timed = sentences - first.sentences;
        let shapes = if first.shapes == 1 { "1 shape".to_owned() } else { format!("each of {} shapes", first.shapes) };
        let speed = match timed {
            0 => format!(
                "({sentences} in {seconds:.2} s; every batch was the first of its shape: compiling is included)"
            ),
            _ => format!(
                "({timed} in {:.2} s; {} more in {:.2} s, the first batch of {shapes}, in which pipelines are compiled)",
                seconds - first.seconds,
                first.sentences,
                first.seconds
            ),
        };
        let used = use_text(self.prompt.as_deref(), self.similarity);
        let mut text = format!("{}, {}, on {}{used}\n", self.model, self.dtype, self.device);
        text += &model::about(&self.linear_layers, &self.provenance);
        if let Some(against) = &self.against {
            let used = use_text(against.prompt.as_deref(), against.similarity);
            text += &format!(
                "against {}{used}\n{}",
                against.model,
                model::about(&against.linear_layers, &against.provenance)
            );
        }
        let against = self.against.as_ref();
        if let (Some(of), Some(pairs), Some(file)) = (&self.correlations, self.pairs, &self.pairs_file) {
            text += &of.text(pairs, file);
            let other = against.and_then(|against| Some((against, against.correlations.as_ref()?)));
            if let Some((against, other)) = other {
                text += &against.difference.correlations_text(other);
            }
        }
        if let Some(of) = &self.classification {
            text += &of.text();
            let other = against.and_then(|against| Some((against, against.accuracy.as_ref()?)));
            if let Some((against, other)) = other {
                text += &against.difference.accuracy_text(other);
            }
        }
        if let Some(of) = against.and_then(|against| against.texts.as_ref()) {
            text += &of.text();
        }
        text + &format!("{:.0} sentences per second {speed}\n", self.sentences_per_second)
    }
}
