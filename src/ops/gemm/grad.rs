//! Gradients of a linear layer, Y = X·Wᵀ + bias, whose weights are trained.
//!
//! [`TrainableWeights`] holds the kept weights as a matrix of f32, in the order of the format, and beside them the form
//! that products read. What is pruned has no number that could move: the gradient, the optimiser's state and the values
//! all have the shape of what is kept, so that 2:4 weights stay 2:4 and cost half of what dense ones do. Masked weights
//! are held in full, zero where they are masked, and so is their gradient. After an optimiser's step [`Repack`] brings
//! the values into the form of the products.
//!
//! ```text
//!   values ──Repack──► weights ──Gemm──► y
//!     ▲                   └──GemmGradX──► dx = dy·W            half the multiply-adds of dense from V = 8 on
//!   AdamW ◄─── dvalues ◄──GemmGradW── x, dy                    of the kept weights alone
//! ```
//! Invariant: values and codes are those of one matrix, and the form of the products is, too, once [`Repack`] has run.

use std::sync::{Arc, RwLock};

use super::super::{Cost, Gradient, Operand, Operation, cost_of, dispatch};
use super::grad_kernels::{
    Factor, GradKernel, GradParams, RepackKernel, RepackParams, SumRowsKernel, SumRowsParams, TILE,
};
use super::{Gemm, GemmOperands};
use crate::cpu::{Cpu, CpuCall, CpuWeights, Shared, read, write};
use crate::engine::{Device, Indices, Prepared, Tensor, Weights, gpu_size};
use crate::error::{Result, expect_dtype, expect_shape};
use crate::format::Sparse24;
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::{Program, WORKGROUP};
use crate::layout;
use crate::matrix::{DType, Element, Elements, Matrix};
use crate::problem::{Epilogue, Op, Problem};
use crate::weights::HostWeights;

/// Weights of a linear layer that change while calls are bound to them. Cloning shares them.
#[derive(Clone, Debug)]
pub struct TrainableWeights {
    /// As they were given: their form, and where what is kept lies.
    given: Arc<HostWeights>,
    values: Tensor,
    /// Codes of 2:4 weights, bits of a mask.
    words: Indices,
    weights: Weights,
}

impl TrainableWeights {
    /// Uploads f32 weights, as values and as products read them. An error if they are of another type, or a mask has
    /// another shape than its weights.
    pub fn new(device: &Device, w: Arc<HostWeights>) -> Result<Self> {
        expect_dtype("weights to be trained", w.dtype(), DType::F32)?;
        let (values, words) = match &*w {
            // A binding has a word at least.
            HostWeights::Dense(w) => (w.clone(), vec![0]),
            HostWeights::Sparse24(w) => (Matrix::new(w.m(), w.k_physical(), w.values().clone())?, w.meta().to_vec()),
            // With zeros where the mask is: an optimiser that sees no gradient there leaves them.
            HostWeights::Masked(..) | HostWeights::Masked24(..) => {
                (w.to_dense()?, w.mask().map(|mask| mask.words().to_vec()).unwrap_or_default())
            }
        };
        // Of a mask's weights the products get the same zeros, so that gradients read them without the mask.
        let weights = match &*w {
            HostWeights::Masked(_, mask) => {
                device.upload_weights(&HostWeights::Masked(values.clone(), mask.clone()))?
            }
            HostWeights::Masked24(_, mask) => {
                device.upload_weights(&HostWeights::Masked24(values.clone(), mask.clone()))?
            }
            HostWeights::Dense(_) | HostWeights::Sparse24(_) => device.upload_weights(&w)?,
        };
        let indices = device.indices(words.len())?;
        device.write_indices(&indices, &words)?;
        Ok(Self { given: w, values: device.upload(&values)?, words: indices, weights })
    }

    /// What is kept, row by row: all weights of dense and masked ones, two of every four of 2:4 ones.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The operation of their products.
    pub fn op(&self) -> Op {
        self.given.op()
    }

    /// Output and input features.
    pub fn shape(&self) -> (usize, usize) {
        (self.given.m(), self.given.k())
    }

