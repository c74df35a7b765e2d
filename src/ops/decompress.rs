//! Decompression of 2:4 weights, the way back from [`sparsify`](super::sparsify).
//!
//! Invariant: every element of W is written, zero wherever no value is coded.

use std::fmt;

use rayon::prelude::*;

use super::{Compressed, Cost, Operand, Operation, cost_of};
use crate::cpu::{BLOCK, Cpu, CpuCall, Shared, write};
use crate::engine::{CpuParts, Tensor};
use crate::error::Result;
use crate::format::expand_rows;
use crate::gpu::{Dispatch, Gpu};
use crate::groups::Bits;
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Sparse24Layout, Sparse24Params, Text, WORKGROUP,
};
use crate::layout::WORD;
use crate::mask::VectorLen;
use crate::matrix::Elements;

/// Decompression: `w` becomes what [`Sparse24::decompress`](crate::Sparse24::decompress) makes of `from`.
///
/// A code in metadata of the caller's own that is not legal makes a wrong matrix, and no other harm.
#[derive(Clone, Copy, Debug)]
pub struct Decompress<'a> {
    /// The weights.
    pub from: Compressed<'a>,
    /// `m x k`, overwritten.
    pub w: &'a Tensor,
}

impl Operation for Decompress<'_> {
    fn name(&self) -> &'static str {
        "decompress"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        [Operand::write("w", self.w)].into_iter().chain(self.from.operands(false)).collect()
    }

    fn check(&self) -> Result<()> {
        self.from.check(self.w)
    }

    /// Nothing is computed.
    fn cost(&self) -> Cost {
        cost_of(0.0, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let workgroups = |layout: Sparse24Layout, rows: usize, cols: usize| {
            (rows * cols).div_ceil(if layout.halves() { 2 } else { 1 }).div_ceil(WORKGROUP)
        };
        let program = |layout| Program::new(DecompressKernel(layout));
        self.from.dispatches(gpu, self.w, program, workgroups, |[w, values, codes]| [values, codes, w])
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        Ok(Box::new(Call { from: self.from.on_cpu(self.w)?, w: self.w.on_cpu()? }))
    }
}

/// The program (shaders/decompress.wgsl). Its name (`Display`) is made of its parts, such as
/// `decompress-f16-v4-packed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DecompressKernel(Sparse24Layout);

/// Every layout, all of one text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Sparse24Layout::all().map(|layout| Program::new(DecompressKernel(layout)))
}

impl Shader for DecompressKernel {
    fn module(&self) -> String {
        Self(Sparse24Layout::module()).to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Sparse24Layout::text(include_str!("../../shaders/decompress.wgsl")))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.0.overrides()
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "values"), Binding::read(2, "codes"), Binding::write(3, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        Sparse24Params::LAYOUT
    }
}

impl fmt::Display for DecompressKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "decompress-{}", self.0)
    }
}

#[derive(Debug)]
struct Call {
    from: CpuParts,
    w: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let mut w = write(&self.w);
        let (k, vector) = (w.cols(), self.from.vector());
        self.from.look(|values, meta| match (values, w.elements_mut()) {
            (Elements::F32(values), Elements::F32(w)) => expand(cpu, values, meta, (k, vector), w),
            (Elements::F16(values), Elements::F16(w)) => expand(cpu, values, meta, (k, vector), w),
            // Refused when the call is prepared.
            _ => {}
        });
    }
}

/// The host's own loops, dealt out by blocks of rows: tasks begin where a pattern begins, at whatever vector length.
fn expand<T: Bits>(cpu: &Cpu, values: &[T], meta: &[u32], (k, vector): (usize, VectorLen), w: &mut [T]) {
    if w.is_empty() {
        return;
    }
    match cpu.threads() {
        Some(threads) => threads.install(|| {
            let parts = w.par_chunks_mut(BLOCK * k).zip(values.par_chunks(BLOCK * 2 * k.div_ceil(4)));
            let words = meta.par_chunks(BLOCK / vector.get() * k.div_ceil(WORD));
            parts.zip(words).for_each(|((w, values), meta)| expand_rows(values, meta, k, vector, w));
        }),
        None => expand_rows(values, meta, k, vector, w),
    }
}
