//! Commands that are ended while they write: nothing is left behind, and what a killed one left is removed by the next.
//!
//! `prune --calibration -` has begun its folder when it reads its texts, so it waits there for as long as a test likes.

#![cfg(all(feature = "cli", unix))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use binary::{Run, command, script};
use tempfile::TempDir;
use tiny_bert::TinyBert;

/// Texts that a tiny BERT can be calibrated with.
const TEXTS: &[u8] = b"the cat sat on the mat .\nthe dog ran .\n";

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn hidden(dir: &Path) -> Vec<String> {
    names_in(dir).into_iter().filter(|name| name.starts_with('.')).collect()
}

/// The hidden folder that is there as soon as there is one more.
fn begun(dir: &Path, before: &[String]) -> String {
    let began = Instant::now();
    loop {
        if let Some(folder) = hidden(dir).into_iter().find(|name| !before.contains(name)) {
            return folder;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "no folder was begun");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A run of `prune` that waits for its texts, and the name of the folder that it has begun.
struct Waiting {
    child: Child,
    folder: String,
}

impl Waiting {
    /// Starts one that is to write `out`, by way of `sh`, which runs `first` before it becomes the command.
    fn start(dir: &Path, out: &str, first: &str) -> Self {
        let before = hidden(dir);
        let mut command = script(&format!("{first}; exec \"$0\" \"$@\""));
        command.args(["prune", "model", out, "--method", "wanda", "--calibration", "-", "--device", "cpu"]);
        command.current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.spawn().unwrap(), folder: begun(dir, &before) }
    }

    fn signal(&self, name: &str) {
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.child.id())]).status().unwrap();
        assert!(status.success());
    }

    /// Gives it its texts, with which it is done soon.
    fn finish(mut self) {
        self.child.stdin.take().unwrap().write_all(TEXTS).unwrap();
        let ended = self.child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
}

fn place() -> TempDir {
    let dir = TempDir::new().unwrap();
    TinyBert::new(3).write(&dir.path().join("model"));
    dir
}

/// Whether this test was started by something that ignores a signal, as shells do with SIGINT for what they run in the
/// background. Its children ignore it, too.
fn ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() >> (signal - 1) & 1 == 1)
}

#[test]
fn a_signal_leaves_nothing_and_is_what_ended_it() {
    let dir = place();
    for (name, number) in [("HUP", 1), ("INT", 2), ("TERM", 15)] {
        if ignored(number) {
            continue;
        }
        let mut waiting = Waiting::start(dir.path(), "out", ":");
        // Held open until it has ended: the end of the texts is another reason to end.
        let texts = waiting.child.stdin.take();
        waiting.signal(name);
        let ended = waiting.child.wait_with_output().unwrap();
        drop(texts);
        assert_eq!((ended.status.signal(), ended.status.code()), (Some(number), None), "{name}");
        assert_eq!((ended.stdout, String::from_utf8(ended.stderr).unwrap()), (vec![], String::new()), "{name}");
        assert_eq!(names_in(dir.path()), ["model"], "{name}");
    }
}

#[test]
fn what_is_ignored_stays_ignored() {
    let dir = place();
    // As `nohup` starts it.
    let waiting = Waiting::start(dir.path(), "out", "trap '' HUP");
    waiting.signal("HUP");
    waiting.finish();
    assert_eq!(names_in(dir.path()), ["model", "out"]);
}

#[test]
fn the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one() {
    let dir = place();
    let killed = Waiting::start(dir.path(), "killed", ":");
    let living = Waiting::start(dir.path(), "living", ":");
    killed.signal("KILL");
    let Waiting { child, folder } = killed;
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(9));
    assert!(dir.path().join(&folder).is_dir(), "it could not remove it");
    let mut both = vec![folder, living.folder.clone()];
    both.sort();
    assert_eq!(hidden(dir.path()), both);

    // Whatever is written there: a single file, too.
    let convert = ["convert", "model/model.safetensors", "copy.safetensors", "--to", "dense"];
    command(convert).current_dir(dir.path()).run().exits(0);
    assert_eq!(hidden(dir.path()), std::slice::from_ref(&living.folder));
    living.finish();
    assert_eq!(names_in(dir.path()), ["copy.safetensors", "living", "model"]);
}
