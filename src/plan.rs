//! From what is asked to how it is done: `Problem + Caps -> Plan`, pure data that explains itself.
//!
//! Planning needs no device, so every decision can be tested and printed anywhere.
//! Invariant: a plan's kernel is one that the given [`Caps`] support, and its dispatch and bindings fit their limits.

use std::fmt::Write as _;

use crate::error::{Error, Result, checked_mul};
use crate::kernel::{Caps, Kernel, Params, Tile};
use crate::matrix::DType;
use crate::problem::{Op, Problem};

/// How a problem is solved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// One dispatch of a GPU kernel over this many workgroups along m and n.
    Gpu {
        /// The kernel.
        kernel: Kernel,
        /// Workgroups along m and n; a zero means that there is nothing to do.
        grid: (u32, u32),
    },
    /// The CPU device's only way for the operation: the `gemm` crate for dense, loops over kept weights otherwise.
    Cpu,
}

/// A problem and the way it will be solved.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    problem: Problem,
    method: Method,
    reason: String,
}

impl Plan {
    /// Plans for a GPU with these capabilities. An error names what the device lacks, or the operand that is too large.
    pub fn gpu(problem: &Problem, caps: &Caps) -> Result<Self> {
        let params = Params::new(problem)?;
        for (what, bytes) in operand_bytes(problem) {
            if bytes > caps.binding_bytes {
                return Err(Error::TooLarge {
                    what: format!("binding of {what}"),
                    size: format!("{bytes} bytes"),
                    limit: format!("{} bytes", caps.binding_bytes),
                });
            }
        }
        let mut candidates = Vec::new();
        let mut refused = Vec::new();
        for &tile in Tile::of(problem.op) {
            let kernel = Kernel::new(problem, tile)?;
            let (grid_m, grid_n) = kernel.grid(problem.m, problem.n);
            let limit = caps.grid as usize;
            match kernel.supported_by(caps) {
                Err(lack) => refused.push((tile, lack)),
                Ok(()) if grid_m > limit || grid_n > limit => {
                    refused.push((tile, format!("a grid of {grid_m} x {grid_n} workgroups (it allows {limit})")));
                }
                // Both fit u32, since the limit does.
                Ok(()) => candidates.push((cost(&kernel, &params, caps), kernel, (grid_m as u32, grid_n as u32))),
            }
        }
        let Some(&(_, kernel, grid)) = candidates.iter().min_by(|a, b| a.0.total_cmp(&b.0)) else {
            // Said once where all tiles lack the same.
            refused.dedup_by(|a, b| a.1 == b.1);
            let lacks: Vec<_> = refused.into_iter().map(|(_, lack)| lack).collect();
            return Err(Error::MissingFeature { device: "the device".into(), feature: lacks.join("; ") });
        };
        let estimates: Vec<_> = candidates.iter().map(|(c, k, _)| format!("{} {:.3}", k.tile(), c / 1e9)).collect();
        let mut reason = format!("lowest estimated cost of {}", estimates.join(", "));
        for (tile, lack) in refused {
            let _ = write!(reason, "; {tile} needs {lack}");
        }
        Ok(Self { problem: *problem, method: Method::Gpu { kernel, grid }, reason })
    }

    /// The same plan with the given kernel in place of the chosen one, for tests and tuning. An error if the kernel
    /// solves another problem, or the device cannot run it.
    pub fn gpu_with_tile(problem: &Problem, caps: &Caps, tile: Tile) -> Result<Self> {
        let chosen = Self::gpu(problem, caps)?;
        let kernel = Kernel::new(problem, tile)?;
        kernel.supported_by(caps).map_err(|feature| Error::MissingFeature { device: kernel.to_string(), feature })?;
        let (grid_m, grid_n) = kernel.grid(problem.m, problem.n);
        if grid_m.max(grid_n) > caps.grid as usize {
            return Err(Error::TooLarge {
                what: format!("dispatch of {kernel}"),
                size: format!("{grid_m} x {grid_n} workgroups"),
                limit: format!("{} in each dimension", caps.grid),
            });
        }
        let grid = (grid_m as u32, grid_n as u32);
        Ok(Self { method: Method::Gpu { kernel, grid }, reason: format!("tile {tile} was asked for"), ..chosen })
    }

