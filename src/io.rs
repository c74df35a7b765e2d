//! Tensor files: safetensors with ordinary tensors, with 2:4 matrices in this crate's format or in those of others, or
//! with both; and the one way in which this crate writes files.
//!
//! A [`TensorFile`] is one file, tensor by tensor, as it is. A [`Source`] is a file or a model's folder, as the
//! matrices that it means, however they are stored ([`Stored`]); both are read from a [`Store`], which is the disk
//! unless the caller has the files in memory. A [`Writer`] writes a file, and a [`Layout`] says how a 2:4 matrix lies
//! in one.
//!
//! A checkpoint may be larger than memory, so a [`TensorFile`] reads the header and then one tensor at a time, and
//! [`save`] holds no second copy of what it writes. Nothing is memory-mapped: a file that shrinks while it is read is
//! an error, not a signal.
//!
//! With the feature `cli`, a `SparsityClaim` is what a config says of the sparsity of weights.
//!
//! A [`NewModel`] is a model with some of its tensors replaced, in a [`NewFolder`] if the old one is a folder, and
//! [`Provenance`] says what its weights were made from. [`in_by_out`] finds the matrices that are stored the other way
//! round.
//!
//! Invariants: after [`TensorFile::open`] every tensor's type, shape and bytes agree and lie within the file; a file
//! that is being written appears under its name complete or not at all.

#[cfg(feature = "cli")]
mod claim;
mod folder;
mod layout;
mod orientation;
mod provenance;
mod rewrite;
mod source;
mod store;
mod temporary;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytemuck::Pod;
#[cfg(feature = "cli")]
pub use claim::SparsityClaim;
pub use folder::{LeftOut, NewFolder, read_config, sparsity_configs};
pub use layout::{Layout, Spec24};
pub use orientation::{in_by_out, transpose};
pub use provenance::Provenance;
pub use rewrite::{Action, Actions, Content, NewModel, Written, check_output, config_of};
pub use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo as Header};
use serde_json::{Map, Value};
pub use source::{Item, Source, Stored, weights_in};
pub use store::Store;
use store::StoredFile;
use temporary::TemporaryFile;
pub use temporary::discard_temporaries;

use crate::error::{Error, Result};
use crate::format::{Bytes, Sparse24, Storage, VERSION};
use crate::mask::VectorLen;
use crate::matrix::{DType, Element, Elements, Matrix};
use crate::memory;

/// The largest header that the safetensors format allows, in bytes.
const MAX_HEADER: u64 = 100_000_000;
/// The key under which safetensors keeps its string-to-string map.
const METADATA: &str = "__metadata__";
/// The value of `format` in that map.
const FORMAT: &str = "sparse24";

/// What the header says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type, of which [`DType`] has three.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its size in bytes.
    pub bytes: usize,
    /// Where it starts in the file.
    start: u64,
}

impl TensorInfo {
    /// What a [`Writer`] needs to write the same tensor.
    pub fn spec(&self) -> Spec {
        Spec::new(&*self.name, self.dtype, &self.shape)
    }
}

/// An open safetensors file, of which only the header is in memory.
///
/// ```
/// use sparse24::{Matrix, Sparse24, TensorFile, VectorLen, io};
/// let w = Matrix::from_f32(2, 4, &[0., 1., 0., 2., 3., 0., 0., 4.])?;
/// let s = Sparse24::from_dense(&w, VectorLen::ONE)?;
/// let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("model.safetensors");
/// io::save(&path, &[("up", io::Entry::Sparse24(&s)), ("head", io::Entry::Matrix(&w))])?;
///
/// let file = TensorFile::open(&path)?;
/// assert_eq!(file.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["head", "up.meta", "up.values"]);
/// assert_eq!(file.sparse24("up")?, s);
/// assert_eq!(file.matrix("head")?, w);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: StoredFile,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: HashMap<String, String>,
}

/// What a header says about a compressed matrix.
struct Native<'a> {
    m: usize,
    k: usize,
    vector: VectorLen,
    values: &'a TensorInfo,
    meta: &'a TensorInfo,
}

