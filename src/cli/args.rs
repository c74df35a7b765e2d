//! What the commands' arguments have in common: where results go, which model, texts from a file or stdin, and errors
//! of usage.
//!
//! Invariant: an option that is missing or clashes with another ends a command with exit code 2 before any work is
//! done, whether clap finds it or a command does.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{print, writable};
use sparse24::io::write_atomically;

/// The name of stdin and stdout.
pub(super) const DASH: &str = "-";

/// A command that was given the wrong options: exit code 2, as clap's own.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl Usage {
    pub(super) fn error(reason: impl Into<String>) -> anyhow::Error {
        Self(reason.into()).into()
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Returns a [`Usage`] error if the condition does not hold.
macro_rules! ensure_usage {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::cli::args::Usage::error(format!($($reason)+)));
        }
    };
}
pub(super) use ensure_usage;

/// The value of `--json [FILE|-]`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Stdout,
    File(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Path::new(text).extension().and_then(|e| e.to_str()) {
            _ if text == DASH => Ok(Self::Stdout),
            Some("json") => Ok(Self::File(text.into())),
            // The model in `--json MODEL` must not be taken for the file to write.
            _ => Err("the file's name must end in .json; for stdout put --json last, or write --json=-".into()),
        }
    }
}

/// `--json`, of every command that has results.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Json {
    /// Write the result as JSON: to a file, beside what is printed; or without FILE to stdout, instead of it.
    #[arg(long, value_name = "FILE|-", num_args = 0..=1, default_missing_value = DASH)]
    json: Option<Target>,
}

impl Json {
    /// Whether stdout is for the JSON alone.
    pub(super) fn on_stdout(&self) -> bool {
        self.json == Some(Target::Stdout)
    }

    /// The file to be written, with an error if it cannot be: call this before the work starts.
    pub(super) fn file(&self) -> Result<Option<PathBuf>> {
        match &self.json {
            Some(Target::File(path)) => Ok(Some(writable(path).context("--json")?)),
            _ => Ok(None),
        }
    }

    /// Prints `text`, or the JSON in its place, and writes the file if one was asked for.
    pub(super) fn emit(&self, text: &str, value: &impl Serialize) -> Result<()> {
        let json = || Ok::<_, anyhow::Error>(serde_json::to_string_pretty(value)? + "\n");
        if self.on_stdout() {
            return print(&json()?);
        }
        print(text)?;
        if let Some(path) = self.file()? {
            let json = json()?;
            write_atomically(path, |file| file.write_all(json.as_bytes()))?;
        }
        Ok(())
    }
}

/// A model by position or by `--model`: the same in every command.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "which_model", required = true, multiple = false)]
pub(super) struct ModelName {
    /// The model, as --model takes it.
    #[arg(value_name = "MODEL")]
    path: Option<String>,
    /// Folder with a model's config.json, tokenizer.json and weights; or its name on the Hugging Face hub, in a binary
    /// built with the feature `hub`.
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
}

impl ModelName {
    pub(super) fn get(&self) -> &str {
        // clap's group lets exactly one through.
        self.path.as_deref().or(self.model.as_deref()).unwrap_or_default()
    }
}

/// A model that is read and one that is written: `IN OUT`, or `--model IN OUT`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct InOut {
    /// What is read: a safetensors file, an index of shards, or a model's folder. Then what is written: a file, or a
    /// folder if IN is one.
    #[arg(value_name = "IN> <OUT", num_args = 1..=2, required = true)]
    paths: Vec<PathBuf>,
    /// IN, where it is not given by position.
    #[arg(long, value_name = "IN")]
    model: Option<PathBuf>,
}

