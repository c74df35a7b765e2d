//! The compressed 2:4 format, version 1: this page is its specification.
//!
//! A weight matrix W of `m x k` elements is cut along `k` into *groups* of four consecutive columns. Of each group at
//! most two elements may be non-zero; the format stores two elements and a 4-bit code that says where they stood. V
//! consecutive rows (V in 1, 2, 4 … 128) share one code per group; V = 1 is the 2:4 of NVIDIA's sparse tensor cores,
//! and every V > 1 matrix is a V = 1 matrix too ([`Sparse24::with_vector`]). Row blocks start at row 0, the last one
//! may be ragged. `m` and `k` may be anything, 0 included.
//!
//! Invariant: a [`Sparse24`] that exists is legal by all the rules below, so kernels trust its codes as indices.
//!
//! # Values
//! Row-major, `m` rows of `2 * ceil(k / 4)` columns, of type f32, f16 or bf16: for group `g` of a row, columns `2g` and
//! `2g + 1` hold the elements at the two coded positions, in increasing `k`. Elements are stored bit for bit, NaN
//! payloads and -0.0 included; a coded position that the mask leaves out is +0.0.
//!
//! # Metadata
//! Row-major words of 32 bits, `ceil(m / V)` rows of `ceil(k / 32)` columns. The code of group `g` is the nibble of
//! word `g / 8` that starts at bit `4 * (g % 8)`: group 0 in the lowest bits. A code is `idx0 | idx1 << 2`, the coded
//! positions `idx0 < idx1` within the group; that leaves six codes. The codes are those of PTX `mma.sp`, torch and
//! CUTLASS, with increasing indices as `mma.sp::ordered_metadata` requires
//! ([PTX manual](https://docs.nvidia.com/cuda/parallel-thread-execution/)). Only the codes agree: words here are
//! row-major, while CUTLASS and torch's CUTLASS backend reorder metadata ([`crate::io`] converts).
//!
//! | positions | 0 1 | 0 2 | 1 2 | 0 3 | 1 3 | 2 3 |
//! |---|---|---|---|---|---|---|
//! | code | 4 | 8 | 9 | C | D | E |
//!
//! What is coded is the union of the non-zero positions over the V rows; -0.0 is zero, NaN is not. A union of three or
//! more has no code and is refused, never truncated. An under-full union gets the code that torch's converter gives it:
//!
//! | union | none | {0} | {1} | {2} | {3} |
//! |---|---|---|---|---|---|
//! | code | E | 8 | 9 | E | E |
//!
//! A writer should write these; a reader accepts any of the six codes in any group.
//!
//! # Padding
//! Where `k` is no multiple of 4 the last group is padded with columns of zeros, which count as present: under-full
//! codes may point at them, and values there must be zero. `k` itself is remembered. Nibbles past the last group are 0,
//! which is not a legal code, so a reader that goes too far is caught.
//!
//! # Size
//! A share of the dense bytes, `1/2 + 1 / (8 * V * bytes per element)`, where `k` is a multiple of 32 and `m` of V:
//!
//! | | V = 1 | V = 2 | V = 4 | V = 32 | V = 128 |
//! |---|---|---|---|---|---|
//! | f32 | 53.125 % | 51.56 % | 50.78 % | 50.10 % | 50.02 % |
//! | f16, bf16 | 56.25 % | 53.125 % | 51.56 % | 50.20 % | 50.05 % |
//!
//! # Files
//! [safetensors](https://huggingface.co/docs/safetensors), little-endian. The matrix called P is two tensors:
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `P.values` | `F32`, `F16` or `BF16` | `[m, 2 * ceil(k / 4)]` |
//! | `P.meta` | `U32` | `[ceil(m / V), ceil(k / 32)]` |
//!
//! and the header's `__metadata__` holds, all of them strings,
//!
//! | key | value |
//! |---|---|
//! | `format` | `sparse24` |
//! | `version` | `1`; a reader refuses a version that it does not know |
//! | `P.shape` | `m,k` in decimal, without spaces |
//! | `P.vector` | V in decimal |
//!
//! Values in a file may also be of a type that is not multiplied here, `I8`, `U8`, `F8_E4M3` or `F8_E5M2`, by the same
//! rules; integers have no -0. A `Sparse24<`[`Bytes`]`>` holds values of any of these types; a [`Sparse24`] alone those
//! that are multiplied, and only that can be uploaded.
//!
//! `P.vector` is what makes P a compressed matrix: one file may hold others, and tensors of other kinds beside them.
//! [`crate::io`] reads and writes these files.
//!
//! # Worked example
//! Sixteen columns of one row, in groups with non-zeros at {0, 3}, {0, 1}, {0, 3} and {0, 2}: codes C, 4, C, 8, and
//! with group 0 in the low bits `0x8C4C`.
//!
//! ```
//! use sparse24::{Matrix, Sparse24, VectorLen};
//! let dense = [1., 0., 0., 2.,  3., 4., 0., 0.,  5., 0., 0., 6.,  7., 0., 8., 0.];
//! let w = Matrix::from_f32(1, 16, &dense)?;
//! let s = Sparse24::from_dense(&w, VectorLen::ONE)?;
//! assert_eq!(s.meta(), [0x8C4C]);
//! assert_eq!(s.values().to_f32(), [1., 2., 3., 4., 5., 6., 7., 8.]);
//! assert_eq!(s.code(0, 3), (0, 2));
//! assert_eq!(s.decompress(), w);
//!
//! // Two rows that share a pattern: the union {1} + {3} is coded D, and each row stores both positions.
//! let w = Matrix::from_f32(2, 4, &[0., 1., 0., 0., 0., 0., 0., 2.])?;
//! let s = Sparse24::from_dense(&w, VectorLen::new(2)?)?;
//! assert_eq!(s.meta(), [0xD]);
//! assert_eq!(s.values().to_f32(), [1., 0., 0., 2.]);
//! # Ok::<(), sparse24::Error>(())
//! ```

