//! `sparse24 embed`: texts in, one JSON line with an embedding each out.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::{name_of, read_lines};
use super::{Outcome, model, print, progress, writable};
use sparse24::io::write_atomically;

/// Turn texts into embeddings with a BERT, dense or 2:4.
///
/// Prints one line of JSON per text, {"text": ..., "embedding": [...]}: the mean of the last hidden states of the text's
/// tokens, divided by its length. An empty text is embedded too: it has the tokens [CLS] and [SEP].
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 embed --model model/minilm --text 'The cat sat on the mat.'
  sparse24 embed --model model/minilm --sparsity 32:2:4 --input texts.txt --out embeddings.jsonl
  cut -f 2 notes.tsv | sparse24 embed --model model/minilm --device cpu --input - > embeddings.jsonl")]
#[command(group = clap::ArgGroup::new("texts").required(true).args(["text", "input"]))]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::ModelArgs,
    /// Texts to embed; `--text=-5` for one that starts with a dash.
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    text: Vec<String>,
    /// File with a text on each line, UTF-8; `-` for stdin.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Write the lines to this file instead of stdout.
    #[arg(long, value_name = "FILE.jsonl")]
    out: Option<PathBuf>,
}

/// One line of the output.
#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    embedding: &'a [f32],
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let out = args.out.as_deref().map(writable).transpose().context("--out")?;
    let texts = match &args.input {
        None => args.text.clone(),
        Some(input) => read_lines(input)?,
    };
    let name = |text: usize| match args.input.as_deref() {
        None => format!("text {}", text + 1),
        Some(input) => format!("{}: line {}", name_of(input), text + 1),
    };
    let encoder = args.model.open()?;
    let bar = progress(texts.len());
    let embed = |write: &mut dyn FnMut(&str) -> Result<()>| -> Result<usize> {
        encoder.windows(&texts, &bar, &name, |texts, embeddings| {
            let numbers = embeddings.elements().to_f32();
            let mut text = String::new();
            for (of, embedding) in texts.iter().zip(numbers.chunks_exact(embeddings.cols())) {
                text += &serde_json::to_string(&Line { text: of, embedding })?;
                text.push('\n');
            }
            write(&text)
        })
    };
    let truncated = match &out {
        None => embed(&mut print)?,
        Some(path) => {
            let mut result = Ok(0);
            let written = write_atomically(path, |file| {
                result = embed(&mut |text| Ok(file.write_all(text.as_bytes())?));
                // Only that it failed: why is in `result`.
                result.as_ref().map(|_| ()).map_err(|_| std::io::ErrorKind::Other.into())
            });
            let truncated = result?;
            written?;
            truncated
        }
    };
    bar.finish_and_clear();
    encoder.warn_of_truncation(truncated, texts.len());
    Ok(Outcome::Fine)
}
