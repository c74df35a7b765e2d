//! The loss of a language model's logits beside those of another, some tokens at a time.
//!
//! ```text
//!   states of a pass ──rows──► head ──► logits ─────┐
//!                                                   ├─ KlDivergence ──► loss of each token
//!   states that they should be ──rows──► other's head ──► logits
//!                                                   │ gradient of logits
//!   gradient of the states ◄──rows── head, backwards ◄
//! ```
//! The logits of a batch are far larger than all else that a pass has: 32 texts of 64 tokens have 400 MB of them, with
//! a vocabulary of 49152. So both heads run on some rows at a time, and what is left of these is a loss for each token
//! and the gradient of what the head reads. Rows are of real tokens alone, gathered from the states. The head itself is
//! not trained.
//!
//! Invariant: the other model's logits are computed from states that are given, and so from those that are cached.

use std::sync::Arc;

use super::super::forward::not_there;
use super::super::{BackwardArgs, Graph, LinearLayer, Model, NodeArgs, NodeOperand, Read, ValueId};
use super::{ParamValue, Trainable};
use crate::engine::{Device, Indices, Prepared, Tensor};
use crate::error::{Error, Result, expect_shape};
use crate::matrix::{DType, Matrix};
use crate::ops::embedding::EmbeddingGrad;
use crate::ops::kl_divergence::KlDivergence;
use crate::ops::{Embedding, Gradient};

/// The heads of two models of one graph, for some rows at a time: shared by the passes of all shapes.
#[derive(Debug)]
pub struct HeadLoss {
    trainable: Arc<Trainable>,
    states: ValueId,
    rows: usize,
    /// The rows of the states that the next calls read.
    at: Indices,
    /// How many of them are real.
    count: Indices,
    /// What each token counts.
    weight: Tensor,
    /// What the heads read: the trained model's, and the other's.
    x: [Tensor; 2],
    logits: [Tensor; 2],
    /// The gradients of the trained model's logits, and of what its head reads.
    gradients: [Tensor; 2],
    forward: Vec<Prepared>,
    backward: Vec<Prepared>,
}

/// The loss of the logits of one [`TrainingPass`](super::TrainingPass).
#[derive(Debug)]
pub struct HeadPass {
    head: Arc<HeadLoss>,
    /// What each token adds to the loss, a row for each run of rows.
    losses: Tensor,
    /// Of each run of rows the calls of the loss alone, and those with the gradient.
    measure: Vec<Vec<Prepared>>,
    backward: Vec<Vec<Prepared>>,
}

impl HeadLoss {
    /// The most rows at a time: enough for products to be as fast as they get.
    const MAX_ROWS: usize = 256;
    /// The fewest, whatever the memory is.
    const MIN_ROWS: usize = 8;

    /// The head of the model that is trained, beside that of `other`, a model of the same graph. In no more than
    /// `memory` bytes, unless eight rows take more. An error if the graph has no [head](Graph::head).
    pub fn new(trainable: &Arc<Trainable>, other: &Model, memory: u64) -> Result<Self> {
        let (graph, device) = (trainable.graph(), trainable.device());
        let LinearLayer { node: at_node, x: states, .. } =
            graph.head().ok_or_else(|| Error::invalid("the model has no head that makes logits"))?;
        let node = &graph.nodes()[at_node];
        let rows = Self::rows(device, graph, (states, node.writes), memory);
        let tensor = |value: ValueId| device.zeros(rows, graph.value(value).cols, DType::F32);
        let (x, logits) = (tensor(states)?, tensor(node.writes)?);
        let (dx, dlogits) = (tensor(states)?, tensor(node.writes)?);

        let operand = |read: &Read| match read {
            Read::Value(value) if *value == states => Ok(NodeOperand::Tensor(&x)),
            Read::Param(param) => Ok(match &trainable.params[param.0].value {
                ParamValue::Weights(weights) => NodeOperand::Trainable(weights),
                ParamValue::Matrix(tensor) => NodeOperand::Tensor(tensor),
            }),
            Read::Value(_) | Read::Input(_) => Err(not_there()),
        };
        let args = || {
            let reads = node.reads.iter().map(operand).collect::<Result<_>>()?;
            Ok::<_, Error>(NodeArgs { device, batch: rows, seq: 1, reads, y: &logits })
        };
        let mut forward = node.op.prepare_saving(&args()?, None)?;
        let gradient = |read: &Read| match read {
            Read::Value(_) => Some(Gradient { to: &dx, add: false }),
            Read::Param(_) | Read::Input(_) => None,
        };
        let gradients = node.reads.iter().map(gradient).collect();
        let backward = node.op.backward(&BackwardArgs { forward: args()?, saved: None, dy: &dlogits, gradients })?;

        let others = other.part(at_node..at_node + 1, &[], rows, 1)?;
        let other_x = others.operand(states).ok_or_else(not_there)?.clone();
        let other_logits = others.output().clone();
        forward.extend(others.calls().map(|(_, call)| call.clone()));
        Ok(Self {
            trainable: Arc::clone(trainable),
            states,
            rows,
            at: device.indices(rows)?,
            count: device.indices(1)?,
            weight: device.zeros(1, 1, DType::F32)?,
            x: [x, other_x],
            logits: [logits, other_logits],
            gradients: [dlogits, dx],
            forward,
            backward,
        })
    }

