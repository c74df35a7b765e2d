//! Mean pooling: one row for each sequence.
//!
//! Invariant: rows of padding are not read, and a sequence without tokens becomes zeros.

mod grad;

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

use super::{Cost, Indices, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{inverse_root, sum_of, work};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Result, checked_mul, expect_dtype, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, Input, NodeArgs, NodeOp, Precision, Read, ReferenceArgs, Rows, ValueId};
use crate::kernels::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, WORKGROUP, fields,
};
use crate::matrix::{DType, Element, Elements};
use crate::reference::mean_pooling;

pub use grad::{MeanPoolingGrad, MeanPoolingGradKernel};

/// Mean of each sequence's real tokens, and then, if `normalize`, that over its Euclidean length (or over 1e-12, where
/// the length is smaller).
///
/// A length past `seq` counts as `seq`; a sequence of length 0 becomes zeros. A mean to be normalised whose length's
/// square overflows f32 becomes NaNs.
#[derive(Clone, Copy, Debug)]
pub struct MeanPooling<'a> {
    /// `batch·seq x d`.
    pub x: &'a Tensor,
    /// Real tokens of each sequence, `batch` of them.
    pub lengths: &'a Indices,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of each sequence.
    pub seq: usize,
    /// Whether means are brought to length 1.
    pub normalize: bool,
    /// `batch x d`, f32, overwritten.
    pub y: &'a Tensor,
}

impl Operation for MeanPooling<'_> {
    fn name(&self) -> &'static str {
        "mean_pooling"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, lengths, y, .. } = *self;
        vec![Operand::read("x", x), Operand::write("y", y), Operand::read("lengths", lengths)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, lengths, batch, seq, y, .. } = *self;
        expect_shape("x", x.shape(), (checked_mul("tokens", batch, seq)?, y.cols()))?;
        expect_shape("y", y.shape(), (batch, x.cols()))?;
        expect_dtype("y", y.dtype(), DType::F32)?;
        expect_len("lengths", lengths.len(), batch)
    }

    fn cost(&self) -> Cost {
        let (all, means) = (self.x.rows() * self.x.cols(), self.y.rows() * self.y.cols());
        let normalized = if self.normalize { 3 * means } else { 0 };
        cost_of((all + means + normalized) as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, lengths, batch, seq, normalize, y } = *self;
        let width = gpu_size("features of a token", x.cols())?;
        let kernel = MeanPoolingKernel::new(width, normalize, x.dtype())?;
        let (sequences, seq) = (gpu_size("sequences", batch)?, gpu_size("rows of a sequence", seq)?);
        let params = Params { sequences, width, seq };
        let workgroups = if y.cols() == 0 { 0 } else { batch };
        let operands = [x.on_gpu(), y.on_gpu(), lengths.on_gpu()];
        dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, lengths, seq, normalize, y, .. } = *self;
        Ok(Box::new(Call { x: x.on_cpu()?, lengths: lengths.on_cpu()?, seq, normalize, y: y.on_cpu()? }))
    }
}

/// Mirror of `Params` in shaders/mean_pooling.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    sequences: u32,
    width: u32,
    seq: u32,
}

/// The program (shaders/mean_pooling.wgsl), to f32. Its name (`Display`) is made of its parts, such as
/// `mean_pooling-f16f32-quads-unit`: types of input and sums, how features are read, and `unit` where means are
/// normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeanPoolingKernel {
    normalize: bool,
    access: FeatureAccess,
    types: Types,
}

