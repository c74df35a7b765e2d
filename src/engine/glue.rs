//! What a transformer computes between its GEMMs: embeddings, layer normalisation, attention, pooling, on any device.
//!
//! Each operation is a struct of operands and a method of [`Device`] that checks them and binds them, once, as
//! [`Device::prepare`] does for products; the [`Prepared`] call runs as often as wanted, alone, recorded into a
//! caller's encoder, or in a row with others ([`Device::submit`]). Tensors are token-major, f32 or f16 in any
//! combination of input and output; arithmetic and sums are f32 (see [`Attention`] for its one exception). A sequence
//! is `seq` consecutive rows of a tensor, its first tokens real and the rest padding. Each operation's exact result and
//! error bound are in [`crate::reference::glue`].
//!
//! Errors: [`Error::Shape`] and [`Error::DType`] name the operand that does not fit, [`Error::Mismatch`] one of another
//! device, [`Error::TooLarge`] one that the device cannot bind at once, [`Error::MissingFeature`] what the device lacks
//! (f16, or workgroup memory). An output must share no memory with an input. Outputs without elements are no error.
//! Invariant: a prepared call's operands have the shapes that its kernel indexes, and live on its device; indices are
//! checked where they are used.
//!
//! ```
//! use sparse24::glue::{Attention, Embed, LayerNorm, Pool};
//! use sparse24::{DType, Device, Matrix, measure::uniform};
//!
//! // Two sequences of up to four tokens, 12 features, three heads of four.
//! let (batch, seq, d) = (2, 4, 12);
//! let device = Device::cpu()?;
//! let words = device.upload(&uniform(100, d, DType::F32, 1)?)?;
//! let ids = device.indices(batch * seq)?;
//! let lengths = device.indices(batch)?;
//! let ones = device.upload(&Matrix::from_f32(1, d, &[1.0; 12])?)?;
//! let zeros = device.zeros(1, d, DType::F32)?;
//! let x = device.zeros(batch * seq, d, DType::F32)?;
//! let normed = device.zeros(batch * seq, d, DType::F32)?;
//! let qkv = device.zeros(batch * seq, 3 * d, DType::F32)?; // a GEMM would fill it
//! let attended = device.zeros(batch * seq, d, DType::F32)?;
//! let pooled = device.zeros(batch, d, DType::F32)?;
//!
//! let calls = [
//!     device.embed(&Embed { tables: &[(&words, &ids)], y: &x })?,
//!     device.layer_norm(&LayerNorm { x: &x, gamma: &ones, beta: &zeros, eps: 1e-12, y: &normed })?,
//!     device.attention(&Attention { qkv: &qkv, lengths: &lengths, batch, seq, heads: 3, y: &attended })?,
//!     device.pool(&Pool { x: &normed, lengths: &lengths, batch, seq, normalize: true, y: &pooled })?,
//! ];
//! // For each batch of texts: new ids and lengths, one submission.
//! device.write_indices(&ids, &[5, 7, 11, 0, 13, 17, 0, 0])?;
//! device.write_indices(&lengths, &[3, 2])?;
//! device.submit(&calls)?;
//! let embedding = device.read(&pooled)?.to_array();
//! assert!((embedding.row(0).mapv(|x| x * x).sum() - 1.0).abs() < 1e-6);
//! # Ok::<(), sparse24::Error>(())
//! ```

use std::sync::{Arc, RwLock};

use super::{Device, Inner, Prepared, Tensor, TensorStore, Work, bind, foreign, read, write};
use crate::cpu::{AttentionShape, Cpu};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{Binding, Gpu};
use crate::kernels::glue::{AttentionTile, Glue, GlueParams, NORM_TOKENS, THREADS};
use crate::kernels::{Caps, Program};
use crate::matrix::{DType, Element};
use crate::plan::grid;

/// A matrix of the CPU device.
pub(super) type Shared = Arc<RwLock<crate::Matrix>>;
/// Indices of the CPU device.
pub(super) type SharedIndices = Arc<RwLock<Vec<u32>>>;

/// A vector of u32 on a device: ids of rows, or lengths of sequences. Cloning gives another handle to the same memory.
#[derive(Clone, Debug)]
pub struct Indices {
    device: Device,
    len: usize,
    store: IndexStore,
}

#[derive(Clone, Debug)]
enum IndexStore {
    Gpu(wgpu::Buffer),
    Cpu(SharedIndices),
}

