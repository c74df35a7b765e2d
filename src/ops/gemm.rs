//! The GEMM: what a [`Plan`] decided, bound to operands.
//!
//! Which kernel runs, and in which steps, is the plan's; its kernels are in [`crate::kernels`] and, on the CPU, in
//! `src/cpu`. Here each step's operands are bound. Invariant: the steps of a prepared call cover the plan's problem, on
//! operands of its shapes and types.

mod grad;
mod grad_kernels;

use std::sync::{Arc, RwLock};

use ndarray::Array2;

pub use self::grad::{BiasGrad, GemmGradW, GemmGradX, Repack, TrainableWeights};
use super::activation::{Activate, ActivateGrad};
use super::{Cost, Gradient, Operand, Operation, cost_of};
use crate::cpu::{Cpu, CpuCall, CpuOperands, CpuWeights, Shared, read, write};
use crate::engine::{Piece, Prepared, Tensor, Weights};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::gpu::{BufferRange, Dispatch, Gpu, Scratch};
use crate::graph::{
    BackwardArgs, Graph, NodeArgs, NodeOp, ParamId, ParamKind, Precision, Read, ReferenceArgs, StoredTensor, ValueId,
};
use crate::kernels::{Kernel, Program, helpers};
use crate::matrix::{DType, Element};
use crate::plan::{Activations, Algorithm, CpuSchedule, Plan, Step, Target, WeightOperand};
use crate::problem::{Activation, Epilogue, Problem};
use crate::reference::gemm;

/// A product with its epilogue, as a plan says: Y = act(X·Wᵀ + bias) + residual, or the plain form.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// How the problem is solved; made for this kind of device.
    pub plan: &'a Plan,
    /// W, in the form that the plan wants: [`Plan::weights`].
    pub weights: &'a Weights,
    /// The other operands.
    pub operands: GemmOperands<'a>,
}

/// The operands of a GEMM beside the weights.
#[derive(Clone, Copy, Debug)]
pub struct GemmOperands<'a> {
    /// X (`n x k`) in the linear form, B (`k x n`) in the plain one.
    pub x: &'a Tensor,
    /// One f32 per output feature, `1 x m`; given if and only if the plan's epilogue adds it.
    pub bias: Option<&'a Tensor>,
    /// A matrix of the output's shape and type; given if and only if the plan's epilogue adds it.
    pub residual: Option<&'a Tensor>,
    /// Y (`n x m`) or C (`m x n`), overwritten. Must share no memory with the others.
    pub y: &'a Tensor,
}

impl<'a> GemmOperands<'a> {
    /// X and Y, without bias and residual.
    pub fn new(x: &'a Tensor, y: &'a Tensor) -> Self {
        Self { x, bias: None, residual: None, y }
    }

