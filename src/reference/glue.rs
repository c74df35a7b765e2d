//! The oracle of what runs between the GEMMs: f64 twins of each operation, and how far an f32 result may be from them.
//!
//! Each function gives an [`Expectation`]: exact results, element by element, with bounds that hold for any order of
//! summation. They share no code with the devices, and read nothing but the operands.
//!
//! # The bounds
//! As in [`super`]: `u` = 2⁻²⁴, γₙ = n·u / (1 − n·u), and a result below 2⁻¹²⁶ may become zero. An operand that is
//! subnormal in its storage type may be taken for zero; call that loss φ (|x|, or 0 where x is normal). What WGSL
//! promises of its functions (<https://www.w3.org/TR/WGSL/#floating-point-accuracy>), with a unit in the last place at
//! most 2u: division 2.5 units, 5u; `inverseSqrt` 2 units, 4u; `exp(x)` 3 + 2·|x| units, (6 + 4·|x|)·u. CPUs do better.
//!
//! **Sum of embeddings.** γ₂·Σ|a| for three addends, γ₁ for two, 0 for one, plus Σφ, plus 2⁻¹²⁶ for each sum.
//!
//! **Layer normalisation**, d features.
//! 1. Mean: γ of d + 6 (the sum, and a division or a product with a reciprocal) times Σ|x|/d, plus Σφ/d.
//! 2. Difference c = x − mean: φ and the mean's error, and one rounding. Call the sum e.
//! 3. Variance v: squares differ by Σ(2·|c|·e + e²)/d, and rounding takes γ of d + 7 of Σ(|c| + e)²/d.
//! 4. r = 1/√(v + ε), where the argument t is off by e' (step 3, and one rounding): at most 1/√(t − e') − 1/√t, and 4u
//!    of it for the function. Where e' reaches t nothing can be said, and the token is undecided.
//! 5. c·r·γ + β: the errors of c and r multiplied out, a rounding for each of the three operations, and the φ of gamma
//!    and beta.
//!
//! **Attention**, h features of a head, n keys. With exact scores s and their maximum M, weights w ∝ exp(s − M).
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
//! **Pooling.** The mean as above. Its length's square q: Σ(2·|m|·e + e²) + γ of d + 1 times Σ(|m| + e)², and 1/√max(q,
//! 10⁻²⁴) as in step 4, or by a square root and a division, 10u. The product: one rounding.
//!
//! Every result is then stored as in step 5 of [`super`].

use super::{Expected, FLUSH, U, Verdict, Worst, gamma, is_subnormal, limits, stored};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::matrix::{DType, Matrix};

/// Exact results of one operation, row by row, each with its error bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Expectation {
    rows: usize,
    cols: usize,
    output: DType,
    elements: Vec<Expected>,
}

impl Expectation {
    fn new(rows: usize, cols: usize, output: DType) -> Self {
        Self { rows, cols, output, elements: Vec::with_capacity(rows * cols) }
    }

    /// Adds the next element: what it is before it is stored, and how far a device may be from that.
    fn push(&mut self, value: f64, error: f64) {
        self.elements.push(stored(value, error, !error.is_finite(), self.output));
    }

    /// One element.
    ///
    /// # Panics
    /// If `row` or `col` is out of range.
    pub fn element(&self, row: usize, col: usize) -> Expected {
        assert!(col < self.cols, "column {col} of {}", self.cols);
        self.elements[row * self.cols + col]
    }

    /// Judges a whole output; `token` in the verdict is its row and `feature` its column. An error if its shape or type
    /// is another; wrong numbers are no error but a [`Verdict`] that has not passed.
    pub fn verify(&self, y: &Matrix) -> Result<Verdict> {
        expect_shape("output", (y.rows(), y.cols()), (self.rows, self.cols))?;
        expect_dtype("output", y.dtype(), self.output)?;
        let mut verdict = Verdict::EMPTY;
        for (i, want) in self.elements.iter().enumerate() {
            let (token, feature) = (i / self.cols, i % self.cols);
            let got = f64::from(y.get(token, feature));
            verdict.merge(Verdict {
                checked: 1,
                undecided: usize::from(want.bound.is_infinite()),
                error_over_bound: want.error_over_bound(got),
                worst: Some(Worst { feature, token, got, want: want.value, bound: want.bound }),
            });
        }
        Ok(verdict)
    }
}

