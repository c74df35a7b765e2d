//! The oracle of rotary positions.
//!
//! # The bound
//! A turned feature is a sum of two products p and q: γ₂·(|p| + |q|), plus what is lost where a factor is taken for
//! zero (φ of each times the other), plus 3·2⁻¹²⁶. A copied one: φ. Then the store.
//!
//! The gradient is the same turn with the sines' signs changed: the oracle of the turn, of other tables.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, U, bounded, gamma, phi};
use crate::error::{Error, Result, expect_len, expect_shape};
use crate::matrix::{DType, Matrix};

/// The two products whose sum a feature becomes, each as feature of `x`, number of its table, whether that is a sine,
/// and sign; `None` for one that is copied.
fn products(feature: usize, half: usize, rotated: usize) -> Option<[(usize, usize, bool, f64); 2]> {
    if feature >= rotated {
        return None;
    }
    let c = feature % (2 * half);
    if c < half {
        Some([(feature, c, false, 1.0), (feature + half, c, true, -1.0)])
    } else {
        Some([(feature, c - half, false, 1.0), (feature - half, c - half, true, 1.0)])
    }
}

/// The row of tables of `rows` rows that token `t` reads.
fn row_of(positions: &[u32], t: usize, rows: usize) -> usize {
    (positions[t] as usize).min(rows - 1)
}

/// Row `t` of `x` turned for position `positions[t]`, or the last of the tables if that is past their end: of its first
/// `rotated` features, heads of twice as many as `cos` and `sin` have columns.
///
/// # Panics
/// If a row has no position, or the tables have no rows and something is turned, or are not of one shape.
pub fn exact(
    x: ArrayView2<'_, f64>,
    (cos, sin): (ArrayView2<'_, f64>, ArrayView2<'_, f64>),
    positions: &[u32],
    rotated: usize,
) -> Array2<f64> {
    assert_eq!(cos.dim(), sin.dim(), "tables of one shape");
    Array2::from_shape_fn(x.dim(), |(t, c)| match products(c, cos.ncols(), rotated) {
        None => x[[t, c]],
        Some(pair) => {
            let position = row_of(positions, t, cos.nrows());
            let product = |(feature, column, is_sine, sign): (usize, usize, bool, f64)| {
                sign * x[[t, feature]] * if is_sine { sin[[position, column]] } else { cos[[position, column]] }
            };
            pair.map(product).iter().sum()
        }
    })
}

/// The same with its bounds. An error if the tables differ in shape, there are more or fewer positions than rows, or
/// heads are not whole.
///
/// ```
/// use sparse24::{DType, Matrix, reference::rotary};
/// // A quarter of a turn.
/// let (x, cos, sin) = (Matrix::from_f32(1, 3, &[1.0, 2.0, 7.0])?, Matrix::zeros(1, 1, DType::F32)?, [1.0]);
/// let sin = Matrix::from_f32(1, 1, &sin)?;
/// let want = rotary::expect(&x, (&cos, &sin), &[0], 2, DType::F32)?;
/// assert_eq!([0, 1, 2].map(|c| want.element(0, c).value), [-2.0, 1.0, 7.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(
    x: &Matrix,
    (cos, sin): (&Matrix, &Matrix),
    positions: &[u32],
    rotated: usize,
    output: DType,
) -> Result<Expectation> {
    expect_shape("sin", (sin.rows(), sin.cols()), (cos.rows(), cos.cols()))?;
    expect_len("positions", positions.len(), x.rows())?;
    let half = cos.cols();
    let there = rotated == 0 || (half > 0 && rotated.is_multiple_of(2 * half) && (cos.rows() > 0 || x.rows() == 0));
    if !there || rotated > x.cols() {
        let has = cos.rows();
        return Err(Error::invalid(format!("{rotated} of {} features by tables of {has} positions", x.cols())));
    }
    let wide = |m: &Matrix| m.to_array().mapv(f64::from);
    let (wide_cos, wide_sin) = (wide(cos), wide(sin));
    let y = exact(wide(x).view(), (wide_cos.view(), wide_sin.view()), positions, rotated);
    let mut all = Expectation::new(x.rows(), x.cols(), output);
    for ((t, c), &y) in y.indexed_iter() {
        let Some(pair) = products(c, half, rotated) else {
            all.push(y, bounded(y, phi(y, x.dtype())));
            continue;
        };
        let (mut abs, mut lost) = (0.0, 3.0 * FLUSH);
        for (feature, column, is_sine, _) in pair {
            let table = if is_sine { sin } else { cos };
            let (a, b) =
                (f64::from(x.get(t, feature)), f64::from(table.get(row_of(positions, t, table.rows()), column)));
            abs += (a * b).abs();
            lost += phi(a, x.dtype()) * b.abs() + phi(b, DType::F32) * a.abs();
        }
        all.push(y, bounded(abs, gamma(2, U) * abs + lost));
    }
    Ok(all)
}

/// Gradient of `x`, where `dy` is that of the result: each pair turned back.
///
/// # Panics
/// As [`exact`].
pub fn grad(
    (cos, sin): (ArrayView2<'_, f64>, ArrayView2<'_, f64>),
    positions: &[u32],
    rotated: usize,
    dy: ArrayView2<'_, f64>,
) -> Array2<f64> {
    let back = sin.mapv(|sin| -sin);
    exact(dy, (cos, back.view()), positions, rotated)
}

/// The same with its bounds, of f32 operands. Errors as of [`expect`].
pub fn expect_grad(
    (cos, sin): (&Matrix, &Matrix),
    positions: &[u32],
    rotated: usize,
    dy: &Matrix,
) -> Result<Expectation> {
    let back: Vec<f32> = sin.elements().to_f32().iter().map(|sin| -sin).collect();
    let back = Matrix::from_f32(sin.rows(), sin.cols(), &back)?;
    expect(dy, (cos, &back), positions, rotated, DType::F32)
}