impl TensorFile {
    /// Opens a file and checks its header against itself and against the length of the file. Errors name the file and,
    /// where one is to blame, the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_in(&Store::disk(), path)
    }

    /// [`TensorFile::open`] of a file of a store.
    pub fn open_in(store: &Store, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |e| Error::io(path, e);
        let file = store.open(path).map_err(io)?;
        let len = file.len().map_err(io)?;
        let Some(after_length) = len.checked_sub(8) else {
            return Err(Error::file(path, format!("{len} bytes are too few for a safetensors file")));
        };
        let mut length = [0; 8];
        file.read_at(0, &mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        // Before anything is allocated: the first eight bytes of any other file are some huge number.
        let Some(data_len) = after_length.checked_sub(length).filter(|_| length <= MAX_HEADER) else {
            return Err(Error::file(
                path,
                format!("not a safetensors file: a header of {length} bytes is claimed, {after_length} bytes follow"),
            ));
        };
        let header: Vec<u8> = read_at(&file, 8, length as usize).map_err(io)?;
        let mut header: Map<String, Value> =
            serde_json::from_slice(&header).map_err(|e| Error::file(path, format!("header is no JSON object: {e}")))?;
        // `null` is no metadata, as for the safetensors library.
        let metadata = header.remove(METADATA).map(serde_json::from_value::<Option<_>>).transpose();
        let metadata =
            metadata.map_err(|e| Error::file(path, format!("{METADATA}: {e}")))?.flatten().unwrap_or_default();

        let mut headers = Vec::with_capacity(header.len());
        for (name, value) in header {
            let checked = check(value, data_len);
            headers.push((name.clone(), checked.map_err(|e| e.in_tensor(path, &name))?));
        }
        headers.sort_by_key(|(_, header)| header.data_offsets);
        let end = headers.last().map_or(0, |(_, header)| header.data_offsets.1) as u64;
        let data_start = 8 + length;
        let tensors = headers.iter().map(|(name, header)| {
            let (start, end) = header.data_offsets;
            let info = TensorInfo {
                name: name.clone(),
                dtype: header.dtype,
                shape: header.shape.clone(),
                bytes: end - start,
                start: data_start + start as u64,
            };
            (name.clone(), info)
        });
        let tensors = tensors.collect();
        // Each tensor fits by itself; together they must neither overlap nor leave gaps.
        Metadata::new(None, headers).map_err(|e| match e {
            safetensors::SafeTensorError::InvalidOffset(name) => {
                Error::invalid("overlaps the tensor before it or leaves a gap").in_tensor(path, &name)
            }
            e => Error::file(path, e.to_string()),
        })?;
        if end != data_len {
            return Err(Error::file(path, format!("{} bytes follow the last tensor", data_len - end)));
        }
        Ok(Self { path: path.to_path_buf(), file, tensors, metadata })
    }

    /// The path under which the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the header says about every tensor, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// What the header says about the tensor `name`. An error if there is none.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| Error::invalid("there is no such tensor").in_tensor(&self.path, name))
    }

    /// The bytes of a tensor of any type, as they are in the file.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        self.read(self.info(name)?)
    }

    /// A two-dimensional tensor of type f32, f16 or bf16. Any other is an error.
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let info = self.info(name)?;
        let [rows, cols] = info.shape[..] else {
            let reason = format!("has shape {:?}, a matrix has two dimensions", info.shape);
            return Err(Error::invalid(reason).in_tensor(&self.path, name));
        };
        Matrix::new(rows, cols, self.elements(info)?).map_err(|e| e.in_tensor(&self.path, name))
    }

    /// A one-dimensional tensor of type f32, f16 or bf16, as a matrix of one row. Any other is an error.
    pub fn vector(&self, name: &str) -> Result<Matrix> {
        let info = self.info(name)?;
        let [len] = info.shape[..] else {
            let reason = format!("has shape {:?}, a vector has one dimension", info.shape);
            return Err(Error::invalid(reason).in_tensor(&self.path, name));
        };
        Matrix::new(1, len, self.elements(info)?).map_err(|e| e.in_tensor(&self.path, name))
    }

    /// The names P of the compressed matrices in the file, sorted; none if it is another kind of file. An error if the
    /// file is of a version of the format that this crate does not know.
    ///
    /// Other programs' metadata may have a key `P.vector`, too: one without a tensor `P.values` or `P.meta` names
    /// nothing.
    pub fn sparse24_names(&self) -> Result<Vec<String>> {
        if self.metadata.get("format").is_none_or(|f| f != FORMAT) {
            return Ok(Vec::new());
        }
        let mut names: Vec<_> = self.metadata.keys().filter_map(|key| key.strip_suffix(".vector")).collect();
        names.retain(|name| ["values", "meta"].iter().any(|part| self.tensors.contains_key(&format!("{name}.{part}"))));
        if !names.is_empty() || self.metadata.contains_key("version") {
            self.check_version()?;
        }
        names.sort_unstable();
        Ok(names.into_iter().map(str::to_owned).collect())
    }

    /// The compressed matrix called `name`, checked throughout.
    pub fn sparse24(&self, name: &str) -> Result<Sparse24> {
        let native = self.native(name)?;
        let values = self.elements(native.values)?;
        let made = Sparse24::from_parts(native.m, native.k, native.vector, values, self.words(native.meta)?);
        made.map_err(|e| self.in_part(e, name))
    }

    /// [`Self::sparse24`] for values of any type that the format has.
    fn sparse24_bytes(&self, name: &str) -> Result<Sparse24<Bytes>> {
        let Native { m, k, vector, values, meta } = self.native(name)?;
        let (bytes, meta) = (self.read(values)?, self.words(meta)?);
        let made = Bytes::new(values.dtype, bytes).and_then(|values| Sparse24::from_parts(m, k, vector, values, meta));
        made.map_err(|e| self.in_part(e, name))
    }

    /// What the header says about the compressed matrix called `name`.
    fn native(&self, name: &str) -> Result<Native<'_>> {
        let fail = |reason: String| Error::invalid(reason).in_tensor(&self.path, name);
        match self.metadata.get("format") {
            Some(format) if format == FORMAT => self.check_version()?,
            format => return Err(fail(format!("the file's format is {format:?}, not {FORMAT:?}"))),
        }
        let key = |key: &str| {
            let key = format!("{name}.{key}");
            self.metadata.get(&key).map(String::as_str).ok_or_else(|| fail(format!("{METADATA} has no {key:?}")))
        };
        let (shape, vector) = (key("shape")?, key("vector")?);
        let (m, k): (usize, usize) = shape
            .split_once(',')
            .and_then(|(m, k)| Some((m.parse().ok()?, k.parse().ok()?)))
            .ok_or_else(|| fail(format!("shape {shape:?} is not of the form m,k")))?;
        let vector: usize = vector.parse().map_err(|_| fail(format!("vector length {vector:?} is not a number")))?;
        let vector = VectorLen::new(vector).map_err(|e| e.in_tensor(&self.path, name))?;

        let part = |part: &str, expected: [usize; 2]| {
            let info = self.info(&format!("{name}.{part}"))?;
            if info.shape != expected {
                let shape = Error::shape(part, info.shape.clone(), expected);
                return Err(shape.in_tensor(&self.path, &info.name));
            }
            Ok(info)
        };
        let values = part("values", [m, layout::stored_columns(k)])?;
        let meta = part("meta", [m.div_ceil(vector.get()), k.div_ceil(32)])?;
        if meta.dtype != Dtype::U32 {
            return Err(Error::invalid(format!("is {}, expected U32", meta.dtype)).in_tensor(&self.path, &meta.name));
        }
        Ok(Native { m, k, vector, values, meta })
    }

    /// An error of a compressed matrix, with the tensor that it is about.
    fn in_part(&self, e: Error, name: &str) -> Error {
        let tensor = e.part().map_or(name.to_owned(), |part| format!("{name}.{part}"));
        e.in_tensor(&self.path, &tensor)
    }

    /// The words of a tensor of 32 bits an element.
    fn words(&self, info: &TensorInfo) -> Result<Vec<u32>> {
        let mut words = self.read::<u32>(info)?;
        words.iter_mut().for_each(|word| *word = u32::from_le(*word));
        Ok(words)
    }

    fn check_version(&self) -> Result<()> {
        match self.metadata.get("version").map(String::as_str) {
            Some(VERSION) => Ok(()),
            Some(other) => Err(Error::file(
                &self.path,
                format!("{FORMAT} version {other:?}, this reader knows version {VERSION:?}"),
            )),
            None => Err(Error::file(&self.path, format!("a {FORMAT} file without a version"))),
        }
    }

    /// The elements of a tensor of one of our types.
    fn elements(&self, info: &TensorInfo) -> Result<Elements> {
        fn host<T: Element>(mut data: Vec<T>) -> Elements {
            swap_if_big_endian(&mut data);
            T::wrap(data)
        }
        Ok(match DType::try_from(info.dtype).map_err(|e| e.in_tensor(&self.path, &info.name))? {
            DType::F32 => host(self.read::<f32>(info)?),
            DType::F16 => host(self.read::<half::f16>(info)?),
            DType::Bf16 => host(self.read::<half::bf16>(info)?),
        })
    }

    /// The bytes of a tensor as items of `T`, little-endian still.
    fn read<T: Pod>(&self, info: &TensorInfo) -> Result<Vec<T>> {
        memory::claim(info.bytes, || "a tensor".into()).map_err(|e| e.in_tensor(&self.path, &info.name))?;
        read_at(&self.file, info.start, info.bytes / size_of::<T>())
            .map_err(|e| Error::io(&self.path, e).in_tensor(&self.path, &info.name))
    }
}

