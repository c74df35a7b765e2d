//! The oracle of GEMMs: two ways that share no code, and a bound that is zero on whole numbers.
//!
//! Invariant: compressed weights are read through the accessors of [`Sparse24`](crate::Sparse24) alone and decoded
//! here, in two ways that share no code: [`Oracle::element`] walks the values of one row and looks up the index of
//! each; [`Oracle::decompressed`] walks the metadata and scatters values into a dense matrix, which [`Oracle::full`]
//! multiplies.
//!
//! # What is exact
//! For output feature `i` and token `t`, with `a` the weights and `b` the activations, both widened exactly,
//!
//! ```text
//! pre = Σ a·b + bias     y = act(pre) + residual
//! ```
//!
//! - A weight that 2:4 pruned away contributes **nothing**: it is never multiplied, and `0·∞` does not arise. Kept
//!   zeros (under-full groups) are multiplied; padding columns at or past `k` are not.
//! - A masked-out weight contributes **nothing**, and its value, NaN or not, does not matter. Devices may multiply by
//!   zero instead: that differs only where the activation is infinite or NaN, and such elements are undecided (below).
//!   `full` multiplies by the zeros of pruned weights, so it agrees with `element` only where the activations are
//!   finite.
//! - Activations are their formulas in IEEE arithmetic: NaN stays NaN (for ReLU too), and GELU and SiLU of −∞ are
//!   −∞·0 = NaN.
//!
//! # The error bound
//! As [`super`] has it, with `S` = Σ|a||b|, in the order of the computation:
//!
//! 1. **Sum.** K counts the multiply-adds that are executed: `k`, and 2·⌈k/4⌉ for 2:4. The bound takes γ of K + 1: the
//!    additional `u·S` is more than the round-off of the oracle's own f64 sum, at most K·2⁻⁵³·S, for all K < 2²⁴, where
//!    γ ends. To `γ·S` are added
//!    - 2·K·2⁻¹²⁶: each product and each partial sum may underflow and be flushed to zero;
//!    - Σ|a||b| over the products with an operand that is subnormal in its storage type: WGSL lets a device flush
//!      operands (<https://www.w3.org/TR/WGSL/#floating-point-evaluation>), and f16 has subnormals of everyday size.
//!
//!    Both carry a factor 1 + γ, for the roundings that follow.
//!
//!    Where the sum is **exact in every order**, γ and the first addend are zero: if all weights of the row are
//!    multiples of one power of two, all activations of the token of another, and S is at most 2²⁴ times their product,
//!    then so is every partial sum a multiple of it with at most 24 bits. This is what small whole numbers as test data
//!    are for: γ·S grows like k², so from a k of some thousands on it hides a single wrong product of random data, and
//!    never one of whole numbers.
//! 2. **Bias.** The error so far times 1 + u, plus u·|pre|, plus 2·2⁻¹²⁶ for flushes. (Starting the sum *at* the bias
//!    rounds the bias K times and is not covered.)
//! 3. **Activation.** The error so far times a Lipschitz constant: 1 for none and ReLU; 1.13 for both GELUs, whose
//!    slope is largest near x = √2, where Φ(x) + x·φ(x) = 1.1289; 1.1 for SiLU, whose slope is largest, 1.0998, near
//!    x = 2.40. Plus, for GELU and SiLU, the error of evaluating the function itself, 8·u·(1 + |x|), where x is the
//!    computed argument. Reason: kernels take erf from Abramowitz & Stegun 7.1.26, |ε| ≤ 1.5·10⁻⁷ = 2.5·u, and tanh
//!    and σ from exp, which WGSL computes to 3 + 2·|x| ULP, and from a division of 2.5 ULP; each function is x times a
//!    factor, whose error the decay of exp keeps at a few u. ReLU and the identity are exact.
//! 4. **Residual.** The error so far times 1 + u, plus u·|y|, plus 2⁻¹²⁶, plus |residual| where that is subnormal in
//!    its type.
//! 5. **Store.** As in [`super`].
//!
//! Where |a||b| adds up past the largest f32, a flushed operand meets an infinity, or a masked-out weight an activation
//! that is not finite, no bound exists for all devices and orders of summation. Such elements are
//! undecided.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use ndarray::{Array2, ArrayView2};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use super::{Expected, FLUSH, U, Verdict, Worst, gamma, is_subnormal, limits, stored};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::mask::Mask;
use crate::matrix::{DType, Element, Matrix, each_dtype};
use crate::problem::{Activation, Epilogue, Form, Op, Problem};
use crate::weights::HostWeights;

