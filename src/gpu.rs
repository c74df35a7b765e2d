//! wgpu: adapters, a device with its caches, buffers, dispatches, timestamps, read-back.
//!
//! The only file with `unsafe` towards the GPU, and with [`crate::engine`] the only one that names wgpu. Invariant:
//! programs run on bind groups that have exactly the bindings that they declare, each exactly as long as its operand.
//!
//! What waits for the device is `async`. Outside a browser such a future is ready when it is first polled, for it waits
//! itself; in a browser nothing may block, and the page's event loop wakes it.
//!
//! Every wgpu call that can fail comes back as an [`Error`], for wgpu's own answer to an error that nobody takes is to
//! panic. Where memory is allocated or shaders are compiled, error scopes are around the call. What every run of a
//! kernel does, to write, submit and read, has none on a device that was opened here: its handler, which wgpu calls on
//! the thread that made the call, keeps the error, and the call looks there when it is done. In a browser errors come
//! later than the calls, and scopes could only be waited for: there the handler keeps all of them, and the next call
//! returns one. As results are read before they are believed, none is lost. A device that the caller opened has the
//! caller's handler, so that scopes are around all calls.

mod pipeline_file;

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::ThreadId;
use std::time::Duration;

use web_time::Instant;

use crate::error::{Error, Result};
use crate::kernels::{
    Architecture, Binding, BindingAccess, Caps, CoopCheck, CoopShape, CoopUnit, Program, Rates, ShaderChecks,
    check_len, check_result,
};
use crate::plan::Tuning;

/// How long a callback that another thread has taken may be in coming.
const CALLBACK: Duration = Duration::from_secs(2);

/// What kind of hardware an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterKind {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the processor's memory.
    Integrated,
    /// A GPU of a virtual machine.
    Virtual,
    /// A driver that computes on the processor, such as llvmpipe or SwiftShader.
    Software,
    /// Unknown to the driver.
    Other,
}

impl AdapterKind {
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Software => "software",
            Self::Other => "other",
        }
    }
}

/// One adapter, as its driver describes it.
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// Name of the hardware.
    pub name: String,
    /// Name and version of the driver.
    pub driver: String,
    /// `vulkan`, `metal`, `dx12` or a browser's `webgpu`.
    pub backend: String,
    /// Kind of hardware.
    pub kind: AdapterKind,
    /// What it offers to kernels.
    pub caps: Caps,
}

/// An adapter that a device can be opened on.
pub(crate) struct Adapter {
    pub(crate) info: AdapterInfo,
    adapter: wgpu::Adapter,
}

/// Every adapter that wgpu finds, in the order in which `auto` would prefer them; none if there is no driver. A browser
/// has one at most.
pub(crate) async fn adapters() -> Vec<Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    // No validation layers: this crate's calls are validated by wgpu itself, and layers would slow what is measured.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    #[cfg(not(target_family = "wasm"))]
    let found = instance.enumerate_adapters(wgpu::Backends::PRIMARY).await;
    #[cfg(target_family = "wasm")]
    let found = {
        let fastest = wgpu::PowerPreference::HighPerformance;
        let options = wgpu::RequestAdapterOptions { power_preference: fastest, ..Default::default() };
        instance.request_adapter(&options).await
    };
    let mut adapters: Vec<_> = found
        .into_iter()
        .map(|adapter| {
            let cooperative = adapter.cooperative_matrix_properties();
            let caps = caps(adapter.features(), &adapter.limits(), &adapter.get_info(), &cooperative);
            Adapter { info: describe(adapter.get_info(), caps), adapter }
        })
        .collect();
    adapters.sort_by_key(|a| match a.info.kind {
        AdapterKind::Discrete => 0,
        AdapterKind::Integrated => 1,
        AdapterKind::Virtual => 2,
        AdapterKind::Other => 3,
        AdapterKind::Software => 4,
    });
    adapters
}

fn describe(info: wgpu::AdapterInfo, caps: Caps) -> AdapterInfo {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
        wgpu::DeviceType::VirtualGpu => AdapterKind::Virtual,
        wgpu::DeviceType::Cpu => AdapterKind::Software,
        wgpu::DeviceType::Other => AdapterKind::Other,
    };
    let driver = [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_owned();
    AdapterInfo { name: info.name, driver, backend: info.backend.to_string(), kind, caps }
}

/// What a device is opened with: of what kernels use, all that the adapter has, and what keeps them compiled.
pub(crate) fn descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
    let used = wgpu::Features::SHADER_F16
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::SUBGROUP
        | wgpu::Features::PIPELINE_CACHE;
    wgpu::DeviceDescriptor {
        label: Some("sparse24"),
        required_features: adapter.features() & used,
        required_limits: adapter.limits(),
        ..Default::default()
    }
}

