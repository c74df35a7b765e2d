//! Rotary positions.

use sparse24::ops::rotary::RotaryKernel;
use sparse24::reference::rotary as oracle;
use sparse24::{DType, Device, Matrix, Rotary, RotaryGrad};

use crate::common::{Data, matrix, rng, seed};
use crate::{Sink, differences_agree, expect, indices, into, numbers, poisoned, refuses, slightly_wrong, types, wide};

/// Tokens, rows of a sequence, position of its first row, half of a head, heads that are turned, features behind them.
/// One pair; an odd number behind; around a workgroup of 256 items; a model's heads of Q and K before V; a sequence
/// that is longer than the tokens, and one that is not whole; nothing to turn.
const SIZES: [(usize, usize, usize, usize, usize, usize); 7] = [
    (1, 1, 0, 1, 1, 0),
    (3, 2, 5, 3, 2, 5),
    (5, 5, 0, 51, 1, 0),
    (17, 4, 1, 16, 3, 32),
    (6, 3, 7, 32, 12, 256),
    (2, 100, 90, 4, 2, 3),
    (3, 3, 0, 2, 0, 7),
];

/// The position of each of some tokens; that of every seventh is `past` more, so that neither tokens of a sequence nor
/// sequences need be in order.
fn positions_of(tokens: usize, seq: usize, offset: usize, past: u32) -> Vec<u32> {
    let past = |t: usize| if t % 7 == 3 { past } else { 0 };
    (0..tokens).map(|t| (t % seq + offset) as u32 + past(t)).collect()
}

on_both_devices!(rotations_agree_with_the_oracle);