/// Tokens that are widened to f64 at a time: enough to share the decoding of a row of weights, few enough to stay
/// cached.
const BLOCK: usize = 64;

/// The inputs of one [`Problem`].
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// W, in the problem's storage type, or bf16 where that is f32.
    pub weights: &'a HostWeights,
    /// X (`n x k`) or B (`k x n`), in the problem's storage type.
    pub x: &'a Matrix,
    /// One number per output feature, if the epilogue adds a bias.
    pub bias: Option<&'a [f32]>,
    /// A matrix of the output's shape and type, if the epilogue adds one.
    pub residual: Option<&'a Matrix>,
}

impl<'a> Operands<'a> {
    /// Weights and activations, without bias and residual.
    pub fn new(weights: &'a HostWeights, x: &'a Matrix) -> Self {
        Self { weights, x, bias: None, residual: None }
    }

    /// With this bias.
    pub fn bias(self, bias: &'a [f32]) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// With this residual.
    pub fn residual(self, residual: &'a Matrix) -> Self {
        Self { residual: Some(residual), ..self }
    }
}

/// The exact results of one problem on given operands, element by element or all at once.
///
/// ```
/// use sparse24::reference::{Operands, Oracle, Sample};
/// use sparse24::{DType, Matrix, Op, Problem};
/// let w = Matrix::from_f32(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// let x = Matrix::from_f32(1, 3, &[1.0, 0.0, -1.0])?;
/// let problem = Problem::linear(Op::Dense, 2, 1, 3, DType::F32);
/// let w = w.into();
/// let oracle = Oracle::new(&problem, Operands::new(&w, &x))?;
/// assert_eq!(oracle.element(1, 0).value, -2.0);
/// assert!(oracle.verify(&Matrix::from_f32(1, 2, &[-2.0, -2.0])?, Sample::All)?.passed());
/// assert!(!oracle.verify(&Matrix::from_f32(1, 2, &[-2.0, -2.00001])?, Sample::All)?.passed());
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Oracle<'a> {
    problem: Problem,
    operands: Operands<'a>,
}

/// Which elements of an output are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// Every element.
    All,
    /// Every pair of some features and some tokens: the first one, the last three (where the residue tiles end) and
    /// this many others, one drawn at random from each of as many stretches of equal length. All of them where there
    /// are no more than that.
    Random {
        /// Features drawn.
        features: usize,
        /// Tokens drawn.
        tokens: usize,
        /// Seed of the draw; the same seed draws the same elements.
        seed: u64,
    },
}

/// One row of weights: the products that its outputs are made of.
struct Row {
    /// Column of X, weight.
    terms: Vec<(usize, f64)>,
    /// Whether a weight is subnormal in its storage type.
    subnormal: bool,
    /// The largest power of two that divides every weight.
    unit: f64,
    /// Columns whose weights are masked out.
    left_out: Vec<usize>,
}

/// One token's features.
struct Token {
    x: Vec<f64>,
    /// Whether one of them is subnormal in its storage type.
    subnormal: bool,
    /// The largest power of two that divides all of them.
    unit: f64,
    /// Whether all of them are finite.
    finite: bool,
}

/// Σab, and the sums that its bound is made of.
struct Dot {
    sum: f64,
    /// Σ|a||b| over the finite products.
    abs: f64,
    /// The same over the products with a subnormal operand.
    subnormal: f64,
    /// Whether f32 gives the same sum in every order, without any rounding.
    exact: bool,
    /// Whether a subnormal operand meets an infinity, whose product is infinite or, if the operand is flushed, NaN; or
    /// a weight that is masked out or pruned meets an activation that is not finite, and contributes nothing or NaN.
    ambiguous: bool,
}

