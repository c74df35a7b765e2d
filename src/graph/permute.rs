//! Orders of a model's channels that make 2:4 pruning keep more of its weights, without changing what it computes.
//!
//! A graph says which [`Channels`] there are. Those of a feed-forward part are one block: their order is any. Those of
//! attention come in heads: within a head the queries and the keys share an order and the values have one, which the
//! next layer's columns follow; where the model allows it, heads themselves have an order, which both follow.
//!
//! Weights are rounded as they were, sums come in another order: the function stays the same up to the order in which
//! sums are added up. Invariant: after an error of [`Checkpoint::reorder`] no parameter has changed.

use std::collections::BTreeMap;
use std::{slice, thread};

use ndarray::{Array2, Axis, s};

use super::checkpoint::{Checkpoint, HostParam};
use super::{ChannelSet, Channels, Graph, LinearLayer, ParamId};
use crate::error::{Error, Result, expect_shape};
use crate::mask::VectorLen;
use crate::matrix::Matrix;
use crate::prune::permute::{self, Budget, Moves, Use, check_order, search};
use crate::weights::HostWeights;

/// The share of a layer's scores that 2:4 keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kept {
    /// In the order that the layer had.
    pub before: f64,
    /// In its new order.
    pub after: f64,
}

/// What [`Checkpoint::permute`] did to some [`Channels`]. Place `i` of an order has the channel that was `order[i]`.
///
/// Statistics of a layer's inputs that were taken before go the same way, by the order of the set whose columns they
/// are.
#[derive(Clone, Debug, PartialEq)]
pub struct Permuted {
    /// The channels' name.
    pub channels: String,
    /// The order of each set.
    pub orders: Vec<Vec<usize>>,
    /// Of each linear layer that has the channels as rows or columns, by its name; nothing where channels were left
    /// alone because one of the layers is compressed.
    pub kept: Vec<(String, Kept)>,
}

