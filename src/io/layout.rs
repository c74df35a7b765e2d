//! The layouts in which a 2:4 matrix lies in a safetensors file, specified at [`Layout`], and the one form that all of
//! them are read to and written from.
//!
//! Elements are bytes here. They may be of types that no kernel multiplies: [`Dtype::F32`], F16, BF16, I8, U8, F8_E4M3
//! and F8_E5M2. Invariant: a [`Raw24`] is legal by the rules of [`crate::format`].

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use super::{Dtype, FORMAT, Spec, Writer, file_dtype, little_endian};
use crate::error::{Error, Part, Result, checked_mul};
use crate::format::{Sparse24, VERSION, code_of, positions_of};
use crate::mask::{Mask, VectorLen};
use crate::matrix::{DType, Elements, each_dtype};

/// How a 2:4 matrix lies in a file.
///
/// All compressed layouts hold the same values, the two kept elements of each group in increasing column, `[m, k / 2]`;
/// they differ in how they say where those stood. What follows is for a matrix called N of `m x k`; S is N without its
/// ending `.weight`, if it has that.
///
/// | layout | tensors | who reads it |
/// |---|---|---|
/// | native | `N.values`, `N.meta` (U32): see [`crate::format`] | this crate |
/// | dense | `N`, with zeros | everybody |
/// | bitmask | `S.compressed`, `S.bitmask` (U8, `[m, ceil(k / 8)]`), `S.shape` (I64, `[2, 1]`) | compressed-tensors up to 0.14.0.1, as `sparse-24-bitmask` |
/// | cutlass | `N.values`, `N.meta` (I16 or I32, reordered) | torch's `SparseSemiStructuredTensorCUTLASS`, CUTLASS |
///
/// *Bitmask*: column `c` is bit `c % 8` of byte `c / 8` of its row; two bits of every group are set, bits past column
/// `k` are not. `k` must be a multiple of 4.
///
/// *Cutlass*: codes are those of [`crate::format`] at V = 1, group 0 in the low bits of words of 16 bits for f16 and
/// bf16 (`[m, k / 16]`) and of 32 bits for int8 (`[m, k / 32]`), and the words are reordered as CUTLASS'
/// `host_reorder.h` does, which is how sparse tensor cores load them. `m` must be a multiple of 32 and `k` of 32 (int8:
/// 16 and 64). torch stores f32 as 1:2 there, not 2:4, so f32 is refused.
///
/// An entry of `__metadata__` keeps what a foreign layout has no place for: `N.layout`, under the full name of the
/// matrix, is `bitmask` or `cutlass`, followed by a comma and V if that was known. Readers that do not know it lose
/// nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// This crate's own [format](crate::format).
    Native,
    /// Every element, zeros included, under the matrix' own name.
    Dense,
    /// `sparse-24-bitmask` of compressed-tensors.
    Bitmask,
    /// torch's and CUTLASS' pair of values and reordered metadata.
    Cutlass,
}

impl Layout {
    /// All layouts.
    pub const ALL: [Self; 4] = [Self::Native, Self::Dense, Self::Bitmask, Self::Cutlass];