impl Indices {
    /// Number of indices.
    pub fn len(&self) -> usize {
        self.len
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Sum of embeddings: `y[t] = Σ table[ids[t]]` over the tables, `t` being a row of `y`.
///
/// An id at or past the end of its table reads the table's last row: what an id may be is for the caller to check, who
/// knows where it comes from. A GPU binds a table at once: one that is larger than its limit for that
/// ([`Caps::binding_bytes`](crate::kernels::Caps)) is refused, not split as the weights of linear layers are.
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    /// One to three tables of one type, each `rows x d` with at least one row, and for each an id per row of `y`.
    pub tables: &'a [(&'a Tensor, &'a Indices)],
    /// `tokens x d`, overwritten.
    pub y: &'a Tensor,
}

/// Layer normalisation: `y = (x - mean) / √(variance + eps) · gamma + beta` over the features of each token, with the
/// biased variance (the mean of squared differences, computed in a second pass). A token whose variance overflows f32
/// becomes NaNs.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// `tokens x d`.
    pub x: &'a Tensor,
    /// `1 x d`, f32.
    pub gamma: &'a Tensor,
    /// `1 x d`, f32.
    pub beta: &'a Tensor,
    /// What is added to the variance; finite, not negative.
    pub eps: f32,
    /// `tokens x d`, overwritten. Not the memory of `x`.
    pub y: &'a Tensor,
}

/// Attention: `y = softmax(Q Kᵀ / √(d / heads)) V` per sequence and head, over the sequence's real tokens.
///
/// Keys and values at or past a sequence's length contribute nothing, whatever they hold; the rows of `y` there become
/// zeros. A length past `seq` counts as `seq`; a sequence of length 0 becomes zeros. Scores never reach memory: on a
/// GPU a workgroup holds those of a few keys at a time, and on the CPU a thread those of 16 queries, so `seq` is
/// bounded by `qkv` alone.
///
/// A GPU whose cooperative matrices pay multiplies f16 heads of 32 or 64 features by them, and rounds the weights of a
/// sum to f16 for that. Of heads of more than 64 features a GPU computes the scores anew for each 64.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `batch·seq x 3·d`: Q, K and V of a token side by side, each with its heads side by side.
    pub qkv: &'a Tensor,
    /// Real tokens of each sequence, `batch` of them.
    pub lengths: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence.
    pub seq: usize,
    /// Number of heads, of which `d` is a multiple.
    pub heads: usize,
    /// `batch·seq x d`, overwritten.
    pub y: &'a Tensor,
}

/// Mean of each sequence's real tokens, and then, if `normalize`, that over its Euclidean length (or over 1e-12, where
/// the length is smaller).
///
/// A length past `seq` counts as `seq`; a sequence of length 0 becomes zeros. A mean to be normalised whose length's
/// square overflows f32 becomes NaNs.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'a> {
    /// `batch·seq x d`.
    pub x: &'a Tensor,
    /// Real tokens of each sequence, `batch` of them.
    pub lengths: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence.
    pub seq: usize,
    /// Whether means are brought to length 1.
    pub normalize: bool,
    /// `batch x d`, f32, overwritten.
    pub y: &'a Tensor,
}

/// An operation on the CPU device with everything bound.
#[derive(Debug)]
pub(super) enum CpuGlue {
    Embed { tables: [Option<(Shared, SharedIndices)>; 3], width: usize, y: Shared },
    LayerNorm { x: Shared, gamma: Shared, beta: Shared, eps: f32, y: Shared },
    Attention { qkv: Shared, lengths: SharedIndices, shape: AttentionShape, y: Shared },
    Pool { x: Shared, lengths: SharedIndices, seq: usize, normalize: bool, y: Shared },
}

impl CpuGlue {
    /// Computes the output, in the caller's turn on the device.
    pub(super) fn run_now(&self, cpu: &Cpu) {
        match self {
            Self::Embed { tables, width, y } => {
                let held = tables.each_ref().map(|t| t.as_ref().map(|(table, ids)| (read(table), read(ids))));
                let tables = held.each_ref().map(|t| t.as_ref().map(|(table, ids)| (table.elements(), ids.as_slice())));
                cpu.embed(tables, *width, write(y).elements_mut());
            }
            Self::LayerNorm { x, gamma, beta, eps, y } => {
                let (x, gamma, beta) = (read(x), read(gamma), read(beta));
                let (Some(gamma), Some(beta)) = (f32::of(gamma.elements()), f32::of(beta.elements())) else { return };
                cpu.layer_norm(x.elements(), gamma, beta, *eps, write(y).elements_mut());
            }
            Self::Attention { qkv, lengths, shape, y } => {
                let (qkv, lengths) = (read(qkv), read(lengths));
                cpu.attention(qkv.elements(), &lengths, *shape, write(y).elements_mut());
            }
            Self::Pool { x, lengths, seq, normalize, y } => {
                let (x, lengths) = (read(x), read(lengths));
                if let crate::Elements::F32(y) = write(y).elements_mut() {
                    cpu.pool(x.elements(), &lengths, *seq, *normalize, y);
                }
            }
        }
    }
}

