//! Normalisation of the heads of queries and keys by the root of the mean of their squares.
//!
//! Invariant: values pass through as they are.

mod grad;

use std::fmt;

use ndarray::Array2;

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, each_pair, inverse_root, sum_of, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, NodeArgs, NodeOp, ParamKind, Precision, Read, ReferenceArgs, ValueId};
use crate::kernels::{
    Binding, Caps, NormLayout, NormParams, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP,
};
use crate::matrix::{DType, Element};
use crate::reference::qk_norm;

pub use grad::{QkNormGrad, QkNormGradKernel, QkNormSumsKernel};

/// Normalisation of the heads of Q and of K, as Qwen3 has it before rotary positions: each head of a token becomes `x /
/// √(mean of x² + eps) · gamma`, with one gamma for all heads of Q and another for all of K. V is copied. A head whose
/// mean of squares overflows f32 becomes NaNs.
///
/// ```
/// use sparse24::{DType, Device, Matrix, QkNorm};
/// let device = Device::cpu()?;
/// // One head each of two features.
/// let qkv = device.upload(&Matrix::from_f32(1, 6, &[3.0, -3.0, 5.0, 5.0, 7.0, 8.0])?)?;
/// let q_gamma = device.upload(&Matrix::from_f32(1, 2, &[1.0, 2.0])?)?;
/// let k_gamma = device.upload(&Matrix::from_f32(1, 2, &[0.5, 4.0])?)?;
/// let y = device.zeros(1, 6, DType::F32)?;
/// let norm = QkNorm { qkv: &qkv, q_gamma: &q_gamma, k_gamma: &k_gamma, heads: 1, kv_heads: 1, eps: 0.0, y: &y };
/// device.prepare(&norm)?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 6, &[1.0, -2.0, 0.5, 4.0, 7.0, 8.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct QkNorm<'a> {
    /// `tokens x (heads + 2·kv_heads)·head_dim`: Q, K and V of each token side by side.
    pub qkv: &'a Tensor,
    /// `1 x head_dim`, f32.
    pub q_gamma: &'a Tensor,
    /// `1 x head_dim`, f32.
    pub k_gamma: &'a Tensor,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys, and of values.
    pub kv_heads: usize,
    /// What is added to the mean of squares; finite, not negative.
    pub eps: f32,
    /// Of the shape of `qkv`, overwritten. Not the memory of `qkv`.
    pub y: &'a Tensor,
}

impl QkNorm<'_> {
    fn heads(&self) -> Heads {
        Heads { q: self.heads, kv: self.kv_heads, dim: self.q_gamma.cols() }
    }
}

/// Heads of Q and of K of a token, and features of a head.
#[derive(Clone, Copy, Debug)]
struct Heads {
    q: usize,
    kv: usize,
    dim: usize,
}

impl Heads {
    /// All heads of a token.
    fn all(self) -> usize {
        self.q + 2 * self.kv
    }

    /// Features of a token.
    fn features(self) -> usize {
        self.all() * self.dim
    }

    /// An error unless tokens have so many features, each gamma has one for each of a head's, and `eps` is a finite
    /// number from 0 on.
    fn check(self, qkv: &Tensor, gammas: [&Tensor; 2], eps: f32) -> Result<()> {
        for (name, gamma) in ["q_gamma", "k_gamma"].into_iter().zip(gammas) {
            expect_shape(name, gamma.shape(), (1, self.dim))?;
            expect_dtype(name, gamma.dtype(), DType::F32)?;
        }
        let values = checked_mul("heads", 2, self.kv)?;
        let all = self.q.checked_add(values);
        let all = all.ok_or_else(|| Error::overflow("heads", format!("{} + {values}", self.q)))?;
        expect_shape("qkv", qkv.shape(), (qkv.rows(), checked_mul("features of Q, K and V", all, self.dim)?))?;
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::invalid(format!("eps is {eps}, not a finite number from 0 on")));
        }
        Ok(())
    }

    /// What a program normalises: all heads of some tokens, one below another.
    fn params(self, tokens: usize, eps: f32) -> Result<NormParams> {
        Ok(NormParams { tokens: gpu_size("heads", checked_mul("heads", tokens, self.all())?)?, epsilon: eps })
    }
}

