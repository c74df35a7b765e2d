//! 2:4 products on the CPU: by gathered rows of activations for many tokens, by permuted vectors for few.
//!
//! **Many tokens** ([`gather`]). A vector holds one feature's sums for `LANES` tokens, and a fused multiply-add takes
//! its activations straight from memory, so a gathered row of activations costs no more than the next one would: half
//! the multiply-adds are half the time as long as loads keep up. Tokens are cut into *panels* of `A` vectors, whose
//! activations are packed k-major; a step of k of one panel fills three quarters of the first-level cache. For each row
//! of W, `A` accumulators stay in registers over the step: a code names the row of the panel, a broadcast value is
//! multiplied by its `A` vectors. A kept weight costs `A` multiply-adds, `A + 1` loads and three or four scalar
//! instructions; at two loads and two multiply-adds per cycle A = 12 reaches 12/13 of the arithmetic peak. At V > 1 the
//! two rows of a pair share each loaded vector, and with AVX-512's 32 registers four rows at V > 2: `A` is at most 5 or
//! 6, and loads no longer count. With few tokens more rows are taken at once, so that there are at least about ten
//! chains of multiply-adds (their latency times their throughput is 8 to 10).
//!
//! **Few tokens** ([`gemv`]). The weights' bytes are the cost, and each is read once. Lanes are the values of a pair of
//! rows (see [`super::weights`]): VPERMILPS takes its positions from the two lowest bits of each lane, so a word of
//! codes, shifted by a constant for each lane, is all the decoding there is. That takes 1.1 to 1.4 ns for 16 values and
//! their codes, which memory takes 1.9 (f16) or 3.7 ns (f32) to bring: what counts is that memory is kept busy.
//! Hardware follows several runs of lines at once, but none of them fast, and each only to the end of its page. So
//! four runs are read side by side: of each of two blocks that lie far apart, two steps of k that do too. The
//! second-level cache is asked for what comes 2 KiB later in each. One thread of the Xeon below, f16, V = 1, GB/s, in
//! matrices of LLMs' sizes where plain reading has 17 to 19: one run 8, two 11, four 14, four asked for ahead 15 to 17.
//!
//! On a Xeon with AVX-512 (Emerald Rapids, 48 KiB and 2 MiB of first- and second-level cache) a copy of this loop
//! alone, in the fastest of 120 to 250 runs, does 58 to 67 % of the multiply-adds at V = 1 and at 80 to 85 % at V = 32,
//! with the panel in the second-level cache; at 70 % with everything in the first. V = 1 is limited by loads: the loop
//! reaches 82 % if two rows share every load.
//!
//! An output's sum is formed by one thread, in f32: in increasing k by `gather`, and by `gemv` in as many parts as
//! there are lanes of its row, each of two runs of k that depend on the length of a step, added up at the end.
//!
//! # Tried and rejected
//! - Rows of W contiguous along k: see [`super::weights`].
//! - Both weights of a group loaded at once and broadcast from a register: 1.01 times the speed with everything in the
//!   first-level cache, and a shuffle on a port that AVX-512 needs for multiply-adds.
//! - Addresses with short displacements, to shorten the instructions: no difference (AVX2, EPYC 7003). One register in
//!   place of two does make one on Intel: see [`opaque`].
//! - AVX-512, V = 1, the loop alone on that Xeon, where the present form has 63 %: four rows of 6 vectors 64 % (as many
//!   sums, but more broadcasts), panels of 16, 20 and 24 vectors 65, 62 and 55 %, blocks of 16 and 32 rows, whose sums
//!   stay in the first-level cache, 0.7 to 0.9 times the speed, as the panel comes from the second more often.
//! - AVX-512, V = 1, again the loop alone: columns sorted by which of two rows keep them, so that what both keep is
//!   loaded once: 68 % at 12 vectors, 71 % at 8, and 71 and more where rows are paired by what they have in common. It
//!   needs lists of columns beside the codes, which `gemv` reads: twice the weights' memory.
//! - Panels of 8 and 10 vectors: 0.98 and 1.00 times the speed of 12 in the cache, no difference outside.
//! - Few tokens: rows contiguous along k, which need no sums in memory, 1.02 to 1.15 times the speed, but many tokens
//!   want the order that there is. Codes beside their values, no difference. Four runs of k in one block, 0.86 to 1.04
//!   times the speed of two in each of two blocks (Emerald Rapids).
//! - Few tokens: asking for values and codes by the pair, with the exact place of the next run, 1.8 ns of arithmetic in
//!   place of 1.3 and no faster. Asking the first-level cache, which has 16 lines under way at most: 13 GB/s at most.
//! - Asking for the next row's sums, or the next strip of activations to be packed, ahead of time: no difference.
#![allow(unsafe_code, reason = "kernels over vector instructions; threads write disjoint parts of buffers")]
#![allow(clippy::needless_range_loop, reason = "counters of loops that are unrolled, over arrays of registers")]

