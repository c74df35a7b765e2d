//! The device itself: choice, ownership, recording into a caller's encoder, limits and loss. Needs a GPU, so ignored
//! unless asked for (`-- --include-ignored`).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Data, allocated, callers_device, gpu, host_weights, matrix, rng, seed, submissions};
use sparse24::engine::Clock;
use sparse24::kernels::ShaderChecks;
use sparse24::plan::{Algorithm, Tuned};
use sparse24::reference::{Operands, Oracle, Sample};
use sparse24::{
    DType, Device, Elements, Epilogue, Error, Form, Gemm, GemmOperands, HostWeights, Matrix, Op, Options, Problem,
    Tensor, Tuning, VectorLen, Weights,
};

const OP: Op = Op::Sparse24(VectorLen::ONE);

fn storage_buffer(device: &wgpu::Device, bytes: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    })
}

struct Layer {
    problem: Problem,
    host: HostWeights,
    weights: Weights,
    x: Matrix,
}

impl Layer {
    fn new(device: &Device, op: Op, seed: u64) -> Self {
        let problem = Problem::linear(op, 70, 20, 100, DType::F32);
        let mut rng = rng(seed, 0);
        let host = host_weights(&problem, Data::Whole, &mut rng);
        let weights = device.upload_weights(&host).unwrap();
        let x = matrix(20, 100, DType::F32, Data::Whole, &mut rng);
        Self { problem, host, weights, x }
    }

    fn expect(&self, y: &Matrix) {
        let operands = Operands::new(&self.host, &self.x);
        let verdict = Oracle::new(&self.problem, operands).unwrap().verify(y, Sample::All).unwrap();
        assert!(verdict.passed(), "{verdict}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_device_under_test_is_listed_and_found_by_part_of_its_name() {
    let Some(device) = gpu() else { return };
    let name = device.info().name().to_owned();
    assert!(Device::adapters().iter().any(|a| a.name == name));
    let part = name.split(' ').next().unwrap().to_uppercase();
    assert_eq!(Device::gpu(&part).unwrap().info().name(), name);
    let unknown = Device::gpu("no such thing").unwrap_err();
    let text = unknown.to_string();
    let (_, available) = text.split_once("there are: ").unwrap();
    assert!(
        unknown.is_unknown_device() && available.contains(&name) && available.split(", ").any(|a| a == "cpu"),
        "{text}"
    );
    assert!(Device::gpu("cpu").is_err_and(|e| e.is_unknown_device()));
}

#[test]
#[ignore = "needs a GPU"]
fn calls_are_recorded_into_the_callers_encoder_on_the_callers_buffers() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue.clone()).unwrap();
    let layer = Layer::new(&device, OP, seed());
    let (n, m, k) = (layer.problem.n, layer.problem.m, layer.problem.k);
    // Longer than the operands: a caller's arena.
    let (x, y) = (storage_buffer(&wgpu_device, 65536), storage_buffer(&wgpu_device, 65536));
    queue.write_buffer(&x, 0, layer.x.elements().as_bytes());
    let tensor = |buffer: &wgpu::Buffer, cols| Tensor::from_buffer(&device, buffer.clone(), n, cols, DType::F32);
    let (tx, ty) = (tensor(&x, k).unwrap(), tensor(&y, m).unwrap());
    let plan = device.plan(&layer.problem).unwrap();
    let operands = GemmOperands::new(&tx, &ty);
    let call = device.prepare(&Gemm { plan: &plan, weights: &layer.weights, operands }).unwrap();

    let mut encoder = wgpu_device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    call.on_gpu().unwrap().record(&mut encoder);
    // Nothing was submitted behind the caller's back.
    assert_eq!(device.read(&ty).unwrap(), Matrix::zeros(n, m, DType::F32).unwrap());
    queue.submit([encoder.finish()]);
    layer.expect(&device.read(&ty).unwrap());

    assert!(tensor(&x, 1 << 20).is_err_and(|e| e.to_string().starts_with("buffer holds 65536 bytes, a tensor of")));
    let uniform = wgpu_device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 65536,
        usage: wgpu::BufferUsages::UNIFORM,
        mapped_at_creation: false,
    });
    assert!(tensor(&uniform, k).unwrap_err().to_string().contains("STORAGE"));
}

