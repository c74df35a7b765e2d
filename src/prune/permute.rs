//! The order of channels in which 2:4 keeps most: a search over permutations, which cost nothing at run time where the
//! layer before or after takes them in.
//!
//! 2:4 keeps two of every four *consecutive* inputs. Which four stand together is an accident of training: if the
//! columns of W are permuted, and the features of the layer before (its rows and its bias) likewise, the model computes
//! the same, but other weights compete with each other. Pool & Yu ("Channel Permutations for N:M Sparsity", NeurIPS
//! 2021) search for orders in which more magnitude survives. Where V rows share one pattern, the order of the rows
//! matters as well: rows that want the same columns should stand in one block (Tan et al., "Accelerating Sparse
//! Convolution with Column Vector-Wise Sparsity", NeurIPS 2022; Yu et al. 2024,
//! [arXiv:2407.20496](https://arxiv.org/abs/2407.20496)). The features between two layers are rows of the first and
//! columns of the second, so that one order serves both, and here both are searched at once.
//!
//! # What is maximised
//! A set of channels is to be ordered, and a list of [`Use`]s depends on it. Each is a matrix of scores, as a criterion
//! gives them: what is lost if a weight is dropped. A use keeps, for each block of V rows and each group of four
//! columns, the two columns with the largest sums; divided by the sum of all its scores that is its *share*, and the
//! objective is the mean of the shares by [`Use::weighted`]. Each use is divided by its own total because scores of
//! different layers may have different units.
//!
//! # The search
//! A *unit* of a use is the four places of a group or the V places of a block of rows. What a unit keeps depends on the
//! set of its members only. Take one channel out of each of several units: every unit is then waiting for one channel,
//! what each of the channels would add to each of the units can be computed, and the best way to hand them out is a
//! linear assignment problem, solved exactly (shortest augmenting paths). That exchanges up to 64 channels at once
//! where the greedy search of the paper swaps two, and a swap is one of the ways that it considers. Where units of one
//! use lie inside those of another (groups in blocks of rows), rounds alternate between exchanges across the larger
//! units and exchanges inside each of them, which the larger ones do not notice.
//!
//! A group of four that has three members with `first ≥ second ≥ third` in a block keeps `first + max(second, x)` if it
//! gets `x`: one maximum and one addition for each pair of a channel and a group. A block of rows has the sums of its
//! members ready and adds the candidate.
//!
//! To leave local maxima, noise is added to what an exchange is said to gain, first twice the gains' own spread,
//! falling to none over the first nine tenths of the budget: annealing, whose moves are assignments.
//!
//! Invariant: an order that is returned names every channel once, respects [`Moves`], and keeps no less than the order
//! that was there: the two are compared in f64 at the end.
//!
//! # What it gains
//! The feed-forward part of all-MiniLM-L6-v2's first layer by magnitude: 1536 channels, rows of a matrix of 384 columns
//! and columns of one of 384 rows. Mean share kept of both, on two threads of an EPYC that had four times as much to
//! do:
//!
//! | V | before | 5 s | 20 s | 60 s | loss regained in 60 s |
//! |---|---|---|---|---|---|
//! | 1 | 0.7497 | 0.7571 | 0.7573 | 0.7575 | 3.1 % |
//! | 4 | 0.6342 | 0.6484 | 0.6493 | | |
//! | 32 | 0.5607 | 0.5799 | 0.5806 | 0.5814 | 4.7 % |
//! | 128 | 0.5454 | 0.5614 | 0.5623 | 0.5630 | 3.9 % |
//!
//! At V = 1 all of it is the second matrix's, 0.7529 to 0.7686; the largest half of its weights wherever they stand
//! would be 0.8062, so that 29 % of what the structure costs comes back. Normally distributed weights of the same
//! shapes gain about as much (in 6 s 0.7446 to 0.7513, 0.5444 to 0.5597, 0.5220 to 0.5358 for V = 1, 32, 128): most of
//! the gain is the freedom of choice, not something that the order of a trained model hides.
//!
//! # Tried and rejected
//! - On the same part of MiniLM, 5 s: starting from a balanced clustering of the rows (patterns of blocks and
//!   membership improved in turn, 30 times) keeps 0.5862 of the first matrix for V = 32 by itself, and 0.5884 when the
//!   search goes on from there; from the order of the file the search comes to 0.5889. For V = 128: 0.5662, 0.5670,
//!   0.5675.
//! - On the same part, 5 s: without noise the mean of both matrices is 0.5792 for V = 32 and 0.5611 for V = 128, with
//!   noise 0.5808 and 0.5626. At V = 1 noise changes less than 0.0003 of one matrix.
//! - One order for the features of the residual stream, of all layers at once (it would have to be undone at the end):
//!   as columns and rows of MiniLM's 36 matrices, 384 channels, 12 s, it takes the mean share from 0.7499 to 0.7520 for
//!   V = 1, from 0.5627 to 0.5674 for V = 32, from 0.5457 to 0.5506 for V = 128.
//!
//! # Example
//! ```
//! use ndarray::array;
//! use sparse24::VectorLen;
//! use sparse24::prune::permute::{Budget, Moves, Use, search};
//!
//! // Large weights stand together, so that half of them are lost.
//! let scores = array![[9f32, 9., 9., 9., 1., 1., 1., 1.], [8., 8., 8., 8., 2., 2., 2., 2.]];
//! let uses = [Use::columns(scores.view(), VectorLen::ONE)?];
//! let found = search(&uses, Moves::All, &Budget::sweeps(20))?;
//! assert!((found.before - 0.5).abs() < 1e-6 && (found.after - 0.85).abs() < 1e-6);
//!
//! // The columns of W in their new places; features of the layer before, or of the input, go the same way.
//! let permuted = scores.select(ndarray::Axis(1), &found.order);
//! let large = permuted.row(0).iter().take(4).filter(|&&x| x == 9.0).count();
//! assert_eq!(large, 2);
//! # Ok::<(), sparse24::Error>(())
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use web_time::Instant;

