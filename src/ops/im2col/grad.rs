//! Gradient of the windows of images.
//!
//! Invariant: each pixel's gradient is summed by one thread, window after window.

use std::fmt;

use super::super::{Cost, Gradient, Operand, Operation, check_f32, cost_of, dispatch};
use crate::cpu::rows::{Target, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Text, WINDOW, WINDOW_GRAD, WORKGROUP, WindowParams,
    add_override, add_suffix, window_overrides,
};
use crate::matrix::{Element, Elements};
use crate::window::Window;

/// Gradient of an [`Im2col`](crate::Im2col) with respect to `x`: of each pixel the sum over all windows that see it.
/// All tensors are f32.
///
/// ```
/// use sparse24::{DType, Device, Gradient, Im2colGrad, Matrix, Window};
/// let device = Device::cpu()?;
/// let window = Window::same([1, 2], [1, 2], [1, 1])?;
/// let dy = device.upload(&Matrix::from_f32(2, 2, &[1.0, 10.0, 100.0, f32::NAN])?)?;
/// let to = device.zeros(2, 1, DType::F32)?;
/// device.prepare(&Im2colGrad { dy: &dy, window, batch: 1, dx: Gradient { to: &to, add: false } })?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(2, 1, &[1.0, 110.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Im2colGrad<'a> {
    /// `batch·positions x taps·channels`: the gradient of the result. What lies outside of the image does not count.
    pub dy: &'a Tensor,
    /// The windows of each image.
    pub window: Window,
    /// Number of images.
    pub batch: usize,
    /// Of `x`, `batch·pixels x channels`.
    pub dx: Gradient<'a>,
}

impl Operation for Im2colGrad<'_> {
    fn name(&self) -> &'static str {
        "im2col_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("dy", self.dy), self.dx.operand("dx")]
    }

    fn check(&self) -> Result<()> {
        let Self { dy, window, batch, dx } = *self;
        check_f32(&[("dy", dy)])?;
        let channels = dx.to.cols();
        let columns = checked_mul("columns of dy", window.taps(), channels)?;
        expect_shape("dy", dy.shape(), (checked_mul("positions", batch, window.position_count())?, columns))?;
        dx.check("dx", (checked_mul("pixels", batch, window.pixel_count())?, channels))
    }

    fn cost(&self) -> Cost {
        cost_of(self.dy.rows() as f64 * self.dy.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { dy, window, dx, .. } = *self;
        let elements = checked_mul("elements", dx.to.rows(), dx.to.cols())?;
        let kernel = Im2colGradKernel { kernel: window.kernel().map(|size| size as u32), add: dx.add };
        gpu_size("elements of dy", checked_mul("elements of dy", dy.rows(), dy.cols())?)?;
        let params = WindowParams::new(&window, gpu_size("elements", elements)?, gpu_size("channels", dx.to.cols())?);
        let operands = [dy.on_gpu(), dx.to.on_gpu()];
        dispatch(gpu, Program::new(kernel), elements.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { dy, window, dx, .. } = *self;
        Ok(Box::new(Call { dy: dy.on_cpu()?, channels: dx.to.cols(), window, dx: dx.on_cpu()? }))
    }
}

/// The program (shaders/im2col_grad.wgsl). Its name (`Display`) is made of its parts, such as `im2col_grad-3x3-add`:
/// the kernel of the convolution, and `add` where the gradient is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Im2colGradKernel {
    kernel: [u32; 2],
    add: bool,
}

/// The one that stands for all of its text.
const REPRESENTATIVE: Im2colGradKernel = Im2colGradKernel { kernel: [3, 3], add: false };

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(REPRESENTATIVE))
}

impl Shader for Im2colGradKernel {
    fn module(&self) -> String {
        REPRESENTATIVE.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[WINDOW, WINDOW_GRAD, include_str!("../../../shaders/im2col_grad.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        window_overrides(self.kernel).into_iter().chain([add_override(self.add)]).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "dy"), Binding::write(2, "dx")] }
    }

    fn params(&self) -> ParamsLayout {
        WindowParams::LAYOUT
    }
}

impl fmt::Display for Im2colGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel: [lines, columns], add } = self;
        write!(f, "im2col_grad-{lines}x{columns}{}", add_suffix(*add))
    }
}

#[derive(Debug)]
struct Call {
    dy: Shared,
    channels: usize,
    window: Window,
    dx: Target,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let Self { channels, ref window, .. } = *self;
        let (dy, add) = (read(&self.dy), self.dx.add);
        let Some(dy) = f32::of(dy.elements()) else { return };
        let mut dx = write(&self.dx.to);
        let Elements::F32(dx) = dx.elements_mut() else { return };
        let ([lines, columns], taps) = (window.image(), window.taps());
        let image = window.position_count() * taps * channels;
        // A line of pixels is a task.
        cpu.each_chunk(dx, columns * channels, |task, dx| {
            let dy = &dy[task / lines * image..][..image];
            cpu.simd().run(GatherLine { dy, channels, window, line: task % lines, add, dx });
        });
    }
}

work_of_f32!(GatherLine, {
        dy: &'a [f32],
        channels: usize,
        window: &'a Window,
        line: usize,
        add: bool,
        dx: &'a mut [f32],
    },
    gather_line(dy, (channels, window), line, add, dx));

/// One line of pixels, from the windows of one image.
#[inline(always)]
fn gather_line(dy: &[f32], (channels, window): (usize, &Window), line: usize, add: bool, dx: &mut [f32]) {
    let ([_, width], [tap_lines, tap_columns]) = (window.image(), window.kernel());
    let [_, columns] = window.positions();
    if !add {
        dx.fill(0.0);
    }
    for tap_line in 0..tap_lines {
        let Some(position_line) = window.position_at(0, line, tap_line) else { continue };
        for column in 0..columns {
            let (taps, first) = window.taps_at(1, column);
            for tap in taps {
                let pixel = (first + tap as isize) as usize;
                debug_assert!(pixel < width);
                let run = (position_line * columns + column) * window.taps() + tap_line * tap_columns + tap;
                let (dx, dy) = (&mut dx[pixel * channels..][..channels], &dy[run * channels..][..channels]);
                dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
            }
        }
    }
}
