//! Models without some of their channels: the same function as with the columns of these channels at zero, read by the
//! same code, bit for bit the old tensors without what went.
#![cfg(all(feature = "text", feature = "vision"))]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/tiny_bert.rs"]
mod tiny_bert;
#[path = "common/tiny_llama.rs"]
mod tiny_llama;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use sparse24::graph::{
    Batching, ChannelWeights, Checkpoint, Graph, HiddenSpec, Model, Removal, SizeField, Sparsity, twin,
};
use sparse24::io::{Action, Content, Layout, NewModel, Source};
use sparse24::{DType, Device, HostWeights, Matrix, TensorFile, VectorLen, models};
use tiny_bert::TinyBert;

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors");

/// Which channels stay, by the names of their layers.
type Kept = BTreeMap<String, Vec<usize>>;

fn load(folder: &Path) -> Checkpoint {
    let graph = models::load(folder.join("config.json")).unwrap();
    Checkpoint::load(graph, &folder.join("model.safetensors"), None, DType::F32).unwrap()
}

/// Writes the model without all channels but these.
fn remove(from: &Path, to: &Path, kept: &Kept) -> sparse24::Result<()> {
    let graph = models::load(from.join("config.json"))?;
    let source = Source::open(from)?;
    let removal = Removal::new(&graph, kept)?;
    let mut model = NewModel::create(from, &source, to, false)?;
    removal.config().iter().for_each(|(way, number)| model.set_config(way, *number));
    let mut actions = Vec::new();
    for item in source.items() {
        actions.push((item, removal.shape(&source, item)?.map_or(Action::Copy, Action::Reshape)));
    }
    model.write(&source, Layout::Dense, &actions, &[], |item, _| removal.content(&source, item).map(Content::Dense))?;
    Ok(())
}

/// Some channels of each layer, others in each.
fn some(graph: &Graph, left: impl Fn(usize) -> usize) -> Kept {
    let of = |(at, hidden): (usize, &sparse24::graph::HiddenChannels)| {
        let step = [7, 11, 5][at % 3];
        let mut kept: Vec<_> = (0..left(at)).map(|i| (i * step + at) % hidden.count).collect();
        kept.sort_unstable();
        kept.dedup();
        assert_eq!(kept.len(), left(at), "the step divides {}", hidden.count);
        (hidden.name.clone(), kept)
    };
    graph.hidden().iter().enumerate().map(of).collect()
}

/// Zeroes the columns of the layers that read the other channels.
fn zeroed(checkpoint: &mut Checkpoint, readers: &[&str], kept: &Kept) {
    for (reader, kept) in readers.iter().zip(kept.values()) {
        let w = checkpoint.linear(reader).unwrap().to_dense().unwrap();
        let mut w = w.to_array();
        w.indexed_iter_mut().filter(|((_, col), _)| !kept.contains(col)).for_each(|(_, w)| *w = 0.0);
        checkpoint.set_linear(reader, Matrix::from_array(w.view()).into()).unwrap();
    }
}

#[track_caller]
fn same(small: &Checkpoint, large: &Checkpoint, texts: &[Vec<u32>]) {
    let output = |of: &Checkpoint| twin::values(of, &[*of.graph().outputs().last().unwrap()], texts).unwrap().remove(0);
    let (small, large) = (output(small), output(large));
    let off = (&small - &large).iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    assert!(off <= 1e-11, "{off:e} off");
}

