//! The crate's one error type: what went wrong, where, and the values that show it.
//!
//! Invariant: a message names the file, tensor, row, flag or device it is about, in lower case and without a full
//! stop, so that callers can put their own context in front. Names that come from files are [`printable`] in it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::dtype::DType;

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two operands, or an operand and its description, disagree in shape.
    #[error("{what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The operand that does not fit.
        what: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape that the others ask for.
        expected: Vec<usize>,
    },
    /// An operand has another element type than the operation takes.
    #[error("{what} is {got}, expected {expected}")]
    DType {
        /// The operand.
        what: String,
        /// Its element type.
        got: DType,
        /// The element type that the operation takes.
        expected: DType,
    },
    /// A size computed from the given shape does not fit this machine's address space or a kernel's 32-bit indices.
    #[error("{what} overflows: {detail}")]
    Overflow {
        /// The size that was computed.
        what: String,
        /// The factors it was computed from.
        detail: String,
    },
    /// A vector length that the format does not have.
    #[error("vector length {0} is not one of 1, 2, 4, 8, 16, 32, 64, 128")]
    VectorLen(usize),
    /// A group of four keeps more than two positions. For V > 1 the union over the V rows is counted.
    #[error("row {row}, group {group} (columns {}..{}): {count} positions are non-zero or kept, 2:4 allows 2", group * 4, group * 4 + 4)]
    OverFull {
        /// The first row of the V rows that share a pattern.
        row: usize,
        /// Index of the group along `k`; it covers columns `4 * group .. 4 * group + 4`.
        group: usize,
        /// How many positions of the group are taken.
        count: usize,
    },
    /// A metadata nibble that is not an ordered pair of positions.
    #[error("meta row {row}, group {group}: code 0x{code:x} is not one of 4, 8, 9, c, d, e")]
    IllegalCode {
        /// Row of the metadata, one per V rows of weights.
        row: usize,
        /// Index of the group along `k`.
        group: usize,
        /// The nibble that was found.
        code: u8,
    },
    /// Something other than zero where the format pads.
    #[error("{what}: row {row}, group {group} is padding and must be zero")]
    Padding {
        /// `values` or `meta`.
        what: &'static str,
        /// Row of that tensor.
        row: usize,
        /// Index of the group along `k`.
        group: usize,
    },
    /// A NaN among weights that are to be scored for pruning.
    #[error("weight at row {row}, column {col} is NaN and cannot be scored")]
    Nan {
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        col: usize,
    },
    /// The operating system refused to read or write a file.
    #[error("{}: {cause}", printable(&path.to_string_lossy()))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said. Not a `source()`: the message has it already.
        cause: std::io::Error,
    },
    /// A file is not what it claims to be.
    #[error("{}: {reason}", printable(&path.to_string_lossy()))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One tensor of a file, or the pair of tensors of one compressed matrix, is not what it claims to be.
    #[error("{}: tensor {}: {cause}", printable(&path.to_string_lossy()), printable(tensor))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is wrong with it; in the message already.
        cause: Box<Error>,
    },
    /// One text of several is no input of a model, or has no result.
    #[error("text {text}: {cause}")]
    Text {
        /// Which one, counted from 0 in the order in which they were given.
        text: usize,
        /// What is wrong with it; in the message already.
        cause: Box<Error>,
    },
    /// A statement that cannot be carried out, with the reason; the innermost part of a [`Error::Tensor`] too.
    #[error("{0}")]
    Invalid(String),
    /// No device of that name.
    #[error("no device matches {name:?}; there are: {}", available.join(", "))]
    UnknownDevice {
        /// The name that was asked for.
        name: String,
        /// The names that would have matched.
        available: Vec<String>,
    },
    /// The device lacks something that the operation needs.
    #[error("{device} lacks {feature}")]
    MissingFeature {
        /// The device.
        device: String,
        /// What it lacks, and for what it is needed.
        feature: String,
    },
    /// A buffer or dispatch is larger than the device's limit for it.
    #[error("{what} takes {size}, the device allows {limit}")]
    TooLarge {
        /// The buffer or dispatch.
        what: String,
        /// Its size, with unit.
        size: String,
        /// The limit, in the same unit.
        limit: String,
    },
    /// The device, or the host, has no memory left for what is named.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device was lost (reset, removed, destroyed); nothing made on it can be used again.
    #[error("device lost: {0}")]
    DeviceLost(String),
    /// The graphics stack refused a call.
    #[error("{what}: {reason}")]
    Gpu {
        /// The call.
        what: String,
        /// What the graphics stack said.
        reason: String,
    },
    /// Weights, operands or a plan were made for something else.
    #[error("{what} was made for {got}, but {expected} is needed")]
    Mismatch {
        /// The object.
        what: String,
        /// What it was made for.
        got: String,
        /// What is needed.
        expected: String,
    },
}

impl Error {
    /// An [`Error::Io`] with the path that the operating system's own message leaves out.
    pub(crate) fn io(path: &Path, cause: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), cause }
    }

    /// An [`Error::File`].
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), reason: reason.into() }
    }

    /// This error, with the file and the tensor in which it was met.
    pub fn in_tensor(self, path: &Path, tensor: &str) -> Self {
        Self::Tensor { path: path.to_path_buf(), tensor: tensor.to_owned(), cause: Box::new(self) }
    }

    /// This error, with the text that it is about.
    pub(crate) fn of_text(self, text: usize) -> Self {
        Self::Text { text, cause: Box::new(self) }
    }
}

/// A name from a file as it can be shown on a terminal: line breaks, other control characters and those that change
/// the direction of writing are escaped as in Rust's strings. A terminal would obey them, and a reader would see
/// another name.
///
/// ```
/// assert_eq!(sparse24::error::printable("up.\u{1b}[31mweight\n"), "up.\\u{1b}[31mweight\\n");
/// ```
pub fn printable(name: &str) -> Cow<'_, str> {
    let escaped = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if !name.contains(escaped) {
        return Cow::Borrowed(name);
    }
    let shown = |c: char| if escaped(c) { c.escape_default().collect() } else { String::from(c) };
    Cow::Owned(name.chars().map(shown).collect())
}

/// `a * b`, or [`Error::Overflow`] naming what was to be computed.
pub(crate) fn checked_mul(what: &str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::Overflow { what: what.to_owned(), detail: format!("{a} * {b}") })
}

/// Compares a matrix's (rows, columns) with what is needed.
pub(crate) fn expect_shape(what: &str, got: (usize, usize), expected: (usize, usize)) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { what: what.to_owned(), got: vec![got.0, got.1], expected: vec![expected.0, expected.1] })
}

/// Compares an element type with what is needed.
pub(crate) fn expect_dtype(what: &str, got: DType, expected: DType) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::DType { what: what.to_owned(), got, expected }) }
}

/// Compares a number of elements with what is needed.
pub(crate) fn expect_len(what: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { what: what.to_owned(), got: vec![got], expected: vec![expected] })
}
