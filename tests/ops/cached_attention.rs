//! Attention of new tokens to a cache.

use sparse24::ops::cached_attention::CachedAttentionKernel;
use sparse24::reference::attention::{self, AttentionOptions};
use sparse24::reference::cached_attention::{self as oracle, NewTokens};
use sparse24::simd::SimdLevel;
use sparse24::{CachedAttention, DType, Device, Elements, KvAppend, Matrix, Options, Tensor};

use crate::common::{Data, callers_device, gpu, matrix, rng, seed};
use crate::kv_append::past_of;
use crate::{expect, indices, lengths_of, numbers, poisoned, refuses, scaled, slightly_wrong, types, with_nan_padding};

/// Sequences, rows of each, its capacity, heads of queries and of keys, features of a head. One of all; a model's step,
/// with keys past the 128 of a GPU's tile; ragged fours; heads that nobody shares, and that more share than the CPU
/// takes at once; more features than the CPU's registers hold of four queries; the most; enough tokens, and enough
/// work, for each way in which the CPU's threads share it, around its blocks of 64 keys.
const SIZES: [(usize, usize, usize, usize, usize, usize); 12] = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 200, 9, 3, 64),
    (5, 3, 40, 4, 2, 5),
    (6, 1, 129, 5, 1, 20),
    (2, 9, 70, 6, 6, 31),
    (1, 6, 300, 2, 2, 130),
    (1, 1, 260, 3, 1, 256),
    (2, 33, 50, 8, 2, 32),
    (1, 5, 1030, 2, 1, 80),
    (2, 3, 65, 7, 1, 48),
    (6, 20, 70, 2, 1, 33),
    (1, 2, 64, 4, 4, 255),
];

/// Replaces the rows of a cache of `capacity` rows for each sequence that no query of a sequence sees by NaN.
fn with_nan_behind(cache: &Matrix, lengths: &[u32], past: &[u32], seq: usize) -> Matrix {
    let (mut values, capacity) = (cache.elements().to_f32(), cache.rows() / lengths.len());
    for (row, values) in values.chunks_mut(cache.cols()).enumerate() {
        let new = seq.min(lengths[row / capacity] as usize);
        if new == 0 || row % capacity >= past[row / capacity] as usize + new {
            values.fill(f32::NAN);
        }
    }
    Matrix::new(cache.rows(), cache.cols(), Elements::from_f32(cache.dtype(), &values)).unwrap()
}

/// Types of a cache for case `i` on a device.
fn cache_types(device: &Device, i: usize) -> Vec<DType> {
    match device.caps() {
        None => vec![DType::F32, DType::F16],
        Some(caps) if caps.f16 => vec![[DType::F16, DType::F32][i % 2]],
        Some(_) => vec![DType::F32],
    }
}

on_both_devices!(attention_to_a_cache_agrees_with_the_oracle);

fn attention_to_a_cache_agrees_with_the_oracle(device: &Device) {
    attends(device, &SIZES);
}

