//! Files of tensors.

use std::collections::BTreeMap;

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use sparse24::io::{self, Dtype, Layout, Spec, Spec24, Stored, Writer};

use crate::errors::to_py;
use crate::sparse::{Sparse24, multiplied};

/// An open file, or a model's folder, of which the headers are in memory.
#[pyclass(module = "sparse24", frozen)]
pub(crate) struct Source {
    source: io::Source,
}

/// Name, type, shape and how it is stored.
type Item = (String, String, Vec<usize>, &'static str);

#[pymethods]
impl Source {
    #[new]
    fn new(py: Python<'_>, path: &str) -> PyResult<Self> {
        Ok(Self { source: py.detach(|| io::Source::open(path)).map_err(to_py)? })
    }

    /// All tensors.
    fn items(&self) -> Vec<Item> {
        let item =
            |item: &io::Item| (item.name.clone(), item.dtype.to_string(), item.shape.clone(), item.stored.name());
        self.source.items().map(item).collect()
    }

    /// Strings of the file's own.
    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.source.metadata()
    }

    /// Whether a tensor can be had as a compressed matrix.
    fn is_sparse24(&self, name: &str) -> PyResult<bool> {
        let item = self.item(name)?;
        let multiplied = matches!(item.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        Ok(multiplied && matches!(item.stored, Stored::Native | Stored::Bitmask | Stored::Cutlass))
    }

    /// A compressed matrix, with codes shared by as many rows as can share them unless the file says how many do.
    fn sparse24(&self, py: Python<'_>, name: &str) -> PyResult<Sparse24> {
        let item = self.item(name)?;
        let matrix = py.detach(|| self.source.widest24(item).and_then(multiplied)).map_err(to_py)?;
        Ok(Sparse24 { matrix })
    }

    /// The bytes of a tensor when it is dense, masks applied.
    fn dense<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let item = self.item(name)?;
        let bytes = py.detach(|| self.source.dense(item)).map_err(to_py)?;
        Ok(PyArray1::from_vec(py, bytes))
    }
}

impl Source {
    fn item(&self, name: &str) -> PyResult<&io::Item> {
        self.source.item(name).ok_or_else(|| PyKeyError::new_err(name.to_owned()))
    }
}

/// A type by safetensors' name.
fn file_dtype(name: &str) -> PyResult<Dtype> {
    serde_json::from_value(name.into()).map_err(|_| PyValueError::new_err(format!("{name} is no type of safetensors")))
}

/// Writes a file of dense tensors, given as name, type, shape and bytes, and of compressed matrices in a layout.
#[pyfunction]
pub(crate) fn save(
    py: Python<'_>,
    path: &str,
    dense: Vec<(String, String, Vec<usize>, PyReadonlyArray1<'_, u8>)>,
    compressed: Vec<(String, PyRef<'_, Sparse24>)>,
    layout: &str,
    metadata: BTreeMap<String, String>,
) -> PyResult<()> {
    let layout: Layout = layout.parse().map_err(to_py)?;
    let mut specs = Vec::new();
    let mut parts = Vec::new();
    for (name, dtype, shape, bytes) in &dense {
        specs.push(Spec::new(name.clone(), file_dtype(dtype)?, shape));
        parts.push((name, bytes.as_slice().map_err(|e| PyValueError::new_err(e.to_string()))?));
    }
    let mut all = metadata;
    let matrices: Vec<_> = compressed.iter().map(|(name, s)| (name, &s.matrix)).collect();
    for (name, matrix) in &matrices {
        let spec = Spec24::of(name.as_str(), *matrix);
        let named = |e: sparse24::Error| PyValueError::new_err(format!("{name}: {e}"));
        specs.extend(layout.specs(&spec).map_err(named)?);
        all.extend(layout.metadata(&spec));
    }
    all.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    let write = || -> sparse24::Result<()> {
        let mut writer = Writer::create(path, &specs, &all)?;
        parts.iter().try_for_each(|(name, bytes)| writer.write(name, bytes))?;
        matrices.iter().try_for_each(|(name, matrix)| layout.write(&mut writer, name, *matrix))?;
        writer.finish()
    };
    py.detach(write).map_err(to_py)
}
