//! Batches of texts that go through a graph part by part, their states kept on the host in between.
//!
//! Parts end where one value alone is live ([`Graph::cut_before`]), so that a state is one matrix a batch, and memory
//! does not grow with the model's depth. Invariant: the batches of a [`Batches`] come by length, so that neighbours
//! mostly have one shape and its buffers.

use std::sync::Arc;

use super::forward::{Forward, Parts};
use super::{Graph, Rows, ValueId};
use crate::error::{Error, Result, checked_mul};
use crate::matrix::{Element, Elements, Matrix, each_dtype};

/// How texts are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Most texts of a batch, at least one.
    pub texts: usize,
    /// Most tokens of a batch of several texts, padding included: bounds the memory of activations.
    pub tokens: usize,
}

impl Default for Batching {
    /// 32 texts, as long as they have no more than 8192 tokens.
    fn default() -> Self {
        Self { texts: 32, tokens: 8192 }
    }
}

/// Texts to go through the model together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Indices of the texts.
    pub texts: Vec<usize>,
    /// Tokens to which each is padded.
    pub seq: usize,
}

/// What a batch is padded to: so many that few shapes of batches occur and their buffers are used again. Steps of 8
/// tokens, and above 128 of a sixteenth of the next power of two, so that padding is never more than an eighth there
/// and 512 positions have 32 lengths.
fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of((tokens.next_power_of_two() / 16).max(8))
}

/// Puts texts of these numbers of tokens, none above `most`, into batches by length, the longest first.
///
/// ```
/// use sparse24::graph::{Batch, Batching, batches};
/// let plan = batches(&[3, 20, 5], 512, Batching { texts: 2, tokens: 8192 });
/// assert_eq!(plan, [Batch { texts: vec![1, 2], seq: 24 }, Batch { texts: vec![0], seq: 8 }]);
/// ```
pub fn batches(lengths: &[usize], most: usize, batching: Batching) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    // Stable: texts of one length stay in order, whatever the machine.
    order.sort_by_key(|&text| std::cmp::Reverse(lengths[text]));
    let mut batches = Vec::new();
    let mut rest = &order[..];
    while let Some(&longest) = rest.first() {
        let seq = padded(lengths[longest]).min(most.max(lengths[longest])).max(1);
        let most = batching.texts.min(batching.tokens / seq).max(1);
        let (texts, more) = rest.split_at(most.min(rest.len()));
        batches.push(Batch { texts: texts.to_vec(), seq });
        rest = more;
    }
    batches
}

/// All texts of a run, before the same node.
#[derive(Debug)]
pub(super) struct Batches {
    graph: Arc<Graph>,
    batches: Vec<BatchStates>,
    /// The node that runs next, and the value that is all it and those after it need of what was computed; none where
    /// that is nothing.
    at: (usize, Option<ValueId>),
}

/// One batch.
#[derive(Debug)]
pub(super) struct BatchStates {
    /// Which texts these are.
    pub(super) texts: Vec<usize>,
    /// Their tokens.
    ids: Vec<Vec<u32>>,
    /// Tokens of each with padding.
    pub(super) seq: usize,
    /// The value that is live, once for each model that the texts go through; nothing before the first node.
    states: Vec<Matrix>,
}

impl Batches {
    /// Texts, given as token ids, before the first node. An error if there are no texts, or one is no input of the
    /// model.
    pub(super) fn new<T: AsRef<[u32]>>(graph: &Arc<Graph>, texts: &[T], batching: Batching) -> Result<Self> {
        if texts.is_empty() {
            return Err(Error::invalid("there are no texts"));
        }
        for (i, text) in texts.iter().enumerate() {
            graph.check_ids(text.as_ref()).map_err(|e| e.of_text(i))?;
        }
        let lengths: Vec<_> = texts.iter().map(|text| text.as_ref().len()).collect();
        let plan = batches(&lengths, graph.limits().tokens, batching).into_iter();
        let batches = plan.map(|Batch { texts: of, seq }| {
            let ids = of.iter().map(|&text| texts[text].as_ref().to_vec()).collect();
            BatchStates { texts: of, ids, seq, states: Vec::new() }
        });
        Ok(Self { graph: Arc::clone(graph), batches: batches.collect(), at: (0, None) })
    }

