//! The CPU device: the same operations in this process, for machines without a GPU.
//!
//! Dense products go to the `gemm` crate, with its AVX-512 kernels where the processor has them. 2:4 and masked
//! products are plain loops: a block of tokens is transposed so that the inner loop runs over tokens, each weight row
//! is decoded once per block, and only kept weights are multiplied. Sums are f32 and each is formed by one thread in
//! increasing k, so results of the loops do not depend on the number of threads.

mod glue;

use std::sync::{Mutex, PoisonError};

pub(crate) use glue::AttentionShape;

use gemm::Parallelism;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::format::Sparse24;
use crate::mask::Mask;
use crate::matrix::{Element, Elements, Matrix, each_dtype};
use crate::problem::{Activation, Form, Problem};

/// Tokens whose activations are transposed together: eight accumulators of four lanes, what SSE2 can keep in registers.
const TOKENS: usize = 32;

/// Weights as this device keeps them.
#[derive(Debug)]
pub(crate) enum CpuWeights {
    /// f32, `k x m`: see [`CpuWeights::dense`].
    Dense(Vec<f32>),
    /// The format as it is; rows are decoded as they are used.
    Sparse24(Sparse24),
    /// Dense weights in their storage type and the mask.
    Masked(Matrix, Mask),
}

impl CpuWeights {
    /// Dense weights as the `gemm` crate reads them best: f32 whatever the storage was, and k-major. It packs W anew in
    /// every call, and packing against the stride of a row costs more than the product when there are few tokens: 768 x
    /// 32 x 3072 took 8.5 ms from row-major and takes 1.7 ms from k-major weights
    /// (benches/results/2026-11-22-amd-epyc).
    pub(crate) fn dense(w: &Matrix) -> Self {
        let (m, k) = (w.rows(), w.cols());
        let mut k_major = vec![0.0; m * k];
        each_dtype!(w.elements(), v => {
            // In blocks, so that neither side strides through more lines than the cache holds.
            for row0 in (0..m).step_by(16) {
                for col in 0..k {
                    for row in row0..m.min(row0 + 16) {
                        k_major[col * m + row] = v[row * k + col].to_f32();
                    }
                }
            }
        });
        Self::Dense(k_major)
    }

    /// Bytes that the weights take on this device.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.len() * 4,
            Self::Sparse24(w) => w.bytes(),
            Self::Masked(w, mask) => w.bytes() + mask.words().len() * 4,
        }
    }
}

/// The operands of one call.
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
    /// The widest SIMD extension that the processor has and this crate's dependencies use.
    pub simd: &'static str,
    /// Threads that compute.
    pub threads: usize,
    /// Bytes of the last-level cache; 32 MiB where the operating system does not say.
    pub cache_bytes: u64,
}

impl CpuInfo {
    /// This machine's processor, of which `threads` threads are used.
    pub(crate) fn host(threads: usize) -> Self {
        let cache_bytes = last_level_cache().unwrap_or(32 << 20);
        Self { name: processor_name(), simd: simd_level(), threads, cache_bytes }
    }
}

/// A thread pool, and buffers that calls reuse.
#[derive(Debug)]
pub(crate) struct Cpu {
    pool: rayon::ThreadPool,
    /// Calls and writes run one at a time, as on a GPU's queue: each has all threads, and none waits for a matrix while
    /// it holds another.
    queue: Mutex<()>,
    scratch: Mutex<Vec<Vec<f32>>>,
}

