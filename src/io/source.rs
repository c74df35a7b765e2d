//! Where a model's matrices come from: a file, a folder, or shards with their index; and what those files mean.
//!
//! Several tensors may be one matrix: values and their metadata, weights and their mask. A [`Source`] knows all forms
//! of storage that people have, and gives each matrix under the name that it has in a dense file.
//!
//! Invariant: the tensors of an [`Item`] are there and agree in shape and type; whether it is 2:4 shows when it is
//! read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::layout::{self, Layout, Spec24};
use super::{Dtype, FORMAT, Spec, Store, TensorFile, TensorInfo};
use crate::error::{Error, Result, checked_mul};
use crate::format::{Bytes, Sparse24};
use crate::mask::{Mask, VectorLen};
use crate::matrix::{DType, Elements, Matrix};
use crate::memory;

/// The weights of a folder.
const WEIGHTS: &str = "model.safetensors";
/// The index of the weights of a folder, if they are in several files.
const INDEX: &str = "model.safetensors.index.json";

/// How an [`Item`] lies in its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stored {
    /// One tensor, whatever its type and shape.
    Dense,
    /// [`Layout::Native`].
    Native,
    /// [`Layout::Bitmask`].
    Bitmask,
    /// `sparse-bitmask` of compressed-tensors: that with any number of non-zeros, and `S.row_offsets`. Tensors of any
    /// number of dimensions can be stored so, and in files of versions up to 0.8.1 all of them are.
    SparseBitmask,
    /// [`Layout::Cutlass`].
    Cutlass,
    /// `N_orig` and `N_mask` of torch.nn.utils.prune. The weights are not pruned yet.
    TorchMask,
    /// `S.weight` and `S.__weight_mma_mask` of NVIDIA's ASP (apex.contrib.sparsity).
    AspMask,
}

impl Stored {
    /// All forms.
    pub const ALL: [Self; 7] =
        [Self::Dense, Self::Native, Self::Bitmask, Self::SparseBitmask, Self::Cutlass, Self::TorchMask, Self::AspMask];

    /// `dense`, `sparse24`, `sparse-24-bitmask`, `sparse-bitmask`, `cutlass`, `torch-mask` or `asp-mask`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Native => FORMAT,
            Self::Bitmask => "sparse-24-bitmask",
            Self::SparseBitmask => "sparse-bitmask",
            Self::Cutlass => "cutlass",
            Self::TorchMask => "torch-mask",
            Self::AspMask => "asp-mask",
        }
    }

    /// Whether who stores a matrix so says that it is 2:4.
    pub const fn claims(self) -> bool {
        !matches!(self, Self::Dense | Self::SparseBitmask)
    }
}

/// A tensor of a model, stored as one or several tensors of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its name in a dense file.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape when it is dense.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub stored: Stored,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// The names of its tensors: values, or weights, first.
    pub parts: Vec<String>,
    /// How many rows share a code, where the file says it.
    pub vector: Option<VectorLen>,
}

impl Item {
    /// Rows and columns, if it has two dimensions.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        match self.shape[..] {
            [m, k] => Some((m, k)),
            _ => None,
        }
    }

    /// What is needed to write it in another [`Layout`], if it has two dimensions and a type that 2:4 matrices can
    /// have.
    pub fn spec24(&self) -> Option<Spec24> {
        let ((m, k), dtype) = (self.matrix()?, self.dtype);
        Layout::takes(dtype).then(|| Spec24 { name: self.name.clone(), m, k, dtype, vector: self.vector })
    }
}

