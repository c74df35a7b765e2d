//! What programs over the windows of images share: their parameters, and the kernel's size, which is compiled in so
//! that loops over taps have a constant bound.

use bytemuck::{Pod, Zeroable};

use super::{ParamsLayout, fields};
use crate::window::Window;

/// The text of the parameters.
pub(crate) const WINDOW: &str = include_str!("../../shaders/shared/window.wgsl");

/// The text of windows the other way round, which follows that.
pub(crate) const WINDOW_GRAD: &str = include_str!("../../shaders/shared/window_grad.wgsl");

/// Mirror of `Params` in shaders/shared/window.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct WindowParams {
    threads: u32,
    channels: u32,
    image_lines: u32,
    image_columns: u32,
    stride_lines: u32,
    stride_columns: u32,
    before_lines: u32,
    before_columns: u32,
    position_lines: u32,
    position_columns: u32,
}

impl WindowParams {
    pub(crate) const LAYOUT: ParamsLayout = fields!(WindowParams:
        threads channels image_lines image_columns stride_lines stride_columns before_lines before_columns
        position_lines position_columns);

    /// Those of so many threads over windows of images of so many channels.
    pub(crate) fn new(window: &Window, threads: u32, channels: u32) -> Self {
        // A window's sizes fit u32.
        let [image, stride, before, positions] =
            [window.image(), window.stride(), window.before(), window.positions()].map(|pair| pair.map(|n| n as u32));
        Self {
            threads,
            channels,
            image_lines: image[0],
            image_columns: image[1],
            stride_lines: stride[0],
            stride_columns: stride[1],
            before_lines: before[0],
            before_columns: before[1],
            position_lines: positions[0],
            position_columns: positions[1],
        }
    }
}

/// Values of the `override`s of shaders/shared/window.wgsl.
pub(crate) fn window_overrides([lines, columns]: [u32; 2]) -> Vec<(&'static str, f64)> {
    vec![("KERNEL_LINES", f64::from(lines)), ("KERNEL_COLUMNS", f64::from(columns))]
}
