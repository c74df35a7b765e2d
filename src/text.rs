//! Texts through models: from a folder of Hugging Face's to embeddings or to more text, on any [`Device`].
//!
//! ```text
//!  a folder           ─► Files       what lies where, prompts, the similarity     files
//!  config.json        ─► Graph       the model                                    models
//!  tokenizer.json     ─► Tokenizer   texts to ids                                 tokens
//!  model.safetensors  ─► Checkpoint  weights on the host                          graph
//!  modules.json       ─► Pipeline    pooling, Dense, Normalize ...                pipeline
//!                        TextModel   all of these, of one folder                  model
//!                          │  Encoder::new   on a device
//!                          ▼
//!  ids ────────────────► Encoder     batches by length                            (this file)
//!                          ▼
//!                        embeddings  ◄─ twin, in f64; bench: verified against it and timed, in several forms
//! ```
//! A language model's way is another from the checkpoint on:
//!
//! ```text
//!  generation_config.json ... ─► LanguageModel   which tokens end a text; the chat template    generator, chat
//!                                  │  Generator::new   on a device
//!                                  ▼
//!  a prompt's ids ──────────────► Generator      graph::Decoder ─► logits ─► Sampler ─► a token, and again
//! ```
//! Padded tokens go through the GEMMs like others, but no real token attends to them and poolings leave them out. On a
//! GPU reading embeddings back is a submission of its own: a copy to memory that the host can see.
//!
//! Invariant: embeddings come in the order of their texts.

mod bench;
mod chat;
mod decoder_bench;
mod files;
mod generator;
#[cfg(feature = "hub")]
mod hub;
mod linear_probe;
mod model;
mod pipeline;
mod sampler;
pub mod sensitivity;
mod tokens;
pub mod twin;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use web_time::Instant;

pub use bench::{EncoderBench, ModelRecord, PartCosts, PartTimes, allowed_error};
pub use chat::{ChatTemplate, Message};
pub use decoder_bench::{DecoderBench, Phase, allowed_logit_error};
pub use files::{Files, Settings, Similarity};
pub use generator::{Finish, GenerateOptions, Generated, Generator, LanguageModel, Perplexity};
pub use linear_probe::LinearProbe;
pub use model::{LoadOptions, TextModel};
pub use pipeline::{Pipeline, Pooling};
pub use sampler::{Sampler, Sampling};
pub use tokens::{TextStream, Tokenizer, Tokens};

use crate::engine::Device;
use crate::error::{Error, Result, checked_mul};
use crate::graph::{Batching, Checkpoint, Forward, Model, batches};
use crate::matrix::{Elements, Matrix};

/// A model on a device that makes embeddings of texts.
///
/// ```
/// use sparse24::graph::{Batching, Checkpoint, Sparsity};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::text::{Encoder, Pipeline, twin};
/// use sparse24::{Activation, DType, Device};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// let mut checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
/// checkpoint.prune(Sparsity::TwoFour(sparse24::VectorLen::ONE))?;
///
/// let encoder = Encoder::new(&Device::cpu()?, &checkpoint, Pipeline::default())?;
/// let texts = [vec![1, 2, 3, 4], vec![5]]; // a Tokenizer makes them of strings
/// let embeddings = encoder.embed(&texts, Batching::default())?;
/// assert_eq!((embeddings.rows(), embeddings.cols()), (2, 8));
///
/// let expected = twin::embeddings(&checkpoint, &Pipeline::default(), &texts)?;
/// assert!(expected.indexed_iter().all(|((r, c), e)| (f64::from(embeddings.get(r, c)) - e).abs() < 1e-5));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Encoder {
    model: Model,
    pipeline: Pipeline,
    width: usize,
}

/// What [`Encoder::embed_timed`] says of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchTime {
    /// Texts in it.
    pub texts: usize,
    /// Whether its shape was a new one, so that calls were prepared and pipelines compiled for it.
    pub is_new: bool,
    /// From its token ids to its embeddings on the host.
    pub elapsed: Duration,
}

impl Encoder {
    /// Uploads a checkpoint, whose output are the last hidden states of tokens, with what a device computes of the
    /// pipeline.
    pub fn new(device: &Device, checkpoint: &Checkpoint, pipeline: Pipeline) -> Result<Self> {
        let width = pipeline.width(checkpoint.graph().output_width());
        Ok(Self { model: Model::new(device, &pipeline.attach(checkpoint)?)?, pipeline, width })
    }

    /// The same encoder on the same memory, whose 2:4 layers take no dense weights in their place: see
    /// [`Model::no_dense_fallback`].
    pub fn no_dense_fallback(&self) -> Self {
        Self { model: self.model.no_dense_fallback(), pipeline: self.pipeline.clone(), width: self.width }
    }

