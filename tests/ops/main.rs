//! Every operation against the reference, on a GPU and on the CPU device.
//!
//! A file here has the stem of its operation's. Tests that need a GPU are ignored unless asked for (`--
//! --include-ignored`). Outputs start as NaN, lengths are unequal, and padding holds NaN wherever its values must not
//! matter. What several operations do together is in this file.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips")]

#[path = "../common/mod.rs"]
mod common;

/// Tests a function of a device on the CPU device and, where asked for, on a GPU: `it::on_the_cpu`, `it::on_the_gpu`.
macro_rules! on_both_devices {
    ($it:ident) => {
        mod $it {
            #[test]
            fn on_the_cpu() {
                super::$it(&sparse24::Device::cpu().unwrap());
            }

            #[test]
            #[ignore = "needs a GPU"]
            fn on_the_gpu() {
                crate::common::gpu().iter().for_each(super::$it);
            }
        }
    };
}

macro_rules! modules {
    ($($stem:ident::$operation:ident)*) => { $(mod $stem;)* };
}
sparse24::each_operation!(modules);

use common::{Data, allocated, callers_device, gpu, matrix, rng, seed, submissions};
use ndarray::Array2;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use sparse24::reference::{self, Expectation, Verdict};
use sparse24::{
    Attention, DType, Device, Elements, Embedding, Gemm, GemmOperands, Gradient, Indices, LayerNorm, Matrix,
    MeanPooling, Op, Operation, Options, Prepared, Problem, Tensor,
};

/// Pairs of input and output types that the device computes on: all of them on the CPU, for case `i` f32 and one other
/// on a GPU, where each pair is a pipeline to compile.
pub(crate) fn types(device: &Device, i: usize) -> Vec<(DType, DType)> {
    let plain = (DType::F32, DType::F32);
    let others = [(DType::F16, DType::F16), (DType::F16, DType::F32), (DType::F32, DType::F16)];
    match device.caps() {
        None => std::iter::once(plain).chain(others).collect(),
        Some(caps) if caps.f16 => vec![plain, others[i % 3]],
        Some(_) => vec![plain],
    }
}

/// Where a gradient goes in a test: NaNs to be overwritten, or numbers that it is added to.
pub(crate) struct Sink {
    pub(crate) to: Tensor,
    pub(crate) before: Option<Matrix>,
}

impl Sink {
    pub(crate) fn new(device: &Device, (rows, cols): (usize, usize), add: bool, rng: &mut Pcg64) -> Self {
        let before = add.then(|| matrix(rows, cols, DType::F32, Data::Uniform, rng));
        let to = match &before {
            Some(before) => device.upload(before).unwrap(),
            None => poisoned(device, rows, cols, DType::F32),
        };
        Self { to, before }
    }

    pub(crate) fn gradient(&self) -> Gradient<'_> {
        Gradient { to: &self.to, add: self.before.is_some() }
    }

    /// Judges what it has become, which is within its bound.
    pub(crate) fn verify(&self, device: &Device, want: &Expectation, what: &str) -> Verdict {
        let want = match &self.before {
            Some(before) => want.clone().added_to(before).unwrap(),
            None => want.clone(),
        };
        let verdict = want.verify(&device.read(&self.to).unwrap()).unwrap();
        assert!(verdict.error_over_bound <= 1.0, "{what} on {}: {verdict}", device.info().name());
        verdict
    }
}

/// A gradient that is overwritten.
pub(crate) fn into(to: &Tensor) -> Gradient<'_> {
    Gradient { to, add: false }
}

/// f64 numbers of a test.
pub(crate) fn wide(m: &Matrix) -> Array2<f64> {
    m.to_array().mapv(f64::from)
}

