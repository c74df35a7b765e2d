//! Every kernel against the oracle, on a GPU, and what both devices must do alike.
//!
//! Tests that need a GPU are ignored unless asked for (`-- --include-ignored`). They iterate [`Kernel::all`], the list
//! that the planner chooses from. A pipeline costs a software driver a third of a second, and the list has thousands:
//! by default each operation, schedule and storage type runs once or twice, with forms, output types and epilogues that
//! rotate so that each test meets all of them. SPARSE24_TEST_ALL=1 runs the whole list, for machines with a real GPU;
//! with SPARSE24_TEST_SECONDS in an order drawn from the seed, until the time is up.
#![allow(clippy::expect_used, reason = "a test may panic")]

mod grad;

use std::collections::HashSet;

use rand_pcg::rand_core::Rng;
use sparse24::kernels::{Caps, CoopUnit, Kernel, Schedule};
use sparse24::reference::{Operands, Oracle, Sample};
use sparse24::{
    DType, Device, Elements, Epilogue, Form, HostWeights, Matrix, Op, Options, Plan, Problem, Sparse24, VectorLen,
};

use crate::common::{self, Data, SIZES, check, gpu, host_weights, ops, rng, seed, verdict_of};

fn f16_too(device: &Device) -> &'static [DType] {
    match device.caps() {
        Some(caps) if !caps.f16 => &[DType::F32],
        _ => &[DType::F32, DType::F16],
    }
}

/// The problem on which a kernel is tested: a tile and a ragged rest each way, three words of k with a ragged group at
/// the end.
fn problem_of(kernel: &Kernel) -> Problem {
    let (m, n) = kernel.schedule().tile();
    Problem {
        op: kernel.op(),
        form: kernel.form(),
        m: m as usize + 3,
        n: n as usize + 1,
        k: 70,
        storage: kernel.storage(),
        output: kernel.output(),
        epilogue: kernel.epilogue(),
    }
}

/// One kernel of each schedule and storage type of some operations, or all of them.
fn some_kernels(caps: &Caps, wanted: impl Fn(Op) -> bool) -> Vec<Kernel> {
    let all = Kernel::all().filter(|k| wanted(k.op()) && k.supported_by(caps).is_ok());
    if std::env::var_os("SPARSE24_TEST_ALL").is_some() {
        return all.collect();
    }
    let mut modules: Vec<(Kernel, Vec<Kernel>)> = Vec::new();
    for kernel in all {
        let same = |other: &Kernel| {
            (other.op(), other.schedule(), other.storage()) == (kernel.op(), kernel.schedule(), kernel.storage())
        };
        match modules.iter_mut().find(|(first, _)| same(first)) {
            Some((_, variants)) => variants.push(kernel),
            None => modules.push((kernel, vec![kernel])),
        }
    }
    // 13 has no common factor with 24, 48 or 96: as many runs in turn meet all epilogues, forms and output types.
    let runs = Epilogue::all().count().div_ceil(modules.len());
    let picked = modules
        .iter()
        .enumerate()
        .flat_map(|(i, (_, variants))| (0..runs).map(move |run| variants[(runs * i + run) * 13 % variants.len()]));
    picked.collect()
}

/// Runs the kernels of some operations.
fn kernels_agree_with_the_oracle(wanted: impl Fn(Op) -> bool) {
    let Some(device) = gpu() else { return };
    let (seed, caps) = (seed(), device.caps().unwrap());
    let mut kernels = some_kernels(caps, wanted);
    let seconds: Option<u64> = std::env::var("SPARSE24_TEST_SECONDS").ok().map(|s| s.parse().unwrap());
    if seconds.is_some() {
        let mut rng = rng(seed, 8);
        for i in (1..kernels.len()).rev() {
            kernels.swap(i, rng.next_u32() as usize % (i + 1));
        }
    }
    let started = std::time::Instant::now();
    let (mut ran, mut met) = (0, HashSet::new());
    for kernel in &kernels {
        if seconds.is_some_and(|s| started.elapsed().as_secs() >= s) {
            break;
        }
        met.insert(kernel.epilogue());
        let plan = Plan::gpu_with(&problem_of(kernel), caps, kernel.schedule(), 1).unwrap();
        check(&device, &plan, &[Data::Whole, Data::Uniform], seed, ran);
        ran += 1;
    }
    eprintln!("{ran} of {} kernels ran", kernels.len());
    assert!(seconds.is_some() || met.len() == Epilogue::all().count(), "not every epilogue has run");
}

