//! The oracle of magnitude pruning and compression: exact bytes, worked out column by column from the definition.
//!
//! Invariant: no code is shared with the devices nor with the host's own pruning.

use std::cmp::Ordering;

use crate::error::{Result, checked_mul};
use crate::mask::VectorLen;
use crate::matrix::{Element, Elements, Matrix, each_dtype};

/// Values and metadata of `w` pruned by magnitude, as [`crate::format`] lays them out. A NaN ranks above every number,
/// as it does on devices.
///
/// ```
/// use sparse24::{Matrix, VectorLen, reference};
/// let w = Matrix::from_f32(1, 4, &[1.0, -3.0, f32::NAN, 2.0])?;
/// let (values, meta) = reference::sparsify::exact(&w, VectorLen::ONE)?;
/// assert_eq!((values.get(0), values.get(1).is_nan(), meta), (-3.0, true, vec![0x9]));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn exact(w: &Matrix, vector: VectorLen) -> Result<(Elements, Vec<u32>)> {
    fn typed<T: Element>(w: &Matrix, data: &[T], vector: VectorLen) -> Result<(Elements, Vec<u32>)> {
        let (m, k) = (w.rows(), w.cols());
        let (groups, words) = (k.div_ceil(4), k.div_ceil(32));
        let mut values = vec![T::zeroed(); checked_mul("values", m, 2 * groups)?];
        let mut meta = vec![0u32; checked_mul("meta", m.div_ceil(vector.get()), words)?];
        let first_rows = (0..if data.is_empty() { 0 } else { m }).step_by(vector.get());
        for (block, first) in first_rows.enumerate() {
            let rows = first..m.min(first + vector.get());
            for group in 0..groups {
                let columns: Vec<_> = (4 * group..k.min(4 * group + 4)).collect();
                let magnitude = |row: usize, col: usize| f64::from(data[row * k + col].to_f32()).abs();
                let score = |&col: &usize| rows.clone().map(|row| magnitude(row, col)).fold(0.0, |sum, x| sum + x);
                // NaN before numbers, then the largest. Stable, so that of equals the lower column stays in front: no
                // score is -0.0, and two NaNs are no order.
                let mut kept = columns.clone();
                kept.sort_by(|a, b| {
                    let (a, b) = (score(a), score(b));
                    b.is_nan().cmp(&a.is_nan()).then(b.partial_cmp(&a).unwrap_or(Ordering::Equal))
                });
                kept.truncate(2);
                let lives = |col: &usize| kept.contains(col) && rows.clone().any(|row| magnitude(row, *col) != 0.0);
                let live: Vec<_> = columns.iter().filter(|col| lives(col)).map(|col| col % 4).collect();
                let (lower, upper) = match live[..] {
                    [a, b] => (a, b),
                    [a @ (0 | 1)] => (a, 2),
                    _ => (2, 3),
                };
                meta[block * words + group / 8] |= ((lower | upper << 2) as u32) << (4 * (group % 8));
                for row in rows.clone() {
                    for (slot, position) in [lower, upper].into_iter().enumerate() {
                        if kept.contains(&(4 * group + position)) {
                            values[row * 2 * groups + 2 * group + slot] = data[row * k + 4 * group + position];
                        }
                    }
                }
            }
        }
        Ok((T::wrap(values), meta))
    }
    each_dtype!(w.elements(), data => typed(w, data, vector))
}
