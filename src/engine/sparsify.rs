//! Weights that change while they are used: pruned, compressed and decompressed where they lie.
//!
//! Training holds dense weights and multiplies by their 2:4 form, which has to follow every step. [`Device::sparsify`]
//! prunes a dense [`Tensor`] by magnitude and compresses it in one pass, over [`Weights`] that products are bound to
//! already, so that no weight visits the host and nothing is planned or prepared again; [`Device::densify`] is the way
//! back. Both give [`Prepared`] calls like all others, to be run alone, recorded into a caller's encoder, or submitted
//! in a row with products ([`Device::submit`]). The other form that they read and write is values and metadata apart, as
//! [`crate::format`] has them: what to save when training ends, and what kernels of the caller's own read.
//!
//! What is written is what [`prune::sparsify`](crate::prune::sparsify) makes of the same weights, bit for bit, on every
//! device, with one difference: a call on a device cannot fail because of a number. A NaN ranks above infinity, all NaNs
//! alike, and so is kept, to be seen in the next output; of three in a group the last is lost.
//!
//! Errors: [`Error::Shape`] and [`Error::DType`] name the operand that does not fit, [`Error::Mismatch`] one of another
//! device or weights of another operation than 2:4, [`Error::TooLarge`] what the device cannot bind at once. W must
//! share no memory with what it is compressed to; a matrix without elements is no error. f16 needs no feature of a GPU.
//! Invariant: a prepared call's operands have the sizes that its kernel indexes, and live on its device.
//!
//! ```
//! use sparse24::sparsify::{Compressed, Sparsify};
//! use sparse24::{DType, Device, Io, Matrix, Op, Problem, VectorLen, prune};
//! let device = Device::cpu()?;
//! let w0 = Matrix::from_f32(1, 4, &[3.0, 1.0, 2.0, 0.0])?;
//! let weights = device.upload_weights(&prune::sparsify(&w0, VectorLen::ONE)?.into())?;
//! let w = device.upload(&w0)?;
//! let x = device.upload(&Matrix::from_f32(1, 4, &[1.0; 4])?)?;
//! let y = device.zeros(1, 1, DType::F32)?;
//! let plan = device.plan(&Problem::linear(Op::Sparse24(VectorLen::ONE), 1, 1, 4, DType::F32))?;
//! let step = [
//!     device.sparsify(&Sparsify { w: &w, to: Compressed::Weights(&weights) })?,
//!     device.prepare(&plan, &weights, &Io { x: &x, bias: None, residual: None, y: &y })?,
//! ];
//! device.submit(&step)?;
//! assert_eq!(device.read(&y)?.get(0, 0), 5.0);
//! // An optimiser changes the dense weights; here the host does.
//! device.write(&w, &Matrix::from_f32(1, 4, &[0.0, 1.0, 2.0, 7.0])?)?;
//! device.submit(&step)?;
//! assert_eq!(device.read(&y)?.get(0, 0), 9.0);
//! # Ok::<(), sparse24::Error>(())
//! ```

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::glue::{Indices, Shared, SharedIndices, apart, expect_len, u32_of, whole};
use super::{Device, Inner, Piece, Prepared, Tensor, WeightStore, Weights, Work, bind, foreign, read, write};
use crate::cpu::{Cpu, CpuWeights, Parts};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::Program;
use crate::kernels::sparsify::{Conversion, ConversionParams, Direction};
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
    /// Weights of [`Device::upload_weights`], in the layout that products read; of the type of W, which for bf16 ones
    /// is f32 on a GPU, and none on the CPU device.
    Weights(&'a Weights),
}

/// Magnitude pruning and compression: `to` becomes what [`prune::sparsify`](crate::prune::sparsify) makes of `w`.
#[derive(Clone, Copy, Debug)]
pub struct Sparsify<'a> {
    /// `m x k`, f32 or f16.
    pub w: &'a Tensor,
    /// Overwritten, all of it.
    pub to: Compressed<'a>,
}