/// Reads one entry of a header, and checks it as far as one tensor can be: its bytes are as many as type and shape say
/// and lie within the `data_len` bytes after the header.
fn check(entry: Value, data_len: u64) -> Result<Header> {
    let header: Header = serde_json::from_value(entry).map_err(|e| Error::invalid(e.to_string()))?;
    let (start, end) = header.data_offsets;
    let Some(bytes) = end.checked_sub(start) else {
        return Err(Error::invalid(format!("ends at byte {end}, before its start at {start}")));
    };
    if end as u64 > data_len {
        return Err(Error::invalid(format!("ends at byte {end} of the data, the file holds {data_len}: truncated")));
    }
    // The library's own arithmetic, one tensor at a time because its errors do not say which.
    let alone = Header { dtype: header.dtype, shape: header.shape.clone(), data_offsets: (0, bytes) };
    Metadata::new(None, vec![(String::new(), alone)]).map_err(|e| {
        Error::invalid(format!("{} of shape {:?} does not fit its {bytes} bytes: {e}", header.dtype, header.shape))
    })?;
    Ok(header)
}

/// Reads `len` items at byte `start`. The caller has checked that the file is that long, so the allocation is bounded.
fn read_at<T: Pod>(file: &StoredFile, start: u64, len: usize) -> io::Result<Vec<T>> {
    let mut data = vec![T::zeroed(); len];
    file.read_at(start, bytemuck::cast_slice_mut(&mut data))?;
    Ok(data)
}

