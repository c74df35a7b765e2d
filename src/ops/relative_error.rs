//! How far states are from what they should be: the loss that brings a pruned model back to the dense one.
//!
//! Of each token that is no padding it is the squared distance over the squared length of the state that it should
//! have, so that no token or layer counts more for being larger; a batch's loss is the mean over its tokens. Loss and
//! gradient are one pass over both states. Invariant: tokens of padding have the loss zero, and their gradient is zero.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Cost, Gradient, Indices, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, sum_of, work};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, fields, workgroup_supported,
};
use crate::matrix::{DType, Element, Elements};

/// The loss of states beside others: of each token `weight · |x − wanted|² / |wanted|²` over the number of tokens, and
/// the gradient of their sum with regard to `x`. A token whose `wanted` has no length counts as if that were 1e-6.
#[derive(Clone, Copy, Debug)]
pub struct RelativeError<'a> {
    /// `batch·seq x d`, f32.
    pub x: &'a Tensor,
    /// What it should be, of the same shape.
    pub wanted: &'a Tensor,
    /// Real tokens of each sequence, `batch` of them.
    pub lengths: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence.
    pub seq: usize,
    /// What all of it counts.
    pub weight: f32,
    /// Has `batch·seq` columns; its row of this number is overwritten, a number for each token.
    pub loss: &'a Tensor,
    /// The row of `loss`.
    pub row: usize,
    /// Like `x`; none if the loss alone is wanted.
    pub dx: Option<Gradient<'a>>,
}

/// The square of a length that is divided by where there is less.
const LEAST: f32 = 1e-12;

impl Operation for RelativeError<'_> {
    fn name(&self) -> &'static str {
        "relative_error"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, wanted, lengths, loss, dx, .. } = *self;
        let given = [
            Operand::read("x", x),
            Operand::read("wanted", wanted),
            Operand::read("lengths", lengths),
            Operand::write("loss", loss),
        ];
        given.into_iter().chain(dx.map(|dx| dx.operand("dx"))).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { x, wanted, lengths, batch, seq, loss, row, dx, .. } = *self;
        let tokens = checked_mul("tokens", batch, seq)?;
        expect_shape("x", x.shape(), (tokens, wanted.cols()))?;
        expect_shape("wanted", wanted.shape(), (tokens, x.cols()))?;
        expect_shape("loss", loss.shape(), (loss.rows(), tokens))?;
        for (what, tensor) in [("x", x), ("wanted", wanted), ("loss", loss)] {
            expect_dtype(what, tensor.dtype(), DType::F32)?;
        }
        if row >= loss.rows() {
            return Err(Error::invalid(format!("loss has {} rows, none of number {row}", loss.rows())));
        }
        dx.map_or(Ok(()), |dx| dx.check("dx", x.shape()))?;
        expect_len("lengths", lengths.len(), batch)
    }

    /// A difference, two squares with their sums, and a product.
    fn cost(&self) -> Cost {
        let Self { x, wanted, lengths, dx, .. } = *self;
        let moved = [Operand::read("x", x), Operand::read("wanted", wanted), Operand::read("lengths", lengths)];
        let moved: Vec<_> = moved.into_iter().chain(dx.map(|dx| dx.operand("dx"))).collect();
        cost_of(6.0 * x.rows() as f64 * x.cols() as f64, &moved)
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, wanted, lengths, batch, seq, weight, loss, row, dx } = *self;
        let params = Params {
            tokens: gpu_size("tokens", x.rows())?,
            width: gpu_size("features of a token", x.cols())?,
            seq: gpu_size("rows of a sequence", seq)?,
            batch: gpu_size("sequences", batch)?,
            row: gpu_size("rows of the loss", row)?,
            weight,
        };
        let kernel = RelativeErrorKernel { gradient: dx.is_some(), add: dx.is_some_and(|dx| dx.add) };
        let operands = [x.on_gpu(), wanted.on_gpu(), lengths.on_gpu(), loss.on_gpu(), dx.and_then(|dx| dx.to.on_gpu())];
        dispatch(gpu, Program::new(kernel), x.rows().div_ceil(TOKENS), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, wanted, lengths, seq, weight, loss, row, dx, .. } = *self;
        Ok(Box::new(Call {
            x: x.on_cpu()?,
            wanted: wanted.on_cpu()?,
            lengths: lengths.on_cpu()?,
            seq,
            weight,
            row,
            loss: loss.on_cpu()?,
            dx: dx.map(|dx| Ok::<_, Error>((dx.to.on_cpu()?, dx.add))).transpose()?,
        }))
    }
}

/// Tokens of a workgroup.
const TOKENS: usize = WORKGROUP / 32;

/// Mirror of `Params` in shaders/relative_error.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    seq: u32,
    batch: u32,
    row: u32,
    weight: f32,
}

