//! How long a whole encoder takes, in several forms side by side, and what share of it each kind of operation has.
//!
//! Every row is verified before it is timed: the hidden states of every token and the embeddings of texts of several
//! lengths, as many as the timed batch has and in its shape, against the f64 twin of the forward pass. All rows are
//! sampled in turns by the one [`Timer`].
//!
//! The parts of a pass (GEMMs, attention, the rest) are timed apart, right after whole passes in the same round. Apart
//! they find other caches and other neighbours than within a pass, so their sum is not the pass's time; by noise it may
//! even be more. So only their shares are believed, and applied to the median of whole passes. Invariants: a row that
//! is not verified has no times; the parts of a row come to its median.

use std::sync::Arc;

use ndarray::{Array2, ArrayView1};

use super::{Encoder, Pipeline, twin};
use crate::engine::{Clock, Device, Prepared};
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Forward, Graph, Sparsity};
use crate::mask::VectorLen;
use crate::matrix::{DType, Matrix};
use crate::measure::{MeasuredTimes, PlannedBy, Policy, Speedup, Timer, Workload};
use crate::plan::Plan;
use crate::problem::Op;

/// One row of a benchmark file of a model (schema `sparse24-model-bench/1`): one way to run it. Times are of one
/// forward pass, in milliseconds; they and what follows from them are `None` where the result failed verification.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct ModelRecord {
    /// Of a language model `prefill` or `decode`: what a pass is over.
    #[cfg_attr(feature = "report", serde(skip_serializing_if = "Option::is_none"))]
    pub phase: Option<&'static str>,
    /// As in [`Record`](crate::measure::Record).
    pub op: &'static str,
    /// Vector length of a 2:4 row.
    pub vector: Option<usize>,
    /// Element type of weights and activations.
    pub dtype: String,
    /// Kernels of the linear layers, each once.
    pub kernels: Vec<String>,
    /// Linear layers that run on dense weights in place of 2:4 ones.
    pub dense_layers: usize,
    /// Linear layers.
    pub linear_layers: usize,
    /// Of one pass.
    #[cfg_attr(feature = "report", serde(flatten))]
    pub times: MeasuredTimes,
    /// `gpu_timestamps` or `host_wall`.
    pub clock: Option<&'static str>,
    /// What of the median each part takes, by its share when timed alone.
    pub parts: Option<PartTimes>,
    /// Sum of the medians of the parts when timed alone: how far that is from the median is how far to trust them.
    pub parts_alone_ms: Option<f64>,
    /// What each part must do at least in a pass, by the operations' own count: what its time is to be held against.
    pub parts_cost: PartCosts,
    /// Texts in a second.
    pub sequences_per_second: Option<f64>,
    /// Tokens in a second, of a language model: of the prompts in prefill, new ones in decode.
    #[cfg_attr(feature = "report", serde(skip_serializing_if = "Option::is_none"))]
    pub tokens_per_second: Option<f64>,
    /// 2 x linear weights x tokens / median, in 10¹² per second, whatever was skipped.
    pub effective_tflops: Option<f64>,
    /// Against the row with op `dense`.
    #[cfg_attr(feature = "report", serde(flatten))]
    pub speedup: Speedup,
    /// Bytes of the linear weights on the device.
    pub weight_bytes: usize,
    /// Largest distance of an element of a hidden state or an embedding from the twin's, over the root of the mean
    /// square of that state or embedding; `None` if infinite.
    pub max_error: Option<f64>,
    /// What is allowed of it: [`allowed_error`].
    pub allowed_error: f64,
    /// Whether it is no more than that.
    pub verified: bool,
    /// What was wrong, if it was not.
    #[cfg_attr(feature = "report", serde(skip_serializing_if = "Option::is_none"))]
    pub failure: Option<String>,
    /// The command that measures this row: for those who read the file. Empty until the caller writes it.
    pub command: String,
}