/// wgpu's default descriptor asks for less than kernels need: what that costs is said. [`Device::descriptor`] costs
/// nothing but cooperative matrices, whose shapes no device tells.
#[test]
#[ignore = "needs a GPU"]
fn what_a_callers_device_lacks_is_said() {
    let Some(under_test) = gpu() else { return };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    let adapter = adapters.into_iter().find(|a| a.get_info().name == under_test.info().name()).unwrap();
    let open = |descriptor: &wgpu::DeviceDescriptor<'_>| {
        let (device, queue) = pollster::block_on(adapter.request_device(descriptor)).unwrap();
        Device::from_wgpu(device, queue).unwrap()
    };
    let refused = |device: &Device| {
        let cooperative = |lack: &str| lack.contains("cooperative");
        device.refused().into_iter().filter(|(lack, _)| !cooperative(lack)).collect::<Vec<_>>()
    };
    assert_eq!(refused(&open(&Device::descriptor(&adapter))), refused(&under_test));
    let default = open(&wgpu::DeviceDescriptor::default());
    let lacks = default.refused();
    let kernels = |what: &str| lacks.iter().filter(|(lack, _)| lack.contains(what)).map(|(_, n)| n).sum::<usize>();
    assert!(kernels("f16 in shaders") > 100, "{lacks:?}");
    assert!(kernels("workgroup memory (it has 16384)") > 50, "{lacks:?}");
    assert!(lacks.is_sorted_by_key(|&(_, kernels)| std::cmp::Reverse(kernels)), "{lacks:?}");
    let explained = default.plan(&Problem::linear(Op::Dense, 512, 512, 512, DType::F32)).unwrap().explain();
    assert!(explained.contains("needs"), "{explained}");
    assert!(Device::cpu().unwrap().refused().is_empty());
}

