//! Where the parts of a model lie, and what the small files of Sentence Transformers beside it say about texts.
//!
//! `modules.json` lists what a text passes through, and in which folder each part lies; `sentence_bert_config.json`
//! says how long a text may be; `config_sentence_transformers.json` says what is put in front of a text and how
//! embeddings are compared. Invariant: what such a file asks for is done, or refused with the file's name.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::graph::Limits;
use crate::io::Store;
use crate::matrix::Matrix;

/// Where the parts of a model lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Where all of them are.
    pub store: Store,
    /// `config.json`.
    pub config: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// `model.safetensors`, or the index of its shards, `model.safetensors.index.json`.
    pub weights: PathBuf,
    /// `modules.json` of Sentence Transformers, if there is one: see [`Pipeline::load`](super::Pipeline::load). The
    /// folders that it names lie beside it.
    pub modules: Option<PathBuf>,
    /// `1_Pooling/config.json`, if there is one: asked where there is no `modules.json`.
    pub pooling: Option<PathBuf>,
    /// `sentence_bert_config.json`, if there is one: see [`Files::max_tokens`].
    pub sentences: Option<PathBuf>,
    /// `config_sentence_transformers.json`, if there is one: see [`Files::settings`].
    pub settings: Option<PathBuf>,
    /// `generation_config.json`, if there is one: which tokens end a text.
    pub generation: Option<PathBuf>,
    /// `tokenizer_config.json`, if there is one: special tokens and, in older models, the chat template.
    pub tokenizer_config: Option<PathBuf>,
    /// `chat_template.jinja`, if there is one.
    pub chat_template: Option<PathBuf>,
}

/// Where [`Files::modules`] lies in a folder.
pub(super) const MODULES: &str = "modules.json";
/// Where [`Files::pooling`] lies.
pub(super) const POOLING: &str = "1_Pooling/config.json";
/// Where [`Files::sentences`] lies.
pub(super) const SENTENCES: &str = "sentence_bert_config.json";
/// Where [`Files::settings`] lies.
pub(super) const SETTINGS: &str = "config_sentence_transformers.json";

/// Where [`Files::generation`] lies.
pub(super) const GENERATION: &str = "generation_config.json";
/// Where [`Files::tokenizer_config`] lies.
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Where [`Files::chat_template`] lies.
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// An entry of `modules.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// The class, such as `Pooling`.
    pub(super) class: String,
    /// Its folder, relative to that of `modules.json`.
    pub(super) folder: PathBuf,
}

impl Files {
    /// Those of a folder, by the names that Hugging Face and Sentence Transformers give them. Whether they are there
    /// shows when they are read; of the optional ones, now. Where `modules.json` names a folder for the transformer,
    /// its files are looked for there.
    pub fn in_folder(folder: impl AsRef<Path>) -> Self {
        Self::in_store(Store::disk(), folder)
    }

    /// [`Files::in_folder`] of a folder of a store.
    pub fn in_store(store: Store, folder: impl AsRef<Path>) -> Self {
        let folder = folder.as_ref();
        let optional = |file: PathBuf| Some(file).filter(|file| store.exists(file));
        let modules = optional(folder.join(MODULES));
        // What is wrong with the list is said when the pipeline is loaded.
        let listed = modules.as_deref().and_then(|path| modules_of(&store, path).ok()).unwrap_or_default();
        let transformer = folder.join(listed.first().map_or(Path::new(""), |module| &module.folder));
        Self {
            config: transformer.join("config.json"),
            tokenizer: transformer.join("tokenizer.json"),
            weights: store.weights_in(&transformer),
            modules,
            pooling: optional(folder.join(POOLING)),
            sentences: optional(transformer.join(SENTENCES)),
            settings: optional(folder.join(SETTINGS)),
            generation: optional(transformer.join(GENERATION)),
            tokenizer_config: optional(transformer.join(TOKENIZER_CONFIG)),
            chat_template: optional(transformer.join(CHAT_TEMPLATE)),
            store,
        }
    }

    /// The most tokens of a text: the smaller of what the model has positions for and the `max_seq_length` of
    /// [`Files::sentences`]. For [`Tokenizer::truncated_at`](super::Tokenizer::truncated_at).
    pub fn max_tokens(&self, limits: Limits) -> Result<usize> {
        let Some(path) = &self.sentences else { return Ok(limits.tokens) };
        match object(&self.store, path)?.get("max_seq_length") {
            None | Some(Value::Null) => Ok(limits.tokens),
            Some(value) => match value.as_u64().filter(|&tokens| tokens > 0) {
                Some(tokens) => Ok(usize::try_from(tokens).map_or(limits.tokens, |tokens| tokens.min(limits.tokens))),
                None => Err(Error::file(path, format!("max_seq_length is {value}, expected a whole number above 0"))),
            },
        }
    }

