//! The registry of GPU kernels: which exist, what they are called, and their WGSL.
//!
//! A [`Kernel`] is a product of small types: operation, form, element types, [`Tile`] and epilogue. [`Kernel::all`] is the
//! one list that the planner, the tests and the benchmarks iterate. Nothing here needs a device.
//! Invariant: a `Kernel` that exists has a shader; whether a given device can run it is [`Kernel::supported_by`].
//!
//! # Specialisation
//! Shaders are valid WGSL whose named `const`s and `alias`es (tile sizes, element types, vector length) the host
//! replaces by text, because WGSL's `override` cannot size the function-local arrays that hold register tiles. What only
//! selects a branch (form and epilogue) is an `override`, set when the pipeline is made. The overrides have a second use:
//! wgpu's Vulkan backend compiles modules without any override before it learns that loop bounding and workgroup zeroing are to
//! be left out, so [trusted](ShaderChecks::Trusted) modules need at least one.
//!
//! Tried and rejected: unrolling the register tiles in the text, with a scalar variable for each accumulator. On llvmpipe it
//! ran as fast as loops over constant bounds, within that driver's noise. To be tried again on a GPU, where a loop that is not
//! unrolled would spill.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::problem::{Activation, Epilogue, Form, Op, Problem};

/// Mirror of `Params` in shaders/shared/gemm.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Params {
    /// Output features.
    pub m: u32,
    /// Tokens.
    pub n: u32,
    /// Input features before compression.
    pub k: u32,
    /// Words per row of metadata or mask; 0 for dense.
    pub meta_cols: u32,
}

impl Params {
    /// The parameters of a problem, if its sizes fit the kernels' 32-bit indices.
    pub fn new(problem: &Problem) -> Result<Self> {
        let Problem { m, n, k, .. } = *problem;
        // Kernels index every operand with u32, and round m, n and k up to a tile before they compare.
        let limit = (u32::MAX - 1024) as usize;
        let columns = match problem.op {
            Op::Dense | Op::Masked => k,
            Op::Sparse24(_) => k.div_ceil(4).saturating_mul(4),
        };
        for (what, a, b) in [("weights", m, columns), ("x", n, k), ("y", n, m)] {
            if a.checked_mul(b).is_none_or(|len| len > limit) || a > limit || b > limit {
                return Err(Error::Overflow { what: format!("{what} index"), detail: format!("{a} x {b} elements") });
            }
        }
        let meta_cols = match problem.op {
            Op::Dense => 0,
            Op::Sparse24(_) | Op::Masked => k.div_ceil(32),
        };
        Ok(Self { m: m as u32, n: n as u32, k: k as u32, meta_cols: meta_cols as u32 })
    }
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
    /// GPU timestamps at the boundaries of a compute pass.
    pub timestamps: bool,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations per workgroup.
    pub workgroup_threads: u32,
    /// Workgroups per dimension of a dispatch.
    pub grid: u32,
    /// Invocations that keep the device busy; fewer leave part of it idle. An estimate from its kind, since no API tells.
    pub busy_threads: u32,
    /// Bytes of one storage-buffer binding.
    pub binding_bytes: u64,
    /// Bytes of one buffer.
    pub buffer_bytes: u64,
}

/// One cooperative-matrix multiply that the hardware does: C (`m x n`) += A (`m x k`) · B (`k x n`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoopShape {
    /// Rows of A and C.
    pub m: u32,
    /// Columns of B and C.
    pub n: u32,
    /// Columns of A.
    pub k: u32,
    /// Element type of A and B.
    pub ab: &'static str,
    /// Element type of C.
    pub c: &'static str,
}

impl fmt::Display for CoopShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{} {}->{}", self.m, self.n, self.k, self.ab, self.c)
    }
}

/// How a workgroup divides its work: a block of `m x n` outputs, `k` at a time, `thread_m x thread_n` outputs per thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    m: u32,
    n: u32,
    k: u32,
    thread_m: u32,
    thread_n: u32,
}

impl Tile {
    const fn new(m: u32, n: u32, k: u32, thread_m: u32, thread_n: u32) -> Self {
        assert!(m.is_multiple_of(thread_m) && n.is_multiple_of(thread_n));
        Self { m, n, k, thread_m, thread_n }
    }

