//! A pass over a graph, or over a part of it, for batches of one shape: buffers, inputs and calls.
//!
//! Buffers are planned once, for all nodes together ([`Graph::buffers`]). Invariant: a [`Forward`] that has run once
//! allocates nothing on the device when it runs again, and is one submission.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::checkpoint::{Checkpoint, HostParam};
use super::{Graph, Input, Node, NodeArgs, NodeCache, NodeOperand, ParamId, ParamKind, Read, Value, ValueId};
use crate::engine::{Device, Indices, Prepared, Tensor};
use crate::error::{Error, Result};
use crate::linear::Linear;
use crate::matrix::{DType, Matrix};
use crate::problem::Epilogue;
use crate::weights::HostWeights;

/// What of a model is on the device whatever the batch. Cloning shares it.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) device: Device,
    pub(super) graph: Arc<Graph>,
    pub(super) dtype: DType,
    params: Vec<DeviceParam>,
}

#[derive(Clone, Debug)]
enum DeviceParam {
    Linear(Linear),
    Tensor(Tensor),
    /// Of nodes that do not run again.
    Released,
}

impl Parts {
    /// Uploads a checkpoint's matrices; weights follow when the first call that reads them is prepared, in the form
    /// that its number of tokens wants.
    pub(super) fn new(device: &Device, checkpoint: &Checkpoint) -> Result<Self> {
        let graph = Arc::clone(checkpoint.graph());
        let mut epilogues = vec![None; graph.params().len()];
        for linear in graph.weights_of_kind(ParamKind::is_weights) {
            epilogues[linear.weights.0] = Some(graph.nodes()[linear.node].op.epilogue());
        }
        let uploaded = checkpoint.params().zip(epilogues).map(|(param, epilogue)| match (param, epilogue) {
            (HostParam::Weights(w), epilogue) => {
                Ok(DeviceParam::Linear(device.linear_of(Arc::clone(w), epilogue.unwrap_or(Epilogue::NONE))))
            }
            (HostParam::Matrix(matrix), _) => Ok(DeviceParam::Tensor(device.upload(matrix)?)),
        });
        let params = uploaded.collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), graph, dtype: checkpoint.dtype(), params })
    }

    /// The same on the same memory, with other weights in one place.
    pub(super) fn with_linear(&self, weights: ParamId, w: Arc<HostWeights>) -> Self {
        let mut changed = self.clone();
        if let DeviceParam::Linear(old) = &self.params[weights.0] {
            changed.params[weights.0] = DeviceParam::Linear(self.device.linear_of(w, old.epilogue()));
        }
        changed
    }

    /// The same without what only nodes before this one read: passes from there on are all that it can make.
    pub(super) fn rest_from(&self, node: usize) -> Self {
        let mut rest = self.clone();
        for (at, param) in rest.params.iter_mut().enumerate() {
            if !self.graph.nodes()[node..].iter().any(|node| node.params().any(|of| of.0 == at)) {
                *param = DeviceParam::Released;
            }
        }
        rest
    }

    /// The same on the same memory, whose 2:4 layers take no dense weights in their place.
    pub(super) fn without_dense_fallback(&self) -> Self {
        let mut changed = self.clone();
        for param in &mut changed.params {
            if let DeviceParam::Linear(linear) = param {
                *linear = linear.no_dense_fallback();
            }
        }
        changed
    }

    /// The linear layers in the order in which they run.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.graph.linears().filter_map(|linear| match &self.params[linear.weights.0] {
            DeviceParam::Linear(linear) => Some(linear),
            DeviceParam::Tensor(_) | DeviceParam::Released => None,
        })
    }
}

/// What nodes read of the texts, for batches of one shape.
#[derive(Debug)]
pub(super) struct Inputs {
    batch: usize,
    seq: usize,
    inputs: Vec<(Input, Indices)>,
    /// The numbers of each input, of the batch that is being written.
    staging: Mutex<Vec<Vec<u32>>>,
}