fn caps(
    features: wgpu::Features,
    limits: &wgpu::Limits,
    info: &wgpu::AdapterInfo,
    cooperative: &[wgpu::CooperativeMatrixProperties],
) -> Caps {
    let scalar = |t| match t {
        wgpu::CooperativeScalarType::F32 => "f32",
        wgpu::CooperativeScalarType::F16 => "f16",
        wgpu::CooperativeScalarType::I32 => "i32",
        wgpu::CooperativeScalarType::U32 => "u32",
    };
    let cooperative: Vec<_> = cooperative
        .iter()
        .map(|p| CoopShape { m: p.m_size, n: p.n_size, k: p.k_size, ab: scalar(p.ab_type), c: scalar(p.cr_type) })
        .collect();
    let rates = rates(info.device_type, &cooperative);
    Caps {
        architecture: Architecture::nearest(info.vendor, &info.name),
        f16: features.contains(wgpu::Features::SHADER_F16),
        subgroups: features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size)),
        cooperative,
        cooperative_lanes: None,
        cooperative_refused: known_wrong(info).map(str::to_owned),
        cooperative_scalars: info.backend == wgpu::Backend::Metal,
        emulates_cooperative: false,
        // A browser's software adapter is SwiftShader, which takes seconds to compile a kernel with unrolled loops.
        unrolls: !(cfg!(target_family = "wasm") && info.device_type == wgpu::DeviceType::Cpu),
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        workgroup_memory: limits.max_compute_workgroup_storage_size,
        workgroup_threads: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
        grid: limits.max_compute_workgroups_per_dimension,
        // About half of what each kind holds: 132 x 2048 on an H200, a few thousand on a laptop's GPU, two workgroups
        // on each of the processor's cores.
        busy_threads: match info.device_type {
            wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::VirtualGpu => 1 << 17,
            wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::Other => 1 << 13,
            wgpu::DeviceType::Cpu => 512,
        },
        rates,
        // Kernels index elements of two bytes and more with u32.
        binding_bytes: limits.max_storage_buffer_binding_size.min(1 << 32),
        buffer_bytes: limits.max_buffer_size,
    }
}

/// Why a driver's cooperative matrices are not used whatever they compute in [`CoopCheck`], for drivers that are
/// known to be wrong or useless. Sources: Mesa's issue 15932 with cubecl's pull request 1444, and llama.cpp's pull
/// request 24404.
fn known_wrong(info: &wgpu::AdapterInfo) -> Option<&'static str> {
    const INTEL: u32 = 0x8086;
    if info.vendor != INTEL {
        return None;
    }
    let name = info.name.to_lowercase();
    // Device numbers of Panther Lake and Wildcat Lake; Mesa names their GPUs after the processors.
    let numbered = matches!(info.device, 0xb080..=0xb0bf | 0xfd80..=0xfd8f);
    let xe3 = numbered || ["(ptl)", "(wcl)", "xe3"].iter().any(|part| name.contains(part));
    if xe3 && info.backend == wgpu::Backend::Vulkan && info.driver.to_lowercase().contains("mesa") {
        return Some("Mesa's driver for Intel's Xe3 loads the first block of workgroup memory, whichever is asked for");
    }
    if name.contains("a770") {
        return Some("up to a thousand times slower than plain arithmetic on Intel's Arc A770");
    }
    None
}

/// What a device of a kind does per second, roughly.
fn rates(kind: wgpu::DeviceType, shapes: &[CoopShape]) -> Rates {
    let rates = match kind {
        wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::VirtualGpu => Rates::DISCRETE,
        wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::Other => Rates::INTEGRATED,
        wgpu::DeviceType::Cpu => Rates::SOFTWARE,
    };
    // GPUs whose blocks are no larger than 8, Apple's, multiply them in their plain units: what is saved is
    // instructions, which makes up for the half of the rate that the planner counts on, and little more.
    let large = CoopUnit::ALL.into_iter().any(|unit| unit.edge() > 8 && shapes.contains(&unit.shape()));
    match large || shapes.is_empty() {
        true => rates,
        false => Rates { cooperative: rates.cooperative.min(2.0 * rates.fma), ..rates },
    }
}

/// A range of a buffer that a program binds.
#[derive(Clone, Copy)]
pub(crate) struct BufferRange<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl<'a> BufferRange<'a> {
    /// All of a buffer.
    pub(crate) fn whole(buffer: &'a wgpu::Buffer) -> Self {
        Self { buffer, offset: 0, bytes: buffer.size() }
    }
}

/// A dispatch with everything bound: recording it allocates nothing.
#[derive(Clone, Debug)]
pub struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    grid: [u32; 3],
}

/// What the dispatches of all calls share: each fills it before it reads it, and a queue runs them one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scratch {
    /// Activations in the kernels' own shape, or a few numbers of each token.
    Packed,
    /// The sums of the splits of k, or of blocks of tokens.
    Partial,
    /// What is kept of each query's softmax for the gradients of its keys.
    Statistics,
    /// Sums of some rows of a gradient, on their way to the sum of all.
    Sums,
}

impl Scratch {
    const COUNT: usize = Self::Sums as usize + 1;
}

/// An open device, with what is compiled and allocated once.
pub struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: AdapterInfo,
    checks: ShaderChecks,
    /// One for each list of bindings.
    layouts: Mutex<HashMap<&'static [Binding], Layout>>,
    /// Bound where a kernel has no operand, or an empty one: a binding cannot be empty.
    nothing: wgpu::Buffer,
    /// By the name of the program that stands for all of a text.
    modules: Mutex<HashMap<String, wgpu::ShaderModule>>,
    pipelines: Mutex<HashMap<Program, wgpu::ComputePipeline>>,
    scratch: Mutex<[Option<wgpu::Buffer>; Scratch::COUNT]>,
    tuning: Mutex<Arc<Tuning>>,
    /// What is not in use.
    staging: Mutex<Option<wgpu::Buffer>>,
    clocks: Mutex<Vec<Clock>>,
    lost: Arc<Mutex<Option<String>>>,
    /// What the device's own handler was told, until a call returns it. A device of the caller's has another handler.
    reported: Option<Reported>,
    kept: Mutex<Option<KeptPipelines>>,
}

/// The first error of each thread that was reported and that no call of it has returned yet.
type Reported = Arc<Mutex<HashMap<ThreadId, wgpu::Error>>>;

