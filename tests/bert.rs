//! BERT on a device against its f64 twin, on a small model that the test makes; and what is refused.
//!
//! Tests that need a GPU are ignored unless asked for. Real weights are in tests/minilm.rs.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::path::Path;
use std::sync::Arc;

use common::{allocated, callers_device, gpu, seed, submissions};
use serde_json::json;
use sparse24::graph::{Batching, Checkpoint, Limits, Model, Sparsity, batches};
use sparse24::io::{Entry, save};
use sparse24::models::bert::BertConfig;
use sparse24::text::{Encoder, Files, Pipeline, Tokenizer, twin};
use sparse24::{DType, Device, HostWeights, Mask, Matrix, Op, Sparse24, TensorFile, VectorLen, models, prune};
use tempfile::TempDir;
use tiny_bert::{TinyBert, WORDS};

/// How far a hidden state or an element of an embedding may be from the twin's. Hidden states leave LayerNorm with
/// elements about 1; errors of a few units in the last place of their type come together over two layers. One flipped
/// weight moves them by far more: see [`one_wrong_weight_shows`].
fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        _ => 2e-2,
    }
}

fn load(folder: &Path, dtype: DType) -> sparse24::Result<Checkpoint> {
    let files = Files::in_folder(folder);
    Checkpoint::load(models::load(&files.config)?, &files.weights, None, dtype)
}

/// The embeddings of the f64 twin.
fn embeddings_of(checkpoint: &Checkpoint, texts: &[Vec<u32>]) -> ndarray::Array2<f64> {
    twin::embeddings(checkpoint, &Pipeline::default(), texts).unwrap()
}

fn encoder(device: &Device, checkpoint: &Checkpoint) -> Encoder {
    Encoder::new(device, checkpoint, Pipeline::default()).unwrap()
}

/// The checkpoint of a small model.
fn tiny(dtype: DType, seed: u64) -> Checkpoint {
    let dir = TempDir::new().unwrap();
    TinyBert::new(seed).write(dir.path());
    load(dir.path(), dtype).unwrap()
}

/// Texts of unequal lengths: one token, the whole of the positions, and between.
fn texts() -> Vec<Vec<u32>> {
    [1, 24, 7, 8, 9, 16].iter().map(|&n| (0..n).map(|i| (i * 5 + n) % WORDS.len() as u32).collect()).collect()
}

/// The largest distance of hidden states and embeddings on the device from the twin's of `told`.
fn distance(device: &Device, checkpoint: &Checkpoint, told: &Checkpoint) -> f64 {
    let texts = texts();
    let model = encoder(device, checkpoint);
    let states = twin::hidden_states(told, &texts).unwrap();
    let expected = embeddings_of(told, &texts);
    // NaN would vanish in a maximum.
    let off = |got: f32, expected: f64| {
        let off = (f64::from(got) - expected).abs();
        if off.is_nan() { f64::INFINITY } else { off }
    };
    // In one batch, whose hidden states can be read.
    let forward = model.forward(texts.len(), 24).unwrap();
    let one_batch = model.embed_batch(&forward, &texts).unwrap();
    let hidden = device.read(forward.tap(forward.graph().outputs()[0]).unwrap()).unwrap();
    // In several, by length.
    let by_length = model.embed(&texts, Batching { texts: 2, tokens: 40 }).unwrap();
    let (mut worst, mut state) = (0f64, 0);
    for (row, text) in texts.iter().enumerate() {
        for token in 0..text.len() {
            for col in 0..hidden.cols() {
                worst = worst.max(off(hidden.get(row * 24 + token, col), states[(state, col)]));
            }
            state += 1;
        }
        for col in 0..hidden.cols() {
            worst = worst.max(off(one_batch.get(row, col), expected[(row, col)]));
            worst = worst.max(off(by_length.get(row, col), expected[(row, col)]));
        }
    }
    worst
}

/// Layers of every form: as they are, all 2:4 at several vector lengths, all masked, and one of each.
fn forms(dense: &Checkpoint) -> Vec<(String, Checkpoint)> {
    let mut forms = vec![("dense".to_owned(), dense.clone())];
    for v in [1, 4, 32, 128] {
        let mut pruned = dense.clone();
        pruned.prune(Sparsity::TwoFour(VectorLen::new(v).unwrap())).unwrap();
        forms.push((format!("V = {v}"), pruned));
    }
    let mut masked = dense.clone();
    masked.mask(VectorLen::ONE).unwrap();
    forms.push(("masked".to_owned(), masked));

    let mut mixed = dense.clone();
    let linears: Vec<_> = dense.linears().map(|(name, w)| (name, w.clone())).collect();
    for (i, (name, w)) in linears.into_iter().enumerate() {
        let HostWeights::Dense(w) = w else { panic!("{name} is not dense") };
        let weights = match i % 4 {
            0 => HostWeights::Dense(w),
            1 => HostWeights::Masked(w.clone(), Mask::from_fn(w.rows(), w.cols(), |r, c| (r + c) % 3 > 0).unwrap()),
            2 => Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::new(8).unwrap()).unwrap()).unwrap().into(),
            _ => Sparse24::compress(&w, &prune::random(w.rows(), w.cols(), VectorLen::ONE, 7).unwrap()).unwrap().into(),
        };
        mixed.set_linear(&name, weights).unwrap();
    }
    forms.push(("mixed".to_owned(), mixed));
    forms
}

