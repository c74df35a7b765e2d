//! Softmax attention of new tokens to a cache of keys and values.
//!
//! Invariant: rows of the cache that a query does not see are not read, and rows of padding become zeros.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::kv_append::capacity_of;
use super::{Cost, Indices, Operand, Operation, dispatch};
use crate::cpu::attend::{AttendRows, QUERIES};
use crate::cpu::rows::each_pair;
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, fields,
};
use crate::matrix::{DType, Element, Elements};
use crate::simd::Loaded;

/// Attention of new tokens to a cache: `y = softmax(Q Kᵀ / √(features of a head)) V` per head, where query `i` of
/// sequence `b` sees rows `0 ..= past[b] + i` of the sequence's part of the cache, as far as its capacity goes. K and V
/// of the new tokens must be in the cache already: [`KvAppend`](crate::KvAppend) puts them there.
///
/// The cache has `capacity` rows for each sequence, its rows over `batch`. Rows that no query sees may hold anything.
/// Rows of `y` at or past a sequence's length become zeros; a length past `seq` counts as `seq`. What
/// [`Attention::causal`](crate::Attention::causal) makes of a whole sequence, this makes of its tokens in steps. It has
/// no gradient.
///
/// ```
/// use sparse24::{CachedAttention, DType, Device, Matrix};
/// let device = Device::cpu()?;
/// // One new token behind one, with equal scores: the mean of both values. The third row of the cache is not seen.
/// let qkv = device.upload(&Matrix::from_f32(1, 3, &[0.0, 1.0, 4.0])?)?;
/// let cache = device.upload(&Matrix::from_f32(3, 2, &[1.0, 2.0, 1.0, 4.0, f32::NAN, f32::NAN])?)?;
/// let [lengths, past] = [device.indices(1)?, device.indices(1)?];
/// device.write_indices(&lengths, &[1])?;
/// device.write_indices(&past, &[1])?;
/// let y = device.zeros(1, 1, DType::F32)?;
/// let attention = CachedAttention {
///     qkv: &qkv,
///     cache: &cache,
///     lengths: &lengths,
///     past: &past,
///     batch: 1,
///     seq: 1,
///     heads: 1,
///     kv_heads: 1,
///     y: &y,
/// };
/// device.prepare(&attention)?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 1, &[3.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CachedAttention<'a> {
    /// `batch·seq x (heads + 2·kv_heads)·head_dim`: Q, K and V of each new token side by side, of which Q is read.
    pub qkv: &'a Tensor,
    /// `batch·capacity x 2·kv_heads·head_dim`: K and V of each token side by side. Of any type of `qkv` and `y`.
    pub cache: &'a Tensor,
    /// Number of new tokens of each sequence.
    pub lengths: &'a Indices,
    /// Number of tokens of each sequence that are before the new ones.
    pub past: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence in `qkv` and `y`, padding included.
    pub seq: usize,
    /// Heads of queries, of at most 256 features.
    pub heads: usize,
    /// Heads of keys and of values, a divisor of `heads`: as many neighbouring query heads share each.
    pub kv_heads: usize,
    /// `batch·seq x heads·head_dim`, overwritten.
    pub y: &'a Tensor,
}

/// Features of a head, at most: 4 * QUADS in shaders/cached_attention.wgsl.
const MAX_HEAD_DIM: usize = 256;

impl CachedAttention<'_> {
    /// Features of a head.
    fn head_dim(&self) -> usize {
        self.y.cols() / self.heads
    }
}

