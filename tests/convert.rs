//! `sparse24 convert` and `sparse24 inspect --check`, as their users run them, and models loaded from what they wrote.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::fs;
use std::path::{Path, PathBuf};

use binary::{Ran, json, sparse24};
use serde_json::{Value, json};
use sparse24::graph::Checkpoint;
use sparse24::io::{Dtype, Entry, Source, Spec, Stored, Writer, save};
use sparse24::text::Files;
use sparse24::{DType, HostWeights, Matrix, Op, Sparse24, TensorFile, VectorLen, models, prune};
use tempfile::TempDir;
use tiny_bert::TinyBert;

fn convert(from: &Path, to: &Path, layout: &str, more: &[&str]) -> Ran {
    sparse24([&["convert", from.to_str().unwrap(), to.to_str().unwrap(), "--to", layout], more].concat())
}

fn check(path: &Path) -> Ran {
    sparse24(["inspect", "--check", path.to_str().unwrap()])
}

fn vectors(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name)
}

fn v(v: usize) -> VectorLen {
    VectorLen::new(v).unwrap()
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn random(m: usize, k: usize, dtype: DType, seed: u64) -> Matrix {
    Matrix::uniform(m, k, DType::F32, seed).unwrap().cast(dtype)
}

fn compressed(m: usize, k: usize, dtype: DType, vector: usize, seed: u64) -> Sparse24 {
    Sparse24::compress(&random(m, k, dtype, seed), &prune::random(m, k, v(vector), seed).unwrap()).unwrap()
}

/// The tensors of two files are the same, bit for bit.
#[track_caller]
fn assert_same_tensors(a: &Path, b: &Path) {
    let (a, b) = (TensorFile::open(a).unwrap(), TensorFile::open(b).unwrap());
    let specs = |file: &TensorFile| file.tensors().map(|t| t.spec()).collect::<Vec<_>>();
    assert_eq!(specs(&a), specs(&b));
    for info in a.tensors() {
        assert_eq!(a.bytes(&info.name).unwrap(), b.bytes(&info.name).unwrap(), "{}", info.name);
    }
}

#[test]
fn a_checkpoint_of_compressed_tensors_becomes_dense_and_back() {
    let dir = TempDir::new().unwrap();
    for name in ["ct_ckpt_sparse24_f16", "ct_ckpt_bitmask_f16"] {
        let (from, to) = (vectors(name), dir.path().join(name));
        let left_out = "note: not copied (weights of the old model): dense_expected.safetensors\n";
        let text = convert(&from, &to, "dense", &[]).noted(left_out);
        let expected = format!("{}: 2 matrices to dense, 4 tensors as before; ", to.display());
        assert!(text.starts_with(&expected) && text.contains(" KiB before, "), "{text}");
        assert_same_tensors(&to.join("model.safetensors"), &from.join("dense_expected.safetensors"));
        assert_eq!(names_in(&to), ["config.json", "model.safetensors"]);
        // Nothing is claimed any more, and nothing else is lost.
        assert_eq!(json(&to.join("config.json")), json!({"architectures": ["Tiny"], "torch_dtype": "float16"}));
        assert_eq!(check(&to).fine(), format!("{}: of 6 tensors, none claims to be 2:4\n", to.display()));
    }
    // From dense: the pair of files that compressed-tensors wrote, the head ignored again.
    let (dense, again) = (dir.path().join("ct_ckpt_sparse24_f16"), dir.path().join("again"));
    convert(&dense, &again, "bitmask", &[]).fine();
    assert_same_tensors(&again.join("model.safetensors"), &vectors("ct_ckpt_sparse24_f16/model.safetensors"));
    let sparsity = json!({"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"],
                          "ignore": ["lm_head"]});
    let section = &json(&again.join("config.json"))["quantization_config"];
    assert_eq!(*section, json!({"quant_method": "compressed-tensors", "sparsity_config": sparsity}));
    assert_eq!(TensorFile::open(again.join("model.safetensors")).unwrap().metadata()["format"], "pt");
    assert_eq!(check(&again).fine(), format!("{}: of 6 tensors, 2 claim to be 2:4, and are\n", again.display()));

    // By way of our format too; and a config that says more keeps it.
    let (native, last) = (dir.path().join("native"), dir.path().join("last"));
    convert(&vectors("ct_ckpt_sparse24_f16"), &native, "native", &[]).exits(0);
    assert_eq!(json(&native.join("config.json")).get("quantization_config"), None);
    let more = json!({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": 1}}});
    fs::write(native.join("config.json"), more.to_string()).unwrap();
    convert(&native, &last, "bitmask", &[]).fine();
    assert_same_tensors(&last.join("model.safetensors"), &vectors("ct_ckpt_sparse24_f16/model.safetensors"));
    let section = &json(&last.join("config.json"))["quantization_config"];
    assert_eq!((&section["config_groups"], &section["sparsity_config"]), (&json!({"g": 1}), &sparsity));
    let undone = dir.path().join("undone");
    convert(&last, &undone, "dense", &[]).fine();
    assert_eq!(json(&undone.join("config.json")), more);
}

#[test]
fn our_own_format_survives_every_other() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Few rows, so that longer vectors than said would fit; a name without `.weight`; under-full groups.
    let (a, b) = (compressed(3, 8, DType::F32, 1, 1), compressed(64, 96, DType::F16, 4, 2));
    let c = Sparse24::from_dense(&Matrix::zeros(32, 32, DType::Bf16).unwrap(), v(16)).unwrap();
    let bias = random(1, 9, DType::F32, 3);
    let entries = [
        ("l.a.weight", Entry::Sparse24(&a)),
        ("b", Entry::Sparse24(&b)),
        ("c.weight", Entry::Sparse24(&c)),
        ("bias", Entry::Matrix(&bias)),
    ];
    save(at("native"), &entries).unwrap();
    convert(&at("native"), &at("bitmask"), "bitmask", &[]).fine();
    convert(&at("bitmask"), &at("back"), "native", &[]).fine();
    assert_eq!(fs::read(at("back")).unwrap(), fs::read(at("native")).unwrap());
    let source = Source::open(at("bitmask")).unwrap();
    assert_eq!(source.item("b").unwrap().stored, Stored::Bitmask);
    assert_eq!(source.item("b").unwrap().parts[0], "b.compressed");

    // By way of torch's pair, for those that it takes; excluded ones stay.
    save(at("native"), &entries[1..]).unwrap();
    convert(&at("native"), &at("cutlass"), "cutlass", &["--exclude", "bias"]).fine();
    convert(&at("cutlass"), &at("bitmask"), "bitmask", &["--include", "^b$"]).fine();
    let stored: Vec<_> =
        Source::open(at("bitmask")).unwrap().items().map(|item| (item.name.clone(), item.stored)).collect();
    let expected = [("b", Stored::Bitmask), ("bias", Stored::Dense), ("c.weight", Stored::Cutlass)];
    assert_eq!(stored, expected.map(|(name, stored)| (name.to_owned(), stored)));
    convert(&at("bitmask"), &at("back"), "native", &[]).fine();
    assert_eq!(fs::read(at("back")).unwrap(), fs::read(at("native")).unwrap());

    // Types that are not multiplied: dense, native, bitmask, and dense again.
    let (w, spec) = (a.decompress().elements().as_bytes().to_vec(), Spec::new("w.weight", Dtype::F8_E4M3, &[12, 8]));
    let w: Vec<u8> = w.iter().enumerate().map(|(i, x)| if i % 4 < 2 { *x | 1 } else { 0 }).collect();
    let mut writer = Writer::create(at("f8"), &[spec], &Default::default()).unwrap();
    writer.write("w.weight", &w).unwrap();
    writer.finish().unwrap();
    for (from, to, layout) in [("f8", "f8n", "native"), ("f8n", "f8b", "bitmask"), ("f8b", "f8d", "dense")] {
        convert(&at(from), &at(to), layout, &[]).fine();
        let source = Source::open(at(to)).unwrap();
        assert_eq!(source.dense(source.item("w.weight").unwrap()).unwrap(), w, "{to}");
    }
    let source = Source::open(at("f8n")).unwrap();
    let native = source.sparse24_bytes(source.item("w.weight").unwrap()).unwrap();
    assert_eq!(native.vector().get(), 128, "one pattern throughout");
    let native = TensorFile::open(at("f8n")).unwrap();
    let error = native.sparse24("w.weight").unwrap_err().to_string();
    assert!(error.ends_with("tensor w.weight.values: is F8_E4M3, expected F32, F16 or BF16"), "{error}");
    assert!(convert(&at("f8n"), &at("x"), "cutlass", &[]).refused(1).contains("takes F16, BF16, I8 and U8"));
    assert!(!at("x").exists());
}

/// Splits a folder's `model.safetensors` into two shards and an index.
fn shard(folder: &Path) {
    let path = folder.join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let mut map = serde_json::Map::new();
    for (i, shard) in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].iter().enumerate() {
        let of_shard = file.tensors().enumerate().filter(|(at, _)| at % 2 == i).map(|(_, t)| &*t.name);
        let entries: Vec<_> = of_shard.map(|name| (name, Entry::Copy(&file))).collect();
        save(folder.join(shard), &entries).unwrap();
        map.extend(entries.iter().map(|(name, _)| ((*name).to_owned(), json!(shard))));
    }
    fs::remove_file(path).unwrap();
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn load(folder: &Path) -> Checkpoint {
    let files = Files::in_folder(folder);
    Checkpoint::load(models::load(&files.config).unwrap(), &files.weights, None, DType::F32).unwrap()
}

fn dense_linears(checkpoint: &Checkpoint) -> Vec<Matrix> {
    checkpoint.linears().map(|(_, w)| w.to_dense().unwrap()).collect()
}

/// The weights of linear layers of a small BERT, by name.
fn is_linear(name: &str) -> bool {
    name.contains("encoder") && name.ends_with(".weight") && !name.contains("LayerNorm")
}

#[test]
fn a_sharded_bert_becomes_every_form_and_loads_alike() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Pruned at V = 4, under the names of BERT's own checkpoints.
    let mut tiny = TinyBert::new(11);
    for (name, (shape, numbers)) in tiny.tensors.iter_mut().filter(|(name, _)| is_linear(name)) {
        let w = Matrix::from_f32(shape[0], shape[1], numbers).unwrap();
        let mask = prune::magnitude(&w, v(4)).unwrap();
        *numbers = mask.mask().apply(&w).unwrap().elements().to_f32();
        assert!(numbers.iter().any(|&x| x != 0.0), "{name}");
    }
    tiny.rename(|name| format!("bert.{name}"));
    tiny.write(&at("dense"));
    let expected = load(&at("dense"));
    shard(&at("dense"));
    fs::create_dir_all(at("dense").join("1_Pooling/empty")).unwrap();
    fs::write(at("dense").join("1_Pooling/config.json"), "{}").unwrap();
    fs::write(at("dense").join("pytorch_model.bin"), "other weights").unwrap();
    fs::write(at("dense").join(".hidden"), "").unwrap();
    assert_eq!(dense_linears(&load(&at("dense"))), dense_linears(&expected));

    // Twelve matrices; tables and the pooler stay.
    let left_out = "note: not copied (weights of the old model): pytorch_model.bin\n";
    let text = convert(&at("dense"), &at("native"), "native", &[]).noted(left_out);
    assert!(text.contains(": 12 matrices to native, "), "{text}");
    assert!(text.contains(" (not 2:4: 4 matrices); "), "{text}");
    let kept = ["1_Pooling", "config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(
        (names_in(&at("native")), names_in(&at("native/1_Pooling"))),
        (kept.map(str::to_owned).to_vec(), vec!["config.json".to_owned()])
    );
    assert_eq!(
        fs::read(at("native/config.json")).unwrap(),
        fs::read(at("dense/config.json")).unwrap(),
        "nothing to say, so it is not written anew"
    );
    convert(&at("native"), &at("bitmask"), "bitmask", &[]).fine();
    assert_eq!(json(&at("bitmask/config.json"))["hidden_size"], 40);
    for (folder, stored) in [("native", Stored::Native), ("bitmask", Stored::Bitmask)] {
        let loaded = load(&at(folder));
        let ops: Vec<_> = loaded.linears().map(|(_, w)| w.op()).collect();
        assert_eq!(ops, vec![Op::Sparse24(v(4)); 8], "{folder}: 40 rows are 10 blocks of 4");
        assert_eq!(dense_linears(&loaded), dense_linears(&expected), "{folder}");
        let items = Source::open(at(folder)).unwrap();
        assert_eq!(items.items().filter(|item| item.stored == stored).count(), 12);
        check(&at(folder)).fine();
    }
    // And back, byte for byte what torch would have.
    convert(&at("bitmask"), &at("back"), "dense", &[]).fine();
    let (a, b) = (Source::open(at("back")).unwrap(), Source::open(at("dense")).unwrap());
    assert_eq!(a.items().count(), b.items().count());
    for (a_item, b_item) in a.items().zip(b.items()) {
        assert_eq!((&a_item.name, a.dense(a_item).unwrap()), (&b_item.name, b.dense(b_item).unwrap()));
    }
}

