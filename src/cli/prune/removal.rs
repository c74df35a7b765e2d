//! The part of `prune` that removes channels between two layers of a model, which is smaller and dense then.
//!
//! Tensors are cut as they are stored, so that what stays keeps every bit; the model's graph says which of them have
//! the channels, and its config gets their new number. Invariant: the new folder loads by the same code as the old one.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use comfy_table::{LineStyle, Table, TableStyle};
use serde::Serialize;

use super::how::{self, Asked, Scope, Score};
use super::whole::{batching_of_images, calibration_images};
use super::{Args, NOTHING};
use crate::cli::args::ensure_usage;
use crate::cli::command::command_line;
use crate::cli::inspect::many;
use crate::cli::sensitivity::texts_of;
use crate::cli::{Outcome, model, progress, rewrite, size};
use sparse24::error::printable;
use sparse24::graph::{Graph, HiddenChannels, Removal};
use sparse24::io::{Action, Content, Layout, Provenance, Source, Stored};
use sparse24::prune::{Granularity, Importance, Units, prune_units, seed_of};
use sparse24::text::{LoadOptions, TextModel};
use sparse24::vision::ImageModel;
use sparse24::{DType, models};

/// What became of some channels.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    channels_before: usize,
    channels_after: usize,
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    command: String,
    input: String,
    output: String,
    #[serde(flatten)]
    asked: Asked,
    calibration: Option<String>,
    provenance: Provenance,
    channels: Vec<Row>,
    /// Of linear layers.
    weights_before: usize,
    weights_after: usize,
    left_out: Vec<String>,
    bytes_before: u64,
    bytes_after: u64,
    /// Wall time, from the first file read to the last one written.
    seconds: f64,
}

pub(super) fn prune(args: &Args, how: how::Units, score: Score) -> Result<Outcome> {
    let (input, output) = args.paths.get()?;
    args.json.file()?;
    ensure_usage!(
        input.is_dir(),
        "{}: a model's folder is needed, whose config says which channels belong together",
        input.display()
    );
    let started = Instant::now();
    let graph = models::load(input.join("config.json"))?;
    let source = Source::open(input)?;
    let mut new = rewrite::create(input, &source, output, false)?;
    let hidden: Vec<_> = graph.hidden().iter().filter(|hidden| args.selects(&hidden.name, true)).collect();
    ensure!(!hidden.is_empty(), "{}: {NOTHING}", input.display());

    let (scores, calibrated_on) = units(args, score, &graph, &source, &hidden)?;
    let masks = match how.scope {
        Scope::Global => prune_units(&scores, how.amount)?,
        Scope::Local => {
            let mask = |(units, of): (&Units<'_>, &&HiddenChannels)| {
                units.mask(how.amount).map_err(|e| sparse24::Error::invalid(format!("{}: {e}", of.name)))
            };
            scores.iter().zip(&hidden).map(mask).collect::<sparse24::Result<_>>()?
        }
    };
    let mut kept = BTreeMap::new();
    for (of, mask) in hidden.iter().zip(&masks) {
        let left: Vec<usize> = (0..of.count).filter(|&channel| mask.get(channel, 0)).collect();
        ensure!(!left.is_empty(), "{}: all of its {} channels would go, and a layer needs some", of.name, of.count);
        kept.insert(of.name.clone(), left);
    }
    let removal = Removal::new(&graph, &kept)?;
    for (way, number) in removal.config() {
        new.set_config(way, *number);
    }
    let mut actions = Vec::new();
    for item in source.items() {
        let action = match removal.shape(&source, item)? {
            Some(shape) => Action::Reshape(shape),
            None if item.stored == Stored::SparseBitmask => Action::Dense,
            None => Action::Copy,
        };
        actions.push((item, action));
    }
    let mut provenance = Provenance::of(&source.metadata());
    let importance = match score {
        Score::Weights(_, importance) => Some(importance),
        Score::Apoz | Score::NormScale => None,
    };
    let asked = Asked::new(args, how, importance);
    provenance.note("pruned", &asked.noted());
    if let Some(texts) = &calibrated_on {
        provenance.note("calibrated_on", texts);
    }
    let metadata: Vec<_> = provenance.metadata().collect();
    let bar = progress(actions.iter().filter(|(_, action)| !matches!(action, Action::Copy)).count());
    let written = new.write(&source, Layout::Dense, &actions, &metadata, |item, _| {
        bar.set_message(printable(&item.name).into_owned());
        bar.inc(1);
        removal.content(&source, item).map(Content::Dense)
    })?;
    bar.finish_and_clear();
    rewrite::say_lost(&written);
    let row = |of: &&HiddenChannels| Row {
        name: of.name.clone(),
        channels_before: of.count,
        channels_after: kept.get(&of.name).map_or(of.count, Vec::len),
    };
    let report = Report {
        schema: "sparse24-removal/1",
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(),
        input: input.display().to_string(),
        output: output.display().to_string(),
        asked,
        calibration: args.calibration.as_ref().map(|path| path.display().to_string()),
        provenance,
        channels: hidden.iter().map(row).collect(),
        weights_before: graph.linear_weights(),
        weights_after: models::load(output.join("config.json"))?.linear_weights(),
        left_out: written.left_out.iter().map(|left| left.path.display().to_string()).collect(),
        bytes_before: rewrite::bytes_of(&source)?,
        bytes_after: written.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    args.json.emit(&report.text(), &report)?;
    Ok(Outcome::Fine)
}

/// The channels with their scores, as rows, and what they were calibrated on.
fn units(
    args: &Args,
    score: Score,
    graph: &Graph,
    source: &Source,
    hidden: &[&HiddenChannels],
) -> Result<(Vec<Units<'static>>, Option<String>)> {
    let given = |of: &HiddenChannels, scores| Units::given(of.count, 1, Granularity::Row, scores, None);
    let each = |units: &dyn Fn(&HiddenChannels) -> sparse24::Result<Units<'static>>| {
        hidden.iter().map(|of| units(of)).collect::<sparse24::Result<Vec<_>>>()
    };
    Ok(match score {
        Score::Weights(of_layer, importance) => {
            let scored = each(&|of| {
                let importance = match importance {
                    Importance::Random { seed } => Importance::Random { seed: seed_of(&of.name, seed) },
                    importance => importance,
                };
                Units::new(&of.weights(graph, source, of_layer)?, Granularity::Row, importance, None)
            })?;
            (scored, None)
        }
        Score::NormScale => (each(&|of| given(of, of.norm_scale(graph, source)?))?, None),
        Score::Apoz => {
            let (shares, described) = active_shares(args, graph)?;
            let scored = each(&|of| match shares.get(&of.name) {
                Some(shares) => given(of, shares.clone()),
                None => Err(sparse24::Error::invalid(format!(
                    "{}: its channels are products, which have no zeros to be counted",
                    of.name
                ))),
            })?;
            (scored, Some(described))
        }
    })
}