    /// How many rows fit into so much memory, and the logits of how many a device binds at once.
    fn rows(device: &Device, graph: &Graph, (states, logits): (ValueId, ValueId), memory: u64) -> usize {
        let [width, vocabulary] = [states, logits].map(|value| graph.value(value).cols);
        let bound = device.caps().map_or(u64::MAX, |caps| caps.binding_bytes.min(caps.buffer_bytes));
        let fitting =
            (memory / Self::bytes_of_row(width, vocabulary).max(1)).min(bound / (4 * vocabulary as u64).max(1));
        usize::try_from(fitting).unwrap_or(usize::MAX).clamp(Self::MIN_ROWS, Self::MAX_ROWS)
    }

    /// Logits and states of two models, and a gradient of each of one.
    fn bytes_of_row(width: usize, vocabulary: usize) -> u64 {
        3 * 4 * (width as u64 + vocabulary as u64)
    }

    /// Bytes of logits, states and gradients on the device.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * Self::bytes_of_row(self.x[0].cols(), self.logits[0].cols())
    }

    /// The value that the head reads: whose gradient a pass is to have from its user
    /// ([`Target::Given`](super::Target::Given)).
    pub fn states(&self) -> ValueId {
        self.states
    }

    /// The calls for the states of a pass, beside those that the other model has for the same texts; `gradient` is
    /// where the gradient of the states goes. An error unless all three have the same shape.
    pub fn bind(self: &Arc<Self>, states: &Tensor, wanted: &Tensor, gradient: &Tensor) -> Result<HeadPass> {
        let device = self.trainable.device();
        expect_shape("wanted states", wanted.shape(), states.shape())?;
        expect_shape("gradient of states", gradient.shape(), states.shape())?;
        let runs = states.rows().div_ceil(self.rows);
        let losses = device.zeros(runs, self.rows, DType::F32)?;
        let [x, other_x] = &self.x;
        let [logits, other_logits] = &self.logits;
        let [dlogits, dx] = &self.gradients;
        let gather = |from: &Tensor, y| device.prepare(&Embedding { tables: &[(from, &self.at)], y });
        let first = [&[gather(states, x)?, gather(wanted, other_x)?], &self.forward[..]].concat();
        let (mut measure, mut backward) = (Vec::new(), Vec::new());
        for row in 0..runs {
            let loss = KlDivergence {
                x: logits,
                wanted: other_logits,
                lengths: &self.count,
                batch: 1,
                seq: self.rows,
                weight: &self.weight,
                loss: &losses,
                row,
                dx: None,
            };
            let with_gradient = KlDivergence { dx: Some(Gradient { to: dlogits, add: false }), ..loss };
            // The first run overwrites the gradient of all rows, with zero where it has none.
            let to = Gradient { to: gradient, add: row > 0 };
            let scatter = device.prepare(&EmbeddingGrad { tables: &[(&self.at, to)], dy: dx })?;
            measure.push([&first[..], &[device.prepare(&loss)?]].concat());
            let with_gradient = [device.prepare(&with_gradient)?];
            backward.push([&first[..], &with_gradient, &self.backward[..], &[scatter]].concat());
        }
        Ok(HeadPass { head: Arc::clone(self), losses, measure, backward })
    }
}

