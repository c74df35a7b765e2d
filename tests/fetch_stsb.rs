//! tests/fetch-stsb.sh on downloads of every kind that it reads, made up here.
//!
//! It needs bash and python3; where one is missing, nothing is tested.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test fails by panicking, and says what it skips")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A sentence of both splits.
const SHARED: &str = "in both";

/// Pairs that no two are alike, with characters that CSV must quote.
fn pairs(name: &str, count: usize) -> Vec<(String, String, f64)> {
    let pair = |i: usize| (format!("{name} \"{i}\", one"), format!("{name} other {}", i / 2), (i % 26) as f64 / 5.0);
    let mut pairs: Vec<_> = (0..count).map(pair).collect();
    pairs[77].0 = SHARED.to_owned();
    pairs
}

/// Exit code and stderr of the script.
fn run(dir: &Path, source: &Path) -> (i32, String) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fetch-stsb.sh");
    let output = Command::new("bash").arg(script).args([dir, source]).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Writes both splits in a form: its file names, and a row's line.
fn write(
    source: &Path,
    names: [&str; 2],
    head: &str,
    rows: [usize; 2],
    line: &dyn Fn(&(String, String, f64)) -> String,
) {
    fs::create_dir_all(source).unwrap();
    for ((file, name), rows) in names.into_iter().zip(["dev", "train"]).zip(rows) {
        let text: String = pairs(name, rows).iter().map(|pair| line(pair) + "\n").collect();
        fs::write(source.join(file), head.to_owned() + &text).unwrap();
    }
}

#[test]
fn every_download_gives_the_same_pairs_and_a_cut_one_none() {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !there("bash") || !there("python3") {
        eprintln!("skipped: no bash or no python3");
        return;
    }
    let place = TempDir::new().unwrap();
    let [original, glue, hub, cut] = ["original", "glue", "hub", "cut"].map(|name| place.path().join(name));
    let tabs = |(a, b, score): &(String, String, f64)| format!("genre\tfile\t2012\t7\t{score:.3}\t{a}\t{b}");
    write(&original, ["sts-dev.csv", "sts-train.csv"], "", [1500, 5749], &tabs);
    let by_name = |(a, b, score): &(String, String, f64)| format!("0\t{a}\t{b}\t{score:.3}");
    write(&glue, ["dev.tsv", "train.tsv"], "index\tsentence1\tsentence2\tscore\n", [1500, 5749], &by_name);
    // Scaled to 1, and in a folder below.
    let json = |(a, b, score): &(String, String, f64)| {
        serde_json::json!({"sentence1": a, "sentence2": b, "score": score / 5.0}).to_string()
    };
    write(&hub.join("data"), ["validation.jsonl", "train.jsonl"], "", [1500, 5749], &json);
    write(&cut, ["sts-dev.csv", "sts-train.csv"], "", [1499, 5749], &tabs);

    let mut made = Vec::new();
    for source in [&original, &glue, &hub] {
        let dir = place.path().join("made").join(source.file_name().unwrap());
        let (code, stderr) = run(&dir, source);
        // These are not the benchmark's sentences, which is said.
        assert!(code == 0 && stderr.starts_with("note: the number of pairs is right"), "{stderr}");
        let file = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        made.push((file("stsb-dev.csv"), file("texts.txt"), file("sentences.txt")));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
        // What is there is not overwritten.
        let (code, stderr) = run(&dir, source);
        assert!(code == 1 && stderr.contains("stsb-dev.csv is there already"), "{stderr}");
    }
    assert!(made[0] == made[1] && made[0] == made[2]);
    let (csv, texts, sentences) = &made[0];
    assert_eq!((csv.lines().count(), texts.lines().count()), (1500, 2048));
    // All that differ, in another order, but those of the dev split: of the train split's 5749 second sentences half
    // do.
    let mixed: BTreeSet<_> = sentences.lines().collect();
    assert_eq!((mixed.len(), sentences.lines().count()), (5749 + 2875 - 1, 5749 + 2875 - 1));
    assert!(!mixed.contains(SHARED) && csv.contains(SHARED) && !sentences.starts_with(texts.lines().next().unwrap()));
    assert_eq!(csv.lines().nth(1).unwrap(), "\"dev \"\"1\"\", one\",dev other 0,0.2");
    assert_eq!(texts.lines().take(3).collect::<Vec<_>>(), ["train \"0\", one", "train other 0", "train \"1\", one"]);

    let dir = place.path().join("of a cut one");
    let (code, stderr) = run(&dir, &cut);
    assert!(code == 1 && stderr.contains("sts-dev.csv has 1499 pairs; the dev split has 1500"), "{stderr}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    let (code, stderr) = run(&dir, &place.path().join("made"));
    assert!(code == 1 && stderr.contains("has none of sts-dev.csv, dev.tsv, "), "{stderr}");
}
