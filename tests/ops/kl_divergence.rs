//! The divergence of logits from others, and its gradient.

use ndarray::Array2;
use sparse24::reference::kl_divergence as oracle;
use sparse24::{DType, Device, Elements, Gradient, KlDivergence, Matrix, Options, Tensor};

use crate::common::{Data, matrix, rng, seed};
use crate::{differences_agree, indices, lengths_of, numbers, poisoned, refuses, scaled, wide, with_nan_padding};

fn number(device: &Device, x: f32) -> Tensor {
    device.upload(&Matrix::from_f32(1, 1, &[x]).unwrap()).unwrap()
}

/// How far the loss of a row and each of its gradients may be from the exact ones, with weight 1. Logarithms of
/// probabilities are off by a rounding of the logits, of the sum and its logarithm (WGSL: 2⁻²¹ near 1) and of the
/// difference; exponentials by that, and by 3 + 2·|ln p| ulp in WGSL. The terms of the loss are added up in as many
/// roundings as a lane has terms, and those that add up the lanes.
fn bounds(x: &[f64], wanted: &[f64]) -> (f64, Vec<f64>) {
    const U: f64 = 1.0 / (1 << 24) as f64;
    let (q, p) = (oracle::log_softmax(x.into()), oracle::log_softmax(wanted.into()));
    let largest = x.iter().chain(wanted).fold(0.0f64, |all, x| all.max(x.abs()));
    let log = 12.0 * U + (4.0 * largest + x.len() as f64 / 16.0 + 16.0) * U;
    let share = |log_p: f64| log_p.exp() * (log + (6.0 + 4.0 * log_p.abs()) * U) + 1e-37;
    let terms = q.iter().zip(&p).map(|(&q, &p)| {
        let off = (q - p).abs();
        let (size, error) = (q.exp() + p.exp() * (1.0 + off), share(q) + share(p) * (1.0 + off) + p.exp() * log);
        error + size * (x.len() as f64 / 16.0 + 24.0) * U
    });
    (terms.sum(), q.iter().zip(&p).map(|(&q, &p)| 2.0 * (share(q) + share(p))).collect())
}

on_both_devices!(losses_agree_with_the_oracle);

fn losses_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Widths around the 16 lanes of a loop and the 256 of a workgroup; logits as flat as one is, and so far apart that
    // all probability lies in a few.
    for (batch, seq, width, size) in
        [(1, 1, 1, 1.0), (2, 3, 7, 3.0), (5, 4, 31, 30.0), (6, 2, 257, 10.0), (1, 3, 1500, 8.0), (1, 2, 40, 200.0)]
    {
        let mut rng = rng(seed, width as u64);
        let lengths = lengths_of(batch, seq, &mut rng);
        let [x, wanted] = [0; 2].map(|_| {
            let logits = matrix(batch * seq, width, DType::F32, Data::Uniform, &mut rng);
            with_nan_padding(&scaled(&logits, size), &lengths, seq)
        });
        let (losses, gradient) = oracle::exact(wide(&x).view(), wide(&wanted).view(), &lengths, seq, 0.25);
        let [tx, tw] = [&x, &wanted].map(|m| device.upload(m).unwrap());
        let (tl, weight) = (indices(device, &lengths), number(device, 0.25));
        let loss = poisoned(device, 3, batch * seq, DType::F32);
        let dx = poisoned(device, batch * seq, width, DType::F32);
        for add in [false, true] {
            let call = KlDivergence {
                x: &tx,
                wanted: &tw,
                lengths: &tl,
                batch,
                seq,
                weight: &weight,
                loss: &loss,
                row: 1,
                dx: Some(Gradient { to: &dx, add }),
            };
            device.prepare(&call).unwrap().run().unwrap();
            let times = if add { 2.0 } else { 1.0 };
            let (got, gradients) = (numbers(device, &loss), numbers(device, &dx));
            let tokens = batch * seq;
            assert!(got[..tokens].iter().chain(&got[2 * tokens..]).all(|x| x.is_nan()), "other rows are left alone");
            let got = &got[tokens..2 * tokens];
            for token in 0..tokens {
                let of = format!("token {token} of {batch} x {seq} x {width} on {}", device.info().name());
                let row = token * width..(token + 1) * width;
                if token % seq >= lengths[token / seq] as usize {
                    assert!(got[token] == 0.0 && gradients[row].iter().all(|g| *g == 0.0), "padding, {of}");
                    continue;
                }
                let (bound, each) = bounds(&wide(&x).row(token).to_vec(), &wide(&wanted).row(token).to_vec());
                let (got, want) = (f64::from(got[token]), losses[token]);
                assert!((got - want).abs() <= 0.25 * bound, "{of}: {got}, not {want} (± {:.1e})", 0.25 * bound);
                for ((got, want), bound) in gradients[row].iter().zip(gradient.row(token)).zip(each) {
                    let (got, want, bound) = (f64::from(*got), times * want, 0.25 * times * bound);
                    assert!((got - want).abs() <= bound, "{of}: {got}, not {want} (± {bound:.1e})");
                }
            }
            // The loss alone is the same.
            let alone = poisoned(device, 1, tokens, DType::F32);
            device.prepare(&KlDivergence { loss: &alone, row: 0, dx: None, ..call }).unwrap().run().unwrap();
            assert_eq!(numbers(device, &alone), got);
        }
    }
}

on_both_devices!(logits_that_hardly_differ_hardly_diverge);

