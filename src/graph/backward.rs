//! A pass whose gradients are wanted: the nodes of a graph forwards, and then in reverse.
//!
//! ```text
//!  Checkpoint ──Trainable::new──► Trainable      parameters on a device, and a gradient for each that is trained
//!                                    │ TrainingPass::new      one for each (batch, sequence)
//!                                    ▼
//!  token ids ──write──► forward() ─► values ─► targets ─► backward() ─► gradients, added to those that are there
//! ```
//! All nodes run in reverse of the graph's order, so that every reader of a value has added to its gradient before the
//! node that makes it runs. A gradient has a buffer from its first writer to its node; what is not upstream of anything
//! that is trained has none.
//!
//! Values stay until the backward pass. Where that takes more memory than is given, the nodes are cut into segments at
//! places where only one value is live ([`Graph::cut_before`]): what crosses a cut stays, the rest of a segment is
//! computed again before its gradients are, in buffers that all segments share (Chen et al. 2016, "Training Deep Nets
//! with Sublinear Memory Cost"). That is one more forward pass of all segments but the last.
//!
//! A language model's logits are no values of a pass: they are compared some tokens at a time, and give the gradient of
//! what its head reads ([`HeadLoss`]).
//!
//! Invariant: a pass that has run once allocates nothing on the device when it runs again, and is two submissions.

mod head;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

pub use self::head::{HeadLoss, HeadPass};
use super::checkpoint::{Checkpoint, HostParam};
use super::forward::{Inputs, not_there};
use super::{BackwardArgs, Graph, Input, Node, NodeArgs, NodeOperand, ParamId, ParamKind, Read, Rows, ValueId};
use crate::engine::{Device, Prepared, Tensor};
use crate::error::{Error, Result};
use crate::matrix::DType;
use crate::ops::Gradient;
use crate::ops::gemm::{Repack, TrainableWeights};
use crate::ops::relative_error::RelativeError;

/// A model's parameters on a device, some of which are trained. All are f32.
#[derive(Debug)]
pub struct Trainable {
    device: Device,
    checkpoint: Checkpoint,
    params: Vec<TrainableParam>,
}

/// A parameter, and its gradient if it is trained.
#[derive(Debug)]
struct TrainableParam {
    value: ParamValue,
    gradient: Option<Tensor>,
}

#[derive(Debug)]
enum ParamValue {
    Weights(TrainableWeights),
    Matrix(Tensor),
}

impl ParamValue {
    /// What an optimiser changes.
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Weights(weights) => weights.values(),
            Self::Matrix(tensor) => tensor,
        }
    }
}

impl Trainable {
    /// Uploads a checkpoint, of f32. `trained` says which parameters get gradients, which are zero at first.
    pub fn new(device: &Device, checkpoint: &Checkpoint, trained: &HashSet<ParamId>) -> Result<Self> {
        let params = checkpoint.params().enumerate().map(|(at, param)| {
            let value = match param {
                HostParam::Weights(w) => ParamValue::Weights(TrainableWeights::new(device, Arc::clone(w))?),
                HostParam::Matrix(matrix) => ParamValue::Matrix(device.upload(matrix)?),
            };
            let (rows, cols) = value.tensor().shape();
            let gradient = trained.contains(&ParamId(at)).then(|| device.zeros(rows, cols, DType::F32)).transpose()?;
            Ok(TrainableParam { value, gradient })
        });
        let params = params.collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), checkpoint: checkpoint.clone(), params })
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it is the parameters of.
    pub fn graph(&self) -> &Arc<Graph> {
        self.checkpoint.graph()
    }

    /// Every parameter that is trained, with its gradient: for weights those that are kept.
    pub fn trained(&self) -> impl Iterator<Item = (ParamId, &Tensor, &Tensor)> {
        self.params
            .iter()
            .enumerate()
            .filter_map(|(at, param)| Some((ParamId(at), param.value.tensor(), param.gradient.as_ref()?)))
    }

    /// The calls that bring trained weights, those that are wanted, into the form that products read: to be run after
    /// their values have changed.
    pub fn repack(&self, wanted: impl Fn(ParamId) -> bool) -> Result<Vec<Prepared>> {
        let is_wanted = |(at, param): &(usize, &TrainableParam)| param.gradient.is_some() && wanted(ParamId(*at));
        let trained = self.params.iter().enumerate().filter(is_wanted);
        let weights = trained.filter_map(|(_, param)| match &param.value {
            ParamValue::Weights(weights) => Some(self.device.prepare(&Repack { weights })),
            ParamValue::Matrix(_) => None,
        });
        weights.collect()
    }

    /// The checkpoint with what the parameters are on the device now.
    pub fn read(&self) -> Result<Checkpoint> {
        let mut checkpoint = self.checkpoint.clone();
        for (at, param) in self.params.iter().enumerate().filter(|(_, param)| param.gradient.is_some()) {
            let new = match &param.value {
                ParamValue::Weights(weights) => weights.read(&self.device)?.into(),
                ParamValue::Matrix(tensor) => self.device.read(tensor)?.into(),
            };
            checkpoint.set_param(ParamId(at), new);
        }
        Ok(checkpoint)
    }
}

