//! `sparse24 embed`: texts in, one JSON line with an embedding each out.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::{DASH, name_of, read_lines};
use super::{Outcome, model, print, progress, writable};
use sparse24::io::write_atomically;

/// Turn texts into embeddings with an encoder (BERT, MPNet), dense or 2:4.
///
/// Prints one line of JSON per text, {"text": ..., "embedding": [...]}. A folder of Sentence Transformers says by its
/// modules.json how an embedding is made of a text's last hidden states (pooling, Dense, LayerNorm, Normalize), and
/// which prompt is put in front of a text; without that file it is the mean over the tokens, divided by its Euclidean
/// length. An empty text is embedded too: it has the tokens [CLS] and [SEP].
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 embed --model model/minilm --text 'The cat sat on the mat.'
  sparse24 embed model/minilm --sparsity 2:4 --vector 32 --input texts.txt --out embeddings.jsonl
  cut -f 2 notes.tsv | sparse24 embed model/minilm --device cpu --input - > embeddings.jsonl")]
#[command(group = clap::ArgGroup::new("texts").required(true).args(["text", "input"]))]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::ModelArgs,
    #[command(flatten)]
    sparsity: model::SparsityArgs,
    /// Texts to embed; `--text=-5` for one that starts with a dash.
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    text: Vec<String>,
    /// File with a text on each line, UTF-8; `-` for stdin.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Write the lines to this file instead of stdout, which `-` stands for.
    #[arg(long, visible_alias = "json", value_name = "FILE.jsonl|-", num_args = 0..=1, default_missing_value = DASH)]
    out: Option<PathBuf>,
}

/// One line of the output.
#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    embedding: &'a [f32],
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let sparsity = args.sparsity.get()?;
    let out = args.out.as_deref().filter(|out| *out != Path::new(DASH));
    let out = out.map(writable).transpose().context("--out")?;
    let texts = match &args.input {
        None => args.text.clone(),
        Some(input) => read_lines(input)?,
    };
    let name = |text: usize| match args.input.as_deref() {
        None => format!("text {}", text + 1),
        Some(input) => format!("{}: line {}", name_of(input), text + 1),
    };
    let encoder = args.model.open(sparsity)?;
    let bar = progress(texts.len());
    let embed = |write: &mut dyn FnMut(&str) -> Result<()>| -> Result<model::Passed> {
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
    let passed = match &out {
        None => embed(&mut print)?,
        Some(path) => {
            let mut result = Ok(model::Passed::default());
            let written = write_atomically(path, |file| {
                result = embed(&mut |text| Ok(file.write_all(text.as_bytes())?));
                // Only that it failed: why is in `result`.
                result.as_ref().map(|_| ()).map_err(|_| std::io::ErrorKind::Other.into())
            });
            let passed = result?;
            written?;
            passed
        }
    };
    bar.finish_and_clear();
    encoder.warn_of_truncation(passed.truncated, texts.len());
    Ok(Outcome::Fine)
}
