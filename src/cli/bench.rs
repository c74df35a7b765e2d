//! `sparse24 bench`: which layers, which operations, then [`measure`](sparse24::measure) and
//! [`report`](sparse24::report).

mod args;
mod model;

use std::fmt;

use anyhow::{Context, Result, anyhow, bail};

pub(crate) use self::args::Args;
use super::args::{Usage, ensure_usage};
use super::command::quoted;
use super::shapes::{self, Layer};
use super::{Outcome, print, progress, say};
use sparse24::engine::{Device, DeviceInfo};
use sparse24::error::printable;
use sparse24::io::{self, Dtype, Item};
use sparse24::kernels::{Architecture, Caps, Kernel};
use sparse24::mask::VectorLen;
use sparse24::matrix::DType;
use sparse24::measure::{self, Case, Ceilings, PlannedBy, Request};
use sparse24::plan::{CpuSchedule, Plan, Tuning};
use sparse24::problem::{Op, Problem};
use sparse24::report::compare::{RowKey, Scope};
use sparse24::report::{Report, Skipped, plural};

/// A layer to be measured, not yet in memory.
enum Source {
    Random(Layer),
    Tensor { name: String, n: usize },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random(Layer { name, m, n, k }) => write!(f, "{name} {m}x{n}x{k}"),
            Self::Tensor { name, .. } => write!(f, "tensor {}", printable(name)),
        }
    }
}

impl Args {
    /// How each operation is solved on a layer. `--plan` is a name of at least one of them.
    fn requests(&self, device: &Device, (m, n, k, dtype): (usize, usize, usize, DType)) -> Result<Vec<Request>> {
        let mut requests = Vec::new();
        let mut names = Vec::new();
        for (op, planned_by) in self.operations() {
            let problem = Problem::linear(op, m, n, k, dtype);
            let plan = match planned_by {
                PlannedBy::Auto => device.plan_or_dense(&problem)?,
                _ => device.plan(&problem)?,
            };
            let mut request = Request { op, plan, planned_by };
            if self.plan != "auto" && planned_by != PlannedBy::Auto {
                let candidates = device.candidates(&problem)?;
                names.extend(candidates.iter().map(Plan::schedule));
                let named = |plan: &Plan| plan.schedule() == self.plan || plan.kernel_name() == self.plan;
                if let Some(plan) = candidates.into_iter().find(named) {
                    request = Request { op, plan, planned_by: PlannedBy::User };
                }
            }
            requests.push(request);
        }
        if self.plan != "auto" && requests.iter().all(|r| r.planned_by != PlannedBy::User) {
            names.sort();
            names.dedup();
            let wanted = &self.plan;
            let why = match device.info() {
                DeviceInfo::Cpu(_) if is_gpu_kernel(wanted) => "is a kernel of GPUs, and this is the CPU device",
                DeviceInfo::Gpu(_) if is_cpu_kernel(wanted) => "is a kernel of the CPU device, and this is a GPU",
                _ => "is no kernel of the chosen operations here",
            };
            let names = names.join(", ");
            return Err(Usage::error(format!("--plan: {wanted} {why}; for {m}x{n}x{k} there are {names}")));
        }
        Ok(requests)
    }

    /// Prints the plans that a GPU of this architecture would get.
    fn explain_on(&self, architecture: Architecture) -> Result<Outcome> {
        let (caps, tuning) = (Caps::example(architecture), Tuning::default());
        for Layer { name, m, n, k } in shapes::layers(&self.shapes, &self.tokens) {
            for (op, planned_by) in self.operations() {
                let problem = Problem::linear(op, m, n, k, self.dtype());
                let (plan, auto) = match planned_by {
                    PlannedBy::Auto => (Plan::gpu_or_dense(&problem, &caps, &tuning)?, ", auto"),
                    _ => (Plan::gpu(&problem, &caps, &tuning)?, ""),
                };
                print(&format!("{name} {m}x{n}x{k}, {op}{auto}: {}\n", plan.explain()))?;
            }
        }
        Ok(Outcome::Fine)
    }

    /// What is to be measured: `--shapes`, or the tensors of `--weights`.
    fn sources(&self, file: Option<&io::Source>) -> Result<Vec<Source>> {
        if let Some(file) = file {
            let mut sources = Vec::new();
            for name in self.tensors(file)? {
                sources.extend(self.tokens.iter().map(|n| Source::Tensor { name: name.clone(), n: n.get() }));
            }
            return Ok(sources);
        }
        Ok(shapes::layers(&self.shapes, &self.tokens).into_iter().map(Source::Random).collect())
    }

