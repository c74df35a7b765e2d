//! Gradients of linear layers whose weights are trained, in every form.

use std::sync::Arc;

use ndarray::Array2;
use sparse24::ops::Gradient;
use sparse24::ops::gemm::{BiasGrad, GemmGradW, GemmGradX, Repack, TrainableWeights};
use sparse24::reference::gemm as oracle;
use sparse24::{DType, Device, Epilogue, GemmOperands, HostWeights, Matrix, Op, Options, Problem, Tensor, VectorLen};

use crate::common::{Data, host_weights, matrix, rng, seed};
use crate::{numbers, poisoned, refuses};

/// Outputs, tokens and inputs: one of each; ragged groups, pairs, units and vectors; several patterns of 128 rows,
/// steps of k, panels of tokens and blocks of 256 tokens.
const SIZES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (7, 5, 13), (33, 27, 70), (130, 49, 36), (264, 300, 140), (128, 31, 1030)];

fn forms() -> impl Iterator<Item = Op> {
    Op::all()
}

fn wide(m: &Matrix) -> Array2<f64> {
    m.to_array().mapv(f64::from)
}

/// What of a dense gradient belongs to the values of these weights, in their order.
fn of_values(w: &HostWeights, full: &Array2<f64>) -> Vec<f64> {
    match w {
        HostWeights::Dense(_) => full.iter().copied().collect(),
        HostWeights::Masked(..) | HostWeights::Masked24(..) => {
            let mask = w.mask().unwrap();
            full.indexed_iter().map(|((row, col), &x)| if mask.get(row, col) { x } else { 0.0 }).collect()
        }
        HostWeights::Sparse24(w) => (0..w.m())
            .flat_map(|row| (0..w.k().div_ceil(4)).map(move |group| (row, group)))
            .flat_map(|(row, group)| {
                let (first, second) = w.code(row, group);
                [first, second].map(|column| full.get((row, 4 * group + column)).copied().unwrap_or(0.0))
            })
            .collect(),
    }
}

/// Each element is as far off as sums of that many terms may be, and not at all on whole numbers.
fn close(got: &[f32], want: &[f64], size: &[f64], terms: usize, exact: bool, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        let bound = if exact { 0.0 } else { (terms + 2) as f64 * 2f64.powi(-24) * 1.01 * size + 1e-30 };
        assert!((f64::from(*got) - want).abs() <= bound, "{what}: element {i} is {got}, not {want} to {bound:e}");
    }
}

struct Case {
    given: HostWeights,
    weights: TrainableWeights,
    x: Matrix,
    dy: Matrix,
    tx: Tensor,
    tdy: Tensor,
}

impl Case {
    fn new(device: &Device, op: Op, (m, n, k): (usize, usize, usize), data: Data, seed: u64) -> Self {
        let mut rng = rng(seed, (m * n * k) as u64);
        let given = host_weights(&Problem::linear(op, m, n, k, DType::F32), data, &mut rng);
        let weights = TrainableWeights::new(device, Arc::new(given.clone())).unwrap();
        let [x, dy] = [k, m].map(|cols| matrix(n, cols, DType::F32, data, &mut rng));
        let [tx, tdy] = [&x, &dy].map(|m| device.upload(m).unwrap());
        Self { given, weights, x, dy, tx, tdy }
    }
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (m, n, k) in SIZES {
        for op in forms() {
            for data in [Data::Whole, Data::Uniform] {
                let case = Case::new(device, op, (m, n, k), data, seed);
                let w = wide(&case.given.to_dense().unwrap());
                let (x, dy) = (wide(&case.x), wide(&case.dy));
                let (dx, dw) = oracle::grad(x.view(), w.view(), dy.view());
                let absolute = [&x, &w, &dy].map(|a| a.mapv(f64::abs));
                let (x_size, w_size) = oracle::grad(absolute[0].view(), absolute[1].view(), absolute[2].view());
                let (dw, w_size) = (of_values(&case.given, &dw), of_values(&case.given, &w_size));
                let what = format!("{op}, {m} x {n} x {k}, {data:?}");
                let (whole, shape) = (matches!(data, Data::Whole), case.weights.values().clone());
                let tdx = poisoned(device, n, k, DType::F32);
                let tdw = poisoned(device, shape.rows(), shape.cols(), DType::F32);
                let tdb = poisoned(device, 1, m, DType::F32);
                // Overwritten, and then added to.
                for add in [false, true] {
                    let [dx_to, dw_to, db_to] = [&tdx, &tdw, &tdb].map(|to| Gradient { to, add });
                    let Case { weights, tx, tdy, .. } = &case;
                    let calls = [
                        device.prepare(&GemmGradX { weights, dy: tdy, dx: dx_to }).unwrap(),
                        device.prepare(&GemmGradW { weights, x: tx, dy: tdy, dw: dw_to }).unwrap(),
                        device.prepare(&BiasGrad { dy: tdy, dbias: db_to }).unwrap(),
                    ];
                    device.submit(&calls).unwrap();
                    let times = if add { 2.0 } else { 1.0 };
                    let scaled = |a: Vec<f64>| a.into_iter().map(|a| a * times).collect::<Vec<_>>();
                    let all = |a: &Array2<f64>| scaled(a.iter().copied().collect());
                    let what = format!("{what}, add {add}");
                    close(&numbers(device, &tdx), &all(&dx), &all(&x_size), m, whole, &format!("dx of {what}"));
                    let (dw, w_size) = (scaled(dw.clone()), scaled(w_size.clone()));
                    close(&numbers(device, &tdw), &dw, &w_size, n, whole, &format!("dw of {what}"));
                    let sums = |a: &Array2<f64>| scaled(a.sum_axis(ndarray::Axis(0)).to_vec());
                    let size = sums(&absolute[2]);
                    close(&numbers(device, &tdb), &sums(&dy), &size, n, whole, &format!("dbias of {what}"));
                }
            }
        }
    }
}

