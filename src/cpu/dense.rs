//! Dense and masked products on the CPU: by the crate `gemm` for many tokens, by sums of columns for few. Those between
//! are in [`super::tile`].
//!
//! **Many tokens** ([`by_crate`]). Unmasked f32 weights go to the crate `gemm` as they are. Others are widened and
//! masked into scratch, some k at a time, and multiplied from there: no second copy of W, and a cost per weight that
//! the number of tokens divides.
//!
//! **Few tokens** ([`columns`]). The weights' bytes are the cost. W is k-major, so Y is a sum of its rows, each times
//! one activation: four or eight of them at a time are added to sums that stay in a cache. Each weight is read once, in
//! long runs, widened and masked in registers. For a task to read whole rows, so that one run goes on where the last
//! row ended, k is cut into parts, and their sums are added up at the end.
#![allow(unsafe_code, reason = "kernels over vector instructions; the gemm crate takes pointers")]
#![allow(clippy::needless_range_loop, reason = "counters of loops that are unrolled, over arrays of registers")]

use super::epilogue::Finish;
use super::memory::Parts;
use super::weights::{Dense, UNIT, Values, each_type};
use super::{Pool, Scratch};
use crate::matrix::{Elements, each_dtype};
use crate::problem::{Form, Problem};
use crate::simd::{Instructions, Loaded, Simd, Work};

/// Bytes of weights that are widened or masked at a time: enough k for the crate `gemm` to run at its full speed, few
/// enough for its packing to find them in a cache. 4096x128x4096 masked: 1.07 times the speed of dense with 2 and 4
/// MiB, 1.00 with 1, 0.93 with 8.
const STAGE_BYTES: usize = 2 << 20;

/// The product by the crate `gemm`, and then its epilogue.
pub(super) fn by_crate_and_finish(
    pool: &Pool,
    scratch: &Scratch,
    problem: &Problem,
    w: &Dense,
    x: &Elements,
    finish: &Finish<'_>,
) {
    let (rows, cols) = problem.y_shape();
    scratch.with(rows * cols, |sums| {
        by_crate(pool, scratch, problem, w, x, sums);
        let sums = Parts::new(sums);
        pool.each(rows, |row| {
            let (feature, token) = match problem.form {
                Form::Linear => (0, row),
                Form::Gemm => (row, 0),
            };
            // SAFETY: each task has its own row of the sums and of the output.
            unsafe { finish.store(feature, token, sums.part(row * cols..(row + 1) * cols)) };
        });
    });
}

/// The product by the crate `gemm`, without epilogue; sums in the output's layout.
pub(super) fn by_crate(pool: &Pool, scratch: &Scratch, problem: &Problem, w: &Dense, x: &Elements, sums: &mut [f32]) {
    let k = w.k;
    if k == 0 {
        sums.fill(0.0);
        return;
    }
    let multiply = |w_part: &[f32], x: &[f32], from: usize, depth: usize, sums: &mut [f32]| {
        multiply(pool, problem, w_part, w.stride, x, from, depth, sums);
    };
    let with_x = |x: &[f32], sums: &mut [f32]| match (&w.values, &w.mask) {
        (Values::F32(values), None) => {
            let depth = if problem.n <= SHALLOW_TOKENS { SHALLOW } else { k };
            for from in (0..k).step_by(depth) {
                let depth = depth.min(k - from);
                multiply(&values[from * w.stride..][..depth * w.stride], x, from, depth, sums);
            }
        }
        _ => {
            let depth = (STAGE_BYTES / (4 * w.stride)).max(64).min(k);
            scratch.with(depth * w.stride, |stage| {
                for from in (0..k).step_by(depth) {
                    let depth = depth.min(k - from);
                    let parts = Parts::new(&mut stage[..depth * w.stride]);
                    pool.each(depth.div_ceil(STAGE_ROWS), |task| {
                        let rows = task * STAGE_ROWS..depth.min((task + 1) * STAGE_ROWS);
                        // SAFETY: each task has its own rows.
                        let to = unsafe { parts.part(rows.start * w.stride..rows.end * w.stride) };
                        let rows = from + rows.start..from + rows.end;
                        let bits = w.mask.as_ref().map(|mask| &mask[rows.start * w.stride / UNIT..][..to.len() / UNIT]);
                        each_type!(&w.values, v => {
                            pool.simd().run(Stage { from: &v[rows.start * w.stride..][..to.len()], bits, to });
                        });
                    });
                    multiply(&stage[..depth * w.stride], x, from, depth, sums);
                }
            });
        }
    };
    match x {
        Elements::F32(x) => with_x(x, sums),
        x => scratch.with(x.len(), |wide| {
            const PART: usize = 1 << 14;
            let parts = Parts::new(wide);
            each_dtype!(x, x => pool.each(x.len().div_ceil(PART), |task| {
                let range = task * PART..x.len().min((task + 1) * PART);
                // SAFETY: each task has its own part.
                Loaded::widen(&x[range.clone()], unsafe { parts.part(range) });
            }));
            with_x(wide, sums);
        }),
    }
}

