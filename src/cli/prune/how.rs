//! What the flags of `prune` ask for together: 2:4, masks of another granularity, or channels removed; by which
//! criterion, how much, and of what.
//!
//! The names of `torch.nn.utils.prune` say several of these at once. Invariant: a [`How`] is one that makes sense; all
//! that does not is an error of usage.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use serde::Serialize;

use super::Args;
use crate::cli::args::{Usage, ensure_usage};
use sparse24::VectorLen;
use sparse24::error::Error;
use sparse24::graph::ChannelWeights;
use sparse24::prune::{Amount, Importance, Method};

/// The value of --method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    Method(Method),
    Torch(Torch),
    /// The average percentage of zero activations.
    Apoz,
    /// |γ| of batch norms.
    NormScale,
}

/// A function of `torch.nn.utils.prune`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Torch {
    L1Unstructured,
    RandomUnstructured,
    GlobalUnstructured,
    LnStructured,
    RandomStructured,
}

impl Torch {
    const ALL: [Self; 5] = [
        Self::L1Unstructured,
        Self::RandomUnstructured,
        Self::GlobalUnstructured,
        Self::LnStructured,
        Self::RandomStructured,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::L1Unstructured => "l1_unstructured",
            Self::RandomUnstructured => "random_unstructured",
            Self::GlobalUnstructured => "global_unstructured",
            Self::LnStructured => "ln_structured",
            Self::RandomStructured => "random_structured",
        }
    }

    const fn is_structured(self) -> bool {
        matches!(self, Self::LnStructured | Self::RandomStructured)
    }
}

impl FromStr for Named {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match (Torch::ALL.into_iter().find(|torch| torch.name() == text), text) {
            (Some(torch), _) => Ok(Self::Torch(torch)),
            (None, "apoz") => Ok(Self::Apoz),
            (None, "bn-scale") => Ok(Self::NormScale),
            (None, _) => text.parse().map(Self::Method),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Method(method) => method.fmt(f),
            Self::Torch(torch) => f.write_str(torch.name()),
            Self::Apoz => f.write_str("apoz"),
            Self::NormScale => f.write_str("bn-scale"),
        }
    }
}

/// The value of --granularity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    TwoFour(VectorLen),
    Weight,
    Row,
    Column,
    Block {
        rows: usize,
        cols: usize,
    },
    /// Of a model: channels between its layers, by the weights that read them.
    Channel,
    /// The same, by the weights that make them.
    Filter,
}

impl FromStr for Unit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let block = |size: &str| {
            let (rows, cols) = size.split_once('x')?;
            let sizes = rows.parse().ok().zip(cols.parse().ok()).filter(|&(rows, cols)| rows > 0 && cols > 0);
            sizes.map(|(rows, cols)| Self::Block { rows, cols })
        };
        match text {
            "2:4" => Ok(Self::TwoFour(VectorLen::ONE)),
            "weight" => Ok(Self::Weight),
            "row" => Ok(Self::Row),
            "column" => Ok(Self::Column),
            "channel" => Ok(Self::Channel),
            "filter" => Ok(Self::Filter),
            "block" => Ok(Self::Block { rows: 4, cols: 4 }),
            _ => match (text.strip_suffix(":2:4"), text.strip_prefix("block:")) {
                (Some(vector), _) => vector.parse().map(Self::TwoFour).map_err(|e: Error| e.to_string()),
                (None, Some(size)) => block(size).ok_or(format!("{size:?} is no size of a block, such as 4x4")),
                (None, None) => {
                    Err("is not weight, 2:4, V:2:4, row, column, block, block:RxC, channel or filter".into())
                }
            },
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TwoFour(VectorLen::ONE) => f.write_str("2:4"),
            Self::TwoFour(vector) => write!(f, "{vector}:2:4"),
            Self::Weight => f.write_str("weight"),
            Self::Row => f.write_str("row"),
            Self::Column => f.write_str("column"),
            Self::Block { rows, cols } => write!(f, "block:{rows}x{cols}"),
            Self::Channel => f.write_str("channel"),
            Self::Filter => f.write_str("filter"),
        }
    }
}

