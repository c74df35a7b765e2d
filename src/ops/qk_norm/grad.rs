//! Gradients of the normalisation of the heads of queries and keys.
//!
//! Invariant: sums over tokens are taken over fixed blocks of them and then over the blocks, so that they depend on the
//! shape alone.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::super::{Cost, Gradient, Operand, Operation, check_f32, cost_of, dispatch};
use super::{Heads, overrides};
use crate::cpu::rows::{Target, inverse_root, put, sum_of, sums_of, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, read};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Result, expect_shape};
use crate::gpu::{BufferRange, Dispatch, Gpu, Scratch};
use crate::kernels::{
    Binding, Caps, NormFold, NormFoldParams, NormLayout, NormParams, NormSums, ParamsLayout, Primitives, Program,
    Shader, Text, WIDTHS, WORKGROUP, fields, target_override, target_suffix,
};
use crate::matrix::{DType, Element};

/// Gradients of a [`QkNorm`](crate::QkNorm) with respect to `qkv` and both gammas: those that are wanted. All tensors
/// are f32. Means of squares are computed from `qkv` again: the forward keeps nothing for this.
///
/// ```
/// use sparse24::{DType, Device, Gradient, Matrix, QkNormGrad};
/// let device = Device::cpu()?;
/// let upload = |row: &[f32]| device.upload(&Matrix::from_f32(1, row.len(), row)?);
/// let (qkv, dy) = (upload(&[3.0, -3.0, 5.0, 5.0, 7.0, 8.0])?, upload(&[0.5, 0.25, 1.0, 2.0, 3.0, 4.0])?);
/// let gamma = upload(&[1.0, 1.0])?;
/// let to = device.zeros(1, 2, DType::F32)?;
/// let grad = QkNormGrad {
///     qkv: &qkv,
///     q_gamma: &gamma,
///     k_gamma: &gamma,
///     heads: 1,
///     kv_heads: 1,
///     eps: 0.0,
///     dy: &dy,
///     dqkv: None,
///     dq_gamma: Some(Gradient { to: &to, add: false }),
///     dk_gamma: None,
/// };
/// device.prepare(&grad)?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(1, 2, &[0.5, -0.25])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct QkNormGrad<'a> {
    /// `tokens x (heads + 2·kv_heads)·head_dim`: what was normalised.
    pub qkv: &'a Tensor,
    /// `1 x head_dim`.
    pub q_gamma: &'a Tensor,
    /// `1 x head_dim`.
    pub k_gamma: &'a Tensor,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys, and of values.
    pub kv_heads: usize,
    /// What was added to the mean of squares.
    pub eps: f32,
    /// Of the shape of `qkv`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `qkv`, of its shape.
    pub dqkv: Option<Gradient<'a>>,
    /// Of the gamma of queries, `1 x head_dim`: a sum over tokens and heads.
    pub dq_gamma: Option<Gradient<'a>>,
    /// Of the gamma of keys, `1 x head_dim`.
    pub dk_gamma: Option<Gradient<'a>>,
}

impl QkNormGrad<'_> {
    fn heads(&self) -> Heads {
        Heads { q: self.heads, kv: self.kv_heads, dim: self.q_gamma.cols() }
    }
}

