//! BERT, end to end: from a folder of Hugging Face's to embeddings of texts, on any [`Device`].
//!
//! ```text
//!  a folder           ─► Files       what lies where, prompts, the similarity         files
//!  config.json        ─► Config      the sizes                                        config
//!  tokenizer.json     ─► Tokenizer   texts to ids, ids to batches by length           tokens
//!  model.safetensors  ─► Checkpoint  weights on the host: dense, pruned, compressed   checkpoint
//!                          │  Model::new     uploaded once                            (this file)
//!                          ▼
//!  ids ────────────────► Model       one Forward for each shape of a batch
//!                          │  one submission to compute; activations stay on the device
//!                          ▼
//!  modules.json       ─► Pipeline    pooling, Dense, Normalize ...                    pipeline
//!                          ▼
//!                        embeddings  ◄─ reference, the f64 twin
//! ```
//!
//! An encoder layer is two GEMMs around attention and two of the feed-forward part, each with bias, GELU and residual in
//! its epilogue, and two LayerNorms. Its [`Linear`]s have whichever form the checkpoint gives each of them. Padded tokens
//! go through the GEMMs like others, but no real token attends to them and poolings leave them out.
//!
//! On a GPU reading embeddings back is a submission of its own: a copy to memory that the host can see.
//!
//! Invariant: a [`Forward`] that has run once allocates nothing on the device when it runs again.

mod calibrate;
mod checkpoint;
mod config;
mod files;
#[cfg(feature = "hub")]
mod hub;
mod permute;
mod pipeline;
mod probe;
pub mod reference;
mod stream;
mod times;
mod tokens;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use calibrate::{Calibration, Inputs, Visit};
pub use checkpoint::{Checkpoint, LinearTensor, Sparsity};
pub use config::{Config, NAMES, Sizes};
pub use files::{Files, Settings, Similarity};
pub use permute::{Kept, Permuted};
pub use pipeline::{Pipeline, Pooling};
pub use probe::Probe;
pub use times::{Times, time_forwards};
pub use tokens::{Batch, Batching, Tokenizer, Tokens, batches};

use crate::engine::{Device, Indices, Prepared, Tensor};
use crate::error::{Error, Result, checked_mul};
use crate::linear::Linear;
use crate::matrix::{DType, Elements, Matrix};
use crate::ops::gemm::Io;
use crate::ops::{Attention, Embedding, LayerNorm, MeanPooling};
use crate::plan::Plan;
use crate::problem::{Activation, Epilogue, Op};

/// A BERT on a device.
///
/// ```
/// use sparse24::bert::{Batching, Checkpoint, Config, Model, Sizes, Sparsity, reference};
/// use sparse24::{Activation, DType, Device};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let mut checkpoint = Checkpoint::random(Config::new(sizes, 1e-12, Activation::Gelu)?, DType::F32, 24)?;
/// checkpoint.prune(Sparsity::TwoFour(sparse24::VectorLen::ONE))?;
///
/// let model = Model::new(&Device::cpu()?, &checkpoint)?;
/// let texts = [vec![1, 2, 3, 4], vec![5]]; // a Tokenizer makes them of strings
/// let embeddings = model.embed(&texts, Batching::default())?;
/// assert_eq!((embeddings.rows(), embeddings.cols()), (2, 8));
///
/// let expected = reference::embeddings(&checkpoint, &texts)?;
/// assert!(expected.indexed_iter().all(|((r, c), e)| (f64::from(embeddings.get(r, c)) - e).abs() < 1e-5));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    parts: Arc<Parts>,
    pinned: bool,
    /// The shape used last at the end; of no more tokens than [`Model::KEPT_TOKENS`] together, or one alone.
    forwards: Mutex<Vec<Arc<Forward>>>,
}

/// Everything of a model that is on the device whatever the batch.
#[derive(Debug)]
struct Parts {
    device: Device,
    config: Config,
    dtype: DType,
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    norm: NormParts,
    layers: Vec<LayerParts>,
    pipeline: Pipeline,
}

