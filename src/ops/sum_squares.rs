//! Sums of squares over parts of a matrix: of all gradients together, what they are clipped by.
//!
//! Invariant: parts have [`SumSquares::PART`] elements on every device, and each has one place of the output, so that
//! matrices of any number share one, which is read back at once.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::sum_of;
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, fields, workgroup_supported,
};
use crate::matrix::{DType, Element, Elements};

/// The sum of the squares of each [`PART`](Self::PART) elements of a matrix, row by row.
#[derive(Clone, Copy, Debug)]
pub struct SumSquares<'a> {
    /// f32.
    pub x: &'a Tensor,
    /// One row, of which as many elements from `first` on are overwritten as `x` has parts.
    pub y: &'a Tensor,
    /// Where those of `x` begin.
    pub first: usize,
}

impl SumSquares<'_> {
    /// Elements of a part: enough for each to keep a workgroup busy, few enough for their sum to be exact to seven
    /// digits.
    pub const PART: usize = 1 << 14;

    /// Parts of a matrix.
    pub fn parts(x: &Tensor) -> usize {
        (x.rows() * x.cols()).div_ceil(Self::PART)
    }
}

impl Operation for SumSquares<'_> {
    fn name(&self) -> &'static str {
        "sum_squares"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("x", self.x), Operand::write("y", self.y)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, y, first } = *self;
        expect_dtype("x", x.dtype(), DType::F32)?;
        expect_dtype("y", y.dtype(), DType::F32)?;
        expect_shape("y", y.shape(), (1, y.cols()))?;
        let parts = Self::parts(x);
        if first.checked_add(parts).is_none_or(|end| end > y.cols()) {
            return Err(Error::invalid(format!("y has {} elements, too few for {parts} from {first} on", y.cols())));
        }
        Ok(())
    }

    fn cost(&self) -> Cost {
        cost_of(2.0 * self.x.rows() as f64 * self.x.cols() as f64, &[Operand::read("x", self.x)])
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, y, first } = *self;
        let params = Params { len: gpu_size("elements", x.rows() * x.cols())?, first: gpu_size("sums", first)? };
        dispatch(gpu, Program::new(SumSquaresKernel), Self::parts(x), &params, &[x.on_gpu(), y.on_gpu()])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        Ok(Box::new(Call { x: self.x.on_cpu()?, y: self.y.on_cpu()?, first: self.first }))
    }
}

/// Mirror of `Params` in shaders/sum_squares.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    len: u32,
    first: u32,
}

/// The program (shaders/sum_squares.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SumSquaresKernel;

/// Every text: one.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(SumSquaresKernel))
}

impl Shader for SumSquaresKernel {
    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/sum_squares.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("PART", SumSquares::PART as f64)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: len first)
    }

    fn workgroup_bytes(&self) -> u32 {
        4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for SumSquaresKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sum_squares")
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    y: Shared,
    first: usize,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, mut y) = (read(&self.x), write(&self.y));
        let (Some(x), Elements::F32(y)) = (f32::of(x.elements()), y.elements_mut()) else { return };
        let parts = x.len().div_ceil(SumSquares::PART);
        cpu.each_chunk(&mut y[self.first..][..parts], 1, |part, y| {
            let x = &x[part * SumSquares::PART..];
            y.fill(sum_of(&x[..x.len().min(SumSquares::PART)], |x| x * x));
        });
    }
}