    /// Plans for the CPU device.
    pub fn cpu(problem: &Problem) -> Result<Self> {
        for (what, got) in [("weights and x", problem.storage), ("y", problem.output)] {
            if got == DType::Bf16 {
                return Err(Error::DType { what: what.into(), got, expected: DType::F32 });
            }
        }
        let Problem { m, n, k, .. } = *problem;
        for (what, a, b) in [("weights", m, k), ("x", n, k), ("y", n, m)] {
            checked_mul(&format!("{what} bytes"), checked_mul(what, a, b)?, 8)?;
        }
        let reason = match problem.op {
            Op::Dense => "the gemm crate is the only dense method",
            Op::Sparse24(_) | Op::Masked => "loops over the kept weights are the only method",
        };
        Ok(Self { problem: *problem, method: Method::Cpu, reason: reason.into() })
    }

    /// What is solved.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// How it is solved.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Name of the kernel, as in benchmark rows.
    pub fn kernel_name(&self) -> String {
        match &self.method {
            Method::Gpu { kernel, .. } => kernel.to_string(),
            Method::Cpu => {
                let Problem { op, storage, epilogue, .. } = self.problem;
                format!("cpu_{}-{storage}f32-{}-{epilogue}", op.name(), self.way())
            }
        }
    }

    /// What tells the kernels of one operation apart: the tile on a GPU, `gemm_crate` or `loops` on the CPU.
    pub fn way(&self) -> String {
        match &self.method {
            Method::Gpu { kernel, .. } => kernel.tile().to_string(),
            Method::Cpu if self.problem.op == Op::Dense => "gemm_crate".to_owned(),
            Method::Cpu => "loops".to_owned(),
        }
    }

    /// What was chosen, why, and what it will cost, a fact a line.
    ///
    /// ```
    /// use sparse24::{DType, Op, Plan, Problem, VectorLen};
    /// let problem = Problem::linear(Op::Sparse24(VectorLen::ONE), 768, 128, 3072, DType::F32);
    /// let text = Plan::cpu(&problem)?.explain();
    /// assert!(text.contains("sparse24") && text.contains("0.302 GFLOP executed"));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn explain(&self) -> String {
        let Problem { op, m, n, k, form, .. } = self.problem;
        let mut text = format!("{}\n", self.kernel_name());
        let vector = op.vector().map(|v| format!(" V={v}")).unwrap_or_default();
        let _ = writeln!(text, "  problem: {}{vector}, m {m} x n {n} x k {k}, {} form", op.name(), form.name());
        let _ = writeln!(text, "  chosen because: {}", self.reason);
        if let Method::Gpu { kernel, grid } = &self.method {
            let tile = kernel.tile();
            let (padded_m, padded_n) = (grid.0 as f64 * tile.m() as f64, grid.1 as f64 * tile.n() as f64);
            let padding = if m * n == 0 { 0.0 } else { padded_m * padded_n / (m as f64 * n as f64) - 1.0 };
            let _ = writeln!(
                text,
                "  grid: {} x {} workgroups of {} invocations, {} bytes of workgroup memory, {:.1} % padding",
                grid.0,
                grid.1,
                tile.threads(),
                kernel.workgroup_bytes(),
                100.0 * padding
            );
        }
        let bytes: u64 = operand_bytes(&self.problem).iter().map(|(_, b)| b).sum();
        let (effective, executed) = (self.problem.effective_flops(), self.problem.executed_flops());
        let _ = writeln!(text, "  work: {:.3} GFLOP effective, {:.3} GFLOP executed", effective / 1e9, executed / 1e9);
        let _ = writeln!(
            text,
            "  bytes: {bytes} at least ({}), {:.1} executed FLOP per byte",
            operand_bytes(&self.problem).map(|(what, b)| format!("{what} {b}")).join(", "),
            if bytes == 0 { 0.0 } else { executed / bytes as f64 }
        );
        text
    }
}

