//! `sparse24 sensitivity`: what a model loses when one of its linear layers alone is pruned.
//!
//! One pass over the layers in the order in which they run: a layer's inputs are counted where the method asks for them,
//! the layer is pruned, the model is evaluated with it in its place, and it is put back. A file of results grows with
//! every layer, so that an interrupted run goes on where it stopped. Invariant: all rows of a file were measured with
//! the settings that it states.

mod file;
mod plot;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use self::file::{Row, Settings, identity};
use super::args::read_lines;
use super::eval::{Pairs, similarities_of, spearman};
use super::{Outcome, model, print, progress, writable};
use sparse24::bert::{Batching, Calibration, Checkpoint, Inputs, Model, Probe, Times, Tokenizer};
use sparse24::choose::Candidate;
use sparse24::engine::Device;
use sparse24::io::{Source, write_atomically};
use sparse24::prune::{Method, SparseGpt, Statistics};
use sparse24::{Error, LinearWeights, Mask, Mask24, Matrix, Sparse24, VectorLen};

pub(super) use self::file::Sensitivity;

/// Measure what a model loses when one linear layer alone is pruned, layer by layer and pattern by pattern.
///
/// With --pairs the loss is the drop of Spearman's correlation between people's scores and the similarities of the
/// embeddings; with --input it is 1 - the mean cosine similarity to the dense model's embeddings. Prints a table, the
/// least harmful layers for their weights first; Q, K and V are one layer. A run that was interrupted goes on where it
/// stopped when it is started again with the same JSON file.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 sensitivity --model model/minilm --pairs stsb-dev.csv --out minilm.json --out minilm.svg
  sparse24 sensitivity --model model/minilm --input texts.txt --method sparsegpt --calibration texts.txt --vectors 32")]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::ModelArgs,
    #[command(flatten)]
    metric: MetricArgs,
    #[command(flatten)]
    pruning: PruningArgs,
    /// Patterns to try: how many rows share one, separated by commas.
    #[arg(long, value_name = "V,...", value_delimiter = ',', default_value = "1,4,32")]
    vectors: Vec<VectorLen>,
    /// Write the result: as JSON (schema sparse24-sensitivity/1) to a name that ends in .json, as a plot to one that
    /// ends in .svg. May be given twice. What is already in the JSON file, made with the same settings, is not measured
    /// again, so that the plot of a finished run is drawn at once.
    #[arg(long, value_name = "FILE.json|FILE.svg")]
    out: Vec<PathBuf>,
}

/// The flags that say what a model's quality is.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "metric", multiple = false)]
pub(super) struct MetricArgs {
    /// CSV file, UTF-8: two sentences and a score that people gave them on each line.
    #[arg(long, value_name = "CSV")]
    pub(super) pairs: Option<PathBuf>,
    /// File with a text on each line, UTF-8.
    #[arg(long, value_name = "TXT")]
    pub(super) input: Option<PathBuf>,
}

/// The flags that say how layers are pruned.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct PruningArgs {
    /// How weights are chosen: magnitude, magnitude-l2, random, obd, wanda or sparsegpt.
    #[arg(long, default_value = "magnitude")]
    pub(super) method: Method,
    /// File with a text on each line, UTF-8: the inputs that obd, wanda and sparsegpt go by.
    #[arg(long, value_name = "TXT")]
    pub(super) calibration: Option<PathBuf>,
    /// Seed of the method random.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub(super) seed: u64,
}

/// How layers are pruned.
#[derive(Clone, Copy)]
pub(super) struct Pruning {
    pub(super) method: Method,
    pub(super) seed: u64,
    /// Of sparsegpt.
    pub(super) damping: f64,
}

impl Pruning {
    /// Prunes a matrix. Each name has a seed of its own, whatever the order. Weights that are zero stay zero.
    pub(super) fn prune(
        &self,
        name: &str,
        w: &Matrix,
        vector: VectorLen,
        statistics: Option<&Statistics>,
    ) -> sparse24::Result<(Matrix, Mask24)> {
        match (self.method, statistics) {
            (Method::SparseGpt, Some(statistics)) => {
                let how = SparseGpt { damping: self.damping, ..SparseGpt::new(vector) };
                how.prune(w, statistics, Some(&Mask::of_nonzeros(w)?))
            }
            (method, statistics) => {
                // FNV-1a.
                let mix = |seed: u64, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
                method.prune(w, vector, statistics, name.bytes().fold(self.seed, mix))
            }
        }
    }
}

impl PruningArgs {
    fn pruning(&self) -> Pruning {
        Pruning { method: self.method, seed: self.seed, damping: SparseGpt::new(VectorLen::ONE).damping }
    }

