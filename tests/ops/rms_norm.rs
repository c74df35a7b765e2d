//! Normalisation by the root of the mean of squares.

use sparse24::ops::rms_norm::RmsNormKernel;
use sparse24::reference::rms_norm as oracle;
use sparse24::{DType, Device, Matrix, RmsNorm};

use crate::common::{Data, matrix, rng, seed};
use crate::{numbers, poisoned, refuses, slightly_wrong, types};

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
