//! `sparse24 convert`: a model in another form of storage, its weights the same.
//!
//! Items are read twice, one at a time: to learn what they will be, because a file starts with its header, and to write
//! them. Memory stays near the largest one.

use std::collections::BTreeSet;

use anyhow::Result;
use regex::Regex;
use serde::Serialize;

use super::args::{InOut, Json};
use super::command::command_line;
use super::inspect::many;
use super::rewrite;
use super::{Outcome, progress, say, size};
use sparse24::error::{Error, printable};
use sparse24::format::Bytes;
use sparse24::io::{Action, Content, Item, Layout, Source, SparsityClaim, Stored, config_of, in_by_out};
use sparse24::{Sparse24, VectorLen};

const EXAMPLES: &str = "\
Examples:
  # from a checkpoint of compressed-tensors to this crate's own format, and to plain weights
  sparse24 convert model-2of4/ model-native/ --to native
  sparse24 convert model-2of4/ model-dense/ --to dense
  # a pruned file for torch's sparse tensor cores, but for the head
  sparse24 convert pruned.safetensors cutlass.safetensors --to cutlass --exclude lm_head

What is read, whatever the form: dense weights with zeros; sparse24's own files; sparse-24-bitmask
and sparse-bitmask of compressed-tensors; torch's pair of values and metadata (CUTLASS); weights
with a mask of torch.nn.utils.prune or of NVIDIA's ASP, which is applied. Types: f32, f16, bf16,
f8 (e4m3, e5m2), i8, u8; matrices of other types are copied.

Dense matrices that are not 2:4 stay dense, and what a sparse-bitmask holds that is not 2:4
becomes dense. A matrix that its form or the folder's config says is 2:4 and is not, is an error,
but for --to dense; --exclude leaves it as it is. Matrices that are stored as in x out (GPT-2's
Conv1D, Keras' and Flax' kernels) are 2:4 along their rows, if at all; they stay dense.

Of a folder everything comes along but hidden files and other forms of the old model's weights
(pytorch_model.bin, onnx/), which are named. Weights of further modules in folders within
(2_Dense/) are copied.";

/// Store a model's 2:4 weights in another form: sparse24's own, dense, bitmask (compressed-tensors) or cutlass (torch).
///
/// Every weight keeps its value, and all its bits but for the sign of a zero: -0.0 in a converted matrix may become
/// +0.0. What is no 2:4 matrix is copied. A folder becomes a folder, with its config, tokenizer and other files, whose
/// config says how weights are stored. Shards become one file. The output appears complete or not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    paths: InOut,
    /// The form to store 2:4 matrices in.
    #[arg(long, value_name = "native|dense|bitmask|cutlass")]
    to: Layout,
    /// Convert only what this regular expression matches part of the name of.
    #[arg(long, value_name = "RE")]
    include: Option<Regex>,
    /// Leave as it is what this regular expression matches part of the name of.
    #[arg(long, value_name = "RE")]
    exclude: Option<Regex>,
    #[command(flatten)]
    json: Json,
}

/// What became of one tensor, or of one matrix that is stored as several.
#[derive(Serialize)]
struct Row {
    name: String,
    /// As [`Stored::name`] has it.
    from: &'static str,
    to: &'static str,
    /// Why it is not stored in the form that was asked for, where that is not plain to see.
    note: Option<&'static str>,
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    command: String,
    input: String,
    output: String,
    to: &'static str,
    converted: usize,
    tensors: Vec<Row>,
    /// Files of the old folder that the new one does not have.
    left_out: Vec<String>,
    bytes_before: u64,
    bytes_after: u64,
}

/// Why a matrix that was selected does not get the form that was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    Not24,
    InByOut,
    OtherType,
}

impl Note {
    const ALL: [Self; 3] = [Self::Not24, Self::InByOut, Self::OtherType];

