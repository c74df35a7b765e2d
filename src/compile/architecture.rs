//! What instructions cost, by the documented rates of an architecture.
//!
//! A core (compute unit, streaming multiprocessor) has schedulers, each of which starts one instruction of one subgroup
//! per cycle; instructions then keep a *pipe* busy for one cycle or several. With enough subgroups pipes work side by
//! side, so that a piece of code costs the busiest of them: the scheduler's own slots, floating point, integers,
//! special functions, matrices. Latencies are left out: they are covered if other subgroups have work. Invariant: pure
//! data; where no rate is documented, the note of [`Architecture::assumed`] says what is taken instead.
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
use crate::kernels::Architecture;

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
                let macs = self.matrix_multiply_adds() / f64::from(self.rules().schedulers);
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
                let float = if self == Self::Ampere { 2.0 } else { 1.0 };
                let macs = self.matrix_multiply_adds() / f64::from(self.rules().schedulers);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What planners count with is what a core's schedulers do together.
    #[test]
    fn a_core_does_its_multiply_adds_per_cycle() {
        for architecture in Architecture::ALL {
            let is_wide = !matches!(architecture, Architecture::Ampere | Architecture::Ada | Architecture::AppleM1);
            let lanes = if is_wide { 64 } else { 32 };
            let issue = architecture.issue(&Counts(vec![(Class::MultiplyAdd(1), 1.0)]), lanes);
            let per_cycle = f64::from(lanes * architecture.rules().schedulers) / issue.cycles();
            assert_eq!(per_cycle, architecture.multiply_adds(), "{architecture}");
        }
    }
}
