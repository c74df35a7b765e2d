//! The kernels between the GEMMs of a transformer: embeddings, layer normalisation, attention, pooling.
//!
//! A [`Glue`] is a product of small types, as a [`Kernel`](super::Kernel) is, and specialised in the same two ways:
//! types and tiles by text, sizes that only bound loops by `override`s. [`Glue::all`] is the list that the tests
//! iterate. Invariant: a `Glue` that exists has a shader.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Caps, CoopUnit, Primitives, Text};
use crate::error::{Error, Result};
use crate::matrix::DType;

/// Mirror of `Params` in shaders/shared/glue.wgsl.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct GlueParams {
    /// Rows of the output.
    pub tokens: u32,
    /// Features of a row of the output.
    pub width: u32,
    /// Rows of a sequence.
    pub seq: u32,
    /// Heads.
    pub heads: u32,
    /// What scores are multiplied by.
    pub scale: f32,
    /// What is added to a variance.
    pub epsilon: f32,
    /// Rows of each table.
    pub rows0: u32,
    /// Rows of the second table.
    pub rows1: u32,
    /// Rows of the third table.
    pub rows2: u32,
}

/// How activations are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Four features at once: their number is a multiple of four.
    Quads,
    /// One by one.
    Scalars,
}

impl Access {
    /// The way for runs of so many features.
    pub const fn of(features: u32) -> Self {
        if features.is_multiple_of(4) { Self::Quads } else { Self::Scalars }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Quads => "quads",
            Self::Scalars => "scalars",
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::Quads => include_str!("../../shaders/shared/quads.wgsl"),
            Self::Scalars => include_str!("../../shaders/shared/scalars.wgsl"),
        }
    }
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
        let (threads, bytes) = (self.threads(), self.workgroup_bytes());
        if threads > caps.workgroup_threads {
            return Err(format!("workgroups of {threads} invocations (it allows {})", caps.workgroup_threads));
        }
        if bytes > caps.workgroup_memory {
            return Err(format!("{bytes} bytes of workgroup memory (it has {})", caps.workgroup_memory));
        }
        Ok(())
    }

    /// Workgroups for so many sequences and heads in all; `None` if they cannot be counted.
    pub(crate) fn workgroups(self, heads: usize, seq: usize, head_dim: usize) -> Option<usize> {
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

/// One kernel between the GEMMs: everything that distinguishes two compiled pipelines.
///
/// Its name (`Display`) is made of its parts, such as `attention-f16f32-64x32x64-d64-quads`: operation, storage and
/// accumulation type, what it is specialised by, and `out_f32` or `out_f16` where the output has another type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Glue(Kind);

/// What it computes. Numbers of tables, types and ways of access are as the constructors of [`Glue`] check and choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// Sum of rows of tables (shaders/embed.wgsl).
    Embed {
        /// Tables, 1 to 3.
        tables: u32,
        /// Element type of the tables.
        storage: DType,
        /// Element type of the output.
        output: DType,
    },
    /// Layer normalisation (shaders/layer_norm.wgsl).
    LayerNorm {
        /// Features of a token.
        width: u32,
        /// How they are read.
        access: Access,
        /// Element type of the input.
        storage: DType,
        /// Element type of the output.
        output: DType,
    },
    /// Softmax attention (shaders/attention.wgsl, shaders/attention_coop.wgsl).
    Attention {
        /// The part of the output that a workgroup owns.
        tile: AttentionTile,
        /// Features of a head.
        head_dim: u32,
        /// How they are read.
        access: Access,
        /// Element type of the input.
        storage: DType,
        /// Element type of the output.
        output: DType,
    },
    /// Mean over tokens (shaders/pool.wgsl), to f32.
    Pool {
        /// Whether the mean is divided by its Euclidean length.
        normalize: bool,
        /// How features are read.
        access: Access,
        /// Element type of the input.
        storage: DType,
    },
}

