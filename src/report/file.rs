//! Files of results, read back: `sparse24-bench/1` of this program and of others, and what stands beside it on a page.
//!
//! Nothing in a file is believed as it stands. Invariant: a [`File`] has every field that its schema asks for, times in
//! one unit (they agree with the throughput beside them) and by one clock within a comparison, ratios that agree with
//! the dense row that they are against, and no times where a result was not verified. Every refusal names the file and
//! the row, counted from 1.

use std::cmp::Ordering;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::mask::VectorLen;
use crate::measure::Ceilings;

/// What is wrong with a row, without its place.
type Checked = std::result::Result<(), String>;

/// A file of one of the schemas that are read.
#[derive(Clone, Debug)]
pub enum File {
    /// `sparse24-bench/1`: single products.
    Bench(Bench),
    /// `sparse24-model-bench/1`: whole models.
    Model(ModelBench),
    /// `sparse24-eval/1` and `sparse24-perplexity/1`: accuracy.
    Eval(Eval),
    /// `sparse24-prune/1`: how the weights of an evaluated model were pruned.
    Prune(Prune),
    /// `sparse24-train/1`: how a pruned model was retrained.
    Train(Train),
    /// `sparse24-sensitivity/1`: what a model loses when one layer alone is pruned.
    Sensitivity(Sensitivity),
    /// `sparse24-compile/1`: what a driver's compiler made of the kernels.
    Compile(Compile),
}

/// The schemas that are read, in version 1.
const SCHEMAS: [&str; 8] = [
    "sparse24-bench",
    "sparse24-model-bench",
    "sparse24-eval",
    "sparse24-perplexity",
    "sparse24-prune",
    "sparse24-train",
    "sparse24-sensitivity",
    "sparse24-compile",
];

/// A run of single products.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Where and how it was made.
    pub environment: Origin,
    /// What the device reaches at most, as measured in the run; none by other programs.
    pub ceilings: Ceilings,
    /// In the order of the file.
    pub rows: Vec<Row>,
}

/// A run of whole models.
#[derive(Clone, Debug)]
pub struct ModelBench {
    /// Where and how it was made.
    pub environment: Origin,
    /// Name or folder of the model.
    pub model: String,
    /// Weights of its linear layers.
    pub linear_weights: usize,
    /// Texts of a batch.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// In the order of the file.
    pub rows: Vec<ModelRow>,
}

/// Where and how a run was made. Other programs name themselves in `program`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Origin {
    /// What ran.
    #[serde(default = "sparse24")]
    pub program: String,
    /// Its version.
    pub version: String,
    /// Commit of its sources.
    #[serde(default)]
    pub commit: Option<String>,
    /// Start of the run, RFC 3339.
    pub date: String,
    /// Operating system.
    pub os: String,
    /// Architecture of the processor.
    pub arch: String,
    /// Name of the processor.
    pub cpu: String,
    /// Name of the device.
    pub device: String,
    /// `cpu`, or the kind of the adapter.
    pub kind: String,
    /// Driver of a GPU.
    #[serde(default)]
    pub driver: Option<String>,
    /// Graphics interface of a GPU.
    #[serde(default)]
    pub backend: Option<String>,
    /// Vector instructions of a CPU.
    #[serde(default)]
    pub simd: Option<String>,
    /// Threads of a CPU.
    #[serde(default)]
    pub threads: Option<usize>,
    /// `checked` or `trusted` shaders.
    #[serde(default)]
    pub shader_checks: Option<String>,
    /// How kernels were chosen.
    #[serde(default)]
    pub tuning: Option<String>,
    /// Samples that a median is of.
    #[serde(default)]
    pub samples: Option<usize>,
    /// Least length of a sample.
    #[serde(default)]
    pub sample_ms: Option<f64>,
    /// Libraries of another program, by name.
    #[serde(default)]
    pub libraries: std::collections::BTreeMap<String, String>,
    /// The command that made the run.
    pub command: String,
}

fn sparse24() -> String {
    "sparse24".to_owned()
}