impl Graph {
    /// What retraining changes: the weights of linear layers, their biases, and the factors and shifts of norms from
    /// the first linear layer on. Tables of embeddings, and what comes before the first layer, stay.
    pub fn trained_params(&self) -> HashSet<ParamId> {
        let first = self.linears().next().map_or(self.nodes().len(), |layer| layer.node);
        let nodes = self.nodes()[first..].iter();
        let is_trained = |param: &ParamId| {
            let of = self.param(*param);
            of.kind == ParamKind::Weights || of.rows == 1 && of.constant.is_none() && of.convert.is_none()
        };
        nodes.flat_map(|node| node.params()).filter(is_trained).collect()
    }

    /// The values that a model is compared by with another of the same graph: those between the parts of its blocks,
    /// where one value alone is live and more than one node, or the user, reads it; and what a language model's head
    /// reads, in place of its logits.
    pub fn states(&self) -> Vec<ValueId> {
        let head = self.head();
        let end = head.map_or(self.nodes().len(), |head| head.node);
        let first = self.linears().next().map_or(self.nodes().len(), |layer| layer.node);
        let is_state = |at: &usize| {
            let value = self.nodes()[*at].writes;
            let of_head = head.is_some_and(|head| head.x == value);
            let is_read = of_head || self.outputs().contains(&value) || self.readers(value).count() > 1;
            self.value(value).rows == Rows::Tokens && is_read && self.live_at(at + 1) == [value]
        };
        (first..end).filter(is_state).map(|at| self.nodes()[at].writes).collect()
    }
}

/// Where a gradient comes from.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// Its user, who writes [`TrainingPass::gradient`] between the passes.
    Given(ValueId),
    /// `weight` times the mean, over all tokens that are no padding, of the squared distance from a token's state to
    /// what it should be, over the squared length of that.
    States {
        /// The states.
        value: ValueId,
        /// What they should be: of the same shape, on the same device.
        target: &'a Tensor,
        /// What the mean counts.
        weight: f32,
    },
}

impl Target<'_> {
    fn value(&self) -> ValueId {
        match self {
            Self::Given(value) | Self::States { value, .. } => *value,
        }
    }
}

/// A pass with gradients for batches of one shape.
#[derive(Debug)]
pub struct TrainingPass {
    trainable: Arc<Trainable>,
    inputs: Inputs,
    values: HashMap<ValueId, Tensor>,
    given: HashMap<ValueId, Tensor>,
    /// The values of targets of states, and what each token adds to the loss, a row for each of them.
    losses: Option<(Vec<ValueId>, Tensor)>,
    forward: Vec<Prepared>,
    backward: Vec<Prepared>,
    /// The losses alone.
    measure: Vec<Prepared>,
    bytes: u64,
}