#[derive(Clone, Debug)]
struct NormParts {
    gamma: Tensor,
    beta: Tensor,
}

#[derive(Clone, Debug)]
struct LinearParts {
    linear: Linear,
    bias: Tensor,
}

#[derive(Clone, Debug)]
struct LayerParts {
    qkv: LinearParts,
    attended: LinearParts,
    attention_norm: NormParts,
    ffn_in: LinearParts,
    ffn_out: LinearParts,
    output_norm: NormParts,
}

/// What [`Model::embed_timed`] says of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchTime {
    /// Texts in it.
    pub texts: usize,
    /// Whether its shape was a new one, so that calls were prepared and pipelines compiled for it.
    pub is_new: bool,
    /// From its token ids to its embeddings on the host.
    pub elapsed: Duration,
}

/// Which share of a forward pass a call belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A linear layer, with its bias, activation and residual.
    Gemm,
    /// The products and the softmax of attention.
    Attention,
    /// Embeddings, LayerNorm, pooling.
    Rest,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 3] = [Self::Gemm, Self::Attention, Self::Rest];
}

impl Model {
    /// Uploads a checkpoint's tables; linear layers follow with the first batch, in the form that its number of tokens
    /// wants. Activations have the checkpoint's element type.
    pub fn new(device: &Device, checkpoint: &Checkpoint) -> Result<Self> {
        let parts = Parts {
            device: device.clone(),
            config: checkpoint.config,
            dtype: checkpoint.dtype,
            words: device.upload(&checkpoint.words)?,
            positions: device.upload(&checkpoint.positions)?,
            types: device.upload(&checkpoint.types)?,
            norm: NormParts::new(device, &checkpoint.norm)?,
            layers: checkpoint
                .layers
                .iter()
                .map(|layer| LayerParts::new(device, &checkpoint.config, layer))
                .collect::<Result<_>>()?,
            pipeline: checkpoint.pipeline.clone(),
        };
        Ok(Self { parts: Arc::new(parts), pinned: false, forwards: Mutex::default() })
    }

    /// The same model on the same memory, whose 2:4 layers take no dense weights in their place (see
    /// [`Linear::pinned`]): to see what 2:4 alone does.
    pub fn pinned(&self) -> Self {
        Self { parts: Arc::clone(&self.parts), pinned: true, forwards: Mutex::default() }
    }

    /// What the model is made of.
    pub fn config(&self) -> &Config {
        &self.parts.config
    }

    /// Bytes that the weights of linear layers take on the device now.
    pub fn linear_bytes(&self) -> usize {
        let linears = self.parts.layers.iter().flat_map(LayerParts::linears);
        linears.map(|parts| parts.linear.bytes()).sum()
    }

    /// Element type of the activations.
    pub fn dtype(&self) -> DType {
        self.parts.dtype
    }

    /// The operation that each linear layer's weights were given for, and how it is planned for `n` tokens, in the order
    /// in which they run. Errors are those of [`Linear::plan`].
    pub fn plans(&self, n: usize) -> Result<Vec<(Op, Plan)>> {
        let linears = self.parts.layers.iter().flat_map(LayerParts::linears);
        let plan = |linear: &Linear| Ok((linear.op(), linear.plan(n, self.parts.dtype)?));
        linears.map(|parts| if self.pinned { plan(&parts.linear.pinned()) } else { plan(&parts.linear) }).collect()
    }

    /// Features of an embedding.
    pub fn width(&self) -> usize {
        self.parts.pipeline.width(self.config().hidden())
    }

    /// Embeddings of texts given as token ids: one row of [`Model::width`] features each, f32, in their order. Texts go
    /// through the model in batches by length. An [`Error::Text`] names a text without tokens, with more than the model has positions for,
    /// with an id outside of the vocabulary, with no token beside its prompt's where these are not pooled, or whose
    /// activations are not finite in their type: they overflowed it, or sums on the way overflowed f32.
    pub fn embed<T: AsRef<[u32]>>(&self, texts: &[T], batching: Batching) -> Result<Matrix> {
        self.embed_timed(texts, batching, &mut |_| ())
    }

