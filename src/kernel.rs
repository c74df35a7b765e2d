//! The registry of GPU kernels: which exist, what they are called, and their WGSL.
//!
//! A [`Kernel`] is a product of small types: operation, [`Way`] of going about it, form, element types and epilogue.
//! [`Kernel::all`] is the one list that the planner, the tuner, the tests and the benchmarks iterate. Nothing here
//! needs a device. Invariant: a `Kernel` that exists has a shader; whether a given device can run it is
//! [`Kernel::supported_by`].
//!
//! # Ways
//! | way | operations | what it does |
//! |---|---|---|
//! | [`Way::Tile`] | dense, masked | register tiles over a k-major copy of both operands in workgroup memory |
//! | | 2:4, V > 1 | the same, gathering the activations that a code selects: half the multiply-adds |
//! | | 2:4, V = 2, 4 | as `lanes_…` too: 32 neighbouring threads gather for the same tokens |
//! | [`Way::Expand`] | 2:4, V < 8 | expands codes on the way to workgroup memory: dense arithmetic, sparse bytes |
//! | [`Way::Gemv`] | all | up to eight tokens read every weight once, activations in workgroup memory |
//! | [`Way::Coop`] | all, f16 | cooperative matrices: 2:4 gathers from V = 16 on, and expands below |
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
//! Apple's and Adreno's architectures that were compiled for, in every tile, where [`Way::Expand`] is 0.9 to 1.0.
//!
//! # Specialisation
//! Shaders are valid WGSL whose named `const`s and `alias`es (tile sizes, element types, vector length) the host
//! replaces by text, because WGSL's `override` cannot size the function-local arrays that hold register tiles. Loops
//! over those arrays are marked `// unroll`, and the host repeats their bodies with the counter as a `const`: then
//! every register index is a constant in the SPIR-V itself, and no driver is left to decide whether a tile stays in
//! registers. (All but SwiftShader's: see [`Caps::unrolls`].) What only selects a branch (form and epilogue)
//! is an `override`, set when the pipeline is made. The overrides have a second use: wgpu's Vulkan backend compiles
//! modules without any override before it learns that loop bounding and workgroup zeroing are to be left out, so
//! [trusted](ShaderChecks::Trusted) modules need at least one.

mod coop;
pub mod glue;
pub mod sparsify;

use std::fmt;

use coop::CHECK_THREADS;
pub use coop::{CoopShape, CoopTile, CoopUnit};
pub(crate) use coop::{Primitives, check_len, check_result};

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::layout::PANEL;
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::problem::{Activation, Epilogue, Form, Op, Problem};

/// Mirror of `Params` in shaders/shared/gemm.wgsl.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Params {
    /// Output features of these weights: all, or those of one piece of a large matrix.
    pub m: u32,
    /// Tokens.
    pub n: u32,
    /// Input features before compression, padded to a multiple of 32.
    pub k: u32,
    /// k of one split, a multiple of 32.
    pub k_split: u32,
    /// Features of Y.
    pub features: u32,
    /// First feature that these weights make.
    pub feature0: u32,
    /// Tiles along m.
    pub tiles_m: u32,
    /// Tiles along n.
    pub tiles_n: u32,
    /// k of the caller's X.
    pub k_given: u32,
}

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

    /// Whether a kernel of this way may tell what a device lacks: where one unit of cooperative matrices runs, the
    /// kernels of the others are not missed.
    pub(crate) fn misses(&self, way: Way) -> bool {
        match way {
            Way::Coop(tile) => self.has(tile.unit).is_ok() || !CoopUnit::ALL.into_iter().any(|u| self.has(u).is_ok()),
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

/// A register tile: a workgroup owns `m x n` outputs, a thread `feature_quads · 4 x token_quads · 4` of them; k goes by
/// 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    m: u32,
    n: u32,
    feature_quads: u32,
    token_quads: u32,
    /// Threads along m among 32 neighbours.
    across: u32,
}

impl Tile {
    const fn new(m: u32, n: u32, feature_quads: u32, token_quads: u32) -> Self {
        // Threads come in blocks of 8 x 8 (see shaders/shared/tile.wgsl).
        assert!(m.is_multiple_of(32 * feature_quads) && n.is_multiple_of(32 * token_quads));
        Self { m, n, feature_quads, token_quads, across: 8 }
    }

    /// For gathers by short patterns: 32 neighbours own different features of the same 16 tokens, so that whatever
    /// their patterns are, they read at most three addresses at once, in different banks. Untried on a GPU. Reads of 16
    /// bytes are served by eights of a subgroup wherever that is documented, so it saves few passes of workgroup memory
    /// (178 for 211 per step and subgroup of 32 on NVIDIA's at V = 4, traced by `compile::trace`), but all conflicts
    /// where eight threads that are served together are no neighbours, as may be on RDNA 2 and 3 (178 for 328).
    const LANES: Self = Self { m: 128, n: 128, feature_quads: 1, token_quads: 4, across: 32 };

    /// The registered tiles, largest first: one for large problems, and smaller ones to fill a device with less.
    pub const ALL: [Self; 4] =
        [Self::new(128, 128, 2, 2), Self::new(64, 64, 2, 1), Self::new(128, 32, 2, 1), Self::new(32, 32, 1, 1)];

    const fn threads(self) -> u32 {
        (self.m / 4 / self.feature_quads) * (self.n / 4 / self.token_quads)
    }
}

/// How a kernel goes about its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    /// Register tiles; 2:4 weights gather activations.
    Tile(Tile),
    /// Register tiles over 2:4 weights that are expanded as they are loaded.
    Expand(Tile),
    /// A panel of 32 features x a few tokens; `slices` runs of 32 threads share the panel's k.
    Gemv {
        /// Tokens per workgroup: 1, 4 or 8.
        tokens: u32,
        /// Runs of 32 threads.
        slices: u32,
    },
    /// Cooperative matrices over f16; 2:4 weights gather activations from V = 16 on, and are expanded below.
    Coop(CoopTile),
}

