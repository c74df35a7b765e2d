//! stub

#[cfg(feature = "cli")]
pub mod cli;
mod cpu;
pub mod engine;
pub mod error;
pub mod format;
mod gpu;
pub mod io;
pub mod kernel;
pub mod mask;
pub mod matrix;
pub mod measure;
pub mod plan;
pub mod problem;
pub mod prune;
pub mod reference;
#[cfg(feature = "cli")]
pub mod report;

pub use engine::{Device, Io, Options, Prepared, Tensor, Weights};
pub use error::{Error, Result};
pub use format::Sparse24;
pub use io::TensorFile;
pub use mask::{Mask, Mask24, VectorLen};
pub use matrix::{DType, Element, Elements, Matrix};
pub use plan::Plan;
pub use problem::{Activation, Epilogue, Form, Op, Problem};
pub use reference::{Oracle, Sample, Verdict};