/// The shares of activations above 0 on the texts or pictures of --calibration, and what these are.
fn active_shares(args: &Args, graph: &Graph) -> Result<(BTreeMap<String, Vec<f32>>, String)> {
    let input = args.input();
    let path = args.calibration.as_deref().context("--calibration is needed")?;
    let device = args.running.device()?;
    if let Some(size) = graph.image() {
        let ImageModel { checkpoint, .. } = ImageModel::load(input, None, DType::F32)?;
        let (images, described) = calibration_images(path, size)?;
        return Ok((checkpoint.active_shares(&device, &images, batching_of_images(args))?, described));
    }
    let files = model::files(input.to_str().with_context(|| format!("{} is no UTF-8", input.display()))?)?;
    let TextModel { tokenizer, checkpoint, .. } = TextModel::load_any(&files, LoadOptions::default())?;
    let texts = texts_of("--calibration", path, &tokenizer)?;
    let described = texts.described(path);
    Ok((checkpoint.active_shares(&device, &texts.ids, args.running.batching())?, described))
}

impl Report {
    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
        table.set_header(["channels before", "after", "made by"]);
        for row in &self.channels {
            table.add_row([
                row.channels_before.to_string(),
                row.channels_after.to_string(),
                printable(&row.name).into_owned(),
            ]);
        }
        format!(
            "{table}\n{}: channels of {} removed by {}: {:.1} % of linear weights are gone; {} before, {} after\n",
            printable(&self.output),
            many(self.channels.len(), "layer", "layers"),
            self.asked,
            100.0 * (1.0 - self.weights_after as f64 / self.weights_before.max(1) as f64),
            size(self.bytes_before),
            size(self.bytes_after),
        )
    }
}
