//! Loops over rows of tensors, for the operations between the GEMMs.
//!
//! Loops run over plain slices in steps of [`LANES`], which the compiler turns into SIMD instructions of whatever width
//! the function that they are inlined into may use: hence `inline(always)`. Invariant: each output element is computed
//! by one thread from its own inputs, in an order that depends on the shapes alone, so results do not depend on the
//! number of threads.
#![allow(unsafe_code, reason = "threads write disjoint parts of one output")]

pub(crate) use super::epilogue::{activate, exp, slope};
use super::memory::Chunks;
pub(crate) use super::memory::{Run, Strip, Strips};
use super::{Cpu, Shared};
use crate::matrix::{Element, Elements};

/// Sums that a loop keeps side by side: a register of AVX-512, two of AVX2, four of SSE2 or NEON.
pub(crate) const LANES: usize = 16;

/// Tokens of a task of what costs little per token.
pub(crate) const TASK_TOKENS: usize = 16;

/// Where a gradient goes.
#[derive(Debug)]
pub(crate) struct Target {
    /// A matrix of f32.
    pub(crate) to: Shared,
    /// Whether it is added to what is there.
    pub(crate) add: bool,
}

/// Stores an element of a gradient, or adds it to what is there.
#[inline(always)]
pub(crate) fn put(to: &mut f32, value: f32, add: bool) {
    *to = if add { *to + value } else { value };
}

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

/// A loop as work: a struct of its arguments, as it is compiled for each level that it is inlined into. The call may
/// name the level's instructions, `S`.
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

/// As [`work!`], of f32 alone.
macro_rules! work_of_f32 {
    ($name:ident, { $($field:ident: $of:ty),+ $(,)? }, $call:expr) => {
        struct $name<'a> {
            $($field: $of),+
        }

        impl<'a> $crate::simd::Work for $name<'a> {
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
pub(crate) use work_of_f32;

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

/// Sums of what `of` makes of the elements of three slices of one length: lane by lane, then over the lanes.
#[inline(always)]
pub(crate) fn sums_of<const N: usize>(
    (a, b, c): (&[f32], &[f32], &[f32]),
    of: impl Fn(f32, f32, f32) -> [f32; N],
) -> [f32; N] {
    let ((a, a_rest), (b, b_rest), (c, c_rest)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let mut lanes = [[0.0f32; LANES]; N];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            let terms = of(a[lane], b[lane], c[lane]);
            lanes.iter_mut().zip(terms).for_each(|(lanes, term)| lanes[lane] += term);
        }
    }
    let mut tail = [0.0; N];
    for ((&a, &b), &c) in a_rest.iter().zip(b_rest).zip(c_rest) {
        tail.iter_mut().zip(of(a, b, c)).for_each(|(tail, term)| *tail += term);
    }
    std::array::from_fn(|n| lanes[n].iter().sum::<f32>() + tail[n])
}

/// 1/√t of a mean or sum of squares, and NaN of one that has overflowed: zero, its limit, would make finite numbers of
/// what cannot be told.
#[inline(always)]
pub(crate) fn inverse_root(t: f32) -> f32 {
    if t == f32::INFINITY { f32::NAN } else { 1.0 / t.sqrt() }
}

impl Cpu {
    /// Gives the threads chunks of `len` elements of `y` (the last may be shorter), with their numbers. One chunk is
    /// the calling thread's own, so that no other wakes up for it.
    pub(crate) fn each_chunk<Y: Send>(&self, y: &mut [Y], len: usize, work: impl Fn(usize, &mut [Y]) + Sync) {
        let y = Chunks::new(y, len);
        // SAFETY: each task takes its own.
        self.pool.each(y.count(), |i| work(i, unsafe { y.get(i) }));
    }

    /// As [`Cpu::each_chunk`], with chunks of four outputs of one length.
    pub(crate) fn each_chunk_of_four<Y: Send>(
        &self,
        all: [&mut [Y]; 4],
        len: usize,
        work: impl Fn([&mut [Y]; 4]) + Sync + Send,
    ) {
        let all = all.map(|y| Chunks::new(y, len));
        let count = all.iter().map(Chunks::count).min().unwrap_or(0);
        // SAFETY: each task takes its own.
        self.pool.each(count, |i| work(all.each_ref().map(|y| unsafe { y.get(i) })));
    }

    /// As [`Cpu::each_chunk`], with chunks of two outputs that belong together.
    pub(crate) fn each_chunk_of_two<Y: Send, Z: Send>(
        &self,
        (y, y_len): (&mut [Y], usize),
        (z, z_len): (&mut [Z], usize),
        work: impl Fn(usize, &mut [Y], &mut [Z]) + Sync,
    ) {
        let (y, z) = (Chunks::new(y, y_len), Chunks::new(z, z_len));
        // SAFETY: each task takes its own.
        self.pool.each(y.count().min(z.count()), |i| unsafe { work(i, y.get(i), z.get(i)) });
    }

    /// The gradients of a norm over `width` features: `tokens` is given x and dy of some tokens, whether to add, their
    /// dx (empty where it is not wanted) and room for a sum over them for each of `sums`.
    pub(crate) fn grad_norm(
        &self,
        (x, dy, width): (&[f32], &[f32], usize),
        dx: Option<&Target>,
        sums: &[Option<Target>],
        tokens: impl Fn((&[f32], &[f32]), bool, &mut [f32], &mut [f32]) + Sync,
    ) {
        let (task, room) = (TASK_TOKENS * width, sums.len() * width);
        if width == 0 {
            return;
        }
        self.with_scratch(x.len().div_ceil(task) * room, |parts| {
            let add = dx.is_some_and(|dx| dx.add);
            let of_task = |i: usize, dx: &mut [f32], parts: &mut [f32]| {
                let range = i * task..x.len().min((i + 1) * task);
                tokens((&x[range.clone()], &dy[range]), add, dx, parts);
            };
            match dx {
                Some(dx) => {
                    let mut dx = super::write(&dx.to);
                    let Elements::F32(dx) = dx.elements_mut() else { return };
                    self.each_chunk_of_two((dx, task), (parts, room), of_task);
                }
                None => self.each_chunk(parts, room, |i, parts| of_task(i, &mut [], parts)),
            }
            for (which, target) in sums.iter().enumerate() {
                if let Some(target) = target {
                    self.fold(parts, room, which * width, target);
                }
            }
        });
    }

    /// Adds up the rows of some parts, `stride` apart, from their element `first` on, in their order: a gradient that
    /// is a sum over tokens, from the sums over blocks of them.
    fn fold(&self, parts: &[f32], stride: usize, first: usize, target: &Target) {
        const RUN: usize = 64;
        let mut to = super::write(&target.to);
        let Elements::F32(to) = to.elements_mut() else { return };
        self.each_chunk(to, RUN, |run, to| {
            let mut sums = [0.0; RUN];
            for part in parts.chunks_exact(stride) {
                for (sum, part) in sums[..to.len()].iter_mut().zip(&part[first + run * RUN..]) {
                    *sum += part;
                }
            }
            to.iter_mut().zip(sums).for_each(|(to, sum)| put(to, sum, target.add));
        });
    }
}