/// Attention of some sizes.
fn attends(device: &Device, sizes: &[(usize, usize, usize, usize, usize, usize)]) {
    let seed = seed();
    for (i, &(batch, seq, capacity, heads, kv_heads, head_dim)) in sizes.iter().enumerate() {
        for (j, (storage, output)) in types(device, i).into_iter().enumerate() {
            for cached in cache_types(device, i + j) {
                // Flat softmaxes, peaked ones, and exact scores with many ties.
                let kinds = [(Data::Uniform, 1.0), (Data::Uniform, 8.0), (Data::Whole, 1.0)];
                for (case, (data, factor)) in kinds.into_iter().enumerate() {
                    let mut rng = rng(seed, i as u64);
                    let (lengths, past) = (lengths_of(batch, seq, &mut rng), past_of(batch, capacity, case + i));
                    let features = (heads + 2 * kv_heads) * head_dim;
                    let qkv = scaled(&matrix(batch * seq, features, storage, data, &mut rng), factor);
                    let qkv = with_nan_padding(&qkv, &lengths, seq);
                    let cache = matrix(batch * capacity, 2 * kv_heads * head_dim, cached, data, &mut rng);
                    let cache = with_nan_behind(&cache, &lengths, &past, seq);
                    let tokens = NewTokens { lengths: &lengths, past: &past, seq };
                    let want = oracle::expect(&qkv, &cache, tokens, (heads, kv_heads), output).unwrap();
                    let (tx, tc) = (device.upload(&qkv).unwrap(), device.upload(&cache).unwrap());
                    let (tl, tp) = (indices(device, &lengths), indices(device, &past));
                    let y = poisoned(device, batch * seq, heads * head_dim, output);
                    let (qkv, cache, lengths, past) = (&tx, &tc, &tl, &tp);
                    let call = CachedAttention { qkv, cache, lengths, past, batch, seq, heads, kv_heads, y: &y };
                    let call = device.prepare(&call).unwrap();
                    let what = format!("{:?}, {storage} to {output}, {cached} cached, {data:?} x {factor}", sizes[i]);
                    let verdict = expect(device, &call, &y, &want, &what);
                    assert_eq!(verdict.undecided, 0, "{what}");
                    // Of few keys and features, so that what sums may lose is small beside what a result is.
                    if case == 0 && storage == output && capacity <= 70 && head_dim <= 64 && heads * head_dim > 60 {
                        slightly_wrong(&want, &device.read(&y).unwrap(), &what);
                    }
                }
            }
        }
    }
}

/// The CPU's kernels for each level of vector instructions that the processor has.
#[test]
fn every_level_agrees_with_the_oracle() {
    for level in SimdLevel::ALL.into_iter().filter(|level| level.is_supported()) {
        attends(&Device::open("cpu", Options { simd: Some(level), ..Default::default() }).unwrap(), &SIZES);
    }
}

/// The oracle's result is that of the oracle of attention, of the last tokens of a whole sequence.
#[test]
fn the_oracle_is_that_of_causal_attention() {
    let (seq, heads, kv_heads, h, new) = (12, 4, 2, 3, 5);
    let mut rng = rng(seed(), 0);
    let qkv = matrix(seq, (heads + 2 * kv_heads) * h, DType::F32, Data::Uniform, &mut rng);
    let qkv = qkv.to_array().mapv(f64::from);
    let options = AttentionOptions { kv_heads: Some(kv_heads), causal: true, bias: None };
    let whole = attention::exact(qkv.view(), &[seq as u32], (seq, heads), &options);
    let (last, cache) = (qkv.slice(ndarray::s![seq - new.., ..]), qkv.slice(ndarray::s![.., heads * h..]));
    let tokens = NewTokens { lengths: &[new as u32], past: &[(seq - new) as u32], seq: new };
    let got = oracle::exact(last, cache, tokens, (heads, kv_heads));
    let difference = &got - &whole.slice(ndarray::s![seq - new.., ..]);
    assert!(difference.iter().all(|d| d.abs() < 1e-14) && got.iter().any(|y| y.abs() > 0.1));
}

on_both_devices!(steps_make_what_causal_attention_does);

