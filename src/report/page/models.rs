//! Whole models: the time of a forward pass by part, and accuracy beside speed.

use std::cmp::Ordering;

use super::entries::{Machine, batches, form, last, model_what, pass_against_dense};
use super::paths::shown;
use super::{PageInput, Section, Table, compared, distinct, middle, number, numbered, plural, times};
use crate::error::Result;
use crate::report::chart::{Bar, Bars, Ink};
use crate::report::file::{Classification, Eval, File, ModelBench, ModelRow, Parts, Prune, Share, Train};
use crate::report::significant;

pub(super) fn models_answer(models: &[(Machine, &ModelBench)]) -> Option<String> {
    let said: Vec<_> = models
        .iter()
        .filter(|(machine, _)| machine.own)
        .filter_map(|(machine, model)| {
            let op = if model.rows.iter().any(|r| r.op == "auto") { "auto" } else { "sparse24" };
            let rows = model.rows.iter().filter(|r| r.op == op);
            let said = |r: &ModelRow| Some(format!("{} {}", form(r), judged(pass_against_dense(model, r)?)));
            let rows: Vec<_> = rows.filter_map(said).collect();
            let ModelBench { model, batch, seq, .. } = model;
            let (texts, tokens) = (plural(*batch, "text"), plural(*seq, "token"));
            let model = shown(model);
            (!rows.is_empty())
                .then(|| format!("{model} with {texts} of {tokens} on {}: {}", machine.place, rows.join(", ")))
        })
        .collect();
    (!said.is_empty()).then(|| format!("End to end, times as fast as dense: {}.", said.join(". ")))
}

/// A ratio to dense, with what keeps it from being one.
fn judged((ratio, order): (f64, Option<Ordering>)) -> String {
    match order {
        Some(Ordering::Less | Ordering::Greater) => times(ratio),
        Some(Ordering::Equal) => format!("{} (within noise)", times(ratio)),
        None => format!("{} (not judged, for want of a spread)", times(ratio)),
    }
}

pub(super) fn end_to_end(models: &[(Machine, &ModelBench)]) -> Result<Option<Section>> {
    if models.is_empty() {
        return Ok(None);
    }
    let mut section = Section {
        id: "model".into(),
        title: "Models end to end".into(),
        text: vec![
            "One forward pass from ids to embeddings; of a language model, from ids to the last token's logits, over a \
             prompt (prefill) and over a token after it (decode). The bars are split by the time of each part alone, scaled to \
             the whole; other programs' are whole. The line over a bar is the middle half of the samples (all of \
             them where a file has no quartiles)."
                .into(),
        ],
        ..Section::default()
    };
    let mut table = Table::new(
        "Forward passes",
        true,
        &[
            "model",
            "machine",
            "program",
            "op",
            "type",
            "#ms",
            "#middle half, ms",
            "#texts/s, tokens/s",
            "#vs own dense",
            "than dense",
            "#GEMMs, ms",
            "#attention, ms",
            "#rest, ms",
            "#weights, MB",
            "kernels",
        ],
    );
    let name = |model: &ModelBench| last(&model.model).to_owned();
    let titles = distinct(models.iter().map(|(machine, m)| (name(m), m.batch, m.seq, machine.place.clone())));
    for (model, batch, seq, place) in titles {
        let mut bars = Vec::new();
        let here = models
            .iter()
            .filter(|(machine, m)| machine.place == place && name(m) == model && (m.batch, m.seq) == (batch, seq));
        for (machine, bench) in here {
            for row in &bench.rows {
                let middle_half = row.times.middle();
                let against = pass_against_dense(bench, row).filter(|_| row.op != "dense");
                let part = |of: fn(&Parts) -> f64| number(row.parts.as_ref().map(of), 3);
                table.rows.push(vec![
                    batches(bench),
                    place.clone(),
                    machine.program.clone(),
                    form(row),
                    row.dtype.clone(),
                    if row.verified { number(row.times.median, 4) } else { "FAILED".into() },
                    middle(row.times),
                    number(row.tokens_per_second.or(row.sequences_per_second), 3),
                    against.map(|a| a.0).or(row.speedup_vs_dense).map_or_else(|| "-".into(), times),
                    against.map_or("-", |a| compared(a.1)).into(),
                    part(|p| p.gemm_ms),
                    part(|p| p.attention_ms),
                    part(|p| p.rest_ms),
                    number(row.weight_bytes.map(|b| b as f64 / 1e6), 3),
                    row.kernels.join(", "),
                ]);
                let Some(median) = row.times.median else { continue };
                let parts = match row.parts {
                    Some(p) => {
                        let parts = [p.gemm_ms, p.attention_ms, p.rest_ms];
                        let whole: f64 = parts.iter().sum();
                        parts.iter().enumerate().map(|(at, ms)| (ms / whole * median, Ink::Part(at))).collect()
                    }
                    None => vec![(median, Ink::Masked)],
                };
                let text = format!("{} ms", significant(median, 3));
                bars.push(Bar { label: model_what(machine, row), parts, spread: middle_half, text });
            }
        }
        if bars.is_empty() {
            continue;
        }
        let names = ["linear layers", "attention", "the rest"].into_iter().enumerate();
        let chart = Bars {
            unit: "ms of a forward pass".into(),
            groups: vec![(format!("{} of {}", plural(batch, "text"), plural(seq, "token")), bars)],
            marks: Vec::new(),
            legend: names.map(|(at, name)| (Ink::Part(at), name.to_owned())).collect(),
        };
        let title = format!("{model}, {place}");
        let alt = format!("Bars of the time of a forward pass of {title} by part; the numbers are in the table below");
        section.charts.push(chart.chart(&numbered("model", &section), &title, &alt)?);
    }
    section.tables.push(table);
    Ok(Some(section))
}

