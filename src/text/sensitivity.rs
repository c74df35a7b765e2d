//! What a model loses when one of its linear layers alone is pruned, and what it loses when several are: how well its
//! embeddings say what people said, how near they are to the dense model's, or how well a language model predicts text.
//!
//! One pass over the layers in the order in which they run: a layer's inputs are counted where the method asks for
//! them, the layer is pruned, the model is evaluated with it in its place, and it is put back. Invariant: all drops are
//! of the same texts, and their intervals of the same draws.

use std::collections::BTreeMap;

use super::{Encoder, Pipeline, Similarity};
use crate::bootstrap::Interval;
use crate::engine::Device;
use crate::error::{Error, Result, expect_len};
use crate::format::Sparse24;
use crate::graph::{Ablation, Batching, Calibration, CalibrationInputs, Checkpoint, Model, Times, token_loss};
use crate::mask::VectorLen;
use crate::matrix::Matrix;
use crate::metrics::{PairedBootstrap, Ranking, Statistic, rounded, spearman};
use crate::prune::{Pruning, Statistics};
use crate::select::Candidate;
use crate::weights::HostWeights;

/// Texts, and what is made of a model's outputs for them.
#[derive(Clone, Debug)]
pub struct Metric {
    ids: Vec<Vec<u32>>,
    of: Of,
}

/// What a metric is made of.
#[derive(Clone, Debug)]
enum Of {
    /// The similarities of two embeddings each, beside people's scores.
    Pairs(Vec<f64>, Similarity),
    /// The cosines of embeddings to the dense model's.
    Embeddings,
    /// The probabilities of tokens.
    Tokens,
}

impl Metric {
    /// A metric on texts that are given as token ids. With people's scores, a score for each two texts that follow each
    /// other, it is Spearman's correlation of these and the similarities of the two; without, the mean cosine of
    /// embeddings to the dense model's. An error if there are no texts, or not a score for each pair.
    ///
    /// ```
    /// use sparse24::text::{Similarity, sensitivity::Metric};
    /// let ids = vec![vec![1, 2], vec![3], vec![4, 5], vec![6]];
    /// let metric = Metric::new(ids.clone(), Some((vec![0.9, 0.1], Similarity::Cosine)))?;
    /// assert_eq!((metric.name(), metric.count()), ("spearman", 2));
    /// assert!(Metric::new(ids, Some((vec![0.9], Similarity::Cosine))).unwrap_err().is_shape());
    /// assert!(Metric::new(Vec::new(), None).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn new(ids: Vec<Vec<u32>>, scores: Option<(Vec<f64>, Similarity)>) -> Result<Self> {
        let of = scores.map_or(Of::Embeddings, |(scores, similarity)| Of::Pairs(scores, similarity));
        if let Of::Pairs(scores, _) = &of {
            expect_len("scores of pairs of texts", 2 * scores.len(), ids.len())?;
        }
        if ids.is_empty() {
            return Err(Error::invalid("a metric of no texts"));
        }
        Ok(Self { ids, of })
    }

    /// A language model's metric: the mean of the logarithm of the probability that it gives to a token, over all but
    /// the first of each window. Negated, its exponential is the perplexity; a drop of 0.01 is one percent more. An
    /// error if there are no windows, or not all have the same number of tokens, two at least.
    ///
    /// ```
    /// use sparse24::text::sensitivity::Metric;
    /// let metric = Metric::of_tokens(vec![vec![1, 2, 3], vec![3, 4, 5]])?;
    /// assert_eq!((metric.name(), metric.count()), ("log_likelihood", 2));
    /// assert!(Metric::of_tokens(vec![vec![1]]).is_err());
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn of_tokens(windows: Vec<Vec<u32>>) -> Result<Self> {
        let tokens = windows.first().map_or(0, Vec::len);
        if tokens < 2 || windows.iter().any(|window| window.len() != tokens) {
            return Err(Error::invalid(
                "a metric of windows that are not all of the same number of tokens, two at least",
            ));
        }
        Ok(Self { ids: windows, of: Of::Tokens })
    }

    /// How many texts there are, or pairs of texts where these have scores.
    pub fn count(&self) -> usize {
        match &self.of {
            Of::Pairs(scores, _) => scores.len(),
            Of::Embeddings | Of::Tokens => self.ids.len(),
        }
    }

    /// Whether it is of the probabilities of tokens.
    pub fn is_of_tokens(&self) -> bool {
        matches!(self.of, Of::Tokens)
    }

    /// How the embeddings of two texts are compared, where they are.
    pub fn similarity(&self) -> Similarity {
        match self.of {
            Of::Pairs(_, similarity) => similarity,
            Of::Embeddings | Of::Tokens => Similarity::Cosine,
        }
    }

    /// `spearman`, `cosine` or `log_likelihood`: a name for the metric.
    pub fn name(&self) -> &'static str {
        match self.of {
            Of::Pairs(..) => "spearman",
            Of::Embeddings => "cosine",
            Of::Tokens => "log_likelihood",
        }
    }

    /// A number for each pair or text: how similar a model's embeddings of the two are, how similar its embedding is to
    /// the dense model's, or the mean logarithm of its tokens' probabilities.
    fn numbers(&self, outputs: &Matrix, dense: &Matrix) -> Result<Vec<f64>> {
        let numbers = outputs.elements().to_f32();
        if !numbers.iter().all(|x| x.is_finite()) {
            return Err(Error::invalid("activations overflow their type"));
        }
        Ok(match &self.of {
            Of::Pairs(_, similarity) => similarity.of_pairs(outputs),
            Of::Embeddings => {
                let (width, dense) = (outputs.cols(), dense.elements().to_f32());
                let both = numbers.chunks_exact(width).zip(dense.chunks_exact(width));
                both.map(|(a, b)| Similarity::Cosine.of(a, b)).collect()
            }
            Of::Tokens => numbers.into_iter().map(f64::from).collect(),
        })
    }

    /// The metric of such numbers: the more the better.
    fn value(&self, numbers: &[f64]) -> Result<f64> {
        let Of::Pairs(scores, _) = &self.of else { return Ok(numbers.iter().sum::<f64>() / numbers.len() as f64) };
        let constant = || Error::invalid("all scores or all similarities are the same: no correlation");
        spearman(numbers, scores).ok_or_else(constant)
    }

    /// How the texts are put into batches where nothing but the model bounds them. Logits of a window are as large as
    /// the states of a batch: one goes through at a time.
    fn batching(&self, batching: Batching) -> Batching {
        match self.of {
            Of::Pairs(..) | Of::Embeddings => batching,
            Of::Tokens => Batching { texts: 1, ..batching },
        }
    }

    fn statistic(&self) -> Statistic {
        match &self.of {
            Of::Embeddings | Of::Tokens => Statistic::Mean,
            Of::Pairs(scores, _) => Statistic::Spearman(Ranking::new(scores)),
        }
    }
}

