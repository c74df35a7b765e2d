//! What the commands that run a model have in common: which one, where it runs, and texts through it.
//!
//! Invariant: embeddings come in the order of their texts.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;

use super::args::ModelName;
use super::shapes::Float;
use super::{say, tuning};
use sparse24::bert::{Batching, Checkpoint, Config, Files, Model, Sparsity, Tokenizer};
use sparse24::engine::{Device, Options};
use sparse24::simd::SimdLevel;
use sparse24::{DType, Error, Matrix};

/// The flags that choose a model and a device.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ModelArgs {
    #[command(flatten)]
    pub(super) name: ModelName,
    /// File that is asked first for each tensor: linear layers in the sparse24 format, or other tensors.
    #[arg(long, value_name = "FILE.safetensors")]
    pub(super) weights: Option<PathBuf>,
    /// Prune the dense linear layers by magnitude: none, 2:4, or V:2:4 where V rows share a pattern.
    #[arg(long, value_name = "none|2:4|V:2:4", default_value = "none")]
    pub(super) sparsity: Sparsity,
    /// Element type of weights and activations.
    #[arg(long, default_value = "f32")]
    pub(super) dtype: Float,
    #[command(flatten)]
    pub(super) running: Running,
}

/// The flags that say where a model runs.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Running {
    /// Device: `auto`, `cpu`, or part of an adapter's name (see `sparse24 devices`).
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(super) device: String,
    /// Most texts in a batch.
    #[arg(long, value_name = "N", default_value = "32")]
    pub(super) batch: NonZeroUsize,
    /// Threads of the CPU device, and of what the host computes beside it, such as tokens; one per core unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) threads: Option<u16>,
    /// Vector instructions of the CPU device's kernels: scalar, avx2 or avx512; the widest there are unless given.
    #[arg(long, value_name = "LEVEL", env = "SPARSE24_SIMD")]
    pub(super) simd: Option<SimdLevel>,
    /// Folder of the caches of `sparse24 tune` (see there), from which a GPU's kernels are chosen.
    #[arg(long, value_name = "DIR")]
    pub(super) cache: Option<PathBuf>,
    /// Choose kernels by estimates, whatever was tuned.
    #[arg(long, conflicts_with = "cache")]
    pub(super) no_tuning: bool,
}

/// A model on the host, and the device that it is for.
pub(super) struct Loaded {
    pub(super) device: Device,
    pub(super) tokenizer: Tokenizer,
    pub(super) checkpoint: Checkpoint,
    pub(super) batching: Batching,
}

/// A model that takes texts.
pub(super) struct Encoder {
    pub(super) device: Device,
    tokenizer: Tokenizer,
    model: Model,
    batching: Batching,
}

/// Texts that go through the model together: enough for batches of one length, few enough to hold their embeddings.
pub(super) const WINDOW: usize = 4096;

impl ModelArgs {
    /// Opens the device and uploads the model.
    pub(super) fn open(&self) -> Result<Encoder> {
        let Loaded { device, tokenizer, checkpoint, batching } = self.load()?;
        let model = Model::new(&device, &checkpoint)?;
        Ok(Encoder { device, tokenizer, model, batching })
    }

    /// Opens the device and loads the model.
    pub(super) fn load(&self) -> Result<Loaded> {
        let device = self.running.device()?;
        let files = files(self.name.get())?;
        files.check_pooling()?;
        let (tokenizer, mut checkpoint) = read(&files, self.weights.as_deref(), self.dtype.into())?;
        checkpoint.prune(self.sparsity)?;
        Ok(Loaded { device, tokenizer, checkpoint, batching: self.running.batching() })
    }
}

impl Running {
    /// Opens the device, with what it was tuned to.
    pub(super) fn device(&self) -> Result<Device> {
        let options = Options { threads: self.threads.map(usize::from), simd: self.simd, ..Options::default() };
        if let Some(threads) = self.threads {
            // The process's own pool, which tokenises. Where it is there already, it stays as it is.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global();
        }
        let device = Device::open(&self.device, options).context("--device")?;
        if !self.no_tuning {
            tuning::apply(&device, self.cache.as_deref())?;
        }
        Ok(device)
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

/// Reads a model, with `over` asked first for each tensor.
pub(super) fn read(files: &Files, over: Option<&Path>, dtype: DType) -> Result<(Tokenizer, Checkpoint)> {
    let config = Config::load(&files.config)?;
    let tokenizer = Tokenizer::load(&files.tokenizer, &config)?.truncated_at(files.max_tokens(&config)?)?;
    Ok((tokenizer, Checkpoint::load(config, files, over, dtype)?))
}

impl Encoder {
    /// Embeddings of some of the texts, up to [`WINDOW`], one a row, and how many of them were truncated. An error calls
    /// a text what `name` makes of its place among all.
    pub(super) fn embed<S: AsRef<str>>(
        &self,
        texts: &[S],
        window: Range<usize>,
        name: &dyn Fn(usize) -> String,
    ) -> Result<(Matrix, usize)> {
        let first = window.start;
        let embed = || -> sparse24::Result<_> {
            let tokens = self.tokenizer.encode(&texts[window])?;
            Ok((self.model.embed(&tokens.ids, self.batching)?, tokens.truncated))
        };
        embed().map_err(|e| match e {
            Error::Text { text, cause } => anyhow!("{}: {cause}", name(first + text)),
            e => e.into(),
        })
    }

    /// The embeddings of all texts, window by window, and how many texts were truncated. Errors are as in
    /// [`Encoder::embed`].
    pub(super) fn windows<S: AsRef<str>>(
        &self,
        texts: &[S],
        bar: &ProgressBar,
        name: &dyn Fn(usize) -> String,
        mut done: impl FnMut(&[S], Matrix) -> Result<()>,
    ) -> Result<usize> {
        let mut truncated = 0;
        for first in (0..texts.len()).step_by(WINDOW) {
            let window = first..texts.len().min(first + WINDOW);
            let (embeddings, of_window) = self.embed(texts, window.clone(), name)?;
            truncated += of_window;
            bar.inc(window.len() as u64);
            done(&texts[window], embeddings)?;
        }
        Ok(truncated)
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
        say(&format!("warning: {truncated} of {texts} texts were cut off at the model's limit of {limit} tokens"));
    }
}