    /// The tiles registered for an operation, largest first.
    ///
    /// 2:4 always takes 32 of k at a time, a word of codes; dense takes less with the largest block, so that both of its
    /// tiles fit the 32 KiB of workgroup memory that most hardware has.
    pub const fn of(op: Op) -> &'static [Self] {
        const SMALL: [Tile; 3] = [Tile::new(64, 64, 32, 4, 4), Tile::new(32, 32, 32, 4, 4), Tile::new(64, 8, 32, 4, 2)];
        const DENSE: &[Tile] = &[Tile::new(128, 128, 16, 8, 8), SMALL[0], SMALL[1], SMALL[2]];
        const SPARSE24: &[Tile] = &[Tile::new(128, 128, 32, 8, 8), SMALL[0], SMALL[1], SMALL[2]];
        match op {
            Op::Dense | Op::Masked => DENSE,
            Op::Sparse24(_) => SPARSE24,
        }
    }

    /// Output features per workgroup.
    pub const fn m(self) -> u32 {
        self.m
    }

    /// Tokens per workgroup.
    pub const fn n(self) -> u32 {
        self.n
    }

    /// Invocations per workgroup.
    pub const fn threads(self) -> u32 {
        (self.m / self.thread_m) * (self.n / self.thread_n)
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.m, self.n, self.k)
    }
}

/// One GPU kernel: everything that distinguishes two compiled pipelines.
///
/// Its name (`Display`) is made of its parts, such as `gemm_sparse24-f16f32-v32-128x128x32-bias_gelu`: operation, storage and
/// accumulation type, vector length, tile, epilogue; then `gemm` for the plain form, and `out_f32` or `out_f16` where the
/// output has another type than the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    op: Op,
    form: Form,
    storage: DType,
    output: DType,
    tile: Tile,
    epilogue: Epilogue,
}

impl Kernel {
    /// The kernel of a problem with one of its operation's tiles. An error if there is no shader for the element types
    /// or the tile.
    pub fn new(problem: &Problem, tile: Tile) -> Result<Self> {
        for (what, got) in [("weights and x", problem.storage), ("y", problem.output)] {
            if got == DType::Bf16 {
                return Err(Error::DType { what: what.into(), got, expected: DType::F32 });
            }
        }
        if !Tile::of(problem.op).contains(&tile) {
            return Err(Error::Invalid(format!("tile {tile} is not registered for {}", problem.op.name())));
        }
        let Problem { op, form, storage, output, epilogue, .. } = *problem;
        Ok(Self { op, form, storage, output, tile, epilogue })
    }

    /// Every kernel there is: operation x vector length x tile x form x storage x output x epilogue.
    pub fn all() -> impl Iterator<Item = Self> {
        const FLOATS: [DType; 2] = [DType::F32, DType::F16];
        let ops = [Op::Dense, Op::Masked].into_iter().chain(VectorLen::ALL.map(Op::Sparse24));
        ops.flat_map(|op| {
            Tile::of(op).iter().flat_map(move |&tile| {
                [Form::Linear, Form::Gemm].into_iter().flat_map(move |form| {
                    FLOATS.into_iter().flat_map(move |storage| {
                        FLOATS.into_iter().flat_map(move |output| {
                            Epilogue::all().map(move |epilogue| Self { op, form, storage, output, tile, epilogue })
                        })
                    })
                })
            })
        })
    }

