//! The binary as its users run it: arguments in; stdout, stderr and an exit code out.
//!
//! No test needs a GPU; where a driver could change what is printed, the child is told that there is none.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::fs;
use std::path::{Path, PathBuf};

use binary::{Ran, Run, command, sparse24, with_drivers};
use serde_json::{Value, json};
use sparse24::io::{self, Entry};
use sparse24::{DType, Matrix, Sparse24, VectorLen, prune};
use tiny_bert::TinyBert;

fn inspect(file: &Path, more: &[&str]) -> Ran {
    let mut args = vec!["inspect".as_ref(), file.as_os_str()];
    args.extend(more.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
    sparse24(&args)
}

/// A safetensors file put together by hand, so that it can lie.
fn by_hand(dir: &Path, header: &Value, data: &[u8]) -> PathBuf {
    let path = dir.join("by-hand.safetensors");
    let header = header.to_string().into_bytes();
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()).unwrap();
    path
}

/// The line of a listing that is about the tensor `name`, cut at spaces.
#[track_caller]
fn line<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let of = |line: &&str| line.split_whitespace().nth(8) == Some(name);
    text.lines().find(of).unwrap_or_else(|| panic!("no line of {name} in\n{text}")).split_whitespace().collect()
}

/// The tensor `name` of a JSON listing.
#[track_caller]
fn tensor<'a>(listing: &'a Value, name: &str) -> &'a Value {
    listing["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap()
}

/// That tensor without the shares of zeros at which forms take the same bytes.
#[track_caller]
fn bytes_of(listing: &Value, name: &str) -> Value {
    let mut tensor = tensor(listing, name).clone();
    if let Some(matrix) = tensor["matrix"].as_object_mut() {
        matrix.remove("break_even");
    }
    tensor
}

fn v(v: usize) -> VectorLen {
    VectorLen::new(v).unwrap()
}

/// Sixteen rows of 64 numbers from 1 to 4: no zeros, and not 2:4.
fn dense() -> Matrix {
    let numbers: Vec<_> = (0..16 * 64).map(|i| (1 + i % 4) as f32).collect();
    Matrix::from_f32(16, 64, &numbers).unwrap()
}

fn pruned(w: &Matrix, vector: VectorLen) -> Matrix {
    prune::random(w.rows(), w.cols(), vector, 24).unwrap().mask().apply(w).unwrap()
}

#[test]
fn help_shows_an_example_of_every_command() {
    let help = sparse24(["--help"]).fine();
    for (command, flag) in [
        ("bench", "--json"),
        ("convert", "--to"),
        ("devices", "--json"),
        ("embed", "--input"),
        ("eval", "--pairs"),
        ("inspect", "--json"),
    ] {
        assert!(help.contains(command), "{help}");
        let help = sparse24([command, "--help"]).fine();
        assert!(help.contains("Examples:\n") && help.contains(&format!("\n  sparse24 {command}")), "{help}");
        assert!(help.contains(flag), "{help}");
    }
}

#[test]
fn usage_errors_name_the_argument_and_exit_with_2() {
    for (args, named) in [
        (&["inspect"][..], "FILE.safetensors"),
        (&["inspect", "a.safetensors", "b.safetensors"], "b.safetensors"),
        (&["inspect", "a.safetensors", "--jsno"], "--jsno"),
        (&["devices", "llvmpipe"], "llvmpipe"),
        (&["device"], "device"),
        (&["embed", "--model", "m"], "--text"),
        (&["embed", "--model", "m", "--text", "a", "--input", "-"], "--input"),
        (&["eval", "--model", "m"], "--pairs"),
        (&["bench", "--seq", "8"], "--model"),
        (&["bench", "--model", "minilm", "--shapes", "8x8x8"], "--shapes"),
    ] {
        let stderr = sparse24(args).refused(2);
        assert!(stderr.contains(named) && stderr.contains("Usage:"), "{args:?}: {stderr}");
    }
    // A value that does not parse: the reason, and no usage.
    let stderr = sparse24(["embed", "--model", "m", "--text", "a", "--sparsity", "4:8"]).refused(2);
    assert!(stderr.contains("is not none, 2:4 or V:2:4"), "{stderr}");
}

// On other systems the driver is part of the system and cannot be hidden.
#[cfg(not(any(target_vendor = "apple", windows)))]
#[test]
fn without_a_driver_there_is_the_cpu_and_auto_takes_it() {
    let listing = sparse24(["devices", "--json"]).json();
    assert_eq!((&listing["schema"], &listing["auto"]), (&json!("sparse24-devices/1"), &json!("cpu")));
    let [cpu] = &listing["devices"].as_array().unwrap()[..] else { panic!("more than the CPU: {listing}") };
    assert_eq!((&cpu["device"], &cpu["kind"], &cpu["auto"]), (&json!("cpu"), &json!("cpu"), &json!(true)));
    assert!(cpu["threads"].as_u64().unwrap() > 0 && cpu["cache_bytes"].as_u64().unwrap() > 0, "{cpu}");

    let text = sparse24(["devices"]).fine();
    let name = cpu["name"].as_str().unwrap();
    assert!(text.starts_with(&format!("* {name}\n")), "{text}");
    assert!(text.contains("no GPU:") && text.contains(&format!("\n* auto takes {name}: ")), "{text}");
    for fact in ["--device            cpu", cpu["simd"].as_str().unwrap()] {
        assert!(text.contains(fact), "{fact} is missing from\n{text}");
    }
}

/// On whatever this machine has: every adapter of the library is listed, one device is what `auto` takes, and the text
/// says the same as the JSON.
#[test]
fn every_adapter_is_listed_and_can_be_named() {
    let devices = |json: bool| {
        // Drivers may complain on stderr, so that is not looked at here.
        with_drivers([Some("devices"), json.then_some("--json")].into_iter().flatten()).run().exits(0).0
    };
    let listing: Value = serde_json::from_str(&devices(true)).unwrap();
    let text = devices(false);
    let listed = listing["devices"].as_array().unwrap();
    let adapters = sparse24::Device::adapters();
    assert_eq!(listed.len(), adapters.len() + 1);
    assert_eq!(listed.iter().filter(|d| d["auto"] == true).count(), 1);
    let auto = listed.iter().find(|d| d["auto"] == true).unwrap();
    assert_eq!(auto["device"], listing["auto"]);
    assert!(text.contains(&format!("\n* auto takes {}: ", auto["name"].as_str().unwrap())), "{text}");
    for (i, (entry, info)) in listed.iter().zip(&adapters).enumerate() {
        assert_eq!((&entry["name"], &entry["driver"]), (&json!(info.name), &json!(info.driver)));
        assert_eq!((&entry["kind"], &entry["backend"]), (&json!(info.kind.name()), &json!(info.backend)));
        let features = &entry["features"];
        assert_eq!((&features["f16"], &features["timestamps"]), (&json!(info.caps.f16), &json!(info.caps.timestamps)));
        assert_eq!(features["binding_bytes"], json!(info.caps.binding_bytes));
        assert_eq!(features["workgroup_memory_bytes"], json!(info.caps.workgroup_memory));
        assert_eq!(features["subgroup_min"], json!(info.caps.subgroups.map(|s| s.0)));
        assert!(text.contains(&info.name) && text.contains(&info.driver), "{text}");
        if let Some(name) = entry["device"].as_str() {
            // As `Device::open` chooses; opening would ask more of an adapter than this test is about.
            let first = adapters.iter().position(|a| a.name.to_lowercase().contains(&name.to_lowercase()));
            assert_eq!(first, Some(i), "--device {name}");
        }
    }
}

