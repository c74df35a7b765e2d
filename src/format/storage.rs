//! What the elements of a 2:4 matrix are held in: [`Elements`], which are multiplied, or [`Bytes`] of any type that the
//! format has.
//!
//! To compress is to move elements and to ask which of them are zero, so both go through the same code, which sees bit
//! patterns only. Invariant: [`Bytes`] are whole elements of a type that the format has.

use std::borrow::Cow;
use std::fmt;

use bytemuck::Pod;
use safetensors::Dtype;

use super::{Sparse24, encode, expand_rows};
use crate::error::{Error, Result};
use crate::groups::{self, Bits};
use crate::mask::{Mask, VectorLen};
use crate::matrix::{DType, Element, Elements, each_dtype};

pub(super) mod sealed {
    use crate::error::Result;
    use crate::mask::{Mask, VectorLen};

    /// What the format does with elements; matrices are given as rows and columns.
    pub trait Codec: Sized {
        /// Whether element `at` is zero.
        fn is_zero(&self, at: usize) -> bool;
        fn non_zeros(&self, shape: (usize, usize)) -> Result<Mask>;
        /// Values and metadata of the columns for which `keep(row, word)` has a bit.
        fn compress(
            &self,
            shape: (usize, usize),
            vector: VectorLen,
            keep: impl Fn(usize, usize) -> u32,
        ) -> Result<(Self, Vec<u32>)>;
        fn decompress(&self, shape: (usize, usize), vector: VectorLen, meta: &[u32]) -> Self;
    }
}

/// What values can be held in. Sealed: there are [`Elements`] and [`Bytes`].
pub trait Storage: sealed::Codec + Clone + fmt::Debug + PartialEq {
    /// The element type, as files name it.
    fn file_dtype(&self) -> Dtype;
    /// Number of elements.
    fn count(&self) -> usize;
    /// The elements as files have them.
    fn little_endian(&self) -> Cow<'_, [u8]>;
}

impl Storage for Elements {
    fn file_dtype(&self) -> Dtype {
        self.dtype().into()
    }

    fn count(&self) -> usize {
        self.len()
    }

    fn little_endian(&self) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") { Cow::Borrowed(self.as_bytes()) } else { Cow::Owned(self.to_le_bytes()) }
    }
}

impl sealed::Codec for Elements {
    fn is_zero(&self, at: usize) -> bool {
        each_dtype!(self, data => !groups::non_zero(data[at]))
    }

    fn non_zeros(&self, (rows, cols): (usize, usize)) -> Result<Mask> {
        each_dtype!(self, data => Mask::of_nonzero_bits(rows, cols, data))
    }

    fn compress(
        &self,
        shape: (usize, usize),
        vector: VectorLen,
        keep: impl Fn(usize, usize) -> u32,
    ) -> Result<(Self, Vec<u32>)> {
        each_dtype!(self, data => {
            encode(data, shape, vector, keep).map(|(values, meta)| (Element::wrap(values), meta))
        })
    }

    fn decompress(&self, shape: (usize, usize), vector: VectorLen, meta: &[u32]) -> Self {
        each_dtype!(self, values => Element::wrap(decode(values, shape, vector, meta)))
    }
}

/// The elements of a dense matrix.
fn decode<T: Bits>(values: &[T], (m, k): (usize, usize), vector: VectorLen, meta: &[u32]) -> Vec<T> {
    let mut dense = vec![T::zeroed(); m * k];
    expand_rows(values, meta, k, vector, &mut dense);
    dense
}

/// Elements of F32, F16, BF16, F8_E4M3, F8_E5M2, I8 or U8 as files have them: little-endian, at any address.
///
/// ```
/// use sparse24::format::{Bytes, Sparse24};
/// use sparse24::io::Dtype;
/// let dense = Bytes::new(Dtype::I8, vec![0, 5, 0, 251, 7, 0, 0, 0])?;
/// let s = Sparse24::from_elements(1, 8, &dense, None)?;
/// assert_eq!((s.values().as_slice(), s.meta()), (&[5, 251, 7, 0][..], &[0x8d][..]));
/// assert_eq!(s.to_elements(), dense);
/// // Only what is multiplied can go to a device.
/// let multiplied: sparse24::Result<Sparse24> = s.try_into();
/// assert_eq!(multiplied.unwrap_err().to_string(), "is I8, expected F32, F16 or BF16");
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes {
    dtype: Dtype,
    data: Vec<u8>,
}

