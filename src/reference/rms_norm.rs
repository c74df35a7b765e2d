//! The oracle of normalisation by the root of the mean of squares.
//!
//! # The bound
//! For d features:
//! 1. Mean of squares: a sum of squares of numbers that are off by φ, in d + 7 roundings (squares, sum, and a division
//!    or a product with a reciprocal), as in [`super`], over d.
//! 2. r = 1/√(mean + ε), where the argument is off by step 1 and one rounding: as in [`super`].
//! 3. x·r·γ: φ of x and the error of r multiplied out, a rounding for each of the two products, and the φ of gamma;
//!    then the store.
//!
//! # The bound of the gradient
//! With z = x·r as above and g = dy·γ, dx = (g − z·mean(g·z))·r and dgamma = Σ dy·z over the tokens: every step with
//! the errors of those before it and its own rounding, means and sums as in [`super`].
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array1, Array2, ArrayView2};

use super::{Expectation, FLUSH, Rounded, U, bounded, inverse_root, phi, square_error};
use crate::error::{Result, expect_len, expect_shape};
use crate::matrix::{DType, Matrix};

/// Each row of `x` over the root of the mean of its squares and `eps`, times one gamma per feature.
///
/// # Panics
/// If there are fewer of these than columns.
pub fn exact(x: ArrayView2<'_, f64>, gamma: &[f64], eps: f64) -> Array2<f64> {
    let d = x.ncols() as f64;
    let mut y = x.to_owned();
    for mut row in y.rows_mut() {
        let r = 1.0 / (row.mapv(|x| x * x).sum() / d + eps).sqrt();
        row.iter_mut().enumerate().for_each(|(c, y)| *y = *y * r * gamma[c]);
    }
    y
}

/// The same with its bounds.
///
/// ```
/// use sparse24::{DType, Matrix, reference::rms_norm};
/// let x = Matrix::from_f32(1, 4, &[1.0, -1.0, 1.0, 1.0])?;
/// let want = rms_norm::expect(&x, &[1.0, 1.0, 2.0, 0.5], 0.0, DType::F32)?;
/// assert_eq!([0, 1, 2, 3].map(|c| want.element(0, c).value), [1.0, -1.0, 2.0, 0.5]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(x: &Matrix, gammas: &[f32], eps: f32, output: DType) -> Result<Expectation> {
    let d = x.cols();
    expect_len("gamma", gammas.len(), d)?;
    let wide: Vec<f64> = gammas.iter().map(|&gamma| f64::from(gamma)).collect();
    let y = exact(x.to_array().mapv(f64::from).view(), &wide, f64::from(eps));
    let mut all = Expectation::new(x.rows(), d, output);
    for t in 0..x.rows() {
        let row: Vec<(f64, f64)> =
            (0..d).map(|c| f64::from(x.get(t, c))).map(|x_c| (x_c, phi(x_c, x.dtype()))).collect();
        let squares: f64 = row.iter().map(|(x, _)| x * x).sum();
        let argument = squares / d as f64 + f64::from(eps);
        let off = square_error(&row, d + 7) / d as f64;
        let (r, r_error) = inverse_root(argument, off * (1.0 + U) + U * argument + FLUSH);
        for (column, (&(x_c, x_error), &gamma)) in row.iter().zip(&wide).enumerate() {
            let z = x_c.abs() * r;
            let z_error = (x_c.abs() + x_error) * (r + r_error) * (1.0 + U) - z + FLUSH;
            let y = y[[t, column]];
            let error =
                z_error * gamma.abs() * (1.0 + U) + U * y.abs() + FLUSH + phi(gamma, DType::F32) * (z + z_error);
            all.push(y, bounded(squares, error));
        }
    }
    Ok(all)
}

/// Gradients of `x` and gamma, where `dy` is that of the result.
///
/// # Panics
/// If there are fewer gammas than columns, or `dy` has another shape than `x`.
pub fn grad(x: ArrayView2<'_, f64>, gamma: &[f64], eps: f64, dy: ArrayView2<'_, f64>) -> (Array2<f64>, Array1<f64>) {
    let d = x.ncols() as f64;
    let mut dx = Array2::zeros(x.dim());
    let mut dgamma = Array1::zeros(x.ncols());
    for ((x, dy), mut dx) in x.rows().into_iter().zip(dy.rows()).zip(dx.rows_mut()) {
        let r = 1.0 / (x.dot(&x) / d + eps).sqrt();
        let z = &x * r;
        let g = Array1::from_shape_fn(dy.len(), |c| dy[c] * gamma[c]);
        dx.assign(&((&g - &z * (g.dot(&z) / d)) * r));
        dgamma += &(&dy * &z);
    }
    (dx, dgamma)
}

/// The same with their bounds, of f32 operands.
///
/// ```
/// use sparse24::{Matrix, reference::rms_norm};
/// let (x, dy) = (Matrix::from_f32(1, 2, &[3.0, -3.0])?, Matrix::from_f32(1, 2, &[0.5, 0.5])?);
/// let [dx, dgamma] = rms_norm::expect_grad(&x, &[1.0, 1.0], 0.0, &dy)?;
/// assert!((dx.element(0, 0).value - 0.5 / 3.0).abs() < 1e-15);
/// assert_eq!((dgamma.element(0, 0).value, dgamma.element(0, 1).value), (0.5, -0.5));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(x: &Matrix, gammas: &[f32], eps: f32, dy: &Matrix) -> Result<[Expectation; 2]> {
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
        let squares = Rounded::mean(x.iter().map(|x| x.times(*x)));
        let r = squares.plus(Rounded::exact(f64::from(eps))).inverse_root();
        let z: Vec<_> = x.iter().map(|x| x.times(r)).collect();
        let g: Vec<_> = dy.iter().zip(gammas).map(|(dy, &gamma)| dy.times(Rounded::read(gamma, DType::F32))).collect();
        let along = Rounded::mean(g.iter().zip(&z).map(|(g, z)| g.times(*z)));
        for (c, (g, z)) in g.iter().zip(&z).enumerate() {
            dx.push_near(exact.0[[t, c]], g.minus(z.times(along)).times(r));
        }
        normed.push(z);
    }
    let mut dgamma = Expectation::new(1, d, DType::F32);
    for (c, &sum) in exact.1.iter().enumerate() {
        let terms = (0..tokens).map(|t| Rounded::read(dy.get(t, c), dy.dtype()).times(normed[t][c]));
        dgamma.push_near(sum, Rounded::sum(terms, 0));
    }
    Ok([dx, dgamma])
}