impl MeanPoolingKernel {
    /// The mean over tokens of `width` features, divided by its Euclidean length if `normalize`. An error for a type
    /// that kernels do not store.
    pub fn new(width: u32, normalize: bool, storage: DType) -> Result<Self> {
        Ok(Self { normalize, access: FeatureAccess::of(width), types: Types::new(storage, DType::F32)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    let sizes = Types::all().filter(|types| types.output() == DType::F32).flat_map(|types| WIDTHS.map(|w| (types, w)));
    let forward = sizes.map(|(types, width)| {
        Program::new(MeanPoolingKernel { normalize: true, access: FeatureAccess::of(width), types })
    });
    forward.chain(grad::shaders())
}

impl Shader for MeanPoolingKernel {
    fn module(&self) -> String {
        Self { normalize: true, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[
            self.access.text(),
            include_str!("../../shaders/shared/inverse_root.wgsl"),
            include_str!("../../shaders/mean_pooling.wgsl"),
        ])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("NORMALIZE", f64::from(u8::from(self.normalize)))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "x"), Binding::write(2, "y"), Binding::read(3, "lengths")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: sequences width seq)
    }

    fn workgroup_bytes(&self) -> u32 {
        16 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for MeanPoolingKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { normalize, access, types } = self;
        let unit = if *normalize { "-unit" } else { "" };
        write!(f, "mean_pooling-{}f32-{}{unit}", types.storage(), access.name())
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    lengths: SharedIndices,
    seq: usize,
    normalize: bool,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, lengths) = (read(&self.x), read(&self.lengths));
        let mut y = write(&self.y);
        match (x.elements(), y.elements_mut()) {
            (Elements::F32(x), Elements::F32(y)) => self.pool(cpu, x, &lengths, y),
            (Elements::F16(x), Elements::F32(y)) => self.pool(cpu, x, &lengths, y),
            // Refused when the call is prepared.
            _ => {}
        }
    }
}

impl Call {
    fn pool<X: Element>(&self, cpu: &Cpu, x: &[X], lengths: &[u32], y: &mut [f32]) {
        let Self { seq, normalize, .. } = *self;
        let width = y.len() / lengths.len().max(1);
        cpu.each_chunk(y, width, |sequence, y| {
            let length = seq.min(lengths[sequence] as usize);
            cpu.simd().run(PoolSequence { x: &x[sequence * seq * width..][..length * width], normalize, y });
        });
    }
}

work!(PoolSequence<X>, { x: &'a [X], normalize: bool, y: &'a mut [f32] }, pool_sequence(x, normalize, y));

/// Mean of the tokens in `x`, each as wide as `y`.
#[inline(always)]
fn pool_sequence<X: Element>(x: &[X], normalize: bool, y: &mut [f32]) {
    y.fill(0.0);
    let tokens = x.chunks_exact(y.len());
    let count = tokens.len().max(1) as f32;
    for token in tokens {
        for (y, x) in y.iter_mut().zip(token) {
            *y += x.to_f32();
        }
    }
    y.iter_mut().for_each(|y| *y /= count);
    if normalize {
        let squares = sum_of(y, |y| y * y);
        // 1e-24 is the square of the least length that is divided by. A NaN is not less.
        let factor = inverse_root(if squares < 1e-24 { 1e-24 } else { squares });
        y.iter_mut().for_each(|y| *y *= factor);
    }
}

/// Mean pooling as a node: x, and the lengths.
#[derive(Debug)]
struct MeanPoolingNode {
    normalize: bool,
}

impl NodeOp for MeanPoolingNode {
    fn name(&self) -> &'static str {
        "mean_pooling"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let &NodeArgs { device, batch, y, .. } = args;
        let (x, lengths) = (args.tensor(0)?, args.indices(1)?);
        let seq = rows_of_each(x, batch);
        device.prepare(&MeanPooling { x, lengths, batch, seq, normalize: self.normalize, y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let (x, lengths) = (args.matrix(0)?, args.indices(1)?);
        Ok(mean_pooling::exact(x.view(), lengths, x.nrows(), self.normalize))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let Some(dx) = args.gradient(0) else { return Ok(Vec::new()) };
        let NodeArgs { device, batch, .. } = args.forward;
        let (x, lengths) = (args.forward.tensor(0)?, args.forward.indices(1)?);
        let seq = rows_of_each(x, batch);
        let grad = MeanPoolingGrad { x, lengths, batch, seq, normalize: self.normalize, dy: args.dy, dx };
        Ok(vec![device.prepare(&grad)?])
    }
}

/// Rows of each sequence: its tokens, or as many as an image has positions.
fn rows_of_each(x: &Tensor, batch: usize) -> usize {
    x.rows() / batch.max(1)
}

impl Graph {
    /// Adds the mean over the tokens of each sequence, brought to length 1 if `normalize`. It is f32. Of an image it is
    /// the mean over all positions: these are no more than its pixels, which count as its length.
    pub fn mean_pooling(&mut self, name: &str, x: ValueId, normalize: bool) -> Result<ValueId> {
        let cols = self.value(x).cols;
        let reads = vec![Read::Value(x), Read::Input(Input::Lengths)];
        self.add_node(name, MeanPoolingNode { normalize }, reads, (Rows::Sequences, cols, Precision::F32))
    }
}
