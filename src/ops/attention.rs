//! Softmax attention over sequences.
//!
//! Invariant: keys and values of padding contribute nothing, whatever they hold, and rows of padding become zeros.

mod grad;
mod grad_kernels;

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

pub use self::grad::AttentionGrad;
use super::{CachedAttention, Cost, Gradient, Indices, KvAppend, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{LANES, each_pair, exp, work};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{
    BackwardArgs, Graph, Input, NodeArgs, NodeCache, NodeOp, ParamId, Precision, Read, ReferenceArgs, Rows, ValueId,
};
use crate::kernels::{
    Binding, Caps, CoopUnit, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, fields,
    workgroup_supported,
};
use crate::matrix::{DType, Element};
use crate::reference::attention;

/// Attention: `y = softmax(Q Kᵀ / √(features of a head)) V` per sequence and head, over the sequence's real tokens.
///
/// Keys and values at or past a sequence's length contribute nothing, whatever they hold; the rows of `y` there become
/// zeros. A length past `seq` counts as `seq`; a sequence of length 0 becomes zeros. Scores never reach memory: on a
/// GPU a workgroup holds those of a few keys at a time, and on the CPU a thread those of 16 queries, so `seq` is
/// bounded by `qkv` alone.
///
/// Heads may [share](Self::kv_heads) keys and values, queries may see [no later key](Self::causal), and scores may have
/// a [bias](Self::relative_bias).
///
/// A GPU whose cooperative matrices pay multiplies f16 heads of 32 or 64 features by them, and rounds the weights of a
/// sum to f16 for that. Of heads of more than 64 features a GPU computes the scores anew for each 64.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    qkv: &'a Tensor,
    lengths: &'a Indices,
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    causal: bool,
    bias: Option<&'a Tensor>,
    y: &'a Tensor,
}

