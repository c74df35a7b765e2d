//! BERT (Devlin et al. 2018, [arXiv:1810.04805](https://arxiv.org/abs/1810.04805)): config and names of tensors to graph.
//!
//! An encoder block is two GEMMs around attention and two of the feed-forward part, each with bias, GELU and residual
//! in its epilogue, and two LayerNorms. Q, K and V are one layer, because they are one product on the device. Segment
//! types are all 0. Invariant: a [`BertConfig`] has no size of zero, its heads divide its hidden size, and the number
//! of elements of each of its tensors fits `usize`.

use super::{BlockNames, Fields, PostNormEncoder, check_size};
use crate::error::Result;
use crate::graph::{Graph, Input, Limits};
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
/// let config = BertConfig::named("minilm").ok_or(sparse24::Error::invalid("there is one"))?;
/// assert_eq!((config.sizes().hidden, config.sizes().heads, config.sizes().layers), (384, 12, 6));
/// assert_eq!(config.graph()?.linear_weights(), 6 * (4 * 384 * 384 + 2 * 384 * 1536));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BertConfig {
    encoder: PostNormEncoder,
    types: usize,
}

/// What its checkpoints call the parts of a block.
const BLOCK: BlockNames = BlockNames {
    attention: "attention.self",
    qkv: ["query", "key", "value"],
    attention_out: ["attention.output.dense", "attention.output.LayerNorm"],
    feed_forward: ["intermediate.dense", "output.dense", "output.LayerNorm"],
};

impl BertConfig {
    /// Checks sizes against each other. `eps` is added to LayerNorm's variance; `activation` is the feed-forward
    /// part's.
    pub fn new(sizes: Sizes, eps: f32, activation: Activation) -> Result<Self> {
        let Sizes { vocabulary, hidden, layers, heads, intermediate, positions, types } = sizes;
        let encoder = PostNormEncoder { vocabulary, hidden, layers, heads, intermediate, positions, eps, activation };
        encoder.check()?;
        Self::with(encoder, types)
    }

    fn with(encoder: PostNormEncoder, types: usize) -> Result<Self> {
        check_size("type_vocab_size", types)?;
        Ok(Self { encoder, types })
    }

    /// Reads the fields of a `config.json`. An error names one that is missing or of another type, sizes that do not
    /// fit each other, a model that is no encoder, or has relative positions.
    pub fn parse(text: &str) -> Result<Self> {
        let fields = Fields::parse(text)?;
        fields.one_of("model_type", &["bert"])?;
        Self::of(&fields)
    }

    pub(super) fn of(fields: &Fields) -> Result<Self> {
        fields.one_of("position_embedding_type", &["absolute"])?;
        Self::with(PostNormEncoder::of(fields)?, fields.size("type_vocab_size", Some(2))?)
    }

    /// The model as a graph.
    pub fn graph(&self) -> Result<Graph> {
        let PostNormEncoder { vocabulary, positions, .. } = self.encoder;
        let mut graph = Graph::new(Limits { vocabulary, tokens: positions });
        graph.add_prefix("bert.");
        let tables = [
            ("embeddings.word_embeddings.weight", vocabulary, Input::Ids),
            ("embeddings.position_embeddings.weight", positions, Input::Positions { first: 0, padding_idx: None }),
            ("embeddings.token_type_embeddings.weight", self.types, Input::Constant(0)),
        ];
        let states = self.encoder.embed(&mut graph, &tables)?;
        self.encoder.add_blocks(&mut graph, states, &BLOCK, None)?;
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
        let PostNormEncoder { vocabulary, hidden, layers, heads, intermediate, positions, .. } = self.encoder;
        Sizes { vocabulary, hidden, layers, heads, intermediate, positions, types: self.types }
    }

    /// What LayerNorm adds to the variance.
    pub fn eps(&self) -> f32 {
        self.encoder.eps
    }

    /// The function between the two linear layers of the feed-forward part.
    pub fn activation(&self) -> Activation {
        self.encoder.activation
    }
}
