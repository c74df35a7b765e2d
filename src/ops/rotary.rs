//! Rotary positions: features turned by angles that depend on a token's place in its sequence.
//!
//! Invariant: every position that a token can have is in the tables.

mod grad;

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

use super::{Cost, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, each_pair, work};
use crate::cpu::{Cpu, CpuCall, Shared, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, NodeArgs, NodeOp, ParamId, Precision, Read, ReferenceArgs, ValueId};
use crate::kernels::{Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, Types, WORKGROUP, fields};
use crate::matrix::{DType, Element, Matrix};
use crate::reference::rotary;

pub use grad::{RotaryGrad, RotaryGradKernel};

/// Rotary positions (J. Su et al. 2021, [arXiv:2104.09864](https://arxiv.org/abs/2104.09864)), with the halves of a head
/// turned against each other, as Hugging Face's Llama has them: for feature `c` of the first half of a head of `h`
/// features, `y[c] = x[c]·cos - x[c + h/2]·sin` and `y[c + h/2] = x[c + h/2]·cos + x[c]·sin`, with the tables' numbers
/// for the token's position and `c`. Row `t` of `x` has position `t % seq + offset`.
///
/// ```
/// use sparse24::{DType, Device, Matrix, Rotary};
/// let device = Device::cpu()?;
/// // One head of two features; position 1 is turned by one radian.
/// let [cos, sin] = Rotary::tables(2, 2, 10000.0)?.map(|table| device.upload(&table));
/// let x = device.upload(&Matrix::from_f32(2, 2, &[1.0, 0.0, 1.0, 0.0])?)?;
/// let y = device.zeros(2, 2, DType::F32)?;
/// device.prepare(&Rotary { x: &x, cos: &cos?, sin: &sin?, seq: 2, offset: 0, rotated: 2, y: &y })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(2, 2, &[1.0, 0.0, 1f32.cos(), 1f32.sin()])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// `tokens x d`.
    pub x: &'a Tensor,
    /// Cosines, f32, `positions x h/2`.
    pub cos: &'a Tensor,
    /// Sines, f32, of the same shape.
    pub sin: &'a Tensor,
    /// Rows of each sequence.
    pub seq: usize,
    /// Position of a sequence's first row.
    pub offset: usize,
    /// How many of a token's first features are turned: whole heads. The others are copied.
    pub rotated: usize,
    /// `tokens x d`, overwritten. Not the memory of `x`.
    pub y: &'a Tensor,
}

impl Rotary<'_> {
    /// Cosines and sines for so many positions and heads of `head_dim` features: of `position · theta^(-2c /
    /// head_dim)`, in f64, rounded to f32.
    pub fn tables(positions: usize, head_dim: usize, theta: f64) -> Result<[Matrix; 2]> {
        let half = head_dim / 2;
        checked_mul("rotary positions", positions, half)?;
        let angles = (0..positions).flat_map(|position| {
            (0..half).map(move |c| position as f64 * theta.powf(-2.0 * c as f64 / head_dim as f64))
        });
        let angles: Vec<f64> = angles.collect();
        let table = |of: fn(f64) -> f64| {
            let numbers: Vec<f32> = angles.iter().map(|&angle| of(angle) as f32).collect();
            Matrix::from_f32(positions, half, &numbers)
        };
        Ok([table(f64::cos)?, table(f64::sin)?])
    }
}

impl Operation for Rotary<'_> {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, cos, sin, y, .. } = *self;
        vec![Operand::read("x", x), Operand::write("y", y), Operand::read("cos", cos), Operand::read("sin", sin)]
    }

    fn check(&self) -> Result<()> {
        let Self { x, cos, sin, seq, offset, rotated, y } = *self;
        expect_shape("y", y.shape(), x.shape())?;
        check_tables(x, (cos, sin), Place { seq, offset, rotated })
    }

    /// Two products and a sum for each turned feature.
    fn cost(&self) -> Cost {
        cost_of(3.0 * self.x.rows() as f64 * self.rotated as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, cos, sin, seq, offset, rotated, y } = *self;
        let half = gpu_size("features of a head", cos.cols())?;
        let kernel = RotaryKernel::new(half, x.dtype(), y.dtype())?;
        let params = Params::new(x, Place { seq, offset, rotated })?;
        let items = x.rows() * (x.cols() - rotated / 2);
        let operands = [x.on_gpu(), y.on_gpu(), cos.on_gpu(), sin.on_gpu()];
        dispatch(gpu, Program::new(kernel), items.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, cos, sin, seq, offset, rotated, y } = *self;
        let (width, place) = (x.cols(), Place { seq, offset, rotated });
        let [x, cos, sin, y] = [x.on_cpu()?, cos.on_cpu()?, sin.on_cpu()?, y.on_cpu()?];
        Ok(Box::new(Call { x, cos, sin, width, place, y }))
    }
}

