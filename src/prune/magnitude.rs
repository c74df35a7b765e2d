//! Magnitude pruning, alone and with compression in the same pass over the weights.
//!
//! A column of V rows is scored by Σ|w| over them, in f64 and in the order of the rows; for one row that is the order
//! of the bits of |w|, and compared as such. (The GPU's kernels have no f64: shaders/sparsify.wgsl adds the same
//! bits in integers, so that a pattern does not depend on where it was chosen. Sums of f32 would have been less work
//! there, but WGSL leaves it open how they are rounded and whether subnormals count, and they overflow.) NaN ranks
//! above every number, so that it stays to be seen; functions that can fail refuse it instead.
//!
//! Invariant: whichever way weights take, through a mask or in one pass, the compressed bytes are the same.

use std::iter::zip;

use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::format::Sparse24;
use crate::groups::{self, COLUMNS, Float, Score, Sum};
use crate::mask::{Mask, Mask24, VectorLen};
use crate::matrix::{Elements, Matrix, each_dtype};
use crate::memory;

/// Keeps the two positions of every group with the highest Σ|w| over the V rows, ties to the lower column. Sums are in
/// f64; infinities are weights like others. A NaN is an error that names the first one: [`Error::is_nan`].
///
/// ```
/// use sparse24::{Matrix, VectorLen, prune};
/// let w = Matrix::from_f32(2, 4, &[3., -2., 1., 0., 0., 0., -4., 0.5])?;
/// let kept = |v| Ok::<_, sparse24::Error>(prune::magnitude(&w, VectorLen::new(v)?)?.mask().words().to_vec());
/// assert_eq!(kept(1)?, [0b0011, 0b1100]);
/// assert_eq!(kept(2)?, [0b0101, 0b0101]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn magnitude(w: &Matrix, vector: VectorLen) -> Result<Mask24> {
    fn typed<T: Float>(w: &Matrix, data: &[T], vector: VectorLen) -> Result<Mask24> {
        let (m, k) = (w.rows(), w.cols());
        let per_row = k.div_ceil(COLUMNS);
        memory::claim_matrix("mask", m, per_row, size_of::<u32>())?;
        let mut words = vec![0; m * per_row];
        let mut nan = false;
        // Nothing to do, however many rows or columns there are said to be.
        if !data.is_empty() {
            let mut work = Workspace::default();
            let masks = words.chunks_mut(vector.get() * per_row);
            for (rows, masks) in zip(data.chunks(vector.get() * k), masks) {
                let (first, others) = masks.split_at_mut(per_row);
                nan |= work.choose(rows, k, vector);
                first.copy_from_slice(&work.kept);
                if let Some(last) = first.last_mut() {
                    *last &= groups::first(k - COLUMNS * (per_row - 1));
                }
                others.chunks_exact_mut(per_row).for_each(|other| other.copy_from_slice(first));
            }
        }
        if nan {
            return Err(first_nan(data, k));
        }
        Mask24::new(Mask::new(m, k, words)?, vector)
    }
    each_dtype!(w.elements(), data => typed(w, data, vector))
}

/// Prunes by [`magnitude`] and compresses, in one pass: the same as [`Sparse24::compress`] with that mask, bit for bit,
/// in a fraction of the time.
///
/// ```
/// use sparse24::{Matrix, Sparse24, VectorLen, prune};
/// let w = Matrix::from_f32(1, 8, &[0.1, -3., 2., 0.2, 4., 0., 0.3, -5.])?;
/// let s = prune::sparsify(&w, VectorLen::ONE)?;
/// assert_eq!(s.values().to_f32(), [-3., 2., 4., -5.]);
/// assert_eq!(s, Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE)?)?);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn sparsify(w: &Matrix, vector: VectorLen) -> Result<Sparse24> {
    fn typed<T: Float>(w: &Matrix, data: &[T], vector: VectorLen) -> Result<Sparse24> {
        let (m, k) = (w.rows(), w.cols());
        memory::claim_matrix("values", m, 2 * k.div_ceil(4), size_of::<T>())?;
        let mut values = vec![T::zeroed(); m * (2 * k.div_ceil(4))];
        memory::claim_matrix("meta", m.div_ceil(vector.get()), k.div_ceil(COLUMNS), size_of::<u32>())?;
        let mut meta = vec![0; m.div_ceil(vector.get()) * k.div_ceil(COLUMNS)];
        if sparsify_rows(data, k, vector, &mut Workspace::default(), &mut values, &mut meta) {
            return Err(first_nan(data, k));
        }
        Ok(Sparse24::from_parts_unchecked(m, k, vector, T::wrap(values), meta))
    }
    each_dtype!(w.elements(), data => typed(w, data, vector))
}

