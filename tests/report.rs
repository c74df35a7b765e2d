//! `sparse24 report` as a user runs it: what a page holds, and what is refused, by file and row.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;

use std::path::{Path, PathBuf};

use binary::{Run, command};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs the binary in `folder` to exit code `code` and returns stderr.
#[track_caller]
fn exits(folder: &Path, code: i32, arguments: &[&str]) -> String {
    command(arguments).current_dir(folder).run().exits(code).1
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
        "V=32: it paid in 1 of 2 rows: 2.00x as fast as dense at 64x128x32; it was slower at 48x1x32 (0.50x).",
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

/// An evaluation of a dense model by what `figures` say, under this schema.
fn evaluation(schema: &str, model: &str, figures: Value) -> Value {
    let mut eval = json!({
        "schema": schema, "model": model, "sparsity": "none", "dtype": "f32",
        "environment": { "command": format!("sparse24 {model}") },
    });
    eval.as_object_mut().unwrap().extend(figures.as_object().unwrap().clone());
    eval
}

fn perplexity(model: &str, mean_loss: f64) -> Value {
    let figures = json!({
        "perplexity": mean_loss.exp(), "mean_loss": mean_loss, "standard_error": 0.05, "text": "wiki.txt", "windows": 40,
        "context": 512,
    });
    evaluation("sparse24-perplexity/1", model, figures)
}

#[test]
fn every_kind_of_accuracy_has_a_table_and_a_chart() {
    let share = |accuracy: f64| json!({ "accuracy": accuracy, "interval": { "low": 0.5, "high": 0.96875 } });
    let mut labels = share(0.9375);
    labels["file"] = json!("news.csv");
    labels["texts"] = json!(210);
    let labels = evaluation("sparse24-eval/1", "encoder", json!({ "classification": labels }));
    let images = json!({ "images": 500, "images_folder": "photos", "top1": share(0.875), "top5": share(0.96875) });
    let images = evaluation("sparse24-eval/1", "eyes", images);
    let mut pruned = perplexity("less", 4.0);
    pruned["sparsity"] = json!("2:4");
    pruned["provenance"] = json!({ "pruned": "wanda V=1" });
    pruned["linear_layers"] = json!([{ "stored": true }]);
    let mut speed = model(&[("dense", None, 300.0), ("sparse24", Some(1), 200.0)]);
    speed["model"] = json!("less");
    let files = [
        ("l.json", &labels),
        ("i.json", &images),
        ("d.json", &perplexity("whole", 3.0)),
        ("p.json", &pruned),
        ("m.json", &speed),
    ];
    let folder = folder(&files);
    let names = files.map(|(name, _)| name);
    exits(folder.path(), 0, &[&["report"][..], &names, &["--out", "page.md"]].concat());
    let page = read(&folder, "page.md");
    let cells = |begins: &str| {
        let row = page.lines().find(|l| l.starts_with(begins)).unwrap_or_else(|| panic!("{begins}: {page}"));
        row.split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(cells("| encoder |")[2..8], ["dense", "f32", "0.9375", "0.5000 to 0.9688", "210", "news.csv"]);
    assert_eq!(cells("| eyes |")[2..9], ["dense", "f32", "0.8750", "0.5000 to 0.9688", "0.9688", "500", "photos"]);
    // exp(3), and of 0.05 less and more.
    assert_eq!(cells("| whole |")[2..9], ["dense", "f32", "20.09", "19.11 to 21.12", "40", "512", "wiki.txt"]);
    assert_eq!(
        cells("| less |")[2..10],
        ["wanda V=1", "f32", "54.60", "51.94 to 57.40", "40", "512", "wiki.txt", "1.50x"]
    );
    let picture = read(&folder, "page-accuracy-3.svg");
    for text in ["54.60 at 1.50x", "20.09", "dense: 20.09", "Perplexity on wiki.txt", "nats per token"] {
        assert!(picture.contains(text), "{text} is missing: {picture}");
    }
}

#[test]
fn figures_that_cannot_be_are_refused() {
    let wrong = |mut eval: Value, field: &str, value: Value| {
        eval[field] = value;
        eval
    };
    let share = json!({ "accuracy": 0.875, "interval": { "low": 0.9, "high": 0.96875 } });
    for (eval, message) in [
        (wrong(perplexity("a", 3.0), "mean_loss", json!(2.0)), "is not that of the mean loss 2"),
        (wrong(perplexity("a", 3.0), "windows", json!(0)), "0 windows of 512 tokens have nothing to predict"),
        (wrong(perplexity("a", 3.0), "standard_error", json!(-0.5)), "is not that of the mean loss 3"),
        (wrong(perplexity("a", 3.0), "text", Value::Null), "invalid type: null"),
        (evaluation("sparse24-perplexity/1", "a", json!({})), "missing field `perplexity`"),
        (
            evaluation("sparse24-eval/1", "a", json!({ "top1": share })),
            "top1: 0.875 between 0.9 and 0.96875 is no share",
        ),
        (evaluation("sparse24-eval/1", "a", json!({ "spearman": 1.5 })), "spearman: 1.5 is no correlation"),
    ] {
        let folder = folder(&[("e.json", &eval)]);
        let stderr = exits(folder.path(), 1, &["report", "e.json", "--out", "page.md"]);
        assert!(stderr.contains("e.json") && stderr.contains(message), "{message}: {stderr}");
    }
}

/// A run of retraining: 3 steps, and the best after the second.
fn retraining() -> Value {
    json!({
        "texts": 90, "held_out_texts": 10, "objective": "states", "steps": [{}, {}, {}], "seconds": 90.0,
        "held_out": [[0, 2.25], [2, 1.125], [3, 1.5]], "best_step": 2, "best_loss": 1.125,
    })
}

fn train() -> Value {
    let mut train = retraining();
    train["schema"] = json!("sparse24-train/1");
    train["input"] = json!("small");
    train["output"] = json!("better");
    train["provenance"] = json!({ "pruned": "sparsegpt V=32 seed=24", "retrained_on": "texts.txt (100 texts)" });
    train["environment"] = json!({ "command": "sparse24 retrain small better" });
    train
}

#[test]
fn runs_of_retraining_are_on_the_page_and_their_models_named_by_how_they_were_pruned() {
    let eval = |model: &str, spearman: f64| {
        json!({
            "schema": "sparse24-eval/1", "model": model, "sparsity": "none", "dtype": "f32", "spearman": spearman,
            "pearson": 0.5, "pairs": 9, "environment": { "command": format!("sparse24 eval {model}") },
        })
    };
    // What runs as 2:4, as its folder has it or not.
    let stored = |model: &str, provenance: Value, stored: bool| {
        let mut eval = eval(model, 0.6);
        eval["sparsity"] = json!("4:2:4");
        eval["provenance"] = provenance;
        eval["linear_layers"] = json!([{ "stored": stored }]);
        eval
    };
    let prune = |output: &str, retrained: Value| {
        json!({
            "schema": "sparse24-prune/1", "input": "tiny", "output": output, "method": "sparsegpt", "retrained": retrained,
            "layers": [{ "vector": 32 }], "pruned_share": 1.0, "command": format!("sparse24 prune tiny {output}"),
            "provenance": { "retrained_on": "others.txt" },
        })
    };
    // Stored dense, and pruned all the same.
    let mut late = eval("late", 0.65);
    late["provenance"] = json!({ "pruned": "obd V=2" });
    let files = [
        ("t.json", &train()),
        ("p.json", &prune("small", Value::Null)),
        ("r.json", &prune("both", retraining())),
        ("e.json", &eval("small", 0.7)),
        ("f.json", &eval("better", 0.8)),
        ("g.json", &eval("both", 0.9)),
        ("h.json", &stored("said", json!({ "pruned": "wanda V=4", "retrained_on": "texts.txt" }), true)),
        ("i.json", &stored("unsaid", json!({}), true)),
        ("j.json", &stored("by eval", json!({}), false)),
        ("k.json", &late),
        ("l.json", &stored("both", json!({}), false)),
    ];
    let folder = folder(&files);
    let names = files.map(|(name, _)| name);
    exits(folder.path(), 0, &[&["report"][..], &names, &["--out", "page.md"]].concat());
    let page = read(&folder, "page.md");
    let row = |begins: &str| page.lines().find(|l| l.starts_with(begins)).unwrap_or_else(|| panic!("{begins}: {page}"));
    let cells = |line: &str| line.split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>();
    assert_eq!(
        cells(row("| better | small"))[3..12],
        ["sparsegpt V=32 seed=24", "texts.txt (100 texts)", "states", "90", "3", "1.5", "2.2500", "1.1250", "2"]
    );
    assert_eq!(cells(row("| both | tiny"))[4..7], ["others.txt", "states", "90"]);
    assert_eq!(cells(row("| small | sparsegpt"))[2], "sparsegpt, V=32, 100 % of weights");
    for model in ["better", "both"] {
        assert_eq!(cells(row(&format!("| {model} | sparsegpt")))[2], "sparsegpt, V=32, 100 % of weights, retrained");
    }
    for (model, how) in [
        ("said", "wanda V=4, retrained"),
        ("unsaid", "V=4"),
        ("by eval", "magnitude, V=4"),
        ("small", "sparsegpt, V=32, 100 % of weights"),
        ("late", "obd V=2"),
    ] {
        assert_eq!(cells(row(&format!("| {model} |")))[2], how);
    }
    let again = "sparsegpt, V=32, 100 % of weights, retrained, then magnitude, V=4";
    assert!(page.lines().any(|l| l.starts_with("| both | sparsegpt") && l.contains(again)), "{page}");
    // Without the file of the pruning, that of the retraining says how it was.
    exits(folder.path(), 0, &["report", "t.json", "f.json", "--out", "alone.md"]);
    assert!(read(&folder, "alone.md").contains("| better | sparsegpt V=32 seed=24, retrained |"));
    let picture = read(&folder, "page-retraining.svg");
    assert!(picture.contains("better") && picture.contains("both") && picture.contains("held-out"), "{picture}");
}

#[test]
fn runs_of_retraining_that_contradict_themselves_are_refused() {
    type Spoil = fn(&mut Value);
    let cases: [(Spoil, &str); 7] = [
        (|t| t["best_loss"] = json!(1.0), "best_loss 1"),
        (|t| t["held_out"][1][0] = json!(0), "not in order"),
        (|t| t["seconds"] = json!(0.0), "not above 0"),
        (|t| t["best_step"] = json!(3), "step 3"),
        (|t| t["held_out"][2][0] = json!(4), "among the 3"),
        (|t| t["held_out"][1][1] = json!(-1.0), "negative"),
        (|t| drop(t.as_object_mut().unwrap().remove("held_out")), "held_out"),
    ];
    for (spoil, named) in cases {
        let mut train = train();
        spoil(&mut train);
        let mut prune = json!({
            "schema": "sparse24-prune/1", "input": "a", "output": "b", "method": "obd", "layers": [], "pruned_share": 1.0,
            "command": "x",
        });
        prune["retrained"] = train.clone();
        let folder = folder(&[("t.json", &train), ("p.json", &prune)]);
        for name in ["t.json", "p.json"] {
            let stderr = exits(folder.path(), 1, &["report", name, "--out", "page.html"]);
            assert!(stderr.contains(name) && stderr.contains(named), "{stderr}");
        }
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
    assert!(exits(folder.path(), 2, &["report", "run.json", "--out", "page.pdf"]).contains("page.pdf"));
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
    assert!(stderr.contains("a.json row 1 and b.json row 1 are both dense of shape 64x128x32"), "{stderr}");
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
    assert!(page.contains("2:4 V=4 paid from 64 tokens on") && page.contains("slower at 32x1x32 (0.50x)"));
    assert!(page.contains("within noise at 32x16x32 (1.02x)"));
}

/// One shape several times, and the same shape in rows of two layers: it does not pay from a count on at which one of
/// them does not.
#[test]
fn it_pays_from_a_count_on_in_every_row_of_it() {
    let mut run = run();
    let counts = [(1, 2.0), (4, 2.0), (16, 2.0), (16, 0.5), (64, 0.5)];
    let rows = counts.iter().enumerate().flat_map(|(at, &(n, ms))| {
        let mut pair = [row("dense", None, (32, n, 32), 1.0, 1.0), row("sparse24", Some(4), (32, n, 32), ms, 1.0)];
        pair.iter_mut().for_each(|row| row["name"] = json!(format!("layer {at}")));
        pair
    });
    run["rows"] = rows.collect();
    let folder = folder(&[("run.json", &run)]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    assert!(page.contains("2:4 V=4 paid from 64 tokens on"), "{page}");
}

/// The sentence at the top of a page of these rows of V=32: milliseconds where dense takes 1, and the middle half of
/// the samples as shares of it.
fn headline(rows: &[(f64, f64, f64)]) -> String {
    let mut run = run();
    let rows = rows.iter().enumerate().flat_map(|(at, &(ms, low, high))| {
        let shape = (32 + 32 * at, 8, 32);
        let mut sparse = row("sparse24", Some(32), shape, ms, 1.0);
        for (field, share) in [("min_ms", low), ("q1_ms", low), ("q3_ms", high), ("max_ms", high)] {
            sparse[field] = json!(share * ms);
        }
        [row("dense", None, shape, 1.0, 1.0), sparse]
    });
    run["rows"] = rows.collect();
    let folder = folder(&[("run.json", &run)]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let answer = page.split("<p class=\"answer\">").nth(1).unwrap().split("</p>").next().unwrap();
    answer.split_once("V=32: ").unwrap().1.to_owned()
}

/// Dense takes 0.95 to 1.05. What is within that is no figure of the headline, whatever its median.
#[test]
fn the_headline_does_not_praise_noise() {
    let narrow = |ms| (ms, 0.99, 1.01);
    /// Milliseconds, and the shares of them that the samples begin and end at.
    type Sampled = (f64, f64, f64);
    let cases: [(&[Sampled], &str); 8] = [
        (&[narrow(0.5)], "2.00x as fast as dense at 32x8x32."),
        (&[narrow(0.98)], "it did not pay in the one row; within noise at 32x8x32 (1.02x)."),
        // The highest ratio of all is noise.
        (
            &[(0.4, 0.5, 3.0), narrow(0.8)],
            "it paid in 1 of 2 rows: 1.25x as fast as dense at 64x8x32; within noise at 32x8x32 \
             (2.50x).",
        ),
        (
            &[narrow(0.5), narrow(0.8)],
            "it paid in every one of 2 rows: 1.25x to 2.00x as fast as dense, the most at 32x8x32.",
        ),
        (&[narrow(2.0), narrow(4.0)], "it paid in none of 2 rows; it was slower at 32x8x32 (0.50x), 64x8x32 (0.25x)."),
        (
            &[(0.9, 0.5, 1.5), narrow(2.0)],
            "it paid in none of 2 rows; it was slower at 64x8x32 (0.50x); within noise at 32x8x32 \
             (1.11x).",
        ),
        // Two decimals would say as fast as dense of what is slower.
        (
            &[(1.06, 0.995, 1.005), narrow(0.5)],
            "it paid in 1 of 2 rows: 2.00x as fast as dense at 64x8x32; it was slower at 32x8x32 (0.94x).",
        ),
        (
            &[narrow(0.5), narrow(0.5), narrow(0.5)],
            "it paid in every one of 3 rows: 2.00x to 2.00x as fast as dense, the most at 96x8x32.",
        ),
    ];
    for (rows, expected) in cases {
        assert_eq!(headline(rows), expected, "{rows:?}");
    }
}

/// Ratios are those of the medians, and have the digits that show which side of 1 they are on.
#[test]
fn a_ratio_does_not_contradict_its_verdict() {
    let mut run = run();
    run["rows"] =
        json!([row("dense", None, (32, 8, 32), 1.0, 1.0), row("sparse24", Some(32), (32, 8, 32), 1.004, 1.0)]);
    for (at, ms) in [(0, 1.0), (1, 1.004)] {
        for (field, share) in [("min_ms", 0.999), ("q1_ms", 0.999), ("q3_ms", 1.001), ("max_ms", 1.001)] {
            run["rows"][at][field] = json!(share * ms);
        }
    }
    // Within what is left of a figure that people print.
    run["rows"][1]["speedup_vs_dense"] = json!(1.01);
    let folder = folder(&[("run.json", &run)]);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.md"]);
    let page = read(&folder, "page.md");
    assert!(page.contains("it was slower at 32x8x32 (0.996x)") && page.contains("| 0.996x | slower |"), "{page}");
    assert!(!page.contains("1.01x"), "{page}");
}

#[test]
fn wrong_rows_and_rows_without_a_spread_are_not_rows_that_paid() {
    let mut run = run();
    run["rows"] = json!([
        row("dense", None, (32, 8, 32), 1.0, 1.0),
        row("sparse24", Some(32), (32, 8, 32), 0.5, 1.0),
        row("dense", None, (64, 8, 32), 1.0, 1.0),
        row("sparse24", Some(32), (64, 8, 32), 0.5, 1.0),
        row("dense", None, (96, 8, 32), 1.0, 1.0),
        row("sparse24", Some(32), (96, 8, 32), 0.5, 1.0),
    ]);
    for field in ["max_ms", "q1_ms", "q3_ms"] {
        run["rows"][3][field] = json!(null);
    }
    fail(&mut run["rows"][5]);
    let folder = folder(&[("run.json", &run)]);
    exits(folder.path(), 3, &["report", "run.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let expected = "V=32: it paid in 1 of 3 rows: 2.00x as fast as dense at 32x8x32; not judged, for want of a spread: \
                    64x8x32 (2.00x); wrong results, not timed, at 96x8x32.";
    assert!(page.contains(expected), "{page}");
}

/// A file's own word on noise counts, whatever the middle halves of its samples say.
#[test]
fn what_a_file_calls_noise_is_no_figure() {
    let mut run = run();
    run["rows"][1]["speedup_noisy"] = json!(true);
    let mut model = model(&[("dense", None, 300.0), ("auto", Some(1), 200.0)]);
    model["rows"][1]["speedup_noisy"] = json!(true);
    let mut sensitivity = sensitivity(&[("layer.0", 1, 0.0123), ("layer.1", 1, 0.5)]);
    for (at, noise) in [(0, true), (1, false)] {
        sensitivity["rows"][at]["within_noise"] = json!(noise);
    }
    let folder = folder(&[("run.json", &run), ("m.json", &model), ("s.json", &sensitivity)]);
    exits(folder.path(), 0, &["report", "run.json", "m.json", "s.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let said = "it paid in none of 2 rows; it was slower at 48x1x32 (0.50x); within noise at 64x128x32 (2.00x).";
    assert!(page.contains(said) && page.contains("auto V=1 1.50x (within noise)"), "{page}");
    let section = section(&page, "sensitivity");
    assert!(section.contains("0.0123 (?)") && !section.contains("0.5000 (?)"), "{section}");
    assert!(section.contains("within noise") && section.contains("beyond noise"), "{section}");
}

/// A language model can lose more than correlations and cosines can be.
#[test]
fn a_language_models_drop_is_in_nats() {
    let mut lost = sensitivity(&[("layer.0", 1, 3.5)]);
    lost["settings"]["metric"] = json!("log_likelihood");
    let of_encoder = sensitivity(&[("layer.0", 1, 3.5)]);
    let folder = folder(&[("lm.json", &lost), ("encoder.json", &of_encoder)]);
    exits(folder.path(), 0, &["report", "lm.json", "--out", "page.html"]);
    let section = section(&read(&folder, "page.html"), "sensitivity").to_owned();
    assert!(section.contains("mean log-probability (nats)") && section.contains("3.50000"), "{section}");
    exits(folder.path(), 1, &["report", "encoder.json", "--out", "page.html"]);
}

#[test]
fn a_pass_within_the_spread_of_dense_is_said_to_be() {
    let mut model = model(&[("dense", None, 300.0), ("auto", Some(1), 290.0), ("auto", Some(32), 200.0)]);
    for at in [0, 1] {
        model["rows"][at]["min_ms"] = json!(250.0);
        model["rows"][at]["max_ms"] = json!(350.0);
    }
    let folder = folder(&[("m.json", &model)]);
    exits(folder.path(), 0, &["report", "m.json", "--out", "page.md"]);
    let page = read(&folder, "page.md");
    assert!(page.contains("auto V=1 1.03x (within noise), auto V=32 1.50x."), "{page}");
    assert!(page.contains("| 1.03x | same |") && page.contains("| 1.50x | faster |"), "{page}");
}

/// Spoils a row as a failed verification does.
fn fail(row: &mut Value) {
    let times = ["median_ms", "min_ms", "max_ms", "q1_ms", "q3_ms"];
    for field in times.iter().chain(&["effective_tflops", "executed_tflops", "speedup_vs_dense"]) {
        row[field] = json!(null);
    }
    row["verified"] = json!(false);
    row["failure"] = json!("feature 3 is off");
}

/// A run of the same rows as [`run`], with other times.
fn later() -> Value {
    let mut later = run();
    let (a, b) = ((64, 128, 32), (48, 1, 32));
    later["rows"] = json!([
        row("dense", None, a, 2.02, 2.02),
        row("sparse24", Some(32), a, 0.5, 2.02),
        row("dense", None, b, 0.0202, 0.0202),
        row("sparse24", Some(32), b, 0.041, 0.0202),
    ]);
    later
}

/// The section of a page with this name.
fn section<'a>(page: &'a str, id: &str) -> &'a str {
    let start = page.find(&format!("id=\"{id}\"")).unwrap_or_else(|| panic!("no section {id}"));
    page[start..].split("</section>").next().unwrap()
}

#[test]
fn two_runs_of_a_machine_are_told_apart_and_compared() {
    type Differ = fn(&mut Value);
    let cases: [(Differ, &str, &str); 5] = [
        (|r| r["environment"]["version"] = json!("0.2.0"), "version 0.1.0", "version 0.2.0"),
        (|r| r["environment"]["commit"] = json!("def"), "commit abc", "commit def"),
        (|r| r["environment"]["simd"] = json!("scalar"), "avx2", "scalar"),
        (|r| r["environment"]["date"] = json!("2026-01-02T00:00:00Z"), "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
        // Measured again at once, in other files.
        (|_| (), "a.json", "b.json"),
    ];
    for (differ, first, second) in cases {
        let mut later = later();
        differ(&mut later);
        let folder = folder(&[("a.json", &run()), ("b.json", &later)]);
        exits(folder.path(), 0, &["report", "a.json", "b.json", "--out", "page.html"]);
        let page = read(&folder, "page.html");
        let place = |run: &str| format!("Testing 9000, 3 threads, {run}");
        for run in [first, second] {
            assert!(page.contains(&format!("On {}, 2:4 against", place(run))), "{run}");
        }
        let changed = format!(
            "{} against {}, of 4 rows: 1 faster beyond the noise (median 2.00x, the most 2.00x at shape 64x128x32 f32, \
             2:4 V=32); 0 slower beyond the noise; 3 within it.",
            place(second),
            place(first)
        );
        assert!(page.contains(&changed), "{changed} is not in\n{}", section(&page, "runs"));
        assert!(section(&page, "runs").contains("2.00x faster") && section(&page, "runs").contains("0.98x same"));
        assert!(page.contains("<h1>2:4 sparsity, measured on Testing 9000, 3 threads</h1>"));
    }
}

#[test]
fn runs_have_the_names_that_they_are_given() {
    let (mut c, mut d) = (model(&[("dense", None, 300.0), ("auto", Some(1), 200.0)]), later());
    for run in [&mut c, &mut d] {
        run["environment"]["commit"] = json!("def");
    }
    let mut other = run();
    other["environment"]["program"] = json!("numpy");
    other["rows"] = json!([row("dense", None, (64, 128, 32), 0.8, 0.8)]);
    let before_model = model(&[("dense", None, 300.0), ("auto", Some(1), 300.0)]);
    let files = [("a.json", &run()), ("b.json", &before_model), ("c.json", &c), ("d.json", &d), ("numpy.json", &other)];
    let folder = folder(&files);
    let names = ["@before=a.json", "@before=b.json", "@after=c.json", "@after=d.json", "numpy.json"];
    exits(folder.path(), 0, &[&["report"][..], &names, &["--out", "page.html"]].concat());
    let page = read(&folder, "page.html");
    assert!(page.contains("On Testing 9000, 3 threads, before, 2:4") && page.contains("3 threads, after, 2:4"));
    // Passes of a model count with the rest.
    assert!(page.contains("after against Testing 9000, 3 threads, before, of 6 rows: 2 faster beyond the noise"));
    // Other programs on that hardware stand beside both.
    let programs = section(&page, "programs");
    for name in ["sparse24 0.1.0, before, dense", "sparse24 0.1.0, after, dense", "numpy 0.1.0, dense"] {
        assert!(programs.contains(name), "{name}: {programs}");
    }

    // Names of machines do it, too, and a machine can have a name and runs.
    exits(folder.path(), 0, &["report", "before=a.json", "after=d.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    assert!(page.contains("On before, 2:4") && page.contains("On after, 2:4") && page.contains("in 2 set-ups"));
    assert!(page.contains("after against before, of 4 rows: 1 faster"), "{page}");
    exits(folder.path(), 0, &["report", "box@1=a.json", "box@2=d.json", "--out", "page.html"]);
    assert!(read(&folder, "page.html").contains("box, 2 against box, 1, of 4 rows: 1 faster"));
    // The same name for two of them says that they are one run.
    let stderr = exits(folder.path(), 1, &["report", "@x=a.json", "@x=d.json", "--out", "no.html"]);
    assert!(stderr.contains("a.json row 2 and d.json row 2 are both 2:4 V=32 of shape 64x128x32 f32"), "{stderr}");
    // A name for one of them leaves the other its own.
    exits(folder.path(), 0, &["report", "@old=a.json", "d.json", "--out", "page.html"]);
    assert!(read(&folder, "page.html").contains("On Testing 9000, 3 threads, commit def, 2:4"));
    assert!(!folder.path().join("no.html").exists());
}

/// Files of other rows of the same machine are one run, as when a page is put together from several commands.
#[test]
fn runs_without_a_row_in_common_are_one() {
    let (mut first, mut second) = (run(), run());
    first["rows"] = json!([first["rows"][0], first["rows"][1]]);
    second["rows"] = json!([second["rows"][2], second["rows"][3]]);
    second["environment"]["commit"] = json!("def");
    let folder = folder(&[("a.json", &first), ("b.json", &second)]);
    exits(folder.path(), 0, &["report", "a.json", "b.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    assert!(page.contains("On Testing 9000, 3 threads, 2:4") && page.contains("1 of 2 rows"), "{page}");
    assert!(!page.contains("Runs of one device"));
}

#[test]
fn the_same_run_twice_is_refused() {
    let mut again = run();
    for dense in [0, 2] {
        again["rows"][dense]["max_ms"] = json!(9.0);
    }
    let folder = folder(&[("a.json", &run()), ("b.json", &again)]);
    let stderr = exits(folder.path(), 1, &["report", "a.json", "b.json", "--out", "page.html"]);
    assert!(stderr.contains("a.json row 2 and b.json row 2") && stderr.contains("@before=a.json"), "{stderr}");
    let mut other = run();
    other["environment"]["threads"] = json!(1);
    std::fs::write(folder.path().join("c.json"), other.to_string()).unwrap();
    let stderr = exits(folder.path(), 1, &["report", "one=a.json", "one=c.json", "--out", "no.html"]);
    assert!(stderr.contains("3 threads in a.json") && stderr.contains("1 thread in c.json"), "{stderr}");
}

fn sensitivity(drops: &[(&str, usize, f64)]) -> Value {
    let row = |&(layer, vector, drop): &(&str, usize, f64)| json!({ "layer": layer, "vector": vector, "weights": 250, "drop": drop });
    json!({
        "schema": "sparse24-sensitivity/1", "version": "0.1.0", "model": "/home/alice/models/tiny",
        "settings": {
            "model": "8 bytes, crc32 00000000", "weights": null, "sparsity": "none", "dtype": "f32", "device": "cpu",
            "method": "magnitude", "seed": null, "calibration": null, "metric": "spearman", "texts": "9 bytes",
        },
        "dense": 0.8, "linear_weights": 1000, "rows": drops.iter().map(row).collect::<Vec<_>>(),
    })
}

#[test]
fn sensitivity_has_its_charts_and_tables() {
    let drops = [("layer.0 <q>", 1, 0.0123), ("layer.0 <q>", 32, 0.25), ("layer.1", 1, -0.002), ("layer.1", 32, 0.0)];
    let folder = folder(&[("s.json", &sensitivity(&drops)), ("run.json", &run())]);
    for files in [&["s.json"][..], &["run.json", "s.json"]] {
        exits(folder.path(), 0, &[&["report"], files, &["--out", "page.html"]].concat());
        let page = read(&folder, "page.html");
        let section = section(&page, "sensitivity");
        for text in ["tiny, magnitude", "0.8000 when dense", "layer.0 &lt;q", "0.0123", "0.2500", "-0.0020", "25.00"] {
            assert!(section.contains(text), "{text} is missing: {section}");
        }
        assert!(section.contains("<svg") && section.contains("2:4 V=32"), "{section}");
        assert!(!page.contains("alice") && !page.contains("No GPU") || files.len() > 1, "{page}");
    }
    type Spoil = fn(&mut Value);
    let cases: [(Spoil, &str); 6] = [
        (|s| s["rows"][1]["vector"] = json!(3), "row 2: vector length 3"),
        (|s| s["rows"][1]["weights"] = json!(1001), "row 2: 1001 weights"),
        (|s| s["rows"][1]["drop"] = json!(9.0), "row 2: a drop of 9"),
        (|s| drop(s["rows"][1].as_object_mut().unwrap().remove("drop")), "row 2: missing field `drop`"),
        (|s| drop(s.as_object_mut().unwrap().remove("settings")), "missing field `settings`"),
        (|s| s["schema"] = json!("sparse24-sensitivity/2"), "newer"),
    ];
    for (spoil, said) in cases {
        let mut bad = sensitivity(&drops);
        spoil(&mut bad);
        std::fs::write(folder.path().join("bad.json"), bad.to_string()).unwrap();
        let stderr = exits(folder.path(), 1, &["report", "bad.json", "--out", "no.html"]);
        assert!(stderr.contains("bad.json: ") && stderr.contains(said), "{said}: {stderr}");
    }
    // A run that was stopped before its first evaluation.
    let mut begun = sensitivity(&drops);
    begun["dense"] = json!(null);
    std::fs::write(folder.path().join("begun.json"), begun.to_string()).unwrap();
    exits(folder.path(), 0, &["report", "begun.json", "--out", "page.html"]);
}

/// What compilers make of kernels is on the page as what it is: no times, and the best schedule of each operation.
#[test]
fn compiled_kernels_have_a_section_marked_static() {
    let kernel = |name: &str, spills: f64| json!({ "kernel": name, "refused": null, "spills": spills });
    let dense = "gemm_dense-f32f32-128x128x16-none";
    let ratio = |name: &str, k: usize, best: f64| json!({ "kernel": name, "k": k, "best": [dense, best] });
    let names = ["gemm_sparse24-f32f32-v32-128x128x16-none", "gemm_sparse24-f32f32-v32-64x64x16-none"];
    let few = "gemm_sparse24-f32f32-v1-gemv_32x4_t256-none";
    let compiled = json!({
        "schema": "sparse24-compile/1", "program": "sparse24", "version": "0.1.0", "commit": "abcdef",
        "date": "2026-11-29T00:00:00Z", "command": "sparse24 kernels --compile",
        "device": { "name": "Radeon <x>", "driver": "radv Mesa 99", "architecture": "rdna3", "assumed": "that" },
        "kernels": [kernel(names[0], 0.0), kernel(names[1], 2.0), kernel(few, 0.0),
                    { "kernel": "pool-f32f32-quads", "refused": "no <reason>" }],
        "ratios": [ratio(names[1], 768, 1.25), ratio(names[0], 768, 1.7345), ratio(names[0], 4096, 1.8), ratio(few, 768, 1.5)],
    });
    let folder = folder(&[("c.json", &compiled), ("run.json", &run())]);
    for files in [&["c.json"][..], &["run.json", "c.json"]] {
        exits(folder.path(), 0, &[&["report"], files, &["--out", "page.html"]].concat());
        let page = read(&folder, "page.html");
        let section = section(&page, "compilers");
        for text in [
            "static, not timed",
            "Radeon &lt;x",
            "3 kernels compiled, 1 refused, 1 with spills",
            "Assumed",
            "1.73",
            "1.80",
            "sparse24 V=32",
            "sparse24 V=1, 4 tokens",
            "1.50",
        ] {
            assert!(section.contains(text), "{text} is missing: {section}");
        }
        // The slower schedule of the same operation.
        assert!(!section.contains("1.25"), "{section}");
    }
    type Spoil = fn(&mut Value);
    let cases: [(Spoil, &str); 5] = [
        (|c| c["kernels"] = json!([]), "has no kernels"),
        (|c| c["ratios"][0]["kernel"] = json!("gemm_other"), "gemm_other was not compiled"),
        (|c| c["ratios"][0]["best"][1] = json!(0.0), "at k = 768"),
        (|c| drop(c["kernels"][0].as_object_mut().unwrap().remove("refused")), "missing field `refused`"),
        (|c| c["schema"] = json!("sparse24-compile/2"), "newer"),
    ];
    for (spoil, said) in cases {
        let mut bad = compiled.clone();
        spoil(&mut bad);
        std::fs::write(folder.path().join("bad.json"), bad.to_string()).unwrap();
        let stderr = exits(folder.path(), 1, &["report", "bad.json", "--out", "no.html"]);
        assert!(stderr.contains("bad.json: ") && stderr.contains(said), "{said}: {stderr}");
    }
}

/// Commands, models, files and messages tell neither of users nor of what else lies on a machine.
#[test]
fn no_path_of_a_machine_is_on_the_page() {
    let absolute = "/home/alice/secret/";
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("secret");
    std::fs::create_dir(&inside).unwrap();
    let mut bench = run();
    bench["environment"]["command"] = json!(format!("{absolute}bin/sparse24 bench --json {absolute}run.json"));
    for row in bench["rows"].as_array_mut().unwrap() {
        row["command"] =
            json!(format!("sparse24 bench --weights={absolute}w.safetensors --cache '{absolute}my cache'"));
    }
    fail(&mut bench["rows"][3]);
    bench["rows"][3]["failure"] = json!(format!("cannot open {absolute}kernel"));
    let mut passes = model(&[("dense", None, 300.0), ("sparse24", Some(32), 200.0)]);
    passes["model"] = json!(format!("{absolute}tiny"));
    passes["environment"]["command"] = json!(format!("sparse24 bench --model {absolute}tiny"));
    let eval = json!({
        "schema": "sparse24-eval/1", "model": format!("{absolute}small"), "sparsity": "none", "dtype": "f32",
        "spearman": 0.5, "pearson": 0.5, "pairs": 99,
        "environment": { "command": format!("sparse24 eval {absolute}small --pairs ~/secret/pairs.csv") },
    });
    let prune = json!({
        "schema": "sparse24-prune/1", "input": format!("{absolute}tiny"), "output": format!("{absolute}small"),
        "method": "sparsegpt", "layers": [{ "vector": 32 }], "pruned_share": 1.0,
        "command": format!("sparse24 prune {absolute}tiny {absolute}small"),
    });
    let files = [("b.json", &bench), ("m.json", &passes), ("e.json", &eval), ("p.json", &prune)];
    let mut arguments = vec!["report".to_owned()];
    for (name, value) in files.iter().chain(&[("s.json", &sensitivity(&[("layer.0", 1, 0.1)]))]) {
        std::fs::write(inside.join(name), value.to_string()).unwrap();
        // Twice, for names of files to be what tells runs apart.
        arguments.push(inside.join(name).to_str().unwrap().to_owned());
    }
    for out in ["page.html", "page.md"] {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).chain(["--out", out]).collect();
        exits(folder.path(), 3, &arguments);
    }
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for word in ["alice", "secret", folder.path().to_str().unwrap()] {
            assert!(!text.contains(word), "{word} in {}", path.display());
        }
    }
    let page = read(&folder, "page.html");
    for text in [
        "sparse24 bench --json run.json",
        "--weights=w.safetensors --cache &#x27;my cache&#x27;",
        "sparse24 eval small --pairs pairs.csv",
        "sparse24 prune tiny small",
        "cannot open kernel",
        // The pruned model is still known for what it is.
        "sparsegpt, V=32",
    ] {
        assert!(page.contains(text), "{text} is missing");
    }
}

/// Runs the binary in `folder` with `stdin` to exit code `code`: stdout and stderr.
#[track_caller]
fn piped(folder: &Path, code: i32, arguments: &[&str], stdin: &[u8]) -> (String, String) {
    command(arguments).current_dir(folder).run_on(stdin).exits(code)
}

#[test]
fn a_dash_is_stdin_and_stdout() {
    let folder = folder(&[("run.json", &run())]);
    let text = run().to_string();
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.html"]);
    let page = read(&folder, "page.html");
    let (html, stderr) = piped(folder.path(), 0, &["report", "-", "--out", "-"], text.as_bytes());
    assert_eq!((html.replace("stdin", "run.json"), stderr.as_str()), (page.clone(), ""));
    assert_eq!(piped(folder.path(), 0, &["report", "run.json", "--out=-", "--format", "html"], b"").0, page);
    let (markdown, _) = piped(folder.path(), 0, &["report", "@now=-", "--out", "-", "--format", "md"], text.as_bytes());
    assert!(markdown.starts_with("# 2:4 sparsity, measured on Testing 9000") && markdown.contains("| machine |"));
    assert!(!markdown.contains("](<"), "there is nowhere to put a picture: {markdown}");
    // Nothing but the page that was asked for is written.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    exits(folder.path(), 0, &["report", "run.json", "--out", "page.txt", "--format", "html"]);
    assert_eq!(read(&folder, "page.txt"), page);

    for (arguments, named) in [
        (&["report", "-", "@b=-", "--out", "x.html"][..], "stdin"),
        (&["report", "run.json", "--out", "x.html", "--format", "md"], "--format"),
        (&["report", "run.json", "--out", "x.pdf"], "--format"),
        (&["report", "run.json", "--out", "x.html", "--format", "pdf"], "--format"),
    ] {
        let (stdout, stderr) = piped(folder.path(), 2, arguments, text.as_bytes());
        assert!(stdout.is_empty() && stderr.contains(named), "{arguments:?}: {stderr}");
    }
    let (_, stderr) = piped(folder.path(), 1, &["report", "-", "--out", "x.html"], b"{");
    assert!(stderr.contains("stdin: not JSON"), "{stderr}");
    let (_, stderr) = piped(folder.path(), 1, &["report", "-", "--out", "x.html"], b"\xff");
    assert!(stderr.contains("stdin: "), "{stderr}");
}

#[test]
fn rows_that_failed_verification_are_on_the_page_and_in_the_exit_code() {
    let mut run = run();
    fail(&mut run["rows"][1]);
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