impl TrainingPass {
    /// The nodes of a range for `batch` texts of `seq` tokens. Values of nodes before the range that it reads have
    /// tensors to be written ([`TrainingPass::value`]); those of `targets` can be read after the forward pass. In no
    /// more than `memory` bytes, if that can be done by computing values twice.
    pub fn new(
        trainable: &Arc<Trainable>,
        nodes: Range<usize>,
        (batch, seq): (usize, usize),
        targets: &[Target<'_>],
        memory: u64,
    ) -> Result<Self> {
        let (cuts, plan) = Plan::within(trainable, &nodes, (batch, seq), targets, memory)?;
        Self::planned(trainable, nodes, &cuts, (batch, seq), targets, plan)
    }

    /// The bytes that [`TrainingPass::new`] would take.
    pub fn bytes_of(
        trainable: &Trainable,
        nodes: &Range<usize>,
        (batch, seq): (usize, usize),
        targets: &[Target<'_>],
        memory: u64,
    ) -> Result<u64> {
        Plan::within(trainable, nodes, (batch, seq), targets, memory)?.1.bytes(batch, seq)
    }

    fn planned(
        trainable: &Arc<Trainable>,
        nodes: Range<usize>,
        cuts: &[usize],
        (batch, seq): (usize, usize),
        targets: &[Target<'_>],
        plan: Plan,
    ) -> Result<Self> {
        let (graph, device) = (trainable.graph(), trainable.device());
        let bytes = plan.bytes(batch, seq)?;
        let own = &graph.nodes()[nodes.clone()];
        let inputs = Inputs::new(device, own, &[Input::Lengths], (batch, seq))?;
        let buffers: Vec<Tensor> = plan
            .buffers
            .iter()
            .map(|(rows, cols)| device.zeros(rows.count(batch, seq)?, *cols, DType::F32))
            .collect::<Result<_>>()?;
        let values: HashMap<ValueId, Tensor> =
            plan.values.iter().map(|(value, buffer)| (*value, buffers[*buffer].clone())).collect();
        let saved: HashMap<ValueId, &Tensor> =
            plan.saved.iter().map(|(value, buffer)| (*value, &buffers[*buffer])).collect();
        let gradients: HashMap<ValueId, &Tensor> =
            plan.gradients.iter().map(|(value, buffer)| (*value, &buffers[*buffer])).collect();

        let operand = |read: &Read| match read {
            Read::Value(value) => values.get(value).map(NodeOperand::Tensor).ok_or_else(not_there),
            Read::Input(input) => inputs.get(*input).map(NodeOperand::Indices),
            Read::Param(param) => Ok(match &trainable.params[param.0].value {
                ParamValue::Weights(weights) => NodeOperand::Trainable(weights),
                ParamValue::Matrix(tensor) => NodeOperand::Tensor(tensor),
            }),
        };
        let args = |node: &Node| {
            let reads = node.reads.iter().map(operand).collect::<Result<_>>()?;
            let y = values.get(&node.writes).ok_or_else(not_there)?;
            Ok::<_, Error>(NodeArgs { device, batch, seq, reads, y })
        };
        let forward_of = |range: Range<usize>| {
            let calls = graph.nodes()[range].iter().map(|node| {
                let saved = saved.get(&node.writes).copied();
                node.op.prepare_saving(&args(node)?, saved)
            });
            Ok::<_, Error>(calls.collect::<Result<Vec<_>>>()?.concat())
        };
        let forward = forward_of(nodes.clone())?;

        let states: Vec<ValueId> =
            targets.iter().filter(|target| matches!(target, Target::States { .. })).map(Target::value).collect();
        let losses = match states.len() {
            0 => None,
            count => Some((states, device.zeros(count, batch * seq, DType::F32)?)),
        };
        let loss_of = |value: ValueId, target, weight, dx| {
            let (states, loss) = losses.as_ref().ok_or_else(not_there)?;
            device.prepare(&RelativeError {
                x: values.get(&value).ok_or_else(not_there)?,
                wanted: target,
                lengths: inputs.get(Input::Lengths)?,
                batch,
                seq,
                weight,
                row: states.iter().position(|of| *of == value).ok_or_else(not_there)?,
                loss,
                dx,
            })
        };
        let mut measure = Vec::new();
        let mut backward = Vec::new();
        // Whose gradient has been written to.
        let mut written: HashSet<ValueId> =
            targets.iter().filter(|target| matches!(target, Target::Given(_))).map(Target::value).collect();
        let mut ends: Vec<usize> = cuts.iter().copied().chain([nodes.end]).collect();
        while let Some(end) = ends.pop() {
            let start = ends.last().copied().unwrap_or(nodes.start);
            if end != nodes.end {
                backward.extend(forward_of(start..end)?);
            }
            for node in graph.nodes()[start..end].iter().rev() {
                for target in targets.iter().filter(|target| target.value() == node.writes) {
                    let &Target::States { value, target, weight } = target else { continue };
                    let dx = gradients.get(&value).map(|to| Gradient { to, add: !written.insert(value) });
                    measure.push(loss_of(value, target, weight, None)?);
                    backward.push(loss_of(value, target, weight, dx)?);
                }
                let Some(dy) = gradients.get(&node.writes).filter(|_| written.contains(&node.writes)) else { continue };
                let gradients = node.reads.iter().map(|read| match read {
                    Read::Value(value) => gradients.get(value).map(|to| Gradient { to, add: !written.insert(*value) }),
                    Read::Param(param) => {
                        trainable.params[param.0].gradient.as_ref().map(|to| Gradient { to, add: true })
                    }
                    Read::Input(_) => None,
                });
                let gradients = gradients.collect();
                let saved = saved.get(&node.writes).copied();
                backward.extend(node.op.backward(&BackwardArgs { forward: args(node)?, saved, dy, gradients })?);
            }
        }
        let given = targets.iter().filter(|target| matches!(target, Target::Given(_)));
        let given = given.filter_map(|target| Some((target.value(), (*gradients.get(&target.value())?).clone())));
        let given = given.collect();
        Ok(Self { trainable: Arc::clone(trainable), inputs, values, given, losses, forward, backward, measure, bytes })
    }

    /// Gives the next passes their texts, as [`Forward::write`](super::Forward::write).
    pub fn write<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<()> {
        self.inputs.write(&self.trainable.device, self.trainable.graph(), texts)
    }

    /// Computes every value for the texts written last.
    pub fn forward(&self) -> Result<()> {
        self.trainable.device.submit(&self.forward)
    }

    /// Adds the gradients of the targets to those of the parameters. Once for each [`TrainingPass::forward`], whose
    /// values it may overwrite.
    pub fn backward(&self) -> Result<()> {
        self.trainable.device.submit(&self.backward)
    }

    /// A value of a target, after [`TrainingPass::forward`]; one that comes from before the nodes, to be written.
    pub fn value(&self, value: ValueId) -> Option<&Tensor> {
        self.values.get(&value)
    }

    /// The gradient of a [`Target::Given`], to be written.
    pub fn gradient(&self, value: ValueId) -> Option<&Tensor> {
        self.given.get(&value)
    }

    /// Computes the losses of the states alone, after [`TrainingPass::forward`].
    pub fn measure(&self) -> Result<()> {
        self.trainable.device.submit(&self.measure)
    }

    /// The loss of each target of states in the last [`TrainingPass::backward`] or [`TrainingPass::measure`].
    pub fn losses(&self) -> Result<Vec<(ValueId, f64)>> {
        let Some((states, losses)) = &self.losses else { return Ok(Vec::new()) };
        let losses = self.trainable.device.read(losses)?;
        let of_row = |row: &[f32]| row.iter().map(|&x| f64::from(x)).sum();
        let sums = losses.elements().to_f32().chunks_exact(losses.cols()).map(of_row).collect::<Vec<f64>>();
        Ok(states.iter().copied().zip(sums).collect())
    }

    /// Bytes of its values and gradients on the device.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// So many segments' inner ends, as evenly spread as they can be.
fn even(cuts: &[usize], segments: usize) -> Vec<usize> {
    (1..segments).map(|i| cuts[(i * (cuts.len() + 1) / segments).max(1) - 1]).collect()
}

/// Which buffers there are, and what each holds.
#[derive(Default)]
struct Plan {
    buffers: Vec<(Rows, usize)>,
    values: Vec<(ValueId, usize)>,
    saved: Vec<(ValueId, usize)>,
    gradients: Vec<(ValueId, usize)>,
}

impl Plan {
    /// The plan with the fewest segments that takes no more than `memory`, or else the most that there are, and where
    /// these are cut.
    fn within(
        trainable: &Trainable,
        nodes: &Range<usize>,
        (batch, seq): (usize, usize),
        targets: &[Target<'_>],
        memory: u64,
    ) -> Result<(Vec<usize>, Self)> {
        let graph = trainable.graph();
        graph.tokens_of(batch, seq)?;
        let cuts: Vec<usize> = (nodes.start + 1..nodes.end).filter(|at| graph.live_at(*at).len() == 1).collect();
        let mut segments = 1;
        loop {
            let ends = even(&cuts, segments);
            let plan = Self::new(trainable, nodes, &ends, targets)?;
            if plan.bytes(batch, seq)? <= memory || segments > cuts.len() {
                return Ok((ends, plan));
            }
            segments += 1;
        }
    }

    fn new(trainable: &Trainable, nodes: &Range<usize>, cuts: &[usize], targets: &[Target<'_>]) -> Result<Self> {
        let graph = trainable.graph();
        let mut plan = Self::default();
        let shape = |value: ValueId| (graph.value(value).rows, graph.value(value).cols);
        let own = &graph.nodes()[nodes.clone()];
        // What is read after its segment, and so stays.
        let mut kept: HashSet<ValueId> = targets.iter().map(Target::value).collect();
        let ends: Vec<usize> = cuts.iter().copied().chain([nodes.end]).collect();
        let segment = |at: usize| ends.iter().position(|&end| at < end).unwrap_or_default();
        for (at, node) in nodes.clone().zip(own) {
            for value in node.values() {
                if value.0 < nodes.start || segment(value.0) != segment(at) {
                    kept.insert(value);
                }
            }
        }
        for value in own.iter().flat_map(Node::values).filter(|value| value.0 < nodes.start) {
            if !plan.values.iter().any(|(known, _)| *known == value) {
                plan.values.push((value, plan.buffers.len()));
                plan.buffers.push(shape(value));
            }
        }
        // Others share buffers with those of other segments.
        let mut shared: Vec<usize> = Vec::new();
        let mut start = nodes.start;
        for end in ends {
            let mut free = shared.clone();
            for node in &graph.nodes()[start..end] {
                let value = node.writes;
                let mut place = |is_kept: bool, plan: &mut Self| {
                    let found = free.iter().position(|&buffer| !is_kept && plan.buffers[buffer] == shape(value));
                    match found {
                        Some(at) => free.swap_remove(at),
                        None => {
                            plan.buffers.push(shape(value));
                            if !is_kept {
                                shared.push(plan.buffers.len() - 1);
                            }
                            plan.buffers.len() - 1
                        }
                    }
                };
                let buffer = place(kept.contains(&value) || graph.outputs().contains(&value), &mut plan);
                plan.values.push((value, buffer));
                if node.op.saves() {
                    let buffer = place(false, &mut plan);
                    plan.saved.push((value, buffer));
                }
            }
            start = end;
        }
        plan.add_gradients(trainable, nodes, targets);
        Ok(plan)
    }

    /// A buffer for the gradient of each value that something trained is upstream of, from the first that writes it in
    /// the backward pass to its node.
    fn add_gradients(&mut self, trainable: &Trainable, nodes: &Range<usize>, targets: &[Target<'_>]) {
        let graph = trainable.graph();
        let is_trained = |param: ParamId| trainable.params[param.0].gradient.is_some();
        let mut wanted: HashSet<ValueId> = HashSet::new();
        for node in &graph.nodes()[nodes.clone()] {
            if node.params().any(is_trained) || node.values().any(|value| wanted.contains(&value)) {
                wanted.insert(node.writes);
            }
        }
        let mut free: Vec<usize> = Vec::new();
        let mut of: HashMap<ValueId, usize> = HashMap::new();
        let buffers = &mut self.buffers;
        let mut place = |value: ValueId, of: &mut HashMap<ValueId, usize>, free: &mut Vec<usize>| {
            if wanted.contains(&value) && !of.contains_key(&value) {
                let shape = (graph.value(value).rows, graph.value(value).cols);
                let found = free.iter().position(|&buffer| buffers[buffer] == shape);
                let buffer = found.map(|at| free.swap_remove(at)).unwrap_or_else(|| {
                    buffers.push(shape);
                    buffers.len() - 1
                });
                of.insert(value, buffer);
            }
        };
        // Written between the passes, and so of their own.
        let given: Vec<ValueId> =
            targets.iter().filter(|target| matches!(target, Target::Given(_))).map(Target::value).collect();
        for &value in &given {
            place(value, &mut of, &mut Vec::new());
        }
        for node in graph.nodes()[nodes.clone()].iter().rev() {
            if targets.iter().any(|target| target.value() == node.writes) {
                place(node.writes, &mut of, &mut free);
            }
            for value in node.values() {
                place(value, &mut of, &mut free);
            }
            if let Some(&buffer) = of.get(&node.writes).filter(|_| !given.contains(&node.writes)) {
                free.push(buffer);
            }
        }
        self.gradients = of.into_iter().collect();
    }

    fn bytes(&self, batch: usize, seq: usize) -> Result<u64> {
        self.buffers.iter().try_fold(0, |all, (rows, cols)| Ok(all + 4 * (rows.count(batch, seq)? * cols) as u64))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use ndarray::Array2;

    use super::*;
    use crate::graph::{Sparsity, twin};
    use crate::mask::VectorLen;
    use crate::matrix::{Elements, Matrix};
    use crate::models::bert::{BertConfig, Sizes};
    use crate::problem::Activation;
    use crate::weights::HostWeights;

    const TEXTS: [&[u32]; 3] = [&[1, 2, 3, 4, 5], &[6, 7], &[8, 9, 10]];

    /// A model with embeddings, whose linear layers have several forms.
    fn model(vector: Option<usize>) -> Checkpoint {
        let sizes = Sizes { vocabulary: 11, hidden: 32, layers: 2, heads: 4, intermediate: 64, positions: 8, types: 1 };
        let mut graph = BertConfig::new(sizes, 1e-6, Activation::Gelu).unwrap().graph().unwrap();
        let last = *graph.outputs().last().unwrap();
        let pooled = graph.mean_pooling("pooled", last, true).unwrap();
        graph.add_output(pooled);
        let mut checkpoint = Checkpoint::random(graph, DType::F32, 24).unwrap();
        // Weights of 0.02 make attention and activations all but linear.
        let names: Vec<String> = checkpoint.linears().map(|(name, _)| name).collect();
        for (i, name) in names.iter().enumerate() {
            let (m, k) = (checkpoint.linear(name).unwrap().m(), checkpoint.linear(name).unwrap().k());
            let w = Matrix::uniform(m, k, DType::F32, i as u64).unwrap();
            let scaled: Vec<f32> = w.elements().to_f32().iter().map(|x| x * 0.4).collect();
            checkpoint.set_linear(name, Matrix::from_f32(m, k, &scaled).unwrap().into()).unwrap();
        }
        match vector {
            Some(0) => checkpoint.mask(VectorLen::ONE).unwrap(),
            Some(v) => checkpoint.prune(Sparsity::TwoFour(VectorLen::new(v).unwrap())).unwrap(),
            None => {}
        }
        checkpoint
    }

    /// What the states should be, and the embeddings' gradient.
    struct Wanted {
        states: Vec<(ValueId, Matrix)>,
        embedding: (ValueId, Matrix),
        seq: usize,
    }

    impl Wanted {
        fn new(graph: &Graph, seq: usize) -> Self {
            let tokens = TEXTS.len() * seq;
            let states = graph.states().into_iter().enumerate();
            let states = states.map(|(i, value)| {
                (value, Matrix::uniform(tokens, graph.value(value).cols, DType::F32, 100 + i as u64).unwrap())
            });
            let last = *graph.outputs().last().unwrap();
            let embedding = (last, Matrix::uniform(TEXTS.len(), graph.value(last).cols, DType::F32, 99).unwrap());
            Self { states: states.collect(), embedding, seq }
        }

        /// The loss in f64: every text by itself, without padding.
        fn loss(&self, checkpoint: &Checkpoint) -> f64 {
            let of: Vec<ValueId> = self.states.iter().map(|(value, _)| *value).chain([self.embedding.0]).collect();
            let values = twin::values(checkpoint, &of, &TEXTS).unwrap();
            let tokens: usize = TEXTS.iter().map(|text| text.len()).sum();
            let mut loss = 0.0;
            for ((_, wanted), values) in self.states.iter().zip(&values) {
                let places = (0..TEXTS.len()).flat_map(|text| (0..TEXTS[text].len()).map(move |token| (text, token)));
                for ((text, token), x) in places.zip(values.rows()) {
                    let wanted =
                        Array2::from_shape_fn((1, x.len()), |(_, c)| f64::from(wanted.get(text * self.seq + token, c)));
                    let off = &x - &wanted.row(0);
                    loss += 0.5 * off.dot(&off) / wanted.row(0).dot(&wanted.row(0)) / tokens as f64;
                }
            }
            let embeddings = values.last().unwrap();
            loss + embeddings.indexed_iter().map(|((r, c), y)| y * f64::from(self.embedding.1.get(r, c))).sum::<f64>()
        }
    }

    /// The gradients of a model, and its pass.
    fn gradients(device: &Device, checkpoint: &Checkpoint, memory: u64) -> (Arc<Trainable>, Vec<Matrix>, u64) {
        let graph = checkpoint.graph();
        let wanted = Wanted::new(graph, 6);
        let trainable = Arc::new(Trainable::new(device, checkpoint, &graph.trained_params()).unwrap());
        let tensors: Vec<(ValueId, Tensor)> =
            wanted.states.iter().map(|(value, m)| (*value, device.upload(m).unwrap())).collect();
        let targets: Vec<Target<'_>> = tensors
            .iter()
            .map(|(value, target)| Target::States { value: *value, target, weight: 0.5 })
            .chain([Target::Given(wanted.embedding.0)])
            .collect();
        let pass = TrainingPass::new(&trainable, 0..graph.nodes().len(), (3, 6), &targets, memory).unwrap();
        pass.write(&TEXTS).unwrap();
        pass.forward().unwrap();
        device.write(pass.gradient(wanted.embedding.0).unwrap(), &wanted.embedding.1).unwrap();
        pass.backward().unwrap();
        let gradients = trainable.trained().map(|(_, _, gradient)| device.read(gradient).unwrap()).collect();
        (trainable, gradients, pass.bytes())
    }

    /// A checkpoint with one parameter moved along a direction of its kept elements.
    pub(super) fn moved(checkpoint: &Checkpoint, param: ParamId, direction: &Matrix, by: f32) -> Checkpoint {
        let add = |m: &Matrix| {
            let (from, along) = (m.elements().to_f32(), direction.elements().to_f32());
            let sum: Vec<f32> = from.iter().zip(along).map(|(x, d)| x + by * d).collect();
            Matrix::new(m.rows(), m.cols(), Elements::F32(sum)).unwrap()
        };
        let mut checkpoint = checkpoint.clone();
        let new = match checkpoint.param(param) {
            HostParam::Matrix(m) => HostParam::from(add(m)),
            HostParam::Weights(w) => HostParam::from(match &**w {
                HostWeights::Dense(w) => HostWeights::Dense(add(w)),
                HostWeights::Masked(w, mask) => HostWeights::Masked(add(w), mask.clone()),
                HostWeights::Masked24(w, mask) => HostWeights::Masked24(add(w), mask.clone()),
                HostWeights::Sparse24(w) => {
                    let values = Matrix::new(w.m(), w.k_physical(), w.values().clone()).unwrap();
                    let values = add(&values).elements().clone();
                    let meta = w.meta().to_vec();
                    HostWeights::Sparse24(crate::Sparse24::from_parts(w.m(), w.k(), w.vector(), values, meta).unwrap())
                }
            }),
        };
        checkpoint.set_param(param, new);
        checkpoint
    }

    /// Along a direction in every parameter the loss changes as the gradient says, as far as f32 goes.
    fn gradients_are_the_limit_of_differences(device: &Device) {
        for vector in [None, Some(0), Some(1), Some(8), Some(32)] {
            let checkpoint = model(vector);
            let wanted = Wanted::new(checkpoint.graph(), 6);
            let (trainable, gradients, _) = gradients(device, &checkpoint, u64::MAX);
            assert!(gradients.len() > 20);
            for ((param, value, _), gradient) in trainable.trained().zip(&gradients) {
                let name = &checkpoint.graph().param(param).name;
                let direction = Matrix::uniform(value.rows(), value.cols(), DType::F32, 7).unwrap();
                // A power of two, so that the steps are exact in f32.
                let by = 2f32.powi(-10);
                let loss = |by| wanted.loss(&moved(&checkpoint, param, &direction, by));
                let difference = (loss(by) - loss(-by)) / f64::from(2.0 * by);
                let (g, d) = (gradient.elements().to_f32(), direction.elements().to_f32());
                let slope: f64 = g.iter().zip(&d).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let size: f64 = g.iter().zip(&d).map(|(g, d)| f64::from(g * d).powi(2)).sum::<f64>().sqrt();
                // What the third derivative leaves at this step, and the roundings of f32.
                let bound = 2e-3 * size + 1e-6;
                assert!(
                    (slope - difference).abs() <= bound,
                    "{vector:?}, {name}: {slope}, not {difference} (± {bound:.1e})"
                );
            }
        }
    }

    #[test]
    fn gradients_are_the_limit_of_differences_on_the_cpu() {
        gradients_are_the_limit_of_differences(&Device::cpu().unwrap());
    }

    /// Tests on a GPU, which the tests beside the library choose in the same way.
    pub(super) fn on_a_gpu(test: impl Fn(&Device)) {
        let named = std::env::var("SPARSE24_TEST_DEVICE").ok();
        let name = named.or_else(|| Device::adapters().into_iter().next().map(|first| first.name));
        match Device::gpu(name.as_deref().unwrap_or("any adapter")) {
            Ok(device) => test(&device),
            Err(e) => assert!(std::env::var_os("SPARSE24_REQUIRE_GPU").is_none(), "a GPU is required: {e}"),
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn gradients_are_the_limit_of_differences_on_the_gpu() {
        on_a_gpu(gradients_are_the_limit_of_differences);
    }

    /// Values that are computed again are the same, and take less memory.
    #[test]
    fn a_pass_in_little_memory_has_the_same_gradients() {
        let device = Device::cpu().unwrap();
        let checkpoint = model(Some(8));
        let (_, all, bytes) = gradients(&device, &checkpoint, u64::MAX);
        let (_, again, fewer) = gradients(&device, &checkpoint, 0);
        assert!(all == again && 5 * fewer < 4 * bytes, "{fewer} of {bytes} bytes");
    }

    /// States are where one value alone is live, the last one too: whoever pools it, and if nobody does.
    #[test]
    fn the_last_state_is_one_whoever_reads_it() {
        let sizes = Sizes { vocabulary: 11, hidden: 32, layers: 2, heads: 4, intermediate: 64, positions: 8, types: 1 };
        let graph = BertConfig::new(sizes, 1e-6, Activation::Gelu).unwrap().graph().unwrap();
        let last = *graph.outputs().last().unwrap();
        let states = graph.states();
        assert_eq!((states.len(), states.last()), (4, Some(&last)));
        assert_eq!(model(None).graph().states(), states);
    }

    /// What is pruned or masked has no number that moves, whatever the gradients are.
    #[test]
    fn what_is_pruned_stays_so() {
        let device = Device::cpu().unwrap();
        for vector in [0, 1, 32] {
            let checkpoint = model(Some(vector));
            let (trainable, ..) = gradients(&device, &checkpoint, u64::MAX);
            for (_, value, gradient) in trainable.trained() {
                let new = moved_by(&device.read(value).unwrap(), &device.read(gradient).unwrap());
                device.write(value, &new).unwrap();
            }
            let after = trainable.read().unwrap();
            for ((name, before), (_, after)) in checkpoint.linears().zip(after.linears()) {
                assert_eq!(before.op(), after.op());
                // Products apply the mask, and would not show a number that moved beneath it.
                if let HostWeights::Masked(values, mask) = after {
                    let beneath = |at: usize| !mask.get(at / values.cols(), at % values.cols());
                    let numbers = values.elements().to_f32();
                    assert!(
                        numbers.iter().enumerate().all(|(at, x)| !beneath(at) || *x == 0.0),
                        "{name}: the mask leaks"
                    );
                }
                let (before, after) = (before.to_dense().unwrap(), after.to_dense().unwrap());
                let pairs = before.elements().to_f32().into_iter().zip(after.elements().to_f32());
                let (mut kept, mut changed) = (0, 0);
                for (before, after) in pairs {
                    assert!(before != 0.0 || after == 0.0, "{name}: a pruned weight became {after}");
                    kept += usize::from(before != 0.0);
                    changed += usize::from(before != after);
                }
                // With one pattern for all its rows the layer after reads half of a layer's outputs, and nothing moves
                // the rest.
                assert!(5 * changed > 2 * kept, "{name}: {changed} of {kept} changed");
            }
        }
    }

    fn moved_by(m: &Matrix, gradient: &Matrix) -> Matrix {
        let sum = m.elements().to_f32().iter().zip(gradient.elements().to_f32()).map(|(x, g)| x - 0.1 * g).collect();
        Matrix::new(m.rows(), m.cols(), Elements::F32(sum)).unwrap()
    }
}
