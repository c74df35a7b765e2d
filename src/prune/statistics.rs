//! What calibration text says about the inputs of a linear layer.
//!
//! A layer's output error after pruning is (Ŵ - W)·X over the inputs X that it meets, so its square is a quadratic form
//! in the change of the weights, with the *Gram matrix* H = Σ x·xᵀ over tokens as its matrix. Second-order pruning
//! reads all of H; criteria that score each weight by itself read its diagonal, Σ x_c².
//!
//! In a model of which earlier layers are pruned already, a layer meets inputs x̂ that are not the x of the dense
//! model, and what it should give is W·x. With C = Σ x·x̂ᵀ the weights that come closest are W·C·H⁻¹: pruning towards
//! those instead of W lets a layer make up for what the layers before it lost (GPTAQ, Li et al. 2025,
//! [arXiv:2504.02692](https://arxiv.org/abs/2504.02692), for quantisation). Invariant: sums are over all rows added, in
//! f64 across calls.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, s};
use rayon::prelude::*;

use crate::error::{Error, Result, checked_mul, expect_shape};
use crate::matrix::Matrix;

/// Columns of H to a task: large enough for a matrix product to run at its speed, small enough for two cores to share
/// the half of H that is computed.
const BLOCK: usize = 128;
/// Tokens that are summed in f32 before they are added in f64.
const TOKENS: usize = 4096;

/// Sums over the inputs of one linear layer of `k` features.
///
/// ```
/// use sparse24::{Matrix, prune::Statistics};
/// let mut statistics = Statistics::full(2)?;
/// statistics.add(&Matrix::from_f32(2, 2, &[1., 2., 3., 0.])?)?;
/// statistics.add(&Matrix::from_f32(1, 2, &[0., 1.])?)?;
/// assert_eq!(statistics.tokens(), 3);
/// assert_eq!(statistics.squares(), [10., 5.]);
/// assert_eq!(statistics.gram(), Some(ndarray::arr2(&[[10., 2.], [2., 5.]]).view()));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Statistics {
    tokens: u64,
    squares: Vec<f64>,
    /// Symmetric; both halves are kept.
    gram: Option<Array2<f64>>,
    /// C, if pairs were added.
    cross: Option<Array2<f64>>,
}

impl Statistics {
    /// No tokens yet; the diagonal of H alone will be summed.
    pub fn diagonal(k: usize) -> Self {
        Self { tokens: 0, squares: vec![0.0; k], gram: None, cross: None }
    }

    /// No tokens yet; all of H will be summed: `8 k²` bytes, and as many
    /// again for pairs. An error if there is no room for the first.
    pub fn full(k: usize) -> Result<Self> {
        let elements = checked_mul("Gram matrix", k, k)?;
        let asked = Vec::<f64>::new().try_reserve_exact(elements);
        asked.map_err(|_| Error::out_of_memory(format!("a Gram matrix of {k} x {k} f64")))?;
        Ok(Self { gram: Some(Array2::zeros((k, k))), ..Self::diagonal(k) })
    }

    /// Adds tokens, one a row of k features. An error if k differs or a feature is infinite or NaN.
    pub fn add(&mut self, x: &Matrix) -> Result<()> {
        if self.cross.is_some() {
            return Err(Error::invalid("pairs of inputs are for full statistics of pairs alone"));
        }
        self.sum(x)
    }

