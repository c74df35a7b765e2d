//! The oracle of depthwise convolutions.
//!
//! # The bound
//! A sum of products of operands, and the bias, in any order; then the activation: its slope's largest value times what
//! the sum is off by, and what its function is off by (see [activations](mod@super::activation)). Gradients are sums of
//! products of operands, too.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::activation::activated_near;
use super::im2col::pixel;
use super::{Expectation, Rounded, activation};
use crate::error::{Result, expect_shape};
use crate::matrix::{DType, Matrix};
use crate::problem::Activation;
use crate::window::Window;

/// Every channel of images by its own kernel, weights of `taps x channels`; then the bias and the activation.
///
/// # Panics
/// If shapes do not fit each other.
pub fn exact(
    x: ArrayView2<'_, f64>,
    weights: ArrayView2<'_, f64>,
    bias: Option<&[f64]>,
    of: Activation,
    window: &Window,
) -> Array2<f64> {
    assert_eq!((x.nrows() % window.pixel_count(), weights.dim()), (0, (window.taps(), x.ncols())), "shapes differ");
    let images = x.nrows() / window.pixel_count();
    Array2::from_shape_fn((images * window.position_count(), x.ncols()), |(position, channel)| {
        let product =
            |tap| pixel(window, position, tap).map_or(0.0, |pixel| x[[pixel, channel]] * weights[[tap, channel]]);
        let sum: f64 = (0..window.taps()).map(product).sum();
        activation(of, sum + bias.map_or(0.0, |bias| bias[channel]))
    })
}

/// The same with its bounds, of f32 weights and biases.
///
/// ```
/// use sparse24::{Activation, DType, Matrix, Window, reference::depthwise};
/// let (x, weights) = (Matrix::from_f32(2, 1, &[3.0, 5.0])?, Matrix::from_f32(3, 1, &[1.0, 10.0, 100.0])?);
/// let window = Window::same([1, 2], [1, 3], [1, 1])?;
/// let want = depthwise::expect(&x, &weights, Some(&[-50.0]), Activation::Relu, &window, DType::F32)?;
/// assert_eq!([0, 1].map(|position| want.element(position, 0).value), [480.0, 3.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(
    x: &Matrix,
    weights: &Matrix,
    bias: Option<&[f32]>,
    of: Activation,
    window: &Window,
    output: DType,
) -> Result<Expectation> {
    let (images, channels) = (x.rows() / window.pixel_count(), x.cols());
    expect_shape("x", (x.rows(), channels), (images * window.pixel_count(), channels))?;
    expect_shape("weights", (weights.rows(), weights.cols()), (window.taps(), channels))?;
    let wide_bias: Option<Vec<f64>> = bias.map(|bias| bias.iter().copied().map(f64::from).collect());
    let [x_wide, w_wide] = [x, weights].map(|m| m.to_array().mapv(f64::from));
    let y = exact(x_wide.view(), w_wide.view(), wide_bias.as_deref(), of, window);
    let mut all = Expectation::new(y.nrows(), channels, output);
    for ((position, channel), &y) in y.indexed_iter() {
        let product = |tap| {
            let x = Rounded::read(x.get(pixel(window, position, tap)?, channel), x.dtype());
            Some(x.times(Rounded::read(weights.get(tap, channel), weights.dtype())))
        };
        let bias = bias.map(|bias| Rounded::read(bias[channel], DType::F32));
        let sum = Rounded::sum((0..window.taps()).filter_map(product).chain(bias), 0);
        all.push_near(y, activated_near(of, sum));
    }
    Ok(all)
}

/// Gradients of `x` and of the weights, where `dy` is that of the result before the activation.
///
/// # Panics
/// If shapes do not fit each other.
pub fn grad(
    x: ArrayView2<'_, f64>,
    weights: ArrayView2<'_, f64>,
    window: &Window,
    dy: ArrayView2<'_, f64>,
) -> (Array2<f64>, Array2<f64>) {
    let (mut dx, mut dw) = (Array2::zeros(x.dim()), Array2::zeros(weights.dim()));
    for ((position, channel), &dy) in dy.indexed_iter() {
        for tap in 0..window.taps() {
            if let Some(pixel) = pixel(window, position, tap) {
                dx[[pixel, channel]] += dy * weights[[tap, channel]];
                dw[[tap, channel]] += dy * x[[pixel, channel]];
            }
        }
    }
    (dx, dw)
}

/// The same with their bounds, of f32 operands.
///
/// ```
/// use sparse24::{Matrix, Window, reference::depthwise};
/// let (x, weights) = (Matrix::from_f32(2, 1, &[1.0, 10.0])?, Matrix::from_f32(2, 1, &[1.0, 10.0])?);
/// let dy = Matrix::from_f32(2, 1, &[3.0, 5.0])?;
/// let (dx, dw) = depthwise::expect_grad(&x, &weights, &Window::same([1, 2], [1, 2], [1, 1])?, &dy)?;
/// assert_eq!([dx.element(1, 0).value, dw.element(0, 0).value], [35.0, 53.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(x: &Matrix, weights: &Matrix, window: &Window, dy: &Matrix) -> Result<(Expectation, Expectation)> {
    let (images, channels) = (x.rows() / window.pixel_count(), x.cols());
    expect_shape("x", (x.rows(), channels), (images * window.pixel_count(), channels))?;
    expect_shape("weights", (weights.rows(), weights.cols()), (window.taps(), channels))?;
    expect_shape("dy", (dy.rows(), dy.cols()), (images * window.position_count(), channels))?;
    let wide = |m: &Matrix| m.to_array().mapv(f64::from);
    let (dx, dw) = grad(wide(x).view(), wide(weights).view(), window, wide(dy).view());
    let mut terms = (vec![Vec::new(); dx.len()], vec![Vec::new(); dw.len()]);
    let read = |m: &Matrix, row, channel| Rounded::read(m.get(row, channel), m.dtype());
    for position in 0..dy.rows() {
        for tap in 0..window.taps() {
            let Some(pixel) = pixel(window, position, tap) else { continue };
            for channel in 0..channels {
                let dy = read(dy, position, channel);
                terms.0[pixel * channels + channel].push(dy.times(read(weights, tap, channel)));
                terms.1[tap * channels + channel].push(dy.times(read(x, pixel, channel)));
            }
        }
    }
    let expectation = |exact: &Array2<f64>, terms: Vec<Vec<Rounded>>| {
        let mut all = Expectation::new(exact.nrows(), channels, DType::F32);
        for (&exact, terms) in exact.iter().zip(terms) {
            all.push_near(exact, Rounded::sum(terms.into_iter(), 0));
        }
        all
    };
    Ok((expectation(&dx, terms.0), expectation(&dw, terms.1)))
}