/// A gradient is that of `loss`, by central differences: to 1e-6 of its largest element, far from the 1e-10 that these
/// are good for, and further from what any wrong term would do.
#[track_caller]
pub(crate) fn differences_agree(gradient: &Array2<f64>, at: &Array2<f64>, loss: impl Fn(&Array2<f64>) -> f64) {
    let step = 1e-5;
    let largest = gradient.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
    assert_eq!(gradient.dim(), at.dim());
    assert!(largest > 0.0, "a gradient of zeros says nothing");
    for ((row, col), gradient) in gradient.indexed_iter() {
        let moved = |by: f64| {
            let mut x = at.clone();
            x[[row, col]] += by;
            loss(&x)
        };
        let difference = (moved(step) - moved(-step)) / (2.0 * step);
        let error = (gradient - difference).abs();
        assert!(error <= 1e-6 * largest, "[{row}, {col}] is {gradient}, by differences {difference}");
    }
}

/// A tensor of NaNs, to be overwritten.
pub(crate) fn poisoned(device: &Device, rows: usize, cols: usize, dtype: DType) -> Tensor {
    let nan = Elements::from_f32(dtype, &vec![f32::NAN; rows * cols]);
    device.upload(&Matrix::new(rows, cols, nan).unwrap()).unwrap()
}

pub(crate) fn indices(device: &Device, data: &[u32]) -> Indices {
    let indices = device.indices(data.len()).unwrap();
    device.write_indices(&indices, data).unwrap();
    indices
}

/// Runs a call and judges its output.
pub(crate) fn expect(device: &Device, call: &Prepared, y: &Tensor, want: &Expectation, what: &str) -> Verdict {
    call.run().unwrap();
    let verdict = want.verify(&device.read(y).unwrap()).unwrap();
    assert!(verdict.passed(), "{what} on {}: {verdict}", device.info().name());
    verdict
}

/// A result with one element off by a five-thousandth of what elements of its row are on average, or by two of the
/// output's smallest steps where these are larger, is beyond its bound: the bound says something. Of its row, as rows
/// of a gradient differ in size by the lengths of their sequences.
pub(crate) fn slightly_wrong(want: &Expectation, y: &Matrix, what: &str) {
    let mut values = y.elements().to_f32();
    let sizes: Vec<f32> = (values.chunks(y.cols().max(1)))
        .map(|row| row.iter().map(|v| v.abs()).sum::<f32>() / row.len() as f32)
        .collect();
    let places = (0..y.rows()).flat_map(|row| (0..y.cols()).map(move |col| (row, col)));
    let at = |row, col| row * y.cols() + col;
    let found = places
        .filter(|&(row, col)| values[at(row, col)].abs() < 2.0 * sizes[row])
        .find(|&(row, col)| want.element(row, col).bound.is_finite());
    let Some((row, col)) = found else { return };
    let step = if y.dtype() == DType::F16 { 8e-3 } else { 2e-4 };
    values[at(row, col)] += step * sizes[row];
    let wrong = Matrix::new(y.rows(), y.cols(), Elements::from_f32(y.dtype(), &values)).unwrap();
    let bound = want.element(row, col).bound;
    assert!(!want.verify(&wrong).unwrap().passed(), "{what}: element [{row}, {col}], bound {bound}");
}

/// Multiplies every element.
pub(crate) fn scaled(m: &Matrix, factor: f32) -> Matrix {
    let values: Vec<f32> = m.elements().to_f32().iter().map(|v| v * factor).collect();
    Matrix::new(m.rows(), m.cols(), Elements::from_f32(m.dtype(), &values)).unwrap()
}

/// Lengths of sequences of `seq` rows: whole, one token, none, more than there are rows, and any.
pub(crate) fn lengths_of(batch: usize, seq: usize, rng: &mut Pcg64) -> Vec<u32> {
    let any = |rng: &mut Pcg64| 1 + rng.next_u32() % seq as u32;
    (0..batch)
        .map(|i| match i {
            0 => seq as u32,
            2 => 1,
            3 => 0,
            4 => seq as u32 + 7,
            _ => any(rng),
        })
        .collect()
}

