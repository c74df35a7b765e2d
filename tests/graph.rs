//! Graphs as data: what is refused, what buffers share, what a pass keeps, and the tools on a model that no file of the
//! crate knows.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;

use ndarray::Array2;
use sparse24::graph::{
    Ablation, Batching, Calibration, CalibrationInputs, ChannelSet, Channels, Checkpoint, Graph, Input, Limits, Model,
    NodeArgs, NodeOp, ParamKind, Precision, Read, ReferenceArgs, Rows, Sparsity, Target, Trainable, TrainingPass,
    ValueId, twin,
};
use sparse24::measure::Policy;
use sparse24::ops::attention::AttentionSpec;
use sparse24::ops::gemm::LinearSpec;
use sparse24::prune::permute::Budget;
use sparse24::{Activation, DType, Device, HostWeights, Matrix, Rotary, Sparse24, VectorLen, prune};

/// Words of the vocabulary, tokens of a text, features, features in between.
const SIZES: (usize, usize, usize, usize) = (11, 6, 8, 12);

/// Two feed-forward blocks with the norm in front and the residual stream around, as decoders have them; causal
/// attention of two heads with one of keys, norms of heads and rotary positions in the first; gated feed-forward parts;
/// a head of its own at the end. Nothing in the crate is made for it.
fn graph() -> Graph {
    let (vocabulary, tokens, d, inner) = SIZES;
    let mut graph = Graph::new(Limits { vocabulary, tokens });
    let mut x = graph.embedding("words", &[("words.weight", vocabulary, Input::Ids)], d).unwrap();
    let normed = graph.layer_norm("attention.norm", x, 1e-5).unwrap();
    let qkv = graph.linear(LinearSpec::new("attention.qkv", normed, 2 * d)).unwrap();
    let tables = graph.rotary_tables("rotary", &Rotary::frequencies(d / 2, 1e4), 1.0).unwrap();
    let qkv = graph.qk_norm("attention.q_norm", "attention.k_norm", qkv, 2, 1, 1e-5).unwrap();
    let qkv = graph.rotary("attention.rotary", qkv, tables, 3 * d / 2).unwrap();
    let attended = graph
        .attention("attention", AttentionSpec { causal: true, kv_heads: 1, ..AttentionSpec::new(qkv, 2) })
        .unwrap();
    x = graph.linear(LinearSpec { residual: Some(x), ..LinearSpec::new("attention.out", attended, d) }).unwrap();
    for i in 0..2 {
        let at = |name: &str| format!("block.{i}.{name}");
        let normed = graph.rms_norm(&at("norm"), x, 1e-5).unwrap();
        // Gate and values are one product, without a bias.
        let up = at("up");
        let both = graph.linear(LinearSpec { bias: false, ..LinearSpec::new(&up, normed, 2 * inner) }).unwrap();
        let h = graph.gated(&at("gate"), both, Activation::Silu).unwrap();
        let down = at("down");
        x = graph.linear(LinearSpec { residual: Some(x), ..LinearSpec::new(&down, h, d) }).unwrap();
        let [up, down] = [&up, &down].map(|name| graph.linear_named(name).unwrap().weights);
        graph
            .add_channels(Channels {
                name: at("up"),
                count: inner,
                width: inner,
                blocks_move: false,
                sets: vec![ChannelSet { rows: vec![(up, 0), (up, inner)], columns: vec![down] }],
            })
            .unwrap();
    }
    let pooled = graph.mean_pooling("pooled", x, false).unwrap();
    let head = graph.linear(LinearSpec::new("head", pooled, 5)).unwrap();
    graph.add_output(head);
    graph
}

fn checkpoint() -> Checkpoint {
    let mut checkpoint = Checkpoint::random(graph(), DType::F32, 24).unwrap();
    // Weights large enough for layers to matter.
    for (name, w) in checkpoint.linears().map(|(name, w)| (name, w.clone())).collect::<Vec<_>>() {
        let w = w.to_dense().unwrap().to_array().mapv(|x| 20.0 * x);
        checkpoint.set_linear(&name, Matrix::from_array(w.view()).into()).unwrap();
    }
    checkpoint
}