#[test]
fn inspect_tells_density_vector_length_kept_magnitude_and_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    // Every group is 1, 2, 3, 4: of 10 2:4 keeps 7.
    let full = dense();
    let half = pruned(&full, v(4)).cast(DType::F16);
    // Not a multiple of 4 or 32, -0.0 for zero, three non-zeros of 45.
    let mut few = vec![-0.0; 5 * 9];
    (few[0], few[1], few[44]) = (1.0, -1.0, 2.0);
    let few = Matrix::from_f32(5, 9, &few).unwrap();
    io::save_matrices(&path, &[("l.10.full", &full), ("l.9.half", &half), ("few", &few)]).unwrap();

    let listing = inspect(&path, &["--json"]).json();
    assert_eq!(listing["schema"], "sparse24-inspect/1");
    assert_eq!(listing["file"], json!(path.to_str().unwrap()));
    assert_eq!(
        bytes_of(&listing, "l.10.full"),
        json!({"name": "l.10.full", "shape": [16, 64], "dtype": "f32", "stored": "dense", "bytes": 4096, "matrix": {
            "nonzeros": 1024, "density": 1.0, "vector": null, "kept_magnitude": 0.7,
            "dense_bytes": 4096, "coo_bytes": 1024 * 12, "csr_bytes": 1024 * 8 + 4 * 17,
            "bitmask_bytes": 1024 * 4 + 16 * 8, "sparse24_bytes": 16 * 32 * 4 + 16 * 2 * 4}})
    );
    assert_eq!(
        bytes_of(&listing, "l.9.half"),
        json!({"name": "l.9.half", "shape": [16, 64], "dtype": "f16", "stored": "dense", "bytes": 2048, "matrix": {
            "nonzeros": 512, "density": 0.5, "vector": 4, "kept_magnitude": 1.0,
            "dense_bytes": 2048, "coo_bytes": 512 * 10, "csr_bytes": 512 * 6 + 4 * 17,
            "bitmask_bytes": 512 * 2 + 16 * 8, "sparse24_bytes": 16 * 32 * 2 + 16 * 2 * 4}})
    );
    assert_eq!(
        bytes_of(&listing, "few"),
        json!({"name": "few", "shape": [5, 9], "dtype": "f32", "stored": "dense", "bytes": 180, "matrix": {
            "nonzeros": 3, "density": 3.0 / 45.0, "vector": 128, "kept_magnitude": 1.0,
            "dense_bytes": 180, "coo_bytes": 36, "csr_bytes": 3 * 8 + 4 * 6,
            "bitmask_bytes": 3 * 4 + 5 * 2, "sparse24_bytes": 5 * 6 * 4 + 5 * 4}})
    );
    assert_eq!(
        listing["total"],
        json!({"tensors": 3, "matrices": 3, "bytes": 4096 + 2048 + 180, "dense_bytes": 4096 + 2048 + 180,
            "coo_bytes": 12288 + 5120 + 36, "sparse24_bytes": 2176 + 1152 + 140})
    );

    let text = inspect(&path, &[]).fine();
    assert!(text.starts_with(&format!("{}: 3 tensors, 6.18 KiB\n", path.display())), "{text}");
    let full = ["16x64", "f32", "100%", "no", "70.0%", "4.00K", "12.0K", "2.12K", "l.10.full"];
    assert_eq!(line(&text, "l.10.full"), full);
    let half = ["16x64", "f16", "50.0%", "V=4", "100%", "2.00K", "5.00K", "1.12K", "l.9.half"];
    assert_eq!(line(&text, "l.9.half"), half);
    assert_eq!(line(&text, "few"), ["5x9", "f32", "6.7%", "V=128", "100%", "180B", "36B", "140B", "few"]);
    assert!(text.find("l.9.half") < text.find("l.10.full"), "layers in the order of their numbers:\n{text}");
    let total = "3 matrices: 6.18 KiB as dense, 17 KiB as COO, 3.39 KiB as 2:4 (54.8 % of dense)\n";
    assert!(text.contains(total), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100 || line.contains(path.to_str().unwrap())), "{text}");
}

#[test]
fn tensors_that_are_no_matrices_are_listed_with_shape_and_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let header = json!({
        "bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "conv": {"dtype": "BF16", "shape": [1, 2, 2], "data_offsets": [8, 16]},
        "ids": {"dtype": "I64", "shape": [1, 1], "data_offsets": [16, 24]},
        "scale": {"dtype": "F16", "shape": [], "data_offsets": [24, 26]},
        "empty": {"dtype": "F32", "shape": [0, 8], "data_offsets": [26, 26]},
        "odd\u{1b}[31m\nname": {"dtype": "U8", "shape": [1], "data_offsets": [26, 27]},
    });
    let path = by_hand(dir.path(), &header, &[0; 27]);
    let text = inspect(&path, &[]).fine();
    assert_eq!(line(&text, "bias"), ["2", "f32", "—", "—", "—", "8B", "—", "—", "bias"]);
    assert_eq!(line(&text, "conv")[..2], ["1x2x2", "bf16"]);
    assert_eq!(line(&text, "ids")[..2], ["1x1", "i64"]);
    assert_eq!(line(&text, "scale")[..2], ["—", "f16"]);
    assert_eq!(line(&text, "empty"), ["0x8", "f32", "—", "V=128", "100%", "0B", "0B", "0B", "empty"]);
    // A name must not command the terminal.
    assert!(!text.contains('\u{1b}') && text.contains("odd\\u{1b}[31m\\nname"), "{text}");
    let listing = inspect(&path, &["--json"]).json();
    assert_eq!((&tensor(&listing, "bias")["matrix"], &tensor(&listing, "bias")["bytes"]), (&Value::Null, &json!(8)));
    assert_eq!(listing["total"]["matrices"], 1);
}

#[test]
fn a_nan_or_an_infinity_costs_one_figure_and_not_the_listing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let sound = Matrix::from_f32(1, 4, &[1.0, 2.0, 3.0, 4.0]).unwrap();
    let nan = Matrix::from_f32(2, 4, &[1.0, 2.0, 3.0, 4.0, 0.0, 1.0, f32::NAN, 0.0]).unwrap();
    let infinite = Matrix::from_f32(1, 4, &[f32::INFINITY, 0.0, 0.0, 1.0]).unwrap();
    io::save_matrices(&path, &[("sound", &sound), ("nan", &nan), ("infinite", &infinite)]).unwrap();
    let text = inspect(&path, &[]).fine();
    assert_eq!(line(&text, "sound")[4], "70.0%");
    assert_eq!(line(&text, "nan")[2..5], ["75.0%", "no", "—"]);
    assert!(text.contains("note: nan: weight at row 1, column 2 is NaN"), "{text}");
    assert_eq!(line(&text, "infinite")[2..5], ["50.0%", "V=128", "—"]);
    assert!(text.contains("note: infinite: "), "{text}");
    let listing = inspect(&path, &["--json"]).json();
    let facts = &tensor(&listing, "nan")["matrix"];
    assert_eq!((&facts["kept_magnitude"], &facts["nonzeros"]), (&Value::Null, &json!(6)));
    assert!(facts["note"].as_str().unwrap().contains("row 1, column 2"), "{facts}");
}

