//! `sparse24 report`: files of results → one page. Reading and checking is [`file`](sparse24::report::file)'s, the
//! page is [`page`](sparse24::report::page)'s.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::args::{DASH, Usage, ensure_usage, name_of, open};
use super::{Outcome, print, say, writable};
use sparse24::io::write_atomically;
use sparse24::report::file::File;
use sparse24::report::page::{Page, PageInput};

/// Put results of one or many machines, runs and programs on one page: speedups, ceilings, models end to end,
/// accuracy, losing rows.
///
/// Takes the JSON of `bench`, `eval`, `perplexity`, `prune`, `retrain`, `sensitivity` and `kernels --compile`, and of
/// the scripts in benches/peers. Each file is checked first; the page is written whole or not at all. Two runs of one
/// machine that hold the same rows stand side by side: give them names with @RUN, or they go by what differs between
/// them, such as the commit or the date. Of absolute paths in commands the page shows the last part.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 report run.json --out report.html
  sparse24 report @before=old.json @after=new.json --out change.html
  sparse24 report laptop=a.json server=b.json numpy.json --out report.html
  sparse24 report run.json minilm.json *.eval.json *.prune.json *.train.json --out report.md
  sparse24 bench --json | sparse24 report - --out - > report.html

Exit code 3: a row in the files failed verification. The page says which, and is written.")]
pub(crate) struct Args {
    /// Files of results; `-` is stdin. MACHINE= in front names the machine, which else goes by its device's name and
    /// threads; @RUN= names the run, MACHINE@RUN= both.
    #[arg(value_name = "[MACHINE][@RUN]=FILE.json", required = true)]
    files: Vec<String>,
    /// The page: .html is one file that needs no other; .md has its pictures beside it, as NAME-*.svg. `-` is stdout,
    /// where Markdown has no pictures.
    #[arg(long, value_name = "FILE.html|FILE.md|-")]
    out: PathBuf,
    /// The form of the page, where the name of --out does not say it; html on stdout unless given.
    #[arg(long)]
    format: Option<Format>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Html,
    Md,
}

impl Args {
    /// The form that the options ask for.
    fn form(&self) -> Result<Format> {
        let named = match self.out.extension().and_then(|e| e.to_str()) {
            Some("html") => Some(Format::Html),
            Some("md") => Some(Format::Md),
            _ if self.out == Path::new(DASH) => self.format.or(Some(Format::Html)),
            _ => None,
        };
        let out = self.out.display();
        match (self.format, named) {
            (Some(asked), Some(named)) => {
                ensure_usage!(asked == named, "--format: {out} has the name of another form");
                Ok(asked)
            }
            (Some(form), None) | (None, Some(form)) => Ok(form),
            (None, None) => Err(Usage::error(format!("--out: {out} ends in neither .html nor .md: give --format"))),
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let form = args.form()?;
    let given: Vec<_> = args.files.iter().map(|file| Given::of(file)).collect();
    let dashes = given.iter().filter(|given| given.path == Path::new(DASH)).count();
    ensure_usage!(dashes < 2, "stdin can be read once: {dashes} of the files are `-`");
    let out = if args.out == Path::new(DASH) { None } else { Some(writable(&args.out).context("--out")?) };
    let inputs: Vec<_> = given.into_iter().map(Given::read).collect::<Result<_>>()?;
    let read = |file: &str| Given::of(file).path.canonicalize().is_ok_and(|path| Some(path) == out);
    ensure_usage!(!args.files.iter().any(|file| read(file)), "--out: {} is to be read and written", args.out.display());
    let page = Page::new(&inputs)?;
    match (out, form) {
        (None, Format::Html) => print(&page.html()?)?,
        (None, Format::Md) => print(&page.markdown_alone()?)?,
        (Some(out), Format::Html) => write(&[(out, page.html()?)])?,
        (Some(out), Format::Md) => {
            let stem = args.out.file_stem().and_then(|s| s.to_str()).context("--out: the name is not UTF-8")?;
            let (text, pictures) = page.markdown(stem)?;
            let beside = |(name, picture): (String, String)| {
                Ok::<_, anyhow::Error>((writable(&out.with_file_name(name)).context("--out")?, picture))
            };
            let mut files = pictures.into_iter().map(beside).collect::<Result<Vec<_>>>()?;
            // The page comes last: where it is there, so are its pictures.
            files.push((out.clone(), text));
            write(&files)?;
        }
    }
    for failure in page.failures() {
        say(&format!("failed: {failure}"));
    }
    Ok(if page.failures().is_empty() { Outcome::Fine } else { Outcome::VerificationFailed })
}

fn write(files: &[(PathBuf, String)]) -> Result<()> {
    for (path, text) in files {
        write_atomically(path, |file| file.write_all(text.as_bytes()))?;
    }
    Ok(())
}

/// A file as it was given.
struct Given<'a> {
    machine: Option<String>,
    run: Option<String>,
    path: &'a Path,
}

impl<'a> Given<'a> {
    /// With or without names for its machine and its run. A file whose own name has a `=` in it comes first.
    fn of(argument: &'a str) -> Self {
        let named = argument.split_once('=').filter(|(names, _)| !names.is_empty() && !Path::new(argument).exists());
        let Some((names, path)) = named else {
            return Self { machine: None, run: None, path: Path::new(argument) };
        };
        let (machine, run) = names.split_once('@').unwrap_or((names, ""));
        let name = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        Self { machine: name(machine), run: name(run), path: Path::new(path) }
    }

    fn read(self) -> Result<PageInput> {
        let name = name_of(self.path);
        let mut text = String::new();
        open(self.path)?.read_to_string(&mut text).with_context(|| name.clone())?;
        let file = File::parse(&text).with_context(|| name.clone())?;
        Ok(PageInput { name, machine: self.machine, run: self.run, file })
    }
}
