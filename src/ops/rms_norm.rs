//! Normalisation of each token by the root of the mean of its squares.
//!
//! Invariant: no mean is taken away, and nothing is added behind.

mod grad;

use std::fmt;

use ndarray::Array2;

use super::{Cost, Operand, Operation, check_norm, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, each_pair, inverse_root, sum_of, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::Result;
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, NodeArgs, NodeOp, ParamKind, Precision, Read, ReferenceArgs, ValueId};
use crate::kernels::{
    Binding, Caps, NormLayout, NormParams, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP,
};
use crate::matrix::{DType, Element};
use crate::reference::rms_norm;

pub use grad::RmsNormGrad;

/// RMS normalisation: `y = x / √(mean of x² + eps) · gamma` over the features of each token. A token whose mean of
/// squares overflows f32 becomes NaNs.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// `tokens x d`.
    pub x: &'a Tensor,
    /// `1 x d`, f32.
    pub gamma: &'a Tensor,
    /// What is added to the mean of squares; finite, not negative.
    pub eps: f32,
    /// `tokens x d`, overwritten. Not the memory of `x`.
    pub y: &'a Tensor,
}

impl Operation for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, gamma, y, .. } = *self;
        vec![Operand::read("x", x), Operand::read("gamma", gamma), Operand::write("y", y)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, gamma, eps, y } = *self;
        check_norm(x, &[("gamma", gamma)], eps, y)
    }

    /// A square and its sum, and two products per element.
    fn cost(&self) -> Cost {
        cost_of(4.0 * self.x.rows() as f64 * self.x.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, gamma, eps, y } = *self;
        let layout = NormLayout::new(gpu_size("features of a token", x.cols())?, x.dtype(), y.dtype())?;
        let params = NormParams { tokens: gpu_size("tokens", y.rows())?, epsilon: eps };
        let operands = [x.on_gpu(), y.on_gpu(), gamma.on_gpu()];
        dispatch(gpu, Program::new(RmsNormKernel(layout)), layout.workgroups(x.rows()), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, gamma, eps, y } = *self;
        Ok(Box::new(Call { x: x.on_cpu()?, gamma: gamma.on_cpu()?, eps, y: y.on_cpu()? }))
    }
}

/// The program (shaders/rms_norm.wgsl). Its name (`Display`) is made of its parts, such as
/// `rms_norm-f16f32-d384-quads`: types of input and sums, features of a token, and how these are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RmsNormKernel(NormLayout);

impl RmsNormKernel {
    /// Normalisation of tokens of `width` features. An error for a type that kernels do not store.
    pub fn new(width: u32, storage: DType, output: DType) -> Result<Self> {
        Ok(Self(NormLayout::new(width, storage, output)?))
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    NormLayout::all().map(|layout| Program::new(RmsNormKernel(layout))).chain(grad::shaders())
}

impl Shader for RmsNormKernel {
    fn module(&self) -> String {
        Self(self.0.module()).to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.0.text(include_str!("../../shaders/rms_norm.wgsl"))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.0.overrides()
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y"), Binding::read(3, "gamma")] }
    }

    fn params(&self) -> ParamsLayout {
        NormParams::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.0.supported_by(caps, self.workgroup_bytes())
    }
}

impl fmt::Display for RmsNormKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rms_norm-{}", self.0)
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    gamma: Shared,
    eps: f32,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, gamma, epsilon) = (read(&self.x), read(&self.gamma), self.eps);
        let Some(gamma) = f32::of(gamma.elements()) else { return };
        let task = TASK_TOKENS * gamma.len();
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => cpu.each_chunk(y, task, |i, y| {
            cpu.simd().run(NormTokens { x: &x[i * task..][..y.len()], gamma, epsilon, y });
        }));
    }
}

work!(NormTokens<X, Y>, { x: &'a [X], gamma: &'a [f32], epsilon: f32, y: &'a mut [Y] },
    norm_tokens(x, gamma, epsilon, y));

/// Normalisation of some tokens.
#[inline(always)]
fn norm_tokens<X: Element, Y: Element>(x: &[X], gamma: &[f32], epsilon: f32, y: &mut [Y]) {
    for (x, y) in x.chunks_exact(gamma.len()).zip(y.chunks_exact_mut(gamma.len())) {
        let factor = inverse_root(sum_of(x, |x| x * x) / x.len() as f32 + epsilon);
        for ((y, x), gamma) in y.iter_mut().zip(x).zip(gamma) {
            *y = Y::from_f32(x.to_f32() * factor * gamma);
        }
    }
}

/// RMS normalisation as a node: x, gamma.
#[derive(Debug)]
struct RmsNormNode {
    eps: f32,
}

impl NodeOp for RmsNormNode {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let (x, gamma) = (args.tensor(0)?, args.tensor(1)?);
        args.device.prepare(&RmsNorm { x, gamma, eps: self.eps, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        Ok(rms_norm::exact(args.matrix(0)?.view(), &args.row(1)?, f64::from(self.eps)))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let [dx, dgamma] = [0, 1].map(|at| args.gradient(at));
        if dx.or(dgamma).is_none() {
            return Ok(Vec::new());
        }
        let (x, gamma) = (args.forward.tensor(0)?, args.forward.tensor(1)?);
        let grad = RmsNormGrad { x, gamma, eps: self.eps, dy: args.dy, dx, dgamma };
        Ok(vec![args.forward.device.prepare(&grad)?])
    }
}

impl Graph {
    /// Adds a normalisation by the root of the mean of squares, with the parameter `{name}.weight`.
    pub fn rms_norm(&mut self, name: &str, x: ValueId, eps: f32) -> Result<ValueId> {
        let (rows, cols) = (self.value(x).rows, self.value(x).cols);
        let gamma = self.add_param(format!("{name}.weight"), ParamKind::Matrix(Precision::F32), (1, cols))?;
        self.set_around(gamma, 1.0);
        self.add_node(
            name,
            RmsNormNode { eps },
            vec![Read::Value(x), Read::Param(gamma)],
            (rows, cols, Precision::Model),
        )
    }
}
