//! Language models of texts: from a folder of Hugging Face's to more text, and to how likely a text is.
//!
//! Invariant: the tokenizer of a model that was [loaded](LanguageModel::load) has the tokens that end a text.

use std::ops::ControlFlow;
use std::time::Duration;

use web_time::Instant;

use serde_json::Value;

use super::chat::ChatTemplate;
use super::files::{Files, object};
use super::model::LoadOptions;
use super::sampler::{Sampler, Sampling};
use super::tokens::Tokenizer;
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Model};
use crate::models;

/// A language model on the host: [`Generator`] brings it to a device.
#[derive(Debug)]
pub struct LanguageModel {
    /// Makes token ids of texts, and texts of token ids.
    pub tokenizer: Tokenizer,
    /// The graph and its weights.
    pub checkpoint: Checkpoint,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
    /// How a conversation becomes a prompt, if the model is for that.
    pub chat_template: Option<ChatTemplate>,
}

impl LanguageModel {
    /// Reads a model's files. Errors name the file, and what in it is missing or not known: a model without logits, a
    /// tokenizer that does not have the tokens that end a text.
    pub fn load(files: &Files, options: LoadOptions<'_>) -> Result<Self> {
        let graph = models::load(&files.config)?;
        if graph.head().is_none() {
            return Err(Error::file(&files.config, "is of an encoder, not of a language model"));
        }
        let tokenizer = Tokenizer::of_language_model_in(&files.store, &files.tokenizer, graph.limits())?;
        let eos = eos(files)?;
        if let Some(token) = eos.iter().find(|&&token| tokenizer.token(token).is_none()) {
            let reason = format!("the tokenizer has no token {token}, which ends a text of this model's");
            return Err(Error::file(&files.tokenizer, reason));
        }
        let chat_template = ChatTemplate::load(files)?;
        let checkpoint = Checkpoint::load_in(&files.store, graph, &files.weights, options.weights, options.dtype)?;
        Ok(Self { tokenizer, checkpoint, eos, chat_template })
    }
}

/// The ids of the tokens that end a text: `eos_token_id` of `generation_config.json`, or else of the model's config.
fn eos(files: &Files) -> Result<Vec<u32>> {
    for path in files.generation.iter().chain([&files.config]) {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match object(&files.store, path)?.get("eos_token_id") {
            None | Some(Value::Null) => {}
            Some(value) => {
                let ids = value.as_array().map_or_else(|| vec![id(value)], |ids| ids.iter().map(id).collect());
                let ids: Option<Vec<u32>> = ids.into_iter().collect();
                let wrong = || Error::file(path, format!("eos_token_id is {value}, expected a token's id, or several"));
                return ids.ok_or_else(wrong);
            }
        }
    }
    Ok(Vec::new())
}

/// How a text goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GenerateOptions {
    /// The most new tokens.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
}

impl Default for GenerateOptions {
    /// 128 tokens, each the most likely one.
    fn default() -> Self {
        Self { max_tokens: 128, sampling: Sampling::default() }
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// It has as many new tokens as were asked for.
    MaxTokens,
    /// The model takes no more tokens.
    Context,
    /// The caller ended it.
    Stopped,
}

/// What [`Generator::generate`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended the text.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
    /// From the prompt to its last token's logits, with what is prepared the first time.
    pub prompt_time: Duration,
    /// All later passes, a token each.
    pub decode_time: Duration,
    /// How many of these there were.
    pub decoded: usize,
    /// Bytes of keys and values on the device.
    pub cache_bytes: usize,
}

/// A language model on a device that goes on with texts.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use sparse24::Device;
/// use sparse24::text::{Files, GenerateOptions, Generator, LanguageModel, LoadOptions};
/// let model = LanguageModel::load(&Files::in_folder("model/smollm2"), LoadOptions::default())?;
/// let generator = Generator::new(&Device::auto()?, &model)?;
/// let prompt = generator.tokenizer().prompt("The capital of France is")?;
/// generator.generate(&prompt, GenerateOptions::default(), &mut |text| {
///     print!("{text}");
///     ControlFlow::Continue(())
/// })?;
/// # Ok::<(), sparse24::Error>(())
/// ```
/// [`Decoder`](crate::graph::Decoder) shows the loop within, for samplers of one's own and several texts at once.
#[derive(Debug)]
pub struct Generator {
    model: Model,
    tokenizer: Tokenizer,
    eos: Vec<u32>,
}

