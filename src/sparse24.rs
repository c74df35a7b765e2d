//! The compressed 2:4 format, version 1.

use crate::error::Result;
use crate::mask::VectorLen;
use crate::matrix::{DType, Elements};

/// A 2:4 matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse24 {
    m: usize,
    k: usize,
    vector: VectorLen,
    values: Elements,
    meta: Vec<u32>,
}

impl Sparse24 {
    /// Parts.
    pub fn from_parts(m: usize, k: usize, vector: VectorLen, values: Elements, meta: Vec<u32>) -> Result<Self> {
        Ok(Self { m, k, vector, values, meta })
    }
    /// Rows of W.
    pub fn m(&self) -> usize {
        self.m
    }
    /// k_logical.
    pub fn k(&self) -> usize {
        self.k
    }
    /// Columns of `values`.
    pub fn k_physical(&self) -> usize {
        self.k.div_ceil(4) * 2
    }
    /// V.
    pub fn vector(&self) -> VectorLen {
        self.vector
    }
    /// Type.
    pub fn dtype(&self) -> DType {
        self.values.dtype()
    }
    /// `m x k_physical`.
    pub fn values(&self) -> &Elements {
        &self.values
    }
    /// `meta_rows x meta_cols`.
    pub fn meta(&self) -> &[u32] {
        &self.meta
    }
    /// ceil(m / V).
    pub fn meta_rows(&self) -> usize {
        self.m.div_ceil(self.vector.get())
    }
    /// ceil(k / 32).
    pub fn meta_cols(&self) -> usize {
        self.k.div_ceil(32)
    }
    /// Bytes of values and metadata.
    pub fn bytes(&self) -> usize {
        self.values.len() * self.dtype().bytes() + self.meta.len() * 4
    }
}