impl<'a> Oracle<'a> {
    /// Checks that the operands are those of `problem`: shapes, element types, the kind of weights and their vector
    /// length, and that bias and residual are given exactly if the epilogue uses them. The error names the first that
    /// does not fit.
    pub fn new(problem: &Problem, operands: Operands<'a>) -> Result<Self> {
        let Problem { op, m, k, storage, output, epilogue, .. } = *problem;
        let Operands { weights, x, bias, residual } = operands;
        // However a mask is held on the device, it is the same mask.
        let masked = |op| matches!(op, Op::Masked | Op::Masked24);
        if weights.op() != op && !(masked(weights.op()) && masked(op)) {
            let name = |op: Op| match op.vector() {
                Some(v) => format!("{} with vector length {v}", op.name()),
                None => op.name().to_owned(),
            };
            return Err(Error::mismatch("weights", name(weights.op()), name(op)));
        }
        expect_shape("weights", (weights.m(), weights.k()), (m, k))?;
        if let Some(mask) = weights.mask() {
            expect_shape("mask", (mask.rows(), mask.cols()), (m, k))?;
        }
        if !(weights.dtype() == DType::Bf16 && storage == DType::F32) {
            expect_dtype("weights", weights.dtype(), storage)?;
        }
        expect_shape("activations", (x.rows(), x.cols()), problem.x_shape())?;
        expect_dtype("activations", x.dtype(), storage)?;
        check_presence("bias", bias.is_some(), epilogue.bias, epilogue)?;
        if let Some(bias) = bias
            && bias.len() != m
        {
            return Err(Error::shape("bias", vec![bias.len()], vec![m]));
        }
        check_presence("residual", residual.is_some(), epilogue.residual, epilogue)?;
        if let Some(residual) = residual {
            expect_shape("residual", (residual.rows(), residual.cols()), problem.y_shape())?;
            expect_dtype("residual", residual.dtype(), output)?;
        }
        Ok(Self { problem: *problem, operands })
    }

    /// The exact output of one feature for one token, and its error bound. Walks the weights that are multiplied.
    ///
    /// # Panics
    /// If `feature` or `token` is out of range.
    pub fn element(&self, feature: usize, token: usize) -> Expected {
        let Problem { m, n, .. } = self.problem;
        assert!(feature < m && token < n, "feature {feature}, token {token} of {m} features, {n} tokens");
        let tokens = self.tokens(&[token]);
        self.expect(
            &self.row(feature).dot(&tokens[0], self.operands.weights.dtype(), self.problem.storage),
            feature,
            token,
        )
    }

