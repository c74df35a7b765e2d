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
//! Then the store, as in [`super`].
//!
//! # The gradient's bound
//! With P the weights above, each within θ: after division by their sum P is within ε = (θ + Σwθ + A + 6u) / (1 − Σwθ −
//! A). dP, a sum of h products, is within γ of h of Σ|dy||v|; so is D, of Σ|dy||y|, plus what it is off because the
//! output it is computed from is not the exact one: that is known. Both errors, and a rounding of their difference,
//! make δ. Then dS = P∘(dP − D) is within e = P·(ε·|dP − D| + (1 + ε)·(δ + 2u·(|dP − D| + δ))), and each gradient, a
//! sum of N products a·b with an a that is off by e, within Σe|b| + γ of N + 5 of Σ(|a| + e)|b| (three for the scale,
//! one for what it multiplies, one for the sum's parts), and u of the sum with what it is added to. N is what there are
//! keys, or queries of all heads that share a key, or pairs of one distance.
//!
//! Invariant: no code is shared with the devices.

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
        return Err(Error::invalid(format!("{features} features for {heads} heads, {kv_heads} of them of keys")));
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
                let shares = Weights::of(q, &k[..seen], bias, (qkv.dtype(), qkv.dtype()), weights);
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

/// The exact gradients of attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionGradients {
    /// Of Q, K and V side by side.
    pub dqkv: Array2<f64>,
    /// Of the bias, if there is one.
    pub dbias: Option<Array2<f64>>,
}

/// Gradients of [`exact`] with the same operands, where `dy` is that of its result. Rows at or past a sequence's length
/// have the gradient zero.
///
/// # Panics
/// As [`exact`], or if `dy` has another shape than its result.
pub fn grad(
    qkv: ArrayView2<'_, f64>,
    lengths: &[u32],
    (seq, heads): (usize, usize),
    options: &AttentionOptions<'_>,
    dy: ArrayView2<'_, f64>,
) -> AttentionGradients {
    let kv_heads = options.kv_heads.unwrap_or(heads);
    let mut dqkv = Array2::zeros(qkv.raw_dim());
    let mut dbias = options.bias.map(|bias| Array2::zeros(bias.raw_dim()));
    for (sequence, &length) in lengths.iter().enumerate() {
        let row0 = sequence * seq;
        let rows = row0..row0 + seq.min(length as usize);
        for head in 0..heads {
            let (first, h) = parts(qkv.ncols(), heads, head, kv_heads);
            let [q, k, v] = first.map(|at| qkv.slice(s![rows.clone(), at..at + h]));
            let dy = dy.slice(s![rows.clone(), head * h..(head + 1) * h]);
            let scale = 1.0 / (h as f64).sqrt();
            for query in 0..rows.len() {
                let seen = if options.causal { query + 1 } else { rows.len() };
                let score = |key: usize| {
                    scale * q.row(query).dot(&k.row(key)) + options.bias_of(head, query, key).unwrap_or(0.0)
                };
                let scores: Vec<f64> = (0..seen).map(score).collect();
                let most = scores.iter().fold(f64::NEG_INFINITY, |most, &s| most.max(s));
                let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|s| (s - most).exp() / total).collect();
                let dp: Vec<f64> = (0..seen).map(|key| dy.row(query).dot(&v.row(key))).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                for key in 0..seen {
                    let ds = p[key] * (dp[key] - mean);
                    let [query_row, key_row] = [row0 + query, row0 + key];
                    for c in 0..h {
                        dqkv[[query_row, first[0] + c]] += scale * ds * k[[key, c]];
                        dqkv[[key_row, first[1] + c]] += scale * ds * q[[query, c]];
                        dqkv[[key_row, first[2] + c]] += p[key] * dy[[query, c]];
                    }
                    if let Some(dbias) = &mut dbias {
                        let middle = dbias.ncols() / 2;
                        dbias[[head, key + middle - query]] += ds;
                    }
                }
            }
        }
    }
    AttentionGradients { dqkv, dbias }
}