/// An error for a type that kernels do not store.
fn kernels_store<const N: usize>(types: [DType; N]) -> Result<()> {
    types.into_iter().try_for_each(|dtype| match dtype {
        DType::F32 | DType::F16 => Ok(()),
        DType::Bf16 => Err(Error::DType { what: "activations".into(), got: dtype, expected: DType::F32 }),
    })
}

/// Threads of a workgroup of all kernels but attention.
pub(crate) const THREADS: usize = 256;
/// Tokens of a workgroup of layer normalisation.
pub(crate) const NORM_TOKENS: usize = THREADS / 32;

impl Glue {
    /// The sum of rows of 1 to 3 tables. An error for another number of them, or a type that kernels do not store.
    pub fn embed(tables: usize, storage: DType, output: DType) -> Result<Self> {
        kernels_store([storage, output])?;
        match u32::try_from(tables) {
            Ok(tables @ 1..=3) => Ok(Self(Kind::Embed { tables, storage, output })),
            _ => Err(Error::Invalid(format!("an embedding of {tables} tables, expected 1 to 3"))),
        }
    }

    /// Layer normalisation of tokens of `width` features. An error for a type that kernels do not store.
    pub fn layer_norm(width: u32, storage: DType, output: DType) -> Result<Self> {
        kernels_store([storage, output])?;
        Ok(Self(Kind::LayerNorm { width, access: Access::of(width), storage, output }))
    }

    /// Attention of heads of `head_dim` features. An error for a type that kernels do not store, and for a tile of
    /// cooperative matrices unless the storage is f16 and heads are as deep as the tile.
    pub fn attention(tile: AttentionTile, head_dim: u32, storage: DType, output: DType) -> Result<Self> {
        kernels_store([storage, output])?;
        if !tile.suits(head_dim as usize, storage) {
            return Err(Error::Invalid(format!(
                "attention tile {tile} takes heads of {} features of f16, not of {head_dim} of {storage}",
                tile.depth
            )));
        }
        Ok(Self(Kind::Attention { tile, head_dim, access: Access::of(head_dim), storage, output }))
    }

    /// The mean over tokens of `width` features, divided by its Euclidean length if `normalize`. An error for a type
    /// that kernels do not store.
    pub fn pool(width: u32, normalize: bool, storage: DType) -> Result<Self> {
        kernels_store([storage])?;
        Ok(Self(Kind::Pool { normalize, access: Access::of(width), storage }))
    }

    /// Every shader text there is, each with one choice of sizes.
    pub fn all() -> impl Iterator<Item = Self> {
        const FLOATS: [DType; 2] = [DType::F32, DType::F16];
        // Whole fours, and not.
        const WIDTHS: [u32; 2] = [64, 63];
        let types = || FLOATS.into_iter().flat_map(|storage| FLOATS.map(|output| (storage, output)));
        types().flat_map(move |(storage, output)| {
            let embed = std::iter::once(Self::embed(3, storage, output));
            let norms = WIDTHS.map(|width| Self::layer_norm(width, storage, output));
            let attention = AttentionTile::ALL.into_iter().flat_map(move |tile| {
                let depths = if tile.is_cooperative() { &[tile.depth][..] } else { &WIDTHS };
                let depths: Vec<_> = depths.iter().copied().filter(|&d| tile.suits(d as usize, storage)).collect();
                depths.into_iter().map(move |head_dim| Self::attention(tile, head_dim, storage, output))
            });
            let pools = WIDTHS.map(|width| Self::pool(width, true, storage));
            let pools = pools.into_iter().filter(move |_| output == DType::F32);
            embed.chain(norms).chain(attention).chain(pools).filter_map(Result::ok)
        })
    }

    /// The part that decides its text.
    pub(super) fn module(self) -> Self {
        Self(match self.0 {
            Kind::Embed { storage, output, .. } => Kind::Embed { tables: 3, storage, output },
            Kind::LayerNorm { access, storage, output, .. } => Kind::LayerNorm { width: 0, access, storage, output },
            Kind::Attention { tile, access, storage, output, .. } => {
                Kind::Attention { tile, head_dim: 0, access, storage, output }
            }
            Kind::Pool { access, storage, .. } => Kind::Pool { normalize: true, access, storage },
        })
    }

