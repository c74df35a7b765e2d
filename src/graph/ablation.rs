//! What a model computes when one of its linear layers is replaced: the measurement behind sensitivity analysis.
//!
//! The states that enter the part of the model in question are kept on the host, so that a replacement runs what
//! follows from there on alone: half of a forward pass on average. Invariant: all layers but the one in question are
//! those of the checkpoint.

use std::sync::Arc;

use super::batches::{Batches, Batching};
use super::checkpoint::Checkpoint;
use super::forward::Parts;
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::weights::HostWeights;

/// Texts on their way through a model of which one linear layer at a time is replaced.
///
/// ```
/// use sparse24::graph::{Ablation, Batching, Checkpoint};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::{Activation, DType, Device, HostWeights, Sparse24, VectorLen, prune};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// let checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
/// let texts = [vec![1, 2, 3, 4], vec![5]];
/// let mut ablation = Ablation::new(&Device::cpu()?, &checkpoint, &texts, Batching::default())?;
/// for (name, w) in checkpoint.linears() {
///     let w = w.to_dense()?;
///     let pruned = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE)?)?;
///     ablation.run(&name, HostWeights::Sparse24(pruned), &mut |texts, _seq, output| {
///         assert_eq!((texts, output.cols()), (&[0, 1][..], 8));
///         Ok(())
///     })?;
/// }
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Ablation {
    parts: Arc<Parts>,
    batches: Batches,
}

/// What [`Ablation::run`] hands its results to, batch by batch: which texts they are of, the tokens to which each is
/// padded, and the model's output.
pub type Outputs<'a> = dyn FnMut(&[usize], usize, &Matrix) -> Result<()> + 'a;

impl Ablation {
    /// Takes texts, given as token ids, to the first node. An error if there are none, or one is no input of the model.
    pub fn new<T: AsRef<[u32]>>(
        device: &Device,
        checkpoint: &Checkpoint,
        texts: &[T],
        batching: Batching,
    ) -> Result<Self> {
        let parts = Arc::new(Parts::new(device, checkpoint)?);
        let batches = Batches::new(&parts.graph, texts, batching)?;
        Ok(Self { parts, batches })
    }

    /// Number of texts.
    pub fn texts(&self) -> usize {
        self.batches.texts()
    }

    /// Tokens of each text.
    pub fn lengths(&self) -> Vec<usize> {
        self.batches.lengths()
    }

    /// Runs the model with `weights` in place of the linear layer `name`. Blocks must be asked for in their order, each
    /// any number of times; an error says so, or that there is no such layer or the weights do not fit it.
    pub fn run(&mut self, name: &str, weights: HostWeights, done: &mut Outputs<'_>) -> Result<()> {
        let graph = Arc::clone(&self.parts.graph);
        let layer = graph.linear_named(name)?;
        if layer.node < self.batches.node() {
            let next = &graph.nodes()[self.batches.node()].name;
            return Err(Error::invalid(format!("{name} comes before {next}, to which the texts have gone")));
        }
        let param = graph.param(layer.weights);
        let weights = weights.fitted(name, (param.rows, param.cols), self.parts.dtype)?;
        self.batches.advance(&[&self.parts], layer.node)?;
        let changed = Arc::new(self.parts.with_linear(layer.weights, Arc::new(weights)));
        let output = graph.outputs().last().ok_or_else(|| Error::invalid("the model has no output"))?;
        self.batches.run(&[&changed], graph.nodes().len(), *output, |batch, outputs| {
            outputs.iter().try_for_each(|output| done(&batch.texts, batch.seq, output))
        })
    }
}
