//! Operations: what a device computes.
//!
//! An operation is a struct of its operands, which [`Device::prepare`] checks and binds, once; the [`Prepared`] call
//! runs as often as wanted, alone, recorded into a caller's encoder, or in a row with others ([`Device::submit`]).
//! Tensors are token-major, f32 or f16 in any combination of input and output unless an operation says otherwise;
//! arithmetic and sums are f32. A sequence is `seq` consecutive rows of a tensor, its first tokens real and the rest
//! padding.
//!
//! ```text
//!                     src/ops/<stem>.rs
//!    operands ──────►   struct, check, cost
//!    Device::prepare      ├─ dispatches ──► Program ◄── shaders/<stem>.wgsl      a GPU
//!                         └─ cpu_call ────► CpuCall                              the CPU device
//!                                                 │ y
//!                     tests/ops/<stem>.rs  ◄──────┘ on both kinds of devices
//!                         ▲
//!                         └── exact result and bound: src/reference/<stem>.rs, which shares no code with the others
//! ```
//!
//! # How to add one
//! 1. `src/ops/<stem>.rs`: the struct of operands, which implements [`Operation`]; the type of its GPU program, and
//!    `shaders()`, which lists every text of it; its loops on the CPU. If models are to use it, what it is as a node: a
//!    type that implements [`NodeOp`](crate::graph::NodeOp), and a method of [`Graph`](crate::graph::Graph) that adds
//!    it.
//! 2. `shaders/<stem>.wgsl`: the program. Its header states computation, tile, dispatch grid, workgroup memory and
//!    residues: what is done in edge tiles, which are only partly filled. (GEMMs have several, `gemm_*` and `gemv_*`,
//!    and attention a second one for cooperative matrices.)
//! 3. `src/reference/<stem>.rs`: the exact result in f64, and how far an f32 result may be from it.
//! 4. `tests/ops/<stem>.rs`: both devices against the reference.
//! 5. One line in the list below, [`each_operation!`](crate::each_operation). The modules, the public names, the
//!    programs that compilers and tests iterate all follow from it.
//!
//! Code that several operations need is in `src/kernels` (of GPU programs), `src/cpu` (of loops), `src/engine` (of
//! operands), `src/reference.rs` (of bounds) and `shaders/shared`.
//!
//! # Gradients
//! The gradient of an operation is an operation of its own, in the same four files: `LayerNorm` has `LayerNormGrad`,
//! which takes the operands of the forward, the gradient `dy` of its output and a [`Gradient`] for each operand that
//! has one. A large one is in a module below, `src/ops/<stem>/grad.rs`; its program is `shaders/<stem>_grad.wgsl`.
//! Gradients are f32. The reference has `grad`, the exact gradient in f64, which tests compare with finite differences
//! of `exact` and then with both devices. Nodes of a graph bind it in
//! [`NodeOp::backward`](crate::graph::NodeOp::backward).
//!
//! # Errors
//! An error names the operand that is at fault. Its [shape](Error::is_shape) or its [type](Error::is_dtype) does not
//! fit, it is of [another device](Error::is_mismatch), or the device [cannot bind it at once](Error::is_too_large). Or
//! the error names [what the device lacks](Error::is_unsupported): f16, or workgroup memory. What is written must share
//! no memory with another operand. Outputs without elements are no error. Invariant: a prepared call's operands have
//! the shapes that its kernel indexes, and live on its device; indices are checked where they are used.
//!
//! ```
//! use sparse24::{Attention, DType, Device, Embedding, LayerNorm, Matrix, MeanPooling};
//!
//! // Two sequences of up to four tokens, 12 features, three heads of four.
//! let (batch, seq, d) = (2, 4, 12);
//! let device = Device::cpu()?;
//! let words = device.upload(&Matrix::uniform(100, d, DType::F32, 1)?)?;
//! let ids = device.indices(batch * seq)?;
//! let lengths = device.indices(batch)?;
//! let ones = device.upload(&Matrix::from_f32(1, d, &[1.0; 12])?)?;
//! let zeros = device.zeros(1, d, DType::F32)?;
//! let x = device.zeros(batch * seq, d, DType::F32)?;
//! let normed = device.zeros(batch * seq, d, DType::F32)?;
//! let qkv = device.zeros(batch * seq, 3 * d, DType::F32)?; // a GEMM would fill it
//! let attended = device.zeros(batch * seq, d, DType::F32)?;
//! let pooled = device.zeros(batch, d, DType::F32)?;
//!
//! let calls = [
//!     device.prepare(&Embedding { tables: &[(&words, &ids)], y: &x })?,
//!     device.prepare(&LayerNorm { x: &x, gamma: &ones, beta: &zeros, eps: 1e-12, y: &normed })?,
//!     device.prepare(&Attention::new(&qkv, &lengths, (batch, seq), 3, &attended))?,
//!     device.prepare(&MeanPooling { x: &attended, lengths: &lengths, batch, seq, normalize: true, y: &pooled })?,
//! ];
//! // For each batch of texts: new ids and lengths, one submission.
//! device.write_indices(&ids, &[5, 7, 11, 0, 13, 17, 0, 0])?;
//! device.write_indices(&lengths, &[3, 2])?;
//! device.submit(&calls)?;
//! assert_eq!((device.read(&pooled)?.rows(), device.read(&pooled)?.cols()), (batch, d));
//! # Ok::<(), sparse24::Error>(())
//! ```