mod storage;

use std::borrow::Cow;
use std::iter::zip;
use std::ops::Range;

pub use self::storage::{Bytes, Storage};
use crate::error::{Error, Part, Result, checked_mul, expect_len, expect_shape};
use crate::groups::{self, Bits, COLUMNS};
use crate::mask::{Mask, Mask24, VectorLen};
use crate::matrix::{DType, Element, Elements, Matrix, each_dtype};
use crate::memory;

/// The version of the format that this crate writes, and the only one that it reads.
pub const VERSION: &str = "1";

/// Indexed by the union of the non-zero positions, bit i for position i; 0 where that is over-full.
const CODES: [u8; 16] = [0xE, 8, 9, 4, 0xE, 8, 9, 0, 0xE, 0xC, 0xD, 0, 0xE, 0, 0, 0];

/// The code of a group whose non-zeros stand at the positions set in `bits` (position i in bit i), or `None` if there
/// are more than two. Bits 4 and up are ignored.
///
/// ```
/// use sparse24::format::code_of;
/// assert_eq!((code_of(0b1001), code_of(0b0010), code_of(0b0111)), (Some(0xC), Some(9), None));
/// ```
pub const fn code_of(bits: u8) -> Option<u8> {
    match CODES[(bits & 0xf) as usize] {
        0 => None,
        code => Some(code),
    }
}

/// The two positions that a code stands for, or `None` if it is not legal.
///
/// ```
/// use sparse24::format::positions_of;
/// assert_eq!((positions_of(0xD), positions_of(0)), (Some((1, 3)), None));
/// ```
pub const fn positions_of(code: u8) -> Option<(usize, usize)> {
    let (first, second) = split(code as u32);
    if first < second && second < 4 { Some((first, second)) } else { None }
}

/// The two positions in a nibble that is known to be legal.
const fn split(nibble: u32) -> (usize, usize) {
    ((nibble & 3) as usize, (nibble >> 2) as usize)
}

/// The nibble of `group` in a row of metadata.
fn nibble(meta_row: &[u32], group: usize) -> u32 {
    meta_row[group / 8] >> (4 * (group % 8)) & 0xf
}

/// A compressed 2:4 matrix of `m x k` weights; see the [module](self) for what is stored. Values are [`Elements`],
/// which are multiplied, unless it says [`Bytes`].
///
/// Equality is that of the stored parts: -0.0 equals 0.0, NaN equals nothing, and two codings of one matrix differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse24<S = Elements> {
    m: usize,
    k: usize,
    vector: VectorLen,
    values: S,
    meta: Vec<u32>,
}

