//! A model written anew with some of its tensors replaced: the last step of pruning, retraining and converting.
//!
//! A file starts with a header that says what is in it, so the action for each item is decided first, and its content
//! is computed when it is written, one item at a time: memory stays near the largest one.
//!
//! Invariant: the new file or folder appears complete or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::folder::{LeftOut, NewFolder, read_config};
use super::source::{Item, Source, Stored};
use super::{Dtype, Layout, Spec, Spec24, Writer, writable};
use crate::error::{Error, Result, printable};
use crate::format::{Bytes, Sparse24};
use crate::matrix::{DType, Elements, Matrix};

/// What is done with an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Its tensors are copied.
    Copy,
    /// It is written as a 2:4 matrix.
    Compress(Spec24),
    /// It is written as one dense tensor, of its own shape and type.
    Dense,
    /// It is written as one dense tensor of its own type and this shape.
    Reshape(Vec<usize>),
}

impl Action {
    /// How the item is stored once this is done, with 2:4 matrices in `layout`.
    pub const fn stored(&self, item: &Item, layout: Layout) -> Stored {
        match self {
            Self::Copy => item.stored,
            Self::Compress(_) => layout.stored(),
            Self::Dense | Self::Reshape(_) => Stored::Dense,
        }
    }
}

/// All items of a [`Source`] in their order, with the action for each.
pub type Actions<'a> = Vec<(&'a Item, Action)>;

/// What is written for an item that is not copied.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// For [`Action::Compress`].
    Sparse24(Sparse24<Bytes>),
    /// For [`Action::Dense`] and [`Action::Reshape`]: little-endian bytes.
    Dense(Vec<u8>),
}

impl Content {
    /// A compressed matrix as it is stored in elements of this type. An error if a finite weight becomes infinite.
    pub fn sparse24(w: &Sparse24, dtype: Dtype) -> Result<Self> {
        let values = Bytes::new(dtype, stored(w.values(), dtype)?)?;
        Ok(Self::Sparse24(Sparse24::from_parts(w.m(), w.k(), w.vector(), values, w.meta().to_vec())?))
    }

    /// A dense matrix as it is stored in elements of this type. An error if a finite weight becomes infinite.
    pub fn dense(w: &Matrix, dtype: Dtype) -> Result<Self> {
        stored(w.elements(), dtype).map(Self::Dense)
    }
}

/// Elements as bytes of this type. An error if a finite one becomes infinite.
fn stored(elements: &Elements, dtype: Dtype) -> Result<Vec<u8>> {
    let from = elements.to_f32();
    let to = Elements::from_f32(DType::try_from(dtype)?, &from);
    match (0..from.len()).find(|&at| from[at].is_finite() && !to.get(at).is_finite()) {
        Some(at) => Err(Error::invalid(format!("{} is too large for {dtype}", from[at]))),
        None => Ok(to.to_le_bytes()),
    }
}

/// Where a model is written anew: a new folder if the old model is one, else a file. Dropped before [`Self::write`], it
/// leaves nothing.
///
/// ```
/// use sparse24::io::{self, Action, Content, Layout, NewModel, Source, Spec24};
/// use sparse24::{Matrix, Sparse24, TensorFile, VectorLen};
/// let w = Matrix::from_f32(2, 4, &[0., 1., 0., 2., 3., 0., 0., 4.])?;
/// let dir = tempfile::tempdir().unwrap();
/// let (old, new) = (dir.path().join("old.safetensors"), dir.path().join("new.safetensors"));
/// io::save_matrices(&old, &[("head", &w), ("up", &w)])?;
///
/// let source = Source::open(&old)?;
/// let s = Sparse24::from_dense(&w, VectorLen::ONE)?;
/// let action = |name: &str| if name == "up" { Action::Compress(Spec24::of(name, &s)) } else { Action::Copy };
/// let actions: Vec<_> = source.items().map(|item| (item, action(&item.name))).collect();
/// let model = NewModel::create(&old, &source, &new, false)?;
/// model.write(&source, Layout::Native, &actions, &[], |item, _| Content::sparse24(&s, item.dtype))?;
/// assert_eq!(TensorFile::open(&new)?.sparse24("up")?, s);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct NewModel {
    from: PathBuf,
    folder: Option<NewFolder>,
    /// The file of its weights.
    weights: PathBuf,
    /// What its config says otherwise than the old one.
    config: Vec<(Vec<String>, Value)>,
}

/// What there is to say of a model that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of its weights.
    pub bytes: u64,
    /// Keys of the old `__metadata__` whose entries the new file does not have: it needs these keys itself, or would be
    /// misread.
    pub lost_metadata: Vec<String>,
    /// What of the old folder the new one does not have.
    pub left_out: Vec<LeftOut>,
}