/// Decompression: `w` becomes what [`Sparse24::decompress`](crate::Sparse24::decompress) makes of `from`.
///
/// A code in metadata of the caller's own that is not legal makes a wrong matrix, and no other harm.
#[derive(Clone, Copy, Debug)]
pub struct Densify<'a> {
    /// The weights.
    pub from: Compressed<'a>,
    /// `m x k`, overwritten.
    pub w: &'a Tensor,
}

/// A conversion on the CPU device with everything bound.
#[derive(Debug)]
pub(super) struct CpuConversion {
    direction: Direction,
    vector: VectorLen,
    w: Shared,
    compressed: CpuCompressed,
}

#[derive(Debug)]
enum CpuCompressed {
    Parts(Shared, SharedIndices),
    /// Weights, and where their parts are put together.
    Weights(Arc<RwLock<CpuWeights>>, Mutex<(Elements, Vec<u32>)>),
}

impl CpuConversion {
    /// Converts, in the caller's turn on the device.
    pub(super) fn run_now(&self, cpu: &Cpu) {
        let vector = self.vector;
        match (self.direction, &self.compressed) {
            (Direction::Sparsify, CpuCompressed::Parts(values, meta)) => {
                let (w, mut values, mut meta) = (read(&self.w), write(values), write(meta));
                cpu.sparsify(
                    w.elements(),
                    Parts { k: w.cols(), vector, values: values.elements_mut(), meta: &mut meta },
                );
            }
            (Direction::Densify, CpuCompressed::Parts(values, meta)) => {
                let (mut w, values, meta) = (write(&self.w), read(values), read(meta));
                let k = w.cols();
                cpu.densify(Parts { k, vector, values: values.elements(), meta: &meta }, w.elements_mut());
            }
            (Direction::Sparsify, CpuCompressed::Weights(weights, staged)) => {
                let w = read(&self.w);
                let (values, meta) = &mut *staged.lock().unwrap_or_else(PoisonError::into_inner);
                cpu.sparsify(w.elements(), Parts { k: w.cols(), vector, values, meta });
                write(weights).replace(values, meta);
            }
            (Direction::Densify, CpuCompressed::Weights(weights, staged)) => {
                let mut w = write(&self.w);
                let (values, meta) = &mut *staged.lock().unwrap_or_else(PoisonError::into_inner);
                read(weights).compressed(values, meta);
                cpu.densify(Parts { k: w.cols(), vector, values, meta }, w.elements_mut());
            }
        }
    }
}

impl Device {
    /// Prepares pruning and compression.
    pub fn sparsify(&self, sparsify: &Sparsify<'_>) -> Result<Prepared> {
        self.convert(Direction::Sparsify, sparsify.w, sparsify.to)
    }

    /// Prepares decompression.
    pub fn densify(&self, densify: &Densify<'_>) -> Result<Prepared> {
        self.convert(Direction::Densify, densify.w, densify.from)
    }

