//! Statistics of the inputs of every linear layer, from texts that run through the model: what second-order pruning
//! goes by.
//!
//! Encoder layers are visited in the order in which they run, one linear layer at a time. Only the states between two
//! encoder layers are kept (on the host, `tokens x hidden`), so that memory does not grow with the model's depth
//! beyond its weights (twice these and the states where inputs are corrected); within
//! a layer the way from its input to each linear layer is run again, which costs two and a half forward passes in all.
//! Invariant: padding is in no statistic.

use super::checkpoint::{self, Checkpoint};
use super::stream::{Stream, Streams};
use super::{Batching, LayerParts, Model, States};
use crate::engine::{Device, Tensor};
use crate::error::{Error, Result};
use crate::linear::LinearWeights;
use crate::matrix::Matrix;
use crate::prune::Statistics;

/// What the layers before a linear layer compute its inputs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// The weights that the checkpoint had: every layer is pruned as if it were the only one.
    Dense,
    /// The weights that were put in their place: every layer sees what those before it lost.
    Pruned,
    /// Those, beside the inputs that the dense model has ([`Statistics::cross`]): every layer can make up for what those
    /// before it lost. Twice the work, and for full statistics alone.
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
    pub inputs: Inputs,
}

/// What [`Checkpoint::calibrate`] shows a linear layer to: its name, its weights as they are now, and the statistics of
/// its inputs. It may give other weights in their place.
pub type Visit<'a> = dyn FnMut(&str, &LinearWeights, &Statistics) -> Result<Option<LinearWeights>> + 'a;

/// The calls of an encoder layer that lead to the input of each of its linear layers.
const CALLS_BEFORE: [usize; 4] = [0, 2, 4, 5];
const ALL_CALLS: usize = 7;

impl Checkpoint {
    /// Runs texts, given as token ids, through the model on a device, and shows `visit` every linear layer (by its name
    /// in [`Checkpoint::linears`]) as it is now, and the statistics of its inputs. What `visit` returns takes its place.
    ///
    /// An error if there are no texts, a text is no input of the model, inputs are to be corrected without all of H, or
    /// `visit` fails; encoder layers before that one keep what they were given.
    ///
    /// ```
    /// use sparse24::bert::{Batching, Calibration, Checkpoint, Config, Inputs, Sizes};
    /// use sparse24::{Activation, DType, Device, LinearWeights, Mask, Sparse24, VectorLen, prune::SparseGpt};
    /// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
    /// let mut checkpoint = Checkpoint::random(Config::new(sizes, 1e-12, Activation::Gelu)?, DType::F32, 24)?;
    /// let texts = [vec![1, 2, 3, 4], vec![5, 6, 7]];
    /// let how = Calibration { batching: Batching::default(), gram: true, inputs: Inputs::Pruned };
    /// checkpoint.calibrate(&Device::cpu()?, &texts, how, &mut |_, w, statistics| {
    ///     let w = w.to_dense()?;
    ///     let (pruned, mask) = SparseGpt::new(VectorLen::ONE).prune(&w, statistics, None)?;
    ///     Ok(Some(LinearWeights::Sparse24(Sparse24::compress(&pruned, &mask)?)))
    /// })?;
    /// assert!(checkpoint.linears().all(|(_, w)| matches!(w, LinearWeights::Sparse24(_))));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn calibrate<T: AsRef<[u32]>>(
        &mut self,
        device: &Device,
        texts: &[T],
        how: Calibration,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        if how.inputs == Inputs::Corrected && !how.gram {
            return Err(Error::Invalid(
                "inputs are corrected by way of a full Gram matrix, which is not asked for".into(),
            ));
        }
        let model = Model::new(device, self)?;
        let dense = (how.inputs == Inputs::Corrected).then(|| self.clone());
        let mut streams = Streams::new(&model, texts, how.batching, 1 + usize::from(dense.is_some()))?;
        // Its tables are not needed again.
        drop(model);
        let run = |pruned: &Self, i: usize, streams: &mut Streams, calls, done: &mut Done<'_>| {
            let models: Vec<&Self> = [pruned].into_iter().chain(&dense).collect();
            run(device, &models, i, streams, calls, done)
        };
        for i in 0..self.layers.len() {
            let mut pruned = Vec::new();
            for (linear, &calls) in CALLS_BEFORE.iter().enumerate() {
                let k = self.layers[i].linears()[linear].weights.k();
                let mut statistics = if how.gram { Statistics::full(k)? } else { Statistics::diagonal(k) };
                run(self, i, &mut streams, calls, &mut |stream, x| match &x[..] {
                    [x, dense] => statistics.add_pair(&stream.real(x)?, &stream.real(dense)?),
                    x => x.iter().try_for_each(|x| statistics.add(&stream.real(x)?)),
                })?;
                let name = checkpoint::name_of(i, linear);
                let now = &self.layers[i].linears()[linear].weights;
                if let Some(new) = visit(&name, now, &statistics)? {
                    let weights = checkpoint::fitted(&name, new, (now.m(), k), self.dtype)?;
                    match how.inputs {
                        Inputs::Pruned | Inputs::Corrected => self.layers[i].linears_mut()[linear].weights = weights,
                        Inputs::Dense => pruned.push((linear, weights)),
                    }
                }
            }
            run(self, i, &mut streams, ALL_CALLS, &mut |stream, states| {
                stream.states = states;
                Ok(())
            })?;
            for (linear, weights) in pruned {
                self.layers[i].linears_mut()[linear].weights = weights;
            }
        }
        Ok(())
    }
}

/// What is done with what a batch's calls end in, once for each model.
type Done<'a> = dyn FnMut(&mut Stream, Vec<Matrix>) -> Result<()> + 'a;

/// Runs the first so many calls of encoder layer `i` of each model over every batch, and hands on what they lead to.
fn run(
    device: &Device,
    models: &[&Checkpoint],
    i: usize,
    streams: &mut Streams,
    calls: usize,
    done: &mut Done<'_>,
) -> Result<()> {
    let Some(Checkpoint { config, dtype, .. }) = models.first() else { return Ok(()) };
    if calls == 0 {
        return streams.each(done);
    }
    let parts = models.iter().map(|model| LayerParts::new(device, config, &model.layers[i]));
    let parts: Vec<_> = parts.collect::<Result<_>>()?;
    let prepare = |states: &States| {
        let of = |parts| {
            let all = states.layer(device, config, parts, false)?;
            Ok(all.into_iter().map(|(_, call)| call).take(calls).collect())
        };
        Ok((parts.iter().map(of).collect::<Result<_>>()?, states.after(calls).clone()))
    };
    streams.run(device, config, *dtype, prepare, done)
}

impl States {
    /// The tensor that the first so many calls of a layer end in.
    fn after(&self, calls: usize) -> &Tensor {
        match calls {
            2 => &self.attended,
            5 => &self.inner,
            _ => &self.hidden,
        }
    }
}