    fn sum(&mut self, x: &Matrix) -> Result<()> {
        let x = self.checked(x)?;
        self.tokens += x.nrows() as u64;
        for row in x.rows() {
            for (sum, &x) in self.squares.iter_mut().zip(row) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        if let Some(gram) = &mut self.gram {
            add_products(gram, x.view(), x.view(), true);
        }
        Ok(())
    }

    /// As [`Self::add`], with what the same tokens are in the dense model: C is summed, too. For statistics with all of
    /// H, to which all tokens are added in this way.
    pub fn add_pair(&mut self, x: &Matrix, dense: &Matrix) -> Result<()> {
        expect_shape("inputs of the dense model", (dense.rows(), dense.cols()), (x.rows(), x.cols()))?;
        if self.gram.is_none() || (self.cross.is_none() && self.tokens > 0) {
            return Err(Error::invalid("pairs of inputs are for full statistics of pairs alone"));
        }
        let dense = self.checked(dense)?;
        self.sum(x)?;
        let k = self.k();
        let cross = self.cross.get_or_insert_with(|| Array2::zeros((k, k)));
        add_products(cross, dense.view(), x.to_array().view(), false);
        Ok(())
    }

    fn checked(&self, x: &Matrix) -> Result<Array2<f32>> {
        expect_shape("inputs", (x.rows(), x.cols()), (x.rows(), self.k()))?;
        let x = x.to_array();
        match x.indexed_iter().find(|(_, x)| !x.is_finite()) {
            Some(((token, col), value)) => Err(Error::invalid(format!("input {col} of token {token} is {value}"))),
            None => Ok(x),
        }
    }

    /// Features of an input.
    pub fn k(&self) -> usize {
        self.squares.len()
    }

    /// Tokens added.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Σ x_c² for every feature c: the diagonal of H.
    pub fn squares(&self) -> &[f64] {
        &self.squares
    }

    /// H, `k x k`, if it was summed.
    pub fn gram(&self) -> Option<ArrayView2<'_, f64>> {
        self.gram.as_ref().map(|gram| gram.view())
    }

    /// C, `k x k`, rows by the dense model's features, if pairs were added.
    pub fn cross(&self) -> Option<ArrayView2<'_, f64>> {
        self.cross.as_ref().map(|cross| cross.view())
    }

    /// How much of the layer's output is lost where `pruned` stands in for `w`, both `m x k`: Σ‖(ŵ - w)·x‖² over
    /// Σ‖w·x‖², over all rows w and all tokens x. 0 is nothing lost. By the diagonal alone, as if features were
    /// uncorrelated, where H was not summed. NaN if the layer's output is zero.
    pub fn lost(&self, w: &Matrix, pruned: &Matrix) -> Result<f64> {
        expect_shape("weights", (w.rows(), w.cols()), (w.rows(), self.k()))?;
        expect_shape("pruned weights", (pruned.rows(), pruned.cols()), (w.rows(), w.cols()))?;
        let energy = |w: &Array2<f64>| match &self.gram {
            Some(gram) => (w.dot(gram) * w).sum(),
            None => (w * w).dot(&Array1::from(self.squares.clone())).sum(),
        };
        let w = w.to_array().mapv(f64::from);
        let lost = pruned.to_array().mapv(f64::from) - &w;
        Ok(energy(&lost) / energy(&w))
    }
}

/// `sum += AᵀB` by blocks, shared by all threads. `symmetric`: A is B, so that the upper half is enough to compute.
fn add_products(sum: &mut Array2<f64>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, symmetric: bool) {
    let k = a.ncols();
    let blocks: Vec<_> = (0..k).step_by(BLOCK).map(|from| (from, k.min(from + BLOCK))).collect();
    let first = |row: usize| if symmetric { row } else { 0 };
    let pairs = blocks.iter().enumerate();
    let pairs: Vec<_> = pairs.flat_map(|(i, &rows)| blocks[first(i)..].iter().map(move |&cols| (rows, cols))).collect();
    for from in (0..a.nrows()).step_by(TOKENS) {
        let tokens = from..a.nrows().min(from + TOKENS);
        let (a, b) = (a.slice(s![tokens.clone(), ..]), b.slice(s![tokens, ..]));
        let products: Vec<_> = pairs
            .par_iter()
            .map(|&(rows, cols)| {
                let mut product = Array2::<f32>::zeros((rows.1 - rows.0, cols.1 - cols.0));
                let a = a.slice(s![.., rows.0..rows.1]);
                general_mat_mul(1.0, &a.t(), &b.slice(s![.., cols.0..cols.1]), 0.0, &mut product);
                product
            })
            .collect();
        for (&(rows, cols), product) in pairs.iter().zip(products) {
            let product = product.mapv(f64::from);
            let mut at = sum.slice_mut(s![rows.0..rows.1, cols.0..cols.1]);
            at += &product;
            if symmetric && rows != cols {
                let mut mirrored = sum.slice_mut(s![cols.0..cols.1, rows.0..rows.1]);
                mirrored += &product.t();
            }
        }
    }
}
