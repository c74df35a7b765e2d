//! The registry: everything that is compiled for a GPU.
//!
//! Invariant: what a device compiles is a [`Program`], and the tests iterate all of them.

use std::fmt;

use super::coop::CHECK_THREADS;
use super::gemm::GEMM;
use super::wgsl::{Text, overrides};
use super::{Caps, CoopTile, CoopUnit, Kernel, Primitives, glue, sparsify};
use crate::error::Result;
use crate::matrix::DType;
use crate::problem::{Epilogue, Form};

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
            Self::Gemm(kernel) => Self::Gemm(kernel.module()),
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
            Self::Pack { storage, .. } => {
                Text::new(&[GEMM, include_str!("../../shaders/pack_x.wgsl")], storage, storage)
            }
            Self::Reduce { output, .. } => {
                Text::new(&[GEMM, include_str!("../../shaders/reduce.wgsl")], DType::F32, output)
            }
            Self::ProbeFma(dtype) => {
                let mut text = Text::new(&[GEMM, include_str!("../../shaders/probe_fma.wgsl")], dtype, DType::F32)?;
                text.set("const CHAINS: u32", PROBE_CHAINS)?;
                text.set("const ROUNDS: u32", PROBE_ROUNDS)?;
                Ok(text)
            }
            Self::ProbeCoop(unit) => {
                let mut text = Text(include_str!("../../shaders/probe_coop.wgsl").to_owned());
                primitives.precede(&mut text);
                unit.specialise(primitives, &mut text)?;
                text.set("const CHAINS: u32", PROBE_CHAINS)?;
                text.set("const ROUNDS: u32", PROBE_ROUNDS)?;
                Ok(text)
            }
            Self::CoopCheck { edge } => {
                let mut text = Text(include_str!("../../shaders/coop_check.wgsl").to_owned());
                primitives.precede(&mut text);
                // How wide a subgroup is does not concern the instructions.
                CoopUnit { edge, lanes: 32 }.specialise(primitives, &mut text)?;
                text.set("const THREADS: u32", CHECK_THREADS)?;
                text.set("const K_STEPS: u32", CoopTile::K as usize / edge as usize)?;
                Ok(text)
            }
            Self::ProbeCopy => Ok(Text(include_str!("../../shaders/probe_copy.wgsl").to_owned())),
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
