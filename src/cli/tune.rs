//! `sparse24 tune`: which layers and operations, then [`tune`](sparse24::tune), one after another, each kept as soon as
//! it is found.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use super::shapes::{self, Float, Layer, OpName, Shape};
use super::{Outcome, print, progress, say, tuning};
use sparse24::engine::{Device, Options};
use sparse24::kernel::ShaderChecks;
use sparse24::mask::VectorLen;
use sparse24::matrix::DType;
use sparse24::measure::{self, Case, Ceilings, Policy};
use sparse24::plan::{Tuned, Tuning};
use sparse24::problem::{Op, Problem};
use sparse24::tune::{self, Cache, Key, Tried};

/// Find out by measurement which kernel is best on this device, for later runs to use.
///
/// Races the candidates of every operation and layer, each verified first, and keeps the winners in a file of this
/// adapter, driver and version of sparse24. What is in the file already is not measured again, so an interrupted run
/// goes on where it stopped. Takes the layers and operations that `bench` takes, with the same defaults. The CPU device
/// has nothing to tune.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 tune                                 # what `sparse24 bench` measures
  sparse24 tune --shapes llama-8b --tokens 1,16,512 --dtype f16 --budget 600
  sparse24 tune --device llvmpipe --shapes 64x32x128 --ops dense,sparse24 --cache /tmp/tuning

The cache folder is --cache, else $SPARSE24_CACHE, else sparse24 in the user's own: $XDG_CACHE_HOME or ~/.cache,
~/Library/Caches on macOS, %LOCALAPPDATA% on Windows. Exit code 3: a kernel gave a wrong result; it was not chosen.")]
pub(crate) struct Args {
    /// Device: `auto`, or part of an adapter's name (see `sparse24 devices`).
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// Layers: bert-base, bert-large, minilm, llama-8b, square, or MxNxK (out features x tokens x in features).
    #[arg(long, value_name = "SHAPE,...", value_delimiter = ',', default_value = "bert-base")]
    shapes: Vec<Shape>,
    /// Tokens of the named models; a result holds up to 1.5 times as many, and for as much less.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    tokens: Vec<NonZeroUsize>,
    /// Element type of weights, activations and output.
    #[arg(long, default_value = "f32")]
    dtype: Float,
    /// Vector lengths of the 2:4 operations: how many rows of W share one pattern.
    #[arg(long, value_name = "V,...", value_delimiter = ',', default_value = "1,32")]
    vector: Vec<VectorLen>,
    /// Operations. `auto` is `dense` and `sparse24`, between which it chooses.
    #[arg(long, value_name = "OP,...", value_delimiter = ',', default_value = "dense,sparse24,masked")]
    ops: Vec<OpName>,
    /// Begin with no further operation after this time; what has begun is finished. The same command goes on later.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    budget: Option<Duration>,
    /// Measure again what is in the cache.
    #[arg(long)]
    force: bool,
    /// Folder of the cache.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Tune shaders that keep their run-time checks, as `bench --checked` runs them.
    #[arg(long)]
    checked: bool,
    /// Three short samples instead of five of 10 ms: to see that it runs, not which is best. Needs --cache.
    #[arg(long)]
    quick: bool,
}

/// Of the numbers that are multiplied, and of the outputs that are checked.
const SEED: u64 = 24;

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// An operation on a layer.
struct Task {
    layer: Layer,
    problem: Problem,
    /// What is known of it so far.
    found: Option<Found>,
}

enum Found {
    Cached(Tuned),
    Tried(Tried),
}

impl Task {
    fn name(&self) -> String {
        let Layer { name, m, n, k } = &self.layer;
        format!("{name} {m}x{n}x{k}, {}", self.problem.op)
    }
}

impl Args {
    fn tasks(&self) -> Vec<Task> {
        let mut ops = self.ops.clone();
        if ops.contains(&OpName::Auto) {
            ops.retain(|op| *op != OpName::Auto);
            ops.extend([OpName::Dense, OpName::Sparse24]);
        }
        let mut tasks: Vec<Task> = Vec::new();
        for layer in shapes::layers(&self.shapes, &self.tokens) {
            for (op, _) in shapes::operations(&ops, &self.vector) {
                let problem = Problem::linear(op, layer.m, layer.n, layer.k, DType::from(self.dtype));
                // Models share shapes.
                if tasks.iter().all(|task| task.problem != problem) {
                    tasks.push(Task { layer: layer.clone(), problem, found: None });
                }
            }
        }
        tasks
    }
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let started = Instant::now();
    let in_budget = || args.budget.is_none_or(|budget| started.elapsed() < budget);
    let checks = if args.checked { ShaderChecks::Checked } else { ShaderChecks::Trusted };
    let device = Device::open(&args.device, Options { checks, ..Options::default() }).context("--device")?;
    let (Some(key), Some(caps)) = (Key::of(&device), device.caps()) else {
        say(&format!("nothing to tune on {}: the CPU device chooses by estimate", device.info().name()));
        return Ok(Outcome::Fine);
    };
    let folder = tuning::folder(args.cache.as_deref())?;
    // Three short samples say little about which kernel is best, and a cache is believed.
    anyhow::ensure!(
        !args.quick || args.cache.is_some() || std::env::var_os("SPARSE24_CACHE").is_some(),
        "--quick tunes for a trial only: give it a cache of its own with --cache DIR"
    );
    let mut cache = tuning::load(&folder, &key).unwrap_or_else(|| Cache::new(key));

