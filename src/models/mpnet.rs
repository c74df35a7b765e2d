//! MPNet (Song et al. 2020, [arXiv:2004.09297](https://arxiv.org/abs/2004.09297)): config and names of tensors to graph.
//!
//! An encoder block is BERT's, but that attention adds a bias to its scores, one for each head and distance, from a
//! table that all blocks share. Distances share rows of the table: near ones have one each, far ones an interval that
//! grows with the logarithm, and keys to the right of a query have the second half. Positions of embeddings count from
//! 2 on, and not the padding token. There are no segment types. Invariant: a [`MpnetConfig`] has no size of zero, and
//! its heads divide its hidden size.

use super::{BlockNames, Fields, PostNormEncoder};
use crate::error::{Error, Result};
use crate::graph::{Graph, Input, Limits, ParamKind, Precision, StoredTensor};
use crate::matrix::Matrix;

/// The id of the padding token. Transformers' MPNet has it fixed, and does not read the config's `pad_token_id`.
const PADDING: u32 = 1;

/// Rows of the table of relative positions. Transformers' forward pass takes so many, whatever the config's field says.
const BUCKETS: usize = 32;

/// The distance from which on all share the last row.
const FAR: usize = 128;

/// What an MPNet is made of beside its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MpnetConfig {
    encoder: PostNormEncoder,
}

/// What its checkpoints call the parts of a block.
const BLOCK: BlockNames = BlockNames {
    attention: "attention.attn",
    qkv: ["q", "k", "v"],
    attention_out: ["attention.attn.o", "attention.LayerNorm"],
    feed_forward: ["intermediate.dense", "output.dense", "output.LayerNorm"],
};

impl MpnetConfig {
    /// As [`parse`](super::parse), of a config that is known to be an MPNet's.
    pub fn parse(text: &str) -> Result<Self> {
        Self::of(&Fields::parse(text)?)
    }

    /// Reads the fields of a `config.json`. An error names one that is missing or of another type, or sizes that do not
    /// fit each other.
    pub(super) fn of(fields: &Fields) -> Result<Self> {
        let encoder = PostNormEncoder::of(fields)?;
        let positions = encoder.positions;
        if positions <= PADDING as usize + 1 {
            return Err(Error::invalid(format!(
                "max_position_embeddings is {positions}, which leaves none for a text"
            )));
        }
        // Another number is of no use in Transformers: its forward pass takes 32 rows.
        let buckets = fields.size("relative_attention_num_buckets", Some(BUCKETS))?;
        if buckets != BUCKETS {
            return Err(Error::invalid(format!("relative_attention_num_buckets is {buckets}, expected {BUCKETS}")));
        }
        Ok(Self { encoder })
    }

    /// The model as a graph.
    pub fn graph(&self) -> Result<Graph> {
        let PostNormEncoder { vocabulary, heads, positions, .. } = self.encoder;
        let tokens = positions - PADDING as usize - 1;
        let mut graph = Graph::new(Limits { vocabulary, tokens });
        graph.add_prefix("mpnet.");
        let places = Input::Positions { first: PADDING + 1, padding_idx: Some(PADDING) };
        let tables = [
            ("embeddings.word_embeddings.weight", vocabulary, Input::Ids),
            ("embeddings.position_embeddings.weight", positions, places),
        ];
        let states = self.encoder.embed(&mut graph, &tables)?;

        let name = "encoder.relative_attention_bias.weight";
        let bias = graph.add_param(name.to_owned(), ParamKind::Matrix(Precision::F32), (heads, 2 * tokens - 1))?;
        graph.set_stored(bias, vec![StoredTensor { names: vec![name.to_owned()], shape: vec![BUCKETS, heads] }]);
        graph.set_conversion(bias, move |table| by_distance(table, tokens));
        self.encoder.add_blocks(&mut graph, states, &BLOCK, Some(bias))?;
        Ok(graph)
    }
}

