//! `sparse24 prune`: a model whose linear layers are 2:4, or pruned at another granularity.
//!
//! Criteria that look at weights alone go through a file tensor by tensor, whatever model it is of. Those that ask for
//! a layer's inputs, and everything that looks at the model as a whole, run the model: its linear layers are pruned in
//! memory, and then the file is written anew with them. Invariant: the output appears complete or not at all.

mod how;
mod masks;
mod removal;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use comfy_table::{LineStyle, Table, TableStyle};
use regex::Regex;
use serde::Serialize;

use super::args::{DASH, InOut, Json, ensure_usage, one_stdin};
use super::command::command_line;
use super::images::is_of_images;
use super::inspect::many;
use super::retrain::Summary;
use super::rewrite;
use super::sensitivity::MetricArgs;
use super::{Outcome, model, progress, size};
use how::{How, Named, Scope, Unit};
use sparse24::bootstrap::Interval;
use sparse24::error::printable;
use sparse24::graph::{CalibrationInputs, Checkpoint, LinearTensor};
use sparse24::io::{
    Action, Actions, Content, Dtype, Item, Layout, NewModel, Provenance, Source, Spec24, Stored, Written, config_of,
    in_by_out, transpose,
};
use sparse24::prune::{Amount, Method, Pruning, SparseGpt, Statistics};
use sparse24::{DType, Elements, HostWeights, Matrix, Sparse24, VectorLen};

const EXAMPLES: &str = "\
Examples:
  # any safetensors file, or a folder: weights alone decide
  sparse24 prune model.safetensors pruned.safetensors
  # a model: second order, with compensation, one pattern for 32 rows
  sparse24 prune model/minilm pruned --method sparsegpt --vector 32 --calibration texts.txt
  sparse24 eval --model pruned --pairs stsb-dev.csv
  # convolutions, along input channels and taps
  sparse24 prune model/efficientnet-lite0 pruned --method sparsegpt --calibration pictures
  # the pattern that is fastest, and ten minutes of retraining that bring its loss back
  sparse24 prune model/minilm pruned --method sparsegpt --vector 128 --retrain 10 --input texts.txt
  # half of all weights, whatever the pattern: zeros, as torch's global_unstructured leaves them
  sparse24 prune model/minilm pruned --granularity weight --amount 0.5 --scope global
  # a quarter of the feed-forward features away: a smaller model, which is still dense
  sparse24 prune model/minilm smaller --granularity channel --amount 25%

Without --include, what is pruned are matrices of f32, f16 or bf16 whose names do not
speak of embeddings, norms, tables of biases, poolers or heads. Where the model is run
(--calibration, --permute, --max-drop, --target-speedup, --retrain) they are its linear
layers, of which Q, K and V are one. A weight that is zero stays zero, so that pruning twice keeps
what both keep.

Matrices of in features x out features (Conv1D of GPT-2 and its relatives, kernels of
Flax and Keras) are pruned along their in features, too. No form but dense has a place
for them: --to dense, or leave them out by --exclude.

What is not pruned keeps every bit, and in a folder everything comes along but hidden
files and other forms of the old model's weights (pytorch_model.bin, onnx/), which are
named. Pruned matrices hold +0.0 where a weight went; a -0.0 that stays may become +0.0.";

/// Names of matrices that are not pruned unless asked for: of parts between dots, so that `shared_experts` is none.
const SPARED: &str =
    r"(?i)(^|\.)(\w*embed\w*|\w*norm\w*|\w+_bias|wte|wpe|pooler|classifier|lm_head|score|shared|cls)(\.|$)";
/// Why there would be no output.
const NOTHING: &str = "nothing to prune: no matrix is selected (--include, --exclude) or chosen";

