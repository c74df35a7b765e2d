//! How long a forward pass and each of its linear layers take, dense and pruned: what a choice by speed goes by.
//!
//! The calls that are timed are those of whole models on their own buffers, so that a layer finds the device's caches as
//! it would in a forward pass. Calls of linear layers of the same shape whose names differ in numbers alone, such as all
//! Q, K and V, are timed together, one after the other, and share their mean. Samples of all forms take turns.
//! Invariant: a layer that the checkpoint has in another form than dense is in no time but that of the whole.

use std::time::Duration;

use super::{Checkpoint, Model};
use crate::engine::{Device, Prepared};
use crate::error::Result;
use crate::mask::VectorLen;
use crate::measure::{self, Policy};
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

/// Calls that are timed together, over and over.
struct Subject<'a> {
    calls: Vec<&'a Prepared>,
    passes: usize,
    samples: Vec<f64>,
}

impl<'a> Subject<'a> {
    /// Warms up, and finds how many passes make a sample.
    fn new(device: &Device, calls: Vec<&'a Prepared>, policy: &Policy) -> Result<Self> {
        let mut subject = Self { calls, passes: 1, samples: Vec::new() };
        let (mut spent, mut fastest) = (Duration::ZERO, Duration::MAX);
        while fastest == Duration::MAX || spent < policy.warm_up {
            // Some clock must go on even if the device's stands still.
            let once = subject.time(device)?.max(Duration::from_micros(10));
            spent += once;
            fastest = fastest.min(once);
        }
        subject.passes = (policy.sample.as_secs_f64() / fastest.as_secs_f64()).ceil().clamp(1.0, 1000.0) as usize;
        Ok(subject)
    }

    fn time(&self, device: &Device) -> Result<Duration> {
        let passes = std::iter::repeat_n(self.calls.iter().copied(), self.passes);
        Ok(device.time(passes.flatten())?.elapsed)
    }

    fn sample(&mut self, device: &Device) -> Result<()> {
        let elapsed = self.time(device)?;
        self.samples.push(elapsed.as_secs_f64() / self.passes as f64);
        Ok(())
    }
}

/// A name without its numbers.
fn kind_of(name: &str) -> String {
    let part = |part| if str::parse::<u64>(part).is_ok() { "*" } else { part };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// Times whole forward passes of `batch` texts of `seq` tokens by several models, whose samples take turns: the median of
/// each, in seconds. Linear layers have the form that the planner gives them, as everywhere else.
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
    let forwards: Vec<_> = checkpoints
        .iter()
        .map(|checkpoint| Model::new(device, checkpoint)?.forward(batch, seq))
        .collect::<Result<_>>()?;
    let subjects = forwards.iter().map(|forward| {
        let calls = forward.calls().map(|(_, call)| call).collect();
        Subject::new(device, calls, policy)
    });
    let mut subjects: Vec<_> = subjects.collect::<Result<_>>()?;
    for _ in 0..policy.samples.max(1) {
        subjects.iter_mut().try_for_each(|subject| subject.sample(device))?;
    }
    Ok(subjects.iter_mut().map(|subject| measure::median(&mut subject.samples)).collect())
}

impl Checkpoint {
    /// Times forward passes of `batch` texts of `seq` tokens, and their linear layers: dense, and pruned in each of these
    /// patterns by magnitude, which takes as long as any other mask. Layers of several tensors get the longest
    /// pattern that [fits](Checkpoint::fitting_vector). 2:4 layers take no dense weights in their place. All of it is on the device at
    /// once: a model for each pattern.
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

        let whole = forwards[0].1.calls().map(|(_, call)| call).collect();
        let mut subjects = vec![Subject::new(device, whole, policy)?];
        // Which layers the others are of, and in which form.
        let mut of = Vec::new();
        for (vector, forward) in &forwards {
            for (_, same) in &kinds {
                let own = forward.calls().filter(|(node, _)| same.contains(&node.name)).map(|(_, call)| call);
                subjects.push(Subject::new(device, own.collect(), policy)?);
                of.push((same, *vector));
            }
        }
        for _ in 0..policy.samples.max(1) {
            subjects.iter_mut().try_for_each(|subject| subject.sample(device))?;
        }
        let mut medians = subjects.iter_mut().map(|subject| measure::median(&mut subject.samples));
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
