//! The oracle of the windows of images.
//!
//! # The bound
//! Numbers are moved: none is off but by what [`super`] says of subnormals and of the store. A gradient is a sum of
//! such numbers.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, Rounded, phi};
use crate::error::{Result, expect_shape};
use crate::matrix::{DType, Matrix};
use crate::window::Window;

/// The row of `x` that a tap of a window sees, if that lies in the image; positions count through all images.
pub(super) fn pixel(window: &Window, position: usize, tap: usize) -> Option<usize> {
    let ([height, width], [_, kernel_width]) = (window.image(), window.kernel());
    let ([stride_y, stride_x], [above, left]) = (window.stride(), window.before());
    let [rows, columns] = window.positions();
    let (image, row, column) = (position / (rows * columns), position / columns % rows, position % columns);
    let y = (row * stride_y + tap / kernel_width).checked_sub(above)?;
    let x = (column * stride_x + tap % kernel_width).checked_sub(left)?;
    (y < height && x < width).then_some((image * height + y) * width + x)
}

/// A row for each window: all channels of the pixel at its first tap, then those at the second, and so on; zeros
/// outside of the image.
///
/// # Panics
/// If `x` does not have the pixels of whole images.
pub fn exact(x: ArrayView2<'_, f64>, window: &Window) -> Array2<f64> {
    assert_eq!(x.nrows() % window.pixel_count(), 0, "images are not whole");
    let (images, channels) = (x.nrows() / window.pixel_count(), x.ncols());
    Array2::from_shape_fn((images * window.position_count(), window.taps() * channels), |(position, column)| {
        pixel(window, position, column / channels).map_or(0.0, |pixel| x[[pixel, column % channels]])
    })
}

/// The same with its bounds.
///
/// ```
/// use sparse24::{DType, Matrix, Window, reference::im2col};
/// let x = Matrix::from_f32(2, 1, &[3.0, 5.0])?;
/// let want = im2col::expect(&x, &Window::same([1, 2], [1, 3], [1, 1])?, DType::F32)?;
/// assert_eq!([0, 1, 2].map(|tap| want.element(1, tap).value), [3.0, 5.0, 0.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(x: &Matrix, window: &Window, output: DType) -> Result<Expectation> {
    let images = x.rows() / window.pixel_count();
    expect_shape("x", (x.rows(), x.cols()), (images * window.pixel_count(), x.cols()))?;
    let y = exact(x.to_array().mapv(f64::from).view(), window);
    let mut all = Expectation::new(y.nrows(), y.ncols(), output);
    y.iter().for_each(|&y| all.push(y, phi(y, x.dtype())));
    Ok(all)
}

/// Gradient of `x`, where `dy` is that of the result.
///
/// # Panics
/// If `dy` is not that of whole images.
pub fn grad(dy: ArrayView2<'_, f64>, window: &Window) -> Array2<f64> {
    assert_eq!((dy.nrows() % window.position_count(), dy.ncols() % window.taps()), (0, 0), "images are not whole");
    let (images, channels) = (dy.nrows() / window.position_count(), dy.ncols() / window.taps());
    let mut dx = Array2::zeros((images * window.pixel_count(), channels));
    for ((position, column), &dy) in dy.indexed_iter() {
        if let Some(pixel) = pixel(window, position, column / channels) {
            dx[[pixel, column % channels]] += dy;
        }
    }
    dx
}

/// The same with its bounds, of f32.
///
/// ```
/// use sparse24::{Matrix, Window, reference::im2col};
/// let dy = Matrix::from_f32(2, 2, &[1.0, 10.0, 100.0, f32::NAN])?;
/// let want = im2col::expect_grad(&dy, &Window::same([1, 2], [1, 2], [1, 1])?)?;
/// assert_eq!([0, 1].map(|pixel| want.element(pixel, 0).value), [1.0, 110.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(dy: &Matrix, window: &Window) -> Result<Expectation> {
    let (images, channels) = (dy.rows() / window.position_count(), dy.cols() / window.taps());
    expect_shape("dy", (dy.rows(), dy.cols()), (images * window.position_count(), channels * window.taps()))?;
    let exact = grad(dy.to_array().mapv(f64::from).view(), window);
    let mut terms = vec![Vec::new(); exact.len()];
    for position in 0..dy.rows() {
        for column in 0..dy.cols() {
            if let Some(pixel) = pixel(window, position, column / channels) {
                terms[pixel * channels + column % channels].push(Rounded::read(dy.get(position, column), dy.dtype()));
            }
        }
    }
    let mut all = Expectation::new(exact.nrows(), channels, DType::F32);
    for (&exact, terms) in exact.iter().zip(terms) {
        all.push_near(exact, Rounded::sum(terms.into_iter(), 0));
    }
    Ok(all)
}