fn agrees_with_the_twin(device: &Device, dtype: DType) {
    for (form, checkpoint) in forms(&tiny(dtype, seed())) {
        let off = distance(device, &checkpoint, &checkpoint);
        assert!(off <= allowed(dtype), "{form}, {dtype}, {}: {off:.2e} off", device.info().name());
    }
}

#[test]
fn the_cpu_agrees_with_the_twin_in_every_form() {
    let device = Device::cpu().unwrap();
    agrees_with_the_twin(&device, DType::F32);
    agrees_with_the_twin(&device, DType::F16);
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_agrees_with_the_twin_in_every_form() {
    let Some(device) = gpu() else { return };
    agrees_with_the_twin(&device, DType::F32);
    if device.caps().unwrap().f16 {
        agrees_with_the_twin(&device, DType::F16);
    }
}

/// The comparison itself: one weight of any linear layer with its sign flipped moves something by more than is allowed.
#[test]
fn one_wrong_weight_shows() {
    let device = Device::cpu().unwrap();
    for dtype in [DType::F32, DType::F16] {
        let right = tiny(dtype, 1);
        for (name, w) in right.linears() {
            let HostWeights::Dense(w) = w else { panic!("{name} is not dense") };
            let mut numbers = w.elements().to_f32();
            // The largest one: a small one may be worth less than f16's round-off.
            let largest = (0..numbers.len()).max_by(|&a, &b| numbers[a].abs().total_cmp(&numbers[b].abs())).unwrap();
            numbers[largest] *= -1.0;
            let mut wrong = right.clone();
            wrong.set_linear(&name, Matrix::from_f32(w.rows(), w.cols(), &numbers).unwrap().into()).unwrap();
            let off = distance(&device, &wrong, &right);
            assert!(off > 2.0 * allowed(dtype), "{name}, {dtype}: {off:.2e}");
        }
    }
}

/// The same calls with dense weights in place of 2:4 ones, where the planner wants that, and without.
#[test]
fn a_model_without_dense_fallback_uses_the_weights_that_it_was_given() {
    let device = Device::cpu().unwrap();
    let mut checkpoint = tiny(DType::F32, 2);
    checkpoint.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
    let model = encoder(&device, &checkpoint);
    let own = model.no_dense_fallback();
    let plans = own.model().plans(4, 16).unwrap();
    assert_eq!(plans.len(), 8);
    assert!(plans.iter().all(|(op, plan)| *op == Op::Sparse24(VectorLen::ONE) && plan.weights() == *op));
    let (texts, batching) = (texts(), Batching::default());
    let (a, b) = (model.embed(&texts, batching).unwrap(), own.embed(&texts, batching).unwrap());
    let off = a.elements().to_f32().iter().zip(b.elements().to_f32()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-6, "{off}");
}

/// A forward pass is one submission, and once it has run, another batch of its shape allocates nothing.
#[test]
#[ignore = "needs a GPU"]
fn a_steady_state_allocates_nothing_and_submits_once() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue.clone()).unwrap();
    let mut checkpoint = tiny(DType::F32, 3);
    checkpoint.prune(Sparsity::TwoFour(VectorLen::new(8).unwrap())).unwrap();
    let model = encoder(&device, &checkpoint);
    let (first, second) = (vec![vec![1u32; 9], vec![2; 16]], vec![vec![5u32; 16], vec![6; 3]]);
    let embeddings = model.embed_batch(&model.forward(2, 16).unwrap(), &first).unwrap();

    let forward = model.forward(2, 16).unwrap();
    let before = allocated(&wgpu_device);
    assert!(before.iter().any(|&n| n > 10), "the counters do not count: {before:?}");
    let start = submissions(&queue);
    forward.write(&second).unwrap();
    forward.run().unwrap();
    // The empty submission that reads the number counts, too.
    assert_eq!(submissions(&queue) - start, 2);
    device.wait().unwrap();
    for _ in 0..5 {
        assert_eq!(model.embed(&first, Batching::default()).unwrap(), embeddings);
        let other = model.embed_batch(&model.forward(2, 16).unwrap(), &second).unwrap();
        assert_ne!(other, embeddings);
    }
    assert_eq!(allocated(&wgpu_device), before);
}

#[test]
fn the_calls_of_a_pass_are_told_apart() {
    let model = encoder(&Device::cpu().unwrap(), &tiny(DType::F32, 4));
    let forward = model.forward(3, 5).unwrap();
    let count = |op| forward.calls().filter(|(node, _)| node.op.name() == op).count();
    // Two layers of four GEMMs, one attention, two norms; embeddings and their norm before, pooling after.
    assert_eq!(["gemm", "attention", "layer_norm", "embedding", "mean_pooling"].map(count), [8, 2, 5, 1, 1]);
    let hidden = forward.tap(forward.graph().outputs()[0]).unwrap();
    assert_eq!((forward.batch(), forward.seq(), forward.output().rows(), hidden.rows()), (3, 5, 3, 15));
}

