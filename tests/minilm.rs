//! all-MiniLM-L6-v2 against PyTorch: token ids, hidden states, embeddings, and how well they rank sentences.
//!
//! The model comes by `bash tests/fetch-minilm.sh`; the reference and the sentences are in the folder that
//! SPARSE24_DATA names, else in ../shared/data. Neither is in the repository, so every test is ignored unless asked
//! for: `cargo test --release --test minilm -- --ignored`, with SPARSE24_TEST_DEVICE and SPARSE24_REQUIRE_GPU as for
//! the others.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[cfg(feature = "cli")]
#[path = "common/binary.rs"]
mod binary;
mod common;

use std::path::PathBuf;

#[cfg(feature = "cli")]
use binary::Run;
use common::gpu;
use serde_json::Value;
use sparse24::graph::{Batching, Checkpoint, Sparsity};
use sparse24::text::{Encoder, Files, Pipeline, Tokenizer, twin};
use sparse24::{DType, Device, models};

fn files() -> Files {
    Files::in_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/model/minilm"))
}

fn data(name: &str) -> PathBuf {
    let folder = std::env::var_os("SPARSE24_DATA").map(PathBuf::from);
    folder.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data").into()).join(name)
}

fn checkpoint(dtype: DType) -> Checkpoint {
    let files = files();
    Checkpoint::load(models::load(&files.config).unwrap(), &files.weights, None, dtype).unwrap()
}

fn tokenizer() -> Tokenizer {
    let files = files();
    Tokenizer::load(&files.tokenizer, models::load(&files.config).unwrap().limits()).unwrap()
}

