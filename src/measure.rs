//! Verify, then sample, then record: products of one layer, and what a device can do at most.
//!
//! [`run`] takes the operations of one shape together. Each is verified against the oracle before it is timed, twice:
//! on whole numbers, where sums are exact in every order and the oracle allows no error, so that a single wrong product
//! shows whatever k is; and on the operands that are timed, within f32's error bound. Outputs are drawn from all over
//! the result, and none may be left unwritten. Calls rotate through more memory than the caches hold.
//!
//! Everything that is sampled, here and elsewhere, goes through one [`Timer`]. How much the samples leave open, and
//! when more of them are taken, is in [`noise`]. [`race`](race()) is the tuner's: many plans, of which most are soon
//! given up. Invariant: a [`Record`] that is not verified has no times.

pub mod noise;
mod race;
mod timer;

use std::time::Duration;

use web_time::Instant;

use self::noise::Estimate;
pub use self::race::{Trial, race};
pub use self::timer::{Timer, Workload};
use crate::cpu::CpuWeights;
use crate::engine::{AdapterKind, Clock, CpuInfo, Device, DeviceInfo, Prepared, Probe, Tensor};
use crate::error::Result;
use crate::format::Sparse24;
use crate::mask::{Mask24, VectorLen};
use crate::matrix::{DType, Elements, Matrix};
use crate::memory;
use crate::ops::Gemm;
use crate::ops::gemm::GemmOperands;
use crate::plan::Plan;
use crate::problem::{Op, Problem};
use crate::prune;
use crate::reference::{Operands, Oracle, Sample, Verdict};
use crate::simd::SimdLevel;
use crate::weights::HostWeights;

/// How long and how often to measure.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Time that one sample takes at least.
    pub sample: Duration,
    /// Number of samples.
    pub samples: usize,
    /// Number of samples at most, where the median of fewer is [noisy](noise).
    pub max_samples: usize,
    /// Time spent on untimed calls first, at least one of them.
    pub warm_up: Duration,
    /// When to end, whatever is still to be sampled.
    pub deadline: Option<Deadline>,
}

/// When to end. Nothing is begun that should take longer than is left, for a driver that compiles a shader cannot be
/// stopped.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// The end.
    pub at: Instant,
    /// Seconds that a plan takes from its first call to its first sample, from what is known before the first one.
    pub step: f64,
}

impl Policy {
    /// Ten samples of 20 ms or more, on a quiet machine enough for a median that can be believed; on others up to three
    /// times as many.
    pub const FULL: Self = Self {
        sample: Duration::from_millis(20),
        samples: 10,
        max_samples: 30,
        warm_up: Duration::from_millis(100),
        deadline: None,
    };
    /// Three short samples: enough to see that everything runs.
    pub const QUICK: Self =
        Self { sample: Duration::from_millis(2), samples: 3, max_samples: 3, warm_up: Duration::ZERO, deadline: None };
    /// Five samples of 10 ms or more: enough to choose between kernels, of which there are dozens.
    pub const TUNING: Self = Self {
        sample: Duration::from_millis(10),
        samples: 5,
        max_samples: 5,
        warm_up: Duration::from_millis(20),
        deadline: None,
    };

    /// Whether there is time for what should take this many seconds.
    pub fn has_time_for(&self, seconds: f64) -> bool {
        self.deadline.is_none_or(|end| end.at.saturating_duration_since(Instant::now()).as_secs_f64() > seconds)
    }
}

/// The weights of one layer and the activations that it is measured with.
#[derive(Clone, Debug)]
pub struct Case {
    /// What the layer is called, such as `bert-base.ffn_in`.
    pub name: String,
    /// Dense weights, `m x k`, f32 or f16.
    pub w: Matrix,
    /// Activations, `n x k`, of the same type.
    pub x: Matrix,
}

impl Case {
    /// The problem of an operation on this layer.
    pub fn problem(&self, op: Op) -> Problem {
        Problem::linear(op, self.w.rows(), self.x.rows(), self.w.cols(), self.w.dtype())
    }