    /// `native`, `dense`, `bitmask` or `cutlass`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Dense => "dense",
            Self::Bitmask => "bitmask",
            Self::Cutlass => "cutlass",
        }
    }

    /// Whether 2:4 matrices can have elements of this type; a layout may take fewer.
    pub fn takes(dtype: Dtype) -> bool {
        ValueType::of(dtype).is_ok()
    }

    /// The tensors that hold such a matrix. An error if the layout has no place for its shape or type.
    ///
    /// ```
    /// use sparse24::io::{Dtype, Layout, Spec24};
    /// let matrix = Spec24 { name: "up.weight".into(), m: 64, k: 128, dtype: Dtype::F16, vector: None };
    /// let tensors = Layout::Bitmask.specs(&matrix)?;
    /// assert_eq!(tensors.iter().map(|t| &*t.name).collect::<Vec<_>>(), ["up.compressed", "up.bitmask", "up.shape"]);
    /// let error = Layout::Cutlass.specs(&Spec24 { m: 65, ..matrix }).unwrap_err();
    /// assert_eq!(error.to_string(), "65 x 128 F16: the layout cutlass takes multiples of 32 x 32");
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn specs(self, matrix: &Spec24) -> Result<Vec<Spec>> {
        let Spec24 { name, m, k, dtype, vector } = matrix;
        let (m, k) = (*m, *k);
        ValueType::of(*dtype)?;
        let refuse = |why: String| Err(Error::invalid(format!("{m} x {k} {dtype}: the layout {self} {why}")));
        let [values, meta] = ["values", "meta"].map(|part| format!("{name}.{part}"));
        Ok(match self {
            Self::Native => {
                let v = vector.unwrap_or(VectorLen::ONE).get();
                vec![
                    Spec::new(values, *dtype, &[m, stored_columns(k)]),
                    Spec::new(meta, Dtype::U32, &[m.div_ceil(v), k.div_ceil(32)]),
                ]
            }
            Self::Dense => vec![Spec::new(&**name, *dtype, &[m, k])],
            Self::Bitmask => {
                if !k.is_multiple_of(4) {
                    return refuse("takes multiples of 4 columns".into());
                }
                let stem = stem(name);
                vec![
                    Spec::new(format!("{stem}.compressed"), *dtype, &[m, k / 2]),
                    Spec::new(format!("{stem}.bitmask"), Dtype::U8, &[m, k.div_ceil(8)]),
                    Spec::new(format!("{stem}.shape"), Dtype::I64, &[2, 1]),
                ]
            }
            Self::Cutlass => {
                let Some(order) = Order::of(*dtype) else {
                    return refuse("takes F16, BF16, I8 and U8".into());
                };
                if !order.fits(m, k) {
                    return refuse(format!("takes multiples of {} x {}", order.rows, 2 * order.columns));
                }
                vec![Spec::new(values, *dtype, &[m, k / 2]), Spec::new(meta, order.dtype, &[m, k / order.columns])]
            }
        })
    }

    /// The entries of `__metadata__` for such a matrix, and those that the file needs; they are the same for all
    /// matrices of a layout.
    pub fn metadata(self, matrix: &Spec24) -> Vec<(String, String)> {
        let name = &matrix.name;
        // Readers of Hugging Face's want to know for which framework a file was made.
        let mut entries = vec![("format".to_owned(), if self == Self::Native { FORMAT } else { "pt" }.to_owned())];
        match (self, matrix.vector) {
            (Self::Native, vector) => {
                entries.push(("version".to_owned(), VERSION.to_owned()));
                entries.push((format!("{name}.shape"), format!("{},{}", matrix.m, matrix.k)));
                entries.push((format!("{name}.vector"), vector.unwrap_or(VectorLen::ONE).to_string()));
            }
            (Self::Dense, _) => {}
            (Self::Bitmask | Self::Cutlass, None) => entries.push((format!("{name}.layout"), self.to_string())),
            (Self::Bitmask | Self::Cutlass, Some(v)) => entries.push((format!("{name}.layout"), format!("{self},{v}"))),
        }
        entries
    }

    /// Writes a matrix to the tensors of [`Self::specs`].
    pub fn write(self, writer: &mut Writer, name: &str, matrix: &Raw24<'_>) -> Result<()> {
        let part = |part: &str| format!("{name}.{part}");
        match self {
            Self::Native => {
                writer.write(&part("values"), &matrix.values)?;
                writer.write(&part("meta"), &little_endian(&matrix.meta))
            }
            Self::Dense => writer.write(name, &matrix.decompress()),
            Self::Bitmask => {
                let part = |part: &str| format!("{}.{part}", stem(name));
                let shape = [matrix.m, matrix.k].map(|n| (n as i64).to_le_bytes());
                writer.write(&part("compressed"), &matrix.values)?;
                writer.write(&part("bitmask"), &matrix.bitmask())?;
                writer.write(&part("shape"), shape.as_flattened())
            }
            Self::Cutlass => {
                writer.write(&part("values"), &matrix.values)?;
                writer.write(&part("meta"), &matrix.reordered()?)
            }
        }
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|layout| layout.name() == text);
        found.ok_or_else(|| Error::invalid(format!("layout {text:?} is not native, dense, bitmask or cutlass")))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What has to be known of a 2:4 matrix before it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec24 {
    /// Its name in a dense file, such as `encoder.layer.0.output.dense.weight`.
    pub name: String,
    /// Its rows.
    pub m: usize,
    /// Its columns before compression.
    pub k: usize,
    /// Its element type.
    pub dtype: Dtype,
    /// How many rows share a code, if that is to be said in the file. The native layout always says it: 1 for `None`.
    pub vector: Option<VectorLen>,
}

