//! The CPU device: the same operations in this process, for machines without a GPU.
//!
//! Many tokens are multiplied by gathered rows of activations (2:4) or by the crate `gemm` (dense, masked), few by
//! kernels that read each weight once, some dozens in tiles; the [`plan`](crate::plan) says which. Weights are laid out
//! for their kernels when they are uploaded, in their storage type, and widened where they are used. Sums are f32, each
//! formed by one thread in an order that the kernel and the shape decide, so results do not depend on the number of
//! threads. Buffers go back to a pool, so that a call that is repeated allocates nothing of its own.

pub(crate) mod attend;
mod dense;
mod epilogue;
mod grad;
mod memory;
mod permute;
mod pool;
mod probe;
pub(crate) mod rows;
mod sparse;
mod tile;
mod weights;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

use self::epilogue::Finish;
use self::memory::{Aligned, Arena};
use self::pool::Pool;
pub(crate) use self::probe::CpuProbe;
pub(crate) use self::weights::{BLOCK, CpuWeights};
use crate::error::{Error, Result};
use crate::matrix::{Element, Elements, Matrix, each_dtype};
use crate::plan::{CpuCaps, CpuSchedule};
use crate::problem::{Epilogue, Form, Problem};
use crate::simd::{Loaded, Simd, SimdLevel};

/// A call with everything bound.
pub trait CpuCall: Debug + Send + Sync {
    /// Computes the output. The caller holds the device: see [`Cpu::exclusively`].
    fn run(&self, cpu: &Cpu);
}

/// A matrix of the CPU device. Behind a lock, since calls that are bound to it are anybody's to run.
pub(crate) type Shared = Arc<RwLock<Matrix>>;
/// Indices of the CPU device.
pub(crate) type SharedIndices = Arc<RwLock<Vec<u32>>>;

// A panic of another thread cannot leave operands without their elements, so a poisoned lock is as good as any.
pub(crate) fn read<T>(shared: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    shared.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write<T>(shared: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    shared.write().unwrap_or_else(PoisonError::into_inner)
}

/// The operands of one GEMM.
pub(crate) struct CpuOperands<'a> {
    pub(crate) weights: &'a CpuWeights,
    pub(crate) x: &'a Matrix,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) residual: Option<&'a Elements>,
}

/// What the CPU device is.
#[derive(Clone, Debug)]
pub struct CpuInfo {
    /// Name of the processor, as the operating system has it.
    pub name: String,
    /// The vector instructions of this crate's kernels: the widest that the processor has, unless others were asked
    /// for.
    pub simd: SimdLevel,
    /// Threads that compute.
    pub threads: usize,
    /// Bytes of the last-level cache; 32 MiB where the operating system does not say.
    pub cache_bytes: u64,
}

impl CpuInfo {
    /// This machine's processor, of which `threads` threads use `simd`.
    pub(crate) fn host(simd: SimdLevel, threads: usize) -> Self {
        Self { name: processor_name(), simd, threads, cache_bytes: last_level_cache() }
    }
}

/// Buffers that calls reuse, each with the thread that had it last: what is in that thread's cache is dear to any
/// other.
#[derive(Debug, Default)]
struct Scratch(Mutex<Vec<(ThreadId, Aligned<f32>)>>);

impl Scratch {
    /// Lends a buffer of `len` that holds anything: of those that are long enough the smallest that this thread had
    /// last, or the smallest; else the longest, made longer.
    fn with<R>(&self, len: usize, use_it: impl FnOnce(&mut [f32]) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let this = thread::current().id();
        let mut buffer = {
            let mut buffers = lock();
            let room = |i: &usize| buffers[*i].1.room();
            let enough = (0..buffers.len()).filter(|i| room(i) >= len);
            let enough = enough.min_by_key(|i| (buffers[*i].0 != this, room(i)));
            match enough.or_else(|| (0..buffers.len()).max_by_key(room)) {
                Some(i) => buffers.swap_remove(i).1,
                None => Aligned::EMPTY,
            }
        };
        buffer.resize(len);
        let result = use_it(&mut buffer);
        lock().push((this, buffer));
        result
    }
}

/// The device: its threads, its buffers and its queue.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    scratch: Scratch,
    /// Where weights lie.
    arena: Arena,
    /// Calls and writes run one at a time, as on a GPU's queue: each has all threads, and none waits for a matrix while
    /// it holds another.
    queue: Mutex<()>,
    info: CpuInfo,
    /// Bytes of a core's first-level cache.
    first_cache: usize,
}

impl Cpu {
    /// A device with this many threads, or one per core for `None`, and these instructions, or the widest for `None`.
    pub(crate) fn new(threads: Option<usize>, simd: Option<SimdLevel>) -> Result<Self> {
        let simd = Simd::new(simd)?;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let pool = match threads.unwrap_or_else(cores) {
            0 => return Err(Error::invalid("the CPU device needs a thread")),
            count => Pool::new(count, simd)?,
        };
        let info = CpuInfo::host(simd.level(), pool.len());
        let (scratch, arena) = (Scratch::default(), Arena::default());
        Ok(Self { pool, scratch, arena, queue: Mutex::new(()), info, first_cache: first_level_cache() })
    }