/// The value of --scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Local,
    Global,
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(Self::Local),
            "global" => Ok(Self::Global),
            _ => Err("is not local or global".into()),
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Local { "local" } else { "global" })
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum How {
    /// 2:4, with this vector length in place of --vector's.
    TwoFour(Option<VectorLen>),
    /// Masks, which leave zeros.
    Masks(Units, Importance),
    /// Channels that are removed.
    Removal(Units, Score),
}

/// What is pruned as one, and how much of it. The unit is not [`Unit::TwoFour`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Units {
    pub(super) unit: Unit,
    pub(super) amount: Amount,
    pub(super) scope: Scope,
}

/// What channels are judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Score {
    Weights(ChannelWeights, Importance),
    Apoz,
    NormScale,
}

/// What was asked for, as reports and the new weights' record say it.
#[derive(Serialize)]
pub(super) struct Asked {
    method: String,
    granularity: String,
    amount: String,
    scope: String,
    /// The n of the Ln norm, where it matters: a number, or `inf` or `-inf`, which JSON has no numbers for.
    norm: Option<String>,
    seed: u64,
}

impl Asked {
    /// Units of `args`, by this criterion if it is one of weights.
    pub(super) fn new(args: &Args, Units { unit, amount, scope }: Units, importance: Option<Importance>) -> Self {
        let norm = match importance {
            Some(Importance::Ln(n)) if unit != Unit::Weight => Some(n.to_string()),
            _ => None,
        };
        Self {
            method: args.named.to_string(),
            granularity: unit.to_string(),
            amount: amount.to_string(),
            scope: scope.to_string(),
            norm,
            seed: args.seed,
        }
    }

    /// As the weights' record has it.
    pub(super) fn noted(&self) -> String {
        let Self { method, granularity, amount, scope, norm, seed } = self;
        let norm = norm.as_ref().map_or_else(String::new, |n| format!(" L{n}"));
        format!("{method} {granularity}{norm} amount={amount} scope={scope} seed={seed}")
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, granularity, amount, scope, norm, .. } = self;
        let norm = norm.as_ref().map_or_else(String::new, |n| format!(" by their L{n} norm"));
        write!(f, "{method} (granularity {granularity}{norm}, amount {amount}, {scope})")
    }
}