impl ModelRecord {
    /// The row of a form whose linear layers have these plans, without any figures.
    pub(super) fn new(op: Op, planned_by: PlannedBy, dtype: DType, plans: &[(Op, Plan)]) -> Self {
        let mut kernels: Vec<String> = Vec::new();
        for kernel in plans.iter().map(|(_, plan)| plan.schedule()) {
            if !kernels.contains(&kernel) {
                kernels.push(kernel);
            }
        }
        Self {
            phase: None,
            op: if planned_by == PlannedBy::Auto { "auto" } else { op.name() },
            vector: op.vector().map(VectorLen::get),
            dtype: dtype.to_string(),
            kernels,
            dense_layers: plans.iter().filter(|(of, plan)| *of == op && plan.weights() != op).count(),
            linear_layers: plans.len(),
            times: MeasuredTimes::default(),
            clock: None,
            parts: None,
            parts_alone_ms: None,
            parts_cost: PartCosts::default(),
            sequences_per_second: None,
            tokens_per_second: None,
            effective_tflops: None,
            speedup: Speedup::default(),
            weight_bytes: 0,
            max_error: None,
            allowed_error: 0.0,
            verified: false,
            failure: None,
            command: String::new(),
        }
    }
}

/// A whole in the shares of its parts, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct PartTimes {
    /// Linear layers, with bias, activation and residual.
    pub gemm_ms: f64,
    /// The products and the softmax of attention.
    pub attention_ms: f64,
    /// Embeddings, norms, pooling.
    pub rest_ms: f64,
}

impl PartTimes {
    /// A whole in the shares of parts that were timed alone: GEMMs, attention, the rest.
    fn of(whole: f64, alone: [f64; 3]) -> Self {
        let [gemm_ms, attention_ms, rest_ms] = alone.map(|part| whole * part / alone.iter().sum::<f64>());
        Self { gemm_ms, attention_ms, rest_ms }
    }

    /// The share of linear layers.
    pub fn gemm_share(&self) -> f64 {
        self.gemm_ms / (self.gemm_ms + self.attention_ms + self.rest_ms)
    }
}

/// Operations in 10⁹ and bytes of operands in 10⁶ of the parts of a pass, as dense ones count: 2:4 multiplies half as
/// often.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct PartCosts {
    /// Operations of linear layers.
    pub gemm_gflop: f64,
    /// Their bytes.
    pub gemm_mb: f64,
    /// Operations of attention.
    pub attention_gflop: f64,
    /// Its bytes.
    pub attention_mb: f64,
    /// Operations of the rest.
    pub rest_gflop: f64,
    /// Its bytes.
    pub rest_mb: f64,
}

impl PartCosts {
    /// Of calls, each with its operation's name.
    fn of(calls: &[(&str, Prepared)]) -> Self {
        let [gemm, attention, rest] = Part::ALL.map(|part| {
            let own = calls.iter().filter(|(op, _)| Part::of(op) == part);
            own.fold((0.0, 0.0), |sum, (_, call)| (sum.0 + call.cost().flops / 1e9, sum.1 + call.cost().bytes / 1e6))
        });
        Self {
            gemm_gflop: gemm.0,
            gemm_mb: gemm.1,
            attention_gflop: attention.0,
            attention_mb: attention.1,
            rest_gflop: rest.0,
            rest_mb: rest.1,
        }
    }
}

/// Which share of a forward pass a call belongs to, as in [`PartTimes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Gemm,
    Attention,
    Rest,
}

impl Part {
    const ALL: [Self; 3] = [Self::Gemm, Self::Attention, Self::Rest];

    /// That of an operation, by its name.
    fn of(op: &str) -> Self {
        match op {
            "gemm" => Self::Gemm,
            "attention" | "cached_attention" | "kv_append" => Self::Attention,
            _ => Self::Rest,
        }
    }
}

/// Multiply-adds of the f64 twin that are worth waiting for: some seconds.
const TWIN_FMAS: u64 = 15_000_000_000;

/// How many tokens the twin of a model of so many weights can afford.
pub(super) fn affordable_tokens(weights: usize) -> usize {
    usize::try_from(TWIN_FMAS / weights.max(1) as u64).unwrap_or(usize::MAX)
}

/// How far an element may be from the twin's, where those of its row are about 1. No bound through softmax and
/// LayerNorm would be of use. On all-MiniLM-L6-v2 and random ids hidden states come to 8e-6 and 1.6e-2; one wrong
/// weight is far above the first (see the test), and f16 is what embeddings of 384 features are held to: 3e-3 of their
/// length.
pub const fn allowed_error(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 5e-5,
        DType::F16 | DType::Bf16 => 6e-2,
    }
}

/// What the twin says of the sample texts.
#[derive(Debug)]
struct Expected {
    texts: Vec<Vec<u32>>,
    /// One row a token, text after text.
    states: Array2<f64>,
    /// One row a text.
    embeddings: Array2<f64>,
}

