//! The oracle of the divergence of logits from others.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView1, ArrayView2};

/// What each row of `x` adds to the loss, `weight · Σ p·ln(p/q)` with p the softmax of the row of `wanted` and q that
/// of `x`, of rows that are real: those before the length of their sequence of `seq` rows. And the gradient of the sum.
/// Both are zero for other rows, whatever they hold.
///
/// # Panics
/// If the shapes differ, or there are fewer rows than sequences have.
pub fn exact(
    x: ArrayView2<'_, f64>,
    wanted: ArrayView2<'_, f64>,
    lengths: &[u32],
    seq: usize,
    weight: f64,
) -> (Vec<f64>, Array2<f64>) {
    assert_eq!((x.dim(), x.nrows()), (wanted.dim(), lengths.len() * seq));
    let mut gradient = Array2::zeros(x.dim());
    let mut losses = vec![0.0; x.nrows()];
    for row in (0..x.nrows()).filter(|&row| row % seq < lengths[row / seq] as usize) {
        let (q, p) = (log_softmax(x.row(row)), log_softmax(wanted.row(row)));
        let terms = p.iter().zip(&q).filter(|(p, _)| p.exp() > 0.0).map(|(p, q)| p.exp() * (p - q));
        losses[row] = weight * terms.sum::<f64>();
        for ((to, p), q) in gradient.row_mut(row).iter_mut().zip(&p).zip(&q) {
            *to = weight * (q.exp() - p.exp());
        }
    }
    (losses, gradient)
}

/// The logarithms of the probabilities that softmax makes of logits.
pub fn log_softmax(logits: ArrayView1<'_, f64>) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let all = largest + logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - all).collect()
}