    /// A layer of the same shape and type whose numbers are whole, from -4 to 4.
    fn whole(&self, seed: u64) -> Result<Self> {
        let whole = |m: &Matrix, seed| -> Result<Matrix> {
            let mut numbers = Matrix::uniform(m.rows(), m.cols(), DType::F32, seed)?;
            if let Elements::F32(data) = numbers.elements_mut() {
                data.iter_mut().for_each(|x| *x = (*x * 4.999).trunc());
            }
            Ok(numbers.cast(m.dtype()))
        };
        // X needs another seed than W, whichever.
        Ok(Self { name: self.name.clone(), w: whole(&self.w, seed)?, x: whole(&self.x, !seed)? })
    }
}

/// One row of a benchmark file (schema `sparse24-bench/1`). Times are per call, in milliseconds; they and what follows
/// from them are `None` where the result failed verification.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct Record {
    /// Name of the layer.
    pub name: String,
    /// `dense`, `sparse24`, `masked`, `masked24` or `auto`: 2:4 weights, and dense ones in their place unless the
    /// planner expects 2:4 to be faster by a margin.
    pub op: &'static str,
    /// Output features.
    pub m: usize,
    /// Tokens.
    pub n: usize,
    /// Input features before compression.
    pub k: usize,
    /// Element type of weights, activations and output.
    pub dtype: &'static str,
    /// Type of the accumulator.
    pub accumulate: &'static str,
    /// Vector length of a 2:4 row.
    pub vector: Option<usize>,
    /// Name of the kernel.
    pub kernel: String,
    /// Its schedule and tile on a GPU, with `/splits` of k if there are several; on the CPU a
    /// [`CpuSchedule`](crate::plan::CpuSchedule).
    /// `dense_` in front where an `auto` row uses dense weights.
    pub tile: String,
    /// How the kernel was chosen: `estimated` or `measured` by the planner, or `asked` for by name.
    pub chosen: &'static str,
    /// `checked` or `trusted` shader modules, on a GPU.
    pub shader_checks: Option<&'static str>,
    /// Name of the device.
    pub device: String,
    /// Threads of the CPU device.
    pub threads: Option<usize>,
    /// Of one call.
    #[cfg_attr(feature = "report", serde(flatten))]
    pub times: MeasuredTimes,
    /// Copies of the operands that the calls rotate through.
    pub operand_sets: usize,
    /// Bytes of all these copies of weights and activations: less than the device's caches means that operands were
    /// found there.
    pub rotated_bytes: usize,
    /// `gpu_timestamps` or `host_wall`.
    pub clock: Option<&'static str>,
    /// 2mnk / median, in 10¹² per second.
    pub effective_tflops: Option<f64>,
    /// Multiply-adds really done, twice, / median, in 10¹² per second.
    pub executed_tflops: Option<f64>,
    /// Executed operations per second over the ceiling of the arithmetic that the kernel uses (f32 multiply-adds, or
    /// cooperative matrices), where that was measured.
    pub arithmetic_share: Option<f64>,
    /// Bytes of the operands, each counted once, per second over the copy ceiling; on the CPU device, over that of
    /// reading.
    pub memory_share: Option<f64>,
    /// Against the row with op `dense` of the same shape, type and file.
    #[cfg_attr(feature = "report", serde(flatten))]
    pub speedup: Speedup,
    /// Bytes of the weights on the device, metadata included.
    pub weight_bytes: usize,
    /// Largest error over its bound among the checked outputs; 1 is the most that is allowed. `None` if infinite.
    pub error_over_bound: Option<f64>,
    /// Number of outputs that were checked against the reference, in each of the two checks.
    pub checked_outputs: usize,
    /// Whether every checked output was within its bound in both checks, none was left unwritten, and every set of
    /// operands gave the same output.
    pub verified: bool,
    /// What was wrong, if it was not.
    #[cfg_attr(feature = "report", serde(skip_serializing_if = "Option::is_none"))]
    pub failure: Option<String>,
    /// The command that measures this row: for those who read the file. Empty until the caller writes it.
    pub command: String,
}

/// The samples of a row, in milliseconds; without samples all are `None`, `false` or 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct MeasuredTimes {
    /// Median of the samples.
    pub median_ms: Option<f64>,
    /// Fastest sample.
    pub min_ms: Option<f64>,
    /// Slowest sample.
    pub max_ms: Option<f64>,
    /// A quarter of the samples is as fast as this or faster.
    pub q1_ms: Option<f64>,
    /// A quarter of the samples is as slow as this or slower.
    pub q3_ms: Option<f64>,
    /// Lower end of the 95 % bootstrap interval of the median (see [`noise`]).
    pub median_low_ms: Option<f64>,
    /// Upper end of that interval.
    pub median_high_ms: Option<f64>,
    /// Whether that is too wide for the median to be believed.
    pub noisy: bool,
    /// Number of samples; more than were asked for where the machine was not quiet.
    pub samples: usize,
    /// Calls, or passes of a model, in the last sample.
    pub calls_per_sample: usize,
}

