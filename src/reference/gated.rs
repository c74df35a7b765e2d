//! The oracle of gates.
//!
//! # The bound
//! As for the activation of a GEMM ([`super::gemm`]): g = act(a) is off by e, its slope's largest value times φ(a), and
//! for GELU and SiLU 8·u·(1 + |a|). The product: e·(|b| + φ(b)) + |g|·φ(b), one rounding, and 2⁻¹²⁶; then the store.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, U, activation, bounded, phi};
use crate::error::{Error, Result};
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
        return Err(Error::Invalid(format!("{} columns have no halves", x.cols())));
    }
    let width = x.cols() / 2;
    let y = exact(x.to_array().mapv(f64::from).view(), gate);
    let (slope, evaluation) = match gate {
        Activation::None | Activation::Relu => (1.0, 0.0),
        Activation::Gelu | Activation::GeluTanh => (1.13, 8.0 * U),
        Activation::Silu => (1.1, 8.0 * U),
    };
    let mut all = Expectation::new(x.rows(), width, output);
    for ((t, c), &y) in y.indexed_iter() {
        let (a, b) = (f64::from(x.get(t, c)), f64::from(x.get(t, width + c)));
        let (a_lost, b_lost) = (phi(a, x.dtype()), phi(b, x.dtype()));
        let g = activation(gate, a).abs();
        let g_error = slope * a_lost + evaluation * (1.0 + a.abs()) + if evaluation > 0.0 { FLUSH } else { 0.0 };
        let error = (g_error * (b.abs() + b_lost) + g * b_lost) * (1.0 + U) + U * y.abs() + FLUSH;
        all.push(y, bounded(y, error));
    }
    Ok(all)
}
