//! `sparse24 bench --model`: a whole encoder of texts, dense against 2:4 and masked, with the share of each part.
//!
//! Every row is verified before it is timed: the hidden states of every token and the embeddings of texts of several
//! lengths, as many as the timed batch has and in its shape, against the f64 twin of the forward pass. Samples of all
//! rows are interleaved, and more are taken where they are [noisy](sparse24::measure::noise).
//!
//! The parts of a pass (GEMMs, attention, the rest) are timed apart, right after whole passes in the same round. Apart
//! they find other caches and other neighbours than within a pass, so their sum is not the pass's time; by noise it may
//! even be more. So only their shares are believed, and applied to the median of whole passes. Invariants: a row that is
//! not verified has no times; the parts of a row come to its median.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use ndarray::{Array2, ArrayView1};
use serde::Serialize;

use super::args::Usage;
use super::bench::{Args, quoted};
use super::compare::Earlier;
use super::{Outcome, model, progress, say};
use sparse24::engine::{Device, DeviceInfo, Timing};
use sparse24::graph::{Checkpoint, Forward, Graph, Sparsity};
use sparse24::measure::noise::{self, Estimate};
use sparse24::measure::{Choice, Policy, Summary};
use sparse24::report::compare::{Key, Scope};
use sparse24::report::sheet::{Printout, Sheet, Shown};
use sparse24::report::{self, Environment, MODEL_SCHEMA, or_dash, plural, significant};
use sparse24::text::{Encoder, Pipeline, twin};
use sparse24::{DType, Matrix, Op, VectorLen, models};

/// One run as JSON.
#[derive(Serialize)]
struct Report {
    schema: &'static str,
    environment: Environment,
    model: String,
    weights: Weights,
    layers: usize,
    hidden: usize,
    linear_weights: usize,
    batch: usize,
    seq: usize,
    rows: Vec<Row>,
}

/// Where a model's weights come from.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Weights {
    /// Drawn, for a well-known model's sizes.
    Random,
    /// Read, from a folder of the user's or of the hub's cache.
    Folder,
}

/// One way to run the model. Times are of one forward pass, in milliseconds.
#[derive(Serialize)]
struct Row {
    /// As in `sparse24-bench/1`.
    op: &'static str,
    vector: Option<usize>,
    dtype: String,
    /// Kernels of the linear layers, each once.
    kernels: Vec<String>,
    /// Linear layers that run on dense weights in place of 2:4 ones, of how many.
    dense_layers: usize,
    linear_layers: usize,
    median_ms: Option<f64>,
    min_ms: Option<f64>,
    max_ms: Option<f64>,
    /// The middle half of the samples.
    q1_ms: Option<f64>,
    q3_ms: Option<f64>,
    /// As in `sparse24-bench/1`: where the median lies, and whether that is too wide.
    median_low_ms: Option<f64>,
    median_high_ms: Option<f64>,
    noisy: bool,
    samples: usize,
    calls_per_sample: usize,
    clock: Option<&'static str>,
    /// What of the median each part takes, by its share when timed alone.
    parts: Option<Parts>,
    /// Sum of the medians of the parts when timed alone: how far that is from the median is how far to trust them.
    parts_alone_ms: Option<f64>,
    /// What each part must do at least in a pass, by the operations' own count: what its time is to be held against.
    parts_cost: PartsCost,
    sequences_per_second: Option<f64>,
    /// 2 x linear weights x tokens / median, in 10¹² per second, whatever was skipped.
    effective_tflops: Option<f64>,
    speedup_vs_dense: Option<f64>,
    speedup_low: Option<f64>,
    speedup_high: Option<f64>,
    speedup_noisy: bool,
    weight_bytes: usize,
    /// Largest distance of an element of a hidden state or an embedding from the twin's, over the root of the mean square
    /// of that state or embedding, and what is allowed.
    max_error: Option<f64>,
    allowed_error: f64,
    verified: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
    command: String,
}

#[derive(Clone, Copy, Serialize)]
struct Parts {
    gemm_ms: f64,
    attention_ms: f64,
    rest_ms: f64,
}

/// Operations in 10⁹, and bytes of operands in 10⁶, as dense ones count: 2:4 multiplies half as often.
#[derive(Clone, Copy, Serialize)]
struct PartsCost {
    gemm_gflop: f64,
    gemm_mb: f64,
    attention_gflop: f64,
    attention_mb: f64,
    rest_gflop: f64,
    rest_mb: f64,
}

