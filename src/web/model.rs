//! A model on the page: a folder of files in the browser's memory, two texts through it, how similar they are and how
//! long that takes, dense and 2:4.
//!
//! Invariant: a similarity and a time are shown of embeddings that agree with the reference in 64 bits, or not at all.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use sparse24::graph::Checkpoint;
use sparse24::io::{Provenance, Source, Store};
use sparse24::measure::{Deadline, PlannedBy, Policy};
use sparse24::text::{EncoderBench, Files, LoadOptions, ModelRecord, TextModel};
use sparse24::{Device, HostWeights, Matrix, Op, VectorLen};
use wasm_bindgen::prelude::*;
use web_time::Instant;

/// How long passes are sampled at most: a software adapter takes seconds for one.
const PATIENCE: Duration = Duration::from_secs(20);

/// Vector lengths to which a dense model is pruned: the best for accuracy and the best for speed.
const VECTORS: [usize; 2] = [1, 32];

/// Files that a page was given, by their paths within it.
#[wasm_bindgen]
#[derive(Default)]
pub struct ModelFiles {
    files: Vec<(PathBuf, Vec<u8>)>,
}

#[wasm_bindgen]
impl ModelFiles {
    /// None yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one.
    pub fn add(&mut self, path: &str, bytes: Vec<u8>) {
        self.files.push((PathBuf::from(path.trim_start_matches('/')), bytes));
    }
}

impl ModelFiles {
    /// The folder of the model among them: the one nearest to the top that says what model it is.
    fn folder(&self) -> Result<PathBuf, String> {
        let says = |path: &Path| path.ends_with("config.json") || path.ends_with("modules.json");
        let folders = self.files.iter().filter(|(path, _)| says(path)).filter_map(|(path, _)| path.parent());
        let depth = |folder: &Path| folder.components().count();
        let top = folders.clone().map(depth).min();
        let nearest: BTreeSet<&Path> = folders.filter(|folder| Some(depth(folder)) == top).collect();
        match nearest.iter().collect::<Vec<_>>()[..] {
            [folder] => Ok(folder.to_path_buf()),
            [] => {
                Err("there is no config.json: choose the folder of a model as Hugging Face or Sentence Transformers \
                       keep it, with config.json, tokenizer.json and model.safetensors"
                    .into())
            }
            [one, other, ..] => {
                Err(format!("{} and {} are two models: choose one at a time", one.display(), other.display()))
            }
        }
    }

    /// The file of weights that is all there is, if that is so.
    fn weights_alone(&self) -> Option<&Path> {
        match &self.files[..] {
            [(path, _)] if path.extension().is_some_and(|ending| ending == "safetensors") => Some(path),
            _ => None,
        }
    }
}

/// A model that the page has read.
pub(crate) struct Loaded {
    name: String,
    model: TextModel,
    files: Files,
    /// In what forms its linear layers are stored.
    stored: String,
    /// What its weights were made from.
    provenance: Provenance,
    is_pruned: bool,
}

/// What a model is, for people.
#[derive(Serialize)]
pub(crate) struct About<'a> {
    name: &'a str,
    stored: &'a str,
    provenance: String,
    is_pruned: bool,
    prompt: Option<&'a str>,
}

/// Two texts through a model.
#[derive(Serialize)]
pub(crate) struct Comparison {
    /// One for each form of the model.
    rows: Vec<Row>,
    /// How many tokens each text has.
    tokens: Vec<usize>,
    /// How many of them lost their ends.
    truncated: usize,
}

/// One form of a model on two texts.
#[derive(Serialize)]
struct Row {
    /// The model's name.
    model: String,
    /// The form of its linear layers.
    form: String,
    /// How similar the texts are; none where the embeddings are not verified.
    similarity: Option<f64>,
    /// What the similarity is called.
    measure: &'static str,
    /// Of one of both texts in one pass.
    ms_per_text: Option<f64>,
    noisy: bool,
    vs_dense: Option<f64>,
    vs_dense_noisy: bool,
    clock: Option<&'static str>,
    max_error: Option<f64>,
    allowed_error: f64,
    verified: bool,
    failure: Option<String>,
}

impl Loaded {
    /// Reads a model's folder, or weights alone, which take the place of those of the model `last`.
    pub(crate) fn new(given: ModelFiles, last: Option<&Self>) -> Result<Self, String> {
        if let Some(weights) = given.weights_alone().map(Path::to_path_buf) {
            let Some(Self { files, .. }) = last else {
                return Err(format!("{} has weights alone: choose the folder of their model first", weights.display()));
            };
            let store = files.store.with(given.files);
            let files = Files { store, ..files.clone() };
            return Self::of(name_of(&weights), files, Some(&weights));
        }
        let folder = given.folder()?;
        let store = Store::in_memory(given.files);
        let files = Files::in_store(store, &folder);
        for (path, what) in [(&files.tokenizer, "a tokenizer"), (&files.weights, "weights in safetensors")] {
            if !files.store.exists(path) {
                return Err(format!("there is no {}: the model has not {what} that can be read", path.display()));
            }
        }
        Self::of(name_of(&folder), files, None)
    }