    /// With this bias.
    pub fn bias(self, bias: &'a Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// With this residual.
    pub fn residual(self, residual: &'a Tensor) -> Self {
        Self { residual: Some(residual), ..self }
    }
}

/// Every kernel, and what runs before and after it.
pub(crate) fn shaders() -> impl Iterator<Item = Program> {
    Kernel::all().map(Program::from).chain(helpers()).chain(grad_kernels::shaders())
}

impl Operation for Gemm<'_> {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let GemmOperands { x, bias, residual, y } = self.operands;
        let added = [("bias", bias), ("residual", residual)];
        let added = added.into_iter().filter_map(|(name, tensor)| Some(Operand::read(name, tensor?)));
        let given = [Operand::read("weights", self.weights), Operand::read("x", x), Operand::write("y", y)];
        given.into_iter().chain(added).collect()
    }

    fn check(&self) -> Result<()> {
        let Self { plan, weights, operands } = *self;
        let problem = plan.problem();
        let Problem { m, k, storage, output, epilogue, .. } = *problem;
        if weights.op() != plan.weights() {
            return Err(Error::mismatch("weights", format!("{:?}", weights.op()), format!("{:?}", plan.weights())));
        }
        expect_shape("weights", weights.shape(), (m, k))?;
        expect_dtype("weights", weights.dtype(), storage)?;
        expect_shape("x", operands.x.shape(), problem.x_shape())?;
        expect_dtype("x", operands.x.dtype(), storage)?;
        expect_shape("y", operands.y.shape(), problem.y_shape())?;
        expect_dtype("y", operands.y.dtype(), output)?;
        for (what, tensor, wanted, shape, dtype) in [
            ("bias", operands.bias, epilogue.bias, (1, m), DType::F32),
            ("residual", operands.residual, epilogue.residual, problem.y_shape(), output),
        ] {
            if tensor.is_some() != wanted {
                let word = |given| if given { "with" } else { "without" };
                return Err(Error::mismatch(
                    format!("operands {} {what}", word(tensor.is_some())),
                    format!("a plan {} {what}", word(tensor.is_some())),
                    format!("one {} {what}", word(wanted)),
                ));
            }
            if let Some(tensor) = tensor {
                expect_shape(what, tensor.shape(), shape)?;
                expect_dtype(what, tensor.dtype(), dtype)?;
            }
        }
        Ok(())
    }

    fn cost(&self) -> Cost {
        cost_of(self.plan.problem().effective_flops(), &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { plan, weights, operands } = self;
        let Algorithm::Gpu(_) = plan.algorithm() else { return Err(foreign_plan("the CPU device", "a GPU")) };
        let (packed, partial) = plan.scratch_bytes();
        let scratch = |which, bytes: u64| (bytes > 0).then(|| gpu.scratch(which, bytes)).transpose();
        let bind = Bind {
            problem: plan.problem(),
            pieces: weights.on_gpu()?,
            operands,
            packed: scratch(Scratch::Packed, packed)?,
            partial: scratch(Scratch::Partial, partial)?,
            scratch_bytes: (packed, partial),
        };
        plan.steps(&gpu.info().caps)?.iter().map(|step| bind.dispatch(gpu, step)).collect()
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { plan, weights, operands } = self;
        let Algorithm::Cpu(algorithm) = plan.algorithm() else { return Err(foreign_plan("a GPU", "the CPU device")) };
        Ok(Box::new(Call {
            problem: *plan.problem(),
            schedule: algorithm.schedule(),
            weights: weights.on_cpu()?,
            x: operands.x.on_cpu()?,
            bias: operands.bias.map(Tensor::on_cpu).transpose()?,
            residual: operands.residual.map(Tensor::on_cpu).transpose()?,
            y: operands.y.on_cpu()?,
        }))
    }
}

fn foreign_plan(got: &str, expected: &str) -> Error {
    Error::mismatch("plan", got, expected)
}

#[derive(Debug)]
struct Call {
    problem: Problem,
    schedule: CpuSchedule,
    weights: Arc<RwLock<CpuWeights>>,
    x: Shared,
    bias: Option<Shared>,
    residual: Option<Shared>,
    y: Shared,
}

impl CpuCall for Call {
    fn run(&self, cpu: &Cpu) {
        let weights = read(&self.weights);
        let x = read(&self.x);
        let bias = self.bias.as_deref().map(read);
        let residual = self.residual.as_deref().map(read);
        let mut y = write(&self.y);
        let operands = CpuOperands {
            weights: &weights,
            x: &x,
            bias: bias.as_ref().and_then(|b| f32::of(b.elements())),
            residual: residual.as_ref().map(|r| r.elements()),
        };
        cpu.gemm(&self.problem, self.schedule, &operands, y.elements_mut());
    }
}

/// What the steps of a plan are bound to.
struct Bind<'a> {
    problem: &'a Problem,
    pieces: &'a [Piece],
    operands: &'a GemmOperands<'a>,
    packed: Option<wgpu::Buffer>,
    partial: Option<wgpu::Buffer>,
    scratch_bytes: (u64, u64),
}