/// A model's tensors, of which only the headers are in memory.
///
/// Parts of compressed-tensors' forms are named after the module, `up.compressed` for `up.weight`, and in files of
/// versions up to 0.8.1 after the tensor, `up.weight.compressed`. All of a source's are named in one of the two ways:
/// the second, if it has one that ends in `.weight` or `.bias` before that.
///
/// ```
/// use sparse24::io::{self, Entry, Source, Stored};
/// use sparse24::{Matrix, Sparse24, VectorLen};
/// let dir = tempfile::tempdir().unwrap();
/// let w = Matrix::from_f32(1, 4, &[0., 1., 0., 2.])?;
/// let s = Sparse24::from_dense(&w, VectorLen::ONE)?;
/// let entries = [("up.weight", Entry::Sparse24(&s)), ("down.weight", Entry::Matrix(&w))];
/// io::save(dir.path().join("model.safetensors"), &entries)?;
///
/// let source = Source::open(dir.path())?;
/// let stored: Vec<_> = source.items().map(|item| (&*item.name, item.stored)).collect();
/// assert_eq!(stored, [("down.weight", Stored::Dense), ("up.weight", Stored::Native)]);
/// for item in source.items() {
///     assert_eq!((source.matrix(item)?, Sparse24::try_from(source.sparse24_bytes(item)?)?), (w.clone(), s.clone()));
/// }
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// Which file has the tensor of a name.
    holders: BTreeMap<String, usize>,
    items: BTreeMap<String, Item>,
}