impl HeadPass {
    /// `weight` times the sum of the divergences of some rows of the states, those of real tokens. With `backward` the
    /// gradient of the states is overwritten: it is zero in other rows. An error if there is no row.
    pub fn run(&self, rows: &[u32], weight: f64, backward: bool) -> Result<f64> {
        let HeadLoss { trainable, rows: each, at, count, weight: to, .. } = &*self.head;
        let device = trainable.device();
        let Some(&some) = rows.first() else { return Err(Error::invalid("there is no token whose logits to compare")) };
        let calls = if backward { &self.backward } else { &self.measure };
        if rows.len() > calls.len() * each {
            return Err(Error::invalid(format!("{} tokens, of a pass with fewer", rows.len())));
        }
        device.write(to, &Matrix::from_f32(1, 1, &[weight as f32])?)?;
        let mut run = vec![some; *each];
        let runs = rows.chunks(*each);
        let count_of_runs = runs.len();
        for (rows, calls) in runs.zip(calls) {
            // What is past the last is padding, of a row that there is: its gradient is zero.
            run[..rows.len()].copy_from_slice(rows);
            run[rows.len()..].fill(some);
            device.write_indices(at, &run)?;
            device.write_indices(count, &[rows.len() as u32])?;
            device.submit(calls)?;
        }
        let losses = device.read(&self.losses)?.elements().to_f32();
        Ok(losses[..count_of_runs * each].iter().map(|&loss| f64::from(loss)).sum())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::tests::{moved, on_a_gpu};
    use super::super::{Target, TrainingPass};
    use super::*;
    use crate::graph::{Checkpoint, Sparsity, twin};
    use crate::mask::VectorLen;
    use crate::models;
    use crate::reference::kl_divergence as oracle;

    const TEXTS: [&[u32]; 3] = [&[1, 2, 3, 4, 5], &[6, 7], &[8, 9, 10, 3]];
    const SEQ: usize = 6;
    const WEIGHT: f64 = 0.125;

    /// Real tokens among the rows of a batch.
    fn rows() -> Vec<u32> {
        let of = |(i, text): (usize, &&[u32])| (0..text.len()).map(move |token| (i * SEQ + token) as u32);
        TEXTS.iter().enumerate().flat_map(of).collect()
    }

    /// Two models, the first of them pruned.
    fn models() -> [Checkpoint; 2] {
        let config = r#"{"model_type": "llama", "vocab_size": 43, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16,
            "tie_word_embeddings": true}"#;
        let of = |seed| {
            let mut checkpoint = Checkpoint::random(models::parse(config).unwrap(), DType::F32, seed).unwrap();
            let names: Vec<String> = checkpoint.linears().map(|(name, _)| name).collect();
            for (i, name) in names.iter().enumerate() {
                let (m, k) = (checkpoint.linear(name).unwrap().m(), checkpoint.linear(name).unwrap().k());
                let w = Matrix::uniform(m, k, DType::F32, seed + i as u64).unwrap();
                let scaled: Vec<f32> = w.elements().to_f32().iter().map(|x| x * 0.4).collect();
                checkpoint.set_linear(name, Matrix::from_f32(m, k, &scaled).unwrap().into()).unwrap();
            }
            // Of random weights of 0.02 logits are all but equal.
            let head = checkpoint.graph().head().unwrap().weights;
            let w = Matrix::uniform(43, 32, DType::F32, seed + 99).unwrap();
            checkpoint.set_param(head, crate::weights::HostWeights::Dense(w).into());
            checkpoint
        };
        let [mut student, teacher] = [24, 77].map(of);
        student.prune(Sparsity::TwoFour(VectorLen::new(8).unwrap())).unwrap();
        [student, teacher]
    }

    /// The loss in f64: every text by itself, without padding.
    fn loss(student: &Checkpoint, wanted: &ndarray::Array2<f64>) -> f64 {
        let logits = *student.graph().outputs().last().unwrap();
        let x = twin::values(student, &[logits], &TEXTS).unwrap().remove(0);
        let lengths = vec![1; x.nrows()];
        oracle::exact(x.view(), wanted.view(), &lengths, 1, WEIGHT).0.iter().sum()
    }