/// Compiled pipelines that are kept for the next process.
struct KeptPipelines {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    key: String,
    /// What the file has.
    stored: Option<Vec<u8>>,
    /// Whether a pipeline was made since it was read.
    is_used: bool,
}

/// How a program's bindings are used.
#[derive(Clone)]
struct Layout {
    bindings: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

/// Two timestamps and the buffer they are resolved to.
struct Clock {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("info", &self.info).field("checks", &self.checks).finish_non_exhaustive()
    }
}

impl Adapter {
    /// Opens the adapter with all its limits and the features that kernels use.
    ///
    /// With `emulate`, kernels of such cooperative matrices run in plain WGSL, whatever the adapter has. `unroll`
    /// overrides the adapter's kind, and `scalars` how their tiles are held.
    ///
    /// Else the adapter's cooperative matrices are put to the test, unless its driver is refused by name: kernels use
    /// them only where it multiplies as it should, in subgroups of the width that was seen then.
    #[allow(unsafe_code, reason = "cooperative matrices are experimental in wgpu")]
    pub(crate) async fn open(
        mut self,
        checks: ShaderChecks,
        emulate: Option<CoopUnit>,
        unroll: Option<bool>,
        scalars: Option<bool>,
    ) -> Result<Gpu> {
        let caps = &mut self.info.caps;
        caps.unrolls = unroll.unwrap_or(caps.unrolls);
        caps.cooperative_scalars = scalars.unwrap_or(caps.cooperative_scalars);
        let offered = CoopUnit::ALL.into_iter().any(|unit| caps.cooperative.contains(&unit.shape()));
        let offered = offered && self.adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        let tested = offered && emulate.is_none() && caps.cooperative_refused.is_none();
        let mut descriptor = descriptor(&self.adapter);
        if let Some(unit) = emulate {
            self.info.caps.emulates_cooperative = true;
            self.info.caps.cooperative = vec![unit.shape()];
            self.info.caps.cooperative_lanes = Some(unit.lanes());
            self.info.caps.cooperative_refused = None;
        } else if tested {
            descriptor.required_features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            // SAFETY: what is experimental is used by this crate's own coop shaders alone, whose every load and store
            // lies within workgroup memory or the bound output, and whose results each test and each benchmark row
            // checks; `check_cooperative` has seen a product come out right before any of them runs. Gain: not measured
            // yet; the hardware's ratio is in the ceilings of a run.
            descriptor.experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
        }
        let (device, queue) = self
            .adapter
            .request_device(&descriptor)
            .await
            .map_err(|e| Error::gpu(format!("open {}", self.info.name), e.to_string()))?;
        let lost = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&lost);
        device.set_device_lost_callback(move |reason, message| {
            let text = if message.is_empty() { format!("{reason:?}") } else { message };
            *lock(&slot) = Some(text);
        });
        let reported = Reported::default();
        let slot = Arc::clone(&reported);
        device.on_uncaptured_error(Arc::new(move |error| {
            lock(&slot).entry(std::thread::current().id()).or_insert(error);
        }));
        let mut gpu = Gpu::new(device, queue, self.info, checks, lost, Some(reported))?;
        if tested {
            gpu.check_cooperative().await;
        }
        Ok(gpu)
    }
}

/// Something that a callback of wgpu's brings.
struct Signal<T>(Arc<Mutex<(Option<T>, Option<Waker>)>>);

impl<T> Signal<T> {
    fn new() -> Self {
        Self(Arc::new(Mutex::new((None, None))))
    }

    fn set(&self, value: T) {
        let mut slot = lock(&self.0);
        slot.0 = Some(value);
        if let Some(waker) = slot.1.take() {
            waker.wake();
        }
    }
}

