//! Normalisation of the heads of queries and keys.

use ndarray::{Array2, Axis};
use sparse24::ops::qk_norm::QkNormKernel;
use sparse24::reference::qk_norm as oracle;
use sparse24::{DType, Device, Gradient, Matrix, QkNorm, QkNormGrad};

use crate::common::{Data, matrix, rng, seed};
use crate::{Sink, differences_agree, expect, numbers, poisoned, refuses, slightly_wrong, types, wide};

/// Tokens, heads of queries and of keys, features of a head. One of all; heads around the 8 of a workgroup; around the
/// 128 features that 32 lanes read at once; models' heads; no keys, or no queries.
const SIZES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 1),
    (3, 3, 1, 3),
    (5, 4, 2, 127),
    (2, 2, 2, 129),
    (17, 9, 3, 64),
    (3, 16, 8, 128),
    (1, 5, 5, 132),
    (4, 3, 0, 20),
    (4, 0, 2, 33),
];

on_both_devices!(normalisation_agrees_with_the_oracle);

fn normalisation_agrees_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, (tokens, heads, kv_heads, dim)) in SIZES.into_iter().enumerate() {
        let features = (heads + 2 * kv_heads) * dim;
        for (storage, output) in types(device, i) {
            for (data, eps) in [(Data::Whole, 1e-6), (Data::Uniform, 1e-5), (Data::Edge, 1e-5), (Data::Uniform, 0.0)] {
                let mut rng = rng(seed, i as u64);
                let qkv = matrix(tokens, features, storage, data, &mut rng);
                let [q, k] = [0, 1].map(|_| matrix(1, dim, DType::F32, Data::Uniform, &mut rng));
                let gammas = [&q, &k].map(|gamma| gamma.elements().to_f32());
                let want = oracle::expect(&qkv, (&gammas[0], &gammas[1]), (heads, kv_heads), eps, output).unwrap();
                let [qkv, q_gamma, k_gamma] = [&qkv, &q, &k].map(|m| device.upload(m).unwrap());
                let y = poisoned(device, tokens, features, output);
                let (qkv, q_gamma, k_gamma) = (&qkv, &q_gamma, &k_gamma);
                let norm = QkNorm { qkv, q_gamma, k_gamma, heads, kv_heads, eps, y: &y };
                let what = format!("{:?}, {storage} to {output}, {data:?}, {eps}", SIZES[i]);
                let verdict = expect(device, &device.prepare(&norm).unwrap(), &y, &want, &what);
                // Edge values square to infinity, or to nothing.
                if !matches!(data, Data::Edge) {
                    assert!(verdict.undecided * 2 < verdict.checked, "{what}: {verdict}");
                }
                if matches!(data, Data::Uniform) && features > 60 && storage == output {
                    slightly_wrong(&want, &device.read(&y).unwrap(), &what);
                }
            }
        }
    }
}

on_both_devices!(each_head_has_its_gamma);

/// Heads of equal numbers become the gammas, and values stay.
fn each_head_has_its_gamma(device: &Device) {
    let (heads, kv_heads, dim) = (3, 2, 4);
    let row = |head: usize| (1 << head) as f32;
    let qkv: Vec<f32> = (0..2 * 7 * dim).map(|e| row(e / dim % 7)).collect();
    let qkv = device.upload(&Matrix::from_f32(2, 7 * dim, &qkv).unwrap()).unwrap();
    let [q_gamma, k_gamma] = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]];
    let [q, k] = [q_gamma, k_gamma].map(|gamma| device.upload(&Matrix::from_f32(1, dim, &gamma).unwrap()).unwrap());
    let y = poisoned(device, 2, 7 * dim, DType::F32);
    let norm = QkNorm { qkv: &qkv, q_gamma: &q, k_gamma: &k, heads, kv_heads, eps: 0.0, y: &y };
    device.prepare(&norm).unwrap().run().unwrap();
    let token = [q_gamma; 3].into_iter().chain([k_gamma; 2]).chain([[row(5); 4], [row(6); 4]]);
    let want: Vec<f32> = token.flatten().collect::<Vec<_>>().repeat(2);
    let got = numbers(device, &y);
    let close = got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= 1e-6 * want);
    assert!(close, "{got:?} on {}", device.info().name());
}