use std::sync::Arc;

use crate::cpu::rows::Target;
use crate::cpu::{Cpu, CpuCall};
pub use crate::engine::{Compressed, Cost, Device, Indices, Operand, OperandValue};
use crate::engine::{Inner, Prepared, Tensor, Work, check_devices, check_memory, gpu_size};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::gpu::{BufferRange, Dispatch, Gpu, Scratch};
use crate::kernels::{
    Norm, NormFold, NormFoldParams, NormGrad, NormParams, NormSums, NormSumsParams, Program, WORKGROUP, probes,
};
use crate::matrix::DType;
use crate::plan::grid;

/// The list of operations: the stem of the files and the struct of operands of each. Calls a macro with it.
#[doc(hidden)]
#[macro_export]
macro_rules! each_operation {
    ($do:ident) => {
        $do! {
            activation::Activate
            adamw::AdamW
            attention::Attention
            cached_attention::CachedAttention
            decompress::Decompress
            depthwise::Depthwise
            embedding::Embedding
            gated::Gated
            gemm::Gemm
            im2col::Im2col
            kl_divergence::KlDivergence
            kv_append::KvAppend
            layer_norm::LayerNorm
            mean_pooling::MeanPooling
            pixels::Pixels
            qk_norm::QkNorm
            relative_error::RelativeError
            rms_norm::RmsNorm
            rotary::Rotary
            sparsify::Sparsify
            sum_squares::SumSquares
        }
    };
}

macro_rules! modules {
    ($($stem:ident::$operation:ident)*) => {
        $(
            pub mod $stem;
            pub use $stem::$operation;
        )*

        impl Program {
            /// Every program there is: of each operation, and those that measure and check.
            pub fn all() -> impl Iterator<Item = Self> {
                probes()$(.chain($stem::shaders()))*
            }
        }
    };
}
crate::each_operation!(modules);

impl Program {
    /// What is compiled beside the [`Kernel`](crate::kernels::Kernel)s.
    pub fn helpers() -> impl Iterator<Item = Self> {
        Self::all().filter(|program| program.gemm().is_none())
    }
}

/// What a device can be asked to compute: operands, and how each kind of device goes about it.
///
/// [`Device::prepare`] checks what is true of all operations: that operands belong to the device, that none is bf16,
/// and that nothing that is written shares its memory. The rest is the operation's to [check](Self::check). It is
/// implemented in this crate alone: what devices make of an operation is not public.
pub trait Operation {
    /// Its stem: the name of its files.
    fn name(&self) -> &'static str;

    /// What it reads and writes, by the names that errors use.
    fn operands(&self) -> Vec<Operand<'_>>;

    /// An error, which names what does not fit, unless shapes, types and numbers are what the kernels take.
    fn check(&self) -> Result<()>;

    /// What it must do at least. Lengths of sequences are data on a device, so sequences count as whole.
    fn cost(&self) -> Cost;

    /// Its dispatches on a GPU. Its operands have been checked.
    #[doc(hidden)]
    fn dispatches(&self, gpu: &Gpu) -> Result<Vec<Dispatch>>;

    /// The call that computes it on the CPU device. Its operands have been checked.
    #[doc(hidden)]
    fn cpu_call(&self, cpu: &Cpu) -> Result<Box<dyn CpuCall>>;
}

impl Device {
    /// Checks an operation's operands and binds them. Everything that a call needs is allocated here.
    pub fn prepare(&self, operation: &impl Operation) -> Result<Prepared> {
        let operands = operation.operands();
        check_devices(self, &operands)?;
        operation.check()?;
        check_memory(&operands)?;
        let work = match self.inner() {
            Inner::Gpu(gpu) => Work::Gpu(operation.dispatches(gpu)?),
            Inner::Cpu(cpu) => Work::Cpu(Arc::from(operation.cpu_call(cpu)?)),
        };
        Ok(Prepared::new(self, operation.cost(), work))
    }
}

/// Where a gradient goes: a tensor of the shape of what it is the gradient of.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// f32. Shares no memory with another operand.
    pub to: &'a Tensor,
    /// Whether the gradient is added to what is there, in place of overwriting it.
    pub add: bool,
}

