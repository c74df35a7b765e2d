//! Language models of Llama's kind (Touvron et al. 2023, [arXiv:2302.13971](https://arxiv.org/abs/2302.13971)): config
//! and names of tensors to graph. Llama, SmolLM, Mistral, Qwen2 and Qwen3 differ in a few fields of their configs.
//!
//! A block is attention to earlier tokens, with rotary positions and heads that may share keys and values, and a gated
//! feed-forward part; RMSNorm stands before each, and each adds to the states that it was given. Q, K and V are one
//! layer, and so are the gate and the up projection, because each is one product on the device. The head gives a logit
//! for each token of the vocabulary, by weights of its own or by the table of embeddings; it stays dense.
//!
//! Texts are no longer than `max_position_embeddings`, whatever a config says about scaled positions beyond that. A
//! config may ask for windows of attention, which no kernel here has: texts are no longer than the window then, and
//! within that it changes nothing. Invariant: a [`LlamaConfig`] has no size of zero, and its heads share keys and
//! values evenly.

use std::f64::consts::TAU;

use super::{Fields, check_size};
use crate::error::{Error, Result, checked_mul};
use crate::graph::{Blocks, ChannelSet, Channels, Graph, HiddenSpec, Input, Limits, ParamId, SizeField, ValueId};
use crate::ops::Rotary;
use crate::ops::attention::AttentionSpec;
use crate::ops::gemm::LinearSpec;
use crate::problem::Activation;

/// The values of `model_type` whose models are of this kind.
pub(super) const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// What a language model of Llama's kind is made of beside its weights.
///
/// ```
/// use sparse24::models::llama::LlamaConfig;
/// let config = LlamaConfig::parse(r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
///     "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
///     "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#)?;
/// // Per block Q and the output, K and V, and the three layers of the feed-forward part.
/// let block = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536;
/// assert_eq!(config.graph()?.linear_weights(), 30 * block);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    vocabulary: usize,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    /// The most tokens of a text.
    tokens: usize,
    eps: f32,
    activation: Activation,
    rope: Rope,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    /// Whether queries and keys are normalised.
    qk_norm: bool,
    tied: bool,
}

/// Rotary positions: how fast each pair of features turns, and what cosines and sines are multiplied by.
#[derive(Clone, Debug, PartialEq)]
struct Rope {
    frequencies: Vec<f64>,
    scale: f64,
}

impl LlamaConfig {
    /// As [`parse`](super::parse), of a config that is known to be of this kind.
    pub fn parse(text: &str) -> Result<Self> {
        Self::of(&Fields::parse(text)?)
    }

