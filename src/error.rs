//! The crate's one error type: what went wrong, where, and the values that show it.
//!
//! Invariant: a message names the file, tensor, row, flag or device it is about, in lower case and without a full
//! stop, so that callers can put their own context in front. Names that come from files are [`printable`] in it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::dtype::DType;

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Its text says all of it, causes included, so there is no `source()`: [`Error::io_error`] has the
/// operating system's own error. What a program may want to decide by has a method.
///
/// ```
/// use sparse24::{DType, Matrix, Sparse24, VectorLen};
/// let w = Matrix::from_f32(1, 8, &[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0])?;
/// let error = Sparse24::from_dense(&w, VectorLen::ONE).unwrap_err();
/// assert!(error.is_over_full());
/// assert_eq!(error.place(), Some((0, 1)));
/// assert_eq!(error.to_string(), "row 0, group 1 (columns 4..8): 3 positions are non-zero or kept, 2:4 allows 2");
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(thiserror::Error)]
#[error("{0}")]
pub struct Error(Box<Kind>);

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, thiserror::Error)]
enum Kind {
    #[error("{what} has shape {got:?}, expected {expected:?}")]
    Shape { what: String, got: Vec<usize>, expected: Vec<usize> },
    #[error("{what} is {got}, expected {expected}")]
    DType { what: String, got: DType, expected: DType },
    #[error("{what} overflows: {detail}")]
    Overflow { what: String, detail: String },
    #[error("vector length {0} is not one of 1, 2, 4, 8, 16, 32, 64, 128")]
    VectorLen(usize),
    #[error("row {row}, group {group} (columns {}..{}): {count} positions are non-zero or kept, 2:4 allows 2", group * 4, group * 4 + 4)]
    OverFull { row: usize, group: usize, count: usize },
    #[error("meta row {row}, group {group}: code 0x{code:x} is not one of 4, 8, 9, c, d, e")]
    IllegalCode { row: usize, group: usize, code: u8 },
    #[error("{what}: row {row}, group {group} is padding and must be zero")]
    Padding { what: Part, row: usize, group: usize },
    #[error("weight at row {row}, column {col} is NaN and cannot be scored")]
    Nan { row: usize, col: usize },
    #[error("{}: {cause}", printable(&path.to_string_lossy()))]
    Io { path: PathBuf, cause: std::io::Error },
    #[error("{}: {reason}", printable(&path.to_string_lossy()))]
    File { path: PathBuf, reason: String },
    #[error("{}: tensor {}: {cause}", printable(&path.to_string_lossy()), printable(tensor))]
    Tensor { path: PathBuf, tensor: String, cause: Error },
    #[error("text {text}: {cause}")]
    Text { text: usize, cause: Error },
    #[error("{0}")]
    Invalid(String),
    #[error("no device matches {name:?}; there are: {}", available.join(", "))]
    UnknownDevice { name: String, available: Vec<String> },
    #[error("{device} lacks {feature}")]
    MissingFeature { device: String, feature: String },
    #[error("{what} takes {size}, the device allows {limit}")]
    TooLarge { what: String, size: String, limit: String },
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    #[error("device lost: {0}")]
    DeviceLost(String),
    #[error("{what}: {reason}")]
    Gpu { what: String, reason: String },
    #[error("{what} was made for {got}, but {expected} is needed")]
    Mismatch { what: String, got: String, expected: String },
}

/// Half of a compressed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Values,
    Meta,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Values => "values",
            Self::Meta => "meta",
        })
    }
}

/// What a program may ask. Only [`Error::tensor`], [`Error::text`] and [`Error::into_cause`] see where an error was
/// met.
impl Error {
    /// An operand's shape or length is not what the others ask for.
    pub fn is_shape(&self) -> bool {
        matches!(self.root(), Kind::Shape { .. })
    }

    /// An operand's element type is not one that the operation takes.
    pub fn is_dtype(&self) -> bool {
        matches!(self.root(), Kind::DType { .. })
    }

    /// An object was made for something else: another device, operation or plan.
    pub fn is_mismatch(&self) -> bool {
        matches!(self.root(), Kind::Mismatch { .. })
    }

    /// A group of four keeps more than two weights. For V > 1 the union over the V rows counts. [`Error::place`] says
    /// which.
    pub fn is_over_full(&self) -> bool {
        matches!(self.root(), Kind::OverFull { .. })
    }