    /// W as a dense `m x k` matrix: pruned and masked-out weights are zero.
    pub fn decompressed(&self) -> Array2<f64> {
        let (m, k) = (self.problem.m, self.problem.k);
        match self.operands.weights {
            HostWeights::Dense(w) => Array2::from_shape_fn((m, k), |(r, c)| f64::from(w.get(r, c))),
            weights @ (HostWeights::Masked(w, _) | HostWeights::Masked24(w, _)) => {
                let Some(mask) = weights.mask() else { return Array2::zeros((m, k)) };
                let mut dense = Array2::zeros((m, k));
                for (i, &word) in mask.words().iter().enumerate() {
                    let (row, first) = (i / mask.words_per_row(), i % mask.words_per_row() * 32);
                    for col in (0..32).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit) {
                        dense[[row, col]] = f64::from(w.get(row, col));
                    }
                }
                dense
            }
            HostWeights::Sparse24(s) => {
                let mut dense = Array2::zeros((m, k));
                for (i, &word) in s.meta().iter().enumerate() {
                    let (block, first) = (i / s.meta_cols(), i % s.meta_cols() * 8);
                    let rows = block * s.vector().get()..m.min((block + 1) * s.vector().get());
                    for group in first..k.div_ceil(4).min(first + 8) {
                        let code = (word >> (4 * (group - first)) & 0xf) as usize;
                        for (slot, position) in [code & 3, code >> 2].into_iter().enumerate() {
                            let col = 4 * group + position;
                            for row in rows.clone().filter(|_| col < k) {
                                dense[[row, col]] = f64::from(s.values().get(row * s.k_physical() + 2 * group + slot));
                            }
                        }
                    }
                }
                dense
            }
        }
    }

    /// The whole output in its own layout, by dense multiplication of [`Oracle::decompressed`]: in f64, so within about
    /// k·2⁻⁵³·Σ|a||b| of [`Oracle::element`].
    pub fn full(&self) -> Array2<f64> {
        let Problem { form, epilogue, .. } = self.problem;
        let x = self.operands.x.to_array().mapv(f64::from);
        let mut y = match form {
            Form::Linear => x.dot(&self.decompressed().t()),
            Form::Gemm => self.decompressed().dot(&x),
        };
        for ((row, col), y) in y.indexed_iter_mut() {
            let feature = if form == Form::Linear { col } else { row };
            let pre = *y + self.operands.bias.map_or(0.0, |bias| f64::from(bias[feature]));
            let residual = self.operands.residual.map_or(0.0, |r| f64::from(r.get(row, col)));
            *y = activation(epilogue.activation, pre) + residual;
        }
        y
    }

    /// Judges an output, in the problem's layout and output type, against [`Oracle::element`]. An error if its shape or
    /// type is not the problem's; wrong numbers are no error but a [`Verdict`] that has not passed.
    pub fn verify(&self, y: &Matrix, sample: Sample) -> Result<Verdict> {
        let Problem { m, n, output, .. } = self.problem;
        expect_shape("output", (y.rows(), y.cols()), self.problem.y_shape())?;
        expect_dtype("output", y.dtype(), output)?;
        let (features, tokens) = match sample {
            Sample::All => ((0..m).collect(), (0..n).collect()),
            Sample::Random { features, tokens, seed } => {
                let mut rng = Pcg64Mcg::seed_from_u64(seed);
                (draw(m, features, &mut rng), draw(n, tokens, &mut rng))
            }
        };
        let mut verdict = Verdict::EMPTY;
        for tokens in tokens.chunks(BLOCK) {
            let block = self.tokens(tokens);
            // Collected in order, so that of equals the first is the worst whatever the threads do.
            let rows: Vec<Verdict> =
                features.par_iter().map(|&feature| self.verify_row(y, feature, tokens, &block)).collect();
            rows.into_iter().for_each(|row| verdict.merge(row));
        }
        Ok(verdict)
    }

    /// The verdict on one feature of `tokens`, whose activations are `block`.
    fn verify_row(&self, y: &Matrix, feature: usize, tokens: &[usize], block: &[Token]) -> Verdict {
        let row = self.row(feature);
        let mut verdict = Verdict::EMPTY;
        for (&token, x) in tokens.iter().zip(block) {
            let want = self.expect(&row.dot(x, self.operands.weights.dtype(), self.problem.storage), feature, token);
            let (r, c) = self.place(feature, token);
            let got = f64::from(y.get(r, c));
            verdict.merge(Verdict {
                checked: 1,
                undecided: usize::from(want.bound.is_infinite()),
                error_over_bound: want.error_over_bound(got),
                worst: Some(Worst { feature, token, got, want: want.value, bound: want.bound }),
            });
        }
        verdict
    }

    /// Where the output of `feature` and `token` is stored.
    fn place(&self, feature: usize, token: usize) -> (usize, usize) {
        match self.problem.form {
            Form::Linear => (token, feature),
            Form::Gemm => (feature, token),
        }
    }

    /// The weights of one row that are multiplied, widened.
    fn row(&self, feature: usize) -> Row {
        let k = self.problem.k;
        let mut left_out = Vec::new();
        let terms: Vec<(usize, f64)> = match self.operands.weights {
            HostWeights::Dense(w) => {
                each_dtype!(w.elements(), v => widened(&v[feature * k..][..k]).enumerate().collect())
            }
            weights @ (HostWeights::Masked(w, _) | HostWeights::Masked24(w, _)) => {
                let mask = weights.mask().map_or(&[][..], Mask::words);
                let words = k.div_ceil(32);
                let bits = &mask[feature * words..][..words];
                let keeps = |col: usize| bits[col / 32] >> (col % 32) & 1 == 1;
                left_out = (0..k).filter(|&col| !keeps(col)).collect();
                each_dtype!(w.elements(), v => widened(&v[feature * k..][..k])
                    .enumerate()
                    .filter(|&(col, _)| keeps(col))
                    .collect())
            }
            HostWeights::Sparse24(s) => {
                let meta = &s.meta()[feature / s.vector().get() * s.meta_cols()..][..s.meta_cols()];
                // Two bits per value, so the index of value p is at bit 2p of its row of metadata.
                let col = |p: usize| p / 2 * 4 + (meta[p / 16] >> (2 * (p % 16)) & 3) as usize;
                let width = s.k_physical();
                let mut kept = vec![false; k.next_multiple_of(4)];
                (0..width).for_each(|p| kept[col(p)] = true);
                left_out = (0..k).filter(|&col| !kept[col]).collect();
                each_dtype!(s.values(), v => widened(&v[feature * width..][..width])
                    .enumerate()
                    .map(|(p, w)| (col(p), w))
                    .filter(|&(col, _)| col < k)
                    .collect())
            }
        };
        let subnormal = terms.iter().any(|&(_, w)| is_subnormal(w, self.operands.weights.dtype()));
        let unit = common_unit(terms.iter().map(|&(_, w)| w));
        Row { terms, subnormal, unit, left_out }
    }

    /// The features of each of `tokens`, widened.
    fn tokens(&self, tokens: &[usize]) -> Vec<Token> {
        let Problem { form, n, k, storage, .. } = self.problem;
        let mut wide: Vec<Vec<f64>> = tokens.iter().map(|_| Vec::with_capacity(k)).collect();
        each_dtype!(self.operands.x.elements(), v => match form {
            Form::Linear => wide.iter_mut().zip(tokens).for_each(|(x, &t)| x.extend(widened(&v[t * k..][..k]))),
            // Along the rows of B, in which the tokens of one feature are neighbours.
            Form::Gemm => (0..k).for_each(|p| {
                wide.iter_mut().zip(tokens).for_each(|(x, &t)| x.push(f64::from(v[p * n + t].to_f32())));
            }),
        });
        let token = |x: Vec<f64>| Token {
            subnormal: x.iter().any(|&x| is_subnormal(x, storage)),
            unit: common_unit(x.iter().copied()),
            finite: x.iter().all(|x| x.is_finite()),
            x,
        };
        wide.into_iter().map(token).collect()
    }

    /// The epilogue of one sum, and the error bound: the steps of the module's documentation in their order.
    fn expect(&self, dot: &Dot, feature: usize, token: usize) -> Expected {
        let Problem { op, k, output, epilogue, .. } = self.problem;
        let executed = if op.vector().is_some() { 2 * k.div_ceil(4) } else { k };
        let growth = gamma(executed + 1, U);
        // An infinity or a NaN is exact: what matters from then on is only its class.
        let error_of = |value: f64, error: f64| if value.is_finite() { error } else { 0.0 };
        let overflows = |value: f64, error: f64| value.is_finite() && value.abs() + error >= f64::from(f32::MAX);

        let mut value = dot.sum;
        let rounded = if dot.exact { 0.0 } else { growth * dot.abs + (1.0 + growth) * 2.0 * executed as f64 * FLUSH };
        let mut error = error_of(value, rounded + (1.0 + growth) * dot.subnormal);
        let mut undecided = dot.ambiguous || growth.is_infinite() || overflows(dot.abs * (1.0 + growth), 0.0);

        if let Some(bias) = self.operands.bias {
            value += f64::from(bias[feature]);
            error = error_of(value, error * (1.0 + U) + U * value.abs() + 2.0 * FLUSH);
            undecided |= overflows(value, error);
        }

        let argument = value;
        value = activation(epilogue.activation, argument);
        let (slope, evaluation) = match epilogue.activation {
            Activation::None | Activation::Relu | Activation::Relu6 => (1.0, 0.0),
            Activation::Gelu | Activation::GeluTanh => (1.13, 8.0 * U),
            Activation::Silu => (1.1, 8.0 * U),
        };
        // A finite result of an infinite argument is an end of ReLU or ReLU6, which is exact.
        let evaluated = if evaluation == 0.0 { 0.0 } else { evaluation * (1.0 + argument.abs() + error) };
        error = error_of(value, slope * error + evaluated);

        if let Some(residual) = self.operands.residual {
            let (r, c) = self.place(feature, token);
            let residual = f64::from(residual.get(r, c));
            value += residual;
            let flushed = if is_subnormal(residual, output) { residual.abs() } else { 0.0 };
            error = error_of(value, error * (1.0 + U) + U * value.abs() + FLUSH + flushed);
            undecided |= overflows(value, error);
        }

        stored(value, error, undecided, output)
    }
}

