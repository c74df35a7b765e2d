//! Orders of the channels inside of a BERT's encoder layers, folded into the weights on both sides of them.
//!
//! Three sets of channels lie between two linear layers with nothing else that knows their order, so that a permutation
//! of them costs nothing at run time:
//! - the features between the feed-forward part's two layers: rows and bias of `intermediate.dense`, columns of
//!   `output.dense`; GELU takes each by itself;
//! - inside a head, what attention hands on: rows and bias of V, columns of `attention.output.dense`;
//! - inside a head, what queries and keys are compared by: rows and biases of Q and K. No columns follow them, but from
//!   V = 2 on their order decides which rows share a pattern.
//!
//! Heads can change places as wholes, in Q, K, V and `attention.output.dense` alike. The features of the residual stream
//! stay where they are. Invariant: the model computes the same before and after, but for the order in which sums are
//! added up.

use std::{slice, thread};

use ndarray::{Array2, Axis, s};

use super::checkpoint::{Checkpoint, Layer};
use crate::error::{Error, Result, expect_shape};
use crate::linear::LinearWeights;
use crate::mask::{Mask, VectorLen};
use crate::matrix::Matrix;
use crate::prune::permute::{self, Budget, Moves, Use, check_order, search};

/// The share of a layer's scores that 2:4 keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kept {
    /// In the order that the layer had.
    pub before: f64,
    /// In its new order.
    pub after: f64,
}

/// What [`Checkpoint::permute`] did to one encoder layer. Place `i` of an order has the channel that was `order[i]`.
///
/// Statistics of a layer's inputs that were taken before go the same way: those of `attention.output.dense` by `values`,
/// those of `output.dense` by `ffn`; inputs of the other two layers stay.
#[derive(Clone, Debug, PartialEq)]
pub struct Permuted {
    /// The order of the rows of Q and of K.
    pub queries: Vec<usize>,
    /// The order of the rows of V and of the columns of `attention.output.dense`.
    pub values: Vec<usize>,
    /// The order of the rows of `intermediate.dense` and of the columns of `output.dense`.
    pub ffn: Vec<usize>,
    /// Of the linear layers in the order of [`Checkpoint::linears`]; nothing for those that were left alone because they
    /// or their partners are compressed.
    pub kept: [Option<Kept>; 4],
}

impl Checkpoint {
    /// Gives the features between the two feed-forward layers of an encoder layer another order: place `i` gets the
    /// feature `order[i]`. An error if there is no such layer, `order` does not name each feature once, or one of the
    /// two is compressed, whose pattern would not survive.
    pub fn permute_ffn(&mut self, layer: usize, order: &[usize]) -> Result<()> {
        let layer = self.layer(layer)?;
        check_order("order of feed-forward features", order, layer.ffn_in.weights.m())?;
        let ffn_in = rows(&layer.ffn_in.weights, order)?;
        let ffn_out = columns(&layer.ffn_out.weights, order)?;
        layer.ffn_in.bias = permute::columns(&layer.ffn_in.bias, order)?;
        (layer.ffn_in.weights, layer.ffn_out.weights) = (ffn_in, ffn_out);
        Ok(())
    }

