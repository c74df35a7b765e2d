//! The oracle of attention.
//!
//! # The bound
//! For h features of a head and n keys, with exact scores s and their maximum M, weights w ∝ exp(s − M).
//! 1. A score is off by Δ = γ of h + 4 times scale·Σ|q||k| (the sum, the scaling of one factor or of the sum, and the
//!    scale's own rounding), plus what flushed operands and products lose.
//! 2. Whatever maximum a device subtracts cancels in the quotient. The arguments of all exponentials that make up a
//!    weight (one, and one for each block of keys whose maximum is larger than those before, at most T = ⌈n/16⌉ + 1:
//!    kernels take 16 keys or more at a time) add up to at most X = M − s + 2·max Δ. Each argument is rounded, each
//!    exponential is off by (6 + 4·|x|)·u, and each product by u: a weight's relative error is at most θ = exp(Δ + 5u·X
//!    + 7u·T) − 1.
//! 3. y = Σwv is a weighted mean, so errors common to all weights do not matter: with weights w(1 + θ) the quotient is
//!    off by at most Σwθ|v − y|, plus A = γ of n + 2T + 2 for both sums, over 1 − Σwθ − A·Σw(1 + θ). Plus 6u·|y| for
//!    the division, Σwφ(v), and n·(T + 2)·2⁻¹²⁶·(1 + max|v|) for weights and products that are flushed.
//!
//! 4. Kernels of cooperative matrices round the weights of the numerator, not those of their sum, to f16: one unit in
//!    the last place, 2·u₁₆·Σw(1 + θ)|v|, and n·2⁻²⁶·(1 + max|v|) for those that are flushed, which the kernels scale
//!    by 2¹² before they round them.
//!
//! 5. A bias b that is added to a score costs one rounding of the sum, and φ(b): Δ(1 + u) + u·|s| + φ + 2⁻¹²⁶.
//! 6. Keys that a query does not see have the weight zero, and are none of the n.
//!
//! Then the store, as in [`super`]. Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2, s};

use super::{Expectation, Expected, FLUSH, U, gamma, is_subnormal, limits, phi, stored};
use crate::error::{Error, Result, expect_shape};
use crate::matrix::{DType, Matrix};

/// What an attention may do beside its plain form.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionOptions<'a> {
    /// Heads of keys and values, of which each is shared by as many neighbouring heads; `None` for as many as heads.
    pub kv_heads: Option<usize>,
    /// Whether a query sees its own key and those before it alone.
    pub causal: bool,
    /// `heads x (2·P - 1)`: query `i` of head `h` adds `bias[h][j - i + P - 1]` to its scaled score with key `j`.
    pub bias: Option<ArrayView2<'a, f64>>,
}

impl AttentionOptions<'_> {
    /// What is added to the score of a query and a key.
    fn bias_of(&self, head: usize, query: usize, key: usize) -> Option<f64> {
        self.bias.map(|bias| bias[[head, key + bias.ncols() / 2 - query]])
    }
}

/// First features of Q, K and V of a head, and features of a head, of rows of so many features.
fn parts(features: usize, heads: usize, head: usize, kv_heads: usize) -> ([usize; 3], usize) {
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{kv_heads} heads of keys for {heads} heads");
    let h = features / (heads + 2 * kv_heads);
    assert!(features == (heads + 2 * kv_heads) * h, "{features} features for {heads} heads");
    let shared = head * kv_heads / heads;
    ([head, heads + shared, heads + kv_heads + shared].map(|at| at * h), h)
}

