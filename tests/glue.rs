//! What runs between the GEMMs against its oracle, on a GPU and on the CPU device.
//!
//! Tests that need a GPU are ignored unless asked for (`-- --include-ignored`). Outputs start as NaN, lengths are
//! unequal, and padding holds NaN wherever its values must not matter.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips")]

mod common;

use common::{Data, allocated, callers_device, gpu, matrix, rng, seed, submissions};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use sparse24::kernels::glue::{AttentionTile, Glue};
use sparse24::kernels::{Caps, CoopUnit, Rates};
use sparse24::reference::Verdict;
use sparse24::reference::glue::{self as oracle, Expectation};
use sparse24::{
    Attention, DType, Device, Elements, Embed, Error, Indices, Io, LayerNorm, Matrix, Op, Options, Pool, Prepared,
    Problem, Tensor, Tuning,
};

/// Pairs of input and output types that the device computes on: all of them on the CPU, for case `i` f32 and one other
/// on a GPU, where each pair is a pipeline to compile.
fn types(device: &Device, i: usize) -> Vec<(DType, DType)> {
    let plain = (DType::F32, DType::F32);
    let others = [(DType::F16, DType::F16), (DType::F16, DType::F32), (DType::F32, DType::F16)];
    match device.caps() {
        None => std::iter::once(plain).chain(others).collect(),
        Some(caps) if caps.f16 => vec![plain, others[i % 3]],
        Some(_) => vec![plain],
    }
}

/// A tensor of NaNs, to be overwritten.
fn poisoned(device: &Device, rows: usize, cols: usize, dtype: DType) -> Tensor {
    let nan = Elements::from_f32(dtype, &vec![f32::NAN; rows * cols]);
    device.upload(&Matrix::new(rows, cols, nan).unwrap()).unwrap()
}

fn indices(device: &Device, data: &[u32]) -> Indices {
    let indices = device.indices(data.len()).unwrap();
    device.write_indices(&indices, data).unwrap();
    indices
}

/// Runs a call and judges its output.
fn expect(device: &Device, call: &Prepared, y: &Tensor, want: &Expectation, what: &str) -> Verdict {
    call.run().unwrap();
    let verdict = want.verify(&device.read(y).unwrap()).unwrap();
    assert!(verdict.passed(), "{what} on {}: {verdict}", device.info().name());
    verdict
}

/// Multiplies every element.
fn scaled(m: &Matrix, factor: f32) -> Matrix {
    let values: Vec<f32> = m.elements().to_f32().iter().map(|v| v * factor).collect();
    Matrix::new(m.rows(), m.cols(), Elements::from_f32(m.dtype(), &values)).unwrap()
}

/// Lengths of sequences of `seq` rows: whole, one token, none, more than there are rows, and any.
fn lengths_of(batch: usize, seq: usize, rng: &mut Pcg64) -> Vec<u32> {
    let any = |rng: &mut Pcg64| 1 + rng.next_u32() % seq as u32;
    (0..batch)
        .map(|i| match i {
            0 => seq as u32,
            2 => 1,
            3 => 0,
            4 => seq as u32 + 7,
            _ => any(rng),
        })
        .collect()
}

/// Replaces the rows past each sequence's length by NaN.
fn with_nan_padding(m: &Matrix, lengths: &[u32], seq: usize) -> Matrix {
    let mut values = m.elements().to_f32();
    for (row, values) in values.chunks_mut(m.cols().max(1)).enumerate() {
        if row % seq >= lengths[row / seq] as usize {
            values.fill(f32::NAN);
        }
    }
    Matrix::new(m.rows(), m.cols(), Elements::from_f32(m.dtype(), &values)).unwrap()
}

