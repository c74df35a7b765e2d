//! The layouts in which a 2:4 matrix lies in a safetensors file, specified at [`Layout`]: each is read to a
//! [`Sparse24`] and written from one.
//!
//! Layouts differ in how they say where values stood, so this file translates between their words and the codes of
//! [`crate::format`], and moves no element. Invariant: what is read is legal by the rules of the format.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use super::{Dtype, FORMAT, Spec, Stored, Writer, little_endian};
use crate::error::{Error, Result, checked_mul, expect_len};
use crate::format::{Bytes, Sparse24, Storage, VERSION, code_of};
use crate::mask::VectorLen;

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

    /// How a matrix in this layout is said to be stored when it is read.
    pub const fn stored(self) -> Stored {
        match self {
            Self::Native => Stored::Native,
            Self::Dense => Stored::Dense,
            Self::Bitmask => Stored::Bitmask,
            Self::Cutlass => Stored::Cutlass,
        }
    }

    /// Whether 2:4 matrices can have elements of this type; a layout may take fewer.
    pub fn takes(dtype: Dtype) -> bool {
        Bytes::expect_type(dtype).is_ok()
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
        Bytes::expect_type(*dtype)?;
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

    /// The tensors of [`Self::specs`] in memory, each with its little-endian bytes: what [`Self::write`] writes.
    ///
    /// ```
    /// use sparse24::io::{Dtype, Layout};
    /// use sparse24::{DType, Matrix, VectorLen, prune};
    /// let w = Matrix::uniform(32, 64, DType::F16, 24)?;
    /// let s = prune::sparsify(&w, VectorLen::ONE)?;
    /// let tensors = Layout::Cutlass.encode("up.weight", &s)?;
    /// assert_eq!((&*tensors[1].0.name, tensors[1].0.dtype), ("up.weight.meta", Dtype::I16));
    /// let parts: Vec<_> = tensors.iter().map(|(_, bytes)| &**bytes).collect();
    /// let back = Layout::Cutlass.decode((32, 64), Dtype::F16, VectorLen::ONE, &parts)?;
    /// assert_eq!(sparse24::Sparse24::try_from(back)?, s);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn encode<S: Storage>(self, name: &str, matrix: &Sparse24<S>) -> Result<Vec<(Spec, Vec<u8>)>> {
        let specs = self.specs(&Spec24::of(name, matrix))?;
        Ok(specs.into_iter().zip(self.parts(matrix)?.into_iter().map(Cow::into_owned)).collect())
    }

    /// The bytes of the tensors of [`Self::specs`].
    fn parts<S: Storage>(self, matrix: &Sparse24<S>) -> Result<Vec<Cow<'_, [u8]>>> {
        let values = || matrix.values().little_endian();
        Ok(match self {
            Self::Native => vec![values(), little_endian(matrix.meta())],
            Self::Dense => vec![Cow::Owned(matrix.to_elements().little_endian().into_owned())],
            Self::Bitmask => {
                let shape = [matrix.m(), matrix.k()].map(|n| (n as i64).to_le_bytes());
                vec![values(), bitmask(matrix).into(), shape.as_flattened().to_vec().into()]
            }
            Self::Cutlass => vec![values(), reordered(matrix)?.into()],
        })
    }

    /// The matrix of `m x k` whose tensors in this layout, of elements of this type, have these little-endian bytes, in
    /// the order of [`Self::specs`] (a shape at the end may be left out); the inverse of [`Self::encode`]. Rows of the
    /// native layout's metadata follow from `vector`, and those of other layouts are shared by as many rows if they can
    /// be. An error names what does not fit, or is not legal by the rules of the [format](crate::format).
    pub fn decode(
        self,
        (m, k): (usize, usize),
        dtype: Dtype,
        vector: VectorLen,
        parts: &[&[u8]],
    ) -> Result<Sparse24<Bytes>> {
        let specs = self.specs(&Spec24 { name: String::new(), m, k, dtype, vector: Some(vector) })?;
        let needed = if self == Self::Bitmask { 2 } else { specs.len() };
        if !(needed..=specs.len()).contains(&parts.len()) {
            return Err(Error::invalid(format!("{} tensors, the layout {self} has {needed}", parts.len())));
        }
        for (spec, part) in specs.iter().zip(parts) {
            let name = spec.name.trim_start_matches('.');
            expect_len(&format!("bytes of {name}"), part.len(), spec.bytes()?)?;
        }
        let values = parts[0].to_vec();
        match self {
            Self::Native => {
                let words = parts[1].as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect();
                Sparse24::from_parts(m, k, vector, Bytes::new(dtype, values)?, words)
            }
            Self::Dense => Sparse24::from_elements(m, k, &Bytes::new(dtype, values)?, Some(vector)),
            Self::Bitmask => from_bitmask(m, k, dtype, values, parts[1])?.with_vector(vector),
            Self::Cutlass => from_cutlass(m, k, dtype, values, parts[1])?.with_vector(vector),
        }
    }

    /// Writes a matrix to the tensors of [`Self::specs`].
    pub fn write<S: Storage>(self, writer: &mut Writer, name: &str, matrix: &Sparse24<S>) -> Result<()> {
        // Values are not copied where a file has them as they are in memory.
        let tensors = self.parts(matrix)?;
        let specs = self.specs(&Spec24::of(name, matrix))?;
        specs.iter().zip(tensors).try_for_each(|(spec, bytes)| writer.write(&spec.name, &bytes))
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
    pub fn of<S: Storage>(name: impl Into<String>, s: &Sparse24<S>) -> Self {
        let (m, k) = (s.m(), s.k());
        Self { name: name.into(), m, k, dtype: s.values().file_dtype(), vector: Some(s.vector()) }
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

/// The coded positions of a matrix whose columns are a multiple of 4, a bit each.
fn bitmask<S: Storage>(s: &Sparse24<S>) -> Vec<u8> {
    let row_bytes = s.k().div_ceil(8);
    let mut bytes = vec![0; s.m() * row_bytes];
    for (row, bytes) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
        for group in 0..s.k() / 4 {
            let (first, second) = s.code(row, group);
            bytes[group / 2] |= (1 << first | 1 << second) << (4 * (group % 2));
        }
    }
    bytes
}

/// The codes in CUTLASS' order.
fn reordered<S: Storage>(s: &Sparse24<S>) -> Result<Vec<u8>> {
    let order = Order::of(s.values().file_dtype()).filter(|order| order.fits(s.m(), s.k()));
    let order = order.ok_or_else(|| Error::invalid("the layout cutlass has no place for this matrix"))?;
    let (bytes, cols) = (order.columns / 8, s.k() / order.columns);
    let mut out = vec![0; s.m() * cols * bytes];
    for row in 0..s.m() {
        let words = little_endian(s.meta_row(row));
        for (col, word) in words.chunks_exact(bytes).enumerate() {
            out[order.place(s.m(), row, col) * bytes..][..bytes].copy_from_slice(word);
        }
    }
    Ok(out)
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
    let element = |(i, x): (usize, &[u8])| match x {
        x if x == one => Ok(true),
        [low @ .., top] if low.iter().all(|&b| b == 0) && (*top == 0 || float && *top == 0x80) => Ok(false),
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
) -> Result<Sparse24<Bytes>> {
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
    Sparse24::from_parts(m, k, VectorLen::ONE, Bytes::new(dtype, values)?, meta)
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
pub(super) fn from_cutlass(m: usize, k: usize, dtype: Dtype, values: Vec<u8>, meta: &[u8]) -> Result<Sparse24<Bytes>> {
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
    Sparse24::from_parts(m, k, VectorLen::ONE, Bytes::new(dtype, values)?, words)
}