/// Most tokens at which W goes to the crate `gemm` so many k at a time. By itself it takes 512, whose packed block is
/// more than a second-level cache of 512 KiB holds: with 256 at a time 4096x8x4096 takes 0.9, 4096x32x4096 0.71 and
/// 4096x128x4096 0.87 times as long, 768x512x3072 1.01 times (EPYC 7003, one thread).
const SHALLOW_TOKENS: usize = 256;
const SHALLOW: usize = 256;

/// k of a task that widens or masks.
const STAGE_ROWS: usize = 16;

/// Widens and masks weights. Lengths are multiples of [`UNIT`].
struct Stage<'a, T> {
    from: &'a [T],
    bits: Option<&'a [u16]>,
    to: &'a mut [f32],
}

impl<T: Loaded> Work for Stage<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { from, bits, to } = self;
        assert!(from.len() == to.len() && from.len().is_multiple_of(UNIT));
        assert!(bits.is_none_or(|bits| bits.len() * UNIT == from.len()));
        for unit in 0..from.len() / UNIT {
            for part in 0..UNIT / S::LANES {
                let at = unit * UNIT + part * S::LANES;
                // SAFETY: whole vectors, by the assertions; the caller has the instructions.
                unsafe {
                    let mut v = T::vector::<S>(from.as_ptr().add(at));
                    if let Some(bits) = bits {
                        v = S::keep(v, *bits.get_unchecked(unit), part);
                    }
                    S::store(to.as_mut_ptr().add(at), v);
                }
            }
        }
    }
}

/// Sums of `depth` k from `from` on, added to those before. `w` is k-major and begins at `from`; `x` is all of it.
#[allow(clippy::too_many_arguments, reason = "the operands of a GEMM")]
fn multiply(
    pool: &Pool,
    problem: &Problem,
    w: &[f32],
    stride: usize,
    x: &[f32],
    from: usize,
    depth: usize,
    sums: &mut [f32],
) {
    let Problem { m, n, k, .. } = *problem;
    // Exact casts: a slice has at most isize::MAX bytes.
    let (ms, ns, ks, stride_w) = (m as isize, n as isize, k as isize, stride as isize);
    assert!(sums.len() == m * n && w.len() == depth * stride && stride >= m && x.len() == n * k && from + depth <= k);
    // Rows, columns, and each matrix with its column stride and row stride. The kernels write along the rows of their
    // output, so a row-major C is computed as its transpose.
    let (rows, cols, to_strides, lhs, rhs) = match problem.form {
        Form::Linear => (m, n, (ms, 1), (w, stride_w, 1), (&x[from..], ks, 1)),
        Form::Gemm => (n, m, (ns, 1), (&x[from * n..], ns, 1), (w, 1, stride_w)),
    };
    // SAFETY: by the assertion above `sums`, `w` and `x` hold m x n, m x depth and depth x n elements with these
    // strides, and `sums` is borrowed exclusively, so it overlaps neither. What `sums` holds is read only where sums of
    // the k before are there.
    pool.by_rayon(|parallelism| unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            rows,
            cols,
            depth,
            sums.as_mut_ptr(),
            to_strides.0,
            to_strides.1,
            from > 0,
            lhs.0.as_ptr(),
            lhs.1,
            lhs.2,
            rhs.0.as_ptr(),
            rhs.1,
            rhs.2,
            if from > 0 { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    });
}