impl NewModel {
    /// Starts a model that will be at `to`, made from that at `from`, which was opened as `source`. Where `from` is a
    /// folder, there must be nothing at `to`, or an empty folder. Errors are also those of [`check_output`].
    pub fn create(from: impl AsRef<Path>, source: &Source, to: impl AsRef<Path>, in_place: bool) -> Result<Self> {
        check_output(from.as_ref(), source, to.as_ref(), in_place)?;
        let from = from.as_ref().to_path_buf();
        let folder = from.is_dir().then(|| NewFolder::create(&to)).transpose()?;
        let weights = match &folder {
            Some(folder) => folder.weights(),
            None => writable(to)?,
        };
        Ok(Self { from, folder, weights, config: Vec::new() })
    }

    /// Gives the new folder's config another value at the end of this way of fields, of which the last one and objects
    /// on the way need not be there yet. A file has no config: nothing is done then.
    pub fn set_config(&mut self, way: &[String], value: impl Into<Value>) {
        self.config.push((way.to_vec(), value.into()));
    }

    /// Writes every item of `source`: those to be compressed in `layout`. `actions` are for all items in their order.
    /// `metadata` is added to the file's own. `content` is called in the order of the items, and not for those that are
    /// copied; its errors come back with the item's name and file.
    pub fn write(
        self,
        source: &Source,
        layout: Layout,
        actions: &[(&Item, Action)],
        metadata: &[(String, String)],
        content: impl FnMut(&Item, &Action) -> Result<Content>,
    ) -> Result<Written> {
        if !actions.iter().map(|(item, _)| &item.name).eq(source.items().map(|item| &item.name)) {
            return Err(Error::file(source.path(), "what is to be done is not said of all items in their order"));
        }
        let write = || {
            let lost = write_file(&self.weights, source, layout, actions, metadata, content)?;
            Ok((lost, fs::metadata(&self.weights).map_err(|e| Error::io(&self.weights, e))?.len()))
        };
        let (lost_metadata, bytes) = write().map_err(|e| match &self.folder {
            Some(folder) => folder.under_its_name(e),
            None => e,
        })?;
        let left_out = match self.folder {
            Some(folder) => {
                let stored = actions.iter().map(|(item, action)| (*item, action.stored(item, layout)));
                folder.finish_with(&self.from, source, stored, &self.config)?
            }
            None => Vec::new(),
        };
        Ok(Written { bytes, lost_metadata, left_out })
    }
}

/// Writes the file of a new model. Returns the keys of the old metadata that it lost.
fn write_file(
    path: &Path,
    source: &Source,
    layout: Layout,
    actions: &[(&Item, Action)],
    more: &[(String, String)],
    mut content: impl FnMut(&Item, &Action) -> Result<Content>,
) -> Result<Vec<String>> {
    let old = source.metadata();
    let mut metadata = old.clone();
    let mut specs = Vec::new();
    let mut native = BTreeMap::new();
    for (item, action) in actions {
        let entries = match action {
            Action::Copy => {
                for part in &item.parts {
                    specs.push(source.file_of(part)?.info(part)?.spec());
                }
                source.metadata_of(item)
            }
            Action::Dense => {
                specs.push(Spec::new(&*item.name, item.dtype, &item.shape));
                Vec::new()
            }
            Action::Reshape(shape) => {
                specs.push(Spec::new(&*item.name, item.dtype, shape));
                Vec::new()
            }
            Action::Compress(spec) => {
                specs.extend(layout.specs(spec)?);
                layout.metadata(spec)
            }
        };
        let ours = match action {
            Action::Copy => item.stored == Stored::Native,
            _ => layout == Layout::Native,
        };
        // A file with one matrix of our format is of that format.
        if ours { native.extend(entries) } else { metadata.extend(entries) }
    }
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    metadata.extend(native);
    // `pt` says that torch can read the file, which is so without it.
    let replaced =
        old.iter().filter(|(key, value)| metadata[*key] != **value && (&***key, &***value) != ("format", "pt"));
    let mut lost: Vec<_> = replaced.map(|(key, _)| key.clone()).collect();
    lost.extend(source.misleading());
    metadata.extend(more.iter().cloned());
    let mut writer = Writer::create(path, &specs, &metadata)?;
    for (item, action) in actions {
        if let Action::Copy = action {
            for part in &item.parts {
                writer.write(part, &source.file_of(part)?.bytes(part)?)?;
            }
            continue;
        }
        match content(item, action).map_err(|e| source.at(item, e))? {
            Content::Sparse24(w) => layout.write(&mut writer, &item.name, &w)?,
            Content::Dense(bytes) => writer.write(&item.name, &bytes)?,
        }
    }
    writer.finish()?;
    Ok(lost)
}