use ndarray::ArrayView2;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::mask::VectorLen;
use crate::matrix::{Element, Matrix, each_dtype};

/// Partial sums that the compiler can keep in vectors; features are padded with zeros to a multiple.
const LANES: usize = 8;
/// Most channels in one assignment. Cost grows with its square to its cube, gain does not.
const MOST: usize = 64;
/// Noise at the start, in standard deviations of the gains.
const NOISE: f32 = 2.0;

/// What the order of the channels is for a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    Columns,
    Rows,
}

/// A matrix of scores whose rows or columns are the channels that are to be ordered.
#[derive(Clone, Debug)]
pub struct Use {
    axis: Axis,
    /// Consecutive places that compete (4 columns) or share a pattern (V rows).
    unit: usize,
    channels: usize,
    /// Features of a channel, with padding.
    len: usize,
    /// Channel after channel, as shares of the total. Of a column its sum over each block of rows; of a row its scores
    /// in four planes: those at position 0 of all groups, those at position 1, and so on.
    features: Vec<f32>,
    weight: f64,
}

impl Use {
    /// The columns of `scores`, `m x N`, are the channels; every `vector` rows share a pattern. Scores are finite and
    /// at least 0, else an error names the first that is not.
    pub fn columns(scores: ArrayView2<'_, f32>, vector: VectorLen) -> Result<Self> {
        check_scores(scores)?;
        let (m, channels) = scores.dim();
        let len = m.div_ceil(vector.get()).next_multiple_of(LANES);
        let mut sums = vec![0f64; channels * len];
        for ((row, channel), &x) in scores.indexed_iter() {
            sums[channel * len + row / vector.get()] += f64::from(x);
        }
        Ok(Self::new(Axis::Columns, 4, channels, len, &sums))
    }

    /// The rows of `scores`, `N x k`, are the channels; every `vector` of them share a pattern. Errors are those of
    /// [`Use::columns`].
    pub fn rows(scores: ArrayView2<'_, f32>, vector: VectorLen) -> Result<Self> {
        check_scores(scores)?;
        let (channels, k) = scores.dim();
        let plane = k.div_ceil(4).next_multiple_of(LANES);
        let mut planes = vec![0f64; channels * 4 * plane];
        for ((channel, col), &x) in scores.indexed_iter() {
            planes[(channel * 4 + col % 4) * plane + col / 4] = f64::from(x);
        }
        Ok(Self::new(Axis::Rows, vector.get(), channels, 4 * plane, &planes))
    }

