//! One page from many files: what 2:4 bought on which hardware, beside other programs, losing rows included.
//!
//! The page is data first (sections of text, charts and tables), then HTML or Markdown by a template. Invariant:
//! every
//! figure on it stands in one of the files, or is computed from such; what was not measured is marked as such. Text
//! from files is escaped, by the templates and in the charts.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::Serialize;

use super::chart::{self, Axis, Bar, Bars, Chart, Ink, Plot, Series};
use super::datasheet::CLAIMS;
use super::file::{Bench, Eval, File, ModelBench, ModelRow, Origin, Prune, Row, Times};
use super::significant;
use crate::error::{Error, Result};

/// A file, and what to call it.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its name, for messages and for the page.
    pub name: String,
    /// What to call its machine; devices name themselves where it is `None`.
    pub machine: Option<String>,
    /// What it says.
    pub file: File,
}

/// A report, to be written as HTML or as Markdown.
#[derive(Clone, Debug, Serialize)]
pub struct Page {
    title: String,
    answers: Vec<String>,
    notes: Vec<String>,
    sections: Vec<Section>,
    #[serde(skip)]
    failures: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Section {
    id: String,
    title: String,
    text: Vec<String>,
    charts: Vec<Chart>,
    tables: Vec<Table>,
}

#[derive(Clone, Debug, Serialize)]
struct Table {
    caption: String,
    head: Vec<Column>,
    rows: Vec<Vec<String>>,
    /// Shown when asked for: the numbers of a chart, or long ones.
    folded: bool,
}

#[derive(Clone, Debug, Serialize)]
struct Column {
    name: &'static str,
    number: bool,
}

impl Table {
    /// Columns whose name begins with `#` hold numbers.
    fn new(caption: impl Into<String>, folded: bool, head: &[&'static str]) -> Self {
        let column = |name: &&'static str| match name.strip_prefix('#') {
            Some(name) => Column { name, number: true },
            None => Column { name, number: false },
        };
        Self { caption: caption.into(), head: head.iter().map(column).collect(), rows: Vec::new(), folded }
    }
}

/// What ran where: one device, with one number of threads, driven by one version of one program.
#[derive(Clone, Debug, PartialEq)]
struct Machine {
    /// The hardware: rows of several programs on it are comparable in absolute terms.
    place: String,
    program: String,
    /// `cpu`, `software`, or another kind of adapter.
    kind: String,
    own: bool,
}

impl Machine {
    fn new(input: &Input, origin: &Origin) -> Self {
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
struct Entry<'a> {
    machine: Machine,
    file: usize,
    at: usize,
    row: &'a Row,
    /// The dense row of its file that its ratio is against.
    dense: Option<&'a Row>,
}

impl Entry<'_> {
    fn ratio(&self) -> Option<f64> {
        self.row.speedup_vs_dense.filter(|_| self.row.op != "dense")
    }

    fn verdict(&self) -> Verdict {
        let middle = |row: &Row| Times::of(row).middle();
        match self.dense.and_then(middle).zip(middle(self.row)) {
            Some((dense, own)) if own.1 < dense.0 => Verdict::Faster,
            Some((dense, own)) if own.0 > dense.1 => Verdict::Slower,
            Some(_) => Verdict::Same,
            None => Verdict::Unknown,
        }
    }

    /// The ratio at either end of the middle half of the samples, against the dense median.
    fn spread(&self) -> Option<(f64, f64)> {
        let dense = self.dense?.median_ms?;
        Times::of(self.row).middle().map(|(low, high)| (dense / high, dense / low))
    }

