//! `sparse24 bench`: which layers, which operations, then [`measure`](sparse24::measure) and
//! [`report`](sparse24::report).

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use regex::Regex;

use super::args::{Usage, ensure_usage};
use super::output::Output;
use super::shapes::{self, Float, Layer, OpName, Shape};
use super::{Outcome, compare, kernels, model_bench, print, progress, say, tuning};
use sparse24::engine::{Device, DeviceInfo, Options};
use sparse24::error::printable;
use sparse24::io::{self, Dtype, Item};
use sparse24::kernels::{Architecture, Caps, Kernel, ShaderChecks};
use sparse24::mask::VectorLen;
use sparse24::matrix::DType;
use sparse24::measure::{self, Case, Ceilings, Choice, Policy, Request};
use sparse24::plan::{CpuSchedule, Plan, Tuning};
use sparse24::problem::{Op, Problem};
use sparse24::report::compare::{Key, Scope};
use sparse24::report::{Environment, Report, Skipped, plural};
use sparse24::simd::SimdLevel;

/// Measure dense, 2:4 and masked GEMMs side by side, every result verified first.
///
/// Computes Y = X·Wᵀ for weights W of m output features by k input features and n tokens. 2:4 weights and the mask are
/// the dense weights pruned by magnitude.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:
  sparse24 bench --shapes llama-8b --tokens 1,512 --dtype f16 --vector 1,32,128
  sparse24 bench --device llvmpipe --shapes 65x33x100 --ops dense,sparse24 --json run.json
  sparse24 bench --weights model.safetensors --filter 'encoder.*dense' --tokens 128
  sparse24 bench --model bert-base --batch 8 --seq 128 --vector 32 --json bert.json
  sparse24 bench --explain --architecture rdna3 --shapes llama-8b   # a GPU elsewhere
  sparse24 bench --format md                             # a table to paste
  sparse24 bench --compare before.json --fail-slower 5   # exit code 3 if slower

Exit codes:
  0  every row is verified
  1  an error, or tensors of --weights that could not be measured beside others
  2  wrong options
  3  a row failed verification, or is slower than --fail-slower allows",
    mut_arg("json", |json| json.alias("out"))
)]
pub(crate) struct Args {
    /// Device: `auto`, `cpu`, or part of an adapter's name (see `sparse24 devices`).
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// Layers: bert-base, bert-large, minilm, llama-8b, square, or MxNxK (out features x tokens x in features).
    #[arg(long, value_name = "SHAPE,...", value_delimiter = ',', default_value = "bert-base")]
    shapes: Vec<Shape>,
    /// Tokens of the named models and of --weights; MxNxK and square have their own.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    tokens: Vec<NonZeroUsize>,
    /// Measure a whole model instead of single layers: a folder with config.json and model.safetensors, in a binary built
    /// with the feature `hub` the name of one on the Hugging Face hub, or one of minilm, bert-base, bert-large for random
    /// weights of that model's sizes.
    #[arg(long, value_name = "DIR|NAME", conflicts_with_all = ["shapes", "tokens", "weights", "plan"])]
    model: Option<String>,
    /// Texts of a batch of the --model; 32 unless given.
    #[arg(long, value_name = "B", requires = "model")]
    batch: Option<NonZeroUsize>,
    /// Tokens of each of its texts; 64 unless given.
    #[arg(long, value_name = "S", requires = "model")]
    seq: Option<NonZeroUsize>,
    /// Element type of weights, activations and output; f32, or with --weights the file's own (bf16 as f32), unless
    /// given.
    #[arg(long)]
    dtype: Option<Float>,
    /// Vector lengths of the 2:4 rows: how many rows of W share one pattern. [default: 1,32; with --model 1,32,128]
    #[arg(long, value_name = "V,...", value_delimiter = ',')]
    vector: Vec<VectorLen>,
    /// Operations. `auto` is 2:4 as an embedder's `Linear` runs it with the same tuning: dense wherever 2:4 would lose;
    /// `masked24` holds the mask as 2:4 codes. [default: dense,sparse24,masked; with --model dense,sparse24,auto,masked]
    #[arg(long, value_name = "OP,...", value_delimiter = ',')]
    ops: Vec<OpName>,
    /// Kernel: `auto` for the planner's choice, or a name as in the last column of --wide or the JSON's `kernel`: on the
    /// CPU device gemm_crate, columns, gather or gemv, on a GPU a tile such as 64x64x16. Operations that have no such
    /// kernel are left to the planner, and so is `auto`.
    #[arg(long, value_name = "auto|KERNEL", default_value = "auto")]
    plan: String,
    /// Print for each row which kernel was chosen and why, its predicted bound, padding, bytes and operations.
    #[arg(long)]
    explain: bool,
    /// With --explain: say what would be chosen on a GPU of this architecture, by the machine code that its compiler made
    /// of the kernels, and run nothing: rdna2, rdna3, rdna4, ampere (GA100 alone), ada, apple-m1, adreno. Matrices of
    /// 8 x 8, which Apple's has, are left out.
    #[arg(long, value_name = "NAME", requires = "explain", value_parser = kernels::architecture,
        conflicts_with_all = ["device", "model", "weights", "plan", "threads", "cache", "no_tuning", "json", "format",
            "wide", "legend", "compare", "fail_slower", "quick", "checked", "seed"])]
    architecture: Option<Architecture>,
    /// Threads of the CPU device; one per core unless given. No effect on a GPU.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Vector instructions of the CPU device's kernels: scalar, avx2 or avx512; the widest there are unless given.
    /// The `gemm` crate, which multiplies dense weights, takes the widest (without this crate's feature `avx512`, AVX2).
    #[arg(long, value_name = "LEVEL", env = "SPARSE24_SIMD")]
    simd: Option<SimdLevel>,
    /// Measure on the 2-D float tensors of this file instead of random weights.
    #[arg(long, value_name = "FILE.safetensors", conflicts_with = "shapes")]
    weights: Option<PathBuf>,
    /// Take only tensors whose name matches.
    #[arg(long, value_name = "REGEX", requires = "weights")]
    filter: Option<Regex>,
    /// Seed of the random weights and activations.
    #[arg(long, default_value_t = 24)]
    seed: u64,
    /// Three short samples instead of ten of 20 ms, or up to thirty where the machine is not quiet: to see that it
    /// runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Keep the run-time checks in the shaders.
    #[arg(long)]
    checked: bool,
    /// Folder of the caches of `sparse24 tune` (see there), from which a GPU's kernels are chosen.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Choose kernels by estimates, whatever was tuned.
    #[arg(long, conflicts_with = "cache")]
    no_tuning: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    compare: compare::Flags,
}

