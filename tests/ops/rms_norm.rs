//! Normalisation by the root of the mean of squares.

use ndarray::{Array2, Axis};
use sparse24::ops::rms_norm::RmsNormKernel;
use sparse24::reference::rms_norm as oracle;
use sparse24::{DType, Device, Gradient, Matrix, RmsNorm, RmsNormGrad};

use crate::common::{Data, matrix, rng, seed};
use crate::{Sink, differences_agree, numbers, poisoned, refuses, slightly_wrong, types, wide};

on_both_devices!(normalisation_agrees_with_the_oracle);

fn normalisation_agrees_with_the_oracle(device: &Device) {
    let seed = seed();
    // Tokens around the 8 of a workgroup; widths of one, a ragged four, around the 128 that 32 lanes read at once, and
    // of language models.
    let sizes = [(1, 1), (3, 3), (7, 4), (8, 127), (9, 128), (5, 129), (2, 132), (17, 576), (3, 2048), (2, 1023)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for (storage, output) in types(device, i) {
            for (data, eps) in [(Data::Whole, 1e-6), (Data::Uniform, 1e-5), (Data::Edge, 1e-5), (Data::Uniform, 0.0)] {
                let mut rng = rng(seed, i as u64);
                let x = matrix(tokens, width, storage, data, &mut rng);
                let gamma = matrix(1, width, DType::F32, Data::Uniform, &mut rng);
                let want = oracle::expect(&x, &gamma.elements().to_f32(), eps, output).unwrap();
                let [tx, tg] = [&x, &gamma].map(|m| device.upload(m).unwrap());
                let y = poisoned(device, tokens, width, output);
                device.prepare(&RmsNorm { x: &tx, gamma: &tg, eps, y: &y }).unwrap().run().unwrap();
                let y = device.read(&y).unwrap();
                let verdict = want.verify(&y).unwrap();
                let what = format!("{tokens} x {width}, {storage} to {output}, {data:?}, {eps}: {verdict}");
                assert!(verdict.error_over_bound <= 1.0, "{what}");
                // Edge values square to infinity, or to nothing.
                if !matches!(data, Data::Edge) && (tokens, width) != (1, 1) {
                    assert!(verdict.undecided * 2 < verdict.checked, "{what}");
                }
                if matches!(data, Data::Uniform) && width > 60 && storage == output {
                    slightly_wrong(&want, &y, &what);
                }
            }
        }
    }
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let seed = seed();
    for (i, (tokens, width, eps)) in [(1, 2, 0.5), (4, 7, 1e-3), (3, 16, 1e-12)].into_iter().enumerate() {
        let mut rng = rng(seed, i as u64);
        let mut given = |rows| wide(&matrix(rows, width, DType::F32, Data::Uniform, &mut rng));
        let (x, gamma, dy) = (given(tokens) * 3.0 + 1.0, given(1), given(tokens));
        let row = |of: &Array2<f64>| of.iter().copied().collect::<Vec<_>>();
        let loss = |x: &Array2<f64>, gamma: &Array2<f64>| (oracle::exact(x.view(), &row(gamma), eps) * &dy).sum();
        let (dx, dgamma) = oracle::grad(x.view(), &row(&gamma), eps, dy.view());
        differences_agree(&dx, &x, |x| loss(x, &gamma));
        differences_agree(&dgamma.insert_axis(Axis(0)), &gamma, |gamma| loss(&x, gamma));
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // As of layer normalisation: tokens around the 8 of a workgroup, the 16 of a block of sums, and past the 2048 from
    // which blocks are larger; widths around the 128 that 32 lanes read at once and the 256 features of a workgroup
    // that sums.
    let sizes = [(1, 1), (3, 3), (9, 128), (5, 129), (15, 257), (17, 576), (2100, 5)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for (data, eps) in [(Data::Whole, 0.25), (Data::Uniform, 1e-5)] {
            for wanted in [[Some(false); 2], [Some(true); 2], [None, Some(true)], [Some(false), None]] {
                let mut rng = rng(seed, i as u64);
                let [x, dy] = [0, 1].map(|_| matrix(tokens, width, DType::F32, data, &mut rng));
                let gamma = matrix(1, width, DType::F32, Data::Uniform, &mut rng);
                let want = oracle::expect_grad(&x, &gamma.elements().to_f32(), eps, &dy).unwrap();
                let [tx, tg, tdy] = [&x, &gamma, &dy].map(|m| device.upload(m).unwrap());
                let sinks: Vec<_> = [(tokens, width), (1, width)]
                    .iter()
                    .zip(wanted)
                    .map(|(&shape, add)| add.map(|add| Sink::new(device, shape, add, &mut rng)))
                    .collect();
                let [dx, dgamma] = [0, 1].map(|at| sinks[at].as_ref().map(Sink::gradient));
                let grad = RmsNormGrad { x: &tx, gamma: &tg, eps, dy: &tdy, dx, dgamma };
                device.prepare(&grad).unwrap().run().unwrap();
                for (at, sink) in sinks.iter().enumerate() {
                    let Some(sink) = sink else { continue };
                    let what = format!("{} of {tokens} x {width}, {data:?}, {wanted:?}", ["dx", "dgamma"][at]);
                    let verdict = sink.verify(device, &want[at], &what);
                    assert!(verdict.undecided == 0, "{what}: {verdict}");
                    if matches!(data, Data::Uniform) && wanted == [Some(false); 2] && tokens == 5 {
                        slightly_wrong(&want[at], &device.read(&sink.to).unwrap(), &what);
                    }
                }
            }
        }
    }
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, dy, gamma, to, row) = (tensor(6, 8), tensor(6, 8), tensor(1, 8), tensor(6, 8), tensor(1, 8));
    let into = |to| Some(Gradient { to, add: false });
    let grad = RmsNormGrad { x: &x, gamma: &gamma, eps: 1e-5, dy: &dy, dx: into(&to), dgamma: into(&row) };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &RmsNormGrad { dy: &tensor(5, 8), ..grad }, &["dy has shape [5, 8], expected [6, 8]"]);
    refuses(device, &RmsNormGrad { gamma: &tensor(1, 7), ..grad }, &["gamma", "[1, 7]"]);
    refuses(device, &RmsNormGrad { dx: into(&row), ..grad }, &["dx has shape [1, 8], expected [6, 8]"]);
    refuses(device, &RmsNormGrad { dgamma: into(&to), ..grad }, &["dgamma has shape [6, 8], expected [1, 8]"]);
    refuses(device, &RmsNormGrad { dx: into(&x), ..grad }, &["dx shares its memory with x"]);
    let half = device.zeros(6, 8, DType::F16).unwrap();
    refuses(device, &RmsNormGrad { x: &half, ..grad }, &["x is f16, expected f32"]);
    refuses(device, &RmsNormGrad { dx: into(&half), ..grad }, &["dx is f16, expected f32"]);
}

