//! The part of `prune` that runs a BERT: statistics of its layers' inputs, an order of channels, the choice of layers.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Args, Choice, NOTHING, Reason, Reordered, Row, Run};
use crate::cli::sensitivity::{Baseline, Metric, Subject, calibration, candidates};
use crate::cli::{model, progress};
use sparse24::bert::{Calibration, Checkpoint, Inputs, Tokenizer};
use sparse24::measure::Policy;
use sparse24::prune::Statistics;
use sparse24::prune::permute::Budget;
use sparse24::{DType, Device, LinearWeights, VectorLen, choose};

/// A model that is to be pruned, and the calibration texts as token ids.
struct Bert<'a> {
    args: &'a Args,
    device: Device,
    tokenizer: Tokenizer,
    texts: Vec<Vec<u32>>,
}

/// Which linear layers are pruned, with which vector length.
type Vectors = BTreeMap<String, VectorLen>;

/// Prunes the linear layers of a BERT in memory.
pub(super) fn prune(args: &Args) -> Result<Run> {
    let folder = args.input().to_str().filter(|_| args.input().is_dir());
    let folder = folder.with_context(|| {
        format!("{}: a BERT's folder is needed, with its config and tokenizer, to run it", args.input().display())
    })?;
    let files = model::files(folder)?;
    if args.chooses() {
        // What it chooses by is what the model's embeddings do.
        files.check_pooling()?;
    }
    let (tokenizer, mut checkpoint) = model::read(&files, None, DType::F32)?;
    let selected = selected(args, &checkpoint)?;
    let device = args.running.device()?;
    let texts = args.calibration.as_deref().map_or(Ok(Vec::new()), |path| calibration(path, &tokenizer))?;
    let bert = Bert { args, device, tokenizer, texts };

    let permuted = match args.permute {
        Some(seconds) => bert.reorder(&mut checkpoint, seconds)?,
        None => Vec::new(),
    };
    let (vectors, chosen) = if args.chooses() {
        let (vectors, chosen) = bert.choose(&checkpoint, &selected)?;
        (vectors, Some(chosen))
    } else {
        let fitting = |name: &String| (name.clone(), checkpoint.fitting_vector(name, args.vector()));
        (selected.iter().map(fitting).collect(), None)
    };
    let (rows, tokens) = bert.prune(&mut checkpoint, &vectors)?;
    Ok(Run { checkpoint: Some(checkpoint), rows, permuted, chosen, tokens })
}

/// The linear layers that the flags select. Q, K and V are one: an error if they select a part of it.
fn selected(args: &Args, checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let mut selected = Vec::new();
    for (name, _) in checkpoint.linears() {
        let tensors = checkpoint.tensors_of(&name);
        let chosen = tensors.iter().filter(|tensor| args.selects(tensor, true)).count();
        ensure!(
            chosen == 0 || chosen == tensors.len(),
            "--include and --exclude select {chosen} of {}, which run as one product: select all or none",
            tensors.join(", ")
        );
        if chosen > 0 {
            selected.push(name);
        }
    }
    ensure!(!selected.is_empty(), "{}: {NOTHING}", args.input().display());
    Ok(selected)
}

