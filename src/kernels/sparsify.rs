//! The kernels that turn dense weights into 2:4 ones and back, where they lie.
//!
//! A [`Conversion`] is a product of small types; all of them share one of two texts, told apart by `override`s, since
//! they move bits in words whatever the element type. Invariant: a `Conversion` that exists is of f32 or f16.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Caps, Text};
use crate::layout::WORD;
use crate::mask::VectorLen;
use crate::matrix::DType;

/// Mirror of `Params` in shaders/shared/sparse24.wgsl.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ConversionParams {
    /// Rows of W, or of a piece of it.
    pub rows: u32,
    /// Columns of W.
    pub cols: u32,
    /// The row of the compressed weights that the first of these is.
    pub row0: u32,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Dense weights are pruned and compressed (shaders/sparsify.wgsl).
    Sparsify,
    /// Compressed weights become dense (shaders/densify.wgsl).
    Densify,
}

/// One kernel: everything that distinguishes two compiled pipelines. Its name (`Display`) is made of its parts, such as
/// `sparsify-f16-v4-packed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conversion {
    direction: Direction,
    halves: bool,
    vector: VectorLen,
    packed: bool,
}

/// Invocations per workgroup.
pub(crate) const THREADS: usize = 256;
/// Blocks of V rows of a workgroup: each has eight threads, one for each group of a word.
const BLOCKS: usize = THREADS / 8;

impl Conversion {
    /// The kernel for weights of this type and vector length, packed as products read them or in parts, as the format
    /// has them. `None` for bf16.
    pub fn new(direction: Direction, storage: DType, vector: VectorLen, packed: bool) -> Option<Self> {
        (storage != DType::Bf16).then_some(Self { direction, halves: storage == DType::F16, vector, packed })
    }

    /// Every kernel there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let forms = [Direction::Sparsify, Direction::Densify].into_iter().flat_map(|d| [false, true].map(|p| (d, p)));
        let typed = forms.flat_map(|(direction, packed)| [false, true].map(|halves| (direction, packed, halves)));
        typed.flat_map(|(direction, packed, halves)| {
            VectorLen::ALL.map(|vector| Self { direction, halves, vector, packed })
        })
    }

    /// The part that decides its text.
    pub(super) fn module(self) -> Self {
        Self { halves: false, vector: VectorLen::ONE, packed: false, ..self }
    }

    /// Whether it has a second output, on binding 7.
    pub(super) fn writes_two(self) -> bool {
        self.direction == Direction::Sparsify
    }

    pub(super) fn text(self) -> Text {
        let own = match self.direction {
            Direction::Sparsify => include_str!("../../shaders/sparsify.wgsl"),
            Direction::Densify => include_str!("../../shaders/densify.wgsl"),
        };
        Text([include_str!("../../shaders/shared/sparse24.wgsl"), own].join("\n"))
    }

    /// Values of the shader's `override`s.
    pub fn overrides(&self) -> Vec<(&'static str, f64)> {
        let flag = |set| f64::from(u8::from(set));
        vec![("HALVES", flag(self.halves)), ("VECTOR", self.vector.get() as f64), ("PACKED", flag(self.packed))]
    }

    /// Invocations per workgroup.
    pub fn threads(&self) -> u32 {
        THREADS as u32
    }

    /// Bytes of workgroup memory that a workgroup takes.
    pub fn workgroup_bytes(&self) -> u32 {
        match self.direction {
            Direction::Sparsify => 4 * THREADS as u32,
            Direction::Densify => 0,
        }
    }

    /// Workgroups for weights of `m x k`.
    pub(crate) fn workgroups(self, m: usize, k: usize) -> usize {
        match self.direction {
            Direction::Sparsify => k.div_ceil(WORD) * m.div_ceil(self.vector.get()).div_ceil(BLOCKS),
            Direction::Densify => (m * k).div_ceil(if self.halves { 2 } else { 1 }).div_ceil(THREADS),
        }
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        if self.threads() > caps.workgroup_threads {
            let allowed = caps.workgroup_threads;
            return Err(format!("workgroups of {} invocations (it allows {allowed})", self.threads()));
        }
        Ok(())
    }
}

impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.direction {
            Direction::Sparsify => "sparsify",
            Direction::Densify => "densify",
        };
        let storage = if self.halves { DType::F16 } else { DType::F32 };
        write!(f, "{name}-{storage}-v{}{}", self.vector, if self.packed { "-packed" } else { "" })
    }
}
