//! Where the tuner's caches and compiled kernels lie, and how a device comes to use its own.
//!
//! Invariant: a cache that is not sound changes nothing but what is said on stderr.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use etcetera::BaseStrategy;

use super::say;
use sparse24::engine::Device;
use sparse24::tune::{Cache, TuningKey};

/// Names the folder where `--cache` does not.
pub(super) const VARIABLE: &str = "SPARSE24_CACHE";

/// The folder of the caches: the one given, that of the environment, or the user's.
pub(super) fn folder(given: Option<&Path>) -> Result<PathBuf> {
    let named = given.map(Path::to_path_buf);
    let named = named.or_else(|| std::env::var_os(VARIABLE).filter(|dir| !dir.is_empty()).map(PathBuf::from));
    match named {
        Some(folder) => Ok(folder),
        None => {
            let user = etcetera::base_strategy::choose_native_strategy();
            let user = user.with_context(|| format!("no cache folder: neither --cache nor {VARIABLE} is given"))?;
            Ok(user.cache_dir().join("sparse24"))
        }
    }
}

/// The cache of a key, with a warning in place of one that is not sound.
pub(super) fn load(folder: &Path, key: &TuningKey) -> Option<Cache> {
    match Cache::load(folder, key) {
        Ok(cache) => cache,
        Err(e) => {
            say(&format!("warning: tuning cache ignored: {e}"));
            None
        }
    }
}

/// Lets a GPU take its kernels as an earlier command compiled them, and keep what it compiles.
pub(super) fn keep_pipelines(device: &Device, given: Option<&Path>) {
    // Where there is no home, or it cannot be written, kernels are compiled each time.
    if let Ok(folder) = folder(given) {
        let _ = device.keep_pipelines(folder);
    }
}

/// Lets a GPU plan by what `tune` found on it, if anything.
pub(super) fn apply(device: &Device, given: Option<&Path>) -> Result<()> {
    let (Some(key), Some(caps)) = (TuningKey::of(device), device.caps()) else { return Ok(()) };
    // Where there is no home there is no cache.
    let folder = match folder(given) {
        Err(_) if given.is_none() => return Ok(()),
        folder => folder?,
    };
    match load(&folder, &key) {
        Some(cache) => device.set_tuning(cache.tuning(caps)),
        None if Cache::has_outdated(&folder, &key) => say(
            "warning: this device was tuned for another driver or another version of sparse24: `sparse24 tune` does it \
             for these",
        ),
        None => {}
    }
    Ok(())
}