#[test]
fn inputs_that_are_no_texts_of_the_model_are_named() {
    let model = encoder(&Device::cpu().unwrap(), &tiny(DType::F32, 5));
    let embed =
        |texts: &[Vec<u32>]| model.embed(texts, Batching::default()).map(|e| e.rows()).map_err(|e| e.to_string());
    assert_eq!(embed(&[]), Ok(0));
    assert_eq!(embed(&[vec![1], vec![]]), Err("text 1: the text has 0 tokens; the model takes 1 to 24".into()));
    assert_eq!(embed(&[vec![1; 25]]), Err("text 0: the text has 25 tokens; the model takes 1 to 24".into()));
    assert_eq!(embed(&[vec![1, 14]]), Err("text 0: token id 14 is outside of the vocabulary of 14".into()));
    let forward = |batch, seq| model.forward(batch, seq).map(|_| ()).map_err(|e| e.to_string());
    let bad =
        |b, s| Err(format!("a batch of {b} texts of {s} tokens; at least one text is needed, and 1 to 24 tokens"));
    assert_eq!((forward(0, 4), forward(1, 0), forward(1, 25)), (bad(0, 4), bad(1, 0), bad(1, 25)));
    let write = |texts: &[Vec<u32>]| model.forward(2, 4).unwrap().write(texts).map_err(|e| e.to_string());
    assert_eq!(write(&[vec![1]]), Err("1 texts for a batch of 2".into()));
    assert_eq!(write(&[vec![1], vec![1; 5]]), Err("text 1: the text has 5 tokens; the batch has room for 4".into()));
    assert_eq!(write(&[vec![14], vec![1]]), Err("text 0: token id 14 is outside of the vocabulary of 14".into()));
    assert_eq!(write(&[vec![1], vec![1; 4]]), Ok(()));
}

/// f16 weights near the largest number make sums that f16 cannot hold; finite states whose squares f32 cannot hold must
/// not come out of a norm as finite numbers.
#[test]
fn activations_that_overflow_are_named_and_not_returned() {
    overflow_is_named(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn activations_that_overflow_are_named_and_not_returned_on_a_gpu() {
    gpu().iter().for_each(overflow_is_named);
}

fn overflow_is_named(device: &Device) {
    let dir = TempDir::new().unwrap();
    let mut tiny = TinyBert::new(6);
    tiny.tensors.get_mut("encoder.layer.0.intermediate.dense.weight").unwrap().1.fill(6e4);
    tiny.tensors.get_mut("encoder.layer.0.output.dense.weight").unwrap().1.fill(6e4);
    tiny.write(dir.path());
    let error = |dtype| {
        let model = encoder(device, &load(dir.path(), dtype).unwrap());
        model.embed(&[vec![6], vec![5, 6, 7]], Batching::default()).unwrap_err().to_string()
    };
    if device.caps().is_none_or(|caps| caps.f16) {
        // The longest goes first.
        assert_eq!(error(DType::F16), "text 1: activations are not finite in f16");
    }
    for name in ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"] {
        let mut tiny = TinyBert::new(6);
        tiny.tensors.get_mut(name).unwrap().1.iter_mut().for_each(|x| *x *= 1e20);
        tiny.write(dir.path());
        assert_eq!(error(DType::F32), "text 1: activations are not finite in f32", "{name}");
    }
    // And the last norm's results, whose mean is too long.
    let mut tiny = TinyBert::new(6);
    tiny.tensors.get_mut("encoder.layer.1.output.LayerNorm.weight").unwrap().1.fill(1e20);
    tiny.write(dir.path());
    assert_eq!(error(DType::F32), "text 1: activations are not finite in f32");
}

/// More shapes than are kept, by several threads: the results are those of a model that has seen one, shapes that fit
/// are kept, and those used longest ago give way.
#[test]
fn shapes_are_kept_up_to_a_number_of_tokens() {
    let (device, checkpoint) = (Device::cpu().unwrap(), tiny(DType::F32, 11));
    let model = encoder(&device, &checkpoint);
    let texts_of = |batch: usize, seq: usize| -> Vec<Vec<u32>> {
        (0..batch).map(|i| (0..seq).map(|j| ((3 * i + j) % WORDS.len()) as u32).collect()).collect()
    };
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (model, device, checkpoint, texts_of) = (&model, &device, &checkpoint, &texts_of);
            scope.spawn(move || {
                // In opposite orders, twice.
                for i in 0..48 {
                    let seq = if thread == 0 { 1 + i % 24 } else { 24 - i % 24 };
                    let texts = texts_of(3, seq);
                    let expected = embeddings_of(checkpoint, &texts);
                    let got = model.embed_batch(&model.forward(3, seq).unwrap(), &texts).unwrap();
                    let off = got.elements().to_f32().into_iter().zip(&expected);
                    let off = off.map(|(got, e)| (f64::from(got) - e).abs()).fold(0.0, f64::max);
                    assert!(off < 1e-5, "{seq} tokens on {}: {off}", device.info().name());
                }
            });
        }
    });
    // All 24 fit.
    let first = Arc::downgrade(&model.forward(3, 1).unwrap());
    for seq in 2..=24 {
        model.forward(3, seq).unwrap();
    }
    assert!(first.upgrade().is_some_and(|first| Arc::ptr_eq(&first, &model.forward(3, 1).unwrap())));

    // 3 x 300 tokens have gone before; 3 x 2 was used longest ago, and 3 x 1 last.
    let (second, third) =
        (Arc::downgrade(&model.forward(3, 2).unwrap()), Arc::downgrade(&model.forward(3, 3).unwrap()));
    model.forward(3, 1).unwrap();
    for seq in 4..=24 {
        model.forward(3, seq).unwrap();
    }
    let room = Model::KEPT_TOKENS - 900;
    assert!(model.forward(0, 24).is_err() && model.forward(1, 25).is_err());
    model.forward(room, 1).unwrap();
    assert!([&first, &second, &third].iter().all(|shape| shape.upgrade().is_some()), "all of it fits");
    model.forward(6, 1).unwrap();
    assert!(second.upgrade().is_none(), "one has to go");
    assert!([&first, &third].iter().all(|shape| shape.upgrade().is_some()), "one is enough");
    // More than is kept: alone, until another comes.
    let whole = Arc::downgrade(&model.forward(Model::KEPT_TOKENS / 24 + 1, 24).unwrap());
    assert!(first.upgrade().is_none() && whole.upgrade().is_some());
    model.forward(1, 1).unwrap();
    assert!(whole.upgrade().is_none());
}