impl Inputs {
    /// Those that some nodes read, and `more`, for `batch` texts of `seq` tokens, all of these real until other texts
    /// are written.
    pub(super) fn new(device: &Device, nodes: &[Node], more: &[Input], (batch, seq): (usize, usize)) -> Result<Self> {
        let mut inputs: Vec<(Input, Indices)> = Vec::new();
        let read = nodes.iter().flat_map(|node| &node.reads).filter_map(|read| match read {
            Read::Input(input) => Some(*input),
            Read::Value(_) | Read::Param(_) => None,
        });
        for input in read.chain(more.iter().copied()) {
            if !inputs.iter().any(|(known, _)| *known == input) {
                inputs.push((input, device.indices(input.rows().count(batch, seq)?)?));
            }
        }
        let staging = Mutex::new(inputs.iter().map(|(_, indices)| vec![0; indices.len()]).collect());
        let inputs = Self { batch, seq, inputs, staging };
        inputs.write_some(device, &vec![vec![0; seq]; batch], &vec![0; batch], |_| true)?;
        Ok(inputs)
    }

    /// The numbers of an input on the device.
    pub(super) fn get(&self, input: Input) -> Result<&Indices> {
        let found = self.inputs.iter().find(|(of, _)| *of == input);
        found.map(|(_, indices)| indices).ok_or_else(not_there)
    }

    /// Those of other texts: as many as the batch has, each of 1 to `seq` ids below the vocabulary's size.
    pub(super) fn write<T: AsRef<[u32]>>(&self, device: &Device, graph: &Graph, texts: &[T]) -> Result<()> {
        if texts.len() != self.batch {
            return Err(Error::invalid(format!("{} texts for a batch of {}", texts.len(), self.batch)));
        }
        for (i, text) in texts.iter().map(AsRef::as_ref).enumerate() {
            graph.check_ids(text).map_err(|e| e.of_text(i))?;
            if text.len() > self.seq {
                let reason = format!("the text has {} tokens; the batch has room for {}", text.len(), self.seq);
                return Err(Error::invalid(reason).of_text(i));
            }
        }
        self.write_some(device, texts, &vec![0; self.batch], |input| !input.is_fixed())
    }

    /// Those of the next tokens of texts of which so many have been before; there may be none of a text.
    pub(super) fn write_next<T: AsRef<[u32]>>(&self, device: &Device, texts: &[T], past: &[u32]) -> Result<()> {
        self.write_some(device, texts, past, |input| !matches!(input, Input::Constant(_)))
    }

    /// Some of the inputs, for texts that fit.
    fn write_some<T: AsRef<[u32]>>(
        &self,
        device: &Device,
        texts: &[T],
        past: &[u32],
        which: impl Fn(Input) -> bool,
    ) -> Result<()> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        for ((input, indices), numbers) in self.inputs.iter().zip(&mut *staging).filter(|((input, _), _)| which(*input))
        {
            let each = numbers.len() / self.batch;
            for ((text, &past), row) in texts.iter().zip(past).zip(numbers.chunks_exact_mut(each)) {
                input.write(text.as_ref(), past, row);
            }
            device.write_indices(indices, numbers)?;
        }
        Ok(())
    }
}

/// What passes of a [`Decoder`](super::Decoder) have of earlier tokens.
#[derive(Debug)]
pub(super) struct Caches<'a> {
    /// For each node, what it keeps.
    pub(super) tensors: &'a [Option<Tensor>],
    /// Earlier tokens of each sequence.
    pub(super) past: &'a Indices,
    /// Whether there are none.
    pub(super) are_empty: bool,
}

impl Caches<'_> {
    fn of(&self, node: usize) -> Option<NodeCache<'_>> {
        let tensor = self.tensors.get(node)?.as_ref()?;
        Some(NodeCache { tensor, past: self.past, is_empty: self.are_empty })
    }
}

/// A mistake of this crate: a pass is made of nodes whose operands it has.
pub(super) fn not_there() -> Error {
    Error::invalid("a node reads what is not on the device")
}