/// Prune a model's linear layers to 2:4 and write it in the form that is asked for, or prune weights, rows, columns,
/// blocks or channels.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    paths: InOut,
    /// What decides which weights stay: magnitude, magnitude-l2, random, obd, wanda or sparsegpt. With --amount also
    /// what torch.nn.utils.prune calls l1_unstructured, random_unstructured, global_unstructured, ln_structured or
    /// random_structured, and of channels apoz (most zero activations first) and bn-scale (|gamma| of batch norms).
    #[arg(long = "method", value_name = "METHOD", default_value = "magnitude")]
    named: Named,
    /// What is pruned as one, in place of --vector: 2:4 or V:2:4; or, as much as --amount says, weight (unstructured),
    /// row (output neurons, filters of convolutions; torch's dim=0), column (input channels; dim=1), block or block:RxC
    /// (4x4 unless given), all of which leave zeros; or channel and filter, which remove the channels between two
    /// layers (features of feed-forward parts, channels of inverted bottlenecks) from a model's folder, judged by the
    /// weights that read them or that make them. 2:4 unless given.
    #[arg(long, value_name = "WHAT", conflicts_with = "vector")]
    granularity: Option<Unit>,
    /// How much is pruned of what is not zero yet: a share, as 0.5 or 50%, or, as a whole number, so many weights,
    /// rows, columns or blocks. As in torch, 1 is one of them and 1.0 all.
    #[arg(long, value_name = "SHARE|N")]
    amount: Option<Amount>,
    /// Whether the amount is of each matrix (local) or of all together (global); local unless given.
    #[arg(long, value_name = "local|global")]
    scope: Option<Scope>,
    /// The n of the Ln norm by which rows, columns and blocks are compared: any number, inf and -inf too; 1 unless
    /// given.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    norm: Option<f64>,
    /// Rows that share a pattern: 1, 2, 4 ... 128; several, separated by commas, where each layer's is chosen.
    #[arg(long, value_name = "V,...", value_delimiter = ',', default_value = "1")]
    vector: Vec<VectorLen>,
    /// Text file, a sentence on each line, that the model runs on for statistics of its layers' inputs (`-` is stdin);
    /// obd, wanda, sparsegpt and apoz need one, or --retrain with --input. Of a model of images, a folder of pictures.
    #[arg(long, value_name = "TXT|-")]
    calibration: Option<PathBuf>,
    /// What a layer's inputs are computed with: the layers before it as they were (dense), as they are pruned (pruned),
    /// or both, so that a layer makes up for what those before it lost (corrected, for sparsegpt alone and its
    /// default).
    #[arg(long, value_name = "dense|pruned|corrected", value_parser = inputs)]
    inputs: Option<CalibrationInputs>,
    /// Damping of sparsegpt: this share of the mean of the inputs' squares is added to all of them; 0.05 unless given.
    #[arg(long, value_name = "SHARE")]
    damping: Option<f64>,
    /// After sparsegpt has chosen a mask, ask each group this many times at most whether another pattern loses less,
    /// all kept weights refitted; 0 unless given. On MiniLM 4 lower the output lost on text of the same kind by 3 % at
    /// --vector 128 to 13 % at 1, and take seconds and minutes.
    #[arg(long, value_name = "PASSES")]
    exchanges: Option<usize>,
    /// Prune only what this regular expression matches part of the name of, embeddings and heads too.
    #[arg(long, value_name = "RE")]
    include: Option<Regex>,
    /// Leave as it is what this regular expression matches part of the name of.
    #[arg(long, value_name = "RE")]
    exclude: Option<Regex>,
    /// Prune linear layers, those that do least harm for their weights first, as long as the metric of --pairs or
    /// --input drops by no more than this with all of them pruned together.
    #[arg(long, value_name = "DROP", requires = "metric", conflicts_with = "target_speedup")]
    max_drop: Option<f64>,
    /// Prune what buys most time for least drop of the metric, until a forward pass on --device is this many times as
    /// fast, as far as the times of its layers tell.
    #[arg(long, value_name = "S", requires = "metric")]
    target_speedup: Option<f64>,
    #[command(flatten)]
    metric: MetricArgs,
    /// After pruning, retrain the model for so many minutes to have the states and embeddings of the dense one on the
    /// texts of --input, as `sparse24 retrain` does; up to 2048 of these are calibrated on, too, unless --calibration
    /// is given. With --max-drop or --target-speedup, --pairs is the metric if it is given.
    #[arg(long, value_name = "MINUTES", requires = "input")]
    retrain: Option<f64>,
    /// Tokens of each of the --batch texts of the forward pass that --target-speedup times.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(1..),
        requires = "target_speedup"
    )]
    seq: u32,
    /// Before pruning, search this many seconds for an order of channels in which 2:4 keeps more of the criterion's
    /// score. It costs nothing at run time, as neighbouring layers take it up. It is of all layers, whichever are
    /// pruned.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    permute: Option<u32>,
    /// The form to store pruned matrices in; native unless given, and dense for what is no 2:4.
    #[arg(long, value_name = "native|dense|bitmask|cutlass")]
    to: Option<Layout>,
    /// Seed of everything that is drawn at random.
    #[arg(long, value_name = "N", default_value_t = 24)]
    seed: u64,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    running: model::Running,
}

