//! The oracle of gates.
//!
//! # The bound
//! As for the activation of a GEMM ([`super::gemm`]): g = act(a) is off by e, its slope's largest value times φ(a), and
//! for GELU and SiLU 8·u·(1 + |a|). The product: e·(|b| + φ(b)) + |g|·φ(b), one rounding, and 2⁻¹²⁶; then the store.
//!
//! # The bound of the gradient
//! act(a) and its slope are off as the oracle of [activations](mod@super::activation) has it; products in any order
//! round once each.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::activation::{activated, slope, slope_within};
use super::{Expectation, FLUSH, Rounded, U, activation, bounded, phi};
use crate::error::{Error, Result, expect_shape};
use crate::matrix::{DType, Matrix};
use crate::problem::Activation;

/// The first half of each row of `x`, through an activation, times the second.
///
/// # Panics
/// If a row has an odd number of columns.
pub fn exact(x: ArrayView2<'_, f64>, gate: Activation) -> Array2<f64> {
    assert!(x.ncols().is_multiple_of(2), "halves of {} columns", x.ncols());
    let width = x.ncols() / 2;
    Array2::from_shape_fn((x.nrows(), width), |(t, c)| activation(gate, x[[t, c]]) * x[[t, width + c]])
}

/// The same with its bounds. An error if a row has an odd number of columns.
///
/// ```
/// use sparse24::{Activation, DType, Matrix, reference::gated};
/// let x = Matrix::from_f32(1, 2, &[-3.0, 2.0])?;
/// let want = gated::expect(&x, Activation::None, DType::F32)?;
/// assert_eq!(want.element(0, 0).value, -6.0);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(x: &Matrix, gate: Activation, output: DType) -> Result<Expectation> {
    if !x.cols().is_multiple_of(2) {
        return Err(Error::invalid(format!("{} columns have no halves", x.cols())));
    }
    let width = x.cols() / 2;
    let y = exact(x.to_array().mapv(f64::from).view(), gate);
    let mut all = Expectation::new(x.rows(), width, output);
    for ((t, c), &y) in y.indexed_iter() {
        let b = f64::from(x.get(t, width + c));
        let b_lost = phi(b, x.dtype());
        let Rounded { value: g, error: g_error } = activated(gate, x.get(t, c), x.dtype());
        let g = g.abs();
        let error = (g_error * (b.abs() + b_lost) + g * b_lost) * (1.0 + U) + U * y.abs() + FLUSH;
        all.push(y, bounded(y, error));
    }
    Ok(all)
}

/// Gradients of both halves of each row of `x`, where `dy` is that of the result.
///
/// # Panics
/// If `dy` has not half as many columns as `x`, or not as many rows.
pub fn grad(x: ArrayView2<'_, f64>, gate: Activation, dy: ArrayView2<'_, f64>) -> Array2<f64> {
    let width = dy.ncols();
    assert_eq!(x.dim(), (dy.nrows(), 2 * width), "two halves");
    Array2::from_shape_fn(x.dim(), |(t, c)| {
        let (a, b, dy) = (x[[t, c % width]], x[[t, width + c % width]], dy[[t, c % width]]);
        if c < width { slope(gate, a) * b * dy } else { activation(gate, a) * dy }
    })
}

/// The same with its bounds, of f32 operands.
///
/// ```
/// use sparse24::{Activation, Matrix, reference::gated};
/// let (x, dy) = (Matrix::from_f32(1, 2, &[2.0, 5.0])?, Matrix::from_f32(1, 1, &[3.0])?);
/// let want = gated::expect_grad(&x, Activation::Relu, &dy)?;
/// assert_eq!((want.element(0, 0).value, want.element(0, 1).value), (15.0, 6.0));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(x: &Matrix, gate: Activation, dy: &Matrix) -> Result<Expectation> {
    let width = dy.cols();
    expect_shape("x", (x.rows(), x.cols()), (dy.rows(), 2 * width))?;
    let (x_wide, dy_wide) = (x.to_array().mapv(f64::from), dy.to_array().mapv(f64::from));
    let mut all = Expectation::new(x.rows(), x.cols(), DType::F32);
    for ((t, c), &gradient) in grad(x_wide.view(), gate, dy_wide.view()).indexed_iter() {
        let read = |m: &Matrix, c: usize| Rounded::read(m.get(t, c), m.dtype());
        let (a, dy) = (x.get(t, c % width), read(dy, c % width));
        let computed = match c < width {
            true => slope_within(gate, a, x.dtype()).times(read(x, width + c).times(dy)),
            false => activated(gate, a, x.dtype()).times(dy),
        };
        all.push_near(gradient, computed);
    }
    Ok(all)
}