fn texts() -> Vec<Vec<u32>> {
    (0..9).map(|text| (0..1 + text % 6).map(|token| ((3 * text + 2 * token) % 11) as u32).collect()).collect()
}

fn value(graph: &Graph, name: &str) -> ValueId {
    graph.value_named(name).unwrap()
}

/// The largest distance of a value on the CPU from the twin's, over the tokens or texts that there are.
fn distance(checkpoint: &Checkpoint, name: &str) -> f64 {
    let (texts, device) = (texts(), Device::cpu().unwrap());
    let id = value(checkpoint.graph(), name);
    let expected = twin::values(checkpoint, &[id], &texts).unwrap().remove(0);
    let model = Model::new(&device, checkpoint).unwrap();
    let forward = model.tapped(&[id], texts.len(), 6).unwrap();
    forward.run_on(&texts).unwrap();
    let got = device.read(forward.tap(id).unwrap()).unwrap();
    let rows: Vec<usize> = if got.rows() == texts.len() {
        (0..texts.len()).collect()
    } else {
        texts.iter().enumerate().flat_map(|(i, text)| (0..text.len()).map(move |token| 6 * i + token)).collect()
    };
    let off = |(at, &row): (usize, &usize)| {
        (0..got.cols()).map(|col| (f64::from(got.get(row, col)) - expected[(at, col)]).abs()).fold(0.0, f64::max)
    };
    rows.iter().enumerate().map(off).fold(0.0, f64::max)
}

#[test]
fn every_value_can_be_tapped_and_is_the_twins() {
    let checkpoint = checkpoint();
    for (_, value) in checkpoint.graph().values() {
        let off = distance(&checkpoint, &value.name);
        assert!(off < 1e-5, "{}: {off:.2e}", value.name);
    }
}

/// A value may have the buffer of another that nobody reads any more, and never that of one that is read later.
#[test]
fn buffers_are_reused_by_liveness() {
    let checkpoint = checkpoint();
    let graph = checkpoint.graph();
    let model = Model::new(&Device::cpu().unwrap(), &checkpoint).unwrap();
    let forward = model.forward(2, 6).unwrap();
    let kept: Vec<_> = graph.values().filter(|(id, _)| forward.tap(*id).is_some()).collect();
    // A buffer keeps the last of its values. Of eight features three are needed at once: the residual, what attention
    // computes, and their sum; of Q, K and V two, before and after they are normalised, and then turned; of every other
    // shape one.
    assert_eq!((kept.len(), graph.values().len()), (9, 17), "{kept:?}");
    assert!(kept.iter().any(|(_, value)| value.name == "head"));
    // Taps cost a buffer each.
    let all: Vec<_> = graph.values().map(|(id, _)| id).collect();
    let tapped = model.tapped(&all, 2, 6).unwrap();
    assert!(all.iter().all(|id| tapped.tap(*id).is_some()));
    // With and without them the output is the same.
    let texts = [vec![1, 2, 3, 4, 5, 6], vec![7]];
    assert_eq!(forward.run_on(&texts).unwrap(), tapped.run_on(&texts).unwrap());
}

/// What a backward pass needs: a node reads values of nodes before it, so that from the end every reader of a value
/// comes before the node that makes it.
#[test]
fn nodes_read_what_is_before_them() {
    let mut graph = graph();
    let readers = |graph: &Graph, name: &str| -> Vec<String> {
        graph.readers(value(graph, name)).map(|node| node.name.clone()).collect()
    };
    assert_eq!(readers(&graph, "words"), ["attention.norm", "attention.out"]);
    assert_eq!(readers(&graph, "head"), Vec::<String>::new());
    // A value of a graph that goes on.
    let mut longer = graph.clone();
    let later = longer.mean_pooling("again", value(&longer, "words"), true).unwrap();
    let shape = (Rows::Sequences, 5, Precision::F32);
    let error = graph.add_node("other", Sum, vec![Read::Value(later)], shape).unwrap_err().to_string();
    assert_eq!(error, "other reads what the graph does not have before it");
    let weights = graph.linear_named("head").unwrap().weights;
    let x = value(&graph, "pooled");
    let error = graph.add_node("other", Sum, vec![Read::Value(x), Read::Param(weights)], shape);
    assert_eq!(
        error.unwrap_err().to_string(),
        "other cannot read head.weight: a node may read one weights parameter, and no other node may read the same one"
    );
}

