//! The part of `prune` that leaves zeros in any pattern: single weights, rows, columns or blocks, of each matrix or of
//! all together.
//!
//! Matrices are read twice, one at a time: to choose, and to be written. In between there is a bit for each weight and,
//! where all are pruned together, the score of each unit. Invariant: a weight that is zero stays zero, and amounts are
//! of what is not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Result, ensure};
use comfy_table::{LineStyle, Table, TableStyle};
use regex::Regex;
use serde::Serialize;

use super::how::{self, Asked, Scope, Unit};
use super::{Args, NOTHING, SPARED, is_float};
use crate::cli::args::ensure_usage;
use crate::cli::command::command_line;
use crate::cli::inspect::many;
use crate::cli::{Outcome, progress, rewrite, size};
use sparse24::error::printable;
use sparse24::io::{Action, Content, Item, Layout, Provenance, Source, Stored, config_of, in_by_out, transpose};
use sparse24::prune::{Granularity, Importance, Units, kept_magnitude, prune_units, seed_of};
use sparse24::{DType, Elements, Mask, Matrix};

/// What became of a matrix.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    m: usize,
    k: usize,
    /// Whether it is stored as k x m.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    in_by_out: bool,
    /// Weights that are zero now.
    zeros: u64,
    /// Of them, those that were not before.
    pruned: u64,
    /// Share of the sum of |w| that is left.
    kept_magnitude: f64,
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
    provenance: Provenance,
    layers: Vec<Row>,
    /// Of the weights of these matrices.
    zeros_share: f64,
    left_out: Vec<String>,
    bytes_before: u64,
    bytes_after: u64,
    /// Wall time, from the first file read to the last one written.
    seconds: f64,
}

/// A tensor as the matrix that is pruned, `[out, in]` or, of a convolution, `[out, in · taps]`.
struct Weights {
    w: Matrix,
    granularity: Granularity,
    in_by_out: bool,
}

impl Weights {
    fn read(source: &Source, item: &Item, unit: Unit, in_by_out: bool) -> sparse24::Result<Self> {
        let at = |e: sparse24::Error| e.in_tensor(source.path_of(item), &item.name);
        let w = match item.shape[..] {
            [_, _] if in_by_out => {
                let (m, k, bytes) = source.transposed(item)?;
                Matrix::new(m, k, Elements::from_bytes(DType::try_from(item.dtype)?, &bytes)?)
            }
            [m, _, _, _] => {
                let elements = Elements::from_bytes(DType::try_from(item.dtype)?, &source.dense(item)?)?;
                Matrix::new(m, elements.len() / m.max(1), elements)
            }
            _ => source.matrix(item),
        };
        let w = w.map_err(at)?;
        let granularity = match (unit, &item.shape[..]) {
            (Unit::Row, _) => Granularity::Row,
            // A kernel's channels lie one after the other here, each with all of its taps.
            (Unit::Column, [m, _, lines, columns]) => Granularity::Block { rows: *m, cols: lines * columns },
            (Unit::Column, _) => Granularity::Column { taps: 1 },
            (Unit::Block { rows, cols }, _) => Granularity::Block { rows, cols },
            // The others are none of masks.
            (Unit::Weight | Unit::TwoFour(_) | Unit::Channel | Unit::Filter, _) => Granularity::Weight,
        };
        Ok(Self { w, granularity, in_by_out })
    }

    fn units<'a>(&self, item: &Item, importance: Importance, before: &'a Mask) -> sparse24::Result<Units<'a>> {
        let importance = match importance {
            Importance::Random { seed } => Importance::Random { seed: seed_of(&item.name, seed) },
            importance => importance,
        };
        Units::new(&self.w, self.granularity, importance, Some(before))
    }

    /// The bytes of the tensor with what the mask keeps.
    fn masked(&self, mask: &Mask) -> sparse24::Result<Vec<u8>> {
        let bytes = mask.apply(&self.w)?.elements().to_le_bytes();
        let (m, k, element) = (self.w.rows(), self.w.cols(), self.w.dtype().bytes());
        Ok(if self.in_by_out { transpose(m, k, element, &bytes) } else { bytes })
    }
}

/// Whether a tensor is a matrix, or a convolution of more than one channel, that can be pruned.
fn takes(item: &Item) -> bool {
    let shape = match item.shape[..] {
        [m, k] => m > 0 && k > 0,
        [m, k, lines, columns] => item.stored == Stored::Dense && m > 0 && k > 1 && lines > 0 && columns > 0,
        _ => false,
    };
    shape && is_float(item)
}

