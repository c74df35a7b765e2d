//! What kernels cost by the machine code that GPU compilers made of them, for estimates of their time.
//!
//! The numbers are in [`table`], which the test of the compilers writes (tests/compilers.rs): for each kernel and
//! architecture the cycles for which one workgroup keeps a core busy, in steps of 16 k and for all else, of instruction
//! issue and of workgroup memory, of which the larger counts. How they are found, and what they leave out (latencies,
//! caches), is told in the module `compile`. Here they become *slots*: multiply-adds that the core could have done in
//! the time. So a device is known by its multiply-adds per second alone, and architectures can be compared.
//!
//! A device that is near to none of the architectures is taken for their geometric mean. Kernels of cooperative matrices
//! have costs on AMD's architectures alone: on NVIDIA's, NAK shuffles fragments through moves that NVIDIA's own compiler
//! does not need, and what costs there are says more about NAK.
//!
//! Invariant: every kernel that needs no cooperative matrices has a cost on every architecture.

mod table;

use crate::kernels::{Architecture, Kernel, Schedule};

pub(super) use table::COMPILERS;

/// Of one workgroup of a kernel on an architecture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    /// Cycles of issue and of workgroup memory for 16 k.
    step: [f32; 2],
    /// The same for all that does not grow with k.
    prologue: [f32; 2],
    /// Threads that a core holds at once.
    pub(super) threads: u32,
    /// 32-bit registers of a thread, as far as a core's are shared by number.
    pub(super) registers: f32,
}

/// For the table.
const fn cost(step: [f32; 2], prologue: [f32; 2], threads: u32, registers: f32) -> Option<Cost> {
    Some(Cost { step, prologue, threads, registers })
}

impl Cost {
    /// Cycles of issue and of workgroup memory for 16 k.
    pub(super) fn step(&self) -> [f64; 2] {
        self.step.map(f64::from)
    }

    fn cycles(&self, k: f64) -> f64 {
        let larger = |[issue, passes]: [f32; 2]| f64::from(issue.max(passes));
        larger(self.prologue) + k / 16.0 * larger(self.step)
    }
}

/// Multiply-adds of a core per cycle: of f32, and of cooperative matrices of f16.
const fn multiply_adds(architecture: Architecture) -> [f64; 2] {
    match architecture {
        Architecture::Rdna2 => [64.0, 0.0],
        Architecture::Rdna3 => [128.0, 256.0],
        Architecture::Rdna4 => [128.0, 512.0],
        Architecture::Ampere => [64.0, 1024.0],
        Architecture::Ada => [128.0, 512.0],
        Architecture::AppleM1 | Architecture::Adreno => [128.0, 0.0],
    }
}

/// What a kernel costs on an architecture.
pub(super) fn of(kernel: &Kernel, architecture: Architecture) -> Option<Cost> {
    row(kernel)?[architecture as usize]
}

/// Architectures that a kernel has a cost on.
pub(super) fn architectures(kernel: &Kernel) -> usize {
    row(kernel).map_or(0, |row| row.iter().flatten().count())
}

/// Multiply-adds that could have been done in the time that a workgroup takes for so many k, by the architecture or by
/// the mean of those that it has a cost on. `None` for cooperative matrices that were not compiled for.
pub(super) fn slots(kernel: &Kernel, architecture: Option<Architecture>, k: f64) -> Option<f64> {
    let row = row(kernel)?;
    let [plain, matrix] = [0, 1].map(|at| Architecture::ALL.map(|a| multiply_adds(a)[at]));
    let per_cycle = if matches!(kernel.schedule(), Schedule::Coop(_)) { matrix } else { plain };
    let slots = |at: usize| row[at].map(|cost| cost.cycles(k) * per_cycle[at]);
    match architecture {
        Some(architecture) => slots(architecture as usize),
        None => {
            let all: Vec<f64> = (0..Architecture::ALL.len()).filter_map(slots).collect();
            let sum: f64 = all.iter().map(|slots| slots.ln()).sum();
            (!all.is_empty()).then(|| (sum / all.len() as f64).exp())
        }
    }
}

/// A kernel's costs by architecture: form and epilogue make little difference, and were not compiled.
fn row(kernel: &Kernel) -> Option<&'static [Option<Cost>; Architecture::ALL.len()]> {
    let name = kernel.cost_name();
    table::COSTS.binary_search_by_key(&name.as_str(), |(name, _)| name).ok().map(|at| &table::COSTS[at].1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::mask::VectorLen;
    use crate::matrix::DType;
    use crate::problem::{Op, Problem};

    #[test]
    fn every_kernel_has_a_cost_and_no_other_has_one() {
        assert!(table::COSTS.is_sorted_by(|(a, _), (b, _)| a < b));
        let mut names = std::collections::BTreeSet::new();
        for kernel in Kernel::all() {
            let known = Architecture::ALL.map(|a| of(&kernel, a).is_some());
            let expected = match kernel.schedule().to_string() {
                // AMD's, in subgroups of 64.
                name if name.starts_with("coop16s64_") => [false, true, true, false, false, false, false],
                name => [!name.starts_with("coop"); 7],
            };
            assert_eq!(known, expected, "{kernel}");
            names.insert(kernel.cost_name());
        }
        let stale: Vec<_> = table::COSTS.iter().filter(|(name, _)| !names.contains(*name)).collect();
        assert!(stale.is_empty(), "{stale:?}");
    }

    /// No kernel does more multiply-adds than a core can, and the large dense tile wastes little.
    #[test]
    fn slots_are_multiply_adds() {
        for kernel in Kernel::all() {
            let (m, n) = kernel.schedule().tile();
            let gathers = matches!(kernel.op(), Op::Sparse24(_)) && !kernel.expands();
            let done = f64::from(m * n) * 4096.0 * if gathers { 0.5 } else { 1.0 };
            for architecture in Architecture::ALL.into_iter().map(Some).chain([None]) {
                let Some(slots) = slots(&kernel, architecture, 4096.0) else { continue };
                assert!(slots > 0.99 * done, "{kernel}, {architecture:?}: {}", slots / done);
            }
        }
        let of = |op, tile: &str| {
            let schedule = Schedule::named(op, DType::F32, tile).unwrap();
            let kernel = Kernel::new(&Problem::linear(op, 4096, 4096, 4096, DType::F32), schedule).unwrap();
            slots(&kernel, None, 4096.0).unwrap() / (128.0 * 128.0 * 4096.0)
        };
        let dense = of(Op::Dense, "128x128x16");
        // Where workgroup memory is narrow, as is assumed of Apple's and Adreno's, it takes more than twice the time.
        assert!((1.0..1.5).contains(&dense), "{dense}");
        let sparse = of(Op::Sparse24(VectorLen::new(32).unwrap()), "128x128x16");
        assert!((0.5..0.6 * dense).contains(&sparse), "{sparse}");
    }
}