#[test]
fn a_compressed_matrix_is_one_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let (w, dense) = (pruned(&dense().cast(DType::Bf16), v(8)), dense());
    let s = Sparse24::from_dense(&w, v(8)).unwrap();
    io::save(&path, &[("up", Entry::Sparse24(&s)), ("head", Entry::Matrix(&dense))]).unwrap();

    let text = inspect(&path, &[]).fine();
    let up = ["16x64", "bf16", "50.0%", "V=8", "100%", "2.00K", "5.00K", "1.02K", "up", "(stored", "as", "2:4)"];
    assert_eq!(line(&text, "up"), up);
    assert_eq!(line(&text, "head")[3], "no");
    assert!(!text.contains("up.values") && !text.contains("up.meta"), "{text}");
    let listing = inspect(&path, &["--json"]).json();
    assert_eq!(listing["tensors"].as_array().unwrap().len(), 2);
    let up = tensor(&listing, "up");
    // Values, and a word of codes for each of two row blocks and two runs of 32 columns.
    let bytes = 16 * 32 * 2 + 4 * 4;
    assert_eq!((&up["stored"], &up["bytes"]), (&json!("sparse24"), &json!(bytes)));
    assert_eq!((&up["matrix"]["vector"], &up["matrix"]["sparse24_bytes"]), (&json!(8), &json!(bytes)));
    assert_eq!(listing["total"]["bytes"], bytes + 4096);
}

#[test]
fn an_illegal_code_is_an_error_that_names_file_tensor_row_and_group() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let s = Sparse24::from_dense(&pruned(&dense(), v(1)), v(1)).unwrap();
    io::save_sparse24(&path, &[("up", &s)]).unwrap();
    // Codes are the last tensor of such a file or the first, so they are found by what they are.
    let mut bytes = fs::read(&path).unwrap();
    let meta: Vec<u8> = s.meta().iter().flat_map(|word| word.to_le_bytes()).collect();
    let at = bytes.windows(meta.len()).position(|w| w == meta).unwrap();
    // Row 3 has two words, 8 bytes; group 5 is the high nibble of the third byte.
    bytes[at + 3 * 8 + 2] = bytes[at + 3 * 8 + 2] & 0x0f | 0x50;
    fs::write(&path, bytes).unwrap();
    for more in [&[][..], &["--json"]] {
        let stderr = inspect(&path, more).refused(1);
        let expected = format!("error: {}: tensor up.meta: meta row 3, group 5: code 0x5 ", path.display());
        assert!(stderr.starts_with(&expected), "{stderr}");
    }
}

#[test]
fn broken_files_are_errors_that_name_the_file_and_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, parts: &[&str]| {
        let stderr = inspect(path, &[]).refused(1);
        assert!(stderr.starts_with(&format!("error: {}: ", path.display())), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{part:?} is missing from {stderr}");
        }
    };
    refused(&dir.path().join("missing.safetensors"), &["os error 2"]);
    refused(dir.path(), &[]);

    let path = dir.path().join("some.safetensors");
    fs::write(&path, b"1234567").unwrap();
    refused(&path, &["7 bytes"]);
    fs::write(&path, b"this is a text, and no safetensors file at all").unwrap();
    refused(&path, &["not a safetensors file"]);

    io::save_matrices(&path, &[("first", &dense()), ("second", &dense())]).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    refused(&path, &["tensor second", "truncated"]);

    let w = |shape: Value, end: u64| json!({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}});
    refused(&by_hand(dir.path(), &w(json!([2, 4]), 31), &[0; 31]), &["tensor w", "[2, 4]", "31 bytes"]);
    refused(&by_hand(dir.path(), &w(json!([1u64 << 62, 1u64 << 62]), 32), &[0; 32]), &["tensor w"]);
    refused(&by_hand(dir.path(), &w(json!([2, 4]), 32), &[0; 40]), &["8 bytes follow"]);
    refused(
        &by_hand(dir.path(), &json!({"w": {"dtype": "F31", "shape": [], "data_offsets": [0, 0]}}), &[]),
        &["tensor w"],
    );

    // Files that claim to be in the compressed format.
    let claim = |version: &str, vector: &str| {
        json!({
            "__metadata__": {"format": "sparse24", "version": version, "up.shape": "2,4", "up.vector": vector},
            "up.values": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        })
    };
    refused(&by_hand(dir.path(), &claim("2", "1"), &[0; 16]), &["version \"2\""]);
    refused(&by_hand(dir.path(), &claim("1", "3"), &[0; 16]), &["tensor up", "vector length 3"]);
    refused(&by_hand(dir.path(), &claim("1", "1"), &[0; 16]), &["tensor up.meta"]);
}

/// The lines of `embed`, and what it said on stderr.
#[track_caller]
fn embedded(ran: Ran) -> (Vec<(String, Vec<f64>)>, String) {
    assert_eq!(ran.code, 0, "stderr: {}", ran.stderr);
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let embedding = line["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        (line["text"].as_str().unwrap().to_owned(), embedding)
    };
    (ran.stdout.lines().map(line).collect(), ran.stderr)
}

/// Errors about a text name it by its place in the file, past the texts that go through the model at once too; empty
/// lines count.
#[test]
fn a_text_without_an_embedding_is_named_by_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyBert::new(9);
    // Without special tokens an empty text has none.
    tiny.tokenizer["post_processor"] = json!(null);
    tiny.write(dir.path());
    let model = dir.path().to_str().unwrap();
    let at = |name: &str, text: &str| {
        fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let input = at("texts.txt", &("cat\n".repeat(4099) + "\n" + &"dog\n".repeat(3)));
    let out = dir.path().join("out.jsonl");
    let embed = ["embed", "--device", "cpu", "--model", model];
    let why = "has no tokens, so it has no embedding\n";
    let error = sparse24([&embed[..], &["--input", &input, "--out", out.to_str().unwrap()]].concat()).refused(1);
    assert_eq!(error, format!("error: {input}: line 4100: {why}"));
    assert!(!out.exists());
    let error = sparse24([&embed[..], &["--text", "cat", ""]].concat()).refused(1);
    assert_eq!(error, format!("error: text 2: {why}"));
    let error = command([&embed[..], &["--input", "-"]].concat()).run_on(b"\ncat").refused(1);
    assert_eq!(error, format!("error: stdin: line 1: {why}"));
    let pairs = at("pairs.csv", &("a,b,score\r\n".to_owned() + &"cat,dog,1\r\n".repeat(2100) + "\r\ncat,,2\r\n"));
    let error = sparse24(["eval", "--device", "cpu", "--model", model, "--pairs", &pairs]).refused(1);
    assert_eq!(error, format!("error: {pairs}: line 2103: {why}"));
}