impl<'a> Attention<'a> {
    /// `heads` heads over `batch` sequences of `seq` rows: from `qkv`, `batch·seq x 3·d`, to `y`, `batch·seq x d`,
    /// which is overwritten. `qkv` has Q, K and V of a token side by side, each with its heads side by side; `lengths`
    /// has the number of real tokens of each sequence. `d` is a multiple of `heads`.
    ///
    /// ```
    /// use sparse24::{Attention, Device, DType, Matrix};
    /// let device = Device::cpu()?;
    /// // Two tokens with equal scores: the mean of both values, or for the first, if it sees no later one, its own.
    /// let qkv = device.upload(&Matrix::from_f32(2, 3, &[0.0, 1.0, 2.0, 0.0, 1.0, 4.0])?)?;
    /// let lengths = device.indices(1)?;
    /// device.write_indices(&lengths, &[2])?;
    /// let y = device.zeros(2, 1, DType::F32)?;
    /// let attention = Attention::new(&qkv, &lengths, (1, 2), 1, &y);
    /// device.prepare(&attention)?.run()?;
    /// assert_eq!(device.read(&y)?, Matrix::from_f32(2, 1, &[3.0, 3.0])?);
    /// device.prepare(&attention.causal())?.run()?;
    /// assert_eq!(device.read(&y)?, Matrix::from_f32(2, 1, &[2.0, 3.0])?);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn new(
        qkv: &'a Tensor,
        lengths: &'a Indices,
        (batch, seq): (usize, usize),
        heads: usize,
        y: &'a Tensor,
    ) -> Self {
        Self { qkv, lengths, batch, seq, heads, kv_heads: heads, causal: false, bias: None, y }
    }

    /// The same with fewer heads of keys and values, a divisor of `heads`: as many neighbouring query heads share each.
    /// `qkv` is then `batch·seq x (heads + 2·kv_heads)·(d / heads)`.
    #[must_use]
    pub fn kv_heads(self, kv_heads: usize) -> Self {
        Self { kv_heads, ..self }
    }

    /// The same where a query sees its own key and those before it alone. Values of later tokens are multiplied by zero
    /// on some devices, so they must be finite to contribute nothing.
    #[must_use]
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// The same with a number added to each score, that of the distance from query to key: `bias` is f32, `heads x (2·P
    /// - 1)` with `P` from `seq` on, and query `i` of head `h` adds `bias[h][j - i + P - 1]` to its scaled score with
    /// key `j`.
    #[must_use]
    pub fn relative_bias(self, bias: &'a Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Features of a head.
    fn head_dim(&self) -> usize {
        self.y.cols() / self.heads
    }

    /// Query heads that share a head of keys and values.
    fn share(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Largest distance that the bias has.
    fn reach(&self) -> usize {
        self.bias.map_or(0, |bias| bias.cols() / 2)
    }

    /// What the GPU's programs go by.
    fn params(&self) -> Result<Params> {
        Ok(Params {
            tokens: gpu_size("tokens", self.y.rows())?,
            width: gpu_size("features of a token", self.y.cols())?,
            seq: gpu_size("rows of a sequence", self.seq)?,
            heads: gpu_size("heads", self.heads)?,
            scale: (1.0 / (self.head_dim().max(1) as f64).sqrt()) as f32,
            reach: gpu_size("distances", self.reach())?,
        })
    }

    /// What the CPU's loops go by.
    fn shape(&self) -> Shape {
        let Self { seq, heads, causal, .. } = *self;
        Shape { seq, heads, share: self.share(), head_dim: self.head_dim(), causal, reach: self.reach() }
    }
}

impl Operation for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { qkv, lengths, bias, y, .. } = *self;
        let given = [Operand::read("qkv", qkv), Operand::write("y", y), Operand::read("lengths", lengths)];
        given.into_iter().chain(bias.map(|bias| Operand::read("bias", bias))).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { qkv, lengths, batch, seq, heads, kv_heads, bias, y, .. } = *self;
        let (tokens, width) = (checked_mul("tokens", batch, seq)?, y.cols());
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(Error::invalid(format!("{width} features are no whole number for each of {heads} heads")));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(format!("{heads} heads are no whole number for each of {kv_heads} of keys")));
        }
        // Both are parts of what the tensor has.
        let shared = checked_mul("features of K and V", 2, width / heads * kv_heads)?;
        let features = width
            .checked_add(shared)
            .ok_or_else(|| Error::overflow("features of Q, K and V", format!("{width} + {shared}")))?;
        expect_shape("qkv", qkv.shape(), (tokens, features))?;
        expect_shape("y", y.shape(), (tokens, width))?;
        expect_len("lengths", lengths.len(), batch)?;
        let Some(bias) = bias else { return Ok(()) };
        expect_dtype("bias", bias.dtype(), DType::F32)?;
        // An even number of distances has no middle.
        let distances = bias.cols().max(checked_mul("distances", 2, seq.max(1))? - 1) | 1;
        expect_shape("bias", bias.shape(), (heads, distances))
    }

    /// Two products of all queries with all keys that they see.
    fn cost(&self) -> Cost {
        let seq = self.seq as f64;
        let pairs = if self.causal { seq * (seq + 1.0) / 2.0 } else { seq * seq };
        cost_of(4.0 * self.batch as f64 * pairs * self.y.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { qkv, lengths, batch, seq, heads, causal, bias, y, .. } = *self;
        let head_dim = self.head_dim();
        let caps = &gpu.info().caps;
        let caps = &Caps { rates: gpu.tuning().rates.unwrap_or(caps.rates), ..caps.clone() };
        let all_heads = checked_mul("heads", batch, heads)?;
        let tile = AttentionTile::choose(all_heads, seq, head_dim, qkv.dtype(), caps);
        let feature = |lacks| format!("what the least tile of attention takes: {lacks}");
        let tile = tile.map_err(|lacks| Error::missing_feature(&gpu.info().name, feature(lacks)))?;
        let kernel = AttentionKernel::new(tile, gpu_size("features of a head", head_dim)?, qkv.dtype(), y.dtype())?;
        let kernel = kernel.with(gpu_size("heads", self.share())?, causal, bias.is_some());
        let params = self.params()?;
        let workgroups = tile.workgroups(all_heads, seq, head_dim).ok_or_else(|| {
            Error::overflow("workgroups of an attention", format!("{all_heads} heads of {seq} tokens"))
        })?;
        let operands = [qkv.on_gpu(), y.on_gpu(), lengths.on_gpu(), bias.and_then(Tensor::on_gpu)];
        dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { qkv, lengths, bias, y, .. } = *self;
        let bias = bias.map(Tensor::on_cpu).transpose()?;
        Ok(Box::new(Call { qkv: qkv.on_cpu()?, lengths: lengths.on_cpu()?, bias, shape: self.shape(), y: y.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/shared/attention.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Params {
    pub(crate) tokens: u32,
    pub(crate) width: u32,
    pub(crate) seq: u32,
    pub(crate) heads: u32,
    pub(crate) scale: f32,
    pub(crate) reach: u32,
}

/// A tile of attention: a workgroup owns `queries` queries and `depth` features of a head's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionTile {
    queries: u32,
    depth: u32,
    cooperative: Option<CoopUnit>,
}

impl AttentionTile {
    /// The registered tiles, those of cooperative matrices last. The fourth fits the 16 KiB of workgroup memory that
    /// WebGPU grants everywhere. Of each unit of cooperative matrices all but the first tile fit 32 KiB.
    pub const ALL: [Self; 4 * (1 + CoopUnit::ALL.len())] = {
        let mut all = [Self { queries: 0, depth: 0, cooperative: None }; 4 * (1 + CoopUnit::ALL.len())];
        let mut i = 0;
        while i < all.len() {
            let queries = if i % 2 == 0 { 64 } else { 32 };
            let depth = if i % 4 < 2 { 64 } else { 32 };
            let cooperative = if i < 4 { None } else { Some(CoopUnit::ALL[i / 4 - 1]) };
            all[i] = Self { queries, depth, cooperative };
            i += 1;
        }
        all
    };

    /// The tile for so many sequences and heads in all, on a device: of cooperative matrices for f16 and heads that are
    /// as deep as a tile, where the device acts them out or has them and they are faster than its plain arithmetic;
    /// else as deep as a head, so that its scores are computed once; and with 64 queries, so that keys and values are
    /// read half as often, unless there are no more than 32, or too few workgroups for the device. If none fits, what
    /// the device lacks for the least one.
    pub fn choose(
        heads: usize,
        seq: usize,
        head_dim: usize,
        storage: DType,
        caps: &Caps,
    ) -> std::result::Result<Self, String> {
        let depth = if head_dim <= 32 { 32 } else { 64 };
        // About one workgroup for each multiprocessor.
        let few = (heads as u64).saturating_mul(seq.div_ceil(64) as u64) < u64::from(caps.busy_threads / 1024);
        let queries = if seq <= 32 || few { 32 } else { 64 };
        let suits = |tile: &Self| tile.suits(head_dim, storage);
        let pays = caps.emulates_cooperative || caps.rates.cooperative > caps.rates.fma;
        let fits = |tile: &Self| tile.supported_by(caps).is_ok() && (pays || !tile.is_cooperative());
        let distance = |tile: &Self| (tile.cooperative.is_none(), tile.depth != depth, tile.queries != queries);
        let best = Self::ALL.into_iter().filter(suits).filter(fits).min_by_key(distance);
        best.ok_or_else(|| match Self::ALL.into_iter().filter(suits).min_by_key(|tile| tile.workgroup_bytes()) {
            Some(least) => least.supported_by(caps).err().unwrap_or_default(),
            None => "a tile".into(),
        })
    }

    /// Whether it computes heads of so many features of this type.
    fn suits(self, head_dim: usize, storage: DType) -> bool {
        self.cooperative.is_none() || (storage == DType::F16 && self.depth as usize == head_dim)
    }

    /// Whether it multiplies by cooperative matrices. Weights are rounded to f16 then.
    pub const fn is_cooperative(self) -> bool {
        self.cooperative.is_some()
    }

    /// What multiplies, where that is cooperative matrices.
    pub const fn unit(self) -> Option<CoopUnit> {
        self.cooperative
    }

    /// Keys of a step.
    const fn keys(self) -> u32 {
        if self.is_cooperative() { self.depth } else { 32 }
    }

    /// Invocations per workgroup.
    pub const fn threads(self) -> u32 {
        match self.cooperative {
            // A subgroup for as many queries as a block has rows.
            Some(unit) => unit.lanes() * (self.queries / unit.edge()),
            // 8 along keys for 4 queries.
            None => 2 * self.queries,
        }
    }

    /// Bytes of workgroup memory that a workgroup takes.
    pub const fn workgroup_bytes(self) -> u32 {
        let Self { queries, depth, cooperative } = self;
        if cooperative.is_some() {
            return 16 * (depth / 4 + 2) * (depth + queries) + 80 * queries;
        }
        4 * (queries * depth + self.keys() * (depth + queries))
    }

    fn supported_by(self, caps: &Caps) -> std::result::Result<(), String> {
        if let Some(unit) = self.cooperative {
            caps.has(unit)?;
        }
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }

    /// Workgroups for so many sequences and heads in all; `None` if they cannot be counted.
    fn workgroups(self, heads: usize, seq: usize, head_dim: usize) -> Option<usize> {
        let pieces = head_dim.div_ceil(self.depth as usize).checked_mul(seq.div_ceil(self.queries as usize))?;
        heads.checked_mul(pieces)
    }
}

impl fmt::Display for AttentionTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(unit) = self.cooperative {
            write!(f, "coop{unit}_")?;
        }
        write!(f, "{}x{}x{}", self.queries, self.keys(), self.depth)
    }
}

/// The program (shaders/attention.wgsl, shaders/attention_coop.wgsl). Its name (`Display`) is made of its parts, such
/// as `attention-f16f32-64x32x64-d64-quads`: types of input and sums, tile, features of a head, how these are read;
/// then `share4` where so many query heads share their keys, `causal` and `bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionKernel {
    tile: AttentionTile,
    head_dim: u32,
    access: FeatureAccess,
    types: Types,
    share: u32,
    causal: bool,
    biased: bool,
}

impl AttentionKernel {
    /// Attention of heads of `head_dim` features. An error for a type that kernels do not store, and for a tile of
    /// cooperative matrices unless the storage is f16 and heads are as deep as the tile.
    pub fn new(tile: AttentionTile, head_dim: u32, storage: DType, output: DType) -> Result<Self> {
        let types = Types::new(storage, output)?;
        if !tile.suits(head_dim as usize, storage) {
            return Err(Error::invalid(format!(
                "attention tile {tile} takes heads of {} features of f16, not of {head_dim} of {storage}",
                tile.depth
            )));
        }
        let access = FeatureAccess::of(head_dim);
        Ok(Self { tile, head_dim, access, types, share: 1, causal: false, biased: false })
    }

    /// The same where `share` query heads share their keys and values, queries see no later key, and scores have a
    /// bias.
    pub fn with(self, share: u32, causal: bool, biased: bool) -> Self {
        Self { share, causal, biased, ..self }
    }
}

/// Every text, and where output is as stored each tile with all options; those of the gradient last.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let tiles = Types::all().flat_map(|types| AttentionTile::ALL.map(|tile| (types, tile)));
    let forward = tiles.flat_map(|(types, tile)| {
        let (storage, output) = (types.storage(), types.output());
        let depths = if tile.is_cooperative() { vec![tile.depth] } else { WIDTHS.to_vec() };
        let kernels = depths.into_iter().filter_map(move |d| AttentionKernel::new(tile, d, storage, output).ok());
        let optional = move |kernel: AttentionKernel| kernel.access == FeatureAccess::Quads && storage == output;
        kernels.flat_map(move |kernel| {
            [kernel].into_iter().chain(optional(kernel).then(|| kernel.with(4, true, true))).map(Program::new)
        })
    });
    forward.chain(grad_kernels::shaders())
}

