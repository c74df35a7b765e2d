//! What `bench` and `tune` work on: the grammar of layers, element types and operations on the command line.
//!
//! Invariant: a shape that parses has no size of zero.

use std::num::NonZeroUsize;
use std::str::FromStr;

use clap::ValueEnum;

use sparse24::Result;
use sparse24::mask::VectorLen;
use sparse24::matrix::{DType, Matrix};
use sparse24::measure::{Case, PlannedBy};
use sparse24::models::{LAYER_SHAPES, LayerShape};
use sparse24::problem::Op;

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Float {
    F32,
    F16,
}

impl From<Float> for DType {
    fn from(float: Float) -> Self {
        match float {
            Float::F32 => Self::F32,
            Float::F16 => Self::F16,
        }
    }
}

/// `--ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OpName {
    Dense,
    Sparse24,
    Masked,
    Masked24,
    Auto,
}

/// The operations in the order of their rows, and whether dense weights may stand in: dense first, the baseline of the
/// others.
pub(super) fn operations(ops: &[OpName], vectors: &[VectorLen]) -> Vec<(Op, PlannedBy)> {
    let has = |op| ops.contains(&op);
    let mut vectors = vectors.to_vec();
    vectors.sort();
    vectors.dedup();
    let mut chosen = Vec::new();
    chosen.extend(has(OpName::Dense).then_some((Op::Dense, PlannedBy::Planner)));
    for (name, planned_by) in [(OpName::Sparse24, PlannedBy::Planner), (OpName::Auto, PlannedBy::Auto)] {
        if has(name) {
            chosen.extend(vectors.iter().map(|&v| (Op::Sparse24(v), planned_by)));
        }
    }
    chosen.extend(has(OpName::Masked).then_some((Op::Masked, PlannedBy::Planner)));
    chosen.extend(has(OpName::Masked24).then_some((Op::Masked24, PlannedBy::Planner)));
    chosen
}

/// The vector lengths among these numbers.
pub(super) fn vectors<const N: usize>(numbers: [usize; N]) -> Vec<VectorLen> {
    VectorLen::ALL.into_iter().filter(|v| numbers.contains(&v.get())).collect()
}

/// What `--shapes` names: layers whose tokens are still open, or one shape.
#[derive(Clone, Debug)]
pub(super) enum Shape {
    Model { name: &'static str, layers: &'static [LayerShape] },
    Exact { m: usize, n: usize, k: usize },
    Square,
}

/// The sizes of `square`.
const SQUARES: [usize; 3] = [1024, 2048, 4096];

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some((name, layers)) = LAYER_SHAPES.into_iter().find(|(name, _)| *name == text) {
            return Ok(Self::Model { name, layers });
        }
        if text == "square" {
            return Ok(Self::Square);
        }
        let sizes: Option<Vec<usize>> = text.split('x').map(|size| size.parse().ok()).collect();
        match sizes.as_deref() {
            Some([m, n, k]) if [m, n, k].contains(&&0) => {
                Err(format!("{m}x{n}x{k} has a size of zero; there is nothing to measure"))
            }
            Some(&[m, n, k]) => Ok(Self::Exact { m, n, k }),
            _ => {
                let names: Vec<_> = LAYER_SHAPES.iter().map(|(name, _)| *name).chain(["square"]).collect();
                Err(format!("neither one of {} nor MxNxK in whole numbers", names.join(", ")))
            }
        }
    }
}

/// A layer with its tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) name: String,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Separates the seed of the activations from the weights'.
const ACTIVATIONS: u64 = 0x5eed_ac71_7a71_0450;

/// A layer with these weights, at so many tokens whose activations are drawn.
pub(super) fn case(name: &str, w: Matrix, n: usize, seed: u64) -> Result<Case> {
    let x = Matrix::uniform(n, w.cols(), w.dtype(), seed ^ ACTIVATIONS)?;
    Ok(Case { name: name.to_owned(), w, x })
}

impl Layer {
    /// The layer with weights and activations that are drawn.
    pub(super) fn case(&self, dtype: DType, seed: u64) -> Result<Case> {
        case(&self.name, Matrix::uniform(self.m, self.k, dtype, seed)?, self.n, seed)
    }
}

/// The layers that shapes name, the models' at each of these numbers of tokens.
pub(super) fn layers(shapes: &[Shape], tokens: &[NonZeroUsize]) -> Vec<Layer> {
    let mut all = Vec::new();
    for shape in shapes {
        match *shape {
            Shape::Exact { m, n, k } => all.push(Layer { name: "shape".into(), m, n, k }),
            Shape::Square => all.extend(SQUARES.map(|s| Layer { name: "square".into(), m: s, n: s, k: s })),
            Shape::Model { name, layers } => {
                for &(layer, m, k) in layers {
                    let name = format!("{name}.{layer}");
                    all.extend(tokens.iter().map(|n| Layer { name: name.clone(), m, n: n.get(), k }));
                }
            }
        }
    }
    all
}
