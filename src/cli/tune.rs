//! `sparse24 tune`: which layers and operations, then [`tune`](sparse24::tune), one after another, each kept as soon as
//! it is found.
//!
//! Invariant: with `--budget` nothing is begun that should not end in time, and what was found by then is kept.

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use indicatif::ProgressBar;
use serde::Serialize;

use super::args::{Json, ensure_usage};
use super::command::command_line;
use super::shapes::{self, Float, Layer, OpName, Shape};
use super::{Outcome, progress, say, tuning};
use sparse24::engine::{Device, Options};
use sparse24::kernels::ShaderChecks;
use sparse24::mask::VectorLen;
use sparse24::matrix::DType;
use sparse24::measure::{self, Case, Ceilings, Deadline, Policy, Trial};
use sparse24::plan::{Plan, Tuned, Tuning};
use sparse24::problem::{Op, Problem};
use sparse24::report::{Environment, plural};
use sparse24::tune::{self, Cache, Tried, TuningKey};

/// Find out by measurement which kernel is best on this device, for later runs to use.
///
/// Measures every kernel that an operation on a layer could use, after a check of its result, and keeps the fastest in
/// a cache file of this adapter, driver and version of sparse24, which `bench`, `embed` and the other commands read.
/// What is in the file already is not measured again, so an interrupted run goes on where it stopped. Takes the layers
/// and operations that `bench` takes, with the same defaults. The CPU device has nothing to tune. The schema of the
/// JSON is sparse24-tune/1.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 tune                                 # what `sparse24 bench` measures
  sparse24 tune --shapes llama-8b --tokens 1,16,512 --dtype f16 --budget 600
  sparse24 tune --device llvmpipe --shapes 64x32x128 --ops dense,sparse24 --cache /tmp/tuning

The cache folder is --cache, else $SPARSE24_CACHE, else sparse24 in the user's own cache folder:
$XDG_CACHE_HOME or ~/.cache, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows. Several runs
may share it. Exit code 3: a kernel gave a wrong result; it was not chosen.")]
pub(crate) struct Args {
    /// Device: `auto`, or part of an adapter's name (see `sparse24 devices`).
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// Layers: bert-base, bert-large, minilm, llama-8b, square, or MxNxK (out features x tokens x in features).
    #[arg(long, value_name = "SHAPE,...", value_delimiter = ',', default_value = "bert-base")]
    shapes: Vec<Shape>,
    /// Tokens of the named models. A result is used for up to 1.5 times as many tokens and down to 1.5 times fewer.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    tokens: Vec<NonZeroUsize>,
    /// Element type of weights, activations and output.
    #[arg(long, default_value = "f32")]
    dtype: Float,
    /// Vector lengths of the 2:4 operations: how many rows of the weights share one pattern.
    #[arg(long, value_name = "V,...", value_delimiter = ',', default_value = "1,32")]
    vector: Vec<VectorLen>,
    /// Operations. `auto` stands for `dense` and `sparse24`, between which it chooses.
    #[arg(long, value_name = "OP,...", value_delimiter = ',', default_value = "dense,sparse24,masked")]
    ops: Vec<OpName>,
    /// End after this time. What was found by then is kept, and the same command goes on from there later.
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
    #[command(flatten)]
    json: Json,
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
    /// By an earlier run, which was cut off.
    Begun(Tuned),
    Tried {
        tried: Tried,
        /// Whether the first of them is what would run without tuning, not the best of an earlier run.
        from_untuned: bool,
    },
}

