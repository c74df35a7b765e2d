//! The windows of images, side by side: what makes a convolution a GEMM.
//!
//! A row of the output is what one [`Window`] sees: for each of its taps, line by line, all channels of the pixel
//! there. Weights in the same order, `out channels x (kernel lines · kernel columns · channels)`, multiply it like any
//! other activations, dense, 2:4 or masked. A convolution whose windows are single pixels needs none of this. Packed
//! rather than read by the GEMM where it lies (implicit): every GEMM kernel serves convolutions then, and a calibration
//! sees what weights are multiplied with. It costs `taps` times the image's memory.
//!
//! Invariant: what lies outside of the image is +0.0 and is not read.

mod grad;

use std::fmt;

use ndarray::Array2;

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{each_pair, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, NodeArgs, NodeOp, ReferenceArgs};
use crate::kernels::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, WINDOW, WORKGROUP,
    WindowParams, window_overrides,
};
use crate::matrix::{DType, Element};
use crate::reference::im2col;
use crate::window::Window;

pub use grad::Im2colGrad;

/// Windows of images, one in each row.
///
/// ```
/// use sparse24::{DType, Device, Im2col, Matrix, Window};
/// let device = Device::cpu()?;
/// // An image of 2 x 2 pixels of one channel, seen two pixels wide.
/// let x = device.upload(&Matrix::from_f32(4, 1, &[1.0, 2.0, 3.0, 4.0])?)?;
/// let window = Window::same([2, 2], [1, 2], [1, 1])?;
/// let y = device.zeros(4, 2, DType::F32)?;
/// device.prepare(&Im2col { x: &x, window, batch: 1, y: &y })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(4, 2, &[1.0, 2.0, 2.0, 0.0, 3.0, 4.0, 4.0, 0.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Im2col<'a> {
    /// `batch·pixels x channels`.
    pub x: &'a Tensor,
    /// The windows of each image.
    pub window: Window,
    /// Number of images.
    pub batch: usize,
    /// `batch·positions x taps·channels`, overwritten.
    pub y: &'a Tensor,
}

impl Operation for Im2col<'_> {
    fn name(&self) -> &'static str {
        "im2col"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("x", self.x), Operand::write("y", self.y)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, window, batch, y } = *self;
        expect_shape("x", x.shape(), (checked_mul("pixels", batch, window.pixel_count())?, x.cols()))?;
        let columns = checked_mul("columns of y", window.taps(), x.cols())?;
        expect_shape("y", y.shape(), (checked_mul("positions", batch, window.position_count())?, columns))
    }

    /// Nothing is computed.
    fn cost(&self) -> Cost {
        cost_of(0.0, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, window, y, .. } = *self;
        let channels = gpu_size("channels", x.cols())?;
        let kernel = Im2colKernel::new(&window, channels, x.dtype(), y.dtype())?;
        let runs = checked_mul("taps of all windows", y.rows(), window.taps())?;
        let threads = checked_mul("elements", runs, x.cols().div_ceil(4))?;
        let params = WindowParams::new(&window, gpu_size("elements", threads)?, channels);
        dispatch(gpu, Program::new(kernel), threads.div_ceil(WORKGROUP), &params, &[x.on_gpu(), y.on_gpu()])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, window, y, .. } = *self;
        Ok(Box::new(Call { x: x.on_cpu()?, channels: x.cols(), window, y: y.on_cpu()? }))
    }
}

/// The program (shaders/im2col.wgsl). Its name (`Display`) is made of its parts, such as `im2col-f16f32-quads-3x3`:
/// types of input and arithmetic, how channels are read, and the kernel of the convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Im2colKernel {
    kernel: [u32; 2],
    access: FeatureAccess,
    types: Types,
}

impl Im2colKernel {
    /// That of windows of images of so many channels. An error for a type that kernels do not store.
    pub fn new(window: &Window, channels: u32, storage: DType, output: DType) -> Result<Self> {
        let kernel = window.kernel().map(|size| size as u32);
        Ok(Self { kernel, access: FeatureAccess::of(channels), types: Types::new(storage, output)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let sizes = Types::all().flat_map(|types| WIDTHS.map(|width| (types, FeatureAccess::of(width))));
    sizes.map(|(types, access)| Program::new(Im2colKernel { kernel: [3, 3], access, types })).chain(grad::shaders())
}

impl Shader for Im2colKernel {
    fn module(&self) -> String {
        Self { kernel: [3, 3], ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[self.access.text(), WINDOW, include_str!("../../shaders/im2col.wgsl")])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        window_overrides(self.kernel)
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        WindowParams::LAYOUT
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for Im2colKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel: [lines, columns], access, types } = self;
        write!(f, "im2col-{}f32-{}-{lines}x{columns}{}", types.storage(), access.name(), types.suffix())
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    channels: usize,
    window: Window,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let Self { channels, ref window, .. } = *self;
        let x = read(&self.x);
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => {
            let ([lines, columns], pixels) = (window.positions(), window.pixel_count());
            // A line of positions is a task.
            cpu.each_chunk(y, columns * window.taps() * channels, |task, y| {
                let x = &x[task / lines * pixels * channels..][..pixels * channels];
                cpu.simd().run(PackLine { x, channels, window, line: task % lines, y });
            });
        });
    }
}

work!(PackLine<X, Y>, { x: &'a [X], channels: usize, window: &'a Window, line: usize, y: &'a mut [Y] },
    pack_line(x, channels, window, line, y));

/// The windows of one line of positions of the image `x`. Taps side by side are a run of memory.
#[inline(always)]
fn pack_line<X: Element, Y: Element>(x: &[X], channels: usize, window: &Window, line: usize, y: &mut [Y]) {
    let ([_, width], [_, kernel_columns]) = (window.image(), window.kernel());
    let (inside, first_line) = window.taps_at(0, line);
    let tap_line = kernel_columns * channels;
    for (column, y) in y.chunks_exact_mut(window.taps() * channels).enumerate() {
        let (taps, first) = window.taps_at(1, column);
        for (tap, y) in y.chunks_exact_mut(tap_line).enumerate() {
            if !inside.contains(&tap) || taps.is_empty() {
                y.fill(Y::from_f32(0.0));
                continue;
            }
            // Both are in the image, as the taps are.
            let at = (first_line + tap as isize) as usize * width + (first + taps.start as isize) as usize;
            let (before, y) = y.split_at_mut(taps.start * channels);
            let (y, behind) = y.split_at_mut(taps.len() * channels);
            before.fill(Y::from_f32(0.0));
            y.iter_mut().zip(&x[at * channels..]).for_each(|(y, x)| *y = Y::from_f32(x.to_f32()));
            behind.fill(Y::from_f32(0.0));
        }
    }
}

/// The windows of an image as a node.
#[derive(Debug)]
pub(crate) struct Im2colNode {
    pub(crate) window: Window,
}

impl NodeOp for Im2colNode {
    fn name(&self) -> &'static str {
        "im2col"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let &NodeArgs { device, batch, y, .. } = args;
        device.prepare(&Im2col { x: args.tensor(0)?, window: self.window, batch, y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        Ok(im2col::exact(args.matrix(0)?.view(), &self.window))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let Some(dx) = args.gradient(0) else { return Ok(Vec::new()) };
        let NodeArgs { device, batch, .. } = args.forward;
        Ok(vec![device.prepare(&Im2colGrad { dy: args.dy, window: self.window, batch, dx })?])
    }
}
