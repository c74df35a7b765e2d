//! Hidden states (or embeddings) of many texts on the host, as bf16, so that none is computed twice.
//!
//! Rounding to bf16 adds a millionth of a hidden state's squared length to a loss that is rarely below a hundredth, and
//! no hidden state is too large for it. Invariant: the numbers of a text are those of the first batch that had it, and
//! so follow from the order of texts alone.

use half::bf16;

use crate::error::{Error, Result};
use crate::matrix::Matrix;

/// The rows of one value, for every text.
#[derive(Debug)]
pub(super) struct HiddenStateCache {
    cols: usize,
    /// The first row of each text, and the end.
    first: Vec<usize>,
    /// Bits of the numbers, as zeros take no memory before they are written.
    numbers: Vec<u16>,
    has: Vec<bool>,
}

impl HiddenStateCache {
    /// Room for so many rows of each text.
    pub(super) fn new(rows: impl Iterator<Item = usize>, cols: usize) -> Self {
        let mut first = vec![0];
        let mut end = 0;
        for rows in rows {
            end += rows;
            first.push(end);
        }
        Self { cols, numbers: vec![0; end * cols], has: vec![false; first.len() - 1], first }
    }

    /// Bytes that so many rows take.
    pub(super) fn bytes_of(rows: usize, cols: usize) -> u64 {
        2 * (rows * cols) as u64
    }

    /// Bytes that it takes once it has all texts.
    pub(super) fn bytes(&self) -> u64 {
        size_of_val(self.numbers.as_slice()) as u64
    }

    /// Whether there is room for a text.
    pub(super) fn has_room(&self, text: usize) -> bool {
        self.first[text] < self.first[text + 1]
    }

    /// Whether it has the rows of a text.
    pub(super) fn has(&self, text: usize) -> bool {
        self.has[text]
    }

    /// Takes the rows of those texts that it has none of from a batch, in which each has `each` rows, padding last.
    pub(super) fn take(&mut self, texts: &[usize], batch: &Matrix) {
        let each = batch.rows() / texts.len().max(1) * self.cols;
        let from = batch.elements().to_f32();
        for (&text, from) in texts.iter().zip(from.chunks_exact(each)) {
            if !std::mem::replace(&mut self.has[text], true) {
                let to = &mut self.numbers[self.first[text] * self.cols..self.first[text + 1] * self.cols];
                for (to, &from) in to.iter_mut().zip(from) {
                    *to = bf16::from_f32(from).to_bits();
                }
            }
        }
    }

    /// A batch of texts of `each` rows, of which zeros are padding.
    pub(super) fn batch(&self, texts: &[usize], each: usize) -> Result<Matrix> {
        let mut numbers = vec![0.0; texts.len() * each * self.cols];
        for (&text, to) in texts.iter().zip(numbers.chunks_exact_mut((each * self.cols).max(1))) {
            if !self.has[text] {
                return Err(Error::invalid("a text's hidden states are not cached"));
            }
            let from = &self.numbers[self.first[text] * self.cols..self.first[text + 1] * self.cols];
            for (to, &from) in to.iter_mut().zip(from) {
                *to = bf16::from_bits(from).to_f32();
            }
        }
        Matrix::from_f32(texts.len() * each, self.cols, &numbers)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn what_was_taken_comes_back_without_its_padding() {
        let mut kept = HiddenStateCache::new([2, 1, 3].into_iter(), 2);
        // Two texts of a batch of three rows each; what is beyond a text's rows is padding.
        let numbers: Vec<f32> = (1..=12).map(|x| x as f32).collect();
        kept.take(&[1, 0], &Matrix::from_f32(6, 2, &numbers).unwrap());
        assert!(kept.has(0) && kept.has(1) && !kept.has(2) && kept.batch(&[2], 3).is_err());
        let back = kept.batch(&[0, 1], 2).unwrap().elements().to_f32();
        assert_eq!(back, [7.0, 8.0, 9.0, 10.0, 1.0, 2.0, 0.0, 0.0]);
        // The first batch decides.
        kept.take(&[0], &Matrix::from_f32(2, 2, &[0.0; 4]).unwrap());
        assert_eq!(kept.batch(&[0], 2).unwrap().elements().to_f32(), [7.0, 8.0, 9.0, 10.0]);
    }
}
