//! Classifiers of images: a folder with config, weights and names of classes; pictures in files; what is in them.
//!
//! ```text
//!  config.json, model.safetensors ─► ImageModel ─► Classifier ─► logits ─► best
//!  a JPEG or PNG ─► read_image ─► pixels ───────────────┘
//! ```
//! A picture of another size than the model's is cut to a square in its middle, seven eighths of its shorter side as
//! in ImageNet's evaluations (224 of 256), and resized by cubic interpolation. One of the model's own size is taken as
//! it is. Invariant: pixels are those of a whole image of the model's size.

use std::fs;
use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader};

use crate::engine::Device;
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Model};
use crate::io::Store;
use crate::matrix::{DType, Matrix};
use crate::models;

/// A classifier on the host.
#[derive(Clone, Debug)]
pub struct ImageModel {
    /// Its parameters.
    pub checkpoint: Checkpoint,
    /// The name of each class, or its number where the config has none.
    pub labels: Vec<String>,
}

impl ImageModel {
    /// Loads a folder with `config.json` and weights; `over` is asked first for each tensor, as by
    /// [`Checkpoint::load`]. An error if the model takes no images.
    pub fn load(folder: impl AsRef<Path>, over: Option<&Path>, dtype: DType) -> Result<Self> {
        let (folder, store) = (folder.as_ref(), Store::disk());
        let config = folder.join("config.json");
        let graph = models::load_in(&store, &config)?;
        if graph.image().is_none() {
            return Err(Error::file(&config, "is of a model of texts, which takes no images"));
        }
        let named = models::labels(&store.read_to_string(&config)?).map_err(|e| Error::file(&config, e.to_string()))?;
        let labels = (0..graph.output_width()).map(|class| match named.get(&class) {
            Some(name) => name.clone(),
            None => class.to_string(),
        });
        let labels = labels.collect();
        let checkpoint = Checkpoint::load_in(&store, graph, &store.weights_in(folder), over, dtype)?;
        Ok(Self { checkpoint, labels })
    }

    /// Lines and columns of an image.
    pub fn image(&self) -> [usize; 2] {
        self.checkpoint.graph().image().unwrap_or_default()
    }
}

/// A classifier on a device.
#[derive(Debug)]
pub struct Classifier {
    model: Model,
}

impl Classifier {
    /// Uploads a model.
    pub fn new(device: &Device, model: &ImageModel) -> Result<Self> {
        Ok(Self { model: Model::new(device, &model.checkpoint)? })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// A logit for each class, a row for each image, of images of which [`read_image`] has made pixels. They go through
    /// the model together.
    pub fn logits<T: AsRef<[u32]>>(&self, images: &[T]) -> Result<Matrix> {
        let graph = self.model.graph();
        if images.is_empty() {
            return Matrix::zeros(0, graph.output_width(), DType::F32);
        }
        self.model.forward(images.len(), graph.limits().tokens)?.run_on(images)
    }
}

/// The pixels of a picture, `0xRRGGBB` each, line by line, at a model's size. Errors name the file.
pub fn read_image(path: impl AsRef<Path>, size: [usize; 2]) -> Result<Vec<u32>> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    decode(&bytes, size).map_err(|e| Error::file(path, e.to_string()))
}

/// [`read_image`] of what is in such a file.
pub fn decode(bytes: &[u8], [lines, columns]: [usize; 2]) -> Result<Vec<u32>> {
    let invalid = |e: image::ImageError| Error::invalid(format!("is no picture in JPEG or PNG: {e}"));
    let reader = ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format();
    let mut decoder = reader.map_err(|e| invalid(e.into()))?.into_decoder().map_err(invalid)?;
    // As its camera was held.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(invalid)?;
    picture.apply_orientation(orientation);
    let size = u32::try_from(columns).ok().zip(u32::try_from(lines).ok());
    let (width, height) = size.ok_or_else(|| Error::invalid("the model's images are too large"))?;
    if (picture.width(), picture.height()) != (width, height) {
        let side = (picture.width().min(picture.height()) * 7).div_ceil(8).max(1);
        let (left, top) = ((picture.width() - side) / 2, (picture.height() - side) / 2);
        picture = picture.crop_imm(left, top, side, side).resize_exact(width, height, FilterType::CatmullRom);
    }
    let pixel = |p: &image::Rgb<u8>| u32::from_be_bytes([0, p.0[0], p.0[1], p.0[2]]);
    Ok(picture.to_rgb8().pixels().map(pixel).collect())
}

