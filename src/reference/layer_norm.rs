//! The oracle of layer normalisation.
//!
//! # The bound
//! For d features:
//! 1. Mean: as in [`super`].
//! 2. Difference c = x − mean: φ and the mean's error, and one rounding. Call the sum e.
//! 3. Variance v: a sum of squares in d + 7 roundings, as in [`super`], over d.
//! 4. r = 1/√(v + ε), where the argument is off by step 3 and one rounding: as in [`super`].
//! 5. c·r·γ + β: the errors of c and r multiplied out, a rounding for each of the three operations, and the φ of gamma
//!    and beta; then the store.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, U, bounded, inverse_root, mean_of, phi, square_error};
use crate::error::{Result, expect_len};
use crate::matrix::{DType, Matrix};

/// Layer normalisation of each row of `x`, with one gamma and beta per feature.
///
/// # Panics
/// If there are fewer of these than columns.
pub fn exact(x: ArrayView2<'_, f64>, gamma: &[f64], beta: &[f64], eps: f64) -> Array2<f64> {
    let d = x.ncols() as f64;
    let mut y = x.to_owned();
    for mut row in y.rows_mut() {
        let mean = row.sum() / d;
        row.mapv_inplace(|x| x - mean);
        let r = 1.0 / (row.mapv(|c| c * c).sum() / d + eps).sqrt();
        row.iter_mut().enumerate().for_each(|(c, y)| *y = *y * r * gamma[c] + beta[c]);
    }
    y
}

/// The same with its bounds.
///
/// ```
/// use sparse24::{DType, Matrix, reference::layer_norm};
/// let x = Matrix::from_f32(1, 2, &[1.0, 3.0])?;
/// let want = layer_norm::expect(&x, &[1.0, 1.0], &[0.0, 0.5], 0.0, DType::F32)?;
/// assert_eq!((want.element(0, 0).value, want.element(0, 1).value), (-1.0, 1.5));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(x: &Matrix, gammas: &[f32], betas: &[f32], eps: f32, output: DType) -> Result<Expectation> {
    let d = x.cols();
    expect_len("gamma", gammas.len(), d)?;
    expect_len("beta", betas.len(), d)?;
    let wide = |numbers: &[f32]| -> Vec<f64> { numbers.iter().map(|&x| f64::from(x)).collect() };
    let y = exact(x.to_array().mapv(f64::from).view(), &wide(gammas), &wide(betas), f64::from(eps));
    let mut all = Expectation::new(x.rows(), d, output);
    for t in 0..x.rows() {
        let row: Vec<f64> = (0..d).map(|c| f64::from(x.get(t, c))).collect();
        let (mean, mean_error) = mean_of(row.iter().copied(), d, x.dtype());
        let centred: Vec<(f64, f64)> = row
            .iter()
            .map(|&x_c| {
                let c = x_c - mean;
                let error = phi(x_c, x.dtype()) + mean_error;
                (c, error + U * (c.abs() + error))
            })
            .collect();
        let variance = centred.iter().map(|(c, _)| c * c).sum::<f64>() / d as f64;
        let variance_error = square_error(&centred, d + 7) / d as f64;
        let argument = variance + f64::from(eps);
        let (r, r_error) = inverse_root(argument, variance_error * (1.0 + U) + U * argument + FLUSH);
        for (column, ((&(c, c_error), &gamma), &beta)) in centred.iter().zip(gammas).zip(betas).enumerate() {
            let (gamma, beta, y) = (f64::from(gamma), f64::from(beta), y[[t, column]]);
            let z = c * r;
            let z_error = (c.abs() + c_error) * (r + r_error) * (1.0 + U) - z.abs() + FLUSH;
            let scaled_error = z_error * gamma.abs() * (1.0 + U)
                + U * (z * gamma).abs()
                + FLUSH
                + phi(gamma, DType::F32) * (z.abs() + z_error);
            let error = scaled_error * (1.0 + U) + U * y.abs() + FLUSH + phi(beta, DType::F32);
            all.push(y, bounded(row.iter().map(|x| x * x).sum(), error));
        }
    }
    Ok(all)
}
