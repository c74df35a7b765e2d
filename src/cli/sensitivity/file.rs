//! The file of a sensitivity analysis, `sparse24-sensitivity/1`.
//!
//! Input files are known by their contents, not their names or dates: a copy of a model is the same model. Invariant: a
//! file is never continued with other settings than those that it states.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use sparse24::VectorLen;
use sparse24::bootstrap::{DRAWS, Interval};
use sparse24::io::write_atomically;
use sparse24::text::sensitivity::{LayerDrop, MetricDrop};

/// Fields may be added to it, never renamed.
const SCHEMA: &str = "sparse24-sensitivity/1";

/// An analysis, finished or not.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Sensitivity {
    schema: String,
    version: String,
    /// As it was given, for people.
    pub(super) model: String,
    pub(super) settings: Settings,
    /// The metric of the model as it is.
    pub(super) dense: f64,
    /// Weights of all linear layers.
    pub(super) linear_weights: usize,
    /// How often texts were drawn for an interval.
    #[serde(default)]
    pub(super) resamples: usize,
    pub(super) rows: Vec<Row>,
}

/// What all rows depend on.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Settings {
    pub(super) model: String,
    pub(super) weights: Option<String>,
    pub(super) sparsity: String,
    pub(super) dtype: String,
    pub(super) device: String,
    pub(super) method: String,
    /// Of the method that draws numbers.
    pub(super) seed: Option<u64>,
    /// Of sparsegpt.
    #[serde(default)]
    pub(super) damping: Option<f64>,
    pub(super) calibration: Option<String>,
    /// `spearman`, `cosine` or `log_likelihood`.
    pub(super) metric: String,
    /// What of two embeddings `spearman` correlates; the cosine unless said.
    #[serde(default = "cosine")]
    pub(super) similarity: String,
    /// What is put in front of every text.
    #[serde(default)]
    pub(super) prompt: Option<String>,
    pub(super) texts: String,
    /// Of a language model, how many windows of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) windows: Option<usize>,
}

/// One layer alone in one pattern.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) layer: String,
    pub(super) vector: usize,
    /// Before pruning.
    pub(super) weights: usize,
    /// How much lower the metric is.
    pub(super) drop: f64,
    /// What 95 % of the drops on resampled texts lie in, and whether zero does. Files of earlier versions lack both,
    /// and so does a row whose texts are too few.
    #[serde(default)]
    pub(super) interval: Option<Interval>,
    #[serde(default)]
    pub(super) within_noise: Option<bool>,
}

impl From<LayerDrop> for Row {
    fn from(alone: LayerDrop) -> Self {
        let LayerDrop { layer, vector, weights, drop: MetricDrop { drop, interval } } = alone;
        Self { layer, vector: vector.get(), weights, drop, interval, within_noise: interval.map(Interval::has_zero) }
    }
}

impl Row {
    /// Whether the drop may be none, as far as is known.
    pub(super) fn is_noise(&self) -> bool {
        self.within_noise == Some(true)
    }
}

fn cosine() -> String {
    "cosine".to_owned()
}

impl Sensitivity {
    /// One without rows.
    pub(super) fn new(model: String, settings: Settings) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self {
            schema: SCHEMA.to_owned(),
            version,
            model,
            settings,
            dense: f64::NAN,
            linear_weights: 0,
            resamples: DRAWS,
            rows: Vec::new(),
        }
    }

    /// Whether there is a row of this layer and pattern.
    pub(super) fn has(&self, layer: &str, vector: VectorLen) -> bool {
        self.rows.iter().any(|row| row.layer == layer && row.vector == vector.get())
    }

    /// Takes over what is in a file. An error if it is no such file, or says which of its settings differs.
    pub(super) fn resume(&mut self, path: &Path) -> Result<()> {
        let name = || format!("{} cannot be continued; remove it or choose another name", path.display());
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let json: serde_json::Value = serde_json::from_slice(&text).with_context(name)?;
        let schema = &json["schema"];
        ensure!(schema == SCHEMA, "{}: its schema is {schema}, not {SCHEMA:?}", name());
        let known: Self = serde_json::from_value(json).with_context(name)?;
        if known.settings != self.settings {
            let (old, new) = (serde_json::to_value(&known.settings)?, serde_json::to_value(&self.settings)?);
            let fields = new.as_object().into_iter().flatten();
            let differ = fields.filter(|(field, value)| old[*field] != **value);
            let differ: Vec<_> =
                differ.map(|(field, value)| format!("{field} was {}, is {value}", old[field])).collect();
            bail!("{}: {}", name(), differ.join("; "));
        }
        *self = Self {
            version: std::mem::take(&mut self.version),
            model: std::mem::take(&mut self.model),
            // Of the rows to come: files of earlier versions have rows without intervals.
            resamples: self.resamples,
            ..known
        };
        Ok(())
    }

    /// Writes the file.
    pub(super) fn write(&self, path: &Path) -> sparse24::Result<()> {
        let json = serde_json::to_string_pretty(self).map_err(|e| sparse24::Error::invalid(e.to_string()))?;
        write_atomically(path, |file| writeln!(file, "{json}"))
    }
}

/// What tells the contents of files from others: their size, and a checksum that changes by mistake only, not against
/// intent.
pub(in crate::cli) fn identity(paths: &[impl AsRef<Path>]) -> Result<String> {
    let mut contents = Contents::default();
    let mut buffer = vec![0; 1 << 20];
    for path in paths.iter().map(AsRef::as_ref) {
        let failed = || format!("cannot read {}", path.display());
        let mut file = std::fs::File::open(path).with_context(failed)?;
        loop {
            match file.read(&mut buffer).with_context(failed)? {
                0 => break,
                count => contents.add(&buffer[..count]),
            }
        }
    }
    Ok(contents.identity())
}

/// [`identity`] of what was read already.
pub(in crate::cli) fn identity_of(text: &[u8]) -> String {
    let mut contents = Contents::default();
    contents.add(text);
    contents.identity()
}

#[derive(Default)]
struct Contents {
    crc: crc32fast::Hasher,
    bytes: u64,
}

impl Contents {
    fn add(&mut self, text: &[u8]) {
        self.crc.update(text);
        self.bytes += text.len() as u64;
    }

    fn identity(self) -> String {
        format!("{} bytes, crc32 {:08x}", self.bytes, self.crc.finalize())
    }
}