use std::ops::Range;

use super::epilogue::Finish;
use super::memory::Parts;
use super::weights::{BLOCK, Codes, Packed, Step, UNIT, Values, each_type};
use super::{Pool, Scratch};
use crate::mask::VectorLen;
use crate::matrix::{Elements, each_dtype};
use crate::problem::{Form, Problem};
use crate::simd::{Instructions, Loaded, Simd, SimdLevel, Work, opaque};

/// Most vectors of tokens in a panel: accumulators that leave AVX2's registers room for a value, and at V > 1 for two
/// and for activations. (With 6 the compiler spills.) AVX-512 has twice as many registers, which at V > 2 hold the sums
/// of four rows: each loaded vector then serves four multiply-adds, and sums are read and written half as often as with
/// two rows of 12 vectors.
const fn most_vectors(shared: bool, level: SimdLevel) -> usize {
    match (shared, level) {
        (false, _) => 12,
        (true, SimdLevel::Avx512) => 6,
        (true, _) => 5,
    }
}

/// f32 of a cache line.
const LINE: usize = 16;

/// Units of a step of k: of a full panel it fills three quarters of a first-level cache of so many bytes.
pub(super) fn step_units(vector: VectorLen, level: SimdLevel, cache: usize) -> usize {
    (cache / 4 * 3 / (UNIT * step_tokens(vector, level) * 4)).max(1)
}

/// Tokens for which a step is measured out: a full panel's, at V > 1 with AVX2 a vector more.
pub(super) fn step_tokens(vector: VectorLen, level: SimdLevel) -> usize {
    (if vector == VectorLen::ONE { 12 } else { 6 }) * level.lanes()
}

/// Bytes of packed activations that are worked on at a time: what is left of a last-level cache beside the weights.
const PACKED_BYTES: usize = 8 << 20;

/// A run of vectors of tokens.
#[derive(Clone, Copy)]
struct Panel {
    /// First vector, of those that are worked on at a time.
    start: usize,
    vectors: usize,
}

/// How tokens are cut into panels.
#[derive(Clone, Copy)]
struct Panels {
    vectors: usize,
    count: usize,
}

impl Panels {
    /// As few panels as there can be, as equal as they can be.
    fn new(vectors: usize, most: usize) -> Self {
        Self { vectors, count: vectors.div_ceil(most) }
    }

    fn get(&self, i: usize) -> Panel {
        let start = |i| self.vectors * i / self.count;
        Panel { start: start(i), vectors: start(i + 1) - start(i) }
    }
}

/// The product with many tokens.
pub(super) fn gather(pool: &Pool, scratch: &Scratch, problem: &Problem, w: &Packed, x: &Elements, finish: &Finish<'_>) {
    let simd = pool.simd();
    let lanes = simd.level().lanes();
    let (n, units) = (problem.n, w.units());
    let shared = w.vector != VectorLen::ONE;
    let most = most_vectors(shared, simd.level());
    let vector_len = units * UNIT * lanes;
    // As many full panels as fit, at least one.
    let at_once = (PACKED_BYTES / (4 * vector_len).max(1) / most).max(1) * most * lanes;
    for token0 in (0..n).step_by(at_once) {
        let tokens = at_once.min(n - token0);
        let panels = Panels::new(tokens.div_ceil(lanes), most);
        scratch.with(panels.vectors * vector_len, |packed| {
            let parts = Parts::new(packed);
            // A task packs some units of one panel.
            const PACK_UNITS: usize = 16;
            let cuts = units.div_ceil(PACK_UNITS).max(1);
            pool.each(panels.count * cuts, |task| {
                let (panel, unit0) = (panels.get(task / cuts), task % cuts * PACK_UNITS);
                let width = panel.vectors * lanes;
                let start = panel.start * vector_len + unit0 * UNIT * width;
                let len = PACK_UNITS.min(units - unit0) * UNIT * width;
                // SAFETY: each task has its own part.
                let out = unsafe { parts.part(start..start + len) };
                let first = token0 + panel.start * lanes;
                each_dtype!(x, x => simd.run(Pack { x, problem, token0: first, k0: unit0 * UNIT, width, out }));
            });
            let packed = &*packed;
            // A task computes some pairs of rows of one block for one panel.
            let tasks = w.blocks() * panels.count;
            let cuts = pool.cuts(tasks, 4);
            pool.each(tasks * cuts, |task| {
                let (block, panel) = (task / cuts / panels.count, panels.get(task / cuts % panels.count));
                let pairs = w.pairs(block);
                let (from, to) = (pairs * (task % cuts) / cuts, pairs * (task % cuts + 1) / cuts);
                let x = &packed[panel.start * vector_len..][..panel.vectors * vector_len];
                let rows = RowsOfPanel { w, block, from, to, vectors: panel.vectors, x };
                let width = panel.vectors * lanes;
                scratch.with(BLOCK * width + BLOCK / 2 * w.step * UNIT, |buffer| {
                    let (sums, wide) = buffer.split_at_mut(BLOCK * width);
                    rows.multiply(simd, sums, wide);
                    let feature0 = block * BLOCK + 2 * from;
                    let features = (2 * to).min(w.rows(block)) - 2 * from;
                    let token0 = token0 + panel.start * lanes;
                    let sums = &mut sums[..features * width];
                    // SAFETY: each task has its own features and tokens.
                    unsafe { finish.store_by_feature(feature0, token0, width.min(n - token0), sums, width) };
                });
            });
        });
    }
}

