//! How long a forward pass and each of its linear layers take, dense and pruned: what a choice by speed goes by.
//!
//! The calls that are timed are those of whole models on their own buffers, so that a layer finds the device's caches
//! as it would in a forward pass. Calls of linear layers of the same shape whose names differ in numbers alone, such as
//! all Q, K and V, are timed together, one after the other, and share their mean. Samples of all forms take turns.
//! Invariant: a layer that the checkpoint has in another form than dense is in no time but that of the whole.

use super::{Checkpoint, Forward, Model, Node};
use crate::engine::Device;
use crate::error::Result;
use crate::mask::VectorLen;
use crate::measure::{Policy, Timer, Workload};
use crate::prune;
use crate::weights::HostWeights;

/// Medians, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// A forward pass of the checkpoint as it is.
    pub forward: f64,
    /// Every dense linear layer by name, and what it takes dense (`None`) and in each pattern.
    pub linears: Vec<(String, Option<VectorLen>, f64)>,
}

impl Times {
    /// What a linear layer takes in one form, if that was measured.
    pub fn of(&self, layer: &str, vector: Option<VectorLen>) -> Option<f64> {
        self.linears.iter().find(|(name, v, _)| name == layer && *v == vector).map(|(.., seconds)| *seconds)
    }
}

/// Calibrates workloads and samples them in turns: the median of each, in seconds.
fn medians(device: &Device, policy: &Policy, mut workloads: Vec<Workload>) -> Result<Vec<f64>> {
    let timer = Timer::new(device, *policy);
    workloads.iter_mut().try_for_each(|workload| timer.calibrate(workload))?;
    timer.sample_in_turns(&mut workloads, |_| {})?;
    Ok(workloads.iter().map(|workload| workload.median().map_or(f64::NAN, |median| median.value)).collect())
}

/// A name without its numbers.
fn kind_of(name: &str) -> String {
    let part = |part| if str::parse::<u64>(part).is_ok() { "*" } else { part };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

impl Forward {
    /// The calls of some nodes, in their order, to be timed: a pass is all of them.
    pub(crate) fn workload(&self, of: impl Fn(&Node) -> bool) -> Workload {
        Workload::pass(self.calls().filter(|(node, _)| of(node)).map(|(_, call)| call.clone()))
    }
}

/// Times whole forward passes of `batch` texts of `seq` tokens by several models, whose samples take turns: the median
/// of each, in seconds. Linear layers have the form that the planner gives them, as everywhere else.
///
/// ```
/// use sparse24::graph::{Checkpoint, Sparsity, time_forwards};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::{Activation, DType, Device, VectorLen, measure::Policy};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let dense = Checkpoint::random(BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?, DType::F32, 24)?;
/// let mut pruned = dense.clone();
/// pruned.prune(Sparsity::TwoFour(VectorLen::ONE))?;
/// let times = time_forwards(&Device::cpu()?, &[&dense, &pruned], 2, 4, &Policy::QUICK)?;
/// assert!(times.len() == 2 && times.iter().all(|&seconds| seconds > 0.0));
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn time_forwards(
    device: &Device,
    checkpoints: &[&Checkpoint],
    batch: usize,
    seq: usize,
    policy: &Policy,
) -> Result<Vec<f64>> {
    let forward = |checkpoint: &&Checkpoint| Model::new(device, checkpoint)?.forward(batch, seq);
    let forwards: Vec<_> = checkpoints.iter().map(forward).collect::<Result<_>>()?;
    medians(device, policy, forwards.iter().map(|forward| forward.workload(|_| true)).collect())
}

impl Checkpoint {
    /// Times forward passes of `batch` texts of `seq` tokens, and their linear layers: dense, and pruned in each of
    /// these patterns by magnitude, which takes as long as any other mask. Layers of several tensors get the longest
    /// pattern that [fits](Checkpoint::fitting_vector). 2:4 layers take no dense weights in their place. All of it is
    /// on the device at once: a model for each pattern.
    ///
    /// ```
    /// use sparse24::graph::Checkpoint;
    /// use sparse24::models::bert::{BertConfig, Sizes};
    /// use sparse24::{Activation, DType, Device, VectorLen, measure::Policy};
    /// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
    /// let checkpoint = Checkpoint::random(BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?, DType::F32, 24)?;
    /// let times = checkpoint.times(&Device::cpu()?, 2, 4, &[VectorLen::ONE], &Policy::QUICK)?;
    /// assert!(times.of("encoder.layer.1.output.dense", Some(VectorLen::ONE)) > Some(0.0));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn times(
        &self,
        device: &Device,
        batch: usize,
        seq: usize,
        vectors: &[VectorLen],
        policy: &Policy,
    ) -> Result<Times> {
        // Dense layers by kind.
        let mut kinds: Vec<((String, usize, usize), Vec<String>)> = Vec::new();
        for (name, w) in self.linears().filter(|(_, w)| matches!(w, HostWeights::Dense(_))) {
            let kind = (kind_of(&name), w.m(), w.k());
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, names)) => names.push(name),
                None => kinds.push((kind, vec![name])),
            }
        }
        let mut forwards = vec![(None, Model::new(device, self)?.forward(batch, seq)?)];
        for &vector in vectors {
            let mut pruned = self.clone();
            for name in kinds.iter().flat_map(|(_, names)| names) {
                let w = self.linear(name)?.to_dense()?;
                pruned.set_linear(name, prune::sparsify(&w, self.fitting_vector(name, vector))?.into())?;
            }
            forwards.push((Some(vector), Model::new(device, &pruned)?.no_dense_fallback().forward(batch, seq)?));
        }

        let mut workloads = vec![forwards[0].1.workload(|_| true)];
        // Which layers the others are of, and in which form.
        let mut of = Vec::new();
        for (vector, forward) in &forwards {
            for (_, same) in &kinds {
                workloads.push(forward.workload(|node| same.contains(&node.name)));
                of.push((same, *vector));
            }
        }
        let mut medians = medians(device, policy, workloads)?.into_iter();
        let forward = medians.next().unwrap_or(f64::NAN);
        let mut linears = Vec::new();
        for ((same, vector), seconds) in of.iter().zip(medians) {
            for name in *same {
                let vector = vector.map(|v| self.fitting_vector(name, v));
                // Two patterns may have become one.
                if !linears.iter().any(|(known, v, _)| known == name && *v == vector) {
                    linears.push((name.clone(), vector, seconds / same.len() as f64));
                }
            }
        }
        Ok(Times { forward, linears })
    }
}
