//! Pixels: what a picture has become when a network reads it.
//!
//! A picture goes to the device as it is decoded, a u32 for each pixel, a quarter of what its channels take as f32.
//! Invariant: each output is `(channel − mean) · scale` of one byte.

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

use super::{Cost, Indices, Operand, Operation, cost_of, dispatch};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{Graph, Input, NodeArgs, NodeOp, Precision, Read, ReferenceArgs, Rows, ValueId};
use crate::kernels::{Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, Types, WORKGROUP, fields};
use crate::matrix::{DType, Element, Elements};
use crate::reference::pixels;

/// Red, green and blue of each pixel, less a mean and times a scale of each channel.
///
/// ```
/// use sparse24::{DType, Device, Matrix, Pixels};
/// let device = Device::cpu()?;
/// let pixels = device.indices(2)?;
/// device.write_indices(&pixels, &[0x7f_00_ff, 0xff_7f_00])?;
/// let y = device.zeros(2, 3, DType::F32)?;
/// device.prepare(&Pixels { pixels: &pixels, mean: [127.0; 3], scale: [0.5; 3], y: &y })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(2, 3, &[0.0, -63.5, 64.0, 64.0, 0.0, -63.5])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Pixels<'a> {
    /// `0xRRGGBB` for each pixel; higher bits do not count.
    pub pixels: &'a Indices,
    /// Of red, green and blue; finite.
    pub mean: [f32; 3],
    /// Of red, green and blue; finite.
    pub scale: [f32; 3],
    /// `pixels x 3`, overwritten.
    pub y: &'a Tensor,
}

impl Operation for Pixels<'_> {
    fn name(&self) -> &'static str {
        "pixels"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("pixels", self.pixels), Operand::write("y", self.y)]
    }

    fn check(&self) -> Result<()> {
        let Self { pixels, mean, scale, y } = *self;
        expect_shape("y", y.shape(), (y.rows(), 3))?;
        expect_len("pixels", pixels.len(), y.rows())?;
        match mean.iter().chain(&scale).find(|number| !number.is_finite()) {
            Some(number) => Err(Error::invalid(format!("a channel's mean or scale is {number}, not a finite number"))),
            None => Ok(()),
        }
    }

    fn cost(&self) -> Cost {
        cost_of(6.0 * self.y.rows() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { pixels, mean: [mean0, mean1, mean2], scale: [scale0, scale1, scale2], y } = *self;
        let kernel = PixelsKernel::new(y.dtype())?;
        let pixel_count = gpu_size("pixels", y.rows())?;
        let params = Params { pixels: pixel_count, mean0, mean1, mean2, scale0, scale1, scale2 };
        let operands = [pixels.on_gpu(), y.on_gpu()];
        dispatch(gpu, Program::new(kernel), y.rows().div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { pixels, mean, scale, y } = *self;
        Ok(Box::new(Call { pixels: pixels.on_cpu()?, mean, scale, y: y.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/pixels.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    pixels: u32,
    mean0: f32,
    mean1: f32,
    mean2: f32,
    scale0: f32,
    scale1: f32,
    scale2: f32,
}

/// The program (shaders/pixels.wgsl). Its name (`Display`) has its types, such as `pixels-f32f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PixelsKernel {
    types: Types,
}

impl PixelsKernel {
    /// An error for a type that kernels do not store.
    pub fn new(output: DType) -> Result<Self> {
        Ok(Self { types: Types::new(DType::F32, output)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Types::all().filter(|types| types.storage() == DType::F32).map(|types| Program::new(PixelsKernel { types }))
}

impl Shader for PixelsKernel {
    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[include_str!("../../shaders/pixels.wgsl")])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("CHANNELS", 3.0)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "pixels"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: pixels mean0 mean1 mean2 scale0 scale1 scale2)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for PixelsKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pixels-{}f32{}", self.types.storage(), self.types.suffix())
    }
}

/// Pixels of a task.
const TASK: usize = 1 << 12;

#[derive(Debug)]
struct Call {
    pixels: SharedIndices,
    mean: [f32; 3],
    scale: [f32; 3],
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        match write(&self.y).elements_mut() {
            Elements::F32(y) => self.normalize(cpu, y),
            Elements::F16(y) => self.normalize(cpu, y),
            // Refused when the call is prepared.
            Elements::Bf16(_) => {}
        }
    }
}

impl Call {
    fn normalize<Y: Element>(&self, cpu: &Cpu, y: &mut [Y]) {
        let pixels = read(&self.pixels);
        cpu.each_chunk(y, 3 * TASK, |task, y| {
            for (y, &pixel) in y.chunks_exact_mut(3).zip(&pixels[task * TASK..]) {
                for (channel, y) in y.iter_mut().enumerate() {
                    *y = Y::from_f32((byte(pixel, channel) - self.mean[channel]) * self.scale[channel]);
                }
            }
        });
    }
}

/// Red, green or blue of a pixel.
fn byte(pixel: u32, channel: usize) -> f32 {
    (pixel >> (16 - 8 * channel) & 0xff) as f32
}

/// Pixels as a node: the picture.
#[derive(Debug)]
struct PixelsNode {
    mean: [f32; 3],
    scale: [f32; 3],
}

impl NodeOp for PixelsNode {
    fn name(&self) -> &'static str {
        "pixels"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let Self { mean, scale } = *self;
        args.device.prepare(&Pixels { pixels: args.indices(0)?, mean, scale, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        Ok(pixels::exact(args.indices(0)?, self.mean, self.scale))
    }

    fn backward(&self, _: &crate::graph::BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        // A picture is not learnt.
        Ok(Vec::new())
    }
}

impl Graph {
    /// Adds the pixels of the picture that the graph is [for](Graph::for_images), each channel less its mean and times
    /// its scale.
    pub fn pixels(&mut self, name: &str, mean: [f32; 3], scale: [f32; 3]) -> Result<ValueId> {
        self.add_node(
            name,
            PixelsNode { mean, scale },
            vec![Read::Input(Input::Ids)],
            (Rows::Tokens, 3, Precision::Model),
        )
    }
}
