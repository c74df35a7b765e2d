//! The GEMM kernels: operation x schedule x form x element types x epilogue, the WGSL of each, and what runs before and
//! after them.
//!
//! Invariant: a [`Kernel`] that exists has a shader; whether a given device can run it is [`Kernel::supported_by`].

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::features::{FLOATS, types_supported, workgroup_supported};
use super::wgsl::{Text, overrides};
use super::{Binding, Caps, CoopTile, CoopUnit, ParamsLayout, Primitives, Program, Schedule, Shader, fields};
use crate::error::{Error, Result};
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::problem::{Epilogue, Form, Op, Problem};

/// Shared by all of them and by the probe of multiply-adds.
pub(super) const GEMM: &str =
    concat!(include_str!("../../shaders/shared/gemm.wgsl"), "\n", include_str!("../../shaders/shared/activation.wgsl"));

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

impl Params {
    pub(super) const LAYOUT: ParamsLayout = fields!(Params: m n k k_split features feature0 tiles_m tiles_n k_given);
}

/// What shaders/shared/gemm.wgsl declares.
pub(super) const GEMM_BINDINGS: [Binding; 4] =
    [Binding::PARAMS, Binding::read(4, "bias"), Binding::read(5, "residual"), Binding::write(6, "y")];

/// One GPU kernel: everything that distinguishes two compiled pipelines.
///
/// Its name (`Display`) is made of its parts, such as `gemm_sparse24-f16f32-v32-128x128x16-bias_gelu`: operation,
/// storage and accumulation type, vector length, schedule and tile, epilogue; then `gemm` for the plain form, and
/// `out_f32` or `out_f16` where the output has another type than the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    op: Op,
    schedule: Schedule,
    form: Form,
    storage: DType,
    output: DType,
    epilogue: Epilogue,
}

impl Kernel {
    /// The kernel that solves a problem in one of its operation's schedules. An error if there is no shader for the
    /// element types or the schedule.
    pub fn new(problem: &Problem, schedule: Schedule) -> Result<Self> {
        for (what, got) in [("weights and x", problem.storage), ("y", problem.output)] {
            if got == DType::Bf16 {
                return Err(Error::dtype(what, got, DType::F32));
            }
        }
        if !Schedule::of(problem.op, problem.storage).contains(&schedule) {
            return Err(Error::invalid(format!("{schedule} is no schedule of {} {}", problem.storage, problem.op)));
        }
        let Problem { op, form, storage, output, epilogue, .. } = *problem;
        Ok(Self { op, schedule, form, storage, output, epilogue })
    }

    /// Every kernel there is: operation x vector length x schedule x form x storage x output x epilogue.
    pub fn all() -> impl Iterator<Item = Self> {
        let layouts = || [Form::Linear, Form::Gemm].into_iter().flat_map(|form| FLOATS.map(|output| (form, output)));
        let typed = Op::all().flat_map(|op| FLOATS.map(|storage| (op, storage)));
        let schedules = typed.flat_map(|(op, storage)| {
            Schedule::of(op, storage).into_iter().map(move |schedule| (op, storage, schedule))
        });
        schedules.flat_map(move |(op, storage, schedule)| {
            layouts().flat_map(move |(form, output)| {
                Epilogue::all().map(move |epilogue| Self { op, schedule, form, storage, output, epilogue })
            })
        })
    }

    /// Whether this kernel stands for all that share its shader text: [`Form::Linear`], no epilogue. The others differ
    /// only in pipeline overrides.
    pub fn is_representative(&self) -> bool {
        self.form == Form::Linear && self.epilogue == Epilogue::NONE
    }

    /// How its weights are given.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Its tiling and method ([`Schedule`]).
    pub fn schedule(&self) -> Schedule {
        self.schedule
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
        match self.schedule {
            Schedule::Tile(tile) | Schedule::Expand(tile) => {
                // Two halves of both tiles, and a word of codes per feature where activations are gathered.
                let gathers = self.gathers();
                let (w_rows, x_pad, codes) = if gathers { (8, 8, tile.m) } else { (16, 0, 0) };
                2 * 4 * (w_rows * tile.m + 16 * (tile.n + x_pad) + codes)
            }
            Schedule::Gemv { .. } => 32 << 10,
            Schedule::Coop(tile) => {
                // Both tiles, `buffers` times: rows of `depth` f16 plus 16 bytes of padding against bank conflicts; and
                // per subgroup an `edge` x (`edge` + 4) f32 staging block (formula in shaders/shared/coop.wgsl).
                let CoopUnit { edge, lanes } = tile.unit;
                let depth = CoopTile::K / if self.gathers() { 2 } else { 1 };
                let rows = tile.m + tile.patterns(self.op) * tile.n;
                16 * (depth / 8 + 1) * tile.buffers * rows + 4 * edge * (edge + 4) * tile.threads() / lanes
            }
        }
    }

