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
        Program::new(GradKernel { of: Factor::X, op: Op::Dense, add: false }),
        Program::new(GradKernel { of: Factor::W, op: Op::Dense, add: false }),
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

/// What a gradient of a product is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Factor {
    /// dX = dY·W (shaders/gemm_grad_x.wgsl).
    X,
    /// dW = dYᵀ·X of what is kept (shaders/gemm_grad_w.wgsl).
    W,
}

/// The gradient of one factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GradKernel {
    pub(super) of: Factor,
    pub(super) op: Op,
    pub(super) add: bool,
}

impl Shader for GradKernel {
    fn module(&self) -> String {
        Self { of: self.of, op: Op::Dense, add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[match self.of {
            Factor::X => include_str!("../../../shaders/gemm_grad_x.wgsl"),
            Factor::W => include_str!("../../../shaders/gemm_grad_w.wgsl"),
        }]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let form = match (self.of, self.op) {
            (Factor::X, Op::Sparse24(_)) => ("SPARSE", 1.0),
            (Factor::X, _) => ("SPARSE", 0.0),
            (Factor::W, Op::Dense) => ("FORM", 0.0),
            (Factor::W, Op::Masked | Op::Masked24) => ("FORM", 1.0),
            (Factor::W, Op::Sparse24(_)) => ("FORM", 2.0),
        };
        // The bits of a mask are those of each row.
        vec![form, ("VECTOR", vector(self.op)), add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const fn all(read: [&'static str; 3], written: &'static str) -> [Binding; 5] {
            let [a, b, c] = read;
            [Binding::PARAMS, Binding::read(1, a), Binding::read(2, b), Binding::read(3, c), Binding::write(4, written)]
        }
        match self.of {
            Factor::X => const { &all(["values", "words", "dy"], "dx") },
            Factor::W => const { &all(["words", "x", "dy"], "dw") },
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

impl fmt::Display for GradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match self.of {
            Factor::X => "x",
            Factor::W => "w",
        };
        write!(f, "gemm_grad_{of}-{}{}", form(self.op), add_suffix(self.add))
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
