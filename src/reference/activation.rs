//! The oracle of activations by themselves.
//!
//! # The bound
//! As for the activation of a GEMM ([`super::gemm`]): act(x) is off by its slope's largest value times φ(x), and for
//! GELU and SiLU 8·u·(1 + |x|). Then a rounding for the residual and its φ, and the store.
//!
//! # The bound of the gradient
//! A slope is off by 16·u for GELU by the error function and SiLU, by 32·u for the other GELU, and by φ(x), as no slope
//! has a slope above 1. Reason: the error function is off by 2.5·u, by Abramowitz & Stegun 7.1.26; exp(−z) by (6 +
//! 4·z)·u of itself and of what z is off by, which its decay keeps at a few u, also times the x or x³ before it; σ and
//! σ's slope are within a division of that. ReLU, ReLU6 and the identity have no such error, but a positive subnormal
//! may count as zero, and then has no slope. The product with dy: one rounding.
//!
//! Invariant: no code is shared with the devices.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, Rounded, U, activation, bounded, phi};
use crate::error::{Result, expect_shape};
use crate::matrix::{DType, Matrix};
use crate::problem::Activation;

/// act(x), and the residual added where there is one.
pub fn exact(of: Activation, x: ArrayView2<'_, f64>, residual: Option<ArrayView2<'_, f64>>) -> Array2<f64> {
    let y = x.mapv(|x| activation(of, x));
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

/// The same with its bounds. An error if the residual has another shape.
///
/// ```
/// use sparse24::{Activation, DType, Matrix, reference::activation};
/// let (x, residual) = (Matrix::from_f32(1, 1, &[-3.0])?, Matrix::from_f32(1, 1, &[0.5])?);
/// let want = activation::expect(Activation::Relu, &x, Some(&residual), DType::F32)?;
/// assert_eq!(want.element(0, 0).value, 0.5);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(of: Activation, x: &Matrix, residual: Option<&Matrix>, output: DType) -> Result<Expectation> {
    if let Some(residual) = residual {
        expect_shape("residual", (residual.rows(), residual.cols()), (x.rows(), x.cols()))?;
    }
    let wide = |m: &Matrix| m.to_array().mapv(f64::from);
    let added = residual.map(wide);
    let y = exact(of, wide(x).view(), added.as_ref().map(|added| added.view()));
    let mut all = Expectation::new(x.rows(), x.cols(), output);
    for ((row, col), &y) in y.indexed_iter() {
        let mut result = activated(of, x.get(row, col), x.dtype());
        if let Some(residual) = residual {
            result = result.plus(Rounded::read(residual.get(row, col), residual.dtype()));
        }
        all.push(y, bounded(y, result.error));
    }
    Ok(all)
}

/// The activation as a device may compute it.
pub(super) fn activated(of: Activation, x: f32, storage: DType) -> Rounded {
    activated_near(of, Rounded::read(x, storage))
}

/// The same of a number that is off itself.
pub(super) fn activated_near(of: Activation, x: Rounded) -> Rounded {
    let (slope, evaluation) = match of {
        Activation::None | Activation::Relu | Activation::Relu6 => (1.0, 0.0),
        Activation::Gelu | Activation::GeluTanh => (1.13, 8.0 * U),
        Activation::Silu => (1.1, 8.0 * U),
    };
    let lost = slope * x.error + if evaluation > 0.0 { FLUSH } else { 0.0 };
    Rounded::within(activation(of, x.value), lost + evaluation * (1.0 + x.value.abs() + x.error))
}

/// The slope of an activation; below zero and at it, ReLU has none, and ReLU6 none at six and above.
pub fn slope(of: Activation, x: f64) -> f64 {
    // σ(z), and σ(z)·σ(−z).
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    match of {
        Activation::None => 1.0,
        Activation::Relu => f64::from(u8::from(x > 0.0)),
        Activation::Relu6 => f64::from(u8::from(x > 0.0 && x < 6.0)),
        Activation::Gelu => {
            let density = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (-0.5 * x * x).exp();
            0.5 * libm::erfc(-x * FRAC_1_SQRT_2) + x * density
        }
        Activation::GeluTanh => {
            let scale = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
            let z = scale * (x + 0.044715 * x * x * x);
            sigmoid(z) + x * sigmoid(z) * sigmoid(-z) * scale * (1.0 + 3.0 * 0.044715 * x * x)
        }
        Activation::Silu => sigmoid(x) + x * sigmoid(x) * sigmoid(-x),
    }
}

/// Gradient of `x`, where `dy` is that of the result.
///
/// # Panics
/// If `dy` has another shape.
pub fn grad(of: Activation, x: ArrayView2<'_, f64>, dy: ArrayView2<'_, f64>) -> Array2<f64> {
    x.mapv(|x| slope(of, x)) * dy
}

/// The slope as a device may compute it.
pub(super) fn slope_within(of: Activation, x: f32, storage: DType) -> Rounded {
    let lost = phi(f64::from(x), storage);
    let error = match of {
        Activation::None => 0.0,
        Activation::Relu | Activation::Relu6 => f64::from(u8::from(lost > 0.0 && x > 0.0)),
        Activation::Gelu | Activation::Silu => 16.0 * U + lost + FLUSH,
        Activation::GeluTanh => 32.0 * U + lost + FLUSH,
    };
    Rounded::within(slope(of, f64::from(x)), error)
}

/// The same with its bounds, of f32 operands.
///
/// ```
/// use sparse24::{Activation, Matrix, reference::activation};
/// let (x, dy) = (Matrix::from_f32(1, 1, &[0.0])?, Matrix::from_f32(1, 1, &[3.0])?);
/// assert_eq!(activation::expect_grad(Activation::Silu, &x, &dy)?.element(0, 0).value, 1.5);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(of: Activation, x: &Matrix, dy: &Matrix) -> Result<Expectation> {
    expect_shape("dy", (dy.rows(), dy.cols()), (x.rows(), x.cols()))?;
    let wide = |m: &Matrix| m.to_array().mapv(f64::from);
    let mut all = Expectation::new(x.rows(), x.cols(), DType::F32);
    for ((row, col), &gradient) in grad(of, wide(x).view(), wide(dy).view()).indexed_iter() {
        let slope = slope_within(of, x.get(row, col), x.dtype());
        all.push_near(gradient, slope.times(Rounded::read(dy.get(row, col), dy.dtype())));
    }
    Ok(all)
}
