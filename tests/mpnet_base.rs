//! all-mpnet-base-v2 against what Sentence Transformers computes with it (tests/vectors/mpnet.json).
//!
//! The model comes by `bash tests/fetch-mpnet.sh`. Ignored unless asked for.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::gpu;
use serde_json::Value;
use sparse24::graph::{Batching, Checkpoint};
use sparse24::text::{Encoder, Files, Pipeline, Tokenizer};
use sparse24::{DType, Device, models};

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn files() -> Files {
    Files::in_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/model/mpnet"))
}

/// all-mpnet-base-v2, as Sentence Transformers runs it.
fn embeddings_are_torchs(device: &Device) {
    let files = files();
    let graph = models::load(&files.config).unwrap();
    let limits = graph.limits();
    let tokenizer = Tokenizer::load(&files.tokenizer, limits).unwrap();
    let tokenizer = tokenizer.truncated_at(files.max_tokens(limits).unwrap()).unwrap();
    let checkpoint = Checkpoint::load(graph, &files.weights, None, DType::F32).unwrap();
    let pipeline = Pipeline::load(&files, checkpoint.graph().output_width()).unwrap();
    let encoder = Encoder::new(device, &checkpoint, pipeline).unwrap();
    let items = serde_json::from_str::<Value>(include_str!("vectors/mpnet.json")).unwrap()["model"]["items"].take();
    let items = items.as_array().unwrap();
    let texts: Vec<_> = items.iter().map(|item| item["text"].as_str().unwrap()).collect();
    let tokens = tokenizer.encode(&texts).unwrap();
    for (item, got) in items.iter().zip(&tokens.ids) {
        let got: Vec<f64> = got.iter().map(|&id| f64::from(id)).collect();
        assert_eq!(got, numbers(&item["ids"]), "{}", item["text"]);
    }
    let embeddings = encoder.embed(&tokens.ids, Batching::default()).unwrap();
    for (row, item) in items.iter().enumerate() {
        let expected = numbers(&item["embedding"]);
        let got = (0..expected.len()).map(|col| f64::from(embeddings.get(row, col)));
        let off = got.zip(&expected).map(|(got, expected)| (got - expected).abs()).fold(0.0, f64::max);
        assert!(
            embeddings.elements().to_f32().iter().all(|x| x.is_finite()) && off < 2e-5,
            "text {row} on {}: {off:.2e}",
            device.info().name()
        );
    }
}

#[test]
#[ignore = "needs model/mpnet"]
fn the_cpu_gives_torchs_embeddings() {
    embeddings_are_torchs(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU and model/mpnet"]
fn a_gpu_gives_torchs_embeddings() {
    gpu().iter().for_each(embeddings_are_torchs);
}