/// Attention over `qkv`, whose rows are Q | K | V: `lengths.len()` sequences of `seq` rows. Rows at or past a
/// sequence's length are zero, and what they hold as keys and values does not matter.
///
/// # Panics
/// If `qkv` has fewer rows than that, or features that are no whole number for each head, or the bias has not all
/// distances.
pub fn exact(
    qkv: ArrayView2<'_, f64>,
    lengths: &[u32],
    (seq, heads): (usize, usize),
    options: &AttentionOptions<'_>,
) -> Array2<f64> {
    let kv_heads = options.kv_heads.unwrap_or(heads);
    let mut y = Array2::zeros((qkv.nrows(), parts(qkv.ncols(), heads, 0, kv_heads).1 * heads));
    for (sequence, &length) in lengths.iter().enumerate() {
        let rows = sequence * seq..sequence * seq + seq.min(length as usize);
        for head in 0..heads {
            let (first, h) = parts(qkv.ncols(), heads, head, kv_heads);
            let [q, k, v] = first.map(|at| qkv.slice(s![rows.clone(), at..at + h]));
            let mut weights = q.dot(&k.t()) / (h as f64).sqrt();
            for ((query, key), score) in weights.indexed_iter_mut() {
                *score += options.bias_of(head, query, key).unwrap_or(0.0);
            }
            let mut own = y.slice_mut(s![rows.clone(), head * h..(head + 1) * h]);
            for (query, (scores, mut y)) in weights.rows_mut().into_iter().zip(own.rows_mut()).enumerate() {
                let seen = if options.causal { query + 1 } else { scores.len() };
                let mut scores = scores.slice_move(s![..seen]);
                let most = scores.fold(f64::NEG_INFINITY, |most, &s| most.max(s));
                scores.mapv_inplace(|s| (s - most).exp());
                let total = scores.sum();
                y.assign(&(scores.dot(&v.slice(s![..seen, ..])) / total));
            }
        }
    }
    y
}

/// The same with its bounds. `weights` is the type to which a kernel may round the weights of a sum: f32, or f16 for
/// cooperative matrices.
///
/// ```
/// use sparse24::{DType, Matrix, reference::attention};
/// // Two real tokens with equal scores, and padding: the mean of the two values.
/// let qkv = Matrix::from_f32(3, 3, &[0.0, 1.0, 2.0, 0.0, 1.0, 4.0, 9.0, 9.0, f32::NAN])?;
/// let want = attention::expect(&qkv, &[2], (3, 1), &Default::default(), DType::F32, DType::F32)?;
/// assert_eq!([0, 1, 2].map(|t| want.element(t, 0).value), [3.0, 3.0, 0.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(
    qkv: &Matrix,
    lengths: &[u32],
    (seq, heads): (usize, usize),
    options: &AttentionOptions<'_>,
    weights: DType,
    output: DType,
) -> Result<Expectation> {
    let kv_heads = options.kv_heads.unwrap_or(heads);
    if heads == 0
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || !qkv.cols().is_multiple_of(heads + 2 * kv_heads)
    {
        let features = qkv.cols();
        return Err(Error::Invalid(format!("{features} features for {heads} heads, {kv_heads} of them of keys")));
    }
    expect_shape("qkv", (qkv.rows(), qkv.cols()), (lengths.len() * seq, qkv.cols()))?;
    let y = exact(qkv.to_array().mapv(f64::from).view(), lengths, (seq, heads), options);
    let width = y.ncols();
    let mut all = Expectation::new(qkv.rows(), width, output);
    let zero = Expected { value: 0.0, bound: 0.0, output };
    all.elements.resize(qkv.rows() * width, zero);
    for (sequence, &length) in lengths.iter().enumerate() {
        let n = seq.min(length as usize);
        for head in 0..heads {
            let (first, h) = parts(qkv.cols(), heads, head, kv_heads);
            // The features of Q, K or V of the head, token by token.
            let part = |first: usize| -> Vec<Vec<f64>> {
                let row = |t: usize| (0..h).map(move |c| (sequence * seq + t, first + c));
                (0..n).map(|t| row(t).map(|(r, c)| f64::from(qkv.get(r, c))).collect()).collect()
            };
            let [q, k, v] = first.map(part);
            for (t, q) in q.iter().enumerate() {
                let seen = if options.causal { t + 1 } else { n };
                let bias = |key: usize| options.bias_of(head, t, key);
                let shares = Weights::of(q, &k[..seen], bias, qkv.dtype(), weights);
                let row0 = (sequence * seq + t) * width + head * h;
                for c in 0..h {
                    let value = y[[sequence * seq + t, head * h + c]];
                    let error = shares.error(value, v[..seen].iter().map(|v| v[c]), qkv.dtype());
                    all.elements[row0 + c] = stored(value, error, !error.is_finite(), output);
                }
            }
        }
    }
    Ok(all)
}

