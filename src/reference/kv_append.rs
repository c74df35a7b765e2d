//! The oracle of keys and values that are put into a cache.
//!
//! # The bound
//! What is copied: φ; then the store. All other rows are as they were, to the bit.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2, s};

use super::{Expectation, Expected, bounded, phi, stored};
use crate::error::{Error, Result, expect_len, expect_shape};
use crate::matrix::Matrix;

/// For each row of a cache of `capacity` rows for each sequence, the row of a new token that it gets, if it gets one:
/// `lengths[b]` of the `seq` rows of sequence `b` are new tokens, and go behind the `past[b]` that are there.
fn sources(capacity: usize, lengths: &[u32], past: &[u32], seq: usize) -> Vec<Option<usize>> {
    let mut sources = vec![None; capacity * lengths.len()];
    for (sequence, (&length, &past)) in lengths.iter().zip(past).enumerate() {
        for i in 0..seq.min(length as usize) {
            let row = past as usize + i;
            if row < capacity {
                sources[sequence * capacity + row] = Some(sequence * seq + i);
            }
        }
    }
    sources
}

/// What becomes of a `cache` with as many rows for each of the sequences: row `past[b] + i` of sequence `b` has the
/// last features of token `i` in `qkv`, for `i < lengths[b]`, as far as there are such rows.
///
/// # Panics
/// If the cache has not as many rows for each sequence, or more columns than `qkv`, or this has fewer rows than `seq`
/// for each.
pub fn exact(
    qkv: ArrayView2<'_, f64>,
    cache: ArrayView2<'_, f64>,
    (lengths, past): (&[u32], &[u32]),
    seq: usize,
) -> Array2<f64> {
    assert!(
        cache.nrows().is_multiple_of(lengths.len().max(1)),
        "{} rows for {} sequences",
        cache.nrows(),
        lengths.len()
    );
    let mut after = cache.to_owned();
    let from = qkv.ncols() - cache.ncols();
    let sources = sources(cache.nrows() / lengths.len().max(1), lengths, past, seq);
    for (mut row, source) in after.rows_mut().into_iter().zip(sources) {
        if let Some(token) = source {
            row.assign(&qkv.slice(s![token, from..]));
        }
    }
    after
}

/// The same with its bounds. `cache` is what is there before. An error if shapes do not fit.
///
/// ```
/// use sparse24::{DType, Matrix, reference::kv_append};
/// let qkv = Matrix::from_f32(1, 3, &[9.0, 1.0, 2.0])?;
/// let cache = Matrix::from_f32(3, 2, &[5.0, 6.0, 7.0, 8.0, f32::NAN, 0.0])?;
/// let want = kv_append::expect(&qkv, &cache, (&[1], &[1]), 1)?;
/// assert!(want.verify(&Matrix::from_f32(3, 2, &[5.0, 6.0, 1.0, 2.0, f32::NAN, 0.0])?)?.passed());
/// assert!(!want.verify(&Matrix::from_f32(3, 2, &[5.0, 6.1, 1.0, 2.0, f32::NAN, 0.0])?)?.passed());
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(qkv: &Matrix, cache: &Matrix, (lengths, past): (&[u32], &[u32]), seq: usize) -> Result<Expectation> {
    let (batch, output) = (lengths.len(), cache.dtype());
    expect_len("past", past.len(), batch)?;
    expect_shape("qkv", (qkv.rows(), qkv.cols()), (batch * seq, qkv.cols()))?;
    if cache.cols() > qkv.cols() || !cache.rows().is_multiple_of(batch.max(1)) {
        let shapes = ([cache.rows(), cache.cols()], [qkv.rows(), qkv.cols()]);
        return Err(Error::invalid(format!(
            "a cache of {:?} for tokens of {:?}, {batch} sequences",
            shapes.0, shapes.1
        )));
    }
    let sources = sources(cache.rows() / batch.max(1), lengths, past, seq);
    let mut all = Expectation::new(cache.rows(), cache.cols(), output);
    for (row, source) in sources.into_iter().enumerate() {
        for c in 0..cache.cols() {
            all.elements.push(match source {
                None => Expected { value: f64::from(cache.get(row, c)), bound: 0.0, output },
                Some(token) => {
                    let x = f64::from(qkv.get(token, qkv.cols() - cache.cols() + c));
                    let error = bounded(x, phi(x, qkv.dtype()));
                    stored(x, error, !error.is_finite(), output)
                }
            });
        }
    }
    Ok(all)
}
