//! Depthwise convolution.

use ndarray::Array2;
use sparse24::ops::depthwise::DepthwiseKernel;
use sparse24::reference::depthwise as oracle;
use sparse24::{Activation, DType, Depthwise, DepthwiseGradW, DepthwiseGradX, Device, Window};

use crate::common::{Data, matrix, rng, seed};
use crate::im2col::windows;
use crate::{Sink, differences_agree, expect, into, poisoned, refuses, scaled, slightly_wrong, types, wide};

on_both_devices!(convolutions_agree_with_the_oracle);

fn convolutions_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, window) in windows().into_iter().enumerate() {
        // A ragged four; eight and sixteen, which the CPU has loops for; all of its loops.
        for (j, channels) in [5, 8, 16, 43].into_iter().enumerate() {
            for (storage, output) in types(device, i + j) {
                for (data, factor) in [(Data::Whole, 1.0), (Data::Uniform, 4.0), (Data::Edge, 1.0)] {
                    let mut rng = rng(seed, i as u64);
                    let batch = 1 + (i + j) % 3;
                    let activation = Activation::ALL[(i + j) % Activation::ALL.len()];
                    let x = scaled(&matrix(batch * window.pixel_count(), channels, storage, data, &mut rng), factor);
                    let weights = matrix(window.taps(), channels, DType::F32, Data::Uniform, &mut rng);
                    let row = matrix(1, channels, DType::F32, Data::Uniform, &mut rng);
                    let bias = ((i + j) % 4 != 0).then(|| row.elements().to_f32());
                    let want = oracle::expect(&x, &weights, bias.as_deref(), activation, &window, output).unwrap();
                    let y = poisoned(device, batch * window.position_count(), channels, output);
                    let [x, weights, row] = [&x, &weights, &row].map(|m| device.upload(m).unwrap());
                    let bias = bias.map(|_| &row);
                    let call = Depthwise { x: &x, weights: &weights, bias, activation, window, batch, y: &y };
                    let call = device.prepare(&call).unwrap();
                    let what =
                        format!("{window:?}, {channels} channels, {activation:?}, {storage} to {output}, {data:?}");
                    expect(device, &call, &y, &want, &what);
                    if matches!(data, Data::Uniform) && storage == output {
                        slightly_wrong(&want, &device.read(&y).unwrap(), &what);
                    }
                }
            }
        }
    }
}

/// As many GEMMs of one row and one column as there are channels, over windows that [`crate::im2col`] has checked.
#[test]
fn the_oracle_multiplies_each_channels_windows() {
    let mut rng = rng(seed(), 0);
    let window = Window::padded([5, 6], [3, 2], [2, 1], [1, 1]).unwrap();
    let of = |rows, cols, rng: &mut _| wide(&matrix(rows, cols, DType::F32, Data::Uniform, rng));
    let (x, weights) = (of(60, 3, &mut rng), of(6, 3, &mut rng));
    let y = oracle::exact(x.view(), weights.view(), Some(&[1.0, -2.0, 0.0]), Activation::Relu6, &window);
    let packed = sparse24::reference::im2col::exact(x.view(), &window);
    let by_hand = Array2::from_shape_fn(y.dim(), |(position, channel)| {
        let sum: f64 = (0..6).map(|tap| packed[[position, 3 * tap + channel]] * weights[[tap, channel]]).sum();
        (sum + [1.0, -2.0, 0.0][channel]).clamp(0.0, 6.0)
    });
    assert!(y.iter().zip(&by_hand).all(|(a, b)| (a - b).abs() < 1e-12));
    assert!(y.iter().any(|&y| y > 0.0));
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let f32s = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let window = Window::same([4, 4], [3, 3], [2, 2]).unwrap();
    let (x, weights, bias, y) = (f32s(2 * 16, 6), f32s(9, 6), f32s(1, 6), f32s(2 * 4, 6));
    let activation = Activation::Relu6;
    let call = Depthwise { x: &x, weights: &weights, bias: Some(&bias), activation, window, batch: 2, y: &y };
    assert!(device.prepare(&call).is_ok());
    refuses(device, &Depthwise { batch: 1, ..call }, &["x has shape [32, 6], expected [16, 6]"]);
    refuses(device, &Depthwise { y: &f32s(8, 5), ..call }, &["y has shape [8, 5], expected [8, 6]"]);
    refuses(device, &Depthwise { weights: &f32s(6, 9), ..call }, &["weights has shape [6, 9], expected [9, 6]"]);
    refuses(device, &Depthwise { bias: Some(&f32s(6, 1)), ..call }, &["bias has shape [6, 1], expected [1, 6]"]);
    let half = device.zeros(9, 6, DType::F16).unwrap();
    refuses(device, &Depthwise { weights: &half, ..call }, &["weights is f16, expected f32"]);
    refuses(device, &Depthwise { x: &device.zeros(32, 6, DType::Bf16).unwrap(), ..call }, &["x is bf16"]);
    // No images are no error, and no channels are none.
    let (x, y) = (f32s(0, 6), f32s(0, 6));
    device.prepare(&Depthwise { x: &x, batch: 0, y: &y, ..call }).unwrap().run().unwrap();
    let (x, weights, y) = (f32s(32, 0), f32s(9, 0), f32s(8, 0));
    device.prepare(&Depthwise { x: &x, weights: &weights, bias: None, y: &y, ..call }).unwrap().run().unwrap();
}