    /// Names of the matrices of a file: its 2-D float tensors, in whichever form they are stored.
    fn tensors(&self, file: &io::Source) -> Result<Vec<String>> {
        let float = |item: &&Item| matches!(item.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let matrices = file.items().filter(float).filter(|item| item.matrix().is_some_and(|(m, k)| m > 0 && k > 0));
        let mut names: Vec<_> = matrices.map(|item| item.name.clone()).collect();
        names.sort();
        if let Some(filter) = &self.filter {
            names.retain(|name| filter.is_match(name));
        }
        if names.is_empty() {
            let filter = self.filter.as_ref().map(|f| format!(" whose name matches {f}")).unwrap_or_default();
            bail!("{}: there is no 2-D float tensor{filter}", file.path().display());
        }
        Ok(names)
    }

    /// Shape and element type of a layer, without its weights.
    fn shape_of(&self, source: &Source, file: Option<&io::Source>) -> Result<(usize, usize, usize, DType)> {
        let (m, n, k, own) = match (source, file) {
            (Source::Tensor { name, n }, Some(file)) => {
                let item = of_file(file, name)?;
                let (m, k) = item.matrix().with_context(|| format!("{} is no matrix", printable(name)))?;
                (m, *n, k, if item.dtype == Dtype::F16 { DType::F16 } else { DType::F32 })
            }
            (Source::Random(Layer { m, n, k, .. }), _) => (*m, *n, *k, DType::F32),
            (Source::Tensor { name, .. }, None) => bail!("no file to take {name} from"),
        };
        // bf16 is widened.
        let own = if own == DType::Bf16 { DType::F32 } else { own };
        Ok((m, n, k, self.dtype.map_or(own, DType::from)))
    }

    /// Brings a layer into memory.
    fn load(&self, source: &Source, file: Option<&io::Source>) -> Result<Case> {
        match (source, file) {
            (Source::Random(layer), _) => Ok(layer.case(self.dtype(), self.seed)?),
            (Source::Tensor { name, n }, Some(file)) => {
                let w = file.matrix(of_file(file, name)?)?;
                let own = if w.dtype() == DType::Bf16 { DType::F32 } else { w.dtype() };
                let w = w.cast(self.dtype.map_or(own, DType::from));
                if let Some(at) = w.elements().to_f32().iter().position(|x| !x.is_finite()) {
                    let (row, col) = (at / w.cols(), at % w.cols());
                    bail!(
                        "weight at row {row}, column {col} is {} as {}, which cannot be measured",
                        w.get(row, col),
                        w.dtype()
                    );
                }
                Ok(shapes::case(name, w, *n, self.seed)?)
            }
            (Source::Tensor { name, .. }, None) => Err(anyhow!("no file to take {name} from")),
        }
    }

    /// What names the rows of a layer in a file.
    fn keys(&self, source: &Source, (m, n, k, dtype): (usize, usize, usize, DType)) -> Vec<RowKey> {
        let (Source::Random(Layer { name, .. }) | Source::Tensor { name, .. }) = source;
        let key = |(op, planned_by): (Op, PlannedBy)| RowKey {
            name: name.clone(),
            shape: Some((m, n, k)),
            ..RowKey::new(op, planned_by, dtype)
        };
        self.operations().into_iter().map(key).collect()
    }

    /// The command that measures one row again, with the dense one that it is compared with.
    fn command(&self, device: &Device, source: &Source, dtype: DType, request: &Request) -> String {
        let mut words = Vec::new();
        match source {
            Source::Random(Layer { m, n, k, .. }) => words.extend(["--shapes".into(), format!("{m}x{n}x{k}")]),
            Source::Tensor { name, n } => {
                let file = self.weights.as_deref().map(|p| p.display().to_string()).unwrap_or_default();
                let filter = quoted(&format!("^{}$", regex::escape(name)));
                words.extend(["--weights".into(), quoted(&file), "--filter".into(), filter]);
                words.extend(["--tokens".into(), n.to_string()]);
            }
        }
        self.command_of(device, words, dtype, request.op, request.planned_by)
    }
}

/// A layer and how each operation is to be solved on it.
struct Job {
    source: Source,
    requests: Vec<Request>,
}

/// The layers that can be measured, and the tensors that cannot.
#[derive(Default)]
struct Work {
    jobs: Vec<Job>,
    keys: Vec<RowKey>,
    skipped: Vec<Skipped>,
}

impl Work {
    /// Leaves out a tensor, and says so. What was asked for as such is not left out: its error ends the run, as a lost
    /// device does.
    fn skip(&mut self, source: &Source, file: Option<&io::Source>, error: anyhow::Error) -> Result<()> {
        let lost = error.downcast_ref().is_some_and(sparse24::Error::is_device_lost);
        match source {
            Source::Tensor { name, .. } if !lost && !error.is::<Usage>() => {
                let skipped = Skipped { name: name.clone(), reason: format!("{error:#}") };
                say(&format!("not measured: {}: {}", named(source, file), printable(&skipped.reason)));
                self.skipped.push(skipped);
                Ok(())
            }
            _ => Err(error.context(named(source, file))),
        }
    }