/// The median of a row with op `dense` over a row's; without such a row all are `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct Speedup {
    /// The ratio.
    #[cfg_attr(feature = "report", serde(rename = "speedup_vs_dense"))]
    pub vs_dense: Option<f64>,
    /// Lower end of its 95 % bootstrap interval.
    #[cfg_attr(feature = "report", serde(rename = "speedup_low"))]
    pub low: Option<f64>,
    /// Upper end of that interval.
    #[cfg_attr(feature = "report", serde(rename = "speedup_high"))]
    pub high: Option<f64>,
    /// Whether that is too wide for the ratio to be believed, or does not say which of the two is faster.
    #[cfg_attr(feature = "report", serde(rename = "speedup_noisy"))]
    pub noisy: bool,
}

impl Speedup {
    /// Of samples over the dense row's, if there is one: of the rounds that both have, for a deadline may end the last
    /// one between the two.
    pub(crate) fn of(dense: Option<&[f64]>, own: &[f64]) -> Self {
        let ratio = dense.and_then(|dense| {
            let rounds = dense.len().min(own.len());
            Estimate::of_ratio(&dense[..rounds], &own[..rounds])
        });
        Self {
            vs_dense: ratio.map(|r| r.value),
            low: ratio.map(|r| r.interval.low),
            high: ratio.map(|r| r.interval.high),
            noisy: ratio.is_some_and(|r| r.noisy),
        }
    }
}

/// Bytes that the operands of one row rotate through: at least twice the last cache, so that none of them is found
/// there again. GPUs do not tell theirs: 128 MiB is the L2 of the largest NVIDIA parts (B200: 126 MB). AMD's last level
/// can hold 256 MiB. A page in a browser must not take a phone's memory: 128 MiB, twice what most GPUs have; and where
/// a processor plays the GPU's part, as SwiftShader does there, arithmetic is all that counts, and verifying a set
/// takes a tenth of a second: 1 MiB.
fn rotation_bytes(info: &DeviceInfo) -> u64 {
    match info {
        DeviceInfo::Gpu(gpu) if cfg!(target_family = "wasm") => match gpu.kind {
            AdapterKind::Software => 1 << 20,
            _ => 128 << 20,
        },
        DeviceInfo::Gpu(gpu) if gpu.kind != AdapterKind::Software => 2 * (128 << 20),
        DeviceInfo::Gpu(_) => 2 * CpuInfo::host(SimdLevel::Scalar, 0).cache_bytes,
        // Where two sets are little more than that, a cache of victims still has half of the older one.
        DeviceInfo::Cpu(cpu) => 4 * cpu.cache_bytes,
    }
}

/// Most copies of the operands. Layers too small to fill the caches with that many are measured within them;
/// [`Record::rotated_bytes`] shows it.
const MAX_SETS: u64 = 256;

/// What one row measures.
#[derive(Clone, Debug)]
pub struct Request {
    /// How the weights are given.
    pub op: Op,
    /// How the case's problem is solved.
    pub plan: Plan,
    /// Who chose the plan.
    pub planned_by: PlannedBy,
}

/// Who chose a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlannedBy {
    /// The planner, for weights as they are.
    Planner,
    /// The planner, free to take dense weights: what [`crate::Linear`] does.
    Auto,
    /// The user, by name.
    User,
}

/// One plan, verified or refused, ready to be timed.
struct Subject {
    record: Record,
    problem: Problem,
    /// Floating-point operations that a call really does.
    executed_flops: f64,
    calls: Workload,
}

/// Verifies and measures plans on one layer. Weights are pruned by magnitude for 2:4 and for the mask (at V = 1).
///
/// `seed` draws the whole numbers and the outputs that are checked. `progress` is called after each plan is verified
/// and after each round of samples, with the number of such steps done. The rows come in the order of the requests.
pub fn run(
    device: &Device,
    case: &Case,
    requests: &[Request],
    policy: &Policy,
    seed: u64,
    progress: impl FnMut(usize),
) -> Result<Vec<Record>> {
    pollster::block_on(run_async(device, case, requests, policy, seed, progress))
}