    /// Gives the features of an encoder layer's attention another order: `queries` those of Q and K, `values` those of V
    /// and of what follows. Features of a head stay together, and a head goes to the same place in both; else there is
    /// an error, and if there is no such layer, an order does not name each feature once, or a matrix that would change
    /// is compressed.
    ///
    /// ```
    /// use sparse24::bert::{Checkpoint, Config, Sizes, reference};
    /// use sparse24::{Activation, DType};
    /// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 1, heads: 2, intermediate: 16, positions: 4, types: 1 };
    /// let mut checkpoint = Checkpoint::random(Config::new(sizes, 1e-12, Activation::Gelu)?, DType::F32, 24)?;
    /// let before = reference::embeddings(&checkpoint, &[[1, 2, 3]])?;
    ///
    /// // The second head first, its queries and keys in the opposite order.
    /// checkpoint.permute_attention(0, &[7, 6, 5, 4, 0, 1, 2, 3], &[4, 5, 6, 7, 0, 1, 2, 3])?;
    /// let after = reference::embeddings(&checkpoint, &[[1, 2, 3]])?;
    /// assert!((before - after).iter().all(|x| x.abs() < 1e-12));
    ///
    /// // A head cannot be at two places.
    /// assert!(checkpoint.permute_attention(0, &[4, 5, 6, 7, 0, 1, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7]).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn permute_attention(&mut self, layer: usize, queries: &[usize], values: &[usize]) -> Result<()> {
        let (d, heads) = (self.config.hidden(), self.config.heads());
        let width = d / heads;
        check_order("order of queries", queries, d)?;
        check_order("order of values", values, d)?;
        for (place, features) in queries.chunks(width).zip(values.chunks(width)).enumerate() {
            let head = features.0[0] / width;
            if let Some(other) = features.0.iter().chain(features.1).find(|&feature| feature / width != head) {
                return Err(Error::Invalid(format!(
                    "place {place} of the heads has features of heads {head} and {}",
                    other / width
                )));
            }
        }
        let layer = self.layer(layer)?;
        let order = stacked(queries, values);
        let qkv = rows(&layer.qkv.weights, &order)?;
        // What follows does not see an order of queries and keys alone, and may be compressed then.
        if !is_identity(values) {
            layer.attended.weights = columns(&layer.attended.weights, values)?;
        }
        layer.qkv.bias = permute::columns(&layer.qkv.bias, &order)?;
        layer.qkv.weights = qkv;
        Ok(())
    }

    /// Searches for the orders in which 2:4 with vectors of this length keeps most, and gives each encoder layer its own,
    /// to be pruned afterwards. The threads of the budget take a layer each; its time is that of all layers together, its
    /// sweeps are those of each search.
    ///
    /// `scores` is asked for what each weight is worth, by the layer's name and its weights (of masked ones those in
    /// effect), as an array of their shape, finite and at least 0. Layers that are compressed already are left alone, and
    /// so are their partners: the order of a compressed matrix is fixed. Never worse: a part of a layer in which nothing
    /// better is found stays.
    ///
    /// ```
    /// use sparse24::bert::{Checkpoint, Config, Sizes, Sparsity};
    /// use sparse24::prune::permute::Budget;
    /// use sparse24::{Activation, DType, VectorLen};
    /// let sizes = Sizes { vocabulary: 9, hidden: 16, layers: 2, heads: 2, intermediate: 32, positions: 4, types: 1 };
    /// let mut checkpoint = Checkpoint::random(Config::new(sizes, 1e-12, Activation::Gelu)?, DType::F32, 24)?;
    /// let vector = VectorLen::new(4)?;
    ///
    /// // By magnitude; another criterion would look up what it knows of the layer's inputs by its name.
    /// let layers = checkpoint.permute(vector, &Budget::sweeps(10), |_name, w| Ok(w.to_array().mapv(f32::abs)))?;
    /// assert!(layers.iter().flat_map(|l| l.kept).flatten().map(|kept| kept.after - kept.before).sum::<f64>() > 0.0);
    /// checkpoint.prune(Sparsity::TwoFour(vector))?;
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn permute(
        &mut self,
        vector: VectorLen,
        budget: &Budget,
        mut scores: impl FnMut(&str, &Matrix) -> Result<Array2<f32>>,
    ) -> Result<Vec<Permuted>> {
        let threads = match budget.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let count = self.layers.len();
        let each = budget.part(1.0 / count.div_ceil(threads) as f64);
        let (hidden, intermediate) = (self.config.hidden(), self.config.sizes().intermediate);
        let width = hidden / self.config.heads();
        let mut found = Vec::with_capacity(count);
        // A turn has no more layers than threads, so that there are no more scores at once than are needed.
        for turn in (0..count).step_by(threads) {
            let tasks: Vec<_> = (turn..count.min(turn + threads))
                .map(|layer| {
                    let budget = Budget { threads: 1, seed: budget.seed.wrapping_add(layer as u64), ..each };
                    let scores = self.scores(layer, &mut scores)?;
                    Ok(Task { scores, vector, hidden, intermediate, width, budget })
                })
                .collect::<Result<_>>()?;
            let orders: Vec<Result<_>> = thread::scope(|scope| {
                let running: Vec<_> = tasks.iter().map(|task| scope.spawn(|| task.search())).collect();
                let failed = || Error::Invalid("a thread that searched for an order panicked".into());
                running.into_iter().map(|task| task.join().unwrap_or_else(|_| Err(failed()))).collect()
            });
            for (layer, orders) in (turn..).zip(orders) {
                let orders = orders?;
                // Not of layers that were left alone: they may be compressed.
                if orders.kept[0].is_some() {
                    self.permute_attention(layer, &orders.queries, &orders.values)?;
                }
                if orders.kept[2].is_some() {
                    self.permute_ffn(layer, &orders.ffn)?;
                }
                found.push(orders);
            }
        }
        Ok(found)
    }

    fn layer(&mut self, layer: usize) -> Result<&mut Layer> {
        let count = self.layers.len();
        let missing = || Error::Invalid(format!("there is no encoder layer {layer}, there are {count}"));
        self.layers.get_mut(layer).ok_or_else(missing)
    }

    /// The scores of a layer's four linear layers, but for pairs of which one is compressed.
    fn scores(
        &self,
        layer: usize,
        scores: &mut impl FnMut(&str, &Matrix) -> Result<Array2<f32>>,
    ) -> Result<[Option<Array2<f32>>; 4]> {
        let mut found = [const { None }; 4];
        let linears: Vec<_> = self.linears().skip(4 * layer).take(4).collect();
        for (found, pair) in found.chunks_mut(2).zip(linears.chunks(2)) {
            if pair.iter().any(|(_, w)| matches!(w, LinearWeights::Sparse24(_))) {
                continue;
            }
            for (found, (name, w)) in found.iter_mut().zip(pair) {
                let scored = match w {
                    LinearWeights::Dense(w) => scores(name, w)?,
                    LinearWeights::Masked(w, mask) => scores(name, &mask.apply(w)?)?,
                    LinearWeights::Sparse24(_) => continue,
                };
                expect_shape(&format!("scores of {name}"), scored.dim(), (w.m(), w.k()))?;
                *found = Some(scored);
            }
        }
        Ok(found)
    }
}