    /// Number of texts.
    pub(super) fn texts(&self) -> usize {
        self.batches.iter().map(|batch| batch.texts.len()).sum()
    }

    /// Tokens of each text.
    pub(super) fn lengths(&self) -> Vec<usize> {
        let mut lengths = vec![0; self.texts()];
        for batch in &self.batches {
            batch.texts.iter().zip(batch.lengths()).for_each(|(&text, length)| lengths[text] = length);
        }
        lengths
    }

    /// The node before which they are.
    pub(super) fn node(&self) -> usize {
        self.at.0
    }

    /// Takes the texts to the last place up to `node` where one value alone is live: all of them, or none if that
    /// fails.
    pub(super) fn advance(&mut self, models: &[&Arc<Parts>], node: usize) -> Result<()> {
        let (to, live) = self.graph.cut_before(node);
        let Some(live) = live.filter(|_| to > self.at.0) else { return Ok(()) };
        let mut states = Vec::new();
        self.run(models, to, live, |_, values| {
            states.push(values);
            Ok(())
        })?;
        self.batches.iter_mut().zip(states).for_each(|(batch, states)| batch.states = states);
        self.at = (to, Some(live));
        Ok(())
    }

    /// Runs the nodes from where the texts are to before `to`, and hands a value of every batch to `done`, once for
    /// each model. The texts stay where they are.
    pub(super) fn run(
        &self,
        models: &[&Arc<Parts>],
        to: usize,
        value: ValueId,
        mut done: impl FnMut(&BatchStates, Vec<Matrix>) -> Result<()>,
    ) -> Result<()> {
        let (from, live) = self.at;
        if live == Some(value) {
            return self.batches.iter().try_for_each(|batch| done(batch, batch.states.clone()));
        }
        let mut kept: Option<Vec<Forward>> = None;
        for batch in &self.batches {
            let shape = (batch.ids.len(), batch.seq);
            // Given back before the next is made: this bounds what is allocated at once.
            let same = kept.take().filter(|forwards| forwards.iter().all(|f| (f.batch(), f.seq()) == shape));
            let forwards = match same {
                Some(same) => same,
                None => models
                    .iter()
                    .map(|parts| Forward::new(Arc::clone(parts), from..to, &[value], shape.0, shape.1))
                    .collect::<Result<Vec<_>>>()?,
            };
            let ends = forwards.iter().enumerate().map(|(model, forward)| {
                forward.write(&batch.ids)?;
                if let (Some(live), Some(state)) = (live.and_then(|v| forward.operand(v)), batch.states.get(model)) {
                    forward.device().write(live, state)?;
                }
                forward.run()?;
                let tapped = forward.tap(value).ok_or_else(|| Error::invalid("a value was not kept"))?;
                forward.device().read(tapped)
            });
            let ends = ends.collect::<Result<_>>()?;
            done(batch, ends)?;
            kept = Some(forwards);
        }
        Ok(())
    }
}

impl BatchStates {
    /// Tokens of each text.
    pub(super) fn lengths(&self) -> impl Iterator<Item = usize> + Clone {
        self.ids.iter().map(Vec::len)
    }

    /// The rows of a value that are no padding.
    pub(super) fn real(&self, x: &Matrix, rows: Rows) -> Result<Matrix> {
        fn gather<T: Element>(data: &[T], rows: impl Iterator<Item = usize>, cols: usize) -> Elements {
            T::wrap(rows.flat_map(|row| &data[row * cols..][..cols]).copied().collect())
        }
        if rows != Rows::Tokens {
            return Ok(x.clone());
        }
        let tokens = self.lengths().sum();
        checked_mul("inputs", tokens, x.cols())?;
        let rows = self.lengths().enumerate();
        let rows = rows.flat_map(|(text, length)| (0..length).map(move |token| text * self.seq + token));
        Matrix::new(tokens, x.cols(), each_dtype!(x.elements(), data => gather(data, rows, x.cols())))
    }
}
