//! Gradients of a pruned BERT against those of torch's autograd, of a loss with the terms of retraining.
//!
//! The model, what its states should be and the gradients are in tests/vectors (see its README). One linear layer is
//! dense, the others are 2:4, some with a pattern of their own for each row and some with one for eight. A test that
//! needs a GPU is ignored unless asked for.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::gpu;
use serde_json::Value;
use sparse24::graph::{Checkpoint, LinearTensor, Target, Trainable, TrainingPass, ValueId};
use sparse24::{DType, Device, HostWeights, Matrix, Op, TensorFile, VectorLen, models};

/// How far f32 may be from torch's f64, relative to what each check says: λ√n·2⁻²⁴ for the n roundings on the longest
/// way through the model and back. Roundings differ in sign, so that n of them add up to more than that once in
/// exp(λ²/2)/2 cases (Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis").
///
/// n is about 1600. In a block, sums have 32, 32, 32 and 64 terms in linear layers, 8, 11 and 11 in attention and 32
/// four times in LayerNorms. On the way back they have 96, 32, 64 and 32 in linear layers, the others as many again.
/// With roundings that are not of sums that is about 750; the model has two blocks, and pooling and the losses have
/// about 100.
///
/// λ is 8: the theorem is relative to the absolute values that are added up, which a result does not show where they
/// cancel, and a GPU's exponential has an error of some roundings. torch's own f32 on a CPU is at λ = 0.4.
const BOUND: f64 = 8.0 * 40.0 * (f32::EPSILON / 2.0) as f64;

/// Rows of each text: more than the longest has tokens, so that all have padding.
const SEQ: usize = 14;

fn vectors(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors")).join(name)
}

fn numbers(matrix: &Matrix) -> Vec<f64> {
    matrix.elements().to_f32().into_iter().map(f64::from).collect()
}

/// What torch was given and what it computed.
struct Reference {
    json: Value,
    file: TensorFile,
}

impl Reference {
    fn open() -> Self {
        let json = serde_json::from_str(&std::fs::read_to_string(vectors("gradients.json")).unwrap()).unwrap();
        Self { json, file: TensorFile::open(vectors("gradients.safetensors")).unwrap() }
    }

    fn texts(&self) -> Vec<Vec<u32>> {
        serde_json::from_value(self.json["texts"].clone()).unwrap()
    }

    fn number(&self, of: &str, name: &str) -> f64 {
        self.json[of][name].as_f64().unwrap_or_else(|| panic!("torch has none of {of} for {name}"))
    }

    /// The model with mean pooling, its pruned layers in the form that says so.
    fn model(&self) -> Checkpoint {
        let mut graph = models::parse(&self.json["config"].to_string()).unwrap();
        let last = *graph.outputs().last().unwrap();
        let pooled = graph.mean_pooling("pooled", last, true).unwrap();
        graph.add_output(pooled);
        let mut model = Checkpoint::load(graph, self.file.path(), None, DType::F32).unwrap();
        model.find_sparsity().unwrap();
        let form = |name: &str, w: &HostWeights| {
            let vector = match name {
                "encoder.layer.1.attention.output.dense" => return w.op() == Op::Dense,
                name if name.starts_with("encoder.layer.0") => 1,
                _ => 8,
            };
            w.op() == Op::Sparse24(VectorLen::new(vector).unwrap())
        };
        assert_eq!(model.linears().count(), 8);
        assert!(model.linears().all(|(name, w)| form(&name, w)));
        model
    }

    /// What a state should be. Padding has numbers that would show.
    fn target(&self, name: &str) -> Matrix {
        let real = self.file.matrix(&format!("target.{name}")).unwrap();
        let (tokens, cols) = (numbers(&real), real.cols());
        let mut tokens = tokens.chunks_exact(cols);
        let mut all = vec![1e3f32; self.texts().len() * SEQ * cols];
        for (text, ids) in all.chunks_exact_mut(SEQ * cols).zip(self.texts()) {
            for row in text.chunks_exact_mut(cols).take(ids.len()) {
                row.iter_mut().zip(tokens.next().unwrap()).for_each(|(to, x)| *to = *x as f32);
            }
        }
        assert!(tokens.next().is_none());
        Matrix::from_f32(self.texts().len() * SEQ, cols, &all).unwrap()
    }

