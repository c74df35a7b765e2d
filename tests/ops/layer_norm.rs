//! Layer normalisation.

use sparse24::ops::layer_norm::LayerNormKernel;
use sparse24::reference::layer_norm as oracle;
use sparse24::{DType, Device, Elements, Error, LayerNorm, Matrix};

use crate::common::{Data, callers_device, gpu, matrix, rng, seed};
use crate::{numbers, poisoned, refuses, types};

on_both_devices!(layer_normalisation_agrees_with_the_oracle);

fn layer_normalisation_agrees_with_the_oracle(device: &Device) {
    let seed = seed();
    // Tokens around the 8 of a workgroup; widths of one, a ragged four, around the 128 that 32 lanes read at once, and
    // of MiniLM and BERT.
    let sizes = [(1, 1), (3, 3), (7, 4), (8, 127), (9, 128), (5, 129), (2, 132), (17, 384), (3, 768), (2, 1023)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for (storage, output) in types(device, i) {
            // A mean that is large beside the variance is what two passes are for.
            for (data, shift, eps) in
                [(Data::Whole, 0.0, 1e-12), (Data::Uniform, 0.0, 1e-5), (Data::Uniform, 100.0, 1e-12)]
            {
                let mut rng = rng(seed, i as u64);
                let x = matrix(tokens, width, storage, data, &mut rng);
                let moved: Vec<f32> = x.elements().to_f32().iter().map(|v| v + shift).collect();
                let x = Matrix::new(tokens, width, Elements::from_f32(storage, &moved)).unwrap();
                let [gamma, beta] = [0, 1].map(|_| matrix(1, width, DType::F32, Data::Uniform, &mut rng));
                let (gammas, betas) = (gamma.elements().to_f32(), beta.elements().to_f32());
                let want = oracle::expect(&x, &gammas, &betas, eps, output).unwrap();
                let [tx, tg, tb] = [&x, &gamma, &beta].map(|m| device.upload(m).unwrap());
                let y = poisoned(device, tokens, width, output);
                let norm = LayerNorm { x: &tx, gamma: &tg, beta: &tb, eps, y: &y };
                let call = device.prepare(&norm).unwrap();
                call.run().unwrap();
                let verdict = want.verify(&device.read(&y).unwrap()).unwrap();
                let what = format!("{tokens} x {width}, {storage} to {output}, {data:?} + {shift}: {verdict}");
                // One feature has no variance: the square root of eps alone decides, and where that is less than
                // the mean's error nothing is.
                assert!(verdict.error_over_bound <= 1.0, "{what}");
                assert!(width == 1 || verdict.undecided * 2 < verdict.checked, "{what}");
            }
        }
    }
}

on_both_devices!(variances_that_overflow_show);

/// A norm over squares that f32 cannot hold is NaN, not beta or zero; its neighbours are as ever. A constant row is beta,
/// and where nothing is added to its variance no number on the CPU: a GPU's division may leave the mean an ulp off, and
/// with it a variance.
fn variances_that_overflow_show(device: &Device) {
    for width in [64, 63] {
        let row = |of: &dyn Fn(usize) -> f32| (0..width).map(of).collect::<Vec<_>>();
        let mut x = row(&|c| if c % 2 == 0 { 3e30 } else { -3e30 });
        x.extend(row(&|c| c as f32));
        x.extend(row(&|_| 3e38));
        x.extend(row(&|_| 1.5));
        let x = device.upload(&Matrix::from_f32(4, width, &x).unwrap()).unwrap();
        let gamma = device.upload(&Matrix::from_f32(1, width, &vec![2.0; width]).unwrap()).unwrap();
        let beta = device.upload(&Matrix::from_f32(1, width, &vec![0.25; width]).unwrap()).unwrap();
        for eps in [0.0, 1e-12, 1e-4] {
            let y = device.zeros(4, width, DType::F32).unwrap();
            device.prepare(&LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps, y: &y }).unwrap().run().unwrap();
            let y = numbers(device, &y);
            let rows: Vec<_> = y.chunks(width).collect();
            let name = device.info().name().to_owned();
            for row in [0, 2] {
                assert!(rows[row].iter().all(|y| y.is_nan()), "row {row}, eps {eps} on {name}: {:?}", &rows[row][..4]);
            }
            assert!(rows[1].iter().all(|y| y.is_finite()), "{name}: {:?}", &rows[1][..4]);
            let off = |y: &f32| (*y - 0.25).abs();
            let constant = |y: &f32| match (device.caps().is_some(), eps) {
                (false, 0.0) => !y.is_finite(),
                (false, _) => off(y) == 0.0,
                (true, 0.0) => true,
                // Twice the ulp of 1.5, times gamma, over the root of what is added to the variance.
                (true, _) => off(y) <= 2.0 * 2.4e-7 / eps.sqrt(),
            };
            assert!(rows[3].iter().all(constant), "eps {eps} on {name}: {:?}", &rows[3][..4]);
        }
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y, other) = (tensor(6, 8), tensor(6, 8), tensor(5, 8));
    let (feature, short) = (tensor(1, 8), tensor(1, 7));
    let norm = LayerNorm { x: &x, gamma: &feature, beta: &feature, eps: 1e-5, y: &y };
    refuses(device, &LayerNorm { y: &other, ..norm }, &["y has shape [5, 8]"]);
    refuses(device, &LayerNorm { gamma: &short, ..norm }, &["gamma", "[1, 7]"]);
    let half_feature = device.zeros(1, 8, DType::F16).unwrap();
    refuses(device, &LayerNorm { beta: &half_feature, ..norm }, &["beta is f16, expected f32"]);
    refuses(device, &LayerNorm { y: &x, ..norm }, &["y shares its memory with x"]);
    for eps in [f32::NAN, -1.0, f32::INFINITY] {
        refuses(device, &LayerNorm { eps, ..norm }, &["eps", &eps.to_string()]);
    }
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    for (tokens, width) in [(0, 8), (0, 0), (3, 0)] {
        let [x, y] = [0; 2].map(|_| device.zeros(tokens, width, DType::F32).unwrap());
        let feature = device.zeros(1, width, DType::F32).unwrap();
        let norm = LayerNorm { x: &x, gamma: &feature, beta: &feature, eps: 1e-5, y: &y };
        device.prepare(&norm).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says =
        |storage, output| LayerNormKernel::new(7, storage, output).map(|k| k.to_string()).map_err(|e| e.to_string());
    assert_eq!(says(DType::F32, DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F16, DType::F32), Ok("layer_norm-f16f32-d7-scalars-out_f32".into()));
}

/// What cannot be bound at once is refused when the call is prepared.
#[test]
#[ignore = "needs a GPU"]
fn operands_larger_than_a_binding_are_refused() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_storage_buffer_binding_size: 1 << 20, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let [x, y, gamma, beta] = [1100, 1100, 1, 1].map(|rows| device.zeros(rows, 256, DType::F32).unwrap());
    let norm = LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps: 1e-5, y: &y };
    assert!(matches!(device.prepare(&norm), Err(Error::TooLarge { .. })));
}