impl Row {
    /// The products with one token. Almost always two running sums; subnormal operands and products that are not
    /// finite need the second look.
    fn dot(&self, token: &Token, weights: DType, storage: DType) -> Dot {
        let mut dot = Dot { sum: 0.0, abs: 0.0, subnormal: 0.0, exact: false, ambiguous: false };
        for &(col, w) in &self.terms {
            let product = w * token.x[col];
            dot.sum += product;
            dot.abs += product.abs();
        }
        dot.ambiguous = !token.finite && self.left_out.iter().any(|&col| !token.x[col].is_finite());
        let finite = dot.abs.is_finite();
        let unit = self.unit * token.unit;
        dot.exact = finite && unit >= FLUSH && dot.abs <= unit / U;
        if !self.subnormal && !token.subnormal && finite {
            return dot;
        }
        dot.abs = 0.0;
        let (least_w, least_x) = (limits(weights).normal, limits(storage).normal);
        for &(col, w) in &self.terms {
            let x = token.x[col];
            let product = (w * x).abs();
            // Zeros pass for subnormal here, harmlessly: their product is zero or NaN.
            let subnormal = (w.abs() < least_w) | (x.abs() < least_x);
            if product.is_finite() {
                dot.abs += product;
                dot.subnormal += if subnormal { product } else { 0.0 };
            } else {
                dot.ambiguous |= subnormal && product.is_infinite();
            }
        }
        dot
    }
}

