//! From what is asked to how it is done: `Problem + Caps (+ Tuning) -> Plan`, pure data that explains itself.
//!
//! Planning needs no device, so every decision can be tested and printed anywhere. A plan is made by estimate, from
//! what compilers made of each kernel and its memory and cache traffic, against what the device can do, or by
//! measurement where a [`Tuning`] has one. Invariant: a plan's kernel is one that the given [`Caps`] support, and its
//! dispatches and bindings fit their limits.

mod costs;
mod cpu;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::ops::Range;

pub use self::cpu::{CpuAlgorithm, CpuCaps, CpuSchedule};
use crate::error::{Error, Result, checked_mul};
use crate::kernels::{Architecture, Caps, Kernel, Pack, Params, Program, Rates, Reduce, Schedule};
use crate::layout;
use crate::matrix::DType;
use crate::problem::{Form, Op, Problem};

/// How a problem is solved.
#[derive(Clone, Debug, PartialEq)]
pub enum Algorithm {
    /// By a GPU kernel.
    Gpu(GpuAlgorithm),
    /// By a kernel of the CPU device.
    Cpu(CpuAlgorithm),
}

/// A kernel and how the problem is cut for it.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuAlgorithm {
    kernel: Kernel,
    /// Columns of k in each split, a multiple of 32; the padded k if there is one split.
    k_split: usize,
    /// The split-K factor.
    splits: usize,
    /// Whether a first dispatch pads or transposes X into scratch.
    packs: bool,
    /// Rows of W in each binding.
    pieces: Vec<Range<usize>>,
    /// Tokens in each binding of X and Y.
    tokens: Vec<Range<usize>>,
    /// The architecture whose machine code the estimate uses; the mean of all if there is none.
    architecture: Option<Architecture>,
    estimate: Estimate,
}

impl GpuAlgorithm {
    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Split-K factor: number of slices of k that are summed separately and then reduced, in a fixed order, by a second
    /// dispatch. With 1 there is no second dispatch.
    pub fn splits(&self) -> usize {
        self.splits
    }
}

/// A problem, and how it is solved.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    problem: Problem,
    algorithm: Algorithm,
    basis: Basis,
    reason: String,
}

/// What a plan's kernel was chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// An estimate of its time, or because there is no other.
    Estimated,
    /// Measured times.
    Measured,
    /// The caller: a schedule that was given, or one of a list of candidates.
    Asked,
}

impl Basis {
    /// `estimated`, `measured` or `asked`, as in benchmark rows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Estimated => "estimated",
            Self::Measured => "measured",
            Self::Asked => "asked",
        }
    }
}

/// Seconds that a kernel should take, by what limits it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Estimate {
    arithmetic: f64,
    memory: f64,
    cache: f64,
    dispatch: f64,
}

impl Estimate {
    fn seconds(&self) -> f64 {
        self.arithmetic.max(self.memory).max(self.cache) + self.dispatch
    }

    fn bound(&self) -> &'static str {
        let work = self.arithmetic.max(self.memory).max(self.cache);
        match work {
            w if w < self.dispatch => "the dispatch itself",
            w if w == self.arithmetic => "arithmetic",
            w if w == self.memory => "memory",
            _ => "cache traffic",
        }
    }

    fn explain(&self, text: &mut String) {
        let Self { arithmetic, memory, cache, dispatch } = *self;
        let _ = writeln!(
            text,
            "  predicted bound: {} (arithmetic {}, memory {}, cache {}; dispatch {})",
            self.bound(),
            time(arithmetic),
            time(memory),
            time(cache),
            time(dispatch)
        );
    }
}

/// Measured kernel times; the planner uses them in preference to its estimates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    /// What the device was measured to do per second, in place of the guess of [`Caps::rates`].
    pub rates: Option<Rates>,
    best: HashMap<Layer, Vec<Tuned>>,
}

/// What tells tuned layers apart beside the number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layer {
    op: Op,
    storage: DType,
    m: usize,
    k: usize,
}

/// The best schedule that was measured for a layer and a number of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuned {
    /// Tokens.
    pub n: usize,
    /// The schedule.
    pub schedule: Schedule,
    /// Split-K factor.
    pub splits: usize,
    /// Median seconds of a call.
    pub seconds: f64,
}

impl Tuning {
    /// Rates, and no measured schedules yet.
    pub fn new(rates: Option<Rates>) -> Self {
        Self { rates, best: HashMap::new() }
    }

    /// Adds the best schedule for a problem, in place of what was there for as many tokens.
    pub fn insert(&mut self, problem: &Problem, tuned: Tuned) {
        let entries = self.best.entry(Layer::of(problem)).or_default();
        entries.retain(|e| e.n != tuned.n);
        entries.push(tuned);
        entries.sort_by_key(|e| e.n);
    }

    /// What was measured for the problem's layer with as many tokens, or with the nearest number within a factor of
    /// 1.5. Epilogue and form make little difference and are not told apart.
    pub fn get(&self, problem: &Problem) -> Option<&Tuned> {
        let distance = |e: &Tuned| (e.n as f64 / problem.n.max(1) as f64).ln().abs();
        let nearest = self.best.get(&Layer::of(problem))?.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
        let (fewer, more) = (nearest.n.min(problem.n) as f64, nearest.n.max(problem.n) as f64);
        (more <= 1.5 * fewer).then_some(nearest)
    }

    /// Number of problems that were measured.
    pub fn len(&self) -> usize {
        self.best.values().map(Vec::len).sum()
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.best.is_empty()
    }
}

impl Layer {
    fn of(problem: &Problem) -> Self {
        let Problem { op, storage, m, k, .. } = *problem;
        Self { op, storage, m, k }
    }
}

/// One dispatch of a plan, its operands named.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) program: Program,
    pub(crate) params: Params,
    pub(crate) grid: [u32; 3],
    /// What is bound as weights.
    pub(crate) weights: WeightOperand,
    pub(crate) x: Activations,
    pub(crate) y: Target,
    /// Whether bias and residual are bound.
    pub(crate) epilogue: bool,
}

/// What a step reads as weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightOperand {
    Nothing,
    /// This piece of W.
    Piece(usize),
    /// The partial sums of split-K.
    Partial,
}