/// A class, and how probable the model has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guess {
    /// The class, by its place.
    pub class: usize,
    /// Softmax of the logits.
    pub probability: f64,
}

/// The classes of the `top` highest logits, the highest first; of equal ones the first. NaNs come last.
///
/// ```
/// let best = sparse24::vision::best(&[0.0, 3f32.ln(), f32::NEG_INFINITY], 2);
/// assert_eq!(best.iter().map(|guess| guess.class).collect::<Vec<_>>(), [1, 0]);
/// assert!((best[0].probability - 0.75).abs() < 1e-6);
/// ```
pub fn best(logits: &[f32], top: usize) -> Vec<Guess> {
    let key = |class: usize| if logits[class].is_nan() { f32::NEG_INFINITY } else { logits[class] };
    let mut classes: Vec<usize> = (0..logits.len()).collect();
    classes.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
    let highest = classes.first().map_or(0.0, |&class| f64::from(key(class)));
    let exp = |class: usize| (f64::from(logits[class]) - highest).exp();
    let sum: f64 = (0..logits.len()).map(exp).sum();
    classes.into_iter().take(top).map(|class| Guess { class, probability: exp(class) / sum }).collect()
}

/// A picture whose class is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledImage {
    /// Its file.
    pub path: PathBuf,
    /// Its class, by its place.
    pub class: usize,
}

/// The pictures of a folder, in the order of their names. A picture's class is the name of the folder that it lies in
/// below this one, or else of its file without the ending: a number, or the name of a class. An error names a picture
/// whose class is none, and a folder without [`pictures`].
pub fn labelled(folder: impl AsRef<Path>, labels: &[String]) -> Result<Vec<LabelledImage>> {
    let folder = folder.as_ref();
    let labelled = |path: PathBuf| {
        let below = path.parent().filter(|parent| *parent != folder);
        let named = below.map_or(path.file_stem(), Path::file_name);
        let name = named.and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.parse().ok().filter(|&class: &usize| class < labels.len());
        match number.or_else(|| labels.iter().position(|label| label == name)) {
            Some(class) => Ok(LabelledImage { path, class }),
            None => {
                let classes = labels.len();
                let reason = format!("{name:?} is no class: a number below {classes} or a class's name is expected");
                Err(Error::file(&path, reason))
            }
        }
    };
    pictures(folder)?.into_iter().map(labelled).collect()
}

/// The pictures of a folder and of the folders in it, in the order of their names, whatever these are. Files of other
/// kinds are passed over. An error names a folder without any pictures.
pub fn pictures(folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let folder = folder.as_ref();
    let mut found = Vec::new();
    for path in sorted(folder)? {
        let paths = if path.is_dir() { sorted(&path)? } else { vec![path] };
        found.extend(paths.into_iter().filter(|path| is_picture(path)));
    }
    match found.is_empty() {
        true => Err(Error::file(folder, "has no pictures (.jpg, .jpeg, .png)")),
        false => Ok(found),
    }
}

fn is_picture(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    path.is_file() && ["jpg", "jpeg", "png"].iter().any(|known| ending.eq_ignore_ascii_case(known))
}

/// What is in a folder, by name.
fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(|e| Error::io(folder, e))?;
    paths.sort();
    Ok(paths)
}