impl Operation for QkNormGrad<'_> {
    fn name(&self) -> &'static str {
        "qk_norm_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { qkv, q_gamma, k_gamma, dy, dqkv, dq_gamma, dk_gamma, .. } = *self;
        let gammas = [Operand::read("q_gamma", q_gamma), Operand::read("k_gamma", k_gamma)];
        let written = [("dqkv", dqkv), ("dq_gamma", dq_gamma), ("dk_gamma", dk_gamma)];
        let written = written.into_iter().filter_map(|(name, gradient)| Some(gradient?.operand(name)));
        [Operand::read("qkv", qkv), Operand::read("dy", dy)].into_iter().chain(gammas).chain(written).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { qkv, q_gamma, k_gamma, eps, dy, dqkv, dq_gamma, dk_gamma, .. } = *self;
        check_f32(&[("qkv", qkv), ("dy", dy)])?;
        self.heads().check(qkv, [q_gamma, k_gamma], eps)?;
        expect_shape("dy", dy.shape(), qkv.shape())?;
        let gamma = (1, q_gamma.cols());
        for (name, gradient, shape) in
            [("dqkv", dqkv, qkv.shape()), ("dq_gamma", dq_gamma, gamma), ("dk_gamma", dk_gamma, gamma)]
        {
            if let Some(gradient) = gradient {
                gradient.check(name, shape)?;
            }
        }
        Ok(())
    }

    /// A square and its sum, 2; three products and a sum, 4; dx, 4; a gamma's gradient, 2 per element of Q and K.
    fn cost(&self) -> Cost {
        let heads = self.heads();
        let normed = (heads.q + heads.kv) * heads.dim;
        cost_of(12.0 * self.qkv.rows() as f64 * normed as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { qkv, q_gamma, k_gamma, eps, dy, dqkv, dq_gamma, dk_gamma, .. } = *self;
        let (heads, all_tokens) = (self.heads(), qkv.rows());
        let (tokens, width) = (gpu_size("tokens", all_tokens)?, gpu_size("features of a head", heads.dim)?);
        let params = heads.params(all_tokens, eps)?;
        let bytes = 4 * u64::from(params.tokens);
        let factors = gpu.scratch(Scratch::Packed, bytes)?;
        let factors = Some(BufferRange { buffer: &factors, offset: 0, bytes });
        let layout = NormLayout::new(width, DType::F32, DType::F32)?;
        let kernel = QkNormGradKernel { layout, heads: (heads.q, heads.kv), add: dqkv.map(|dqkv| dqkv.add) };
        let operands = [
            qkv.on_gpu(),
            dqkv.and_then(|dqkv| dqkv.to.on_gpu()),
            q_gamma.on_gpu(),
            k_gamma.on_gpu(),
            dy.on_gpu(),
            factors,
        ];
        let workgroups = layout.workgroups(params.tokens as usize);
        let mut dispatches = dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)?;
        let gammas = [dq_gamma, dk_gamma];
        if gammas.iter().all(Option::is_none) || width == 0 {
            return Ok(dispatches);
        }
        let params = SumsParams { tokens, block: NormSums::block(tokens) };
        let blocks = tokens.div_ceil(params.block);
        let bytes = 4 * u64::from(blocks) * 2 * heads.dim as u64;
        let parts = gpu.scratch(Scratch::Partial, bytes)?;
        let parts = Some(BufferRange { buffer: &parts, offset: 0, bytes });
        let kernel = QkNormSumsKernel { width, heads: (heads.q, heads.kv) };
        let workgroups = blocks as usize * (2 * heads.dim).div_ceil(WORKGROUP);
        let operands = [qkv.on_gpu(), dy.on_gpu(), factors, parts];
        dispatches.extend(dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)?);
        for (first, gradient) in gammas.into_iter().enumerate() {
            let Some(Gradient { to, add }) = gradient else { continue };
            let params = NormFoldParams { width, blocks, first: first as u32, sums: 2 };
            let fold = Program::new(NormFold::new(add));
            dispatches.extend(dispatch(gpu, fold, heads.dim.div_ceil(WORKGROUP), &params, &[parts, to.on_gpu()])?);
        }
        Ok(dispatches)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { qkv, q_gamma, k_gamma, eps, dy, dqkv, dq_gamma, dk_gamma, .. } = *self;
        let target = |gradient: Option<Gradient<'_>>| gradient.map(|gradient| gradient.on_cpu()).transpose();
        let [qkv, q_gamma, k_gamma, dy] = [qkv.on_cpu()?, q_gamma.on_cpu()?, k_gamma.on_cpu()?, dy.on_cpu()?];
        let dgammas = [target(dq_gamma)?, target(dk_gamma)?];
        Ok(Box::new(Call { qkv, q_gamma, k_gamma, heads: self.heads(), eps, dy, dqkv: target(dqkv)?, dgammas }))
    }
}

/// The program (shaders/qk_norm_grad.wgsl). Its name (`Display`) is made of its parts, such as
/// `qk_norm_grad-16+8-f32f32-d128-quads-add`: as of the normalisation itself, and `add` where the gradient is added to
/// what is there, `sums` where it is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QkNormGradKernel {
    layout: NormLayout,
    heads: (usize, usize),
    /// Whether the gradient is added to what is there; `None` where it is not wanted.
    add: Option<bool>,
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    let heads = (16, 8);
    let layouts = WIDTHS.into_iter().filter_map(|width| NormLayout::new(width, DType::F32, DType::F32).ok());
    let own = layouts.map(move |layout| Program::new(QkNormGradKernel { layout, heads, add: Some(false) }));
    own.chain(std::iter::once(Program::new(QkNormSumsKernel { width: WIDTHS[0], heads })))
}

impl Shader for QkNormGradKernel {
    fn module(&self) -> String {
        Self { layout: self.layout.module(), heads: (0, 0), add: Some(false) }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.layout.text(include_str!("../../../shaders/qk_norm_grad.wgsl"))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let own = overrides(self.heads).into_iter().chain([target_override(self.add)]);
        self.layout.overrides().into_iter().chain(own).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "gamma"),
                Binding::read(4, "k_gamma"),
                Binding::read(5, "dy"),
                Binding::write(6, "factors"),
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
        self.layout.supported_by(caps, self.workgroup_bytes())
    }
}

