//! Masks of any granularity: single weights, rows, input channels or blocks of a matrix, pruned by a score in one
//! matrix or over several together.
//!
//! What is pruned as a whole is a *unit*. Every unit gets a score ([`Units`]), and of all units those with the lowest
//! scores go ([`prune_units`]). Masks, amounts and scores are those of
//! [`torch.nn.utils.prune`](https://docs.pytorch.org/docs/stable/nn.html#utilities), bit for bit where scores differ:
//!
//! | torch | here |
//! |---|---|
//! | `l1_unstructured` | [`Granularity::Weight`], [`Importance::Ln`] of any n |
//! | `random_unstructured` | [`Granularity::Weight`], [`Importance::Random`] (other random numbers) |
//! | `ln_structured`, `dim=0` | [`Granularity::Row`], [`Importance::Ln`] |
//! | `ln_structured`, `dim=1` | [`Granularity::Column`], [`Importance::Ln`] |
//! | `random_structured` | rows or columns, [`Importance::Random`] (other random numbers) |
//! | `global_unstructured` | [`prune_units`] of the weights of several matrices |
//! | `importance_scores` | [`Units::given`] |
//! | `PruningContainer`, a pruning after another | `before` of [`Units::new`] |
//! | `remove` | [`Mask::apply`] (torch leaves -0.0 where a negative weight was) |
//!
//! torch does not say which of several equal scores go. Here the last ones do, in the order of matrices, rows and
//! columns.
//!
//! Invariant: a mask keeps nothing that an earlier mask has left out, and the amount is of the units that the earlier
//! masks have left.

use std::fmt;
use std::str::FromStr;

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result, checked_mul, expect_len, expect_shape};
use crate::mask::Mask;
use crate::matrix::{Element, Matrix, each_dtype};
use crate::memory;

/// Which weights of a matrix `[out, in]` are pruned together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// Each weight by itself: unstructured pruning.
    Weight,
    /// A row: an output neuron, or a filter of a convolution.
    Row,
    /// An input feature. The kernel of a convolution is a matrix `[out, taps · in]`, in which the weights of an input
    /// channel are every `in`-th column; in other matrices `taps` is 1.
    Column {
        /// Lines times columns of the convolution's kernel.
        taps: usize,
    },
    /// A block of so many rows and columns, counted from the first ones. The last ones may be smaller.
    Block {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
}

impl Granularity {
    /// The number of units of a matrix of `rows x cols`. An error if a block has no weights, or a convolution's taps do
    /// not divide the columns.
    ///
    /// ```
    /// use sparse24::prune::Granularity;
    /// assert_eq!(Granularity::Column { taps: 9 }.units(64, 9 * 32)?, 32);
    /// assert_eq!(Granularity::Block { rows: 4, cols: 8 }.units(6, 16)?, 4);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn units(self, rows: usize, cols: usize) -> Result<usize> {
        match self {
            Self::Weight => checked_mul("weights", rows, cols),
            Self::Row => Ok(rows),
            Self::Column { taps } if taps > 0 && cols.is_multiple_of(taps) => Ok(cols / taps),
            Self::Column { taps } => Err(Error::invalid(format!("{cols} columns are no channels of {taps} taps each"))),
            Self::Block { rows: 0, .. } | Self::Block { cols: 0, .. } => {
                Err(Error::invalid(format!("a {self} has no weights")))
            }
            Self::Block { rows: r, cols: c } => checked_mul("blocks", rows.div_ceil(r), cols.div_ceil(c)),
        }
    }

    /// The unit of a weight, in a matrix of `cols` columns for which [`Self::units`] is no error.
    fn unit(self, row: usize, col: usize, cols: usize) -> usize {
        match self {
            Self::Weight => row * cols + col,
            Self::Row => row,
            Self::Column { taps } => col % (cols / taps),
            Self::Block { rows: r, cols: c } => row / r * cols.div_ceil(c) + col / c,
        }
    }

    /// What several units are called.
    fn plural(self) -> String {
        match self {
            Self::Weight => "weights".into(),
            Self::Row => "rows".into(),
            Self::Column { .. } => "columns".into(),
            Self::Block { rows, cols } => format!("blocks of {rows}x{cols}"),
        }
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weight => f.write_str("weight"),
            Self::Row => f.write_str("row"),
            Self::Column { .. } => f.write_str("column"),
            Self::Block { rows, cols } => write!(f, "block of {rows}x{cols}"),
        }
    }
}

