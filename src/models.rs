//! The architectures: a file for each, which makes a [`Graph`] of a config.
//!
//! A model's file reads its `config.json`, adds nodes with the names that its tensors have, and says which channels may
//! be permuted and which may be removed. Nothing else in the crate knows an architecture.
//!
//! # How to add one
//! A file in `src/models`, here its `mod` and a line of the list `ALL` (or, where several kinds share a file, of
//! `all`). The file reads fields by `Fields`, which refuses by name what does not fit, and builds the [`Graph`] by the
//! methods that operations give it, such as [`Graph::linear`]; `PostNormEncoder` is what BERT and MPNet share.
//! [`Graph::add_prefix`] and [`Graph::set_blocks`] say what else names of tensors look like. tests/mpnet.rs shows what
//! is due: the f64 twin against another program's numbers (tests/vectors), devices against both, and every tool.

pub mod bert;
pub mod efficientnet;
pub mod llama;
pub mod mpnet;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result, checked_mul};
use crate::graph::{Blocks, ChannelSet, Channels, Graph, HiddenSpec, Input, ParamId, SizeField, ValueId};
use crate::io::Store;
use crate::ops::attention::AttentionSpec;
use crate::ops::gemm::LinearSpec;
use crate::problem::Activation;

/// What makes a graph of a config.
type Load = fn(&Fields) -> Result<Graph>;

/// The architectures that have a `model_type` of their own, by it.
const ALL: &[(&str, Load)] = &[
    ("bert", |fields| bert::BertConfig::of(fields)?.graph()),
    ("efficientnet_lite", |fields| efficientnet::EfficientNetConfig::of(fields)?.graph()),
    ("mpnet", |fields| mpnet::MpnetConfig::of(fields)?.graph()),
];

/// All of them, with the kinds of Llama.
fn all() -> impl Iterator<Item = (&'static str, Load)> {
    let llama: Load = |fields| llama::LlamaConfig::of(fields)?.graph();
    ALL.iter().copied().chain(llama::MODEL_TYPES.map(|name| (name, llama)))
}

/// Reads `config.json`. Errors name the file and the field: one that is missing or of another type, sizes that do not
/// fit each other, an architecture that is not known here. A config without a `model_type` is a BERT's: its older ones
/// lack it.
pub fn load(path: impl AsRef<Path>) -> Result<Graph> {
    load_in(&Store::disk(), path)
}

/// [`load`] of a file of a store.
pub fn load_in(store: &Store, path: impl AsRef<Path>) -> Result<Graph> {
    let path = path.as_ref();
    let text = store.read_to_string(path)?;
    parse(&text).map_err(|e| Error::file(path, e.to_string()))
}

/// As [`load`], from the text of the file.
///
/// ```
/// let error = sparse24::models::parse(r#"{"model_type": "gpt2"}"#).unwrap_err().to_string();
/// assert_eq!(error, "model_type is \"gpt2\", expected bert or efficientnet_lite or mpnet or llama or mistral or qwen2 or qwen3");
/// ```
pub fn parse(text: &str) -> Result<Graph> {
    let fields = Fields::parse(text)?;
    let known: Vec<_> = all().map(|(name, _)| name).collect();
    let kind = fields.one_of("model_type", &known)?.unwrap_or("bert");
    let load = all().find(|(name, _)| *name == kind).map_or(ALL[0].1, |(_, load)| load);
    load(&fields)
}

/// The names of classes that a `config.json` has in `id2label`, by their numbers.
#[cfg(feature = "vision")]
pub(crate) fn labels(text: &str) -> Result<std::collections::BTreeMap<usize, String>> {
    let Some(Fields(labels)) = Fields::parse(text)?.object("id2label")? else { return Ok(Default::default()) };
    let label = |(id, name): (&String, &Value)| match (id.parse(), name.as_str()) {
        (Ok(id), Some(name)) => Ok((id, name.to_owned())),
        _ => Err(Error::invalid(format!("id2label has {id:?}: {name}, expected a number and a name"))),
    };
    labels.as_object().into_iter().flatten().map(label).collect()
}

/// The graph of a well-known model's sizes, one of [`NAMES`]: for measurements with random weights.
pub fn named(name: &str) -> Option<Graph> {
    match bert::BertConfig::named(name) {
        Some(config) => config.graph().ok(),
        None => llama::LlamaConfig::named(name)?.graph().ok(),
    }
}