/// Replaces the rows past each sequence's length by NaN.
pub(crate) fn with_nan_padding(m: &Matrix, lengths: &[u32], seq: usize) -> Matrix {
    let mut values = m.elements().to_f32();
    for (row, values) in values.chunks_mut(m.cols().max(1)).enumerate() {
        if row % seq >= lengths[row / seq] as usize {
            values.fill(f32::NAN);
        }
    }
    Matrix::new(m.rows(), m.cols(), Elements::from_f32(m.dtype(), &values)).unwrap()
}

/// Numbers of f32, read back.
pub(crate) fn numbers(device: &Device, y: &Tensor) -> Vec<f32> {
    device.read(y).unwrap().elements().to_f32()
}

/// The error of preparing an operation has all of these words.
#[track_caller]
pub(crate) fn refuses(device: &Device, operation: &impl Operation, words: &[&str]) {
    let error = device.prepare(operation).unwrap_err().to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{}: {error}", operation.name());
}

/// Another device of the same kind is another device.
#[test]
fn operands_of_another_device_are_refused() {
    let (device, stranger) = (Device::cpu().unwrap(), Device::cpu().unwrap());
    let zeros = |device: &Device, rows| device.zeros(rows, 8, DType::F32).unwrap();
    let (x, y, lengths) = (zeros(&device, 6), zeros(&device, 2), device.indices(2).unwrap());
    let pooling = MeanPooling { x: &x, lengths: &lengths, batch: 2, seq: 3, normalize: true, y: &y };
    let (sx, sy, slengths) = (zeros(&stranger, 6), zeros(&stranger, 2), stranger.indices(2).unwrap());
    refuses(&device, &MeanPooling { x: &sx, ..pooling }, &["x ", "another device"]);
    refuses(&device, &MeanPooling { lengths: &slengths, ..pooling }, &["lengths", "another device"]);
    refuses(&stranger, &pooling, &["another device"]);
    assert!(device.write_indices(&slengths, &[1, 2]).is_err_and(|e| e.is_mismatch()));
    assert!(device.write_indices(&lengths, &[1, 2, 3]).is_err_and(|e| e.is_shape()));
    let foreign = stranger.prepare(&MeanPooling { x: &sx, lengths: &slengths, y: &sy, ..pooling });
    assert!(device.submit(&[foreign.unwrap()]).is_err_and(|e| e.is_mismatch()));
}

/// What an operation must do at least is told of its call.
#[test]
fn a_call_tells_its_cost() {
    let device = Device::cpu().unwrap();
    let x = device.zeros(6, 8, DType::F16).unwrap();
    let (y, lengths) = (device.zeros(2, 8, DType::F32).unwrap(), device.indices(2).unwrap());
    let pooling = MeanPooling { x: &x, lengths: &lengths, batch: 2, seq: 3, normalize: false, y: &y };
    let cost = device.prepare(&pooling).unwrap().cost();
    assert_eq!((cost.flops, cost.bytes), (48.0 + 16.0, (2 * 48 + 4 * 16 + 4 * 2) as f64));
    let w = device.upload_weights(&Matrix::zeros(5, 8, DType::F32).unwrap().into()).unwrap();
    let (x, y) = (device.zeros(6, 8, DType::F32).unwrap(), device.zeros(6, 5, DType::F32).unwrap());
    let plan = device.plan(&Problem::linear(Op::Dense, 5, 6, 8, DType::F32)).unwrap();
    let operands = GemmOperands::new(&x, &y);
    let cost = device.prepare(&Gemm { plan: &plan, weights: &w, operands }).unwrap().cost();
    assert_eq!((cost.flops, cost.bytes), (2.0 * 5.0 * 6.0 * 8.0, (w.bytes() + 4 * 48 + 4 * 30) as f64));
}

