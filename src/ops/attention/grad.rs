//! The gradient of softmax attention.
//!
//! Nothing but the output is kept by the forward: scores and the statistics of their softmax are computed anew. With P
//! = softmax(Q Kᵀ·scale + bias) and dP = dY Vᵀ, the gradient of the scores is dS = P∘(dP − D), where D of a query, Σ
//! P∘dP over its keys, is the product of its rows of dY and Y (T. Dao et al. 2022, arXiv:2205.14135, appendix B). Then
//! dV = Pᵀ dY, dQ = scale·dS K, dK = scale·dSᵀ Q, and the gradient of a relative bias is the sum of dS over all pairs
//! of one distance.
//!
//! Invariant: rows of padding are not read, and their gradients are zero.

use super::grad_kernels::{
    AttentionGradBias, AttentionGradKv, AttentionGradQ, BiasParams, DEPTH, DISTANCES, Options, ROWS,
};
use super::{Attention, BLOCK, Lanes, Params, Shape, add_bias, hide_later, softmax};
use crate::cpu::rows::{LANES, Run, Strip, Strips, work};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{BufferRange, Dispatch, Gpu, Scratch};
use crate::kernels::Program;
use crate::matrix::{DType, Element, Elements};
use crate::ops::{Cost, Gradient, Operand, Operation, cost_of, dispatch};
use crate::simd::{Instructions, Simd, Transpose16, multiply_add};

/// The gradient of [`Attention`]: from that of its output to those of Q, K and V, and of its bias. All tensors are f32.
///
/// Rows at or past a sequence's length have the gradient zero, whatever the operands hold there; where gradients are
/// added, they stay as they are.
///
/// ```
/// use sparse24::ops::{Gradient, attention::AttentionGrad};
/// use sparse24::{Attention, DType, Device, Matrix};
/// let device = Device::cpu()?;
/// let qkv = device.upload(&Matrix::from_f32(2, 3, &[0.0, 1.0, 2.0, 0.0, 1.0, 4.0])?)?;
/// let lengths = device.indices(1)?;
/// device.write_indices(&lengths, &[2])?;
/// let y = device.zeros(2, 1, DType::F32)?;
/// let attention = Attention::new(&qkv, &lengths, (1, 2), 1, &y);
/// device.prepare(&attention)?.run()?;
///
/// let dy = device.upload(&Matrix::from_f32(2, 1, &[1.0, 0.0])?)?;
/// let dqkv = device.zeros(2, 3, DType::F32)?;
/// let to = Gradient { to: &dqkv, add: false };
/// device.prepare(&AttentionGrad { forward: attention, dy: &dy, dqkv: to, dbias: None })?.run()?;
/// // Each value has half of the first query's attention. Queries of zero tell nothing of keys, nor equal keys of queries.
/// assert_eq!(device.read(&dqkv)?, Matrix::from_f32(2, 3, &[0.0, 0.0, 0.5, 0.0, 0.0, 0.5])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AttentionGrad<'a> {
    /// The attention, which has run: its output is read.
    pub forward: Attention<'a>,
    /// Gradient of the output, of its shape.
    pub dy: &'a Tensor,
    /// Gradient of Q, K and V side by side, like the attention's input.
    pub dqkv: Gradient<'a>,
    /// Gradient of the bias, if it is wanted: of an attention that has one. Zero for distances of no two tokens.
    pub dbias: Option<Gradient<'a>>,
}