    /// Its weight in the mean of the shares, 1 unless given. An error if it is negative, infinite or NaN.
    pub fn weighted(self, weight: f32) -> Result<Self> {
        if !(weight.is_finite() && weight >= 0.0) {
            return Err(Error::invalid(format!("the weight of a use is {weight}, expected a number of at least 0")));
        }
        Ok(Self { weight: f64::from(weight), ..self })
    }

    fn new(axis: Axis, unit: usize, channels: usize, len: usize, features: &[f64]) -> Self {
        let total: f64 = features.iter().sum();
        let share = |x: &f64| if total > 0.0 { (x / total) as f32 } else { 0.0 };
        Self { axis, unit, channels, len, features: features.iter().map(share).collect(), weight: 1.0 }
    }

    fn channel(&self, channel: usize) -> &[f32] {
        &self.features[channel * self.len..][..self.len]
    }

    /// The share that is kept in this order.
    fn kept(&self, order: &[usize]) -> f64 {
        // The shares' sum is 1 up to rounding; of a matrix of zeros nothing is lost.
        let total: f64 = self.features.iter().map(|&x| f64::from(x)).sum();
        if total == 0.0 {
            return 1.0;
        }
        let column = |members: &[usize], i: usize| best_two(members.iter().map(|&c| f64::from(self.channel(c)[i])));
        let mut sums = vec![0f64; self.len];
        let kept: f64 = order
            .chunks(self.unit)
            .map(|members| match self.axis {
                Axis::Columns => (0..self.len).map(|i| column(members, i)).sum::<f64>(),
                Axis::Rows => {
                    sums.fill(0.0);
                    for &c in members {
                        sums.iter_mut().zip(self.channel(c)).for_each(|(sum, &x)| *sum += f64::from(x));
                    }
                    let plane = self.len / 4;
                    (0..plane).map(|group| best_two((0..4).map(|p| sums[p * plane + group]))).sum()
                }
            })
            .sum();
        kept / total
    }

    /// The same use with blocks of `size` channels as its channels, if what a unit keeps is a function of whole blocks.
    fn of_blocks(&self, size: usize) -> Option<Self> {
        if self.axis == Axis::Columns || !self.unit.is_multiple_of(size) {
            return None;
        }
        let blocks = self.channels / size;
        let mut features = vec![0f64; blocks * self.len];
        for (channel, x) in self.features.chunks_exact(self.len).enumerate() {
            let sums = &mut features[channel / size * self.len..][..self.len];
            sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let weight = self.weight;
        Some(Self { weight, ..Self::new(Axis::Rows, self.unit / size, blocks, self.len, &features) })
    }

    /// The unit of a place.
    fn unit_of(&self, place: usize) -> usize {
        place / self.unit
    }

    /// Whether exchanges within these places can change what it keeps.
    fn varies_in(&self, places: &Range<usize>) -> bool {
        self.unit_of(places.start) != self.unit_of(places.end - 1)
    }
}

/// The sum of the two largest, all at least 0.
fn best_two(scores: impl Iterator<Item = f64>) -> f64 {
    let (first, second) = scores.fold((0f64, 0f64), |(a, b), x| (a.max(x), b.max(x.min(a))));
    first + second
}

fn check_scores(scores: ArrayView2<'_, f32>) -> Result<()> {
    match scores.indexed_iter().find(|(_, x)| !(x.is_finite() && **x >= 0.0)) {
        None => Ok(()),
        Some(((row, col), x)) => Err(Error::invalid(format!(
            "the score at row {row}, column {col} is {x}, expected a finite number of at least 0"
        ))),
    }
}

/// Which orders are allowed. Blocks are of so many consecutive channels, as those of an attention head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moves {
    /// Every order.
    All,
    /// Channels stay in the places of their block.
    Inside(usize),
    /// Blocks change places, each with its channels in the order that they have. Uses of rows whose V is a multiple of
    /// the block say where they should go; others only whether the result is an improvement.
    Wholes(usize),
    /// Both: blocks change places, and channels their places in the block.
    Both(usize),
}