#[test]
fn masks_load_as_masks_and_become_weights() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut tiny = TinyBert::new(12);
    let (mut masked, mut asp) = (TinyBert::new(12), TinyBert::new(12));
    for (name, (shape, numbers)) in tiny.tensors.iter_mut().filter(|(name, _)| is_linear(name)) {
        let w = Matrix::from_f32(shape[0], shape[1], numbers).unwrap();
        let mask = prune::magnitude(&w, v(1)).unwrap();
        let ones: Vec<f32> =
            (0..numbers.len()).map(|i| f32::from(mask.mask().get(i / shape[1], i % shape[1]))).collect();
        *numbers = mask.mask().apply(&w).unwrap().elements().to_f32();
        let stem = name.strip_suffix(".weight").unwrap();
        let original = masked.tensors.remove(name).unwrap();
        masked.tensors.insert(format!("{name}_orig"), original);
        masked.tensors.insert(format!("{name}_mask"), (shape.clone(), ones.clone()));
        asp.tensors.insert(name.clone(), (shape.clone(), numbers.clone()));
        asp.tensors.insert(format!("{stem}.__weight_mma_mask"), (shape.clone(), ones));
    }
    tiny.write(&at("pruned"));
    masked.write(&at("masked"));
    asp.write(&at("asp"));
    let expected = dense_linears(&load(&at("pruned")));
    for (folder, op) in [("masked", Op::Masked), ("asp", Op::Sparse24(v(1)))] {
        let loaded = load(&at(folder));
        assert!(loaded.linears().all(|(_, w)| w.op() == op), "{folder}");
        assert_eq!(dense_linears(&loaded), expected, "{folder}");
        for layout in ["dense", "native"] {
            let out = at(&format!("{folder}-{layout}"));
            let text = convert(&at(folder), &out, layout, &[]).fine();
            assert!(text.contains(&format!(": 12 matrices to {layout}, ")), "{text}");
            assert_eq!(dense_linears(&load(&out)), expected, "{folder}, {layout}");
        }
        check(&at(folder)).fine();
    }
    let HostWeights::Masked(w, _) = load(&at("masked")).linears().next().unwrap().1.clone() else { panic!() };
    assert!(w.elements().to_f32().iter().all(|&x| x != 0.0), "the mask is not applied yet");

    // A mask of three of four is a mask, and no 2:4 one.
    let name = "encoder.layer.0.output.dense.weight_mask";
    masked.tensors.get_mut(name).unwrap().1[4..8].fill(1.0);
    masked.write(&at("masked"));
    let tensor = format!("tensor {}: row 0, group 1 (columns 4..8): 4 positions", name.strip_suffix("_mask").unwrap());
    for stderr in [convert(&at("masked"), &at("out"), "native", &[]).refused(1), check(&at("masked")).refused(3)] {
        assert!(stderr.contains(&tensor), "{stderr}");
    }
    assert!(!at("out").exists());
    assert!(names_in(dir.path()).iter().all(|name| !name.starts_with('.')), "nothing half-written is left");
    let text = convert(&at("masked"), &at("out"), "native", &["--exclude", "0.output.dense"]).fine();
    assert!(text.contains(": 11 matrices to native, "), "{text}");
    assert!(load(&at("out")).linears().any(|(_, w)| w.op() == Op::Masked));
}