/// What a folder of Sentence Transformers asks for is done or refused.
#[test]
fn embed_heeds_pooling_and_length_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(2).write(dir.path());
    let model = dir.path().to_str().unwrap();
    let embed = ["embed", "--device", "cpu", "--model", model, "--text", "cat cat cat", "cat cat cat dog"];
    fs::write(dir.path().join("sentence_bert_config.json"), r#"{"max_seq_length": 5}"#).unwrap();
    let (lines, stderr) = embedded(sparse24(embed));
    assert_eq!(stderr, "warning: 1 of 2 texts were cut off at the model's limit of 5 tokens\n");
    assert_eq!(lines[0].1, lines[1].1);
    fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    fs::write(dir.path().join("1_Pooling/config.json"), r#"{"pooling_mode_cls_token": true}"#).unwrap();
    let (cls, _) = embedded(sparse24(embed));
    let far = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(far(&cls[0].1, &lines[0].1) > 1e-2, "the first token's state is not the mean");
    fs::write(dir.path().join("1_Pooling/config.json"), r#"{"pooling_mode": "median"}"#).unwrap();
    let stderr = sparse24(embed).refused(1);
    assert!(stderr.contains("1_Pooling/config.json: asks for the pooling \"median\", which is "), "{stderr}");

    // A prompt is put in front of a text, and is no part of what is printed.
    let pooling = r#"{"pooling_mode": "mean"}"#;
    fs::write(dir.path().join("1_Pooling/config.json"), pooling).unwrap();
    fs::write(dir.path().join("sentence_bert_config.json"), "{}").unwrap();
    let plain = embedded(sparse24(["embed", "--device", "cpu", model, "--text", "the dog cat", "cat"])).0;
    let prompts = r#"{"prompts": {"q": "the dog "}, "default_prompt_name": "q"}"#;
    fs::write(dir.path().join("config_sentence_transformers.json"), prompts).unwrap();
    let cat = ["embed", "--device", "cpu", model, "--text", "cat"];
    let by_default = embedded(sparse24(cat)).0;
    assert_eq!(by_default[0].0, "cat");
    assert!(far(&by_default[0].1, &plain[0].1) < 1e-6 && far(&by_default[0].1, &plain[1].1) > 1e-2);
    let named = embedded(sparse24([&cat[..], &["--prompt", "q"]].concat())).0;
    let none = embedded(sparse24([&cat[..], &["--prompt", ""]].concat())).0;
    assert!(far(&named[0].1, &plain[0].1) < 1e-6 && far(&none[0].1, &plain[1].1) < 1e-6);
    let stderr = sparse24([&cat[..], &["--prompt", "x"]].concat()).refused(1);
    assert_eq!(stderr, "error: --prompt: the model has no prompt \"x\"; it has \"q\"\n");
}

#[test]
fn embed_gives_a_line_for_each_text_in_order() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(1).write(dir.path());
    let model = dir.path().to_str().unwrap();
    let embed = ["embed", "--model", model, "--device", "cpu"];
    let texts = ["The cats sat.", "", "dog", "a \"quoted\"\ttext", "dog"];
    let (lines, stderr) = embedded(sparse24([&embed[..], &["--text"], &texts].concat()));
    assert_eq!(stderr, "");
    assert_eq!(lines.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>(), texts);
    for (text, embedding) in &lines {
        let length = embedding.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(embedding.len() == 40 && (length - 1.0).abs() < 1e-5, "{text}: {length}");
    }
    assert_eq!(lines[2], lines[4]);
    assert_ne!(lines[0].1, lines[1].1);
    let (dash, _) = embedded(sparse24([&embed[..], &["--text=-5 dogs", "--text=dog"]].concat()));
    // Among fewer tokens another kernel may multiply, whose sums are rounded in another order.
    let far = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(dash[0].0 == "-5 dogs" && far(&dash[1].1, &lines[2].1) < 1e-6, "{dash:?}");

    // The same from stdin and from a file into a file, whatever the ends of the lines.
    let input = texts.join("\r\n");
    let (from_stdin, _) = embedded(command([&embed[..], &["--input", "-"]].concat()).run_on(input.as_bytes()));
    assert_eq!(from_stdin, lines);
    let (file, out) = (dir.path().join("texts.txt"), dir.path().join("out.jsonl"));
    fs::write(&file, "\u{feff}".to_owned() + &texts.join("\n") + "\n").unwrap();
    let paths = ["--input", file.to_str().unwrap(), "--out", out.to_str().unwrap()];
    assert_eq!(sparse24([&embed[..], &paths].concat()).fine(), "");
    let stdout = fs::read_to_string(&out).unwrap();
    assert_eq!(embedded(Ran { stdout, ..Ran::default() }).0, lines);

    // Other weights, other embeddings; half precision, nearly the same ones.
    let far = |more: &[&str]| {
        let (others, _) = embedded(sparse24([&embed[..], &["--text", texts[0]], more].concat()));
        others[0].1.iter().zip(&lines[0].1).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert!(far(&["--sparsity", "2:4"]) > 1e-2);
    assert!(far(&["--sparsity", "none", "--batch", "1", "--threads", "1"]) < 1e-6);
    let half = far(&["--dtype", "f16"]);
    assert!(half > 1e-6 && half < 1e-2, "{half}");
}

#[test]
fn embed_warns_of_texts_that_are_too_long() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(2).write(dir.path());
    let (long, longer) = ("cat ".repeat(23), "cat ".repeat(400));
    let args = ["embed", "--device", "cpu", "--model", dir.path().to_str().unwrap(), "--text", &long, "dog", &longer];
    let (lines, stderr) = embedded(sparse24(args));
    assert_eq!(stderr, "warning: 2 of 3 texts were cut off at the model's limit of 24 tokens\n");
    assert_eq!((lines[2].0.as_str(), &lines[0].1), (longer.as_str(), &lines[2].1));
}

#[test]
fn embed_refuses_what_is_no_model_or_no_text() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |more: &[&str]| {
        let model = dir.path().to_str().unwrap();
        let stderr = sparse24([&["embed", "--device", "cpu", "--model", model][..], more].concat()).refused(1);
        stderr.replace(model, "DIR")
    };
    let text = ["--text", "cat"];
    TinyBert::new(3).write(dir.path());
    let bad = dir.path().join("bad.txt");
    fs::write(&bad, b"fine\ncaf\xe9\n").unwrap();
    assert_eq!(refused(&["--input", bad.to_str().unwrap()]), "error: DIR/bad.txt: line 2 is not UTF-8 at its byte 4\n");
    assert!(refused(&["--input", "nowhere.txt"]).starts_with("error: cannot read nowhere.txt: "));
    assert!(
        refused(&["--text", "cat", "--weights", "nowhere.safetensors"]).starts_with("error: nowhere.safetensors: ")
    );
    let stderr = sparse24(["embed", "--device", "cpu", "--model", "no/where", "--text", "cat"]).refused(1);
    assert!(stderr.starts_with("error: there is no folder no/where"), "{stderr}");

    let spoilt = |spoil: &dyn Fn(&mut TinyBert)| {
        let mut tiny = TinyBert::new(3);
        spoil(&mut tiny);
        tiny.write(dir.path());
        refused(&text)
    };
    let weight = "encoder.layer.1.output.dense.weight";
    assert_eq!(
        spoilt(&|t| t.tensors.retain(|name, _| name != weight)),
        format!("error: DIR/model.safetensors: tensor {weight} of shape [40, 72] is missing\n")
    );
    assert_eq!(
        spoilt(&|t| t.tensors.get_mut(weight).unwrap().0.reverse()),
        format!("error: DIR/model.safetensors: tensor {weight}: weight has shape [72, 40], expected [40, 72]\n")
    );
    assert_eq!(
        spoilt(&|t| *t.first(weight) = f32::NAN),
        format!("error: DIR/model.safetensors: tensor {weight}: row 0, column 0 is NaN as f32\n")
    );
    assert_eq!(
        spoilt(&|t| t.config["vocab_size"] = json!(500)),
        "error: DIR/tokenizer.json: the tokenizer has 14 ids, the model's vocab_size is 500\n"
    );
    assert_eq!(
        spoilt(&|t| t.config["num_attention_heads"] = json!(3)),
        "error: DIR/config.json: hidden_size is 40, which num_attention_heads, 3, does not divide\n"
    );
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        TinyBert::new(3).write(dir.path());
        fs::remove_file(dir.path().join(file)).unwrap();
        let stderr = refused(&text);
        assert!(stderr.starts_with(&format!("error: DIR/{file}: ")), "{stderr}");
    }
}

