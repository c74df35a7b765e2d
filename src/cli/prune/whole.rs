//! The part of `prune` that runs a model: statistics of its layers' inputs, an order of channels, the choice of layers,
//! retraining.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Args, Choice, NOTHING, Reason, Reordered, Row, Run};
use crate::cli::args::{ensure_usage, one_stdin};
use crate::cli::images::is_of_images;
use crate::cli::model;
use crate::cli::retrain::{Length, Training};
use crate::cli::sensitivity::{ReadMetric, counted, identity, texts_of};
use crate::cli::{progress, say};
use sparse24::graph::{Batching, Calibration, CalibrationInputs, Checkpoint, Kept, Times, time_forwards};
use sparse24::measure::Policy;
use sparse24::prune::Statistics;
use sparse24::prune::permute::Budget;
use sparse24::text::sensitivity::{Baseline, LayerDrop, MetricDrop, Subject, candidates};
use sparse24::text::{LoadOptions, Pipeline, Similarity, TextModel, Tokenizer};
use sparse24::train::{TrainOptions, Trainer};
use sparse24::vision::{ImageModel, pictures, read_image};
use sparse24::{DType, Device, HostWeights, VectorLen, select};

/// What a model is pruned by: its folder's files, where it runs, and the calibration texts as token ids.
struct Subjects<'a> {
    args: &'a Args,
    device: Device,
    tokenizer: Tokenizer,
    pipeline: Pipeline,
    similarity: Similarity,
    texts: Vec<Vec<u32>>,
}

/// Texts that are calibrated on where none are named but those to retrain on: more of them change little, and take
/// long.
const CALIBRATED_ON: usize = 2048;

/// Which linear layers are pruned, with which vector length.
type Vectors = BTreeMap<String, VectorLen>;

/// Prunes the linear layers of a model in memory.
pub(super) fn prune(args: &Args) -> Result<Run> {
    if is_of_images(args.input()) {
        return prune_images(args);
    }
    let folder = args.input().to_str().filter(|_| args.input().is_dir());
    let folder = folder.with_context(|| {
        format!("{}: a model's folder is needed, with its config and tokenizer, to run it", args.input().display())
    })?;
    let [pairs, input] = args.metric.inputs();
    one_stdin(&[pairs, input, ("--calibration", args.calibration.as_deref())])?;
    let files = model::files(folder)?;
    let TextModel { tokenizer, mut checkpoint, pipeline, similarity, .. } =
        TextModel::load_any(&files, LoadOptions::default())?;
    ensure!(
        !(args.target_speedup.is_some() && checkpoint.graph().head().is_some()),
        "--target-speedup times passes over texts; a language model's tokens come one by one: --max-drop chooses, too"
    );
    let selected = selected(args, &checkpoint)?;
    let device = args.running.device()?;
    let batch = args.running.batching().texts;
    let options = TrainOptions { batch, seed: args.seed, ..TrainOptions::default() };
    let to_learn = match (args.retrain, &args.metric.input) {
        (Some(minutes), Some(path)) => {
            let texts = texts_of("--input", path, &tokenizer)?;
            // Before anything takes time.
            Trainer::check(&texts.ids, &options).context("--input")?;
            say(&format!("pruning first; then {minutes} minutes of retraining on {}", texts.described(path)));
            Some((path, texts, minutes))
        }
        _ => None,
    };
    let (texts, calibrated_on) = match (&args.calibration, &to_learn) {
        (Some(path), _) => {
            let texts = texts_of("--calibration", path, &tokenizer)?;
            let described = texts.described(path);
            (texts.ids, Some(described))
        }
        (None, Some((path, texts, _))) if args.method().needs_statistics() => {
            let (texts, described) = texts.some(path, CALIBRATED_ON);
            (texts, Some(described))
        }
        _ => (Vec::new(), None),
    };
    let of = Subjects { args, device, tokenizer, pipeline, similarity, texts };
    // Neither the order of channels nor the method changes how long a layer takes.
    let times = args.target_speedup.map(|speedup| of.times(&checkpoint, &selected, speedup)).transpose()?;

    let permuted = match args.permute {
        Some(seconds) => of.reorder(&mut checkpoint, seconds)?,
        None => Vec::new(),
    };
    let (vectors, mut chosen) = if args.chooses() {
        let (vectors, chosen) = of.choose(&checkpoint, &selected, times.as_ref())?;
        (vectors, Some(chosen))
    } else {
        let fitting = |name: &String| (name.clone(), checkpoint.fitting_vector(name, args.vector()));
        (selected.iter().map(fitting).collect(), None)
    };
    let dense = (times.is_some() || to_learn.is_some()).then(|| checkpoint.clone());
    let (rows, tokens) = of.layers().prune(&mut checkpoint, &vectors)?;
    if let (Some(dense), Some(chosen), Some(_)) = (&dense, &mut chosen, &times) {
        let (batch, seq) = of.shape();
        let models = [of.pipeline.attach(dense)?, of.pipeline.attach(&checkpoint)?];
        let attached = models.each_ref();
        let [before, after] = time_forwards(&of.device, &attached, batch, seq, &Policy::TUNING)?[..] else {
            bail!("a forward pass was not timed");
        };
        if let Some(warning) = chosen.measured(before / after, args.target_speedup) {
            say(&warning);
        }
    }
    let mut retrained = None;
    if let (Some((path, texts, minutes)), Some(dense)) = (to_learn, &dense) {
        let of_texts = texts.described(path);
        checkpoint.find_sparsity()?;
        let [student, teacher] = [of.pipeline.attach(&checkpoint)?, of.pipeline.attach(dense)?];
        let training = Training {
            device: &of.device,
            student: &student,
            teacher: &teacher,
            texts: texts.ids,
            length: Length::Minutes(minutes),
            options,
            checkpoint: None,
        };
        let (new, summary) = training.run().context("--retrain")?;
        (checkpoint, retrained) = (new, Some((of_texts, summary)));
    }
    Ok(Run { checkpoint: Some(checkpoint), rows, permuted, chosen, tokens, calibrated_on, retrained })
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

/// What layers are pruned by: the calibration texts, or images, on a device.
struct Layers<'a> {
    args: &'a Args,
    device: &'a Device,
    texts: &'a [Vec<u32>],
    batching: Batching,
}