#[test]
fn embeddings_agree_with_the_oracle_on_the_cpu() {
    embeddings_agree_with_the_oracle(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn embeddings_agree_with_the_oracle_on_the_gpu() {
    gpu().iter().for_each(embeddings_agree_with_the_oracle);
}

fn embeddings_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Elements: one; an odd number of f16; around a workgroup of 256; MiniLM's width.
    for (i, (tokens, width)) in [(1, 1), (3, 5), (5, 51), (4, 64), (257, 1), (64, 384)].into_iter().enumerate() {
        for count in 1..=3 {
            for (storage, output) in types(device, i) {
                for data in [Data::Whole, Data::Uniform, Data::Edge] {
                    let mut rng = rng(seed, i as u64);
                    let rows = [100, 1, 7];
                    let tables: Vec<_> = rows.map(|rows| matrix(rows, width, storage, data, &mut rng)).into();
                    // Some past the end of their table, the last one by as far as there is.
                    let ids = rows.map(|rows| (0..tokens).map(|_| rng.next_u32() % (rows as u32 + 2)).collect());
                    let mut ids: Vec<Vec<u32>> = ids.into();
                    ids[0][tokens - 1] = u32::MAX;
                    let told: Vec<_> = tables.iter().zip(&ids).map(|(t, i)| (t, &i[..])).take(count).collect();
                    let want = oracle::embed(&told, output).unwrap();
                    let held: Vec<_> =
                        told.iter().map(|(t, i)| (device.upload(t).unwrap(), indices(device, i))).collect();
                    let pairs: Vec<_> = held.iter().map(|(t, i)| (t, i)).collect();
                    let y = poisoned(device, tokens, width, output);
                    let call = device.embed(&Embed { tables: &pairs, y: &y }).unwrap();
                    let what = format!("{tokens} x {width}, {count} tables, {storage} to {output}, {data:?}");
                    expect(device, &call, &y, &want, &what);
                }
            }
        }
    }
}

#[test]
fn layer_normalisation_agrees_with_the_oracle_on_the_cpu() {
    layer_normalisation_agrees_with_the_oracle(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn layer_normalisation_agrees_with_the_oracle_on_the_gpu() {
    gpu().iter().for_each(layer_normalisation_agrees_with_the_oracle);
}

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
                let want = oracle::layer_norm(&x, &gammas, &betas, eps, output).unwrap();
                let [tx, tg, tb] = [&x, &gamma, &beta].map(|m| device.upload(m).unwrap());
                let y = poisoned(device, tokens, width, output);
                let norm = LayerNorm { x: &tx, gamma: &tg, beta: &tb, eps, y: &y };
                let call = device.layer_norm(&norm).unwrap();
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
fn attention_agrees_with_the_oracle_on_the_cpu() {
    attention_agrees_with_the_oracle(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn attention_agrees_with_the_oracle_on_the_gpu() {
    gpu().iter().for_each(attention_agrees_with_the_oracle);
}

/// Sequences, rows of each, heads, features of each. Rows around the tiles' 32 and 64 queries and 32 keys and the CPU's
/// 16 lanes; heads of one feature, of a ragged four, of the two depths of tiles, and of more than one piece of them.
const ATTENTIONS: [(usize, usize, usize, usize); 17] = [
    (1, 1, 1, 1),
    (5, 5, 3, 3),
    (3, 16, 2, 8),
    (2, 17, 1, 31),
    (3, 31, 2, 32),
    (2, 32, 1, 33),
    (2, 33, 2, 64),
    (5, 63, 1, 8),
    (2, 64, 12, 32),
    (2, 65, 3, 64),
    (3, 100, 2, 32),
    (1, 128, 2, 64),
    (2, 129, 1, 20),
    (2, 40, 1, 65),
    (1, 70, 2, 96),
    (1, 50, 1, 130),
    (1, 300, 1, 16),
];

fn attention_agrees_with_the_oracle(device: &Device) {
    let seed = seed();
    let pays = |rates: Rates| rates.cooperative > rates.fma;
    let coop = device.caps().is_some_and(|caps| caps.cooperative_lanes.is_some() && pays(caps.rates));
    for (i, sizes) in ATTENTIONS.into_iter().enumerate() {
        for types in types(device, i) {
            // What a device may choose cooperative matrices for.
            let half = coop && types.0 == DType::F16 && (sizes.3 == 32 || sizes.3 == 64);
            let weights = if half { DType::F16 } else { DType::F32 };
            attention_agrees(device, sizes, types, weights, seed + i as u64);
        }
    }
}

/// One attention of these sizes and types, with weights rounded to a type.
fn attention_agrees(
    device: &Device,
    (batch, seq, heads, head_dim): (usize, usize, usize, usize),
    (storage, output): (DType, DType),
    weights: DType,
    seed: u64,
) {
    let width = heads * head_dim;
    // Flat softmaxes, peaked ones, and exact scores with many ties.
    for (data, factor) in [(Data::Uniform, 1.0), (Data::Uniform, 8.0), (Data::Whole, 1.0)] {
        let mut rng = rng(seed, 0);
        let lengths = lengths_of(batch, seq, &mut rng);
        let qkv = scaled(&matrix(batch * seq, 3 * width, storage, data, &mut rng), factor);
        let qkv = with_nan_padding(&qkv, &lengths, seq);
        let want = oracle::attention(&qkv, &lengths, (seq, heads), weights, output).unwrap();
        let (tx, tl) = (device.upload(&qkv).unwrap(), indices(device, &lengths));
        let y = poisoned(device, batch * seq, width, output);
        let call = device.attention(&Attention { qkv: &tx, lengths: &tl, batch, seq, heads, y: &y }).unwrap();
        let what = format!("{batch} x {seq}, {heads} heads of {head_dim}, {storage} to {output}, {data:?} x {factor}");
        expect(device, &call, &y, &want, &what);
    }
}

#[test]
fn pooling_agrees_with_the_oracle_on_the_cpu() {
    pooling_agrees_with_the_oracle(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn pooling_agrees_with_the_oracle_on_the_gpu() {
    gpu().iter().for_each(pooling_agrees_with_the_oracle);
}

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
                    let want = oracle::pool(&x, &lengths, seq, normalize).unwrap();
                    let (tx, tl) = (device.upload(&x).unwrap(), indices(device, &lengths));
                    let y = poisoned(device, batch, width, DType::F32);
                    let call = device.pool(&Pool { x: &tx, lengths: &tl, batch, seq, normalize, y: &y }).unwrap();
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

/// Numbers of f32, read back.
fn numbers(device: &Device, y: &Tensor) -> Vec<f32> {
    device.read(y).unwrap().elements().to_f32()
}

#[test]
fn huge_scores_make_no_finite_nonsense_on_the_cpu() {
    huge_scores_make_no_finite_nonsense(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn huge_scores_make_no_finite_nonsense_on_the_gpu() {
    gpu().iter().for_each(huge_scores_make_no_finite_nonsense);
}

fn huge_scores_make_no_finite_nonsense(device: &Device) {
    let half = device.caps().is_none_or(|caps| caps.f16);
    for (size, storage) in [(6e4, DType::F16), (1e18, DType::F32)] {
        if half || storage == DType::F32 {
            the_largest_score_takes_it_all(device, size, storage);
        }
    }
    // Scores past f32, of one key in the last tile, of all, and those that are no number on the way.
    let all = |token: usize| token < 100;
    let last = |token: usize| token == 99;
    for (what, sign, there) in
        [("one", 1.0, &last as &dyn Fn(usize) -> bool), ("all", 1.0, &all), ("lowest", -1.0, &all)]
    {
        let y = attended(device, DType::F32, |token, feature| {
            (1e20, if there(token) { sign * 1e20 } else { 0.0 }, (token + feature) as f32)
        });
        assert!(y.iter().all(|y| y.is_nan()), "{what}: {:?} on {}", &y[..4], device.info().name());
    }
    let y = attended(device, DType::F32, |token, feature| {
        (1e20, if token == 70 { [1e20, -1e20][feature % 2] } else { 0.0 }, 1.0)
    });
    assert!(y.iter().all(|y| y.is_nan()), "differences of infinities: {:?} on {}", &y[..4], device.info().name());
}

/// One key has the largest score by far, in the last step of keys or in the first: its value is the result, exactly.
fn the_largest_score_takes_it_all(device: &Device, size: f32, storage: DType) {
    for largest in [99, 0] {
        let y = attended(device, storage, |token, feature| {
            (size, if token == largest { size } else { -size }, (token + feature) as f32)
        });
        let expected: Vec<f32> = (0..100 * 32).map(|i| (largest + i % 32) as f32).collect();
        assert!(y == expected, "key {largest}, {storage} on {}: {:?}", device.info().name(), &y[..4]);
    }
}

/// Attention of one head of 32 features over 100 tokens, whose Q, K and V are functions of token and feature.
fn attended(device: &Device, storage: DType, of: impl Fn(usize, usize) -> (f32, f32, f32)) -> Vec<f32> {
    let (seq, d) = (100, 32);
    let mut qkv = vec![0.0; seq * 3 * d];
    for (token, row) in qkv.chunks_mut(3 * d).enumerate() {
        for feature in 0..d {
            (row[feature], row[d + feature], row[2 * d + feature]) = of(token, feature);
        }
    }
    let qkv = device.upload(&Matrix::new(seq, 3 * d, Elements::from_f32(storage, &qkv)).unwrap()).unwrap();
    let (lengths, y) = (indices(device, &[seq as u32]), poisoned(device, seq, d, storage));
    // So that a NaN is the kernel's.
    device.write(&y, &Matrix::zeros(seq, d, storage).unwrap()).unwrap();
    device
        .attention(&Attention { qkv: &qkv, lengths: &lengths, batch: 1, seq, heads: 1, y: &y })
        .unwrap()
        .run()
        .unwrap();
    numbers(device, &y)
}

#[test]
fn squares_that_overflow_show_on_the_cpu() {
    squares_that_overflow_show(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn squares_that_overflow_show_on_the_gpu() {
    gpu().iter().for_each(squares_that_overflow_show);
}

/// A norm over squares that f32 cannot hold is NaN, not beta or zero; its neighbours are as ever. A constant row is beta,
/// and where nothing is added to its variance no number on the CPU: a GPU's division may leave the mean an ulp off, and
/// with it a variance.
fn squares_that_overflow_show(device: &Device) {
    for width in [64, 63] {
        let row = |of: &dyn Fn(usize) -> f32| (0..width).map(of).collect::<Vec<_>>();
        let mut x = row(&|c| if c % 2 == 0 { 3e30 } else { -3e30 });
        x.extend(row(&|c| c as f32));
        x.extend(row(&|_| 3e38));
        x.extend(row(&|_| 1.5));
        let zeros = device.upload(&Matrix::zeros(4, width, DType::F32).unwrap()).unwrap();
        let x = device.upload(&Matrix::from_f32(4, width, &x).unwrap()).unwrap();
        let gamma = device.upload(&Matrix::from_f32(1, width, &vec![2.0; width]).unwrap()).unwrap();
        let beta = device.upload(&Matrix::from_f32(1, width, &vec![0.25; width]).unwrap()).unwrap();
        for eps in [0.0, 1e-12, 1e-4] {
            let y = device.zeros(4, width, DType::F32).unwrap();
            device.layer_norm(&LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps, y: &y }).unwrap().run().unwrap();
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

        // A mean whose length's square overflows, and one that is a number all the same, unless it is normalised.
        let lengths = indices(device, &[1, 1, 0, 1]);
        for normalize in [false, true] {
            let pool = Pool { x: &x, lengths: &lengths, batch: 4, seq: 1, normalize, y: &zeros };
            device.pool(&pool).unwrap().run().unwrap();
            let y = numbers(device, &zeros);
            let rows: Vec<_> = y.chunks(width).collect();
            assert!(rows[0].iter().all(|y| y.is_nan() == normalize), "{normalize}: {:?}", &rows[0][..4]);
            assert!(rows[1].iter().all(|y| y.is_finite()) && rows[2].iter().all(|y| *y == 0.0));
        }
    }
}

/// A batch that pads nothing, of zeros alone, or that is empty.
#[test]
fn empty_operands_are_no_error_on_the_cpu() {
    empty_operands_are_no_error(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn empty_operands_are_no_error_on_the_gpu() {
    gpu().iter().for_each(empty_operands_are_no_error);
}

fn empty_operands_are_no_error(device: &Device) {
    let none = device.indices(0).unwrap();
    assert!(none.is_empty());
    for (tokens, width) in [(0, 8), (0, 0)] {
        let tensor = |cols| device.zeros(tokens, cols, DType::F32).unwrap();
        let (x, y, qkv) = (tensor(width), tensor(width), tensor(3 * width));
        let feature = device.zeros(1, width, DType::F32).unwrap();
        device.embed(&Embed { tables: &[(&feature, &none)], y: &y }).unwrap().run().unwrap();
        let norm = LayerNorm { x: &x, gamma: &feature, beta: &feature, eps: 1e-5, y: &y };
        device.layer_norm(&norm).unwrap().run().unwrap();
        let attention = Attention { qkv: &qkv, lengths: &none, batch: 0, seq: 5, heads: 2, y: &y };
        device.attention(&attention).unwrap().run().unwrap();
        let pool = Pool { x: &x, lengths: &none, batch: 0, seq: 5, normalize: true, y: &y };
        device.pool(&pool).unwrap().run().unwrap();
    }
    // Sequences without rows have means all the same: zeros.
    let (x, y) = (device.zeros(0, 6, DType::F32).unwrap(), poisoned(device, 2, 6, DType::F32));
    let lengths = indices(device, &[3, 0]);
    device.pool(&Pool { x: &x, lengths: &lengths, batch: 2, seq: 0, normalize: true, y: &y }).unwrap().run().unwrap();
    assert_eq!(device.read(&y).unwrap(), Matrix::zeros(2, 6, DType::F32).unwrap());
}

#[test]
fn operands_that_do_not_fit_are_refused_by_name_on_the_cpu() {
    operands_that_do_not_fit_are_refused_by_name(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn operands_that_do_not_fit_are_refused_by_name_on_the_gpu() {
    gpu().iter().for_each(operands_that_do_not_fit_are_refused_by_name);
}

fn operands_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y, other) = (tensor(6, 8), tensor(6, 8), tensor(5, 8));
    let (feature, short) = (tensor(1, 8), tensor(1, 7));
    let (six, two) = (device.indices(6).unwrap(), device.indices(2).unwrap());
    let says = |result: sparse24::Result<Prepared>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };

    says(device.embed(&Embed { tables: &[], y: &y }), &["needs a table"]);
    says(device.embed(&Embed { tables: &[(&x, &six); 4], y: &y }), &["4 tables"]);
    says(device.embed(&Embed { tables: &[(&x, &six), (&x, &two)], y: &y }), &["ids of table 1", "[2]", "[6]"]);
    says(device.embed(&Embed { tables: &[(&x, &six), (&short, &six)], y: &y }), &["table 1", "[1, 7]", "[1, 8]"]);
    says(device.embed(&Embed { tables: &[(&tensor(0, 8), &six)], y: &y }), &["table 0", "no rows"]);
    says(device.embed(&Embed { tables: &[(&x, &six), (&y, &six)], y: &y }), &["shares its memory with table 1"]);
    let half = device.zeros(6, 8, DType::F16).unwrap();
    says(device.embed(&Embed { tables: &[(&x, &six), (&half, &six)], y: &y }), &["table 1", "f16", "f32"]);

    let norm = LayerNorm { x: &x, gamma: &feature, beta: &feature, eps: 1e-5, y: &y };
    says(device.layer_norm(&LayerNorm { y: &other, ..norm }), &["y has shape [5, 8]"]);
    says(device.layer_norm(&LayerNorm { gamma: &short, ..norm }), &["gamma", "[1, 7]"]);
    let half_feature = device.zeros(1, 8, DType::F16).unwrap();
    says(device.layer_norm(&LayerNorm { beta: &half_feature, ..norm }), &["beta is f16, expected f32"]);
    says(device.layer_norm(&LayerNorm { y: &x, ..norm }), &["shares its memory with x"]);
    for eps in [f32::NAN, -1.0, f32::INFINITY] {
        says(device.layer_norm(&LayerNorm { eps, ..norm }), &["eps", &eps.to_string()]);
    }

    let qkv = tensor(6, 24);
    let attention = Attention { qkv: &qkv, lengths: &two, batch: 2, seq: 3, heads: 2, y: &y };
    says(device.attention(&Attention { heads: 3, ..attention }), &["8 features", "3 heads"]);
    says(device.attention(&Attention { heads: 0, ..attention }), &["0 heads"]);
    says(device.attention(&Attention { qkv: &x, ..attention }), &["qkv", "[6, 8]", "[6, 24]"]);
    says(device.attention(&Attention { seq: 4, ..attention }), &["qkv", "[8, 24]"]);
    says(device.attention(&Attention { lengths: &six, ..attention }), &["lengths", "[6]", "[2]"]);
    says(device.attention(&Attention { batch: usize::MAX, ..attention }), &["tokens overflows"]);

    let means = tensor(2, 8);
    let pool = Pool { x: &x, lengths: &two, batch: 2, seq: 3, normalize: true, y: &means };
    says(device.pool(&Pool { y: &y, ..pool }), &["y has shape [6, 8], expected [2, 8]"]);
    let half_means = device.zeros(2, 8, DType::F16).unwrap();
    says(device.pool(&Pool { y: &half_means, ..pool }), &["y is f16, expected f32"]);
    let wide = device.zeros(6, 8, DType::Bf16).unwrap();
    says(device.pool(&Pool { x: &wide, ..pool }), &["x is bf16"]);

    // Another device of the same kind is another device.
    let stranger = Device::cpu().unwrap();
    says(device.pool(&Pool { lengths: &stranger.indices(2).unwrap(), ..pool }), &["lengths", "another device"]);
    says(stranger.pool(&pool), &["another device"]);
    assert!(matches!(device.write_indices(&stranger.indices(2).unwrap(), &[1, 2]), Err(Error::Mismatch { .. })));
    assert!(matches!(device.write_indices(&two, &[1, 2, 3]), Err(Error::Shape { .. })));
    let foreign = stranger.pool(&Pool {
        x: &stranger.zeros(6, 8, DType::F32).unwrap(),
        lengths: &stranger.indices(2).unwrap(),
        y: &stranger.zeros(2, 8, DType::F32).unwrap(),
        ..pool
    });
    assert!(matches!(device.submit(&[foreign.unwrap()]), Err(Error::Mismatch { .. })));
}

/// Which thread computes a row, and how rows are dealt out, must not show in it.
#[test]
fn cpu_results_do_not_depend_on_threads() {
    let seed = seed();
    for batch in [1, 3] {
        let (seq, heads, width) = (70, 2, 64);
        let outputs: Vec<Vec<Matrix>> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
                let layer = Layer::new(&device, batch, seq, heads, width, seed);
                device.submit(&layer.calls).unwrap();
                [&layer.x, &layer.normed, &layer.attended, &layer.pooled].map(|t| device.read(t).unwrap()).into()
            })
            .collect();
        assert!(outputs.iter().all(|o| *o == outputs[0]), "{batch} sequences");
        assert!(outputs[0].iter().all(|m| m.elements().to_f32().iter().all(|v| v.is_finite())));
    }
}

/// A small part of every kind of result is beyond its bound: the bounds say something.
#[test]
fn a_slightly_wrong_result_is_seen() {
    let device = Device::cpu().unwrap();
    let (batch, seq, heads, width) = (2, 64, 12, 384);
    let layer = Layer::new(&device, batch, seq, heads, width, seed());
    device.submit(&layer.calls).unwrap();
    let read = |tensor: &Tensor| device.read(tensor).unwrap();
    let (attended, qkv) = (read(&layer.attended), read(&layer.qkv));
    let ones = vec![1.0; width];
    let zeros = vec![0.0; width];
    let cases = [
        (read(&layer.normed), oracle::layer_norm(&read(&layer.x), &ones, &zeros, 1e-12, DType::F32).unwrap()),
        (read(&layer.attended), oracle::attention(&qkv, &layer.lengths, (seq, heads), DType::F32, DType::F32).unwrap()),
        (read(&layer.pooled), oracle::pool(&attended, &layer.lengths, seq, true).unwrap()),
    ];
    for (i, (y, want)) in cases.iter().enumerate() {
        assert!(want.verify(y).unwrap().passed(), "case {i}: {}", want.verify(y).unwrap());
        // By a five-thousandth of what elements are on average.
        let values = y.elements().to_f32();
        let size = values.iter().map(|v| v.abs()).sum::<f32>() / values.len() as f32;
        let mut wrong = values.clone();
        wrong[0] += 2e-4 * size;
        let wrong = Matrix::from_f32(y.rows(), y.cols(), &wrong).unwrap();
        assert!(!want.verify(&wrong).unwrap().passed(), "case {i}: bound {}", want.element(0, 0).bound);
    }
}

/// The calls of a layer without its feed-forward part, from ids to a pooled embedding, and their tensors.
struct Layer {
    calls: Vec<Prepared>,
    lengths: Vec<u32>,
    ids: Indices,
    x: Tensor,
    normed: Tensor,
    qkv: Tensor,
    attended: Tensor,
    pooled: Tensor,
}

impl Layer {
    fn new(device: &Device, batch: usize, seq: usize, heads: usize, width: usize, seed: u64) -> Self {
        let mut rng = rng(seed, 0);
        let tokens = batch * seq;
        let mut given = |rows, cols| matrix(rows, cols, DType::F32, Data::Uniform, &mut rng);
        let (words, positions) = (given(50, width), given(seq, width));
        // Scores of a few units: what a trained layer has.
        let w = scaled(&given(3 * width, width), 1.0 / (width as f32).sqrt());
        let [words, positions] = [words, positions].map(|m| device.upload(&m).unwrap());
        let ids = indices(device, &(0..tokens).map(|_| rng.next_u32() % 50).collect::<Vec<_>>());
        let places = indices(device, &(0..tokens).map(|t| (t % seq) as u32).collect::<Vec<_>>());
        let lengths: Vec<u32> = (0..batch).map(|i| (seq - i * seq / (2 * batch)) as u32).collect();
        let tl = indices(device, &lengths);
        let gamma = device.upload(&Matrix::from_f32(1, width, &vec![1.0; width]).unwrap()).unwrap();
        let beta = device.zeros(1, width, DType::F32).unwrap();
        let [x, normed, attended] = [0; 3].map(|_| poisoned(device, tokens, width, DType::F32));
        let qkv = poisoned(device, tokens, 3 * width, DType::F32);
        let pooled = poisoned(device, batch, width, DType::F32);
        let plan = device.plan(&Problem::linear(Op::Dense, 3 * width, tokens, width, DType::F32)).unwrap();
        let io = Io { x: &normed, bias: None, residual: None, y: &qkv };
        let calls = vec![
            device.embed(&Embed { tables: &[(&words, &ids), (&positions, &places)], y: &x }).unwrap(),
            device.layer_norm(&LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps: 1e-12, y: &normed }).unwrap(),
            device.prepare(&plan, &device.upload_weights(&w.into()).unwrap(), &io).unwrap(),
            device.attention(&Attention { qkv: &qkv, lengths: &tl, batch, seq, heads, y: &attended }).unwrap(),
            device.pool(&Pool { x: &attended, lengths: &tl, batch, seq, normalize: true, y: &pooled }).unwrap(),
        ];
        Self { calls, lengths, ids, x, normed, qkv, attended, pooled }
    }

    /// Every result against the oracle, from what the calls before it have left on the device.
    fn expect(&self, device: &Device, seq: usize, heads: usize) {
        let read = |tensor: &Tensor| device.read(tensor).unwrap();
        let width = self.x.cols();
        let want = oracle::layer_norm(&read(&self.x), &vec![1.0; width], &vec![0.0; width], 1e-12, DType::F32);
        let verdicts = [
            want.unwrap().verify(&read(&self.normed)),
            oracle::attention(&read(&self.qkv), &self.lengths, (seq, heads), DType::F32, DType::F32)
                .unwrap()
                .verify(&read(&self.attended)),
            oracle::pool(&read(&self.attended), &self.lengths, seq, true).unwrap().verify(&read(&self.pooled)),
        ];
        verdicts.into_iter().for_each(|v| assert!(v.as_ref().unwrap().passed(), "{}", v.unwrap()));
    }
}

/// A whole forward is one submission, and once it has run it allocates nothing.
#[test]
#[ignore = "needs a GPU"]
fn a_repeated_forward_allocates_nothing_and_submits_once() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue.clone()).unwrap();
    let (batch, seq, heads, width) = (2, 40, 2, 64);
    let layer = Layer::new(&device, batch, seq, heads, width, seed());
    device.submit(&layer.calls).unwrap();
    device.wait().unwrap();

    let (before, first) = (allocated(&wgpu_device), submissions(&queue));
    assert!(before[0] >= 4 && before[2] >= 5, "the counters do not count: {before:?}");
    for _ in 0..10 {
        device.submit(&layer.calls).unwrap();
    }
    // The empty submission that reads the number counts, too.
    assert_eq!(submissions(&queue) - first, 11);
    device.wait().unwrap();
    assert_eq!(allocated(&wgpu_device), before);
    layer.expect(&device, seq, heads);

    // New ids are seen by the same calls, which may be recorded into the caller's encoder as well.
    let embedding = device.read(&layer.pooled).unwrap();
    device.write_indices(&layer.ids, &vec![7; batch * seq]).unwrap();
    let mut encoder = wgpu_device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    layer.calls.iter().for_each(|call| call.on_gpu().unwrap().record(&mut encoder));
    assert_eq!(device.read(&layer.pooled).unwrap(), embedding, "nothing was submitted behind the caller's back");
    queue.submit([encoder.finish()]);
    assert_ne!(device.read(&layer.pooled).unwrap(), embedding);
    layer.expect(&device, seq, heads);
}

/// Attention by the cooperative matrices of a device.
fn cooperative_attention_agrees(device: &Device, unit: CoopUnit) {
    let caps = device.caps().unwrap();
    let rates = device.tuning().rates.unwrap_or(caps.rates);
    let caps = Caps { rates, ..caps.clone() };
    let seed = seed();
    let mut tiles = Vec::new();
    // Queries around 32 and 64, keys around 16, 32 and 64, several steps of keys, one query.
    for (i, (batch, seq, heads, head_dim)) in
        [(1, 1, 1, 32), (3, 15, 1, 64), (2, 33, 2, 32), (5, 32, 1, 64), (2, 65, 3, 32), (2, 130, 2, 64)]
            .into_iter()
            .enumerate()
    {
        let tile = AttentionTile::choose(batch * heads, seq, head_dim, DType::F16, &caps).unwrap();
        assert_eq!(tile.unit(), Some(unit), "{tile}");
        tiles.push(tile.to_string());
        let output = if i == 0 { DType::F32 } else { DType::F16 };
        attention_agrees(device, (batch, seq, heads, head_dim), (DType::F16, output), DType::F16, seed + i as u64);
    }
    the_largest_score_takes_it_all(device, 6e4, DType::F16);
    // Within 32 KiB of workgroup memory.
    for tile in ["64x32x32", "32x32x32", "32x64x64"].map(|tile| format!("coop{unit}_{tile}")) {
        assert!(tiles.contains(&tile) || caps.workgroup_memory > 32 << 10, "{tile} has not run: {tiles:?}");
    }
}

/// The kernels of cooperative matrices, with those acted out in plain WGSL: every index they compute is their own.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_attention_agrees_with_the_oracle_when_acted_out() {
    let Some(device) = gpu() else { return };
    if !device.caps().unwrap().f16 {
        eprintln!("skipped: no f16");
        return;
    }
    for (i, unit) in CoopUnit::ALL.into_iter().enumerate() {
        // Rolled: llvmpipe takes a minute to compile such a kernel unrolled, some seconds as it stands.
        let options = Options {
            emulate_cooperative: Some(unit),
            cooperative_scalars: Some(i % 2 == 1),
            unroll: Some(false),
            ..Default::default()
        };
        cooperative_attention_agrees(&Device::open(device.info().name(), options).unwrap(), unit);
    }
}

/// The same by the instructions of a device that has them. Where its plain arithmetic is faster, it is told otherwise.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_attention_agrees_with_the_oracle() {
    let Some(under_test) = gpu() else { return };
    let Some(lanes) = under_test.caps().unwrap().cooperative_lanes else {
        assert!(std::env::var_os("SPARSE24_REQUIRE_COOPERATIVE").is_none(), "cooperative matrices are required");
        eprintln!("skipped: no cooperative matrices");
        return;
    };
    let shapes = &under_test.caps().unwrap().cooperative;
    let has = |unit: &CoopUnit| unit.lanes() == lanes && shapes.contains(&unit.shape());
    let unit = CoopUnit::ALL.into_iter().find(has).unwrap();
    let options = Options { unroll: (lanes == 8).then_some(false), ..Default::default() };
    let device = Device::open(under_test.info().name(), options).unwrap();
    let rates = device.caps().unwrap().rates;
    device.set_tuning(Tuning::new(Some(Rates { cooperative: 10.0 * rates.fma, ..rates })));
    cooperative_attention_agrees(&device, unit);
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |made: sparse24::Result<Glue>| made.map(|glue| glue.to_string()).map_err(|e| e.to_string());
    let of = |tables| says(Glue::embed(tables, DType::F32, DType::F32));
    assert_eq!(of(0), Err("an embedding of 0 tables, expected 1 to 3".into()));
    assert_eq!(of(4), Err("an embedding of 4 tables, expected 1 to 3".into()));
    assert_eq!(of(2), Ok("embed-f32f32-2".into()));
    let wide = Err("activations is bf16, expected f32".to_owned());
    assert_eq!(says(Glue::embed(1, DType::Bf16, DType::F32)), wide);
    assert_eq!(says(Glue::layer_norm(8, DType::F32, DType::Bf16)), wide);
    assert_eq!(says(Glue::pool(8, true, DType::Bf16)), wide);
    assert_eq!(says(Glue::layer_norm(7, DType::F16, DType::F32)), Ok("layer_norm-f16f32-d7-scalars-out_f32".into()));
    let [.., coop] = AttentionTile::ALL;
    assert_eq!(
        says(Glue::attention(coop, 64, DType::F16, DType::F16)),
        Err(format!("attention tile {coop} takes heads of 32 features of f16, not of 64 of f16"))
    );
    assert!(says(Glue::attention(coop, 32, DType::F32, DType::F16)).is_err());
    assert!(says(Glue::attention(coop, 32, DType::F16, DType::F16)).is_ok());
}

/// The limits that WebGPU grants everywhere leave a tile of attention.
#[test]
#[ignore = "needs a GPU"]
fn attention_runs_in_the_least_workgroup_memory() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_compute_workgroup_storage_size: 16384, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    attention_agrees_with_the_oracle(&Device::from_wgpu(wgpu_device, queue).unwrap());
}

/// What cannot be bound at once is refused when the call is prepared, by name and with the limit.
#[test]
#[ignore = "needs a GPU"]
fn operands_larger_than_a_binding_are_refused() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_storage_buffer_binding_size: 1 << 20, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let (rows, width) = (1100, 256);
    let (table, y) = (device.zeros(rows, width, DType::F32).unwrap(), device.zeros(3, width, DType::F32).unwrap());
    let error = device.embed(&Embed { tables: &[(&table, &indices(&device, &[0; 3]))], y: &y }).unwrap_err();
    assert!(matches!(&error, Error::TooLarge { what, .. } if what.contains("embed-f32f32-1")), "{error}");
    let norm = LayerNorm {
        x: &table,
        gamma: &device.zeros(1, width, DType::F32).unwrap(),
        beta: &device.zeros(1, width, DType::F32).unwrap(),
        eps: 1e-5,
        y: &device.zeros(rows, width, DType::F32).unwrap(),
    };
    assert!(matches!(device.layer_norm(&norm), Err(Error::TooLarge { .. })));
}