impl Source {
    /// Opens a safetensors file, an index of several (`*.index.json`), or a folder with `model.safetensors` or
    /// `model.safetensors.index.json`. Errors name the file and, where one is to blame, the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_in(&Store::disk(), path)
    }

    /// [`Source::open`] of what a store has.
    pub fn open_in(store: &Store, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = match store.is_dir(path) {
            true => Some(store.weights_in(path))
                .filter(|weights| store.exists(weights))
                .ok_or_else(|| Error::file(path, format!("the folder has neither {WEIGHTS} nor {INDEX}")))?,
            false => path.to_path_buf(),
        };
        let is_index = path.to_str().is_some_and(|name| name.ends_with(".index.json"));
        let files = if is_index { shards(store, &path)? } else { vec![TensorFile::open_in(store, &path)?] };
        let mut holders = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for info in file.tensors() {
                if let Some(first) = holders.insert(info.name.clone(), i) {
                    let first: &TensorFile = &files[first];
                    let reason = format!("is in {} too", first.path().display());
                    return Err(Error::invalid(reason).in_tensor(file.path(), &info.name));
                }
            }
        }
        let mut source = Self { path, files, holders, items: BTreeMap::new() };
        source.items = source.find_items()?;
        Ok(source)
    }

    /// The file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// All items, in the order of their names.
    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.items.values()
    }

    /// The item of that name, if there is one.
    pub fn item(&self, name: &str) -> Option<&Item> {
        self.items.get(name)
    }

    /// The file that has a tensor, such as a part of an item. An error if there is none.
    pub fn file_of(&self, tensor: &str) -> Result<&TensorFile> {
        let holder = self.holders.get(tensor).map(|&i| &self.files[i]);
        holder.ok_or_else(|| Error::invalid("there is no such tensor").in_tensor(&self.path, tensor))
    }

    /// The `__metadata__` of all files but for what says how items are stored; where files differ, the first one's.
    ///
    /// Left out, too, are entries of other programs that this crate would take for its own once the file is of its
    /// format: those that are [`Self::misleading`].
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut stored: BTreeSet<_> =
            self.items().flat_map(|item| self.metadata_of(item)).map(|(key, _)| key).collect();
        stored.extend(self.misleading());
        let mut all = BTreeMap::new();
        for file in self.files.iter().rev() {
            let native = file.metadata().get("format").is_some_and(|f| f == FORMAT);
            let others = file.metadata().iter().filter(|(key, _)| match key.as_str() {
                "format" | "version" => !native,
                key => !stored.contains(key),
            });
            all.extend(others.map(|(key, value)| (key.clone(), value.clone())));
        }
        all
    }

    /// The keys of `__metadata__` that look like those of this crate's format and are another program's, beside tensors
    /// that look like its parts: `P.vector` and `P.shape`, where there is `P.values` or `P.meta` and P is no matrix of
    /// it.
    pub fn misleading(&self) -> BTreeSet<String> {
        let keys = self.files.iter().flat_map(|file| file.metadata().keys());
        let misleading = |key: &&String| {
            let Some(name) = key.strip_suffix(".vector").or_else(|| key.strip_suffix(".shape")) else { return false };
            let parts = ["values", "meta"].map(|part| format!("{name}.{part}"));
            self.items.get(name).is_none_or(|item| item.stored != Stored::Native)
                && parts.iter().any(|part| self.holders.contains_key(part))
        };
        keys.filter(misleading).cloned().collect()
    }

    /// The entries of `__metadata__` that say how an item is stored: to be written with its parts, if those are copied.
    pub fn metadata_of(&self, item: &Item) -> Vec<(String, String)> {
        let Some(metadata) = item.parts.first().and_then(|part| self.of_file(part)).filter(|_| item.stored.claims())
        else {
            return Vec::new();
        };
        let of_item = |key: &str| format!("{}.{key}", item.name);
        let keys = match item.stored {
            Stored::Native => vec!["format".to_owned(), "version".to_owned(), of_item("shape"), of_item("vector")],
            _ => vec![of_item("layout")],
        };
        keys.into_iter().filter_map(|key| metadata.get(&key).map(|value| (key, value.clone()))).collect()
    }

    /// The file that has an item, or its first part.
    pub fn path_of(&self, item: &Item) -> &Path {
        item.parts.first().map_or(&self.path, |part| self.path_of_tensor(part))
    }

    /// An error with the item's name and the file that it is in, if it names no file yet.
    pub(crate) fn at(&self, item: &Item, e: Error) -> Error {
        if e.names_file() { e } else { e.in_tensor(self.path_of(item), &item.name) }
    }

    /// The bytes of a part of an item.
    fn part(&self, item: &Item, part: usize) -> Result<Vec<u8>> {
        let name = &item.parts[part];
        self.file_of(name)?.bytes(name)
    }

    /// What the header says about a part of an item.
    fn part_info(&self, item: &Item, part: usize) -> Result<&TensorInfo> {
        let name = &item.parts[part];
        self.file_of(name)?.info(name)
    }

    /// The little-endian bytes of an item when it is dense, a mask applied. It need not be 2:4.
    pub fn dense(&self, item: &Item) -> Result<Vec<u8>> {
        // A bitmask may be a small part of what it stands for.
        if item.stored != Stored::Dense {
            let bytes = Spec::new(&*item.name, item.dtype, &item.shape).bytes().map_err(|e| self.at(item, e))?;
            memory::claim(bytes, || "its elements".to_owned()).map_err(|e| self.at(item, e))?;
        }
        match item.stored {
            Stored::Dense => self.part(item, 0),
            Stored::Bitmask if !Layout::takes(item.dtype) => {
                // Of a type that nothing else here has: its values need not be known to be placed.
                let (m, k) = self.two_dimensions(item)?;
                let bitmask = self.part(item, 1)?;
                layout::expect_two_of_four(m, k, &bitmask).map_err(|e| self.at(item, e))?;
                self.placed(item, (m, k), &bitmask, None)
            }
            Stored::Native | Stored::Bitmask | Stored::Cutlass => {
                Ok(self.sparse24_bytes(item)?.to_elements().into_vec())
            }
            Stored::SparseBitmask => {
                let [rows @ .., k] = &item.shape[..] else {
                    return Err(self.at(item, Error::invalid("a bitmask of no dimensions")));
                };
                let m = rows.iter().try_fold(1, |m, &n| checked_mul("rows", m, n)).map_err(|e| self.at(item, e))?;
                // Those of more than two dimensions are sums along the first one, and no reader needs them.
                let offsets = if rows.len() > 1 { None } else { Some(self.part(item, 3)?) };
                self.placed(item, (m, *k), &self.part(item, 1)?, offsets.as_deref())
            }
            Stored::TorchMask | Stored::AspMask => {
                let mut dense = self.part(item, 0)?;
                let kept = self.ones(item)?;
                for (element, kept) in dense.chunks_exact_mut(item.dtype.bitsize() / 8).zip(kept) {
                    if !kept {
                        element.fill(0);
                    }
                }
                Ok(dense)
            }
        }
    }

    /// The dense bytes of values that a mask of bits places.
    fn placed(&self, item: &Item, (m, k): (usize, usize), bitmask: &[u8], offsets: Option<&[u8]>) -> Result<Vec<u8>> {
        let width = item.dtype.bitsize() / 8;
        let values = self.part(item, 0)?;
        layout::from_sparse_bitmask(m, k, width, &values, offsets, bitmask).map_err(|e| self.at(item, e))
    }

    /// The little-endian bytes of the transpose of an item of two dimensions when it is dense, and its rows and columns
    /// then: for those of [`in_by_out`](super::in_by_out).
    pub fn transposed(&self, item: &Item) -> Result<(usize, usize, Vec<u8>)> {
        let (m, k) = self.two_dimensions(item)?;
        // `dense` asks for the one copy, and this for the other.
        memory::claim_matrix("its transpose", m, k, item.dtype.bitsize() / 8).map_err(|e| self.at(item, e))?;
        Ok((k, m, super::transpose(m, k, item.dtype.bitsize() / 8, &self.dense(item)?)))
    }

    /// An item compressed: with the codes that it has, if it is stored compressed; otherwise with those of its
    /// non-zeros at V = 1. If the file says V, that is the vector length. An error names the first row and group that
    /// are not 2:4.
    pub fn sparse24_bytes(&self, item: &Item) -> Result<Sparse24<Bytes>> {
        self.compressed(item, Some(VectorLen::ONE))
    }

    /// [`Self::sparse24_bytes`] with codes shared by as many rows as can share them, unless the file says V.
    pub fn widest24(&self, item: &Item) -> Result<Sparse24<Bytes>> {
        let s = self.compressed(item, None)?;
        match item.stored {
            Stored::Bitmask | Stored::Cutlass if item.vector.is_none() => s.widest().map_err(|e| self.at(item, e)),
            _ => Ok(s),
        }
    }

    /// An item compressed. What is not stored so gets this vector length, or the largest that there is.
    fn compressed(&self, item: &Item, vector: Option<VectorLen>) -> Result<Sparse24<Bytes>> {
        let (m, k) = self.two_dimensions(item)?;
        let made = match item.stored {
            Stored::Native => return self.file_of(&item.parts[0])?.sparse24_bytes(&item.name),
            Stored::Bitmask => layout::from_bitmask(m, k, item.dtype, self.part(item, 0)?, &self.part(item, 1)?),
            Stored::Cutlass => layout::from_cutlass(m, k, item.dtype, self.part(item, 0)?, &self.part(item, 1)?),
            Stored::Dense | Stored::SparseBitmask | Stored::TorchMask | Stored::AspMask => {
                Bytes::new(item.dtype, self.dense(item)?).and_then(|w| Sparse24::from_elements(m, k, &w, vector))
            }
        };
        let made = made.and_then(|s| match item.vector {
            Some(vector) => s.with_vector(vector),
            None => Ok(s),
        });
        made.map_err(|e| self.at(item, e))
    }

    /// An item of type f32, f16 or bf16 when it is dense: of two dimensions, or of one as a row. Any other is an error.
    pub fn matrix(&self, item: &Item) -> Result<Matrix> {
        let (rows, cols) = match item.shape[..] {
            [len] => (1, len),
            _ => self.two_dimensions(item)?,
        };
        if item.stored == Stored::Dense {
            let (name, file) = (&item.parts[0], self.file_of(&item.parts[0])?);
            return if item.shape.len() == 1 { file.vector(name) } else { file.matrix(name) };
        }
        let dtype = DType::try_from(item.dtype).map_err(|e| self.at(item, e))?;
        let made = Elements::from_bytes(dtype, &self.dense(item)?).and_then(|data| Matrix::new(rows, cols, data));
        made.map_err(|e| self.at(item, e))
    }

    /// The weights and the mask of a matrix that is stored with one, the mask not applied. Any other item is an error.
    pub fn masked(&self, item: &Item) -> Result<(Matrix, Mask)> {
        let (rows, cols) = self.two_dimensions(item)?;
        if !matches!(item.stored, Stored::TorchMask | Stored::AspMask) {
            return Err(self.at(item, Error::invalid(format!("is stored as {}, without a mask", item.stored.name()))));
        }
        let weights = self.file_of(&item.parts[0])?.matrix(&item.parts[0])?;
        let kept = self.ones(item)?;
        let mask = Mask::from_fn(rows, cols, |row, col| kept[row * cols + col]);
        Ok((weights, mask.map_err(|e| self.at(item, e))?))
    }

    fn ones(&self, item: &Item) -> Result<Vec<bool>> {
        let info = self.part_info(item, 1)?;
        let elements = info.bytes * 8 / info.dtype.bitsize().max(1);
        memory::claim(elements, || "its mask".to_owned()).map_err(|e| self.at(item, e))?;
        let ones = layout::ones(info.dtype, &self.part(item, 1)?);
        ones.map_err(|e| e.in_tensor(self.path_of_tensor(&item.parts[1]), &item.parts[1]))
    }

    fn two_dimensions(&self, item: &Item) -> Result<(usize, usize)> {
        item.matrix().ok_or_else(|| {
            self.at(item, Error::invalid(format!("has shape {:?}, a matrix has two dimensions", item.shape)))
        })
    }

    fn path_of_tensor(&self, tensor: &str) -> &Path {
        self.holders.get(tensor).map_or(&self.path, |&i| self.files[i].path())
    }

    /// What the header says about a tensor, if there is one.
    fn info(&self, tensor: &str) -> Option<&TensorInfo> {
        self.holders.get(tensor).and_then(|&i| self.files[i].info(tensor).ok())
    }

    /// The `__metadata__` of the file that has a tensor.
    fn of_file(&self, tensor: &str) -> Option<&HashMap<String, String>> {
        self.holders.get(tensor).map(|&i| self.files[i].metadata())
    }

    /// The name of the matrix whose parts of a bitmask start with `stem`, where this crate wrote it and said so.
    fn said_name(&self, stem: &str) -> Option<String> {
        let metadata = self.of_file(&format!("{stem}.compressed"))?;
        let names = [format!("{stem}.weight"), stem.to_owned()];
        names.into_iter().find(|name| {
            layout::stem(name) == stem
                && metadata.get(&format!("{name}.layout")).is_some_and(|s| s.starts_with("bitmask"))
        })
    }

    /// Joins tensors to items.
    fn find_items(&self) -> Result<BTreeMap<String, Item>> {
        let full_names = self.holders.keys().any(|name| {
            let stem = name.strip_suffix(".compressed");
            stem.is_some_and(|stem| {
                let ends = stem.ends_with(".weight") || stem.ends_with(".bias");
                ends && self.holders.contains_key(&format!("{stem}.bitmask")) && self.said_name(stem).is_none()
            })
        });
        let mut finder = Finder { source: self, full_names, taken: BTreeSet::new(), items: BTreeMap::new() };
        for file in &self.files {
            for name in file.sparse24_names()? {
                finder.native(file, &name)?;
            }
        }
        for name in self.holders.keys() {
            if let Some(stem) = name.strip_suffix(".compressed") {
                finder.bitmask(stem)?;
            } else if let Some(name) = name.strip_suffix(".values") {
                finder.cutlass(name)?;
            } else if let Some(name) = name.strip_suffix("_orig") {
                finder.masked(name, format!("{name}_orig"), format!("{name}_mask"), Stored::TorchMask)?;
            } else if let Some(name) = asp_weight(name) {
                finder.masked(&name, name.clone(), asp_mask(&name), Stored::AspMask)?;
            }
        }
        finder.rest()?;
        // What a file says that it holds, and holds a part of. Without any part it is another program's key.
        for file in &self.files {
            for (key, value) in file.metadata() {
                let Some(name) = key.strip_suffix(".layout") else { continue };
                let (stored, parts) = match value.split(',').next().unwrap_or(value).parse() {
                    Ok(Layout::Bitmask) => (Stored::Bitmask, (layout::stem(name), ["compressed", "bitmask"])),
                    Ok(Layout::Cutlass) => (Stored::Cutlass, (name, ["values", "meta"])),
                    _ => continue,
                };
                let (stem, parts) = parts;
                let begun = parts.iter().any(|part| self.holders.contains_key(&format!("{stem}.{part}")));
                if begun && finder.items.get(name).is_none_or(|item| item.stored != stored) {
                    let reason = format!("{key:?} is {value:?}, but there are no tensors of that layout");
                    return Err(Error::invalid(reason).in_tensor(file.path(), name));
                }
            }
        }
        Ok(finder.items)
    }
}