/// [`run()`] where nothing may block: in a browser.
pub async fn run_async(
    device: &Device,
    case: &Case,
    requests: &[Request],
    policy: &Policy,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Record>> {
    fits_into_memory(device, (case.w.rows(), case.x.rows(), case.w.cols()), case.w.dtype(), requests)?;
    let whole = case.whole(seed)?;
    let (mut whole_sets, mut sets) = (SetCache::default(), SetCache::default());
    let mut subjects = Vec::new();
    for request in requests {
        let strict = check_once(device, &whole, request, whole_sets.get(device, &whole, request, 1)?, seed).await?;
        let own = sets.get(device, case, request, MAX_SETS)?;
        subjects.push(prepare(device, case, request, own, seed, strict).await?);
        progress(subjects.len());
    }
    let timer = Timer::new(device, *policy);
    let prepared = subjects.len();
    let mut timed: Vec<_> = subjects.iter_mut().filter(|s| s.record.verified).map(|s| &mut s.calls).collect();
    for calls in &mut timed {
        timer.calibrate_async(calls).await?;
    }
    timer.sample_in_turns_async(timed, |round| progress(prepared + round.min(policy.samples))).await?;
    subjects.iter_mut().for_each(finish);
    let is_dense = |s: &&Subject| s.record.op == "dense" && s.record.verified;
    let dense = subjects.iter().find(is_dense).map(|s| s.calls.seconds().to_vec());
    for Subject { record, calls, .. } in &mut subjects {
        record.speedup = Speedup::of(dense.as_deref(), calls.seconds());
    }
    Ok(subjects.into_iter().map(|s| s.record).collect())
}

/// An error unless the host has the memory that [`run`] takes for a layer of this shape and type: known before weights
/// are drawn or read.
pub fn fits_into_memory(
    device: &Device,
    shape: (usize, usize, usize),
    dtype: DType,
    requests: &[Request],
) -> Result<()> {
    claim_operands(&device.info(), shape, dtype, requests.iter().map(|r| (r.op, r.plan.weights())))
}

fn claim_operands(
    info: &DeviceInfo,
    (m, n, k): (usize, usize, usize),
    dtype: DType,
    requests: impl Iterator<Item = (Op, Op)>,
) -> Result<()> {
    let bytes = host_bytes(info, (m, n, k), dtype, requests);
    memory::claim(usize::try_from(bytes).unwrap_or(usize::MAX), || {
        format!("operands, copies and results of {m}x{n}x{k} in {dtype}")
    })
}

/// What [`run`] takes on the host at the most, counted from what it holds at once; buffers of software drivers
/// included. Operations are given with the form of their weights on the device.
fn host_bytes(
    info: &DeviceInfo,
    (m, n, k): (usize, usize, usize),
    dtype: DType,
    requests: impl Iterator<Item = (Op, Op)>,
) -> u128 {
    let element = dtype.bytes() as u128;
    let [wide_m, wide_n, wide_k] = [m, n, k].map(|size| size as u128);
    let (w, x, y) = (wide_m * wide_k, wide_n * wide_k, wide_n * wide_m);
    let mask = wide_m * wide_k.div_ceil(32) * 4;
    // Both cases, and what they are drawn in.
    let mut bytes = 2 * (w + x) * element + 4 * w.max(x);
    let mut known: Vec<(Op, Op)> = Vec::new();
    for (op, form) in requests {
        if known.contains(&(op, form)) {
            continue;
        }
        known.push((op, form));
        let host = match op {
            Op::Dense => w * element,
            Op::Sparse24(v) => {
                let codes = wide_m.div_ceil(v.get() as u128) * wide_k.div_ceil(32) * 4;
                wide_m * 2 * wide_k.div_ceil(4) * element + codes
            }
            Op::Masked | Op::Masked24 => w * element + mask,
        };
        let own = match (info, form) {
            (DeviceInfo::Cpu(_), Op::Sparse24(v)) => CpuWeights::sparse24_bytes(m, k, v, dtype),
            (DeviceInfo::Cpu(_), Op::Dense) => CpuWeights::dense_bytes(m, k, dtype, false),
            (DeviceInfo::Cpu(_), _) => CpuWeights::dense_bytes(m, k, dtype, true),
            (DeviceInfo::Gpu(_), _) => host,
        };
        let set = own + x * element;
        // A GPU's memory is its own: of its buffers the host holds one at a time, on its way.
        let rotated = match info {
            DeviceInfo::Gpu(gpu) if gpu.kind != AdapterKind::Software => 0,
            _ => u128::from(rotation_bytes(info)).min(set * u128::from(MAX_SETS)),
        };
        bytes += 2 * (host + set + y * element) + rotated;
    }
    // While weights are pruned and outputs are compared.
    let work = (mask + w * element).max(4 * y * element);
    // Sampled rows and columns as the oracle has them, and activations or weights that the CPU device packs or widens.
    let oracle = 512 * wide_k * 32 / 16 + wide_n.min(512) * wide_k * 8;
    let scratch = if matches!(info, DeviceInfo::Cpu(_)) { 4 * (w + 2 * x + y) } else { 0 };
    bytes + work + oracle + scratch
}

/// Steps that [`run`] reports.
pub fn steps(ops: usize, policy: &Policy) -> usize {
    ops + policy.samples
}

/// The middle one, or the mean of the middle two, of at least one time.
pub(crate) fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2.0 }
}

