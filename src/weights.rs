//! The weights of one linear layer on the host, `m x k`, in any of the forms that the crate multiplies by.
//!
//! Files are read into them, pruning turns one form into another,
//! [`Device::upload_weights`](crate::Device::upload_weights) takes them to a device, and the oracle is told them.
//! Invariant: a method that changes weights or their order keeps which of them are kept.

use std::ops::Range;

use crate::error::{Error, Result, expect_shape};
use crate::format::Sparse24;
use crate::mask::{Mask, Mask24, VectorLen};
use crate::matrix::{DType, Element, Elements, Matrix, each_dtype};
use crate::problem::Op;
use crate::prune::permute;

/// Weights on the host, `m x k`, in the form in which a product is to have them.
#[derive(Clone, Debug, PartialEq)]
pub enum HostWeights {
    /// Every weight.
    Dense(Matrix),
    /// Compressed 2:4 weights.
    Sparse24(Sparse24),
    /// Every weight, and the mask of the same shape that is applied whenever they are used, a bit per weight.
    Masked(Matrix, Mask),
    /// As [`Masked`](Self::Masked), with the mask held as 2:4 codes: of groups that keep two weights each.
    Masked24(Matrix, Mask24),
}

impl HostWeights {
    /// Output features.
    pub fn m(&self) -> usize {
        match self {
            Self::Dense(w) | Self::Masked(w, _) | Self::Masked24(w, _) => w.rows(),
            Self::Sparse24(w) => w.m(),
        }
    }

    /// Input features, before compression.
    pub fn k(&self) -> usize {
        match self {
            Self::Dense(w) | Self::Masked(w, _) | Self::Masked24(w, _) => w.cols(),
            Self::Sparse24(w) => w.k(),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(w) | Self::Masked(w, _) | Self::Masked24(w, _) => w.dtype(),
            Self::Sparse24(w) => w.dtype(),
        }
    }

    /// The operation that takes weights of this form.
    pub fn op(&self) -> Op {
        match self {
            Self::Dense(_) => Op::Dense,
            Self::Sparse24(w) => Op::Sparse24(w.vector()),
            Self::Masked(..) => Op::Masked,
            Self::Masked24(..) => Op::Masked24,
        }
    }

    /// The mask that is applied whenever the weights are used, if there is one.
    pub fn mask(&self) -> Option<&Mask> {
        self.masked().map(|(_, mask)| mask)
    }

    /// What is multiplied with: every weight, with zeros where it is pruned or masked. An error if a mask has another
    /// shape than its weights.
    pub fn to_dense(&self) -> Result<Matrix> {
        match self {
            Self::Dense(w) => Ok(w.clone()),
            Self::Sparse24(w) => Ok(w.decompress()),
            Self::Masked(w, mask) => mask.apply(w),
            Self::Masked24(w, mask) => mask.mask().apply(w),
        }
    }

    /// Some of the rows, in the same form, but that codes of a mask become bits. An error if there are no such rows, or
    /// a mask has another shape than its weights.
    pub fn rows_of(&self, rows: Range<usize>) -> Result<Self> {
        match (self, self.masked()) {
            (_, Some((w, mask))) => {
                expect_shape("mask", (mask.rows(), mask.cols()), (w.rows(), w.cols()))?;
                let from = rows.start;
                let part = w.rows_of(rows)?;
                let mask = Mask::from_fn(part.rows(), part.cols(), |row, col| mask.get(from + row, col))?;
                Ok(Self::Masked(part, mask))
            }
            (Self::Sparse24(w), _) => Ok(Self::Sparse24(w.rows_of(rows)?)),
            (Self::Dense(w) | Self::Masked(w, _) | Self::Masked24(w, _), None) => Ok(Self::Dense(w.rows_of(rows)?)),
        }
    }

