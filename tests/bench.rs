//! `sparse24 bench` as a user runs it: the real binary, its output, its files and its exit codes. On the CPU device,
//! with no Vulkan driver in sight.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;

use std::process::Command;

use binary::{exits, json, text};
use serde_json::Value;
use sparse24::io::{save_matrices, save_sparse24};
use sparse24::measure::uniform;
use sparse24::{DType, Matrix, Sparse24, VectorLen, prune};

#[test]
fn rows_are_verified_timed_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run.json");
    let shapes = "65x33x100,128x64x96";
    let (stdout, stderr) =
        exits(0, &["bench", "--device", "cpu", "--quick", "--shapes", shapes, "--vector", "1,4", "--json", text(&out)]);
    assert!(stderr.is_empty(), "{stderr}");
    assert!(stdout.contains("all 8 rows verified") && stdout.contains("65x33x100"), "{stdout}");

    let run = json(&out);
    assert_eq!(run["schema"], "sparse24-bench/1");
    assert_eq!(run["environment"]["kind"], "cpu");
    assert_eq!(run["environment"]["threads"], run["rows"][0]["threads"]);
    let rows = run["rows"].as_array().unwrap();
    let ops: Vec<_> = rows.iter().map(|r| (r["op"].as_str().unwrap(), r["vector"].as_u64())).collect();
    assert_eq!(ops[..4], [("dense", None), ("sparse24", Some(1)), ("sparse24", Some(4)), ("masked", None)]);
    for (i, row) in rows.iter().enumerate() {
        let number = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"));
        let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} is not {b} in {row}");
        assert_eq!(row["verified"], true);
        assert!(number("error_over_bound") <= 1.0 && number("checked_outputs") > 100.0);
        assert!(number("min_ms") <= number("median_ms") && number("median_ms") <= number("max_ms"));
        // --quick: three samples of 2 ms.
        assert_eq!(number("samples"), 3.0);
        assert!(number("max_ms") * number("calls_per_sample") >= 2.0);
        let flops = 2.0 * number("m") * number("n") * number("k");
        close(number("effective_tflops"), flops / number("median_ms") / 1e9);
        close(number("speedup_vs_dense"), rows[i / 4 * 4]["median_ms"].as_f64().unwrap() / number("median_ms"));
        let expected_share = if row["op"] == "sparse24" { 0.5 } else { 1.0 };
        close(number("executed_tflops"), expected_share * number("effective_tflops"));
        // 65 rows are padded to 80 or to 33 pairs, 100 k of 2:4 to 7 units of 16 (see src/cpu/weights.rs).
        let bytes = match (row["op"].as_str().unwrap(), row["vector"].as_u64()) {
            ("dense", _) => 80 * 100 * 4,
            ("masked", _) => 80 * 100 * 4 + 80 / 8 * 100,
            (_, Some(1)) => 33 * 7 * (16 * 4 + 4),
            (_, v) => 33 * 7 * 16 * 4 + 65usize.div_ceil(v.unwrap() as usize) * 7 * 2,
        };
        if i < 4 {
            assert_eq!(number("weight_bytes") as usize, bytes);
        }
    }
}

#[test]
fn the_command_of_a_row_measures_it_again() {
    let folder = tempfile::tempdir().unwrap();
    let (out, again) = (folder.path().join("run.json"), folder.path().join("again.json"));
    let name = "it's a layer (1).weight";
    let file = folder.path().join("two words.safetensors");
    save_matrices(&file, &[(name, &uniform(40, 64, DType::F16, 1).unwrap())]).unwrap();
    let arguments =
        ["bench", "--device", "cpu", "--quick", "--weights", text(&file), "--tokens", "7", "--threads", "1"];
    exits(0, &[&arguments[..], &["--json", text(&out)]].concat());
    let run = json(&out);
    let row = &run["rows"][2];
    assert_eq!((&row["op"], &row["vector"], &row["dtype"]), (&"sparse24".into(), &32.into(), &"f16".into()));

    // As a shell would take it, with this test's binary for `sparse24`.
    let command = row["command"].as_str().unwrap().strip_prefix("sparse24 ").unwrap();
    let script = format!("'{}' {command} --json '{}'", env!("CARGO_BIN_EXE_sparse24"), text(&again));
    let status = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(status.status.success(), "{script}\n{}", String::from_utf8_lossy(&status.stderr));
    let again = json(&again);
    assert_eq!(again["rows"].as_array().unwrap().len(), 2);
    for field in ["name", "op", "m", "n", "k", "dtype", "vector", "kernel", "threads", "error_over_bound", "command"] {
        assert_eq!(again["rows"][1][field], row[field], "{field}");
    }
}