impl Spec24 {
    /// What is to be written of this matrix, its vector length included.
    pub fn of(name: impl Into<String>, s: &Sparse24) -> Self {
        let (m, k) = (s.m(), s.k());
        Self { name: name.into(), m, k, dtype: file_dtype(s.dtype()), vector: Some(s.vector()) }
    }
}

/// A name without its ending `.weight`: the name of the module in torch.
pub(super) fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Columns of the values of a matrix of `k` columns.
pub(super) fn stored_columns(k: usize) -> usize {
    2 * k.div_ceil(4)
}

/// A type of values, as far as it matters which of them are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ValueType {
    /// Bytes.
    width: usize,
    /// The bits of the last byte, the highest, that must be 0 in a zero: all but the sign of floating-point numbers.
    top: u8,
}

impl ValueType {
    fn of(dtype: Dtype) -> Result<Self> {
        let (width, top) = match dtype {
            Dtype::F32 => (4, 0x7f),
            Dtype::F16 | Dtype::BF16 => (2, 0x7f),
            Dtype::F8_E4M3 | Dtype::F8_E5M2 => (1, 0x7f),
            Dtype::I8 | Dtype::U8 => (1, 0xff),
            other => {
                let types = "F32, F16, BF16, F8_E4M3, F8_E5M2, I8 or U8";
                return Err(Error::invalid(format!("is {other}, a 2:4 matrix is {types}")));
            }
        };
        Ok(Self { width, top })
    }

    fn is_zero(self, bytes: &[u8]) -> bool {
        bytes.split_last().is_none_or(|(last, low)| last & self.top == 0 && low.iter().all(|&b| b == 0))
    }
}

/// Runs a function that is generic over the width of values.
macro_rules! each_width {
    ($width:expr, $function:ident($($argument:expr),*)) => {
        match $width {
            4 => $function::<4>($($argument),*),
            2 => $function::<2>($($argument),*),
            _ => $function::<1>($($argument),*),
        }
    };
}

/// How CUTLASS orders the words of metadata of a type.
#[derive(Clone, Copy)]
struct Order {
    /// Of the words.
    dtype: Dtype,
    /// Columns of W in a word.
    columns: usize,
    /// Rows that are interleaved with each other.
    rows: usize,
}