/// The files that say how models were made.
struct Makers<'a> {
    prunes: Vec<&'a Prune>,
    trains: Vec<&'a Train>,
}

impl<'a> Makers<'a> {
    fn new(inputs: &'a [PageInput]) -> Self {
        let mut makers = Self { prunes: Vec::new(), trains: Vec::new() };
        for input in inputs {
            match &input.file {
                File::Prune(prune) => makers.prunes.push(prune),
                File::Train(train) => makers.trains.push(train),
                _ => {}
            }
        }
        makers
    }

    /// The run that retrained a model.
    fn train(&self, model: &str) -> Option<&'a Train> {
        self.trains.iter().find(|train| train.output == model).copied()
    }

    /// How a model was pruned, and whether it was retrained then.
    fn of(&self, model: &str) -> Option<(&'a Prune, bool)> {
        if let Some(prune) = self.prunes.iter().find(|prune| prune.made(model)) {
            return Some((prune, prune.retrained.is_some()));
        }
        let train = self.train(model)?;
        // What is retrained again is looked up no further: files could lead in a circle.
        self.prunes.iter().find(|prune| prune.made(&train.input)).map(|prune| (*prune, true))
    }
}

/// How an evaluated model was pruned, in words, and its V.
fn pruned(eval: &Eval, makers: &Makers<'_>) -> (String, Option<usize>) {
    let retrained = |was: bool| if was { ", retrained" } else { "" };
    let ran = eval.sparsity.strip_suffix("2:4").map(|v| v.trim_end_matches(':'));
    let ran = ran.and_then(|v| if v.is_empty() { Some(1) } else { v.parse().ok() });
    let by_eval = ran.filter(|_| !eval.linear_layers.iter().any(|layers| layers.stored));
    if let Some((prune, was_retrained)) = makers.of(&eval.model) {
        let vectors = distinct(prune.layers.iter().map(|l| l.vector));
        let vector = match vectors[..] {
            [one] if prune.pruned_share > 0.999 => Some(one),
            _ => None,
        };
        let v: Vec<_> = vectors.iter().map(usize::to_string).collect();
        let share = 100.0 * prune.pruned_share;
        let how = format!("{}, V={}, {share:.0} % of weights", prune.method, v.join(" ")) + retrained(was_retrained);
        return match by_eval.filter(|v| vectors != [*v]) {
            Some(v) => (format!("{how}, then magnitude, V={v}"), Some(v)),
            None => (how, vector),
        };
    }
    let train = makers.train(&eval.model);
    let said = eval.provenance.pruned.as_ref().or(train.and_then(|train| train.provenance.pruned.as_ref()));
    let was_retrained = eval.provenance.retrained_on.is_some() || train.is_some();
    let how = match (said, ran) {
        (Some(pruned), _) => shown(pruned),
        (None, None) => eval.sparsity.clone(),
        (None, Some(v)) if by_eval.is_none() => format!("V={v}"),
        (None, Some(v)) => format!("magnitude, V={v}"),
    };
    (how + retrained(was_retrained), ran)
}

/// What a model is evaluated on.
#[derive(Clone, Copy)]
enum Task {
    Pairs,
    Labels,
    Images,
    Text,
}

