//! How weights lie in GPU memory: what every kernel of an operation reads, whatever its tile.
//!
//! Weights are cut into *panels* of 32 rows, and a panel into 16-byte *units*: 4 f32 or 8 f16 along k of one row. Unit
//! `u` of row `r` of panel `p` is at `(p * units + u) * 32 + r`. So 32 neighbouring threads that own a row each read
//! 512 consecutive bytes, and a block of four rows is 64. Rows are padded with zeros to a multiple of 32 columns (k
//! before compression), and the last panel with rows of zeros, so that no kernel has a residue along k. The 32-bit
//! words of mask bits or 2:4 codes, one for 32 columns and V rows, lie in the same order: for each panel and word, the
//! panel's rows.
//!
//! Matrices larger than a binding are cut into [`pieces`] of whole panels; each is a buffer and a dispatch of its own.
//! Invariant: a piece's buffers have the sizes that [`value_bytes`] and [`word_count`] say.

use std::ops::Range;

use crate::matrix::{DType, Elements};
use crate::problem::Op;

/// Rows of a panel.
pub(crate) const PANEL: usize = 32;

/// Columns to which rows are padded: a word of mask bits or codes.
pub(crate) const WORD: usize = 32;

/// Columns of the matrix that is stored: all of them, or the kept half, of `k` columns padded to whole words.
fn stored_columns(op: Op, k: usize) -> usize {
    let padded = k.next_multiple_of(WORD);
    match op {
        Op::Dense | Op::Masked | Op::Masked24 => padded,
        Op::Sparse24(_) => padded / 2,
    }
}

/// Units of f32 in a stored row.
pub(crate) fn units(op: Op, k: usize) -> usize {
    stored_columns(op, k) / 4
}

/// Rows of W that share a word.
fn rows_per_word(op: Op) -> usize {
    op.vector().map_or(1, crate::mask::VectorLen::get)
}

/// Bytes of the weights (all, or the kept ones) of `m` rows.
pub(crate) fn value_bytes(op: Op, m: usize, k: usize, storage: DType) -> u64 {
    m.next_multiple_of(PANEL) as u64 * stored_columns(op, k) as u64 * storage.bytes() as u64
}

/// Words of mask bits or codes of `m` rows; 0 for dense weights.
pub(crate) fn word_count(op: Op, m: usize, k: usize) -> u64 {
    match op {
        Op::Dense => 0,
        _ => m.next_multiple_of(PANEL).div_ceil(rows_per_word(op)) as u64 * k.div_ceil(WORD) as u64,
    }
}

/// The row ranges into which weights are cut so that each fits one binding; one range unless they are too large. `None`
/// if not even a few rows fit.
pub(crate) fn pieces(op: Op, m: usize, k: usize, storage: DType, binding_bytes: u64) -> Option<Vec<Range<usize>>> {
    // Whole tiles of the largest kernel and whole patterns, so that no piece but the last has a residue.
    const STEP: usize = 128;
    let largest = |rows| value_bytes(op, rows, k, storage).max(4 * word_count(op, rows, k));
    if largest(m) <= binding_bytes {
        return Some(std::iter::once(0..m).collect());
    }
    let rows = usize::try_from(binding_bytes / largest(STEP).max(1)).ok()? * STEP;
    (rows > 0).then(|| (0..m).step_by(rows).map(|start| start..m.min(start + rows)).collect())
}

/// The rows of a row-major matrix of `cols` columns in panel order. `width` is the stored width, at least `cols`.
fn panels<T: Copy + bytemuck::Pod>(data: &[T], cols: usize, width: usize, rows: Range<usize>) -> Vec<u8> {
    let unit = 16 / size_of::<T>();
    let units = width / unit;
    let mut out = vec![T::zeroed(); rows.len().next_multiple_of(PANEL) * width];
    for (at, row) in rows.enumerate() {
        let (panel, lane) = (at / PANEL, at % PANEL);
        for (u, chunk) in data[row * cols..(row + 1) * cols].chunks(unit).enumerate() {
            let start = ((panel * units + u) * PANEL + lane) * unit;
            out[start..start + chunk.len()].copy_from_slice(chunk);
        }
    }
    bytemuck::cast_slice(&out).to_vec()
}