    /// The weights as they are on the device now, in the form in which they were given.
    pub fn read(&self, device: &Device) -> Result<HostWeights> {
        let values = device.read(&self.values)?;
        Ok(match &*self.given {
            HostWeights::Dense(_) => HostWeights::Dense(values),
            HostWeights::Masked(_, mask) => HostWeights::Masked(values, mask.clone()),
            HostWeights::Masked24(_, mask) => HostWeights::Masked24(values, mask.clone()),
            HostWeights::Sparse24(w) => {
                let values = values.elements().clone();
                HostWeights::Sparse24(Sparse24::from_parts(w.m(), w.k(), w.vector(), values, w.meta().to_vec())?)
            }
        })
    }

    /// The call of the product Y = X·Wᵀ, with bias and residual as the epilogue wants.
    pub fn product(&self, device: &Device, epilogue: Epilogue, operands: GemmOperands<'_>) -> Result<Prepared> {
        let (m, k) = self.shape();
        let problem = Problem { epilogue, ..Problem::linear(self.op(), m, operands.x.rows(), k, DType::F32) };
        let plan = device.plan(&problem)?;
        device.prepare(&Gemm { plan: &plan, weights: &self.weights, operands })
    }

    fn operands(&self) -> [Operand<'_>; 3] {
        [
            Operand::read("values", &self.values),
            Operand::read("words", &self.words),
            Operand::read("weights", &self.weights),
        ]
    }

    /// Sizes as kernels count them.
    fn params(&self, n: usize) -> Result<GradParams> {
        let (m, k) = self.shape();
        Ok(GradParams {
            m: gpu_size("output features", m)?,
            n: gpu_size("tokens", n)?,
            k: gpu_size("input features", k)?,
        })
    }

    /// Additions and multiplications of a product of `n` tokens with what is kept.
    fn flops(&self, n: usize) -> f64 {
        2.0 * n as f64 * self.values.rows() as f64 * self.values.cols() as f64
    }
}

/// The gradient of a product's activations: `dx = dy·W`.
#[derive(Clone, Copy, Debug)]
pub struct GemmGradX<'a> {
    /// W, `m x k`.
    pub weights: &'a TrainableWeights,
    /// `n x m`, f32.
    pub dy: &'a Tensor,
    /// `n x k`.
    pub dx: Gradient<'a>,
}

/// The gradient of a product's weights, of those that are kept: `dw = dyᵀ·x`.
#[derive(Clone, Copy, Debug)]
pub struct GemmGradW<'a> {
    /// W, `m x k`, whose codes or mask say what is kept.
    pub weights: &'a TrainableWeights,
    /// `n x k`, f32.
    pub x: &'a Tensor,
    /// `n x m`, f32.
    pub dy: &'a Tensor,
    /// Like [`TrainableWeights::values`].
    pub dw: Gradient<'a>,
}

/// The gradient of a bias: the sum of `dy` over tokens.
#[derive(Clone, Copy, Debug)]
pub struct BiasGrad<'a> {
    /// `n x m`, f32.
    pub dy: &'a Tensor,
    /// `1 x m`.
    pub dbias: Gradient<'a>,
}

/// Brings the values of trained weights into the form that products read.
#[derive(Clone, Copy, Debug)]
pub struct Repack<'a> {
    /// Whose.
    pub weights: &'a TrainableWeights,
}

