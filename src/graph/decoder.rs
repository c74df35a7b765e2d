//! Passes of a language model over the next tokens of some sequences, with a cache of the earlier ones.
//!
//! ```text
//!  new ids ─► body pass      the nodes before the head; attention puts keys and values into the cache
//!               │ states of all new tokens
//!               ▼
//!             rows           of each sequence its last new token, or all of them
//!               ▼
//!             head pass ───► logits
//! ```
//! The head is a third of a small model: of a prompt only the last token's logits are computed. A prompt goes through
//! the body in chunks, so that buffers stay small; the first chunk attends by [`Attention`](crate::Attention), later
//! ones and single tokens by [`CachedAttention`](crate::ops::CachedAttention).
//!
//! The cache has room for all sequences at their full length from the beginning: it does not grow with a text, and its
//! memory is known before the first token.
//!
//! Invariant: of each sequence the cache has the tokens that [`Decoder::lens`] counts; a call that fails leaves the
//! count as it was.

use std::sync::Arc;

use ndarray::ArrayView1;

use super::forward::{Caches, Forward, Parts};
use super::model::Model;
use super::{Graph, LinearLayer, Rows, ValueId};
use crate::engine::{Device, Indices, Prepared, Tensor};
use crate::error::{Error, Result, checked_mul};
use crate::matrix::Matrix;
use crate::ops::Embedding;

/// New tokens of a chunk, all sequences together, unless there are more sequences.
const CHUNK_TOKENS: usize = 2048;

/// Rows that [`Decoder::score`] computes logits of at once: at 100,000 tokens in a vocabulary 25 MB.
const SCORED_ROWS: usize = 64;

/// A language model with a cache of keys and values, for some sequences that grow by a token or by many.
///
/// A decode loop: logits of the last token, a choice among them, and again.
///
/// ```
/// use sparse24::graph::{Checkpoint, Model};
/// use sparse24::{DType, Device, models};
/// let graph = models::parse(r#"{"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2,
///     "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}"#)?;
/// let model = Model::new(&Device::cpu()?, &Checkpoint::random(graph, DType::F32, 24)?)?;
///
/// let mut decoder = model.decoder(1, 32)?;
/// let mut text = vec![11, 7, 42]; // a Tokenizer makes ids of a prompt
/// let mut new = text.clone();
/// while text.len() < 10 {
///     let logits = decoder.forward(&[&new])?;
///     let row = logits.view::<f32>()?;
///     // The most likely token. A sampler of your own goes here.
///     let next = (0..50).max_by(|&a, &b| row[[0, a]].total_cmp(&row[[0, b]])).unwrap_or(0) as u32;
///     text.push(next);
///     new = vec![next];
/// }
/// assert_eq!((text.len(), decoder.lens()), (10, &[9][..]));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoder {
    parts: Arc<Parts>,
    batch: usize,
    capacity: usize,
    /// What the head reads, and its place among the nodes.
    states: ValueId,
    head: usize,
    caches: Vec<Option<Tensor>>,
    past: Indices,
    lens: Vec<usize>,
    /// The pass over single tokens, if there was one, and that of the last other chunk.
    bodies: Vec<Body>,
    last: Option<Head>,
    scored: Option<Head>,
}

/// A pass up to the states that the head reads.
#[derive(Debug)]
struct Body {
    seq: usize,
    /// Whether it is for sequences without earlier tokens.
    is_first: bool,
    forward: Forward,
}

/// The head on some rows of the states of a body: gathered, and multiplied.
#[derive(Debug)]
struct Head {
    rows: Indices,
    forward: Forward,
    /// Of the body that it was used with last: its tokens, whether it was a first one, and the gathering of its rows.
    gather: Option<(usize, bool, Prepared)>,
}

impl Model {
    /// A decoder for `batch` sequences of up to `capacity` tokens each. An error unless the model is a language model:
    /// its nodes treat each token by itself or attend to earlier ones alone, and its last one is a
    /// [head](Graph::head).
    pub fn decoder(&self, batch: usize, capacity: usize) -> Result<Decoder> {
        Decoder::new(self.parts(), batch, capacity)
    }
}

