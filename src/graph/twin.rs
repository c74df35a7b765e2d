//! The f64 twin of a graph: the same walk over its nodes by the twins of their operations, text by text.
//!
//! It shares no arithmetic with the devices: plain loops and f64 matrix products over the host's parameters, 2:4 ones
//! by a walk over their (value, code) pairs. Texts are not padded, so that what the devices do with padding is checked
//! too. What it takes from the graph is which nodes there are; that they are the right ones is checked against other
//! programs (tests/vectors). Invariant: nothing of [`engine`](crate::engine) is used here.

use ndarray::{Array2, Axis, concatenate};

use super::checkpoint::{Checkpoint, HostParam};
use super::{Input, Read, ReferenceArgs, ReferenceOperand, ValueId};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::weights::HostWeights;

/// Values of texts, one after the other: rows of tokens without padding, or a row for each text. An error if a text is
/// no input of the model.
///
/// ```
/// use sparse24::graph::{Checkpoint, Model, twin};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::{Activation, DType, Device};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// let checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
/// let output = checkpoint.graph().outputs()[0];
/// let expected = &twin::values(&checkpoint, &[output], &[[1, 2, 3]])?[0];
/// let got = Model::new(&Device::cpu()?, &checkpoint)?.forward(1, 3)?.run_on(&[[1, 2, 3]])?;
/// assert!(expected.indexed_iter().all(|((r, c), e)| (f64::from(got.get(r, c)) - e).abs() < 1e-5));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn values<T: AsRef<[u32]>>(checkpoint: &Checkpoint, of: &[ValueId], texts: &[T]) -> Result<Vec<Array2<f64>>> {
    let graph = checkpoint.graph();
    for (i, text) in texts.iter().enumerate() {
        graph.check_ids(text.as_ref()).map_err(|e| e.of_text(i))?;
    }
    // By node, then by text, so that one parameter at a time is there in f64.
    let mut values: Vec<Vec<Array2<f64>>> = Vec::new();
    for (at, node) in graph.nodes().iter().enumerate() {
        let params: Vec<_> = node.params().map(|param| exact(checkpoint.param(param))).collect();
        let of_text = |(i, text): (usize, &T)| {
            let inputs: Vec<Vec<u32>> = node.reads.iter().map(|read| numbers(read, text.as_ref())).collect();
            let mut params = params.iter();
            let operand = |(read, numbers)| match read {
                &Read::Value(ValueId(at)) => values.get(at).and_then(|of| of.get(i)).map(ReferenceOperand::Matrix),
                Read::Param(_) => params.next().map(ReferenceOperand::Matrix),
                Read::Input(_) => Some(ReferenceOperand::Indices(numbers)),
            };
            let operands: Option<Vec<_>> =
                node.reads.iter().zip(inputs.iter().map(Vec::as_slice)).map(operand).collect();
            let operands = operands.ok_or_else(|| Error::invalid(format!("{} reads what is not there", node.name)))?;
            node.op.exact(&ReferenceArgs(operands))
        };
        values.push(texts.iter().enumerate().map(of_text).collect::<Result<_>>()?);
        let live = graph.live_at(at + 1);
        for (id, value) in values.iter_mut().enumerate() {
            if !live.contains(&ValueId(id)) && !of.contains(&ValueId(id)) {
                value.clear();
            }
        }
    }
    let join = |id: &ValueId| {
        let views: Vec<_> = values[id.0].iter().map(|value| value.view()).collect();
        if views.is_empty() {
            return Ok(Array2::zeros((0, graph.value(*id).cols)));
        }
        concatenate(Axis(0), &views).map_err(|e| Error::invalid(e.to_string()))
    };
    of.iter().map(join).collect()
}

/// What of a text an operand is.
fn numbers(read: &Read, text: &[u32]) -> Vec<u32> {
    match read {
        Read::Input(Input::Lengths) => vec![text.len() as u32],
        Read::Input(input) => {
            let mut numbers = vec![0; text.len()];
            input.write(text, 0, &mut numbers);
            numbers
        }
        Read::Value(_) | Read::Param(_) => Vec::new(),
    }
}

/// A parameter in f64; of weights those in effect.
fn exact(param: &HostParam) -> Array2<f64> {
    let weights = match param {
        HostParam::Matrix(matrix) => return numbers_of(matrix),
        HostParam::Weights(weights) => weights,
    };
    match &**weights {
        HostWeights::Dense(w) => numbers_of(w),
        HostWeights::Masked(w, _) | HostWeights::Masked24(w, _) => {
            let kept = |at: (usize, usize)| weights.mask().is_none_or(|mask| mask.get(at.0, at.1));
            Array2::from_shape_fn((w.rows(), w.cols()), |at| if kept(at) { f64::from(w.get(at.0, at.1)) } else { 0.0 })
        }
        HostWeights::Sparse24(w) => {
            let mut full = Array2::zeros((w.m(), w.k()));
            for row in 0..w.m() {
                for group in 0..w.k().div_ceil(4) {
                    let (first, second) = w.code(row, group);
                    for (i, position) in [first, second].into_iter().enumerate() {
                        // A code may point past the last column, where the value is padding.
                        if let Some(at) = full.get_mut((row, 4 * group + position)) {
                            *at = f64::from(w.values().get(row * w.k_physical() + 2 * group + i));
                        }
                    }
                }
            }
            full
        }
    }
}

fn numbers_of(w: &Matrix) -> Array2<f64> {
    Array2::from_shape_fn((w.rows(), w.cols()), |(r, c)| f64::from(w.get(r, c)))
}
