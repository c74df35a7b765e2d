//! What a model's quality is measured by, correlations and means, and how much a figure owes to the sample that it is
//! of: the [`bootstrap`] over texts.
//!
//! The texts, or pairs of texts, are drawn anew, and the figure is computed of what was drawn. Invariant: two models
//! are compared on the same draws, so that what is hard for both does not count as noise.

use crate::bootstrap::{self, DRAWS, Interval};

/// A number to twelve decimals, far below what is measured: with so few digits JSON is read back exactly, so that a run
/// that was interrupted and goes on writes the same file.
pub(crate) fn rounded(x: f64) -> f64 {
    (x * 1e12).round() / 1e12
}

/// A number for each text or pair, and how numbers are drawn from them.
#[derive(Clone, Debug)]
pub enum Statistic {
    /// Their mean.
    Mean,
    /// Pearson's correlation with these.
    Pearson(Vec<f64>),
    /// Spearman's correlation with these.
    Spearman(Ranking),
}

/// The order of numbers.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// Indices of the numbers, from the smallest.
    order: Vec<usize>,
    /// Where in `order` each run of equal numbers ends.
    ends: Vec<usize>,
}

impl Ranking {
    /// Sorts them.
    pub fn new(numbers: &[f64]) -> Self {
        let mut order: Vec<usize> = (0..numbers.len()).collect();
        order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
        let mut ends = Vec::new();
        for run in order.chunk_by(|&a, &b| numbers[a] == numbers[b]) {
            ends.push(ends.last().copied().unwrap_or(0) + run.len());
        }
        Self { order, ends }
    }

    /// The rank of each number among so many copies of each, equal ones sharing the mean of their ranks.
    fn ranks(&self, counts: &[u32], ranks: &mut [f64]) {
        let (mut start, mut below) = (0, 0);
        for &end in &self.ends {
            let run = &self.order[start..end];
            let copies: u32 = run.iter().map(|&i| counts[i]).sum();
            let mean = f64::from(below) + f64::from(copies + 1) / 2.0;
            run.iter().for_each(|&i| ranks[i] = mean);
            below += copies;
            start = end;
        }
    }
}

/// Spearman's correlation of numbers of which there are so many copies each; `None` where one side is constant.
fn weighted_spearman(x: &Ranking, y: &Ranking, counts: &[u32], space: &mut [Vec<f64>; 2]) -> Option<f64> {
    let [rx, ry] = space;
    x.ranks(counts, rx);
    y.ranks(counts, ry);
    // Shared ranks leave the sum of all ranks as it is.
    let mean = (f64::from(counts.iter().sum::<u32>()) + 1.0) / 2.0;
    correlation([rx, ry], [mean, mean], counts)
}

/// Pearson's correlation of numbers of which there are so many copies each; `None` where one side is constant.
fn weighted_pearson(x: &[f64], y: &[f64], counts: &[u32]) -> Option<f64> {
    let all = f64::from(counts.iter().sum::<u32>());
    let mean = |of: &[f64]| of.iter().zip(counts).map(|(x, &count)| f64::from(count) * x).sum::<f64>() / all;
    correlation([x, y], [mean(x), mean(y)], counts)
}

/// The correlation of numbers with these means.
fn correlation([x, y]: [&[f64]; 2], [mean_x, mean_y]: [f64; 2], counts: &[u32]) -> Option<f64> {
    let (mut xy, mut xx, mut yy, mut all) = (0.0, 0.0, 0.0, 0.0);
    for ((&x, &y), &count) in x.iter().zip(y).zip(counts) {
        let (x, y, count) = (x - mean_x, y - mean_y, f64::from(count));
        xy += count * x * y;
        xx += count * x * x;
        yy += count * y * y;
        all += count;
    }
    // The mean of equal numbers may differ from them in its last digits, which are no variance.
    let varies = |squares: f64, mean: f64| squares > all * (1e-12 * mean).powi(2);
    (varies(xx, mean_x) && varies(yy, mean_y)).then(|| xy / (xx * yy).sqrt())
}

/// The values of a statistic on each draw.
fn resampled(statistic: &Statistic, numbers: &[f64]) -> Vec<Option<f64>> {
    let n = numbers.len();
    let own = Ranking::new(numbers);
    let (mut counts, mut space) = (vec![0u32; n], [vec![0.0; n], vec![0.0; n]]);
    bootstrap::resampled(n, |drawn| {
        counts.fill(0);
        drawn.iter().for_each(|&at| counts[at] += 1);
        match statistic {
            Statistic::Mean => Some(drawn.iter().map(|&at| numbers[at]).sum::<f64>() / n as f64),
            Statistic::Pearson(scores) => weighted_pearson(numbers, scores, &counts),
            Statistic::Spearman(scores) => weighted_spearman(&own, scores, &counts, &mut space),
        }
    })
}

