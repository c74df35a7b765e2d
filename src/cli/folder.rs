//! A model's folder around its weights: what `config.json` says of their sparsity, and a new folder with other weights.
//!
//! Invariant: a new folder appears complete or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use regex::Regex;
use serde_json::{Map, Value, json};

use sparse24::io::{Item, Stored, write_atomically};

/// The file that says what a model is.
const CONFIG: &str = "config.json";
/// Where in it compressed-tensors and its predecessors look.
const SECTIONS: [&str; 2] = ["quantization_config", "compression_config"];
/// What in there is about sparsity.
const SPARSITY: &str = "sparsity_config";
/// Endings of files that hold weights, in whichever format: those of the old model are not those of the new one.
const WEIGHTS: [&str; 13] = [
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
    ".gguf",
    ".ot",
];

/// What a `config.json` says about a model's sparsity.
pub(super) struct Claim {
    targets: Vec<Target>,
    ignore: Vec<Target>,
}

/// Modules, by their name, by an expression for it, or by their class in torch.
enum Target {
    Name(String),
    Matching(Regex),
}

impl Target {
    fn all(list: Option<&Value>) -> Result<Vec<Self>> {
        let names = list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        let target = |name: &str| match name.strip_prefix("re:") {
            // As Python's `re.match` reads it: from the start of the name.
            Some(re) => Ok(Self::Matching(Regex::new(&format!("^(?:{re})"))?)),
            None => Ok(Self::Name(name.to_owned())),
        };
        names.map(target).collect()
    }

    fn names(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => name == module,
            Self::Matching(re) => re.is_match(module),
        }
    }
}

impl Claim {
    /// The claim of a folder's config that its weights are 2:4, if it makes it.
    pub(super) fn of(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(CONFIG);
        if !path.exists() {
            return Ok(None);
        }
        let config = read(&path)?;
        let sparsity = SECTIONS.iter().find_map(|section| config.get(*section)?.get(SPARSITY));
        let Some(sparsity) = sparsity.filter(|s| s.get("sparsity_structure").is_some_and(|s| s == "2:4")) else {
            return Ok(None);
        };
        let of = |key: &str| Target::all(sparsity.get(key)).with_context(|| format!("{}: {key}", path.display()));
        Ok(Some(Self { targets: of("targets")?, ignore: of("ignore")? }))
    }

    /// Whether a tensor is among those that are claimed to be 2:4. A file does not say of which class a module is: the
    /// weights of every module count as those of a linear layer, if they have two dimensions and are no embedding by
    /// their name.
    pub(super) fn covers(&self, item: &Item) -> bool {
        let (Some(module), Some(_)) = (item.name.strip_suffix(".weight"), item.matrix()) else { return false };
        let last = module.rsplit('.').next().unwrap_or(module);
        let linear = !last.contains("embed") && !matches!(last, "wte" | "wpe" | "shared");
        let is_linear = |target: &Target| linear && matches!(target, Target::Name(name) if name == "Linear");
        let among = |targets: &[Target]| targets.iter().any(|target| is_linear(target) || target.names(module));
        among(&self.targets) && !among(&self.ignore)
    }
}

/// A folder to be.
pub(super) struct NewFolder {
    folder: tempfile::TempDir,
    path: PathBuf,
}

impl NewFolder {
    /// Starts a folder that will be at `path`, where there must be nothing, or an empty folder.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let taken = fs::symlink_metadata(path).is_ok();
        let empty = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        anyhow::ensure!(!taken || empty, "{} exists already", path.display());
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        // A folder like any other, as far as the umask allows.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let folder = builder.prefix(".sparse24-").tempdir_in(parent);
        // The error itself would name the temporary folder.
        let folder = folder.map_err(|e| anyhow::anyhow!("cannot write {}: {}", path.display(), e.kind()))?;
        Ok(Self { folder, path: path.to_path_buf() })
    }

    /// Where its weights are to be written.
    pub(super) fn weights(&self) -> PathBuf {
        self.folder.path().join("model.safetensors")
    }

    /// An error of writing to it, with the name that it will have instead of the temporary one.
    pub(super) fn shown(&self, e: &anyhow::Error) -> anyhow::Error {
        let (temporary, path) = (self.folder.path().display().to_string(), self.path.display().to_string());
        anyhow::Error::msg(format!("{e:#}").replace(&temporary, &path))
    }

    /// Puts it in its place, with everything of the folder `from` but weights and hidden files, and with a config that
    /// says how these items are stored.
    pub(super) fn finish<'a>(self, from: &Path, items: impl Iterator<Item = (&'a Item, Stored)>) -> Result<()> {
        copy(from, self.folder.path())?;
        let path = from.join(CONFIG);
        if path.exists() {
            let old = read(&path)?;
            let mut new = old.clone();
            describe(&mut new, items);
            if new != old {
                let mut text = serde_json::to_string_pretty(&new)?;
                text.push('\n');
                write_atomically(self.folder.path().join(CONFIG), |out| out.write_all(text.as_bytes()))?;
            }
        }
        // Not every system replaces an empty folder.
        if self.path.is_dir() {
            fs::remove_dir(&self.path).with_context(|| format!("cannot replace {}", self.path.display()))?;
        }
        fs::rename(self.folder.path(), &self.path).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Copies what is no weights, folders within included. Links to files are followed, as the hub's cache is made of them;
/// links to folders are not, as they may lead back.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let cannot = |path: &Path| format!("cannot copy {}", path.display());
    for entry in fs::read_dir(from).with_context(|| cannot(from))? {
        let entry = entry.with_context(|| cannot(from))?;
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        if name.starts_with('.') || WEIGHTS.iter().any(|ending| name.ends_with(ending)) {
            continue;
        }
        let to = to.join(entry.file_name());
        if entry.file_type().with_context(|| cannot(&path))?.is_dir() {
            copy_folder(&path, &to)?;
        } else if path.is_file() {
            fs::copy(&path, &to).with_context(|| cannot(&path))?;
        }
    }
    Ok(())
}

/// [`copy`] of a folder within, which is left out if nothing in it is copied.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("cannot copy {}", from.display()))?;
    copy(from, to)?;
    // Fails where it is not empty, which is as it should be.
    let _ = fs::remove_dir(to);
    Ok(())
}

/// A config file.
fn read(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    anyhow::ensure!(config.is_object(), "{} is not a JSON object", path.display());
    Ok(config)
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
    let found = SECTIONS.into_iter().find(|section| config.get(*section).is_none_or(|s| s.is_object() && ours(s)));
    // Both belong to other tools: what they say stays, and readers of this crate find the weights by their tensors.
    let Some(found) = found else { return };
    let section = config.entry(found).or_insert_with(|| json!({}));
    section["quant_method"] = json!("compressed-tensors");
    if !section[SPARSITY].is_object() {
        section[SPARSITY] = json!({"targets": ["Linear"]});
    }
    section[SPARSITY]["format"] = json!("sparse-24-bitmask");
    section[SPARSITY]["sparsity_structure"] = json!("2:4");
    section[SPARSITY]["ignore"] = json!(ignore);
}

/// Takes back what was claimed of sparsity, and with it a section that says nothing else.
fn withdraw(config: &mut Map<String, Value>) {
    for name in SECTIONS {
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
