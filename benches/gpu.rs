//! `cargo bench --bench gpu`: the layers of well-known models on a GPU, timed by the GPU's own timestamps where it has
//! them.
//!
//! A name is a layer, a number of tokens and an operation, such as `bert-large.ffn_in/512/sparse24-v32-f16`; a part of
//! it as an argument chooses. SPARSE24_BENCH_DEVICE names the adapter, else the best GPU is taken; with neither nothing
//! is measured, as `benches/host.rs` and `sparse24 bench` are for the CPU. SPARSE24_BENCH_TOKENS=1,512 replaces the
//! numbers of tokens.
//!
//! Each output is verified before it is timed: on one set of operands by the f64 oracle, on the others bit for bit by
//! the first. Calls rotate through the sets, so that weights come from memory as they do in a model.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a benchmark may panic, and says what it verified and what it leaves out"
)]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use sparse24::engine::{AdapterKind, DeviceInfo};
use sparse24::models::LAYER_SHAPES;
use sparse24::reference::Operands;
use sparse24::{
    DType, Device, Elements, Gemm, GemmOperands, HostWeights, Matrix, Op, Oracle, Prepared, Problem, Sample, VectorLen,
    prune,
};

/// A model's name and the tokens that it is measured with.
type Suite = (&'static str, &'static [usize]);

/// Each token count is a regime: one is bound by memory, 512 by arithmetic.
const SUITES: [Suite; 2] = [("bert-large", &[32, 512]), ("llama-8b", &[1, 512])];

/// A software driver does a few GFLOP/s: enough to see that everything runs.
const SOFTWARE_SUITES: [Suite; 1] = [("minilm", &[4])];

/// Most calls in one submission: some milliseconds of the shortest kernels, and far from a driver's watchdog with the
/// longest.
const MAX_CALLS: usize = 1024;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    match device() {
        Some(device) => gpu(&mut criterion, &device),
        None => eprintln!("no GPU: nothing is measured (SPARSE24_BENCH_DEVICE=llvmpipe takes a software driver)"),
    }
    criterion.final_summary();
}

/// The adapter that is asked for, else the best GPU if there is one.
fn device() -> Option<Device> {
    let device = match std::env::var("SPARSE24_BENCH_DEVICE") {
        Ok(name) => Device::gpu(&name).unwrap(),
        Err(_) => Device::auto().unwrap(),
    };
    device.caps().is_some().then_some(device)
}

fn gpu(c: &mut Criterion, device: &Device) {
    let DeviceInfo::Gpu(info) = device.info() else { return };
    let software = info.kind == AdapterKind::Software;
    let clock = if info.caps.timestamps { "GPU timestamps" } else { "the host's clock, for want of GPU timestamps" };
    eprintln!("{} ({} adapter, {}, {}), timed by {clock}", info.name, info.kind.name(), info.backend, info.driver);
    let tokens: Option<Vec<usize>> =
        std::env::var("SPARSE24_BENCH_TOKENS").ok().map(|list| list.split(',').map(|n| n.parse().unwrap()).collect());
    let dtypes: &[DType] = match (software, info.caps.f16) {
        (false, true) => &[DType::F32, DType::F16],
        _ => &[DType::F32],
    };
    let v32 = VectorLen::new(32).unwrap();
    // Twice the L2 of the largest GPUs; a software driver has the processor's caches.
    let rotated: usize = if software { 64 << 20 } else { 256 << 20 };

    for &(model, suite) in if software { &SOFTWARE_SUITES[..] } else { &SUITES } {
        let (_, layers) = LAYER_SHAPES.into_iter().find(|(name, _)| *name == model).unwrap();
        for &(layer, m, k) in layers {
            for &n in tokens.as_deref().unwrap_or(suite) {
                let mut group = c.benchmark_group(format!("{model}.{layer}"));
                for op in [Op::Dense, Op::Sparse24(VectorLen::ONE), Op::Sparse24(v32), Op::Masked] {
                    for &dtype in dtypes {
                        let problem = Problem::linear(op, m, n, k, dtype);
                        // What is effectively computed, whatever is skipped: the baseline's work.
                        group.throughput(Throughput::Elements(problem.effective_flops() as u64));
                        let mut name = op.name().to_owned();
                        name.extend(op.vector().map(|v| format!("-v{v}")));
                        name.extend((dtype != DType::F32).then(|| format!("-{dtype}")));
                        // Only what is chosen gets operands, once, and loses them before the next.
                        let mut ready = None;
                        group.bench_function(BenchmarkId::new(n.to_string(), name), |b| {
                            let calls = ready.get_or_insert_with(|| verified(device, &problem, rotated));
                            b.iter_custom(|iterations| time(device, calls, iterations as usize));
                        });
                    }
                }
                group.finish();
            }
        }
    }
}

