//! What was measured where: rows and passes with their machines and runs, and which of them may stand on one page.
//!
//! Several runs of one program on one machine are told apart where they hold the same row: by the names that they were
//! given, else by what first differs between them, such as the commit or the date. Invariant of what passes the checks:
//! no two figures of one thing, and one name is one device with one number of threads, so that rows of one place are
//! comparable in absolute terms.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::paths::shown;
use super::{PageInput, plural};
use crate::error::{Error, Result};
use crate::report::file::{Bench, File, ModelBench, ModelRow, Origin, Row, RowTimes};

/// What ran where: one run, or several that share no row, of one version of one program on one device with one number
/// of threads.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Machine {
    /// The device and its threads, or what they are called: rows of several programs on it are comparable in absolute
    /// terms.
    pub(super) hardware: String,
    /// What tells runs of one program on it apart, where they hold the same rows.
    pub(super) run: Option<String>,
    /// Both.
    pub(super) place: String,
    pub(super) program: String,
    /// `cpu`, `software`, or another kind of adapter.
    pub(super) kind: String,
    pub(super) own: bool,
}

impl Machine {
    pub(super) fn new(input: &PageInput, origin: &Origin, run: Option<&str>) -> Self {
        let hardware = hardware(input, origin);
        Self {
            place: run.map_or_else(|| hardware.clone(), |run| format!("{hardware}, {run}")),
            hardware,
            run: run.map(str::to_owned),
            program: format!("{} {}", origin.program, origin.version),
            kind: origin.kind.clone(),
            own: origin.program == "sparse24",
        }
    }

    /// The program and its run.
    pub(super) fn program_run(&self) -> String {
        self.run.as_ref().map_or_else(|| self.program.clone(), |run| format!("{}, {run}", self.program))
    }
}

fn hardware(input: &PageInput, origin: &Origin) -> String {
    let threads = origin.threads.map(|t| format!(", {}", plural(t, "thread")));
    match &input.machine {
        Some(name) => name.clone(),
        None => origin.device.clone() + &threads.unwrap_or_default(),
    }
}

/// What can tell two runs apart, the most telling first; the names of files come after all of them.
const DIFFERENCES: [fn(&Origin) -> Option<String>; 7] = [
    |origin| Some(format!("version {}", origin.version)),
    |origin| origin.commit.as_ref().map(|commit| format!("commit {commit}")),
    |origin| origin.shader_checks.as_ref().map(|checks| format!("{checks} shaders")),
    |origin| origin.simd.clone(),
    |origin| origin.driver.clone(),
    |origin| origin.tuning.as_ref().map(|tuning| format!("tuning {tuning}")),
    |origin| Some(origin.date.clone()),
];

/// A row of a file, of a product or of a whole model, as it counts when runs are told apart.
struct Holding {
    file: usize,
    at: usize,
    key: String,
    dense: bool,
    times: RowTimes,
}

/// What tells the run of each file apart from others of its program and machine, where that is needed. An error where
/// nothing does: the same rows, given twice.
pub(super) fn runs(inputs: &[PageInput]) -> Result<Vec<Option<String>>> {
    let mut runs: Vec<_> = inputs.iter().map(|input| input.run.clone()).collect();
    let mut groups: BTreeMap<(String, &str), Vec<usize>> = BTreeMap::new();
    for (file, input) in inputs.iter().enumerate() {
        if let Some(origin) = input.file.origin() {
            groups.entry((hardware(input, origin), &origin.program)).or_default().push(file);
        }
    }
    for ((hardware, program), files) in &groups {
        let held: Vec<_> = files.iter().flat_map(|file| holdings(*file, &inputs[*file].file)).collect();
        let refuse = |(a, b): (&Holding, &Holding)| {
            let (first, second) = (&inputs[a.file].name, &inputs[b.file].name);
            Err(Error::invalid(format!(
                "{first} row {} and {second} row {} are both {} by {program} on {hardware}: leave one of them out, or \
                 name the runs, as in @before={first} @after={second}",
                a.at + 1,
                b.at + 1,
                a.key
            )))
        };
        let given = |holding: &Holding| &inputs[holding.file].run;
        if clash(&held, |_, _| true).is_none() {
            continue;
        }
        if let Some(both) = clash(&held, |a, b| given(a).is_some() && given(a) == given(b)) {
            return refuse(both);
        }
        let apart = |told: &Vec<String>| {
            let of = |holding: &Holding| files.iter().position(|f| *f == holding.file).map(|at| &told[at]);
            clash(&held, |a, b| of(a) == of(b)).is_none()
        };
        let origin = |file: usize| inputs[file].file.origin();
        let tell = |difference: &fn(&Origin) -> Option<String>| {
            files.iter().map(|file| difference(origin(*file)?)).collect::<Option<Vec<_>>>()
        };
        let told = match DIFFERENCES.iter().filter_map(tell).find(apart) {
            Some(told) => told,
            None => {
                // What is the same in every figure, of one run, was not measured twice.
                let same = |a: &Holding, b: &Holding| {
                    given(a) == given(b) && a.times == b.times && origin(a.file) == origin(b.file)
                };
                let names = files.iter().map(|file| shown(&inputs[*file].name)).collect();
                let unnamed = |a: &Holding, b: &Holding| given(a) == given(b) && !apart(&names);
                if let Some(both) = clash(&held, same).or_else(|| clash(&held, unnamed)) {
                    return refuse(both);
                }
                names
            }
        };
        for (file, told) in files.iter().zip(told) {
            runs[*file].get_or_insert(told);
        }
    }
    Ok(runs)
}

