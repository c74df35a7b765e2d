//! A graph with a checkpoint's parameters on a device.
//!
//! Invariant: passes that are kept have no more tokens together than [`Model::KEPT_TOKENS`], or there is one alone.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::checkpoint::Checkpoint;
use super::forward::{Forward, Parts};
use super::{Graph, ValueId};
use crate::engine::Device;
use crate::error::Result;
use crate::linear::Linear;
use crate::matrix::DType;
use crate::plan::Plan;
use crate::problem::Op;

/// A model on a device. See [`Graph`] for an example.
#[derive(Debug)]
pub struct Model {
    parts: Arc<Parts>,
    /// The shape used last at the end.
    forwards: Mutex<Vec<Arc<Forward>>>,
}

impl Model {
    /// Uploads a checkpoint. Weights of linear layers follow with the first batch, in the form that its number of
    /// tokens wants. Activations have the checkpoint's element type.
    pub fn new(device: &Device, checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self { parts: Arc::new(Parts::new(device, checkpoint)?), forwards: Mutex::default() })
    }

    /// The same model on the same memory, whose 2:4 layers take no dense weights in their place (see
    /// [`Linear::no_dense_fallback`]): to see what 2:4 alone does.
    pub fn no_dense_fallback(&self) -> Self {
        Self { parts: Arc::new(self.parts.without_dense_fallback()), forwards: Mutex::default() }
    }

    /// What it has on the device, for passes of other kinds.
    pub(super) fn parts(&self) -> Arc<Parts> {
        Arc::clone(&self.parts)
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.parts.device
    }

    /// What it computes.
    pub fn graph(&self) -> &Graph {
        &self.parts.graph
    }

    /// Bytes that the weights of linear layers take on the device now.
    pub fn linear_bytes(&self) -> usize {
        self.parts.linears().map(Linear::bytes).sum()
    }

    /// Element type of the activations.
    pub fn dtype(&self) -> DType {
        self.parts.dtype
    }

    /// The operation that each linear layer's weights were given for, and how it is planned for `batch` texts of `seq`
    /// tokens, in the order in which they run. Errors are those of [`Linear::plan`].
    pub fn plans(&self, batch: usize, seq: usize) -> Result<Vec<(Op, Plan)>> {
        let Parts { graph, dtype, .. } = &*self.parts;
        let plan = |(layer, linear): (super::LinearLayer<'_>, &Linear)| {
            let rows = graph.value(layer.x).rows.count(batch, seq)?;
            let output = graph.value(graph.nodes()[layer.node].writes).precision.of(*dtype);
            Ok((linear.op(), linear.plan(rows, output)?))
        };
        graph.linears().zip(self.parts.linears()).map(plan).collect()
    }

    /// Tokens of the shapes of batches whose buffers are kept, padding included: twice those of a batch of
    /// [`Batching`](super::Batching)'s default. A shape of more is kept alone.
    pub const KEPT_TOKENS: usize = 16384;

    /// A pass for batches of `batch` texts of `seq` tokens each, prepared the first time that it is asked for. An error
    /// if there are none, or more tokens than the model takes.
    ///
    /// Shapes that were used longest ago give way to a new one, until there are no more than [`Model::KEPT_TOKENS`]
    /// with it; all of them where memory is short all the same. Their calls and buffers live on as long as anybody
    /// holds them.
    pub fn forward(&self, batch: usize, seq: usize) -> Result<Arc<Forward>> {
        Ok(self.forward_or_new(batch, seq)?.0)
    }

    /// A pass of its own in which these values can be read after a run, beside the outputs.
    ///
    /// ```
    /// use sparse24::graph::{Checkpoint, Model};
    /// use sparse24::{DType, Device, models};
    /// let graph = models::bert::BertConfig::new(
    ///     models::bert::Sizes { vocabulary: 9, hidden: 8, layers: 1, heads: 2, intermediate: 16, positions: 4, types: 1 },
    ///     1e-12,
    ///     sparse24::Activation::Gelu,
    /// )?.graph()?;
    /// let attended = graph.value_named("encoder.layer.0.attention.self").ok_or(sparse24::Error::invalid("none"))?;
    /// let model = Model::new(&Device::cpu()?, &Checkpoint::random(graph, DType::F32, 24)?)?;
    /// let forward = model.tapped(&[attended], 1, 3)?;
    /// forward.run_on(&[[1, 2, 3]])?;
    /// assert_eq!(forward.tap(attended).map(|y| (y.rows(), y.cols())), Some((3, 8)));
    /// // In other passes its buffer is used again.
    /// assert!(model.forward(1, 3)?.tap(attended).is_none());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn tapped(&self, values: &[ValueId], batch: usize, seq: usize) -> Result<Forward> {
        self.part(0..self.graph().nodes().len(), values, batch, seq)
    }

    /// A pass of some nodes alone, of whose `values` the same holds: what comes from nodes before them is to be written
    /// ([`Forward::operand`]).
    pub(crate) fn part(&self, nodes: Range<usize>, values: &[ValueId], batch: usize, seq: usize) -> Result<Forward> {
        Forward::new(Arc::clone(&self.parts), nodes, values, batch, seq)
    }

    /// [`Model::forward`], and whether it was prepared now.
    pub(crate) fn forward_or_new(&self, batch: usize, seq: usize) -> Result<(Arc<Forward>, bool)> {
        let tokens = self.graph().tokens_of(batch, seq)?;
        let mut kept = self.forwards.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|f| (f.batch(), f.seq()) == (batch, seq));
        let forward = match found {
            Some(at) => kept.remove(at),
            None => {
                // Before the new one is made: this bounds what is allocated at once.
                let mut all = kept.iter().fold(tokens, |all, f| all.saturating_add(f.batch() * f.seq()));
                while all > Self::KEPT_TOKENS && !kept.is_empty() {
                    let oldest = kept.remove(0);
                    all -= oldest.batch() * oldest.seq();
                }
                let forward = match self.tapped(&[], batch, seq) {
                    Err(e) if e.is_out_of_memory() && !kept.is_empty() => {
                        kept.clear();
                        // A GPU gives memory back when it is done with it.
                        self.parts.device.wait()?;
                        self.tapped(&[], batch, seq)?
                    }
                    forward => forward?,
                };
                Arc::new(forward)
            }
        };
        kept.push(Arc::clone(&forward));
        Ok((forward, found.is_none()))
    }
}
