//! Layers.

use std::sync::{Mutex, PoisonError};

use numpy::PyReadonlyArray1;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use sparse24::{Activation, DType, Elements, Epilogue, GemmOperands, HostWeights, Matrix, Prepared, Tensor};

use crate::arrays::{Array, Numbers, dtype as dtype_of, to_array};
use crate::device::Device;
use crate::errors::to_py;
use crate::process::{self, Owned};
use crate::sparse::Sparse24;

/// Numbers of tokens for which a layer keeps what was bound: a prompt's, a token's and some more.
const KEPT: usize = 4;

/// A linear layer on a device, with what was bound for the last few numbers of tokens.
#[pyclass(module = "sparse24", frozen)]
pub(crate) struct Linear {
    device: Owned<sparse24::Device>,
    layer: Owned<sparse24::Linear>,
    m: usize,
    k: usize,
    dtype: DType,
    /// The last used first.
    calls: Owned<Mutex<Vec<Call>>>,
}

/// A call for one number of tokens, with its operands.
struct Call {
    tokens: usize,
    x: Tensor,
    y: Tensor,
    call: Prepared,
}

/// Weights of either form.
#[derive(FromPyObject)]
enum Weights<'py> {
    Sparse24(PyRef<'py, Sparse24>),
    Dense(Array<'py>),
}

#[pymethods]
impl Linear {
    #[new]
    fn new(
        py: Python<'_>,
        device: &Device,
        w: Weights<'_>,
        dtype: &str,
        bias: Option<PyReadonlyArray1<'_, f32>>,
        activation: &str,
        dense_fallback: bool,
    ) -> PyResult<Self> {
        process::enter()?;
        let w: HostWeights = match w {
            Weights::Sparse24(w) => (&w.matrix).into(),
            Weights::Dense(w) => w.matrix(dtype_of(dtype)?)?.into(),
        };
        let named = Activation::ALL.into_iter().find(|named| named.name() == activation);
        let activation = named.ok_or_else(|| {
            let names = Activation::ALL.map(Activation::name).join(", ");
            PyValueError::new_err(format!("activation {activation:?} is not one of {names}"))
        })?;
        let bias = match bias {
            Some(bias) => {
                let bias = bias.as_slice().map_err(|e| PyTypeError::new_err(e.to_string()))?;
                if bias.len() != w.m() {
                    let reason = format!("bias has {} elements, the layer {} outputs", bias.len(), w.m());
                    return Err(PyValueError::new_err(reason));
                }
                Some(Matrix::from_f32(1, bias.len(), bias).map_err(to_py)?)
            }
            None => None,
        };
        let device = device.device.clone();
        let (m, k) = (w.m(), w.k());
        let dtype = if w.dtype() == DType::F16 { DType::F16 } else { DType::F32 };
        let layer = py.detach(|| -> sparse24::Result<_> {
            let mut layer = device.linear(w, Epilogue { activation, ..Epilogue::NONE });
            if let Some(bias) = bias {
                layer = layer.with_bias(&device.upload(&bias)?);
            }
            Ok(if dense_fallback { layer } else { layer.no_dense_fallback() })
        });
        let (layer, device) = (Owned::new(layer.map_err(to_py)?), Owned::new(device));
        Ok(Self { device, layer, m, k, dtype, calls: Owned::new(Mutex::default()) })
    }

    /// Output and input features.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.m, self.k)
    }

    /// Of the activations that it takes; bf16 ones are widened to f32 for it.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// Bytes of its weights on the device.
    #[getter]
    fn nbytes(&self) -> usize {
        self.layer.bytes()
    }

    /// Which kernel would take so many tokens, and why.
    fn explain(&self, tokens: usize) -> PyResult<String> {
        Ok(self.layer.plan(tokens, self.dtype).map_err(to_py)?.explain().to_string())
    }

    /// Y for X.
    fn forward<'py>(&self, py: Python<'py>, x: Array<'py>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
        process::enter()?;
        let (tokens, k) = x.shape();
        if k != self.k {
            let reason = format!("x has {k} features, the layer takes {}", self.k);
            return Err(PyValueError::new_err(reason));
        }
        let given = dtype_of(dtype)?;
        let x = x.numbers(given)?;
        let y = match tokens {
            0 => Elements::zeros(given, 0),
            _ => py.detach(|| self.run(tokens, x)).map_err(to_py)?,
        };
        to_array(py, y, [tokens, self.m])
    }
}

impl Linear {
    fn run(&self, tokens: usize, x: Numbers<'_>) -> sparse24::Result<Elements> {
        let dtype = match x {
            Numbers::F16(_) => DType::F16,
            Numbers::F32(_) | Numbers::Bf16(_) => DType::F32,
        };
        if dtype != self.dtype {
            // The crate's own words for it.
            let zeros = self.device.zeros(1, self.k, dtype)?;
            return self.layer.forward(&zeros).and_then(|y| self.device.read(&y)).map(Matrix::into_elements);
        }
        // Held until the output is read: another thread's call would write over it.
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        match calls.iter().position(|call| call.tokens == tokens) {
            Some(place) => calls[..=place].rotate_right(1),
            None => {
                let call = self.bind(tokens)?;
                calls.truncate(KEPT - 1);
                calls.insert(0, call);
            }
        }
        let Call { x: to, y, call, .. } = &calls[0];
        match x {
            Numbers::F32(x) => self.device.write_slice(to, x)?,
            Numbers::F16(x) => self.device.write_slice(to, x)?,
            Numbers::Bf16(x) => {
                let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
                self.device.write_slice(to, &wide)?;
            }
        }
        call.run()?;
        let y = self.device.read(y)?;
        Ok(if matches!(x, Numbers::Bf16(_)) { y.cast(DType::Bf16) } else { y }.into_elements())
    }

    fn bind(&self, tokens: usize) -> sparse24::Result<Call> {
        let x = self.device.zeros(tokens, self.k, self.dtype)?;
        let y = self.device.zeros(tokens, self.m, self.dtype)?;
        let call = self.layer.prepare(&GemmOperands::new(&x, &y))?;
        Ok(Call { tokens, x, y, call })
    }
}
