//! `sparse24 classify`, `eval --images` and `prune` on a model of images: a tiny one with random weights.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;

use std::fs;
use std::path::{Path, PathBuf};

use binary::{Run, command, json, sparse24, text};
use serde_json::Value;
use sparse24::graph::Sparsity;
use sparse24::io::Source;
use sparse24::vision::{Classifier, ImageModel, best, read_image};
use sparse24::{DType, Device, HostWeights, VectorLen};
use tempfile::TempDir;

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors");

/// A folder with the tiny model as `model`, and six pictures of its size in `pictures`, named by their classes but for
/// what stands behind.
fn tiny() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (model, pictures) = (folder.path().join("model"), folder.path().join("pictures"));
    fs::create_dir(&model).unwrap();
    let vector: Value = json(Path::new(&format!("{VECTORS}/efficientnet.json")));
    let mut config = vector["config"].clone();
    config["id2label"] = serde_json::json!({"0": "ash", "1": "birch", "2": "cedar", "3": "dogwood", "4": "elm"});
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    fs::copy(format!("{VECTORS}/efficientnet_tiny.safetensors"), model.join("model.safetensors")).unwrap();
    for picture in 0..6u32 {
        let of = |x: u32, y: u32| image::Rgb([x * 13 + picture * 40, y * 15, (x * y + picture) * 7].map(|v| v as u8));
        let class = pictures.join((picture % 5).to_string());
        fs::create_dir_all(&class).unwrap();
        image::RgbImage::from_fn(17, 17, of).save(class.join(format!("{picture}.png"))).unwrap();
    }
    folder
}

/// What the library has for the most probable class of each picture.
fn expected(model: &ImageModel, pictures: &[PathBuf]) -> Vec<(usize, f64)> {
    let pixels: Vec<_> = pictures.iter().map(|path| read_image(path, [17, 17]).unwrap()).collect();
    let logits = Classifier::new(&Device::cpu().unwrap(), model).unwrap().logits(&pixels).unwrap();
    let numbers = logits.elements().to_f32();
    let first = |logits: &[f32]| best(logits, 1).first().map(|guess| (guess.class, guess.probability)).unwrap();
    numbers.chunks(5).map(first).collect()
}

fn load(folder: &Path) -> ImageModel {
    ImageModel::load(folder, None, DType::F32).unwrap()
}

#[test]
fn classes_are_those_of_the_library() {
    let folder = tiny();
    let model = folder.path().join("model");
    let pictures: Vec<PathBuf> = ["pictures/2/2.png", "pictures/0/5.png"].map(|name| folder.path().join(name)).into();
    let expected = expected(&load(&model), &pictures);
    let arguments = ["classify", "--model", text(&model), text(&pictures[0]), text(&pictures[1]), "--device", "cpu"];
    let run = sparse24(arguments.into_iter().chain(["--json", "--top", "2"])).json();
    assert_eq!(run["schema"], "sparse24-classify/1");
    for (image, (class, probability)) in run["images"].as_array().unwrap().iter().zip(&expected) {
        let classes = image["classes"].as_array().unwrap();
        assert_eq!((classes.len(), classes[0]["class"].as_u64()), (2, Some(*class as u64)));
        assert!((classes[0]["probability"].as_f64().unwrap() - probability).abs() < 1e-6);
    }
    // The model by position, a picture each in a batch of its own, and names in the text.
    let arguments =
        ["classify", text(&model), text(&pictures[0]), text(&pictures[1]), "--batch", "1", "--device", "cpu"];
    let printed = sparse24(arguments).fine();
    let names = ["ash", "birch", "cedar", "dogwood", "elm"];
    let blocks: Vec<&str> = printed.lines().collect();
    assert_eq!(blocks.len(), 2 * 6, "{printed}");
    for (block, (class, _)) in blocks.chunks(6).zip(&expected) {
        assert!(block[1].ends_with(&format!("{} ({class})", names[*class])), "{printed}");
    }
    // What is wrong is named.
    let refused = sparse24(["classify", text(&model), "--device", "cpu"]).refused(2);
    assert!(refused.contains("name pictures"), "{refused}");
    let config = model.join("config.json");
    let refused = sparse24(["classify", text(&model), text(&config), "--device", "cpu"]).refused(1);
    assert!(refused.contains("config.json") && refused.contains("no picture"), "{refused}");
    let refused = sparse24(["classify", text(folder.path()), text(&pictures[0]), "--device", "cpu"]).refused(1);
    assert!(refused.contains("config.json"), "{refused}");
}