impl Expected {
    fn new(checkpoint: &Checkpoint, pipeline: &Pipeline, texts: &[Vec<u32>]) -> Result<Self> {
        let states = twin::hidden_states(checkpoint, texts)?;
        let embeddings = twin::pool(pipeline, &states, texts.iter().map(Vec::len));
        Ok(Self { texts: texts.to_vec(), states, embeddings })
    }

    /// The largest error of a pass over batches in which the texts take turns, and the texts' embeddings. All are seen
    /// even where a batch has fewer.
    async fn error(&self, encoder: &Encoder, forward: &Forward) -> Result<(f64, Matrix)> {
        let hidden = forward.graph().outputs().first().and_then(|&states| forward.tap(states));
        let hidden = hidden.ok_or_else(|| Error::invalid("the model has no hidden states"))?;
        let mut worst = 0f64;
        let mut seen = Vec::new();
        for start in (0..self.texts.len()).step_by(forward.batch()) {
            let of_row: Vec<_> = (0..forward.batch()).map(|row| (start + row) % self.texts.len()).collect();
            let batch: Vec<_> = of_row.iter().map(|&text| &self.texts[text]).collect();
            let embeddings = encoder.embed_batch_async(forward, &batch).await?;
            let states = encoder.model().device().read_async(hidden).await?;
            seen.extend(embeddings.elements().to_f32());
            for (row, &text) in of_row.iter().enumerate() {
                worst = worst.max(distance(&embeddings, row, self.embeddings.row(text)));
                let first: usize = self.texts[..text].iter().map(Vec::len).sum();
                for token in 0..self.texts[text].len() {
                    worst = worst.max(distance(&states, row * forward.seq() + token, self.states.row(first + token)));
                }
            }
        }
        // The last batch may go round.
        seen.truncate(self.texts.len() * encoder.width());
        Ok((worst, Matrix::from_f32(self.texts.len(), encoder.width(), &seen)?))
    }
}

/// The largest distance of a row's elements from what is expected, over the root of the mean square of the latter;
/// infinite if one is NaN.
pub(super) fn distance(got: &Matrix, row: usize, expected: ArrayView1<'_, f64>) -> f64 {
    let scale = (expected.dot(&expected) / expected.len() as f64).sqrt();
    let distance = |(col, expected): (usize, &f64)| (f64::from(got.get(row, col)) - expected).abs() / scale;
    let not_nan = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
    expected.iter().enumerate().map(distance).map(not_nan).fold(0.0, f64::max)
}

/// Separates the ids of the verified texts from the timed ones.
pub(super) const SAMPLES: u64 = 0x5eed_7e87_5a3b_1e50;

/// Lengths of the texts that are verified: short ones, whose padding shows, and a whole one where the twin can afford
/// it.
fn sample_lengths(graph: &Graph, seq: usize) -> Vec<usize> {
    let affordable = affordable_tokens(graph.linear_weights());
    let mut lengths = vec![seq.min(33), seq.min(7)];
    lengths.extend((seq <= affordable).then_some(seq));
    lengths
}

/// Texts of these lengths, with ids drawn by a seeded generator.
pub(super) fn ids(graph: &Graph, lengths: &[usize], seed: u64) -> Result<Vec<Vec<u32>>> {
    let all = Matrix::uniform(1, lengths.iter().sum(), DType::F32, seed)?;
    let mut drawn = all.elements().to_f32().into_iter();
    let rows = graph.limits().vocabulary;
    let id = |x: f32| ((f64::from(x) + 1.0) / 2.0 * rows as f64) as u32;
    Ok(lengths.iter().map(|&length| drawn.by_ref().take(length).map(id).collect()).collect())
}

/// Measures an encoder in several forms. What is dense of its weights is pruned by magnitude, and what is pruned
/// already stays as it is, but in a dense row; a mask has V = 1.
///
/// ```
/// use sparse24::graph::Checkpoint;
/// use sparse24::measure::{PlannedBy, Policy};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::text::{EncoderBench, Pipeline};
/// use sparse24::{Activation, DType, Device, Op, VectorLen};
/// let sizes = Sizes { vocabulary: 9, hidden: 32, layers: 1, heads: 2, intermediate: 64, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// let checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
/// let mut bench = EncoderBench::new(&Device::cpu()?, checkpoint, Pipeline::default(), (2, 4), 24)?;
/// for op in [Op::Dense, Op::Sparse24(VectorLen::ONE)] {
///     bench.add(op, PlannedBy::Planner)?;
/// }
/// assert!(bench.add(Op::Masked24, PlannedBy::Planner).is_err());
/// let rows = bench.run(&Policy::QUICK, |_| {})?;
/// assert!(rows.iter().all(|row| row.verified) && rows[1].speedup.vs_dense > Some(0.0));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct EncoderBench {
    device: Device,
    checkpoint: Checkpoint,
    pipeline: Pipeline,
    batch: usize,
    seq: usize,
    /// Texts that are timed.
    timed: Vec<Vec<u32>>,
    /// Whether the parts of a pass are timed, too.
    times_parts: bool,
    /// Texts that are verified.
    samples: Vec<Vec<u32>>,
    /// What was verified last, and what is expected of it: rows on the same weights follow one another.
    last: Option<(Form, Checkpoint, Expected)>,
    rows: Vec<Subject<Arc<Forward>>>,
}