/// The same with its bounds, for f32 operands: that of Q, K and V, and that of the bias. `y` is the attention's output,
/// as the device has it; `before` are the gradients that these are added to, if they are added.
pub fn expect_grad(
    qkv: &Matrix,
    lengths: &[u32],
    (seq, heads): (usize, usize),
    options: &AttentionOptions<'_>,
    (y, dy): (&Matrix, &Matrix),
    before: [Option<&Matrix>; 2],
) -> Result<(Expectation, Option<Expectation>)> {
    expect_shape("dy", (dy.rows(), dy.cols()), (y.rows(), y.cols()))?;
    expect_shape("qkv", (qkv.rows(), qkv.cols()), (lengths.len() * seq, qkv.cols()))?;
    let kv_heads = options.kv_heads.unwrap_or(heads);
    let [x, y, dy] = [qkv, y, dy].map(|m| m.to_array().mapv(f64::from));
    let exact = grad(x.view(), lengths, (seq, heads), options, dy.view());
    // What each gradient is a sum of: errors of its terms, and their sizes.
    let mut own = (Array2::<f64>::zeros(x.raw_dim()), Array2::<f64>::zeros(x.raw_dim()));
    let mut bias = exact.dbias.as_ref().map(|dbias| (Array2::zeros(dbias.raw_dim()), Array2::zeros(dbias.raw_dim())));
    for (sequence, &length) in lengths.iter().enumerate() {
        let (row0, n) = (sequence * seq, seq.min(length as usize));
        for head in 0..heads {
            let (first, h) = parts(x.ncols(), heads, head, kv_heads);
            let scale = 1.0 / (h as f64).sqrt();
            let of = |t: usize, at: usize| x.slice(s![row0 + t, at..at + h]).to_vec();
            let keys: Vec<Vec<f64>> = (0..n).map(|t| of(t, first[1])).collect();
            for query in 0..n {
                let (seen, row) = (if options.causal { query + 1 } else { n }, row0 + query);
                let bias_of = |key: usize| options.bias_of(head, query, key);
                let types = (DType::F32, DType::F32);
                let weights = Weights::of(&of(query, first[0]), &keys[..seen], bias_of, types, DType::F32);
                let shift: f64 = weights.keys.iter().map(|(w, theta)| w * theta).sum();
                let least = 1.0 - shift - weights.sums;
                let own_features = s![row, head * h..(head + 1) * h];
                let (dy, y) = (dy.slice(own_features), y.slice(own_features));
                let growth = gamma(h, U);
                // A sum of products with dY, and its error.
                let product = |other: &dyn Fn(usize) -> f64| {
                    let terms = (0..h).map(|c| dy[c] * other(c));
                    let (sum, abs) = terms.fold((0.0, 0.0), |(sum, abs), x| (sum + x, abs + f64::abs(x)));
                    (sum, growth * abs + 2.0 * h as f64 * FLUSH)
                };
                let dp: Vec<(f64, f64)> = (0..seen).map(|key| product(&|c| x[[row0 + key, first[2] + c]])).collect();
                let mean: f64 = weights.keys.iter().zip(&dp).map(|((w, _), (dp, _))| w * dp).sum();
                let (given, rounded) = product(&|c| y[c]);
                let mean_error = rounded + (given - mean).abs();
                for (key, (&(w, theta), (dp, dp_error))) in weights.keys.iter().zip(dp).enumerate() {
                    let epsilon = if weights.decided && least > 0.5 {
                        (theta + shift + weights.sums + 6.0 * U) / least
                    } else {
                        f64::INFINITY
                    };
                    let difference = (dp - mean).abs();
                    let delta = dp_error + mean_error;
                    let delta = delta + 2.0 * U * (difference + delta);
                    let (ds, e) = (w * difference, w * (epsilon * difference + (1.0 + epsilon) * delta) + FLUSH);
                    for c in 0..h {
                        let mut add = |at: (usize, usize), a: f64, e: f64, b: f64| {
                            own.0[at] += e * b.abs() + FLUSH * (1.0 + b.abs());
                            own.1[at] += (a + e) * b.abs();
                        };
                        add((row, first[0] + c), scale * ds, scale * e, x[[row0 + key, first[1] + c]]);
                        add((row0 + key, first[1] + c), scale * ds, scale * e, x[[row, first[0] + c]]);
                        add((row0 + key, first[2] + c), w, w * epsilon + FLUSH, dy[c]);
                    }
                    if let Some((errors, sizes)) = &mut bias {
                        let at = [head, key + errors.ncols() / 2 - query];
                        errors[at] += e;
                        sizes[at] += ds + e;
                    }
                }
            }
        }
    }
    let all =
        |exact: &Array2<f64>, (errors, sizes): &(Array2<f64>, Array2<f64>), terms: usize, before: Option<&Matrix>| {
            let mut all = Expectation::new(exact.nrows(), exact.ncols(), DType::F32);
            for (at, value) in exact.indexed_iter() {
                let error = errors[at] + gamma(terms + 5, U) * sizes[at];
                let old = before.map_or(0.0, |before| f64::from(before.get(at.0, at.1)));
                let rounding = if before.is_some() { U * ((old + value).abs() + error) } else { 0.0 };
                all.push(old + value, error + rounding);
            }
            all
        };
    let dqkv = all(&exact.dqkv, &own, seq * heads / kv_heads, before[0]);
    let dbias = exact.dbias.as_ref().zip(bias.as_ref());
    Ok((dqkv, dbias.map(|(exact, bounds)| all(exact, bounds, lengths.len() * seq, before[1]))))
}

/// What one query makes of the keys.
pub(super) struct Weights {
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
    /// Of queries and keys of these types.
    pub(super) fn of(
        q: &[f64],
        keys: &[Vec<f64>],
        bias: impl Fn(usize) -> Option<f64>,
        (q_type, k_type): (DType, DType),
        rounded: DType,
    ) -> Self {
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
                    let lost = is_subnormal(q, q_type) || is_subnormal(k, k_type);
                    subnormal += if lost { (q * k).abs() } else { 0.0 };
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
    pub(super) fn error(&self, y: f64, values: impl Iterator<Item = f64>, storage: DType) -> f64 {
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
