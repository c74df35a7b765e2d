//! Attention, by plain tiles and by those of cooperative matrices.

use ndarray::Array2;
use sparse24::kernels::{Caps, CoopUnit, Rates};
use sparse24::ops::Gradient;
use sparse24::ops::attention::{AttentionGrad, AttentionKernel, AttentionTile};
use sparse24::reference::Expectation;
use sparse24::reference::attention::{self as oracle, AttentionOptions};
use sparse24::{Attention, DType, Device, Elements, Matrix, Options, Tuning};

use crate::common::{Data, callers_device, gpu, matrix, rng, seed};
use crate::{expect, indices, lengths_of, numbers, poisoned, refuses, scaled, types, with_nan_padding};

on_both_devices!(attention_agrees_with_the_oracle);

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
    sizes: (usize, usize, usize, usize),
    types: (DType, DType),
    weights: DType,
    seed: u64,
) {
    // Flat softmaxes, peaked ones, and exact scores with many ties.
    for (data, factor) in [(Data::Uniform, 1.0), (Data::Uniform, 8.0), (Data::Whole, 1.0)] {
        attends(device, sizes, Asked::default(), types, weights, (data, factor), seed);
    }
}

/// What a test asks for beside the plain form.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// Query heads that share keys and values, less one.
    more_share: usize,
    causal: bool,
    /// Distances of the bias past those of the sequence.
    bias: Option<usize>,
}

/// One attention on operands of a kind.
fn attends(
    device: &Device,
    (batch, seq, heads, head_dim): (usize, usize, usize, usize),
    options: Asked,
    (storage, output): (DType, DType),
    weights: DType,
    (data, factor): (Data, f32),
    seed: u64,
) {
    let mut rng = rng(seed, 0);
    let lengths = lengths_of(batch, seq, &mut rng);
    let kv_heads = heads / (options.more_share + 1);
    let features = (heads + 2 * kv_heads) * head_dim;
    let qkv = scaled(&matrix(batch * seq, features, storage, data, &mut rng), factor);
    let qkv = with_nan_padding(&qkv, &lengths, seq);
    let bias = options.bias.map(|more| matrix(heads, 2 * (seq + more) - 1, DType::F32, Data::Uniform, &mut rng));
    let wide = bias.as_ref().map(|bias| bias.to_array().mapv(f64::from));
    let told = AttentionOptions {
        kv_heads: Some(kv_heads),
        causal: options.causal,
        bias: wide.as_ref().map(|bias| bias.view()),
    };
    let want = oracle::expect(&qkv, &lengths, (seq, heads), &told, weights, output).unwrap();
    let (tx, tl) = (device.upload(&qkv).unwrap(), indices(device, &lengths));
    let tb = bias.map(|bias| device.upload(&bias).unwrap());
    let y = poisoned(device, batch * seq, heads * head_dim, output);
    let mut attention = Attention::new(&tx, &tl, (batch, seq), heads, &y).kv_heads(kv_heads);
    if options.causal {
        attention = attention.causal();
    }
    if let Some(bias) = &tb {
        attention = attention.relative_bias(bias);
    }
    let call = device.prepare(&attention).unwrap();
    let what = format!(
        "{batch} x {seq}, {heads} heads of {head_dim}, {options:?}, {storage} to {output}, {data:?} x {factor}"
    );
    expect(device, &call, &y, &want, &what);
}

/// Each option alone, and all together.
const OPTIONS: [Asked; 5] = [
    Asked { more_share: 1, causal: false, bias: None },
    Asked { more_share: 0, causal: true, bias: None },
    Asked { more_share: 0, causal: false, bias: Some(0) },
    Asked { more_share: 3, causal: true, bias: Some(3) },
    Asked { more_share: 3, causal: true, bias: None },
];

on_both_devices!(options_agree_with_the_oracle);

