//! How `bench` shows a run: as a table for the terminal, as Markdown, CSV or JSON.
//!
//! Invariant: what is on stdout is of one format throughout. Where that is read by programs or pasted elsewhere, what
//! else there is to say goes to stderr.

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use super::args::{Json, ensure_usage};
use super::{print, say};
use sparse24::report::csv;
use sparse24::report::sheet::Printout;

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table for the terminal, at most 100 columns wide.
    Table,
    /// A Markdown table, to be pasted into issues and pages.
    Md,
    /// What --json writes.
    Json,
    /// A line for each row, with all fields that rows have in JSON.
    Csv,
}

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Output {
    #[command(flatten)]
    json: Json,
    /// How the result is printed. [default: table]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// All columns, however wide the table becomes.
    #[arg(long)]
    wide: bool,
    /// Explain the columns below the table.
    #[arg(long)]
    legend: bool,
}

impl Output {
    /// Refuses options that clash, and a file that cannot be written: before anything is measured.
    pub(super) fn check(&self) -> Result<()> {
        let for_people = matches!(self.format(), Format::Table | Format::Md);
        ensure_usage!(
            !self.json.on_stdout() || matches!(self.format, None | Some(Format::Json)),
            "--json without FILE prints JSON: leave --format out, or name a FILE.json"
        );
        for (given, option) in [(self.wide, "--wide"), (self.legend, "--legend")] {
            ensure_usage!(!given || for_people, "{option} is for tables: JSON and CSV have all fields");
        }
        self.json.file().map(|_| ())
    }

    fn format(&self) -> Format {
        match self.format {
            Some(format) => format,
            None if self.json.on_stdout() => Format::Json,
            None => Format::Table,
        }
    }

    /// Says something that is not the result: on stdout if that is for the user's eyes.
    pub(super) fn remark(&self, text: &str) -> Result<()> {
        if self.format() == Format::Table {
            return print(text);
        }
        say(text.trim_end());
        Ok(())
    }

    /// Prints a run, and writes its file if one was asked for.
    pub(super) fn emit<T: Serialize>(&self, run: &impl Serialize, rows: &[T], page: &Printout) -> Result<()> {
        let text = match self.format() {
            Format::Table => page.text(self.wide, self.legend),
            Format::Md => page.markdown(self.wide, self.legend),
            Format::Csv => csv(rows)?,
            Format::Json => serde_json::to_string_pretty(run)? + "\n",
        };
        self.json.emit(&text, run)
    }
}