/// What of a source's tensors was found to be what.
struct Finder<'a> {
    source: &'a Source,
    /// Whether parts of bitmasks are named after tensors instead of modules.
    full_names: bool,
    /// Tensors that are parts of items.
    taken: BTreeSet<String>,
    items: BTreeMap<String, Item>,
}

impl Finder<'_> {
    fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize], stored: Stored, parts: Vec<String>) -> Result<()> {
        let bytes = parts.iter().filter_map(|part| self.source.info(part)).map(|info| info.bytes as u64).sum();
        let said = parts.first().and_then(|part| self.source.of_file(part)).and_then(|metadata| match stored {
            Stored::Native => metadata.get(&format!("{name}.vector")).map(String::as_str),
            Stored::Bitmask | Stored::Cutlass => Some(metadata.get(&format!("{name}.layout"))?.split_once(',')?.1),
            _ => None,
        });
        let vector = said.map(str::parse::<VectorLen>).transpose();
        let vector = vector.map_err(|e| e.in_tensor(self.source.path_of_tensor(&parts[0]), name))?;
        let path = parts.first().map_or(self.source.path(), |part| self.source.path_of_tensor(part));
        for part in &parts {
            if !self.taken.insert(part.clone()) {
                return Err(Error::invalid("is part of two matrices").in_tensor(path, part));
            }
        }
        let item = Item { name: name.to_owned(), dtype, shape: shape.to_vec(), stored, bytes, parts, vector };
        if self.items.insert(name.to_owned(), item).is_some() {
            return Err(Error::invalid("is stored in two forms").in_tensor(path, name));
        }
        Ok(())
    }

    fn native(&mut self, file: &TensorFile, name: &str) -> Result<()> {
        let native = file.native(name)?;
        let parts = vec![native.values.name.clone(), native.meta.name.clone()];
        self.add(name, native.values.dtype, &[native.m, native.k], Stored::Native, parts)
    }

    fn bitmask(&mut self, stem: &str) -> Result<()> {
        let source = self.source;
        let part = |part: &str| format!("{stem}.{part}");
        let [values, bitmask, shape, offsets] = ["compressed", "bitmask", "shape", "row_offsets"].map(part);
        let (Some(of_values), Some(of_bitmask)) = (source.info(&values), source.info(&bitmask)) else { return Ok(()) };
        let name = match source.said_name(stem) {
            Some(name) => name,
            None if self.full_names => stem.to_owned(),
            None => format!("{stem}.weight"),
        };

        let of_shape = source.file_of(&shape)?.info(&shape)?;
        let fail = |tensor: &str, e: Error| e.in_tensor(source.path_of_tensor(tensor), tensor);
        let dimensions = of_shape.bytes / 8;
        // 1 x n and n x 1 are in use as well as n.
        if of_shape.dtype != Dtype::I64 || dimensions == 0 || of_shape.shape.iter().filter(|&&n| n != 1).count() > 1 {
            let reason = format!("is {} of shape {:?}, expected a list of I64", of_shape.dtype, of_shape.shape);
            return Err(fail(&shape, Error::invalid(reason)));
        }
        let bytes = source.file_of(&shape)?.bytes(&shape)?;
        let sizes: Vec<_> = bytes.as_chunks::<8>().0.iter().map(|n| i64::from_le_bytes(*n)).collect();
        let dense: Option<Vec<usize>> = sizes.iter().map(|&n| usize::try_from(n).ok()).collect();
        let Some((dense, k)) = dense.and_then(|dense| dense.last().copied().map(|k| (dense, k))) else {
            return Err(fail(&shape, Error::invalid(format!("{sizes:?} is no shape of a tensor"))));
        };
        let rows = &dense[..dense.len() - 1];
        let expect = |tensor: &str, info: &TensorInfo, dtype: Option<Dtype>, expected: &[&[usize]]| {
            if let Some(dtype) = dtype.filter(|&dtype| dtype != info.dtype) {
                return Err(fail(tensor, Error::invalid(format!("is {}, expected {dtype}", info.dtype))));
            }
            if expected.contains(&&*info.shape) {
                return Ok(());
            }
            let shape: Vec<_> = dense.iter().map(ToString::to_string).collect();
            let what = format!("a part of {}", shape.join(" x "));
            Err(fail(tensor, Error::shape(what, info.shape.clone(), expected[0].to_vec())))
        };
        expect(&bitmask, of_bitmask, Some(Dtype::U8), &[&[rows, &[k.div_ceil(8)]].concat()])?;
        if let Some(of_offsets) = source.info(&offsets) {
            // A vector's is one number, which torch writes as a scalar.
            let shapes: &[&[usize]] = if rows.is_empty() { &[&[], &[1]] } else { &[rows] };
            expect(&offsets, of_offsets, Some(Dtype::I64), shapes)?;
            if !of_values.dtype.bitsize().is_multiple_of(8) {
                return Err(fail(&values, Error::invalid(format!("is {}, which has no bytes", of_values.dtype))));
            }
            let parts = vec![values.clone(), bitmask, shape, offsets];
            return self.add(&name, of_values.dtype, &dense, Stored::SparseBitmask, parts);
        }
        let [m, _] = dense[..] else {
            let reason = format!("{sizes:?} is no shape of a matrix, as a sparse-24-bitmask is");
            return Err(fail(&shape, Error::invalid(reason)));
        };
        if !k.is_multiple_of(4) {
            let reason =
                format!("sparse-24-bitmask of {m} x {k}: columns are no multiple of 4, so groups wrap over rows");
            return Err(fail(&values, Error::invalid(reason)));
        }
        expect(&values, of_values, None, &[&[m, k / 2]])?;
        self.add(&name, of_values.dtype, &dense, Stored::Bitmask, vec![values.clone(), bitmask, shape])
    }

    fn cutlass(&mut self, name: &str) -> Result<()> {
        let [values, meta] = ["values", "meta"].map(|part| format!("{name}.{part}"));
        if self.taken.contains(&values) {
            return Ok(());
        }
        let (Some(of_values), Some(of_meta)) = (self.source.info(&values), self.source.info(&meta)) else {
            return Ok(());
        };
        // Known by its shapes and types, because files of torch's have nothing else.
        let [m, columns] = of_values.shape[..] else { return Ok(()) };
        let Some(k) = columns.checked_mul(2) else { return Ok(()) };
        match layout::cutlass_meta(m, k, of_values.dtype) {
            Some((dtype, cols)) if of_meta.dtype == dtype && of_meta.shape == [m, cols] => {
                self.add(name, of_values.dtype, &[m, k], Stored::Cutlass, vec![values, meta])
            }
            _ => Ok(()),
        }
    }

    fn masked(&mut self, name: &str, weights: String, mask: String, stored: Stored) -> Result<()> {
        let (Some(of_weights), Some(of_mask)) = (self.source.info(&weights), self.source.info(&mask)) else {
            return Ok(());
        };
        // A mask of elements, not of bits.
        if !of_weights.dtype.bitsize().is_multiple_of(8) {
            return Ok(());
        }
        // Both the weights before and after pruning are no form of storage that is known.
        if stored == Stored::TorchMask && self.source.info(name).is_some() {
            return Ok(());
        }
        if of_mask.shape != of_weights.shape {
            let what = "mask".to_owned();
            let (got, expected) = (of_mask.shape.clone(), of_weights.shape.clone());
            return Err(Error::shape(what, got, expected).in_tensor(self.source.path_of_tensor(&mask), &mask));
        }
        self.add(name, of_weights.dtype, &of_weights.shape, stored, vec![weights, mask])
    }

    /// Every tensor that is no part of anything is itself.
    fn rest(&mut self) -> Result<()> {
        for name in self.source.holders.keys() {
            if let Some(info) = self.source.info(name).filter(|_| !self.taken.contains(name)) {
                self.add(name, info.dtype, &info.shape, Stored::Dense, vec![name.clone()])?;
            }
        }
        Ok(())
    }
}

