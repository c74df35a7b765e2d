//! What a model loses when one of its layers alone is pruned.

use super::entries::{last, what};
use super::paths::shown;
use super::{PageInput, Section, Table, distinct, numbered};
use crate::error::Result;
use crate::report::chart::{Bar, Bars, Ink};
use crate::report::file::{File, Sensitivity, SensitivityRow};

pub(super) fn layers(inputs: &[PageInput]) -> Result<Option<Section>> {
    let files: Vec<_> = inputs
        .iter()
        .filter_map(|input| match &input.file {
            File::Sensitivity(sensitivity) => Some((input, sensitivity)),
            _ => None,
        })
        .collect();
    let mut section = Section {
        id: "sensitivity".into(),
        title: "What pruning one layer alone costs".into(),
        text: vec![
            "Each row is the whole model with one linear layer pruned and all others dense: how much lower its \
             metric is. A negative drop is a gain, and has no bar. (?) marks a drop within noise, which may be none. \
             Drops of single layers do not add up to that of all of them."
                .into(),
        ],
        ..Section::default()
    };
    for (input, sensitivity) in files {
        let Sensitivity { model, settings, dense, linear_weights, rows } = sensitivity;
        let metric = match settings.metric.as_str() {
            "spearman" => "Spearman's correlation",
            "cosine" => "the mean cosine similarity to the dense model's embeddings",
            "log_likelihood" => "a token's mean log-probability",
            other => other,
        };
        let unit = if settings.metric == "log_likelihood" { "nats" } else { "no unit" };
        let title = format!("{}, {}", last(model), settings.method);
        let of_dense = dense.map_or_else(String::new, |dense| format!(", {dense:.4} when dense"));
        section.text.push(format!("{}: {title}; the drop of {metric}{of_dense}.", shown(&input.name)));
        let noise = |row: &SensitivityRow| match row.within_noise {
            Some(true) => "within noise",
            Some(false) => "beyond noise",
            None => "-",
        };
        let head = ["layer", "op", "#weights", "#share of weights, %", "#drop", "the drop is"];
        let mut table = Table::new(format!("{}: {title}", shown(&input.name)), true, &head);
        let mut vectors = distinct(rows.iter().map(|row| row.vector));
        vectors.sort_unstable();
        for layer in distinct(rows.iter().map(|row| &row.layer)) {
            let mut of_layer: Vec<_> = rows.iter().filter(|row| row.layer == *layer).collect();
            of_layer.sort_by_key(|row| row.vector);
            table.rows.extend(of_layer.into_iter().map(|row| {
                vec![
                    row.layer.clone(),
                    what("sparse24", Some(row.vector)),
                    row.weights.to_string(),
                    format!("{:.2}", 100.0 * row.weights as f64 / *linear_weights as f64),
                    format!("{:.5}", row.drop),
                    noise(row).into(),
                ]
            }));
        }
        let group = |vector: &usize| {
            let bar = |row: &SensitivityRow| Bar {
                label: row.layer.clone(),
                parts: vec![(row.drop.max(0.0), Ink::Vector(vector.max(&1).ilog2() as usize))],
                spread: None,
                text: format!("{:.4}{}", row.drop, if row.within_noise == Some(true) { " (?)" } else { "" }),
            };
            (what("sparse24", Some(*vector)), rows.iter().filter(|row| row.vector == *vector).map(bar).collect())
        };
        let bars = Bars {
            unit: format!("drop of {metric} ({unit})"),
            groups: vectors.iter().map(group).collect(),
            marks: Vec::new(),
            legend: Vec::new(),
        };
        let alt = format!("Bars of the drop of {metric} by layer and V, {title}; the numbers are in the table below");
        section.charts.push(bars.chart(&numbered("sensitivity", &section), &title, &alt)?);
        section.tables.push(table);
    }
    Ok((!section.charts.is_empty()).then_some(section))
}
