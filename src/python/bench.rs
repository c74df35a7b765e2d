//! Measurements: each product is verified before it is timed, as by `sparse24 bench`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use sparse24::measure::{self, Case, PlannedBy, Policy, Request};
use sparse24::models::{LAYER_SHAPES, LayerShape};
use sparse24::{Matrix, Op, VectorLen};

use crate::arrays::dtype as dtype_of;
use crate::device::Device;
use crate::errors::to_py;
use crate::process::interruptible;

/// Measures the operations of one layer together, and returns the records as JSON. Operations are names as in `Record`,
/// each with its vector length if it has one.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "Python's side names them all and gives them defaults")]
pub(crate) fn bench(
    py: Python<'_>,
    device: &Device,
    name: String,
    shape: (usize, usize, usize),
    dtype: &str,
    ops: Vec<(String, Option<usize>)>,
    quick: bool,
    seed: u64,
) -> PyResult<String> {
    let (dtype, device) = (dtype_of(dtype)?, device.device.clone());
    let ops: Vec<_> = ops.iter().map(|(op, vector)| operation(op, *vector)).collect::<PyResult<_>>()?;
    let policy = if quick { Policy::QUICK } else { Policy::FULL };
    let (m, n, k) = shape;
    interruptible(py, move || {
        let problem = |op| sparse24::Problem::linear(op, m, n, k, dtype);
        let request = |(op, planned_by)| {
            let plan = match planned_by {
                PlannedBy::Auto => device.plan_or_dense(&problem(op)),
                _ => device.plan(&problem(op)),
            };
            plan.map(|plan| Request { op, plan, planned_by })
        };
        let requests: Vec<Request> = ops.into_iter().map(request).collect::<sparse24::Result<_>>()?;
        measure::fits_into_memory(&device, shape, dtype, &requests)?;
        // Activations need another seed than weights, whichever.
        let case = Case { name, w: Matrix::uniform(m, k, dtype, seed)?, x: Matrix::uniform(n, k, dtype, !seed)? };
        let records = measure::run(&device, &case, &requests, &policy, seed, |_| ())?;
        serde_json::to_string(&records).map_err(|e| sparse24::Error::invalid(e.to_string()))
    })
}

/// An operation by name, and who plans it.
fn operation(name: &str, vector: Option<usize>) -> PyResult<(Op, PlannedBy)> {
    let vector = VectorLen::new(vector.unwrap_or(1)).map_err(to_py)?;
    Ok(match name {
        "dense" => (Op::Dense, PlannedBy::Planner),
        "sparse24" => (Op::Sparse24(vector), PlannedBy::Planner),
        "auto" => (Op::Sparse24(vector), PlannedBy::Auto),
        "masked" => (Op::Masked, PlannedBy::Planner),
        "masked24" => (Op::Masked24, PlannedBy::Planner),
        other => {
            let reason = format!("operation {other:?} is not one of dense, sparse24, auto, masked, masked24");
            return Err(PyValueError::new_err(reason));
        }
    })
}

/// Name, output and input features of the layers of well-known models, by the model's name.
#[pyfunction]
pub(crate) fn layer_shapes() -> Vec<(&'static str, Vec<LayerShape>)> {
    LAYER_SHAPES.iter().map(|(model, layers)| (*model, layers.to_vec())).collect()
}
