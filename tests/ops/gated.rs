//! Gates.

use sparse24::ops::gated::GatedKernel;
use sparse24::reference::gated as oracle;
use sparse24::{Activation, DType, Device, Elements, Gated, GatedGrad, Matrix};

use crate::common::{Data, matrix, rng, seed};
use crate::{Sink, differences_agree, into, numbers, poisoned, refuses, scaled, slightly_wrong, types, wide};

const ACTIVATIONS: [Activation; 6] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Relu6, Activation::None];

on_both_devices!(gates_agree_with_the_oracle);

fn gates_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // One feature; a ragged four; around the 64 that the CPU widens at once, and a workgroup of 256 fours; a model's.
    let sizes = [(1, 1), (3, 3), (5, 63), (2, 65), (4, 256), (5, 1023), (17, 1536)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for (j, gate) in ACTIVATIONS.into_iter().enumerate() {
            for (storage, output) in types(device, i + j) {
                for (data, factor) in [(Data::Whole, 1.0), (Data::Uniform, 4.0), (Data::Edge, 1.0)] {
                    let mut rng = rng(seed, i as u64);
                    let x = matrix(tokens, 2 * width, storage, data, &mut rng);
                    let scaled: Vec<f32> = x.elements().to_f32().iter().map(|v| v * factor).collect();
                    let x = Matrix::new(tokens, 2 * width, Elements::from_f32(storage, &scaled)).unwrap();
                    let want = oracle::expect(&x, gate, output).unwrap();
                    let (tx, y) = (device.upload(&x).unwrap(), poisoned(device, tokens, width, output));
                    device.prepare(&Gated { x: &tx, activation: gate, y: &y }).unwrap().run().unwrap();
                    let y = device.read(&y).unwrap();
                    let verdict = want.verify(&y).unwrap();
                    let what = format!("{tokens} x {width}, {gate:?}, {storage} to {output}, {data:?}: {verdict}");
                    assert!(verdict.error_over_bound <= 1.0, "{what} on {}", device.info().name());
                    assert!(verdict.undecided * 2 < verdict.checked, "{what}");
                    if matches!(data, Data::Uniform) && storage == output && width > 60 {
                        slightly_wrong(&want, &y, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let mut rng = rng(seed(), 0);
    let x = wide(&matrix(4, 10, DType::F32, Data::Uniform, &mut rng)) * 5.0;
    let dy = wide(&matrix(4, 5, DType::F32, Data::Uniform, &mut rng));
    for gate in ACTIVATIONS {
        let dx = oracle::grad(x.view(), gate, dy.view());
        differences_agree(&dx, &x, |x| (oracle::exact(x.view(), gate) * &dy).sum());
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // One feature; around the 64 that the CPU widens at once and the 16 tokens of its tasks; a workgroup of 256; a
    // model's.
    let sizes = [(1, 1), (3, 3), (5, 63), (2, 65), (16, 16), (1, 257), (17, 1536)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for gate in ACTIVATIONS {
            for (data, factor) in [(Data::Whole, 1.0), (Data::Uniform, 4.0), (Data::Edge, 1.0)] {
                for add in [false, true] {
                    let mut rng = rng(seed, i as u64);
                    let x = scaled(&matrix(tokens, 2 * width, DType::F32, data, &mut rng), factor);
                    let dy = matrix(tokens, width, DType::F32, Data::Uniform, &mut rng);
                    let want = oracle::expect_grad(&x, gate, &dy).unwrap();
                    let [tx, tdy] = [&x, &dy].map(|m| device.upload(m).unwrap());
                    let sink = Sink::new(device, (tokens, 2 * width), add, &mut rng);
                    let grad = GatedGrad { x: &tx, activation: gate, dy: &tdy, dx: sink.gradient() };
                    device.prepare(&grad).unwrap().run().unwrap();
                    let what = format!("{tokens} x {width}, {gate:?}, {data:?}, {add}");
                    let verdict = sink.verify(device, &want, &what);
                    assert!(verdict.undecided == 0, "{what}: {verdict}");
                    if !add && matches!(data, Data::Uniform) && width > 60 {
                        slightly_wrong(&want, &device.read(&sink.to).unwrap(), &what);
                    }
                }
            }
        }
    }
}

on_both_devices!(edge_values_stay_what_they_are);

/// Large gates open and close, and no sigmoid or error function overflows on the way; a NaN stays one.
fn edge_values_stay_what_they_are(device: &Device) {
    let gates = [100.0, -100.0, 1e30, -1e30, 0.0, f32::NAN, 3e4];
    let n = gates.len();
    let x = [&gates[..], &[2.0; 7]].concat();
    let x = device.upload(&Matrix::from_f32(1, 2 * n, &x).unwrap()).unwrap();
    for gate in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let y = poisoned(device, 1, n, DType::F32);
        device.prepare(&Gated { x: &x, activation: gate, y: &y }).unwrap().run().unwrap();
        let y = numbers(device, &y);
        let what = format!("{gate:?} on {}: {y:?}", device.info().name());
        assert!((y[0] - 200.0).abs() < 1e-3 && y[1].abs() < 1e-3 && y[4] == 0.0, "{what}");
        assert!((y[6] - 6e4).abs() < 0.1 && y[5].is_nan(), "{what}");
        assert!((y[2] - 2e30).abs() < 1e24 && y[3].abs() < 1e24, "{what}");
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols, dtype| device.zeros(rows, cols, dtype).unwrap();
    let (x, y) = (tensor(6, 8, DType::F32), tensor(6, 4, DType::F32));
    let gated = Gated { x: &x, activation: Activation::Silu, y: &y };
    refuses(device, &Gated { y: &tensor(6, 5, DType::F32), ..gated }, &["x has shape [6, 8], expected [6, 10]"]);
    refuses(device, &Gated { y: &tensor(5, 4, DType::F32), ..gated }, &["x", "[5, 8]"]);
    refuses(device, &Gated { x: &tensor(6, 8, DType::Bf16), ..gated }, &["x is bf16"]);
    // Outputs without elements are no error.
    for (tokens, width) in [(0, 4), (3, 0)] {
        let (x, y) = (tensor(tokens, 2 * width, DType::F32), tensor(tokens, width, DType::F32));
        device.prepare(&Gated { x: &x, y: &y, ..gated }).unwrap().run().unwrap();
    }
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols, dtype| device.zeros(rows, cols, dtype).unwrap();
    let (x, dy, to) = (tensor(6, 8, DType::F32), tensor(6, 4, DType::F32), tensor(6, 8, DType::F32));
    let grad = GatedGrad { x: &x, activation: Activation::Silu, dy: &dy, dx: into(&to) };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &GatedGrad { dy: &to, ..grad }, &["x has shape [6, 8], expected [6, 16]"]);
    refuses(device, &GatedGrad { dx: into(&dy), ..grad }, &["dx has shape [6, 4], expected [6, 8]"]);
    refuses(device, &GatedGrad { dx: into(&x), ..grad }, &["dx shares its memory with x"]);
    refuses(device, &GatedGrad { x: &tensor(6, 8, DType::F16), ..grad }, &["x is f16, expected f32"]);
    refuses(device, &GatedGrad { dx: into(&tensor(6, 8, DType::F16)), ..grad }, &["dx is f16, expected f32"]);
    for (tokens, width) in [(0, 4), (3, 0)] {
        let [x, to] = [0; 2].map(|_| tensor(tokens, 2 * width, DType::F32));
        let dy = tensor(tokens, width, DType::F32);
        device.prepare(&GatedGrad { x: &x, dy: &dy, dx: into(&to), ..grad }).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |storage| {
        let kernel = GatedKernel::new(7, Activation::Gelu, storage, DType::F16);
        kernel.map(|k| k.to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(says(DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F32), Ok("gated-f32f32-gelu-scalars-out_f16".into()));
}