    fn of(name: String, files: Files, weights: Option<&Path>) -> Result<Self, String> {
        let said = |e: sparse24::Error| e.to_string();
        let mut model = TextModel::load(&files, LoadOptions { weights, ..LoadOptions::default() }).map_err(said)?;
        // Files that know no 2:4 have its zeros.
        model.checkpoint.find_sparsity().map_err(said)?;
        let source = Source::open_in(&files.store, weights.unwrap_or(&files.weights)).map_err(said)?;
        let provenance = Provenance::of(&source.metadata());
        let stored = forms(&model.checkpoint);
        let is_pruned = model.checkpoint.linears().any(|(_, w)| w.op() != Op::Dense);
        Ok(Self { name, model, files, stored, provenance, is_pruned })
    }

    pub(crate) fn about(&self) -> About<'_> {
        let Self { name, stored, provenance, is_pruned, model, .. } = self;
        let prompt = model.prompt.as_deref();
        About { name, stored, provenance: provenance.to_string(), is_pruned: *is_pruned, prompt }
    }

    /// Two texts through each form: dense and pruned by magnitude, or of a pruned model dense and as it is. `progress`
    /// is called with the share that is done.
    pub(crate) async fn compare(
        &self,
        device: &Device,
        texts: [&str; 2],
        policy: &Policy,
        progress: impl Fn(f64),
    ) -> Result<Comparison, String> {
        let said = |e: sparse24::Error| match e.text() {
            Some(text) => format!("text {}: {}", text + 1, e.into_cause()),
            None => e.to_string(),
        };
        let TextModel { tokenizer, checkpoint, pipeline, .. } = &self.model;
        let tokens = tokenizer.encode(&texts).map_err(said)?;
        let (lengths, truncated) = (tokens.ids.iter().map(Vec::len).collect(), tokens.truncated);
        let bench = EncoderBench::of_texts(device, checkpoint.clone(), pipeline.clone(), tokens.ids);
        let mut bench = bench.map_err(said)?;
        let pruned = VectorLen::ALL.into_iter().filter(|v| VECTORS.contains(&v.get()));
        let dense = if self.is_pruned { "dense, with the same zeros" } else { "dense" };
        let mut forms = vec![(Some(Op::Dense), dense.to_owned())];
        match self.is_pruned {
            true => forms.push((None, self.stored.clone())),
            false => forms.extend(pruned.map(|v| (Some(Op::Sparse24(v)), format!("2:4, V = {v}, by magnitude")))),
        }
        let steps = (forms.len() + policy.samples) as f64;
        let mut embeddings = Vec::new();
        for (op, _) in &forms {
            let added = match op {
                Some(op) => bench.add_async(*op, PlannedBy::Planner).await,
                None => bench.add_given_async(PlannedBy::Planner).await,
            };
            embeddings.push(added.map_err(said)?.1);
            progress(embeddings.len() as f64 / steps);
        }
        let prepared = forms.len();
        let told = |round: usize| progress((prepared + round.min(policy.samples)) as f64 / steps);
        let deadline = Some(Deadline { at: Instant::now() + PATIENCE, step: 0.0 });
        let policy = Policy { deadline, ..*policy };
        let records = bench.run_async(&policy, told).await.map_err(said)?;
        let rows = records.into_iter().zip(forms).zip(embeddings);
        let row = |((record, (_, form)), embeddings): ((ModelRecord, _), Matrix)| {
            // A sample or two say nothing of their spread.
            let few = record.times.samples < policy.samples;
            let row = self.row(record, form, &embeddings);
            Row { noisy: few || row.noisy, vs_dense_noisy: few || row.vs_dense_noisy, ..row }
        };
        let rows = rows.map(row).collect();
        Ok(Comparison { rows, tokens: lengths, truncated })
    }

    fn row(&self, record: ModelRecord, form: String, embeddings: &Matrix) -> Row {
        let similarity = self.model.similarity;
        Row {
            model: self.name.clone(),
            form,
            similarity: similarity.of_pairs(embeddings).first().copied().filter(|_| record.verified),
            measure: similarity.name(),
            ms_per_text: record.times.median_ms.map(|ms| ms / embeddings.rows() as f64),
            noisy: record.times.noisy,
            vs_dense: record.speedup.vs_dense,
            vs_dense_noisy: record.speedup.noisy,
            clock: record.clock,
            max_error: record.max_error,
            allowed_error: record.allowed_error,
            verified: record.verified,
            failure: record.failure,
        }
    }
}

/// The last part of a path, for people.
fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| "these files".into(), |name| name.to_string_lossy().into_owned())
}

/// In what forms the linear layers of a model are, each with the number of its layers where there are several.
fn forms(checkpoint: &Checkpoint) -> String {
    let name = |w: &HostWeights| match w.op() {
        Op::Dense => "dense".to_owned(),
        Op::Sparse24(v) => format!("2:4, V = {v}"),
        Op::Masked | Op::Masked24 => "masked".to_owned(),
    };
    let all: Vec<_> = checkpoint.linears().map(|(_, w)| name(w)).collect();
    let kinds: BTreeSet<_> = all.iter().collect();
    let count = |kind: &String| all.iter().filter(|of| *of == kind).count();
    match kinds.iter().collect::<Vec<_>>()[..] {
        [kind] => kind.to_string(),
        _ => kinds.iter().map(|kind| format!("{} layers {kind}", count(kind))).collect::<Vec<_>>().join("; "),
    }
}
