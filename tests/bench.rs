//! `sparse24 bench` as a user runs it: the real binary, its output, its files and its exit codes. On the CPU device,
//! with no Vulkan driver in sight.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;

use binary::{Run, command, json, script, sparse24, text, with_drivers};
use serde_json::Value;
use sparse24::io::{save_matrices, save_sparse24};
use sparse24::{DType, Matrix, Sparse24, VectorLen, prune};

#[test]
fn rows_are_verified_timed_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run.json");
    let shapes = "65x33x100,128x64x96";
    let (stdout, stderr) =
        sparse24(["bench", "--device", "cpu", "--quick", "--shapes", shapes, "--vector", "1,4", "--json", text(&out)])
            .exits(0);
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
    save_matrices(&file, &[(name, &Matrix::uniform(40, 64, DType::F16, 1).unwrap())]).unwrap();
    let arguments =
        ["bench", "--device", "cpu", "--quick", "--weights", text(&file), "--tokens", "7", "--threads", "1"];
    sparse24([&arguments[..], &["--json", text(&out)]].concat()).exits(0);
    let run = json(&out);
    let row = &run["rows"][2];
    assert_eq!((&row["op"], &row["vector"], &row["dtype"]), (&"sparse24".into(), &32.into(), &"f16".into()));

    // As a shell would take it, with this test's binary for `sparse24`.
    let command = row["command"].as_str().unwrap().strip_prefix("sparse24 ").unwrap();
    script(&format!("\"$0\" {command} --json '{}'", text(&again))).run().exits(0);
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
    let w = Matrix::uniform(24, 36, DType::F32, 1).unwrap();
    save_matrices(&plain, &[("b.weight", &w.cast(DType::Bf16)), ("a.weight", &w)]).unwrap();
    let compressed = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE).unwrap()).unwrap();
    save_sparse24(&native, &[("layer", &compressed)]).unwrap();

    let quick = ["bench", "--quick", "--tokens", "5", "--ops", "dense,sparse24", "--vector", "1", "--weights"];
    let (stdout, _) = sparse24([&quick[..], &[text(&plain)]].concat()).exits(0);
    assert!(stdout.contains("a.weight") && stdout.contains("b.weight") && stdout.contains("24x5x36"), "{stdout}");
    let (stdout, _) = sparse24([&quick[..], &[text(&plain), "--filter", "^b"]].concat()).exits(0);
    assert!(!stdout.contains("a.weight"), "{stdout}");
    let (stdout, _) = sparse24([&quick[..], &[text(&native)]].concat()).exits(0);
    assert!(stdout.contains("layer") && !stdout.contains("layer.values"), "{stdout}");
    let (_, stderr) = sparse24([&quick[..], &[text(&plain), "--filter", "none such"]].concat()).exits(1);
    assert!(stderr.contains("plain.safetensors") && stderr.contains("none such"), "{stderr}");
    // Other people's forms, too: a matrix each of a pruned model's as compressed-tensors stores them.
    for folder in ["ct_ckpt_sparse24_f16", "ct_ckpt_bitmask_f16"] {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(folder);
        let (stdout, _) = sparse24([&quick[..], &[text(&file), "--filter", "up"]].concat()).exits(0);
        assert!(stdout.contains("up.weight") && !stdout.contains("compressed"), "{stdout}");
    }
}