// Several tests, because tests run in parallel and compiling is what takes the time.

#[test]
#[ignore = "needs a GPU"]
fn dense_kernels_agree_with_the_oracle() {
    kernels_agree_with_the_oracle(|op| op == Op::Dense);
}

#[test]
#[ignore = "needs a GPU"]
fn masked_kernels_agree_with_the_oracle() {
    kernels_agree_with_the_oracle(|op| matches!(op, Op::Masked | Op::Masked24));
}

#[test]
#[ignore = "needs a GPU"]
fn sparse24_kernels_with_short_vectors_agree_with_the_oracle() {
    kernels_agree_with_the_oracle(|op| op.vector().is_some_and(|v| v.get() <= 4));
}

#[test]
#[ignore = "needs a GPU"]
fn sparse24_kernels_with_long_vectors_agree_with_the_oracle() {
    kernels_agree_with_the_oracle(|op| op.vector().is_some_and(|v| v.get() > 4));
}

/// The kernels of cooperative matrices that a device runs: every tile of some operations, with forms, outputs and
/// epilogues in rotation, each with one split of k and the first `split` of them with two.
fn cooperative_kernels_agree(device: &Device, wanted: impl Fn(Op) -> bool, split: usize) {
    let (seed, caps) = (seed(), device.caps().unwrap());
    let (mut ran, mut met) = (0, HashSet::new());
    for op in ops().filter(|&op| wanted(op)) {
        for schedule in
            Schedule::of(op, DType::F16).into_iter().filter(|schedule| matches!(schedule, Schedule::Coop(_)))
        {
            let epilogue = Epilogue::all().nth(ran * 13 % Epilogue::all().count()).unwrap();
            let output = if ran % 2 == 0 { DType::F16 } else { DType::F32 };
            let form = if ran % 4 < 2 { Form::Linear } else { Form::Gemm };
            let (m, n) = schedule.tile();
            let (m, n) = (m as usize + 3, n as usize + 1);
            let problem = Problem { form, output, epilogue, ..Problem::linear(op, m, n, 90, DType::F16) };
            // Two splits of three words: one of two steps, one of a single one.
            for splits in [1, 2].into_iter().take(if ran < split { 2 } else { 1 }) {
                let plan = match Plan::gpu_with(&problem, caps, schedule, splits) {
                    Ok(plan) => plan,
                    // A device has one unit of cooperative matrices.
                    Err(lack) if lack.to_string().contains("in subgroups of") => break,
                    Err(lack) => {
                        eprintln!("skipped: {op}: {lack}");
                        break;
                    }
                };
                check(device, &plan, &[Data::Whole, Data::Uniform], seed, ran as u64);
                met.insert(op);
                ran += usize::from(splits == 1);
            }
        }
    }
    eprintln!("{ran} kernels of cooperative matrices ran");
    assert_eq!(met.len(), ops().filter(|&op| wanted(op)).count(), "an operation had no tile that fits");
}

/// Kernels of cooperative matrices, with those emulated in plain WGSL, for every unit: every index they compute is
/// their own. Tiles are held as vectors.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_kernels_agree_with_the_oracle_when_emulated() {
    cooperative_kernels_agree_when_emulated(false, |_| true);
}

/// The same with tiles held as scalars: one operation of each kind of stash.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_kernels_on_scalars_agree_with_the_oracle_when_emulated() {
    cooperative_kernels_agree_when_emulated(true, one_of_each_kind);
}

/// Dense weights, masks, expanded codes, and activations gathered by several patterns.
fn one_of_each_kind(op: Op) -> bool {
    match op {
        Op::Dense | Op::Masked => true,
        Op::Masked24 => false,
        Op::Sparse24(v) => matches!(v.get(), 1 | 32),
    }
}

