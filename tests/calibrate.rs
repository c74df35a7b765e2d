//! Statistics of a model's own inputs, one layer replaced at a time, and checkpoints written back.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::Array2;
use sparse24::graph::{Ablation, Batching, Calibration, CalibrationInputs, Checkpoint, LinearTensor, Sparsity};
use sparse24::models::bert::{BertConfig, Sizes};
use sparse24::prune::{Method, SparseGpt};
use sparse24::text::{Encoder, Pipeline, twin};
use sparse24::{Activation, DType, Device, HostWeights, Matrix, Sparse24, VectorLen, prune};

const SIZES: Sizes =
    Sizes { vocabulary: 30, hidden: 24, layers: 3, heads: 3, intermediate: 40, positions: 20, types: 1 };

fn checkpoint() -> Checkpoint {
    let graph = BertConfig::new(SIZES, 1e-12, Activation::Gelu).unwrap().graph().unwrap();
    let mut checkpoint = Checkpoint::random(graph, DType::F32, 24).unwrap();
    // Weights large enough for layers to matter.
    for (name, w) in checkpoint.linears().map(|(name, w)| (name, w.clone())).collect::<Vec<_>>() {
        let w = w.to_dense().unwrap().to_array().mapv(|x| 8.0 * x);
        checkpoint.set_linear(&name, Matrix::from_array(w.view()).into()).unwrap();
    }
    checkpoint
}

/// Texts of all lengths, which no two batches share.
fn texts(n: usize) -> Vec<Vec<u32>> {
    (0..n).map(|text| (0..1 + text * 7 % 19).map(|token| ((text * 13 + token * 5) % 30) as u32).collect()).collect()
}

fn how(inputs: CalibrationInputs, batch: usize) -> Calibration {
    Calibration { batching: Batching { texts: batch, ..Batching::default() }, gram: true, inputs }
}

/// The Gram matrix of every linear layer's inputs, by name.
fn grams(checkpoint: &Checkpoint, how: Calibration, texts: &[Vec<u32>]) -> Vec<(String, u64, Array2<f64>)> {
    let mut all = Vec::new();
    let mut checkpoint = checkpoint.clone();
    let visit = &mut |name: &str, _: &HostWeights, statistics: &prune::Statistics| {
        all.push((name.to_owned(), statistics.tokens(), statistics.gram().unwrap().to_owned()));
        Ok(None)
    };
    checkpoint.calibrate(&Device::cpu().unwrap(), texts, how, visit).unwrap();
    all
}

fn close(a: &Array2<f64>, b: &Array2<f64>, what: &str) {
    let scale = b.diag().iter().fold(0f64, |m, x| m.max(*x));
    let off = (a - b).iter().fold(0f64, |m, x| m.max(x.abs()));
    assert!(off < 1e-4 * scale, "{what}: off by {off:e} of {scale:e}");
}

#[test]
fn padding_and_batches_are_in_no_statistic() {
    let (checkpoint, texts) = (checkpoint(), texts(40));
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let alone = grams(&checkpoint, how(CalibrationInputs::Pruned, 1), &texts);
    let together = grams(&checkpoint, how(CalibrationInputs::Pruned, 32), &texts);
    assert_eq!(alone.len(), 12);
    assert!(alone.iter().map(|of| &of.0).eq(checkpoint.linears().map(|of| of.0).collect::<Vec<_>>().iter()));
    for ((name, n, one), (_, _, other)) in alone.iter().zip(&together) {
        assert_eq!(*n, tokens as u64);
        close(other, one, name);
    }
}

#[test]
fn the_first_layer_sees_embeddings_whatever_the_layers_are() {
    let (checkpoint, texts) = (checkpoint(), texts(9));
    let mut silent = checkpoint.clone();
    for (name, w) in checkpoint.linears() {
        silent.set_linear(&name, Matrix::zeros(w.m(), w.k(), DType::F32).unwrap().into()).unwrap();
    }
    let [one, other] = [&checkpoint, &silent].map(|of| grams(of, how(CalibrationInputs::Dense, 4), &texts));
    close(&other[0].2, &one[0].2, "the first layer");
    assert_ne!(other[4].2.diag(), one[4].2.diag(), "the second layer sees what the first one does");
}

