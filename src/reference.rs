//! The oracle: f64 twins of every operation, and the bound by which any device's f32 result is judged.
//!
//! Each operation has a file of its own here, by the stem of its file in [`crate::ops`]: its exact result, and how far
//! an f32 result may be from that, for any order of summation. What the bounds share is in this file. Invariant: the
//! oracle never imports what it checks, and reads nothing but the operands.
//!
//! # What the bounds share
//! What is computed in f32 may differ from the exact `y` by at most `bound`, built up in the order of the computation.
//! `u` = 2⁻²⁴ is the unit round-off of f32, and γₖ = K·u / (1 − K·u) ([`gamma`]). The model is N. J. Higham, *Accuracy
//! and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002: fl(x∘y) = (x∘y)(1+δ) + η, §2.8, and its consequence for
//! inner products, |fl(Σab) − Σab| ≤ γₖ·Σ|a||b|, §3.1, which holds for **any order of summation**: tiles, split-K,
//! trees, fused or separate multiply-adds, and additions of zero (padding) alike. f32 addition and multiplication are
//! taken to round to nearest. WGSL promises only one of the two neighbours; this is the stricter reading, and a device
//! that needs the looser one fails.
//!
//! A result below 2⁻¹²⁶ may become zero. An operand that is subnormal in its storage type may be taken for zero; call
//! that loss φ (|x|, or 0 where x is normal). What WGSL promises of its functions
//! (<https://www.w3.org/TR/WGSL/#floating-point-accuracy>), with a unit in the last place at most 2u: division 2.5 units,
//! 5u; `inverseSqrt` 2 units, 4u; `exp(x)` 3 + 2·|x| units, (6 + 4·|x|)·u. CPUs do better.
//!
//! **A mean** of n numbers: γ of n + 6 (the sum, and a division or a product with a reciprocal) times Σ|x|/n, plus
//! Σφ/n.
//!
//! **A sum of squares** of numbers c that are off by e, in k roundings: Σ(2·|c|·e + e²), and γₖ of Σ(|c| + e)².
//!
//! **1/√t** of a t that is off by e: at most 1/√(t − e) − 1/√t, and 4u of it for the function. Where e reaches t
//! nothing can be said, and what depends on it is undecided.
//!
//! **Store.** Nothing for f32. For f16 and bf16 one unit in the last place: 2·u_out·|y|, or the subnormals' spacing
//! where that is larger. Twice the round-off to nearest, because WGSL leaves the direction of this conversion open and
//! hardware that truncates exists (AMD's `v_cvt_pkrtz_f16_f32`).
//!
//! Beside the bound, [`Expected::error_over_bound`] takes **zero** where `y` may be subnormal in the output type
//! (stores may flush), and an **infinity** where |y| + bound reaches the number that rounds to infinity. NaN is asked
//! for where y is NaN, and nothing but NaN; an infinite y asks for that same infinity. A store that saturates where y
//! overflows its type fails.
//!
//! Where no bound exists for all devices and orders of summation, elements have an infinite bound, pass, and are
//! counted as [`Verdict::undecided`]; a verdict that decided nothing does not pass.

macro_rules! modules {
    ($($stem:ident::$operation:ident)*) => { $(pub mod $stem;)* };
}
crate::each_operation!(modules);
mod rounded;

use std::fmt;

pub use self::gemm::{Operands, Oracle, Sample, activation};
use self::rounded::Rounded;
use crate::error::{Result, expect_dtype, expect_shape};
use crate::matrix::{DType, Matrix};

/// Unit round-off of the f32 in which every device accumulates.
const U: f64 = DType::F32.unit_roundoff();
/// What flushing one f32 result or operand to zero can lose: the smallest normal f32.
const FLUSH: f64 = f32::MIN_POSITIVE as f64;
/// One exact output element, and how far a device's f32 result may be from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    /// The exact result; not rounded to the output type.
    pub value: f64,
    /// The error bound. Infinite where nothing can be said; zero where the value is infinite or NaN.
    pub bound: f64,
    output: DType,
}

impl Expected {
    /// How far `got` is from the value, in bounds: up to 1 is right. Infinite if `got` is of another class: NaN for a
    /// number, finite for an infinity, the other infinity. Zero where nothing can be said.
    pub fn error_over_bound(&self, got: f64) -> f64 {
        let Self { value, bound, output } = *self;
        let ratio = |error: f64, bound: f64| if error == 0.0 { 0.0 } else { error / bound };
        if bound.is_infinite() || (value.is_nan() && got.is_nan()) || value == got {
            0.0
        } else if !value.is_finite() || got.is_nan() {
            f64::INFINITY
        } else if got.is_infinite() {
            // An infinity stands for every number that rounds to it: the error is the distance to the nearest of them.
            ratio((limits(output).overflow - value * got.signum()).max(0.0), bound)
        } else {
            let error = ratio((got - value).abs(), bound);
            let flush = limits(output).normal + bound;
            if got == 0.0 && value.abs() < flush { error.min(value.abs() / flush) } else { error }
        }
    }
}