#[test]
fn kernels_have_the_window_in_their_name() {
    let window = Window::same([4, 4], [5, 5], [2, 2]).unwrap();
    let name = |channels, storage| DepthwiseKernel::new(&window, channels, storage, DType::F32).map(|k| k.to_string());
    assert_eq!(name(8, DType::F16).unwrap(), "depthwise-f16f32-quads-5x5-none-out_f32");
    assert_eq!(name(7, DType::F32).unwrap(), "depthwise-f32f32-scalars-5x5-none");
    assert!(name(8, DType::Bf16).is_err());
}

#[test]
fn the_oracles_gradients_are_those_of_differences() {
    let mut rng = rng(seed(), 0);
    for window in
        [Window::same([4, 5], [3, 2], [2, 1]).unwrap(), Window::padded([5, 4], [3, 3], [1, 2], [1, 1]).unwrap()]
    {
        let mut of = |rows, cols| wide(&matrix(rows, cols, DType::F32, Data::Uniform, &mut rng));
        let (x, weights) = (of(2 * window.pixel_count(), 3), of(window.taps(), 3));
        let dy = of(2 * window.position_count(), 3);
        let (dx, dw) = oracle::grad(x.view(), weights.view(), &window, dy.view());
        let exact = |x: &Array2<f64>, weights: &Array2<f64>| {
            (oracle::exact(x.view(), weights.view(), None, Activation::None, &window) * &dy).sum()
        };
        differences_agree(&dx, &x, |x| exact(x, &weights));
        differences_agree(&dw, &weights, |weights| exact(&x, weights));
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, window) in windows().into_iter().enumerate() {
        // Around the 64 channels of a workgroup.
        for (j, channels) in [5, 16, 65].into_iter().enumerate() {
            for data in [Data::Whole, Data::Uniform] {
                for add in [false, true] {
                    let mut rng = rng(seed, i as u64);
                    let batch = 1 + (i + j) % 3;
                    let mut of = |rows| matrix(rows, channels, DType::F32, data, &mut rng);
                    let (x, weights) = (of(batch * window.pixel_count()), of(window.taps()));
                    let dy = of(batch * window.position_count());
                    let (want_x, want_w) = oracle::expect_grad(&x, &weights, &window, &dy).unwrap();
                    let dx = Sink::new(device, (x.rows(), channels), add, &mut rng);
                    let dw = Sink::new(device, (weights.rows(), channels), add, &mut rng);
                    let [x, weights, dy] = [&x, &weights, &dy].map(|m| device.upload(m).unwrap());
                    let of_x = DepthwiseGradX { weights: &weights, window, batch, dy: &dy, dx: dx.gradient() };
                    let of_w = DepthwiseGradW { x: &x, window, batch, dy: &dy, dw: dw.gradient() };
                    device.prepare(&of_x).unwrap().run().unwrap();
                    device.prepare(&of_w).unwrap().run().unwrap();
                    let what = format!("{window:?}, {channels} channels, {data:?}, {add}");
                    for (sink, want) in [(&dx, &want_x), (&dw, &want_w)] {
                        let verdict = sink.verify(device, want, &what);
                        assert_eq!(verdict.undecided, 0, "{what}");
                        // Of long sums bounds are many times what they are likely to be off by.
                        if !add && matches!(data, Data::Uniform) && dy.rows() <= 64 {
                            slightly_wrong(want, &device.read(&sink.to).unwrap(), &what);
                        }
                    }
                }
            }
        }
    }
    let f32s = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let window = Window::same([4, 4], [3, 3], [2, 2]).unwrap();
    let (x, weights, dy, dx, dw) = (f32s(32, 6), f32s(9, 6), f32s(8, 6), f32s(32, 6), f32s(9, 6));
    let of_x = DepthwiseGradX { weights: &weights, window, batch: 2, dy: &dy, dx: into(&dx) };
    let of_w = DepthwiseGradW { x: &x, window, batch: 2, dy: &dy, dw: into(&dw) };
    refuses(device, &DepthwiseGradX { batch: 1, ..of_x }, &["dy has shape [8, 6], expected [4, 6]"]);
    refuses(device, &DepthwiseGradX { weights: &f32s(8, 6), ..of_x }, &["weights has shape [8, 6], expected [9, 6]"]);
    refuses(device, &DepthwiseGradX { dx: into(&f32s(6, 32)), ..of_x }, &["dx has shape [6, 32], expected [32, 6]"]);
    refuses(device, &DepthwiseGradW { x: &f32s(31, 6), ..of_w }, &["x has shape [31, 6], expected [32, 6]"]);
    refuses(device, &DepthwiseGradW { dw: into(&f32s(9, 5)), ..of_w }, &["dw has shape [9, 5], expected [9, 6]"]);
    let half = device.zeros(8, 6, DType::F16).unwrap();
    refuses(device, &DepthwiseGradW { dy: &half, ..of_w }, &["dy is f16, expected f32"]);
}