    /// Whether texts are made lower case before they are tokenized, whatever the tokenizer does: `do_lower_case` of
    /// [`Files::sentences`]. For [`Tokenizer::lower_case`](super::Tokenizer::lower_case).
    pub fn lower_case(&self) -> Result<bool> {
        let Some(path) = &self.sentences else { return Ok(false) };
        flag(path, &object(&self.store, path)?, "do_lower_case", false)
    }

    /// Those of these files that decide about embeddings beside the encoder's own, as far as they are there: the small
    /// ones, and the modules' configs and weights.
    pub fn of_sentences(&self) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> =
            [&self.modules, &self.sentences, &self.settings].into_iter().flatten().cloned().collect();
        match &self.modules {
            None => files.extend(self.pooling.clone()),
            Some(list) => {
                let folder = list.parent().unwrap_or(Path::new(""));
                // The first is the encoder.
                for module in &modules_of(&self.store, list)?[1..] {
                    let at = folder.join(&module.folder);
                    let both = [at.join("config.json"), self.store.weights_in(&at)];
                    files.extend(both.into_iter().filter(|file| self.store.exists(file)));
                }
            }
        }
        Ok(files)
    }

    /// Prompts and the similarity that [`Files::settings`] names; none and the cosine where there is no such file.
    pub fn settings(&self) -> Result<Settings> {
        let Some(path) = &self.settings else { return Ok(Settings::default()) };
        let json = object(&self.store, path)?;
        let refuse = |reason: String| Err(Error::file(path, reason));
        if let Some(kind) = json.get("model_type").filter(|kind| !kind.is_null() && *kind != "SentenceTransformer") {
            return refuse(format!("model_type is {kind}, expected \"SentenceTransformer\""));
        }
        let mut settings = Settings::default();
        match json.get("prompts") {
            None | Some(Value::Null) => {}
            Some(Value::Object(prompts)) => {
                for (name, prompt) in prompts {
                    let Some(prompt) = prompt.as_str() else {
                        return refuse(format!("the prompt {name:?} is {prompt}, expected a text"));
                    };
                    settings.prompts.insert(name.clone(), prompt.to_owned());
                }
            }
            Some(other) => return refuse(format!("prompts is {other}, expected an object of texts")),
        }
        match json.get("default_prompt_name") {
            None | Some(Value::Null) => {}
            Some(Value::String(name)) if settings.prompts.contains_key(name) => settings.default = Some(name.clone()),
            Some(name) => return refuse(format!("default_prompt_name is {name}, which is none of its prompts")),
        }
        settings.similarity = match json.get("similarity_fn_name") {
            None | Some(Value::Null) => Similarity::Cosine,
            Some(name) => match Similarity::ALL.into_iter().find(|similarity| name == similarity.name()) {
                Some(similarity) => similarity,
                None => {
                    let known = Similarity::ALL.map(Similarity::name).join(", ");
                    return refuse(format!("similarity_fn_name is {name}, expected one of {known}"));
                }
            },
        };
        Ok(settings)
    }
}

/// What `config_sentence_transformers.json` says about the use of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    prompts: BTreeMap<String, String>,
    default: Option<String>,
    similarity: Similarity,
}

impl Settings {
    /// The text to put in front of every text: the prompt of this name, none for an empty name, and the model's default
    /// prompt where no name is given. An error names the prompts that there are.
    pub fn prompt(&self, name: Option<&str>) -> Result<Option<&str>> {
        let Some(name) = name.or(self.default.as_deref()).filter(|name| !name.is_empty()) else { return Ok(None) };
        match self.prompts.get(name) {
            Some(prompt) => Ok(Some(prompt.as_str()).filter(|prompt| !prompt.is_empty())),
            None if self.prompts.is_empty() => Err(Error::invalid(format!("the model has no prompts, so no {name:?}"))),
            None => {
                let known: Vec<_> = self.prompts.keys().map(|known| format!("{known:?}")).collect();
                Err(Error::invalid(format!("the model has no prompt {name:?}; it has {}", known.join(", "))))
            }
        }
    }

    /// How two embeddings are compared.
    pub fn similarity(&self) -> Similarity {
        self.similarity
    }
}