/// What a task is called in messages.
fn name(layer: &Layer, problem: &Problem) -> String {
    let Layer { name, m, n, k } = layer;
    format!("{name} {m}x{n}x{k}, {}", problem.op)
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
    args.json.file()?;
    // Three short samples say little about which kernel is best, and a cache is believed.
    ensure_usage!(
        !args.quick || args.cache.is_some() || std::env::var_os(tuning::VARIABLE).is_some(),
        "--quick tunes for a trial only: give it a cache of its own with --cache DIR"
    );
    let checks = if args.checked { ShaderChecks::Checked } else { ShaderChecks::Trusted };
    let device = Device::open(&args.device, Options { checks, ..Options::default() }).context("--device")?;
    let environment = Environment::unsampled(&device, command_line());
    let (Some(key), Some(caps)) = (TuningKey::of(&device), device.caps()) else {
        say(&format!("nothing to tune on {}: the CPU device chooses by estimate", device.info().name()));
        args.json.emit("", &Run::new(environment, args, None, &[], started))?;
        return Ok(Outcome::Fine);
    };
    let folder = tuning::folder(args.cache.as_deref())?;
    let mut cache = tuning::load(&folder, &key).unwrap_or_else(|| Cache::new(key));

    // What the device cannot do is found out before anything is measured.
    let mut tasks = args.tasks();
    for task in &tasks {
        device.plan(&task.problem).with_context(|| name(&task.layer, &task.problem))?;
    }
    let policy = if args.quick { Policy::QUICK } else { Policy::TUNING };
    let mut pace = Pace::default();
    let end = args.budget.and_then(|budget| started.checked_add(budget));
    let until = |pace: &Pace| Policy { deadline: end.map(|at| Deadline { at, step: pace.step }), ..policy };
    let policy = until(&pace);
    let mut steps = Steps::new();
    if policy.has_time_for(0.0) && (args.force || *cache.ceilings() == Ceilings::default()) {
        steps.say("measuring what the device can do at most");
        let began = Instant::now();
        let ceilings = measure::ceilings(&device, &policy).context("ceilings")?;
        pace.step = pace.step.max(began.elapsed().as_secs_f64() / PROBES);
        // Those that there was no time for must not be taken for what the device does not have.
        if policy.has_time_for(0.0) {
            cache.set_ceilings(ceilings);
            // A folder that cannot be written to is found out here too.
            cache.save(&folder)?;
        }
    }
    // Candidates are chosen by measured rates, and compared with what would run without any.
    let rates = tune::rates(cache.ceilings(), &caps.rates);
    device.set_tuning(Tuning::new(rates));
    let mut work = Vec::new();
    for (at, task) in tasks.iter_mut().enumerate() {
        let known = cache.get(&task.problem).filter(|_| !args.force);
        match known {
            Some(entry) if entry.untried().is_empty() => task.found = Some(Found::Cached(*entry.tuned())),
            // What was kept of a run that was cut off may not run any more, and is begun anew then.
            known => {
                task.found = known.map(|entry| Found::Begun(*entry.tuned()));
                let rest = known.and_then(|entry| tune::remaining(&device, entry).ok());
                let from_untuned = rest.is_none();
                let plans = match rest {
                    Some(plans) => plans,
                    None => {
                        tune::candidates(&device, &task.problem).with_context(|| name(&task.layer, &task.problem))?
                    }
                };
                work.push(Work { task: at, plans, from_untuned });
            }
        }
    }

    steps.begin(work.iter().map(|work| work.plans.len()).sum());
    let operations = work.len();
    let mut last: Option<(Layer, Case)> = None;
    for (at, Work { task, plans, from_untuned }) in work.into_iter().enumerate() {
        let Task { layer, problem, found } = &mut tasks[task];
        let name = name(layer, problem);
        let candidates = plans.len();
        // Another run may have found it meanwhile.
        if let Some(entry) = cache.get(problem).filter(|e| !args.force && e.untried().is_empty()) {
            *found = Some(Found::Cached(*entry.tuned()));
            steps.pass(candidates);
            continue;
        }
        if !policy.has_time_for(pace.preparation(problem) + pace.step) {
            continue;
        }
        steps.operation(&format!("{} of {operations}: {name}: {}", at + 1, plural(candidates, "candidate")));
        let policy = until(&pace);
        pace.begin();
        // The operations of a layer follow one another.
        let case = match last.take().filter(|(of, _)| of == layer) {
            Some((_, case)) => case,
            None => layer.case(args.dtype.into(), SEED).with_context(|| name.clone())?,
        };
        let step = |tried: usize| match tried {
            0 => pace.prepared(problem),
            tried => {
                pace.stepped();
                steps.tried(tried, candidates);
            }
        };
        let tried = tune::try_all(&device, &case, problem.op, plans, &policy, SEED, step);
        let tried = tried.with_context(|| name.clone())?;
        last = Some((layer.clone(), case));
        steps.pass(candidates);
        for (plan, what) in tried.failures() {
            steps.say(&format!("failed: {name}: {}: {what}", plan.kernel_name()));
        }
        if let Some(tuned) = tried.tuned() {
            cache.insert_unfinished(problem, tuned, tried.untried());
            cache.save(&folder)?;
        }
        // Where the time was over at once, what an earlier run found still holds.
        let nothing = tried.trials().iter().all(|(_, trial)| *trial == Trial::Untried);
        if found.is_none() || !nothing {
            *found = Some(Found::Tried { tried, from_untuned });
        }
    }
    steps.end();

    let file = (!cache.entries().is_empty()).then(|| folder.join(cache.key().file_name()));
    let mut text = table(&tasks);
    if let Some(file) = &file {
        text += &format!("{} in {}\n", plural(cache.entries().len(), "operation"), file.display());
    }
    args.json.emit(&text, &Run::new(environment, args, Some(&cache), &tasks, started))?;
    let undone = tasks.iter().filter(|task| task.status() == Status::NotTuned).count();
    let unfinished = tasks.iter().filter(|task| task.status() == Status::Unfinished).count();
    if undone + unfinished > 0 {
        let of = tasks.len();
        say(&format!("out of time: of {of}, {undone} not tuned and {unfinished} in part; the same command goes on"));
    }
    let wrong = |task: &Task| matches!(&task.found, Some(Found::Tried { tried, .. }) if tried.wrong() > 0);
    Ok(if tasks.iter().any(wrong) { Outcome::VerificationFailed } else { Outcome::Fine })
}

