//! What holds for every command of the binary: its help, its exit code for a wrong command line, and what is generated
//! from its grammar. The commands are those that `sparse24 --help` lists, so that a new one is tested, too.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips")]

#[path = "common/binary.rs"]
mod binary;

use std::path::Path;
use std::process::{Command, Stdio};

use binary::{Run, SPARSE24, command, sparse24};

/// How wide a terminal the help is written for.
const COLUMNS: usize = 100;

/// Commands that run as they are.
const COMPLETE: [&str; 7] = ["bench", "devices", "help", "kernels", "man", "tune", "web"];

fn help(arguments: &[&str]) -> String {
    sparse24([arguments, &["--help"]].concat()).exits(0).0
}

/// The names under `Commands:`, which are indented by two; the lines below are indented further.
fn commands() -> Vec<String> {
    let help = help(&[]);
    let (_, list) = help.split_once("\nCommands:\n").unwrap();
    let names = list.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
    let names: Vec<_> =
        names.filter(|line| !line.starts_with(' ')).filter_map(|l| l.split(' ').next()).map(str::to_owned).collect();
    for known in ["bench", "completions", "man", "prune", "report", "tune"] {
        assert!(names.iter().any(|name| name == known), "{known} is not in {names:?}");
    }
    names
}

/// The options in a help text, and whether they need a value.
fn options(help: &str) -> Vec<(String, bool)> {
    let option = |line: &str| {
        let line = line.trim_start();
        // `-h, --help` and `--json [<FILE|->]`.
        let long = line.strip_prefix("-h, ").or(line.strip_prefix("-V, ")).unwrap_or(line);
        let long = long.strip_prefix("--")?;
        let end = long.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(long.len());
        Some((format!("--{}", &long[..end]), long[end..].starts_with(" <")))
    };
    let (_, list) = help.split_once("\nOptions:\n").unwrap();
    // Indented by two, four or six; text of an option that begins with one is indented further.
    let indented = |line: &&str| line.len() - line.trim_start().len() <= 6;
    list.lines().take_while(|line| !line.starts_with("Examples")).filter(indented).filter_map(option).collect()
}

#[test]
fn every_help_fits_the_terminal_and_shows_examples() {
    for name in commands().iter().map(String::as_str).chain([""]) {
        let arguments: &[&str] = if name.is_empty() || name == "help" { &[] } else { &[name] };
        for flag in ["--help", "-h"] {
            let (text, stderr) = sparse24([arguments, &[flag]].concat()).exits(0);
            assert_eq!(stderr, "", "{name}");
            for line in text.lines() {
                assert!(line.chars().count() <= COLUMNS, "{name} {flag}: {line}");
            }
        }
        if arguments.is_empty() {
            continue;
        }
        let text = help(arguments);
        let (_, examples) = text.split_once("\nExamples:\n").unwrap_or_else(|| panic!("{name} has no examples"));
        let examples: Vec<_> = examples.lines().take_while(|line| !line.is_empty()).collect();
        assert!(examples.iter().any(|line| line.starts_with(&format!("  sparse24 {name}"))), "{name}: {examples:?}");
        for line in examples {
            // A line that was too long has been broken, and can no longer be copied.
            assert!(line.trim_start().starts_with('#') || line.contains("sparse24 "), "{name}: broken: {line}");
        }
    }
}

#[test]
fn every_wrong_command_line_exits_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str]| {
        let (stdout, stderr) = command(arguments).current_dir(folder.path()).run().exits(2);
        assert!(stdout.is_empty() && stderr.starts_with("error: "), "{arguments:?}: {stdout}{stderr}");
        stderr
    };
    assert!(refused(&["no-such-command"]).contains("no-such-command"));
    assert!(refused(&["--no-such-option"]).contains("--no-such-option"));
    for name in commands() {
        let name = name.as_str();
        if !COMPLETE.contains(&name) {
            assert!(refused(&[name]).contains("Usage: "), "{name}");
        }
        if name == "help" {
            continue;
        }
        assert!(refused(&[name, "--no-such-option"]).contains("--no-such-option"), "{name}");
        let options = options(&help(&[name]));
        assert!(options.contains(&("--help".into(), false)), "{name}: {options:?}");
        for (option, needs_value) in &options {
            if *needs_value {
                assert!(refused(&[name, option]).contains(option.as_str()), "{name} {option}");
            } else if !["--help", "--json"].contains(&option.as_str()) {
                assert!(refused(&[name, &format!("{option}=value")]).contains(option.as_str()), "{name} {option}");
            }
        }
        // The file of --json must not be mistaken for an input.
        if options.iter().any(|(option, _)| option == "--json") {
            assert!(refused(&[name, "--json=model.safetensors"]).contains("--json"), "{name}");
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn completions_know_every_command_and_option() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (script, stderr) = sparse24(["completions", shell]).exits(0);
        assert_eq!(stderr, "");
        for name in commands() {
            assert!(script.contains(&name), "{shell}: {name}");
            let options = if name == "help" { Vec::new() } else { options(&help(&[&name])) };
            for (option, _) in options {
                // Fish writes them without their dashes.
                assert!(script.contains(option.trim_start_matches('-')), "{shell}: {name} {option}");
            }
        }
    }
    let (_, stderr) = sparse24(["completions", "csh"]).exits(2);
    assert!(stderr.contains("bash") && stderr.contains("powershell"), "{stderr}");
}

