//! Gradient of mean pooling.
//!
//! Invariant: rows of padding are not read, and nothing is added to them.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::super::{Cost, Gradient, Indices, Operand, Operation, check_f32, cost_of, dispatch};
use super::{MeanPoolingKernel, Params as ForwardParams};
use crate::cpu::rows::{Target, inverse_root, put, sums_of, work_of_f32};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_len, expect_shape};
use crate::gpu::{BufferRange, Dispatch, Gpu, Scratch};
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, add_override, add_suffix, fields,
};
use crate::matrix::{DType, Element, Elements};

/// Gradient of a [`MeanPooling`](crate::MeanPooling) with respect to `x`. All tensors are f32.
///
/// Where a mean's length is below 1e-12, it was divided by that number, which does not depend on it; a mean whose
/// length's square overflows has NaNs. Rows of padding have the gradient 0.
///
/// ```
/// use sparse24::{DType, Device, Gradient, Matrix, MeanPoolingGrad};
/// let device = Device::cpu()?;
/// let x = device.zeros(3, 1, DType::F32)?;
/// let lengths = device.indices(1)?;
/// device.write_indices(&lengths, &[2])?;
/// let dy = device.upload(&Matrix::from_f32(1, 1, &[6.0])?)?;
/// let to = device.zeros(3, 1, DType::F32)?;
/// let dx = Gradient { to: &to, add: false };
/// let grad = MeanPoolingGrad { x: &x, lengths: &lengths, batch: 1, seq: 3, normalize: false, dy: &dy, dx };
/// device.prepare(&grad)?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(3, 1, &[3.0, 3.0, 0.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MeanPoolingGrad<'a> {
    /// `batch·seq x d`: what was pooled.
    pub x: &'a Tensor,
    /// Real tokens of each sequence, `batch` of them.
    pub lengths: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence.
    pub seq: usize,
    /// Whether means were brought to length 1.
    pub normalize: bool,
    /// `batch x d`: the gradient of the result.
    pub dy: &'a Tensor,
    /// Of `x`, `batch·seq x d`.
    pub dx: Gradient<'a>,
}

impl Operation for MeanPoolingGrad<'_> {
    fn name(&self) -> &'static str {
        "mean_pooling_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, lengths, dy, dx, .. } = *self;
        vec![Operand::read("x", x), Operand::read("lengths", lengths), Operand::read("dy", dy), dx.operand("dx")]
    }

    fn check(&self) -> Result<()> {
        let Self { x, lengths, batch, seq, dy, dx, .. } = *self;
        check_f32(&[("x", x), ("dy", dy)])?;
        expect_shape("x", x.shape(), (checked_mul("tokens", batch, seq)?, dy.cols()))?;
        expect_shape("dy", dy.shape(), (batch, x.cols()))?;
        dx.check("dx", x.shape())?;
        expect_len("lengths", lengths.len(), batch)
    }

    /// A mean, two sums over its features and two products and a difference; a store for each token.
    fn cost(&self) -> Cost {
        let (all, means) = (self.x.rows() * self.x.cols(), self.dy.rows() * self.dy.cols());
        cost_of((if self.normalize { all + 8 * means } else { means }) as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, lengths, batch, seq, normalize, dy, dx } = *self;
        let width = gpu_size("features of a token", x.cols())?;
        let (sequences, seq) = (gpu_size("sequences", batch)?, gpu_size("rows of a sequence", seq)?);
        if x.rows() == 0 || width == 0 {
            return Ok(Vec::new());
        }
        let means = normalize.then(|| gpu.scratch(Scratch::Packed, dy.bytes())).transpose()?;
        let means = means.as_ref().map(|buffer| BufferRange { buffer, offset: 0, bytes: dy.bytes() });
        let mut dispatches = Vec::new();
        if normalize {
            let forward = Program::new(MeanPoolingKernel::new(width, false, DType::F32)?);
            let params = ForwardParams { sequences, width, seq };
            dispatches = dispatch(gpu, forward, batch, &params, &[x.on_gpu(), means, lengths.on_gpu()])?;
        }
        let kernel = MeanPoolingGradKernel { normalize, add: dx.add };
        let params = Params { sequences, width, seq };
        let operands = [means, dy.on_gpu(), lengths.on_gpu(), dx.to.on_gpu()];
        let workgroups = batch * seq.div_ceil(ROWS) as usize;
        dispatches.extend(dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)?);
        Ok(dispatches)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, lengths, seq, normalize, dy, dx, .. } = *self;
        let (width, x, lengths) = (x.cols(), x.on_cpu()?, lengths.on_cpu()?);
        Ok(Box::new(Call { x, lengths, seq, width, normalize, dy: dy.on_cpu()?, dx: dx.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/mean_pooling_grad.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    sequences: u32,
    width: u32,
    seq: u32,
}

/// Rows of a workgroup, as in the shader.
const ROWS: u32 = 16;

/// The program (shaders/mean_pooling_grad.wgsl). Its name (`Display`) is made of its parts, such as
/// `mean_pooling_grad-unit-add`: `unit` where means are normalised, and `add` where the gradient is added to what is
/// there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeanPoolingGradKernel {
    normalize: bool,
    add: bool,
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(MeanPoolingGradKernel { normalize: true, add: false }))
}