impl Cpu {
    /// A device with this many threads, or one per core for `None`.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .build()
            .map_err(|e| Error::Invalid(format!("cannot start the CPU device's threads: {e}")))?;
        Ok(Self { pool, queue: Mutex::new(()), scratch: Mutex::new(Vec::new()) })
    }

    /// Does `work` when nothing else runs on this device.
    ///
    /// Never on a thread of a rayon pool: one that waits for the work of another pool takes up other work of its own
    /// meanwhile, and if that is a second call, it would wait for the first one below it on its own stack.
    pub(crate) fn in_turn<R: Send>(&self, work: impl FnOnce() -> R + Send) -> Result<R> {
        let locked = || {
            let _turn = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            work()
        };
        if rayon::current_thread_index().is_none() {
            return Ok(locked());
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, locked);
            let thread = thread.map_err(|e| Error::Invalid(format!("cannot start a thread: {e}")))?;
            thread.join().map_err(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub(crate) fn info(&self) -> CpuInfo {
        CpuInfo::host(self.pool.current_num_threads())
    }

    /// Computes the whole output. The caller has checked every shape.
    pub(crate) fn run(&self, problem: &Problem, operands: &CpuOperands<'_>, y: &mut Elements) {
        if y.is_empty() {
            return;
        }
        self.pool.install(|| match y {
            Elements::F32(y) => {
                self.accumulate(problem, operands, y);
                y.par_chunks_mut(4096).enumerate().for_each(|(chunk, part)| {
                    for (i, sum) in part.iter_mut().enumerate() {
                        *sum = finish(problem, operands, chunk * 4096 + i, *sum);
                    }
                });
            }
            Elements::F16(y) => self.with_scratch(y.len(), |sums| {
                self.accumulate(problem, operands, sums);
                y.par_iter_mut().zip(&*sums).enumerate().for_each(|(i, (y, &sum))| {
                    *y = half::f16::from_f32(finish(problem, operands, i, sum));
                });
            }),
            // Plans refuse bf16 output.
            Elements::Bf16(_) => {}
        });
    }

    /// Lends a zeroed buffer of `len` that goes back to the pool, for the next call of that size to reuse.
    fn with_scratch<R>(&self, len: usize, use_it: impl FnOnce(&mut [f32]) -> R) -> R {
        let lock = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = lock().pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(len, 0.0);
        let result = use_it(&mut buffer);
        lock().push(buffer);
        result
    }

    /// Writes the bare products, in the output's layout.
    fn accumulate(&self, problem: &Problem, operands: &CpuOperands<'_>, sums: &mut [f32]) {
        match (operands.weights, operands.x.elements()) {
            (CpuWeights::Dense(w), Elements::F32(x)) => dense(problem, w, x, sums),
            (CpuWeights::Dense(w), x) => self.with_scratch(x.len(), |wide| {
                each_dtype!(x, v => wide.par_iter_mut().zip(v).for_each(|(w, x)| *w = x.to_f32()));
                dense(problem, w, wide, sums);
            }),
            (CpuWeights::Sparse24(w), x) => each_dtype!(w.values(), values => {
                each_dtype!(x, x => self.loops(problem, x, sums, |row, kept| decode(w, values, row, kept)))
            }),
            (CpuWeights::Masked(w, mask), x) => each_dtype!(w.elements(), w => {
                each_dtype!(x, x => self.loops(problem, x, sums, |row, kept| select(w, mask, row, kept)))
            }),
        }
    }

    /// The product by loops. `row_of` fills its buffer with the kept weights of a row and their columns.
    fn loops<X: Element>(
        &self,
        problem: &Problem,
        x: &[X],
        sums: &mut [f32],
        row_of: impl Fn(usize, &mut Vec<(u32, f32)>) + Sync,
    ) {
        let Problem { m, n, k, .. } = *problem;
        let x_at = |token: usize, i: usize| match problem.form {
            Form::Linear => x[token * k + i].to_f32(),
            Form::Gemm => x[i * n + token].to_f32(),
        };
        // k-major activations of the block's tokens, and the block's sums, feature-major.
        self.with_scratch(k * TOKENS, |panel| {
            self.with_scratch(m * TOKENS, |block| {
                for token0 in (0..n).step_by(TOKENS) {
                    let tokens = TOKENS.min(n - token0);
                    panel.par_chunks_exact_mut(TOKENS).enumerate().for_each(|(i, at)| {
                        for (j, value) in at.iter_mut().take(tokens).enumerate() {
                            *value = x_at(token0 + j, i);
                        }
                    });
                    let panel = &*panel;
                    block.par_chunks_exact_mut(TOKENS).enumerate().for_each_init(Vec::new, |kept, (row, at)| {
                        row_of(row, kept);
                        let mut acc = [0.0f32; TOKENS];
                        for &(column, weight) in kept.iter() {
                            let from = column as usize * TOKENS;
                            for (a, x) in acc.iter_mut().zip(&panel[from..from + TOKENS]) {
                                *a += weight * x;
                            }
                        }
                        at.copy_from_slice(&acc);
                    });
                    match problem.form {
                        Form::Linear => {
                            let rows = sums[token0 * m..(token0 + tokens) * m].par_chunks_exact_mut(m.max(1));
                            rows.enumerate().for_each(|(j, row)| {
                                for (feature, sum) in row.iter_mut().enumerate() {
                                    *sum = block[feature * TOKENS + j];
                                }
                            });
                        }
                        Form::Gemm => sums
                            .par_chunks_exact_mut(n)
                            .zip(block.par_chunks_exact(TOKENS))
                            .for_each(|(row, from)| row[token0..token0 + tokens].copy_from_slice(&from[..tokens])),
                    }
                }
            });
        });
    }
}

fn simd_level() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "avx2";
        }
        "sse2"
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        if cfg!(target_arch = "aarch64") { "neon" } else { "scalar" }
    }
}

fn processor_name() -> String {
    let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = listed.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_owned())
}

/// Size of the largest cache that Linux lists for the first core.
fn last_level_cache() -> Option<u64> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let sizes = caches.flatten().filter_map(|cache| {
        let size = std::fs::read_to_string(cache.path().join("size")).ok()?;
        size.trim().strip_suffix('K')?.parse::<u64>().ok()
    });
    sizes.max().map(|kib| kib * 1024)
}

