//! The oracle of mean pooling.
//!
//! # The bound
//! The mean as in [`super`]. Its length's square q: a sum of squares in d + 1 roundings, and 1/√max(q, 10⁻²⁴), as in
//! [`super`], or by a square root and a division, 10u. The product: one rounding. Results are f32.
//!
//! # The bound of the gradient
//! With the mean m and r as above, (dy − m·r·(m·dy)·r)·r / n: every step with the errors of those before it and its own
//! rounding, sums and the division as in [`super`]. Where q may be on either side of 10⁻²⁴ nothing can be said.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, Rounded, U, bounded, inverse_root, mean_of, square_error};
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

/// Gradient of `x`, where `dy` is that of the result; zero for rows of padding.
///
/// # Panics
/// If `x` has fewer rows than there are lengths times `seq`, or `dy` not one for each length.
pub fn grad(
    x: ArrayView2<'_, f64>,
    lengths: &[u32],
    seq: usize,
    normalize: bool,
    dy: ArrayView2<'_, f64>,
) -> Array2<f64> {
    let means = exact(x, lengths, seq, false);
    let mut dx = Array2::zeros(x.dim());
    for (sequence, (&length, (mean, dy))) in lengths.iter().zip(means.rows().into_iter().zip(dy.rows())).enumerate() {
        let n = seq.min(length as usize);
        let mut gradient = dy.to_owned();
        if normalize {
            let squares = mean.dot(&mean);
            let long = squares.max(1e-24).sqrt();
            if squares >= 1e-24 {
                gradient -= &(&mean * (mean.dot(&dy) / squares));
            }
            gradient /= long;
        }
        gradient /= n.max(1) as f64;
        (0..n).for_each(|t| dx.row_mut(sequence * seq + t).assign(&gradient));
    }
    dx
}

/// The same with its bounds, of f32 operands.
///
/// ```
/// use sparse24::{Matrix, reference::mean_pooling};
/// let (x, dy) = (Matrix::from_f32(2, 1, &[3.0, f32::NAN])?, Matrix::from_f32(1, 1, &[5.0])?);
/// let want = mean_pooling::expect_grad(&x, &[1], 2, false, &dy)?;
/// assert_eq!((want.element(0, 0).value, want.element(1, 0).value), (5.0, 0.0));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(x: &Matrix, lengths: &[u32], seq: usize, normalize: bool, dy: &Matrix) -> Result<Expectation> {
    let d = x.cols();
    expect_shape("x", (x.rows(), d), (lengths.len() * seq, d))?;
    expect_shape("dy", (dy.rows(), dy.cols()), (lengths.len(), d))?;
    let (x_wide, dy_wide) = (x.to_array().mapv(f64::from), dy.to_array().mapv(f64::from));
    let exact = grad(x_wide.view(), lengths, seq, normalize, dy_wide.view());
    let mut all = Expectation::new(x.rows(), d, DType::F32);
    for (sequence, &length) in lengths.iter().enumerate() {
        let n = seq.min(length as usize);
        let mut gradient: Vec<_> = (0..d).map(|c| Rounded::read(dy.get(sequence, c), dy.dtype())).collect();
        if normalize && n > 0 {
            let column = |c: usize| (0..n).map(move |t| Rounded::read(x.get(sequence * seq + t, c), x.dtype()));
            let means: Vec<_> = (0..d).map(|c| Rounded::mean(column(c))).collect();
            let squares = Rounded::sum(means.iter().map(|mean| mean.times(*mean)), 0);
            let unsure = (squares.value - 1e-24).abs() <= squares.error;
            let short = squares.value < 1e-24;
            let argument = if short { Rounded::exact(1e-24) } else { squares };
            let r = argument.inverse_root();
            // A square root and a division, where the reciprocal is not had at once; and 1e-24 as f32 has it.
            let r = Rounded::within(r.value, if unsure { f64::INFINITY } else { r.error + 8.0 * U * r.value });
            let along = Rounded::sum(means.iter().zip(&gradient).map(|(mean, dy)| mean.times(*dy)), 0).times(r);
            for (gradient, mean) in gradient.iter_mut().zip(means) {
                let level = if short { Rounded::exact(0.0) } else { mean.times(r).times(along) };
                *gradient = gradient.minus(level).times(r);
            }
        }
        for t in 0..seq {
            for (c, gradient) in gradient.iter().enumerate() {
                let row = sequence * seq + t;
                all.push_near(exact[[row, c]], if t < n { gradient.over(n) } else { Rounded::exact(0.0) });
            }
        }
    }
    Ok(all)
}
