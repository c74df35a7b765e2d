//! In which order texts are trained on: batches of like length, mixed anew in every epoch.
//!
//! Texts are shuffled, cut into pools of [`POOL`] batches, and sorted by length within each, so that a batch holds
//! little padding and texts of one length are spread over the epoch; then the batches of a pool are shuffled.
//! Invariant: the order follows from the seed, the number of the epoch and the lengths alone, so that a run that is
//! resumed goes on with the batches that it would have had.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

/// Batches of a pool: enough for neighbours in length to be neighbours.
const POOL: usize = 16;

/// Separates the seeds of epochs.
const EPOCHS: u64 = 0x9e37_79b9_7f4a_7c15;

/// The batches of an epoch: of each the numbers of its texts. The last may be smaller than the others.
pub(super) fn epoch(lengths: &[usize], batch: usize, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    let mut rng = Pcg64::seed_from_u64(seed.wrapping_add(epoch.wrapping_add(1).wrapping_mul(EPOCHS)));
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    shuffle(&mut order, &mut rng);
    let mut batches = Vec::new();
    for pool in order.chunks_mut(POOL * batch) {
        pool.sort_by_key(|&text| lengths[text]);
        let first = batches.len();
        batches.extend(pool.chunks(batch).map(<[usize]>::to_vec));
        shuffle(&mut batches[first..], &mut rng);
    }
    batches
}

/// Fisher and Yates's.
pub(super) fn shuffle<T>(items: &mut [T], rng: &mut Pcg64) {
    for last in (1..items.len()).rev() {
        // The remainder of 64 bits favours no place by more than the number of items over 2⁶⁴.
        items.swap(last, (rng.next_u64() % (last as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_text_once_in_batches_of_like_length() {
        let lengths: Vec<usize> = (0..1003).map(|i| 3 + i * 7919 % 97).collect();
        let batches = epoch(&lengths, 32, 24, 0);
        let mut seen: Vec<usize> = batches.concat();
        seen.sort_unstable();
        assert!(seen == (0..1003).collect::<Vec<_>>() && batches.iter().all(|batch| batch.len() <= 32));
        let padding = |batches: &[Vec<usize>]| -> usize {
            let of = |batch: &Vec<usize>| {
                let longest = batch.iter().map(|&text| lengths[text]).max().unwrap_or(0);
                batch.iter().map(|&text| longest - lengths[text]).sum::<usize>()
            };
            batches.iter().map(of).sum()
        };
        let plain: Vec<Vec<usize>> = (0..1003).collect::<Vec<_>>().chunks(32).map(<[usize]>::to_vec).collect();
        assert!(padding(&batches) * 5 < padding(&plain), "{} of {}", padding(&batches), padding(&plain));
    }

    #[test]
    fn the_order_follows_from_seed_and_epoch() {
        let lengths: Vec<usize> = (0..100).map(|i| i % 11 + 1).collect();
        assert_eq!(epoch(&lengths, 8, 1, 3), epoch(&lengths, 8, 1, 3));
        assert_ne!(epoch(&lengths, 8, 1, 3), epoch(&lengths, 8, 1, 4));
        assert_ne!(epoch(&lengths, 8, 1, 3), epoch(&lengths, 8, 2, 3));
    }
}