    /// A weight that is to be scored is NaN. [`Error::place`] says which.
    pub fn is_nan(&self) -> bool {
        matches!(self.root(), Kind::Nan { .. })
    }

    /// The device or the processor lacks a feature.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.root(), Kind::MissingFeature { .. })
    }

    /// A buffer or a dispatch is beyond a limit of the device, or a size beyond this machine's integers.
    pub fn is_too_large(&self) -> bool {
        matches!(self.root(), Kind::TooLarge { .. } | Kind::Overflow { .. })
    }

    /// The device or the host has no memory left.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self.root(), Kind::OutOfMemory(_))
    }

    /// The device was reset, removed or destroyed: nothing made on it can be used again.
    pub fn is_device_lost(&self) -> bool {
        matches!(self.root(), Kind::DeviceLost(_))
    }

    /// The graphics stack refused a call.
    ///
    /// ```
    /// assert!(!sparse24::Error::invalid("a statement").is_gpu());
    /// ```
    pub fn is_gpu(&self) -> bool {
        matches!(self.root(), Kind::Gpu { .. })
    }

    /// There is no device of the name that was asked for.
    pub fn is_unknown_device(&self) -> bool {
        matches!(self.root(), Kind::UnknownDevice { .. })
    }

    /// What the operating system said when a file was to be read or written.
    pub fn io_error(&self) -> Option<&std::io::Error> {
        match self.root() {
            Kind::Io { cause, .. } => Some(cause),
            _ => None,
        }
    }

    /// Row and group (four columns) of what breaks the format, or row and column of a NaN. For V > 1 the row is the
    /// first of a group that is over-full, and counts metadata's rows for a code that is not legal.
    pub fn place(&self) -> Option<(usize, usize)> {
        match *self.root() {
            Kind::OverFull { row, group, .. } | Kind::IllegalCode { row, group, .. } => Some((row, group)),
            Kind::Padding { row, group, .. } => Some((row, group)),
            Kind::Nan { row, col } => Some((row, col)),
            _ => None,
        }
    }

    /// File and name of the tensor that it is about.
    pub fn tensor(&self) -> Option<(&Path, &str)> {
        match &*self.0 {
            Kind::Tensor { path, tensor, .. } => Some((path, tensor)),
            _ => None,
        }
    }

    /// Which of several texts it is about, from 0 in the order in which they were given.
    pub fn text(&self) -> Option<usize> {
        match *self.0 {
            Kind::Text { text, .. } => Some(text),
            _ => None,
        }
    }

    /// This error without the tensor or text that it is about.
    pub fn into_cause(self) -> Self {
        match *self.0 {
            Kind::Tensor { cause, .. } | Kind::Text { cause, .. } => cause,
            kind => Self::of(kind),
        }
    }

    /// The half of a compressed matrix that is at fault, where one of them is.
    pub(crate) fn part(&self) -> Option<Part> {
        match *self.root() {
            Kind::IllegalCode { .. } => Some(Part::Meta),
            Kind::Padding { what, .. } => Some(what),
            _ => None,
        }
    }

    /// This error, with the device's name where a feature is missing: plans know what a device has, not its name.
    pub(crate) fn on_device(self, name: &str) -> Self {
        match *self.0 {
            Kind::MissingFeature { feature, .. } => Self::missing_feature(name, feature),
            kind => Self::of(kind),
        }
    }

    /// The file that it names itself, if it does.
    pub(crate) fn names_file(&self) -> bool {
        matches!(*self.0, Kind::Tensor { .. } | Kind::File { .. } | Kind::Io { .. })
    }

    /// This error, with `to` in place of the folder `from` in the paths of its files.
    pub(crate) fn moved(self, from: &Path, to: &Path) -> Self {
        let moved = |path: PathBuf| match path.strip_prefix(from) {
            Ok(rest) if rest.as_os_str().is_empty() => to.to_path_buf(),
            Ok(rest) => to.join(rest),
            Err(_) => path,
        };
        Self::of(match *self.0 {
            Kind::Io { path, cause } => Kind::Io { path: moved(path), cause },
            Kind::File { path, reason } => Kind::File { path: moved(path), reason },
            Kind::Tensor { path, tensor, cause } => {
                Kind::Tensor { path: moved(path), tensor, cause: cause.moved(from, to) }
            }
            Kind::Text { text, cause } => Kind::Text { text, cause: cause.moved(from, to) },
            kind => kind,
        })
    }

    fn of(kind: Kind) -> Self {
        Self(Box::new(kind))
    }

    fn root(&self) -> &Kind {
        match &*self.0 {
            Kind::Tensor { cause, .. } | Kind::Text { cause, .. } => cause.root(),
            kind => kind,
        }
    }
}