/// Rows around the tiles' queries and keys and the CPU's blocks and tasks; heads of a ragged four, of both depths of
/// tiles, and of more than one piece.
fn options_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    let sizes = [(1, 1, 4, 3), (5, 17, 4, 8), (2, 33, 4, 32), (3, 70, 4, 64), (1, 130, 4, 20), (1, 66, 4, 65)];
    for (i, sizes) in sizes.into_iter().enumerate() {
        for (j, options) in OPTIONS.into_iter().enumerate() {
            // Each pair of options and types is a pipeline to compile.
            let types = if device.caps().is_none() { types(device, i) } else { vec![types(device, i)[0]] };
            for types in types {
                for (data, factor) in [(Data::Uniform, 1.0), (Data::Uniform, 8.0), (Data::Whole, 1.0)] {
                    attends(device, sizes, options, types, DType::F32, (data, factor), seed + (10 * i + j) as u64);
                }
            }
        }
    }
}

on_both_devices!(a_bias_is_that_of_the_distance);

/// A bias that one distance has far more of than all others gives each query the value of the key at that distance, for
/// each head its own; whoever has no such key, the nearest in the bias's order.
fn a_bias_is_that_of_the_distance(device: &Device) {
    let (seq, heads, p) = (40, 2, 45);
    let mut qkv = vec![0.0; seq * 3 * heads];
    for (token, row) in qkv.chunks_mut(3 * heads).enumerate() {
        row[2 * heads] = token as f32;
        row[2 * heads + 1] = 100.0 + token as f32;
    }
    // Head 0 looks three tokens back, head 1 two ahead.
    let distances = [-3, 2];
    let mut bias = vec![-1e4; heads * (2 * p - 1)];
    for (head, d) in distances.into_iter().enumerate() {
        bias[(head as i32 * (2 * p as i32 - 1) + d + p as i32 - 1) as usize] = 1e4;
    }
    let qkv = device.upload(&Matrix::from_f32(seq, 3 * heads, &qkv).unwrap()).unwrap();
    let bias = device.upload(&Matrix::from_f32(heads, 2 * p - 1, &bias).unwrap()).unwrap();
    let (lengths, y) = (indices(device, &[seq as u32]), poisoned(device, seq, heads, DType::F32));
    let attention = Attention::new(&qkv, &lengths, (1, seq), heads, &y).relative_bias(&bias);
    device.prepare(&attention).unwrap().run().unwrap();
    let y = numbers(device, &y);
    for query in 3..seq - 2 {
        assert_eq!([y[2 * query], y[2 * query + 1]], [(query - 3) as f32, 100.0 + (query + 2) as f32], "{query}");
    }
}

/// The check itself: none of these passes for another.
#[test]
fn other_options_are_seen() {
    let mut rng = rng(seed(), 0);
    let qkv = matrix(20, 8 * 4, DType::F32, Data::Uniform, &mut rng);
    let bias = matrix(4, 39, DType::F32, Data::Uniform, &mut rng).to_array().mapv(f64::from);
    let plain = AttentionOptions { kv_heads: Some(2), ..Default::default() };
    let all = [
        plain,
        AttentionOptions { causal: true, ..plain },
        AttentionOptions { bias: Some(bias.view()), ..plain },
        AttentionOptions { bias: Some(bias.view()), causal: true, ..plain },
    ];
    let all = all.map(|options| oracle::expect(&qkv, &[20], (20, 4), &options, DType::F32, DType::F32).unwrap());
    for (i, want) in all.iter().enumerate() {
        for (j, other) in all.iter().enumerate() {
            let y: Vec<f32> = (0..20 * 16).map(|e| other.element(e / 16, e % 16).value as f32).collect();
            let verdict = want.verify(&Matrix::from_f32(20, 16, &y).unwrap()).unwrap();
            assert_eq!(verdict.passed(), i == j, "{j} for {i}: {verdict}");
        }
    }
}

on_both_devices!(huge_scores_make_no_finite_nonsense);

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
    device.prepare(&Attention::new(&qkv, &lengths, (1, seq), 1, &y)).unwrap().run().unwrap();
    numbers(device, &y)
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
    for (i, options) in OPTIONS.into_iter().enumerate() {
        let (sizes, types) = ([(1, 100, 4, 32), (2, 70, 4, 64)][i % 2], (DType::F16, DType::F16));
        attends(device, sizes, options, types, DType::F16, (Data::Uniform, 8.0), seed + i as u64);
    }
    the_largest_score_takes_it_all(device, 6e4, DType::F16);
    // Within 32 KiB of workgroup memory.
    for tile in ["64x32x32", "32x32x32", "32x64x64"].map(|tile| format!("coop{unit}_{tile}")) {
        assert!(tiles.contains(&tile) || caps.workgroup_memory > 32 << 10, "{tile} has not run: {tiles:?}");
    }
}