    const fn text(self) -> &'static str {
        match self {
            Self::Not24 => "not 2:4",
            Self::InByOut => "stored as in x out",
            Self::OtherType => "of a type that 2:4 matrices do not have",
        }
    }
}

/// What is to become of an item, and why not what was asked for.
struct Plan {
    action: Action,
    note: Option<Note>,
}

impl From<Action> for Plan {
    fn from(action: Action) -> Self {
        Self { action, note: None }
    }
}

/// What is known of a model beside its tensors.
struct Facts {
    claim: Option<SparsityClaim>,
    /// The names of matrices that are stored as in x out.
    in_by_out: BTreeSet<String>,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let (input, output) = args.paths.get()?;
    args.json.file()?;
    let source = Source::open(input)?;
    // Nothing is lost by taking the place of the input, but a shard belongs to others.
    let model = rewrite::create(input, &source, output, true)?;
    // Now, as the output may take the place of the input.
    let bytes_before = rewrite::bytes_of(&source)?;
    let facts = Facts {
        claim: if input.is_dir() { SparsityClaim::of(input)? } else { None },
        in_by_out: in_by_out(&source, config_of(input)?.as_ref()),
    };
    let bar = progress(2 * source.items().count());
    let (mut actions, mut notes) = (Vec::new(), Vec::new());
    for item in source.items() {
        bar.set_message(printable(&item.name).into_owned());
        let Plan { action, note } = args.plan(&source, &facts, item)?;
        actions.push((item, action));
        notes.push(note);
        bar.inc(1);
    }
    let written = model.write(&source, args.to, &actions, &[], |item, action| {
        bar.inc(1);
        match action {
            Action::Dense => source.dense(item).map(Content::Dense),
            _ => args.read(&source, item).map(Content::Sparse24),
        }
    })?;
    bar.finish_and_clear();
    rewrite::say_lost(&written);

    let row = |((item, action), note): (&(&Item, Action), &Option<Note>)| Row {
        name: item.name.clone(),
        from: item.stored.name(),
        to: action.stored(item, args.to).name(),
        note: note.map(Note::text),
    };
    let report = Report {
        schema: "sparse24-convert/1",
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(),
        input: input.display().to_string(),
        output: output.display().to_string(),
        to: args.to.name(),
        converted: actions.iter().filter(|(_, action)| !matches!(action, Action::Copy)).count(),
        tensors: actions.iter().zip(&notes).map(row).collect(),
        left_out: written.left_out.iter().map(|left| left.path.display().to_string()).collect(),
        bytes_before,
        bytes_after: written.bytes,
    };
    let already = source.items().filter(|item| item.stored == args.to.stored() && args.selects(&item.name)).count();
    if report.converted == 0 && args.to != Layout::Dense && already == 0 {
        say(&format!(
            "warning: nothing was converted{}; the output is a copy",
            of_notes(&notes).map_or_else(String::new, |notes| {
                format!(": {notes} of {}", many(actions.len(), "tensor", "tensors"))
            })
        ));
    }
    args.json.emit(&report.text(&actions, &notes), &report)?;
    Ok(Outcome::Fine)
}

/// How many matrices there is a note of, such as `not 2:4: 2 matrices`.
fn of_notes(notes: &[Option<Note>]) -> Option<String> {
    let of = |note: Note| notes.iter().filter(|n| **n == Some(note)).count();
    let texts: Vec<_> = Note::ALL
        .into_iter()
        .filter(|&note| of(note) > 0)
        .map(|note| format!("{}: {}", note.text(), many(of(note), "matrix", "matrices")))
        .collect();
    (!texts.is_empty()).then(|| texts.join(", "))
}