    /// [`Model::embed`], which says of every batch how long it took: what a program needs that reports a speed without
    /// the time in which pipelines are compiled.
    pub fn embed_timed<T: AsRef<[u32]>>(
        &self,
        texts: &[T],
        batching: Batching,
        done: &mut dyn FnMut(BatchTime),
    ) -> Result<Matrix> {
        for (i, text) in texts.iter().enumerate() {
            check_ids(self.config(), text.as_ref()).map_err(|e| e.of_text(i))?;
        }
        let width = self.width();
        let mut all = vec![0.0; checked_mul("embeddings", texts.len(), width)?];
        let lengths: Vec<_> = texts.iter().map(|text| text.as_ref().len()).collect();
        for batch in batches(&lengths, self.config().positions(), batching) {
            let started = Instant::now();
            let ids: Vec<&[u32]> = batch.texts.iter().map(|&text| texts[text].as_ref()).collect();
            let (forward, is_new) = self.forward_or_new(ids.len(), batch.seq)?;
            let embeddings = forward.embed(&ids).map_err(|e| match e {
                // By its place among all texts.
                Error::Text { text, cause } => cause.of_text(batch.texts[text]),
                e => e,
            })?;
            done(BatchTime { texts: ids.len(), is_new, elapsed: started.elapsed() });
            let embeddings = embeddings.elements().to_f32();
            for (&text, from) in batch.texts.iter().zip(embeddings.chunks_exact(width)) {
                if !from.iter().all(|x| x.is_finite()) {
                    let dtype = self.parts.dtype;
                    return Err(Error::Invalid(format!("activations are not finite in {dtype}")).of_text(text));
                }
                all[text * width..][..width].copy_from_slice(from);
            }
        }
        Matrix::new(texts.len(), width, Elements::F32(all))
    }

    /// The states of a batch's tokens that enter the first encoder layer, `texts · seq x hidden`.
    fn embedded(&self, texts: &[&[u32]], seq: usize) -> Result<Matrix> {
        let Parts { device, config, dtype, .. } = &*self.parts;
        let states = States::new(device, config, *dtype, texts.len(), seq)?;
        let entrance = Entrance::new(&self.parts, &states)?;
        entrance.write(&self.parts, &states, texts)?;
        device.submit(&entrance.calls)?;
        device.read(&states.hidden)
    }

    /// Tokens of the shapes of batches whose buffers are kept, padding included: twice those of a batch of
    /// [`Batching`]'s default. A shape of more is kept alone.
    pub const KEPT_TOKENS: usize = 16384;

    /// The calls for batches of `batch` texts of `seq` tokens each, prepared the first time that they are asked for. An
    /// error if there are none, or more tokens than the model has positions for.
    ///
    /// Shapes that were used longest ago give way to a new one, until there are no more than [`Model::KEPT_TOKENS`]
    /// with it; all of them where memory is short all the same. Their calls and buffers live on as long as anybody
    /// holds them.
    pub fn forward(&self, batch: usize, seq: usize) -> Result<Arc<Forward>> {
        Ok(self.forward_or_new(batch, seq)?.0)
    }

