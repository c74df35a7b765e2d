//! Activations by themselves.

use sparse24::ops::activation::ActivationKernel;
use sparse24::reference::activation as oracle;
use sparse24::{Activate, ActivateGrad, Activation, DType, Device, Gradient, Matrix};

use crate::common::{Data, matrix, rng, seed};
use crate::{Sink, differences_agree, expect, numbers, poisoned, refuses, scaled, slightly_wrong, types, wide};

/// One element; around the 64 that the CPU widens at once, a workgroup of 256, and the 8192 of a task; a model's.
const SIZES: [(usize, usize); 7] = [(1, 1), (5, 13), (2, 32), (1, 257), (3, 2731), (1, 8193), (17, 1536)];

on_both_devices!(activations_agree_with_the_oracle);

fn activations_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, (rows, cols)) in SIZES.into_iter().enumerate() {
        for (j, activation) in Activation::ALL.into_iter().enumerate() {
            for (storage, output) in types(device, i + j) {
                for (data, factor) in [(Data::Whole, 1.0), (Data::Uniform, 8.0), (Data::Edge, 1.0)] {
                    for adds in [false, true] {
                        let mut rng = rng(seed, i as u64);
                        let x = scaled(&matrix(rows, cols, storage, data, &mut rng), factor);
                        let residual = adds.then(|| matrix(rows, cols, output, Data::Uniform, &mut rng));
                        let want = oracle::expect(activation, &x, residual.as_ref(), output).unwrap();
                        let (tx, y) = (device.upload(&x).unwrap(), poisoned(device, rows, cols, output));
                        let residual = residual.map(|residual| device.upload(&residual).unwrap());
                        let call = Activate { activation, x: &tx, residual: residual.as_ref(), y: &y };
                        let call = device.prepare(&call).unwrap();
                        let what = format!("{rows} x {cols}, {activation:?}, {storage} to {output}, {data:?}, {adds}");
                        expect(device, &call, &y, &want, &what);
                        if matches!(data, Data::Uniform) && storage == output && cols > 60 {
                            slightly_wrong(&want, &device.read(&y).unwrap(), &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let mut rng = rng(seed(), 0);
    let [x, dy] = [5.0, 1.0].map(|factor| wide(&matrix(8, 8, DType::F32, Data::Uniform, &mut rng)) * factor);
    for activation in Activation::ALL {
        let dx = oracle::grad(activation, x.view(), dy.view());
        differences_agree(&dx, &x, |x| (oracle::exact(activation, x.view(), None) * &dy).sum());
    }
    // By hand, where differences say nothing, and where they would overflow.
    assert_eq!([-1.0, 0.0, 1e-30].map(|x| oracle::slope(Activation::Relu, x)), [0.0, 0.0, 1.0]);
    let ends = [-1.0, 0.0, 1e-30, 5.9, 6.0, 1e30];
    assert_eq!(ends.map(|x| oracle::slope(Activation::Relu6, x)), [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        assert_eq!([-1e30, 0.0, 1e30].map(|x| oracle::slope(activation, x)), [0.0, 0.5, 1.0], "{activation:?}");
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, (rows, cols)) in SIZES.into_iter().enumerate() {
        for activation in Activation::ALL {
            for (data, factor) in [(Data::Whole, 1.0), (Data::Uniform, 4.0), (Data::Uniform, 20.0), (Data::Edge, 1.0)] {
                for add in [false, true] {
                    let mut rng = rng(seed, i as u64);
                    let x = scaled(&matrix(rows, cols, DType::F32, data, &mut rng), factor);
                    let dy = matrix(rows, cols, DType::F32, Data::Uniform, &mut rng);
                    let want = oracle::expect_grad(activation, &x, &dy).unwrap();
                    let [tx, tdy] = [&x, &dy].map(|m| device.upload(m).unwrap());
                    let sink = Sink::new(device, (rows, cols), add, &mut rng);
                    let grad = ActivateGrad { activation, x: &tx, dy: &tdy, dx: sink.gradient() };
                    device.prepare(&grad).unwrap().run().unwrap();
                    let what = format!("{rows} x {cols}, {activation:?}, {data:?} * {factor}, {add}");
                    let verdict = sink.verify(device, &want, &what);
                    assert!(verdict.undecided == 0, "{what}: {verdict}");
                    if !add && matches!(data, Data::Uniform) && cols > 60 {
                        slightly_wrong(&want, &device.read(&sink.to).unwrap(), &what);
                    }
                }
            }
        }
    }
}

on_both_devices!(edge_values_stay_what_they_are);

/// Slopes are those of a closed and of an open gate far from zero, and nothing overflows on the way; a NaN stays one
/// but where the slope is the same everywhere.
fn edge_values_stay_what_they_are(device: &Device) {
    let x = [100.0, -100.0, 1e30, -1e30, 0.0, f32::NAN, 16.5];
    let n = x.len();
    let x = device.upload(&Matrix::from_f32(1, n, &x).unwrap()).unwrap();
    let dy = device.upload(&Matrix::from_f32(1, n, &[2.0; 7]).unwrap()).unwrap();
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let to = poisoned(device, 1, n, DType::F32);
        let dx = Gradient { to: &to, add: false };
        device.prepare(&ActivateGrad { activation, x: &x, dy: &dy, dx }).unwrap().run().unwrap();
        let dx = numbers(device, &to);
        let what = format!("{activation:?} on {}: {dx:?}", device.info().name());
        let near = |at: usize, value: f32| (dx[at] - value).abs() < 1e-5;
        assert!(near(0, 2.0) && near(1, 0.0) && near(2, 2.0) && near(3, 0.0) && near(6, 2.0), "{what}");
        let relu = activation == Activation::Relu;
        assert!(near(4, if relu { 0.0 } else { 1.0 }) && (relu || dx[5].is_nan()), "{what}");
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols, dtype| device.zeros(rows, cols, dtype).unwrap();
    let f32s = |rows, cols| tensor(rows, cols, DType::F32);
    let (x, y, other, half) = (f32s(6, 8), f32s(6, 8), f32s(5, 8), tensor(6, 8, DType::F16));
    let act = Activate { activation: Activation::Gelu, x: &x, residual: None, y: &y };
    refuses(device, &Activate { y: &other, ..act }, &["y has shape [5, 8], expected [6, 8]"]);
    refuses(device, &Activate { residual: Some(&other), ..act }, &["residual has shape [5, 8]"]);
    refuses(device, &Activate { residual: Some(&half), ..act }, &["residual is f16, expected f32"]);
    refuses(device, &Activate { residual: Some(&y), ..act }, &["y shares its memory with residual"]);
    refuses(device, &Activate { x: &tensor(6, 8, DType::Bf16), ..act }, &["x is bf16"]);
    let (dy, dx) = (f32s(6, 8), Gradient { to: &y, add: false });
    let grad = ActivateGrad { activation: Activation::Gelu, x: &x, dy: &dy, dx };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &ActivateGrad { dy: &other, ..grad }, &["dy has shape [5, 8], expected [6, 8]"]);
    refuses(device, &ActivateGrad { x: &half, ..grad }, &["x is f16, expected f32"]);
    refuses(device, &ActivateGrad { dx: Gradient { to: &half, add: false }, ..grad }, &["dx is f16, expected f32"]);
    refuses(device, &ActivateGrad { dx: Gradient { to: &dy, add: false }, ..grad }, &["dx shares its memory with dy"]);
    // Outputs without elements are no error.
    for (rows, cols) in [(0, 4), (3, 0)] {
        let [x, dy, y] = [0; 3].map(|_| f32s(rows, cols));
        device.prepare(&Activate { x: &x, y: &y, ..act }).unwrap().run().unwrap();
        let dx = Gradient { to: &y, add: false };
        device.prepare(&ActivateGrad { x: &x, dy: &dy, dx, ..grad }).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |storage| {
        let kernel = ActivationKernel::new(Activation::Gelu, true, storage, DType::F16);
        kernel.map(|k| k.to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(says(DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F32), Ok("activation-f32f32-gelu-residual-out_f16".into()));
}