fn inputs(text: &str) -> Result<CalibrationInputs, String> {
    match text {
        "pruned" => Ok(CalibrationInputs::Pruned),
        "dense" => Ok(CalibrationInputs::Dense),
        "corrected" => Ok(CalibrationInputs::Corrected),
        _ => Err("is not dense, pruned or corrected".into()),
    }
}

/// What became of a matrix or a linear layer.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    m: usize,
    k: usize,
    vector: usize,
    /// Whether it is stored as k x m.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    in_by_out: bool,
    /// Share of the sum of |w| that is left.
    kept_magnitude: f64,
    /// Share of the squared output that is lost on the calibration text.
    lost_output: Option<f64>,
}

/// Why a linear layer is pruned as it is, or is not.
#[derive(Clone, Debug, Serialize)]
struct Reason {
    name: String,
    vector: Option<usize>,
    /// Of the metric, with this layer alone.
    drop: f64,
    reason: String,
}

/// What was chosen, layer by layer.
#[derive(Clone, Debug, Serialize)]
struct Choice {
    layers: Vec<Reason>,
    summary: String,
    metric: &'static str,
    /// The pairs or texts that it was computed on.
    metric_of: String,
    metric_dense: f64,
    /// With all that was chosen pruned together.
    metric_drop: f64,
    /// What 95 % of that drop on resampled texts lie in.
    metric_drop_interval: Option<Interval>,
    /// As the times of its layers tell, where it was chosen for speed.
    predicted_speedup: Option<f64>,
    /// Of whole forward passes, dense against pruned, after pruning.
    measured_speedup: Option<f64>,
}

/// What an order of channels did for the score that 2:4 keeps of a linear layer.
#[derive(Clone, Debug, Serialize)]
struct Reordered {
    name: String,
    /// Share of the score, in the order that the layer had.
    kept_before: f64,
    kept_after: f64,
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    command: String,
    input: String,
    output: String,
    method: &'static str,
    damping: Option<f64>,
    /// Most passes of exchanges of patterns.
    exchanges: Option<usize>,
    vectors: Vec<usize>,
    calibration: Option<String>,
    calibration_tokens: Option<u64>,
    /// What the new file says of how its weights were made, such as `calibrated_on`.
    provenance: Provenance,
    seed: u64,
    layers: Vec<Row>,
    permuted: Vec<Reordered>,
    chosen: Option<Choice>,
    retrained: Option<Summary>,
    /// Of the weights of all matrices that could have been pruned.
    pruned_share: f64,
    /// Files of the old folder that the new one does not have.
    left_out: Vec<String>,
    bytes_before: u64,
    bytes_after: u64,
    /// Wall time, from the first file read to the last one written.
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    match args.how()? {
        How::TwoFour(None) => prune_to_two_four(args),
        How::TwoFour(Some(vector)) => prune_to_two_four(&Args { vector: vec![vector], ..args.clone() }),
        How::Masks(units, importance) => masks::prune(args, units, importance),
        How::Removal(units, score) => removal::prune(args, units, score),
    }
}

