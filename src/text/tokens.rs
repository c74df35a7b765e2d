//! From texts to token ids.
//!
//! Invariant: ids are below the model's vocabulary, and a text has one to as many tokens as the model takes.

use std::path::Path;

use tokenizers::{PostProcessor, TruncationDirection, TruncationParams, TruncationStrategy};

use crate::error::{Error, Result};
use crate::graph::Limits;

/// A vocabulary may have fewer words than the model has rows, which are often a multiple of 8, 64 or 128: fewer by as
/// many as that is another vocabulary.
const MAX_UNUSED: usize = 128;

/// The tokenizer of a model, from its `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    max_tokens: usize,
    lower_case: bool,
    /// What is put in front of every text.
    prompt: String,
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
        let path = path.as_ref();
        // Read here: the library's message about a missing file does not name it.
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let fail = |reason: String| Error::file(path, reason);
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| fail(e.to_string()))?;
        // Ids need not be without gaps.
        let ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let rows = limits.vocabulary;
        if ids > rows || rows - ids >= MAX_UNUSED {
            return Err(fail(format!("the tokenizer has {ids} ids, the model's vocab_size is {rows}")));
        }
        tokenizer.with_padding(None);
        let whole = Self { tokenizer, max_tokens: usize::MAX, lower_case: false, prompt: String::new() };
        whole.truncated_at(limits.tokens).map_err(|e| fail(e.to_string()))
    }

    /// The same tokenizer, which truncates texts at `tokens` tokens, special ones included, or where it did if that is
    /// less. An error if special tokens alone are as many.
    pub fn truncated_at(self, tokens: usize) -> Result<Self> {
        let Self { mut tokenizer, max_tokens, lower_case, prompt } = self;
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
        Ok(Self { tokenizer, max_tokens, lower_case, prompt })
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
        let truncated = encoded.iter().filter(|text| !text.get_overflowing().is_empty()).count();
        let ids: Vec<_> = encoded.iter().map(|text| text.get_ids().to_vec()).collect();
        match ids.iter().position(Vec::is_empty) {
            Some(text) => Err(Error::invalid("has no tokens, so it has no embedding").of_text(text)),
            None => Ok(Tokens { ids, truncated }),
        }
    }
}
