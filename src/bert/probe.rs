//! What a model computes when one of its linear layers is replaced: the measurement behind sensitivity analysis.
//!
//! The states that enter the encoder layer in question are kept on the host, so that a replacement in layer i runs the
//! layers from i on alone: half of a forward pass on average. Invariant: all layers but the one in question are those of
//! the checkpoint.

use std::sync::Arc;

use super::checkpoint::{self, Checkpoint};
use super::stream::Streams;
use super::{Batching, LayerParts, LinearParts, Model, Parts, States};
use crate::engine::{Device, Prepared};
use crate::error::{Error, Result, checked_mul};
use crate::linear::LinearWeights;
use crate::matrix::{Elements, Matrix};

/// Texts on their way through a model of which one linear layer at a time is replaced.
///
/// ```
/// use sparse24::bert::{Batching, Checkpoint, Config, Probe, Sizes};
/// use sparse24::{Activation, DType, Device, LinearWeights, Sparse24, VectorLen, prune};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let checkpoint = Checkpoint::random(Config::new(sizes, 1e-12, Activation::Gelu)?, DType::F32, 24)?;
/// let texts = [vec![1, 2, 3, 4], vec![5]];
/// let mut probe = Probe::new(&Device::cpu()?, &checkpoint, &texts, Batching::default())?;
/// for (name, w) in checkpoint.linears() {
///     let w = w.to_dense()?;
///     let pruned = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE)?)?;
///     let embeddings = probe.embed(&name, LinearWeights::Sparse24(pruned))?;
///     assert_eq!((embeddings.rows(), embeddings.cols()), (2, 8));
/// }
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Probe<'a> {
    checkpoint: &'a Checkpoint,
    parts: Arc<Parts>,
    /// Before encoder layer `at`.
    streams: Streams,
    at: usize,
}

impl<'a> Probe<'a> {
    /// Takes texts, given as token ids, to the first encoder layer. An error if there are none, or one is no input of
    /// the model.
    pub fn new<T: AsRef<[u32]>>(
        device: &Device,
        checkpoint: &'a Checkpoint,
        texts: &[T],
        batching: Batching,
    ) -> Result<Self> {
        let model = Model::new(device, checkpoint)?;
        let streams = Streams::new(&model, texts, batching, 1)?;
        Ok(Self { checkpoint, parts: model.parts, streams, at: 0 })
    }

    /// The embeddings of all texts, one a row, with `weights` in place of the linear layer `name`. Encoder layers must be
    /// asked for in their order, linear layers any number of times; an error says so, or that there is no such layer or
    /// the weights do not fit it.
    pub fn embed(&mut self, name: &str, weights: LinearWeights) -> Result<Matrix> {
        let Some((i, linear)) = self.checkpoint.place_of(name) else {
            return Err(Error::Invalid(format!("there is no linear layer {name:?}")));
        };
        if i < self.at {
            return Err(Error::Invalid(format!("{name} comes before encoder layer {}, which was asked for", self.at)));
        }
        let old = &self.checkpoint.layers[i].linears()[linear].weights;
        let weights = checkpoint::fitted(name, weights, (old.m(), old.k()), self.parts.dtype)?;

        let parts = Arc::clone(&self.parts);
        let (before, after) = (&parts.layers[self.at..i], &parts.layers[i + 1..]);
        let mut layer = parts.layers[i].clone();
        let LinearParts { linear: old, .. } = layer.linears_mut()[linear];
        *old = parts.device.linear(weights, old.epilogue());

        let Parts { device, config, dtype, pipeline, .. } = &*parts;
        let along = |states: &States, layers: &mut dyn Iterator<Item = &LayerParts>| -> Result<Vec<Prepared>> {
            let mut calls = Vec::new();
            for layer in layers {
                calls.extend(states.layer(device, config, layer, false)?.into_iter().map(|(_, call)| call));
            }
            Ok(calls)
        };
        if !before.is_empty() {
            let prepare = |states: &States| Ok((vec![along(states, &mut before.iter())?], states.hidden.clone()));
            // All or none: a run that fails on its way leaves the streams where they were.
            let mut moved = Vec::new();
            self.streams.run(device, config, *dtype, prepare, |_, states| {
                moved.push(states);
                Ok(())
            })?;
            self.streams.set(moved);
            self.at = i;
        }
        let width = pipeline.width(config.hidden());
        let mut all = vec![0.0; checked_mul("embeddings", self.streams.texts(), width)?];
        let prepare = |states: &States| {
            let mut calls = along(states, &mut [&layer].into_iter().chain(after))?;
            let (pool, end) = states.exit(device, config, pipeline)?;
            calls.extend(pool);
            Ok((vec![calls], end))
        };
        self.streams.run(device, config, *dtype, prepare, |stream, ends| {
            let lengths: Vec<_> = stream.lengths.iter().map(|&length| length as usize).collect();
            for end in &ends {
                let embeddings = pipeline.embeddings(end, stream.seq, &lengths)?.elements().to_f32();
                for (&text, from) in stream.texts.iter().zip(embeddings.chunks_exact(width)) {
                    all[text * width..][..width].copy_from_slice(from);
                }
            }
            Ok(())
        })?;
        Matrix::new(self.streams.texts(), width, Elements::F32(all))
    }
}