/// What [`Oracle::verify`] or [`Expectation::verify`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Elements that were checked.
    pub checked: usize,
    /// How many of them have no finite bound, so that anything passed.
    pub undecided: usize,
    /// The largest [`Expected::error_over_bound`] of the elements checked.
    pub error_over_bound: f64,
    /// The element that has it; none if nothing was checked.
    pub worst: Option<Worst>,
}

/// The element of an output that is furthest from its expected value, in bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// Output feature.
    pub feature: usize,
    /// Token.
    pub token: usize,
    /// What the device computed.
    pub got: f64,
    /// The exact value.
    pub want: f64,
    /// The error bound.
    pub bound: f64,
}

impl Verdict {
    const EMPTY: Self = Self { checked: 0, undecided: 0, error_over_bound: 0.0, worst: None };

    fn merge(&mut self, other: Self) {
        self.checked += other.checked;
        self.undecided += other.undecided;
        if self.worst.is_none() || other.error_over_bound > self.error_over_bound {
            self.error_over_bound = other.error_over_bound;
            self.worst = other.worst;
        }
    }

    /// Whether every element is within its bound, and of its class. False if there were elements and none of them could
    /// be decided; true for an output without elements.
    pub fn passed(&self) -> bool {
        self.error_over_bound <= 1.0 && (self.checked == 0 || self.undecided < self.checked)
    }
}

impl fmt::Display for Verdict {
    /// One line: the verdict and, if it failed, the worst element with all its values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { checked, undecided, error_over_bound, worst } = self;
        match worst {
            Some(Worst { feature, token, got, want, bound }) if *error_over_bound > 1.0 => write!(
                f,
                "feature {feature}, token {token} is {got:e}, expected {want:e} ± {bound:e}: \
                 {error_over_bound:.3e} bounds off, the worst of {checked} checked"
            )?,
            _ => write!(f, "{checked} elements checked, error/bound {error_over_bound:.3e}")?,
        }
        if *undecided > 0 { write!(f, " ({undecided} overflow f32 and are undecided)") } else { Ok(()) }
    }
}

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

    /// Adds the next element, as far from its exact value as the computation says.
    fn push_near(&mut self, value: f64, computed: Rounded) {
        self.push(value, bounded(value, computed.error));
    }

    /// What it becomes where it is added to f32 numbers that were there: their φ, and two roundings more, as a compiler
    /// may take them into the last sum, in any order. An error if they have another shape.
    pub fn added_to(mut self, before: &Matrix) -> Result<Self> {
        expect_shape("what is added to", (before.rows(), before.cols()), (self.rows, self.cols))?;
        for (i, element) in self.elements.iter_mut().enumerate() {
            let before = Rounded::read(before.get(i / self.cols, i % self.cols), before.dtype());
            let sum = Rounded::sum([before, Rounded::within(element.value, element.bound)].into_iter(), 0);
            *element = stored(sum.value, sum.error, !sum.error.is_finite(), self.output);
        }
        Ok(self)
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

/// What is left of a value when it is stored: as the module's documentation has it.
fn stored(value: f64, error: f64, undecided: bool, output: DType) -> Expected {
    let mut bound = error;
    if output != DType::F32 && value.is_finite() {
        let ulp = 2.0 * output.unit_roundoff();
        bound += (ulp * (value.abs() + error)).max(ulp * limits(output).normal);
    }
    Expected { value, bound: if undecided { f64::INFINITY } else { bound }, output }
}

/// γₖ = K·u / (1 − K·u), the constant of Higham's bounds for `k` roundings with unit round-off `u`; infinite from
/// K·u = 1, where the theory ends.
///
/// ```
/// assert_eq!(sparse24::reference::gamma(2, 0.25), 1.0);
/// assert_eq!(sparse24::reference::gamma(4, 0.25), f64::INFINITY);
/// ```
pub fn gamma(k: usize, u: f64) -> f64 {
    let ku = k as f64 * u;
    if ku < 1.0 { ku / (1.0 - ku) } else { f64::INFINITY }
}

/// Where a type's numbers end.
struct Limits {
    /// The smallest normal number.
    normal: f64,
    /// The smallest number that rounds to infinity: half a unit past the largest.
    overflow: f64,
}

const fn limits(dtype: DType) -> Limits {
    const TWO_128: f64 = 2.0 * (1u128 << 127) as f64;
    let (normal, top) = match dtype {
        DType::F16 => (1.0 / (1 << 14) as f64, (1 << 16) as f64),
        DType::F32 | DType::Bf16 => (FLUSH, TWO_128),
    };
    Limits { normal, overflow: top * (1.0 - 0.5 * dtype.unit_roundoff()) }
}

fn is_subnormal(x: f64, dtype: DType) -> bool {
    x != 0.0 && x.abs() < limits(dtype).normal
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