impl Bind<'_> {
    /// Binds a step's operands, in the order of its program's bindings: packing and reducing have fewer than kernels.
    fn dispatch(&self, gpu: &Gpu, step: &Step) -> Result<Dispatch> {
        let Problem { m, n, k, storage, output, .. } = *self.problem;
        let packed = self.packed.as_ref().map(|buffer| BufferRange { buffer, offset: 0, bytes: self.scratch_bytes.0 });
        let partial =
            self.partial.as_ref().map(|buffer| BufferRange { buffer, offset: 0, bytes: self.scratch_bytes.1 });
        let x = match &step.x {
            Activations::Nothing => None,
            Activations::Given(tokens) => self.operands.x.part_on_gpu(tokens, n, k * storage.bytes()),
            Activations::Packed => packed,
        };
        let (residual, y) = match &step.y {
            Target::Packed => (None, packed),
            Target::Partial => (None, partial),
            Target::Output(tokens) => {
                let token_bytes = m * output.bytes();
                let residual = self.operands.residual.and_then(|tensor| tensor.part_on_gpu(tokens, n, token_bytes));
                (residual, self.operands.y.part_on_gpu(tokens, n, token_bytes))
            }
        };
        let bias = self.operands.bias.and_then(Tensor::on_gpu);
        let [bias, residual] = [bias, residual].map(|operand| operand.filter(|_| step.epilogue));
        let own = match step.weights {
            WeightOperand::Nothing => vec![x],
            WeightOperand::Partial => vec![partial],
            WeightOperand::Piece(piece) => {
                let [values, words] = self.pieces[piece].bindings();
                vec![values, words, x]
            }
        };
        gpu.dispatch(&step.program, step.grid, &step.params, &[&own[..], &[bias, residual, y]].concat())
    }
}

/// A linear layer as a node: x, weights, and the bias and the residual that its epilogue adds.
#[derive(Debug)]
struct GemmNode {
    epilogue: Epilogue,
}

impl NodeOp for GemmNode {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared> {
        let Epilogue { bias, residual, .. } = self.epilogue;
        let residual = residual.then(|| args.tensor(2 + usize::from(bias))).transpose()?;
        let bias = bias.then(|| args.tensor(2)).transpose()?;
        args.linear(1)?.prepare(&GemmOperands { x: args.tensor(0)?, bias, residual, y: args.y })
    }

    fn saves(&self) -> bool {
        self.epilogue.activation != Activation::None
    }

    fn prepare_saving(&self, args: &NodeArgs<'_>, saved: Option<&Tensor>) -> Result<Vec<Prepared>> {
        let NodeArgs { device, y, .. } = *args;
        let Epilogue { bias, activation, residual } = self.epilogue;
        let residual = residual.then(|| args.tensor(2 + usize::from(bias))).transpose()?;
        let bias = bias.then(|| args.tensor(2)).transpose()?;
        let (weights, x) = (args.trainable(1)?, args.tensor(0)?);
        let Some(z) = saved else {
            return Ok(vec![weights.product(device, self.epilogue, GemmOperands { x, bias, residual, y })?]);
        };
        let plain = Epilogue { activation: Activation::None, residual: false, ..self.epilogue };
        Ok(vec![
            weights.product(device, plain, GemmOperands { x, bias, residual: None, y: z })?,
            device.prepare(&Activate { activation, x: z, residual, y })?,
        ])
    }

    /// Of dy the activation's gradient comes first, in the place of the node's value, and then those of weights, bias,
    /// activations and residual.
    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let NodeArgs { device, y, .. } = args.forward;
        let Epilogue { bias, activation, residual } = self.epilogue;
        let (weights, x) = (args.forward.trainable(1)?, args.forward.tensor(0)?);
        let mut calls = Vec::new();
        let dz = match args.saved {
            Some(z) => {
                let dx = Gradient { to: y, add: false };
                calls.push(device.prepare(&ActivateGrad { activation, x: z, dy: args.dy, dx })?);
                y
            }
            None => args.dy,
        };
        if let Some(dw) = args.gradient(1) {
            calls.push(device.prepare(&GemmGradW { weights, x, dy: dz, dw })?);
        }
        if let Some(dbias) = args.gradient(2).filter(|_| bias) {
            calls.push(device.prepare(&BiasGrad { dy: dz, dbias })?);
        }
        if let Some(dx) = args.gradient(0) {
            calls.push(device.prepare(&GemmGradX { weights, dy: dz, dx })?);
        }
        if let Some(dx) = args.gradient(2 + usize::from(bias)).filter(|_| residual) {
            // What is added is handed on as it is.
            calls.push(device.prepare(&ActivateGrad { activation: Activation::None, x: args.dy, dy: args.dy, dx })?);
        }
        Ok(calls)
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>> {
        let Epilogue { bias, activation, residual } = self.epilogue;
        let residual = residual.then(|| args.matrix(2 + usize::from(bias))).transpose()?;
        let bias = bias.then(|| args.row(2)).transpose()?;
        let (x, w) = (args.matrix(0)?.view(), args.matrix(1)?.view());
        Ok(gemm::exact(x, w, bias.as_deref(), activation, residual.map(|residual| residual.view())))
    }

