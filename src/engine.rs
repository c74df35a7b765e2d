//! Devices as an embedder sees them: upload weights once, prepare a call once, run it many times.
//!
//! A [`Device`] is a GPU or this process's CPU; everything above works on either. [`Weights`] and [`Tensor`]s belong to
//! the device that made them. [`Device::prepare`] checks every shape, type and owner of an
//! [operation](crate::ops) and binds its operands, so that [`Prepared::run`] and [`GpuCall::record`] only dispatch.
//! Invariant: a [`Prepared`] call's operands have the shapes and types that its operation checks, and live on its
//! device.

mod compressed;
mod indices;
mod operand;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use web_time::Instant;

pub use self::compressed::Compressed;
pub(crate) use self::compressed::{CpuParts, gpu_size};
pub use self::indices::Indices;
pub use self::operand::{Operand, OperandValue};
pub(crate) use self::operand::{check_devices, check_memory};
pub use crate::cpu::CpuInfo;
/// The wgpu that [`Device::from_wgpu`] and [`GpuCall::record`] speak: an embedder's own must be this version.
pub use wgpu;

use crate::cpu::{Cpu, CpuCall, CpuProbe, CpuWeights, Shared, read, write};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_len, expect_shape};
pub use crate::gpu::{AdapterInfo, AdapterKind};
use crate::gpu::{BufferRange, Dispatch, Gpu, adapters};
use crate::kernels::{
    Caps, CoopUnit, CopyParams, Kernel, PROBE_CHAINS, PROBE_ROUNDS, Params, ProbeCoop, ProbeCopy, ProbeFma, Program,
    ShaderChecks,
};
use crate::layout;
use crate::matrix::{DType, Element, Elements, Matrix};
use crate::memory;
use crate::plan::{CpuCaps, Plan, Tuning};
use crate::problem::{Op, Problem};
use crate::simd::SimdLevel;
use crate::weights::HostWeights;

/// A place where products are computed. Cloning is cheap and gives the same device.
///
/// ```
/// use sparse24::{DType, Device, Gemm, GemmOperands, Mask, Matrix, Op, Problem, Sparse24, VectorLen, prune};
/// let device = Device::cpu()?;
/// let w = Matrix::from_f32(2, 4, &[3.0, 1.0, 2.0, 0.0, 0.0, 5.0, 0.0, 4.0])?;
/// let mask = prune::magnitude(&w, VectorLen::ONE)?;
/// let weights = device.upload_weights(&Sparse24::compress(&w, &mask)?.into())?;
/// let x = device.upload(&Matrix::from_f32(1, 4, &[1.0, 1.0, 1.0, 1.0])?)?;
/// let y = device.zeros(1, 2, DType::F32)?;
/// let plan = device.plan(&Problem::linear(Op::Sparse24(VectorLen::ONE), 2, 1, 4, DType::F32))?;
/// let operands = GemmOperands::new(&x, &y);
/// device.prepare(&Gemm { plan: &plan, weights: &weights, operands })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 2, &[5.0, 9.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Device(Inner);

/// Where it computes.
#[derive(Clone, Debug)]
pub(crate) enum Inner {
    Gpu(Arc<Gpu>),
    Cpu(Arc<Cpu>),
}

/// Weights on a device, in the layout for one [`Op`].
#[derive(Clone, Debug)]
pub struct Weights {
    device: Device,
    op: Op,
    m: usize,
    k: usize,
    dtype: DType,
    bytes: usize,
    store: WeightStore,
}

#[derive(Clone, Debug)]
enum WeightStore {
    /// One buffer of values, and for sparse or masked weights one of metadata words, per piece of rows (see
    /// [`layout`]).
    Gpu(Vec<Piece>),
    /// Behind a lock, since weights may be replaced while calls are bound to them.
    Cpu(Arc<RwLock<CpuWeights>>),
}

/// Some rows of W in the memory of a GPU.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    values: wgpu::Buffer,
    words: Option<wgpu::Buffer>,
}

impl Piece {
    /// All of its values, and of its words.
    pub(crate) fn bindings(&self) -> [Option<BufferRange<'_>>; 2] {
        [Some(BufferRange::whole(&self.values)), self.words.as_ref().map(BufferRange::whole)]
    }
}

impl Weights {
    /// The [`Op`] that they are laid out for.
    pub fn op(&self) -> Op {
        self.op
    }

    /// The storage type of the problems that they are for. bf16 weights are for f32 ones: a GPU keeps them widened, the
    /// CPU device widens them whenever they are used.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes that they take on the device, metadata included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Out features and in features.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.m, self.k)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// As they lie on the CPU device.
    pub(crate) fn on_cpu(&self) -> Result<Arc<RwLock<CpuWeights>>> {
        match &self.store {
            WeightStore::Cpu(store) => Ok(Arc::clone(store)),
            WeightStore::Gpu(_) => Err(other_device("weights")),
        }
    }

    /// As they lie on a GPU.
    pub(crate) fn on_gpu(&self) -> Result<&[Piece]> {
        match &self.store {
            WeightStore::Gpu(pieces) => Ok(pieces),
            WeightStore::Cpu(_) => Err(other_device("weights")),
        }
    }
}

