//! `sparse24 retrain`: a pruned model learns from the dense one on unlabelled text.
//!
//! Invariant: the output appears complete or not at all, and an interrupted run that is given the same flags again goes on
//! from its checkpoint as if nothing had happened.

mod plot;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::args::{InOut, Json, ensure_usage};
use super::bench::command_line;
use super::rewrite::{self, Fate, Fates, Made};
use super::sensitivity::calibration;
use super::{Outcome, model, progress, say, writable};
use sparse24::error::printable;
use sparse24::graph::{Checkpoint, LinearTensor};
use sparse24::io::{Dtype, Item, Layout, NewFolder, Provenance, Raw24, Source, Spec24, Stored};
use sparse24::report::Environment;
use sparse24::train::{Objective, Options, Pace, Step, Trainer};
use sparse24::{DType, Elements, HostWeights, Matrix, Sparse24};

const EXAMPLES: &str = "\
Examples:
  # a pattern that is fast on every GPU, and then what it cost, brought back
  sparse24 prune model/minilm pruned --method sparsegpt --vector 128 --calibration texts.txt
  sparse24 retrain pruned retrained --teacher model/minilm --input texts.txt --minutes 10
  sparse24 eval retrained --against model/minilm --pairs stsb-dev.csv

What is pruned stays pruned: kept weights, biases and norms are trained, embeddings are not. Layers
that are stored dense but are 2:4, or have other zeros, keep these. A tenth of the texts, at most
256, is held out; the parameters with the least loss on them are written. Give text like that on
which the model is to be used, as varied as that is.

With --checkpoint a run that was interrupted goes on when the same command is given again, to the
same bits as if it had not been (on the CPU). --minutes becomes a number of steps by a short
measurement, so that a run which goes on needs the --steps that the first one printed.";

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
    /// What the model is to have from the teacher: its states and embeddings, or the embeddings alone.
    #[arg(long, value_name = "states|embeddings", value_parser = objective, default_value = "states")]
    objective: Objective,
    /// Largest learning rate.
    #[arg(long, value_name = "RATE")]
    rate: Option<f64>,
    /// Seed of the order of texts.
    #[arg(long, value_name = "N", default_value_t = 24)]
    seed: u64,
    /// File that an interrupted run goes on from: written every minute, and read if it is there.
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Seconds between two writings of the checkpoint.
    #[arg(long, value_name = "S", env = "SPARSE24_CHECKPOINT_SECONDS", default_value_t = 60, hide = true)]
    checkpoint_seconds: u64,
    /// Memory for a batch's values and gradients, in MiB; what does not fit is computed twice.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    memory: u64,
    /// Draw the losses of all steps as SVG.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    running: model::Running,
}

fn objective(text: &str) -> Result<Objective, String> {
    match text {
        "states" => Ok(Objective::States),
        "embeddings" => Ok(Objective::Embeddings),
        _ => Err("is not states or embeddings".into()),
    }
}