/// One measured product.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Row {
    /// Name of the layer.
    #[serde(default)]
    pub name: String,
    /// `dense`, `sparse24`, `masked`, `masked24` or `auto`.
    pub op: String,
    /// Output features.
    pub m: usize,
    /// Tokens.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Element type; `tf32` for f32 multiplied in TF32.
    pub dtype: String,
    /// Type of the accumulator.
    pub accumulate: String,
    /// Vector length of 2:4 rows.
    #[serde(deserialize_with = "present")]
    pub vector: Option<usize>,
    /// Name of the kernel.
    pub kernel: String,
    /// Name of the device.
    pub device: String,
    /// Threads of a CPU.
    #[serde(deserialize_with = "present")]
    pub threads: Option<usize>,
    /// Of one call.
    #[serde(flatten)]
    pub times: RowTimes,
    /// Number of samples.
    pub samples: usize,
    /// `gpu_timestamps`, `host_wall`, `cuda_events`.
    #[serde(default)]
    pub clock: Option<String>,
    /// 2mnk / median, in 10¹² per second.
    #[serde(deserialize_with = "present")]
    pub effective_tflops: Option<f64>,
    /// Without what was skipped.
    #[serde(deserialize_with = "present")]
    pub executed_tflops: Option<f64>,
    /// Against the dense row of the same layer, type and file.
    #[serde(deserialize_with = "present")]
    pub speedup_vs_dense: Option<f64>,
    /// Whether that is too uncertain to be believed; not in older files or those of other programs.
    #[serde(default)]
    pub speedup_noisy: bool,
    /// Bytes of the weights on the device.
    #[serde(default)]
    pub weight_bytes: Option<usize>,
    /// Largest error over its bound; 1 is allowed.
    #[serde(deserialize_with = "present")]
    pub error_over_bound: Option<f64>,
    /// Whether the result was found right.
    pub verified: bool,
    /// What was wrong, if it was not.
    #[serde(default)]
    pub failure: Option<String>,
    /// The command that measures this row again.
    pub command: String,
}

/// The times of a row, in milliseconds; none where a result was not verified.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RowTimes {
    /// Median of the samples.
    #[serde(rename = "median_ms", deserialize_with = "present")]
    pub median: Option<f64>,
    /// Fastest sample.
    #[serde(rename = "min_ms", deserialize_with = "present")]
    pub min: Option<f64>,
    /// Slowest sample.
    #[serde(rename = "max_ms", default)]
    pub max: Option<f64>,
    /// Where the middle half of the samples begins; not in older files.
    #[serde(rename = "q1_ms", default)]
    pub q1: Option<f64>,
    /// Where the middle half of the samples ends.
    #[serde(rename = "q3_ms", default)]
    pub q3: Option<f64>,
    /// Where the median lies with a probability of 95 %; not in older files or those of other programs.
    #[serde(rename = "median_low_ms", default)]
    pub median_low: Option<f64>,
    /// The other end of that.
    #[serde(rename = "median_high_ms", default)]
    pub median_high: Option<f64>,
    /// Whether the median is too uncertain to be believed.
    #[serde(default)]
    pub noisy: bool,
}

/// One way to run a model.
#[derive(Clone, Debug, Deserialize)]
pub struct ModelRow {
    /// `prefill` or `decode` of a language model.
    #[serde(default)]
    pub phase: Option<String>,
    /// As in [`Row`].
    pub op: String,
    /// As in [`Row`].
    #[serde(deserialize_with = "present")]
    pub vector: Option<usize>,
    /// As in [`Row`].
    pub dtype: String,
    /// Kernels of the linear layers.
    pub kernels: Vec<String>,
    /// Of one forward pass.
    #[serde(flatten)]
    pub times: RowTimes,
    /// What of the median each part takes.
    #[serde(deserialize_with = "present")]
    pub parts: Option<Parts>,
    /// Texts in a second.
    #[serde(deserialize_with = "present")]
    pub sequences_per_second: Option<f64>,
    /// Tokens in a second, of a language model.
    #[serde(default)]
    pub tokens_per_second: Option<f64>,
    /// Against the dense row of the same file and phase.
    #[serde(deserialize_with = "present")]
    pub speedup_vs_dense: Option<f64>,
    /// As in [`Row`].
    #[serde(default)]
    pub speedup_noisy: bool,
    /// Bytes of the linear layers' weights on the device.
    #[serde(deserialize_with = "present")]
    pub weight_bytes: Option<usize>,
    /// Whether the result was found right.
    pub verified: bool,
    /// What was wrong, if it was not.
    #[serde(default)]
    pub failure: Option<String>,
    /// The command that measures this row again.
    pub command: String,
}

