//! What a device offers to kernels: data, so that planning needs no device.
//!
//! Invariant: nothing here asks a device; gpu.rs fills it in, and the tests make up their own.

use super::{CoopShape, CoopUnit, Schedule};

/// Whether a shader module keeps naga's run-time checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShaderChecks {
    /// Bounds, loop and division checks compiled in, workgroup memory zeroed.
    Checked,
    /// None of these: the kernels guard their own accesses, and their loops end.
    Trusted,
}

impl ShaderChecks {
    /// `checked` or `trusted`, as printed beside every figure.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checked => "checked",
            Self::Trusted => "trusted",
        }
    }
}

/// What a device offers that kernels ask about. Pure data: planning needs no device.
#[derive(Clone, Debug, PartialEq)]
pub struct Caps {
    /// Arithmetic and storage in f16.
    pub f16: bool,
    /// Smallest and largest subgroup, where subgroup operations exist.
    pub subgroups: Option<(u32, u32)>,
    /// Cooperative-matrix shapes.
    pub cooperative: Vec<CoopShape>,
    /// Lanes of the subgroups that multiply cooperative matrices. No API tells: a probe finds out when a device is
    /// opened, and whether the results are right. `None` until then, and where they are not used.
    pub cooperative_lanes: Option<u32>,
    /// Why cooperative matrices are not used though the driver offers shapes that kernels take.
    pub cooperative_refused: Option<String>,
    /// Whether tiles of cooperative matrices are held as scalars in workgroup memory, as Metal's loads want it.
    pub cooperative_scalars: bool,
    /// Whether cooperative matrices are acted out in plain WGSL: right, but slow, so that no planner chooses them.
    pub emulates_cooperative: bool,
    /// Whether shaders get their marked loops unrolled. SwiftShader's do not: it compiles a kernel in 50 ms rolled, in
    /// 9 s unrolled. llvmpipe compiles both in less than a second.
    pub unrolls: bool,
    /// GPU timestamps at the boundaries of a compute pass.
    pub timestamps: bool,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations per workgroup.
    pub workgroup_threads: u32,
    /// Workgroups per dimension of a dispatch.
    pub grid: u32,
    /// Invocations that keep the device busy; fewer leave part of it idle. An estimate from its kind, since no API
    /// tells.
    pub busy_threads: u32,
    /// What it can do per second: an estimate from its kind, until ceilings have been measured.
    pub rates: Rates,
    /// Bytes of one storage-buffer binding.
    pub binding_bytes: u64,
    /// Bytes of one buffer.
    pub buffer_bytes: u64,
}

impl Caps {
    /// Whether kernels of this unit run; if not, what is missing.
    pub(crate) fn has(&self, unit: CoopUnit) -> std::result::Result<(), String> {
        let shape = unit.shape();
        if !CoopUnit::ALL.into_iter().any(|unit| self.cooperative.contains(&unit.shape())) {
            return Err("cooperative matrices of 8x8x8 or 16x16x16 f16->f32".into());
        }
        match (&self.cooperative_refused, self.cooperative_lanes) {
            (Some(why), _) => Err(format!("cooperative matrices other than this driver's: {why}")),
            (None, Some(lanes)) if lanes == unit.lanes && self.cooperative.contains(&shape) => Ok(()),
            (None, _) => Err(format!("cooperative matrices of {shape} in subgroups of {}", unit.lanes)),
        }
    }

    /// Whether a kernel of this schedule may tell what a device lacks: where one unit of cooperative matrices runs, the
    /// kernels of the others are not missed.
    pub(crate) fn misses(&self, schedule: Schedule) -> bool {
        match schedule {
            Schedule::Coop(tile) => {
                self.has(tile.unit).is_ok() || !CoopUnit::ALL.into_iter().any(|u| self.has(u).is_ok())
            }
            _ => true,
        }
    }
}

/// What a device can do per second, for the planner's estimates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// f32 multiply-adds.
    pub fma: f64,
    /// f16 multiply-adds of cooperative matrices with f32 sums.
    pub cooperative: f64,
    /// Bytes from and to memory.
    pub memory: f64,
    /// Bytes from the last cache.
    pub cache: f64,
    /// Seconds that a dispatch takes beside its work.
    pub dispatch: f64,
}