impl Operation for GemmGradX<'_> {
    fn name(&self) -> &'static str {
        "gemm_grad_x"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let own = [Operand::read("dy", self.dy), self.dx.operand("dx")];
        self.weights.operands().into_iter().chain(own).collect()
    }

    fn check(&self) -> Result<()> {
        let (m, k) = self.weights.shape();
        expect_shape("dy", self.dy.shape(), (self.dy.rows(), m))?;
        expect_dtype("dy", self.dy.dtype(), DType::F32)?;
        self.dx.check("dx", (self.dy.rows(), k))
    }

    fn cost(&self) -> Cost {
        let operands =
            [Operand::read("values", &self.weights.values), Operand::read("dy", self.dy), self.dx.operand("dx")];
        cost_of(self.weights.flops(self.dy.rows()), &operands)
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { weights, dy, dx } = *self;
        let (params, tiles) = (weights.params(dy.rows())?, dy.rows().div_ceil(TILE) * weights.shape().1.div_ceil(TILE));
        let kernel = GradKernel { of: Factor::X, op: weights.op(), add: dx.add };
        let operands = [weights.values.on_gpu(), weights.words.on_gpu(), dy.on_gpu(), dx.to.on_gpu()];
        dispatch(gpu, Program::new(kernel), tiles, &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { weights, dy, dx } = self;
        let weights = weights.weights.on_cpu()?;
        Ok(Box::new(CallX { weights, dy: dy.on_cpu()?, add: dx.add, dx: dx.to.on_cpu()? }))
    }
}

impl Operation for GemmGradW<'_> {
    fn name(&self) -> &'static str {
        "gemm_grad_w"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        let own = [Operand::read("x", self.x), Operand::read("dy", self.dy), self.dw.operand("dw")];
        self.weights.operands().into_iter().chain(own).collect()
    }

    fn check(&self) -> Result<()> {
        let (m, k) = self.weights.shape();
        expect_shape("x", self.x.shape(), (self.x.rows(), k))?;
        expect_shape("dy", self.dy.shape(), (self.x.rows(), m))?;
        expect_dtype("x", self.x.dtype(), DType::F32)?;
        expect_dtype("dy", self.dy.dtype(), DType::F32)?;
        self.dw.check("dw", self.weights.values.shape())
    }

    fn cost(&self) -> Cost {
        let operands = [Operand::read("x", self.x), Operand::read("dy", self.dy), self.dw.operand("dw")];
        cost_of(self.weights.flops(self.dy.rows()), &operands)
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { weights, x, dy, dw } = *self;
        let (m, k) = weights.shape();
        let kernel = GradKernel { of: Factor::W, op: weights.op(), add: dw.add };
        let operands = [weights.words.on_gpu(), x.on_gpu(), dy.on_gpu(), dw.to.on_gpu()];
        let tiles = m.div_ceil(TILE) * k.div_ceil(TILE);
        dispatch(gpu, Program::new(kernel), tiles, &weights.params(x.rows())?, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        let Self { weights, x, dy, dw } = self;
        Ok(Box::new(CallW {
            given: Arc::clone(&weights.given),
            weights: weights.weights.on_cpu()?,
            x: x.on_cpu()?,
            dy: dy.on_cpu()?,
            add: dw.add,
            dw: dw.to.on_cpu()?,
        }))
    }
}

impl Operation for BiasGrad<'_> {
    fn name(&self) -> &'static str {
        "bias_grad"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("dy", self.dy), self.dbias.operand("dbias")]
    }

    fn check(&self) -> Result<()> {
        expect_dtype("dy", self.dy.dtype(), DType::F32)?;
        self.dbias.check("dbias", (1, self.dy.cols()))
    }

    fn cost(&self) -> Cost {
        cost_of(self.dy.rows() as f64 * self.dy.cols() as f64, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let Self { dy, dbias } = *self;
        let params = SumRowsParams { rows: gpu_size("tokens", dy.rows())?, cols: gpu_size("features", dy.cols())? };
        let (kernel, operands) = (SumRowsKernel { add: dbias.add }, [dy.on_gpu(), dbias.to.on_gpu()]);
        dispatch(gpu, Program::new(kernel), dy.cols().div_ceil(WORKGROUP), &params, &operands)
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        Ok(Box::new(CallBias { dy: self.dy.on_cpu()?, add: self.dbias.add, dbias: self.dbias.to.on_cpu()? }))
    }
}