/// Milliseconds of a forward pass by part.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Parts {
    /// Linear layers.
    pub gemm_ms: f64,
    /// Attention.
    pub attention_ms: f64,
    /// Embeddings, normalisation, pooling.
    pub rest_ms: f64,
}

/// How good a model is, by what it was evaluated on: pairs of sentences, classes of texts, pictures, or the next token.
#[derive(Clone, Debug, Deserialize)]
pub struct Eval {
    /// Name or folder of the model.
    pub model: String,
    /// What its linear layers are: `none`, `2:4` or `V:2:4`.
    pub sparsity: String,
    /// Its linear layers by form; not in older files.
    #[serde(default)]
    pub linear_layers: Vec<LinearLayers>,
    /// What was done to the weights, as the model says it; not in older files.
    #[serde(default)]
    pub provenance: History,
    /// Element type.
    pub dtype: String,
    /// Spearman's correlation, where it was evaluated on pairs.
    pub spearman: Option<f64>,
    /// Pearson's correlation.
    pub pearson: Option<f64>,
    /// Number of pairs of sentences.
    pub pairs: Option<usize>,
    /// Their file; not in older files.
    pub pairs_file: Option<String>,
    /// Labels that a linear probe of the embeddings predicts.
    pub classification: Option<Classification>,
    /// Share of the pictures whose class a classifier of images has right.
    pub top1: Option<Share>,
    /// The same of its five likeliest classes.
    pub top5: Option<Share>,
    /// Number of pictures.
    pub images: Option<usize>,
    /// Their folder.
    pub images_folder: Option<String>,
    /// How a language model predicts a text; in files of `sparse24-perplexity/1`.
    #[serde(skip)]
    pub prediction: Option<Prediction>,
    /// The command that measures it again; older files have it in their environment alone.
    pub environment: CommandOrigin,
}

/// A share of right answers.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Share {
    /// Between 0 and 1.
    pub accuracy: f64,
    /// Where 95 % of other samples would have put it, where that can be told.
    pub interval: Option<Interval>,
}

/// From where to where.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// Labels of texts, predicted by a linear probe.
#[derive(Clone, Debug, Deserialize)]
pub struct Classification {
    /// File of texts and labels.
    pub file: String,
    /// Number of texts that it is reported on.
    pub texts: usize,
    /// Labels that are right.
    #[serde(flatten)]
    pub share: Share,
}

/// Tokens of a text, each predicted from those before it in its window.
#[derive(Clone, Debug, Deserialize)]
pub struct Prediction {
    /// Exponential of the mean loss.
    pub perplexity: f64,
    /// Mean negative logarithm of the probabilities, in nats per token.
    pub mean_loss: f64,
    /// Of the mean loss, over the windows.
    pub standard_error: f64,
    /// File of the text.
    pub text: String,
    /// Number of windows.
    pub windows: usize,
    /// Tokens of a window.
    pub context: usize,
}

impl Eval {
    fn parse(json: Value) -> Result<Self> {
        let prediction: Option<Prediction> = match json.get("schema").and_then(Value::as_str) {
            Some("sparse24-perplexity/1") => Some(fields("", json.clone())?),
            _ => None,
        };
        let eval = Self { prediction, ..fields("", json)? };
        eval.check().map_err(Error::invalid)?;
        Ok(eval)
    }

    fn check(&self) -> Checked {
        let classification = self.classification.as_ref().map(|of| of.share);
        for (name, share) in [("classification", classification), ("top1", self.top1), ("top5", self.top5)] {
            let Some(Share { accuracy, interval }) = share else { continue };
            let Interval { low, high } = interval.unwrap_or(Interval { low: accuracy, high: accuracy });
            if !(0.0 <= low && low <= accuracy && accuracy <= high && high <= 1.0) {
                return Err(format!("{name}: {accuracy} between {low} and {high} is no share"));
            }
        }
        for (name, of) in [("spearman", self.spearman), ("pearson", self.pearson)] {
            if !of.is_none_or(|of| (-1.0..=1.0).contains(&of)) {
                return Err(format!("{name}: {} is no correlation", of.unwrap_or(f64::NAN)));
            }
        }
        match self.prediction {
            // The first token of a window is not predicted.
            Some(Prediction { windows, context, .. }) if windows == 0 || context < 2 => {
                Err(format!("{windows} windows of {context} tokens have nothing to predict"))
            }
            Some(Prediction { perplexity, mean_loss, standard_error, .. })
                if !(agree(perplexity, mean_loss.exp()) && standard_error >= 0.0) =>
            {
                Err(format!("perplexity {perplexity} is not that of the mean loss {mean_loss} ± {standard_error}"))
            }
            _ => Ok(()),
        }
    }
}

