//! `sparse24 convert`: a model in another form of storage, its weights the same.
//!
//! Items are read twice, one at a time: to learn what they will be, because a file starts with its header, and to write
//! them. Memory stays near the largest one.

use std::path::PathBuf;

use anyhow::{Context, Result};
use regex::Regex;

use super::folder::{Claim, NewFolder};
use super::inspect::{many, printable};
use super::rewrite::{self, Fate, Made};
use super::{Outcome, print, progress, say, size, writable};
use sparse24::VectorLen;
use sparse24::error::Error;
use sparse24::io::{Item, Layout, Raw24, Source, Stored};

const EXAMPLES: &str = "\
Examples:
  # from a checkpoint of compressed-tensors to this crate's own format, and to plain weights
  sparse24 convert model-2of4/ model-native/ --to native
  sparse24 convert model-2of4/ model-dense/ --to dense
  # a pruned file for torch's sparse tensor cores, but for the head
  sparse24 convert pruned.safetensors cutlass.safetensors --to cutlass --exclude lm_head

What is read, whatever the form: dense weights with zeros; sparse24's own files; sparse-24-bitmask and
sparse-bitmask of compressed-tensors; torch's pair of values and metadata (CUTLASS); weights with a mask of
torch.nn.utils.prune or of NVIDIA's ASP, which is applied. Types: f32, f16, bf16, f8 (e4m3, e5m2), i8, u8.

Dense matrices that are not 2:4 stay as they are. A matrix that its form says is 2:4 and is not, is an error, but for
--to dense; --exclude leaves it as it is.";

/// Store a model's 2:4 weights in another form: sparse24's own, dense, bitmask (compressed-tensors) or cutlass (torch).
///
/// Weights keep every bit, and what is no 2:4 matrix is copied. A folder becomes a folder, with its config, tokenizer
/// and other files, whose config says how weights are stored. Shards become one file. The output appears complete or
/// not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A safetensors file, an index of shards, or a model's folder.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write, or the folder if IN is one.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The form to store 2:4 matrices in.
    #[arg(long, value_name = "native|dense|bitmask|cutlass")]
    to: Layout,
    /// Convert only what this regular expression matches part of the name of.
    #[arg(long, value_name = "RE")]
    include: Option<Regex>,
    /// Leave as it is what this regular expression matches part of the name of.
    #[arg(long, value_name = "RE")]
    exclude: Option<Regex>,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let source = Source::open(&args.input)?;
    let is_folder = args.input.is_dir();
    let claim = if is_folder { Claim::of(&args.input)? } else { None };
    let (folder, path) = if is_folder {
        let folder = NewFolder::create(&args.output)?;
        let path = folder.weights();
        (Some(folder), path)
    } else {
        (None, writable(&args.output)?)
    };
    let bar = progress(2 * source.items().count());
    let mut not_24 = 0;
    let mut fates = Vec::new();
    for item in source.items() {
        bar.set_message(printable(&item.name));
        fates.push((item, args.fate(&source, claim.as_ref(), item, &mut not_24)?));
        bar.inc(1);
    }
    let made = |item: &Item| {
        bar.inc(1);
        Ok(match args.to {
            Layout::Dense => Made::Plain(source.dense(item)?),
            _ => Made::Compressed(args.read(&source, item)?),
        })
    };
    rewrite::write(&source, args.to, &fates, &[], &path, made).map_err(|e| match &folder {
        Some(folder) => folder.shown(&e),
        None => e,
    })?;
    let bytes_after = std::fs::metadata(&path).with_context(|| path.display().to_string())?.len();
    if let Some(folder) = folder {
        folder.finish(&args.input, rewrite::stored(args.to, &fates))?;
    }
    bar.finish_and_clear();

    let converted = fates.iter().filter(|(_, fate)| !matches!(fate, Fate::Kept)).count();
    let mut bytes_before = 0;
    for file in source.files() {
        bytes_before += std::fs::metadata(file.path()).with_context(|| file.path().display().to_string())?.len();
    }
    let already =
        source.items().filter(|item| item.stored == rewrite::stored_as(args.to) && args.selects(&item.name)).count();
    if converted == 0 && args.to != Layout::Dense && already == 0 {
        say(&format!(
            "warning: nothing was converted: not 2:4: {} of {}; the output is a copy",
            many(not_24, "matrix", "matrices"),
            many(fates.len(), "tensor", "tensors")
        ));
    }
    print(&format!(
        "{}: {} to {}, {} as before{}; {} before, {} after\n",
        args.output.display(),
        many(converted, "matrix", "matrices"),
        args.to,
        many(fates.len() - converted, "tensor", "tensors"),
        if not_24 > 0 { format!(" (not 2:4: {})", many(not_24, "matrix", "matrices")) } else { String::new() },
        size(bytes_before),
        size(bytes_after),
    ))?;
    Ok(Outcome::Fine)
}

impl Args {
    fn selects(&self, name: &str) -> bool {
        self.include.as_ref().is_none_or(|re| re.is_match(name))
            && self.exclude.as_ref().is_none_or(|re| !re.is_match(name))
    }

    fn fate(&self, source: &Source, claim: Option<&Claim>, item: &Item, not_24: &mut usize) -> Result<Fate, Error> {
        if !self.selects(&item.name) {
            return Ok(Fate::Kept);
        }
        if item.stored == rewrite::stored_as(self.to) {
            if item.stored.claims() {
                source.raw24(item)?;
            }
            return Ok(Fate::Kept);
        }
        if self.to == Layout::Dense {
            return Ok(Fate::Plain);
        }
        let Some(mut spec) = item.spec24() else { return Ok(Fate::Kept) };
        if item.stored == Stored::Dense {
            // Less than a whole group has no pattern, and an empty matrix nothing to save.
            if spec.m == 0 || spec.k < 4 {
                return Ok(Fate::Kept);
            }
            match self.read(source, item) {
                Ok(raw) => spec.vector = self.said(item, &raw),
                Err(Error::Tensor { cause, .. })
                    if matches!(*cause, Error::OverFull { .. }) && !claim.is_some_and(|claim| claim.covers(item)) =>
                {
                    *not_24 += 1;
                    return Ok(Fate::Kept);
                }
                Err(e) => return Err(e),
            }
        } else if self.to == Layout::Native && item.vector.is_none() {
            // What the file says is believed here, and checked when it is written.
            spec.vector = self.said(item, &self.read(source, item)?);
        }
        // Whether the layout has a place for it.
        self.to.specs(&spec).map_err(|e| e.in_tensor(source.path_of(item), &item.name))?;
        Ok(Fate::Compressed(spec))
    }

    /// An item as it will be written: for our own format with the longest vector, if the file does not say which.
    fn read(&self, source: &Source, item: &Item) -> Result<Raw24<'static>, Error> {
        if self.to == Layout::Native { source.widest24(item) } else { source.raw24(item) }
    }

    /// The vector length to be written down: only what was said, or found for our own format.
    fn said(&self, item: &Item, raw: &Raw24<'_>) -> Option<VectorLen> {
        if self.to == Layout::Native { Some(raw.vector()) } else { item.vector }
    }
}