    /// An error if tensors were left out, whose place is after the results of the others.
    fn complete(skipped: &[Skipped], file: Option<&io::Source>) -> Result<()> {
        match (skipped.len(), file) {
            (0, _) | (_, None) => Ok(()),
            (n, Some(file)) => bail!("{}: {} could not be measured", file.path().display(), plural(n, "tensor")),
        }
    }
}

/// What errors call a layer.
fn named(source: &Source, file: Option<&io::Source>) -> String {
    match (source, file) {
        (Source::Tensor { .. }, Some(file)) => format!("{}: {source}", file.path().display()),
        _ => source.to_string(),
    }
}

fn is_gpu_kernel(name: &str) -> bool {
    // Without the splits of k.
    let base = name.split_once('/').or_else(|| name.split_once("-split")).map_or(name, |(base, _)| base);
    Kernel::all().any(|kernel| kernel.to_string() == base || kernel.schedule().to_string() == base)
}

fn is_cpu_kernel(name: &str) -> bool {
    let mut schedules = [Op::Dense, Op::Sparse24(VectorLen::ONE)].into_iter().flat_map(CpuSchedule::of);
    name.starts_with("cpu_") || schedules.any(|schedule| schedule.name() == name)
}

/// A tensor that was listed.
fn of_file<'a>(file: &'a io::Source, name: &str) -> Result<&'a Item> {
    let item = file.item(name);
    item.with_context(|| format!("{}: there is no tensor {}", file.path().display(), printable(name)))
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    args.output.check()?;
    // clap's `requires` is not asked where the option that is required clashes with one that is given.
    let of_model = args.batch.is_some() || args.seq.is_some();
    ensure_usage!(args.model.is_some() || !of_model, "--batch and --seq are of a whole model: --model is missing");
    ensure_usage!(
        args.weights.is_some() || args.filter.is_none(),
        "--filter is of a file's tensors: --weights is missing"
    );
    let earlier = args.earlier()?;
    if let Some(model) = &args.model {
        return model::run(args, model, earlier.as_ref());
    }
    if let Some(architecture) = args.architecture {
        return args.explain_on(architecture);
    }
    let file = args.weights.as_deref().map(io::Source::open).transpose()?;
    let file = file.as_ref();
    let sources = args.sources(file)?;
    let (device, policy, environment) = args.environment()?;

    // What the device cannot do is found out before anything is measured, and so is what there is to compare.
    let mut work = Work::default();
    for source in sources {
        let planned = args.shape_of(&source, file).and_then(|shape @ (m, n, k, dtype)| {
            let requests = args.requests(&device, shape)?;
            measure::fits_into_memory(&device, (m, n, k), dtype, &requests)?;
            Ok((args.keys(&source, shape), requests))
        });
        match planned {
            Ok((keys, requests)) => {
                work.keys.extend(keys);
                work.jobs.push(Job { source, requests });
            }
            Err(e) => work.skip(&source, file, e)?,
        }
    }
    if let Some(earlier) = &earlier {
        earlier.covers(&Scope::Layers, &work.keys)?;
    }
    if args.explain {
        for Job { source, requests } in &work.jobs {
            for Request { op, plan, planned_by } in requests {
                let auto = if *planned_by == PlannedBy::Auto { ", auto" } else { "" };
                args.output.remark(&format!("{source}, {op}{auto}: {}\n", plan.explain()))?;
            }
        }
    }

    let jobs = std::mem::take(&mut work.jobs);
    let steps = jobs.iter().map(|job| measure::steps(job.requests.len(), &policy)).max().unwrap_or(0) as u64;
    let bar = progress(jobs.len() * steps as usize);
    bar.set_message("ceilings");
    let ceilings = match jobs.is_empty() {
        true => Ceilings::default(),
        false => measure::ceilings(&device, &policy).context("ceilings")?,
    };
    let mut rows = Vec::new();
    for (done, Job { source, requests }) in jobs.iter().enumerate() {
        let measured = args.load(source, file).and_then(|case| {
            bar.set_message(printable(&case.name).into_owned());
            let dtype = case.w.dtype();
            let progress = |step: usize| bar.set_position(done as u64 * steps + step as u64);
            let mut measured = measure::run(&device, &case, requests, &policy, args.seed, progress)?;
            for (row, request) in measured.iter_mut().zip(requests) {
                row.command = args.command(&device, source, dtype, request);
            }
            Ok(measured)
        });
        match measured {
            Ok(measured) => rows.extend(measured),
            Err(e) => bar.suspend(|| work.skip(source, file, e))?,
        }
    }
    bar.finish_and_clear();
    if rows.is_empty() {
        Work::complete(&work.skipped, file)?;
    }

    let report = Report::new(environment, ceilings, rows, work.skipped);
    for row in report.failures() {
        say(&format!("failed: {}: {}", row.kernel, row.failure.as_deref().unwrap_or_default()));
    }
    args.output.emit(&report, report.rows(), &report.page())?;
    let compared = earlier.map_or(Ok(Outcome::Fine), |earlier| earlier.compare(&report.to_json()?, &args.output))?;
    if report.failures().next().is_some() {
        return Ok(Outcome::VerificationFailed);
    }
    Work::complete(report.skipped(), file)?;
    Ok(compared)
}