/// The head of a language model's graph.
fn head_of(graph: &Graph) -> Result<LinearLayer<'_>> {
    let other = || Error::invalid("is no language model: its last layer has no logits");
    if graph.values().any(|(_, value)| value.rows != Rows::Tokens) {
        return Err(other());
    }
    let head = graph.head().ok_or_else(other)?;
    match graph.nodes()[..head.node].iter().find(|node| !node.op.is_causal()) {
        Some(node) => Err(Error::invalid(format!("{} needs more than earlier tokens", node.name))),
        None => Ok(head),
    }
}

impl Decoder {
    fn new(parts: Arc<Parts>, batch: usize, capacity: usize) -> Result<Self> {
        let Parts { device, graph, dtype, .. } = &*parts;
        graph.tokens_of(batch, capacity)?;
        let (head, states) = head_of(graph).map(|head| (head.node, head.x))?;
        let rows = checked_mul("tokens of a cache", batch, capacity)?;
        let cache = |node: &super::Node| match node.op.cache_width() {
            0 => Ok(None),
            width => device.zeros(rows, width, *dtype).map(Some),
        };
        let caches = graph.nodes()[..head].iter().map(cache).collect::<Result<_>>()?;
        let past = device.indices(batch)?;
        let decoder = Self {
            batch,
            capacity,
            states,
            head,
            caches,
            past,
            lens: vec![0; batch],
            bodies: Vec::new(),
            last: None,
            scored: None,
            parts: Arc::clone(&parts),
        };
        Ok(decoder)
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens that a sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that each sequence has.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.caches.iter().flatten().map(|cache| cache.rows() * cache.cols() * cache.dtype().bytes()).sum()
    }

