//! Pruning, and compressed matrices.

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use sparse24::format::Bytes;
use sparse24::io::{Dtype, Layout};
use sparse24::prune::{Method, Statistics};
use sparse24::{DType, Elements, Error, Matrix, VectorLen};

use crate::arrays::{Array, dtype as dtype_of, to_array};
use crate::errors::to_py;
use crate::process::{self, interruptible};

/// Of so many elements a matrix is pruned on this thread: it takes less time than it takes a user to be impatient.
const AT_ONCE: usize = 1 << 20;

/// A compressed 2:4 matrix. Nothing in it changes.
#[pyclass(module = "sparse24", frozen)]
pub(crate) struct Sparse24 {
    pub(crate) matrix: sparse24::Sparse24,
}

pub(crate) fn vector_len(vector: usize) -> PyResult<VectorLen> {
    VectorLen::new(vector).map_err(to_py)
}

#[pymethods]
impl Sparse24 {
    /// Of values and metadata that were made elsewhere.
    #[staticmethod]
    fn from_parts(
        shape: (usize, usize),
        vector: usize,
        values: Array<'_>,
        dtype: &str,
        meta: PyReadonlyArray2<'_, u32>,
    ) -> PyResult<Self> {
        let values = values.matrix(dtype_of(dtype)?)?.into_elements();
        let meta = meta.as_slice().map_err(|e| PyValueError::new_err(e.to_string()))?.to_vec();
        let matrix = sparse24::Sparse24::from_parts(shape.0, shape.1, vector_len(vector)?, values, meta);
        Ok(Self { matrix: matrix.map_err(to_py)? })
    }

    /// Rows and columns of the dense matrix.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.matrix.m(), self.matrix.k())
    }

    #[getter]
    fn vector(&self) -> usize {
        self.matrix.vector().get()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.matrix.dtype().name()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.matrix.bytes()
    }

    /// A copy of the values.
    #[getter]
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_array(py, self.matrix.values().clone(), [self.matrix.m(), self.matrix.k_physical()])
    }

    /// A copy of the metadata.
    #[getter]
    fn meta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let shape = [self.matrix.meta_rows(), self.matrix.meta_cols()];
        Ok(PyArray1::from_slice(py, self.matrix.meta()).reshape(shape)?.into_any())
    }

    fn decompress<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let dense = py.detach(|| self.matrix.decompress());
        to_array(py, dense.into_elements(), [self.matrix.m(), self.matrix.k()])
    }

    /// The same matrix with codes shared by this many rows, or by as many as can share them.
    fn with_vector(&self, py: Python<'_>, vector: Option<usize>) -> PyResult<Self> {
        let vector = vector.map(vector_len).transpose()?;
        let matrix = py.detach(|| match vector {
            Some(vector) => self.matrix.clone().with_vector(vector),
            None => self.matrix.clone().widest(),
        });
        Ok(Self { matrix: matrix.map_err(to_py)? })
    }

    fn equals(&self, py: Python<'_>, other: &Self) -> bool {
        py.detach(|| self.matrix == other.matrix)
    }

    /// The tensors of a layout: name, type, shape and bytes of each.
    fn encode(&self, py: Python<'_>, layout: &str) -> PyResult<Vec<Tensor>> {
        let layout: Layout = layout.parse().map_err(to_py)?;
        let tensors = py.detach(|| layout.encode("", &self.matrix)).map_err(to_py)?;
        let tensor = |(spec, bytes): (sparse24::io::Spec, Vec<u8>)| {
            let name = spec.name.trim_start_matches('.').to_owned();
            (name, spec.dtype.to_string(), spec.shape, PyArray1::from_vec(py, bytes).unbind())
        };
        Ok(tensors.into_iter().map(tensor).collect())
    }

    /// Of the bytes of a layout's tensors.
    #[staticmethod]
    fn decode(
        py: Python<'_>,
        layout: &str,
        shape: (usize, usize),
        dtype: &str,
        vector: usize,
        parts: Vec<Bound<'_, PyBytes>>,
    ) -> PyResult<Self> {
        let layout: Layout = layout.parse().map_err(to_py)?;
        let (dtype, vector) = (Dtype::from(dtype_of(dtype)?), vector_len(vector)?);
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        let decode = || layout.decode(shape, dtype, vector, &parts).and_then(multiplied);
        Ok(Self { matrix: py.detach(decode).map_err(to_py)? })
    }
}

