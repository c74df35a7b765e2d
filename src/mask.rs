//! Bit masks over a weight matrix: any mask ([`Mask`]), and one that 2:4 can hold ([`Mask24`]).
//!
//! A mask is what pruning decides and what compression and the masked kernel consume. Bits are packed along `k`,
//! 32 to a word, column `c` being bit `c % 32` of word `c / 32` of its row, so a kernel tests a tile with one load.
//! Invariants: bits past the last column are zero; in a [`Mask24`] the union over each block of V rows keeps at most
//! two of every four consecutive columns.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result, checked_mul, expect_shape};
use crate::groups::{self, Bits, COLUMNS};
use crate::matrix::{Element, Elements, Matrix, each_dtype};
use crate::memory;

/// How many consecutive rows of W share one pattern per group: 1, 2, 4, 8, 16, 32, 64 or 128.
///
/// V = 1 is the 2:4 of NVIDIA's sparse tensor cores. Larger V trades accuracy for speed on hardware without them:
/// one gathered activation serves V rows. Row blocks start at row 0; the last one may be ragged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VectorLen(u8);

impl VectorLen {
    /// The standard 2:4: every row has its own pattern.
    pub const ONE: Self = Self(1);
    /// All vector lengths of the format, ascending.
    pub const ALL: [Self; 8] = [Self(1), Self(2), Self(4), Self(8), Self(16), Self(32), Self(64), Self(128)];

    /// The vector length of `v` rows, if the format has it.
    pub fn new(v: usize) -> Result<Self> {
        Self::ALL.into_iter().find(|x| x.get() == v).ok_or(Error::vector_len(v))
    }

    /// The number of rows.
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

impl FromStr for VectorLen {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.parse().map_err(|_| Error::invalid(format!("vector length {text:?} is no number"))).and_then(Self::new)
    }
}

impl fmt::Display for VectorLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A mask of one bit per weight; set means kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    words: Vec<u32>,
}

impl Mask {
    /// Wraps packed bits, `cols.div_ceil(32)` words per row. An error if their number is wrong or a bit past the
    /// last column is set.
    pub fn new(rows: usize, cols: usize, words: Vec<u32>) -> Result<Self> {
        let per_row = cols.div_ceil(32);
        if checked_mul("mask", rows, per_row)? != words.len() {
            return Err(Error::shape("mask words", vec![words.len()], vec![rows, per_row]));
        }
        if !cols.is_multiple_of(32) {
            let stray = words.chunks_exact(per_row).position(|row| row[per_row - 1] >> (cols % 32) != 0);
            if let Some(row) = stray {
                return Err(Error::invalid(format!("mask row {row} has bits set past column {cols}")));
            }
        }
        Ok(Self { rows, cols, words })
    }

    /// The mask that keeps `(row, col)` where `keep` says so. An error if the size overflows.
    pub fn from_fn(rows: usize, cols: usize, mut keep: impl FnMut(usize, usize) -> bool) -> Result<Self> {
        let per_row = cols.div_ceil(32);
        memory::claim_matrix("mask", rows, per_row, size_of::<u32>())?;
        let len = rows * per_row;
        let mut words: Vec<u32> = Vec::new();
        words.try_reserve_exact(len).map_err(|_| Error::out_of_memory(format!("a mask of {rows} x {cols}")))?;
        words.resize(len, 0);
        // A mask of no columns may claim any number of rows.
        for r in 0..if words.is_empty() { 0 } else { rows } {
            for c in 0..cols {
                words[r * per_row + c / 32] |= u32::from(keep(r, c)) << (c % 32);
            }
        }
        Ok(Self { rows, cols, words })
    }

    /// Where `w` is not zero. -0.0 is zero, NaN is not.
    pub fn of_nonzeros(w: &Matrix) -> Result<Self> {
        each_dtype!(w.elements(), data => Self::of_nonzero_bits(w.rows(), w.cols(), data))
    }

