//! A model's file written anew, with some of its tensors replaced: what `convert`, `prune` and `retrain` have in common.
//!
//! A file starts with a header that says what is in it, so what becomes of each item is said first and made when it is
//! written, one item at a time: memory stays near the largest one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::args::ensure_usage;
use super::say;
use sparse24::error::printable;
use sparse24::format::Bytes;
use sparse24::graph::{Checkpoint, LinearTensor};
use sparse24::io::{Dtype, Item, Layout, LeftOut, Source, Spec, Spec24, Stored, Writer, read_config};
use sparse24::{DType, Elements, HostWeights, Matrix, Sparse24};

/// What becomes of an item.
pub(super) enum Fate {
    /// Its tensors are copied.
    Kept,
    /// It is written as a 2:4 matrix.
    Compressed(Spec24),
    /// It is written as one tensor, of its own shape and type.
    Plain,
}

/// All items in their order, and what becomes of each.
pub(super) type Fates<'a> = Vec<(&'a Item, Fate)>;

/// What is written in its place.
pub(super) enum Made {
    Compressed(Sparse24<Bytes>),
    /// Little-endian bytes.
    Plain(Vec<u8>),
}

/// Writes every item of `source` to `path`: those to be compressed in `layout`, made by `make` like the plain ones.
/// `more` is added to the file's metadata. Entries of the old metadata that cannot stay are named on stderr.
pub(super) fn write(
    source: &Source,
    layout: Layout,
    fates: &[(&Item, Fate)],
    more: &[(String, String)],
    path: &Path,
    mut make: impl FnMut(&Item, &Fate) -> Result<Made>,
) -> Result<()> {
    let old = source.metadata();
    let mut metadata = old.clone();
    let mut specs = Vec::new();
    let mut native = BTreeMap::new();
    for (item, fate) in fates {
        let entries = match fate {
            Fate::Kept => {
                for part in &item.parts {
                    specs.push(source.file_of(part)?.info(part)?.spec());
                }
                source.metadata_of(item)
            }
            Fate::Plain => {
                specs.push(Spec::new(&*item.name, item.dtype, &item.shape));
                Vec::new()
            }
            Fate::Compressed(spec) => {
                specs.extend(layout.specs(spec)?);
                layout.metadata(spec)
            }
        };
        let ours = match fate {
            Fate::Kept => item.stored == Stored::Native,
            _ => layout == Layout::Native,
        };
        // A file with one matrix of our format is of that format.
        if ours { native.extend(entries) } else { metadata.extend(entries) }
    }
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    metadata.extend(native);
    // That torch can read a file is no news.
    let replaced =
        old.iter().filter(|(key, value)| metadata[*key] != **value && (&***key, &***value) != ("format", "pt"));
    let mut lost: Vec<_> = replaced.map(|(key, _)| printable(key).into_owned()).collect();
    lost.extend(source.misleading().iter().map(|key| printable(key).into_owned()));
    if !lost.is_empty() {
        let lost = lost.join(", ");
        say(&format!(
            "warning: not kept of the old metadata, as the new file needs these keys or would be misread: {lost}"
        ));
    }
    metadata.extend(more.iter().cloned());
    let mut writer = Writer::create(path, &specs, &metadata)?;
    for (item, fate) in fates {
        if let Fate::Kept = fate {
            for part in &item.parts {
                writer.write(part, &source.file_of(part)?.bytes(part)?)?;
            }
            continue;
        }
        match make(item, fate)? {
            Made::Compressed(w) => layout.write(&mut writer, &item.name, &w)?,
            Made::Plain(bytes) => writer.write(&item.name, &bytes)?,
        }
    }
    Ok(writer.finish()?)
}

/// What becomes of an item whose numbers are those of a checkpoint that was trained: whatever it holds is written.
pub(super) fn fate_in(checkpoint: &Checkpoint, item: &Item) -> Result<Fate> {
    Ok(match checkpoint.linear_tensor(&item.name)? {
        Some(LinearTensor::Weights(HostWeights::Sparse24(w))) if item.stored != Stored::Dense => {
            let name = item.name.clone();
            Fate::Compressed(Spec24 { name, m: w.m(), k: w.k(), dtype: item.dtype, vector: Some(w.vector()) })
        }
        None if checkpoint.vector_tensor(&item.name)?.is_none() => Fate::Kept,
        _ => Fate::Plain,
    })
}

