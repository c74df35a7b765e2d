//! Loops over rows of tensors, for the operations between the GEMMs.
//!
//! Loops run over plain slices in steps of [`LANES`], which the compiler turns into SIMD instructions of whatever width
//! the function that they are inlined into may use: hence `inline(always)`. Invariant: each output element is computed
//! by one thread from its own inputs, in an order that depends on the shapes alone, so results do not depend on the
//! number of threads.

use rayon::prelude::*;

use super::Cpu;
pub(crate) use super::epilogue::{activate, exp};
pub(crate) use super::memory::{Run, Strip, Strips};
use crate::matrix::Element;

/// Sums that a loop keeps side by side: a register of AVX-512, two of AVX2, four of SSE2 or NEON.
pub(crate) const LANES: usize = 16;

/// Tokens of a task of what costs little per token.
pub(crate) const TASK_TOKENS: usize = 16;

/// Runs `$body` for inputs and an output of the types that kernels store.
macro_rules! each_pair {
    ($x:expr, $y:expr, ($a:ident, $b:ident) => $body:expr) => {
        match ($x, $y) {
            ($crate::Elements::F32($a), $crate::Elements::F32($b)) => $body,
            ($crate::Elements::F32($a), $crate::Elements::F16($b)) => $body,
            ($crate::Elements::F16($a), $crate::Elements::F32($b)) => $body,
            ($crate::Elements::F16($a), $crate::Elements::F16($b)) => $body,
            // Refused when the call is prepared.
            ($crate::Elements::Bf16(_), _) | (_, $crate::Elements::Bf16(_)) => {}
        }
    };
}
pub(crate) use each_pair;

/// A loop as work: a struct of its arguments, as it is compiled for each level that it is inlined into. The call may name
/// the level's instructions, `S`.
macro_rules! work {
    ($name:ident<$($type:ident),*>, { $($field:ident: $of:ty),+ $(,)? }, $call:expr) => {
        struct $name<'a, $($type),*> {
            $($field: $of),+
        }

        impl<'a, $($type: $crate::Element),*> $crate::simd::Work for $name<'a, $($type),*> {
            type Output = ();

            #[inline(always)]
            #[allow(unsafe_code, reason = "plain loops, which the level's function turns into its instructions")]
            unsafe fn run<S: $crate::simd::Instructions>(self) {
                let Self { $($field),+ } = self;
                $call
            }
        }
    };
}
pub(crate) use work;

/// Sum of `of(a)` over a slice: lane by lane, then over the lanes.
#[inline(always)]
pub(crate) fn sum_of<X: Element>(x: &[X], of: impl Fn(f32) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += of(x.to_f32());
        }
    }
    let tail: f32 = rest.iter().map(|x| of(x.to_f32())).sum();
    lanes.iter().sum::<f32>() + tail
}

/// 1/√t of a mean or sum of squares, and NaN of one that has overflowed: zero, its limit, would make finite numbers of
/// what cannot be told.
#[inline(always)]
pub(crate) fn inverse_root(t: f32) -> f32 {
    if t == f32::INFINITY { f32::NAN } else { 1.0 / t.sqrt() }
}

impl Cpu {
    /// Gives the threads chunks of `len` elements of `y` (the last may be shorter), with their numbers.
    pub(crate) fn each_chunk<Y: Send>(&self, y: &mut [Y], len: usize, work: impl Fn(usize, &mut [Y]) + Sync) {
        if !y.is_empty() {
            self.pool.enter(|| match self.pool.threads {
                Some(_) => y.par_chunks_mut(len).enumerate().for_each(|(i, chunk)| work(i, chunk)),
                None => y.chunks_mut(len).enumerate().for_each(|(i, chunk)| work(i, chunk)),
            });
        }
    }
}
