//! The oracle of the normalisation of the heads of queries and keys.
//!
//! # The bound
//! Of heads of Q and K that of [normalisation](super::rms_norm), with a head's features for a token's. Of V, which is
//! copied, φ; then the store. The gradients likewise: of `qkv` head by head, and of each gamma as a sum over tokens and
//! heads.
//!
//! Invariant: no code is shared with the devices.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::{Expectation, bounded, phi, rms_norm};
use crate::error::{Error, Result, expect_shape};
use crate::matrix::{DType, Elements, Matrix};

/// Columns of Q, of K and of V in rows that have so many heads of Q and of K.
fn columns((heads, kv_heads): (usize, usize), head_dim: usize) -> [std::ops::Range<usize>; 3] {
    let [k, v, end] = [heads, heads + kv_heads, heads + 2 * kv_heads].map(|at| at * head_dim);
    [0..k, k..v, v..end]
}

/// The heads in some columns, a row for each, those of a token one below another.
fn rows_of(qkv: ArrayView2<'_, f64>, columns: std::ops::Range<usize>, head_dim: usize) -> Array2<f64> {
    let part = qkv.slice(s![.., columns]);
    Array2::from_shape_fn((part.len() / head_dim.max(1), head_dim), |(row, c)| {
        let heads = part.ncols() / head_dim;
        part[[row / heads, row % heads * head_dim + c]]
    })
}

/// The same of a matrix.
fn matrix_of(qkv: &Matrix, columns: std::ops::Range<usize>, head_dim: usize) -> Result<Matrix> {
    let rows = rows_of(qkv.to_array().mapv(f64::from).view(), columns, head_dim);
    let numbers: Vec<f32> = rows.iter().map(|&x| x as f32).collect();
    Matrix::new(rows.nrows(), rows.ncols(), Elements::from_f32(qkv.dtype(), &numbers))
}

/// Q | K | V, in each row of `qkv` so many heads of Q, and of K and V, with each head of Q over the root of the mean of
/// its squares and `eps`, times a gamma per feature, and each head of K with gammas of its own.
///
/// # Panics
/// If features are no whole number for each head, or not as many as gammas.
pub fn exact(
    qkv: ArrayView2<'_, f64>,
    (q_gamma, k_gamma): (&[f64], &[f64]),
    heads: (usize, usize),
    eps: f64,
) -> Array2<f64> {
    let dim = q_gamma.len();
    let [q, k, v] = columns(heads, dim);
    assert!(qkv.ncols() == v.end && k_gamma.len() == dim, "{} features, heads of {dim}", qkv.ncols());
    let mut y = qkv.to_owned();
    for (columns, gamma) in [(q, q_gamma), (k, k_gamma)] {
        let normed = rms_norm::exact(rows_of(qkv, columns.clone(), dim).view(), gamma, eps);
        let count = columns.len() / dim.max(1);
        for ((row, c), &value) in normed.indexed_iter() {
            y[[row / count, columns.start + row % count * dim + c]] = value;
        }
    }
    y
}

/// An error unless rows of `qkv` have so many heads, each of as many features as there are gammas.
fn check(qkv: &Matrix, (q_gamma, k_gamma): (&[f32], &[f32]), (heads, kv_heads): (usize, usize)) -> Result<()> {
    if q_gamma.len() != k_gamma.len() || qkv.cols() != (heads + 2 * kv_heads) * q_gamma.len() {
        return Err(Error::invalid(format!(
            "{} features for {heads} heads and {kv_heads} of keys, {} and {} gammas",
            qkv.cols(),
            q_gamma.len(),
            k_gamma.len()
        )));
    }
    Ok(())
}

/// What the heads of Q and of K become, put together with what those of V do.
fn put_together(
    (tokens, dim): (usize, usize),
    heads: (usize, usize),
    [q, k]: [&Expectation; 2],
    output: DType,
    mut v: impl FnMut(usize, usize) -> (f64, f64),
) -> Expectation {
    let [_, _, of_v] = columns(heads, dim);
    let mut all = Expectation::new(tokens, of_v.end, output);
    for token in 0..tokens {
        for (part, heads) in [(q, heads.0), (k, heads.1)] {
            all.elements.extend_from_slice(&part.elements[token * heads * dim..][..heads * dim]);
        }
        for column in of_v.clone() {
            let (value, error) = v(token, column);
            all.push(value, bounded(value, error));
        }
    }
    all
}