impl Order {
    fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F16 | Dtype::BF16 => Some(Self { dtype: Dtype::I16, columns: 16, rows: 32 }),
            Dtype::I8 | Dtype::U8 => Some(Self { dtype: Dtype::I32, columns: 32, rows: 16 }),
            _ => None,
        }
    }

    fn fits(self, m: usize, k: usize) -> bool {
        m.is_multiple_of(self.rows) && k.is_multiple_of(2 * self.columns)
    }

    /// Where the word of `row` and `col` stands among those of `m` rows. Within so many rows, those that are 8 apart
    /// become neighbours; then of each 2 x 2 words the two off the diagonal change places; and pairs of columns are
    /// stored one after the other.
    fn place(self, m: usize, row: usize, col: usize) -> usize {
        let (mut r, mut c) = (row / self.rows * self.rows + row % 8 * (self.rows / 8) + row % self.rows / 8, col);
        match (r % 2, c % 2) {
            (0, 1) => (r, c) = (r + 1, c - 1),
            (1, 0) => (r, c) = (r - 1, c + 1),
            _ => {}
        }
        c / 2 * m * 2 + r * 2 + c % 2
    }
}

/// A 2:4 matrix of any element type, as bytes: what every layout is read to and written from. [`Sparse24`] is the same
/// for the types that are multiplied.
///
/// ```
/// use sparse24::io::{Dtype, Raw24};
/// let dense = [0, 5, 0, 251, 7, 0, 0, 0];
/// let s = Raw24::from_dense(1, 8, Dtype::I8, &dense, None)?;
/// assert_eq!((s.values(), s.meta()), (&[5, 251, 7, 0][..], &[0x8d][..]));
/// assert_eq!(s.decompress(), dense);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raw24<'a> {
    m: usize,
    k: usize,
    vector: VectorLen,
    dtype: Dtype,
    kind: ValueType,
    values: Cow<'a, [u8]>,
    meta: Cow<'a, [u32]>,
}

impl<'a> From<&'a Sparse24> for Raw24<'a> {
    fn from(s: &'a Sparse24) -> Self {
        Self {
            m: s.m(),
            k: s.k(),
            vector: s.vector(),
            dtype: file_dtype(s.dtype()),
            kind: ValueType { width: s.dtype().bytes(), top: 0x7f },
            values: each_dtype!(s.values(), v => little_endian(v)),
            meta: Cow::Borrowed(s.meta()),
        }
    }
}