on_both_devices!(products_follow_values_that_change);

/// After new values and a repack, product and gradient are those of the new weights.
fn products_follow_values_that_change(device: &Device) {
    let seed = seed();
    for op in forms() {
        let (m, n, k) = (70, 9, 52);
        let Case { given, weights, x, tx, .. } = Case::new(device, op, (m, n, k), Data::Whole, seed);
        let y = poisoned(device, n, m, DType::F32);
        let operands = GemmOperands::new(&tx, &y);
        let product = weights.product(device, Epilogue::NONE, operands).unwrap();
        let halved = crate::scaled(&device.read(weights.values()).unwrap(), 0.5);
        device.write(weights.values(), &halved).unwrap();
        device.submit(&[device.prepare(&Repack { weights: &weights }).unwrap(), product]).unwrap();
        let w = wide(&given.to_dense().unwrap()) * 0.5;
        let want = oracle::exact(wide(&x).view(), w.view(), None, sparse24::Activation::None, None);
        let got = numbers(device, &y);
        assert!(got.iter().zip(&want).all(|(got, want)| f64::from(*got) == *want), "{op}");
        let back = weights.read(device).unwrap();
        assert_eq!((back.op(), wide(&back.to_dense().unwrap())), (op, w), "{op}");
    }
}

/// How rows and tokens are dealt out must not show.
#[test]
fn gradients_do_not_depend_on_threads() {
    let seed = seed();
    for op in [Op::Dense, Op::Sparse24(VectorLen::ONE), Op::Sparse24(VectorLen::new(32).unwrap())] {
        let of = |threads| {
            let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
            let Case { weights, tx, tdy, .. } = Case::new(&device, op, (264, 300, 140), Data::Uniform, seed);
            let dx = device.zeros(300, 140, DType::F32).unwrap();
            let dw = device.zeros(264, weights.values().cols(), DType::F32).unwrap();
            let [to_x, to_w] = [&dx, &dw].map(|to| Gradient { to, add: false });
            device.prepare(&GemmGradX { weights: &weights, dy: &tdy, dx: to_x }).unwrap().run().unwrap();
            device.prepare(&GemmGradW { weights: &weights, x: &tx, dy: &tdy, dw: to_w }).unwrap().run().unwrap();
            (numbers(&device, &dx), numbers(&device, &dw))
        };
        assert!(of(1) == of(2) && of(1) == of(5), "{op}");
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let Case { weights, tx, tdy, .. } = Case::new(device, Op::Dense, (6, 3, 8), Data::Whole, 1);
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (dx, dw, short) = (tensor(3, 8), tensor(6, 8), tensor(3, 7));
    let to = |to| Gradient { to, add: false };
    let (grad_x, grad_w) = (
        GemmGradX { weights: &weights, dy: &tdy, dx: to(&dx) },
        GemmGradW { weights: &weights, x: &tx, dy: &tdy, dw: to(&dw) },
    );
    refuses(device, &GemmGradX { dx: to(&short), ..grad_x }, &["dx has shape [3, 7]"]);
    refuses(device, &GemmGradX { dy: &short, ..grad_x }, &["dy has shape [3, 7]"]);
    refuses(device, &GemmGradX { dx: to(&tdy), ..grad_x }, &["dx has shape"]);
    refuses(device, &GemmGradW { dw: to(&short), ..grad_w }, &["dw has shape [3, 7]"]);
    refuses(device, &GemmGradW { dw: to(weights.values()), ..grad_w }, &["dw shares its memory with values"]);
    refuses(device, &BiasGrad { dy: &tdy, dbias: to(&short) }, &["dbias has shape"]);
    let half = HostWeights::Dense(Matrix::zeros(6, 8, DType::F16).unwrap());
    let error = TrainableWeights::new(device, Arc::new(half)).unwrap_err().to_string();
    assert!(error.contains("f16, expected f32"), "{error}");
}
