//! What runs between the GEMMs on the CPU device: embeddings, layer normalisation, attention, pooling.
//!
//! Twins of the shaders of the same names. Loops run over plain slices in steps of [`LANES`], which the compiler turns
//! into SIMD instructions of whatever width the function that they are inlined into may use: hence `inline(always)`.
//! Invariant: each output element is computed by one thread from its own inputs, in an order that depends on the shapes
//! alone, so results do not depend on the number of threads.

use half::f16;
use rayon::prelude::*;

use super::Cpu;
use super::epilogue::exp;
use crate::matrix::{Element, Elements};
use crate::simd::{Instructions, Work};

/// Sums that a loop keeps side by side: a register of AVX-512, two of AVX2, four of SSE2 or NEON. Attention has a query
/// in each lane: then keys and values are read as they lie in memory, no sum crosses lanes, and a sequence of any
/// length has no ragged end.
const LANES: usize = 16;

/// Keys, or features of values, that a block of queries is multiplied with at once: each query is loaded once for all
/// of them, and their sums fit registers.
const BLOCK: usize = 4;

/// One number for each of a block of queries.
type Lanes = [f32; LANES];

/// Queries of one task of attention. Each task widens all keys and values of its sequence.
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

/// One to three tables of an embedding, each with its ids.
pub(crate) type Tables<'a> = [Option<(&'a Elements, &'a [u32])>; 3];

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
    pub(crate) fn embed(&self, tables: Tables<'_>, width: usize, y: &mut Elements) {
        match y {
            Elements::F32(y) => self.embed_to(tables, width, y),
            Elements::F16(y) => self.embed_to(tables, width, y),
            // Refused when the call is prepared.
            Elements::Bf16(_) => {}
        }
    }

    fn embed_to<Y: Element>(&self, tables: Tables<'_>, width: usize, y: &mut [Y]) {
        match tables {
            [Some((Elements::F32(_), _)), ..] => self.embed_typed::<f32, Y>(tables, width, y),
            [Some((Elements::F16(_), _)), ..] => self.embed_typed::<f16, Y>(tables, width, y),
            // Refused when the call is prepared.
            _ => {}
        }
    }

    fn embed_typed<X: Element, Y: Element>(&self, tables: Tables<'_>, width: usize, y: &mut [Y]) {
        let tables = tables.map(|t| t.and_then(|(table, ids)| Some((X::of(table)?, ids))));
        self.each_chunk(y, TASK_TOKENS * width, |task, y| {
            self.pool.simd.run(EmbedTokens { tables: &tables, token0: task * TASK_TOKENS, width, y });
        });
    }

    /// Normalises each token of `gamma.len()` features.
    pub(crate) fn layer_norm(&self, x: &Elements, gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut Elements) {
        let task = TASK_TOKENS * gamma.len();
        each_pair!(x, y, (x, y) => self.each_chunk(y, task, |i, y| {
            self.pool.simd.run(NormTokens { x: &x[i * task..][..y.len()], gamma, beta, epsilon, y });
        }));
    }

    /// softmax(Q Kᵀ / √head_dim) V per sequence and head, over the real tokens; zeros for the others.
    pub(crate) fn attention(&self, qkv: &Elements, lengths: &[u32], shape: AttentionShape, y: &mut Elements) {
        each_pair!(qkv, y, (qkv, y) => self.attention_typed(qkv, lengths, shape, y));
    }

    fn attention_typed<X: Element, Y: Element>(&self, qkv: &[X], lengths: &[u32], shape: AttentionShape, y: &mut [Y]) {
        let AttentionShape { seq, heads, head_dim } = shape;
        let width = heads * head_dim;
        let few = lengths.len() < self.pool.len();
        let task = if few { FEW_TASK_QUERIES } else { TASK_QUERIES };
        self.each_chunk(y, seq * width, |sequence, y| {
            let qkv = &qkv[sequence * 3 * seq * width..][..3 * seq * width];
            let length = seq.min(lengths[sequence] as usize);
            self.each_chunk(y, task * width, |part, y| {
                self.scratch.with(Head::scratch(length, head_dim), |scratch| {
                    let query0 = part * task;
                    self.pool.simd.run(Attend { qkv, length, heads, head_dim, query0, y, scratch });
                });
            });
        });
    }

    /// The mean of each sequence's real tokens, then over its Euclidean length if that is asked for.
    pub(crate) fn pool(&self, x: &Elements, lengths: &[u32], seq: usize, normalize: bool, y: &mut [f32]) {
        match x {
            Elements::F32(x) => self.pool_typed(x, lengths, seq, normalize, y),
            Elements::F16(x) => self.pool_typed(x, lengths, seq, normalize, y),
            // Refused when the call is prepared.
            Elements::Bf16(_) => {}
        }
    }

    fn pool_typed<X: Element>(&self, x: &[X], lengths: &[u32], seq: usize, normalize: bool, y: &mut [f32]) {
        let width = y.len() / lengths.len().max(1);
        self.each_chunk(y, width, |sequence, y| {
            let length = seq.min(lengths[sequence] as usize);
            self.pool.simd.run(PoolSequence { x: &x[sequence * seq * width..][..length * width], normalize, y });
        });
    }

    /// Gives the threads chunks of `len` elements of `y` (the last may be shorter), with their numbers. All that is
    /// parallel here goes through this.
    fn each_chunk<Y: Send>(&self, y: &mut [Y], len: usize, work: impl Fn(usize, &mut [Y]) + Sync) {
        if !y.is_empty() {
            self.pool.enter(|| match self.pool.threads {
                Some(_) => y.par_chunks_mut(len).enumerate().for_each(|(i, chunk)| work(i, chunk)),
                None => y.chunks_mut(len).enumerate().for_each(|(i, chunk)| work(i, chunk)),
            });
        }
    }
}