/// What a terminal of 100 columns shows of the longest names, and where more of it is.
#[test]
fn the_table_fits_a_terminal_and_the_rest_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("long.safetensors");
    let name = format!("{}\u{1b}[31m.weight", "encoder.layer.11.attention.output.".repeat(6));
    save_matrices(&file, &[(&name, &Matrix::uniform(16, 32, DType::F32, 1).unwrap())]).unwrap();
    let run = ["bench", "--device", "cpu", "--quick", "--tokens", "3", "--vector", "128"];
    let of_file = [&run[..], &["--ops", "dense,sparse24,masked,masked24,auto", "--weights", text(&file)]].concat();
    let (narrow, stderr) = sparse24(&of_file).exits(0);
    assert!(stderr.is_empty(), "{stderr}");
    assert!(narrow.lines().all(|line| line.chars().count() <= 100), "{narrow}");
    for part in ["m x n x k", "ms ± %", "GFLOPS", "vs dense", "verified", "masked24", "16x3x32", "all 5 rows verified"]
    {
        assert!(narrow.contains(part), "{part}: {narrow}");
    }
    assert_eq!(narrow.matches("encoder.").count(), 2, "once, with its middle left out: {narrow}");
    for part in ["err/bound", "2mnk", "\u{1b}"] {
        assert!(!narrow.contains(part), "{part}: {narrow}");
    }
    assert_eq!(narrow.matches("--legend").count(), 1, "{narrow}");

    let (wide, _) = sparse24([&of_file[..], &["--wide", "--legend"]].concat()).exits(0);
    for part in ["spread", "effective", "executed", "of peak", "err/bound", "MB", "kernel", "2mnk", "ceilings", "noise"]
    {
        assert!(wide.contains(part), "{part}: {wide}");
    }
    assert!(wide.contains("vectors") || wide.contains("gemv") || wide.contains("gather"), "{wide}");
    assert!(!wide.contains('\u{1b}'), "{wide}");
    let (one, _) = sparse24([&run[..], &["--shapes", "8x8x8", "--ops", "dense"]].concat()).exits(0);
    assert!(one.contains("\n1 row verified\n") && !one.contains("\nshape\n"), "{one}");
}

/// Plans for a GPU that is not there, by the compilers' costs: nothing is run.
#[test]
fn a_gpu_that_is_not_there_is_planned_for() {
    let ada =
        ["bench", "--explain", "--architecture", "ada", "--shapes", "768x512x768", "--ops", "dense,sparse24,auto"];
    let (stdout, stderr) = sparse24(ada).exits(0);
    assert!(stderr.is_empty(), "{stderr}");
    // Dense, V = 1 and 32, and both again as `auto`.
    assert_eq!(stdout.matches("chosen because").count(), 5, "{stdout}");
    assert!(stdout.contains("(static, ada, Mesa ") && stdout.contains("dense weights, because"), "{stdout}");
    let (rdna, _) = sparse24(["bench", "--explain", "--architecture", "rdna2", "--shapes", "768x512x768"]).exits(0);
    assert!(rdna.contains("(static, rdna2, Mesa "), "{rdna}");
    // What a variable of the environment says of the CPU is no matter here.
    assert_eq!(command(ada).env("SPARSE24_SIMD", "scalar").run().stdout, stdout);
    for wrong in [&["--compare", "x.json"][..], &["--json"], &["--device", "cpu"], &["--format", "csv"]] {
        sparse24([&ada[..], wrong].concat()).exits(2);
    }
    sparse24(["bench", "--architecture", "ada"]).exits(2);
    let (_, stderr) = sparse24(["bench", "--explain", "--architecture", "voodoo"]).exits(2);
    assert!(stderr.contains("apple-m1"), "{stderr}");
}