/// The kernels of cooperative matrices, with those emulated in plain WGSL: every index they compute is their own.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_attention_agrees_with_the_oracle_when_emulated() {
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

/// The limits that WebGPU grants everywhere leave a tile of attention.
#[test]
#[ignore = "needs a GPU"]
fn attention_runs_in_the_least_workgroup_memory() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_compute_workgroup_storage_size: 16384, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    attention_agrees_with_the_oracle(&Device::from_wgpu(wgpu_device, queue).unwrap());
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y, qkv) = (tensor(6, 8), tensor(6, 8), tensor(6, 24));
    let (six, two) = (device.indices(6).unwrap(), device.indices(2).unwrap());
    let of = |heads| Attention::new(&qkv, &two, (2, 3), heads, &y);
    refuses(device, &of(3), &["8 features", "3 heads"]);
    refuses(device, &of(0), &["0 heads"]);
    refuses(device, &Attention::new(&x, &two, (2, 3), 2, &y), &["qkv", "[6, 8]", "[6, 24]"]);
    refuses(device, &Attention::new(&qkv, &two, (2, 4), 2, &y), &["qkv", "[8, 24]"]);
    refuses(device, &Attention::new(&qkv, &six, (2, 3), 2, &y), &["lengths", "[6]", "[2]"]);
    refuses(device, &Attention::new(&qkv, &two, (usize::MAX, 3), 2, &y), &["tokens overflows"]);

    refuses(device, &of(4).kv_heads(3), &["4 heads", "3 of keys"]);
    refuses(device, &of(4).kv_heads(0), &["0 of keys"]);
    refuses(device, &of(4).kv_heads(2), &["qkv", "[6, 24]", "[6, 16]"]);
    for (rows, cols, expected) in [(3, 5, "[2, 5]"), (2, 4, "[2, 5]"), (2, 3, "[2, 5]"), (2, 6, "[2, 7]")] {
        refuses(device, &of(2).relative_bias(&tensor(rows, cols)), &["bias", expected]);
    }
    let half = device.zeros(2, 5, DType::F16).unwrap();
    refuses(device, &of(2).relative_bias(&half), &["bias is f16, expected f32"]);
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    let none = device.indices(0).unwrap();
    for width in [8, 0] {
        let [qkv, y] = [3 * width, width].map(|cols| device.zeros(0, cols, DType::F32).unwrap());
        let bias = device.zeros(2, 9, DType::F32).unwrap();
        let plain = Attention::new(&qkv, &none, (0, 5), 2, &y);
        for attention in [plain, plain.causal(), plain.relative_bias(&bias)] {
            device.prepare(&attention).unwrap().run().unwrap();
        }
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |tile, head_dim, storage| {
        AttentionKernel::new(tile, head_dim, storage, DType::F16).map(|k| k.to_string()).map_err(|e| e.to_string())
    };
    let [.., coop] = AttentionTile::ALL;
    assert_eq!(
        says(coop, 64, DType::F16),
        Err(format!("attention tile {coop} takes heads of 32 features of f16, not of 64 of f16"))
    );
    assert!(says(coop, 32, DType::F32).is_err() && says(coop, 32, DType::F16).is_ok());
}

