//! `--compare` and `--fail-slower` of `sparse24 bench`: the earlier run is read, and found to have rows in common,
//! before anything is measured; see [`report::compare`](sparse24::report::compare) for what counts as slower.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::output::Output;
use super::{Outcome, args, say};
use sparse24::report::compare::{RowKey, Run, Scope};
use sparse24::report::file::File;
use sparse24::report::plural;

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Flags {
    /// Compare with an earlier run, row by row: a row is slower or faster if its median changed and the middle halves
    /// of the samples do not overlap. It is read first, so `--json` may replace it, slower or not.
    #[arg(long, value_name = "OLD.json|-")]
    compare: Option<PathBuf>,
    /// Exit with 3 if a row is slower than in OLD.json by more than this, and beyond its spread. Rows that are noisy in
    /// either run do not count, unless the change is larger than the noise.
    #[arg(long, value_name = "PERCENT", requires = "compare", value_parser = percent)]
    fail_slower: Option<f64>,
}

fn percent(text: &str) -> Result<f64> {
    let percent: f64 = text.parse()?;
    ensure!(percent.is_finite() && percent >= 0.0, "not a number of percent from 0 up");
    Ok(percent)
}

impl Flags {
    /// Reads the run to compare with, if there is one.
    pub(super) fn open(&self) -> Result<Option<Earlier<'_>>> {
        let Some(path) = self.compare.as_deref() else { return Ok(None) };
        let mut json = String::new();
        let run = args::open(path)
            .and_then(|mut from| Ok(from.read_to_string(&mut json)?))
            .and_then(|_| Ok(File::parse(&json).and_then(Run::new)?));
        let run = run.with_context(|| format!("--compare: {}", args::name_of(path)))?;
        Ok(Some(Earlier { path, run, fail_slower: self.fail_slower }))
    }
}

/// The run that this one is compared with.
pub(super) struct Earlier<'a> {
    path: &'a Path,
    run: Run,
    fail_slower: Option<f64>,
}

impl Earlier<'_> {
    fn named(&self) -> String {
        format!("--compare: {}", args::name_of(self.path))
    }

    /// Refuses a run, before it is made, that there is nothing to compare with.
    pub(super) fn covers(&self, scope: &Scope, keys: &[RowKey]) -> Result<()> {
        self.run.covers(scope, keys).with_context(|| self.named())
    }

    /// Prints what changed in a run that was made, and whether that is too slow.
    pub(super) fn compare(&self, json: &str, output: &Output) -> Result<Outcome> {
        let now = File::parse(json).and_then(Run::new).context("this run")?;
        let comparison = self.run.compare(&now, self.fail_slower.unwrap_or(0.0)).with_context(|| self.named())?;
        output.remark(&format!("\n{}", comparison.text(&args::name_of(self.path))))?;
        if self.fail_slower.is_none() {
            return Ok(Outcome::Fine);
        }
        for row in comparison.slower() {
            say(&format!("slower: {row}"));
        }
        for row in comparison.noisy() {
            say(&format!("noisy: {row}"));
        }
        match comparison.noisy().count() {
            0 => {}
            some => say(&format!("{} too noisy to be judged: measure again on a quiet machine", plural(some, "row"))),
        }
        Ok(if comparison.slower().next().is_some() { Outcome::Slower } else { Outcome::Fine })
    }
}
