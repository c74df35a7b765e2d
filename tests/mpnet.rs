//! MPNet, a second architecture in a file of its own: its graph against what torch computes, on devices and in f64, and
//! every tool on it.
//!
//! The model is small; it and what torch makes of it are in tests/vectors (see its README). Tests that need a GPU are
//! ignored unless asked for. The real model is in tests/mpnet_base.rs.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[cfg(feature = "cli")]
#[path = "common/binary.rs"]
mod binary;
mod common;
#[cfg(feature = "cli")]
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::path::{Path, PathBuf};

use common::gpu;
use serde_json::Value;
use sparse24::graph::{Batching, Checkpoint, Sparsity};
use sparse24::text::{Encoder, Pipeline, twin};
use sparse24::{DType, Device, VectorLen, models};

fn vectors(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors")).join(name)
}

fn reference(part: &str) -> Value {
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(vectors("mpnet.json")).unwrap()).unwrap();
    json[part].take()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

/// The largest distance of two lists of numbers.
fn distance(got: impl IntoIterator<Item = f64>, expected: &[f64]) -> f64 {
    let got: Vec<_> = got.into_iter().collect();
    assert_eq!(got.len(), expected.len());
    assert!(got.iter().all(|x| x.is_finite()));
    got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The small model: its weights are exact in f16.
fn tiny(dtype: DType) -> Checkpoint {
    let graph = models::parse(&reference("tiny")["config"].to_string()).unwrap();
    Checkpoint::load(graph, &vectors("mpnet_tiny.safetensors"), None, dtype).unwrap()
}

/// Its texts with torch's hidden states.
fn texts() -> Vec<(Vec<u32>, Vec<f64>)> {
    let items = reference("tiny")["items"].take();
    items.as_array().unwrap().iter().map(|item| (ids(&item["ids"]), numbers(&item["hidden"]))).collect()
}

/// Torch computed in f64, and eight digits were written.
#[test]
fn the_twin_agrees_with_torch() {
    let checkpoint = tiny(DType::F32);
    for (text, hidden) in texts() {
        let off = distance(twin::hidden_states(&checkpoint, &[&text]).unwrap(), &hidden);
        assert!(off < 1e-7, "{} tokens: {off:.2e}", text.len());
    }
}

fn agrees_with_torch(device: &Device) {
    let texts = texts();
    let all: Vec<&[u32]> = texts.iter().map(|(text, _)| &text[..]).collect();
    let encoder = Encoder::new(device, &tiny(DType::F32), Pipeline::default()).unwrap();
    // Padded to the longest, in one batch.
    let forward = encoder.forward(all.len(), 24).unwrap();
    encoder.embed_batch(&forward, &all).unwrap();
    let states = device.read(forward.tap(forward.graph().outputs()[0]).unwrap()).unwrap();
    for (row, (text, hidden)) in texts.iter().enumerate() {
        let got = (0..text.len()).flat_map(|token| (0..40).map(move |col| (row * 24 + token, col)));
        let off = distance(got.map(|(row, col)| f64::from(states.get(row, col))), hidden);
        // States are about 1. A wrong bucket or side is above 0.4.
        assert!(off < 2e-5, "{} tokens on {}: {off:.2e}", text.len(), device.info().name());
    }
}

#[test]
fn the_cpu_agrees_with_torch() {
    agrees_with_torch(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_agrees_with_torch() {
    gpu().iter().for_each(agrees_with_torch);
}

/// Dense, 2:4 and masked, in f32 and f16: what the twin of the same weights computes.
fn agrees_with_the_twin(device: &Device) {
    let texts: Vec<_> = texts().into_iter().map(|(text, _)| text).collect();
    let half = device.caps().is_none_or(|caps| caps.f16);
    for (dtype, allowed) in [(DType::F32, 1e-5), (DType::F16, 2e-2)].into_iter().take(1 + usize::from(half)) {
        let dense = tiny(dtype);
        let (mut pruned, mut masked) = (dense.clone(), dense.clone());
        pruned.prune(Sparsity::TwoFour(VectorLen::new(8).unwrap())).unwrap();
        masked.mask(VectorLen::ONE).unwrap();
        for checkpoint in [&dense, &pruned, &masked] {
            let expected = twin::embeddings(checkpoint, &Pipeline::default(), &texts).unwrap();
            let encoder = Encoder::new(device, checkpoint, Pipeline::default()).unwrap();
            let got = encoder.embed(&texts, Batching { texts: 2, tokens: 64 }).unwrap();
            let off = distance(got.elements().to_f32().into_iter().map(f64::from), expected.as_slice().unwrap());
            assert!(off < allowed, "{dtype} on {}: {off:.2e}", device.info().name());
        }
    }
}

#[test]
fn the_cpu_agrees_with_the_twin_in_every_form() {
    agrees_with_the_twin(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_agrees_with_the_twin_in_every_form() {
    gpu().iter().for_each(agrees_with_the_twin);
}

/// Channels inside of a head, and of the feed-forward part; heads stay, as all layers share one table of biases.
#[test]
fn another_order_of_channels_computes_the_same() {
    let before = tiny(DType::F32);
    let texts: Vec<_> = texts().into_iter().map(|(text, _)| text).collect();
    let mut after = before.clone();
    let budget = sparse24::prune::permute::Budget::sweeps(4);
    let found = after.permute(VectorLen::new(4).unwrap(), &budget, |_, w| Ok(w.to_array().mapv(f32::abs))).unwrap();
    assert_eq!(found.len(), 4);
    assert!(found.iter().flat_map(|of| &of.kept).any(|(_, kept)| kept.after > kept.before));
    let states = |checkpoint: &Checkpoint| twin::hidden_states(checkpoint, &texts).unwrap();
    let off = distance(states(&after), states(&before).as_slice().unwrap());
    assert!(off < 1e-12, "{off:.2e}");

    let heads: Vec<usize> = (8..40).chain(0..8).collect();
    let error = after.reorder("encoder.layer.0.attention.attn", &[heads.clone(), heads]).unwrap_err().to_string();
    assert_eq!(error, "blocks of encoder.layer.0.attention.attn stay at their places, and block 1 moves");
}

/// The whole way through the command line, on a folder of the small model.
#[cfg(feature = "cli")]
mod command_line {
    use std::fs;

    use super::binary::sparse24;
    use super::tiny_bert::TinyBert;
    use super::*;
    use serde_json::json;

    fn run(args: &[&str]) -> String {
        sparse24(args).exits(0).0
    }

    /// The model with a tokenizer of as many words, some texts, and pairs with scores.
    fn folder(dir: &Path) -> [String; 3] {
        let model = dir.join("model");
        fs::create_dir(&model).unwrap();
        fs::write(model.join("config.json"), reference("tiny")["config"].to_string()).unwrap();
        fs::write(model.join("tokenizer.json"), TinyBert::new(1).tokenizer.to_string()).unwrap();
        fs::copy(vectors("mpnet_tiny.safetensors"), model.join("model.safetensors")).unwrap();
        let texts = "the cat sat on the mat .\nthe dog ran\ncats ran on\na dog sat .\nmat\n";
        let pairs = "the cat sat,the cats ran,4.5\nthe dog ran,on the mat .,1.0\ncat,dog ran on mats,2.5\n";
        fs::write(dir.join("texts.txt"), texts).unwrap();
        fs::write(dir.join("pairs.csv"), pairs).unwrap();
        ["model", "texts.txt", "pairs.csv"].map(|name| dir.join(name).to_str().unwrap().to_owned())
    }

    #[test]
    fn it_is_pruned_by_every_method_and_evaluated() {
        let dir = tempfile::tempdir().unwrap();
        let [model, texts, pairs] = folder(dir.path());
        for method in ["magnitude", "magnitude-l2", "random", "obd", "wanda", "sparsegpt"] {
            let out = dir.path().join(method).to_str().unwrap().to_owned();
            let mut args = vec!["prune", &model, &out, "--method", method, "--vector", "4", "--device", "cpu"];
            if ["obd", "wanda", "sparsegpt"].contains(&method) {
                args.extend(["--calibration", &texts]);
            }
            run(&args);
            let json = run(&["eval", "--model", &out, "--pairs", &pairs, "--device", "cpu", "--json"]);
            let result: Value = serde_json::from_str(&json).unwrap();
            assert_eq!(result["linear_layers"], json!([{"form": "2:4", "vector": 4, "stored": true, "layers": 12}]));
            assert!(result["spearman"].is_number(), "{method}");
        }
        let permuted = dir.path().join("permuted").to_str().unwrap().to_owned();
        run(&["prune", &model, &permuted, "--permute", "1", "--method", "wanda", "--calibration", &texts]);
        let careful = dir.path().join("careful").to_str().unwrap().to_owned();
        let chosen =
            run(&["prune", &model, &careful, "--pairs", &pairs, "--max-drop", "1", "--vector", "1,8", "--json"]);
        let chosen: Value = serde_json::from_str(&chosen).unwrap();
        assert_eq!(chosen["chosen"]["layers"].as_array().unwrap().len(), 8, "{chosen}");
        // Any speed will do: whether it is reached is the machine's affair, that every layer was timed is not.
        let fast = dir.path().join("fast").to_str().unwrap().to_owned();
        let args =
            ["prune", &model, &fast, "--input", &texts, "--target-speedup", "1000", "--seq", "16", "--device", "cpu"];
        let ran = sparse24(args);
        assert!(ran.code != 0 && ran.stderr.contains("--target-speedup"), "{ran:?}");
    }

    #[test]
    fn its_layers_are_ablated_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let [model, texts, _] = folder(dir.path());
        let args = ["sensitivity", &model, "--input", &texts, "--vector", "1,32", "--device", "cpu", "--json"];
        let result: Value = serde_json::from_str(&run(&args)).unwrap();
        let rows = result["rows"].as_array().unwrap();
        // Q, K and V have 40 rows each, which blocks of 8 divide.
        let of = |name: &str| -> Vec<Value> {
            rows.iter().filter(|row| row["layer"] == name).map(|row| row["vector"].clone()).collect()
        };
        assert_eq!(of("encoder.layer.0.attention.attn.qkv"), [1, 8]);
        assert_eq!(of("encoder.layer.1.attention.attn.o"), [1, 32]);
        assert_eq!(rows.len(), 16);
        assert!(rows.iter().any(|row| row["drop"].as_f64().unwrap() > 1e-4));
    }

    #[test]
    fn its_embeddings_are_printed_and_its_passes_are_timed() {
        let dir = tempfile::tempdir().unwrap();
        let [model, ..] = folder(dir.path());
        let line = run(&["embed", "--model", &model, "--text", "the cat", "--device", "cpu", "--sparsity", "2:4"]);
        let embedding = numbers(&serde_json::from_str::<Value>(&line).unwrap()["embedding"]);
        assert!((embedding.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5 && embedding.len() == 40);
        let args = ["bench", "--model", &model, "--batch", "2", "--seq", "8", "--device", "cpu", "--quick", "--json"];
        let result: Value = serde_json::from_str(&run(&args)).unwrap();
        assert_eq!((&result["layers"], &result["hidden"]), (&json!(2), &json!(40)));
        assert!(result["rows"].as_array().unwrap().iter().all(|row| row["verified"] == true));
    }
}