impl Shader for AttentionKernel {
    fn module(&self) -> String {
        Self { head_dim: 0, ..*self }.with(1, false, false).to_string()
    }

    fn text(&self, primitives: Primitives) -> Result<Text> {
        const SHARED: &str = include_str!("../../shaders/shared/attention.wgsl");
        let AttentionTile { queries, depth, cooperative } = self.tile;
        let own = match cooperative {
            Some(_) => include_str!("../../shaders/attention_coop.wgsl"),
            None => include_str!("../../shaders/attention.wgsl"),
        };
        let mut text = self.types.text(&[self.access.text(), SHARED, own])?;
        let (quads, keys) = (depth / 4, self.tile.keys());
        let steps = |pieces: u32| pieces.div_ceil(self.tile.threads());
        let common = [("QUERIES", queries), ("DEPTH", depth)];
        let own = if let Some(unit) = cooperative {
            primitives.precede(&mut text);
            unit.specialise(primitives, &mut text)?;
            let sharers = unit.lanes() / unit.edge();
            vec![
                ("BLOCKS", depth / unit.edge()),
                ("SPAN_BLOCKS", 16 / unit.edge()),
                ("SPANS", depth / 16),
                ("LANE_QUADS", 4 / sharers),
                ("SHARERS", sharers),
                ("Q_STEPS", steps(queries * quads)),
                ("K_STEPS", steps(keys * quads)),
                ("V_STEPS", steps(quads * quads)),
            ]
        } else {
            vec![
                ("COLUMN_QUADS", depth / 32),
                ("SUMS", depth / 8),
                ("Q_STEPS", steps(queries / 4 * quads)),
                ("K_STEPS", steps(keys / 4 * quads)),
                ("V_STEPS", steps(keys * quads)),
            ]
        };
        for (name, value) in common.into_iter().chain(own) {
            text.set(&format!("const {name}: u32"), value as usize)?;
        }
        Ok(text)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let flag = |set| f64::from(u8::from(set));
        vec![
            ("HEAD_DIM", f64::from(self.head_dim)),
            ("SHARE", f64::from(self.share)),
            ("CAUSAL", flag(self.causal)),
            ("BIASED", flag(self.biased)),
        ]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "lengths"),
                Binding::read(4, "bias"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width seq heads scale reach)
    }

    fn threads(&self) -> u32 {
        self.tile.threads()
    }

    fn workgroup_bytes(&self) -> u32 {
        self.tile.workgroup_bytes()
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, 0, 0)?;
        self.tile.supported_by(caps)
    }
}

