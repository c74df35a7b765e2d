//! Attention of a few queries to many rows of keys and values, as they lie in a cache.
//!
//! Vectors lie along the features of a head: a row of keys, or of values, is read once for up to [`QUERIES`] queries,
//! which hold their sums in registers meanwhile. With few queries that is all there is to gain, as time goes into
//! reading the rows. Invariant: what a query becomes depends on its own features and on the rows that it sees alone,
//! in an order that these decide, so that neither the queries beside it nor the number of threads show.
#![allow(unsafe_code, reason = "kernels over vector instructions")]
#![allow(clippy::needless_range_loop, reason = "counters of loops that are unrolled, over arrays of registers")]

use super::rows::{LANES, exp};
use crate::simd::{Instructions, Loaded, Work, multiply_add};

/// Queries that read a row together.
pub(crate) const QUERIES: usize = 4;

/// Rows of keys whose products are summed up together: a sum over a vector's lanes costs as much as the products of a
/// head of 64 features, a quarter of that for four.
const ROWS: usize = 4;

/// Rows of values that stay in the first-level cache while all columns of a head use them.
const BLOCK: usize = 64;

/// Queries with the rows that they attend to: those of one head of a cache.
pub(crate) struct AttendRows<'a, X> {
    /// The queries one after another, scaled: `share` of each token.
    pub(crate) q: &'a [f32],
    pub(crate) head_dim: usize,
    pub(crate) share: usize,
    /// How many rows the first token sees: the first so many, at least one. Each token sees one more than that before
    /// it, as far as there are `capacity`.
    pub(crate) seen: usize,
    pub(crate) capacity: usize,
    /// From the first row's keys on.
    pub(crate) keys: &'a [X],
    /// From the first row's values on.
    pub(crate) values: &'a [X],
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Room for a number per row that is seen, for [`QUERIES`] queries.
    pub(crate) scores: &'a mut [f32],
    /// The result, in the form of the queries.
    pub(crate) y: &'a mut [f32],
}

impl<X: Loaded> Work for AttendRows<'_, X> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { q, head_dim, share, seen, capacity, keys, values, stride, scores, y } = self;
        let rows = Rows { keys, values, stride, head_dim };
        let run = QUERIES * head_dim;
        for (i, (q, y)) in q.chunks(run).zip(y.chunks_mut(run)).enumerate() {
            let seen: [usize; QUERIES] = std::array::from_fn(|own| (seen + (i * QUERIES + own) / share).min(capacity));
            // SAFETY: the caller has the instructions.
            unsafe {
                match q.len() / head_dim {
                    1 => rows.attend::<S, 1>(q, &seen[..1], scores, y),
                    2 => rows.attend::<S, 2>(q, &seen[..2], scores, y),
                    3 => rows.attend::<S, 3>(q, &seen[..3], scores, y),
                    _ => rows.attend::<S, 4>(q, &seen, scores, y),
                }
            }
        }
    }
}

/// The rows of a head.
#[derive(Clone, Copy)]
struct Rows<'a, X> {
    keys: &'a [X],
    values: &'a [X],
    stride: usize,
    head_dim: usize,
}