impl PartsCost {
    fn of(forward: &Forward) -> Self {
        let [gemm, attention, rest] = PARTS.map(|part| {
            let own = forward.calls().filter(|(node, _)| Part::of(node.op.name()) == part);
            own.fold((0.0, 0.0), |sum, (_, call)| (sum.0 + call.cost().flops / 1e9, sum.1 + call.cost().bytes / 1e6))
        });
        Self {
            gemm_gflop: gemm.0,
            gemm_mb: gemm.1,
            attention_gflop: attention.0,
            attention_mb: attention.1,
            rest_gflop: rest.0,
            rest_mb: rest.1,
        }
    }
}

/// A row while it is measured.
struct Subject {
    row: Row,
    forward: Arc<Forward>,
    /// Milliseconds of whole passes, one sample a round.
    passes: Vec<f64>,
    /// Those of the calls of each part alone, in the order of [`PARTS`].
    alone: [Vec<f64>; 3],
}

/// Which share of a forward pass a call belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// A linear layer, with its bias, activation and residual.
    Gemm,
    /// The products and the softmax of attention.
    Attention,
    /// Embeddings, norms, pooling.
    Rest,
}

const PARTS: [Part; 3] = [Part::Gemm, Part::Attention, Part::Rest];

impl Part {
    /// That of an operation, by its name.
    fn of(op: &str) -> Self {
        match op {
            "gemm" => Self::Gemm,
            "attention" => Self::Attention,
            _ => Self::Rest,
        }
    }
}

/// Operations of the f64 twin that are worth waiting for: some seconds.
const TWIN_FLOPS: usize = 30_000_000_000;

/// How far an element may be from the twin's, where those of its row are about 1. No bound through softmax and LayerNorm
/// would be of use. On all-MiniLM-L6-v2 and random ids hidden states come to 8e-6 and 1.6e-2; one wrong weight is far
/// above the first (see the test), and f16 is what embeddings of 384 features are held to: 3e-3 of their length.
const fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 5e-5,
        DType::F16 | DType::Bf16 => 6e-2,
    }
}

/// What the twin says of the sample texts.
struct Expected {
    texts: Vec<Vec<u32>>,
    /// One row a token, text after text.
    states: Array2<f64>,
    /// One row a text.
    embeddings: Array2<f64>,
}

impl Expected {
    fn new(checkpoint: &Checkpoint, pipeline: &Pipeline, texts: &[Vec<u32>]) -> Result<Self> {
        let states = twin::hidden_states(checkpoint, texts)?;
        let embeddings = twin::pool(pipeline, &states, texts.iter().map(Vec::len));
        Ok(Self { texts: texts.to_vec(), states, embeddings })
    }

    /// The largest error of a pass over batches in which the texts take turns. All are seen even where a batch has fewer.
    fn error(&self, encoder: &Encoder, forward: &Forward) -> Result<f64> {
        let hidden = forward.graph().outputs().first().and_then(|&states| forward.tap(states));
        let hidden = hidden.context("a pass keeps its hidden states")?;
        let mut worst = 0f64;
        for start in (0..self.texts.len()).step_by(forward.batch()) {
            let of_row: Vec<_> = (0..forward.batch()).map(|row| (start + row) % self.texts.len()).collect();
            let batch: Vec<_> = of_row.iter().map(|&text| &self.texts[text]).collect();
            let embeddings = encoder.embed_batch(forward, &batch)?;
            let states = encoder.model().device().read(hidden)?;
            for (row, &text) in of_row.iter().enumerate() {
                worst = worst.max(distance(&embeddings, row, self.embeddings.row(text)));
                let first: usize = self.texts[..text].iter().map(Vec::len).sum();
                for token in 0..self.texts[text].len() {
                    worst = worst.max(distance(&states, row * forward.seq() + token, self.states.row(first + token)));
                }
            }
        }
        Ok(worst)
    }
}