/// A matrix on a device. Cloning gives another handle to the same memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    device: Device,
    rows: usize,
    cols: usize,
    dtype: DType,
    store: TensorStore,
}

#[derive(Clone, Debug)]
enum TensorStore {
    Gpu(wgpu::Buffer),
    Cpu(Shared),
}

impl Tensor {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn bytes(&self) -> u64 {
        // Both products were checked when the tensor was made.
        (self.rows * self.cols * self.dtype.bytes()) as u64
    }

    /// As it lies on the CPU device.
    pub(crate) fn on_cpu(&self) -> Result<Shared> {
        match &self.store {
            TensorStore::Cpu(matrix) => Ok(Arc::clone(matrix)),
            TensorStore::Gpu(_) => Err(other_device("tensor")),
        }
    }

    /// All of it on a GPU.
    pub(crate) fn on_gpu(&self) -> Option<BufferRange<'_>> {
        let TensorStore::Gpu(buffer) = &self.store else { return None };
        Some(BufferRange { buffer, offset: 0, bytes: self.bytes() })
    }

    /// The byte range of `tokens` out of `n` tokens, at `token_bytes` each; the whole tensor, in any layout, if that is
    /// all tokens. Never extends past the tensor, because the buffer may be larger and belong to the caller. `None` on
    /// the CPU device.
    pub(crate) fn part_on_gpu(&self, tokens: &Range<usize>, n: usize, token_bytes: usize) -> Option<BufferRange<'_>> {
        let whole = self.on_gpu()?;
        if tokens.len() == n {
            return Some(whole);
        }
        let (offset, bytes) = (tokens.start * token_bytes, tokens.len() * token_bytes);
        Some(BufferRange { offset: offset as u64, bytes: bytes as u64, ..whole })
    }

    pub(crate) fn same_memory(&self, other: &Self) -> bool {
        match (&self.store, &other.store) {
            (TensorStore::Gpu(a), TensorStore::Gpu(b)) => a == b,
            (TensorStore::Cpu(a), TensorStore::Cpu(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// A call with everything bound, to run as often as wanted.
#[derive(Clone, Debug)]
pub struct Prepared {
    device: Device,
    cost: Cost,
    work: Work,
}

/// What a call must do at least, whichever kernel does it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Additions and multiplications.
    pub flops: f64,
    /// Bytes of the operands, each read or written once.
    pub bytes: f64,
}

/// What a call does when it runs.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    Gpu(Vec<Dispatch>),
    Cpu(Arc<dyn CpuCall>),
}

impl Work {
    /// What is dispatched on a GPU.
    fn dispatches(&self) -> &[Dispatch] {
        match self {
            Self::Gpu(dispatches) => dispatches,
            Self::Cpu(_) => &[],
        }
    }

    /// Runs a CPU call; the caller must hold the device ([`Cpu::exclusively`]). Does nothing for GPU work.
    fn run_now(&self, cpu: &Cpu) {
        match self {
            Self::Gpu(_) => {}
            Self::Cpu(call) => call.run(cpu),
        }
    }
}

/// An error unless there is memory for the CPU device's own copy of weights.
fn claim_weights(bytes: u128, m: usize, k: usize) -> Result<()> {
    memory::claim(usize::try_from(bytes).unwrap_or(usize::MAX), || format!("weights of {m} x {k} on the CPU device"))
}

/// The clock behind a [`Timing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Timestamps that the GPU wrote around the dispatches.
    GpuTimestamps,
    /// The host's clock, from submission until the device was done.
    HostWall,
}

impl Clock {
    /// `gpu_timestamps` or `host_wall`, as printed beside every figure.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GpuTimestamps => "gpu_timestamps",
            Self::HostWall => "host_wall",
        }
    }
}

/// How long a sequence of calls took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Time from the first call's start to the last one's end.
    pub elapsed: Duration,
    /// The clock that was read.
    pub clock: Clock,
}

/// Microbenchmark of a peak rate.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Probe {
    /// Multiply-adds in registers.
    Fma(DType),
    /// Cooperative matrices.
    Cooperative,
    /// A copy of so many bytes.
    Copy(u64),
    /// So many bytes, read only.
    Read(u64),
}

/// What a device is.
#[derive(Clone, Debug)]
pub enum DeviceInfo {
    /// A GPU, through this adapter.
    Gpu(AdapterInfo),
    /// This process.
    Cpu(CpuInfo),
}

impl DeviceInfo {
    /// Name of the hardware.
    pub fn name(&self) -> &str {
        match self {
            Self::Gpu(info) => &info.name,
            Self::Cpu(info) => &info.name,
        }
    }
}

/// Choices made when a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads of the CPU device; one per core for `None`.
    pub threads: Option<usize>,
    /// Vector instructions of the CPU device's kernels; the widest that the processor has for `None`. The crate `gemm`,
    /// which multiplies dense weights there, takes the widest whatever is asked for (AVX-512 with the feature
    /// `avx512`).
    pub simd: Option<SimdLevel>,
    /// Whether a GPU's shaders keep naga's run-time checks. The kernels guard their own accesses.
    pub checks: ShaderChecks,
    /// Shape and subgroup size of cooperative matrices to emulate in plain WGSL, to test those kernels on a device
    /// without them. The planner never picks emulated kernels; ask for one with [`Plan::gpu_with`].
    /// [`Attention`](crate::Attention) uses them wherever they fit.
    pub emulate_cooperative: Option<CoopUnit>,
    /// Whether a GPU's shaders get their loops over registers unrolled; for `None` as [`Caps::unrolls`] says.
    #[doc(hidden)]
    pub unroll: Option<bool>,
    /// Whether a GPU holds tiles of cooperative matrices as scalars; for `None` as [`Caps::cooperative_scalars`] says.
    pub cooperative_scalars: Option<bool>,
}

