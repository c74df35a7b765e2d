//! The loss of states beside others, and its gradient.

use ndarray::Array2;
use sparse24::reference::relative_error as oracle;
use sparse24::{DType, Device, Gradient, Matrix, Options, RelativeError};

use crate::common::{Data, matrix, rng, seed};
use crate::{indices, lengths_of, numbers, poisoned, refuses, with_nan_padding};

fn wide(m: &Matrix) -> Array2<f64> {
    m.to_array().mapv(f64::from)
}

on_both_devices!(losses_agree_with_the_oracle);

fn losses_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Tokens around the 8 of a workgroup and the 16 of a task; widths around the 32 lanes.
    for (batch, seq, width) in [(1, 1, 1), (2, 3, 7), (5, 4, 31), (6, 9, 33), (7, 5, 384)] {
        let mut rng = rng(seed, width as u64);
        let lengths = lengths_of(batch, seq, &mut rng);
        let [x, wanted] = [0; 2].map(|_| matrix(batch * seq, width, DType::F32, Data::Uniform, &mut rng));
        let [x, wanted] = [&x, &wanted].map(|m| with_nan_padding(m, &lengths, seq));
        let (losses, gradient) = oracle::exact(wide(&x).view(), wide(&wanted).view(), &lengths, seq, 3.0);
        let [tx, tw] = [&x, &wanted].map(|m| device.upload(m).unwrap());
        let tl = indices(device, &lengths);
        let loss = poisoned(device, 3, batch * seq, DType::F32);
        let dx = poisoned(device, batch * seq, width, DType::F32);
        for add in [false, true] {
            let call = RelativeError {
                x: &tx,
                wanted: &tw,
                lengths: &tl,
                batch,
                seq,
                weight: 3.0,
                loss: &loss,
                row: 1,
                dx: Some(Gradient { to: &dx, add }),
            };
            device.prepare(&call).unwrap().run().unwrap();
            let times = if add { 2.0 } else { 1.0 };
            let got = numbers(device, &loss);
            let tokens = batch * seq;
            assert!(got[..tokens].iter().chain(&got[2 * tokens..]).all(|x| x.is_nan()), "other rows are left alone");
            // Sums of `width` terms, and what comes after them.
            let bound = |size: f64| (width as f64 + 16.0) * 2f64.powi(-24) * size.abs() + 1e-30;
            for (token, (got, want)) in got[tokens..].iter().zip(&losses).enumerate() {
                assert!((f64::from(*got) - want).abs() <= bound(2.0 * want), "loss of {token}: {got}, not {want}");
            }
            for (i, (got, want)) in numbers(device, &dx).iter().zip(&gradient).enumerate() {
                // A difference of numbers up to 1 may have lost all but their last places.
                let size = times * want.abs() + times * gradient.iter().fold(0.0f64, |most, g| most.max(g.abs()));
                assert!(
                    (f64::from(*got) - times * want).abs() <= bound(size),
                    "element {i}: {got}, not {}",
                    times * want
                );
            }
            // The loss alone is the same.
            let alone = poisoned(device, 1, tokens, DType::F32);
            device.prepare(&RelativeError { loss: &alone, row: 0, dx: None, ..call }).unwrap().run().unwrap();
            assert_eq!(numbers(device, &alone), got[tokens..2 * tokens]);
        }
    }
}

/// The gradient is the limit of differences of the loss.
#[test]
fn the_exact_gradient_is_the_limit_of_differences() {
    let seed = seed();
    let mut rng = rng(seed, 0);
    let (lengths, seq) = ([2, 3, 0], 3);
    let [x, wanted] = [0; 2].map(|_| wide(&matrix(9, 5, DType::F32, Data::Uniform, &mut rng)));
    let loss = |x: &Array2<f64>| oracle::exact(x.view(), wanted.view(), &lengths, seq, 0.7).0.iter().sum::<f64>();
    let (_, gradient) = oracle::exact(x.view(), wanted.view(), &lengths, seq, 0.7);
    for ((row, column), slope) in gradient.indexed_iter() {
        let moved = |by: f64| {
            let mut x = x.clone();
            x[[row, column]] += by;
            loss(&x)
        };
        let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        assert!((slope - difference).abs() < 1e-8, "({row}, {column}): {slope}, not {difference}");
    }
}

#[test]
fn losses_do_not_depend_on_threads() {
    let of = |threads| {
        let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
        let mut rng = rng(7, 0);
        let [x, wanted] = [0; 2].map(|_| device.upload(&matrix(70, 48, DType::F32, Data::Uniform, &mut rng)).unwrap());
        let lengths = indices(&device, &[9, 10, 1, 7, 10, 3, 10]);
        let (loss, dx) = (device.zeros(1, 70, DType::F32).unwrap(), device.zeros(70, 48, DType::F32).unwrap());
        let to = Some(Gradient { to: &dx, add: false });
        let call = RelativeError {
            x: &x,
            wanted: &wanted,
            lengths: &lengths,
            batch: 7,
            seq: 10,
            weight: 1.0,
            loss: &loss,
            row: 0,
            dx: to,
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
    let lengths = indices(device, &[3, 2]);
    let to = |to| Some(Gradient { to, add: false });
    let call = RelativeError {
        x: &x,
        wanted: &wanted,
        lengths: &lengths,
        batch: 2,
        seq: 3,
        weight: 1.0,
        loss: &loss,
        row: 1,
        dx: to(&dx),
    };
    refuses(device, &RelativeError { wanted: &short, ..call }, &["wanted has shape [5, 8]"]);
    refuses(device, &RelativeError { row: 2, ..call }, &["loss has 2 rows, none of number 2"]);
    refuses(device, &RelativeError { dx: to(&short), ..call }, &["dx has shape"]);
    refuses(device, &RelativeError { dx: to(&x), ..call }, &["dx shares its memory with x"]);
}