impl Layers<'_> {
    fn how(&self, gram: bool, inputs: CalibrationInputs) -> Calibration {
        Calibration { batching: self.batching, gram, inputs }
    }

    /// Prunes these layers together. What became of each, and the number of tokens that statistics are of.
    fn prune(&self, checkpoint: &mut Checkpoint, vectors: &Vectors) -> Result<(Vec<Row>, Option<u64>)> {
        let (method, inputs) = (self.args.method(), self.args.inputs);
        let bar = progress(checkpoint.linears().count());
        let (mut rows, mut tokens) = (Vec::new(), None);
        let mut visit = |name: &str, weights: &HostWeights, statistics: Option<&Statistics>| {
            bar.set_message(name.to_owned());
            bar.inc(1);
            tokens = statistics.map(Statistics::tokens);
            let Some(&vector) = vectors.get(name) else { return Ok(None) };
            let pruned = self.args.prune_matrix(name, &weights.to_dense()?, vector, statistics);
            let (row, pruned) = pruned.map_err(|e| sparse24::Error::invalid(format!("{name}: {e}")))?;
            rows.push(row);
            Ok::<_, sparse24::Error>(Some(HostWeights::Sparse24(pruned)))
        };
        if !self.texts.is_empty() {
            let by_default = if method.needs_gram() { CalibrationInputs::Corrected } else { CalibrationInputs::Pruned };
            let how = self.how(method.needs_gram(), inputs.unwrap_or(by_default));
            let visit = &mut |name: &str, w: &HostWeights, of: &Statistics| visit(name, w, Some(of));
            checkpoint.calibrate(self.device, self.texts, how, visit)?;
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
}

/// The pictures of --calibration, and what they are.
pub(super) fn calibration_images(folder: &Path, size: [usize; 2]) -> Result<(Vec<Vec<u32>>, String)> {
    let paths = pictures(folder).context("--calibration")?;
    let images = paths.iter().map(|path| read_image(path, size)).collect::<Result<Vec<_>, _>>()?;
    let described = counted(folder, images.len(), "images", &identity(&paths)?);
    Ok((images, described))
}

/// An image has more pixels than a text has tokens; how many go together is --batch's alone.
pub(super) fn batching_of_images(args: &Args) -> Batching {
    Batching { texts: args.running.batch.get(), tokens: usize::MAX }
}

/// Prunes the convolutions and the last layer of a model of images in memory.
fn prune_images(args: &Args) -> Result<Run> {
    ensure_usage!(
        args.permute.is_none() && !args.chooses() && args.retrain.is_none(),
        "--permute, --max-drop, --target-speedup and --retrain are for models of texts, and {} takes images",
        args.input().display()
    );
    let ImageModel { mut checkpoint, .. } = ImageModel::load(args.input(), None, DType::F32)?;
    let size = checkpoint.graph().image().unwrap_or_default();
    let selected = selected(args, &checkpoint)?;
    let device = args.running.device()?;
    let (images, calibrated_on) = match &args.calibration {
        None => (Vec::new(), None),
        Some(folder) => {
            let (images, described) = calibration_images(folder, size)?;
            (images, Some(described))
        }
    };
    let fitting = |name: &String| (name.clone(), checkpoint.fitting_vector(name, args.vector()));
    let vectors: Vectors = selected.iter().map(fitting).collect();
    let batching = batching_of_images(args);
    let layers = Layers { args, device: &device, texts: &images, batching };
    let (rows, tokens) = layers.prune(&mut checkpoint, &vectors)?;
    Ok(Run { checkpoint: Some(checkpoint), rows, tokens, calibrated_on, ..Run::default() })
}

impl Subjects<'_> {
    /// Texts and tokens of the forward pass that is timed.
    fn shape(&self) -> (usize, usize) {
        (self.args.running.batching().texts, self.args.seq as usize)
    }

    /// How long the layers take. An error if that is too long even with the fastest pattern of every selected layer:
    /// said before anything else is done.
    fn times(&self, checkpoint: &Checkpoint, selected: &[String], speedup: f64) -> Result<Times> {
        let (batch, seq) = self.shape();
        let model = self.pipeline.attach(checkpoint)?;
        let times = model.times(&self.device, batch, seq, &self.args.vector, &Policy::TUNING)?;
        let subject = self.subject(checkpoint);
        let rows = subject.rows(&self.args.vector).into_iter().filter(|(name, _)| selected.contains(name));
        // Nothing is lost yet: only whether it can be reached is asked.
        let free = |(layer, vector): (String, VectorLen)| LayerDrop {
            layer,
            vector,
            weights: 1,
            drop: MetricDrop { drop: 0.0, interval: None },
        };
        let most = select::for_speedup(
            &candidates(&rows.map(free).collect::<Vec<_>>(), Some(&times)),
            times.forward,
            speedup,
        )?;
        ensure!(
            most.reached,
            "--target-speedup: {}, and that is the most that --vector {} can do on {}",
            most.summary,
            self.args.vector.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            self.device.info().name()
        );
        Ok(times)
    }

    fn subject<'a>(&'a self, checkpoint: &'a Checkpoint) -> Subject<'a> {
        let Self { args, device, pipeline, texts: calibration, .. } = self;
        Subject {
            device,
            checkpoint,
            pipeline,
            batching: args.running.batching(),
            pruning: args.pruning(),
            calibration,
        }
    }

    fn layers(&self) -> Layers<'_> {
        let Self { args, device, texts, .. } = self;
        Layers { args, device, texts, batching: args.running.batching() }
    }

    /// Gives channels the order that suits the criterion's own scores.
    fn reorder(&self, checkpoint: &mut Checkpoint, seconds: u32) -> Result<Vec<Reordered>> {
        let method = self.args.method();
        let mut statistics = BTreeMap::new();
        if method.needs_statistics() {
            let how = self.layers().how(false, CalibrationInputs::Dense);
            checkpoint.calibrate(&self.device, &self.texts, how, &mut |name, _, of| {
                statistics.insert(name.to_owned(), of.clone());
                Ok(None)
            })?;
        }
        let bar = progress(0);
        bar.set_message("searching for an order of channels");
        bar.enable_steady_tick(Duration::from_millis(200));
        let threads = self.args.running.on.threads.map_or(0, usize::from);
        let budget = Budget { threads, seed: self.args.seed, ..Budget::time(Duration::from_secs(seconds.into())) };
        // The longest vector is what an order helps most, and what helps it helps shorter ones, too.
        let vector = self.args.vector.iter().copied().max().unwrap_or(VectorLen::ONE);
        let permuted = checkpoint.permute(vector, &budget, |name, w| method.scores(w, statistics.get(name)))?;
        bar.finish_and_clear();
        // A layer has the share that it had before the first order of its channels, and after the last.
        let mut kept: BTreeMap<String, Kept> = BTreeMap::new();
        for (name, of) in permuted.into_iter().flat_map(|channels| channels.kept) {
            kept.entry(name).and_modify(|kept| kept.after = of.after).or_insert(of);
        }
        let named = checkpoint.linears().filter_map(|(name, _)| kept.get(&name).map(|kept| (name, kept)));
        Ok(named.map(|(name, kept)| Reordered { name, kept_before: kept.before, kept_after: kept.after }).collect())
    }

    /// Finds out which layers are pruned, and how: by what each loses alone, and what all chosen lose together or,
    /// given the times of layers, save.
    fn choose(&self, checkpoint: &Checkpoint, selected: &[String], times: Option<&Times>) -> Result<(Vectors, Choice)> {
        let args = self.args;
        let read = ReadMetric::read(&args.metric, &self.tokenizer, self.similarity, checkpoint.graph())?;
        let subject = self.subject(checkpoint);
        let baseline = Baseline::new(&read.metric, &subject)?;
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

        // The last ones that were measured are not always those that are chosen.
        let mut known: Vec<(Vectors, MetricDrop)> = Vec::new();
        let mut together = |vectors: &BTreeMap<&str, VectorLen>| -> Result<f64> {
            let owned: Vectors = vectors.iter().map(|(&name, &v)| (name.to_owned(), v)).collect();
            let mut pruned = checkpoint.clone();
            self.layers().prune(&mut pruned, &owned)?;
            let drop = baseline.drop_of(&subject, &pruned)?;
            known.push((owned, drop));
            Ok(drop.drop)
        };
        let (chosen, predicted) = match (args.max_drop, args.target_speedup, times) {
            (Some(most), ..) => (select::within_drop(&candidates(&measured, None), most, together)?, None),
            (None, Some(speedup), Some(times)) => {
                let chosen = select::for_speedup(&candidates(&measured, Some(times)), times.forward, speedup)?;
                ensure!(chosen.reached, "--target-speedup: {}", chosen.summary);
                together(&chosen.vectors())?;
                let predicted = chosen.seconds.map(|seconds| times.forward / seconds);
                (chosen, predicted)
            }
            _ => bail!("neither --max-drop nor --target-speedup says what to choose by"),
        };
        let vectors: Vectors = chosen.vectors().into_iter().map(|(name, v)| (name.to_owned(), v)).collect();
        let MetricDrop { drop, interval } = match known.iter().find(|(of, _)| *of == vectors) {
            Some((_, drop)) => *drop,
            // No layer at all.
            None => MetricDrop { drop: 0.0, interval: None },
        };
        let layers = chosen.layers.into_iter().map(|select::SelectedLayer { layer, vector, drop, reason }| Reason {
            name: layer,
            vector: vector.map(VectorLen::get),
            drop,
            reason,
        });
        let choice = Choice {
            layers: layers.collect(),
            summary: chosen.summary,
            metric: read.metric.name(),
            metric_of: read.described(&args.metric),
            metric_dense: baseline.value(),
            metric_drop: drop,
            metric_drop_interval: interval,
            predicted_speedup: predicted,
            measured_speedup: None,
        };
        Ok((vectors, choice))
    }
}