/// The name of the weights that NVIDIA's ASP keeps this mask for.
fn asp_weight(mask: &str) -> Option<String> {
    let (module, buffer) = mask.rsplit_once('.').map_or(("", mask), |(module, buffer)| (module, buffer));
    let parameter = buffer.strip_prefix("__")?.strip_suffix("_mma_mask")?;
    Some(if module.is_empty() { parameter.to_owned() } else { format!("{module}.{parameter}") })
}

/// The name of the mask that NVIDIA's ASP keeps for these weights.
fn asp_mask(weight: &str) -> String {
    match weight.rsplit_once('.') {
        Some((module, parameter)) => format!("{module}.__{parameter}_mma_mask"),
        None => format!("__{weight}_mma_mask"),
    }
}

/// Where the weights of a model's folder are: `model.safetensors`, or `model.safetensors.index.json` if there is only
/// that. Whether they are there shows when they are opened.
///
/// ```
/// # use std::path::Path;
/// assert_eq!(sparse24::io::weights_in(Path::new("no/where")), Path::new("no/where/model.safetensors"));
/// ```
pub fn weights_in(folder: &Path) -> PathBuf {
    Store::disk().weights_in(folder)
}

impl Store {
    /// [`weights_in`] a folder of this store.
    pub fn weights_in(&self, folder: &Path) -> PathBuf {
        let (weights, index) = (folder.join(WEIGHTS), folder.join(INDEX));
        if !self.exists(&weights) && self.exists(&index) { index } else { weights }
    }
}