    /// Where `rows * cols` elements are not zero.
    pub(crate) fn of_nonzero_bits<T: Bits>(rows: usize, cols: usize, data: &[T]) -> Result<Self> {
        let per_row = cols.div_ceil(COLUMNS);
        memory::claim_matrix("mask", rows, per_row, size_of::<u32>())?;
        let mut words = Vec::with_capacity(rows * per_row);
        for row in data.chunks_exact(cols.max(1)) {
            words.extend(row.chunks(COLUMNS).map(|x| groups::columns(&groups::padded(x), groups::non_zero)));
        }
        Ok(Self { rows, cols, words })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The packed bits, row by row.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Words per row: one per 32 columns, the last one padded with zero bits.
    pub fn words_per_row(&self) -> usize {
        self.cols.div_ceil(32)
    }

    /// Whether the weight at `row`, `col` is kept.
    ///
    /// # Panics
    /// If `row` or `col` is out of range.
    pub fn get(&self, row: usize, col: usize) -> bool {
        assert!(col < self.cols, "column {col} of a mask with {} columns", self.cols);
        self.words[row * self.words_per_row() + col / 32] >> (col % 32) & 1 == 1
    }

    /// The four bits of a group, position 0 in bit 0; positions past the last column read as zero.
    pub fn group(&self, row: usize, group: usize) -> u8 {
        // Groups never straddle a word: 32 is a multiple of 4.
        (self.words[row * self.words_per_row() + group / 8] >> (4 * (group % 8)) & 0xf) as u8
    }

    /// Number of weights kept.
    pub fn count(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// `w ⊙ mask`: kept elements bit for bit, +0.0 elsewhere.
    pub fn apply(&self, w: &Matrix) -> Result<Matrix> {
        expect_shape("mask", (self.rows, self.cols), (w.rows(), w.cols()))?;
        fn select<T: Element>(mask: &Mask, data: &[T]) -> Elements {
            let kept = |(i, &x)| if mask.get(i / mask.cols, i % mask.cols) { x } else { T::zeroed() };
            T::wrap(data.iter().enumerate().map(kept).collect())
        }
        Matrix::new(self.rows, self.cols, each_dtype!(w.elements(), v => select(self, v)))
    }
}

/// A mask that 2:4 can hold at vector length V: over each block of V rows, the union keeps at most two positions of
/// every group of four columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask24 {
    mask: Mask,
    vector: VectorLen,
}

impl Mask24 {
    /// Checks that `mask` is 2:4 at vector length `vector`; the error names the first over-full row and group.
    pub fn new(mask: Mask, vector: VectorLen) -> Result<Self> {
        let v = vector.get();
        let per_row = mask.words_per_row().max(1);
        for (block, rows) in mask.words.chunks(v.saturating_mul(per_row)).enumerate() {
            for word in 0..per_row {
                let union = rows.iter().skip(word).step_by(per_row).fold(0, |bits, word| bits | word);
                if let over @ 1.. = groups::over_full(union) {
                    let at = over.trailing_zeros();
                    let count = (union >> at & 0xf).count_ones() as usize;
                    return Err(Error::over_full(block * v, 8 * word + at as usize / 4, count));
                }
            }
        }
        Ok(Self { mask, vector })
    }

    /// The same mask without what `within` leaves out. An error if shapes differ.
    pub fn within(mut self, within: Option<&Mask>) -> Result<Self> {
        if let Some(within) = within {
            expect_shape("mask", (within.rows, within.cols), (self.mask.rows, self.mask.cols))?;
            self.mask.words.iter_mut().zip(&within.words).for_each(|(word, within)| *word &= within);
        }
        Ok(self)
    }

    /// The mask itself.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    /// The mask alone, once it no longer matters that it is 2:4.
    pub fn into_mask(self) -> Mask {
        self.mask
    }

    /// The vector length at which it was checked.
    pub fn vector(&self) -> VectorLen {
        self.vector
    }

    /// The mask as 2:4 codes, one nibble per row and group, eight to a word, laid out like [`Mask::words`] and coded as
    /// in [`Sparse24::meta`](crate::Sparse24::meta) at V = 1. An error names a group that keeps fewer than two
    /// positions: a code always has two. (Positions past the last column count as kept where that helps; the weights
    /// there are padding.)
    pub(crate) fn codes(&self) -> Result<Vec<u32>> {
        let mask = &self.mask;
        let mut words = vec![0; mask.words.len()];
        for row in 0..if words.is_empty() { 0 } else { mask.rows } {
            for group in 0..mask.cols.div_ceil(4) {
                let bits = mask.group(row, group);
                let beyond = (4 * group..4 * group + 4).filter(|&col| col >= mask.cols).map(|col| col % 4);
                let mut kept: Vec<_> = (0..4).filter(|i| bits >> i & 1 == 1).collect();
                kept.extend(beyond);
                kept.truncate(2);
                let [first, second] = kept[..] else {
                    return Err(Error::invalid(format!(
                        "row {row}, group {group}: {} positions are kept, a 2:4 code holds exactly 2",
                        bits.count_ones()
                    )));
                };
                words[row * mask.words_per_row() + group / 8] |= ((first | second << 2) as u32) << (4 * (group % 8));
            }
        }
        Ok(words)
    }
}