impl Checkpoint {
    /// Gives channels another order, an order for each of their sets: place `i` gets the channel `order[i]`. An error
    /// if there are no such channels, an order does not name each channel once, blocks are not kept together or are not
    /// in the same places in all sets, or a matrix that would change is compressed.
    ///
    /// ```
    /// use sparse24::graph::{Checkpoint, twin};
    /// use sparse24::models::bert::{BertConfig, Sizes};
    /// use sparse24::{Activation, DType};
    /// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 1, heads: 2, intermediate: 16, positions: 4, types: 1 };
    /// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
    /// let mut checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
    /// let output = checkpoint.graph().outputs().to_vec();
    /// let before = twin::values(&checkpoint, &output, &[[1, 2, 3]])?;
    ///
    /// // The second head first, its queries and keys in the opposite order.
    /// let orders = [vec![7, 6, 5, 4, 0, 1, 2, 3], vec![4, 5, 6, 7, 0, 1, 2, 3]];
    /// checkpoint.reorder("encoder.layer.0.attention.self", &orders)?;
    /// let after = twin::values(&checkpoint, &output, &[[1, 2, 3]])?;
    /// assert!((&before[0] - &after[0]).iter().all(|x| x.abs() < 1e-12));
    ///
    /// // A head cannot be at two places.
    /// let apart = [vec![4, 5, 6, 7, 0, 1, 2, 3], vec![0, 1, 2, 3, 4, 5, 6, 7]];
    /// assert!(checkpoint.reorder("encoder.layer.0.attention.self", &apart).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn reorder(&mut self, channels: &str, orders: &[Vec<usize>]) -> Result<()> {
        let graph = self.graph().clone();
        let missing = || Error::invalid(format!("there are no channels {channels:?}"));
        let Channels { name, count, width, blocks_move, sets } =
            graph.channels().iter().find(|of| of.name == channels).ok_or_else(missing)?;
        if orders.len() != sets.len() {
            return Err(Error::invalid(format!("{name} has {} orders, not {}", sets.len(), orders.len())));
        }
        for order in orders {
            check_order(&format!("order of {name}"), order, *count)?;
        }
        for place in 0..count / width {
            let head = orders.first().map_or(place, |order| order[place * width] / width);
            if !blocks_move && head != place {
                return Err(Error::invalid(format!("blocks of {name} stay at their places, and block {head} moves")));
            }
            let strayed = orders.iter().flat_map(|order| &order[place * width..][..*width]);
            if let Some(other) = strayed.copied().find(|channel| channel / width != head) {
                let other = other / width;
                return Err(Error::invalid(format!(
                    "place {place} of {name} has channels of blocks {head} and {other}"
                )));
            }
        }
        // All that changes, before any of it is put in place.
        let mut changed: BTreeMap<ParamId, HostParam> = BTreeMap::new();
        let mut change = |id: ParamId, how: &dyn Fn(&HostParam) -> Result<HostParam>| {
            let new = how(changed.get(&id).unwrap_or_else(|| self.param(id)))?;
            changed.insert(id, new);
            Ok::<_, Error>(())
        };
        for (set, order) in sets.iter().zip(orders).filter(|(_, order)| !is_identity(order)) {
            for &(weights, first) in &set.rows {
                let rows = within(graph.param(weights).rows, first, order);
                let bias = graph.linear_of(weights).and_then(|layer| layer.bias);
                for id in [Some(weights), bias].into_iter().flatten() {
                    change(id, &|param| match param {
                        HostParam::Weights(w) => Ok(w.rows_in(&rows)?.into()),
                        HostParam::Matrix(bias) => Ok(permute::columns(bias, &rows)?.into()),
                    })?;
                }
            }
            for &weights in &set.columns {
                change(weights, &|param| match param {
                    HostParam::Weights(w) => Ok(w.columns_in(order)?.into()),
                    // Channels are of weights: see `Graph::add_channels`.
                    HostParam::Matrix(_) => Ok(param.clone()),
                })?;
            }
        }
        changed.into_iter().for_each(|(id, param)| self.set_param(id, param));
        Ok(())
    }

    /// Searches for the orders in which 2:4 with vectors of this length keeps most, and gives each of the model's
    /// [`Channels`] its own, to be pruned afterwards. The threads of the budget take some channels each; its time is
    /// that of all together, its sweeps are those of each search.
    ///
    /// `scores` is asked for what each weight is worth, by the layer's name and its weights (of masked ones those in
    /// effect), as an array of their shape, finite and at least 0. Channels of which a layer is compressed already are
    /// left alone: the order of a compressed matrix is fixed. Never worse: channels of which nothing better is found
    /// stay.
    ///
    /// ```
    /// use sparse24::graph::{Checkpoint, Sparsity};
    /// use sparse24::models::bert::{BertConfig, Sizes};
    /// use sparse24::prune::permute::Budget;
    /// use sparse24::{Activation, DType, VectorLen};
    /// let sizes = Sizes { vocabulary: 9, hidden: 16, layers: 2, heads: 2, intermediate: 32, positions: 4, types: 1 };
    /// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
    /// let mut checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
    /// let vector = VectorLen::new(4)?;
    ///
    /// // By magnitude; another criterion would look up what it knows of the layer's inputs by its name.
    /// let all = checkpoint.permute(vector, &Budget::sweeps(10), |_name, w| Ok(w.to_array().mapv(f32::abs)))?;
    /// assert!(all.iter().flat_map(|of| &of.kept).map(|(_, kept)| kept.after - kept.before).sum::<f64>() > 0.0);
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
        let graph = self.graph().clone();
        // Those that take longest first, and in a turn with their like.
        let mut order: Vec<usize> = (0..graph.channels().len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(effort(&graph.channels()[at])));
        let mut turns: Vec<Vec<usize>> = Vec::new();
        for at in order {
            // Channels of one layer, its rows and its columns, are not searched at once: each changes the other's
            // scores.
            let apart = |other: &usize| !shares(&graph, &graph.channels()[at], &graph.channels()[*other]);
            match turns.last_mut().filter(|turn| turn.len() < threads && turn.iter().all(apart)) {
                Some(turn) => turn.push(at),
                None => turns.push(vec![at]),
            }
        }
        let longest = |turn: &[usize]| turn.iter().map(|&at| effort(&graph.channels()[at])).max().unwrap_or(0);
        let all: usize = turns.iter().map(|turn| longest(turn)).sum();
        let mut found: Vec<Option<Permuted>> = vec![None; graph.channels().len()];
        // A turn has no more searches than threads, so that there are no more scores at once than are needed.
        for turn in &turns {
            let part = budget.part(longest(turn) as f64 / all.max(1) as f64);
            let tasks: Vec<_> = turn
                .iter()
                .map(|&at| {
                    let channels = &graph.channels()[at];
                    let budget = Budget { threads: 1, seed: budget.seed.wrapping_add(at as u64), ..part };
                    Ok(Task { channels, scores: self.scores(channels, &mut scores)?, vector, budget })
                })
                .collect::<Result<_>>()?;
            let orders: Vec<Result<_>> = thread::scope(|scope| {
                let running: Vec<_> = tasks.iter().map(|task| scope.spawn(|| task.search())).collect();
                let failed = || Error::invalid("a thread that searched for an order panicked");
                running.into_iter().map(|task| task.join().unwrap_or_else(|_| Err(failed()))).collect()
            });
            for (&at, orders) in turn.iter().zip(orders) {
                let orders = orders?;
                if !orders.kept.is_empty() {
                    self.reorder(&orders.channels, &orders.orders)?;
                }
                found[at] = Some(orders);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// The scores of the layers that have these channels, by their weights; none if one is compressed.
    fn scores(
        &self,
        channels: &Channels,
        scores: &mut impl FnMut(&str, &Matrix) -> Result<Array2<f32>>,
    ) -> Result<Vec<(ParamId, String, Array2<f32>)>> {
        let graph = self.graph();
        let own: Vec<_> = graph.linears().filter(|layer| has(channels, layer.weights)).collect();
        let compressed = |name: &str| matches!(self.linear(name).map(|w| &**w), Ok(HostWeights::Sparse24(_)));
        if own.iter().any(|layer| compressed(layer.name)) {
            return Ok(Vec::new());
        }
        let of = |layer: LinearLayer<'_>| {
            let w = self.linear(layer.name)?;
            let scored = scores(layer.name, &w.to_dense()?)?;
            expect_shape(&format!("scores of {}", layer.name), scored.dim(), (w.m(), w.k()))?;
            Ok((layer.weights, layer.name.to_owned(), scored))
        };
        own.into_iter().map(of).collect()
    }
}