/// A form of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As they were given.
    Given,
    /// As an operation takes them, pruned by magnitude where they are dense.
    Of(Op),
}

/// A row while it is measured, of calls that `P` owns the operands of.
#[derive(Debug)]
pub(super) struct Subject<P> {
    pub(super) record: ModelRecord,
    pass: P,
    pub(super) whole: Workload,
    /// The calls of each part alone.
    pub(super) parts: [Workload; 3],
}

impl EncoderBench {
    /// For batches of `batch` texts of `seq` tokens, whose ids `seed` draws. An error if the model does not take as
    /// many.
    pub fn new(
        device: &Device,
        checkpoint: Checkpoint,
        pipeline: Pipeline,
        (batch, seq): (usize, usize),
        seed: u64,
    ) -> Result<Self> {
        let graph = checkpoint.graph();
        graph.tokens_of(batch, seq)?;
        let samples = ids(graph, &sample_lengths(graph, seq), seed ^ SAMPLES)?;
        let timed = ids(graph, &vec![seq; batch], seed)?;
        let device = device.clone();
        let (last, rows) = (None, Vec::new());
        Ok(Self { device, checkpoint, pipeline, batch, seq, timed, times_parts: true, samples, last, rows })
    }

    /// For a batch of these very texts, which are verified and timed, in whole passes alone. An error if there is none,
    /// or one is no input of the model.
    pub fn of_texts(device: &Device, checkpoint: Checkpoint, pipeline: Pipeline, texts: Vec<Vec<u32>>) -> Result<Self> {
        for (i, text) in texts.iter().enumerate() {
            checkpoint.graph().check_ids(text).map_err(|e| e.of_text(i))?;
        }
        let (batch, seq) = (texts.len(), texts.iter().map(Vec::len).max().unwrap_or(0));
        checkpoint.graph().tokens_of(batch, seq)?;
        let (device, samples) = (device.clone(), texts.clone());
        let (timed, last, rows) = (texts, None, Vec::new());
        Ok(Self { device, checkpoint, pipeline, batch, seq, timed, times_parts: false, samples, last, rows })
    }

    /// Adds a row: brings the model to the device in this form and verifies it. The next row is faster added if its
    /// operation is the same. Returns how the linear layers are planned. An error for masks of 2:4 codes, which models
    /// do not hold.
    pub fn add(&mut self, op: Op, planned_by: PlannedBy) -> Result<Vec<Plan>> {
        pollster::block_on(self.add_async(op, planned_by)).map(|(plans, _)| plans)
    }

    /// [`EncoderBench::add`] where nothing may block. Returns the embeddings of the verified texts, too.
    pub async fn add_async(&mut self, op: Op, planned_by: PlannedBy) -> Result<(Vec<Plan>, Matrix)> {
        if op == Op::Masked24 {
            return Err(Error::invalid(format!("{op} is measured on single layers only")));
        }
        self.add_form(Form::Of(op), op, planned_by).await
    }

    /// Adds a row of the weights as they were given, dense layers beside pruned ones. Its operation is that of the
    /// pruned layer whose rows share a pattern the least.
    pub async fn add_given_async(&mut self, planned_by: PlannedBy) -> Result<(Vec<Plan>, Matrix)> {
        let ops = self.checkpoint.linears().map(|(_, w)| w.op()).filter(|op| *op != Op::Dense);
        let op = ops.min_by_key(|op| op.vector()).unwrap_or(Op::Dense);
        self.add_form(Form::Given, op, planned_by).await
    }

