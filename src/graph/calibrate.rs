//! Statistics of the inputs of every linear layer, from texts that run through the model: what second-order pruning
//! goes by.
//!
//! Linear layers are visited in the order in which they run. Only the states before a layer at which one value alone is
//! live are kept (on the host: of a transformer `tokens x hidden`, twice that where inputs are corrected), and the
//! device keeps no weights of layers before that, so that memory does not grow with the model's depth; the way from
//! there to a layer's input is run again, which costs less than two forward passes in all. Invariant: padding is in no
//! statistic.

use std::sync::Arc;

use super::batches::{Batches, Batching};
use super::checkpoint::Checkpoint;
use super::forward::Parts;
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::prune::Statistics;
use crate::weights::HostWeights;

/// What the layers before a linear layer compute its inputs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CalibrationInputs {
    /// The weights that the checkpoint had: every layer is pruned as if it were the only one.
    Dense,
    /// The weights that were put in their place: every layer sees what those before it lost.
    Pruned,
    /// Those, beside the inputs that the dense model has ([`Statistics::cross`]): every layer can make up for what
    /// those before it lost. Twice the work, and for full statistics alone.
    Corrected,
}

/// How statistics are collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// How texts are put together.
    pub batching: Batching,
    /// Whether all of H is summed, or its diagonal alone.
    pub gram: bool,
    /// Which weights the inputs come from.
    pub inputs: CalibrationInputs,
}

/// What [`Checkpoint::calibrate`] shows a linear layer to: its name, its weights as they are now, and the statistics of
/// its inputs. It may give other weights in their place.
pub type Visit<'a> = dyn FnMut(&str, &HostWeights, &Statistics) -> Result<Option<HostWeights>> + 'a;

impl Checkpoint {
    /// Runs texts, given as token ids, through the model on a device, and shows `visit` every linear layer (by its name
    /// in [`Checkpoint::linears`]) as it is now, and the statistics of its inputs. What `visit` returns takes its
    /// place.
    ///
    /// An error if there are no texts, a text is no input of the model, inputs are to be corrected without all of H, or
    /// `visit` fails; layers before that one keep what they were given.
    ///
    /// ```
    /// use sparse24::graph::{Batching, Calibration, Checkpoint, CalibrationInputs};
    /// use sparse24::models::bert::{BertConfig, Sizes};
    /// use sparse24::{Activation, DType, Device, HostWeights, Mask, Sparse24, VectorLen, prune::SparseGpt};
    /// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
    /// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
    /// let mut checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
    /// let texts = [vec![1, 2, 3, 4], vec![5, 6, 7]];
    /// let how = Calibration { batching: Batching::default(), gram: true, inputs: CalibrationInputs::Pruned };
    /// checkpoint.calibrate(&Device::cpu()?, &texts, how, &mut |_, w, statistics| {
    ///     let w = w.to_dense()?;
    ///     let (pruned, mask) = SparseGpt::new(VectorLen::ONE).prune(&w, statistics, None)?;
    ///     Ok(Some(HostWeights::Sparse24(Sparse24::compress(&pruned, &mask)?)))
    /// })?;
    /// assert!(checkpoint.linears().all(|(_, w)| matches!(w, HostWeights::Sparse24(_))));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn calibrate<T: AsRef<[u32]>>(
        &mut self,
        device: &Device,
        texts: &[T],
        how: Calibration,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        let corrected = how.inputs == CalibrationInputs::Corrected;
        if corrected && !how.gram {
            return Err(Error::invalid("inputs are corrected by way of a full Gram matrix, which is not asked for"));
        }
        let graph = Arc::clone(self.graph());
        let mut batches = Batches::new(&graph, texts, how.batching)?;
        // The model whose inputs are counted, and the dense one that it is corrected by.
        let mut dense = Arc::new(Parts::new(device, self)?);
        let mut pruned = Arc::clone(&dense);
        for layer in graph.linears() {
            let from = batches.node();
            let models: Vec<&Arc<Parts>> = [&pruned].into_iter().chain(corrected.then_some(&dense)).collect();
            batches.advance(&models, layer.node)?;
            if batches.node() > from {
                dense = Arc::new(dense.rest_from(batches.node()));
                pruned = Arc::new(pruned.rest_from(batches.node()));
            }
            let models: Vec<&Arc<Parts>> = [&pruned].into_iter().chain(corrected.then_some(&dense)).collect();
            let (k, rows) = (graph.value(layer.x).cols, graph.value(layer.x).rows);
            let mut statistics = if how.gram { Statistics::full(k)? } else { Statistics::diagonal(k) };
            batches.run(&models, layer.node, layer.x, |batch, x| match &x[..] {
                [x, dense] => statistics.add_pair(&batch.real(x, rows)?, &batch.real(dense, rows)?),
                x => x.iter().try_for_each(|x| statistics.add(&batch.real(x, rows)?)),
            })?;
            if let Some(new) = visit(layer.name, self.linear(layer.name)?, &statistics)? {
                self.set_linear(layer.name, new)?;
                if how.inputs != CalibrationInputs::Dense {
                    pruned = Arc::new(pruned.with_linear(layer.weights, Arc::clone(self.linear(layer.name)?)));
                }
            }
        }
        Ok(())
    }
}
