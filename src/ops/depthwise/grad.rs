//! Gradients of a depthwise convolution without its activation: of its input and of its weights. That of the bias is a
//! sum over positions, [`BiasGrad`](crate::ops::gemm::BiasGrad).
//!
//! Invariant: each gradient is summed by one thread, or by threads in an order that shapes decide.

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
use crate::simd::{Instructions, multiply_add};
use crate::window::Window;

/// Gradient of a [`Depthwise`](crate::Depthwise) without activation with respect to `x`. All tensors are f32.
///
/// ```
/// use sparse24::{DType, DepthwiseGradX, Device, Gradient, Matrix, Window};
/// let device = Device::cpu()?;
/// let window = Window::same([1, 2], [1, 2], [1, 1])?;
/// let weights = device.upload(&Matrix::from_f32(2, 1, &[1.0, 10.0])?)?;
/// let dy = device.upload(&Matrix::from_f32(2, 1, &[3.0, 5.0])?)?;
/// let to = device.zeros(2, 1, DType::F32)?;
/// let dx = Gradient { to: &to, add: false };
/// device.prepare(&DepthwiseGradX { weights: &weights, window, batch: 1, dy: &dy, dx })?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(2, 1, &[3.0, 35.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseGradX<'a> {
    /// `taps x channels`.
    pub weights: &'a Tensor,
    /// The windows of each image.
    pub window: Window,
    /// Number of images.
    pub batch: usize,
    /// `batch·positions x channels`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `x`, `batch·pixels x channels`.
    pub dx: Gradient<'a>,
}

/// Gradient of a [`Depthwise`](crate::Depthwise) without activation with respect to its weights. All tensors are f32.
///
/// ```
/// use sparse24::{DType, DepthwiseGradW, Device, Gradient, Matrix, Window};
/// let device = Device::cpu()?;
/// let window = Window::same([1, 2], [1, 2], [1, 1])?;
/// let x = device.upload(&Matrix::from_f32(2, 1, &[1.0, 10.0])?)?;
/// let dy = device.upload(&Matrix::from_f32(2, 1, &[3.0, 5.0])?)?;
/// let to = device.zeros(2, 1, DType::F32)?;
/// let dw = Gradient { to: &to, add: false };
/// device.prepare(&DepthwiseGradW { x: &x, window, batch: 1, dy: &dy, dw })?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(2, 1, &[53.0, 30.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseGradW<'a> {
    /// `batch·pixels x channels`.
    pub x: &'a Tensor,
    /// The windows of each image.
    pub window: Window,
    /// Number of images.
    pub batch: usize,
    /// `batch·positions x channels`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of the weights, `taps x channels`.
    pub dw: Gradient<'a>,
}

/// An error unless `dy` is the gradient of what has these windows.
fn check_dy(dy: &Tensor, window: &Window, batch: usize, channels: usize) -> Result<()> {
    expect_shape("dy", dy.shape(), (checked_mul("positions", batch, window.position_count())?, channels))
}