/// The loops below as work: a struct of arguments for each, as they are compiled for each level that they are inlined
/// into.
macro_rules! work {
    ($name:ident<$($type:ident),+>, { $($field:ident: $of:ty),+ $(,)? }, $call:expr) => {
        struct $name<'a, $($type),+> {
            $($field: $of),+
        }

        impl<'a, $($type: Element),+> Work for $name<'a, $($type),+> {
            type Output = ();

            #[inline(always)]
            #[allow(unsafe_code, reason = "plain loops, which the level's function turns into its instructions")]
            unsafe fn run<S: Instructions>(self) {
                let Self { $($field),+ } = self;
                $call
            }
        }
    };
}
work!(EmbedTokens<X, Y>, { tables: &'a [Option<(&'a [X], &'a [u32])>; 3], token0: usize, width: usize, y: &'a mut [Y] },
    embed_tokens(tables, token0, width, y));
work!(NormTokens<X, Y>, { x: &'a [X], gamma: &'a [f32], beta: &'a [f32], epsilon: f32, y: &'a mut [Y] },
    norm_tokens(x, gamma, beta, epsilon, y));
work!(Attend<X, Y>, { qkv: &'a [X], length: usize, heads: usize, head_dim: usize, query0: usize, y: &'a mut [Y], scratch: &'a mut [f32] },
    attend(qkv, length, (heads, head_dim), query0, y, scratch));
work!(PoolSequence<X>, { x: &'a [X], normalize: bool, y: &'a mut [f32] }, pool_sequence(x, normalize, y));

/// Embeddings of the tokens from `token0` on, as many as `y` has rows.
#[inline(always)]
fn embed_tokens<X: Element, Y: Element>(
    tables: &[Option<(&[X], &[u32])>; 3],
    token0: usize,
    width: usize,
    y: &mut [Y],
) {
    for (token, y) in y.chunks_exact_mut(width).enumerate() {
        let row = |&(table, ids): &(&'_ [X], &[u32])| {
            let last = (table.len() / width).saturating_sub(1);
            (ids[token0 + token] as usize).min(last) * width
        };
        let [a, b, c] = tables.each_ref().map(|t| t.as_ref().map(|t| &t.0[row(t)..][..width]));
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

/// 1/√t of a mean or sum of squares, and NaN of one that has overflowed: zero, its limit, would make finite numbers of
/// what cannot be told.
#[inline(always)]
fn inverse_root(t: f32) -> f32 {
    if t == f32::INFINITY { f32::NAN } else { 1.0 / t.sqrt() }
}

/// Layer normalisation of some tokens.
#[inline(always)]
fn norm_tokens<X: Element, Y: Element>(x: &[X], gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut [Y]) {
    for (x, y) in x.chunks_exact(gamma.len()).zip(y.chunks_exact_mut(gamma.len())) {
        norm_token(x, gamma, beta, epsilon, y);
    }
}

/// Layer normalisation of one token.
#[inline(always)]
fn norm_token<X: Element, Y: Element>(x: &[X], gamma: &[f32], beta: &[f32], epsilon: f32, y: &mut [Y]) {
    let count = x.len() as f32;
    let mean = sum_of(x, |x| x) / count;
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
    let factor = inverse_root(variance + epsilon);
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
        let squares = sum_of(y, |y| y * y);
        // 1e-24 is the square of the least length that is divided by. A NaN is not less.
        let factor = inverse_root(if squares < 1e-24 { 1e-24 } else { squares });
        y.iter_mut().for_each(|y| *y *= factor);
    }
}

/// Attention of the queries of one sequence from `query0` on, as many as `y` has rows.
#[inline(always)]
fn attend<X: Element, Y: Element>(
    qkv: &[X],
    length: usize,
    (heads, head_dim): (usize, usize),
    query0: usize,
    y: &mut [Y],
    scratch: &mut [f32],
) {
    let width = heads * head_dim;
    let real = length.saturating_sub(query0).min(y.len() / width);
    let (y, padding) = y.split_at_mut(real * width);
    padding.fill(Y::from_f32(0.0));
    if real > 0 {
        for head in 0..heads {
            Head { length, width, head_dim, first: head * head_dim }.run(qkv, query0, y, scratch);
        }
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
    /// f32s that [`Head::run`] works in: keys and values, and for a block of queries themselves and their scores.
    fn scratch(length: usize, head_dim: usize) -> usize {
        2 * length * head_dim + LANES * (head_dim + length)
    }

    /// The head's part of the output rows `y`, which belong to queries from `query0` on. `qkv` is the sequence.
    #[inline(always)]
    fn run<X: Element, Y: Element>(self, qkv: &[X], query0: usize, y: &mut [Y], scratch: &mut [f32]) {
        let Self { length, width, head_dim, first } = self;
        let (k, rest) = scratch.split_at_mut(length * head_dim);
        let (v, rest) = rest.split_at_mut(length * head_dim);
        let (blocks, _) = rest.as_chunks_mut::<LANES>();
        let (q, scores) = blocks.split_at_mut(head_dim);
        let of = |token: usize, part: usize| &qkv[(3 * token + part) * width + first..][..head_dim];

        for (part, to) in [(1, &mut *k), (2, &mut *v)] {
            for (token, to) in to.chunks_exact_mut(head_dim).enumerate() {
                for (to, x) in to.iter_mut().zip(of(token, part)) {
                    *to = x.to_f32();
                }
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (block, y) in y.chunks_mut(LANES * width).enumerate() {
            let rows = y.len() / width;
            // Lanes past the last query compute on what the block before has left there, and nobody reads them.
            for lane in 0..rows {
                for (q, x) in q.iter_mut().zip(of(query0 + block * LANES + lane, 0)) {
                    q[lane] = x.to_f32() * scale;
                }
            }
            let scores = &mut scores[..length];
            let (fours, rest) = scores.as_chunks_mut::<BLOCK>();
            let (k_fours, k_rest) = k.split_at(fours.len() * BLOCK * head_dim);
            for (scores, k) in fours.iter_mut().zip(k_fours.chunks_exact(BLOCK * head_dim)) {
                *scores = products(q, k);
            }
            for (score, k) in rest.iter_mut().zip(k_rest.chunks_exact(head_dim)) {
                [*score] = products(q, k);
            }
            let factors = softmax(scores).map(|total| 1.0 / total);
            let whole = head_dim / BLOCK * BLOCK;
            for column in (0..whole).step_by(BLOCK) {
                let sums: [Lanes; BLOCK] = values(scores, v, head_dim, column);
                store(&sums, &factors, y, width, first + column);
            }
            for column in whole..head_dim {
                let sums: [Lanes; 1] = values(scores, v, head_dim, column);
                store(&sums, &factors, y, width, first + column);
            }
        }
    }
}

/// Scores of the queries `q`, one vector of lanes per feature, with some keys, one after another in `k`.
#[inline(always)]
fn products<const K: usize>(q: &[Lanes], k: &[f32]) -> [Lanes; K] {
    let rows: [&[f32]; K] = std::array::from_fn(|row| &k[row * q.len()..][..q.len()]);
    let mut sums = [[0.0; LANES]; K];
    for (d, q) in q.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let k = row[d];
            for (sum, q) in sums.iter_mut().zip(q) {
                *sum += k * q;
            }
        }
    }
    sums
}

/// Replaces the scores of each lane by the exponentials of their distances from the largest. Returns their sums.
#[inline(always)]
fn softmax(scores: &mut [Lanes]) -> Lanes {
    let mut highest = [f32::NEG_INFINITY; LANES];
    for scores in scores.iter() {
        for (highest, &score) in highest.iter_mut().zip(scores) {
            *highest = if score > *highest { score } else { *highest };
        }
    }
    let mut sums = [0.0; LANES];
    for scores in scores {
        for ((score, highest), sum) in scores.iter_mut().zip(&highest).zip(&mut sums) {
            *score = exp(*score - highest);
            *sum += *score;
        }
    }
    sums
}

/// Weighted sums of some of the values' features, from `column` on; `v` has `head_dim` of them per key.
#[inline(always)]
fn values<const C: usize>(weights: &[Lanes], v: &[f32], head_dim: usize, column: usize) -> [Lanes; C] {
    let mut sums = [[0.0; LANES]; C];
    for (weights, v) in weights.iter().zip(v.chunks_exact(head_dim)) {
        let Some(v) = v[column..].first_chunk::<C>() else { continue };
        for (sums, v) in sums.iter_mut().zip(v) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += v * weight;
            }
        }
    }
    sums
}

/// Features of the output from `column` on, for as many queries as `y` has rows.
#[inline(always)]
fn store<Y: Element>(sums: &[Lanes], factors: &Lanes, y: &mut [Y], width: usize, column: usize) {
    for ((lane, y), factor) in y.chunks_exact_mut(width).enumerate().zip(factors) {
        for (y, sums) in y[column..].iter_mut().zip(sums) {
            *y = Y::from_f32(sums[lane] * factor);
        }
    }
}
