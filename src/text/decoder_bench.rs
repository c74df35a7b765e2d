//! How long a language model takes for a prompt and for a token, in several forms side by side, and what share of it
//! each kind of operation has.
//!
//! Two phases are timed apart, because two different things bound them: *prefill*, a pass over the tokens of a prompt,
//! by multiply-adds; and *decode*, a pass over one token of each sequence after so many, by the bytes of the weights.
//! Each phase of a form is a row. The form is verified before it is timed, in the shapes that are timed: logits of
//! short texts after a pass over all but their last token, and after one over that, against the f64 twin; and, as the
//! twin is too slow for a long one, logits of the timed prompt against those of the same prompt in pieces, which other
//! kernels multiply and which finds its beginning in the cache.
//!
//! Parts are timed and believed as those of an [encoder](super::EncoderBench) are. Invariant: a row that is not
//! verified has no times.

use ndarray::ArrayView1;

use super::bench::{ModelRecord, SAMPLES, Subject, affordable_tokens, distance, ids};
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Decoder, Model, Sparsity, twin};
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::measure::{PlannedBy, Policy, Speedup, Timer};
use crate::plan::Plan;
use crate::problem::Op;

/// A phase of a language model's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
#[cfg_attr(feature = "report", serde(rename_all = "lowercase"))]
pub enum Phase {
    /// A pass over all tokens of a prompt.
    Prefill,
    /// A pass over one token after a prompt.
    Decode,
}

impl Phase {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Prefill, Self::Decode];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// How far a logit may be from the twin's, where those of its row are about 1. Rounding adds up over the blocks, and
/// pruned models amplify it: SmolLM2 comes to 1.2e-5 as it is, and to 1.4e-4 pruned to 2:4 by magnitude.
pub const fn allowed_logit_error(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-3,
        DType::F16 | DType::Bf16 => 1e-1,
    }
}

/// The logits of a text's last two tokens.
type LastLogits = [Vec<f64>; 2];

/// Lengths of the texts that are verified, of which the last token comes by itself.
const SAMPLE_LENGTHS: [usize; 3] = [33, 7, 2];

/// Tokens of a piece of a prompt.
const PIECE: usize = 32;

/// Measures a language model in several forms. Its weights are pruned by magnitude; a mask has V = 1.
///
/// ```
/// use sparse24::graph::Checkpoint;
/// use sparse24::measure::{PlannedBy, Policy};
/// use sparse24::text::DecoderBench;
/// use sparse24::{DType, Device, Op, VectorLen, models};
/// let graph = models::parse(r#"{"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1,
///     "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}"#)?;
/// let checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
/// let mut bench = DecoderBench::new(&Device::cpu()?, checkpoint, (1, 40), 24)?;
/// for op in [Op::Dense, Op::Sparse24(VectorLen::ONE)] {
///     bench.add(op, PlannedBy::Planner)?;
/// }
/// let rows = bench.run(&Policy::QUICK, |_| {})?;
/// assert!(rows.len() == 4 && rows.iter().all(|row| row.verified && row.tokens_per_second > Some(0.0)));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct DecoderBench {
    device: Device,
    checkpoint: Checkpoint,
    batch: usize,
    seq: usize,
    seed: u64,
    samples: Vec<Vec<u32>>,
    /// The form that was verified last, with the logits of every sample's last two tokens: rows on the same weights
    /// follow one another.
    last: Option<(Op, Checkpoint, Vec<LastLogits>)>,
    rows: Vec<(Phase, Subject<Decoder>)>,
}

impl DecoderBench {
    /// For prompts of `seq` tokens, `batch` of them at once, whose ids `seed` draws. An error unless it is a language
    /// model that takes a token more.
    pub fn new(device: &Device, checkpoint: Checkpoint, (batch, seq): (usize, usize), seed: u64) -> Result<Self> {
        let graph = checkpoint.graph();
        graph.tokens_of(batch, seq.saturating_add(1))?;
        let head = graph.head().ok_or_else(|| Error::invalid("is no language model: its last layer has no logits"))?;
        let weights = graph.linear_weights() + graph.param(head.weights).rows * graph.param(head.weights).cols;
        let affordable = affordable_tokens(weights);
        let most = graph.limits().tokens;
        let lengths = SAMPLE_LENGTHS.map(|length| length.min(affordable).min(most).max(2));
        let samples = ids(graph, &lengths, seed ^ SAMPLES)?;
        let device = device.clone();
        Ok(Self { device, checkpoint, batch, seq, seed, samples, last: None, rows: Vec::new() })
    }

