//! The CPU device: every way at every level of vector instructions against the oracle, threads, and what a call that is
//! repeated allocates. Levels that this processor lacks are named on stderr.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test may panic, and says what it does"
)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use rayon::prelude::*;

use common::{Data, SIZES, check, host_weights, ops, rng, seed};
use sparse24::simd::SimdLevel;
use sparse24::{
    Activation, DType, Device, Epilogue, Form, Gemm, GemmOperands, Matrix, Op, Options, Plan, Problem, VectorLen,
};

fn device(simd: SimdLevel, threads: usize) -> Device {
    Device::open("cpu", Options { simd: Some(simd), threads: Some(threads), ..Options::default() }).unwrap()
}

/// The levels that this processor has.
fn levels() -> impl Iterator<Item = SimdLevel> {
    SimdLevel::ALL.into_iter().filter(|level| {
        if !level.is_supported() {
            eprintln!("skipped: this processor has no {level}");
        }
        level.is_supported()
    })
}

/// Every way of a problem, by the list that the planner chooses from.
fn check_all(device: &Device, problem: &Problem, kinds: &[Data], seed: u64, stream: u64) -> Vec<String> {
    let plans = device.candidates(problem).unwrap();
    plans.iter().for_each(|plan| check(device, plan, kinds, seed, stream));
    plans.iter().map(Plan::schedule).collect()
}

#[test]
fn every_schedule_works_at_every_size_and_type() {
    let seed = seed();
    for level in levels() {
        let device = device(level, 2);
        let mut schedules = Vec::new();
        for (i, (m, n, k)) in SIZES.into_iter().enumerate() {
            for (j, op) in ops().enumerate() {
                for form in [Form::Linear, Form::Gemm] {
                    for storage in [DType::F32, DType::F16] {
                        let epilogue = Epilogue::all().nth((7 * i + 3 * j) % Epilogue::all().count()).unwrap();
                        let output = if i % 2 == 0 { storage } else { DType::F32 };
                        let problem = Problem { op, form, m, n, k, storage, output, epilogue };
                        let kinds = [Data::Whole, Data::Uniform, Data::Edge];
                        schedules.extend(check_all(&device, &problem, &kinds, seed, (100 * i + j) as u64));
                    }
                }
            }
        }
        schedules.sort();
        schedules.dedup();
        assert_eq!(schedules, ["columns", "gather", "gemm_crate", "gemv", "permute", "tile"], "{level}");
    }
}

/// Panels of every number of vectors, alone and beside another; blocks of rows in groups, and what is left of them;
/// steps of k, the last one short.
#[test]
fn every_panel_and_block_works() {
    let seed = seed();
    for level in levels() {
        let device = device(level, 1);
        for (i, v) in [1, 2, 32, 128].into_iter().enumerate() {
            let op = Op::Sparse24(VectorLen::new(v).unwrap());
            for vectors in 1..=14 {
                let problem = Problem::linear(op, 139, vectors * level.lanes() - i % 3, 150, DType::F32);
                check_all(&device, &problem, &[Data::Whole], seed, (100 * i + vectors) as u64);
            }
            for tokens in (1..=17).chain([23, 24, 25, 32]) {
                for (m, storage) in [(520, DType::F16), (4 * 128 + 3 * 128 + 7, DType::F32)] {
                    let problem = Problem { output: DType::F32, ..Problem::linear(op, m, tokens, 150, storage) };
                    check_all(&device, &problem, &[Data::Whole], seed, (100 * i + tokens) as u64);
                }
            }
        }
        for op in [Op::Dense, Op::Masked] {
            for tokens in (1..=13).chain([15, 16, 24, 29, 48]) {
                check_all(&device, &Problem::linear(op, 333, tokens, 150, DType::F32), &[Data::Whole], seed, 7);
            }
            // More features than the sums of a task hold.
            check_all(&device, &Problem::linear(op, 4200, 4, 20, DType::F32), &[Data::Whole], seed, 8);
            check_all(&device, &Problem::linear(op, 2100, 9, 20, DType::F16), &[Data::Whole], seed, 9);
        }
    }
}