#[test]
fn what_cannot_be_converted_is_said() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (w, x) = (random(8, 8, DType::F32, 1), random(8, 3, DType::F32, 2));
    save(at("dense"), &[("w", Entry::Matrix(&w)), ("narrow", Entry::Matrix(&x))]).unwrap();
    let warning = "warning: nothing was converted: not 2:4: 1 matrix of 2 tensors; the output is a copy\n";
    let stdout = convert(&at("dense"), &at("out"), "native", &[]).noted(warning);
    assert!(stdout.contains(": 0 matrices to native, 2 tensors as before (not 2:4: 1 matrix); "), "{stdout}");
    assert_same_tensors(&at("dense"), &at("out"));

    // Shapes of torch's pair, and what is in the way.
    let s = compressed(8, 8, DType::F16, 1, 3);
    save(at("native"), &[("w", Entry::Sparse24(&s))]).unwrap();
    let stderr = convert(&at("native"), &at("out"), "cutlass", &[]).refused(1);
    let expected = "tensor w.values: 8 x 8 F16: the layout cutlass takes multiples of 32 x 32\n";
    assert!(stderr.starts_with(&format!("error: {}", at("native").display())), "{stderr}");
    assert!(stderr.ends_with(&expected.replace(".values", "")), "{stderr}");
    assert_same_tensors(&at("dense"), &at("out"));
    let stderr = convert(&vectors("ct_ckpt_sparse24_f16"), dir.path(), "dense", &[]).refused(1);
    let exists = "exists already; name a new folder, or an empty one";
    assert_eq!(stderr, format!("error: {}: {exists}\n", dir.path().display()));
    let stderr = convert(&at("native"), dir.path(), "dense", &[]).refused(1);
    assert!(stderr.contains("is not a regular file"), "{stderr}");
    // An empty folder may be there.
    fs::create_dir(at("empty")).unwrap();
    convert(&vectors("ct_ckpt_sparse24_f16"), &at("empty"), "dense", &[]).exits(0);
    // A name that two matrices would have.
    let taken = [("w", Entry::Sparse24(&s)), ("w.compressed", Entry::Matrix(&x))];
    fs::create_dir(at("folder")).unwrap();
    save(at("folder/model.safetensors"), &taken).unwrap();
    let stderr = convert(&at("folder"), &at("new"), "bitmask", &[]).refused(1);
    let new = at("new").join("model.safetensors");
    assert_eq!(stderr, format!("error: {}: tensor w.compressed: the name is taken\n", new.display()));
    // In place of itself.
    convert(&at("native"), &at("native"), "dense", &[]).fine();
    assert_eq!(TensorFile::open(at("native")).unwrap().matrix("w").unwrap(), s.decompress());

    for (args, says) in [
        (&["convert", "a", "b"][..], "--to"),
        (&["convert", "a", "b", "--to", "csr"], "is not native, dense, bitmask or cutlass"),
        (&["convert", "a", "--to", "dense"], "OUT"),
        (&["convert", "a", "b", "--to", "dense", "--include", "("], "unclosed group"),
        (&["inspect", "a", "--check", "--json"], "--json"),
    ] {
        let stderr = sparse24(args).refused(2);
        assert!(stderr.contains(says), "{stderr}");
    }
    let help = sparse24(["convert", "--help"]).fine();
    assert!(help.contains("Examples:\n") && help.contains("\n  sparse24 convert "), "{help}");
}