/// The names that [`named`] knows: of encoders.
pub const NAMES: [&str; 3] = ["minilm", "bert-base", "bert-large"];

/// The names that [`named`] knows: of language models.
pub const LANGUAGE_MODELS: [&str; 3] = ["smollm2", "llama-1b", "llama-8b"];

/// Name, output features and input features of a linear layer.
pub type LayerShape = (&'static str, usize, usize);

/// The linear layers of well-known models, each distinct shape once: those of [`NAMES`], and of models that have no
/// file here.
pub const LAYER_SHAPES: [(&str, &[LayerShape]); 4] = [
    ("bert-base", &[("attention", 768, 768), ("ffn_in", 3072, 768), ("ffn_out", 768, 3072)]),
    ("bert-large", &[("attention", 1024, 1024), ("ffn_in", 4096, 1024), ("ffn_out", 1024, 4096)]),
    ("minilm", &[("attention", 384, 384), ("ffn_in", 1536, 384), ("ffn_out", 384, 1536)]),
    ("llama-8b", &[("q_o", 4096, 4096), ("k_v", 1024, 4096), ("gate_up", 14336, 4096), ("down", 4096, 14336)]),
];

/// The fields of a config.
pub(crate) struct Fields(Value);

impl Fields {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::invalid(e.to_string()))?;
        if !json.is_object() {
            return Err(Error::invalid("is not a JSON object"));
        }
        Ok(Self(json))
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// An error that says what a field should have been.
    fn expect(name: &str, value: &Value, what: &str) -> Error {
        Error::invalid(format!("{name} is {value}, expected {what}"))
    }

    /// A field that has one of these values, or is not there.
    pub(crate) fn one_of(&self, name: &str, known: &[&str]) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_str().filter(|v| known.contains(v)) {
                Some(value) => Ok(Some(value)),
                None => Err(Self::expect(name, value, &known.join(" or "))),
            },
        }
    }

    /// An error if one of these fields is there and not false.
    pub(crate) fn none_of(&self, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| match self.get(name).filter(|value| **value != Value::Bool(false)) {
            Some(value) => Err(Self::expect(name, value, "false")),
            None => Ok(()),
        })
    }

    /// A whole number.
    pub(crate) fn size(&self, name: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(name), default) {
            (Some(value), _) => {
                let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
                size.ok_or_else(|| Self::expect(name, value, "a whole number"))
            }
            (None, Some(default)) => Ok(default),
            (None, None) => Err(Error::invalid(format!("{name} is missing"))),
        }
    }

    /// Whether a field is not there at all, not even as null.
    pub(crate) fn is_absent(&self, name: &str) -> bool {
        self.0.get(name).is_none()
    }

    /// Whether a field is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// A field that is true or false.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            Some(value) => value.as_bool().ok_or_else(|| Self::expect(name, value, "true or false")),
            None => Ok(default),
        }
    }

    /// The fields of an object within.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>> {
        match self.get(name) {
            Some(value) if value.is_object() => Ok(Some(Self(value.clone()))),
            Some(value) => Err(Self::expect(name, value, "an object")),
            None => Ok(None),
        }
    }

    /// Numbers of things: a list that is there and not empty.
    pub(crate) fn sizes(&self, name: &str) -> Result<Vec<usize>> {
        let value = self.get(name).ok_or_else(|| Error::invalid(format!("{name} is missing")))?;
        let sizes = value.as_array().and_then(|list| {
            list.iter()
                .map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok()))
                .collect::<Option<Vec<_>>>()
        });
        let sizes = sizes.filter(|sizes| !sizes.is_empty());
        sizes.ok_or_else(|| Self::expect(name, value, "a list of whole numbers"))
    }

    /// Numbers of things by number, such as `{"3": 12}`; none where the field is not there.
    pub(crate) fn numbered(&self, name: &str) -> Result<BTreeMap<usize, usize>> {
        let Some(Self(object)) = self.object(name)? else { return Ok(BTreeMap::new()) };
        let entry = |(key, value): (&String, &Value)| {
            let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
            let entry = key.parse().ok().zip(size);
            entry.ok_or_else(|| Error::invalid(format!("{name} has {key:?}: {value}, expected two whole numbers")))
        };
        object.as_object().into_iter().flatten().map(entry).collect()
    }

    /// Three numbers.
    pub(crate) fn triple(&self, name: &str) -> Result<[f32; 3]> {
        let value = self.get(name).ok_or_else(|| Error::invalid(format!("{name} is missing")))?;
        let numbers = value.as_array().and_then(|list| list.iter().map(|x| Some(x.as_f64()? as f32)).collect());
        let numbers: Option<Vec<f32>> = numbers;
        numbers.and_then(|all| all.try_into().ok()).ok_or_else(|| Self::expect(name, value, "a list of three numbers"))
    }

    /// The number of its fields.
    pub(crate) fn count(&self) -> usize {
        self.0.as_object().map_or(0, |fields| fields.len())
    }

    /// A number.
    pub(crate) fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.get(name) {
            Some(value) => value.as_f64().ok_or_else(|| Self::expect(name, value, "a number")),
            None => Ok(default),
        }
    }

    /// An activation by the names that Transformers gives them.
    pub(crate) fn activation(&self, name: &str, default: Activation) -> Result<Activation> {
        let Some(value) = self.get(name) else { return Ok(default) };
        match value.as_str() {
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some("relu6") => Ok(Activation::Relu6),
            Some("silu" | "swish") => Ok(Activation::Silu),
            _ => Err(Self::expect(name, value, "gelu, gelu_new, relu, relu6 or silu")),
        }
    }
}