impl fmt::Display for AttentionKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tile, head_dim, access, types, share, causal, biased } = self;
        write!(f, "attention-{}f32-{tile}-d{head_dim}-{}", types.storage(), access.name())?;
        if *share > 1 {
            write!(f, "-share{share}")?;
        }
        let (causal, biased) = (if *causal { "-causal" } else { "" }, if *biased { "-bias" } else { "" });
        write!(f, "{causal}{biased}{}", types.suffix())
    }
}

/// Keys, or features of values, that a block of queries is multiplied with at once: each query is loaded once for all
/// of them, and their sums fit registers. A query is in each of its lanes: then keys and values are read as they lie in
/// memory, no sum crosses lanes, and a sequence of any length has no ragged end.
const BLOCK: usize = 4;

/// One number for each of a block of queries.
type Lanes = [f32; LANES];

/// Queries of one task. Each task widens all keys and values of its sequence.
const TASK_QUERIES: usize = 64;
/// The same where there are fewer sequences than threads.
const FEW_TASK_QUERIES: usize = 16;

/// Sizes and options: a row of the input has `heads * (1 + 2 / share) * head_dim` features.
#[derive(Clone, Copy, Debug)]
struct Shape {
    seq: usize,
    heads: usize,
    share: usize,
    head_dim: usize,
    causal: bool,
    reach: usize,
}