fn prune_to_two_four(args: &Args) -> Result<Outcome> {
    args.check_usage()?;
    let (input, output) = args.paths.get()?;
    args.json.file()?;
    let spared = Regex::new(SPARED)?;
    let started = Instant::now();
    let source = Source::open(input)?;
    // Converting in place loses nothing; pruning would lose the weights that go.
    let model = rewrite::create(input, &source, output, false)?;
    let in_by_out = in_by_out(&source, config_of(input)?.as_ref());
    args.check_layout(&source, &spared, &in_by_out)?;
    let run = if args.runs_the_model() { whole::prune(args)? } else { Run::default() };
    let (rows, actions, written) = args.write(&source, &spared, &in_by_out, &run, model)?;
    rewrite::say_lost(&written);
    let weights = |(m, k): (usize, usize)| m as f64 * k as f64;
    let pruned: f64 = rows.iter().map(|row| weights((row.m, row.k))).sum();
    let candidates = match &run.checkpoint {
        Some(checkpoint) if checkpoint.graph().image().is_some() => checkpoint.graph().linear_weights() as f64,
        _ => {
            let is_pruned = |action: &Action| matches!(action, Action::Compress(_));
            let left = actions.iter().filter(|(item, action)| !is_pruned(action) && candidate(item, &spared));
            pruned + left.filter_map(|(item, _)| item.matrix()).map(weights).sum::<f64>()
        }
    };
    let report = Report {
        schema: "sparse24-prune/1",
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(),
        damping: (args.method() == Method::SparseGpt).then(|| args.damping()),
        exchanges: (args.method() == Method::SparseGpt).then(|| args.exchanges()),
        input: input.display().to_string(),
        output: output.display().to_string(),
        method: args.method().name(),
        vectors: args.vector.iter().map(|v| v.get()).collect(),
        calibration: args.calibration().map(|path| path.display().to_string()),
        calibration_tokens: run.tokens,
        provenance: args.provenance(&source, &run),
        seed: args.seed,
        pruned_share: pruned / candidates,
        bytes_before: rewrite::bytes_of(&source)?,
        bytes_after: written.bytes,
        seconds: started.elapsed().as_secs_f64(),
        permuted: run.permuted,
        chosen: run.chosen,
        retrained: run.retrained.map(|(_, summary)| summary),
        layers: rows,
        left_out: written.left_out.iter().map(|left| left.path.display().to_string()).collect(),
    };
    args.json.emit(&report.text(args), &report)?;
    Ok(Outcome::Fine)
}

/// Whether a tensor is a matrix that is pruned where nothing else is said.
fn candidate(item: &Item, spared: &Regex) -> bool {
    prunable(item) && !spared.is_match(&item.name)
}

/// Whether a tensor is a matrix that can be pruned to 2:4 at all.
fn prunable(item: &Item) -> bool {
    // Less than a whole group has no pattern, and an empty matrix nothing to save.
    is_float(item) && item.matrix().is_some_and(|(m, k)| m > 0 && k >= 4)
}