/// What is told of some samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The least.
    pub min: f64,
    /// With [`Self::q3`] the ends of the middle half: a quarter of the samples, rounded down, lies on either side.
    pub q1: f64,
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// See [`Self::q1`].
    pub q3: f64,
    /// The most.
    pub max: f64,
}

impl Summary {
    /// Sorts the samples and sums them up; `None` if there are none.
    ///
    /// ```
    /// use sparse24::measure::Summary;
    ///
    /// let of = |mut samples: Vec<f64>| Summary::of(&mut samples);
    /// assert_eq!(of(vec![]), None);
    /// assert_eq!(of(vec![9.0, 1.0, 4.0, 2.0]), Some(Summary { min: 1.0, q1: 2.0, median: 3.0, q3: 4.0, max: 9.0 }));
    /// assert_eq!(of(vec![3.0]), Some(Summary { min: 3.0, q1: 3.0, median: 3.0, q3: 3.0, max: 3.0 }));
    /// ```
    pub fn of(samples: &mut [f64]) -> Option<Self> {
        let last = samples.len().checked_sub(1)?;
        let median = median(samples);
        let quarter = samples.len() / 4;
        let [min, q1, q3, max] = [0, quarter, last - quarter, last].map(|at| samples[at]);
        Some(Self { min, q1, median, q3, max })
    }
}

/// Operands on the device, several times over, so that calls need not find them in a cache. Plans with the same form of
/// weights share them. All calls write one output, as layers depend on each other: else a GPU could run those of one
/// plan at the same time, and not those of another that sums splits of k in scratch.
struct Sets {
    host: HostWeights,
    weights: Vec<crate::engine::Weights>,
    xs: Vec<Tensor>,
    y: Tensor,
    weight_bytes: usize,
    bytes: usize,
}

/// Uploads weights in the form that a plan wants: their own, or dense.
fn upload(device: &Device, w: &HostWeights, form: Op) -> Result<crate::engine::Weights> {
    if w.op() == form { device.upload_weights(w) } else { device.upload_weights(&w.to_dense()?.into()) }
}

#[derive(Default)]
struct SetCache(Vec<(Op, Op, Sets)>);

impl SetCache {
    fn get(&mut self, device: &Device, case: &Case, request: &Request, most: u64) -> Result<&Sets> {
        let key = (request.op, request.plan.weights());
        let at = match self.0.iter().position(|(op, form, _)| (*op, *form) == key) {
            Some(at) => at,
            None => {
                self.0.push((key.0, key.1, Sets::new(device, case, key.0, key.1, most)?));
                self.0.len() - 1
            }
        };
        Ok(&self.0[at].2)
    }
}