fn cooperative_kernels_agree_when_emulated(scalars: bool, wanted: impl Fn(Op) -> bool) {
    let Some(device) = gpu() else { return };
    if !device.caps().unwrap().f16 {
        eprintln!("skipped: no f16");
        return;
    }
    for unit in CoopUnit::ALL {
        // Rolled: four times as many kernels as one device runs, and what is tested is their arithmetic.
        let options = Options {
            emulate_cooperative: Some(unit),
            cooperative_scalars: Some(scalars),
            unroll: Some(false),
            ..Options::default()
        };
        let device = Device::open(device.info().name(), options).unwrap();
        cooperative_kernels_agree(&device, &wanted, 3);
    }
}

/// A device whose cooperative matrices have passed the check. `None`, with a word on stderr, where there is none,
/// unless SPARSE24_REQUIRE_COOPERATIVE is set: then that is a failure.
fn cooperative(scalars: bool) -> Option<Device> {
    let device = gpu()?;
    let caps = device.caps().unwrap();
    let Some(lanes) = caps.cooperative_lanes else {
        let required = std::env::var_os("SPARSE24_REQUIRE_COOPERATIVE").is_some();
        assert!(!required, "cooperative matrices are required: {:?}", caps.cooperative_refused);
        eprintln!("skipped: no cooperative matrices");
        return None;
    };
    eprintln!("subgroups of {lanes}");
    // Rolled on a processor: llvmpipe takes up to a minute to compile such a kernel unrolled, some seconds as it
    // stands.
    let unroll = (lanes == 8).then_some(false);
    let options = Options { cooperative_scalars: Some(scalars), unroll, ..Options::default() };
    Some(Device::open(device.info().name(), options).unwrap())
}

// Several tests, because tests run in parallel and compiling is what takes the time.

/// Kernels of cooperative matrices on a device that has them: every tile of the operations that multiply over all of k.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_kernels_over_all_of_k_agree_with_the_oracle() {
    let Some(device) = cooperative(false) else { return };
    cooperative_kernels_agree(&device, |op| op.vector().is_none_or(|v| v.get() < 16), 2);
}

/// The same of those that gather activations.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_kernels_that_gather_agree_with_the_oracle() {
    let Some(device) = cooperative(false) else { return };
    cooperative_kernels_agree(&device, |op| op.vector().is_some_and(|v| v.get() >= 16), 2);
}

/// Tiles held as scalars, as Metal wants them, by the instructions of a device that takes both.
#[test]
#[ignore = "needs a GPU"]
fn cooperative_kernels_on_scalars_agree_with_the_oracle() {
    let Some(device) = cooperative(true) else { return };
    cooperative_kernels_agree(&device, one_of_each_kind, 0);
}

/// Splits of k leave sums in scratch, and the epilogue to a second dispatch.
#[test]
#[ignore = "needs a GPU"]
fn splits_of_k_agree_with_the_oracle() {
    let Some(device) = gpu() else { return };
    let (seed, caps) = (seed(), device.caps().unwrap());
    let mut met = HashSet::new();
    for (i, op) in [Op::Dense, Op::Masked, Op::Sparse24(VectorLen::ONE)].into_iter().enumerate() {
        for (j, schedule) in Schedule::of(op, DType::F32).into_iter().enumerate() {
            let storages = f16_too(&device);
            let (storage, output) = (storages[j % storages.len()], storages[(i + j) % storages.len()]);
            let epilogue = Epilogue::all().nth((i * 11 + j * 13) % Epilogue::all().count()).unwrap();
            let form = if j % 2 == 0 { Form::Linear } else { Form::Gemm };
            let problem = Problem { op, form, m: 45, n: 19, k: 300, storage, output, epilogue };
            // 300 is 10 words: 2 and 4 splits of 5 and 3 words, the last of which is short.
            for splits in [2, 4] {
                let Ok(plan) = Plan::gpu_with(&problem, caps, schedule, splits) else { continue };
                assert!(plan.kernel_name().ends_with(&format!("-split{splits}")), "{}", plan.kernel_name());
                check(&device, &plan, &[Data::Whole, Data::Uniform], seed, (10 * i + j) as u64);
                met.insert(schedule);
            }
        }
    }
    assert!(met.len() >= 10, "only {} schedules were split", met.len());
}

