//! Magnitude pruning and compression in one pass, of weights that change while they are used.
//!
//! Training holds dense weights and multiplies by their 2:4 form, which has to follow every step. [`Sparsify`] prunes a
//! dense [`Tensor`] by magnitude and compresses it in one pass, over [`Weights`](crate::Weights) that products are
//! bound to already, so that no weight visits the host and nothing is planned or prepared again;
//! [`Decompress`](super::Decompress) is the way back. The other form that both read and write is values and metadata
//! apart, as [`mod@crate::format`] has them: what to save when training ends, and what kernels of the caller's own
//! read.
//!
//! What is written is what [`prune::sparsify`](crate::prune::sparsify) makes of the same weights, bit for bit, on every
//! device, with one difference: a call on a device cannot fail because of a number. A NaN ranks above infinity, all
//! NaNs alike, and so is kept, to be seen in the next output; of three in a group the last is lost.
//!
//! The same bits, and not scores within a bound, although GPUs have no f64 and add it up in integers for that: a
//! rounding that falls the other way is another pattern, not a small error of one. Weights that were trained on one
//! device and are pruned again on another, or on the host when they are saved, would be another model.
//!
//! W must share no memory with what it is compressed to; a matrix without elements is no error. f16 needs no feature of
//! a GPU. Invariant: a prepared call's operands have the sizes that its kernel indexes, and live on its device.
//!
//! ```
//! use sparse24::{Compressed, DType, Device, Gemm, GemmOperands, Matrix, Op, Problem, Sparsify, VectorLen, prune};
//! let device = Device::cpu()?;
//! let w0 = Matrix::from_f32(1, 4, &[3.0, 1.0, 2.0, 0.0])?;
//! let weights = device.upload_weights(&prune::sparsify(&w0, VectorLen::ONE)?.into())?;
//! let w = device.upload(&w0)?;
//! let x = device.upload(&Matrix::from_f32(1, 4, &[1.0; 4])?)?;
//! let y = device.zeros(1, 1, DType::F32)?;
//! let plan = device.plan(&Problem::linear(Op::Sparse24(VectorLen::ONE), 1, 1, 4, DType::F32))?;
//! let operands = GemmOperands::new(&x, &y);
//! let step = [
//!     device.prepare(&Sparsify { w: &w, to: Compressed::Weights(&weights) })?,
//!     device.prepare(&Gemm { plan: &plan, weights: &weights, operands })?,
//! ];
//! device.submit(&step)?;
//! assert_eq!(device.read(&y)?.get(0, 0), 5.0);
//! // An optimiser changes the dense weights; here the host does.
//! device.write(&w, &Matrix::from_f32(1, 4, &[0.0, 1.0, 2.0, 7.0])?)?;
//! device.submit(&step)?;
//! assert_eq!(device.read(&y)?.get(0, 0), 9.0);
//! # Ok::<(), sparse24::Error>(())
//! ```

use std::fmt;

use rayon::prelude::*;

use super::{Compressed, Cost, Operand, Operation, cost_of};
use crate::cpu::{BLOCK, Cpu, CpuCall, Shared, read};
use crate::engine::{CpuParts, Tensor};
use crate::error::Result;
use crate::gpu::{Dispatch, Gpu};
use crate::groups::Float;
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Sparse24Layout, Sparse24Params, Text, WORKGROUP,
};
use crate::layout::WORD;
use crate::mask::VectorLen;
use crate::matrix::Elements;
use crate::prune::{Workspace, sparsify_rows};

/// Magnitude pruning and compression: `to` becomes what [`prune::sparsify`](crate::prune::sparsify) makes of `w`.
#[derive(Clone, Copy, Debug)]
pub struct Sparsify<'a> {
    /// `m x k`, f32 or f16.
    pub w: &'a Tensor,
    /// Overwritten, all of it.
    pub to: Compressed<'a>,
}

/// Blocks of V rows of a workgroup: each has eight threads, one for each group of a word.
const BLOCKS: usize = WORKGROUP / 8;

impl Operation for Sparsify<'_> {
    fn name(&self) -> &'static str {
        "sparsify"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        [Operand::read("w", self.w)].into_iter().chain(self.to.operands(true)).collect()
    }

    fn check(&self) -> Result<()> {
        self.to.check(self.w)
    }

    /// A sum of magnitudes, and what compares those of a group.
    fn cost(&self) -> Cost {
        cost_of(2.0 * self.w.rows() as f64 * self.w.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let workgroups = |layout: Sparse24Layout, rows: usize, cols: usize| {
            cols.div_ceil(WORD) * rows.div_ceil(layout.vector().get()).div_ceil(BLOCKS)
        };
        self.to.dispatches(gpu, self.w, |layout| Program::new(SparsifyKernel(layout)), workgroups, |operands| operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        Ok(Box::new(Call { w: self.w.on_cpu()?, to: self.to.on_cpu(self.w)? }))
    }
}

/// The program (shaders/sparsify.wgsl). Its name (`Display`) is made of its parts, such as `sparsify-f16-v4-packed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SparsifyKernel(Sparse24Layout);

/// Every layout, all of one text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Sparse24Layout::all().map(|layout| Program::new(SparsifyKernel(layout)))
}

impl Shader for SparsifyKernel {
    fn module(&self) -> String {
        Self(Sparse24Layout::module()).to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Sparse24Layout::text(include_str!("../../shaders/sparsify.wgsl")))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.0.overrides()
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "w"), Binding::write(2, "values"), Binding::write(3, "codes")] }
    }

    fn params(&self) -> ParamsLayout {
        Sparse24Params::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        4 * WORKGROUP as u32
    }
}

impl fmt::Display for SparsifyKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sparsify-{}", self.0)
    }
}

#[derive(Debug)]
struct Call {
    w: Shared,
    to: CpuParts,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let w = read(&self.w);
        let (k, vector) = (w.cols(), self.to.vector());
        self.to.overwrite(|values, meta| match (w.elements(), values) {
            (Elements::F32(w), Elements::F32(values)) => sparsify(cpu, w, (k, vector), values, meta),
            (Elements::F16(w), Elements::F16(values)) => sparsify(cpu, w, (k, vector), values, meta),
            // Refused when the call is prepared.
            _ => {}
        });
    }
}

/// The host's own loops, dealt out by blocks of rows: tasks begin where a pattern begins, at whatever vector length.
fn sparsify<T: Float>(cpu: &Cpu, w: &[T], (k, vector): (usize, VectorLen), values: &mut [T], meta: &mut [u32]) {
    if w.is_empty() {
        return;
    }
    let task = |work: &mut Workspace, ((w, values), meta): ((&[T], &mut [T]), &mut [u32])| {
        sparsify_rows(w, k, vector, work, values, meta);
    };
    match cpu.threads() {
        Some(threads) => threads.install(|| {
            let parts = w.par_chunks(BLOCK * k).zip(values.par_chunks_mut(BLOCK * 2 * k.div_ceil(4)));
            let words = meta.par_chunks_mut(BLOCK / vector.get() * k.div_ceil(WORD));
            parts.zip(words).for_each_init(Workspace::default, task);
        }),
        None => task(&mut Workspace::default(), ((w, values), meta)),
    }
}