impl Operation for AttentionGrad<'_> {
    fn name(&self) -> &'static str {
        "attention_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { forward, dy, dqkv, dbias } = *self;
        let Attention { qkv, lengths, bias, y, .. } = forward;
        let given = [Operand::read("qkv", qkv), Operand::read("lengths", lengths), Operand::read("y", y)];
        let given = given.into_iter().chain(bias.map(|bias| Operand::read("bias", bias)));
        let own = [Operand::read("dy", dy), dqkv.operand("dqkv")];
        given.chain(own).chain(dbias.map(|dbias| dbias.operand("dbias"))).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { forward, dy, dqkv, dbias } = *self;
        forward.check()?;
        let Attention { qkv, bias, y, .. } = forward;
        expect_shape("dy", dy.shape(), y.shape())?;
        for (what, tensor) in [("qkv", qkv), ("y", y), ("dy", dy)] {
            expect_dtype(what, tensor.dtype(), DType::F32)?;
        }
        dqkv.check("dqkv", qkv.shape())?;
        match (dbias, bias) {
            (Some(dbias), Some(bias)) => dbias.check("dbias", bias.shape()),
            (Some(_), None) => Err(Error::invalid("dbias is asked for, of an attention without a bias")),
            (None, _) => Ok(()),
        }
    }

    /// Five products of all queries with all keys that they see, where the forward has two.
    fn cost(&self) -> Cost {
        cost_of(2.5 * self.forward.cost().flops, &self.operands())
    }

    /// The queries' gradient comes first: it leaves what the others need.
    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { forward, dy, dqkv, dbias } = *self;
        let Attention { qkv, lengths, batch, seq, heads, kv_heads, causal, bias, y } = forward;
        let (head_dim, params) = (forward.head_dim(), forward.params()?);
        let pieces = seq.div_ceil(ROWS);
        let options = Options {
            head_dim: gpu_size("features of a head", head_dim.max(1))?,
            share: gpu_size("heads", forward.share())?,
            causal,
            biased: bias.is_some(),
            add: dqkv.add,
        };
        let workgroups = |heads: usize| -> Result<usize> {
            let all = checked_mul("workgroups of an attention", checked_mul("heads", batch, heads)?, pieces)?;
            checked_mul("workgroups of an attention", all, head_dim.div_ceil(DEPTH))
        };

        // For each query and head a vec4; for each workgroup of queries a row of sums by distance.
        let queries = checked_mul("queries of all heads", y.rows(), heads)?;
        let columns = checked_mul("distances", pieces + 1, ROWS)?;
        let rows = checked_mul("rows of sums", checked_mul("heads", batch, heads)?, pieces)?;
        let sums = match dbias {
            Some(_) => gpu_size("sums by distance", checked_mul("sums by distance", rows, columns)?)?,
            // A binding is there all the same.
            None => 4,
        };
        let words = [4 * u64::from(gpu_size("queries of all heads", queries)?), u64::from(sums)];
        let buffers = [gpu.scratch(Scratch::Statistics, 4 * words[0])?, gpu.scratch(Scratch::Sums, 4 * words[1])?];
        let scratch = |at: usize| Some(BufferRange { buffer: &buffers[at], offset: 0, bytes: 4 * words[at] });
        let (statistics, sums) = (scratch(0), scratch(1));

        let common = [qkv.on_gpu(), dqkv.to.on_gpu(), lengths.on_gpu(), bias.and_then(Tensor::on_gpu), dy.on_gpu()];
        let program = Program::new(AttentionGradQ { options, bias_grad: dbias.is_some() });
        let operands = [&common[..], &[y.on_gpu(), statistics, sums]].concat();
        let mut calls = dispatch(gpu, program, workgroups(heads)?, &params, &operands)?;
        let kv_params = Params { heads: gpu_size("heads", kv_heads)?, ..params };
        let operands = [&common[..], &[statistics]].concat();
        let program = Program::new(AttentionGradKv(options));
        calls.extend(dispatch(gpu, program, workgroups(kv_heads)?, &kv_params, &operands)?);
        if let Some(dbias) = dbias {
            let params = BiasParams {
                heads: params.heads,
                // Without features no workgroup has left sums.
                sequences: if head_dim == 0 { 0 } else { gpu_size("sequences", batch)? },
                pieces: gpu_size("pieces of queries", pieces)?,
                columns: gpu_size("distances", columns)?,
                reach: params.reach,
            };
            let workgroups = checked_mul("workgroups of a bias", heads, dbias.to.cols().div_ceil(DISTANCES))?;
            let program = Program::new(AttentionGradBias { add: dbias.add });
            calls.extend(dispatch(gpu, program, workgroups, &params, &[sums, dbias.to.on_gpu()])?);
        }
        Ok(calls)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { forward, dy, dqkv, dbias } = *self;
        let Attention { qkv, lengths, bias, y, .. } = forward;
        Ok(Box::new(Call {
            qkv: qkv.on_cpu()?,
            lengths: lengths.on_cpu()?,
            bias: bias.map(Tensor::on_cpu).transpose()?,
            y: y.on_cpu()?,
            dy: dy.on_cpu()?,
            shape: forward.shape(),
            dqkv: (dqkv.to.on_cpu()?, dqkv.add),
            dbias: dbias.map(|dbias| Ok::<_, Error>((dbias.to.on_cpu()?, dbias.add))).transpose()?,
        }))
    }
}

