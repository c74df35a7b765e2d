//! The criteria by name: what a command line, or a comparison over all of them, chooses from.

use std::fmt;
use std::str::FromStr;

use super::{Criterion, Norm, SparseGpt, Statistics};
use crate::error::{Error, Result};
use crate::mask::{Mask, Mask24, VectorLen};
use crate::matrix::Matrix;

/// A way to prune a matrix to 2:4.
///
/// ```
/// use sparse24::prune::Method;
/// assert_eq!("wanda".parse::<Method>()?, Method::Wanda);
/// assert!(Method::SparseGpt.needs_gram() && !Method::Magnitude.needs_statistics());
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Σ|w| over the rows that share a pattern.
    Magnitude,
    /// Σw².
    MagnitudeL2,
    /// At random, each pattern equally likely.
    Random,
    /// ½·h·w², second order on the diagonal ("Optimal Brain Damage").
    SecondOrder,
    /// |w|·‖x‖₂.
    Wanda,
    /// Second order with compensation.
    SparseGpt,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 6] =
        [Self::Magnitude, Self::MagnitudeL2, Self::Random, Self::SecondOrder, Self::Wanda, Self::SparseGpt];

    /// `magnitude`, `magnitude-l2`, `random`, `obd`, `wanda` or `sparsegpt`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::MagnitudeL2 => "magnitude-l2",
            Self::Random => "random",
            Self::SecondOrder => "obd",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
        }
    }

    /// Whether it asks for the layer's inputs.
    pub const fn needs_statistics(self) -> bool {
        matches!(self, Self::SecondOrder | Self::Wanda | Self::SparseGpt)
    }

    /// Whether it asks for all of their Gram matrix.
    pub const fn needs_gram(self) -> bool {
        matches!(self, Self::SparseGpt)
    }

    /// Prunes `w`. Weights that are zero already stay zero, so that masks compose. `seed` is for [`Method::Random`]
    /// alone. Returns the weights that stay, with their mask; what is not kept is zero.
    ///
    /// An error if statistics are needed and there are none, or from the criterion itself.
    pub fn prune(
        self,
        w: &Matrix,
        vector: VectorLen,
        statistics: Option<&Statistics>,
        seed: u64,
    ) -> Result<(Matrix, Mask24)> {
        let needed = || self.needed(statistics);
        let present = Mask::of_nonzeros(w)?;
        let by = |criterion: Criterion| criterion.mask(w, vector, Some(&present));
        let mask = match self {
            // What is zero loses every comparison, so that the mask within is the mask of what is there.
            Self::Magnitude => super::magnitude(w, vector)?.within(Some(&present))?,
            Self::MagnitudeL2 => by(Criterion::magnitude(Norm::L2))?,
            Self::Random => super::random(w.rows(), w.cols(), vector, seed)?.within(Some(&present))?,
            Self::SecondOrder => by(Criterion::second_order(needed()?))?,
            Self::Wanda => by(Criterion::wanda(needed()?))?,
            Self::SparseGpt => return SparseGpt::new(vector).prune(w, needed()?, Some(&present)),
        };
        Ok((mask.mask().apply(w)?, mask))
    }

    fn needed(self, statistics: Option<&Statistics>) -> Result<&Statistics> {
        match statistics {
            Some(statistics) if statistics.tokens() > 0 => Ok(statistics),
            _ => Err(Error::invalid(format!("{self} needs statistics of the layer's inputs"))),
        }
    }

    /// The score by which it ranks weights, `m x k`, where it ranks each by itself: for the search of a permutation.
    /// Second order with compensation is ranked as second order on the diagonal, and random as magnitude.
    pub fn scores(self, w: &Matrix, statistics: Option<&Statistics>) -> Result<ndarray::Array2<f32>> {
        let needed = || self.needed(statistics);
        let criterion = match self {
            Self::Magnitude | Self::Random => Criterion::magnitude(Norm::L1),
            Self::MagnitudeL2 => Criterion::magnitude(Norm::L2),
            Self::SecondOrder | Self::SparseGpt => Criterion::second_order(needed()?),
            Self::Wanda => Criterion::wanda(needed()?),
        };
        criterion.scores(w, None)
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|method| method.name() == text);
        found.ok_or_else(|| Error::invalid(format!("method {text:?} is not one of {}", names())))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the matrices of a model are pruned: a method and what it takes.
#[derive(Clone, Copy, Debug)]
pub struct Pruning {
    /// The criterion.
    pub method: Method,
    /// Of the method that draws numbers.
    pub seed: u64,
    /// Of sparsegpt.
    pub damping: f64,
    /// Of sparsegpt: passes of exchanges, at most.
    pub exchanges: usize,
}

impl Pruning {
    /// Prunes a matrix. Each name has a seed of its own, whatever the order. Weights that are zero stay zero.
    pub fn prune(
        &self,
        name: &str,
        w: &Matrix,
        vector: VectorLen,
        statistics: Option<&Statistics>,
    ) -> Result<(Matrix, Mask24)> {
        match (self.method, statistics) {
            (Method::SparseGpt, Some(statistics)) => {
                let Self { damping, exchanges, .. } = *self;
                let how = SparseGpt { damping, exchanges, ..SparseGpt::new(vector) };
                how.prune(w, statistics, Some(&Mask::of_nonzeros(w)?))
            }
            (method, statistics) => method.prune(w, vector, statistics, seed_of(name, self.seed)),
        }
    }
}

/// A seed for what is drawn for the matrix of this name: each name has its own, whatever the order.
///
/// ```
/// use sparse24::prune::seed_of;
/// assert_eq!(seed_of("up.weight", 24), seed_of("up.weight", 24));
/// assert_ne!(seed_of("up.weight", 24), seed_of("down.weight", 24));
/// ```
pub fn seed_of(name: &str, seed: u64) -> u64 {
    // FNV-1a.
    name.bytes().fold(seed, |seed, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