/// How long to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// As long as this, whatever is reached. What is found depends on the machine.
    Time(Duration),
    /// So many sweeps, in each of which every channel has on average one turn to be exchanged across the units of each
    /// use. What is found depends on the seed alone, not on the number of threads.
    Sweeps(u64),
}

/// What a search may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// When it ends.
    pub bound: Bound,
    /// Threads; 0 for as many as the machine has.
    pub threads: usize,
    /// Of the random choices.
    pub seed: u64,
}

impl Budget {
    /// A time on one thread, with seed 0.
    pub fn time(time: Duration) -> Self {
        Self { bound: Bound::Time(time), threads: 1, seed: 0 }
    }

    /// A number of sweeps on one thread, with seed 0.
    pub fn sweeps(sweeps: u64) -> Self {
        Self { bound: Bound::Sweeps(sweeps), threads: 1, seed: 0 }
    }

    /// The same with a part of the time; sweeps are sweeps of something smaller, too.
    pub(crate) fn part(self, part: f64) -> Self {
        match self.bound {
            Bound::Time(time) => Self { bound: Bound::Time(time.mul_f64(part)), ..self },
            Bound::Sweeps(_) => self,
        }
    }
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The channel that belongs at each place: place `i` is for what was channel `order[i]`.
    pub order: Vec<usize>,
    /// The mean share of the scores that is kept without it.
    pub before: f64,
    /// The mean share with it, at least `before`.
    pub after: f64,
    /// Rounds of exchanges that were made.
    pub rounds: u64,
}

/// The mean share of the scores that the uses keep with their channels in this order. An error if there is no use or no
/// weight, uses differ in their number of channels, or `order` does not name each once.
pub fn kept(uses: &[Use], order: &[usize]) -> Result<f64> {
    check_order("order", order, channels(uses)?)?;
    Ok(mean(uses, order))
}

fn mean(uses: &[Use], order: &[usize]) -> f64 {
    let weights: f64 = uses.iter().map(|u| u.weight).sum();
    uses.iter().map(|u| u.weight * u.kept(order)).sum::<f64>() / weights
}

/// The number of channels of all uses.
fn channels(uses: &[Use]) -> Result<usize> {
    let Some(first) = uses.first() else { return Err(Error::invalid("no use of the channels")) };
    if let Some(other) = uses.iter().find(|u| u.channels != first.channels) {
        let (a, b) = (first.channels, other.channels);
        return Err(Error::invalid(format!("one use has {a} channels, another has {b}")));
    }
    if uses.iter().all(|u| u.weight == 0.0) {
        return Err(Error::invalid("all uses have weight 0"));
    }
    Ok(first.channels)
}

/// That every number below `n` is there once.
pub(crate) fn check_order(what: &str, order: &[usize], n: usize) -> Result<()> {
    if order.len() != n {
        return Err(Error::shape(what, vec![order.len()], vec![n]));
    }
    let mut seen = vec![false; n];
    for (place, &channel) in order.iter().enumerate() {
        match seen.get_mut(channel) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => {
                return Err(Error::invalid(format!("{what} has {channel} at place {place} for the second time")));
            }
            None => return Err(Error::invalid(format!("{what} has {channel} at place {place}, there are {n}"))),
        }
    }
    Ok(())
}

/// The matrix whose row `i` is row `order[i]` of `w`. An error if `order` does not name each row once.
pub fn rows(w: &Matrix, order: &[usize]) -> Result<Matrix> {
    fn select<T: Element>(data: &[T], cols: usize, order: &[usize]) -> crate::matrix::Elements {
        T::wrap(order.iter().flat_map(|&row| &data[row * cols..][..cols]).copied().collect())
    }
    check_order("order of rows", order, w.rows())?;
    Matrix::new(w.rows(), w.cols(), each_dtype!(w.elements(), data => select(data, w.cols(), order)))
}

/// The matrix whose column `i` is column `order[i]` of `w`. An error if `order` does not name each column once.
pub fn columns(w: &Matrix, order: &[usize]) -> Result<Matrix> {
    fn select<T: Element>(data: &[T], order: &[usize]) -> crate::matrix::Elements {
        let rows = data.chunks_exact(order.len().max(1));
        T::wrap(rows.flat_map(|row| order.iter().map(|&col| row[col])).collect())
    }
    check_order("order of columns", order, w.cols())?;
    Matrix::new(w.rows(), w.cols(), each_dtype!(w.elements(), data => select(data, order)))
}

