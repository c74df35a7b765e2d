//! 2:4 products of some tokens on the CPU: by permuted vectors, as for few, in tiles of tokens whose sums stay in
//! registers.
//!
//! From five tokens on memory no longer takes all the time, and up to some dozens a vector of tokens, as `gather` has
//! it, is filled badly or costs too much beside it: of each kept weight a position, an address and a value to
//! broadcast. Here lanes are values of a pair of rows, as in `gemv` (see [`super::weights`] and [`super::sparse`]): a
//! word of codes is decoded by one shift for 16 values, and each token costs a permutation and a multiply-add. Both run
//! on the same two ports of a core with AVX-512: 16 values times 16 tokens take 16 cycles or a little more, half of
//! what multiply-adds alone would take, and no instruction is spent on a single weight.
//!
//! A *tile* is some tokens' sums of one pair, or of two that share their codes and with them the permutations. Tokens
//! are packed by tile and unit of k, so that a tile reads its activations from start to end and not, where k is a power
//! of two, all tokens' from the same few lines of a cache. k is cut into *runs* of steps, whose activations fill most
//! of a first-level cache; over a run sums stay in registers. Weights of a run are in pieces of a step, so the caches
//! are asked for each piece of the next run while the piece of this one is read.
//!
//! The permutation of a model's channels, which pruning looks for, is another thing: see [`crate::prune`].
//!
//! A row's sum is formed by one thread, as in `gemv`, in increasing k: it depends on the width of vectors alone.
#![allow(unsafe_code, reason = "kernels over vector instructions; threads write disjoint parts of buffers")]
#![allow(clippy::needless_range_loop, reason = "counters of loops that are unrolled, over arrays of registers")]

use super::epilogue::Finish;
use super::memory::Parts;
use super::sparse::{SumPairs, step_tokens};
use super::weights::{BLOCK, Codes, Packed, UNIT, each_type};
use super::{Pool, Scratch};
use crate::mask::VectorLen;
use crate::matrix::{Elements, each_dtype};
use crate::problem::{Form, Problem};
use crate::simd::{Instructions, Loaded, Simd, SimdLevel, Work};

/// Pairs of a tile, which share their codes, and the numbers of tokens that there are kernels for: as many sums as
/// registers hold beside the rest.
fn tiles(vector: VectorLen, level: SimdLevel) -> (usize, &'static [usize]) {
    match (vector.get(), level) {
        (1 | 2, SimdLevel::Avx512) => (1, &[8, 12, 16]),
        (_, SimdLevel::Avx512) => (2, &[6, 8, 12]),
        (1 | 2, _) => (1, &[6, 8]),
        (_, _) => (2, &[4, 6]),
    }
}

/// How tokens are cut into tiles.
#[derive(Clone, Copy)]
pub(super) struct Tiling {
    pub(super) count: usize,
    /// Tokens of each; those past the last token are zero.
    pub(super) tokens: usize,
}

impl Tiling {
    /// As few multiplications of padding as there can be, and of such tilings as few tiles.
    pub(super) fn new(n: usize, sizes: &[usize]) -> Self {
        let tilings = sizes.iter().map(|&tokens| Self { count: n.div_ceil(tokens), tokens });
        tilings
            .min_by_key(|tiling| (tiling.count * tiling.tokens, tiling.count))
            .unwrap_or(Self { count: 0, tokens: 1 })
    }
}