/// What the middle 95 % of a statistic's values on draws span. None where it is undefined on a quarter of the draws or
/// more, as a correlation of two pairs is.
fn interval(values: Vec<f64>) -> Option<Interval> {
    if values.len() <= DRAWS / 4 * 3 {
        return None;
    }
    let Interval { low, high } = Interval::of(values)?;
    Some(Interval { low: rounded(low), high: rounded(high) })
}

impl Statistic {
    /// The interval of this statistic of these numbers; for a correlation as many as there are scores.
    ///
    /// # Panics
    /// If there are more numbers than scores.
    ///
    /// ```
    /// use sparse24::metrics::{Ranking, Statistic, spearman};
    /// let scores: Vec<f64> = (0..40).map(f64::from).collect();
    /// let found: Vec<f64> = (0..40).map(|i| f64::from(i + 9 * (i % 3))).collect();
    /// let interval = Statistic::Spearman(Ranking::new(&scores)).interval(&found).unwrap();
    /// let all = spearman(&found, &scores).unwrap();
    /// assert!(interval.low < all && all < interval.high && interval.high <= 1.0);
    /// ```
    pub fn interval(&self, numbers: &[f64]) -> Option<Interval> {
        interval(resampled(self, numbers).into_iter().flatten().collect())
    }
}

/// What other models are compared with: the numbers of one of them, on the same draws.
#[derive(Clone, Debug)]
pub struct PairedBootstrap {
    statistic: Statistic,
    first: Vec<Option<f64>>,
}

impl PairedBootstrap {
    /// With the numbers of the model that others are compared with, one for each text or pair.
    pub fn new(statistic: Statistic, first: &[f64]) -> Self {
        let first = resampled(&statistic, first);
        Self { statistic, first }
    }

    /// The interval of the statistic of the first model's numbers less that of these, which are as many.
    pub fn interval(&self, numbers: &[f64]) -> Option<Interval> {
        let second = resampled(&self.statistic, numbers);
        let both = self.first.iter().zip(second);
        interval(both.filter_map(|(first, second)| Some((*first)? - second?)).collect())
    }
}

/// Spearman's correlation of as many numbers; `None` where all numbers of one side are the same.
///
/// # Panics
/// If there are more of one than of the other.
pub fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    pearson(&ranks(x), &ranks(y))
}

/// The rank of each number, from 1; numbers that are equal share the mean of their ranks.
fn ranks(numbers: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
    let mut ranks = vec![0.0; numbers.len()];
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| numbers[a] == numbers[b]) {
        let mean = start as f64 + (tied.len() + 1) as f64 / 2.0;
        tied.iter().for_each(|&i| ranks[i] = mean);
        start += tied.len();
    }
    ranks
}

