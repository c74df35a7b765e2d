//! The f64 twin of an encoder: the graph's, and of what follows it.
//!
//! It shares no arithmetic with the pipeline. Invariant: nothing of [`engine`](crate::engine) is used here.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

use super::pipeline::{Function, NORM_EPS, Pipeline, Pooling, Residual, Step};
use crate::error::Result;
use crate::graph::{Checkpoint, twin};
use crate::matrix::Matrix;
use crate::problem::Activation;
use crate::reference::activation;

/// The last hidden states, one row per token, of texts one after the other: the first output of the model. An error if
/// a text is no input of it.
pub fn hidden_states<T: AsRef<[u32]>>(checkpoint: &Checkpoint, texts: &[T]) -> Result<Array2<f64>> {
    let output = checkpoint.graph().outputs().first().copied();
    let found = twin::values(checkpoint, output.as_slice(), texts)?;
    Ok(found.into_iter().next().unwrap_or_default())
}

/// The embedding of each text, one a row: its last hidden states through a pipeline. Errors are those of
/// [`hidden_states`].
pub fn embeddings<T: AsRef<[u32]>>(checkpoint: &Checkpoint, pipeline: &Pipeline, texts: &[T]) -> Result<Array2<f64>> {
    let states = hidden_states(checkpoint, texts)?;
    Ok(pool(pipeline, &states, texts.iter().map(|text| text.as_ref().len())))
}

/// The embeddings of texts of these numbers of tokens, given the hidden states of [`hidden_states`]. A text has tokens
/// beside those that the pipeline leaves out.
pub fn pool(pipeline: &Pipeline, states: &Array2<f64>, lengths: impl ExactSizeIterator<Item = usize>) -> Array2<f64> {
    let mut embeddings = Array2::zeros((lengths.len(), pipeline.width(states.ncols())));
    let mut from = 0;
    for (length, mut to) in lengths.zip(embeddings.axis_iter_mut(Axis(0))) {
        let pooled = states.slice(s![from + pipeline.skipped()..from + length, ..]);
        let parts: Vec<_> = pipeline.poolings().iter().map(|&pooling| one_vector(pooling, pooled, length)).collect();
        let mut x = concatenate(Axis(0), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap_or_default();
        for step in pipeline.steps() {
            x = after(step, x);
        }
        to.assign(&x);
        from += length;
    }
    embeddings
}

/// The states that are pooled, one row each, as one vector. They are the last ones of a text of `length` tokens.
fn one_vector(pooling: Pooling, states: ArrayView2<'_, f64>, length: usize) -> Array1<f64> {
    let n = states.nrows();
    match pooling {
        Pooling::Cls => states.row(0).to_owned(),
        Pooling::LastToken => states.row(n - 1).to_owned(),
        Pooling::Max => states.fold_axis(Axis(0), f64::NEG_INFINITY, |&top, &x| top.max(x)),
        Pooling::Mean => states.sum_axis(Axis(0)) / n as f64,
        Pooling::MeanSqrtLen => states.sum_axis(Axis(0)) / (n as f64).sqrt(),
        Pooling::WeightedMean => {
            // Token `length` is the last.
            let weights = Array1::from_iter((length - n..length).map(|before| (before + 1) as f64));
            weights.dot(&states) / weights.sum()
        }
    }
}

fn after(step: &Step, x: Array1<f64>) -> Array1<f64> {
    match step {
        Step::Normalize => {
            // A vector of zeros stays one.
            let length = x.dot(&x).sqrt().max(1e-12);
            x / length
        }
        Step::LayerNorm { gamma, beta } => {
            let n = x.len() as f64;
            let mean = x.sum() / n;
            let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
            let all = x.iter().zip(gamma).zip(beta);
            all.map(|((x, &gamma), &beta)| {
                (x - mean) / (variance + NORM_EPS).sqrt() * f64::from(gamma) + f64::from(beta)
            })
            .collect()
        }
        Step::Dense(layer) => {
            let mut y = numbers(&layer.weights).dot(&x);
            if let Some(bias) = &layer.bias {
                y += &numbers(bias).row(0);
            }
            y.mapv_inplace(|x| match layer.function {
                Function::Identity => x,
                Function::Tanh => x.tanh(),
                Function::Relu => activation(Activation::Relu, x),
                Function::Gelu => activation(Activation::Gelu, x),
                Function::Silu => activation(Activation::Silu, x),
                Function::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            });
            match &layer.residual {
                Residual::None => y,
                Residual::Input => y + x,
                Residual::Projected(weights) => y + numbers(weights).dot(&x),
            }
        }
    }
}

/// A matrix in f64.
fn numbers(w: &Matrix) -> Array2<f64> {
    Array2::from_shape_fn((w.rows(), w.cols()), |(r, c)| f64::from(w.get(r, c)))
}