#[test]
fn texts_are_batched_by_length_each_once() {
    let lengths = [5, 24, 1, 9, 9, 8, 17];
    let plan = batches(&lengths, 24, Batching { texts: 3, tokens: 48 });
    // 24 and 17 fill 48 tokens; 9, 9 and 8 are padded to 16; the rest to 8.
    let shapes: Vec<_> = plan.iter().map(|b| (b.texts.clone(), b.seq)).collect();
    assert_eq!(shapes, [(vec![1, 6], 24), (vec![3, 4, 5], 16), (vec![0, 2], 8)]);
    // A text longer than the budget goes alone, and steps do not go beyond the positions.
    let plan = batches(&[22, 22], 22, Batching { texts: 3, tokens: 10 });
    assert_eq!(plan.iter().map(|b| (b.texts.len(), b.seq)).collect::<Vec<_>>(), [(1, 22), (1, 22)]);
    // Few lengths, none far from the texts'.
    let mut all = std::collections::BTreeSet::new();
    for tokens in 1..=512 {
        let seq = batches(&[tokens], 512, Batching::default())[0].seq;
        assert!(seq >= tokens && (seq < tokens + 8 || 8 * seq <= 9 * tokens), "{tokens} to {seq}");
        all.insert(seq);
    }
    assert_eq!((all.len(), all.last()), (32, Some(&512)));
}

#[test]
fn names_and_types_of_other_checkpoints_load_alike() {
    let dir = TempDir::new().unwrap();
    let tiny = TinyBert::new(7);
    tiny.write(dir.path());
    let weights =
        |checkpoint: &Checkpoint| -> Vec<HostWeights> { checkpoint.linears().map(|(_, w)| w.clone()).collect() };
    let texts = texts();
    let embeddings = |checkpoint: &Checkpoint| embeddings_of(checkpoint, &texts);
    let plain = load(dir.path(), DType::F32).unwrap();
    assert_eq!(plain.linears().next().unwrap().0, "encoder.layer.0.attention.self.qkv");
    assert_eq!((weights(&plain)[0].m(), weights(&plain)[0].k()), (120, 40));

    // As BERT's own checkpoints have them: a prefix, and LayerNorm's names from TensorFlow.
    let mut prefixed = TinyBert::new(7);
    prefixed.rename(|name| {
        let name = format!("bert.{name}");
        match name.rsplit_once("LayerNorm.") {
            Some((at, "weight")) => format!("{at}LayerNorm.gamma"),
            Some((at, _)) => format!("{at}LayerNorm.beta"),
            None => name,
        }
    });
    prefixed.write(dir.path());
    let loaded = load(dir.path(), DType::F32).unwrap();
    assert_eq!((weights(&loaded), embeddings(&loaded)), (weights(&plain), embeddings(&plain)));

    // Half-precision files hold the rounded numbers.
    for dtype in [DType::F16, DType::Bf16] {
        let half = TinyBert { dtype, ..TinyBert::new(7) };
        half.write(dir.path());
        let mut rounded = TinyBert::new(7);
        for (_, numbers) in rounded.tensors.values_mut() {
            *numbers = Matrix::from_f32(1, numbers.len(), numbers).unwrap().cast(dtype).elements().to_f32();
        }
        let other = TempDir::new().unwrap();
        rounded.write(other.path());
        let (half, rounded) = (load(dir.path(), DType::F32).unwrap(), load(other.path(), DType::F32).unwrap());
        assert_eq!((weights(&half), embeddings(&half)), (weights(&rounded), embeddings(&rounded)), "{dtype}");
    }
}