/// More activations than are packed at a time, and more weights than are widened at a time.
#[test]
fn what_does_not_fit_into_scratch_is_cut_up() {
    let seed = seed();
    for level in levels() {
        let device = device(level, 2);
        let sparse = Op::Sparse24(VectorLen::ONE);
        check_all(&device, &Problem::linear(sparse, 5, 500, 14337, DType::F32), &[Data::Whole], seed, 1);
        for (op, storage) in [(Op::Masked, DType::F32), (Op::Dense, DType::F16)] {
            for form in [Form::Linear, Form::Gemm] {
                let problem = Problem { form, ..Problem::linear(op, 2100, 11, 777, storage) };
                check_all(&device, &problem, &[Data::Whole], seed, 2);
            }
        }
        check_all(&device, &Problem::linear(Op::Dense, 40, 20, 777, DType::F32), &[Data::Whole], seed, 3);
    }
}

#[test]
fn every_epilogue_works() {
    let seed = seed();
    for level in levels() {
        let device = device(level, 2);
        for op in [Op::Dense, Op::Masked, Op::Sparse24(VectorLen::ONE)] {
            for form in [Form::Linear, Form::Gemm] {
                for (storage, output) in [
                    (DType::F32, DType::F32),
                    (DType::F16, DType::F16),
                    (DType::F16, DType::F32),
                    (DType::F32, DType::F16),
                ] {
                    for (i, epilogue) in Epilogue::all().enumerate() {
                        for n in [3, 35] {
                            let problem = Problem { op, form, m: 37, n, k: 21, storage, output, epilogue };
                            check_all(&device, &problem, &[Data::Uniform], seed, i as u64);
                        }
                    }
                }
            }
        }
    }
}