/// Searches for the order of the channels in which the uses keep most. Errors are those of [`kept`], and blocks of a
/// size that does not divide the number of channels.
pub fn search(uses: &[Use], moves: Moves, budget: &Budget) -> Result<Found> {
    let n = channels(uses)?;
    if let Moves::Inside(size) | Moves::Wholes(size) | Moves::Both(size) = moves
        && (size == 0 || !n.is_multiple_of(size))
    {
        return Err(Error::invalid(format!("blocks of {size} channels do not divide {n}")));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(budget.threads).build();
    let pool = pool.map_err(|e| Error::invalid(format!("{} threads: {e}", budget.threads)))?;
    let identity: Vec<usize> = (0..n).collect();
    let before = mean(uses, &identity);
    let (order, rounds) = pool.install(|| match moves {
        Moves::All => anneal(uses, identity.clone(), n, budget),
        Moves::Inside(size) => anneal(uses, identity.clone(), size, budget),
        Moves::Wholes(size) => wholes(uses, size, budget),
        // Neither notices the other: exchanges inside of blocks do not touch units that hold whole blocks.
        Moves::Both(size) => {
            let (order, some) = wholes(uses, size, &budget.part(0.1));
            let (order, more) = anneal(uses, order, size, &budget.part(0.9));
            (order, some + more)
        }
    });
    let after = mean(uses, &order);
    if after > before {
        return Ok(Found { order, before, after, rounds });
    }
    Ok(Found { order: identity, before, after: before, rounds })
}

/// The best order of blocks that keep their inner order.
fn wholes(uses: &[Use], size: usize, budget: &Budget) -> (Vec<usize>, u64) {
    let Some(channels) = uses.first().map(|u| u.channels) else { return (Vec::new(), 0) };
    let blocks: Vec<Use> = uses.iter().filter_map(|u| u.of_blocks(size)).collect();
    let n = channels / size;
    let (order, rounds) = anneal(&blocks, (0..n).collect(), n, budget);
    (order.iter().flat_map(|block| block * size..(block + 1) * size).collect(), rounds)
}

/// Rounds of exchanges among channels of the same `block` places, until the budget is spent.
fn anneal(uses: &[Use], order: Vec<usize>, block: usize, budget: &Budget) -> (Vec<usize>, u64) {
    // One row to a pattern has the same pattern in any place.
    let uses: Vec<&Use> = uses.iter().filter(|u| u.unit > 1 && u.weight > 0.0).collect();
    let mut rng = Pcg32::new(budget.seed, 0);

    // Regions to exchange in: the block, and every unit in which there are smaller ones. With one channel of each of
    // its largest inner units at a time, it takes as many rounds as such a unit has places until all had a turn.
    let mut regions: Vec<usize> = uses.iter().map(|u| u.unit).filter(|&unit| unit < block).chain([block]).collect();
    regions.sort_unstable();
    regions.dedup();
    let inner = |region: usize| uses.iter().map(|u| u.unit).filter(|&unit| unit < region).max();
    let mut sweep: Vec<usize> =
        regions.iter().flat_map(|&region| std::iter::repeat_n(region, inner(region).unwrap_or(0))).collect();
    if sweep.is_empty() || order.len() < 2 {
        return (order, 0);
    }

    let weights: f64 = uses.iter().map(|u| u.weight).sum();
    let weights = uses.iter().map(|u| (u.weight / weights) as f32).collect();
    let mut state =
        State { sums: vec![Vec::new(); uses.len()], uses, weights, order, block, usual: BTreeMap::new(), gained: 0.0 };
    let mut best = (0.0, state.order.clone());
    let (began, mut rounds) = (Instant::now(), 0u64);
    loop {
        shuffle(&mut sweep, &mut rng);
        // Anew, so that rounding does not build up.
        state.add_up();
        for &region in &sweep {
            let spent = match budget.bound {
                Bound::Time(time) => began.elapsed().as_secs_f64() / time.as_secs_f64(),
                Bound::Sweeps(sweeps) => rounds as f64 / (sweeps as f64 * sweep.len() as f64),
            };
            // Not below 1 for a budget of nothing, either: 0 / 0 is NaN.
            if spent.is_nan() || spent >= 1.0 {
                return (best.1, rounds);
            }
            let warmth = (1.0 - spent / 0.9).max(0.0) as f32;
            state.round(region, NOISE * warmth * warmth, &mut rng);
            rounds += 1;
            // Of few channels the best order may be met long before the end.
            if state.gained > best.0 {
                best.0 = state.gained;
                best.1.copy_from_slice(&state.order);
            }
        }
    }
}

/// Places whose channels are exchanged among themselves.
struct Exchange {
    region: Range<usize>,
    places: Vec<usize>,
    seed: u64,
}

/// An exchange that is decided.
struct Assigned {
    /// For each place, which of the places its channel comes from.
    to: Vec<usize>,
    /// What it gains, without noise.
    gained: f32,
    spread: f32,
}

/// An order, and what is needed to judge exchanges.
struct State<'a> {
    uses: Vec<&'a Use>,
    /// The weight of each; their sum is 1.
    weights: Vec<f32>,
    order: Vec<usize>,
    /// Of each use of rows, the sum of the features of every unit's members; empty for columns.
    sums: Vec<Vec<f32>>,
    block: usize,
    /// The spread of gains, by the size of the regions: a mean over the last exchanges.
    usual: BTreeMap<usize, f32>,
    /// What all exchanges have gained.
    gained: f64,
}

