//! Windows of images: where the kernel of a convolution lies.
//!
//! An image is a run of rows of a tensor, one for each pixel, line by line, whose columns are channels (NHWC). A window
//! is what one output position sees: `kernel` pixels, the first one `stride` pixels from the first one of the position
//! before. What lies outside of the image counts as zero. Lines come first in every pair, as in torch.
//!
//! Invariant: no size is 0, there is a position, and sizes and numbers of pixels, positions and taps fit u32.

use crate::error::{Error, Result, checked_mul};

/// The windows of an image's output positions.
///
/// ```
/// use sparse24::Window;
/// // TensorFlow's "same": as many positions as the stride leaves, the odd pixel of padding behind.
/// let same = Window::same([224, 224], [3, 3], [2, 2])?;
/// assert_eq!((same.positions(), same.before()), ([112, 112], [0, 0]));
/// // torch's padding, as many pixels on both sides.
/// let padded = Window::padded([224, 224], [3, 3], [2, 2], [1, 1])?;
/// assert_eq!((padded.positions(), padded.before()), ([112, 112], [1, 1]));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    image: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    before: [usize; 2],
    positions: [usize; 2],
}

impl Window {
    /// As TensorFlow pads for "same": there are `image / stride` positions, rounded up, and of the pixels that these
    /// lack the smaller half lies before the image.
    pub fn same(image: [usize; 2], kernel: [usize; 2], stride: [usize; 2]) -> Result<Self> {
        not_zero(&[("image", image), ("kernel", kernel), ("stride", stride)])?;
        let positions = [0, 1].map(|i| image[i].div_ceil(stride[i]));
        let mut before = [0; 2];
        for i in [0, 1] {
            let reached = checked_mul("pixels of windows", positions[i] - 1, stride[i])?.saturating_add(kernel[i]);
            before[i] = reached.saturating_sub(image[i]) / 2;
        }
        Self { image, kernel, stride, before, positions }.checked()
    }

    /// As torch pads: by `padding` pixels on both sides, fewer than the kernel has.
    pub fn padded(image: [usize; 2], kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Result<Self> {
        not_zero(&[("image", image), ("kernel", kernel), ("stride", stride)])?;
        let mut positions = [0; 2];
        for i in [0, 1] {
            let padded = checked_mul("padding", 2, padding[i])?.saturating_add(image[i]);
            if padding[i] >= kernel[i] || padded < kernel[i] {
                return Err(Error::invalid(format!(
                    "a kernel of {kernel:?} does not fit an image of {image:?} with a padding of {padding:?}"
                )));
            }
            positions[i] = (padded - kernel[i]) / stride[i] + 1;
        }
        Self { image, kernel, stride, before: padding, positions }.checked()
    }

    /// It, if every number fits u32: kernels count in these.
    fn checked(self) -> Result<Self> {
        let Self { image, kernel, stride, positions, .. } = self;
        let all = [("pixels of an image", image), ("taps of a kernel", kernel), ("positions", positions)];
        for (what, [lines, columns]) in all {
            fits(what, checked_mul(what, lines, columns)?)?;
        }
        for (&positions, &stride) in positions.iter().zip(&stride) {
            fits("pixels of windows", checked_mul("pixels of windows", positions, stride)?)?;
        }
        Ok(self)
    }

    /// Lines and columns of an image.
    pub fn image(&self) -> [usize; 2] {
        self.image
    }

    /// Lines and columns of a window.
    pub fn kernel(&self) -> [usize; 2] {
        self.kernel
    }

    /// Lines and columns from one window to the next.
    pub fn stride(&self) -> [usize; 2] {
        self.stride
    }

    /// Lines above and columns left of the image that the first window has.
    pub fn before(&self) -> [usize; 2] {
        self.before
    }

    /// Lines and columns of output positions.
    pub fn positions(&self) -> [usize; 2] {
        self.positions
    }

    /// Pixels of an image: rows of the input for each.
    pub fn pixel_count(&self) -> usize {
        self.image[0] * self.image[1]
    }

    /// Output positions of an image: rows of the output for each.
    pub fn position_count(&self) -> usize {
        self.positions[0] * self.positions[1]
    }

    /// Pixels of a window.
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Whether every position sees the one pixel at its place: a convolution is a GEMM of the image then.
    pub fn is_pixelwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.before == [0, 0]
    }

    /// The taps of position `at` along dimension `i` that lie in the image, and the pixel that tap 0 would be at, which
    /// may lie before the image.
    pub(crate) fn taps_at(&self, i: usize, at: usize) -> (std::ops::Range<usize>, isize) {
        let first = (at * self.stride[i]) as isize - self.before[i] as isize;
        let from = (-first).clamp(0, self.kernel[i] as isize) as usize;
        let to = (self.image[i] as isize - first).clamp(from as isize, self.kernel[i] as isize) as usize;
        (from..to, first)
    }

    /// The position along dimension `i` that sees pixel `at` by `tap`, if there is one.
    pub(crate) fn position_at(&self, i: usize, at: usize, tap: usize) -> Option<usize> {
        let from = (at + self.before[i]).checked_sub(tap)?;
        let position = from / self.stride[i];
        (from.is_multiple_of(self.stride[i]) && position < self.positions[i]).then_some(position)
    }
}

fn fits(what: &str, size: usize) -> Result<()> {
    // Signed arithmetic on the way, and room for the stride.
    if size < (1 << 31) { Ok(()) } else { Err(Error::invalid(format!("{what}: {size} are too many"))) }
}

fn not_zero(sizes: &[(&str, [usize; 2])]) -> Result<()> {
    match sizes.iter().find(|(_, size)| size.contains(&0)) {
        Some((what, size)) => Err(Error::invalid(format!("{what} is {size:?}, expected sizes above 0"))),
        None => Ok(()),
    }
}