impl Device {
    /// A vector of so many indices, all zero.
    pub fn indices(&self, len: usize) -> Result<Indices> {
        let bytes = checked_mul("index bytes", len, 4)?;
        let store = match &self.0 {
            Inner::Gpu(gpu) => IndexStore::Gpu(gpu.buffer("indices", bytes, None)?),
            Inner::Cpu(_) => IndexStore::Cpu(Arc::new(RwLock::new(vec![0; len]))),
        };
        Ok(Indices { device: self.clone(), len, store })
    }

    /// Overwrites indices. An error if there are more or fewer of them.
    ///
    /// ```
    /// use sparse24::Device;
    /// let device = Device::cpu()?;
    /// let lengths = device.indices(2)?;
    /// device.write_indices(&lengths, &[7, 3])?;
    /// assert!(device.write_indices(&lengths, &[7]).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn write_indices(&self, indices: &Indices, data: &[u32]) -> Result<()> {
        self.owns("indices", &indices.device)?;
        expect_len("data", data.len(), indices.len)?;
        match (&self.0, &indices.store) {
            (Inner::Gpu(gpu), IndexStore::Gpu(buffer)) => gpu.write(buffer, bytemuck::cast_slice(data)),
            (Inner::Cpu(cpu), IndexStore::Cpu(own)) => cpu.in_turn(|| {
                write(own).copy_from_slice(data);
            }),
            _ => Err(foreign("indices")),
        }
    }

    /// Copies indices back, after everything that was submitted before.
    pub fn read_indices(&self, indices: &Indices) -> Result<Vec<u32>> {
        self.owns("indices", &indices.device)?;
        match (&self.0, &indices.store) {
            (Inner::Gpu(gpu), IndexStore::Gpu(buffer)) => {
                Ok(bytemuck::pod_collect_to_vec(&gpu.read(buffer, 4 * indices.len)?))
            }
            (Inner::Cpu(_), IndexStore::Cpu(own)) => Ok(read(own).clone()),
            _ => Err(foreign("indices")),
        }
    }

    /// Prepares a sum of embeddings. An error if there are no tables, more than three, or one without rows.
    pub fn embed(&self, embed: &Embed<'_>) -> Result<Prepared> {
        let Embed { tables, y } = *embed;
        let [(first, _), ..] = tables else { return Err(Error::Invalid("an embedding needs a table".into())) };
        if tables.len() > 3 {
            return Err(Error::Invalid(format!("an embedding of {} tables, 3 at most", tables.len())));
        }
        self.takes(&[("y", y)])?;
        const NAMES: [(&str, &str); 3] =
            [("table 0", "ids of table 0"), ("table 1", "ids of table 1"), ("table 2", "ids of table 2")];
        for ((name, name_of_ids), (table, ids)) in NAMES.into_iter().zip(tables) {
            self.takes(&[(name, table)])?;
            self.owns(name_of_ids, &ids.device)?;
            expect_dtype(name, table.dtype, first.dtype)?;
            expect_shape(name, (table.rows, table.cols), (table.rows, y.cols))?;
            expect_len(name_of_ids, ids.len, y.rows)?;
            if table.rows == 0 {
                return Err(Error::Invalid(format!("{name} of an embedding has no rows")));
            }
        }
        apart(("y", y), NAMES.into_iter().zip(tables).map(|((name, _), (table, _))| (name, *table)))?;
        if let Inner::Gpu(gpu) = &self.0 {
            let glue = Glue::embed(tables.len(), first.dtype, y.dtype)?;
            let mut rows = [0; 3];
            for (rows, (table, _)) in rows.iter_mut().zip(tables) {
                *rows = u32_of("rows of a table", table.rows)?;
            }
            let [rows0, rows1, rows2] = rows;
            let params = GlueParams { rows0, rows1, rows2, ..params(y.rows, y.cols)? };
            let table = |i: usize| tables.get(i).and_then(|(table, _)| whole(table));
            let ids = |i: usize| tables.get(i).and_then(|(_, ids)| ids.binding());
            let operands = [table(0), ids(0), table(1), ids(1), table(2), whole(y), ids(2)];
            return self.dispatch(gpu, glue, (y.rows * y.cols).div_ceil(THREADS), &params, &operands);
        }
        let mut held = [None, None, None];
        for (slot, (table, ids)) in held.iter_mut().zip(tables) {
            *slot = Some((table.shared()?, ids.shared()?));
        }
        Ok(self.on_cpu(CpuGlue::Embed { tables: held, width: y.cols, y: y.shared()? }))
    }

    /// Prepares a layer normalisation.
    pub fn layer_norm(&self, norm: &LayerNorm<'_>) -> Result<Prepared> {
        let LayerNorm { x, gamma, beta, eps, y } = *norm;
        self.takes(&[("x", x), ("gamma", gamma), ("beta", beta), ("y", y)])?;
        expect_shape("y", (y.rows, y.cols), (x.rows, x.cols))?;
        for (what, tensor) in [("gamma", gamma), ("beta", beta)] {
            expect_shape(what, (tensor.rows, tensor.cols), (1, x.cols))?;
            expect_dtype(what, tensor.dtype, DType::F32)?;
        }
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::Invalid(format!("eps is {eps}, not a finite number from 0 on")));
        }
        apart(("y", y), [("x", x), ("gamma", gamma), ("beta", beta)].into_iter())?;
        if let Inner::Gpu(gpu) = &self.0 {
            let width = u32_of("features of a token", x.cols)?;
            let glue = Glue::layer_norm(width, x.dtype, y.dtype)?;
            let params = GlueParams { epsilon: eps, ..params(y.rows, y.cols)? };
            let operands = [None, None, whole(x), whole(gamma), whole(beta), whole(y)];
            let workgroups = if x.cols == 0 { 0 } else { x.rows.div_ceil(NORM_TOKENS) };
            return self.dispatch(gpu, glue, workgroups, &params, &operands);
        }
        let [x, gamma, beta, y] = [x.shared()?, gamma.shared()?, beta.shared()?, y.shared()?];
        Ok(self.on_cpu(CpuGlue::LayerNorm { x, gamma, beta, eps, y }))
    }

    /// Prepares an attention. An error if the features of a token are no whole number per head.
    pub fn attention(&self, attention: &Attention<'_>) -> Result<Prepared> {
        let Attention { qkv, lengths, batch, seq, heads, y } = *attention;
        self.takes(&[("qkv", qkv), ("y", y)])?;
        self.owns("lengths", &lengths.device)?;
        let (tokens, width) = (checked_mul("tokens", batch, seq)?, y.cols);
        expect_shape("qkv", (qkv.rows, qkv.cols), (tokens, checked_mul("features of Q, K and V", 3, width)?))?;
        expect_shape("y", (y.rows, y.cols), (tokens, width))?;
        expect_len("lengths", lengths.len, batch)?;
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(Error::Invalid(format!("{width} features are no whole number for each of {heads} heads")));
        }
        apart(("y", y), std::iter::once(("qkv", qkv)))?;
        let head_dim = width / heads;
        if let Inner::Gpu(gpu) = &self.0 {
            let caps = &gpu.info().caps;
            let caps = &Caps { rates: gpu.tuning().rates.unwrap_or(caps.rates), ..caps.clone() };
            let all_heads = checked_mul("heads", batch, heads)?;
            let tile = AttentionTile::choose(all_heads, seq, head_dim, qkv.dtype, caps);
            let tile = tile.map_err(|lacks| Error::MissingFeature {
                device: gpu.info().name.clone(),
                feature: format!("what the least tile of attention takes: {lacks}"),
            })?;
            let glue = Glue::attention(tile, u32_of("features of a head", head_dim)?, qkv.dtype, y.dtype)?;
            let params = GlueParams {
                seq: u32_of("rows of a sequence", seq)?,
                heads: u32_of("heads", heads)?,
                scale: (1.0 / (head_dim.max(1) as f64).sqrt()) as f32,
                ..params(tokens, width)?
            };
            let workgroups = tile.workgroups(all_heads, seq, head_dim).ok_or_else(|| Error::Overflow {
                what: "workgroups of an attention".into(),
                detail: format!("{all_heads} heads of {seq} tokens"),
            })?;
            let operands = [None, lengths.binding(), whole(qkv), None, None, whole(y)];
            return self.dispatch(gpu, glue, workgroups, &params, &operands);
        }
        let shape = AttentionShape { seq, heads, head_dim };
        let (qkv, lengths, y) = (qkv.shared()?, lengths.shared()?, y.shared()?);
        Ok(self.on_cpu(CpuGlue::Attention { qkv, lengths, shape, y }))
    }

    /// Prepares a pooling.
    pub fn pool(&self, pool: &Pool<'_>) -> Result<Prepared> {
        let Pool { x, lengths, batch, seq, normalize, y } = *pool;
        self.takes(&[("x", x), ("y", y)])?;
        self.owns("lengths", &lengths.device)?;
        expect_shape("x", (x.rows, x.cols), (checked_mul("tokens", batch, seq)?, y.cols))?;
        expect_shape("y", (y.rows, y.cols), (batch, x.cols))?;
        expect_dtype("y", y.dtype, DType::F32)?;
        expect_len("lengths", lengths.len, batch)?;
        apart(("y", y), std::iter::once(("x", x)))?;
        if let Inner::Gpu(gpu) = &self.0 {
            let glue = Glue::pool(u32_of("features of a token", x.cols)?, normalize, x.dtype)?;
            let params = GlueParams { seq: u32_of("rows of a sequence", seq)?, ..params(batch, y.cols)? };
            let operands = [None, lengths.binding(), whole(x), None, None, whole(y)];
            let workgroups = if y.cols == 0 { 0 } else { batch };
            return self.dispatch(gpu, glue, workgroups, &params, &operands);
        }
        let (x, lengths, y) = (x.shared()?, lengths.shared()?, y.shared()?);
        Ok(self.on_cpu(CpuGlue::Pool { x, lengths, seq, normalize, y }))
    }

    /// Whether tensors are of this device, and of a type that kernels compute on.
    pub(super) fn takes(&self, tensors: &[(&str, &Tensor)]) -> Result<()> {
        for (what, tensor) in tensors {
            self.owns(what, &tensor.device)?;
            if tensor.dtype == DType::Bf16 {
                return Err(Error::DType { what: (*what).into(), got: DType::Bf16, expected: DType::F32 });
            }
        }
        Ok(())
    }

    /// A call of one dispatch, or of none where there are no workgroups.
    fn dispatch(
        &self,
        gpu: &Gpu,
        glue: Glue,
        workgroups: usize,
        params: &GlueParams,
        operands: &[Option<Binding<'_>>],
    ) -> Result<Prepared> {
        let dispatches = if workgroups == 0 {
            Vec::new()
        } else {
            let grid = grid(workgroups, 1, &gpu.info().caps)?;
            vec![gpu.dispatch(&Program::Glue(glue), grid, params, operands)?]
        };
        Ok(Prepared { device: self.clone(), work: Work::Gpu(dispatches) })
    }

    fn on_cpu(&self, call: CpuGlue) -> Prepared {
        Prepared { device: self.clone(), work: Work::CpuGlue(Arc::new(call)) }
    }
}