impl State<'_> {
    fn add_up(&mut self) {
        for (u, sums) in self.uses.iter().zip(&mut self.sums).filter(|(u, _)| u.axis == Axis::Rows) {
            sums.clear();
            for members in self.order.chunks(u.unit) {
                let unit = sums.len();
                sums.resize(unit + u.len, 0.0);
                for &channel in members {
                    sums[unit..].iter_mut().zip(u.channel(channel)).for_each(|(sum, x)| *sum += x);
                }
            }
        }
    }

    /// Exchanges channels within regions of so many places.
    fn round(&mut self, region: usize, noise: f32, rng: &mut Pcg32) {
        let exchanges = self.draw(region, rng);
        let this = &*self;
        let usual = self.usual.get(&region).copied();
        let assigned: Vec<_> = exchanges.par_iter().map(|exchange| this.assign(exchange, noise, usual)).collect();
        for (exchange, Assigned { to, gained, spread }) in exchanges.iter().zip(assigned) {
            self.gained += f64::from(gained);
            self.usual.entry(region).and_modify(|usual| *usual += 0.05 * (spread - *usual)).or_insert(spread);
            let channels: Vec<_> = exchange.places.iter().map(|&place| self.order[place]).collect();
            for (&place, to) in exchange.places.iter().zip(to) {
                self.put(place, channels[to]);
            }
        }
    }

    /// Places drawn so that no unit in which something can change has two: only then is what each would gain
    /// independent of the others.
    fn draw(&self, region: usize, rng: &mut Pcg32) -> Vec<Exchange> {
        let n = self.order.len();
        let mut places: Vec<_> = (0..n).collect();
        shuffle(&mut places, rng);
        let mut taken: Vec<_> = self.uses.iter().map(|u| vec![false; n.div_ceil(u.unit)]).collect();
        let mut drawn: BTreeMap<usize, (Range<usize>, Vec<usize>)> = BTreeMap::new();
        for place in places {
            let of = |size: usize| place / size * size..(place / size + 1) * size;
            let (region, block) = (of(region), of(self.block));
            let region = region.start.max(block.start)..region.end.min(block.end).min(n);
            let varying = || (0..self.uses.len()).filter(|&i| self.uses[i].varies_in(&region));
            if varying().next().is_none() || varying().any(|i| taken[i][self.uses[i].unit_of(place)]) {
                continue;
            }
            varying().for_each(|i| taken[i][self.uses[i].unit_of(place)] = true);
            drawn.entry(region.start).or_insert_with(|| (region, Vec::new())).1.push(place);
        }
        let mut exchanges = Vec::new();
        for (region, places) in drawn.into_values() {
            let parts = places.len().div_ceil(MOST);
            for places in places.chunks(places.len().div_ceil(parts)).filter(|places| places.len() > 1) {
                let (region, places, seed) = (region.clone(), places.to_vec(), u64::from(rng.next_u32()));
                exchanges.push(Exchange { region, places, seed });
            }
        }
        exchanges
    }

    /// Hands out an exchange's channels. Noise is in units of the usual spread: that of one exchange of two channels
    /// would say no more than what they gain.
    fn assign(&self, exchange: &Exchange, noise: f32, usual: Option<f32>) -> Assigned {
        let k = exchange.places.len();
        let mut gains = vec![0f32; k * k];
        for (i, _) in self.uses.iter().enumerate().filter(|(_, u)| u.varies_in(&exchange.region)) {
            self.add_gains(i, &exchange.places, &mut gains);
        }
        let spread = spread(&gains, k);
        let most = noise * usual.unwrap_or(spread);
        let mut rng = Pcg32::new(exchange.seed, 1);
        let mut noisy = |gain: &f32| gain + most * (rng.next_u32() >> 8) as f32 / (1u32 << 24) as f32;
        let said: Vec<f32> = gains.iter().map(&mut noisy).collect();
        let mut to = assignment(&said, k);
        let sum = |of: &[f32], to: &[usize]| to.iter().enumerate().map(|(i, &j)| of[i * k + j] - of[i * k + i]).sum();
        // Ties, and what rounding makes of them, are left alone.
        let said: f32 = sum(&said, &to);
        if said <= 0.0 {
            to = (0..k).collect();
        }
        Assigned { gained: sum(&gains, &to), to, spread }
    }

    /// Adds what each place's unit of a use keeps with each place's channel in place of its own.
    fn add_gains(&self, i: usize, places: &[usize], gains: &mut [f32]) {
        let (u, weight, sums) = (self.uses[i], self.weights[i], &self.sums[i]);
        let (mut base, mut first) = (vec![0f32; u.len], vec![0f32; u.len]);
        for (&place, gains) in places.iter().zip(gains.chunks_exact_mut(places.len())) {
            let (unit, own) = (u.unit_of(place), self.order[place]);
            let with = match u.axis {
                // The second largest of the others; the largest stays whoever comes.
                Axis::Columns => {
                    base.fill(0.0);
                    first.fill(0.0);
                    let members = &self.order[unit * u.unit..self.order.len().min((unit + 1) * u.unit)];
                    for &channel in members.iter().filter(|&&channel| channel != own) {
                        for ((second, first), &x) in base.iter_mut().zip(&mut first).zip(u.channel(channel)) {
                            *second = max(*second, min(*first, x));
                            *first = max(*first, x);
                        }
                    }
                    column_kept
                }
                Axis::Rows => {
                    let sums = &sums[unit * u.len..][..u.len];
                    for ((base, sum), x) in base.iter_mut().zip(sums).zip(u.channel(own)) {
                        *base = sum - x;
                    }
                    rows_kept
                }
            };
            for (gain, &other) in gains.iter_mut().zip(places) {
                *gain += weight * with(&base, u.channel(self.order[other]));
            }
        }
    }

    fn put(&mut self, place: usize, channel: usize) {
        let old = std::mem::replace(&mut self.order[place], channel);
        if old == channel {
            return;
        }
        for (u, sums) in self.uses.iter().zip(&mut self.sums).filter(|(u, _)| u.axis == Axis::Rows) {
            let sums = &mut sums[u.unit_of(place) * u.len..][..u.len];
            for ((sum, new), old) in sums.iter_mut().zip(u.channel(channel)).zip(u.channel(old)) {
                *sum += new - old;
            }
        }
    }
}