    /// Reads the fields of a `config.json`. An error names one that is missing or of another type, sizes that do not
    /// fit each other, and what a config asks for that is not known here.
    pub(super) fn of(fields: &Fields) -> Result<Self> {
        let kind = fields.one_of("model_type", &MODEL_TYPES)?.unwrap_or("llama");
        let hidden = fields.size("hidden_size", None)?;
        let heads = fields.size("num_attention_heads", None)?;
        check_size("num_attention_heads", heads)?;
        let head_dim = match fields.size("head_dim", Some(0))? {
            // What Transformers has for this kind.
            0 if kind == "qwen3" => 128,
            0 if hidden.is_multiple_of(heads) => hidden / heads,
            0 => {
                return Err(Error::invalid(format!(
                    "hidden_size is {hidden}, which num_attention_heads, {heads}, does not divide, and there is no \
                     head_dim"
                )));
            }
            given => given,
        };
        let positions = fields.size("max_position_embeddings", None)?;
        let window = match kind {
            // Without the field Transformers takes 4096; null means none.
            "mistral" if fields.is_absent("sliding_window") => 4096,
            "mistral" => fields.size("sliding_window", Some(positions))?,
            "qwen2" | "qwen3" if fields.flag("use_sliding_window", false)? => {
                fields.size("sliding_window", Some(4096))?
            }
            _ => positions,
        };
        let attention_bias = match kind {
            "llama" | "qwen3" => fields.flag("attention_bias", false)?,
            _ => false,
        };
        let config = Self {
            vocabulary: fields.size("vocab_size", None)?,
            hidden,
            layers: fields.size("num_hidden_layers", None)?,
            heads,
            kv_heads: fields.size("num_key_value_heads", Some(heads))?,
            head_dim,
            intermediate: fields.size("intermediate_size", None)?,
            tokens: positions.min(window),
            eps: fields.number("rms_norm_eps", 1e-6)? as f32,
            activation: fields.activation("hidden_act", Activation::Silu)?,
            rope: Rope::of(fields, head_dim, positions)?,
            qkv_bias: attention_bias || kind == "qwen2",
            output_bias: attention_bias,
            mlp_bias: kind == "llama" && fields.flag("mlp_bias", false)?,
            qk_norm: kind == "qwen3",
            tied: fields.flag("tie_word_embeddings", false)?,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let &Self { vocabulary, hidden, layers, heads, kv_heads, head_dim, intermediate, tokens, eps, .. } = self;
        for (name, size) in [
            ("vocab_size", vocabulary),
            ("hidden_size", hidden),
            ("num_hidden_layers", layers),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("intermediate_size", intermediate),
            ("max_position_embeddings", tokens),
        ] {
            check_size(name, size)?;
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(format!(
                "num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does not divide"
            )));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(Error::invalid(format!("head_dim is {head_dim}; rotary positions turn pairs of features")));
        }
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::invalid(format!("rms_norm_eps is {eps}, expected a number of at least 0")));
        }
        let width = checked_mul("features of Q, K and V", checked_mul("heads", 3, heads)?, head_dim)?;
        for (what, rows) in [
            ("embeddings", vocabulary),
            ("weights of Q, K and V", width),
            ("feed-forward weights", checked_mul("feed-forward features", 2, intermediate)?),
        ] {
            // With room for the eight bytes of an f64 each.
            checked_mul(what, checked_mul(what, rows, hidden)?, 8)?;
        }
        let of_layer = (width as u128 + (heads * head_dim) as u128 + 3 * intermediate as u128) * hidden as u128;
        if of_layer.checked_mul(layers as u128).is_none_or(|all| usize::try_from(all).is_err()) {
            return Err(Error::overflow("linear weights", format!("{layers} * {of_layer}")));
        }
        Ok(())
    }

    /// The config of a well-known model's sizes, one of [`NAMES`](super::NAMES): SmolLM2-135M, Llama 3.2 1B and Llama
    /// 3.1 8B, for texts of up to 8192 tokens.
    pub fn named(name: &str) -> Option<Self> {
        let (vocabulary, hidden, intermediate, layers, heads, kv_heads, theta, tied) = match name {
            "smollm2" => (49152, 576, 1536, 30, 9, 3, 1e5, true),
            "llama-1b" => (128256, 2048, 8192, 16, 32, 8, 5e5, true),
            "llama-8b" => (128256, 4096, 14336, 32, 32, 8, 5e5, false),
            _ => return None,
        };
        let head_dim = hidden / heads;
        Some(Self {
            vocabulary,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            intermediate,
            tokens: 8192,
            eps: 1e-5,
            activation: Activation::Silu,
            rope: Rope { frequencies: Rotary::frequencies(head_dim, theta), scale: 1.0 },
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied,
        })
    }

    /// The model as a graph, whose output are logits.
    pub fn graph(&self) -> Result<Graph> {
        let &Self { vocabulary, hidden, layers, tokens, eps, tied, .. } = self;
        let mut graph = Graph::new(Limits { vocabulary, tokens });
        graph.add_prefix("model.");
        let field = "num_hidden_layers";
        graph.set_blocks(Blocks { prefix: "layers.".to_owned(), count: layers, field });
        let table = "embed_tokens.weight";
        let mut states = graph.embedding("embed_tokens", &[(table, vocabulary, Input::Ids)], hidden)?;
        let rotary = graph.rotary_tables("rotary", &self.rope.frequencies, self.rope.scale)?;
        for i in 0..layers {
            states = self.add_block(&mut graph, states, &format!("layers.{i}"), rotary)?;
        }
        let normed = graph.rms_norm("norm", states, eps)?;
        graph.lm_head("lm_head", normed, tied.then_some(table))?;
        Ok(graph)
    }

    fn add_block(&self, graph: &mut Graph, x: ValueId, block: &str, rotary: [ParamId; 2]) -> Result<ValueId> {
        let &Self { hidden, heads, kv_heads, head_dim, intermediate, eps, activation, .. } = self;
        let at = |name: &str| format!("{block}.{name}");
        let part = |name: &str, m: usize| (at(name), m);
        let (width, shared) = (heads * head_dim, kv_heads * head_dim);

        let normed = graph.rms_norm(&at("input_layernorm"), x, eps)?;
        let parts =
            vec![part("self_attn.q_proj", width), part("self_attn.k_proj", shared), part("self_attn.v_proj", shared)];
        let fused = at("self_attn.qkv_proj");
        let spec = LinearSpec { parts, bias: self.qkv_bias, ..LinearSpec::new(&fused, normed, width + 2 * shared) };
        let mut qkv = graph.linear(spec)?;
        if self.qk_norm {
            qkv = graph.qk_norm(&at("self_attn.q_norm"), &at("self_attn.k_norm"), qkv, heads, kv_heads, eps)?;
        }
        let turned = graph.rotary(&at("self_attn.rotary"), qkv, rotary, width + shared)?;
        let spec = AttentionSpec { kv_heads, causal: true, ..AttentionSpec::new(turned, heads) };
        let attended = graph.attention(&at("self_attn"), spec)?;
        let (name, bias) = (at("self_attn.o_proj"), self.output_bias);
        let spec = LinearSpec { bias, residual: Some(x), ..LinearSpec::new(&name, attended, hidden) };
        let states = graph.linear(spec)?;

        let normed = graph.rms_norm(&at("post_attention_layernorm"), states, eps)?;
        let parts = vec![part("mlp.gate_proj", intermediate), part("mlp.up_proj", intermediate)];
        let (gate_up, bias) = (at("mlp.gate_up_proj"), self.mlp_bias);
        let inner = graph.linear(LinearSpec { parts, bias, ..LinearSpec::new(&gate_up, normed, 2 * intermediate) })?;
        let gated = graph.gated(&at("mlp.act_fn"), inner, activation)?;
        let down = at("mlp.down_proj");
        let spec = LinearSpec { bias, residual: Some(states), ..LinearSpec::new(&down, gated, hidden) };
        let states = graph.linear(spec)?;

        graph.add_hidden(HiddenSpec {
            makers: &[&gate_up],
            reader: &down,
            // Products of two features.
            activation: None,
            norm: None,
            size: SizeField::Shared("intermediate_size"),
        })?;
        let weights = |graph: &Graph, name: &str| graph.linear_named(name).map(|layer| layer.weights);
        let (gate_up_weights, down_weights) = (weights(graph, &gate_up)?, weights(graph, &down)?);
        graph.add_channels(Channels {
            name: gate_up,
            count: intermediate,
            width: intermediate,
            blocks_move: false,
            sets: vec![ChannelSet {
                rows: vec![(gate_up_weights, 0), (gate_up_weights, intermediate)],
                columns: vec![down_weights],
            }],
        })?;
        Ok(states)
    }
}