impl Way {
    /// The ways that are registered for an operation on elements of a type.
    pub fn of(op: Op, storage: DType) -> Vec<Self> {
        let mut ways = Vec::new();
        let short = op.vector().map(VectorLen::get).filter(|&v| v < 8);
        // One row alone gathers too much for its multiply-adds: see "Tried and rejected".
        if short != Some(1) {
            ways.extend(Tile::ALL.map(Self::Tile));
        }
        if let Some(v) = short {
            ways.extend((v > 1).then_some(Self::Tile(Tile::LANES)));
            ways.extend(Tile::ALL.map(Self::Expand));
        }
        // A mask needs registers beside the weights, of which Adreno has too few for 1024 threads.
        let many = if matches!(op, Op::Masked | Op::Masked24) { 16 } else { 32 };
        ways.extend([1, 4, 8].into_iter().flat_map(|tokens| [8, many].map(|slices| Self::Gemv { tokens, slices })));
        if storage == DType::F16 {
            ways.extend(CoopUnit::ALL.into_iter().flat_map(|unit| CoopTile::of(op, unit).map(Self::Coop)));
        }
        ways
    }

    /// The way of this name (its `Display`) among those of an operation.
    pub fn named(op: Op, storage: DType, name: &str) -> Option<Self> {
        Self::of(op, storage).into_iter().find(|way| way.to_string() == name)
    }

    /// Features and tokens per workgroup.
    pub const fn tile(self) -> (u32, u32) {
        match self {
            Self::Tile(tile) | Self::Expand(tile) => (tile.m, tile.n),
            Self::Gemv { tokens, .. } => (PANEL as u32, tokens),
            Self::Coop(tile) => (tile.m, tile.n),
        }
    }

    /// Invocations per workgroup.
    pub const fn threads(self) -> u32 {
        match self {
            Self::Tile(tile) | Self::Expand(tile) => tile.threads(),
            Self::Gemv { slices, .. } => 32 * slices,
            Self::Coop(tile) => tile.threads(),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (m, n) = self.tile();
        match self {
            Self::Tile(tile) if tile.across == 32 => write!(f, "lanes_{m}x{n}x16"),
            Self::Tile(_) => write!(f, "{m}x{n}x16"),
            Self::Expand(_) => write!(f, "expand_{m}x{n}x16"),
            Self::Gemv { slices, .. } => write!(f, "gemv_{m}x{n}_t{}", 32 * slices),
            Self::Coop(tile) => write!(f, "coop{}_{m}x{n}x{}_t{}", tile.unit, CoopTile::K, tile.threads()),
        }
    }
}

/// One GPU kernel: everything that distinguishes two compiled pipelines.
///
/// Its name (`Display`) is made of its parts, such as `gemm_sparse24-f16f32-v32-128x128x16-bias_gelu`: operation,
/// storage and accumulation type, vector length, way and tile, epilogue; then `gemm` for the plain form, and `out_f32`
/// or `out_f16` where the output has another type than the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    op: Op,
    way: Way,
    form: Form,
    storage: DType,
    output: DType,
    epilogue: Epilogue,
}

impl Kernel {
    /// The kernel that solves a problem in one of its operation's ways. An error if there is no shader for the element
    /// types or the way.
    pub fn new(problem: &Problem, way: Way) -> Result<Self> {
        for (what, got) in [("weights and x", problem.storage), ("y", problem.output)] {
            if got == DType::Bf16 {
                return Err(Error::DType { what: what.into(), got, expected: DType::F32 });
            }
        }
        if !Way::of(problem.op, problem.storage).contains(&way) {
            return Err(Error::Invalid(format!("{way} is no way of {} {}", problem.storage, problem.op)));
        }
        let Problem { op, form, storage, output, epilogue, .. } = *problem;
        Ok(Self { op, way, form, storage, output, epilogue })
    }

