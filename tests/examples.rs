//! The examples, run: `tests/examples`, an example of each name in `Cargo.toml`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[cfg(feature = "text")]
#[path = "examples/bert.rs"]
#[allow(dead_code, reason = "its main takes the folder from the command line")]
mod bert;
mod common;
#[path = "examples/layer.rs"]
mod layer;
#[path = "examples/mlp.rs"]
mod mlp;
#[path = "examples/own_device.rs"]
mod own_device;
#[cfg(feature = "text")]
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

#[test]
fn a_layer_on_the_cpu() {
    layer::main().unwrap();
}

#[test]
fn a_multilayer_perceptron() {
    mlp::main().unwrap();
}

#[cfg(feature = "text")]
#[test]
fn a_bert_in_ten_lines() {
    let dir = tempfile::tempdir().unwrap();
    tiny_bert::TinyBert::new(24).write(dir.path());
    let similarity = bert::similarity(dir.path().to_str().unwrap()).unwrap();
    assert!(similarity.abs() <= 1.0 && similarity != 0.0, "{similarity}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_device_of_the_callers_own() {
    if common::gpu().is_some() {
        own_device::main().unwrap();
    }
}