#[derive(Debug)]
struct Call {
    qkv: Shared,
    lengths: SharedIndices,
    bias: Option<Shared>,
    y: Shared,
    dy: Shared,
    shape: Shape,
    /// Where gradients go, and whether they are added.
    dqkv: (Shared, bool),
    dbias: Option<(Shared, bool)>,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (qkv, lengths, bias) = (read(&self.qkv), read(&self.lengths), self.bias.as_deref().map(read));
        let (y, dy) = (read(&self.y), read(&self.dy));
        let (mut dqkv, mut dbias) = (write(&self.dqkv.0), self.dbias.as_ref().map(|(dbias, _)| write(dbias)));
        let bias = bias.as_ref().and_then(|bias| f32::of(bias.elements()));
        let numbers = (f32::of(qkv.elements()), f32::of(y.elements()), f32::of(dy.elements()));
        let (Some(qkv), Some(y), Some(dy)) = numbers else { return };
        let Elements::F32(dqkv) = dqkv.elements_mut() else { return };

        let shape @ Shape { seq, heads, share, head_dim, reach, .. } = self.shape;
        let (width, kv_heads) = (shape.width(), heads / share);
        let runs = [
            Run { first: 0, width: share * head_dim },
            Run { first: width, width: head_dim },
            Run { first: width + kv_heads * head_dim, width: head_dim },
        ];
        let cut = Strips { columns: shape.row(), rows: seq, strips: kv_heads, runs: &runs };
        // Each task has sums of its own for the bias, for each of its heads and each distance in a sequence.
        let distances = 2 * seq.max(1) - 1;
        let own = if dbias.is_some() { share * distances } else { 0 };
        cpu.with_scratch(lengths.len() * kv_heads * own, |sums| {
            sums.fill(0.0);
            cpu.each_strip(dqkv, cut, (&mut *sums, own), |task, strip, dbias| {
                let sequence = task / kv_heads;
                let group = Group {
                    qkv: &qkv[sequence * seq * shape.row()..],
                    y: &y[sequence * seq * width..],
                    dy: &dy[sequence * seq * width..],
                    bias,
                    length: seq.min(lengths[sequence] as usize),
                    shape,
                    kv_head: task % kv_heads,
                    simd: cpu.simd(),
                };
                cpu.with_scratch(group.scratch(), |scratch| {
                    cpu.simd().run(Differentiate { group, strip, add: self.dqkv.1, dbias, scratch });
                });
            });
            let (Some(dbias), Some((_, add))) = (&mut dbias, &self.dbias) else { return };
            let Elements::F32(dbias) = dbias.elements_mut() else { return };
            cpu.each_chunk(dbias, 2 * reach + 1, |head, dbias| {
                if !add {
                    dbias.fill(0.0);
                }
                // Each sum over all sequences is complete before it is added.
                for (distance, to) in dbias[reach + 1 - seq.max(1)..][..distances].iter_mut().enumerate() {
                    *to += sums.iter().skip(head * distances + distance).step_by(heads * distances).sum::<f32>();
                }
            });
        });
    }
}

work!(Differentiate<>, {
        group: Group<'a>,
        strip: Strip<'a>,
        add: bool,
        dbias: &'a mut [f32],
        scratch: &'a mut [f32],
    },
    group.run::<S>(strip, add, dbias, scratch));

/// The query heads of one sequence that share a head of keys and values, and that head.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// From the sequence's first row on.
    qkv: &'a [f32],
    y: &'a [f32],
    dy: &'a [f32],
    /// Of all heads.
    bias: Option<&'a [f32]>,
    length: usize,
    shape: Shape,
    kv_head: usize,
    simd: Simd,
}

impl<'a> Group<'a> {
    /// Features of a row in scratch: those of a head, filled up to whole vectors.
    fn stride(self) -> usize {
        self.shape.head_dim.next_multiple_of(LANES)
    }

    /// f32s that [`Self::run`] works in: K, V and their gradients; rows of Q and dY and a gradient of Q for a block of
    /// queries; and with a query in each lane, Q and dY, P and dS.
    fn scratch(self) -> usize {
        self.stride() * (4 * self.length + 3 * LANES) + 2 * LANES * (self.shape.head_dim + self.length)
    }

