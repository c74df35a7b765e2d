//! Pruning and compression in one pass, on the host, on the CPU device and on a GPU: every byte against the oracle.

use crate::common::{Data, allocated, callers_device, gpu, matrix, rng, seed};
use crate::poisoned;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use sparse24::reference::decompress::exact as decompressed;
use sparse24::reference::sparsify::exact as oracle;
use sparse24::{
    Compressed, DType, Decompress, Device, Elements, Error, Gemm, GemmOperands, Indices, Matrix, Op, Options, Problem,
    Sparse24, Sparsify, Tensor, VectorLen, Weights, prune,
};

/// What weights are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Every bit of the mantissa.
    Uniform,
    /// Few distinct values, zeros of both signs among them: ties and under-full groups.
    Few,
    /// Any bits but NaN's: subnormals, infinities, every exponent.
    Bits,
    /// Any bits.
    Nan,
    /// The columns of a block hold the same numbers of very different sizes, each in another order: exact sums are
    /// equal, so every single rounding decides.
    Shuffled,
}

pub(crate) const KINDS: [Kind; 5] = [Kind::Uniform, Kind::Few, Kind::Bits, Kind::Nan, Kind::Shuffled];

/// Bits that are a NaN of the type.
fn is_nan(bits: u32, dtype: DType) -> bool {
    match dtype {
        DType::F32 => bits & 0x7fff_ffff > 0x7f80_0000,
        DType::F16 => bits & 0x7fff > 0x7c00,
        DType::Bf16 => bits & 0x7fff > 0x7f80,
    }
}

pub(crate) fn elements(dtype: DType, bits: &[u32]) -> Elements {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => bits.iter().flat_map(|b| b.to_le_bytes()).collect(),
        DType::F16 | DType::Bf16 => bits.iter().flat_map(|b| (*b as u16).to_le_bytes()).collect(),
    };
    Elements::from_bytes(dtype, &bytes).unwrap()
}

pub(crate) fn weights(m: usize, k: usize, dtype: DType, kind: Kind, v: VectorLen, rng: &mut Pcg64) -> Matrix {
    let mut any = |nan: bool| loop {
        let bits = rng.next_u32();
        // A tenth is zero or infinite.
        let bits = match rng.next_u32() % 20 {
            0 => bits & 0x8000_8000,
            1 => match dtype {
                DType::F32 => 0x7f80_0000 | bits & 0x8000_0000,
                DType::F16 => 0x7c00 | bits & 0x8000,
                DType::Bf16 => 0x7f80 | bits & 0x8000,
            },
            _ => bits,
        };
        if nan || !is_nan(bits, dtype) {
            break bits;
        }
    };
    match kind {
        Kind::Uniform => matrix(m, k, dtype, Data::Uniform, rng),
        Kind::Few => {
            let few = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 0.0, -0.0];
            let data: Vec<f32> = (0..m * k).map(|_| few[rng.next_u32() as usize % 8]).collect();
            Matrix::new(m, k, Elements::from_f32(dtype, &data)).unwrap()
        }
        Kind::Bits | Kind::Nan => {
            let bits: Vec<u32> = (0..m * k).map(|_| any(kind == Kind::Nan && m * k > 0)).collect();
            Matrix::new(m, k, elements(dtype, &bits)).unwrap()
        }
        Kind::Shuffled => {
            let mut data = vec![0.0; m * k];
            for first in (0..m).step_by(v.get()) {
                let rows = first..m.min(first + v.get());
                let numbers: Vec<f32> = rows
                    .clone()
                    .map(|_| {
                        let mantissa = 1.0 + (rng.next_u32() >> 9) as f32 / (1 << 23) as f32;
                        mantissa * 2f32.powi(rng.next_u32() as i32 % if dtype == DType::F16 { 14 } else { 60 })
                    })
                    .collect();
                for col in 0..k {
                    let mut order = numbers.clone();
                    for i in (1..order.len()).rev() {
                        order.swap(i, rng.next_u32() as usize % (i + 1));
                    }
                    rows.clone().zip(order).for_each(|(row, x)| data[row * k + col] = x);
                }
            }
            Matrix::new(m, k, Elements::from_f32(dtype, &data)).unwrap()
        }
    }
}

/// Sizes: single, ragged groups, around a word, around the 32 blocks of a workgroup and the 128 rows of a task, blocks
/// that are not full.
pub(crate) const SIZES: [(usize, usize); 12] =
    [(1, 1), (1, 3), (3, 4), (2, 5), (5, 31), (32, 32), (33, 33), (31, 36), (129, 62), (64, 130), (260, 100), (17, 7)];