/// A file with compressed layers is asked first, under names with and without `.weight` and the prefix; what it lacks
/// comes from the folder.
#[test]
fn compressed_layers_come_from_their_own_file() {
    let dir = TempDir::new().unwrap();
    TinyBert::new(8).write(dir.path());
    let files = Files::in_folder(dir.path());
    let graph = models::load(&files.config).unwrap();
    let dense = TensorFile::open(&files.weights).unwrap();
    let compress = |name: &str, v: usize| {
        let w = dense.matrix(name).unwrap();
        Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::new(v).unwrap()).unwrap()).unwrap()
    };
    let part = |layer, part: &str| format!("encoder.layer.{layer}.attention.self.{part}.weight");
    // Layer 0: V = 16, 16 and 32, but 16 rows would cross from Q's 40 into K's: 8 fits all. Layer 1: V is dense, so
    // that the three are.
    let (q, k, v) = (compress(&part(0, "query"), 16), compress(&part(0, "key"), 16), compress(&part(0, "value"), 32));
    let (q1, k1) = (compress(&part(1, "query"), 1), compress(&part(1, "key"), 1));
    let out = compress("encoder.layer.0.output.dense.weight", 2);
    let inner = compress("encoder.layer.1.intermediate.dense.weight", 128);
    let path = dir.path().join("sparse.safetensors");
    let names = [part(0, "query"), part(0, "key"), part(0, "value"), part(1, "query"), part(1, "key")];
    let over = Matrix::from_f32(2, 40, &[0.5; 80]).unwrap();
    let entries = [
        (names[0].as_str(), Entry::Sparse24(&q)),
        (&names[1], Entry::Sparse24(&k)),
        (&names[2], Entry::Sparse24(&v)),
        (&names[3], Entry::Sparse24(&q1)),
        (&names[4], Entry::Sparse24(&k1)),
        ("encoder.layer.0.output.dense", Entry::Sparse24(&out)),
        ("bert.encoder.layer.1.intermediate.dense.weight", Entry::Sparse24(&inner)),
        ("embeddings.token_type_embeddings.weight", Entry::Matrix(&over)),
    ];
    save(&path, &entries).unwrap();

    let loaded = Checkpoint::load(graph.clone(), &files.weights, Some(&path), DType::F32).unwrap();
    let ops: Vec<_> = loaded.linears().map(|(_, w)| w.op()).collect();
    let sparse = |v| Op::Sparse24(VectorLen::new(v).unwrap());
    let expected = [sparse(8), Op::Dense, Op::Dense, sparse(2), Op::Dense, Op::Dense, sparse(128), Op::Dense];
    assert_eq!(ops, expected);

    // The same model, put together by hand.
    let mut by_hand = TinyBert::new(8);
    let mut put = |name: &str, w: &Sparse24| {
        by_hand.tensors.get_mut(name).unwrap().1 = w.decompress().elements().to_f32();
    };
    for (name, w) in names.iter().zip([&q, &k, &v, &q1, &k1]) {
        put(name, w);
    }
    put("encoder.layer.0.output.dense.weight", &out);
    put("encoder.layer.1.intermediate.dense.weight", &inner);
    by_hand.tensors.get_mut("embeddings.token_type_embeddings.weight").unwrap().1.fill(0.5);
    let other = TempDir::new().unwrap();
    by_hand.write(other.path());
    let texts = texts();
    let expected = embeddings_of(&load(other.path(), DType::F32).unwrap(), &texts);
    let got = embeddings_of(&loaded, &texts);
    let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-12, "{off}");
    assert!(distance(&Device::cpu().unwrap(), &loaded, &loaded) < allowed(DType::F32));

    // Pruning leaves compressed layers, and gives the rest what magnitude does to each matrix by itself.
    let mut pruned = loaded.clone();
    pruned.prune(Sparsity::TwoFour(VectorLen::new(8).unwrap())).unwrap();
    assert_eq!(
        pruned.linears().map(|(_, w)| w.op().vector().map(VectorLen::get)).collect::<Vec<_>>(),
        [8, 8, 8, 2, 8, 8, 128, 8].map(Some)
    );
    let HostWeights::Sparse24(w) = pruned.linears().nth(1).unwrap().1 else { panic!("not pruned") };
    assert_eq!(*w, compress("encoder.layer.0.attention.output.dense.weight", 8));

    // A file that has everything needs no other.
    let all: Vec<_> = dense.tensors().map(|t| (t.name.as_str(), Entry::Copy(&dense))).collect();
    let complete = dir.path().join("complete.safetensors");
    save(&complete, &all).unwrap();
    let elsewhere = dir.path().join("nothing");
    assert!(Checkpoint::load(graph.clone(), &elsewhere, Some(&complete), DType::F32).is_ok());
    let error = Checkpoint::load(graph, &elsewhere, Some(&path), DType::F32).unwrap_err().to_string();
    let missing = "tensor embeddings.word_embeddings.weight of shape [14, 40] is missing";
    assert_eq!(error, format!("{}: {missing}, and there is no {}", path.display(), elsewhere.display()));
}