/// What encoders of BERT's kind are made of, by the names of their configs' fields: a norm after the sum of embeddings
/// and after each of a block's two parts (Vaswani et al. 2017).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PostNormEncoder {
    pub(crate) vocabulary: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) intermediate: usize,
    pub(crate) positions: usize,
    /// What LayerNorm adds to the variance.
    pub(crate) eps: f32,
    /// The feed-forward part's.
    pub(crate) activation: Activation,
}

/// What the parts of block i are called, each behind `encoder.layer.{i}.`.
pub(crate) struct BlockNames {
    pub(crate) attention: &'static str,
    /// The layers of Q, K and V, behind the name of the attention.
    pub(crate) qkv: [&'static str; 3],
    /// The layer after attention, and the norm after that.
    pub(crate) attention_out: [&'static str; 2],
    /// The feed-forward part's two layers, and the norm after them.
    pub(crate) feed_forward: [&'static str; 3],
}

impl PostNormEncoder {
    /// Reads the fields of a config, and [checks](Self::check) them.
    pub(crate) fn of(fields: &Fields) -> Result<Self> {
        // What else these bring would be left out: attention to earlier tokens only, layers that attend to another
        // text.
        fields.none_of(&["is_decoder", "add_cross_attention"])?;
        let encoder = Self {
            vocabulary: fields.size("vocab_size", None)?,
            hidden: fields.size("hidden_size", None)?,
            layers: fields.size("num_hidden_layers", None)?,
            heads: fields.size("num_attention_heads", None)?,
            intermediate: fields.size("intermediate_size", None)?,
            positions: fields.size("max_position_embeddings", None)?,
            eps: fields.number("layer_norm_eps", 1e-12)? as f32,
            activation: fields.activation("hidden_act", Activation::Gelu)?,
        };
        encoder.check()?;
        Ok(encoder)
    }

    /// An error if a size is 0 or more than a kernel counts to, heads do not divide the hidden size, or a number of
    /// elements does not fit.
    pub(crate) fn check(&self) -> Result<()> {
        let &Self { vocabulary, hidden, layers, heads, intermediate, positions, eps, .. } = self;
        for (name, size) in [
            ("vocab_size", vocabulary),
            ("hidden_size", hidden),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads),
            ("intermediate_size", intermediate),
            ("max_position_embeddings", positions),
        ] {
            check_size(name, size)?;
        }
        if !hidden.is_multiple_of(heads) {
            return Err(Error::invalid(format!(
                "hidden_size is {hidden}, which num_attention_heads, {heads}, does not divide"
            )));
        }
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::invalid(format!("layer_norm_eps is {eps}, expected a number of at least 0")));
        }
        for (what, rows) in [
            ("word table", vocabulary),
            ("position table", positions),
            ("weights of Q, K and V", checked_mul("weights of Q, K and V", 3, hidden)?),
            ("feed-forward weights", intermediate),
        ] {
            // With room for the eight bytes of an f64 each.
            checked_mul(what, checked_mul(what, rows, hidden)?, 8)?;
        }
        let of_layer = 4 * hidden as u128 * hidden as u128 + 2 * hidden as u128 * intermediate as u128;
        if of_layer.checked_mul(layers as u128).is_none_or(|all| usize::try_from(all).is_err()) {
            return Err(Error::overflow("linear weights", format!("{layers} * {of_layer}")));
        }
        Ok(())
    }