pub(crate) fn same(got: &Elements, want: &Elements, what: &str) {
    assert_eq!(got.dtype(), want.dtype(), "{what}");
    let size = got.dtype().bytes();
    let differs = got.as_bytes().chunks(size).zip(want.as_bytes().chunks(size)).position(|(a, b)| a != b);
    assert!(
        differs.is_none() && got.len() == want.len(),
        "{what}: element {differs:?}: {:?}, expected {:?}",
        differs.map(|i| got.get(i)),
        differs.map(|i| want.get(i))
    );
}

#[test]
fn the_host_writes_the_oracles_bytes_in_one_pass_and_in_two() {
    let seed = seed();
    for (i, (m, k)) in SIZES.into_iter().enumerate() {
        for (vector, dtype) in
            VectorLen::ALL.into_iter().flat_map(|v| [DType::F32, DType::F16, DType::Bf16].map(|d| (v, d)))
        {
            for kind in KINDS {
                let what = format!("{m} x {k}, {dtype}, V = {vector}, {kind:?}");
                let w = weights(m, k, dtype, kind, vector, &mut rng(seed, i as u64));
                if let Some(at) = w.elements().to_f32().iter().position(|x| x.is_nan()) {
                    let refused = |e: Error| e.is_nan() && e.place() == Some((at / k, at % k));
                    assert!(refused(prune::sparsify(&w, vector).unwrap_err()), "{what}");
                    assert!(refused(prune::magnitude(&w, vector).unwrap_err()), "{what}");
                    continue;
                }
                let (values, meta) = oracle(&w, vector).unwrap();
                let one = prune::sparsify(&w, vector).unwrap();
                let mask = prune::magnitude(&w, vector).unwrap();
                let two = Sparse24::compress(&w, &mask).unwrap();
                // Over other weights, all of whose bytes differ or may.
                let other = prune::random(m, k, vector, 3).unwrap();
                let filled = Elements::from_f32(dtype, &vec![7.0; m * k]);
                let mut over = Sparse24::compress(&Matrix::new(m, k, filled).unwrap(), &other).unwrap();
                prune::sparsify_into(&w, &mut over).unwrap();
                for s in [&one, &two, &over] {
                    same(s.values(), &values, &what);
                    assert_eq!(s.meta(), meta, "{what}");
                }
                let (m, k, vector, values, meta) = one.clone().into_parts();
                Sparse24::from_parts(m, k, vector, values, meta).unwrap();
                // Up to the sign of zero.
                assert_eq!(one.decompress(), mask.mask().apply(&w).unwrap(), "{what}");
            }
        }
    }
}

#[test]
fn weights_that_do_not_fit_the_old_ones_are_refused() {
    let mut s = prune::sparsify(&Matrix::zeros(2, 8, DType::F32).unwrap(), VectorLen::ONE).unwrap();
    let mut says = |w: &Matrix| prune::sparsify_into(w, &mut s).unwrap_err().to_string();
    assert_eq!(says(&Matrix::zeros(2, 7, DType::F32).unwrap()), "w has shape [2, 7], expected [2, 8]");
    assert_eq!(says(&Matrix::zeros(2, 8, DType::F16).unwrap()), "w is f16, expected f32");
    let mut data = [1.0; 16];
    data[13] = f32::NAN;
    assert!(says(&Matrix::from_f32(2, 8, &data).unwrap()).contains("row 1, column 5"));
    assert!(s.values().get(7).is_nan());
}

/// Weights of these sizes that every code and value differs from.
pub(crate) fn other_weights(device: &Device, m: usize, k: usize, dtype: DType, vector: VectorLen) -> Weights {
    let w = matrix(m, k, dtype, Data::Uniform, &mut rng(1, 1));
    let s = Sparse24::compress(&w, &prune::random(m, k, vector, 5).unwrap()).unwrap();
    device.upload_weights(&s.into()).unwrap()
}

/// Every way through a device: to parts and to packed weights, and from each back to a dense matrix.
fn expect(device: &Device, w: &Matrix, vector: VectorLen, what: &str) {
    let (m, k, dtype) = (w.rows(), w.cols(), w.dtype());
    let what = format!("{what} on {}", device.info().name());
    let (values, meta) = oracle(w, vector).unwrap();
    let dense = decompressed((m, k), vector, &values, &meta).unwrap();

    let tensor = device.upload(w).unwrap();
    let got_values = poisoned(device, m, 2 * k.div_ceil(4), dtype);
    let got_meta = device.indices(meta.len()).unwrap();
    device.write_indices(&got_meta, &vec![u32::MAX; meta.len()]).unwrap();
    let packed = other_weights(device, m, k, dtype, vector);
    let parts = Compressed::Parts { vector, values: &got_values, meta: &got_meta };
    let backs = [poisoned(device, m, k, dtype), poisoned(device, m, k, dtype)];
    let calls = [
        device.prepare(&Sparsify { w: &tensor, to: parts }).unwrap(),
        device.prepare(&Sparsify { w: &tensor, to: Compressed::Weights(&packed) }).unwrap(),
        device.prepare(&Decompress { from: parts, w: &backs[0] }).unwrap(),
        device.prepare(&Decompress { from: Compressed::Weights(&packed), w: &backs[1] }).unwrap(),
    ];
    device.submit(&calls).unwrap();
    same(device.read(&got_values).unwrap().elements(), &values, &format!("{what}: values"));
    assert_eq!(device.read_indices(&got_meta).unwrap(), meta, "{what}: meta");
    for (back, from) in backs.iter().zip(["parts", "packed"]) {
        same(device.read(back).unwrap().elements(), dense.elements(), &format!("{what}: dense from {from}"));
    }
}