    /// The calibration texts as token ids. An error if the method needs them and there are none, or the other way round.
    fn read(&self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
        let method = self.method;
        match &self.calibration {
            Some(path) if method.needs_statistics() => calibration(path, tokenizer),
            Some(_) => bail!("--calibration: the method {method} reads no inputs"),
            None if method.needs_statistics() => bail!("the method {method} needs --calibration, a file of texts"),
            None => Ok(Vec::new()),
        }
    }
}

/// The texts of a file as token ids: of --calibration. A blank line is no text to learn from.
pub(super) fn calibration(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    let mut texts = read_lines(path).context("--calibration")?;
    texts.retain(|text| !text.trim().is_empty());
    ensure!(!texts.is_empty(), "--calibration: {} has no texts", path.display());
    let tokens = tokenizer.encode(&texts)?;
    model::warn_of_truncation(tokens.truncated, texts.len(), tokenizer);
    Ok(tokens.ids)
}

/// Texts, and what is made of their embeddings.
pub(super) struct Metric {
    texts: Vec<Vec<u32>>,
    /// People's scores of each two texts; without them, embeddings are compared with the dense model's.
    scores: Option<Vec<f64>>,
}

impl Metric {
    /// Reads the texts. An error if neither flag was given.
    pub(super) fn read(args: &MetricArgs, tokenizer: &Tokenizer) -> Result<Self> {
        let (texts, scores) = match (&args.pairs, &args.input) {
            (Some(pairs), _) => {
                let Pairs { sentences, scores, .. } = Pairs::read(pairs).context("--pairs")?;
                (sentences, Some(scores))
            }
            (None, Some(input)) => {
                let texts = read_lines(input).context("--input")?;
                ensure!(!texts.is_empty(), "--input: {} has no texts", input.display());
                (texts, None)
            }
            (None, None) => bail!("--pairs or --input is needed: what the model's quality is measured on"),
        };
        let tokens = tokenizer.encode(&texts)?;
        model::warn_of_truncation(tokens.truncated, texts.len(), tokenizer);
        Ok(Self { texts: tokens.ids, scores })
    }

    /// `spearman` or `cosine`: a name for the metric.
    pub(super) fn name(&self) -> &'static str {
        if self.scores.is_some() { "spearman" } else { "cosine" }
    }

    /// Its value on a model's embeddings, as against those of the dense model: 1 is as good as can be.
    fn value(&self, embeddings: &Matrix, dense: &Matrix) -> sparse24::Result<f64> {
        let numbers = embeddings.elements().to_f32();
        if !numbers.iter().all(|x| x.is_finite()) {
            return Err(Error::Invalid("activations overflow their type".into()));
        }
        let Some(scores) = &self.scores else {
            let dots = numbers.iter().zip(dense.elements().to_f32()).map(|(&a, b)| f64::from(a) * f64::from(b));
            return Ok(dots.sum::<f64>() / embeddings.rows() as f64);
        };
        let constant = || Error::Invalid("all scores or all similarities are the same: no correlation".into());
        spearman(&similarities_of(embeddings), scores).ok_or_else(constant)
    }
}

/// A metric with the dense model's embeddings and its value of them.
pub(super) struct Baseline<'a> {
    metric: &'a Metric,
    embeddings: Matrix,
    value: f64,
}

impl<'a> Baseline<'a> {
    /// Embeds the texts with the model as it is.
    pub(super) fn new(
        metric: &'a Metric,
        device: &Device,
        checkpoint: &Checkpoint,
        batching: Batching,
    ) -> sparse24::Result<Self> {
        let embeddings = Model::new(device, checkpoint)?.embed(&metric.texts, batching)?;
        let value = metric.value(&embeddings, &embeddings)?;
        Ok(Self { metric, embeddings, value })
    }

    /// The metric's value on the dense model.
    pub(super) fn value(&self) -> f64 {
        self.value
    }

    /// How much lower the metric is on these embeddings of the same texts.
    fn drop(&self, embeddings: &Matrix) -> sparse24::Result<f64> {
        Ok(self.value - self.metric.value(embeddings, &self.embeddings)?)
    }

    /// How much lower the metric is on another model.
    pub(super) fn drop_of(
        &self,
        device: &Device,
        checkpoint: &Checkpoint,
        batching: Batching,
    ) -> sparse24::Result<f64> {
        self.drop(&Model::new(device, checkpoint)?.embed(&self.metric.texts, batching)?)
    }
}