pub(super) fn run(args: &Args, name: &str, earlier: Option<&Earlier<'_>>) -> Result<Outcome> {
    let (batch, seq) = args.batch_and_seq();
    let dtype = args.dtype();
    let mut operations = args.operations();
    // Rows on the same weights next to each other: these are made, and the twin is run, once for both.
    let order: Vec<_> = operations.iter().map(|(op, _)| *op).collect();
    operations.sort_by_key(|(op, _)| order.iter().position(|o| o == op));
    if operations.iter().any(|(op, _)| *op == Op::Masked24) {
        return Err(Usage::error("--ops: masked24 is measured on single layers only"));
    }
    if let Some(earlier) = earlier {
        let keys: Vec<_> = operations.iter().map(|&(op, choice)| Key::new(op, choice, dtype)).collect();
        earlier.covers(&Scope::Model { name: name.to_owned(), batch, seq }, &keys)?;
    }
    let (device, policy, environment) = args.environment()?;
    let (weights, checkpoint, pipeline) = load(name, dtype, args.seed())?;
    let graph = Arc::clone(checkpoint.graph());
    if seq > graph.limits().tokens {
        let most = plural(graph.limits().tokens, "token");
        return Err(Usage::error(format!("--seq: {}, and {name} takes at most {most}", plural(seq, "token"))));
    }
    let samples = ids(&graph, &sample_lengths(&graph, seq), args.seed() ^ SAMPLES)?;
    let timed = ids(&graph, &vec![seq; batch], args.seed())?;

    let bar = progress(operations.len() + policy.samples);
    let mut subjects = Vec::new();
    let mut known: Option<(Op, Checkpoint, Expected)> = None;
    for (op, choice) in operations {
        bar.set_message(format!("{op}"));
        let (checkpoint, expected) = match &known {
            Some((of, checkpoint, expected)) if *of == op => (checkpoint, expected),
            _ => {
                let mut own = checkpoint.clone();
                match op {
                    Op::Dense => {}
                    Op::Sparse24(vector) => own.prune(Sparsity::TwoFour(vector))?,
                    Op::Masked | Op::Masked24 => own.mask(VectorLen::ONE)?,
                }
                let expected = Expected::new(&own, &pipeline, &samples)?;
                let (_, checkpoint, expected) = known.insert((op, own, expected));
                (&*checkpoint, &*expected)
            }
        };
        let encoder = Encoder::new(&device, checkpoint, pipeline.clone())?;
        let encoder = if choice == Choice::Auto { encoder } else { encoder.no_dense_fallback() };
        let mut source = vec!["--model".to_owned(), quoted(name)];
        source.extend(["--batch".into(), batch.to_string(), "--seq".into(), seq.to_string()]);
        let command = args.command_of(&device, source, dtype, op, choice);
        subjects.push(Subject::new(&encoder, (op, choice), (batch, seq), expected, command)?);
        if args.explain() {
            for plan in
                distinct(encoder.model().plans(batch, seq)?.into_iter().map(|(_, plan)| plan.explain().to_string()))
            {
                args.output().remark(&format!("{op}: {plan}\n"))?;
            }
        }
        bar.inc(1);
    }
    drop(known);
    drop(checkpoint);

    for subject in subjects.iter_mut().filter(|s| s.row.verified) {
        subject.forward.write(&timed)?;
        subject.calibrate(&device, &policy)?;
    }
    let mut verified: Vec<_> = subjects.iter_mut().filter(|s| s.row.verified).collect();
    let step = |round: usize| bar.inc(u64::from(round <= policy.samples));
    let passes = noise::rounds(&policy, verified.len(), |_, subject| verified[subject].sample(&device), step)?;
    for (subject, passes) in verified.iter_mut().zip(passes) {
        subject.passes = passes;
    }
    bar.finish_and_clear();

    let dense = subjects.iter().find(|s| s.row.op == "dense" && s.row.verified).map(|s| s.passes.clone());
    let finish = |subject: Subject| {
        let ratio = dense.as_ref().and_then(|dense| Estimate::of_ratio(dense, &subject.passes));
        let row = subject.finish(&graph, batch, seq);
        Row {
            speedup_vs_dense: ratio.map(|r| r.value),
            speedup_low: ratio.map(|r| r.interval.low),
            speedup_high: ratio.map(|r| r.interval.high),
            speedup_noisy: ratio.is_some_and(|r| r.noisy),
            ..row
        }
    };
    let rows: Vec<_> = subjects.into_iter().map(finish).collect();
    let report = Report {
        schema: MODEL_SCHEMA,
        environment,
        model: name.to_owned(),
        weights,
        layers: graph.blocks().map_or(0, |blocks| blocks.count),
        hidden: graph.output_width(),
        linear_weights: graph.linear_weights(),
        batch,
        seq,
        rows,
    };
    let failed = report.rows.iter().filter(|row| !row.verified);
    for row in failed.clone() {
        say(&format!("failed: {}: {}", row.op, row.failure.as_deref().unwrap_or_default()));
    }
    args.output().emit(&report, &report.rows, &report.page(&device))?;
    let json = serde_json::to_string(&report)?;
    let compared = earlier.map_or(Ok(Outcome::Fine), |earlier| earlier.compare(&json, args.output()))?;
    Ok(if failed.count() > 0 { Outcome::VerificationFailed } else { compared })
}

