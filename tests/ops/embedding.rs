//! Sums of embeddings.

use rand_pcg::rand_core::Rng;
use sparse24::ops::embedding::EmbeddingKernel;
use sparse24::reference::embedding as oracle;
use sparse24::{DType, Device, Embedding, Error, Indices, Tensor};

use crate::common::{Data, callers_device, gpu, matrix, rng, seed};
use crate::{expect, indices, poisoned, refuses, types};

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
    assert!(matches!(&error, Error::TooLarge { what, .. } if what.contains("embedding-f32f32-1")), "{error}");
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
