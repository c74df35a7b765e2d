//! What samples leave open: an interval for a median and one for a ratio of medians, and when these are too wide.
//!
//! On a shared machine most samples of a call are alike and some are far off, so nothing here assumes how times are
//! distributed. Intervals are those of the [bootstrap](crate::bootstrap) over rounds of samples. A round has one sample
//! of every row, taken next to each other, and is drawn as a whole: what slows down all rows of a round alike widens
//! the interval of a median and not that of a ratio.
//!
//! The rules, which everything that shows a time or a ratio goes by:
//!
//! - A median is *noisy* if its interval reaches further than [`MEDIAN_BOUND`] of it to either side. Sampling goes on
//!   while one is, up to [`Policy::max_samples`]: a disturbance of a second or two is outlasted, a machine that is
//!   never quiet is not waited for.
//! - A ratio is *noisy* if its interval has 1 in it, so that the samples do not say which of the two is faster; or if
//!   it reaches further than [`RATIO_BOUND`] of the ratio to either side. A ratio has the noise of two medians.

use super::{Policy, median};
pub use crate::bootstrap::Interval;
use crate::bootstrap::resampled;

/// How far the interval of a median may reach from it, as a share of it.
pub const MEDIAN_BOUND: f64 = 0.05;

/// How far the interval of a ratio may reach from it, as a share of it.
pub const RATIO_BOUND: f64 = 0.1;

impl Interval {
    /// The interval of the median of some samples; `None` if there are none.
    ///
    /// ```
    /// use sparse24::measure::noise::Interval;
    /// assert_eq!(Interval::of_median(&[2.0; 10]), Some(Interval { low: 2.0, high: 2.0 }));
    /// // One sample of ten that is far off says nothing of the median.
    /// assert!(Interval::of_median(&[2.0, 2.0, 2.0, 2.0, 9.0, 2.0, 2.0, 2.0, 2.0, 2.0]).unwrap().high < 2.1);
    /// ```
    pub fn of_median(samples: &[f64]) -> Option<Self> {
        Self::of_rounds(samples.len(), |rounds, drawn| {
            drawn.extend(rounds.iter().map(|&round| samples[round]));
            median(drawn)
        })
    }

    /// The interval of `median(over) / median(under)`, whose samples were taken in the same rounds; `None` if there are
    /// none, or not as many of both.
    pub fn of_ratio(over: &[f64], under: &[f64]) -> Option<Self> {
        if over.len() != under.len() {
            return None;
        }
        Self::of_rounds(over.len(), |rounds, drawn| {
            drawn.extend(rounds.iter().map(|&round| over[round]));
            let above = median(drawn);
            drawn.clear();
            drawn.extend(rounds.iter().map(|&round| under[round]));
            above / median(drawn)
        })
    }

    /// The interval of what `figure` makes of some rounds. It is lent an empty buffer for samples.
    fn of_rounds(rounds: usize, mut figure: impl FnMut(&[usize], &mut Vec<f64>) -> f64) -> Option<Self> {
        let mut samples = Vec::with_capacity(rounds);
        Self::of(resampled(rounds, |drawn| {
            samples.clear();
            figure(drawn, &mut samples)
        }))
    }
}

/// A figure of some samples, what they leave open of it, and whether that is too much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// A median, or a ratio of two.
    pub value: f64,
    /// Where it lies.
    pub interval: Interval,
    /// By the rules of this [module](self).
    pub noisy: bool,
}

impl Estimate {
    /// The median of some samples; `None` if there are none.
    pub fn of_median(samples: &[f64]) -> Option<Self> {
        let interval = Interval::of_median(samples)?;
        let value = median(&mut samples.to_vec());
        Some(Self { value, interval, noisy: interval.reach(value) > MEDIAN_BOUND })
    }

    /// `median(over) / median(under)`, as [`Interval::of_ratio`]. Of samples to themselves it is 1, and that is known.
    pub fn of_ratio(over: &[f64], under: &[f64]) -> Option<Self> {
        let interval = Interval::of_ratio(over, under)?;
        let value = median(&mut over.to_vec()) / median(&mut under.to_vec());
        let may_be_one = (interval.low..=interval.high).contains(&1.0) && over != under;
        Some(Self { value, interval, noisy: may_be_one || interval.reach(value) > RATIO_BOUND })
    }
}

