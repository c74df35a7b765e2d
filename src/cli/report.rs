//! `sparse24 report`: files of results → one page. Reading and checking is [`file`](sparse24::report::file)'s, the
//! page is [`page`](sparse24::report::page)'s.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Outcome, say, writable};
use sparse24::io::write_atomically;
use sparse24::report::file::File;
use sparse24::report::page::{Input, Page};

/// Put runs of one or many machines and programs on one page: speedups, ceilings, models end to end, losing rows.
///
/// Takes what `bench --out`, `bench --model --out`, `eval --json` and `prune --json` write, and the files of the
/// scripts in benches/peers. Each is checked first; the page is written whole or not at all.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 report run.json --out report.html
  sparse24 report laptop=a.json server=b.json numpy.json --out report.html
  sparse24 report run.json minilm.json *.eval.json *.prune.json --out report.md

Exit code 3: a row in the files failed verification. The page says which, and is written.")]
pub(crate) struct Args {
    /// Files of results. MACHINE= in front names the machine, which else goes by its device's name and threads.
    #[arg(value_name = "[MACHINE=]FILE.json", required = true)]
    files: Vec<String>,
    /// The page: .html is one file that needs no other; .md has its pictures beside it, as NAME-*.svg.
    #[arg(long, value_name = "FILE.html|FILE.md")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let markdown = match args.out.extension().and_then(|e| e.to_str()) {
        Some("html") => false,
        Some("md") => true,
        _ => bail!("--out: {} ends in neither .html nor .md", args.out.display()),
    };
    let out = writable(&args.out).context("--out")?;
    let inputs: Vec<_> = args.files.iter().map(|file| input(file)).collect::<Result<_>>()?;
    let page = Page::new(&inputs)?;
    let mut files = Vec::new();
    if markdown {
        let stem = args.out.file_stem().and_then(|s| s.to_str()).context("--out: the name is not UTF-8")?;
        let (text, pictures) = page.markdown(stem)?;
        for (name, picture) in pictures {
            files.push((writable(&out.with_file_name(name)).context("--out")?, picture));
        }
        files.push((out, text));
    } else {
        files.push((out, page.html()?));
    }
    // The page comes last: where it is there, so are its pictures.
    for (path, text) in &files {
        write_atomically(path, |file| file.write_all(text.as_bytes()))?;
    }
    for failure in page.failures() {
        say(&format!("failed: {failure}"));
    }
    Ok(if page.failures().is_empty() { Outcome::Fine } else { Outcome::VerificationFailed })
}

/// A file with or without a name for its machine. A file whose own name has a `=` in it comes first.
fn input(argument: &str) -> Result<Input> {
    let (machine, path) = match argument.split_once('=') {
        Some((name, path)) if !name.is_empty() && !Path::new(argument).exists() => (Some(name.to_owned()), path),
        _ => (None, argument),
    };
    let file = File::open(Path::new(path))?;
    Ok(Input { name: path.to_owned(), machine, file })
}
