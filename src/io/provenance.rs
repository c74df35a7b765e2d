//! What weights were made from: a record of texts and methods in the `__metadata__` of a safetensors file.
//!
//! Who evaluates weights has to know on which data they were made, as figures on the same data flatter them. The record
//! is a map of strings, so that every step that makes weights can add its own line and older readers show it.
//! Invariant: nothing that was noted is lost when weights are made into others.
//!
//! Keys are `sparse24.` and a name, which readers show with spaces for underscores. Those in use:
//!
//! | key | written by | value |
//! |---|---|---|
//! | `sparse24.pruned` | `prune` | method, vector length or granularity and amount, seed |
//! | `sparse24.calibrated_on` | `prune --calibration` | texts that statistics of layers' inputs are of |
//! | `sparse24.chosen_on` | `prune --max-drop`, `--target-speedup` | pairs or texts that layers were chosen by |
//! | `sparse24.retrained_on` | `retrain`, `prune --retrain` | texts on which the weights learned from the dense model's |

use std::collections::BTreeMap;

/// What keys begin with in the metadata of a file.
const PREFIX: &str = "sparse24.";

/// What is known of how weights were made.
///
/// ```
/// use sparse24::io::Provenance;
/// let mut provenance = Provenance::default();
/// provenance.note("pruned", "wanda V=4 seed=24");
/// provenance.note("calibrated_on", "texts.txt (2048 texts)");
/// provenance.note("calibrated_on", "more.txt (10 texts)");
///
/// let metadata = provenance.metadata().collect();
/// assert_eq!(Provenance::of(&metadata), provenance);
/// assert_eq!(metadata["sparse24.pruned"], "wanda V=4 seed=24");
/// let shown = "calibrated on texts.txt (2048 texts), then more.txt (10 texts); pruned wanda V=4 seed=24";
/// assert_eq!(provenance.to_string(), shown);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "report", derive(serde::Serialize), serde(transparent))]
pub struct Provenance {
    entries: BTreeMap<String, String>,
}

impl Provenance {
    /// What a file's metadata say, such as [`Source::metadata`](super::Source::metadata).
    pub fn of(metadata: &BTreeMap<String, String>) -> Self {
        // Of a matrix whose name begins so, the format's keys have another dot.
        let ours = metadata.iter().filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value)));
        let entries = ours.filter(|(key, _)| !key.contains('.'));
        Self { entries: entries.map(|(key, value)| (key.to_owned(), value.clone())).collect() }
    }

    /// Notes something under a name, after what is there under that name already.
    pub fn note(&mut self, name: &str, what: &str) {
        match self.entries.get_mut(name) {
            Some(noted) => *noted += &format!(", then {what}"),
            None => {
                self.entries.insert(name.to_owned(), what.to_owned());
            }
        }
    }

    /// Names and what is noted under them.
    pub fn entries(&self) -> &BTreeMap<String, String> {
        &self.entries
    }

    /// The entries as a file's metadata have them.
    pub fn metadata(&self) -> impl Iterator<Item = (String, String)> {
        self.entries.iter().map(|(name, what)| (format!("{PREFIX}{name}"), what.clone()))
    }
}

impl std::fmt::Display for Provenance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let entries: Vec<_> =
            self.entries.iter().map(|(name, what)| format!("{} {what}", name.replace('_', " "))).collect();
        f.write_str(&entries.join("; "))
    }
}