/// The product, of at least one token.
pub(super) fn permute(
    pool: &Pool,
    scratch: &Scratch,
    problem: &Problem,
    w: &Packed,
    x: &Elements,
    finish: &Finish<'_>,
) {
    let simd = pool.simd();
    let (_, sizes) = tiles(w.vector, simd.level());
    let tiling = Tiling::new(problem.n, sizes);
    let tokens = tiling.count * tiling.tokens;
    scratch.with(tokens * w.units() * UNIT, |packed| {
        pack(pool, problem, w.units(), tiling, x, packed);
        let packed = &*packed;
        let cuts = pool.cuts(w.blocks(), 8);
        pool.each(w.blocks() * cuts, |task| {
            let (block, cut) = (task / cuts, task % cuts);
            // In fours, which pairs that share codes come in.
            let at = |cut: usize| (w.pairs(block).div_ceil(4) * cut / cuts * 4).min(w.pairs(block));
            let rows = Rows { w, block, from: at(cut), to: at(cut + 1), tiling, x: packed };
            rows.run(simd, scratch, problem.n, finish);
        });
    });
}

/// Packs activations by unit, tile and token: `UNIT` of each, zero past the last k and the last token.
fn pack(pool: &Pool, problem: &Problem, units: usize, tiling: Tiling, x: &Elements, to: &mut [f32]) {
    // Units of a task.
    const TASK: usize = 16;
    let of_unit = tiling.count * tiling.tokens * UNIT;
    let parts = Parts::new(to);
    pool.each(units.div_ceil(TASK), |task| {
        let units = task * TASK..units.min((task + 1) * TASK);
        // SAFETY: each task has its own units.
        let to = unsafe { parts.part(units.start * of_unit..units.end * of_unit) };
        each_dtype!(x, x => pool.simd().run(Pack { x, problem, unit0: units.start, of_unit, to }));
    });
}

struct Pack<'a, T> {
    x: &'a [T],
    problem: &'a Problem,
    unit0: usize,
    of_unit: usize,
    to: &'a mut [f32],
}

impl<T: Loaded> Work for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { x, problem: &Problem { n, k, form, .. }, unit0, of_unit, to } = self;
        for (unit, to) in to.chunks_exact_mut(of_unit).enumerate() {
            let first = (unit0 + unit) * UNIT;
            for (token, to) in to.chunks_exact_mut(UNIT).enumerate() {
                let given = if token < n { UNIT.min(k - first) } else { 0 };
                match form {
                    Form::Linear if given == UNIT => {
                        let x = &x[token * k + first..][..UNIT];
                        for part in (0..UNIT).step_by(S::LANES) {
                            // SAFETY: whole vectors of `UNIT` numbers; the caller has the instructions.
                            unsafe { S::store(to.as_mut_ptr().add(part), T::vector::<S>(x.as_ptr().add(part))) };
                        }
                    }
                    Form::Linear => (0..given).for_each(|i| to[i] = x[token * k + first + i].to_f32()),
                    Form::Gemm => (0..given).for_each(|i| to[i] = x[(first + i) * n + token].to_f32()),
                }
                to[given..].fill(0.0);
            }
        }
    }
}

/// Some pairs of rows of a block, times all tokens.
struct Rows<'a> {
    w: &'a Packed,
    block: usize,
    from: usize,
    to: usize,
    tiling: Tiling,
    x: &'a [f32],
}

