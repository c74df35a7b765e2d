//! The file of a sensitivity analysis, `sparse24-sensitivity/1`.
//!
//! Input files are known by their contents, not their names or dates: a copy of a model is the same model. Invariant: a
//! file is never continued with other settings than those that it states.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use sparse24::VectorLen;
use sparse24::io::write_atomically;

/// Fields may be added to it, never renamed.
const SCHEMA: &str = "sparse24-sensitivity/1";

/// An analysis, finished or not.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(in crate::cli) struct Sensitivity {
    schema: String,
    version: String,
    /// As it was given, for people.
    pub(super) model: String,
    pub(super) settings: Settings,
    /// The metric of the model as it is.
    pub(super) dense: f64,
    /// Weights of all linear layers.
    pub(super) linear_weights: usize,
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
    /// `spearman` or `cosine`.
    pub(super) metric: String,
    pub(super) texts: String,
}

/// One layer alone in one pattern.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(in crate::cli) struct Row {
    pub(in crate::cli) layer: String,
    pub(in crate::cli) vector: usize,
    /// Before pruning.
    pub(in crate::cli) weights: usize,
    /// How much lower the metric is.
    pub(in crate::cli) drop: f64,
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
        *self = Self { version: std::mem::take(&mut self.version), model: std::mem::take(&mut self.model), ..known };
        Ok(())
    }

    /// Writes the file.
    pub(super) fn write(&self, path: &Path) -> sparse24::Result<()> {
        let json = serde_json::to_string_pretty(self).map_err(|e| sparse24::Error::Invalid(e.to_string()))?;
        write_atomically(path, |file| writeln!(file, "{json}"))
    }
}

/// What tells the contents of files from others: their size, and a checksum that changes by mistake only, not against
/// intent.
pub(super) fn identity(paths: &[&Path]) -> Result<String> {
    let mut crc = crc32fast::Hasher::new();
    let mut bytes = 0u64;
    let mut buffer = vec![0; 1 << 20];
    for path in paths {
        let failed = || format!("cannot read {}", path.display());
        let mut file = std::fs::File::open(path).with_context(failed)?;
        loop {
            match file.read(&mut buffer).with_context(failed)? {
                0 => break,
                count => {
                    crc.update(&buffer[..count]);
                    bytes += count as u64;
                }
            }
        }
    }
    Ok(format!("{bytes} bytes, crc32 {:08x}", crc.finalize()))
}
