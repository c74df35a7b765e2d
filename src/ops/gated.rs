//! Gates: one half of a row, through an activation, times the other.
//!
//! Invariant: each output has its own two inputs, and no other.

mod grad;

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, activate, each_pair, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, NodeArgs, NodeOp, Precision, Read, ReferenceArgs, ValueId};
use crate::kernels::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, WORKGROUP,
    activation_override, fields,
};
use crate::matrix::{DType, Element};
use crate::problem::Activation;
use crate::reference::gated;

pub use grad::GatedGrad;

/// A gate: `y = act(a) · b`, `a` being the first half of each row of `x` and `b` the second. With SiLU it is the SwiGLU
/// of Llama, with GELU GeGLU (N. Shazeer 2020, [arXiv:2002.05202](https://arxiv.org/abs/2002.05202)).
///
/// ```
/// use sparse24::{Activation, DType, Device, Gated, Matrix};
/// let device = Device::cpu()?;
/// let x = device.upload(&Matrix::from_f32(1, 4, &[-1.0, 2.0, 5.0, 0.5])?)?;
/// let y = device.zeros(1, 2, DType::F32)?;
/// device.prepare(&Gated { x: &x, activation: Activation::Relu, y: &y })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 2, &[0.0, 1.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Gated<'a> {
    /// `tokens x 2·d`.
    pub x: &'a Tensor,
    /// What is done to the first half.
    pub activation: Activation,
    /// `tokens x d`, overwritten.
    pub y: &'a Tensor,
}

impl Operation for Gated<'_> {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("x", self.x), Operand::write("y", self.y)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, y, .. } = *self;
        expect_shape("x", x.shape(), (y.rows(), checked_mul("features of both halves", 2, y.cols())?))
    }

    /// The product; an activation counts as one.
    fn cost(&self) -> Cost {
        let each = if self.activation == Activation::None { 1.0 } else { 2.0 };
        cost_of(each * self.y.rows() as f64 * self.y.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, activation, y } = *self;
        let width = gpu_size("features of a token", y.cols())?;
        let kernel = GatedKernel::new(width, activation, x.dtype(), y.dtype())?;
        let params = Params { tokens: gpu_size("tokens", y.rows())?, width };
        let quads = y.rows() * y.cols().div_ceil(4);
        dispatch(gpu, Program::new(kernel), quads.div_ceil(WORKGROUP), &params, &[x.on_gpu(), y.on_gpu()])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, activation, y } = *self;
        Ok(Box::new(Call { width: y.cols(), activation, x: x.on_cpu()?, y: y.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/gated.wgsl and gated_grad.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
}

/// The program (shaders/gated.wgsl). Its name (`Display`) is made of its parts, such as `gated-f16f32-silu-quads`:
/// types of input and products, activation, and how features are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GatedKernel {
    activation: Activation,
    access: FeatureAccess,
    types: Types,
}

impl GatedKernel {
    /// For tokens of `width` features of the output. An error for a type that kernels do not store.
    pub fn new(width: u32, activation: Activation, storage: DType, output: DType) -> Result<Self> {
        Ok(Self { activation, access: FeatureAccess::of(width), types: Types::new(storage, output)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let sizes = Types::all().flat_map(|types| WIDTHS.map(|width| (types, FeatureAccess::of(width))));
    let own = |(types, access)| Program::new(GatedKernel { activation: Activation::Silu, access, types });
    sizes.map(own).chain(grad::shaders())
}

impl Shader for GatedKernel {
    fn module(&self) -> String {
        Self { activation: Activation::None, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[
            self.access.text(),
            include_str!("../../shaders/shared/activation.wgsl"),
            include_str!("../../shaders/gated.wgsl"),
        ])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![activation_override(self.activation)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for GatedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { activation, access, types } = self;
        write!(f, "gated-{}f32-{}-{}{}", types.storage(), activation.name(), access.name(), types.suffix())
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    width: usize,
    activation: Activation,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, width, activation, task) = (read(&self.x), self.width, self.activation, TASK_TOKENS * self.width);
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => cpu.each_chunk(y, task, |i, y| {
            cpu.simd().run(GateTokens { x: &x[2 * i * task..][..2 * y.len()], width, activation, y });
        }));
    }
}

work!(GateTokens<X, Y>, { x: &'a [X], width: usize, activation: Activation, y: &'a mut [Y] },
    gate_tokens(x, width, activation, y));

/// Features that are widened at a time.
const RUN: usize = 64;

/// Gates of some tokens of `width` features each.
#[inline(always)]
fn gate_tokens<X: Element, Y: Element>(x: &[X], width: usize, activation: Activation, y: &mut [Y]) {
    for (x, y) in x.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
        let (a, b) = x.split_at(width);
        for ((a, b), y) in a.chunks(RUN).zip(b.chunks(RUN)).zip(y.chunks_mut(RUN)) {
            let mut gates = [0.0; RUN];
            let gates = &mut gates[..a.len()];
            gates.iter_mut().zip(a).for_each(|(gate, a)| *gate = a.to_f32());
            activate(activation, gates);
            for ((y, gate), b) in y.iter_mut().zip(gates).zip(b) {
                *y = Y::from_f32(*gate * b.to_f32());
            }
        }
    }
}

/// A gated activation as a node: both halves side by side.
#[derive(Debug)]
struct GatedNode {
    activation: Activation,
}

impl NodeOp for GatedNode {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        args.device.prepare(&Gated { x: args.tensor(0)?, activation: self.activation, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        Ok(gated::exact(args.matrix(0)?.view(), self.activation))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let Some(dx) = args.gradient(0) else { return Ok(Vec::new()) };
        let grad = GatedGrad { x: args.forward.tensor(0)?, activation: self.activation, dy: args.dy, dx };
        Ok(vec![args.forward.device.prepare(&grad)?])
    }
}

impl Graph {
    /// Adds a gated activation of the two halves of `x`. An error if it has an odd number of features.
    pub fn gated(&mut self, name: &str, x: ValueId, activation: Activation) -> Result<ValueId> {
        let (rows, cols) = (self.value(x).rows, self.value(x).cols);
        if !cols.is_multiple_of(2) {
            return Err(Error::invalid(format!("{name}: {cols} features have no two halves")));
        }
        self.add_node(name, GatedNode { activation }, vec![Read::Value(x)], (rows, cols / 2, Precision::Model))
    }
}