    // What the device cannot do is found out before anything is measured.
    let mut tasks = args.tasks();
    for task in &tasks {
        device.plan(&task.problem).with_context(|| task.name())?;
    }
    let policy = if args.quick { Policy::QUICK } else { Policy::TUNING };
    if in_budget() && (args.force || *cache.ceilings() == Ceilings::default()) {
        cache.set_ceilings(measure::ceilings(&device, &policy).context("ceilings")?);
        // A folder that cannot be written to is found out here too.
        cache.save(&folder)?;
    }
    // Candidates are chosen by measured rates, and compared with what would run without any.
    let rates = tune::rates(cache.ceilings(), &caps.rates);
    device.set_tuning(Tuning::new(rates));
    let mut plans = Vec::new();
    for task in &mut tasks {
        match cache.get(&task.problem) {
            Some(entry) if !args.force => task.found = Some(Found::Cached(*entry.tuned())),
            _ => plans.extend(tune::candidates(&device, &task.problem).with_context(|| task.name())?),
        }
    }

    let bar = progress(plans.len());
    let mut last: Option<(Layer, Case)> = None;
    for task in tasks.iter_mut().filter(|task| task.found.is_none()) {
        if !in_budget() {
            break;
        }
        let name = task.name();
        bar.set_message(name.clone());
        let (ours, others): (Vec<_>, Vec<_>) = plans.into_iter().partition(|plan| *plan.problem() == task.problem);
        plans = others;
        // The operations of a layer follow one another.
        let case = match last.take().filter(|(layer, _)| *layer == task.layer) {
            Some((_, case)) => case,
            None => {
                let Layer { name, m, n, k } = &task.layer;
                Case::random(name, *m, *n, *k, args.dtype.into(), SEED).with_context(|| task.name())?
            }
        };
        let before = bar.position();
        let step = |tried: usize| bar.set_position(before + tried as u64);
        let tried = tune::try_all(&device, &case, task.problem.op, ours, &policy, SEED, step);
        let tried = tried.with_context(|| name.clone())?;
        last = Some((task.layer.clone(), case));
        for (plan, what) in tried.failures() {
            bar.suspend(|| say(&format!("failed: {name}: {}: {what}", plan.kernel_name())));
        }
        if let Some(tuned) = tried.tuned() {
            cache.insert(&task.problem, tuned);
            cache.save(&folder)?;
        }
        task.found = Some(Found::Tried(tried));
    }
    bar.finish_and_clear();

    print(&table(&tasks))?;
    if !cache.entries().is_empty() {
        let file = folder.join(cache.key().file_name());
        print(&format!("{} operations in {}\n", cache.entries().len(), file.display()))?;
    }
    let undone = tasks.iter().filter(|task| task.found.is_none()).count();
    if undone > 0 {
        say(&format!("out of time: {undone} of {} operations are not tuned; the same command goes on", tasks.len()));
    }
    let failed = tasks.iter().any(|task| matches!(&task.found, Some(Found::Tried(t)) if t.wrong() > 0));
    Ok(if failed { Outcome::VerificationFailed } else { Outcome::Fine })
}

/// The tasks that have been answered, and what the columns mean. Empty if there are none.
fn table(tasks: &[Task]) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_header(["layer", "m x n x k", "type", "op", "V", "ms", "vs untuned", "tried", "wrong", "kernel"]);
    let mut rows = 0;
    for Task { layer, problem, found } in tasks {
        let Some(found) = found else { continue };
        let none = || "-".to_owned();
        let (ms, gain, tried, wrong, kernel) = match found {
            Found::Cached(Tuned { way, splits, seconds, .. }) => {
                let kernel = if *splits > 1 { format!("{way}/{splits}") } else { way.to_string() };
                (format!("{:.4}", seconds * 1e3), none(), "cached".into(), none(), kernel)
            }
            Found::Tried(tried) => (
                tried.best().map_or_else(none, |(_, seconds)| format!("{:.4}", seconds * 1e3)),
                tried.gain().map_or_else(none, |gain| format!("{gain:.2}x")),
                tried.trials().len().to_string(),
                tried.wrong().to_string(),
                tried.best().map_or_else(none, |(plan, _)| plan.way()),
            ),
        };
        let Problem { op, m, n, k, storage, .. } = *problem;
        let vector = op.vector().map(|v| v.to_string()).unwrap_or_default();
        let op = if op == Op::Masked24 { "masked24" } else { op.name() };
        let shape = format!("{m}x{n}x{k}");
        let cells = [layer.name.clone(), shape, storage.to_string(), op.into(), vector, ms, gain, tried, wrong, kernel];
        table.add_row(cells);
        rows += 1;
    }
    for column in 4..=8 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    if rows == 0 {
        return String::new();
    }
    format!(
        "{}\n\nms: median of a call; vs untuned: time of the kernel that would run without tuning, over this one's\n\
         tried: kernels that were verified and timed; wrong: those whose result was not right; kernel: the one chosen\n",
        table.trim_fmt()
    )
}