/// Mirror of `Params` in shaders/rotary.wgsl and rotary_grad.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    rotated: u32,
    seq: u32,
    offset: u32,
}

impl Params {
    /// Of the tokens of `x`.
    fn new(x: &Tensor, Place { seq, offset, rotated }: Place) -> Result<Self> {
        Ok(Self {
            tokens: gpu_size("tokens", x.rows())?,
            width: gpu_size("features of a token", x.cols())?,
            rotated: gpu_size("features of a token", rotated)?,
            // No more than there are: a sequence may be of any length.
            seq: gpu_size("rows of a sequence", seq.min(x.rows()))?,
            offset: gpu_size("positions", if rotated == 0 { 0 } else { offset })?,
        })
    }
}

/// An error unless there are cosines and sines of one shape for every position of the tokens of `x`, whose turned
/// features are whole heads.
fn check_tables(x: &Tensor, (cos, sin): (&Tensor, &Tensor), Place { seq, offset, rotated }: Place) -> Result<()> {
    expect_shape("sin", sin.shape(), cos.shape())?;
    expect_dtype("cos", cos.dtype(), DType::F32)?;
    expect_dtype("sin", sin.dtype(), DType::F32)?;
    let head_dim = checked_mul("features of a head", 2, cos.cols())?;
    if rotated > x.cols() || (rotated > 0 && (head_dim == 0 || !rotated.is_multiple_of(head_dim))) {
        return Err(Error::invalid(format!(
            "{rotated} of {} features are no whole number of heads of {head_dim}",
            x.cols()
        )));
    }
    if seq == 0 && x.rows() > 0 {
        return Err(Error::invalid(format!("{} tokens are no sequences of 0 rows", x.rows())));
    }
    // A sequence may be longer than there are tokens.
    let last = offset.checked_add(seq.min(x.rows())).filter(|&last| last <= cos.rows());
    if last.is_none() && rotated > 0 {
        let (rows, has) = (seq.min(x.rows()), cos.rows());
        return Err(Error::invalid(format!("{rows} positions from {offset} on are not all among cos's {has}")));
    }
    Ok(())
}

/// The program (shaders/rotary.wgsl). Its name (`Display`) is made of its parts, such as `rotary-f16f32-d64`: types of
/// input and sums, and features of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RotaryKernel {
    half: u32,
    types: Types,
}

impl RotaryKernel {
    /// For heads of twice `half` features. An error for a type that kernels do not store.
    pub fn new(half: u32, storage: DType, output: DType) -> Result<Self> {
        // Without features no head is turned.
        Ok(Self { half: half.max(1), types: Types::new(storage, output)? })
    }
}

/// Every text.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Types::all().map(|types| Program::new(RotaryKernel { half: 32, types })).chain(grad::shaders())
}

impl Shader for RotaryKernel {
    fn module(&self) -> String {
        Self { half: 0, ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.types.text(&[include_str!("../../shaders/rotary.wgsl")])
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("HALF", f64::from(self.half))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "cosines"),
                Binding::read(4, "sines"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width rotated seq offset)
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.types.supported_by(caps, self.threads(), self.workgroup_bytes())
    }
}

impl fmt::Display for RotaryKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { half, types } = self;
        write!(f, "rotary-{}f32-d{}{}", types.storage(), 2 * half, types.suffix())
    }
}

/// Where tokens stand, and how many of their features are turned.
#[derive(Clone, Copy, Debug)]
struct Place {
    seq: usize,
    offset: usize,
    rotated: usize,
}