#[test]
#[ignore = "needs a GPU"]
fn f16_without_the_feature_is_refused_by_name() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device, queue).unwrap();
    let problem = Problem::linear(OP, 8, 8, 8, DType::F16);
    let error = device.plan(&problem).unwrap_err().to_string();
    assert!(error.contains("f16"), "{error}");
    // A plan made for other capabilities is refused when it is to be compiled.
    let caps = sparse24::kernels::Caps { f16: true, ..device.caps().unwrap().clone() };
    let plan = sparse24::Plan::gpu(&problem, &caps, &sparse24::Tuning::default());
    let weights = device.upload_weights(&host_weights(&problem, Data::Whole, &mut rng(1, 0))).unwrap();
    let (x, y) = (device.zeros(8, 8, DType::F16).unwrap(), device.zeros(8, 8, DType::F16).unwrap());
    let operands = GemmOperands::new(&x, &y);
    let error = device.prepare(&Gemm { plan: &plan.unwrap(), weights: &weights, operands }).unwrap_err();
    assert!(error.is_unsupported(), "{error}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_lost_device_is_an_error_and_no_panic() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue).unwrap();
    let layer = Layer::new(&device, OP, seed());
    let (x, y) = (device.upload(&layer.x).unwrap(), device.zeros(20, 70, DType::F32).unwrap());
    let plan = device.plan(&layer.problem).unwrap();
    let call =
        device.prepare(&Gemm { plan: &plan, weights: &layer.weights, operands: GemmOperands::new(&x, &y) }).unwrap();
    call.run().unwrap();
    wgpu_device.destroy();
    // A submission to a lost device is dropped; only what depends on its result can tell.
    let _ = call.run();
    let lost = |error: Option<Error>| assert!(error.as_ref().is_some_and(Error::is_device_lost), "{error:?}");
    lost(device.read(&y).err());
    lost(device.upload(&layer.x).err());
    lost(device.zeros(4, 4, DType::F32).err());
    lost(device.prepare(&Gemm { plan: &plan, weights: &layer.weights, operands: GemmOperands::new(&x, &y) }).err());
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_too_large_is_refused_before_it_is_allocated() {
    let Some(device) = gpu() else { return };
    let caps = device.caps().unwrap();
    let rows = (caps.buffer_bytes / 4096 + 1) as usize;
    let error = device.zeros(rows, 1024, DType::F32).unwrap_err();
    assert!(error.is_too_large(), "{error}");
    let error = device.zeros(usize::MAX, 2, DType::F32).unwrap_err();
    assert!(error.is_too_large() && error.to_string().contains("overflows"), "{error}");
    // Weights are cut by rows, and X by tokens, but the columns of B do not come apart.
    let n = (caps.binding_bytes / 4 / 1024 + 1) as usize;
    let plain = Problem { form: Form::Gemm, ..Problem::linear(Op::Dense, 8, n, 1024, DType::F32) };
    let error = device.plan(&plain).unwrap_err();
    assert!(error.is_too_large() && error.to_string().starts_with("binding of packed x "), "{error}");
    let k = (caps.binding_bytes / 4 / 128 + 32) as usize;
    let error = device.plan(&Problem::linear(Op::Dense, 1024, 1, k, DType::F32)).unwrap_err();
    assert!(error.to_string().contains("128 rows of weights"), "{error}");
}

#[test]
#[ignore = "needs a GPU"]
fn operands_that_do_not_fit_are_refused_by_name() {
    let Some(device) = gpu() else { return };
    let layer = Layer::new(&device, OP, 7);
    let plan = device.plan(&layer.problem).unwrap();
    let (x, y) = (device.upload(&layer.x).unwrap(), device.zeros(20, 70, DType::F32).unwrap());
    let refused = |weights: &Weights, x: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>, y: &Tensor| {
        device
            .prepare(&Gemm { plan: &plan, weights, operands: GemmOperands { x, bias, residual, y } })
            .unwrap_err()
            .to_string()
    };
    let short = device.zeros(20, 96, DType::F32).unwrap();
    assert!(refused(&layer.weights, &short, None, None, &y).starts_with("x has shape [20, 96], expected [20, 100]"));
    assert!(refused(&layer.weights, &x, None, None, &x).starts_with("y has shape"));
    assert!(refused(&layer.weights, &x, Some(&y), None, &y).contains("bias"));
    let dense = Layer::new(&device, Op::Dense, 7);
    assert!(refused(&dense.weights, &x, None, None, &y).contains("Dense"));
    let wider = Layer::new(&device, Op::Sparse24(VectorLen::new(4).unwrap()), 7);
    assert!(refused(&wider.weights, &x, None, None, &y).contains("weights was made for"));

    let cpu = Device::cpu().unwrap();
    let elsewhere = cpu.upload(&layer.x).unwrap();
    assert!(refused(&layer.weights, &elsewhere, None, None, &y).contains("another device"));
    assert!(device.read(&elsewhere).is_err_and(|e| e.is_mismatch()));
    let cpu_plan = cpu.plan(&layer.problem).unwrap();
    let operands = GemmOperands::new(&x, &y);
    let error = device.prepare(&Gemm { plan: &cpu_plan, weights: &layer.weights, operands }).unwrap_err();
    assert!(error.to_string().contains("the CPU device"), "{error}");

    // One memory may not be read and written by the same call.
    let square = Problem { epilogue: Epilogue { residual: true, ..Epilogue::NONE }, ..layer.problem };
    let operands = GemmOperands::new(&x, &y).residual(&y);
    let error =
        device.prepare(&Gemm { plan: &device.plan(&square).unwrap(), weights: &layer.weights, operands }).unwrap_err();
    assert!(error.to_string().contains("shares its memory"), "{error}");
}

#[test]
#[ignore = "needs a GPU"]
fn tensors_come_back_as_they_went() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::F16] {
        // An odd number of f16 elements ends within a word.
        for (rows, cols) in [(0, 5), (1, 1), (3, 5), (7, 33)] {
            let data = matrix(rows, cols, dtype, Data::Edge, &mut rng(seed(), 0));
            let tensor = device.upload(&data).unwrap();
            assert_eq!(device.read(&tensor).unwrap().elements().as_bytes(), data.elements().as_bytes());
            let other = matrix(rows, cols, dtype, Data::Uniform, &mut rng(seed(), 1));
            device.write(&tensor, &other).unwrap();
            assert_eq!(device.read(&tensor).unwrap(), other);
            assert_eq!(
                device.read(&device.zeros(rows, cols, dtype).unwrap()).unwrap().elements().to_f32(),
                vec![0.0; rows * cols]
            );
        }
    }
}

