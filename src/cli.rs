//! The command line: its grammar, and which part answers which command.
//!
//! Results go to stdout, everything else to stderr; progress bars show on a terminal only. Parsing is clap's, with exit
//! code 2 for a usage error; what remains of a command after parsing is plain data. Exit codes: 0 fine, 1 error, 2
//! usage, 3 a result failed verification or, where that was asked for, is slower than before.

mod args;
mod bench;
mod classify;
mod command;
mod compare;
mod completions;
mod convert;
mod devices;
mod embed;
mod environment;
mod eval;
mod generate;
mod images;
mod inspect;
mod interrupt;
mod kernels;
mod language;
mod model;
mod output;
mod perplexity;
mod prune;
mod report;
mod retrain;
mod rewrite;
mod sensitivity;
mod shapes;
mod tune;
mod tuning;
mod version;
mod web;

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) use args::Usage;

/// How a command that ran to its end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As it should.
    Fine,
    /// At least one result was not within its error bound.
    VerificationFailed,
    /// All results are right, and at least one came slower than `--fail-slower` allows.
    Slower,
}

/// 2:4 structured sparsity on any GPU that wgpu reaches: prune, compress, multiply, verify, measure, embed, classify.
///
/// Without a command, `bench` runs with its defaults: BERT-base's layers on the best device of this machine.
#[derive(Debug, Parser)]
#[command(
    name = "sparse24",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "`sparse24 COMMAND --help` says more and shows examples; `--version` tells commit, features and SIMD.

Results go to stdout, all else to stderr. Colours follow NO_COLOR. Exit codes: 0 fine, 1 an error,
2 a wrong command line, 3 a result that is wrong, or slower than --fail-slower allows."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(Box<bench::Args>),
    Classify(Box<classify::Args>),
    Completions(completions::Completions),
    Convert(Box<convert::Args>),
    Devices(devices::Args),
    Embed(Box<embed::Args>),
    Eval(Box<eval::Args>),
    Generate(Box<generate::Args>),
    Inspect(inspect::Args),
    Kernels(kernels::Args),
    Man(completions::Pages),
    Perplexity(Box<perplexity::Args>),
    Prune(Box<prune::Args>),
    Report(report::Args),
    Retrain(Box<retrain::Args>),
    Sensitivity(Box<sensitivity::Args>),
    Tune(Box<tune::Args>),
    Web(web::Args),
}

/// Runs the command that this process's arguments name.
pub(crate) fn run() -> Result<Outcome> {
    interrupt::watch();
    let outcome = command();
    interrupt::wait();
    outcome
}

/// Parses this process's arguments and runs the command.
fn command() -> Result<Outcome> {
    // This one takes a process of git, which other runs should not wait for. It is an option of no command.
    if std::env::args_os().nth(1).is_some_and(|first| first == "--version") {
        print(&version::long())?;
        return Ok(Outcome::Fine);
    }
    // Usage errors, `--help` and `-V` end the process here, with clap's message and exit code.
    let command = Cli::parse().command;
    if !matches!(command, Some(Command::Convert(_) | Command::Inspect(_) | Command::Report(_) | Command::Web(_))) {
        environment::prepare_for_drivers();
    }
    match command {
        None => bench::run(&bench::Args::default()),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Classify(args)) => classify::run(&args),
        Some(Command::Completions(args)) => completions::completions(&args, Cli::command()),
        Some(Command::Convert(args)) => convert::run(&args),
        Some(Command::Devices(args)) => devices::run(&args),
        Some(Command::Embed(args)) => embed::run(&args),
        Some(Command::Eval(args)) => eval::run(&args),
        Some(Command::Generate(args)) => generate::run(&args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Kernels(args)) => kernels::run(&args),
        Some(Command::Man(args)) => completions::pages(&args, Cli::command()),
        Some(Command::Perplexity(args)) => perplexity::run(&args),
        Some(Command::Prune(args)) => prune::run(&args),
        Some(Command::Report(args)) => report::run(&args),
        Some(Command::Retrain(args)) => retrain::run(&args),
        Some(Command::Sensitivity(args)) => sensitivity::run(&args),
        Some(Command::Tune(args)) => tune::run(&args),
        Some(Command::Web(args)) => web::run(&args),
    }
}

/// Writes a line to stderr. A stderr that is gone is no reason to fail.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{}", harmless(line));
}

/// Text without characters that a terminal obeys, but for line breaks and tabs. Names from files should be
/// [`printable`](sparse24::error::printable) already; this is the net below. They are escaped as JSON does it, where
/// they stand in strings alone, so that JSON stays what it is.
fn harmless(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    let shown = |c: char| if obeyed(c) { format!("\\u{:04x}", u32::from(c)) } else { String::from(c) };
    Cow::Owned(text.chars().map(shown).collect())
}

/// Writes a result to stdout. A reader that has gone away, as `head` does, is no error.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(harmless(text).as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to stdout"),
    }
}

/// Writes a result to stdout as indented JSON.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// A number of bytes to three digits, and its unit: B, KiB, MiB and so on.
fn scaled(bytes: u64) -> (String, &'static str) {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = bytes.checked_ilog2().unwrap_or(0) as usize / 10;
    let number = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let decimals = match number {
        _ if unit == 0 => 0,
        n if n < 9.995 => 2,
        n => usize::from(n < 99.95),
    };
    (format!("{number:.decimals$}"), UNITS[unit])
}

/// [`scaled`] in one piece and without idle zeros, such as `44.7 MiB` or `2 GiB`.
fn size(bytes: u64) -> String {
    let (number, unit) = scaled(bytes);
    let number = if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {unit}")
}

/// A progress bar of `steps` on stderr, if that is a terminal; else one that shows nothing.
fn progress(steps: usize) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} [{elapsed} of about {duration}]") {
        bar.set_style(style);
    }
    bar
}

/// Where an output file will be written, checked before the work starts: see [`sparse24::io::writable`].
fn writable(path: &Path) -> Result<PathBuf> {
    Ok(sparse24::io::writable(path)?)
}
