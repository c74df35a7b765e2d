//! `sparse24 sensitivity`: what a model loses when one of its linear layers alone is pruned.
//!
//! A file of results grows with every layer, so that an interrupted run goes on where it stopped. Invariant: all rows
//! of a file were measured with the settings that it states.

mod file;
mod plot;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use self::file::Settings;
pub(super) use self::file::{identity, identity_of};
use super::args::{DASH, Json, Usage, ensure_usage, lines, name_of, one_stdin, whole, whole_text};
use super::eval::Pairs;
use super::{Outcome, model, print, print_json, progress, writable};
use sparse24::VectorLen;
use sparse24::bootstrap::Interval;
use sparse24::engine::Device;
use sparse24::graph::{Graph, Sparsity};
use sparse24::io::{Source, write_atomically};
use sparse24::prune::{Method, Pruning, SparseGpt};
use sparse24::text::sensitivity::{Baseline, Metric, Subject};
use sparse24::text::{Similarity, Tokenizer};

use self::file::{Row, Sensitivity};

/// Measure what a model loses when one linear layer alone is pruned, layer by layer and pattern by pattern.
///
/// With --pairs the loss is the drop of Spearman's correlation between people's scores and the similarities of the
/// embeddings; with --input it is 1 - the mean cosine similarity to the dense model's embeddings, and of a language
/// model what the mean log-probability of the file's tokens loses: 0.01 is one percent more perplexity. Prints a table,
/// the least harmful layers for their weights first; Q, K and V are one layer. A drop is marked where it is within
/// noise: where the texts, drawn 1000 times anew with replacement, show none as well. A run that was interrupted goes
/// on where it stopped when it is started again with the same JSON file.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 sensitivity model/minilm --pairs stsb-dev.csv --json minilm.json --plot minilm.svg
  sparse24 sensitivity model/minilm --input a.txt --method sparsegpt --calibration b.txt --vector 32
  sparse24 sensitivity model/smollm2 --input wikitext2-valid.txt --windows 8 --vector 1")]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::ModelArgs,
    #[command(flatten)]
    metric: MetricArgs,
    #[command(flatten)]
    pruning: PruningArgs,
    /// Patterns to try: how many rows share one, separated by commas.
    #[arg(long, alias = "vectors", value_name = "V,...", value_delimiter = ',', default_value = "1,4,32")]
    vector: Vec<VectorLen>,
    /// As the other commands take it. A model that is pruned first has no layers left to try.
    #[arg(long, value_name = "none|2:4", default_value = "none", hide = true)]
    sparsity: Sparsity,
    /// Draw the result: a line for each layer and a dot for each pattern, hollow where the drop is within noise. What
    /// is already in the --json file, made with the same settings, is not measured again, so that the plot of a
    /// finished run is drawn at once.
    #[arg(long, value_name = "FILE.svg", value_parser = plot_name)]
    plot: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

/// The value of --plot. A model's name in its place must not be taken for the file to write.
fn plot_name(text: &str) -> Result<PathBuf, &'static str> {
    match Path::new(text).extension() {
        Some(extension) if extension.eq_ignore_ascii_case("svg") => Ok(text.into()),
        _ => Err("the file's name must end in .svg"),
    }
}

/// The flags that say what a model's quality is.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "metric", multiple = true)]
pub(super) struct MetricArgs {
    /// CSV file, UTF-8, or `-` for stdin: two sentences and a score that people gave them on each line.
    #[arg(long, value_name = "CSV")]
    pub(super) pairs: Option<PathBuf>,
    /// File with a text on each line, UTF-8, or `-` for stdin. A language model reads it as a whole, in windows of 512
    /// tokens side by side, as `sparse24 perplexity` does.
    #[arg(long, value_name = "TXT")]
    pub(super) input: Option<PathBuf>,
    /// The most windows that a language model reads of --input; 16 unless given.
    #[arg(long, value_name = "N", requires = "input")]
    pub(super) windows: Option<NonZeroUsize>,
}

/// The flags that say how layers are pruned.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct PruningArgs {
    /// How weights are chosen: magnitude, magnitude-l2, random, obd, wanda or sparsegpt.
    #[arg(long, default_value = "magnitude")]
    pub(super) method: Method,
    /// File with a text on each line, UTF-8, or `-` for stdin: the inputs that obd, wanda and sparsegpt go by.
    #[arg(long, value_name = "TXT")]
    pub(super) calibration: Option<PathBuf>,
    /// Seed of the method random.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub(super) seed: u64,
}