impl Rope {
    /// Reads `rope_theta` and `rope_scaling`, or `rope_parameters`, which has both.
    fn of(fields: &Fields, head_dim: usize, positions: usize) -> Result<Self> {
        let required = |scaling: &Fields, name: &str| match scaling.has(name) {
            true => scaling.number(name, 0.0),
            false => Err(Error::invalid(format!("{name} of rope_scaling is missing"))),
        };
        let own = fields.object("rope_parameters")?;
        let scaling = fields.object("rope_scaling")?;
        let theta = match &own {
            Some(own) => own.number("rope_theta", fields.number("rope_theta", 1e4)?)?,
            None => fields.number("rope_theta", 1e4)?,
        };
        if !(theta > 0.0 && theta.is_finite()) {
            return Err(Error::invalid(format!("rope_theta is {theta}, expected a number above 0")));
        }
        let plain = Self { frequencies: Rotary::frequencies(head_dim, theta), scale: 1.0 };
        let all = |fields: &Fields| Ok::<_, Error>(fields.number("partial_rotary_factor", 1.0)? == 1.0);
        if !all(fields)? || !own.as_ref().map_or(Ok(true), all)? {
            return Err(Error::invalid("partial_rotary_factor: heads that are turned in part are not supported"));
        }
        let Some(scaling) = own.or(scaling) else { return Ok(plain) };
        // The older name of the field.
        let field = if scaling.has("rope_type") { "rope_type" } else { "type" };
        let known = ["default", "linear", "dynamic", "yarn", "llama3"];
        let original = || scaling.size("original_max_position_embeddings", Some(positions));
        let checked = |factor: f64| match factor {
            factor if factor >= 1.0 && factor.is_finite() => Ok(factor),
            factor => Err(Error::invalid(format!("factor of rope_scaling is {factor}, expected a number from 1 on"))),
        };
        let factor = || checked(required(&scaling, "factor")?);
        match scaling.one_of(field, &known)?.unwrap_or("default") {
            "linear" => {
                let factor = factor()?;
                Ok(Self { frequencies: plain.frequencies.iter().map(|f| f / factor).collect(), scale: 1.0 })
            }
            "llama3" => {
                let [low, high, original] = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
                    .map(|name| required(&scaling, name));
                let (low, high, original, factor) = (low?, high?, original?, factor()?);
                if low >= high {
                    return Err(Error::invalid(format!("low_freq_factor is {low}, expected less than {high}")));
                }
                let scaled = plain.frequencies.iter().map(|&f| {
                    // Turns in the text that the model was trained on before.
                    let turns = original * f / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    f * kept + f / factor * (1.0 - kept)
                });
                Ok(Self { frequencies: scaled.collect(), scale: 1.0 })
            }
            "yarn" => {
                let original = original()?;
                // Where only the lengths are given, it is their ratio.
                let factor =
                    if scaling.has("factor") { factor()? } else { checked(positions as f64 / original as f64)? };
                plain.yarn(&scaling, theta, factor, original)
            }
            // `dynamic` changes frequencies beyond max_position_embeddings, which no text exceeds here.
            _ => Ok(plain),
        }
    }

