//! `sparse24 retrain`: a pruned model learns from the dense one on unlabelled text.
//!
//! Invariant: the output appears complete or not at all, and an interrupted run that is given the same flags again goes
//! on from its checkpoint as if nothing had happened.

mod plot;
mod training;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

pub(super) use self::training::{Length, Summary, Training};

use super::args::{InOut, Json, ensure_usage};
use super::command::command_line;
use super::rewrite;
use super::sensitivity::texts_of;
use super::{Outcome, model, writable};
use sparse24::error::printable;
use sparse24::io::{Layout, Provenance, Source, Stored};
use sparse24::report::Environment;
use sparse24::text::{LoadOptions, TextModel};
use sparse24::train::{Objective, TrainOptions};

const EXAMPLES: &str = "\
Examples:
  # a pattern that is fast on every GPU, and then what it cost, brought back
  sparse24 prune model/minilm pruned --method sparsegpt --vector 128 --calibration texts.txt
  sparse24 retrain pruned retrained --teacher model/minilm --input texts.txt --minutes 10
  sparse24 eval retrained --against model/minilm --pairs stsb-dev.csv

  # a language model, by its states and its probabilities of the next token
  sparse24 retrain lm-pruned lm --teacher model/smollm2 --objective logits \\
    --input texts.txt

What is pruned stays pruned: kept weights, biases and norms are trained; embeddings and a language
model's head are not. Layers that are stored dense but are 2:4 keep their zeros, and so do those of
which a tenth or more is zero. A tenth of the texts, at most 256, is held out; the parameters with
the least loss on them are written. Give text like that on which the model is to be used, as varied
as that is.

With --checkpoint a run that was interrupted goes on when the same command is given again, to the
same bits as if it had not been (on the CPU). --minutes becomes a number of steps by a short
measurement, which a run that goes on has from the file.";

/// Retrain a pruned model to have the states and embeddings of the dense one, on text without labels.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    paths: InOut,
    /// The dense model: a folder.
    #[arg(long, value_name = "DIR")]
    teacher: PathBuf,
    /// Text file, a sentence on each line (`-` is stdin).
    #[arg(long, value_name = "TXT|-")]
    input: PathBuf,
    /// How often every text is trained on.
    #[arg(long, value_name = "N", conflicts_with_all = ["minutes", "steps"])]
    epochs: Option<f64>,
    /// How long to train: a short measurement says how many steps that is; 10 unless given.
    #[arg(long, value_name = "M", conflicts_with = "steps")]
    minutes: Option<f64>,
    /// How many steps to train, of --batch texts each.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// What the model is to have from the teacher: its states and embeddings, all layers trained together (states), or
    /// attention and feed-forward of each block one after the other (blocks: shorter steps); or the embeddings alone;
    /// or of a language model the states and, by their divergence, the probabilities of the next token (logits).
    #[arg(long, value_name = "states|blocks|embeddings|logits", default_value = "states")]
    objective: Objective,
    /// Largest learning rate; 0.0004 unless given.
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Seed of the order of texts.
    #[arg(long, value_name = "N", default_value_t = 24)]
    seed: u64,
    /// File that an interrupted run goes on from: written every minute, and read if it is there.
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Seconds between two writings of the checkpoint.
    #[arg(long, value_name = "S", env = "SPARSE24_CHECKPOINT_SECONDS", default_value_t = 60, hide = true)]
    checkpoint_seconds: u64,
    /// Memory for what the teacher makes of the texts and for a batch's values and gradients, in MiB; what does not fit
    /// is computed again.
    #[arg(long, value_name = "MIB", default_value_t = 1920, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    memory: u64,
    /// Draw the losses of all steps as SVG.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    running: model::Running,
}