    fn convert(&self, direction: Direction, w: &Tensor, compressed: Compressed<'_>) -> Result<Prepared> {
        self.takes(&[("w", w)])?;
        let (m, k) = (w.rows, w.cols);
        let vector = match compressed {
            Compressed::Parts { vector, values, meta } => {
                self.takes(&[("values", values)])?;
                self.owns("meta", meta.device())?;
                expect_shape("values", (values.rows, values.cols), (m, 2 * k.div_ceil(4)))?;
                expect_dtype("values", values.dtype, w.dtype)?;
                expect_len("meta", meta.len(), words(m, k, vector)?)?;
                apart(("values", values), std::iter::once(("w", w)))?;
                vector
            }
            Compressed::Weights(weights) => {
                self.owns("weights", &weights.device)?;
                let Op::Sparse24(vector) = weights.op else {
                    return Err(Error::Mismatch {
                        what: "weights".into(),
                        got: format!("{:?}", weights.op),
                        expected: "2:4".into(),
                    });
                };
                expect_shape("weights", (weights.m, weights.k), (m, k))?;
                expect_dtype("weights", weights.dtype, w.dtype)?;
                vector
            }
        };
        let work = match &self.0 {
            Inner::Gpu(gpu) => Work::Gpu(dispatches(gpu, direction, vector, w, compressed)?),
            Inner::Cpu(_) => {
                let compressed = match compressed {
                    Compressed::Parts { values, meta, .. } => CpuCompressed::Parts(values.shared()?, meta.shared()?),
                    Compressed::Weights(Weights { store: WeightStore::Cpu(store), .. }) => {
                        expect_dtype("weights", read(store).dtype(), w.dtype)?;
                        let values = checked_mul("values", m, 2 * k.div_ceil(4))?;
                        let staged = (Elements::zeros(w.dtype, values), vec![0; words(m, k, vector)?]);
                        CpuCompressed::Weights(Arc::clone(store), Mutex::new(staged))
                    }
                    Compressed::Weights(_) => return Err(foreign("weights")),
                };
                Work::CpuConversion(Arc::new(CpuConversion { direction, vector, w: w.shared()?, compressed }))
            }
        };
        Ok(Prepared { device: self.clone(), work })
    }
}

/// Words of metadata.
fn words(m: usize, k: usize, vector: VectorLen) -> Result<usize> {
    checked_mul("meta", m.div_ceil(vector.get()), k.div_ceil(layout::WORD))
}

/// One dispatch for each run of rows that can be bound, on both sides.
fn dispatches(
    gpu: &Gpu,
    direction: Direction,
    vector: VectorLen,
    w: &Tensor,
    compressed: Compressed<'_>,
) -> Result<Vec<Dispatch>> {
    let (m, k) = (w.rows, w.cols);
    if m == 0 || k == 0 {
        return Ok(Vec::new());
    }
    let caps = &gpu.info().caps;
    let packed = matches!(compressed, Compressed::Weights(_));
    let conversion = Conversion::new(direction, w.dtype, vector, packed).ok_or_else(|| Error::DType {
        what: "w".into(),
        got: w.dtype,
        expected: DType::F32,
    })?;
    // What W is compressed to, by its rows.
    let stores = match compressed {
        Compressed::Parts { values, meta, .. } => vec![(0..m, (whole(values), meta.binding()))],
        Compressed::Weights(weights) => {
            let WeightStore::Gpu(pieces) = &weights.store else { return Err(foreign("weights")) };
            // As they were cut when they were uploaded.
            let limit = caps.binding_bytes.min(caps.buffer_bytes);
            let rows = layout::pieces(weights.op, m, k, weights.dtype, limit).unwrap_or_default();
            rows.into_iter().zip(pieces.iter().map(Piece::bindings)).collect()
        }
    };
    // The dense side may be larger than a binding where the compressed one is not. Whole patterns, and offsets that any
    // device can bind.
    const STEP: usize = 128;
    let row_bytes = k * w.dtype.bytes();
    let most = usize::try_from(caps.binding_bytes).unwrap_or(usize::MAX) / (STEP * row_bytes) * STEP;
    let mut dispatches = Vec::new();
    for (rows, (values, codes)) in stores {
        for first in rows.clone().step_by(most.max(STEP)) {
            let part = first..rows.end.min(first + most.max(STEP));
            let params = ConversionParams {
                rows: u32_of("rows of W", part.len())?,
                cols: u32_of("columns of W", k)?,
                row0: u32_of("rows of W", first - rows.start)?,
            };
            let dense = bind(w, &part, m, row_bytes);
            let operands = match direction {
                Direction::Sparsify => [None, None, dense, None, None, values, codes],
                Direction::Densify => [values, codes, None, None, None, dense, None],
            };
            let grid = grid(conversion.workgroups(part.len(), k), 1, caps)?;
            dispatches.push(gpu.dispatch(&Program::Conversion(conversion), grid, &params, &operands)?);
        }
    }
    Ok(dispatches)
}
