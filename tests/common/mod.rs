//! What the GEMM and GPU tests share: the device under test, operands with a reason, and the check against the oracle.
#![allow(dead_code, unreachable_pub, reason = "each test file includes this and uses its own part")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips")]

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};
use sparse24::reference::{Operands, Oracle, Sample, Verdict};
use sparse24::{
    DType, Device, Elements, Gemm, GemmOperands, HostWeights, Mask, Matrix, Op, Plan, Problem, Sparse24, VectorLen,
    prune,
};

/// The GPU to test: the adapter named by SPARSE24_TEST_DEVICE, else any. `None`, with a word on stderr, where there is
/// none, unless SPARSE24_REQUIRE_GPU is set: then that is a failure.
pub fn gpu() -> Option<Device> {
    let name = std::env::var("SPARSE24_TEST_DEVICE").ok();
    let name = name.or_else(|| Device::adapters().into_iter().next().map(|first| first.name));
    match Device::gpu(name.as_deref().unwrap_or("any adapter")) {
        Ok(device) => Some(device),
        Err(e) if std::env::var_os("SPARSE24_REQUIRE_GPU").is_some() => panic!("a GPU is required: {e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// A wgpu device of the kind under test that belongs to the test, as an embedder's would, with limits that may be lower
/// than the adapter's own.
pub fn callers_device(
    device: &Device,
    features: wgpu::Features,
    limits: impl FnOnce(wgpu::Limits) -> wgpu::Limits,
) -> (wgpu::Device, wgpu::Queue) {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    let name = device.info().name().to_owned();
    let adapter = adapters.into_iter().find(|a| a.get_info().name == name).unwrap();
    let request = wgpu::DeviceDescriptor {
        required_features: features,
        required_limits: limits(adapter.limits()),
        ..Default::default()
    };
    pollster::block_on(adapter.request_device(&request)).unwrap()
}

/// What a device has allocated, as wgpu counts it: buffers and their bytes, bind groups, pipelines.
pub fn allocated(device: &wgpu::Device) -> [isize; 5] {
    let hal = device.get_internal_counters().hal;
    [&hal.buffers, &hal.buffer_memory, &hal.bind_groups, &hal.compute_pipelines, &hal.memory_allocations]
        .map(|c| c.read())
}

/// Number of the submission that an empty one gets; wgpu counts them and shows the count.
pub fn submissions(queue: &wgpu::Queue) -> u64 {
    let text = format!("{:?}", queue.submit([]));
    text.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// A seed that differs from run to run and is printed, so that a failure can be repeated with SPARSE24_TEST_SEED.
pub fn seed() -> u64 {
    let given = std::env::var("SPARSE24_TEST_SEED").ok().map(|s| s.parse().unwrap());
    let seed = given.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    eprintln!("SPARSE24_TEST_SEED={seed}");
    seed
}

/// A generator for one part of a test.
pub fn rng(seed: u64, stream: u64) -> Pcg64 {
    Pcg64::seed_from_u64(seed.wrapping_add(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// What operands are made of.
#[derive(Clone, Copy, Debug)]
pub enum Data {
    /// Whole numbers from -4 to 4: every sum is exact in every order, so the oracle allows no error at all before the
    /// epilogue, and one wrong product shows whatever k is.
    Whole,
    /// Uniform in [-1, 1): every bit of the mantissa is used.
    Uniform,
    /// Uniform, strewn with zeros of both signs, subnormals of the type and large numbers (f16: its largest).
    Edge,
}

/// A matrix of such data.
pub fn matrix(rows: usize, cols: usize, dtype: DType, data: Data, rng: &mut Pcg64) -> Matrix {
    let (tiny, large) = match dtype {
        DType::F32 | DType::Bf16 => (f32::MIN_POSITIVE / 4.0, 1e15),
        DType::F16 => (2.0f32.powi(-16), 65504.0),
    };
    let mut uniform = || (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
    let values: Vec<f32> = (0..rows * cols)
        .map(|_| match data {
            Data::Whole => (uniform() * 4.99).trunc(),
            Data::Uniform => uniform(),
            Data::Edge => match (uniform() * 8.0) as i32 {
                -7 => 0.0,
                -6 => -0.0,
                5 => tiny,
                6 => -tiny,
                7 => large,
                _ => uniform(),
            },
        })
        .collect();
    Matrix::new(rows, cols, Elements::from_f32(dtype, &values)).unwrap()
}

/// Weights for a problem, in the form of its operation.
pub fn host_weights(problem: &Problem, data: Data, rng: &mut Pcg64) -> HostWeights {
    let w = matrix(problem.m, problem.k, problem.storage, data, rng);
    match problem.op {
        Op::Dense => HostWeights::Dense(w),
        Op::Sparse24(v) => {
            // A random pattern: every code occurs whatever the weights are, under-full groups where they are zero.
            let mask = prune::random(problem.m, problem.k, v, rng.next_u64()).unwrap();
            HostWeights::Sparse24(Sparse24::compress(&w, &mask).unwrap())
        }
        Op::Masked24 => {
            let mask = prune::random(problem.m, problem.k, VectorLen::ONE, rng.next_u64()).unwrap();
            HostWeights::Masked24(w, mask)
        }
        Op::Masked => {
            let density = rng.next_u32();
            let mask = Mask::from_fn(problem.m, problem.k, |_, _| rng.next_u32() < density).unwrap();
            HostWeights::Masked(w, mask)
        }
    }
}

/// Draws operands, computes the plan's problem on `device` over a poisoned output, and judges every element.
pub fn verdict(device: &Device, plan: &Plan, data: Data, rng: &mut Pcg64) -> Verdict {
    let weights = host_weights(plan.problem(), data, rng);
    verdict_of(device, plan, &weights, &weights, data, rng)
}

/// As [`verdict`], with the weights that are uploaded and those that the oracle is told. They differ only in tests of
/// the check itself.
pub fn verdict_of(
    device: &Device,
    plan: &Plan,
    uploaded: &HostWeights,
    told: &HostWeights,
    data: Data,
    rng: &mut Pcg64,
) -> Verdict {
    let problem = plan.problem();
    let (rows, cols) = problem.x_shape();
    let x = matrix(rows, cols, problem.storage, data, rng);
    let (rows, cols) = problem.y_shape();
    let bias = problem.epilogue.bias.then(|| matrix(1, problem.m, DType::F32, data, rng));
    let residual = problem.epilogue.residual.then(|| matrix(rows, cols, problem.output, data, rng));

    let y = run(device, plan, uploaded, &x, bias.as_ref(), residual.as_ref());
    let bias = bias.as_ref().map(|b| b.elements().to_f32());
    let operands = Operands { weights: told, x: &x, bias: bias.as_deref(), residual: residual.as_ref() };
    Oracle::new(problem, operands).unwrap().verify(&y, Sample::All).unwrap()
}

/// Computes the plan's problem on `device` over an output of NaNs.
pub fn run(
    device: &Device,
    plan: &Plan,
    weights: &HostWeights,
    x: &Matrix,
    bias: Option<&Matrix>,
    residual: Option<&Matrix>,
) -> Matrix {
    let problem = plan.problem();
    let (rows, cols) = problem.y_shape();
    let poison = Elements::from_f32(problem.output, &vec![f32::NAN; rows * cols]);
    let y = device.upload(&Matrix::new(rows, cols, poison).unwrap()).unwrap();
    let weights = device.upload_weights(weights).unwrap();
    let x = device.upload(x).unwrap();
    let bias = bias.map(|b| device.upload(b).unwrap());
    let residual = residual.map(|r| device.upload(r).unwrap());
    let operands = GemmOperands { x: &x, bias: bias.as_ref(), residual: residual.as_ref(), y: &y };
    device.prepare(&Gemm { plan, weights: &weights, operands }).unwrap().run().unwrap();
    device.read(&y).unwrap()
}

/// Every operation, 2:4 at every vector length.
pub fn ops() -> impl Iterator<Item = Op> {
    Op::all()
}

/// Checks the plan's problem on fresh operands of each kind.
pub fn check(device: &Device, plan: &Plan, kinds: &[Data], seed: u64, stream: u64) {
    for &data in kinds {
        let verdict = verdict(device, plan, data, &mut rng(seed, stream));
        assert!(verdict.passed(), "{data:?}, seed {seed}, stream {stream}: {verdict}\n{}", plan.explain());
    }
}

/// Sizes with a reason: empty, single, around a group, around a word of codes, around the tiles.
pub const SIZES: [(usize, usize, usize); 20] = [
    (0, 5, 8),
    (5, 0, 8),
    (3, 4, 0),
    (1, 1, 1),
    (1, 1, 4),
    (3, 1, 3),
    (4, 3, 5),
    (5, 2, 31),
    (31, 1, 32),
    (32, 8, 33),
    (33, 9, 36),
    (63, 31, 64),
    (64, 32, 63),
    (65, 33, 100),
    (127, 7, 95),
    (128, 64, 96),
    (129, 63, 97),
    (130, 127, 128),
    (257, 129, 34),
    (192, 16, 768),
];