impl Raw24<'_> {
    /// Takes over values and metadata, laid out as [`crate::format`] says, in little-endian bytes. An error if they are
    /// not legal.
    pub fn new(m: usize, k: usize, vector: VectorLen, dtype: Dtype, values: Vec<u8>, meta: Vec<u32>) -> Result<Self> {
        let kind = ValueType::of(dtype)?;
        let (columns, words) = (stored_columns(k), k.div_ceil(32));
        let rows = m.div_ceil(vector.get());
        let bytes = checked_mul("values", checked_mul("values", m, columns)?, kind.width)?;
        if values.len() != bytes {
            return Err(Error::shape("values", vec![values.len()], vec![bytes]));
        }
        if meta.len() != checked_mul("meta", rows, words)? {
            return Err(Error::shape("meta", vec![meta.len()], vec![rows, words]));
        }
        let groups = k.div_ceil(4);
        for (row, words) in meta.chunks_exact(words.max(1)).enumerate() {
            for group in 0..8 * words.len() {
                let code = nibble(words, group);
                if group >= groups && code != 0 {
                    return Err(Error::padding(Part::Meta, row, group));
                }
                if group < groups && positions_of(code).is_none() {
                    return Err(Error::illegal_code(row, group, code));
                }
            }
        }
        let s = Self { m, k, vector, dtype, kind, values: Cow::Owned(values), meta: Cow::Owned(meta) };
        if !k.is_multiple_of(4) {
            let group = groups - 1;
            for row in 0..m {
                let (first, second) = s.code(row, group);
                let at = row * columns + 2 * group;
                let stray = |(i, at): (usize, usize)| {
                    i >= k % 4 && !kind.is_zero(&s.values[at * kind.width..(at + 1) * kind.width])
                };
                if [first, second].into_iter().zip(at..).any(stray) {
                    return Err(Error::padding(Part::Values, row, group));
                }
            }
        }
        Ok(s)
    }

    /// Compresses the little-endian bytes of an `m x k` matrix, with codes shared by `vector` rows; by as many as can
    /// share them if that is `None`. A group that does not fit is an error: [`Error::is_over_full`].
    pub fn from_dense(m: usize, k: usize, dtype: Dtype, dense: &[u8], vector: Option<VectorLen>) -> Result<Self> {
        fn gather<const W: usize>(s: &Raw24<'_>, dense: &[u8]) -> Vec<u8> {
            let mut values = Vec::with_capacity(s.m * stored_columns(s.k) * W);
            for (row, dense) in dense.chunks_exact(s.k * W).enumerate() {
                let codes = s.meta_row(row);
                for (group, data) in dense.chunks(4 * W).enumerate() {
                    let (first, second) = split(nibble(codes, group));
                    let data = data.as_chunks::<W>().0;
                    for at in [first, second] {
                        values.extend(data.get(at).unwrap_or(&[0; W]));
                    }
                }
            }
            values
        }
        let mask = nonzero_mask(m, k, dtype, dense)?;
        let vector = vector.or_else(|| Sparse24::vector_len_of(&mask)).unwrap_or(VectorLen::ONE);
        checked_mul("values", checked_mul("values", m, stored_columns(k))?, 4)?;
        let meta = codes(&mask, vector)?;
        let kind = ValueType::of(dtype)?;
        let mut s = Self { m, k, vector, dtype, kind, values: Cow::Borrowed(&[]), meta: Cow::Owned(meta) };
        if !dense.is_empty() {
            s.values = Cow::Owned(each_width!(kind.width, gather(&s, dense)));
        }
        Ok(s)
    }

    /// The same matrix with codes shared by as many rows as can share them. Codes stay, if as many rows have the same
    /// ones; else they are those of the non-zeros.
    pub fn widest(self) -> Result<Self> {
        let dense = self.decompress();
        let shared = nonzero_mask(self.m, self.k, self.dtype, &dense)?;
        // As it is legal at its own vector length, so it is at one.
        let widest = Sparse24::vector_len_of(&shared).unwrap_or(VectorLen::ONE);
        match self.shared(widest) {
            Some(meta) => Ok(Self { vector: widest, meta: Cow::Owned(meta), ..self }),
            None => Self::from_dense(self.m, self.k, self.dtype, &dense, Some(widest)),
        }
    }

    /// The same matrix at another vector length, with the codes that it has. An error if rows that would share them
    /// have others.
    pub fn with_vector(self, vector: VectorLen) -> Result<Self> {
        match self.shared(vector) {
            Some(meta) => Ok(Self { vector, meta: Cow::Owned(meta), ..self }),
            None => {
                Err(Error::invalid(format!("vector length {vector} is said, but rows that would share codes do not")))
            }
        }
    }

    /// The codes of every `vector` rows, if those rows have the same.
    fn shared(&self, vector: VectorLen) -> Option<Vec<u32>> {
        let words = self.k.div_ceil(32);
        let v = vector.get();
        let mut meta = Vec::with_capacity(self.m.div_ceil(v).checked_mul(words)?);
        for first in (0..if words == 0 { 0 } else { self.m }).step_by(v) {
            let codes = self.meta_row(first);
            if (first + 1..self.m.min(first + v)).any(|row| self.meta_row(row) != codes) {
                return None;
            }
            meta.extend(codes);
        }
        Some(meta)
    }

    /// The little-endian bytes of the `m x k` matrix, with 0 wherever no value is coded.
    pub fn decompress(&self) -> Vec<u8> {
        fn scatter<const W: usize>(s: &Raw24<'_>) -> Vec<u8> {
            let mut dense = vec![0; s.m * s.k * W];
            for (row, out) in dense.chunks_exact_mut((s.k * W).max(1)).enumerate() {
                let codes = s.meta_row(row);
                let values = &s.values.as_chunks::<W>().0[row * stored_columns(s.k)..];
                for (group, out) in out.chunks_mut(4 * W).enumerate() {
                    let (first, second) = split(nibble(codes, group));
                    let out = out.as_chunks_mut::<W>().0;
                    for (at, value) in [first, second].into_iter().zip(&values[2 * group..]) {
                        if let Some(out) = out.get_mut(at) {
                            *out = *value;
                        }
                    }
                }
            }
            dense
        }
        each_width!(self.kind.width, scatter(self))
    }

    /// The same matrix for multiplication. An error if it is of a type that is not multiplied.
    pub fn to_sparse24(&self) -> Result<Sparse24> {
        let dtype = match self.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => return Err(Error::invalid(format!("is {other}, expected F32, F16 or BF16"))),
        };
        let values = Elements::from_bytes(dtype, &self.values)?;
        Sparse24::from_parts(self.m, self.k, self.vector, values, self.meta.to_vec())
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Columns, before compression.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How many rows share a code.
    pub fn vector(&self) -> VectorLen {
        self.vector
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How many elements are not zero. -0.0 is zero, NaN is not.
    pub fn nonzeros(&self) -> usize {
        self.values.chunks_exact(self.kind.width).filter(|x| !self.kind.is_zero(x)).count()
    }

    /// The values in little-endian bytes.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The codes, as in [`Sparse24::meta`].
    pub fn meta(&self) -> &[u32] {
        &self.meta
    }

    fn meta_row(&self, row: usize) -> &[u32] {
        let words = self.k.div_ceil(32);
        &self.meta[row / self.vector.get() * words..][..words]
    }

    fn code(&self, row: usize, group: usize) -> (usize, usize) {
        split(nibble(self.meta_row(row), group))
    }

    /// The coded positions of a matrix whose columns are a multiple of 4, a bit each.
    fn bitmask(&self) -> Vec<u8> {
        let row_bytes = self.k.div_ceil(8);
        let mut bytes = vec![0; self.m * row_bytes];
        for (row, bytes) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            for group in 0..self.k / 4 {
                let (first, second) = self.code(row, group);
                bytes[group / 2] |= (1 << first | 1 << second) << (4 * (group % 2));
            }
        }
        bytes
    }

    /// The codes in CUTLASS' order.
    fn reordered(&self) -> Result<Vec<u8>> {
        let order = Order::of(self.dtype).filter(|order| order.fits(self.m, self.k));
        let order = order.ok_or_else(|| Error::invalid("the layout cutlass has no place for this matrix"))?;
        let (bytes, cols) = (order.columns / 8, self.k / order.columns);
        let mut out = vec![0; self.m * cols * bytes];
        for row in 0..self.m {
            let words = little_endian(self.meta_row(row));
            for (col, word) in words.chunks_exact(bytes).enumerate() {
                out[order.place(self.m, row, col) * bytes..][..bytes].copy_from_slice(word);
            }
        }
        Ok(out)
    }
}