/// Linear layers of one form.
#[derive(Clone, Debug, Deserialize)]
pub struct LinearLayers {
    /// Whether the model is stored so; else `eval` pruned them, by magnitude.
    pub stored: bool,
}

/// The part of the environment that the page shows of a file without times.
#[derive(Clone, Debug, Deserialize)]
pub struct CommandOrigin {
    /// The command that made it.
    pub command: String,
}

/// How a model was pruned.
#[derive(Clone, Debug, Deserialize)]
pub struct Prune {
    /// Folder or file that was pruned.
    pub input: String,
    /// What was written; older files say it in their command alone.
    #[serde(default)]
    pub output: Option<String>,
    /// Criterion.
    pub method: String,
    /// Every matrix that was pruned.
    pub layers: Vec<PrunedLayer>,
    /// Share of the linear weights that were pruned.
    pub pruned_share: f64,
    /// How it was retrained, if it was.
    #[serde(default)]
    pub retrained: Option<Retraining>,
    /// What was done to the weights, as the new file says it; not in older ones.
    #[serde(default)]
    pub provenance: History,
    /// The command that made it.
    pub command: String,
}

/// How a pruned model was retrained.
#[derive(Clone, Debug, Deserialize)]
pub struct Train {
    /// Folder that was retrained.
    pub input: String,
    /// What was written.
    pub output: String,
    /// What was done to the weights, as the new file says it.
    pub provenance: History,
    /// The run.
    #[serde(flatten)]
    pub run: Retraining,
    /// The command that made it.
    pub environment: CommandOrigin,
}

/// A run of retraining.
#[derive(Clone, Debug, Deserialize)]
pub struct Retraining {
    /// Texts that were trained on.
    pub texts: usize,
    /// Texts that were held out.
    pub held_out_texts: usize,
    /// `states`, `blocks` or `embeddings`.
    pub objective: String,
    /// Of each step, more than the page shows.
    pub steps: Vec<serde::de::IgnoredAny>,
    /// After how many steps the texts that are held out had which loss.
    pub held_out: Vec<(u64, f64)>,
    /// Of the whole run.
    pub seconds: f64,
    /// The step whose weights were written.
    pub best_step: u64,
    /// Its loss on texts that are held out.
    pub best_loss: f64,
}

/// What was done to the weights, one thing after the other.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct History {
    /// By what, and to which V.
    #[serde(default)]
    pub pruned: Option<String>,
    /// On which texts.
    #[serde(default)]
    pub retrained_on: Option<String>,
}

/// One matrix that was pruned.
#[derive(Clone, Debug, Deserialize)]
pub struct PrunedLayer {
    /// How many rows share a pattern.
    pub vector: usize,
}

/// What a model loses when one of its linear layers alone is pruned.
#[derive(Clone, Debug, Deserialize)]
pub struct Sensitivity {
    /// Name or folder of the model.
    pub model: String,
    /// What all rows depend on.
    pub settings: SensitivitySettings,
    /// The metric of the model as it is; null in a file of a run that had not come so far.
    pub dense: Option<f64>,
    /// Weights of all linear layers.
    pub linear_weights: usize,
    /// In the order in which the layers run.
    pub rows: Vec<SensitivityRow>,
}

/// How layers were pruned, and what the loss was measured by.
#[derive(Clone, Debug, Deserialize)]
pub struct SensitivitySettings {
    /// Criterion.
    pub method: String,
    /// `spearman`, `cosine` or `log_likelihood`.
    pub metric: String,
}

/// One layer alone in one pattern.
#[derive(Clone, Debug, Deserialize)]
pub struct SensitivityRow {
    /// Its name.
    pub layer: String,
    /// How many rows share a pattern.
    pub vector: usize,
    /// Its weights, before pruning.
    pub weights: usize,
    /// How much lower the metric is with it pruned.
    pub drop: f64,
    /// Whether that may be none, as far as its texts say; not in older files.
    #[serde(default)]
    pub within_noise: Option<bool>,
}