    /// Adds the rows of a form: brings the model to the device in it and verifies it. The next form is faster added if
    /// its operation is the same. Returns how the linear layers are planned in each phase. An error for masks of 2:4
    /// codes, which models do not hold.
    pub fn add(&mut self, op: Op, planned_by: PlannedBy) -> Result<Vec<Plan>> {
        if op == Op::Masked24 {
            return Err(Error::invalid(format!("{op} is measured on single layers only")));
        }
        let (checkpoint, expected) = match &self.last {
            Some((of, checkpoint, expected)) if *of == op => (checkpoint, expected),
            _ => {
                self.last = None;
                let mut own = self.checkpoint.clone();
                match op {
                    Op::Dense => own.densify()?,
                    Op::Sparse24(vector) => own.prune(Sparsity::TwoFour(vector))?,
                    Op::Masked | Op::Masked24 => own.mask(VectorLen::ONE)?,
                }
                let expected = expected_logits(&own, &self.samples)?;
                let (_, checkpoint, expected) = self.last.insert((op, own, expected));
                (&*checkpoint, &*expected)
            }
        };
        let model = Model::new(&self.device, checkpoint)?;
        let model = if planned_by == PlannedBy::Auto { model } else { model.no_dense_fallback() };
        let error = worst_error(&model, self.batch, &self.samples, expected)?.max(self.error_of_prompt(&model)?);
        let allowed = allowed_logit_error(model.dtype());
        let mut all_plans = Vec::new();
        for phase in Phase::ALL {
            let (mut decoder, seq) = (model.decoder(self.batch, self.seq + 1)?, self.new_tokens(phase));
            let mut plans = model.plans(self.batch, seq)?;
            if phase == Phase::Decode {
                decoder.forward(&self.prompts()?)?;
            }
            let calls = decoder.calls(seq)?;
            let record = ModelRecord {
                phase: Some(phase.name()),
                max_error: error.is_finite().then_some(error),
                allowed_error: allowed,
                verified: error <= allowed,
                failure: (error > allowed || error.is_nan())
                    .then(|| format!("a logit is {error:.2e} off, {allowed:.0e} is allowed")),
                weight_bytes: model.linear_bytes(),
                ..ModelRecord::new(op, planned_by, model.dtype(), &plans)
            };
            self.rows.push((phase, Subject::new(record, decoder, &calls)));
            all_plans.extend(plans.drain(..).map(|(_, plan)| plan));
        }
        Ok(all_plans)
    }

    /// New tokens of each sequence in a pass.
    fn new_tokens(&self, phase: Phase) -> usize {
        match phase {
            Phase::Prefill => self.seq,
            Phase::Decode => 1,
        }
    }

    /// The largest distance of the timed prompts' logits from those of the same prompts in pieces.
    fn error_of_prompt(&self, model: &Model) -> Result<f64> {
        let prompts = self.prompts()?;
        let whole = model.decoder(self.batch, self.seq)?.forward(&prompts)?;
        let mut decoder = model.decoder(self.batch, self.seq)?;
        let mut last = None;
        for first in (0..self.seq).step_by(PIECE) {
            let piece: Vec<_> = prompts.iter().map(|ids| &ids[first..self.seq.min(first + PIECE)]).collect();
            last = Some(decoder.forward(&piece)?);
        }
        let pieces = last.ok_or_else(|| Error::invalid("a prompt has a token"))?;
        let row = |row: usize| -> Vec<f64> { (0..pieces.cols()).map(|col| f64::from(pieces.get(row, col))).collect() };
        let error = |at: usize| distance(&whole, at, ArrayView1::from(&row(at)));
        Ok((0..self.batch).map(error).fold(0.0, f64::max))
    }

    fn prompts(&self) -> Result<Vec<Vec<u32>>> {
        ids(self.checkpoint.graph(), &vec![self.seq; self.batch], self.seed)
    }

