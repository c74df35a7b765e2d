//! `sparse24 retrain` as its users run it, on a BERT of a few thousand weights.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use binary::{Run, command, script, sparse24};
use serde_json::Value;
use sparse24::graph::Checkpoint;
use sparse24::text::Files;
use sparse24::{DType, HostWeights, models};
use tiny_bert::{TinyBert, WORDS};

#[track_caller]
fn fine(args: &[&str]) -> String {
    sparse24(args).exits(0).0
}

#[track_caller]
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let (_, stderr) = sparse24(args).exits(code);
    assert!(words.iter().all(|word| stderr.contains(word)), "{stderr}");
}

/// A tiny BERT's folder, the same pruned, and a text of sentences in its words.
fn models(dir: &Path) -> [String; 3] {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let [dense, pruned, text] = ["dense", "pruned", "texts.txt"].map(path);
    TinyBert::new(24).write(Path::new(&dense));
    let words = &WORDS[5..];
    let sentence =
        |i: usize| (0..3 + i % 6).map(|j| words[(i * 7 + j * j * 3 + j) % words.len()]).collect::<Vec<_>>().join(" ");
    fs::write(&text, (0..200).map(|i| sentence(i) + "\n").collect::<String>()).unwrap();
    fine(&["prune", &dense, &pruned, "--vector", "4"]);
    [dense, pruned, text]
}

fn load(folder: &str) -> Checkpoint {
    let files = Files::in_folder(folder);
    Checkpoint::load(models::load(&files.config).unwrap(), &files.weights, None, DType::F32).unwrap()
}

#[test]
fn a_pruned_model_is_retrained_and_stays_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let [out, json, svg] = ["out", "train.json", "losses.svg"].map(path);
    let args =
        ["retrain", &pruned, &out, "--teacher", &dense, "--input", &text, "--steps", "60", "--learning-rate", "3e-3"];
    let more = ["--batch", "16", "--json", &json, "--plot", &svg];
    let said = fine(&[&args[..], &more].concat());
    assert!(said.contains("retrained: 60 steps on 180 texts (20 held out)"), "{said}");

    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!((&report["schema"], &report["steps"].as_array().map(Vec::len)), (&"sparse24-train/1".into(), &Some(60)));
    for key in ["number", "loss", "similarity", "logits", "rate", "gradient"] {
        assert!(report["steps"][0][key].is_number(), "{key}: {}", report["steps"][0]);
    }
    assert_eq!(report["planned_steps"], 60);
    let held_out = report["held_out"].as_array().unwrap();
    let loss = |at: usize| held_out[at][1].as_f64().unwrap();
    assert!(report["best_loss"].as_f64().unwrap() < 0.8 * loss(0), "{held_out:?}");
    let retrained_on = report["provenance"]["retrained_on"].as_str().unwrap();
    assert!(retrained_on.contains("texts.txt") && retrained_on.contains("200"), "{retrained_on}");
    let svg = fs::read_to_string(&svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("held out") && svg.contains("<polyline"), "{svg}");

    let (before, after) = (load(&pruned), load(&out));
    for ((name, before), (_, after)) in before.linears().zip(after.linears()) {
        let (HostWeights::Sparse24(before), HostWeights::Sparse24(after)) = (before, after) else {
            panic!("{name} is not 2:4")
        };
        assert_eq!((before.vector(), before.meta()), (after.vector(), after.meta()), "{name}");
        assert_ne!(before.values(), after.values(), "{name}");
    }
    // What is read back is what was trained: norms and biases too.
    let norm = "encoder.layer.0.output.LayerNorm.weight";
    assert_ne!(before.vector_tensor(norm).unwrap(), after.vector_tensor(norm).unwrap());
    let words = "embeddings.word_embeddings.weight";
    let bytes = |folder: &str| sparse24::TensorFile::open(Path::new(folder).join("model.safetensors")).unwrap();
    assert_eq!(bytes(&pruned).bytes(words).unwrap(), bytes(&out).bytes(words).unwrap());
}

