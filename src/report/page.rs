//! One page from many files: what 2:4 bought on which hardware, beside other programs, losing rows included.
//!
//! The page is data first (sections of text, charts and tables), then HTML or Markdown by a template. Invariant: every
//! figure on it stands in one of the files, or is computed from such; what was not measured is marked as such. Text
//! from files is escaped, by the templates and in the charts.

mod compilers;
mod entries;
mod models;
mod paths;
mod products;
mod retraining;
mod roofline;
mod runs;
mod sensitivity;
mod sources;

use std::cmp::Ordering;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::Serialize;

use self::entries::Machine;
use super::chart::{self, Chart};
use super::file::{File, ModelBench, RowTimes};
use super::{plural, significant};
use crate::error::{Error, Result};

/// A file, and what to call it.
#[derive(Clone, Debug)]
pub struct PageInput {
    /// Its name, for messages and for the page.
    pub name: String,
    /// What to call its machine; devices name themselves where it is `None`.
    pub machine: Option<String>,
    /// What to call its run, beside others of the same machine; where it is `None` and one is needed, what differs
    /// between the runs does.
    pub run: Option<String>,
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

impl Page {
    /// Puts files together. Rows that two files hold must be of two runs that something tells apart.
    pub fn new(inputs: &[PageInput]) -> Result<Self> {
        entries::one_device_a_name(inputs)?;
        let runs = entries::runs(inputs)?;
        let entries = entries::entries(inputs, &runs);
        let models: Vec<(Machine, &ModelBench)> = inputs
            .iter()
            .zip(&runs)
            .filter_map(|(input, run)| match &input.file {
                File::Model(model) => Some((Machine::new(input, &model.environment, run.as_deref()), model)),
                _ => None,
            })
            .collect();
        let failures = entries::failures(inputs);
        let own = |e: &&entries::Entry<'_>| e.machine.own;
        let places = distinct(entries.iter().filter(own).chain(&entries).map(|e| e.machine.place.clone()));
        let mut sections = Vec::new();
        if !entries.is_empty() {
            sections.push(products::speedups(&entries, &places)?);
            sections.extend(products::by_tokens(&entries, &places)?);
            sections.extend(products::programs(&entries)?);
            sections.push(products::machines(&entries, &places)?);
            sections.extend(roofline::rooflines(inputs, &entries, &places)?);
            sections.extend(roofline::bytes(&entries)?);
        }
        sections.extend(models::end_to_end(&models)?);
        let (changes, changed) = runs::changes(inputs, &runs)?;
        sections.extend(changes);
        sections.extend(models::accuracy(inputs, &models)?);
        sections.extend(retraining::losses(inputs)?);
        sections.extend(sensitivity::layers(inputs)?);
        sections.extend(compilers::compilers(inputs));
        if sections.is_empty() {
            return Err(Error::invalid("none of the files holds a measurement: they say how models were pruned"));
        }
        if !entries.is_empty() {
            sections.push(sources::all_rows(&entries, inputs));
        }
        sections.push(sources::origins(inputs));
        let mut notes: Vec<_> = failures.iter().map(|f| format!("Failed, not timed: {f}.")).collect();
        let machines: Vec<_> = entries.iter().map(|e| &e.machine).chain(models.iter().map(|(m, _)| m)).collect();
        for place in distinct(machines.iter().filter(|m| m.kind == "software").map(|m| &m.hardware)) {
            notes.push(format!(
                "{place} is a software driver: it computes on the processor and says nothing about a GPU."
            ));
        }
        let on_host = |m: &&Machine| ["cpu", "software"].contains(&m.kind.as_str());
        if !machines.is_empty() && machines.iter().all(on_host) {
            notes.push("No GPU was measured for this page.".to_owned());
        }
        let answers = places
            .iter()
            .filter_map(|place| products::answer(place, &entries))
            .chain(models::models_answer(&models))
            .chain(changed)
            .collect();
        let only_compiled = inputs.iter().all(|input| matches!(input.file, File::Compile(_)));
        let title = match &distinct(machines.iter().map(|m| &m.hardware))[..] {
            [] if only_compiled => "2:4 sparsity: what compilers make of the kernels".to_owned(),
            [] => "2:4 sparsity: what pruning costs".to_owned(),
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

    /// The page as Markdown without its pictures, whose numbers are in the tables.
    pub fn markdown_alone(&self) -> Result<String> {
        self.rendered("page.md", include_str!("page.md"), "")
    }

    /// The page as Markdown, whose pictures are files beside it: their names and contents. `stem` is the page's name
    /// without its ending.
    pub fn markdown(&self, stem: &str) -> Result<(String, Vec<(String, String)>)> {
        let text = self.rendered("page.md", include_str!("page.md"), stem)?;
        let pictures = self.sections.iter().flat_map(|s| &s.charts);
        Ok((text, pictures.map(|c| (format!("{stem}-{}.svg", c.id), c.standalone())).collect()))
    }

    fn rendered(&self, name: &str, template: &str, stem: &str) -> Result<String> {
        let invalid = |e: minijinja::Error| Error::invalid(format!("cannot write the page: {e:#}"));
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

/// A ratio, with as many digits as show on which side of 1 it lies.
fn times(x: f64) -> String {
    let decimals = (2..6).find(|digits| x == 1.0 || format!("{x:.digits$}").parse() != Ok(1.0)).unwrap_or(6);
    format!("{x:.decimals$}x")
}

/// How times compare with others, in a word.
fn compared(order: Option<Ordering>) -> &'static str {
    match order {
        Some(Ordering::Less) => "faster",
        Some(Ordering::Greater) => "slower",
        Some(Ordering::Equal) => "same",
        None => "spread unknown",
    }
}

fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "-".to_owned(), |x| significant(x, digits))
}

/// The middle half of the samples, in milliseconds.
fn middle(times: RowTimes) -> String {
    let both = |(a, b)| format!("{} to {}", significant(a, 4), significant(b, 4));
    times.middle().map_or_else(|| "-".to_owned(), both)
}

/// A name for the next chart of a section, and for its file.
fn numbered(name: &str, section: &Section) -> String {
    format!("{name}-{}", section.charts.len() + 1)
}