/// How good a model is at a task.
struct Figure {
    /// Length of its bar, in the task's unit.
    bar: f64,
    said: String,
    /// The file or folder that it is of.
    data: String,
    /// Of the task's columns.
    cells: Vec<String>,
}

impl Task {
    const ALL: [Self; 4] = [Self::Pairs, Self::Labels, Self::Images, Self::Text];

    /// Title of its table and charts.
    fn title(self) -> &'static str {
        match self {
            Self::Pairs => "Spearman's correlation",
            Self::Labels => "Labels predicted from embeddings",
            Self::Images => "Classes of pictures",
            Self::Text => "Perplexity",
        }
    }

    fn explained(self) -> &'static str {
        match self {
            Self::Pairs => "Correlation of the embeddings' cosine similarities with people's scores; higher is better.",
            Self::Labels => "Share of labels that a linear probe of the embeddings predicts right; higher is better.",
            Self::Images => {
                "Share of pictures whose class is the likeliest (top-1) or among the five likeliest (top-5); \
                             higher is better."
            }
            Self::Text => {
                "How a language model predicts each token of a text from those before it in its window: the \
                           perplexity is the exponential of the mean loss; lower is better."
            }
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Pairs => "Spearman's correlation (no unit)",
            Self::Labels => "share of labels right",
            Self::Images => "share of pictures right, top-1",
            Self::Text => "mean loss, nats per token",
        }
    }

    fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Pairs => &["#Spearman", "#Pearson", "#pairs"],
            Self::Labels => &["#right", "#95 % interval", "#texts"],
            Self::Images => &["#top-1", "#95 % interval", "#top-5", "#pictures"],
            Self::Text => &["#perplexity", "#one standard error", "#windows", "#tokens of each"],
        }
    }

    fn of(self, eval: &Eval) -> Option<Figure> {
        let unknown = || "-".to_owned();
        let interval =
            |share: &Share| share.interval.map_or_else(unknown, |i| format!("{:.4} to {:.4}", i.low, i.high));
        let count = |count: Option<usize>| count.map_or_else(unknown, |count| count.to_string());
        match self {
            Self::Pairs => {
                let spearman = eval.spearman?;
                let pearson = eval.pearson.map_or_else(unknown, |pearson| format!("{pearson:.4}"));
                Some(Figure {
                    bar: spearman,
                    said: format!("{spearman:.4}"),
                    data: eval.pairs_file.clone().unwrap_or_else(unknown),
                    cells: vec![format!("{spearman:.4}"), pearson, count(eval.pairs)],
                })
            }
            Self::Labels => {
                let Classification { file, texts, share } = eval.classification.as_ref()?;
                let right = format!("{:.4}", share.accuracy);
                Some(Figure {
                    bar: share.accuracy,
                    said: right.clone(),
                    data: file.clone(),
                    cells: vec![right, interval(share), texts.to_string()],
                })
            }
            Self::Images => {
                let share = eval.top1?;
                let right = format!("{:.4}", share.accuracy);
                let top5 = eval.top5.map_or_else(unknown, |top5| format!("{:.4}", top5.accuracy));
                Some(Figure {
                    bar: share.accuracy,
                    said: right.clone(),
                    data: eval.images_folder.clone().unwrap_or_else(unknown),
                    cells: vec![right, interval(&share), top5, count(eval.images)],
                })
            }
            Self::Text => {
                let of = eval.prediction.as_ref()?;
                let perplexity = significant(of.perplexity, 4);
                let [low, high] =
                    [-1.0, 1.0].map(|sign| significant((of.mean_loss + sign * of.standard_error).exp(), 4));
                let cells = vec![
                    perplexity.clone(),
                    format!("{low} to {high}"),
                    of.windows.to_string(),
                    of.context.to_string(),
                ];
                Some(Figure { bar: of.mean_loss, said: perplexity, data: of.text.clone(), cells })
            }
        }
    }
}

pub(super) fn accuracy(inputs: &[PageInput], models: &[(Machine, &ModelBench)]) -> Result<Option<Section>> {
    let makers = Makers::new(inputs);
    let evals = inputs.iter().filter_map(|input| if let File::Eval(eval) = &input.file { Some(eval) } else { None });
    let evals: Vec<&Eval> = evals.collect();
    let mut section = Section {
        id: "accuracy".into(),
        title: "Accuracy beside speed".into(),
        text: vec!["(?) behind a speed: not told apart from dense's.".into()],
        ..Section::default()
    };
    for task in Task::ALL {
        let figures: Vec<_> = evals.iter().filter_map(|eval| Some((*eval, task.of(eval)?))).collect();
        if !figures.is_empty() {
            section.text.push(format!("{}: {}", task.title(), task.explained()));
            at_task(task, &figures, &makers, models, &mut section)?;
        }
    }
    Ok((!section.tables.is_empty()).then_some(section))
}

