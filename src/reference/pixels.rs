//! The oracle of pixels.
//!
//! # The bound
//! A difference and a product of exact numbers.
//!
//! Invariant: no code is shared with the devices.

use ndarray::Array2;

use super::{Expectation, Rounded};
use crate::matrix::DType;

/// Red, green and blue of each pixel, `0xRRGGBB`, less the mean and times the scale of the channel.
pub fn exact(pixels: &[u32], mean: [f32; 3], scale: [f32; 3]) -> Array2<f64> {
    Array2::from_shape_fn((pixels.len(), 3), |(pixel, channel)| {
        let [_, channels @ ..] = pixels[pixel].to_be_bytes();
        (f64::from(channels[channel]) - f64::from(mean[channel])) * f64::from(scale[channel])
    })
}

/// The same with its bounds.
///
/// ```
/// use sparse24::{DType, reference::pixels};
/// let want = pixels::expect(&[0x01_02_03], [1.0, 0.0, 0.0], [1.0, 0.5, 2.0], DType::F32);
/// assert_eq!([0, 1, 2].map(|channel| want.element(0, channel).value), [0.0, 1.0, 6.0]);
/// ```
pub fn expect(pixels: &[u32], mean: [f32; 3], scale: [f32; 3], output: DType) -> Expectation {
    let mut all = Expectation::new(pixels.len(), 3, output);
    for ((pixel, channel), &y) in exact(pixels, mean, scale).indexed_iter() {
        let byte = Rounded::exact(f64::from(pixels[pixel].to_be_bytes()[1 + channel]));
        let number = |x: f32| Rounded::read(x, DType::F32);
        all.push_near(y, byte.minus(number(mean[channel])).times(number(scale[channel])));
    }
    all
}