/// The weights of a folder or of a model on the hub, or random ones of a well-known model's sizes. A folder comes first.
fn load(name: &str, dtype: DType, seed: u64) -> Result<(Weights, Checkpoint, Pipeline)> {
    if let Some(graph) = models::named(name).filter(|_| !Path::new(name).is_dir()) {
        return Ok((Weights::Random, Checkpoint::random(graph, dtype, seed)?, Pipeline::default()));
    }
    let names = models::NAMES.join(", ");
    let files = model::files(name).with_context(|| format!("--model: {name} is none of {names}"))?;
    let checkpoint = Checkpoint::load(models::load(&files.config)?, &files.weights, None, dtype)?;
    let pipeline = Pipeline::load(&files, checkpoint.graph().output_width())?;
    Ok((Weights::Folder, checkpoint, pipeline))
}

/// Separates the ids of the verified texts from the timed ones.
const SAMPLES: u64 = 0x5eed_7e87_5a3b_1e50;

/// Lengths of the texts that are verified: short ones, whose padding shows, and a whole one where the twin can afford
/// it.
fn sample_lengths(graph: &Graph, seq: usize) -> Vec<usize> {
    let affordable = TWIN_FLOPS / 2 / graph.linear_weights().max(1);
    let mut lengths = vec![seq.min(33), seq.min(7)];
    lengths.extend((seq <= affordable).then_some(seq));
    lengths
}

/// Texts of these lengths, with ids drawn by a seeded generator.
fn ids(graph: &Graph, lengths: &[usize], seed: u64) -> Result<Vec<Vec<u32>>> {
    let all = Matrix::uniform(1, lengths.iter().sum(), DType::F32, seed)?;
    let mut drawn = all.elements().to_f32().into_iter();
    let rows = graph.limits().vocabulary;
    let id = |x: f32| ((f64::from(x) + 1.0) / 2.0 * rows as f64) as u32;
    Ok(lengths.iter().map(|&length| drawn.by_ref().take(length).map(id).collect()).collect())
}

impl Subject {
    /// Prepares and verifies one row.
    fn new(
        encoder: &Encoder,
        (op, choice): (Op, Choice),
        (batch, seq): (usize, usize),
        expected: &Expected,
        command: String,
    ) -> Result<Self> {
        let model = encoder.model();
        let forward = model.forward(batch, seq)?;
        let worst = expected.error(encoder, &forward)?;
        let dtype = model.dtype();
        let verified = worst <= allowed(dtype);
        let plans = model.plans(batch, seq)?;
        let instead = |own: Op| plans.iter().filter(|(of, plan)| *of == own && plan.weights() != own).count();
        let row = Row {
            op: if choice == Choice::Auto { "auto" } else { op.name() },
            vector: op.vector().map(VectorLen::get),
            dtype: dtype.to_string(),
            kernels: distinct(plans.iter().map(|(_, plan)| plan.schedule())),
            dense_layers: instead(op),
            linear_layers: plans.len(),
            median_ms: None,
            min_ms: None,
            max_ms: None,
            q1_ms: None,
            q3_ms: None,
            median_low_ms: None,
            median_high_ms: None,
            noisy: false,
            samples: 0,
            calls_per_sample: 1,
            clock: None,
            parts: None,
            parts_alone_ms: None,
            parts_cost: PartsCost::of(&forward),
            sequences_per_second: None,
            effective_tflops: None,
            speedup_vs_dense: None,
            speedup_low: None,
            speedup_high: None,
            speedup_noisy: false,
            weight_bytes: model.linear_bytes(),
            max_error: worst.is_finite().then_some(worst),
            allowed_error: allowed(dtype),
            verified,
            failure: (!verified).then(|| format!("an output is {worst:.2e} off, {:.0e} is allowed", allowed(dtype))),
            command,
        };
        Ok(Self { row, forward, passes: Vec::new(), alone: Default::default() })
    }

