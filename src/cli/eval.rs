//! `sparse24 eval`: how well a model's similarities agree with people's.
//!
//! Invariant: a row of the CSV file counts in full or the command fails.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;

use super::args::Json;
use super::bench::command_line;
use super::{Outcome, args, model, progress};
use sparse24::Matrix;
use sparse24::engine::{Device, DeviceInfo};
use sparse24::report::Environment;
use sparse24::text::Similarity;

/// Compare a model's similarities of pairs of sentences with scores that people gave them.
///
/// Reads a CSV file with the columns sentence, sentence, score, and prints Spearman's and Pearson's correlation of the
/// scores with the similarity of the embeddings: the cosine, unless the model's folder names another.
///
/// The sentences per second are those of all batches but the first of each shape (a shape is a number of sentences and of
/// tokens): while that one runs, pipelines are compiled and weights uploaded, and its seconds are printed apart. Tokenising
/// is a part of the seconds, loading the model is not. The schema of the JSON is sparse24-eval/1.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 eval --model model/minilm --pairs stsb-dev.csv
  sparse24 eval model/minilm --sparsity 2:4 --vector 32 --pairs stsb-dev.csv --json eval.json")]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::ModelArgs,
    #[command(flatten)]
    sparsity: model::SparsityArgs,
    /// CSV file, UTF-8, or `-` for stdin: two sentences and a score on each line. A first line whose third column is no
    /// number is a header.
    #[arg(long, value_name = "CSV")]
    pairs: PathBuf,
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
    /// What was put in front of every sentence.
    prompt: Option<String>,
    /// What of two embeddings the correlations are of.
    similarity: &'static str,
    dtype: String,
    device: String,
    threads: Option<usize>,
    batch: usize,
    pairs_file: String,
    pairs: usize,
    spearman: f64,
    pearson: f64,
    sentences: usize,
    truncated: usize,
    /// Of all sentences, from the first one's tokens to the last one's embedding.
    seconds: f64,
    /// Of them, those in the first batch of each shape, and the time that these batches took.
    first_batches: FirstBatches,
    /// Without the first batches; of all sentences where there are no others.
    sentences_per_second: f64,
}

/// The first batch of each shape, which compiles pipelines and uploads weights.
#[derive(Serialize)]
struct FirstBatches {
    shapes: usize,
    sentences: usize,
    seconds: f64,
}

/// Two sentences, and how similar they are to people.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pairs {
    pub(super) sentences: Vec<String>,
    pub(super) scores: Vec<f64>,
    /// The line on which each pair starts.
    lines: Vec<usize>,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let sparsity = args.sparsity.get()?;
    args.json.file()?;
    let Pairs { sentences, scores, lines } = Pairs::read(&args.pairs)?;
    let encoder = args.model.open(sparsity)?;
    let environment = Environment::unsampled(&encoder.device, command_line());
    let bar = progress(sentences.len());
    let name = |sentence: usize| format!("{}: line {}", args::name_of(&args.pairs), lines[sentence / 2]);

    let similarity = encoder.use_of.similarity;
    let started = Instant::now();
    let mut similarities = Vec::with_capacity(scores.len());
    let passed = encoder.windows(&sentences, &bar, &name, |_, embeddings| {
        // A window is even: it parts no pair.
        const { assert!(model::WINDOW.is_multiple_of(2)) };
        similarities.extend(similarities_of(&embeddings, similarity));
        Ok(())
    })?;
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    encoder.warn_of_truncation(passed.truncated, sentences.len());

    let pairs_file = args::name_of(&args.pairs);
    let constant = || format!("{pairs_file}: all scores or all similarities are the same: no correlation");
    let of = &args.model;
    let first_batches =
        FirstBatches { shapes: passed.shapes, sentences: passed.first_texts, seconds: passed.first_time.as_secs_f64() };
    let (timed, in_seconds) = match sentences.len() - first_batches.sentences {
        0 => (sentences.len(), seconds),
        others => (others, seconds - first_batches.seconds),
    };
    let evaluation = Evaluation {
        schema: "sparse24-eval/1",
        version: env!("CARGO_PKG_VERSION"),
        environment,
        model: of.name.get().to_owned(),
        weights: of.weights.as_ref().map(|path| path.display().to_string()),
        sparsity: model::sparsity_of(&encoder.forms),
        dtype: sparse24::DType::from(of.dtype).to_string(),
        device: encoder.device.info().name().to_owned(),
        threads: threads(&encoder.device),
        batch: of.running.batch.get(),
        pairs: scores.len(),
        spearman: spearman(&similarities, &scores).with_context(constant)?,
        pearson: pearson(&similarities, &scores).with_context(constant)?,
        pairs_file: pairs_file.clone(),
        sentences: sentences.len(),
        truncated: passed.truncated,
        seconds,
        first_batches,
        sentences_per_second: timed as f64 / in_seconds,
        linear_layers: encoder.forms,
        prompt: encoder.use_of.prompt,
        similarity: similarity.name(),
    };
    args.json.emit(&evaluation.text(), &evaluation)?;
    Ok(Outcome::Fine)
}