impl Sparse24 {
    /// Compresses `w ⊙ mask` at the mask's vector length. Codes are those of the non-zeros of `w ⊙ mask`, not of the
    /// mask: where a kept weight is zero, the group is under-full. An error if the shapes differ.
    ///
    /// ```
    /// use sparse24::{Matrix, Sparse24, VectorLen, prune};
    /// let w = Matrix::from_f32(1, 8, &[0.1, -3., 2., 0.2, 4., 0., 0.3, -5.])?;
    /// let mask = prune::magnitude(&w, VectorLen::ONE)?;
    /// let s = Sparse24::compress(&w, &mask)?;
    /// assert_eq!(s.values().to_f32(), [-3., 2., 4., -5.]);
    /// assert_eq!(s.decompress(), mask.mask().apply(&w)?);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn compress(w: &Matrix, mask: &Mask24) -> Result<Self> {
        let bits = mask.mask();
        expect_shape("mask", (bits.rows(), bits.cols()), (w.rows(), w.cols()))?;
        let per_row = bits.words_per_row();
        let keep = |row: usize, word: usize| bits.words()[row * per_row + word];
        Self::encoded((w.rows(), w.cols()), w.elements(), mask.vector(), keep)
    }

    /// Compresses a matrix that is 2:4 already. A group that is not is an error that names it: [`Error::is_over_full`].
    ///
    /// ```
    /// use sparse24::{Matrix, Sparse24, VectorLen};
    /// let w = Matrix::from_f32(1, 4, &[1., 2., 0., 3.])?;
    /// let error = Sparse24::from_dense(&w, VectorLen::ONE).unwrap_err();
    /// assert!(error.to_string().starts_with("row 0, group 0 (columns 0..4): 3 positions"));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn from_dense(w: &Matrix, vector: VectorLen) -> Result<Self> {
        Self::from_elements(w.rows(), w.cols(), w.elements(), Some(vector))
    }

    /// The matrix of these values and metadata, which the caller has made legal by construction.
    pub(crate) fn from_parts_unchecked(
        m: usize,
        k: usize,
        vector: VectorLen,
        values: Elements,
        meta: Vec<u32>,
    ) -> Self {
        let s = Self { m, k, vector, values, meta };
        debug_assert_eq!((s.values.len(), s.meta.len()), (m * s.k_physical(), s.meta_rows() * s.meta_cols()));
        s
    }

    /// Values and metadata, to be overwritten by legal ones.
    pub(crate) fn parts_mut(&mut self) -> (&mut Elements, &mut [u32]) {
        (&mut self.values, &mut self.meta)
    }

    /// The `m x k` matrix, with +0.0 wherever no value is coded.
    pub fn decompress(&self) -> Matrix {
        Matrix::of_len(self.m, self.k, self.to_elements())
    }

    /// A range of rows, with the same codes. V stays if the range starts and ends at block boundaries (the last row
    /// ends a block too); else V is the largest smaller one at which it does. An error if the matrix has no such rows.
    ///
    /// ```
    /// use sparse24::{Matrix, Sparse24, VectorLen, prune};
    /// let w = sparse24::Matrix::uniform(8, 12, sparse24::DType::F32, 1)?;
    /// let s = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::new(4)?)?)?;
    /// let part = s.rows_of(2..6)?;
    /// assert_eq!((part.vector().get(), part.decompress()), (2, s.decompress().rows_of(2..6)?));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn rows_of(&self, rows: Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.m {
            return Err(Error::invalid(format!("rows {rows:?} of a matrix of {} rows", self.m)));
        }
        let fits = |v: &VectorLen| {
            *v <= self.vector
                && rows.start.is_multiple_of(v.get())
                && (rows.end.is_multiple_of(v.get()) || rows.end == self.m)
        };
        let vector = VectorLen::ALL.into_iter().rev().find(fits).unwrap_or(VectorLen::ONE);
        let s = if vector == self.vector { Cow::Borrowed(self) } else { Cow::Owned(self.clone().with_vector(vector)?) };
        let values = rows.start * s.k_physical()..rows.end * s.k_physical();
        let meta = rows.start / vector.get() * s.meta_cols()..rows.end.div_ceil(vector.get()) * s.meta_cols();
        Ok(Self {
            m: rows.len(),
            k: s.k,
            vector,
            values: each_dtype!(&s.values, data => Element::wrap(data[values].to_vec())),
            meta: s.meta[meta].to_vec(),
        })
    }

    /// The largest vector length at which `mask` is 2:4, or `None` if it is not even at V = 1.
    ///
    /// ```
    /// use sparse24::{Mask, Sparse24, VectorLen};
    /// // Rows 0 and 1 agree, rows 2 and 3 agree, all four together take three positions.
    /// let mask = Mask::from_fn(4, 4, |row, col| col == 0 || col == 1 + row / 2)?;
    /// assert_eq!(Sparse24::vector_len_of(&mask), Some(VectorLen::new(2)?));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn vector_len_of(mask: &Mask) -> Option<VectorLen> {
        let per_row = mask.words_per_row().max(1);
        let mut unions = mask.words().to_vec();
        let mut found = None;
        for v in VectorLen::ALL {
            if v != VectorLen::ONE {
                // A block of 2V rows is two blocks of V rows, or a last one alone.
                let double = |pair: &[u32]| {
                    let (one, other) = pair.split_at(per_row);
                    (0..per_row).map(|i| one[i] | other.get(i).unwrap_or(&0)).collect::<Vec<_>>()
                };
                unions = unions.chunks(2 * per_row).flat_map(double).collect();
            }
            if unions.iter().any(|&bits| groups::over_full(bits) != 0) {
                break;
            }
            found = Some(v);
        }
        found
    }

    /// The element type of the values.
    pub fn dtype(&self) -> DType {
        self.values.dtype()
    }

    /// Size of values and metadata in bytes.
    pub fn bytes(&self) -> usize {
        self.values.len() * self.dtype().bytes() + self.meta.len() * 4
    }
}