#[test]
fn a_check_names_the_first_group_that_breaks_a_claim() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    // Row 3, group 5 of 16 x 64: in our format, in torch's pair, and in a bitmask.
    let s = compressed(32, 64, DType::F16, 1, 7);
    let broken = |layout: &str, part: &str, change: &dyn Fn(&mut Vec<u8>)| {
        save(
            &path,
            &[("a.weight", Entry::Sparse24(&compressed(4, 4, DType::F32, 1, 8))), ("up.weight", Entry::Sparse24(&s))],
        )
        .unwrap();
        convert(&path, &path, layout, &["--include", "up"]).fine();
        assert_eq!(check(&path).fine(), format!("{}: of 2 tensors, 2 claim to be 2:4, and are\n", path.display()));
        let file = TensorFile::open(&path).unwrap();
        let old = file.bytes(part).unwrap();
        let mut new = old.clone();
        change(&mut new);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(old.len()).position(|w| w == old).unwrap();
        bytes[at..at + old.len()].copy_from_slice(&new);
        fs::write(&path, bytes).unwrap();
        let stderr = check(&path).refused(3);
        // Without --check the same file is an error.
        assert_eq!(sparse24(["inspect", path.to_str().unwrap()]).refused(1).lines().count(), 1);
        stderr.strip_prefix(&format!("not 2:4: {}: tensor ", path.display())).unwrap().trim_end().to_owned()
    };
    let nibble = |bytes: &mut Vec<u8>| bytes[3 * 8 + 2] = bytes[3 * 8 + 2] & 0x0f | 0x50;
    assert_eq!(
        broken("native", "up.weight.meta", &nibble),
        "up.weight.meta: meta row 3, group 5: code 0x5 is not one of 4, 8, 9, c, d, e"
    );
    assert_eq!(
        broken("bitmask", "up.bitmask", &|bytes| bytes[3 * 8 + 2] |= 0xf0),
        "up.weight: row 3, group 5 (columns 20..24): 4 positions are non-zero or kept, 2:4 allows 2"
    );
    // Row 0's words are the first of the first row.
    let first = broken("cutlass", "up.weight.meta", &|bytes| bytes[0] &= 0xf0);
    assert_eq!(first, "up.weight: meta row 0, group 0: code 0x0 is not one of 4, 8, 9, c, d, e");
    // A file that is no file is an error like any other.
    fs::write(&path, "short").unwrap();
    assert!(check(&path).refused(1).starts_with("error: "));

    // A config that claims it of dense weights, but for those that it leaves out.
    let folder = dir.path().join("model");
    fs::create_dir(&folder).unwrap();
    let (up, head) = (s.decompress(), random(8, 8, DType::F32, 9));
    let save_with = |up: &Matrix, ignore: &str| {
        let entries = [
            ("layers.0.up.weight", Entry::Matrix(up)),
            ("lm_head.weight", Entry::Matrix(&head)),
            ("embed_tokens.weight", Entry::Matrix(&head)),
        ];
        save(folder.join("model.safetensors"), &entries).unwrap();
        let sparsity =
            json!({"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": [ignore]});
        let config = json!({"compression_config": {"sparsity_config": sparsity}});
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
    };
    for ignore in ["lm_head", "re:.*head"] {
        save_with(&up, ignore);
        assert_eq!(check(&folder).fine(), format!("{}: of 3 tensors, 1 claims to be 2:4, and is\n", folder.display()));
    }
    // The file alone claims nothing.
    assert!(check(&folder.join("model.safetensors")).fine().contains("none claims to be 2:4"));
    save_with(&up, "re:head");
    let stderr = check(&folder).refused(3);
    assert!(stderr.contains("tensor lm_head.weight: row 0, group 0 (columns 0..4): 4 positions"), "{stderr}");
    save_with(&random(32, 64, DType::F16, 1), "lm_head");
    let stderr = check(&folder).refused(3);
    assert!(stderr.contains("tensor layers.0.up.weight: row 0, group 0"), "{stderr}");
}

#[test]
fn inspect_knows_every_form() {
    let inspect = |path: &Path| {
        let listing: Value =
            serde_json::from_str(&sparse24(["inspect", path.to_str().unwrap(), "--json"]).fine()).unwrap();
        listing["tensors"].as_array().unwrap().clone()
    };
    let stored = |rows: &[Value]| -> Vec<(String, String)> {
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        rows.iter().filter(|row| row["stored"] != "dense").map(|row| (text(row, "name"), text(row, "stored"))).collect()
    };
    let of = |list: &[(&str, &str)]| list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>();
    let rows = inspect(&vectors("matrix_i8_32x64.safetensors"));
    let expected =
        [("ct24.layer.weight", "sparse-24-bitmask"), ("ctbm.layer.weight", "sparse-bitmask"), ("cutlass", "cutlass")];
    assert_eq!(stored(&rows), of(&expected));
    let mut cutlass = rows.iter().find(|row| row["name"] == "cutlass").unwrap().clone();
    // A byte and two words of indices for each non-zero.
    let even = cutlass["matrix"].as_object_mut().unwrap().remove("break_even").unwrap();
    assert_eq!(even["coo"]["dense"], 1.0 - 2048.0 / 9.0 / 2048.0);
    // Values of a byte, and a word of codes for each 32 columns.
    let bytes = 32 * 32 + 4 * 32 * 2;
    assert_eq!(
        cutlass,
        json!({"name": "cutlass", "shape": [32, 64], "dtype": "i8", "stored": "cutlass", "bytes": bytes, "matrix": {
            "nonzeros": 1024, "density": 0.5, "vector": 1, "kept_magnitude": 1.0,
            "dense_bytes": 2048, "coo_bytes": 1024 * 9, "csr_bytes": 1024 * 5 + 4 * 33,
            "bitmask_bytes": 1024 + 32 * 8, "sparse24_bytes": bytes}})
    );
    let rows = inspect(&vectors("prune_with_mask.safetensors"));
    assert_eq!(stored(&rows), of(&[("fc.weight", "torch-mask")]));
    assert_eq!((rows.len(), &rows[1]["matrix"]["density"]), (2, &json!(0.5)));
    let rows = inspect(&vectors("ct_ckpt_sparse24_f16"));
    assert_eq!(stored(&rows), of(&[("down.weight", "sparse-24-bitmask"), ("up.weight", "sparse-24-bitmask")]));
    let text = sparse24(["inspect", vectors("ct_ckpt_sparse24_f16").to_str().unwrap()]).fine();
    assert!(text.contains("down.weight (stored as sparse-24-bitmask)\n"), "{text}");
    assert!(text.starts_with(&format!("{}: 6 tensors, ", vectors("ct_ckpt_sparse24_f16").display())), "{text}");
}