fn swap_if_big_endian<T: Pod>(data: &mut [T]) {
    if cfg!(target_endian = "big") {
        data.iter_mut().for_each(|x| bytemuck::bytes_of_mut(x).reverse());
    }
}

/// The items as they are stored in a file.
fn little_endian<T: Pod>(data: &[T]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(bytemuck::cast_slice(data));
    }
    let mut data = data.to_vec();
    swap_if_big_endian(&mut data);
    Cow::Owned(bytemuck::cast_slice(&data).to_vec())
}

/// One thing to store under a name.
#[derive(Clone, Copy, Debug)]
pub enum Entry<'a> {
    /// A compressed matrix, as `name.values`, `name.meta` and its part of the metadata.
    Sparse24(&'a Sparse24),
    /// A dense matrix.
    Matrix(&'a Matrix),
    /// The tensor of that name in another file, whatever its type and shape, byte for byte.
    Copy(&'a TensorFile),
}

/// Writes a safetensors file that holds `entries`, in place of any file at `path`. The same entries, in any order, make
/// the same bytes. An error, after which `path` is as it was, if a name is used twice or a file cannot be read or
/// written. All entries are in memory or in files at once; a [`Writer`] needs one at a time.
pub fn save(path: impl AsRef<Path>, entries: &[(&str, Entry<'_>)]) -> Result<()> {
    let path = path.as_ref();
    let mut metadata = BTreeMap::new();
    let mut specs = Vec::new();
    for &(name, entry) in entries {
        match entry {
            Entry::Sparse24(s) => {
                let matrix = Spec24::of(name, s);
                metadata.extend(Layout::Native.metadata(&matrix));
                specs.extend(Layout::Native.specs(&matrix).map_err(|e| e.in_tensor(path, name))?);
            }
            Entry::Matrix(w) => specs.push(Spec::new(name, w.dtype().into(), &[w.rows(), w.cols()])),
            Entry::Copy(file) => specs.push(file.info(name)?.spec()),
        }
    }
    let mut writer = Writer::create(path, &specs, &metadata)?;
    for &(name, entry) in entries {
        match entry {
            Entry::Sparse24(s) => Layout::Native.write(&mut writer, name, s)?,
            Entry::Matrix(w) => writer.write(name, &w.elements().little_endian())?,
            Entry::Copy(file) => writer.write(name, &file.bytes(name)?)?,
        }
    }
    writer.finish()
}

/// [`save`] of compressed matrices alone.
pub fn save_sparse24(path: impl AsRef<Path>, matrices: &[(&str, &Sparse24)]) -> Result<()> {
    let entries: Vec<_> = matrices.iter().map(|&(name, s)| (name, Entry::Sparse24(s))).collect();
    save(path, &entries)
}

/// [`save`] of dense matrices alone.
pub fn save_matrices(path: impl AsRef<Path>, matrices: &[(&str, &Matrix)]) -> Result<()> {
    let entries: Vec<_> = matrices.iter().map(|&(name, w)| (name, Entry::Matrix(w))).collect();
    save(path, &entries)
}

/// Name, type and shape of a tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
}

impl Spec {
    /// A tensor of that name, type and shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// Its size in bytes. An error if that overflows, or elements smaller than a byte do not fill their last byte.
    pub fn bytes(&self) -> Result<usize> {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize(), |product, &n| product.checked_mul(n));
        bits.filter(|bits| bits.is_multiple_of(8))
            .map(|bits| bits / 8)
            .ok_or_else(|| Error::overflow("tensor", format!("shape {:?} of {}", self.shape, self.dtype)))
    }
}

/// A safetensors file that is being written: what it will hold is said first, and then the tensors are written in any
/// order, one at a time, so that a checkpoint larger than memory can be made.
///
/// The file is under a temporary name until [`Self::finish`]; a writer that is dropped leaves nothing. The same specs
/// in any order, and the same bytes, make the same file.
///
/// ```
/// use std::collections::BTreeMap;
/// use sparse24::io::{Dtype, Layout, Spec, Spec24, Writer};
/// use sparse24::{Matrix, Sparse24, TensorFile, VectorLen};
/// let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("model.safetensors");
/// let s = Sparse24::from_dense(&Matrix::from_f32(1, 4, &[0., 1., 0., 2.])?, VectorLen::ONE)?;
///
/// // Said first: a bias, and a 2:4 matrix in a layout that a program chose.
/// let layout = Layout::Native;
/// let matrix = Spec24::of("up.weight", &s);
/// let mut specs = vec![Spec::new("up.bias", Dtype::F32, &[1])];
/// specs.extend(layout.specs(&matrix)?);
/// let mut writer = Writer::create(&path, &specs, &BTreeMap::from_iter(layout.metadata(&matrix)))?;
///
/// // Then written, in any order.
/// layout.write(&mut writer, "up.weight", &s)?;
/// writer.write("up.bias", &0.5f32.to_le_bytes())?;
/// writer.finish()?;
/// assert_eq!(TensorFile::open(&path)?.sparse24("up.weight")?, s);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: TemporaryFile,
    /// Where each tensor starts in the file and its size in bytes; taken out when it is written.
    open: BTreeMap<String, (u64, usize)>,
}

impl Writer {
    /// Starts a file that will be at `path` and hold these tensors and this `__metadata__`. An error if a name is used
    /// twice, a size overflows, or there can be no file.
    pub fn create(path: impl AsRef<Path>, specs: &[Spec], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let path = path.as_ref();
        // The order of every safetensors writer: the widest type first, which keeps each tensor aligned to its
        // elements.
        let mut specs: Vec<_> = specs.iter().collect();
        specs.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));

        let json = |e: serde_json::Error| Error::file(path, e.to_string());
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert(METADATA.to_owned(), serde_json::to_value(metadata).map_err(json)?);
        }
        let mut end = 0usize;
        let mut open = BTreeMap::new();
        for spec in specs {
            let fail = |e: Error| e.in_tensor(path, &spec.name);
            let (start, bytes) = (end, spec.bytes().map_err(fail)?);
            end = start
                .checked_add(bytes)
                .ok_or_else(|| fail(Error::overflow("file size", format!("{start} + {bytes}"))))?;
            let entry = Header { dtype: spec.dtype, shape: spec.shape.clone(), data_offsets: (start, end) };
            let entry = serde_json::to_value(entry).map_err(json)?;
            if spec.name == METADATA || header.insert(spec.name.clone(), entry).is_some() {
                return Err(fail(Error::invalid("the name is taken")));
            }
            open.insert(spec.name.clone(), (start as u64, bytes));
        }
        let mut header = serde_json::to_vec(&header).map_err(json)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let len = header.len() as u64;
        if len > MAX_HEADER {
            return Err(Error::file(path, format!("a header of {len} bytes, at most {MAX_HEADER} are allowed")));
        }
        open.values_mut().for_each(|(start, _)| *start += 8 + len);

        let io = |e| Error::io(path, e);
        let mut file = TemporaryFile::beside(path).map_err(io)?;
        file.as_file_mut().write_all(&len.to_le_bytes()).map_err(io)?;
        file.as_file_mut().write_all(&header).map_err(io)?;
        Ok(Self { path: path.to_path_buf(), file, open })
    }

    /// Writes a tensor, in little-endian bytes as a file has them. An error if it is none of those that were said, was
    /// written before, or has another size.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let refuse = |reason: String| Error::invalid(reason).in_tensor(&self.path, name);
        let &(start, expected) =
            self.open.get(name).ok_or_else(|| refuse("was not announced, or is written already".into()))?;
        if bytes.len() != expected {
            return Err(refuse(format!("{} bytes are to be written, {expected} were announced", bytes.len())));
        }
        let io = |e| Error::io(&self.path, e).in_tensor(&self.path, name);
        let file = self.file.as_file_mut();
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        file.write_all(bytes).map_err(io)?;
        self.open.remove(name);
        Ok(())
    }

    /// Puts the file in place of any at its path. An error, after which that is as it was, if a tensor is missing.
    pub fn finish(self) -> Result<()> {
        if let Some(name) = self.open.keys().next() {
            let others = self.open.len() - 1;
            return Err(Error::invalid(format!("was never written, and {others} others")).in_tensor(&self.path, name));
        }
        self.file.persist(&self.path).map_err(|e| Error::io(&self.path, e))
    }
}