    /// [`Model::forward`], and whether it was prepared now.
    fn forward_or_new(&self, batch: usize, seq: usize) -> Result<(Arc<Forward>, bool)> {
        let tokens = tokens_of(self.config(), batch, seq)?;
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
                let new = || Forward::new(Arc::clone(&self.parts), self.pinned, batch, seq);
                let forward = match new() {
                    Err(Error::OutOfMemory(_)) if !kept.is_empty() => {
                        kept.clear();
                        // A GPU gives memory back when it is done with it.
                        self.parts.device.wait()?;
                        new()?
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

impl NormParts {
    fn new(device: &Device, norm: &checkpoint::Norm) -> Result<Self> {
        Ok(Self { gamma: device.upload(&norm.gamma)?, beta: device.upload(&norm.beta)? })
    }
}

impl LinearParts {
    fn new(device: &Device, dense: &checkpoint::Dense, activation: Activation, residual: bool) -> Result<Self> {
        let epilogue = Epilogue { bias: true, activation, residual };
        Ok(Self { linear: device.linear(dense.weights.clone(), epilogue), bias: device.upload(&dense.bias)? })
    }
}

impl LayerParts {
    fn new(device: &Device, config: &Config, layer: &checkpoint::Layer) -> Result<Self> {
        Ok(Self {
            qkv: LinearParts::new(device, &layer.qkv, Activation::None, false)?,
            attended: LinearParts::new(device, &layer.attended, Activation::None, true)?,
            attention_norm: NormParts::new(device, &layer.attention_norm)?,
            ffn_in: LinearParts::new(device, &layer.ffn_in, config.activation(), false)?,
            ffn_out: LinearParts::new(device, &layer.ffn_out, Activation::None, true)?,
            output_norm: NormParts::new(device, &layer.output_norm)?,
        })
    }

    fn linears(&self) -> [&LinearParts; 4] {
        [&self.qkv, &self.attended, &self.ffn_in, &self.ffn_out]
    }

    fn linears_mut(&mut self) -> [&mut LinearParts; 4] {
        [&mut self.qkv, &mut self.attended, &mut self.ffn_in, &mut self.ffn_out]
    }
}

/// An error if a text is no input of the model.
fn check_ids(config: &Config, ids: &[u32]) -> Result<()> {
    if ids.is_empty() || ids.len() > config.positions() {
        let positions = config.positions();
        return Err(Error::Invalid(format!("has {} tokens, the model takes 1 to {positions}", ids.len())));
    }
    match ids.iter().find(|&&id| id as usize >= config.vocabulary()) {
        Some(id) => {
            Err(Error::Invalid(format!("token id {id} is outside of the vocabulary of {}", config.vocabulary())))
        }
        None => Ok(()),
    }
}

/// Tokens of a batch, or an error if there are no texts, no tokens, or more than the model has positions for.
fn tokens_of(config: &Config, batch: usize, seq: usize) -> Result<usize> {
    if batch == 0 || seq == 0 || seq > config.positions() {
        return Err(Error::Invalid(format!(
            "a batch of {batch} texts of {seq} tokens; at least one text is needed, and 1 to {} tokens",
            config.positions()
        )));
    }
    checked_mul("tokens of a batch", batch, seq)
}

/// The activations of a batch on the device, which every encoder layer overwrites.
#[derive(Debug)]
struct States {
    batch: usize,
    seq: usize,
    lengths: Indices,
    /// What LayerNorm reads.
    sum: Tensor,
    /// What it writes: the state of each token, and the next residual.
    hidden: Tensor,
    /// Q, K and V of each token, one after the other.
    qkv: Tensor,
    attended: Tensor,
    /// Between the two linear layers of the feed-forward part.
    inner: Tensor,
}

impl States {
    /// Buffers for `batch` texts of `seq` tokens, all of these real until other lengths are written. An error if there
    /// are none, or more tokens than the model has positions for.
    fn new(device: &Device, config: &Config, dtype: DType, batch: usize, seq: usize) -> Result<Self> {
        let n = tokens_of(config, batch, seq)?;
        let d = config.hidden();
        let lengths = device.indices(batch)?;
        device.write_indices(&lengths, &vec![seq as u32; batch])?;
        let tensor = |cols| device.zeros(n, cols, dtype);
        let (sum, hidden, attended) = (tensor(d)?, tensor(d)?, tensor(d)?);
        let (qkv, inner) = (tensor(3 * d)?, tensor(config.intermediate())?);
        Ok(Self { batch, seq, lengths, sum, hidden, qkv, attended, inner })
    }

    /// `hidden` from `sum`.
    fn norm(&self, device: &Device, config: &Config, parts: &NormParts) -> Result<Prepared> {
        let Self { sum, hidden, .. } = self;
        device.prepare(&LayerNorm { x: sum, gamma: &parts.gamma, beta: &parts.beta, eps: config.eps(), y: hidden })
    }

    /// The call that pools on the device, if the model wants a pooling that this can do, and what a pass ends in: the
    /// pooled states, or those of all tokens. [`Pipeline::embeddings`] goes on from there.
    fn exit(&self, device: &Device, config: &Config, pipeline: &Pipeline) -> Result<(Option<Prepared>, Tensor)> {
        let &Self { batch, seq, ref lengths, hidden: ref x, .. } = self;
        let Some(normalize) = pipeline.on_device() else { return Ok((None, x.clone())) };
        let pooled = device.zeros(batch, config.hidden(), DType::F32)?;
        let call = device.prepare(&MeanPooling { x, lengths, batch, seq, normalize, y: &pooled })?;
        Ok((Some(call), pooled))
    }

    /// The calls of an encoder layer, from `hidden` to `hidden`, with the part that each belongs to.
    fn layer(
        &self,
        device: &Device,
        config: &Config,
        parts: &LayerParts,
        pinned: bool,
    ) -> Result<[(Part, Prepared); 7]> {
        let Self { batch, seq, lengths, sum, hidden, qkv, attended, inner } = self;
        let linear = |parts: &LinearParts, x: &Tensor, residual: Option<&Tensor>, y: &Tensor| {
            let io = Io { x, bias: Some(&parts.bias), residual, y };
            if pinned { parts.linear.pinned().prepare(&io) } else { parts.linear.prepare(&io) }
        };
        let attention = Attention::new(qkv, lengths, (*batch, *seq), config.heads(), attended);
        Ok([
            (Part::Gemm, linear(&parts.qkv, hidden, None, qkv)?),
            (Part::Attention, device.prepare(&attention)?),
            (Part::Gemm, linear(&parts.attended, attended, Some(hidden), sum)?),
            (Part::Rest, self.norm(device, config, &parts.attention_norm)?),
            (Part::Gemm, linear(&parts.ffn_in, hidden, None, inner)?),
            (Part::Gemm, linear(&parts.ffn_out, inner, Some(hidden), sum)?),
            (Part::Rest, self.norm(device, config, &parts.output_norm)?),
        ])
    }
}

/// What leads from ids to the states that enter the first encoder layer.
#[derive(Debug)]
struct Entrance {
    ids: Indices,
    /// The sum of embeddings and its norm.
    calls: [Prepared; 2],
    /// Ids and lengths of the batch that is being written.
    staging: Mutex<(Vec<u32>, Vec<u32>)>,
}

impl Entrance {
    fn new(parts: &Parts, states: &States) -> Result<Self> {
        let Parts { device, config, .. } = parts;
        let n = states.hidden.rows();
        let [ids, positions, types] = [device.indices(n)?, device.indices(n)?, device.indices(n)?];
        let each: Vec<u32> = (0..n).map(|token| (token % states.seq) as u32).collect();
        device.write_indices(&positions, &each)?;
        device.write_indices(&types, &vec![0; n])?;
        device.write_indices(&ids, &vec![0; n])?;
        let tables = [(&parts.words, &ids), (&parts.positions, &positions), (&parts.types, &types)];
        let calls = [
            device.prepare(&Embedding { tables: &tables, y: &states.sum })?,
            states.norm(device, config, &parts.norm)?,
        ];
        Ok(Self { ids, calls, staging: Mutex::new((vec![0; n], Vec::with_capacity(states.batch))) })
    }

    /// Writes ids, and their lengths where `states` has them.
    fn write<T: AsRef<[u32]>>(&self, parts: &Parts, states: &States, texts: &[T]) -> Result<()> {
        if texts.len() != states.batch {
            return Err(Error::Invalid(format!("{} texts for a batch of {}", texts.len(), states.batch)));
        }
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let (ids, lengths) = &mut *staging;
        // Padding has the first id, so that it is one of the table's.
        ids.fill(0);
        lengths.clear();
        for (i, (text, row)) in texts.iter().zip(ids.chunks_exact_mut(states.seq)).enumerate() {
            let text = text.as_ref();
            check_ids(&parts.config, text).map_err(|e| e.of_text(i))?;
            let Some(row) = row.get_mut(..text.len()) else {
                let e = Error::Invalid(format!("has {} tokens, the batch has room for {}", text.len(), states.seq));
                return Err(e.of_text(i));
            };
            row.copy_from_slice(text);
            lengths.push(text.len() as u32);
        }
        parts.device.write_indices(&self.ids, ids)?;
        parts.device.write_indices(&states.lengths, lengths)
    }
}

/// A forward pass for batches of one shape: its buffers on the device, and the calls that lead from ids to embeddings.
#[derive(Debug)]
pub struct Forward {
    parts: Arc<Parts>,
    entrance: Entrance,
    states: States,
    /// What the last call ends in.
    end: Tensor,
    calls: Vec<Prepared>,
    shares: Vec<Part>,
    /// Held from the writing of ids to the reading of embeddings.
    turn: Mutex<()>,
}

impl Forward {
    fn new(parts: Arc<Parts>, pinned: bool, batch: usize, seq: usize) -> Result<Self> {
        let Parts { device, config, dtype, .. } = &*parts;
        let states = States::new(device, config, *dtype, batch, seq)?;
        let entrance = Entrance::new(&parts, &states)?;
        let mut calls: Vec<_> = entrance.calls.iter().map(|call| (Part::Rest, call.clone())).collect();
        for layer in &parts.layers {
            calls.extend(states.layer(device, config, layer, pinned)?);
        }
        let (pool, end) = states.exit(device, config, &parts.pipeline)?;
        calls.extend(pool.map(|call| (Part::Rest, call)));
        let (shares, calls) = calls.into_iter().unzip();
        Ok(Self { parts: Arc::clone(&parts), entrance, states, end, calls, shares, turn: Mutex::default() })
    }

    /// Texts of a batch.
    pub fn batch(&self) -> usize {
        self.states.batch
    }

    /// Tokens of each, padding included.
    pub fn seq(&self) -> usize {
        self.states.seq
    }

    /// Writes token ids, runs, and reads the embeddings back, which on a GPU is a second submission: [`Forward::write`],
    /// [`Forward::run`] and a read that no other thread's call of this function comes between.
    pub fn embed<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Matrix> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(texts)?;
        self.run()?;
        let lengths: Vec<_> = texts.iter().map(|text| text.as_ref().len()).collect();
        self.parts.pipeline.embeddings(&self.parts.device.read(&self.end)?, self.seq(), &lengths)
    }

    /// Gives the next runs their texts, as many as the batch has, each of 1 to [`Forward::seq`] ids below the
    /// vocabulary's size. An [`Error::Text`] says which is not so.
    pub fn write<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<()> {
        self.entrance.write(&self.parts, &self.states, texts)
    }

    /// Computes hidden states and [embeddings](Forward::embeddings) of the texts written last, in one submission: on a GPU returns without
    /// waiting.
    pub fn run(&self) -> Result<()> {
        self.parts.device.submit(&self.calls)
    }

    /// The calls of a run in their order, each with the part that it belongs to: to be timed, or recorded into an
    /// embedder's encoder.
    pub fn calls(&self) -> impl Iterator<Item = (Part, &Prepared)> + Clone {
        self.shares.iter().copied().zip(&self.calls)
    }

    /// The last hidden states, `batch · seq x hidden`, in the activations' type. Those of padding mean nothing.
    pub fn hidden(&self) -> &Tensor {
        &self.states.hidden
    }

    /// The embeddings on the device, `batch x hidden`, f32. None where the host computes a part of the way from the last
    /// states to them, which [`Forward::embed`] does: where the model asks for more than the mean and its normalisation.
    pub fn embeddings(&self) -> Option<&Tensor> {
        self.parts.pipeline.all_on_device().then_some(&self.end)
    }
}