impl Report {
    fn text(&self, actions: &[(&Item, Action)], notes: &[Option<Note>]) -> String {
        let tensors = |n| many(n, "tensor", "tensors");
        // Decoded to what it was before it was stored as a bitmask of any number of non-zeros.
        let decoded = match self.to {
            "dense" => 0,
            _ => actions.iter().filter(|(_, action)| matches!(action, Action::Dense)).count(),
        };
        let matrices = actions.iter().all(|(item, action)| matches!(action, Action::Copy) || item.matrix().is_some());
        let counted = |n| {
            if matrices || self.to != "dense" { many(n, "matrix", "matrices") } else { many(n, "tensor", "tensors") }
        };
        format!(
            "{}: {} to {}{}, {} as before{}; {} before, {} after\n",
            printable(&self.output),
            counted(self.converted - decoded),
            self.to,
            if decoded > 0 { format!(", {} to dense", tensors(decoded)) } else { String::new() },
            tensors(self.tensors.len() - self.converted),
            of_notes(notes).map_or_else(String::new, |notes| format!(" ({notes})")),
            size(self.bytes_before),
            size(self.bytes_after),
        )
    }
}

impl Args {
    fn selects(&self, name: &str) -> bool {
        self.include.as_ref().is_none_or(|re| re.is_match(name))
            && self.exclude.as_ref().is_none_or(|re| !re.is_match(name))
    }

    fn plan(&self, source: &Source, facts: &Facts, item: &Item) -> Result<Plan> {
        if !self.selects(&item.name) {
            return Ok(Action::Copy.into());
        }
        if item.stored == self.to.stored() {
            if item.stored.claims() && item.spec24().is_some() {
                source.sparse24_bytes(item)?;
            }
            return Ok(Action::Copy.into());
        }
        if self.to == Layout::Dense {
            return Ok(Action::Dense.into());
        }
        // What may have any number of non-zeros: nobody said by its form that it is 2:4.
        let any = matches!(item.stored, Stored::Dense | Stored::SparseBitmask);
        // Decoded, as no other form has a place for it, and few programs read this one.
        let otherwise = || if item.stored == Stored::SparseBitmask { Action::Dense } else { Action::Copy };
        let noted = |note: Note| Ok(Plan { action: otherwise(), note: Some(note) });
        if item.matrix().is_none() {
            return Ok(otherwise().into());
        }
        let Some(mut spec) = item.spec24() else { return noted(Note::OtherType) };
        if facts.in_by_out.contains(&item.name) {
            if any {
                return noted(Note::InByOut);
            }
            let reason = format!(
                "is stored as in x out, with a mask: {} has no place for that; convert --to dense, or --exclude it",
                self.to
            );
            return Err(Error::invalid(reason).in_tensor(source.path_of(item), &item.name).into());
        }
        if any {
            // Less than a whole group has no pattern, and an empty matrix nothing to save.
            if spec.m == 0 || spec.k < 4 {
                return Ok(otherwise().into());
            }
            match self.read(source, item) {
                Ok(s) => spec.vector = self.said(item, &s),
                Err(e) => {
                    let claimed = || facts.claim.as_ref().map_or(Ok(false), |claim| claim.covers(item));
                    return if e.is_over_full() && !claimed()? { noted(Note::Not24) } else { Err(e.into()) };
                }
            }
        } else if self.to == Layout::Native && item.vector.is_none() {
            // What the file says is believed here, and checked when it is written.
            spec.vector = self.said(item, &self.read(source, item)?);
        }
        // Whether the layout has a place for it.
        self.to.specs(&spec).map_err(|e| e.in_tensor(source.path_of(item), &item.name))?;
        Ok(Action::Compress(spec).into())
    }

    /// An item as it will be written: for our own format with the longest vector, if the file does not say which.
    fn read(&self, source: &Source, item: &Item) -> Result<Sparse24<Bytes>, Error> {
        if self.to == Layout::Native { source.widest24(item) } else { source.sparse24_bytes(item) }
    }

    /// The vector length to be written down: only what was said, or found for our own format.
    fn said(&self, item: &Item, s: &Sparse24<Bytes>) -> Option<VectorLen> {
        if self.to == Layout::Native { Some(s.vector()) } else { item.vector }
    }
}