/// How much is pruned: a share of the units that are left, or a number of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount(Kind);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Share(f64),
    Count(usize),
}

impl Amount {
    /// A share from 0 to 1. An error if it is none.
    pub fn share(share: f64) -> Result<Self> {
        match share {
            0.0..=1.0 => Ok(Self(Kind::Share(share))),
            _ => Err(Error::invalid(format!("amount {share} is no share from 0 to 1"))),
        }
    }

    /// A number of units.
    pub fn count(count: usize) -> Self {
        Self(Kind::Count(count))
    }

    /// How many of so many units go. Shares are rounded to the nearest number, and halves to the even one, as torch
    /// does. An error if there are not as many.
    ///
    /// ```
    /// use sparse24::prune::Amount;
    /// assert_eq!(Amount::share(0.5)?.of(9)?, 4);
    /// assert_eq!(Amount::count(7).of(9)?, 7);
    /// assert!(Amount::count(10).of(9).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn of(self, units: usize) -> Result<usize> {
        match self.0 {
            // No more than `units`, as the share is at most 1.
            Kind::Share(share) => Ok(((share * units as f64).round_ties_even() as usize).min(units)),
            Kind::Count(count) if count <= units => Ok(count),
            Kind::Count(count) => Err(Error::invalid(format!("{count} are to be pruned, and there are {units}"))),
        }
    }
}

impl FromStr for Amount {
    type Err = Error;

    /// `0.5`, `50%` or, as a number of units, `12`: as in Python, `1` is one unit and `1.0` is all of them.
    fn from_str(text: &str) -> Result<Self> {
        let none = || Error::invalid(format!("amount {text:?} is neither a share, as 0.5 and 50%, nor a whole number"));
        if let Some(percent) = text.strip_suffix('%') {
            return Self::share(percent.parse::<f64>().map_err(|_| none())? / 100.0);
        }
        match text.parse() {
            Ok(count) => Ok(Self::count(count)),
            Err(_) => Self::share(text.parse().map_err(|_| none())?),
        }
    }
}

impl fmt::Display for Amount {
    /// As [`Amount::from_str`] reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Share(share) => write!(f, "{share:?}"),
            Kind::Count(count) => count.fmt(f),
        }
    }
}

/// What a unit's score is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Importance {
    /// The Ln norm of its weights, `(Σ|w|ⁿ)^(1/n)`, for any number n that torch takes: with ∞ the largest magnitude,
    /// with -∞ the smallest, with 0 the number of weights that are not zero. It is divided by that of as many ones, so
    /// that units of different sizes (blocks at an edge, rows of different matrices) can be compared. Of a single
    /// weight it is |w|, whatever n.
    Ln(f64),
    /// A random number.
    Random {
        /// What it follows from, the same on every machine and in every version.
        seed: u64,
    },
}

/// The units of a matrix, with a score for each.
#[derive(Clone, Debug)]
pub struct Units<'a> {
    granularity: Granularity,
    rows: usize,
    cols: usize,
    before: Option<&'a Mask>,
    /// At least 0; of units that `before` has left nothing of, [`GONE`].
    scores: Vec<f32>,
}

/// The score of a unit that was pruned before.
const GONE: f32 = -1.0;