/// Some pairs of rows of a block, times all of k of one panel.
struct RowsOfPanel<'a> {
    w: &'a Packed,
    block: usize,
    from: usize,
    to: usize,
    vectors: usize,
    x: &'a [f32],
}

impl RowsOfPanel<'_> {
    /// Fills `sums`, a row of `vectors` vectors for each row. `wide` is room for a step of values.
    fn multiply(&self, simd: Simd, sums: &mut [f32], wide: &mut [f32]) {
        let Self { w, block, from, to, vectors, x } = *self;
        let width = vectors * simd.level().lanes();
        if w.steps() == 0 {
            sums[..2 * (to - from) * width].fill(0.0);
        }
        for step in 0..w.steps() {
            let at = w.step(block, step);
            let values = (at.values + from * at.units) * UNIT..(at.values + to * at.units) * UNIT;
            let values = match &w.values {
                Values::F32(v) => &v[values],
                // Once for all tokens of the panel, which costs a few hundredths of what they do.
                other => {
                    let wide = &mut wide[..values.len()];
                    each_type!(other, v => simd.run(Widen { from: &v[values], to: wide }));
                    &*wide
                }
            };
            let codes = StepCodes::new(w, &at, from..to);
            let len = at.units * UNIT * width;
            let (own, next) = x[step * w.step * UNIT * width..].split_at(len);
            let step = StepOfPanel { pairs: to - from, units: at.units, values, codes, x: own, next, first: step == 0 };
            step.multiply(simd, vectors, &mut sums[..2 * (to - from) * width]);
        }
    }
}

/// Codes of some pairs and a step of k.
#[derive(Clone, Copy)]
enum StepCodes<'a> {
    /// A word for each unit of a pair.
    Own(&'a [u32]),
    /// 16 bits for each unit of a pattern of `per` pairs; the first pair is pair `first` of its pattern.
    Shared { words: &'a [u16], first: usize, per: usize },
}

impl<'a> StepCodes<'a> {
    /// Those of some pairs of a block, of which `at` says where the step lies.
    fn new(w: &'a Packed, at: &Step, pairs: Range<usize>) -> Self {
        match &w.codes {
            Codes::Own(words) => {
                Self::Own(&words[at.values + pairs.start * at.units..at.values + pairs.end * at.units])
            }
            Codes::Shared(words) => {
                let per = w.vector.get() / 2;
                let words = &words[at.codes + pairs.start / per * at.units..];
                Self::Shared { words, first: pairs.start % per, per }
            }
        }
    }

    /// Whether these are the codes of so many pairs and units, in this of the two forms.
    #[inline(always)]
    fn are_of(self, shared: bool, pairs: usize, units: usize) -> bool {
        match self {
            Self::Own(words) => !shared && words.len() == pairs * units,
            Self::Shared { words, first, per } => shared && words.len() >= (first + pairs).div_ceil(per) * units,
        }
    }
}

/// Some pairs of rows, times a step of k of one panel.
#[derive(Clone, Copy)]
struct StepOfPanel<'a> {
    pairs: usize,
    units: usize,
    /// `pairs * units` units.
    values: &'a [f32],
    codes: StepCodes<'a>,
    /// `units * UNIT` rows of vectors.
    x: &'a [f32],
    /// What comes after `x`, to be brought nearer.
    next: &'a [f32],
    /// Whether sums start from zero.
    first: bool,
}