#[test]
fn weights_that_do_not_fit_are_named_with_both_shapes() {
    let dir = TempDir::new().unwrap();
    let refused = |dtype, spoil: &dyn Fn(&mut TinyBert)| {
        let mut tiny = TinyBert::new(9);
        spoil(&mut tiny);
        tiny.write(dir.path());
        let error = load(dir.path(), dtype).unwrap_err().to_string();
        error.strip_prefix(&format!("{}: ", dir.path().join("model.safetensors").display())).unwrap().to_owned()
    };
    let at = "encoder.layer.1.intermediate.dense";
    let weight = &format!("{at}.weight");
    assert_eq!(
        refused(DType::F32, &|t| t.rename(|n| n.replace("1.intermediate", "1.inter"))),
        format!("tensor {weight} of shape [72, 40] is missing")
    );
    assert_eq!(
        refused(DType::F32, &|t| t.tensors.get_mut(weight).unwrap().0.reverse()),
        format!("tensor {weight}: weight has shape [40, 72], expected [72, 40]")
    );
    assert_eq!(
        refused(DType::F32, &|t| t.tensors.get_mut(weight).unwrap().0 = vec![72 * 40]),
        format!("tensor {weight}: weight has shape [2880], expected [72, 40]")
    );
    assert_eq!(
        refused(DType::F32, &|t| t.config["vocab_size"] = json!(20)),
        "tensor embeddings.word_embeddings.weight: weight has shape [14, 40], expected [20, 40]"
    );
    assert_eq!(
        refused(DType::F32, &|t| t.tensors.get_mut(weight).unwrap().1[85] = f32::NAN),
        format!("tensor {weight}: row 2, column 5 is NaN as f32")
    );
    let bias = format!("{at}.bias");
    assert_eq!(
        refused(DType::F32, &|t| *t.first(&bias) = f32::INFINITY),
        format!("tensor {bias}: row 0, column 0 is inf as f32")
    );
    for prefix in ["", "bert."] {
        assert_eq!(
            refused(DType::F32, &|t| {
                t.config["num_hidden_layers"] = json!(1);
                t.rename(|name| format!("{prefix}{name}"));
            }),
            format!(
                "tensor {prefix}encoder.layer.1.attention.output.LayerNorm.bias: \
                 is past the config's num_hidden_layers of 1"
            )
        );
    }
    // Fine in the file, and too large for what is asked for.
    assert_eq!(
        refused(DType::F16, &|t| *t.first(weight) = -1e5),
        format!("tensor {weight}: row 0, column 0 is -inf as f16")
    );

    // Compressed layers too.
    TinyBert::new(9).write(dir.path());
    let files = Files::in_folder(dir.path());
    let graph = models::load(&files.config).unwrap();
    let path = dir.path().join("sparse.safetensors");
    let over = |rows, value| {
        let w = Matrix::from_f32(rows, 40, &[&[value][..], &vec![0.0; rows * 40 - 1]].concat()).unwrap();
        save(&path, &[(weight, Entry::Sparse24(&Sparse24::from_dense(&w, VectorLen::ONE).unwrap()))]).unwrap();
        Checkpoint::load(graph.clone(), &files.weights, Some(&path), DType::F16).unwrap_err().to_string()
    };
    let tensor = format!("{}: tensor {weight}: ", path.display());
    assert_eq!(over(71, 1.0), format!("{tensor}weight has shape [71, 40], expected [72, 40]"));
    assert_eq!(over(72, 1e6), format!("{tensor}row 0, column 0 is inf as f16"));
    assert_eq!(over(72, f32::NAN), format!("{tensor}row 0, column 0 is NaN as f16"));
    let bf16 = Checkpoint::load(graph.clone(), &files.weights, None, DType::Bf16).unwrap_err();
    assert_eq!(bf16.to_string(), "activations is bf16, expected f32");
}

#[test]
fn layers_take_weights_of_their_shape_only() {
    let mut checkpoint = tiny(DType::F32, 10);
    let name = "encoder.layer.1.output.dense";
    let mut set = |name: &str, weights: HostWeights| checkpoint.set_linear(name, weights).map_err(|e| e.to_string());
    let w = Matrix::zeros(40, 72, DType::Bf16).unwrap();
    assert_eq!(set(name, w.clone().into()), Ok(()));
    assert_eq!(set("output.dense", w.clone().into()), Err("there is no linear layer \"output.dense\"".into()));
    let other = Matrix::zeros(72, 40, DType::F32).unwrap();
    assert_eq!(set(name, other.into()), Err(format!("{name} has shape [72, 40], expected [40, 72]")));
    let mask = Mask::from_fn(40, 71, |_, _| true).unwrap();
    let masked = HostWeights::Masked(w, mask);
    assert_eq!(set(name, masked), Err(format!("mask of {name} has shape [40, 71], expected [40, 72]")));
    let nan = Matrix::from_f32(40, 72, &[f32::NAN; 40 * 72]).unwrap();
    assert_eq!(set(name, nan.into()), Err(format!("{name}: row 0, column 0 is NaN as f32")));
}

