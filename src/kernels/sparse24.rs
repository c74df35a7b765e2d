//! What the kernels that turn dense weights into 2:4 ones and back share: the host's side of
//! shaders/shared/sparse24.wgsl.
//!
//! They move bits in words whatever the element type, so one text serves all weights, told apart by `override`s.
//! Invariant: a [`Sparse24Layout`] is of f32 or f16.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{ParamsLayout, Text, fields};
use crate::mask::VectorLen;
use crate::matrix::DType;

const SHARED: &str = include_str!("../../shaders/shared/sparse24.wgsl");

/// Mirror of `Params` in shaders/shared/sparse24.wgsl.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Sparse24Params {
    /// Rows of W, or of a piece of it.
    pub(crate) rows: u32,
    /// Columns of W.
    pub(crate) cols: u32,
    /// The row of the compressed weights that the first of these is.
    pub(crate) row0: u32,
}

impl Sparse24Params {
    pub(crate) const LAYOUT: ParamsLayout = fields!(Sparse24Params: rows cols row0);
}

/// How weights and codes lie. Its name (`Display`) is made of its parts, such as `f16-v4-packed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sparse24Layout {
    halves: bool,
    vector: VectorLen,
    packed: bool,
}

impl Sparse24Layout {
    /// Weights of this type and vector length, packed as products read them or in parts, as the format has them. `None`
    /// for bf16.
    pub fn new(storage: DType, vector: VectorLen, packed: bool) -> Option<Self> {
        (storage != DType::Bf16).then_some(Self { halves: storage == DType::F16, vector, packed })
    }

    /// Every one there is.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let forms = [false, true].into_iter().flat_map(|packed| [false, true].map(|halves| (packed, halves)));
        forms.flat_map(|(packed, halves)| VectorLen::ALL.map(|vector| Self { halves, vector, packed }))
    }

    /// The one that stands for all of a text.
    pub(crate) fn module() -> Self {
        Self { halves: false, vector: VectorLen::ONE, packed: false }
    }

    /// Whether two elements share a word.
    pub(crate) fn halves(self) -> bool {
        self.halves
    }

    /// How many rows share a code.
    pub(crate) fn vector(self) -> VectorLen {
        self.vector
    }

    /// The shared text, and a kernel's own.
    pub(crate) fn text(own: &'static str) -> Text {
        Text::as_it_stands(&[SHARED, own])
    }

    /// Values of the `override`s.
    pub(crate) fn overrides(self) -> Vec<(&'static str, f64)> {
        let flag = |set| f64::from(u8::from(set));
        vec![("HALVES", flag(self.halves)), ("VECTOR", self.vector.get() as f64), ("PACKED", flag(self.packed))]
    }
}

impl fmt::Display for Sparse24Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let storage = if self.halves { DType::F16 } else { DType::F32 };
        write!(f, "{storage}-v{}{}", self.vector, if self.packed { "-packed" } else { "" })
    }
}
