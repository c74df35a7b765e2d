//! A multilayer perceptron whose layers are 2:4, masked and dense, as one submission.
//!
//! `cargo run --release --example mlp`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use sparse24::{
    Activation, DType, Device, Epilogue, GemmOperands, HostWeights, Mask, Matrix, Sparse24, VectorLen, prune,
};

pub(crate) fn main() -> sparse24::Result<()> {
    let device = Device::cpu()?; // or Device::auto()
    let (tokens, input, hidden, output) = (5, 32, 64, 8);
    let weights = |m, k, seed| Matrix::uniform(m, k, DType::F32, seed);

    // 32 -> 64 is 2:4, with a pattern for every 4 rows; 64 -> 64 masked, here by a band; 64 -> 8 dense.
    let (up, mid, down) = (weights(hidden, input, 1)?, weights(hidden, hidden, 2)?, weights(output, hidden, 3)?);
    let up = Sparse24::compress(&up, &prune::magnitude(&up, VectorLen::new(4)?)?)?;
    let band = Mask::from_fn(hidden, hidden, |row, col| row.abs_diff(col) < 8)?;
    let bias = device.upload(&Matrix::from_f32(1, hidden, &vec![0.1; hidden])?)?;
    let relu = Epilogue { activation: Activation::Relu, ..Epilogue::NONE };
    let skip = Epilogue { activation: Activation::Gelu, residual: true, ..Epilogue::NONE };
    let up = device.linear(&up, relu).with_bias(&bias);
    let mid = device.linear(HostWeights::Masked(mid, band), skip).with_bias(&bias);
    let down = device.linear(&down, Epilogue::NONE);

    // Buffers and calls are made once for a number of tokens. Activations stay on the device.
    let x = device.upload(&weights(tokens, input, 4)?)?;
    let [h1, h2] = [device.zeros(tokens, hidden, DType::F32)?, device.zeros(tokens, hidden, DType::F32)?];
    let y = device.zeros(tokens, output, DType::F32)?;
    let calls = [
        up.prepare(&GemmOperands::new(&x, &h1))?,
        mid.prepare(&GemmOperands::new(&h1, &h2).residual(&h1))?,
        down.prepare(&GemmOperands::new(&h2, &y))?,
    ];
    device.submit(&calls)?; // as often as wanted, with device.write(&x, ..) in between

    let y = device.read(&y)?;
    println!("{} x {} outputs, the first is {}", y.rows(), y.cols(), y.get(0, 0));
    assert!(y.elements().to_f32().iter().all(|y| y.is_finite() && *y != 0.0));
    Ok(())
}