impl Default for Args {
    /// What `bench` without flags means.
    fn default() -> Self {
        #[derive(Parser)]
        struct Bench {
            #[command(flatten)]
            args: Args,
        }
        Bench::parse_from(["bench"]).args
    }
}

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
    /// Texts of a batch and tokens of a text, for `--model`.
    pub(super) fn batch_and_seq(&self) -> (usize, usize) {
        (self.batch.map_or(32, NonZeroUsize::get), self.seq.map_or(64, NonZeroUsize::get))
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype.map_or(DType::F32, DType::from)
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// The run that this one is compared with, read now.
    pub(super) fn earlier(&self) -> Result<Option<compare::Earlier<'_>>> {
        self.compare.open()
    }

    pub(super) fn explain(&self) -> bool {
        self.explain
    }

    pub(super) fn output(&self) -> &Output {
        &self.output
    }

    /// The operations asked for, in the order of their rows.
    pub(super) fn operations(&self) -> Vec<(Op, Choice)> {
        let model = self.model.is_some();
        let vectors = match &self.vector[..] {
            [] if model => shapes::vectors([1, 32, 128]),
            [] => shapes::vectors([1, 32]),
            given => given.to_vec(),
        };
        let ops = match &self.ops[..] {
            [] if model => &[OpName::Dense, OpName::Sparse24, OpName::Auto, OpName::Masked][..],
            [] => &[OpName::Dense, OpName::Sparse24, OpName::Masked],
            given => given,
        };
        shapes::operations(ops, &vectors)
    }

    /// How each operation is solved on a layer. `--plan` is a name of at least one of them.
    fn requests(&self, device: &Device, (m, n, k, dtype): (usize, usize, usize, DType)) -> Result<Vec<Request>> {
        let mut requests = Vec::new();
        let mut names = Vec::new();
        for (op, choice) in self.operations() {
            let problem = Problem::linear(op, m, n, k, dtype);
            let plan = match choice {
                Choice::Auto => device.plan_or_dense(&problem)?,
                _ => device.plan(&problem)?,
            };
            let mut request = Request { op, plan, choice };
            if self.plan != "auto" && choice != Choice::Auto {
                let candidates = device.candidates(&problem)?;
                names.extend(candidates.iter().map(Plan::schedule));
                let named = |plan: &Plan| plan.schedule() == self.plan || plan.kernel_name() == self.plan;
                if let Some(plan) = candidates.into_iter().find(named) {
                    request = Request { op, plan, choice: Choice::User };
                }
            }
            requests.push(request);
        }
        if self.plan != "auto" && requests.iter().all(|r| r.choice != Choice::User) {
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
            for (op, choice) in self.operations() {
                let problem = Problem::linear(op, m, n, k, self.dtype());
                let (plan, auto) = match choice {
                    Choice::Auto => (Plan::gpu_or_dense(&problem, &caps, &tuning)?, ", auto"),
                    _ => (Plan::gpu(&problem, &caps, &tuning)?, ""),
                };
                print(&format!("{name} {m}x{n}x{k}, {op}{auto}: {}\n", plan.explain()))?;
            }
        }
        Ok(Outcome::Fine)
    }

    /// Opens the device, and describes the run that starts now.
    pub(super) fn environment(&self) -> Result<(Device, Policy, Environment)> {
        let checks = if self.checked { ShaderChecks::Checked } else { ShaderChecks::Trusted };
        let options = Options { threads: self.threads.map(usize::from), simd: self.simd, checks, ..Options::default() };
        let device = Device::open(&self.device, options).context("--device")?;
        if !self.no_tuning {
            tuning::apply(&device, self.cache.as_deref())?;
        }
        let policy = if self.quick { Policy::QUICK } else { Policy::FULL };
        let environment = Environment::new(&device, &policy, self.seed, command_line());
        Ok((device, policy, environment))
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
    fn keys(&self, source: &Source, (m, n, k, dtype): (usize, usize, usize, DType)) -> Vec<Key> {
        let (Source::Random(Layer { name, .. }) | Source::Tensor { name, .. }) = source;
        let key = |(op, choice): (Op, Choice)| Key {
            name: name.clone(),
            shape: Some((m, n, k)),
            ..Key::new(op, choice, dtype)
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
        self.command_of(device, words, dtype, request.op, request.choice)
    }

    /// The command that measures one row on what `source` says, with the dense one that it is compared with.
    pub(super) fn command_of(
        &self,
        device: &Device,
        source: Vec<String>,
        dtype: DType,
        op: Op,
        choice: Choice,
    ) -> String {
        // The device itself, since `auto` is another one elsewhere.
        let device = match device.info() {
            DeviceInfo::Gpu(gpu) => quoted(&gpu.name),
            DeviceInfo::Cpu(_) => "cpu".to_owned(),
        };
        let mut words = vec!["sparse24".to_owned(), "bench".into(), "--device".into(), device];
        words.extend(source);
        words.extend(["--dtype".into(), dtype.to_string(), "--ops".into()]);
        match op {
            Op::Dense => words.push("dense".into()),
            Op::Masked => words.push("dense,masked".into()),
            Op::Masked24 => words.push("dense,masked24".into()),
            Op::Sparse24(v) => {
                let op = if choice == Choice::Auto { "auto" } else { "sparse24" };
                words.extend([format!("dense,{op}"), "--vector".into(), v.to_string()]);
            }
        }
        if choice == Choice::User {
            words.extend(["--plan".into(), self.plan.clone()]);
        }
        if let Some(threads) = self.threads {
            words.extend(["--threads".into(), threads.to_string()]);
        }
        if let Some(simd) = self.simd {
            words.extend(["--simd".into(), simd.to_string()]);
        }
        words.extend(["--seed".into(), self.seed.to_string()]);
        words.extend(self.quick.then(|| "--quick".into()));
        words.extend(self.checked.then(|| "--checked".into()));
        words.extend(self.no_tuning.then(|| "--no-tuning".into()));
        if let Some(cache) = &self.cache {
            words.extend(["--cache".into(), quoted(&cache.display().to_string())]);
        }
        words.join(" ")
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
    keys: Vec<Key>,
    skipped: Vec<Skipped>,
}

impl Work {
    /// Leaves out a tensor, and says so. What was asked for as such is not left out: its error ends the run, as a lost
    /// device does.
    fn skip(&mut self, source: &Source, file: Option<&io::Source>, error: anyhow::Error) -> Result<()> {
        let lost = matches!(error.downcast_ref(), Some(sparse24::Error::DeviceLost(_)));
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
    let schedules = [CpuSchedule::GemmCrate, CpuSchedule::Columns, CpuSchedule::Gather, CpuSchedule::Gemv];
    name.starts_with("cpu_") || schedules.iter().any(|schedule| schedule.name() == name)
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
        return model_bench::run(args, model, earlier.as_ref());
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
            for Request { op, plan, choice } in requests {
                let auto = if *choice == Choice::Auto { ", auto" } else { "" };
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

/// The command that runs.
pub(super) fn command_line() -> String {
    let given: Vec<_> = std::env::args_os().skip(1).map(|a| quoted(&a.to_string_lossy())).collect();
    if given.is_empty() { "sparse24 bench".into() } else { format!("sparse24 {}", given.join(" ")) }
}

/// A word as a POSIX shell takes it.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
