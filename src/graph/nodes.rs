//! What operations are as nodes. (On the way to their files in ops.)

use ndarray::{Array1, Array2, Axis, s};

use super::{Exact, Graph, Input, NodeOp, ParamId, ParamKind, Precision, Read, Rows, Site, StoredTensor, ValueId};
use crate::engine::{Io, Prepared};
use crate::error::{Error, Result};
use crate::glue::{Attention, Embed, LayerNorm, Pool};
use crate::problem::{Activation, Epilogue};
use crate::reference::activation;

fn matrix<'a>(reads: &[Exact<'a>], at: usize) -> Result<&'a Array2<f64>> {
    match reads.get(at) {
        Some(Exact::Matrix(matrix)) => Ok(matrix),
        other => Err(Error::Invalid(format!("operand {at} is {other:?}, not a matrix"))),
    }
}

fn indices<'a>(reads: &[Exact<'a>], at: usize) -> Result<&'a [u32]> {
    match reads.get(at) {
        Some(Exact::Indices(indices)) => Ok(indices),
        other => Err(Error::Invalid(format!("operand {at} is {other:?}, not indices"))),
    }
}

#[derive(Debug)]
struct EmbeddingNode;

impl NodeOp for EmbeddingNode {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn prepare(&self, site: &Site<'_>) -> Result<Prepared> {
        let tables = (0..site.reads.len() / 2).map(|i| Ok((site.tensor(2 * i)?, site.indices(2 * i + 1)?)));
        let tables: Vec<_> = tables.collect::<Result<_>>()?;
        site.device.embed(&Embed { tables: &tables, y: site.y })
    }

    fn exact(&self, reads: &[Exact<'_>]) -> Result<Array2<f64>> {
        let mut sum: Option<Array2<f64>> = None;
        for i in 0..reads.len() / 2 {
            let rows: Vec<usize> = indices(reads, 2 * i + 1)?.iter().map(|&id| id as usize).collect();
            let part = matrix(reads, 2 * i)?.select(Axis(0), &rows);
            sum = Some(match sum {
                None => part,
                Some(sum) => sum + part,
            });
        }
        sum.ok_or_else(|| Error::Invalid("an embedding needs a table".into()))
    }
}

#[derive(Debug)]
struct LayerNormNode {
    eps: f32,
}

impl NodeOp for LayerNormNode {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn prepare(&self, site: &Site<'_>) -> Result<Prepared> {
        let (x, gamma, beta) = (site.tensor(0)?, site.tensor(1)?, site.tensor(2)?);
        site.device.layer_norm(&LayerNorm { x, gamma, beta, eps: self.eps, y: site.y })
    }

    fn exact(&self, reads: &[Exact<'_>]) -> Result<Array2<f64>> {
        let (mut x, gamma, beta) = (matrix(reads, 0)?.clone(), matrix(reads, 1)?, matrix(reads, 2)?);
        for mut row in x.axis_iter_mut(Axis(0)) {
            let n = row.len() as f64;
            let mean = row.sum() / n;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
            for (i, x) in row.iter_mut().enumerate() {
                *x = (*x - mean) / (variance + f64::from(self.eps)).sqrt() * gamma[(0, i)] + beta[(0, i)];
            }
        }
        Ok(x)
    }
}

#[derive(Debug)]
struct AttentionNode {
    heads: usize,
}

impl NodeOp for AttentionNode {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn prepare(&self, site: &Site<'_>) -> Result<Prepared> {
        let &Site { device, batch, seq, y, .. } = site;
        let (qkv, lengths) = (site.tensor(0)?, site.indices(1)?);
        device.attention(&Attention { qkv, lengths, batch, seq, heads: self.heads, y })
    }

