//! What a device offers to kernels: data, so that planning needs no device.
//!
//! Invariant: nothing here asks a device; gpu.rs fills it in, and the tests make up their own.

use super::{Architecture, CoopShape, CoopUnit, Schedule};

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
    /// The architecture by whose compiled kernels costs are estimated; `None` where none is near, as for a software
    /// driver.
    pub architecture: Option<Architecture>,
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
    /// Whether cooperative matrices are emulated in plain WGSL: right, but slow, so the planner never picks them.
    pub emulates_cooperative: bool,
    /// Whether shaders get their marked loops unrolled. All drivers' do: rolled, SwiftShader keeps register tiles in
    /// memory and takes 2 to 5 times as long. Tests leave loops rolled where cooperative matrices are emulated in many
    /// lines.
    #[doc(hidden)]
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
    /// Of a board of an architecture as it is sold, for plans without one. Cooperative matrices of 8 x 8, which Apple's
    /// has, are left out, as nothing is known of what its compiler makes of them.
    pub fn example(architecture: Architecture) -> Self {
        use Architecture::{Ada, Adreno, Ampere, AppleM1, Rdna2, Rdna3, Rdna4};
        let is_nvidia = matches!(architecture, Ampere | Ada);
        let is_large = !matches!(architecture, AppleM1 | Adreno);
        let shape = CoopShape { m: 16, n: 16, k: 16, ab: "f16", c: "f32" };
        let lanes = match architecture {
            Ampere | Ada => Some(32),
            Rdna3 | Rdna4 => Some(64),
            Rdna2 | AppleM1 | Adreno => None,
        };
        Self {
            architecture: Some(architecture),
            f16: true,
            subgroups: Some(match architecture {
                Ampere | Ada | AppleM1 => (32, 32),
                Rdna2 | Rdna3 | Rdna4 => (32, 64),
                Adreno => (64, 128),
            }),
            cooperative: lanes.map(|_| shape).into_iter().collect(),
            cooperative_lanes: lanes,
            cooperative_refused: None,
            cooperative_scalars: architecture == AppleM1,
            emulates_cooperative: false,
            unrolls: true,
            timestamps: true,
            workgroup_memory: if is_nvidia { 48 << 10 } else { 32 << 10 },
            workgroup_threads: 1024,
            grid: 65535,
            busy_threads: if is_large { 1 << 17 } else { 1 << 13 },
            rates: if is_large { Rates::DISCRETE } else { Rates::INTEGRATED },
            binding_bytes: 1 << 31,
            buffer_bytes: 1 << 32,
        }
    }

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

    /// Whether to report that a kernel of this schedule cannot run here. A device needs only one unit of cooperative
    /// matrices: if kernels of one unit run, it is no loss that those of the others cannot.
    pub(crate) fn should_report(&self, schedule: Schedule) -> bool {
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

impl Rates {
    /// A large discrete GPU, roughly.
    pub(crate) const DISCRETE: Self = Self { fma: 2e13, cooperative: 1e14, memory: 2e12, cache: 4e12, dispatch: 3e-6 };

    /// A laptop's integrated one, roughly.
    pub(crate) const INTEGRATED: Self =
        Self { fma: 1e12, cooperative: 4e12, memory: 6e10, cache: 2e11, dispatch: 1e-5 };

    /// A software driver on two cores. llvmpipe 26.2.6, dense f16 of 256 x 128 x 256: 0.95 GFLOPS by its cooperative
    /// matrices, 3.9 by plain tiles.
    pub(crate) const SOFTWARE: Self = Self { fma: 2.5e9, cooperative: 1e9, memory: 8e9, cache: 2e10, dispatch: 5e-5 };
}