#[test]
fn eval_prints_correlations_and_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(4).write(dir.path());
    let (pairs, out) = (dir.path().join("pairs.csv"), dir.path().join("eval.json"));
    let eval = |csv: &str, more: &[&str]| {
        fs::write(&pairs, csv).unwrap();
        let args = ["eval", "--device", "cpu", "--model", dir.path().to_str().unwrap(), "--pairs"];
        sparse24([&args[..], &[pairs.to_str().unwrap()], more].concat())
    };
    // The same sentence twice is as similar as can be, and the first pair has the highest score.
    let text =
        eval("the cat,\"the, cat\",1\ndog,dog,5\nthe cat sat,ran,0.5\n", &["--json", out.to_str().unwrap()]).fine();
    assert!(
        text.contains("Spearman ")
            && text.contains(" over 3 pairs of ")
            && text.contains(" sentences per second (6 in "),
        "{text}"
    );
    let json: Value = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
    assert_eq!(
        (&json["schema"], &json["pairs"], &json["sentences"]),
        (&json!("sparse24-eval/1"), &json!(3), &json!(6))
    );
    let spearman = json["spearman"].as_f64().unwrap();
    assert!([1.0, 0.5].iter().any(|s| (s - spearman).abs() < 1e-12), "dog, dog is the most similar: {spearman}");
    assert!(json["sentences_per_second"].as_f64().unwrap() > 0.0);
    let environment = &json["environment"];
    assert!(environment["command"].as_str().unwrap().starts_with("sparse24 eval --device cpu "), "{environment}");
    assert!(environment["date"].is_string() && environment["simd"].is_string(), "{environment}");
    assert_eq!((&environment["kind"], &environment["samples"]), (&json!("cpu"), &Value::Null));

    let refused = |csv: &str| eval(csv, &[]).refused(1).replace(pairs.to_str().unwrap(), "PAIRS");
    assert_eq!(
        refused("cat,dog,1\ncat,dog\n"),
        "error: PAIRS: line 2 has 2 columns, expected sentence, sentence, score\n"
    );
    assert_eq!(refused("cat,dog,1\n"), "error: PAIRS: 1 pair is too few for a correlation\n");
    assert_eq!(
        refused("cat,dog,1\ncat,ran,1\n"),
        "error: PAIRS: all scores or all similarities are the same: no correlation\n"
    );
    fs::write(&pairs, b"cat,d\xff,1\ncat,dog,2\n").unwrap();
    let args = ["eval", "--model", dir.path().to_str().unwrap(), "--pairs", pairs.to_str().unwrap()];
    let stderr = sparse24(args).refused(1);
    assert!(stderr.contains("line 1") || stderr.contains("line: 1"), "{stderr}");
}

/// A figure lies in its interval, and a model is equal to itself on every task.
#[test]
fn eval_gives_intervals_and_compares_models_on_the_same_draws() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, pairs, texts, labelled] =
        ["dense", "pruned", "pairs.csv", "texts.txt", "labelled.csv"].map(|name| dir.path().join(name));
    TinyBert::new(4).write(&dense);
    let words = ["the", "cat", "sat", "on", "mat", "dog", "ran"];
    let phrase =
        |seed: usize, n: usize| (0..n).map(|i| words[(seed * 5 + i * i * 3 + seed / 7) % 7]).collect::<Vec<_>>();
    let sentence = |seed: usize, n: usize| phrase(seed, n).join(" ");
    let rows = |of: &dyn Fn(usize) -> String| (0..40).map(of).collect::<String>();
    fs::write(&pairs, rows(&|i| format!("{},{},{}\n", sentence(i, 3), sentence(i * 3 + 1, 4), i % 11))).unwrap();
    fs::write(
        &texts,
        format!("= A heading of more than five words =\n\nthe cat\n{}", rows(&|i| sentence(i, 6) + "\n")),
    )
    .unwrap();
    fs::write(&labelled, rows(&|i| format!("{},{}\n", sentence(i, 3), ["odd", "even"][i % 2]))).unwrap();
    let [dense, pruned, pairs, texts, labelled] =
        [&dense, &pruned, &pairs, &texts, &labelled].map(|path| path.to_str().unwrap());
    sparse24(["prune", dense, pruned, "--vector", "8"]).fine();
    let data = ["--pairs", pairs, "--texts", texts, "--classify", labelled];
    let run = |model: &str, more: &[&str]| sparse24([&["eval", "--device", "cpu", model], &data[..], more].concat());
    let eval = |model: &str| run(model, &["--against", dense, "--json"]).json();
    let in_its_interval = |value: &Value, interval: &Value| {
        let [value, low, high] = [value, &interval["low"], &interval["high"]].map(|x| x.as_f64().unwrap());
        assert!(low <= value && value <= high && low < high, "{low} {value} {high}");
    };

    let json = eval(pruned);
    let against = &json["against"];
    for of in [&json, against] {
        in_its_interval(&of["spearman"], &of["spearman_interval"]);
        in_its_interval(&of["pearson"], &of["pearson_interval"]);
    }
    in_its_interval(&json["classification"]["accuracy"], &json["classification"]["interval"]);
    in_its_interval(&against["accuracy"]["accuracy"], &against["accuracy"]["interval"]);
    let difference = &against["difference"];
    for name in ["spearman", "pearson"] {
        in_its_interval(&difference[name]["value"], &difference[name]["interval"]);
        let [here, there, less] =
            [&json[name], &against[name], &difference[name]["value"]].map(|x| x.as_f64().unwrap());
        assert_eq!(here - there, less, "{json}");
    }
    assert_eq!((&json["sparsity"], &against["sparsity"]), (&json!("8:2:4"), &json!("none")));
    let cosine = &against["texts"];
    assert_eq!((&cosine["texts"], &cosine["left_out"]), (&json!(40), &json!(2)));
    in_its_interval(&cosine["mean"], &cosine["interval"]);
    let [min, low, mean] = [&cosine["min"], &cosine["percentile_5"], &cosine["mean"]].map(|x| x.as_f64().unwrap());
    assert!(min <= low && low < mean && mean < 0.9999, "{cosine}");
    let classified = &json["classification"];
    assert_eq!(
        (&classified["folds"], &classified["classes"], &classified["most_frequent"]),
        (&json!(5), &json!(2), &json!(0.5))
    );
    // All texts of all tasks went through once.
    assert_eq!((&json["sentences"], &json["pairs"]), (&json!(80 + 40 + 40), &json!(40)));

    let json = eval(dense);
    for name in ["spearman", "pearson", "accuracy"] {
        let none = json!({"value": 0.0, "interval": {"low": 0.0, "high": 0.0}, "equal": true});
        assert_eq!(json["against"]["difference"][name], none, "{json}");
    }
    let [mean, min] = ["mean", "min"].map(|name| json["against"]["texts"][name].as_f64().unwrap());
    assert!((mean - 1.0).abs() < 1e-6 && (min - 1.0).abs() < 1e-6);
    let text = run(dense, &["--against", dense]).fine();
    let equal = text.matches("the difference is +0.0000 (+0.0000 to +0.0000): equal within the interval\n").count();
    assert_eq!(equal, 3, "{text}");
    assert!(text.contains(&format!(" over 40 texts of {texts} (2 short lines or headings left out)\n")), "{text}");

    // Fitted to one file and reported on another.
    let test = dir.path().join("test.csv");
    fs::write(&test, "label is no header here,odd\nthe cat,odd\nthe dog,even\n").unwrap();
    let test = test.to_str().unwrap();
    let args = ["eval", "--device", "cpu", dense, "--classify", labelled, "--classify-test", test, "--json"];
    let json = sparse24(args).json();
    let of = &json["classification"];
    assert_eq!((&of["texts"], &of["folds"], &of["test_file"]), (&json!(3), &Value::Null, &json!(test)));
    assert_eq!((&json["spearman"], &json["sentences"]), (&Value::Null, &json!(43)));
}