impl<X: Loaded> Rows<'_, X> {
    /// Attention of `Q` queries.
    ///
    /// # Safety
    /// The processor must have the instructions `S`.
    #[inline(always)]
    unsafe fn attend<S: Instructions, const Q: usize>(
        self,
        q: &[f32],
        seen: &[usize],
        scores: &mut [f32],
        y: &mut [f32],
    ) {
        let (longest, shared) = seen.iter().fold((0, usize::MAX), |(a, b), &seen| (a.max(seen), b.min(seen)));
        let scores = &mut scores[..Q * longest];
        // Rows that all queries see, and then for each what it sees beyond.
        // SAFETY: as the caller vouches.
        unsafe { self.scores::<S, Q>(q, 0..shared, longest, scores) };
        for (i, &seen) in seen.iter().enumerate() {
            let own = &mut scores[i * longest..][..seen];
            // SAFETY: as the caller vouches.
            unsafe { self.scores::<S, 1>(&q[i * self.head_dim..], shared..seen, longest, own) };
        }
        let mut factors = [0.0; Q];
        for (i, &seen) in seen.iter().enumerate() {
            factors[i] = 1.0 / softmax(&mut scores[i * longest..][..seen]);
        }
        y.fill(0.0);
        // SAFETY: as the caller vouches.
        unsafe { self.sum::<S, Q>(scores, longest, 0..shared, y) };
        for (i, (y, &seen)) in y.chunks_exact_mut(self.head_dim).zip(seen).enumerate() {
            // SAFETY: as the caller vouches.
            unsafe { self.sum::<S, 1>(&scores[i * longest..][..seen], longest, shared..seen, y) };
            y.iter_mut().for_each(|y| *y *= factors[i]);
        }
    }

    /// Products of `Q` queries with the keys of some rows: that of query `i` and row `r` goes to `scores[i * longest +
    /// r]`.
    ///
    /// # Safety
    /// The processor must have the instructions `S`.
    #[inline(always)]
    unsafe fn scores<S: Instructions, const Q: usize>(
        self,
        q: &[f32],
        rows: std::ops::Range<usize>,
        longest: usize,
        scores: &mut [f32],
    ) {
        let head_dim = self.head_dim;
        for first in rows.clone().step_by(ROWS) {
            // Past the last row it is taken again, so that all rows are summed up in one order, and left.
            let k: [&[X]; ROWS] =
                std::array::from_fn(|i| &self.keys[(first + i).min(rows.end - 1) * self.stride..][..head_dim]);
            let real = ROWS.min(rows.end - first);
            let mut put = |i: usize, sums: [f32; ROWS]| {
                scores[i * longest + first..][..real].copy_from_slice(&sums[..real]);
            };
            // As many queries at once as there are registers for.
            let at_once = if S::LANES == LANES { Q } else { Q.min(2) };
            let mut i = 0;
            while i < Q {
                let q = &q[i * head_dim..];
                // SAFETY: as the caller vouches.
                unsafe {
                    if at_once == Q {
                        for (own, sums) in products::<S, X, Q>(q, k).into_iter().enumerate() {
                            put(i + own, sums);
                        }
                    } else if i + 2 <= Q {
                        for (own, sums) in products::<S, X, 2>(q, k).into_iter().enumerate() {
                            put(i + own, sums);
                        }
                    } else {
                        put(i, products::<S, X, 1>(q, k)[0]);
                    }
                }
                i += at_once;
            }
        }
    }

    /// Adds to `Q` rows of `y` the values of some rows, times the weights, which lie as the scores do.
    ///
    /// # Safety
    /// The processor must have the instructions `S`.
    #[inline(always)]
    unsafe fn sum<S: Instructions, const Q: usize>(
        self,
        weights: &[f32],
        longest: usize,
        rows: std::ops::Range<usize>,
        y: &mut [f32],
    ) {
        let head_dim = self.head_dim;
        let whole = head_dim / S::LANES;
        for first in rows.clone().step_by(BLOCK) {
            let block = first..rows.end.min(first + BLOCK);
            let mut vector = 0;
            // As many columns at once as there are registers for.
            // SAFETY: the caller has the instructions, and `vector` counts whole ones of a head.
            unsafe {
                while S::LANES == LANES && vector + 4 <= whole {
                    self.columns::<S, Q, 4>(weights, longest, block.clone(), vector * S::LANES, y);
                    vector += 4;
                }
                while vector + 2 <= whole {
                    self.columns::<S, Q, 2>(weights, longest, block.clone(), vector * S::LANES, y);
                    vector += 2;
                }
                while vector < whole {
                    self.columns::<S, Q, 1>(weights, longest, block.clone(), vector * S::LANES, y);
                    vector += 1;
                }
            }
            for c in whole * S::LANES..head_dim {
                for i in 0..Q {
                    let mut sum = y[i * head_dim + c];
                    for row in block.clone() {
                        let v = self.values[row * self.stride + c].to_f32();
                        sum = multiply_add::<S>(weights[i * longest + row], v, sum);
                    }
                    y[i * head_dim + c] = sum;
                }
            }
        }
    }

    /// The same for `C` vectors of columns from `column` on.
    ///
    /// # Safety
    /// The processor must have the instructions `S`, and a head so many columns.
    #[inline(always)]
    unsafe fn columns<S: Instructions, const Q: usize, const C: usize>(
        self,
        weights: &[f32],
        longest: usize,
        rows: std::ops::Range<usize>,
        column: usize,
        y: &mut [f32],
    ) {
        let head_dim = self.head_dim;
        assert!(column + C * S::LANES <= head_dim && y.len() >= Q * head_dim);
        // SAFETY: the caller has the instructions. The columns are those of a head, by the assertion: of each of the
        // rows of `y`, and of the row that is sliced.
        unsafe {
            let mut sums = [[S::splat(0.0); C]; Q];
            for i in 0..Q {
                for c in 0..C {
                    sums[i][c] = S::load(y.as_ptr().add(i * head_dim + column + c * S::LANES));
                }
            }
            for row in rows {
                let v = self.values[row * self.stride..][..head_dim].as_ptr().add(column);
                let mut own = [S::splat(0.0); C];
                for c in 0..C {
                    own[c] = X::vector::<S>(v.add(c * S::LANES));
                }
                for i in 0..Q {
                    let weight = S::splat(weights[i * longest + row]);
                    for c in 0..C {
                        sums[i][c] = S::fma(weight, own[c], sums[i][c]);
                    }
                }
            }
            for i in 0..Q {
                for c in 0..C {
                    S::store(y.as_mut_ptr().add(i * head_dim + column + c * S::LANES), sums[i][c]);
                }
            }
        }
    }
}