impl StepOfPanel<'_> {
    fn multiply(self, simd: Simd, vectors: usize, sums: &mut [f32]) {
        macro_rules! by_vectors {
            ($shared:literal, $rows:literal: $($vectors:literal => $streams:literal),*) => {
                match vectors {
                    $($vectors => simd.run(Multiply::<$shared, $streams, $rows, $vectors> { step: self, sums }),)*
                    // By `Panels::new`.
                    _ => unreachable!("a panel has at most {} vectors", most_vectors($shared, simd.level())),
                }
            };
        }
        match self.codes {
            StepCodes::Own(_) => by_vectors!(false, 1: 1 => 8, 2 => 4, 3 => 4, 4 => 2, 5 => 2, 6 => 2,
                7 => 1, 8 => 1, 9 => 1, 10 => 1, 11 => 1, 12 => 1),
            // Of what two vectors take, positions and addresses are most: four pairs share them.
            StepCodes::Shared { per, .. } if per > 3 && vectors == 2 && simd.level() == SimdLevel::Avx512 => {
                simd.run(Multiply::<true, 1, 8, 2> { step: self, sums });
            }
            StepCodes::Shared { per, .. } if per > 1 && simd.level() == SimdLevel::Avx512 => {
                by_vectors!(true, 4: 1 => 4, 2 => 2, 3 => 1, 4 => 1, 5 => 1, 6 => 1)
            }
            StepCodes::Shared { .. } => by_vectors!(true, 2: 1 => 4, 2 => 2, 3 => 1, 4 => 1, 5 => 1, 6 => 1),
        }
    }
}

/// Some pairs of rows, times a step of k of a panel of `A` vectors. `STREAMS` codes are followed at once, each for
/// `ROWS` rows: one at V = 1, beyond it the pair that shares it, or with AVX-512 two or four pairs.
struct Multiply<'a, const SHARED: bool, const STREAMS: usize, const ROWS: usize, const A: usize> {
    step: StepOfPanel<'a>,
    /// `2 * pairs` rows of `A` vectors.
    sums: &'a mut [f32],
}

impl<const SHARED: bool, const STREAMS: usize, const ROWS: usize, const A: usize> Work
    for Multiply<'_, SHARED, STREAMS, ROWS, A>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let StepOfPanel { pairs, units, values, codes, x, next, first } = self.step;
        let width = A * S::LANES;
        assert!(values.len() == pairs * units * UNIT && x.len() == units * UNIT * width);
        assert!(self.sums.len() == 2 * pairs * width);
        const { assert!(if SHARED { ROWS == 2 || ROWS == 4 || ROWS == 8 } else { ROWS == 1 }) };
        assert!(codes.are_of(SHARED, pairs, units));
        // By `most_vectors`; what never runs should not be compiled.
        if const { SHARED && S::LANES < 16 && (ROWS > 2 || A > 5) } {
            unreachable!("{ROWS} rows of {A} vectors that share codes need AVX-512");
        }
        let rows = 2 * pairs;
        // Lines of the next step that each row asks for: all of them by the end of a whole block.
        let lines_ahead = (units * UNIT * width).div_ceil(LINE * BLOCK);
        let mut ahead = next.chunks(LINE);
        let mut row = 0;
        while row < rows {
            // Pairs share their codes if the first of them is at such a place of its pattern.
            let aligned = match codes {
                StepCodes::Shared { first, .. } => (first + row / 2).is_multiple_of(ROWS / 2),
                StepCodes::Own(_) => true,
            };
            // Rows come in pairs.
            let taken = match rows - row {
                left if aligned && left >= STREAMS * ROWS => STREAMS * ROWS,
                left if aligned && left >= ROWS && SHARED => ROWS,
                _ => 2,
            };
            for line in ahead.by_ref().take(lines_ahead * taken) {
                // SAFETY: a prefetch reads nothing.
                unsafe { S::prefetch(line.as_ptr()) };
            }
            // SAFETY: rows `row..row + taken` are there, and with them, by the assertions above, their values, codes
            // and sums; the caller has the instructions.
            unsafe {
                if taken == STREAMS * ROWS {
                    tile::<S, SHARED, STREAMS, ROWS, A>(row, units, values, codes, x, self.sums, first);
                } else if SHARED && taken == ROWS {
                    tile::<S, SHARED, 1, ROWS, A>(row, units, values, codes, x, self.sums, first);
                } else if SHARED {
                    tile::<S, SHARED, 1, 2, A>(row, units, values, codes, x, self.sums, first);
                } else {
                    tile::<S, SHARED, 2, 1, A>(row, units, values, codes, x, self.sums, first);
                }
            }
            row += taken;
        }
    }
}