impl Tensor {
    pub(super) fn shared(&self) -> Result<Shared> {
        match &self.store {
            TensorStore::Cpu(matrix) => Ok(Arc::clone(matrix)),
            TensorStore::Gpu(_) => Err(foreign("tensor")),
        }
    }
}

impl Indices {
    pub(super) fn shared(&self) -> Result<SharedIndices> {
        match &self.store {
            IndexStore::Cpu(indices) => Ok(Arc::clone(indices)),
            IndexStore::Gpu(_) => Err(foreign("indices")),
        }
    }

    pub(super) fn binding(&self) -> Option<Binding<'_>> {
        let IndexStore::Gpu(buffer) = &self.store else { return None };
        // The product was checked when the vector was made.
        Some(Binding { buffer, offset: 0, bytes: 4 * self.len as u64 })
    }
}

/// All of a GPU tensor.
pub(super) fn whole(tensor: &Tensor) -> Option<Binding<'_>> {
    bind(tensor, &(0..tensor.rows), tensor.rows, 0)
}

fn params(tokens: usize, width: usize) -> Result<GlueParams> {
    let (tokens, width) = (u32_of("tokens", tokens)?, u32_of("features of a token", width)?);
    Ok(GlueParams { tokens, width, ..GlueParams::default() })
}

/// A size as kernels count it: rounded up to a tile, it must still fit.
pub(super) fn u32_of(what: &str, size: usize) -> Result<u32> {
    u32::try_from(size)
        .ok()
        .filter(|&size| size <= u32::MAX - 1024)
        .ok_or_else(|| Error::Overflow { what: what.into(), detail: size.to_string() })
}

pub(super) fn expect_len(what: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { what: what.into(), got: vec![got], expected: vec![expected] })
}

pub(super) fn apart<'a>(
    (what, y): (&str, &Tensor),
    mut others: impl Iterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    match others.find(|(_, other)| y.same_memory(other)) {
        Some((name, _)) => Err(Error::Invalid(format!("{what} shares its memory with {name}"))),
        None => Ok(()),
    }
}
