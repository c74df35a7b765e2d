//! `sparse24 bench --model`: a whole model, dense against 2:4 and masked, with the share of each part: an encoder of
//! texts by [`EncoderBench`], the two phases of a language model by [`DecoderBench`].

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::Args;
use crate::cli::args::Usage;
use crate::cli::command::quoted;
use crate::cli::compare::Earlier;
use crate::cli::{Outcome, model, progress, say};
use sparse24::engine::{Device, DeviceInfo};
use sparse24::graph::Checkpoint;
use sparse24::measure::{PlannedBy, Policy};
use sparse24::report::compare::{RowKey, Scope};
use sparse24::report::sheet::{Printout, Sheet, Shown};
use sparse24::report::{self, Environment, MODEL_SCHEMA, or_dash, plural, significant};
use sparse24::text::{
    DecoderBench, EncoderBench, ModelRecord, PartTimes, Phase, Pipeline, allowed_error, allowed_logit_error,
};
use sparse24::{DType, Op, Plan, models};

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
    rows: Vec<ModelRecord>,
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

pub(super) fn run(args: &Args, name: &str, earlier: Option<&Earlier<'_>>) -> Result<Outcome> {
    let dtype = args.dtype();
    let mut operations = args.operations();
    // Rows on the same weights next to each other: these are made, and the twin is run, once for both.
    let order: Vec<_> = operations.iter().map(|(op, _)| *op).collect();
    operations.sort_by_key(|(op, _)| order.iter().position(|o| o == op));
    if operations.iter().any(|(op, _)| *op == Op::Masked24) {
        return Err(Usage::error("--ops: masked24 is measured on single layers only"));
    }
    let (weights, checkpoint, pipeline) = load(name, dtype, args.seed)?;
    let graph = Arc::clone(checkpoint.graph());
    let is_language = graph.head().is_some();
    let (batch, seq) = args.batch_and_seq(if is_language { (1, 512) } else { (32, 64) });
    if let Some(earlier) = earlier {
        let phases: Vec<&str> = if is_language { Phase::ALL.map(Phase::name).to_vec() } else { vec![""] };
        let key = |(op, planned_by)| {
            let row = RowKey::new(op, planned_by, dtype);
            phases.iter().map(move |&phase| RowKey { name: phase.to_owned(), ..row.clone() }).collect::<Vec<_>>()
        };
        let keys: Vec<_> = operations.iter().copied().flat_map(key).collect();
        earlier.covers(&Scope::Model { name: name.to_owned(), batch, seq }, &keys)?;
    }
    // A language model's cache has room for the prompt and a token.
    let most = graph.limits().tokens - usize::from(is_language);
    if seq > most {
        let most = plural(most, "token");
        return Err(Usage::error(format!("--seq: {}, and {name} takes at most {most}", plural(seq, "token"))));
    }
    let (device, policy, environment) = args.environment()?;

    let bar = progress(operations.len() + policy.samples);
    let mut bench = if is_language {
        Bench::Decoder(Box::new(DecoderBench::new(&device, checkpoint, (batch, seq), args.seed)?))
    } else {
        Bench::Encoder(Box::new(EncoderBench::new(&device, checkpoint, pipeline, (batch, seq), args.seed)?))
    };
    for &(op, planned_by) in &operations {
        bar.set_message(format!("{op}"));
        let mut explained = Vec::new();
        for plan in bench.add(op, planned_by)?.iter().filter(|_| args.explain) {
            let text = plan.explain().to_string();
            if !explained.contains(&text) {
                args.output.remark(&format!("{op}: {text}\n"))?;
                explained.push(text);
            }
        }
        bar.inc(1);
    }
    let mut rows = bench.run(&policy, |round| bar.inc(u64::from(round <= policy.samples)))?;
    bar.finish_and_clear();
    let each = rows.len() / operations.len().max(1);
    let of_rows = operations.into_iter().flat_map(|operation| std::iter::repeat_n(operation, each));
    for (row, (op, planned_by)) in rows.iter_mut().zip(of_rows) {
        let source = format!("--model {} --batch {batch} --seq {seq}", quoted(name));
        row.command = args.command_of(&device, vec![source], dtype, op, planned_by);
    }
    rows.sort_by_key(|row| row.phase == Some(Phase::Decode.name()));
    let report = Report {
        schema: MODEL_SCHEMA,
        environment,
        model: name.to_owned(),
        weights,
        layers: graph.blocks().map_or(0, |blocks| blocks.count),
        hidden: graph.head().map_or(graph.output_width(), |head| graph.value(head.x).cols),
        linear_weights: graph.linear_weights(),
        batch,
        seq,
        rows,
    };
    let failed = report.rows.iter().filter(|row| !row.verified);
    for row in failed.clone() {
        let phase = row.phase.map_or_else(String::new, |phase| format!("{phase}, "));
        say(&format!("failed: {phase}{}: {}", row.op, row.failure.as_deref().unwrap_or_default()));
    }
    args.output.emit(&report, &report.rows, &report.page(&device))?;
    let json = serde_json::to_string(&report)?;
    let compared = earlier.map_or(Ok(Outcome::Fine), |earlier| earlier.compare(&json, &args.output))?;
    Ok(if failed.count() > 0 { Outcome::VerificationFailed } else { compared })
}

/// What measures a model.
enum Bench {
    Encoder(Box<EncoderBench>),
    Decoder(Box<DecoderBench>),
}

impl Bench {
    fn add(&mut self, op: Op, planned_by: PlannedBy) -> sparse24::Result<Vec<Plan>> {
        match self {
            Self::Encoder(bench) => bench.add(op, planned_by),
            Self::Decoder(bench) => bench.add(op, planned_by),
        }
    }