    /// Every kernel there is: operation x vector length x way x form x storage x output x epilogue.
    pub fn all() -> impl Iterator<Item = Self> {
        const FLOATS: [DType; 2] = [DType::F32, DType::F16];
        let layouts = || [Form::Linear, Form::Gemm].into_iter().flat_map(|form| FLOATS.map(|output| (form, output)));
        let typed = Op::all().flat_map(|op| FLOATS.map(|storage| (op, storage)));
        let ways = typed.flat_map(|(op, storage)| Way::of(op, storage).into_iter().map(move |way| (op, storage, way)));
        ways.flat_map(move |(op, storage, way)| {
            layouts().flat_map(move |(form, output)| {
                Epilogue::all().map(move |epilogue| Self { op, way, form, storage, output, epilogue })
            })
        })
    }

    /// Whether it is the linear form without an epilogue: one kernel of each shader text.
    pub fn is_plain(&self) -> bool {
        self.form == Form::Linear && self.epilogue == Epilogue::NONE
    }

    /// How its weights are given.
    pub fn op(&self) -> Op {
        self.op
    }

    /// How it goes about it.
    pub fn way(&self) -> Way {
        self.way
    }

    /// How its activations and output are laid out.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Element type of weights and activations.
    pub fn storage(&self) -> DType {
        self.storage
    }

    /// Element type of output and residual.
    pub fn output(&self) -> DType {
        self.output
    }

    /// What it does to an output before it stores it.
    pub fn epilogue(&self) -> Epilogue {
        self.epilogue
    }

    /// The kernel that leaves the sums of one split in scratch: token-major f32, no epilogue.
    pub(crate) fn partial(&self) -> Self {
        Self { form: Form::Linear, output: DType::F32, epilogue: Epilogue::NONE, ..*self }
    }

    /// Bytes of workgroup memory that a workgroup takes.
    pub fn workgroup_bytes(&self) -> u32 {
        match self.way {
            Way::Tile(tile) | Way::Expand(tile) => {
                // Two halves of both tiles, and a word of codes per feature where activations are gathered.
                let gathers = self.gathers();
                let (w_rows, x_pad, codes) = if gathers { (8, 8, tile.m) } else { (16, 0, 0) };
                2 * 4 * (w_rows * tile.m + 16 * (tile.n + x_pad) + codes)
            }
            Way::Gemv { .. } => 32 << 10,
            Way::Coop(tile) => {
                // Rows of k and 16 bytes, and a stage of a block of f32 per subgroup, its rows longer by four.
                let CoopUnit { edge, lanes } = tile.unit;
                let depth = CoopTile::K / if self.gathers() { 2 } else { 1 };
                let rows = tile.m + tile.patterns(self.op) * tile.n;
                16 * (depth / 8 + 1) * tile.buffers * rows + 4 * edge * (edge + 4) * tile.threads() / lanes
            }
        }
    }

    /// Whether a tile gathers activations by 2:4 codes.
    fn gathers(&self) -> bool {
        match (self.op, self.way) {
            (Op::Sparse24(_), Way::Tile(_)) => true,
            (Op::Sparse24(v), Way::Coop(_)) => v.get() >= 16,
            _ => false,
        }
    }

    /// Whether it multiplies weights that 2:4 has removed, by zero.
    pub(crate) fn expands(&self) -> bool {
        matches!(self.op, Op::Sparse24(_)) && matches!(self.way, Way::Expand(_) | Way::Coop(_)) && !self.gathers()
    }