#[test]
fn eval_refuses_what_it_cannot_evaluate() {
    let dir = tempfile::tempdir().unwrap();
    let [model, wide, data] = ["model", "wide", "data.csv"].map(|name| dir.path().join(name));
    TinyBert::new(4).write(&model);
    TinyBert::of_width(4, 45, 72).write(&wide);
    let [model, wide, file] = [&model, &wide, &data].map(|path| path.to_str().unwrap());
    let refused = |text: &str, code: i32, more: &[&str]| {
        fs::write(&data, text).unwrap();
        sparse24([&["eval", "--device", "cpu", model], more].concat()).refused(code).replace(file, "FILE")
    };
    let line = "the cat sat on the mat\n";
    assert!(refused("", 2, &[]).contains("<--pairs <CSV>|--texts <TXT>|--classify <CSV>|--images <DIR>>"));
    assert!(refused(line, 2, &["--texts", file]).contains("--against <DIR>"));
    assert!(refused(line, 2, &["--classify-test", file]).contains("--classify <CSV>"));
    let both = refused(line, 2, &["--pairs", "-", "--classify", "-"]);
    assert!(both.contains("stdin can be read once: --pairs and --classify are both `-`"), "{both}");
    for (text, option, error) in [
        ("", "--texts", "error: FILE: has no line of 5 words or more\n"),
        ("", "--classify", "error: FILE: has no texts\n"),
        (
            "cat,x\ndog,x\n",
            "--classify",
            "error: FILE: all texts are of the class \"x\": there is nothing to tell apart\n",
        ),
        ("cat,x\ndog\n", "--classify", "error: FILE: line 2 has 1 column, expected text, label\n"),
        ("cat,x\ncat,x\ncat,y\ncat,y\n", "--classify", "error: FILE: 4 texts cannot be parted into 5 folds\n"),
    ] {
        assert_eq!(refused(text, 1, &[option, file, "--against", model]), error);
    }
    let same = refused("cat,x\ncat,x\ndog,y\ndog,y\n", 1, &["--classify", file, "--classify-test", file]);
    assert!(same.starts_with("error: --classify-test: FILE has the texts that the probe is fitted to"), "{same}");
    let widths = refused(line, 1, &["--texts", file, "--against", wide]).replace(model, "MODEL").replace(wide, "WIDE");
    assert!(widths.contains("embeddings of MODEL have 40 features, those of WIDE 45"), "{widths}");
    let none = refused(line, 1, &["--texts", file, "--against", "nowhere"]);
    assert!(none.starts_with("error: --against: there is no folder nowhere"), "{none}");
}

/// What weights were made from goes along with them, and a figure on that is warned of.
#[test]
fn eval_says_what_weights_were_made_from() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, converted, pairs, texts, others] =
        ["dense", "pruned", "converted", "pairs.csv", "texts.txt", "others.csv"].map(|name| dir.path().join(name));
    TinyBert::new(4).write(&dense);
    fs::write(&pairs, "the cat,the dog,1\ndog,dog,5\nthe cat sat,ran,0.5\n").unwrap();
    fs::write(&others, "the mat,the dog,1\ndog,dog,5\nthe cat sat,ran,0.5\n").unwrap();
    fs::write(&texts, "the cat sat\n\nthe dog ran\n").unwrap();
    let [dense, pruned, converted, pairs, texts, others] =
        [&dense, &pruned, &converted, &pairs, &texts, &others].map(|path| path.to_str().unwrap());
    let args = ["--device", "cpu", "--method", "wanda", "--calibration", texts, "--pairs", pairs, "--max-drop", "2"];
    let report = sparse24([&["prune", dense, pruned], &args[..], &["--json"]].concat()).json();
    let made = &report["provenance"];
    assert_eq!(made["pruned"], "wanda V=1 seed=24");
    for (key, start) in
        [("calibrated_on", "texts.txt (2 texts, 25 bytes, crc32 "), ("chosen_on", "pairs.csv (3 pairs, ")]
    {
        assert!(made[key].as_str().unwrap().starts_with(start), "{made}");
    }
    sparse24(["convert", pruned, converted, "--to", "dense"]).fine();
    for model in [pruned, converted] {
        let ran = sparse24(["eval", "--device", "cpu", model, "--pairs", pairs, "--json"]);
        let json: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(json["provenance"], *made);
        assert_eq!(json["seen"], json!([format!("{pairs} is what the weights were chosen on")]));
        let warning =
            format!("warning: {pairs} is what the weights were chosen on: figures on it flatter these weights\n");
        assert_eq!(ran.stderr, warning);
    }
    let text = sparse24(["eval", "--device", "cpu", pruned, "--pairs", others]).fine();
    assert!(text.contains("\nweights: calibrated on texts.txt (2 texts, "), "{text}");
    let text = sparse24(["eval", "--device", "cpu", dense, "--pairs", pairs]).fine();
    assert!(text.contains("\nweights: no record of how they were made\n"), "{text}");
}

