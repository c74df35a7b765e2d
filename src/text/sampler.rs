//! Which token comes next: a choice among a model's logits.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by: below 1 likely tokens become more likely. At 0 the most likely one is taken.
    pub temperature: f64,
    /// Only the most likely tokens whose probabilities together reach this share are drawn from.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    /// The most likely token.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 24 }
    }
}

/// Draws tokens. The same seed draws the same ones from the same logits.
///
/// ```
/// use sparse24::text::{Sampler, Sampling};
/// let logits = [0.0, 5.0, 1.0, 4.9];
/// assert_eq!(Sampler::new(Sampling::default())?.sample(&logits)?, 1);
/// let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 0.9, seed: 1 })?;
/// let drawn: Vec<u32> = (0..100).map(|_| sampler.sample(&logits)).collect::<Result<_, _>>()?;
/// assert!(drawn.contains(&1) && drawn.contains(&3) && !drawn.contains(&0));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: Pcg64,
}

impl Sampler {
    /// An error unless the temperature is a finite number from 0 on, and the share is above 0 and at most 1.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let Sampling { temperature, top_p, seed } = sampling;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::invalid(format!("temperature is {temperature}, expected a number from 0 on")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::invalid(format!("top-p is {top_p}, expected a number above 0 and up to 1")));
        }
        Ok(Self { sampling, rng: Pcg64::seed_from_u64(seed) })
    }

    /// The next token. An error if a logit is NaN, or none is above -∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = most_likely(logits)?;
        let Sampling { temperature, top_p, .. } = self.sampling;
        if temperature == 0.0 {
            return Ok(best as u32);
        }
        let weight = |&x: &f32| (f64::from(x - logits[best]) / temperature).exp();
        let mut weights: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
        if top_p < 1.0 {
            let all: f64 = weights.iter().map(|(_, weight)| weight).sum();
            weights.sort_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
            let mut sum = 0.0;
            let kept = weights.iter().take_while(|(_, weight)| {
                let take = sum < top_p * all;
                sum += weight;
                take
            });
            let kept = kept.count();
            weights.truncate(kept);
        }
        let all: f64 = weights.iter().map(|(_, weight)| weight).sum();
        // 53 bits: every number is exact in f64, and below 1.
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * all;
        let drawn = weights.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        // Roundings may leave a little.
        Ok(drawn.map_or(best, |(token, _)| *token) as u32)
    }
}

/// The place of the largest logit, the first of several.
fn most_likely(logits: &[f32]) -> Result<usize> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &x) in logits.iter().enumerate() {
        if x.is_nan() {
            return Err(Error::invalid(format!("the model's logit of token {token} is NaN")));
        }
        if x > best.1 {
            best = (token, x);
        }
    }
    // Infinities have no differences.
    if best.1.is_finite() {
        Ok(best.0)
    } else {
        Err(Error::invalid(format!("the model's largest logit is {}", best.1)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// Shares of many draws lie within five standard deviations of the probabilities.
    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0f32, 0.0, -1.0, f32::NEG_INFINITY, 2.0];
        let draws = 20_000;
        for (temperature, top_p) in [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)] {
            let mut sampler = Sampler::new(Sampling { temperature, top_p, seed: 7 }).unwrap();
            let mut counts = [0; 5];
            (0..draws).for_each(|_| counts[sampler.sample(&logits).unwrap() as usize] += 1);
            let mut expected: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / temperature).exp()).collect();
            let all: f64 = expected.iter().sum();
            if top_p < 1.0 {
                // At temperature 2 tokens 4, 0 and 1 have 0.44, 0.27 and 0.16 of it: two of them are less than 0.8.
                assert!(expected[4] + expected[0] < 0.8 * all && expected[4] + expected[0] + expected[1] > 0.8 * all);
                expected[2] = 0.0;
            }
            let all: f64 = expected.iter().sum();
            for (count, expected) in counts.iter().zip(&expected) {
                let share = expected / all;
                let deviation = (share * (1.0 - share) / f64::from(draws)).sqrt();
                let got = f64::from(*count) / f64::from(draws);
                assert!((got - share).abs() <= 5.0 * deviation, "{temperature} {top_p}: {got} of {share}");
            }
        }
    }

    #[test]
    fn logits_that_say_nothing_are_refused() {
        let mut sampler = Sampler::new(Sampling { temperature: 1.0, ..Sampling::default() }).unwrap();
        for (logits, error) in [
            (&[0.0, f32::NAN][..], "the model's logit of token 1 is NaN"),
            (&[f32::NEG_INFINITY; 2], "the model's largest logit is -inf"),
            (&[f32::INFINITY, 0.0], "the model's largest logit is inf"),
            (&[], "the model's largest logit is -inf"),
        ] {
            assert_eq!(sampler.sample(logits).map_err(|e| e.to_string()), Err(error.to_owned()));
        }
        for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, f64::NAN)] {
            assert!(Sampler::new(Sampling { temperature, top_p, seed: 1 }).is_err());
        }
    }
}