fn threads(device: &Device) -> Option<usize> {
    match device.info() {
        DeviceInfo::Cpu(cpu) => Some(cpu.threads),
        DeviceInfo::Gpu(_) => None,
    }
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
        let prompt = self.prompt.as_ref().map_or_else(String::new, |prompt| format!(", prompt {prompt:?}"));
        let similarity = match self.similarity {
            "cosine" => String::new(),
            other => format!(", embeddings compared by {other}"),
        };
        format!(
            "{}, {}, on {}{prompt}{similarity}\n\
             linear layers: {}\n\
             Spearman {:.4}, Pearson {:.4} over {} pairs\n\
             {:.0} sentences per second {speed}\n",
            self.model,
            self.dtype,
            self.device,
            model::forms_text(&self.linear_layers),
            self.spearman,
            self.pearson,
            self.pairs,
            self.sentences_per_second,
        )
    }
}

impl Pairs {
    pub(super) fn read(path: &Path) -> Result<Self> {
        Self::parse(args::open(path)?).with_context(|| args::name_of(path))
    }

    /// Errors name the line on which a row starts.
    pub(super) fn parse(mut from: impl Read) -> Result<Self> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes)?;
        // A row after the last one, which that swallows if its quotes are open.
        const END: &[u8] = b"end";
        bytes.push(b'\n');
        bytes.extend_from_slice(END);
        // Flexible: the library's own error about a row's length does not say what is wanted.
        let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(&bytes[..]);
        let mut record = csv::ByteRecord::new();
        let mut pairs = Self { sentences: Vec::new(), scores: Vec::new(), lines: Vec::new() };
        let mut first = true;
        let (mut line, mut counted) = (1, 0);
        while reader.read_byte_record(&mut record)? {
            // The library counts no lines that are blank or end in two characters.
            let at = record.position().map_or(0, |position| position.byte() as usize);
            let is_end = |byte: &&u8| matches!(byte, b'\r' | b'\n');
            let at = at + bytes[at..].iter().take_while(is_end).count();
            line += ends(&bytes[counted..at]);
            counted = at;
            if reader.position().byte() as usize == bytes.len() {
                ensure!(record.iter().eq([END]), "line {line}: quotes are opened in this row and not closed");
                break;
            }
            if let Some(column) = record.iter().skip(3).position(|field| field.iter().any(|byte| is_end(&byte))) {
                bail!("line {line}: column {} goes on to another line, as if its quotes were not closed", column + 4);
            }
            let text = |column: usize| -> Result<Option<&str>> {
                let text = record.get(column).map(std::str::from_utf8).transpose();
                text.map_err(|_| anyhow!("line {line}: column {} is not UTF-8", column + 1))
            };
            let (Some(a), Some(b), Some(score)) = (text(0)?, text(1)?, text(2)?) else {
                bail!("line {line} has {} columns, expected sentence, sentence, score", record.len());
            };
            match score.trim().parse::<f64>() {
                Ok(score) if score.is_finite() => {
                    pairs.sentences.extend([a.to_owned(), b.to_owned()]);
                    pairs.scores.push(score);
                    pairs.lines.push(line);
                }
                Err(_) if first => {}
                _ => bail!("line {line}: the score {score:?} is not a finite number"),
            }
            first = false;
        }
        let count = pairs.scores.len();
        ensure!(count >= 2, "{count} {} too few for a correlation", if count == 1 { "pair is" } else { "pairs are" });
        Ok(pairs)
    }
}

/// Ends of lines in a text: `\n`, `\r\n`, or `\r` alone.
fn ends(text: &[u8]) -> usize {
    let after = text.iter().skip(1).map(Some).chain([None]);
    text.iter().zip(after).filter(|&(byte, after)| *byte == b'\n' || *byte == b'\r' && after != Some(&b'\n')).count()
}

/// The similarity of each two embeddings that follow each other.
pub(super) fn similarities_of(embeddings: &Matrix, similarity: Similarity) -> Vec<f64> {
    let numbers = embeddings.elements().to_f32();
    let pairs = numbers.chunks_exact(2 * embeddings.cols());
    let of_pair = |pair: &[f32]| {
        let (a, b) = pair.split_at(embeddings.cols());
        similarity.of(a, b)
    };
    pairs.map(of_pair).collect()
}

/// Spearman's correlation; `None` where all numbers of one side are the same.
pub(super) fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    pearson(&ranks(x), &ranks(y))
}

