//! What happens once per weight matrix, on the host: prune, compress, both at once into new memory (`sparsify`) or into
//! what is there, decompress. `cargo bench`. All of it is one thread's work, and a rate is that of the dense weights'
//! bytes.
//!
//! Products are not measured here but by `sparse24 bench`, which verifies them first.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark may panic; criterion's macros make undocumented items"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sparse24::models::LAYER_SHAPES;
use sparse24::{DType, Matrix, Sparse24, VectorLen, prune};

fn host(c: &mut Criterion) {
    let (_, layers) = LAYER_SHAPES.into_iter().find(|(name, _)| *name == "bert-base").unwrap();
    let layers = layers.iter().map(|&(layer, m, k)| (format!("bert-base.{layer}"), m, k, DType::F32));
    let large = [DType::F32, DType::F16].map(|dtype| (format!("4096x4096.{dtype}"), 4096, 4096, dtype));
    for (name, m, k, dtype) in layers.chain(large) {
        let w = Matrix::uniform(m, k, dtype, 24).unwrap();
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Bytes(w.bytes() as u64));
        for vector in [VectorLen::ONE, VectorLen::new(32).unwrap()] {
            let mask = prune::magnitude(&w, vector).unwrap();
            let compressed = Sparse24::compress(&w, &mask).unwrap();
            group.bench_function(BenchmarkId::new("prune", vector), |b| {
                b.iter(|| prune::magnitude(black_box(&w), vector).unwrap());
            });
            group.bench_function(BenchmarkId::new("compress", vector), |b| {
                b.iter(|| Sparse24::compress(black_box(&w), black_box(&mask)).unwrap());
            });
            group.bench_function(BenchmarkId::new("sparsify", vector), |b| {
                b.iter(|| prune::sparsify(black_box(&w), vector).unwrap());
            });
            let mut again = compressed.clone();
            group.bench_function(BenchmarkId::new("sparsify_into", vector), |b| {
                b.iter(|| prune::sparsify_into(black_box(&w), black_box(&mut again)).unwrap());
            });
            group.bench_function(BenchmarkId::new("decompress", vector), |b| {
                b.iter(|| black_box(&compressed).decompress());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, host);
criterion_main!(benches);
