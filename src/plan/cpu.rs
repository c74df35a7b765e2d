//! How the CPU device solves a problem: which kernel, by counted work against what such processors do per cycle.
//!
//! The schedules of an operation read the same weights, so the choice between them is free at run time; that between
//! 2:4 and dense weights is not, and is made here too. Invariant: an algorithm's schedule is one of its operation's,
//! for its number of tokens.

use std::fmt;

use super::{Estimate, operand_bytes};
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::problem::{Op, Problem};
use crate::simd::SimdLevel;

/// A kernel of the CPU device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuSchedule {
    /// Dense and masked weights, by the crate `gemm`; masked or widened into scratch first where need be.
    GemmCrate,
    /// Dense and masked weights, few tokens: every weight read once, sums in the cache.
    Columns,
    /// Dense and masked weights, some tokens: in tiles whose sums stay in registers.
    Tile,
    /// 2:4 weights, by gathered rows of packed activations.
    Gather,
    /// 2:4 weights, few tokens: every weight read once, activations permuted within their groups.
    Gemv,
    /// 2:4 weights, some tokens: as [`CpuSchedule::Gemv`], in tiles whose sums stay in registers.
    Permute,
}

impl CpuSchedule {
    /// The schedules of an operation; of two with the same estimate, the first is taken.
    pub const fn of(op: Op) -> &'static [Self] {
        match op {
            Op::Dense | Op::Masked | Op::Masked24 => &[Self::Columns, Self::Tile, Self::GemmCrate],
            Op::Sparse24(_) => &[Self::Gemv, Self::Permute, Self::Gather],
        }
    }

    /// `gemm_crate`, `columns`, `tile`, `gather`, `gemv` or `permute`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GemmCrate => "gemm_crate",
            Self::Columns => "columns",
            Self::Tile => "tile",
            Self::Gather => "gather",
            Self::Gemv => "gemv",
            Self::Permute => "permute",
        }
    }

    /// Whether it takes so many tokens.
    pub const fn takes(self, tokens: usize) -> bool {
        match self {
            Self::GemmCrate | Self::Gather => true,
            Self::Gemv | Self::Columns => tokens <= 4,
            Self::Tile => tokens > 4 && tokens <= 48,
            Self::Permute => tokens > 4 && tokens <= 32,
        }
    }
}

impl fmt::Display for CpuSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the planner knows of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuCaps {
    /// The vector instructions of this crate's kernels.
    pub simd: SimdLevel,
    /// Those of the crate `gemm`, which takes the widest there are.
    pub gemm_simd: SimdLevel,
}

impl CpuCaps {
    /// This processor, with kernels that use `simd`.
    pub fn host(simd: SimdLevel) -> Self {
        let has = |level: &SimdLevel| level.is_supported() && (cfg!(feature = "avx512") || *level != SimdLevel::Avx512);
        let widest = SimdLevel::ALL.into_iter().rev().find(has);
        Self { simd, gemm_simd: widest.unwrap_or(simd) }
    }
}

/// How a problem is solved by the CPU device.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuAlgorithm {
    pub(super) op: Op,
    pub(super) schedule: CpuSchedule,
    pub(super) simd: SimdLevel,
    pub(super) estimate: Estimate,
}

/// A clock that any processor with such instructions reaches. Kernels are compared at the same clock, so that it
/// matters only against memory.
const CLOCK: f64 = 3e9;

/// Bytes per second that a thread reads from memory.
const READ: f64 = 2e10;

impl CpuAlgorithm {
    /// `None` if the schedule does not take so many tokens. `op` is that of the weights which are used.
    pub(super) fn new(problem: &Problem, op: Op, schedule: CpuSchedule, caps: &CpuCaps) -> Option<Self> {
        let own = schedule.takes(problem.n).then_some(schedule)?;
        let simd = if own == CpuSchedule::GemmCrate { caps.gemm_simd } else { caps.simd };
        let mut algorithm = Self { op, schedule, simd, estimate: Estimate::default() };
        algorithm.estimate = algorithm.estimate(problem);
        Some(algorithm)
    }

    /// The kernel.
    pub fn schedule(&self) -> CpuSchedule {
        self.schedule
    }