#[test]
fn weights_are_the_files_2d_float_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, native) = (folder.path().join("plain.safetensors"), folder.path().join("native.safetensors"));
    let w = uniform(24, 36, DType::F32, 1).unwrap();
    save_matrices(&plain, &[("b.weight", &w.cast(DType::Bf16)), ("a.weight", &w)]).unwrap();
    let compressed = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE).unwrap()).unwrap();
    save_sparse24(&native, &[("layer", &compressed)]).unwrap();

    let quick = ["bench", "--quick", "--tokens", "5", "--ops", "dense,sparse24", "--vector", "1", "--weights"];
    let (stdout, _) = exits(0, &[&quick[..], &[text(&plain)]].concat());
    assert!(stdout.contains("a.weight") && stdout.contains("b.weight") && stdout.contains("24x5x36"), "{stdout}");
    let (stdout, _) = exits(0, &[&quick[..], &[text(&plain), "--filter", "^b"]].concat());
    assert!(!stdout.contains("a.weight"), "{stdout}");
    let (stdout, _) = exits(0, &[&quick[..], &[text(&native)]].concat());
    assert!(stdout.contains("layer") && !stdout.contains("layer.values"), "{stdout}");
    let (_, stderr) = exits(1, &[&quick[..], &[text(&plain), "--filter", "none such"]].concat());
    assert!(stderr.contains("plain.safetensors") && stderr.contains("none such"), "{stderr}");
}

/// Sums that overflow f32 can be judged by no bound, and what cannot be judged is not verified.
#[test]
fn what_fails_verification_is_not_timed_and_exits_with_3() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("huge.safetensors"), folder.path().join("run.json"));
    let huge = Matrix::from_f32(8, 64, &[3e38; 512]).unwrap();
    save_matrices(&file, &[("huge.weight", &huge)]).unwrap();
    let (stdout, stderr) = exits(3, &["bench", "--quick", "--weights", text(&file), "--json", text(&out)]);
    assert!(stdout.contains("FAILED") && stdout.contains("4 of 4 rows"), "{stdout}");
    // In f16 they are no numbers at all.
    let (_, refused) = exits(1, &["bench", "--quick", "--weights", text(&file), "--dtype", "f16"]);
    assert!(refused.contains("huge.weight: weight at row 0, column 0 is inf as f16"), "{refused}");
    assert!(stderr.contains("undecided"), "{stderr}");
    let row = &json(&out)["rows"][1];
    assert_eq!(
        (&row["verified"], &row["median_ms"], &row["speedup_vs_dense"]),
        (&false.into(), &Value::Null, &Value::Null)
    );
}

#[test]
fn bad_flags_are_named_and_exit_with_2() {
    for (flags, named) in [
        (["--shapes", "0x4x4"], "0x4x4"),
        (["--shapes", "4x0x4"], "zero"),
        (["--shapes", "bert-tiny"], "bert-base"),
        (["--shapes", "4x4"], "MxNxK"),
        (["--shapes", "4x4x-4"], "--shapes"),
        (["--shapes", "99999999999999999999x1x1"], "--shapes"),
        (["--vector", "3"], "vector length 3"),
        (["--tokens", "0"], "--tokens"),
        (["--dtype", "f64"], "--dtype"),
        (["--ops", "sparse"], "--ops"),
        (["--threads", "0"], "--threads"),
        (["--threads", "5000"], "--threads"),
        (["--filter", "x"], "--weights"),
    ] {
        let (stdout, stderr) = exits(2, &["bench", flags[0], flags[1]]);
        assert!(stdout.is_empty() && stderr.contains(named), "{flags:?}: {stderr}");
    }
    exits(2, &["bench", "--weights", "x.safetensors", "--filter", "("]);
    exits(2, &["no-such-command"]);
}

#[test]
fn bad_input_is_named_exits_with_1_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let out = at("run.json");
    let mut data = vec![1.0f32; 64];
    data[19] = f32::NAN;
    save_matrices(at("nan.safetensors"), &[("bad.weight", &Matrix::from_f32(8, 8, &data).unwrap())]).unwrap();
    std::fs::write(at("short.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    for (arguments, named) in [
        (["--weights", text(&at("nan.safetensors"))], ["nan.safetensors: tensor bad.weight", "row 2, column 3 is NaN"]),
        (["--weights", text(&at("short.safetensors"))], ["short.safetensors", "header"]),
        (["--weights", text(&at("missing.safetensors"))], ["missing.safetensors", "No such file"]),
        (["--device", "no such device"], ["--device", "cpu"]),
        (["--shapes", "4294967295x4294967295x4294967295"], ["4294967295x4294967295x4294967295", "overflow"]),
        (["--shapes", "16777216x1x16777216"], ["16777216x1x16777216", "out of memory"]),
    ] {
        let (stdout, stderr) = exits(1, &["bench", "--quick", arguments[0], arguments[1], "--json", text(&out)]);
        assert!(stdout.is_empty() && named.iter().all(|n| stderr.contains(n)), "{arguments:?}: {stderr}");
        assert_eq!(stderr.matches("No such file").count().max(1), 1, "said twice: {stderr}");
        assert!(!out.exists());
    }
    // A folder is no file, and what is neither is left alone.
    let (_, stderr) = exits(1, &["bench", "--quick", "--json", text(folder.path())]);
    assert!(stderr.contains("not a regular file"), "{stderr}");
    let (_, stderr) = exits(1, &["bench", "--quick", "--json", "/nonexistent/run.json"]);
    assert!(stderr.contains("--json") && stderr.contains("/nonexistent/run.json"), "{stderr}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}