impl Shape {
    /// Features of Q, and of a row of the output.
    fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Features of Q, K and V.
    fn row(self) -> usize {
        self.width() + 2 * (self.width() / self.share)
    }

    /// Keys that the queries before `end` see.
    fn visible(self, length: usize, end: usize) -> usize {
        if self.causal { length.min(end) } else { length }
    }
}

#[derive(Debug)]
struct Call {
    qkv: Shared,
    lengths: SharedIndices,
    bias: Option<Shared>,
    shape: Shape,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (qkv, lengths, bias) = (read(&self.qkv), read(&self.lengths), self.bias.as_deref().map(read));
        let bias = bias.as_ref().and_then(|bias| f32::of(bias.elements()));
        let given = (&lengths[..], bias);
        each_pair!(qkv.elements(), write(&self.y).elements_mut(), (qkv, y) => attend_all(cpu, self.shape, qkv, given, y));
    }
}

fn attend_all<X: Element, Y: Element>(
    cpu: &Cpu,
    shape: Shape,
    qkv: &[X],
    (lengths, bias): (&[u32], Option<&[f32]>),
    y: &mut [Y],
) {
    let Shape { seq, head_dim, .. } = shape;
    let few = lengths.len() < cpu.info().threads;
    let task = if few { FEW_TASK_QUERIES } else { TASK_QUERIES };
    cpu.each_chunk(y, seq * shape.width(), |sequence, y| {
        let qkv = &qkv[sequence * seq * shape.row()..][..seq * shape.row()];
        let length = seq.min(lengths[sequence] as usize);
        cpu.each_chunk(y, task * shape.width(), |part, y| {
            cpu.with_scratch(Head::scratch(length, head_dim), |scratch| {
                let query0 = part * task;
                cpu.simd().run(Attend { qkv, bias, length, shape, query0, y, scratch });
            });
        });
    });
}

