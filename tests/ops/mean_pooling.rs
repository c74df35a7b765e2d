//! Mean pooling.

use sparse24::ops::mean_pooling::MeanPoolingKernel;
use sparse24::reference::mean_pooling as oracle;
use sparse24::{DType, Device, Matrix, MeanPooling, MeanPoolingGrad};

use crate::common::{Data, matrix, rng, seed};
use crate::{
    Sink, differences_agree, indices, into, lengths_of, numbers, poisoned, refuses, scaled, slightly_wrong, types,
    wide, with_nan_padding,
};

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

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let mut rng = rng(seed(), 0);
    // Whole, one token, none, more than there are rows.
    let (seq, lengths) = (3, [3, 1, 0, 9]);
    let mut given = |rows| wide(&matrix(rows, 5, DType::F32, Data::Uniform, &mut rng));
    let (x, dy) = (given(12), given(4));
    for normalize in [false, true] {
        let dx = oracle::grad(x.view(), &lengths, seq, normalize, dy.view());
        differences_agree(&dx, &x, |x| (oracle::exact(x.view(), &lengths, seq, normalize) * &dy).sum());
    }
    // Means that are shorter than what they are divided by: linear, and steep.
    let x = x * 1e-14;
    let dx = oracle::grad(x.view(), &lengths, seq, true, dy.view());
    let plain = oracle::grad(x.view(), &lengths, seq, false, dy.view()) * 1e12;
    assert!(dx.iter().zip(&plain).all(|(a, b)| (a - b).abs() <= 1e-12 * b.abs()));
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Rows around the 16 of a workgroup; features around its 256 threads, and those of MiniLM.
    let sizes = [(1, 1, 1), (5, 5, 3), (3, 16, 64), (5, 17, 255), (2, 15, 257), (5, 40, 384), (2, 3, 1030)];
    for (i, (batch, seq, width)) in sizes.into_iter().enumerate() {
        for (data, factor) in [(Data::Whole, 1.0), (Data::Uniform, 1.0), (Data::Uniform, 1e-14)] {
            for (normalize, add) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut rng = rng(seed, i as u64);
                let lengths = lengths_of(batch, seq, &mut rng);
                let x = scaled(&matrix(batch * seq, width, DType::F32, data, &mut rng), factor);
                let x = with_nan_padding(&x, &lengths, seq);
                let dy = matrix(batch, width, DType::F32, Data::Uniform, &mut rng);
                let want = oracle::expect_grad(&x, &lengths, seq, normalize, &dy).unwrap();
                let (tx, tdy, tl) =
                    (device.upload(&x).unwrap(), device.upload(&dy).unwrap(), indices(device, &lengths));
                let sink = Sink::new(device, (batch * seq, width), add, &mut rng);
                let dx = sink.gradient();
                let grad = MeanPoolingGrad { x: &tx, lengths: &tl, batch, seq, normalize, dy: &tdy, dx };
                device.prepare(&grad).unwrap().run().unwrap();
                let what = format!("{batch} x {seq} x {width}, {data:?} * {factor}, {normalize}, {add}");
                let verdict = sink.verify(device, &want, &what);
                // A mean of whole numbers may be zero but for the rounding of its division.
                let whole = matches!(data, Data::Whole);
                assert!(verdict.undecided == 0 || (whole && normalize && width < 4), "{what}: {verdict}");
                if !add && factor == 1.0 && !whole && width == 384 {
                    slightly_wrong(&want, &device.read(&sink.to).unwrap(), &what);
                }
            }
        }
    }
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, dy, to, two) = (tensor(6, 8), tensor(2, 8), tensor(6, 8), device.indices(2).unwrap());
    let grad = MeanPoolingGrad { x: &x, lengths: &two, batch: 2, seq: 3, normalize: true, dy: &dy, dx: into(&to) };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &MeanPoolingGrad { dy: &tensor(3, 8), ..grad }, &["dy has shape [3, 8], expected [2, 8]"]);
    refuses(device, &MeanPoolingGrad { seq: 4, ..grad }, &["x has shape [6, 8], expected [8, 8]"]);
    refuses(device, &MeanPoolingGrad { dx: into(&dy), ..grad }, &["dx has shape [2, 8], expected [6, 8]"]);
    refuses(device, &MeanPoolingGrad { dx: into(&x), ..grad }, &["dx shares its memory with x"]);
    refuses(device, &MeanPoolingGrad { lengths: &device.indices(3).unwrap(), ..grad }, &["lengths", "[3]"]);
    let half = device.zeros(6, 8, DType::F16).unwrap();
    refuses(device, &MeanPoolingGrad { x: &half, ..grad }, &["x is f16, expected f32"]);
    // Nothing to write is no error.
    let (none, [empty, dy, to]) = (device.indices(0).unwrap(), [0; 3].map(|rows| tensor(rows, 8)));
    let grad = MeanPoolingGrad { x: &empty, lengths: &none, batch: 0, dy: &dy, dx: into(&to), ..grad };
    device.prepare(&grad).unwrap().run().unwrap();
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