    /// Adds the sum of rows of these tables, and its norm.
    pub(crate) fn embed(&self, graph: &mut Graph, tables: &[(&str, usize, Input)]) -> Result<ValueId> {
        let embedded = graph.embedding("embeddings", tables, self.hidden)?;
        graph.layer_norm("embeddings.LayerNorm", embedded, self.eps)
    }

    /// Adds all blocks, from states to states, which are the graph's output. `relative_bias` is what all of them add to
    /// the scores of attention, for each head its own: heads keep their places then, and may be permuted without it.
    pub(crate) fn add_blocks(
        &self,
        graph: &mut Graph,
        mut states: ValueId,
        names: &BlockNames,
        relative_bias: Option<ParamId>,
    ) -> Result<()> {
        let field = "num_hidden_layers";
        graph.set_blocks(Blocks { prefix: "encoder.layer.".to_owned(), count: self.layers, field });
        for i in 0..self.layers {
            states = self.add_block(graph, states, &format!("encoder.layer.{i}"), names, relative_bias)?;
        }
        graph.add_output(states);
        Ok(())
    }

    fn add_block(
        &self,
        graph: &mut Graph,
        x: ValueId,
        block: &str,
        names: &BlockNames,
        relative_bias: Option<ParamId>,
    ) -> Result<ValueId> {
        let &Self { hidden: d, heads, intermediate, activation, eps, .. } = self;
        let at = |name: &str| format!("{block}.{name}");
        let attention = at(names.attention);
        let [attention_out, attention_norm] = names.attention_out.map(at);
        let [up, down, norm] = names.feed_forward.map(at);
        let fused = format!("{attention}.qkv");
        let parts = names.qkv.iter().map(|part| (format!("{attention}.{part}"), d)).collect();
        let qkv = graph.linear(LinearSpec { parts, ..LinearSpec::new(&fused, x, 3 * d) })?;
        let spec = AttentionSpec { relative_bias, ..AttentionSpec::new(qkv, heads) };
        let attended = graph.attention(&attention, spec)?;
        let sum = graph.linear(LinearSpec { residual: Some(x), ..LinearSpec::new(&attention_out, attended, d) })?;
        let normed = graph.layer_norm(&attention_norm, sum, eps)?;
        let inner = graph.linear(LinearSpec { activation, ..LinearSpec::new(&up, normed, intermediate) })?;
        let sum = graph.linear(LinearSpec { residual: Some(normed), ..LinearSpec::new(&down, inner, d) })?;
        let weights = |graph: &Graph, name: &str| graph.linear_named(name).map(|layer| layer.weights);
        let (qkv, out) = (weights(graph, &fused)?, weights(graph, &attention_out)?);
        let (up_weights, down_weights) = (weights(graph, &up)?, weights(graph, &down)?);
        graph.add_channels(Channels {
            name: attention,
            count: d,
            width: d / heads,
            blocks_move: relative_bias.is_none(),
            sets: vec![
                // What queries and keys are compared by. No columns follow them, but from V = 2 on their order decides
                // which rows share a pattern.
                ChannelSet { rows: vec![(qkv, 0), (qkv, d)], columns: Vec::new() },
                // What attention hands on.
                ChannelSet { rows: vec![(qkv, 2 * d)], columns: vec![out] },
            ],
        })?;
        graph.add_hidden(HiddenSpec {
            makers: &[&up],
            reader: &down,
            activation: Some(activation),
            norm: None,
            size: SizeField::Shared("intermediate_size"),
        })?;
        graph.add_channels(Channels {
            name: up,
            count: intermediate,
            width: intermediate,
            blocks_move: false,
            sets: vec![ChannelSet { rows: vec![(up_weights, 0)], columns: vec![down_weights] }],
        })?;
        graph.layer_norm(&norm, sum, eps)
    }
}

/// An error if a size is 0 or more than a kernel counts to.
pub(crate) fn check_size(name: &str, size: usize) -> Result<()> {
    // Ids, positions and the kernels' sizes are u32.
    match u32::try_from(size) {
        Ok(1..) => Ok(()),
        _ => Err(Error::invalid(format!("{name} is {size}, expected 1 to {}", u32::MAX))),
    }
}
