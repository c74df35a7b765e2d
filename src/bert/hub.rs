//! Models by their name on the Hugging Face hub: the only part of this crate that asks a network.
//!
//! Invariant: what was downloaded before is not asked for again (the hub's own cache, `HF_HOME`).

use crate::bert::Files;
use crate::error::{Error, Result};

impl Files {
    /// The files of a model on the hub, such as `sentence-transformers/all-MiniLM-L6-v2`, downloaded unless the hub's
    /// cache has them. The environment variables `HF_HOME` and `HF_ENDPOINT` say where that cache and the hub are. An
    /// error names the file that could not be brought.
    pub fn from_hub(name: &str) -> Result<Self> {
        let fail = |file: &str, e: hf_hub::api::sync::ApiError| Error::Invalid(format!("{name}, {file}: {e}"));
        let api = hf_hub::api::sync::ApiBuilder::from_env().with_progress(false).build();
        let repository = api.map_err(|e| fail("the hub", e))?.model(name.to_owned());
        let get = |file: &str| repository.get(file).map_err(|e| fail(file, e));
        Ok(Self { config: get("config.json")?, tokenizer: get("tokenizer.json")?, weights: get("model.safetensors")? })
    }
}