impl<'a> Units<'a> {
    /// Scores the units of `w`, of which `before` says what earlier prunings have left: the weights that it left out
    /// count as zeros, and units that it left nothing of are none. Sums are in f64, and scores are rounded to f32.
    ///
    /// An error if n is NaN, the matrix cannot be divided so ([`Granularity::units`]), `before` has another shape, or
    /// names the first NaN in `w`.
    pub fn new(w: &Matrix, granularity: Granularity, importance: Importance, before: Option<&'a Mask>) -> Result<Self> {
        let units = granularity.units(w.rows(), w.cols())?;
        memory::claim_matrix("scores", units, 1, size_of::<f32>())?;
        let nan = each_dtype!(w.elements(), data => data.iter().position(|x| x.to_f32().is_nan()));
        if let Some(at) = nan {
            return Err(Error::nan(at / w.cols(), at % w.cols()));
        }
        if let Some(before) = before {
            expect_shape("mask", (before.rows(), before.cols()), (w.rows(), w.cols()))?;
        }
        let scores = match importance {
            Importance::Ln(n) if n.is_nan() => return Err(Error::invalid("the n of an Ln norm is NaN")),
            Importance::Random { seed } => {
                let mut rng = Pcg64::seed_from_u64(seed);
                (0..units).map(|_| (rng.next_u32() >> 8) as f32).collect()
            }
            Importance::Ln(_) if granularity == Granularity::Weight => {
                each_dtype!(w.elements(), data => data.iter().map(|x| x.to_f32().abs()).collect())
            }
            Importance::Ln(n) => norms(w, granularity, n, before, units)?,
        };
        Self::given(w.rows(), w.cols(), granularity, scores, before)
    }

    /// The units of a matrix of `rows x cols` with scores of the caller's: of rows, of columns, of blocks line by line,
    /// or of weights likewise. Those that `before` has left nothing of are none. An error if there is not a score of at
    /// least 0 for each, or as for [`Units::new`].
    pub fn given(
        rows: usize,
        cols: usize,
        granularity: Granularity,
        mut scores: Vec<f32>,
        before: Option<&'a Mask>,
    ) -> Result<Self> {
        let units = granularity.units(rows, cols)?;
        expect_len(&format!("scores of {}", granularity.plural()), scores.len(), units)?;
        if let Some((at, score)) = scores.iter().enumerate().find(|(_, score)| score.is_nan() || **score < 0.0) {
            let what = granularity.plural();
            return Err(Error::invalid(format!(
                "the score {at} of {what} is {score}, expected a number of at least 0"
            )));
        }
        // -0.0 has other bits than 0.0.
        scores.iter_mut().for_each(|score| *score = score.abs());
        if let Some(before) = before {
            expect_shape("mask", (before.rows(), before.cols()), (rows, cols))?;
            let mut left = vec![false; units];
            each_kept(before, |row, col| left[granularity.unit(row, col, cols)] = true);
            scores.iter_mut().zip(left).filter(|(_, left)| !left).for_each(|(score, _)| *score = GONE);
        }
        Ok(Self { granularity, rows, cols, before, scores })
    }

    /// The number of units of which something is left.
    pub fn left(&self) -> usize {
        self.scores.iter().filter(|score| **score != GONE).count()
    }

    /// [`prune_units`] of this matrix alone.
    ///
    /// ```
    /// use sparse24::Matrix;
    /// use sparse24::prune::{Amount, Granularity, Importance, Units};
    /// let w = Matrix::from_f32(3, 2, &[1., -5., 3., 2., 0., 4.])?;
    /// // torch.nn.utils.prune.ln_structured(module, "weight", amount=1, n=1, dim=0)
    /// let rows = Units::new(&w, Granularity::Row, Importance::Ln(1.0), None)?.mask(Amount::count(1))?;
    /// assert_eq!(rows.words(), [0b11, 0b11, 0b00]);
    /// // and then l1_unstructured(module, "weight", amount=0.5): half of the four weights that are left.
    /// let weights = Units::new(&w, Granularity::Weight, Importance::Ln(1.0), Some(&rows))?;
    /// assert_eq!(weights.mask(Amount::share(0.5)?)?.words(), [0b10, 0b01, 0b00]);
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn mask(&self, amount: Amount) -> Result<Mask> {
        let goes = lowest(std::slice::from_ref(self), amount)?;
        self.without(goes.first().map_or(&[], |goes| &goes[..]))
    }

    /// The mask of what is left without these units.
    fn without(&self, goes: &[bool]) -> Result<Mask> {
        let kept = |row, col| {
            !goes[self.granularity.unit(row, col, self.cols)] && self.before.is_none_or(|before| before.get(row, col))
        };
        Mask::from_fn(self.rows, self.cols, kept)
    }
}