    /// The gradient of a stored tensor.
    fn gradient(&self, name: &str) -> Vec<f64> {
        let name = format!("gradient.{name}");
        let info = self.file.info(&name).unwrap();
        let gradient = if info.shape.len() == 1 { self.file.vector(&name) } else { self.file.matrix(&name) };
        numbers(&gradient.unwrap())
    }
}

#[track_caller]
fn near(what: &str, device: &Device, got: f64, expected: f64, relative_to: f64) {
    let off = (got - expected).abs() / relative_to;
    assert!(off <= BOUND, "{what} on {}: {got}, not {expected}: {off:.1e} over {BOUND:.1e}", device.info().name());
}

fn gradients_are_torchs(device: &Device) {
    let reference = Reference::open();
    let model = reference.model();
    let graph = model.graph();
    let trainable = Arc::new(Trainable::new(device, &model, &graph.trained_params()).unwrap());

    let name = |value: ValueId| graph.value(value).name.as_str();
    let states = graph.states();
    let wanted: Vec<_> = states.iter().map(|state| device.upload(&reference.target(name(*state))).unwrap()).collect();
    let embedding = *graph.outputs().last().unwrap();
    let states = states.iter().zip(&wanted).map(|(&value, target)| {
        let weight = reference.number("weights", name(value)) as f32;
        Target::States { value, target, weight }
    });
    let targets: Vec<_> = states.chain([Target::Given(embedding)]).collect();
    let texts = reference.texts();
    let nodes = 0..graph.nodes().len();
    let pass = TrainingPass::new(&trainable, nodes, (texts.len(), SEQ), &targets, u64::MAX).unwrap();
    pass.write(&texts).unwrap();
    pass.forward().unwrap();
    let functional = reference.file.matrix("functional").unwrap();
    device.write(pass.gradient(embedding).unwrap(), &functional).unwrap();
    pass.backward().unwrap();

    // Every part of the loss, relative to the absolute values that it adds up.
    let losses = pass.losses().unwrap();
    assert_eq!(losses.len() + 1, reference.json["losses"].as_object().unwrap().len());
    for (value, loss) in losses {
        near(name(value), device, loss, reference.number("losses", name(value)), loss);
    }
    let embeddings = device.read(pass.value(embedding).unwrap()).unwrap();
    let products: Vec<f64> = numbers(&embeddings).iter().zip(numbers(&functional)).map(|(x, y)| x * y).collect();
    let size = products.iter().map(|x| x.abs()).sum();
    near("embeddings", device, products.iter().sum(), reference.number("losses", "embeddings"), size);

    // A model whose parameters are the gradients gives them out as the tensors that torch has.
    for (_, value, gradient) in trainable.trained() {
        device.write(value, &device.read(gradient).unwrap()).unwrap();
    }
    let gradients = trainable.read().unwrap();
    let mut compared = BTreeSet::new();
    for (param, ..) in trainable.trained() {
        let stored = graph.param(param).stored.iter().map(|part| &part.names[0]);
        let found: Vec<_> = stored.clone().map(|name| reference.gradient(name)).collect();
        // Relative to the largest element of a parameter, of which Q, K and V are parts: no bias of keys changes the
        // loss, and what is computed for its gradient of zero is what rounding leaves of numbers as large as the
        // others'.
        let size = found.iter().flatten().fold(0.0, |size, x| x.abs().max(size));
        for (name, expected) in stored.zip(found) {
            let got = match gradients.linear_tensor(name).unwrap() {
                Some(LinearTensor::Weights(w)) => w.to_dense().unwrap(),
                Some(LinearTensor::Bias(bias)) => bias,
                None => gradients.vector_tensor(name).unwrap().unwrap(),
            };
            let got = numbers(&got);
            assert_eq!(got.len(), expected.len(), "{name}");
            for (at, (got, expected)) in got.into_iter().zip(expected).enumerate() {
                near(&format!("element {at} of {name}"), device, got, expected, size);
            }
            compared.insert(format!("gradient.{name}"));
        }
    }
    let of_torch = reference.file.tensors().map(|tensor| tensor.name.clone());
    assert_eq!(compared, of_torch.filter(|name| name.starts_with("gradient.")).collect());
}

#[test]
fn gradients_on_the_cpu_are_torchs() {
    gradients_are_torchs(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_on_a_gpu_are_torchs() {
    gpu().iter().for_each(gradients_are_torchs);
}