/// The rank of each number, from 1; numbers that are equal share the mean of their ranks.
fn ranks(numbers: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
    let mut ranks = vec![0.0; numbers.len()];
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| numbers[a] == numbers[b]) {
        let mean = start as f64 + (tied.len() + 1) as f64 / 2.0;
        tied.iter().for_each(|&i| ranks[i] = mean);
        start += tied.len();
    }
    ranks
}

/// The covariance over the product of the standard deviations; `None` where one of these is zero.
fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mx, my) = (mean(x), mean(y));
    let sum = |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(x, y)| f(x - mx, y - my)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_share_the_mean_of_their_ranks() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0, 3.0]), [4.0, 1.0, 4.0, 2.0, 4.0]);
        assert_eq!(ranks(&[0.0, -0.0]), [1.5, 1.5]);
        assert_eq!(ranks(&[]), [0.0; 0]);
    }

    /// Worked by hand: sums of products of the deviations from the mean, of the ranks and of the numbers.
    #[test]
    fn correlations_are_those_of_the_definition() {
        let (x, y) = ([1.0, 2.0, 2.0, 4.0, 5.0], [1.0, 3.0, 2.0, 2.0, 6.0]);
        let near =
            |got: Option<f64>, expected: f64| assert!((got.unwrap_or(f64::NAN) - expected).abs() < 1e-12, "{got:?}");
        near(spearman(&x, &y), 7.25 / 9.5);
        near(pearson(&x, &y), 9.8 / (10.8f64 * 14.8).sqrt());
        near(pearson(&x, &x.map(|x| -3.0 * x)), -1.0);
        assert_eq!(pearson(&x, &[7.0; 5]), None);
    }

    #[test]
    fn rows_are_read_in_full_or_refused_with_their_line() {
        let parse = |text: &str| Pairs::parse(text.as_bytes()).map_err(|e| format!("{e:#}"));
        let pairs = parse("a,\"b, \"\"c\"\"\nd\",1\ne,f, 2.5 ,more\n");
        let sentences = ["a", "b, \"c\"\nd", "e", "f"].map(String::from).to_vec();
        assert_eq!(pairs, Ok(Pairs { sentences, scores: vec![1.0, 2.5], lines: vec![1, 3] }));
        assert_eq!(parse("s,t,score\na,b,1\nc,d,2\n").map(|p| p.scores), Ok(vec![1.0, 2.0]));
        for (text, error) in [
            ("a,\"b\nb\",1\nc,d\n", "line 3 has 2 columns, expected sentence, sentence, score"),
            ("a,b,1\nc,d,x\n", "line 2: the score \"x\" is not a finite number"),
            ("a,b,nan\nc,d,1\n", "line 1: the score \"nan\" is not a finite number"),
            ("s,t,score\na,b,1\n", "1 pair is too few for a correlation"),
            ("", "0 pairs are too few for a correlation"),
            ("a,\u{e9},1\n", "1 pair is too few for a correlation"),
            // Quotes that swallow rows, in a column that counts and in one that does not, closed by chance or not.
            ("a b,c d,1,\ncat,d,2\ne,f,3,\"x\ng,h,4\n", "line 3: quotes are opened in this row and not closed"),
            ("a,b,1\nc,\"d,2\ne,f,3", "line 2: quotes are opened in this row and not closed"),
            ("a,b,1\nc,d,2\n\"", "line 3: quotes are opened in this row and not closed"),
            (
                "a,b,1\nc,d,2,x,\"y\ne,f,3\ng,h,4,\"\ni,j,5\n",
                "line 2: column 5 goes on to another line, as if its quotes were not closed",
            ),
        ] {
            assert_eq!(parse(text), Err(error.to_owned()), "{text:?}");
        }
        // Rows are counted by the file's lines, whichever end these have.
        let lines = |text: &str| parse(text).map(|p| p.lines);
        assert_eq!(lines("s,t,n\r\na,b,1\r\n\r\n\r\n\"c\r\nc\",d,2\r\ne,f,3"), Ok(vec![2, 5, 7]));
        assert_eq!(lines("\n\n\na,b,1\n\n\nc,d,2\n"), Ok(vec![4, 7]));
        assert_eq!(lines("a,b,1\rc,d,2\r\re,f,3\r"), Ok(vec![1, 2, 4]));
        assert_eq!(lines("\u{feff}a,b,1\nc,d,2"), Ok(vec![1, 2]));
        let latin1 = Pairs::parse(&b"a,b,1\r\n\r\nc,d\xff,2"[..]).map_err(|e| format!("{e:#}"));
        assert_eq!(latin1, Err("line 3: column 2 is not UTF-8".to_owned()));
        assert!(parse("a,b,1\nc,d,2\n").is_ok());
    }
}