impl Bytes {
    /// Whole elements. An error if a 2:4 matrix cannot be of that type, or they are not whole.
    pub fn new(dtype: Dtype, data: Vec<u8>) -> Result<Self> {
        Self::expect_type(dtype)?;
        let width = dtype.bitsize() / 8;
        if !data.len().is_multiple_of(width) {
            return Err(Error::invalid(format!("{} bytes are no whole number of {dtype} elements", data.len())));
        }
        Ok(Self { dtype, data })
    }

    /// An error unless a 2:4 matrix can be of that type.
    pub(crate) fn expect_type(dtype: Dtype) -> Result<()> {
        match dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(()),
            Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::I8 | Dtype::U8 => Ok(()),
            other => {
                let types = "F32, F16, BF16, F8_E4M3, F8_E5M2, I8 or U8";
                Err(Error::invalid(format!("is {other}, a 2:4 matrix is {types}")))
            }
        }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.data
    }

    /// The bytes alone.
    pub fn into_vec(self) -> Vec<u8> {
        self.data
    }
}

/// Runs `$body` with `$data` bound to the elements in a [`Bytes`].
macro_rules! each_type {
    ($bytes:expr, $data:ident => $body:expr) => {{
        let $data = $bytes.data.as_slice();
        match $bytes.dtype {
            Dtype::I8 | Dtype::U8 => $body,
            dtype => match dtype.bitsize() {
                32 => each_type!($data.as_chunks::<4>(), $data, $body),
                16 => each_type!($data.as_chunks::<2>(), $data, $body),
                _ => each_type!($data.as_chunks::<1>(), $data, $body),
            },
        }
    }};
    ($chunks:expr, $data:ident, $body:expr) => {{
        let ($data, _) = $chunks;
        $body
    }};
}

impl Storage for Bytes {
    fn file_dtype(&self) -> Dtype {
        self.dtype
    }

    fn count(&self) -> usize {
        self.data.len() / (self.dtype.bitsize() / 8)
    }

    fn little_endian(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
}

impl sealed::Codec for Bytes {
    fn is_zero(&self, at: usize) -> bool {
        each_type!(self, data => !groups::non_zero(data[at]))
    }

    fn non_zeros(&self, (rows, cols): (usize, usize)) -> Result<Mask> {
        each_type!(self, data => Mask::of_nonzero_bits(rows, cols, data))
    }

    fn compress(
        &self,
        shape: (usize, usize),
        vector: VectorLen,
        keep: impl Fn(usize, usize) -> u32,
    ) -> Result<(Self, Vec<u32>)> {
        let (data, meta) = each_type!(self, data => {
            encode(data, shape, vector, keep).map(|(values, meta)| (flat(values), meta))
        })?;
        Ok((Self { dtype: self.dtype, data }, meta))
    }

    fn decompress(&self, shape: (usize, usize), vector: VectorLen, meta: &[u32]) -> Self {
        let data = each_type!(self, values => flat(decode(values, shape, vector, meta)));
        Self { dtype: self.dtype, data }
    }
}

/// The bytes of elements, where they are.
fn flat<T: Pod>(data: Vec<T>) -> Vec<u8> {
    bytemuck::cast_vec(data)
}

impl TryFrom<Sparse24<Bytes>> for Sparse24 {
    type Error = Error;

    /// The same matrix for multiplication. An error if it is of a type that is not multiplied.
    fn try_from(s: Sparse24<Bytes>) -> Result<Self> {
        let values = Elements::from_bytes(DType::try_from(s.values.dtype)?, &s.values.data)?;
        Ok(Self { m: s.m, k: s.k, vector: s.vector, values, meta: s.meta })
    }
}