/// Bytes of a task's sums: most of a first-level cache, or a part of the second.
const SUM_BYTES: usize = 64 << 10;

/// k of a task, about: a task reads its rows of W in a few long runs.
const TASK_ROWS: usize = 192;

/// Parts that k is cut into, each with sums of its own: about a multiple of the first, and at most the second.
const MIN_PARTS: usize = 4;
const MAX_PARTS: usize = 64;

/// Features whose sums over the parts of k are added up at a time.
const FOLD: usize = 512;

/// The product with few tokens, as `CpuSchedule::takes` has it.
pub(super) fn columns(pool: &Pool, scratch: &Scratch, problem: &Problem, w: &Dense, x: &Elements, finish: &Finish<'_>) {
    let simd = pool.simd();
    let (n, k) = (problem.n, w.k);
    // Kernels exist for powers of two; tokens past the last are zero.
    let tokens = n.next_power_of_two();
    // By the shape alone, as the parts decide in which order sums are formed.
    let parts = (MIN_PARTS * k.div_ceil(MIN_PARTS * TASK_ROWS)).clamp(1, MAX_PARTS);
    let depth = k.div_ceil(parts).max(AT_ONCE);
    let parts = k.div_ceil(depth);
    let panels = w.stride.div_ceil(SUM_BYTES / 4 / tokens).max(pool.len().div_ceil(parts.max(1)));
    let width = w.stride.div_ceil(panels).next_multiple_of(UNIT);
    let panels = w.stride.div_ceil(width);
    scratch.with(tokens * k, |wide| {
        super::widen_tokens(problem, x, wide, k);
        let wide = &*wide;
        let own = tokens * width;
        scratch.with(panels * parts * own, |sums| {
            let all = Parts::new(sums);
            pool.each(panels * parts, |task| {
                let (from, row) = (task / parts * width, task % parts * depth);
                let (width, depth) = (width.min(w.stride - from), depth.min(k - row));
                // SAFETY: each task has its own sums.
                let sums = unsafe { all.part(task * own..task * own + tokens * width) };
                sums.fill(0.0);
                let columns = Columns { w, tokens, x: wide, from, width, row, depth };
                each_type!(&w.values, values => add_columns(simd, &columns, values, sums));
            });
            let folds = width.div_ceil(FOLD);
            let sums = &*sums;
            pool.each(panels * folds, |task| {
                let (panel, first) = (task / folds, task % folds * FOLD);
                let from = panel * width + first;
                let width = width.min(w.stride - panel * width);
                let features = FOLD.min(width.saturating_sub(first)).min(w.m.saturating_sub(from));
                for token in 0..n {
                    let mut total = [0.0; FOLD];
                    let total = &mut total[..features];
                    let parts = &sums[panel * parts * own..][..parts * own];
                    simd.run(AddParts { parts, stride: own, first: token * width + first, total });
                    // SAFETY: each task has its own features.
                    unsafe { finish.store_features(from, token, total) };
                }
            });
        });
    });
}

/// Adds to each number of `total` those of all parts, which are `stride` apart, from `first` on.
struct AddParts<'a> {
    parts: &'a [f32],
    stride: usize,
    first: usize,
    total: &'a mut [f32],
}

impl Work for AddParts<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { parts, stride, first, total } = self;
        for part in parts.chunks_exact(stride) {
            total.iter_mut().zip(&part[first..]).for_each(|(total, part)| *total += part);
        }
    }
}

/// Some features and some k of W, and all activations.
#[derive(Clone, Copy)]
struct Columns<'a> {
    w: &'a Dense,
    tokens: usize,
    /// A row for each token.
    x: &'a [f32],
    from: usize,
    width: usize,
    row: usize,
    depth: usize,
}