/// Two rows of two files that are of one thing, where `together` says that the files count as one run. Dense rows stand
/// in every file, as what the others are against: measured again they may be there again.
fn clash(held: &[Holding], together: impl Fn(&Holding, &Holding) -> bool) -> Option<(&Holding, &Holding)> {
    let mut seen: BTreeMap<&str, Vec<&Holding>> = BTreeMap::new();
    for holding in held {
        let known = seen.entry(&holding.key).or_default();
        let same = |of: &&&Holding| {
            of.file != holding.file && together(of, holding) && (!holding.dense || of.times == holding.times)
        };
        if let Some(first) = known.iter().find(same) {
            return Some((first, holding));
        }
        known.push(holding);
    }
    None
}

/// The rows of a file.
fn holdings(file: usize, content: &File) -> Vec<Holding> {
    match content {
        File::Bench(bench) => {
            let own = bench.environment.program == "sparse24";
            let holding = |(at, row): (usize, &Row)| {
                let key = format!("{} of {} {} {}", op_of(own, row), row.name, row.shape(), row.dtype);
                Holding { file, at, key, dense: row.op == "dense", times: row.times }
            };
            bench.rows.iter().enumerate().map(holding).collect()
        }
        File::Model(bench) => {
            let holding = |(at, row): (usize, &ModelRow)| {
                let key = format!("{} of {}", pass_of(&bench.environment, row), batches(bench));
                // A pass is not repeated beside others, as a dense product is.
                Holding { file, at, key, dense: false, times: row.times }
            };
            bench.rows.iter().enumerate().map(holding).collect()
        }
        File::Eval(_) | File::Prune(_) | File::Train(_) | File::Sensitivity(_) | File::Compile(_) => Vec::new(),
    }
}

/// The operation of a row; other programs may have several kernels for one.
fn op_of(own: bool, row: &Row) -> String {
    let what = what(&row.op, row.vector);
    if own || row.op == "dense" { what } else { format!("{what}, {}", row.kernel) }
}

/// A model, and the batches that it was measured with.
pub(super) fn batches(bench: &ModelBench) -> String {
    format!("{} {}x{}", last(&bench.model), bench.batch, bench.seq)
}

/// A row with where it comes from.
pub(super) struct Entry<'a> {
    pub(super) machine: Machine,
    pub(super) file: usize,
    pub(super) row: &'a Row,
    /// The dense row of its file that its ratio is against.
    pub(super) dense: Option<&'a Row>,
}

impl Entry<'_> {
    /// Times as fast as dense. It is computed from the medians: a file's own figure may be rounded, so that it would
    /// fall on the other side of 1.
    pub(super) fn ratio(&self) -> Option<f64> {
        let (own, dense) = self.row.times.median.zip(self.dense?.times.median)?;
        (self.row.op != "dense").then_some(dense / own)
    }

    /// Whether it takes less or more time than dense, or neither beyond the noise: where the samples say no more, or
    /// its file says that the ratio is not to be believed. `None` if no spread is known.
    pub(super) fn against_dense(&self) -> Option<Ordering> {
        let order = self.row.times.against(self.dense?.times)?;
        Some(if self.row.speedup_noisy { Ordering::Equal } else { order })
    }

    /// The ratio at either end of the middle half of the samples, against the dense median.
    pub(super) fn spread(&self) -> Option<(f64, f64)> {
        let dense = self.dense?.times.median?;
        self.row.times.middle().map(|(low, high)| (dense / high, dense / low))
    }

    /// The operation, with the kernel of another program.
    pub(super) fn what(&self) -> String {
        op_of(self.machine.own, self.row)
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

pub(super) fn entries<'a>(inputs: &'a [PageInput], runs: &[Option<String>]) -> Vec<Entry<'a>> {
    let mut entries = Vec::new();
    for (file, input) in inputs.iter().enumerate() {
        let File::Bench(bench) = &input.file else { continue };
        let machine = Machine::new(input, &bench.environment, runs[file].as_deref());
        let entry = |row| Entry { machine: machine.clone(), file, row, dense: dense_of(bench, row) };
        entries.extend(bench.rows.iter().map(entry));
    }
    entries
}

