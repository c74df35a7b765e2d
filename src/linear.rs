//! A layer's weights in whichever form runs them best: what an inference engine holds.
//!
//! [`Linear`] owns compressed weights on a device and plans for each number of tokens by itself. Where the planner
//! expects 2:4 to lose, it makes a dense copy of the weights on the device, once, and uses that; [`Plan::explain`] says
//! so. The planner goes by estimates until the device is [tuned](crate::tune). The compressed weights stay on the host
//! too, and a layer that is called with many tokens and with few may hold both forms on the device.
//! Invariant: weights on the device are those of the host's [`Sparse24`], whatever their form.

use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::{Device, Io, Prepared, Weights};
use crate::error::{Error, Result};
use crate::format::Sparse24;
use crate::matrix::DType;
use crate::plan::Plan;
use crate::problem::{Epilogue, Op, Problem};

/// A linear layer with 2:4 weights. Cloning gives another handle to the same weights.
///
/// ```
/// use sparse24::*;
/// let device = Device::cpu()?;
/// let w = Matrix::from_f32(2, 4, &[3.0, 1.0, 2.0, 0.0, 0.0, 5.0, 0.0, 4.0])?;
/// let compressed = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE)?)?;
/// let layer = device.linear(&compressed, Epilogue::NONE);
///
/// let x = device.upload(&Matrix::from_f32(1, 4, &[1.0, 1.0, 1.0, 1.0])?)?;
/// let y = device.zeros(1, 2, DType::F32)?;
/// let call = layer.prepare(&Io { x: &x, bias: None, residual: None, y: &y })?;
/// call.run()?; // as often as wanted: x and y stay where they are
/// assert_eq!(device.read(&y)?, Matrix::from_f32(1, 2, &[5.0, 9.0])?);
/// println!("{}", layer.plan(1, DType::F32)?.explain());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear(Arc<Layer>);

#[derive(Debug)]
struct Layer {
    device: Device,
    /// Kept to make the other form from.
    host: Sparse24,
    epilogue: Epilogue,
    forms: Mutex<Forms>,
}

#[derive(Debug, Default)]
struct Forms {
    sparse: Option<Weights>,
    dense: Option<Weights>,
}

impl Device {
    /// A layer with these weights. They are uploaded when the first call is prepared, in the form that its number of
    /// tokens wants. bf16 weights become f32.
    pub fn linear(&self, w: &Sparse24, epilogue: Epilogue) -> Linear {
        Linear(Arc::new(Layer { device: self.clone(), host: w.clone(), epilogue, forms: Mutex::default() }))
    }
}

impl Linear {
    /// How `n` tokens would be multiplied into an output of this type. An error names what the device lacks, or the
    /// operand that is too large for it.
    pub fn plan(&self, n: usize, output: DType) -> Result<Plan> {
        let problem = self.problem(n, output);
        self.0.device.plan_or_dense(&problem)
    }

    fn problem(&self, n: usize, output: DType) -> Problem {
        let Layer { host, epilogue, .. } = &*self.0;
        let storage = match host.dtype() {
            DType::Bf16 => DType::F32,
            own => own,
        };
        let problem = Problem::linear(Op::Sparse24(host.vector()), host.m(), n, host.k(), storage);
        Problem { output, epilogue: *epilogue, ..problem }
    }

    /// Plans for the tokens in `io.x`, uploads the weights in the form that the plan wants unless they are there, and
    /// binds the operands. X and Y are as in the linear form, with bias and residual as the epilogue wants; errors are
    /// those of [`Linear::plan`] and [`Device::prepare`]. Where the device has no room for dense weights, 2:4 ones are
    /// used.
    pub fn prepare(&self, io: &Io<'_>) -> Result<Prepared> {
        let device = &self.0.device;
        let plan = self.plan(io.x.rows(), io.y.dtype())?;
        match self.weights(plan.weights()) {
            Ok(weights) => device.prepare(&plan, &weights, io),
            Err(Error::OutOfMemory(_) | Error::TooLarge { .. }) if plan.weights() == Op::Dense => {
                let plan = device.plan(&self.problem(io.x.rows(), io.y.dtype()))?;
                device.prepare(&plan, &self.weights(plan.weights())?, io)
            }
            Err(e) => Err(e),
        }
    }

    /// The weights in the form of one operation, uploaded if they are not there yet.
    fn weights(&self, op: Op) -> Result<Weights> {
        let Layer { device, host, forms, .. } = &*self.0;
        // Held over the upload, so that two threads do not both make it. A panic leaves both forms as they were.
        let mut forms = forms.lock().unwrap_or_else(PoisonError::into_inner);
        let (form, upload): (_, &dyn Fn() -> Result<Weights>) = match op {
            Op::Dense => (&mut forms.dense, &|| device.upload_dense(&host.decompress())),
            _ => (&mut forms.sparse, &|| device.upload_sparse24(host)),
        };
        match form {
            Some(weights) => Ok(weights.clone()),
            None => Ok(form.insert(upload()?).clone()),
        }
    }

    /// Bytes that the weights take on the device now: of one form or of both.
    pub fn bytes(&self) -> usize {
        let forms = self.0.forms.lock().unwrap_or_else(PoisonError::into_inner);
        [&forms.sparse, &forms.dense].into_iter().flatten().map(Weights::bytes).sum()
    }
}