fn add_columns<T: Loaded>(simd: Simd, columns: &Columns<'_>, values: &[T], sums: &mut [f32]) {
    match (columns.w.mask.as_deref(), columns.tokens) {
        (None, 1) => simd.run(AddColumns::<_, false, 1, AT_ONCE> { columns, values, bits: &[], sums }),
        (None, 2) => simd.run(AddColumns::<_, false, 2, 4> { columns, values, bits: &[], sums }),
        (None, 4) => simd.run(AddColumns::<_, false, 4, 4> { columns, values, bits: &[], sums }),
        (Some(bits), 1) => simd.run(AddColumns::<_, true, 1, AT_ONCE> { columns, values, bits, sums }),
        (Some(bits), 2) => simd.run(AddColumns::<_, true, 2, 4> { columns, values, bits, sums }),
        (Some(bits), 4) => simd.run(AddColumns::<_, true, 4, 4> { columns, values, bits, sums }),
        // By `columns`.
        (_, tokens) => unreachable!("{tokens} tokens are no power of two up to four"),
    }
}

/// Most rows of k-major weights that are added at a time: of one token eight take 0.87 to 0.97 times as long as four
/// (Emerald Rapids, AVX-512).
const AT_ONCE: usize = 8;

/// Adds each row of k-major weights, times an activation, to the sums of each token.
struct AddColumns<'a, T, const MASKED: bool, const TOKENS: usize, const ROWS: usize> {
    columns: &'a Columns<'a>,
    values: &'a [T],
    bits: &'a [u16],
    /// `width` for each token.
    sums: &'a mut [f32],
}

impl<T: Loaded, const MASKED: bool, const TOKENS: usize, const ROWS: usize> Work
    for AddColumns<'_, T, MASKED, TOKENS, ROWS>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self {
            columns: &Columns { w: &Dense { k, stride, .. }, x, from, width, row, depth, .. },
            values,
            bits,
            sums,
        } = self;
        assert!(values.len() == k * stride && from + width <= stride && stride.is_multiple_of(UNIT));
        assert!(row + depth <= k);
        assert!(from.is_multiple_of(UNIT) && width.is_multiple_of(UNIT));
        assert!(x.len() == TOKENS * k && sums.len() == TOKENS * width);
        assert!(!MASKED || bits.len() == k * stride / UNIT);
        // SAFETY: k rows of the weights' features, their bits, the activations and the sums are there, by the
        // assertions above; the caller has the instructions.
        unsafe {
            // Far apart: memory serves several runs of lines faster than one.
            let apart = depth / ROWS;
            for row in row..row + apart {
                add_rows::<S, T, MASKED, TOKENS, ROWS>(row, apart, k, stride, from, width, values, bits, x, sums);
            }
            for row in row + apart * ROWS..row + depth {
                add_rows::<S, T, MASKED, TOKENS, 1>(row, 0, k, stride, from, width, values, bits, x, sums);
            }
        }
    }
}

/// # Safety
/// As in [`AddColumns::run`], for `AT_ONCE` rows from `row` on, each `apart` from the last.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the fields of AddColumns")]
unsafe fn add_rows<S: Instructions, T: Loaded, const MASKED: bool, const TOKENS: usize, const AT_ONCE: usize>(
    row: usize,
    apart: usize,
    k: usize,
    stride: usize,
    from: usize,
    width: usize,
    values: &[T],
    bits: &[u16],
    x: &[f32],
    sums: &mut [f32],
) {
    // SAFETY: to the end, as the caller vouches.
    unsafe {
        let mut splat = [[S::splat(0.0); AT_ONCE]; TOKENS];
        for t in 0..TOKENS {
            for r in 0..AT_ONCE {
                splat[t][r] = S::splat(*x.get_unchecked(t * k + row + r * apart));
            }
        }
        for unit in 0..width / UNIT {
            for part in 0..UNIT / S::LANES {
                let at = unit * UNIT + part * S::LANES;
                let mut v = [S::splat(0.0); AT_ONCE];
                for r in 0..AT_ONCE {
                    let start = (row + r * apart) * stride + from;
                    v[r] = T::vector::<S>(values.as_ptr().add(start + at));
                    if MASKED {
                        v[r] = S::keep(v[r], *bits.get_unchecked(start / UNIT + unit), part);
                    }
                }
                for t in 0..TOKENS {
                    let sum = sums.as_mut_ptr().add(t * width + at);
                    let mut acc = S::load(sum);
                    for r in 0..AT_ONCE {
                        acc = S::fma(splat[t][r], v[r], acc);
                    }
                    S::store(sum, acc);
                }
            }
        }
    }
}