    /// Whether a tile gathers activations by 2:4 codes.
    fn gathers(&self) -> bool {
        match (self.op, self.schedule) {
            (Op::Sparse24(_), Schedule::Tile(_)) => true,
            (Op::Sparse24(v), Schedule::Coop(_)) => v.get() >= 16,
            _ => false,
        }
    }

    /// Whether it fills pruned weights in as zeros and multiplies by them.
    pub(crate) fn expands(&self) -> bool {
        matches!(self.op, Op::Sparse24(_))
            && matches!(self.schedule, Schedule::Expand(_) | Schedule::Coop(_))
            && !self.gathers()
    }

    /// Whether it skips the multiply-adds of pruned weights.
    pub(crate) fn skips(&self) -> bool {
        matches!(self.op, Op::Sparse24(_)) && !self.expands()
    }

    /// Bytes of weights and activations (codes not counted) that a workgroup reads through the L2 cache, per
    /// multiply-add of the dense product.
    pub(crate) fn cache_bytes(&self) -> f64 {
        let kept = if matches!(self.op, Op::Sparse24(_)) { 0.5 } else { 1.0 };
        let (m, n) = self.schedule.tile();
        (kept * f64::from(m) + f64::from(n)) * self.storage.bytes() as f64 / f64::from(m * n)
    }

    /// Its name in the table of costs, in which all forms, outputs and epilogues have one line.
    pub(crate) fn cost_name(&self) -> String {
        let base = Self { form: Form::Linear, output: self.storage, epilogue: Epilogue::NONE, ..*self }.to_string();
        base.trim_start_matches("gemm_").trim_end_matches("-none").to_owned()
    }

    /// Copies of its activations that a kernel of cooperative matrices makes, by the patterns of a tile.
    pub(crate) fn patterns(&self) -> u32 {
        match self.schedule {
            Schedule::Coop(tile) if self.gathers() => tile.patterns(self.op),
            _ => 1,
        }
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        types_supported(caps, &[self.storage, self.output])?;
        if let Schedule::Coop(tile) = self.schedule {
            caps.has(tile.unit)?;
        }
        workgroup_supported(caps, self.schedule.threads(), self.workgroup_bytes())
    }

    /// The specialised WGSL, as a GPU gets it. An error only if a shader lacks a name that it is to be specialised by,
    /// which the tests rule out.
    pub fn source(&self) -> Result<String> {
        self.text(Primitives::NATIVE)?.finish(true)
    }

    fn text(&self, primitives: Primitives) -> Result<Text> {
        let mut text = Text::new(&[GEMM], self.storage, self.output)?;
        if self.op != Op::Dense || matches!(self.schedule, Schedule::Coop(_)) {
            text.push(include_str!("../../shaders/shared/words.wgsl"));
            text.set("const VECTOR: u32", self.op.vector().map_or(1, VectorLen::get))?;
        }
        // Elements of a 16-byte unit.
        let unit = 16 / self.storage.bytes();
        match self.schedule {
            Schedule::Tile(tile) | Schedule::Expand(tile) => {
                text.push(include_str!("../../shaders/shared/tile.wgsl"));
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
                    text.push(include_str!("../../shaders/shared/tile_dense.wgsl"));
                }
                match self.op {
                    Op::Dense => text.push(include_str!("../../shaders/gemm_dense.wgsl")),
                    Op::Masked | Op::Masked24 => {
                        text.push(include_str!("../../shaders/gemm_masked.wgsl"));
                        text.set("const CODES: bool", self.op == Op::Masked24)?;
                    }
                    Op::Sparse24(v) if self.gathers() => {
                        text.push(include_str!("../../shaders/gemm_sparse24.wgsl"));
                        let share = v.get().min(4 * tile.feature_quads as usize);
                        text.set("const SHARE: u32", share)?;
                        text.set("const PATTERNS: u32", 4 * tile.feature_quads as usize / share)?;
                    }
                    Op::Sparse24(_) => text.push(include_str!("../../shaders/gemm_sparse24_expand.wgsl")),
                }
            }
            Schedule::Gemv { tokens, slices } => {
                text.push(match tokens {
                    1 => include_str!("../../shaders/shared/tokens1.wgsl"),
                    _ => include_str!("../../shaders/shared/tokens4.wgsl"),
                });
                text.push(include_str!("../../shaders/shared/gemv.wgsl"));
                text.push(match self.op {
                    Op::Dense => include_str!("../../shaders/gemv_dense.wgsl"),
                    Op::Masked | Op::Masked24 => include_str!("../../shaders/gemv_masked.wgsl"),
                    Op::Sparse24(_) => include_str!("../../shaders/gemv_sparse24.wgsl"),
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
            Schedule::Coop(tile) => self.coop_text(tile, primitives, &mut text)?,
        }
        Ok(text)
    }

    fn coop_text(&self, tile: CoopTile, primitives: Primitives, text: &mut Text) -> Result<()> {
        primitives.precede(text);
        tile.unit.specialise(primitives, text)?;
        text.push(include_str!("../../shaders/shared/coop.wgsl"));
        if !self.gathers() {
            text.push(include_str!("../../shaders/shared/coop_dense.wgsl"));
        }
        text.push(match self.op {
            Op::Dense => include_str!("../../shaders/gemm_dense_coop.wgsl"),
            Op::Masked | Op::Masked24 => include_str!("../../shaders/gemm_masked_coop.wgsl"),
            Op::Sparse24(_) if self.gathers() => include_str!("../../shaders/gemm_sparse24_coop.wgsl"),
            Op::Sparse24(_) => include_str!("../../shaders/gemm_sparse24_coop_expand.wgsl"),
        });
        if self.op == Op::Masked24 {
            text.set("const CODES: bool", true)?;
        }
        let depth = CoopTile::K / if self.gathers() { 2 } else { 1 };
        let unit_k = if matches!(self.op, Op::Sparse24(_)) { 16 } else { 8 };
        let patterns = if self.gathers() { tile.patterns(self.op) } else { 1 };
        // Number of different patterns among a subgroup's features.
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

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gemm_{}-{}f32", self.op.kernel_name(), self.storage)?;
        if let Some(v) = self.op.vector() {
            write!(f, "-v{v}")?;
        }
        write!(f, "-{}-{}", self.schedule, self.epilogue)?;
        if self.form == Form::Gemm {
            f.write_str("-gemm")?;
        }
        if self.output != self.storage {
            write!(f, "-out_{}", self.output)?;
        }
        Ok(())
    }
}

impl Shader for Kernel {
    fn module(&self) -> String {
        Self { form: Form::Linear, epilogue: Epilogue::NONE, ..*self }.to_string()
    }

    fn is_representative(&self) -> bool {
        Self::is_representative(self)
    }

    fn text(&self, primitives: Primitives) -> Result<Text> {
        Self::text(self, primitives)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        Self::overrides(self)
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            let [params, bias, residual, y] = GEMM_BINDINGS;
            &[params, Binding::read(1, "w"), Binding::read(2, "bits"), Binding::read(3, "x"), bias, residual, y]
        }
    }

    fn params(&self) -> ParamsLayout {
        Params::LAYOUT
    }

    fn threads(&self) -> u32 {
        self.schedule.threads()
    }

    fn workgroup_bytes(&self) -> u32 {
        Self::workgroup_bytes(self)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        Self::supported_by(self, caps)
    }
}

/// Brings X to the shape that kernels read (shaders/pack_x.wgsl).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pack {
    /// `Linear`: the input is X, n x k; `Gemm`: it is B, k x n.
    pub(crate) form: Form,
    /// Its element type.
    pub(crate) storage: DType,
}

