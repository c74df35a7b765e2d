//! Rotary positions: features turned by angles that depend on a token's position.
//!
//! Invariant: a position past the end of the tables reads their last row.

mod grad;

use std::fmt;

use bytemuck::{Pod, Zeroable};
use ndarray::Array2;

use super::{Cost, Indices, Operand, Operation, cost_of, dispatch};
use crate::cpu::rows::{TASK_TOKENS, each_pair, work};
use crate::cpu::{Cpu, CpuCall, Shared, SharedIndices, read, write};
use crate::engine::{Prepared, Tensor, gpu_size};
use crate::error::{Error, Result, checked_mul, expect_dtype, expect_len, expect_shape};
use crate::gpu::{Dispatch, Gpu};
use crate::graph::{BackwardArgs, Graph, Input, NodeArgs, NodeOp, ParamId, Precision, Read, ReferenceArgs, ValueId};
use crate::kernels::{Binding, Caps, ParamsLayout, Primitives, Program, Shader, Text, Types, WORKGROUP, fields};
use crate::matrix::{DType, Element, Matrix};
use crate::reference::rotary;

pub use grad::{RotaryGrad, RotaryGradKernel};

/// Rotary positions (J. Su et al. 2021, [arXiv:2104.09864](https://arxiv.org/abs/2104.09864)), with the halves of a head
/// turned against each other, as Hugging Face's Llama has them: for feature `c` of the first half of a head of `h`
/// features, `y[c] = x[c]·cos - x[c + h/2]·sin` and `y[c + h/2] = x[c + h/2]·cos + x[c]·sin`, with the tables' numbers
/// for the token's position and `c`.
///
/// A position at or past the end of the tables reads their last row: how long a text may be is for the caller to check.
///
/// ```
/// use sparse24::{DType, Device, Matrix, Rotary};
/// let device = Device::cpu()?;
/// // One head of two features; position 1 is turned by one radian.
/// let [cos, sin] = Rotary::tables(2, &Rotary::frequencies(2, 10000.0), 1.0)?.map(|table| device.upload(&table));
/// let positions = device.indices(2)?;
/// device.write_indices(&positions, &[0, 1])?;
/// let x = device.upload(&Matrix::from_f32(2, 2, &[1.0, 0.0, 1.0, 0.0])?)?;
/// let y = device.zeros(2, 2, DType::F32)?;
/// device.prepare(&Rotary { x: &x, cos: &cos?, sin: &sin?, positions: &positions, rotated: 2, y: &y })?.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(2, 2, &[1.0, 0.0, 1f32.cos(), 1f32.sin()])?);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// `tokens x d`.
    pub x: &'a Tensor,
    /// Cosines, f32, a row of `h/2` for each position from 0 on.
    pub cos: &'a Tensor,
    /// Sines, f32, of the same shape.
    pub sin: &'a Tensor,
    /// The position of each row of `x`.
    pub positions: &'a Indices,
    /// How many of a token's first features are turned: whole heads. The others are copied.
    pub rotated: usize,
    /// `tokens x d`, overwritten. Not the memory of `x`.
    pub y: &'a Tensor,
}

impl Rotary<'_> {
    /// The frequencies of a head of `head_dim` features, in radians for each position: `theta^(-2c / head_dim)` for
    /// each feature `c` of its first half.
    pub fn frequencies(head_dim: usize, theta: f64) -> Vec<f64> {
        (0..head_dim / 2).map(|c| theta.powf(-2.0 * c as f64 / head_dim as f64)).collect()
    }

    /// Cosines and sines for so many positions, each `positions x frequencies`: those of the angle `position ·
    /// frequency`, times `scale`, in f64 and then rounded to f32. `scale` is 1 but for YaRN (B. Peng et al. 2023,
    /// [arXiv:2309.00071](https://arxiv.org/abs/2309.00071)), whose attention factor it is.
    pub fn tables(positions: usize, frequencies: &[f64], scale: f64) -> Result<[Matrix; 2]> {
        checked_mul("rotary positions", positions, frequencies.len())?;
        let angle = |position: usize| frequencies.iter().map(move |frequency| position as f64 * frequency);
        let angles: Vec<f64> = (0..positions).flat_map(angle).collect();
        let table = |of: fn(f64) -> f64| {
            let numbers: Vec<f32> = angles.iter().map(|&angle| (of(angle) * scale) as f32).collect();
            Matrix::from_f32(positions, frequencies.len(), &numbers)
        };
        Ok([table(f64::cos)?, table(f64::sin)?])
    }
}