/// [`sparsify`] at the vector length of `s`, over what it holds: weights that change need no new memory, which takes
/// the system as long to hand out as it takes to fill. An error if shape or type differ, or [of a NaN](Error::is_nan);
/// after that `s` holds the weights with the NaN kept, as [devices](crate::ops::sparsify) do.
///
/// ```
/// use sparse24::{Matrix, VectorLen, prune};
/// let mut s = prune::sparsify(&Matrix::from_f32(1, 4, &[1., 2., 3., 4.])?, VectorLen::ONE)?;
/// prune::sparsify_into(&Matrix::from_f32(1, 4, &[5., 2., 3., 4.])?, &mut s)?;
/// assert_eq!(s.values().to_f32(), [5., 4.]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn sparsify_into(w: &Matrix, s: &mut Sparse24) -> Result<()> {
    expect_shape("w", (w.rows(), w.cols()), (s.m(), s.k()))?;
    expect_dtype("w", w.dtype(), s.dtype())?;
    fn typed<T: Float>(data: &[T], k: usize, vector: VectorLen, values: &mut [T], meta: &mut [u32]) -> Result<()> {
        if sparsify_rows(data, k, vector, &mut Workspace::default(), values, meta) {
            return Err(first_nan(data, k));
        }
        Ok(())
    }
    let (k, vector) = (s.k(), s.vector());
    let (values, meta) = s.parts_mut();
    match (w.elements(), values) {
        (Elements::F32(data), Elements::F32(values)) => typed(data, k, vector, values, meta),
        (Elements::F16(data), Elements::F16(values)) => typed(data, k, vector, values, meta),
        (Elements::Bf16(data), Elements::Bf16(values)) => typed(data, k, vector, values, meta),
        // The types are the same.
        _ => Ok(()),
    }
}

/// Prunes and compresses rows of `k` columns from a block's first one on; values and metadata as in the format, all of
/// them written. Returns whether there is a NaN, which is kept as if it were the largest number.
// Not inlined, so that every caller runs the code that was measured: it took 1.7 times as long where it was.
#[inline(never)]
pub(crate) fn sparsify_rows<T: Float>(
    data: &[T],
    k: usize,
    vector: VectorLen,
    work: &mut Workspace,
    values: &mut [T],
    meta: &mut [u32],
) -> bool {
    // Nothing to do, however many rows or columns there are said to be.
    if data.is_empty() {
        return false;
    }
    let (stride, per_row) = (2 * k.div_ceil(4), k.div_ceil(COLUMNS));
    let mut nan = false;
    let blocks = zip(data.chunks(vector.get() * k), values.chunks_mut(vector.get() * stride));
    for ((rows, values), meta) in zip(blocks, meta.chunks_exact_mut(per_row)) {
        nan |= work.choose(rows, k, vector);
        let Workspace { kept, non_zero, .. } = work;
        for ((meta, kept), non_zero) in zip(meta.iter_mut(), &*kept).zip(&*non_zero) {
            *meta = groups::codes(groups::coded(kept & non_zero));
        }
        for (row, values) in zip(rows.chunks_exact(k), values.chunks_exact_mut(stride)) {
            groups::each_word(row, values, |word, x, to| groups::gather(x, meta[word], kept[word], to));
        }
        if let Some(last) = meta.last_mut() {
            *last &= groups::first((k - COLUMNS * (per_row - 1)).next_multiple_of(4));
        }
    }
    nan
}

/// What is decided about a block of V rows, and what it takes to decide.
#[derive(Default)]
pub(crate) struct Workspace {
    sums: Vec<Sum>,
    /// The two best columns of each group, zeros and padding among them.
    kept: Vec<u32>,
    /// Columns that are not zero in all rows.
    non_zero: Vec<u32>,
}

impl Workspace {
    /// Decides about one block of V rows or fewer. Returns whether there is a NaN.
    fn choose<T: Float>(&mut self, rows: &[T], k: usize, vector: VectorLen) -> bool {
        let Self { sums, kept, non_zero } = self;
        kept.resize(k.div_ceil(COLUMNS), 0);
        non_zero.resize(k.div_ceil(COLUMNS), 0);
        if vector == VectorLen::ONE {
            return decide(rows, kept, non_zero);
        }
        sums.clear();
        sums.resize(k, Sum::default());
        for row in rows.chunks_exact(k) {
            for (sum, x) in zip(sums.iter_mut(), row) {
                sum.0 += f64::from(x.magnitude());
            }
        }
        decide(sums, kept, non_zero)
    }
}

/// Decides by the scores of columns.
fn decide<S: Score>(columns: &[S], kept: &mut [u32], non_zero: &mut [u32]) -> bool {
    // Zeros and NaNs are rare among weights that nothing has pruned yet: asking for them first costs less than finding
    // them.
    let (mut lowest, mut highest): (S::Rank, S::Rank) = (S::NAN, false.into());
    for column in columns {
        lowest = lowest.min(column.bits_of());
        highest = highest.max(column.bits_of());
    }
    let nan = highest >= S::NAN;
    match nan {
        true => words(columns, kept, |x| groups::best_two::<S, true>(x)),
        false => words(columns, kept, |x| groups::best_two::<S, false>(x)),
    }
    match lowest == false.into() {
        true => words(columns, non_zero, |x| groups::columns(x, |x: S| x.bits_of() != false.into())),
        false => non_zero.fill(u32::MAX),
    }
    if let (Some(last), ragged @ 1..) = (non_zero.last_mut(), columns.len() % COLUMNS) {
        *last &= groups::first(ragged);
    }
    nan
}

/// A word for every 32 columns, of which a ragged end is padded with zeros.
#[inline(always)]
fn words<S: Score>(columns: &[S], words: &mut [u32], word: impl Fn(&[S; COLUMNS]) -> u32) {
    let (whole, rest) = columns.as_chunks::<COLUMNS>();
    for (to, x) in zip(&mut *words, whole) {
        *to = word(x);
    }
    if let Some(to) = words.get_mut(whole.len()) {
        *to = word(&groups::padded(rest));
    }
}

/// The error that names the first NaN, of which there is one.
fn first_nan<T: Float>(data: &[T], k: usize) -> Error {
    let at = data.iter().position(|x| x.to_f32().is_nan()).unwrap_or_default();
    Error::nan(at / k, at % k)
}