/// Products of the first `Q` of some queries, one after another, with rows of keys.
///
/// # Safety
/// The processor must have the instructions `S`.
#[inline(always)]
unsafe fn products<S: Instructions, X: Loaded, const Q: usize>(q: &[f32], k: [&[X]; ROWS]) -> [[f32; ROWS]; Q] {
    let head_dim = k[0].len();
    let whole = head_dim / S::LANES * S::LANES;
    assert!(q.len() >= Q * head_dim && k[1].len() == head_dim && k[2].len() == head_dim && k[3].len() == head_dim);
    let mut out = [[0.0; ROWS]; Q];
    // SAFETY: the caller has the instructions. Vectors start a whole one before the end of a head at least: of each of
    // the rows and of the queries, by the assertion.
    unsafe {
        let mut sums = [[S::splat(0.0); ROWS]; Q];
        for c in (0..whole).step_by(S::LANES) {
            let mut own = [S::splat(0.0); ROWS];
            for row in 0..ROWS {
                own[row] = X::vector::<S>(k[row].as_ptr().add(c));
            }
            for i in 0..Q {
                let q = S::load(q.as_ptr().add(i * head_dim + c));
                for row in 0..ROWS {
                    sums[i][row] = S::fma(q, own[row], sums[i][row]);
                }
            }
        }
        for i in 0..Q {
            out[i] = S::totals(sums[i]);
        }
    }
    for c in whole..head_dim {
        for i in 0..Q {
            for row in 0..ROWS {
                out[i][row] = multiply_add::<S>(q[i * head_dim + c], k[row][c].to_f32(), out[i][row]);
            }
        }
    }
    out
}

/// Replaces scores by the exponentials of their distances from the largest. Returns their sum.
#[inline(always)]
fn softmax(scores: &mut [f32]) -> f32 {
    let (blocks, rest) = scores.as_chunks_mut::<LANES>();
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks.iter() {
        lanes.iter_mut().zip(block).for_each(|(lane, &score)| *lane = larger(*lane, score));
    }
    let highest = lanes.iter().chain(rest.iter()).fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    let mut sums = [0.0; LANES];
    for block in blocks {
        for (score, sum) in block.iter_mut().zip(&mut sums) {
            *score = exp(*score - highest);
            *sum += *score;
        }
    }
    let mut tail = 0.0;
    for score in rest {
        *score = exp(*score - highest);
        tail += *score;
    }
    sums.iter().sum::<f32>() + tail
}