    /// The calls of a sample: whole passes, or one part of each.
    fn time(&self, device: &Device, part: Option<Part>, passes: usize) -> Result<Timing> {
        let of_part = move |part: Option<Part>, op: &str| part.is_none_or(|part| part == Part::of(op));
        let calls = self.forward.calls().filter(move |(node, _)| of_part(part, node.op.name())).map(|(_, call)| call);
        Ok(device.time(std::iter::repeat_n(calls, passes).flatten())?)
    }

    /// Warms up, and finds how many passes make a sample.
    fn calibrate(&mut self, device: &Device, policy: &Policy) -> Result<()> {
        let mut spent = Duration::ZERO;
        let mut fastest = Duration::MAX;
        while fastest == Duration::MAX || spent < policy.warm_up {
            let once = self.time(device, None, 1)?.elapsed;
            // Some clock must go on even if the device's stands still.
            spent += once.max(Duration::from_micros(10));
            fastest = fastest.min(once);
        }
        let passes = policy.sample.as_secs_f64() / fastest.as_secs_f64().max(1e-6);
        self.row.calls_per_sample = passes.ceil().clamp(1.0, 1000.0) as usize;
        Ok(())
    }

    /// Takes one sample of whole passes, which it returns in milliseconds, and one of each part.
    fn sample(&mut self, device: &Device) -> Result<f64> {
        let passes = self.row.calls_per_sample;
        let ms = |timing: Timing| timing.elapsed.as_secs_f64() * 1e3 / passes as f64;
        let whole = self.time(device, None, passes)?;
        self.row.clock = Some(whole.clock.name());
        for (i, part) in PARTS.into_iter().enumerate() {
            let alone = ms(self.time(device, Some(part), passes)?);
            self.alone[i].push(alone);
        }
        Ok(ms(whole))
    }

    fn finish(mut self, graph: &Graph, batch: usize, seq: usize) -> Row {
        let mut row = self.row;
        row.samples = self.passes.len();
        if let Some(Estimate { interval, noisy, .. }) = Estimate::of_median(&self.passes) {
            (row.median_low_ms, row.median_high_ms) = (Some(interval.low), Some(interval.high));
            row.noisy = noisy;
        }
        let whole = Summary::of(&mut self.passes);
        let [gemm, attention, rest] = self.alone.each_mut().map(|times| Summary::of(times));
        row.median_ms = whole.map(|of| of.median);
        row.min_ms = whole.map(|of| of.min);
        row.max_ms = whole.map(|of| of.max);
        row.q1_ms = whole.map(|of| of.q1);
        row.q3_ms = whole.map(|of| of.q3);
        if let (Some(whole), Some(gemm), Some(attention), Some(rest)) = (whole, gemm, attention, rest) {
            let alone = [gemm, attention, rest].map(|of| of.median);
            row.parts = Some(Parts::of(whole.median, alone));
            row.parts_alone_ms = Some(alone.iter().sum());
        }
        row.sequences_per_second = row.median_ms.map(|ms| batch as f64 / ms * 1e3);
        let flops = 2.0 * graph.linear_weights() as f64 * (batch * seq) as f64;
        row.effective_tflops = row.median_ms.map(|ms| flops / ms / 1e9);
        row
    }
}

/// The largest distance of a row's elements from what is expected, over the root of the mean square of the latter;
/// infinite if one is NaN.
fn distance(got: &Matrix, row: usize, expected: ArrayView1<'_, f64>) -> f64 {
    let scale = (expected.dot(&expected) / expected.len() as f64).sqrt();
    let distance = |(col, expected): (usize, &f64)| (f64::from(got.get(row, col)) - expected).abs() / scale;
    let not_nan = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
    expected.iter().enumerate().map(distance).map(not_nan).fold(0.0, f64::max)
}

/// Each of these once, in order.
fn distinct(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut once: Vec<String> = Vec::new();
    all.for_each(|x| {
        if !once.contains(&x) {
            once.push(x)
        }
    });
    once
}