/// How far a device's output is from the twin's.
fn on_the_cpu(checkpoint: &Checkpoint, text: &[u32]) {
    let output = *checkpoint.graph().outputs().last().unwrap();
    let expected = twin::values(checkpoint, &[output], &[text]).unwrap().remove(0);
    let model = Model::new(&Device::cpu().unwrap(), checkpoint).unwrap();
    let got = model.forward(1, text.len()).unwrap().run_on(&[text]).unwrap();
    assert_eq!((got.rows(), got.cols()), expected.dim());
    for ((row, col), expected) in expected.indexed_iter() {
        assert!((f64::from(got.get(row, col)) - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{row}, {col}");
    }
}

#[test]
fn a_bert_without_channels_is_one_with_columns_of_zeros() {
    for (prefix, dtype) in [("", DType::F32), ("bert.", DType::F16)] {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut tiny = TinyBert::new(31);
        tiny.dtype = dtype;
        tiny.rename(|name| format!("{prefix}{name}"));
        tiny.write(&from);
        let mut large = load(&from);
        let kept = some(large.graph(), |_| 44);
        remove(&from, &to, &kept).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
        assert_eq!((&config["intermediate_size"], &config["hidden_size"]), (&44.into(), &40.into()));
        let mut small = load(&to);
        let texts = vec![vec![2, 5, 6, 7, 3], vec![2, 12, 13, 3]];
        let dense = large.clone();
        zeroed(&mut large, &["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"], &kept);
        same(&small, &large, &texts);
        // Those that went had something to say.
        let output = [*dense.graph().outputs().last().unwrap()];
        let [was, is] = [&dense, &large].map(|of| twin::values(of, &output, &texts).unwrap().remove(0));
        assert!((&was - &is).iter().any(|x| x.abs() > 1e-2));

        // What stays keeps every bit, in the file's own type.
        let name = format!("{prefix}encoder.layer.1.intermediate.dense.weight");
        let file = |folder: &Path| TensorFile::open(folder.join("model.safetensors")).unwrap();
        let [old, new] = [&from, &to].map(|folder| file(folder).matrix(&name).unwrap());
        assert_eq!((new.rows(), new.dtype()), (44, dtype));
        for (row, &channel) in kept["encoder.layer.1.intermediate.dense"].iter().enumerate() {
            assert!((0..40).all(|col| new.get(row, col) == old.get(channel, col)));
        }
        let pooler = format!("{prefix}pooler.dense.weight");
        assert_eq!(file(&from).bytes(&pooler).unwrap(), file(&to).bytes(&pooler).unwrap());

        // It is a model like others.
        small.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
        assert!(small.linears().all(|(_, w)| matches!(w, HostWeights::Sparse24(_))));
        on_the_cpu(&small, &texts[0]);
    }
}

/// The folder of the tiny EfficientNet.
fn efficientnet(at: &Path) {
    let vector: Value =
        serde_json::from_str(&fs::read_to_string(format!("{VECTORS}/efficientnet.json")).unwrap()).unwrap();
    fs::create_dir(at).unwrap();
    fs::write(at.join("config.json"), vector["config"].to_string()).unwrap();
    fs::copy(format!("{VECTORS}/efficientnet_tiny.safetensors"), at.join("model.safetensors")).unwrap();
}

fn images() -> Vec<Vec<u32>> {
    // Bytes of a multiplicative hash.
    let pixel = |n: u64| ((n * 2_654_435_761) >> 8 & 0xff_ff_ff) as u32;
    (0..2).map(|which| (0..17 * 17).map(|p| pixel(1000 * which + p + 1)).collect()).collect()
}

#[test]
fn inverted_bottlenecks_get_narrower_each_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to, again] = ["from", "to", "again"].map(|name| dir.path().join(name));
    efficientnet(&from);
    let mut large = load(&from);
    let sizes: Vec<_> = large.graph().hidden().iter().map(|hidden| (&*hidden.name, hidden.count)).collect();
    // The first block widens nothing.
    assert_eq!(sizes, [("_blocks.1._expand_conv", 8), ("_blocks.2._expand_conv", 16)]);
    let kept = some(large.graph(), |at| [5, 12][at]);
    remove(&from, &to, &kept).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["expanded_channels"], serde_json::json!({"1": 5, "2": 12}));
    let mut small = load(&to);
    zeroed(&mut large, &["_blocks.1._project_conv", "_blocks.2._project_conv"], &kept);
    same(&small, &large, &images());
    let file = TensorFile::open(to.join("model.safetensors")).unwrap();
    let shape = |name: &str| file.info(name).unwrap().shape.clone();
    assert_eq!(shape("_blocks.1._depthwise_conv.weight"), [5, 1, 5, 5]);
    assert_eq!((shape("_blocks.2._bn0.running_var"), shape("_blocks.2._bn2.running_var")), (vec![12], vec![8]));
    assert_eq!(shape("_blocks.2._project_conv.weight"), [8, 12, 1, 1]);

    // Once more, of one block: the other's number stays.
    let one: Kept = [("_blocks.2._expand_conv".to_owned(), vec![0, 2, 3, 9])].into();
    remove(&to, &again, &one).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(again.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["expanded_channels"], serde_json::json!({"1": 5, "2": 4}));
    let mut before = small.clone();
    zeroed(&mut before, &["_blocks.2._project_conv"], &one);
    same(&load(&again), &before, &images());

    small.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
    on_the_cpu(&small, &images()[0]);
}