/// Writes a file under a temporary name in the directory of `path` and renames it to `path` when `write` is done. After
/// an error nothing is left of it, and what was at `path` is still there. It is not synced to the disk: a power failure
/// may lose it.
///
/// ```
/// let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("rows.json");
/// sparse24::io::write_atomically(&path, |out| writeln!(out, "[]"))?;
/// assert_eq!(std::fs::read(&path).unwrap(), b"[]\n");
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn write_atomically(path: impl AsRef<Path>, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    let io = |e| Error::io(path, e);
    let mut file = TemporaryFile::beside(path).map_err(io)?;
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    write(&mut out).map_err(io)?;
    out.flush().map_err(io)?;
    drop(out);
    file.persist(path).map_err(io)
}

/// Why there can be nothing at `path`: the error itself would name the temporary file beside it.
fn cannot_write(path: &Path, e: &io::Error) -> Error {
    let reason = match (e.kind(), path.parent()) {
        (io::ErrorKind::NotFound, Some(folder)) => {
            format!("cannot be written: there is no folder {}", folder.display())
        }
        (kind, _) => format!("cannot be written: {kind}"),
    };
    Error::file(path, reason)
}

/// Where a file will be written, checked before the work for it starts: a new name or a regular file, through symbolic
/// links, in a folder that takes new files.
pub fn writable(path: impl AsRef<Path>) -> Result<PathBuf> {
    let path = path.as_ref();
    let target = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if target.exists() && !target.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    TemporaryFile::beside(&target).map_err(|e| cannot_write(path, &e))?;
    Ok(target)
}