/// Writes are whole words, so an odd number of f16 elements would take its neighbour in a caller's buffer along.
/// A thread that waits may be the one that calls another's callbacks: each gets its own numbers all the same.
#[test]
#[ignore = "needs a GPU"]
fn threads_that_read_from_one_device_get_their_own() {
    let Some(device) = gpu() else { return };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let device = &device;
            scope.spawn(move || {
                for round in 0..200 {
                    let numbers = [thread as f32, round as f32];
                    let own = device.upload(&Matrix::from_f32(1, 2, &numbers).unwrap()).unwrap();
                    assert_eq!(device.read(&own).unwrap().elements().to_f32(), numbers);
                }
            });
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn a_write_that_would_reach_past_its_tensor_is_refused() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue).unwrap();
    let arena = storage_buffer(&wgpu_device, 64);
    let half = |cols: usize| Matrix::new(1, cols, Elements::from_f32(DType::F16, &vec![1.0; cols])).unwrap();
    let odd = Tensor::from_buffer(&device, arena.clone(), 1, 3, DType::F16).unwrap();
    assert!(device.write(&odd, &half(3)).unwrap_err().to_string().contains("odd"));
    let even = Tensor::from_buffer(&device, arena.clone(), 1, 4, DType::F16).unwrap();
    device.write(&even, &half(4)).unwrap();
    assert_eq!(device.read(&odd).unwrap(), half(3));
}