/// What is known of a run so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct History {
    steps: Vec<Step>,
    /// After how many steps the texts that are held out had which loss.
    held_out: Vec<(u64, f64)>,
    /// Of all sittings, evaluations included.
    seconds: f64,
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
    /// Texts that were trained on, and those that were held out.
    texts: usize,
    held_out_texts: usize,
    objective: &'static str,
    batch: usize,
    rate: f64,
    seed: u64,
    steps: u64,
    /// As measured before the run, where --minutes asked for it.
    seconds_per_step: Option<f64>,
    best_step: u64,
    best_loss: f64,
    /// What the new file says of how its weights were made.
    provenance: Provenance,
    #[serde(flatten)]
    history: History,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let (input, output) = args.paths.get()?;
    ensure_usage!(
        [args.epochs, args.minutes, args.rate].iter().flatten().all(|x| *x > 0.0 && x.is_finite()),
        "--epochs, --minutes and --rate take a number above 0"
    );
    args.json.file()?;
    let plot = args.plot.as_deref().map(writable).transpose().context("--plot")?;
    let checkpoint_path = args.checkpoint.as_deref().map(writable).transpose().context("--checkpoint")?;
    let load = |path: &Path| {
        let folder = path.to_str().filter(|_| path.is_dir());
        let folder = folder.with_context(|| format!("{}: a model's folder is needed", path.display()))?;
        model::read(&model::files(folder)?, None, DType::F32, None)
    };
    let mut student = load(input)?;
    let teacher = load(&args.teacher).context("--teacher")?;
    let source = Source::open(input)?;
    rewrite::refuse_own_files(input, &source, output, false)?;
    let folder = NewFolder::create(output)?;

    let read = calibration(&args.input, &student.tokenizer).context("--input")?;
    let mut provenance = Provenance::of(&source.metadata());
    provenance.note("retrained_on", &read.described(&args.input));
    let texts = read.ids;
    // One tokenizer's ids are another's other words.
    let samples: Vec<&str> = SAMPLES.lines().collect();
    ensure!(
        student.tokenizer.encode(&samples)?.ids == teacher.tokenizer.encode(&samples)?.ids,
        "--teacher {}: its tokenizer makes other ids of a text than that of {}",
        args.teacher.display(),
        input.display()
    );
    student.checkpoint.find_sparsity()?;
    let student_model = student.pipeline.attach(&student.checkpoint)?;
    let teacher_model = teacher.pipeline.attach(&teacher.checkpoint)?;
    let device = args.running.device()?;
    let defaults = Options::default();
    let options = Options {
        objective: args.objective,
        batch: args.running.batching().texts,
        rate: args.rate.unwrap_or(defaults.rate),
        seed: args.seed,
        memory: args.memory << 20,
        ..defaults
    };
    let per_epoch = Trainer::steps_of_epoch(texts.len(), &options);
    let (steps, pace) = match (args.steps, args.epochs) {
        (Some(steps), _) => (steps, None),
        (None, Some(epochs)) => (((epochs * per_epoch as f64).round() as u64).max(1), None),
        (None, None) => {
            let minutes = args.minutes.unwrap_or(10.0);
            let pace = Trainer::measure(&device, &student_model, &teacher_model, &texts, &options)?;
            let steps = steps_in(minutes * 60.0, &pace);
            say(&format!("{minutes} minutes are {steps} steps of {:.2} s: --steps {steps}", pace.step));
            (steps, Some(pace.step))
        }
    };
    let (batch, rate) = (options.batch, options.rate);
    let mut trainer = Trainer::new(&device, &student_model, &teacher_model, texts, steps, options)?;
    let mut history = History::default();
    if let Some(path) = checkpoint_path.as_deref().filter(|path| path.exists()) {
        history = serde_json::from_str(&trainer.resume(path).context("--checkpoint")?).context("--checkpoint")?;
        say(&format!("{}: going on after step {} of {steps}", path.display(), trainer.done()));
    }
    let [trained, held_out] = trainer.texts();
    let bar = progress(steps as usize);
    let every = steps.div_ceil(evaluations(steps)).max(1);
    let before = history.seconds;
    let start = Instant::now();
    let mut saved = Instant::now();
    bar.set_position(trainer.done());
    if trainer.done() == 0 {
        history.held_out.push((0, trainer.evaluate()?));
    }
    let keep = |trainer: &Trainer, history: &History| match &checkpoint_path {
        Some(path) => Ok::<_, anyhow::Error>(trainer.save(path, &serde_json::to_string(history)?)?),
        None => Ok(()),
    };
    loop {
        // What a run that stops here, by itself or not, is to go on from is the state before this step.
        let step = trainer.step().inspect_err(|_| {
            let _ = keep(&trainer, &history);
        })?;
        let Some(step) = step else { break };
        history.steps.push(step);
        bar.set_position(step.number);
        bar.set_message(format!("loss {:.4}", step.loss));
        if step.number.is_multiple_of(every) || step.number == steps {
            history.held_out.push((step.number, trainer.evaluate()?));
        }
        history.seconds = before + start.elapsed().as_secs_f64();
        if saved.elapsed() >= Duration::from_secs(args.checkpoint_seconds) {
            keep(&trainer, &history)?;
            saved = Instant::now();
        }
    }
    keep(&trainer, &history)?;
    bar.finish_and_clear();
    let result = trainer.result()?;
    let (path, layout) = (folder.weights(), layout_of(&source));
    let fates = write(&source, &result, layout, &provenance, &path)
        .map_err(|e| anyhow::Error::msg(folder.shown(&format!("{e:#}"))))?;
    let left_out = folder.finish(input, &source, rewrite::stored(layout, &fates))?;
    rewrite::say_left_out(&left_out);
    if let Some(path) = &plot {
        plot::write(&history, path)?;
    }
    let (best_loss, best_step) = trainer.best().context("no evaluation was made")?;
    let report = Report {
        schema: "sparse24-train/1",
        version: env!("CARGO_PKG_VERSION"),
        environment: Environment::unsampled(&device, command_line()),
        input: input.display().to_string(),
        output: output.display().to_string(),
        teacher: args.teacher.display().to_string(),
        text: args.input.display().to_string(),
        texts: trained,
        held_out_texts: held_out,
        objective: match args.objective {
            Objective::States => "states",
            Objective::Embeddings => "embeddings",
        },
        batch,
        rate,
        seed: args.seed,
        steps,
        seconds_per_step: pace,
        best_step,
        best_loss,
        provenance,
        history,
    };
    args.json.emit(&report.text(), &report)?;
    Ok(Outcome::Fine)
}