/// Not `f32::max`: without its rule for NaN this is one instruction.
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// What a group keeps with a column `x`, less the largest of its other three, which it keeps in any case.
fn column_kept(second: &[f32], x: &[f32]) -> f32 {
    let mut kept = [0f32; LANES];
    for (second, x) in second.as_chunks::<LANES>().0.iter().zip(x.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            kept[i] += max(second[i], x[i]);
        }
    }
    kept.iter().sum()
}

/// What a block of rows keeps with a row `x`, where `base` is the sum of its others.
fn rows_kept(base: &[f32], x: &[f32]) -> f32 {
    fn planes(v: &[f32]) -> [&[[f32; LANES]]; 4] {
        let plane = v.len() / 4;
        [0, 1, 2, 3].map(|p| v[p * plane..][..plane].as_chunks::<LANES>().0)
    }
    let mut kept = [0f32; LANES];
    let ([b0, b1, b2, b3], [x0, x1, x2, x3]) = (planes(base), planes(x));
    let low = b0.iter().zip(x0).zip(b1.iter().zip(x1));
    let high = b2.iter().zip(x2).zip(b3.iter().zip(x3));
    for (((b0, x0), (b1, x1)), ((b2, x2), (b3, x3))) in low.zip(high) {
        for i in 0..LANES {
            let (s0, s1, s2, s3) = (b0[i] + x0[i], b1[i] + x1[i], b2[i] + x2[i], b3[i] + x3[i]);
            let (low, high) = ((min(s0, s1), max(s0, s1)), (min(s2, s3), max(s2, s3)));
            kept[i] += max(low.1, high.1) + max(min(low.1, high.1), max(low.0, high.0));
        }
    }
    kept.iter().sum()
}