impl<T> Clone for Signal<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Future for Signal<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut slot = lock(&self.0);
        match slot.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                slot.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Caches stay valid when a thread panics between two insertions.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Takes over a device that the caller opened. Its callbacks stay the caller's.
    pub(crate) fn from_wgpu(device: wgpu::Device, queue: wgpu::Queue, checks: ShaderChecks) -> Result<Self> {
        let info = device.adapter_info();
        let caps = caps(device.features(), &device.limits(), &info, &[]);
        Self::new(device, queue, describe(info, caps), checks, Arc::default(), None)
    }

    fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        info: AdapterInfo,
        checks: ShaderChecks,
        lost: Arc<Mutex<Option<String>>>,
        reported: Option<Reported>,
    ) -> Result<Self> {
        let nothing = scoped(&device, &lost, "set up device", || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("nothing"),
                size: 16,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        })?;
        Ok(Self {
            device,
            queue,
            info,
            checks,
            layouts: Mutex::default(),
            nothing,
            modules: Mutex::default(),
            pipelines: Mutex::default(),
            scratch: Mutex::default(),
            tuning: Mutex::default(),
            staging: Mutex::default(),
            clocks: Mutex::default(),
            kept: Mutex::default(),
            reported,
            lost,
        })
    }

    pub(crate) fn info(&self) -> &AdapterInfo {
        &self.info
    }

    pub(crate) fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.info.name);
    }

    pub(crate) fn tuning(&self) -> Arc<Tuning> {
        Arc::clone(&lock(&self.tuning))
    }

    pub(crate) fn set_tuning(&self, tuning: Tuning) {
        *lock(&self.tuning) = Arc::new(tuning);
    }

    pub(crate) fn checks(&self) -> ShaderChecks {
        self.checks
    }

    /// Makes wgpu calls that allocate or compile.
    fn scoped<T>(&self, what: &str, call: impl FnOnce() -> T) -> Result<T> {
        let result = scoped(&self.device, &self.lost, what, call);
        // The handler's is taken in any case, or the next call would be blamed for it.
        self.unreported(what, result)
    }

    /// Makes wgpu calls of those that every run makes.
    fn steady<T>(&self, what: &str, call: impl FnOnce() -> T) -> Result<T> {
        if self.reported.is_none() {
            return self.scoped(what, call);
        }
        expect_there(&self.lost)?;
        let result = call();
        let result = expect_there(&self.lost).map(|()| result);
        self.unreported(what, result)
    }

    /// A result, unless the handler was told of an error by a call of this thread.
    fn unreported<T>(&self, what: &str, result: Result<T>) -> Result<T> {
        let this = std::thread::current().id();
        match self.reported.as_ref().and_then(|reported| lock(reported).remove(&this)) {
            Some(error) if result.is_ok() => Err(error_of(&self.device, what, error)),
            _ => result,
        }
    }

    /// Takes compiled pipelines from a file in a folder, if it has one of this device, and keeps those that are
    /// compiled from now on there when this is dropped. False where the device hands out none.
    #[allow(unsafe_code, reason = "a driver believes the pipelines that it is given")]
    pub(crate) fn keep_pipelines(&self, folder: &Path) -> Result<bool> {
        let key = wgpu::util::pipeline_cache_key(&self.device.adapter_info());
        let Some(key) = key.filter(|_| self.device.features().contains(wgpu::Features::PIPELINE_CACHE)) else {
            return Ok(false);
        };
        // What was kept until now is written where it belongs, which may be the file that is read next.
        let before = lock(&self.kept).take();
        before.map_or(Ok(()), KeptPipelines::write)?;
        let path = pipeline_file::path_in(folder, &key);
        let stored = pipeline_file::read(&path, &key);
        let cache = self.scoped("take over compiled pipelines", || {
            let (label, data) = (Some("kernels"), stored.as_deref());
            // SAFETY: the data are bytes that `get_data` returned for this key and that `pipeline_file` has found
            // unchanged; wgpu and the driver refuse those of another device or version, and begin anew. Gain: a second
            // process compiles nothing, where the driver puts pipelines into its data. Mesa's llvmpipe puts none there.
            unsafe {
                let descriptor = wgpu::PipelineCacheDescriptor { label, data, fallback: true };
                self.device.create_pipeline_cache(&descriptor)
            }
        })?;
        *lock(&self.kept) = Some(KeptPipelines { cache, path, key, stored, is_used: false });
        Ok(true)
    }

    /// The cache to compile with, which gets what is compiled.
    fn pipeline_cache(&self) -> Option<wgpu::PipelineCache> {
        let mut kept = lock(&self.kept);
        let kept = kept.as_mut()?;
        kept.is_used = true;
        Some(kept.cache.clone())
    }

    /// A buffer of `bytes`, rounded up to whole words, that starts with the given content and goes on with zeros.
    pub(crate) fn buffer(&self, label: &str, bytes: usize, content: Option<&[u8]>) -> Result<wgpu::Buffer> {
        let size = (bytes as u64).next_multiple_of(4).max(4);
        if size > self.info.caps.buffer_bytes {
            return Err(Error::too_large(
                format!("buffer of {label}"),
                format!("{size} bytes"),
                format!("{} bytes", self.info.caps.buffer_bytes),
            ));
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        self.filled_buffer(label, size, usage, content.unwrap_or_default())
    }

    /// A buffer of `size` bytes that starts with `content`, and zeros after it.
    fn filled_buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages, content: &[u8]) -> Result<wgpu::Buffer> {
        let (buffer, mapped) = self.scoped(&format!("allocate {size} bytes for {label}"), || {
            let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation: true,
            });
            let view = buffer.get_mapped_range_mut(..).map(|mut view| {
                view.slice(..content.len()).copy_from_slice(content);
            });
            buffer.unmap();
            (buffer, view.is_ok())
        })?;
        // An allocation that fails without an error has failed on a lost device: see `is_lost`.
        if mapped { Ok(buffer) } else { Err(self.gone()) }
    }

    fn gone(&self) -> Error {
        Error::device_lost(lock(&self.lost).clone().unwrap_or_else(|| "it no longer answers".into()))
    }

    /// Overwrites the start of a buffer. `data` must not be longer than it. An error if it ends within a word and the
    /// buffer goes on behind that, since only whole words can be written.
    pub(crate) fn write(&self, buffer: &wgpu::Buffer, data: &[u8]) -> Result<()> {
        let whole = data.len() / 4 * 4;
        if whole < data.len() && buffer.size() > whole as u64 + 4 {
            let reason = "an odd number of f16 elements cannot be written into a longer buffer";
            return Err(Error::invalid(reason));
        }
        self.steady("write buffer", || {
            self.queue.write_buffer(buffer, 0, &data[..whole]);
            if whole < data.len() {
                // Writes are whole words; an odd f16 at the end gets a zero beside it, in the buffer's own padding.
                let mut last = [0; 4];
                last[..data.len() - whole].copy_from_slice(&data[whole..]);
                self.queue.write_buffer(buffer, whole as u64, &last);
            }
        })
    }

    /// The first `bytes` of a buffer, after everything submitted so far.
    pub(crate) async fn read(&self, buffer: &wgpu::Buffer, bytes: usize) -> Result<Vec<u8>> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let size = (bytes as u64).next_multiple_of(4);
        let unused = lock(&self.staging).take();
        let staging = match unused.filter(|s| s.size() >= size) {
            Some(staging) => staging,
            None => self.scoped(&format!("allocate {size} bytes to read back"), || {
                self.device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("read back"),
                    size,
                    usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
                    mapped_at_creation: false,
                })
            })?,
        };
        self.steady("read back", || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, size);
            self.queue.submit([encoder.finish()]);
        })?;
        let mapped = Signal::new();
        let result = mapped.clone();
        self.steady("map", || staging.map_async(wgpu::MapMode::Read, ..size, move |r| result.set(r)))?;
        if !matches!(self.until(mapped).await?, Some(Ok(()))) {
            return Err(self.gone());
        }
        let data = staging.get_mapped_range(..size).map_err(|_| self.gone())?[..bytes].to_vec();
        staging.unmap();
        *lock(&self.staging) = Some(staging);
        // What a browser reported of the calls that came before.
        self.steady("read back", || data)
    }

    /// What a callback brings when everything submitted so far is done; `None` if it was not called, as can be on a
    /// lost device.
    async fn until<T>(&self, signal: Signal<T>) -> Result<Option<T>> {
        if cfg!(target_family = "wasm") {
            return Ok(Some(signal.await));
        }
        self.wait()?;
        // Another thread that waits may have taken this one's callback, and be about to call it.
        let start = Instant::now();
        loop {
            let brought = lock(&signal.0).0.take();
            if brought.is_some() || lock(&self.lost).is_some() || start.elapsed() > CALLBACK {
                return Ok(brought);
            }
            std::thread::yield_now();
        }
    }

    /// As [`Gpu::wait`], without blocking.
    pub(crate) async fn finished(&self) -> Result<()> {
        let done = Signal::new();
        let told = done.clone();
        self.queue.on_submitted_work_done(move || told.set(()));
        self.until(done).await?;
        self.steady("wait for device", || ())
    }

    /// Finds out what the driver's cooperative matrices are worth, and leaves it in the capabilities. What fails here
    /// fails no one: there are other kernels.
    async fn check_cooperative(&mut self) {
        let mut found = None;
        for edge in [8, 16] {
            let program = Program::new(CoopCheck { edge });
            if program.supported_by(&self.info.caps).is_err() {
                continue;
            }
            match (self.run_check(&program, edge).await, found) {
                (Ok(lanes), None) => found = Some(lanes),
                (Ok(lanes), Some(other)) if lanes == other => {}
                (Ok(lanes), Some(other)) => {
                    let refused = format!("its subgroups are {other} lanes wide for one shape and {lanes} for another");
                    self.info.caps.cooperative_refused = Some(refused);
                }
                (Err(refused), _) => self.info.caps.cooperative_refused = Some(refused),
            }
        }
        self.info.caps.cooperative_lanes = found.filter(|_| self.info.caps.cooperative_refused.is_none());
    }

    async fn run_check(&self, program: &Program, edge: u32) -> std::result::Result<u32, String> {
        let bytes = 4 * check_len(edge);
        let run = async {
            let y = self.buffer("check", bytes, None)?;
            let dispatch = self.dispatch(program, [1, 1, 1], &(), &[Some(BufferRange::whole(&y))])?;
            self.submit(std::iter::once(&dispatch))?;
            self.read(&y, bytes).await
        };
        let read = run.await.map_err(|e: Error| e.to_string())?;
        check_result(edge, &bytemuck::pod_collect_to_vec(&read))
    }

    /// Waits for everything submitted so far; in a browser it cannot.
    pub(crate) fn wait(&self) -> Result<()> {
        // wgpu panics when the driver reports a lost device from a wait. (In programs that abort on panic this cannot
        // help.)
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(wgpu::PollType::wait_indefinitely())));
        match polled {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) if lock(&self.lost).is_some() || is_lost(&self.device) => Err(self.gone()),
            Ok(Err(e)) => Err(Error::gpu("wait for device", e.to_string())),
            Err(_) => Err(self.gone()),
        }
    }

    /// A buffer of at least `bytes` that all calls share.
    pub(crate) fn scratch(&self, which: Scratch, bytes: u64) -> Result<wgpu::Buffer> {
        let mut slots = lock(&self.scratch);
        let slot = &mut slots[which as usize];
        if let Some(buffer) = slot.as_ref().filter(|b| b.size() >= bytes) {
            return Ok(buffer.clone());
        }
        // Calls that are already bound keep the one they have.
        let buffer = self.buffer("scratch", bytes as usize, None)?;
        *slot = Some(buffer.clone());
        Ok(buffer)
    }

    /// The layout of a program's bindings, from the cache after the first time. An error if the device has too few.
    fn layout_of(&self, program: &Program) -> Result<Layout> {
        let list = program.bindings();
        if let Some(layout) = lock(&self.layouts).get(list) {
            return Ok(layout.clone());
        }
        let buffers = list.iter().filter(|binding| binding.access != BindingAccess::Uniform).count();
        if buffers > self.device.limits().max_storage_buffers_per_shader_stage as usize {
            return Err(Error::missing_feature(
                self.info.name.clone(),
                format!("{buffers} storage buffers per shader stage"),
            ));
        }
        let name = program.to_string();
        let layout = self.scoped(&format!("lay out the bindings of {name}"), || {
            let entries: Vec<_> = list
                .iter()
                .map(|binding| wgpu::BindGroupLayoutEntry {
                    binding: binding.number,
                    visibility: wgpu::ShaderStages::COMPUTE,
                    ty: wgpu::BindingType::Buffer {
                        ty: match binding.access {
                            BindingAccess::Uniform => wgpu::BufferBindingType::Uniform,
                            BindingAccess::Read => wgpu::BufferBindingType::Storage { read_only: true },
                            BindingAccess::Write => wgpu::BufferBindingType::Storage { read_only: false },
                        },
                        has_dynamic_offset: false,
                        min_binding_size: None,
                    },
                    count: None,
                })
                .collect();
            let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(&name), entries: &entries };
            let bindings = self.device.create_bind_group_layout(&descriptor);
            let pipeline = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(&name),
                bind_group_layouts: &[Some(&bindings)],
                immediate_size: 0,
            });
            Layout { bindings, pipeline }
        })?;
        lock(&self.layouts).insert(list, layout.clone());
        Ok(layout)
    }

    /// The compiled pipeline of a program, from the cache after the first time.
    fn pipeline(&self, program: &Program) -> Result<wgpu::ComputePipeline> {
        if let Some(pipeline) = lock(&self.pipelines).get(program) {
            return Ok(pipeline.clone());
        }
        program.supported_by(&self.info.caps).map_err(|feature| Error::missing_feature(&self.info.name, feature))?;
        let name = program.to_string();
        let layout = self.layout_of(program)?;
        let cached = lock(&self.modules).get(&program.module()).cloned();
        let module = match cached {
            Some(module) => module,
            None => {
                let source = program.source_for(&self.info.caps)?;
                let module = self.scoped(&format!("compile {name}"), || self.module(&name, source))?;
                lock(&self.modules).insert(program.module(), module.clone());
                module
            }
        };
        let cache = self.pipeline_cache();
        let pipeline = self.scoped(&format!("build {name}"), || {
            self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&name),
                layout: Some(&layout.pipeline),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &program.overrides(),
                    zero_initialize_workgroup_memory: self.checks == ShaderChecks::Checked,
                },
                cache: cache.as_ref(),
            })
        })?;
        lock(&self.pipelines).insert(program.clone(), pipeline.clone());
        Ok(pipeline)
    }

    /// Compiles a program ahead of its first dispatch.
    pub(crate) fn compile(&self, program: &Program) -> Result<()> {
        self.pipeline(program).map(drop)
    }

    #[allow(unsafe_code, reason = "trusted shader modules")]
    fn module(&self, name: &str, source: String) -> wgpu::ShaderModule {
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(name), source: wgpu::ShaderSource::Wgsl(source.into()) };
        match self.checks {
            ShaderChecks::Checked => self.device.create_shader_module(descriptor),
            // SAFETY: the source is this crate's own. Reads clamp the feature to the last panel and the token to the
            // last one, and k runs below its padded value, which are the sizes of what is bound (`layout::value_bytes`,
            // `Plan::steps`, `dispatch`); writes are guarded by m, n and the number of outputs. Workgroup and private
            // arrays are indexed below their constant sizes, gathers by 2-bit positions within a group; every loop
            // counts up to a finite bound; divisors are constants or numbers of tiles and features that are not zero
            // where anything is dispatched; workgroup memory is written before it is read. Kernels between the GEMMs
            // bound every id by its table's rows, every length by the rows of a sequence, what is past by those of its
            // cache, every position by those of the tables and every distance by those of the bias where they read it.
            // Those that prune and decompress guard rows, columns and words by the sizes of W, from which the sizes of
            // all that is bound follow; positions in a group have two bits. Gain: none on llvmpipe that its noise would
            // show since loops are unrolled (benches/results/2026-11-23-llvmpipe; 3.8 to 4.0 times before), not
            // measured on a GPU.
            ShaderChecks::Trusted => unsafe {
                self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
            },
        }
    }

    /// Binds a program's parameters, where it has any, and its operands, in the order of its bindings. `None` binds
    /// nothing of consequence. An error if a buffer ends before what is to be bound, or the binding is larger than the
    /// device allows.
    pub(crate) fn dispatch(
        &self,
        program: &Program,
        grid: [u32; 3],
        params: &impl bytemuck::NoUninit,
        operands: &[Option<BufferRange<'_>>],
    ) -> Result<Dispatch> {
        let pipeline = self.pipeline(program)?;
        let (uniforms, buffers): (Vec<&Binding>, Vec<&Binding>) =
            program.bindings().iter().partition(|binding| binding.access == BindingAccess::Uniform);
        if buffers.len() != operands.len() {
            let (has, given) = (buffers.len(), operands.len());
            return Err(Error::invalid(format!("{program} has {has} operands, not {given}")));
        }
        let nothing = BufferRange { buffer: &self.nothing, offset: 0, bytes: 16 };
        let mut bound = Vec::with_capacity(buffers.len());
        for (slot, operand) in buffers.iter().zip(operands) {
            let binding = operand.filter(|b| b.bytes > 0).unwrap_or(nothing);
            let bytes = binding.bytes.next_multiple_of(4);
            let limit = self.info.caps.binding_bytes.min(binding.buffer.size().saturating_sub(binding.offset));
            if bytes > limit {
                return Err(Error::too_large(
                    format!("binding of {program}"),
                    format!("{bytes} bytes"),
                    format!("{limit} bytes"),
                ));
            }
            bound.push((slot.number, BufferRange { bytes, ..binding }));
        }
        let bytes = bytemuck::bytes_of(params);
        let params = uniforms.iter().map(|slot| {
            let usage = wgpu::BufferUsages::UNIFORM;
            Ok((slot.number, self.filled_buffer("params", bytes.len() as u64, usage, bytes)?))
        });
        let params = params.collect::<Result<Vec<_>>>()?;
        let layout = self.layout_of(program)?;
        let name = program.to_string();
        let bind_group = self.scoped(&format!("bind {name}"), || {
            let operands = bound.iter().map(|&(binding, operand)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: operand.buffer,
                    offset: operand.offset,
                    size: NonZeroU64::new(operand.bytes),
                }),
            });
            let params = params.iter().map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding: *binding,
                resource: buffer.as_entire_binding(),
            });
            let entries: Vec<_> = params.chain(operands).collect();
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(&name),
                layout: &layout.bindings,
                entries: &entries,
            })
        })?;
        Ok(Dispatch { pipeline, bind_group, grid })
    }

    /// Records dispatches into the caller's encoder: no submission, no wait, no copy.
    pub(crate) fn record<'a>(
        encoder: &mut wgpu::CommandEncoder,
        dispatches: impl Iterator<Item = &'a Dispatch>,
        timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) {
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("sparse24"), timestamp_writes: timestamps });
        for Dispatch { pipeline, bind_group, grid } in dispatches {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, bind_group, &[]);
            pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        }
    }

    /// Submits dispatches and returns without waiting.
    pub(crate) fn submit<'a>(&self, dispatches: impl Iterator<Item = &'a Dispatch>) -> Result<()> {
        self.steady("submit", || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            Self::record(&mut encoder, dispatches, None);
            self.queue.submit([encoder.finish()]);
        })
    }

    /// Submits dispatches in one pass and returns the time between the GPU timestamps around them, or `None` where the
    /// device has none, when it is done.
    pub(crate) async fn submit_timed<'a>(
        &self,
        dispatches: impl Iterator<Item = &'a Dispatch>,
    ) -> Result<Option<Duration>> {
        if !self.info.caps.timestamps {
            self.submit(dispatches)?;
            self.finished().await?;
            return Ok(None);
        }
        let unused = lock(&self.clocks).pop();
        let clock = unused.map_or_else(|| self.new_clock(), Ok)?;
        self.steady("submit", || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let writes = wgpu::ComputePassTimestampWrites {
                query_set: &clock.queries,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            };
            Self::record(&mut encoder, dispatches, Some(writes));
            encoder.resolve_query_set(&clock.queries, 0..2, &clock.resolved, 0);
            self.queue.submit([encoder.finish()]);
        })?;
        let bytes = self.read(&clock.resolved, 16).await?;
        lock(&self.clocks).push(clock);
        let [start, end] = bytemuck::pod_read_unaligned::<[u64; 2]>(&bytes);
        let ticks = end.saturating_sub(start) as f64;
        Ok(Some(Duration::from_secs_f64(ticks * f64::from(self.queue.get_timestamp_period()) * 1e-9)))
    }

    fn new_clock(&self) -> Result<Clock> {
        self.scoped("set up a clock", || Clock {
            queries: self.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("clock"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            }),
            resolved: self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("clock"),
                size: 16,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            }),
        })
    }
}

