//! Decompression: every byte against the oracle. The ways through both conversions are in sparsify.rs.

use sparse24::reference::decompress::exact as oracle;
use sparse24::{Compressed, DType, Decompress, Device, Elements, Matrix, Options, Sparse24, Tensor, VectorLen, prune};

use crate::common::{callers_device, gpu, rng, seed};
use crate::sparsify::{KINDS, SIZES, elements, same, weights};
use crate::{indices, poisoned};

/// Weights that were pruned at random, in parts and packed, against the oracle and the host's own decompression.
fn devices_write_the_oracles_bytes(device: &Device) {
    let seed = seed();
    for (i, (m, k)) in SIZES.into_iter().enumerate() {
        for (vector, dtype) in VectorLen::ALL.into_iter().flat_map(|v| [DType::F32, DType::F16].map(|d| (v, d))) {
            for kind in KINDS {
                let what = format!("{m} x {k}, {dtype}, V = {vector}, {kind:?} on {}", device.info().name());
                let w = weights(m, k, dtype, kind, vector, &mut rng(seed, i as u64));
                let s = Sparse24::compress(&w, &prune::random(m, k, vector, seed).unwrap()).unwrap();
                let want = oracle((m, k), vector, s.values(), s.meta()).unwrap();
                same(s.decompress().elements(), want.elements(), &format!("{what}: the host"));
                let values = Matrix::new(m, s.k_physical(), s.values().clone()).unwrap();
                let (values, meta) = (device.upload(&values).unwrap(), indices(device, s.meta()));
                let packed = device.upload_weights(&(&s).into()).unwrap();
                let parts = Compressed::Parts { vector, values: &values, meta: &meta };
                for from in [parts, Compressed::Weights(&packed)] {
                    let back = poisoned(device, m, k, dtype);
                    device.prepare(&Decompress { from, w: &back }).unwrap().run().unwrap();
                    same(device.read(&back).unwrap().elements(), want.elements(), &what);
                }
            }
        }
    }
}

#[test]
fn devices_write_the_oracles_bytes_on_the_cpu() {
    for threads in [1, 3] {
        let options = Options { threads: Some(threads), ..Options::default() };
        devices_write_the_oracles_bytes(&Device::open("cpu", options).unwrap());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn devices_write_the_oracles_bytes_on_the_gpu() {
    gpu().iter().for_each(devices_write_the_oracles_bytes);
}

/// One wrong code is seen.
#[test]
fn a_wrong_code_is_seen() {
    let values = Elements::F32(vec![1.0, 2.0]);
    let exact = |code| oracle((1, 4), VectorLen::ONE, &values, &[code]).unwrap();
    assert_eq!(exact(0x4), Matrix::from_f32(1, 4, &[1.0, 2.0, 0.0, 0.0]).unwrap());
    assert_eq!(exact(0x8), Matrix::from_f32(1, 4, &[1.0, 0.0, 2.0, 0.0]).unwrap());
}

/// An odd number of f16 ends within a word of the caller's buffer; what shares the word stays.
#[test]
#[ignore = "needs a GPU"]
fn an_odd_number_of_halves_leaves_its_neighbour_alone() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue.clone()).unwrap();
    let buffer = wgpu_device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 8,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    queue.write_buffer(&buffer, 0, &[0xff; 8]);
    let w = Matrix::from_f32(1, 3, &[1.0, 2.0, 3.0]).unwrap().cast(DType::F16);
    let packed = device.upload_weights(&prune::sparsify(&w, VectorLen::ONE).unwrap().into()).unwrap();
    let three = Tensor::from_buffer(&device, buffer.clone(), 1, 3, DType::F16).unwrap();
    device.prepare(&Decompress { from: Compressed::Weights(&packed), w: &three }).unwrap().run().unwrap();
    let four = Tensor::from_buffer(&device, buffer, 1, 4, DType::F16).unwrap();
    same(device.read(&four).unwrap().elements(), &elements(DType::F16, &[0, 0x4000, 0x4200, 0xffff]), "four halves");
}
