//! EfficientNet-Lite against torch, and every tool that works on a graph on a network of convolutions.
#![cfg(feature = "vision")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips")]

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;

use serde_json::Value;
use sparse24::graph::{Batching, Calibration, CalibrationInputs, Checkpoint, LinearTensor, Model, Sparsity, twin};
use sparse24::io::{Content, Source};
use sparse24::models::efficientnet::EfficientNetConfig;
use sparse24::prune::SparseGpt;
use sparse24::vision::{self, Classifier, ImageModel, best, labelled, read_image};
use sparse24::{DType, Device, HostWeights, Matrix, Op, Sparse24, VectorLen};
use tempfile::TempDir;

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors");

fn vector() -> Value {
    serde_json::from_str(&fs::read_to_string(format!("{VECTORS}/efficientnet.json")).unwrap()).unwrap()
}

/// A folder with the tiny model.
fn tiny() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), vector()["config"].to_string()).unwrap();
    let weights = format!("{VECTORS}/efficientnet_tiny.safetensors");
    fs::copy(weights, folder.path().join("model.safetensors")).unwrap();
    folder
}

fn load(folder: &Path) -> ImageModel {
    ImageModel::load(folder, None, DType::F32).unwrap()
}

/// The image of tests/vectors/efficientnet.py.
fn image(which: u64) -> Vec<u32> {
    let channel = |n: u64| (((n + 1000 * which) * 2_654_435_761) >> 13 & 255) as u32;
    (0..17 * 17).map(|p| (channel(3 * p) << 16) | (channel(3 * p + 1) << 8) | channel(3 * p + 2)).collect()
}

fn images() -> Vec<Vec<u32>> {
    vec![image(0), image(1)]
}

/// Logits of the f64 twin.
fn exact(checkpoint: &Checkpoint) -> Vec<f64> {
    let output = checkpoint.graph().outputs()[0];
    twin::values(checkpoint, &[output], &images()).unwrap()[0].iter().copied().collect()
}

#[track_caller]
fn close(got: impl IntoIterator<Item = f64>, want: &[f64], bound: f64) {
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), want.len());
    let far = got.iter().zip(want).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f64::max);
    assert!(far <= bound, "{far:e} off: {got:?}, not {want:?}");
}

fn wide(m: &Matrix) -> Vec<f64> {
    m.elements().to_f32().into_iter().map(f64::from).collect()
}

/// Its weights and norms are f32, and folding rounds each product and sum of them once.
#[test]
fn the_twin_agrees_with_torch() {
    let logits = vector();
    let want: Vec<f64> = logits["logits"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|x| x.as_f64().unwrap())
        .collect();
    let folder = tiny();
    close(exact(&load(folder.path()).checkpoint), &want, 2e-6);
}

fn devices_agree_with_the_twin(device: &Device) {
    let folder = tiny();
    let mut model = load(folder.path());
    for sparsity in [Sparsity::None, Sparsity::TwoFour(VectorLen::ONE), Sparsity::TwoFour(VectorLen::new(4).unwrap())] {
        model.checkpoint.densify().unwrap();
        model.checkpoint.prune(sparsity).unwrap();
        let expected = exact(&model.checkpoint);
        for own in [false, true] {
            let on_device = Model::new(device, &model.checkpoint).unwrap();
            let on_device = if own { on_device.no_dense_fallback() } else { on_device };
            let logits = on_device.forward(2, 17 * 17).unwrap().run_on(&images()).unwrap();
            close(wide(&logits), &expected, 2e-5);
        }
        // One at a time, and the other way round: an image has nothing to do with its neighbour.
        let classifier = Classifier::new(device, &model).unwrap();
        let reversed = classifier.logits(&[image(1), image(0)]).unwrap();
        let alone = [classifier.logits(&[image(1)]).unwrap(), classifier.logits(&[image(0)]).unwrap()];
        close(wide(&reversed), &alone.iter().flat_map(wide).collect::<Vec<_>>(), 2e-5);
    }
    assert_eq!(Classifier::new(device, &model).unwrap().logits::<Vec<u32>>(&[]).unwrap().rows(), 0);
}