impl Operation for DepthwiseGradX<'_> {
    fn name(&self) -> &'static str {
        "depthwise_grad_x"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { weights, dy, dx, .. } = *self;
        vec![Operand::read("weights", weights), Operand::read("dy", dy), dx.operand("dx")]
    }

    fn check(&self) -> Result<()> {
        let Self { weights, window, batch, dy, dx } = *self;
        check_f32(&[("weights", weights), ("dy", dy)])?;
        expect_shape("weights", weights.shape(), (window.taps(), weights.cols()))?;
        check_dy(dy, &window, batch, weights.cols())?;
        dx.check("dx", (checked_mul("pixels", batch, window.pixel_count())?, weights.cols()))
    }

    fn cost(&self) -> Cost {
        let outputs = self.dy.rows() as f64 * self.dy.cols() as f64;
        cost_of(2.0 * outputs * self.window.taps() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { weights, window, dy, dx, .. } = *self;
        let elements = checked_mul("elements", dx.to.rows(), dx.to.cols())?;
        gpu_size("elements of dy", checked_mul("elements of dy", dy.rows(), dy.cols())?)?;
        let params = WindowParams::new(&window, gpu_size("elements", elements)?, gpu_size("channels", dy.cols())?);
        let kernel = DepthwiseGradKernel::new(Of::Input, &window, dx.add);
        let operands = [weights.on_gpu(), dy.on_gpu(), dx.to.on_gpu()];
        dispatch(gpu, Program::new(kernel), elements.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { weights, window, dy, dx, .. } = *self;
        let channels = dy.cols();
        Ok(Box::new(InputCall { weights: weights.on_cpu()?, dy: dy.on_cpu()?, channels, window, dx: dx.on_cpu()? }))
    }
}

impl Operation for DepthwiseGradW<'_> {
    fn name(&self) -> &'static str {
        "depthwise_grad_w"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, dy, dw, .. } = *self;
        vec![Operand::read("x", x), Operand::read("dy", dy), dw.operand("dw")]
    }

    fn check(&self) -> Result<()> {
        let Self { x, window, batch, dy, dw } = *self;
        check_f32(&[("x", x), ("dy", dy)])?;
        expect_shape("x", x.shape(), (checked_mul("pixels", batch, window.pixel_count())?, x.cols()))?;
        check_dy(dy, &window, batch, x.cols())?;
        dw.check("dw", (window.taps(), x.cols()))
    }

    fn cost(&self) -> Cost {
        let outputs = self.dy.rows() as f64 * self.dy.cols() as f64;
        cost_of(2.0 * outputs * self.window.taps() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, window, dy, dw, .. } = *self;
        gpu_size("elements of x", checked_mul("elements of x", x.rows(), x.cols())?)?;
        gpu_size("elements of dy", checked_mul("elements of dy", dy.rows(), dy.cols())?)?;
        let params = WindowParams::new(&window, gpu_size("positions", dy.rows())?, gpu_size("channels", dy.cols())?);
        let kernel = DepthwiseGradKernel::new(Of::Weights, &window, dw.add);
        let workgroups = window.taps() * dy.cols().div_ceil(CHANNELS);
        dispatch(gpu, Program::new(kernel), workgroups, &params, &[x.on_gpu(), dy.on_gpu(), dw.to.on_gpu()])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, window, dy, dw, .. } = *self;
        let channels = dy.cols();
        Ok(Box::new(WeightsCall { x: x.on_cpu()?, dy: dy.on_cpu()?, channels, window, dw: dw.on_cpu()? }))
    }
}

/// Channels of a workgroup, as in shaders/depthwise_grad_w.wgsl.
const CHANNELS: usize = 64;

/// What a gradient is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Of {
    Input,
    Weights,
}

/// The programs (shaders/depthwise_grad_x.wgsl and depthwise_grad_w.wgsl). Their names (`Display`) are made of their
/// parts, such as `depthwise_grad_x-3x3-add`: what they are of, the kernel of the convolution, and `add` where the
/// gradient is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct DepthwiseGradKernel {
    of: Of,
    kernel: [u32; 2],
    add: bool,
}

impl DepthwiseGradKernel {
    fn new(of: Of, window: &Window, add: bool) -> Self {
        Self { of, kernel: window.kernel().map(|size| size as u32), add }
    }

    /// The one that stands for all of its text.
    const fn representative(of: Of) -> Self {
        Self { of, kernel: [3, 3], add: false }
    }
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    [Of::Input, Of::Weights].map(|of| Program::new(DepthwiseGradKernel::representative(of))).into_iter()
}

impl Shader for DepthwiseGradKernel {
    fn module(&self) -> String {
        Self::representative(self.of).to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(match self.of {
            Of::Input => {
                Text::as_it_stands(&[WINDOW, WINDOW_GRAD, include_str!("../../../shaders/depthwise_grad_x.wgsl")])
            }
            Of::Weights => Text::as_it_stands(&[WINDOW, include_str!("../../../shaders/depthwise_grad_w.wgsl")]),
        })
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        window_overrides(self.kernel).into_iter().chain([add_override(self.add)]).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        match self.of {
            Of::Input => {
                const { &[Binding::PARAMS, Binding::read(1, "weights"), Binding::read(2, "dy"), Binding::write(3, "dx")] }
            }
            Of::Weights => {
                const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::read(2, "dy"), Binding::write(3, "dw")] }
            }
        }
    }

    fn params(&self) -> ParamsLayout {
        WindowParams::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        match self.of {
            Of::Input => 0,
            Of::Weights => 4 * WORKGROUP as u32,
        }
    }
}

impl fmt::Display for DepthwiseGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of, kernel: [lines, columns], add } = self;
        let of = if *of == Of::Input { "x" } else { "w" };
        write!(f, "depthwise_grad_{of}-{lines}x{columns}{}", add_suffix(*add))
    }
}

#[derive(Debug)]
struct InputCall {
    weights: Shared,
    dy: Shared,
    channels: usize,
    window: Window,
    dx: Target,
}