#[test]
fn a_gated_feed_forward_part_loses_rows_of_both_its_layers() {
    // With biases of the feed-forward part, and without.
    for name in ["llama3", "qwen2"] {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        tiny_llama::write(name, &from);
        let mut large = load(&from);
        let kept = some(large.graph(), |_| 12);
        remove(&from, &to, &kept).unwrap();
        let names: Vec<_> = large.graph().linears().map(|layer| layer.name.to_owned()).collect();
        let readers: Vec<_> = names.iter().filter(|name| name.ends_with("down_proj")).map(|name| &**name).collect();
        zeroed(&mut large, &readers, &kept);
        let small = load(&to);
        assert!(small.graph().linear_weights() < large.graph().linear_weights());
        same(&small, &large, &[vec![1, 5, 9, 2]]);
    }
}

#[test]
fn channels_are_scored_by_stored_weights_norms_and_activations() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    efficientnet(&folder);
    let checkpoint = load(&folder);
    let (graph, source) = (checkpoint.graph(), Source::open(&folder).unwrap());
    let file = TensorFile::open(folder.join("model.safetensors")).unwrap();
    let numbers = |name: &str| -> Vec<f32> {
        let bytes = file.bytes(name).unwrap();
        bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
    };
    let hidden = &graph.hidden()[1];
    let making = hidden.weights(graph, &source, ChannelWeights::Making).unwrap();
    let (expand, depthwise) = (numbers("_blocks.2._expand_conv.weight"), numbers("_blocks.2._depthwise_conv.weight"));
    assert_eq!((making.rows(), making.cols()), (16, 8 + 25));
    let row = |channel: usize| [&expand[channel * 8..][..8], &depthwise[channel * 25..][..25]].concat();
    assert!((0..16).all(|channel| (0..33).all(|col| making.get(channel, col) == row(channel)[col])));
    let reading = hidden.weights(graph, &source, ChannelWeights::Reading).unwrap();
    let project = numbers("_blocks.2._project_conv.weight");
    assert_eq!((reading.rows(), reading.cols()), (16, 8));
    assert!((0..16).all(|channel| (0..8).all(|out| reading.get(channel, out) == project[out * 16 + channel])));
    let gamma: Vec<_> = numbers("_blocks.2._bn1.weight").into_iter().map(f32::abs).collect();
    assert_eq!(hidden.norm_scale(graph, &source).unwrap(), gamma);

    // In batches of one and of two, the same shares as of the twin's values.
    let values: Vec<_> = graph.hidden().iter().map(|hidden| hidden.value).collect();
    let values = twin::values(&checkpoint, &values, &images()).unwrap();
    for batch in [1, 2] {
        let batching = Batching { texts: batch, ..Batching::default() };
        let shares = checkpoint.active_shares(&Device::cpu().unwrap(), &images(), batching).unwrap();
        for (hidden, values) in graph.hidden().iter().zip(&values) {
            let expected = values
                .columns()
                .into_iter()
                .map(|column| column.iter().filter(|x| **x > 0.0).count() as f32 / column.len() as f32);
            let (expected, got): (Vec<_>, _) = (expected.collect(), &shares[&hidden.name]);
            assert!(expected.iter().any(|share| (0.01..0.99).contains(share)), "{expected:?}");
            // What is within rounding of zero may fall to either side.
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1.5 / 50.0;
            assert!(expected.len() == got.len() && expected.iter().zip(got).all(near), "{expected:?} {got:?}");
        }
    }

    // Padding of the shorter text is in no share.
    let folder = dir.path().join("bert");
    TinyBert::new(3).write(&folder);
    let bert = load(&folder);
    let texts = [vec![2, 5, 6, 7, 8, 9, 3], vec![2, 3]];
    let hidden = &bert.graph().hidden()[0];
    let values = twin::values(&bert, &[hidden.value], &texts).unwrap().remove(0);
    let shares = bert.active_shares(&Device::cpu().unwrap(), &texts, Batching::default()).unwrap();
    for (column, share) in values.columns().into_iter().zip(&shares[&hidden.name]) {
        assert_eq!(column.iter().filter(|x| **x > 0.0).count(), (share * 9.0).round() as usize);
        assert!((share * 9.0).fract().min(1.0 - (share * 9.0).fract()) < 1e-5);
    }
    let error = hidden.norm_scale(bert.graph(), &Source::open(&folder).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "encoder.layer.0.intermediate.dense: there is no batch norm before these channels");
}

