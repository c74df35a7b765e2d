//! The one factorisation that second-order pruning and linear probes need, on `ndarray`'s matrix products.
//!
//! A linear-algebra crate would bring it, and two minutes of compilation.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, s};

use crate::error::{Error, Result};

/// Columns to a panel: what is left outside of matrix products is `n² · PANEL` multiply-adds.
const PANEL: usize = 48;

/// The upper triangular U with UᵀU = H⁻¹, for a symmetric positive definite H, `n x n`. An error names the column at
/// which H turns out not to be positive definite.
///
/// H = R·Rᵀ with R upper triangular is a Cholesky factorisation from the last column to the first; U is R⁻¹.
pub(crate) fn inverse_factor(h: Array2<f64>) -> Result<Array2<f64>> {
    Ok(invert_upper(factor_from_end(h)?))
}

/// R, upper triangular, with R·Rᵀ = H, in place of H.
fn factor_from_end(h: Array2<f64>) -> Result<Array2<f64>> {
    let n = h.nrows();
    // H is its own transpose: this makes its columns contiguous.
    let mut h = h.reversed_axes();
    let mut end = n;
    while end > 0 {
        let start = end.saturating_sub(PANEL);
        // The panel's own columns, from the last to the first; rows above it are divided as they come.
        for j in (start..end).rev() {
            let pivot = h[[j, j]];
            if !(pivot > 0.0 && pivot.is_finite()) {
                let reason = "more damping or more text is needed";
                return Err(Error::invalid(format!(
                    "the Gram matrix is not positive definite at column {j}: {reason}"
                )));
            }
            let root = pivot.sqrt();
            h[[j, j]] = root;
            for i in 0..j {
                h[[i, j]] /= root;
            }
            for c in start..j {
                let factor = h[[c, j]];
                for i in 0..=c {
                    h[[i, c]] -= h[[i, j]] * factor;
                }
            }
        }
        // H above and left of the panel -= P·Pᵀ, by row blocks of the upper triangle.
        let (mut left, panel) = h.view_mut().split_at(ndarray::Axis(1), start);
        let panel = panel.slice(s![.., ..end - start]);
        for from in (0..start).step_by(PANEL) {
            let to = start.min(from + PANEL);
            let mut block = left.slice_mut(s![from..to, from..]);
            general_mat_mul(
                -1.0,
                &panel.slice(s![from..to, ..]),
                &panel.slice(s![from..start, ..]).t(),
                1.0,
                &mut block,
            );
        }
        end = start;
    }
    for ((row, col), x) in h.indexed_iter_mut() {
        if col < row {
            *x = 0.0;
        }
    }
    Ok(h)
}

/// R⁻¹ of an upper triangular R with a positive diagonal.
fn invert_upper(mut r: Array2<f64>) -> Array2<f64> {
    let n = r.nrows();
    // By panels of columns: with R = [A B; 0 C], the inverse is [A⁻¹, -A⁻¹·B·C⁻¹; 0, C⁻¹].
    for start in (0..n).step_by(PANEL) {
        let end = n.min(start + PANEL);
        for j in start..end {
            let inverse = 1.0 / r[[j, j]];
            for i in start..j {
                // Rows i..j of column j: -(row i of the inverse so far) · (column j of R).
                let sum: f64 = (i..j).map(|c| r[[i, c]] * r[[c, j]]).sum();
                r[[i, j]] = -sum * inverse;
            }
            r[[j, j]] = inverse;
        }
        if start > 0 {
            let (above, diagonal) =
                (r.slice(s![..start, start..end]).to_owned(), r.slice(s![start..end, start..end]).to_owned());
            let mut right = Array2::zeros(above.dim());
            general_mat_mul(1.0, &above, &diagonal, 0.0, &mut right);
            let mut product = Array2::zeros(above.dim());
            general_mat_mul(-1.0, &r.slice(s![..start, ..start]), &right, 0.0, &mut product);
            r.slice_mut(s![..start, start..end]).assign(&product);
        }
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    fn the_factor_is_of_the_inverse() {
        for n in [1, 2, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 5] {
            let x = Array2::from_shape_fn((n + 7, n), |(i, j)| ((i * 37 + j * 101) % 89) as f64 / 89.0 - 0.4);
            let h = x.t().dot(&x) + Array2::<f64>::eye(n);
            let u = inverse_factor(h.clone()).unwrap();
            assert!(u.indexed_iter().all(|((i, j), &x)| i <= j || x == 0.0), "{n}");
            let off = h.dot(&u.t().dot(&u)) - Array2::<f64>::eye(n);
            assert!(off.iter().all(|x| x.abs() < 1e-9), "{n}: {:e}", off.iter().fold(0f64, |m, x| m.max(x.abs())));
        }
        let singular = Array2::from_elem((3, 3), 1.0);
        assert!(inverse_factor(singular).is_err());
    }
}
