//! Models by their name on the Hugging Face hub: the only part of this crate that asks a network.
//!
//! Invariant: what was downloaded before is not asked for again (the hub's own cache, `HF_HOME`). The cache does not
//! remember what a model lacks, so that an optional file that is not in it is asked for each time.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiError;

use super::files::{
    CHAT_TEMPLATE, Files, GENERATION, MODULES, POOLING, SENTENCES, SETTINGS, TOKENIZER_CONFIG, modules_of,
};
use crate::error::{Error, Result};
use crate::io::Store;

impl Files {
    /// The files of a model on the hub, such as `sentence-transformers/all-MiniLM-L6-v2`, downloaded unless the hub's
    /// cache has them. The environment variables `HF_HOME` and `HF_ENDPOINT` say where that cache and the hub are.
    ///
    /// An error names the file that could not be brought, or says that `name` is not of the form `owner/name`, before
    /// anything is asked for. An optional file counts as absent if the hub says so, or does not answer and the cache
    /// has the weights.
    pub fn from_hub(name: &str) -> Result<Self> {
        let part = |part: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
        };
        if !name.split_once('/').is_some_and(|(owner, model)| part(owner) && part(model)) {
            return Err(Error::invalid(format!("{name:?} is not of the form owner/name")));
        }
        let fail = |file: &str, e: ApiError| Error::invalid(format!("{name}, {file}: {e}"));
        let api = hf_hub::api::sync::ApiBuilder::from_env().with_progress(false).build();
        let repository = api.map_err(|e| fail("the hub", e))?.model(name.to_owned());
        let get = |file: &str| repository.get(file).map_err(|e| fail(file, e));
        const WEIGHTS: &str = "model.safetensors";
        // Names on the hub have slashes on every system.
        let below = |folder: &Path, file: &str| {
            let parts = folder.components().filter_map(|part| match part {
                std::path::Component::Normal(part) => part.to_str(),
                _ => None,
            });
            parts.chain([file]).collect::<Vec<_>>().join("/")
        };
        // The folders of the modules, the transformer's first: where there is no list, it is the model's own.
        let folders = |modules: Option<&Path>| -> Result<Vec<PathBuf>> {
            let listed = modules.map(|list| modules_of(&Store::disk(), list)).transpose()?;
            Ok(listed.map_or(vec![PathBuf::new()], |all| all.into_iter().map(|module| module.folder).collect()))
        };
        let cache = hf_hub::Cache::from_env().model(name.to_owned());
        let known = folders(cache.get(MODULES).as_deref())?;
        let cached = cache.get(&below(&known[0], WEIGHTS)).is_some();
        let optional = |file: &str| match repository.get(file) {
            Ok(path) => Ok(Some(path)),
            Err(_) if cached => Ok(None),
            // The type of the error within is another crate's: it is known by its text.
            Err(ApiError::RequestError(e)) if e.to_string().ends_with("404") => Ok(None),
            Err(e) => Err(fail(file, e)),
        };
        let modules = optional(MODULES)?;
        let folders = folders(modules.as_deref())?;
        let transformer = &folders[0];
        // Which of both a module needs is for the pipeline to say, when it reads them.
        for folder in &folders[1..] {
            optional(&below(folder, "config.json"))?;
            optional(&below(folder, WEIGHTS))?;
        }
        Ok(Self {
            store: Store::disk(),
            config: get(&below(transformer, "config.json"))?,
            tokenizer: get(&below(transformer, "tokenizer.json"))?,
            modules,
            pooling: optional(POOLING)?,
            sentences: optional(&below(transformer, SENTENCES))?,
            settings: optional(SETTINGS)?,
            generation: optional(&below(transformer, GENERATION))?,
            tokenizer_config: optional(&below(transformer, TOKENIZER_CONFIG))?,
            chat_template: optional(&below(transformer, CHAT_TEMPLATE))?,
            // The last: where the cache has them, it has all.
            weights: get(&below(transformer, WEIGHTS))?,
        })
    }
}