impl Operation for Rotary<'_> {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let Self { x, cos, sin, positions, y, .. } = *self;
        let tables = [Operand::read("cos", cos), Operand::read("sin", sin), Operand::read("positions", positions)];
        [Operand::read("x", x), Operand::write("y", y)].into_iter().chain(tables).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { x, cos, sin, positions, rotated, y } = *self;
        expect_shape("y", y.shape(), x.shape())?;
        check_tables(x, (cos, sin), positions, rotated)
    }

    /// Two products and a sum for each turned feature.
    fn cost(&self) -> Cost {
        cost_of(3.0 * self.x.rows() as f64 * self.rotated as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { x, cos, sin, positions, rotated, y } = *self;
        let half = gpu_size("features of a head", cos.cols())?;
        let kernel = RotaryKernel::new(half, x.dtype(), y.dtype())?;
        let params = Params::new(x, cos, rotated)?;
        let items = x.rows() * (x.cols() - rotated / 2);
        let operands = [x.on_gpu(), y.on_gpu(), cos.on_gpu(), sin.on_gpu(), positions.on_gpu()];
        dispatch(gpu, Program::new(kernel), items.div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { x, cos, sin, positions, rotated, y } = *self;
        let sizes = Sizes { width: x.cols(), rotated, half: cos.cols() };
        let [x, cos, sin, y] = [x.on_cpu()?, cos.on_cpu()?, sin.on_cpu()?, y.on_cpu()?];
        Ok(Box::new(Call { x, cos, sin, positions: positions.on_cpu()?, sizes, y }))
    }
}

/// Mirror of `Params` in shaders/rotary.wgsl and rotary_grad.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    rotated: u32,
    last: u32,
}

impl Params {
    /// Of the tokens of `x` and a table.
    fn new(x: &Tensor, cos: &Tensor, rotated: usize) -> Result<Self> {
        Ok(Self {
            tokens: gpu_size("tokens", x.rows())?,
            width: gpu_size("features of a token", x.cols())?,
            rotated: gpu_size("features of a token", rotated)?,
            // Where nothing is turned, a table may have no rows, and none is read.
            last: gpu_size("positions", cos.rows().saturating_sub(1))?,
        })
    }
}

/// An error unless cosines and sines are of one shape and have a row, `x` has a position for each token, and its turned
/// features are whole heads.
fn check_tables(x: &Tensor, (cos, sin): (&Tensor, &Tensor), positions: &Indices, rotated: usize) -> Result<()> {
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
    if cos.rows() == 0 && rotated > 0 && x.rows() > 0 {
        return Err(Error::invalid("cos has no rows: there is no position to turn tokens by"));
    }
    expect_len("positions", positions.len(), x.rows())
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
                Binding::read(5, "positions"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width rotated last)
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

/// Features of a token, how many of the first of them are turned, and half of a head's.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    width: usize,
    rotated: usize,
    half: usize,
}

impl Sizes {
    /// The cosines and sines of a position, of which the tables have at least one.
    #[inline(always)]
    fn of_position<'a>(self, (cos, sin): (&'a [f32], &'a [f32]), position: u32) -> (&'a [f32], &'a [f32]) {
        let last = (cos.len() / self.half).saturating_sub(1);
        let start = (position as usize).min(last) * self.half;
        (&cos[start..][..self.half], &sin[start..][..self.half])
    }
}

