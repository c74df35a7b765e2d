//! The binary as its users run it: arguments and stdin in; stdout, stderr and an exit code out.
//!
//! The environment of the tests does not decide how a run ends: there is no graphics driver, and none of the variables
//! that say what the binary is to do. The user's folders stay. A run that ends in another way than a test expects is
//! shown with its command line and all that it printed.

#![allow(dead_code, reason = "each test file includes this and uses its own part")]

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// The binary, for tests that start it by way of another program.
pub(crate) const SPARSE24: &str = env!("CARGO_BIN_EXE_sparse24");

/// How a run ended.
#[must_use]
#[derive(Debug, Default)]
pub(crate) struct Ran {
    pub(crate) command: String,
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Stdout and stderr of a run that ended with `code`.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> (String, String) {
        assert_eq!(self.code, code, "{}\nstdout: {}\nstderr: {}", self.command, self.stdout, self.stderr);
        (self.stdout, self.stderr)
    }

    /// Stdout of a run that was fine and said this on stderr, which is a pipe here: no progress bar either.
    #[track_caller]
    pub(crate) fn noted(self, note: &str) -> String {
        let command = self.command.clone();
        let (stdout, stderr) = self.exits(0);
        assert_eq!(stderr, note, "{command}\nstdout: {stdout}");
        stdout
    }

    /// Stdout of a run that was fine and had nothing to say on stderr.
    #[track_caller]
    pub(crate) fn fine(self) -> String {
        self.noted("")
    }

    /// That stdout, as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.fine()).unwrap()
    }

    /// Stderr of a run that ended with `code` (2: a wrong command line) before it printed any result.
    #[track_caller]
    pub(crate) fn refused(self, code: i32) -> String {
        let command = self.command.clone();
        let (stdout, stderr) = self.exits(code);
        assert_eq!(stdout, "", "{command}\nstderr: {stderr}");
        stderr
    }
}

pub(crate) trait Run {
    /// Runs to the end, without stdin unless the command has one.
    fn run(&mut self) -> Ran;
    /// Runs to the end on this stdin.
    fn run_on(&mut self, stdin: &[u8]) -> Ran;
}

impl Run for Command {
    #[track_caller]
    fn run(&mut self) -> Ran {
        ended(self, |command| command.output())
    }

    #[track_caller]
    fn run_on(&mut self, stdin: &[u8]) -> Ran {
        ended(self.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()), |command| {
            let mut child = command.spawn()?;
            // Gone before the end of the input where the command refuses its arguments.
            let _ = child.stdin.take().unwrap().write_all(stdin);
            child.wait_with_output()
        })
    }
}

#[track_caller]
fn ended(command: &mut Command, run: impl FnOnce(&mut Command) -> std::io::Result<std::process::Output>) -> Ran {
    let output = run(command).unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (command, stdout, stderr) = (format!("{command:?}"), text(output.stdout), text(output.stderr));
    let code = output.status.code().unwrap_or_else(|| panic!("{command}: {}\n{stderr}", output.status));
    Ran { command, code, stdout, stderr }
}

/// Takes graphics drivers, and variables that say what to do, from a command.
pub(crate) fn isolated(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let decides = ["SPARSE24_", "HF_", "VK_", "CLICOLOR", "NO_COLOR"];
        if name.to_str().is_some_and(|name| decides.iter().any(|prefix| name.starts_with(prefix))) {
            command.env_remove(name);
        }
    }
    command.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent")
}

/// Runs the binary with these arguments.
#[track_caller]
pub(crate) fn sparse24<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    command(arguments).run()
}

/// The binary with these arguments, no stdin, and what [`isolated`] leaves of the environment.
pub(crate) fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = with_drivers(arguments);
    isolated(command.env_remove("SPARSE24_CACHE"));
    command
}

/// The same with all of the environment, and so with the drivers of this machine. Kernels that it compiles are kept
/// with the tests' files, and not in the user's folder.
pub(crate) fn with_drivers<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(SPARSE24);
    command.args(arguments).stdin(Stdio::null());
    command.env("SPARSE24_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"));
    command
}

/// A script of `sh` in which "$0" is the binary, and "$@" what is added as arguments; isolated like [`command`].
pub(crate) fn script(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, SPARSE24]).stdin(Stdio::null());
    isolated(&mut command);
    command
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
