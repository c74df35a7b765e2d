//! Models by their name on the Hugging Face hub: the only part of this crate that asks a network.
//!
//! Invariant: what was downloaded before is not asked for again (the hub's own cache, `HF_HOME`). The cache does not
//! remember what a model lacks, so that an optional file that is not in it is asked for each time.

use hf_hub::api::sync::ApiError;

use super::checkpoint::{Files, POOLING, SENTENCES};
use crate::error::{Error, Result};

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
            return Err(Error::Invalid(format!("{name:?} is not of the form owner/name")));
        }
        let fail = |file: &str, e: ApiError| Error::Invalid(format!("{name}, {file}: {e}"));
        let api = hf_hub::api::sync::ApiBuilder::from_env().with_progress(false).build();
        let repository = api.map_err(|e| fail("the hub", e))?.model(name.to_owned());
        let get = |file: &str| repository.get(file).map_err(|e| fail(file, e));
        const WEIGHTS: &str = "model.safetensors";
        let cached = hf_hub::Cache::from_env().model(name.to_owned()).get(WEIGHTS).is_some();
        let optional = |file: &str| match repository.get(file) {
            Ok(path) => Ok(Some(path)),
            Err(_) if cached => Ok(None),
            // The type of the error within is another crate's: it is known by its text.
            Err(ApiError::RequestError(e)) if e.to_string().ends_with("404") => Ok(None),
            Err(e) => Err(fail(file, e)),
        };
        Ok(Self {
            config: get("config.json")?,
            tokenizer: get("tokenizer.json")?,
            pooling: optional(POOLING)?,
            sentences: optional(SENTENCES)?,
            // The last: where the cache has them, it has all.
            weights: get(WEIGHTS)?,
        })
    }
}
