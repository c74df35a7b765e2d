//! Mean pooling.

use sparse24::ops::mean_pooling::MeanPoolingKernel;
use sparse24::reference::mean_pooling as oracle;
use sparse24::{DType, Device, Matrix, MeanPooling};

use crate::common::{Data, matrix, rng, seed};
use crate::{indices, lengths_of, numbers, poisoned, refuses, types, with_nan_padding};

on_both_devices!(pooling_agrees_with_the_oracle);

fn pooling_agrees_with_the_oracle(device: &Device) {
    let seed = seed();
    // Widths of one, a ragged four, where one, two and many runs of 256 threads share the tokens, and past the 1024
    // features that a workgroup has at once.
    let sizes = [
        (1, 1, 1),
        (5, 5, 3),
        (3, 64, 4),
        (5, 33, 384),
        (2, 7, 516),
        (2, 5, 1024),
        (5, 9, 1028),
        (2, 3, 1030),
        (2, 100, 63),
    ];
    for (i, (batch, seq, width)) in sizes.into_iter().enumerate() {
        for (storage, output) in types(device, i) {
            if output != DType::F32 {
                continue;
            }
            for data in [Data::Whole, Data::Uniform, Data::Edge] {
                for normalize in [false, true] {
                    let mut rng = rng(seed, i as u64);
                    let lengths = lengths_of(batch, seq, &mut rng);
                    let x = with_nan_padding(&matrix(batch * seq, width, storage, data, &mut rng), &lengths, seq);
                    let want = oracle::expect(&x, &lengths, seq, normalize).unwrap();
                    let (tx, tl) = (device.upload(&x).unwrap(), indices(device, &lengths));
                    let y = poisoned(device, batch, width, DType::F32);
                    let call =
                        device.prepare(&MeanPooling { x: &tx, lengths: &tl, batch, seq, normalize, y: &y }).unwrap();
                    call.run().unwrap();
                    let verdict = want.verify(&device.read(&y).unwrap()).unwrap();
                    let what = format!("{batch} x {seq} x {width}, {storage}, {data:?}, {normalize}: {verdict}");
                    // A mean of a few tiny numbers may have no direction that its bound can tell.
                    assert!(verdict.error_over_bound <= 1.0, "{what}");
                    assert!(verdict.undecided * 2 <= verdict.checked || width == 1, "{what}");
                }
            }
        }
    }
}

on_both_devices!(lengths_that_overflow_show);

/// A mean over a length whose square f32 cannot hold is NaN, not zero; its neighbours are as ever.
fn lengths_that_overflow_show(device: &Device) {
    for width in [64, 63] {
        let row = |of: &dyn Fn(usize) -> f32| (0..width).map(of).collect::<Vec<_>>();
        let mut x = row(&|c| if c % 2 == 0 { 3e30 } else { -3e30 });
        x.extend(row(&|c| c as f32));
        x.extend(row(&|_| 3e38));
        x.extend(row(&|_| 1.5));
        let zeros = device.upload(&Matrix::zeros(4, width, DType::F32).unwrap()).unwrap();
        let x = device.upload(&Matrix::from_f32(4, width, &x).unwrap()).unwrap();

        // A mean whose length's square overflows, and one that is a number all the same, unless it is normalised.
        let lengths = indices(device, &[1, 1, 0, 1]);
        for normalize in [false, true] {
            let pool = MeanPooling { x: &x, lengths: &lengths, batch: 4, seq: 1, normalize, y: &zeros };
            device.prepare(&pool).unwrap().run().unwrap();
            let y = numbers(device, &zeros);
            let rows: Vec<_> = y.chunks(width).collect();
            assert!(rows[0].iter().all(|y| y.is_nan() == normalize), "{normalize}: {:?}", &rows[0][..4]);
            assert!(rows[1].iter().all(|y| y.is_finite()) && rows[2].iter().all(|y| *y == 0.0));
        }
    }
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y, means, two) = (tensor(6, 8), tensor(6, 8), tensor(2, 8), device.indices(2).unwrap());
    let pooling = MeanPooling { x: &x, lengths: &two, batch: 2, seq: 3, normalize: true, y: &means };
    refuses(device, &MeanPooling { y: &y, ..pooling }, &["y has shape [6, 8], expected [2, 8]"]);
    let half_means = device.zeros(2, 8, DType::F16).unwrap();
    refuses(device, &MeanPooling { y: &half_means, ..pooling }, &["y is f16, expected f32"]);
    let wide = device.zeros(6, 8, DType::Bf16).unwrap();
    refuses(device, &MeanPooling { x: &wide, ..pooling }, &["x is bf16"]);
}

on_both_devices!(empty_operands_are_no_error);

fn empty_operands_are_no_error(device: &Device) {
    let none = device.indices(0).unwrap();
    for width in [8, 0] {
        let [x, y] = [0; 2].map(|_| device.zeros(0, width, DType::F32).unwrap());
        let pooling = MeanPooling { x: &x, lengths: &none, batch: 0, seq: 5, normalize: true, y: &y };
        device.prepare(&pooling).unwrap().run().unwrap();
    }
    // Sequences without rows have means all the same: zeros.
    let (x, y) = (device.zeros(0, 6, DType::F32).unwrap(), poisoned(device, 2, 6, DType::F32));
    let lengths = indices(device, &[3, 0]);
    let pooling = MeanPooling { x: &x, lengths: &lengths, batch: 2, seq: 0, normalize: true, y: &y };
    device.prepare(&pooling).unwrap().run().unwrap();
    assert_eq!(device.read(&y).unwrap(), Matrix::zeros(2, 6, DType::F32).unwrap());
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |storage| MeanPoolingKernel::new(8, true, storage).map(|k| k.to_string()).map_err(|e| e.to_string());
    assert_eq!(says(DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F16), Ok("mean_pooling-f16f32-quads-unit".into()));
}