    /// YaRN (B. Peng et al. 2023, [arXiv:2309.00071](https://arxiv.org/abs/2309.00071)): features that turn often keep
    /// their frequency, those that turn less than once are slowed, and those between are mixed.
    fn yarn(self, scaling: &Fields, theta: f64, factor: f64, original: usize) -> Result<Self> {
        let half = self.frequencies.len();
        let (fast, slow) = (scaling.number("beta_fast", 32.0)?, scaling.number("beta_slow", 1.0)?);
        // The feature that turns so often in the original text.
        let feature = |turns: f64| half as f64 * (original as f64 / (turns * TAU)).ln() / theta.ln();
        let (mut low, mut high) = (feature(fast), feature(slow));
        if scaling.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(2.0 * half as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let mixed = self.frequencies.iter().enumerate().map(|(c, &f)| {
            let slowed = ((c as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / factor * slowed + f * (1.0 - slowed)
        });
        let grown = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let (scale, all) = (scaling.number("mscale", 0.0)?, scaling.number("mscale_all_dim", 0.0)?);
        let usual = if scale != 0.0 && all != 0.0 { grown(scale) / grown(all) } else { grown(1.0) };
        let scale = scaling.number("attention_factor", usual)?;
        Ok(Self { frequencies: mixed.collect(), scale })
    }
}
