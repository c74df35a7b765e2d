//! Depthwise convolution: every channel by a kernel of its own.
//!
//! It has few multiply-adds for each number that it moves, and none of a GEMM's reuse: it is not pruned. Weights lie
//! tap by tap, so that channels are runs of memory everywhere. Invariant: what lies outside of the image is not read,
//! and each output is summed in the order of its taps.

mod grad;

use std::fmt;

use ndarray::Array2;

use super::activation::{Activate, ActivateGrad};
use super::gemm::BiasGrad;
use super::{Cost, Gradient, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{activate, each_pair, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, NodeArgs, NodeOp, ParamId, Precision, Read, ReferenceArgs, Rows, ValueId};
use crate::kernels::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, WINDOW, WORKGROUP,
    WindowParams, activation_override, window_overrides,
};
use crate::matrix::{DType, Element};
use crate::problem::Activation;
use crate::reference::depthwise;
use crate::simd::{Instructions, multiply_add};
use crate::window::Window;

pub use grad::{DepthwiseGradW, DepthwiseGradX};

/// `y[p, c] = act(Σ x[pixel of tap t of window p, c] · weights[t, c] + bias[c])`.
///
/// ```
/// use sparse24::{Activation, DType, Depthwise, Device, Matrix, Window};
/// let device = Device::cpu()?;
/// // A line of three pixels of one channel; each sees itself, once, and its neighbours, ten times.
/// let x = device.upload(&Matrix::from_f32(3, 1, &[1.0, 2.0, 3.0])?)?;
/// let weights = device.upload(&Matrix::from_f32(3, 1, &[10.0, 1.0, 10.0])?)?;
/// let window = Window::same([1, 3], [1, 3], [1, 1])?;
/// let y = device.zeros(3, 1, DType::F32)?;
/// let activation = Activation::None;
/// let call = Depthwise { x: &x, weights: &weights, bias: None, activation, window, batch: 1, y: &y };
/// device.prepare(&call)?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(3, 1, &[21.0, 42.0, 23.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Depthwise<'a> {
    /// `batch·pixels x channels`.
    pub x: &'a Tensor,
    /// `taps x channels`, f32: taps line by line.
    pub weights: &'a Tensor,
    /// `1 x channels`, f32.
    pub bias: Option<&'a Tensor>,
    /// What is done to each sum.
    pub activation: Activation,
    /// The windows of each image.
    pub window: Window,
    /// Number of images.
    pub batch: usize,
    /// `batch·positions x channels`, overwritten.
    pub y: &'a Tensor,
}

impl Operation for Depthwise<'_> {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, weights, bias, y, .. } = *self;
        let bias = bias.map(|bias| Operand::read("bias", bias));
        let given = [Operand::read("x", x), Operand::read("weights", weights), Operand::write("y", y)];
        given.into_iter().chain(bias).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { x, weights, bias, window, batch, y, .. } = *self;
        expect_shape("x", x.shape(), (checked_mul("pixels", batch, window.pixel_count())?, x.cols()))?;
        expect_shape("y", y.shape(), (checked_mul("positions", batch, window.position_count())?, x.cols()))?;
        expect_shape("weights", weights.shape(), (window.taps(), x.cols()))?;
        expect_dtype("weights", weights.dtype(), DType::F32)?;
        if let Some(bias) = bias {
            expect_shape("bias", bias.shape(), (1, x.cols()))?;
            expect_dtype("bias", bias.dtype(), DType::F32)?;
        }
        Ok(())
    }

    /// Taps outside of images count, too.
    fn cost(&self) -> Cost {
        let outputs = self.y.rows() as f64 * self.y.cols() as f64;
        cost_of(2.0 * outputs * self.window.taps() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, weights, bias, activation, window, y, .. } = *self;
        let channels = gpu_size("channels", x.cols())?;
        let kernel = DepthwiseKernel {
            bias: bias.is_some(),
            activation,
            ..DepthwiseKernel::new(&window, channels, x.dtype(), y.dtype())?
        };
        let threads = checked_mul("elements", y.rows(), x.cols().div_ceil(4))?;
        let params = WindowParams::new(&window, gpu_size("elements", threads)?, channels);
        let operands = [x.on_gpu(), y.on_gpu(), weights.on_gpu(), bias.and_then(Tensor::on_gpu)];
        dispatch(gpu, Program::new(kernel), threads.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, weights, bias, activation, window, y, .. } = *self;
        let bias = bias.map(Tensor::on_cpu).transpose()?;
        let channels = x.cols();
        let (x, weights, y) = (x.on_cpu()?, weights.on_cpu()?, y.on_cpu()?);
        Ok(Box::new(Call { x, weights, bias, activation, channels, window, y }))
    }
}

/// The program (shaders/depthwise.wgsl). Its name (`Display`) is made of its parts, such as
/// `depthwise-f16f32-quads-3x3-bias_relu6`: types of input and sums, how channels are read, the kernel of the
/// convolution, and what is done to sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DepthwiseKernel {
    kernel: [u32; 2],
    bias: bool,
    activation: Activation,
    access: FeatureAccess,
    types: Types,
}

