//! What the commands that run a classifier of images have in common: which one, where it runs, and pictures through it.
//!
//! Invariant: logits come in the order of their pictures.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::model::{self, Form, Running};
use super::progress;
use sparse24::graph::Sparsity;
use sparse24::io::{Provenance, Store};
use sparse24::vision::{Classifier, ImageModel, read_image};
use sparse24::{DType, Device, Op, models};

/// What flags say of a classifier.
pub(super) struct Options<'a> {
    pub(super) weights: Option<&'a Path>,
    pub(super) running: &'a Running,
    pub(super) sparsity: Sparsity,
}

/// A classifier on its device.
pub(super) struct Images {
    pub(super) device: Device,
    pub(super) labels: Vec<String>,
    pub(super) forms: Vec<Form>,
    pub(super) provenance: Provenance,
    classifier: Classifier,
    size: [usize; 2],
    batch: usize,
}

/// Whether a folder has a model of images.
pub(super) fn is_of_images(folder: &Path) -> bool {
    models::load(folder.join("config.json")).is_ok_and(|graph| graph.image().is_some())
}

impl Images {
    /// Opens the device, loads the model, prunes its dense layers and uploads it.
    pub(super) fn open(folder: &Path, options: &Options<'_>) -> Result<Self> {
        let &Options { weights, running, sparsity } = options;
        let device = running.device()?;
        let mut model = ImageModel::load(folder, weights, DType::F32)?;
        let stored = Store::disk().weights_in(folder);
        let provenance = model::provenance(weights.into_iter().chain([&*stored]))?;
        let before: Vec<Op> = model.checkpoint.linears().map(|(_, w)| w.op()).collect();
        model.checkpoint.prune(sparsity)?;
        let forms = model::forms(&model.checkpoint, &before);
        let classifier = Classifier::new(&device, &model)?;
        let (size, batch) = (model.image(), running.batch.get());
        Ok(Self { device, labels: model.labels, forms, provenance, classifier, size, batch })
    }

    /// Hands each picture's place and logits to `done`.
    pub(super) fn each(&self, paths: &[PathBuf], mut done: impl FnMut(usize, &[f32])) -> Result<()> {
        let bar = progress(paths.len());
        for (batch, paths) in paths.chunks(self.batch).enumerate() {
            let pixels = paths.iter().map(|path| read_image(path, self.size)).collect::<Result<Vec<_>, _>>()?;
            let logits = self.classifier.logits(&pixels).context("the classifier")?;
            let numbers = logits.elements().to_f32();
            for (i, logits) in numbers.chunks_exact(logits.cols()).enumerate() {
                done(batch * self.batch + i, logits);
            }
            bar.inc(paths.len() as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }
}
