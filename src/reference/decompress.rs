//! The oracle of decompression: exact bytes, element by element from the definition of the codes.
//!
//! Invariant: no code is shared with the devices nor with the format's own decompression.

use crate::error::{Result, expect_len};
use crate::mask::VectorLen;
use crate::matrix::{Element, Elements, Matrix, each_dtype};

/// The `m x k` matrix that values and metadata stand for, as [`crate::format`] lays them out.
///
/// ```
/// use sparse24::{Elements, Matrix, VectorLen, reference};
/// let values = Elements::F32(vec![-3.0, 2.0]);
/// let w = reference::decompress::exact((1, 4), VectorLen::ONE, &values, &[0xd])?;
/// assert_eq!(w, Matrix::from_f32(1, 4, &[0.0, -3.0, 0.0, 2.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn exact((m, k): (usize, usize), vector: VectorLen, values: &Elements, meta: &[u32]) -> Result<Matrix> {
    fn typed<T: Element>((m, k): (usize, usize), vector: VectorLen, values: &[T], meta: &[u32]) -> Elements {
        let (groups, words) = (k.div_ceil(4), k.div_ceil(32));
        let element = |row: usize, col: usize| {
            let group = col / 4;
            let code = (meta[row / vector.get() * words + group / 8] >> (4 * (group % 8))) as usize;
            let slot = [code % 4, code / 4 % 4].iter().position(|&position| position == col % 4);
            slot.map_or(T::zeroed(), |slot| values[(row * groups + group) * 2 + slot])
        };
        T::wrap((0..m).flat_map(|row| (0..k).map(move |col| element(row, col))).collect())
    }
    expect_len("values", values.len(), m * 2 * k.div_ceil(4))?;
    expect_len("meta", meta.len(), m.div_ceil(vector.get()) * k.div_ceil(32))?;
    Matrix::new(m, k, each_dtype!(values, values => typed((m, k), vector, values, meta)))
}