impl<S: Storage> Sparse24<S> {
    /// Takes over values and metadata that were made elsewhere. An error if their numbers do not follow from `m`, `k`
    /// and `vector`, a code is not legal, or padding is not zero; a legal code need not be the one that
    /// [`Self::compress`] would choose.
    pub fn from_parts(m: usize, k: usize, vector: VectorLen, values: S, meta: Vec<u32>) -> Result<Self> {
        let s = Self { m, k, vector, values, meta };
        let groups = k.div_ceil(4);
        if checked_mul("values", m, s.k_physical())? != s.values.count() {
            return Err(Error::shape("values", vec![s.values.count()], vec![m, s.k_physical()]));
        }
        if checked_mul("meta", s.meta_rows(), s.meta_cols())? != s.meta.len() {
            return Err(Error::shape("meta", vec![s.meta.len()], vec![s.meta_rows(), s.meta_cols()]));
        }
        // A matrix of no columns has no words, whatever its number of rows, and chunks of no words are not allowed.
        for (row, words) in s.meta.chunks_exact(s.meta_cols().max(1)).enumerate() {
            for group in 0..8 * words.len() {
                let code = nibble(words, group) as u8;
                if group >= groups && code != 0 {
                    return Err(Error::padding(Part::Meta, row, group));
                }
                if group < groups && positions_of(code).is_none() {
                    return Err(Error::illegal_code(row, group, code));
                }
            }
        }
        if !k.is_multiple_of(4) {
            let group = groups - 1;
            for row in 0..m {
                let (first, second) = s.code(row, group);
                let at = row * s.k_physical() + 2 * group;
                if [first, second].into_iter().zip(at..).any(|(i, at)| i >= k % 4 && !s.values.is_zero(at)) {
                    return Err(Error::padding(Part::Values, row, group));
                }
            }
        }
        Ok(s)
    }

    /// Compresses the elements of an `m x k` matrix that is 2:4 already, with codes shared by `vector` rows, or by as
    /// many as can share them. A group that is not 2:4 is an error that names it: [`Error::is_over_full`].
    pub fn from_elements(m: usize, k: usize, dense: &S, vector: Option<VectorLen>) -> Result<Self> {
        expect_len("matrix", dense.count(), checked_mul("matrix", m, k)?)?;
        let vector = match vector {
            Some(vector) => vector,
            None => Sparse24::vector_len_of(&dense.non_zeros((m, k))?).unwrap_or(VectorLen::ONE),
        };
        Self::encoded((m, k), dense, vector, |_, _| u32::MAX)
    }