/// What a step reads as activations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Activations {
    Nothing,
    /// These tokens of the caller's X; all of B in the plain form.
    Given(Range<usize>),
    /// What the step before has packed.
    Packed,
}

/// What a step writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Packed,
    Partial,
    /// These tokens of Y, which are also those of the residual; all of C in the plain form.
    Output(Range<usize>),
}

impl Plan {
    /// Plans for a GPU with these capabilities, with the weights as the problem gives them. An error names what the
    /// device lacks, or the operand that is too large.
    pub fn gpu(problem: &Problem, caps: &Caps, tuning: &Tuning) -> Result<Self> {
        let caps = &Caps { rates: tuning.rates.unwrap_or(caps.rates), ..caps.clone() };
        let mut candidates = Vec::new();
        let mut refused = Vec::new();
        for schedule in Schedule::of(problem.op, problem.storage) {
            let kernel = Kernel::new(problem, schedule)?;
            if let Err(lack) = kernel.supported_by(caps) {
                if caps.should_report(schedule) {
                    refused.push((schedule, lack));
                }
                continue;
            }
            for splits in splits_worth_trying(problem) {
                match GpuAlgorithm::new(problem, kernel, splits, caps) {
                    Ok(algorithm) => candidates.push(algorithm),
                    // If even one split does not fit, no plan of this problem does: more splits need more scratch.
                    Err(e) if splits == 1 => return Err(e),
                    Err(_) => {}
                }
            }
        }
        let mut lacks: Vec<_> = refused.iter().map(|(_, lack)| lack.clone()).collect();
        lacks.dedup();
        let tuned = tuning.get(problem);
        let measured = tuned.and_then(|t| {
            let found = candidates.iter().find(|c| c.kernel.schedule() == t.schedule && c.splits == t.splits)?;
            Some((found.clone(), t))
        });
        if let Some((algorithm, tuned)) = measured {
            let reason = format!("lowest measured time at {} tokens: {}", tuned.n, time(tuned.seconds));
            return Ok(Self {
                problem: *problem,
                algorithm: Algorithm::Gpu(algorithm),
                basis: Basis::Measured,
                reason,
            });
        }
        candidates.sort_by(|a, b| a.estimate.seconds().total_cmp(&b.estimate.seconds()));
        let Some(algorithm) = candidates.first().cloned() else {
            return Err(Error::missing_feature("the device", lacks.join("; ")));
        };
        let mut reason = format!("lowest estimate, {}", time(algorithm.estimate.seconds()));
        if let Some(next) = candidates.iter().find(|c| c.kernel.schedule() != algorithm.kernel.schedule()) {
            let _ = write!(reason, "; next {} {}", next.kernel.schedule(), time(next.estimate.seconds()));
        }
        // The kernels of cooperative matrices are many, and lack the same.
        let mut told = HashSet::new();
        for (schedule, lack) in refused {
            let subject = if matches!(schedule, Schedule::Coop(_)) { "coop".to_owned() } else { schedule.to_string() };
            let said = format!("; {subject} needs {lack}");
            if told.insert(said.clone()) {
                reason += &said;
            }
        }
        Ok(Self { problem: *problem, algorithm: Algorithm::Gpu(algorithm), basis: Basis::Estimated, reason })
    }

    /// Plans for a GPU, with dense weights in place of the problem's 2:4 ones unless 2:4 is faster by a margin. A plan
    /// with dense weights says so, and [`Plan::weights`] names them.
    pub fn gpu_or_dense(problem: &Problem, caps: &Caps, tuning: &Tuning) -> Result<Self> {
        let own = Self::gpu(problem, caps, tuning)?;
        if !matches!(problem.op, Op::Sparse24(_)) {
            return Ok(own);
        }
        let as_dense = Problem { op: Op::Dense, ..*problem };
        // Dense weights may be too large where 2:4 ones are not.
        let Ok(dense) = Self::gpu(&as_dense, caps, tuning) else { return Ok(own) };
        // 2:4 replaces dense if its time is at most `MEASURED_MARGIN` of dense (both measured at the same n),
        // `ESTIMATE_MARGIN` of it (both estimated), or `MIXED_MARGIN` of it (otherwise: both are estimated anew, and
        // the one that was measured may be better than its estimate).
        let measured = |plan: &Self, problem| tuning.get(problem).filter(|_| plan.basis == Basis::Measured);
        let estimated = |plan: &Self| (plan.schedule(), plan.estimated_seconds());
        let (basis, margin, times) = match (measured(&own, problem), measured(&dense, &as_dense)) {
            (Some(s), Some(d)) if s.n == d.n => {
                (Basis::Measured, MEASURED_MARGIN, [(own.schedule(), s.seconds), (dense.schedule(), d.seconds)])
            }
            (None, None) => (Basis::Estimated, ESTIMATE_MARGIN, [&own, &dense].map(estimated)),
            _ => {
                let untuned = Tuning::new(tuning.rates);
                let (own, dense) = (Self::gpu(problem, caps, &untuned)?, Self::gpu(&as_dense, caps, &untuned)?);
                (Basis::Estimated, MIXED_MARGIN, [&own, &dense].map(estimated))
            }
        };
        Ok(own.or_dense(dense, basis, margin, times))
    }

    /// This plan with 2:4 weights if the 2:4 time is at most `margin` of the dense one, else the dense plan. `times`
    /// are of the schedules that are compared, and rest on `basis`.
    fn or_dense(self, dense: Self, basis: Basis, margin: f64, times: [(String, f64); 2]) -> Self {
        let [(sparse_plan, sparse_time), (dense_plan, dense_time)] = times;
        let verdict = format!(
            "{sparse_plan} is {} at {:.2} times the speed of dense {dense_plan} ({} against {})",
            basis.name(),
            dense_time / sparse_time,
            time(sparse_time),
            time(dense_time)
        );
        if sparse_time <= margin * dense_time {
            return Self { reason: format!("{}; {verdict}", self.reason), ..self };
        }
        let reason = format!(
            "dense weights, because {verdict}, and 2:4 is used only from {:.2} times on; dense kernel: {}",
            1.0 / margin,
            dense.reason
        );
        Self { algorithm: dense.algorithm, basis: dense.basis, reason, ..self }
    }

