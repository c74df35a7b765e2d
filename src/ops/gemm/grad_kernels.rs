//! The GPU programs of a linear layer's gradients.
//!
//! Invariant: parameter structs are those of the shaders that their comments name.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use crate::error::Result;
use crate::kernels::{
    Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, add_override, add_suffix, fields,
    workgroup_supported,
};
use crate::layout::PANEL;
use crate::problem::Op;

/// Rows, tokens and columns of a tile.
pub(super) const TILE: usize = 64;

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    [
        Program::new(GradXKernel { op: Op::Dense, add: false }),
        Program::new(GradWKernel { op: Op::Dense, add: false }),
        Program::new(SumRowsKernel { add: false }),
        Program::new(RepackKernel),
    ]
    .into_iter()
}

/// Mirror of `Params` in shaders/gemm_grad_x.wgsl and shaders/gemm_grad_w.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct GradParams {
    pub(super) m: u32,
    pub(super) n: u32,
    pub(super) k: u32,
}

/// Rows that share a code; any number where there are no codes.
fn vector(op: Op) -> f64 {
    op.vector().map_or(1.0, |vector| vector.get() as f64)
}

/// What of an operation a name says.
fn form(op: Op) -> String {
    match op.vector() {
        Some(vector) => format!("{}-v{vector}", op.name()),
        None => op.name().to_owned(),
    }
}

/// dX = dY·W (shaders/gemm_grad_x.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GradXKernel {
    pub(super) op: Op,
    pub(super) add: bool,
}

impl Shader for GradXKernel {
    fn module(&self) -> String {
        Self { op: Op::Dense, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/gemm_grad_x.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let sparse = f64::from(u8::from(matches!(self.op, Op::Sparse24(_))));
        vec![("SPARSE", sparse), ("VECTOR", vector(self.op)), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "values"),
                Binding::read(2, "words"),
                Binding::read(3, "dy"),
                Binding::write(4, "dx"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(GradParams: m n k)
    }

    fn workgroup_bytes(&self) -> u32 {
        2 * 4 * 16 * TILE as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for GradXKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gemm_grad_x-{}{}", form(self.op), add_suffix(self.add))
    }
}

/// dW = dYᵀ·X of what is kept (shaders/gemm_grad_w.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GradWKernel {
    pub(super) op: Op,
    pub(super) add: bool,
}

impl Shader for GradWKernel {
    fn module(&self) -> String {
        Self { op: Op::Dense, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/gemm_grad_w.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let form = match self.op {
            Op::Dense => 0.0,
            Op::Masked | Op::Masked24 => 1.0,
            Op::Sparse24(_) => 2.0,
        };
        // The bits of a mask are those of each row.
        vec![("FORM", form), ("VECTOR", vector(self.op)), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "words"),
                Binding::read(2, "x"),
                Binding::read(3, "dy"),
                Binding::write(4, "dw"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(GradParams: m n k)
    }

    fn workgroup_bytes(&self) -> u32 {
        2 * 4 * 16 * TILE as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for GradWKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gemm_grad_w-{}{}", form(self.op), add_suffix(self.add))
    }
}

/// Mirror of `Params` in shaders/sum_rows.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct SumRowsParams {
    pub(super) rows: u32,
    pub(super) cols: u32,
}

/// The sum of the rows of a matrix (shaders/sum_rows.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SumRowsKernel {
    pub(super) add: bool,
}

impl Shader for SumRowsKernel {
    fn module(&self) -> String {
        Self { add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/sum_rows.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(SumRowsParams: rows cols)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for SumRowsKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sum_rows{}", add_suffix(self.add))
    }
}

/// Mirror of `Params` in shaders/repack.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RepackParams {
    pub(super) rows: u32,
    pub(super) row0: u32,
    pub(super) cols: u32,
    pub(super) units: u32,
}

/// Row-major weights into the order that products read (shaders/repack.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct RepackKernel;

impl Shader for RepackKernel {
    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/repack.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("PANEL", PANEL as f64)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "values"), Binding::write(2, "packed")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(RepackParams: rows row0 cols units)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for RepackKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("repack")
    }
}