/// Two sequences in steps of several tokens and of one, the shorter one ending before: appended to a cache and attended
/// to, they become what causal attention over the whole makes of them.
fn steps_make_what_causal_attention_does(device: &Device) {
    let (batch, heads, kv_heads, h, capacity, lengths) = (2, 6, 2, 24, 150, [150, 97]);
    let features = (heads + 2 * kv_heads) * h;
    for (storage, output) in types(device, 0).into_iter().filter(|(storage, output)| storage == output) {
        let mut rng = rng(seed(), 1);
        let qkv = matrix(batch * capacity, features, storage, Data::Uniform, &mut rng);
        let options = AttentionOptions { kv_heads: Some(kv_heads), causal: true, bias: None };
        let real = lengths.map(|length| length as u32);
        let want = attention::expect(&qkv, &real, (capacity, heads), &options, DType::F32, output).unwrap();
        let all = qkv.elements().to_f32();
        let mut y = vec![0.0; batch * capacity * heads * h];
        let cache = poisoned(device, batch * capacity, 2 * kv_heads * h, storage);
        let mut done = 0;
        for seq in [70, 1, 1, 37, 2, 33, 6] {
            let rows = |b: usize| (b * capacity + done) * features..(b * capacity + done + seq) * features;
            let new: Vec<f32> = (0..batch).flat_map(|b| all[rows(b)].to_vec()).collect();
            let new = Matrix::new(batch * seq, features, Elements::from_f32(storage, &new)).unwrap();
            let new = device.upload(&new).unwrap();
            let past = lengths.map(|length| length.min(done) as u32);
            let count = lengths.map(|length| length.saturating_sub(done).min(seq) as u32);
            let (tp, tl) = (indices(device, &past), indices(device, &count));
            let to = poisoned(device, batch * seq, heads * h, output);
            let append = KvAppend { qkv: &new, lengths: &tl, past: &tp, batch, seq, cache: &cache };
            let (qkv, cache, lengths, past) = (&new, &cache, &tl, &tp);
            let attend = CachedAttention { qkv, cache, lengths, past, batch, seq, heads, kv_heads, y: &to };
            device.submit(&[device.prepare(&append).unwrap(), device.prepare(&attend).unwrap()]).unwrap();
            for (row, values) in numbers(device, &to).chunks(heads * h).enumerate() {
                let at = (row / seq * capacity + done + row % seq) * heads * h;
                y[at..at + heads * h].copy_from_slice(values);
            }
            done += seq;
        }
        assert_eq!(done, capacity);
        let y = Matrix::new(batch * capacity, heads * h, Elements::from_f32(output, &y)).unwrap();
        let verdict = want.verify(&y).unwrap();
        assert!(verdict.passed() && verdict.undecided == 0, "{storage} on {}: {verdict}", device.info().name());
    }
}

/// A call with what it reads and writes: `seq` tokens of one sequence behind `past`.
struct Step {
    device: Device,
    cache: Tensor,
    y: Tensor,
    call: sparse24::Prepared,
}

impl Step {
    fn new(device: &Device, (seq, past, heads, kv_heads, h): (usize, usize, usize, usize, usize), seed: u64) -> Self {
        let mut rng = rng(seed, 2);
        let mut given = |rows, cols| matrix(rows, cols, DType::F32, Data::Uniform, &mut rng);
        let (qkv, cache) = (given(seq, (heads + 2 * kv_heads) * h), given(past + seq, 2 * kv_heads * h));
        let [qkv, cache] = [&qkv, &cache].map(|m| device.upload(m).unwrap());
        let y = poisoned(device, seq, heads * h, DType::F32);
        let (lengths, past) = (indices(device, &[seq as u32]), indices(device, &[past as u32]));
        let attention = CachedAttention {
            qkv: &qkv,
            cache: &cache,
            lengths: &lengths,
            past: &past,
            batch: 1,
            seq,
            heads,
            kv_heads,
            y: &y,
        };
        let call = device.prepare(&attention).unwrap();
        Self { device: device.clone(), cache, y, call }
    }

    fn run(&self) -> Vec<f32> {
        self.call.run().unwrap();
        numbers(&self.device, &self.y)
    }
}

on_both_devices!(no_query_sees_what_is_behind_it);

/// Keys and values that are no numbers, in the row of a token, change nothing for those before it, and all for those
/// from it on.
fn no_query_sees_what_is_behind_it(device: &Device) {
    for (seq, past, heads, kv_heads, h) in [(7, 5, 4, 1, 16), (6, 130, 3, 3, 9), (40, 60, 2, 1, 64)] {
        let step = Step::new(device, (seq, past, heads, kv_heads, h), seed());
        let before = step.run();
        let mut cache = numbers(device, &step.cache);
        let (width, row) = (2 * kv_heads * h, seq / 2);
        cache[(past + row) * width..][..width].fill(f32::NAN);
        device.write(&step.cache, &Matrix::from_f32(past + seq, width, &cache).unwrap()).unwrap();
        let after = step.run();
        let (same, others) = after.split_at(row * heads * h);
        assert_eq!(same, &before[..row * heads * h], "{}", device.info().name());
        assert!(others.iter().all(|y| y.is_nan()), "{}", device.info().name());
    }
}

