//! `sparse24 classify`: what is in pictures.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::args::{Json, ensure_usage};
use super::images::{Images, Options};
use super::{Outcome, model};
use sparse24::vision::{Guess, best};

/// Classify pictures with a convolutional network (EfficientNet-Lite), dense or 2:4.
///
/// Prints the most probable classes of each picture. Pictures are JPEG or PNG; one of another size than the model's is
/// cut to a square in its middle and resized. The schema of the JSON is sparse24-classify/1.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 classify --model model/efficientnet-lite0 photo.jpg
  sparse24 classify model/efficientnet-lite0 a.jpg b.png --top 3 --sparsity 2:4")]
pub(crate) struct Args {
    /// Pictures; before them the model, as --model takes it, unless --model is given.
    #[arg(value_name = "IMAGE", num_args = 1.., required = true)]
    images: Vec<PathBuf>,
    /// Folder with a model's config.json and weights.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// File that is asked first for each tensor: layers in the sparse24 format, or other tensors.
    #[arg(long, value_name = "FILE.safetensors")]
    weights: Option<PathBuf>,
    #[command(flatten)]
    sparsity: model::SparsityArgs,
    /// How many classes of each picture to print.
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    #[command(flatten)]
    running: model::Running,
    #[command(flatten)]
    json: Json,
}

/// A run as JSON.
#[derive(Serialize)]
struct Classified {
    schema: &'static str,
    version: &'static str,
    model: String,
    sparsity: String,
    device: String,
    images: Vec<Picture>,
}

#[derive(Serialize)]
struct Picture {
    image: String,
    classes: Vec<Class>,
}

#[derive(Serialize)]
struct Class {
    class: usize,
    name: String,
    probability: f64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let sparsity = args.sparsity.get()?;
    args.json.file()?;
    let (folder, paths) = match (&args.model, args.images.split_first()) {
        (Some(folder), _) => (folder, &args.images[..]),
        (None, Some((folder, paths))) => (folder, paths),
        (None, None) => (&PathBuf::new(), &[][..]),
    };
    ensure_usage!(!paths.is_empty(), "{} is the model: name pictures to classify after it", folder.display());
    let options = Options { weights: args.weights.as_deref(), running: &args.running, sparsity };
    let images = Images::open(folder, &options)?;
    let mut pictures = Vec::new();
    images.each(paths, |picture, logits| {
        let class = |Guess { class, probability }| Class { class, name: images.labels[class].clone(), probability };
        let classes = best(logits, usize::from(args.top)).into_iter().map(class).collect();
        pictures.push(Picture { image: paths[picture].display().to_string(), classes });
    })?;
    let classified = Classified {
        schema: "sparse24-classify/1",
        version: env!("CARGO_PKG_VERSION"),
        model: folder.display().to_string(),
        sparsity: model::sparsity_of(&images.forms),
        device: images.device.info().name().to_owned(),
        images: pictures,
    };
    args.json.emit(&classified.text(), &classified)?;
    Ok(Outcome::Fine)
}

impl Classified {
    /// A block for each picture.
    fn text(&self) -> String {
        let mut text = String::new();
        for Picture { image, classes } in &self.images {
            text += &format!("{image}\n");
            for Class { class, name, probability } in classes {
                text += &format!("  {:5.1} %  {name} ({class})\n", 100.0 * probability);
            }
        }
        text
    }
}