impl Shader for MeanPoolingGradKernel {
    fn module(&self) -> String {
        Self { normalize: true, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[
            include_str!("../../../shaders/shared/inverse_root.wgsl"),
            include_str!("../../../shaders/mean_pooling_grad.wgsl"),
        ]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("NORMALIZE", f64::from(u8::from(self.normalize))), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "means"),
                Binding::read(2, "dy"),
                Binding::read(3, "lengths"),
                Binding::write(4, "dx"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: sequences width seq)
    }

    fn workgroup_bytes(&self) -> u32 {
        8 * WORKGROUP as u32
    }
}

impl fmt::Display for MeanPoolingGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.normalize { "-unit" } else { "" };
        write!(f, "mean_pooling_grad{unit}{}", add_suffix(self.add))
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    lengths: SharedIndices,
    seq: usize,
    width: usize,
    normalize: bool,
    dy: Shared,
    dx: Target,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let Self { seq, width, normalize, .. } = *self;
        let (x, lengths, dy, add) = (read(&self.x), read(&self.lengths), read(&self.dy), self.dx.add);
        let [Some(x), Some(dy)] = [&x, &dy].map(|m| f32::of(m.elements())) else { return };
        let mut dx = write(&self.dx.to);
        let Elements::F32(dx) = dx.elements_mut() else { return };
        cpu.each_chunk(dx, seq * width, |sequence, dx| {
            let length = seq.min(lengths[sequence] as usize);
            let (x, dy) = (&x[sequence * seq * width..][..length * width], &dy[sequence * width..][..width]);
            cpu.with_scratch(width, |gradient| {
                cpu.simd().run(GradSequence { x, normalize, dy, gradient, add, dx });
            });
        });
    }
}

work_of_f32!(GradSequence, {
        x: &'a [f32],
        normalize: bool,
        dy: &'a [f32],
        gradient: &'a mut [f32],
        add: bool,
        dx: &'a mut [f32],
    },
    grad_sequence(x, normalize, dy, gradient, (add, dx)));

/// Gradient of the tokens in `x`, each as wide as `dy`; rows of `dx` past them are padding. `gradient` holds anything.
#[inline(always)]
fn grad_sequence(x: &[f32], normalize: bool, dy: &[f32], gradient: &mut [f32], (add, dx): (bool, &mut [f32])) {
    let width = dy.len();
    let count = (x.len() / width).max(1) as f32;
    if normalize {
        // The mean first.
        gradient.fill(0.0);
        for token in x.chunks_exact(width) {
            gradient.iter_mut().zip(token).for_each(|(mean, x)| *mean += x);
        }
        gradient.iter_mut().for_each(|mean| *mean /= count);
        let [squares, along] = sums_of((gradient, dy, dy), |mean, dy, _| [mean * mean, mean * dy]);
        // 1e-24 is the square of the least length that is divided by. A NaN is not less.
        let short = squares < 1e-24;
        let factor = inverse_root(if short { 1e-24 } else { squares });
        let along = if short { 0.0 } else { along * factor };
        for (mean, dy) in gradient.iter_mut().zip(dy) {
            *mean = (dy - *mean * factor * along) * factor / count;
        }
    } else {
        gradient.iter_mut().zip(dy).for_each(|(gradient, dy)| *gradient = dy / count);
    }
    let (real, padding) = dx.split_at_mut(x.len());
    for dx in real.chunks_exact_mut(width) {
        dx.iter_mut().zip(&*gradient).for_each(|(dx, gradient)| put(dx, *gradient, add));
    }
    if !add {
        padding.fill(0.0);
    }
}
