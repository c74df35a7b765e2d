//! The f64 twin of a BERT's forward pass, from its definition (Devlin et al. 2018,
//! [arXiv:1810.04805](https://arxiv.org/abs/1810.04805)), and of what follows it.
//!
//! It shares no arithmetic with the devices: plain loops and f64 matrix products over the host's weights, 2:4 ones by a
//! walk over their (value, code) pairs. Texts are not padded, so that what the devices do with padding is checked too.
//! Invariant: nothing of [`engine`](crate::engine) is used here.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

use super::checkpoint::{Checkpoint, Dense, Norm};
use super::pipeline::{Function, NORM_EPS, Pipeline, Pooling, Residual, Step};
use crate::error::Result;
use crate::linear::LinearWeights;
use crate::matrix::Matrix;
use crate::problem::Activation;
use crate::reference::activation;

/// The last hidden states, one row per token, of texts one after the other. An error if an id or a length is not one of
/// the model's.
pub fn hidden_states<T: AsRef<[u32]>>(checkpoint: &Checkpoint, texts: &[T]) -> Result<Array2<f64>> {
    let config = &checkpoint.config;
    let tokens = texts.iter().map(|text| text.as_ref().len()).sum();
    let mut x = Array2::zeros((tokens, config.hidden()));
    let mut rows = x.axis_iter_mut(Axis(0));
    for text in texts {
        super::check_ids(config, text.as_ref())?;
        for (position, (&id, mut row)) in text.as_ref().iter().zip(&mut rows).enumerate() {
            for (i, x) in row.iter_mut().enumerate() {
                let table = |table: &Matrix, row| f64::from(table.get(row, i));
                *x = table(&checkpoint.words, id as usize)
                    + table(&checkpoint.positions, position)
                    + table(&checkpoint.types, 0);
            }
        }
    }
    let eps = f64::from(config.eps());
    norm(&mut x, &checkpoint.norm, eps);
    for layer in &checkpoint.layers {
        let qkv = linear(&layer.qkv, &x);
        let mut attended = Array2::zeros(x.dim());
        let mut from = 0;
        for text in texts {
            let to = from + text.as_ref().len();
            let part = attention(qkv.slice(s![from..to, ..]), config.heads());
            attended.slice_mut(s![from..to, ..]).assign(&part);
            from = to;
        }
        x += &linear(&layer.attended, &attended);
        norm(&mut x, &layer.attention_norm, eps);
        let mut inner = linear(&layer.ffn_in, &x);
        inner.mapv_inplace(|v| activation(config.activation(), v));
        x += &linear(&layer.ffn_out, &inner);
        norm(&mut x, &layer.output_norm, eps);
    }
    Ok(x)
}

/// The embedding of each text, one a row: its last hidden states through the checkpoint's [`Pipeline`]. Errors are those
/// of [`hidden_states`].
pub fn embeddings<T: AsRef<[u32]>>(checkpoint: &Checkpoint, texts: &[T]) -> Result<Array2<f64>> {
    let states = hidden_states(checkpoint, texts)?;
    Ok(pool(checkpoint.pipeline(), &states, texts.iter().map(|text| text.as_ref().len())))
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

/// X·Wᵀ + bias.
fn linear(layer: &Dense, x: &Array2<f64>) -> Array2<f64> {
    let bias = Array1::from_iter(layer.bias.elements().to_f32().into_iter().map(f64::from));
    x.dot(&dense(&layer.weights).t()) + bias
}

/// A matrix in f64.
fn numbers(w: &Matrix) -> Array2<f64> {
    Array2::from_shape_fn((w.rows(), w.cols()), |(r, c)| f64::from(w.get(r, c)))
}

/// The weights that a layer has in effect.
fn dense(weights: &LinearWeights) -> Array2<f64> {
    match weights {
        LinearWeights::Dense(w) => numbers(w),
        LinearWeights::Masked(w, mask) => {
            let kept = |(r, c)| if mask.get(r, c) { f64::from(w.get(r, c)) } else { 0.0 };
            Array2::from_shape_fn((w.rows(), w.cols()), kept)
        }
        LinearWeights::Sparse24(w) => {
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

/// (x - mean) / √(variance + eps) · gamma + beta of every row, with the variance of all its elements.
fn norm(x: &mut Array2<f64>, norm: &Norm, eps: f64) {
    for mut row in x.axis_iter_mut(Axis(0)) {
        let n = row.len() as f64;
        let mean = row.sum() / n;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        for (i, x) in row.iter_mut().enumerate() {
            let (gamma, beta) = (f64::from(norm.gamma.get(0, i)), f64::from(norm.beta.get(0, i)));
            *x = (*x - mean) / (variance + eps).sqrt() * gamma + beta;
        }
    }
}

/// softmax(Q·Kᵀ / √width)·V of every head of one text, whose rows are Q, K and V side by side.
fn attention(qkv: ArrayView2<'_, f64>, heads: usize) -> Array2<f64> {
    let d = qkv.ncols() / 3;
    let width = d / heads;
    let mut attended = Array2::zeros((qkv.nrows(), d));
    for head in 0..heads {
        let part = |i: usize| qkv.slice(s![.., i * d + head * width..i * d + (head + 1) * width]);
        let mut scores = part(0).dot(&part(1).t()) / (width as f64).sqrt();
        for mut row in scores.axis_iter_mut(Axis(0)) {
            let top = row.fold(f64::NEG_INFINITY, |top, &x| top.max(x));
            row.mapv_inplace(|x| (x - top).exp());
            let sum = row.sum();
            row /= sum;
        }
        attended.slice_mut(s![.., head * width..(head + 1) * width]).assign(&scores.dot(&part(2)));
    }
    attended
}