impl Default for Options {
    /// All cores, trusted shaders.
    fn default() -> Self {
        Self {
            threads: None,
            simd: None,
            checks: ShaderChecks::Trusted,
            emulate_cooperative: None,
            unroll: None,
            cooperative_scalars: None,
        }
    }
}

impl Device {
    /// The best device of this machine: the first discrete GPU, else the first integrated one, else the CPU. Drivers
    /// that compute on the processor are never chosen: [`Device::cpu`] beats them.
    pub fn auto() -> Result<Self> {
        Self::open("auto", Options::default())
    }

    /// This process, one thread per core.
    pub fn cpu() -> Result<Self> {
        Self::open("cpu", Options::default())
    }

    /// The first adapter whose name contains `name`, whatever the case.
    pub fn gpu(name: &str) -> Result<Self> {
        match Self::open(name, Options::default())? {
            Self(Inner::Cpu(_)) => {
                Err(Error::unknown_device(name, Self::adapters().into_iter().map(|a| a.name).collect()))
            }
            gpu => Ok(gpu),
        }
    }

    /// A device by name: `auto`, `cpu`, or part of an adapter's name. An error lists the names there are.
    pub fn open(name: &str, options: Options) -> Result<Self> {
        pollster::block_on(Self::open_async(name, options))
    }

    /// [`Device::open`] where nothing may block: in a browser. There `auto` takes its adapter, whatever it is.
    pub async fn open_async(name: &str, options: Options) -> Result<Self> {
        let wanted = name.to_lowercase();
        let adapter = match wanted.as_str() {
            "cpu" => None,
            "auto" => adapters().await.into_iter().find(|a| is_hardware(&a.info)),
            _ => {
                let found = adapters().await.into_iter().find(|a| a.info.name.to_lowercase().contains(&wanted));
                if found.is_none() || wanted.is_empty() {
                    let mut available = vec!["auto".to_owned(), "cpu".to_owned()];
                    available.extend(adapters().await.into_iter().map(|a| a.info.name));
                    return Err(Error::unknown_device(name, available));
                }
                found
            }
        };
        Ok(Self(match adapter {
            Some(adapter) => {
                let Options { checks, emulate_cooperative, unroll, cooperative_scalars, .. } = options;
                Inner::Gpu(Arc::new(adapter.open(checks, emulate_cooperative, unroll, cooperative_scalars).await?))
            }
            None => Inner::Cpu(Arc::new(Cpu::new(options.threads, options.simd)?)),
        }))
    }

    /// Compiles the kernels of a plan before they are needed; without it the first call of the plan does. A browser
    /// compiles beside the caller, who need not wait. Nothing to do on the CPU device.
    ///
    /// ```
    /// use sparse24::{DType, Device, Op, Problem};
    /// let device = Device::auto()?;
    /// device.compile(&device.plan(&Problem::linear(Op::Dense, 64, 8, 64, DType::F32))?)?;
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn compile(&self, plan: &Plan) -> Result<()> {
        match &self.0 {
            Inner::Gpu(gpu) => plan.steps(&gpu.info().caps)?.iter().try_for_each(|step| gpu.compile(&step.program)),
            Inner::Cpu(_) => Ok(()),
        }
    }

    /// Takes compiled kernels from a file in a folder, where an earlier process has kept them, and keeps there what is
    /// compiled from now on: the file is written when the device is dropped. Returns whether the device hands out what
    /// it has compiled, which drivers of Vulkan do. A file that is broken or of another device is made anew; of two
    /// processes at once, the file is that of the last.
    ///
    /// It pays where the driver has no cache of its own, and is for folders that only the user can write: a driver
    /// runs what it is given.
    pub fn keep_pipelines(&self, folder: impl AsRef<Path>) -> Result<bool> {
        match &self.0 {
            Inner::Gpu(gpu) => gpu.keep_pipelines(folder.as_ref()),
            Inner::Cpu(_) => Ok(false),
        }
    }