/// The code of `group` in a row of metadata.
fn nibble(words: &[u32], group: usize) -> u8 {
    (words[group / 8] >> (4 * (group % 8)) & 0xf) as u8
}

/// The two positions of a code that is known to be legal.
fn split(code: u8) -> (usize, usize) {
    ((code & 3) as usize, (code >> 2) as usize)
}

/// Where elements are not zero. An error if the bytes are not those of an `m x k` matrix of that type.
fn nonzero_mask(m: usize, k: usize, dtype: Dtype, dense: &[u8]) -> Result<Mask> {
    fn bits<const W: usize>(kind: ValueType, k: usize, dense: &[u8]) -> Vec<u32> {
        let word = |data: &[u8]| {
            let data = data.as_chunks::<W>().0;
            // The same as `is_zero`, of a width that the compiler knows.
            let any = |x: &[u8; W]| x[..W - 1].iter().fold(x[W - 1] & kind.top, |any, byte| any | byte) != 0;
            (0..).zip(data).fold(0, |bits, (i, x)| bits | u32::from(any(x)) << i)
        };
        dense.chunks_exact(k * W).flat_map(|row| row.chunks(32 * W).map(word)).collect()
    }
    let kind = ValueType::of(dtype)?;
    let bytes = checked_mul("matrix", checked_mul("matrix", m, k)?, kind.width)?;
    if dense.len() != bytes {
        return Err(Error::shape("matrix bytes", vec![dense.len()], vec![bytes]));
    }
    let words = if dense.is_empty() { Vec::new() } else { each_width!(kind.width, bits(kind, k, dense)) };
    Mask::new(m, k, words)
}

