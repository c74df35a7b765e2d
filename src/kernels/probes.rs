//! The programs that are no operation: what measures ceilings, and the check of cooperative matrices.
//!
//! Invariant: nothing that a user computes runs here.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::coop::CHECK_THREADS;
use super::features::{types_supported, workgroup_supported};
use super::gemm::{GEMM, GEMM_BINDINGS};
use super::wgsl::{Text, overrides};
use super::{Binding, Caps, CoopTile, CoopUnit, Params, ParamsLayout, Primitives, Program, Shader, fields};
use crate::error::Result;
use crate::matrix::DType;
use crate::problem::{Epilogue, Form};

/// Independent sums of a thread or subgroup, and multiply-adds of each, in the probes of arithmetic.
pub(crate) const PROBE_CHAINS: usize = 8;
pub(crate) const PROBE_ROUNDS: usize = 512;

/// Every one of them.
pub(crate) fn probes() -> impl Iterator<Item = Program> {
    let arithmetic = super::features::FLOATS.map(|dtype| Program::new(ProbeFma(dtype)));
    let units = CoopUnit::ALL.map(|unit| Program::new(ProbeCoop(unit)));
    let checks = [8, 16].map(|edge| Program::new(CoopCheck { edge }));
    arithmetic.into_iter().chain([Program::new(ProbeCopy)]).chain(units).chain(checks)
}

/// Multiply-adds in registers (shaders/probe_fma.wgsl).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbeFma(pub(crate) DType);

impl Shader for ProbeFma {
    fn text(&self, _: Primitives) -> Result<Text> {
        let mut text = Text::new(&[GEMM, include_str!("../../shaders/probe_fma.wgsl")], self.0, DType::F32)?;
        text.set("const CHAINS: u32", PROBE_CHAINS)?;
        text.set("const ROUNDS: u32", PROBE_ROUNDS)?;
        Ok(text)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        overrides(Form::Linear, Epilogue::NONE)
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &GEMM_BINDINGS }
    }

    fn params(&self) -> ParamsLayout {
        Params::LAYOUT
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        types_supported(caps, &[self.0])?;
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for ProbeFma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "probe_fma-{}", self.0)
    }
}

/// Cooperative matrices (shaders/probe_coop.wgsl).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbeCoop(pub(crate) CoopUnit);

impl Shader for ProbeCoop {
    fn text(&self, primitives: Primitives) -> Result<Text> {
        let mut text = Text::as_it_stands(&[include_str!("../../shaders/probe_coop.wgsl")]);
        primitives.precede(&mut text);
        self.0.specialise(primitives, &mut text)?;
        text.set("const CHAINS: u32", PROBE_CHAINS)?;
        text.set("const ROUNDS: u32", PROBE_ROUNDS)?;
        Ok(text)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("FACTOR", 0.007_812_5)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::write(0, "y")] }
    }

    fn threads(&self) -> u32 {
        128
    }

    fn workgroup_bytes(&self) -> u32 {
        // Both tiles, and a block of sums per subgroup.
        let CoopUnit { edge, lanes } = self.0;
        edge * edge * (2 * 2 + 4 * self.threads() / lanes)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        // The matrices' own speed is what is asked for.
        if caps.emulates_cooperative { Err(EMULATED.into()) } else { caps.has(self.0) }
    }
}

impl fmt::Display for ProbeCoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "probe_coop{}", self.0)
    }
}

/// What a device lacks for the probes that ask for matrices of its own.
const EMULATED: &str = "cooperative matrices that are not emulated";

/// Whether cooperative matrices are right, and how wide their subgroups are (shaders/coop_check.wgsl).
#[derive(Clone, Copy, Debug)]
pub(crate) struct CoopCheck {
    /// Rows and columns of a block.
    pub(crate) edge: u32,
}

impl Shader for CoopCheck {
    fn text(&self, primitives: Primitives) -> Result<Text> {
        let mut text = Text::as_it_stands(&[include_str!("../../shaders/coop_check.wgsl")]);
        primitives.precede(&mut text);
        // How wide a subgroup is does not concern the instructions.
        CoopUnit { edge: self.edge, lanes: 32 }.specialise(primitives, &mut text)?;
        text.set("const THREADS: u32", CHECK_THREADS)?;
        text.set("const K_STEPS: u32", CoopTile::K as usize / self.edge as usize)?;
        Ok(text)
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("ONE", 1.0)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::write(0, "y")] }
    }

    fn threads(&self) -> u32 {
        CHECK_THREADS as u32
    }

    fn workgroup_bytes(&self) -> u32 {
        // Four blocks of rows in both tiles, and a block of sums for each subgroup of 8, the narrowest.
        2 * 80 * 4 * self.edge + 4 * self.edge * (self.edge + 4) * self.threads() / 8
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        if caps.emulates_cooperative {
            return Err(EMULATED.into());
        }
        let shape = CoopUnit { edge: self.edge, lanes: 32 }.shape();
        match (caps.cooperative.contains(&shape), caps.subgroups) {
            (false, _) => Err(format!("cooperative matrices of {shape}")),
            (true, None) => Err("subgroups in shaders".into()),
            (true, Some(_)) if !caps.f16 => Err("f16 in shaders".into()),
            (true, Some(_)) => Ok(()),
        }
    }
}

impl fmt::Display for CoopCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "coop_check-{}", self.edge)
    }
}

/// A copy (shaders/probe_copy.wgsl).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbeCopy;

/// Mirror of `Params` in shaders/probe_copy.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct CopyParams {
    /// Vectors of 16 bytes.
    pub(crate) n: u32,
}

impl Shader for ProbeCopy {
    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/probe_copy.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("COPIES", 4.0)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(CopyParams: n)
    }
}

impl fmt::Display for ProbeCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("probe_copy")
    }
}