/// An operation of a test's own.
#[derive(Debug)]
struct Sum;

impl NodeOp for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn prepare(&self, _: &NodeArgs<'_>) -> sparse24::Result<sparse24::Prepared> {
        Err(sparse24::Error::invalid("is never prepared"))
    }

    fn exact(&self, args: &ReferenceArgs<'_>) -> sparse24::Result<Array2<f64>> {
        Ok(args.matrix(0)?.clone())
    }
}

#[test]
fn inputs_are_those_of_the_texts() {
    let write = |input: Input, ids: &[u32], len: usize| {
        let mut to = vec![99; len];
        // As a table of as many rows would be read.
        let mut graph = Graph::new(Limits { vocabulary: 100, tokens: 10 });
        let table = graph.embedding("t", &[("t.weight", 100, input)], 1).unwrap();
        graph.add_output(table);
        let mut checkpoint = Checkpoint::random(graph, DType::F32, 1).unwrap();
        let rows: Vec<f32> = (0..100).map(|row| row as f32).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let matrix = Matrix::from_f32(100, 1, &rows).unwrap();
        sparse24::io::save(&path, &[("t.weight", sparse24::io::Entry::Matrix(&matrix))]).unwrap();
        checkpoint = Checkpoint::load((**checkpoint.graph()).clone(), &path, None, DType::F32).unwrap();
        let forward = Model::new(&Device::cpu().unwrap(), &checkpoint).unwrap().forward(1, len).unwrap();
        let got = forward.run_on(&[ids]).unwrap();
        to.iter_mut().enumerate().for_each(|(at, to)| *to = got.get(at, 0) as u32);
        to
    };
    assert_eq!(write(Input::Ids, &[5, 7], 4), [5, 7, 0, 0]);
    assert_eq!(write(Input::Constant(3), &[5, 7], 3), [3, 3, 3]);
    assert_eq!(write(Input::Positions { first: 0, padding_idx: None }, &[5, 7], 3), [0, 1, 2]);
    // An id that does not count, within a text.
    assert_eq!(write(Input::Positions { first: 2, padding_idx: Some(1) }, &[5, 1, 7, 8], 5), [2, 1, 3, 4, 5]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut graph = graph();
    let message = |e: sparse24::Result<ValueId>| e.unwrap_err().to_string();
    let x = value(&graph, "words");
    assert_eq!(message(graph.layer_norm("attention.norm", x, 1e-5)), "there are two parameters attention.norm.weight");
    assert_eq!(message(graph.mean_pooling("pooled", x, true)), "there are two nodes pooled");
    let head = graph.linear_named("head").unwrap().weights;
    let count = |count, width| {
        let sets = vec![ChannelSet { rows: vec![(head, 0)], columns: Vec::new() }];
        Channels { name: "some".into(), count, width, blocks_move: false, sets }
    };
    assert_eq!(
        graph.add_channels(count(6, 6)).unwrap_err().to_string(),
        "some: head.weight does not have 6 channels there"
    );
    assert_eq!(
        graph.add_channels(count(5, 2)).unwrap_err().to_string(),
        "some: 5 channels cannot be divided into blocks of 2"
    );
    let twice = ChannelSet { rows: vec![(head, 0), (head, 1)], columns: Vec::new() };
    let overlap = Channels { sets: vec![twice], ..count(4, 4) };
    assert_eq!(graph.add_channels(overlap).unwrap_err().to_string(), "some: a place is named twice");
    let known = Channels { name: "block.0.up".into(), ..count(5, 5) };
    assert_eq!(graph.add_channels(known).unwrap_err().to_string(), "the channels block.0.up are declared twice");
    let bias = graph.linear_named("head").unwrap().bias.unwrap();
    let sets = vec![ChannelSet { rows: vec![(bias, 0)], columns: Vec::new() }];
    let error = graph.add_channels(Channels { sets, ..count(1, 1) }).unwrap_err().to_string();
    assert_eq!(error, "some: head.bias does not have 1 channels there");
    let empty = Checkpoint::random(Graph::new(graph.limits()), DType::F32, 1).unwrap();
    let error = Model::new(&Device::cpu().unwrap(), &empty).unwrap().forward(1, 1).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "a pass needs a node");
    let twice = graph.add_param("head.weight".into(), ParamKind::Matrix(Precision::Model), (1, 1)).unwrap_err();
    assert_eq!(twice.to_string(), "there are two parameters head.weight");
    assert!(matches!(graph.nodes()[1].reads[0], Read::Value(of) if of == x));
    let none = graph.linear_named("words").unwrap_err().to_string();
    assert_eq!(none, "there is no linear layer \"words\"");
}

