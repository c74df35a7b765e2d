//! A model's folder around its weights: a new folder with other weights and everything else of the old one.
//!
//! What is copied is decided by what a file is to the model. Weights at the top are those of the model that is written
//! anew, in whichever format, and so are those in folders that hold the whole model once more for another program
//! (`onnx`, `openvino`). Carried along, they would be weights of another model than the folder says. Folders of modules
//! that follow the model, such as `2_Dense` of Sentence Transformers, have weights of their own, which nothing here
//! changes: they are copied, as are all safetensors in folders within. What is left out is reported.
//!
//! Invariant: a new folder appears complete or not at all.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value, json};

use super::source::{Item, Source, Stored};
use super::temporary::TemporaryFolder;
use super::write_atomically;
use crate::error::{Error, Result};

/// The file that says what a model is.
const CONFIG: &str = "config.json";
/// The file of Sentence Transformers that lists the modules of a model.
const MODULES: &str = "modules.json";
/// Where in a config compressed-tensors and its predecessors look.
const SECTIONS: [&str; 2] = ["quantization_config", "compression_config"];
/// What in there, or at the top in the oldest files, is about sparsity.
const SPARSITY: &str = "sparsity_config";
/// Endings of files that hold weights, in whichever format.
const WEIGHTS: [&str; 14] = [
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".gguf",
    ".ot",
];

/// Reads a folder's `config.json`. None if it has none; an error if that is no JSON object.
pub fn read_config(folder: &Path) -> Result<Option<Value>> {
    let path = folder.join(CONFIG);
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    match serde_json::from_slice(&text) {
        Ok(config @ Value::Object(_)) => Ok(Some(config)),
        Ok(_) => Err(Error::file(&path, "is not a JSON object")),
        Err(e) => Err(Error::file(&path, e.to_string())),
    }
}

/// Every `sparsity_config` of a config: those of its sections on quantisation and compression, and its own.
pub fn sparsity_configs(config: &Value) -> impl Iterator<Item = &Map<String, Value>> {
    let sections = SECTIONS.iter().filter_map(|section| config.get(*section));
    sections.chain([config]).filter_map(|section| section.get(SPARSITY)?.as_object())
}

/// Something of an old folder that a new one does not have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeftOut {
    /// Why.
    pub reason: &'static str,
    /// Its path within the old folder.
    pub path: PathBuf,
}

/// A folder that is being written, under a temporary name until [`Self::finish`]. Dropped before, it leaves nothing.
///
/// ```
/// use sparse24::io::{self, NewFolder, Source};
/// use sparse24::{DType, Matrix};
/// let dir = tempfile::tempdir().unwrap();
/// let (old, new) = (dir.path().join("old"), dir.path().join("new"));
/// std::fs::create_dir(&old).unwrap();
/// io::save_matrices(old.join("model.safetensors"), &[("w", &Matrix::zeros(4, 4, DType::F32)?)])?;
/// std::fs::write(old.join("tokenizer.json"), "{}").unwrap();
/// std::fs::write(old.join("model.onnx"), "the same weights").unwrap();
///
/// let folder = NewFolder::create(&new)?;
/// io::save_matrices(folder.weights(), &[("w", &Matrix::zeros(4, 4, DType::F16)?)])?;
/// let left_out = folder.finish(&old, &Source::open(&old)?, std::iter::empty())?;
/// assert!(new.join("tokenizer.json").exists() && new.join("model.safetensors").exists());
/// assert_eq!(left_out[0].path.to_str(), Some("model.onnx"));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct NewFolder {
    folder: TemporaryFolder,
    path: PathBuf,
}

