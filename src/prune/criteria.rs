//! Criteria that score every weight by itself: magnitude, second order on the diagonal, Wanda.
//!
//! Each score is |w|ᵖ·f_c with a factor for the column, summed over the V rows that share a pattern; the two positions
//! with the highest sum of each group stay.
//!
//! | criterion | score | idea |
//! |---|---|---|
//! | magnitude, L1 | \|w\| | what is small matters least (Han et al. 2015, [arXiv:1506.02626](https://arxiv.org/abs/1506.02626)) |
//! | magnitude, L2 | w² | the same for V = 1; over V rows, one large weight outweighs several small ones |
//! | second order, diagonal | ½·h·w² | the loss's Taylor term with h on the diagonal (LeCun et al., "Optimal Brain Damage", NIPS 1989); here h = Σx² / tokens, the layer's own output error |
//! | Wanda | \|w\|·‖x‖₂ | weight times the norm of its input (Sun et al. 2023, [arXiv:2306.11695](https://arxiv.org/abs/2306.11695)) |
//!
//! At V = 1 the last two order weights alike; they differ in how rows add up. Invariant: a weight that `within` leaves
//! out stays out.

use ndarray::Array2;

use super::Statistics;
use crate::error::{Error, Result, expect_shape};
use crate::mask::{Mask, Mask24, VectorLen};
use crate::matrix::Matrix;

/// How the magnitudes of the weights of V rows add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Σ|w|.
    L1,
    /// Σw².
    L2,
}

/// A score for every weight of a matrix.
#[derive(Clone, Debug)]
pub struct Criterion {
    norm: Norm,
    /// A factor for every column, or 1 for all.
    columns: Option<Vec<f64>>,
}

impl Criterion {
    /// The weight's own size.
    pub fn magnitude(norm: Norm) -> Self {
        Self { norm, columns: None }
    }

    /// ½·h·w², with h = Σx²/tokens: the mean squared error of the output if this weight alone were removed, halved.
    pub fn second_order(statistics: &Statistics) -> Self {
        let tokens = statistics.tokens().max(1) as f64;
        let columns = statistics.squares().iter().map(|h| 0.5 * h / tokens).collect();
        Self { norm: Norm::L2, columns: Some(columns) }
    }

    /// |w|·‖x‖₂.
    pub fn wanda(statistics: &Statistics) -> Self {
        let columns = statistics.squares().iter().map(|h| h.sqrt()).collect();
        Self { norm: Norm::L1, columns: Some(columns) }
    }

    /// The score of every weight of `w`, `m x k`; those that `within` leaves out score zero. An error if the number of
    /// columns is not the criterion's, or names the first NaN.
    pub fn scores(&self, w: &Matrix, within: Option<&Mask>) -> Result<Array2<f32>> {
        self.check(w, within)?;
        let mut scores = w.to_array();
        for ((row, col), x) in scores.indexed_iter_mut() {
            if x.is_nan() {
                return Err(Error::nan(row, col));
            }
            *x = self.score(*x, col, within.is_none_or(|mask| mask.get(row, col))) as f32;
        }
        Ok(scores)
    }

    /// Keeps the two positions of every group with the highest sum of scores over the V rows, ties to the lower column.
    /// Of these, each row keeps what `within` keeps, so that masks compose: a position that it leaves out of all V rows
    /// takes no place. Sums are in f64. Errors are those of [`Criterion::scores`].
    ///
    /// ```
    /// use sparse24::prune::{Criterion, Norm, Statistics};
    /// use sparse24::{Mask, Matrix, VectorLen};
    /// let w = Matrix::from_f32(1, 4, &[4., 3., 2., 1.])?;
    /// let kept = |c: &Criterion, within| Ok::<_, sparse24::Error>(c.mask(&w, VectorLen::ONE, within)?.mask().words()[0]);
    /// assert_eq!(kept(&Criterion::magnitude(Norm::L1), None)?, 0b0011);
    ///
    /// // The last input is the loudest.
    /// let mut statistics = Statistics::diagonal(4);
    /// statistics.add(&Matrix::from_f32(1, 4, &[1., 1., 1., 5.])?)?;
    /// assert_eq!(kept(&Criterion::wanda(&statistics), None)?, 0b1001);
    ///
    /// // What was pruned before stays pruned.
    /// let before = Mask::new(1, 4, vec![0b1110])?;
    /// assert_eq!(kept(&Criterion::wanda(&statistics), Some(&before))?, 0b1010);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn mask(&self, w: &Matrix, vector: VectorLen, within: Option<&Mask>) -> Result<Mask24> {
        self.check(w, within)?;
        let mut sums = vec![0f64; w.cols()];
        // -1 for a position that no row has.
        super::by_block(w.rows(), w.cols(), vector, |rows, patterns| {
            sums.fill(-1.0);
            for row in rows {
                for (col, sum) in sums.iter_mut().enumerate() {
                    let x = w.get(row, col);
                    if x.is_nan() {
                        return Err(Error::nan(row, col));
                    }
                    if within.is_none_or(|mask| mask.get(row, col)) {
                        *sum = sum.max(0.0) + self.score(x, col, true);
                    }
                }
            }
            patterns.extend(sums.chunks(4).map(best_two));
            Ok(())
        })?
        .within(within)
    }

    fn score(&self, w: f32, col: usize, kept: bool) -> f64 {
        let w = f64::from(w).abs();
        let size = match self.norm {
            Norm::L1 => w,
            Norm::L2 => w * w,
        };
        let factor = self.columns.as_ref().map_or(1.0, |columns| columns[col]);
        // Not ∞ · 0.
        if kept && factor > 0.0 { size * factor } else { 0.0 }
    }

    fn check(&self, w: &Matrix, within: Option<&Mask>) -> Result<()> {
        if let Some(columns) = &self.columns {
            expect_shape("weights", (w.rows(), w.cols()), (w.rows(), columns.len()))?;
        }
        within.map_or(Ok(()), |mask| expect_shape("mask", (mask.rows(), mask.cols()), (w.rows(), w.cols())))
    }
}

/// The positions of the two highest of up to four scores, ties to the lower one; a negative one is never taken.
fn best_two(scores: &[f64]) -> u8 {
    let better = |i: usize, j: usize| scores[j] > scores[i] || scores[j] == scores[i] && j < i;
    let kept = |&i: &usize| scores[i] >= 0.0 && (0..scores.len()).filter(|&j| better(i, j)).count() < 2;
    (0..scores.len()).filter(kept).fold(0, |bits, i| bits | 1 << i)
}