/// bf16 weights stay as they are and are widened where they are used.
#[test]
fn bf16_weights_take_two_bytes() {
    let seed = seed();
    for level in levels() {
        let device = device(level, 1);
        for op in ops() {
            for n in [1, 40] {
                let problem = Problem::linear(op, 130, n, 70, DType::F32);
                let half = Problem { storage: DType::Bf16, ..problem };
                let weights = host_weights(&half, Data::Uniform, &mut rng(seed, 0));
                for plan in device.candidates(&problem).unwrap() {
                    let mut rng = rng(seed, 1);
                    let verdict = common::verdict_of(&device, &plan, &weights, &weights, Data::Uniform, &mut rng);
                    assert!(verdict.passed(), "{verdict}\n{}", plan.explain());
                }
                let wide = device.upload_weights(&host_weights(&problem, Data::Uniform, &mut rng(seed, 0))).unwrap();
                let weights = device.upload_weights(&weights).unwrap();
                assert_eq!(weights.dtype(), DType::F32);
                assert!(weights.bytes() < wide.bytes() * 2 / 3, "{op}: {} of {}", weights.bytes(), wide.bytes());
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let seed = seed();
    for level in levels() {
        for (i, (m, n, k)) in [(65, 37, 100), (700, 3, 200), (300, 130, 300), (4, 4, 4096)].into_iter().enumerate() {
            let (form, storage) = if i % 2 == 0 { (Form::Linear, DType::F32) } else { (Form::Gemm, DType::F16) };
            let outputs = [1, 2, 3].map(|threads| {
                let device = device(level, threads);
                let run = |op| {
                    let epilogue = Epilogue { activation: Activation::Gelu, ..Epilogue::NONE };
                    let problem = Problem { form, epilogue, ..Problem::linear(op, m, n, k, storage) };
                    let mut rng = rng(seed, 4);
                    let weights = host_weights(&problem, Data::Uniform, &mut rng);
                    let (rows, cols) = problem.x_shape();
                    let x = common::matrix(rows, cols, storage, Data::Uniform, &mut rng);
                    let chosen =
                        (device.plan(&problem).unwrap().schedule(), device.plan_or_dense(&problem).unwrap().schedule());
                    let plans = device.candidates(&problem).unwrap();
                    let outputs = plans.iter().map(|plan| common::run(&device, plan, &weights, &x, None, None));
                    (chosen, outputs.collect::<Vec<_>>())
                };
                ops().map(run).collect::<Vec<_>>()
            });
            assert!(outputs.iter().all(|o| *o == outputs[0]), "{level}, {m}x{n}x{k}");
        }
    }
}

#[test]
fn instructions_that_are_missing_are_refused() {
    let asked =
        SimdLevel::ALL.map(|simd| (simd, Device::open("cpu", Options { simd: Some(simd), ..Options::default() })));
    for (simd, device) in asked {
        match device {
            Ok(_) => assert!(simd.is_supported()),
            Err(e) => assert!(!simd.is_supported() && e.is_unsupported(), "{e}"),
        }
    }
    assert!(Device::open("cpu", Options { threads: Some(0), ..Options::default() }).is_err());
}

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread asks for.
struct Counting;

#[allow(unsafe_code, reason = "an allocator")]
// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    // Without this zeroed memory, of which the device reserves more than it uses, would be written by hand.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the system's.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Once buffers have grown, a call on one thread allocates nothing, whatever the way and the types.
#[test]
fn a_repeated_call_allocates_nothing() {
    let device = device(SimdLevel::Scalar, 1);
    let epilogue = Epilogue { bias: true, residual: true, ..Epilogue::NONE };
    let mut calls = Vec::new();
    for op in [Op::Dense, Op::Masked, Op::Sparse24(VectorLen::ONE), Op::Sparse24(VectorLen::new(32).unwrap())] {
        for (n, storage, output) in
            [(1, DType::F32, DType::F32), (40, DType::F16, DType::F16), (7, DType::F16, DType::F32)]
        {
            let problem = Problem { output, epilogue, ..Problem::linear(op, 150, n, 100, storage) };
            let mut rng = rng(1, 1);
            let mut tensor =
                |rows, cols, dtype| device.upload(&common::matrix(rows, cols, dtype, Data::Uniform, &mut rng)).unwrap();
            let (x, bias, residual) = (tensor(n, 100, storage), tensor(1, 150, DType::F32), tensor(n, 150, output));
            let y = device.zeros(n, 150, output).unwrap();
            let weights =
                device.upload_weights(&host_weights(&problem, Data::Uniform, &mut common::rng(1, 2))).unwrap();
            let operands = GemmOperands::new(&x, &y).bias(&bias).residual(&residual);
            for plan in device.candidates(&problem).unwrap() {
                // The crate's own buffers are its own affair.
                if plan.schedule() != "gemm_crate" {
                    calls.push(device.prepare(&Gemm { plan: &plan, weights: &weights, operands }).unwrap());
                }
            }
        }
    }
    assert!(calls.len() >= 10);
    let round = || calls.iter().for_each(|call| call.run().unwrap());
    round();
    round();
    let before = ALLOCATIONS.get();
    round();
    assert_eq!(ALLOCATIONS.get() - before, 0);
}

/// Calls that read each other's outputs, a tensor that is read twice, and writers between them: nothing waits for ever.
#[test]
fn calls_on_the_cpu_run_in_turn() {
    let device = Device::cpu().unwrap();
    let epilogue = Epilogue { residual: true, ..Epilogue::NONE };
    let problem = Problem { epilogue, ..Problem::linear(Op::Dense, 8, 8, 8, DType::F32) };
    let plan = device.plan(&problem).unwrap();
    let mut rng = rng(seed(), 7);
    let weights = device.upload_weights(&host_weights(&problem, Data::Whole, &mut rng)).unwrap();
    let zeros = Matrix::zeros(8, 8, DType::F32).unwrap();
    let (a, b) = (device.upload(&zeros).unwrap(), device.upload(&zeros).unwrap());
    // The ordinary residual connection: X is added to the output.
    let call = |x, y| {
        device.prepare(&Gemm { plan: &plan, weights: &weights, operands: GemmOperands::new(x, y).residual(x) }).unwrap()
    };
    let (there, back) = (call(&a, &b), call(&b, &a));
    let (done, finished) = std::sync::mpsc::channel();
    let workers = [
        std::thread::spawn({
            let (there, done) = (there.clone(), done.clone());
            move || {
                (0..500).for_each(|_| there.run().unwrap());
                done.send(()).unwrap();
            }
        }),
        std::thread::spawn({
            let done = done.clone();
            move || {
                (0..500).for_each(|_| back.run().unwrap());
                done.send(()).unwrap();
            }
        }),
        std::thread::spawn({
            let (device, a, zeros, done) = (device.clone(), a.clone(), zeros.clone(), done.clone());
            move || {
                (0..500).for_each(|_| device.write(&a, &zeros).unwrap());
                done.send(()).unwrap();
            }
        }),
        // From the workers of another thread pool, too.
        std::thread::spawn(move || {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            pool.install(|| (0..200).into_par_iter().for_each(|_| there.run().unwrap()));
            done.send(()).unwrap();
        }),
    ];
    for _ in &workers {
        finished.recv_timeout(std::time::Duration::from_secs(60)).expect("a call waits for ever");
    }
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}
