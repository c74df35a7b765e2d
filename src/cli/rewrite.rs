//! What `convert`, `prune` and `retrain` have in common: where a model is written anew, and what is said of it then.

use std::path::Path;

use anyhow::{Context, Result};

use super::args::Usage;
use super::say;
use sparse24::error::printable;
use sparse24::io::{self, NewModel, Source, Written};

/// Starts the new model, once it is sure that nothing that is read is overwritten. See [`io::check_output`].
pub(super) fn create(input: &Path, source: &Source, output: &Path, in_place: bool) -> Result<NewModel> {
    // Before `create` asks the same, as what is wrong here is the command.
    io::check_output(input, source, output, in_place).map_err(|e| Usage::error(e.to_string()))?;
    Ok(NewModel::create(input, source, output, in_place)?)
}

/// Bytes of a model's weights' files.
pub(super) fn bytes_of(source: &Source) -> Result<u64> {
    let bytes = |path: &Path| Ok(std::fs::metadata(path).with_context(|| path.display().to_string())?.len());
    source.files().iter().map(|file| bytes(file.path())).sum()
}

/// Names on stderr what of the old model the new one does not have.
pub(super) fn say_lost(written: &Written) {
    if !written.lost_metadata.is_empty() {
        let lost: Vec<_> = written.lost_metadata.iter().map(|key| printable(key)).collect();
        say(&format!(
            "warning: not kept of the old metadata, as the new file needs these keys or would be misread: {}",
            lost.join(", ")
        ));
    }
    for of_reason in written.left_out.chunk_by(|a, b| a.reason == b.reason) {
        let paths: Vec<_> = of_reason.iter().map(|left| printable(&left.path.to_string_lossy()).into_owned()).collect();
        say(&format!("note: not copied ({}): {}", of_reason[0].reason, paths.join(", ")));
    }
}