impl Args {
    /// What the flags ask for. An error of usage if they do not fit each other.
    pub(super) fn how(&self) -> Result<How> {
        let name = self.named;
        let channels = |unit: &Unit| matches!(unit, Unit::Channel | Unit::Filter);
        let unit = match (name, self.granularity) {
            (Named::Method(_), unit) => unit,
            (Named::Torch(torch), unit) if torch.is_structured() => {
                let unit = unit.filter(|unit| !matches!(unit, Unit::TwoFour(_) | Unit::Weight));
                ensure_usage!(
                    unit.is_some(),
                    "--method {name} prunes what --granularity says: row (dim=0), column (dim=1), block, channel, filter"
                );
                unit
            }
            (Named::Torch(_), None | Some(Unit::Weight)) => Some(Unit::Weight),
            (Named::Torch(_), Some(unit)) => {
                return Err(Usage::error(format!("--method {name} prunes single weights, not --granularity {unit}")));
            }
            (Named::Apoz | Named::NormScale, unit) => {
                ensure_usage!(
                    unit.as_ref().is_some_and(channels),
                    "--method {name} is of channels: --granularity channel is needed"
                );
                unit
            }
        };
        let unit = match unit {
            Some(unit) if !matches!(unit, Unit::TwoFour(_)) => unit,
            unit => {
                for (option, given) in [
                    ("--amount", self.amount.is_some()),
                    ("--scope", self.scope.is_some()),
                    ("--norm", self.norm.is_some()),
                ] {
                    ensure_usage!(
                        !given,
                        "{option} is for what --granularity names other than 2:4, which keeps two of every four"
                    );
                }
                return Ok(How::TwoFour(match unit {
                    Some(Unit::TwoFour(vector)) => Some(vector),
                    _ => None,
                }));
            }
        };
        self.check_no_two_four(unit)?;
        let random = Importance::Random { seed: self.seed };
        let importance = match name {
            Named::Method(Method::Magnitude) => Some(Importance::Ln(self.norm.unwrap_or(1.0))),
            Named::Torch(Torch::L1Unstructured | Torch::GlobalUnstructured) => Some(Importance::Ln(1.0)),
            Named::Method(Method::MagnitudeL2) => Some(Importance::Ln(2.0)),
            Named::Method(Method::Random) | Named::Torch(Torch::RandomUnstructured | Torch::RandomStructured) => {
                Some(random)
            }
            Named::Torch(Torch::LnStructured) => match self.norm {
                Some(n) => Some(Importance::Ln(n)),
                None => return Err(Usage::error("--method ln_structured needs its n: --norm N")),
            },
            Named::Method(method @ (Method::SecondOrder | Method::Wanda | Method::SparseGpt)) => {
                return Err(Usage::error(format!(
                    "--method {method} chooses two of every four; --granularity {unit} goes by magnitude, \
                     magnitude-l2, random or torch's names"
                )));
            }
            Named::Apoz | Named::NormScale => None,
        };
        let takes_norm = matches!(name, Named::Method(Method::Magnitude) | Named::Torch(Torch::LnStructured));
        ensure_usage!(self.norm.is_none() || takes_norm, "--norm is not {name}'s, but magnitude's and ln_structured's");
        ensure_usage!(
            self.norm.is_none() || unit != Unit::Weight,
            "--norm is not of single weights, of which every norm is the magnitude"
        );
        ensure_usage!(self.norm.is_none_or(|n| !n.is_nan()), "--norm: NaN is no number");
        let Some(amount) = self.amount else {
            return Err(Usage::error(format!("--granularity {unit} needs --amount: how much is to be pruned")));
        };
        let scope = match (name, self.scope) {
            (Named::Torch(Torch::GlobalUnstructured), None | Some(Scope::Global)) => Scope::Global,
            (Named::Torch(Torch::GlobalUnstructured), Some(scope)) => {
                return Err(Usage::error(format!("--method {name} prunes all matrices together, not --scope {scope}")));
            }
            (_, scope) => scope.unwrap_or(Scope::Local),
        };
        let units = Units { unit, amount, scope };
        Ok(match (importance, unit) {
            (Some(importance), Unit::Channel) => {
                How::Removal(units, Score::Weights(ChannelWeights::Reading, importance))
            }
            (Some(importance), Unit::Filter) => How::Removal(units, Score::Weights(ChannelWeights::Making, importance)),
            (Some(importance), _) => How::Masks(units, importance),
            (None, _) if name == Named::Apoz => How::Removal(units, Score::Apoz),
            (None, _) => How::Removal(units, Score::NormScale),
        })
    }

    /// An error for options that mean something for 2:4 alone.
    fn check_no_two_four(&self, unit: Unit) -> Result<()> {
        for (option, given) in [
            ("--calibration", self.calibration.is_some() && self.named != Named::Apoz),
            ("--inputs", self.inputs.is_some()),
            ("--damping", self.damping.is_some()),
            ("--exchanges", self.exchanges.is_some()),
            ("--max-drop", self.max_drop.is_some()),
            ("--target-speedup", self.target_speedup.is_some()),
            ("--pairs", self.metric.pairs.is_some()),
            ("--input", self.metric.input.is_some()),
            ("--windows", self.metric.windows.is_some()),
            ("--retrain", self.retrain.is_some()),
            ("--permute", self.permute.is_some()),
        ] {
            ensure_usage!(!given, "{option} is for 2:4, not for --granularity {unit}");
        }
        ensure_usage!(
            self.named != Named::Apoz || self.calibration.is_some(),
            "--method apoz counts activations: --calibration is needed, of texts or pictures that the model runs on"
        );
        let to = self.to.filter(|to| *to != sparse24::io::Layout::Dense);
        match to {
            Some(to) => Err(Usage::error(format!("--to {to} has no place but for 2:4: --granularity {unit} is dense"))),
            None => Ok(()),
        }
    }
}
