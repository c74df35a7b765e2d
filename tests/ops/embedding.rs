//! Sums of embeddings.

use ndarray::Array2;
use rand_pcg::rand_core::Rng;
use sparse24::ops::embedding::EmbeddingKernel;
use sparse24::reference::embedding as oracle;
use sparse24::{DType, Device, Embedding, EmbeddingGrad, Gradient, Indices, Options, Tensor};

use crate::common::{Data, callers_device, gpu, matrix, rng, seed};
use crate::{Sink, differences_agree, expect, indices, into, numbers, poisoned, refuses, slightly_wrong, types, wide};

on_both_devices!(embeddings_agree_with_the_oracle);

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
                    let want = oracle::expect(&told, output).unwrap();
                    let held: Vec<_> =
                        told.iter().map(|(t, i)| (device.upload(t).unwrap(), indices(device, i))).collect();
                    let pairs: Vec<_> = held.iter().map(|(t, i)| (t, i)).collect();
                    let y = poisoned(device, tokens, width, output);
                    let call = device.prepare(&Embedding { tables: &pairs, y: &y }).unwrap();
                    let what = format!("{tokens} x {width}, {count} tables, {storage} to {output}, {data:?}");
                    expect(device, &call, &y, &want, &what);
                }
            }
        }
    }
}

#[test]
fn the_oracles_gradient_is_that_of_differences() {
    let mut rng = rng(seed(), 0);
    let [table, other, dy] = [4, 2, 6].map(|rows| wide(&matrix(rows, 3, DType::F32, Data::Uniform, &mut rng)));
    let (ids, others) = ([3, 0, 3, 9, 1, 0], [0, 1, 1, 1, 0, 0]);
    let gradient = oracle::grad(4, &ids, dy.view());
    let loss = |table: &Array2<f64>, other: &Array2<f64>| {
        (oracle::exact(&[(table.view(), &ids), (other.view(), &others)]) * &dy).sum()
    };
    differences_agree(&gradient, &table, |table| loss(table, &other));
    differences_agree(&oracle::grad(2, &others, dy.view()), &other, |other| loss(&table, other));
}

on_both_devices!(gradients_agree_with_the_oracle);

fn gradients_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    // Tokens: none, one, around the 32 of a word and the 256 that are compared at once. Features around the 256 of a
    // workgroup.
    let sizes = [(0, 3), (1, 1), (31, 5), (33, 64), (256, 7), (257, 257), (600, 384)];
    for (i, (tokens, width)) in sizes.into_iter().enumerate() {
        for data in [Data::Whole, Data::Uniform] {
            for add in [false, true] {
                let mut rng = rng(seed, i as u64);
                let dy = matrix(tokens, width, DType::F32, data, &mut rng);
                // Rows that no token has, one that all have, and more rows than the CPU has tasks; ids past the end.
                let rows = [200, 1, 7];
                let ids = rows.map(|rows| (0..tokens).map(|_| rng.next_u32() % (rows + 2)).collect::<Vec<_>>());
                let held = ids.each_ref().map(|ids| indices(device, ids));
                let sinks = rows.map(|rows| Sink::new(device, (rows as usize, width), add, &mut rng));
                let tables: Vec<_> = held.iter().zip(&sinks).map(|(ids, sink)| (ids, sink.gradient())).collect();
                let tdy = device.upload(&dy).unwrap();
                device.prepare(&EmbeddingGrad { tables: &tables, dy: &tdy }).unwrap().run().unwrap();
                for ((ids, sink), rows) in ids.iter().zip(&sinks).zip(rows) {
                    let want = oracle::expect_grad(rows as usize, ids, &dy, sink.before.as_ref()).unwrap();
                    let got = device.read(&sink.to).unwrap();
                    let verdict = want.verify(&got).unwrap();
                    let what = format!("{tokens} x {width}, {rows} rows, {data:?}, {add}");
                    assert!(verdict.passed(), "{what} on {}: {verdict}", device.info().name());
                    if tokens == 33 && rows == 7 && matches!(data, Data::Uniform) {
                        slightly_wrong(&want, &got, &what);
                    }
                }
            }
        }
    }
}

/// Which thread has a row must not show in its sum.
#[test]
fn sums_over_tokens_do_not_depend_on_threads() {
    let (tokens, width, rows) = (640, 48, 300);
    let mut rng = rng(seed(), 0);
    let dy = matrix(tokens, width, DType::F32, Data::Uniform, &mut rng);
    let ids: Vec<_> = (0..tokens).map(|_| rng.next_u32() % 20 * 15).collect();
    let results = [1, 2, 5].map(|threads| {
        let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
        let to = poisoned(&device, rows, width, DType::F32);
        let (ids, dy) = (indices(&device, &ids), device.upload(&dy).unwrap());
        let tables = [(&ids, Gradient { to: &to, add: false })];
        device.prepare(&EmbeddingGrad { tables: &tables, dy: &dy }).unwrap().run().unwrap();
        numbers(&device, &to)
    });
    assert!(results[0].iter().all(|g| g.is_finite()) && results.iter().all(|result| *result == results[0]));
}

