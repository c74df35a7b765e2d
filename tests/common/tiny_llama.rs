//! Small language models of tests/vectors/llama.py, with what torch makes of some texts, and a folder of one of them
//! whose tokens are letters.
#![allow(dead_code, unreachable_pub, reason = "each test file includes this and uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sparse24::graph::Checkpoint;
use sparse24::{DType, models};

/// A small model: its weights are exact in f16.
pub struct TinyLlama {
    pub name: String,
    pub checkpoint: Checkpoint,
    /// Texts with torch's logits, a row for each token.
    pub texts: Vec<(Vec<u32>, Vec<f64>)>,
}

fn vectors(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors")).join(name)
}

fn reference() -> Vec<Value> {
    let json: Value = serde_json::from_str(&fs::read_to_string(vectors("llama.json")).unwrap()).unwrap();
    json["models"].as_array().unwrap().clone()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn of(name: &str) -> Value {
    reference().into_iter().find(|model| model["name"] == name).unwrap()
}

/// The config of a model.
pub fn config(name: &str) -> Value {
    of(name)["config"].clone()
}

fn texts_of(model: &Value) -> Vec<(Vec<u32>, Vec<f64>)> {
    let items = model["items"].as_array().unwrap();
    let ids = |item: &Value| numbers(&item["ids"]).into_iter().map(|id| id as u32).collect();
    items.iter().map(|item| (ids(item), numbers(&item["logits"]))).collect()
}

/// The texts of a model with torch's logits.
pub fn texts(name: &str) -> Vec<(Vec<u32>, Vec<f64>)> {
    texts_of(&of(name))
}

/// Writes the tensors of a model by their own names.
fn write_weights(name: &str, path: &Path) {
    let bytes = fs::read(vectors("llama_tiny.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let own = all.tensors().into_iter().filter_map(|(tensor, view)| {
        let own = tensor.strip_prefix(&format!("{name}/"))?.to_owned();
        Some((
            own,
            TensorView::new(view.dtype(), view.shape().to_vec(), view.data()).unwrap().data().to_vec(),
            view.dtype(),
            view.shape().to_vec(),
        ))
    });
    let own: Vec<(String, Vec<u8>, Dtype, Vec<usize>)> = own.collect();
    let views: BTreeMap<&str, TensorView<'_>> = own
        .iter()
        .map(|(name, data, dtype, shape)| (&**name, TensorView::new(*dtype, shape.clone(), data).unwrap()))
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// All of them.
pub fn tiny(dtype: DType) -> Vec<TinyLlama> {
    let dir = tempfile::tempdir().unwrap();
    let load = |model: Value| {
        let name = model["name"].as_str().unwrap().to_owned();
        let weights = dir.path().join(&name);
        write_weights(&name, &weights);
        let graph = models::parse(&model["config"].to_string()).unwrap();
        let checkpoint = Checkpoint::load(graph, &weights, None, dtype).unwrap();
        TinyLlama { name, checkpoint, texts: texts_of(&model) }
    };
    reference().into_iter().map(load).collect()
}

/// Writes a folder of a model, whose tokens are the letters from `a` to `z`.
pub fn write(name: &str, folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config(name).to_string()).unwrap();
    write_weights(name, &folder.join("model.safetensors"));
    let vocabulary: BTreeMap<String, usize> = (0..26).map(|id| (char::from(b'a' + id as u8).to_string(), id)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": false},
        "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "z"},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// Makes a weight of the folder's model infinite.
pub fn spoil(folder: &Path) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let (name, infinite) = ("model.layers.0.mlp.up_proj.weight", half::f16::INFINITY.to_le_bytes());
    let own: Vec<(String, Vec<u8>, Dtype, Vec<usize>)> =
        all.tensors().into_iter().map(|(n, v)| (n, v.data().to_vec(), v.dtype(), v.shape().to_vec())).collect();
    let views = own.iter().map(|(n, data, dtype, shape)| {
        let mut data = data.clone();
        if n == name {
            data[..2].copy_from_slice(&infinite);
        }
        (n.clone(), data, *dtype, shape.clone())
    });
    let views: Vec<_> = views.collect();
    let views: BTreeMap<&str, TensorView<'_>> = views
        .iter()
        .map(|(name, data, dtype, shape)| (&**name, TensorView::new(*dtype, shape.clone(), data).unwrap()))
        .collect();
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}
