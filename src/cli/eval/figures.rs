//! The figures of an evaluation: what a model makes of each task's texts, and what is counted of that.
//!
//! Invariant: a figure and the interval beside it are of the same numbers, one for each pair or text.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::inputs::{Labelled, Lines, Pairs};
use crate::cli::{model, progress};
use sparse24::bootstrap::Interval;
use sparse24::metrics::{PairedBootstrap, Ranking, Statistic, pearson, spearman};
use sparse24::text::{LinearProbe, Similarity};
use sparse24::{Elements, Matrix};

/// Parts that texts with labels are divided into: each is predicted from the others.
const FOLDS: usize = 5;

/// What a model is evaluated on, each with the name of its file.
#[derive(Default)]
pub(super) struct Tasks {
    pub(super) pairs: Option<(String, Pairs)>,
    pub(super) texts: Option<(String, Lines)>,
    pub(super) labelled: Option<(String, Labelled)>,
    pub(super) test: Option<(String, Labelled)>,
}

/// What a model made of them.
#[derive(Default)]
pub(super) struct Ran {
    /// Of each pair.
    similarities: Vec<f64>,
    /// Embeddings of the plain texts.
    pub(super) texts: Option<Matrix>,
    /// 1 for each text whose label was predicted right, 0 for others.
    right: Vec<f64>,
    pub(super) sentences: usize,
    pub(super) seconds: f64,
    pub(super) passed: model::Passed,
}

/// Spearman's and Pearson's correlation. Intervals are none where most draws of so few pairs have no correlation.
#[derive(Serialize)]
pub(super) struct Correlations {
    spearman: f64,
    spearman_interval: Option<Interval>,
    pearson: f64,
    pearson_interval: Option<Interval>,
}

/// The share of labels that are predicted right.
#[derive(Serialize)]
pub(super) struct Accuracy {
    pub(super) accuracy: f64,
    pub(super) interval: Option<Interval>,
}

impl Accuracy {
    /// Of a 1 for each right answer, and a 0 for each other.
    pub(super) fn of(right: &[f64]) -> Self {
        Self { accuracy: mean(right), interval: Statistic::Mean.interval(right) }
    }
}

/// A linear probe's figures, and what they are of.
#[derive(Serialize)]
pub(super) struct Classification {
    file: Option<String>,
    /// Where it was reported on another file than it was fitted to.
    test_file: Option<String>,
    /// How many folds the texts were divided into, where there is no such file.
    folds: Option<usize>,
    /// That it is reported on.
    texts: usize,
    classes: usize,
    /// The share of the most frequent class among them: what is right without looking at a text.
    most_frequent: f64,
    /// Of the probe: see [`LinearProbe::RIDGE`].
    ridge: f64,
    #[serde(flatten)]
    accuracy: Accuracy,
}

/// The cosine between two models' embeddings of the same texts.
#[derive(Serialize)]
pub(super) struct Agreement {
    file: String,
    texts: usize,
    /// Lines that are too short, or headings.
    left_out: usize,
    mean: f64,
    interval: Option<Interval>,
    /// One text of twenty has a lower one.
    percentile_5: f64,
    min: f64,
}

/// How much higher the first model's figure is.
#[derive(Serialize)]
pub(super) struct Difference {
    value: f64,
    /// Of the same draws for both models.
    interval: Option<Interval>,
    /// Whether 0 lies in the interval; none where there is none.
    equal: Option<bool>,
}

#[derive(Serialize)]
pub(super) struct Differences {
    spearman: Option<Difference>,
    pearson: Option<Difference>,
    accuracy: Option<Difference>,
}

impl Ran {
    /// Embeds texts that errors call a line of a file.
    fn embed(
        &mut self,
        encoder: &model::Encoder,
        texts: &[String],
        name: &dyn Fn(usize) -> String,
        mut done: impl FnMut(&Matrix),
    ) -> Result<()> {
        let bar = progress(texts.len());
        let started = Instant::now();
        let passed = encoder.windows(texts, &bar, name, |_, embeddings| {
            done(&embeddings);
            Ok(())
        })?;
        self.seconds += started.elapsed().as_secs_f64();
        bar.finish_and_clear();
        encoder.warn_of_truncation(passed.truncated, texts.len());
        self.sentences += texts.len();
        self.passed.truncated += passed.truncated;
        self.passed.shapes += passed.shapes;
        self.passed.first_texts += passed.first_texts;
        self.passed.first_time += passed.first_time;
        Ok(())
    }