/// The codes of a mask, shared by so many rows.
fn codes(mask: &Mask, vector: VectorLen) -> Result<Vec<u32>> {
    let per_row = mask.words_per_row();
    let groups = mask.cols().div_ceil(4);
    let mut meta = Vec::with_capacity(checked_mul("meta", mask.rows().div_ceil(vector.get()), per_row)?);
    if per_row == 0 {
        return Ok(meta);
    }
    for (block, rows) in mask.words().chunks(vector.get() * per_row).enumerate() {
        for at in 0..per_row {
            let union = rows.chunks_exact(per_row).fold(0, |union, row| union | row[at]);
            let mut word = 0;
            for group in 8 * at..groups.min(8 * at + 8) {
                let bits = (union >> (4 * (group % 8)) & 0xf) as u8;
                let code =
                    code_of(bits).ok_or(Error::over_full(block * vector.get(), group, bits.count_ones() as usize))?;
                word |= u32::from(code) << (4 * (group % 8));
            }
            meta.push(word);
        }
    }
    Ok(meta)
}

/// Which elements of a mask are set. An error names the first that is neither zero nor one.
pub(super) fn ones(dtype: Dtype, bytes: &[u8]) -> Result<Vec<bool>> {
    let one: &[u8] = match dtype {
        Dtype::BOOL | Dtype::U8 | Dtype::I8 => &[1],
        Dtype::F16 => &[0x00, 0x3c],
        Dtype::BF16 => &[0x80, 0x3f],
        Dtype::F32 => &[0x00, 0x00, 0x80, 0x3f],
        Dtype::F64 => &[0, 0, 0, 0, 0, 0, 0xf0, 0x3f],
        Dtype::I32 => &[1, 0, 0, 0],
        Dtype::I64 => &[1, 0, 0, 0, 0, 0, 0, 0],
        other => return Err(Error::invalid(format!("is {other}, which no mask is"))),
    };
    let float = matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64);
    let kind = ValueType { width: one.len(), top: if float { 0x7f } else { 0xff } };
    let element = |(i, x): (usize, &[u8])| match x {
        x if x == one => Ok(true),
        x if kind.is_zero(x) => Ok(false),
        _ => Err(Error::invalid(format!("element {i} of the mask is neither 0 nor 1"))),
    };
    bytes.chunks_exact(one.len()).enumerate().map(element).collect()
}

/// A `sparse-24-bitmask`, whose values need no change.
pub(super) fn from_bitmask(
    m: usize,
    k: usize,
    dtype: Dtype,
    values: Vec<u8>,
    bitmask: &[u8],
) -> Result<Raw24<'static>> {
    let (row_bytes, words) = (k.div_ceil(8), k.div_ceil(32));
    let mut meta = vec![0; checked_mul("meta", m, words)?];
    let rows = bitmask.chunks_exact(row_bytes.max(1)).zip(meta.chunks_exact_mut(words.max(1)));
    for (row, (bytes, meta)) in rows.enumerate() {
        for group in 0..2 * bytes.len() {
            let bits = bytes[group / 2] >> (4 * (group % 2)) & 0xf;
            match (bits.count_ones(), code_of(bits)) {
                (0, _) if group >= k / 4 => {}
                (2, Some(code)) if group < k / 4 => meta[group / 8] |= u32::from(code) << (4 * (group % 8)),
                (count @ 3.., _) => return Err(Error::over_full(row, group, count as usize)),
                (count, _) => {
                    let expected = if group < k / 4 { 2 } else { 0 };
                    let reason = format!("row {row}, group {group}: {count} bits are set, expected {expected}");
                    return Err(Error::invalid(reason));
                }
            }
        }
    }
    Raw24::new(m, k, VectorLen::ONE, dtype, values, meta)
}

