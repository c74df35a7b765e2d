//! What kernels cost by the machine code that GPU compilers made of them, for estimates of their time.
//!
//! The numbers are in [`table`], which the test of the compilers writes (tests/compilers.rs): for each kernel and
//! architecture the cycles for which one workgroup keeps a core busy, in steps of 16 k and for all else, of instruction
//! issue and of workgroup memory, of which the larger counts. How they are found, and what they leave out (latencies,
//! caches), is told in the module `compile`. Here they become *slots*: multiply-adds that the core could have done in
//! the time. So a device is known by its multiply-adds per second alone, and architectures can be compared.
//!
//! A device that is near to none of the architectures is taken for their geometric mean. Kernels of cooperative
//! matrices have costs on AMD's architectures alone: on NVIDIA's, NAK shuffles fragments through moves that NVIDIA's
//! own compiler does not need, and what costs there are says more about NAK.
//!
//! Invariant: every kernel that needs no cooperative matrices has a cost on every architecture.

mod table;

use crate::kernels::{Architecture, Kernel, Schedule};

use table::COMPILERS;

/// Of one workgroup of a kernel on an architecture.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    /// Cycles of issue and of workgroup memory for 16 k.
    step: [f32; 2],
    /// The same for all that does not grow with k.
    prologue: [f32; 2],
    /// Threads that a core holds at once.
    threads: u32,
    /// 32-bit registers of a thread, as far as a core's are shared by number.
    registers: f32,
}

/// For the table.
const fn cost(step: [f32; 2], prologue: [f32; 2], threads: u32, registers: f32) -> Option<Cost> {
    Some(Cost { step, prologue, threads, registers })
}

impl Cost {
    fn cycles(&self, k: f64) -> f64 {
        let larger = |[issue, passes]: [f32; 2]| f64::from(issue.max(passes));
        larger(self.prologue) + k / 16.0 * larger(self.step)
    }
}

/// Multiply-adds that could have been done in the time that a workgroup takes for so many k: of f32, or of cooperative
/// matrices. By the machine code for an architecture, or by the mean of those that the kernel has a cost on.
pub(super) fn slots(kernel: &Kernel, architecture: Option<Architecture>, k: usize) -> f64 {
    let Some(row) = row(kernel) else { return assumed(kernel, k) };
    let is_coop = matches!(kernel.schedule(), Schedule::Coop(_));
    let of = |architecture: Architecture| {
        let per_cycle = if is_coop { architecture.matrix_multiply_adds() } else { architecture.multiply_adds() };
        row[architecture as usize].map(|cost| cost.cycles(k as f64) * per_cycle)
    };
    match architecture {
        Some(architecture) => of(architecture).unwrap_or_else(|| assumed(kernel, k)),
        None => {
            let all: Vec<f64> = Architecture::ALL.into_iter().filter_map(of).collect();
            let sum: f64 = all.iter().map(|slots| slots.ln()).sum();
            (sum / all.len() as f64).exp()
        }
    }
}

/// Of cooperative matrices that were not compiled for: half of the hardware's own rate is what the bytes and latencies
/// of the tiles should leave (see shaders/shared/coop.wgsl), and each copy of the activations costs its stores.
fn assumed(kernel: &Kernel, k: usize) -> f64 {
    let (m, n) = kernel.schedule().tile();
    let share = if kernel.skips() { 0.5 + 0.05 * f64::from(kernel.patterns() - 1) } else { 1.0 };
    2.0 * share * f64::from(m * n) * k as f64
}

/// Where [`slots`] has its number from.
pub(super) fn explain(kernel: &Kernel, architecture: Option<Architecture>) -> String {
    let costs = row(kernel).map_or(0, |row| row.iter().flatten().count());
    match (architecture, architecture.and_then(|architecture| of(kernel, architecture))) {
        (Some(architecture), Some(Cost { step: [issue, passes], threads, registers, .. })) => format!(
            "16 k take a core {issue:.0} cycles of issue and {passes:.0} of workgroup memory, a core holds {threads} threads \
             of {registers} registers (static, {architecture}, {COMPILERS})"
        ),
        (None, _) if costs > 0 => {
            format!("the mean of {costs} architectures, as none is near to this device (static, {COMPILERS})")
        }
        _ => "not known for these cooperative matrices, half of the hardware's rate is assumed".to_owned(),
    }
}

/// What a kernel costs on an architecture.
fn of(kernel: &Kernel, architecture: Architecture) -> Option<Cost> {
    row(kernel)?[architecture as usize]
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
            let done = f64::from(m * n) * 4096.0 * if kernel.skips() { 0.5 } else { 1.0 };
            for architecture in Architecture::ALL.into_iter().map(Some).chain([None]) {
                let slots = slots(&kernel, architecture, 4096);
                assert!(slots > 0.99 * done, "{kernel}, {architecture:?}: {}", slots / done);
            }
        }
        let of = |op, tile: &str| {
            let schedule = Schedule::named(op, DType::F32, tile).unwrap();
            let kernel = Kernel::new(&Problem::linear(op, 4096, 4096, 4096, DType::F32), schedule).unwrap();
            slots(&kernel, None, 4096) / (128.0 * 128.0 * 4096.0)
        };
        let dense = of(Op::Dense, "128x128x16");
        // Where workgroup memory is narrow, as is assumed of Apple's and Adreno's, it takes more than twice the time.
        assert!((1.0..1.5).contains(&dense), "{dense}");
        let sparse = of(Op::Sparse24(VectorLen::new(32).unwrap()), "128x128x16");
        assert!((0.5..0.6 * dense).contains(&sparse), "{sparse}");
    }
}