    /// The plan with the given schedule and split-K factor, for tests, tuning and `bench --plan`. An error if there is
    /// no such schedule for the problem, or the device cannot run it.
    pub fn gpu_with(problem: &Problem, caps: &Caps, schedule: Schedule, splits: usize) -> Result<Self> {
        let kernel = Kernel::new(problem, schedule)?;
        kernel.supported_by(caps).map_err(|feature| Error::missing_feature(kernel.to_string(), feature))?;
        let algorithm = GpuAlgorithm::new(problem, kernel, splits, caps)?;
        let reason = format!("{schedule} was given by the caller");
        Ok(Self { problem: *problem, algorithm: Algorithm::Gpu(algorithm), basis: Basis::Asked, reason })
    }

    /// Every plan that [`Plan::gpu`] chooses from, with the weights as the problem gives them, lowest estimate first.
    pub fn gpu_candidates(problem: &Problem, caps: &Caps) -> Vec<Self> {
        let schedules = Schedule::of(problem.op, problem.storage).into_iter();
        let plans = schedules.flat_map(|schedule| splits_worth_trying(problem).map(move |splits| (schedule, splits)));
        let mut plans: Vec<_> =
            plans.filter_map(|(schedule, splits)| Self::gpu_with(problem, caps, schedule, splits).ok()).collect();
        // Several split-K factors that were requested can come to the same number of splits.
        let mut seen = HashSet::new();
        plans.retain(|plan| seen.insert(plan.schedule()));
        plans.sort_by(|a, b| a.estimated_seconds().total_cmp(&b.estimated_seconds()));
        plans
    }

    /// Plans for a CPU device with these capabilities, with the weights as the problem gives them. An error names a
    /// type that is not computed with, or sizes that overflow.
    pub fn cpu(problem: &Problem, caps: &CpuCaps) -> Result<Self> {
        let candidates = Self::cpu_candidates(problem, caps)?;
        let [best, others @ ..] = &candidates[..] else {
            return Err(Error::invalid(format!("no kernel takes {} tokens", problem.n)));
        };
        let mut reason = format!("lowest estimate, {}", time(best.estimated_seconds()));
        if let Some(next) = others.first() {
            let _ = write!(reason, "; next {} {}", next.schedule(), time(next.estimated_seconds()));
        }
        Ok(Self { basis: Basis::Estimated, reason, ..best.clone() })
    }

    /// Every plan that [`Plan::cpu`] chooses from, lowest estimate first. Errors are those of [`Plan::cpu`].
    pub fn cpu_candidates(problem: &Problem, caps: &CpuCaps) -> Result<Vec<Self>> {
        for (what, got) in [("weights and x", problem.storage), ("y", problem.output)] {
            if got == DType::Bf16 {
                return Err(Error::dtype(what, got, DType::F32));
            }
        }
        let Problem { op, m, n, k, .. } = *problem;
        // Padding to a block of rows, a vector of tokens and a unit of k at most doubles a size of one.
        let padded = |size: usize| checked_mul("padded size", size.max(128), 2);
        for (what, a, b) in [("weights", m, k), ("x", n, k), ("y", n, m)] {
            checked_mul(&format!("{what} bytes"), checked_mul(what, padded(a)?, padded(b)?)?, 8)?;
        }
        let plan = |algorithm: CpuAlgorithm| {
            let reason = format!("{} was given by the caller", algorithm.schedule());
            Self { problem: *problem, algorithm: Algorithm::Cpu(algorithm), basis: Basis::Asked, reason }
        };
        let methods = CpuSchedule::of(op).iter().filter_map(|&schedule| CpuAlgorithm::new(problem, op, schedule, caps));
        let mut plans: Vec<_> = methods.map(plan).collect();
        plans.sort_by(|a, b| a.estimated_seconds().total_cmp(&b.estimated_seconds()));
        Ok(plans)
    }

    /// Plans for a CPU device, with dense weights in place of the problem's 2:4 ones unless 2:4 is faster by a margin.
    /// A plan with dense weights says so, and [`Plan::weights`] names them.
    pub fn cpu_or_dense(problem: &Problem, caps: &CpuCaps) -> Result<Self> {
        let own = Self::cpu(problem, caps)?;
        if !matches!(problem.op, Op::Sparse24(_)) {
            return Ok(own);
        }
        let dense = Self::cpu(&Problem { op: Op::Dense, ..*problem }, caps)?;
        let times = [&own, &dense].map(|plan| (plan.schedule(), plan.estimated_seconds()));
        Ok(own.or_dense(dense, Basis::Estimated, ESTIMATE_MARGIN, times))
    }

    /// What is solved.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// How it is solved.
    pub fn algorithm(&self) -> &Algorithm {
        &self.algorithm
    }

    /// What its kernel was chosen by.
    pub fn basis(&self) -> Basis {
        self.basis
    }

    /// How the weights must be given: as in the problem, or dense if the plan replaces 2:4 weights by dense ones.
    pub fn weights(&self) -> Op {
        match &self.algorithm {
            Algorithm::Gpu(algorithm) => algorithm.kernel.op(),
            Algorithm::Cpu(algorithm) => algorithm.op,
        }
    }

    /// Floating-point operations that are really done: those of the weights that are used, all of them where 2:4
    /// weights are expanded. Tile padding is not counted.
    pub fn executed_flops(&self) -> f64 {
        match &self.algorithm {
            Algorithm::Gpu(algorithm) if algorithm.kernel.expands() => self.problem.effective_flops(),
            _ => Problem { op: self.weights(), ..self.problem }.executed_flops(),
        }
    }

    /// Name of the kernel, as in benchmark rows.
    pub fn kernel_name(&self) -> String {
        match &self.algorithm {
            Algorithm::Gpu(GpuAlgorithm { kernel, splits: 1, .. }) => kernel.to_string(),
            Algorithm::Gpu(GpuAlgorithm { kernel, splits, .. }) => format!("{kernel}-split{splits}"),
            Algorithm::Cpu(CpuAlgorithm { op, schedule, simd, .. }) => {
                let Problem { storage, epilogue, .. } = self.problem;
                let vector = op.vector().map(|v| format!("-v{v}")).unwrap_or_default();
                format!("cpu_{}-{storage}f32{vector}-{schedule}_{simd}-{epilogue}", op.kernel_name())
            }
        }
    }

