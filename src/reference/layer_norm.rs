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
//! # The bound of the gradient
//! With z = c·r as above and g = dy·γ, dx = (g − mean(g) − z·mean(g·z))·r, dgamma = Σ dy·z and dbeta = Σ dy over the
//! tokens: every step with the errors of those before it and its own rounding, means and sums as in [`super`].
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::{Expectation, FLUSH, Rounded, U, bounded, inverse_root, mean_of, phi, square_error};
use crate::error::{Result, expect_len, expect_shape};
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

/// Gradients of `x`, gamma and beta, where `dy` is that of the result.
///
/// # Panics
/// If there are fewer gammas than columns, or `dy` has another shape than `x`.
pub fn grad(
    x: ArrayView2<'_, f64>,
    gamma: &[f64],
    eps: f64,
    dy: ArrayView2<'_, f64>,
) -> (Array2<f64>, Array1<f64>, Array1<f64>) {
    let d = x.ncols() as f64;
    let mut dx = Array2::zeros(x.dim());
    let mut dgamma = Array1::zeros(x.ncols());
    for ((x, dy), mut dx) in x.rows().into_iter().zip(dy.rows()).zip(dx.rows_mut()) {
        let centred = &x - x.sum() / d;
        let r = 1.0 / (centred.mapv(|c| c * c).sum() / d + eps).sqrt();
        let z = centred * r;
        let g = Array1::from_shape_fn(dy.len(), |c| dy[c] * gamma[c]);
        let along = (&g * &z).sum() / d;
        dx.assign(&((&g - g.sum() / d - &z * along) * r));
        dgamma += &(&dy * &z);
    }
    (dx, dgamma, dy.sum_axis(Axis(0)))
}

/// The same with their bounds, of f32 operands.
///
/// ```
/// use sparse24::{Matrix, reference::layer_norm};
/// let (x, dy) = (Matrix::from_f32(1, 2, &[1.0, 3.0])?, Matrix::from_f32(1, 2, &[0.5, 0.25])?);
/// let [dx, dgamma, dbeta] = layer_norm::expect_grad(&x, &[1.0, 1.0], 0.0, &dy)?;
/// // Two features become -1 and 1 whatever they are.
/// assert_eq!((dx.element(0, 0).value, dx.element(0, 1).value), (0.0, 0.0));
/// assert_eq!((dgamma.element(0, 0).value, dbeta.element(0, 0).value), (-0.5, 0.5));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(x: &Matrix, gammas: &[f32], eps: f32, dy: &Matrix) -> Result<[Expectation; 3]> {
    let (tokens, d) = (x.rows(), x.cols());
    expect_len("gamma", gammas.len(), d)?;
    expect_shape("dy", (dy.rows(), dy.cols()), (tokens, d))?;
    let (x_wide, dy_wide) = (x.to_array().mapv(f64::from), dy.to_array().mapv(f64::from));
    let wide: Vec<f64> = gammas.iter().map(|&gamma| f64::from(gamma)).collect();
    let exact = grad(x_wide.view(), &wide, f64::from(eps), dy_wide.view());
    let row = |m: &Matrix, t: usize| (0..d).map(|c| Rounded::read(m.get(t, c), m.dtype())).collect::<Vec<_>>();
    let mut dx = Expectation::new(tokens, d, DType::F32);
    let mut normed = Vec::with_capacity(tokens);
    for t in 0..tokens {
        let (x, dy) = (row(x, t), row(dy, t));
        let mean = Rounded::mean(x.iter().copied());
        let centred: Vec<_> = x.iter().map(|x| x.minus(mean)).collect();
        let variance = Rounded::mean(centred.iter().map(|c| c.times(*c)));
        let r = variance.plus(Rounded::exact(f64::from(eps))).inverse_root();
        let z: Vec<_> = centred.iter().map(|c| c.times(r)).collect();
        let g: Vec<_> = dy.iter().zip(gammas).map(|(dy, &gamma)| dy.times(Rounded::read(gamma, DType::F32))).collect();
        let level = Rounded::mean(g.iter().copied());
        let along = Rounded::mean(g.iter().zip(&z).map(|(g, z)| g.times(*z)));
        for (c, (g, z)) in g.iter().zip(&z).enumerate() {
            dx.push_near(exact.0[[t, c]], g.minus(level).minus(z.times(along)).times(r));
        }
        normed.push(z);
    }
    let (mut dgamma, mut dbeta) = (Expectation::new(1, d, DType::F32), Expectation::new(1, d, DType::F32));
    for (c, (&scaled, &plain)) in exact.1.iter().zip(&exact.2).enumerate() {
        let given = |t: usize| Rounded::read(dy.get(t, c), dy.dtype());
        dgamma.push_near(scaled, Rounded::sum((0..tokens).map(|t| given(t).times(normed[t][c])), 0));
        dbeta.push_near(plain, Rounded::sum((0..tokens).map(given), 0));
    }
    Ok([dx, dgamma, dbeta])
}
