//! The texts of a run: which are trained on, which are held out, and what batches have them.
//!
//! Every text has a home: the batch of the first epoch that it is in, or of those that are held out. What is kept of a
//! text was computed in its home, so that it has the same bits whichever batch asks for it first.

use std::sync::Arc;

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use super::kept::Kept;
use super::{TrainOptions, order};
use crate::error::{Error, Result};
use crate::graph::{Graph, Rows, ValueId};

/// What padding goes to: shapes that occur again.
const PADDED: usize = 8;

/// Shares of a text's tokens that are replaced by others, in turn.
const REPLACED: [f64; 4] = [0.15, 0.3, 0.5, 1.0];

/// Separates the seeds of noise from those of epochs.
const NOISE: u64 = 0xd1b5_4a32_d192_ed03;

/// Some texts, by their numbers.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) texts: Vec<usize>,
    /// Whether they are as they were given: then what is kept of them holds.
    pub(super) is_given: bool,
    pub(super) ids: Vec<Arc<[u32]>>,
}

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
    /// Whether all begin, and end, with the same token.
    fixed: [bool; 2],
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
            return Err(Error::Invalid(format!(
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
        let (mut ids, mut held_out): (Vec<Arc<[u32]>>, Vec<Arc<[u32]>>) = (Vec::new(), Vec::new());
        for (i, text) in texts.into_iter().enumerate() {
            let to = if i % every == 0 && held_out.len() < wanted { &mut held_out } else { &mut ids };
            to.push(text.into());
        }
        held_out.sort_by_key(|text| text.len());
        let trained = ids.len();
        ids.extend(held_out);
        let numbers = (0..ids.len()).collect();
        let same = |of: fn(&[u32]) -> Option<&u32>| ids.iter().all(|text| of(text) == of(&ids[0]));
        let fixed = [same(<[u32]>::first), same(<[u32]>::last)];
        let mut texts = Self {
            ids,
            trained,
            numbers,
            homes: Vec::new(),
            of_trained: 0,
            home: Vec::new(),
            fixed,
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

    /// Texts as they were given.
    pub(super) fn batch(&self, texts: &[usize]) -> Batch {
        let ids = texts.iter().map(|&text| Arc::clone(&self.ids[text])).collect();
        Batch { texts: texts.to_vec(), is_given: true, ids }
    }

    /// Texts in which some tokens are any others of a vocabulary, all but one that every text begins or ends with. `at`
    /// tells batches apart.
    pub(super) fn noised(&self, texts: &[usize], vocabulary: usize, at: u64) -> Batch {
        let mut rng = Pcg64::seed_from_u64(self.seed.wrapping_add(at.wrapping_add(1).wrapping_mul(NOISE)));
        let fixed = self.fixed;
        let noised = |(i, &text): (usize, &usize)| {
            let ids = &self.ids[text];
            let free = usize::from(fixed[0])..ids.len() - usize::from(fixed[1]).min(ids.len());
            // A share of 2⁶⁴.
            let limit = (REPLACED[i % REPLACED.len()] * 2f64.powi(64)) as u64;
            let id = |(place, &id): (usize, &u32)| {
                let [drawn, other] = [rng.next_u64(), rng.next_u64() % vocabulary as u64];
                if free.contains(&place) && drawn <= limit { other as u32 } else { id }
            };
            ids.iter().enumerate().map(id).collect()
        };
        Batch { texts: texts.to_vec(), is_given: false, ids: texts.iter().enumerate().map(noised).collect() }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn noise_replaces_shares_of_tokens_between_those_that_all_have() {
        let ids = |i: u32| [vec![101], (0..98).map(|t| 1000 + i + t).collect(), vec![102]].concat();
        let options = TrainOptions { held_out: 0.1, batch: 16, ..TrainOptions::default() };
        let texts = Texts::new((0..40).map(ids).collect(), 512, &options).unwrap();
        let home = texts.homes()[0].clone();
        let (given, noised) = (texts.batch(&home), texts.noised(&home, 30_000, 7));
        assert!(given.is_given && !noised.is_given && given.texts == noised.texts);
        let mut shares = [0.0; 4];
        for (i, (given, noised)) in given.ids.iter().zip(&noised.ids).enumerate() {
            assert!(noised.len() == 100 && (noised[0], noised[99]) == (101, 102));
            shares[i % 4] += given.iter().zip(&noised[..]).filter(|(a, b)| a != b).count() as f64 / 98.0 / 4.0;
        }
        for (share, wanted) in shares.into_iter().zip(REPLACED) {
            // Three standard deviations of 4 texts of 98 tokens each.
            assert!((share - wanted).abs() <= 0.08, "{share}, not {wanted}");
        }
        assert_eq!(noised.ids, texts.noised(&home, 30_000, 7).ids);
        assert_ne!(noised.ids, texts.noised(&home, 30_000, 8).ids);
        // Where texts begin differently the first token is one as any other.
        let bare = Texts::new((0..40).map(|i| vec![i; 50]).collect(), 512, &options).unwrap();
        let noised = bare.noised(&bare.homes()[0].clone(), 30_000, 7);
        assert_ne!(noised.ids[3][0], bare.batch(&bare.homes()[0].clone()).ids[3][0]);
    }
}