/// Errors are made where they are met.
impl Error {
    /// A statement that cannot be carried out, with the reason.
    pub fn invalid(reason: impl Into<String>) -> Self {
        Self::of(Kind::Invalid(reason.into()))
    }

    /// This error, with the file and the tensor in which it was met.
    pub fn in_tensor(self, path: &Path, tensor: &str) -> Self {
        Self::of(Kind::Tensor { path: path.to_path_buf(), tensor: tensor.to_owned(), cause: self })
    }

    /// This error, with the text that it is about.
    pub(crate) fn of_text(self, text: usize) -> Self {
        Self::of(Kind::Text { text, cause: self })
    }

    /// With the path, which the operating system's own message leaves out.
    pub(crate) fn io(path: &Path, cause: std::io::Error) -> Self {
        Self::of(Kind::Io { path: path.to_path_buf(), cause })
    }

    /// A file is not what it claims to be.
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::of(Kind::File { path: path.to_path_buf(), reason: reason.into() })
    }

    pub(crate) fn shape(what: impl Into<String>, got: impl Into<Vec<usize>>, expected: impl Into<Vec<usize>>) -> Self {
        Self::of(Kind::Shape { what: what.into(), got: got.into(), expected: expected.into() })
    }

    pub(crate) fn dtype(what: impl Into<String>, got: DType, expected: DType) -> Self {
        Self::of(Kind::DType { what: what.into(), got, expected })
    }

    pub(crate) fn overflow(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::of(Kind::Overflow { what: what.into(), detail: detail.into() })
    }

    pub(crate) fn vector_len(got: usize) -> Self {
        Self::of(Kind::VectorLen(got))
    }

    /// `row` is the first of the V rows that share the pattern; `count` positions are taken.
    pub(crate) fn over_full(row: usize, group: usize, count: usize) -> Self {
        Self::of(Kind::OverFull { row, group, count })
    }

    pub(crate) fn illegal_code(row: usize, group: usize, code: u8) -> Self {
        Self::of(Kind::IllegalCode { row, group, code })
    }

    pub(crate) fn padding(what: Part, row: usize, group: usize) -> Self {
        Self::of(Kind::Padding { what, row, group })
    }

    pub(crate) fn nan(row: usize, col: usize) -> Self {
        Self::of(Kind::Nan { row, col })
    }

    pub(crate) fn unknown_device(name: impl Into<String>, available: Vec<String>) -> Self {
        Self::of(Kind::UnknownDevice { name: name.into(), available })
    }

    /// `feature` may add what it is needed for.
    pub(crate) fn missing_feature(device: impl Into<String>, feature: impl Into<String>) -> Self {
        Self::of(Kind::MissingFeature { device: device.into(), feature: feature.into() })
    }

    /// Size and limit have units, the same.
    pub(crate) fn too_large(what: impl Into<String>, size: impl Into<String>, limit: impl Into<String>) -> Self {
        Self::of(Kind::TooLarge { what: what.into(), size: size.into(), limit: limit.into() })
    }

    pub(crate) fn out_of_memory(what: impl Into<String>) -> Self {
        Self::of(Kind::OutOfMemory(what.into()))
    }

    pub(crate) fn device_lost(reason: impl Into<String>) -> Self {
        Self::of(Kind::DeviceLost(reason.into()))
    }

    /// The graphics stack refused a call.
    pub(crate) fn gpu(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::of(Kind::Gpu { what: what.into(), reason: reason.into() })
    }

    pub(crate) fn mismatch(what: impl Into<String>, got: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::of(Kind::Mismatch { what: what.into(), got: got.into(), expected: expected.into() })
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

/// `a * b`, or an error naming what was to be computed.
pub(crate) fn checked_mul(what: &str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::overflow(what, format!("{a} * {b}")))
}

/// Compares a matrix's (rows, columns) with what is needed.
pub(crate) fn expect_shape(what: &str, got: (usize, usize), expected: (usize, usize)) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::shape(what, [got.0, got.1], [expected.0, expected.1]))
}

/// Compares an element type with what is needed.
pub(crate) fn expect_dtype(what: &str, got: DType, expected: DType) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::dtype(what, got, expected)) }
}

/// Compares a number of elements with what is needed.
pub(crate) fn expect_len(what: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::shape(what, [got], [expected]))
}