    /// Does `work` when nothing else runs on this device.
    ///
    /// Never on a thread of a rayon pool: one that waits for the work of another pool takes up other work of its own
    /// meanwhile, and if that is a second call, it would wait for the first one below it on its own stack.
    pub(crate) fn exclusively<R: Send>(&self, work: impl FnOnce() -> R + Send) -> Result<R> {
        let locked = || {
            let _held = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            work()
        };
        if rayon::current_thread_index().is_none() {
            return Ok(locked());
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, locked);
            let thread = thread.map_err(|e| Error::invalid(format!("cannot start a thread: {e}")))?;
            thread.join().map_err(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub(crate) fn info(&self) -> &CpuInfo {
        &self.info
    }

    /// What plans go by.
    pub(crate) fn caps(&self) -> CpuCaps {
        CpuCaps::host(self.info.simd)
    }

    /// The vector instructions, for weights to be laid out for them.
    pub(crate) fn simd(&self) -> Simd {
        self.pool.simd()
    }

    /// Operations of a call that measures a ceiling, or its bytes.
    pub(crate) fn probe_work(&self, probe: &CpuProbe) -> f64 {
        probe.work(self.info.simd.lanes(), self.info.threads)
    }

    /// Threads for what deals out its work by rayon; `None` for one, which is the caller's own.
    pub(crate) fn threads(&self) -> Option<&rayon::ThreadPool> {
        self.pool.rayon()
    }

    /// Lends a buffer of so many f32, which hold anything.
    pub(crate) fn with_scratch<R>(&self, len: usize, use_it: impl FnOnce(&mut [f32]) -> R) -> R {
        self.scratch.with(len, use_it)
    }

    /// Computes the whole output of a GEMM. The caller has checked every shape, and that the schedule is one of these
    /// weights.
    pub(crate) fn gemm(&self, problem: &Problem, schedule: CpuSchedule, operands: &CpuOperands<'_>, y: &mut Elements) {
        if y.is_empty() {
            return;
        }
        let Self { pool, scratch, .. } = self;
        let CpuOperands { weights, bias, residual, .. } = *operands;
        let x = operands.x.elements();
        if let (CpuWeights::Dense(w), CpuSchedule::GemmCrate) = (weights, schedule)
            && let (Elements::F32(y), Epilogue::NONE) = (&mut *y, problem.epilogue)
        {
            return dense::by_crate(pool, scratch, problem, w, x, y);
        }
        let Some(finish) = Finish::new(problem, bias, residual, y, pool.simd()) else { return };
        match (weights, schedule) {
            (CpuWeights::Dense(w), CpuSchedule::GemmCrate) => {
                dense::by_crate_and_finish(pool, scratch, problem, w, x, &finish);
            }
            (CpuWeights::Dense(w), CpuSchedule::Tile) => tile::tile(pool, scratch, problem, w, x, &finish),
            (CpuWeights::Dense(w), _) => dense::columns(pool, scratch, problem, w, x, &finish),
            (CpuWeights::Sparse24(w), CpuSchedule::Gemv) => sparse::gemv(pool, scratch, problem, w, x, &finish),
            (CpuWeights::Sparse24(w), CpuSchedule::Permute) => {
                permute::permute(pool, scratch, problem, w, x, &finish);
            }
            (CpuWeights::Sparse24(w), _) => sparse::gather(pool, scratch, problem, w, x, &finish),
        }
    }
}

impl CpuCall for CpuProbe {
    fn run(&self, cpu: &Cpu) {
        let Cpu { pool, scratch, .. } = cpu;
        scratch.with(pool.len(), |sums| {
            self.run_on(pool, sums);
            std::hint::black_box(sums);
        });
    }
}

/// Activations as a row of `stride` f32 for each token, zero past the last k and the last token.
fn widen_tokens(problem: &Problem, x: &Elements, to: &mut [f32], stride: usize) {
    let Problem { n, k, .. } = *problem;
    if stride == 0 {
        return;
    }
    each_dtype!(x, x => {
        for (token, to) in to.chunks_exact_mut(stride).enumerate() {
            let given = if token < n { k } else { 0 };
            match problem.form {
                Form::Linear if given > 0 => Loaded::widen(&x[token * k..][..k], &mut to[..k]),
                _ => (0..given).for_each(|i| to[i] = x[i * n + token].to_f32()),
            }
            to[given..].fill(0.0);
        }
    });
}

fn processor_name() -> String {
    let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = listed.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_owned())
}

/// Size of the largest cache that Linux lists for the first core; 32 MiB elsewhere.
fn last_level_cache() -> u64 {
    caches().map(|cache| cache.bytes).max().unwrap_or(32 << 20)
}

/// Size of the first core's first-level cache of data, as Linux lists it, but at most 128 KiB; 32 KiB elsewhere.
fn first_level_cache() -> usize {
    let first = caches().find(|cache| cache.level == 1 && cache.holds_data);
    first.map_or(32 << 10, |cache| cache.bytes.min(128 << 10) as usize)
}

/// A cache of the first core.
struct Cache {
    level: u32,
    holds_data: bool,
    bytes: u64,
}

/// Those that Linux lists.
fn caches() -> impl Iterator<Item = Cache> {
    let read = |cache: std::fs::DirEntry| {
        let field = |name| std::fs::read_to_string(cache.path().join(name)).ok();
        let kib = field("size")?.trim().strip_suffix('K')?.parse::<u64>().ok()?;
        let level = field("level")?.trim().parse().ok()?;
        Some(Cache { level, holds_data: field("type")?.trim() != "Instruction", bytes: kib * 1024 })
    };
    std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").into_iter().flatten().flatten().filter_map(read)
}