#[test]
fn what_cannot_be_removed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    TinyBert::new(8).write(&from);
    let graph = models::load(from.join("config.json")).unwrap();
    let names: Vec<_> = graph.hidden().iter().map(|hidden| hidden.name.clone()).collect();
    let error = |kept: &[(&str, Vec<usize>)]| {
        let kept = kept.iter().map(|(name, kept)| ((*name).to_owned(), kept.clone())).collect();
        remove(&from, &to, &kept).unwrap_err().to_string()
    };
    assert_eq!(error(&[("layer", vec![1])]), "there are no hidden channels \"layer\"");
    for wrong in [vec![], vec![3, 2], vec![2, 2], vec![5, 72]] {
        let said = "encoder.layer.0.intermediate.dense: those that stay of 72 channels must be some, and in order";
        assert_eq!(error(&[(&names[0], wrong)]), said);
    }
    let differ = error(&[(&names[0], vec![1, 2]), (&names[1], vec![4])]);
    assert!(differ.contains("would have 2 channels") && differ.contains("a config has one intermediate_size for all"));
    let half = error(&[(&names[0], vec![1, 2])]);
    assert!(half.contains("would have 2 channels and encoder.layer.1.intermediate.dense 72"), "{half}");
    assert!(!to.exists());

    // The order of compressed columns is fixed, and so is their number.
    let mut checkpoint = load(&from);
    checkpoint.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
    let source = Source::open(&from).unwrap();
    let compressed = dir.path().join("compressed");
    let model = NewModel::create(&from, &source, &compressed, false).unwrap();
    let action = |item| match checkpoint.linear_tensor(item).unwrap() {
        Some(sparse24::graph::LinearTensor::Weights(HostWeights::Sparse24(w))) => {
            Action::Compress(sparse24::io::Spec24::of(item, &w))
        }
        _ => Action::Copy,
    };
    let actions: Vec<_> = source.items().map(|item| (item, action(&item.name))).collect();
    model.write(&source, Layout::Native, &actions, &[], |item, action| checkpoint.content(item, action)).unwrap();
    let kept = some(&graph, |_| 44);
    let refused = remove(&compressed, &to, &kept).unwrap_err().to_string();
    assert!(refused.contains("is stored as sparse24, of which no channels can be removed"), "{refused}");

    // Declarations that are none.
    let mut graph = Graph::clone(&graph);
    let block = "encoder.layer.0";
    let [up, down] = ["intermediate.dense", "output.dense"].map(|name| format!("{block}.{name}"));
    let out = format!("{block}.attention.output.dense");
    let mut declare = |makers: &[&str], reader: &str| {
        let size = SizeField::Shared("size");
        graph.add_hidden(HiddenSpec { makers, reader, activation: None, norm: None, size }).unwrap_err().to_string()
    };
    assert!(declare(&[&up], &up).contains("is not alone in reading them"));
    assert!(declare(&["nothing"], &down).contains("there is no node nothing"));
    assert!(declare(&[&out], &down).contains("has shape [40, 40], not 72 of them"));

    // Numbers of a config that no block has.
    let vector: Value =
        serde_json::from_str(&fs::read_to_string(format!("{VECTORS}/efficientnet.json")).unwrap()).unwrap();
    for (expanded, said) in [
        (serde_json::json!({"0": 4}), "expanded_channels has block 0, which has no channels within"),
        (serde_json::json!({"1": 4, "3": 4}), "expanded_channels has block 3, which has no channels within"),
        (serde_json::json!({"1": 0}), "a number of expanded_channels is 0, expected 1 to 4294967295"),
        (serde_json::json!({"x": 4}), "expanded_channels has \"x\": 4, expected two whole numbers"),
    ] {
        let mut config = vector["config"].clone();
        config["expanded_channels"] = expanded;
        assert_eq!(models::parse(&config.to_string()).unwrap_err().to_string(), said);
    }
}

