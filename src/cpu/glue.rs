//! What runs between the GEMMs on the CPU device: embeddings, layer normalisation, attention, pooling.
//!
//! Twins of the shaders of the same names. Loops run over plain slices in steps of [`LANES`], which the compiler turns
//! into SIMD instructions of whatever width the function that they are inlined into may use: hence `inline(always)`.
//! Invariant: each output element is computed by one thread from its own inputs, in an order that depends on the shapes
//! alone, so results do not depend on the number of threads.

use rayon::prelude::*;

use super::Cpu;
use crate::matrix::{Element, Elements};

/// Sums that a loop keeps side by side: a register of AVX-512, two of AVX2, four of SSE2 or NEON.
const LANES: usize = 16;

/// Queries whose scores are computed together, so that a key or value is loaded once for all of them.
const QUERIES: usize = 4;

/// Queries of one task of attention. Each task brings all keys of its sequence into shape, which costs as much as some
/// ten queries.
const TASK_QUERIES: usize = 64;
/// The same where there are fewer sequences than threads.
const FEW_TASK_QUERIES: usize = 16;

/// Tokens of a task of what costs little per token.
const TASK_TOKENS: usize = 16;

/// Runs `$body` for inputs and an output of the types that kernels store.
macro_rules! each_pair {
    ($x:expr, $y:expr, ($a:ident, $b:ident) => $body:expr) => {
        match ($x, $y) {
            (Elements::F32($a), Elements::F32($b)) => $body,
            (Elements::F32($a), Elements::F16($b)) => $body,
            (Elements::F16($a), Elements::F32($b)) => $body,
            (Elements::F16($a), Elements::F16($b)) => $body,
            // Refused when the call is prepared.
            (Elements::Bf16(_), _) | (_, Elements::Bf16(_)) => {}
        }
    };
}

/// Sizes of an attention: the input has `seq` rows of `3 * heads * head_dim` features for each length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub(crate) seq: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
}

impl Cpu {
    /// Each row of `y` is the sum of one row of each table, which the ids choose; ids past the end choose the last row.
    /// Tables are of one type.
    pub(crate) fn embed(&self, tables: [Option<(&Elements, &[u32])>; 3], width: usize, y: &mut Elements) {
        let [Some((first, _)), ..] = tables else { return };
        each_pair!(first, y, (first, y) => self.embed_typed(tables, first, width, y));
    }

    /// `like` has the type of the tables.
    fn embed_typed<X: Element, Y: Element>(
        &self,
        tables: [Option<(&Elements, &[u32])>; 3],
        like: &[X],
        width: usize,
        y: &mut [Y],
    ) {
        let tables = tables.map(|t| t.and_then(|(table, ids)| Some((X::of(table)?, ids))));
        debug_assert!(tables[0].is_some_and(|(first, _)| first.len() == like.len()));
        if width == 0 {
            return;
        }
        self.pool.install(|| {
            y.par_chunks_exact_mut(width).with_min_len(TASK_TOKENS).enumerate().for_each(|(token, y)| {
                let row = |(table, ids): (&'_ [X], &[u32])| {
                    let last = (table.len() / width).saturating_sub(1);
                    let start = (ids[token] as usize).min(last) * width;
                    start..start + width
                };
                let [a, b, c] = tables.map(|t| t.map(|t| &t.0[row(t)]));
                match (a, b, c) {
                    (Some(a), Some(b), Some(c)) => {
                        for (((y, a), b), c) in y.iter_mut().zip(a).zip(b).zip(c) {
                            *y = Y::from_f32(a.to_f32() + b.to_f32() + c.to_f32());
                        }
                    }
                    (Some(a), Some(b), None) => {
                        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                            *y = Y::from_f32(a.to_f32() + b.to_f32());
                        }
                    }
                    (Some(a), ..) => {
                        for (y, a) in y.iter_mut().zip(a) {
                            *y = Y::from_f32(a.to_f32());
                        }
                    }
                    (None, ..) => {}
                }
            });
        });
    }

    /// Normalises each token of `gamma.len()` features.
    pub(crate) fn layer_norm(&self, x: &Elements, gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut Elements) {
        let width = gamma.len();
        if width == 0 {
            return;
        }
        each_pair!(x, y, (x, y) => self.pool.install(|| {
            let rows = y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).with_min_len(TASK_TOKENS);
            rows.for_each(|(y, x)| norm_row(x, gamma, beta, epsilon, y));
        }));
    }

    /// softmax(Q Kᵀ / √head_dim) V per sequence and head, over the real tokens; zeros for the others.
    pub(crate) fn attention(&self, qkv: &Elements, lengths: &[u32], shape: AttentionShape, y: &mut Elements) {
        each_pair!(qkv, y, (qkv, y) => self.attention_typed(qkv, lengths, shape, y));
    }

    fn attention_typed<X: Element, Y: Element>(&self, qkv: &[X], lengths: &[u32], shape: AttentionShape, y: &mut [Y]) {
        let AttentionShape { seq, heads, head_dim } = shape;
        let width = heads * head_dim;
        if y.is_empty() {
            return;
        }
        let few = lengths.len() < self.pool.current_num_threads();
        let task = if few { FEW_TASK_QUERIES } else { TASK_QUERIES };
        self.pool.install(|| {
            let sequences = y.par_chunks_exact_mut(seq * width).zip(qkv.par_chunks_exact(3 * seq * width)).zip(lengths);
            let tasks = sequences.flat_map(|((y, qkv), &length)| {
                let length = seq.min(length as usize);
                let parts = y.par_chunks_mut(task * width).enumerate();
                parts.map(move |(part, y)| (qkv, length, part * task, y))
            });
            tasks.for_each(|(qkv, length, query0, y)| {
                let real = length.saturating_sub(query0).min(y.len() / width);
                let (y, padding) = y.split_at_mut(real * width);
                padding.fill(Y::from_f32(0.0));
                if real > 0 {
                    self.with_scratch(Head::scratch(length, head_dim), |scratch| {
                        for head in 0..heads {
                            Head { length, width, head_dim, first: head * head_dim }.run(qkv, query0, y, scratch);
                        }
                    });
                }
            });
        });
    }

    /// The mean of each sequence's real tokens, then over its Euclidean length if that is asked for.
    pub(crate) fn pool(&self, x: &Elements, lengths: &[u32], seq: usize, normalize: bool, y: &mut [f32]) {
        if y.is_empty() {
            return;
        }
        let width = y.len() / lengths.len();
        match x {
            Elements::F32(x) => self.pool_typed(x, lengths, (seq, width), normalize, y),
            Elements::F16(x) => self.pool_typed(x, lengths, (seq, width), normalize, y),
            // Refused when the call is prepared.
            Elements::Bf16(_) => {}
        }
    }

    fn pool_typed<X: Element>(
        &self,
        x: &[X],
        lengths: &[u32],
        (seq, width): (usize, usize),
        normalize: bool,
        y: &mut [f32],
    ) {
        self.pool.install(|| {
            y.par_chunks_exact_mut(width).zip(lengths).enumerate().for_each(|(sequence, (y, &length))| {
                let length = seq.min(length as usize);
                pool_sequence(&x[sequence * seq * width..][..length * width], normalize, y);
            });
        });
    }
}