/// The same with its bounds. An error if shapes do not fit.
///
/// ```
/// use sparse24::{DType, Matrix, reference::qk_norm};
/// let qkv = Matrix::from_f32(1, 6, &[3.0, -3.0, 5.0, 5.0, 7.0, 8.0])?;
/// let want = qk_norm::expect(&qkv, (&[1.0, 2.0], &[0.5, 4.0]), (1, 1), 0.0, DType::F32)?;
/// let values: Vec<f64> = (0..6).map(|c| want.element(0, c).value).collect();
/// assert_eq!(values, [1.0, -2.0, 0.5, 4.0, 7.0, 8.0]);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn expect(
    qkv: &Matrix,
    gammas: (&[f32], &[f32]),
    heads: (usize, usize),
    eps: f32,
    output: DType,
) -> Result<Expectation> {
    check(qkv, gammas, heads)?;
    let dim = gammas.0.len();
    let [q, k, _] = columns(heads, dim);
    let of = |columns, gamma: &[f32]| rms_norm::expect(&matrix_of(qkv, columns, dim)?, gamma, eps, output);
    let (q, k) = (of(q, gammas.0)?, of(k, gammas.1)?);
    let v = |token, column| {
        let x = f64::from(qkv.get(token, column));
        (x, phi(x, qkv.dtype()))
    };
    Ok(put_together((qkv.rows(), dim), heads, [&q, &k], output, v))
}

/// Gradients of Q | K | V, of the gammas of Q and of those of K, where `dy` is that of the result.
///
/// # Panics
/// As [`exact`], or if `dy` has another shape than `qkv`.
pub fn grad(
    qkv: ArrayView2<'_, f64>,
    (q_gamma, k_gamma): (&[f64], &[f64]),
    heads: (usize, usize),
    eps: f64,
    dy: ArrayView2<'_, f64>,
) -> (Array2<f64>, [Array1<f64>; 2]) {
    let dim = q_gamma.len();
    let [q, k, _] = columns(heads, dim);
    let mut dqkv = dy.to_owned();
    let mut of = |columns: std::ops::Range<usize>, gamma: &[f64]| {
        let (x, dy) = (rows_of(qkv, columns.clone(), dim), rows_of(dy, columns.clone(), dim));
        let (dx, dgamma) = rms_norm::grad(x.view(), gamma, eps, dy.view());
        for (row, dx) in dx.axis_iter(Axis(0)).enumerate() {
            let count = columns.len() / dim;
            let first = columns.start + row % count * dim;
            dqkv.slice_mut(s![row / count, first..first + dim]).assign(&dx);
        }
        dgamma
    };
    let dgammas = [of(q, q_gamma), of(k, k_gamma)];
    (dqkv, dgammas)
}

/// The same with their bounds, of f32 operands: of `qkv`, of the gammas of Q, and of those of K.
pub fn expect_grad(
    qkv: &Matrix,
    gammas: (&[f32], &[f32]),
    heads: (usize, usize),
    eps: f32,
    dy: &Matrix,
) -> Result<[Expectation; 3]> {
    check(qkv, gammas, heads)?;
    expect_shape("dy", (dy.rows(), dy.cols()), (qkv.rows(), qkv.cols()))?;
    let dim = gammas.0.len();
    let [q, k, _] = columns(heads, dim);
    let of = |columns: std::ops::Range<usize>, gamma: &[f32]| {
        let (x, dy) = (matrix_of(qkv, columns.clone(), dim)?, matrix_of(dy, columns, dim)?);
        rms_norm::expect_grad(&x, gamma, eps, &dy)
    };
    let ([dq, dq_gamma], [dk, dk_gamma]) = (of(q, gammas.0)?, of(k, gammas.1)?);
    let v = |token, column| {
        let dy = f64::from(dy.get(token, column));
        (dy, phi(dy, DType::F32))
    };
    Ok([put_together((qkv.rows(), dim), heads, [&dq, &dk], DType::F32, v), dq_gamma, dk_gamma])
}