#[test]
fn a_pruned_folder_is_evaluated_as_it_was_pruned() {
    let folder = tiny();
    let (model, pictures) = (folder.path().join("model"), folder.path().join("pictures"));
    let all: Vec<PathBuf> = [(0, 0), (0, 5), (1, 1), (2, 2), (3, 3), (4, 4)]
        .map(|(class, picture)| pictures.join(format!("{class}/{picture}.png")))
        .into();
    let right = |model: &ImageModel| {
        let classes = [0, 0, 1, 2, 3, 4];
        expected(model, &all).iter().zip(classes).filter(|((class, _), of)| class == of).count() as u64
    };
    let mut pruned = load(&model);
    pruned.checkpoint.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
    let eval = |model: &Path, more: &[&str]| {
        let arguments = ["eval", text(model), "--images", text(&pictures), "--device", "cpu", "--json"];
        sparse24(arguments.iter().chain(more)).json()
    };
    let run = eval(&model, &[]);
    assert_eq!((&run["schema"], &run["images"]), (&"sparse24-eval/1".into(), &6.into()));
    assert_eq!(run["top1_right"], right(&load(&model)));
    // Of five classes all are among the best five.
    assert_eq!(run["top5_right"], 6);
    assert_eq!(eval(&model, &["--sparsity", "2:4"])["top1_right"], right(&pruned));
    // Written compressed or dense, it is the same model. (Other layouts have no place for a stem of 27 columns.)
    for form in ["native", "dense"] {
        let out = folder.path().join(form);
        let report = folder.path().join("prune.json");
        sparse24(["prune", text(&model), text(&out), "--to", form, "--json", text(&report)]).exits(0);
        let report = json(&report);
        // Seven convolutions and the last layer; all that could be pruned was.
        assert_eq!((report["layers"].as_array().unwrap().len(), &report["pruned_share"]), (8, &1.0.into()));
        let written = load(&out);
        for ((name, w), (_, want)) in written.checkpoint.linears().zip(pruned.checkpoint.linears()) {
            let form = if form == "dense" { "dense" } else { "sparse24" };
            assert_eq!(w.op().name(), form, "{name}");
            let [got, want] = [w, want].map(|w| w.to_dense().unwrap().elements().to_f32());
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs() && (*a == 0.0) == (*b == 0.0);
            assert!(got.iter().zip(&want).all(close), "{name}: {got:?}, not {want:?}");
        }
        let run = eval(&out, &[]);
        assert_eq!(run["top1_right"], right(&pruned));
        assert!(run["provenance"]["pruned"].as_str().is_some_and(|how| how.contains("magnitude")), "{run}");
    }
    // A dense file has kernels of four dimensions, as other programs want them.
    let source = Source::open(folder.path().join("dense")).unwrap();
    assert_eq!(source.item("_conv_stem.weight").unwrap().shape, [8, 3, 3, 3]);
}

#[test]
fn calibrated_methods_run_the_model_on_pictures() {
    let folder = tiny();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    let pictures = folder.path().join("pictures");
    let report = folder.path().join("prune.json");
    let arguments = ["prune", text(&model), text(&out), "--method", "sparsegpt", "--calibration", text(&pictures)];
    let excluded = ["--exclude", "_fc|_conv_stem", "--device", "cpu", "--json", text(&report)];
    sparse24(arguments.into_iter().chain(excluded)).exits(0);
    let report = json(&report);
    let layers = report["layers"].as_array().unwrap();
    assert!(layers.len() == 6 && layers.iter().all(|layer| layer["lost_output"].as_f64().unwrap() < 0.9), "{layers:?}");
    let written = load(&out);
    let sparse = written.checkpoint.linears().filter(|(_, w)| matches!(w, HostWeights::Sparse24(_))).count();
    assert_eq!(sparse, 6);
    // The same pictures are known by what they are, whatever they are called; others are not.
    let other = folder.path().join("renamed");
    fs::rename(&pictures, &other).unwrap();
    let eval = || {
        let (stdout, stderr) =
            sparse24(["eval", text(&out), "--images", text(&other), "--device", "cpu", "--json"]).exits(0);
        (serde_json::from_str::<Value>(&stdout).unwrap(), stderr)
    };
    let (seen, stderr) = eval();
    assert!(stderr.contains("flatter these weights"), "{stderr}");
    assert!(seen["provenance"].to_string().contains("pictures (6 images, "), "{seen}");
    assert!(!seen["provenance"].to_string().contains(text(folder.path())), "{seen}");
    assert_eq!(seen["seen"].as_array().unwrap().len(), 1, "{seen}");
    fs::copy(other.join("1/1.png"), other.join("2/2.png")).unwrap();
    let (seen, stderr) = eval();
    assert!(seen["seen"].as_array().unwrap().is_empty() && stderr.is_empty(), "{stderr}");
    let refused = command(["prune", text(&model), text(&folder.path().join("no")), "--permute", "1"]).run().refused(2);
    assert!(refused.contains("takes images"), "{refused}");
    let refused = sparse24(["eval", text(&model), "--images", text(&model), "--dtype", "f16"]).refused(2);
    assert!(refused.contains("--dtype f16"), "{refused}");
    let refused = sparse24(["eval", text(&model), "--images", text(&model), "--device", "cpu"]).refused(1);
    assert!(refused.contains("has no pictures"), "{refused}");
}