on_both_devices!(gradients_that_do_not_fit_are_refused_by_name);

fn gradients_that_do_not_fit_are_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (dy, to, other) = (tensor(6, 8), tensor(9, 8), tensor(2, 8));
    let (six, two) = (device.indices(6).unwrap(), device.indices(2).unwrap());
    let says = |tables: &[(&Indices, Gradient<'_>)], words: &[&str]| {
        refuses(device, &EmbeddingGrad { tables, dy: &dy }, words);
    };
    assert!(device.prepare(&EmbeddingGrad { tables: &[(&six, into(&to)), (&six, into(&other))], dy: &dy }).is_ok());
    says(&[], &["0 tables"]);
    says(&[(&six, into(&to)); 4], &["4 tables"]);
    says(&[(&six, into(&to)), (&two, into(&other))], &["ids of table 1", "[2]", "[6]"]);
    says(&[(&six, into(&tensor(9, 7)))], &["table 0", "[9, 7]", "[9, 8]"]);
    says(&[(&six, into(&tensor(0, 8)))], &["table 0", "no rows"]);
    says(&[(&six, into(&to)), (&six, into(&to))], &["table 0 shares its memory with table 1"]);
    says(&[(&six, into(&dy))], &["shares its memory"]);
    let half = device.zeros(9, 8, DType::F16).unwrap();
    says(&[(&six, into(&half))], &["table 0 is f16, expected f32"]);
    refuses(device, &EmbeddingGrad { tables: &[(&six, into(&to))], dy: &half }, &["dy is f16, expected f32"]);
}

on_both_devices!(what_does_not_fit_is_refused_by_name);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (x, y) = (tensor(6, 8), tensor(6, 8));
    let short = tensor(1, 7);
    let (six, two) = (device.indices(6).unwrap(), device.indices(2).unwrap());
    let says = |tables: &[(&Tensor, &Indices)], words: &[&str]| refuses(device, &Embedding { tables, y: &y }, words);
    says(&[], &["needs a table"]);
    says(&[(&x, &six); 4], &["4 tables"]);
    says(&[(&x, &six), (&x, &two)], &["ids of table 1", "[2]", "[6]"]);
    says(&[(&x, &six), (&short, &six)], &["table 1", "[1, 7]", "[1, 8]"]);
    says(&[(&tensor(0, 8), &six)], &["table 0", "no rows"]);
    says(&[(&x, &six), (&y, &six)], &["shares its memory with table 1"]);
    let half = device.zeros(6, 8, DType::F16).unwrap();
    says(&[(&x, &six), (&half, &six)], &["table 1", "f16", "f32"]);
    let wide = device.zeros(6, 8, DType::Bf16).unwrap();
    says(&[(&wide, &six)], &["table 0 is bf16"]);
}

on_both_devices!(empty_outputs_are_no_error);

fn empty_outputs_are_no_error(device: &Device) {
    let none = device.indices(0).unwrap();
    assert!(none.is_empty());
    for width in [8, 0] {
        let [table, y] = [1, 0].map(|rows| device.zeros(rows, width, DType::F32).unwrap());
        device.prepare(&Embedding { tables: &[(&table, &none)], y: &y }).unwrap().run().unwrap();
    }
}

/// A kernel that exists has a shader: what has none is refused when it is made, with what is wrong.
#[test]
fn kernels_without_a_shader_are_refused() {
    let says = |tables, storage| {
        EmbeddingKernel::new(tables, storage, DType::F32).map(|k| k.to_string()).map_err(|e| e.to_string())
    };
    assert_eq!(says(0, DType::F32), Err("an embedding of 0 tables, expected 1 to 3".into()));
    assert_eq!(says(4, DType::F32), Err("an embedding of 4 tables, expected 1 to 3".into()));
    assert_eq!(says(2, DType::F32), Ok("embedding-f32f32-2".into()));
    assert_eq!(says(1, DType::Bf16), Err("activations is bf16, expected f32".into()));
}

/// What cannot be bound at once is refused when the call is prepared, by name and with the limit.
#[test]
#[ignore = "needs a GPU"]
fn tables_larger_than_a_binding_are_refused() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_storage_buffer_binding_size: 1 << 20, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let [table, y] = [1100, 3].map(|rows| device.zeros(rows, 256, DType::F32).unwrap());
    let error = device.prepare(&Embedding { tables: &[(&table, &indices(&device, &[0; 3]))], y: &y }).unwrap_err();
    assert!(error.is_too_large() && error.to_string().contains("embedding-f32f32-1"), "{error}");
}

/// A device with too few storage buffers for a program says so.
#[test]
#[ignore = "needs a GPU"]
fn programs_with_too_many_buffers_are_refused() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_storage_buffers_per_shader_stage: 6, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let [table, y] = [1, 1].map(|rows| device.zeros(rows, 4, DType::F32).unwrap());
    let error = device.prepare(&Embedding { tables: &[(&table, &indices(&device, &[0]))], y: &y }).unwrap_err();
    assert!(error.to_string().contains("7 storage buffers per shader stage"), "{error}");
}
