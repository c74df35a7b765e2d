//! `sparse24 bench --compare` as a user or a CI runs it: what is printed, and when the exit code says slower. On the
//! CPU device.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;

use std::path::Path;

use binary::{Run, command, json, sparse24, text};
use serde_json::Value;

/// One small layer, on one thread; dense, 2:4 and masked.
const RUN: [&str; 8] = ["bench", "--device", "cpu", "--threads", "1", "--quick", "--shapes", "64x8x64"];

/// Measures into a file.
fn measured(path: &Path) -> Value {
    sparse24([&RUN[..], &["--json", text(path)]].concat()).exits(0);
    json(path)
}

/// A run as it would have been on a machine on which all takes `factor` times as long.
fn scaled(run: &Value, factor: f64) -> Value {
    let mut run = run.clone();
    for row in run["rows"].as_array_mut().unwrap() {
        for field in ["median_ms", "min_ms", "max_ms", "q1_ms", "q3_ms", "median_low_ms", "median_high_ms"] {
            row[field] = (row[field].as_f64().unwrap() * factor).into();
        }
        // Models have the first two, layers the last two.
        for field in ["sequences_per_second", "effective_tflops", "executed_tflops"] {
            if let Some(rate) = row[field].as_f64() {
                row[field] = (rate / factor).into();
            }
        }
    }
    run
}

/// Times change ten thousandfold: more than samples of one row differ by, whatever else runs on this machine.
#[test]
fn slower_than_before_exits_with_3_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (old, out) = (folder.path().join("old.json"), folder.path().join("now.json"));
    let run = measured(&old);
    let write = |run: &Value| std::fs::write(&old, run.to_string()).unwrap();
    let compare = ["--compare", text(&old)];
    let fail = ["--fail-slower", "5"];

    // `--compare -` reads the earlier run from stdin.
    let piped = command([&RUN[..], &["--compare", "-"]].concat()).run_on(&std::fs::read(&old).unwrap()).stdout;
    assert!(piped.contains("compared with stdin of ") && piped.contains("of 4 rows "), "{piped}");

    write(&scaled(&run, 0.0001));
    let (stdout, stderr) = sparse24([&RUN[..], &compare, &fail, &["--json", text(&out)]].concat()).exits(3);
    assert!(stdout.contains("all 4 rows verified"), "{stdout}");
    assert!(stdout.ends_with("of 4 rows 4 slower, 0 faster, 0 unchanged, 0 not compared\n"), "{stdout}");
    assert_eq!(stderr.matches("slower: shape 64x8x64 ").count(), 4, "{stderr}");
    assert!(stderr.contains("sparse24 V=32 f32: "), "{stderr}");
    // The run itself is whole, and its rows are measured again without anything to compare with.
    let now = json(&out);
    assert_eq!(now["rows"].as_array().unwrap().len(), 4);
    for row in now["rows"].as_array().unwrap() {
        let command = row["command"].as_str().unwrap();
        assert!(
            command.contains("64x8x64") && !command.contains("compare") && !command.contains("slower"),
            "{command}"
        );
    }

    // Without the flag the same is printed only; beyond the percentage nothing is slower.
    let (stdout, stderr) = sparse24([&RUN[..], &compare].concat()).exits(0);
    assert!(stdout.contains("4 slower") && stderr.is_empty(), "{stdout}\n{stderr}");
    let (stdout, _) = sparse24([&RUN[..], &compare, &["--fail-slower", "100000000"]].concat()).exits(0);
    assert!(stdout.contains("within 100000000 %") && stdout.contains("0 slower, 0 faster, 4 unchanged"), "{stdout}");

    write(&scaled(&run, 10_000.0));
    let (stdout, stderr) = sparse24([&RUN[..], &compare, &fail].concat()).exits(0);
    assert!(stdout.contains("0 slower, 4 faster") && stderr.is_empty(), "{stdout}\n{stderr}");
}

#[test]
fn models_are_compared_too() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old.json");
    let run = ["bench", "--device", "cpu", "--quick", "--model", "minilm", "--seq", "8", "--ops", "dense"];
    sparse24([&run[..], &["--batch", "1", "--json", text(&old)]].concat()).exits(0);
    std::fs::write(&old, scaled(&json(&old), 0.0001).to_string()).unwrap();
    let compare = ["--compare", text(&old), "--fail-slower", "5"];
    let (stdout, stderr) = sparse24([&run[..], &["--batch", "1"], &compare].concat()).exits(3);
    assert!(stdout.ends_with("of 1 row 1 slower, 0 faster, 0 unchanged, 0 not compared\n"), "{stdout}");
    assert!(stderr.contains("slower: dense f32: "), "{stderr}");
    let (stdout, stderr) = sparse24([&run[..], &["--batch", "2"], &compare].concat()).exits(1);
    assert!(stdout.is_empty() && stderr.contains("old.json") && stderr.contains("1 x 8 tokens"), "{stderr}");
}