    /// A wgpu device that the caller owns. Use [`Tensor::from_buffer`] for its buffers and [`GpuCall::record`] to put
    /// calls into its encoders: neither submits, waits or copies. Its error and loss callbacks are left alone.
    ///
    /// Open it with what [`Device::descriptor`] asks for. A device that was opened with less runs fewer kernels:
    /// [`Device::refused`] lists the missing features and how many kernels need each; [`Plan::explain`] names those
    /// that matter for one problem.
    ///
    /// ```no_run
    /// use sparse24::{Device, wgpu};
    /// # async fn open(adapter: wgpu::Adapter) -> Result<(), Box<dyn std::error::Error>> {
    /// // Add what the rest of the program needs.
    /// let (device, queue) = adapter.request_device(&Device::descriptor(&adapter)).await?;
    /// let device = Device::from_wgpu(device, queue)?;
    /// for (lack, kernels) in device.refused() {
    ///     eprintln!("{kernels} kernels need {lack}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_wgpu(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        Ok(Self(Inner::Gpu(Arc::new(Gpu::from_wgpu(device, queue, Options::default().checks)?))))
    }

    /// Every feature and limit that this crate's kernels can use and the adapter supports, but cooperative matrices, to
    /// request for [`Device::from_wgpu`]. wgpu's default descriptor leaves out f16, timestamps and subgroups, and stops
    /// at 16 KiB of workgroup memory and 256 invocations.
    pub fn descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
        crate::gpu::descriptor(adapter)
    }

    /// The features and limits that kernels need and this device lacks, each with the number of kernels that need it
    /// (forms and epilogues not counted separately), most kernels first. If the device runs one kind of cooperative
    /// matrices that this crate has kernels for, kernels for the other kinds are not counted. Empty on the CPU device.
    pub fn refused(&self) -> Vec<(String, usize)> {
        let Some(caps) = self.caps() else { return Vec::new() };
        let mut lacks: BTreeMap<String, usize> = BTreeMap::new();
        let counts = |kernel: &Kernel| kernel.is_representative() && caps.should_report(kernel.schedule());
        for kernel in Kernel::all().filter(counts) {
            if let Err(lack) = kernel.supported_by(caps) {
                *lacks.entry(lack).or_default() += 1;
            }
        }
        let mut lacks: Vec<_> = lacks.into_iter().collect();
        lacks.sort_by_key(|&(_, kernels)| std::cmp::Reverse(kernels));
        lacks
    }

    /// Every adapter of this machine, the one that [`Device::auto`] prefers first.
    pub fn adapters() -> Vec<AdapterInfo> {
        pollster::block_on(adapters()).into_iter().map(|a| a.info).collect()
    }

    /// The adapter that [`Device::auto`] takes; `None` when it takes the CPU.
    pub fn auto_adapter() -> Option<AdapterInfo> {
        Self::adapters().into_iter().find(is_hardware)
    }

    /// A GPU that was just opened, by another name, unless that is empty: a browser tells a page what its GPU is, and
    /// wgpu does not pass it on.
    pub fn called(mut self, name: &str) -> Self {
        if let (Inner::Gpu(gpu), false) = (&mut self.0, name.is_empty())
            && let Some(gpu) = Arc::get_mut(gpu)
        {
            gpu.set_name(name);
        }
        self
    }

    /// What this device is.
    pub fn info(&self) -> DeviceInfo {
        match &self.0 {
            Inner::Gpu(gpu) => DeviceInfo::Gpu(gpu.info().clone()),
            Inner::Cpu(cpu) => DeviceInfo::Cpu(cpu.info().clone()),
        }
    }

    /// What a GPU offers to kernels; `None` for the CPU.
    pub fn caps(&self) -> Option<&Caps> {
        match &self.0 {
            Inner::Gpu(gpu) => Some(&gpu.info().caps),
            Inner::Cpu(_) => None,
        }
    }

    /// Whether shaders run with run-time checks; `None` for the CPU.
    pub fn shader_checks(&self) -> Option<ShaderChecks> {
        match &self.0 {
            Inner::Gpu(gpu) => Some(gpu.checks()),
            Inner::Cpu(_) => None,
        }
    }

    /// Decides how a problem is solved here, with the weights as the problem gives them.
    pub fn plan(&self, problem: &Problem) -> Result<Plan> {
        self.plan_by(Plan::cpu, Plan::gpu, problem)
    }

    /// Decides how a problem is solved here, with dense weights in place of 2:4 ones unless 2:4 is faster by a margin:
    /// [`Plan::weights`] says which to upload. [`crate::Linear`] does so by itself.
    pub fn plan_or_dense(&self, problem: &Problem) -> Result<Plan> {
        self.plan_by(Plan::cpu_or_dense, Plan::gpu_or_dense, problem)
    }

    fn plan_by(
        &self,
        cpu: impl Fn(&Problem, &CpuCaps) -> Result<Plan>,
        gpu: impl Fn(&Problem, &Caps, &Tuning) -> Result<Plan>,
        problem: &Problem,
    ) -> Result<Plan> {
        let device = match &self.0 {
            Inner::Gpu(device) => device,
            Inner::Cpu(device) => return cpu(problem, &device.caps()),
        };
        gpu(problem, &device.info().caps, &device.tuning()).map_err(|e| e.on_device(&device.info().name))
    }

    /// Every plan that [`Device::plan`] chooses from, lowest estimate first; none if a GPU can run no kernel for the
    /// problem. On the CPU device errors are those of [`Plan::cpu`].
    pub fn candidates(&self, problem: &Problem) -> Result<Vec<Plan>> {
        match &self.0 {
            Inner::Gpu(gpu) => {
                let caps = &gpu.info().caps;
                let rates = gpu.tuning().rates.unwrap_or(caps.rates);
                Ok(Plan::gpu_candidates(problem, &Caps { rates, ..caps.clone() }))
            }
            Inner::Cpu(cpu) => Plan::cpu_candidates(problem, &cpu.caps()),
        }
    }

    /// The measured times that the planner uses on this device; empty on the CPU.
    pub fn tuning(&self) -> Tuning {
        match &self.0 {
            Inner::Gpu(gpu) => (*gpu.tuning()).clone(),
            Inner::Cpu(_) => Tuning::default(),
        }
    }

    /// Sets the measured times that later plans on this device and its clones use. No effect on the CPU.
    pub fn set_tuning(&self, tuning: Tuning) {
        if let Inner::Gpu(gpu) = &self.0 {
            gpu.set_tuning(tuning);
        }
    }

    /// Uploads weights of any form, in the layout for their [`Op`]. [`Sparsify`](crate::Sparsify) overwrites compressed
    /// ones in place. Masked ones keep weights and mask in separate buffers, so that training can overwrite the weights
    /// alone.
    ///
    /// An error if a mask has another shape than its weights, or if a `Masked24` mask keeps fewer than two weights of a
    /// group (the error names the group): read as a mask, a code always keeps exactly two.
    pub fn upload_weights(&self, w: &HostWeights) -> Result<Weights> {
        let (op, m, k) = (w.op(), w.m(), w.k());
        if let Some(mask) = w.mask() {
            expect_shape("mask", (mask.rows(), mask.cols()), (m, k))?;
        }
        let store = match (&self.0, w) {
            (Inner::Gpu(gpu), HostWeights::Sparse24(w)) => {
                upload_pieces(gpu, op, &widen_elements(w.values()), (m, k), w.k_physical(), w.meta())?
            }
            (Inner::Gpu(gpu), HostWeights::Dense(w)) => upload_pieces(gpu, op, widen(w).elements(), (m, k), k, &[])?,
            (Inner::Gpu(gpu), HostWeights::Masked(w, mask)) => {
                upload_pieces(gpu, op, widen(w).elements(), (m, k), k, mask.words())?
            }
            (Inner::Gpu(gpu), HostWeights::Masked24(w, mask)) => {
                upload_pieces(gpu, op, widen(w).elements(), (m, k), k, &mask.codes()?)?
            }
            (Inner::Cpu(cpu), HostWeights::Sparse24(w)) => {
                claim_weights(CpuWeights::sparse24_bytes(m, k, w.vector(), w.dtype()), m, k)?;
                cpu_weights(CpuWeights::sparse24(w, cpu))
            }
            (Inner::Cpu(cpu), HostWeights::Dense(dense) | HostWeights::Masked(dense, _)) => {
                claim_weights(CpuWeights::dense_bytes(m, k, w.dtype(), w.mask().is_some()), m, k)?;
                cpu_weights(CpuWeights::dense(dense, w.mask(), cpu))
            }
            (Inner::Cpu(cpu), HostWeights::Masked24(dense, mask)) => {
                mask.codes()?;
                claim_weights(CpuWeights::dense_bytes(m, k, w.dtype(), true), m, k)?;
                cpu_weights(CpuWeights::dense(dense, w.mask(), cpu))
            }
        };
        Ok(self.weights(op, m, k, w.dtype(), store))
    }

    /// Weights whose elements were of type `given`.
    fn weights(&self, op: Op, m: usize, k: usize, given: DType, store: WeightStore) -> Weights {
        let dtype = match given {
            DType::Bf16 => DType::F32,
            DType::F32 | DType::F16 => given,
        };
        let bytes = match &store {
            WeightStore::Gpu(pieces) => {
                pieces.iter().map(|p| p.values.size() + p.words.as_ref().map_or(0, wgpu::Buffer::size)).sum::<u64>()
                    as usize
            }
            WeightStore::Cpu(w) => read(w).bytes(),
        };
        Weights { device: self.clone(), op, m, k, dtype, bytes, store }
    }

    /// Uploads activations. bf16 is widened to f32.
    pub fn upload(&self, x: &Matrix) -> Result<Tensor> {
        // As f32, which bf16 is widened to.
        memory::claim_matrix("tensor", x.rows(), x.cols(), size_of::<f32>())?;
        let x = widen(x);
        let (rows, cols, dtype) = (x.rows(), x.cols(), x.dtype());
        let store = match &self.0 {
            Inner::Gpu(gpu) => TensorStore::Gpu(upload(gpu, "tensor", x.elements().as_bytes())?),
            Inner::Cpu(_) => TensorStore::Cpu(Arc::new(RwLock::new(x.into_owned()))),
        };
        Ok(Tensor { device: self.clone(), rows, cols, dtype, store })
    }

    /// A tensor of zeros.
    pub fn zeros(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor> {
        let bytes = checked_mul("tensor bytes", checked_mul("tensor", rows, cols)?, dtype.bytes())?;
        let store = match &self.0 {
            // WebGPU's buffers start as zeros.
            Inner::Gpu(gpu) => TensorStore::Gpu(gpu.buffer("tensor", bytes, None)?),
            Inner::Cpu(_) => TensorStore::Cpu(Arc::new(RwLock::new(Matrix::zeros(rows, cols, dtype)?))),
        };
        Ok(Tensor { device: self.clone(), rows, cols, dtype, store })
    }

    /// Overwrites a tensor. An error if shape or type differ.
    pub fn write(&self, tensor: &Tensor, data: &Matrix) -> Result<()> {
        self.check_owner("tensor", &tensor.device)?;
        expect_shape("data", (data.rows(), data.cols()), (tensor.rows, tensor.cols))?;
        expect_dtype("data", data.dtype(), tensor.dtype)?;
        match (&self.0, &tensor.store) {
            (Inner::Gpu(gpu), TensorStore::Gpu(buffer)) => gpu.write(buffer, data.elements().as_bytes())?,
            (Inner::Cpu(cpu), TensorStore::Cpu(matrix)) => cpu.exclusively(|| write(matrix).copy_from(data))?,
            _ => return Err(other_device("tensor")),
        }
        Ok(())
    }

    /// [`Device::write`] of row-major elements in memory that belongs to somebody else: they are copied once. An error
    /// if their number or type differs.
    ///
    /// ```
    /// use sparse24::{DType, Device, Matrix};
    /// let device = Device::cpu()?;
    /// let x = device.zeros(2, 2, DType::F32)?;
    /// device.write_slice(&x, &[1.0f32, 2.0, 3.0, 4.0])?;
    /// assert_eq!(device.read(&x)?, Matrix::from_f32(2, 2, &[1.0, 2.0, 3.0, 4.0])?);
    /// assert!(device.write_slice(&x, &[1.0f32; 3]).unwrap_err().is_shape());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn write_slice<T: Element>(&self, tensor: &Tensor, data: &[T]) -> Result<()> {
        self.check_owner("tensor", &tensor.device)?;
        expect_len("data", data.len(), tensor.rows * tensor.cols)?;
        expect_dtype("data", T::DTYPE, tensor.dtype)?;
        match (&self.0, &tensor.store) {
            (Inner::Gpu(gpu), TensorStore::Gpu(buffer)) => gpu.write(buffer, bytemuck::cast_slice(data))?,
            (Inner::Cpu(cpu), TensorStore::Cpu(matrix)) => cpu.exclusively(|| write(matrix).write_slice(data))?,
            _ => return Err(other_device("tensor")),
        }
        Ok(())
    }

    /// Copies a tensor back, after everything that was submitted before.
    pub fn read(&self, tensor: &Tensor) -> Result<Matrix> {
        pollster::block_on(self.read_async(tensor))
    }

    /// [`Device::read`] where nothing may block. Errors of earlier calls that a browser tells of later come back here.
    pub async fn read_async(&self, tensor: &Tensor) -> Result<Matrix> {
        self.check_owner("tensor", &tensor.device)?;
        match &tensor.store {
            TensorStore::Gpu(buffer) => {
                let Inner::Gpu(gpu) = &self.0 else { return Err(other_device("tensor")) };
                let bytes = gpu.read(buffer, tensor.bytes() as usize).await?;
                Matrix::new(tensor.rows, tensor.cols, Elements::from_bytes(tensor.dtype, &bytes)?)
            }
            TensorStore::Cpu(matrix) => {
                memory::claim(tensor.bytes() as usize, || format!("copy of {} x {}", tensor.rows, tensor.cols))?;
                Ok(read(matrix).clone())
            }
        }
    }

    /// Waits until everything submitted so far is done. In a browser [`Device::read_async`] does.
    pub fn wait(&self) -> Result<()> {
        match &self.0 {
            Inner::Gpu(gpu) => gpu.wait(),
            Inner::Cpu(_) => Ok(()),
        }
    }

    /// Runs calls of this device one after another and times them together: by GPU timestamps where there are any, else
    /// by the host's clock until the device is done.
    pub fn time<'a>(&self, calls: impl Iterator<Item = &'a Prepared> + Clone) -> Result<Timing> {
        pollster::block_on(self.time_async(calls))
    }

    /// [`Device::time`] where nothing may block.
    pub async fn time_async<'a>(&self, calls: impl Iterator<Item = &'a Prepared> + Clone) -> Result<Timing> {
        for call in calls.clone() {
            self.check_owner("call", &call.device)?;
        }
        let start = Instant::now();
        let on_gpu = match &self.0 {
            Inner::Gpu(gpu) => gpu.submit_timed(calls.flat_map(|call| call.work.dispatches())).await?,
            Inner::Cpu(_) => {
                calls.into_iter().try_for_each(Prepared::run)?;
                None
            }
        };
        Ok(match on_gpu {
            Some(elapsed) => Timing { elapsed, clock: Clock::GpuTimestamps },
            None => Timing { elapsed: start.elapsed(), clock: Clock::HostWall },
        })
    }

    /// Runs calls of this device one after another: on a GPU as one submission, without waiting, on the CPU until all
    /// are done. Each call sees what those before it wrote.
    ///
    /// ```
    /// use sparse24::{DType, Device, LayerNorm, Matrix};
    /// let device = Device::cpu()?;
    /// let x = device.upload(&Matrix::from_f32(1, 2, &[1.0, 3.0])?)?;
    /// let (gamma, beta) = (device.upload(&Matrix::from_f32(1, 2, &[2.0, 2.0])?)?, device.zeros(1, 2, DType::F32)?);
    /// let (y, z) = (device.zeros(1, 2, DType::F32)?, device.zeros(1, 2, DType::F32)?);
    /// let norm = |x, y| device.prepare(&LayerNorm { x, gamma: &gamma, beta: &beta, eps: 0.0, y });
    /// device.submit(&[norm(&x, &y)?, norm(&y, &z)?])?;
    /// assert_eq!(device.read(&z)?, Matrix::from_f32(1, 2, &[-2.0, 2.0])?);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn submit(&self, calls: &[Prepared]) -> Result<()> {
        for call in calls {
            self.check_owner("call", &call.device)?;
        }
        match &self.0 {
            Inner::Gpu(gpu) => gpu.submit(calls.iter().flat_map(|call| call.work.dispatches())),
            Inner::Cpu(cpu) => cpu.exclusively(|| calls.iter().for_each(|call| call.work.run_now(cpu))),
        }
    }

    /// A call that measures a ceiling, and its work: operations, or bytes for a copy. `None` where the device cannot
    /// run it.
    pub(crate) fn probe(&self, probe: Probe) -> Result<Option<(Prepared, f64)>> {
        let gpu = match &self.0 {
            Inner::Gpu(gpu) => gpu,
            Inner::Cpu(cpu) => {
                let probe = match probe {
                    Probe::Fma(DType::F32) => CpuProbe::Fma,
                    Probe::Read(bytes) => CpuProbe::read(bytes as usize),
                    Probe::Fma(_) | Probe::Cooperative | Probe::Copy(_) => return Ok(None),
                };
                let work = cpu.probe_work(&probe);
                return Ok(Some((self.probe_call(Work::Cpu(Arc::new(probe)), work), work)));
            }
        };
        let caps = &gpu.info().caps;
        let runs = |program: Program| program.supported_by(caps).is_ok().then_some(program);
        // Four times what keeps the device busy, so that the last round of workgroups weighs little.
        let workgroups = |threads: u32| (4 * caps.busy_threads).div_ceil(threads).min(caps.grid);
        let (dispatch, work) = match probe {
            Probe::Cooperative => {
                let mut units = CoopUnit::ALL.into_iter();
                let found = units.find_map(|unit| Some((unit, runs(Program::new(ProbeCoop(unit)))?)));
                let Some((unit, program)) = found else { return Ok(None) };
                let workgroups = workgroups(128);
                // A block of f32 sums per chain and subgroup.
                let edge = unit.edge() as usize;
                let chains = workgroups as usize * (128 / unit.lanes() as usize) * PROBE_CHAINS;
                let y = gpu.buffer("probe", chains * edge * edge * 4, None)?;
                let dispatch = gpu.dispatch(&program, [workgroups, 1, 1], &(), &[Some(BufferRange::whole(&y))])?;
                (dispatch, chains as f64 * (2 * edge.pow(3) * PROBE_ROUNDS) as f64)
            }
            Probe::Fma(dtype) => {
                let Some(program) = runs(Program::new(ProbeFma(dtype))) else { return Ok(None) };
                let workgroups = workgroups(256);
                let threads = workgroups as usize * 256;
                let y = gpu.buffer("probe", threads * 4, None)?;
                // m is the factor of the chains: see shaders/probe_fma.wgsl.
                let params = Params { m: 1, ..Params::default() };
                let operands = [None, None, Some(BufferRange::whole(&y))];
                let dispatch = gpu.dispatch(&program, [workgroups, 1, 1], &params, &operands)?;
                (dispatch, threads as f64 * (2 * 4 * PROBE_CHAINS * PROBE_ROUNDS) as f64)
            }
            Probe::Copy(bytes) => {
                let bytes = bytes.min(caps.binding_bytes).min(caps.buffer_bytes) / 16 * 16;
                let vectors = bytes / 16;
                let workgroups = vectors.div_ceil(4 * 256).min(u64::from(caps.grid));
                let copied = vectors.min(workgroups * 4 * 256);
                let [x, y] = [gpu.buffer("probe", bytes as usize, None)?, gpu.buffer("probe", bytes as usize, None)?];
                let operands = [&x, &y].map(|buffer| Some(BufferRange::whole(buffer)));
                let params = CopyParams { n: vectors as u32 };
                let grid = [workgroups as u32, 1, 1];
                (gpu.dispatch(&Program::new(ProbeCopy), grid, &params, &operands)?, (2 * 16 * copied) as f64)
            }
            // GPUs use the copy bandwidth as their memory peak; there is no read-only probe.
            Probe::Read(_) => return Ok(None),
        };
        Ok(Some((self.probe_call(Work::Gpu(vec![dispatch]), work), work)))
    }

    /// A call that measures, of so many operations or bytes.
    fn probe_call(&self, work: Work, amount: f64) -> Prepared {
        Prepared::new(self, Cost { flops: amount, bytes: amount }, work)
    }

    /// Where it computes.
    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    /// An error that names `what`, unless `owner` is this device.
    pub(crate) fn check_owner(&self, what: &str, owner: &Self) -> Result<()> {
        let same = match (&self.0, &owner.0) {
            (Inner::Gpu(a), Inner::Gpu(b)) => Arc::ptr_eq(a, b),
            (Inner::Cpu(a), Inner::Cpu(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        if same { Ok(()) } else { Err(other_device(what)) }
    }
}

impl Tensor {
    /// A buffer of the caller's, holding a row-major matrix from its start, to use with the device of
    /// [`Device::from_wgpu`] that it belongs to. It needs the usage `STORAGE`, and `COPY_SRC` or `COPY_DST` to be read
    /// or written through [`Device`].
    pub fn from_buffer(device: &Device, buffer: wgpu::Buffer, rows: usize, cols: usize, dtype: DType) -> Result<Self> {
        if matches!(device.0, Inner::Cpu(_)) {
            return Err(Error::invalid("a wgpu buffer cannot be used on the CPU device"));
        }
        let bytes = checked_mul("tensor bytes", checked_mul("tensor", rows, cols)?, dtype.bytes())?;
        // Bindings and copies have whole words.
        let needed = (bytes as u64).next_multiple_of(4);
        if buffer.size() < needed {
            return Err(Error::invalid(format!(
                "buffer holds {} bytes, a tensor of {rows} x {cols} {dtype} needs {needed}",
                buffer.size()
            )));
        }
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::invalid("buffer lacks the usage STORAGE"));
        }
        Ok(Self { device: device.clone(), rows, cols, dtype, store: TensorStore::Gpu(buffer) })
    }
}