/// How much lower a metric is.
#[derive(Clone, Copy, Debug)]
pub struct MetricDrop {
    /// By how much; below zero it is higher.
    pub drop: f64,
    /// What the middle 95 % of the drops on resampled texts span; none where the texts are too few.
    pub interval: Option<Interval>,
}

/// A metric with the dense model's outputs and its value of them.
#[derive(Debug)]
pub struct Baseline<'a> {
    metric: &'a Metric,
    outputs: Matrix,
    value: f64,
    bootstrap: PairedBootstrap,
}

impl<'a> Baseline<'a> {
    /// Runs the model as it is on the texts.
    pub fn new(metric: &'a Metric, subject: &Subject<'_>) -> Result<Self> {
        let outputs = subject.outputs(subject.checkpoint, metric)?;
        let numbers = metric.numbers(&outputs, &outputs)?;
        let bootstrap = PairedBootstrap::new(metric.statistic(), &numbers);
        Ok(Self { metric, outputs, value: rounded(metric.value(&numbers)?), bootstrap })
    }

    /// The metric's value on the dense model.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// How much lower the metric is on these outputs for the same texts.
    fn drop(&self, outputs: &Matrix) -> Result<MetricDrop> {
        let numbers = self.metric.numbers(outputs, &self.outputs)?;
        Ok(MetricDrop {
            drop: rounded(self.value - self.metric.value(&numbers)?),
            interval: self.bootstrap.interval(&numbers),
        })
    }

    /// How much lower the metric is on another model.
    pub fn drop_of(&self, subject: &Subject<'_>, checkpoint: &Checkpoint) -> Result<MetricDrop> {
        self.drop(&subject.outputs(checkpoint, self.metric)?)
    }
}

/// A model, where it runs, and how its layers are pruned.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Where it runs.
    pub device: &'a Device,
    /// The model.
    pub checkpoint: &'a Checkpoint,
    /// What makes embeddings of its states; [none](Pipeline::none) of a language model.
    pub pipeline: &'a Pipeline,
    /// How texts are put into batches.
    pub batching: Batching,
    /// How layers are pruned.
    pub pruning: Pruning,
    /// The calibration texts as token ids; none where the method reads no inputs.
    pub calibration: &'a [Vec<u32>],
}