#[cfg(feature = "cli")]
#[path = "common/binary.rs"]
mod binary;

/// The command line.
#[cfg(feature = "cli")]
mod command {
    use sparse24::prune::{Amount, Granularity, Importance, Units, prune_units};

    use super::binary::{json, sparse24, text};
    use super::*;

    /// Which channels of each layer stay in a new model, found by the rows of what makes them.
    fn stayed(from: &Path, to: &Path) -> Kept {
        let [old, new] = [from, to].map(load);
        let (sources, graphs) = ([from, to].map(|at| Source::open(at).unwrap()), [old.graph(), new.graph()]);
        let pairs = graphs[0].hidden().iter().zip(graphs[1].hidden());
        pairs
            .map(|(before, after)| {
                let rows = |i: usize, of: &sparse24::graph::HiddenChannels| {
                    of.weights(graphs[i], &sources[i], ChannelWeights::Making).unwrap().to_array()
                };
                let (before_rows, after_rows) = (rows(0, before), rows(1, after));
                let place =
                    |row: ndarray::ArrayView1<'_, f32>| before_rows.outer_iter().position(|old| old == row).unwrap();
                (before.name.clone(), after_rows.outer_iter().map(place).collect())
            })
            .collect()
    }

    /// Places of what a mask keeps.
    fn places(mask: &sparse24::Mask) -> Vec<usize> {
        (0..mask.rows()).filter(|&row| mask.get(row, 0)).collect()
    }

