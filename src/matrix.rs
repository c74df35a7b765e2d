//! Dense matrices in the three storage types, and those types: what every stage passes to the next.
//!
//! A [`Matrix`] is row-major and knows its element type at run time, because weights come from files that decide it.
//! Invariant: a matrix holds exactly `rows * cols` elements.

use std::fmt;
use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;

pub use crate::dtype::DType;
use crate::error::{Error, Result, checked_mul};
use crate::memory;

impl From<DType> for Dtype {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::Bf16 => Self::BF16,
        }
    }
}

impl TryFrom<Dtype> for DType {
    type Error = Error;

    /// The same type of a file. An error if it is not multiplied.
    fn try_from(dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::F16 => Ok(Self::F16),
            Dtype::BF16 => Ok(Self::Bf16),
            other => Err(Error::invalid(format!("is {other}, expected F32, F16 or BF16"))),
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A Rust type that is one of the [`DType`]s. Sealed: the format has exactly three.
pub trait Element: sealed::Sealed + Pod + PartialEq + fmt::Debug + Send + Sync {
    /// The run-time name of this type.
    const DTYPE: DType;
    /// The same number as f32; exact for all three types.
    fn to_f32(self) -> f32;
    /// The nearest number of this type, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Wraps a vector of this type.
    fn wrap(data: Vec<Self>) -> Elements;
    /// The elements as this type, if they are of it.
    fn of(data: &Elements) -> Option<&[Self]>;
}

macro_rules! element {
    ($type:ty, $variant:ident, $to:expr, $from:expr) => {
        impl Element for $type {
            const DTYPE: DType = DType::$variant;
            fn to_f32(self) -> f32 {
                $to(self)
            }
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
            fn wrap(data: Vec<Self>) -> Elements {
                Elements::$variant(data)
            }
            fn of(data: &Elements) -> Option<&[Self]> {
                match data {
                    Elements::$variant(v) => Some(v),
                    _ => None,
                }
            }
        }
    };
}
element!(f32, F32, |x| x, |x| x);
element!(f16, F16, f16::to_f32, f16::from_f32);
element!(bf16, Bf16, bf16::to_f32, bf16::from_f32);

/// A run of elements of one of the three types.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// 32-bit elements.
    F32(Vec<f32>),
    /// IEEE half-precision elements.
    F16(Vec<f16>),
    /// bfloat16 elements.
    Bf16(Vec<bf16>),
}

/// Runs `$body` with `$v` bound to the vector inside, whatever its type: the one place where element types are
/// told apart.
macro_rules! each_dtype {
    ($elements:expr, $v:ident => $body:expr) => {
        match $elements {
            $crate::matrix::Elements::F32($v) => $body,
            $crate::matrix::Elements::F16($v) => $body,
            $crate::matrix::Elements::Bf16($v) => $body,
        }
    };
}
pub(crate) use each_dtype;

impl Elements {
    /// `len` zeros.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::F16 => Self::F16(vec![f16::ZERO; len]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
        }
    }

    /// Rounds f32 numbers to `dtype`, to nearest, ties to even.
    pub fn from_f32(dtype: DType, data: &[f32]) -> Self {
        match dtype {
            DType::F32 => Self::F32(data.to_vec()),
            DType::F16 => Self::F16(data.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::Bf16 => Self::Bf16(data.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    /// Reads little-endian bytes, as safetensors and every GPU have them. An error if the length is no multiple of
    /// the element size.
    pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Result<Self> {
        if !bytes.len().is_multiple_of(dtype.bytes()) {
            return Err(Error::invalid(format!("{} bytes are no whole number of {dtype} elements", bytes.len())));
        }
        // Not a cast: bytes from a file need not be aligned, and big-endian hosts must swap.
        let pairs = || bytes.as_chunks::<2>().0.iter().copied();
        Ok(match dtype {
            DType::F32 => Self::F32(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            DType::F16 => Self::F16(pairs().map(f16::from_le_bytes).collect()),
            DType::Bf16 => Self::Bf16(pairs().map(bf16::from_le_bytes).collect()),
        })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each_dtype!(self, v => v.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i` as f32.
    ///
    /// # Panics
    /// If `i` is out of range.
    pub fn get(&self, i: usize) -> f32 {
        each_dtype!(self, v => v[i].to_f32())
    }

    /// All elements as f32; exact.
    pub fn to_f32(&self) -> Vec<f32> {
        each_dtype!(self, v => v.iter().map(|x| x.to_f32()).collect())
    }

    /// The elements as files have them: little-endian.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        let mut bytes = self.as_bytes().to_vec();
        if cfg!(target_endian = "big") {
            bytes.chunks_exact_mut(self.dtype().bytes()).for_each(<[u8]>::reverse);
        }
        bytes
    }

    /// The elements in memory order, in the host's byte order.
    pub fn as_bytes(&self) -> &[u8] {
        each_dtype!(self, v => bytemuck::cast_slice(v))
    }
}

/// A row-major matrix whose element type is known at run time.
///
/// ```
/// use sparse24::{DType, Matrix};
/// let w = Matrix::from_f32(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?.cast(DType::F16);
/// assert_eq!((w.rows(), w.cols(), w.get(1, 0)), (2, 3, 4.0));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Elements,
}

impl Matrix {
    /// Wraps row-major elements. An error if their number is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, data: Elements) -> Result<Self> {
        if checked_mul("matrix", rows, cols)? != data.len() {
            return Err(Error::shape("matrix data", vec![data.len()], vec![rows, cols]));
        }
        Ok(Self { rows, cols, data })
    }

    /// Wraps elements whose number follows from the shape by construction.
    pub(crate) fn of_len(rows: usize, cols: usize, data: Elements) -> Self {
        debug_assert_eq!(rows.checked_mul(cols), Some(data.len()));
        Self { rows, cols, data }
    }

    /// A matrix of zeros. An error if its size in bytes overflows, or there is no such memory.
    pub fn zeros(rows: usize, cols: usize, dtype: DType) -> Result<Self> {
        let len = checked_mul("matrix", rows, cols)?;
        memory::claim_matrix(&format!("{dtype} matrix"), rows, cols, dtype.bytes())?;
        Ok(Self { rows, cols, data: Elements::zeros(dtype, len) })
    }

    /// Numbers that are uniform in [-1, 1), the same for the same seed on every machine and in every version. An error
    /// as of [`Matrix::zeros`].
    ///
    /// ```
    /// use sparse24::{DType, Matrix};
    /// let w = Matrix::uniform(2, 3, DType::F32, 24)?;
    /// assert!(w.elements().to_f32().iter().all(|x| (-1.0..1.0).contains(x)));
    /// assert_eq!(w, Matrix::uniform(2, 3, DType::F32, 24)?);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn uniform(rows: usize, cols: usize, dtype: DType, seed: u64) -> Result<Self> {
        let mut rng = Pcg64::seed_from_u64(seed);
        let mut matrix = Self::zeros(rows, cols, DType::F32)?;
        if let Elements::F32(data) = &mut matrix.data {
            // 24 bits: every value is exact in f32.
            data.fill_with(|| (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0);
        }
        Ok(matrix.cast(dtype))
    }

    /// An f32 matrix from row-major numbers. An error if their number is not `rows * cols`, or there is no memory for a
    /// copy.
    pub fn from_f32(rows: usize, cols: usize, data: &[f32]) -> Result<Self> {
        memory::claim(size_of_val(data), || format!("f32 matrix of {rows} x {cols}"))?;
        Self::new(rows, cols, Elements::F32(data.to_vec()))
    }

    /// Copies an array view, whatever its strides.
    pub fn from_array<T: Element>(view: ArrayView2<'_, T>) -> Self {
        let (rows, cols) = view.dim();
        Self { rows, cols, data: T::wrap(view.iter().copied().collect()) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// The elements, row-major.
    pub fn elements(&self) -> &Elements {
        &self.data
    }

    /// The elements alone, moved out.
    ///
    /// ```
    /// use sparse24::{Elements, Matrix};
    /// let w = Matrix::from_f32(1, 2, &[1.0, 2.0])?;
    /// assert_eq!(w.into_elements(), Elements::F32(vec![1.0, 2.0]));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn into_elements(self) -> Elements {
        self.data
    }

    /// The elements, to be overwritten in place.
    pub(crate) fn elements_mut(&mut self) -> &mut Elements {
        &mut self.data
    }

    /// Takes over the numbers of a matrix of the same shape and type, in the memory that is there.
    pub(crate) fn copy_from(&mut self, from: &Self) {
        match (&mut self.data, &from.data) {
            (Elements::F32(to), Elements::F32(from)) if to.len() == from.len() => to.copy_from_slice(from),
            (Elements::F16(to), Elements::F16(from)) if to.len() == from.len() => to.copy_from_slice(from),
            (Elements::Bf16(to), Elements::Bf16(from)) if to.len() == from.len() => to.copy_from_slice(from),
            _ => self.clone_from(from),
        }
    }

    /// Overwrites all elements by as many of the same type.
    pub(crate) fn write_slice<T: Element>(&mut self, from: &[T]) {
        debug_assert_eq!((self.dtype(), self.data.len()), (T::DTYPE, from.len()));
        each_dtype!(&mut self.data, to => bytemuck::cast_slice_mut(to).copy_from_slice(from));
    }

    /// Size of the elements in bytes.
    pub fn bytes(&self) -> usize {
        self.data.len() * self.dtype().bytes()
    }

    /// The element at `row`, `col` as f32.
    ///
    /// # Panics
    /// If `row` or `col` is out of range.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        assert!(col < self.cols, "column {col} of a matrix with {} columns", self.cols);
        self.data.get(row * self.cols + col)
    }

    /// The matrix as a view of its own element type, if that is `T`.
    pub fn view<T: Element>(&self) -> Result<ArrayView2<'_, T>> {
        let data = T::of(&self.data).ok_or_else(|| Error::dtype("matrix", self.dtype(), T::DTYPE))?;
        ArrayView2::from_shape((self.rows, self.cols), data).map_err(|e| Error::invalid(e.to_string()))
    }

    /// Some of the rows, copied. An error if there are no such rows.
    pub fn rows_of(&self, rows: Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(Error::invalid(format!("rows {rows:?} of a matrix of {} rows", self.rows)));
        }
        let (from, to) = (rows.start * self.cols, rows.end * self.cols);
        Ok(Self::of_len(rows.len(), self.cols, each_dtype!(&self.data, data => Element::wrap(data[from..to].to_vec()))))
    }

    /// All elements as f32; exact.
    pub fn to_array(&self) -> Array2<f32> {
        Array2::from_shape_fn((self.rows, self.cols), |(r, c)| self.get(r, c))
    }

    /// The same matrix in another element type, rounded to nearest even.
    pub fn cast(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        Self { rows: self.rows, cols: self.cols, data: Elements::from_f32(dtype, &self.data.to_f32()) }
    }
}