/// Bash itself completes a command and an option.
#[test]
fn bash_takes_its_completions() {
    let script = sparse24(["completions", "bash"]).exits(0).0;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("script"), script).unwrap();
    let complete = |words: &str, at: usize, current: &str| {
        let run = format!(
            ". ./script; COMP_WORDS=({words}); COMP_CWORD={at}; _sparse24 sparse24 '{current}' ''; echo \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash").args(["--norc", "-c", &run]).current_dir(folder.path()).output();
        let Ok(output) = output else { return None };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(String::from_utf8(output.stdout).unwrap())
    };
    let Some(completed) = complete("sparse24 rep", 1, "rep") else {
        eprintln!("skipped: no bash");
        return;
    };
    assert_eq!(completed.trim(), "report");
    assert_eq!(complete("sparse24 tune --bu", 2, "--bu").unwrap().trim(), "--budget");
}

#[test]
fn every_command_has_its_man_page() {
    let (main, _) = sparse24(["man"]).exits(0);
    assert!(main.contains(".TH sparse24 1") && main.contains("sparse24\\-bench(1)"), "{main}");
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("share/man1");
    let (said, _) = command(["man", pages.to_str().unwrap()]).env("NO_COLOR", "1").run().exits(0);
    let mut expected: Vec<_> =
        commands().iter().filter(|name| *name != "help").map(|name| format!("sparse24-{name}.1")).collect();
    expected.push("sparse24.1".into());
    expected.sort();
    assert_eq!(said, format!("{} pages in {}\n", expected.len(), pages.display()));
    let mut names: Vec<_> =
        std::fs::read_dir(&pages).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, expected);
    assert_eq!(std::fs::read_to_string(pages.join("sparse24.1")).unwrap(), main);
    let read = |name: &str| std::fs::read_to_string(pages.join(name)).unwrap();
    let tune = read("sparse24-tune.1");
    assert!(tune.contains(".TH sparse24-tune 1") && tune.contains("\\-\\-budget"), "{tune}");
    for name in &names {
        assert!(!read(name).contains('\u{1b}'), "{name}: colours");
    }
    // A folder that is a file.
    let (_, stderr) = sparse24(["man", pages.join("sparse24.1").to_str().unwrap()]).exits(1);
    assert!(stderr.contains("sparse24.1"), "{stderr}");
}

#[test]
fn the_version_is_short_or_says_all_that_a_report_needs() {
    let (short, _) = sparse24(["-V"]).exits(0);
    assert_eq!(short, concat!("sparse24 ", env!("CARGO_PKG_VERSION"), "\n"));
    let (long, stderr) = command(["--version"]).env("SPARSE24_COMMIT", "0123abcd").run().exits(0);
    assert!(long.starts_with(&short) && stderr.is_empty(), "{long}{stderr}");
    let of = |name: &str| {
        let line = long.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_else(|| panic!("no {name} in {long}")).trim().to_owned()
    };
    assert_eq!(of("commit"), "0123abcd");
    assert!(of("features").split(", ").any(|feature| feature == "cli"));
    assert_eq!(of("features").contains("hub"), cfg!(feature = "hub"));
    assert!(sparse24::simd::SimdLevel::ALL.iter().any(|level| of("SIMD").starts_with(level.name())), "{long}");
    assert!(of("wgpu").starts_with("30."), "{long}");
    // Where git knows this tree, so does the version.
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).current_dir(tree).output();
    if let Some(git) = git.ok().filter(|git| git.status.success()) {
        let head = String::from_utf8(git.stdout).unwrap();
        let (long, _) = command(["--version"]).env_remove("SPARSE24_COMMIT").run().exits(0);
        assert!(long.contains(&format!("commit:   {}", head.trim())), "{long}");
    }
}

/// Colours are there for those who force them, and NO_COLOR is stronger.
#[test]
fn no_color_takes_the_colours_from_help_and_errors() {
    for (arguments, code) in [(&["--help"][..], 0), (&["tune", "--help"], 0), (&["report"], 2), (&["tune", "--x"], 2)] {
        let coloured = |no_color: &str| {
            let mut command = command(arguments);
            command.env("CLICOLOR_FORCE", "1").env("NO_COLOR", no_color).env("TERM", "xterm-256color");
            let (stdout, stderr) = command.run().exits(code);
            stdout.contains('\u{1b}') || stderr.contains('\u{1b}')
        };
        assert!(coloured(""), "{arguments:?}: no colours to be taken away");
        assert!(!coloured("1"), "{arguments:?}");
    }
}

/// A run on a terminal, which shows a progress bar.
#[cfg(target_os = "linux")]
#[test]
fn no_color_takes_the_colours_from_a_progress_bar() {
    let bench = format!("'{SPARSE24}' bench --device cpu --quick --shapes 256x256x256,128x128x128 --vector 1,32");
    let mut script = Command::new("script");
    script.args(["-qec", &bench, "/dev/null"]).env("NO_COLOR", "1").env("TERM", "xterm-256color");
    script.env("VK_DRIVER_FILES", "/nonexistent").stdin(Stdio::null());
    let Ok(output) = script.output() else {
        eprintln!("skipped: no `script`, which makes a terminal");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    // The bar moves the cursor, so that this is a terminal; `m` ends what sets a colour.
    assert!(output.status.success() && text.contains("\u{1b}["), "{text}");
    for command in text.split("\u{1b}[").skip(1) {
        let end = command.find(|c: char| c.is_ascii_alphabetic()).unwrap();
        assert!(!command[end..].starts_with('m'), "a colour: {command:?}");
    }
}