    /// What it costs beside memory, for the planner. The numbers of instructions were read off CUDA twins of the
    /// shaders, compiled for sm_90: a hint that holds until a device is [tuned](crate::Tuning).
    pub(crate) fn effort(&self) -> Effort {
        let storage = self.storage.bytes() as f64;
        let kept = if matches!(self.op, Op::Sparse24(_)) { 0.5 } else { 1.0 };
        let (m, n) = self.way.tile();
        let (m, n) = (f64::from(m), f64::from(n));
        let issue = match self.way {
            Way::Tile(tile) | Way::Expand(tile) => {
                let (features, quads) = (4.0 * f64::from(tile.feature_quads), f64::from(tile.token_quads));
                // Per k or group: multiply-adds; 16-byte reads, each an instruction and, over the four schedulers that
                // share workgroup memory, several cycles of it; address arithmetic.
                let (products, reads, address, per) = match self.op {
                    Op::Sparse24(v) if self.gathers() => {
                        let share = features.min(v.get() as f64);
                        let patterns = features / share;
                        // Threads with patterns of their own read different rows: a pass for each quarter of a
                        // subgroup.
                        let gather = if share < 8.0 { 4.0 } else { 1.5 };
                        let spread = if tile.across == 32 { 4.0 } else { 1.25 };
                        let weights = features / 2.0;
                        let gathered = patterns * 2.0 * quads;
                        (
                            2.0 * features * quads * 4.0,
                            (weights + gathered, weights * spread + gathered * gather),
                            13.0 + 8.0 * patterns,
                            4.0,
                        )
                    }
                    _ => {
                        let reads = features / 4.0 + quads;
                        (features * quads * 4.0, (reads, reads * 1.25), 3.0, 1.0)
                    }
                };
                let (instructions, passes) = (products + reads.0 + address, 4.0 * reads.1);
                // Masks and codes are applied once per weight and workgroup.
                let applied = if self.gathers() || self.op == Op::Dense { 1.0 } else { 1.02 };
                // Loading and stashing take about a tenth of a dense multiply-add's slot, of sparse weights as of dense
                // ones.
                applied * instructions.max(passes) / (per * features * quads * 4.0) + 0.1
            }
            Way::Gemv { tokens, .. } => {
                let tokens = f64::from(tokens);
                let reads = (tokens / 4.0).max(1.0);
                let address = if kept < 1.0 { 5.5 } else { 1.3 };
                // Lanes that read one address are served together, lanes with patterns of their own by quarters.
                let passes = if self.op.vector().is_some_and(|v| v.get() < 32) { 16.0 } else { 4.0 };
                kept * (tokens + 1.0 + reads + address).max(passes * reads) / tokens
            }
            Way::Coop(tile) => {
                // In units of the hardware's own multiply-adds: half of its rate is what the bytes and latencies of the
                // tiles should leave (see shaders/shared/coop.wgsl), and each copy of the activations costs its stores.
                let gathered = 0.05 * f64::from(tile.patterns(self.op) - 1);
                2.0 * if self.gathers() { 0.5 + gathered } else { 1.0 }
            }
        };
        // What a workgroup asks the cache for, per k.
        Effort { issue, cache_bytes: (kept * m + n) * storage / (m * n) }
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        if !caps.f16 && (self.storage == DType::F16 || self.output == DType::F16) {
            return Err("f16 in shaders".into());
        }
        if let Way::Coop(tile) = self.way {
            caps.has(tile.unit)?;
        }
        let (threads, bytes) = (self.way.threads(), self.workgroup_bytes());
        if threads > caps.workgroup_threads {
            return Err(format!("workgroups of {threads} invocations (it allows {})", caps.workgroup_threads));
        }
        if bytes > caps.workgroup_memory {
            return Err(format!("{bytes} bytes of workgroup memory (it has {})", caps.workgroup_memory));
        }
        Ok(())
    }

    /// The specialised WGSL, as a GPU gets it. An error only if a shader lacks a name that it is to be specialised by,
    /// which the tests rule out.
    pub fn source(&self) -> Result<String> {
        self.text(Primitives::NATIVE)?.finish(true)
    }