/// How similar two embeddings are: a larger number for more.
///
/// ```
/// use sparse24::text::Similarity;
/// let (a, b) = ([3.0, 4.0], [6.0, 8.0]);
/// assert_eq!(Similarity::Cosine.of(&a, &b), 1.0);
/// assert_eq!(Similarity::Dot.of(&a, &b), 50.0);
/// assert_eq!(Similarity::Euclidean.of(&a, &b), -5.0);
/// assert_eq!(Similarity::Manhattan.of(&a, &b), -7.0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Similarity {
    /// The cosine of the angle between them; 0 where one of them is all zeros.
    #[default]
    Cosine,
    /// Their dot product.
    Dot,
    /// Their Euclidean distance, negated.
    Euclidean,
    /// The sum of the distances of their elements, negated.
    Manhattan,
}

impl Similarity {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cosine, Self::Dot, Self::Euclidean, Self::Manhattan];

    /// The name that Sentence Transformers gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Dot => "dot",
            Self::Euclidean => "euclidean",
            Self::Manhattan => "manhattan",
        }
    }

    /// The similarity of two embeddings of the same length.
    pub fn of(self, a: &[f32], b: &[f32]) -> f64 {
        let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
            a.iter().zip(b).map(|(&a, &b)| of(f64::from(a), f64::from(b))).sum()
        };
        match self {
            Self::Cosine => {
                let lengths = (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt();
                // A vector of zeros has no direction. A NaN is not hidden.
                if lengths == 0.0 { 0.0 } else { sum(&|a, b| a * b) / lengths }
            }
            Self::Dot => sum(&|a, b| a * b),
            Self::Euclidean => -sum(&|a, b| (a - b) * (a - b)).sqrt(),
            Self::Manhattan => -sum(&|a, b| (a - b).abs()),
        }
    }

    /// The similarity of each two embeddings that follow each other.
    pub fn of_pairs(self, embeddings: &Matrix) -> Vec<f64> {
        let numbers = embeddings.elements().to_f32();
        let pairs = numbers.chunks_exact((2 * embeddings.cols()).max(1));
        let of_pair = |pair: &[f32]| {
            let (a, b) = pair.split_at(embeddings.cols());
            self.of(a, b)
        };
        pairs.map(of_pair).collect()
    }
}

impl fmt::Display for Similarity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The entries of `modules.json`, the transformer first. An error if the file is no such list, the first entry is no
/// transformer, a class is not one of Sentence Transformers' own, or a folder lies elsewhere.
pub(super) fn modules_of(store: &Store, path: &Path) -> Result<Vec<Module>> {
    let refuse = |reason: String| Err(Error::file(path, reason));
    let Value::Array(entries) = json(store, path)? else { return refuse("is not a JSON array".into()) };
    let mut modules = Vec::new();
    for (place, entry) in entries.iter().enumerate() {
        let (Some(class), Some(folder)) = (entry["type"].as_str(), entry["path"].as_str()) else {
            return refuse(format!("entry {place} has no type or no path"));
        };
        // Code of the model's own would have to be run to know what it does.
        let own = class.strip_prefix("sentence_transformers.").and_then(|rest| rest.rsplit('.').next());
        let Some(own) = own else {
            return refuse(format!("asks for {class:?}, which is not a module of Sentence Transformers"));
        };
        if (place == 0) != (own == "Transformer") {
            return refuse(format!("entry {place} is a {own}; the first one, and only that, is a Transformer"));
        }
        let folder = PathBuf::from(folder);
        if !folder.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
            return refuse(format!("{} is not a folder beside it", folder.display()));
        }
        modules.push(Module { class: own.to_owned(), folder });
    }
    if modules.is_empty() {
        return refuse("lists no modules".into());
    }
    Ok(modules)
}

fn json(store: &Store, path: &Path) -> Result<Value> {
    let text = store.read_to_string(path)?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, e.to_string()))
}

/// A file that holds a JSON object.
pub(super) fn object(store: &Store, path: &Path) -> Result<Map<String, Value>> {
    match json(store, path)? {
        Value::Object(object) => Ok(object),
        _ => Err(Error::file(path, "is not a JSON object")),
    }
}

/// A field that is true or false, with what it is where it is missing.
pub(super) fn flag(path: &Path, json: &Map<String, Value>, name: &str, default: bool) -> Result<bool> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(value) => Err(Error::file(path, format!("{name} is {value}, expected true or false"))),
    }
}
