//! Keys and values of new tokens, put into a cache.
//!
//! Invariant: of the cache nothing is written but the rows of new tokens, and none past a sequence's capacity.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Cost, Indices, Operand, Operation, dispatch};
use crate::cpu::rows::each_pair;
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, Types, WORKGROUP, fields};
use crate::matrix::{DType, Element};

/// Puts the keys and values of new tokens behind those that a cache has: row `b·capacity + past[b] + i` of the cache
/// becomes K and V of token `i` of sequence `b`, for `i < lengths[b]`. All other rows keep what they hold.
///
/// The cache has `capacity` rows for each sequence, its rows over `batch`. Tokens past the capacity are left out: how
/// many there may be is for the caller to check. A length past `seq` counts as `seq`.
/// [`CachedAttention`](crate::CachedAttention) reads the cache.
///
/// ```
/// use sparse24::{DType, Device, KvAppend, Matrix};
/// let device = Device::cpu()?;
/// // Two new tokens of one head of one feature, behind one that is there.
/// let qkv = device.upload(&Matrix::from_f32(2, 3, &[9.0, 1.0, 2.0, 9.0, 3.0, 4.0])?)?;
/// let [lengths, past] = [device.indices(1)?, device.indices(1)?];
/// device.write_indices(&lengths, &[2])?;
/// device.write_indices(&past, &[1])?;
/// let cache = device.zeros(4, 2, DType::F32)?;
/// let append = KvAppend { qkv: &qkv, lengths: &lengths, past: &past, batch: 1, seq: 2, cache: &cache };
/// device.prepare(&append)?.run()?;
/// assert_eq!(device.read(&cache)?, Matrix::from_f32(4, 2, &[0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct KvAppend<'a> {
    /// `batch·seq x (heads + 2·kv_heads)·head_dim`: Q, K and V of each token side by side. K and V are its last
    /// features, as many as the cache has columns.
    pub qkv: &'a Tensor,
    /// Number of new tokens of each sequence.
    pub lengths: &'a Indices,
    /// Number of tokens that the cache has of each sequence.
    pub past: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence in `qkv`, padding included.
    pub seq: usize,
    /// `batch·capacity x 2·kv_heads·head_dim`, written in part: K and V of each token side by side. Of another type
    /// than `qkv`, or the same.
    pub cache: &'a Tensor,
}

/// Rows that a cache has for each of some sequences. An error if it has not as many for each, or none for any.
pub(super) fn capacity_of(cache: &Tensor, batch: usize) -> Result<usize> {
    match cache.rows().checked_div(batch) {
        Some(capacity) if capacity > 0 && capacity * batch == cache.rows() => Ok(capacity),
        None if cache.rows() == 0 => Ok(0),
        _ => Err(Error::invalid(format!(
            "cache has {} rows, which are no whole number for each of {batch} sequences",
            cache.rows()
        ))),
    }
}

impl Operation for KvAppend<'_> {
    fn name(&self) -> &'static str {
        "kv_append"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { qkv, lengths, past, cache, .. } = *self;
        let counts = [Operand::read("lengths", lengths), Operand::read("past", past)];
        [Operand::read("qkv", qkv), Operand::write("cache", cache)].into_iter().chain(counts).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { qkv, lengths, past, batch, seq, cache } = *self;
        expect_shape("qkv", qkv.shape(), (checked_mul("tokens", batch, seq)?, qkv.cols()))?;
        if !cache.cols().is_multiple_of(2) || cache.cols() > qkv.cols() {
            let (has, all) = (cache.cols(), qkv.cols());
            return Err(Error::invalid(format!("cache has {has} features, which are no K and V of qkv's {all}")));
        }
        capacity_of(cache, batch)?;
        expect_len("lengths", lengths.len(), batch)?;
        expect_len("past", past.len(), batch)
    }

    /// What is copied, for sequences without padding.
    fn cost(&self) -> Cost {
        let Self { qkv, lengths, past, cache, .. } = *self;
        let elements = qkv.rows() as f64 * cache.cols() as f64;
        let copied = elements * (qkv.dtype().bytes() + cache.dtype().bytes()) as f64;
        Cost { flops: 0.0, bytes: copied + (lengths.bytes() + past.bytes()) as f64 }
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { qkv, lengths, past, batch, seq, cache } = *self;
        let width = gpu_size("features of K and V", cache.cols())?;
        let kernel = KvAppendKernel::new(width, qkv.dtype(), cache.dtype())?;
        let params = Params {
            tokens: gpu_size("tokens", qkv.rows())?,
            features: gpu_size("features of a token", qkv.cols())?,
            seq: gpu_size("rows of a sequence", seq)?,
            capacity: gpu_size("rows of a sequence", capacity_of(cache, batch)?)?,
        };
        let operands = [qkv.on_gpu(), cache.on_gpu(), lengths.on_gpu(), past.on_gpu()];
        dispatch(gpu, Program::new(kernel), (qkv.rows() * cache.cols()).div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { qkv, lengths, past, batch, seq, cache } = *self;
        let capacity = capacity_of(cache, batch)?;
        let (features, width) = (qkv.cols(), cache.cols());
        let [qkv, cache] = [qkv.on_cpu()?, cache.on_cpu()?];
        let [lengths, past] = [lengths.on_cpu()?, past.on_cpu()?];
        Ok(Box::new(Call { qkv, lengths, past, shape: Shape { seq, capacity, features, width }, cache }))
    }
}