/// A file of tensors of f32 as they are, and of others as parts of a sparse-bitmask under their full names.
fn write_bitmasks(path: &Path, dense: &[(&str, &Matrix)], bitmasks: &[(&str, &[usize], &[f32])]) {
    let mut tensors: Vec<(Spec, Vec<u8>)> = Vec::new();
    for (name, w) in dense {
        tensors.push((Spec::new(*name, Dtype::F32, &[w.rows(), w.cols()]), w.elements().to_le_bytes()));
    }
    for (name, shape, numbers) in bitmasks {
        let k = *shape.last().unwrap();
        let (mut bits, mut offsets, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for row in numbers.chunks(k) {
            offsets.push(values.len() as i64 / 4);
            bits.extend(row.chunks(8).map(|c| (0..).zip(c).fold(0u8, |b, (i, &x)| b | u8::from(x != 0.0) << i)));
            values.extend(row.iter().filter(|&&x| x != 0.0).flat_map(|x| x.to_le_bytes()));
        }
        let rows = &shape[..shape.len() - 1];
        let i64s = |n: &[i64]| n.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
        let sizes: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let at = |part: &str| format!("{name}.{part}");
        tensors.push((Spec::new(at("compressed"), Dtype::F32, &[values.len() / 4]), values));
        tensors.push((Spec::new(at("bitmask"), Dtype::U8, &[rows, &[k.div_ceil(8)]].concat()), bits));
        tensors.push((Spec::new(at("shape"), Dtype::I64, &[shape.len()]), i64s(&sizes)));
        tensors.push((Spec::new(at("row_offsets"), Dtype::I64, rows), i64s(&offsets)));
    }
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(path, &specs, &Default::default()).unwrap();
    tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
    writer.finish().unwrap();
}

fn stored_in(path: &Path) -> Vec<(String, Stored)> {
    Source::open(path).unwrap().items().map(|item| (item.name.clone(), item.stored)).collect()
}

/// As compressed-tensors up to 0.8.1 stores a model of which some matrices are 2:4.
#[test]
fn a_model_of_bitmasks_alone_becomes_every_form() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("old")).unwrap();
    let up = compressed(32, 32, DType::F32, 1, 1).decompress();
    let (embed, norm, conv) = (random(9, 16, DType::F32, 2), random(1, 16, DType::F32, 3), random(4, 9, DType::F32, 4));
    let numbers = [&up, &embed, &norm, &conv].map(|w| w.elements().to_f32());
    let all: [(&str, &[usize], &[f32]); 4] = [
        ("l.0.up.weight", &[32, 32], &numbers[0]),
        ("embed_tokens.weight", &[9, 16], &numbers[1]),
        ("norm.weight", &[16], &numbers[2]),
        ("conv.weight", &[4, 3, 3], &numbers[3]),
    ];
    let config = |structure: &str| {
        let sparsity = json!({"format": "sparse-bitmask", "sparsity_structure": structure});
        let config = json!({"model_type": "x", "compression_config": {"sparsity_config": sparsity}});
        fs::write(at("old/config.json"), config.to_string()).unwrap();
    };
    config("0:0");
    write_bitmasks(&at("old/model.safetensors"), &[("bias", &norm)], &all);
    let names = ["bias", "conv.weight", "embed_tokens.weight", "l.0.up.weight", "norm.weight"];
    let bytes = |path: &Path| -> Vec<_> {
        let source = Source::open(path).unwrap();
        source.items().map(|item| (item.shape.clone(), source.dense(item).unwrap())).collect()
    };
    let expected = bytes(&at("old"));
    assert_eq!(expected[1], (vec![4, 3, 3], conv.elements().to_le_bytes()));
    for (layout, stored) in [("native", Stored::Native), ("dense", Stored::Dense), ("bitmask", Stored::Bitmask)] {
        let text = convert(&at("old"), &at(layout), layout, &[]).fine();
        let says = match layout {
            "dense" => ": 4 tensors to dense, 1 tensor as before; ",
            "native" => ": 1 matrix to native, 3 tensors to dense, 1 tensor as before (not 2:4: 2 matrices); ",
            _ => ": 1 matrix to bitmask, 3 tensors to dense, 1 tensor as before (not 2:4: 2 matrices); ",
        };
        assert!(text.contains(says), "{text}");
        let all = names.map(|name| (name.to_owned(), if name.contains("up") { stored } else { Stored::Dense }));
        assert_eq!(stored_in(&at(layout)), all);
        assert_eq!(bytes(&at(layout)), expected, "{layout}");
        check(&at(layout)).fine();
        let claims = json(&at(layout).join("config.json")).get("compression_config").is_some();
        assert_eq!(claims, layout == "bitmask");
    }
    // Pruned, all of it is still there.
    sparse24(["prune", at("old").to_str().unwrap(), at("pruned").to_str().unwrap()]).fine();
    assert!(stored_in(&at("pruned")).iter().all(|(_, stored)| matches!(stored, Stored::Dense | Stored::Native)));
    let pruned = bytes(&at("pruned"));
    assert_eq!((&pruned[1..3], &pruned[4]), (&expected[1..3], &expected[4]), "a bias of one row is a matrix");
    // What is excluded keeps its form.
    convert(&at("old/model.safetensors"), &at("part"), "native", &["--exclude", "norm"]).fine();
    assert_eq!(stored_in(&at("part"))[4], ("norm.weight".to_owned(), Stored::SparseBitmask));
    let listing = sparse24(["inspect", at("old").to_str().unwrap()]).fine();
    for line in ["norm.weight (stored as sparse-bitmask)", "4x3x3"] {
        assert!(listing.contains(line), "{listing}");
    }

    // A file that claims that it is 2:4 is taken at its word.
    config("2:4");
    check(&at("old")).fine();
    write_bitmasks(&at("old/model.safetensors"), &[], &[("l.0.up.weight", &[9, 16], &numbers[1]), all[2]]);
    let says = "tensor l.0.up.weight: row 0, group 0 (columns 0..4): ";
    assert!(check(&at("old")).refused(3).contains(says));
    assert!(convert(&at("old"), &at("refused"), "native", &[]).refused(1).contains(says));
    assert!(!at("refused").exists());
    convert(&at("old"), &at("decoded"), "dense", &[]).fine();
    // A value that the mask has no place for.
    let path = at("old/model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let mask = TensorFile::open(&path).unwrap().bytes("norm.weight.bitmask").unwrap();
    let place = file.windows(2).rposition(|bytes| bytes == mask).unwrap();
    file[place] &= !1;
    fs::write(&path, file).unwrap();
    let stderr = sparse24(["inspect", path.to_str().unwrap()]).refused(1);
    assert!(stderr.contains("tensor norm.weight: 16 values, of which the mask places 15"), "{stderr}");
}