/// What two tokenizers that are the same make the same ids of.
const SAMPLES: &str = "\
The quick brown fox jumps over the lazy dog.
Retraining, re-training & 2:4 sparsity: 1,024 tokens?
naïve café — Zürich, 東京, 🙂";

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        for (step, loss) in &self.history.held_out {
            text += &format!("step {step:>6}: loss on held-out texts {loss:.4}\n");
        }
        let Self { steps, texts, held_out_texts, best_step, best_loss, .. } = self;
        let minutes = self.history.seconds / 60.0;
        text + &format!(
            "{}: {steps} steps on {texts} texts ({held_out_texts} held out) in {minutes:.1} minutes; the least loss, \
             {best_loss:.4}, is that of step {best_step}\n",
            printable(&self.output)
        )
    }
}

/// Evaluations of a run of so many steps.
fn evaluations(steps: u64) -> u64 {
    (steps / 100).clamp(2, 10)
}

/// Steps that fit into so many seconds, evaluations included.
fn steps_in(seconds: f64, pace: &Pace) -> u64 {
    let steps = |evaluations: f64| ((seconds - evaluations * pace.evaluation) / pace.step).max(1.0) as u64;
    let first = steps(2.0);
    steps(evaluations(first) as f64 + 1.0)
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

/// Writes the file with a checkpoint's linear layers, their biases and norms.
fn write<'a>(
    source: &'a Source,
    checkpoint: &Checkpoint,
    layout: Layout,
    provenance: &Provenance,
    path: &Path,
) -> Result<Fates<'a>> {
    let mut fates = Vec::new();
    for item in source.items() {
        let fate = match checkpoint.linear_tensor(&item.name)? {
            Some(LinearTensor::Weights(HostWeights::Sparse24(w))) if item.stored != Stored::Dense => {
                Fate::Compressed(Spec24 {
                    name: item.name.clone(),
                    m: w.m(),
                    k: w.k(),
                    dtype: item.dtype,
                    vector: Some(w.vector()),
                })
            }
            Some(_) => Fate::Plain,
            None if checkpoint.vector_tensor(&item.name)?.is_some() => Fate::Plain,
            None => Fate::Kept,
        };
        fates.push((item, fate));
    }
    let plain = |item: &Item, w: &Matrix| Made::Plain(w.cast(stored_in(item.dtype)).elements().to_le_bytes());
    let provenance: Vec<_> = provenance.metadata().collect();
    rewrite::write(source, layout, &fates, &provenance, path, |item| {
        Ok(match checkpoint.linear_tensor(&item.name)? {
            Some(LinearTensor::Weights(HostWeights::Sparse24(w))) if item.stored != Stored::Dense => {
                Made::Compressed(raw(&w, item.dtype)?)
            }
            Some(LinearTensor::Weights(w)) => plain(item, &w.to_dense()?),
            Some(LinearTensor::Bias(bias)) => plain(item, &bias),
            None => match checkpoint.vector_tensor(&item.name)? {
                Some(row) => plain(item, &row),
                None => bail!("{} is not the model's", item.name),
            },
        })
    })?;
    Ok(fates)
}

fn stored_in(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::Bf16,
        _ => DType::F32,
    }
}

fn raw(w: &Sparse24, dtype: Dtype) -> Result<Raw24<'static>> {
    let values = Elements::from_f32(stored_in(dtype), &w.values().to_f32());
    ensure!(values.to_f32().iter().all(|x| x.is_finite()), "a weight is too large for {dtype}");
    Ok(Raw24::new(w.m(), w.k(), w.vector(), dtype, values.to_le_bytes(), w.meta().to_vec())?)
}