impl InOut {
    /// IN and OUT. Neither is a stream: a file of tensors starts with a header that is known last.
    pub(super) fn get(&self) -> Result<(&Path, &Path)> {
        let (from, to) = match (&self.model, &self.paths[..]) {
            (None, [from, to]) => (from, to),
            (Some(from), [to]) => (from, to),
            (None, _) => return Err(Usage::error("OUT is missing: the file or folder to write")),
            (Some(_), _) => return Err(Usage::error("IN is given twice: by --model and by position")),
        };
        ensure_usage!(from != Path::new(DASH), "IN is a file or a folder: `-` cannot be read from its end");
        ensure_usage!(
            to != Path::new(DASH),
            "OUT is a file or a folder: it is written out of order, which `-` does not allow"
        );
        Ok((from, to))
    }
}

/// What errors call an input: its path, or `stdin`.
pub(super) fn name_of(input: &Path) -> String {
    if input == Path::new(DASH) { "stdin".to_owned() } else { input.display().to_string() }
}

/// Opens a file, or stdin if it is `-`.
pub(super) fn open(input: &Path) -> Result<Box<dyn Read>> {
    if input == Path::new(DASH) {
        return Ok(Box::new(std::io::stdin().lock()));
    }
    let file = File::open(input).with_context(|| format!("cannot read {}", input.display()))?;
    Ok(Box::new(file))
}

/// All of a file, or of stdin if it is `-`.
pub(super) fn whole(input: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    open(input)?.read_to_end(&mut text).with_context(|| name_of(input))?;
    Ok(text)
}

/// All of a text file, or of stdin if it is `-`.
pub(super) fn whole_text(input: &Path) -> Result<String> {
    let not_utf8 = |e: std::string::FromUtf8Error| {
        anyhow::anyhow!("{}: is not UTF-8 at its byte {}", name_of(input), e.utf8_error().valid_up_to() + 1)
    };
    String::from_utf8(whole(input)?).map_err(not_utf8)
}

/// An error if more than one of these inputs is stdin, which can be read once.
pub(super) fn one_stdin(inputs: &[(&str, Option<&Path>)]) -> Result<()> {
    let dashes: Vec<_> =
        inputs.iter().filter(|(_, path)| *path == Some(Path::new(DASH))).map(|(option, _)| *option).collect();
    ensure_usage!(dashes.len() < 2, "stdin can be read once: {} are both `-`", dashes.join(" and "));
    Ok(())
}

/// The lines of a file, or of stdin if it is `-`.
pub(super) fn read_lines(input: &Path) -> Result<Vec<String>> {
    lines(BufReader::new(open(input)?)).with_context(|| name_of(input))
}

/// The lines of a text file, without their ends and the byte-order mark that some editors begin it with. An error names
/// the line that is not UTF-8.
pub(super) fn lines(mut from: impl BufRead) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        if from.read_until(b'\n', &mut line)? == 0 {
            return Ok(lines);
        }
        if line.pop_if(|end| *end == b'\n').is_some() {
            line.pop_if(|end| *end == b'\r');
        }
        let number = lines.len() + 1;
        let line = String::from_utf8(line).map_err(|e| {
            let at = e.utf8_error().valid_up_to() + 1;
            anyhow::anyhow!("line {number} is not UTF-8 at its byte {at}")
        })?;
        lines.push(match line.strip_prefix('\u{feff}') {
            Some(rest) if number == 1 => rest.to_owned(),
            _ => line,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_with_either_end_or_none_and_bad_ones_are_named() {
        assert_eq!(
            lines(&b"a\r\n\nb\rc\nd"[..]).map_err(|e| e.to_string()),
            Ok(["a", "", "b\rc", "d"].map(String::from).to_vec())
        );
        assert_eq!(lines(&b""[..]).map_err(|e| e.to_string()), Ok(vec![]));
        // A mark in the middle is a character like others.
        let marked = lines("\u{feff}a\n\u{feff}b".as_bytes()).map_err(|e| e.to_string());
        assert_eq!(marked, Ok(["a", "\u{feff}b"].map(String::from).to_vec()));
        let bad = lines(&b"fine\nab\xff\n"[..]).map_err(|e| e.to_string());
        assert_eq!(bad, Err("line 2 is not UTF-8 at its byte 3".to_owned()));
    }
}