/// `y[t] = Σ table[ids[t]]`, an id past the end of a table meaning its last row. An error if tables differ in width, or
/// ids in number, or there is no table or one without rows.
///
/// ```
/// use sparse24::{DType, Matrix, reference::glue};
/// let table = Matrix::from_f32(2, 1, &[1.5, -2.0])?;
/// let want = glue::embed(&[(&table, &[1, 0])], DType::F32)?;
/// assert!(want.verify(&Matrix::from_f32(2, 1, &[-2.0, 1.5])?)?.passed());
/// assert!(!want.verify(&Matrix::from_f32(2, 1, &[-2.0, 1.5000001])?)?.passed());
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn embed(tables: &[(&Matrix, &[u32])], output: DType) -> Result<Expectation> {
    let [(first, ids), ..] = tables else { return Err(Error::Invalid("an embedding needs a table".into())) };
    let (tokens, width) = (ids.len(), first.cols());
    for (table, ids) in tables {
        expect_shape("table", (table.rows().min(1), table.cols()), (1, width))?;
        expect_count("ids", ids.len(), tokens)?;
    }
    let mut all = Expectation::new(tokens, width, output);
    for t in 0..tokens {
        for c in 0..width {
            let (mut sum, mut abs, mut flushed) = (0.0, 0.0, 0.0);
            for (table, ids) in tables {
                let a = f64::from(table.get((ids[t] as usize).min(table.rows() - 1), c));
                sum += a;
                abs += a.abs();
                flushed += phi(a, table.dtype());
            }
            let additions = tables.len() - 1;
            all.push(sum, bounded(abs, gamma(additions, U) * abs + flushed + additions as f64 * FLUSH));
        }
    }
    Ok(all)
}

/// Layer normalisation of each row of `x`, with one gamma and beta per feature.
///
/// ```
/// use sparse24::{DType, Matrix, reference::glue};
/// let x = Matrix::from_f32(1, 2, &[1.0, 3.0])?;
/// let want = glue::layer_norm(&x, &[1.0, 1.0], &[0.0, 0.5], 0.0, DType::F32)?;
/// assert_eq!((want.element(0, 0).value, want.element(0, 1).value), (-1.0, 1.5));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn layer_norm(x: &Matrix, gammas: &[f32], betas: &[f32], eps: f32, output: DType) -> Result<Expectation> {
    let d = x.cols();
    expect_count("gamma", gammas.len(), d)?;
    expect_count("beta", betas.len(), d)?;
    let mut all = Expectation::new(x.rows(), d, output);
    for t in 0..x.rows() {
        let row: Vec<f64> = (0..d).map(|c| f64::from(x.get(t, c))).collect();
        let (mean, mean_error) = mean_of(row.iter().copied(), d, x.dtype());
        let centred: Vec<(f64, f64)> = row
            .iter()
            .map(|&x_c| {
                let c = x_c - mean;
                let error = phi(x_c, x.dtype()) + mean_error;
                (c, error + U * (c.abs() + error))
            })
            .collect();
        let variance = centred.iter().map(|(c, _)| c * c).sum::<f64>() / d as f64;
        let variance_error = square_error(&centred, d + 7) / d as f64;
        let argument = variance + f64::from(eps);
        let (r, r_error) = inverse_root(argument, variance_error * (1.0 + U) + U * argument + FLUSH);
        for ((&(c, c_error), &gamma), &beta) in centred.iter().zip(gammas).zip(betas) {
            let (gamma, beta) = (f64::from(gamma), f64::from(beta));
            let z = c * r;
            let z_error = (c.abs() + c_error) * (r + r_error) * (1.0 + U) - z.abs() + FLUSH;
            let scaled = z * gamma;
            let scaled_error = z_error * gamma.abs() * (1.0 + U)
                + U * scaled.abs()
                + FLUSH
                + phi(gamma, DType::F32) * (z.abs() + z_error);
            let y = scaled + beta;
            let error = scaled_error * (1.0 + U) + U * y.abs() + FLUSH + phi(beta, DType::F32);
            all.push(y, bounded(row.iter().map(|x| x * x).sum(), error));
        }
    }
    Ok(all)
}