impl NewFolder {
    /// Starts a folder that will be at `path`, where there must be nothing, or an empty folder.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let taken = fs::symlink_metadata(path).is_ok();
        let empty = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        if taken && !empty {
            return Err(Error::file(path, "exists already; name a new folder, or an empty one"));
        }
        // An empty folder is replaced: under its own name, not under `.` or that of a link to it.
        let path = if taken { path.canonicalize().map_err(|e| Error::io(path, e))? } else { path.to_path_buf() };
        let path = path.as_path();
        let folder = TemporaryFolder::beside(path).map_err(|e| super::cannot_write(path, &e))?;
        Ok(Self { folder, path: path.to_path_buf() })
    }

    /// Where its weights are to be written.
    pub fn weights(&self) -> PathBuf {
        self.folder.path().join("model.safetensors")
    }

    /// An error about writing to it, with the name that it will have in place of the temporary one.
    pub(super) fn under_its_name(&self, error: Error) -> Error {
        error.moved(self.folder.path(), &self.path)
    }

    /// Puts it in its place, with everything of the folder `from` but hidden files and what is reported, and with a
    /// config that says how these items are stored. `source` is what was opened of `from`: its files are what the new
    /// weights take the place of.
    pub fn finish<'a>(
        self,
        from: &Path,
        source: &Source,
        items: impl Iterator<Item = (&'a Item, Stored)>,
    ) -> Result<Vec<LeftOut>> {
        self.finish_with(from, source, items, &[])
    }

    /// [`Self::finish`] with other values in the config, each at the end of a way of fields.
    pub(super) fn finish_with<'a>(
        self,
        from: &Path,
        source: &Source,
        items: impl Iterator<Item = (&'a Item, Stored)>,
        config: &[(Vec<String>, Value)],
    ) -> Result<Vec<LeftOut>> {
        let left_out = self.add_rest(from, source, items, config).map_err(|e| self.under_its_name(e))?;
        self.folder.persist(&self.path).map_err(|e| match e.kind() {
            ErrorKind::DirectoryNotEmpty => Error::file(&self.path, "exists already: it was made by another meanwhile"),
            _ => Error::io(&self.path, e),
        })?;
        Ok(left_out)
    }

    /// Adds what is beside the weights.
    fn add_rest<'a>(
        &self,
        from: &Path,
        source: &Source,
        items: impl Iterator<Item = (&'a Item, Stored)>,
        config: &[(Vec<String>, Value)],
    ) -> Result<Vec<LeftOut>> {
        let mut replaced: Vec<_> = source.files().iter().map(|file| file.path()).collect();
        replaced.push(source.path());
        let mut copy = Copy { from, replaced, modules: modules(from)?, within: Vec::new(), left_out: Vec::new() };
        copy.folder(Path::new(""), self.folder.path())?;
        let mut left_out = copy.left_out;
        left_out.sort();
        if let Some(old) = read_config(from)? {
            let mut new = old.clone();
            describe(&mut new, items);
            config.iter().for_each(|(way, value)| set(&mut new, way, value));
            if new != old {
                let path = self.folder.path().join(CONFIG);
                let mut text = serde_json::to_string_pretty(&new).map_err(|e| Error::file(&path, e.to_string()))?;
                text.push('\n');
                write_atomically(path, |out| out.write_all(text.as_bytes()))?;
            }
        }
        Ok(left_out)
    }
}

/// The folders of a model's modules but for the model itself, as `modules.json` lists them, if there is one.
fn modules(folder: &Path) -> Result<Vec<PathBuf>> {
    let path = folder.join(MODULES);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let modules: Value = serde_json::from_slice(&text).map_err(|e| Error::file(&path, e.to_string()))?;
    let paths = modules.as_array().into_iter().flatten().filter_map(|module| module.get("path")?.as_str());
    Ok(paths.filter(|path| !path.is_empty()).map(|path| Path::new(path).components().collect()).collect())
}

/// A folder that is being copied.
struct Copy<'a> {
    from: &'a Path,
    /// Files that hold the weights that were read.
    replaced: Vec<&'a Path>,
    /// Folders of modules.
    modules: Vec<PathBuf>,
    /// The real paths of the folder that is being read and those around it.
    within: Vec<PathBuf>,
    left_out: Vec<LeftOut>,
}