/// What a driver's compiler made of the kernels, without running them.
#[derive(Clone, Debug, Deserialize)]
pub struct Compile {
    /// What made it.
    pub program: String,
    /// Its version.
    pub version: String,
    /// Commit of its sources.
    #[serde(default)]
    pub commit: Option<String>,
    /// When, RFC 3339.
    pub date: String,
    /// How it was made.
    pub command: String,
    /// On what.
    pub device: CompileDevice,
    /// In the order of the registry.
    pub kernels: Vec<CompiledKernel>,
    /// Estimates against the dense kernel's; none where the rates or the machine code are not known.
    #[serde(default)]
    pub ratios: Vec<StaticRatio>,
}

/// A device that kernels were compiled for.
#[derive(Clone, Debug, Deserialize)]
pub struct CompileDevice {
    /// Its driver's name for it; a pretended one may have none.
    pub name: String,
    /// Driver and version.
    pub driver: String,
    /// Whose rates the estimates are by.
    pub architecture: Option<String>,
    /// What is taken for granted of them.
    #[serde(default)]
    pub assumed: String,
}

/// One kernel.
#[derive(Clone, Debug, Deserialize)]
pub struct CompiledKernel {
    /// Its name.
    pub kernel: String,
    /// Why the driver did not compile it.
    #[serde(deserialize_with = "present")]
    pub refused: Option<String>,
    /// Registers or instructions that go to memory.
    #[serde(default)]
    pub spills: Option<f64>,
}

/// How a kernel's estimate compares with the dense one's.
#[derive(Clone, Debug, Deserialize)]
pub struct StaticRatio {
    /// The kernel.
    pub kernel: String,
    /// Input features.
    pub k: usize,
    /// The fastest dense kernel by the same estimate, and its cycles over this one's.
    pub best: Option<(String, f64)>,
}

/// A field that may be null, but not absent.
fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(from: D) -> std::result::Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

impl File {
    /// Reads and checks a file.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text).map_err(|e| Error::invalid(format!("{}: {e}", path.display())))
    }

    /// Where measured times come from.
    pub(super) fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Bench(bench) => Some(&bench.environment),
            Self::Model(model) => Some(&model.environment),
            Self::Eval(_) | Self::Prune(_) | Self::Train(_) | Self::Sensitivity(_) | Self::Compile(_) => None,
        }
    }

    /// The command that made it, as far as the file says.
    pub(super) fn command(&self) -> &str {
        match self {
            Self::Bench(Bench { environment, .. }) | Self::Model(ModelBench { environment, .. }) => {
                &environment.command
            }
            Self::Eval(eval) => &eval.environment.command,
            Self::Prune(prune) => &prune.command,
            Self::Train(train) => &train.environment.command,
            Self::Sensitivity(_) => "-",
            Self::Compile(compile) => &compile.command,
        }
    }

    /// Reads and checks the text of a file.
    pub fn parse(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::invalid(format!("not JSON: {e}")))?;
        let schema = json.get("schema").and_then(Value::as_str).ok_or_else(|| {
            Error::invalid(
                "has no schema: a JSON file of `sparse24 bench`, `eval`, `perplexity`, `prune`, `retrain`, `sensitivity` or \
                 `kernels --compile` begins with one",
            )
        })?;
        match schema {
            super::SCHEMA => Bench::parse(&json).map(Self::Bench),
            super::MODEL_SCHEMA => ModelBench::parse(&json).map(Self::Model),
            "sparse24-eval/1" | "sparse24-perplexity/1" => Eval::parse(json).map(Self::Eval),
            "sparse24-prune/1" => Prune::parse(json).map(Self::Prune),
            "sparse24-train/1" => Train::parse(json).map(Self::Train),
            "sparse24-sensitivity/1" => Sensitivity::parse(&json).map(Self::Sensitivity),
            "sparse24-compile/1" => Compile::parse(json).map(Self::Compile),
            other => {
                let (name, version) = other.rsplit_once('/').unwrap_or((other, ""));
                let newer = SCHEMAS.contains(&name) && version.parse::<u32>().is_ok_and(|v| v > 1);
                Err(Error::invalid(if newer {
                    format!("schema {other} is newer than this sparse24, which reads {name}/1")
                } else {
                    format!("schema {other:?} is none of {}/1", SCHEMAS.join("/1, "))
                }))
            }
        }
    }
}

/// A value as a type, with its place in front of what is wrong with it.
fn fields<T: DeserializeOwned>(place: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Error::invalid(format!("{place}{e}")))
}