fn is_float(item: &Item) -> bool {
    matches!(item.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// What is to be written. Nothing but the default where each tensor is pruned by itself when it is written.
#[derive(Default)]
struct Run {
    /// Pruned in memory.
    checkpoint: Option<Checkpoint>,
    rows: Vec<Row>,
    permuted: Vec<Reordered>,
    chosen: Option<Choice>,
    tokens: Option<u64>,
    calibrated_on: Option<String>,
    /// What of the texts it was retrained on, and how.
    retrained: Option<(String, Summary)>,
}

impl Args {
    /// Errors of usage that clap cannot find.
    fn check_usage(&self) -> Result<()> {
        let (input, output) = self.paths.get()?;
        ensure_usage!(
            self.vector.len() == 1 || self.chooses(),
            "--vector {}: there is one pattern for all layers, unless --max-drop or --target-speedup chooses",
            self.vector.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        );
        ensure_usage!(
            self.calibration().is_some() || !self.method().needs_statistics(),
            "--method {} goes by the inputs of each layer: --calibration TXT is needed, or --retrain with --input",
            self.method()
        );
        let compensates = self.method().needs_gram();
        ensure_usage!(compensates || self.damping.is_none(), "--damping is sparsegpt's, not {}'s", self.method());
        ensure_usage!(compensates || self.exchanges.is_none(), "--exchanges is sparsegpt's, not {}'s", self.method());
        ensure_usage!(
            compensates || self.inputs != Some(CalibrationInputs::Corrected),
            "--inputs corrected is for sparsegpt: {} leaves weights as they are",
            self.method()
        );
        let damping = self.damping();
        ensure_usage!(damping.is_finite() && damping >= 0.0, "--damping: {damping} is no share");
        let metric = self.metric.pairs.is_some() || self.metric.input.is_some() && self.retrain.is_none();
        ensure_usage!(
            self.chooses() || !metric,
            "--pairs and --input are what --max-drop and --target-speedup choose by, and --input what --retrain reads"
        );
        ensure_usage!(
            self.chooses() || self.metric.windows.is_none(),
            "--windows is of the metric that --max-drop chooses by"
        );
        ensure_usage!(
            self.retrain.is_some() || self.metric.pairs.is_none() || self.metric.input.is_none(),
            "--pairs and --input are two metrics, of which one decides"
        );
        // Read twice otherwise: to choose by, and to learn from.
        let twice = self.retrain.is_some() && self.chooses() && self.metric.pairs.is_none();
        ensure_usage!(
            !twice || self.metric.input.as_deref() != Some(Path::new(DASH)),
            "--input: stdin is read once: name a file"
        );
        ensure_usage!(
            self.inputs.is_none() || self.calibration().is_some(),
            "--inputs is of --calibration, which is not given"
        );
        ensure_usage!(
            self.retrain.is_none_or(|minutes| minutes > 0.0 && minutes.is_finite()),
            "--retrain takes a number of minutes above 0"
        );
        ensure_usage!(
            self.target_speedup.is_none_or(|speedup| speedup > 1.0),
            "--target-speedup: a model is as fast as it is; more than 1 can be asked for"
        );
        one_stdin(&[
            ("--calibration", self.calibration.as_deref()),
            ("--pairs", self.metric.pairs.as_deref()),
            ("--input", self.metric.input.as_deref()),
        ])?;
        let same = input.canonicalize().ok().zip(output.canonicalize().ok()).is_some_and(|(from, to)| from == to);
        ensure_usage!(!same, "{} is to be read and written: choose another name", input.display());
        Ok(())
    }

    /// What is read, once [`Self::check_usage`] is through.
    fn input(&self) -> &Path {
        self.paths.get().map_or(Path::new(""), |(input, _)| input)
    }

    fn runs_the_model(&self) -> bool {
        self.calibration.is_some()
            || self.permute.is_some()
            || self.chooses()
            || self.retrain.is_some()
            // Weights of convolutions are stored in an order of their own.
            || is_of_images(self.input())
    }

    /// The file of texts that statistics of inputs are of.
    fn calibration(&self) -> Option<&Path> {
        let retrained_on = self.metric.input.as_deref().filter(|_| self.retrain.is_some());
        self.calibration.as_deref().or(retrained_on.filter(|_| self.method().needs_statistics()))
    }

    /// Whether which layers are pruned, and how, is to be found out.
    fn chooses(&self) -> bool {
        self.max_drop.is_some() || self.target_speedup.is_some()
    }

    /// The criterion of 2:4. Others are none of [`How::TwoFour`].
    fn method(&self) -> Method {
        match self.named {
            Named::Method(method) => method,
            Named::Torch(_) | Named::Apoz | Named::NormScale => Method::Magnitude,
        }
    }

    fn to(&self) -> Layout {
        self.to.unwrap_or(Layout::Native)
    }

    /// The one pattern where nothing is chosen.
    fn vector(&self) -> VectorLen {
        self.vector[0]
    }

    /// Whether the flags select a matrix.
    fn selects(&self, name: &str, by_default: bool) -> bool {
        self.include.as_ref().map_or(by_default, |re| re.is_match(name))
            && self.exclude.as_ref().is_none_or(|re| !re.is_match(name))
    }

    /// What the file says of how it was made.
    fn provenance(&self, source: &Source, run: &Run) -> Provenance {
        let vectors: Vec<_> = self.vector.iter().map(ToString::to_string).collect();
        let mut provenance = Provenance::of(&source.metadata());
        provenance.note("pruned", &format!("{} V={} seed={}", self.method(), vectors.join(","), self.seed));
        if let Some(texts) = &run.calibrated_on {
            provenance.note("calibrated_on", texts);
        }
        if let Some(Choice { metric_of, .. }) = &run.chosen {
            provenance.note("chosen_on", metric_of);
        }
        if let Some((texts, _)) = &run.retrained {
            provenance.note("retrained_on", texts);
        }
        provenance
    }

    fn pruning(&self) -> Pruning {
        Pruning { method: self.method(), seed: self.seed, damping: self.damping(), exchanges: self.exchanges() }
    }

    fn damping(&self) -> f64 {
        self.damping.unwrap_or(SparseGpt::new(VectorLen::ONE).damping)
    }

    fn exchanges(&self) -> usize {
        self.exchanges.unwrap_or(SparseGpt::new(VectorLen::ONE).exchanges)
    }

    /// An error if the layout has no place for a matrix that the flags select: before any work is done.
    fn check_layout(&self, source: &Source, spared: &Regex, in_by_out: &BTreeSet<String>) -> Result<()> {
        for item in source.items().filter(|item| prunable(item) && self.selects(&item.name, candidate(item, spared))) {
            let fail = |e: sparse24::Error| e.in_tensor(source.path_of(item), &item.name);
            let Some((m, k)) = item.matrix() else { continue };
            if self.to() != Layout::Dense && in_by_out.contains(&item.name) {
                let all: Vec<_> = in_by_out.iter().filter(|name| self.selects(name, !spared.is_match(name))).collect();
                let modules: BTreeSet<_> =
                    all.iter().filter_map(|name| name.rsplit(['.', '/']).nth(1)).map(regex::escape).collect();
                let modules = modules.into_iter().collect::<Vec<_>>().join("|");
                let reason = format!(
                    "is stored as in x out{}, which {} has no place for: prune --to dense, or --exclude '{modules}'",
                    match all.len().saturating_sub(1) {
                        0 => String::new(),
                        1 => ", and 1 more is".to_owned(),
                        more => format!(", and {more} more are"),
                    },
                    self.to(),
                );
                return Err(fail(sparse24::Error::invalid(reason)).into());
            }
            for &vector in &self.vector {
                let spec = Spec24 { name: item.name.clone(), m, k, dtype: item.dtype, vector: Some(vector) };
                self.to().specs(&spec).map_err(fail)?;
            }
        }
        Ok(())
    }

    fn prune_matrix(
        &self,
        name: &str,
        w: &Matrix,
        vector: VectorLen,
        statistics: Option<&Statistics>,
    ) -> sparse24::Result<(Row, Sparse24)> {
        let (pruned, mask) = self.pruning().prune(name, w, vector, statistics)?;
        let row = Row {
            name: name.to_owned(),
            m: w.rows(),
            k: w.cols(),
            vector: vector.get(),
            in_by_out: false,
            kept_magnitude: sparse24::prune::kept_magnitude(w, mask.mask())?,
            lost_output: statistics.map(|statistics| statistics.lost(w, &pruned)).transpose()?,
        };
        Ok((row, Sparse24::compress(&pruned, &mask)?))
    }

    /// Prunes a matrix that is stored as in x out, and returns its bytes as they are to be stored: in the same way.
    fn prune_transposed(&self, source: &Source, item: &Item) -> sparse24::Result<(Row, Vec<u8>)> {
        let (m, k, bytes) = source.transposed(item)?;
        let dtype = DType::try_from(item.dtype)?;
        let w = Matrix::new(m, k, Elements::from_bytes(dtype, &bytes)?)?;
        let (row, pruned) = self.prune_matrix(&item.name, &w, self.vector(), None)?;
        let pruned = pruned.decompress().elements().to_le_bytes();
        Ok((Row { in_by_out: true, ..row }, transpose(m, k, dtype.bytes(), &pruned)))
    }

    /// Writes the model. Returns what was pruned, and what was done with each item.
    fn write<'a>(
        &self,
        source: &'a Source,
        spared: &Regex,
        in_by_out: &BTreeSet<String>,
        run: &Run,
        model: NewModel,
    ) -> Result<(Vec<Row>, Actions<'a>, Written)> {
        let mut actions = Vec::new();
        // Of each layer that was pruned, how many of its tensors there are to be.
        let mut missing: BTreeMap<String, usize> = BTreeMap::new();
        if let Some(checkpoint) = &run.checkpoint {
            missing.extend(run.rows.iter().map(|row| (row.name.clone(), checkpoint.tensors_of(&row.name).len())));
        }
        for item in source.items() {
            let by_itself = run.checkpoint.is_none() && prunable(item);
            let (mut vector, mut shape, mut action) = (None, item.matrix(), Action::Copy);
            if by_itself && self.selects(&item.name, candidate(item, spared)) {
                vector = Some(self.vector());
            } else if let Some((checkpoint, layer)) =
                run.checkpoint.as_ref().and_then(|c| Some((c, c.layer_of(&item.name)?)))
            {
                match (checkpoint.linear_tensor(&item.name)?, missing.get_mut(&layer)) {
                    (Some(LinearTensor::Weights(HostWeights::Sparse24(w))), Some(missing)) => {
                        *missing = missing.saturating_sub(1);
                        (vector, shape) = (Some(w.vector()), Some((w.m(), w.k())));
                    }
                    // 2:4 before, and left as it is.
                    (Some(LinearTensor::Weights(HostWeights::Sparse24(_))) | None, _) => {}
                    // In another order of channels it may be another tensor.
                    (Some(_), _) if !run.permuted.is_empty() => action = Action::Dense,
                    (Some(_), _) => {}
                }
            }
            if self.to() == Layout::Dense && vector.is_some() && item.matrix().is_none() {
                // As many dimensions as the kernel of a convolution had.
                action = Action::Dense;
            } else if let Some((vector, (m, k))) = vector.zip(shape) {
                let spec = Spec24 { name: item.name.clone(), m, k, dtype: item.dtype, vector: Some(vector) };
                // Whether the layout has a place for it.
                self.to().specs(&spec).map_err(|e| e.in_tensor(source.path_of(item), &item.name))?;
                action = Action::Compress(spec);
            }
            if let (Action::Copy, Some(checkpoint), Some(_)) = (&action, &run.checkpoint, &run.retrained) {
                action = checkpoint.action(item)?;
            }
            // Decoded, as few programs read this form; a folder's config names one form for all that is compressed.
            if matches!(action, Action::Copy) && item.stored == Stored::SparseBitmask {
                action = Action::Dense;
            }
            actions.push((item, action));
        }
        if let Some((layer, _)) = missing.iter().find(|(_, missing)| **missing > 0) {
            bail!("{}: {layer} was pruned, but its weights are not all there to be replaced", source.path().display());
        }
        let count = |wanted: fn(&Action) -> bool| actions.iter().filter(|(_, action)| wanted(action)).count();
        let pruned = count(|action| matches!(action, Action::Compress(_)));
        let made = count(|action| !matches!(action, Action::Copy));
        ensure!(pruned > 0 || !run.rows.is_empty(), "{}: {NOTHING}", self.input().display());
        let decoded: BTreeSet<_> = actions
            .iter()
            .filter(|(item, action)| matches!(action, Action::Dense) && item.stored == Stored::SparseBitmask)
            .filter(|(item, _)| run.checkpoint.as_ref().is_none_or(|c| c.layer_of(&item.name).is_none()))
            .map(|(item, _)| &*item.name)
            .collect();
        let bar = progress(made - decoded.len());
        let mut rows = run.rows.clone();
        let provenance: Vec<_> = self.provenance(source, run).metadata().collect();
        let written = model.write(source, self.to(), &actions, &provenance, |item, action| {
            if decoded.contains(&*item.name) {
                return source.dense(item).map(Content::Dense);
            }
            bar.set_message(printable(&item.name).into_owned());
            bar.inc(1);
            match &run.checkpoint {
                Some(checkpoint) => checkpoint.content(item, action),
                None if in_by_out.contains(&item.name) => {
                    let (row, bytes) = self.prune_transposed(source, item)?;
                    rows.push(row);
                    Ok(Content::Dense(bytes))
                }
                None => {
                    let (row, sparse) = self.prune_matrix(&item.name, &source.matrix(item)?, self.vector(), None)?;
                    rows.push(row);
                    Content::sparse24(&sparse, item.dtype)
                }
            }
        })?;
        bar.finish_and_clear();
        Ok((rows, actions, written))
    }
}

impl Report {
    fn text(&self, args: &Args) -> String {
        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
        table.set_header(["m x k", "V", "|w| kept", "output lost", "layer"]);
        // Not a number where weights are infinite.
        let percent = |share: f64| if share.is_finite() { format!("{:.2} %", 100.0 * share) } else { "—".to_owned() };
        for row in &self.layers {
            table.add_row([
                format!("{}x{}", row.m, row.k),
                row.vector.to_string(),
                percent(row.kept_magnitude),
                row.lost_output.map_or_else(|| "—".to_owned(), percent),
                printable(&row.name).into_owned() + if row.in_by_out { " (in x out)" } else { "" },
            ]);
        }
        let order = match self.permuted.len() {
            0 => String::new(),
            layers => {
                let mean = |of: fn(&Reordered) -> f64| self.permuted.iter().map(of).sum::<f64>() / layers as f64;
                format!(
                    "order of channels: 2:4 keeps {} of the score instead of {}, as a mean over layers\n",
                    percent(mean(|r| r.kept_after)),
                    percent(mean(|r| r.kept_before))
                )
            }
        };
        format!(
            "{table}\n{}{order}{}{}: {} pruned by {} ({:.0} % of the candidates' weights), stored as {}; {} before, {} after\n",
            self.chosen.as_ref().map_or_else(String::new, Choice::text),
            self.retrained.as_ref().map_or_else(String::new, Summary::text),
            printable(&self.output),
            many(self.layers.len(), "layer", "layers"),
            self.method,
            100.0 * self.pruned_share,
            args.to(),
            size(self.bytes_before),
            size(self.bytes_after),
        )
    }
}

impl Choice {
    /// Notes how many times as fast the pruned model was measured to be. Returns a warning if that is less than asked.
    fn measured(&mut self, speedup: f64, asked: Option<f64>) -> Option<String> {
        self.measured_speedup = Some(speedup);
        let asked = asked.filter(|&asked| speedup < asked)?;
        Some(format!("warning: the pruned model was measured at {speedup:.2}x, and {asked}x was asked for"))
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for Reason { name, reason, .. } in &self.layers {
            text += &format!("{name}: {reason}\n");
        }
        let Self { summary, metric, metric_dense, metric_drop, .. } = self;
        let now = metric_dense - metric_drop;
        let interval = self.metric_drop_interval.map_or_else(String::new, |interval| {
            let noise = if interval.has_zero() { ": within noise" } else { "" };
            format!(" (on 95 % of resampled texts {:.4} to {:.4}{noise})", interval.low, interval.high)
        });
        text += &format!(
            "{summary}\n{metric} {now:.4}, dense {metric_dense:.4}: together they lose {metric_drop:.4}{interval}\n"
        );
        if let (Some(predicted), Some(measured)) = (self.predicted_speedup, self.measured_speedup) {
            text += &format!("a forward pass: {predicted:.2}x as fast predicted, {measured:.2}x measured\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which speed a machine reaches no test knows; what is said of it does not depend on that.
    #[test]
    fn a_measured_speedup_is_said_and_warned_of_below_what_was_asked() {
        let mut choice = Choice {
            layers: Vec::new(),
            summary: "all layers".to_owned(),
            metric: "spearman",
            metric_of: "pairs.csv (9 pairs)".to_owned(),
            metric_dense: 0.9,
            metric_drop: 0.1,
            metric_drop_interval: None,
            predicted_speedup: Some(1.52),
            measured_speedup: None,
        };
        assert!(!choice.text().contains("forward pass"), "{}", choice.text());
        let warning = choice.measured(1.376, Some(1.5));
        let said = "warning: the pruned model was measured at 1.38x, and 1.5x was asked for";
        assert_eq!(warning.as_deref(), Some(said));
        let text = choice.text();
        assert!(text.ends_with("\na forward pass: 1.52x as fast predicted, 1.38x measured\n"), "{text}");
        assert_eq!(choice.measured(1.5, Some(1.5)), None);
        assert_eq!(choice.measured(0.5, None), None);
    }
}
