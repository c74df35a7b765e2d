//! How far a language model's next tokens are from those of another: the loss that brings a pruned model's text back.
//!
//! Of each token that is no padding it is the Kullback-Leibler divergence of the distribution that softmax makes of its
//! logits, from the one of the logits that it should have: Σ p·ln(p/q), where p is wanted. Logarithms of sums are taken
//! relative to the largest logit, so that none overflows. What is added up is q − p − p·ln(q/p), whose terms are never
//! negative and whose sum is the same, as p and q each add up to 1: an error of such a logarithm, which moves all terms
//! alike, cancels where the distributions are alike.
//!
//! In contrast to [`RelativeError`](super::RelativeError) tokens are added up, not averaged, and the weight is a number
//! on the device: the logits of a batch are large, and are compared some tokens at a time, whose weight is over the
//! tokens of the whole batch. Invariant: tokens of padding have the loss zero, and their gradient is zero.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Cost, Gradient, Indices, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{LANES, Target, exp, put, sum_of, sums_of, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, fields, workgroup_supported,
};
use crate::matrix::{DType, Element, Elements};

/// The loss of logits beside others: of each token `weight · KL(softmax(wanted) ‖ softmax(x))`, and the gradient of
/// their sum with regard to `x`, `weight · (softmax(x) − softmax(wanted))`.
///
/// ```
/// use sparse24::{DType, Device, KlDivergence, Matrix};
/// let device = Device::cpu()?;
/// // Probabilities of 1/2 and 1/2, where 1/4 and 3/4 are wanted.
/// let x = device.upload(&Matrix::from_f32(1, 2, &[5.0, 5.0])?)?;
/// let wanted = device.upload(&Matrix::from_f32(1, 2, &[0.0, 3f32.ln()])?)?;
/// let (lengths, loss) = (device.indices(1)?, device.zeros(1, 1, DType::F32)?);
/// device.write_indices(&lengths, &[1])?;
/// let weight = device.upload(&Matrix::from_f32(1, 1, &[1.0])?)?;
/// let of = KlDivergence {
///     x: &x,
///     wanted: &wanted,
///     lengths: &lengths,
///     batch: 1,
///     seq: 1,
///     weight: &weight,
///     loss: &loss,
///     row: 0,
///     dx: None,
/// };
/// device.prepare(&of)?.run()?;
/// let expected = 0.25 * 0.5f32.ln() + 0.75 * 1.5f32.ln();
/// assert!((device.read(&loss)?.get(0, 0) - expected).abs() < 1e-6);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct KlDivergence<'a> {
    /// Logits, `batch·seq x vocabulary`, f32.
    pub x: &'a Tensor,
    /// What they should be, of the same shape.
    pub wanted: &'a Tensor,
    /// Real tokens of each sequence, `batch` of them.
    pub lengths: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence.
    pub seq: usize,
    /// What each token counts: one f32.
    pub weight: &'a Tensor,
    /// Has `batch·seq` columns; its row of this number is overwritten, a number for each token.
    pub loss: &'a Tensor,
    /// The row of `loss`.
    pub row: usize,
    /// Like `x`; none if the loss alone is wanted.
    pub dx: Option<Gradient<'a>>,
}

impl Operation for KlDivergence<'_> {
    fn name(&self) -> &'static str {
        "kl_divergence"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, wanted, lengths, weight, loss, dx, .. } = *self;
        let given = [
            Operand::read("x", x),
            Operand::read("wanted", wanted),
            Operand::read("lengths", lengths),
            Operand::read("weight", weight),
            Operand::write("loss", loss),
        ];
        given.into_iter().chain(dx.map(|dx| dx.operand("dx"))).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { x, wanted, lengths, batch, seq, weight, loss, row, dx } = *self;
        let tokens = checked_mul("tokens", batch, seq)?;
        expect_shape("x", x.shape(), (tokens, wanted.cols()))?;
        expect_shape("wanted", wanted.shape(), (tokens, x.cols()))?;
        expect_shape("weight", weight.shape(), (1, 1))?;
        expect_shape("loss", loss.shape(), (loss.rows(), tokens))?;
        for (what, tensor) in [("x", x), ("wanted", wanted), ("weight", weight), ("loss", loss)] {
            expect_dtype(what, tensor.dtype(), DType::F32)?;
        }
        if row >= loss.rows() {
            return Err(Error::invalid(format!("loss has {} rows, none of number {row}", loss.rows())));
        }
        dx.map_or(Ok(()), |dx| dx.check("dx", x.shape()))?;
        expect_len("lengths", lengths.len(), batch)
    }

    /// Of each pair of logits two exponentials for the sums and two for the probabilities, at eight each, and what is
    /// made of them.
    fn cost(&self) -> Cost {
        let Self { x, wanted, dx, .. } = *self;
        let moved = [Operand::read("x", x), Operand::read("wanted", wanted)];
        let moved: Vec<_> = moved.into_iter().chain(dx.map(|dx| dx.operand("dx"))).collect();
        cost_of(40.0 * x.rows() as f64 * x.cols() as f64, &moved)
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, wanted, lengths, seq, weight, loss, row, dx, .. } = *self;
        let params = Params {
            tokens: gpu_size("tokens", x.rows())?,
            width: gpu_size("tokens of the vocabulary", x.cols())?,
            seq: gpu_size("rows of a sequence", seq)?,
            row: gpu_size("rows of the loss", row)?,
        };
        let kernel = KlDivergenceKernel { gradient: dx.is_some(), add: dx.is_some_and(|dx| dx.add) };
        let operands = [
            x.on_gpu(),
            wanted.on_gpu(),
            lengths.on_gpu(),
            weight.on_gpu(),
            loss.on_gpu(),
            dx.and_then(|dx| dx.to.on_gpu()),
        ];
        dispatch(gpu, Program::new(kernel), x.rows(), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, wanted, lengths, seq, weight, loss, row, dx, .. } = *self;
        Ok(Box::new(Call {
            x: x.on_cpu()?,
            wanted: wanted.on_cpu()?,
            lengths: lengths.on_cpu()?,
            seq,
            weight: weight.on_cpu()?,
            row,
            loss: loss.on_cpu()?,
            dx: dx.map(|dx| dx.on_cpu()).transpose()?,
        }))
    }
}