    fn run(self, policy: &Policy, progress: impl FnMut(usize)) -> sparse24::Result<Vec<ModelRecord>> {
        match self {
            Self::Encoder(bench) => bench.run(policy, progress),
            Self::Decoder(bench) => bench.run(policy, progress),
        }
    }
}

/// The weights of a folder or of a model on the hub, or random ones of a well-known model's sizes. A folder comes
/// first.
fn load(name: &str, dtype: DType, seed: u64) -> Result<(Weights, Checkpoint, Pipeline)> {
    if let Some(graph) = models::named(name).filter(|_| !Path::new(name).is_dir()) {
        return Ok((Weights::Random, Checkpoint::random(graph, dtype, seed)?, Pipeline::default()));
    }
    let names = [&models::NAMES[..], &models::LANGUAGE_MODELS].concat().join(", ");
    let files = model::files(name).with_context(|| format!("--model: {name} is none of {names}"))?;
    let checkpoint = Checkpoint::load(models::load(&files.config)?, &files.weights, None, dtype)?;
    if checkpoint.graph().head().is_some() {
        return Ok((Weights::Folder, checkpoint, Pipeline::none()));
    }
    let pipeline = Pipeline::load(&files, checkpoint.graph().output_width())?;
    Ok((Weights::Folder, checkpoint, pipeline))
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
        let is_language = self.rows.iter().any(|row| row.phase.is_some());
        let rate = if is_language { "tok/s" } else { "seq/s" };
        let mut sheet = Sheet::new("model")
            .words("op", Shown::Always)
            .numbers("V", Shown::Always)
            .numbers("ms", Shown::Wide)
            .numbers("ms \u{b1} %", Shown::Narrow)
            .numbers("spread", Shown::Wide)
            .numbers(rate, Shown::Always)
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
            let times = [row.times.median_ms, row.times.median_low_ms, row.times.median_high_ms];
            let part = |of: fn(&PartTimes) -> f64| or_dash(row.parts.as_ref().map(of), 3);
            let instead = match row.dense_layers {
                0 => String::new(),
                all if all == row.linear_layers => "dense instead: ".to_owned(),
                some => format!("dense instead in {some} of {}: ", row.linear_layers),
            };
            sheet.push(
                row.phase.unwrap_or_default(),
                [
                    row.op.to_owned(),
                    row.vector.map(|v| v.to_string()).unwrap_or_default(),
                    report::marked(row.times.noisy, or_dash(row.times.median_ms, 4)),
                    report::median_cell(times, row.times.noisy),
                    report::spread_cell(row.times.median_ms.zip(row.times.max_ms).zip(row.times.min_ms)),
                    or_dash(row.tokens_per_second.or(row.sequences_per_second), 3),
                    report::ratio_cell(row.speedup.vs_dense, row.speedup.noisy),
                    part(|p| p.gemm_ms),
                    part(|p| p.attention_ms),
                    part(|p| p.rest_ms),
                    row.parts.map_or_else(|| "-".to_owned(), |p| format!("{:.0} %", 100.0 * p.gemm_share())),
                    report::verified_cell(row.verified),
                    if row.verified { or_dash(row.max_error, 2) } else { report::verified_cell(false) },
                    significant(row.weight_bytes as f64 / 1e6, 3),
                    instead + &row.kernels.join(", "),
                ],
            );
        }
        let noisy = self.rows.iter().filter(|row| row.times.noisy || row.speedup.noisy).count();
        let mut notes: Vec<_> = report::noise_note(noisy).into_iter().collect();
        for row in self.rows.iter().filter(|row| row.op == "dense") {
            let Some(share) = row.parts.map(|parts| parts.gemm_share()) else { continue };
            notes.push(match row.phase {
                None => format!(
                    "GEMMs are {:.0} % of dense: twice as fast they make the model {:.2}x as fast, and never more than \
                     {:.1}x",
                    100.0 * share,
                    1.0 / (1.0 - share / 2.0),
                    1.0 / (1.0 - share)
                ),
                Some(phase) => {
                    format!(
                        "GEMMs are {:.0} % of dense in {phase}, the head among them, which stays dense",
                        100.0 * share
                    )
                }
            });
        }
        let failed = self.rows.iter().filter(|row| !row.verified).count();
        notes.push(report::verified_note(self.rows.len(), failed));
        let clock = self.rows.iter().find_map(|r| r.clock).unwrap_or("no clock");
        let verified = if is_language {
            format!(
                "verified: every logit of a prompt's last token and of the one after it is as close to the f64 twin's as \
                 allowed: {:.0e} of the root of their mean square in f32, {:.0e} in f16; error: the largest distance",
                allowed_logit_error(DType::F32),
                allowed_logit_error(DType::F16)
            )
        } else {
            format!(
                "verified: every element of hidden states and embeddings is as close to the f64 twin's as allowed: {:.0e} \
                 of the root of their mean square in f32, {:.0e} in f16; error: the largest distance",
                allowed_error(DType::F32),
                allowed_error(DType::F16)
            )
        };
        let rate = if is_language {
            "prefill: a pass over the prompts; decode: over a token of each after that; tok/s: tokens in a second"
        } else {
            "seq/s: texts in a second"
        };
        let legend = [
            format!("of one forward pass: {}", report::times_legend(self.environment.sampling(), clock)),
            format!("{rate}; vs dense: the dense row's time over this one's, below 1 is slower"),
            "GEMMs, attention, rest: ms of these, by their shares when timed alone; share: of GEMMs".to_owned(),
            verified,
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