fn rotations_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, (tokens, seq, offset, half, heads, more)) in SIZES.into_iter().enumerate() {
        for (storage, output) in types(device, i) {
            for data in [Data::Whole, Data::Uniform, Data::Edge] {
                let mut rng = rng(seed, i as u64);
                let rotated = 2 * half * heads;
                let x = matrix(tokens, rotated + more, storage, data, &mut rng);
                let last = offset + seq.min(tokens);
                // Of a model, and any numbers.
                let tables = match data {
                    Data::Edge => [0, 1].map(|_| matrix(last, half, DType::F32, Data::Edge, &mut rng)),
                    _ => Rotary::tables(last, &Rotary::frequencies(2 * half, 10000.0), 1.0).unwrap(),
                };
                let [cos, sin] = &tables;
                let positions = positions_of(tokens, seq, offset, [0, 1, u32::MAX >> 1][i % 3]);
                let want = oracle::expect(&x, (cos, sin), &positions, rotated, output).unwrap();
                let [tx, tc, ts] = [&x, cos, sin].map(|m| device.upload(m).unwrap());
                let (positions, y) = (indices(device, &positions), poisoned(device, tokens, rotated + more, output));
                let call = Rotary { x: &tx, cos: &tc, sin: &ts, positions: &positions, rotated, y: &y };
                let call = device.prepare(&call).unwrap();
                let what = format!("{:?}, {storage} to {output}, {data:?}", SIZES[i]);
                expect(device, &call, &y, &want, &what);
                if matches!(data, Data::Uniform) && storage == output && rotated > 60 {
                    slightly_wrong(&want, &device.read(&y).unwrap(), &what);
                }
            }
        }
    }
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let mut rng = rng(seed(), 0);
    let [x, dy] = [0, 1].map(|_| wide(&matrix(5, 11, DType::F32, Data::Uniform, &mut rng)));
    let [cos, sin] = Rotary::tables(6, &Rotary::frequencies(4, 100.0), 1.5).unwrap().map(|table| wide(&table));
    let (tables, positions) = ((cos.view(), sin.view()), [2, 3, 0, 3, 9]);
    let dx = oracle::grad(tables, &positions, 8, dy.view());
    differences_agree(&dx, &x, |x| (oracle::exact(x.view(), tables, &positions, 8) * &dy).sum());
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, (tokens, seq, offset, half, heads, more)) in SIZES.into_iter().enumerate() {
        for data in [Data::Whole, Data::Uniform] {
            for add in [false, true] {
                let mut rng = rng(seed, i as u64);
                let rotated = 2 * half * heads;
                let dy = matrix(tokens, rotated + more, DType::F32, data, &mut rng);
                let frequencies = Rotary::frequencies(2 * half, 10000.0);
                let tables = Rotary::tables(offset + seq.min(tokens), &frequencies, 1.25).unwrap();
                let [cos, sin] = &tables;
                let positions = positions_of(tokens, seq, offset, [0, 1, u32::MAX >> 1][i % 3]);
                let want = oracle::expect_grad((cos, sin), &positions, rotated, &dy).unwrap();
                let [tdy, tc, ts] = [&dy, cos, sin].map(|m| device.upload(m).unwrap());
                let sink = Sink::new(device, (tokens, rotated + more), add, &mut rng);
                let (positions, dx) = (indices(device, &positions), sink.gradient());
                let grad = RotaryGrad { cos: &tc, sin: &ts, positions: &positions, rotated, dy: &tdy, dx };
                device.prepare(&grad).unwrap().run().unwrap();
                let what = format!("{:?}, {data:?}, {add}", SIZES[i]);
                sink.verify(device, &want, &what);
                if !add && matches!(data, Data::Uniform) && rotated > 60 {
                    slightly_wrong(&want, &device.read(&sink.to).unwrap(), &what);
                }
            }
        }
    }
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (dy, to, cos, sin) = (tensor(6, 8), tensor(6, 8), tensor(5, 2), tensor(5, 2));
    let [six, five, three, none] = [6, 5, 3, 0].map(|tokens| device.indices(tokens).unwrap());
    let grad = RotaryGrad { cos: &cos, sin: &sin, positions: &six, rotated: 8, dy: &dy, dx: into(&to) };
    assert!(device.prepare(&grad).is_ok());
    refuses(device, &RotaryGrad { dx: into(&tensor(6, 7)), ..grad }, &["dx has shape [6, 7], expected [6, 8]"]);
    refuses(device, &RotaryGrad { sin: &tensor(5, 1), ..grad }, &["sin", "[5, 1]", "[5, 2]"]);
    refuses(device, &RotaryGrad { rotated: 6, ..grad }, &["6 of 8 features", "heads of 4"]);
    refuses(device, &RotaryGrad { positions: &five, ..grad }, &["positions has shape [5], expected [6]"]);
    refuses(device, &RotaryGrad { dx: into(&dy), ..grad }, &["shares its memory"]);
    let half = device.zeros(6, 8, DType::F16).unwrap();
    refuses(device, &RotaryGrad { dy: &half, ..grad }, &["dy is f16, expected f32"]);
    for (tokens, width, positions) in [(0, 8, &none), (3, 0, &three)] {
        let [dy, to] = [0; 2].map(|_| tensor(tokens, width));
        let grad = RotaryGrad { positions, rotated: 0, dy: &dy, dx: into(&to), ..grad };
        device.prepare(&grad).unwrap().run().unwrap();
    }
}

on_both_devices!(each_token_has_a_position_of_its_own);