/// Sum of `of(a)` over a slice: lane by lane, then over the lanes.
#[inline(always)]
fn sum_of<X: Element>(x: &[X], of: impl Fn(f32) -> f32) -> f32 {
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

/// Layer normalisation of one token.
#[inline(always)]
fn norm_row<X: Element, Y: Element>(x: &[X], gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut [Y]) {
    let count = x.len() as f32;
    let mean = sum_of(x, |x| x) / count;
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
    let factor = 1.0 / (variance + epsilon).sqrt();
    for (((y, x), gamma), beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
        *y = Y::from_f32((x.to_f32() - mean) * factor * gamma + beta);
    }
}

/// Mean of the tokens in `x`, each as wide as `y`.
#[inline(always)]
fn pool_sequence<X: Element>(x: &[X], normalize: bool, y: &mut [f32]) {
    y.fill(0.0);
    let tokens = x.chunks_exact(y.len());
    let count = tokens.len().max(1) as f32;
    for token in tokens {
        for (y, x) in y.iter_mut().zip(token) {
            *y += x.to_f32();
        }
    }
    y.iter_mut().for_each(|y| *y /= count);
    if normalize {
        // 1e-24 is the square of the least length that is divided by.
        let factor = 1.0 / sum_of(y, |y| y * y).max(1e-24).sqrt();
        y.iter_mut().for_each(|y| *y *= factor);
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Head {
    /// Real tokens of the sequence.
    length: usize,
    /// Features of Q, of K and of V.
    width: usize,
    head_dim: usize,
    /// First feature of the head.
    first: usize,
}

impl Head {
    /// f32s that [`Head::run`] works in: keys and values, padded to whole lanes, and four queries and their scores.
    fn scratch(length: usize, head_dim: usize) -> usize {
        let (keys, features) = (length.next_multiple_of(LANES), head_dim.next_multiple_of(LANES));
        head_dim * keys + length * features + QUERIES * (head_dim + keys + features)
    }

    /// The head's part of the output rows `y`, which belong to queries from `query0` on. `qkv` is the sequence.
    #[inline(always)]
    fn run<X: Element, Y: Element>(self, qkv: &[X], query0: usize, y: &mut [Y], scratch: &mut [f32]) {
        let Self { length, width, head_dim, first } = self;
        let (keys, features) = (length.next_multiple_of(LANES), head_dim.next_multiple_of(LANES));
        let (k, rest) = scratch.split_at_mut(head_dim * keys);
        let (v, rest) = rest.split_at_mut(length * features);
        let (q, rest) = rest.split_at_mut(QUERIES * head_dim);
        let (scores, out) = rest.split_at_mut(QUERIES * keys);
        let of = |token: usize, part: usize| &qkv[(3 * token + part) * width + first..][..head_dim];

        // The columns past the length keep the zeros that scratch starts with; heads share their length.
        for token in 0..length {
            for (feature, x) in of(token, 1).iter().enumerate() {
                k[feature * keys + token] = x.to_f32();
            }
            for (v, x) in v[token * features..].iter_mut().zip(of(token, 2)) {
                *v = x.to_f32();
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (group, y) in y.chunks_mut(QUERIES * width).enumerate() {
            let rows = y.len() / width;
            q.fill(0.0);
            for (row, q) in q.chunks_exact_mut(head_dim).enumerate().take(rows) {
                for (q, x) in q.iter_mut().zip(of(query0 + group * QUERIES + row, 0)) {
                    *q = x.to_f32() * scale;
                }
            }
            products(q, k, scores);
            let mut factors = [0.0; QUERIES];
            for (factor, scores) in factors.iter_mut().zip(scores.chunks_exact_mut(keys)) {
                *factor = 1.0 / softmax(scores, length);
            }
            values(scores, v, length, out);
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                let sums = &out[row * features..][..head_dim];
                for (y, sum) in y[first..first + head_dim].iter_mut().zip(sums) {
                    *y = Y::from_f32(sum * factors[row]);
                }
            }
        }
    }
}

/// Scores of four queries: `q` is 4 x d, `k` d x keys, `scores` 4 x keys.
#[inline(always)]
fn products(q: &[f32], k: &[f32], scores: &mut [f32]) {
    let (depth, keys) = (q.len() / QUERIES, scores.len() / QUERIES);
    for block in (0..keys).step_by(LANES) {
        let mut sums = [[0.0f32; LANES]; QUERIES];
        for d in 0..depth {
            let Some(k) = k[d * keys + block..].first_chunk::<LANES>() else { continue };
            for (row, sums) in sums.iter_mut().enumerate() {
                let q = q[row * depth + d];
                for (sum, k) in sums.iter_mut().zip(k) {
                    *sum += q * k;
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            scores[row * keys + block..][..LANES].copy_from_slice(sums);
        }
    }
}

/// Replaces the first `length` scores by the exponentials of their distances from the largest, and the others by zeros.
/// Returns the sum.
#[inline(always)]
fn softmax(scores: &mut [f32], length: usize) -> f32 {
    scores[length..].fill(f32::NEG_INFINITY);
    let (blocks, _) = scores.as_chunks_mut::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks.iter() {
        for (lane, &score) in lanes.iter_mut().zip(block) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let highest = lanes.iter().fold(f32::NEG_INFINITY, |most, &lane| if lane > most { lane } else { most });
    let mut sums = [0.0f32; LANES];
    for block in blocks {
        for (sum, score) in sums.iter_mut().zip(block) {
            *score = exp(*score - highest);
            *sum += *score;
        }
    }
    sums.iter().sum()
}

/// Weighted sums of values for four queries: `weights` is 4 x keys, `v` length x features, `out` 4 x features.
#[inline(always)]
fn values(weights: &[f32], v: &[f32], length: usize, out: &mut [f32]) {
    let (keys, features) = (weights.len() / QUERIES, out.len() / QUERIES);
    for block in (0..features).step_by(LANES) {
        let mut sums = [[0.0f32; LANES]; QUERIES];
        for key in 0..length {
            let Some(v) = v[key * features + block..].first_chunk::<LANES>() else { continue };
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = weights[row * keys + key];
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum += weight * v;
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            out[row * features + block..][..LANES].copy_from_slice(sums);
        }
    }
}

/// eˣ for x ≤ 0, within 2 units in the last place, in arithmetic that vectorises: x = k·ln 2 + r, a polynomial in r (S. L.
/// Moshier's, Cephes 2.2 `expf`), and k into the exponent. Zero below -87, where results stop being normal numbers; NaN
/// stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // 1.5 · 2²³: adding it leaves the nearest whole number in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const C: [f32; 6] = [0.5, 0.166_666_65, 0.041_665_796, 0.008_333_452, 0.001_398_2, 1.987_569_1e-4];
    let bounded = if x < -87.0 { -87.0 } else { x };
    let shifted = bounded * std::f32::consts::LOG2_E + SHIFT;
    let whole = shifted - SHIFT;
    let r = bounded - whole * LN2_HIGH - whole * LN2_LOW;
    let tail = ((((C[5] * r + C[4]) * r + C[3]) * r + C[2]) * r + C[1]) * r + C[0];
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let value = (tail * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance from the f64 result in units in the last place of an f32 of that size.
    #[test]
    fn the_exponential_is_within_two_units() {
        let mut worst = 0.0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / (want * f64::from(f32::EPSILON)));
        }
        assert!(worst < 2.0, "{worst} units");
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }
}