impl Rows<'_> {
    fn run(&self, simd: Simd, scratch: &Scratch, n: usize, finish: &Finish<'_>) {
        let Self { w, block, from, to, tiling, .. } = *self;
        let (pairs, lanes) = (to - from, simd.level().lanes());
        if pairs == 0 {
            return;
        }
        let stride = tiling.count * tiling.tokens * lanes;
        // Sums are added up for eight pairs at a time.
        scratch.with((pairs + 7) * stride, |sums| {
            let (own, _) = sums.split_at_mut(pairs * stride);
            own.fill(0.0);
            // As many steps as there are tokens to a step's panel: then activations fill as much of a cache.
            let steps = (step_tokens(w.vector, simd.level()) / (stride / lanes)).max(1);
            for first in (0..w.steps()).step_by(steps) {
                let steps = steps.min(w.steps() - first);
                each_type!(&w.values, values => self.add(simd, values, first, steps, own));
            }
            let feature0 = block * BLOCK + 2 * from;
            let features = (2 * to).min(w.rows(block)) - 2 * from;
            let mut run = [0.0; BLOCK];
            for token in 0..n {
                simd.run(SumPairs { sums: &sums[token * lanes..], stride, pairs, to: &mut run });
                // SAFETY: each task has its own features.
                unsafe { finish.store_features(feature0, token, &mut run[..features]) };
            }
        });
    }

    fn add<T: Loaded>(&self, simd: Simd, values: &[T], first: usize, steps: usize, sums: &mut [f32]) {
        macro_rules! by_tile {
            ($($shared:literal, $pairs:literal: $($tokens:literal),*;)*) => {
                match (self.w.vector != VectorLen::ONE, tiles(self.w.vector, simd.level()).0, self.tiling.tokens) {
                    $($(($shared, $pairs, $tokens) => {
                        simd.run(AddRun::<T, $shared, $pairs, $tokens> { rows: self, values, first, steps, sums });
                    })*)*
                    // By `tiles`.
                    (_, pairs, tokens) => unreachable!("no tile has {pairs} pairs and {tokens} tokens"),
                }
            };
        }
        by_tile! {
            false, 1: 6, 8, 12, 16;
            true, 1: 6, 8, 12, 16;
            true, 2: 4, 6, 8, 12;
        }
    }
}

/// Adds some steps of k to the sums of some rows, `PAIRS` pairs at a time.
struct AddRun<'a, T, const SHARED: bool, const PAIRS: usize, const TOKENS: usize> {
    rows: &'a Rows<'a>,
    values: &'a [T],
    /// First step.
    first: usize,
    steps: usize,
    /// For each pair a vector for each token.
    sums: &'a mut [f32],
}

/// Where a run of steps of a block lies. Calls while sums are in registers would have to save them all.
#[derive(Clone, Copy)]
struct Run<T> {
    steps: usize,
    /// Units of a step, and of the last one.
    units: usize,
    last: usize,
    /// The first step, and how far apart steps are.
    values: *const T,
    values_step: usize,
    codes: *const u8,
    codes_step: usize,
    /// Pairs that share a unit of codes.
    per: usize,
    /// Of the first step; a unit is `tokens` times `UNIT` numbers.
    x: *const f32,
    tokens: usize,
}

impl<T: Loaded, const SHARED: bool, const PAIRS: usize, const TOKENS: usize> Work
    for AddRun<'_, T, SHARED, PAIRS, TOKENS>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        // What never runs should not be compiled.
        if const { S::LANES < 16 && PAIRS * TOKENS > 12 || S::LANES == 16 && PAIRS * TOKENS < 8 } {
            unreachable!("{PAIRS} pairs and {TOKENS} tokens are not a tile of {} lanes", S::LANES);
        }
        let Self { rows: &Rows { w, block, from, to, tiling, x }, values, first, steps, sums } = self;
        let (tokens, units) = (tiling.count * TOKENS, w.step);
        assert!(steps > 0 && first + steps <= w.steps() && from <= to && to <= w.pairs(block));
        assert!(values.len() == w.m.div_ceil(2) * w.units() * UNIT, "values of all rows");
        assert!(x.len() == w.units() * UNIT * tokens && tiling.tokens == TOKENS);
        assert!(sums.len() == (to - from) * tokens * S::LANES);
        assert!(PAIRS == 1 || from.is_multiple_of(PAIRS) && w.vector.get() >= 2 * PAIRS, "pairs that share codes");
        let at = w.step(block, first);
        let (codes, codes_step, per) = match &w.codes {
            Codes::Own(words) => {
                assert!(!SHARED && words.len() * UNIT == values.len());
                (words[at.values..].as_ptr().cast(), units * w.pairs(block) * 4, 1)
            }
            Codes::Shared(words) => {
                let before: usize = block * (BLOCK / w.vector.get()) * w.units();
                assert!(SHARED && words.len() >= before + w.patterns(block) * w.units());
                (words[at.codes..].as_ptr().cast(), units * w.patterns(block) * 2, w.vector.get() / 2)
            }
        };
        let run = Run {
            steps,
            units,
            last: w.step(block, first + steps - 1).units,
            values: values[at.values * UNIT..].as_ptr(),
            values_step: units * w.pairs(block) * UNIT,
            codes,
            codes_step,
            per,
            x: x[first * units * UNIT * tokens..].as_ptr(),
            tokens,
        };
        let (sums, width) = (sums.as_mut_ptr(), tokens * S::LANES);
        let mut pair = from;
        while pair < to {
            let taken = if PAIRS > 1 && to - pair < PAIRS { 1 } else { PAIRS };
            for tile in 0..tiling.count {
                // SAFETY: these pairs' values, codes, activations and sums are there, by the assertions above and the
                // layout of `Packed`; the caller has the instructions.
                unsafe {
                    let sums = sums.add((pair - from) * width + tile * TOKENS * S::LANES);
                    if taken == PAIRS {
                        add_tile::<S, T, SHARED, PAIRS, TOKENS>(run, pair, tile, sums);
                    } else {
                        add_tile::<S, T, SHARED, 1, TOKENS>(run, pair, tile, sums);
                    }
                }
            }
            pair += taken;
        }
    }
}