/// A pass for batches of one shape.
#[derive(Debug)]
pub struct Forward {
    parts: Arc<Parts>,
    inputs: Inputs,
    buffers: Vec<Tensor>,
    /// Which buffer each value has, in the order of the nodes: of values that share one the later replaces the earlier.
    of: Vec<(ValueId, usize)>,
    calls: Vec<Prepared>,
    /// Which node each call is of.
    call_nodes: Vec<usize>,
    /// Held by [`Forward::run_on`] from the writing of inputs to the reading of results.
    turn: Mutex<()>,
}

impl Forward {
    /// The nodes of a range for `batch` texts of `seq` tokens, all of these real until other texts are written. Values
    /// of nodes before the range that it reads have buffers to be written; those in `taps` can be read after a run, and
    /// so can outputs.
    pub(super) fn new(
        parts: Arc<Parts>,
        nodes: Range<usize>,
        taps: &[ValueId],
        batch: usize,
        seq: usize,
    ) -> Result<Self> {
        Self::cached(parts, nodes, taps, (batch, seq), None)
    }

    /// The same, where sequences may have earlier tokens, in these caches.
    pub(super) fn cached(
        parts: Arc<Parts>,
        nodes: Range<usize>,
        taps: &[ValueId],
        (batch, seq): (usize, usize),
        caches: Option<&Caches<'_>>,
    ) -> Result<Self> {
        let Parts { device, graph, dtype, .. } = &*parts;
        graph.tokens_of(batch, seq)?;
        if nodes.is_empty() {
            return Err(Error::invalid("a pass needs a node"));
        }
        let inputs = Inputs::new(device, &graph.nodes()[nodes.clone()], &[], (batch, seq))?;
        let (shapes, of) = graph.buffers(nodes.clone(), taps);
        let tensor = |id: ValueId| {
            let Value { rows, cols, precision, .. } = graph.value(id);
            device.zeros(rows.count(batch, seq)?, *cols, precision.of(*dtype))
        };
        let buffers: Vec<Tensor> = shapes.into_iter().map(tensor).collect::<Result<_>>()?;
        let place = |value: ValueId| of.iter().rev().find(|(of, _)| *of == value).map(|(_, buffer)| &buffers[*buffer]);
        let call = |(at, node): (usize, &Node)| {
            let operand = |read: &Read| match read {
                Read::Value(value) => place(*value).map(NodeOperand::Tensor).ok_or_else(not_there),
                Read::Input(input) => inputs.get(*input).map(NodeOperand::Indices),
                Read::Param(param) => match &parts.params[param.0] {
                    DeviceParam::Linear(linear) => Ok(NodeOperand::Linear(linear)),
                    DeviceParam::Tensor(tensor) => Ok(NodeOperand::Tensor(tensor)),
                    DeviceParam::Released => Err(not_there()),
                },
            };
            let reads = node.reads.iter().map(operand).collect::<Result<_>>()?;
            let y = place(node.writes).ok_or_else(not_there)?;
            let args = NodeArgs { device, batch, seq, reads, y };
            match caches {
                None => Ok(vec![node.op.prepare(&args)?]),
                Some(caches) => node.op.prepare_cached(&args, caches.of(at)),
            }
        };
        let (mut calls, mut call_nodes) = (Vec::new(), Vec::new());
        for (at, node) in graph.nodes().iter().enumerate().take(nodes.end).skip(nodes.start) {
            calls.extend(call((at, node))?);
            call_nodes.resize(calls.len(), at);
        }
        Ok(Self { parts: Arc::clone(&parts), inputs, buffers, of, calls, call_nodes, turn: Mutex::default() })
    }

    /// Texts of a batch.
    pub fn batch(&self) -> usize {
        self.inputs.batch
    }

    /// Tokens of each, padding included.
    pub fn seq(&self) -> usize {
        self.inputs.seq
    }

    /// The graph that it runs.
    pub fn graph(&self) -> &Graph {
        &self.parts.graph
    }

