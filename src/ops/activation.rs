//! Activations by themselves.
//!
//! A product that stores act(x) leaves nothing to compute the activation's gradient from. Training keeps what the
//! product computes before it, and this is what comes after. Invariant: each output has its own inputs, and no other.

mod grad;

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{activate, each_pair, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, Types, WORKGROUP, activation_override, fields,
};
use crate::matrix::{DType, Element};
use crate::problem::Activation;

pub use grad::ActivateGrad;

/// An activation of each element, and the sum with another matrix where there is one: `y = act(x) + residual`.
///
/// ```
/// use sparse24::{Activate, Activation, DType, Device, Matrix};
/// let device = Device::cpu()?;
/// let x = device.upload(&Matrix::from_f32(1, 2, &[-1.0, 2.0])?)?;
/// let y = device.zeros(1, 2, DType::F32)?;
/// device.prepare(&Activate { activation: Activation::Relu, x: &x, residual: None, y: &y })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 2, &[0.0, 2.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Activate<'a> {
    /// What is done to each element.
    pub activation: Activation,
    /// `rows x cols`.
    pub x: &'a Tensor,
    /// `rows x cols`, of `y`'s type.
    pub residual: Option<&'a Tensor>,
    /// `rows x cols`, overwritten. Not the memory of `x`.
    pub y: &'a Tensor,
}

impl Operation for Activate<'_> {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, residual, y, .. } = *self;
        let residual = residual.map(|residual| Operand::read("residual", residual));
        [Operand::read("x", x), Operand::write("y", y)].into_iter().chain(residual).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { x, residual, y, .. } = *self;
        expect_shape("y", y.shape(), x.shape())?;
        if let Some(residual) = residual {
            expect_shape("residual", residual.shape(), x.shape())?;
            expect_dtype("residual", residual.dtype(), y.dtype())?;
        }
        Ok(())
    }

    /// An activation counts as one operation.
    fn cost(&self) -> Cost {
        let each = f64::from(u8::from(self.activation != Activation::None) + u8::from(self.residual.is_some()));
        cost_of(each * self.y.rows() as f64 * self.y.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { activation, x, residual, y } = *self;
        let types = Types::new(x.dtype(), y.dtype())?;
        let kernel = ActivationKernel { activation, residual: residual.is_some(), types };
        let (params, workgroups) = flat(x)?;
        let operands = [x.on_gpu(), residual.and_then(Tensor::on_gpu), y.on_gpu()];
        dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { activation, x, residual, y } = *self;
        let residual = residual.map(Tensor::on_cpu).transpose()?;
        Ok(Box::new(Call { activation, x: x.on_cpu()?, residual, y: y.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/activation.wgsl and activation_grad.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    elements: u32,
}

/// All elements of a tensor, and workgroups for them.
fn flat(x: &Tensor) -> Result<(Params, usize)> {
    let elements = checked_mul("elements", x.rows(), x.cols())?;
    Ok((Params { elements: gpu_size("elements", elements)? }, elements.div_ceil(WORKGROUP)))
}

/// The program (shaders/activation.wgsl). Its name (`Display`) is made of its parts, such as
/// `activation-f32f32-gelu-residual`: types of input and arithmetic, activation, and `residual` where one is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ActivationKernel {
    activation: Activation,
    residual: bool,
    types: Types,
}

impl ActivationKernel {
    /// One that adds a residual or not. An error for a type that kernels do not store.
    pub fn new(activation: Activation, residual: bool, storage: DType, output: DType) -> Result<Self> {
        Ok(Self { activation, residual, types: Types::new(storage, output)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let own = |types| Program::new(ActivationKernel { activation: Activation::Gelu, residual: true, types });
    Types::all().map(own).chain(grad::shaders())
}

impl Shader for ActivationKernel {
    fn module(&self) -> String {
        Self { activation: Activation::None, residual: true, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[
            include_str!("../../shaders/shared/activation.wgsl"),
            include_str!("../../shaders/activation.wgsl"),
        ])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![activation_override(self.activation), ("HAS_RESIDUAL", f64::from(u8::from(self.residual)))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::read(2, "residual"), Binding::write(3, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: elements)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for ActivationKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { activation, residual, types } = self;
        let residual = if *residual { "-residual" } else { "" };
        write!(f, "activation-{}f32-{}{residual}{}", types.storage(), activation.name(), types.suffix())
    }
}

/// Elements of a task, and those that are widened at a time.
const TASK: usize = 1 << 13;
const RUN: usize = 64;

#[derive(Debug)]
struct Call {
    activation: Activation,
    x: Shared,
    residual: Option<Shared>,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (activation, x, residual) = (self.activation, read(&self.x), self.residual.as_deref().map(read));
        let residual = residual.as_ref().map(|residual| residual.elements());
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => {
            let residual = residual.and_then(Element::of);
            cpu.each_chunk(y, TASK, |i, y| {
                let residual = residual.map(|residual| &residual[i * TASK..][..y.len()]);
                cpu.simd().run(ActivateRuns { activation, x: &x[i * TASK..][..y.len()], residual, y });
            });
        });
    }
}

work!(ActivateRuns<X, Y>, { activation: Activation, x: &'a [X], residual: Option<&'a [Y]>, y: &'a mut [Y] },
    activate_runs(activation, x, residual, y));

#[inline(always)]
fn activate_runs<X: Element, Y: Element>(activation: Activation, x: &[X], residual: Option<&[Y]>, y: &mut [Y]) {
    for (i, (x, y)) in x.chunks(RUN).zip(y.chunks_mut(RUN)).enumerate() {
        let mut numbers = [0.0; RUN];
        let numbers = &mut numbers[..x.len()];
        numbers.iter_mut().zip(x).for_each(|(number, x)| *number = x.to_f32());
        activate(activation, numbers);
        if let Some(residual) = residual {
            numbers.iter_mut().zip(&residual[i * RUN..]).for_each(|(number, residual)| *number += residual.to_f32());
        }
        y.iter_mut().zip(numbers).for_each(|(y, number)| *y = Y::from_f32(*number));
    }
}