/// The files of an index, every one with the tensors that the index says it has.
fn shards(store: &Store, path: &Path) -> Result<Vec<TensorFile>> {
    let fail = |reason: String| Error::file(path, reason);
    let text = store.read(path)?;
    let index: Value = serde_json::from_slice(&text).map_err(|e| fail(format!("is no JSON: {e}")))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| fail("has no object \"weight_map\"".into()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut files: BTreeMap<&str, TensorFile> = BTreeMap::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str().filter(|name| Path::new(name).file_name() == Some(name.as_ref())) else {
            let reason = format!("its shard is {shard}, expected the name of a file beside the index");
            return Err(Error::invalid(reason).in_tensor(path, tensor));
        };
        if !files.contains_key(shard) {
            let file = folder.join(shard);
            if !store.is_file(&file) {
                let reason = format!("its shard {shard} is missing");
                return Err(Error::invalid(reason).in_tensor(path, tensor));
            }
            files.insert(shard, TensorFile::open_in(store, &file)?);
        }
        if files.get(shard).is_some_and(|file| file.info(tensor).is_err()) {
            let reason = format!("{} says that it is here, and it is not", path.display());
            return Err(Error::invalid(reason).in_tensor(&folder.join(shard), tensor));
        }
    }
    Ok(files.into_values().collect())
}
