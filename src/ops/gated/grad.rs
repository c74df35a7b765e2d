//! Gradients of gates.
//!
//! Invariant: both halves of a row are written by who has read them.

use std::fmt;

use super::super::{Cost, Gradient, Operand, Operation, check_f32, cost_of, dispatch};
use super::{Params, RUN};
use crate::cpu::rows::{TASK_TOKENS, Target, activate, put, slope, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, activation_override, add_override, add_suffix,
    fields,
};
use crate::matrix::{Element, Elements};
use crate::problem::Activation;

/// Gradient of a [`Gated`](crate::Gated) with respect to `x`: of the first half `a` of a row `act'(a) · b · dy`, of the
/// second half `b` `act(a) · dy`. All tensors are f32. ReLU has no slope below zero and at it.
///
/// ```
/// use sparse24::{Activation, DType, Device, GatedGrad, Gradient, Matrix};
/// let device = Device::cpu()?;
/// let x = device.upload(&Matrix::from_f32(1, 2, &[2.0, 5.0])?)?;
/// let dy = device.upload(&Matrix::from_f32(1, 1, &[3.0])?)?;
/// let to = device.zeros(1, 2, DType::F32)?;
/// let dx = Gradient { to: &to, add: false };
/// device.prepare(&GatedGrad { x: &x, activation: Activation::Relu, dy: &dy, dx })?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(1, 2, &[15.0, 6.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct GatedGrad<'a> {
    /// `tokens x 2·d`.
    pub x: &'a Tensor,
    /// What was done to the first half.
    pub activation: Activation,
    /// `tokens x d`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `x`, `tokens x 2·d`.
    pub dx: Gradient<'a>,
}

impl Operation for GatedGrad<'_> {
    fn name(&self) -> &'static str {
        "gated_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, dy, dx, .. } = *self;
        vec![Operand::read("x", x), Operand::read("dy", dy), dx.operand("dx")]
    }

    fn check(&self) -> Result<()> {
        let Self { x, dy, dx, .. } = *self;
        check_f32(&[("x", x), ("dy", dy)])?;
        expect_shape("x", x.shape(), (dy.rows(), checked_mul("features of both halves", 2, dy.cols())?))?;
        dx.check("dx", x.shape())
    }

    /// An activation and its slope, one operation each, and three products.
    fn cost(&self) -> Cost {
        cost_of(5.0 * self.dy.rows() as f64 * self.dy.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, activation, dy, dx } = *self;
        let kernel = GatedGradKernel { activation, add: dx.add };
        let params =
            Params { tokens: gpu_size("tokens", dy.rows())?, width: gpu_size("features of a token", dy.cols())? };
        gpu_size("features", x.rows() * x.cols())?;
        let workgroups = (dy.rows() * dy.cols()).div_ceil(WORKGROUP);
        dispatch(gpu, Program::new(kernel), workgroups, &params, &[x.on_gpu(), dy.on_gpu(), dx.to.on_gpu()])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, activation, dy, dx } = *self;
        let (width, x, dy) = (dy.cols(), x.on_cpu()?, dy.on_cpu()?);
        Ok(Box::new(Call { x, width, activation, dy, dx: dx.on_cpu()? }))
    }
}

/// The program (shaders/gated_grad.wgsl). Its name (`Display`) is made of its parts, such as
/// `gated_grad-gelu-add`: `add` where the gradient is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct GatedGradKernel {
    activation: Activation,
    add: bool,
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(GatedGradKernel { activation: Activation::Gelu, add: false }))
}

impl Shader for GatedGradKernel {
    fn module(&self) -> String {
        Self { activation: Activation::None, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[
            include_str!("../../../shaders/shared/activation.wgsl"),
            include_str!("../../../shaders/shared/slope.wgsl"),
            include_str!("../../../shaders/gated_grad.wgsl"),
        ]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![activation_override(self.activation), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::read(2, "dy"), Binding::write(3, "dx")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width)
    }
}

impl fmt::Display for GatedGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gated_grad-{}{}", self.activation.name(), add_suffix(self.add))
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    width: usize,
    activation: Activation,
    dy: Shared,
    dx: Target,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, dy, width, activation) = (read(&self.x), read(&self.dy), self.width, self.activation);
        let (task, add) = (2 * TASK_TOKENS * width, self.dx.add);
        let [Some(x), Some(dy)] = [&x, &dy].map(|m| f32::of(m.elements())) else { return };
        let mut dx = write(&self.dx.to);
        let Elements::F32(dx) = dx.elements_mut() else { return };
        cpu.each_chunk(dx, task, |i, dx| {
            let (x, dy) = (&x[i * task..][..dx.len()], &dy[i * task / 2..][..dx.len() / 2]);
            cpu.simd().run(GradTokens { x, width, activation, dy, add, dx });
        });
    }
}

work_of_f32!(GradTokens, {
        x: &'a [f32],
        width: usize,
        activation: Activation,
        dy: &'a [f32],
        add: bool,
        dx: &'a mut [f32],
    },
    grad_tokens(x, width, activation, dy, (add, dx)));

/// Gradients of some tokens of twice `width` features each.
#[inline(always)]
fn grad_tokens(x: &[f32], width: usize, activation: Activation, dy: &[f32], (add, dx): (bool, &mut [f32])) {
    let rows = x.chunks_exact(2 * width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(2 * width));
    for ((x, dy), dx) in rows {
        let ((a, b), (da, db)) = (x.split_at(width), dx.split_at_mut(width));
        let inputs = a.chunks(RUN).zip(b.chunks(RUN)).zip(dy.chunks(RUN));
        for (((a, b), dy), (da, db)) in inputs.zip(da.chunks_mut(RUN).zip(db.chunks_mut(RUN))) {
            let (mut gates, mut slopes) = ([0.0; RUN], [0.0; RUN]);
            let (gates, slopes) = (&mut gates[..a.len()], &mut slopes[..a.len()]);
            gates.copy_from_slice(a);
            slopes.copy_from_slice(a);
            activate(activation, gates);
            slope(activation, slopes);
            for (((da, slope), b), dy) in da.iter_mut().zip(slopes).zip(b).zip(dy) {
                put(da, *slope * (b * dy), add);
            }
            for ((db, gate), dy) in db.iter_mut().zip(gates).zip(dy) {
                put(db, *gate * dy, add);
            }
        }
    }
}