#[test]
fn configs_that_are_none_are_refused_by_field() {
    let parse = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut config = TinyBert::new(0).config;
        change(&mut config);
        BertConfig::parse(&config.to_string()).map_err(|e| e.to_string())
    };
    let fine = parse(&|_| {}).unwrap();
    let sizes = fine.sizes();
    assert_eq!((sizes.hidden, sizes.heads, sizes.layers, sizes.positions, fine.eps()), (40, 5, 2, 24, 1e-12));
    assert_eq!(fine.graph().unwrap().linear_weights(), 2 * (4 * 1600 + 2 * 40 * 72));
    // What older files lack.
    let old = parse(&|c| {
        let fields = c.as_object_mut().unwrap();
        for field in ["model_type", "position_embedding_type", "type_vocab_size", "layer_norm_eps", "hidden_act"] {
            fields.remove(field);
        }
    });
    assert_eq!(old, Ok(fine));
    for (field, value, error) in [
        ("model_type", json!("roberta"), "model_type is \"roberta\", expected bert"),
        (
            "position_embedding_type",
            json!("relative_key"),
            "position_embedding_type is \"relative_key\", expected absolute",
        ),
        ("hidden_act", json!("tanh"), "hidden_act is \"tanh\", expected gelu, gelu_new, relu, relu6 or silu"),
        ("hidden_size", json!(null), "hidden_size is missing"),
        ("hidden_size", json!("40"), "hidden_size is \"40\", expected a whole number"),
        ("hidden_size", json!(-40), "hidden_size is -40, expected a whole number"),
        ("hidden_size", json!(0), "hidden_size is 0, expected 1 to 4294967295"),
        ("hidden_size", json!(41), "hidden_size is 41, which num_attention_heads, 5, does not divide"),
        ("vocab_size", json!(1u64 << 40), "vocab_size is 1099511627776, expected 1 to 4294967295"),
        ("num_hidden_layers", json!(1.5), "num_hidden_layers is 1.5, expected a whole number"),
        ("is_decoder", json!(true), "is_decoder is true, expected false"),
        ("add_cross_attention", json!(true), "add_cross_attention is true, expected false"),
        ("layer_norm_eps", json!(-1e-5), "layer_norm_eps is -0.00001, expected a number of at least 0"),
    ] {
        let got = parse(&|c| c[field] = value.clone());
        assert_eq!(got, Err(error.to_owned()), "{field}");
    }
    // Sizes whose products do not fit a machine word; which is the first depends on the others.
    let huge = parse(&|c| {
        c["hidden_size"] = json!(4_000_000_000u64);
        c["intermediate_size"] = json!(4_000_000_000u64);
    });
    assert!(huge.as_ref().is_err_and(|e| e.contains("overflows")), "{huge:?}");
    assert!(BertConfig::parse("[]").is_err_and(|e| e.to_string() == "is not a JSON object"));
    let missing = models::load("nowhere/config.json").unwrap_err().to_string();
    assert!(missing.starts_with("nowhere/config.json: "), "{missing}");
}

#[test]
fn the_tokenizer_forgets_its_lengths_and_counts_what_it_cuts() {
    let dir = TempDir::new().unwrap();
    let tiny = TinyBert::new(0);
    tiny.write(dir.path());
    let limits = models::parse(&tiny.config.to_string()).unwrap().limits();
    assert_eq!(limits, Limits { vocabulary: WORDS.len(), tokens: 24 });
    let tokenizer = Tokenizer::load(dir.path().join("tokenizer.json"), limits).unwrap();
    let long = "cat ".repeat(22);
    let longer = "cat ".repeat(23);
    let tokens = tokenizer.encode(&["The cats sat on the mat.", "", "zebra", &long, &longer]).unwrap();
    // The file would have truncated and padded to 4. [CLS] is 2, [SEP] 3, an unknown word 1.
    assert_eq!(tokens.ids[..3], [vec![2, 5, 6, 11, 7, 8, 5, 9, 10, 3], vec![2, 3], vec![2, 1, 3]]);
    let whole = [&[2][..], &[6; 22], &[3]].concat();
    assert_eq!((&tokens.ids[3], &tokens.ids[4], tokens.truncated), (&whole, &whole, 1));
    assert_eq!(tokenizer.encode::<&str>(&[]).unwrap().ids, Vec::<Vec<u32>>::new());
    // Less may be asked for, not more.
    assert_eq!(tokenizer.clone().truncated_at(99).unwrap().max_tokens(), 24);
    let short = tokenizer.truncated_at(5).unwrap();
    let tokens = short.encode(&["cat cat cat", "cat cat cat cat"]).unwrap();
    assert_eq!((tokens.ids, tokens.truncated), (vec![vec![2, 6, 6, 6, 3]; 2], 1));
    let error = short.truncated_at(2).unwrap_err().to_string();
    assert_eq!(error, "2 special tokens leave no room among 2 tokens");
}

