//! The native half of the Python package `sparse24`: the crate's types as Python objects, and nothing else.
//!
//! What is Pythonic (arrays of any library, defaults, docstrings) is in `python/sparse24`, which hands arrays over in
//! one form: C-contiguous, in the host's byte order, f32 or the bits of f16 and bf16. Invariants: the GIL is released
//! while something is computed; every call that needs threads goes through `process::enter` first.

mod arrays;
mod bench;
mod device;
mod errors;
mod files;
mod linear;
mod process;
mod sparse;
mod text;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::bench::{bench, layer_shapes};
    #[pymodule_export]
    use super::device::{Device, device_names};
    #[pymodule_export]
    use super::files::{Source, save};
    #[pymodule_export]
    use super::linear::Linear;
    #[pymodule_export]
    use super::sparse::{Sparse24, compress, prune};
    #[pymodule_export]
    use super::text::{Encoder, Generator};

    /// Of the crate.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");
}