    /// Gives the next runs their texts, as many as the batch has, each of 1 to [`Forward::seq`] ids below the
    /// vocabulary's size. [`Error::text`](crate::Error::text) says of which this is not so. Threads that share a pass
    /// take turns by themselves, or call [`Forward::run_on`].
    pub fn write<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<()> {
        self.inputs.write(&self.parts.device, &self.parts.graph, texts)
    }

    /// Computes every value for the texts written last, in one submission: on a GPU returns without waiting.
    pub fn run(&self) -> Result<()> {
        self.parts.device.submit(&self.calls)
    }

    /// Writes texts, runs, and reads the [output](Forward::output) back, which on a GPU is a second submission. No
    /// other thread's call of this function comes between.
    pub fn run_on<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Matrix> {
        pollster::block_on(self.run_on_async(texts))
    }

    /// [`Forward::run_on`] where nothing may block. In a browser an error if another call of it is not done.
    #[allow(clippy::await_holding_lock, reason = "outside a browser it never waits there, and in one `turn` does not")]
    pub async fn run_on_async<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Matrix> {
        let _turn = self.turn()?;
        self.write(texts)?;
        self.run()?;
        self.parts.device.read_async(self.output()).await
    }

    /// What keeps other calls of [`Forward::run_on`] out. A browser's only thread cannot wait for itself.
    fn turn(&self) -> Result<MutexGuard<'_, ()>> {
        if !cfg!(target_family = "wasm") {
            return Ok(self.turn.lock().unwrap_or_else(PoisonError::into_inner));
        }
        match self.turn.try_lock() {
            Ok(turn) => Ok(turn),
            Err(TryLockError::Poisoned(turn)) => Ok(turn.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::invalid("the pass is at other texts still")),
        }
    }

    /// The calls of a run in their order, each with its node: to be timed, or recorded into an embedder's encoder.
    pub fn calls(&self) -> impl Iterator<Item = (&Node, &Prepared)> + Clone {
        self.call_nodes.iter().map(|&at| &self.parts.graph.nodes()[at]).zip(&self.calls)
    }

    /// What the model is for: the value of its last output, in a part of a graph that of its last node.
    pub fn output(&self) -> &Tensor {
        let last = self.parts.graph.outputs().last().and_then(|value| self.tap(*value));
        // A pass has at least one node, and so a buffer: `new` sees to it.
        last.unwrap_or_else(|| &self.buffers[self.of[self.of.len() - 1].1])
    }

    /// A value, of a node of this pass: what it is after a run, if it is an output of the graph or was asked to be kept
    /// ([`Model::tapped`](super::Model::tapped)); else another value may have its place by then, and there is none.
    pub fn tap(&self, value: ValueId) -> Option<&Tensor> {
        let (at, (_, buffer)) = self.of.iter().enumerate().rev().find(|(_, (of, _))| *of == value)?;
        let replaced = self.of[at + 1..].iter().any(|(_, later)| later == buffer);
        (!replaced).then(|| &self.buffers[*buffer])
    }

    /// The buffer of a value that comes from before its nodes, to be written.
    pub(crate) fn operand(&self, value: ValueId) -> Option<&Tensor> {
        self.of.iter().find(|(of, _)| *of == value).map(|(_, buffer)| &self.buffers[*buffer])
    }

    /// As [`Forward::write`], for the next tokens of texts of which so many have been before.
    pub(super) fn write_next<T: AsRef<[u32]>>(&self, texts: &[T], past: &[u32]) -> Result<()> {
        self.inputs.write_next(&self.parts.device, texts, past)
    }

    /// Its calls.
    pub(super) fn prepared(&self) -> &[Prepared] {
        &self.calls
    }

    /// Bytes of its values on the device.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffers.iter().map(|buffer| (buffer.rows() * buffer.cols() * buffer.dtype().bytes()) as u64).sum()
    }

    pub(super) fn device(&self) -> &Device {
        &self.parts.device
    }
}