/// In one command: pruned by statistics of the very text, and retrained for as many steps as the time has room for.
#[test]
fn a_model_is_pruned_and_retrained_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, _, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, json) = (path("out"), path("prune.json"));
    let how = ["prune", &dense, &out, "--method", "sparsegpt", "--vector", "4", "--include", "attention|intermediate"];
    let more = ["--input", &text, "--batch", "16", "--json", &json];
    let all = |minutes: &'static str| [&how[..], &["--retrain", minutes], &more].concat();
    let start = Instant::now();
    let said = fine(&all("0.05"));
    assert!(start.elapsed() < Duration::from_secs(30), "three seconds took {:?}", start.elapsed());
    assert!(said.contains("on 180 texts (20 held out)"), "{said}");
    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let run = &report["retrained"];
    let first = run["held_out"][0][1].as_f64().unwrap();
    assert!(run["steps"].as_array().unwrap().len() >= 2 && run["best_loss"].as_f64().unwrap() < first, "{run}");
    for key in ["calibrated_on", "retrained_on"] {
        assert!(report["provenance"][key].as_str().unwrap().starts_with("texts.txt (200 texts"), "{report}");
    }
    // Layers that were left dense learned, too, and so did norms.
    let (before, after) = (load(&dense), load(&out));
    let name = "encoder.layer.0.output.dense";
    let dense_layer = |of: &Checkpoint| match &**of.linear(name).unwrap() {
        HostWeights::Dense(w) => w.clone(),
        other => panic!("{name} is {}", other.op()),
    };
    assert_ne!(dense_layer(&before), dense_layer(&after));
    assert!(matches!(**after.linear("encoder.layer.0.attention.output.dense").unwrap(), HostWeights::Sparse24(_)));
    let norm = "encoder.layer.0.output.LayerNorm.weight";
    assert_ne!(before.vector_tensor(norm).unwrap(), after.vector_tensor(norm).unwrap());

    fs::remove_dir_all(&out).unwrap();
    refused(&all("0"), 2, &["--retrain", "above 0"]);
    refused(&["prune", &dense, &out, "--retrain", "1"], 2, &["--input"]);
    fs::write(&text, "cat\n".repeat(10)).unwrap();
    refused(&all("1"), 1, &["--input", "10 texts are too few"]);
    assert!(!Path::new(&out).exists());
}

/// Attention and feed-forward one after the other come nearer to the teacher, too.
#[test]
fn blocks_are_retrained_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, json) = (path("out"), path("train.json"));
    let args = ["retrain", &pruned, &out, "--teacher", &dense, "--input", &text, "--objective", "blocks"];
    let more = ["--learning-rate", "3e-3", "--batch", "16", "--json", &json];
    fine(&[&args[..], &more, &["--steps", "200"]].concat());
    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let first = report["held_out"][0][1].as_f64().unwrap();
    assert_eq!((&report["objective"], &report["steps"].as_array().map(Vec::len)), (&"blocks".into(), &Some(200)));
    assert!(report["best_loss"].as_f64().unwrap() < 0.8 * first, "{report}");
    fs::remove_dir_all(&out).unwrap();
    fine(&[&args[..], &more, &["--minutes", "0.05"]].concat());
    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert!(report["best_loss"].as_f64().unwrap() < first, "{report}");
}

/// A file that cannot be written ends the run, and the one before it stays.
#[test]
#[cfg(unix)]
fn a_checkpoint_that_does_not_fit_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, state) = (path("out"), path("state.safetensors"));
    let args = ["retrain", &pruned, &out, "--teacher", &dense, "--input", &text, "--steps", "20", "--batch", "16"];
    let args = [&args[..], &["--checkpoint", &state]].concat();
    fine(&args);
    fs::remove_dir_all(&out).unwrap();
    let before = fs::read(&state).unwrap();
    // No file may grow beyond a block: what a full disk is for whoever writes.
    let (_, stderr) = script("trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"").args(&args).run().exits(1);
    assert!(stderr.contains("state.safetensors"), "{stderr}");
    assert!(fs::read(&state).unwrap() == before && !Path::new(&out).exists());
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

/// Weights that are stored dense with zeros keep these.
#[test]
fn zeros_of_dense_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, _, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let [zeros, out] = ["zeros", "out"].map(path);
    fine(&["prune", &dense, &zeros, "--vector", "2", "--to", "dense"]);
    fine(&["retrain", &zeros, &out, "--teacher", &dense, "--input", &text, "--steps", "3", "--batch", "16"]);
    for ((name, before), (_, after)) in load(&zeros).linears().zip(load(&out).linears()) {
        let (before, after) = (before.to_dense().unwrap(), after.to_dense().unwrap());
        let pairs = || before.elements().to_f32().into_iter().zip(after.elements().to_f32());
        assert!(pairs().all(|(before, after)| before != 0.0 || after == 0.0), "{name}: a pruned weight moved");
        assert!(pairs().any(|(before, after)| before != after), "{name}");
    }
}