impl Operation for QkNorm<'_> {
    fn name(&self) -> &'static str {
        "qk_norm"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { qkv, q_gamma, k_gamma, y, .. } = *self;
        let gammas = [Operand::read("q_gamma", q_gamma), Operand::read("k_gamma", k_gamma)];
        [Operand::read("qkv", qkv), Operand::write("y", y)].into_iter().chain(gammas).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { qkv, q_gamma, k_gamma, eps, y, .. } = *self;
        self.heads().check(qkv, [q_gamma, k_gamma], eps)?;
        expect_shape("y", y.shape(), qkv.shape())
    }

    /// A square and its sum, and two products per element of Q and K.
    fn cost(&self) -> Cost {
        let heads = self.heads();
        let normed = (heads.q + heads.kv) * heads.dim;
        cost_of(4.0 * self.qkv.rows() as f64 * normed as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { qkv, q_gamma, k_gamma, eps, y, .. } = *self;
        let heads = self.heads();
        let layout = NormLayout::new(gpu_size("features of a head", heads.dim)?, qkv.dtype(), y.dtype())?;
        let operands = [qkv.on_gpu(), y.on_gpu(), q_gamma.on_gpu(), k_gamma.on_gpu()];
        let kernel = QkNormKernel { layout, heads: (heads.q, heads.kv) };
        let workgroups = layout.workgroups(qkv.rows() * heads.all());
        dispatch(gpu, Program::new(kernel), workgroups, &heads.params(qkv.rows(), eps)?, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { qkv, q_gamma, k_gamma, eps, y, .. } = *self;
        let [qkv, q_gamma, k_gamma, y] = [qkv.on_cpu()?, q_gamma.on_cpu()?, k_gamma.on_cpu()?, y.on_cpu()?];
        Ok(Box::new(Call { qkv, q_gamma, k_gamma, heads: self.heads(), eps, y }))
    }
}

/// The program (shaders/qk_norm.wgsl). Its name (`Display`) is made of its parts, such as
/// `qk_norm-16+8-f16f32-d128-quads`: heads of Q and of K, types of input and sums, features of a head, and how these
/// are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QkNormKernel {
    layout: NormLayout,
    heads: (usize, usize),
}

impl QkNormKernel {
    /// For tokens of so many heads of queries and of keys, of `head_dim` features. An error for a type that kernels do
    /// not store.
    pub fn new(heads: (usize, usize), head_dim: u32, storage: DType, output: DType) -> Result<Self> {
        Ok(Self { layout: NormLayout::new(head_dim, storage, output)?, heads })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    NormLayout::all().map(|layout| Program::new(QkNormKernel { layout, heads: (16, 8) })).chain(grad::shaders())
}

/// Values of the `override`s that all programs of this operation have: heads of Q and of K.
fn overrides((q, kv): (usize, usize)) -> [(&'static str, f64); 2] {
    [("HEADS", q as f64), ("KV_HEADS", kv as f64)]
}

impl Shader for QkNormKernel {
    fn module(&self) -> String {
        Self { layout: self.layout.module(), heads: (0, 0) }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.layout.text(include_str!("../../shaders/qk_norm.wgsl"))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.layout.overrides().into_iter().chain(overrides(self.heads)).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "gamma"),
                Binding::read(4, "k_gamma"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        NormParams::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.layout.supported_by(caps, self.workgroup_bytes())
    }
}

impl fmt::Display for QkNormKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layout, heads: (q, kv) } = self;
        write!(f, "qk_norm-{q}+{kv}-{layout}")
    }
}

#[derive(Debug)]
struct Call {
    qkv: Shared,
    q_gamma: Shared,
    k_gamma: Shared,
    heads: Heads,
    eps: f32,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (qkv, q, k) = (read(&self.qkv), read(&self.q_gamma), read(&self.k_gamma));
        let (Some(q), Some(k)) = (f32::of(q.elements()), f32::of(k.elements())) else { return };
        let (gammas, heads, epsilon) = ((q, k), self.heads, self.eps);
        let task = TASK_TOKENS * heads.features();
        each_pair!(qkv.elements(), write(&self.y).elements_mut(), (x, y) => cpu.each_chunk(y, task, |i, y| {
            cpu.simd().run(NormHeads { x: &x[i * task..][..y.len()], gammas, heads, epsilon, y });
        }));
    }
}