    /// The operation; other programs may have several kernels for one.
    fn what(&self) -> String {
        let what = what(&self.row.op, self.row.vector);
        if self.machine.own || self.row.op == "dense" { what } else { format!("{what}, {}", self.row.kernel) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Faster,
    Slower,
    Same,
    /// No spread is known.
    Unknown,
}

fn what(op: &str, vector: Option<usize>) -> String {
    match (op, vector) {
        ("sparse24", Some(v)) => format!("2:4 V={v}"),
        ("auto", Some(v)) => format!("auto V={v}"),
        ("masked24", _) => "masked by codes".to_owned(),
        (op, _) => op.to_owned(),
    }
}

/// A wide sweep of tokens belongs on the axis of tokens, not among the bars.
const SWEEP: usize = 4;

impl Page {
    /// Puts files together. Two files may not hold the same row of the same machine, unless they were given names.
    pub fn new(inputs: &[Input]) -> Result<Self> {
        let entries = entries(inputs);
        one_device_a_name(inputs)?;
        no_duplicates(inputs, &entries)?;
        no_duplicate_models(inputs)?;
        let models: Vec<(Machine, &ModelBench)> = inputs
            .iter()
            .filter_map(|input| match &input.file {
                File::Model(model) => Some((Machine::new(input, &model.environment), model)),
                _ => None,
            })
            .collect();
        if entries.is_empty() && models.is_empty() {
            return Err(Error::Invalid("none of the files holds measured times (of `sparse24 bench`)".into()));
        }
        let failures = failures(inputs);
        let own = |e: &&Entry<'_>| e.machine.own;
        let places = distinct(entries.iter().filter(own).chain(&entries).map(|e| e.machine.place.clone()));
        let mut sections = Vec::new();
        if !entries.is_empty() {
            sections.push(speedups(&entries, &places)?);
            sections.extend(by_tokens(&entries, &places)?);
            sections.extend(programs(&entries, &places)?);
            sections.push(machines(&entries, &places)?);
            sections.extend(rooflines(inputs, &entries, &places)?);
            sections.extend(bytes(&entries)?);
        }
        sections.extend(end_to_end(&models)?);
        sections.extend(accuracy(inputs, &models)?);
        if !entries.is_empty() {
            sections.push(all_rows(&entries, inputs));
        }
        sections.push(origins(inputs));
        let mut notes: Vec<_> = failures.iter().map(|f| format!("Failed, not timed: {f}.")).collect();
        let machines: Vec<_> = entries.iter().map(|e| &e.machine).chain(models.iter().map(|(m, _)| m)).collect();
        for place in distinct(machines.iter().filter(|m| m.kind == "software").map(|m| &m.place)) {
            notes.push(format!(
                "{place} is a software driver: it computes on the processor and says nothing about a GPU."
            ));
        }
        if machines.iter().all(|m| ["cpu", "software"].contains(&m.kind.as_str())) {
            notes.push("No GPU was measured for this page.".to_owned());
        }
        let answers = places.iter().filter_map(|place| answer(place, &entries)).chain(models_answer(&models)).collect();
        let all = distinct(places.iter().cloned().chain(models.iter().map(|(m, _)| m.place.clone())));
        let title = match &all[..] {
            [one] => format!("2:4 sparsity, measured on {one}"),
            many => format!("2:4 sparsity, measured in {} set-ups of device and threads", many.len()),
        };
        Ok(Self { title, answers, notes, sections, failures })
    }

    /// Rows that failed verification: file, row, and what was wrong.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// The page as one file that needs no other.
    pub fn html(&self) -> Result<String> {
        self.rendered("page.html", include_str!("page.html"), "")
    }

    /// The page as Markdown, whose pictures are files beside it: their endings and contents. `stem` is the page's name
    /// without its ending.
    pub fn markdown(&self, stem: &str) -> Result<(String, Vec<(String, String)>)> {
        let text = self.rendered("page.md", include_str!("page.md"), stem)?;
        let pictures = self.sections.iter().flat_map(|s| &s.charts);
        Ok((text, pictures.map(|c| (format!("{stem}-{}.svg", c.id), c.standalone())).collect()))
    }

    fn rendered(&self, name: &str, template: &str, stem: &str) -> Result<String> {
        let invalid = |e: minijinja::Error| Error::Invalid(format!("cannot write the page: {e:#}"));
        let mut templates = Environment::new();
        templates.set_undefined_behavior(UndefinedBehavior::Strict);
        let lines = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(invalid)?;
        templates.set_syntax(lines);
        templates.add_filter("md", markdown_text);
        templates.add_filter("link", |stem: &str| {
            // What ends a link in angle brackets, or means something else in one.
            stem.replace('%', "%25").replace('<', "%3C").replace('>', "%3E").replace('\\', "%5C").replace('&', "%26")
        });
        templates.add_template(name, template).map_err(invalid)?;
        let page = templates.get_template(name).map_err(invalid)?;
        let version = env!("CARGO_PKG_VERSION");
        page.render(context! { page => Value::from(Serde(self)), style => chart::style(), version, stem })
            .map_err(invalid)
    }
}

/// Text that Markdown shows as it is, in a cell of a table, too.
fn markdown_text(text: &str) -> String {
    let mut safe = String::new();
    for c in text.chars() {
        match c {
            '<' => safe.push_str("&lt;"),
            '&' => safe.push_str("&amp;"),
            '\n' | '\r' => safe.push(' '),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' | '$' => safe.extend(['\\', c]),
            c => safe.push(c),
        }
    }
    safe
}

fn entries(inputs: &[Input]) -> Vec<Entry<'_>> {
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
fn one_device_a_name(inputs: &[Input]) -> Result<()> {
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

/// The same row twice makes two figures of one thing. Dense rows are in every file, as what the others are against.
fn no_duplicates(inputs: &[Input], entries: &[Entry<'_>]) -> Result<()> {
    let mut seen: BTreeMap<_, &Entry<'_>> = BTreeMap::new();
    for entry in entries.iter().filter(|e| e.row.op != "dense") {
        let Entry { machine: Machine { place, program, .. }, row, .. } = entry;
        let key = (place, program, &row.name, &row.op, row.layer(), row.vector, &row.kernel);
        if let Some(first) = seen.insert(key, entry).filter(|first| first.file != entry.file) {
            return Err(Error::Invalid(format!(
                "{} row {} and {} row {} are both {} of {} {} by {program} on {place}: leave one of them out, or name \
                 the machines, as in before={}",
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
    }
    Ok(())
}

/// The same pass of the same model twice would be two bars of one name.
fn no_duplicate_models(inputs: &[Input]) -> Result<()> {
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

fn failures(inputs: &[Input]) -> Vec<String> {
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

/// Each of these once, in order.
fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut once = Vec::new();
    all.for_each(|x| {
        if !once.contains(&x) {
            once.push(x);
        }
    });
    once
}

fn times(x: f64) -> String {
    format!("{x:.2}x")
}

fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "-".to_owned(), |x| significant(x, digits))
}

/// Of an even number of values the mean of the middle two.
fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    let upper = *all.get(all.len() / 2)?;
    Some(if all.len().is_multiple_of(2) { (all[all.len() / 2 - 1] + upper) / 2.0 } else { upper })
}

/// What 2:4 bought on one machine, in a few sentences.
fn answer(place: &str, entries: &[Entry<'_>]) -> Option<String> {
    let own: Vec<_> = entries.iter().filter(|e| e.machine.own && e.machine.place == place).collect();
    let op = if own.iter().any(|e| e.row.op == "sparse24") { "sparse24" } else { "auto" };
    let sparse = || own.iter().filter(|e| e.row.op == op);
    let mut said = Vec::new();
    for dtype in distinct(own.iter().map(|e| e.row.dtype.clone())) {
        // Standard 2:4, and the V that gained most; all others are on the charts.
        let median_of = |vector| {
            let rows = sparse().filter(|e| e.row.dtype == dtype && e.row.vector == Some(vector));
            median(rows.filter_map(|e| e.ratio()).collect()).unwrap_or_default()
        };
        let mut vectors = distinct(sparse().filter(|e| e.row.dtype == dtype).filter_map(|e| e.row.vector));
        vectors.sort_by(|a, b| median_of(*b).total_cmp(&median_of(*a)));
        let best = vectors.first().copied();
        for vector in distinct(vectors.iter().copied().filter(|v| *v == 1).chain(best)) {
            let rows: Vec<_> = sparse()
                .filter(|e| e.row.vector == Some(vector) && e.row.dtype == dtype)
                .filter_map(|e| Some((e, e.ratio()?)))
                .collect();
            let Some(best) = rows.iter().max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
            let least = rows.iter().map(|r| r.1).fold(f64::INFINITY, f64::min);
            let median = median(rows.iter().map(|r| r.1).collect()).unwrap_or_default();
            let range = match rows.len() {
                1 => format!("{} as fast as dense at {}", times(best.1), best.0.row.shape()),
                many => format!(
                    "{} to {} as fast as dense (median {} of {many} rows; the most at {})",
                    times(least),
                    times(best.1),
                    times(median),
                    best.0.row.shape()
                ),
            };
            let lost = |verdict| {
                let of = rows.iter().filter(|(e, _)| e.verdict() == verdict);
                let named: Vec<_> = of.map(|(e, r)| format!("{} ({})", e.row.shape(), times(*r))).collect();
                match named.len() {
                    0..=4 => named.join(", "),
                    many => format!("{} and {} more", named[..3].join(", "), many - 3),
                }
            };
            let (slower, same) = (lost(Verdict::Slower), lost(Verdict::Same));
            let mut sentence = format!("{dtype}, V={vector}: {range}");
            match (slower.is_empty(), same.is_empty()) {
                (true, true) if rows.iter().all(|(e, _)| e.verdict() == Verdict::Faster) => {
                    sentence += "; it paid in every row";
                }
                (true, true) => {}
                (false, _) => sentence += &format!("; it did not pay at {slower}"),
                (true, false) => {}
            }
            if !same.is_empty() {
                sentence += &format!("; no difference beyond the spread at {same}");
            }
            said.push(sentence);
        }
    }
    (!said.is_empty())
        .then(|| format!("On {place}, 2:4 against this program's own dense product: {}.", said.join(". ")))
}

fn models_answer(models: &[(Machine, &ModelBench)]) -> Option<String> {
    let said: Vec<_> = models
        .iter()
        .filter(|(machine, _)| machine.own)
        .filter_map(|(machine, model)| {
            let op = if model.rows.iter().any(|r| r.op == "auto") { "auto" } else { "sparse24" };
            let rows = model.rows.iter().filter(|r| r.op == op);
            let rows: Vec<_> = rows
                .filter_map(|r| Some(format!("{} {}", what(&r.op, r.vector), times(r.speedup_vs_dense?))))
                .collect();
            let ModelBench { model, batch, seq, .. } = model;
            (!rows.is_empty()).then(|| {
                format!("{model} with {batch} texts of {seq} tokens on {}: {}", machine.place, rows.join(", "))
            })
        })
        .collect();
    (!said.is_empty()).then(|| format!("End to end, times as fast as dense: {}.", said.join(". ")))
}

/// Shapes that are measured at many numbers of tokens, by out and in features and type.
fn swept(entries: &[Entry<'_>], entry: &Entry<'_>) -> bool {
    // Sweeps of other programs stay among the bars.
    let same = |e: &&Entry<'_>| {
        entry.machine.own
            && e.machine == entry.machine
            && (e.row.m, e.row.k, &e.row.dtype) == (entry.row.m, entry.row.k, &entry.row.dtype)
    };
    distinct(entries.iter().filter(same).map(|e| e.row.n)).len() >= SWEEP
}

const ID_LETTERS: usize = 40;

fn id(parts: &[&str]) -> String {
    let text: String = parts.join("-").chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let words: Vec<_> = text.split('-').filter(|w| !w.is_empty()).collect();
    words.join("-").to_lowercase().chars().take(ID_LETTERS).collect()
}

fn speedups(entries: &[Entry<'_>], places: &[String]) -> Result<Section> {
    let mut section = Section {
        id: "speedup".into(),
        title: "Speedup over dense, by shape".into(),
        text: vec![
            "Each program against its own dense product of the same shape, type and run: 1x is dense. The bar is the \
             ratio \
             of medians, the line over it the middle half of the samples (all of them where a file has no \
             quartiles). Shapes are out features x tokens x in features. V is \
             how many rows of weights share a pattern; V=1 is the 2:4 of sparse tensor cores."
                .into(),
        ],
        ..Section::default()
    };
    for (at, place) in places.iter().enumerate() {
        let rows = entries.iter().filter(|e| &e.machine.place == place && e.ratio().is_some() && !swept(entries, e));
        let rows: Vec<_> = rows.collect();
        if rows.is_empty() {
            continue;
        }
        let heading = |e: &Entry<'_>| {
            let program = if e.machine.own { String::new() } else { format!(", {}", e.machine.program) };
            format!("{} {}{program}", e.row.shape(), e.row.dtype)
        };
        let groups = distinct(rows.iter().map(|e| heading(e))).into_iter().map(|name| {
            let bars = rows.iter().filter(|e| heading(e) == name).map(|e| Bar {
                label: e.what(),
                parts: vec![(e.ratio().unwrap_or_default(), Ink::of(&e.row.op, e.row.vector))],
                spread: e.spread(),
                text: times(e.ratio().unwrap_or_default()),
            });
            (name.clone(), bars.collect())
        });
        let groups: Vec<_> = groups.collect();
        let bars = Bars {
            unit: "times as fast as dense".into(),
            groups,
            marks: vec![(1.0, "1x: own dense".into())],
            legend: Vec::new(),
        };
        let alt =
            format!("Bars of the speedup over dense on {place}, by shape; the numbers are in the table of all rows");
        section.charts.push(bars.chart(&id(&["speedup", &(at + 1).to_string()]), place, &alt)?);
    }
    Ok(section)
}

fn by_tokens(entries: &[Entry<'_>], places: &[String]) -> Result<Option<Section>> {
    let mut section = Section {
        id: "tokens".into(),
        title: "Speedup against tokens: where sparse starts to pay".into(),
        text: vec!["It pays from where on every row is faster beyond its spread.".into()],
        ..Section::default()
    };
    for place in places {
        let here: Vec<_> = entries
            .iter()
            .filter(|e| e.machine.own && &e.machine.place == place && e.ratio().is_some() && swept(entries, e))
            .collect();
        for layer in distinct(here.iter().map(|e| (e.row.m, e.row.k, e.row.dtype.clone()))) {
            let (m, k, dtype) = &layer;
            let of = |e: &&&Entry<'_>| (e.row.m, e.row.k, &e.row.dtype) == (*m, *k, dtype);
            let mut series = Vec::new();
            let mut text = Vec::new();
            for (op, vector) in distinct(here.iter().filter(of).map(|e| (e.row.op.clone(), e.row.vector))) {
                let rows = here.iter().filter(of).filter(|e| e.row.op == op && e.row.vector == vector);
                let mut rows: Vec<_> = rows.collect();
                rows.sort_by_key(|e| e.row.n);
                let points: Vec<_> = rows.iter().filter_map(|e| Some((e.row.n as f64, e.ratio()?))).collect();
                let name = what(&op, vector);
                let pays = rows.iter().rposition(|e| e.verdict() != Verdict::Faster).map_or(0, |last| last + 1);
                if vector.is_some() {
                    text.push(match points.get(pays) {
                        Some(_) if pays == 0 => format!("{name} paid at every count"),
                        Some((n, _)) => format!("{name} paid from {n} tokens on"),
                        None => format!("{name} was not faster beyond its spread at the largest count"),
                    });
                }
                series.push(Series { ink: Ink::of(&op, vector), name, points, joined: true });
            }
            let plot = Plot {
                x: Axis { name: "tokens (n)".into(), log: true },
                y: Axis { name: "times as fast as dense".into(), log: false },
                roofs: vec![(ends(&series), "1x: own dense".into())],
                series,
            };
            let title = format!("{m} features from {k}, {dtype}, {place}");
            let alt = format!(
                "Lines of the speedup over dense against tokens, {title}; the numbers are in the table of all rows"
            );
            let name = id(&["tokens", &section.charts.len().to_string()]);
            section.charts.push(plot.chart(&name, &title, &alt)?);
            section.text.push(format!("{title}: {}.", text.join(", ")));
        }
    }
    Ok((!section.charts.is_empty()).then_some(section))
}

/// A level line at 1 over everything that the series cover.
fn ends(series: &[Series]) -> Vec<(f64, f64)> {
    let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
    vec![(xs().fold(f64::INFINITY, f64::min), 1.0), (xs().fold(0.0, f64::max), 1.0)]
}

/// The products of several programs on the same hardware.
fn programs(entries: &[Entry<'_>], places: &[String]) -> Result<Option<Section>> {
    let mut section = Section {
        id: "programs".into(),
        title: "Beside other programs on the same hardware".into(),
        text: vec![
            "Effective speed, 2mnk over the median time, whatever was skipped. Only shapes that several programs \
             measured on \
             the same device with the same number of threads. Behind each bar: how many times as fast as the fastest \
             dense \
             product of any of them, which is not always this program's. Other programs multiply one set of \
             operands, which caches may \
             hold; this one rotates through several. The table names each clock."
                .into(),
        ],
        ..Section::default()
    };
    let head = ["shape", "type", "program", "op", "#ms", "#effective, GFLOP/s", "#vs fastest dense", "kernel", "clock"];
    for place in places {
        let here: Vec<_> = entries.iter().filter(|e| &e.machine.place == place && e.row.median_ms.is_some()).collect();
        let mut groups = Vec::new();
        let mut table = Table::new(place.clone(), true, &head);
        for layer in distinct(here.iter().map(|e| e.row.layer())) {
            let rows: Vec<_> = here.iter().filter(|e| e.row.layer() == layer).collect();
            if distinct(rows.iter().map(|e| e.machine.program.clone())).len() < 2 {
                continue;
            }
            let fastest = rows.iter().filter(|e| e.row.op == "dense").filter_map(|e| e.row.median_ms);
            let fastest = fastest.fold(f64::INFINITY, f64::min);
            let mut once: Vec<(String, &Entry<'_>)> = Vec::new();
            for entry in &rows {
                let name = format!("{}, {}", entry.machine.program, entry.what());
                // A dense row stands in each of a program's files: the fastest counts, as it does for the others.
                match once.iter_mut().find(|(known, e)| *known == name && e.row.kernel == entry.row.kernel) {
                    Some((_, known)) if entry.row.median_ms < known.row.median_ms => *known = entry,
                    Some(_) => {}
                    None => once.push((name, entry)),
                }
            }
            once.sort_by(|a, b| a.1.row.median_ms.partial_cmp(&b.1.row.median_ms).unwrap_or(std::cmp::Ordering::Equal));
            let ratio = |e: &Entry<'_>| e.row.median_ms.map(|ms| fastest / ms).filter(|r| r.is_finite() && *r > 0.0);
            let bars = once.iter().map(|(name, e)| Bar {
                label: name.clone(),
                parts: vec![(e.row.effective_tflops.unwrap_or_default() * 1e3, Ink::of(&e.row.op, e.row.vector))],
                spread: None,
                text: ratio(e).map_or_else(String::new, times),
            });
            groups.push((format!("{} {}", rows[0].row.shape(), rows[0].row.dtype), bars.collect::<Vec<_>>()));
            table.rows.extend(once.iter().map(|(_, e)| {
                vec![
                    e.row.shape(),
                    e.row.dtype.clone(),
                    e.machine.program.clone(),
                    e.what(),
                    number(e.row.median_ms, 4),
                    number(e.row.effective_tflops.map(|t| t * 1e3), 3),
                    ratio(e).map_or_else(|| "-".to_owned(), times),
                    e.row.kernel.clone(),
                    e.row.clock.clone().unwrap_or_else(|| "-".into()),
                ]
            }));
        }
        if groups.is_empty() {
            continue;
        }
        let inks =
            [(Ink::Dense, "dense"), (Ink::Masked, "masked"), (Ink::Vector(0), "2:4, V=1"), (Ink::Vector(5), "V=32")];
        let bars = Bars {
            unit: "effective GFLOP/s".into(),
            groups,
            marks: Vec::new(),
            legend: inks.map(|(ink, name)| (ink, name.to_owned())).to_vec(),
        };
        let alt =
            format!("Bars of the effective speed of several programs on {place}; the numbers are in the table below");
        section.charts.push(bars.chart(&id(&["programs", &section.charts.len().to_string()]), place, &alt)?);
        section.tables.push(table);
    }
    Ok((!section.charts.is_empty()).then_some(section))
}

/// Machines side by side, each normalised to its own dense, and what data sheets promise.
fn machines(entries: &[Entry<'_>], places: &[String]) -> Result<Section> {
    let mut section = Section {
        id: "hardware".into(),
        title: "Hardware side by side, and what was promised".into(),
        text: vec![
            "Every machine against its own dense product, the median over its shapes, and a line from the least to \
             the most. Machines \
             that measured other shapes are not strictly comparable."
                .into(),
        ],
        ..Section::default()
    };
    let mut measured = Table::new(
        "Measured: times as fast as the machine's own dense",
        false,
        &["machine", "program", "type", "op", "#rows", "#least", "#median", "#most"],
    );
    let mut groups = Vec::new();
    for place in places {
        let mut bars = Vec::new();
        let here: Vec<_> = entries.iter().filter(|e| &e.machine.place == place && e.ratio().is_some()).collect();
        let kind = |e: &Entry<'_>| {
            (e.machine.program.clone(), e.row.dtype.clone(), e.what(), Ink::of(&e.row.op, e.row.vector), e.machine.own)
        };
        for key in distinct(here.iter().map(|e| kind(e))) {
            let mut ratios: Vec<_> = here.iter().filter(|e| kind(e) == key).filter_map(|e| e.ratio()).collect();
            ratios.sort_by(f64::total_cmp);
            let (program, dtype, what, ink, own) = key;
            let (least, most) = (ratios.first().copied(), ratios.last().copied());
            let [Some(least), Some(median), Some(most)] = [least, median(ratios.clone()), most] else {
                continue;
            };
            bars.push(Bar {
                label: if own { format!("{what} {dtype}") } else { format!("{program}, {what} {dtype}") },
                parts: vec![(median, ink)],
                spread: Some((least, most)),
                text: times(median),
            });
            let figures = [least, median, most].map(times);
            let row = [place.clone(), program, dtype, what, ratios.len().to_string()];
            measured.rows.push(row.into_iter().chain(figures).collect());
        }
        if !bars.is_empty() {
            groups.push((place.clone(), bars));
        }
    }
    if !groups.is_empty() {
        let bars = Bars {
            unit: "times as fast as own dense".into(),
            groups,
            marks: vec![(1.0, "1x: own dense".into()), (2.0, "2x: datasheet, not measured".into())],
            legend: Vec::new(),
        };
        let alt =
            "Bars of each machine's median speedup over its own dense, and datasheets' 2x as a line; numbers below";
        section.charts.push(bars.chart("hardware", "Times as fast as own dense", alt)?);
    }
    let mut promised = Table::new(
        "Datasheet, not measured: what vendors and papers claim",
        true,
        &["device", "what", "#dense, TFLOPS", "#2:4, TFLOPS", "#ratio", "claim", "source"],
    );
    promised.rows.extend(CLAIMS.iter().map(|c| {
        let ratio = c.dense.zip(c.sparse).map_or_else(|| "-".to_owned(), |(d, s)| times(s / d));
        let (dense, sparse) = (number(c.dense, 4), number(c.sparse, 4));
        vec![c.device.into(), c.what.into(), dense, sparse, ratio, c.says.into(), format!("{}, {}", c.source, c.url)]
    }));
    section.tables = vec![measured, promised];
    Ok(section)
}

/// Bytes of an element.
fn size(dtype: &str) -> f64 {
    if matches!(dtype, "f16" | "bf16") { 2.0 } else { 4.0 }
}

fn rooflines(inputs: &[Input], entries: &[Entry<'_>], places: &[String]) -> Result<Option<Section>> {
    let mut section = Section {
        id: "roofline".into(),
        title: "Roofline".into(),
        text: vec![
            "Executed operations a second (what was skipped is not counted) over executed operations per byte of \
             weights, \
             activations and output, each counted once. The broken lines are the ceilings that were measured in the \
             same runs, \
             the highest of each. \
             Rows above the slope found operands in a cache."
                .into(),
        ],
        ..Section::default()
    };
    for place in places {
        let here: Vec<_> = entries.iter().filter(|e| e.machine.own && &e.machine.place == place).collect();
        for dtype in distinct(here.iter().map(|e| e.row.dtype.clone())) {
            let of = |e: &&&Entry<'_>| e.row.dtype == dtype;
            let point = |e: &Entry<'_>| {
                let Row { n, m, k, executed_tflops, weight_bytes, median_ms, .. } = e.row;
                let bytes = (*weight_bytes)? as f64 + size(&dtype) * (*n as f64 * (*k as f64 + *m as f64));
                let tflops = (*executed_tflops)?;
                Some((tflops * 1e9 * (*median_ms)? / bytes, tflops))
            };
            let kinds = distinct(here.iter().filter(of).map(|e| (&e.row.op, e.row.vector)));
            let series: Vec<_> = kinds
                .into_iter()
                .filter_map(|(op, vector)| {
                    let rows = here.iter().filter(of).filter(|e| (&e.row.op, e.row.vector) == (op, vector));
                    let points: Vec<_> = rows.filter_map(|e| point(e)).collect();
                    let (ink, name) = (Ink::of(op, vector), what(op, vector));
                    (!points.is_empty()).then_some(Series { ink, name, points, joined: false })
                })
                .collect();
            if series.is_empty() {
                continue;
            }
            let files = distinct(here.iter().filter(of).map(|e| e.file));
            let best = |of: fn(&crate::measure::Ceilings) -> Option<f64>| {
                let known = files.iter().filter_map(|at| match &inputs[*at].file {
                    File::Bench(bench) => of(&bench.ceilings),
                    _ => None,
                });
                known.reduce(f64::max)
            };
            let slope = best(|c| c.copy_gb_per_s.or(c.read_gb_per_s)).map(|gb| gb / 1e3);
            let flat = [
                ("f32 multiply-adds", best(|c| c.fma_f32_tflops)),
                ("f16 multiply-adds", best(|c| c.fma_f16_tflops).filter(|_| dtype == "f16")),
                ("cooperative matrices", best(|c| c.cooperative_f16_tflops).filter(|_| dtype == "f16")),
            ];
            let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
            let (low, high) = (xs().fold(f64::INFINITY, f64::min), xs().fold(0.0, f64::max));
            let top = flat.iter().filter_map(|f| f.1).fold(0.0, f64::max);
            let mut roofs = Vec::new();
            if let Some(slope) = slope {
                let end = if top > 0.0 { top / slope } else { high };
                roofs.push((
                    vec![(low.min(end), slope * low.min(end)), (end, slope * end)],
                    format!("memory, {} GB/s", significant(slope * 1e3, 3)),
                ));
            }
            for (name, tflops) in flat {
                let Some(tflops) = tflops else { continue };
                let knee = slope.map_or(low, |slope| tflops / slope);
                roofs.push((
                    vec![(knee.min(high), tflops), (high.max(knee), tflops)],
                    format!("{name}, {} TFLOPS", significant(tflops, 3)),
                ));
            }
            let title = format!("{place}, {dtype}");
            if roofs.is_empty() {
                section.text.push(format!("{title}: no ceilings are measured on this device, so there is no roof."));
            }
            let plot = Plot {
                x: Axis { name: "executed operations per byte".into(), log: true },
                y: Axis { name: "executed TFLOPS".into(), log: true },
                series,
                roofs,
            };
            let alt = format!(
                "Roofline of {title}: executed TFLOPS against operations per byte, under the measured ceilings"
            );
            let name = id(&["roofline", &section.charts.len().to_string()]);
            section.charts.push(plot.chart(&name, &title, &alt)?);
        }
    }
    Ok((!section.charts.is_empty()).then_some(section))
}

fn bytes(entries: &[Entry<'_>]) -> Result<Option<Section>> {
    let mut table = Table::new("Bytes of the weights", true, &["type", "op", "#of dense", "#saved", "shapes"]);
    let mut bars = Vec::new();
    let own: Vec<_> = entries.iter().filter(|e| e.machine.own && e.row.op != "auto").collect();
    for (dtype, op, vector) in distinct(own.iter().map(|e| (&e.row.dtype, &e.row.op, e.row.vector))) {
        let mut shares = Vec::new();
        for e in own.iter().filter(|e| (&e.row.dtype, &e.row.op, e.row.vector) == (dtype, op, vector)) {
            let dense = size(dtype) * e.row.m as f64 * e.row.k as f64;
            shares.extend(e.row.weight_bytes.map(|bytes| 100.0 * bytes as f64 / dense));
        }
        shares.sort_by(f64::total_cmp);
        let (Some(least), Some(most)) = (shares.first(), shares.last()) else { continue };
        let middle = median(shares.clone()).unwrap_or_default();
        let percent = |x: f64| format!("{x:.1} %");
        bars.push(Bar {
            label: format!("{} {dtype}", what(op, vector)),
            parts: vec![(middle, Ink::of(op, vector))],
            spread: None,
            text: percent(middle),
        });
        let range =
            if most - least < 0.05 { "all alike".into() } else { format!("{} to {}", percent(*least), percent(*most)) };
        table.rows.push(vec![dtype.clone(), what(op, vector), percent(middle), percent(100.0 - middle), range]);
    }
    if bars.is_empty() {
        return Ok(None);
    }
    let bars = Bars {
        unit: "% of the bytes of dense weights".into(),
        groups: vec![("Weights on the device, metadata included".into(), bars)],
        marks: vec![(100.0, "dense".into())],
        legend: Vec::new(),
    };
    let alt = "Bars of the bytes of weights as a share of dense ones; the numbers are in the table below";
    Ok(Some(Section {
        id: "bytes".into(),
        title: "Bytes saved".into(),
        text: vec!["The median over shapes; padding makes small or ragged ones larger.".into()],
        charts: vec![bars.chart("bytes", "Bytes of the weights", alt)?],
        tables: vec![table],
    }))
}

/// The last part of a path.
fn last(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

fn model_what(machine: &Machine, row: &ModelRow) -> String {
    let own = format!("{} {}", what(&row.op, row.vector), row.dtype);
    if machine.own { own } else { format!("{}, {own}, {}", machine.program, row.kernels.join(" ")) }
}

fn end_to_end(models: &[(Machine, &ModelBench)]) -> Result<Option<Section>> {
    if models.is_empty() {
        return Ok(None);
    }
    let mut section = Section {
        id: "model".into(),
        title: "A BERT end to end".into(),
        text: vec![
            "One forward pass from ids to embeddings. The bars are split by the time of each part alone, scaled to the \
             whole; other programs' are whole. The line over a bar is the middle half of the samples (all of them \
             where a \
             file has no quartiles)."
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
            "#texts/s",
            "#vs own dense",
            "#GEMMs, ms",
            "#attention, ms",
            "#rest, ms",
            "#weights, MB",
        ],
    );
    let name = |model: &ModelBench| last(&model.model).to_owned();
    let titles = distinct(models.iter().map(|(machine, m)| (name(m), m.batch, m.seq, machine.place.clone())));
    for (at, (model, batch, seq, place)) in titles.into_iter().enumerate() {
        let mut bars = Vec::new();
        let here = models
            .iter()
            .filter(|(machine, m)| machine.place == place && name(m) == model && (m.batch, m.seq) == (batch, seq));
        for (machine, bench) in here {
            for row in &bench.rows {
                let middle = Times::of_model(row).middle();
                let part = |of: fn(&super::file::Parts) -> f64| number(row.parts.as_ref().map(of), 3);
                table.rows.push(vec![
                    format!("{model} {batch}x{seq}"),
                    place.clone(),
                    machine.program.clone(),
                    model_what(machine, row),
                    row.dtype.clone(),
                    if row.verified { number(row.median_ms, 4) } else { "FAILED".into() },
                    middle
                        .map_or_else(|| "-".into(), |(a, b)| format!("{} to {}", significant(a, 4), significant(b, 4))),
                    number(row.sequences_per_second, 3),
                    row.speedup_vs_dense.map_or_else(|| "-".into(), times),
                    part(|p| p.gemm_ms),
                    part(|p| p.attention_ms),
                    part(|p| p.rest_ms),
                    number(row.weight_bytes.map(|b| b as f64 / 1e6), 3),
                ]);
                let Some(median) = row.median_ms else { continue };
                let parts = match row.parts {
                    Some(p) => {
                        let parts = [p.gemm_ms, p.attention_ms, p.rest_ms];
                        let whole: f64 = parts.iter().sum();
                        parts.iter().enumerate().map(|(at, ms)| (ms / whole * median, Ink::Part(at))).collect()
                    }
                    None => vec![(median, Ink::Masked)],
                };
                let text = format!("{} ms", significant(median, 3));
                bars.push(Bar { label: model_what(machine, row), parts, spread: middle, text });
            }
        }
        if bars.is_empty() {
            continue;
        }
        let names = ["linear layers", "attention", "the rest"].into_iter().enumerate();
        let chart = Bars {
            unit: "ms of a forward pass".into(),
            groups: vec![(format!("{batch} texts of {seq} tokens"), bars)],
            marks: Vec::new(),
            legend: names.map(|(at, name)| (Ink::Part(at), name.to_owned())).collect(),
        };
        let title = format!("{model}, {place}");
        let alt = format!("Bars of the time of a forward pass of {title} by part; the numbers are in the table below");
        section.charts.push(chart.chart(&id(&["model", &at.to_string()]), &title, &alt)?);
    }
    section.tables.push(table);
    Ok(Some(section))
}

/// How an evaluated model was pruned, in words, and its V.
fn pruned(eval: &Eval, prunes: &[&Prune]) -> (String, Option<usize>) {
    if let Some(vector) = eval.sparsity.strip_suffix("2:4").map(|v| v.trim_end_matches(':')) {
        let vector = if vector.is_empty() { Some(1) } else { vector.parse().ok() };
        return (format!("magnitude, V={}", vector.unwrap_or_default()), vector);
    }
    let Some(prune) = prunes.iter().find(|p| p.made(&eval.model)) else { return (eval.sparsity.clone(), None) };
    let vectors = distinct(prune.layers.iter().map(|l| l.vector));
    let vector = match vectors[..] {
        [one] if prune.pruned_share > 0.999 => Some(one),
        _ => None,
    };
    let v: Vec<_> = vectors.iter().map(usize::to_string).collect();
    (format!("{}, V={}, {:.0} % of weights", prune.method, v.join(" "), 100.0 * prune.pruned_share), vector)
}

fn accuracy(inputs: &[Input], models: &[(Machine, &ModelBench)]) -> Result<Option<Section>> {
    let prunes: Vec<_> =
        inputs.iter().filter_map(|i| if let File::Prune(p) = &i.file { Some(p) } else { None }).collect();
    let evals: Vec<_> =
        inputs.iter().filter_map(|i| if let File::Eval(e) = &i.file { Some(e) } else { None }).collect();
    if evals.is_empty() {
        return Ok(None);
    }
    // The name that a pruned folder's dense model has in the benchmark.
    let source = |eval: &Eval| prunes.iter().find(|p| p.made(&eval.model)).map_or(&eval.model, |p| &p.input).clone();
    let speed = |eval: &Eval, vector: Option<usize>| -> Option<(f64, String)> {
        let (machine, bench) = models.iter().find(|(machine, m)| {
            machine.own && last(&m.model) == last(&source(eval)) && m.rows.iter().any(|r| r.dtype == eval.dtype)
        })?;
        let of = |op: &str| bench.rows.iter().find(|r| r.op == op && r.vector == vector && r.dtype == eval.dtype);
        let row = if vector.is_some() { of("auto").or_else(|| of("sparse24")) } else { of("dense") }?;
        Some((row.speedup_vs_dense?, machine.place.clone()))
    };
    let mut table = Table::new(
        "Accuracy beside speed",
        false,
        &["model", "pruned by", "type", "#Spearman", "#Pearson", "#pairs", "#end to end vs dense", "command"],
    );
    let mut points: Vec<(f64, f64, Option<usize>, String)> = Vec::new();
    let mut place = None;
    for eval in &evals {
        let (how, vector) = pruned(eval, &prunes);
        let dense = eval.sparsity == "none" && !prunes.iter().any(|p| p.made(&eval.model));
        let speed = if dense || vector.is_some() { speed(eval, vector) } else { None };
        table.rows.push(vec![
            eval.model.clone(),
            if dense { "dense".into() } else { how.clone() },
            eval.dtype.clone(),
            format!("{:.4}", eval.spearman),
            format!("{:.4}", eval.pearson),
            eval.pairs.to_string(),
            speed.as_ref().map_or_else(|| "-".into(), |s| times(s.0)),
            eval.environment.command.clone(),
        ]);
        if let Some((ratio, on)) = speed {
            points.push((ratio, eval.spearman, vector, how));
            place.get_or_insert(on);
        }
    }
    let mut section = Section {
        id: "accuracy".into(),
        title: "Accuracy beside speed".into(),
        text: vec!["Correlation of the embeddings' cosine similarities with people's scores; higher is better.".into()],
        tables: vec![table],
        ..Section::default()
    };
    if let Some(place) = place.filter(|_| points.len() > 1) {
        let mut bars: Vec<(String, Vec<Bar>)> = Vec::new();
        for (ratio, spearman, vector, how) in points {
            let op = if vector.is_some() { "auto" } else { "dense" };
            let label = if vector.is_some() { how } else { "dense".into() };
            let bar = Bar {
                label,
                parts: vec![(spearman, Ink::of(op, vector))],
                spread: None,
                text: format!("{spearman:.4} at {}", times(ratio)),
            };
            match bars.first_mut() {
                Some((_, bars)) => bars.push(bar),
                None => bars.push((format!("speed end to end on {place}"), vec![bar])),
            }
        }
        let dense = evals.iter().find(|e| !prunes.iter().any(|p| p.made(&e.model)) && e.sparsity == "none");
        let marks = dense.map(|e| (e.spearman, format!("dense: {:.4}", e.spearman))).into_iter().collect();
        let chart = Bars { unit: "Spearman's correlation (no unit)".into(), groups: bars, marks, legend: Vec::new() };
        let alt =
            "Bars of Spearman's correlation by method and V, with the speed end to end; numbers in the table below";
        section.charts.push(chart.chart("accuracy", "Spearman's correlation, and times as fast as dense", alt)?);
    }
    Ok(Some(section))
}

fn all_rows(entries: &[Entry<'_>], inputs: &[Input]) -> Section {
    let mut section = Section { id: "rows".into(), title: "All rows".into(), ..Section::default() };
    section.text.push(
        "ms: the median, and the middle half of the samples (all of them where a file says no more). vs dense: \
         against the \
         dense row of the same file; \"same\" where the middle halves overlap. err/bound: the largest error over \
         what the \
         arithmetic may lose; 1 is the limit."
            .into(),
    );
    let head = [
        "layer",
        "shape",
        "type",
        "op",
        "#ms",
        "#middle half, ms",
        "#effective, TFLOPS",
        "#executed, TFLOPS",
        "#vs dense",
        "than dense",
        "#err/bound",
        "kernel",
        "command",
    ];
    for (at, input) in inputs.iter().enumerate() {
        let rows: Vec<_> = entries.iter().filter(|e| e.file == at).collect();
        let Some(first) = rows.first() else { continue };
        let caption = format!("{}: {} on {}", input.name, first.machine.program, first.machine.place);
        let mut table = Table::new(caption, true, &head);
        table.rows.extend(rows.iter().map(|e| {
            let row = e.row;
            let middle = Times::of(row).middle();
            let verdict = match (e.ratio(), e.verdict()) {
                (None, _) => "-",
                (_, Verdict::Faster) => "faster",
                (_, Verdict::Slower) => "slower",
                (_, Verdict::Same) => "same",
                (_, Verdict::Unknown) => "spread unknown",
            };
            vec![
                row.name.clone(),
                row.shape(),
                row.dtype.clone(),
                e.what(),
                if row.verified { number(row.median_ms, 4) } else { "FAILED".into() },
                middle.map_or_else(|| "-".into(), |(a, b)| format!("{} to {}", significant(a, 4), significant(b, 4))),
                number(row.effective_tflops, 3),
                number(row.executed_tflops, 3),
                row.speedup_vs_dense.map_or_else(|| "-".into(), times),
                verdict.into(),
                number(row.error_over_bound, 2),
                row.kernel.clone(),
                row.command.clone(),
            ]
        }));
        section.tables.push(table);
    }
    section
}

fn origins(inputs: &[Input]) -> Section {
    let mut section =
        Section { id: "environment".into(), title: "Environments and commands".into(), ..Section::default() };
    let head = ["file", "program", "device", "driver", "system", "sampling", "commit", "date", "command"];
    let mut table = Table::new("Where each file comes from", false, &head);
    for input in inputs {
        let origin = match &input.file {
            File::Bench(bench) => &bench.environment,
            File::Model(model) => &model.environment,
            File::Eval(Eval { environment, .. }) => {
                let gap = std::iter::repeat_n(String::from("-"), head.len() - 2);
                table
                    .rows
                    .push([input.name.clone()].into_iter().chain(gap).chain([environment.command.clone()]).collect());
                continue;
            }
            File::Prune(prune) => {
                let gap = std::iter::repeat_n(String::from("-"), head.len() - 2);
                table.rows.push([input.name.clone()].into_iter().chain(gap).chain([prune.command.clone()]).collect());
                continue;
            }
        };
        let or = |x: &Option<String>| x.clone().unwrap_or_else(|| "-".into());
        let libraries = origin.libraries.iter().map(|(name, version)| format!(", {name} {version}"));
        let details: Vec<_> = [origin.simd.clone(), origin.threads.map(|t| format!("{t} threads"))]
            .into_iter()
            .flatten()
            .chain(origin.shader_checks.iter().map(|c| format!("{c} shaders")))
            .chain(origin.tuning.iter().map(|t| format!("tuning {t}")))
            .collect();
        let sampling = origin.samples.zip(origin.sample_ms).map(|(n, ms)| format!("{n} samples of {ms} ms or more"));
        table.rows.push(vec![
            input.name.clone(),
            format!("{} {}{}", origin.program, origin.version, libraries.collect::<String>()),
            format!("{} ({}; {})", origin.device, origin.kind, details.join(", ")),
            [&origin.driver, &origin.backend].map(or).join(", "),
            format!("{} {}, {}", origin.os, origin.arch, origin.cpu),
            or(&sampling),
            or(&origin.commit),
            origin.date.clone(),
            origin.command.clone(),
        ]);
    }
    section.tables.push(table);
    section
}