impl<'a> Gradient<'a> {
    /// It as an operand that is written.
    pub(crate) fn operand(&self, name: &'static str) -> Operand<'a> {
        Operand::write(name, self.to)
    }

    /// An error unless it has this shape and is f32.
    pub(crate) fn check(&self, name: &str, shape: (usize, usize)) -> Result<()> {
        expect_shape(name, self.to.shape(), shape)?;
        expect_dtype(name, self.to.dtype(), DType::F32)
    }

    /// It as loops on the CPU write it.
    pub(crate) fn on_cpu(&self) -> Result<Target> {
        Ok(Target { to: self.to.on_cpu()?, add: self.add })
    }
}

/// An error unless each of the tensors that a gradient is computed from is f32.
fn check_f32(operands: &[(&'static str, &Tensor)]) -> Result<()> {
    operands.iter().try_for_each(|(name, tensor)| expect_dtype(name, tensor.dtype(), DType::F32))
}

/// One dispatch of a program, or none where there are no workgroups.
fn dispatch(
    gpu: &Gpu,
    program: Program,
    workgroups: usize,
    params: &impl bytemuck::NoUninit,
    operands: &[Option<BufferRange<'_>>],
) -> Result<Vec<Dispatch>> {
    if workgroups == 0 {
        return Ok(Vec::new());
    }
    let grid = grid(workgroups, 1, &gpu.info().caps)?;
    Ok(vec![gpu.dispatch(&program, grid, params, operands)?])
}

/// What is true of every normalisation over the features of each token: `y` is like `x`, each of the tensors in
/// `per_feature` has an f32 for every feature, and `eps` is a finite number from 0 on.
fn check_norm(x: &Tensor, per_feature: &[(&'static str, &Tensor)], eps: f32, y: &Tensor) -> Result<()> {
    expect_shape("y", y.shape(), x.shape())?;
    for (what, tensor) in per_feature {
        expect_shape(what, tensor.shape(), (1, x.cols()))?;
        expect_dtype(what, tensor.dtype(), DType::F32)?;
    }
    if !(eps >= 0.0 && eps.is_finite()) {
        return Err(Error::invalid(format!("eps is {eps}, not a finite number from 0 on")));
    }
    Ok(())
}

/// The dispatches of a normalisation's gradients: of `x`, and of the factors per feature, and of the addends where
/// there are such. The first one leaves a mean and a factor of each token, from which the others sum over the tokens.
fn norm_grad(
    gpu: &Gpu,
    norm: Norm,
    (x, gamma, eps, dy): (&Tensor, &Tensor, f32, &Tensor),
    dx: Option<Gradient<'_>>,
    gradients: &[Option<Gradient<'_>>],
) -> Result<Vec<Dispatch>> {
    let (tokens, width) = (gpu_size("tokens", x.rows())?, gpu_size("features of a token", x.cols())?);
    let bytes = 8 * x.rows() as u64;
    let statistics = gpu.scratch(Scratch::Packed, bytes)?;
    let statistics = Some(BufferRange { buffer: &statistics, offset: 0, bytes });
    let kernel = NormGrad::new(norm, width, dx.map(|dx| dx.add));
    let params = NormParams { tokens, epsilon: eps };
    let operands = [x.on_gpu(), dx.and_then(|dx| dx.to.on_gpu()), gamma.on_gpu(), dy.on_gpu(), statistics];
    let mut dispatches = dispatch(gpu, Program::new(kernel), kernel.workgroups(x.rows()), &params, &operands)?;
    if gradients.iter().all(Option::is_none) || width == 0 {
        return Ok(dispatches);
    }
    let kernel = NormSums::new(width, gradients.len() as u32);
    let params = NormSumsParams { tokens, block: NormSums::block(tokens) };
    let blocks = tokens.div_ceil(params.block);
    let bytes = 4 * u64::from(blocks) * x.cols() as u64 * gradients.len() as u64;
    let parts = gpu.scratch(Scratch::Partial, bytes)?;
    let parts = Some(BufferRange { buffer: &parts, offset: 0, bytes });
    let workgroups = blocks as usize * x.cols().div_ceil(WORKGROUP);
    let operands = [x.on_gpu(), dy.on_gpu(), statistics, parts];
    dispatches.extend(dispatch(gpu, Program::new(kernel), workgroups, &params, &operands)?);
    for (first, gradient) in gradients.iter().enumerate() {
        if let Some(Gradient { to, add }) = gradient {
            let params = NormFoldParams { width, blocks, first: first as u32, sums: gradients.len() as u32 };
            let operands = [parts, to.on_gpu()];
            dispatches.extend(dispatch(
                gpu,
                Program::new(NormFold::new(*add)),
                x.cols().div_ceil(WORKGROUP),
                &params,
                &operands,
            )?);
        }
    }
    Ok(dispatches)
}

/// A cost of so many operations that moves all of these operands once.
fn cost_of(flops: f64, operands: &[Operand<'_>]) -> Cost {
    Cost { flops, bytes: operands.iter().map(|operand| operand.bytes() as f64).sum() }
}