pub(super) fn prune(args: &Args, how: how::Units, importance: Importance) -> Result<Outcome> {
    let (input, output) = args.paths.get()?;
    args.json.file()?;
    let same = input.canonicalize().ok().zip(output.canonicalize().ok()).is_some_and(|(from, to)| from == to);
    ensure_usage!(!same, "{} is to be read and written: choose another name", input.display());
    let started = Instant::now();
    let source = Source::open(input)?;
    let model = rewrite::create(input, &source, output, false)?;
    let transposed = in_by_out(&source, config_of(input)?.as_ref());
    let spared = Regex::new(SPARED)?;
    let selected = |item: &&Item| takes(item) && args.selects(&item.name, !spared.is_match(&item.name));
    let items: Vec<&Item> = source.items().filter(selected).collect();
    ensure!(!items.is_empty(), "{}: {NOTHING}", input.display());

    let masks = choose(&source, &items, (how, importance), &transposed)?;
    let actions: Vec<_> = source
        .items()
        .map(|item| {
            // Decoded, as few programs read the second form; a folder's config names one form for all that is
            // compressed.
            let written = masks.contains_key(&*item.name) || item.stored == Stored::SparseBitmask;
            (item, if written { Action::Dense } else { Action::Copy })
        })
        .collect();
    let mut provenance = Provenance::of(&source.metadata());
    let asked = Asked::new(args, how, Some(importance));
    provenance.note("pruned", &asked.noted());
    let metadata: Vec<_> = provenance.metadata().collect();
    let bar = progress(items.len());
    let mut layers = Vec::new();
    let written = model.write(&source, Layout::Dense, &actions, &metadata, |item, _| {
        let Some(mask) = masks.get(&*item.name) else { return source.dense(item).map(Content::Dense) };
        bar.set_message(printable(&item.name).into_owned());
        bar.inc(1);
        let in_by_out = transposed.contains(&item.name);
        let weights = Weights::read(&source, item, how.unit, in_by_out)?;
        let (m, k) = (weights.w.rows(), weights.w.cols());
        let (before, after) = (Mask::of_nonzeros(&weights.w)?.count(), mask.count());
        layers.push(Row {
            name: item.name.clone(),
            m,
            k,
            in_by_out,
            zeros: (m * k - after) as u64,
            pruned: (before - after) as u64,
            kept_magnitude: kept_magnitude(&weights.w, mask)?,
        });
        Ok(Content::Dense(weights.masked(mask)?))
    })?;
    bar.finish_and_clear();
    rewrite::say_lost(&written);
    let sum = |of: fn(&Row) -> f64| layers.iter().map(of).sum::<f64>();
    let report = Report {
        schema: "sparse24-masks/1",
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(),
        input: input.display().to_string(),
        output: output.display().to_string(),
        asked,
        provenance,
        zeros_share: sum(|row| row.zeros as f64) / sum(|row| row.m as f64 * row.k as f64),
        layers,
        left_out: written.left_out.iter().map(|left| left.path.display().to_string()).collect(),
        bytes_before: rewrite::bytes_of(&source)?,
        bytes_after: written.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    args.json.emit(&report.text(), &report)?;
    Ok(Outcome::Fine)
}

/// What stays of each matrix, by its name.
fn choose<'a>(
    source: &Source,
    items: &[&'a Item],
    (how, importance): (how::Units, Importance),
    transposed: &BTreeSet<String>,
) -> Result<BTreeMap<&'a str, Mask>> {
    let bar = progress(items.len());
    let mut masks = BTreeMap::new();
    let read = |item: &Item| {
        bar.set_message(printable(&item.name).into_owned());
        bar.inc(1);
        Weights::read(source, item, how.unit, transposed.contains(&item.name))
    };
    let at = |item: &Item, e: sparse24::Error| e.in_tensor(source.path_of(item), &item.name);
    if how.scope == Scope::Local {
        for &item in items {
            let weights = read(item)?;
            let before = Mask::of_nonzeros(&weights.w)?;
            let mask = weights.units(item, importance, &before).and_then(|units| units.mask(how.amount));
            masks.insert(&*item.name, mask.map_err(|e| at(item, e))?);
        }
    } else {
        // A bit for each weight, which the scores of units refer to.
        let before: Vec<_> =
            items.iter().map(|item| Mask::of_nonzeros(&read(item)?.w)).collect::<sparse24::Result<_>>()?;
        bar.set_position(0);
        let units: Vec<_> = items
            .iter()
            .zip(&before)
            .map(|(item, before)| read(item)?.units(item, importance, before).map_err(|e| at(item, e)))
            .collect::<sparse24::Result<_>>()?;
        let chosen = prune_units(&units, how.amount)?;
        masks.extend(items.iter().map(|item| &*item.name).zip(chosen));
    }
    bar.finish_and_clear();
    Ok(masks)
}

impl Report {
    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
        table.set_header(["m x k", "zeros", "|w| kept", "layer"]);
        // Not a number where weights are infinite.
        let percent = |share: f64| if share.is_finite() { format!("{:.2} %", 100.0 * share) } else { "—".to_owned() };
        for row in &self.layers {
            table.add_row([
                format!("{}x{}", row.m, row.k),
                percent(row.zeros as f64 / (row.m as f64 * row.k as f64)),
                percent(row.kept_magnitude),
                printable(&row.name).into_owned() + if row.in_by_out { " (in x out)" } else { "" },
            ]);
        }
        format!(
            "{table}\n{}: {} pruned by {}: {} of their weights are zero; {} before, {} after\n",
            printable(&self.output),
            many(self.layers.len(), "matrix", "matrices"),
            self.asked,
            percent(self.zeros_share),
            size(self.bytes_before),
            size(self.bytes_after),
        )
    }
}