    fn text(&self, primitives: Primitives) -> Result<Text> {
        let mut text = Text::new(&[GEMM], self.storage, self.output)?;
        if self.op != Op::Dense || matches!(self.way, Way::Coop(_)) {
            text.push(include_str!("../shaders/shared/words.wgsl"));
            text.set("const VECTOR: u32", self.op.vector().map_or(1, VectorLen::get))?;
        }
        // Elements of a 16-byte unit.
        let unit = 16 / self.storage.bytes();
        match self.way {
            Way::Tile(tile) | Way::Expand(tile) => {
                text.push(include_str!("../shaders/shared/tile.wgsl"));
                let kept = matches!(self.op, Op::Sparse24(_));
                let (w_rows, w_quads) = (if self.gathers() { 8 } else { 16 }, if kept { 2 } else { 4 });
                let blocks = (tile.m * w_quads + tile.n * 4) / 4;
                for (name, value) in [
                    ("TILE_M", tile.m),
                    ("TILE_N", tile.n),
                    ("FEATURE_QUADS", tile.feature_quads),
                    ("TOKEN_QUADS", tile.token_quads),
                    ("ACROSS", tile.across),
                    ("STEPS", blocks.div_ceil(tile.threads())),
                    ("UNIT_QUADS", unit as u32 / 4),
                    ("W_ROWS", w_rows),
                    ("W_QUADS", w_quads),
                    ("X_PAD", if self.gathers() { 2 } else { 0 }),
                    ("THREAD_M", 4 * tile.feature_quads),
                ] {
                    text.set(&format!("const {name}: u32"), value as usize)?;
                }
                if !self.gathers() {
                    text.push(include_str!("../shaders/shared/tile_dense.wgsl"));
                }
                match self.op {
                    Op::Dense => text.push(include_str!("../shaders/gemm_dense.wgsl")),
                    Op::Masked | Op::Masked24 => {
                        text.push(include_str!("../shaders/gemm_masked.wgsl"));
                        text.set("const CODES: bool", self.op == Op::Masked24)?;
                    }
                    Op::Sparse24(v) if self.gathers() => {
                        text.push(include_str!("../shaders/gemm_sparse24.wgsl"));
                        let share = v.get().min(4 * tile.feature_quads as usize);
                        text.set("const SHARE: u32", share)?;
                        text.set("const PATTERNS: u32", 4 * tile.feature_quads as usize / share)?;
                    }
                    Op::Sparse24(_) => text.push(include_str!("../shaders/gemm_sparse24_expand.wgsl")),
                }
            }
            Way::Gemv { tokens, slices } => {
                text.push(match tokens {
                    1 => include_str!("../shaders/shared/tokens1.wgsl"),
                    _ => include_str!("../shaders/shared/tokens4.wgsl"),
                });
                text.push(include_str!("../shaders/shared/gemv.wgsl"));
                text.push(match self.op {
                    Op::Dense => include_str!("../shaders/gemv_dense.wgsl"),
                    Op::Masked | Op::Masked24 => include_str!("../shaders/gemv_masked.wgsl"),
                    Op::Sparse24(_) => include_str!("../shaders/gemv_sparse24.wgsl"),
                });
                let kept = if matches!(self.op, Op::Sparse24(_)) { 2 } else { 1 };
                text.set("const UNIT: u32", unit)?;
                text.set("const UNITS: u32", 32 / unit / kept)?;
                text.set("const TOKEN_VECS: u32", tokens.div_ceil(4) as usize)?;
                text.set("const SLICES: u32", slices as usize)?;
                text.set("const STAGE_K: u32", 8192 / tokens as usize)?;
                if self.op == Op::Masked24 {
                    text.set("const CODES: bool", true)?;
                }
            }
            Way::Coop(tile) => self.coop_text(tile, primitives, &mut text)?,
        }
        Ok(text)
    }

    fn coop_text(&self, tile: CoopTile, primitives: Primitives, text: &mut Text) -> Result<()> {
        primitives.precede(text);
        tile.unit.specialise(primitives, text)?;
        text.push(include_str!("../shaders/shared/coop.wgsl"));
        if !self.gathers() {
            text.push(include_str!("../shaders/shared/coop_dense.wgsl"));
        }
        text.push(match self.op {
            Op::Dense => include_str!("../shaders/gemm_dense_coop.wgsl"),
            Op::Masked | Op::Masked24 => include_str!("../shaders/gemm_masked_coop.wgsl"),
            Op::Sparse24(_) if self.gathers() => include_str!("../shaders/gemm_sparse24_coop.wgsl"),
            Op::Sparse24(_) => include_str!("../shaders/gemm_sparse24_coop_expand.wgsl"),
        });
        if self.op == Op::Masked24 {
            text.set("const CODES: bool", true)?;
        }
        let depth = CoopTile::K / if self.gathers() { 2 } else { 1 };
        let unit_k = if matches!(self.op, Op::Sparse24(_)) { 16 } else { 8 };
        let patterns = if self.gathers() { tile.patterns(self.op) } else { 1 };
        // Runs of a subgroup's features that share a pattern.
        let runs = (tile.unit.edge * tile.frags_m * patterns / tile.m).max(1);
        for (name, value) in [
            ("TILE_M", tile.m),
            ("TILE_N", tile.n),
            ("TILE_K", CoopTile::K),
            ("DEPTH", depth),
            ("UNIT_K", unit_k),
            ("FRAGS_M", tile.frags_m),
            ("FRAGS_N", tile.frags_n),
            ("SUMS", tile.frags_m * tile.frags_n),
            ("K_STEPS", depth / tile.unit.edge),
            ("W_STEPS", tile.m * (CoopTile::K / unit_k) / tile.threads()),
            ("X_STEPS", tile.n * (CoopTile::K / 8) / tile.threads()),
            ("BUFFERS", tile.buffers),
            ("PATTERNS", patterns),
            ("RUNS", runs),
            ("RUN_FRAGS", tile.frags_m / runs),
        ] {
            text.set(&format!("const {name}: u32"), value as usize)?;
        }
        Ok(())
    }

    /// Values of the shader's `override`s.
    pub fn overrides(&self) -> Vec<(&'static str, f64)> {
        overrides(self.form, self.epilogue)
    }
}

