//! Layer normalisation over the features of each token.
//!
//! Invariant: the variance is a mean of squared differences, taken in a second pass over a token.

mod grad;

use std::fmt;

use ndarray::Array2;

use super::{Cost, Operand, Operation, check_norm, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, each_pair, inverse_root, sum_of, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::Result;
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{
    BackwardArgs, Graph, NodeArgs, NodeOp, ParamId, ParamKind, Precision, Read, ReferenceArgs, StoredTensor, ValueId,
};
use crate::kernels::{
    Binding, Caps, NormLayout, NormParams, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP,
};
use crate::matrix::{DType, Element};
use crate::reference::layer_norm;

pub use grad::LayerNormGrad;

/// Layer normalisation: `y = (x - mean) / √(variance + eps) · gamma + beta` over the features of each token, with the
/// biased variance (the mean of squared differences, computed in a second pass). A token whose variance overflows f32
/// becomes NaNs.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// `tokens x d`.
    pub x: &'a Tensor,
    /// `1 x d`, f32.
    pub gamma: &'a Tensor,
    /// `1 x d`, f32.
    pub beta: &'a Tensor,
    /// What is added to the variance; finite, not negative.
    pub eps: f32,
    /// `tokens x d`, overwritten. Not the memory of `x`.
    pub y: &'a Tensor,
}

impl Operation for LayerNorm<'_> {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, gamma, beta, y, .. } = *self;
        vec![Operand::read("x", x), Operand::read("gamma", gamma), Operand::read("beta", beta), Operand::write("y", y)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, gamma, beta, eps, y } = *self;
        check_norm(x, &[("gamma", gamma), ("beta", beta)], eps, y)
    }

    /// A sum, a difference, a square and its sum, a product, and a multiplication and addition per element.
    fn cost(&self) -> Cost {
        cost_of(7.0 * self.x.rows() as f64 * self.x.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, gamma, beta, eps, y } = *self;
        let layout = NormLayout::new(gpu_size("features of a token", x.cols())?, x.dtype(), y.dtype())?;
        let params = NormParams { tokens: gpu_size("tokens", y.rows())?, epsilon: eps };
        let operands = [x.on_gpu(), y.on_gpu(), gamma.on_gpu(), beta.on_gpu()];
        dispatch(gpu, Program::new(LayerNormKernel(layout)), layout.workgroups(x.rows()), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, gamma, beta, eps, y } = *self;
        let [x, gamma, beta, y] = [x.on_cpu()?, gamma.on_cpu()?, beta.on_cpu()?, y.on_cpu()?];
        Ok(Box::new(Call { x, gamma, beta, eps, y }))
    }
}

/// The program (shaders/layer_norm.wgsl). Its name (`Display`) is made of its parts, such as
/// `layer_norm-f16f32-d384-quads`: types of input and sums, features of a token, and how these are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerNormKernel(NormLayout);

impl LayerNormKernel {
    /// Normalisation of tokens of `width` features. An error for a type that kernels do not store.
    pub fn new(width: u32, storage: DType, output: DType) -> Result<Self> {
        Ok(Self(NormLayout::new(width, storage, output)?))
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    NormLayout::all().map(|layout| Program::new(LayerNormKernel(layout))).chain(grad::shaders())
}

impl Shader for LayerNormKernel {
    fn module(&self) -> String {
        Self(self.0.module()).to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.0.text(include_str!("../../shaders/layer_norm.wgsl"))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.0.overrides()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "gamma"),
                Binding::read(4, "beta"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        NormParams::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        2 * 4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.0.supported_by(caps, self.workgroup_bytes())
    }
}

impl fmt::Display for LayerNormKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer_norm-{}", self.0)
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    gamma: Shared,
    beta: Shared,
    eps: f32,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, gamma, beta, epsilon) = (read(&self.x), read(&self.gamma), read(&self.beta), self.eps);
        let (Some(gamma), Some(beta)) = (f32::of(gamma.elements()), f32::of(beta.elements())) else { return };
        let task = TASK_TOKENS * gamma.len();
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => cpu.each_chunk(y, task, |i, y| {
            cpu.simd().run(NormTokens { x: &x[i * task..][..y.len()], gamma, beta, epsilon, y });
        }));
    }
}

work!(NormTokens<X, Y>, { x: &'a [X], gamma: &'a [f32], beta: &'a [f32], epsilon: f32, y: &'a mut [Y] },
    norm_tokens(x, gamma, beta, epsilon, y));

/// Layer normalisation of some tokens.
#[inline(always)]
fn norm_tokens<X: Element, Y: Element>(x: &[X], gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut [Y]) {
    for (x, y) in x.chunks_exact(gamma.len()).zip(y.chunks_exact_mut(gamma.len())) {
        norm_token(x, gamma, beta, epsilon, y);
    }
}

/// Layer normalisation of one token.
#[inline(always)]
fn norm_token<X: Element, Y: Element>(x: &[X], gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut [Y]) {
    let count = x.len() as f32;
    let mean = sum_of(x, |x| x) / count;
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
    let factor = inverse_root(variance + epsilon);
    for (((y, x), gamma), beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
        *y = Y::from_f32((x.to_f32() - mean) * factor * gamma + beta);
    }
}

/// Layer normalisation as a node: x, gamma, beta.
#[derive(Debug)]
struct LayerNormNode {
    eps: f32,
}

impl NodeOp for LayerNormNode {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let (x, gamma, beta) = (args.tensor(0)?, args.tensor(1)?, args.tensor(2)?);
        args.device.prepare(&LayerNorm { x, gamma, beta, eps: self.eps, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let (x, gamma, beta) = (args.matrix(0)?, args.row(1)?, args.row(2)?);
        Ok(layer_norm::exact(x.view(), &gamma, &beta, f64::from(self.eps)))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let [dx, dgamma, dbeta] = [0, 1, 2].map(|at| args.gradient(at));
        if dx.or(dgamma).or(dbeta).is_none() {
            return Ok(Vec::new());
        }
        let (x, gamma) = (args.forward.tensor(0)?, args.forward.tensor(1)?);
        let grad = LayerNormGrad { x, gamma, eps: self.eps, dy: args.dy, dx, dgamma, dbeta };
        Ok(vec![args.forward.device.prepare(&grad)?])
    }
}

impl Graph {
    /// Adds a layer normalisation by the parameters `{name}.weight` and `{name}.bias`.
    pub fn layer_norm(&mut self, name: &str, x: ValueId, eps: f32) -> Result<ValueId> {
        let (rows, cols) = (self.value(x).rows, self.value(x).cols);
        let mut vector = |new: &str, old: &str, around| -> Result<ParamId> {
            let kind = ParamKind::Matrix(Precision::F32);
            let param = self.add_param(format!("{name}.{new}"), kind, (1, cols))?;
            // The second names are those of checkpoints converted from TensorFlow.
            let names = vec![format!("{name}.{new}"), format!("{name}.{old}")];
            self.set_stored(param, vec![StoredTensor { names, shape: vec![cols] }]);
            self.set_around(param, around);
            Ok(param)
        };
        let (gamma, beta) = (vector("weight", "gamma", 1.0)?, vector("bias", "beta", 0.0)?);
        let reads = vec![Read::Value(x), Read::Param(gamma), Read::Param(beta)];
        self.add_node(name, LayerNormNode { eps }, reads, (rows, cols, Precision::Model))
    }
}
