//! Gradient of an activation.
//!
//! Invariant: each element has its own two inputs, and no other.

use std::fmt;

use super::super::{Cost, Gradient, Operand, Operation, check_f32, cost_of, dispatch};
use super::{Params, RUN, TASK, flat};
use crate::cpu::rows::{Target, put, slope, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::Tensor;
use crate::error::{Result, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Text, activation_override, add_override, add_suffix, fields,
};
use crate::matrix::{Element, Elements};
use crate::problem::Activation;

/// Gradient of an [`Activate`](crate::Activate) with respect to `x`: `dx = act'(x) · dy`. (That of a residual is `dy`.)
/// All tensors are f32. ReLU has no slope below zero and at it.
///
/// ```
/// use sparse24::{ActivateGrad, Activation, DType, Device, Gradient, Matrix};
/// let device = Device::cpu()?;
/// let [x, dy] = [[-1.0, 2.0], [5.0, 7.0]].map(|row| device.upload(&Matrix::from_f32(1, 2, &row).unwrap()).unwrap());
/// let to = device.upload(&Matrix::from_f32(1, 2, &[0.5, 0.5])?)?;
/// let dx = Gradient { to: &to, add: true };
/// device.prepare(&ActivateGrad { activation: Activation::Relu, x: &x, dy: &dy, dx })?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(1, 2, &[0.5, 7.5])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ActivateGrad<'a> {
    /// What was done to each element.
    pub activation: Activation,
    /// `rows x cols`: what it was done to.
    pub x: &'a Tensor,
    /// `rows x cols`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `x`, `rows x cols`.
    pub dx: Gradient<'a>,
}

impl Operation for ActivateGrad<'_> {
    fn name(&self) -> &'static str {
        "activation_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, dy, dx, .. } = *self;
        vec![Operand::read("x", x), Operand::read("dy", dy), dx.operand("dx")]
    }

    fn check(&self) -> Result<()> {
        let Self { x, dy, dx, .. } = *self;
        check_f32(&[("x", x), ("dy", dy)])?;
        expect_shape("dy", dy.shape(), x.shape())?;
        dx.check("dx", x.shape())
    }

    /// A slope counts as one operation.
    fn cost(&self) -> Cost {
        cost_of(2.0 * self.x.rows() as f64 * self.x.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { activation, x, dy, dx } = *self;
        let kernel = ActivationGradKernel { activation, add: dx.add };
        let (params, workgroups) = flat(x)?;
        dispatch(gpu, Program::new(kernel), workgroups, &params, &[x.on_gpu(), dy.on_gpu(), dx.to.on_gpu()])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { activation, x, dy, dx } = *self;
        Ok(Box::new(Call { activation, x: x.on_cpu()?, dy: dy.on_cpu()?, dx: dx.on_cpu()? }))
    }
}

/// The program (shaders/activation_grad.wgsl). Its name (`Display`) is made of its parts, such as
/// `activation_grad-gelu-add`: `add` where the gradient is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ActivationGradKernel {
    activation: Activation,
    add: bool,
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(ActivationGradKernel { activation: Activation::Gelu, add: false }))
}

impl Shader for ActivationGradKernel {
    fn module(&self) -> String {
        Self { activation: Activation::None, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[
            include_str!("../../../shaders/shared/activation.wgsl"),
            include_str!("../../../shaders/shared/slope.wgsl"),
            include_str!("../../../shaders/activation_grad.wgsl"),
        ]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![activation_override(self.activation), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::read(2, "dy"), Binding::write(3, "dx")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: elements)
    }
}

impl fmt::Display for ActivationGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "activation_grad-{}{}", self.activation.name(), add_suffix(self.add))
    }
}

#[derive(Debug)]
struct Call {
    activation: Activation,
    x: Shared,
    dy: Shared,
    dx: Target,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (activation, x, dy, add) = (self.activation, read(&self.x), read(&self.dy), self.dx.add);
        let [Some(x), Some(dy)] = [&x, &dy].map(|m| f32::of(m.elements())) else { return };
        let mut dx = write(&self.dx.to);
        let Elements::F32(dx) = dx.elements_mut() else { return };
        cpu.each_chunk(dx, TASK, |i, dx| {
            let (x, dy) = (&x[i * TASK..][..dx.len()], &dy[i * TASK..][..dx.len()]);
            cpu.simd().run(GradRuns { activation, x, dy, add, dx });
        });
    }
}

work_of_f32!(GradRuns, { activation: Activation, x: &'a [f32], dy: &'a [f32], add: bool, dx: &'a mut [f32] },
    grad_runs(activation, x, dy, add, dx));

#[inline(always)]
fn grad_runs(activation: Activation, x: &[f32], dy: &[f32], add: bool, dx: &mut [f32]) {
    for ((x, dy), dx) in x.chunks(RUN).zip(dy.chunks(RUN)).zip(dx.chunks_mut(RUN)) {
        let mut slopes = [0.0; RUN];
        let slopes = &mut slopes[..x.len()];
        slopes.copy_from_slice(x);
        slope(activation, slopes);
        for ((dx, dy), slope) in dx.iter_mut().zip(dy).zip(slopes) {
            put(dx, *slope * dy, add);
        }
    }
}
