//! The oracle of mean pooling.
//!
//! # The bound
//! The mean as in [`super`]. Its length's square q: a sum of squares in d + 1 roundings, and 1/√max(q, 10⁻²⁴), as in
//! [`super`], or by a square root and a division, 10u. The product: one rounding. Results are f32.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, U, bounded, inverse_root, mean_of, square_error};
use crate::error::{Result, expect_shape};
use crate::matrix::{DType, Matrix};

/// Mean of each sequence's first `lengths` rows of `seq`, and that over its Euclidean length (at least 1e-12) if
/// `normalize`.
///
/// # Panics
/// If `x` has fewer rows than that.
pub fn exact(x: ArrayView2<'_, f64>, lengths: &[u32], seq: usize, normalize: bool) -> Array2<f64> {
    let mut y = Array2::zeros((lengths.len(), x.ncols()));
    for (sequence, (&length, mut y)) in lengths.iter().zip(y.rows_mut()).enumerate() {
        let n = seq.min(length as usize);
        for t in 0..n {
            y += &x.row(sequence * seq + t);
        }
        y /= n.max(1) as f64;
        if normalize {
            let squares = y.mapv(|m| m * m).sum();
            y /= squares.max(1e-24).sqrt();
        }
    }
    y
}

/// The same with its bounds.
///
/// ```
/// use sparse24::{Matrix, reference::mean_pooling};
/// let x = Matrix::from_f32(2, 2, &[3.0, 4.0, f32::NAN, f32::NAN])?;
/// let want = mean_pooling::expect(&x, &[1], 2, true)?;
/// assert!((want.element(0, 0).value - 0.6).abs() < 1e-15 && (want.element(0, 1).value - 0.8).abs() < 1e-15);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(x: &Matrix, lengths: &[u32], seq: usize, normalize: bool) -> Result<Expectation> {
    let d = x.cols();
    expect_shape("x", (x.rows(), d), (lengths.len() * seq, d))?;
    let y = exact(x.to_array().mapv(f64::from).view(), lengths, seq, normalize);
    let mut all = Expectation::new(lengths.len(), d, DType::F32);
    for (sequence, &length) in lengths.iter().enumerate() {
        let n = seq.min(length as usize);
        let column = |c: usize| (0..n).map(move |t| f64::from(x.get(sequence * seq + t, c)));
        let means: Vec<(f64, f64)> = (0..d).map(|c| mean_of(column(c), n, x.dtype())).collect();
        let values = y.row(sequence);
        if !normalize || n == 0 {
            means.iter().zip(values).for_each(|(&(mean, error), &y)| all.push(y, bounded(mean, error)));
            continue;
        }
        let squares: f64 = means.iter().map(|(m, _)| m * m).sum();
        let (r, r_error) = inverse_root(squares.max(1e-24), square_error(&means, d + 1));
        // A square root and a division, where the reciprocal is not had at once.
        let r_error = r_error + 6.0 * U * r;
        for (&(m, error), &y) in means.iter().zip(values) {
            let product = (m.abs() + error) * (r + r_error) * (1.0 + U) - m.abs() * r + FLUSH;
            all.push(y, bounded(squares, product));
        }
    }
    Ok(all)
}