impl Operation for CachedAttention<'_> {
    fn name(&self) -> &'static str {
        "cached_attention"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { qkv, cache, lengths, past, y, .. } = *self;
        let counts = [Operand::read("lengths", lengths), Operand::read("past", past)];
        let tensors = [Operand::read("qkv", qkv), Operand::write("y", y), Operand::read("cache", cache)];
        tensors.into_iter().chain(counts).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { qkv, cache, lengths, past, batch, seq, heads, kv_heads, y } = *self;
        let (tokens, width) = (checked_mul("tokens", batch, seq)?, y.cols());
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(Error::invalid(format!("{width} features are no whole number for each of {heads} heads")));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(format!("{heads} heads are no whole number for each of {kv_heads} of keys")));
        }
        let head_dim = self.head_dim();
        if head_dim > MAX_HEAD_DIM {
            return Err(Error::invalid(format!("heads of {head_dim} features, {MAX_HEAD_DIM} at most")));
        }
        // Both are parts of what the tensor has.
        let shared = checked_mul("features of K and V", 2, head_dim * kv_heads)?;
        let features = width
            .checked_add(shared)
            .ok_or_else(|| Error::overflow("features of Q, K and V", format!("{width} + {shared}")))?;
        expect_shape("qkv", qkv.shape(), (tokens, features))?;
        expect_shape("y", y.shape(), (tokens, width))?;
        expect_shape("cache", cache.shape(), (cache.rows(), shared))?;
        capacity_of(cache, batch)?;
        expect_len("lengths", lengths.len(), batch)?;
        expect_len("past", past.len(), batch)
    }

    /// Two products of all queries with a whole cache: how much of it they see is data on a device.
    fn cost(&self) -> Cost {
        let Self { qkv, cache, lengths, past, batch, y, .. } = *self;
        let capacity = cache.rows() as f64 / batch.max(1) as f64;
        let flops = 4.0 * y.rows() as f64 * capacity * y.cols() as f64;
        let queries = (qkv.rows() * y.cols() * qkv.dtype().bytes()) as u64;
        Cost { flops, bytes: (queries + cache.bytes() + lengths.bytes() + past.bytes() + y.bytes()) as f64 }
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { qkv, cache, lengths, past, batch, seq, heads, kv_heads, y } = *self;
        let head_dim = gpu_size("features of a head", self.head_dim())?;
        let kernel = CachedAttentionKernel::new(head_dim, qkv.dtype(), cache.dtype(), y.dtype())?;
        let kernel = kernel.share(gpu_size("heads", heads / kv_heads)?);
        let params = Params {
            tokens: gpu_size("tokens", y.rows())?,
            seq: gpu_size("rows of a sequence", seq)?,
            capacity: gpu_size("rows of a sequence", capacity_of(cache, batch)?)?,
            heads: gpu_size("heads", heads)?,
            scale: (1.0 / f64::from(head_dim.max(1)).sqrt()) as f32,
        };
        let workgroups = if head_dim == 0 { 0 } else { checked_mul("heads of all tokens", y.rows(), heads)? };
        let operands = [qkv.on_gpu(), y.on_gpu(), cache.on_gpu(), lengths.on_gpu(), past.on_gpu()];
        dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { qkv, cache, lengths, past, batch, seq, heads, kv_heads, y } = *self;
        let share = heads / kv_heads;
        let shape = Shape { seq, capacity: capacity_of(cache, batch)?, kv_heads, share, head_dim: self.head_dim() };
        let [qkv, cache, y] = [qkv.on_cpu()?, cache.on_cpu()?, y.on_cpu()?];
        Ok(Box::new(Call { qkv, cache, lengths: lengths.on_cpu()?, past: past.on_cpu()?, shape, y }))
    }
}

/// Mirror of `Params` in shaders/cached_attention.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    seq: u32,
    capacity: u32,
    heads: u32,
    scale: f32,
}

/// The program (shaders/cached_attention.wgsl). Its name (`Display`) is made of its parts, such as
/// `cached_attention-f32f32-cache_f16-d64-quads-share3`: types of input and sums, type of the cache, features of a
/// head, how these are read, and how many query heads share their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CachedAttentionKernel {
    head_dim: u32,
    access: FeatureAccess,
    types: Types,
    cache: DType,
    share: u32,
}

impl CachedAttentionKernel {
    /// Attention of heads of `head_dim` features, at most 256. An error for a type that kernels do not store.
    pub fn new(head_dim: u32, storage: DType, cache: DType, output: DType) -> Result<Self> {
        if head_dim as usize > MAX_HEAD_DIM {
            return Err(Error::invalid(format!("heads of {head_dim} features, {MAX_HEAD_DIM} at most")));
        }
        Types::new(cache, cache)?;
        let types = Types::new(storage, output)?;
        Ok(Self { head_dim, access: FeatureAccess::of(head_dim), types, cache, share: 1 })
    }