/// Whether a layer has both.
fn shares(graph: &Graph, one: &Channels, other: &Channels) -> bool {
    graph.linears().any(|layer| has(one, layer.weights) && has(other, layer.weights))
}

fn has(channels: &Channels, weights: ParamId) -> bool {
    let of = |set: &ChannelSet| set.rows.iter().any(|(id, _)| *id == weights) || set.columns.contains(&weights);
    channels.sets.iter().any(of)
}

/// How much of the time a search gets: channels that may go anywhere have far more orders than those of blocks.
fn effort(channels: &Channels) -> usize {
    if channels.width == channels.count { 3 } else { 1 }
}

/// The search for the orders of some channels.
struct Task<'a> {
    channels: &'a Channels,
    scores: Vec<(ParamId, String, Array2<f32>)>,
    vector: VectorLen,
    budget: Budget,
}

/// The share of the time that goes to the order of blocks, where they may move.
const BLOCKS: f64 = 0.08;

impl Task<'_> {
    fn search(&self) -> Result<Permuted> {
        let Channels { name, count, width, blocks_move, sets } = self.channels;
        let identity: Vec<usize> = (0..*count).collect();
        let mut found =
            Permuted { channels: name.clone(), orders: vec![identity.clone(); sets.len()], kept: Vec::new() };
        if self.scores.is_empty() {
            return Ok(found);
        }
        let inside = if width == count { Moves::All } else { Moves::Inside(*width) };
        let blocks = if *blocks_move && width < count {
            let rows = sets.iter().map(|set| self.rows(set, &identity)).collect::<Result<Vec<_>>>()?.concat();
            search(&rows, Moves::Wholes(*width), &self.budget.part(BLOCKS))?.order
        } else {
            identity
        };
        // By the number of their uses: columns are a layer of their own.
        let weight = |set: &ChannelSet| if set.columns.is_empty() { 1.0 } else { 2.0 };
        let all: f64 = sets.iter().map(weight).sum();
        let time = if *blocks_move && width < count { 1.0 - BLOCKS } else { 1.0 };
        let mut orders = Vec::new();
        for set in sets {
            let mut uses = self.rows(set, &blocks)?;
            for columns in &set.columns {
                uses.push(Use::columns(self.scored(*columns)?.select(Axis(1), &blocks).view(), self.vector)?);
            }
            let order = search(&uses, inside, &self.budget.part(time * weight(set) / all))?.order;
            orders.push(order.into_iter().map(|i| blocks[i]).collect::<Vec<_>>());
        }
        // A layer of several parts is pruned as one matrix: its blocks of rows are not those of its parts if V does not
        // divide them. So what is kept is counted again, for each layer as it will be pruned.
        let mut gained = 0.0;
        let mut kept = Vec::new();
        for (id, layer, scores) in &self.scores {
            let (mut rows, mut columns) = ((0..scores.nrows()).collect::<Vec<_>>(), None);
            for (set, order) in sets.iter().zip(&orders) {
                for (_, first) in set.rows.iter().filter(|(of, _)| of == id) {
                    order.iter().enumerate().for_each(|(place, channel)| rows[first + place] = first + channel);
                }
                columns = columns.or_else(|| set.columns.contains(id).then_some(order));
            }
            let share = match columns {
                Some(order) => share(&Use::columns(scores.view(), self.vector)?, order)?,
                None => share(&Use::rows(scores.view(), self.vector)?, &rows)?,
            };
            gained += (share.after - share.before) * scores.len() as f64;
            kept.push((layer.clone(), share));
        }
        if gained > 0.0 {
            found.orders = orders;
        } else {
            kept.iter_mut().for_each(|(_, kept)| kept.after = kept.before);
        }
        found.kept = kept;
        Ok(found)
    }

    fn scored(&self, weights: ParamId) -> Result<&Array2<f32>> {
        let found = self.scores.iter().find(|(id, ..)| *id == weights).map(|(.., scores)| scores);
        found.ok_or_else(|| Error::invalid(format!("channels {} are of no linear layer", self.channels.name)))
    }

    /// The rows that a set's channels are, in this order.
    fn rows(&self, set: &ChannelSet, order: &[usize]) -> Result<Vec<Use>> {
        let count = self.channels.count;
        let rows = set.rows.iter().map(|&(weights, first)| {
            let scores = self.scored(weights)?.slice(s![first..first + count, ..]);
            Use::rows(scores.select(Axis(0), order).view(), self.vector)
        });
        rows.collect()
    }
}

/// What one use keeps as it is and in this order.
fn share(of: &Use, order: &[usize]) -> Result<Kept> {
    let identity: Vec<_> = (0..order.len()).collect();
    let of = slice::from_ref(of);
    Ok(Kept { before: permute::kept(of, &identity)?, after: permute::kept(of, order)? })
}

/// The order of all of `rows` rows of which those from `first` on come in this order, and the others stay.
fn within(rows: usize, first: usize, order: &[usize]) -> Vec<usize> {
    (0..first).chain(order.iter().map(|i| first + i)).chain(first + order.len()..rows).collect()
}

fn is_identity(order: &[usize]) -> bool {
    order.iter().enumerate().all(|(place, &channel)| place == channel)
}