fn part<T: DeserializeOwned>(json: &Value, name: &str) -> Result<T> {
    let value = json.get(name).ok_or_else(|| Error::invalid(format!("missing field `{name}`")))?;
    fields(&format!("{name}: "), value.clone())
}

/// The rows of a file, each checked by itself.
fn rows<T: DeserializeOwned>(json: &Value, check: impl Fn(&T) -> Checked) -> Result<Vec<T>> {
    let values: Vec<Value> = part(json, "rows")?;
    let mut rows = Vec::new();
    for (at, value) in values.into_iter().enumerate() {
        let place = format!("row {}: ", at + 1);
        let row = fields(&place, value)?;
        check(&row).map_err(|what| Error::invalid(place + &what))?;
        rows.push(row);
    }
    if rows.is_empty() {
        return Err(Error::invalid("has no rows"));
    }
    Ok(rows)
}

/// Two figures that say the same, to what is left of them when people print them.
fn agree(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 0.02
}

impl Bench {
    fn parse(json: &Value) -> Result<Self> {
        let rows = rows(json, Row::check)?;
        let environment: Origin = part(json, "environment")?;
        for (at, row) in rows.iter().enumerate() {
            let place = |what: String| Err(Error::invalid(format!("row {}: {what}", at + 1)));
            if row.device != environment.device {
                return place(format!("device {:?} in a file of {:?}", row.device, environment.device));
            }
            let Some((own, ratio)) = row.times.median.zip(row.speedup_vs_dense) else { continue };
            let dense = || rows.iter().filter(|d| d.op == "dense" && d.layer() == row.layer());
            if dense().next().is_none() {
                return place("speedup_vs_dense without a dense row of the same shape and type".into());
            }
            let own_dense = dense().find(|d| d.times.median.is_some_and(|dense| agree(dense / own, ratio)));
            match own_dense {
                None => return place(format!("speedup_vs_dense {ratio} is not the ratio to the dense row's median")),
                Some(d) if d.clock != row.clock => {
                    let name = |r: &Row| r.clock.clone().unwrap_or_else(|| "no clock".into());
                    return place(format!("timed by {}, and its dense row by {}", name(row), name(d)));
                }
                Some(_) => {}
            }
        }
        let ceilings: Ceilings = part(json, "ceilings")?;
        let Ceilings { fma_f32_tflops, fma_f16_tflops, cooperative_f16_tflops, copy_gb_per_s, read_gb_per_s } =
            ceilings;
        let all = [fma_f32_tflops, fma_f16_tflops, cooperative_f16_tflops, copy_gb_per_s, read_gb_per_s];
        if !all.into_iter().flatten().all(|c| c.is_finite() && c > 0.0) {
            return Err(Error::invalid(format!("ceilings: not all are positive: {all:?}")));
        }
        Ok(Self { environment, ceilings, rows })
    }
}

impl Row {
    /// What makes two rows of a file comparable.
    pub(super) fn layer(&self) -> (usize, usize, usize, &str) {
        (self.m, self.n, self.k, &self.dtype)
    }

    /// `m x n x k`.
    pub(super) fn shape(&self) -> String {
        format!("{}x{}x{}", self.m, self.n, self.k)
    }

    fn check(&self) -> Checked {
        if [self.m, self.n, self.k].contains(&0) {
            return Err(format!("shape {}", self.shape()));
        }
        check_op(&self.op, self.vector)?;
        self.times.check(self.verified)?;
        let Some(median) = self.times.median else { return Ok(()) };
        let flops = 2.0 * self.m as f64 * self.n as f64 * self.k as f64;
        match self.effective_tflops {
            Some(tflops) if agree(tflops, flops / (median * 1e9)) => match self.executed_tflops {
                Some(executed) if executed > 0.0 && executed < 1.02 * tflops => Ok(()),
                other => Err(format!("executed_tflops {other:?} of {tflops} effective ones")),
            },
            Some(tflops) => Err(format!(
                "effective_tflops {tflops} and median_ms {median} do not agree on {}: {} TFLOPS: mixed units?",
                self.shape(),
                super::significant(flops / (median * 1e9), 3)
            )),
            None => Err("median_ms without effective_tflops".into()),
        }
    }
}