impl Generator {
    /// Uploads a language model.
    pub fn new(device: &Device, model: &LanguageModel) -> Result<Self> {
        let LanguageModel { tokenizer, checkpoint, eos, .. } = model;
        Ok(Self { model: Model::new(device, checkpoint)?, tokenizer: tokenizer.clone(), eos: eos.clone() })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Goes on with a prompt, given as token ids, and hands over the new text piece by piece, each as soon as it is
    /// known: some tokens are parts of a character. `write` may end the text. An error if the prompt has no token, or
    /// more than the model takes, or if the model's logits are NaN.
    pub fn generate(
        &self,
        prompt: &[u32],
        options: GenerateOptions,
        write: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let GenerateOptions { max_tokens, sampling } = options;
        let mut sampler = Sampler::new(sampling)?;
        let context = self.model.graph().limits().tokens;
        self.model.graph().check_ids(prompt)?;
        let mut decoder = self.model.decoder(1, prompt.len().saturating_add(max_tokens).min(context))?;
        let mut stream = self.tokenizer.stream();
        let mut generated = Generated {
            ids: Vec::new(),
            finish: Finish::MaxTokens,
            prompt_time: Duration::ZERO,
            decode_time: Duration::ZERO,
            decoded: 0,
            cache_bytes: decoder.cache_bytes(),
        };
        let mut new = prompt.to_vec();
        while generated.ids.len() < max_tokens {
            if decoder.lens()[0] + new.len() > decoder.capacity() {
                generated.finish = Finish::Context;
                break;
            }
            let started = Instant::now();
            let logits = decoder.forward(&[&new])?;
            let token = sampler.sample(logits.view::<f32>()?.as_slice().unwrap_or_default())?;
            if decoder.lens()[0] == prompt.len() {
                generated.prompt_time = started.elapsed();
            } else {
                generated.decode_time += started.elapsed();
                generated.decoded += 1;
            }
            if self.eos.contains(&token) {
                generated.finish = Finish::Eos;
                break;
            }
            generated.ids.push(token);
            new = vec![token];
            if let Some(text) = stream.push(token)?
                && write(&text).is_break()
            {
                generated.finish = Finish::Stopped;
                break;
            }
        }
        Ok(generated)
    }

    /// The perplexity of a text, given as token ids, over windows of `context` tokens side by side, `windows` at most:
    /// the exponential of the mean negative logarithm of the probability of every token but the first of each window. A
    /// last window of fewer tokens is left out. `done` is called after each with its mean. An error if there is no
    /// whole window, or the model does not take as many tokens.
    pub fn perplexity(
        &self,
        ids: &[u32],
        context: usize,
        windows: usize,
        done: &mut dyn FnMut(f64),
    ) -> Result<Perplexity> {
        if context < 2 || windows == 0 {
            let asked = format!("{windows} windows of {context} tokens");
            return Err(Error::invalid(format!("{asked} predict nothing: a window's first token is given")));
        }
        let whole = ids.chunks_exact(context).take(windows);
        if whole.len() == 0 {
            return Err(Error::invalid(format!("{} tokens are no window of {context}", ids.len())));
        }
        let mut decoder = self.model.decoder(1, context)?;
        let mut means = Vec::with_capacity(whole.len());
        for window in whole {
            decoder.clear();
            let losses = decoder.score(window)?;
            let mean = losses.iter().sum::<f64>() / losses.len() as f64;
            done(mean);
            means.push(mean);
        }
        Ok(Perplexity { window_losses: means })
    }
}

/// How well a model predicts a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Perplexity {
    /// For each window the mean negative logarithm of the probability of its tokens.
    pub window_losses: Vec<f64>,
}

impl Perplexity {
    /// The mean over all tokens: windows have as many each.
    pub fn mean_loss(&self) -> f64 {
        self.window_losses.iter().sum::<f64>() / self.window_losses.len() as f64
    }

    /// The standard error of that mean, by how windows differ; infinite for one window.
    pub fn standard_error(&self) -> f64 {
        let (n, mean) = (self.window_losses.len() as f64, self.mean_loss());
        let squares: f64 = self.window_losses.iter().map(|loss| (loss - mean).powi(2)).sum();
        if n > 1.0 { (squares / (n - 1.0) / n).sqrt() } else { f64::INFINITY }
    }

    /// Its exponential.
    pub fn value(&self) -> f64 {
        self.mean_loss().exp()
    }
}