impl Operation for Repack<'_> {
    fn name(&self) -> &'static str {
        "repack"
    }

    fn operands(&self) -> Vec<Operand<'_>> {
        vec![Operand::read("values", &self.weights.values), Operand::write("weights", &self.weights.weights)]
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn cost(&self) -> Cost {
        cost_of(0.0, &self.operands())
    }

    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>> {
        let TrainableWeights { given, values, weights, .. } = self.weights;
        let (m, k) = self.weights.shape();
        let caps = &gpu.info().caps;
        // As they were cut when they were uploaded.
        let limit = caps.binding_bytes.min(caps.buffer_bytes);
        let rows = layout::pieces(given.op(), m, k, DType::F32, limit).unwrap_or_default();
        let cols = values.cols();
        let calls = rows.into_iter().zip(weights.on_gpu()?).map(|(rows, piece)| {
            let params = RepackParams {
                rows: gpu_size("rows", rows.len())?,
                row0: gpu_size("rows", rows.start)?,
                cols: gpu_size("columns", cols)?,
                units: gpu_size("units", layout::units(given.op(), k))?,
            };
            let [packed, _] = piece.bindings();
            let workgroups = (rows.len() * cols).div_ceil(WORKGROUP);
            dispatch(gpu, Program::new(RepackKernel), workgroups, &params, &[values.on_gpu(), packed])
        });
        Ok(calls.collect::<Result<Vec<_>>>()?.concat())
    }

    fn cpu_call(&self, _: &Cpu) -> Result<Box<dyn CpuCall>> {
        Ok(Box::new(CallRepack { values: self.weights.values.on_cpu()?, weights: self.weights.weights.on_cpu()? }))
    }
}

/// The numbers of two inputs and an output, all f32.
macro_rules! with_f32 {
    ([$($input:ident),*], $output:ident => $body:expr) => {
        // Other types are refused when the call is prepared.
        if let ($(Some($input),)* Elements::F32($output)) = ($(f32::of($input.elements()),)* $output.elements_mut()) {
            $body
        }
    };
}

#[derive(Debug)]
struct CallX {
    weights: Arc<RwLock<CpuWeights>>,
    dy: Shared,
    add: bool,
    dx: Shared,
}

impl CpuCall for CallX {
    fn run(&self, cpu: &Cpu) {
        let (weights, dy, mut dx) = (read(&self.weights), read(&self.dy), write(&self.dx));
        with_f32!([dy], dx => cpu.grad_x(&weights, dy, self.add, dx));
    }
}

#[derive(Debug)]
struct CallW {
    given: Arc<HostWeights>,
    weights: Arc<RwLock<CpuWeights>>,
    x: Shared,
    dy: Shared,
    add: bool,
    dw: Shared,
}

impl CpuCall for CallW {
    fn run(&self, cpu: &Cpu) {
        let (weights, x, dy, mut dw) = (read(&self.weights), read(&self.x), read(&self.dy), write(&self.dw));
        let shape = (self.given.m(), self.given.k());
        with_f32!([x, dy], dw => match self.given.mask() {
            None if self.given.op() == Op::Dense => cpu.grad_w(shape, x, dy, self.add, dw),
            None => cpu.grad_values(&weights, x, dy, self.add, dw),
            Some(mask) => {
                cpu.grad_w(shape, x, dy, self.add, dw);
                let k = shape.1.max(1);
                cpu.each_chunk(dw, k, |row, dw| {
                    dw.iter_mut().enumerate().filter(|(column, _)| !mask.get(row, *column)).for_each(|(_, dw)| *dw = 0.0);
                });
            }
        });
    }
}

#[derive(Debug)]
struct CallBias {
    dy: Shared,
    add: bool,
    dbias: Shared,
}

impl CpuCall for CallBias {
    fn run(&self, cpu: &Cpu) {
        let (dy, mut dbias) = (read(&self.dy), write(&self.dbias));
        with_f32!([dy], dbias => cpu.sum_rows(dy, self.add, dbias));
    }
}

#[derive(Debug)]
struct CallRepack {
    values: Shared,
    weights: Arc<RwLock<CpuWeights>>,
}

impl CpuCall for CallRepack {
    fn run(&self, cpu: &Cpu) {
        let (values, mut weights) = (read(&self.values), write(&self.weights));
        if let Some(values) = f32::of(values.elements()) {
            cpu.repack(&mut weights, values);
        }
    }
}
