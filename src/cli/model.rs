//! What the commands that run a model have in common: which one, where it runs, and texts through it.
//!
//! Invariant: embeddings come in the order of their texts.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;
use serde::Serialize;

use super::args::{ModelName, ensure_usage};
use super::shapes::Float;
use super::{say, tuning};
use sparse24::engine::{Device, Options};
use sparse24::graph::{Batching, Checkpoint, Sparsity};
use sparse24::io::Provenance;
use sparse24::simd::SimdLevel;
use sparse24::text::{self, Files, LoadOptions, Pipeline, Similarity, TextModel, Tokenizer};
use sparse24::{Matrix, Op, VectorLen, io};

/// The flags that choose a model and a device.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ModelArgs {
    #[command(flatten)]
    pub(super) name: ModelName,
    /// File that is asked first for each tensor: linear layers in the sparse24 format, or other tensors.
    #[arg(long, value_name = "FILE.safetensors")]
    pub(super) weights: Option<PathBuf>,
    /// Name of the prompt that is put in front of every text, one of those that the model's folder has; '' for none.
    /// The model's default prompt unless given.
    #[arg(long, value_name = "NAME")]
    pub(super) prompt: Option<String>,
    /// Element type of weights and activations.
    #[arg(long, default_value = "f32")]
    pub(super) dtype: Float,
    #[command(flatten)]
    pub(super) running: Running,
}

/// The flags that prune a model before it runs.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SparsityArgs {
    /// Prune the dense linear layers by magnitude, or leave them as they are.
    #[arg(long, value_name = "none|2:4", default_value = "none", value_parser = Asked::parse)]
    sparsity: Asked,
    /// With --sparsity 2:4, how many rows of a layer share one pattern: 1, 2, 4 ... 128; 1 unless given.
    #[arg(long, value_name = "V")]
    vector: Option<VectorLen>,
}

/// The value of --sparsity, and whether it names a vector length itself, as in `32:2:4`.
#[derive(Clone, Copy, Debug)]
struct Asked {
    sparsity: Sparsity,
    has_vector: bool,
}

impl Asked {
    fn parse(text: &str) -> sparse24::Result<Self> {
        Ok(Self { sparsity: text.parse()?, has_vector: text.ends_with(":2:4") })
    }
}

impl SparsityArgs {
    /// What both flags ask for together.
    pub(super) fn get(&self) -> Result<Sparsity> {
        let Some(vector) = self.vector else { return Ok(self.sparsity.sparsity) };
        let clash = self.sparsity.has_vector;
        ensure_usage!(
            !clash,
            "--vector {vector} and --sparsity {} both say how many rows share a pattern",
            self.sparsity.sparsity
        );
        ensure_usage!(
            self.sparsity.sparsity != Sparsity::None,
            "--vector {vector} is for --sparsity 2:4, which is not given: nothing would be pruned"
        );
        Ok(Sparsity::TwoFour(vector))
    }
}

/// Linear layers that have one form.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Form {
    /// `dense`, `2:4` or `masked`.
    form: &'static str,
    /// Of 2:4, how many rows share a pattern.
    vector: Option<usize>,
    /// Whether the file has them so. Otherwise --sparsity pruned them.
    stored: bool,
    /// How many: Q, K and V count as three.
    layers: usize,
}

/// The forms of a model's linear layers, in the order in which they occur, as they are or, given what they were before
/// they were pruned, as they are now.
pub(super) fn forms(checkpoint: &Checkpoint, before: &[Op]) -> Vec<Form> {
    let mut forms: Vec<Form> = Vec::new();
    for ((name, w), before) in checkpoint.linears().zip(before) {
        let form = match w.op() {
            Op::Dense => "dense",
            Op::Sparse24(_) => "2:4",
            Op::Masked | Op::Masked24 => "masked",
        };
        let (vector, stored) = (w.op().vector().map(VectorLen::get), w.op() == *before);
        let layers = checkpoint.tensors_of(&name).len();
        match forms.iter_mut().find(|f| (f.form, f.vector, f.stored) == (form, vector, stored)) {
            Some(known) => known.layers += layers,
            None => forms.push(Form { form, vector, stored, layers }),
        }
    }
    forms
}

/// The forms in a line, such as `2:4, V=32, stored; 36 of 36 layers`.
pub(super) fn forms_text(forms: &[Form]) -> String {
    let all: usize = forms.iter().map(|form| form.layers).sum();
    let one = |form: &Form| {
        let vector = form.vector.map_or_else(String::new, |v| format!(", V={v}"));
        let origin = match (form.form, form.stored) {
            ("dense", _) => "",
            (_, true) => ", stored",
            (_, false) => ", pruned by --sparsity",
        };
        let layers = if all == 1 { "layer" } else { "layers" };
        format!("{}{vector}{origin}; {} of {all} {layers}", form.form, form.layers)
    };
    forms.iter().map(one).collect::<Vec<_>>().join(" + ")
}

