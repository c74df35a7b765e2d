//! `sparse24 report` as a user runs it: what a page holds, and what is refused, by file and row.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs the binary in `folder` to exit code `code` and returns stderr.
fn exits(folder: &Path, code: i32, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sparse24")).current_dir(folder).args(arguments).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{stderr}");
    stderr
}

fn row(op: &str, vector: Option<usize>, (m, n, k): (usize, usize, usize), ms: f64, dense_ms: f64) -> Value {
    let tflops = 2e-9 * (m * n * k) as f64 / ms;
    json!({
        "name": "shape", "op": op, "m": m, "n": n, "k": k, "dtype": "f32", "accumulate": "f32", "vector": vector,
        "kernel": format!("kernel_{op}"), "device": "Testing 9000", "threads": 3, "median_ms": ms, "min_ms": 0.9 * ms,
        "max_ms": 1.3 * ms, "q1_ms": 0.95 * ms, "q3_ms": 1.05 * ms, "samples": 10, "clock": "host_wall",
        "effective_tflops": tflops, "executed_tflops": if vector.is_some() { tflops / 2.0 } else { tflops },
        "speedup_vs_dense": dense_ms / ms, "weight_bytes": if vector.is_some() { m * k * 2 + m * k / 8 } else { m * k * 4 },
        "error_over_bound": 0.01, "verified": true, "command": format!("sparse24 bench --ops {op}"),
    })
}

/// A run whose V=32 wins at the first shape and loses at the second.
fn run() -> Value {
    let (a, b) = ((64, 128, 32), (48, 1, 32));
    json!({
        "schema": "sparse24-bench/1",
        "environment": {
            "program": "sparse24", "version": "0.1.0", "commit": "abc", "date": "2026-01-01T00:00:00Z", "os": "linux",
            "arch": "x86_64", "cpu": "Testing 9000", "device": "Testing 9000", "kind": "cpu", "driver": null, "backend": null,
            "simd": "avx2", "threads": 3, "samples": 10, "sample_ms": 20.0, "command": "sparse24 bench --out run.json",
        },
        "ceilings": { "fma_f32_tflops": 0.1, "read_gb_per_s": 20.0 },
        "rows": [
            row("dense", None, a, 2.0, 2.0), row("sparse24", Some(32), a, 1.0, 2.0),
            row("dense", None, b, 0.02, 0.02), row("sparse24", Some(32), b, 0.04, 0.02),
        ],
    })
}

/// Passes of a model: operation, V and milliseconds.
fn model(passes: &[(&str, Option<usize>, f64)]) -> Value {
    let pass = |&(op, vector, ms): &(&str, Option<usize>, f64)| {
        json!({
            "op": op, "vector": vector, "dtype": "f32", "kernels": ["gather"], "median_ms": ms, "min_ms": ms, "max_ms": ms,
            "parts": { "gemm_ms": 0.8 * ms, "attention_ms": 0.1 * ms, "rest_ms": 0.1 * ms },
            "sequences_per_second": 32e3 / ms, "speedup_vs_dense": 300.0 / ms, "weight_bytes": 1000, "verified": true,
            "command": "sparse24 bench --model model/tiny",
        })
    };
    json!({
        "schema": "sparse24-model-bench/1", "environment": run()["environment"], "model": "model/tiny",
        "linear_weights": 1000, "batch": 32, "seq": 64, "rows": passes.iter().map(pass).collect::<Vec<_>>(),
    })
}