/// A model, where it runs, and how its layers are pruned.
pub(super) struct Subject<'a> {
    pub(super) device: &'a Device,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) batching: Batching,
    pub(super) pruning: Pruning,
    /// The calibration texts as token ids; none where the method reads no inputs.
    pub(super) calibration: &'a [Vec<u32>],
}

impl Subject<'_> {
    /// The rows to measure, in the order in which they can be: every dense linear layer in each pattern, for Q, K and V
    /// the longest one that fits.
    pub(super) fn rows(&self, vectors: &[VectorLen]) -> Vec<(String, VectorLen)> {
        let mut rows = Vec::new();
        for (name, w) in self.checkpoint.linears() {
            for &vector in vectors {
                let row = (name.clone(), self.checkpoint.fitting_vector(&name, vector));
                if matches!(w, LinearWeights::Dense(_)) && !rows.contains(&row) {
                    rows.push(row);
                }
            }
        }
        rows
    }

    /// Measures these rows, each a layer alone, and hands every one's drop to `done`.
    pub(super) fn measure(
        &self,
        baseline: &Baseline<'_>,
        rows: &[(String, VectorLen)],
        done: &mut dyn FnMut(Row) -> sparse24::Result<()>,
    ) -> sparse24::Result<()> {
        let Self { device, checkpoint, batching, pruning, calibration } = *self;
        let mut of_layer: BTreeMap<&str, Vec<VectorLen>> = BTreeMap::new();
        for (name, vector) in rows {
            of_layer.entry(name).or_default().push(*vector);
        }
        let mut probe = Probe::new(device, checkpoint, &baseline.metric.texts, batching)?;
        let mut visit = |name: &str, w: &LinearWeights, statistics: Option<&Statistics>| -> sparse24::Result<()> {
            let Some(vectors) = of_layer.get(name) else { return Ok(()) };
            let w = w.to_dense()?;
            for &vector in vectors {
                let (pruned, mask) = pruning.prune(name, &w, vector, statistics)?;
                let embeddings = probe.embed(name, Sparse24::compress(&pruned, &mask)?.into())?;
                let drop = baseline.drop(&embeddings)?;
                done(Row { layer: name.to_owned(), vector: vector.get(), weights: w.rows() * w.cols(), drop })?;
            }
            Ok(())
        };
        if !pruning.method.needs_statistics() {
            return checkpoint.linears().try_for_each(|(name, w)| visit(&name, w, None));
        }
        let how = Calibration { batching, gram: pruning.method.needs_gram(), inputs: Inputs::Dense };
        // Nothing takes a layer's place, so that its copy stays as it is.
        checkpoint.clone().calibrate(device, calibration, how, &mut |name, w, statistics| {
            visit(name, w, Some(statistics)).map(|()| None)
        })
    }
}

/// What was measured as something to choose from; with times, for a choice by speed.
pub(super) fn candidates(rows: &[Row], times: Option<&Times>) -> Result<Vec<Candidate>> {
    let mut candidates: Vec<Candidate> = Vec::new();
    for Row { layer, vector, weights, drop } in rows {
        let form = |vector: Option<VectorLen>, drop| Candidate {
            layer: layer.clone(),
            vector,
            drop,
            weights: *weights,
            seconds: times.and_then(|times| times.of(layer, vector)),
        };
        if !candidates.iter().any(|c| c.layer == *layer) {
            candidates.push(form(None, 0.0));
        }
        candidates.push(form(Some(VectorLen::new(*vector)?), *drop));
    }
    Ok(candidates)
}

/// The outputs by kind, each checked before the work starts.
#[derive(Default)]
struct Outputs {
    json: Option<PathBuf>,
    svg: Option<PathBuf>,
}

impl Outputs {
    fn new(paths: &[PathBuf]) -> Result<Self> {
        let mut outputs = Self::default();
        for path in paths {
            let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
            let of = match extension.as_deref() {
                Some("json") => &mut outputs.json,
                Some("svg") => &mut outputs.svg,
                _ => bail!("--out: {} ends neither in .json nor in .svg", path.display()),
            };
            if let Some(other) = of.replace(writable(path).context("--out")?) {
                bail!("--out: {} and {} are of one kind", other.display(), path.display());
            }
        }
        Ok(outputs)
    }
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let out = Outputs::new(&args.out)?;
    let model::Loaded { device, tokenizer, checkpoint, batching } = args.model.load()?;
    let (pruning, calibration) = (args.pruning.pruning(), args.pruning.read(&tokenizer)?);
    let metric = Metric::read(&args.metric, &tokenizer)?;
    let subject = Subject { device: &device, checkpoint: &checkpoint, batching, pruning, calibration: &calibration };
    let mut rows = subject.rows(&args.vectors);
    ensure!(!rows.is_empty(), "{} has no dense linear layers to prune", args.model.name.get());

