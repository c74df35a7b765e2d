//! BERT (Devlin et al. 2018, [arXiv:1810.04805](https://arxiv.org/abs/1810.04805)): config and names of tensors to graph.
//!
//! An encoder block is two GEMMs around attention and two of the feed-forward part, each with bias, GELU and residual in
//! its epilogue, and two LayerNorms. Q, K and V are one layer, because they are one product on the device. Segment types
//! are all 0. Invariant: a [`BertConfig`] has no size of zero, its heads divide its hidden size, and the number of elements of
//! each of its tensors fits `usize`.

use super::{EncoderSizes, Fields, PostNormBlock, check_size};
use crate::error::Result;
use crate::graph::{Blocks, Graph, Input, Limits};
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
/// use sparse24::models::bert::BertConfig;
/// let config = BertConfig::named("minilm").ok_or(sparse24::Error::Invalid("there is one".into()))?;
/// assert_eq!((config.sizes().hidden, config.sizes().heads, config.sizes().layers), (384, 12, 6));
/// assert_eq!(config.graph()?.linear_weights(), 6 * (4 * 384 * 384 + 2 * 384 * 1536));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BertConfig {
    sizes: Sizes,
    eps: f32,
    activation: Activation,
}

impl BertConfig {
    /// Checks sizes against each other. `eps` is added to LayerNorm's variance; `activation` is the feed-forward part's.
    pub fn new(sizes: Sizes, eps: f32, activation: Activation) -> Result<Self> {
        let Sizes { vocabulary, hidden, layers, heads, intermediate, positions, types } = sizes;
        EncoderSizes { vocabulary, hidden, layers, heads, intermediate, positions, eps }.check()?;
        check_size("type_vocab_size", types)?;
        Ok(Self { sizes, eps, activation })
    }

    /// Reads the fields of a `config.json`. An error names one that is missing or of another type, sizes that do not fit
    /// each other, a model that is no encoder, or has relative positions.
    pub fn parse(text: &str) -> Result<Self> {
        let fields = Fields::parse(text)?;
        fields.one_of("model_type", &["bert"])?;
        Self::of(&fields)
    }

    pub(super) fn of(fields: &Fields) -> Result<Self> {
        fields.one_of("position_embedding_type", &["absolute"])?;
        // What else these bring would be left out: attention to earlier tokens only, layers that attend to another text.
        fields.none_of(&["is_decoder", "add_cross_attention"])?;
        let sizes = Sizes {
            vocabulary: fields.size("vocab_size", None)?,
            hidden: fields.size("hidden_size", None)?,
            layers: fields.size("num_hidden_layers", None)?,
            heads: fields.size("num_attention_heads", None)?,
            intermediate: fields.size("intermediate_size", None)?,
            positions: fields.size("max_position_embeddings", None)?,
            types: fields.size("type_vocab_size", Some(2))?,
        };
        let eps = fields.number("layer_norm_eps", 1e-12)?;
        Self::new(sizes, eps as f32, fields.activation("hidden_act")?)
    }

    /// The model as a graph.
    pub fn graph(&self) -> Result<Graph> {
        let Self { sizes, eps, activation } = *self;
        let Sizes { vocabulary, hidden, layers, heads, intermediate, positions, types } = sizes;
        let mut graph = Graph::new(Limits { vocabulary, tokens: positions });
        graph.add_prefix("bert.");
        let field = "num_hidden_layers";
        graph.set_blocks(Blocks { prefix: "encoder.layer.".to_owned(), count: layers, field });
        let tables = [
            ("embeddings.word_embeddings.weight", vocabulary, Input::Ids),
            ("embeddings.position_embeddings.weight", positions, Input::Positions { first: 0, padding: None }),
            ("embeddings.token_type_embeddings.weight", types, Input::Constant(0)),
        ];
        let embedded = graph.embedding("embeddings", &tables, hidden)?;
        let mut states = graph.layer_norm("embeddings.LayerNorm", embedded, eps)?;
        for i in 0..layers {
            let at = |name: &str| format!("encoder.layer.{i}.{name}");
            let block = PostNormBlock {
                attention: &at("attention.self"),
                qkv: ["query", "key", "value"],
                attention_out: &at("attention.output.dense"),
                attention_norm: &at("attention.output.LayerNorm"),
                feed_forward: [&at("intermediate.dense"), &at("output.dense"), &at("output.LayerNorm")],
                heads,
                intermediate,
                activation,
                eps,
                relative_bias: None,
            };
            states = block.add(&mut graph, states)?;
        }
        graph.add_output(states);
        Ok(graph)
    }

    /// The sizes of a well-known model, one of [`NAMES`](super::NAMES): MiniLM-L6 with 384 features (all-MiniLM-L6-v2),
    /// BERT-base and BERT-large, uncased.
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

    /// What LayerNorm adds to the variance.
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// The function between the two linear layers of the feed-forward part.
    pub fn activation(&self) -> Activation {
        self.activation
    }
}
