//! Which matrices a file holds the other way round: as `[in_features, out_features]`.
//!
//! 2:4 runs along the in features, which a product sums over. Those are the columns of nearly every file's matrices,
//! and the rows of two kinds of weights: those of `transformers`' `Conv1D`, as GPT-2 and its relatives have them, and
//! the `kernel`s of Flax and Keras. Their columns may be 2:4 as well, and mean nothing by it.
//!
//! Nothing in a file says it of a Conv1D. Its bias does, which is as long as the out features; else the kind of model,
//! which the config names; else, where there is no config, the shapes that this kind of model gives it.
//!
//! Invariant: without any of these signs, a matrix is `[out_features, in_features]`.

use std::collections::BTreeSet;

use serde_json::Value;

use super::source::{Item, Source, Stored};

/// Names of the modules that are a Conv1D where a model has any.
const CONV1D: [&str; 4] = ["c_attn", "c_fc", "c_proj", "q_attn"];
/// Kinds of models in `transformers` whose modules of those names are. Others' are not (GPT-Neo, GPT-BigCode).
const MODELS: [&str; 6] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"];
/// The same models by the start of their class, for configs without a `model_type`.
const CLASSES: [&str; 4] = ["GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer"];

/// The names of all items of a source that are stored as `[in_features, out_features]`, by what the source's tensors
/// and the model's `config.json` tell. Only items that lie in their files as they would in a dense one are among them:
/// a compressed matrix was compressed along its columns, whatever those are.
///
/// ```
/// use serde_json::json;
/// use sparse24::io::{self, Source};
/// use sparse24::{DType, Matrix};
/// let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("model.safetensors");
/// let w = Matrix::zeros(16, 16, DType::F32)?;
/// io::save_matrices(&path, &[("h.0.attn.c_proj.weight", &w), ("wte.weight", &w)])?;
/// let source = Source::open(&path)?;
/// let found = io::in_by_out(&source, Some(&json!({"model_type": "gpt2"})));
/// assert!(found.iter().eq(["h.0.attn.c_proj.weight"]));
/// assert!(io::in_by_out(&source, Some(&json!({"model_type": "gpt_neo"}))).is_empty());
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn in_by_out(source: &Source, config: Option<&Value>) -> BTreeSet<String> {
    let dense = |item: &&Item| {
        let dense = matches!(item.stored, Stored::Dense | Stored::SparseBitmask | Stored::TorchMask | Stored::AspMask);
        dense && item.matrix().is_some()
    };
    let mut found: BTreeSet<String> =
        source.items().filter(dense).filter(|item| is_kernel(&item.name)).map(|item| item.name.clone()).collect();

    let conv1ds: Vec<_> = source
        .items()
        .filter(dense)
        .filter_map(|item| Some((item, module(&item.name)?, of_bias(source, item))))
        .collect();
    // One kind of model has one kind of module, so what is known of some holds for those of which nothing is known.
    let others = match config.filter(|config| names_a_model(config)) {
        Some(config) if has_conv1d(config) => true,
        Some(_) => agree(conv1ds.iter().filter_map(|(_, _, of_bias)| *of_bias)),
        None => agree(conv1ds.iter().filter_map(|(item, module, of_bias)| of_bias.or_else(|| of_shape(item, module)))),
    };
    let conv1ds = conv1ds.into_iter().filter(|(_, _, of_bias)| of_bias.unwrap_or(others));
    found.extend(conv1ds.map(|(item, _, _)| item.name.clone()));
    found
}

/// The little-endian bytes of the transpose of a `rows x cols` matrix with elements of `width` bytes.
///
/// ```
/// assert_eq!(sparse24::io::transpose(2, 3, 1, &[1, 2, 3, 4, 5, 6]), [1, 4, 2, 5, 3, 6]);
/// ```
///
/// # Panics
/// If there are not so many bytes.
pub fn transpose(rows: usize, cols: usize, width: usize, bytes: &[u8]) -> Vec<u8> {
    /// Rows and columns that are moved together, so that both sides stay in the cache.
    const BLOCK: usize = 32;
    assert_eq!(Some(bytes.len()), rows.checked_mul(cols).and_then(|n| n.checked_mul(width)), "bytes of a matrix");
    let mut out = vec![0; bytes.len()];
    for first in (0..rows).step_by(BLOCK) {
        for left in (0..cols).step_by(BLOCK) {
            for row in first..rows.min(first + BLOCK) {
                for col in left..cols.min(left + BLOCK) {
                    let from = (row * cols + col) * width;
                    out[(col * rows + row) * width..][..width].copy_from_slice(&bytes[from..from + width]);
                }
            }
        }
    }
    out
}

/// Whether the name is that of the weights of a Flax or Keras layer.
fn is_kernel(name: &str) -> bool {
    let last = name.rsplit(['.', '/']).next().unwrap_or(name);
    matches!(last, "kernel" | "kernel:0")
}

/// The module of a weight's name, if it is one of those that may be a Conv1D.
fn module(name: &str) -> Option<&str> {
    let module = name.strip_suffix(".weight")?;
    CONV1D.contains(&module.rsplit('.').next().unwrap_or(module)).then_some(module)
}

/// What the length of its bias tells of a matrix.
fn of_bias(source: &Source, item: &Item) -> Option<bool> {
    let (rows, cols) = item.matrix()?;
    let bias = source.item(&format!("{}.bias", item.name.strip_suffix(".weight")?))?;
    match bias.shape[..] {
        [len] if rows != cols && (len == rows || len == cols) => Some(len == cols),
        _ => None,
    }
}

/// What its shape tells of a matrix of a GPT-2 or of a model that names its modules like one: `c_attn` has three times
/// as many features out as in, a `c_fc` more out than in, and the `c_proj` after it more in than out.
fn of_shape(item: &Item, module: &str) -> Option<bool> {
    let (rows, cols) = item.matrix()?;
    let (last, widens) = match module.rsplit('.').next()? {
        "c_proj" if module.ends_with("mlp.c_proj") => ("c_proj", false),
        "c_proj" => return None,
        last => (last, true),
    };
    if rows == cols || (last == "c_attn" && cols != 3 * rows && rows != 3 * cols) {
        return None;
    }
    Some((cols > rows) == widens)
}

/// Whether there are any, and all are true.
fn agree(mut signs: impl Iterator<Item = bool>) -> bool {
    signs.next() == Some(true) && signs.all(|sign| sign)
}

/// Whether a config says which kind of model it is of.
fn names_a_model(config: &Value) -> bool {
    config.get("model_type").is_some_and(Value::is_string) || config.get("architectures").is_some_and(Value::is_array)
}

/// Whether a config, or one of a part of the model within it, is of a model with Conv1Ds.
fn has_conv1d(config: &Value) -> bool {
    let Some(config) = config.as_object() else { return false };
    let model = config.get("model_type").and_then(Value::as_str);
    let classes = config.get("architectures").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    match model {
        Some(model) if MODELS.contains(&model) => return true,
        None if classes.into_iter().any(|class| CLASSES.iter().any(|start| class.starts_with(start))) => return true,
        _ => {}
    }
    config.values().any(has_conv1d)
}