    /// Features of a head, from `feature` of a token's Q, K and V on.
    fn of(self, token: usize, feature: usize) -> &'a [f32] {
        &self.qkv[token * self.shape.row() + feature..][..self.shape.head_dim]
    }

    /// Writes the gradients of its Q, K and V to the strip, and adds those of the bias to a row for each of its heads,
    /// in which distance 0 is in the middle.
    ///
    /// As in the forward, a query is in each of the lanes of scores, so that what a key has of 16 queries is one
    /// vector. Gradients are sums of rows: of queries for a key, of keys for a query. What fills the rows up to whole
    /// vectors is computed on, and nobody reads what becomes of it.
    #[inline(always)]
    fn run<S: Instructions>(self, mut strip: Strip<'_>, add: bool, dbias: &mut [f32], scratch: &mut [f32]) {
        let Self { length, shape, kv_head, simd, .. } = self;
        let Shape { seq, share, head_dim, .. } = shape;
        let (width, kv_width, stride) = (shape.width(), shape.width() / share, self.stride());
        let (k, rest) = scratch.split_at_mut(length * stride);
        let (v, rest) = rest.split_at_mut(length * stride);
        let (dk, rest) = rest.split_at_mut(length * stride);
        let (dv, rest) = rest.split_at_mut(length * stride);
        let (q_rows, rest) = rest.split_at_mut(LANES * stride);
        let (dy_rows, rest) = rest.split_at_mut(LANES * stride);
        let (dq_rows, rest) = rest.split_at_mut(LANES * stride);
        let (lanes, _) = rest.as_chunks_mut::<LANES>();
        let (q, lanes) = lanes.split_at_mut(head_dim);
        let (dy, lanes) = lanes.split_at_mut(head_dim);
        let (p, ds) = lanes.split_at_mut(length);

        let keys = width + kv_head * head_dim;
        for (feature, to) in [(keys, &mut *k), (keys + kv_width, &mut *v)] {
            for (token, to) in to.chunks_exact_mut(stride).enumerate() {
                to[..head_dim].copy_from_slice(self.of(token, feature));
            }
        }
        dk.fill(0.0);
        dv.fill(0.0);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let distances = 2 * seq - 1;
        for shared in 0..share {
            let head = kv_head * share + shared;
            let first = head * head_dim;
            for query0 in (0..length).step_by(LANES) {
                let rows = LANES.min(length - query0);
                let mut d = [0.0; LANES];
                for (lane, d) in d[..rows].iter_mut().enumerate() {
                    let query = query0 + lane;
                    let given = |all: &'a [f32]| &all[query * width + first..][..head_dim];
                    *d = dot(given(self.dy), given(self.y));
                    dy_rows[lane * stride..][..head_dim].copy_from_slice(given(self.dy));
                    store(self.of(query, first), scale, false, &mut q_rows[lane * stride..][..head_dim]);
                }
                // Lanes past the last query compute on what the block before has left there, and nobody reads them.
                simd.run(Transpose16 { from: q_rows, stride, to: q });
                simd.run(Transpose16 { from: dy_rows, stride, to: dy });
                let seen = shape.visible(length, query0 + rows);
                let (p, ds) = (&mut p[..seen], &mut ds[..seen]);
                products::<S>(q, k, stride, p);
                products::<S>(dy, v, stride, ds);
                if let Some(bias) = self.bias {
                    let columns = 2 * shape.reach + 1;
                    add_bias(p, &bias[head * columns..][..columns], query0, rows);
                }
                if shape.causal {
                    hide_later(p, query0);
                }
                let factors = softmax(p).map(|total| 1.0 / total);
                for (p, ds) in p.iter_mut().zip(&mut *ds) {
                    for (((p, ds), factor), d) in p.iter_mut().zip(ds).zip(&factors).zip(&d) {
                        *p *= factor;
                        *ds = *p * (*ds - d);
                    }
                }
                if let Some(dbias) = dbias.get_mut(shared * distances..(shared + 1) * distances) {
                    add_distances(ds, rows, query0, dbias);
                }
                add_to_keys::<S>(p, dy_rows, rows, stride, dv);
                add_to_keys::<S>(ds, q_rows, rows, stride, dk);
                to_queries::<S>(ds, k, stride, dq_rows);
                for (lane, dq) in dq_rows.chunks_exact(stride).take(rows).enumerate() {
                    let to = &mut strip.row(query0 + lane, 0)[shared * head_dim..][..head_dim];
                    store(dq, scale, add, to);
                }
            }
        }
        for (token, (dk, dv)) in dk.chunks_exact(stride).zip(dv.chunks_exact(stride)).enumerate() {
            store(dk, 1.0, add, strip.row(token, 1));
            store(dv, 1.0, add, strip.row(token, 2));
        }
        if !add {
            for token in length..seq {
                (0..3).for_each(|run| strip.row(token, run).fill(0.0));
            }
        }
    }
}

/// A row times a factor, written or added.
#[inline(always)]
fn store(from: &[f32], factor: f32, add: bool, to: &mut [f32]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = x * factor + if add { *to } else { 0.0 };
    }
}