#[test]
fn later_layers_see_what_earlier_ones_lost_unless_they_are_not_to() {
    let (checkpoint, texts) = (checkpoint(), texts(20));
    let device = Device::cpu().unwrap();
    let before = grams(&checkpoint, how(CalibrationInputs::Dense, 8), &texts);
    for inputs in [CalibrationInputs::Dense, CalibrationInputs::Pruned, CalibrationInputs::Corrected] {
        let mut all = Vec::new();
        let mut pruned = checkpoint.clone();
        pruned
            .calibrate(&device, &texts, how(inputs, 8), &mut |_, w, statistics| {
                all.push((statistics.gram().unwrap().to_owned(), statistics.cross().map(|c| c.to_owned())));
                let w = w.to_dense()?;
                let mask = Method::Magnitude.prune(&w, VectorLen::ONE, None, 0)?.1;
                Ok(Some(HostWeights::Sparse24(Sparse24::compress(&w, &mask)?)))
            })
            .unwrap();
        assert!(pruned.linears().all(|(_, w)| matches!(w, HostWeights::Sparse24(_))));
        for ((gram, cross), (name, _, dense)) in all.iter().zip(&before) {
            let same = (gram - dense).iter().all(|x| x.abs() < 1e-4 * dense[[0, 0]].abs());
            let first = name == "encoder.layer.0.attention.self.qkv";
            assert_eq!(same, first || inputs == CalibrationInputs::Dense, "{inputs:?}, {name}");
            assert_eq!(cross.is_some(), inputs == CalibrationInputs::Corrected);
            if let Some(cross) = cross.as_ref().filter(|_| first) {
                close(cross, gram, "where both models are the same, C is H");
            }
        }
    }
}

#[test]
fn correction_comes_closer_to_the_dense_model() {
    let (checkpoint, texts) = (checkpoint(), texts(300));
    let device = Device::cpu().unwrap();
    let dense = twin::hidden_states(&checkpoint, &texts[..60]).unwrap();
    let lost = |inputs: Option<CalibrationInputs>| {
        let mut pruned = checkpoint.clone();
        match inputs {
            None => pruned.prune(Sparsity::TwoFour(VectorLen::new(4).unwrap())).unwrap(),
            Some(inputs) => pruned
                .calibrate(&device, &texts, how(inputs, 32), &mut |_, w, statistics| {
                    let gpt = SparseGpt::new(VectorLen::new(4).unwrap());
                    let (w, mask) = gpt.prune(&w.to_dense()?, statistics, None)?;
                    Ok(Some(HostWeights::Sparse24(Sparse24::compress(&w, &mask)?)))
                })
                .unwrap(),
        }
        (&twin::hidden_states(&pruned, &texts[..60]).unwrap() - &dense).mapv(|x| x * x).sum()
    };
    let (magnitude, pruned, corrected) =
        (lost(None), lost(Some(CalibrationInputs::Pruned)), lost(Some(CalibrationInputs::Corrected)));
    assert!(pruned < 0.6 * magnitude, "{pruned} against magnitude's {magnitude}");
    assert!(corrected < 0.97 * pruned, "{corrected} against {pruned}");
}