    /// How its weights are given.
    pub fn op(&self) -> Op {
        self.op
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

    /// How its workgroups divide the work.
    pub fn tile(&self) -> Tile {
        self.tile
    }

    /// What it does to an output before it stores it.
    pub fn epilogue(&self) -> Epilogue {
        self.epilogue
    }

    /// The part of the kernel that decides its shader text. Kernels that differ in form and epilogue alone share a module.
    pub(crate) fn module(&self) -> Self {
        Self { form: Form::Linear, epilogue: Epilogue::NONE, ..*self }
    }

    /// Bytes of workgroup memory that a workgroup takes.
    pub fn workgroup_bytes(&self) -> u32 {
        let Tile { m, n, k, .. } = self.tile;
        let weights = match self.op {
            Op::Dense | Op::Masked => k * (m + 1),
            Op::Sparse24(_) => k / 2 * (m + 1),
        };
        4 * (weights + k * (n + 1))
    }

    /// Words of workgroup memory that a thread reads per multiply-add that it does: what bounds a tile's speed once it is
    /// large enough to hide memory. In a dense step of k, a weight serves all of the thread's tokens and an activation all
    /// of its features; in a 2:4 group, a gathered activation serves only the features that share its pattern.
    pub fn reads_per_fma(&self) -> f64 {
        let features = match self.op {
            Op::Dense | Op::Masked => self.tile.thread_m,
            Op::Sparse24(v) => self.tile.thread_m.min(v.get() as u32),
        };
        1.0 / f64::from(features) + 1.0 / f64::from(self.tile.thread_n)
    }

    /// Workgroups along m and n that cover the output.
    pub fn grid(&self, m: usize, n: usize) -> (usize, usize) {
        (m.div_ceil(self.tile.m as usize), n.div_ceil(self.tile.n as usize))
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        if !caps.f16 && (self.storage == DType::F16 || self.output == DType::F16) {
            return Err("f16 in shaders".into());
        }
        if self.tile.threads() > caps.workgroup_threads {
            return Err(format!(
                "workgroups of {} invocations (it allows {})",
                self.tile.threads(),
                caps.workgroup_threads
            ));
        }
        if self.workgroup_bytes() > caps.workgroup_memory {
            return Err(format!(
                "{} bytes of workgroup memory (it has {})",
                self.workgroup_bytes(),
                caps.workgroup_memory
            ));
        }
        Ok(())
    }

    /// The specialised WGSL. An error only if a shader lacks a name that it is to be specialised by, which the tests
    /// rule out.
    pub fn source(&self) -> Result<String> {
        const GEMM: &str = include_str!("../shaders/shared/gemm.wgsl");
        const DENSE_TILE: &str = include_str!("../shaders/shared/dense_tile.wgsl");
        let parts: &[&str] = match self.op {
            Op::Dense => &[GEMM, DENSE_TILE, include_str!("../shaders/gemm_dense.wgsl")],
            Op::Masked => &[GEMM, DENSE_TILE, include_str!("../shaders/gemm_masked.wgsl")],
            Op::Sparse24(_) => &[GEMM, include_str!("../shaders/gemm_sparse24.wgsl")],
        };
        let mut text = parts.join("\n");
        let Tile { m, n, k, thread_m, thread_n } = self.tile;
        let mut set = |name: &str, value: String| specialise(&mut text, name, &value);
        for (name, size) in
            [("TILE_M", m), ("TILE_N", n), ("TILE_K", k), ("THREAD_M", thread_m), ("THREAD_N", thread_n)]
        {
            set(&format!("const {name}: u32"), format!("{size}u"))?;
        }
        set("alias Storage", self.storage.name().into())?;
        set("alias Output", self.output.name().into())?;
        if let Op::Sparse24(v) = self.op {
            set("const VECTOR: u32", format!("{v}u"))?;
        }
        if self.storage == DType::F16 || self.output == DType::F16 {
            text.insert_str(0, "enable f16;\n");
        }
        Ok(text)
    }

    /// Values of the shader's `override`s.
    pub fn overrides(&self) -> [(&'static str, f64); 4] {
        let activation = match self.epilogue.activation {
            Activation::None => 0.0,
            Activation::Relu => 1.0,
            Activation::Gelu => 2.0,
            Activation::GeluTanh => 3.0,
            Activation::Silu => 4.0,
        };
        [
            ("LINEAR", f64::from(u8::from(self.form == Form::Linear))),
            ("HAS_BIAS", f64::from(u8::from(self.epilogue.bias))),
            ("ACTIVATION", activation),
            ("HAS_RESIDUAL", f64::from(u8::from(self.epilogue.residual))),
        ]
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gemm_{}-{}f32", self.op.name(), self.storage)?;
        if let Some(v) = self.op.vector() {
            write!(f, "-v{v}")?;
        }
        write!(f, "-{}-{}", self.tile, self.epilogue)?;
        if self.form == Form::Gemm {
            f.write_str("-gemm")?;
        }
        if self.output != self.storage {
            write!(f, "-out_{}", self.output)?;
        }
        Ok(())
    }
}

/// Replaces the value in the line `{declaration} = ...;`.
fn specialise(text: &mut String, declaration: &str, value: &str) -> Result<()> {
    let start = format!("\n{declaration} = ");
    let found = text.find(&start).map(|at| at + start.len());
    let end = found.and_then(|at| text[at..].find(';').map(|len| at + len));
    let (Some(from), Some(to)) = (found, end) else {
        return Err(Error::Invalid(format!("shader does not declare `{declaration}`")));
    };
    text.replace_range(from..to, value);
    Ok(())
}