    let mut result = Sensitivity::new(args.model.name.get().to_owned(), settings(args, &metric, &device)?);
    if let Some(path) = out.json.as_deref().filter(|path| path.exists()) {
        result.resume(path)?;
        rows.retain(|(layer, vector)| !result.has(layer, *vector));
    }
    if !rows.is_empty() {
        let bar = progress(rows.len());
        let baseline = Baseline::new(&metric, &device, &checkpoint, batching)?;
        result.dense = baseline.value();
        result.linear_weights = checkpoint.config().linear_weights();
        // However often it was interrupted, the file is the same in the end.
        let order: Vec<String> = checkpoint.linears().map(|(name, _)| name).collect();
        subject.measure(&baseline, &rows, &mut |row| {
            bar.set_message(format!("{} at V={}", row.layer, row.vector));
            bar.inc(1);
            result.rows.push(row);
            result.rows.sort_by_key(|row| (order.iter().position(|name| *name == row.layer), row.vector));
            out.json.as_deref().map_or(Ok(()), |path| result.write(path))
        })?;
        bar.finish_and_clear();
    }
    print(&text(&result))?;
    if let Some(path) = &out.svg {
        let svg = plot::svg(&result)?;
        write_atomically(path, |file| file.write_all(svg.as_bytes()))?;
    }
    Ok(Outcome::Fine)
}

/// Everything that a row depends on but its layer and pattern.
fn settings(args: &Args, metric: &Metric, device: &Device) -> Result<Settings> {
    let files = model::files(args.model.name.get())?;
    let of = |path: &Option<PathBuf>| path.as_deref().map(|path| identity(&[path])).transpose();
    // All shards of a model.
    let shards = |path: &Path| -> Result<Vec<PathBuf>> {
        Ok(Source::open(path)?.files().iter().map(|file| file.path().to_owned()).collect())
    };
    let mut model = vec![files.config.clone(), files.tokenizer.clone()];
    model.extend(files.sentences.clone().filter(|path| path.exists()));
    if files.weights.exists() {
        model.extend(shards(&files.weights)?);
    }
    let over = args.model.weights.as_deref().map(shards).transpose()?;
    let paths = |paths: &[PathBuf]| identity(&paths.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    let pruning = &args.pruning;
    Ok(Settings {
        model: paths(&model)?,
        weights: over.as_deref().map(paths).transpose()?,
        sparsity: args.model.sparsity.to_string(),
        dtype: sparse24::DType::from(args.model.dtype).to_string(),
        device: device.info().name().to_owned(),
        method: pruning.method.name().to_owned(),
        seed: (pruning.method == Method::Random).then_some(pruning.seed),
        damping: (pruning.method == Method::SparseGpt).then_some(SparseGpt::new(VectorLen::ONE).damping),
        calibration: of(&pruning.calibration)?,
        metric: metric.name().to_owned(),
        texts: identity(
            &args.metric.pairs.iter().chain(&args.metric.input).map(PathBuf::as_path).collect::<Vec<&Path>>(),
        )?,
    })
}

/// The table, the least harmful rows first.
fn text(result: &Sensitivity) -> String {
    let Sensitivity { settings, dense, .. } = result;
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_header(["layer", "V", "drop", "of the weights", "drop per 1 %"]);
    let share = |row: &Row| 100.0 * row.weights as f64 / result.linear_weights as f64;
    let mut rows: Vec<&Row> = result.rows.iter().collect();
    rows.sort_by(|a, b| (a.drop / share(a)).total_cmp(&(b.drop / share(b))));
    for row in rows {
        table.add_row([
            row.layer.clone(),
            row.vector.to_string(),
            format!("{:.6}", row.drop),
            format!("{:.2} %", share(row)),
            format!("{:.6}", row.drop / share(row)),
        ]);
    }
    for column in 1..=4 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let metric = match settings.metric.as_str() {
        "spearman" => format!("Spearman's correlation, {dense:.4} dense, less what it is"),
        _ => "1 - the mean cosine similarity to the dense model's embeddings".to_owned(),
    };
    format!(
        "{}, {}, on {}, by {}\n\n{}\n\n\
         drop: {metric} with this layer alone pruned; below 0 is a gain\n\
         of the weights: of those of all linear layers; rows are sorted by drop per weight\n",
        result.model,
        settings.dtype,
        settings.device,
        settings.method,
        table.trim_fmt()
    )
}