/// Adds a run of steps to the sums, from `sums` on, of `PAIRS` pairs from `pair` on, which at more than one share their
/// codes.
///
/// # Safety
/// The processor must have the instructions; the run, the pairs, the tile and the sums must be there.
#[inline(always)]
unsafe fn add_tile<S: Instructions, T: Loaded, const SHARED: bool, const PAIRS: usize, const TOKENS: usize>(
    run: Run<T>,
    pair: usize,
    tile: usize,
    sums: *mut f32,
) {
    // Of the values, what lies one run later: the caches are asked for it while this run is read.
    let later = run.steps * run.values_step;
    // SAFETY: as the caller vouches; positions are below 4 by their two bits; a prefetch reads nothing.
    unsafe {
        let mut acc = [[S::splat(0.0); TOKENS]; PAIRS];
        for p in 0..PAIRS {
            for t in 0..TOKENS {
                acc[p][t] = S::load(sums.add((p * run.tokens + t) * S::LANES));
            }
        }
        let mut x = run.x.add(tile * TOKENS * UNIT);
        for step in 0..run.steps {
            let units = if step + 1 == run.steps { run.last } else { run.units };
            let values = run.values.add(step * run.values_step + pair * units * UNIT);
            let bytes = if SHARED { 2 } else { 4 };
            let codes = run.codes.add(step * run.codes_step + pair / run.per * units * bytes);
            for unit in 0..units {
                let word = match SHARED {
                    true => u32::from(*codes.cast::<u16>().add(unit)),
                    false => *codes.cast::<u32>().add(unit),
                };
                for part in 0..UNIT / S::LANES {
                    let picks = S::picks::<SHARED>(word, part);
                    let mut kept = [S::splat(0.0); PAIRS];
                    for p in 0..PAIRS {
                        let value = values.add((p * units + unit) * UNIT + part * S::LANES);
                        // Once for each line.
                        if tile == 0 && part == 0 && unit % (4 / size_of::<T>()) == 0 {
                            S::prefetch(value.wrapping_add(later).cast());
                        }
                        kept[p] = T::vector::<S>(value);
                    }
                    for t in 0..TOKENS {
                        let picked = S::pick(S::load(x.add(t * UNIT + part * S::LANES)), picks);
                        for p in 0..PAIRS {
                            acc[p][t] = S::fma(picked, kept[p], acc[p][t]);
                        }
                    }
                }
                x = x.add(run.tokens * UNIT);
            }
        }
        for p in 0..PAIRS {
            for t in 0..TOKENS {
                S::store(sums.add((p * run.tokens + t) * S::LANES), acc[p][t]);
            }
        }
    }
}
