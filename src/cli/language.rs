//! What the commands that run a language model have in common: which one, in which form, and where it runs.

use std::path::PathBuf;

use anyhow::Result;

use super::args::ModelName;
use super::model::{DeviceArgs, Form, SparsityArgs, files, forms, provenance};
use super::shapes::Float;
use sparse24::engine::Device;
use sparse24::io::Provenance;
use sparse24::text::{ChatTemplate, Generator, LanguageModel, LoadOptions};
use sparse24::{DType, Op};

/// The flags that choose a language model and a device.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct LanguageArgs {
    #[command(flatten)]
    pub(super) name: ModelName,
    /// File that is asked first for each tensor: linear layers in the sparse24 format, or other tensors.
    #[arg(long, value_name = "FILE.safetensors")]
    pub(super) weights: Option<PathBuf>,
    /// Element type of weights and activations.
    #[arg(long, default_value = "f32")]
    dtype: Float,
    #[command(flatten)]
    sparsity: SparsityArgs,
    #[command(flatten)]
    on: DeviceArgs,
}

/// A language model on its device, and what is said of it.
pub(super) struct Language {
    pub(super) device: Device,
    pub(super) generator: Generator,
    pub(super) chat_template: Option<ChatTemplate>,
    pub(super) forms: Vec<Form>,
    pub(super) provenance: Provenance,
}

impl LanguageArgs {
    /// Element type of weights and activations.
    pub(super) fn dtype(&self) -> DType {
        self.dtype.into()
    }

    /// An error of usage that clap cannot find.
    pub(super) fn check(&self) -> Result<()> {
        self.sparsity.get().map(|_| ())
    }

    /// Opens the device, loads the model, prunes its dense layers, and uploads it.
    pub(super) fn open(&self) -> Result<Language> {
        let sparsity = self.sparsity.get()?;
        let device = self.on.open()?;
        let files = files(self.name.get())?;
        let options = LoadOptions { dtype: self.dtype(), weights: self.weights.as_deref(), prompt: None };
        let mut model = LanguageModel::load(&files, options)?;
        let provenance = provenance(self.weights.as_deref().into_iter().chain([&*files.weights]))?;
        let before: Vec<Op> = model.checkpoint.linears().map(|(_, w)| w.op()).collect();
        model.checkpoint.prune(sparsity)?;
        let forms = forms(&model.checkpoint, &before);
        let generator = Generator::new(&device, &model)?;
        Ok(Language { device, generator, chat_template: model.chat_template, forms, provenance })
    }
}
