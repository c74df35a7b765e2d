//! The oracle of sums of embeddings.
//!
//! # The bound
//! γ₂·Σ|a| for three addends, γ₁ for two, 0 for one, plus Σφ, plus 2⁻¹²⁶ for each sum; then the store.
//!
//! # The bound of the gradient
//! γ of the tokens of a row times Σ|dy|, plus Σφ, plus 2⁻¹²⁶ for each sum. What is there before counts as one more:
//! devices may start from it, and need not sum apart.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array2, ArrayView2};

use super::{Expectation, FLUSH, Rounded, U, bounded, gamma, phi};
use crate::error::{Error, Result, expect_len, expect_shape};
use crate::matrix::{DType, Matrix};

/// `y[t] = Σ table[ids[t]]`, an id past the end of a table meaning its last row.
///
/// # Panics
/// If there is no table or one without rows, or tables differ in width or ids in number.
pub fn exact(tables: &[(ArrayView2<'_, f64>, &[u32])]) -> Array2<f64> {
    let (tokens, width) = (tables[0].1.len(), tables[0].0.ncols());
    Array2::from_shape_fn((tokens, width), |(t, c)| {
        tables.iter().map(|(table, ids)| table[[(ids[t] as usize).min(table.nrows() - 1), c]]).sum()
    })
}

/// The same with its bounds. An error if tables differ in width, or ids in number, or there is no table or one without
/// rows.
///
/// ```
/// use sparse24::{DType, Matrix, reference::embedding};
/// let table = Matrix::from_f32(2, 1, &[1.5, -2.0])?;
/// let want = embedding::expect(&[(&table, &[1, 0])], DType::F32)?;
/// assert!(want.verify(&Matrix::from_f32(2, 1, &[-2.0, 1.5])?)?.passed());
/// assert!(!want.verify(&Matrix::from_f32(2, 1, &[-2.0, 1.5000001])?)?.passed());
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(tables: &[(&Matrix, &[u32])], output: DType) -> Result<Expectation> {
    let [(first, ids), ..] = tables else { return Err(Error::invalid("an embedding needs a table")) };
    let (tokens, width) = (ids.len(), first.cols());
    for (table, ids) in tables {
        expect_shape("table", (table.rows().min(1), table.cols()), (1, width))?;
        expect_len("ids", ids.len(), tokens)?;
    }
    let wide: Vec<_> = tables.iter().map(|(table, ids)| (table.to_array().mapv(f64::from), *ids)).collect();
    let sums = exact(&wide.iter().map(|(table, ids)| (table.view(), *ids)).collect::<Vec<_>>());
    let mut all = Expectation::new(tokens, width, output);
    for t in 0..tokens {
        for c in 0..width {
            let (mut abs, mut flushed) = (0.0, 0.0);
            for (table, ids) in tables {
                let a = f64::from(table.get((ids[t] as usize).min(table.rows() - 1), c));
                abs += a.abs();
                flushed += phi(a, table.dtype());
            }
            let additions = tables.len() - 1;
            all.push(sums[[t, c]], bounded(abs, gamma(additions, U) * abs + flushed + additions as f64 * FLUSH));
        }
    }
    Ok(all)
}

/// Gradient of a table of so many rows that was looked up by these ids, where `dy` is that of the result: in each row
/// the sum over the tokens with its id, an id past the end meaning the last row.
///
/// # Panics
/// If the table has no rows, or there is not an id for each row of `dy`.
pub fn grad(rows: usize, ids: &[u32], dy: ArrayView2<'_, f64>) -> Array2<f64> {
    let mut table = Array2::zeros((rows, dy.ncols()));
    for (t, &id) in ids.iter().enumerate() {
        let mut row = table.row_mut((id as usize).min(rows - 1));
        row += &dy.row(t);
    }
    table
}

/// The same with its bounds, of an f32 gradient; added to `before`, where that is given. An error if the table has no
/// rows, or there is not an id for each row of `dy`.
///
/// ```
/// use sparse24::{Matrix, reference::embedding};
/// let dy = Matrix::from_f32(3, 1, &[1.0, 2.0, 4.0])?;
/// let want = embedding::expect_grad(2, &[1, 0, 9], &dy, None)?;
/// assert_eq!((want.element(0, 0).value, want.element(1, 0).value), (2.0, 5.0));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect_grad(rows: usize, ids: &[u32], dy: &Matrix, before: Option<&Matrix>) -> Result<Expectation> {
    expect_len("ids", ids.len(), dy.rows())?;
    if let Some(before) = before {
        expect_shape("what is added to", (before.rows(), before.cols()), (rows, dy.cols()))?;
    }
    if rows == 0 {
        return Err(Error::invalid("a table of an embedding has no rows"));
    }
    let exact = grad(rows, ids, dy.to_array().mapv(f64::from).view());
    let mut tokens = vec![Vec::new(); rows];
    ids.iter().enumerate().for_each(|(t, &id)| tokens[(id as usize).min(rows - 1)].push(t));
    let mut all = Expectation::new(rows, dy.cols(), DType::F32);
    for ((row, c), &sum) in exact.indexed_iter() {
        let terms = tokens[row].iter().map(|&t| Rounded::read(dy.get(t, c), dy.dtype()));
        let before = before.map(|before| Rounded::read(before.get(row, c), before.dtype()));
        all.push_near(sum + before.map_or(0.0, |before| before.value), Rounded::sum(terms.chain(before), 0));
    }
    Ok(all)
}