/// The search for one encoder layer's orders.
struct Task {
    scores: [Option<Array2<f32>>; 4],
    vector: VectorLen,
    hidden: usize,
    intermediate: usize,
    width: usize,
    budget: Budget,
}

impl Task {
    /// Most of the time is the feed-forward part's: it has most channels, and no heads to keep them in.
    fn search(&self) -> Result<Permuted> {
        let identity = |n| (0..n).collect::<Vec<_>>();
        let (queries, values) = (identity(self.hidden), identity(self.hidden));
        let mut found = Permuted { queries, values, ffn: identity(self.intermediate), kept: [None; 4] };
        let [qkv, attended, ffn_in, ffn_out] = &self.scores;
        if let (Some(qkv), Some(attended)) = (qkv, attended) {
            self.attention(qkv, attended, &mut found)?;
        }
        if let (Some(ffn_in), Some(ffn_out)) = (ffn_in, ffn_out) {
            let uses = [Use::rows(ffn_in.view(), self.vector)?, Use::columns(ffn_out.view(), self.vector)?];
            found.ffn = search(&uses, Moves::All, &self.budget.part(0.75))?.order;
            found.kept[2] = Some(share(&uses[0], &found.ffn)?);
            found.kept[3] = Some(share(&uses[1], &found.ffn)?);
        }
        Ok(found)
    }