impl fmt::Display for QkNormGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layout, heads: (q, kv), add } = self;
        write!(f, "qk_norm_grad-{q}+{kv}-{layout}{}", target_suffix(*add))
    }
}

/// Mirror of `Params` in shaders/qk_norm_sums.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct SumsParams {
    tokens: u32,
    block: u32,
}

/// The program (shaders/qk_norm_sums.wgsl) that sums the gradients of the gammas over blocks of tokens. Its name
/// (`Display`) is made of its parts, such as `qk_norm_sums-16+8-d128`: heads of Q and of K, features of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QkNormSumsKernel {
    width: u32,
    heads: (usize, usize),
}

impl Shader for QkNormSumsKernel {
    fn module(&self) -> String {
        "qk_norm_sums".into()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/qk_norm_sums.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        std::iter::once(("WIDTH", f64::from(self.width))).chain(overrides(self.heads)).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::read(2, "dy"),
                Binding::read(3, "factors"),
                Binding::write(4, "parts"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(SumsParams: tokens block)
    }
}

impl fmt::Display for QkNormSumsKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, heads: (q, kv) } = self;
        write!(f, "qk_norm_sums-{q}+{kv}-d{width}")
    }
}

#[derive(Debug)]
struct Call {
    qkv: Shared,
    q_gamma: Shared,
    k_gamma: Shared,
    heads: Heads,
    eps: f32,
    dy: Shared,
    dqkv: Option<Target>,
    dgammas: [Option<Target>; 2],
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, q, k, dy) = (read(&self.qkv), read(&self.q_gamma), read(&self.k_gamma), read(&self.dy));
        let [Some(x), Some(q), Some(k), Some(dy)] = [&x, &q, &k, &dy].map(|m| f32::of(m.elements())) else { return };
        let (heads, epsilon) = (self.heads, self.eps);
        cpu.grad_norm((x, dy, heads.features()), self.dqkv.as_ref(), &self.dgammas, |(x, dy), add, dx, parts| {
            cpu.simd().run(GradHeads { x, gammas: (q, k), heads, epsilon, dy, add, dx, parts });
        });
    }
}

work_of_f32!(GradHeads, {
        x: &'a [f32],
        gammas: (&'a [f32], &'a [f32]),
        heads: Heads,
        epsilon: f32,
        dy: &'a [f32],
        add: bool,
        dx: &'a mut [f32],
        parts: &'a mut [f32],
    },
    grad_heads((x, gammas, epsilon), heads, dy, add, dx, parts));

/// Gradients of some tokens: of each, unless `dx` is empty, and the sums of those of the gammas in `parts`: of Q at its
/// start, of K at the start of its second half.
#[inline(always)]
fn grad_heads(
    (x, (q_gamma, k_gamma), epsilon): (&[f32], (&[f32], &[f32]), f32),
    heads: Heads,
    dy: &[f32],
    add: bool,
    dx: &mut [f32],
    parts: &mut [f32],
) {
    let (dim, count) = (heads.dim, heads.dim as f32);
    let (dq_gamma, dk_gamma) = parts.split_at_mut(parts.len() / 2);
    let (dq_gamma, dk_gamma) = (&mut dq_gamma[..dim], &mut dk_gamma[..dim]);
    dq_gamma.fill(0.0);
    dk_gamma.fill(0.0);
    let mut dx = dx.chunks_exact_mut(dim);
    for (row, (x, dy)) in x.chunks_exact(dim).zip(dy.chunks_exact(dim)).enumerate() {
        let (head, dx) = (row % heads.all(), dx.next());
        if head >= heads.q + heads.kv {
            if let Some(dx) = dx {
                dx.iter_mut().zip(dy).for_each(|(dx, dy)| put(dx, *dy, add));
            }
            continue;
        }
        let (gamma, dgamma) = if head < heads.q { (q_gamma, &mut *dq_gamma) } else { (k_gamma, &mut *dk_gamma) };
        let factor = inverse_root(sum_of(x, |x| x * x) / count + epsilon);
        for ((dgamma, x), dy) in dgamma.iter_mut().zip(x).zip(dy) {
            *dgamma += dy * (x * factor);
        }
        let Some(dx) = dx else { continue };
        let [along] = sums_of((x, dy, gamma), |x, dy, gamma| [dy * gamma * (x * factor)]);
        let along = along / count;
        for (((dx, x), dy), gamma) in dx.iter_mut().zip(x).zip(dy).zip(gamma) {
            put(dx, (dy * gamma - x * factor * along) * factor, add);
        }
    }
}