impl PruningArgs {
    fn pruning(&self) -> Pruning {
        let SparseGpt { damping, exchanges, .. } = SparseGpt::new(VectorLen::ONE);
        Pruning { method: self.method, seed: self.seed, damping, exchanges }
    }

    /// An error of usage if the method needs calibration texts and there are none, or the other way round.
    fn check(&self) -> Result<()> {
        let (method, needed) = (self.method, self.method.needs_statistics());
        ensure_usage!(needed || self.calibration.is_none(), "--calibration: the method {method} reads no inputs");
        ensure_usage!(
            !needed || self.calibration.is_some(),
            "the method {method} needs --calibration, a file of texts"
        );
        Ok(())
    }
}

/// Texts as token ids, and what tells them from others.
#[derive(Default)]
pub(super) struct Texts {
    pub(super) ids: Vec<Vec<u32>>,
    /// The first of them as they are written.
    pub(super) samples: Vec<String>,
    identity: String,
}

impl Texts {
    /// Most texts that are kept as they are written.
    const SAMPLES: usize = 1000;

    /// The file of these texts as a record of what weights were made from names it: by its name alone, as where it lies
    /// is nobody else's business, and by what tells its contents from others.
    pub(super) fn described(&self, file: &Path) -> String {
        counted(file, self.ids.len(), "texts", &self.identity)
    }

    /// So many of them at most, evenly spread over the file, and how a record names them.
    pub(super) fn some(&self, file: &Path, most: usize) -> (Vec<Vec<u32>>, String) {
        let all = self.ids.len();
        if all <= most {
            return (self.ids.clone(), self.described(file));
        }
        let ids = (0..most).map(|i| self.ids[i * all / most].clone()).collect();
        (ids, counted(file, most, &format!("of {all} texts"), &self.identity))
    }
}

/// So many texts of a file, or images of a folder, as a record of what weights were made from names them.
pub(super) fn counted(file: &Path, count: usize, of: &str, identity: &str) -> String {
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.filter(|name| name != DASH).unwrap_or_else(|| name_of(file));
    format!("{name} ({count} {of}, {identity})")
}

/// The texts of an option's file. A blank line is no text to learn from.
pub(super) fn texts_of(option: &str, input: &Path, tokenizer: &Tokenizer) -> Result<Texts> {
    let text = whole(input).with_context(|| option.to_owned())?;
    let mut texts = lines(&text[..]).with_context(|| format!("{option}: {}", name_of(input)))?;
    texts.retain(|text| !text.trim().is_empty());
    ensure!(!texts.is_empty(), "{option}: {} has no texts", name_of(input));
    let tokens = tokenizer.encode(&texts)?;
    model::warn_of_truncation(tokens.truncated, texts.len(), tokenizer);
    texts.truncate(Texts::SAMPLES);
    Ok(Texts { ids: tokens.ids, samples: texts, identity: identity_of(&text) })
}

/// A metric, and the file that its texts are of.
pub(super) struct ReadMetric {
    pub(super) metric: Metric,
    identity: String,
}

/// Tokens of a window of a language model's text, unless it takes fewer, and how many are read unless it is said.
const WINDOW_TOKENS: usize = 512;
const WINDOWS: usize = 16;

impl MetricArgs {
    /// The inputs by their options, for [`one_stdin`].
    pub(super) fn inputs(&self) -> [(&'static str, Option<&Path>); 2] {
        [("--pairs", self.pairs.as_deref()), ("--input", self.input.as_deref())]
    }
}

impl ReadMetric {
    /// Reads the texts. An error of usage if neither flag was given, or one that is not for this model.
    pub(super) fn read(
        args: &MetricArgs,
        tokenizer: &Tokenizer,
        similarity: Similarity,
        graph: &Graph,
    ) -> Result<Self> {
        if graph.head().is_some() {
            return Self::of_language_model(args, tokenizer, graph);
        }
        ensure_usage!(args.windows.is_none(), "--windows is for language models: others have a text on each line");
        let (texts, scores, text) = match (&args.pairs, &args.input) {
            (Some(pairs), _) => {
                let text = whole(pairs).context("--pairs")?;
                let Pairs { sentences, scores, .. } =
                    Pairs::parse(&text[..]).with_context(|| format!("--pairs: {}", name_of(pairs)))?;
                (sentences, Some((scores, similarity)), text)
            }
            (None, Some(input)) => {
                let text = whole(input).context("--input")?;
                let texts = lines(&text[..]).with_context(|| format!("--input: {}", name_of(input)))?;
                ensure!(!texts.is_empty(), "--input: {} has no texts", name_of(input));
                (texts, None, text)
            }
            (None, None) => return Err(Usage::error(NO_METRIC)),
        };
        let tokens = tokenizer.encode(&texts)?;
        model::warn_of_truncation(tokens.truncated, texts.len(), tokenizer);
        Ok(Self { metric: Metric::new(tokens.ids, scores)?, identity: identity_of(&text) })
    }

