//! What was measured where: rows and passes with their machines, and which of them may stand on one page.
//!
//! Invariant of what passes the checks: no two figures of one thing, and one name is one device with one number of
//! threads, so that rows of one place are comparable in absolute terms.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::Input;
use crate::error::{Error, Result};
use crate::report::file::{Bench, File, ModelRow, Origin, Row, Times};

/// What ran where: one device, with one number of threads, driven by one version of one program.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Machine {
    /// The hardware: rows of several programs on it are comparable in absolute terms.
    pub(super) place: String,
    pub(super) program: String,
    /// `cpu`, `software`, or another kind of adapter.
    pub(super) kind: String,
    pub(super) own: bool,
}

impl Machine {
    pub(super) fn new(input: &Input, origin: &Origin) -> Self {
        let threads = origin.threads.map(|t| format!(", {t} {}", if t == 1 { "thread" } else { "threads" }));
        let place = match &input.machine {
            Some(name) => name.clone(),
            None => origin.device.clone() + &threads.unwrap_or_default(),
        };
        Self {
            place,
            program: format!("{} {}", origin.program, origin.version),
            kind: origin.kind.clone(),
            own: origin.program == "sparse24",
        }
    }
}

/// A row with where it comes from.
pub(super) struct Entry<'a> {
    pub(super) machine: Machine,
    pub(super) file: usize,
    pub(super) at: usize,
    pub(super) row: &'a Row,
    /// The dense row of its file that its ratio is against.
    pub(super) dense: Option<&'a Row>,
}

impl Entry<'_> {
    pub(super) fn ratio(&self) -> Option<f64> {
        self.row.speedup_vs_dense.filter(|_| self.row.op != "dense")
    }

    /// Whether it takes less or more time than dense, or neither beyond the spread; `None` if no spread is known.
    pub(super) fn against_dense(&self) -> Option<Ordering> {
        Times::of(self.row).against(Times::of(self.dense?))
    }

    /// The ratio at either end of the middle half of the samples, against the dense median.
    pub(super) fn spread(&self) -> Option<(f64, f64)> {
        let dense = self.dense?.median_ms?;
        Times::of(self.row).middle().map(|(low, high)| (dense / high, dense / low))
    }

    /// The operation; other programs may have several kernels for one.
    pub(super) fn what(&self) -> String {
        let what = what(&self.row.op, self.row.vector);
        if self.machine.own || self.row.op == "dense" { what } else { format!("{what}, {}", self.row.kernel) }
    }
}

pub(super) fn what(op: &str, vector: Option<usize>) -> String {
    match (op, vector) {
        ("sparse24", Some(v)) => format!("2:4 V={v}"),
        ("auto", Some(v)) => format!("auto V={v}"),
        ("masked24", _) => "masked by codes".to_owned(),
        (op, _) => op.to_owned(),
    }
}

pub(super) fn entries(inputs: &[Input]) -> Vec<Entry<'_>> {
    let mut entries = Vec::new();
    for (file, input) in inputs.iter().enumerate() {
        let File::Bench(bench) = &input.file else { continue };
        let machine = Machine::new(input, &bench.environment);
        entries.extend(bench.rows.iter().enumerate().map(|(at, row)| Entry {
            machine: machine.clone(),
            file,
            at,
            row,
            dense: dense_of(bench, row),
        }));
    }
    entries
}

/// The dense row that a row's ratio is against: of several of one shape, the one whose median says so.
fn dense_of<'a>(bench: &'a Bench, row: &Row) -> Option<&'a Row> {
    let (own, ratio) = row.median_ms.zip(row.speedup_vs_dense)?;
    let miss = |d: &Row| d.median_ms.map_or(f64::INFINITY, |dense| (dense / own / ratio - 1.0).abs());
    let of = bench.rows.iter().filter(|d| d.op == "dense" && d.layer() == row.layer());
    of.min_by(|a, b| miss(a).total_cmp(&miss(b)))
}

