//! Gradients of layer normalisation.
//!
//! Invariant: sums over tokens are taken over fixed blocks of them and then over the blocks, so that they depend on the
//! shape alone.

use super::super::{Cost, Gradient, Operand, Operation, check_f32, check_norm, cost_of, norm_grad};
use crate::cpu::rows::{Target, inverse_root, put, sum_of, sums_of, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, read};
use crate::engine::Tensor;
use crate::error::{Result, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{Norm, NormGrad, Program, norm_sums as sums};
use crate::matrix::Element;

/// Gradients of a [`LayerNorm`](crate::LayerNorm) with respect to `x`, gamma and beta: those that are wanted. All
/// tensors are f32. Mean and variance are computed from `x` again: the forward keeps nothing for this.
///
/// ```
/// use sparse24::{DType, Device, Gradient, LayerNormGrad, Matrix};
/// let device = Device::cpu()?;
/// let x = device.upload(&Matrix::from_f32(1, 2, &[1.0, 3.0])?)?;
/// let gamma = device.upload(&Matrix::from_f32(1, 2, &[1.0, 1.0])?)?;
/// let dy = device.upload(&Matrix::from_f32(1, 2, &[0.5, 0.25])?)?;
/// let to = device.zeros(1, 2, DType::F32)?;
/// let dgamma = Some(Gradient { to: &to, add: false });
/// let grad = LayerNormGrad { x: &x, gamma: &gamma, eps: 0.0, dy: &dy, dx: None, dgamma, dbeta: None };
/// device.prepare(&grad)?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(1, 2, &[-0.5, 0.25])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct LayerNormGrad<'a> {
    /// `tokens x d`: what was normalised.
    pub x: &'a Tensor,
    /// `1 x d`.
    pub gamma: &'a Tensor,
    /// What was added to the variance.
    pub eps: f32,
    /// `tokens x d`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `x`, `tokens x d`.
    pub dx: Option<Gradient<'a>>,
    /// Of gamma, `1 x d`: a sum over the tokens.
    pub dgamma: Option<Gradient<'a>>,
    /// Of beta, `1 x d`.
    pub dbeta: Option<Gradient<'a>>,
}

impl Operation for LayerNormGrad<'_> {
    fn name(&self) -> &'static str {
        "layer_norm_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, gamma, dy, dx, dgamma, dbeta, .. } = *self;
        let read = [Operand::read("x", x), Operand::read("gamma", gamma), Operand::read("dy", dy)];
        let written = [("dx", dx), ("dgamma", dgamma), ("dbeta", dbeta)];
        let written = written.into_iter().filter_map(|(name, gradient)| Some(gradient?.operand(name)));
        read.into_iter().chain(written).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { x, gamma, eps, dy, dx, dgamma, dbeta } = *self;
        check_f32(&[("x", x), ("dy", dy)])?;
        if let Some(dx) = dx {
            dx.check("dx", x.shape())?;
        }
        for (name, gradient) in [("dgamma", dgamma), ("dbeta", dbeta)] {
            if let Some(gradient) = gradient {
                gradient.check(name, (1, x.cols()))?;
            }
        }
        expect_shape("dy", dy.shape(), x.shape())?;
        check_norm(x, &[("gamma", gamma)], eps, dy)
    }

    /// Mean and variance as in the forward, 4; a product and two sums, 4; dx, 6; dgamma and dbeta, 3 per element.
    fn cost(&self) -> Cost {
        cost_of(17.0 * self.x.rows() as f64 * self.x.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, gamma, eps, dy, dx, dgamma, dbeta } = *self;
        norm_grad(gpu, Norm::Layer, (x, gamma, eps, dy), dx, &[dgamma, dbeta])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, gamma, eps, dy, dx, dgamma, dbeta } = *self;
        let target = |gradient: Option<Gradient<'_>>| gradient.map(|gradient| gradient.on_cpu()).transpose();
        let [x, gamma, dy] = [x.on_cpu()?, gamma.on_cpu()?, dy.on_cpu()?];
        Ok(Box::new(Call { x, gamma, eps, dy, dx: target(dx)?, sums: [target(dgamma)?, target(dbeta)?] }))
    }
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    NormGrad::all(Norm::Layer).chain(sums())
}

#[derive(Debug)]
struct Call {
    x: Shared,
    gamma: Shared,
    eps: f32,
    dy: Shared,
    dx: Option<Target>,
    /// Of gamma and of beta.
    sums: [Option<Target>; 2],
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, gamma, dy, epsilon) = (read(&self.x), read(&self.gamma), read(&self.dy), self.eps);
        let [Some(x), Some(gamma), Some(dy)] = [&x, &gamma, &dy].map(|m| f32::of(m.elements())) else { return };
        cpu.grad_norm((x, dy, gamma.len()), self.dx.as_ref(), &self.sums, |(x, dy), add, dx, parts| {
            cpu.simd().run(GradTokens { x, gamma, epsilon, dy, add, dx, parts });
        });
    }
}

work_of_f32!(GradTokens, {
        x: &'a [f32],
        gamma: &'a [f32],
        epsilon: f32,
        dy: &'a [f32],
        add: bool,
        dx: &'a mut [f32],
        parts: &'a mut [f32],
    },
    grad_tokens((x, gamma, epsilon), dy, add, dx, parts));

/// Gradients of some tokens: of each, unless `dx` is empty, and the sums of those of gamma and beta in `parts`.
#[inline(always)]
fn grad_tokens((x, gamma, epsilon): (&[f32], &[f32], f32), dy: &[f32], add: bool, dx: &mut [f32], parts: &mut [f32]) {
    let width = gamma.len();
    let count = width as f32;
    parts.fill(0.0);
    let (dgamma, dbeta) = parts.split_at_mut(width);
    let dgamma = &mut dgamma[..width];
    let dbeta = &mut dbeta[..width];
    let mut dx = dx.chunks_exact_mut(width);
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let mean = sum_of(x, |x| x) / count;
        let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
        let factor = inverse_root(variance + epsilon);
        for c in 0..width {
            dgamma[c] += dy[c] * ((x[c] - mean) * factor);
            dbeta[c] += dy[c];
        }
        let Some(dx) = dx.next() else { continue };
        let [level, along] = sums_of((x, dy, gamma), |x, dy, gamma| {
            let g = dy * gamma;
            [g, g * ((x - mean) * factor)]
        });
        let (level, along) = (level / count, along / count);
        for (((dx, x), dy), gamma) in dx.iter_mut().zip(x).zip(dy).zip(gamma) {
            put(dx, (dy * gamma - level - (x - mean) * factor * along) * factor, add);
        }
    }
}
