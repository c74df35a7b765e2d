//! stub

mod cpu;
pub mod engine;
pub mod error;
mod gpu;
pub mod kernel;
pub mod mask;
pub mod matrix;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod sparse24;

pub use engine::{Device, Io, Options, Prepared, Tensor, Weights};
pub use error::{Error, Result};
pub use mask::{Mask, Mask24, VectorLen};
pub use matrix::{DType, Element, Elements, Matrix};
pub use plan::Plan;
pub use problem::{Activation, Epilogue, Form, Op, Problem};
pub use reference::{Oracle, Sample, Verdict};
pub use sparse24::Sparse24;