/// Computes a plan's problem on whole numbers and checks a sample of it, and that all of it was written.
fn check_sample(device: &Device, problem: &Problem, cut: &str, seed: u64) {
    let plan = device.plan(problem).unwrap();
    assert!(plan.explain().contains(cut), "{}", plan.explain());
    let mut rng = rng(seed, 9);
    let weights = host_weights(problem, Data::Whole, &mut rng);
    let x = common::matrix(problem.n, problem.k, DType::F32, Data::Whole, &mut rng);
    let y = common::run(device, &plan, &weights, &x, None, None);
    let operands = Operands::new(&weights, &x);
    let sample = Sample::Random { features: 300, tokens: 300, seed };
    let verdict = Oracle::new(problem, operands).unwrap().verify(&y, sample).unwrap();
    assert!(verdict.passed(), "{verdict}\n{}", plan.explain());
    assert!(y.elements().to_f32().iter().all(|y| !y.is_nan()), "an output was never written");
}

/// Matrices beyond one binding: weights in pieces, and X and Y by tokens. The device's bindings are made small, so that
/// the matrices need not be large.
#[test]
#[ignore = "needs a GPU"]
fn matrices_larger_than_a_binding_are_cut_up() {
    let Some(under_test) = gpu() else { return };
    let limits = |own: wgpu::Limits| wgpu::Limits { max_storage_buffer_binding_size: 1 << 20, ..own };
    let (wgpu_device, queue) = common::callers_device(&under_test, wgpu::Features::empty(), limits);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let seed = seed();
    let v16 = Op::Sparse24(VectorLen::new(16).unwrap());
    // 1200 rows of 256 f32 are 1.17 bindings, and so are as many of 512 of which half is kept.
    for (op, m, n, k, cut) in [
        (Op::Dense, 1200, 3, 256, "weights in 2 pieces, tokens in 1"),
        (Op::Masked, 1200, 2, 250, "weights in 2 pieces, tokens in 1"),
        (Op::Masked24, 1200, 2, 256, "weights in 2 pieces, tokens in 1"),
        (v16, 1200, 33, 512, "weights in 2 pieces, tokens in 1"),
        (Op::Dense, 5, 1200, 256, "weights in 1 pieces, tokens in 2"),
        (Op::Sparse24(VectorLen::ONE), 1200, 1200, 512, "weights in 2 pieces, tokens in"),
    ] {
        check_sample(&device, &Problem::linear(op, m, n, k, DType::F32), cut, seed);
    }
}

/// The same with the device's own limit, where that is as small as llvmpipe's 128 MiB.
#[test]
#[ignore = "needs a GPU"]
fn weights_larger_than_the_largest_binding_are_cut_up() {
    let Some(device) = gpu() else { return };
    let bytes = device.caps().unwrap().binding_bytes;
    if bytes > 1 << 28 {
        eprintln!("skipped: bindings of {bytes} bytes would take too long to fill");
        return;
    }
    let rows = (bytes / 4 / 1024 + 600) as usize;
    check_sample(&device, &Problem::linear(Op::Dense, rows, 3, 1024, DType::F32), "weights in 2 pieces", seed());
}

#[test]
#[ignore = "needs a GPU"]
fn every_size_works_on_the_gpu() {
    let Some(device) = gpu() else { return };
    let seed = seed();
    for (i, (m, n, k)) in SIZES.into_iter().enumerate() {
        for (j, op) in ops().enumerate() {
            for form in [Form::Linear, Form::Gemm] {
                let problem = Problem { form, ..Problem::linear(op, m, n, k, DType::F32) };
                let plan = device.plan(&problem).unwrap();
                check(&device, &plan, &[Data::Whole, Data::Edge], seed, (100 * i + j) as u64);
            }
        }
    }
}

on_both_devices!(bert_layers_agree_with_the_oracle);