/// Weights (all, or the kept ones, `cols` to a row) of some rows, as a GPU reads them. bf16 has no kernels and must
/// have been widened.
pub(crate) fn values(op: Op, elements: &Elements, cols: usize, k: usize, rows: Range<usize>) -> Vec<u8> {
    let width = stored_columns(op, k);
    match elements {
        Elements::F32(data) => panels(data, cols, width, rows),
        Elements::F16(data) => panels(data, cols, width, rows),
        Elements::Bf16(data) => panels(data, cols, width, rows),
    }
}

/// Words of mask bits or codes of some rows of W, which start at a multiple of V, as a GPU reads them.
pub(crate) fn words(op: Op, data: &[u32], k: usize, rows: Range<usize>) -> Vec<u32> {
    let share = rows_per_word(op);
    let words = k.div_ceil(WORD);
    // Rows of words in a panel: at least one, where a pattern spans several panels.
    let lanes = (PANEL / share).max(1);
    let mut out = vec![0; word_count(op, rows.len(), k) as usize];
    for (at, row) in (rows.start / share..rows.end.div_ceil(share)).enumerate() {
        for (w, &word) in data[row * words..(row + 1) * words].iter().enumerate() {
            out[(at / lanes * words + w) * lanes + at % lanes] = word;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::mask::VectorLen;

    #[test]
    fn units_of_a_panel_interleave_its_rows() {
        // 33 rows of 5 columns, each element its row and column.
        let data: Vec<f32> = (0..33 * 5).map(|i| (i / 5 * 100 + i % 5) as f32).collect();
        let bytes = values(Op::Dense, &Elements::F32(data), 5, 5, 0..33);
        let out: &[f32] = bytemuck::cast_slice(&bytes);
        assert_eq!(bytes.len() as u64, value_bytes(Op::Dense, 33, 5, DType::F32));
        assert_eq!(out[..4], [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(out[4..8], [100.0, 101.0, 102.0, 103.0]);
        // The second unit of row 0 comes after the first units of all 32 rows.
        assert_eq!(out[128..132], [4.0, 0.0, 0.0, 0.0]);
        // Row 32 starts the second panel: 8 units of 32 rows of 4 further.
        assert_eq!(out[1024..1028], [3200.0, 3201.0, 3202.0, 3203.0]);
        assert!(out[1028..1152].iter().all(|&x| x == 0.0));
    }

    #[test]
    fn words_lie_in_the_order_of_their_rows() {
        // Two words of 40 columns; 64 rows at V = 16: two rows of words per panel.
        let op = Op::Sparse24(VectorLen::new(16).unwrap());
        let out = words(op, &[10, 11, 20, 21, 30, 31, 40, 41], 40, 0..64);
        assert_eq!(out, [10, 20, 11, 21, 30, 40, 31, 41]);
        assert_eq!(words(op, &[10, 11, 20, 21, 30, 31, 40, 41], 40, 32..64), [30, 40, 31, 41]);
        // At V = 64 one row of words serves two panels.
        let op = Op::Sparse24(VectorLen::new(64).unwrap());
        assert_eq!(words(op, &[1, 2, 3, 4], 40, 0..128), [1, 2, 3, 4]);
        assert_eq!(word_count(op, 65, 40), 4);
    }

    #[test]
    fn pieces_cover_the_rows_and_fit() {
        let op = Op::Sparse24(VectorLen::new(128).unwrap());
        assert_eq!(pieces(op, 1000, 64, DType::F32, 1 << 20).unwrap(), vec![0..1000]);
        let pieces = pieces(op, 1000, 64, DType::F32, 40_000).unwrap();
        assert_eq!(pieces, [0..256, 256..512, 512..768, 768..1000]);
        assert!(super::pieces(op, 1000, 64, DType::F32, 1000).is_none());
    }
}