/// What a kernel costs per multiply-add of the dense product, beside memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Issue slots, where a multiply-add alone would take one.
    pub(crate) issue: f64,
    /// Bytes asked from the last cache.
    pub(crate) cache_bytes: f64,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gemm_{}-{}f32", self.op.kernel_name(), self.storage)?;
        if let Some(v) = self.op.vector() {
            write!(f, "-v{v}")?;
        }
        write!(f, "-{}-{}", self.way, self.epilogue)?;
        if self.form == Form::Gemm {
            f.write_str("-gemm")?;
        }
        if self.output != self.storage {
            write!(f, "-out_{}", self.output)?;
        }
        Ok(())
    }
}

/// Everything that is compiled for a GPU: the kernels, what runs before and after them, and what measures ceilings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// A GEMM.
    Gemm(Kernel),
    /// Brings X to the shape that kernels read (shaders/pack_x.wgsl).
    Pack {
        /// Whether it is X or B.
        form: Form,
        /// Its element type.
        storage: DType,
    },
    /// Adds up the splits of k and runs the epilogue (shaders/reduce.wgsl).
    Reduce {
        /// Layout of the output.
        form: Form,
        /// Its element type.
        output: DType,
        /// What is done to it.
        epilogue: Epilogue,
    },
    /// Multiply-adds in registers (shaders/probe_fma.wgsl).
    ProbeFma(DType),
    /// Cooperative matrices (shaders/probe_coop.wgsl).
    ProbeCoop(CoopUnit),
    /// Whether cooperative matrices are right, and how wide their subgroups are (shaders/coop_check.wgsl).
    CoopCheck {
        /// Rows and columns of a block.
        edge: u32,
    },
    /// A copy (shaders/probe_copy.wgsl).
    ProbeCopy,
    /// What runs between the GEMMs of a transformer.
    Glue(glue::Glue),
    /// What makes 2:4 weights of dense ones, and dense ones of them.
    Conversion(sparsify::Conversion),
}

/// Independent sums of a thread or subgroup, and multiply-adds of each, in the probes of arithmetic.
pub(crate) const PROBE_CHAINS: usize = 8;
pub(crate) const PROBE_ROUNDS: usize = 512;

const ENABLE_F16: &str = "enable f16;\n";
const GEMM: &str = include_str!("../shaders/shared/gemm.wgsl");

impl Program {
    /// What is compiled beside the [`Kernel`]s.
    pub fn helpers() -> impl Iterator<Item = Self> {
        const FLOATS: [DType; 2] = [DType::F32, DType::F16];
        let forms = || [Form::Linear, Form::Gemm].into_iter();
        let pack = forms().flat_map(|form| FLOATS.map(|storage| Self::Pack { form, storage }));
        let reduce = forms().flat_map(|form| {
            FLOATS
                .into_iter()
                .flat_map(move |output| Epilogue::all().map(move |epilogue| Self::Reduce { form, output, epilogue }))
        });
        let probes = FLOATS.map(Self::ProbeFma).into_iter().chain([Self::ProbeCopy]);
        let coop = CoopUnit::ALL.map(Self::ProbeCoop).into_iter().chain([8, 16].map(|edge| Self::CoopCheck { edge }));
        let conversions = sparsify::Conversion::all().map(Self::Conversion);
        pack.chain(reduce).chain(probes).chain(coop).chain(glue::Glue::all().map(Self::Glue)).chain(conversions)
    }

    /// The part that decides its text. Programs that differ in form and epilogue alone share a module.
    pub(crate) fn module(&self) -> Self {
        let (form, epilogue) = (Form::Linear, Epilogue::NONE);
        match *self {
            Self::Gemm(kernel) => Self::Gemm(Kernel { form, epilogue, ..kernel }),
            Self::Pack { storage, .. } => Self::Pack { form, storage },
            Self::Reduce { output, .. } => Self::Reduce { form, output, epilogue },
            Self::Glue(glue) => Self::Glue(glue.module()),
            Self::Conversion(conversion) => Self::Conversion(conversion.module()),
            probe => probe,
        }
    }

    /// Whether it writes binding 7 beside binding 6.
    pub(crate) fn writes_two(&self) -> bool {
        matches!(self, Self::Conversion(conversion) if conversion.writes_two())
    }

    /// The specialised WGSL, as a GPU gets it: see [`Kernel::source`].
    pub fn source(&self) -> Result<String> {
        self.text(Primitives::NATIVE)?.finish(true)
    }

    /// The specialised WGSL as a device with these capabilities gets it.
    pub fn source_for(&self, caps: &Caps) -> Result<String> {
        self.text(Primitives::of(caps))?.finish(caps.unrolls)
    }