    fn exact(&self, reads: &[Exact<'_>]) -> Result<Array2<f64>> {
        let qkv = matrix(reads, 0)?;
        let d = qkv.ncols() / 3;
        let width = d / self.heads;
        let mut attended = Array2::zeros((qkv.nrows(), d));
        for head in 0..self.heads {
            let part = |i: usize| qkv.slice(s![.., i * d + head * width..i * d + (head + 1) * width]);
            let mut scores = part(0).dot(&part(1).t()) / (width as f64).sqrt();
            if let Some(Exact::Matrix(bias)) = reads.get(2) {
                let middle = bias.ncols() / 2;
                for ((query, key), score) in scores.indexed_iter_mut() {
                    *score += bias[(head, middle + key - query)];
                }
            }
            for mut row in scores.axis_iter_mut(Axis(0)) {
                let top = row.fold(f64::NEG_INFINITY, |top, &x| top.max(x));
                row.mapv_inplace(|x| (x - top).exp());
                let sum = row.sum();
                row /= sum;
            }
            attended.slice_mut(s![.., head * width..(head + 1) * width]).assign(&scores.dot(&part(2)));
        }
        Ok(attended)
    }
}

#[derive(Debug)]
struct GemmNode {
    epilogue: Epilogue,
}

impl NodeOp for GemmNode {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn prepare(&self, site: &Site<'_>) -> Result<Prepared> {
        let Epilogue { bias, residual, .. } = self.epilogue;
        let bias = bias.then(|| site.tensor(2)).transpose()?;
        let at = 2 + usize::from(bias.is_some());
        let residual = residual.then(|| site.tensor(at)).transpose()?;
        site.linear(1)?.prepare(&Io { x: site.tensor(0)?, bias, residual, y: site.y })
    }

    fn exact(&self, reads: &[Exact<'_>]) -> Result<Array2<f64>> {
        let mut y = matrix(reads, 0)?.dot(&matrix(reads, 1)?.t());
        let mut at = 2;
        if self.epilogue.bias {
            y += &Array1::from_iter(matrix(reads, at)?.iter().copied());
            at += 1;
        }
        y.mapv_inplace(|v| activation(self.epilogue.activation, v));
        if self.epilogue.residual {
            y += matrix(reads, at)?;
        }
        Ok(y)
    }

    fn epilogue(&self) -> Epilogue {
        self.epilogue
    }
}

#[derive(Debug)]
struct MeanPoolingNode {
    normalize: bool,
}

impl NodeOp for MeanPoolingNode {
    fn name(&self) -> &'static str {
        "mean_pooling"
    }

    fn prepare(&self, site: &Site<'_>) -> Result<Prepared> {
        let &Site { device, batch, seq, y, .. } = site;
        let (x, lengths) = (site.tensor(0)?, site.indices(1)?);
        device.pool(&Pool { x, lengths, batch, seq, normalize: self.normalize, y })
    }

    fn exact(&self, reads: &[Exact<'_>]) -> Result<Array2<f64>> {
        let x = matrix(reads, 0)?;
        let mean = x.sum_axis(Axis(0)) / x.nrows() as f64;
        let length = if self.normalize { mean.dot(&mean).sqrt().max(1e-12) } else { 1.0 };
        Ok((mean / length).insert_axis(Axis(0)))
    }
}

/// A linear layer to be added to a graph.
#[derive(Clone, Debug)]
pub struct LinearSpec<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Its activations.
    pub x: ValueId,
    /// Output features.
    pub m: usize,
    /// The stored layers that it is made of, one under the other, such as Q, K and V: names and output features. Itself if
    /// there are none.
    pub parts: Vec<(String, usize)>,
    /// What is done to the product.
    pub activation: Activation,
    /// What is added to it then.
    pub residual: Option<ValueId>,
}

impl Graph {
    /// Adds a sum of embeddings: of tables, each with the name of its stored tensor, its rows and what is looked up.
    pub fn embedding(&mut self, name: &str, tables: &[(&str, usize, Input)], width: usize) -> Result<ValueId> {
        let mut reads = Vec::new();
        for (table, rows, input) in tables {
            let kind = ParamKind::Matrix(Precision::Model);
            reads.push(Read::Param(self.param((*table).to_owned(), kind, (*rows, width))?));
            reads.push(Read::Input(*input));
        }
        self.node(name, EmbeddingNode, reads, (Rows::Tokens, width, Precision::Model))
    }

