//! How many pictures a classifier has right.
//!
//! Invariant: every picture of the folder counts.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::figures::{Accuracy, with_interval};
use super::{Args, seen, threads};
use crate::cli::args::ensure_usage;
use crate::cli::command::command_line;
use crate::cli::images::{Images, Options};
use crate::cli::sensitivity::identity;
use crate::cli::shapes::Float;
use crate::cli::{Outcome, model, say};
use sparse24::DType;
use sparse24::io::Provenance;
use sparse24::report::Environment;
use sparse24::vision::{best, labelled};

/// A run as JSON: of the fields of other evaluations those that it has, and its own.
#[derive(Serialize)]
struct Evaluation {
    schema: &'static str,
    version: &'static str,
    environment: Environment,
    model: String,
    weights: Option<String>,
    sparsity: String,
    linear_layers: Vec<model::Form>,
    provenance: Provenance,
    /// The folder of this evaluation where weights were made from its pictures: figures on it flatter.
    seen: Vec<String>,
    dtype: String,
    device: String,
    threads: Option<usize>,
    batch: usize,
    images_folder: String,
    images: usize,
    /// How many have their class as the most probable one, and the share.
    top1_right: usize,
    top1: Accuracy,
    /// How many have it among the five most probable ones.
    top5_right: usize,
    top5: Accuracy,
    /// From the first picture read to the last one's logits.
    seconds: f64,
}

/// Evaluates on the pictures of a folder.
pub(super) fn run(args: &Args, folder: &Path) -> Result<Outcome> {
    ensure_usage!(args.model.prompt.is_none(), "--prompt is for texts, and --images evaluates on pictures");
    // What is pooled is f32, and the last layer's weights must be of its type.
    ensure_usage!(args.model.dtype == Float::F32, "--dtype f16: classifiers of images run in f32");
    let sparsity = args.sparsity.get()?;
    args.json.file()?;
    let model = args.model.name.get();
    let options = Options { weights: args.model.weights.as_deref(), running: &args.model.running, sparsity };
    let images = Images::open(Path::new(model), &options)?;
    let all = labelled(folder, &images.labels).context("--images")?;
    let environment = Environment::unsampled(&images.device, command_line());
    let (mut first, mut five) = (Vec::new(), Vec::new());
    let started = Instant::now();
    let paths: Vec<_> = all.iter().map(|image| image.path.clone()).collect();
    images.each(&paths, |picture, logits| {
        let place = best(logits, 5).iter().position(|guess| guess.class == all[picture].class);
        first.push(f64::from(place == Some(0)));
        five.push(f64::from(place.is_some()));
    })?;
    let right = |of: &[f64]| of.iter().sum::<f64>() as usize;
    let name = folder.display().to_string();
    let evaluation = Evaluation {
        schema: "sparse24-eval/1",
        version: env!("CARGO_PKG_VERSION"),
        environment,
        model: model.to_owned(),
        weights: args.model.weights.as_ref().map(|path| path.display().to_string()),
        sparsity: model::sparsity_of(&images.forms),
        seen: seen(&[(name.clone(), identity(&paths)?)], &images.provenance),
        linear_layers: images.forms,
        provenance: images.provenance,
        dtype: DType::F32.to_string(),
        threads: threads(&images.device),
        device: images.device.info().name().to_owned(),
        batch: args.model.running.batch.get(),
        images_folder: name,
        images: all.len(),
        top1_right: right(&first),
        top1: Accuracy::of(&first),
        top5_right: right(&five),
        top5: Accuracy::of(&five),
        seconds: started.elapsed().as_secs_f64(),
    };
    for seen in &evaluation.seen {
        say(&format!("warning: {seen}: figures on it flatter these weights"));
    }
    args.json.emit(&evaluation.text(), &evaluation)?;
    Ok(Outcome::Fine)
}

impl Evaluation {
    fn text(&self) -> String {
        let Self { images, seconds, .. } = self;
        let share =
            |right: usize, of: &Accuracy| format!("{} ({right} of {images})", with_interval(of.accuracy, of.interval));
        format!(
            "{}, {}, on {}\n{}{}: {images} images in {seconds:.2} s\n  top-1 {}\n  top-5 {}\n",
            self.model,
            self.dtype,
            self.device,
            model::about(&self.linear_layers, &self.provenance),
            self.images_folder,
            share(self.top1_right, &self.top1),
            share(self.top5_right, &self.top5),
        )
    }
}