/// What PyTorch computed, one entry a sentence.
fn expected() -> Vec<Value> {
    let text = std::fs::read_to_string(data("minilm_reference.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let Value::Array(items) = json["items"].take() else { panic!("no items") };
    assert_eq!(items.len(), 3);
    items
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The largest distance of two lists of numbers.
fn distance(got: impl IntoIterator<Item = f64>, expected: &[f64]) -> f64 {
    let got: Vec<_> = got.into_iter().collect();
    assert_eq!(got.len(), expected.len());
    assert!(got.iter().all(|x| x.is_finite()));
    got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
#[ignore = "needs model/minilm and ../shared/data"]
fn token_ids_are_those_of_transformers() {
    let tokenizer = tokenizer();
    for item in expected() {
        let ids = tokenizer.encode(&[item["sentence"].as_str().unwrap()]).unwrap().ids;
        assert_eq!(ids[0].iter().map(|&id| f64::from(id)).collect::<Vec<_>>(), numbers(&item["token_ids"]));
    }
}

/// The twin against PyTorch's f32, which has round-off of its own.
#[test]
#[ignore = "needs model/minilm and ../shared/data"]
fn the_twin_agrees_with_pytorch() {
    let checkpoint = checkpoint(DType::F32);
    for item in expected() {
        let text: Vec<u32> = numbers(&item["token_ids"]).into_iter().map(|id| id as u32).collect();
        let states = twin::hidden_states(&checkpoint, &[&text]).unwrap();
        let rows = item["last_hidden_state"].as_array().unwrap();
        let off = distance(states, &rows.iter().flat_map(numbers).collect::<Vec<_>>());
        assert!(off < 5e-6, "hidden states: {off:.2e}");
        let embedding = twin::embeddings(&checkpoint, &Pipeline::default(), &[&text]).unwrap();
        let off = distance(embedding, &numbers(&item["normalized"]));
        assert!(off < 1e-6, "embedding: {off:.2e}");
    }
}

fn embeddings_are_pytorchs(device: &Device, dtype: DType, allowed: f64) {
    let items = expected();
    let sentences: Vec<_> = items.iter().map(|item| item["sentence"].as_str().unwrap()).collect();
    let model = Encoder::new(device, &checkpoint(dtype), Pipeline::default()).unwrap();
    // All in one padded batch.
    let embeddings = model.embed(&tokenizer().encode(&sentences).unwrap().ids, Batching::default()).unwrap();
    for (row, item) in items.iter().enumerate() {
        let got = (0..embeddings.cols()).map(|col| f64::from(embeddings.get(row, col)));
        let off = distance(got, &numbers(&item["normalized"]));
        assert!(off < allowed, "{dtype} on {}, sentence {row}: {off:.2e} off", device.info().name());
    }
}

#[test]
#[ignore = "needs model/minilm and ../shared/data"]
fn the_cpu_gives_pytorchs_embeddings() {
    let device = Device::cpu().unwrap();
    embeddings_are_pytorchs(&device, DType::F32, 1e-6);
    embeddings_are_pytorchs(&device, DType::F16, 5e-4);
}

#[test]
#[ignore = "needs a GPU, model/minilm and ../shared/data"]
fn a_gpu_gives_pytorchs_embeddings() {
    let Some(device) = gpu() else { return };
    embeddings_are_pytorchs(&device, DType::F32, 1e-6);
    if device.caps().unwrap().f16 {
        embeddings_are_pytorchs(&device, DType::F16, 5e-4);
    }
}

/// Every form of the weights, on real ones: the device does what the twin of the same weights does.
#[test]
#[ignore = "needs model/minilm and ../shared/data"]
fn pruned_and_masked_layers_do_what_the_twin_does() {
    let device = Device::cpu().unwrap();
    let items = expected();
    let sentences: Vec<_> = items.iter().map(|item| item["sentence"].as_str().unwrap()).collect();
    let texts = tokenizer().encode(&sentences).unwrap().ids;
    let dense = checkpoint(DType::F32);
    let dense_embeddings = twin::embeddings(&dense, &Pipeline::default(), &texts).unwrap();
    for vector in [1, 32, 128].map(|v| sparse24::VectorLen::new(v).unwrap()) {
        let (mut pruned, mut masked) = (dense.clone(), dense.clone());
        pruned.prune(Sparsity::TwoFour(vector)).unwrap();
        masked.mask(vector).unwrap();
        let expected = twin::embeddings(&pruned, &Pipeline::default(), &texts).unwrap();
        // Else the forms would not be told from dense.
        let pruning = distance(expected.iter().copied(), dense_embeddings.as_slice().unwrap());
        assert!(pruning > 1e-2, "{pruning}");
        for checkpoint in [&pruned, &masked] {
            let encoder = Encoder::new(&device, checkpoint, Pipeline::default()).unwrap().no_dense_fallback();
            let embeddings = encoder.embed(&texts, Batching::default()).unwrap();
            let got = embeddings.elements().to_f32().into_iter().map(f64::from);
            let off = distance(got, expected.as_slice().unwrap());
            assert!(off < 1e-6, "V = {vector}: {off:.2e}");
        }
    }
}

/// The whole way through the command line. Figures: torch f32, 36 linear layers pruned by magnitude.
#[cfg(feature = "cli")]
#[test]
#[ignore = "needs model/minilm and ../shared/data, and minutes unless built with --release"]
fn eval_ranks_sentences_as_pytorch_does() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("eval.json");
    for (sparsity, spearman, allowed) in [("none", 0.8672, 1e-3), ("2:4", 0.8210, 2e-3)] {
        let model = files().config.parent().unwrap().to_owned();
        let mut command = binary::command(["eval", "--device", "cpu", "--sparsity", sparsity, "--model"]);
        command.arg(model).arg("--pairs").arg(data("stsb-dev.csv")).arg("--json").arg(&json);
        command.run().exits(0);
        let result = binary::json(&json);
        let got = result["spearman"].as_f64().unwrap();
        assert!((got - spearman).abs() < allowed, "{sparsity}: {got}");
        assert_eq!((&result["pairs"], &result["truncated"]), (&1500.into(), &0.into()));
    }
}