impl KeptPipelines {
    /// Writes the file, unless it has the same already.
    fn write(self) -> Result<()> {
        let Some(data) = self.cache.get_data().filter(|data| self.is_used && Some(data) != self.stored.as_ref()) else {
            return Ok(());
        };
        pipeline_file::write(&self.path, &self.key, &data)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let Some(kept) = lock(&self.kept).take() {
            // There is nobody left to tell; without a file the next process compiles.
            let _ = kept.write();
        }
    }
}

/// An error if the device is lost.
fn expect_there(lost: &Mutex<Option<String>>) -> Result<()> {
    match &*lock(lost) {
        None => Ok(()),
        Some(reason) => Err(Error::device_lost(reason)),
    }
}

/// Runs wgpu calls inside error scopes, and returns what they reported.
fn scoped<T>(device: &wgpu::Device, lost: &Mutex<Option<String>>, what: &str, call: impl FnOnce() -> T) -> Result<T> {
    expect_there(lost)?;
    let (result, error) = in_scopes(device, call);
    expect_there(lost)?;
    error.map_or(Ok(result), |error| Err(error_of(device, what, error)))
}

/// What wgpu reported, as this crate's error.
fn error_of(device: &wgpu::Device, what: &str, error: wgpu::Error) -> Error {
    match error {
        wgpu::Error::OutOfMemory { .. } => Error::out_of_memory(what),
        wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
            let reason = description.split_whitespace().collect::<Vec<_>>().join(" ");
            if is_lost(device) { Error::device_lost(reason) } else { Error::gpu(what, reason) }
        }
    }
}