    /// Forgets the tokens of a sequence from `len` on, if it has as many.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        if let Some(now) = self.lens.get_mut(sequence) {
            *now = len.min(*now);
        }
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.lens.fill(0);
    }

    /// Adds tokens to the sequences, to each its own, and returns the logits of the last of them: a row for each
    /// sequence, f32, which is of no meaning where there are no new tokens. An error names a text that grows past the
    /// capacity, or a token that the model does not have.
    pub fn forward<T: AsRef<[u32]>>(&mut self, new: &[T]) -> Result<Matrix> {
        let before = self.lens.clone();
        let logits = self.run(new)?;
        let read = self.device().read(&logits);
        if read.is_err() {
            self.lens = before;
        }
        read
    }

    /// As [`Decoder::forward`], with the logits left on the device: on a GPU it does not wait for them. The next call
    /// overwrites them.
    pub fn run<'a, T: AsRef<[u32]>>(&mut self, new: &'a [T]) -> Result<Tensor> {
        let new: Vec<&[u32]> = new.iter().map(AsRef::as_ref).collect();
        self.check(&new)?;
        // Whole chunks come last, and with them the last tokens of all sequences in the same pass.
        let each = self.chunk_tokens();
        let passes = new.iter().map(|ids| ids.len().div_ceil(each)).max().unwrap_or(0);
        if passes == 0 {
            return Err(Error::invalid("there is no new token"));
        }
        let mut lens = self.lens.clone();
        for left in (0..passes).rev() {
            let part = |ids: &&'a [u32]| {
                let before = |passes: usize| ids.len().saturating_sub(passes * each);
                &ids[before(left + 1)..before(left)]
            };
            let chunks: Vec<&[u32]> = new.iter().map(part).collect();
            let body = self.pass(&chunks, &lens)?;
            lens.iter_mut().zip(&chunks).for_each(|(len, chunk)| *len += chunk.len());
            if left == 0 {
                let seq = self.bodies[body].seq;
                let rows: Vec<u32> =
                    chunks.iter().enumerate().map(|(i, ids)| (i * seq + ids.len().saturating_sub(1)) as u32).collect();
                let mut head = self.last.take().map_or_else(|| self.new_head(self.batch), Ok)?;
                let run = self.run_head(&mut head, body, &rows, true);
                let logits = head.forward.output().clone();
                self.last = Some(head);
                run?;
                self.lens = lens;
                return Ok(logits);
            }
            self.device().submit(self.bodies[body].forward.prepared())?;
        }
        Err(Error::invalid("there is no new token"))
    }

    /// Adds tokens to the only sequence, and returns for each but the first the negative logarithm of the probability
    /// that the model gave it: a text's perplexity is the exponential of their mean. The first of `ids` is never
    /// scored, whatever came before it. An error if the decoder has several sequences, or a logit is NaN.
    pub fn score(&mut self, ids: &[u32]) -> Result<Vec<f64>> {
        if self.batch != 1 {
            return Err(Error::invalid(format!("one sequence is scored at a time, not {}", self.batch)));
        }
        self.check(&[ids])?;
        let mut losses = Vec::with_capacity(ids.len());
        let mut lens = self.lens.clone();
        for (chunk_at, chunk) in ids.chunks(CHUNK_TOKENS).enumerate() {
            let body = self.pass(&[chunk], &lens)?;
            lens[0] += chunk.len();
            let mut head = self.scored.take().map_or_else(|| self.new_head(SCORED_ROWS), Ok)?;
            for first in (0..chunk.len()).step_by(SCORED_ROWS) {
                // Rows past the last one are computed again and not read.
                let rows: Vec<u32> = (0..SCORED_ROWS).map(|row| (first + row).min(chunk.len() - 1) as u32).collect();
                self.run_head(&mut head, body, &rows, first == 0)?;
                let logits = self.device().read(head.forward.output())?;
                let next = chunk_at * CHUNK_TOKENS + first + 1;
                let targets = ids.iter().skip(next).take(SCORED_ROWS.min(chunk.len() - first));
                for (logits, &target) in logits.view::<f32>()?.rows().into_iter().zip(targets) {
                    losses.push(token_loss(logits, target)?);
                }
            }
            self.scored = Some(head);
        }
        self.lens = lens;
        Ok(losses)
    }

    /// The calls of one pass over `seq` new tokens of each sequence after those that it has, and of the head on the
    /// last of them, each with its operation's name: to be timed. They run on whatever ids were written last, and as
    /// often as wanted, for no count changes. [`Decoder::forward`] runs the same up to 2048 tokens in all; it cuts
    /// longer prompts into chunks. An error if there is no room for the tokens.
    pub fn calls(&mut self, seq: usize) -> Result<Vec<(&'static str, Prepared)>> {
        let ids = vec![vec![0; seq]; self.batch];
        let chunks: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        self.check(&chunks)?;
        if seq == 0 {
            return Err(Error::invalid("there is no new token"));
        }
        let body = self.pass(&chunks, &self.lens.clone())?;
        let mut head = self.last.take().map_or_else(|| self.new_head(self.batch), Ok)?;
        let rows: Vec<u32> = (1..=self.batch).map(|sequence| (sequence * seq - 1) as u32).collect();
        let gather = self.gather(&mut head, body)?;
        self.device().write_indices(&head.rows, &rows)?;
        let name = |(node, call): (&super::Node, &Prepared)| (node.op.name(), call.clone());
        let body = self.bodies[body].forward.calls().map(name);
        let calls = body.chain([("embedding", gather)]).chain(head.forward.calls().map(name)).collect();
        self.last = Some(head);
        Ok(calls)
    }

    /// The most new tokens of a sequence in one pass.
    fn chunk_tokens(&self) -> usize {
        (CHUNK_TOKENS / self.batch).max(1)
    }

    fn device(&self) -> &Device {
        &self.parts.device
    }

    /// An error unless these can be added to the sequences.
    fn check(&self, new: &[&[u32]]) -> Result<()> {
        if new.len() != self.batch {
            return Err(Error::invalid(format!("{} texts for {} sequences", new.len(), self.batch)));
        }
        for (i, (ids, len)) in new.iter().zip(&self.lens).enumerate() {
            if !ids.is_empty() {
                self.parts.graph.check_ids(ids).map_err(|e| e.of_text(i))?;
            }
            if ids.len() > self.capacity - len {
                let (all, room) = (len + ids.len(), self.capacity);
                return Err(Error::invalid(format!("the text has {all} tokens; there is room for {room}")).of_text(i));
            }
        }
        Ok(())
    }

    /// Prepares a body for a chunk and writes its ids. Returns the body's place.
    fn pass(&mut self, chunks: &[&[u32]], lens: &[usize]) -> Result<usize> {
        let seq = chunks.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let is_first = lens.iter().all(|&len| len == 0);
        let found = self.bodies.iter().position(|body| body.seq == seq && body.is_first == is_first);
        let place = match found {
            Some(place) => place,
            None => {
                // One for single tokens stays, and one other.
                let is_single = |seq: usize, is_first: bool| seq == 1 && !is_first;
                let own = is_single(seq, is_first);
                self.bodies.retain(|body| is_single(body.seq, body.is_first) != own);
                let caches = Caches { tensors: &self.caches, past: &self.past, are_empty: is_first };
                let nodes = 0..self.head;
                let shape = (self.batch, seq);
                let forward = Forward::cached(Arc::clone(&self.parts), nodes, &[self.states], shape, Some(&caches))?;
                self.bodies.push(Body { seq, is_first, forward });
                for head in [&mut self.last, &mut self.scored].into_iter().flatten() {
                    head.gather = None;
                }
                self.bodies.len() - 1
            }
        };
        let past: Vec<u32> = lens.iter().map(|&len| len as u32).collect();
        let body = &self.bodies[place].forward;
        self.device().write_indices(&self.past, &past)?;
        body.write_next(chunks, &past)?;
        Ok(place)
    }

    /// The head for so many rows.
    fn new_head(&self, rows: usize) -> Result<Head> {
        let forward = Forward::new(Arc::clone(&self.parts), self.head..self.head + 1, &[], rows, 1)?;
        Ok(Head { rows: self.device().indices(rows)?, forward, gather: None })
    }

    /// The gathering of rows of a body's states for the head.
    fn gather(&self, head: &mut Head, body: usize) -> Result<Prepared> {
        let Body { seq, is_first, forward: body } = &self.bodies[body];
        if let Some((of, first, gather)) = &head.gather
            && (of, first) == (seq, is_first)
        {
            return Ok(gather.clone());
        }
        let missing = || Error::invalid("the head's states are not there");
        let states = body.tap(self.states).ok_or_else(missing)?;
        let y = head.forward.operand(self.states).ok_or_else(missing)?;
        let gather = self.device().prepare(&Embedding { tables: &[(states, &head.rows)], y })?;
        head.gather = Some((*seq, *is_first, gather.clone()));
        Ok(gather)
    }

    /// Runs the head on these rows of a body's states, and before it the body.
    fn run_head(&self, head: &mut Head, body: usize, rows: &[u32], with_body: bool) -> Result<()> {
        let gather = self.gather(head, body)?;
        self.device().write_indices(&head.rows, rows)?;
        let body = if with_body { self.bodies[body].forward.prepared() } else { &[] };
        let calls: Vec<Prepared> = body.iter().chain([&gather]).chain(head.forward.prepared()).cloned().collect();
        self.device().submit(&calls)
    }
}

/// The negative logarithm of a token's probability, by the logits.
pub(crate) fn token_loss(logits: ArrayView1<'_, f32>, token: u32) -> Result<f64> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m || x.is_nan() { x } else { m });
    let sum: f64 = logits.iter().map(|&x| f64::from((x - largest).exp())).sum();
    let loss = sum.ln() + f64::from(largest) - f64::from(logits[token as usize]);
    if loss.is_finite() { Ok(loss) } else { Err(Error::invalid("the model's logits are not finite")) }
}