/// What the layers are is said, whether the file has them so or --sparsity made them so.
#[test]
fn eval_says_what_the_layers_are() {
    let dir = tempfile::tempdir().unwrap();
    let [dense, pruned, mixed, pairs] = ["dense", "pruned", "mixed", "pairs.csv"].map(|name| dir.path().join(name));
    TinyBert::new(4).write(&dense);
    fs::write(&pairs, "the cat,the dog,1\ndog,dog,5\nthe cat sat,ran,0.5\n").unwrap();
    let [dense, pruned, mixed, pairs] = [&dense, &pruned, &mixed, &pairs].map(|path| path.to_str().unwrap());
    sparse24(["prune", dense, pruned, "--vector", "8"]).fine();
    sparse24(["prune", dense, mixed, "--include", r"layer\.0\.(intermediate|output)", "--vector", "32"]).fine();
    let eval = |model: &str, more: &[&str]| {
        let args = ["eval", "--device", "cpu", "--pairs", pairs, model];
        let text = sparse24([&args[..], more].concat()).fine();
        let json = sparse24([&args[..], more, &["--json"]].concat()).fine();
        (text, serde_json::from_str::<Value>(&json).unwrap())
    };
    for (model, more, line, sparsity) in [
        (dense, &[][..], "dense; 12 of 12 layers", "none"),
        (pruned, &[], "2:4, V=8, stored; 12 of 12 layers", "8:2:4"),
        (mixed, &[], "dense; 10 of 12 layers + 2:4, V=32, stored; 2 of 12 layers", "mixed"),
        (dense, &["--sparsity", "2:4"], "2:4, V=1, pruned by --sparsity; 12 of 12 layers", "2:4"),
        (dense, &["--sparsity", "2:4", "--vector", "4"], "2:4, V=4, pruned by --sparsity; 12 of 12 layers", "4:2:4"),
        (dense, &["--sparsity", "4:2:4"], "2:4, V=4, pruned by --sparsity; 12 of 12 layers", "4:2:4"),
        (
            mixed,
            &["--sparsity", "2:4"],
            "2:4, V=1, pruned by --sparsity; 10 of 12 layers + 2:4, V=32, stored; 2 of 12 layers",
            "mixed",
        ),
    ] {
        let (text, json) = eval(model, more);
        assert!(text.contains(&format!("\nlinear layers: {line}\n")), "{text}");
        assert_eq!(json["sparsity"], sparsity);
        let layers: u64 = json["linear_layers"].as_array().unwrap().iter().map(|f| f["layers"].as_u64().unwrap()).sum();
        assert_eq!(layers, 12, "{json}");
    }
    let (_, json) = eval(pruned, &[]);
    assert_eq!(json["linear_layers"], json!([{"form": "2:4", "vector": 8, "stored": true, "layers": 12}]));

    // Flags that clash, or that nothing is pruned by.
    for (more, why) in [
        (&["--vector", "4"][..], "--vector 4 is for --sparsity 2:4, which is not given"),
        (&["--vector", "4", "--sparsity", "none"], "--vector 4 is for --sparsity 2:4, which is not given"),
        (&["--vector", "4", "--sparsity", "8:2:4"], "--vector 4 and --sparsity 8:2:4 both say how many rows share"),
    ] {
        for command in [&["eval", dense, "--pairs", pairs][..], &["embed", dense, "--text", "cat"]] {
            let stderr = sparse24([command, more].concat()).refused(2);
            assert!(stderr.contains(why), "{stderr}");
        }
    }
}

/// The first batch of each shape is told apart from the others, and nothing is embedded twice.
#[test]
fn evals_speed_leaves_out_the_first_batch_of_each_shape() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(4).write(dir.path());
    let model = dir.path().to_str().unwrap();
    let pairs: String = (0..20).map(|i| format!("the cat,the dog {},{i}\n", "cat ".repeat(i % 3))).collect();
    let eval = |args: &[&str]| {
        let all = [&["eval", "--device", "cpu", "--model", model, "--pairs", "-"][..], args].concat();
        let ran = command(&all).run_on(pairs.as_bytes());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{}", ran.stdout);
        ran.stdout
    };
    let json: Value = serde_json::from_str(&eval(&["--batch", "8", "--json"])).unwrap();
    // 40 sentences of at most 8 tokens: five batches of one shape.
    let first = &json["first_batches"];
    assert_eq!((&first["shapes"], &first["sentences"], &json["pairs_file"]), (&json!(1), &json!(8), &json!("stdin")));
    let [all, first, speed] =
        [&json["seconds"], &first["seconds"], &json["sentences_per_second"]].map(|x| x.as_f64().unwrap());
    assert!(0.0 < first && first < all, "{first} of {all}");
    assert!((speed * (all - first) - 32.0).abs() < 1e-6, "{json}");
    let text = eval(&["--batch", "8"]);
    assert!(text.contains(" sentences per second (32 in ") && text.contains("the first batch of 1 shape, "), "{text}");
    // One batch is all there is.
    let text = eval(&["--batch", "64"]);
    assert!(text.contains("(40 in ") && text.contains("every batch was the first of its shape"), "{text}");
}