/// Kept weights of a row of a 2:4 matrix, two per group, zeros included.
fn decode<T: Element>(w: &Sparse24, values: &[T], row: usize, kept: &mut Vec<(u32, f32)>) {
    kept.clear();
    let codes = &w.meta()[row / w.vector().get() * w.meta_cols()..][..w.meta_cols()];
    let values = &values[row * w.k_physical()..][..w.k_physical()];
    for (group, pair) in values.chunks_exact(2).enumerate() {
        let code = codes[group / 8] >> (4 * (group % 8));
        for (value, position) in pair.iter().zip([code & 3, code >> 2 & 3]) {
            let column = 4 * group as u32 + position;
            // A code may point past the last column of W, where the value is padding.
            if (column as usize) < w.k() {
                kept.push((column, value.to_f32()));
            }
        }
    }
}

/// Kept weights of a row of a masked matrix.
fn select<T: Element>(w: &[T], mask: &Mask, row: usize, kept: &mut Vec<(u32, f32)>) {
    kept.clear();
    let (k, per_row) = (mask.cols(), mask.words_per_row());
    for (word, &bits) in mask.words()[row * per_row..][..per_row].iter().enumerate() {
        let mut bits = bits;
        while bits != 0 {
            let column = 32 * word + bits.trailing_zeros() as usize;
            kept.push((column as u32, w[row * k + column].to_f32()));
            bits &= bits - 1;
        }
    }
}

/// The dense product by the `gemm` crate, on the current rayon pool. `w` is k-major.
#[allow(unsafe_code, reason = "the gemm crate takes raw pointers and strides")]
fn dense(problem: &Problem, w: &[f32], x: &[f32], sums: &mut [f32]) {
    let Problem { m, n, k, .. } = *problem;
    if k == 0 {
        sums.fill(0.0);
        return;
    }
    // As (column stride, row stride) of W (m x k), of X as k x n, and of the output as m x n. Exact casts: a slice has
    // at most isize::MAX bytes.
    let (ms, ns, ks) = (m as isize, n as isize, k as isize);
    let (x_strides, y_strides) = match problem.form {
        Form::Linear => ((ks, 1), (ms, 1)),
        Form::Gemm => ((1, ns), (1, ns)),
    };
    let w_strides = (ms, 1);
    assert!(sums.len() == m * n && w.len() == m * k && x.len() == n * k);
    let parallelism = match rayon::current_num_threads() {
        1 => Parallelism::None,
        threads => Parallelism::Rayon(threads),
    };
    // SAFETY: by the assertion above `sums`, `w` and `x` hold m x n, m x k and k x n elements with these strides, and
    // `sums` is borrowed exclusively, so it overlaps neither. `read_dst` is false: what `sums` holds is not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            sums.as_mut_ptr(),
            y_strides.0,
            y_strides.1,
            false,
            w.as_ptr(),
            w_strides.0,
            w_strides.1,
            x.as_ptr(),
            x_strides.0,
            x_strides.1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The epilogue of output `i` of the output's layout.
fn finish(problem: &Problem, operands: &CpuOperands<'_>, i: usize, sum: f32) -> f32 {
    let feature = match problem.form {
        Form::Linear => i % problem.m,
        Form::Gemm => i / problem.n,
    };
    let biased = operands.bias.map_or(sum, |bias| sum + bias[feature]);
    let value = activate(problem.epilogue.activation, biased);
    operands.residual.map_or(value, |residual| value + residual.get(i))
}

/// The activations in f32, by the formulas of shaders/shared/gemm.wgsl.
fn activate(activation: Activation, v: f32) -> f32 {
    // 1 / (1 + exp(-v)) without an intermediate that overflows.
    let sigmoid = |v: f32| {
        let t = (-v.abs()).exp();
        (if v < 0.0 { t } else { 1.0 }) / (1.0 + t)
    };
    match activation {
        Activation::None => v,
        // Not f32::max, which turns NaN into 0.
        Activation::Relu => {
            if v < 0.0 {
                0.0
            } else {
                v
            }
        }
        Activation::Gelu => 0.5 * v * (1.0 + erf(v * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => v * sigmoid(1.595_769_2 * v * (1.0 + 0.044_715 * v * v)),
        Activation::Silu => v * sigmoid(v),
    }
}

/// erf(v) by Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7.
fn erf(v: f32) -> f32 {
    const C: [f32; 5] = [0.254_829_6, -0.284_496_72, 1.421_413_8, -1.453_152, 1.061_405_4];
    let a = v.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * C.iter().rev().fold(0.0, |sum, c| sum * t + c);
    (1.0 - p * (-a * a).exp()).copysign(v)
}