fn shuffle(items: &mut [usize], rng: &mut Pcg32) {
    for i in (1..items.len()).rev() {
        // The upper half of a product: uniform but for one part in 2^32 / i.
        let j = (u64::from(rng.next_u32()) * (i as u64 + 1)) >> 32;
        items.swap(i, j as usize);
    }
}

/// The standard deviation of what remains of a `k x k` matrix, `k` at least 2, without the means of its rows and of its
/// columns, which no assignment depends on.
fn spread(gains: &[f32], k: usize) -> f32 {
    let (mut rows, mut cols) = (vec![0f32; k], vec![0f32; k]);
    for (row, gains) in rows.iter_mut().zip(gains.chunks_exact(k)) {
        *row = gains.iter().sum::<f32>() / k as f32;
        cols.iter_mut().zip(gains).for_each(|(col, gain)| *col += gain / k as f32);
    }
    let mean = rows.iter().sum::<f32>() / k as f32;
    let squares = rows.iter().zip(gains.chunks_exact(k)).flat_map(|(row, gains)| {
        gains.iter().zip(&cols).map(move |(gain, col)| (gain - row - col + mean) * (gain - row - col + mean))
    });
    (squares.sum::<f32>() / ((k - 1) * (k - 1)) as f32).sqrt()
}

/// The column of each row, all different, with the largest sum of a `k x k` matrix: one row after the other enters by
/// the shortest augmenting path, with potentials that keep reduced costs at least 0 (Kuhn, Munkres; O(k³)).
fn assignment(gains: &[f32], k: usize) -> Vec<usize> {
    // Row and column 0 are outside of the matrix: the path of a new row begins at column 0.
    let (mut row_potential, mut col_potential) = (vec![0f32; k + 1], vec![0f32; k + 1]);
    let (mut row_of, mut before) = (vec![0; k + 1], vec![0; k + 1]);
    let (mut slack, mut reached) = (vec![0f32; k + 1], vec![false; k + 1]);
    for row in 1..=k {
        row_of[0] = row;
        slack.fill(f32::INFINITY);
        reached.fill(false);
        let mut at = 0;
        while row_of[at] != 0 {
            reached[at] = true;
            let row = row_of[at];
            let (mut step, mut next) = (f32::INFINITY, 0);
            for (col, gain) in (1..).zip(&gains[(row - 1) * k..][..k]) {
                if !reached[col] {
                    let cost = -gain - row_potential[row] - col_potential[col];
                    if cost < slack[col] {
                        (slack[col], before[col]) = (cost, at);
                    }
                    if slack[col] < step {
                        (step, next) = (slack[col], col);
                    }
                }
            }
            for col in 0..=k {
                if reached[col] {
                    row_potential[row_of[col]] += step;
                    col_potential[col] -= step;
                } else {
                    slack[col] -= step;
                }
            }
            at = next;
        }
        while at != 0 {
            row_of[at] = row_of[before[at]];
            at = before[at];
        }
    }
    let mut to = vec![0; k];
    for (col, &row) in row_of.iter().enumerate().skip(1) {
        to[row - 1] = col - 1;
    }
    to
}