impl CpuCall for InputCall {
    fn run(&self, cpu: &Cpu) {
        let Self { channels, ref window, .. } = *self;
        let (weights, dy, add) = (read(&self.weights), read(&self.dy), self.dx.add);
        let [Some(weights), Some(dy)] = [&weights, &dy].map(|m| f32::of(m.elements())) else { return };
        let mut dx = write(&self.dx.to);
        let Elements::F32(dx) = dx.elements_mut() else { return };
        let ([lines, columns], image) = (window.image(), window.position_count() * channels);
        // A line of pixels is a task.
        cpu.each_chunk(dx, columns * channels, |task, dx| {
            let dy = &dy[task / lines * image..][..image];
            cpu.simd().run(InputLine { weights, dy, channels, window, line: task % lines, add, dx });
        });
    }
}

work_of_f32!(InputLine, {
        weights: &'a [f32],
        dy: &'a [f32],
        channels: usize,
        window: &'a Window,
        line: usize,
        add: bool,
        dx: &'a mut [f32],
    },
    input_line::<S>((weights, dy), (channels, window), line, add, dx));

/// One line of pixels, from the positions of one image.
#[inline(always)]
fn input_line<S: Instructions>(
    (weights, dy): (&[f32], &[f32]),
    (channels, window): (usize, &Window),
    line: usize,
    add: bool,
    dx: &mut [f32],
) {
    let ([tap_lines, tap_columns], [_, columns]) = (window.kernel(), window.positions());
    if !add {
        dx.fill(0.0);
    }
    for tap_line in 0..tap_lines {
        let Some(position_line) = window.position_at(0, line, tap_line) else { continue };
        for column in 0..columns {
            let (taps, first) = window.taps_at(1, column);
            let dy = &dy[(position_line * columns + column) * channels..][..channels];
            for tap in taps {
                // In the image, as the tap is.
                let pixel = (first + tap as isize) as usize;
                let w = &weights[(tap_line * tap_columns + tap) * channels..][..channels];
                for ((dx, dy), w) in dx[pixel * channels..][..channels].iter_mut().zip(dy).zip(w) {
                    *dx = multiply_add::<S>(*dy, *w, *dx);
                }
            }
        }
    }
}

#[derive(Debug)]
struct WeightsCall {
    x: Shared,
    dy: Shared,
    channels: usize,
    window: Window,
    dw: Target,
}

impl CpuCall for WeightsCall {
    fn run(&self, cpu: &Cpu) {
        let Self { channels, ref window, .. } = *self;
        let (x, dy, add) = (read(&self.x), read(&self.dy), self.dw.add);
        let [Some(x), Some(dy)] = [&x, &dy].map(|m| f32::of(m.elements())) else { return };
        let mut dw = write(&self.dw.to);
        let Elements::F32(dw) = dw.elements_mut() else { return };
        // A tap is a task.
        cpu.each_chunk(dw, channels, |tap, dw| {
            cpu.simd().run(WeightsTap { x, dy, channels, window, tap, add, dw });
        });
    }
}

work_of_f32!(WeightsTap, {
        x: &'a [f32],
        dy: &'a [f32],
        channels: usize,
        window: &'a Window,
        tap: usize,
        add: bool,
        dw: &'a mut [f32],
    },
    weights_tap::<S>((x, dy), (channels, window), tap, add, dw));

/// One tap of all images.
#[inline(always)]
fn weights_tap<S: Instructions>(
    (x, dy): (&[f32], &[f32]),
    (channels, window): (usize, &Window),
    tap: usize,
    add: bool,
    dw: &mut [f32],
) {
    let ([_, width], [_, tap_columns], [lines, columns]) = (window.image(), window.kernel(), window.positions());
    let (tap_line, tap_column) = (tap / tap_columns, tap % tap_columns);
    if !add {
        dw.fill(0.0);
    }
    let images = x.chunks_exact(window.pixel_count() * channels).zip(dy.chunks_exact(lines * columns * channels));
    for (x, dy) in images {
        for line in 0..lines {
            let (taps, first) = window.taps_at(0, line);
            if !taps.contains(&tap_line) {
                continue;
            }
            let pixel_line = (first + tap_line as isize) as usize;
            for column in 0..columns {
                let (taps, first) = window.taps_at(1, column);
                if !taps.contains(&tap_column) {
                    continue;
                }
                let pixel = pixel_line * width + (first + tap_column as isize) as usize;
                let (x, dy) =
                    (&x[pixel * channels..][..channels], &dy[(line * columns + column) * channels..][..channels]);
                for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                    *dw = multiply_add::<S>(*x, *dy, *dw);
                }
            }
        }
    }
}
