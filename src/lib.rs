//! stub

pub mod error;
pub mod io;
pub mod mask;
pub mod matrix;
pub mod problem;
pub mod prune;
pub mod sparse24;

pub use error::{Error, Result};
pub use io::TensorFile;
pub use mask::{Mask, Mask24, VectorLen};
pub use matrix::{DType, Element, Elements, Matrix};
pub use problem::{Activation, Epilogue, Form, Op, Problem};
pub use sparse24::Sparse24;
