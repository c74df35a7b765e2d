//! The README's shell commands, every one, in their order, as a new user on a machine without a GPU runs them.
//!
//! Blocks are marked ```` ```sh ````. What a machine may lack stands behind that: `sh network`, `sh gpu`; what takes
//! many minutes is `sh slow`. Those are only looked at. Stand-ins make the rest quick: `cargo run --release` is this
//! build of the binary, `model/minilm` a small BERT, and `model/smollm2` a small Llama whose tokens are letters. `bash
//! tests/run.sh` is what runs this test, so it is not run here. (The README's Rust runs as a doctest.)

#![cfg(all(feature = "cli", unix))]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it ran")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;
#[path = "common/tiny_llama.rs"]
mod tiny_llama;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use binary::{Run, SPARSE24, isolated};
use tiny_bert::TinyBert;

const README: &str = include_str!("../README.md");
/// What may stand behind ```` ```sh ````.
const MARKS: [&str; 4] = ["", "network", "gpu", "slow"];

/// The lines of each shell block with its mark.
fn blocks() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut blocks = Vec::new();
    let mut open: Option<(&str, Vec<&str>)> = None;
    for line in README.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(info), None) => open = Some((info, Vec::new())),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block of the README has no end");
    let shell = |(info, lines): (&'static str, Vec<_>)| Some((info.strip_prefix("sh")?.trim(), lines));
    blocks.into_iter().filter_map(shell).collect()
}

/// Commands of a block; one that ends in a backslash goes on in the next line.
fn commands(lines: &[&str]) -> Vec<String> {
    let joined = lines.join("\n").replace("\\\n", " ");
    joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn every_command_of_the_readme_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    // A clone, as far as commands read it.
    for name in ["tests", "benches", "src", "shaders", "Cargo.toml", "README.md"] {
        symlink(root.join(name), at.join(name)).unwrap();
    }
    fs::create_dir(at.join("model")).unwrap();
    TinyBert::new(24).write(&at.join("model/minilm"));
    tiny_llama::write("llama", &at.join("model/smollm2"));
    let bin = at.join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(SPARSE24, bin.join("sparse24")).unwrap();
    let cargo = bin.join("cargo");
    let shim = "#!/bin/sh\n[ \"$1 $2\" = 'run --release' ] || { echo \"not a command of this test: cargo $*\" >&2; exit 99; }\n\
                shift 2; [ \"$1\" != -- ] || shift\nexec sparse24 \"$@\"\n";
    fs::write(&cargo, shim).unwrap();
    fs::set_permissions(&cargo, PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());

    let mut ran = 0;
    for (mark, lines) in blocks() {
        assert!(MARKS.contains(&mark), "a block of the README is marked {mark:?}");
        for command in commands(&lines) {
            if !mark.is_empty() || command.starts_with("bash tests/run.sh") {
                eprintln!("not run ({mark}): {command}");
                continue;
            }
            let started = Instant::now();
            let mut bash = Command::new("bash");
            isolated(bash.args(["-euo", "pipefail", "-c", &command]).current_dir(at).stdin(Stdio::null()));
            let run = bash.env("PATH", &path).env("XDG_CACHE_HOME", at.join("cache")).run();
            eprintln!("{:6.1} s: {command}", started.elapsed().as_secs_f64());
            // Between two runs of a busy machine more may lie than their noise tells.
            let slower = command.contains("--fail-slower")
                && run.code == 3
                && run.stderr.contains("slower: ")
                && !run.stderr.contains("failed: ");
            if !slower {
                run.exits(0);
            }
            ran += 1;
        }
    }
    assert!(ran >= 20, "only {ran} commands of the README ran");
}

/// Paths in the README's links and code, and the figures' files, are there.
#[test]
fn what_the_readme_links_to_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut links = 0;
    for target in README.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
        if !target.starts_with("http") && !target.starts_with('#') {
            assert!(root.join(target.split('#').next().unwrap()).exists(), "README links to {target}");
            links += 1;
        }
    }
    assert!(!README.contains("@@"), "a figure of the README is still to be filled in");
    assert!(links >= 3, "only {links} links");
}

/// A screen of 100 columns holds every line but those of tables, links and pictures, which cannot be broken.
#[test]
fn lines_of_the_readme_fit_a_screen() {
    for (number, line) in README.lines().enumerate() {
        let unbreakable = line.starts_with('|') || line.contains("](");
        assert!(unbreakable || line.chars().count() <= 100, "README line {}: {line}", number + 1);
    }
}