work!(Attend<X, Y>, {
        qkv: &'a [X],
        bias: Option<&'a [f32]>,
        length: usize,
        shape: Shape,
        query0: usize,
        y: &'a mut [Y],
        scratch: &'a mut [f32],
    },
    attend(qkv, bias, length, shape, query0, y, scratch));

/// Attention of the queries of one sequence from `query0` on, as many as `y` has rows.
#[inline(always)]
fn attend<X: Element, Y: Element>(
    qkv: &[X],
    bias: Option<&[f32]>,
    length: usize,
    shape: Shape,
    query0: usize,
    y: &mut [Y],
    scratch: &mut [f32],
) {
    let width = shape.width();
    let real = length.saturating_sub(query0).min(y.len() / width);
    let (y, padding) = y.split_at_mut(real * width);
    padding.fill(Y::from_f32(0.0));
    if real > 0 {
        for head in 0..shape.heads {
            Head { length: shape.visible(length, query0 + real), shape, head }.run(qkv, bias, query0, y, scratch);
        }
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Head {
    /// Keys that the queries see.
    length: usize,
    shape: Shape,
    head: usize,
}

impl Head {
    /// f32s that [`Head::run`] works in: keys and values, and for a block of queries themselves and their scores.
    fn scratch(length: usize, head_dim: usize) -> usize {
        2 * length * head_dim + LANES * (head_dim + length)
    }

    /// The head's part of the output rows `y`, which belong to queries from `query0` on. `qkv` is the sequence.
    #[inline(always)]
    fn run<X: Element, Y: Element>(
        self,
        qkv: &[X],
        bias: Option<&[f32]>,
        query0: usize,
        y: &mut [Y],
        scratch: &mut [f32],
    ) {
        let Self { length, shape, head } = self;
        let (width, head_dim, first) = (shape.width(), shape.head_dim, head * shape.head_dim);
        let (k, rest) = scratch.split_at_mut(length * head_dim);
        let (v, rest) = rest.split_at_mut(length * head_dim);
        let (blocks, _) = rest.as_chunks_mut::<LANES>();
        let (q, scores) = blocks.split_at_mut(head_dim);
        let of = |token: usize, feature: usize| &qkv[token * shape.row() + feature..][..head_dim];

        // Widened by the first of the heads that share them.
        if head % shape.share == 0 {
            let keys = width + head / shape.share * head_dim;
            for (feature, to) in [(keys, &mut *k), (keys + width / shape.share, &mut *v)] {
                for (token, to) in to.chunks_exact_mut(head_dim).enumerate() {
                    for (to, x) in to.iter_mut().zip(of(token, feature)) {
                        *to = x.to_f32();
                    }
                }
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (block, y) in y.chunks_mut(LANES * width).enumerate() {
            let rows = y.len() / width;
            let block0 = query0 + block * LANES;
            // Lanes past the last query compute on what the block before has left there, and nobody reads them.
            for lane in 0..rows {
                for (q, x) in q.iter_mut().zip(of(block0 + lane, first)) {
                    q[lane] = x.to_f32() * scale;
                }
            }
            let scores = &mut scores[..shape.visible(length, block0 + rows)];
            let (fours, rest) = scores.as_chunks_mut::<BLOCK>();
            let (k_fours, k_rest) = k.split_at(fours.len() * BLOCK * head_dim);
            for (scores, k) in fours.iter_mut().zip(k_fours.chunks_exact(BLOCK * head_dim)) {
                *scores = products(q, k);
            }
            for (score, k) in rest.iter_mut().zip(k_rest.chunks_exact(head_dim)) {
                [*score] = products(q, k);
            }
            if let Some(bias) = bias {
                add_bias(scores, &bias[head * (2 * shape.reach + 1)..][..2 * shape.reach + 1], block0, rows);
            }
            if shape.causal {
                hide_later(scores, block0);
            }
            let factors = softmax(scores).map(|total| 1.0 / total);
            let whole = head_dim / BLOCK * BLOCK;
            for column in (0..whole).step_by(BLOCK) {
                let sums: [Lanes; BLOCK] = values(scores, v, head_dim, column);
                store(&sums, &factors, y, width, first + column);
            }
            for column in whole..head_dim {
                let sums: [Lanes; 1] = values(scores, v, head_dim, column);
                store(&sums, &factors, y, width, first + column);
            }
        }
    }
}

/// Adds to the scores of `rows` queries from `query0` on what their distances from each key have in a row of the bias.
#[inline(always)]
fn add_bias(scores: &mut [Lanes], bias: &[f32], query0: usize, rows: usize) {
    let reach = bias.len() / 2;
    for (key, scores) in scores.iter_mut().enumerate() {
        for (lane, score) in scores[..rows].iter_mut().enumerate() {
            *score += bias[key + reach - (query0 + lane)];
        }
    }
}

/// Takes from the queries from `query0` on, one to a lane, the keys behind them: their exponentials become zero.
#[inline(always)]
fn hide_later(scores: &mut [Lanes], query0: usize) {
    for (key, scores) in scores.iter_mut().enumerate().skip(query0) {
        let seen = |lane: usize| key <= query0 + lane;
        scores
            .iter_mut()
            .enumerate()
            .for_each(|(lane, score)| *score = if seen(lane) { *score } else { f32::NEG_INFINITY });
    }
}

/// Scores of the queries `q`, one vector of lanes per feature, with some keys, one after another in `k`.
#[inline(always)]
fn products<const K: usize>(q: &[Lanes], k: &[f32]) -> [Lanes; K] {
    let rows: [&[f32]; K] = std::array::from_fn(|row| &k[row * q.len()..][..q.len()]);
    let mut sums = [[0.0; LANES]; K];
    for (d, q) in q.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let k = row[d];
            for (sum, q) in sums.iter_mut().zip(q) {
                *sum += k * q;
            }
        }
    }
    sums
}

/// Replaces the scores of each lane by the exponentials of their distances from the largest. Returns their sums.
#[inline(always)]
fn softmax(scores: &mut [Lanes]) -> Lanes {
    let mut highest = [f32::NEG_INFINITY; LANES];
    for scores in scores.iter() {
        for (highest, &score) in highest.iter_mut().zip(scores) {
            *highest = if score > *highest { score } else { *highest };
        }
    }
    let mut sums = [0.0; LANES];
    for scores in scores {
        for ((score, highest), sum) in scores.iter_mut().zip(&highest).zip(&mut sums) {
            *score = exp(*score - highest);
            *sum += *score;
        }
    }
    sums
}

/// Weighted sums of some of the values' features, from `column` on; `v` has `head_dim` of them per key.
#[inline(always)]
fn values<const C: usize>(weights: &[Lanes], v: &[f32], head_dim: usize, column: usize) -> [Lanes; C] {
    let mut sums = [[0.0; LANES]; C];
    for (weights, v) in weights.iter().zip(v.chunks_exact(head_dim)) {
        let Some(v) = v[column..].first_chunk::<C>() else { continue };
        for (sums, v) in sums.iter_mut().zip(v) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += v * weight;
            }
        }
    }
    sums
}

