//! A layer's weights in whichever form runs them best: what an inference engine holds.
//!
//! [`Linear`] owns weights on a device, dense, compressed or masked, and plans for each number of tokens by itself. For
//! compressed weights, unless the planner expects 2:4 to be faster by a margin, it makes a dense copy on the device,
//! once, and uses that; [`Plan::explain`] says so. The planner goes by estimates until the device is
//! [tuned](crate::tune). Compressed weights stay on the host too, and such a layer that is called with many tokens and
//! with few may hold both forms on the device. Dense and masked ones leave the host when they are uploaded.
//! Invariant: weights on the device are those that the layer was made with, whatever their form.
//!
//! Layers are joined by their activations, which stay on the device: `tests/examples/mlp.rs` is a multilayer perceptron
//! of a 2:4, a masked and a dense layer in one submission.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::{Device, Prepared, Tensor, Weights};
use crate::error::{Error, Result};
use crate::matrix::DType;
use crate::ops::Gemm;
use crate::ops::gemm::GemmOperands;
use crate::plan::Plan;
use crate::problem::{Epilogue, Op, Problem};
use crate::weights::HostWeights;

/// A linear layer. Cloning gives another handle to the same weights.
///
/// ```
/// use sparse24::*;
/// let device = Device::cpu()?;
/// let w = Matrix::from_f32(2, 4, &[3.0, 1.0, 2.0, 0.0, 0.0, 5.0, 0.0, 4.0])?;
/// let compressed = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE)?)?;
/// let layer = device.linear(&compressed, Epilogue::NONE);
///
/// let x = device.upload(&Matrix::from_f32(1, 4, &[1.0, 1.0, 1.0, 1.0])?)?;
/// assert_eq!(device.read(&layer.forward(&x)?)?, Matrix::from_f32(1, 2, &[5.0, 9.0])?);
///
/// // An engine plans, allocates and binds once, and runs as often as it wants: x and y stay where they are.
/// let y = device.zeros(1, 2, DType::F32)?;
/// let call = layer.prepare(&GemmOperands::new(&x, &y))?;
/// call.run()?;
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 2, &[5.0, 9.0])?);
/// println!("{}", layer.plan(1, DType::F32)?.explain());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    layer: Arc<Layer>,
    epilogue: Epilogue,
    bias: Option<Tensor>,
    no_dense_fallback: bool,
}

#[derive(Debug)]
struct Layer {
    device: Device,
    /// How the weights were given. Kept here because `Forms::host` may be dropped.
    op: Op,
    m: usize,
    k: usize,
    dtype: DType,
    forms: Mutex<Forms>,
}

#[derive(Debug)]
struct Forms {
    /// Compressed weights: kept, to make the dense copy from. Others: dropped after the upload.
    host: Option<Arc<HostWeights>>,
    /// On the device, uploaded as given.
    own: Option<Weights>,
    /// The dense copy of compressed weights.
    dense: Option<Weights>,
}

impl Device {
    /// A layer with these weights: a [`Matrix`](crate::Matrix), a [`Sparse24`](crate::Sparse24), or any
    /// [`HostWeights`]. They are uploaded when the first call is prepared, compressed ones in the form that its number
    /// of tokens wants. bf16 weights become f32.
    pub fn linear(&self, w: impl Into<HostWeights>, epilogue: Epilogue) -> Linear {
        self.linear_of(Arc::new(w.into()), epilogue)
    }

    /// The same with weights that others hold, too.
    pub(crate) fn linear_of(&self, w: Arc<HostWeights>, epilogue: Epilogue) -> Linear {
        let dtype = match w.dtype() {
            DType::Bf16 => DType::F32,
            own => own,
        };
        let layer = Layer {
            device: self.clone(),
            op: w.op(),
            m: w.m(),
            k: w.k(),
            dtype,
            forms: Mutex::new(Forms { host: Some(w), own: None, dense: None }),
        };
        Linear { layer: Arc::new(layer), epilogue, bias: None, no_dense_fallback: false }
    }
}

impl Linear {
    /// The same layer, on the same weights, that takes no dense ones in place of 2:4: to see what 2:4 alone does.
    pub fn no_dense_fallback(&self) -> Self {
        Self { no_dense_fallback: true, ..self.clone() }
    }

