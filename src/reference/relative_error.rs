//! The oracle of the loss of states beside others.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

/// What each row of `x` adds to the loss, `weight / T · |x − wanted|² / |wanted|²`, where T rows are real: those before
/// the length of their sequence of `seq` rows. And the gradient of the sum. Both are zero for other rows, whatever they
/// hold.
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
    let is_real = |row: usize| row % seq < lengths[row / seq] as usize;
    let real = (0..x.nrows()).filter(|&row| is_real(row)).count().max(1) as f64;
    let mut gradient = Array2::zeros(x.dim());
    let mut losses = vec![0.0; x.nrows()];
    for row in (0..x.nrows()).filter(|&row| is_real(row)) {
        let (x, wanted) = (x.row(row), wanted.row(row));
        let off = &x - &wanted;
        let scale = weight / real / wanted.dot(&wanted).max(1e-12);
        losses[row] = scale * off.dot(&off);
        gradient.row_mut(row).assign(&(off * (2.0 * scale)));
    }
    (losses, gradient)
}
