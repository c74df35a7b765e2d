//! Convolutions of a graph: GEMMs of the windows of images, depthwise ones, and how their parameters are stored.
//!
//! Checkpoints have the weights of a convolution as `out x in x lines x columns`. A GEMM has them as
//! `out x (lines · columns · in)`, in the order of [`Im2col`](crate::Im2col)'s columns: a group of four weights is one
//! tap's, of four channels side by side, where channels are a multiple of four. ASP prunes the same groups. Compressed
//! weights are stored in this order, as the matrix that they are.
//!
//! **Batch norm** `(z − mean) / √(variance + eps) · γ + β` of a product is the product with other weights and a bias.
//! It is folded into them when they are read, and taken out of them when they are written: files hold what was trained,
//! and the same norm beside it. A factor per row changes neither a pattern nor what is zero.
//!
//! Invariant: what is written for weights that have not changed is what was read, but for two roundings.

use super::{Graph, ParamId, ParamKind, Precision, Read, Rows, StoredTensor, ValueId};
use crate::error::{Result, checked_mul};
use crate::matrix::Matrix;
use crate::ops::im2col::Im2colNode;
use crate::problem::Activation;
use crate::window::Window;

/// A batch norm, by the name that its tensors have in front: `{name}.weight`, `.bias`, `.running_mean` and
/// `.running_var`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm<'a> {
    /// Name.
    pub name: &'a str,
    /// What is added to the variance; at least 0.
    pub eps: f32,
}

/// A convolution to be added to a graph: `act(norm(windows of x · Wᵀ)) + residual`.
#[derive(Clone, Debug)]
pub struct ConvolutionSpec<'a> {
    /// The node's name. Weights are stored as `{name}.weight`, and the bias as `{name}.bias` where there is no norm.
    pub name: &'a str,
    /// The image.
    pub x: ValueId,
    /// Output channels. A depthwise convolution has as many as `x`.
    pub channels: usize,
    /// The windows.
    pub window: Window,
    /// The norm after it, if there is one.
    pub norm: Option<BatchNorm<'a>>,
    /// What is done to each output then.
    pub activation: Activation,
    /// What is added to it then. None of a depthwise convolution.
    pub residual: Option<ValueId>,
}

/// How the weights of a convolution are stored.
#[derive(Clone, Debug)]
pub(super) struct StoredKernel {
    /// Lines and columns.
    pub(super) kernel: [usize; 2],
    /// The norm that is folded into them, if there is one.
    pub(super) norm: Option<StoredNorm>,
}

/// What of a batch norm weights are multiplied by.
#[derive(Clone, Debug)]
pub(super) struct StoredNorm {
    /// γ and the variance.
    pub(super) stored: [StoredTensor; 2],
    eps: f32,
}

impl StoredNorm {
    /// What each row is multiplied by, from γ and the variance.
    pub(super) fn factors(&self, gamma: &Matrix, variance: &Matrix) -> Vec<f32> {
        let (gamma, variance) = (gamma.elements().to_f32(), variance.elements().to_f32());
        gamma.iter().zip(&variance).map(|(&gamma, &variance)| factor(gamma, variance, self.eps) as f32).collect()
    }
}

fn factor(gamma: f32, variance: f32, eps: f32) -> f64 {
    f64::from(gamma) / (f64::from(variance) + f64::from(eps)).sqrt()
}

/// What weights are where they are stored as `out x in x taps`, from what they are as `out x taps x in`, or the other
/// way round: within each run of `a·b` elements, element (i, j) of `a x b` becomes element (j, i).
pub(super) fn transposed(elements: &[f32], a: usize, b: usize) -> Vec<f32> {
    let mut to = Vec::with_capacity(elements.len());
    for row in elements.chunks_exact((a * b).max(1)) {
        to.extend((0..b).flat_map(|j| (0..a).map(move |i| row[i * b + j])));
    }
    to
}