    /// The same where `share` query heads share their keys and values.
    pub fn share(self, share: u32) -> Self {
        Self { share, ..self }
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let types = Types::all().flat_map(|types| [DType::F32, DType::F16].map(|cache| (types, cache)));
    let kernels = types.flat_map(|(types, cache)| {
        WIDTHS.map(|head_dim| {
            let access = FeatureAccess::of(head_dim);
            CachedAttentionKernel { head_dim, access, types, cache, share: 1 }
        })
    });
    kernels.map(Program::new)
}

impl Shader for CachedAttentionKernel {
    fn module(&self) -> String {
        Self { head_dim: 0, share: 1, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        let cache = match self.access {
            FeatureAccess::Quads => include_str!("../../shaders/shared/cache_quads.wgsl"),
            FeatureAccess::Scalars => include_str!("../../shaders/shared/cache_scalars.wgsl"),
        };
        let own = include_str!("../../shaders/cached_attention.wgsl");
        let mut text = self.types.text(&[self.access.text(), cache, own])?;
        text.set_type("Cached", self.cache)?;
        Ok(text)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("HEAD_DIM", f64::from(self.head_dim)), ("SHARE", f64::from(self.share))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "cache"),
                Binding::read(4, "lengths"),
                Binding::read(5, "past"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens seq capacity heads scale)
    }

    fn workgroup_bytes(&self) -> u32 {
        // A query, five numbers of each thread, and the weights of 128 keys.
        4 * MAX_HEAD_DIM as u32 + 4 * 5 * self.threads() + 4 * 128
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        Types::new(self.cache, self.cache).map_err(|e| e.to_string())?.supported_by(caps, 0, 0)?;
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for CachedAttentionKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { head_dim, access, types, cache, share } = self;
        let storage = types.storage();
        write!(f, "cached_attention-{storage}f32-cache_{cache}-d{head_dim}-{}", access.name())?;
        if *share > 1 {
            write!(f, "-share{share}")?;
        }
        f.write_str(&types.suffix())
    }
}

/// Tokens of a task, where there are enough of them: their queries read a row of the cache together.
const TASK_TOKENS: usize = QUERIES;

/// Multiply-adds below which threads take longer to wake up than all of the work: some twenty microseconds of them.
const SMALL: usize = 1 << 19;

/// Rows of a sequence in the input and in the cache, heads of keys, heads of queries that share each, and features of a
/// head.
#[derive(Clone, Copy, Debug)]
struct Shape {
    seq: usize,
    capacity: usize,
    kv_heads: usize,
    share: usize,
    head_dim: usize,
}

impl Shape {
    /// Features of the queries that share a head of keys.
    fn piece(self) -> usize {
        self.share * self.head_dim
    }

    /// Features of Q, and of a row of the output.
    fn width(self) -> usize {
        self.kv_heads * self.piece()
    }

