//! What instructions cost, by the documented rates of an architecture.
//!
//! A core (compute unit, streaming multiprocessor) has schedulers, each of which starts one instruction of one subgroup
//! per cycle; instructions then keep a *pipe* busy for one cycle or several. With enough subgroups pipes work side by
//! side, so that a piece of code costs the busiest of them: the scheduler's own slots, floating point, integers, special
//! functions, matrices. Latencies are left out: they are covered if other subgroups have work. Invariant: pure data;
//! where no rate is documented, the note of [`Architecture::assumed`] says what is taken instead.
//!
//! # Sources
//! - NVIDIA: CUDA C++ Programming Guide, "Arithmetic Instructions", results per cycle and multiprocessor for compute
//!   capability 8.0 (Ampere, GA100) and 8.9 (Ada): f32 64 and 128; integers 64; conversions 64; special functions 16.
//!   Matrices, f16 with f32 sums: 1024 multiply-adds per cycle and multiprocessor (A100 whitepaper), 512 (Ada
//!   whitepaper, workstation boards; GeForce boards have half).
//! - AMD: "RDNA" whitepaper and the instruction-set guides of RDNA 2, 3 and 4: SIMDs of 32 lanes, special functions and
//!   32-bit products at a quarter of the rate. From RDNA 3 on a wave of 64 does floating point in one cycle where both
//!   halves can be issued together, which is taken to be always. WMMA: 512 f16 operations per cycle and compute unit on
//!   RDNA 3, 1024 on RDNA 4.
//! - Apple: <https://github.com/philipturner/metal-benchmarks>, measured there on the M1: f32 and integers one
//!   instruction per cycle and scheduler, 32-bit products and conversions four cycles, special functions six.
//! - Adreno: nothing is public.

use super::banks::Rules;
use super::isa::{Class, Counts};

/// A family of GPUs whose instructions cost the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// AMD, Radeon RX 6000.
    Rdna2,
    /// AMD, Radeon RX 7000.
    Rdna3,
    /// AMD, Radeon RX 9000.
    Rdna4,
    /// NVIDIA GA100, the A100. Not GA10x, whose multiprocessors have Ada's rates.
    Ampere,
    /// NVIDIA AD10x: RTX 40, L4, L40.
    Ada,
    /// Apple G13: M1.
    AppleM1,
    /// Qualcomm Adreno 7xx.
    Adreno,
}

/// Cycles of a core's pipes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Issue {
    slots: f64,
    float: f64,
    integer: f64,
    special: f64,
    matrix: f64,
}