    fn types(self) -> (DType, DType) {
        match self.0 {
            Kind::Embed { storage, output, .. }
            | Kind::LayerNorm { storage, output, .. }
            | Kind::Attention { storage, output, .. } => (storage, output),
            Kind::Pool { storage, .. } => (storage, DType::F32),
        }
    }

    pub(super) fn text(self, primitives: Primitives) -> Result<Text> {
        const GLUE: &str = include_str!("../../shaders/shared/glue.wgsl");
        const ATTENTION: &str = include_str!("../../shaders/shared/attention.wgsl");
        let (storage, output) = self.types();
        let parts: &[&str] = match self.0 {
            Kind::Embed { .. } => &[GLUE, include_str!("../../shaders/embed.wgsl")],
            Kind::LayerNorm { access, .. } => &[GLUE, access.text(), include_str!("../../shaders/layer_norm.wgsl")],
            Kind::Attention { tile, access, .. } if tile.is_cooperative() => {
                &[GLUE, access.text(), ATTENTION, include_str!("../../shaders/attention_coop.wgsl")]
            }
            Kind::Attention { access, .. } => {
                &[GLUE, access.text(), ATTENTION, include_str!("../../shaders/attention.wgsl")]
            }
            Kind::Pool { access, .. } => &[GLUE, access.text(), include_str!("../../shaders/pool.wgsl")],
        };
        let mut text = Text::new(parts, storage, output)?;
        if let Kind::Attention { tile, .. } = self.0 {
            let AttentionTile { queries, depth, cooperative } = tile;
            let (quads, keys) = (depth / 4, tile.keys());
            let steps = |pieces: u32| pieces.div_ceil(tile.threads());
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
        }
        Ok(text)
    }

    /// Values of the shader's `override`s.
    pub fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![match self.0 {
            Kind::Embed { tables, .. } => ("TABLES", f64::from(tables)),
            Kind::LayerNorm { width, .. } => ("WIDTH", f64::from(width)),
            Kind::Attention { head_dim, .. } => ("HEAD_DIM", f64::from(head_dim)),
            Kind::Pool { normalize, .. } => ("NORMALIZE", f64::from(u8::from(normalize))),
        }]
    }

    /// Invocations per workgroup.
    pub fn threads(&self) -> u32 {
        match self.0 {
            Kind::Attention { tile, .. } => tile.threads(),
            _ => THREADS as u32,
        }
    }

    /// Bytes of workgroup memory that a workgroup takes.
    pub fn workgroup_bytes(&self) -> u32 {
        match self.0 {
            Kind::Embed { .. } => 0,
            Kind::LayerNorm { .. } => 2 * 4 * THREADS as u32,
            Kind::Attention { tile, .. } => tile.workgroup_bytes(),
            Kind::Pool { .. } => 16 * THREADS as u32,
        }
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        let (storage, output) = self.types();
        if !caps.f16 && (storage == DType::F16 || output == DType::F16) {
            return Err("f16 in shaders".into());
        }
        match self.0 {
            Kind::Attention { tile, .. } => tile.supported_by(caps),
            _ if self.threads() > caps.workgroup_threads => {
                Err(format!("workgroups of {} invocations (it allows {})", self.threads(), caps.workgroup_threads))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Glue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (storage, output) = self.types();
        match self.0 {
            Kind::Embed { tables, .. } => write!(f, "embed-{storage}f32-{tables}")?,
            Kind::LayerNorm { width, access, .. } => {
                write!(f, "layer_norm-{storage}f32-d{width}-{}", access.name())?;
            }
            Kind::Attention { tile, head_dim, access, .. } => {
                write!(f, "attention-{storage}f32-{tile}-d{head_dim}-{}", access.name())?;
            }
            Kind::Pool { normalize, access, .. } => {
                let unit = if normalize { "-unit" } else { "" };
                return write!(f, "pool-{storage}f32-{}{unit}", access.name());
            }
        }
        if storage == output { Ok(()) } else { write!(f, "-out_{output}") }
    }
}
