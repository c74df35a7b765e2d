//! `sparse24 completions` and `sparse24 man`: what a shell and `man` want to know, written from the grammar that parses
//! the command line, so that neither can fall behind it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Outcome, print};
use sparse24::io::write_atomically;
use sparse24::report::plural;

/// Print a completion script for a shell.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 completions bash > ~/.local/share/bash-completion/completions/sparse24
  sparse24 completions zsh > ~/.zfunc/_sparse24    # with ~/.zfunc in $fpath
  sparse24 completions fish > ~/.config/fish/completions/sparse24.fish
  sparse24 completions powershell >> $PROFILE")]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Print the man page, or write the pages of all commands to a folder.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 man | man -l -
  sparse24 man ~/.local/share/man/man1    # then: man sparse24-bench")]
pub(crate) struct Pages {
    /// Folder for one page per command, made if it is not there. Without it the main page goes to stdout.
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

pub(super) fn completions(args: &Completions, mut grammar: Command) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut grammar, env!("CARGO_PKG_NAME"), &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(Outcome::Fine)
}

pub(super) fn pages(args: &Pages, grammar: Command) -> Result<Outcome> {
    let mut grammar = grammar.disable_help_subcommand(true);
    // Gives each command its whole name, such as `sparse24-bench`.
    grammar.build();
    let Some(folder) = &args.folder else {
        print(&page(grammar)?.1)?;
        return Ok(Outcome::Fine);
    };
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let commands: Vec<_> = grammar.get_subcommands().filter(|c| !c.is_hide_set()).cloned().collect();
    let mut written = 0;
    for command in [grammar].into_iter().chain(commands) {
        let (name, text) = page(command)?;
        write_atomically(Path::new(folder).join(name), |file| file.write_all(text.as_bytes()))?;
        written += 1;
    }
    print(&format!("{} in {}\n", plural(written, "page"), folder.display()))?;
    Ok(Outcome::Fine)
}

/// The name and the text of a command's page.
fn page(command: Command) -> Result<(String, String)> {
    let page = Man::new(command).source(concat!("sparse24 ", env!("CARGO_PKG_VERSION"))).manual("sparse24 manual");
    let mut text = Vec::new();
    page.render(&mut text)?;
    Ok((page.get_filename(), String::from_utf8(text)?))
}