#[derive(Debug)]
struct Call {
    x: Shared,
    cos: Shared,
    sin: Shared,
    positions: SharedIndices,
    sizes: Sizes,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let (x, cos, sin, positions) = (read(&self.x), read(&self.cos), read(&self.sin), read(&self.positions));
        let (Some(cos), Some(sin)) = (f32::of(cos.elements()), f32::of(sin.elements())) else { return };
        let (tables, sizes, task) = ((cos, sin), self.sizes, TASK_TOKENS * self.sizes.width);
        each_pair!(x.elements(), write(&self.y).elements_mut(), (x, y) => cpu.each_chunk(y, task, |i, y| {
            let (x, positions) = (&x[i * task..][..y.len()], &positions[i * TASK_TOKENS..]);
            cpu.simd().run(TurnTokens { x, tables, positions, sizes, y });
        }));
    }
}

work!(TurnTokens<X, Y>, {
        x: &'a [X],
        tables: (&'a [f32], &'a [f32]),
        positions: &'a [u32],
        sizes: Sizes,
        y: &'a mut [Y],
    },
    turn_tokens(x, tables, positions, sizes, y));

/// Turns some tokens, as many as `y` has rows.
#[inline(always)]
fn turn_tokens<X: Element, Y: Element>(
    x: &[X],
    tables: (&[f32], &[f32]),
    positions: &[u32],
    sizes: Sizes,
    y: &mut [Y],
) {
    let Sizes { width, rotated, half } = sizes;
    for ((x, y), &position) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(positions) {
        let ((x, x_rest), (y, y_rest)) = (x.split_at(rotated), y.split_at_mut(rotated));
        y_rest.iter_mut().zip(x_rest).for_each(|(y, x)| *y = Y::from_f32(x.to_f32()));
        if rotated == 0 {
            continue;
        }
        let (cos, sin) = sizes.of_position(tables, position);
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

/// Rotary positions as a node: x, cosines, sines, positions. A text starts at position 0.
#[derive(Debug)]
struct RotaryNode {
    rotated: usize,
}

impl NodeOp for RotaryNode {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let (x, cos, sin, positions) = (args.tensor(0)?, args.tensor(1)?, args.tensor(2)?, args.indices(3)?);
        args.device.prepare(&Rotary { x, cos, sin, positions, rotated: self.rotated, y: args.y })
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let (x, cos, sin) = (args.matrix(0)?, args.matrix(1)?, args.matrix(2)?);
        Ok(rotary::exact(x.view(), (cos.view(), sin.view()), args.indices(3)?, self.rotated))
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let Some(dx) = args.gradient(0) else { return Ok(Vec::new()) };
        let (cos, sin, positions) = (args.forward.tensor(1)?, args.forward.tensor(2)?, args.forward.indices(3)?);
        let grad = RotaryGrad { cos, sin, positions, rotated: self.rotated, dy: args.dy, dx };
        Ok(vec![args.forward.device.prepare(&grad)?])
    }
}

impl Graph {
    /// Adds the tables of cosines and sines for these frequencies and as many positions as texts have tokens: see
    /// [`Rotary::tables`] and [`Rotary::frequencies`]. All blocks read the same.
    pub fn rotary_tables(&mut self, name: &str, frequencies: &[f64], scale: f64) -> Result<[ParamId; 2]> {
        let [cos, sin] = Rotary::tables(self.limits().tokens, frequencies, scale)?;
        Ok([self.add_constant(format!("{name}.cos"), cos)?, self.add_constant(format!("{name}.sin"), sin)?])
    }

    /// Adds the turning of the first `rotated` features of each token, which are whole heads, by its position in its
    /// text.
    pub fn rotary(&mut self, name: &str, x: ValueId, tables: [ParamId; 2], rotated: usize) -> Result<ValueId> {
        let (rows, cols) = (self.value(x).rows, self.value(x).cols);
        let positions = Read::Input(Input::Positions { first: 0, padding_idx: None });
        let reads = vec![Read::Value(x), Read::Param(tables[0]), Read::Param(tables[1]), positions];
        self.add_node(name, RotaryNode { rotated }, reads, (rows, cols, Precision::Model))
    }
}