/// Rows under one name are compared in absolute terms: they must come from one device with one number of threads.
pub(super) fn one_device_a_name(inputs: &[Input]) -> Result<()> {
    let mut known: BTreeMap<&str, (&Input, &Origin)> = BTreeMap::new();
    for input in inputs {
        let (Some(machine), Some(origin)) = (&input.machine, input.file.origin()) else { continue };
        let (first, of) = *known.entry(machine).or_insert((input, origin));
        if (&of.device, of.threads) != (&origin.device, origin.threads) {
            let name = |origin: &Origin| match origin.threads {
                Some(threads) => format!("{} with {threads} threads", origin.device),
                None => origin.device.clone(),
            };
            let (of, own) = (name(of), name(origin));
            return Err(Error::Invalid(format!(
                "{machine} is {of} in {} and {own} in {}: give them two names",
                first.name, input.name
            )));
        }
    }
    Ok(())
}

/// The same row twice makes two figures of one thing. Dense rows stand in every file, as what the others are against:
/// measured again they may be there again.
pub(super) fn no_duplicates(inputs: &[Input], entries: &[Entry<'_>]) -> Result<()> {
    let mut seen: BTreeMap<_, Vec<&Entry<'_>>> = BTreeMap::new();
    for entry in entries {
        let Entry { machine: Machine { place, program, .. }, row, .. } = entry;
        let key = (place, program, &row.name, &row.op, row.layer(), row.vector, &row.kernel);
        let known = seen.entry(key).or_default();
        let same =
            |of: &&&Entry<'_>| of.file != entry.file && (row.op != "dense" || Times::of(of.row) == Times::of(row));
        if let Some(first) = known.iter().find(same) {
            return Err(Error::Invalid(format!(
                "{} row {} and {} row {} are both {} of {} {} by {program} on {place}: leave one of them out, or name the \
                 machines, as in before={}",
                inputs[first.file].name,
                first.at + 1,
                inputs[entry.file].name,
                entry.at + 1,
                entry.what(),
                row.shape(),
                row.dtype,
                inputs[first.file].name,
            )));
        }
        known.push(entry);
    }
    Ok(())
}

/// The same pass of the same model twice would be two bars of one name.
pub(super) fn no_duplicate_models(inputs: &[Input]) -> Result<()> {
    let mut seen: Vec<(String, &str, usize)> = Vec::new();
    for input in inputs {
        let File::Model(bench) = &input.file else { continue };
        let machine = Machine::new(input, &bench.environment);
        for (at, row) in bench.rows.iter().enumerate() {
            let model = format!("{} {}x{}", last(&bench.model), bench.batch, bench.seq);
            let key = format!("{} of {model} by {} on {}", model_what(&machine, row), machine.program, machine.place);
            if let Some((_, name, first)) = seen.iter().find(|(k, name, _)| *k == key && *name != input.name) {
                return Err(Error::Invalid(format!(
                    "{name} row {} and {} row {} are both {key}: leave one of them out, or name the machines",
                    first + 1,
                    input.name,
                    at + 1
                )));
            }
            seen.push((key, &input.name, at));
        }
    }
    Ok(())
}

pub(super) fn failures(inputs: &[Input]) -> Vec<String> {
    let mut failures = Vec::new();
    for input in inputs {
        let mut say = |at: usize, what: String, failure: &Option<String>| {
            let why = failure.as_deref().unwrap_or("no reason given");
            failures.push(format!("{} row {}, {what}: {why}", input.name, at + 1));
        };
        match &input.file {
            File::Bench(bench) => {
                for (at, row) in bench.rows.iter().enumerate().filter(|(_, r)| !r.verified) {
                    say(at, format!("{} of {}", what(&row.op, row.vector), row.shape()), &row.failure);
                }
            }
            File::Model(model) => {
                for (at, row) in model.rows.iter().enumerate().filter(|(_, r)| !r.verified) {
                    say(at, what(&row.op, row.vector), &row.failure);
                }
            }
            File::Eval(_) | File::Prune(_) => {}
        }
    }
    failures
}

/// The last part of a path.
pub(super) fn last(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

pub(super) fn model_what(machine: &Machine, row: &ModelRow) -> String {
    let own = format!("{} {}", what(&row.op, row.vector), row.dtype);
    if machine.own { own } else { format!("{}, {own}, {}", machine.program, row.kernels.join(" ")) }
}
