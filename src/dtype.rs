//! The three storage types, by name: below everything else, since errors and matrices both speak of them.

use std::fmt;

/// Element types in which weights and activations are stored. Arithmetic is in f32 whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16: 11 significant bits, largest finite value 65504.
    F16,
    /// bfloat16, the upper half of a binary32. Storage only: widened to f32 when it is loaded.
    Bf16,
}

impl DType {
    /// Bytes per element.
    ///
    /// ```
    /// assert_eq!(sparse24::DType::F16.bytes(), 2);
    /// ```
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The lower-case name: `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Unit round-off `u`: storing a real number `x` in this type gives `x(1 + d)` with `|d| <= u`, as long as the
    /// result is a normal number.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => 1.0 / (1u64 << 24) as f64,
            Self::F16 => 1.0 / (1u64 << 11) as f64,
            Self::Bf16 => 1.0 / (1u64 << 8) as f64,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
