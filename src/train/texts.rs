//! The texts of a run: which are trained on, which are held out, and what batches have them.
//!
//! Every text has a first batch: its batch of epoch 0, or for a held-out text the batch in which it is evaluated.
//! Cached values of a text were computed in its first batch, so that they have the same bits whichever batch asks for
//! them first.

use std::sync::Arc;

use super::kept::HiddenStateCache;
use super::{TrainOptions, order};
use crate::error::{Error, Result};
use crate::graph::{Graph, Rows, ValueId};

/// What padding goes to: shapes that occur again.
const PADDED: usize = 8;

/// Token ids of texts; their numbers are places in this list.
#[derive(Debug)]
pub(super) struct Texts {
    /// Those that are trained on first.
    ids: Vec<Arc<[u32]>>,
    trained: usize,
    numbers: Vec<usize>,
    /// Those of epoch 0, then those of the held-out texts.
    first_batches: Vec<Vec<usize>>,
    /// How many of them are of epoch 0.
    of_trained: usize,
    /// Of each text the place of its first batch.
    first_batch: Vec<usize>,
    /// Most tokens of a text.
    limit: usize,
    batch: usize,
    seed: u64,
}

impl Texts {
    /// How many of so many texts are held out. An error if they are too few.
    pub(super) fn held_out_of(texts: usize, options: &TrainOptions) -> Result<usize> {
        let wanted = ((texts as f64 * options.held_out) as usize).min(options.max_held_out);
        if wanted == 0 || texts < 2 * options.batch {
            return Err(Error::invalid(format!(
                "{texts} texts are too few to retrain on: {} are needed, of which some are held out",
                (2 * options.batch).max((1.0 / options.held_out).ceil() as usize)
            )));
        }
        Ok(wanted)
    }

    /// Every so manyth text is held out, up to the most of them. An error if there are too few.
    pub(super) fn new(texts: Vec<Vec<u32>>, limit: usize, options: &TrainOptions) -> Result<Self> {
        let wanted = Self::held_out_of(texts.len(), options)?;
        let every = texts.len() / wanted;
        let [mut ids, mut held_out]: [Vec<Arc<[u32]>>; 2] = Default::default();
        for (i, text) in texts.into_iter().enumerate() {
            let to = if i % every == 0 && held_out.len() < wanted { &mut held_out } else { &mut ids };
            to.push(text.into());
        }
        held_out.sort_by_key(|text| text.len());
        let trained = ids.len();
        ids.extend(held_out);
        let numbers = (0..ids.len()).collect();
        let mut texts = Self {
            ids,
            trained,
            numbers,
            first_batches: Vec::new(),
            of_trained: 0,
            first_batch: Vec::new(),
            limit,
            batch: options.batch,
            seed: options.seed,
        };
        let mut first_batches = texts.epoch(0);
        texts.of_trained = first_batches.len();
        first_batches.extend(texts.held_out().chunks(texts.batch).map(<[_]>::to_vec));
        texts.first_batch = vec![0; texts.ids.len()];
        for (at, batch) in first_batches.iter().enumerate() {
            batch.iter().for_each(|&text| texts.first_batch[text] = at);
        }
        texts.first_batches = first_batches;
        Ok(texts)
    }

    /// The token ids of all.
    pub(super) fn all(&self) -> &[Arc<[u32]>] {
        &self.ids
    }

    /// The token ids of those that are trained on.
    pub(super) fn trained(&self) -> &[Arc<[u32]>] {
        &self.ids[..self.trained]
    }

    /// The numbers of those that are held out, short ones first.
    pub(super) fn held_out(&self) -> &[usize] {
        &self.numbers[self.trained..]
    }

    pub(super) fn is_held_out(&self, text: usize) -> bool {
        text >= self.trained
    }

    /// The token ids of a batch.
    pub(super) fn ids(&self, batch: &[usize]) -> Vec<Arc<[u32]>> {
        batch.iter().map(|&text| Arc::clone(&self.ids[text])).collect()
    }

    /// The rows of a batch's tokens that are no padding.
    pub(super) fn real_rows(&self, batch: &[usize]) -> Vec<u32> {
        let seq = self.seq(batch);
        let of = |(at, &text): (usize, &usize)| (at * seq..at * seq + self.ids[text].len()).map(|row| row as u32);
        batch.iter().enumerate().flat_map(of).collect()
    }

    /// Tokens of each text of a batch, padding included.
    pub(super) fn seq(&self, batch: &[usize]) -> usize {
        let longest = batch.iter().map(|&text| self.ids[text].len()).max().unwrap_or(1);
        longest.next_multiple_of(PADDED).min(self.limit.max(longest))
    }

    /// The batches of an epoch of those that are trained on.
    pub(super) fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let lengths: Vec<usize> = self.trained().iter().map(|text| text.len()).collect();
        order::epoch(&lengths, self.batch, self.seed, epoch)
    }

    /// The batches of epoch 0.
    pub(super) fn first_batches(&self) -> &[Vec<usize>] {
        &self.first_batches[..self.of_trained]
    }

    /// The first batch of a text.
    pub(super) fn first_batch(&self, text: usize) -> &[usize] {
        &self.first_batches[self.first_batch[text]]
    }

    /// An empty cache of a value, for those texts for which it is wanted.
    pub(super) fn room(&self, graph: &Graph, value: ValueId, wanted: impl Fn(usize) -> bool) -> HiddenStateCache {
        HiddenStateCache::new(self.rows(graph, value, wanted), graph.value(value).cols)
    }

    /// Bytes of that.
    pub(super) fn room_bytes(&self, graph: &Graph, value: ValueId, wanted: impl Fn(usize) -> bool) -> u64 {
        HiddenStateCache::bytes_of(self.rows(graph, value, wanted).sum(), graph.value(value).cols)
    }

    /// A value's rows of each text; none where it is not wanted.
    fn rows(&self, graph: &Graph, value: ValueId, wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = usize> {
        let of = graph.value(value).rows;
        self.ids.iter().enumerate().map(move |(text, ids)| match of {
            _ if !wanted(text) => 0,
            Rows::Sequences => 1,
            Rows::Tokens => ids.len(),
            Rows::Each(rows) => rows,
        })
    }
}