/// Features of the output from `column` on, for as many queries as `y` has rows.
#[inline(always)]
fn store<Y: Element>(sums: &[Lanes], factors: &Lanes, y: &mut [Y], width: usize, column: usize) {
    for ((lane, y), factor) in y.chunks_exact_mut(width).enumerate().zip(factors) {
        for (y, sums) in y[column..].iter_mut().zip(sums) {
            *y = Y::from_f32(sums[lane] * factor);
        }
    }
}

/// Attention as a node: Q, K and V side by side, the lengths, and a bias if it adds one.
#[derive(Debug)]
struct AttentionNode {
    heads: usize,
    kv_heads: usize,
    /// Features of K and V of a token.
    kv_width: usize,
    causal: bool,
    /// Whether it adds a bias to its scores.
    biased: bool,
}

impl AttentionNode {
    /// The attention of these arguments.
    fn operation<'a>(&self, args: &NodeArgs<'a>) -> Result<Attention<'a>> {
        let &Self { heads, kv_heads, causal, .. } = self;
        let attention = Attention::new(args.tensor(0)?, args.indices(1)?, (args.batch, args.seq), heads, args.y);
        let attention = attention.kv_heads(kv_heads);
        let attention = if causal { attention.causal() } else { attention };
        Ok(match args.reads.get(2) {
            Some(_) => attention.relative_bias(args.tensor(2)?),
            None => attention,
        })
    }
}