/// One run in every format: stdout is that format from its first byte to its last.
#[test]
fn a_run_is_printed_as_markdown_csv_or_json() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run.json");
    let layers: [&str; 9] =
        ["bench", "--device", "cpu", "--quick", "--shapes", "16x3x32,24x2x8", "--vector", "1", "--explain"];
    let model = [
        "bench",
        "--device",
        "cpu",
        "--quick",
        "--model",
        "minilm",
        "--batch",
        "1",
        "--seq",
        "4",
        "--ops",
        "dense,auto",
    ];
    for (run, schema, rows) in [(&layers[..], "sparse24-bench/1", 6), (&model[..], "sparse24-model-bench/1", 4)] {
        let printed = |more: &[&str]| sparse24([run, more].concat()).exits(0);

        let (markdown, stderr) = printed(&["--format", "md", "--json", text(&out)]);
        let table: Vec<_> = markdown.lines().take_while(|line| !line.is_empty()).collect();
        assert!(table.iter().all(|line| line.starts_with("| ") && line.ends_with(" |")), "{markdown}");
        let columns = |line: &str| line.matches('|').count();
        assert!(table.len() == rows + 2 && table.iter().all(|line| columns(line) == columns(table[0])), "{markdown}");
        assert!(table[1].contains("-: |"), "numbers are aligned right: {markdown}");
        assert!(markdown.contains("\n\nbuild: sparse24 ") && markdown.contains("vs dense"), "{markdown}");
        assert_eq!(run.contains(&"--explain"), stderr.contains("chosen because"), "{stderr}");

        let (by_csv, _) = printed(&["--format", "csv"]);
        let mut reader = csv::Reader::from_reader(by_csv.as_bytes());
        let header: Vec<_> = reader.headers().unwrap().iter().map(str::to_owned).collect();
        let records: Vec<_> = reader.records().map(Result::unwrap).collect();
        assert_eq!(records.len(), rows, "{by_csv}");
        let kept = json(&out);
        assert_eq!(kept["schema"], schema);
        for field in kept["rows"][0].as_object().unwrap().keys() {
            assert!(header.iter().any(|h| h == field || h.starts_with(&format!("{field}."))), "{field}: {header:?}");
        }
        let at = |name: &str| header.iter().position(|h| h == name).unwrap();
        assert_eq!(
            (&records[0][at("op")], &records[0][at("vector")], &records[0][at("verified")]),
            ("dense", "", "true")
        );
        assert!(records[0][at("median_ms")].parse::<f64>().unwrap() > 0.0);

        for more in [&["--json"][..], &["--json=-"], &["--format", "json"]] {
            let printed: Value = serde_json::from_str(&printed(more).0).unwrap();
            assert_eq!((&printed["schema"], printed["rows"].as_array().unwrap().len()), (&schema.into(), rows));
        }
    }
}

/// A checkpoint with one bad tensor is measured all the same.
#[test]
fn a_tensor_that_cannot_be_measured_is_named_and_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("some.safetensors"), folder.path().join("run.json"));
    let good = Matrix::uniform(8, 8, DType::F32, 1).unwrap();
    let with = |at: usize, x: f32| {
        let mut data = good.elements().to_f32();
        data[at] = x;
        Matrix::from_f32(8, 8, &data).unwrap()
    };
    let (nan, inf) = (with(19, f32::NAN), with(0, f32::NEG_INFINITY));
    save_matrices(&file, &[("a", &good), ("b.nan", &nan), ("c.inf", &inf), ("d", &good)]).unwrap();
    let run = ["bench", "--device", "cpu", "--quick", "--tokens", "2", "--weights", text(&file)];
    let (stdout, stderr) = sparse24([&run[..], &["--ops", "dense", "--json", text(&out)]].concat()).exits(1);
    assert!(stdout.contains("all 2 rows verified"), "{stdout}");
    for text in [&stdout, &stderr] {
        assert!(text.contains("not measured: ") && text.contains("b.nan: weight at row 2, column 3 is NaN"), "{text}");
        assert!(text.contains("c.inf: weight at row 0, column 0 is -inf"), "{text}");
    }
    assert!(stderr.ends_with("some.safetensors: 2 tensors could not be measured\n"), "{stderr}");
    let run = json(&out);
    let names = |list: &str| run[list].as_array().unwrap().iter().map(|x| x["name"].clone()).collect::<Vec<_>>();
    assert_eq!((names("rows"), names("skipped")), (vec!["a".into(), "d".into()], vec!["b.nan".into(), "c.inf".into()]));
    assert!(run["skipped"][0]["reason"].as_str().unwrap().contains("NaN"));
}

/// However much memory a size asks for, the answer is an error that names it. Two processes with little, as `ulimit`
/// gives them, and sizes that fit on paper but not with the copies of operands.
#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_into_memory_is_an_error_with_its_size() {
    for (kib, shape, ops) in [
        (8_000_000, "99999999x1x1", "sparse24"),
        (8_000_000, "4294967296x1x1", "sparse24"),
        (4_000_000, "99999999x1x1", "dense"),
        (4_000_000, "20000x1x20000", "dense,masked"),
        (4_000_000, "1x99999999x1", "dense"),
        (4_000_000, "30000x30000x1", "masked24"),
        (4_000_000, "1x1x99999999", "sparse24"),
    ] {
        let command = format!("ulimit -v {kib}; exec \"$0\" bench --device cpu --quick --shapes {shape} --ops {ops}");
        let (_, stderr) = script(&command).run().exits(1);
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains(&format!("{shape}: out of memory: ")) && stderr.contains(" GiB for "), "{stderr}");
    }
    // The same limit is no obstacle to what fits.
    let command = "ulimit -v 4000000; exec \"$0\" bench --device cpu --quick --shapes 512x8x512";
    script(command).run().exits(0);
}

