//! Layer normalisation.

use ndarray::{Array2, Axis};
use sparse24::ops::layer_norm::LayerNormKernel;
use sparse24::reference::layer_norm as oracle;
use sparse24::{DType, Device, Elements, Gradient, LayerNorm, LayerNormGrad, Matrix, Options};

use crate::common::{Data, callers_device, gpu, matrix, rng, seed};
use crate::{Sink, differences_agree, numbers, poisoned, refuses, slightly_wrong, types, wide};

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

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let seed = seed();
    for (i, (tokens, width, eps)) in [(1, 2, 0.5), (4, 7, 1e-3), (3, 16, 1e-12)].into_iter().enumerate() {
        let mut rng = rng(seed, i as u64);
        let mut given = |rows| wide(&matrix(rows, width, DType::F32, Data::Uniform, &mut rng));
        let (x, gamma, beta, dy) = (given(tokens) * 3.0 + 1.0, given(1), given(1), given(tokens));
        let row = |of: &Array2<f64>| of.iter().copied().collect::<Vec<_>>();
        let loss = |x: &Array2<f64>, gamma: &Array2<f64>, beta: &Array2<f64>| {
            (oracle::exact(x.view(), &row(gamma), &row(beta), eps) * &dy).sum()
        };
        let (dx, dgamma, dbeta) = oracle::grad(x.view(), &row(&gamma), eps, dy.view());
        differences_agree(&dx, &x, |x| loss(x, &gamma, &beta));
        differences_agree(&dgamma.insert_axis(Axis(0)), &gamma, |gamma| loss(&x, gamma, &beta));
        differences_agree(&dbeta.insert_axis(Axis(0)), &beta, |beta| loss(&x, &gamma, beta));
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Tokens around the 8 of a workgroup, the 16 of a block of sums, and past the 2048 from which blocks are larger;
    // widths as of the forward, and around the 256 features of a workgroup that sums.
    let sizes = [(1, 1), (3, 3), (8, 127), (9, 128), (5, 129), (15, 257), (33, 256), (17, 384), (2, 1023), (2100, 5)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for (data, shift, eps) in [(Data::Whole, 0.0, 0.25), (Data::Uniform, 0.0, 1e-5), (Data::Uniform, 30.0, 1e-3)] {
            for wanted in
                [[Some(false); 3], [Some(true); 3], [None, Some(true), Some(false)], [Some(false), None, None]]
            {
                let mut rng = rng(seed, i as u64);
                let x = matrix(tokens, width, DType::F32, data, &mut rng);
                let moved: Vec<f32> = x.elements().to_f32().iter().map(|v| v + shift).collect();
                let x = Matrix::from_f32(tokens, width, &moved).unwrap();
                let gamma = matrix(1, width, DType::F32, Data::Uniform, &mut rng);
                let dy = matrix(tokens, width, DType::F32, data, &mut rng);
                let want = oracle::expect_grad(&x, &gamma.elements().to_f32(), eps, &dy).unwrap();
                let [tx, tg, tdy] = [&x, &gamma, &dy].map(|m| device.upload(m).unwrap());
                let shapes = [(tokens, width), (1, width), (1, width)];
                let sinks: Vec<_> = shapes
                    .iter()
                    .zip(wanted)
                    .map(|(&shape, add)| add.map(|add| Sink::new(device, shape, add, &mut rng)))
                    .collect();
                let [dx, dgamma, dbeta] = [0, 1, 2].map(|at| sinks[at].as_ref().map(Sink::gradient));
                let grad = LayerNormGrad { x: &tx, gamma: &tg, eps, dy: &tdy, dx, dgamma, dbeta };
                device.prepare(&grad).unwrap().run().unwrap();
                for (at, sink) in sinks.iter().enumerate() {
                    let Some(sink) = sink else { continue };
                    let name = ["dx", "dgamma", "dbeta"][at];
                    let what = format!("{name} of {tokens} x {width}, {data:?} + {shift}, {wanted:?}");
                    let verdict = sink.verify(device, &want[at], &what);
                    assert!(verdict.undecided == 0, "{what}: {verdict}");
                    if shift == 0.0 && matches!(data, Data::Uniform) && wanted == [Some(false); 3] && tokens == 5 {
                        slightly_wrong(&want[at], &device.read(&sink.to).unwrap(), &what);
                    }
                }
            }
        }
    }
}

