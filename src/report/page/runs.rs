//! Runs of one device beside each other: before and after a change, or from one day to the next.

use std::cmp::Ordering;

use super::entries::{Machine, batches, model_what, what};
use super::{PageInput, Section, Table, compared, distinct, middle, number, numbered, plural, times};
use crate::error::Result;
use crate::measure::Summary;
use crate::report::chart::{Bar, Bars, Ink};
use crate::report::file::{File, Origin, RowTimes};

/// A row of a product or of a whole model.
struct Measured<'a> {
    machine: Machine,
    origin: &'a Origin,
    /// What it is of, such as a shape and its type.
    of: String,
    what: String,
    ink: Ink,
    clock: Option<&'a str>,
    times: RowTimes,
}

impl Measured<'_> {
    fn median(&self) -> f64 {
        self.times.median.unwrap_or(f64::INFINITY)
    }
}

/// The rows of an input, in the order of the file.
fn measured<'a>(input: &'a PageInput, run: Option<&str>) -> Vec<Measured<'a>> {
    match &input.file {
        File::Bench(bench) => {
            let machine = Machine::new(input, &bench.environment, run);
            let row = |row: &'a crate::report::file::Row| Measured {
                machine: machine.clone(),
                origin: &bench.environment,
                of: [&row.name, &row.shape(), &row.dtype].map(String::as_str).join(" ").trim().to_owned(),
                what: match machine.own || row.op == "dense" {
                    true => what(&row.op, row.vector),
                    false => format!("{}, {}", what(&row.op, row.vector), row.kernel),
                },
                ink: Ink::of(&row.op, row.vector),
                clock: row.clock.as_deref(),
                times: row.times,
            };
            bench.rows.iter().map(row).collect()
        }
        File::Model(bench) => {
            let machine = Machine::new(input, &bench.environment, run);
            let row = |row: &'a crate::report::file::ModelRow| Measured {
                machine: machine.clone(),
                origin: &bench.environment,
                of: batches(bench),
                what: model_what(&machine, row),
                ink: Ink::of(&row.op, row.vector),
                clock: None,
                times: row.times,
            };
            bench.rows.iter().map(row).collect()
        }
        File::Eval(_) | File::Prune(_) | File::Train(_) | File::Sensitivity(_) | File::Compile(_) => Vec::new(),
    }
}

