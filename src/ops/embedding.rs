//! Sums of embeddings: rows of tables, chosen by ids.
//!
//! Invariant: every table has a row, and an id past the end of one reads its last.

mod grad;

use std::fmt;

use bytemuck::{Pod, Zeroable};
use half::f16;
use ndarray::Array2;

use super::{Cost, Indices, Operand, Operation, dispatch};
use crate::cpu::rows::{TASK_TOKENS, work};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, expect_dtype, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{
    BackwardArgs, Graph, Input, NodeArgs, NodeOp, ParamKind, Precision, Read, ReferenceArgs, Rows, ValueId,
};
use crate::kernels::{Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, Types, WORKGROUP, fields};
use crate::matrix::{DType, Element, Elements};
use crate::reference::embedding;

pub use grad::{EmbeddingGrad, EmbeddingGradKernel};

/// Sum of embeddings: `y[t] = Σ table[ids[t]]` over the tables, `t` being a row of `y`.
///
/// An id at or past the end of its table reads the table's last row: what an id may be is for the caller to check, who
/// knows where it comes from. A GPU binds a table at once: one that is larger than its limit for that
/// ([`Caps::binding_bytes`]) is refused, not split as the weights of linear layers are.
#[derive(Clone, Copy, Debug)]
pub struct Embedding<'a> {
    /// One to three tables of one type, each `rows x d` with at least one row, and for each an id per row of `y`.
    pub tables: &'a [(&'a Tensor, &'a Indices)],
    /// `tokens x d`, overwritten.
    pub y: &'a Tensor,
}

/// Names of a table and of its ids.
const NAMES: [(&str, &str); 3] =
    [("table 0", "ids of table 0"), ("table 1", "ids of table 1"), ("table 2", "ids of table 2")];

impl Operation for Embedding<'_> {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let tables = NAMES.into_iter().zip(self.tables);
        let tables = tables.flat_map(|((table, ids), (t, i))| [Operand::read(table, *t), Operand::read(ids, *i)]);
        [Operand::write("y", self.y)].into_iter().chain(tables).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { tables, y } = *self;
        let [(first, _), ..] = tables else { return Err(Error::invalid("an embedding needs a table")) };
        if tables.len() > NAMES.len() {
            return Err(Error::invalid(format!("an embedding of {} tables, 3 at most", tables.len())));
        }
        for ((name, name_of_ids), (table, ids)) in NAMES.into_iter().zip(tables) {
            expect_dtype(name, table.dtype(), first.dtype())?;
            expect_shape(name, table.shape(), (table.rows(), y.cols()))?;
            expect_len(name_of_ids, ids.len(), y.rows())?;
            if table.rows() == 0 {
                return Err(Error::invalid(format!("{name} of an embedding has no rows")));
            }
        }
        Ok(())
    }

    fn cost(&self) -> Cost {
        let elements = self.y.rows() as f64 * self.y.cols() as f64;
        let tables = self.tables.len() as f64;
        let read: f64 = self.tables.iter().map(|(table, _)| table.dtype().bytes() as f64 * elements).sum();
        // Of tables, the rows that are chosen.
        let others = self.tables.iter().map(|(_, ids)| ids.bytes()).sum::<u64>() + self.y.bytes();
        Cost { flops: (tables - 1.0).max(0.0) * elements, bytes: read + others as f64 }
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { tables, y } = *self;
        let storage = tables.first().map_or(DType::F32, |(table, _)| table.dtype());
        let kernel = EmbeddingKernel::new(tables.len(), storage, y.dtype())?;
        let mut rows = [0; 3];
        for (rows, (table, _)) in rows.iter_mut().zip(tables) {
            *rows = gpu_size("rows of a table", table.rows())?;
        }
        let [rows0, rows1, rows2] = rows;
        let (tokens, width) = (gpu_size("tokens", y.rows())?, gpu_size("features of a token", y.cols())?);
        let params = Params { tokens, width, rows0, rows1, rows2 };
        let table = |i: usize| tables.get(i).and_then(|(table, _)| table.on_gpu());
        let ids = |i: usize| tables.get(i).and_then(|(_, ids)| ids.on_gpu());
        let operands = [table(0), ids(0), table(1), ids(1), table(2), ids(2), y.on_gpu()];
        dispatch(gpu, Program::new(kernel), (y.rows() * y.cols()).div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let mut tables = [None, None, None];
        for (slot, (table, ids)) in tables.iter_mut().zip(self.tables) {
            *slot = Some((table.on_cpu()?, ids.on_cpu()?));
        }
        Ok(Box::new(Call { tables, width: self.y.cols(), y: self.y.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/embedding.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    rows0: u32,
    rows1: u32,
    rows2: u32,
}

/// The program (shaders/embedding.wgsl). Its name (`Display`) is made of its parts, such as `embedding-f16f32-2`: types
/// of tables and sums, and the number of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EmbeddingKernel {
    tables: u32,
    types: Types,
}

impl EmbeddingKernel {
    /// The sum of rows of 1 to 3 tables. An error for another number of them, or a type that kernels do not store.
    pub fn new(tables: usize, storage: DType, output: DType) -> Result<Self> {
        let types = Types::new(storage, output)?;
        match u32::try_from(tables) {
            Ok(tables @ 1..=3) => Ok(Self { tables, types }),
            _ => Err(Error::invalid(format!("an embedding of {tables} tables, expected 1 to 3"))),
        }
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Types::all().map(|types| Program::new(EmbeddingKernel { tables: 3, types })).chain(grad::shaders())
}

impl Shader for EmbeddingKernel {
    fn module(&self) -> String {
        Self { tables: 3, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[include_str!("../../shaders/embedding.wgsl")])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("TABLES", f64::from(self.tables))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "table0"),
                Binding::read(2, "ids0"),
                Binding::read(3, "table1"),
                Binding::read(4, "ids1"),
                Binding::read(5, "table2"),
                Binding::read(6, "ids2"),
                Binding::write(7, "y"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width rows0 rows1 rows2)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for EmbeddingKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tables, types } = self;
        write!(f, "embedding-{}f32-{tables}{}", types.storage(), types.suffix())
    }
}

/// One to three tables, each with its ids.
type Tables<'a> = [Option<(&'a Elements, &'a [u32])>; 3];

#[derive(Debug)]
struct Call {
    tables: [Option<(Shared, SharedIndices)>; 3],
    width: usize,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let held = self.tables.each_ref().map(|t| t.as_ref().map(|(table, ids)| (read(table), read(ids))));
        let tables = held.each_ref().map(|t| t.as_ref().map(|(table, ids)| (table.elements(), ids.as_slice())));
        match write(&self.y).elements_mut() {
            Elements::F32(y) => sum_to(cpu, tables, self.width, y),
            Elements::F16(y) => sum_to(cpu, tables, self.width, y),
            // Refused when the call is prepared.
            Elements::Bf16(_) => {}
        }
    }
}

fn sum_to<Y: Element>(cpu: &Cpu, tables: Tables<'_>, width: usize, y: &mut [Y]) {
    match tables {
        [Some((Elements::F32(_), _)), ..] => sum_typed::<f32, Y>(cpu, tables, width, y),
        [Some((Elements::F16(_), _)), ..] => sum_typed::<f16, Y>(cpu, tables, width, y),
        // Refused when the call is prepared.
        _ => {}
    }
}

fn sum_typed<X: Element, Y: Element>(cpu: &Cpu, tables: Tables<'_>, width: usize, y: &mut [Y]) {
    let tables = tables.map(|t| t.and_then(|(table, ids)| Some((X::of(table)?, ids))));
    cpu.each_chunk(y, TASK_TOKENS * width, |task, y| {
        cpu.simd().run(EmbedTokens { tables: &tables, token0: task * TASK_TOKENS, width, y });
    });
}

work!(EmbedTokens<X, Y>, { tables: &'a [Option<(&'a [X], &'a [u32])>; 3], token0: usize, width: usize, y: &'a mut [Y] },
    embed_tokens(tables, token0, width, y));

/// Embeddings of the tokens from `token0` on, as many as `y` has rows.
#[inline(always)]
fn embed_tokens<X: Element, Y: Element>(
    tables: &[Option<(&[X], &[u32])>; 3],
    token0: usize,
    width: usize,
    y: &mut [Y],
) {
    for (token, y) in y.chunks_exact_mut(width).enumerate() {
        let row = |&(table, ids): &(&'_ [X], &[u32])| {
            let last = (table.len() / width).saturating_sub(1);
            (ids[token0 + token] as usize).min(last) * width
        };
        let [a, b, c] = tables.each_ref().map(|t| t.as_ref().map(|t| &t.0[row(t)..][..width]));
        match (a, b, c) {
            (Some(a), Some(b), Some(c)) => {
                for (((y, a), b), c) in y.iter_mut().zip(a).zip(b).zip(c) {
                    *y = Y::from_f32(a.to_f32() + b.to_f32() + c.to_f32());
                }
            }
            (Some(a), Some(b), None) => {
                for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                    *y = Y::from_f32(a.to_f32() + b.to_f32());
                }
            }
            (Some(a), ..) => {
                for (y, a) in y.iter_mut().zip(a) {
                    *y = Y::from_f32(a.to_f32());
                }
            }
            (None, ..) => {}
        }
    }
}

