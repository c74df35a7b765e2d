//! The windows of images.

use ndarray::Array2;
use sparse24::ops::im2col::Im2colKernel;
use sparse24::reference::im2col as oracle;
use sparse24::{DType, Device, Gradient, Im2col, Im2colGrad, Window};

use crate::common::{Data, matrix, rng, seed};
use crate::{Sink, differences_agree, expect, into, poisoned, refuses, slightly_wrong, types, wide};

/// One pixel that is all there is; a kernel larger than the image; padding that is uneven, that there is none of, and
/// torch's; strides that skip pixels; a stem's; lines and columns that differ in everything.
pub(crate) fn windows() -> Vec<Window> {
    let same = |image, kernel, stride| Window::same(image, kernel, stride).unwrap();
    let padded = |image, kernel, stride, padding| Window::padded(image, kernel, stride, padding).unwrap();
    vec![
        same([1, 1], [1, 1], [1, 1]),
        same([2, 3], [5, 5], [1, 1]),
        same([8, 8], [3, 3], [2, 2]),
        same([9, 7], [5, 3], [2, 1]),
        padded([6, 5], [3, 3], [1, 1], [0, 0]),
        padded([9, 9], [3, 3], [2, 2], [1, 1]),
        padded([7, 12], [1, 1], [2, 3], [0, 0]),
        same([17, 19], [3, 3], [2, 2]),
    ]
}

on_both_devices!(windows_agree_with_the_oracle);

fn windows_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, window) in windows().into_iter().enumerate() {
        // A ragged four, whole ones, and a stem's three.
        for (j, channels) in [5, 8, 3].into_iter().enumerate() {
            for (storage, output) in types(device, i + j) {
                for data in [Data::Uniform, Data::Edge] {
                    let mut rng = rng(seed, i as u64);
                    let batch = 1 + (i + j) % 3;
                    let x = matrix(batch * window.pixel_count(), channels, storage, data, &mut rng);
                    let want = oracle::expect(&x, &window, output).unwrap();
                    let shape = (batch * window.position_count(), window.taps() * channels);
                    let (x, y) = (device.upload(&x).unwrap(), poisoned(device, shape.0, shape.1, output));
                    let call = device.prepare(&Im2col { x: &x, window, batch, y: &y }).unwrap();
                    let what = format!("{window:?}, {channels} channels, {storage} to {output}, {data:?}");
                    expect(device, &call, &y, &want, &what);
                    if matches!(data, Data::Uniform) {
                        slightly_wrong(&want, &device.read(&y).unwrap(), &what);
                    }
                }
            }
        }
    }
}

/// What the two ways to pad leave of an image, by hand.
#[test]
fn windows_are_those_of_tensorflow_and_torch() {
    let of = |window: Window| (window.positions(), window.before());
    let same = |size, kernel, stride| of(Window::same([size, 1], [kernel, 1], [stride, 1]).unwrap());
    // TensorFlow's rule: max((ceil(n / s) - 1) * s + k - n, 0) in all, the smaller half before.
    assert_eq!(same(224, 3, 2), ([112, 1], [0, 0]));
    assert_eq!(same(225, 3, 2), ([113, 1], [1, 0]));
    assert_eq!(same(14, 5, 2), ([7, 1], [1, 0]));
    assert_eq!(same(7, 5, 1), ([7, 1], [2, 0]));
    assert_eq!(same(7, 1, 2), ([4, 1], [0, 0]));
    let padded = |size, kernel, stride, padding| {
        Window::padded([size, 1], [kernel, 1], [stride, 1], [padding, 0]).map(of).map_err(|e| e.to_string())
    };
    assert_eq!(padded(224, 7, 2, 3), Ok(([112, 1], [3, 0])));
    assert_eq!(padded(8, 3, 1, 0), Ok(([6, 1], [0, 0])));
    assert!(padded(2, 5, 1, 1).unwrap_err().contains("does not fit an image of [2, 1]"));
    // A window of nothing but padding.
    assert!(padded(8, 3, 1, 3).is_err());
    assert!(Window::same([0, 4], [3, 3], [1, 1]).unwrap_err().to_string().contains("image is [0, 4]"));
    assert!(Window::same([4, 4], [3, 3], [1, 0]).unwrap_err().to_string().contains("stride is [1, 0]"));
    assert!(Window::same([1 << 16, 1 << 16], [3, 3], [1, 1]).unwrap_err().to_string().contains("too many"));
}