/// On machines with Mesa's drivers, whose libraries complain by themselves.
#[cfg(target_os = "linux")]
#[test]
fn drivers_do_not_complain_about_a_folder_of_the_session() {
    for folder in [None, Some("relative")] {
        let mut command = with_drivers(["devices"]);
        command.env_remove("XDG_RUNTIME_DIR").envs(folder.map(|folder| ("XDG_RUNTIME_DIR", folder)));
        let (_, stderr) = command.run().exits(0);
        assert!(!stderr.contains("XDG_RUNTIME_DIR"), "{stderr}");
    }
}

/// Sums that overflow f32 can be judged by no bound, and what cannot be judged is not verified.
#[test]
fn what_fails_verification_is_not_timed_and_exits_with_3() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("huge.safetensors"), folder.path().join("run.json"));
    let huge = Matrix::from_f32(8, 64, &[3e38; 512]).unwrap();
    save_matrices(&file, &[("huge.weight", &huge)]).unwrap();
    let (stdout, stderr) = sparse24(["bench", "--quick", "--weights", text(&file), "--json", text(&out)]).exits(3);
    assert!(stdout.contains("FAILED") && stdout.contains("4 of 4 rows"), "{stdout}");
    // In f16 they are no numbers at all.
    let (_, refused) = sparse24(["bench", "--quick", "--weights", text(&file), "--dtype", "f16"]).exits(1);
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
        (["--plan", "64x64x16"], "is a kernel of GPUs, and this is the CPU device"),
        (["--plan", "gemm_dense-f32f32-64x64x16-none"], "is a kernel of GPUs, and this is the CPU device"),
        (["--plan", "no-such-kernel"], "there are gather, gemm_crate"),
        (["--json", "run.txt"], ".json"),
        (["--format", "xml"], "--format"),
    ] {
        let (stdout, stderr) = sparse24(["bench", "--device", "cpu", flags[0], flags[1]]).exits(2);
        assert!(stdout.is_empty() && stderr.contains(named), "{flags:?}: {stderr}");
    }
    sparse24(["bench", "--weights", "x.safetensors", "--filter", "("]).exits(2);
    for (flags, named) in [
        (&["--json", "--format", "md"][..], "--json"),
        (&["--format", "csv", "--wide"], "--wide"),
        (&["--json", "--legend"], "--legend"),
        (&["--format", "json", "--wide"], "--wide"),
        (&["--json", "a.json", "--out", "b.json"], "--json"),
    ] {
        let (stdout, stderr) = sparse24([&["bench"], flags].concat()).exits(2);
        assert!(stdout.is_empty() && stderr.contains(named), "{flags:?}: {stderr}");
    }
    sparse24(["no-such-command"]).exits(2);
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
        let (stdout, stderr) =
            sparse24(["bench", "--quick", arguments[0], arguments[1], "--json", text(&out)]).exits(1);
        assert!(stdout.is_empty() && named.iter().all(|n| stderr.contains(n)), "{arguments:?}: {stderr}");
        assert_eq!(stderr.matches("No such file").count().max(1), 1, "said twice: {stderr}");
        assert!(!out.exists());
    }
    // A folder is no file, and what is neither is left alone.
    let (_, stderr) = sparse24(["bench", "--quick", "--json", text(folder.path())]).exits(2);
    assert!(stderr.contains("must end in .json"), "{stderr}");
    std::fs::create_dir(at("folder.json")).unwrap();
    let (_, stderr) = sparse24(["bench", "--quick", "--json", text(&at("folder.json"))]).exits(1);
    assert!(stderr.contains("not a regular file"), "{stderr}");
    std::fs::remove_dir(at("folder.json")).unwrap();
    let (_, stderr) = sparse24(["bench", "--quick", "--json", "/nonexistent/run.json"]).exits(1);
    assert!(stderr.contains("--json") && stderr.contains("/nonexistent/run.json"), "{stderr}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}
