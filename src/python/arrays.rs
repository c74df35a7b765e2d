//! numpy's arrays as the crate's elements, and back.
//!
//! Input is copied once where the crate keeps it, or read in place. Output is the crate's own memory, which numpy takes
//! over. Invariant: arrays of 16 bits are the bits of f16 or bf16, and whoever passes one says which.

use std::fmt::Display;

use bytemuck::{cast_slice, cast_vec};
use half::{bf16, f16};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use sparse24::{DType, Elements, Matrix};

use crate::errors::to_py;

/// An array of two dimensions: f32, or the bits of f16 or bf16.
#[derive(FromPyObject)]
pub(crate) enum Array<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    Bits(PyReadonlyArray2<'py, u16>),
}

/// What an array holds, in place.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl Array<'_> {
    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        let shape = match self {
            Self::F32(array) => array.shape(),
            Self::Bits(array) => array.shape(),
        };
        (shape[0], shape[1])
    }

    /// The numbers, row-major, of the type that the caller says they are.
    pub(crate) fn numbers(&self, dtype: DType) -> PyResult<Numbers<'_>> {
        Ok(match (self, dtype) {
            (Self::F32(array), DType::F32) => Numbers::F32(array.as_slice().map_err(strided)?),
            (Self::Bits(array), DType::F16) => Numbers::F16(cast_slice(array.as_slice().map_err(strided)?)),
            (Self::Bits(array), DType::Bf16) => Numbers::Bf16(cast_slice(array.as_slice().map_err(strided)?)),
            _ => return Err(PyTypeError::new_err(format!("the array does not hold {dtype}"))),
        })
    }

    /// A copy of the numbers.
    pub(crate) fn matrix(&self, dtype: DType) -> PyResult<Matrix> {
        let (rows, cols) = self.shape();
        let elements = match self.numbers(dtype)? {
            Numbers::F32(data) => Elements::F32(data.to_vec()),
            Numbers::F16(data) => Elements::F16(data.to_vec()),
            Numbers::Bf16(data) => Elements::Bf16(data.to_vec()),
        };
        Matrix::new(rows, cols, elements).map_err(to_py)
    }
}

/// Python's side hands over contiguous arrays.
fn strided(e: impl Display) -> PyErr {
    PyTypeError::new_err(e.to_string())
}

/// An element type by the crate's name: `f32`, `f16` or `bf16`.
pub(crate) fn dtype(name: &str) -> PyResult<DType> {
    let found = [DType::F32, DType::F16, DType::Bf16].into_iter().find(|dtype| dtype.name() == name);
    found.ok_or_else(|| PyTypeError::new_err(format!("element type {name:?} is not one of f32, f16, bf16")))
}

/// The elements as an array of this shape, without a copy: of f32, or of the bits of f16 or bf16.
pub(crate) fn to_array<'py>(py: Python<'py>, elements: Elements, shape: [usize; 2]) -> PyResult<Bound<'py, PyAny>> {
    Ok(match elements {
        Elements::F32(data) => PyArray1::from_vec(py, data).reshape(shape)?.into_any(),
        Elements::F16(data) => PyArray1::from_vec(py, cast_vec::<f16, u16>(data)).reshape(shape)?.into_any(),
        Elements::Bf16(data) => PyArray1::from_vec(py, cast_vec::<bf16, u16>(data)).reshape(shape)?.into_any(),
    })
}