/// The length and the case of texts, as a folder of Sentence Transformers asks for them. Poolings are in
/// tests/pipeline.rs.
#[test]
fn shorter_texts_and_lower_case_are_asked_for_by_the_folder() {
    let dir = TempDir::new().unwrap();
    TinyBert::new(0).write(dir.path());
    let files = || Files::in_folder(dir.path());
    let limits = models::load(files().config).unwrap().limits();
    assert_eq!((files().modules, files().pooling, files().sentences, files().settings), (None, None, None, None));
    assert_eq!((files().max_tokens(limits).unwrap(), files().lower_case().unwrap()), (24, false));

    let sentences = dir.path().join("sentence_bert_config.json");
    let asks = |json: serde_json::Value| std::fs::write(&sentences, json.to_string()).unwrap();
    let most = |json: serde_json::Value| {
        asks(json);
        files().max_tokens(limits).map_err(|e| e.to_string())
    };
    assert_eq!(most(json!({"max_seq_length": 7, "do_lower_case": false})), Ok(7));
    assert_eq!((most(json!({"max_seq_length": 512})), most(json!({"max_seq_length": null}))), (Ok(24), Ok(24)));
    let error = format!("{}: max_seq_length is 0, expected a whole number above 0", sentences.display());
    assert_eq!(most(json!({"max_seq_length": 0})), Err(error));

    // A tokenizer that keeps the case has no word for this one.
    let mut tiny = TinyBert::new(0);
    tiny.tokenizer["normalizer"]["lowercase"] = json!(false);
    tiny.write(dir.path());
    let mut ids = Vec::new();
    for lower_case in [false, true] {
        asks(json!({"do_lower_case": lower_case}));
        let tokenizer = Tokenizer::load(&files().tokenizer, limits).unwrap().lower_case(files().lower_case().unwrap());
        ids.push(tokenizer.encode(&["Cat"]).unwrap().ids.remove(0));
    }
    assert_eq!(ids, [[2, 1, 3], [2, 6, 3]]);
    asks(json!({"do_lower_case": 1}));
    let error = format!("{}: do_lower_case is 1, expected true or false", sentences.display());
    assert_eq!(files().lower_case().unwrap_err().to_string(), error);
}

/// A mean of zeros has no direction: the twin leaves it, as the devices do.
#[test]
fn the_embedding_of_zeros_is_zeros() {
    let states = ndarray::Array2::zeros((3, 4));
    assert_eq!(twin::pool(&Pipeline::default(), &states, [1, 2].into_iter()), ndarray::Array2::<f64>::zeros((2, 4)));
}

#[test]
fn a_tokenizer_of_another_vocabulary_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("tokenizer.json");
    let load = |change: &dyn Fn(&mut TinyBert)| {
        let mut tiny = TinyBert::new(0);
        change(&mut tiny);
        tiny.write(dir.path());
        let limits = models::parse(&tiny.config.to_string()).unwrap().limits();
        let loaded = Tokenizer::load(&path, limits);
        loaded.map_err(|e| e.to_string().strip_prefix(&format!("{}: ", path.display())).unwrap().to_owned())
    };
    let vocab_size = |size: usize| load(&move |t| t.config["vocab_size"] = json!(size)).map(|_| ());
    let other = |size: usize| Err(format!("the tokenizer has 14 ids, the model's vocab_size is {size}"));
    assert_eq!(vocab_size(13), other(13));
    // Rows beyond the last word are padding, unless they are as many as that.
    assert_eq!((vocab_size(16), vocab_size(141), vocab_size(142)), (Ok(()), Ok(()), other(142)));
    let tight = load(&|t| t.config["max_position_embeddings"] = json!(2)).map(|_| ());
    assert_eq!(tight, Err("2 special tokens leave no room among 2 tokens".into()));
    assert!(load(&|t| t.tokenizer = json!({"model": 1})).is_err());

    // One that adds no special tokens has nothing for an empty text.
    let bare = load(&|t| t.tokenizer["post_processor"] = json!(null)).unwrap();
    assert_eq!(bare.encode(&["cat"]).unwrap().ids, [[6]]);
    let error = bare.encode(&["cat", " "]).unwrap_err().to_string();
    assert_eq!(error, "text 1: has no tokens, so it has no embedding");

    std::fs::remove_file(&path).unwrap();
    let limits = Limits { vocabulary: 14, tokens: 24 };
    assert!(Tokenizer::load(&path, limits).unwrap_err().to_string().starts_with(&format!("{}: ", path.display())));
}

#[test]
fn sparsity_is_none_or_two_of_four() {
    let parse = |text: &str| text.parse::<Sparsity>().map(|s| s.to_string()).map_err(|e| e.to_string());
    for text in ["none", "2:4", "2:2:4", "128:2:4"] {
        assert_eq!(parse(text), Ok(text.to_owned()));
    }
    assert_eq!(parse("1:2:4"), Ok("2:4".to_owned()));
    assert_eq!(parse("4:8"), Err("sparsity \"4:8\" is not none, 2:4 or V:2:4".into()));
    assert_eq!(parse("3:2:4"), Err("vector length 3 is not one of 1, 2, 4, 8, 16, 32, 64, 128".into()));
    assert_eq!(parse(":2:4"), Err("vector length \"\" is no number".into()));
}