    /// What tells the kernels of one operation apart: schedule and tile on a GPU, a [`CpuSchedule`] on the CPU.
    pub fn schedule(&self) -> String {
        let dense = if self.weights() == self.problem.op { "" } else { "dense_" };
        match &self.algorithm {
            Algorithm::Gpu(GpuAlgorithm { kernel, splits: 1, .. }) => format!("{dense}{}", kernel.schedule()),
            Algorithm::Gpu(GpuAlgorithm { kernel, splits, .. }) => format!("{dense}{}/{splits}", kernel.schedule()),
            Algorithm::Cpu(algorithm) => format!("{dense}{}", algorithm.schedule()),
        }
    }

    /// Estimated seconds of a call. On the CPU: of one thread, whatever number the device has, so only good for
    /// comparing plans.
    pub fn estimated_seconds(&self) -> f64 {
        match &self.algorithm {
            Algorithm::Gpu(algorithm) => algorithm.estimate.seconds(),
            Algorithm::Cpu(algorithm) => algorithm.estimate.seconds(),
        }
    }

    /// What was chosen, why, and what it will cost, a fact a line.
    ///
    /// ```
    /// use sparse24::{DType, Op, Plan, Problem, VectorLen, plan::CpuCaps, simd::SimdLevel};
    /// let problem = Problem::linear(Op::Sparse24(VectorLen::ONE), 768, 128, 3072, DType::F32);
    /// let text = Plan::cpu(&problem, &CpuCaps::host(SimdLevel::Scalar))?.explain();
    /// assert!(text.contains("sparse24") && text.contains("0.302 GFLOP executed"));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn explain(&self) -> String {
        let Problem { op, m, n, k, form, .. } = self.problem;
        let mut text = format!("{}\n", self.kernel_name());
        let _ = writeln!(text, "  problem: {op}, m {m} x n {n} x k {k}, {} form", form.name());
        let _ = writeln!(text, "  chosen because: {}", self.reason);
        match &self.algorithm {
            Algorithm::Gpu(algorithm) => algorithm.explain(&self.problem, &mut text),
            Algorithm::Cpu(algorithm) => {
                algorithm.estimate.explain(&mut text);
                text.push_str("  estimates are of one thread, so that the choice does not depend on their number\n");
            }
        }
        let used = Problem { op: self.weights(), ..self.problem };
        let bytes: u64 = operand_bytes(&used).iter().map(|(_, b)| b).sum();
        let (effective, executed) = (self.problem.effective_flops(), self.executed_flops());
        let _ = writeln!(text, "  work: {} effective, {} executed", flop(effective), flop(executed));
        let _ = writeln!(
            text,
            "  bytes: {bytes} at least ({}), {:.1} executed FLOP per byte",
            operand_bytes(&used).map(|(what, b)| format!("{what} {b}")).join(", "),
            if bytes == 0 { 0.0 } else { executed / bytes as f64 }
        );
        text
    }

    /// The dispatches, in order. None on the CPU, or where the output is empty.
    pub(crate) fn steps(&self, caps: &Caps) -> Result<Vec<Step>> {
        match &self.algorithm {
            Algorithm::Gpu(algorithm) => algorithm.steps(&self.problem, caps),
            Algorithm::Cpu(_) => Ok(Vec::new()),
        }
    }

    /// Bytes of scratch that the dispatches share: for packed activations, and for the partial sums of split-K.
    pub(crate) fn scratch_bytes(&self) -> (u64, u64) {
        let Algorithm::Gpu(algorithm) = &self.algorithm else { return (0, 0) };
        let tokens = algorithm.tokens.iter().map(Range::len).max().unwrap_or(0);
        let packed = if algorithm.packs { packed_bytes(&self.problem, tokens) } else { 0 };
        let partial = if algorithm.splits > 1 { partial_bytes(&self.problem, tokens, algorithm.splits) } else { 0 };
        (packed, partial)
    }
}

impl GpuAlgorithm {
    fn new(problem: &Problem, kernel: Kernel, splits: usize, caps: &Caps) -> Result<Self> {
        let Problem { form, m, n, k, storage, output, .. } = *problem;
        // Kernels count features, tokens and k with u32, and round them up to a tile before they compare.
        let limit = (u32::MAX - 1024) as usize;
        for (what, a, b) in [("weights", m, k), ("x", n, k), ("y", n, m)] {
            if a.checked_mul(b).is_none_or(|len| len > usize::MAX / 1024) || a > limit || b > limit {
                return Err(Error::overflow(format!("{what} index"), format!("{a} x {b} elements")));
            }
        }
        let too_large = |what: &str, bytes: u64| {
            Error::too_large(
                format!("binding of {what}"),
                format!("{bytes} bytes"),
                format!("{} bytes", caps.binding_bytes),
            )
        };
        let op = kernel.op();
        let pieces = layout::pieces(op, m, k, storage, caps.binding_bytes.min(caps.buffer_bytes))
            .ok_or_else(|| too_large("128 rows of weights", layout::value_bytes(op, 128, k, storage)))?;
        let packs = form == Form::Gemm || !k.is_multiple_of(layout::WORD);
        let padded = k.next_multiple_of(layout::WORD);
        // A split is a multiple of 32 columns, so there may be fewer splits than requested.
        let k_split = padded.div_ceil(splits.max(1)).next_multiple_of(layout::WORD).max(layout::WORD);
        let splits = padded.div_ceil(k_split).max(1);

        let row_bytes = [
            ("x", (k * storage.bytes()) as u64),
            ("packed x", if packs { packed_bytes(problem, 1) } else { 0 }),
            ("y", (m * output.bytes()) as u64),
            ("partial sums of split-K", if splits > 1 { partial_bytes(problem, 1, splits) } else { 0 }),
        ];
        let &(what, widest) = row_bytes.iter().max_by_key(|(_, b)| *b).unwrap_or(&("x", 0));
        let tokens = if n as u64 * widest <= caps.binding_bytes {
            std::iter::once(0..n).collect()
        } else {
            // Binding offsets must be multiples of 256 bytes: `unit` is the fewest tokens (a power of two) whose rows
            // of X and of Y both are.
            let aligned = |tokens: usize, row: usize| (tokens * row).is_multiple_of(256);
            let (x, y) = (k * storage.bytes(), m * output.bytes());
            let unit = (0..8).map(|i| 1 << i).find(|&t| aligned(t, x) && aligned(t, y)).unwrap_or(256);
            let step = (caps.binding_bytes / widest) as usize / unit * unit;
            if form == Form::Gemm || step == 0 {
                // The columns of B and C that belong to some tokens are not contiguous.
                return Err(too_large(what, n as u64 * widest));
            }
            (0..n).step_by(step).map(|start| start..n.min(start + step)).collect()
        };
        let mut algorithm = Self {
            kernel,
            k_split,
            splits,
            packs,
            pieces,
            tokens,
            architecture: caps.architecture,
            estimate: Estimate { arithmetic: 0.0, memory: 0.0, cache: 0.0, dispatch: 0.0 },
        };
        algorithm.estimate = algorithm.estimate(problem, caps);
        // Fails here if a dispatch grid exceeds the device's limit, so that no such plan exists.
        algorithm.steps(problem, caps)?;
        Ok(algorithm)
    }

