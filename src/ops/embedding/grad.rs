//! Gradients of tables of embeddings.
//!
//! Invariant: a row is summed by one thread, or on a GPU each of its features, in the order of the tokens.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::super::{Cost, Gradient, Indices, Operand, Operation, check_f32, dispatch};
use super::NAMES;
use crate::cpu::rows::Target;
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Tensor, gpu_size};
use crate::error::{Error, Result, expect_len};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{
    Binding, ParamsLayout, Primitives, Program, Shader, Text, WORKGROUP, add_override, add_suffix, fields,
};
use crate::matrix::{Element, Elements};

/// Gradients of the tables of an [`Embedding`](crate::Embedding), of those that are wanted: each row's is the sum of
/// `dy` over the tokens with its id. All tensors are f32.
///
/// An id at or past the end of a table counts for its last row, as in the forward. A gradient that is overwritten is
/// zero in rows that no token has, and all of a table is written: where tables are large and batches small, one that is
/// added to costs less: its rows' sums start from what is there.
///
/// ```
/// use sparse24::{DType, Device, EmbeddingGrad, Gradient, Matrix};
/// let device = Device::cpu()?;
/// let ids = device.indices(3)?;
/// device.write_indices(&ids, &[1, 0, 1])?;
/// let dy = device.upload(&Matrix::from_f32(3, 1, &[1.0, 2.0, 4.0])?)?;
/// let to = device.zeros(3, 1, DType::F32)?;
/// device.prepare(&EmbeddingGrad { tables: &[(&ids, Gradient { to: &to, add: false })], dy: &dy })?.run()?;
/// assert_eq!(device.read(&to)?, Matrix::from_f32(3, 1, &[2.0, 5.0, 0.0])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingGrad<'a> {
    /// One to three tables: the ids that were looked up, one per row of `dy`, and the gradient of the table, `rows x
    /// d`.
    pub tables: &'a [(&'a Indices, Gradient<'a>)],
    /// `tokens x d`: the gradient of the result.
    pub dy: &'a Tensor,
}

impl Operation for EmbeddingGrad<'_> {
    fn name(&self) -> &'static str {
        "embedding_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let tables = NAMES.into_iter().zip(self.tables);
        let tables = tables.flat_map(|((table, ids), (i, to))| [to.operand(table), Operand::read(ids, *i)]);
        [Operand::read("dy", self.dy)].into_iter().chain(tables).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { tables, dy } = *self;
        check_f32(&[("dy", dy)])?;
        if tables.is_empty() || tables.len() > NAMES.len() {
            return Err(Error::invalid(format!("gradients of {} tables, expected 1 to 3", tables.len())));
        }
        for ((name, name_of_ids), (ids, table)) in NAMES.into_iter().zip(tables) {
            table.check(name, (table.to.rows(), dy.cols()))?;
            expect_len(name_of_ids, ids.len(), dy.rows())?;
            if table.to.rows() == 0 {
                return Err(Error::invalid(format!("{name} of an embedding has no rows")));
            }
        }
        Ok(())
    }

    fn cost(&self) -> Cost {
        let elements = self.dy.rows() as f64 * self.dy.cols() as f64;
        let bytes = self.tables.iter().map(|(ids, table)| {
            // Of a gradient that is added to, the rows that are chosen, read and written.
            let written = if table.add { 8.0 * elements } else { table.to.bytes() as f64 };
            ids.bytes() as f64 + written + 4.0 * elements
        });
        Cost { flops: self.tables.len() as f64 * elements, bytes: bytes.sum() }
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { tables, dy } = *self;
        let (tokens, width) = (gpu_size("tokens", dy.rows())?, gpu_size("features of a token", dy.cols())?);
        let each = tables.iter().map(|(ids, Gradient { to, add })| {
            let params = Params { tokens, width, rows: gpu_size("rows of a table", to.rows())? };
            let workgroups = to.rows() * dy.cols().div_ceil(WORKGROUP);
            let operands = [ids.on_gpu(), dy.on_gpu(), to.on_gpu()];
            dispatch(gpu, Program::new(EmbeddingGradKernel { add: *add }), workgroups, &params, &operands)
        });
        Ok(each.collect::<Result<Vec<_>>>()?.concat())
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let tables = self.tables.iter().map(|(ids, table)| Ok((ids.on_cpu()?, table.on_cpu()?)));
        let tables = tables.collect::<Result<_>>()?;
        Ok(Box::new(Call { tables, width: self.dy.cols(), dy: self.dy.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/embedding_grad.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    rows: u32,
}

/// The program (shaders/embedding_grad.wgsl), of one table. Its name (`Display`) is `embedding_grad`, or
/// `embedding_grad-add` where the gradient is added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EmbeddingGradKernel {
    add: bool,
}

/// Every text.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    std::iter::once(Program::new(EmbeddingGradKernel { add: false }))
}

impl Shader for EmbeddingGradKernel {
    fn module(&self) -> String {
        Self { add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/embedding_grad.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "ids"), Binding::read(2, "dy"), Binding::write(3, "table")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width rows)
    }

    fn workgroup_bytes(&self) -> u32 {
        WORKGROUP as u32 / 8
    }
}

impl fmt::Display for EmbeddingGradKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "embedding_grad{}", add_suffix(self.add))
    }
}

#[derive(Debug)]
struct Call {
    tables: Vec<(SharedIndices, Target)>,
    width: usize,
    dy: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let dy = read(&self.dy);
        let Some(dy) = f32::of(dy.elements()) else { return };
        for (ids, target) in &self.tables {
            let (ids, mut to) = (read(ids), write(&target.to));
            let Elements::F32(to) = to.elements_mut() else { return };
            add_rows(cpu, &ids, self.width, dy, to, target.add);
        }
    }
}

/// Adds each token's gradient to the row of its id. A task has some neighbouring rows, and looks through all ids for
/// them.
fn add_rows(cpu: &Cpu, ids: &[u32], width: usize, dy: &[f32], to: &mut [f32], add: bool) {
    // As many tasks as keep all threads busy, and few, as each reads all ids.
    const TASKS: usize = 64;
    let rows = to.len() / width.max(1);
    let rows_of_task = rows.div_ceil(TASKS).max(1);
    cpu.each_chunk(to, rows_of_task * width, |task, to| {
        if !add {
            to.fill(0.0);
        }
        let first = task * rows_of_task;
        for (id, dy) in ids.iter().zip(dy.chunks_exact(width)) {
            let row = (*id as usize).min(rows - 1).wrapping_sub(first);
            if let Some(to) = to.chunks_exact_mut(width).nth(row) {
                to.iter_mut().zip(dy).for_each(|(to, dy)| *to += dy);
            }
        }
    });
}
