//! The sizes of a BERT, read from a `config.json` or known by the model's name.
//!
//! Invariant: a [`Config`] has no size of zero, its heads divide its hidden size, and the number of elements of each of
//! its tensors fits `usize`.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result, checked_mul};
use crate::problem::Activation;

/// The sizes of an encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of the table of words: ids are below it.
    pub vocabulary: usize,
    /// Features of a token.
    pub hidden: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Attention heads of a layer; they divide `hidden`.
    pub heads: usize,
    /// Features between the two linear layers of the feed-forward part.
    pub intermediate: usize,
    /// Rows of the table of positions: the tokens of the longest text.
    pub positions: usize,
    /// Rows of the table of segment types, of which the first is used.
    pub types: usize,
}

/// What a BERT is made of beside its weights.
///
/// ```
/// use sparse24::bert::Config;
/// let config = Config::named("minilm").ok_or(sparse24::Error::Invalid("there is one".into()))?;
/// assert_eq!((config.hidden(), config.heads(), config.layers()), (384, 12, 6));
/// assert_eq!(config.linear_weights(), 6 * (4 * 384 * 384 + 2 * 384 * 1536));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    sizes: Sizes,
    eps: f32,
    activation: Activation,
}

/// Names that [`Config::named`] knows.
pub const NAMES: [&str; 3] = ["minilm", "bert-base", "bert-large"];