/// What changed between runs of one program on one device: a section, and a sentence for each pair of runs. The first
/// run that was given is what the others are compared with.
pub(super) fn changes(inputs: &[PageInput], runs: &[Option<String>]) -> Result<(Option<Section>, Vec<String>)> {
    let rows: Vec<_> = inputs.iter().zip(runs).flat_map(|(input, run)| measured(input, run.as_deref())).collect();
    let device = |m: &Measured<'_>| (m.origin.device.clone(), m.origin.threads, m.origin.program.clone());
    let mut section = Section {
        id: "runs".into(),
        title: "Runs of one device".into(),
        text: vec![
            "The same rows in several runs. 1x is the run that was given first; above it a row has become faster. \
             Where the middle halves of the samples overlap, nothing is said to have changed."
                .into(),
        ],
        ..Section::default()
    };
    let mut sentences = Vec::new();
    let head = ["of", "op", "run", "#ms", "#middle half, ms", "#vs first", "than first"];
    for key in distinct(rows.iter().map(device)) {
        let here: Vec<_> = rows.iter().filter(|m| device(m) == key && m.times.median.is_some()).collect();
        let places = distinct(here.iter().map(|m| &m.machine.place));
        let Some((base, others)) = places.split_first().filter(|(_, others)| !others.is_empty()) else { continue };
        // Of a row that a run holds twice, as dense ones are, the fastest counts.
        let in_run = |place: &str, of: &str, what: &str| {
            let same = here.iter().filter(|m| m.machine.place == place && m.of == of && m.what == what);
            same.min_by(|a, b| a.median().total_cmp(&b.median()))
        };
        let mut table = Table::new(format!("{} of {base}", key.2), true, &head);
        let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
        let mut tallies: Vec<Tally> = others.iter().map(|_| Tally::default()).collect();
        for (of, what) in distinct(here.iter().map(|m| (&m.of, &m.what))) {
            let Some(first) = in_run(base, of, what) else { continue };
            let row = |m: &Measured<'_>, ratio: String, verdict: &str| {
                let place = m.machine.place.clone();
                vec![of.clone(), what.clone(), place, number(m.times.median, 4), middle(m.times), ratio, verdict.into()]
            };
            let mut bars = Vec::new();
            let mut later = Vec::new();
            for (place, tally) in others.iter().zip(&mut tallies) {
                let Some(own) = in_run(place, of, what) else { continue };
                let ratio = first.median() / own.median();
                let same_clock = own.clock == first.clock;
                let order = own.times.against(first.times).filter(|_| same_clock);
                tally.add(ratio, order, &format!("{of}, {what}"));
                let verdict = if same_clock { compared(order) } else { "other clock" };
                later.push(row(own, times(ratio), verdict));
                bars.push(Bar {
                    label: if others.len() > 1 { format!("{what}, {place}") } else { what.clone() },
                    parts: vec![(ratio, own.ink)],
                    spread: own.times.middle().map(|(low, high)| (first.median() / high, first.median() / low)),
                    text: format!("{} {verdict}", times(ratio)),
                });
            }
            if !later.is_empty() {
                table.rows.push(row(first, "1x".into(), "-"));
                table.rows.extend(later);
            }
            match groups.iter_mut().find(|(name, _)| name == of) {
                Some((_, known)) => known.extend(bars),
                None if bars.is_empty() => {}
                None => groups.push((of.clone(), bars)),
            }
        }
        if groups.is_empty() {
            continue;
        }
        let tallied = others.iter().zip(&mut tallies);
        sentences.extend(tallied.filter_map(|(place, tally)| tally.sentence(place, base)));
        let bars = Bars {
            unit: "times as fast as the first run".into(),
            groups,
            marks: vec![(1.0, format!("1x: {base}"))],
            legend: Vec::new(),
        };
        let title = format!("{} against {base}", others.iter().map(|p| p.as_str()).collect::<Vec<_>>().join(", "));
        let alt = format!("Bars of how many times as fast each row has become, {title}; the numbers are in the table");
        section.charts.push(bars.chart(&numbered("runs", &section), &title, &alt)?);
        section.tables.push(table);
    }
    Ok(((!section.charts.is_empty()).then_some(section), sentences))
}

/// What became of the rows from one run to another.
#[derive(Default)]
struct Tally {
    /// Ratios beyond the noise, and what they are of.
    faster: Vec<(f64, String)>,
    slower: Vec<(f64, String)>,
    same: usize,
    unknown: usize,
}

impl Tally {
    fn add(&mut self, ratio: f64, order: Option<Ordering>, name: &str) {
        match order {
            Some(Ordering::Less) => self.faster.push((ratio, name.to_owned())),
            Some(Ordering::Greater) => self.slower.push((ratio, name.to_owned())),
            Some(Ordering::Equal) => self.same += 1,
            None => self.unknown += 1,
        }
    }

    fn sentence(&mut self, place: &str, base: &str) -> Option<String> {
        let rows = self.faster.len() + self.slower.len() + self.same + self.unknown;
        let extreme = |rows: &[(f64, String)], most: fn(f64, f64) -> bool| {
            let best = rows.iter().reduce(|a, b| if most(b.0, a.0) { b } else { a })?;
            let mut ratios: Vec<_> = rows.iter().map(|r| r.0).collect();
            let median = Summary::of(&mut ratios)?.median;
            Some(format!(" (median {}, the most {} at {})", times(median), times(best.0), best.1))
        };
        let mut clauses = Vec::new();
        for (rows, what, most) in
            [(&self.faster, "faster", (|a, b| a > b) as fn(f64, f64) -> bool), (&self.slower, "slower", |a, b| a < b)]
        {
            let figures = extreme(rows, most).unwrap_or_default();
            clauses.push(format!("{} {what} beyond the noise{figures}", rows.len()));
        }
        clauses.push(format!("{} within it", self.same));
        if self.unknown > 0 {
            clauses.push(format!("{} not judged, for want of a spread or of one clock", self.unknown));
        }
        (rows > 0).then(|| format!("{place} against {base}, of {}: {}.", plural(rows, "row"), clauses.join("; ")))
    }
}
