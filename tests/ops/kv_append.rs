//! Keys and values of new tokens, put into a cache.

use sparse24::ops::kv_append::KvAppendKernel;
use sparse24::reference::kv_append as oracle;
use sparse24::{DType, Device, Elements, KvAppend, Matrix};

use crate::common::{Data, matrix, rng, seed};
use crate::{expect, indices, lengths_of, numbers, refuses, slightly_wrong, types, with_nan_padding};

/// Sequences, rows of each, its capacity, heads of queries and of keys, features of a head. One of all; a model's step;
/// odd numbers; more than the 64 tokens of a task on the CPU and the 256 elements of a workgroup; more new tokens than
/// the capacity.
const SIZES: [(usize, usize, usize, usize, usize, usize); 6] = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 9, 9, 3, 64),
    (5, 3, 8, 2, 1, 3),
    (5, 70, 150, 4, 2, 5),
    (6, 9, 4, 0, 1, 33),
    (1, 130, 140, 3, 3, 20),
];

/// What a cache of `capacity` rows has of each of some sequences: nothing, all but one, some, all, and more than there
/// can be. The first is that of number `case`.
pub(crate) fn past_of(batch: usize, capacity: usize, case: usize) -> Vec<u32> {
    let of = |i: usize| [0, capacity - 1, capacity / 3, capacity, capacity + 7, u32::MAX as usize][i % 6];
    (0..batch).map(|b| of(b + case) as u32).collect()
}

on_both_devices!(caches_agree_with_the_oracle);

fn caches_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (i, (batch, seq, capacity, heads, kv_heads, head_dim)) in SIZES.into_iter().enumerate() {
        for (storage, output) in types(device, i) {
            for (case, data) in [Data::Whole, Data::Uniform, Data::Edge].into_iter().enumerate() {
                let mut rng = rng(seed, i as u64);
                let (lengths, past) = (lengths_of(batch, seq, &mut rng), past_of(batch, capacity, case));
                let features = (heads + 2 * kv_heads) * head_dim;
                let qkv = matrix(batch * seq, features, storage, data, &mut rng);
                let qkv = with_nan_padding(&qkv, &lengths, seq);
                // What is there is anything, and every third row NaN.
                let before = matrix(batch * capacity, 2 * kv_heads * head_dim, output, Data::Edge, &mut rng);
                let mut numbers = before.elements().to_f32();
                numbers.chunks_mut(before.cols()).step_by(3).for_each(|row| row.fill(f32::NAN));
                let before = Matrix::new(before.rows(), before.cols(), Elements::from_f32(output, &numbers)).unwrap();
                let want = oracle::expect(&qkv, &before, (&lengths, &past), seq).unwrap();
                let (tx, cache) = (device.upload(&qkv).unwrap(), device.upload(&before).unwrap());
                let (tl, tp) = (indices(device, &lengths), indices(device, &past));
                let append = KvAppend { qkv: &tx, lengths: &tl, past: &tp, batch, seq, cache: &cache };
                let call = device.prepare(&append).unwrap();
                let what = format!("{:?}, {storage} to {output}, {data:?}", SIZES[i]);
                expect(device, &call, &cache, &want, &what);
                if matches!(data, Data::Uniform) && storage == output && batch > 1 {
                    slightly_wrong(&want, &device.read(&cache).unwrap(), &what);
                }
            }
        }
    }
}

on_both_devices!(a_cache_fills_up);

/// Tokens that name themselves, in steps of three, of two sequences with four rows and two new tokens in every step of
/// the second one.
fn a_cache_fills_up(device: &Device) {
    let cache = device.zeros(10, 2, DType::F32).unwrap();
    let (lengths, past) = (indices(device, &[3, 2]), indices(device, &[0, 0]));
    let qkv = device.zeros(6, 3, DType::F32).unwrap();
    let append = KvAppend { qkv: &qkv, lengths: &lengths, past: &past, batch: 2, seq: 3, cache: &cache };
    let call = device.prepare(&append).unwrap();
    for step in 0..2 {
        let rows: Vec<f32> = (0..18).map(|e| (100 * step + e) as f32).collect();
        device.write(&qkv, &Matrix::from_f32(6, 3, &rows).unwrap()).unwrap();
        device.write_indices(&past, &[3 * step, 2 * step]).unwrap();
        call.run().unwrap();
    }
    let want = [
        [1.0, 2.0, 4.0, 5.0, 7.0, 8.0, 101.0, 102.0, 104.0, 105.0],
        [10.0, 11.0, 13.0, 14.0, 110.0, 111.0, 113.0, 114.0, 0.0, 0.0],
    ];
    assert_eq!(numbers(device, &cache), want.concat(), "{}", device.info().name());
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (qkv, cache) = (tensor(6, 8), tensor(10, 4));
    let [two, other, three] = [2, 2, 3].map(|batch| device.indices(batch).unwrap());
    let append = KvAppend { qkv: &qkv, lengths: &two, past: &other, batch: 2, seq: 3, cache: &cache };
    assert!(device.prepare(&append).is_ok());
    refuses(device, &KvAppend { seq: 4, ..append }, &["qkv has shape [6, 8], expected [8, 8]"]);
    refuses(device, &KvAppend { lengths: &three, ..append }, &["lengths has shape [3], expected [2]"]);
    refuses(device, &KvAppend { past: &three, ..append }, &["past has shape [3], expected [2]"]);
    refuses(device, &KvAppend { cache: &tensor(11, 4), ..append }, &["cache has 11 rows", "2 sequences"]);
    refuses(device, &KvAppend { cache: &tensor(0, 4), ..append }, &["cache has 0 rows", "2 sequences"]);
    refuses(device, &KvAppend { cache: &tensor(10, 3), ..append }, &["cache has 3 features", "qkv's 8"]);
    refuses(device, &KvAppend { cache: &tensor(10, 10), ..append }, &["cache has 10 features", "qkv's 8"]);
    refuses(device, &KvAppend { seq: usize::MAX, ..append }, &["tokens overflows"]);
    let square = tensor(6, 8);
    refuses(device, &KvAppend { qkv: &square, cache: &square, ..append }, &["cache shares its memory with qkv"]);
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    for (batch, seq, width) in [(0, 5, 2), (2, 0, 2), (2, 3, 0)] {
        let qkv = device.zeros(batch * seq, 3 * width, DType::F32).unwrap();
        let cache = device.zeros(4 * batch, 2 * width, DType::F32).unwrap();
        let [lengths, past] = [0; 2].map(|_| device.indices(batch).unwrap());
        let append = KvAppend { qkv: &qkv, lengths: &lengths, past: &past, batch, seq, cache: &cache };
        device.prepare(&append).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |cache| KvAppendKernel::new(128, DType::F32, cache).map(|k| k.to_string()).map_err(|e| e.to_string());
    assert_eq!(says(DType::Bf16), Err("activations is bf16, expected f32".to_owned()));
    assert_eq!(says(DType::F16), Ok("kv_append-f32f32-d128-out_f16".into()));
}