/// A run as JSON.
#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    environment: Environment,
    input: String,
    output: String,
    teacher: String,
    text: String,
    /// What the new file says of how its weights were made.
    provenance: Provenance,
    #[serde(flatten)]
    summary: Summary,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let (input, output) = args.paths.get()?;
    ensure_usage!(
        [args.epochs, args.minutes, args.learning_rate].iter().flatten().all(|x| *x > 0.0 && x.is_finite()),
        "--epochs, --minutes and --learning-rate take a number above 0"
    );
    args.json.file()?;
    let plot = args.plot.as_deref().map(writable).transpose().context("--plot")?;
    let checkpoint_path = args.checkpoint.as_deref().map(writable).transpose().context("--checkpoint")?;
    let load = |path: &Path| -> Result<TextModel> {
        let folder = path.to_str().filter(|_| path.is_dir());
        let folder = folder.with_context(|| format!("{}: a model's folder is needed", path.display()))?;
        Ok(TextModel::load_any(&model::files(folder)?, LoadOptions::default())?)
    };
    let mut student = load(input)?;
    let teacher = load(&args.teacher).context("--teacher")?;
    let source = Source::open(input)?;
    let model = rewrite::create(input, &source, output, false)?;

    let read = texts_of("--input", &args.input, &student.tokenizer)?;
    let mut provenance = Provenance::of(&source.metadata());
    provenance.note("retrained_on", &read.described(&args.input));
    // One tokenizer's ids are another's other words.
    let some = teacher.tokenizer.encode(&read.samples)?.ids;
    ensure!(
        read.ids.starts_with(&some),
        "--teacher {}: its tokenizer makes other ids of a text than that of {}",
        args.teacher.display(),
        input.display()
    );
    let texts = read.ids;
    student.checkpoint.find_sparsity()?;
    let student_model = student.pipeline.attach(&student.checkpoint)?;
    let teacher_model = teacher.pipeline.attach(&teacher.checkpoint)?;
    let device = args.running.device()?;
    let defaults = TrainOptions::default();
    let options = TrainOptions {
        objective: args.objective,
        batch: args.running.batching().texts,
        learning_rate: args.learning_rate.unwrap_or(defaults.learning_rate),
        seed: args.seed,
        memory: args.memory << 20,
        ..defaults
    };
    let length = match (args.steps, args.epochs) {
        (Some(steps), _) => Length::Steps(steps),
        (None, Some(epochs)) => Length::Epochs(epochs),
        (None, None) => Length::Minutes(args.minutes.unwrap_or(10.0)),
    };
    let training = Training {
        device: &device,
        student: &student_model,
        teacher: &teacher_model,
        texts,
        length,
        options,
        checkpoint: checkpoint_path.as_deref().map(|path| (path, Duration::from_secs(args.checkpoint_seconds))),
    };
    let (result, summary) = training.run()?;
    let actions = source.items().map(|item| Ok((item, result.action(item)?))).collect::<Result<Vec<_>>>()?;
    let made_from: Vec<_> = provenance.metadata().collect();
    let written =
        model.write(&source, layout_of(&source), &actions, &made_from, |item, action| result.content(item, action))?;
    rewrite::say_lost(&written);
    if let Some(path) = &plot {
        plot::write(&summary.history, path)?;
    }
    let report = Report {
        schema: "sparse24-train/1",
        version: env!("CARGO_PKG_VERSION"),
        environment: Environment::unsampled(&device, command_line()),
        input: input.display().to_string(),
        output: output.display().to_string(),
        teacher: args.teacher.display().to_string(),
        text: args.input.display().to_string(),
        provenance,
        summary,
    };
    args.json.emit(&format!("{}{}\n", report.summary.text(), printable(&report.output)), &report)?;
    Ok(Outcome::Fine)
}

/// The form that compressed matrices have in the new file: that of the old one.
fn layout_of(source: &Source) -> Layout {
    let of = |stored| match stored {
        Stored::Native => Some(Layout::Native),
        Stored::Bitmask => Some(Layout::Bitmask),
        Stored::Cutlass => Some(Layout::Cutlass),
        _ => None,
    };
    source.items().find_map(|item| of(item.stored)).unwrap_or(Layout::Dense)
}