/// What is written for an item whose numbers are a checkpoint's, as its fate in `fates` says.
pub(super) fn made_of(checkpoint: &Checkpoint, item: &Item, fate: &Fate) -> Result<Made> {
    let plain = |w: &Matrix| Made::Plain(w.cast(stored_in(item.dtype)).elements().to_le_bytes());
    Ok(match (checkpoint.linear_tensor(&item.name)?, fate) {
        (Some(LinearTensor::Weights(HostWeights::Sparse24(w))), Fate::Compressed(_)) => {
            Made::Compressed(stored_values(&w, item.dtype).with_context(|| printable(&item.name).into_owned())?)
        }
        (Some(LinearTensor::Weights(w)), _) => plain(&w.to_dense()?),
        (Some(LinearTensor::Bias(bias)), _) => plain(&bias),
        (None, _) => match checkpoint.vector_tensor(&item.name)? {
            Some(row) => plain(&row),
            None => bail!("{} is no part of a layer", printable(&item.name)),
        },
    })
}

/// Our name for a file's type. What is pruned or trained is of one of the three.
pub(super) fn stored_in(dtype: Dtype) -> DType {
    DType::try_from(dtype).unwrap_or(DType::F32)
}

/// A compressed matrix as it is stored in elements of this type.
pub(super) fn stored_values(w: &Sparse24, dtype: Dtype) -> Result<Sparse24<Bytes>> {
    let from = w.values().to_f32();
    let values = Elements::from_f32(stored_in(dtype), &from);
    if let Some(at) = (0..from.len()).find(|&at| from[at].is_finite() && !values.get(at).is_finite()) {
        bail!("a weight became {}, which is no {dtype}, as it is to be stored", from[at]);
    }
    let values = Bytes::new(dtype, values.to_le_bytes())?;
    Ok(Sparse24::from_parts(w.m(), w.k(), w.vector(), values, w.meta().to_vec())?)
}

/// An error if the output would take the place of a file that is read: one of several, without which the others are no
/// model, or any, unless `in_place`.
pub(super) fn refuse_own_files(input: &Path, source: &Source, output: &Path, in_place: bool) -> Result<()> {
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (from, within) = (input.canonicalize().ok(), folder.canonicalize().ok());
    let inside = from.filter(|from| from.is_dir()).zip(within).is_some_and(|(from, within)| within.starts_with(from));
    ensure_usage!(!inside, "{} lies within {}, which is read: choose another place", output.display(), input.display());
    let Ok(output) = output.canonicalize() else { return Ok(()) };
    ensure_usage!(!is_shard(&output), "{} is a shard of a model: choose another name", output.display());
    let is_output = |path: &Path| path.canonicalize().is_ok_and(|path| path == output);
    let several = !source.files().iter().any(|file| file.path() == source.path());
    let read = source.files().iter().map(|file| file.path()).chain([source.path()]).any(is_output);
    // A folder is refused where it is made.
    ensure_usage!(
        !read || output.is_dir() || in_place && !several,
        "{} is to be read and written: choose another name",
        output.display()
    );
    Ok(())
}

/// Whether the index beside a file names it.
fn is_shard(path: &Path) -> bool {
    let index = std::fs::read(path.with_file_name("model.safetensors.index.json"));
    let index: Option<Value> = index.ok().and_then(|text| serde_json::from_slice(&text).ok());
    let files = index.as_ref().and_then(|index| index.get("weight_map")?.as_object());
    let name = path.file_name().and_then(|name| name.to_str());
    files.is_some_and(|files| files.values().any(|file| file.as_str() == name && name.is_some()))
}

/// How each item is stored when it has been written.
pub(super) fn stored<'a>(layout: Layout, fates: &[(&'a Item, Fate)]) -> impl Iterator<Item = (&'a Item, Stored)> {
    fates.iter().map(move |&(item, ref fate)| match fate {
        Fate::Kept => (item, item.stored),
        Fate::Plain => (item, Stored::Dense),
        Fate::Compressed(_) => (item, stored_as(layout)),
    })
}

/// What the config beside a model's weights says of it: that of a folder, or of the folder that a file is in. A file
/// needs none, and one that cannot be read there is not its own.
pub(super) fn config_of(source: &Path) -> Result<Option<Value>> {
    match source.is_dir() {
        true => Ok(read_config(source)?),
        false => Ok(source.parent().and_then(|folder| read_config(folder).ok()?)),
    }
}

/// Names on stderr what of an old folder the new one does not have.
pub(super) fn say_left_out(left_out: &[LeftOut]) {
    for of_reason in left_out.chunk_by(|a, b| a.reason == b.reason) {
        let paths: Vec<_> = of_reason.iter().map(|left| printable(&left.path.to_string_lossy()).into_owned()).collect();
        say(&format!("note: not copied ({}): {}", of_reason[0].reason, paths.join(", ")));
    }
}

/// How a layout is called when it is read.
pub(super) const fn stored_as(layout: Layout) -> Stored {
    match layout {
        Layout::Native => Stored::Native,
        Layout::Dense => Stored::Dense,
        Layout::Bitmask => Stored::Bitmask,
        Layout::Cutlass => Stored::Cutlass,
    }
}