/// The oracle is a plain image of pixels with a frame of zeros around it, from which windows are cut.
#[test]
fn the_oracle_cuts_windows_out_of_a_framed_image() {
    let window = Window::same([4, 5], [3, 2], [2, 1]).unwrap();
    let x = Array2::from_shape_fn((2 * 20, 2), |(pixel, channel)| (10 * pixel + channel + 1) as f64);
    let framed = |image: usize, y: isize, x_at: isize, channel: usize| {
        let inside = (0..4).contains(&y) && (0..5).contains(&x_at);
        if inside { x[[image * 20 + y as usize * 5 + x_at as usize, channel]] } else { 0.0 }
    };
    let got = oracle::exact(x.view(), &window);
    assert_eq!(got.dim(), (2 * 2 * 5, 3 * 2 * 2));
    for ((row, column), &value) in got.indexed_iter() {
        let (image, oy, ox) = (row / 10, row / 5 % 2, row % 5);
        let (ky, kx, channel) = (column / 4, column / 2 % 2, column % 2);
        // One line too few is behind, as five windows of two columns lack one there, too.
        let (y, x_at) = ((2 * oy + ky) as isize, (ox + kx) as isize);
        assert_eq!(value, framed(image, y, x_at, channel), "[{row}, {column}]");
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let f32s = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let window = Window::same([4, 4], [3, 3], [2, 2]).unwrap();
    let (x, y) = (f32s(2 * 16, 3), f32s(2 * 4, 27));
    let call = Im2col { x: &x, window, batch: 2, y: &y };
    assert!(device.prepare(&call).is_ok());
    refuses(device, &Im2col { batch: 1, ..call }, &["x has shape [32, 3], expected [16, 3]"]);
    refuses(device, &Im2col { y: &f32s(8, 26), ..call }, &["y has shape [8, 26], expected [8, 27]"]);
    refuses(device, &Im2col { y: &f32s(2, 27), ..call }, &["y has shape [2, 27], expected [8, 27]"]);
    let bf16 = device.zeros(32, 3, DType::Bf16).unwrap();
    refuses(device, &Im2col { x: &bf16, ..call }, &["x is bf16"]);
    // No images are no error, and no channels are none.
    let (x, y) = (f32s(0, 3), f32s(0, 27));
    device.prepare(&Im2col { x: &x, batch: 0, y: &y, ..call }).unwrap().run().unwrap();
    let (x, y) = (f32s(32, 0), f32s(8, 0));
    device.prepare(&Im2col { x: &x, y: &y, ..call }).unwrap().run().unwrap();
}

#[test]
fn kernels_have_the_window_in_their_name() {
    let window = Window::same([4, 4], [3, 5], [2, 2]).unwrap();
    let name = |channels, storage, output| Im2colKernel::new(&window, channels, storage, output).map(|k| k.to_string());
    assert_eq!(name(8, DType::F16, DType::F32).unwrap(), "im2col-f16f32-quads-3x5-out_f32");
    assert_eq!(name(3, DType::F32, DType::F32).unwrap(), "im2col-f32f32-scalars-3x5");
    assert!(name(3, DType::Bf16, DType::F32).is_err());
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let mut rng = rng(seed(), 0);
    for window in
        [Window::same([4, 5], [3, 2], [2, 1]).unwrap(), Window::padded([5, 4], [3, 3], [1, 2], [1, 1]).unwrap()]
    {
        let mut of = |rows, cols| wide(&matrix(rows, cols, DType::F32, Data::Uniform, &mut rng));
        let x = of(2 * window.pixel_count(), 3);
        let dy = of(2 * window.position_count(), 3 * window.taps());
        let dx = oracle::grad(dy.view(), &window);
        differences_agree(&dx, &x, |x| (oracle::exact(x.view(), &window) * &dy).sum());
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, window) in windows().into_iter().enumerate() {
        for (j, channels) in [5, 8, 3].into_iter().enumerate() {
            for data in [Data::Whole, Data::Uniform] {
                for add in [false, true] {
                    let mut rng = rng(seed, i as u64);
                    let batch = 1 + (i + j) % 3;
                    let shape = (batch * window.position_count(), window.taps() * channels);
                    let dy = matrix(shape.0, shape.1, DType::F32, data, &mut rng);
                    let want = oracle::expect_grad(&dy, &window).unwrap();
                    let sink = Sink::new(device, (batch * window.pixel_count(), channels), add, &mut rng);
                    let dy = device.upload(&dy).unwrap();
                    let grad = Im2colGrad { dy: &dy, window, batch, dx: sink.gradient() };
                    device.prepare(&grad).unwrap().run().unwrap();
                    let what = format!("{window:?}, {channels} channels, {data:?}, {add}");
                    let verdict = sink.verify(device, &want, &what);
                    assert_eq!(verdict.undecided, 0, "{what}");
                    if !add && matches!(data, Data::Uniform) {
                        slightly_wrong(&want, &device.read(&sink.to).unwrap(), &what);
                    }
                }
            }
        }
    }
    let f32s = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let window = Window::same([4, 4], [3, 3], [2, 2]).unwrap();
    let (dy, dx) = (f32s(8, 27), f32s(32, 3));
    let grad = Im2colGrad { dy: &dy, window, batch: 2, dx: into(&dx) };
    refuses(device, &Im2colGrad { dy: &f32s(8, 26), ..grad }, &["dy has shape [8, 26], expected [8, 27]"]);
    refuses(device, &Im2colGrad { dx: into(&f32s(31, 3)), ..grad }, &["dx has shape [31, 3], expected [32, 3]"]);
    let half = device.zeros(8, 27, DType::F16).unwrap();
    refuses(device, &Im2colGrad { dy: &half, ..grad }, &["dy is f16, expected f32"]);
    let (dy, dx) = (f32s(0, 27), f32s(0, 3));
    device
        .prepare(&Im2colGrad { dy: &dy, batch: 0, dx: Gradient { to: &dx, add: true }, ..grad })
        .unwrap()
        .run()
        .unwrap();
}
