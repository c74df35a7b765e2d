//! The GPU kernels: which exist, what they are called, what they need of a device, and their WGSL.
//!
//! A [`Kernel`] is a product of small types: operation, [`Schedule`], form, element types and epilogue. [`Kernel::all`]
//! is the one list that the planner, the tuner, the tests and the benchmarks iterate. A [`Program`] is anything that is
//! compiled for a GPU, these kernels and those of all other [operations](crate::ops); [`Program::all`] lists them.
//! Nothing here needs a device. Invariant: a `Kernel` that exists has a shader; whether a given device can run it is
//! [`Kernel::supported_by`].
//!
//! # Schedules
//! | schedule | operations | what it does |
//! |---|---|---|
//! | [`Schedule::Tile`] | dense, masked | register tiles over a k-major copy of both operands in workgroup memory |
//! | | 2:4, V > 1 | the same, gathering the activations that a code selects: half the multiply-adds |
//! | | 2:4, V = 2, 4 | as `lanes_…` too: 32 neighbouring threads gather for the same tokens |
//! | [`Schedule::Expand`] | 2:4, V < 8 | expands codes on the way to workgroup memory: dense arithmetic, sparse bytes |
//! | [`Schedule::Gemv`] | all | up to eight tokens read every weight once, activations in workgroup memory |
//! | [`Schedule::Coop`] | all, f16 | cooperative matrices: 2:4 gathers from V = 16 on, and expands below |
//!
//! # Tried and rejected
//! Short patterns by a branch: a thread held the four activations of a group for eight tokens in registers, and one of
//! six leaves, chosen by a code that is uniform in the workgroup, named its registers. No word was gathered, and a CUDA
//! twin promised 1.06 to 0.85 instructions per dense multiply-add at V = 1 to 4. Real compilers keep no 128 sums across
//! six leaves: Mesa 22.3's ACO spilt up to 274 registers on RDNA3, Mesa 26's compiler for Apple's GPUs up to 460, and
//! on NVIDIA NAK executes several times the instructions of the dense kernel.
//!
//! Gathers at V = 1: every multiply-add reads a word of its own, and workgroup memory, not issue, is what they wait
//! for. By the addresses of their lanes (the module `compile`) they are 0.3 to 0.9 of dense on all of AMD's, NVIDIA's,
//! Apple's and Adreno's architectures that were compiled for, in every tile, where [`Schedule::Expand`] is 0.9 to 1.0.
//!
//! # Specialisation
//! Shaders are valid WGSL whose named `const`s and `alias`es (tile sizes, element types, vector length) the host
//! replaces by text, because WGSL's `override` cannot size the function-local arrays that hold register tiles. Loops
//! over those arrays are marked `// unroll`, and the host repeats their bodies with the counter as a `const`: then
//! every register index is a constant in the SPIR-V itself, and no driver is left to decide whether a tile stays in
//! registers: SwiftShader otherwise keeps it in memory, and takes 2 to 5 times as long. What only selects a branch
//! (form and epilogue) is an `override`, set when the pipeline is made. The overrides have a second use: wgpu's Vulkan
//! backend compiles modules without any override before it learns that loop bounding and workgroup zeroing are to be
//! left out, so [trusted](ShaderChecks::Trusted) modules need at least one.
//!
//! Tiles of workgroup memory are nested arrays, so that an address is a sum of one term per index, of which compilers
//! keep the constant ones in the instruction. The same for the stage of GEMVs was tried: at one token RDNA 3 takes 14 %
//! fewer cycles, NVIDIA 19 % more, and the bytes of the weights hide both.

mod architecture;
mod caps;
mod coop;
mod features;
mod gemm;
mod norm;
mod probes;
mod registry;
mod schedule;
mod sparse24;
mod wgsl;
mod window;

pub use architecture::Architecture;
pub use caps::{Caps, Rates, ShaderChecks};
pub use coop::{CoopShape, CoopTile, CoopUnit};
pub(crate) use coop::{Primitives, check_len, check_result};
pub use features::FeatureAccess;
pub(crate) use features::{Types, WIDTHS, WORKGROUP, workgroup_supported};
pub use gemm::Kernel;
// What tests compare with the shaders.
#[doc(hidden)]
pub use gemm::Params;
pub(crate) use gemm::{Pack, Reduce, helpers};
pub(crate) use norm::{
    Norm, NormFold, NormFoldParams, NormGrad, NormLayout, NormParams, NormSums, NormSumsParams, norm_sums,
};
pub(crate) use probes::{CoopCheck, CopyParams, PROBE_CHAINS, PROBE_ROUNDS, ProbeCoop, ProbeCopy, ProbeFma, probes};
pub use registry::Program;
#[doc(hidden)]
pub use registry::{Binding, BindingAccess, ParamsLayout};
pub(crate) use registry::{Shader, fields};
pub use schedule::{Schedule, Tile};
pub use sparse24::Sparse24Layout;
pub(crate) use sparse24::Sparse24Params;
pub(crate) use wgsl::{Text, activation_override, add_override, add_suffix, target_override, target_suffix};
pub(crate) use window::{WINDOW, WINDOW_GRAD, WindowParams, window_overrides};