/// A rounding of a logit, as f32 or as bf16, is a divergence of half its square: far below the roundings of logarithms.
fn logits_that_hardly_differ_hardly_diverge(device: &Device) {
    let mut rng = rng(seed(), 0);
    let wanted = scaled(&matrix(1, 3000, DType::F32, Data::Uniform, &mut rng), 8.0);
    let moved: Vec<f32> =
        wanted.elements().to_f32().iter().enumerate().map(|(i, x)| x + (i % 2) as f32 * 4e-3).collect();
    let x = Matrix::new(1, 3000, Elements::F32(moved)).unwrap();
    let (exact, _) = oracle::exact(wide(&x).view(), wide(&wanted).view(), &[1], 1, 1.0);
    let run = |x: &Matrix| {
        let [x, wanted] = [x, &wanted].map(|m| device.upload(m).unwrap());
        let (lengths, weight) = (indices(device, &[1]), number(device, 1.0));
        let loss = poisoned(device, 1, 1, DType::F32);
        let call = KlDivergence {
            x: &x,
            wanted: &wanted,
            lengths: &lengths,
            batch: 1,
            seq: 1,
            weight: &weight,
            loss: &loss,
            row: 0,
            dx: None,
        };
        device.prepare(&call).unwrap().run().unwrap();
        f64::from(numbers(device, &loss)[0])
    };
    let (got, same) = (run(&x), run(&wanted));
    assert!(exact[0] > 1.5e-6 && (got - exact[0]).abs() < 3e-7, "{got}, not {}", exact[0]);
    assert!(same.abs() < 3e-7, "{same}");
}

/// The gradient is the limit of differences of the loss, and what moves all logits of a token does not change it.
#[test]
fn the_exact_gradient_is_the_limit_of_differences() {
    let mut rng = rng(seed(), 0);
    let (lengths, seq) = ([2, 3, 0], 3);
    let [x, wanted] = [0; 2].map(|_| wide(&scaled(&matrix(9, 5, DType::F32, Data::Uniform, &mut rng), 3.0)));
    let loss = |x: &Array2<f64>| oracle::exact(x.view(), wanted.view(), &lengths, seq, 0.7).0.iter().sum::<f64>();
    let (_, gradient) = oracle::exact(x.view(), wanted.view(), &lengths, seq, 0.7);
    differences_agree(&gradient, &x, loss);
    assert!(gradient.rows().into_iter().all(|row| row.sum().abs() < 1e-12));
    assert!((loss(&x) - loss(&(&x + 50.0))).abs() < 1e-9 && loss(&wanted) == 0.0 && loss(&x) > 0.1);
}

on_both_devices!(a_logit_that_is_no_number_is_seen);

fn a_logit_that_is_no_number_is_seen(device: &Device) {
    let logits = |at: usize, x: f32| {
        let mut all = vec![0.5; 2 * 300];
        all[at] = x;
        device.upload(&Matrix::from_f32(2, 300, &all).unwrap()).unwrap()
    };
    let (lengths, weight) = (indices(device, &[2]), number(device, 1.0));
    for at in [0, 7, 299] {
        for (x, wanted) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
            let [x, wanted] = [x, wanted].map(|x| logits(at, x));
            let loss = poisoned(device, 1, 2, DType::F32);
            let call = KlDivergence {
                x: &x,
                wanted: &wanted,
                lengths: &lengths,
                batch: 1,
                seq: 2,
                weight: &weight,
                loss: &loss,
                row: 0,
                dx: None,
            };
            device.prepare(&call).unwrap().run().unwrap();
            let got = numbers(device, &loss);
            assert!(got[0].is_nan() && got[1].abs() < 1e-6, "{at}: {got:?}");
        }
    }
}

#[test]
fn losses_do_not_depend_on_threads() {
    let of = |threads| {
        let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
        let mut rng = rng(7, 0);
        let [x, wanted] = [0; 2].map(|_| device.upload(&matrix(70, 480, DType::F32, Data::Uniform, &mut rng)).unwrap());
        let (lengths, weight) = (indices(&device, &[9, 10, 1, 7, 10, 3, 10]), number(&device, 1.0));
        let (loss, dx) = (device.zeros(1, 70, DType::F32).unwrap(), device.zeros(70, 480, DType::F32).unwrap());
        let call = KlDivergence {
            x: &x,
            wanted: &wanted,
            lengths: &lengths,
            batch: 7,
            seq: 10,
            weight: &weight,
            loss: &loss,
            row: 0,
            dx: Some(Gradient { to: &dx, add: false }),
        };
        device.prepare(&call).unwrap().run().unwrap();
        (numbers(&device, &loss), numbers(&device, &dx))
    };
    assert!(of(1) == of(2) && of(1) == of(5));
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, wanted, dx, loss, short) = (tensor(6, 8), tensor(6, 8), tensor(6, 8), tensor(2, 6), tensor(5, 8));
    let (lengths, weight) = (indices(device, &[3, 2]), number(device, 1.0));
    let to = |to| Some(Gradient { to, add: false });
    let call = KlDivergence {
        x: &x,
        wanted: &wanted,
        lengths: &lengths,
        batch: 2,
        seq: 3,
        weight: &weight,
        loss: &loss,
        row: 1,
        dx: to(&dx),
    };
    refuses(device, &KlDivergence { wanted: &short, ..call }, &["wanted has shape [5, 8]"]);
    refuses(device, &KlDivergence { weight: &short, ..call }, &["weight has shape [5, 8]"]);
    refuses(device, &KlDivergence { row: 2, ..call }, &["loss has 2 rows, none of number 2"]);
    refuses(device, &KlDivergence { dx: to(&short), ..call }, &["dx has shape"]);
    refuses(device, &KlDivergence { dx: to(&x), ..call }, &["dx shares its memory with x"]);
}