/// Attention over `qkv`, whose rows are Q | K | V: `batch` = `lengths.len()` sequences of `seq` rows. Rows at or past a
/// sequence's length are exactly zero, and what they hold as keys and values does not matter. `weights` is the type to
/// which a kernel may round the weights of a sum: f32, or f16 for cooperative matrices.
///
/// ```
/// use sparse24::{DType, Matrix, reference::glue};
/// // Two real tokens with equal scores, and padding: the mean of the two values.
/// let qkv = Matrix::from_f32(3, 3, &[0.0, 1.0, 2.0, 0.0, 1.0, 4.0, 9.0, 9.0, f32::NAN])?;
/// let want = glue::attention(&qkv, &[2], (3, 1), DType::F32, DType::F32)?;
/// assert_eq!([0, 1, 2].map(|t| want.element(t, 0).value), [3.0, 3.0, 0.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn attention(
    qkv: &Matrix,
    lengths: &[u32],
    (seq, heads): (usize, usize),
    weights: DType,
    output: DType,
) -> Result<Expectation> {
    let width = qkv.cols() / 3;
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::Invalid(format!("{width} features are no whole number for each of {heads} heads")));
    }
    expect_shape("qkv", (qkv.rows(), qkv.cols()), (lengths.len() * seq, 3 * width))?;
    let h = width / heads;
    let scale = 1.0 / (h as f64).sqrt();
    let mut all = Expectation::new(qkv.rows(), width, output);
    let zero = Expected { value: 0.0, bound: 0.0, output };
    all.elements.resize(qkv.rows() * width, zero);
    for (sequence, &length) in lengths.iter().enumerate() {
        let n = seq.min(length as usize);
        for head in 0..heads {
            // The features of part 0 (Q), 1 (K) or 2 (V) of the head, token by token.
            let part = |part: usize| -> Vec<Vec<f64>> {
                let row = |t: usize| (0..h).map(move |c| (sequence * seq + t, part * width + head * h + c));
                (0..n).map(|t| row(t).map(|(r, c)| f64::from(qkv.get(r, c))).collect()).collect()
            };
            let (q, k, v) = (part(0), part(1), part(2));
            for (t, q) in q.iter().enumerate() {
                let shares = Weights::of(q, &k, scale, qkv.dtype(), weights);
                let row0 = (sequence * seq + t) * width + head * h;
                for c in 0..h {
                    let (value, error) = shares.mean(v.iter().map(|v| v[c]), qkv.dtype());
                    all.elements[row0 + c] = stored(value, error, !error.is_finite(), output);
                }
            }
        }
    }
    Ok(all)
}