impl Copy<'_> {
    /// Copies what is in the folder `at` within the old one. Links are followed, as the hub's cache is made of them.
    fn folder(&mut self, at: &Path, to: &Path) -> Result<()> {
        let from = self.from.join(at);
        let real = from.canonicalize().map_err(|e| Error::io(&from, e))?;
        if self.within.contains(&real) {
            self.leave_out(at, "links to a folder around it");
            return Ok(());
        }
        self.within.push(real);
        if !at.as_os_str().is_empty() {
            fs::create_dir(to).map_err(|e| Error::io(to, e))?;
        }
        for entry in fs::read_dir(&from).map_err(|e| Error::io(&from, e))? {
            let name = entry.map_err(|e| Error::io(&from, e))?.file_name();
            let (at, to) = (at.join(&name), to.join(&name));
            let from = self.from.join(&at);
            if name.to_string_lossy().starts_with('.') || self.replaced.contains(&&*from) {
                continue;
            }
            match fs::metadata(&from) {
                Ok(found) if found.is_dir() => {
                    self.folder(&at, &to)?;
                    // Nothing in it was copied, or it was empty. Fails where it is not empty, which is as it should be.
                    let _ = fs::remove_dir(&to);
                }
                Ok(_) if self.holds_the_model(&at) => self.leave_out(&at, "weights of the old model"),
                Ok(found) if found.is_file() => {
                    fs::copy(&from, &to).map_err(|e| Error::io(&from, e))?;
                }
                Ok(_) => self.leave_out(&at, "neither files nor folders"),
                Err(_) => self.leave_out(&at, "links to nothing"),
            }
        }
        self.within.pop();
        Ok(())
    }

    fn leave_out(&mut self, at: &Path, reason: &'static str) {
        self.left_out.push(LeftOut { reason, path: at.to_path_buf() });
    }

    /// Whether a file holds weights of the model whose weights are written anew.
    fn holds_the_model(&self, at: &Path) -> bool {
        let name = at.to_string_lossy();
        if !WEIGHTS.iter().any(|ending| name.ends_with(ending)) {
            return false;
        }
        let Some(Component::Normal(first)) = at.components().next().filter(|_| at.components().nth(1).is_some()) else {
            return true;
        };
        let safetensors = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        // As Sentence Transformers calls the folders of modules.
        let numbered = first.to_string_lossy().split_once('_').is_some_and(|(n, _)| n.parse::<u32>().is_ok());
        !(safetensors || numbered || self.modules.iter().any(|module| at.starts_with(module)))
    }
}

/// Gives a config another value at the end of a way of fields. What is on the way and no object becomes one.
fn set(config: &mut Value, way: &[String], value: &Value) {
    let mut at = config;
    for field in way {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[field.as_str()];
    }
    *at = value.clone();
}

/// Says in a config how items are stored, as far as compressed-tensors has words for it.
fn describe<'a>(config: &mut Value, items: impl Iterator<Item = (&'a Item, Stored)>) {
    let (mut bitmask, mut unstructured, mut others) = (false, false, Vec::new());
    for (item, stored) in items {
        match stored {
            Stored::Bitmask => bitmask = true,
            Stored::SparseBitmask => unstructured = true,
            _ if item.matrix().is_some() => others.extend(item.name.strip_suffix(".weight")),
            _ => {}
        }
    }
    let Some(config) = config.as_object_mut() else { return };
    if bitmask {
        claim(config, &others);
    } else if !unstructured {
        withdraw(config);
    }
}

/// Claims `sparse-24-bitmask` for all linear layers but those ignored.
fn claim(config: &mut Map<String, Value>, ignore: &[&str]) {
    let ours = |section: &Value| section.get("quant_method").is_none_or(|method| method == "compressed-tensors");
    let there = SECTIONS.into_iter().find(|section| config.get(*section).is_some_and(|s| s.is_object() && ours(s)));
    let found = there.or_else(|| SECTIONS.into_iter().find(|section| !config.contains_key(*section)));
    // Both belong to other tools: what they say stays, and readers of this crate find the weights by their tensors.
    let Some(found) = found else { return };
    // One claim, and not an older one beside it.
    withdraw_from(config, SECTIONS.into_iter().filter(|section| *section != found));
    let section = config.entry(found).or_insert_with(|| json!({}));
    section["quant_method"] = json!("compressed-tensors");
    if !section[SPARSITY].is_object() {
        section[SPARSITY] = json!({"targets": ["Linear"]});
    }
    section[SPARSITY]["format"] = json!("sparse-24-bitmask");
    section[SPARSITY]["sparsity_structure"] = json!("2:4");
    section[SPARSITY]["ignore"] = json!(ignore);
}

/// Takes back what was claimed of sparsity.
fn withdraw(config: &mut Map<String, Value>) {
    withdraw_from(config, SECTIONS.into_iter());
}

/// Takes back what was claimed of sparsity at the top and in these sections, and with it a section that says nothing
/// else.
fn withdraw_from(config: &mut Map<String, Value>, sections: impl Iterator<Item = &'static str>) {
    config.remove(SPARSITY);
    for name in sections {
        let Some(section) = config.get_mut(name).and_then(Value::as_object_mut) else { continue };
        if section.remove(SPARSITY).is_none() {
            continue;
        }
        let says = |key: &str| match section.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        let ours = section.get("quant_method").is_none_or(|method| method == "compressed-tensors");
        if ours && !["config_groups", "kv_cache_scheme", "transform_config"].into_iter().any(says) {
            config.remove(name);
        }
    }
}