    fn text(&self, primitives: Primitives) -> Result<Text> {
        match *self {
            Self::Gemm(kernel) => kernel.text(primitives),
            Self::Pack { storage, .. } => Text::new(&[GEMM, include_str!("../shaders/pack_x.wgsl")], storage, storage),
            Self::Reduce { output, .. } => {
                Text::new(&[GEMM, include_str!("../shaders/reduce.wgsl")], DType::F32, output)
            }
            Self::ProbeFma(dtype) => {
                let mut text = Text::new(&[GEMM, include_str!("../shaders/probe_fma.wgsl")], dtype, DType::F32)?;
                text.set("const CHAINS: u32", PROBE_CHAINS)?;
                text.set("const ROUNDS: u32", PROBE_ROUNDS)?;
                Ok(text)
            }
            Self::ProbeCoop(unit) => {
                let mut text = Text(include_str!("../shaders/probe_coop.wgsl").to_owned());
                primitives.precede(&mut text);
                unit.specialise(primitives, &mut text)?;
                text.set("const CHAINS: u32", PROBE_CHAINS)?;
                text.set("const ROUNDS: u32", PROBE_ROUNDS)?;
                Ok(text)
            }
            Self::CoopCheck { edge } => {
                let mut text = Text(include_str!("../shaders/coop_check.wgsl").to_owned());
                primitives.precede(&mut text);
                // How wide a subgroup is does not concern the instructions.
                CoopUnit { edge, lanes: 32 }.specialise(primitives, &mut text)?;
                text.set("const THREADS: u32", CHECK_THREADS)?;
                text.set("const K_STEPS: u32", CoopTile::K as usize / edge as usize)?;
                Ok(text)
            }
            Self::ProbeCopy => Ok(Text(include_str!("../shaders/probe_copy.wgsl").to_owned())),
            Self::Glue(glue) => glue.text(primitives),
            Self::Conversion(conversion) => Ok(conversion.text()),
        }
    }

    /// Values of the shader's `override`s.
    pub fn overrides(&self) -> Vec<(&'static str, f64)> {
        match *self {
            Self::Gemm(kernel) => kernel.overrides(),
            Self::Pack { form, .. } => overrides(form, Epilogue::NONE),
            Self::Reduce { form, epilogue, .. } => overrides(form, epilogue),
            Self::ProbeFma(_) => overrides(Form::Linear, Epilogue::NONE),
            Self::ProbeCoop(_) => vec![("FACTOR", 0.007_812_5)],
            Self::CoopCheck { .. } => vec![("ONE", 1.0)],
            Self::ProbeCopy => vec![("COPIES", 4.0)],
            Self::Glue(glue) => glue.overrides(),
            Self::Conversion(conversion) => conversion.overrides(),
        }
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        let f16 = match *self {
            Self::Gemm(kernel) => return kernel.supported_by(caps),
            Self::Pack { storage, .. } => storage == DType::F16,
            Self::Reduce { output, .. } => output == DType::F16,
            Self::ProbeFma(dtype) => dtype == DType::F16,
            // The matrices' own speed is what is asked for, and what they are.
            Self::ProbeCoop(_) | Self::CoopCheck { .. } if caps.emulates_cooperative => {
                return Err("cooperative matrices that are not acted out".into());
            }
            Self::ProbeCoop(unit) => return caps.has(unit),
            Self::CoopCheck { edge } => {
                let shape = CoopUnit { edge, lanes: 32 }.shape();
                return match (caps.cooperative.contains(&shape), caps.subgroups) {
                    (false, _) => Err(format!("cooperative matrices of {shape}")),
                    (true, None) => Err("subgroups in shaders".into()),
                    (true, Some(_)) if !caps.f16 => Err("f16 in shaders".into()),
                    (true, Some(_)) => Ok(()),
                };
            }
            Self::ProbeCopy => false,
            Self::Glue(glue) => return glue.supported_by(caps),
            Self::Conversion(conversion) => return conversion.supported_by(caps),
        };
        if f16 && !caps.f16 { Err("f16 in shaders".into()) } else { Ok(()) }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gemm(kernel) => kernel.fmt(f),
            Self::Pack { form, storage } => write!(f, "pack_x-{storage}-{}", form.name()),
            Self::Reduce { form, output, epilogue } => write!(f, "reduce-{output}-{epilogue}-{}", form.name()),
            Self::ProbeFma(dtype) => write!(f, "probe_fma-{dtype}"),
            Self::ProbeCoop(unit) => write!(f, "probe_coop{unit}"),
            Self::CoopCheck { edge } => write!(f, "coop_check-{edge}"),
            Self::ProbeCopy => f.write_str("probe_copy"),
            Self::Glue(glue) => glue.fmt(f),
            Self::Conversion(conversion) => conversion.fmt(f),
        }
    }
}

fn overrides(form: Form, epilogue: Epilogue) -> Vec<(&'static str, f64)> {
    let activation = match epilogue.activation {
        Activation::None => 0.0,
        Activation::Relu => 1.0,
        Activation::Gelu => 2.0,
        Activation::GeluTanh => 3.0,
        Activation::Silu => 4.0,
    };
    vec![
        ("LINEAR", f64::from(u8::from(form == Form::Linear))),
        ("HAS_BIAS", f64::from(u8::from(epilogue.bias))),
        ("ACTIVATION", activation),
        ("HAS_RESIDUAL", f64::from(u8::from(epilogue.residual))),
    ]
}