/// Statistics are those of the twin's values, whatever the model's shape.
#[test]
fn calibration_sees_the_inputs_of_every_layer() {
    let checkpoint = checkpoint();
    let texts = texts();
    for batch in [1, 4] {
        let how = Calibration {
            batching: Batching { texts: batch, ..Batching::default() },
            gram: true,
            inputs: CalibrationInputs::Dense,
        };
        let mut names = Vec::new();
        let visit = &mut |name: &str, _: &HostWeights, statistics: &prune::Statistics| {
            let x = checkpoint.graph().linear_named(name)?.x;
            let values = twin::values(&checkpoint, &[x], &texts)?.remove(0);
            let expected: Array2<f64> = values.t().dot(&values);
            let got = statistics.gram().unwrap();
            let scale = expected.diag().iter().fold(0f64, |m, x| m.max(*x));
            let off = (got.to_owned() - &expected).iter().fold(0f64, |m, x| m.max(x.abs()));
            assert!(off < 1e-4 * scale, "{name}: {off:.2e} of {scale:.2e}");
            assert_eq!(statistics.tokens() as usize, values.nrows(), "{name}");
            names.push(name.to_owned());
            Ok(None)
        };
        checkpoint.clone().calibrate(&Device::cpu().unwrap(), &texts, how, visit).unwrap();
        assert!(names.iter().map(String::as_str).eq(checkpoint.graph().linears().map(|layer| layer.name)));
    }
}