/// Device time of so many calls.
fn time(device: &Device, calls: &[Prepared], count: usize) -> Duration {
    let all = 0..count;
    let starts = all.step_by(MAX_CALLS);
    starts
        .map(|from| {
            let some = calls.iter().cycle().skip(from % calls.len()).take(MAX_CALLS.min(count - from));
            device.time(some).unwrap().elapsed
        })
        .sum()
}

/// Calls of a problem on as many sets of operands as fill so many bytes, each of them verified.
fn verified(device: &Device, problem: &Problem, rotated: usize) -> Vec<Prepared> {
    let w = Matrix::uniform(problem.m, problem.k, problem.storage, 24).unwrap();
    let host = match problem.op {
        Op::Dense => HostWeights::Dense(w),
        Op::Sparse24(v) => HostWeights::from(prune::sparsify(&w, v).unwrap()),
        Op::Masked | Op::Masked24 => {
            let mask = prune::magnitude(&w, VectorLen::ONE).unwrap().into_mask();
            HostWeights::Masked(w, mask)
        }
    };
    let upload = || device.upload_weights(&host).unwrap();
    let x = Matrix::uniform(problem.n, problem.k, problem.storage, 25).unwrap();
    let (rows, cols) = problem.y_shape();
    // An output that is never written stays NaN, which neither check lets through.
    let nan = Matrix::new(rows, cols, Elements::from_f32(problem.output, &vec![f32::NAN; rows * cols])).unwrap();
    let plan = device.plan(problem).unwrap();

    let (mut calls, mut first, mut set_bytes) = (Vec::new(), None, 1);
    // At most 64: layers too small to fill the caches with that many are measured within them.
    while calls.len() < rotated.div_ceil(set_bytes).clamp(1, 64) {
        let (weights, x) = (upload(), device.upload(&x).unwrap());
        let y = device.upload(&nan).unwrap();
        set_bytes = weights.bytes() + problem.n * problem.k * problem.storage.bytes() + nan.bytes();
        let call =
            device.prepare(&Gemm { plan: &plan, weights: &weights, operands: GemmOperands::new(&x, &y) }).unwrap();
        call.run().unwrap();
        let output = device.read(&y).unwrap();
        calls.push(call);
        match &first {
            Some(first) => assert!(output == *first, "{}: two sets of the same operands differ", plan.kernel_name()),
            None => first = Some(output),
        }
    }
    let oracle = Oracle::new(problem, Operands::new(&host, &x)).unwrap();
    let output = first.unwrap();
    let sample = Sample::Random { features: 64, tokens: 64, seed: 24 };
    let verdict = oracle.verify(&output, sample).unwrap();
    assert!(verdict.passed(), "{}: {verdict}", plan.kernel_name());
    assert!(output.elements().to_f32().iter().all(|y| !y.is_nan()), "{}: not all is written", plan.kernel_name());
    eprintln!("{}: {} sets of operands, {verdict}", plan.kernel_name(), calls.len());
    calls
}
