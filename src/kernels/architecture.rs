//! Families of GPUs that kernels were compiled for, and which of them a device is of.
//!
//! Invariant: a name that tells nothing is of no family.

/// A family of GPUs whose instructions cost the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// AMD, Radeon RX 6000.
    Rdna2,
    /// AMD, Radeon RX 7000.
    Rdna3,
    /// AMD, Radeon RX 9000.
    Rdna4,
    /// NVIDIA GA100: A100, A30. Not GA10x, whose multiprocessors have Ada's rates.
    Ampere,
    /// NVIDIA AD10x: RTX 40, L4, L40.
    Ada,
    /// Apple G13: M1.
    AppleM1,
    /// Qualcomm Adreno 7xx.
    Adreno,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Rdna2, Self::Rdna3, Self::Rdna4, Self::Ampere, Self::Ada, Self::AppleM1, Self::Adreno];

    /// Such as `rdna3`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rdna2 => "rdna2",
            Self::Rdna3 => "rdna3",
            Self::Rdna4 => "rdna4",
            Self::Ampere => "ampere",
            Self::Ada => "ada",
            Self::AppleM1 => "apple-m1",
            Self::Adreno => "adreno",
        }
    }

    /// Multiply-adds of f32 that a core does per cycle; sources are in the module `compile`.
    pub(crate) const fn multiply_adds(self) -> f64 {
        match self {
            Self::Rdna2 | Self::Ampere => 64.0,
            Self::Rdna3 | Self::Rdna4 | Self::Ada | Self::AppleM1 | Self::Adreno => 128.0,
        }
    }

    /// Of f16 with f32 sums, by cooperative matrices; 0 where there are none.
    pub(crate) const fn matrix_multiply_adds(self) -> f64 {
        match self {
            Self::Rdna3 => 256.0,
            Self::Rdna4 | Self::Ada => 512.0,
            Self::Ampere => 1024.0,
            Self::Rdna2 | Self::AppleM1 | Self::Adreno => 0.0,
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    /// The one that a device is of, by the name that its driver gives it; `None` if that does not tell.
    pub fn of(device: &str) -> Option<Self> {
        let name = device.to_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        // Of RX 7900, not of RX 640.
        let number = name.split_once("radeon rx ").map_or("", |(_, rest)| rest);
        let digits = number.bytes().take_while(u8::is_ascii_digit).count();
        let is_series = |first: char| digits == 4 && number.starts_with(first);
        match () {
            () if has(&["navi2", "gfx103"]) || is_series('6') => Some(Self::Rdna2),
            () if has(&["navi3", "gfx11", "phoenix", "strix"]) || is_series('7') => Some(Self::Rdna3),
            () if has(&["navi4", "gfx12"]) || is_series('9') => Some(Self::Rdna4),
            () if has(&["ga100", "nvidia a100"]) || name == "nvidia a30" => Some(Self::Ampere),
            () if has(&["ad10", "geforce rtx 40", "nvidia l4"]) => Some(Self::Ada),
            () if has(&["apple m1", "g13"]) => Some(Self::AppleM1),
            () if has(&["adreno (tm) 7"]) => Some(Self::Adreno),
            () => None,
        }
    }

    /// The one whose costs are likely to be nearest to a device's: its own, or one of its vendor. `None` for vendors of
    /// which none was compiled for. `vendor` is a PCI number, or what Vulkan has in its place, or 0, as Metal has it.
    pub fn nearest(vendor: u32, device: &str) -> Option<Self> {
        let name = device.to_lowercase();
        Self::of(device).or(match vendor {
            // Volta and Turing have 64 multiply-adds per multiprocessor, as GA100; GA10x, Hopper and later ones 128, as
            // Ada.
            0x10de
                if ["v100", "titan v", "rtx 20", "quadro rtx", "gtx 16", "tesla t4"]
                    .iter()
                    .any(|n| name.contains(n)) =>
            {
                Some(Self::Ampere)
            }
            0x10de => Some(Self::Ada),
            0x1002 => Some(Self::Rdna2),
            0x5143 => Some(Self::Adreno),
            _ if name.starts_with("apple m") => Some(Self::AppleM1),
            _ => None,
        })
    }
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_whole_names() {
        for (name, expected) in [
            ("AMD Radeon RX 7900 XTX (RADV NAVI31)", Some(Architecture::Rdna3)),
            ("AMD Radeon RX 7900 XTX", Some(Architecture::Rdna3)),
            ("AMD Radeon Graphics (RADV GFX1201)", Some(Architecture::Rdna4)),
            ("AMD Radeon RX 6800 (RADV NAVI21)", Some(Architecture::Rdna2)),
            ("NVIDIA A100-SXM4-80GB", Some(Architecture::Ampere)),
            ("NVIDIA A30", Some(Architecture::Ampere)),
            ("NVIDIA GeForce RTX 4090", Some(Architecture::Ada)),
            ("Apple M1 (G13G A0)", Some(Architecture::AppleM1)),
            ("Turnip Adreno (TM) 740", Some(Architecture::Adreno)),
            // Polaris, Turing, GA107, GA102, Vega, and one without a name.
            ("AMD Radeon RX 640", None),
            ("Quadro RTX 4000", None),
            ("NVIDIA RTX A1000", None),
            ("NVIDIA RTX A3000", None),
            ("NVIDIA GeForce RTX 3090", None),
            ("AMD Radeon VII (RADV VEGA20)", None),
            ("NVK", None),
        ] {
            assert_eq!(Architecture::of(name), expected, "{name}");
        }
    }

    #[test]
    fn others_are_near_to_one_of_their_vendor() {
        for (vendor, name, expected) in [
            (0x10de, "NVIDIA H200", Some(Architecture::Ada)),
            (0x10de, "Quadro RTX 4000", Some(Architecture::Ampere)),
            (0x10de, "NVIDIA A100-SXM4-80GB", Some(Architecture::Ampere)),
            (0x1002, "AMD Radeon Graphics", Some(Architecture::Rdna2)),
            (0x1002, "AMD Radeon RX 9070 XT", Some(Architecture::Rdna4)),
            (0, "Apple M4 Max", Some(Architecture::AppleM1)),
            (0x8086, "Intel(R) Arc(tm) A770 Graphics (DG2)", None),
            (0x10005, "llvmpipe (LLVM 15.0.6, 256 bits)", None),
        ] {
            assert_eq!(Architecture::nearest(vendor, name), expected, "{name}");
        }
    }
}