    /// The same weights in another element type. An error names the first one that is infinite or NaN in it.
    pub(crate) fn cast(self, dtype: DType) -> Result<Self> {
        let weights = match self {
            Self::Dense(w) => Self::Dense(w.cast(dtype)),
            Self::Masked(w, mask) => Self::Masked(w.cast(dtype), mask),
            Self::Masked24(w, mask) => Self::Masked24(w.cast(dtype), mask),
            Self::Sparse24(w) if w.dtype() == dtype => Self::Sparse24(w),
            Self::Sparse24(w) => {
                let (m, k, vector, values, meta) = w.into_parts();
                let values = Elements::from_f32(dtype, &values.to_f32());
                Self::Sparse24(Sparse24::from_parts(m, k, vector, values, meta)?)
            }
        };
        match &weights {
            Self::Dense(w) | Self::Masked(w, _) | Self::Masked24(w, _) => finite(w.elements(), w.cols())?,
            Self::Sparse24(w) => finite(w.values(), w.k_physical())?,
        }
        Ok(weights)
    }

    /// The same weights in f32, each as `of` makes it of its row and of what it is. What is zero must stay so.
    pub(crate) fn map_rows(&self, of: impl Fn(usize, f32) -> f32) -> Result<Self> {
        let mapped = |elements: &Elements, columns: usize| {
            let mut numbers = elements.to_f32();
            for (row, numbers) in numbers.chunks_mut(columns.max(1)).enumerate() {
                numbers.iter_mut().for_each(|w| *w = of(row, *w));
            }
            Elements::F32(numbers)
        };
        let dense = |w: &Matrix| Matrix::new(w.rows(), w.cols(), mapped(w.elements(), w.cols()));
        Ok(match self {
            Self::Dense(w) => Self::Dense(dense(w)?),
            Self::Masked(w, mask) => Self::Masked(dense(w)?, mask.clone()),
            Self::Masked24(w, mask) => Self::Masked24(dense(w)?, mask.clone()),
            Self::Sparse24(w) => {
                let values = mapped(w.values(), w.k_physical());
                Self::Sparse24(Sparse24::from_parts(w.m(), w.k(), w.vector(), values, w.meta().to_vec())?)
            }
        })
    }

    /// The same weights as what takes the place of others of this shape and element type, by the layer's name. An error
    /// if they do not fit.
    pub(crate) fn fitted(self, name: &str, shape: (usize, usize), dtype: DType) -> Result<Self> {
        expect_shape(name, (self.m(), self.k()), shape)?;
        if let Some(mask) = self.mask() {
            expect_shape(&format!("mask of {name}"), (mask.rows(), mask.cols()), shape)?;
        }
        self.cast(dtype).map_err(|e| Error::invalid(format!("{name}: {e}")))
    }

    /// Weights of the same type and number of columns one under the other. 2:4 if all are, with the longest vector
    /// whose blocks lie in one part each; masked if all are; dense otherwise.
    pub(crate) fn stacked(mut parts: Vec<Self>) -> Result<Self> {
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let Some(first) = parts.first() else { return Err(Error::invalid("no matrices to stack")) };
        let (rows, k, dtype) = (parts.iter().map(Self::m).sum(), first.k(), first.dtype());
        let compressed: Option<Vec<&Sparse24>> = parts
            .iter()
            .map(|part| match part {
                Self::Sparse24(w) => Some(w),
                _ => None,
            })
            .collect();
        if let Some(compressed) = compressed {
            let fits = |v: &VectorLen| compressed.iter().all(|w| w.vector() >= *v && w.m().is_multiple_of(v.get()));
            let vector = VectorLen::ALL.into_iter().rev().find(fits).unwrap_or(VectorLen::ONE);
            let parts: Vec<_> = compressed.iter().map(|&w| w.clone().with_vector(vector)).collect::<Result<_>>()?;
            let values = join(parts.iter().map(|w| w.values()), dtype);
            let meta = parts.iter().flat_map(|w| w.meta()).copied().collect();
            return Ok(Self::Sparse24(Sparse24::from_parts(rows, k, vector, values, meta)?));
        }
        let masked: Option<Vec<(&Matrix, &Mask)>> = parts.iter().map(Self::masked).collect();
        if let Some(masked) = masked {
            let weights = Matrix::new(rows, k, join(masked.iter().map(|(w, _)| w.elements()), dtype))?;
            let words = masked.iter().flat_map(|(_, mask)| mask.words()).copied().collect();
            return Ok(Self::Masked(weights, Mask::new(rows, k, words)?));
        }
        let dense: Vec<_> = parts.iter().map(Self::to_dense).collect::<Result<_>>()?;
        Ok(Self::Dense(Matrix::new(rows, k, join(dense.iter().map(Matrix::elements), dtype))?))
    }