/// Name, type, shape and bytes.
type Tensor = (String, String, Vec<usize>, Py<PyArray1<u8>>);

/// A matrix of a type that is multiplied.
pub(crate) fn multiplied(matrix: sparse24::Sparse24<Bytes>) -> sparse24::Result<sparse24::Sparse24> {
    sparse24::Sparse24::try_from(matrix)
}

/// What a matrix is pruned by.
struct By {
    method: Method,
    vector: VectorLen,
    inputs: Option<Matrix>,
    seed: u64,
}

impl By {
    fn prune(&self, w: &Matrix) -> sparse24::Result<Matrix> {
        let Self { method, vector, seed, .. } = *self;
        let statistics = self.inputs.as_ref().filter(|_| method.needs_statistics()).map(|x| {
            let k = x.cols();
            let mut statistics = if method.needs_gram() { Statistics::full(k)? } else { Statistics::diagonal(k) };
            statistics.add(x).map(|()| statistics)
        });
        Ok(method.prune(w, vector, statistics.transpose()?.as_ref(), seed)?.0)
    }
}

/// The weights that stay, with zeros elsewhere.
#[pyfunction]
#[pyo3(signature = (w, dtype, vector, method, inputs, inputs_dtype, seed))]
#[allow(clippy::too_many_arguments, reason = "Python's side names them all and gives them defaults")]
pub(crate) fn prune<'py>(
    py: Python<'py>,
    w: Array<'py>,
    dtype: &str,
    vector: usize,
    method: &str,
    inputs: Option<Array<'py>>,
    inputs_dtype: &str,
    seed: u64,
) -> PyResult<Bound<'py, PyAny>> {
    process::enter()?;
    let method: Method = method.parse().map_err(to_py)?;
    let (w, vector) = (w.matrix(dtype_of(dtype)?)?, vector_len(vector)?);
    let inputs = match inputs {
        Some(inputs) if method.needs_statistics() => Some(inputs.matrix(dtype_of(inputs_dtype)?)?.cast(DType::F32)),
        _ => None,
    };
    if let Some(x) = &inputs
        && x.cols() != w.cols()
    {
        let reason = format!("inputs have {} features, the weights {}", x.cols(), w.cols());
        return Err(to_py(Error::invalid(reason)));
    }
    let (m, k) = (w.rows(), w.cols());
    let by = By { method, vector, inputs, seed };
    let pruned = match method.needs_statistics() || m.saturating_mul(k) > AT_ONCE {
        true => interruptible(py, move || by.prune(&w))?,
        false => py.detach(|| by.prune(&w)).map_err(to_py)?,
    };
    to_array(py, pruned.into_elements(), [m, k])
}

/// A matrix that is 2:4 already, compressed at this vector length or the largest that there is.
#[pyfunction]
pub(crate) fn compress(py: Python<'_>, w: Array<'_>, dtype: &str, vector: Option<usize>) -> PyResult<Sparse24> {
    process::enter()?;
    let (dtype, vector) = (dtype_of(dtype)?, vector.map(vector_len).transpose()?);
    let w = w.matrix(dtype)?;
    let elements: &Elements = w.elements();
    let compressed = py.detach(|| sparse24::Sparse24::from_elements(w.rows(), w.cols(), elements, vector));
    Ok(Sparse24 { matrix: compressed.map_err(to_py)? })
}