fn devices_write_the_oracles_bytes(device: &Device) {
    let seed = seed();
    for (i, (m, k)) in SIZES.into_iter().enumerate() {
        for (vector, dtype) in VectorLen::ALL.into_iter().flat_map(|v| [DType::F32, DType::F16].map(|d| (v, d))) {
            for kind in KINDS {
                let w = weights(m, k, dtype, kind, vector, &mut rng(seed, i as u64));
                expect(device, &w, vector, &format!("{m} x {k}, {dtype}, V = {vector}, {kind:?}"));
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

/// What a product makes of weights that were replaced after it was prepared is what it makes of the same weights
/// uploaded.
fn products_see_the_new_weights(device: &Device) {
    let mut rng = rng(seed(), 0);
    let f16 = device.caps().is_none_or(|caps| caps.f16);
    for (vector, dtype) in VectorLen::ALL.into_iter().flat_map(|v| [DType::F32, DType::F16].map(|d| (v, d))) {
        // Two tokens, and as many as go another way; k is no multiple of a word, m not of a panel or a block.
        for n in [2, 40].into_iter().filter(|_| f16 || dtype == DType::F32) {
            let (m, k) = (140, 100);
            let x = device.upload(&matrix(n, k, dtype, Data::Whole, &mut rng)).unwrap();
            let [y, fresh] = [0; 2].map(|_| poisoned(device, n, m, dtype));
            let w = poisoned(device, m, k, dtype);
            let weights = other_weights(device, m, k, dtype, vector);
            let problem = Problem::linear(Op::Sparse24(vector), m, n, k, dtype);
            let plan = device.plan(&problem).unwrap();
            let operands = GemmOperands::new(&x, &y);
            let step = [
                device.prepare(&Sparsify { w: &w, to: Compressed::Weights(&weights) }).unwrap(),
                device.prepare(&Gemm { plan: &plan, weights: &weights, operands }).unwrap(),
            ];
            for round in 0..2 {
                let host = matrix(m, k, dtype, Data::Whole, &mut rng);
                device.write(&w, &host).unwrap();
                device.submit(&step).unwrap();
                let uploaded = device.upload_weights(&prune::sparsify(&host, vector).unwrap().into()).unwrap();
                let gemm = Gemm { plan: &plan, weights: &uploaded, operands: GemmOperands { y: &fresh, ..operands } };
                device.prepare(&gemm).unwrap().run().unwrap();
                let (y, fresh) = (device.read(&y).unwrap(), device.read(&fresh).unwrap());
                assert_eq!(y, fresh, "{problem:?}, round {round}");
                assert!(y.elements().to_f32().iter().any(|x| *x != 0.0));
            }
        }
    }
}

on_both_devices!(products_see_the_new_weights);

fn what_does_not_fit_is_refused_by_name(device: &Device) {
    let tensor = |rows, cols| device.zeros(rows, cols, DType::F32).unwrap();
    let (w, values, meta) = (tensor(4, 8), tensor(4, 4), device.indices(4).unwrap());
    let vector = VectorLen::ONE;
    let says = |w: &Tensor, compressed: Compressed<'_>, words: &[&str]| {
        let errors = [
            device.prepare(&Sparsify { w, to: compressed }).unwrap_err().to_string(),
            device.prepare(&Decompress { from: compressed, w }).unwrap_err().to_string(),
        ];
        assert!(errors.iter().all(|e| words.iter().all(|word| e.contains(word))), "{errors:?}");
    };
    fn parts<'a>(values: &'a Tensor, meta: &'a Indices) -> Compressed<'a> {
        Compressed::Parts { vector: VectorLen::ONE, values, meta }
    }
    says(&w, parts(&tensor(4, 8), &meta), &["values", "[4, 8]", "[4, 4]"]);
    says(&w, parts(&device.zeros(4, 4, DType::F16).unwrap(), &meta), &["values is f16, expected f32"]);
    says(&w, parts(&values, &device.indices(3).unwrap()), &["meta", "[3]", "[4]"]);
    let shared = VectorLen::new(4).unwrap();
    says(&w, Compressed::Parts { vector: shared, values: &values, meta: &meta }, &["meta", "[4]", "[1]"]);
    says(&tensor(4, 0), parts(&values, &meta), &["values", "[4, 4]", "[4, 0]"]);
    says(&device.zeros(4, 8, DType::Bf16).unwrap(), parts(&values, &meta), &["w is bf16"]);

    let weights = other_weights(device, 4, 8, DType::F32, vector);
    says(&tensor(4, 12), Compressed::Weights(&weights), &["weights", "[4, 8]", "[4, 12]"]);
    let half = other_weights(device, 4, 8, DType::F16, vector);
    says(&w, Compressed::Weights(&half), &["weights is f16, expected f32"]);
    let dense = device.upload_weights(&matrix(4, 8, DType::F32, Data::Uniform, &mut rng(1, 1)).into()).unwrap();
    says(&w, Compressed::Weights(&dense), &["weights", "Dense", "2:4"]);
    let stranger = Device::cpu().unwrap();
    says(&w, parts(&stranger.zeros(4, 4, DType::F32).unwrap(), &meta), &["values", "another device"]);
    says(&w, Compressed::Weights(&other_weights(&stranger, 4, 8, DType::F32, vector)), &["another device"]);
}

#[test]
fn what_does_not_fit_is_refused_by_name_on_the_cpu() {
    what_does_not_fit_is_refused_by_name(&Device::cpu().unwrap());
    // The CPU device keeps bf16 weights as they are, and has no tensors of that type to replace them by.
    let device = Device::cpu().unwrap();
    let weights = other_weights(&device, 4, 8, DType::Bf16, VectorLen::ONE);
    let w = device.zeros(4, 8, DType::F32).unwrap();
    let error = device.prepare(&Sparsify { w: &w, to: Compressed::Weights(&weights) }).unwrap_err();
    assert_eq!(error.to_string(), "weights is bf16, expected f32");
}

#[test]
#[ignore = "needs a GPU"]
fn what_does_not_fit_is_refused_by_name_on_the_gpu() {
    gpu().iter().for_each(what_does_not_fit_is_refused_by_name);
}

fn matrices_without_elements_are_no_error(device: &Device) {
    for (m, k) in [(0, 0), (0, 9), (9, 0)] {
        for vector in [VectorLen::ONE, VectorLen::new(4).unwrap()] {
            expect(device, &Matrix::zeros(m, k, DType::F32).unwrap(), vector, &format!("{m} x {k}, V = {vector}"));
        }
    }
}

on_both_devices!(matrices_without_elements_are_no_error);

/// Dense weights may be larger than a binding where compressed ones are not, and those may come in pieces.
#[test]
#[ignore = "needs a GPU"]
fn matrices_larger_than_a_binding_are_converted_in_parts() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_storage_buffer_binding_size: 1 << 17, ..own };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), limits);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let k = 100;
    for (m, vector) in [(500, 1), (500, 128), (1200, 1), (1200, 64), (1200, 128)] {
        let vector = VectorLen::new(vector).unwrap();
        let host = weights(m, k, DType::F32, Kind::Few, vector, &mut rng(seed(), m as u64));
        let w = device.upload(&host).unwrap();
        let packed = other_weights(&device, m, k, DType::F32, vector);
        let back = poisoned(&device, m, k, DType::F32);
        let calls = [
            device.prepare(&Sparsify { w: &w, to: Compressed::Weights(&packed) }).unwrap(),
            device.prepare(&Decompress { from: Compressed::Weights(&packed), w: &back }).unwrap(),
        ];
        device.submit(&calls).unwrap();
        let dense = prune::sparsify(&host, vector).unwrap().decompress();
        same(device.read(&back).unwrap().elements(), dense.elements(), &format!("{m} rows, V = {vector}"));
    }
}

/// A step that is repeated allocates nothing.
#[test]
#[ignore = "needs a GPU"]
fn a_repeated_step_allocates_nothing() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue).unwrap();
    let w = device.upload(&matrix(64, 64, DType::F32, Data::Uniform, &mut rng(1, 1))).unwrap();
    let weights = other_weights(&device, 64, 64, DType::F32, VectorLen::ONE);
    let step = [
        device.prepare(&Sparsify { w: &w, to: Compressed::Weights(&weights) }).unwrap(),
        device.prepare(&Decompress { from: Compressed::Weights(&weights), w: &w }).unwrap(),
    ];
    device.submit(&step).unwrap();
    device.wait().unwrap();
    let before = allocated(&wgpu_device);
    for _ in 0..5 {
        device.submit(&step).unwrap();
    }
    device.wait().unwrap();
    assert_eq!(allocated(&wgpu_device), before);
}
