//! Numbers as a device may compute them in f32: the exact value, and how far a result may be from it.
//!
//! Bounds that are a walk through the computation are written as that walk: each operation here takes the errors of its
//! operands along, adds its own as [`super`] has it, and keeps the exact value beside them. Fewer roundings, as of
//! fused multiply-adds, are covered, and so is any order of a sum. Invariant: an error that is not known is infinite.

use super::{FLUSH, U, bounded, gamma, inverse_root, phi};
use crate::matrix::DType;

/// A number, and how far a device's may be from it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounded {
    pub(super) value: f64,
    pub(super) error: f64,
}

impl Rounded {
    /// What is known exactly.
    pub(super) fn exact(value: f64) -> Self {
        Self { value, error: 0.0 }
    }

    /// An operand of a type, which may be taken for zero where it is subnormal.
    pub(super) fn read(x: f32, storage: DType) -> Self {
        let value = f64::from(x);
        Self { value, error: phi(value, storage) }
    }

    /// A value that is off by `error` before it is rounded.
    fn round(value: f64, error: f64) -> Self {
        Self::within(value, error + U * (value.abs() + error) + FLUSH)
    }

    /// A value that is off by `error`.
    pub(super) fn within(value: f64, error: f64) -> Self {
        Self { value, error: if error.is_nan() { f64::INFINITY } else { error } }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self::round(self.value + other.value, self.error + other.error)
    }

    pub(super) fn minus(self, other: Self) -> Self {
        self.plus(Self { value: -other.value, ..other })
    }

    pub(super) fn times(self, other: Self) -> Self {
        let (a, b) = (self.value.abs(), other.value.abs());
        let error = a * other.error + b * self.error + self.error * other.error;
        Self::round(self.value * other.value, error)
    }

    /// Sum of all, with `more` roundings beside those of the additions.
    pub(super) fn sum(terms: impl Iterator<Item = Self>, more: usize) -> Self {
        let (mut value, mut abs, mut error, mut count) = (0.0, 0.0, 0.0, 0);
        for term in terms {
            value += term.value;
            abs += term.value.abs();
            error += term.error;
            count += 1;
        }
        // One addition fewer than terms; an oracle's own error is far below the one that is left.
        let lost = count as f64 * FLUSH;
        Self::within(value, bounded(abs, error + gamma(count + more, U) * (abs + error) + lost))
    }

    /// Mean of all: the sum, and a division or a product with a reciprocal.
    pub(super) fn mean(terms: impl ExactSizeIterator<Item = Self>) -> Self {
        let count = terms.len().max(1) as f64;
        let Self { value, error } = Self::sum(terms, 6);
        Self::within(value / count, error / count + 2.0 * FLUSH)
    }

    /// It over a whole number, in a division or a product with a reciprocal.
    pub(super) fn over(self, count: usize) -> Self {
        Self::mean(std::iter::once(self)).times_exactly(1.0 / count as f64)
    }

    /// It times a number, without a rounding.
    fn times_exactly(self, factor: f64) -> Self {
        Self::within(self.value * factor, self.error * factor + FLUSH)
    }

    /// 1/√ of it.
    pub(super) fn inverse_root(self) -> Self {
        let (value, error) = inverse_root(self.value, self.error);
        Self::within(value, error)
    }
}
