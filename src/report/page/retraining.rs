//! What retraining brought back: the loss on texts that were held out.

use super::entries::last;
use super::paths::shown;
use super::{PageInput, Section, Table};
use crate::error::Result;
use crate::report::chart::{Axis, Ink, Plot, Series};
use crate::report::file::{File, History, Retraining};

/// A run, from either kind of file: the model that it made, from which, and what the file says.
struct Run<'a> {
    output: &'a str,
    input: &'a str,
    provenance: &'a History,
    run: &'a Retraining,
    command: &'a str,
}

impl<'a> Run<'a> {
    fn of(input: &'a PageInput) -> Option<Self> {
        let command = input.file.command();
        match &input.file {
            File::Train(train) => {
                let (output, input) = (train.output.as_str(), train.input.as_str());
                Some(Self { output, input, provenance: &train.provenance, run: &train.run, command })
            }
            File::Prune(prune) => {
                let (output, input) = (prune.output.as_deref().unwrap_or("-"), prune.input.as_str());
                Some(Self { output, input, provenance: &prune.provenance, run: prune.retrained.as_ref()?, command })
            }
            _ => None,
        }
    }
}

pub(super) fn losses(inputs: &[PageInput]) -> Result<Option<Section>> {
    let runs: Vec<_> = inputs.iter().filter_map(Run::of).collect();
    if runs.is_empty() {
        return Ok(None);
    }
    let head = [
        "model",
        "from",
        "pruned by",
        "retrained on",
        "objective",
        "#texts",
        "#steps",
        "#minutes",
        "#loss before",
        "#lowest loss",
        "#at step",
        "command",
    ];
    let mut table = Table::new("Runs of retraining", false, &head);
    let mut series = Vec::new();
    for (at, Run { output, input, provenance, run, command }) in runs.iter().enumerate() {
        let entry = |what: &Option<String>| what.as_deref().map_or_else(|| "-".to_owned(), shown);
        table.rows.push(vec![
            shown(output),
            shown(input),
            entry(&provenance.pruned),
            entry(&provenance.retrained_on),
            run.objective.clone(),
            run.texts.to_string(),
            run.steps.len().to_string(),
            format!("{:.1}", run.seconds / 60.0),
            run.held_out.first().map_or_else(|| "-".to_owned(), |(_, loss)| format!("{loss:.4}")),
            format!("{:.4}", run.best_loss),
            run.best_step.to_string(),
            shown(command),
        ]);
        series.push(Series {
            ink: Ink::Series(at),
            name: last(output).to_owned(),
            points: run.held_out.iter().map(|&(step, loss)| (step as f64, loss)).collect(),
            joined: true,
        });
    }
    let plot = Plot {
        x: Axis { name: "steps".into(), log: false },
        y: Axis { name: "loss on held-out texts (no unit)".into(), log: false },
        roofs: Vec::new(),
        series,
    };
    let alt = "Lines of the loss on held-out texts against steps; first and lowest loss are in the table below";
    Ok(Some(Section {
        id: "retraining".into(),
        title: "What retraining brought back".into(),
        text: vec![
            "The loss is how far states and embeddings are from the dense model's, on texts that were not trained on; 0 \
             is the dense model. Runs of other texts, teachers or objectives have losses of their own, which do not \
             compare. The weights with the lowest loss were written."
                .into(),
        ],
        charts: vec![plot.chart("retraining", "Loss on held-out texts by step", alt)?],
        tables: vec![table],
    }))
}