/// What a model is, in the lines below its name.
pub(super) fn about(forms: &[Form], provenance: &Provenance) -> String {
    let made = match provenance.entries().is_empty() {
        true => "no record of how they were made".to_owned(),
        false => provenance.to_string(),
    };
    format!("linear layers: {}\nweights: {made}\n", forms_text(forms))
}

/// The sparsity of all layers in a word: as --sparsity takes it, or `mixed`.
pub(super) fn sparsity_of(forms: &[Form]) -> String {
    match forms {
        [one] if one.form == "dense" => "none".to_owned(),
        [Form { form: "2:4", vector: Some(1), .. }] => "2:4".to_owned(),
        [Form { form: "2:4", vector: Some(v), .. }] => format!("{v}:2:4"),
        [one] => one.form.to_owned(),
        _ => "mixed".to_owned(),
    }
}

/// The flags that say where a model runs, and how many texts together.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Running {
    #[command(flatten)]
    pub(super) on: DeviceArgs,
    /// Most texts in a batch.
    #[arg(long, value_name = "N", default_value = "32")]
    pub(super) batch: NonZeroUsize,
}

/// The flags that say where a model runs.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DeviceArgs {
    /// Device: `auto`, `cpu`, or part of an adapter's name (see `sparse24 devices`).
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// Threads of the CPU device, and of what the host computes beside it, such as tokens; one per core unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) threads: Option<u16>,
    /// Vector instructions of the CPU device's kernels: scalar, avx2 or avx512; the widest there are unless given.
    #[arg(long, value_name = "LEVEL", env = "SPARSE24_SIMD")]
    simd: Option<SimdLevel>,
    /// Folder of the caches of `sparse24 tune` (see there), from which a GPU's kernels are chosen.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Choose kernels by estimates, whatever was tuned.
    #[arg(long, conflicts_with = "cache")]
    no_tuning: bool,
    /// Compile a GPU's kernels anew, and keep none beside the caches of `sparse24 tune` for the next command.
    #[arg(long)]
    no_pipeline_cache: bool,
}

/// A model on the host, and the device that it is for.
pub(super) struct Loaded {
    pub(super) device: Device,
    pub(super) tokenizer: Tokenizer,
    pub(super) checkpoint: Checkpoint,
    pub(super) pipeline: Pipeline,
    pub(super) batching: Batching,
    /// What is put in front of every text.
    pub(super) prompt: Option<String>,
    pub(super) similarity: Similarity,
    pub(super) forms: Vec<Form>,
    pub(super) provenance: Provenance,
}

/// A model that takes texts.
pub(super) struct Encoder {
    pub(super) device: Device,
    tokenizer: Tokenizer,
    encoder: text::Encoder,
    batching: Batching,
    /// What is put in front of every text.
    pub(super) prompt: Option<String>,
    pub(super) similarity: Similarity,
    pub(super) forms: Vec<Form>,
    pub(super) provenance: Provenance,
}

/// What [`Encoder::windows`] says of the texts and their time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Passed {
    /// Texts that lost their ends.
    pub(super) truncated: usize,
    /// Shapes of batches, and of the first batch of each: its texts, and the time that it took, in which pipelines were
    /// compiled and weights uploaded.
    pub(super) shapes: usize,
    pub(super) first_texts: usize,
    pub(super) first_time: Duration,
}

/// Texts that go through the model together: enough for batches of one length, few enough to hold their embeddings.
pub(super) const WINDOW: usize = 4096;

impl ModelArgs {
    /// Opens the device and uploads the model.
    pub(super) fn open(&self, sparsity: Sparsity) -> Result<Encoder> {
        self.load_from(self.name.get(), self.weights.as_deref(), sparsity, TextModel::load)?.upload()
    }

    /// The same with another model, as its folder has it: --weights and what prunes are of the first one alone.
    pub(super) fn open_other(&self, model: &str) -> Result<Encoder> {
        self.load_from(model, None, Sparsity::None, TextModel::load)?.upload()
    }

    /// Opens the device, loads the model, which may be a language model, and prunes its dense layers.
    pub(super) fn load_any(&self, sparsity: Sparsity) -> Result<Loaded> {
        self.load_from(self.name.get(), self.weights.as_deref(), sparsity, TextModel::load_any)
    }

