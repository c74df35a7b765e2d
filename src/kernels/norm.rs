//! What the normalisations over the features of a token share: the host's side of shaders/shared/norm.wgsl.
//!
//! Invariant: a workgroup has whole tokens.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{Caps, FeatureAccess, ParamsLayout, Text, Types, WIDTHS, WORKGROUP, fields};
use crate::error::Result;
use crate::matrix::DType;

/// Mirror of `Params` in shaders/shared/norm.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NormParams {
    pub(crate) tokens: u32,
    /// What is added to the mean of squares under the root.
    pub(crate) epsilon: f32,
}

impl NormParams {
    pub(crate) const LAYOUT: ParamsLayout = fields!(NormParams: tokens epsilon);
}

/// Which tokens: of so many features, read in this way, from one type to another. Its name (`Display`) is made of its
/// parts, such as `f16f32-d384-quads`: types of input and sums, features of a token, and how these are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NormLayout {
    width: u32,
    access: FeatureAccess,
    types: Types,
}

impl NormLayout {
    /// Tokens of `width` features. An error for a type that kernels do not store.
    pub(crate) fn new(width: u32, storage: DType, output: DType) -> Result<Self> {
        Ok(Self { width, access: FeatureAccess::of(width), types: Types::new(storage, output)? })
    }

    /// One of every text.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let sizes = Types::all().flat_map(|types| WIDTHS.map(|width| (types, width)));
        sizes.map(|(types, width)| Self { width, access: FeatureAccess::of(width), types })
    }

    /// The one that stands for all of its text.
    pub(crate) fn module(self) -> Self {
        Self { width: 0, ..self }
    }

    /// The shared text, and a kernel's own.
    pub(crate) fn text(self, own: &'static str) -> Result<Text> {
        self.types.text(&[
            self.access.text(),
            include_str!("../../shaders/shared/inverse_root.wgsl"),
            include_str!("../../shaders/shared/norm.wgsl"),
            own,
        ])
    }

    /// Values of the `override`s.
    pub(crate) fn overrides(self) -> Vec<(&'static str, f64)> {
        vec![("WIDTH", f64::from(self.width))]
    }

    /// Workgroups for so many tokens.
    pub(crate) fn workgroups(self, tokens: usize) -> usize {
        if self.width == 0 { 0 } else { tokens.div_ceil(WORKGROUP / 32) }
    }

    /// Whether a device can run a kernel that takes so many bytes of workgroup memory; if not, what is missing.
    pub(crate) fn supported_by(self, caps: &Caps, bytes: u32) -> std::result::Result<(), String> {
        self.types.supported_by(caps, WORKGROUP as u32, bytes)
    }
}

impl fmt::Display for NormLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, access, types } = self;
        write!(f, "{}f32-d{width}-{}{}", types.storage(), access.name(), types.suffix())
    }
}
