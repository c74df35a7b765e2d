//! 2:4 weights as an operand that changes: those that products are bound to, or values and metadata apart.
//!
//! Two operations read and write them, sparsify and decompress; what they share is here. Invariant: once
//! [`Compressed::check`] has passed, all that is bound has the sizes that follow from the shape of W.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Indices, Operand, Piece, Tensor, Weights};
use crate::cpu::{CpuWeights, Shared, SharedIndices, read, write};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_len, expect_shape};
use crate::gpu::{BufferRange, Dispatch, Gpu};
use crate::kernels::{Program, Sparse24Layout, Sparse24Params};
use crate::layout;
use crate::mask::VectorLen;
use crate::matrix::{DType, Elements};
use crate::plan::grid;
use crate::problem::Op;

/// 2:4 weights on a device.
#[derive(Clone, Copy, Debug)]
pub enum Compressed<'a> {
    /// Values and metadata as a [`Sparse24`](crate::Sparse24) has them.
    Parts {
        /// How many rows share a code.
        vector: VectorLen,
        /// `m x 2 * ceil(k / 4)`.
        values: &'a Tensor,
        /// `ceil(m / V) * ceil(k / 32)` words, row by row.
        meta: &'a Indices,
    },
    /// Weights of [`Device::upload_weights`](crate::Device::upload_weights), in the layout that products read; of the
    /// type of W, which for bf16 ones is f32 on a GPU, and none on the CPU device.
    Weights(&'a Weights),
}