/// Mean of each sequence's first `lengths` rows of `seq`, and that over its Euclidean length (at least 1e-12) if
/// `normalize`. Results are f32.
///
/// ```
/// use sparse24::{Matrix, reference::glue};
/// let x = Matrix::from_f32(2, 2, &[3.0, 4.0, f32::NAN, f32::NAN])?;
/// let want = glue::pool(&x, &[1], 2, true)?;
/// assert!((want.element(0, 0).value - 0.6).abs() < 1e-15 && (want.element(0, 1).value - 0.8).abs() < 1e-15);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn pool(x: &Matrix, lengths: &[u32], seq: usize, normalize: bool) -> Result<Expectation> {
    let d = x.cols();
    expect_shape("x", (x.rows(), d), (lengths.len() * seq, d))?;
    let mut all = Expectation::new(lengths.len(), d, DType::F32);
    for (sequence, &length) in lengths.iter().enumerate() {
        let n = seq.min(length as usize);
        let column = |c: usize| (0..n).map(move |t| f64::from(x.get(sequence * seq + t, c)));
        let means: Vec<(f64, f64)> = (0..d).map(|c| mean_of(column(c), n, x.dtype())).collect();
        if !normalize || n == 0 {
            means.iter().for_each(|&(mean, error)| all.push(mean, bounded(mean, error)));
            continue;
        }
        let squares: f64 = means.iter().map(|(m, _)| m * m).sum();
        let (r, r_error) = inverse_root(squares.max(1e-24), square_error(&means, d + 1));
        // A square root and a division, where the reciprocal is not had at once.
        let r_error = r_error + 6.0 * U * r;
        for &(m, error) in &means {
            let product = (m.abs() + error) * (r + r_error) * (1.0 + U) - m.abs() * r + FLUSH;
            all.push(m * r, bounded(squares, product));
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
    fn of(q: &[f64], keys: &[Vec<f64>], scale: f64, storage: DType, rounded: DType) -> Self {
        let (h, n) = (q.len(), keys.len());
        let growth = gamma(h + 4, U);
        let mut decided = true;
        let scores: Vec<(f64, f64)> = keys
            .iter()
            .map(|k| {
                let (mut dot, mut abs, mut subnormal, mut key) = (0.0, 0.0, 0.0, 0.0);
                for (&q, &k) in q.iter().zip(k) {
                    dot += q * k;
                    abs += (q * k).abs();
                    key += k.abs();
                    subnormal += if is_subnormal(q, storage) || is_subnormal(k, storage) { (q * k).abs() } else { 0.0 };
                }
                decided &= abs * (1.0 + growth) < f64::from(f32::MAX);
                let flushed = scale * subnormal + FLUSH * (2.0 * h as f64 + key);
                (scale * dot, growth * scale * abs + (1.0 + growth) * flushed)
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

    /// The weighted mean of one feature's values, and its error.
    fn mean(&self, values: impl Iterator<Item = f64> + Clone, storage: DType) -> (f64, f64) {
        let y: f64 = self.keys.iter().zip(values.clone()).map(|((w, _), v)| w * v).sum();
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
        (y, if self.decided && least > 0.5 && error.is_finite() { error } else { f64::INFINITY })
    }
}

/// Mean of `n` numbers of a type, and its error; zero for none.
fn mean_of(numbers: impl Iterator<Item = f64>, n: usize, storage: DType) -> (f64, f64) {
    if n == 0 {
        return (0.0, 0.0);
    }
    let (mut sum, mut abs, mut flushed) = (0.0, 0.0, 0.0);
    for x in numbers {
        sum += x;
        abs += x.abs();
        flushed += phi(x, storage);
    }
    let count = n as f64;
    (sum / count, (gamma(n + 6, U) * abs + flushed) / count + 2.0 * FLUSH)
}

/// Error of a sum of squares of numbers that are themselves off, in `k` roundings.
fn square_error(numbers: &[(f64, f64)], k: usize) -> f64 {
    let (mut given, mut rounded) = (0.0, 0.0);
    for &(c, error) in numbers {
        given += 2.0 * c.abs() * error + error * error;
        rounded += (c.abs() + error) * (c.abs() + error);
    }
    given + gamma(k, U) * rounded + 2.0 * numbers.len() as f64 * FLUSH
}

/// 1/√t of a `t` that is off by `error`, and the error of that; infinite where `t` may be zero.
fn inverse_root(t: f64, error: f64) -> (f64, f64) {
    let r = 1.0 / t.sqrt();
    if error >= t {
        return (r, f64::INFINITY);
    }
    let most = 1.0 / (t - error).sqrt();
    (r, most - r + 4.0 * U * most)
}

/// What is lost if an operand of this type is taken for zero because it is subnormal.
fn phi(x: f64, storage: DType) -> f64 {
    if is_subnormal(x, storage) { x.abs() } else { 0.0 }
}

/// The error, or infinity where a sum on the way may not fit f32, or is no number.
fn bounded(sum: f64, error: f64) -> f64 {
    if sum.abs() < 0.5 * f64::from(f32::MAX) && error.is_finite() { error } else { f64::INFINITY }
}

fn expect_count(what: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { what: what.to_owned(), got: vec![got], expected: vec![expected] })
}