    /// Times the rows that are verified. `progress` is called with the number of rounds of samples that are done.
    pub fn run(self, policy: &Policy, progress: impl FnMut(usize)) -> Result<Vec<ModelRecord>> {
        let Self { device, checkpoint, batch, seq, last, mut rows, .. } = self;
        let weights = checkpoint.graph().linear_weights() as f64;
        // The host needs its weights no more.
        drop((checkpoint, last));
        let timer = Timer::new(&device, *policy);
        let mut verified: Vec<_> = rows.iter_mut().filter(|(_, row)| row.record.verified).collect();
        for (_, row) in &mut verified {
            timer.calibrate(&mut row.whole)?;
        }
        let workloads = verified.into_iter().flat_map(|(_, row)| std::iter::once(&mut row.whole).chain(&mut row.parts));
        timer.sample_in_turns(workloads, progress)?;
        for (phase, row) in &mut rows {
            let tokens = if *phase == Phase::Prefill { batch * seq } else { batch };
            row.finish(batch, 2.0 * weights * tokens as f64);
            row.record.tokens_per_second = row.record.times.median_ms.map(|ms| tokens as f64 / ms * 1e3);
        }
        let dense = |phase: Phase| {
            let found = rows.iter().find(|(of, row)| *of == phase && row.record.op == "dense");
            found.map(|(_, row)| row.whole.seconds().to_vec())
        };
        let dense = Phase::ALL.map(|phase| (phase, dense(phase)));
        let with_ratio = |(phase, Subject { record, whole, .. }): (Phase, Subject<Decoder>)| {
            let dense = dense.iter().find(|(of, _)| *of == phase).and_then(|(_, seconds)| seconds.as_deref());
            ModelRecord { speedup: Speedup::of(dense, whole.seconds()), ..record }
        };
        Ok(rows.into_iter().map(with_ratio).collect())
    }
}

/// The twin's logits of the last two tokens of each sample.
fn expected_logits(checkpoint: &Checkpoint, samples: &[Vec<u32>]) -> Result<Vec<LastLogits>> {
    let logits = checkpoint.graph().outputs().last().copied();
    let logits = logits.ok_or_else(|| Error::invalid("the model has no output"))?;
    let all = twin::values(checkpoint, &[logits], samples)?;
    let mut end = 0;
    let last_two = samples.iter().map(|text| {
        end += text.len();
        [end - 2, end - 1].map(|row| all[0].row(row).to_vec())
    });
    Ok(last_two.collect())
}

/// The largest error of the samples' logits in decoders of `batch` sequences, in which they take turns: first of what
/// comes before their last tokens, then of these.
fn worst_error(model: &Model, batch: usize, samples: &[Vec<u32>], expected: &[LastLogits]) -> Result<f64> {
    let longest = samples.iter().map(Vec::len).max().unwrap_or(0);
    let mut worst = 0f64;
    for start in (0..samples.len()).step_by(batch) {
        let of_row: Vec<usize> = (0..batch).map(|row| (start + row) % samples.len()).collect();
        let mut decoder = model.decoder(batch, longest)?;
        for place in [0, 1] {
            let part = |&sample: &usize| {
                let (before, last) = samples[sample].split_at(samples[sample].len() - 1);
                [before, last][place]
            };
            let new: Vec<&[u32]> = of_row.iter().map(part).collect();
            let logits = decoder.forward(&new)?;
            for (row, &sample) in of_row.iter().enumerate() {
                worst = worst.max(distance(&logits, row, ArrayView1::from(&expected[sample][place])));
            }
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
    use super::*;
    use crate::matrix::Matrix;
    use crate::{HostWeights, models};

    /// Verification itself: in any linear layer one weight with its sign flipped is more than is allowed.
    #[test]
    fn one_wrong_weight_fails_verification() {
        let graph = models::parse(
            r#"{"model_type": "llama", "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
                "max_position_embeddings": 40}"#,
        )
        .unwrap();
        let right = Checkpoint::random(graph, DType::F32, 24).unwrap();
        let device = Device::cpu().unwrap();
        let samples = ids(right.graph(), &[9, 4], 1).unwrap();
        let expected = expected_logits(&right, &samples).unwrap();
        let error = |checkpoint: &Checkpoint| {
            worst_error(&Model::new(&device, checkpoint).unwrap(), 3, &samples, &expected).unwrap()
        };
        assert!(error(&right) < allowed_logit_error(DType::F32) / 100.0, "{}", error(&right));
        for (name, w) in right.linears() {
            let HostWeights::Dense(w) = w else { panic!("{name} is not dense") };
            let mut numbers = w.elements().to_f32();
            // Of Q, K and V the last, which alone moves more than scores: these are nearly alike here.
            let first = if name.ends_with("qkv_proj") { 3 * numbers.len() / 4 } else { 0 };
            let largest = numbers[first..].iter().fold(0f32, |largest, x| largest.max(x.abs()));
            if let Some(x) = numbers[first..].iter_mut().find(|x| x.abs() == largest) {
                *x *= -1.0;
            }
            let mut wrong = right.clone();
            wrong.set_linear(&name, Matrix::from_f32(w.rows(), w.cols(), &numbers).unwrap().into()).unwrap();
            assert!(error(&wrong) > allowed_logit_error(DType::F32), "{name}: {}", error(&wrong));
        }
    }
}