/// Which thread computes a head, and which queries read the rows together, must not show in the result.
#[test]
fn cpu_results_do_not_depend_on_threads() {
    let seed = seed();
    for sizes in [(1, 1500, 9, 3, 64), (7, 300, 6, 2, 40), (170, 90, 4, 4, 33)] {
        let of = |threads| {
            let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
            Step::new(&device, sizes, seed).run()
        };
        let one = of(1);
        assert!(one.iter().all(|y| y.is_finite()));
        assert!(one == of(2) && one == of(5), "{sizes:?}");
    }
}

/// The limits that WebGPU grants everywhere are enough.
#[test]
#[ignore = "needs a GPU"]
fn attention_to_a_cache_runs_in_the_least_workgroup_memory() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_compute_workgroup_storage_size: 16384, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    attends(&Device::from_wgpu(wgpu_device, queue).unwrap(), &SIZES[..7]);
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (qkv, cache, y) = (tensor(6, 16), tensor(10, 8), tensor(6, 8));
    let [two, other, three] = [2, 2, 3].map(|batch| device.indices(batch).unwrap());
    let (lengths, past) = (&two, &other);
    let call =
        CachedAttention { qkv: &qkv, cache: &cache, lengths, past, batch: 2, seq: 3, heads: 4, kv_heads: 2, y: &y };
    assert!(device.prepare(&call).is_ok());
    refuses(device, &CachedAttention { heads: 3, ..call }, &["8 features", "3 heads"]);
    refuses(device, &CachedAttention { heads: 0, ..call }, &["0 heads"]);
    refuses(device, &CachedAttention { kv_heads: 3, ..call }, &["4 heads", "3 of keys"]);
    refuses(device, &CachedAttention { kv_heads: 0, ..call }, &["0 of keys"]);
    refuses(device, &CachedAttention { kv_heads: 1, ..call }, &["qkv", "[6, 16]", "[6, 12]"]);
    refuses(device, &CachedAttention { seq: 4, ..call }, &["qkv", "[6, 16]", "[8, 16]"]);
    refuses(device, &CachedAttention { y: &tensor(5, 8), ..call }, &["y has shape [5, 8], expected [6, 8]"]);
    refuses(device, &CachedAttention { cache: &tensor(10, 6), ..call }, &["cache", "[10, 6]", "[10, 8]"]);
    refuses(device, &CachedAttention { cache: &tensor(11, 8), ..call }, &["cache has 11 rows", "2 sequences"]);
    refuses(device, &CachedAttention { lengths: &three, ..call }, &["lengths has shape [3], expected [2]"]);
    refuses(device, &CachedAttention { past: &three, ..call }, &["past has shape [3], expected [2]"]);
    refuses(device, &CachedAttention { batch: usize::MAX, ..call }, &["tokens overflows"]);
    let square = tensor(6, 8);
    refuses(device, &CachedAttention { cache: &square, y: &square, ..call }, &["y shares its memory with cache"]);
    let (wide, y) = (tensor(6, 3 * 257), tensor(6, 257));
    let wide = CachedAttention { qkv: &wide, cache: &tensor(10, 514), heads: 1, kv_heads: 1, y: &y, ..call };
    refuses(device, &wide, &["257 features", "256 at most"]);
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    for (batch, seq, width) in [(0, 5, 8), (2, 0, 8), (2, 3, 0)] {
        let [qkv, y] = [3 * width, width].map(|cols| device.zeros(batch * seq, cols, DType::F32).unwrap());
        let cache = device.zeros(4 * batch, 2 * width, DType::F32).unwrap();
        let [lengths, past] = [0; 2].map(|_| device.indices(batch).unwrap());
        let call = CachedAttention {
            qkv: &qkv,
            cache: &cache,
            lengths: &lengths,
            past: &past,
            batch,
            seq,
            heads: 2,
            kv_heads: 2,
            y: &y,
        };
        device.prepare(&call).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |head_dim, cache| {
        let kernel = CachedAttentionKernel::new(head_dim, DType::F32, cache, DType::F16);
        kernel.map(|k| k.share(3).to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(says(64, DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(257, DType::F16), Err("heads of 257 features, 256 at most".to_owned()));
    assert_eq!(says(63, DType::F16), Ok("cached_attention-f32f32-cache_f16-d63-scalars-share3-out_f16".into()));
}