    /// Along a direction in every trained parameter the loss changes as the gradient says, as far as f32 goes, whatever
    /// the number of rows at a time.
    fn gradients_are_the_limit_of_differences(device: &Device) {
        let [student, teacher] = models();
        let graph = student.graph();
        let head = graph.head().unwrap().x;
        let logits = *graph.outputs().last().unwrap();
        let wanted = twin::values(&teacher, &[head, logits], &TEXTS).unwrap();
        let mut states = vec![f32::NAN; TEXTS.len() * SEQ * 32];
        for (&row, from) in rows().iter().zip(wanted[0].rows()) {
            states[row as usize * 32..][..32].iter_mut().zip(from).for_each(|(to, &x)| *to = x as f32);
        }
        let states = device.upload(&Matrix::from_f32(TEXTS.len() * SEQ, 32, &states).unwrap()).unwrap();
        let mut all = Vec::new();
        for memory in [0, u64::MAX] {
            let trainable = Arc::new(Trainable::new(device, &student, &graph.trained_params()).unwrap());
            let other = Model::new(device, &teacher).unwrap();
            let of = Arc::new(HeadLoss::new(&trainable, &other, memory).unwrap());
            assert_eq!((of.rows, of.states()), (if memory == 0 { 8 } else { 256 }, head));
            let nodes = 0..graph.head().unwrap().node;
            let shape = (TEXTS.len(), SEQ);
            let pass = TrainingPass::new(&trainable, nodes, shape, &[Target::Given(head)], u64::MAX).unwrap();
            let gradient = pass.gradient(head).unwrap();
            let calls = of.bind(pass.value(head).unwrap(), &states, gradient).unwrap();
            pass.write(&TEXTS).unwrap();
            pass.forward().unwrap();
            let nan = Matrix::from_f32(TEXTS.len() * SEQ, 32, &vec![f32::NAN; TEXTS.len() * SEQ * 32]).unwrap();
            device.write(gradient, &nan).unwrap();
            let alone = calls.run(&rows(), WEIGHT, false).unwrap();
            let value = calls.run(&rows(), WEIGHT, true).unwrap();
            let expected = loss(&student, &wanted[1]);
            assert!(alone == value && (value - expected).abs() < 1e-5 * expected, "{value}, not {expected}");
            assert!(expected > 0.5, "{expected}");
            pass.backward().unwrap();
            let gradients: Vec<Matrix> = trainable.trained().map(|(.., g)| device.read(g).unwrap()).collect();
            assert!(trainable.trained().all(|(param, ..)| param != graph.head().unwrap().weights));
            for ((param, values, _), gradient) in trainable.trained().zip(&gradients) {
                let name = &graph.param(param).name;
                let direction = Matrix::uniform(values.rows(), values.cols(), DType::F32, 7).unwrap();
                let by = 2f32.powi(-10);
                let at = |by| loss(&moved(&student, param, &direction, by), &wanted[1]);
                let difference = (at(by) - at(-by)) / f64::from(2.0 * by);
                let (g, d) = (gradient.elements().to_f32(), direction.elements().to_f32());
                let slope: f64 = g.iter().zip(&d).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let size: f64 = g.iter().zip(&d).map(|(g, d)| f64::from(g * d).powi(2)).sum::<f64>().sqrt();
                let bound = 2e-3 * size + 1e-6;
                assert!(size > 1e-4, "{name} has a gradient of {size}");
                assert!((slope - difference).abs() <= bound, "{name}: {slope}, not {difference} (± {bound:.1e})");
            }
            all.push(gradients.into_iter().map(|g| g.elements().to_f32()).collect::<Vec<_>>().concat());
        }
        let largest = all[0].iter().fold(0.0f32, |all, x| all.max(x.abs()));
        assert!(all[0].iter().zip(&all[1]).all(|(a, b)| (a - b).abs() < 1e-5 * largest));
    }

    #[test]
    fn gradients_are_the_limit_of_differences_on_the_cpu() {
        gradients_are_the_limit_of_differences(&Device::cpu().unwrap());
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn gradients_are_the_limit_of_differences_on_the_gpu() {
        on_a_gpu(gradients_are_the_limit_of_differences);
    }
}