/// Mirror of `Params` in shaders/kv_append.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    features: u32,
    seq: u32,
    capacity: u32,
}

/// The program (shaders/kv_append.wgsl). Its name (`Display`) is made of its parts, such as
/// `kv_append-f32f32-d128-out_f16`: type of what is read, features of K and V, and type of the cache if it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvAppendKernel {
    width: u32,
    types: Types,
}

impl KvAppendKernel {
    /// For `width` features of K and V. An error for a type that kernels do not store.
    pub fn new(width: u32, storage: DType, cache: DType) -> Result<Self> {
        Ok(Self { width, types: Types::new(storage, cache)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Types::all().map(|types| Program::new(KvAppendKernel { width: 128, types }))
}

impl Shader for KvAppendKernel {
    fn module(&self) -> String {
        Self { width: 0, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[include_str!("../../shaders/kv_append.wgsl")])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("WIDTH", f64::from(self.width))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "cache"),
                Binding::read(3, "lengths"),
                Binding::read(4, "past"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens features seq capacity)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for KvAppendKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, types } = self;
        write!(f, "kv_append-{}f32-d{width}{}", types.storage(), types.suffix())
    }
}

/// Tokens of a task: a few copies are not worth a thread's waking up.
const TASK_TOKENS: usize = 64;

/// Rows of a sequence in the input and in the cache, and features of their rows.
#[derive(Clone, Copy, Debug)]
struct Shape {
    seq: usize,
    capacity: usize,
    features: usize,
    width: usize,
}

#[derive(Debug)]
struct Call {
    qkv: Shared,
    lengths: SharedIndices,
    past: SharedIndices,
    shape: Shape,
    cache: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (qkv, lengths, past) = (read(&self.qkv), read(&self.lengths), read(&self.past));
        let counts = (&lengths[..], &past[..]);
        let mut cache = write(&self.cache);
        each_pair!(qkv.elements(), cache.elements_mut(), (qkv, cache) => append(cpu, self.shape, qkv, counts, cache));
    }
}

fn append<X: Element, Y: Element>(
    cpu: &Cpu,
    Shape { seq, capacity, features, width }: Shape,
    qkv: &[X],
    (lengths, past): (&[u32], &[u32]),
    cache: &mut [Y],
) {
    if width == 0 {
        return;
    }
    for (sequence, (&length, &past)) in lengths.iter().zip(past).enumerate() {
        let past = capacity.min(past as usize);
        let count = seq.min(length as usize).min(capacity - past);
        let rows = &mut cache[(sequence * capacity + past) * width..][..count * width];
        let qkv = &qkv[sequence * seq * features..][..count * features];
        cpu.each_chunk(rows, TASK_TOKENS * width, |task, rows| {
            let tokens = qkv.chunks_exact(features).skip(task * TASK_TOKENS);
            for (to, token) in rows.chunks_exact_mut(width).zip(tokens) {
                to.iter_mut().zip(&token[features - width..]).for_each(|(to, x)| *to = Y::from_f32(x.to_f32()));
            }
        });
    }
}