    /// Workgroups, if they ran over the problem in one piece.
    fn tiles(&self, problem: &Problem) -> (f64, f64) {
        let (m, n) = self.kernel.schedule().tile();
        (problem.m.div_ceil(m as usize) as f64, problem.n.div_ceil(n as usize) as f64)
    }

    /// How long it should take, from what it does and what the device can do.
    fn estimate(&self, problem: &Problem, caps: &Caps) -> Estimate {
        let rates = caps.rates;
        let (tile_m, tile_n) = self.kernel.schedule().tile();
        let (tiles_m, tiles_n) = self.tiles(problem);
        let k = problem.k.next_multiple_of(layout::WORD) as f64;
        let outputs = tiles_m * f64::from(tile_m) * tiles_n * f64::from(tile_n);
        // A thread with more accumulators hides more latency: it counts as one thread per 16 accumulators, 1 to 4.
        let threads = f64::from(self.kernel.schedule().threads());
        let latency_hiding = match self.kernel.schedule() {
            Schedule::Gemv { .. } => 1.0,
            _ => (f64::from(tile_m * tile_n) / threads / 16.0).clamp(1.0, 4.0),
        };
        let workgroups = tiles_m * tiles_n * self.splits as f64;
        let occupancy = (workgroups * threads * latency_hiding / f64::from(caps.busy_threads)).clamp(1e-6, 1.0);
        let rate = match self.kernel.schedule() {
            // One multiply-add per second: an emulated kernel is never the lowest estimate.
            Schedule::Coop(_) if caps.emulates_cooperative => 1.0,
            Schedule::Coop(_) => rates.cooperative,
            _ => rates.fma,
        };
        let used = Problem { op: self.kernel.op(), ..*problem };
        let operands: u64 = operand_bytes(&used).iter().map(|(_, b)| b).sum();
        let packed = if self.packs { 2.0 * packed_bytes(problem, problem.n) as f64 } else { 0.0 };
        // Written once and read once, in the cache if anywhere.
        let partial = if self.splits > 1 { 2.0 * partial_bytes(problem, problem.n, self.splits) as f64 } else { 0.0 };
        let dispatches =
            self.pieces.len() * self.tokens.len() * if self.splits > 1 { 2 } else { 1 } + usize::from(self.packs);
        // Multiply-adds that the hardware could issue while one workgroup runs (from the compiled kernel's cycles).
        let issue_slots = costs::slots(&self.kernel, caps.architecture, self.k_split);
        Estimate {
            arithmetic: workgroups * issue_slots / (rate * occupancy),
            // A quarter of the threads suffice to keep memory busy.
            memory: (operands as f64 + packed) / (rates.memory * (4.0 * occupancy).min(1.0)),
            cache: (outputs * k * self.kernel.cache_bytes() + partial) / rates.cache,
            dispatch: dispatches as f64 * rates.dispatch,
        }
    }

    fn explain(&self, problem: &Problem, text: &mut String) {
        let Problem { m, n, .. } = *problem;
        let (tile_m, tile_n) = self.kernel.schedule().tile();
        let (tiles_m, tiles_n) = self.tiles(problem);
        let padded = tiles_m * f64::from(tile_m) * tiles_n * f64::from(tile_n);
        let padding = if m * n == 0 { 0.0 } else { padded / (m as f64 * n as f64) - 1.0 };
        let _ = writeln!(
            text,
            "  grid: {tiles_m} x {tiles_n} tiles x {} splits of k, workgroups of {} invocations and {} bytes of workgroup \
             memory, {:.1} % padding",
            self.splits,
            self.kernel.schedule().threads(),
            self.kernel.workgroup_bytes(),
            100.0 * padding
        );
        self.estimate.explain(text);
        let _ = writeln!(text, "  machine code: {}", costs::explain(&self.kernel, self.architecture));
        if self.packs {
            let why = match problem.form {
                Form::Gemm => "b is transposed".to_owned(),
                Form::Linear => format!("k = {} is no multiple of 32, so x is padded", problem.k),
            };
            let _ = writeln!(text, "  first: {why} into scratch");
        }
        if self.pieces.len() * self.tokens.len() > 1 {
            let _ =
                writeln!(text, "  bindings: weights in {} pieces, tokens in {}", self.pieces.len(), self.tokens.len());
        }
    }