/// Tables that name their position: what a token gets tells which it took. Past the end it is the last.
fn each_token_has_a_position_of_its_own(device: &Device) {
    let names: Vec<f32> = (0..20).map(|position| position as f32).collect();
    let cos = device.upload(&Matrix::from_f32(20, 1, &names).unwrap()).unwrap();
    let sin = device.zeros(20, 1, DType::F32).unwrap();
    let x = device.upload(&Matrix::from_f32(6, 2, &[1.0; 12]).unwrap()).unwrap();
    let y = device.zeros(6, 2, DType::F32).unwrap();
    let positions = indices(device, &[11, 0, 19, 20, 7, u32::MAX]);
    let call =
        device.prepare(&Rotary { x: &x, cos: &cos, sin: &sin, positions: &positions, rotated: 2, y: &y }).unwrap();
    call.run().unwrap();
    let expected = [11.0, 11.0, 0.0, 0.0, 19.0, 19.0, 19.0, 19.0, 7.0, 7.0, 19.0, 19.0];
    assert_eq!(numbers(device, &y), expected, "{}", device.info().name());
    // Other positions, by the same call.
    device.write_indices(&positions, &[1, 2, 3, 4, 5, 6]).unwrap();
    call.run().unwrap();
    let expected: Vec<f32> = (2..14).map(|e| (e / 2) as f32).collect();
    assert_eq!(numbers(device, &y), expected, "{}", device.info().name());
}

/// Angles of a position and the largest frequency, and of the second, by hand; and what YaRN scales.
#[test]
fn tables_are_those_of_the_angles() {
    let frequencies = Rotary::frequencies(4, 100.0);
    assert!(frequencies.len() == 2 && frequencies[0] == 1.0 && (frequencies[1] - 0.1).abs() < 1e-16);
    for scale in [1.0, 1.5] {
        let [cos, sin] = Rotary::tables(3, &[1.0, 0.1], scale).unwrap();
        assert_eq!((cos.rows(), cos.cols(), sin.rows(), sin.cols()), (3, 2, 3, 2));
        for position in 0..3 {
            for (c, angle) in [position as f64, position as f64 * 0.1].into_iter().enumerate() {
                let want = [angle.cos(), angle.sin()].map(|of| (scale * of) as f32);
                assert_eq!([cos.get(position, c), sin.get(position, c)], want);
            }
        }
    }
    assert!(Rotary::tables(usize::MAX, &[1.0, 1.0], 1.0).is_err());
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y, cos, sin) = (tensor(6, 8), tensor(6, 8), tensor(5, 2), tensor(5, 2));
    let [six, seven] = [6, 7].map(|tokens| device.indices(tokens).unwrap());
    let rotary = Rotary { x: &x, cos: &cos, sin: &sin, positions: &six, rotated: 8, y: &y };
    assert!(device.prepare(&rotary).is_ok());
    refuses(device, &Rotary { y: &tensor(6, 7), ..rotary }, &["y has shape [6, 7], expected [6, 8]"]);
    refuses(device, &Rotary { sin: &tensor(5, 1), ..rotary }, &["sin", "[5, 1]", "[5, 2]"]);
    refuses(device, &Rotary { rotated: 6, ..rotary }, &["6 of 8 features", "heads of 4"]);
    refuses(device, &Rotary { rotated: 12, ..rotary }, &["12 of 8 features"]);
    refuses(device, &Rotary { positions: &seven, ..rotary }, &["positions has shape [7], expected [6]"]);
    let none = tensor(0, 2);
    refuses(device, &Rotary { cos: &none, sin: &none, ..rotary }, &["cos has no rows"]);
    refuses(device, &Rotary { y: &x, ..rotary }, &["y shares its memory with x"]);
    let half = device.zeros(5, 2, DType::F16).unwrap();
    refuses(device, &Rotary { cos: &half, ..rotary }, &["cos is f16, expected f32"]);
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    let table = device.zeros(0, 2, DType::F32).unwrap();
    for (tokens, width) in [(0, 8), (0, 0), (3, 0)] {
        let [x, y] = [0; 2].map(|_| device.zeros(tokens, width, DType::F32).unwrap());
        let positions = device.indices(tokens).unwrap();
        let rotary = Rotary { x: &x, cos: &table, sin: &table, positions: &positions, rotated: 0, y: &y };
        device.prepare(&rotary).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |storage| RotaryKernel::new(32, storage, DType::F16).map(|k| k.to_string()).map_err(|e| e.to_string());
    assert_eq!(says(DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F32), Ok("rotary-f32f32-d64-out_f16".into()));
}