impl DepthwiseKernel {
    /// That of windows of images of so many channels, with nothing done to sums. An error for a type that kernels do
    /// not store.
    pub fn new(window: &Window, channels: u32, storage: DType, output: DType) -> Result<Self> {
        let (kernel, types) = (window.kernel().map(|size| size as u32), Types::new(storage, output)?);
        Ok(Self { kernel, bias: false, activation: Activation::None, access: FeatureAccess::of(channels), types })
    }

    /// The one that stands for all of its text.
    fn representative(self) -> Self {
        Self { kernel: [3, 3], bias: true, activation: Activation::None, ..self }
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let sizes = Types::all().flat_map(|types| WIDTHS.map(|width| (types, FeatureAccess::of(width))));
    let forward = sizes.map(|(types, access)| {
        let (kernel, activation) = ([3, 3], Activation::None);
        Program::new(DepthwiseKernel { kernel, bias: true, activation, access, types })
    });
    forward.chain(grad::shaders())
}

impl Shader for DepthwiseKernel {
    fn module(&self) -> String {
        self.representative().to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[
            self.access.text(),
            include_str!("../../shaders/shared/activation.wgsl"),
            WINDOW,
            include_str!("../../shaders/depthwise.wgsl"),
        ])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let own = [activation_override(self.activation), ("HAS_BIAS", f64::from(u8::from(self.bias)))];
        window_overrides(self.kernel).into_iter().chain(own).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "weights"),
                Binding::read(4, "bias"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        WindowParams::LAYOUT
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for DepthwiseKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel: [lines, columns], bias, activation, access, types } = self;
        let bias = if *bias { "bias_" } else { "" };
        let (storage, access, suffix) = (types.storage(), access.name(), types.suffix());
        write!(f, "depthwise-{storage}f32-{access}-{lines}x{columns}-{bias}{}{suffix}", activation.name())
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    weights: Shared,
    bias: Option<Shared>,
    activation: Activation,
    channels: usize,
    window: Window,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let Self { activation, channels, ref window, .. } = *self;
        let (x, weights, bias) = (read(&self.x), read(&self.weights), self.bias.as_deref().map(read));
        let Some(weights) = f32::of(weights.elements()) else { return };
        let bias = bias.as_ref().and_then(|bias| f32::of(bias.elements()));
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => {
            let ([lines, columns], pixels) = (window.positions(), window.pixel_count());
            // A line of positions is a task.
            cpu.each_chunk(y, columns * channels, |task, y| {
                let x = &x[task / lines * pixels * channels..][..pixels * channels];
                let sums = Sums { weights, bias, activation, channels, window };
                cpu.simd().run(ConvolveLine { x, sums, line: task % lines, y });
            });
        });
    }
}

/// What all sums have in common.
#[derive(Clone, Copy)]
struct Sums<'a> {
    weights: &'a [f32],
    bias: Option<&'a [f32]>,
    activation: Activation,
    channels: usize,
    window: &'a Window,
}

work!(ConvolveLine<X, Y>, { x: &'a [X], sums: Sums<'a>, line: usize, y: &'a mut [Y] },
    convolve_line::<X, Y, S>(x, sums, line, y));

/// Positions that are computed side by side: each weight is loaded once for all of them.
const SIDE: usize = 4;

/// Channels of a run of sums: with [`SIDE`] positions eight registers of AVX2, four of AVX-512.
const RUN: usize = 16;

/// One line of positions of the image `x`.
#[inline(always)]
fn convolve_line<X: Element, Y: Element, S: Instructions>(x: &[X], sums: Sums<'_>, line: usize, y: &mut [Y]) {
    let Sums { channels, window, .. } = sums;
    let ([_, width], [_, columns]) = (window.image(), window.positions());
    let (lines, first_line) = window.taps_at(0, line);
    let mut column = 0;
    while column < columns {
        let (taps, first) = window.taps_at(1, column);
        let all = |column: usize| window.taps_at(1, column).0.len() == window.kernel()[1];
        // In the middle of a line all taps are in the image.
        let side = if column + SIDE <= columns && all(column) && all(column + SIDE - 1) { SIDE } else { 1 };
        // The first pixel of each line of taps; these are in the image.
        let first = (first + taps.start as isize) as usize;
        let pixels = lines.clone().map(|tap| {
            let line = (first_line + tap as isize) as usize;
            (tap, &x[(line * width + first) * channels..])
        });
        let y = &mut y[column * channels..][..side * channels];
        if side == SIDE {
            convolve::<X, Y, S, SIDE>(sums, pixels, taps, y);
        } else {
            convolve::<X, Y, S, 1>(sums, pixels, taps, y);
        }
        column += side;
    }
}

/// Positions side by side of which all have these taps.
#[inline(always)]
fn convolve<'x, X: Element, Y: Element, S: Instructions, const P: usize>(
    sums: Sums<'_>,
    lines: impl Iterator<Item = (usize, &'x [X])> + Clone,
    taps: std::ops::Range<usize>,
    y: &mut [Y],
) {
    let mut channel = 0;
    while channel + RUN <= sums.channels {
        run::<X, Y, S, P, RUN>(sums, lines.clone(), taps.clone(), channel, y);
        channel += RUN;
    }
    while channel + RUN / 2 <= sums.channels {
        run::<X, Y, S, P, { RUN / 2 }>(sums, lines.clone(), taps.clone(), channel, y);
        channel += RUN / 2;
    }
    while channel < sums.channels {
        run::<X, Y, S, P, 1>(sums, lines.clone(), taps.clone(), channel, y);
        channel += 1;
    }
}

/// `L` channels of them.
#[inline(always)]
fn run<'x, X: Element, Y: Element, S: Instructions, const P: usize, const L: usize>(
    sums: Sums<'_>,
    lines: impl Iterator<Item = (usize, &'x [X])>,
    taps: std::ops::Range<usize>,
    channel: usize,
    y: &mut [Y],
) {
    let Sums { weights, bias, activation, channels, window } = sums;
    let ([_, kernel_columns], [_, stride]) = (window.kernel(), window.stride());
    let mut all = [[0.0f32; L]; P];
    for (tap_line, x) in lines {
        for (at, tap) in taps.clone().enumerate() {
            let w = &weights[(tap_line * kernel_columns + tap) * channels + channel..][..L];
            for (position, sums) in all.iter_mut().enumerate() {
                let x = &x[(position * stride + at) * channels + channel..][..L];
                for lane in 0..L {
                    sums[lane] = multiply_add::<S>(x[lane].to_f32(), w[lane], sums[lane]);
                }
            }
        }
    }
    if let Some(bias) = bias {
        let bias = &bias[channel..][..L];
        all.iter_mut().for_each(|sums| sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias));
    }
    activate(activation, all.as_flattened_mut());
    for (position, sums) in all.iter().enumerate() {
        let y = &mut y[position * channels + channel..][..L];
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = Y::from_f32(*sum));
    }
}

