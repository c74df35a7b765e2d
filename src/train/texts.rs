//! The texts of a run: which are trained on, which are held out, and what batches have them.
//!
//! Every text has a home: the batch of the first epoch that it is in, or of those that are held out. What is kept of a
//! text was computed in its home, so that it has the same bits whichever batch asks for it first.

use std::sync::Arc;

use super::kept::Kept;
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
    /// Those of texts that are trained on first.
    homes: Vec<Vec<usize>>,
    of_trained: usize,
    /// Of each text the place of its home.
    home: Vec<usize>,
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
            homes: Vec::new(),
            of_trained: 0,
            home: Vec::new(),
            limit,
            batch: options.batch,
            seed: options.seed,
        };
        let mut homes = texts.epoch(0);
        texts.of_trained = homes.len();
        homes.extend(texts.held_out().chunks(texts.batch).map(<[_]>::to_vec));
        texts.home = vec![0; texts.ids.len()];
        for (at, home) in homes.iter().enumerate() {
            home.iter().for_each(|&text| texts.home[text] = at);
        }
        texts.homes = homes;
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

    /// The batches of the first epoch.
    pub(super) fn homes(&self) -> &[Vec<usize>] {
        &self.homes[..self.of_trained]
    }

    /// The home of a text.
    pub(super) fn home(&self, text: usize) -> &[usize] {
        &self.homes[self.home[text]]
    }

    /// Room for a value of those texts for which it is wanted.
    pub(super) fn room(&self, graph: &Graph, value: ValueId, wanted: impl Fn(usize) -> bool) -> Kept {
        Kept::new(self.rows(graph, value, wanted), graph.value(value).cols)
    }

    /// Bytes of that.
    pub(super) fn room_bytes(&self, graph: &Graph, value: ValueId, wanted: impl Fn(usize) -> bool) -> u64 {
        Kept::bytes_of(self.rows(graph, value, wanted).sum(), graph.value(value).cols)
    }

    /// A value's rows of each text; none where it is not wanted.
    fn rows(&self, graph: &Graph, value: ValueId, wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = usize> {
        let of = graph.value(value).rows;
        self.ids.iter().enumerate().map(move |(text, ids)| match of {
            _ if !wanted(text) => 0,
            Rows::Sequences => 1,
            Rows::Tokens => ids.len(),
        })
    }
}