on_both_devices!(squares_that_overflow_show);

/// A norm over squares that f32 cannot hold is NaN, not zero; its neighbours are as ever. A row of zeros is zeros where
/// something is added, and no number where nothing is.
fn squares_that_overflow_show(device: &Device) {
    for width in [64, 63] {
        let row = |of: &dyn Fn(usize) -> f32| (0..width).map(of).collect::<Vec<_>>();
        let x = [row(&|c| if c % 2 == 0 { 3e30 } else { -3e30 }), row(&|c| c as f32), row(&|_| 0.0)].concat();
        let x = device.upload(&Matrix::from_f32(3, width, &x).unwrap()).unwrap();
        let gamma = device.upload(&Matrix::from_f32(1, width, &vec![2.0; width]).unwrap()).unwrap();
        for eps in [1e-6, 1e-12] {
            let y = device.zeros(3, width, DType::F32).unwrap();
            device.prepare(&RmsNorm { x: &x, gamma: &gamma, eps, y: &y }).unwrap().run().unwrap();
            let y = numbers(device, &y);
            let rows: Vec<_> = y.chunks(width).collect();
            assert!(rows[0].iter().all(|y| y.is_nan()), "{:?} on {}", &rows[0][..4], device.info().name());
            assert!(rows[1].iter().all(|y| y.is_finite()) && rows[2].iter().all(|y| *y == 0.0));
        }
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y, other) = (tensor(6, 8), tensor(6, 8), tensor(5, 8));
    let (feature, short) = (tensor(1, 8), tensor(1, 7));
    let norm = RmsNorm { x: &x, gamma: &feature, eps: 1e-5, y: &y };
    refuses(device, &RmsNorm { y: &other, ..norm }, &["y has shape [5, 8]"]);
    refuses(device, &RmsNorm { gamma: &short, ..norm }, &["gamma", "[1, 7]"]);
    let half_feature = device.zeros(1, 8, DType::F16).unwrap();
    refuses(device, &RmsNorm { gamma: &half_feature, ..norm }, &["gamma is f16, expected f32"]);
    refuses(device, &RmsNorm { y: &x, ..norm }, &["y shares its memory with x"]);
    for eps in [f32::NAN, -1.0, f32::INFINITY] {
        refuses(device, &RmsNorm { eps, ..norm }, &["eps", &eps.to_string()]);
    }
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    for (tokens, width) in [(0, 8), (0, 0), (3, 0)] {
        let [x, y] = [0; 2].map(|_| device.zeros(tokens, width, DType::F32).unwrap());
        let feature = device.zeros(1, width, DType::F32).unwrap();
        let norm = RmsNorm { x: &x, gamma: &feature, eps: 1e-5, y: &y };
        device.prepare(&norm).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says =
        |storage, output| RmsNormKernel::new(7, storage, output).map(|k| k.to_string()).map_err(|e| e.to_string());
    assert_eq!(says(DType::F32, DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F16, DType::F32), Ok("rms_norm-f16f32-d7-scalars-out_f32".into()));
}