impl<'a> Compressed<'a> {
    /// The operands that it is, all written or all read.
    pub(crate) fn operands(&self, written: bool) -> Vec<Operand<'a>> {
        let operands = match *self {
            Self::Parts { values, meta, .. } => vec![Operand::read("values", values), Operand::read("meta", meta)],
            Self::Weights(weights) => vec![Operand::read("weights", weights)],
        };
        operands.into_iter().map(|operand| Operand { written, ..operand }).collect()
    }

    /// An error, which names what does not fit, unless these can be the 2:4 form of `w`.
    pub(crate) fn check(&self, w: &Tensor) -> Result<()> {
        let (m, k) = w.shape();
        match *self {
            Self::Parts { vector, values, meta } => {
                expect_shape("values", values.shape(), (m, 2 * k.div_ceil(4)))?;
                expect_dtype("values", values.dtype(), w.dtype())?;
                expect_len("meta", meta.len(), words(m, k, vector)?)
            }
            Self::Weights(weights) => {
                self.vector()?;
                expect_shape("weights", weights.shape(), (m, k))?;
                expect_dtype("weights", weights.dtype(), w.dtype())
            }
        }
    }

    /// How many rows share a code. An error for weights of another operation than 2:4.
    fn vector(&self) -> Result<VectorLen> {
        match *self {
            Self::Parts { vector, .. } => Ok(vector),
            Self::Weights(weights) => weights
                .op()
                .vector()
                .filter(|_| matches!(weights.op(), Op::Sparse24(_)))
                .ok_or_else(|| Error::mismatch("weights", format!("{:?}", weights.op()), "2:4")),
        }
    }

    /// These and `w` on the CPU device.
    pub(crate) fn on_cpu(&self, w: &Tensor) -> Result<CpuParts> {
        let ((m, k), vector) = (w.shape(), self.vector()?);
        let store = match *self {
            Self::Parts { values, meta, .. } => CpuStore::Parts(values.on_cpu()?, meta.on_cpu()?),
            Self::Weights(weights) => {
                let store = weights.on_cpu()?;
                expect_dtype("weights", read(&store).dtype(), w.dtype())?;
                let values = checked_mul("values", m, 2 * k.div_ceil(4))?;
                let staged = (Elements::zeros(w.dtype(), values), vec![0; words(m, k, vector)?]);
                CpuStore::Weights(store, Mutex::new(staged))
            }
        };
        Ok(CpuParts { vector, store })
    }

    /// A dispatch of `program` for each run of rows that can be bound, on both sides. `program` takes the layout, and
    /// with the sizes of a run gives its workgroups; `operands` puts W, values and codes in the order of its bindings.
    pub(crate) fn dispatches(
        &self,
        gpu: &Gpu,
        w: &'a Tensor,
        program: impl Fn(Sparse24Layout) -> Program,
        workgroups: impl Fn(Sparse24Layout, usize, usize) -> usize,
        operands: impl Fn([Option<BufferRange<'a>>; 3]) -> [Option<BufferRange<'a>>; 3],
    ) -> Result<Vec<Dispatch>> {
        let ((m, k), caps) = (w.shape(), &gpu.info().caps);
        if m == 0 || k == 0 {
            return Ok(Vec::new());
        }
        let packed = matches!(self, Self::Weights(_));
        let layout = Sparse24Layout::new(w.dtype(), self.vector()?, packed)
            .ok_or_else(|| Error::dtype("w", w.dtype(), DType::F32))?;
        // What W is compressed to, by its rows.
        let stores: Vec<(Range<usize>, [Option<BufferRange<'a>>; 2])> = match *self {
            Self::Parts { values, meta, .. } => vec![(0..m, [values.on_gpu(), meta.on_gpu()])],
            Self::Weights(weights) => {
                // As they were cut when they were uploaded.
                let limit = caps.binding_bytes.min(caps.buffer_bytes);
                let rows = layout::pieces(weights.op(), m, k, weights.dtype(), limit).unwrap_or_default();
                rows.into_iter().zip(weights.on_gpu()?.iter().map(Piece::bindings)).collect()
            }
        };
        // The dense side may be larger than a binding where the compressed one is not. Whole patterns, and offsets that
        // any device can bind.
        const STEP: usize = 128;
        let row_bytes = k * w.dtype().bytes();
        let most = usize::try_from(caps.binding_bytes).unwrap_or(usize::MAX) / (STEP * row_bytes) * STEP;
        let program = program(layout);
        let mut dispatches = Vec::new();
        for (rows, [values, codes]) in stores {
            for first in rows.clone().step_by(most.max(STEP)) {
                let part = first..rows.end.min(first + most.max(STEP));
                let params = Sparse24Params {
                    rows: gpu_size("rows of W", part.len())?,
                    cols: gpu_size("columns of W", k)?,
                    row0: gpu_size("rows of W", first - rows.start)?,
                };
                let dense = w.part_on_gpu(&part, m, row_bytes);
                let grid = grid(workgroups(layout, part.len(), k), 1, caps)?;
                dispatches.push(gpu.dispatch(&program, grid, &params, &operands([dense, values, codes]))?);
            }
        }
        Ok(dispatches)
    }
}

/// Words of metadata.
fn words(m: usize, k: usize, vector: VectorLen) -> Result<usize> {
    checked_mul("meta", m.div_ceil(vector.get()), k.div_ceil(layout::WORD))
}

/// A size as kernels count it: rounded up to a tile, it must still fit.
pub(crate) fn gpu_size(what: &str, size: usize) -> Result<u32> {
    u32::try_from(size)
        .ok()
        .filter(|&size| size <= u32::MAX - 1024)
        .ok_or_else(|| Error::overflow(what, size.to_string()))
}

/// 2:4 weights on the CPU device.
#[derive(Debug)]
pub(crate) struct CpuParts {
    vector: VectorLen,
    store: CpuStore,
}

#[derive(Debug)]
enum CpuStore {
    Parts(Shared, SharedIndices),
    /// Weights, and where their parts are put together.
    Weights(Arc<RwLock<CpuWeights>>, Mutex<(Elements, Vec<u32>)>),
}

impl CpuParts {
    /// How many rows share a code.
    pub(crate) fn vector(&self) -> VectorLen {
        self.vector
    }

    /// Has values and metadata overwritten.
    pub(crate) fn overwrite(&self, fill: impl FnOnce(&mut Elements, &mut [u32])) {
        match &self.store {
            CpuStore::Parts(values, meta) => fill(write(values).elements_mut(), &mut write(meta)),
            CpuStore::Weights(weights, staged) => {
                let (values, meta) = &mut *staged.lock().unwrap_or_else(PoisonError::into_inner);
                fill(values, meta);
                write(weights).replace(values, meta);
            }
        }
    }

    /// Has values and metadata read.
    pub(crate) fn look(&self, see: impl FnOnce(&Elements, &[u32])) {
        match &self.store {
            CpuStore::Parts(values, meta) => see(read(values).elements(), &read(meta)),
            CpuStore::Weights(weights, staged) => {
                let (values, meta) = &mut *staged.lock().unwrap_or_else(PoisonError::into_inner);
                read(weights).compressed(values, meta);
                see(values, meta);
            }
        }
    }
}