#[test]
#[ignore = "needs a GPU"]
fn checked_and_trusted_shaders_agree_bit_for_bit() {
    let Some(trusted) = gpu() else { return };
    let options = Options { checks: ShaderChecks::Checked, ..Options::default() };
    let checked = Device::open(trusted.info().name(), options).unwrap();
    assert_eq!(checked.shader_checks(), Some(ShaderChecks::Checked));
    let seed = seed();
    for op in [Op::Dense, Op::Masked, OP] {
        let [a, b] = [&trusted, &checked].map(|device| {
            let problem = Problem::linear(op, 131, 65, 77, DType::F32);
            let mut rng = rng(seed, 0);
            let weights = host_weights(&problem, Data::Whole, &mut rng);
            let x = matrix(65, 77, DType::F32, Data::Whole, &mut rng);
            common::run(device, &device.plan(&problem).unwrap(), &weights, &x, None, None)
        });
        assert_eq!(a, b, "{op:?}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn threads_share_a_device() {
    let Some(device) = gpu() else { return };
    let seed = seed();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let device = &device;
            scope.spawn(move || {
                for round in 0..3 {
                    let layer = Layer::new(device, OP, seed + 10 * thread + round);
                    let plan = device.plan(&layer.problem).unwrap();
                    let x = device.upload(&layer.x).unwrap();
                    let y = device.zeros(20, 70, DType::F32).unwrap();
                    let operands = GemmOperands::new(&x, &y);
                    device.prepare(&Gemm { plan: &plan, weights: &layer.weights, operands }).unwrap().run().unwrap();
                    layer.expect(&device.read(&y).unwrap());
                }
            });
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn a_prepared_call_sees_new_activations_and_is_timed() {
    let Some(device) = gpu() else { return };
    let layer = Layer::new(&device, OP, seed());
    let plan = device.plan(&layer.problem).unwrap();
    let zeros = Matrix::new(20, 100, Elements::zeros(DType::F32, 2000)).unwrap();
    let (x, y) = (device.upload(&zeros).unwrap(), device.zeros(20, 70, DType::F32).unwrap());
    let call =
        device.prepare(&Gemm { plan: &plan, weights: &layer.weights, operands: GemmOperands::new(&x, &y) }).unwrap();
    call.run().unwrap();
    assert_eq!(device.read(&y).unwrap(), Matrix::zeros(20, 70, DType::F32).unwrap());
    device.write(&x, &layer.x).unwrap();
    let timing = device.time([&call, &call].into_iter()).unwrap();
    assert!(timing.elapsed.as_nanos() > 0);
    assert_eq!(timing.clock == Clock::GpuTimestamps, device.caps().unwrap().timestamps);
    layer.expect(&device.read(&y).unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_repeated_call_of_a_layer_allocates_nothing_and_submits_once() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue.clone()).unwrap();
    // k is ragged, so that X is packed first: a call of at least two dispatches.
    let (m, n, k) = (70, 20, 1001);
    let problem = Problem::linear(Op::Sparse24(VectorLen::new(32).unwrap()), m, n, k, DType::F32);
    let mut rng = rng(seed(), 0);
    let host = host_weights(&problem, Data::Whole, &mut rng);
    let HostWeights::Sparse24(compressed) = &host else { unreachable!() };
    let layer = device.linear(compressed, Epilogue::NONE);
    assert_eq!(layer.bytes(), 0, "nothing is uploaded before it is known in which form");
    assert!(layer.plan(n, DType::F32).unwrap().explain().contains("first: k = 1001"));
    let x = matrix(n, k, DType::F32, Data::Whole, &mut rng);
    let (tx, ty) = (device.upload(&x).unwrap(), device.zeros(n, m, DType::F32).unwrap());
    let call = layer.prepare(&GemmOperands::new(&tx, &ty)).unwrap();
    call.run().unwrap();
    device.wait().unwrap();

    let (before, first) = (allocated(&wgpu_device), submissions(&queue));
    assert!(before[0] >= 4 && before[2] >= 2, "the counters do not count: {before:?}");
    for _ in 0..10 {
        call.run().unwrap();
    }
    // The empty submission that reads the number counts, too.
    assert_eq!(submissions(&queue) - first, 11);
    device.wait().unwrap();
    assert_eq!(allocated(&wgpu_device), before);
    let operands = Operands::new(&host, &x);
    let verdict = Oracle::new(&problem, operands).unwrap().verify(&device.read(&ty).unwrap(), Sample::All).unwrap();
    assert!(verdict.passed(), "{verdict}");

    // Another call of the same layer shares weights and scratch: it takes two more tensors and a few parameters, and no
    // more memory for packed activations, which are as large as X.
    let bytes = layer.bytes();
    let (tx, ty) = (device.upload(&x).unwrap(), device.zeros(n, m, DType::F32).unwrap());
    let with_tensors = allocated(&wgpu_device)[1];
    layer.prepare(&GemmOperands::new(&tx, &ty)).unwrap().run().unwrap();
    assert_eq!(layer.bytes(), bytes);
    let more = allocated(&wgpu_device)[1] - with_tensors;
    assert!(more < (n * k * 4) as isize / 2, "{more} bytes more");
}

/// A layer whose 2:4 weights are not faster runs on dense ones, gives the same result, and says so.
#[test]
#[ignore = "needs a GPU"]
fn a_layer_that_is_not_faster_as_sparse_runs_dense() {
    let Some(device) = gpu() else { return };
    let mut rng = rng(seed(), 0);
    let (m, n, k) = (130, 140, 64);
    let op = Op::Sparse24(VectorLen::new(4).unwrap());
    let problem = Problem::linear(op, m, n, k, DType::F32);
    let dense = Problem { op: Op::Dense, ..problem };
    let tuned = |problem: &Problem, seconds| match device.candidates(problem).unwrap()[0].algorithm() {
        Algorithm::Gpu(algorithm) => {
            Tuned { n, schedule: algorithm.kernel().schedule(), splits: algorithm.splits(), seconds }
        }
        Algorithm::Cpu(_) => unreachable!(),
    };
    // As if 2:4 had been measured at half and at twice dense's speed.
    for (seconds, form) in [(2e-3, Op::Dense), (5e-4, op)] {
        let mut tuning = Tuning::default();
        tuning.insert(&problem, tuned(&problem, seconds));
        tuning.insert(&dense, tuned(&dense, 1e-3));
        device.set_tuning(tuning);
        let host = host_weights(&problem, Data::Whole, &mut rng);
        let HostWeights::Sparse24(compressed) = &host else { unreachable!() };
        let layer = device.linear(compressed, Epilogue::NONE);
        let plan = layer.plan(n, DType::F32).unwrap();
        assert_eq!(plan.weights(), form, "{}", plan.explain());
        assert_eq!(plan.explain().contains("dense weights, because"), form == Op::Dense, "{}", plan.explain());
        let x = matrix(n, k, DType::F32, Data::Whole, &mut rng);
        let (tx, ty) = (device.upload(&x).unwrap(), device.zeros(n, m, DType::F32).unwrap());
        layer.prepare(&GemmOperands::new(&tx, &ty)).unwrap().run().unwrap();
        let operands = Operands::new(&host, &x);
        let verdict = Oracle::new(&problem, operands).unwrap().verify(&device.read(&ty).unwrap(), Sample::All).unwrap();
        assert!(verdict.passed(), "{verdict}");
    }
}