    async fn add_form(&mut self, form: Form, op: Op, planned_by: PlannedBy) -> Result<(Vec<Plan>, Matrix)> {
        if self.last.as_ref().is_none_or(|(of, ..)| *of != form) {
            let mut own = self.checkpoint.clone();
            match form {
                Form::Given => {}
                Form::Of(Op::Dense) => own.densify()?,
                Form::Of(Op::Sparse24(vector)) => own.prune(Sparsity::TwoFour(vector))?,
                Form::Of(Op::Masked | Op::Masked24) => own.mask(VectorLen::ONE)?,
            }
            let expected = Expected::new(&own, &self.pipeline, &self.samples)?;
            self.last = Some((form, own, expected));
        }
        let Some((_, checkpoint, expected)) = &self.last else { return Err(Error::invalid("there are no weights")) };
        let encoder = Encoder::new(&self.device, checkpoint, self.pipeline.clone())?;
        let encoder = if planned_by == PlannedBy::Auto { encoder } else { encoder.no_dense_fallback() };
        let model = encoder.model();
        let forward = model.forward(self.batch, self.seq)?;
        let (error, embeddings) = expected.error(&encoder, &forward).await?;
        let plans = model.plans(self.batch, self.seq)?;
        let allowed = allowed_error(model.dtype());
        let verified = error <= allowed;
        let record = ModelRecord {
            weight_bytes: model.linear_bytes(),
            max_error: error.is_finite().then_some(error),
            allowed_error: allowed,
            verified,
            failure: (!verified).then(|| format!("an output is {error:.2e} off, {allowed:.0e} is allowed")),
            ..ModelRecord::new(op, planned_by, model.dtype(), &plans)
        };
        let calls: Vec<_> = forward.calls().map(|(node, call)| (node.op.name(), call.clone())).collect();
        self.rows.push(Subject::new(record, forward, &calls));
        Ok((plans.into_iter().map(|(_, plan)| plan).collect(), embeddings))
    }

    /// Times the rows that are verified. `progress` is called with the number of rounds of samples that are done.
    pub fn run(self, policy: &Policy, progress: impl FnMut(usize)) -> Result<Vec<ModelRecord>> {
        pollster::block_on(self.run_async(policy, progress))
    }

    /// [`EncoderBench::run`] where nothing may block.
    pub async fn run_async(self, policy: &Policy, progress: impl FnMut(usize)) -> Result<Vec<ModelRecord>> {
        let Self { device, checkpoint, batch, seq, timed, times_parts, last, mut rows, .. } = self;
        let flops = 2.0 * checkpoint.graph().linear_weights() as f64 * (batch * seq) as f64;
        // The host needs its weights no more.
        drop((checkpoint, last));
        let timer = Timer::new(&device, *policy);
        let mut verified: Vec<_> = rows.iter_mut().filter(|row| row.record.verified).collect();
        for row in &mut verified {
            row.pass.write(&timed)?;
            // Its parts are warm by this, too, and find out themselves how many passes they need.
            timer.calibrate_async(&mut row.whole).await?;
        }
        let workloads = verified.into_iter().flat_map(|Subject { whole, parts, .. }| {
            std::iter::once(whole).chain(parts.iter_mut().filter(|_| times_parts))
        });
        timer.sample_in_turns_async(workloads, progress).await?;

        rows.iter_mut().for_each(|row| row.finish(batch, flops));
        let dense = rows.iter().find(|row| row.record.op == "dense").map(|row| row.whole.seconds().to_vec());
        let with_ratio = |Subject { record, whole, .. }: Subject<_>| ModelRecord {
            speedup: Speedup::of(dense.as_deref(), whole.seconds()),
            ..record
        };
        Ok(rows.into_iter().map(with_ratio).collect())
    }
}

impl<P> Subject<P> {
    /// The row of a pass of these calls, each with its operation's name.
    pub(super) fn new(record: ModelRecord, pass: P, calls: &[(&str, Prepared)]) -> Self {
        let of = |part: Part| calls.iter().filter(move |(op, _)| Part::of(op) == part).map(|(_, call)| call.clone());
        let whole = Workload::pass(calls.iter().map(|(_, call)| call.clone()));
        let parts = Part::ALL.map(|part| Workload::pass(of(part)).as_part());
        Self { record: ModelRecord { parts_cost: PartCosts::of(calls), ..record }, pass, whole, parts }
    }