    fn of_language_model(args: &MetricArgs, tokenizer: &Tokenizer, graph: &Graph) -> Result<Self> {
        ensure_usage!(args.pairs.is_none(), "--pairs is of embeddings, which a language model does not make: --input");
        let Some(input) = &args.input else { return Err(Usage::error(NO_METRIC)) };
        let text = whole_text(input).context("--input")?;
        let name = || format!("--input: {}", name_of(input));
        let ids = tokenizer.long_text(&text).with_context(name)?;
        let tokens = WINDOW_TOKENS.min(graph.limits().tokens);
        let windows: Vec<Vec<u32>> =
            ids.chunks_exact(tokens).take(args.windows.map_or(WINDOWS, usize::from)).map(<[_]>::to_vec).collect();
        ensure!(!windows.is_empty(), "{}: {} tokens are no window of {tokens}", name(), ids.len());
        Ok(Self { metric: Metric::of_tokens(windows)?, identity: identity_of(text.as_bytes()) })
    }

    /// What the metric is of, as a record of what weights were made from names it.
    pub(super) fn described(&self, args: &MetricArgs) -> String {
        let file = args.pairs.as_deref().or(args.input.as_deref()).unwrap_or(Path::new(DASH));
        let of = match (&args.pairs, self.metric.is_of_tokens()) {
            (Some(_), _) => "pairs",
            (None, true) => "windows",
            (None, false) => "texts",
        };
        counted(file, self.metric.count(), of, &self.identity)
    }
}

/// Why there is nothing to measure by.
const NO_METRIC: &str = "--pairs or --input is needed: what the model's quality is measured on";

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    args.pruning.check()?;
    ensure_usage!(args.metric.pairs.is_some() || args.metric.input.is_some(), "{NO_METRIC}");
    ensure_usage!(args.metric.pairs.is_none() || args.metric.input.is_none(), "--pairs cannot be used with --input");
    let [pairs, input] = args.metric.inputs();
    one_stdin(&[pairs, input, ("--calibration", args.pruning.calibration.as_deref())])?;
    let json = args.json.file()?;
    let plot = args.plot.as_deref().map(writable).transpose().context("--plot")?;

    let model::Loaded { device, tokenizer, checkpoint, pipeline, batching, prompt, similarity, .. } =
        args.model.load_any(args.sparsity)?;
    let pruning = args.pruning.pruning();
    let calibrated =
        args.pruning.calibration.as_deref().map(|path| texts_of("--calibration", path, &tokenizer)).transpose()?;
    let ReadMetric { metric, identity } = ReadMetric::read(&args.metric, &tokenizer, similarity, checkpoint.graph())?;
    let no_texts = Texts::default();
    let calibration = &calibrated.as_ref().unwrap_or(&no_texts).ids;
    let subject =
        Subject { device: &device, checkpoint: &checkpoint, pipeline: &pipeline, batching, pruning, calibration };
    let mut rows = subject.rows(&args.vector);
    ensure!(!rows.is_empty(), "{} has no dense linear layers to prune", args.model.name.get());

    let settings = settings(args, (&metric, identity), calibrated.as_ref(), &device, prompt)?;
    let mut result = Sensitivity::new(args.model.name.get().to_owned(), settings);
    if let Some(path) = json.as_deref().filter(|path| path.exists()) {
        result.resume(path)?;
        rows.retain(|(layer, vector)| !result.has(layer, *vector));
    }
    if !rows.is_empty() {
        let bar = progress(rows.len());
        let baseline = Baseline::new(&metric, &subject)?;
        result.dense = baseline.value();
        result.linear_weights = checkpoint.graph().linear_weights();
        // However often it was interrupted, the file is the same in the end.
        let order: Vec<String> = checkpoint.linears().map(|(name, _)| name).collect();
        subject.measure(&baseline, &rows, &mut |alone| {
            bar.set_message(format!("{} at V={}", alone.layer, alone.vector));
            bar.inc(1);
            result.rows.push(alone.into());
            result.rows.sort_by_key(|row| (order.iter().position(|name| *name == row.layer), row.vector));
            json.as_deref().map_or(Ok(()), |path| result.write(path))
        })?;
        bar.finish_and_clear();
    }
    // The file is written as the rows come: a finished one stays as it is.
    match args.json.on_stdout() {
        true => print_json(&result)?,
        false => print(&text(&result))?,
    }
    if let Some(path) = &plot {
        let svg = plot::svg(&result)?;
        write_atomically(path, |file| file.write_all(svg.as_bytes()))?;
    }
    Ok(Outcome::Fine)
}