    /// Compresses the columns of `dense` for which `keep(row, word)` has a bit.
    fn encoded(
        (m, k): (usize, usize),
        dense: &S,
        vector: VectorLen,
        keep: impl Fn(usize, usize) -> u32,
    ) -> Result<Self> {
        let (values, meta) = dense.compress((m, k), vector, keep)?;
        Ok(Self { m, k, vector, values, meta })
    }

    /// What [`Self::from_parts`] takes: `m`, `k`, the vector length, values and metadata.
    pub fn into_parts(self) -> (usize, usize, VectorLen, S, Vec<u32>) {
        (self.m, self.k, self.vector, self.values, self.meta)
    }

    /// The elements of the `m x k` matrix, row-major, with +0.0 wherever no value is coded.
    pub fn to_elements(&self) -> S {
        self.values.decompress((self.m, self.k), self.vector, &self.meta)
    }

    /// How many elements are not zero. -0.0 is zero, NaN is not. An error only if there is no memory to count them in.
    pub fn nonzeros(&self) -> Result<usize> {
        Ok(self.values.non_zeros((self.m, self.k_physical()))?.count())
    }

    /// The coded positions within the matrix: two of every whole group, zeros among them where a group is under-full.
    /// An error only if that many words overflow.
    pub fn mask(&self) -> Result<Mask24> {
        memory::claim_matrix("mask", self.m, self.meta_cols(), size_of::<u32>())?;
        let mut words = Vec::with_capacity(self.m * self.meta_cols());
        // One word of metadata covers the same 32 columns as one word of a mask. Padding nibbles (0) decode to a bit
        // past column k, as do codes that point at padding columns; `limit` clears both in the last word.
        let kept = |word: u32| {
            let (first, second) = groups::positions(word);
            first | second
        };
        let limit = u32::MAX >> ((32 - self.k % 32) % 32);
        if self.k > 0 {
            for row in 0..self.m {
                words.extend(self.meta_row(row).iter().map(|&word| kept(word)));
                if let Some(last) = words.last_mut() {
                    *last &= limit;
                }
            }
        }
        Mask24::new(Mask::new(self.m, self.k, words)?, self.vector)
    }

    /// The same matrix with codes shared by another number of rows. Values and coded positions stay, even where fewer
    /// rows leave a group under-full. An error if rows that would share codes have others.
    pub fn with_vector(self, vector: VectorLen) -> Result<Self> {
        match self.shared(vector)? {
            Some(meta) => Ok(Self { vector, meta, ..self }),
            None => {
                Err(Error::invalid(format!("vector length {vector}: rows that would share codes have different ones")))
            }
        }
    }

    /// The same matrix at the largest possible V. Codes are kept if they already agree across those rows; else groups
    /// are re-encoded from the non-zeros.
    pub fn widest(self) -> Result<Self> {
        let dense = self.to_elements();
        // Every legal matrix is legal at V = 1.
        let widest = Sparse24::vector_len_of(&dense.non_zeros((self.m, self.k))?).unwrap_or(VectorLen::ONE);
        match self.shared(widest)? {
            Some(meta) => Ok(Self { vector: widest, meta, ..self }),
            None => Self::from_elements(self.m, self.k, &dense, Some(widest)),
        }
    }

    /// The codes of every `vector` rows, if those rows have the same.
    fn shared(&self, vector: VectorLen) -> Result<Option<Vec<u32>>> {
        let (rows, cols) = (self.m.div_ceil(vector.get()), self.meta_cols());
        memory::claim_matrix("meta", rows, cols, size_of::<u32>())?;
        let mut meta = Vec::with_capacity(rows * cols);
        for first in (0..if cols == 0 { 0 } else { self.m }).step_by(vector.get()) {
            let codes = self.meta_row(first);
            let mut blocks = (first..self.m.min(first + vector.get())).step_by(self.vector.get());
            if blocks.any(|row| self.meta_row(row) != codes) {
                return Ok(None);
            }
            meta.extend(codes);
        }
        Ok(Some(meta))
    }

    /// The two positions, of 0 to 3, of the values of `group` in `row` (a row of W, not of the metadata).
    ///
    /// # Panics
    /// If `row` or `group` is out of range.
    pub fn code(&self, row: usize, group: usize) -> (usize, usize) {
        assert!(row < self.m && group < self.k.div_ceil(4), "row {row}, group {group} of {} x {}", self.m, self.k);
        split(nibble(self.meta_row(row), group))
    }