/// What is to be tried of a task.
struct Work {
    /// Its place.
    task: usize,
    plans: Vec<Plan>,
    from_untuned: bool,
}

/// Probes that [`measure::ceilings`] compiles and samples.
const PROBES: f64 = 4.0;

/// How long things take, from how long they took before.
struct Pace {
    /// Of making operands ready.
    seconds_per_element: f64,
    /// Of a candidate, from its first call to its first sample: the longest in the last operation.
    step: f64,
    /// When what is under way began.
    began: Instant,
    /// Whether a candidate of this operation has been tried.
    stepped: bool,
}

impl Default for Pace {
    /// A slow machine's: where nothing is known, less is begun.
    fn default() -> Self {
        Self { seconds_per_element: 100e-9, step: 0.25, began: Instant::now(), stepped: false }
    }
}

impl Pace {
    /// Smaller operations take most of their time for other things.
    const ENOUGH: f64 = 1e6;

    fn elements(problem: &Problem) -> f64 {
        let Problem { m, n, k, .. } = *problem;
        m as f64 * k as f64 + n as f64 * k as f64 + m as f64 * n as f64
    }

    /// Seconds that it should take to make a problem ready.
    fn preparation(&self, problem: &Problem) -> f64 {
        self.seconds_per_element * Self::elements(problem)
    }

    /// An operation begins.
    fn begin(&mut self) {
        (self.began, self.stepped) = (Instant::now(), false);
    }

    /// Its operands are ready.
    fn prepared(&mut self, problem: &Problem) {
        let (elements, took) = (Self::elements(problem), self.lap());
        if elements >= Self::ENOUGH {
            self.seconds_per_element = took / elements;
        }
    }

    /// A candidate of it was tried.
    fn stepped(&mut self) {
        let took = self.lap();
        self.step = if self.stepped { self.step.max(took) } else { took };
        self.stepped = true;
    }

    fn lap(&mut self) -> f64 {
        let took = self.began.elapsed().as_secs_f64();
        self.began = Instant::now();
        took
    }
}

/// What is being done, on stderr: a bar on a terminal, else a line for each operation and one now and then within it.
struct Steps {
    bar: ProgressBar,
    terminal: bool,
    /// When the last line was written.
    said: Instant,
    /// Candidates of the operations that are done with.
    passed: u64,
}

impl Steps {
    /// Between two lines within an operation.
    const INTERVAL: Duration = Duration::from_secs(10);

    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { bar: ProgressBar::hidden(), terminal, said: Instant::now(), passed: 0 }
    }

    fn say(&mut self, line: &str) {
        self.bar.suspend(|| say(line));
        self.said = Instant::now();
    }

    fn begin(&mut self, steps: usize) {
        self.bar = progress(steps);
    }

    fn operation(&mut self, line: &str) {
        if self.terminal { self.bar.set_message(line.to_owned()) } else { self.say(line) }
    }

    fn tried(&mut self, tried: usize, of: usize) {
        self.bar.set_position(self.passed + tried as u64);
        if !self.terminal && self.said.elapsed() >= Self::INTERVAL {
            self.say(&format!("  {tried} of {of} tried"));
        }
    }

    fn pass(&mut self, candidates: usize) {
        self.passed += candidates as u64;
        self.bar.set_position(self.passed);
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// How far a task has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Cached,
    Tuned,
    /// Some of its candidates were tried.
    Unfinished,
    /// None of its candidates gave a right result.
    Failed,
    NotTuned,
}

impl Task {
    fn status(&self) -> Status {
        match &self.found {
            None => Status::NotTuned,
            Some(Found::Cached(_)) => Status::Cached,
            Some(Found::Begun(_)) => Status::Unfinished,
            Some(Found::Tried { tried, .. }) => match (tried.untried().is_empty(), tried.best().is_some()) {
                (true, true) => Status::Tuned,
                (false, true) => Status::Unfinished,
                (true, false) => Status::Failed,
                // Nothing was kept.
                (false, false) => Status::NotTuned,
            },
        }
    }