impl Graph {
    /// Adds a convolution, whose weights are a linear layer's. Windows are packed first, unless they are single pixels.
    pub fn convolution(&mut self, spec: ConvolutionSpec<'_>) -> Result<ValueId> {
        let ConvolutionSpec { name, x, channels: m, window, norm, activation, residual } = spec;
        let c = self.value(x).cols;
        let k = checked_mul("weights of a window", window.taps(), c)?;
        let weights = self.add_param(format!("{name}.weight"), ParamKind::Weights, (m, k))?;
        let kernel = window.kernel();
        self.set_stored(weights, vec![tensor(format!("{name}.weight"), vec![m, c, kernel[0], kernel[1]])]);
        let folded = norm.map(|BatchNorm { name, eps }| StoredNorm {
            stored: [vector(name, "weight", m), vector(name, "running_var", m)],
            eps,
        });
        self.params[weights.0].kernel = Some(StoredKernel { kernel, norm: folded });
        let bias = self.folded_bias(name, norm, m)?;
        let x = if window.is_pixelwise() {
            x
        } else {
            let shape = (Rows::Each(window.position_count()), k, Precision::Model);
            self.add_node(&format!("{name}.windows"), Im2colNode { window }, vec![Read::Value(x)], shape)?
        };
        self.gemm(name, x, (weights, Some(bias)), activation, residual)
    }

    /// Adds a depthwise convolution, which is not a linear layer.
    pub fn depthwise_convolution(&mut self, spec: ConvolutionSpec<'_>) -> Result<ValueId> {
        let ConvolutionSpec { name, x, window, norm, activation, .. } = spec;
        let (c, taps, [lines, columns]) = (self.value(x).cols, window.taps(), window.kernel());
        let kind = ParamKind::Matrix(Precision::F32);
        let weights = self.add_param(format!("{name}.weight"), kind, (taps, c))?;
        let own = tensor(format!("{name}.weight"), vec![c, 1, lines, columns]);
        match norm {
            None => {
                self.set_stored(weights, vec![own]);
                self.set_conversion(weights, move |w| {
                    Matrix::from_f32(taps, c, &transposed(&w.elements().to_f32(), c, taps))
                });
            }
            Some(BatchNorm { name, eps }) => {
                self.set_stored(weights, vec![own, vector(name, "weight", c), vector(name, "running_var", c)]);
                self.set_conversion(weights, move |all| {
                    let all = all.elements().to_f32();
                    let (w, norm) = all.split_at(c * taps);
                    let (gamma, variance) = norm.split_at(c);
                    let factors: Vec<_> = gamma.iter().zip(variance).map(|(&g, &v)| factor(g, v, eps)).collect();
                    let folded: Vec<f32> = (0..taps * c)
                        .map(|at| (f64::from(w[at % c * taps + at / c]) * factors[at % c]) as f32)
                        .collect();
                    Matrix::from_f32(taps, c, &folded)
                });
            }
        }
        let bias = self.folded_bias(name, norm, c)?;
        self.depthwise(name, x, (weights, bias), window, activation)
    }

    /// The bias of a convolution, or what batch norm makes of there being none.
    fn folded_bias(&mut self, name: &str, norm: Option<BatchNorm<'_>>, m: usize) -> Result<ParamId> {
        let bias = self.add_param(format!("{name}.bias"), ParamKind::Matrix(Precision::F32), (1, m))?;
        if let Some(BatchNorm { name, eps }) = norm {
            let parts = ["weight", "bias", "running_mean", "running_var"];
            self.set_stored(bias, parts.map(|part| vector(name, part, m)).into());
            self.set_conversion(bias, move |all| {
                let all = all.elements().to_f32();
                let [gamma, beta, mean, variance] = [0, 1, 2, 3].map(|part| &all[part * m..][..m]);
                let folded = |i: usize| f64::from(beta[i]) - f64::from(mean[i]) * factor(gamma[i], variance[i], eps);
                Matrix::from_f32(1, m, &(0..m).map(|i| folded(i) as f32).collect::<Vec<_>>())
            });
        }
        Ok(bias)
    }
}

fn tensor(name: String, shape: Vec<usize>) -> StoredTensor {
    StoredTensor { names: vec![name], shape }
}

fn vector(norm: &str, part: &str, len: usize) -> StoredTensor {
    tensor(format!("{norm}.{part}"), vec![len])
}