/// The oracle's gradient is that of its result, by central differences, for each option and all: of every operand,
/// padding and sequences without tokens included.
#[test]
fn the_exact_gradient_is_that_of_finite_differences() {
    let (seq, heads, h, lengths) = (5, 4, 3, [5, 3, 0]);
    let mut rng = rng(seed(), 0);
    let mut drawn = |rows, cols| matrix(rows, cols, DType::F32, Data::Uniform, &mut rng).to_array().mapv(f64::from);
    for asked in std::iter::once(Asked::default()).chain(OPTIONS) {
        let kv_heads = heads / (asked.more_share + 1);
        let qkv = drawn(lengths.len() * seq, (heads + 2 * kv_heads) * h);
        let bias = asked.bias.map(|more| drawn(heads, 2 * (seq + more) - 1));
        let dy = drawn(lengths.len() * seq, heads * h);
        let options = |bias: Option<&'_ Array2<f64>>, run: &dyn Fn(&AttentionOptions<'_>) -> f64| {
            let bias = bias.map(|bias| bias.view());
            run(&AttentionOptions { kv_heads: Some(kv_heads), causal: asked.causal, bias })
        };
        // What dy is the gradient of.
        let loss = |qkv: &Array2<f64>, bias: Option<&Array2<f64>>| {
            options(bias, &|told| (oracle::exact(qkv.view(), &lengths, (seq, heads), told) * &dy).sum())
        };
        let told = AttentionOptions {
            kv_heads: Some(kv_heads),
            causal: asked.causal,
            bias: bias.as_ref().map(|bias| bias.view()),
        };
        let exact = oracle::grad(qkv.view(), &lengths, (seq, heads), &told, dy.view());
        let step = 1e-5;
        let agrees = |of: &Array2<f64>, exact: &Array2<f64>, loss: &dyn Fn(&Array2<f64>) -> f64, what: &str| {
            for (at, &want) in exact.indexed_iter() {
                let moved = |by: f64| {
                    let mut moved = of.clone();
                    moved[at] += by;
                    loss(&moved)
                };
                let got = (moved(step) - moved(-step)) / (2.0 * step);
                // Third derivatives are of the order of one, times step²; roundings of 1e-15, over the step.
                assert!((got - want).abs() < 1e-8, "{what} at {at:?}, {asked:?}: {got} by differences, {want}");
            }
        };
        agrees(&qkv, &exact.dqkv, &|moved| loss(moved, bias.as_ref()), "dqkv");
        if let Some(bias) = &bias {
            agrees(bias, exact.dbias.as_ref().unwrap(), &|moved| loss(&qkv, Some(moved)), "dbias");
        }
    }
}