/// The linear form in f64: act(X·Wᵀ + bias) + residual, of whole matrices.
pub fn exact(
    x: ArrayView2<'_, f64>,
    w: ArrayView2<'_, f64>,
    bias: Option<&[f64]>,
    of: Activation,
    residual: Option<ArrayView2<'_, f64>>,
) -> Array2<f64> {
    let mut y = x.dot(&w.t());
    for mut row in y.rows_mut() {
        row.iter_mut().enumerate().for_each(|(col, y)| *y = activation(of, *y + bias.map_or(0.0, |bias| bias[col])));
    }
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

/// The gradients of X·Wᵀ: of x (dY·W) and of w (dYᵀ·X). Of w, all weights, whatever is kept.
pub fn grad(x: ArrayView2<'_, f64>, w: ArrayView2<'_, f64>, dy: ArrayView2<'_, f64>) -> (Array2<f64>, Array2<f64>) {
    (dy.dot(&w), dy.t().dot(&x))
}

/// The activations in f64, each within a few 2⁻⁵³·(1 + |x|) for all finite arguments. NaN gives NaN; GELU and SiLU of
/// −∞ are NaN, as their formulas are.
///
/// ```
/// use sparse24::{Activation, reference::activation};
/// assert!((activation(Activation::Gelu, 1.0) - 0.8413447460685429).abs() < 1e-15);
/// ```
pub fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        // Not f64::max, which turns NaN into 0.
        Activation::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        // Keeps NaN.
        Activation::Relu6 => x.clamp(0.0, 6.0),
        // x·Φ(x), where erfc keeps the digits that 1 + erf loses in the left tail.
        Activation::Gelu => 0.5 * x * libm::erfc(-x * FRAC_1_SQRT_2),
        // (1 + tanh z) / 2 = σ(2z), with z = √(2/π)·(x + 0.044715·x³): no cancellation for negative x.
        Activation::GeluTanh => {
            let z = FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (x + 0.044715 * x * x * x);
            x / (1.0 + (-2.0 * z).exp())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// The largest power of two of which all of `numbers` are multiples; infinite if they are all zero, or none.
fn common_unit(numbers: impl Iterator<Item = f64>) -> f64 {
    // Widened f32 numbers are normal in f64, so the lowest set bit of the significand gives the unit of each.
    let exponent = numbers.filter(|&x| x != 0.0).fold(i32::MAX, |least, x| {
        let bits = x.to_bits();
        let significand = bits & ((1 << 52) - 1) | 1 << 52;
        least.min((bits >> 52 & 0x7ff) as i32 - 1075 + significand.trailing_zeros() as i32)
    });
    if exponent == i32::MAX { f64::INFINITY } else { 2f64.powi(exponent) }
}

fn widened<T: Element>(data: &[T]) -> impl Iterator<Item = f64> + '_ {
    data.iter().map(|x| f64::from(x.to_f32()))
}

/// The first, the last three and one of each of `count` stretches of the others below `len`, ascending; all if there
/// are no more.
fn draw(len: usize, count: usize, rng: &mut impl Rng) -> Vec<usize> {
    if count.saturating_add(4) >= len {
        return (0..len).collect();
    }
    let others = (len - 4) as u128;
    let start = |stretch: usize| (others * stretch as u128 / count as u128) as usize;
    let stretches = (0..count).map(|stretch| {
        let (from, to) = (start(stretch), start(stretch + 1));
        // The upper half of a 128-bit product: uniform but for a bias of length / 2^64.
        1 + from + ((u128::from(rng.next_u64()) * (to - from) as u128) >> 64) as usize
    });
    std::iter::once(0).chain(stretches).chain(len - 3..len).collect()
}

fn check_presence(what: &str, given: bool, used: bool, epilogue: Epilogue) -> Result<()> {
    match (given, used) {
        (true, false) => Err(Error::invalid(format!("a {what} is given, but the epilogue is {epilogue}"))),
        (false, true) => Err(Error::invalid(format!("the epilogue is {epilogue}, but no {what} is given"))),
        _ => Ok(()),
    }
}