    #[test]
    fn channels_of_a_bert_go_by_the_weights_that_read_or_make_them() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        TinyBert::new(77).write(&from);
        let (checkpoint, source) = (load(&from), Source::open(&from).unwrap());
        for (granularity, of) in [("channel", ChannelWeights::Reading), ("filter", ChannelWeights::Making)] {
            let to = dir.path().join(granularity);
            let flags = ["--granularity", granularity, "--amount", "0.5", "--norm", "2"];
            let said = sparse24([&["prune", text(&from), text(&to)], &flags[..]].concat()).fine();
            assert!(said.contains("channels of 2 layers removed by magnitude"), "{said}");
            // 36 of 72 channels with 40 rows and columns each.
            let gone = 100.0 * (2.0 * 36.0 * 40.0) / (4.0 * 1600.0 + 2.0 * 72.0 * 40.0);
            assert!(said.contains(&format!("{gone:.1} % of linear weights are gone")), "{said}");
            let expected: Kept = checkpoint
                .graph()
                .hidden()
                .iter()
                .map(|hidden| {
                    let rows = hidden.weights(checkpoint.graph(), &source, of).unwrap();
                    let units = Units::new(&rows, Granularity::Row, Importance::Ln(2.0), None).unwrap();
                    (hidden.name.clone(), places(&units.mask(Amount::count(36)).unwrap()))
                })
                .collect();
            assert_eq!(stayed(&from, &to), expected, "{granularity}");
        }
        // What is smaller is pruned to 2:4 as ever, and runs.
        let (small, pruned) = (dir.path().join("filter"), dir.path().join("pruned"));
        sparse24(["prune", text(&small), text(&pruned), "--vector", "4"]).fine();
        assert!(load(&pruned).linears().all(|(_, w)| matches!(w, HostWeights::Sparse24(_))));
        let line = sparse24(["embed", "--model", text(&pruned), "--device", "cpu", "--text", "the cat"]).fine();
        assert!(line.starts_with("{\"text\":\"the cat\",\"embedding\":["), "{line}");
        let to = dir.path().join("no");
        let refused = |flags: &[&str]| {
            let flags = [&["prune", text(&from), text(&to), "--granularity", "channel"], flags].concat();
            sparse24(flags).refused(1)
        };
        assert!(refused(&["--amount", "1.0"]).contains("all of its 72 channels would go"));
        assert!(refused(&["--amount", "73"]).contains("73 are to be pruned, and there are 72"));
        assert!(refused(&["--amount", "10", "--include", "layer.0"]).contains("one intermediate_size for all"));
        assert!(refused(&["--amount", "40", "--scope", "global"]).contains("one intermediate_size for all"));
        assert!(refused(&["--amount", "1", "--method", "bn-scale"]).contains("there is no batch norm"));
        assert!(!to.exists());
    }

    #[test]
    fn channels_of_bottlenecks_go_by_norms_and_by_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        efficientnet(&from);
        let (checkpoint, source) = (load(&from), Source::open(&from).unwrap());
        let hidden = checkpoint.graph().hidden();
        let scored = |scores: Vec<f32>, of: &sparse24::graph::HiddenChannels| {
            Units::given(of.count, 1, Granularity::Row, scores, None).unwrap()
        };

        let to = dir.path().join("scale");
        let report = dir.path().join("report.json");
        let flags = ["--method", "bn-scale", "--granularity", "channel", "--amount", "9", "--scope", "global"];
        sparse24([&["prune", text(&from), text(&to), "--json", text(&report)], &flags[..]].concat()).fine();
        let units: Vec<_> =
            hidden.iter().map(|of| scored(of.norm_scale(checkpoint.graph(), &source).unwrap(), of)).collect();
        let masks = prune_units(&units, Amount::count(9)).unwrap();
        let expected: Kept = hidden.iter().zip(&masks).map(|(of, mask)| (of.name.clone(), places(mask))).collect();
        assert_eq!(stayed(&from, &to), expected);
        let report = json(&report);
        assert_eq!((&report["schema"], &report["method"]), (&"sparse24-removal/1".into(), &"bn-scale".into()));
        let after = |at: usize| report["channels"][at]["channels_after"].as_u64().unwrap() as usize;
        assert_eq!((after(0), after(1)), (masks[0].count(), masks[1].count()));
        assert_eq!(after(0) + after(1), 15);

        // Two pictures: the images of the twin, through a file.
        let (to, pictures) = (dir.path().join("apoz"), dir.path().join("pictures"));
        fs::create_dir(&pictures).unwrap();
        for (i, pixels) in images().iter().enumerate() {
            let color = |x: u32, y: u32| {
                let [_, r, g, b] = pixels[(17 * y + x) as usize].to_be_bytes();
                image::Rgb([r, g, b])
            };
            image::RgbImage::from_fn(17, 17, color).save(pictures.join(format!("{i}.png"))).unwrap();
        }
        let flags =
            ["--method", "apoz", "--granularity", "channel", "--amount", "0.25", "--calibration", text(&pictures)];
        sparse24([&["prune", text(&from), text(&to), "--device", "cpu"], &flags[..]].concat()).fine();
        let shares = checkpoint.active_shares(&Device::cpu().unwrap(), &images(), Batching::default()).unwrap();
        let expected: Kept = hidden
            .iter()
            .map(|of| {
                let units = scored(shares[&of.name].clone(), of);
                (of.name.clone(), places(&units.mask(Amount::share(0.25).unwrap()).unwrap()))
            })
            .collect();
        assert_eq!(stayed(&from, &to), expected);
        let metadata = TensorFile::open(to.join("model.safetensors")).unwrap().metadata().clone();
        assert!(metadata["sparse24.calibrated_on"].contains("2 images"), "{metadata:?}");

        // Of texts, too; products of gates have no zeros.
        let (bert, llama, texts) = (dir.path().join("bert"), dir.path().join("llama"), dir.path().join("texts.txt"));
        TinyBert::new(5).write(&bert);
        tiny_llama::write("llama", &llama);
        fs::write(&texts, "the cat sat\nthe dog ran on the mat\n").unwrap();
        let flags = ["--device", "cpu", "--method", "apoz", "--granularity", "channel", "--amount", "12"];
        let apoz = |from: &Path, to: &Path| {
            sparse24([&["prune", text(from), text(to), "--calibration", text(&texts)], &flags[..]].concat())
        };
        apoz(&bert, &dir.path().join("bert-apoz")).fine();
        assert_eq!(load(&dir.path().join("bert-apoz")).graph().hidden()[1].count, 60);
        let refused = apoz(&llama, &dir.path().join("no")).refused(1);
        assert!(refused.contains("its channels are products, which have no zeros to be counted"), "{refused}");
    }
}