impl Issue {
    /// Of the busiest pipe.
    pub(super) fn cycles(&self) -> f64 {
        [self.slots, self.float, self.integer, self.special, self.matrix].into_iter().fold(0.0, f64::max)
    }
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Rdna2, Self::Rdna3, Self::Rdna4, Self::Ampere, Self::Ada, Self::AppleM1, Self::Adreno];

    /// Such as `rdna3`.
    pub const fn name(self) -> &'static str {
        self.rules().name
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    /// The one that a device is of, by the name that its driver gives it; `None` if that does not tell.
    pub fn of(device: &str) -> Option<Self> {
        let name = device.to_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        match () {
            () if has(&["navi2", "gfx103"]) => Some(Self::Rdna2),
            () if has(&["navi3", "gfx11", "phoenix", "strix"]) => Some(Self::Rdna3),
            () if has(&["navi4", "gfx12"]) => Some(Self::Rdna4),
            () if has(&["ga100", "nvidia a100"]) => Some(Self::Ampere),
            () if has(&["ad10", "geforce rtx 40", "nvidia l4"]) => Some(Self::Ada),
            () if has(&["apple m1", "g13"]) => Some(Self::AppleM1),
            () if has(&["adreno (tm) 7"]) => Some(Self::Adreno),
            () => None,
        }
    }

    /// How its workgroup memory serves accesses.
    pub const fn rules(self) -> Rules {
        match self {
            Self::Rdna2 => Rules::RDNA2,
            Self::Rdna3 => Rules::RDNA3,
            Self::Rdna4 => Rules::RDNA4,
            Self::Ampere => Rules::AMPERE,
            Self::Ada => Rules::ADA,
            Self::AppleM1 => Rules::APPLE,
            Self::Adreno => Rules::ADRENO,
        }
    }

    /// What is taken for granted of its instructions, because nobody documents it; empty where there are sources.
    pub const fn assumed(self) -> &'static str {
        match self {
            Self::Rdna3 | Self::Rdna4 => "waves of 64 do all floating point in one cycle",
            Self::Ada => "cooperative matrices at the rate of workstation boards, GeForce boards have half",
            Self::Adreno => "one instruction of 64 lanes per cycle and scheduler, special functions at a quarter of it",
            _ => "",
        }
    }

    /// [`Architecture::assumed`] and what is assumed of its workgroup memory.
    pub fn assumed_of_all(self) -> String {
        let parts = [self.assumed(), self.rules().assumed];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
    }

    /// What a subgroup's instructions take of the pipes of one scheduler.
    pub(super) fn issue(self, counts: &Counts, subgroup: u32) -> Issue {
        let mut issue = Issue::default();
        for &(class, count) in &counts.0 {
            let cost = self.cost(class, f64::from(subgroup));
            issue.slots += count * cost.slots;
            issue.float += count * cost.float;
            issue.integer += count * cost.integer;
            issue.special += count * cost.special;
            issue.matrix += count * cost.matrix;
        }
        issue
    }

    /// One instruction.
    fn cost(self, class: Class, subgroup: f64) -> Issue {
        let slot = Issue { slots: 1.0, ..Issue::default() };
        if class == Class::Hint {
            return Issue::default();
        }
        match self {
            Self::Rdna2 | Self::Rdna3 | Self::Rdna4 => {
                // All vector arithmetic shares a pipe of 32 lanes.
                let runs = subgroup / 32.0;
                let both = if self == Self::Rdna2 { runs } else { 1.0 };
                let macs = if self == Self::Rdna4 { 256.0 } else { 128.0 };
                let cycles = match class {
                    Class::MultiplyAdd(_) | Class::Float => both,
                    Class::Integer | Class::Convert | Class::Move => runs,
                    Class::Product | Class::Special => 4.0 * runs,
                    Class::Matrix(n) => f64::from(n) / macs,
                    _ => 0.0,
                };
                Issue { float: cycles, ..slot }
            }
            Self::Ampere | Self::Ada => {
                let (float, macs) = if self == Self::Ampere { (2.0, 256.0) } else { (1.0, 128.0) };
                match class {
                    Class::MultiplyAdd(_) | Class::Float => Issue { float, ..slot },
                    // Integer products are the floating-point pipe's.
                    Class::Product => Issue { float: 2.0, ..slot },
                    Class::Integer | Class::Move | Class::Convert => Issue { integer: 2.0, ..slot },
                    Class::Special => Issue { special: 8.0, ..slot },
                    Class::Matrix(n) => Issue { matrix: f64::from(n) / macs, ..slot },
                    _ => slot,
                }
            }
            Self::AppleM1 => match class {
                Class::Product | Class::Convert => Issue { slots: 4.0, ..slot },
                Class::Special => Issue { slots: 6.0, ..slot },
                _ => slot,
            },
            Self::Adreno => {
                let runs = (subgroup / 64.0).max(1.0);
                match class {
                    Class::Special => Issue { slots: 1.0, special: 4.0 * runs, ..Issue::default() },
                    Class::Control | Class::Scalar => slot,
                    _ => Issue { slots: runs, ..slot },
                }
            }
        }
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
            ("AMD Radeon Graphics (RADV GFX1201)", Some(Architecture::Rdna4)),
            ("AMD Radeon RX 6800 (RADV NAVI21)", Some(Architecture::Rdna2)),
            ("NVIDIA A100-SXM4-80GB", Some(Architecture::Ampere)),
            ("NVIDIA GeForce RTX 4090", Some(Architecture::Ada)),
            ("Apple M1 (G13G A0)", Some(Architecture::AppleM1)),
            ("Turnip Adreno (TM) 740", Some(Architecture::Adreno)),
            // Turing, GA107, GA102, Vega, and one without a name.
            ("Quadro RTX 4000", None),
            ("NVIDIA RTX A1000", None),
            ("NVIDIA GeForce RTX 3090", None),
            ("AMD Radeon VII (RADV VEGA20)", None),
            ("NVK", None),
        ] {
            assert_eq!(Architecture::of(name), expected, "{name}");
        }
    }
}