#[derive(Debug)]
struct Call {
    x: Shared,
    cos: Shared,
    sin: Shared,
    width: usize,
    place: Place,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, cos, sin) = (read(&self.x), read(&self.cos), read(&self.sin));
        let (Some(cos), Some(sin)) = (f32::of(cos.elements()), f32::of(sin.elements())) else { return };
        let (tables, half) = ((cos, sin), read(&self.cos).cols());
        let (width, place, task) = (self.width, self.place, TASK_TOKENS * self.width);
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => cpu.each_chunk(y, task, |i, y| {
            let x = &x[i * task..][..y.len()];
            cpu.simd().run(TurnTokens { x, tables, half, width, token0: i * TASK_TOKENS, place, y });
        }));
    }
}

work!(TurnTokens<X, Y>, {
        x: &'a [X],
        tables: (&'a [f32], &'a [f32]),
        half: usize,
        width: usize,
        token0: usize,
        place: Place,
        y: &'a mut [Y],
    },
    turn_tokens(x, tables, half, width, token0, place, y));

/// Turns the tokens from `token0` on, as many as `y` has rows.
#[inline(always)]
fn turn_tokens<X: Element, Y: Element>(
    x: &[X],
    (cos, sin): (&[f32], &[f32]),
    half: usize,
    width: usize,
    token0: usize,
    Place { seq, offset, rotated }: Place,
    y: &mut [Y],
) {
    for (token, (x, y)) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).enumerate() {
        let ((x, x_rest), (y, y_rest)) = (x.split_at(rotated), y.split_at_mut(rotated));
        y_rest.iter_mut().zip(x_rest).for_each(|(y, x)| *y = Y::from_f32(x.to_f32()));
        if rotated == 0 {
            continue;
        }
        let position = (token0 + token) % seq + offset;
        let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
        for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            let ((a, b), (ya, yb)) = (x.split_at(half), y.split_at_mut(half));
            for ((((ya, yb), (a, b)), cos), sin) in ya.iter_mut().zip(yb).zip(a.iter().zip(b)).zip(cos).zip(sin) {
                let (a, b) = (a.to_f32(), b.to_f32());
                *ya = Y::from_f32(a * cos - b * sin);
                *yb = Y::from_f32(b * cos + a * sin);
            }
        }
    }
}

/// Rotary positions as a node: x, cosines, sines. A text starts at position 0.
#[derive(Debug)]
struct RotaryNode {
    rotated: usize,
}

impl NodeOp for RotaryNode {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let (x, cos, sin) = (args.tensor(0)?, args.tensor(1)?, args.tensor(2)?);
        let rotary = Rotary { x, cos, sin, seq: args.seq, offset: 0, rotated: self.rotated, y: args.y };
        args.device.prepare(&rotary)
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let (x, cos, sin) = (args.matrix(0)?, args.matrix(1)?, args.matrix(2)?);
        Ok(rotary::exact(x.view(), (cos.view(), sin.view()), (x.nrows(), 0), self.rotated))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let Some(dx) = args.gradient(0) else { return Ok(Vec::new()) };
        let (cos, sin) = (args.forward.tensor(1)?, args.forward.tensor(2)?);
        let (seq, rotated) = (args.forward.seq, self.rotated);
        Ok(vec![args.forward.device.prepare(&RotaryGrad { cos, sin, seq, offset: 0, rotated, dy: args.dy, dx })?])
    }
}

impl Graph {
    /// Adds the tables of cosines and sines for heads of `head_dim` features and as many positions as texts have
    /// tokens: see [`Rotary::tables`]. All blocks read the same.
    pub fn rotary_tables(&mut self, name: &str, head_dim: usize, theta: f64) -> Result<[ParamId; 2]> {
        let [cos, sin] = Rotary::tables(self.limits().tokens, head_dim, theta)?;
        Ok([self.add_constant(format!("{name}.cos"), cos)?, self.add_constant(format!("{name}.sin"), sin)?])
    }

    /// Adds the turning of the first `rotated` features of each token, which are whole heads.
    pub fn rotary(&mut self, name: &str, x: ValueId, tables: [ParamId; 2], rotated: usize) -> Result<ValueId> {
        let (rows, cols) = (self.value(x).rows, self.value(x).cols);
        let reads = vec![Read::Value(x), Read::Param(tables[0]), Read::Param(tables[1])];
        self.add_node(name, RotaryNode { rotated }, reads, (rows, cols, Precision::Model))
    }
}