impl Config {
    /// Checks sizes against each other. `eps` is added to LayerNorm's variance; `activation` is the feed-forward part's.
    pub fn new(sizes: Sizes, eps: f32, activation: Activation) -> Result<Self> {
        let Sizes { vocabulary, hidden, layers, heads, intermediate, positions, types } = sizes;
        for (what, size) in [
            ("vocab_size", vocabulary),
            ("hidden_size", hidden),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads),
            ("intermediate_size", intermediate),
            ("max_position_embeddings", positions),
            ("type_vocab_size", types),
        ] {
            // Ids, positions and the kernels' sizes are u32.
            if size == 0 || u32::try_from(size).is_err() {
                return Err(Error::Invalid(format!("{what} is {size}, expected 1 to {}", u32::MAX)));
            }
        }
        if !hidden.is_multiple_of(heads) {
            return Err(Error::Invalid(format!(
                "hidden_size is {hidden}, which num_attention_heads, {heads}, does not divide"
            )));
        }
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::Invalid(format!("layer_norm_eps is {eps}, expected a number of at least 0")));
        }
        for (what, rows) in [
            ("word table", vocabulary),
            ("position table", positions),
            ("type table", types),
            ("weights of Q, K and V", checked_mul("weights of Q, K and V", 3, hidden)?),
            ("feed-forward weights", intermediate),
        ] {
            // With room for the eight bytes of an f64 each.
            checked_mul(what, checked_mul(what, rows, hidden)?, 8)?;
        }
        let of_layer = 4 * hidden as u128 * hidden as u128 + 2 * hidden as u128 * intermediate as u128;
        if of_layer.checked_mul(layers as u128).is_none_or(|all| usize::try_from(all).is_err()) {
            return Err(Error::Overflow { what: "linear weights".into(), detail: format!("{layers} * {of_layer}") });
        }
        Ok(Self { sizes, eps, activation })
    }

    /// Reads `config.json`. Errors name the file and the field: one that is missing or of another type, sizes that do
    /// not fit each other, a model that is no BERT, no encoder, or has relative positions.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text).map_err(|e| Error::file(path, e.to_string()))
    }

    /// As [`Config::load`], from the text of the file.
    pub fn parse(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::Invalid(e.to_string()))?;
        if !json.is_object() {
            return Err(Error::Invalid("is not a JSON object".into()));
        }
        let field = |name: &str| json.get(name).filter(|value| !value.is_null());
        let expect =
            |name: &str, value: &Value, what: &str| Error::Invalid(format!("{name} is {value}, expected {what}"));
        let one_of = |name: &str, known: &[&str]| match field(name) {
            None => Ok(()),
            Some(value) if value.as_str().is_some_and(|v| known.contains(&v)) => Ok(()),
            Some(value) => Err(expect(name, value, &known.join(" or "))),
        };
        one_of("model_type", &["bert"])?;
        one_of("position_embedding_type", &["absolute"])?;
        // What else these bring would be left out: attention to earlier tokens only, layers that attend to another text.
        for name in ["is_decoder", "add_cross_attention"] {
            if let Some(value) = field(name).filter(|value| **value != Value::Bool(false)) {
                return Err(expect(name, value, "false"));
            }
        }
        let size = |name: &str, default: Option<usize>| match (field(name), default) {
            (Some(value), _) => {
                let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
                size.ok_or_else(|| expect(name, value, "a whole number"))
            }
            (None, Some(default)) => Ok(default),
            (None, None) => Err(Error::Invalid(format!("{name} is missing"))),
        };
        let sizes = Sizes {
            vocabulary: size("vocab_size", None)?,
            hidden: size("hidden_size", None)?,
            layers: size("num_hidden_layers", None)?,
            heads: size("num_attention_heads", None)?,
            intermediate: size("intermediate_size", None)?,
            positions: size("max_position_embeddings", None)?,
            types: size("type_vocab_size", Some(2))?,
        };
        let eps = match field("layer_norm_eps") {
            Some(value) => value.as_f64().ok_or_else(|| expect("layer_norm_eps", value, "a number"))?,
            None => 1e-12,
        };
        // The names that Transformers gives to the same functions.
        let activation = match field("hidden_act") {
            None => Activation::Gelu,
            Some(value) => match value.as_str() {
                Some("gelu") => Activation::Gelu,
                Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Activation::GeluTanh,
                Some("relu") => Activation::Relu,
                Some("silu" | "swish") => Activation::Silu,
                _ => return Err(expect("hidden_act", value, "gelu, gelu_new, relu or silu")),
            },
        };
        Self::new(sizes, eps as f32, activation)
    }

    /// The sizes of a well-known model, one of [`NAMES`]: MiniLM-L6 with 384 features (all-MiniLM-L6-v2), BERT-base and
    /// BERT-large, uncased (Devlin et al. 2018, [arXiv:1810.04805](https://arxiv.org/abs/1810.04805)).
    pub fn named(name: &str) -> Option<Self> {
        let (hidden, layers, heads) = match name {
            "minilm" => (384, 6, 12),
            "bert-base" => (768, 12, 12),
            "bert-large" => (1024, 24, 16),
            _ => return None,
        };
        let sizes =
            Sizes { vocabulary: 30522, hidden, layers, heads, intermediate: 4 * hidden, positions: 512, types: 2 };
        Self::new(sizes, 1e-12, Activation::Gelu).ok()
    }

    /// All sizes.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Features of a token, and of an embedding.
    pub fn hidden(&self) -> usize {
        self.sizes.hidden
    }

    /// Encoder layers.
    pub fn layers(&self) -> usize {
        self.sizes.layers
    }

    /// Attention heads of a layer.
    pub fn heads(&self) -> usize {
        self.sizes.heads
    }

    /// Features between the two linear layers of the feed-forward part.
    pub fn intermediate(&self) -> usize {
        self.sizes.intermediate
    }

    /// The most tokens that a text may have.
    pub fn positions(&self) -> usize {
        self.sizes.positions
    }

    /// Number of word ids.
    pub fn vocabulary(&self) -> usize {
        self.sizes.vocabulary
    }

    /// What LayerNorm adds to the variance.
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// The function between the two linear layers of the feed-forward part.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Weights of all linear layers together, biases left out: what 2:4 halves.
    pub fn linear_weights(&self) -> usize {
        let Sizes { hidden, layers, intermediate, .. } = self.sizes;
        layers * (4 * hidden * hidden + 2 * hidden * intermediate)
    }
}