/// `STREAMS * ROWS` rows from `row` on, times a step of k of a panel of `A` vectors.
///
/// # Safety
/// The processor must have the instructions `S`; the rows' values, codes and sums and the panel must be there.
#[inline(always)]
unsafe fn tile<S: Instructions, const SHARED: bool, const STREAMS: usize, const ROWS: usize, const A: usize>(
    row: usize,
    units: usize,
    values: &[f32],
    codes: StepCodes<'_>,
    x: &[f32],
    sums: &mut [f32],
    first: bool,
) {
    let width = A * S::LANES;
    // SAFETY: all pointers stay within what the caller vouches for: positions are below 4 by their two bits, so rows of
    // the panel are those of the unit's own groups.
    unsafe {
        let mut acc = [[[S::splat(0.0); A]; ROWS]; STREAMS];
        let sums = sums.as_mut_ptr().add(row * width);
        if !first {
            for s in 0..STREAMS {
                for r in 0..ROWS {
                    for a in 0..A {
                        acc[s][r][a] = S::load(sums.add((s * ROWS + r) * width + a * S::LANES));
                    }
                }
            }
        }
        // Of each stream: its values, its codes, and how far up the codes of its row lie.
        let mut streams = [(values.as_ptr(), std::ptr::null::<u8>(), 0); STREAMS];
        for (s, stream) in streams.iter_mut().enumerate() {
            let row = row + s * ROWS;
            let values = values.as_ptr().add(row / 2 * units * UNIT + row % 2 * 2);
            *stream = match codes {
                StepCodes::Own(words) => (values, words.as_ptr().add(row / 2 * units).cast(), row as u32 % 2 * 4),
                StepCodes::Shared { words, first, per } => {
                    (values, words.as_ptr().add((first + row / 2) / per * units).cast(), 0)
                }
            };
        }
        let nibble = if SHARED { 4 } else { 8 };
        let mut x = x.as_ptr();
        for unit in 0..units {
            let mut words = [0; STREAMS];
            for s in 0..STREAMS {
                let (_, codes, shift) = streams[s];
                words[s] = match SHARED {
                    true => u32::from(*codes.cast::<u16>().add(unit)),
                    false => *codes.cast::<u32>().add(unit),
                } >> shift;
            }
            for group in 0..4 {
                for j in 0..2 {
                    for s in 0..STREAMS {
                        let position = words[s] >> (nibble * group + 2 * j) & 3;
                        let from = x.add((4 * group as usize + position as usize) * width);
                        let from = if S::LANES == 16 { opaque(from) } else { from };
                        let value = streams[s].0.add(unit * UNIT + 4 * group as usize + j as usize);
                        let mut splat = [S::splat(0.0); ROWS];
                        for r in 0..ROWS {
                            splat[r] = S::splat(*value.add(r / 2 * units * UNIT + r % 2 * 2));
                        }
                        for a in 0..A {
                            let tokens = S::load(from.add(a * S::LANES));
                            for r in 0..ROWS {
                                acc[s][r][a] = S::fma(splat[r], tokens, acc[s][r][a]);
                            }
                        }
                    }
                }
            }
            x = x.add(UNIT * width);
        }
        for s in 0..STREAMS {
            for r in 0..ROWS {
                for a in 0..A {
                    S::store(sums.add((s * ROWS + r) * width + a * S::LANES), acc[s][r][a]);
                }
            }
        }
    }
}

/// Widens values to f32. Lengths are multiples of 16.
struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Loaded> Work for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        assert!(self.from.len() == self.to.len() && self.from.len().is_multiple_of(S::LANES));
        for at in (0..self.from.len()).step_by(S::LANES) {
            // SAFETY: whole vectors, by the assertion; the caller has the instructions.
            unsafe { S::store(self.to.as_mut_ptr().add(at), T::vector::<S>(self.from.as_ptr().add(at))) };
        }
    }
}

/// Brings some k of a panel's activations into k-major order.
pub(super) struct Pack<'a, T> {
    pub(super) x: &'a [T],
    pub(super) problem: &'a Problem,
    pub(super) token0: usize,
    pub(super) k0: usize,
    /// Tokens of the panel; those past the last are zero.
    pub(super) width: usize,
    /// Rows of `width`; those past the last k are zero.
    pub(super) out: &'a mut [f32],
}

impl<T: Loaded> Work for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { x, problem: &Problem { n, k, form, .. }, token0, k0, width, out } = self;
        let depth = out.len() / width;
        let (tokens, given) = (width.min(n - token0), depth.min(k - k0));
        if form == Form::Gemm {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                let from: &[T] = if row < given { &x[(k0 + row) * n + token0..][..tokens] } else { &[] };
                T::widen(from, &mut out[..from.len()]);
                out[from.len()..].fill(0.0);
            }
            return;
        }
        // So many k of 8 tokens are transposed in blocks of 8 x 8, by way of a strip where they must be widened or
        // padded.
        const STRIP: usize = 64;
        let mut strip = [[0.0f32; STRIP]; 8];
        for from in (0..depth).step_by(STRIP) {
            let (length, real) = (STRIP.min(depth - from), STRIP.min(given - from.min(given)));
            for token in (0..width).step_by(8) {
                let to = &mut out[from * width + token..];
                let start = (token0 + token) * k + k0 + from;
                if let Some(x) = T::as_f32(x)
                    && token + 8 <= tokens
                    && real == length
                {
                    let (rows, cols) = (8, length);
                    let transpose = Transpose { from: &x[start..], from_stride: k, rows, cols, to, to_stride: width };
                    // SAFETY: passed on.
                    unsafe { transpose.run::<S>() };
                    continue;
                }
                for (i, strip) in strip.iter_mut().enumerate() {
                    let x: &[T] = if token + i < tokens { &x[start + i * k..][..real] } else { &[] };
                    T::widen(x, &mut strip[..x.len()]);
                    strip[x.len()..].fill(0.0);
                }
                let transpose = Transpose {
                    from: strip.as_flattened(),
                    from_stride: STRIP,
                    rows: 8.min(width - token),
                    cols: length,
                    to,
                    to_stride: width,
                };
                // SAFETY: passed on.
                unsafe { transpose.run::<S>() };
            }
        }
    }
}