    /// The same layer, on the same weights, that adds this bias of `1 x m` f32 in every call that is given none.
    pub fn with_bias(&self, bias: &Tensor) -> Self {
        let epilogue = Epilogue { bias: true, ..self.epilogue };
        Self { epilogue, bias: Some(bias.clone()), ..self.clone() }
    }

    /// How the weights were given.
    pub fn op(&self) -> Op {
        self.layer.op
    }

    /// What is done to its product before it is stored.
    pub fn epilogue(&self) -> Epilogue {
        self.epilogue
    }

    /// How `n` tokens would be multiplied into an output of this type. An error names what the device lacks, or the
    /// operand that is too large for it.
    pub fn plan(&self, n: usize, output: DType) -> Result<Plan> {
        let problem = self.problem(n, output);
        match self.layer.op {
            Op::Sparse24(_) if !self.no_dense_fallback => self.layer.device.plan_or_dense(&problem),
            _ => self.layer.device.plan(&problem),
        }
    }

    fn problem(&self, n: usize, output: DType) -> Problem {
        let Layer { op, m, k, dtype, .. } = *self.layer;
        Problem { output, epilogue: self.epilogue, ..Problem::linear(op, m, n, k, dtype) }
    }

    /// Y (`n x m`, of X's type) for X (`n x k`), both on the device: plans, allocates and runs. Every call does all of
    /// it, where [`Linear::prepare`] does it once. A layer with a residual must use `prepare`. Errors are those of
    /// `prepare`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.layer.device.zeros(x.rows(), self.layer.m, x.dtype())?;
        self.prepare(&GemmOperands::new(x, &y))?.run()?;
        Ok(y)
    }

    /// Plans for the tokens in `operands.x`, uploads the weights in the form that the plan wants unless they are there,
    /// and binds the operands. X and Y are as in the linear form, with bias and residual as the epilogue wants. Errors
    /// are those of [`Linear::plan`], [`Device::upload_weights`] and [`Device::prepare`]. Where the device has no room
    /// for the dense copy of 2:4 weights, the 2:4 weights themselves are used.
    pub fn prepare(&self, operands: &GemmOperands<'_>) -> Result<Prepared> {
        let Layer { device, op, .. } = &*self.layer;
        let operands = GemmOperands { bias: operands.bias.or(self.bias.as_ref()), ..*operands };
        let tokens = operands.x.rows();
        let plan = self.plan(tokens, operands.y.dtype())?;
        match self.weights(plan.weights()) {
            Ok(weights) => device.prepare(&Gemm { plan: &plan, weights: &weights, operands }),
            // Dense weights may be too large for what 2:4 ones fit into.
            Err(e) if (e.is_out_of_memory() || e.is_too_large()) && plan.weights() != *op => {
                let plan = device.plan(&self.problem(tokens, operands.y.dtype()))?;
                device.prepare(&Gemm { plan: &plan, weights: &self.weights(plan.weights())?, operands })
            }
            Err(e) => Err(e),
        }
    }

    /// The weights in the form that `op` says, uploaded if they are not there yet.
    fn weights(&self, op: Op) -> Result<Weights> {
        let device = &self.layer.device;
        // Held over the upload, so that two threads do not both make it. A panic leaves all forms as they were.
        let mut forms = self.forms();
        let Forms { host, own, dense } = &mut *forms;
        let form = if op == self.layer.op { own } else { dense };
        if let Some(weights) = form {
            return Ok(weights.clone());
        }
        let uploaded = match host.as_deref() {
            Some(w) if w.op() == op => device.upload_weights(w)?,
            Some(HostWeights::Sparse24(w)) if op == Op::Dense => device.upload_weights(&w.decompress().into())?,
            // A layer's plans take the weights as they were given, or dense ones in place of 2:4.
            _ => return Err(Error::invalid(format!("a layer of {} has no weights for {op}", self.layer.op))),
        };
        if !matches!(host.as_deref(), Some(HostWeights::Sparse24(_))) {
            *host = None;
        }
        Ok(form.insert(uploaded).clone())
    }

    fn forms(&self) -> MutexGuard<'_, Forms> {
        self.layer.forms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that the weights take on the device now: of one form or of both.
    pub fn bytes(&self) -> usize {
        let forms = self.forms();
        [&forms.own, &forms.dense].into_iter().flatten().map(Weights::bytes).sum()
    }
}
