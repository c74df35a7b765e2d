//! A model's folder on the host: everything that makes embeddings of texts.
//!
//! Invariant: the parts fit each other. The tokenizer cuts texts off where the model or its settings do, and puts the
//! prompt in front that the pipeline knows the length of.

use std::path::Path;

use super::{Files, LanguageModel, Pipeline, Similarity, Tokenizer};
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Graph};
use crate::matrix::DType;
use crate::models;

/// A model that takes texts, on the host: [`Encoder`](super::Encoder) brings it to a device.
#[derive(Debug)]
pub struct TextModel {
    /// Makes token ids of texts.
    pub tokenizer: Tokenizer,
    /// The graph and its weights.
    pub checkpoint: Checkpoint,
    /// What follows the last states.
    pub pipeline: Pipeline,
    /// What the tokenizer puts in front of every text.
    pub prompt: Option<String>,
    /// How embeddings are compared.
    pub similarity: Similarity,
}

/// How a model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// Element type of weights and activations: f32 or f16.
    pub dtype: DType,
    /// A safetensors file that is asked first for each tensor.
    pub weights: Option<&'a Path>,
    /// Name of a prompt of the model's, or the empty name for none. Its default prompt unless given.
    pub prompt: Option<&'a str>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self { dtype: DType::F32, weights: None, prompt: None }
    }
}

impl TextModel {
    /// Reads a model's files. Errors name the file, and what in it is missing or not known.
    ///
    /// ```no_run
    /// use sparse24::Device;
    /// use sparse24::graph::Batching;
    /// use sparse24::text::{Encoder, Files, LoadOptions, TextModel};
    /// let model = TextModel::load(&Files::in_folder("model/minilm"), LoadOptions::default())?;
    /// let encoder = Encoder::new(&Device::auto()?, &model.checkpoint, model.pipeline)?;
    /// let tokens = model.tokenizer.encode(&["The cat sat on the mat.", "A cat was sitting on a rug."])?;
    /// let embeddings = encoder.embed(&tokens.ids, Batching::default())?; // one a row
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn load(files: &Files, options: LoadOptions<'_>) -> Result<Self> {
        let graph = models::load_in(&files.store, &files.config)?;
        if graph.head().is_some() {
            return Err(Error::file(&files.config, "is of a language model, which makes no embeddings"));
        }
        Self::of(graph, files, options)
    }

    /// The same of a model that is to be pruned or trained, which may be a language model: its pipeline
    /// [pools nothing](Pipeline::none) then.
    pub fn load_any(files: &Files, options: LoadOptions<'_>) -> Result<Self> {
        let graph = models::load_in(&files.store, &files.config)?;
        if graph.head().is_none() {
            return Self::of(graph, files, options);
        }
        let LanguageModel { tokenizer, checkpoint, .. } = LanguageModel::load(files, options)?;
        Ok(Self { tokenizer, checkpoint, pipeline: Pipeline::none(), prompt: None, similarity: Similarity::default() })
    }

    fn of(graph: Graph, files: &Files, options: LoadOptions<'_>) -> Result<Self> {
        let limits = graph.limits();
        let settings = files.settings()?;
        let prompt = settings.prompt(options.prompt)?.map(str::to_owned);
        let tokenizer = Tokenizer::load_in(&files.store, &files.tokenizer, limits)?;
        let tokenizer = tokenizer.truncated_at(files.max_tokens(limits)?)?;
        let tokenizer = tokenizer.lower_case(files.lower_case()?).with_prompt(prompt.as_deref().unwrap_or_default());
        let checkpoint = Checkpoint::load_in(&files.store, graph, &files.weights, options.weights, options.dtype)?;
        let mut pipeline = Pipeline::load(files, checkpoint.graph().output_width())?;
        pipeline.set_prompt_tokens(tokenizer.prompt_tokens()?);
        Ok(Self { tokenizer, checkpoint, pipeline, prompt, similarity: settings.similarity() })
    }
}