    /// The embeddings of the lines of a file, one a row.
    fn embeddings(
        &mut self,
        encoder: &model::Encoder,
        file: &str,
        texts: &[String],
        lines: &[usize],
    ) -> Result<Matrix> {
        let (mut all, mut width) = (Vec::new(), 0);
        self.embed(encoder, texts, &|text| format!("{file}: line {}", lines[text]), |embeddings| {
            width = embeddings.cols();
            all.extend_from_slice(&embeddings.elements().to_f32());
        })?;
        Ok(Matrix::new(texts.len(), width, Elements::F32(all))?)
    }
}

impl Tasks {
    /// Runs a model on every task.
    pub(super) fn run(&self, encoder: &model::Encoder) -> Result<Ran> {
        let mut ran = Ran::default();
        if let Some((file, Pairs { sentences, lines, scores })) = &self.pairs {
            let name = |sentence: usize| format!("{file}: line {}", lines[sentence / 2]);
            let mut similarities = Vec::with_capacity(scores.len());
            // A window is even: it parts no pair.
            const { assert!(model::WINDOW.is_multiple_of(2)) };
            ran.embed(encoder, sentences, &name, |embeddings| {
                similarities.extend(encoder.similarity.of_pairs(embeddings));
            })?;
            ran.similarities = similarities;
        }
        if let Some((file, Lines { texts, lines, .. })) = &self.texts {
            ran.texts = Some(ran.embeddings(encoder, file, texts, lines)?);
        }
        if let Some((file, labelled)) = &self.labelled {
            let embeddings = ran.embeddings(encoder, file, &labelled.texts, &labelled.lines)?;
            let (predicted, labels) = match &self.test {
                None => (LinearProbe::cross_validate(&embeddings, &labelled.labels, FOLDS), &labelled.labels),
                Some((file, test)) => {
                    let probe = LinearProbe::fit(&embeddings, &labelled.labels);
                    let embeddings = ran.embeddings(encoder, file, &test.texts, &test.lines)?;
                    (probe.and_then(|probe| probe.predict(&embeddings)), &test.labels)
                }
            };
            let predicted = predicted.with_context(|| file.clone())?;
            ran.right = predicted.iter().zip(labels).map(|(a, b)| f64::from(a == b)).collect();
        }
        Ok(ran)
    }

    pub(super) fn pairs(&self) -> Option<usize> {
        self.pairs.as_ref().map(|(_, pairs)| pairs.scores.len())
    }

    pub(super) fn correlations(&self, ran: &Ran) -> Result<Option<Correlations>> {
        let Some((file, Pairs { scores, .. })) = &self.pairs else { return Ok(None) };
        let constant = || format!("{file}: all scores or all similarities are the same: no correlation");
        let [of_ranks, of_numbers] = correlated_with(scores);
        Ok(Some(Correlations {
            spearman: spearman(&ran.similarities, scores).with_context(constant)?,
            spearman_interval: of_ranks.interval(&ran.similarities),
            pearson: pearson(&ran.similarities, scores).with_context(constant)?,
            pearson_interval: of_numbers.interval(&ran.similarities),
        }))
    }

    pub(super) fn accuracy(&self, ran: &Ran) -> Option<Accuracy> {
        self.labelled.as_ref()?;
        Some(Accuracy::of(&ran.right))
    }

    pub(super) fn classification(
        &self,
        ran: &Ran,
        file: Option<String>,
        test_file: Option<String>,
    ) -> Option<Classification> {
        let (_, fitted) = self.labelled.as_ref()?;
        let reported = self.test.as_ref().map_or(fitted, |(_, test)| test);
        let texts = reported.labels.len();
        let of = |class: usize| reported.labels.iter().filter(|label| **label == class).count();
        Some(Classification {
            file,
            folds: test_file.is_none().then_some(FOLDS),
            test_file,
            texts,
            classes: fitted.classes.len(),
            most_frequent: (0..fitted.classes.len()).map(of).max().unwrap_or(0) as f64 / texts as f64,
            ridge: LinearProbe::RIDGE,
            accuracy: self.accuracy(ran)?,
        })
    }

    /// How much higher the figures of the first model are.
    pub(super) fn differences(&self, first: &Ran, second: &Ran) -> Result<Differences> {
        let of = |statistic: Statistic, value: f64, [first, second]: [&[f64]; 2]| {
            let interval = PairedBootstrap::new(statistic, first).interval(second);
            Difference { value, interval, equal: interval.map(Interval::has_zero) }
        };
        let (mut rank, mut number) = (None, None);
        let both = self.correlations(first)?.zip(self.correlations(second)?);
        if let Some(((a, b), (_, Pairs { scores, .. }))) = both.zip(self.pairs.as_ref()) {
            let numbers = [&first.similarities[..], &second.similarities[..]];
            let [of_ranks, of_numbers] = correlated_with(scores);
            rank = Some(of(of_ranks, a.spearman - b.spearman, numbers));
            number = Some(of(of_numbers, a.pearson - b.pearson, numbers));
        }
        let accuracy = self.labelled.as_ref().map(|_| {
            of(Statistic::Mean, mean(&first.right) - mean(&second.right), [&first.right[..], &second.right[..]])
        });
        Ok(Differences { spearman: rank, pearson: number, accuracy })
    }