/// A folder with these files.
fn folder(files: &[(&str, &Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

fn read(folder: &TempDir, name: &str) -> String {
    std::fs::read_to_string(folder.path().join(name)).unwrap()
}

#[test]
fn a_page_says_what_won_what_lost_and_how_to_see_it_again() {
    let folder = folder(&[("run.json", &run())]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let figures = [
        "0.50x to 2.00x as fast as dense (median 1.25x of 2 rows",
        "did not pay at 48x1x32 (0.50x)",
        "0.100 TFLOPS",
        "20.0 GB/s",
    ];
    let commands = ["sparse24 bench --out run.json", "sparse24 bench --ops sparse24"];
    for text in figures.iter().chain(&commands).chain(&["Testing 9000, 3 threads", "datasheet, not measured"]) {
        assert!(page.contains(text), "{text} is missing");
    }
    assert!(!page.contains("<script") && !page.contains("src="), "the page needs nothing else");
    for link in page.split("href=\"").skip(1) {
        assert!(link.starts_with('#') || link.starts_with("data:"), "{}", &link[..40]);
    }
    assert_eq!(page.matches("class=\"wide\"").count(), page.matches("class=\"narrow\"").count());
}

#[test]
fn markdown_has_its_pictures_beside_it() {
    let folder = folder(&[("run.json", &run())]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "my <100 %> page.md"]);
    let page = read(&folder, "my <100 %> page.md");
    let pictures: Vec<_> = page.split("](<").skip(1).filter_map(|rest| rest.split_once(">)")).map(|(p, _)| p).collect();
    assert!(pictures.len() >= 4, "{pictures:?}");
    for picture in pictures {
        // These would end the link.
        assert!(!picture.contains(['<', '>']), "{picture}");
        let svg = read(&folder, &picture.replace("%3C", "<").replace("%3E", ">").replace("%25", "%"));
        assert!(svg.starts_with("<svg role=\"img\"") && svg.contains("prefers-color-scheme:dark"), "{picture}");
    }
    // A table's rows follow its head without a gap, else it is none.
    let head = page.lines().position(|l| l.starts_with("| machine |")).unwrap();
    let table: Vec<_> = page.lines().skip(head).take_while(|l| l.starts_with('|')).collect();
    assert!(table.len() == 3 && table[1].contains("---:"), "{table:?}");
    let cells = |line: &str| line.replace("\\|", "").matches('|').count();
    assert!(table.iter().all(|line| cells(line) == cells(table[0])), "{table:?}");
}

#[test]
fn text_from_files_is_escaped() {
    let mut run = run();
    let evil = "<script>alert(1)</script> | \" & [x](http://a)";
    run["environment"]["device"] = json!(evil);
    for row in run["rows"].as_array_mut().unwrap() {
        for field in ["device", "command", "kernel", "name"] {
            row[field] = json!(evil);
        }
    }
    let folder = folder(&[("run.json", &run)]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.html"]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.md"]);
    let (html, md) = (read(&folder, "page.html"), read(&folder, "page.md"));
    assert!(html.contains("&lt;script&gt;") && !html.contains("<script"));
    let pictures = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path());
    for picture in pictures.filter(|p| p.extension().is_some_and(|e| e == "svg")) {
        let svg = std::fs::read_to_string(picture).unwrap();
        let (tag, rest) = svg.split_once('>').unwrap();
        assert!(tag.matches('"').count() % 2 == 0 && rest.starts_with("<style>") && !svg.contains("<script"), "{tag}");
    }
    assert!(md.contains("&lt;script>alert(1)&lt;/script> \\| ") && !md.contains("<script") && !md.contains("[x](http"));
}

#[test]
fn programs_on_the_same_hardware_stand_side_by_side() {
    let mut other = run();
    other["environment"]["program"] = json!("numpy");
    other["rows"] = json!([row("dense", None, (64, 128, 32), 0.8, 0.8)]);
    let folder = folder(&[("run.json", &run()), ("numpy.json", &other)]);
    exits(folder.path(), 0, &["report", "run.json", "numpy.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let section = &page[page.find("id=\"programs\"").unwrap()..page.find("id=\"hardware\"").unwrap()];
    // 2:4 takes 1.0 ms: twice as fast as own dense, and 0.8 times as fast as the other program's.
    assert!(section.contains("numpy 0.1.0, dense") && section.contains("0.80x"), "{section}");
    assert!(!section.contains("48x1x32"), "a shape that one program alone measured");
}

#[test]
fn accuracy_stands_beside_the_speed_of_the_same_pattern() {
    let model = model(&[("dense", None, 300.0), ("sparse24", Some(32), 200.0)]);
    let eval = |model: &str, spearman: f64| {
        json!({
            "schema": "sparse24-eval/1", "model": model, "sparsity": "none", "dtype": "f32", "spearman": spearman,
            "pearson": 0.5, "pairs": 99, "environment": { "command": format!("sparse24 eval --model {model}") },
        })
    };
    let prune = json!({
        "schema": "sparse24-prune/1", "input": "model/tiny", "output": "small", "method": "sparsegpt",
        "layers": [{ "vector": 32 }], "pruned_share": 1.0, "command": "sparse24 prune model/tiny small",
    });
    let (dense, small) = (eval("model/tiny", 0.9), eval("small", 0.8765));
    let files = [("m.json", &model), ("d.json", &dense), ("s.json", &small), ("p.json", &prune)];
    let folder = folder(&files);
    exits(folder.path(), 0, &["report", "m.json", "d.json", "s.json", "p.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    for text in ["sparsegpt, V=32", "0.8765 at 1.50x", "0.9000 at 1.00x", "2:4 V=32 1.50x"] {
        assert!(page.contains(text), "{text} is missing");
    }
}

/// The runs that are refused, and what the message must say.
#[test]
fn what_is_wrong_is_said_by_file_and_row_and_no_page_is_written() {
    type Spoil = fn(&mut Value);
    let cases: &[(&str, Spoil, &[&str])] = &[
        ("schema", |r| r["schema"] = json!("other/1"), &["schema", "other/1"]),
        ("future", |r| r["schema"] = json!("sparse24-bench/2"), &["newer", "sparse24-bench/1"]),
        ("none", |r| *r = json!([1]), &["no schema"]),
        ("field", |r| drop(r["rows"][1].as_object_mut().unwrap().remove("median_ms")), &["row 2", "median_ms"]),
        ("kernel", |r| r["rows"][3]["kernel"] = json!(7), &["row 4"]),
        ("units", |r| r["rows"][1]["effective_tflops"] = json!(1e3), &["row 2", "do not agree"]),
        ("ratio", |r| r["rows"][1]["speedup_vs_dense"] = json!(3.0), &["row 2", "speedup_vs_dense"]),
        ("clock", |r| r["rows"][1]["clock"] = json!("gpu_timestamps"), &["row 2", "gpu_timestamps", "host_wall"]),
        ("unverified", |r| r["rows"][1]["verified"] = json!(false), &["row 2", "not verified"]),
        ("order", |r| r["rows"][1]["min_ms"] = json!(5.0), &["row 2", "order"]),
        ("negative", |r| r["rows"][1]["min_ms"] = json!(-5.0), &["row 2", "positive"]),
        ("op", |r| r["rows"][1]["op"] = json!("quantised"), &["row 2", "quantised"]),
        ("vector", |r| r["rows"][1]["vector"] = json!(3), &["row 2", "vector length 3"]),
        ("no vector", |r| r["rows"][1]["vector"] = json!(null), &["row 2", "without vector"]),
        ("shape", |r| r["rows"][1]["m"] = json!(0), &["row 2", "shape"]),
        ("device", |r| r["rows"][1]["device"] = json!("Other"), &["row 2", "Other"]),
        ("environment", |r| drop(r.as_object_mut().unwrap().remove("environment")), &["environment"]),
        ("ceiling", |r| r["ceilings"]["read_gb_per_s"] = json!(0), &["ceilings", "positive"]),
        ("executed", |r| r["rows"][1]["executed_tflops"] = json!(0), &["row 2", "executed_tflops"]),
        ("empty", |r| r["rows"] = json!([]), &["no rows"]),
    ];
    for (name, spoil, said) in cases {
        let mut run = run();
        spoil(&mut run);
        let file = format!("{name}.json");
        let folder = folder(&[(&file, &run)]);
        let stderr = exits(folder.path(), 1, &["report", &file, "--out", "page.html"]);
        for text in said.iter().chain(&[file.as_str()]) {
            assert!(stderr.contains(text), "{name}: {text:?} is not in {stderr}");
        }
        assert!(!folder.path().join("page.html").exists(), "{name}");
    }
    let folder = folder(&[("run.json", &run())]);
    std::fs::write(folder.path().join("cut.json"), &run().to_string()[..500]).unwrap();
    assert!(
        exits(folder.path(), 1, &["report", "run.json", "cut.json", "--out", "page.html"])
            .contains("cut.json: not JSON")
    );
    assert!(exits(folder.path(), 1, &["report", "none.json", "--out", "page.html"]).contains("none.json"));
    assert!(exits(folder.path(), 1, &["report", "run.json", "--out", "page.pdf"]).contains("page.pdf"));
    assert!(!exits(folder.path(), 2, &["report", "--out", "page.html"]).is_empty());
    assert!(!folder.path().join("page.html").exists());
}

/// Files that hold the same thing twice are refused, also where all of it is dense or a model; a dense row that was
/// measured again is not.
#[test]
fn nothing_stands_on_the_page_twice() {
    let mut dense = run();
    dense["rows"] = json!([row("dense", None, (64, 128, 32), 0.8, 0.8)]);
    let mut again = dense.clone();
    again["rows"] = json!([row("dense", None, (64, 128, 32), 0.9, 0.9)]);
    let model = model(&[("dense", None, 300.0)]);
    let files = [("a.json", &dense), ("b.json", &dense), ("c.json", &again), ("d.json", &model), ("e.json", &model)];
    let folder = folder(&files);
    let stderr = exits(folder.path(), 1, &["report", "a.json", "b.json", "--out", "page.html"]);
    assert!(stderr.contains("a.json row 1 and b.json row 1 are both dense"), "{stderr}");
    let stderr = exits(folder.path(), 1, &["report", "d.json", "e.json", "--out", "page.html"]);
    assert!(stderr.contains("d.json row 1 and e.json row 1 are both dense f32 of tiny 32x64"), "{stderr}");
    exits(folder.path(), 0, &["report", "a.json", "c.json", "d.json", "--out", "page.html"]);
}

#[test]
fn wrong_passes_of_a_model_are_said_by_row() {
    type Spoil = fn(&mut Value);
    let cases: [(Spoil, &str); 4] = [
        (|row| row["parts"] = json!({ "gemm_ms": 0, "attention_ms": 0, "rest_ms": 0 }), "parts are not positive"),
        (|row| row["sequences_per_second"] = json!(1.0), "mixed units"),
        (|row| row["speedup_vs_dense"] = json!(9.0), "not the ratio to a dense row's median"),
        (|row| drop(row.as_object_mut().unwrap().remove("parts")), "parts"),
    ];
    for (spoil, said) in cases {
        let mut model = model(&[("dense", None, 300.0), ("auto", Some(1), 200.0)]);
        spoil(&mut model["rows"][1]);
        let folder = folder(&[("m.json", &model)]);
        let stderr = exits(folder.path(), 1, &["report", "m.json", "--out", "page.html"]);
        assert!(stderr.contains("m.json: row 2: ") && stderr.contains(said), "{said}: {stderr}");
    }
}

#[test]
fn it_pays_from_where_on_it_is_faster_beyond_the_spread() {
    // Ratios 0.5, 2, 1.02 (within the spread) and 2: from 64 tokens on.
    let mut run = run();
    let counts = [(1, 2.0), (4, 0.5), (16, 0.98), (64, 0.5)];
    let rows = counts.iter().flat_map(|&(n, ms)| {
        [row("dense", None, (32, n, 32), 1.0, 1.0), row("sparse24", Some(4), (32, n, 32), ms, 1.0)]
    });
    run["rows"] = rows.collect();
    let folder = folder(&[("run.json", &run)]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    assert!(page.contains("2:4 V=4 paid from 64 tokens on") && page.contains("did not pay at 32x1x32 (0.50x)"));
    assert!(page.contains("no difference beyond the spread at 32x16x32 (1.02x)"));
}

#[test]
fn the_same_machine_twice_needs_names() {
    let mut again = run();
    for dense in [0, 2] {
        again["rows"][dense]["max_ms"] = json!(9.0);
    }
    let folder = folder(&[("a.json", &run()), ("b.json", &again)]);
    let stderr = exits(folder.path(), 1, &["report", "a.json", "b.json", "--out", "page.html"]);
    assert!(stderr.contains("a.json row 2") && stderr.contains("b.json row 2"), "{stderr}");
    exits(folder.path(), 0, &["report", "before=a.json", "after=b.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let mut other = run();
    other["environment"]["threads"] = json!(4);
    std::fs::write(folder.path().join("c.json"), other.to_string()).unwrap();
    let stderr = exits(folder.path(), 1, &["report", "one=a.json", "one=c.json", "--out", "no.html"]);
    assert!(stderr.contains("3 threads in a.json") && stderr.contains("4 threads in c.json"), "{stderr}");
    assert!(page.contains("On before, 2:4") && page.contains("On after, 2:4") && page.contains("in 2 set-ups"));
}

#[test]
fn rows_that_failed_verification_are_on_the_page_and_in_the_exit_code() {
    let mut run = run();
    for field in
        ["median_ms", "min_ms", "max_ms", "q1_ms", "q3_ms", "effective_tflops", "executed_tflops", "speedup_vs_dense"]
    {
        run["rows"][1][field] = json!(null);
    }
    run["rows"][1]["verified"] = json!(false);
    run["rows"][1]["failure"] = json!("feature 3 is off");
    let folder = folder(&[("run.json", &run)]);
    let stderr = exits(folder.path(), 3, &["report", "run.json", "--out", "page.html"]);
    assert!(stderr.contains("run.json row 2") && stderr.contains("feature 3 is off"), "{stderr}");
    let page = read(&folder, "page.html");
    assert!(page.contains("Failed, not timed: run.json row 2") && page.contains("FAILED"));
}

/// The files of this repository are good ones.
#[test]
fn every_committed_run_is_read() {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let mut files: Vec<PathBuf> = Vec::new();
    for folder in std::fs::read_dir(results).unwrap() {
        let folder = folder.unwrap().path();
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        let entries = entries.map(|e| e.unwrap().path());
        files.extend(entries.filter(|p| p.extension().is_some_and(|e| e == "json")));
    }
    assert!(files.len() > 30);
    for file in files {
        sparse24::report::file::File::open(&file).unwrap_or_else(|e| panic!("{e}"));
    }
}