    /// Adds a layer normalisation by the parameters `{name}.weight` and `{name}.bias`, or `gamma` and `beta`.
    pub fn layer_norm(&mut self, name: &str, x: ValueId, eps: f32) -> Result<ValueId> {
        let (rows, cols) = (self.value(x).rows, self.value(x).cols);
        let mut vector = |new: &str, old: &str, around| -> Result<ParamId> {
            let kind = ParamKind::Matrix(Precision::F32);
            let param = self.param(format!("{name}.{new}"), kind, (1, cols))?;
            let names = vec![format!("{name}.{new}"), format!("{name}.{old}")];
            // The second names are those of checkpoints converted from TensorFlow.
            self.stored_as(param, vec![StoredTensor { names, shape: vec![cols] }]);
            self.around(param, around);
            Ok(param)
        };
        let (gamma, beta) = (vector("weight", "gamma", 1.0)?, vector("bias", "beta", 0.0)?);
        let reads = vec![Read::Value(x), Read::Param(gamma), Read::Param(beta)];
        self.node(name, LayerNormNode { eps }, reads, (rows, cols, Precision::Model))
    }

    /// Adds a linear layer with a bias.
    pub fn linear(&mut self, linear: LinearSpec<'_>) -> Result<ValueId> {
        let LinearSpec { name, x, m, parts, activation, residual } = linear;
        let (rows, k) = (self.value(x).rows, self.value(x).cols);
        let weights = self.param(format!("{name}.weight"), ParamKind::Weights, (m, k))?;
        let bias = self.param(format!("{name}.bias"), ParamKind::Matrix(Precision::F32), (1, m))?;
        let parts = if parts.is_empty() { vec![(name.to_owned(), m)] } else { parts };
        // Weights may lack their `.weight`.
        let of = |(name, m): &(String, usize)| StoredTensor {
            names: vec![format!("{name}.weight"), name.clone()],
            shape: vec![*m, k],
        };
        self.stored_as(weights, parts.iter().map(of).collect());
        let of = |(name, m): &(String, usize)| StoredTensor { names: vec![format!("{name}.bias")], shape: vec![*m] };
        self.stored_as(bias, parts.iter().map(of).collect());
        let epilogue = Epilogue { bias: true, activation, residual: residual.is_some() };
        let mut reads = vec![Read::Value(x), Read::Param(weights), Read::Param(bias)];
        reads.extend(residual.map(Read::Value));
        self.node(name, GemmNode { epilogue }, reads, (rows, m, Precision::Model))
    }

    /// Adds attention over `qkv`, whose rows are Q, K and V side by side.
    pub fn attention(&mut self, name: &str, qkv: ValueId, heads: usize, relative: Option<ParamId>) -> Result<ValueId> {
        let width = self.value(qkv).cols / 3;
        let mut reads = vec![Read::Value(qkv), Read::Input(Input::Lengths)];
        reads.extend(relative.map(Read::Param));
        self.node(name, AttentionNode { heads }, reads, (Rows::Tokens, width, Precision::Model))
    }

    /// Adds the mean over the tokens of each sequence, brought to length 1 if `normalize`.
    pub fn mean_pooling(&mut self, name: &str, x: ValueId, normalize: bool) -> Result<ValueId> {
        let cols = self.value(x).cols;
        let reads = vec![Read::Value(x), Read::Input(Input::Lengths)];
        self.node(name, MeanPoolingNode { normalize }, reads, (Rows::Sequences, cols, Precision::F32))
    }
}