/// Bytes of the operands that a kernel binds, in the format's own layout.
fn operand_bytes(problem: &Problem) -> [(&'static str, u64); 4] {
    let Problem { m, n, k, .. } = *problem;
    let (storage, output) = (problem.storage.bytes() as u64, problem.output.bytes() as u64);
    let (m, n, k) = (m as u64, n as u64, k as u64);
    let (weights, meta) = match problem.op {
        Op::Dense => (m * k, 0),
        Op::Masked => (m * k, 4 * m * k.div_ceil(32)),
        Op::Sparse24(v) => (m * k.div_ceil(4) * 2, 4 * m.div_ceil(v.get() as u64) * k.div_ceil(32)),
    };
    [("weights", weights * storage), ("meta", meta), ("x", n * k * storage), ("y", n * m * output)]
}

/// Estimated cost of a kernel, in arbitrary units of time: padded multiply-adds, times the workgroup-memory reads that
/// each needs beside its own issue slot, over the share of the device that the grid fills.
///
/// A rule of thumb to choose by without measurement.
fn cost(kernel: &Kernel, params: &Params, caps: &Caps) -> f64 {
    let tile = kernel.tile();
    let padded = |len: u32, tile: u32| f64::from(len.div_ceil(tile)) * f64::from(tile);
    let (m, n) = (padded(params.m, tile.m()), padded(params.n, tile.n()));
    let workgroups = (m / f64::from(tile.m())) * (n / f64::from(tile.n()));
    let filled = (workgroups * f64::from(tile.threads()) / f64::from(caps.busy_threads)).min(1.0);
    m * n * f64::from(params.k.max(1)) * (1.0 + 2.0 * kernel.reads_per_fma()) / filled.max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::mask::VectorLen;

    fn caps() -> Caps {
        Caps {
            f16: true,
            subgroups: None,
            cooperative: vec![],
            timestamps: false,
            workgroup_memory: 32768,
            workgroup_threads: 256,
            grid: 65535,
            busy_threads: 1 << 17,
            binding_bytes: 1 << 27,
            buffer_bytes: 1 << 30,
        }
    }

    fn tile_of(op: Op, m: usize, n: usize, k: usize, caps: &Caps) -> String {
        match Plan::gpu(&Problem::linear(op, m, n, k, DType::F32), caps).unwrap().method() {
            Method::Gpu { kernel, .. } => kernel.tile().to_string(),
            Method::Cpu => unreachable!(),
        }
    }

    #[test]
    fn large_problems_take_large_tiles_and_single_tokens_the_narrow_one() {
        let op = Op::Sparse24(VectorLen::ONE);
        assert_eq!(tile_of(op, 4096, 4096, 4096, &caps()), "128x128x32");
        assert_eq!(tile_of(op, 4096, 1, 4096, &caps()), "64x8x32");
        assert_eq!(tile_of(Op::Dense, 4096, 4096, 4096, &caps()), "128x128x16");
    }

    #[test]
    fn a_device_with_little_workgroup_memory_gets_a_tile_that_fits() {
        let small = Caps { workgroup_memory: 16384, ..caps() };
        assert_eq!(tile_of(Op::Sparse24(VectorLen::ONE), 4096, 4096, 4096, &small), "64x64x32");
        let none = Caps { workgroup_memory: 1024, ..caps() };
        let problem = Problem::linear(Op::Dense, 8, 8, 8, DType::F32);
        assert!(matches!(Plan::gpu(&problem, &none), Err(Error::MissingFeature { .. })));
    }

    #[test]
    fn what_the_device_cannot_hold_is_refused_by_name() {
        let too_long = Problem::linear(Op::Dense, 1, 70_000 * 128, 1, DType::F32);
        assert!(matches!(Plan::gpu(&too_long, &caps()), Err(Error::MissingFeature { .. })));
        let too_large = Problem::linear(Op::Dense, 8192, 1, 8192, DType::F32);
        let message = Plan::gpu(&too_large, &caps()).unwrap_err().to_string();
        assert!(message.contains("weights") && message.contains("134217728"), "{message}");
        let overflow = Problem::linear(Op::Dense, 1 << 20, 1, 1 << 20, DType::F16);
        assert!(matches!(Plan::gpu(&overflow, &caps()), Err(Error::Overflow { .. })));
        let no_f16 = Caps { f16: false, ..caps() };
        let half = Problem::linear(Op::Dense, 8, 8, 8, DType::F16);
        assert!(Plan::gpu(&half, &no_f16).unwrap_err().to_string().contains("f16"));
    }
}