/// Transposes a matrix of `rows` x `cols`.
pub(super) struct Transpose<'a> {
    pub(super) from: &'a [f32],
    pub(super) from_stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) to: &'a mut [f32],
    pub(super) to_stride: usize,
}

impl Work for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { from, from_stride, rows, cols, to, to_stride } = self;
        for row in (0..rows).step_by(8) {
            for col in (0..cols).step_by(8) {
                if row + 8 <= rows && col + 8 <= cols {
                    assert!(
                        from.len() >= (row + 7) * from_stride + col + 8 && to.len() >= (col + 7) * to_stride + row + 8
                    );
                    let (from, to) = (&from[row * from_stride + col..], &mut to[col * to_stride + row..]);
                    // SAFETY: both blocks are there, by the assertion; the caller has the instructions.
                    unsafe { S::transpose8(from.as_ptr(), from_stride, to.as_mut_ptr(), to_stride) };
                    continue;
                }
                for row in row..rows.min(row + 8) {
                    for col in col..cols.min(col + 8) {
                        to[col * to_stride + row] = from[row * from_stride + col];
                    }
                }
            }
        }
    }
}

/// The product with few tokens, as `CpuSchedule::takes` has it.
pub(super) fn gemv(pool: &Pool, scratch: &Scratch, problem: &Problem, w: &Packed, x: &Elements, finish: &Finish<'_>) {
    // Kernels exist for powers of two; tokens past the last are zero.
    match problem.n.next_power_of_two() {
        1 => few_tokens::<1>(pool, scratch, problem, w, x, finish),
        2 => few_tokens::<2>(pool, scratch, problem, w, x, finish),
        _ => few_tokens::<4>(pool, scratch, problem, w, x, finish),
    }
}

fn few_tokens<const TOKENS: usize>(
    pool: &Pool,
    scratch: &Scratch,
    problem: &Problem,
    w: &Packed,
    x: &Elements,
    finish: &Finish<'_>,
) {
    let k = w.units() * UNIT;
    scratch.with(TOKENS * k, |wide| {
        super::widen_tokens(problem, x, wide, k);
        let wide = &*wide;
        // Two whole blocks at a time, which lie far apart, then what is left; cut where there are few for the threads.
        let apart = w.m / BLOCK / 2;
        let left = w.blocks() - 2 * apart;
        let cuts = [apart, left].map(|tasks| pool.len().div_ceil(tasks.max(1)).min(8));
        pool.each(apart * cuts[0] + left * cuts[1], |task| match task.checked_sub(apart * cuts[0]) {
            None => {
                let (block, cut) = (task / cuts[0], (task % cuts[0], cuts[0]));
                let few = FewTokens::<TOKENS, 2> { w, blocks: [block, block + apart], cut, x: wide };
                few.run(pool, scratch, problem, finish);
            }
            Some(task) => {
                let (block, cut) = (2 * apart + task / cuts[1], (task % cuts[1], cuts[1]));
                FewTokens::<TOKENS, 1> { w, blocks: [block], cut, x: wide }.run(pool, scratch, problem, finish);
            }
        });
    });
}

/// Some pairs of each of some blocks of the same number of rows, times all tokens.
struct FewTokens<'a, const TOKENS: usize, const BLOCKS: usize> {
    w: &'a Packed,
    blocks: [usize; BLOCKS],
    /// Which of how many parts of a block's pairs.
    cut: (usize, usize),
    /// A row of `units * UNIT` for each token.
    x: &'a [f32],
}