/// Prunes the units with the lowest scores of all these matrices together, and returns a mask for each: the amount is
/// of all units that are left. An error if there are not as many.
///
/// ```
/// use sparse24::Matrix;
/// use sparse24::prune::{Amount, Granularity, Importance, Units, prune_units};
/// let small = Matrix::from_f32(1, 3, &[0.1, 0.2, 0.3])?;
/// let large = Matrix::from_f32(1, 3, &[1.0, 0.25, 3.0])?;
/// let weights = |w| Units::new(w, Granularity::Weight, Importance::Ln(1.0), None);
/// let masks = prune_units(&[weights(&small)?, weights(&large)?], Amount::share(0.5)?)?;
/// assert_eq!((masks[0].words()[0], masks[1].words()[0]), (0b100, 0b101));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn prune_units(units: &[Units<'_>], amount: Amount) -> Result<Vec<Mask>> {
    lowest(units, amount)?.iter().zip(units).map(|(goes, units)| units.without(goes)).collect()
}

/// For each unit of each matrix, whether it goes.
fn lowest(units: &[Units<'_>], amount: Amount) -> Result<Vec<Vec<bool>>> {
    let scores = || units.iter().flat_map(|units| &units.scores);
    let left = scores().filter(|score| **score != GONE).count();
    let count = amount.of(left).map_err(|e| match units.first() {
        Some(first) => Error::invalid(format!("{}: {e}", first.granularity.plural())),
        None => e,
    })?;
    let mut goes: Vec<Vec<bool>> = units.iter().map(|units| vec![false; units.scores.len()]).collect();
    let Some(place) = count.checked_sub(1) else { return Ok(goes) };
    memory::claim_matrix("scores", left, 1, size_of::<u32>())?;
    // The order of numbers that are not negative is that of their bits.
    let mut ranks: Vec<u32> = scores().filter(|score| **score != GONE).map(|score| score.to_bits()).collect();
    let (below, &mut highest, _) = ranks.select_nth_unstable(place);
    // So many of those that have the highest score which goes.
    let mut ties = count - below.iter().filter(|rank| **rank < highest).count();
    let highest = f32::from_bits(highest);
    for (goes, units) in goes.iter_mut().zip(units).rev() {
        for (goes, &score) in goes.iter_mut().zip(&units.scores).rev().filter(|(_, score)| **score != GONE) {
            *goes = score < highest || score == highest && ties > 0;
            ties -= usize::from(*goes && score == highest);
        }
    }
    Ok(goes)
}

/// The Ln norm of each unit, divided by that of as many ones.
fn norms(w: &Matrix, granularity: Granularity, n: f64, before: Option<&Mask>, units: usize) -> Result<Vec<f32>> {
    memory::claim_matrix("norms", units, 2, size_of::<f64>())?;
    let start = if n == f64::NEG_INFINITY { f64::INFINITY } else { 0.0 };
    let (mut sums, mut sizes) = (vec![start; units], vec![0usize; units]);
    each_dtype!(w.elements(), data => {
        for (row, data) in data.chunks_exact(w.cols().max(1)).enumerate() {
            for (col, x) in data.iter().enumerate() {
                let kept = before.is_none_or(|before| before.get(row, col));
                let x = if kept { f64::from(x.to_f32()).abs() } else { 0.0 };
                let unit = granularity.unit(row, col, w.cols());
                let sum = &mut sums[unit];
                sizes[unit] += 1;
                *sum = match n {
                    f64::INFINITY => sum.max(x),
                    f64::NEG_INFINITY => sum.min(x),
                    0.0 => *sum + f64::from(u8::from(x != 0.0)),
                    1.0 => *sum + x,
                    2.0 => *sum + x * x,
                    n => *sum + x.powf(n),
                };
            }
        }
    });
    let norm = |(sum, size): (f64, usize)| match n {
        _ if n.is_infinite() => sum,
        _ if size == 0 => 0.0,
        0.0 => sum / size as f64,
        n => (sum / size as f64).powf(1.0 / n),
    };
    Ok(sums.into_iter().zip(sizes).map(|sum| norm(sum) as f32).collect())
}

/// Calls `f` with each place that is kept.
fn each_kept(mask: &Mask, mut f: impl FnMut(usize, usize)) {
    for (row, words) in mask.words().chunks_exact(mask.words_per_row().max(1)).enumerate() {
        for (at, &word) in words.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                f(row, 32 * at + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }
}
