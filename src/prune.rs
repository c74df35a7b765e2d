//! Which weights to keep: the criteria that turn a dense matrix into a mask that 2:4 can hold.
//!
//! *Magnitude pruning* keeps the weights that are largest in absolute value, on the ground that removing a small one
//! changes the layer's output least (Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
//! 2015). For 2:4 the two largest of every group of four are kept, which is how Mishra et al. ("Accelerating Sparse
//! Deep Neural Networks", 2021, [arXiv:2104.08378](https://arxiv.org/abs/2104.08378)) prune before they fine-tune.
//! Where V rows share one pattern (vector-wise N:M, as in VENOM, Castro et al. 2023,
//! [arXiv:2310.02065](https://arxiv.org/abs/2310.02065), and in NM-SpMM), a position is scored by the sum over its V
//! rows.
//!
//! What a weight is worth also depends on the inputs that it meets. [`Statistics`] sums those of a calibration text;
//! [`Criterion`] weighs each weight by them (Wanda, and second order on the diagonal); [`SparseGpt`] uses all of them,
//! and lets the weights that stay make up for those that go. [`permute`] finds an order of channels in which any of
//! these loses less. [`Method`] names them all.
//!
//! [`Units`] prunes to other patterns than 2:4: single weights, rows, input channels or blocks, as
//! `torch.nn.utils.prune` does. Masks of single weights run on the masked kernel ([`Op::Masked`](crate::Op::Masked)).
//!
//! Invariant: every criterion for 2:4 keeps exactly two columns of a whole group, and of a ragged last group of `k % 4`
//! columns two, or the only one there is (fewer only where an earlier mask had fewer, or where random ones meet it);
//! all rows of a block of V have the same mask but for what an earlier one took from them.

mod criteria;
mod factor;
mod granularity;
mod magnitude;
mod method;
pub mod permute;
mod sparsegpt;
mod statistics;
mod swap;

pub use criteria::{Criterion, Norm};
#[cfg(feature = "text")]
pub(crate) use factor::inverse_factor;
pub use granularity::{Amount, Granularity, Importance, Units, prune_units};
pub(crate) use magnitude::{Workspace, sparsify_rows};
pub use magnitude::{magnitude, sparsify, sparsify_into};
pub use method::{Method, Pruning, seed_of};
pub use sparsegpt::SparseGpt;
pub use statistics::Statistics;

use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;

use crate::error::{Result, expect_shape};
use crate::mask::{Mask, Mask24, VectorLen};
use crate::matrix::{Element, Matrix, each_dtype};
use crate::memory;

/// The six ways to keep two of four, position i in bit i.
const PATTERNS: [u8; 6] = [0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100];

/// Keeps two positions of every group at random, each of the six pairs equally likely. The mask is a function of the
/// arguments alone: PCG-32 seeded with `seed`, three bits a draw, the same on every machine and in every version.
///
/// ```
/// use sparse24::{VectorLen, prune};
/// let mask = prune::random(64, 128, VectorLen::ONE, 7)?;
/// assert_eq!(mask.mask().count(), 64 * 128 / 2);
/// assert_eq!(mask, prune::random(64, 128, VectorLen::ONE, 7)?);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn random(rows: usize, cols: usize, vector: VectorLen, seed: u64) -> Result<Mask24> {
    /// The default stream of the PCG reference implementation.
    const STREAM: u64 = 0x0a02_bdbf_7bb3_c0a7;
    let mut rng = Pcg32::new(seed, STREAM);
    by_block(rows, cols, vector, |_, patterns| {
        for col in (0..cols).step_by(4) {
            let all = 0xf >> (4 - (cols - col).min(4));
            patterns.push(match cols - col {
                1 | 2 => all,
                // Draws are rejected, not reduced: no pattern is likelier than another.
                _ => loop {
                    let pattern = PATTERNS.get((rng.next_u32() >> 29) as usize);
                    if let Some(&pattern) = pattern.filter(|&&p| p & !all == 0) {
                        break pattern;
                    }
                },
            });
        }
        Ok(())
    })
}

/// Σ|w| over the kept weights divided by Σ|w| over all, summed in f64: 1 if pruning costs nothing, and 1 by definition
/// for a matrix of zeros or of no elements. NaN if a weight is NaN or a kept one infinite. An error if the shapes
/// differ.
///
/// ```
/// use sparse24::{Matrix, VectorLen, prune};
/// let w = Matrix::from_f32(1, 4, &[4., -3., 2., 1.])?;
/// let mask = prune::magnitude(&w, VectorLen::ONE)?;
/// assert_eq!(prune::kept_magnitude(&w, mask.mask())?, 0.7);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn kept_magnitude(w: &Matrix, mask: &Mask) -> Result<f64> {
    expect_shape("mask", (mask.rows(), mask.cols()), (w.rows(), w.cols()))?;
    // Not of `mask.apply(w)`: that would be a second copy of what may be the largest matrix of a model.
    let (mut all, mut kept) = (0f64, 0f64);
    each_dtype!(w.elements(), data => {
        for (row, data) in data.chunks_exact(w.cols().max(1)).enumerate() {
            for (col, x) in data.iter().enumerate() {
                let x = f64::from(x.to_f32()).abs();
                all += x;
                kept += if mask.get(row, col) { x } else { 0.0 };
            }
        }
    });
    Ok(if all == 0.0 { 1.0 } else { kept / all })
}

/// The mask whose blocks of V rows each repeat the patterns, one per group, that `choose` appends for those rows.
fn by_block(
    rows: usize,
    cols: usize,
    vector: VectorLen,
    mut choose: impl FnMut(std::ops::Range<usize>, &mut Vec<u8>) -> Result<()>,
) -> Result<Mask24> {
    memory::claim_matrix("mask", rows, cols.div_ceil(32), size_of::<u32>())?;
    let mut words = Vec::with_capacity(rows * cols.div_ceil(32));
    let mut patterns = Vec::new();
    // No columns, no words, however many rows.
    for row in (0..if cols == 0 { 0 } else { rows }).step_by(vector.get()) {
        let block = row..rows.min(row.saturating_add(vector.get()));
        patterns.clear();
        choose(block.clone(), &mut patterns)?;
        for _ in block {
            words.extend(
                patterns.chunks(8).map(|p| p.iter().rev().fold(0u32, |word, &bits| word << 4 | u32::from(bits))),
            );
        }
    }
    Mask24::new(Mask::new(rows, cols, words)?, vector)
}