fn bert_layers_agree_with_the_oracle(device: &Device) {
    let seed = seed();
    for (m, k) in [(768, 768), (768, 3072), (3072, 768)] {
        for op in [Op::Dense, Op::Masked, Op::Sparse24(VectorLen::ONE), Op::Sparse24(VectorLen::new(32).unwrap())] {
            for &storage in f16_too(device) {
                let plan = device.plan(&Problem::linear(op, m, 5, k, storage)).unwrap();
                check(device, &plan, &[Data::Whole], seed, (m + k) as u64);
            }
        }
    }
}

on_both_devices!(bf16_weights_are_widened);

fn bf16_weights_are_widened(device: &Device) {
    let seed = seed();
    for op in ops() {
        let problem = Problem::linear(op, 33, 9, 52, DType::F32);
        let plan = device.plan(&problem).unwrap();
        let mut rng = rng(seed, 0);
        let half = Problem { storage: DType::Bf16, ..problem };
        let weights = host_weights(&half, Data::Uniform, &mut rng);
        let verdict = verdict_of(device, &plan, &weights, &weights, Data::Uniform, &mut rng);
        assert!(verdict.passed(), "{verdict}\n{}", plan.explain());
    }
}

on_both_devices!(one_corrupted_bit_of_the_weights_is_seen);

/// The check itself: a single wrong code, value or mask bit on the device is seen.
fn one_corrupted_bit_of_the_weights_is_seen(device: &Device) {
    let seed = seed();
    let problem = |op| Problem::linear(op, 40, 12, 3072, DType::F32);
    let fails = |op, uploaded: &HostWeights, told: &HostWeights, what: &str| {
        let plan = device.plan(&problem(op)).unwrap();
        let mut rng = rng(seed, 1);
        assert!(verdict_of(device, &plan, told, told, Data::Whole, &mut rng).passed());
        let verdict = verdict_of(device, &plan, uploaded, told, Data::Whole, &mut rng);
        assert!(!verdict.passed(), "a corrupted {what} passed on {}: {verdict}", device.info().name());
    };
    for v in VectorLen::ALL {
        let op = Op::Sparse24(v);
        let told = host_weights(&problem(op), Data::Whole, &mut rng(seed, 2));
        let HostWeights::Sparse24(w) = &told else { unreachable!() };
        // The first group whose first value is not zero: what is corrupted must be multiplied by something.
        let group = (0..w.k() / 4).find(|g| w.values().get(2 * g) != 0.0).unwrap();
        let (word, shift) = (group / 8, 4 * (group % 8));

        let mut meta = w.meta().to_vec();
        let code = meta[word] >> shift & 0xf;
        // Another legal code with another first position.
        let other = if code & 3 == 0 { 0x9 } else { 0x8 };
        meta[word] ^= (code ^ other) << shift;
        let changed = Sparse24::from_parts(w.m(), w.k(), v, w.values().clone(), meta).unwrap();
        fails(op, &HostWeights::Sparse24(changed), &told, "code");

        let Elements::F32(mut values) = w.values().clone() else { unreachable!() };
        values[2 * group] = f32::from_bits(values[2 * group].to_bits() ^ 1 << 22);
        let changed = Sparse24::from_parts(w.m(), w.k(), v, Elements::F32(values), w.meta().to_vec()).unwrap();
        fails(op, &HostWeights::Sparse24(changed), &told, "value");
    }
    let told = host_weights(&problem(Op::Masked), Data::Whole, &mut rng(seed, 3));
    let HostWeights::Masked(w, mask) = &told else { unreachable!() };
    let at = (0..w.cols()).find(|&c| w.get(7, c) != 0.0).unwrap();
    let mut words = mask.words().to_vec();
    words[7 * mask.words_per_row() + at / 32] ^= 1 << (at % 32);
    let changed = sparse24::Mask::new(mask.rows(), mask.cols(), words).unwrap();
    fails(Op::Masked, &HostWeights::Masked(w.clone(), changed), &told, "mask bit");
}