    fn steps(&self, problem: &Problem, caps: &Caps) -> Result<Vec<Step>> {
        let Problem { form, m, k, storage, output, epilogue, .. } = *problem;
        let mut steps = Vec::new();
        if m == 0 || problem.n == 0 {
            return Ok(steps);
        }
        let padded = k.next_multiple_of(layout::WORD);
        let (tile_m, tile_n) = self.kernel.schedule().tile();
        let program = Program::from(if self.splits > 1 { self.kernel.partial() } else { self.kernel });
        for tokens in &self.tokens {
            let base = Params {
                m: m as u32,
                n: tokens.len() as u32,
                k: padded as u32,
                k_split: self.k_split as u32,
                features: m as u32,
                feature0: 0,
                tiles_m: 0,
                tiles_n: 0,
                k_given: k as u32,
            };
            let tiled = |params: Params, m: usize, n: usize| Params { tiles_m: m as u32, tiles_n: n as u32, ..params };
            // Where k is 0 there is nothing to pack, and no kernel reads X.
            if self.packs && k > 0 {
                let params = tiled(base, padded / 32, tokens.len().div_ceil(32));
                steps.push(Step {
                    program: Program::new(Pack { form, storage }),
                    params,
                    grid: grid((padded / 32) * tokens.len().div_ceil(32), 1, caps)?,
                    weights: WeightOperand::Nothing,
                    x: Activations::Given(tokens.clone()),
                    y: Target::Packed,
                    epilogue: false,
                });
            }
            for (piece, rows) in self.pieces.iter().enumerate() {
                let (tiles_m, tiles_n) = (rows.len().div_ceil(tile_m as usize), tokens.len().div_ceil(tile_n as usize));
                let params = Params { m: rows.len() as u32, feature0: rows.start as u32, ..base };
                steps.push(Step {
                    program: program.clone(),
                    params: tiled(params, tiles_m, tiles_n),
                    grid: grid(tiles_m * tiles_n, self.splits, caps)?,
                    weights: WeightOperand::Piece(piece),
                    x: if self.packs { Activations::Packed } else { Activations::Given(tokens.clone()) },
                    y: if self.splits > 1 { Target::Partial } else { Target::Output(tokens.clone()) },
                    epilogue: self.splits == 1,
                });
            }
            if self.splits > 1 {
                let outputs = tokens.len() * m;
                steps.push(Step {
                    program: Program::new(Reduce { form, output, epilogue }),
                    params: base,
                    grid: grid(outputs.div_ceil(256), 1, caps)?,
                    weights: WeightOperand::Partial,
                    x: Activations::Nothing,
                    y: Target::Output(tokens.clone()),
                    epilogue: true,
                });
            }
        }
        Ok(steps)
    }
}

/// Largest ratio of estimated 2:4 time to estimated dense time at which 2:4 is used.
const ESTIMATE_MARGIN: f64 = 0.97;

/// Largest ratio of measured 2:4 time to measured dense time, at the same number of tokens, at which 2:4 is used.
const MEASURED_MARGIN: f64 = 0.99;

/// As [`ESTIMATE_MARGIN`], but if only one of the two was measured, or both at different numbers of tokens: what was
/// measured may be better than its estimate.
const MIXED_MARGIN: f64 = 0.75;

/// Largest split-K factor that is planned.
pub(crate) const MAX_SPLITS: usize = 16;

/// Split-K factors that could help: each split keeps at least 128 columns.
fn splits_worth_trying(problem: &Problem) -> impl Iterator<Item = usize> + use<> {
    let k = problem.k;
    [1, 2, 4, 8, MAX_SPLITS].into_iter().filter(move |&splits| splits == 1 || k / splits >= 128)
}

/// Workgroups over x and y, and splits over z.
pub(crate) fn grid(workgroups: usize, splits: usize, caps: &Caps) -> Result<[u32; 3]> {
    let limit = caps.grid as usize;
    let y = workgroups.div_ceil(limit).max(1);
    if y > limit || splits > limit {
        return Err(Error::too_large(
            "dispatch",
            format!("{workgroups} x {splits} workgroups"),
            format!("{limit} in each dimension"),
        ));
    }
    Ok([workgroups.div_ceil(y) as u32, y as u32, splits as u32])
}

fn packed_bytes(problem: &Problem, tokens: usize) -> u64 {
    (tokens * problem.k.next_multiple_of(layout::WORD) * problem.storage.bytes()) as u64
}

fn partial_bytes(problem: &Problem, tokens: usize, splits: usize) -> u64 {
    (tokens * problem.m * splits * 4) as u64
}