    fn epilogue(&self) -> Epilogue {
        self.epilogue
    }
}

/// A linear layer to be added to a graph: `act(x Wᵀ + bias) + residual`.
#[derive(Clone, Debug)]
pub struct LinearSpec<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Its activations.
    pub x: ValueId,
    /// Output features.
    pub m: usize,
    /// The stored layers that it is made of, one under the other, such as Q, K and V: names and output features. Itself
    /// if there are none.
    pub parts: Vec<(String, usize)>,
    /// Whether it has a bias.
    pub bias: bool,
    /// What is done to the product.
    pub activation: Activation,
    /// What is added to it then.
    pub residual: Option<ValueId>,
}

impl<'a> LinearSpec<'a> {
    /// A layer of one stored tensor with a bias, and nothing after it.
    pub fn new(name: &'a str, x: ValueId, m: usize) -> Self {
        Self { name, x, m, parts: Vec::new(), bias: true, activation: Activation::None, residual: None }
    }
}

impl Graph {
    /// Adds a linear layer, by the parameters `{name}.weight` and `{name}.bias`.
    pub fn linear(&mut self, linear: LinearSpec<'_>) -> Result<ValueId> {
        let LinearSpec { name, x, m, parts, bias, activation, residual } = linear;
        let k = self.value(x).cols;
        let parts = if parts.is_empty() { vec![(name.to_owned(), m)] } else { parts };
        let weights = self.add_param(format!("{name}.weight"), ParamKind::Weights, (m, k))?;
        // Weights may lack their `.weight`.
        let stored = |(name, m): &(String, usize)| StoredTensor {
            names: vec![format!("{name}.weight"), name.clone()],
            shape: vec![*m, k],
        };
        self.set_stored(weights, parts.iter().map(stored).collect());
        let bias = if bias {
            let bias = self.add_param(format!("{name}.bias"), ParamKind::Matrix(Precision::F32), (1, m))?;
            let stored =
                |(name, m): &(String, usize)| StoredTensor { names: vec![format!("{name}.bias")], shape: vec![*m] };
            self.set_stored(bias, parts.iter().map(stored).collect());
            Some(bias)
        } else {
            None
        };
        self.gemm(name, x, (weights, bias), activation, residual)
    }

    /// Adds a product by weights, and a bias if there is one, that the graph has already.
    pub(crate) fn gemm(
        &mut self,
        name: &str,
        x: ValueId,
        (weights, bias): (ParamId, Option<ParamId>),
        activation: Activation,
        residual: Option<ValueId>,
    ) -> Result<ValueId> {
        let (rows, m) = (self.value(x).rows, self.param(weights).rows);
        let epilogue = Epilogue { bias: bias.is_some(), activation, residual: residual.is_some() };
        let params = [weights].into_iter().chain(bias).map(Read::Param);
        let reads = [Read::Value(x)].into_iter().chain(params).chain(residual.map(Read::Value)).collect();
        self.add_node(name, GemmNode { epilogue }, reads, (rows, m, Precision::Model))
    }

    /// Adds a language model's last layer, without a bias, whose weights [stay dense](ParamKind::DenseWeights), and
    /// makes its logits, one for each token of the vocabulary, the graph's output. It is stored as `{name}.weight`, or
    /// as the tensor that it is tied to.
    pub fn lm_head(&mut self, name: &str, x: ValueId, tied_to: Option<&str>) -> Result<ValueId> {
        let (rows, k, m) = (self.value(x).rows, self.value(x).cols, self.limits().vocabulary);
        let weights = self.add_param(format!("{name}.weight"), ParamKind::DenseWeights, (m, k))?;
        if let Some(tensor) = tied_to {
            self.set_stored(weights, vec![StoredTensor { names: vec![tensor.to_owned()], shape: vec![m, k] }]);
        }
        let reads = vec![Read::Value(x), Read::Param(weights)];
        let logits = self.add_node(name, GemmNode { epilogue: Epilogue::NONE }, reads, (rows, m, Precision::F32))?;
        self.add_output(logits);
        Ok(logits)
    }
}
