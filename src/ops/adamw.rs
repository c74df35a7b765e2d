//! A step of AdamW, the optimiser of retraining (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization").
//!
//! What changes from step to step is read from the device ([`AdamWStep`]), so that the call of each parameter is
//! prepared once. Invariant: a weight whose gradient and state are zero changes by its decay alone, and so stays zero
//! if it is.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::work;
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Result, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, fields, workgroup_supported,
};
use crate::matrix::{DType, Element, Elements, Matrix};

/// One step of AdamW, with g = factor·gradient: m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², w ← w − rate·(m̂ / (√v̂
/// + ε) + decay·w), where m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ); and the gradient becomes zero.
#[derive(Clone, Copy, Debug)]
pub struct AdamW<'a> {
    /// The parameter, f32.
    pub w: &'a Tensor,
    /// Its gradient, like `w`; becomes zero.
    pub gradient: &'a Tensor,
    /// The mean of gradients, like `w`; zero before the first step.
    pub m: &'a Tensor,
    /// The mean of their squares, like `w`; zero before the first step.
    pub v: &'a Tensor,
    /// The numbers of the step: [`AdamWStep::to_matrix`].
    pub step: &'a Tensor,
}

/// The numbers of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Which step it is, from 1.
    pub number: u64,
    /// Learning rate.
    pub rate: f64,
    /// What the gradient is multiplied by: less than 1 where it is clipped.
    pub factor: f64,
    /// β₁ and β₂.
    pub betas: [f64; 2],
    /// ε.
    pub eps: f64,
    /// Weight decay.
    pub decay: f64,
}

/// Numbers of a step on a device.
const NUMBERS: usize = 8;

impl AdamWStep {
    /// As [`AdamW::step`] takes them: one row.
    pub fn to_matrix(&self) -> Result<Matrix> {
        let Self { number, rate, factor, betas, eps, decay } = *self;
        // Powers below f64's least are zero, as they should be.
        let powers = betas.map(|beta| 1.0 - beta.powf(number as f64));
        let numbers: [f64; NUMBERS] =
            [rate / powers[0], factor, betas[0], betas[1], 1.0 / powers[1], eps, 1.0 - rate * decay, 0.0];
        Matrix::from_f32(1, NUMBERS, &numbers.map(|number| number as f32))
    }

    /// Columns of that row.
    pub const LEN: usize = NUMBERS;
}

impl Operation for AdamW<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { w, gradient, m, v, step } = *self;
        vec![
            Operand::read("step", step),
            Operand::write("w", w),
            Operand::write("gradient", gradient),
            Operand::write("m", m),
            Operand::write("v", v),
        ]
    }

    fn check(&self) -> Result<()> {
        let Self { w, gradient, m, v, step } = *self;
        for (what, tensor) in [("w", w), ("gradient", gradient), ("m", m), ("v", v)] {
            expect_shape(what, tensor.shape(), w.shape())?;
            expect_dtype(what, tensor.dtype(), DType::F32)?;
        }
        expect_shape("step", step.shape(), (1, NUMBERS))?;
        expect_dtype("step", step.dtype(), DType::F32)
    }

    fn cost(&self) -> Cost {
        cost_of(14.0 * self.w.rows() as f64 * self.w.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { w, gradient, m, v, step } = *self;
        let len = w.rows() * w.cols();
        let params = Params { len: gpu_size("elements of a parameter", len)? };
        let operands = [step.on_gpu(), w.on_gpu(), gradient.on_gpu(), m.on_gpu(), v.on_gpu()];
        dispatch(gpu, Program::new(AdamWKernel), len.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { w, gradient, m, v, step } = *self;
        let [w, gradient, m, v, step] = [w.on_cpu()?, gradient.on_cpu()?, m.on_cpu()?, v.on_cpu()?, step.on_cpu()?];
        Ok(Box::new(Call { w, gradient, m, v, step }))
    }
}

/// Mirror of `Params` in shaders/adamw.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    len: u32,
}

/// The program (shaders/adamw.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AdamWKernel;

/// Every text: one.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(AdamWKernel))
}

impl Shader for AdamWKernel {
    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/adamw.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("CLEAR", 1.0)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "step"),
                Binding::write(2, "w"),
                Binding::write(3, "gradient"),
                Binding::write(4, "m"),
                Binding::write(5, "v"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: len)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for AdamWKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("adamw")
    }
}

#[derive(Debug)]
struct Call {
    w: Shared,
    gradient: Shared,
    m: Shared,
    v: Shared,
    step: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        // Elements of a task.
        const TASK: usize = 1 << 14;
        let step = read(&self.step);
        let Some(step) = f32::of(step.elements()).and_then(|step| <[f32; NUMBERS]>::try_from(step).ok()) else {
            return;
        };
        let (mut w, mut gradient, mut m, mut v) =
            (write(&self.w), write(&self.gradient), write(&self.m), write(&self.v));
        let all = (w.elements_mut(), gradient.elements_mut(), m.elements_mut(), v.elements_mut());
        let (Elements::F32(w), Elements::F32(gradient), Elements::F32(m), Elements::F32(v)) = all else { return };
        cpu.each_chunk_of_four([w, gradient, m, v], TASK, |[w, gradient, m, v]| {
            cpu.simd().run(Update { step, w, gradient, m, v });
        });
    }
}

work!(Update<>, {
    step: [f32; NUMBERS],
    w: &'a mut [f32],
    gradient: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}, update(step, w, gradient, m, v));

#[inline(always)]
fn update(step: [f32; NUMBERS], w: &mut [f32], gradient: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    let [rate, factor, beta1, beta2, power2, eps, keep, _] = step;
    for (((w, gradient), m), v) in w.iter_mut().zip(gradient).zip(m).zip(v) {
        let g = *gradient * factor;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *w = keep * *w - rate * *m / ((*v * power2).sqrt() + eps);
        *gradient = 0.0;
    }
}
