//! Schedules: how a GEMM kernel goes about its operation, a register tile, an expansion, a GEMV or cooperative
//! matrices.
//!
//! Invariant: a schedule's tile divides into whole workgroups of its threads.

use std::fmt;

use super::{CoopTile, CoopUnit};
use crate::layout::PANEL;
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::problem::Op;

/// A register tile: a workgroup owns `m x n` outputs, a thread `feature_quads · 4 x token_quads · 4` of them; k goes by
/// 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    pub(super) m: u32,
    pub(super) n: u32,
    pub(super) feature_quads: u32,
    pub(super) token_quads: u32,
    /// Threads along m among 32 neighbours.
    pub(super) across: u32,
}

impl Tile {
    const fn new(m: u32, n: u32, feature_quads: u32, token_quads: u32) -> Self {
        // Threads come in blocks of 8 x 8 (see shaders/shared/tile.wgsl).
        assert!(m.is_multiple_of(32 * feature_quads) && n.is_multiple_of(32 * token_quads));
        Self { m, n, feature_quads, token_quads, across: 8 }
    }

    /// For gathers by short patterns: 32 neighbours own different features of the same 16 tokens, so that whatever
    /// their patterns are, they read at most three addresses at once, in different banks. Untried on a GPU. Reads of 16
    /// bytes are served by eights of a subgroup wherever that is documented, so it saves few passes of workgroup memory
    /// (178 for 211 per step and subgroup of 32 on NVIDIA's at V = 4, traced by `compile::trace`), but all conflicts
    /// where eight threads that are served together are no neighbours, as may be on RDNA 2 and 3 (178 for 328).
    const LANES: Self = Self { m: 128, n: 128, feature_quads: 1, token_quads: 4, across: 32 };

    /// The registered tiles, largest first: one for large problems, and smaller ones to fill a device with less.
    pub const ALL: [Self; 4] =
        [Self::new(128, 128, 2, 2), Self::new(64, 64, 2, 1), Self::new(128, 32, 2, 1), Self::new(32, 32, 1, 1)];

    pub(super) const fn threads(self) -> u32 {
        (self.m / 4 / self.feature_quads) * (self.n / 4 / self.token_quads)
    }
}

/// How a kernel goes about its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Schedule {
    /// Register tiles; 2:4 weights gather activations.
    Tile(Tile),
    /// Register tiles over 2:4 weights that are expanded as they are loaded.
    Expand(Tile),
    /// A panel of 32 features x a few tokens; `slices` runs of 32 threads share the panel's k.
    Gemv {
        /// Tokens per workgroup: 1, 4 or 8.
        tokens: u32,
        /// Runs of 32 threads.
        slices: u32,
    },
    /// Cooperative matrices over f16; 2:4 weights gather activations from V = 16 on, and are expanded below.
    Coop(CoopTile),
}

impl Schedule {
    /// The schedules that are registered for an operation on elements of a type.
    pub fn of(op: Op, storage: DType) -> Vec<Self> {
        let mut schedules = Vec::new();
        let short = op.vector().map(VectorLen::get).filter(|&v| v < 8);
        // One row alone gathers too much for its multiply-adds: see "Tried and rejected".
        if short != Some(1) {
            schedules.extend(Tile::ALL.map(Self::Tile));
        }
        if let Some(v) = short {
            schedules.extend((v > 1).then_some(Self::Tile(Tile::LANES)));
            schedules.extend(Tile::ALL.map(Self::Expand));
        }
        // A mask needs registers beside the weights, of which Adreno has too few for 1024 threads.
        let many = if matches!(op, Op::Masked | Op::Masked24) { 16 } else { 32 };
        schedules
            .extend([1, 4, 8].into_iter().flat_map(|tokens| [8, many].map(|slices| Self::Gemv { tokens, slices })));
        if storage == DType::F16 {
            schedules.extend(CoopUnit::ALL.into_iter().flat_map(|unit| CoopTile::of(op, unit).map(Self::Coop)));
        }
        schedules
    }

    /// The schedule of this name (its `Display`) among those of an operation.
    pub fn named(op: Op, storage: DType, name: &str) -> Option<Self> {
        Self::of(op, storage).into_iter().find(|schedule| schedule.to_string() == name)
    }

    /// Features and tokens per workgroup.
    pub const fn tile(self) -> (u32, u32) {
        match self {
            Self::Tile(tile) | Self::Expand(tile) => (tile.m, tile.n),
            Self::Gemv { tokens, .. } => (PANEL as u32, tokens),
            Self::Coop(tile) => (tile.m, tile.n),
        }
    }

    /// Invocations per workgroup.
    pub const fn threads(self) -> u32 {
        match self {
            Self::Tile(tile) | Self::Expand(tile) => tile.threads(),
            Self::Gemv { slices, .. } => 32 * slices,
            Self::Coop(tile) => tile.threads(),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (m, n) = self.tile();
        match self {
            Self::Tile(tile) if tile.across == 32 => write!(f, "lanes_{m}x{n}x16"),
            Self::Tile(_) => write!(f, "{m}x{n}x16"),
            Self::Expand(_) => write!(f, "expand_{m}x{n}x16"),
            Self::Gemv { slices, .. } => write!(f, "gemv_{m}x{n}_t{}", 32 * slices),
            Self::Coop(tile) => write!(f, "coop{}_{m}x{n}x{}_t{}", tile.unit, CoopTile::K, tile.threads()),
        }
    }
}
