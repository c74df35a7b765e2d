//! The oracle of attention to a cache.
//!
//! # The bound
//! That of [attention](super::attention), with the rows that a query sees for its keys.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2, s};

use super::attention::Weights;
use super::{Expectation, Expected, stored};
use crate::error::{Error, Result, expect_len, expect_shape};
use crate::matrix::{DType, Matrix};

/// Sequences of new tokens: `seq` rows for each, so many real, behind so many that are past.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    /// Number of new tokens of each sequence.
    pub lengths: &'a [u32],
    /// Number of tokens of each sequence before them.
    pub past: &'a [u32],
    /// Rows of each sequence.
    pub seq: usize,
}

impl NewTokens<'_> {
    /// Each real token: its row, its sequence, and how many of `capacity` rows it sees.
    fn rows(&self, capacity: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let &Self { lengths, past, seq } = self;
        lengths.iter().zip(past).enumerate().flat_map(move |(sequence, (&length, &past))| {
            let tokens = 0..seq.min(length as usize);
            tokens.map(move |i| (sequence * seq + i, sequence, capacity.min(past as usize + i + 1)))
        })
    }
}

/// Features of a head of `qkv`, which has so many heads, and of keys.
fn head_dim(features: usize, (heads, kv_heads): (usize, usize)) -> Option<usize> {
    let all = heads + 2 * kv_heads;
    let whole = kv_heads > 0 && heads.is_multiple_of(kv_heads) && features.is_multiple_of(all);
    whole.then(|| features / all)
}

/// Attention of the Q of `qkv`, whose rows are Q | K | V, to a `cache` of rows K | V, as many for each sequence: query
/// `i` of a sequence sees its first `past + i + 1` rows. What other rows hold does not matter. Rows of `qkv` at or past
/// a sequence's length become zeros.
///
/// # Panics
/// If features are no whole number for each head, or the cache has not as many rows for each sequence.
pub fn exact(
    qkv: ArrayView2<'_, f64>,
    cache: ArrayView2<'_, f64>,
    tokens: NewTokens<'_>,
    (heads, kv_heads): (usize, usize),
) -> Array2<f64> {
    let h = head_dim(qkv.ncols(), (heads, kv_heads));
    let h = h.unwrap_or_else(|| panic!("{} features for {heads} heads, {kv_heads} of keys", qkv.ncols()));
    assert_eq!(cache.ncols(), 2 * kv_heads * h, "features of K and V");
    let capacity = cache.nrows() / tokens.lengths.len().max(1);
    let mut y = Array2::zeros((qkv.nrows(), heads * h));
    for (row, sequence, seen) in tokens.rows(capacity) {
        let rows = sequence * capacity..sequence * capacity + seen;
        for head in 0..heads {
            let first = head * kv_heads / heads * h;
            let k = cache.slice(s![rows.clone(), first..first + h]);
            let v = cache.slice(s![rows.clone(), kv_heads * h + first..kv_heads * h + first + h]);
            let scores = k.dot(&qkv.slice(s![row, head * h..(head + 1) * h])) / (h as f64).sqrt();
            let most = scores.fold(f64::NEG_INFINITY, |most, &s| most.max(s));
            let weights = scores.mapv(|s| (s - most).exp());
            y.slice_mut(s![row, head * h..(head + 1) * h]).assign(&(weights.dot(&v) / weights.sum()));
        }
    }
    y
}

/// The same with its bounds. An error if shapes do not fit.
///
/// ```
/// use sparse24::reference::cached_attention::{self, NewTokens};
/// use sparse24::{DType, Matrix};
/// // Equal scores: the mean of the values of the two rows that are seen.
/// let qkv = Matrix::from_f32(1, 3, &[0.0, 7.0, 7.0])?;
/// let cache = Matrix::from_f32(3, 2, &[1.0, 2.0, 1.0, 4.0, f32::NAN, f32::NAN])?;
/// let tokens = NewTokens { lengths: &[1], past: &[1], seq: 1 };
/// let want = cached_attention::expect(&qkv, &cache, tokens, (1, 1), DType::F32)?;
/// assert_eq!(want.element(0, 0).value, 3.0);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(
    qkv: &Matrix,
    cache: &Matrix,
    tokens: NewTokens<'_>,
    (heads, kv_heads): (usize, usize),
    output: DType,
) -> Result<Expectation> {
    let NewTokens { lengths, past, seq } = tokens;
    let batch = lengths.len();
    let Some(h) = head_dim(qkv.cols(), (heads, kv_heads)) else {
        let features = qkv.cols();
        return Err(Error::invalid(format!("{features} features for {heads} heads, {kv_heads} of them of keys")));
    };
    expect_len("past", past.len(), batch)?;
    expect_shape("qkv", (qkv.rows(), qkv.cols()), (batch * seq, qkv.cols()))?;
    let capacity = cache.rows() / batch.max(1);
    expect_shape("cache", (cache.rows(), cache.cols()), (capacity * batch, 2 * kv_heads * h))?;
    let wide = |m: &Matrix| m.to_array().mapv(f64::from);
    let y = exact(wide(qkv).view(), wide(cache).view(), tokens, (heads, kv_heads));
    let mut all = Expectation::new(qkv.rows(), heads * h, output);
    all.elements.resize(qkv.rows() * heads * h, Expected { value: 0.0, bound: 0.0, output });
    for (row, sequence, seen) in tokens.rows(capacity) {
        for head in 0..heads {
            let first = head * kv_heads / heads * h;
            let part = |first: usize| -> Vec<Vec<f64>> {
                let of = |r: usize| (0..h).map(|c| f64::from(cache.get(r, first + c))).collect();
                (sequence * capacity..sequence * capacity + seen).map(of).collect()
            };
            let q: Vec<f64> = (0..h).map(|c| f64::from(qkv.get(row, head * h + c))).collect();
            let (k, v) = (part(first), part(kv_heads * h + first));
            let weights = Weights::of(&q, &k, |_| None, (qkv.dtype(), cache.dtype()), DType::F32);
            for c in 0..h {
                let value = y[[row, head * h + c]];
                let error = weights.error(value, v.iter().map(|v| v[c]), cache.dtype());
                all.elements[row * heads * h + head * h + c] = stored(value, error, !error.is_finite(), output);
            }
        }
    }
    Ok(all)
}