impl Report {
    /// The run for people: the rows, and how much faster GEMMs alone can make the model.
    fn page(&self, device: &Device) -> Printout {
        let info = device.info();
        let on = match &info {
            DeviceInfo::Cpu(cpu) => format!("{}, {}", cpu.name, plural(cpu.threads, "thread")),
            DeviceInfo::Gpu(gpu) => gpu.name.clone(),
        };
        let weights = match self.weights {
            Weights::Random => " (random weights of that model's sizes)",
            Weights::Folder => "",
        };
        let head = format!(
            "{}{weights} on {on}: {} of {} features, {:.1} M weights in linear layers; batches of {} x {} tokens",
            self.model,
            plural(self.layers, "layer"),
            self.hidden,
            self.linear_weights as f64 / 1e6,
            self.batch,
            self.seq
        );
        let mut sheet = Sheet::new("model")
            .words("op", Shown::Always)
            .numbers("V", Shown::Always)
            .numbers("ms", Shown::Wide)
            .numbers("ms \u{b1} %", Shown::Narrow)
            .numbers("spread", Shown::Wide)
            .numbers("seq/s", Shown::Always)
            .numbers("vs dense", Shown::Always)
            .numbers("GEMMs", Shown::Always)
            .numbers("attention", Shown::Always)
            .numbers("rest", Shown::Always)
            .numbers("share", Shown::Wide)
            .words("verified", Shown::Narrow)
            .numbers("error", Shown::Wide)
            .numbers("MB", Shown::Wide)
            .words("kernels", Shown::Wide);
        for row in &self.rows {
            let times = [row.median_ms, row.median_low_ms, row.median_high_ms];
            let part = |of: fn(&Parts) -> f64| or_dash(row.parts.as_ref().map(of), 3);
            let instead = match row.dense_layers {
                0 => String::new(),
                all if all == row.linear_layers => "dense instead: ".to_owned(),
                some => format!("dense instead in {some} of {}: ", row.linear_layers),
            };
            sheet.push(
                "",
                [
                    row.op.to_owned(),
                    row.vector.map(|v| v.to_string()).unwrap_or_default(),
                    report::marked(row.noisy, or_dash(row.median_ms, 4)),
                    report::median_cell(times, row.noisy),
                    report::spread_cell(row.median_ms.zip(row.max_ms).zip(row.min_ms)),
                    or_dash(row.sequences_per_second, 3),
                    report::ratio_cell(row.speedup_vs_dense, row.speedup_noisy),
                    part(|p| p.gemm_ms),
                    part(|p| p.attention_ms),
                    part(|p| p.rest_ms),
                    row.parts.map_or_else(|| "-".to_owned(), |p| format!("{:.0} %", 100.0 * p.share())),
                    report::verified_cell(row.verified),
                    if row.verified { or_dash(row.max_error, 2) } else { report::verified_cell(false) },
                    significant(row.weight_bytes as f64 / 1e6, 3),
                    instead + &row.kernels.join(", "),
                ],
            );
        }
        let noisy = self.rows.iter().filter(|row| row.noisy || row.speedup_noisy).count();
        let mut notes: Vec<_> = report::noise_note(noisy).into_iter().collect();
        if let Some(share) = self.rows.iter().find(|r| r.op == "dense").and_then(|r| r.parts).map(|p| p.share()) {
            notes.push(format!(
                "GEMMs are {:.0} % of dense: twice as fast they make the model {:.2}x as fast, and never more than {:.1}x",
                100.0 * share,
                1.0 / (1.0 - share / 2.0),
                1.0 / (1.0 - share)
            ));
        }
        let failed = self.rows.iter().filter(|row| !row.verified).count();
        notes.push(report::verified_note(self.rows.len(), failed));
        let clock = self.rows.iter().find_map(|r| r.clock).unwrap_or("no clock");
        let legend = [
            format!("of one forward pass: {}", report::times_legend(self.environment.sampling(), clock)),
            "seq/s: texts in a second; vs dense: the dense row's time over this one's, below 1 is slower".to_owned(),
            "GEMMs, attention, rest: ms of these, by their shares when timed alone; share: of GEMMs".to_owned(),
            format!(
                "verified: every element of hidden states and embeddings is as close to the f64 twin's as allowed: {:.0e} \
                 of the root of their mean square in f32, {:.0e} in f16; error: the largest distance",
                allowed(DType::F32),
                allowed(DType::F16)
            ),
            report::noise_legend(),
            "MB: linear weights on the device; spread: (slowest - fastest) / median".to_owned(),
        ];
        Printout {
            head: vec![head],
            sheet,
            notes,
            wide_notes: Vec::new(),
            legend: legend.to_vec(),
            source: self.environment.source(),
        }
    }
}