/// Runs wgpu calls and returns the first error that they caused.
fn in_scopes<T>(device: &wgpu::Device, call: impl FnOnce() -> T) -> (T, Option<wgpu::Error>) {
    if cfg!(target_family = "wasm") {
        return (call(), None);
    }
    let filters = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation];
    let scopes = filters.map(|filter| device.push_error_scope(filter));
    let result = call();
    // In reverse, and all of them, whatever the first one holds.
    let errors: Vec<_> = scopes.into_iter().rev().map(|scope| pollster::block_on(scope.pop())).collect();
    (result, errors.into_iter().flatten().next())
}

/// Whether a device is lost, where no callback of ours can tell: on a lost device wgpu drops the errors of every call,
/// and what it returns is invalid. So a small allocation that fails without an error gives it away.
fn is_lost(device: &wgpu::Device) -> bool {
    let (mapped, error) = in_scopes(device, || {
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("probe"),
            size: 4,
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        buffer.get_mapped_range_mut(..).is_ok()
    });
    !mapped && error.is_none()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
    use super::*;

    fn info(vendor: u32, device: u32, name: &str, driver: &str, backend: wgpu::Backend) -> wgpu::AdapterInfo {
        let mut info = wgpu::AdapterInfo::new(wgpu::DeviceType::IntegratedGpu, backend);
        (info.vendor, info.device) = (vendor, device);
        (info.name, info.driver) = (name.to_owned(), driver.to_owned());
        info
    }

    /// The adapter that tests are told to use, else any, if there is one.
    fn opened() -> Option<Gpu> {
        let wanted = std::env::var("SPARSE24_TEST_DEVICE").unwrap_or_default().to_lowercase();
        let adapters = pollster::block_on(adapters());
        let adapter = adapters.into_iter().find(|a| a.info.name.to_lowercase().contains(&wanted))?;
        Some(pollster::block_on(adapter.open(ShaderChecks::Trusted, None, None, None)).unwrap())
    }

    /// On a device of its own, and on one of the caller's, whose handler would panic.
    #[test]
    #[ignore = "needs a GPU"]
    fn errors_of_steady_calls_are_returned_once_and_the_device_goes_on() {
        let (Some(own), Some(other)) = (opened(), opened()) else { return };
        other.device.on_uncaptured_error(Arc::new(|error| panic!("{error}")));
        let theirs = Gpu::from_wgpu(other.device.clone(), other.queue.clone(), ShaderChecks::Trusted).unwrap();
        for gpu in [own, theirs] {
            let buffer = gpu.buffer("doomed", 16, None).unwrap();
            let good = gpu.buffer("good", 16, Some(&[7; 16])).unwrap();
            assert_eq!(pollster::block_on(gpu.read(&buffer, 16)).unwrap(), [0; 16]);
            buffer.destroy();
            let error = pollster::block_on(gpu.read(&buffer, 16)).unwrap_err().to_string();
            assert!(error.contains("read back") && error.contains("destroyed"), "{error}");
            let error = gpu.write(&buffer, &[1; 16]).unwrap_err().to_string();
            assert!(error.contains("write buffer") && error.contains("destroyed"), "{error}");
            assert_eq!(pollster::block_on(gpu.read(&good, 16)).unwrap(), [7; 16]);
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn each_thread_gets_the_errors_of_its_own_calls() {
        let Some(gpu) = opened() else { return };
        let (doomed, halfway) = (gpu.buffer("doomed", 16, None).unwrap(), std::sync::Barrier::new(2));
        doomed.destroy();
        std::thread::scope(|scope| {
            let failing = scope.spawn(|| {
                gpu.steady("write", || {
                    gpu.queue.write_buffer(&doomed, 0, &[1; 16]);
                    halfway.wait();
                    halfway.wait();
                })
            });
            halfway.wait();
            let other = gpu.steady("nothing", || ());
            halfway.wait();
            assert!(other.is_ok(), "{other:?}");
            assert!(failing.join().unwrap().unwrap_err().to_string().contains("destroyed"));
        });
    }

    #[test]
    fn drivers_known_to_be_wrong_are_refused_by_name() {
        const MESA: &str = "Intel open-source Mesa driver";
        let refused = |vendor, device, name: &str, driver: &str, backend| {
            known_wrong(&info(vendor, device, name, driver, backend)).unwrap_or_default()
        };
        use wgpu::Backend::{Dx12, Vulkan};
        assert!(refused(0x8086, 0xb080, "Intel(R) Graphics (PTL)", MESA, Vulkan).contains("Xe3"));
        // By its number alone, and by its name alone.
        assert!(refused(0x8086, 0xb0a0, "Intel(R) Arc(TM) B390", MESA, Vulkan).contains("Xe3"));
        assert!(refused(0x8086, 1, "Intel(R) Graphics (WCL)", MESA, Vulkan).contains("Xe3"));
        for name in ["Intel(R) Arc(tm) A770 Graphics (DG2)", "Intel(R) Arc(TM) A770 Graphics"] {
            assert!(refused(0x8086, 0x56a0, name, "Intel Corporation", Vulkan).contains("A770"), "{name}");
        }
        for (vendor, device, name, driver, backend) in [
            // Intel's own driver, and its GPUs before and after that are not known to be wrong.
            (0x8086, 0xb080, "Intel(R) Arc(TM) B390 GPU", "Intel Corporation", Vulkan),
            (0x8086, 0xb080, "Intel(R) Arc(TM) B390 GPU", MESA, Dx12),
            (0x8086, 0xe20b, "Intel(R) Arc(tm) B580 Graphics (BMG G21)", MESA, Vulkan),
            (0x8086, 0x64a0, "Intel(R) Arc(tm) Graphics (LNL)", MESA, Vulkan),
            // Other vendors' numbers are their own.
            (0x10de, 0xb080, "NVIDIA A770", "NVIDIA", Vulkan),
            (0x10005, 0, "llvmpipe (LLVM 22.1.0, 256 bits)", "llvmpipe", Vulkan),
            (0x1002, 0x744c, "AMD Radeon RX 7900 XTX (RADV NAVI31)", "radv", Vulkan),
        ] {
            assert_eq!(known_wrong(&info(vendor, device, name, driver, backend)), None, "{name}");
        }
    }

    #[test]
    fn cooperative_matrices_promise_something_only_where_hardware_has_them() {
        let shape = |edge: usize| CoopUnit::ALL.into_iter().find(|u| u.edge() as usize == edge).map(CoopUnit::shape);
        let ratio = |kind, edge| {
            let rates = rates(kind, shape(edge).as_slice());
            rates.cooperative / rates.fma
        };
        assert!(ratio(wgpu::DeviceType::Cpu, 8) <= 1.0);
        assert!((ratio(wgpu::DeviceType::IntegratedGpu, 8) - 2.0).abs() < 1e-9);
        assert!(ratio(wgpu::DeviceType::DiscreteGpu, 16) > 2.0);
    }
}