/// Mirror of `Params` in shaders/kl_divergence.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    seq: u32,
    row: u32,
}

/// The program (shaders/kl_divergence.wgsl). Its name (`Display`) says what becomes of the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KlDivergenceKernel {
    gradient: bool,
    add: bool,
}

/// Every text: one.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(KlDivergenceKernel { gradient: true, add: true }))
}

impl Shader for KlDivergenceKernel {
    fn module(&self) -> String {
        Self { gradient: true, add: true }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/kl_divergence.wgsl")]))
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
                Binding::read(4, "weight"),
                Binding::write(5, "loss"),
                Binding::write(6, "dx"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width seq row)
    }

    fn workgroup_bytes(&self) -> u32 {
        4 * 4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for KlDivergenceKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.gradient, self.add) {
            (false, _) => "kl_divergence",
            (true, false) => "kl_divergence-grad",
            (true, true) => "kl_divergence-grad_add",
        })
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    wanted: Shared,
    lengths: SharedIndices,
    seq: usize,
    weight: Shared,
    row: usize,
    loss: Shared,
    dx: Option<Target>,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, wanted, lengths, weight, mut loss) =
            (read(&self.x), read(&self.wanted), read(&self.lengths), read(&self.weight), write(&self.loss));
        let (width, tokens) = (x.cols(), x.rows());
        let (Some(x), Some(wanted)) = (f32::of(x.elements()), f32::of(wanted.elements())) else { return };
        let Some(&[weight]) = f32::of(weight.elements()) else { return };
        let Elements::F32(loss) = loss.elements_mut() else { return };
        let loss = &mut loss[self.row * tokens..][..tokens];
        let of_token = |token: usize, loss: &mut [f32], dx: Option<(&mut [f32], bool)>| {
            let row = token * width..(token + 1) * width;
            let is_real = token % self.seq < lengths[token / self.seq] as usize;
            let (x, wanted) = (&x[row.clone()], &wanted[row]);
            cpu.simd().run(Divergence { x, wanted, is_real, weight, loss, dx });
        };
        match &self.dx {
            None => cpu.each_chunk(loss, 1, |token, loss| of_token(token, loss, None)),
            // There is no element of the gradient to divide among tasks.
            Some(_) if width == 0 => loss.fill(0.0),
            Some(Target { to, add }) => {
                let mut dx = write(to);
                let Elements::F32(dx) = dx.elements_mut() else { return };
                cpu.each_chunk_of_two((loss, 1), (dx, width), |token, loss, dx| {
                    of_token(token, loss, Some((dx, *add)));
                });
            }
        }
    }
}

work_of_f32!(Divergence, {
    x: &'a [f32],
    wanted: &'a [f32],
    is_real: bool,
    weight: f32,
    loss: &'a mut [f32],
    dx: Option<(&'a mut [f32], bool)>,
}, divergence((x, wanted), is_real, weight, loss, dx));

/// The loss of a token, the only one of `loss`, and its gradient.
#[inline(always)]
fn divergence(
    (x, wanted): (&[f32], &[f32]),
    is_real: bool,
    weight: f32,
    loss: &mut [f32],
    dx: Option<(&mut [f32], bool)>,
) {
    if !is_real || x.is_empty() {
        loss.fill(0.0);
        if let Some((dx, false)) = dx {
            dx.fill(0.0);
        }
        return;
    }
    let (all, all_wanted) = (log_sum_exp(x), log_sum_exp(wanted));
    let [sum] = sums_of((x, wanted, wanted), |x, wanted, _| {
        let (x, wanted) = (x - all, wanted - all_wanted);
        let (q, p) = (exp(x), exp(wanted));
        // What is impossible where it should be adds nothing, whatever its logarithm is.
        let off = if p > 0.0 { p * (x - wanted) } else { 0.0 };
        [q - p - off]
    });
    loss.fill(weight * sum);
    if let Some((dx, add)) = dx {
        for ((dx, x), wanted) in dx.iter_mut().zip(x).zip(wanted) {
            put(dx, weight * (exp(x - all) - exp(wanted - all_wanted)), add);
        }
    }
}

/// The logarithm of the sum of exponentials.
#[inline(always)]
fn log_sum_exp(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, &x)| *lane = larger(*lane, x));
    }
    // NaN compares with nothing, and comes into the sum.
    let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |all, &x| larger(all, x));
    largest + sum_of(x, |x| exp(x - largest)).ln()
}