/// The dense row that a row's ratio is against: of several of one shape, the one whose median says so.
fn dense_of<'a>(bench: &'a Bench, row: &Row) -> Option<&'a Row> {
    let (own, ratio) = row.times.median.zip(row.speedup_vs_dense)?;
    let miss = |d: &Row| d.times.median.map_or(f64::INFINITY, |dense| (dense / own / ratio - 1.0).abs());
    let of = bench.rows.iter().filter(|d| d.op == "dense" && d.layer() == row.layer());
    of.min_by(|a, b| miss(a).total_cmp(&miss(b)))
}

/// The dense pass that a pass's ratio is against.
fn dense_pass<'a>(bench: &'a ModelBench, row: &ModelRow) -> Option<&'a ModelRow> {
    let (own, ratio) = row.times.median.zip(row.speedup_vs_dense)?;
    let miss = |d: &ModelRow| d.times.median.map_or(f64::INFINITY, |dense| (dense / own / ratio - 1.0).abs());
    let of = bench.rows.iter().filter(|d| d.op == "dense" && d.phase == row.phase);
    of.min_by(|a, b| miss(a).total_cmp(&miss(b)))
}

/// How a pass compares with its dense one: times as fast, and whether that is beyond the noise, as in [`Entry`].
pub(super) fn pass_against_dense(bench: &ModelBench, row: &ModelRow) -> Option<(f64, Option<Ordering>)> {
    let dense = dense_pass(bench, row)?;
    let ratio = dense.times.median? / row.times.median?;
    let order = row.times.against(dense.times);
    Some((ratio, if row.speedup_noisy { order.map(|_| Ordering::Equal) } else { order }))
}

/// Rows under one name are compared in absolute terms: they must come from one device with one number of threads.
pub(super) fn one_device_a_name(inputs: &[PageInput]) -> Result<()> {
    let mut known: BTreeMap<&str, (&PageInput, &Origin)> = BTreeMap::new();
    for input in inputs {
        let (Some(machine), Some(origin)) = (&input.machine, input.file.origin()) else { continue };
        let (first, of) = *known.entry(machine).or_insert((input, origin));
        if (&of.device, of.threads) != (&origin.device, origin.threads) {
            let name = |origin: &Origin| match origin.threads {
                Some(threads) => format!("{} with {}", origin.device, plural(threads, "thread")),
                None => origin.device.clone(),
            };
            let (of, own) = (name(of), name(origin));
            return Err(Error::invalid(format!(
                "{machine} is {of} in {} and {own} in {}: give them two names",
                first.name, input.name
            )));
        }
    }
    Ok(())
}

pub(super) fn failures(inputs: &[PageInput]) -> Vec<String> {
    let mut failures = Vec::new();
    for input in inputs {
        let mut say = |at: usize, what: String, failure: &Option<String>| {
            let why = shown(failure.as_deref().unwrap_or("no reason given"));
            failures.push(format!("{} row {}, {what}: {why}", shown(&input.name), at + 1));
        };
        match &input.file {
            File::Bench(bench) => {
                for (at, row) in bench.rows.iter().enumerate().filter(|(_, r)| !r.verified) {
                    say(at, format!("{} of {}", what(&row.op, row.vector), row.shape()), &row.failure);
                }
            }
            File::Model(model) => {
                for (at, row) in model.rows.iter().enumerate().filter(|(_, r)| !r.verified) {
                    say(at, form(row), &row.failure);
                }
            }
            File::Eval(_) | File::Prune(_) | File::Train(_) | File::Sensitivity(_) | File::Compile(_) => {}
        }
    }
    failures
}

/// The last part of a path.
pub(super) fn last(path: &str) -> &str {
    path.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default()
}

/// The form of a pass, and its phase.
pub(super) fn form(row: &ModelRow) -> String {
    let form = what(&row.op, row.vector);
    row.phase.as_ref().map_or(form.clone(), |phase| format!("{phase} {form}"))
}

/// What a pass of a model is called beside others of it.
pub(super) fn model_what(machine: &Machine, row: &ModelRow) -> String {
    let own = format!("{} {}", form(row), row.dtype);
    if machine.own { own } else { format!("{}, {own}, {}", machine.program, row.kernels.join(" ")) }
}

fn pass_of(origin: &Origin, row: &ModelRow) -> String {
    let own = format!("{} {}", form(row), row.dtype);
    if origin.program == "sparse24" { own } else { format!("{own}, {}", row.kernels.join(" ")) }
}