/// The program (shaders/relative_error.wgsl). Its name (`Display`) says what becomes of the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RelativeErrorKernel {
    gradient: bool,
    add: bool,
}

/// Every text: one.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(RelativeErrorKernel { gradient: true, add: true }))
}

impl Shader for RelativeErrorKernel {
    fn module(&self) -> String {
        Self { gradient: true, add: true }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/relative_error.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let flag = |set: bool| f64::from(u8::from(set));
        vec![("GRADIENT", flag(self.gradient)), ("ADD", flag(self.add))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::read(2, "wanted"),
                Binding::read(3, "lengths"),
                Binding::write(4, "loss"),
                Binding::write(5, "dx"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width seq batch row weight)
    }

    fn workgroup_bytes(&self) -> u32 {
        2 * 4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for RelativeErrorKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.gradient, self.add) {
            (false, _) => "relative_error",
            (true, false) => "relative_error-grad",
            (true, true) => "relative_error-grad_add",
        })
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    wanted: Shared,
    lengths: SharedIndices,
    seq: usize,
    weight: f32,
    row: usize,
    loss: Shared,
    dx: Option<(Shared, bool)>,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, wanted, lengths, mut loss) =
            (read(&self.x), read(&self.wanted), read(&self.lengths), write(&self.loss));
        let (width, tokens) = (x.cols(), x.rows());
        let (Some(x), Some(wanted)) = (f32::of(x.elements()), f32::of(wanted.elements())) else { return };
        let Elements::F32(loss) = loss.elements_mut() else { return };
        let loss = &mut loss[self.row * tokens..][..tokens];
        let real: usize = lengths.iter().map(|&length| self.seq.min(length as usize)).sum();
        let weight = self.weight / real.max(1) as f32;
        let seq = self.seq;
        let of_tokens = |task: usize, loss: &mut [f32], dx: Option<(&mut [f32], bool)>| {
            let first = task * TASK_TOKENS;
            let rows = first * width..(first + loss.len()) * width;
            let (x, wanted) = (&x[rows.clone()], &wanted[rows]);
            cpu.simd().run(Errors { x, wanted, lengths: &lengths, seq, weight, first, width, loss, dx });
        };
        match &self.dx {
            None => cpu.each_chunk(loss, TASK_TOKENS, |task, loss| of_tokens(task, loss, None)),
            Some((dx, add)) => {
                let mut dx = write(dx);
                let Elements::F32(dx) = dx.elements_mut() else { return };
                cpu.each_chunk_of_two((loss, TASK_TOKENS), (dx, TASK_TOKENS * width), |task, loss, dx| {
                    of_tokens(task, loss, Some((dx, *add)));
                });
            }
        }
    }
}

work!(Errors<>, {
    x: &'a [f32],
    wanted: &'a [f32],
    lengths: &'a [u32],
    seq: usize,
    weight: f32,
    first: usize,
    width: usize,
    loss: &'a mut [f32],
    dx: Option<(&'a mut [f32], bool)>,
}, errors(x, wanted, lengths, seq, weight, (first, width), loss, dx));

/// Losses of some tokens from number `first` on, and their gradients.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the fields of Errors")]
fn errors(
    x: &[f32],
    wanted: &[f32],
    lengths: &[u32],
    seq: usize,
    weight: f32,
    (first, width): (usize, usize),
    loss: &mut [f32],
    mut dx: Option<(&mut [f32], bool)>,
) {
    for (token, loss) in loss.iter_mut().enumerate() {
        let (sequence, place) = ((first + token) / seq, (first + token) % seq);
        let row = token * width..(token + 1) * width;
        let is_real = place < lengths[sequence] as usize;
        let (x, wanted) = (&x[row.clone()], &wanted[row.clone()]);
        let scale = if is_real {
            let squares = sum_of(wanted, |w| w * w);
            weight / if squares < LEAST { LEAST } else { squares }
        } else {
            0.0
        };
        let mut distance = 0.0;
        if is_real {
            let mut lanes = [0.0f32; 16];
            for (x, wanted) in x.chunks(16).zip(wanted.chunks(16)) {
                for ((lane, x), wanted) in lanes.iter_mut().zip(x).zip(wanted) {
                    *lane += (x - wanted) * (x - wanted);
                }
            }
            distance = lanes.iter().sum();
        }
        *loss = scale * distance;
        if let Some((dx, add)) = &mut dx {
            let dx = &mut dx[row];
            match (is_real, *add) {
                (true, true) => dx.iter_mut().zip(x).zip(wanted).for_each(|((d, x), w)| *d += 2.0 * scale * (x - w)),
                (true, false) => dx.iter_mut().zip(x).zip(wanted).for_each(|((d, x), w)| *d = 2.0 * scale * (x - w)),
                (false, true) => {}
                (false, false) => dx.fill(0.0),
            }
        }
    }
}