impl Prepared {
    pub(crate) fn new(device: &Device, cost: Cost, work: Work) -> Self {
        Self { device: device.clone(), cost, work }
    }

    /// What it must do at least.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// Computes the output: on a GPU submits and returns without waiting, on the CPU returns when it is done.
    pub fn run(&self) -> Result<()> {
        match &self.device.0 {
            Inner::Gpu(gpu) => gpu.submit(self.work.dispatches().iter()),
            Inner::Cpu(cpu) => cpu.exclusively(|| self.work.run_now(cpu)),
        }
    }

    /// The call as one that can be recorded; `None` on the CPU device, which has no encoders and computes in
    /// [`Prepared::run`].
    pub fn on_gpu(&self) -> Option<GpuCall<'_>> {
        match &self.work {
            Work::Gpu(dispatches) => Some(GpuCall(dispatches)),
            Work::Cpu(_) => None,
        }
    }
}

/// A [`Prepared`] call of a GPU.
#[derive(Clone, Copy, Debug)]
pub struct GpuCall<'a>(&'a [Dispatch]);

impl GpuCall<'_> {
    /// Records the call into the caller's encoder, as one compute pass. Nothing is submitted, waited for or copied.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        Gpu::record(encoder, self.0.iter(), None);
    }
}

fn cpu_weights(weights: CpuWeights) -> WeightStore {
    WeightStore::Cpu(Arc::new(RwLock::new(weights)))
}