impl Sets {
    fn new(device: &Device, case: &Case, op: Op, form: Op, most: u64) -> Result<Self> {
        let problem = case.problem(op);
        let pruned = |v| -> Result<Mask24> { prune::magnitude(&case.w, v) };
        let host = match op {
            Op::Dense => HostWeights::Dense(case.w.clone()),
            Op::Sparse24(v) => HostWeights::Sparse24(Sparse24::compress(&case.w, &pruned(v)?)?),
            Op::Masked => HostWeights::Masked(case.w.clone(), pruned(VectorLen::ONE)?.into_mask()),
            Op::Masked24 => HostWeights::Masked24(case.w.clone(), pruned(VectorLen::ONE)?),
        };
        let first = upload(device, &host, form)?;
        let weight_bytes = first.bytes();
        let (rows, cols) = problem.y_shape();
        let bytes = weight_bytes + case.x.bytes();
        let count = rotation_bytes(&device.info()).div_ceil(bytes.max(1) as u64).clamp(1, most);
        let y = device.zeros(rows, cols, problem.output)?;
        let mut sets = Self { host, weights: vec![first], xs: Vec::new(), y, weight_bytes, bytes };
        for set in 0..count {
            if set > 0 {
                sets.weights.push(upload(device, &sets.host, form)?);
            }
            sets.xs.push(device.upload(&case.x)?);
        }
        Ok(sets)
    }

    /// What a call leaves in an output that held poison.
    async fn output(&self, device: &Device, call: &Prepared) -> Result<Matrix> {
        device.write(&self.y, &poison(self.y.rows(), self.y.cols(), self.y.dtype())?)?;
        call.run()?;
        device.read_async(&self.y).await
    }

    /// One call per set.
    fn bind(&self, device: &Device, plan: &Plan) -> Result<Vec<Prepared>> {
        let operands = |x| GemmOperands::new(x, &self.y);
        self.weights
            .iter()
            .zip(&self.xs)
            .map(|(weights, x)| device.prepare(&Gemm { plan, weights, operands: operands(x) }))
            .collect()
    }
}

/// Runs a plan once on every set and checks the first output against the oracle and the others against the first, bit
/// for bit.
///
/// `strict` is what the check on whole numbers found wrong.
async fn prepare(
    device: &Device,
    case: &Case,
    request: &Request,
    sets: &Sets,
    seed: u64,
    strict: Option<String>,
) -> Result<Subject> {
    let problem = case.problem(request.op);
    let plan = &request.plan;
    let calls = sets.bind(device, plan)?;
    let operands = Operands::new(&sets.host, &case.x);
    let oracle = Oracle::new(&problem, operands)?;
    let first = sets.output(device, &calls[0]).await?;
    let verdict = oracle.verify(&first, sample(&problem, seed))?;
    let mut failure = strict.or_else(|| wrong(&verdict, &first));
    for (set, call) in calls.iter().enumerate().skip(1) {
        if failure.is_some() {
            break;
        }
        if sets.output(device, call).await?.elements().as_bytes() != first.elements().as_bytes() {
            failure = Some(format!("operand set {set} gives another output than set 0, from the same numbers"));
        }
    }
    let record = record(case, request, device, &verdict);
    let record = Record {
        weight_bytes: sets.weight_bytes,
        operand_sets: calls.len(),
        rotated_bytes: calls.len() * sets.bytes,
        verified: failure.is_none(),
        failure,
        ..record
    };
    Ok(Subject { record, problem, executed_flops: plan.executed_flops(), calls: Workload::rotation(calls) })
}

/// Runs a plan once and says what is wrong with the output, if anything.
async fn check_once(device: &Device, case: &Case, request: &Request, sets: &Sets, seed: u64) -> Result<Option<String>> {
    let problem = case.problem(request.op);
    let output = sets.output(device, &sets.bind(device, &request.plan)?[0]).await?;
    let operands = Operands::new(&sets.host, &case.x);
    let verdict = Oracle::new(&problem, operands)?.verify(&output, sample(&problem, seed))?;
    Ok(wrong(&verdict, &output).map(|what| format!("on whole numbers: {what}")))
}

/// The outputs that are checked: one feature and one token of every 32, so that no tile of 64 goes unseen however it
/// lies (up to 16384 of each; further apart beyond), and never fewer than 48.
fn sample(problem: &Problem, seed: u64) -> Sample {
    let share = |len: usize| len.div_ceil(32).clamp(48, 512);
    Sample::Random { features: share(problem.m), tokens: share(problem.n), seed }
}