/// An error unless a bitmask sets two bits of every group.
pub(super) fn expect_two_of_four(m: usize, k: usize, bitmask: &[u8]) -> Result<()> {
    // Of any type that is taken: the values are not looked at.
    from_bitmask(m, k, Dtype::U8, vec![0; checked_mul("values", m, stored_columns(k))?], bitmask).map(drop)
}

/// The dense bytes of a `sparse-bitmask` of `width` bytes an element. `offsets` are compared with the values before
/// each row, where there are any.
pub(super) fn from_sparse_bitmask(
    m: usize,
    k: usize,
    width: usize,
    values: &[u8],
    offsets: Option<&[u8]>,
    bitmask: &[u8],
) -> Result<Vec<u8>> {
    let mut dense = vec![0; checked_mul("matrix", checked_mul("matrix", m, k)?, width)?];
    let mut taken = 0;
    let row_bytes = k.div_ceil(8);
    let offsets = offsets.map(|offsets| offsets.as_chunks::<8>().0);
    for (row, bytes) in bitmask.chunks_exact(row_bytes.max(1)).enumerate() {
        let offset = offsets.and_then(|offsets| offsets.get(row)).map(|offset| i64::from_le_bytes(*offset));
        if let Some(offset) = offset.filter(|&offset| usize::try_from(offset) != Ok(taken)) {
            return Err(Error::invalid(format!("row {row} starts at value {offset}, the rows before have {taken}")));
        }
        for col in (0..8 * row_bytes).filter(|col| bytes[col / 8] >> (col % 8) & 1 == 1) {
            let value = values.get(taken * width..(taken + 1) * width);
            let (Some(value), true) = (value, col < k) else {
                return Err(Error::invalid(format!("row {row}: the bit of column {col} has no value")));
            };
            dense[(row * k + col) * width..][..width].copy_from_slice(value);
            taken += 1;
        }
    }
    if taken * width != values.len() {
        return Err(Error::invalid(format!("{} values, of which the mask places {taken}", values.len() / width)));
    }
    Ok(dense)
}

/// The type of the metadata and its columns in the layout cutlass of such a matrix, if it can be in that.
pub(super) fn cutlass_meta(m: usize, k: usize, dtype: Dtype) -> Option<(Dtype, usize)> {
    let order = Order::of(dtype).filter(|order| order.fits(m, k))?;
    Some((order.dtype, k / order.columns))
}

/// A matrix in the layout cutlass, whose values need no change.
pub(super) fn from_cutlass(m: usize, k: usize, dtype: Dtype, values: Vec<u8>, meta: &[u8]) -> Result<Raw24<'static>> {
    let order = Order::of(dtype).filter(|order| order.fits(m, k));
    let order = order.ok_or_else(|| Error::invalid(format!("{m} x {k} {dtype} is no matrix of the layout cutlass")))?;
    let (bytes, cols) = (order.columns / 8, k / order.columns);
    let mut words = vec![0u32; checked_mul("meta", m, k / 32)?];
    for row in 0..m {
        for col in 0..cols {
            let word = &meta[order.place(m, row, col) * bytes..][..bytes];
            let word = word.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
            words[(row * cols + col) * bytes / 4] |= word << (8 * (col * bytes % 4));
        }
    }
    Raw24::new(m, k, VectorLen::ONE, dtype, values, words)
}
