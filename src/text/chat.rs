//! Chat templates: how a conversation becomes the text that a language model was trained on.
//!
//! A template is a Jinja template that comes with the model's tokenizer, as Transformers renders it: blocks are
//! trimmed, strings have Python's methods, and `raise_exception` refuses what the model was not made for. What it
//! prints goes to the tokenizer as it is: it has the special tokens itself.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as Argument};
use minijinja::{Environment, ErrorKind, context};
use serde_json::{Map, Value};

use super::files::{Files, object};
use crate::error::{Error, Result};

/// A model's chat template. See [`LanguageModel`](super::LanguageModel).
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// The file that it is from, for errors.
    file: String,
    /// Special tokens by the names that templates use, such as `eos_token`.
    tokens: BTreeMap<String, String>,
}

/// What somebody says in a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What.
    pub content: String,
}

impl Message {
    /// What `role` says.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

impl ChatTemplate {
    /// The template that a model's files have, if they have one: `chat_template.jinja`, or what `tokenizer_config.json`
    /// has. Of several that are named it is the one named `default`.
    pub(super) fn load(files: &Files) -> Result<Option<Self>> {
        let config =
            files.tokenizer_config.as_deref().map(|path| object(&files.store, path)).transpose()?.unwrap_or_default();
        let found = match (&files.chat_template, &files.tokenizer_config) {
            (Some(path), _) => Some((files.store.read_to_string(path)?, path)),
            (None, Some(path)) => of_config(path, &config)?.map(|source| (source, path)),
            (None, None) => None,
        };
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"].into_iter().filter_map(|name| {
            let token = config.get(name)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some((name.to_owned(), text.to_owned()))
        });
        let tokens = tokens.collect();
        Ok(found.map(|(source, path)| Self { source, file: path.display().to_string(), tokens }))
    }

    /// A template of this text, without special tokens.
    ///
    /// ```
    /// use sparse24::text::{ChatTemplate, Message};
    /// let template = ChatTemplate::new("{% for m in messages %}{{ m.role }}: {{ m.content.strip() }}\n{% endfor %}");
    /// assert_eq!(template.render(&[Message::new("user", " Hello. ")])?, "user: Hello.\n");
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn new(source: &str) -> Self {
        Self { source: source.to_owned(), file: "chat template".to_owned(), tokens: BTreeMap::new() }
    }

    /// The prompt of a conversation, to which the model adds the next answer. An error says where a template fails, or
    /// what it refuses.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::invalid(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |reason: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
            },
        );
        let messages: Vec<Argument> =
            messages.iter().map(|Message { role, content }| context! { role, content }).collect();
        let given = context! { messages, add_generation_prompt => true, ..Argument::from(Serde(&self.tokens)) };
        let rendered = environment.template_from_str(&self.source).and_then(|template| template.render(given));
        rendered.map_err(|e| Error::invalid(format!("{}: the chat template fails: {e:#}", self.file)))
    }
}

/// The template in a `tokenizer_config.json`.
fn of_config(path: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    let named = |entries: &[Value]| {
        let default = entries.iter().find(|entry| entry["name"] == "default");
        default.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(entries)) => Ok(named(entries)),
        Some(other) => Err(Error::file(path, format!("chat_template is {other}, expected a text"))),
    }
}