/// Everything that a row depends on but its layer and pattern.
fn settings(
    args: &Args,
    (metric, texts): (&Metric, String),
    calibration: Option<&Texts>,
    device: &Device,
    prompt: Option<String>,
) -> Result<Settings> {
    let files = model::files(args.model.name.get())?;
    // All shards of a model.
    let shards = |path: &Path| -> Result<Vec<PathBuf>> {
        Ok(Source::open(path)?.files().iter().map(|file| file.path().to_owned()).collect())
    };
    let mut model = vec![files.config.clone(), files.tokenizer.clone()];
    model.extend(files.of_sentences()?);
    if files.weights.exists() {
        model.extend(shards(&files.weights)?);
    }
    let over = args.model.weights.as_deref().map(shards).transpose()?;
    let paths = |paths: &[PathBuf]| identity(&paths.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    let pruning = &args.pruning;
    Ok(Settings {
        model: paths(&model)?,
        weights: over.as_deref().map(paths).transpose()?,
        sparsity: args.sparsity.to_string(),
        dtype: sparse24::DType::from(args.model.dtype).to_string(),
        device: device.info().name().to_owned(),
        method: pruning.method.name().to_owned(),
        seed: (pruning.method == Method::Random).then_some(pruning.seed),
        damping: (pruning.method == Method::SparseGpt).then_some(SparseGpt::new(VectorLen::ONE).damping),
        calibration: calibration.map(|texts| texts.identity.clone()),
        metric: metric.name().to_owned(),
        similarity: metric.similarity().to_string(),
        prompt,
        texts,
        windows: metric.is_of_tokens().then(|| metric.count()),
    })
}

/// The table, the least harmful rows first.
fn text(result: &Sensitivity) -> String {
    let Sensitivity { settings, dense, .. } = result;
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_header(["layer", "V", "drop", "95 % interval", "weights", "per 1 %"]);
    let share = |row: &Row| 100.0 * row.weights as f64 / result.linear_weights as f64;
    let mut rows: Vec<&Row> = result.rows.iter().collect();
    rows.sort_by(|a, b| (a.drop / share(a)).total_cmp(&(b.drop / share(b))));
    for row in rows {
        let interval = |Interval { low, high }: Interval| format!("{low:.4}..{high:.4}");
        table.add_row([
            row.layer.clone(),
            row.vector.to_string(),
            format!("{}{:.6}", if row.is_noise() { "~" } else { "" }, row.drop),
            row.interval.map_or_else(|| "—".to_owned(), interval),
            format!("{:.2} %", share(row)),
            format!("{:.6}", row.drop / share(row)),
        ]);
    }
    for column in 1..=5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let (metric, drawn) = match settings.metric.as_str() {
        "spearman" => (format!("Spearman's correlation, {dense:.4} dense, less what it is"), "pairs"),
        "log_likelihood" => {
            let dense = format!("{dense:.4} dense (perplexity {:.3})", (-dense).exp());
            (format!("mean log-probability of a token, {dense}, less what it is"), "windows")
        }
        _ => ("1 - the mean cosine similarity to the dense model's embeddings".to_owned(), "texts"),
    };
    let (noise, all) = (result.rows.iter().filter(|row| row.is_noise()).count(), result.rows.len());
    let unknown = result.rows.iter().filter(|row| row.within_noise.is_none()).count();
    let order = match noise {
        0 if unknown > 0 => {
            format!("{unknown} of {all} drops have no interval: whether they are within noise is not known")
        }
        0 => "no drop is within noise".to_owned(),
        1 => format!("1 of {all} drops is within noise (~): its place in the order says nothing"),
        _ => format!("{noise} of {all} drops are within noise (~): their order among each other says nothing"),
    };
    format!(
        "{}, {}, on {}, by {}\n\n{}\n\n\
         drop: {metric} with this layer alone pruned; below 0 is a gain\n\
         95 % interval: of the drops on {} resamples of the {drawn}; ~ marks a drop whose interval has 0 in it\n\
         weights: the layer's share of those of all linear layers; rows are sorted by drop per 1 % of them\n\
         {order}\n",
        result.model,
        settings.dtype,
        settings.device,
        settings.method,
        table.trim_fmt(),
        result.resamples,
    )
}
