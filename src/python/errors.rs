//! The crate's errors as Python's, with the crate's own messages.

use std::io::ErrorKind;

use pyo3::PyErr;
use pyo3::exceptions::{PyFileNotFoundError, PyMemoryError, PyOSError, PyRuntimeError, PyTypeError, PyValueError};

/// A Python exception: what the caller gave is a ValueError or TypeError, what the machine lacks a RuntimeError.
pub(crate) fn to_py(e: sparse24::Error) -> PyErr {
    let message = e.to_string();
    if e.is_dtype() {
        PyTypeError::new_err(message)
    } else if let Some(io) = e.io_error() {
        match io.kind() {
            ErrorKind::NotFound => PyFileNotFoundError::new_err(message),
            _ => PyOSError::new_err(message),
        }
    } else if e.is_out_of_memory() {
        PyMemoryError::new_err(message)
    } else if e.is_unsupported() || e.is_device_lost() || e.is_gpu() {
        PyRuntimeError::new_err(message)
    } else {
        PyValueError::new_err(message)
    }
}