/// Whether another round of samples is to be taken after so many: there are not as many as the policy asks for, or the
/// median of one of these is noisy and there may be more.
///
/// ```
/// use sparse24::measure::{Policy, noise};
/// let (quiet, wild) = ([1.0; 10], [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
/// assert!(noise::wants_more(&Policy::FULL, 9, [&quiet[..9]]) && !noise::wants_more(&Policy::FULL, 10, [&quiet[..]]));
/// assert!(noise::wants_more(&Policy::FULL, 10, [&quiet[..], &wild]));
/// assert!(!noise::wants_more(&Policy::FULL, Policy::FULL.max_samples, [&wild[..]]));
/// ```
pub fn wants_more<'s>(policy: &Policy, rounds: usize, samples: impl IntoIterator<Item = &'s [f64]>) -> bool {
    let noisy = |of: &[f64]| Estimate::of_median(of).is_some_and(|median| median.noisy);
    rounds < policy.samples || rounds < policy.max_samples && samples.into_iter().any(noisy)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use rand_pcg::Pcg64;
    use rand_pcg::rand_core::{Rng, SeedableRng};

    use super::*;

    /// Samples of a machine that is slow by a factor in some rounds, and off by `jitter` in each.
    fn made_up(ms: f64, slow: &[f64], jitter: f64) -> Vec<f64> {
        let off = |i: usize| 1.0 + jitter * ((i * 7 % 10) as f64 / 4.5 - 1.0);
        slow.iter().enumerate().map(|(i, factor)| ms * factor * off(i)).collect()
    }

    fn noisy(samples: &[f64]) -> bool {
        Estimate::of_median(samples).unwrap().noisy
    }

    #[test]
    fn the_interval_of_a_median_covers_it_as_often_as_it_says() {
        // Exponential times, whose median is ln 2: far from symmetric.
        let mut rng = Pcg64::seed_from_u64(7);
        let mut draw = || -((f64::from(rng.next_u32()) + 0.5) / 2f64.powi(32)).ln();
        let mut covered = 0;
        for _ in 0..300 {
            let samples: Vec<f64> = (0..20).map(|_| draw()).collect();
            let Interval { low, high } = Interval::of_median(&samples).unwrap();
            covered += usize::from(low <= 2f64.ln() && 2f64.ln() <= high);
        }
        assert!((270..=298).contains(&covered), "{covered} of 300");
    }

    #[test]
    fn a_stray_sample_is_no_noise_and_a_restless_machine_is() {
        let mut slow = [1.0; 10];
        assert!(!noisy(&made_up(3.0, &slow, 0.03)));
        slow[4] = 10.0;
        assert!(!noisy(&made_up(3.0, &slow, 0.03)), "one of ten");
        (slow[1], slow[5], slow[7], slow[9]) = (2.0, 1.5, 1.8, 1.3);
        assert!(noisy(&made_up(3.0, &slow, 0.03)), "five of ten");
        assert!(noisy(&made_up(3.0, &[1.0; 10], 0.3)), "all of them");
    }

    /// Rows are slowed down alike in each round: their ratio is known where neither median is.
    #[test]
    fn what_slows_all_rows_alike_is_not_noise_of_their_ratio() {
        let slow = [1.0, 2.0, 1.4, 1.0, 1.9, 1.2, 1.7, 1.0, 1.5, 1.1];
        let (dense, own) = (made_up(3.0, &slow, 0.01), made_up(2.0, &slow, 0.01));
        assert!(noisy(&dense) && noisy(&own));
        let known = Estimate::of_ratio(&dense, &own).unwrap();
        assert!((known.value - 1.5).abs() < 0.03 && !known.noisy, "{known:?}");
        // The same samples in another order are not of the same rounds.
        let shuffled: Vec<f64> = (0..10).map(|i| own[i * 3 % 10]).collect();
        assert!(Estimate::of_ratio(&dense, &shuffled).unwrap().noisy);
    }

    #[test]
    fn a_ratio_is_noisy_where_it_may_be_one_or_is_known_too_badly() {
        let calm = [1.0; 10];
        let of = |a: f64, b: f64, jitter: f64| {
            // The jitters of the two are not alike.
            let other: Vec<f64> = made_up(b, &calm, jitter).into_iter().rev().collect();
            Estimate::of_ratio(&made_up(a, &calm, jitter), &other).unwrap().noisy
        };
        assert!(!of(1.5, 1.0, 0.01) && !of(1.0, 1.5, 0.01));
        assert!(of(1.0, 1.0, 0.01) && of(1.005, 1.0, 0.03) && of(1.0, 1.005, 0.03), "may be 1");
        // A small difference that the samples do show.
        assert!(!of(1.05, 1.0, 0.005));
        assert!(of(3.0, 1.0, 0.4), "far from 1, and known to no better than a tenth");
        // A row against itself.
        assert!(!Estimate::of_ratio(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]).unwrap().noisy);
        assert_eq!(Estimate::of_ratio(&[1.0, 2.0], &[1.0]), None);
        assert_eq!(Estimate::of_median(&[]), None);
    }

    #[test]
    fn sampling_goes_on_while_there_is_noise_and_ends_at_its_bound() {
        let policy = Policy { samples: 10, max_samples: 30, ..Policy::FULL };
        // Samples of subjects, as many rounds as are wanted.
        let sampled = |policy: &Policy, subjects: usize, sample: &dyn Fn(usize, usize) -> f64| {
            let mut samples = vec![Vec::new(); subjects];
            while wants_more(policy, samples[0].len(), samples.iter().map(Vec::as_slice)) {
                let round = samples[0].len();
                samples.iter_mut().enumerate().for_each(|(subject, samples)| samples.push(sample(round, subject)));
            }
            samples
        };
        // A neighbour who leaves after the eighth round disturbs the first samples of the second subject.
        let samples = sampled(&policy, 2, &|round, subject| match subject == 1 && round < 8 {
            true => 2.0 + (round % 4) as f64,
            false => 1.0,
        });
        let len = samples[0].len();
        assert!(10 < len && len < 30, "{len}");
        assert!(!noisy(&samples[1]));
        assert_eq!(samples[1][..4], [2.0, 3.0, 4.0, 5.0]);

        assert_eq!(sampled(&policy, 1, &|round, _| 1.0 + (round % 5) as f64)[0].len(), 30);
        let quick = Policy { samples: 3, max_samples: 3, ..Policy::QUICK };
        assert_eq!(sampled(&quick, 1, &|round, _| 1.0 + round as f64)[0].len(), 3);
    }
}