impl Bert<'_> {
    fn how(&self, gram: bool, inputs: Inputs) -> Calibration {
        Calibration { batching: self.args.running.batching(), gram, inputs }
    }

    /// Prunes these layers together. What became of each, and the number of tokens that statistics are of.
    fn prune(&self, checkpoint: &mut Checkpoint, vectors: &Vectors) -> Result<(Vec<Row>, Option<u64>)> {
        let Args { method, inputs, .. } = self.args;
        let bar = progress(checkpoint.linears().count());
        let (mut rows, mut tokens) = (Vec::new(), None);
        let mut visit = |name: &str, weights: &LinearWeights, statistics: Option<&Statistics>| {
            bar.set_message(name.to_owned());
            bar.inc(1);
            tokens = statistics.map(Statistics::tokens);
            let Some(&vector) = vectors.get(name) else { return Ok(None) };
            let pruned = self.args.prune_matrix(name, &weights.to_dense()?, vector, statistics);
            let (row, pruned) = pruned.map_err(|e| sparse24::Error::Invalid(format!("{name}: {e}")))?;
            rows.push(row);
            Ok::<_, sparse24::Error>(Some(LinearWeights::Sparse24(pruned)))
        };
        if self.args.calibration.is_some() {
            let by_default = if method.needs_gram() { Inputs::Corrected } else { Inputs::Pruned };
            let how = self.how(method.needs_gram(), inputs.unwrap_or(by_default));
            let visit = &mut |name: &str, w: &LinearWeights, of: &Statistics| visit(name, w, Some(of));
            checkpoint.calibrate(&self.device, &self.texts, how, visit)?;
        } else {
            let dense: Vec<_> = checkpoint.linears().map(|(name, w)| (name, w.clone())).collect();
            for (name, w) in dense {
                if let Some(pruned) = visit(&name, &w, None)? {
                    checkpoint.set_linear(&name, pruned)?;
                }
            }
        }
        bar.finish_and_clear();
        Ok((rows, tokens))
    }

    /// Gives channels the order that suits the criterion's own scores.
    fn reorder(&self, checkpoint: &mut Checkpoint, seconds: u32) -> Result<Vec<Reordered>> {
        let method = self.args.method;
        let mut statistics = BTreeMap::new();
        if method.needs_statistics() {
            let how = self.how(false, Inputs::Dense);
            checkpoint.calibrate(&self.device, &self.texts, how, &mut |name, _, of| {
                statistics.insert(name.to_owned(), of.clone());
                Ok(None)
            })?;
        }
        let bar = progress(0);
        bar.set_message("searching for an order of channels");
        bar.enable_steady_tick(Duration::from_millis(200));
        let threads = self.args.running.threads.map_or(0, usize::from);
        let budget = Budget { threads, seed: self.args.seed, ..Budget::time(Duration::from_secs(seconds.into())) };
        // The longest vector is what an order helps most, and what helps it helps shorter ones, too.
        let vector = self.args.vector.iter().copied().max().unwrap_or(VectorLen::ONE);
        let permuted = checkpoint.permute(vector, &budget, |name, w| method.scores(w, statistics.get(name)))?;
        bar.finish_and_clear();
        let kept = permuted.iter().flat_map(|layer| layer.kept);
        let named = checkpoint.linears().map(|(name, _)| name).zip(kept);
        Ok(named
            .filter_map(|(name, kept)| kept.map(|kept| (name, kept)))
            .map(|(name, kept)| Reordered { name, kept_before: kept.before, kept_after: kept.after })
            .collect())
    }

    /// Finds out which layers are pruned, and how: by what each loses alone, and what all chosen lose together or save.
    fn choose(&self, checkpoint: &Checkpoint, selected: &[String]) -> Result<(Vectors, Choice)> {
        let args = self.args;
        let batching = args.running.batching();
        let metric = Metric::read(&args.metric, &self.tokenizer)?;
        let baseline = Baseline::new(&metric, &self.device, checkpoint, batching)?;
        let Self { device, texts: calibration, .. } = self;
        let subject = Subject { device, checkpoint, batching, pruning: args.pruning(), calibration };
        let mut alone = subject.rows(&args.vector);
        alone.retain(|(name, _)| selected.contains(name));
        ensure!(!alone.is_empty(), "--include and --exclude select no linear layer that is dense still");
        let bar = progress(alone.len());
        let mut measured = Vec::new();
        subject.measure(&baseline, &alone, &mut |row| {
            bar.inc(1);
            measured.push(row);
            Ok(())
        })?;
        bar.finish_and_clear();

        let together = |vectors: &BTreeMap<&str, VectorLen>| -> Result<f64> {
            let owned = vectors.iter().map(|(&name, &v)| (name.to_owned(), v)).collect();
            let mut pruned = checkpoint.clone();
            self.prune(&mut pruned, &owned)?;
            Ok(baseline.drop_of(&self.device, &pruned, batching)?)
        };
        let (chosen, drop, speedup) = match (args.max_drop, args.target_speedup) {
            (Some(most), _) => {
                let chosen = choose::within_drop(&candidates(&measured, None)?, most, together)?;
                let drop = chosen.drop;
                (chosen, drop, None)
            }
            (None, Some(speedup)) => {
                let (batch, seq) = (batching.texts, args.seq as usize);
                let times = checkpoint.times(&self.device, batch, seq, &args.vector, &Policy::TUNING)?;
                let chosen = choose::for_speedup(&candidates(&measured, Some(&times))?, times.forward, speedup)?;
                ensure!(chosen.reached, "--target-speedup: {}", chosen.summary);
                let drop = together(&chosen.vectors())?;
                let predicted = chosen.seconds.map(|seconds| times.forward / seconds);
                (chosen, drop, predicted)
            }
            (None, None) => bail!("neither --max-drop nor --target-speedup says what to choose by"),
        };
        let vectors = chosen.vectors().into_iter().map(|(name, v)| (name.to_owned(), v)).collect();
        let layers = chosen.layers.into_iter().map(|choose::Choice { layer, vector, drop, reason }| Reason {
            name: layer,
            vector: vector.map(VectorLen::get),
            drop,
            reason,
        });
        let choice = Choice {
            layers: layers.collect(),
            summary: chosen.summary,
            metric: metric.name(),
            metric_dense: baseline.value(),
            metric_drop: drop,
            predicted_speedup: speedup,
        };
        Ok((vectors, choice))
    }
}
