//! The bootstrap: what figures would have come out as, had the data been drawn anew (Efron, "Bootstrap Methods: Another
//! Look at the Jackknife", 1979).
//!
//! Rounds of samples, or texts of an evaluation, are drawn with replacement a thousand times, and the figure is
//! computed of each draw. What the middle 95 % of those span is its interval, whatever the data's distribution.
//! Invariant: draws are seeded and depend on the number of data alone, so that the same data give the same interval,
//! and two figures of as many data are compared on the same draws.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

/// Draws: enough for the ends of an interval to be good to a percentage point or two of probability.
pub const DRAWS: usize = 1000;

const SEED: u64 = 24;

/// Of the draws, those that lie below an interval, and those above: one of so many.
const BEYOND: usize = 40;

/// Where a figure lies with a probability of about 95 %.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize, serde::Deserialize))]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Interval {
    /// What the middle 95 % of these span; `None` if there are none.
    pub fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        let beyond = figures.len() / BEYOND;
        Some(Self { low: *figures.get(beyond)?, high: *figures.get(figures.len() - 1 - beyond)? })
    }

    /// How far it reaches from a figure, to the side where it reaches further, as a share of the figure.
    pub fn reach(self, figure: f64) -> f64 {
        (self.high - figure).max(figure - self.low) / figure
    }

    /// Whether a difference may as well be none.
    pub fn has_zero(self) -> bool {
        self.low <= 0.0 && 0.0 <= self.high
    }
}

/// What `figure` makes of each of [`DRAWS`] draws: it is given the places of so many data among them. Empty where there
/// are no data.
///
/// ```
/// use sparse24::bootstrap::{Interval, resampled};
/// let data = [4.0, 5.0, 6.0, 5.0, 4.0, 6.0, 5.0, 5.0];
/// let means = resampled(data.len(), |drawn| drawn.iter().map(|&at| data[at]).sum::<f64>() / data.len() as f64);
/// let mean = Interval::of(means).unwrap();
/// assert!(4.0 < mean.low && mean.low < 5.0 && 5.0 < mean.high && mean.high < 6.0);
/// ```
pub fn resampled<T>(data: usize, mut figure: impl FnMut(&[usize]) -> T) -> Vec<T> {
    if data == 0 {
        return Vec::new();
    }
    let mut draw = Pcg64::seed_from_u64(SEED);
    let mut drawn = vec![0; data];
    let figure = |_| {
        // The high half of a product: an index below `data`, as good as uniform for any number of them.
        drawn.fill_with(|| ((u128::from(draw.next_u64()) * data as u128) >> 64) as usize);
        figure(&drawn)
    };
    (0..DRAWS).map(figure).collect()
}