    fn load_from(
        &self,
        model: &str,
        weights: Option<&Path>,
        sparsity: Sparsity,
        load: impl Fn(&Files, LoadOptions<'_>) -> sparse24::Result<TextModel>,
    ) -> Result<Loaded> {
        let device = self.running.device()?;
        let files = files(model)?;
        let prompt = self.prompt.as_deref();
        // Here, so that the error names the flag.
        files.settings()?.prompt(prompt).context("--prompt")?;
        let options = LoadOptions { dtype: self.dtype.into(), weights, prompt };
        let TextModel { tokenizer, mut checkpoint, pipeline, prompt, similarity } = load(&files, options)?;
        let provenance = provenance(weights.into_iter().chain([&*files.weights]))?;
        let before: Vec<Op> = checkpoint.linears().map(|(_, w)| w.op()).collect();
        checkpoint.prune(sparsity)?;
        let forms = forms(&checkpoint, &before);
        let batching = self.running.batching();
        Ok(Loaded { device, tokenizer, checkpoint, pipeline, batching, prompt, similarity, forms, provenance })
    }
}

impl Loaded {
    fn upload(self) -> Result<Encoder> {
        let Self { device, tokenizer, checkpoint, pipeline, batching, prompt, similarity, forms, provenance } = self;
        let encoder = text::Encoder::new(&device, &checkpoint, pipeline)?;
        Ok(Encoder { device, tokenizer, encoder, batching, prompt, similarity, forms, provenance })
    }
}

/// What the files that weights are read from say of how these were made.
pub(super) fn provenance<'a>(files: impl Iterator<Item = &'a Path>) -> Result<Provenance> {
    let mut all = Provenance::default();
    for file in files.filter(|file| file.exists()) {
        for (name, what) in Provenance::of(&io::Source::open(file)?.metadata()).entries() {
            all.note(name, what);
        }
    }
    Ok(all)
}

impl DeviceArgs {
    /// Opens the device, with what it was tuned to.
    pub(super) fn open(&self) -> Result<Device> {
        let options = Options { threads: self.threads.map(usize::from), simd: self.simd, ..Options::default() };
        if let Some(threads) = self.threads {
            // The process's own pool, which tokenises. Where it is there already, it stays as it is.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global();
        }
        let device = Device::open(&self.device, options).context("--device")?;
        if !self.no_tuning {
            tuning::apply(&device, self.cache.as_deref())?;
        }
        if !self.no_pipeline_cache {
            tuning::keep_pipelines(&device, self.cache.as_deref());
        }
        Ok(device)
    }
}

impl Running {
    /// Opens the device, with what it was tuned to.
    pub(super) fn device(&self) -> Result<Device> {
        self.on.open()
    }

    pub(super) fn batching(&self) -> Batching {
        Batching { texts: self.batch.get(), ..Batching::default() }
    }
}

/// The files of a folder, or of a model on the hub.
pub(super) fn files(model: &str) -> Result<Files> {
    if Path::new(model).is_dir() {
        return Ok(Files::in_folder(model));
    }
    #[cfg(feature = "hub")]
    return Files::from_hub(model).with_context(|| format!("there is no folder {model}, and on the hub"));
    #[cfg(not(feature = "hub"))]
    anyhow::bail!("there is no folder {model} (names on the hub need a binary built with --features hub)")
}

impl Encoder {
    /// Hands the embeddings of all texts to `done`, [`WINDOW`] texts at a time, one a row. An error calls a text what
    /// `name` makes of its place among all.
    pub(super) fn windows<S: AsRef<str>>(
        &self,
        texts: &[S],
        bar: &ProgressBar,
        name: &dyn Fn(usize) -> String,
        mut done: impl FnMut(&[S], Matrix) -> Result<()>,
    ) -> Result<Passed> {
        let mut passed = Passed::default();
        for (window, texts) in texts.chunks(WINDOW).enumerate() {
            let mut embed = || -> sparse24::Result<_> {
                let tokens = self.tokenizer.encode(texts)?;
                passed.truncated += tokens.truncated;
                self.encoder.embed_timed(&tokens.ids, self.batching, &mut |batch| {
                    bar.inc(batch.texts as u64);
                    if batch.is_new {
                        passed.shapes += 1;
                        passed.first_texts += batch.texts;
                        passed.first_time += batch.elapsed;
                    }
                })
            };
            let embeddings = embed().map_err(|e| match e.text() {
                Some(text) => anyhow!("{}: {}", name(window * WINDOW + text), e.into_cause()),
                None => e.into(),
            })?;
            done(texts, embeddings)?;
        }
        Ok(passed)
    }

    /// [`warn_of_truncation`] by this model's tokenizer.
    pub(super) fn warn_of_truncation(&self, truncated: usize, texts: usize) {
        warn_of_truncation(truncated, texts, &self.tokenizer);
    }
}

/// Says on stderr how many texts were truncated, if any.
pub(super) fn warn_of_truncation(truncated: usize, texts: usize, tokenizer: &Tokenizer) {
    if truncated > 0 {
        let limit = tokenizer.max_tokens();
        let were = if texts == 1 { "text was" } else { "texts were" };
        say(&format!("warning: {truncated} of {texts} {were} cut off at the model's limit of {limit} tokens"));
    }
}
