//! Layer normalisation over the features of each token.
//!
//! Invariant: the variance is a mean of squared differences, taken in a second pass over a token.

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, each_pair, inverse_root, sum_of, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{ExactSite, Graph, NodeOp, ParamId, ParamKind, Precision, Read, Site, StoredTensor, ValueId};
use crate::kernels::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, WORKGROUP, fields,
};
use crate::matrix::{DType, Element};
use crate::reference::layer_norm;

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

/// Tokens of a workgroup.
const TOKENS: usize = WORKGROUP / 32;

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
        expect_shape("y", y.shape(), x.shape())?;
        for (what, tensor) in [("gamma", gamma), ("beta", beta)] {
            expect_shape(what, tensor.shape(), (1, x.cols()))?;
            expect_dtype(what, tensor.dtype(), DType::F32)?;
        }
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::Invalid(format!("eps is {eps}, not a finite number from 0 on")));
        }
        Ok(())
    }

    /// A sum, a difference, a square and its sum, a product, and a multiplication and addition per element.
    fn cost(&self) -> Cost {
        cost_of(7.0 * self.x.rows() as f64 * self.x.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, gamma, beta, eps, y } = *self;
        let kernel = LayerNormKernel::new(gpu_size("features of a token", x.cols())?, x.dtype(), y.dtype())?;
        let params = Params { tokens: gpu_size("tokens", y.rows())?, epsilon: eps };
        let workgroups = if x.cols() == 0 { 0 } else { x.rows().div_ceil(TOKENS) };
        let operands = [x.on_gpu(), y.on_gpu(), gamma.on_gpu(), beta.on_gpu()];
        dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, gamma, beta, eps, y } = *self;
        let [x, gamma, beta, y] = [x.on_cpu()?, gamma.on_cpu()?, beta.on_cpu()?, y.on_cpu()?];
        Ok(Box::new(Call { x, gamma, beta, eps, y }))
    }
}

/// Mirror of `Params` in shaders/layer_norm.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Params {
    pub(crate) tokens: u32,
    pub(crate) epsilon: f32,
}

/// The program (shaders/layer_norm.wgsl). Its name (`Display`) is made of its parts, such as
/// `layer_norm-f16f32-d384-quads`: types of input and sums, features of a token, and how these are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerNormKernel {
    width: u32,
    access: FeatureAccess,
    types: Types,
}

impl LayerNormKernel {
    /// Layer normalisation of tokens of `width` features. An error for a type that kernels do not store.
    pub fn new(width: u32, storage: DType, output: DType) -> Result<Self> {
        Ok(Self { width, access: FeatureAccess::of(width), types: Types::new(storage, output)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let sizes = Types::all().flat_map(|types| WIDTHS.map(|width| (types, width)));
    sizes.map(|(types, width)| Program::new(LayerNormKernel { width, access: FeatureAccess::of(width), types }))
}

impl Shader for LayerNormKernel {
    fn module(&self) -> String {
        Self { width: 0, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[
            self.access.text(),
            include_str!("../../shaders/shared/inverse_root.wgsl"),
            include_str!("../../shaders/layer_norm.wgsl"),
        ])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("WIDTH", f64::from(self.width))]
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
        fields!(Params: tokens epsilon)
    }

    fn threads(&self) -> u32 {
        WORKGROUP as u32
    }

    fn workgroup_bytes(&self) -> u32 {
        2 * 4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for LayerNormKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, access, types } = self;
        write!(f, "layer_norm-{}f32-d{width}-{}{}", types.storage(), access.name(), types.suffix())
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

    fn prepare(&self, site: &Site<'_>) -> Result<Prepared> {
        let (x, gamma, beta) = (site.tensor(0)?, site.tensor(1)?, site.tensor(2)?);
        site.device.prepare(&LayerNorm { x, gamma, beta, eps: self.eps, y: site.y })
    }

    fn exact(&self, site: &ExactSite<'_>) -> Result<Array2<f64>> {
        let (x, gamma, beta) = (site.matrix(0)?, site.row(1)?, site.row(2)?);
        Ok(layer_norm::exact(x.view(), &gamma, &beta, f64::from(self.eps)))
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