    /// Features of K, and of V.
    fn shared(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Rows of the cache that token `i` of a sequence sees.
    fn seen(self, past: u32, i: usize) -> usize {
        (past as usize).saturating_add(i + 1).min(self.capacity)
    }

    /// Multiply-adds of all tokens.
    fn work(self, lengths: &[u32], past: &[u32]) -> usize {
        let rows = lengths.iter().zip(past).map(|(&length, &past)| {
            let count = self.seq.min(length as usize);
            count.saturating_mul(self.seen(past, count))
        });
        rows.fold(0, usize::saturating_add).saturating_mul(2 * self.width())
    }
}

#[derive(Debug)]
struct Call {
    qkv: Shared,
    cache: Shared,
    lengths: SharedIndices,
    past: SharedIndices,
    shape: Shape,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (qkv, cache, lengths, past) = (read(&self.qkv), read(&self.cache), read(&self.lengths), read(&self.past));
        let (shape, counts) = (self.shape, (&lengths[..], &past[..]));
        each_pair!(qkv.elements(), write(&self.y).elements_mut(), (qkv, y) => match cache.elements() {
            Elements::F32(cache) => attend_all(cpu, shape, qkv, cache, counts, y),
            Elements::F16(cache) => attend_all(cpu, shape, qkv, cache, counts, y),
            // Refused when the call is prepared.
            Elements::Bf16(_) => {}
        });
    }
}

fn attend_all<X: Element, C: Loaded, Y: Element>(
    cpu: &Cpu,
    shape: Shape,
    qkv: &[X],
    cache: &[C],
    (lengths, past): (&[u32], &[u32]),
    y: &mut [Y],
) {
    let (width, piece) = (shape.width(), shape.piece());
    let tokens = y.len().checked_div(width).unwrap_or(0);
    // One task, of which no other thread hears; whole tokens, whose queries read the cache together; or where there are
    // few of them, what belongs to one head of keys.
    let task = if shape.work(lengths, past) < SMALL {
        y.len()
    } else if tokens >= 4 * TASK_TOKENS * cpu.info().threads {
        TASK_TOKENS * width
    } else {
        piece
    };
    let attend = |from: Block, y: &mut [Y], stride: usize| attend_block(cpu, shape, qkv, cache, from, y, stride);
    cpu.each_chunk(y, task, |i, y| {
        let first = i * task;
        if y.len() < width {
            let (token, head) = (first / width, first % width / piece);
            let (sequence, i) = (token / shape.seq, token % shape.seq);
            let (length, past) = (lengths[sequence], past[sequence]);
            return attend(Block { sequence, length, past, first: i, count: 1, head }, y, width);
        }
        let (mut token, end) = (first / width, (first + y.len()) / width);
        let mut rest = y;
        while token < end {
            let (sequence, i) = (token / shape.seq, token % shape.seq);
            let count = TASK_TOKENS.min(shape.seq - i).min(end - token);
            let (own, others) = rest.split_at_mut(count * width);
            for head in 0..shape.kv_heads {
                let (length, past) = (lengths[sequence], past[sequence]);
                let block = Block { sequence, length, past, first: i, count, head };
                attend(block, &mut own[head * piece..], width);
            }
            (rest, token) = (others, token + count);
        }
    });
}

/// Some tokens of a sequence, at most [`TASK_TOKENS`], and a head of keys.
#[derive(Clone, Copy)]
struct Block {
    sequence: usize,
    length: u32,
    past: u32,
    first: usize,
    count: usize,
    head: usize,
}

/// Attention of the queries of a block. `y` starts with the features of the first token that belong to the head, and
/// has those of the next token `stride` further.
fn attend_block<X: Element, C: Loaded, Y: Element>(
    cpu: &Cpu,
    shape: Shape,
    qkv: &[X],
    cache: &[C],
    Block { sequence, length, past, first, count, head }: Block,
    y: &mut [Y],
    stride: usize,
) {
    let Shape { seq, capacity, share, head_dim, .. } = shape;
    let piece = shape.piece();
    let real = (length as usize).saturating_sub(first).min(count);
    let mut rows = y.chunks_mut(stride);
    rows.by_ref().skip(real).take(count - real).for_each(|y| y[..piece].fill(Y::from_f32(0.0)));
    if real == 0 {
        return;
    }
    let longest = shape.seen(past, first + real - 1);
    let cached = &cache[sequence * capacity * 2 * shape.shared()..][..longest * 2 * shape.shared()];
    let (keys, values) = (&cached[head * head_dim..], &cached[shape.shared() + head * head_dim..]);
    cpu.with_scratch(2 * real * piece + QUERIES * longest, |scratch| {
        let (q, rest) = scratch.split_at_mut(real * piece);
        let (own, scores) = rest.split_at_mut(real * piece);
        let features = shape.width() + 2 * shape.shared();
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (i, q) in q.chunks_exact_mut(piece).enumerate() {
            let from = &qkv[(sequence * seq + first + i) * features + head * piece..];
            q.iter_mut().zip(from).for_each(|(q, x)| *q = x.to_f32() * scale);
        }
        cpu.simd().run(AttendRows {
            q,
            head_dim,
            share,
            seen: shape.seen(past, first),
            capacity,
            keys,
            values,
            stride: 2 * shape.shared(),
            scores,
            y: own,
        });
        for (own, y) in own.chunks_exact(piece).zip(y.chunks_mut(stride)) {
            y.iter_mut().zip(own).for_each(|(y, own)| *y = Y::from_f32(*own));
        }
    });
}
