//! Dense and masked products of some tokens on the CPU: in tiles of features and tokens whose sums stay in registers
//! over some rows of W.
//!
//! From five tokens on to some dozens the crate `gemm` spends more on packing W than on multiplying it, and [`columns`]
//! more on its sums than on the weights. W is k-major, so two vectors of neighbouring features are ready to be loaded,
//! and each activation, broadcast once, serves both: with AVX-512 and 8 tokens 10 loads for 16 multiply-adds, which are
//! as many chains. Some rows of W are gone through together, a tile after the other, so that each row is read in a run;
//! their sums are loaded and stored once. The second-level cache is asked for the same features of the next rows; a
//! second tile of tokens finds its weights in the first. Activations are packed by tile, k-major.
//!
//! On a Xeon with AVX-512 (Emerald Rapids, one thread) 1536x16x384 takes 0.20 ms in place of 0.31 by sums of columns,
//! and 1536x24x384 0.25 in place of 0.45 by the crate `gemm`; with 5 tokens, where memory is the limit, 0.151 in place
//! of 0.139. At 64 tokens it is 0.95 to 1.19 times as fast as the crate, so that 48 are the most that it takes
//! (benches/results/2026-11-30-intel-xeon).
//!
//! Tried and rejected: all of k at a time, which needs no sums in memory, but reads W in pieces of 128 bytes, a row
//! apart: 1536x5x384 1.7 times as long, 1536x16x384 1.6 times.
//!
//! A sum is formed by one thread, in f32, in increasing k, whatever the tile and the number of threads.
//!
//! [`columns`]: super::dense::columns
#![allow(unsafe_code, reason = "kernels over vector instructions; threads write disjoint parts of buffers")]
#![allow(clippy::needless_range_loop, reason = "counters of loops that are unrolled, over arrays of registers")]

use super::epilogue::Finish;
use super::memory::Parts;
use super::permute::Tiling;
use super::sparse::Pack;
use super::weights::{Dense, UNIT, each_type};
use super::{Pool, Scratch};
use crate::matrix::{Elements, each_dtype};
use crate::problem::Problem;
use crate::simd::{Instructions, Loaded, SimdLevel, Work};

/// Vectors of features of a tile.
const VECTORS: usize = 2;

/// Tokens of a tile: as many sums as registers hold beside two vectors of weights and an activation.
fn sizes(level: SimdLevel) -> &'static [usize] {
    match level {
        SimdLevel::Avx512 => &[6, 8, 12],
        _ => &[4, 6],
    }
}

/// Rows of W that a panel meets at a time: it goes on with the same rows of the next features, so that each row is read
/// in a run, and sums are loaded and stored once for so many multiply-adds.
const DEPTH: usize = 32;

/// Bytes of a task's sums: half of a first-level cache.
const SUM_BYTES: usize = 24 << 10;

/// The product, of at least one token.
pub(super) fn tile(pool: &Pool, scratch: &Scratch, problem: &Problem, w: &Dense, x: &Elements, finish: &Finish<'_>) {
    let simd = pool.simd();
    let tiling = Tiling::new(problem.n, sizes(simd.level()));
    let (tokens, k) = (tiling.count * tiling.tokens, w.k);
    scratch.with(tokens * k, |packed| {
        // k of a task that packs.
        const PACK: usize = 256;
        let cuts = k.div_ceil(PACK);
        let parts = Parts::new(packed);
        pool.each(tiling.count * cuts, |task| {
            let (tile, from) = (task / cuts, task % cuts * PACK);
            let (width, depth) = (tiling.tokens, PACK.min(k - from));
            let start = (tile * k + from) * width;
            // SAFETY: each task has its own part.
            let out = unsafe { parts.part(start..start + depth * width) };
            each_dtype!(x, x => simd.run(Pack { x, problem, token0: tile * width, k0: from, width, out }));
        });
        let packed = &*packed;
        let panel = (VECTORS * simd.level().lanes()).max(UNIT);
        let panels = w.stride.div_ceil(panel);
        let most = (SUM_BYTES / 4 / tokens / panel).max(1);
        let tasks = panels.min(4 * pool.len()).max(panels.div_ceil(most));
        pool.each(tasks, |task| {
            let at = |task: usize| (panels * task / tasks * panel).min(w.stride);
            let (from, width) = (at(task), at(task + 1) - at(task));
            scratch.with(tokens * width, |sums| {
                let rows = Features { w, from, width, tiling, x: packed };
                macro_rules! by_tokens {
                    ($($tokens:literal),*) => {
                        match (tiling.tokens, &w.mask) {
                            $(($tokens, None) => each_type!(&w.values, values => {
                                simd.run(Tiles::<_, false, $tokens> { rows, values, bits: &[], sums });
                            }),
                            ($tokens, Some(bits)) => each_type!(&w.values, values => {
                                simd.run(Tiles::<_, true, $tokens> { rows, values, bits, sums });
                            }),)*
                            // By `sizes`.
                            (tokens, _) => unreachable!("no tile has {tokens} tokens"),
                        }
                    };
                }
                by_tokens!(4, 6, 8, 12);
                if k == 0 {
                    sums.fill(0.0);
                }
                let features = width.min(w.m.saturating_sub(from));
                for token in 0..problem.n {
                    // SAFETY: each task has its own features.
                    unsafe { finish.store_features(from, token, &mut sums[token * width..][..features]) };
                }
            });
        });
    });
}