/// What one query makes of the keys.
struct Weights {
    /// Share of each key, and the largest relative error of it.
    keys: Vec<(f64, f64)>,
    /// A of the module's documentation.
    sums: f64,
    /// Relative error of a weight that is rounded before it is multiplied.
    rounding: f64,
    /// What weights and products lose that are flushed.
    flushed: f64,
    /// Whether the scores fit f32.
    decided: bool,
}

impl Weights {
    fn of(q: &[f64], keys: &[Vec<f64>], bias: impl Fn(usize) -> Option<f64>, storage: DType, rounded: DType) -> Self {
        let (h, n) = (q.len(), keys.len());
        let scale = 1.0 / (h as f64).sqrt();
        let growth = gamma(h + 4, U);
        let mut decided = true;
        let scores: Vec<(f64, f64)> = keys
            .iter()
            .enumerate()
            .map(|(key_index, k)| {
                let (mut dot, mut abs, mut subnormal, mut key) = (0.0, 0.0, 0.0, 0.0);
                for (&q, &k) in q.iter().zip(k) {
                    dot += q * k;
                    abs += (q * k).abs();
                    key += k.abs();
                    subnormal += if is_subnormal(q, storage) || is_subnormal(k, storage) { (q * k).abs() } else { 0.0 };
                }
                decided &= abs * (1.0 + growth) < f64::from(f32::MAX);
                let flushed = scale * subnormal + FLUSH * (2.0 * h as f64 + key);
                let (score, error) = (scale * dot, growth * scale * abs + (1.0 + growth) * flushed);
                bias(key_index).map_or((score, error), |b| {
                    let sum = score + b;
                    (sum, error * (1.0 + U) + U * sum.abs() + phi(b, DType::F32) + FLUSH)
                })
            })
            .collect();
        let most = scores.iter().fold(f64::NEG_INFINITY, |most, &(s, _)| most.max(s));
        let off = scores.iter().fold(0.0f64, |off, &(_, delta)| off.max(delta));
        let total: f64 = scores.iter().map(|(s, _)| (s - most).exp()).sum();
        let blocks = n.div_ceil(16) + 1;
        let shares = scores.iter().map(|&(s, delta)| {
            let exponent = delta + 5.0 * U * (most - s + 2.0 * off) + 7.0 * U * blocks as f64;
            // The second order of the products, which `exp` leaves out where factors are below one.
            ((s - most).exp() / total, (exponent * (1.0 + 1e-3)).exp_m1())
        });
        let (rounding, lost) = match rounded {
            DType::F32 => (0.0, FLUSH),
            // Either neighbour, as for stores.
            other => (2.0 * other.unit_roundoff(), limits(other).normal / 4096.0 + FLUSH),
        };
        Self {
            keys: shares.collect(),
            sums: gamma(n + 2 * blocks + 2, U),
            rounding,
            flushed: n as f64 * (lost + (blocks + 1) as f64 * FLUSH),
            decided,
        }
    }

    /// How far the weighted mean `y` of one feature's values may be off.
    fn error(&self, y: f64, values: impl Iterator<Item = f64>, storage: DType) -> f64 {
        let (mut spread, mut grown, mut grown_abs, mut shift, mut lost, mut largest) =
            (0.0, 0.0, 0.0, 0.0, 0.0, 0.0f64);
        for (&(w, theta), v) in self.keys.iter().zip(values) {
            spread += w * theta * (v - y).abs();
            shift += w * theta;
            grown += w * (1.0 + theta);
            grown_abs += w * (1.0 + theta) * v.abs();
            lost += w * phi(v, storage);
            largest = largest.max(v.abs());
        }
        let least = 1.0 - shift - self.sums * grown;
        let rounded = self.sums * (grown_abs + grown * y.abs()) + self.rounding * (1.0 + self.sums) * grown_abs;
        let quotient = (spread + rounded + self.flushed * (1.0 + largest)) / least;
        let error = quotient + 6.0 * U * (y.abs() + quotient) + lost + FLUSH;
        // Below one half the first order says little.
        if self.decided && least > 0.5 && error.is_finite() { error } else { f64::INFINITY }
    }
}
