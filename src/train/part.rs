//! What of a graph is trained at a time, and the optimiser's calls for it.

use std::collections::HashSet;
use std::ops::Range;

use super::Objective;
use crate::engine::{Prepared, Tensor};
use crate::error::{Error, Result};
use crate::graph::{Graph, ParamId, Rows, Trainable, ValueId};
use crate::matrix::DType;
use crate::ops::adamw::AdamW;
use crate::ops::sum_squares::SumSquares;

/// Nodes that are trained together, and where they are compared with the teacher's.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) nodes: Range<usize>,
    /// The hidden state of the nodes before them that they read.
    pub(super) input: Option<ValueId>,
    /// The hidden states that are compared.
    pub(super) states: Vec<ValueId>,
    /// The embeddings, if they make them.
    pub(super) embedding: Option<ValueId>,
    /// The steps of the run in which it is trained.
    pub(super) steps: Range<u64>,
    /// AdamW, and the packing of the new weights for the GEMMs.
    pub(super) update: Vec<Prepared>,
    norms: Vec<Prepared>,
    sums: Tensor,
    /// The parameters that are trained, each with the place of its first sum.
    first: Vec<(ParamId, usize)>,
}

/// Nodes with where they are compared.
pub(super) struct Cut {
    nodes: Range<usize>,
    input: Option<ValueId>,
    states: Vec<ValueId>,
    embedding: Option<ValueId>,
}

/// The parts of a graph for an objective; the last is the whole graph, but for a language model's head: logits are
/// compared some tokens at a time, by a pass of their own.
pub(super) fn cuts(graph: &Graph, objective: Objective) -> Result<Vec<Cut>> {
    let end = graph.head().map_or(graph.nodes().len(), |head| head.node);
    let last = graph.outputs().last().copied();
    let embedding = last.filter(|&value| graph.value(value).rows == Rows::Sequences);
    let states = graph.states();
    let whole = |states| Cut { nodes: 0..end, input: None, states, embedding };
    match objective {
        Objective::States if embedding.is_none() && states.is_empty() => {
            Err(Error::invalid("the model has no hidden states and no embeddings to compare"))
        }
        Objective::Embeddings if embedding.is_none() => {
            Err(Error::invalid("the model has no embeddings on the device to compare"))
        }
        Objective::Blocks if states.is_empty() => {
            Err(Error::invalid("the model has no hidden states between its blocks to compare"))
        }
        Objective::States => Ok(vec![whole(states)]),
        Objective::Logits => {
            let no_head =
                || Error::invalid("the model has no head, and so no logits to compare: it is no language model");
            let head = graph.head().ok_or_else(no_head)?;
            // The teacher's logits are computed from the state that its head reads.
            let read = (!states.contains(&head.x)).then_some(head.x);
            Ok(vec![whole(states.into_iter().chain(read).collect())])
        }
        Objective::Embeddings => Ok(vec![whole(Vec::new())]),
        Objective::Blocks => {
            let mut cuts: Vec<Cut> = Vec::new();
            for (at, &state) in states.iter().enumerate() {
                let is_last = at + 1 == states.len();
                let start = cuts.last().map_or(0, |before| before.nodes.end);
                let nodes = start..if is_last { end } else { graph.node_of(state) + 1 };
                let input = at.checked_sub(1).map(|before| states[before]);
                cuts.push(Cut { nodes, input, states: vec![state], embedding: embedding.filter(|_| is_last) });
            }
            cuts.push(whole(states));
            Ok(cuts)
        }
    }
}

impl Part {
    /// `moments` are of all that is trained, in the order of [`Trainable::trained`]; `step` is what AdamW reads.
    pub(super) fn new(
        cut: Cut,
        steps: Range<u64>,
        trainable: &Trainable,
        moments: &[[Tensor; 2]],
        step: &Tensor,
    ) -> Result<Self> {
        let device = trainable.device();
        let Cut { nodes, input, states, embedding } = cut;
        let own: HashSet<ParamId> =
            trainable.graph().nodes()[nodes.clone()].iter().flat_map(|node| node.params()).collect();
        let trained = || trainable.trained().zip(moments).filter(|((param, ..), _)| own.contains(param));
        let parts = trained().map(|((.., gradient), _)| SumSquares::parts(gradient)).sum();
        let sums = device.zeros(1, parts, DType::F32)?;
        let (mut update, mut norms, mut first, mut end) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for ((param, w, gradient), [m, v]) in trained() {
            update.push(device.prepare(&AdamW { w, gradient, m, v, step })?);
            norms.push(device.prepare(&SumSquares { x: gradient, y: &sums, first: end })?);
            first.push((param, end));
            end += SumSquares::parts(gradient);
        }
        update.extend(trainable.repack(|param| own.contains(&param))?);
        Ok(Self { nodes, input, states, embedding, steps, update, norms, sums, first })
    }

    /// The values that are compared: hidden states, then the embeddings.
    pub(super) fn values(&self) -> Vec<ValueId> {
        self.states.iter().copied().chain(self.embedding).collect()
    }

    /// The global L2 norm of its gradients. An error names the first parameter whose gradient is not finite.
    pub(super) fn grad_norm(&self, trainable: &Trainable) -> Result<f64> {
        let device = trainable.device();
        device.submit(&self.norms)?;
        let sums = device.read(&self.sums)?.elements().to_f32();
        if let Some(at) = sums.iter().position(|sum| !sum.is_finite()) {
            let of = self.first.iter().rev().find(|(_, first)| *first <= at);
            let name = of.map_or("a parameter", |(param, _)| &trainable.graph().param(*param).name);
            return Err(Error::invalid(format!(
                "the gradient of {name} is not finite, or its square is too large for f32"
            )));
        }
        let squares: f64 = sums.into_iter().map(f64::from).sum();
        Ok(squares.sqrt())
    }
}