/// Adds the table of a task, and a chart for each of the files that it was evaluated on.
fn at_task(
    task: Task,
    figures: &[(&Eval, Figure)],
    makers: &Makers<'_>,
    models: &[(Machine, &ModelBench)],
    section: &mut Section,
) -> Result<()> {
    let is_dense = |eval: &Eval| {
        let unsaid = eval.provenance.pruned.is_none() && makers.of(&eval.model).is_none();
        eval.sparsity == "none" && unsaid && makers.train(&eval.model).is_none()
    };
    // The name that a pruned folder's dense model has in the benchmark.
    let source = |eval: &Eval| makers.of(&eval.model).map_or(&eval.model, |(prune, _)| &prune.input).clone();
    let speed = |eval: &Eval, vector: Option<usize>| -> Option<(f64, Option<Ordering>, String)> {
        let (machine, bench) = models.iter().find(|(machine, m)| {
            machine.own && last(&m.model) == last(&source(eval)) && m.rows.iter().any(|r| r.dtype == eval.dtype)
        })?;
        let of = |op: &str| bench.rows.iter().find(|r| r.op == op && r.vector == vector && r.dtype == eval.dtype);
        let row = if vector.is_some() { of("auto").or_else(|| of("sparse24")) } else { of("dense") }?;
        let (ratio, order) = pass_against_dense(bench, row)?;
        // Dense beside itself is 1x, and needs no judgement.
        Some((ratio, if vector.is_some() { order } else { Some(Ordering::Less) }, machine.place.clone()))
    };
    let head = [&["model", "pruned by", "type"], task.columns(), &["of", "#end to end vs dense", "command"]].concat();
    let mut table = Table::new(task.title(), false, &head);
    for data in distinct(figures.iter().map(|(_, figure)| &figure.data)) {
        // Bars by the machine that the speed is of.
        let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
        let here = || figures.iter().filter(|(_, figure)| figure.data == *data);
        for (eval, figure) in here() {
            let (how, vector) = pruned(eval, makers);
            let how = if is_dense(eval) { "dense".to_owned() } else { how };
            let speed = if is_dense(eval) || vector.is_some() { speed(eval, vector) } else { None };
            let begin = [shown(&eval.model), how.clone(), eval.dtype.clone()];
            let end = [
                shown(data),
                speed.as_ref().map_or_else(|| "-".into(), |s| judged((s.0, s.1))),
                shown(&eval.environment.command),
            ];
            table.rows.push(begin.into_iter().chain(figure.cells.iter().cloned()).chain(end).collect());
            let said = &figure.said;
            let (text, heading) = match &speed {
                // The table beside it says it in words.
                Some((ratio, Some(Ordering::Equal) | None, place)) => {
                    (format!("{said} at {} (?)", times(*ratio)), format!("speed end to end on {place}"))
                }
                Some((ratio, _, place)) => {
                    (format!("{said} at {}", times(*ratio)), format!("speed end to end on {place}"))
                }
                None => (said.clone(), "no speed measured".to_owned()),
            };
            let ink = Ink::of(if vector.is_some() { "auto" } else { "dense" }, vector);
            let bar = Bar { label: how, parts: vec![(figure.bar, ink)], spread: None, text };
            match groups.iter_mut().find(|(name, _)| *name == heading) {
                Some((_, bars)) => bars.push(bar),
                None => groups.push((heading, vec![bar])),
            }
        }
        let dense = here().find(|(eval, _)| is_dense(eval));
        let marks = dense.map(|(_, of)| (of.bar, format!("dense: {}", of.said))).into_iter().collect();
        let chart = Bars { unit: task.unit().into(), groups, marks, legend: Vec::new() };
        let title = if data == "-" { task.title().to_owned() } else { format!("{} on {}", task.title(), last(data)) };
        let alt = format!("Bars of {title} by method and V, with the speed end to end; numbers in the table below");
        section.charts.push(chart.chart(&numbered("accuracy", section), &title, &alt)?);
    }
    section.tables.push(table);
    Ok(())
}
