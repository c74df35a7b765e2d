//! Gradient of rotary positions.
//!
//! Invariant: a turn keeps lengths, so its gradient is the turn back, whatever was turned.

use std::fmt;

use super::super::{Cost, Gradient, Indices, Operand, Operation, check_f32, cost_of, dispatch};
use super::{Params, Sizes, check_tables};
use crate::cpu::rows::{TASK_TOKENS, Target, put, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::Result;
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, add_override, add_suffix, fields,
};
use crate::matrix::{Element, Elements};

/// Gradient of a [`Rotary`](crate::Rotary) with respect to `x`: `dy` turned back. All tensors are f32.
///
/// ```
/// use sparse24::{DType, Device, Gradient, Matrix, RotaryGrad};
/// let device = Device::cpu()?;
/// // A quarter of a turn back.
/// let (cos, sin) = (device.zeros(1, 1, DType::F32)?, device.upload(&Matrix::from_f32(1, 1, &[1.0])?)?);
/// let dy = device.upload(&Matrix::from_f32(1, 3, &[1.0, 2.0, 7.0])?)?;
/// let to = device.zeros(1, 3, DType::F32)?;
/// let dx = Gradient { to: &to, add: false };
/// let positions = device.indices(1)?;
/// let grad = RotaryGrad { cos: &cos, sin: &sin, positions: &positions, rotated: 2, dy: &dy, dx };
/// device.prepare(&grad)?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(1, 3, &[2.0, -1.0, 7.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RotaryGrad<'a> {
    /// Cosines, a row of `h/2` for each position from 0 on.
    pub cos: &'a Tensor,
    /// Sines, of the same shape.
    pub sin: &'a Tensor,
    /// The position of each row of `dy`; one at or past the end of the tables reads their last row.
    pub positions: &'a Indices,
    /// How many of a token's first features were turned.
    pub rotated: usize,
    /// `tokens x d`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `x`, `tokens x d`.
    pub dx: Gradient<'a>,
}

impl Operation for RotaryGrad<'_> {
    fn name(&self) -> &'static str {
        "rotary_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { cos, sin, positions, dy, dx, .. } = *self;
        let tables = [Operand::read("cos", cos), Operand::read("sin", sin), Operand::read("positions", positions)];
        [Operand::read("dy", dy), dx.operand("dx")].into_iter().chain(tables).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { cos, sin, positions, rotated, dy, dx } = *self;
        check_f32(&[("dy", dy)])?;
        dx.check("dx", dy.shape())?;
        check_tables(dy, (cos, sin), positions, rotated)
    }

    /// Two products and a sum for each turned feature.
    fn cost(&self) -> Cost {
        cost_of(3.0 * self.dy.rows() as f64 * self.rotated as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { cos, sin, positions, rotated, dy, dx } = *self;
        // Without features no head is turned.
        let half = gpu_size("features of a head", cos.cols())?.max(1);
        let params = Params::new(dy, cos, rotated)?;
        let items = dy.rows() * (dy.cols() - rotated / 2);
        let operands = [dy.on_gpu(), dx.to.on_gpu(), cos.on_gpu(), sin.on_gpu(), positions.on_gpu()];
        let kernel = RotaryGradKernel { half, add: dx.add };
        dispatch(gpu, Program::new(kernel), items.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { cos, sin, positions, rotated, dy, dx } = *self;
        let sizes = Sizes { width: dy.cols(), rotated, half: cos.cols() };
        let [cos, sin, dy] = [cos.on_cpu()?, sin.on_cpu()?, dy.on_cpu()?];
        Ok(Box::new(Call { cos, sin, positions: positions.on_cpu()?, sizes, dy, dx: dx.on_cpu()? }))
    }
}

/// The program (shaders/rotary_grad.wgsl). Its name (`Display`) is made of its parts, such as `rotary_grad-d64-add`:
/// features of a head, and `add` where the gradient is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RotaryGradKernel {
    half: u32,
    add: bool,
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(RotaryGradKernel { half: 32, add: false }))
}

impl Shader for RotaryGradKernel {
    fn module(&self) -> String {
        Self { half: 0, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/rotary_grad.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("HALF", f64::from(self.half)), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "dy"),
                Binding::write(2, "dx"),
                Binding::read(3, "cosines"),
                Binding::read(4, "sines"),
                Binding::read(5, "positions"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width rotated last)
    }
}

impl fmt::Display for RotaryGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rotary_grad-d{}{}", 2 * self.half, add_suffix(self.add))
    }
}

#[derive(Debug)]
struct Call {
    cos: Shared,
    sin: Shared,
    positions: SharedIndices,
    sizes: Sizes,
    dy: Shared,
    dx: Target,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (cos, sin, dy, positions) = (read(&self.cos), read(&self.sin), read(&self.dy), read(&self.positions));
        let (add, sizes, task) = (self.dx.add, self.sizes, TASK_TOKENS * self.sizes.width);
        let [Some(cos), Some(sin), Some(dy)] = [&cos, &sin, &dy].map(|m| f32::of(m.elements())) else { return };
        let mut dx = write(&self.dx.to);
        let Elements::F32(dx) = dx.elements_mut() else { return };
        cpu.each_chunk(dx, task, |i, dx| {
            let (dy, positions) = (&dy[i * task..][..dx.len()], &positions[i * TASK_TOKENS..]);
            cpu.simd().run(TurnBack { tables: (cos, sin), positions, sizes, dy, add, dx });
        });
    }
}

work_of_f32!(TurnBack, {
        tables: (&'a [f32], &'a [f32]),
        positions: &'a [u32],
        sizes: Sizes,
        dy: &'a [f32],
        add: bool,
        dx: &'a mut [f32],
    },
    turn_back(tables, positions, sizes, dy, add, dx));

/// Turns the gradients of some tokens back, as many as `dx` has rows.
#[inline(always)]
fn turn_back(tables: (&[f32], &[f32]), positions: &[u32], sizes: Sizes, dy: &[f32], add: bool, dx: &mut [f32]) {
    let Sizes { width, rotated, half } = sizes;
    for ((dy, dx), &position) in dy.chunks_exact(width).zip(dx.chunks_exact_mut(width)).zip(positions) {
        let ((dy, dy_rest), (dx, dx_rest)) = (dy.split_at(rotated), dx.split_at_mut(rotated));
        dx_rest.iter_mut().zip(dy_rest).for_each(|(dx, dy)| put(dx, *dy, add));
        if rotated == 0 {
            continue;
        }
        let (cos, sin) = sizes.of_position(tables, position);
        for (dy, dx) in dy.chunks_exact(2 * half).zip(dx.chunks_exact_mut(2 * half)) {
            let ((a, b), (da, db)) = (dy.split_at(half), dx.split_at_mut(half));
            for ((((da, db), (a, b)), cos), sin) in da.iter_mut().zip(db).zip(a.iter().zip(b)).zip(cos).zip(sin) {
                put(da, a * cos + b * sin, add);
                put(db, b * cos - a * sin, add);
            }
        }
    }
}