/// The gradient of one attention: of Q, K and V, and of the bias if there is one. Padding holds NaN in all operands.
fn differentiates(
    device: &Device,
    (batch, seq, heads, head_dim): (usize, usize, usize, usize),
    asked: Asked,
    factor: f32,
    add: bool,
    seed: u64,
) -> Vec<Matrix> {
    let mut rng = rng(seed, 0);
    let lengths = lengths_of(batch, seq, &mut rng);
    let kv_heads = heads / (asked.more_share + 1);
    let (features, width) = ((heads + 2 * kv_heads) * head_dim, heads * head_dim);
    let mut drawn = |rows, cols| matrix(rows, cols, DType::F32, Data::Uniform, &mut rng);
    let qkv = with_nan_padding(&scaled(&drawn(batch * seq, features), factor), &lengths, seq);
    let dy = with_nan_padding(&drawn(batch * seq, width), &lengths, seq);
    let bias = asked.bias.map(|more| drawn(heads, 2 * (seq + more) - 1));
    let before = [Some(drawn(batch * seq, features)), bias.as_ref().map(|bias| drawn(bias.rows(), bias.cols()))];
    let wide = bias.as_ref().map(|bias| bias.to_array().mapv(f64::from));
    let told = AttentionOptions {
        kv_heads: Some(kv_heads),
        causal: asked.causal,
        bias: wide.as_ref().map(|bias| bias.view()),
    };

    let (tx, tl, tdy) = (device.upload(&qkv).unwrap(), indices(device, &lengths), device.upload(&dy).unwrap());
    let tb = bias.as_ref().map(|bias| device.upload(bias).unwrap());
    let ty = poisoned(device, batch * seq, width, DType::F32);
    let mut forward = Attention::new(&tx, &tl, (batch, seq), heads, &ty).kv_heads(kv_heads);
    if asked.causal {
        forward = forward.causal();
    }
    if let Some(bias) = &tb {
        forward = forward.relative_bias(bias);
    }
    device.prepare(&forward).unwrap().run().unwrap();
    let y = with_nan_padding(&device.read(&ty).unwrap(), &lengths, seq);
    device.write(&ty, &y).unwrap();

    let to = before.each_ref().map(|before| {
        before.as_ref().map(|before| match add {
            true => device.upload(before).unwrap(),
            false => poisoned(device, before.rows(), before.cols(), DType::F32),
        })
    });
    let [dqkv, dbias] = to.each_ref().map(|to| to.as_ref().map(|to| Gradient { to, add }));
    let grad = AttentionGrad { forward, dy: &tdy, dqkv: dqkv.unwrap(), dbias };
    let call = device.prepare(&grad).unwrap();
    let before = before.each_ref().map(|before| before.as_ref().filter(|_| add));
    let wanted = oracle::expect_grad(&qkv, &lengths, (seq, heads), &told, (&y, &dy), before).unwrap();
    let what = format!("{batch} x {seq}, {heads} heads of {head_dim}, {asked:?}, x {factor}, add {add}, seed {seed}");
    let [dqkv, dbias] = to;
    let dqkv = dqkv.unwrap();
    let verdict = expect(device, &call, &dqkv, &wanted.0, &format!("dqkv, {what}"));
    assert_eq!(verdict.undecided, 0, "{what}");
    let mut results = vec![device.read(&dqkv).unwrap()];
    if let (Some(dbias), Some(wanted)) = (dbias, wanted.1) {
        let dbias = device.read(&dbias).unwrap();
        let verdict = wanted.verify(&dbias).unwrap();
        assert!(verdict.passed() && verdict.undecided == 0, "dbias, {what} on {}: {verdict}", device.info().name());
        if batch * seq > 60 && factor < 2.0 {
            says_something(&wanted, &dbias, &what);
        }
        results.push(dbias);
    }
    if batch * seq > 60 && factor < 2.0 {
        says_something(&wanted.0, &results[0], &what);
    }
    results
}

/// All bounds together are less than a thousandth of all elements: a wrong factor or a term left out is beyond them.
fn says_something(want: &Expectation, got: &Matrix, what: &str) {
    let (rows, cols) = (got.rows(), got.cols());
    let bounds: f64 = (0..rows * cols).map(|i| want.element(i / cols, i % cols).bound).sum();
    let sizes: f64 = got.elements().to_f32().iter().map(|x| f64::from(x.abs())).sum();
    assert!(bounds < 1e-3 * sizes, "{what}: bounds of {bounds} for {sizes}");
}

on_both_devices!(gradients_agree_with_the_oracle);

/// Rows around the tiles' 32 queries and keys and the CPU's 16 lanes and blocks of four; heads of one feature, of a
/// ragged four, of whole tiles, and of more than one piece of them. Flat softmaxes and peaked ones.
fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    let sizes = [
        (1, 1, 4, 1),
        (5, 5, 4, 3),
        (3, 16, 4, 8),
        (2, 17, 4, 32),
        (5, 33, 4, 20),
        (1, 66, 4, 65),
        (3, 70, 4, 64),
        (1, 130, 4, 32),
    ];
    let all: Vec<Asked> = std::iter::once(Asked::default()).chain(OPTIONS).collect();
    for (i, sizes) in sizes.into_iter().enumerate() {
        for (j, &asked) in all.iter().enumerate() {
            // On a GPU each combination is two or three pipelines to compile.
            let (own, turn) = (j == i % all.len(), i + i / all.len());
            let adds = if device.caps().is_none() { vec![false, true] } else { vec![turn % 2 == 1; usize::from(own)] };
            for (k, add) in adds.into_iter().enumerate() {
                for factor in [1.0, 6.0] {
                    differentiates(device, sizes, asked, factor, add, seed + (20 * i + 2 * j + k) as u64);
                }
            }
        }
    }
}