#[test]
fn ablation_permutation_and_times_take_any_graph() {
    let checkpoint = checkpoint();
    let (texts, device) = (texts(), Device::cpu().unwrap());
    let batching = Batching { texts: 4, tokens: 16 };
    let mut ablation = Ablation::new(&device, &checkpoint, &texts, batching).unwrap();
    for (name, w) in checkpoint.linears() {
        let w = w.to_dense().unwrap();
        let pruned = HostWeights::from(prune::sparsify(&w, VectorLen::ONE).unwrap());
        let mut changed = checkpoint.clone();
        changed.set_linear(&name, pruned.clone()).unwrap();
        let output = checkpoint.graph().outputs()[0];
        let expected = twin::values(&changed, &[output], &texts).unwrap().remove(0);
        let mut seen = 0;
        ablation
            .run(&name, pruned, &mut |of, _, got| {
                for (row, &text) in of.iter().enumerate() {
                    seen += 1;
                    let off = (0..5).map(|c| (f64::from(got.get(row, c)) - expected[(text, c)]).abs());
                    assert!(off.fold(0.0, f64::max) < 1e-5, "{name}, text {text}");
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, texts.len(), "{name}");
    }

    let mut permuted = checkpoint.clone();
    let vector = VectorLen::new(2).unwrap();
    let found = permuted.permute(vector, &Budget::sweeps(6), |_, w| Ok(w.to_array().mapv(f32::abs))).unwrap();
    assert_eq!(found.iter().map(|of| &*of.channels).collect::<Vec<_>>(), ["block.0.up", "block.1.up"]);
    assert!(found.iter().all(|of| of.kept.len() == 2));
    let of =
        |checkpoint: &Checkpoint| twin::values(checkpoint, checkpoint.graph().outputs(), &texts).unwrap().remove(0);
    assert!((of(&permuted) - of(&checkpoint)).iter().all(|x| x.abs() < 1e-12));

    let times = checkpoint.times(&device, 2, 6, &[VectorLen::ONE], &Policy::QUICK).unwrap();
    for (name, _) in checkpoint.linears() {
        assert!(times.of(&name, None) > Some(0.0) && times.of(&name, Some(VectorLen::ONE)) > Some(0.0), "{name}");
    }
    // Layers whose names differ in numbers alone were timed together.
    assert_eq!(times.of("block.0.up", None), times.of("block.1.up", None));

    let mut pruned = checkpoint.clone();
    pruned.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
    let sparse: Vec<Sparse24> = pruned
        .linears()
        .filter_map(|(_, w)| match w {
            HostWeights::Sparse24(w) => Some(w.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(sparse.len(), 7);
}

/// Through every operation the loss changes along a direction in each layer's weights as the gradient of the backward
/// pass says: rotary positions, gates, grouped and causal attention, norms of tokens and of heads, pooling.
#[test]
fn gradients_are_the_limit_of_differences() {
    let (device, checkpoint, texts) = (Device::cpu().unwrap(), checkpoint(), texts());
    let graph = checkpoint.graph();
    let head = *graph.outputs().last().unwrap();
    let along = Matrix::uniform(texts.len(), 5, DType::F32, 3).unwrap();
    let loss = |checkpoint: &Checkpoint| -> f64 {
        let y = twin::values(checkpoint, &[head], &texts).unwrap().remove(0);
        y.indexed_iter().map(|((r, c), y)| y * f64::from(along.get(r, c))).sum()
    };
    let trainable = Arc::new(Trainable::new(&device, &checkpoint, &graph.trained_params()).unwrap());
    let (nodes, targets) = (0..graph.nodes().len(), [Target::Given(head)]);
    let pass = TrainingPass::new(&trainable, nodes, (texts.len(), 6), &targets, u64::MAX).unwrap();
    pass.write(&texts).unwrap();
    pass.forward().unwrap();
    device.write(pass.gradient(head).unwrap(), &along).unwrap();
    pass.backward().unwrap();
    for layer in graph.linears() {
        let w = checkpoint.linear(layer.name).unwrap().to_dense().unwrap();
        let direction = Matrix::uniform(w.rows(), w.cols(), DType::F32, 5).unwrap();
        let by = 2f32.powi(-11);
        let moved = |by: f32| {
            let numbers = w.elements().to_f32().into_iter().zip(direction.elements().to_f32());
            let moved: Vec<f32> = numbers.map(|(w, d)| w + by * d).collect();
            let mut checkpoint = checkpoint.clone();
            let moved = Matrix::from_f32(w.rows(), w.cols(), &moved).unwrap();
            checkpoint.set_linear(layer.name, moved.into()).unwrap();
            loss(&checkpoint)
        };
        let difference = (moved(by) - moved(-by)) / f64::from(2.0 * by);
        let (_, _, gradient) = trainable.trained().find(|(param, ..)| *param == layer.weights).unwrap();
        let gradient = device.read(gradient).unwrap();
        let terms = gradient.elements().to_f32().into_iter().zip(direction.elements().to_f32());
        let terms: Vec<f64> = terms.map(|(g, d)| f64::from(g) * f64::from(d)).collect();
        let (slope, size) = (terms.iter().sum::<f64>(), terms.iter().map(|t| t * t).sum::<f64>().sqrt());
        assert!((slope - difference).abs() <= 5e-3 * size, "{}: {slope}, not {difference}", layer.name);
    }
}