impl<const TOKENS: usize, const BLOCKS: usize> FewTokens<'_, TOKENS, BLOCKS> {
    fn run(&self, pool: &Pool, scratch: &Scratch, problem: &Problem, finish: &Finish<'_>) {
        let Self { w, blocks, cut: (cut, cuts), .. } = *self;
        let simd = pool.simd();
        let lanes = simd.level().lanes();
        let pairs = w.pairs(blocks[0]);
        let (from, to) = (pairs * cut / cuts, pairs * (cut + 1) / cuts);
        let pairs = to - from;
        let own = pairs * TOKENS * lanes;
        // Sums are added up for eight pairs at a time.
        scratch.with(BLOCKS * own + 7 * TOKENS * lanes, |sums| {
            sums.fill(0.0);
            // Whole steps that lie far apart, two at a time, then what is left one by one.
            let apart = w.units() / w.step / 2;
            for step in 0..apart {
                self.add_steps(simd, [step, step + apart], from..to, &mut sums[..BLOCKS * own]);
            }
            for step in 2 * apart..w.steps() {
                self.add_steps(simd, [step], from..to, &mut sums[..BLOCKS * own]);
            }
            for (i, block) in blocks.into_iter().enumerate() {
                let feature0 = block * BLOCK + 2 * from;
                let features = (2 * to).min(w.rows(block)) - 2 * from;
                let mut run = [0.0; BLOCK];
                for token in 0..problem.n {
                    let sums = &sums[i * own + token * lanes..];
                    simd.run(SumPairs { sums, stride: TOKENS * lanes, pairs, to: &mut run });
                    // SAFETY: each task has its own features.
                    unsafe { finish.store_features(feature0, token, &mut run[..features]) };
                }
            }
        });
    }

    fn add_steps<const STEPS: usize>(&self, simd: Simd, steps: [usize; STEPS], pairs: Range<usize>, sums: &mut [f32]) {
        let Self { w, blocks, x, .. } = *self;
        let k = w.units() * UNIT;
        let places = blocks.map(|block| steps.map(|step| w.step(block, step)));
        let units = places[0][0].units;
        let codes = places.map(|steps| steps.map(|at| StepCodes::new(w, &at, pairs.clone())));
        let x = steps.map(|step| std::array::from_fn(|t| &x[t * k + step * w.step * UNIT..][..units * UNIT]));
        each_type!(&w.values, values => {
            let range = |at: Step| (at.values + pairs.start * units) * UNIT..(at.values + pairs.end * units) * UNIT;
            let (pairs, values) = (pairs.len(), places.map(|steps| steps.map(|at| &values[range(at)])));
            match w.codes {
                Codes::Own(_) => {
                    simd.run(Permute::<_, false, TOKENS, BLOCKS, STEPS> { pairs, units, values, codes, x, sums });
                }
                Codes::Shared(_) => {
                    simd.run(Permute::<_, true, TOKENS, BLOCKS, STEPS> { pairs, units, values, codes, x, sums });
                }
            }
        });
    }
}

/// Adds the lanes of each row of some pairs, whose vectors are `stride` apart. There are vectors for a multiple of
/// eight pairs.
pub(super) struct SumPairs<'a> {
    pub(super) sums: &'a [f32],
    pub(super) stride: usize,
    pub(super) pairs: usize,
    pub(super) to: &'a mut [f32; BLOCK],
}

impl Work for SumPairs<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { sums, stride, pairs, to } = self;
        for (eight, to) in to.chunks_exact_mut(16).take(pairs.div_ceil(8)).enumerate() {
            let from = &sums[8 * eight * stride..][..7 * stride + S::LANES];
            // SAFETY: eight vectors and 16 numbers are there; the caller has the instructions.
            unsafe { S::sum_rows(from.as_ptr(), stride, to.as_mut_ptr()) };
        }
    }
}

/// Bytes ahead of what is read for which the second-level cache is asked: hardware alone stops at the end of a page and
/// begins anew behind it.
const AHEAD: usize = 2048;