/// Some features of W, and all activations.
#[derive(Clone, Copy)]
struct Features<'a> {
    w: &'a Dense,
    from: usize,
    width: usize,
    tiling: Tiling,
    /// For each tile and k, the tile's tokens.
    x: &'a [f32],
}

/// Forms the sums of some features, `TOKENS` tokens at a time.
struct Tiles<'a, T, const MASKED: bool, const TOKENS: usize> {
    rows: Features<'a>,
    values: &'a [T],
    bits: &'a [u16],
    /// For each token, the features.
    sums: &'a mut [f32],
}

impl<T: Loaded, const MASKED: bool, const TOKENS: usize> Work for Tiles<'_, T, MASKED, TOKENS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        // What never runs should not be compiled.
        if const { S::LANES == 16 && TOKENS < 6 || S::LANES < 16 && TOKENS > 6 } {
            unreachable!("{TOKENS} tokens are not a tile of {} lanes", S::LANES);
        }
        let Self { rows: Features { w: &Dense { k, stride, .. }, from, width, tiling, x }, values, bits, sums } = self;
        assert!(values.len() == k * stride && stride.is_multiple_of(UNIT));
        assert!(from + width <= stride && from.is_multiple_of(UNIT) && width.is_multiple_of(UNIT));
        assert!(x.len() == tiling.count * TOKENS * k && sums.len() == tiling.count * TOKENS * width);
        assert!(!MASKED || bits.len() == k * stride / UNIT);
        let panel = VECTORS * S::LANES;
        for row in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - row);
            // The same features of the next rows, and after the last ones the first rows of the features behind these.
            let next = if row + depth < k { depth * stride } else { width.wrapping_sub(row * stride) };
            for first in (0..width).step_by(panel) {
                for tile in 0..tiling.count {
                    let ahead = (tile == 0).then_some(next);
                    let block = Block { row, depth, stride, feature: from + first, bits, ahead, width };
                    // SAFETY: the rows' weights and bits, the tile's activations and its sums are there, by the
                    // assertions above; `width` is a multiple of every vector's length, so that what is no whole panel
                    // is one vector; the caller has the instructions.
                    unsafe {
                        let x = x.as_ptr().add((tile * k + row) * TOKENS);
                        let (values, sums) = (values.as_ptr(), sums.as_mut_ptr().add(tile * TOKENS * width + first));
                        if first + panel <= width {
                            block.add::<S, T, MASKED, VECTORS, TOKENS>(values, x, sums);
                        } else {
                            block.add::<S, T, MASKED, 1, TOKENS>(values, x, sums);
                        }
                    }
                }
            }
        }
    }
}

/// Some k of a tile's weights.
#[derive(Clone, Copy)]
struct Block<'a> {
    row: usize,
    depth: usize,
    stride: usize,
    feature: usize,
    bits: &'a [u16],
    /// How far away lies what will be read next, if the cache is to be asked for it.
    ahead: Option<usize>,
    /// How far sums of tokens are apart.
    width: usize,
}

impl Block<'_> {
    /// Adds to the sums, or starts them with the first rows, the products of `VECS` vectors of features and `TOKENS`
    /// tokens.
    ///
    /// # Safety
    /// The processor must have the instructions; weights from the first on, bits, and the activations and sums of the
    /// tile must be there.
    #[inline(always)]
    unsafe fn add<S: Instructions, T: Loaded, const MASKED: bool, const VECS: usize, const TOKENS: usize>(
        self,
        values: *const T,
        x: *const f32,
        sums: *mut f32,
    ) {
        let Self { row, depth, stride, feature, bits, ahead, width } = self;
        // SAFETY: as the caller vouches; a prefetch reads nothing.
        unsafe {
            let mut acc = [[S::splat(0.0); TOKENS]; VECS];
            if row > 0 {
                for t in 0..TOKENS {
                    for i in 0..VECS {
                        acc[i][t] = S::load(sums.add(t * width + i * S::LANES));
                    }
                }
            }
            for step in 0..depth {
                let start = (row + step) * stride + feature;
                let mut v = [S::splat(0.0); VECS];
                for i in 0..VECS {
                    let value = values.add(start + i * S::LANES);
                    // Once for each line.
                    if let Some(ahead) = ahead
                        && (i * S::LANES * size_of::<T>()).is_multiple_of(64)
                    {
                        S::prefetch(value.wrapping_add(ahead).cast());
                    }
                    v[i] = T::vector::<S>(value);
                    if MASKED {
                        let at = start + i * S::LANES;
                        v[i] = S::keep(v[i], *bits.get_unchecked(at / UNIT), at % UNIT / S::LANES);
                    }
                }
                for t in 0..TOKENS {
                    let activation = S::splat(*x.add(step * TOKENS + t));
                    for i in 0..VECS {
                        acc[i][t] = S::fma(activation, v[i], acc[i][t]);
                    }
                }
            }
            for t in 0..TOKENS {
                for i in 0..VECS {
                    S::store(sums.add(t * width + i * S::LANES), acc[i][t]);
                }
            }
        }
    }
}