#[test]
#[ignore = "needs a GPU"]
fn ways_of_one_operation_give_the_same_sums_for_whole_numbers() {
    let Some(device) = gpu() else { return };
    let (seed, caps) = (seed(), device.caps().unwrap());
    for op in [Op::Dense, Op::Masked, Op::Masked24, Op::Sparse24(VectorLen::ONE)] {
        let problem = Problem::linear(op, 100, 70, 132, DType::F32);
        let mut rng = rng(seed, 5);
        let weights = host_weights(&problem, Data::Whole, &mut rng);
        let x = common::matrix(70, 132, DType::F32, Data::Whole, &mut rng);
        let outputs: Vec<_> = Plan::gpu_candidates(&problem, caps)
            .iter()
            .map(|plan| (plan.schedule(), common::run(&device, plan, &weights, &x, None, None)))
            .collect();
        assert!(outputs.len() >= 7, "only {} plans", outputs.len());
        for (schedule, output) in &outputs {
            assert!(*output == outputs[0].1, "{op}: {schedule} differs from {}", outputs[0].0);
        }
        // Without k every schedule is left with the epilogue.
        for plan in Plan::gpu_candidates(&Problem::linear(op, 3, 4, 0, DType::F32), caps) {
            check(&device, &plan, &[Data::Whole], seed, 10);
        }
    }
}

on_both_devices!(an_infinite_row_stays_in_its_own_outputs);

/// Reading past the end of a row finds the next one, and a product with a zero hides that, unless it is infinite.
fn an_infinite_row_stays_in_its_own_outputs(device: &Device) {
    let seed = seed();
    for (op, form) in ops().flat_map(|op| [(op, Form::Linear), (op, Form::Gemm)]) {
        let (m, n, k) = (67, 35, 70);
        let problem = Problem { form, ..Problem::linear(op, m, n, k, DType::F32) };
        let plan = device.plan(&problem).unwrap();
        // Token 1 and feature 3 are infinite, or zero.
        let output = |infinite: bool| {
            let fill = if infinite { f32::INFINITY } else { 0.0 };
            let mut rng = rng(seed, 6);
            let weights = match host_weights(&problem, Data::Whole, &mut rng) {
                HostWeights::Dense(w) => HostWeights::Dense(with_row(&w, 3, fill)),
                HostWeights::Masked(w, mask) => HostWeights::Masked(with_row(&w, 3, fill), mask),
                HostWeights::Masked24(w, mask) => HostWeights::Masked24(with_row(&w, 3, fill), mask),
                HostWeights::Sparse24(w) => {
                    let (m, k, vector, values, meta) = w.into_parts();
                    // The last group's two columns past k stay zero, as the format demands.
                    let values = Matrix::new(m, k.div_ceil(4) * 2, values).unwrap();
                    let values = with_row_up_to(&values, 3, fill, 2 * (k / 4));
                    let values = values.elements().clone();
                    HostWeights::Sparse24(Sparse24::from_parts(m, k, vector, values, meta).unwrap())
                }
            };
            let (rows, cols) = problem.x_shape();
            let x = common::matrix(rows, cols, DType::F32, Data::Whole, &mut rng).to_array();
            let token = |r: usize, c: usize| if form == Form::Linear { r } else { c };
            let x: Vec<f32> = x.indexed_iter().map(|((r, c), &v)| if token(r, c) == 1 { fill } else { v }).collect();
            let x = Matrix::from_f32(rows, cols, &x).unwrap();
            common::run(device, &plan, &weights, &x, None, None).to_array()
        };
        let (infinite, finite) = (output(true), output(false));
        for ((r, c), &value) in infinite.indexed_iter() {
            let (token, feature) = if form == Form::Linear { (r, c) } else { (c, r) };
            if token != 1 && feature != 3 {
                let expected = finite[(r, c)];
                assert_eq!(value, expected, "token {token}, feature {feature}\n{}", plan.explain());
            }
        }
    }
}

fn with_row(w: &Matrix, row: usize, fill: f32) -> Matrix {
    with_row_up_to(w, row, fill, w.cols())
}

fn with_row_up_to(w: &Matrix, row: usize, fill: f32, cols: usize) -> Matrix {
    let filled = |((r, c), &v): ((usize, usize), &f32)| if r == row && c < cols { fill } else { v };
    let values: Vec<f32> = w.to_array().indexed_iter().map(filled).collect();
    Matrix::from_f32(w.rows(), w.cols(), &values).unwrap()
}