/// WGSL on its way to be specialised.
struct Text(String);

impl Text {
    fn new(parts: &[&str], storage: DType, output: DType) -> Result<Self> {
        let mut text = Self(parts.join("\n"));
        text.replace("alias Storage", storage.name())?;
        text.replace("alias Output", output.name())?;
        if storage == DType::F16 || output == DType::F16 {
            text.0.insert_str(0, ENABLE_F16);
        }
        Ok(text)
    }

    fn push(&mut self, part: &str) {
        self.0.push('\n');
        self.0.push_str(part);
    }

    /// Sets a constant that is a number or a truth value.
    fn set(&mut self, declaration: &str, value: impl Literal) -> Result<()> {
        self.replace(declaration, &value.literal())
    }

    /// Replaces the value in the line `{declaration} = ...;`.
    fn replace(&mut self, declaration: &str, value: &str) -> Result<()> {
        let start = format!("\n{declaration} = ");
        let found = self.0.find(&start).map(|at| at + start.len());
        let end = found.and_then(|at| self.0[at..].find(';').map(|len| at + len));
        let (Some(from), Some(to)) = (found, end) else {
            return Err(Error::Invalid(format!("shader does not declare `{declaration}`")));
        };
        self.0.replace_range(from..to, value);
        Ok(())
    }

    fn finish(self, unrolled: bool) -> Result<String> {
        if unrolled { unroll(&self.0, &self.0) } else { Ok(self.0) }
    }
}

trait Literal {
    fn literal(&self) -> String;
}

impl Literal for usize {
    fn literal(&self) -> String {
        format!("{self}u")
    }
}

impl Literal for bool {
    fn literal(&self) -> String {
        self.to_string()
    }
}

/// Repeats the body of every loop that follows a line `// unroll`, with the counter as a constant. The loop has the
/// form `for (var i = 0u; i < BOUND; i++) {`, where `BOUND` is a number or the name of a constant that `whole` declares
/// as one.
fn unroll(text: &str, whole: &str) -> Result<String> {
    const MARK: &str = "// unroll\n";
    let Some(mark) = text.find(MARK) else { return Ok(text.to_owned()) };
    let malformed = || {
        let near: String = text[mark..].chars().take(120).collect();
        Error::Invalid(format!("shader has a loop that cannot be unrolled: {near}"))
    };
    let after = &text[mark + MARK.len()..];
    let header = after.trim_start();
    let (name, rest) = header.strip_prefix("for (var ").and_then(|h| h.split_once(" = 0u; ")).ok_or_else(malformed)?;
    let rest = rest.strip_prefix(name).and_then(|r| r.strip_prefix(" < ")).ok_or_else(malformed)?;
    let (bound, rest) = rest.split_once("; ").ok_or_else(malformed)?;
    let rest = rest.strip_prefix(name).and_then(|r| r.strip_prefix("++) {")).ok_or_else(malformed)?;
    let number = |text: &str| text.strip_suffix('u').and_then(|n| n.parse::<usize>().ok());
    let named = || {
        let (_, value) = whole.split_once(&format!("\nconst {bound}: u32 = "))?;
        number(value.split_once(';')?.0)
    };
    let count = number(bound).or_else(named).ok_or_else(malformed)?;
    let mut depth = 1;
    let end = rest.char_indices().find(|&(_, c)| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0
    });
    let (end, _) = end.ok_or_else(malformed)?;
    let body = unroll(&rest[..end], whole)?;
    let mut out = text[..mark].to_owned();
    for i in 0..count {
        out.push_str(&format!("{{\nconst {name} = {i}u;{body}}}\n"));
    }
    out.push_str(&unroll(&rest[end + 1..], whole)?);
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn marked_loops_are_unrolled_from_the_inside() {
        let text = "\nconst N: u32 = 2u;\n// unroll\nfor (var i = 0u; i < N; i++) {\n// unroll\nfor (var j = 0u; j < 2u; j++) {\nf(i, j);\n}\n}\ng();";
        let out = unroll(text, text).unwrap();
        assert_eq!(out.matches("f(i, j);").count(), 4);
        assert!(!out.contains("for (") && out.ends_with("g();"), "{out}");
        assert_eq!((out.matches("const i = 1u;").count(), out.matches("const j = 1u;").count()), (1, 2));
    }

    #[test]
    fn loops_of_unknown_length_are_refused() {
        let text = "// unroll\nfor (var i = 0u; i < M; i++) {}";
        assert!(unroll(text, text).unwrap_err().to_string().contains("unrolled"));
    }
}