/// Numbers of a row.
fn row(m: &Array2<f64>) -> Vec<f64> {
    m.iter().copied().collect()
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    for (i, (tokens, heads, kv_heads, dim, eps)) in [(1, 1, 1, 2, 0.5), (3, 4, 2, 5, 1e-3)].into_iter().enumerate() {
        let mut rng = rng(seed(), i as u64);
        let mut given = |rows, cols| wide(&matrix(rows, cols, DType::F32, Data::Uniform, &mut rng));
        let features = (heads + 2 * kv_heads) * dim;
        let (qkv, dy) = (given(tokens, features) * 3.0 + 1.0, given(tokens, features));
        let (q, k) = (given(1, dim), given(1, dim));
        let loss = |qkv: &Array2<f64>, q: &Array2<f64>, k: &Array2<f64>| {
            (oracle::exact(qkv.view(), (&row(q), &row(k)), (heads, kv_heads), eps) * &dy).sum()
        };
        let gammas = (row(&q), row(&k));
        let (dqkv, [dq, dk]) = oracle::grad(qkv.view(), (&gammas.0, &gammas.1), (heads, kv_heads), eps, dy.view());
        differences_agree(&dqkv, &qkv, |qkv| loss(qkv, &q, &k));
        differences_agree(&dq.insert_axis(Axis(0)), &q, |q| loss(&qkv, q, &k));
        differences_agree(&dk.insert_axis(Axis(0)), &k, |k| loss(&qkv, &q, k));
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Tokens around the 16 of a block of sums, and past the 2048 from which blocks are larger; features around the 128
    // that 32 lanes read at once, and of Q and K together around the 256 of a workgroup that sums.
    let sizes =
        [(1, 1, 1, 2), (3, 3, 1, 3), (9, 4, 2, 128), (5, 2, 2, 129), (17, 9, 3, 64), (2100, 2, 1, 5), (4, 3, 0, 20)];
    for (i, (tokens, heads, kv_heads, dim)) in sizes.into_iter().enumerate() {
        let features = (heads + 2 * kv_heads) * dim;
        for (data, eps) in [(Data::Whole, 0.25), (Data::Uniform, 1e-5)] {
            for wanted in
                [[Some(false); 3], [Some(true); 3], [None, Some(true), None], [Some(false), None, Some(false)]]
            {
                let mut rng = rng(seed, i as u64);
                let [qkv, dy] = [0, 1].map(|_| matrix(tokens, features, DType::F32, data, &mut rng));
                let [q, k] = [0, 1].map(|_| matrix(1, dim, DType::F32, Data::Uniform, &mut rng));
                let gammas = [&q, &k].map(|gamma| gamma.elements().to_f32());
                let want = oracle::expect_grad(&qkv, (&gammas[0], &gammas[1]), (heads, kv_heads), eps, &dy).unwrap();
                let [tx, tq, tk, tdy] = [&qkv, &q, &k, &dy].map(|m| device.upload(m).unwrap());
                let sinks: Vec<_> = [(tokens, features), (1, dim), (1, dim)]
                    .iter()
                    .zip(wanted)
                    .map(|(&shape, add)| add.map(|add| Sink::new(device, shape, add, &mut rng)))
                    .collect();
                let [dqkv, dq_gamma, dk_gamma] = [0, 1, 2].map(|at| sinks[at].as_ref().map(Sink::gradient));
                let (qkv, q_gamma, k_gamma, dy) = (&tx, &tq, &tk, &tdy);
                let grad = QkNormGrad { qkv, q_gamma, k_gamma, heads, kv_heads, eps, dy, dqkv, dq_gamma, dk_gamma };
                device.prepare(&grad).unwrap().run().unwrap();
                for (at, sink) in sinks.iter().enumerate() {
                    let Some(sink) = sink else { continue };
                    let name = ["dqkv", "dq_gamma", "dk_gamma"][at];
                    let what = format!("{name} of {:?}, {data:?}, {wanted:?}", sizes[i]);
                    let verdict = sink.verify(device, &want[at], &what);
                    assert!(verdict.undecided == 0, "{what}: {verdict}");
                    if matches!(data, Data::Uniform) && wanted == [Some(false); 3] && tokens == 5 {
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
    let (qkv, dy, to, [q, k, row]) = (tensor(6, 16), tensor(6, 16), tensor(6, 16), [0; 3].map(|_| tensor(1, 4)));
    let into = |to| Some(Gradient { to, add: false });
    let grad = QkNormGrad {
        qkv: &qkv,
        q_gamma: &q,
        k_gamma: &k,
        heads: 2,
        kv_heads: 1,
        eps: 1e-5,
        dy: &dy,
        dqkv: into(&to),
        dq_gamma: into(&row),
        dk_gamma: None,
    };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &QkNormGrad { dy: &tensor(5, 16), ..grad }, &["dy has shape [5, 16], expected [6, 16]"]);
    refuses(device, &QkNormGrad { heads: 3, ..grad }, &["qkv has shape [6, 16], expected [6, 20]"]);
    refuses(device, &QkNormGrad { dqkv: into(&row), ..grad }, &["dqkv has shape [1, 4], expected [6, 16]"]);
    refuses(device, &QkNormGrad { dk_gamma: into(&to), ..grad }, &["dk_gamma has shape [6, 16], expected [1, 4]"]);
    refuses(device, &QkNormGrad { dqkv: into(&qkv), ..grad }, &["dqkv shares its memory with qkv"]);
    refuses(device, &QkNormGrad { dk_gamma: into(&row), ..grad }, &["shares its memory with"]);
    let half = device.zeros(6, 16, DType::F16).unwrap();
    refuses(device, &QkNormGrad { qkv: &half, ..grad }, &["qkv is f16, expected f32"]);
}

on_both_devices!(squares_that_overflow_show);

/// A norm over squares that f32 cannot hold is NaN, not zero, in its head alone; values of that size stay.
fn squares_that_overflow_show(device: &Device) {
    for dim in [64, 63] {
        let large = |row: usize| [0, 5].contains(&row);
        let qkv: Vec<f32> = (0..6 * dim).map(|e| if large(e / dim) { 3e30 } else { 1.0 + (e % dim) as f32 }).collect();
        let qkv = device.upload(&Matrix::from_f32(1, 6 * dim, &qkv).unwrap()).unwrap();
        let gamma = device.upload(&Matrix::from_f32(1, dim, &vec![2.0; dim]).unwrap()).unwrap();
        let y = device.zeros(1, 6 * dim, DType::F32).unwrap();
        let norm = QkNorm { qkv: &qkv, q_gamma: &gamma, k_gamma: &gamma, heads: 2, kv_heads: 2, eps: 1e-6, y: &y };
        device.prepare(&norm).unwrap().run().unwrap();
        let y = numbers(device, &y);
        let rows: Vec<_> = y.chunks(dim).collect();
        assert!(rows[0].iter().all(|y| y.is_nan()), "{:?} on {}", &rows[0][..4], device.info().name());
        assert!(rows[1..5].iter().all(|row| row.iter().all(|y| y.is_finite())));
        assert!(rows[5].iter().all(|y| *y == 3e30), "{:?} on {}", &rows[5][..4], device.info().name());
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (qkv, y, q, k) = (tensor(6, 16), tensor(6, 16), tensor(1, 4), tensor(1, 4));
    let norm = QkNorm { qkv: &qkv, q_gamma: &q, k_gamma: &k, heads: 2, kv_heads: 1, eps: 1e-5, y: &y };
    assert!(device.prepare(&norm).is_ok());
    refuses(device, &QkNorm { y: &tensor(5, 16), ..norm }, &["y has shape [5, 16]"]);
    refuses(device, &QkNorm { k_gamma: &tensor(1, 5), ..norm }, &["k_gamma has shape [1, 5], expected [1, 4]"]);
    refuses(device, &QkNorm { q_gamma: &tensor(1, 5), k_gamma: &tensor(1, 5), ..norm }, &["qkv", "[6, 16]", "[6, 20]"]);
    refuses(device, &QkNorm { heads: 3, ..norm }, &["qkv", "[6, 16]", "[6, 20]"]);
    refuses(device, &QkNorm { kv_heads: 2, ..norm }, &["qkv", "[6, 16]", "[6, 24]"]);
    refuses(device, &QkNorm { kv_heads: usize::MAX, ..norm }, &["heads overflows"]);
    let half = device.zeros(1, 4, DType::F16).unwrap();
    refuses(device, &QkNorm { k_gamma: &half, ..norm }, &["k_gamma is f16, expected f32"]);
    refuses(device, &QkNorm { y: &qkv, ..norm }, &["y shares its memory with qkv"]);
    for eps in [f32::NAN, -1.0, f32::INFINITY] {
        refuses(device, &QkNorm { eps, ..norm }, &["eps", &eps.to_string()]);
    }
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    for (tokens, heads, dim) in [(0, 2, 4), (3, 2, 0), (3, 0, 4), (0, 0, 0)] {
        let [qkv, y] = [0; 2].map(|_| device.zeros(tokens, 2 * heads * dim, DType::F32).unwrap());
        let gamma = device.zeros(1, dim, DType::F32).unwrap();
        let kv_heads = heads / 2;
        let norm = QkNorm { qkv: &qkv, q_gamma: &gamma, k_gamma: &gamma, heads, kv_heads, eps: 1e-5, y: &y };
        device.prepare(&norm).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |storage, output| {
        QkNormKernel::new((16, 8), 128, storage, output).map(|k| k.to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(says(DType::F32, DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F16, DType::F32), Ok("qk_norm-16+8-f16f32-d128-quads-out_f32".into()));
}