    fn row(&self) -> Row<'_> {
        let Problem { op, m, n, k, storage, .. } = self.problem;
        let op_name = if op == Op::Masked24 { "masked24" } else { op.name() };
        let row = Row {
            layer: &self.layer.name,
            m,
            n,
            k,
            dtype: storage.name(),
            op: op_name,
            vector: op.vector().map(VectorLen::get),
            status: self.status(),
            kernel: None,
            median_ms: None,
            vs_untuned: None,
            candidates: None,
            tried: None,
            wrong: None,
            failures: Vec::new(),
        };
        match &self.found {
            None => row,
            Some(Found::Cached(tuned) | Found::Begun(tuned)) => Row {
                kernel: Some(match tuned.splits {
                    1 => tuned.schedule.to_string(),
                    splits => format!("{}/{splits}", tuned.schedule),
                }),
                median_ms: Some(tuned.seconds * 1e3),
                ..row
            },
            Some(Found::Tried { tried, from_untuned }) => Row {
                kernel: tried.best().map(|(plan, _)| plan.schedule()),
                median_ms: tried.best().map(|(_, seconds)| seconds * 1e3),
                vs_untuned: tried.gain().filter(|_| *from_untuned),
                candidates: Some(tried.trials().len()),
                tried: Some(tried.trials().iter().filter(|(_, trial)| *trial != Trial::Untried).count()),
                wrong: Some(tried.wrong()),
                failures: tried.failures().map(|(plan, what)| format!("{}: {what}", plan.kernel_name())).collect(),
                ..row
            },
        }
    }
}

/// One run: schema `sparse24-tune/1`.
#[derive(Serialize)]
struct Run<'a> {
    schema: &'static str,
    environment: Environment,
    budget_seconds: Option<f64>,
    seconds: f64,
    /// Of the cache; null where it holds nothing.
    file_name: Option<String>,
    /// Operations in the cache.
    cached: usize,
    ceilings: Ceilings,
    operations: Vec<Row<'a>>,
}

/// An operation on a layer, with what was found out about it. Times are of one call.
#[derive(Serialize)]
struct Row<'a> {
    layer: &'a str,
    m: usize,
    n: usize,
    k: usize,
    dtype: &'static str,
    op: &'static str,
    vector: Option<usize>,
    status: Status,
    /// The fastest, with its splits of k.
    kernel: Option<String>,
    median_ms: Option<f64>,
    /// Time of the kernel that would run without tuning, over this one's.
    vs_untuned: Option<f64>,
    /// Those of this run; null where nothing was measured in it.
    candidates: Option<usize>,
    tried: Option<usize>,
    wrong: Option<usize>,
    failures: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(environment: Environment, args: &Args, cache: Option<&Cache>, tasks: &'a [Task], started: Instant) -> Self {
        let held = cache.filter(|cache| !cache.entries().is_empty());
        Self {
            schema: "sparse24-tune/1",
            environment,
            budget_seconds: args.budget.map(|budget| budget.as_secs_f64()),
            seconds: started.elapsed().as_secs_f64(),
            file_name: held.map(|cache| cache.key().file_name()),
            cached: held.map_or(0, |cache| cache.entries().len()),
            ceilings: cache.map(|cache| *cache.ceilings()).unwrap_or_default(),
            operations: tasks.iter().map(Task::row).collect(),
        }
    }
}

/// The tasks that something is known of, and what the columns mean. Empty if there are none.
fn table(tasks: &[Task]) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_header(["layer", "m x n x k", "type", "op", "V", "ms", "vs untuned", "tried", "wrong", "kernel"]);
    let mut rows = 0;
    for row in tasks.iter().filter(|task| task.status() != Status::NotTuned).map(Task::row) {
        let none = || "-".to_owned();
        let number = |x: Option<usize>| x.map_or_else(none, |x| x.to_string());
        let tried = match (row.tried, row.candidates) {
            (Some(tried), Some(all)) if tried < all => format!("{tried} of {all}"),
            (Some(tried), _) => tried.to_string(),
            (None, _) if row.status == Status::Unfinished => "begun".into(),
            (None, _) => "cached".into(),
        };
        table.add_row([
            row.layer.to_owned(),
            format!("{}x{}x{}", row.m, row.n, row.k),
            row.dtype.into(),
            row.op.into(),
            row.vector.map(|v| v.to_string()).unwrap_or_default(),
            row.median_ms.map_or_else(none, |ms| format!("{ms:.4}")),
            row.vs_untuned.map_or_else(none, |gain| format!("{gain:.2}x")),
            tried,
            number(row.wrong),
            row.kernel.unwrap_or_else(none),
        ]);
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
         tried: kernels that were verified and timed, of how many where time ran out, or what became of them in an\n\
         earlier run; wrong: those whose result was not right; kernel: the fastest\n",
        table.trim_fmt()
    )
}