/// Which thread computes a row, and how rows are dealt out, must not show in it.
#[test]
fn cpu_results_do_not_depend_on_threads() {
    let seed = seed();
    for batch in [1, 3] {
        let (seq, heads, width) = (70, 2, 64);
        let outputs: Vec<Vec<Matrix>> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let device = Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap();
                let layer = Layer::new(&device, batch, seq, heads, width, seed);
                device.submit(&layer.calls).unwrap();
                [&layer.x, &layer.normed, &layer.attended, &layer.pooled].map(|t| device.read(t).unwrap()).into()
            })
            .collect();
        assert!(outputs.iter().all(|o| *o == outputs[0]), "{batch} sequences");
        assert!(outputs[0].iter().all(|m| m.elements().to_f32().iter().all(|v| v.is_finite())));
    }
}

/// A small part of every kind of result is beyond its bound: the bounds say something.
#[test]
fn a_slightly_wrong_result_is_seen() {
    let device = Device::cpu().unwrap();
    let (batch, seq, heads, width) = (2, 64, 12, 384);
    let layer = Layer::new(&device, batch, seq, heads, width, seed());
    device.submit(&layer.calls).unwrap();
    let read = |tensor: &Tensor| device.read(tensor).unwrap();
    let (attended, qkv) = (read(&layer.attended), read(&layer.qkv));
    let ones = vec![1.0; width];
    let zeros = vec![0.0; width];
    let cases = [
        (
            read(&layer.normed),
            reference::layer_norm::expect(&read(&layer.x), &ones, &zeros, 1e-12, DType::F32).unwrap(),
        ),
        (
            read(&layer.attended),
            reference::attention::expect(
                &qkv,
                &layer.lengths,
                (seq, heads),
                &Default::default(),
                DType::F32,
                DType::F32,
            )
            .unwrap(),
        ),
        (read(&layer.pooled), reference::mean_pooling::expect(&attended, &layer.lengths, seq, true).unwrap()),
    ];
    for (i, (y, want)) in cases.iter().enumerate() {
        assert!(want.verify(y).unwrap().passed(), "case {i}: {}", want.verify(y).unwrap());
        // By a five-thousandth of what elements are on average.
        let values = y.elements().to_f32();
        let size = values.iter().map(|v| v.abs()).sum::<f32>() / values.len() as f32;
        let mut wrong = values.clone();
        wrong[0] += 2e-4 * size;
        let wrong = Matrix::from_f32(y.rows(), y.cols(), &wrong).unwrap();
        assert!(!want.verify(&wrong).unwrap().passed(), "case {i}: bound {}", want.element(0, 0).bound);
    }
}

/// The calls of a layer without its feed-forward part, from ids to a pooled embedding, and their tensors.
struct Layer {
    calls: Vec<Prepared>,
    lengths: Vec<u32>,
    ids: Indices,
    x: Tensor,
    normed: Tensor,
    qkv: Tensor,
    attended: Tensor,
    pooled: Tensor,
}