    /// Writes the times into the record, where there are any.
    pub(super) fn finish(&mut self, batch: usize, flops: f64) {
        let Self { record, whole, parts, .. } = self;
        record.times = whole.times();
        record.clock = whole.clock().map(Clock::name);
        let Some(ms) = record.times.median_ms else { return };
        if let [Some(gemm), Some(attention), Some(rest)] = parts.each_ref().map(Workload::median) {
            let alone = [gemm, attention, rest].map(|median| median.value * 1e3);
            record.parts = Some(PartTimes::of(ms, alone));
            record.parts_alone_ms = Some(alone.iter().sum());
        }
        record.sequences_per_second = Some(batch as f64 / ms * 1e3);
        record.effective_tflops = Some(flops / ms / 1e9);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
    use ndarray::array;

    use super::*;
    use crate::models::bert::{BertConfig, Sizes};
    use crate::{HostWeights, models};

    #[test]
    fn samples_are_ids_of_the_vocabulary_and_short_enough() {
        let graph = models::named("bert-large").unwrap();
        // 302 M weights: a whole text of 512 tokens takes the twin too long.
        assert_eq!(sample_lengths(&graph, 512), [33, 7]);
        assert_eq!(sample_lengths(&graph, 5), [5, 5, 5]);
        let texts = ids(&graph, &[3, 500], 1).unwrap();
        assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), [3, 500]);
        let (low, high) = (texts[1].iter().min(), texts[1].iter().max());
        assert!(low < Some(&1000) && high > Some(&29_500) && high < Some(&30_522), "{low:?} {high:?}");
    }

    /// Verification itself: one weight with its sign flipped in any linear layer is more than is allowed, even among
    /// the small random ones that attend to all tokens nearly alike.
    #[test]
    fn one_wrong_weight_fails_verification() {
        let config = BertConfig::named("minilm").unwrap();
        let sizes = Sizes { vocabulary: 99, layers: 2, ..config.sizes() };
        let graph = BertConfig::new(sizes, config.eps(), config.activation()).unwrap().graph().unwrap();
        let right = Checkpoint::random(graph.clone(), DType::F32, 24).unwrap();
        let device = Device::cpu().unwrap();
        let expected = Expected::new(&right, &Pipeline::default(), &ids(&graph, &[8, 3], 1).unwrap()).unwrap();
        let error = |checkpoint: &Checkpoint| {
            let encoder = Encoder::new(&device, checkpoint, Pipeline::default()).unwrap();
            pollster::block_on(expected.error(&encoder, &encoder.forward(2, 8).unwrap())).unwrap().0
        };
        assert!(error(&right) < allowed_error(DType::F32) / 10.0, "{}", error(&right));
        for (name, w) in right.linears() {
            let HostWeights::Dense(w) = w else { panic!("{name} is not dense") };
            // Q and K move scores alone, which are nearly alike: the wrong weight of each is looked for apart.
            let parts = if name.ends_with("qkv") { 3 } else { 1 };
            let numbers = w.elements().to_f32();
            let len = numbers.len() / parts;
            for part in 0..parts {
                let mut numbers = numbers.clone();
                let of_part = &mut numbers[part * len..][..len];
                let largest = of_part.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                if let Some(x) = of_part.iter_mut().find(|x| x.abs() == largest) {
                    *x *= -1.0;
                }
                let mut wrong = right.clone();
                wrong.set_linear(&name, Matrix::from_f32(w.rows(), w.cols(), &numbers).unwrap().into()).unwrap();
                assert!(error(&wrong) > 2.0 * allowed_error(DType::F32), "{name}, part {part}: {}", error(&wrong));
            }
        }
    }

    /// However long parts take alone.
    #[test]
    fn parts_come_to_the_whole() {
        for alone in [[5.0, 2.0, 1.0], [50.0, 20.0, 10.0], [0.5, 0.2, 0.1]] {
            let parts = PartTimes::of(8.0, alone);
            let PartTimes { gemm_ms, attention_ms, rest_ms } = parts;
            assert!((gemm_ms + attention_ms + rest_ms - 8.0).abs() < 1e-12 && (gemm_ms - 5.0).abs() < 1e-12);
            assert!((parts.gemm_share() - 0.625).abs() < 1e-12);
        }
    }

    #[test]
    fn a_nan_is_as_far_off_as_can_be() {
        let got = Matrix::from_f32(2, 2, &[0.0, 1.0, 0.0, f32::NAN]).unwrap();
        assert_eq!(distance(&got, 0, array![0.75, 0.75].view()), 1.0);
        assert_eq!(distance(&got, 1, array![0.0, 1.0].view()), f64::INFINITY);
    }
}