#[test]
fn a_folder_comes_whole_or_says_what_does_not() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    TinyBert::new(21).write(&at("in"));
    let put = |name: &str, text: &str| {
        fs::create_dir_all(at("in").join(name).parent().unwrap()).unwrap();
        fs::write(at("in").join(name), text).unwrap();
    };
    let copied = [
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_Dense/pytorch_model.bin",
        "head/linear/pytorch_model.bin",
        "extra/part.safetensors",
        "modules.json",
    ];
    copied.iter().for_each(|name| put(name, name));
    put("modules.json", r#"[{"path": ""}, {"path": "head/linear"}, {"path": "2_Dense"}]"#);
    for name in
        ["pytorch_model.bin", "adapter.safetensors", "onnx/model.onnx", "openvino/openvino_model.bin", ".hidden"]
    {
        put(name, name);
    }
    #[cfg(unix)]
    let (links, says) = {
        use std::os::unix::fs::symlink;
        fs::create_dir(at("blobs")).unwrap();
        fs::write(at("blobs/spiece.model"), "a link's").unwrap();
        symlink(at("blobs/spiece.model"), at("in/spiece.model")).unwrap();
        symlink(at("blobs"), at("in/linked")).unwrap();
        symlink(at("in"), at("in/extra/loop")).unwrap();
        symlink(at("nowhere"), at("in/broken")).unwrap();
        let says = "note: not copied (links to a folder around it): extra/loop\n\
                    note: not copied (links to nothing): broken\n";
        (&["spiece.model", "linked/spiece.model"][..], says)
    };
    #[cfg(not(unix))]
    let (links, says) = (&[""; 0][..], "");
    let says = format!(
        "{says}note: not copied (weights of the old model): adapter.safetensors, onnx/model.onnx, \
         openvino/openvino_model.bin, pytorch_model.bin\n"
    );
    let (from, out, report) = (at("in"), at("out"), at("report.json"));
    for command in ["convert", "prune"] {
        let [from, out, report] = [&from, &out, &report].map(|path| path.to_str().unwrap());
        let (_, stderr) = sparse24([command, from, out, "--to", "native", "--json", report]).exits(0);
        let notes = stderr.lines().filter(|line| line.starts_with("note: ")).map(|line| format!("{line}\n"));
        assert_eq!(notes.collect::<String>(), says, "{stderr}");
        for name in copied.iter().chain(links) {
            assert_eq!(fs::read(at("out").join(name)).unwrap(), fs::read(at("in").join(name)).unwrap(), "{name}");
        }
        assert!(!at("out/onnx").exists() && !at("out/openvino").exists() && !at("out/pytorch_model.bin").exists());
        let report = json(&at("report.json"));
        assert!(report["left_out"].as_array().unwrap().contains(&json!("onnx/model.onnx")), "{report}");
        fs::remove_dir_all(at("out")).unwrap();
    }
    fs::write(at("in/modules.json"), "{").unwrap();
    let stderr = convert(&at("in"), &at("out"), "native", &[]).refused(1);
    assert!(stderr.contains("in/modules.json: ") && !at("out").exists(), "{stderr}");
}

/// `sparsity_structure: 2:4` is of all linear layers, but for those that are ignored, unless there are targets.
#[test]
fn claims_are_read_as_python_reads_them() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("model");
    fs::create_dir(&folder).unwrap();
    let (good, bad) = (compressed(8, 16, DType::F32, 1, 1).decompress(), random(8, 16, DType::F32, 2));
    let entries = [
        ("model.layers.0.up_proj.weight", Entry::Matrix(&good)),
        ("model.layers.1.up_proj.weight", Entry::Matrix(&bad)),
        ("lm_head.weight", Entry::Matrix(&bad)),
        ("model.embed_tokens.weight", Entry::Matrix(&bad)),
    ];
    save(folder.join("model.safetensors"), &entries).unwrap();
    let check_with = |config: Value| {
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        check(&folder)
    };
    let sparsity = |targets: Option<Value>, ignore: Option<Value>| {
        let mut sparsity = json!({"format": "dense", "sparsity_structure": "2:4"});
        for (key, value) in [("targets", targets), ("ignore", ignore)] {
            if let Some(value) = value {
                sparsity[key] = value;
            }
        }
        sparsity
    };
    let nest = |sparsity: Value| json!({"compression_config": {"sparsity_config": sparsity}});
    // What is claimed of the head or of layer 1 is wrong; of layer 0 alone it is right.
    let rest = || Some(json!(["lm_head", "re:.*layers\\.1\\."]));
    for targets in [None, Some(json!([])), Some(Value::Null), Some(json!(["Linear"]))] {
        assert_eq!(check_with(nest(sparsity(targets.clone(), None))).code, 3, "{targets:?}");
        let text = check_with(nest(sparsity(targets, rest()))).fine();
        assert!(text.ends_with("of 4 tensors, 1 claims to be 2:4, and is\n"), "{text}");
    }
    let claimed = json!({"sparsity_config": sparsity(None, None)});
    for config in [
        json!({"quantization_config": claimed}),
        json!({"sparsity_config": sparsity(None, None)}),
        json!({"quantization_config": {"sparsity_config": null}, "compression_config": claimed}),
        json!({"quantization_config": {"sparsity_config": {}}, "compression_config": claimed}),
    ] {
        assert_eq!(check_with(config.clone()).code, 3, "{config}");
    }
    for (targets, ignore, code) in [
        (json!(["re:^(?!.*layers\\.1)(?!lm_head).*proj"]), json!([]), 0),
        (json!(["re:^(?!.*layers\\.1)(?!.*embed)"]), json!(["lm_head"]), 0),
        (json!(["re:^(?!.*layers\\.1)(?!.*embed)"]), json!(null), 3),
        (json!(["re:.*(?<=layers\\.0)\\.up_proj\\Z"]), json!([]), 0),
        (json!(["Linear"]), json!(["re:(?!model\\.layers\\.0).*"]), 0),
        (json!(["Linear"]), json!(["re:(?P<all>.)(?!.*layers\\.1)"]), 3),
        (json!("re:.*layers\\.0"), json!([]), 0),
    ] {
        let checked = check_with(nest(sparsity(Some(targets.clone()), Some(ignore.clone()))));
        assert_eq!(checked.code, code, "{targets} but {ignore}: {}", checked.stderr);
    }
    for (ignore, says) in
        [(json!(["re:("]), "ignore of its sparsity_config: re:("), (json!([7]), "7 is no name of modules")]
    {
        let stderr = check_with(nest(sparsity(None, Some(ignore)))).refused(1);
        assert!(stderr.starts_with("error: ") && stderr.contains("config.json: ") && stderr.contains(says), "{stderr}");
    }
    // convert refuses to take it for granted.
    let _ = check_with(nest(sparsity(None, Some(json!(["lm_head"])))));
    let stderr = convert(&folder, &dir.path().join("out"), "native", &[]).refused(1);
    assert!(stderr.contains("tensor model.layers.1.up_proj.weight: row 0, group 0"), "{stderr}");
}

