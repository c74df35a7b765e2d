//! One 2:4 layer on the CPU: pruned, compressed, run, and checked against the f64 reference.
//!
//! `cargo run --release --example layer`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use sparse24::reference::Operands;
use sparse24::{Activation, DType, Device, Epilogue, Matrix, Oracle, Problem, Sample, Sparse24, VectorLen, prune};

pub(crate) fn main() -> sparse24::Result<()> {
    // W is [out features, in features], X and Y are [tokens, features].
    let (tokens, m, k) = (16, 256, 512);
    let w = Matrix::uniform(m, k, DType::F32, 1)?;
    let x = Matrix::uniform(tokens, k, DType::F32, 2)?;
    let bias = vec![0.5; m];

    // Two of every four weights stay, the same two in 32 neighbouring rows.
    let mask = prune::magnitude(&w, VectorLen::new(32)?)?;
    let compressed = Sparse24::compress(&w, &mask)?;

    // Y = gelu(X Wᵀ + bias). `Device::auto()` would take a GPU if there is one.
    let device = Device::cpu()?;
    let epilogue = Epilogue { activation: Activation::Gelu, ..Epilogue::NONE };
    let layer = device.linear(&compressed, epilogue).with_bias(&device.upload(&Matrix::from_f32(1, m, &bias)?)?);
    let y = device.read(&layer.forward(&device.upload(&x)?)?)?;

    // Every element, within an error bound that is derived from k.
    let epilogue = layer.epilogue();
    let problem = Problem { epilogue, ..Problem::linear(layer.op(), m, tokens, k, DType::F32) };
    let weights = compressed.into();
    let verdict = Oracle::new(&problem, Operands::new(&weights, &x).bias(&bias))?.verify(&y, Sample::All)?;
    println!("{}{verdict}", layer.plan(tokens, DType::F32)?.explain());
    assert!(verdict.passed());
    Ok(())
}