    /// The cosine between two models' embeddings of the plain texts.
    pub(super) fn agreement(&self, first: &Ran, second: &Ran) -> Option<Agreement> {
        let (file, Lines { left_out, .. }) = self.texts.as_ref()?;
        let (first, second) = (first.texts.as_ref()?, second.texts.as_ref()?);
        let [a, b] = [first, second].map(|embeddings| embeddings.elements().to_f32());
        let both = a.chunks_exact(first.cols()).zip(b.chunks_exact(second.cols()));
        let cosines: Vec<f64> = both.map(|(a, b)| Similarity::Cosine.of(a, b)).collect();
        let mut sorted = cosines.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Agreement {
            file: file.clone(),
            texts: cosines.len(),
            left_out: *left_out,
            mean: mean(&cosines),
            interval: Statistic::Mean.interval(&cosines),
            percentile_5: *sorted.get(sorted.len() / 20)?,
            min: *sorted.first()?,
        })
    }
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

/// Spearman's and Pearson's correlation with these scores.
fn correlated_with(scores: &[f64]) -> [Statistic; 2] {
    [Statistic::Spearman(Ranking::new(scores)), Statistic::Pearson(scores.to_vec())]
}

/// A figure and its interval.
pub(super) fn with_interval(value: f64, interval: Option<Interval>) -> String {
    let interval = interval.map_or_else(String::new, |of| format!(" ({:.4} to {:.4})", of.low, of.high));
    format!("{value:.4}{interval}")
}

impl Correlations {
    pub(super) fn text(&self, pairs: usize, file: &str) -> String {
        format!(
            "Spearman {}, Pearson {} over {pairs} pairs of {file}\n",
            with_interval(self.spearman, self.spearman_interval),
            with_interval(self.pearson, self.pearson_interval)
        )
    }
}

impl Classification {
    pub(super) fn text(&self) -> String {
        let file = self.file.as_deref().unwrap_or_default();
        let of = match (&self.test_file, self.folds) {
            (Some(test), _) => format!("{test}, fitted to {file}"),
            (None, folds) => format!("{file} in {} folds", folds.unwrap_or_default()),
        };
        format!(
            "accuracy {} of a linear probe over {} texts of {of}; {} classes, the most frequent alone {:.4}\n",
            with_interval(self.accuracy.accuracy, self.accuracy.interval),
            self.texts,
            self.classes,
            self.most_frequent
        )
    }
}

impl Agreement {
    pub(super) fn text(&self) -> String {
        format!(
            "cosine between both {}, 5th percentile {:.4}, lowest {:.4}, over {} texts of {} ({} short lines or headings left out)\n",
            with_interval(self.mean, self.interval),
            self.percentile_5,
            self.min,
            self.texts,
            self.file,
            self.left_out
        )
    }
}

impl Difference {
    fn text(&self, other: &str) -> String {
        let interval = self.interval.map_or_else(
            || " (too few for an interval)".to_owned(),
            |of| format!(" ({:+.4} to {:+.4})", of.low, of.high),
        );
        let equal = if self.equal == Some(true) { ": equal within the interval" } else { "" };
        format!("against {other}, the difference is {:+.4}{interval}{equal}", self.value)
    }
}

impl Differences {
    pub(super) fn correlations_text(&self, other: &Correlations) -> String {
        let of = |name: &str, difference: &Option<Difference>, other: f64, interval: Option<Interval>| {
            let text = difference.as_ref().map(|of| of.text(&with_interval(other, interval)));
            text.map_or_else(String::new, |text| format!("  {name} {text}\n"))
        };
        of("Spearman", &self.spearman, other.spearman, other.spearman_interval)
            + &of("Pearson", &self.pearson, other.pearson, other.pearson_interval)
    }

    pub(super) fn accuracy_text(&self, other: &Accuracy) -> String {
        let text = self.accuracy.as_ref().map(|of| of.text(&with_interval(other.accuracy, other.interval)));
        text.map_or_else(String::new, |text| format!("  accuracy {text}\n"))
    }
}