    /// The words that hold the codes of a row of W.
    pub(crate) fn meta_row(&self, row: usize) -> &[u32] {
        &self.meta[row / self.vector.get() * self.meta_cols()..][..self.meta_cols()]
    }

    /// Rows of W.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Columns of W, before compression and without padding.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the values: two per group, the last group padded.
    pub fn k_physical(&self) -> usize {
        self.k.div_ceil(4) * 2
    }

    /// How many rows share a code.
    pub fn vector(&self) -> VectorLen {
        self.vector
    }

    /// The values, row-major, `m x k_physical`.
    pub fn values(&self) -> &S {
        &self.values
    }

    /// The codes, row-major, `meta_rows x meta_cols`, eight to a word.
    pub fn meta(&self) -> &[u32] {
        &self.meta
    }

    /// Rows of the metadata: one per V rows of W.
    pub fn meta_rows(&self) -> usize {
        self.m.div_ceil(self.vector.get())
    }

    /// Words per row of the metadata: one per 32 columns of W.
    pub fn meta_cols(&self) -> usize {
        self.k.div_ceil(32)
    }
}

/// Decompresses whole rows of `k` columns; the first row must start a block of `vector` rows. Every element of `dense`
/// is written.
pub(crate) fn expand_rows<T: Bits>(values: &[T], meta: &[u32], k: usize, vector: VectorLen, dense: &mut [T]) {
    let (stride, per_row) = (2 * k.div_ceil(4), k.div_ceil(COLUMNS));
    let rows = zip(values.chunks_exact(stride.max(1)), dense.chunks_exact_mut(k.max(1)));
    for (row, (values, dense)) in rows.enumerate() {
        let codes = &meta[row / vector.get() * per_row..][..per_row];
        groups::each_word(values, dense, |word, values, to| groups::scatter(values, codes[word], to));
    }
}

/// Values and metadata of an `m x k` matrix, of which `keep(row, word)` keeps the columns whose bits are set.
fn encode<T: Bits>(
    data: &[T],
    (m, k): (usize, usize),
    vector: VectorLen,
    keep: impl Fn(usize, usize) -> u32,
) -> Result<(Vec<T>, Vec<u32>)> {
    let v = vector.get();
    let (stride, per_row) = (2 * k.div_ceil(4), k.div_ceil(COLUMNS));
    memory::claim_matrix("values", m, stride, size_of::<T>())?;
    let mut values = vec![T::zeroed(); m * stride];
    memory::claim_matrix("meta", m.div_ceil(v), per_row, size_of::<u32>())?;
    let mut meta = vec![0; m.div_ceil(v) * per_row];
    // Nothing to do, however many rows or columns there are said to be.
    if data.is_empty() {
        return Ok((values, meta));
    }
    let mut coded = vec![0; per_row];
    // Row by row within a block, so that both passes run along memory.
    let blocks = zip(data.chunks(v * k), values.chunks_mut(v * stride));
    for (block, ((rows, values), meta)) in zip(blocks, meta.chunks_exact_mut(per_row)).enumerate() {
        let first = block * v;
        coded.fill(0);
        for (row, data) in (first..).zip(rows.chunks_exact(k)) {
            let (whole, rest) = data.as_chunks::<COLUMNS>();
            for (word, x) in whole.iter().enumerate() {
                coded[word] |= groups::columns(x, groups::non_zero) & keep(row, word);
            }
            if !rest.is_empty() {
                coded[whole.len()] |= groups::columns(&groups::padded(rest), groups::non_zero) & keep(row, whole.len());
            }
        }
        for (word, (coded, meta)) in zip(&mut coded, meta).enumerate() {
            if let over @ 1.. = groups::over_full(*coded) {
                let at = over.trailing_zeros();
                let (group, count) = (8 * word + at as usize / 4, (*coded >> at & 0xf).count_ones() as usize);
                return Err(Error::over_full(first, group, count));
            }
            *coded = groups::codes(groups::coded(*coded));
            *meta = *coded & groups::first((k - COLUMNS * word).next_multiple_of(4));
        }
        for ((row, data), values) in (first..).zip(rows.chunks_exact(k)).zip(values.chunks_exact_mut(stride)) {
            groups::each_word(data, values, |word, x, to| groups::gather(x, coded[word], keep(row, word), to));
        }
    }
    Ok((values, meta))
}