impl NodeOp for AttentionNode {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        args.device.prepare(&self.operation(args)?)
    }

    fn is_causal(&self) -> bool {
        self.causal && !self.biased
    }

    fn cache_width(&self) -> usize {
        self.kv_width
    }

    fn prepare_cached(&self, args: &NodeArgs<'_>, cache: Option<NodeCache<'_>>) -> Result<Vec<Prepared>> {
        let Some(NodeCache { tensor: cache, past, is_empty }) = cache.filter(|_| self.is_causal()) else {
            return Err(Error::invalid("attention to later tokens, or with a bias, cannot go on from a cache"));
        };
        let &Self { heads, kv_heads, .. } = self;
        let &NodeArgs { device, batch, seq, y, .. } = args;
        let (qkv, lengths) = (args.tensor(0)?, args.indices(1)?);
        let append = device.prepare(&KvAppend { qkv, lengths, past, batch, seq, cache })?;
        Ok(if is_empty {
            vec![self.prepare(args)?, append]
        } else {
            let attention = CachedAttention { qkv, cache, lengths, past, batch, seq, heads, kv_heads, y };
            vec![append, device.prepare(&attention)?]
        })
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let forward = self.operation(&args.forward)?;
        let (dqkv, dbias) = (args.gradient(0), args.gradient(2));
        if dqkv.is_none() && dbias.is_none() {
            return Ok(Vec::new());
        }
        let device = args.forward.device;
        // Where the bias alone learns, that of Q, K and V goes where nobody reads it.
        let nowhere = device.zeros(dqkv.map_or(forward.qkv.rows(), |_| 0), forward.qkv.cols(), DType::F32)?;
        let dqkv = dqkv.unwrap_or(Gradient { to: &nowhere, add: false });
        Ok(vec![device.prepare(&AttentionGrad { forward, dy: args.dy, dqkv, dbias })?])
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let &Self { heads, kv_heads, causal, .. } = self;
        let (qkv, lengths) = (args.matrix(0)?, args.indices(1)?);
        let bias = if args.len() > 2 { Some(args.matrix(2)?.view()) } else { None };
        let options = attention::AttentionOptions { kv_heads: Some(kv_heads), causal, bias };
        Ok(attention::exact(qkv.view(), lengths, (qkv.nrows(), heads), &options))
    }
}

/// Attention to be added to a graph.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec {
    /// Q, K and V of each token side by side, each with its heads side by side.
    pub qkv: ValueId,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and of values, a divisor of `heads`.
    pub kv_heads: usize,
    /// Whether a query sees its own key and those before it alone.
    pub causal: bool,
    /// What is added to scores: see [`Attention::relative_bias`].
    pub relative_bias: Option<ParamId>,
}

impl AttentionSpec {
    /// Attention of so many heads to all tokens, without a bias.
    pub fn new(qkv: ValueId, heads: usize) -> Self {
        Self { qkv, heads, kv_heads: heads, causal: false, relative_bias: None }
    }
}

impl Graph {
    /// Adds attention. An error if the features of `qkv` are no whole number for each head.
    pub fn attention(&mut self, name: &str, spec: AttentionSpec) -> Result<ValueId> {
        let AttentionSpec { qkv, heads, kv_heads, causal, relative_bias } = spec;
        let (features, all) = (self.value(qkv).cols, heads + 2 * kv_heads);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || !features.is_multiple_of(all) {
            let heads = format!("{heads} heads, {kv_heads} of them of keys and values");
            return Err(Error::invalid(format!("{name}: {features} features are no whole number for each of {heads}")));
        }
        let mut reads = vec![Read::Value(qkv), Read::Input(Input::Lengths)];
        reads.extend(relative_bias.map(Read::Param));
        let width = features / all * heads;
        let kv_width = features / all * 2 * kv_heads;
        self.add_node(
            name,
            AttentionNode { heads, kv_heads, kv_width, causal, biased: relative_bias.is_some() },
            reads,
            (Rows::Tokens, width, Precision::Model),
        )
    }
}