impl Shader for Pack {
    fn module(&self) -> String {
        Self { form: Form::Linear, ..*self }.to_string()
    }

    fn is_representative(&self) -> bool {
        self.form == Form::Linear
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Text::new(&[GEMM, include_str!("../../shaders/pack_x.wgsl")], self.storage, self.storage)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        overrides(self.form, Epilogue::NONE)
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            let [params, bias, residual, y] = GEMM_BINDINGS;
            &[params, Binding::read(3, "x"), bias, residual, y]
        }
    }

    fn params(&self) -> ParamsLayout {
        Params::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        // 32 rows of 32 elements and one more.
        32 * 33 * self.storage.bytes() as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        types_supported(caps, &[self.storage])?;
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack_x-{}-{}", self.storage, self.form.name())
    }
}

/// Adds up the splits of k and runs the epilogue (shaders/reduce.wgsl).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduce {
    /// Layout of the output.
    pub(crate) form: Form,
    /// Its element type.
    pub(crate) output: DType,
    /// What is done to it.
    pub(crate) epilogue: Epilogue,
}

impl Shader for Reduce {
    fn module(&self) -> String {
        Self { form: Form::Linear, epilogue: Epilogue::NONE, ..*self }.to_string()
    }

    fn is_representative(&self) -> bool {
        self.form == Form::Linear && self.epilogue == Epilogue::NONE
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Text::new(&[GEMM, include_str!("../../shaders/reduce.wgsl")], DType::F32, self.output)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        overrides(self.form, self.epilogue)
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            let [params, bias, residual, y] = GEMM_BINDINGS;
            &[params, Binding::read(1, "partial"), bias, residual, y]
        }
    }

    fn params(&self) -> ParamsLayout {
        Params::LAYOUT
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        types_supported(caps, &[self.output])?;
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for Reduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reduce-{}-{}-{}", self.output, self.epilogue, self.form.name())
    }
}

/// What runs before and after the kernels.
pub(crate) fn helpers() -> impl Iterator<Item = Program> {
    let forms = || [Form::Linear, Form::Gemm].into_iter();
    let pack = forms().flat_map(|form| FLOATS.map(|storage| Program::new(Pack { form, storage })));
    let reduce = forms().flat_map(|form| {
        let typed = FLOATS.into_iter().flat_map(|output| Epilogue::all().map(move |epilogue| (output, epilogue)));
        typed.map(move |(output, epilogue)| Program::new(Reduce { form, output, epilogue }))
    });
    pack.chain(reduce)
}