#[test]
fn the_earlier_run_may_be_replaced_and_what_differs_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("run.json");
    let mut run = scaled(&measured(&old), 10_000.0);
    run["environment"]["version"] = "0.0.1".into();
    run["environment"]["simd"] = "another".into();
    run["rows"][1]["kernel"] = "one that was".into();
    let last = run["rows"].as_array_mut().unwrap().pop().unwrap();
    assert_eq!(last["op"], "masked");
    std::fs::write(&old, run.to_string()).unwrap();

    let ops = ["--vector", "1", "--compare", text(&old), "--json", text(&old)];
    let (stdout, _) = sparse24([&RUN[..], &ops].concat()).exits(0);
    let version = format!("version: 0.0.1 before, {} now", env!("CARGO_PKG_VERSION"));
    for part in [&version, "vector instructions: another before", "one that was -> ", "not measured now", "new"] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    assert!(stdout.ends_with("of 4 rows 0 slower, 2 faster, 0 unchanged, 2 not compared\n"), "{stdout}");
    let replaced = json(&old);
    assert_eq!(replaced["environment"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(replaced["rows"].as_array().unwrap().len(), 3);
}

/// Rows of which noise was seen, before or now, do not fail, and are said to have been left out.
#[test]
fn noise_that_was_seen_fails_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old.json");
    let mut run = scaled(&measured(&old), 0.0001);
    for row in run["rows"].as_array_mut().unwrap() {
        // Samples that differ by more than what comes after.
        row["max_ms"] = (1e9 * row["min_ms"].as_f64().unwrap()).into();
        row["noisy"] = true.into();
    }
    std::fs::write(&old, run.to_string()).unwrap();
    let (stdout, stderr) = sparse24([&RUN[..], &["--compare", text(&old), "--fail-slower", "5"]].concat()).exits(0);
    assert!(stdout.ends_with("of 4 rows 0 slower, 0 faster, 0 unchanged, 4 noisy, 0 not compared\n"), "{stdout}");
    assert_eq!(stderr.matches("noisy: shape 64x8x64 ").count(), 4, "{stderr}");
    assert!(stderr.ends_with("4 rows too noisy to be judged: measure again on a quiet machine\n"), "{stderr}");
}

/// Nothing on stdout: nothing was measured.
#[test]
fn what_cannot_be_compared_with_is_named_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (old, out) = (folder.path().join("old.json"), folder.path().join("now.json"));
    let run = measured(&old);
    let whole = run.to_string();
    let with = |edit: &dyn Fn(&mut Value)| {
        let mut run = run.clone();
        edit(&mut run);
        run.to_string()
    };
    for (content, named) in [
        (whole[..whole.len() / 2].to_owned(), "not JSON"),
        (with(&|run| run["schema"] = "another/1".into()), "another/1"),
        (with(&|run| run["schema"] = "sparse24-bench/2".into()), "sparse24-bench/2"),
        (with(&|run| run["rows"][1]["median_ms"] = 1e9.into()), "row 2"),
        (with(&|run| run["rows"].as_array_mut().unwrap().iter_mut().for_each(|r| r["name"] = "x".into())), "no row"),
    ] {
        std::fs::write(&old, content).unwrap();
        let (stdout, stderr) = sparse24([&RUN[..], &["--compare", text(&old), "--json", text(&out)]].concat()).exits(1);
        assert!(stdout.is_empty(), "{stdout}");
        assert!(stderr.contains("--compare: ") && stderr.contains("old.json") && stderr.contains(named), "{stderr}");
        assert!(!out.exists());
    }

    std::fs::write(&old, &whole).unwrap();
    let (stdout, stderr) =
        sparse24(["bench", "--device", "cpu", "--shapes", "8x8x8", "--compare", text(&old)]).exits(1);
    assert!(stdout.is_empty() && stderr.contains("old.json") && stderr.contains("no row in common"), "{stderr}");
    let (stdout, stderr) =
        sparse24(["bench", "--device", "cpu", "--model", "minilm", "--compare", text(&old)]).exits(1);
    assert!(stdout.is_empty() && stderr.contains("old.json") && stderr.contains("single layers"), "{stderr}");
    let (_, stderr) = sparse24([&RUN[..], &["--compare", text(&folder.path().join("missing.json"))]].concat()).exits(1);
    assert!(stderr.contains("missing.json") && stderr.contains("No such file"), "{stderr}");
}

#[test]
fn flags_without_effect_or_sense_exit_with_2() {
    for (flags, named) in [
        (&["--fail-slower", "5"][..], "--compare"),
        (&["--compare", "x.json", "--fail-slower=-1"], "--fail-slower"),
        (&["--compare", "x.json", "--fail-slower", "nan"], "--fail-slower"),
        (&["--compare", "x.json", "--fail-slower", "inf"], "--fail-slower"),
        (&["--compare", "x.json", "--fail-slower", "5%"], "--fail-slower"),
    ] {
        let (stdout, stderr) = sparse24([&["bench"], flags].concat()).exits(2);
        assert!(stdout.is_empty() && stderr.contains(named), "{flags:?}: {stderr}");
    }
}