    /// The model, with what a device computes of the pipeline.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Features of an embedding.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Embeddings of texts given as token ids: one row of [`Encoder::width`] features each, f32, in their order. Texts
    /// go through the model in batches by length. An error for a text without tokens, with more than the model takes,
    /// with an id outside of the vocabulary, with no token beside its prompt's where these are not pooled, or whose
    /// activations are not finite in their type: they overflowed it, or sums on the way overflowed f32.
    pub fn embed<T: AsRef<[u32]>>(&self, texts: &[T], batching: Batching) -> Result<Matrix> {
        self.embed_timed(texts, batching, &mut |_| ())
    }

    /// [`Encoder::embed`], which says of every batch how long it took: what a program needs that reports a speed
    /// without the time in which pipelines are compiled.
    pub fn embed_timed<T: AsRef<[u32]>>(
        &self,
        texts: &[T],
        batching: Batching,
        done: &mut dyn FnMut(BatchTime),
    ) -> Result<Matrix> {
        let all = self.embed_while(texts, batching, &mut |batch| {
            done(batch);
            ControlFlow::Continue(())
        })?;
        all.ok_or_else(|| Error::invalid("the texts were not embedded to their end"))
    }

    /// [`Encoder::embed_timed`], which may be ended after any batch, as by a user who has waited enough: `None` then.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use sparse24::Device;
    /// use sparse24::graph::{Batching, Checkpoint};
    /// use sparse24::models::bert::{BertConfig, Sizes};
    /// use sparse24::text::{Encoder, Pipeline};
    /// # use sparse24::{Activation, DType};
    /// # let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 1, heads: 2, intermediate: 8, positions: 4, types: 1 };
    /// # let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
    /// # let checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
    /// let encoder = Encoder::new(&Device::cpu()?, &checkpoint, Pipeline::default())?;
    /// let (texts, batching) = ([[1], [2], [3]], Batching { texts: 1, ..Batching::default() });
    /// let mut batches = 0;
    /// let embeddings = encoder.embed_while(&texts, batching, &mut |_| {
    ///     batches += 1;
    ///     if batches == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    /// })?;
    /// assert_eq!((embeddings, batches), (None, 2));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn embed_while<T: AsRef<[u32]>>(
        &self,
        texts: &[T],
        batching: Batching,
        done: &mut dyn FnMut(BatchTime) -> ControlFlow<()>,
    ) -> Result<Option<Matrix>> {
        let graph = self.model.graph();
        for (i, text) in texts.iter().enumerate() {
            graph.check_ids(text.as_ref()).map_err(|e| e.of_text(i))?;
        }
        let width = self.width;
        let mut all = vec![0.0; checked_mul("embeddings", texts.len(), width)?];
        let lengths: Vec<_> = texts.iter().map(|text| text.as_ref().len()).collect();
        for batch in batches(&lengths, graph.limits().tokens, batching) {
            let started = Instant::now();
            let ids: Vec<&[u32]> = batch.texts.iter().map(|&text| texts[text].as_ref()).collect();
            let (forward, is_new) = self.model.forward_or_new(ids.len(), batch.seq)?;
            let embeddings = self.embed_batch(&forward, &ids).map_err(|e| match e.text() {
                // By its place among all texts.
                Some(text) => e.into_cause().of_text(batch.texts[text]),
                None => e,
            })?;
            if done(BatchTime { texts: ids.len(), is_new, elapsed: started.elapsed() }).is_break() {
                return Ok(None);
            }
            let embeddings = embeddings.elements().to_f32();
            for (&text, from) in batch.texts.iter().zip(embeddings.chunks_exact(width)) {
                if !from.iter().all(|x| x.is_finite()) {
                    let dtype = self.model.dtype();
                    return Err(Error::invalid(format!("activations are not finite in {dtype}")).of_text(text));
                }
                all[text * width..][..width].copy_from_slice(from);
            }
        }
        Matrix::new(texts.len(), width, Elements::F32(all)).map(Some)
    }

    /// A pass for batches of one shape: see [`Model::forward`].
    pub fn forward(&self, batch: usize, seq: usize) -> Result<Arc<Forward>> {
        self.model.forward(batch, seq)
    }

    /// The embeddings of one batch by a pass of this encoder's, not looked at.
    pub fn embed_batch<T: AsRef<[u32]>>(&self, forward: &Forward, texts: &[T]) -> Result<Matrix> {
        pollster::block_on(self.embed_batch_async(forward, texts))
    }

    /// [`Encoder::embed_batch`] where nothing may block.
    pub async fn embed_batch_async<T: AsRef<[u32]>>(&self, forward: &Forward, texts: &[T]) -> Result<Matrix> {
        let output = forward.run_on_async(texts).await?;
        let lengths: Vec<_> = texts.iter().map(|text| text.as_ref().len()).collect();
        self.pipeline.embeddings(&output, forward.seq(), &lengths)
    }
}