/// Pearson's correlation of as many numbers: the covariance over the product of the standard deviations; `None` where
/// one of these is zero.
///
/// # Panics
/// If there are more of one than of the other.
pub fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    assert_eq!(x.len(), y.len(), "numbers that are correlated come in pairs");
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mx, my) = (mean(x), mean(y));
    let sum = |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(x, y)| f(x - mx, y - my)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern, some of them equal.
    fn numbers(n: usize, step: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * step + i * i) % 23) as f64 / 7.0).collect()
    }

    /// Copies counted instead of written out.
    #[test]
    fn correlations_of_copies_are_those_of_the_numbers_written_out() {
        let (x, y) = (numbers(40, 5), numbers(40, 11));
        let mut space = [vec![0.0; 40], vec![0.0; 40]];
        for round in [1, 2, 3, 5, 6, 7] {
            let counts: Vec<u32> = (0..40).map(|i| (i * round % 4) as u32).collect();
            let copies = |numbers: &[f64]| -> Vec<f64> {
                numbers.iter().zip(&counts).flat_map(|(&x, &count)| std::iter::repeat_n(x, count as usize)).collect()
            };
            let expected = spearman(&copies(&x), &copies(&y)).unwrap_or(f64::NAN);
            let got = weighted_spearman(&Ranking::new(&x), &Ranking::new(&y), &counts, &mut space).unwrap_or(f64::NAN);
            assert!((got - expected).abs() < 1e-12, "{got}, {expected}");
            let expected = pearson(&copies(&x), &copies(&y)).unwrap_or(f64::NAN);
            let got = weighted_pearson(&x, &y, &counts).unwrap_or(f64::NAN);
            assert!((got - expected).abs() < 1e-12, "{got}, {expected}");
        }
        let (one, mut counts) = (Ranking::new(&x), vec![0; 40]);
        counts[3] = 40;
        assert_eq!(weighted_spearman(&one, &one, &counts, &mut space), None);
        // Thirty times 4.1 and its mean differ in their last digits.
        let constant = [4.1, 0.3].map(|x| vec![x; 3]);
        assert_eq!(weighted_pearson(&constant[0], &constant[1], &[10, 10, 10]), None);
    }

    /// For a mean of independent numbers the interval is known: about two standard errors to either side.
    #[test]
    fn the_interval_of_a_mean_is_that_of_its_standard_error() {
        let n = 400;
        let noise: Vec<f64> = (0..n).map(|i| f64::from((i * 7919 % 1009) as u16) / 1009.0 - 0.5).collect();
        let dense = vec![1.0; n];
        let mean = noise.iter().sum::<f64>() / n as f64;
        let deviation = (noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        let bootstrap = PairedBootstrap::new(Statistic::Mean, &dense);
        for shift in [0.0, 0.1] {
            let pruned: Vec<f64> = noise.iter().map(|x| 1.0 - x - shift).collect();
            let interval = bootstrap.interval(&pruned).unwrap_or(Interval { low: f64::NAN, high: f64::NAN });
            let half = 1.96 * deviation / (n as f64).sqrt();
            for (got, expected) in [(interval.low, mean + shift - half), (interval.high, mean + shift + half)] {
                assert!((got - expected).abs() < 0.1 * half, "{interval:?}: {expected}");
            }
            assert_eq!(interval.has_zero(), shift == 0.0, "{interval:?}");
        }
        assert_eq!(bootstrap.interval(&dense), Some(Interval { low: 0.0, high: 0.0 }));
    }

    /// What both models find hard is no noise: a small, even loss is seen although the correlation itself is uncertain.
    #[test]
    fn models_are_compared_on_the_same_draws() {
        let scores: Vec<f64> = (0..200).map(f64::from).collect();
        let wide: Vec<f64> = scores.iter().enumerate().map(|(i, x)| x + ((i * 89) % 211) as f64).collect();
        let worse: Vec<f64> = wide.iter().enumerate().map(|(i, x)| x + ((i * 37) % 61) as f64).collect();
        let statistic = || Statistic::Spearman(Ranking::new(&scores));
        let paired =
            PairedBootstrap::new(statistic(), &wide).interval(&worse).map(|i| i.high - i.low).unwrap_or(f64::NAN);
        let alone = resampled(&statistic(), &wide);
        let spread = |of: fn(f64, f64) -> f64| alone.iter().flatten().copied().reduce(of).unwrap_or(f64::NAN);
        assert!(paired < 0.6 * (spread(f64::max) - spread(f64::min)), "{paired}");
        // Two pairs: half of the draws are one pair twice.
        assert_eq!(
            PairedBootstrap::new(Statistic::Spearman(Ranking::new(&[1.0, 2.0])), &[1.0, 2.0]).interval(&[2.0, 1.0]),
            None
        );
    }

    #[test]
    fn ties_share_the_mean_of_their_ranks() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0, 3.0]), [4.0, 1.0, 4.0, 2.0, 4.0]);
        assert_eq!(ranks(&[0.0, -0.0]), [1.5, 1.5]);
        assert_eq!(ranks(&[]), [0.0; 0]);
    }

    /// Worked by hand: sums of products of the deviations from the mean, of the ranks and of the numbers.
    #[test]
    fn correlations_are_those_of_the_definition() {
        let (x, y) = ([1.0, 2.0, 2.0, 4.0, 5.0], [1.0, 3.0, 2.0, 2.0, 6.0]);
        let near =
            |got: Option<f64>, expected: f64| assert!((got.unwrap_or(f64::NAN) - expected).abs() < 1e-12, "{got:?}");
        near(spearman(&x, &y), 7.25 / 9.5);
        near(pearson(&x, &y), 9.8 / (10.8f64 * 14.8).sqrt());
        near(pearson(&x, &x.map(|x| -3.0 * x)), -1.0);
        assert_eq!(pearson(&x, &[7.0; 5]), None);
    }
}