/// A run that is killed goes on from its checkpoint, to the bits of one that was not.
#[test]
fn a_run_that_is_killed_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let [whole, parts, state] = ["whole", "parts", "state.safetensors"].map(path);
    let run = |out: &str, steps: &str| {
        let args = ["retrain", &pruned, out, "--teacher", &dense, "--input", &text, "--steps", steps, "--batch", "16"];
        args.map(str::to_owned).to_vec()
    };
    let args = |mut args: Vec<String>| {
        args.extend(["--checkpoint".to_owned(), state.clone()]);
        args
    };
    let strings = |args: &[String]| args.iter().map(String::as_str).collect::<Vec<_>>().join("\u{1}");
    let plain = run(&whole, "400");
    fine(&strings(&plain).split('\u{1}').collect::<Vec<_>>());

    let long = args(run(&parts, "400"));
    let long = strings(&long);
    let long: Vec<&str> = long.split('\u{1}').collect();
    let mut child = command(&long).env("SPARSE24_CHECKPOINT_SECONDS", "0").stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !Path::new(&state).exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(Path::new(&state).exists() && !Path::new(&parts).exists(), "it was killed in the middle");
    let (_, stderr) = sparse24(&long).exits(0);
    assert!(stderr.contains("going on after step"), "{stderr}");
    let read = |folder: &str| fs::read(Path::new(folder).join("model.safetensors")).unwrap();
    assert!(read(&whole) == read(&parts), "weights differ");
    // Of other flags it is another run.
    let other = args(run(&path("other"), "401"));
    let other = strings(&other);
    refused(&other.split('\u{1}').collect::<Vec<_>>(), 1, &["state.safetensors", "another run"]);
    // Minutes are the steps that the first sitting made of them.
    let minutes = other.replace("--steps", "--minutes").replace("401", "9");
    let (_, stderr) = sparse24(minutes.split('\u{1}')).exits(0);
    assert!(stderr.contains("after step 400 of 400"), "{stderr}");
}

#[test]
fn what_cannot_be_retrained_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, text] = models(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, few, empty) = (path("out"), path("few.txt"), path("empty.txt"));
    fs::write(&few, "cat\n".repeat(10)).unwrap();
    fs::write(&empty, "\n\n").unwrap();
    let args = |teacher: &str, input: &str| {
        ["retrain", &pruned, &out, "--teacher", teacher, "--input", input].map(str::to_owned)
    };
    let refused = |args: [String; 7], more: &[&str], code: i32, words: &[&str]| {
        let all: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        refused(&all, code, words);
        assert!(!Path::new(&out).exists());
    };
    refused(args(&dense, &few), &["--steps", "2"], 1, &["10 texts are too few"]);
    refused(args(&dense, &empty), &["--steps", "2"], 1, &["has no texts"]);
    refused(args(&path("nowhere"), &text), &["--steps", "2"], 1, &["--teacher", "nowhere"]);
    // The same words under other ids.
    let (mut swapped, other) = (TinyBert::new(24), path("other"));
    let words = swapped.tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (the, dog) = (words["the"].clone(), words["dog"].clone());
    (words["the"], words["dog"]) = (dog, the);
    swapped.write(Path::new(&other));
    refused(args(&other, &text), &["--steps", "2"], 1, &["--teacher", "tokenizer", "other ids"]);
    refused(args(&dense, &text), &["--steps", "2", "--objective", "logits"], 1, &["no head", "no logits"]);
    refused(args(&dense, &text), &["--epochs", "0"], 2, &["above 0"]);
    refused(args(&dense, &text), &["--epochs", "1", "--minutes", "2"], 2, &["cannot be used with"]);
}