fn check_op(op: &str, vector: Option<usize>) -> Checked {
    match (op, vector) {
        ("dense" | "masked" | "masked24", None) => Ok(()),
        ("dense" | "masked" | "masked24", Some(v)) => Err(format!("op {op} with vector {v}")),
        ("sparse24" | "auto", Some(v)) => VectorLen::new(v).map(|_| ()).map_err(|e| e.to_string()),
        ("sparse24" | "auto", None) => Err(format!("op {op} without vector")),
        _ => Err(format!("op {op:?} is none of dense, sparse24, masked, masked24, auto")),
    }
}

impl RowTimes {
    /// Where the median lies with a probability of 95 %: see [`crate::measure::noise`].
    fn interval(self) -> Option<(f64, f64)> {
        self.median_low.zip(self.median_high)
    }

    /// From where to where the middle half of the samples lies; all of them, where no more is known.
    pub(super) fn middle(self) -> Option<(f64, f64)> {
        self.q1.zip(self.q3).or(self.min.zip(self.max))
    }

    /// Where the median may lie as far as the samples go: the middle half of them, and its interval where that reaches
    /// further, as it does with few samples.
    fn open(self) -> Option<(f64, f64)> {
        let (low, high) = self.middle()?;
        let (from, to) = self.interval().unwrap_or((low, high));
        Some((low.min(from), high.max(to)))
    }

    /// By which factor the samples differ.
    pub(super) fn factor(self) -> Option<f64> {
        self.max.zip(self.min).map(|(max, min)| max / min)
    }

    /// Whether these are less or greater than `other`, or cannot be told apart: where the middle halves overlap, or the
    /// intervals of the medians. `None` where a spread is not known. Each median lies within its middle half, so halves
    /// that are apart order them, too.
    pub(super) fn against(self, other: Self) -> Option<Ordering> {
        let ((low, high), (other_low, other_high)) = self.open().zip(other.open())?;
        Some(match () {
            () if high < other_low => Ordering::Less,
            () if low > other_high => Ordering::Greater,
            () => Ordering::Equal,
        })
    }

    fn check(self, verified: bool) -> Checked {
        let all = [self.min, self.q1, self.median, self.q3, self.max];
        if !verified {
            return match all.iter().all(Option::is_none) {
                true => Ok(()),
                false => Err("not verified, and has times all the same".into()),
            };
        }
        if self.median.is_none() || self.min.is_none() {
            return Err("verified, and has no median_ms or min_ms".into());
        }
        let around = |low: f64, high: f64| {
            0.0 < low && high < f64::MAX && self.median.is_some_and(|median| low <= median && median <= high)
        };
        if let Some((low, high)) = self.interval().filter(|&(low, high)| !around(low, high)) {
            return Err(format!("median_low_ms {low} and median_high_ms {high} are no interval around median_ms"));
        }
        let known: Vec<f64> = all.into_iter().flatten().collect();
        match known.iter().all(|t| t.is_finite() && *t > 0.0) && known.is_sorted() {
            true => Ok(()),
            false => Err(format!("times are not positive and in order from min_ms to max_ms: {known:?}")),
        }
    }
}

impl ModelBench {
    fn parse(json: &Value) -> Result<Self> {
        let check = |row: &ModelRow| -> Checked {
            check_op(&row.op, row.vector)?;
            row.times.check(row.verified)?;
            if row.verified && row.times.max.is_none() {
                return Err("verified, and has no max_ms".into());
            }
            let parts = row.parts.map_or([1.0; 3], |p| [p.gemm_ms, p.attention_ms, p.rest_ms]);
            if row.phase.as_deref().is_some_and(|phase| !["prefill", "decode"].contains(&phase)) {
                return Err(format!(
                    "phase {:?} is neither prefill nor decode",
                    row.phase.as_deref().unwrap_or_default()
                ));
            }
            if !parts.iter().all(|ms| ms.is_finite() && *ms >= 0.0) || parts.iter().sum::<f64>() <= 0.0 {
                return Err(format!("parts are not positive: {parts:?}"));
            }
            Ok(())
        };
        let rows = rows(json, check)?;
        let (batch, seq): (usize, usize) = (part(json, "batch")?, part(json, "seq")?);
        for (at, row) in rows.iter().enumerate() {
            let place = |what: String| Err(Error::invalid(format!("row {}: {what}", at + 1)));
            let Some(median) = row.times.median else { continue };
            if let Some(rate) = row.sequences_per_second.filter(|r| !agree(*r, batch as f64 / median * 1e3)) {
                return place(format!("sequences_per_second {rate} and median_ms {median} do not agree: mixed units?"));
            }
            let tokens = if row.phase.as_deref() == Some("decode") { batch } else { batch * seq };
            if let Some(rate) = row.tokens_per_second.filter(|r| !agree(*r, tokens as f64 / median * 1e3)) {
                return place(format!("tokens_per_second {rate} and median_ms {median} do not agree: mixed units?"));
            }
            if let Some(ratio) = row.speedup_vs_dense {
                let of = |d: &ModelRow| {
                    let of_pass = d.op == "dense" && d.phase == row.phase;
                    of_pass && d.times.median.is_some_and(|d| agree(d / median, ratio))
                };
                if !rows.iter().any(of) {
                    return place(format!("speedup_vs_dense {ratio} is not the ratio to a dense row's median"));
                }
            }
        }
        Ok(Self {
            environment: part(json, "environment")?,
            model: part(json, "model")?,
            linear_weights: part(json, "linear_weights")?,
            batch,
            seq,
            rows,
        })
    }
}