/// Whether `auto` takes an adapter. A browser has one, and does not say of which kind.
fn is_hardware(info: &AdapterInfo) -> bool {
    cfg!(target_family = "wasm") || matches!(info.kind, AdapterKind::Discrete | AdapterKind::Integrated)
}

pub(crate) fn other_device(what: &str) -> Error {
    Error::mismatch(what, "another device", "one of this device")
}

fn upload(gpu: &Gpu, label: &str, bytes: &[u8]) -> Result<wgpu::Buffer> {
    gpu.buffer(label, bytes.len(), Some(bytes))
}

/// The elements, with bf16 widened to f32: no kernel computes on bf16.
fn widen_elements(data: &Elements) -> Cow<'_, Elements> {
    match data {
        Elements::Bf16(_) => Cow::Owned(Elements::F32(data.to_f32())),
        Elements::F32(_) | Elements::F16(_) => Cow::Borrowed(data),
    }
}

/// The matrix, with bf16 widened to f32.
fn widen(matrix: &Matrix) -> Cow<'_, Matrix> {
    match matrix.dtype() {
        DType::Bf16 => Cow::Owned(matrix.cast(DType::F32)),
        DType::F32 | DType::F16 => Cow::Borrowed(matrix),
    }
}

/// Uploads weights of `shape` (m, k), `cols` of them stored to a row, with the words of mask bits or codes, in pieces
/// that can be bound.
fn upload_pieces(
    gpu: &Gpu,
    op: Op,
    elements: &Elements,
    (m, k): (usize, usize),
    cols: usize,
    words: &[u32],
) -> Result<WeightStore> {
    let limit = gpu.info().caps.binding_bytes.min(gpu.info().caps.buffer_bytes);
    let pieces = layout::pieces(op, m, k, elements.dtype(), limit).ok_or_else(|| {
        Error::too_large(
            "binding of 128 rows of weights",
            format!("{} bytes", layout::value_bytes(op, 128, k, elements.dtype())),
            format!("{limit} bytes"),
        )
    })?;
    let pieces = pieces.into_iter().map(|rows| {
        let content = layout::values(op, elements, cols, k, rows.clone());
        // Empty weights need a buffer too: wgpu wants at least one element of the binding's array, which in the shaders
        // has 16 bytes at most.
        let values = gpu.buffer("weights", content.len().max(256), Some(&content))?;
        let words = match op {
            Op::Dense => None,
            _ => Some(upload(gpu, "words", bytemuck::cast_slice(&layout::words(op, words, k, rows)))?),
        };
        Ok(Piece { values, words })
    });
    Ok(WeightStore::Gpu(pieces.collect::<Result<_>>()?))
}