/// The table of buckets as one of distances, as attention reads it: of each head, a number for a key that is `tokens -
/// 1` to the left of its query, and so on to as many to the right.
fn by_distance(table: &Matrix, tokens: usize) -> Result<Matrix> {
    let (buckets, heads) = (table.rows(), table.cols());
    let distances = 2 * tokens - 1;
    let mut numbers = Vec::with_capacity(heads * distances);
    for head in 0..heads {
        for at in 0..distances {
            let (right, distance) = (at >= tokens, at.abs_diff(tokens - 1));
            numbers.push(table.get(bucket(right, distance, buckets), head));
        }
    }
    Matrix::from_f32(heads, distances, &numbers)
}

/// The row of a key at this distance, to the right of its query or not.
fn bucket(right: bool, distance: usize, buckets: usize) -> usize {
    let half = buckets / 2;
    let near = half / 2;
    let first = if right { half } else { 0 };
    if distance < near {
        return first + distance;
    }
    let far = (distance as f64 / near as f64).ln() / (FAR as f64 / near as f64).ln() * (half - near) as f64;
    first + (near + far as usize).min(half - 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// The buckets of transformers, for every distance at which they change and those between.
    #[test]
    fn buckets_are_those_of_transformers() {
        let text = include_str!("../../tests/vectors/mpnet.json");
        let expected: serde_json::Value = serde_json::from_str(text).unwrap();
        for (side, steps) in expected["buckets"].as_object().unwrap() {
            let (count, side) = side.split_once(' ').unwrap();
            let mut steps = steps.as_array().unwrap().iter().peekable();
            let mut now = 0;
            for distance in 0..512 {
                if let Some(step) = steps.next_if(|step| step[0] == distance) {
                    now = step[1].as_u64().unwrap() as usize;
                }
                // A distance of 0 is to no side.
                let right = side == "right" && distance > 0;
                assert_eq!(bucket(right, distance, count.parse().unwrap()), now, "{count} {side}, {distance}");
            }
            assert!(steps.next().is_none());
        }
    }

    #[test]
    fn distances_lie_from_left_to_right() {
        // Two heads: the row's number, and that and a half.
        let numbers: Vec<f32> = (0..BUCKETS).flat_map(|row| [row as f32, row as f32 + 0.5]).collect();
        let table = by_distance(&Matrix::from_f32(BUCKETS, 2, &numbers).unwrap(), 3).unwrap();
        assert_eq!(table, Matrix::from_f32(2, 5, &[2.0, 1.0, 0.0, 17.0, 18.0, 2.5, 1.5, 0.5, 17.5, 18.5]).unwrap());
    }

    #[test]
    fn configs_that_are_none_are_refused_by_field() {
        let text = include_str!("../../tests/vectors/mpnet.json");
        let tiny: serde_json::Value = serde_json::from_str(text).unwrap();
        let parse = |field: &str, value: serde_json::Value| {
            let mut config = tiny["tiny"]["config"].clone();
            config[field] = value;
            crate::models::parse(&config.to_string()).map_err(|e| e.to_string())
        };
        let fine = parse("hidden_act", "gelu".into()).unwrap();
        // Positions start at 2.
        assert_eq!(fine.limits(), Limits { vocabulary: 14, tokens: 24 });
        assert_eq!(fine.linear_weights(), 2 * (4 * 1600 + 2 * 40 * 72));
        for (field, value, error) in [
            (
                "model_type",
                "gpt2".into(),
                "model_type is \"gpt2\", expected bert or efficientnet_lite or mpnet or llama or mistral or qwen2 or qwen3",
            ),
            ("relative_attention_num_buckets", 8.into(), "relative_attention_num_buckets is 8, expected 32"),
            ("hidden_size", 41.into(), "hidden_size is 41, which num_attention_heads, 5, does not divide"),
            ("num_hidden_layers", 0.into(), "num_hidden_layers is 0, expected 1 to 4294967295"),
            ("max_position_embeddings", 2.into(), "max_position_embeddings is 2, which leaves none for a text"),
            ("is_decoder", true.into(), "is_decoder is true, expected false"),
        ] {
            assert_eq!(parse(field, value).map(|_| ()), Err(error.to_owned()), "{field}");
        }
    }
}