    /// The same weights with their rows in this order: place `i` gets row `order[i]`. An error if they are compressed,
    /// whose pattern would not survive.
    pub(crate) fn rows_in(&self, order: &[usize]) -> Result<Self> {
        self.moved("rows", |w| permute::rows(w, order), |row, col| (order[row], col))
    }

    /// The same weights with their columns in this order; see [`HostWeights::rows_in`].
    pub(crate) fn columns_in(&self, order: &[usize]) -> Result<Self> {
        self.moved("columns", |w| permute::columns(w, order), |row, col| (row, order[col]))
    }

    /// The same weights in another order, in which a place gets what was at `from` of it. Codes of a mask become bits.
    fn moved(
        &self,
        what: &str,
        weights: impl Fn(&Matrix) -> Result<Matrix>,
        from: impl Fn(usize, usize) -> (usize, usize),
    ) -> Result<Self> {
        match (self, self.masked()) {
            (_, Some((w, mask))) => {
                let kept = |row, col| {
                    let (row, col) = from(row, col);
                    mask.get(row, col)
                };
                Ok(Self::Masked(weights(w)?, Mask::from_fn(mask.rows(), mask.cols(), kept)?))
            }
            (Self::Dense(w), _) => Ok(Self::Dense(weights(w)?)),
            _ => Err(Error::invalid(format!("the {what} of compressed weights cannot be permuted, prune afterwards"))),
        }
    }

    /// Weights and the mask that is applied to them, if there is one.
    fn masked(&self) -> Option<(&Matrix, &Mask)> {
        match self {
            Self::Dense(_) | Self::Sparse24(_) => None,
            Self::Masked(w, mask) => Some((w, mask)),
            Self::Masked24(w, mask) => Some((w, mask.mask())),
        }
    }
}

/// Elements of the same type one after the other.
fn join<'a>(parts: impl Iterator<Item = &'a Elements>, dtype: DType) -> Elements {
    fn of<'a, T: Element>(parts: impl Iterator<Item = &'a Elements>) -> Elements {
        T::wrap(parts.filter_map(T::of).flatten().copied().collect())
    }
    match dtype {
        DType::F32 => of::<f32>(parts),
        DType::F16 => of::<half::f16>(parts),
        DType::Bf16 => of::<half::bf16>(parts),
    }
}

/// An error that names the first element that is infinite or NaN, by its place in a matrix of so many columns.
pub(crate) fn finite(elements: &Elements, cols: usize) -> Result<()> {
    let found = each_dtype!(elements, v => v.iter().position(|x| !x.to_f32().is_finite()));
    match found {
        None => Ok(()),
        Some(at) => Err(Error::invalid(format!(
            "row {}, column {} is {} as {}",
            at / cols,
            at % cols,
            elements.get(at),
            elements.dtype()
        ))),
    }
}

impl From<Matrix> for HostWeights {
    fn from(w: Matrix) -> Self {
        Self::Dense(w)
    }
}

impl From<&Matrix> for HostWeights {
    fn from(w: &Matrix) -> Self {
        Self::Dense(w.clone())
    }
}

impl From<Sparse24> for HostWeights {
    fn from(w: Sparse24) -> Self {
        Self::Sparse24(w)
    }
}

impl From<&Sparse24> for HostWeights {
    fn from(w: &Sparse24) -> Self {
        Self::Sparse24(w.clone())
    }
}