#[test]
fn metadata_of_others_comes_along_and_never_makes_a_lie() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let w = compressed(8, 8, DType::F32, 1, 1).decompress();
    let write = |metadata: &[(&str, &str)], second: &str| {
        let specs = ["up.weight", second].map(|name| Spec::new(name, Dtype::F32, &[8, 8]));
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let mut writer = Writer::create(at("in"), &specs, &metadata).unwrap();
        specs.iter().for_each(|spec| writer.write(&spec.name, &w.elements().to_le_bytes()).unwrap());
        writer.finish().unwrap();
    };
    let strangers = [("x.vector", "12"), ("y.shape", "a"), ("z.layout", "bitmask"), ("by", "them")];
    for format in ["pt", "sparse24"] {
        write(&[&strangers[..], &[("format", format)]].concat(), "b");
        for (command, to) in [("convert", "native"), ("convert", "bitmask"), ("prune", "native"), ("prune", "dense")] {
            sparse24([command, at("in").to_str().unwrap(), at("out").to_str().unwrap(), "--to", to]).fine();
            sparse24(["inspect", at("out").to_str().unwrap()]).fine();
            let file = TensorFile::open(at("out")).unwrap();
            strangers.iter().for_each(|(key, value)| assert_eq!(file.metadata()[*key], *value, "{command} --to {to}"));
            assert_eq!(file.metadata()["format"], if to == "native" { "sparse24" } else { "pt" });
        }
    }
    // Entries that would be misread, or stand where the format has its own, go and are named.
    write(&[("b.vector", "12"), ("b.shape", "a"), ("version", "7"), ("format", "tf"), ("by", "them")], "b.values");
    let says = "warning: not kept of the old metadata, as the new file needs these keys or would be misread: \
                format, version, b.shape, b.vector\n";
    convert(&at("in"), &at("out"), "native", &["--include", "up"]).noted(says);
    sparse24(["inspect", at("out").to_str().unwrap()]).fine();
    assert_eq!(TensorFile::open(at("out")).unwrap().metadata()["by"], "them");
}

#[test]
fn types_that_no_2_4_matrix_has_are_kept_and_said() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let w: Vec<u8> = [1u16, 0, 0, 2, 0, 3, 4, 0].iter().flat_map(|n| n.to_le_bytes()).collect();
    let values: Vec<u8> = [1u16, 2, 3, 4].iter().flat_map(|n| n.to_le_bytes()).collect();
    let parts: [(Spec, &[u8]); 4] = [
        (Spec::new("ids", Dtype::I16, &[1, 8]), &w),
        (Spec::new("w.compressed", Dtype::I16, &[1, 4]), &values),
        (Spec::new("w.bitmask", Dtype::U8, &[1, 1]), &[0b0110_1001]),
        (Spec::new("w.shape", Dtype::I64, &[2, 1]), &[1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let write = |bits: u8| {
        let specs: Vec<_> = parts.iter().map(|(spec, _)| spec.clone()).collect();
        let mut writer = Writer::create(at("in"), &specs, &Default::default()).unwrap();
        for (spec, bytes) in &parts {
            writer
                .write(&spec.name, if spec.dtype == Dtype::U8 { std::slice::from_ref(&bits) } else { bytes })
                .unwrap();
        }
        writer.finish().unwrap();
    };
    write(0b0110_1001);
    let says = "warning: nothing was converted: of a type that 2:4 matrices do not have: 2 matrices of 2 tensors; \
                the output is a copy\n";
    convert(&at("in"), &at("out"), "native", &[]).noted(says);
    assert_same_tensors(&at("in"), &at("out"));
    let text = convert(&at("in"), &at("out"), "bitmask", &[]).fine();
    assert!(text.contains(" (of a type that 2:4 matrices do not have: 1 matrix); "), "{text}");
    convert(&at("in"), &at("out"), "dense", &[]).fine();
    assert_eq!(TensorFile::open(at("out")).unwrap().bytes("w.weight").unwrap(), w);
    sparse24(["inspect", at("in").to_str().unwrap()]).fine();
    assert!(check(&at("in")).fine().ends_with("1 claims to be 2:4, and is\n"));
    write(0b0111_1000);
    assert!(check(&at("in")).refused(3).contains("tensor w.weight: row 0, group 0: 1 bits are set, expected 2"));
}

/// Matrices of in features x out features: what 2:4 is along in them, and that nothing takes them for others.
#[test]
fn matrices_of_in_x_out_stay_dense_and_are_looked_at_along_the_in_features() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("gpt")).unwrap();
    // 2:4 along columns, and along rows.
    let along_out = compressed(16, 64, DType::F32, 1, 1).decompress();
    let along_in = {
        let w = compressed(64, 16, DType::F32, 4, 2).decompress();
        let bytes = sparse24::io::transpose(64, 16, 4, &w.elements().to_le_bytes());
        Matrix::new(16, 64, sparse24::Elements::from_bytes(DType::F32, &bytes).unwrap()).unwrap()
    };
    let write = |fc: &Matrix| {
        let entries = [("h.0.mlp.c_fc.weight", Entry::Matrix(fc)), ("lm_head.weight", Entry::Matrix(&along_out))];
        save(at("gpt/model.safetensors"), &entries).unwrap();
    };
    let sparsity = json!({"sparsity_structure": "2:4"});
    let config = json!({"model_type": "gpt2", "quantization_config": {"sparsity_config": sparsity}});
    fs::write(at("gpt/config.json"), config.to_string()).unwrap();
    let vector = || {
        let listing: Value =
            serde_json::from_str(&sparse24(["inspect", at("gpt").to_str().unwrap(), "--json"]).fine()).unwrap();
        let row = listing["tensors"][0].clone();
        assert_eq!((&row["name"], &row["in_by_out"]), (&json!("h.0.mlp.c_fc.weight"), &json!(true)));
        assert_eq!((&row["shape"], listing["tensors"][1].get("in_by_out")), (&json!([16, 64]), None));
        row["matrix"]["vector"].clone()
    };
    write(&along_in);
    assert_eq!(vector(), 4);
    check(&at("gpt")).fine();
    let text = sparse24(["inspect", at("gpt").to_str().unwrap()]).fine();
    assert!(text.contains("h.0.mlp.c_fc.weight (in x out)\n"), "{text}");
    let text = convert(&at("gpt"), &at("out"), "native", &[]).fine();
    assert!(text.contains(": 1 matrix to native, 1 tensor as before (stored as in x out: 1 matrix); "), "{text}");
    write(&along_out);
    assert_eq!(vector(), Value::Null);
    let stderr = check(&at("gpt")).refused(3);
    let says = "tensor h.0.mlp.c_fc.weight: row ";
    assert!(stderr.contains(says) && stderr.ends_with("(of its transpose, as it is stored as in x out)\n"), "{stderr}");
}