    fn attention(&self, qkv: &Array2<f32>, attended: &Array2<f32>, found: &mut Permuted) -> Result<()> {
        let (d, inside) = (self.hidden, Moves::Inside(self.width));
        let part = |i: usize, order: &[usize]| {
            Use::rows(qkv.slice(s![i * d..(i + 1) * d, ..]).select(Axis(0), order).view(), self.vector)
        };
        let asis = &found.values;
        let heads = search(
            &[part(0, asis)?, part(1, asis)?, part(2, asis)?],
            Moves::Wholes(self.width),
            &self.budget.part(0.02),
        )?;
        let heads = heads.order;
        let queries = search(&[part(0, &heads)?, part(1, &heads)?], inside, &self.budget.part(0.08))?;
        let out = Use::columns(attended.select(Axis(1), &heads).view(), self.vector)?;
        let values = search(&[part(2, &heads)?, out], inside, &self.budget.part(0.15))?;

        let after_heads = |order: Vec<usize>| order.into_iter().map(|i| heads[i]).collect::<Vec<_>>();
        let (queries, values) = (after_heads(queries.order), after_heads(values.order));
        // Q, K and V are pruned as one matrix: its blocks of rows are not those of its parts if V does not divide them.
        let first = share(&Use::rows(qkv.view(), self.vector)?, &stacked(&queries, &values))?;
        let second = share(&Use::columns(attended.view(), self.vector)?, &values)?;
        let gained = |kept: Kept| kept.after - kept.before;
        if 3.0 * gained(first) + gained(second) > 0.0 {
            (found.queries, found.values) = (queries, values);
            [found.kept[0], found.kept[1]] = [Some(first), Some(second)];
        } else {
            let stays = |kept: Kept| Some(Kept { after: kept.before, ..kept });
            [found.kept[0], found.kept[1]] = [stays(first), stays(second)];
        }
        Ok(())
    }
}

/// What one use keeps as it is and in this order.
fn share(of: &Use, order: &[usize]) -> Result<Kept> {
    let identity: Vec<_> = (0..order.len()).collect();
    let of = slice::from_ref(of);
    Ok(Kept { before: permute::kept(of, &identity)?, after: permute::kept(of, order)? })
}

/// The order of the rows of Q, K and V as one matrix.
fn stacked(queries: &[usize], values: &[usize]) -> Vec<usize> {
    let d = queries.len();
    [(queries, 0), (queries, d), (values, 2 * d)]
        .iter()
        .flat_map(|(order, at)| order.iter().map(move |i| at + i))
        .collect()
}

fn is_identity(order: &[usize]) -> bool {
    order.iter().enumerate().all(|(place, &channel)| place == channel)
}

/// Weights with their rows in this order.
fn rows(w: &LinearWeights, order: &[usize]) -> Result<LinearWeights> {
    match w {
        LinearWeights::Dense(w) => Ok(LinearWeights::Dense(permute::rows(w, order)?)),
        LinearWeights::Masked(w, mask) => {
            let moved = Mask::from_fn(mask.rows(), mask.cols(), |row, col| mask.get(order[row], col))?;
            Ok(LinearWeights::Masked(permute::rows(w, order)?, moved))
        }
        LinearWeights::Sparse24(_) => Err(compressed("rows")),
    }
}

/// Weights with their columns in this order.
fn columns(w: &LinearWeights, order: &[usize]) -> Result<LinearWeights> {
    match w {
        LinearWeights::Dense(w) => Ok(LinearWeights::Dense(permute::columns(w, order)?)),
        LinearWeights::Masked(w, mask) => {
            let moved = Mask::from_fn(mask.rows(), mask.cols(), |row, col| mask.get(row, order[col]))?;
            Ok(LinearWeights::Masked(permute::columns(w, order)?, moved))
        }
        LinearWeights::Sparse24(_) => Err(compressed("columns")),
    }
}

fn compressed(what: &str) -> Error {
    Error::Invalid(format!("the {what} of compressed weights cannot be permuted, prune afterwards"))
}