work!(NormHeads<X, Y>, {
        x: &'a [X],
        gammas: (&'a [f32], &'a [f32]),
        heads: Heads,
        epsilon: f32,
        y: &'a mut [Y],
    },
    norm_heads(x, gammas, heads, epsilon, y));

/// Normalisation of the heads of some tokens.
#[inline(always)]
fn norm_heads<X: Element, Y: Element>(
    x: &[X],
    (q_gamma, k_gamma): (&[f32], &[f32]),
    heads: Heads,
    epsilon: f32,
    y: &mut [Y],
) {
    for (x, y) in x.chunks_exact(heads.features()).zip(y.chunks_exact_mut(heads.features())) {
        for (head, (x, y)) in x.chunks_exact(heads.dim).zip(y.chunks_exact_mut(heads.dim)).enumerate() {
            if head >= heads.q + heads.kv {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = Y::from_f32(x.to_f32()));
                continue;
            }
            let gamma = if head < heads.q { q_gamma } else { k_gamma };
            let factor = inverse_root(sum_of(x, |x| x * x) / x.len() as f32 + epsilon);
            for ((y, x), gamma) in y.iter_mut().zip(x).zip(gamma) {
                *y = Y::from_f32(x.to_f32() * factor * gamma);
            }
        }
    }
}

/// Normalisation of the heads of Q and K as a node: Q, K and V, the gamma of Q, that of K.
#[derive(Debug)]
struct QkNormNode {
    heads: usize,
    kv_heads: usize,
    eps: f32,
}

impl NodeOp for QkNormNode {
    fn name(&self) -> &'static str {
        "qk_norm"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let &Self { heads, kv_heads, eps } = self;
        let (qkv, q_gamma, k_gamma) = (args.tensor(0)?, args.tensor(1)?, args.tensor(2)?);
        args.device.prepare(&QkNorm { qkv, q_gamma, k_gamma, heads, kv_heads, eps, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let gammas = (&args.row(1)?[..], &args.row(2)?[..]);
        Ok(qk_norm::exact(args.matrix(0)?.view(), gammas, (self.heads, self.kv_heads), f64::from(self.eps)))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let [dqkv, dq_gamma, dk_gamma] = [0, 1, 2].map(|at| args.gradient(at));
        if dqkv.or(dq_gamma).or(dk_gamma).is_none() {
            return Ok(Vec::new());
        }
        let &Self { heads, kv_heads, eps } = self;
        let forward = &args.forward;
        let (qkv, q_gamma, k_gamma) = (forward.tensor(0)?, forward.tensor(1)?, forward.tensor(2)?);
        let dy = args.dy;
        let grad = QkNormGrad { qkv, q_gamma, k_gamma, heads, kv_heads, eps, dy, dqkv, dq_gamma, dk_gamma };
        Ok(vec![forward.device.prepare(&grad)?])
    }
}

impl Graph {
    /// Adds a normalisation of the heads of Q and of K of `qkv`, with the parameters `{name_q}.weight` and
    /// `{name_k}.weight`, each of as many numbers as a head has features. The node has the name `name_q`. An error if
    /// the features of `qkv` are no whole number for each head.
    pub fn qk_norm(
        &mut self,
        name_q: &str,
        name_k: &str,
        qkv: ValueId,
        heads: usize,
        kv_heads: usize,
        eps: f32,
    ) -> Result<ValueId> {
        let (rows, cols) = (self.value(qkv).rows, self.value(qkv).cols);
        let all = heads + 2 * kv_heads;
        if all == 0 || !cols.is_multiple_of(all) {
            let heads = format!("{heads} heads, and {kv_heads} of keys and of values");
            return Err(Error::invalid(format!("{name_q}: {cols} features are no whole number for each of {heads}")));
        }
        let mut reads = vec![Read::Value(qkv)];
        for name in [name_q, name_k] {
            let kind = ParamKind::Matrix(Precision::F32);
            let gamma = self.add_param(format!("{name}.weight"), kind, (1, cols / all))?;
            self.set_around(gamma, 1.0);
            reads.push(Read::Param(gamma));
        }
        self.add_node(name_q, QkNormNode { heads, kv_heads, eps }, reads, (rows, cols, Precision::Model))
    }
}