#[test]
fn results_are_json_where_that_is_asked_for_and_names_obey_nobody() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (w, x) = (compressed(8, 8, DType::F32, 2, 1).decompress(), random(8, 8, DType::F32, 2));
    let evil = "up.\u{1b}[31m\n\u{9b}\u{202e}weight";
    save(at("in"), &[(evil, Entry::Matrix(&w)), ("x", Entry::Matrix(&x))]).unwrap();
    let [from, to, report] = ["in", "out", "r.json"].map(|name| at(name).to_str().unwrap().to_owned());
    let listing: Value =
        serde_json::from_str(&sparse24(["convert", "--model", &from, &to, "--to", "native", "--json"]).fine()).unwrap();
    assert_eq!((&listing["schema"], &listing["converted"]), (&json!("sparse24-convert/1"), &json!(1)));
    assert_eq!(listing["tensors"][0], json!({"name": evil, "from": "dense", "to": "sparse24", "note": null}));
    assert_eq!(listing["tensors"][1], json!({"name": "x", "from": "dense", "to": "dense", "note": "not 2:4"}));
    assert_eq!(listing["bytes_before"], fs::metadata(at("in")).unwrap().len());
    convert(&at("in"), &at("out"), "native", &["--json", &report]).fine();
    assert_eq!(json(&at("r.json"))["tensors"], listing["tensors"]);

    let shown = "up.\\u{1b}[31m\\n\\u{9b}\\u{202e}weight";
    let harmless = |text: &str| {
        assert!(text.contains(shown), "{text}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n' || c == '\u{202e}'), "{text:?}");
    };
    harmless(&sparse24(["inspect", &from]).fine());
    harmless(&sparse24(["prune", &from, &to]).fine());
    harmless(&convert(&at("in"), &at("out"), "cutlass", &[]).refused(1));
    harmless(&sparse24(["prune", &from, &to, "--to", "cutlass"]).refused(1));
    // Names of files, and characters that JSON leaves as they are.
    let odd = at("a\u{1b}[2J\u{9b}b");
    fs::copy(at("in"), &odd).unwrap();
    let text = sparse24(["inspect", odd.to_str().unwrap(), "--json"]).fine();
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["file"], odd.to_str().unwrap());
    assert!(!sparse24(["inspect", at("no\u{1b}").to_str().unwrap()]).refused(1).contains('\u{1b}'));
    for (args, says) in [
        (&["convert", "--model", &from, "--to", "native"][..], "required"),
        (&["convert", &from, "--to", "native"], "OUT is missing"),
        (&["convert", &from, &to, "--model", &from, "--to", "native"], "IN is given twice"),
        (&["convert", "-", &to, "--to", "native"], "`-`"),
        (&["inspect", "--model", &from, &from], "cannot be used with"),
        (&["inspect"], "FILE.safetensors"),
        (&["prune", &from], "OUT is missing"),
        (&["prune", &from, &from], "choose another name"),
        (&["prune", &from, &to, "--method", "wanda"], "--calibration TXT is needed"),
        (&["prune", &from, &to, "--vector", "1,4"], "there is one pattern"),
        (&["prune", &from, &to, "--calibration", "-", "--pairs", "-", "--max-drop", "0.1"], "stdin can be read once"),
        (&["prune", &from, &to, "--damping", "0.1"], "--damping is sparsegpt's"),
    ] {
        assert!(sparse24(args).refused(2).contains(says), "{args:?}");
    }
}

/// What is read is not taken away: neither a shard by what is made of it or of its neighbour, nor a folder by an output
/// that would lie in it, nor a run by its report.
#[test]
fn outputs_do_not_take_the_place_of_what_is_read() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    TinyBert::new(1).write(&at("model"));
    shard(&at("model"));
    let [one, two] =
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].map(|name| at("model").join(name));
    let before = fs::read(&two).unwrap();
    let index = at("model/model.safetensors.index.json");
    for from in [&one, &two, &index] {
        let arguments = ["prune", from.to_str().unwrap(), two.to_str().unwrap()];
        let said = sparse24(arguments).refused(2);
        assert!(said.contains("choose another"), "{said}");
        let said = convert(from, &two, "dense", &[]).refused(2);
        assert!(said.contains("choose another"), "{said}");
    }
    for inside in ["model/out", "model/model.safetensors"] {
        let said = convert(&at("model"), &at(inside), "dense", &[]).refused(2);
        assert!(said.contains("lies within") && !at(inside).exists(), "{said}");
    }
    assert_eq!(fs::read(&two).unwrap(), before);
    // A folder may lie beside another whose name begins alike, and a file alone is converted in its place.
    convert(&at("model"), &at("model-dense"), "dense", &[]).fine();
    let alone = at("model-dense/model.safetensors");
    convert(&alone, &alone, "dense", &[]).fine();

    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results/2026-11-25-peers/numpy-threads1.json");
    fs::copy(run, at("run.json")).unwrap();
    let run = at("run.json");
    let arguments = ["report", run.to_str().unwrap(), "--format", "md", "--out", run.to_str().unwrap()];
    let said = sparse24(arguments).refused(2);
    assert!(said.contains("is to be read and written") && json(&run).is_object(), "{said}");
}