/// Correlations are of the similarity that the model's folder names.
#[test]
fn eval_compares_embeddings_as_the_folder_says() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(4).write(dir.path());
    // Embeddings of other lengths than 1, so that it matters.
    let list = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                   {"path": "1", "type": "sentence_transformers.models.Pooling"}]"#;
    fs::write(dir.path().join("modules.json"), list).unwrap();
    fs::create_dir(dir.path().join("1")).unwrap();
    fs::write(dir.path().join("1/config.json"), r#"{"pooling_mode": "mean_sqrt_len_tokens"}"#).unwrap();
    let model = dir.path().to_str().unwrap();
    let pairs = "the cat,cat cat cat cat the,3\ndog,dog the,5\nthe cat sat,ran,0.5\nmat,cat,2\n";
    let texts = pairs.split([',', '\n']).enumerate().filter(|(i, _)| i % 3 < 2);
    let texts: String = texts.map(|(_, text)| text.to_owned() + "\n").collect();
    let embed = ["embed", "--device", "cpu", model, "--input", "-"];
    let (lines, _) = embedded(command(embed).run_on(texts.as_bytes()));
    let scores = [3.0, 5.0, 0.5, 2.0];
    for (name, of) in [
        (
            "cosine",
            &(|a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as &dyn Fn(&[f64], &[f64]) -> f64,
        ),
        ("dot", &|a, b| dot(a, b)),
        ("euclidean", &|a, b| -(dot(a, a) + dot(b, b) - 2.0 * dot(a, b)).sqrt()),
        ("manhattan", &|a, b| -a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>()),
    ] {
        let settings = format!(r#"{{"similarity_fn_name": "{name}"}}"#);
        fs::write(dir.path().join("config_sentence_transformers.json"), settings).unwrap();
        let ran = command(["eval", "--device", "cpu", model, "--pairs", "-", "--json=-"]).run_on(pairs.as_bytes());
        let json: Value = serde_json::from_str(&ran.stdout).unwrap();
        let x: Vec<f64> = (0..4).map(|i| of(&lines[2 * i].1, &lines[2 * i + 1].1)).collect();
        let (mx, my) = (x.iter().sum::<f64>() / 4.0, scores.iter().sum::<f64>() / 4.0);
        let (x, y): (Vec<_>, Vec<_>) = x.iter().zip(scores).map(|(x, y)| (x - mx, y - my)).unzip();
        let expected = dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt();
        assert_eq!(json["similarity"], name);
        let got = json["pearson"].as_f64().unwrap();
        assert!((got - expected).abs() < 1e-4, "{name}: {got}, {expected}");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A dash is stdout, and `--json` another name for it.
#[test]
fn embed_writes_to_stdout_by_every_name() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(1).write(dir.path());
    let args = ["embed", "--device", "cpu", dir.path().to_str().unwrap(), "--text", "dog"];
    let expected = sparse24(args).fine();
    for more in [&["--out", "-"][..], &["--out"], &["--json"], &["--json", "-"]] {
        assert_eq!(sparse24([&args[..], more].concat()).fine(), expected, "{more:?}");
    }
}

#[test]
fn bench_of_a_model_verifies_every_row_and_says_where_time_goes() {
    let dir = tempfile::tempdir().unwrap();
    TinyBert::new(5).write(dir.path());
    let out = dir.path().join("run.json");
    let model = dir.path().to_str().unwrap();
    let args = ["bench", "--device", "cpu", "--quick", "--model", model, "--batch", "3", "--seq", "24", "--json"];
    let text = sparse24([&args[..], &[out.to_str().unwrap()]].concat()).fine();
    assert!(text.contains("2 layers of 40 features") && text.contains("all 8 rows verified"), "{text}");
    assert!(text.contains("GEMMs are "), "{text}");
    let json: Value = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
    assert_eq!(
        (&json["schema"], &json["batch"], &json["seq"]),
        (&json!("sparse24-model-bench/1"), &json!(3), &json!(24))
    );
    let rows = json["rows"].as_array().unwrap();
    let named: Vec<_> = rows.iter().map(|r| (r["op"].as_str().unwrap(), r["vector"].as_u64())).collect();
    let of_v = |v| [("sparse24", Some(v)), ("auto", Some(v))];
    assert_eq!(named, [&[("dense", None)][..], &of_v(1), &of_v(32), &of_v(128), &[("masked", None)]].concat());
    for row in rows {
        let parts = ["gemm_ms", "attention_ms", "rest_ms"].map(|part| row["parts"][part].as_f64().unwrap());
        let median = row["median_ms"].as_f64().unwrap();
        assert!(parts.iter().all(|&ms| ms > 0.0) && (parts.iter().sum::<f64>() / median - 1.0).abs() < 1e-9, "{row}");
        assert!(row["parts_alone_ms"].as_f64().unwrap() > 0.0 && row["noisy"].is_boolean(), "{row}");
        assert!(row["parts_cost"]["gemm_gflop"].as_f64() > row["parts_cost"]["rest_gflop"].as_f64(), "{row}");
        assert!(row["max_error"].as_f64().unwrap() <= 5e-5 && row["verified"] == true, "{row}");
        let command = row["command"].as_str().unwrap();
        assert!(command.contains("--batch 3 --seq 24") && command.contains("--ops dense"), "{command}");
    }
    assert_eq!(rows[0]["speedup_vs_dense"], 1.0);
    assert_eq!(json["weights"], "folder");
    assert!(!text.contains("random weights"), "{text}");

    // Fewer rows, half precision, and the plans behind them.
    let few = ["--ops", "sparse24", "--vector", "4", "--dtype", "f16", "--explain"];
    let text = sparse24([&args[..10], &few].concat()).fine();
    assert!(text.contains("1 row verified") && text.contains("chosen because"), "{text}");

    for (code, args, error) in [
        (2, &["--model", model, "--seq", "25"][..], "takes at most 24 tokens"),
        (2, &["--model", model, "--seq", "25"], "--seq: 25 tokens"),
        (
            1,
            &["--model", "bert-huge"],
            "bert-huge is none of minilm, bert-base, bert-large, smollm2, llama-1b, llama-8b: there is no folder bert-huge",
        ),
        (2, &["--model", model, "--ops", "masked24"], "masked24 is measured on single layers only"),
    ] {
        let stderr = sparse24([&["bench", "--device", "cpu"][..], args].concat()).refused(code);
        assert!(stderr.contains(error), "{stderr}");
    }
}

/// A hub of one model that answers as the real one does, at an address of this machine. Ends with the test.
#[cfg(feature = "hub")]
fn hub(folder: &Path) -> std::net::SocketAddr {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let folder = folder.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let head: Vec<_> =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
            let Some(path) = head.first().and_then(|line| line.split(' ').nth(1)) else { continue };
            let Some(name) = path.strip_prefix("/org/tiny/resolve/main/") else {
                // Of a model that is not there, or is not for everybody, the hub says neither.
                let _ =
                    stream.write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                continue;
            };
            let Ok(file) = fs::read(folder.join(name)) else {
                let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                continue;
            };
            let range =
                head.iter().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
            let (from, to) = range.as_deref().and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
            let (from, to) = (from.parse::<usize>().unwrap(), to.parse().unwrap_or(file.len() - 1));
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\nx-repo-commit: c0ffee\r\netag: \"{name}\"\r\nContent-Length: {}\r\n\
                 Content-Range: bytes {from}-{to}/{}\r\nConnection: close\r\n\r\n",
                to + 1 - from,
                file.len()
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&file[from..=to]));
        }
    });
    address
}

/// A name that is no folder is brought from the hub, and the second time from its cache, whether or not there is a hub.
#[cfg(feature = "hub")]
#[test]
fn a_model_on_the_hub_is_downloaded_once() {
    let (dir, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    TinyBert::new(6).write(dir.path());
    let local = ["embed", "--device", "cpu", "--text", "cat", "--model", dir.path().to_str().unwrap()];
    let expected = sparse24(local).fine();
    let of_hub = |endpoint: &str, name: &str| {
        let mut command = command(["embed", "--device", "cpu", "--text", "cat", "--model", name]);
        for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        command.env("HF_HOME", home.path()).env("HF_ENDPOINT", endpoint).run()
    };
    let endpoint = format!("http://{}", hub(dir.path()));
    assert_eq!(of_hub(&endpoint, "org/tiny").fine(), expected);
    // Port 9 discards: nothing answers there.
    assert_eq!(of_hub("http://127.0.0.1:9", "org/tiny").fine(), expected);
    // What is not of the form of a name is not asked for: there is no hub to answer.
    for name in ["tiny", "./org/tiny", "org/tiny/", "/org/tiny", "org\\tiny"] {
        let stderr = of_hub("http://127.0.0.1:9", name).refused(1);
        assert!(stderr.ends_with(&format!("{name:?} is not of the form owner/name\n")), "{stderr}");
    }
    // Optional files come along.
    fs::write(dir.path().join("sentence_bert_config.json"), r#"{"max_seq_length": 3}"#).unwrap();
    let (lines, stderr) = embedded(of_hub(&endpoint, "org/tiny"));
    assert_eq!((lines.len(), stderr.as_str()), (1, ""));
    fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    fs::write(dir.path().join("1_Pooling/config.json"), r#"{"pooling_mode_cls_token": true}"#).unwrap();
    let (cls, _) = embedded(of_hub(&endpoint, "org/tiny"));
    assert_ne!(cls, lines);
    // And the folders that a list names, wherever they are.
    let list = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                   {"path": "heads/pool", "type": "sentence_transformers.models.Pooling"}]"#;
    fs::write(dir.path().join("modules.json"), list).unwrap();
    let stderr = of_hub(&endpoint, "org/tiny").refused(1);
    assert!(stderr.contains("heads/pool/config.json"), "{stderr}");
    fs::create_dir_all(dir.path().join("heads/pool")).unwrap();
    fs::write(dir.path().join("heads/pool/config.json"), r#"{"pooling_mode": ["cls", "max"]}"#).unwrap();
    assert_eq!(embedded(of_hub(&endpoint, "org/tiny")).0[0].1.len(), 80);
    let stderr = of_hub(&endpoint, "org/none").refused(1);
    assert!(
        stderr.starts_with("error: there is no folder org/none, and on the hub: org/none, modules.json: ")
            && stderr.contains("401"),
        "{stderr}"
    );
}