impl Sensitivity {
    fn parse(json: &Value) -> Result<Self> {
        let settings: SensitivitySettings = part(json, "settings")?;
        let linear_weights: usize = part(json, "linear_weights")?;
        let check = |row: &SensitivityRow| -> Checked {
            VectorLen::new(row.vector).map_err(|e| e.to_string())?;
            if row.weights == 0 || row.weights > linear_weights {
                return Err(format!("{} weights of {linear_weights} in all linear layers", row.weights));
            }
            // JSON has no infinities, and all metrics but one lie between -1 and 1.
            if row.drop.abs() > 2.0 && settings.metric != "log_likelihood" {
                return Err(format!("a drop of {}", row.drop));
            }
            Ok(())
        };
        let rows = rows(json, check)?;
        Ok(Self { model: part(json, "model")?, settings, dense: part(json, "dense")?, linear_weights, rows })
    }
}

impl Compile {
    fn parse(json: Value) -> Result<Self> {
        let compile: Self = fields("", json)?;
        if compile.kernels.is_empty() {
            return Err(Error::invalid("has no kernels"));
        }
        let unknown = |r: &&StaticRatio| !compile.kernels.iter().any(|k| k.kernel == r.kernel && k.refused.is_none());
        if let Some(ratio) = compile.ratios.iter().find(unknown) {
            return Err(Error::invalid(format!("ratios: {} was not compiled", ratio.kernel)));
        }
        let sound = |r: &StaticRatio| r.k > 0 && r.best.as_ref().is_none_or(|(_, x)| *x > 0.0);
        if let Some(ratio) = compile.ratios.iter().find(|r| !sound(r)) {
            return Err(Error::invalid(format!("ratios: {} is of {:?} at k = {}", ratio.kernel, ratio.best, ratio.k)));
        }
        Ok(compile)
    }
}

impl Prune {
    fn parse(json: Value) -> Result<Self> {
        let prune: Self = fields("", json)?;
        if let Some(run) = &prune.retrained {
            run.check().map_err(|what| Error::invalid(format!("retrained: {what}")))?;
        }
        Ok(prune)
    }

    /// Whether this run wrote the model of this name.
    pub(super) fn made(&self, model: &str) -> bool {
        match &self.output {
            Some(output) => output == model,
            None => self.command.split_whitespace().skip(3).any(|word| word == model),
        }
    }
}

impl Train {
    fn parse(json: Value) -> Result<Self> {
        let train: Self = fields("", json)?;
        train.run.check().map_err(Error::invalid)?;
        Ok(train)
    }
}

impl Retraining {
    fn check(&self) -> Checked {
        let Self { steps, held_out, seconds, best_step, best_loss, .. } = self;
        let in_order = held_out.is_sorted_by(|a, b| a.0 < b.0);
        if !in_order || held_out.last().is_none_or(|(step, _)| *step > steps.len() as u64) {
            return Err(format!("held_out: its steps are not in order, or not among the {} of the run", steps.len()));
        }
        if !held_out.iter().all(|(_, loss)| *loss >= 0.0) || *seconds <= 0.0 {
            return Err("a loss is negative, or the seconds are not above 0".into());
        }
        match held_out.contains(&(*best_step, *best_loss)) {
            true => Ok(()),
            false => Err(format!("best_loss {best_loss} of step {best_step} is not in held_out")),
        }
    }
}