/// An error if a model must not be written to `to` while that at `from`, opened as `source`, is read: if `to`
/// - lies within the folder `from`,
/// - is a shard of any model,
/// - is one of several files of `source`,
/// - is the only file of `source`, unless `in_place`.
pub fn check_output(from: &Path, source: &Source, to: &Path, in_place: bool) -> Result<()> {
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (real, within) = (from.canonicalize().ok(), folder.canonicalize().ok());
    if real.filter(|from| from.is_dir()).zip(within).is_some_and(|(from, within)| within.starts_with(from)) {
        let from = from.to_string_lossy();
        let reason = format!("lies within {}, which is read: choose another place", printable(&from));
        return Err(Error::file(to, reason));
    }
    let Ok(real) = to.canonicalize() else { return Ok(()) };
    if is_shard(&real) {
        return Err(Error::file(to, "is a shard of a model: choose another name"));
    }
    let is_output = |path: &Path| path.canonicalize().is_ok_and(|path| path == real);
    let several = !source.files().iter().any(|file| file.path() == source.path());
    let read = source.files().iter().map(|file| file.path()).chain([source.path()]).any(is_output);
    // A folder is refused where it is made.
    if read && !real.is_dir() && (several || !in_place) {
        return Err(Error::file(to, "is to be read and written: choose another name"));
    }
    Ok(())
}

/// Whether the index beside a file names it.
fn is_shard(path: &Path) -> bool {
    let index = fs::read(path.with_file_name("model.safetensors.index.json"));
    let index: Option<Value> = index.ok().and_then(|text| serde_json::from_slice(&text).ok());
    let files = index.as_ref().and_then(|index| index.get("weight_map")?.as_object());
    let name = path.file_name().and_then(|name| name.to_str());
    files.is_some_and(|files| files.values().any(|file| file.as_str() == name && name.is_some()))
}

/// What the config beside a model's weights says of it: that of a folder, or of the folder that a file is in. A file
/// needs none, and one that cannot be read there is not its own.
pub fn config_of(model: &Path) -> Result<Option<Value>> {
    match model.is_dir() {
        true => read_config(model),
        false => Ok(model.parent().and_then(|folder| read_config(folder).ok()?)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::io;
    use crate::mask::VectorLen;

    #[test]
    fn a_number_that_a_type_cannot_hold_is_an_error() {
        let w = Matrix::from_f32(1, 4, &[0.0, 1e5, 0.0, f32::INFINITY]).unwrap();
        let error = |content: Result<Content>| content.unwrap_err().to_string();
        assert_eq!(error(Content::dense(&w, Dtype::F16)), "100000 is too large for F16");
        let sparse = Sparse24::from_dense(&w, VectorLen::ONE).unwrap();
        assert_eq!(error(Content::sparse24(&sparse, Dtype::F16)), "100000 is too large for F16");
        // What was infinite stays so.
        assert!(Content::dense(&w, Dtype::BF16).is_ok() && Content::sparse24(&sparse, Dtype::F32).is_ok());
        assert!(error(Content::dense(&w, Dtype::I8)).contains("I8"));
    }

    #[test]
    fn what_must_not_be_written_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("old"), dir.path().join("new"));
        fs::create_dir(&from).unwrap();
        let w = Matrix::from_f32(1, 1, &[1e5]).unwrap();
        io::save_matrices(from.join("model.safetensors"), &[("a", &w), ("b", &w)]).unwrap();
        let source = Source::open(&from).unwrap();
        let all: Vec<_> = source.items().map(|item| (item, Action::Dense)).collect();
        let write = |actions: &[(&Item, Action)], content: fn(&Item) -> Result<Content>| {
            let model = NewModel::create(&from, &source, &to, false).unwrap();
            model.write(&source, Layout::Native, actions, &[], |item, _| content(item)).unwrap_err().to_string()
        };
        let fine = |_: &Item| Ok(Content::Dense(1f32.to_le_bytes().to_vec()));
        assert!(write(&all[1..], fine).contains("all items"), "an action is missing");
        // Errors name the tensor, and the new folder by the name that it would have had.
        let short = write(&all, |_| Ok(Content::Dense(Vec::new())));
        assert_eq!(
            short,
            format!(
                "{}: tensor a: 0 bytes are to be written, 4 were announced",
                to.join("model.safetensors").display()
            )
        );
        let failed = write(&all, |item| {
            Content::dense(&Matrix::from_f32(1, 1, &[1e5])?, Dtype::F16).map(|_| unreachable!("{}", item.name))
        });
        assert_eq!(
            failed,
            format!("{}: tensor a: 100000 is too large for F16", from.join("model.safetensors").display())
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        for within in [from.join("new"), from.join("model.safetensors")] {
            assert!(NewModel::create(&from, &source, &within, true).unwrap_err().to_string().contains("lies within"));
        }
    }
}