/// Bytes of the operands: weights as they lie on the device, X and Y as the caller has them.
fn operand_bytes(problem: &Problem) -> [(&'static str, u64); 4] {
    let Problem { op, m, n, k, storage, output, .. } = *problem;
    [
        ("weights", layout::value_bytes(op, m, k, storage)),
        ("meta", 4 * layout::word_count(op, m, k)),
        ("x", (n * k * storage.bytes()) as u64),
        ("y", (n * m * output.bytes()) as u64),
    ]
}

/// A number of operations with a unit that suits it.
fn flop(operations: f64) -> String {
    match operations {
        x if x >= 1e8 => format!("{:.3} GFLOP", x / 1e9),
        x if x >= 1e5 => format!("{:.3} MFLOP", x / 1e6),
        x => format!("{x} FLOP"),
    }
}

/// A time with a unit that suits it.
fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.1} µs", s * 1e6),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::kernels::CoopShape;
    use crate::mask::VectorLen;

    /// A large discrete GPU with cooperative matrices.
    fn caps() -> Caps {
        Caps {
            architecture: None,
            f16: true,
            subgroups: Some((32, 32)),
            cooperative: vec![CoopShape { m: 16, n: 16, k: 16, ab: "f16", c: "f32" }],
            cooperative_lanes: Some(32),
            cooperative_refused: None,
            cooperative_scalars: false,
            emulates_cooperative: false,
            unrolls: true,
            timestamps: false,
            workgroup_memory: 49152,
            workgroup_threads: 1024,
            grid: 65535,
            busy_threads: 1 << 17,
            rates: Rates { fma: 2e13, cooperative: 1e14, memory: 2e12, cache: 4e12, dispatch: 3e-6 },
            binding_bytes: 1 << 27,
            buffer_bytes: 1 << 30,
        }
    }

    fn sparse(v: usize) -> Op {
        Op::Sparse24(VectorLen::new(v).unwrap())
    }

    fn plan(op: Op, m: usize, n: usize, k: usize, storage: DType) -> Plan {
        Plan::gpu(&Problem::linear(op, m, n, k, storage), &caps(), &Tuning::default()).unwrap()
    }

    #[test]
    fn each_size_gets_the_way_made_for_it() {
        assert_eq!(plan(sparse(32), 4096, 4096, 4096, DType::F32).schedule(), "128x128x16");
        assert_eq!(plan(Op::Dense, 4096, 4096, 4096, DType::F32).schedule(), "128x128x16");
        assert!(plan(sparse(1), 14336, 1, 4096, DType::F16).schedule().starts_with("gemv_32x1"));
        assert!(plan(Op::Dense, 14336, 7, 4096, DType::F32).schedule().starts_with("gemv_32x8"));
        assert!(plan(Op::Dense, 4096, 4096, 4096, DType::F16).schedule().starts_with("coop16s32_"));
        // Little output and much k: split-K fills the device.
        assert!(plan(Op::Dense, 256, 256, 16384, DType::F32).schedule().contains('/'));
    }

    #[test]
    fn sparse_weights_that_are_not_faster_are_replaced_by_dense_ones() {
        let auto = |v, n, storage| {
            let problem = Problem::linear(sparse(v), 4096, n, 4096, storage);
            Plan::gpu_or_dense(&problem, &caps(), &Tuning::default()).unwrap()
        };
        for (v, n, storage) in [(32, 4096, DType::F32), (1, 1, DType::F16), (1, 4, DType::F32), (128, 2048, DType::F16)]
        {
            assert_eq!(auto(v, n, storage).weights(), sparse(v), "{}", auto(v, n, storage).explain());
        }
        let plan = auto(1, 4096, DType::F32);
        assert_eq!(plan.weights(), Op::Dense, "{}", plan.explain());
        assert!(plan.explain().contains("dense weights, because") && plan.schedule() == "dense_128x128x16");
        assert_eq!(plan.executed_flops(), plan.problem().effective_flops());
        // Expanded weights are multiplied like dense ones; gathered ones half as often.
        let problem = Problem::linear(sparse(2), 256, 256, 256, DType::F32);
        let expand = Schedule::Expand(crate::kernels::Tile::ALL[0]);
        let lanes = Schedule::named(problem.op, problem.storage, "lanes_128x128x16").unwrap();
        let executed = |schedule| {
            Plan::gpu_with(&problem, &caps(), schedule, 1).unwrap().executed_flops() / problem.effective_flops()
        };
        assert_eq!((executed(expand), executed(lanes)), (1.0, 0.5));
    }

    /// One problem, and what is best on one architecture is not on another.
    #[test]
    fn architectures_get_what_their_compilers_made_fast() {
        let auto = |op, storage, architecture| {
            let problem = Problem::linear(op, 4096, 4096, 4096, storage);
            Plan::gpu_or_dense(&problem, &Caps::example(architecture), &Tuning::default()).unwrap()
        };
        for architecture in Architecture::ALL {
            // Half of the multiply-adds are less time everywhere, and expanded weights nowhere.
            let plan = auto(sparse(32), DType::F32, architecture);
            assert_eq!(plan.weights(), sparse(32), "{}", plan.explain());
            let source = format!("(static, {architecture}, Mesa ");
            assert!(plan.explain().contains(&source), "{}", plan.explain());
            assert_eq!(auto(sparse(1), DType::F32, architecture).weights(), Op::Dense);
        }
        // Workgroup memory limits short patterns on Apple's, where NVIDIA's gains half.
        assert_eq!(auto(sparse(4), DType::F32, Architecture::Ada).weights(), sparse(4));
        assert_eq!(auto(sparse(2), DType::F32, Architecture::AppleM1).weights(), Op::Dense);
        assert_eq!(auto(sparse(2), DType::F32, Architecture::Ampere).weights(), sparse(2));
        let none =
            Plan::gpu(&Problem::linear(sparse(32), 64, 64, 64, DType::F32), &caps(), &Tuning::default()).unwrap();
        assert!(none.explain().contains("the mean of 7 architectures"), "{}", none.explain());
    }

    #[test]
    fn measured_times_win_over_estimates() {
        let problem = Problem::linear(sparse(1), 4096, 4096, 4096, DType::F32);
        let dense = Problem { op: Op::Dense, ..problem };
        let mut tuning = Tuning::default();
        let schedule = Schedule::named(problem.op, problem.storage, "expand_32x32x16").unwrap();
        tuning.insert(&problem, Tuned { n: 4096, schedule, splits: 1, seconds: 1e-3 });
        let schedule = |n| Plan::gpu(&Problem { n, ..problem }, &caps(), &tuning).unwrap().schedule();
        assert_eq!(schedule(4096), "expand_32x32x16");
        assert_eq!(schedule(3000), "expand_32x32x16");
        // Too far to tell anything.
        assert_ne!(schedule(2000), "expand_32x32x16");
        // One measured time and one estimate cannot be compared, two measured ones can.
        assert_eq!(Plan::gpu_or_dense(&problem, &caps(), &tuning).unwrap().weights(), Op::Dense);
        tuning.insert(
            &dense,
            Tuned { n: 4096, schedule: Schedule::Tile(crate::kernels::Tile::ALL[0]), splits: 1, seconds: 1.2e-3 },
        );
        let plan = Plan::gpu_or_dense(&problem, &caps(), &tuning).unwrap();
        assert_eq!(plan.weights(), sparse(1));
        assert!(plan.explain().contains("measured at 1.20 times the speed of dense"), "{}", plan.explain());
    }

    #[test]
    fn explanations_name_kernel_reason_bound_and_padding() {
        let text = plan(sparse(32), 130, 4096, 4100, DType::F32).explain();
        for part in ["gemm_sparse24-f32f32-v32-", "chosen because: lowest estimate", "predicted bound:", "% padding"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        assert!(text.contains("first: k = 4100 is no multiple of 32, so x is padded"), "{text}");
        assert!(plan(sparse(1), 14336, 1, 4096, DType::F16).explain().contains("predicted bound: memory"));
        assert!(plan(Op::Dense, 4096, 4096, 4096, DType::F32).explain().contains("predicted bound: arithmetic"));
    }

    #[test]
    fn a_device_with_little_of_something_gets_a_way_that_fits() {
        let problem = Problem::linear(sparse(32), 4096, 4096, 4096, DType::F32);
        let small = Caps { workgroup_memory: 16384, ..caps() };
        assert_eq!(Plan::gpu(&problem, &small, &Tuning::default()).unwrap().schedule(), "128x32x16");
        let none = Caps { workgroup_memory: 1024, ..caps() };
        let refused = Plan::gpu(&problem, &none, &Tuning::default());
        assert!(refused.unwrap_err().is_unsupported());
        let half = Problem { storage: DType::F16, output: DType::F16, ..problem };
        let no_f16 = Caps { f16: false, ..caps() };
        assert!(Plan::gpu(&half, &no_f16, &Tuning::default()).unwrap_err().to_string().contains("f16"));
    }

    /// Kernels of cooperative matrices count lanes: they follow what the probe has seen, not what the device allows.
    #[test]
    fn cooperative_matrices_are_planned_for_the_width_that_was_seen() {
        let half = Problem::linear(sparse(32), 4096, 4096, 4096, DType::F16);
        let plan = |caps: Caps| Plan::gpu(&half, &caps, &Tuning::default()).unwrap();
        let explained = |caps: Caps| {
            let plan = plan(caps);
            assert!(!plan.schedule().contains("coop"), "{}", plan.explain());
            plan.explain()
        };
        let wide = plan(Caps { subgroups: Some((32, 64)), cooperative_lanes: Some(64), ..caps() });
        assert!(wide.schedule().starts_with("coop16s64_"), "{}", wide.explain());
        assert!(!wide.explain().contains("needs cooperative"), "{}", wide.explain());
        // A width that no kernel counts by, a driver that was refused, and none that was asked.
        let odd = explained(Caps { cooperative_lanes: Some(16), ..caps() });
        assert!(odd.contains("coop needs cooperative matrices of 16x16x16 f16->f32 in subgroups of 64"), "{odd}");
        let wrong = Caps { cooperative_lanes: None, cooperative_refused: Some("all wrong".into()), ..caps() };
        let wrong = explained(wrong);
        assert_eq!(wrong.matches("coop needs cooperative matrices other than this driver's: all wrong").count(), 1);
        let none = explained(Caps { cooperative: Vec::new(), cooperative_lanes: None, ..caps() });
        assert!(none.contains("coop needs cooperative matrices of 8x8x8 or 16x16x16 f16->f32"), "{none}");
        // Not where they promise nothing, as on a processor.
        let slow = Rates { cooperative: 2e13, ..caps().rates };
        assert!(!plan(Caps { rates: slow, ..caps() }).schedule().contains("coop"));
    }

    /// Every output is written by one step, every step's operands fit a binding, and splits and pieces cover k and m.
    #[test]
    fn steps_cover_the_problem_in_bindings_that_fit() {
        let caps = Caps { binding_bytes: 1 << 20, grid: 100, ..caps() };
        for (op, m, n, k, splits) in [
            (Op::Dense, 1000, 300, 1000, 1),
            (sparse(64), 5000, 70, 512, 4),
            (Op::Masked, 64, 9000, 1000, 2),
            (sparse(2), 100, 1, 2048, 16),
        ] {
            let problem = Problem::linear(op, m, n, k, DType::F32);
            let schedule = Schedule::Tile(crate::kernels::Tile::ALL[1]);
            let plan = Plan::gpu_with(&problem, &caps, schedule, splits).unwrap();
            let (mut outputs, mut sums) = (0, 0);
            for step in plan.steps(&caps).unwrap() {
                assert!(step.grid.iter().all(|&g| (1..=100).contains(&g)), "{:?}", step.grid);
                let Params { m: rows, n: tokens, k: padded, k_split, tiles_m, tiles_n, .. } = step.params;
                let workgroups = u64::from(step.grid[0]) * u64::from(step.grid[1]);
                if step.program.gemm().is_some() {
                    assert!(
                        workgroups >= u64::from(tiles_m * tiles_n) && workgroups < u64::from(tiles_m * tiles_n) + 100
                    );
                    assert!(tiles_m * 64 >= rows && tiles_n * 64 >= tokens);
                    assert!(step.grid[2] * k_split >= padded && (step.grid[2] - 1) * k_split < padded);
                    assert!(layout::value_bytes(op, rows as usize, k, DType::F32) <= caps.binding_bytes);
                    sums += rows as usize * tokens as usize;
                }
                match &step.y {
                    Target::Output(range) => {
                        assert!(range.len() * m * 4 <= 1 << 20);
                        outputs += if step.params.features == step.params.m {
                            range.len() * m
                        } else {
                            range.len() * rows as usize
                        };
                    }
                    Target::Partial => assert!(plan.scratch_bytes().1 <= caps.binding_bytes),
                    Target::Packed => assert!(plan.scratch_bytes().0 <= caps.binding_bytes),
                }
            }
            assert_eq!((outputs, sums), (m * n, m * n), "{}", plan.explain());
        }
        // Nothing to write, nothing to dispatch; without k, only the epilogue.
        let steps = |m, n, k| plan(Op::Dense, m, n, k, DType::F32).steps(&caps).unwrap().len();
        assert_eq!((steps(0, 5, 8), steps(5, 0, 8), steps(3, 4, 0)), (0, 0, 1));
    }

    #[test]
    fn what_cannot_be_cut_up_is_refused_by_name() {
        let message = |problem: Problem| Plan::gpu(&problem, &caps(), &Tuning::default()).unwrap_err().to_string();
        let columns = Problem { form: Form::Gemm, ..Problem::linear(Op::Dense, 8, 1 << 20, 64, DType::F32) };
        assert!(message(columns).contains("x") && message(columns).contains("134217728"));
        assert!(message(Problem::linear(Op::Dense, 1024, 1, 1 << 20, DType::F32)).contains("128 rows of weights"));
        assert!(message(Problem::linear(Op::Dense, usize::MAX, 1, 2, DType::F32)).contains("overflows"));
        let bf16 = Problem::linear(Op::Dense, 8, 8, 8, DType::Bf16);
        assert!(Plan::gpu(&bf16, &caps(), &Tuning::default()).unwrap_err().is_dtype());
    }
}