/// Heads of one sequence are tasks of their own, and the bias's gradient is summed over all of them.
#[test]
fn cpu_gradients_do_not_depend_on_threads() {
    let seed = seed();
    for asked in [Asked::default(), OPTIONS[3]] {
        let outputs = [1, 2, 5].map(|threads| {
            let options = Options { threads: Some(threads), ..Default::default() };
            differentiates(&Device::open("cpu", options).unwrap(), (7, 37, 12, 16), asked, 1.0, false, seed)
        });
        assert!(outputs.iter().all(|o| *o == outputs[0]), "{asked:?}");
    }
}

on_both_devices!(gradients_of_nothing_are_zero);

/// Without sequences, rows or features no two tokens have a distance.
fn gradients_of_nothing_are_zero(device: &Device) {
    for (batch, seq, width) in [(0, 5, 8), (2, 0, 8), (2, 5, 0)] {
        let tensor = |rows, cols| poisoned(device, rows, cols, DType::F32);
        let (qkv, y, dy, dqkv) = (
            tensor(batch * seq, 3 * width),
            tensor(batch * seq, width),
            tensor(batch * seq, width),
            tensor(batch * seq, 3 * width),
        );
        let (bias, dbias) = (device.zeros(2, 9, DType::F32).unwrap(), tensor(2, 9));
        let lengths = indices(device, &vec![5; batch]);
        let forward = Attention::new(&qkv, &lengths, (batch, seq), 2, &y).relative_bias(&bias);
        let [dqkv, dbias_to] = [&dqkv, &dbias].map(|to| Gradient { to, add: false });
        let grad = AttentionGrad { forward, dy: &dy, dqkv, dbias: Some(dbias_to) };
        device.prepare(&grad).unwrap().run().unwrap();
        assert_eq!(numbers(device, &dbias), [0.0; 18], "{batch} x {seq} of {width}");
    }
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols, dtype| device.zeros(rows, cols, dtype).unwrap();
    let [y, dy, other, less] = [8, 8, 8, 7].map(|cols| tensor(6, cols, DType::F32));
    let [qkv, dqkv] = [24, 24].map(|cols| tensor(6, cols, DType::F32));
    let [bias, dbias] = [5, 5].map(|cols| tensor(2, cols, DType::F32));
    let lengths = device.indices(2).unwrap();
    let forward = Attention::new(&qkv, &lengths, (2, 3), 2, &y);
    let to = |to| Gradient { to, add: true };
    let grad = AttentionGrad { forward, dy: &dy, dqkv: to(&dqkv), dbias: None };
    let biased = AttentionGrad { forward: forward.relative_bias(&bias), ..grad };
    refuses(device, &AttentionGrad { dy: &less, ..grad }, &["dy", "[6, 7]", "[6, 8]"]);
    refuses(device, &AttentionGrad { dqkv: to(&other), ..grad }, &["dqkv", "[6, 8]", "[6, 24]"]);
    refuses(device, &AttentionGrad { dbias: Some(to(&dbias)), ..grad }, &["dbias", "without a bias"]);
    refuses(device, &AttentionGrad { dbias: Some(to(&other)), ..biased }, &["dbias", "[6, 8]", "[2, 5]"]);
    refuses(device, &AttentionGrad { dqkv: to(&qkv), ..grad }, &["dqkv", "shares its memory", "qkv"]);
    refuses(device, &AttentionGrad { dbias: Some(to(&bias)), ..biased }, &["dbias", "shares its memory", "bias"]);
    let half = |cols| tensor(6, cols, DType::F16);
    let (half_qkv, half_y, half_dqkv) = (half(24), half(8), half(24));
    let of = |qkv, y| AttentionGrad { forward: Attention::new(qkv, &lengths, (2, 3), 2, y), ..grad };
    refuses(device, &of(&half_qkv, &y), &["qkv is f16, expected f32"]);
    refuses(device, &of(&qkv, &half_y), &["y is f16, expected f32"]);
    refuses(device, &AttentionGrad { dy: &half_y, ..grad }, &["dy is f16, expected f32"]);
    refuses(device, &AttentionGrad { dqkv: to(&half_dqkv), ..grad }, &["dqkv is f16, expected f32"]);
    refuses(device, &AttentionGrad { forward: forward.kv_heads(3), ..grad }, &["3 of keys"]);
}