/// Sum of products of two rows.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// Products of queries, one vector of lanes per feature, with as many rows of keys as there are `sums`.
#[inline(always)]
fn products<S: Instructions>(q: &[Lanes], k: &[f32], stride: usize, sums: &mut [Lanes]) {
    let (blocks, rest) = sums.as_chunks_mut::<BLOCK>();
    let (k_blocks, k_rest) = k.split_at(blocks.len() * BLOCK * stride);
    for (sums, k) in blocks.iter_mut().zip(k_blocks.chunks_exact(BLOCK * stride)) {
        products_of::<S, BLOCK>(q, k, stride, sums);
    }
    for (sums, k) in rest.iter_mut().zip(k_rest.chunks_exact(stride)) {
        products_of::<S, 1>(q, k, stride, std::array::from_mut(sums));
    }
}

#[inline(always)]
fn products_of<S: Instructions, const K: usize>(q: &[Lanes], k: &[f32], stride: usize, to: &mut [Lanes; K]) {
    let rows: [&[f32]; K] = std::array::from_fn(|row| &k[row * stride..][..q.len()]);
    let mut sums = [[0.0; LANES]; K];
    for (d, &q) in q.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            add_multiple::<S>(sums, row[d], q);
        }
    }
    for (to, sums) in to.iter_mut().zip(&sums) {
        to.copy_from_slice(sums);
    }
}

/// Adds to the row of each key the sum of rows of so many queries, each times the key's weight for it.
#[inline(always)]
fn add_to_keys<S: Instructions>(weights: &[Lanes], from: &[f32], queries: usize, stride: usize, to: &mut [f32]) {
    let (blocks, rest) = weights.as_chunks::<BLOCK>();
    let (to_blocks, to_rest) = to.split_at_mut(blocks.len() * BLOCK * stride);
    for (weights, to) in blocks.iter().zip(to_blocks.chunks_exact_mut(BLOCK * stride)) {
        add_to_keys_of::<S, BLOCK>(weights, from, queries, stride, to);
    }
    for (weights, to) in rest.iter().zip(to_rest.chunks_exact_mut(stride)) {
        add_to_keys_of::<S, 1>(&[*weights], from, queries, stride, to);
    }
}

#[inline(always)]
fn add_to_keys_of<S: Instructions, const K: usize>(
    weights: &[Lanes; K],
    from: &[f32],
    queries: usize,
    stride: usize,
    to: &mut [f32],
) {
    for column in (0..stride).step_by(LANES) {
        let mut sums: [Lanes; K] = std::array::from_fn(|key| vector(to, key * stride + column));
        for (query, row) in from.chunks_exact(stride).take(queries.min(LANES)).enumerate() {
            let row = vector(row, column);
            for (sums, weights) in sums.iter_mut().zip(weights) {
                add_multiple::<S>(sums, weights[query], row);
            }
        }
        for (key, sums) in sums.iter().enumerate() {
            to[key * stride + column..][..LANES].copy_from_slice(sums);
        }
    }
}

/// The row of each of a block's queries: the sum of rows of keys, each times the query's weight for it.
#[inline(always)]
fn to_queries<S: Instructions>(weights: &[Lanes], from: &[f32], stride: usize, to: &mut [f32]) {
    for query in (0..LANES).step_by(BLOCK) {
        for column in (0..stride).step_by(LANES) {
            let mut sums = [[0.0; LANES]; BLOCK];
            for (weights, from) in weights.iter().zip(from.chunks_exact(stride)) {
                let row: Lanes = vector(from, column);
                for (sums, weight) in sums.iter_mut().zip(&weights[query..]) {
                    add_multiple::<S>(sums, *weight, row);
                }
            }
            for (lane, sums) in sums.iter().enumerate() {
                to[(query + lane) * stride + column..][..LANES].copy_from_slice(sums);
            }
        }
    }
}

/// A vector of a slice, from an element on.
#[inline(always)]
fn vector(from: &[f32], at: usize) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes.copy_from_slice(&from[at..][..LANES]);
    lanes
}

#[inline(always)]
fn add_multiple<S: Instructions>(sums: &mut Lanes, factor: f32, of: Lanes) {
    for (sum, x) in sums.iter_mut().zip(of) {
        *sum = multiply_add::<S>(factor, x, *sum);
    }
}

/// Adds what `rows` queries from `query0` on have of each key to the sum of its distance; that of 0 is in the middle.
#[inline(always)]
fn add_distances(weights: &[Lanes], rows: usize, query0: usize, sums: &mut [f32]) {
    for (key, weights) in weights.iter().enumerate() {
        for (lane, weight) in weights[..rows].iter().enumerate() {
            sums[key + sums.len() / 2 - (query0 + lane)] += weight;
        }
    }
}