/// A sum of embeddings as a node: each table, and what is looked up in it.
#[derive(Debug)]
struct EmbeddingNode;

impl NodeOp for EmbeddingNode {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let tables = (0..args.reads.len() / 2).map(|i| Ok((args.tensor(2 * i)?, args.indices(2 * i + 1)?)));
        let tables: Vec<_> = tables.collect::<Result<_>>()?;
        args.device.prepare(&Embedding { tables: &tables, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let tables = (0..args.len() / 2).map(|i| Ok((args.matrix(2 * i)?.view(), args.indices(2 * i + 1)?)));
        Ok(embedding::exact(&tables.collect::<Result<Vec<_>>>()?))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let wanted = (0..args.forward.reads.len() / 2).filter_map(|i| Some((i, args.gradient(2 * i)?)));
        let tables: Vec<_> =
            wanted.map(|(i, table)| Ok((args.forward.indices(2 * i + 1)?, table))).collect::<Result<_>>()?;
        if tables.is_empty() {
            return Ok(Vec::new());
        }
        Ok(vec![args.forward.device.prepare(&EmbeddingGrad { tables: &tables, dy: args.dy })?])
    }
}

impl Graph {
    /// Adds a sum of embeddings of `width` features: of one to three tables, each with the name of its tensor, its
    /// rows, and what is looked up in it.
    pub fn embedding(&mut self, name: &str, tables: &[(&str, usize, Input)], width: usize) -> Result<ValueId> {
        let mut reads = Vec::new();
        for (table, rows, input) in tables {
            let kind = ParamKind::Matrix(Precision::Model);
            reads.push(Read::Param(self.add_param((*table).to_owned(), kind, (*rows, width))?));
            reads.push(Read::Input(*input));
        }
        if reads.is_empty() {
            return Err(Error::invalid(format!("{name}: an embedding needs a table")));
        }
        self.add_node(name, EmbeddingNode, reads, (Rows::Tokens, width, Precision::Model))
    }
}
