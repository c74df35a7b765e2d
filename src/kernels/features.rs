//! What the kernels between the GEMMs share: how they read and write the features of tokens, and what they ask of a
//! device.
//!
//! Invariant: kernels store f32 and f16, and no other type.

use super::{Caps, Text};
use crate::error::{Error, Result};
use crate::matrix::DType;

const ELEMENTS: &str = include_str!("../../shaders/shared/elements.wgsl");

/// The types that kernels store.
pub(crate) const FLOATS: [DType; 2] = [DType::F32, DType::F16];

/// Invocations of a workgroup, where nothing speaks for another number.
pub(crate) const WORKGROUP: usize = 256;

/// Widths that the tests compile for: whole fours, and not.
pub(crate) const WIDTHS: [u32; 2] = [64, 63];

/// How features are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureAccess {
    /// Four features at once: their number is a multiple of four.
    Quads,
    /// One by one.
    Scalars,
}

impl FeatureAccess {
    /// The one for runs of so many features.
    pub const fn of(features: u32) -> Self {
        if features.is_multiple_of(4) { Self::Quads } else { Self::Scalars }
    }

    /// `quads` or `scalars`, as in names of kernels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Quads => "quads",
            Self::Scalars => "scalars",
        }
    }

    /// The text of its loads and stores.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Quads => include_str!("../../shaders/shared/quads.wgsl"),
            Self::Scalars => include_str!("../../shaders/shared/scalars.wgsl"),
        }
    }
}

/// Element types of input and output. Arithmetic is f32 whatever they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Types {
    storage: DType,
    output: DType,
}

impl Types {
    /// f32 on both sides.
    pub(crate) const F32: Self = Self { storage: DType::F32, output: DType::F32 };

    /// An error for a type that kernels do not store.
    pub(crate) fn new(storage: DType, output: DType) -> Result<Self> {
        for got in [storage, output] {
            if !FLOATS.contains(&got) {
                return Err(Error::dtype("activations", got, DType::F32));
            }
        }
        Ok(Self { storage, output })
    }

    /// Every pair.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        FLOATS.into_iter().flat_map(|storage| FLOATS.map(|output| Self { storage, output }))
    }

    pub(crate) fn storage(self) -> DType {
        self.storage
    }

    pub(crate) fn output(self) -> DType {
        self.output
    }

    /// A kernel's texts, with these types.
    pub(crate) fn text(self, own: &[&'static str]) -> Result<Text> {
        Text::new(&[&[ELEMENTS], own].concat(), self.storage, self.output)
    }

    /// `-out_f32` or `-out_f16` where the output has another type, as at the end of names of kernels.
    pub(crate) fn suffix(self) -> String {
        if self.storage == self.output { String::new() } else { format!("-out_{}", self.output) }
    }

    /// Whether a device can run a kernel of these types; if not, what is missing.
    pub(crate) fn supported_by(self, caps: &Caps, threads: u32, bytes: u32) -> std::result::Result<(), String> {
        types_supported(caps, &[self.storage, self.output])?;
        workgroup_supported(caps, threads, bytes)
    }
}

/// Whether a device has these types in shaders; if not, what is missing.
pub(crate) fn types_supported(caps: &Caps, types: &[DType]) -> std::result::Result<(), String> {
    if types.contains(&DType::F16) && !caps.f16 { Err("f16 in shaders".into()) } else { Ok(()) }
}

/// Whether a device has workgroups of so many invocations and bytes; if not, what is missing.
pub(crate) fn workgroup_supported(caps: &Caps, threads: u32, bytes: u32) -> std::result::Result<(), String> {
    if threads > caps.workgroup_threads {
        return Err(format!("workgroups of {threads} invocations (it allows {})", caps.workgroup_threads));
    }
    if bytes > caps.workgroup_memory {
        return Err(format!("{bytes} bytes of workgroup memory (it has {})", caps.workgroup_memory));
    }
    Ok(())
}