    /// Cycles, fitted to measured times of one thread: of AVX2 on an EPYC 7003, with 5 to 48 tokens on a Xeon of 2023;
    /// of AVX-512, from five tokens on, on that Xeon (benches/results/2026-11-30-intel-xeon). The rest is assumed to
    /// scale with the width.
    fn cycles(&self, problem: &Problem) -> f64 {
        let (m, n, k) = (problem.m as f64, problem.n as f64, problem.k as f64);
        let lanes = self.simd.lanes() as f64;
        let padded = |unit: f64| (n / unit).ceil() * unit;
        let (alone, widest) = (self.op == Op::Sparse24(VectorLen::ONE), self.simd == SimdLevel::Avx512);
        match self.schedule {
            // Four tokens to a column of its tiles; W is packed in every call, and X too.
            CpuSchedule::GemmCrate => {
                let staged = problem.storage != DType::F32 || self.op != Op::Dense;
                m * padded(4.0) * k / (2.0 * lanes * 0.9) + m * k * if staged { 1.8 } else { 1.3 } + n * k
            }
            CpuSchedule::Columns => m * k / lanes * (1.6 + 0.9 * (n as usize).next_power_of_two() as f64),
            CpuSchedule::Tile if widest => m * k / lanes * (8.5 + 0.6 * padded(2.0)),
            CpuSchedule::Tile => m * k / lanes * (2.5 + 0.87 * padded(2.0)),
            CpuSchedule::Gather => {
                // The share of the multiply-adds that there could be; the cycles that each kept weight takes at least
                // (scalar instructions, the latency of chains, memory); and those in which a number of X is packed or
                // one of Y stored.
                let (efficiency, min_cycles, moved) = match (alone, self.simd) {
                    (true, SimdLevel::Avx512) => (0.57, 4.2, 3.5),
                    (false, SimdLevel::Avx512) => (0.78, 2.4, 3.5),
                    (true, _) => (0.74, 2.4, 1.0),
                    (false, _) => (0.78, 2.0, 1.0),
                };
                let vectors = padded(lanes) / lanes;
                m * k / 2.0 * (vectors / (2.0 * efficiency)).max(min_cycles) + moved * n * (k + m)
            }
            CpuSchedule::Gemv => m * k / 2.0 / lanes * (2.5 + 1.4 * (n as usize).next_power_of_two() as f64),
            CpuSchedule::Permute => {
                // Of each output, in which lanes are added up; with AVX2 it is in what a token takes.
                let (of_token, of_output) = match (alone, widest) {
                    (true, true) => (1.55, 6.0),
                    (false, true) => (1.35, 6.0),
                    (true, false) => (1.0, 0.0),
                    (false, false) => (0.75, 0.0),
                };
                m * k / 2.0 / lanes * (2.5 + of_token * padded(4.0)) + of_output * m * n
            }
        }
    }

    /// Of one thread, whatever their number: the choice of a kernel decides in which order sums are formed, and so must
    /// not depend on it.
    fn estimate(&self, problem: &Problem) -> Estimate {
        let used = Problem { op: self.op, ..*problem };
        let bytes: u64 = operand_bytes(&used).iter().map(|(_, b)| b).sum();
        let (arithmetic, memory) = (self.cycles(problem) / CLOCK, bytes as f64 / READ);
        Estimate { arithmetic, memory, cache: 0.0, dispatch: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use crate::mask::VectorLen;
    use crate::matrix::DType;
    use crate::plan::{CpuCaps, Plan};
    use crate::problem::{Op, Problem};
    use crate::simd::SimdLevel;

    fn caps(simd: SimdLevel) -> CpuCaps {
        CpuCaps { simd, gemm_simd: SimdLevel::Avx2 }
    }

    fn schedule(op: Op, n: usize, k: usize, storage: DType) -> String {
        Plan::cpu(&Problem::linear(op, 768, n, k, storage), &caps(SimdLevel::Avx2)).unwrap().schedule()
    }

    #[test]
    fn few_tokens_get_the_schedules_that_read_each_weight_once() {
        let sparse = |v| Op::Sparse24(VectorLen::new(v).unwrap());
        for (k, storage) in [(768, DType::F32), (4096, DType::F32), (3072, DType::F16)] {
            for n in 1..=4 {
                for v in [1, 2, 32] {
                    assert_eq!(schedule(sparse(v), n, k, storage), "gemv", "{n} tokens, V = {v}");
                }
                assert_eq!(schedule(Op::Dense, n, k, storage), "columns");
                assert_eq!(schedule(Op::Masked, n, k, storage), "columns");
            }
            // Some tokens, in tiles; many by the kernels for them.
            for (n, sparse24, dense) in [(5, "permute", "tile"), (49, "gather", "gemm_crate")] {
                assert_eq!(schedule(sparse(1), n, k, storage), sparse24, "{n} tokens");
                assert_eq!(schedule(Op::Dense, n, k, storage), dense, "{n} tokens");
            }
        }
    }

    #[test]
    fn dense_weights_take_over_where_the_crate_has_wider_vectors() {
        let problem = Problem::linear(Op::Sparse24(VectorLen::ONE), 768, 512, 3072, DType::F32);
        let plan = |simd| Plan::cpu_or_dense(&problem, &caps(simd)).unwrap();
        let (own, dense) = (plan(SimdLevel::Avx2), plan(SimdLevel::Scalar));
        assert_eq!((own.weights(), own.schedule().as_str()), (problem.op, "gather"));
        assert!(own.explain().contains("times the speed of dense gemm_crate"), "{}", own.explain());
        assert_eq!((dense.weights(), dense.schedule().as_str()), (Op::Dense, "dense_gemm_crate"));
        assert!(dense.explain().contains("dense weights, because gather is estimated"), "{}", dense.explain());
        assert!(dense.explain().contains("predicted bound: arithmetic"), "{}", dense.explain());
        assert_eq!(dense.executed_flops(), problem.effective_flops());
    }
}