/// Which thread computes a block of tokens must not show in what is summed over all of them.
#[test]
fn sums_over_tokens_do_not_depend_on_threads() {
    let (tokens, width) = (640, 384);
    let mut rng = rng(seed(), 0);
    let [x, dy] = [0, 1].map(|_| matrix(tokens, width, DType::F32, Data::Uniform, &mut rng));
    let gamma = matrix(1, width, DType::F32, Data::Uniform, &mut rng);
    let results = [1, 2, 5].map(|threads| {
        let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
        let [x, gamma, dy] = [&x, &gamma, &dy].map(|m| device.upload(m).unwrap());
        let to = [tokens, 1, 1].map(|rows| poisoned(&device, rows, width, DType::F32));
        let [dx, dgamma, dbeta] = to.each_ref().map(|to| Some(Gradient { to, add: false }));
        let grad = LayerNormGrad { x: &x, gamma: &gamma, eps: 1e-12, dy: &dy, dx, dgamma, dbeta };
        device.prepare(&grad).unwrap().run().unwrap();
        to.map(|to| device.read(&to).unwrap())
    });
    assert!(results.iter().all(|result| *result == results[0]));
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, dy, gamma, to, row) = (tensor(6, 8), tensor(6, 8), tensor(1, 8), tensor(6, 8), tensor(1, 8));
    let into = |to| Some(Gradient { to, add: false });
    let grad =
        LayerNormGrad { x: &x, gamma: &gamma, eps: 1e-5, dy: &dy, dx: into(&to), dgamma: into(&row), dbeta: None };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &LayerNormGrad { dy: &tensor(5, 8), ..grad }, &["dy has shape [5, 8], expected [6, 8]"]);
    refuses(device, &LayerNormGrad { gamma: &tensor(1, 7), ..grad }, &["gamma", "[1, 7]"]);
    refuses(device, &LayerNormGrad { dx: into(&row), ..grad }, &["dx has shape [1, 8], expected [6, 8]"]);
    refuses(device, &LayerNormGrad { dbeta: into(&to), ..grad }, &["dbeta has shape [6, 8], expected [1, 8]"]);
    refuses(device, &LayerNormGrad { dbeta: into(&row), ..grad }, &["dgamma shares its memory with dbeta"]);
    refuses(device, &LayerNormGrad { dx: into(&dy), ..grad }, &["dx shares its memory with dy"]);
    let half = device.zeros(6, 8, DType::F16).unwrap();
    refuses(device, &LayerNormGrad { x: &half, ..grad }, &["x is f16, expected f32"]);
    refuses(device, &LayerNormGrad { dy: &half, ..grad }, &["dy is f16, expected f32"]);
    refuses(device, &LayerNormGrad { dx: into(&half), ..grad }, &["dx is f16, expected f32"]);
    refuses(device, &LayerNormGrad { eps: f32::NAN, ..grad }, &["eps"]);
}

on_both_devices!(gradients_of_no_tokens_are_zero);

fn gradients_of_no_tokens_are_zero(device: &Device) {
    for (tokens, width) in [(0, 8), (0, 0), (3, 0)] {
        let [x, dy, dx] = [0; 3].map(|_| device.zeros(tokens, width, DType::F32).unwrap());
        let [gamma, dgamma, dbeta] = [0; 3].map(|_| poisoned(device, 1, width, DType::F32));
        let into = |to| Some(Gradient { to, add: false });
        let (dx, dgamma, dbeta) = (into(&dx), into(&dgamma), into(&dbeta));
        let grad = LayerNormGrad { x: &x, gamma: &gamma, eps: 1e-5, dy: &dy, dx, dgamma, dbeta };
        device.prepare(&grad).unwrap().run().unwrap();
        for gradient in [dgamma, dbeta] {
            assert!(numbers(device, gradient.unwrap().to).iter().all(|g| *g == 0.0));
        }
    }
}

on_both_devices!(variances_that_overflow_show);

/// A norm over squares that f32 cannot hold is NaN, not beta or zero; its neighbours are as ever. A constant row is
/// beta, and where nothing is added to its variance no number on the CPU: a GPU's division may leave the mean an ulp
/// off, and with it a variance.
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
    assert!(device.prepare(&norm).is_err_and(|e| e.is_too_large()));
}
