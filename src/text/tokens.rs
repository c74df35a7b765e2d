//! From texts to token ids and back.
//!
//! Invariant: ids are below the model's vocabulary, and a text has one to as many tokens as the model takes.

use std::path::Path;

use tokenizers::{PostProcessor, TruncationDirection, TruncationParams, TruncationStrategy};

use crate::error::{Error, Result};
use crate::graph::Limits;
use crate::io::Store;

/// A vocabulary may have fewer words than the model has rows, which are often a multiple of 8, 64 or 128: fewer by as
/// many as that is another vocabulary.
const MAX_UNUSED: usize = 128;
/// The same for language models, whose tables are often padded for several sizes of one family.
const MAX_UNUSED_OF_LANGUAGE_MODELS: usize = 1024;

/// The tokenizer of a model, from its `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    max_tokens: usize,
    lower_case: bool,
    /// What is put in front of every text.
    prompt: String,
    /// Whether the library truncates texts. A language model's are cut off here, where a prompt must not be.
    truncates: bool,
}

/// Texts as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// One list for each text, special tokens included.
    pub ids: Vec<Vec<u32>>,
    /// How many texts were longer than [`Tokenizer::max_tokens`] and lost their ends.
    pub truncated: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`. What the file says about truncation and padding is about the use that it was made for,
    /// and is replaced: texts are truncated at what the model has positions for (see [`Tokenizer::truncated_at`] for
    /// less), and batches are padded elsewhere.
    ///
    /// An error if the file is none, or is for another vocabulary than the model's: it has ids that the model has no
    /// rows for, or leaves 128 or more rows without a word.
    pub fn load(path: impl AsRef<Path>, limits: Limits) -> Result<Self> {
        Self::load_in(&Store::disk(), path, limits)
    }

    /// [`Tokenizer::load`] of a file of a store.
    pub fn load_in(store: &Store, path: impl AsRef<Path>, limits: Limits) -> Result<Self> {
        let path = path.as_ref();
        let whole = Self::untruncated(store, path, limits, MAX_UNUSED)?;
        whole.truncated_at(limits.tokens).map_err(|e| Error::file(path, e.to_string()))
    }

    /// The same for a language model, whose vocabulary may leave 1023 rows without a word. Its special tokens stand
    /// before a text, so that a text may be cut off anywhere.
    pub fn of_language_model(path: impl AsRef<Path>, limits: Limits) -> Result<Self> {
        Self::of_language_model_in(&Store::disk(), path.as_ref(), limits)
    }

    pub(super) fn of_language_model_in(store: &Store, path: &Path, limits: Limits) -> Result<Self> {
        let whole = Self::untruncated(store, path, limits, MAX_UNUSED_OF_LANGUAGE_MODELS)?;
        Ok(Self { max_tokens: limits.tokens, ..whole })
    }

    fn untruncated(store: &Store, path: &Path, limits: Limits, max_unused: usize) -> Result<Self> {
        // Read here: the library's message about a missing file does not name it.
        let bytes = store.read(path)?;
        let fail = |reason: String| Error::file(path, reason);
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| fail(e.to_string()))?;
        // Ids need not be without gaps.
        let ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let rows = limits.vocabulary;
        if ids > rows || rows - ids >= max_unused {
            return Err(fail(format!("the tokenizer has {ids} ids, the model's vocab_size is {rows}")));
        }
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        Ok(Self { tokenizer, max_tokens: usize::MAX, lower_case: false, prompt: String::new(), truncates: false })
    }

    /// The same tokenizer, which truncates texts at `tokens` tokens, special ones included, or where it did if that is
    /// less. An error if special tokens alone are as many.
    pub fn truncated_at(self, tokens: usize) -> Result<Self> {
        let Self { mut tokenizer, max_tokens, lower_case, prompt, .. } = self;
        let max_tokens = max_tokens.min(tokens);
        // The library subtracts without looking.
        let special = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(false));
        if max_tokens <= special {
            return Err(Error::invalid(format!("{special} special tokens leave no room among {max_tokens} tokens")));
        }
        let truncation = TruncationParams {
            max_length: max_tokens,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
            direction: TruncationDirection::Right,
        };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| Error::invalid(e.to_string()))?;
        Ok(Self { tokenizer, max_tokens, lower_case, prompt, truncates: true })
    }

    /// The most tokens that it makes of a text.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The same tokenizer, which makes texts lower case first, or does not.
    pub fn lower_case(self, lower_case: bool) -> Self {
        Self { lower_case, ..self }
    }

    /// The same tokenizer, which puts a prompt in front of every text, with nothing in between.
    pub fn with_prompt(self, prompt: &str) -> Self {
        Self { prompt: prompt.to_owned(), ..self }
    }

    /// How many tokens at the start of every text are those of the prompt, special ones before it included: as many as
    /// the prompt alone has, without a special one at its end. For
    /// [`Pipeline::set_prompt_tokens`](super::Pipeline::set_prompt_tokens).
    pub fn prompt_tokens(&self) -> Result<usize> {
        if self.prompt.is_empty() {
            return Ok(0);
        }
        let encoded = self.tokenizer.encode(self.prepared(""), true);
        let encoded = encoded.map_err(|e| Error::invalid(format!("cannot tokenize the prompt: {e}")))?;
        let special_end = encoded.get_special_tokens_mask().last() == Some(&1);
        Ok(encoded.len() - usize::from(special_end))
    }

    /// A text as the tokenizer gets it.
    fn prepared(&self, text: &str) -> String {
        let text = format!("{}{text}", self.prompt);
        if self.lower_case { text.to_lowercase() } else { text }
    }

    /// The ids of texts with their prompt, special tokens included: an empty text is its special tokens, `[CLS] [SEP]`.
    /// An error for a text without any token, which a tokenizer that adds none may give.
    pub fn encode<S: AsRef<str>>(&self, texts: &[S]) -> Result<Tokens> {
        let encoded = if self.lower_case || !self.prompt.is_empty() {
            let texts: Vec<String> = texts.iter().map(|text| self.prepared(text.as_ref())).collect();
            self.tokenizer.encode_batch_fast(texts, true)
        } else {
            let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
            self.tokenizer.encode_batch_fast(texts, true)
        };
        let encoded = encoded.map_err(|e| Error::invalid(format!("cannot tokenize: {e}")))?;
        let is_truncated = |text: &&tokenizers::Encoding| {
            !text.get_overflowing().is_empty() || !self.truncates && text.len() > self.max_tokens
        };
        let truncated = encoded.iter().filter(is_truncated).count();
        let kept = |text: &tokenizers::Encoding| text.get_ids()[..text.len().min(self.max_tokens)].to_vec();
        let ids: Vec<_> = encoded.iter().map(kept).collect();
        match ids.iter().position(Vec::is_empty) {
            Some(text) => Err(Error::invalid("has no tokens, so it has no embedding").of_text(text)),
            None => Ok(Tokens { ids, truncated }),
        }
    }

    /// The ids of a language model's prompt, special tokens included. An error if it has more than
    /// [`Tokenizer::max_tokens`], of which none may be cut off, or none at all.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.checked_prompt(self.encode_whole(text, true)?)
    }

    /// The same of a prompt that has its special tokens written out, as a [chat template](super::ChatTemplate) makes
    /// it.
    pub fn rendered_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.checked_prompt(self.encode_whole(text, false)?)
    }

    /// The ids of a text of any length, without special tokens, by the tokenizer of a language model.
    pub fn long_text(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_whole(text, false)
    }

    fn encode_whole(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        if self.truncates {
            return Err(Error::invalid("a tokenizer that cuts texts off makes no prompts"));
        }
        let encoded = self.tokenizer.encode_fast(text, special);
        Ok(encoded.map_err(|e| Error::invalid(format!("cannot tokenize: {e}")))?.get_ids().to_vec())
    }

    fn checked_prompt(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        match ids.len() {
            0 => Err(Error::invalid("the prompt has no tokens")),
            tokens if tokens > self.max_tokens => {
                let most = self.max_tokens;
                Err(Error::invalid(format!("the prompt has {tokens} tokens; the model takes {most}")))
            }
            _ => Ok(ids),
        }
    }

    /// The token of an id, if there is one.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The text of token ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| Error::invalid(format!("cannot make text of tokens: {e}")))
    }

    /// Makes text of tokens that come one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: &self.tokenizer, stream: self.tokenizer.decode_stream(true) }
    }
}

/// Text of tokens that come one by one: see [`Tokenizer::stream`].
pub struct TextStream<'a> {
    tokenizer: &'a tokenizers::Tokenizer,
    stream: DecodeStream<'a>,
}

type DecodeStream<'a> = tokenizers::DecodeStream<
    'a,
    tokenizers::ModelWrapper,
    tokenizers::NormalizerWrapper,
    tokenizers::PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

impl TextStream<'_> {
    /// The text that is known with this token and was not before: nothing where a character is not complete.
    pub fn push(&mut self, token: u32) -> Result<Option<String>> {
        if let Ok(text) = self.stream.step(token) {
            return Ok(text);
        }
        // Bytes that are no character change the text before them, which is out already: the text starts anew here.
        self.stream = self.tokenizer.decode_stream(true);
        self.stream.step(token).map_err(|e| Error::invalid(format!("cannot make text of tokens: {e}")))
    }
}

impl std::fmt::Debug for TextStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextStream").finish_non_exhaustive()
    }
}