impl Parts {
    /// A whole in the shares of parts that were timed alone: GEMMs, attention, the rest.
    fn of(whole: f64, alone: [f64; 3]) -> Self {
        let [gemm_ms, attention_ms, rest_ms] = alone.map(|part| whole * part / alone.iter().sum::<f64>());
        Self { gemm_ms, attention_ms, rest_ms }
    }

    /// The part of GEMMs.
    fn share(&self) -> f64 {
        self.gemm_ms / (self.gemm_ms + self.attention_ms + self.rest_ms)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;
    use ndarray::array;
    use sparse24::HostWeights;
    use sparse24::models::bert::{BertConfig, Sizes};

    use super::*;

    #[test]
    fn samples_are_ids_of_the_vocabulary_and_short_enough() -> Result<()> {
        let graph = models::named("bert-large").context("known")?;
        // 302 M weights: a whole text of 512 tokens takes the twin too long.
        assert_eq!(sample_lengths(&graph, 512), [33, 7]);
        assert_eq!(sample_lengths(&graph, 5), [5, 5, 5]);
        let texts = ids(&graph, &[3, 500], 1)?;
        assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), [3, 500]);
        let (low, high) = (texts[1].iter().min(), texts[1].iter().max());
        assert!(low < Some(&1000) && high > Some(&29_500) && high < Some(&30_522), "{low:?} {high:?}");
        Ok(())
    }

    /// Verification itself: one weight with its sign flipped in any linear layer is more than is allowed, even among the
    /// small random ones that attend to all tokens nearly alike.
    #[test]
    fn one_wrong_weight_fails_verification() -> Result<()> {
        let config = BertConfig::named("minilm").context("known")?;
        let sizes = Sizes { vocabulary: 99, layers: 2, ..config.sizes() };
        let graph = BertConfig::new(sizes, config.eps(), config.activation())?.graph()?;
        let right = Checkpoint::random(graph.clone(), DType::F32, 24)?;
        let device = Device::cpu()?;
        let expected = Expected::new(&right, &Pipeline::default(), &ids(&graph, &[8, 3], 1)?)?;
        let error = |checkpoint: &Checkpoint| {
            let encoder = Encoder::new(&device, checkpoint, Pipeline::default())?;
            expected.error(&encoder, &*encoder.forward(2, 8)?)
        };
        assert!(error(&right)? < allowed(DType::F32) / 10.0, "{}", error(&right)?);
        for (name, w) in right.linears() {
            let HostWeights::Dense(w) = w else { bail!("{name} is not dense") };
            // Q and K move scores alone, which are nearly alike: the wrong weight of each is looked for apart.
            let parts = if name.ends_with("qkv") { 3 } else { 1 };
            let numbers = w.elements().to_f32();
            let len = numbers.len() / parts;
            for part in 0..parts {
                let mut numbers = numbers.clone();
                let of_part = &mut numbers[part * len..][..len];
                let largest = of_part.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                if let Some(x) = of_part.iter_mut().find(|x| x.abs() == largest) {
                    *x *= -1.0;
                }
                let mut wrong = right.clone();
                wrong.set_linear(&name, Matrix::from_f32(w.rows(), w.cols(), &numbers)?.into())?;
                assert!(error(&wrong)? > 2.0 * allowed(DType::F32), "{name}, part {part}: {}", error(&wrong)?);
            }
        }
        Ok(())
    }

    /// However long parts take alone.
    #[test]
    fn parts_come_to_the_whole() {
        for alone in [[5.0, 2.0, 1.0], [50.0, 20.0, 10.0], [0.5, 0.2, 0.1]] {
            let parts = Parts::of(8.0, alone);
            let Parts { gemm_ms, attention_ms, rest_ms } = parts;
            assert!((gemm_ms + attention_ms + rest_ms - 8.0).abs() < 1e-12 && (gemm_ms - 5.0).abs() < 1e-12);
            assert!((parts.share() - 0.625).abs() < 1e-12);
        }
    }

    #[test]
    fn a_nan_is_as_far_off_as_can_be() -> Result<()> {
        let got = Matrix::from_f32(2, 2, &[0.0, 1.0, 0.0, f32::NAN])?;
        assert_eq!(distance(&got, 0, array![0.75, 0.75].view()), 1.0);
        assert_eq!(distance(&got, 1, array![0.0, 1.0].view()), f64::INFINITY);
        Ok(())
    }
}