/// What is wrong with an output: an element past its bound, or one that was never written.
fn wrong(verdict: &Verdict, output: &Matrix) -> Option<String> {
    if !verdict.passed() {
        return Some(verdict.to_string());
    }
    first_poison(output).map(|at| format!("output {at} was never written"))
}

/// NaNs with payloads that no arithmetic makes.
const POISON: (f32, half::f16, half::bf16) =
    (f32::from_bits(0x7fde_ad24), half::f16::from_bits(0x7e24), half::bf16::from_bits(0x7fe4));

/// What an output holds before it is computed, so that an element which a kernel skips is seen.
fn poison(rows: usize, cols: usize, dtype: DType) -> Result<Matrix> {
    let mut matrix = Matrix::zeros(rows, cols, dtype)?;
    match matrix.elements_mut() {
        Elements::F32(v) => v.fill(POISON.0),
        Elements::F16(v) => v.fill(POISON.1),
        Elements::Bf16(v) => v.fill(POISON.2),
    }
    Ok(matrix)
}

/// Where an output still holds poison.
fn first_poison(y: &Matrix) -> Option<usize> {
    match y.elements() {
        Elements::F32(v) => v.iter().position(|y| y.to_bits() == POISON.0.to_bits()),
        Elements::F16(v) => v.iter().position(|y| y.to_bits() == POISON.1.to_bits()),
        Elements::Bf16(v) => v.iter().position(|y| y.to_bits() == POISON.2.to_bits()),
    }
}

/// A row without times.
fn record(case: &Case, request: &Request, device: &Device, verdict: &Verdict) -> Record {
    let Request { op, plan, planned_by } = request;
    let (problem, info) = (plan.problem(), device.info());
    Record {
        name: case.name.clone(),
        op: if *planned_by == PlannedBy::Auto { "auto" } else { op.kernel_name() },
        m: problem.m,
        n: problem.n,
        k: problem.k,
        dtype: problem.storage.name(),
        accumulate: "f32",
        vector: op.vector().map(VectorLen::get),
        kernel: plan.kernel_name(),
        tile: plan.schedule(),
        chosen: plan.basis().name(),
        shader_checks: device.shader_checks().map(|c| c.name()),
        device: info.name().to_owned(),
        threads: match &info {
            DeviceInfo::Cpu(cpu) => Some(cpu.threads),
            DeviceInfo::Gpu(_) => None,
        },
        times: MeasuredTimes::default(),
        operand_sets: 0,
        rotated_bytes: 0,
        clock: None,
        effective_tflops: None,
        executed_tflops: None,
        arithmetic_share: None,
        memory_share: None,
        speedup: Speedup::default(),
        weight_bytes: 0,
        error_over_bound: Some(verdict.error_over_bound).filter(|e| e.is_finite()),
        checked_outputs: verdict.checked,
        verified: false,
        failure: None,
        command: String::new(),
    }
}

/// Writes the times into the record, where there are any.
fn finish(subject: &mut Subject) {
    let Subject { record, problem, executed_flops, calls } = subject;
    record.times = calls.times();
    record.clock = calls.clock().map(Clock::name);
    let tflops = |flops: f64| record.times.median_ms.map(|ms| flops / ms / 1e9);
    record.effective_tflops = tflops(problem.effective_flops());
    record.executed_tflops = tflops(*executed_flops);
}

/// What a device can do at most, measured; `None` where it has no such arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize, serde::Deserialize), serde(default))]
pub struct Ceilings {
    /// f32 multiply-adds in registers, in 10¹² operations per second (two per multiply-add).
    pub fma_f32_tflops: Option<f64>,
    /// f16 multiply-adds in registers.
    pub fma_f16_tflops: Option<f64>,
    /// f16 cooperative matrices with f32 sums.
    pub cooperative_f16_tflops: Option<f64>,
    /// Copy of memory, in 10⁹ bytes per second, read and written ones together.
    pub copy_gb_per_s: Option<f64>,
    /// Memory that is only read, in 10⁹ bytes per second: on the CPU device, whose small outputs stay in its caches.
    pub read_gb_per_s: Option<f64>,
}

/// Measures the ceilings of a device: the best of the samples each, for a ceiling is what was reached once. At
/// the policy's deadline it ends, and those that are left are `None`.
pub fn ceilings(device: &Device, policy: &Policy) -> Result<Ceilings> {
    pollster::block_on(ceilings_async(device, policy))
}