impl Subject<'_> {
    /// What a form of the model makes of a metric's texts, a row for each: an embedding, or the mean logarithm of its
    /// tokens' probabilities.
    fn outputs(&self, checkpoint: &Checkpoint, metric: &Metric) -> Result<Matrix> {
        let Of::Tokens = metric.of else {
            return Encoder::new(self.device, checkpoint, self.pipeline.clone())?.embed(&metric.ids, self.batching);
        };
        let tokens = metric.ids.first().map_or(0, Vec::len);
        // In one pass as an ablation runs it, not by a cache, whose kernels round otherwise.
        let forward = Model::new(self.device, checkpoint)?.forward(1, tokens)?;
        let of = |ids: &Vec<u32>| log_likelihood(&forward.run_on(&[ids])?, 0, ids);
        let means = metric.ids.iter().map(of).collect::<Result<Vec<f32>>>()?;
        Matrix::from_f32(means.len(), 1, &means)
    }

    /// The same of an ablation on a metric's texts.
    fn ablated(&self, ablation: &mut Ablation, metric: &Metric, name: &str, weights: HostWeights) -> Result<Matrix> {
        let Of::Tokens = metric.of else { return self.pipeline.ablated(ablation, name, weights) };
        let mut means = vec![0.0; metric.ids.len()];
        ablation.run(name, weights, &mut |texts, seq, logits| {
            for (i, &text) in texts.iter().enumerate() {
                means[text] = log_likelihood(logits, i * seq, &metric.ids[text])?;
            }
            Ok(())
        })?;
        Matrix::from_f32(means.len(), 1, &means)
    }

    /// The rows to measure, in the order in which they can be: every dense linear layer in each pattern, for Q, K and V
    /// the longest one that fits.
    pub fn rows(&self, vectors: &[VectorLen]) -> Vec<(String, VectorLen)> {
        let mut rows = Vec::new();
        for (name, w) in self.checkpoint.linears() {
            for &vector in vectors {
                let row = (name.clone(), self.checkpoint.fitting_vector(&name, vector));
                if matches!(w, HostWeights::Dense(_)) && !rows.contains(&row) {
                    rows.push(row);
                }
            }
        }
        rows
    }

    /// Measures these rows, each a layer alone, and hands every one's drop to `done`.
    pub fn measure(
        &self,
        baseline: &Baseline<'_>,
        rows: &[(String, VectorLen)],
        done: &mut dyn FnMut(LayerDrop) -> Result<()>,
    ) -> Result<()> {
        let Self { device, checkpoint, pipeline, batching, pruning, calibration } = *self;
        let mut of_layer: BTreeMap<&str, Vec<VectorLen>> = BTreeMap::new();
        for (name, vector) in rows {
            of_layer.entry(name).or_default().push(*vector);
        }
        let model = pipeline.attach(checkpoint)?;
        let mut ablation = Ablation::new(device, &model, &baseline.metric.ids, baseline.metric.batching(batching))?;
        let mut visit = |name: &str, w: &HostWeights, statistics: Option<&Statistics>| -> Result<()> {
            let Some(vectors) = of_layer.get(name) else { return Ok(()) };
            let w = w.to_dense()?;
            for &vector in vectors {
                let (pruned, mask) = pruning.prune(name, &w, vector, statistics)?;
                let compressed = Sparse24::compress(&pruned, &mask)?;
                let outputs = self.ablated(&mut ablation, baseline.metric, name, compressed.into())?;
                let weights = w.rows() * w.cols();
                done(LayerDrop { layer: name.to_owned(), vector, weights, drop: baseline.drop(&outputs)? })?;
            }
            Ok(())
        };
        if !pruning.method.needs_statistics() {
            return checkpoint.linears().try_for_each(|(name, w)| visit(&name, w, None));
        }
        let how = Calibration { batching, gram: pruning.method.needs_gram(), inputs: CalibrationInputs::Dense };
        // Nothing takes a layer's place, so that its copy stays as it is.
        checkpoint.clone().calibrate(device, calibration, how, &mut |name, w, statistics| {
            visit(name, w, Some(statistics)).map(|()| None)
        })
    }
}

/// The mean logarithm of the probabilities of a text's tokens but the first, by logits whose row `first` is that of its
/// first token.
fn log_likelihood(logits: &Matrix, first: usize, ids: &[u32]) -> Result<f32> {
    let logits = logits.view::<f32>()?;
    let mut sum = 0.0;
    for (token, &next) in ids.iter().skip(1).enumerate() {
        sum -= token_loss(logits.row(first + token), next)?;
    }
    Ok((sum / (ids.len() - 1) as f64) as f32)
}

/// What one layer alone loses in one pattern.
#[derive(Clone, Debug)]
pub struct LayerDrop {
    /// Name of the layer.
    pub layer: String,
    /// How many rows share a pattern.
    pub vector: VectorLen,
    /// Weights of the layer, before pruning.
    pub weights: usize,
    /// What the metric loses.
    pub drop: MetricDrop,
}

impl MetricDrop {
    /// Whether it may be none, as far as is known.
    pub fn is_noise(self) -> bool {
        self.interval.is_some_and(Interval::has_zero)
    }
}

/// What was measured, for [selection](crate::select); with times, for one by speed.
pub fn candidates(measured: &[LayerDrop], times: Option<&Times>) -> Vec<Candidate> {
    let mut candidates: Vec<Candidate> = Vec::new();
    for LayerDrop { layer, vector, weights, drop } in measured {
        let form = |vector: Option<VectorLen>, drop, within_noise| Candidate {
            layer: layer.clone(),
            vector,
            drop,
            within_noise,
            weights: *weights,
            seconds: times.and_then(|times| times.of(layer, vector)),
        };
        if !candidates.iter().any(|c| c.layer == *layer) {
            candidates.push(form(None, 0.0, false));
        }
        candidates.push(form(Some(*vector), drop.drop, drop.is_noise()));
    }
    candidates
}