/// A depthwise convolution as a node: x, weights and the bias.
#[derive(Debug)]
struct DepthwiseNode {
    window: Window,
    activation: Activation,
}

impl NodeOp for DepthwiseNode {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let Self { window, activation } = *self;
        let &NodeArgs { device, batch, y, .. } = args;
        let (x, weights, bias) = (args.tensor(0)?, args.tensor(1)?, Some(args.tensor(2)?));
        device.prepare(&Depthwise { x, weights, bias, activation, window, batch, y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let Self { window, activation } = self;
        let (x, weights, bias) = (args.matrix(0)?, args.matrix(1)?, args.row(2)?);
        Ok(depthwise::exact(x.view(), weights.view(), Some(&bias), *activation, window))
    }

    fn saves(&self) -> bool {
        self.activation != Activation::None
    }

    fn prepare_saving(&self, args: &NodeArgs<'_>, saved: Option<&Tensor>) -> Result<Vec<Prepared>> {
        let Some(z) = saved else { return Ok(vec![self.prepare(args)?]) };
        let &NodeArgs { device, batch, y, .. } = args;
        let (x, weights, bias) = (args.tensor(0)?, args.tensor(1)?, Some(args.tensor(2)?));
        let Self { window, activation } = *self;
        Ok(vec![
            device.prepare(&Depthwise { x, weights, bias, activation: Activation::None, window, batch, y: z })?,
            device.prepare(&Activate { activation, x: z, residual: None, y })?,
        ])
    }

    /// Of dy the activation's gradient comes first, in the place of the node's value.
    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let Self { window, activation } = *self;
        let NodeArgs { device, batch, y, .. } = args.forward;
        let (x, weights) = (args.forward.tensor(0)?, args.forward.tensor(1)?);
        let mut calls = Vec::new();
        let dy = match args.saved {
            Some(z) => {
                let dx = Gradient { to: y, add: false };
                calls.push(device.prepare(&ActivateGrad { activation, x: z, dy: args.dy, dx })?);
                y
            }
            None => args.dy,
        };
        if let Some(dw) = args.gradient(1) {
            calls.push(device.prepare(&DepthwiseGradW { x, window, batch, dy, dw })?);
        }
        if let Some(dbias) = args.gradient(2) {
            calls.push(device.prepare(&BiasGrad { dy, dbias })?);
        }
        if let Some(dx) = args.gradient(0) {
            calls.push(device.prepare(&DepthwiseGradX { weights, window, batch, dy, dx })?);
        }
        Ok(calls)
    }
}

impl Graph {
    /// Adds a depthwise convolution by these parameters: weights of `taps x channels`, f32, and a bias.
    pub fn depthwise(
        &mut self,
        name: &str,
        x: ValueId,
        (weights, bias): (ParamId, ParamId),
        window: Window,
        activation: Activation,
    ) -> Result<ValueId> {
        let cols = self.value(x).cols;
        let reads = vec![Read::Value(x), Read::Param(weights), Read::Param(bias)];
        let rows = Rows::Each(window.position_count());
        self.add_node(name, DepthwiseNode { window, activation }, reads, (rows, cols, Precision::Model))
    }
}