/// [`ceilings`] where nothing may block.
pub async fn ceilings_async(device: &Device, policy: &Policy) -> Result<Ceilings> {
    let best = async |probe| -> Result<Option<f64>> {
        if !policy.has_time_for(0.0) {
            return Ok(None);
        }
        let Some((call, work)) = device.probe(probe)? else { return Ok(None) };
        let (timer, mut call) = (Timer::new(device, *policy), Workload::pass([call]));
        timer.calibrate_async(&mut call).await?;
        timer.sample_in_turns_async([&mut call], |_| {}).await?;
        Ok(call.summary().map(|seconds| work / seconds.min))
    };
    Ok(Ceilings {
        fma_f32_tflops: best(Probe::Fma(DType::F32)).await?.map(|x| x / 1e12),
        fma_f16_tflops: best(Probe::Fma(DType::F16)).await?.map(|x| x / 1e12),
        cooperative_f16_tflops: best(Probe::Cooperative).await?.map(|x| x / 1e12),
        copy_gb_per_s: best(Probe::Copy(rotation_bytes(&device.info()))).await?.map(|x| x / 1e9),
        read_gb_per_s: best(Probe::Read(rotation_bytes(&device.info()))).await?.map(|x| x / 1e9),
    })
}

impl Record {
    /// Fills in the shares of these ceilings.
    pub fn compare_with(&mut self, ceilings: &Ceilings) {
        let arithmetic = match self.kernel.contains("coop") {
            true => ceilings.cooperative_f16_tflops,
            false => ceilings.fma_f32_tflops,
        };
        self.arithmetic_share = self.executed_tflops.zip(arithmetic).map(|(own, most)| own / most);
        let element = if self.dtype == "f16" { 2 } else { 4 };
        let bytes = (self.weight_bytes + (self.n * self.k + self.n * self.m) * element) as f64;
        self.memory_share = self
            .times
            .median_ms
            .zip(ceilings.copy_gb_per_s.or(ceilings.read_gb_per_s))
            .map(|(ms, most)| bytes / (ms * 1e-3) / (most * 1e9));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    pub(super) fn case(m: usize, n: usize, k: usize, dtype: DType) -> Case {
        let [w, x] = [(m, 1), (n, 2)].map(|(rows, seed)| Matrix::uniform(rows, k, dtype, seed).unwrap());
        Case { name: "x".into(), w, x }
    }

    /// A deadline in the middle of a round leaves those that come late with a sample less.
    #[test]
    fn a_ratio_is_of_the_rounds_that_both_have() {
        let dense = [2.0, 2.0, 50.0];
        let of = |dense: &[f64], own: &[f64]| Speedup::of(Some(dense), own).vs_dense;
        assert_eq!(of(&dense, &[1.0, 1.0]), Some(2.0));
        assert_eq!(of(&dense[..1], &[1.0, 9.0, 9.0]), Some(2.0));
        assert_eq!((of(&dense, &[]), Speedup::of(None, &dense).vs_dense), (None, None));
    }

    #[test]
    fn an_output_that_was_never_written_is_wrong() {
        let passed = Verdict { checked: 9, undecided: 0, error_over_bound: 0.5, worst: None };
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let nan = Matrix::uniform(2, 3, DType::F32, 1).unwrap().to_array().mapv(|_| f32::NAN);
            let nan = Matrix::from_array(nan.view()).cast(dtype);
            assert_eq!(wrong(&passed, &nan), None, "a NaN that was computed");
            assert!(wrong(&passed, &poison(2, 3, dtype).unwrap()).unwrap().contains("output 0 was never written"));
        }
        let failed = Verdict { error_over_bound: 1.5, ..passed };
        assert!(wrong(&failed, &Matrix::zeros(2, 3, DType::F32).unwrap()).is_some());
    }

    #[test]
    fn whole_cases_are_whole_and_of_the_same_shape() {
        let case = case(7, 5, 9, DType::F16).whole(3).unwrap();
        let numbers = case.w.elements().to_f32();
        assert!(numbers.iter().all(|x| x.fract() == 0.0 && x.abs() <= 4.0) && numbers.iter().any(|&x| x == -4.0));
        assert_eq!((case.w.rows(), case.x.rows(), case.w.cols(), case.w.dtype()), (7, 5, 9, DType::F16));
    }
}