impl Layer {
    fn new(device: &Device, batch: usize, seq: usize, heads: usize, width: usize, seed: u64) -> Self {
        let mut rng = rng(seed, 0);
        let tokens = batch * seq;
        let mut given = |rows, cols| matrix(rows, cols, DType::F32, Data::Uniform, &mut rng);
        let (words, positions) = (given(50, width), given(seq, width));
        // Scores of a few units: what a trained layer has.
        let w = scaled(&given(3 * width, width), 1.0 / (width as f32).sqrt());
        let [words, positions] = [words, positions].map(|m| device.upload(&m).unwrap());
        let ids = indices(device, &(0..tokens).map(|_| rng.next_u32() % 50).collect::<Vec<_>>());
        let places = indices(device, &(0..tokens).map(|t| (t % seq) as u32).collect::<Vec<_>>());
        let lengths: Vec<u32> = (0..batch).map(|i| (seq - i * seq / (2 * batch)) as u32).collect();
        let tl = indices(device, &lengths);
        let gamma = device.upload(&Matrix::from_f32(1, width, &vec![1.0; width]).unwrap()).unwrap();
        let beta = device.zeros(1, width, DType::F32).unwrap();
        let [x, normed, attended] = [0; 3].map(|_| poisoned(device, tokens, width, DType::F32));
        let qkv = poisoned(device, tokens, 3 * width, DType::F32);
        let pooled = poisoned(device, batch, width, DType::F32);
        let plan = device.plan(&Problem::linear(Op::Dense, 3 * width, tokens, width, DType::F32)).unwrap();
        let operands = GemmOperands::new(&normed, &qkv);
        let calls = vec![
            device.prepare(&Embedding { tables: &[(&words, &ids), (&positions, &places)], y: &x }).unwrap(),
            device.prepare(&LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps: 1e-12, y: &normed }).unwrap(),
            device
                .prepare(&Gemm { plan: &plan, weights: &device.upload_weights(&w.into()).unwrap(), operands })
                .unwrap(),
            device.prepare(&Attention::new(&qkv, &tl, (batch, seq), heads, &attended)).unwrap(),
            device
                .prepare(&MeanPooling { x: &attended, lengths: &tl, batch, seq, normalize: true, y: &pooled })
                .unwrap(),
        ];
        Self { calls, lengths, ids, x, normed, qkv, attended, pooled }
    }

    /// Every result against the oracle, from what the calls before it have left on the device.
    fn expect(&self, device: &Device, seq: usize, heads: usize) {
        let read = |tensor: &Tensor| device.read(tensor).unwrap();
        let width = self.x.cols();
        let want =
            reference::layer_norm::expect(&read(&self.x), &vec![1.0; width], &vec![0.0; width], 1e-12, DType::F32);
        let verdicts = [
            want.unwrap().verify(&read(&self.normed)),
            reference::attention::expect(
                &read(&self.qkv),
                &self.lengths,
                (seq, heads),
                &Default::default(),
                DType::F32,
                DType::F32,
            )
            .unwrap()
            .verify(&read(&self.attended)),
            reference::mean_pooling::expect(&read(&self.attended), &self.lengths, seq, true)
                .unwrap()
                .verify(&read(&self.pooled)),
        ];
        verdicts.into_iter().for_each(|v| assert!(v.as_ref().unwrap().passed(), "{}", v.unwrap()));
    }
}

/// A whole forward is one submission, and once it has run it allocates nothing.
#[test]
#[ignore = "needs a GPU"]
fn a_repeated_forward_allocates_nothing_and_submits_once() {
    let Some(under_test) = gpu() else { return };
    let (wgpu_device, queue) = callers_device(&under_test, wgpu::Features::empty(), |own| own);
    let device = Device::from_wgpu(wgpu_device.clone(), queue.clone()).unwrap();
    let (batch, seq, heads, width) = (2, 40, 2, 64);
    let layer = Layer::new(&device, batch, seq, heads, width, seed());
    device.submit(&layer.calls).unwrap();
    device.wait().unwrap();

    let (before, first) = (allocated(&wgpu_device), submissions(&queue));
    assert!(before[0] >= 4 && before[2] >= 5, "the counters do not count: {before:?}");
    for _ in 0..10 {
        device.submit(&layer.calls).unwrap();
    }
    // The empty submission that reads the number counts, too.
    assert_eq!(submissions(&queue) - first, 11);
    device.wait().unwrap();
    assert_eq!(allocated(&wgpu_device), before);
    layer.expect(&device, seq, heads);

    // New ids are seen by the same calls, which may be recorded into the caller's encoder as well.
    let embedding = device.read(&layer.pooled).unwrap();
    device.write_indices(&layer.ids, &vec![7; batch * seq]).unwrap();
    let mut encoder = wgpu_device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    layer.calls.iter().for_each(|call| call.on_gpu().unwrap().record(&mut encoder));
    assert_eq!(device.read(&layer.pooled).unwrap(), embedding, "nothing was submitted behind the caller's back");
    queue.submit([encoder.finish()]);
    assert_ne!(device.read(&layer.pooled).unwrap(), embedding);
    layer.expect(&device, seq, heads);
}