/// Adds some steps of k of some pairs of some blocks to their sums, one pair of each block at a time.
struct Permute<'a, T, const SHARED: bool, const TOKENS: usize, const BLOCKS: usize, const STEPS: usize> {
    /// Of each block.
    pairs: usize,
    /// Of each step.
    units: usize,
    values: [[&'a [T]; STEPS]; BLOCKS],
    codes: [[StepCodes<'a>; STEPS]; BLOCKS],
    /// `units * UNIT` activations of each step and token.
    x: [[&'a [f32]; TOKENS]; STEPS],
    /// For each block and pair, a vector for each token.
    sums: &'a mut [f32],
}

impl<T: Loaded, const SHARED: bool, const TOKENS: usize, const BLOCKS: usize, const STEPS: usize> Work
    for Permute<'_, T, SHARED, TOKENS, BLOCKS, STEPS>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { pairs, units, values, codes, x, sums } = self;
        assert!(values.as_flattened().iter().all(|v| v.len() == pairs * units * UNIT));
        assert!(codes.as_flattened().iter().all(|codes| codes.are_of(SHARED, pairs, units)));
        assert!(x.as_flattened().iter().all(|x| x.len() == units * UNIT));
        assert!(sums.len() == BLOCKS * pairs * TOKENS * S::LANES);
        for pair in 0..pairs {
            // SAFETY: values, codes, activations and sums of the pair are there, by the assertions above; a prefetch
            // reads nothing; the caller has the instructions.
            unsafe {
                let sums = sums.as_mut_ptr().add(pair * TOKENS * S::LANES);
                let mut acc = [[[S::splat(0.0); TOKENS]; STEPS]; BLOCKS];
                let mut starts = [[(std::ptr::null::<T>(), std::ptr::null::<u8>()); STEPS]; BLOCKS];
                for b in 0..BLOCKS {
                    for t in 0..TOKENS {
                        acc[b][0][t] = S::load(sums.add((b * pairs * TOKENS + t) * S::LANES));
                    }
                    for s in 0..STEPS {
                        let codes = match codes[b][s] {
                            StepCodes::Own(words) => words.as_ptr().add(pair * units).cast(),
                            StepCodes::Shared { words, first, per } => {
                                words.as_ptr().add((first + pair) / per * units).cast()
                            }
                        };
                        starts[b][s] = (values[b][s].as_ptr().add(pair * units * UNIT), codes);
                    }
                }
                for unit in 0..units {
                    for part in 0..UNIT / S::LANES {
                        let at = unit * UNIT + part * S::LANES;
                        for b in 0..BLOCKS {
                            for s in 0..STEPS {
                                let (values, codes) = starts[b][s];
                                // Once for each line.
                                if part == 0 && unit % (4 / size_of::<T>()) == 0 {
                                    S::prefetch(values.add(at).cast::<f32>().wrapping_add(AHEAD / 4));
                                }
                                let word = match SHARED {
                                    true => u32::from(*codes.cast::<u16>().add(unit)),
                                    false => *codes.cast::<u32>().add(unit),
                                };
                                let (picks, kept) = (S::picks::<SHARED>(word, part), T::vector::<S>(values.add(at)));
                                for t in 0..TOKENS {
                                    let x = S::load(x[s][t].as_ptr().add(at));
                                    acc[b][s][t] = S::fma(S::pick(x, picks), kept, acc[b][s][t]);
                                }
                            }
                        }
                    }
                }
                for b in 0..BLOCKS {
                    for t in 0..TOKENS {
                        let mut sum = acc[b][0][t];
                        for s in 1..STEPS {
                            sum = S::fma(acc[b][s][t], S::splat(1.0), sum);
                        }
                        S::store(sums.add((b * pairs * TOKENS + t) * S::LANES), sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use crate::cpu::{Cpu, CpuOperands, CpuWeights};
    use crate::format::Sparse24;
    use crate::mask::VectorLen;
    use crate::matrix::{DType, Elements, Matrix};
    use crate::plan::CpuSchedule::{Gather, Permute};
    use crate::problem::{Op, Problem};
    use crate::prune;
    use crate::simd::SimdLevel;

    /// Every step of k, from one unit to all of them, and every cut of a block's pairs among threads gives the same
    /// bits.
    #[test]
    fn sums_depend_neither_on_caches_nor_on_threads() {
        // A block and a part of one; a last unit that is not whole.
        let (m, k) = (150, 1000);
        let dense = Matrix::uniform(m, k, DType::F32, 1).unwrap();
        let cases = [(Gather, 5), (Gather, 70), (Gather, 200), (Permute, 5), (Permute, 29)];
        for (v, (schedule, n)) in [1, 2, 4, 32].into_iter().flat_map(|v| cases.map(|case| (v, case))) {
            let v = VectorLen::new(v).unwrap();
            let w = Sparse24::compress(&dense, &prune::random(m, k, v, 2).unwrap()).unwrap();
            let x = Matrix::uniform(n, k, DType::F32, 3).unwrap();
            let problem = Problem::linear(Op::Sparse24(v), m, n, k, DType::F32);
            for level in SimdLevel::ALL.into_iter().filter(|level| level.is_supported()) {
                let outputs = |cache: usize, threads: usize| {
                    let mut cpu = Cpu::new(Some(threads), Some(level)).unwrap();
                    cpu.first_cache = cache;
                    let weights = CpuWeights::sparse24(&w, &cpu);
                    let mut y = Elements::from_f32(DType::F32, &vec![f32::NAN; n * m]);
                    let operands = CpuOperands { weights: &weights, x: &x, bias: None, residual: None };
                    cpu.gemm(&problem, schedule, &operands, &mut y);
                    y.to_f32().into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let expected = outputs(32 << 10, 1);
                assert!(!expected.contains(&f32::NAN.to_bits()));
                for (cache, threads) in [(1 << 10, 1), (48 << 10, 1), (1 << 20, 1), (48 << 10, 3)] {
                    assert!(
                        outputs(cache, threads) == expected,
                        "{schedule}, V={v}, {n} tokens, {level}, {cache}, {threads}"
                    );
                }
            }
        }
    }
}