#[test]
fn the_cpu_agrees_with_the_twin() {
    devices_agree_with_the_twin(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_agrees_with_the_twin() {
    common::gpu().iter().for_each(devices_agree_with_the_twin);
}

#[test]
fn lite0_has_its_layers() {
    let graph = EfficientNetConfig::lite0().graph().unwrap();
    let count = |name: &str| graph.nodes().iter().filter(|node| node.op.name() == name).count();
    // Sixteen blocks, of which the first widens nothing; one convolution of larger windows than pixels.
    assert_eq!(["gemm", "depthwise", "im2col", "mean_pooling", "pixels"].map(count), [15 + 16 + 3, 16, 1, 1, 1]);
    assert_eq!(graph.values().filter(|(_, value)| value.cols == 1280).count(), 2);
    // 95 % of 4.65 million parameters.
    assert_eq!(graph.linear_weights(), 4_426_976);
}

/// Statistics of a convolution's inputs are of every position of every image, and what second-order pruning makes of
/// them loses less than magnitude does.
#[test]
fn convolutions_are_calibrated_like_linear_layers() {
    let device = Device::cpu().unwrap();
    let folder = tiny();
    let dense = load(folder.path()).checkpoint;
    let expected = exact(&dense);
    let images: Vec<Vec<u32>> = (0..8).map(image).collect();
    let mut seen = Vec::new();
    let mut compensated = dense.clone();
    let batching = Batching { texts: 3, tokens: usize::MAX };
    let how = Calibration { batching, gram: true, inputs: CalibrationInputs::Pruned };
    let visit = &mut |name: &str, w: &HostWeights, statistics: &sparse24::prune::Statistics| {
        seen.push((name.to_owned(), statistics.tokens(), w.k()));
        let (pruned, mask) = SparseGpt::new(VectorLen::ONE).prune(&w.to_dense()?, statistics, None)?;
        Ok(Some(HostWeights::Sparse24(Sparse24::compress(&pruned, &mask)?)))
    };
    compensated.calibrate(&device, &images, how, visit).unwrap();
    let of = |name: &str| seen.iter().find(|(seen, ..)| seen == name).map(|(_, tokens, k)| (*tokens, *k));
    assert_eq!(of("_conv_stem"), Some((8 * 81, 27)));
    assert_eq!(of("_blocks.1._project_conv"), Some((8 * 25, 8)));
    assert_eq!(of("_fc"), Some((8, 12)));
    let mut magnitude = dense.clone();
    magnitude.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
    let lost = |of: &Checkpoint| exact(of).iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    assert!(lost(&compensated) < lost(&magnitude), "{} against {}", lost(&compensated), lost(&magnitude));
}

/// What is written of weights that were folded is what they are before: the norm is beside them in the file.
#[test]
fn norms_are_taken_out_again_when_weights_are_written() {
    let folder = tiny();
    let checkpoint = load(folder.path()).checkpoint;
    let source = Source::open(folder.path()).unwrap();
    let mut kernels = 0;
    for item in source.items() {
        let written = checkpoint.linear_tensor(&item.name).unwrap();
        // Of norms and depthwise convolutions nothing is a linear layer's.
        let is_linear = item.name.ends_with("conv.weight") && !item.name.contains("depthwise")
            || item.name.starts_with("_conv")
            || item.name.starts_with("_fc");
        assert_eq!(written.is_some(), is_linear, "{}", item.name);
        if !matches!(written, Some(LinearTensor::Weights(_))) || item.name.starts_with("_fc") {
            continue;
        }
        let action = checkpoint.action(item).unwrap();
        let Content::Dense(bytes) = checkpoint.content(item, &action).unwrap() else { panic!("{}", item.name) };
        let numbers = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let (got, want) = (numbers(&bytes), numbers(&source.dense(item).unwrap()));
        // The norm's middle channel has the factor 0, so that nothing is known of its weights.
        let row = want.len() / item.shape[0];
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let lost = at / row == item.shape[0] / 2;
            assert!(if lost { *got == 0.0 } else { (got - want).abs() <= 1e-6 * want.abs() }, "{} {at}", item.name);
        }
        kernels += 1;
    }
    assert_eq!(kernels, 1 + 1 + 2 + 2 + 1);
}

#[test]
fn what_is_missing_or_does_not_fit_is_named() {
    let folder = tiny();
    let says = |config: &dyn Fn(&mut Value)| {
        let mut of = vector()["config"].clone();
        config(&mut of);
        fs::write(folder.path().join("config.json"), of.to_string()).unwrap();
        ImageModel::load(folder.path(), None, DType::F32).map(|_| ()).unwrap_err().to_string()
    };
    let named = |error: String, words: &[&str]| {
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    named(says(&|c| c["stem_channels"] = 16.into()), &["_bn0.weight", "[8]", "[16]"]);
    let other = vec![5, 5];
    named(
        says(&|c| c["kernel_sizes"] = other.clone().into()),
        &["_blocks.0._depthwise_conv.weight", "[8, 1, 3, 3]", "[8, 1, 5, 5]"],
    );
    named(says(&|c| c["num_labels"] = 6.into()), &["_fc.weight", "[5, 12]", "[6, 12]"]);
    named(says(&|c| c["num_block_repeats"] = vec![1, 3].into()), &["_blocks.3._bn0.weight", "is missing"]);
    named(says(&|c| c["num_block_repeats"] = vec![1, 1].into()), &["_blocks.2.", "num_block_repeats of 2"]);
    named(says(&|c| c["strides"] = vec![1].into()), &["config.json", "strides has 1 stages, kernel_sizes 2"]);
    named(says(&|c| c["strides"] = vec![1, 0].into()), &["strides is 0"]);
    named(says(&|c| c["image_std"] = vec![1, 0, 1].into()), &["image_mean or image_std has 0"]);
    named(says(&|c| c["image_mean"] = vec![1, 2].into()), &["image_mean is [1,2]", "three numbers"]);
    named(says(&|c| c["kernel_sizes"] = "3".into()), &["kernel_sizes is \"3\"", "whole numbers"]);
    named(says(&|c| c["hidden_act"] = "swash".into()), &["hidden_act", "relu6"]);
    named(says(&|c| c["id2label"] = serde_json::json!({"x": "y"})), &["id2label has \"x\""]);
    named(
        says(&|c| {
            *c = serde_json::json!({"model_type": "bert", "vocab_size": 9, "hidden_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 4})
        }),
        &["config.json", "takes no images"],
    );
    // Images of another size.
    let folder = tiny();
    let model = load(folder.path());
    let classifier = Classifier::new(&Device::cpu().unwrap(), &model).unwrap();
    let error = classifier.logits(&[vec![0; 16 * 16]]).unwrap_err().to_string();
    assert!(error.contains("the image has 256 pixels; the model takes 17 x 17"), "{error}");
    let error = classifier.model().forward(1, 16).unwrap_err().to_string();
    assert!(error.contains("17 x 17"), "{error}");
}

#[test]
fn pictures_are_read_cut_and_resized() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // A picture of the right size is taken as it is.
    let color = |x: u32, y: u32| image::Rgb([x as u8 * 10, y as u8 * 20, 7]);
    let exact = image::RgbImage::from_fn(4, 3, color);
    exact.save(at("exact.png")).unwrap();
    let pixels = read_image(at("exact.png"), [3, 4]).unwrap();
    let want = |p: u32| ((p % 4 * 10) << 16) | ((p / 4 * 20) << 8) | 7;
    assert_eq!(pixels, (0..12).map(want).collect::<Vec<_>>());
    // Of another the middle: red outside of the seven eighths, green within.
    let inside = |x: u32, y: u32| (26..54).contains(&x) && (2..30).contains(&y);
    let framed =
        image::RgbImage::from_fn(80, 32, |x, y| image::Rgb(if inside(x, y) { [0, 200, 0] } else { [255, 0, 0] }));
    framed.save(at("framed.png")).unwrap();
    assert_eq!(read_image(at("framed.png"), [7, 7]).unwrap(), [200 << 8; 49]);
    // JPEG, whatever the name's ending.
    image::RgbImage::from_pixel(8, 8, image::Rgb([128, 128, 128])).save(at("grey.jpg")).unwrap();
    fs::rename(at("grey.jpg"), at("grey.png")).unwrap();
    assert_eq!(read_image(at("grey.png"), [2, 2]).unwrap(), [0x808080; 4]);
    // Errors name the file.
    fs::write(at("text.jpg"), "no picture").unwrap();
    let bytes = fs::read(at("exact.png")).unwrap();
    fs::write(at("cut.png"), &bytes[..bytes.len() - 20]).unwrap();
    for name in ["text.jpg", "cut.png"] {
        let error = read_image(at(name), [2, 2]).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("is no picture in JPEG or PNG"), "{error}");
    }
    assert!(read_image(at("none.jpg"), [2, 2]).unwrap_err().to_string().contains("none.jpg"));
    assert!(vision::decode(&[], [2, 2]).is_err());
}

#[test]
fn classes_are_those_of_files_and_folders() {
    let folder = tempfile::tempdir().unwrap();
    let labels = ["cat", "dog", "7"].map(str::to_owned);
    let touch = |name: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    };
    assert!(labelled(folder.path(), &labels).unwrap_err().to_string().contains("has no pictures"));
    ["0001.JPG", "cat.png", "notes.txt", "dog/a.jpeg", "dog/b.png", "0/x.jpg"].into_iter().for_each(touch);
    let found = labelled(folder.path(), &labels).unwrap();
    let names: Vec<_> =
        found.iter().map(|i| (i.path.strip_prefix(folder.path()).unwrap().to_str().unwrap(), i.class)).collect();
    assert_eq!(names, [("0/x.jpg", 0), ("0001.JPG", 1), ("cat.png", 0), ("dog/a.jpeg", 1), ("dog/b.png", 1)]);
    touch("0003.jpg");
    let error = labelled(folder.path(), &labels).unwrap_err().to_string();
    assert!(error.contains("0003.jpg") && error.contains("a number below 3"), "{error}");
}

#[test]
fn the_best_classes_come_first() {
    let classes = |logits: &[f32], top| best(logits, top).iter().map(|guess| guess.class).collect::<Vec<_>>();
    assert_eq!(classes(&[1.0, 3.0, 3.0, -1.0], 3), [1, 2, 0]);
    assert_eq!(classes(&[f32::NAN, 0.0], 5), [1, 0]);
    assert_eq!(classes(&[], 2), [0usize; 0]);
    // Large logits do not overflow.
    let guesses = best(&[1000.0, 1000.0], 2);
    assert_eq!(guesses.iter().map(|guess| guess.probability).collect::<Vec<_>>(), [0.5, 0.5]);
}

/// The real model, where it is there: its most probable class of a picture of one colour is that of torch, and what is
/// loaded is what the file has.
#[test]
fn lite0_is_loaded_whole() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/efficientnet-lite0");
    if !folder.join("config.json").exists() {
        eprintln!("skipped: {} is not there (tests/fetch-efficientnet.sh brings it)", folder.display());
        return;
    }
    let model = load(&folder);
    assert_eq!((model.labels.len(), &*model.labels[0], &*model.labels[999]), (1000, "tench", "toilet paper"));
    assert!(model.checkpoint.linears().all(|(_, w)| w.op() == Op::Dense));
    let classifier = Classifier::new(&Device::cpu().unwrap(), &model).unwrap();
    let grey = classifier.logits(&[vec![0x7f_7f_7f; 224 * 224]]).unwrap();
    let exact = exact_of(&model.checkpoint, &vec![0x7f_7f_7f; 224 * 224]);
    close(wide(&grey), &exact, 1e-4);
}

fn exact_of(checkpoint: &Checkpoint, image: &Vec<u32>) -> Vec<f64> {
    let output = checkpoint.graph().outputs()[0];
    twin::values(checkpoint, &[output], &[image]).unwrap()[0].iter().copied().collect()
}