#[test]
fn an_ablation_is_the_model_with_one_layer_replaced() {
    let (checkpoint, texts) = (checkpoint(), texts(25));
    let device = Device::cpu().unwrap();
    let batching = Batching { texts: 8, ..Batching::default() };
    let pipeline = Pipeline::default();
    let model = pipeline.attach(&checkpoint).unwrap();
    let mut ablation = Ablation::new(&device, &model, &texts, batching).unwrap();
    for (name, w) in checkpoint.linears().filter(|(name, _)| !name.contains("layer.1")) {
        let w = w.to_dense().unwrap();
        let pruned = Sparse24::compress(&w, &prune::magnitude(&w, VectorLen::ONE).unwrap()).unwrap();
        for weights in [HostWeights::Dense(w), HostWeights::Sparse24(pruned)] {
            let mut changed = checkpoint.clone();
            changed.set_linear(&name, weights.clone()).unwrap();
            let expected = Encoder::new(&device, &changed, pipeline.clone()).unwrap().embed(&texts, batching).unwrap();
            let found = pipeline.ablated(&mut ablation, &name, weights).unwrap();
            let off = (found.to_array() - expected.to_array()).iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(off < 2e-6, "{name}: off by {off:e}");
        }
    }
    let w = HostWeights::Dense(Matrix::zeros(24, 40, DType::F32).unwrap());
    let error =
        |ablation: &mut Ablation, name: &str| pipeline.ablated(ablation, name, w.clone()).unwrap_err().to_string();
    let earlier = error(&mut ablation, "encoder.layer.0.output.dense");
    let next = "encoder.layer.2.intermediate.dense, to which the texts have gone";
    assert_eq!(earlier, format!("encoder.layer.0.output.dense comes before {next}"));
    assert_eq!(
        error(&mut ablation, "encoder.layer.9.output.dense"),
        "there is no linear layer \"encoder.layer.9.output.dense\""
    );
    let shape = error(&mut ablation, "encoder.layer.2.intermediate.dense");
    assert_eq!(shape, "encoder.layer.2.intermediate.dense has shape [24, 40], expected [40, 24]");
}

#[test]
fn no_texts_and_bad_ones_are_refused() {
    let mut checkpoint = checkpoint();
    let device = Device::cpu().unwrap();
    let mut error = |texts: &[Vec<u32>]| {
        checkpoint
            .calibrate(&device, texts, how(CalibrationInputs::Dense, 8), &mut |_, _, _| Ok(None))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(error(&[]), "there are no texts");
    let diagonal = Calibration { gram: false, ..how(CalibrationInputs::Corrected, 8) };
    let mut other = self::checkpoint();
    let corrected = other.calibrate(&device, &texts(3), diagonal, &mut |_, _, _| Ok(None)).unwrap_err().to_string();
    assert!(corrected.starts_with("inputs are corrected by way of a full Gram matrix"), "{corrected}");
    assert_eq!(error(&[vec![1], vec![30]]), "text 1: token id 30 is outside of the vocabulary of 30");
}

#[test]
fn tensors_of_linear_layers_are_found_by_their_stored_names() {
    let mut checkpoint = checkpoint();
    let qkv = "encoder.layer.1.attention.self.qkv";
    let dense = checkpoint.linears().find(|(name, _)| name == qkv).unwrap().1.to_dense().unwrap();
    let find = |checkpoint: &Checkpoint, name: &str| checkpoint.linear_tensor(name).unwrap();
    let key = "encoder.layer.1.attention.self.key.weight";
    assert_eq!(checkpoint.tensors_of(qkv)[1], key);
    for name in [key, "bert.encoder.layer.1.attention.self.key.weight"] {
        let expected = HostWeights::Dense(dense.rows_of(24..48).unwrap());
        assert_eq!(find(&checkpoint, name), Some(LinearTensor::Weights(expected)));
    }
    match find(&checkpoint, "encoder.layer.2.intermediate.dense.bias") {
        Some(LinearTensor::Bias(bias)) => assert_eq!((bias.rows(), bias.cols()), (1, 40)),
        other => panic!("{other:?}"),
    }
    for name in
        ["encoder.layer.1.attention.self.qkv.weight", "encoder.layer.3.output.dense.weight", "pooler.dense.weight"]
    {
        assert_eq!(find(&checkpoint, name), None, "{name}");
    }
    // 24 features: blocks of 8 rows do not straddle Q, K and V, blocks of 16 would.
    assert_eq!(checkpoint.fitting_vector(qkv, VectorLen::new(32).unwrap()).get(), 8);
    assert_eq!(checkpoint.fitting_vector("encoder.layer.0.output.dense", VectorLen::new(32).unwrap()).get(), 32);
    let mask = prune::magnitude(&dense, VectorLen::new(8).unwrap()).unwrap();
    let compressed = Sparse24::compress(&dense, &mask).unwrap();
    checkpoint.set_linear(qkv, (&compressed).into()).unwrap();
    match find(&checkpoint, key) {
        Some(LinearTensor::Weights(HostWeights::Sparse24(w))) => {
            assert_eq!((w.vector().get(), w.decompress()), (8, compressed.decompress().rows_of(24..48).unwrap()));
        }
        other => panic!("{other:?}"),
    }
}
