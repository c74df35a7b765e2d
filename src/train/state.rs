//! What an interrupted run goes on from: a safetensors file with the parameters, the optimiser's two moments, the best
//! parameters so far, and in its metadata the number of the step.
//!
//! It is written under a temporary name and renamed, so that a run that is killed while it writes has the file before.
//! Invariant: only the run that wrote a file takes it: the same student at the start, teacher, texts, options and
//! number of steps, which are compared by a hash ([`identity`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{Best, TrainOptions, Trainer};
use crate::engine::Tensor;
use crate::error::{Error, Result, expect_shape};
use crate::graph::Checkpoint;
use crate::io::{Spec, TensorFile, Writer};
use crate::matrix::{DType, Matrix};
use safetensors::Dtype;

/// The version of the file, under this name in its metadata.
const VERSION: (&str, &str) = ("sparse24_train_state", "1");

/// A hash (FNV-1a, 64 bits) of models, texts, options and number of steps.
pub(super) fn identity(
    models: [&Checkpoint; 2],
    texts: &[Arc<[u32]>],
    steps: u64,
    options: &TrainOptions,
) -> Result<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    add(format!("{options:?}, {steps} steps").as_bytes());
    for text in texts {
        add(&(text.len() as u64).to_le_bytes());
        add(bytemuck::cast_slice(text));
    }
    for model in models {
        model.each_part(&mut add)?;
    }
    Ok(hash)
}

impl Trainer {
    /// Writes all that the run goes on from, and `note`, which is the caller's.
    pub fn save(&self, path: &Path, note: &str) -> Result<()> {
        let mut metadata = BTreeMap::new();
        metadata.insert(VERSION.0.to_owned(), VERSION.1.to_owned());
        for (key, value) in [
            ("identity", format!("{:016x}", self.identity)),
            ("steps", self.steps.to_string()),
            ("done", self.done.to_string()),
            ("note", note.to_owned()),
        ] {
            metadata.insert(key.to_owned(), value);
        }
        if let Some(best) = &self.best {
            // Every bit of it.
            metadata.insert("best_loss".to_owned(), format!("{:016x}", best.loss.to_bits()));
            metadata.insert("best_step".to_owned(), best.step.to_string());
        }
        let device = self.trainable.device();
        let kinds: &[&str] = if self.best.is_some() { &["value", "m", "v", "best"] } else { &["value", "m", "v"] };
        let trained: Vec<&Tensor> = self.trainable.trained().map(|(_, value, _)| value).collect();
        let specs = trained.iter().enumerate().flat_map(|(at, value)| {
            kinds.iter().map(move |kind| Spec::new(name(at, kind), Dtype::F32, &[value.rows(), value.cols()]))
        });
        let mut writer = Writer::create(path, &specs.collect::<Vec<_>>(), &metadata)?;
        for (at, (value, [m, v])) in trained.iter().zip(&self.moments).enumerate() {
            for (kind, tensor) in [("value", *value), ("m", m), ("v", v)] {
                writer.write(&name(at, kind), device.read(tensor)?.elements().as_bytes())?;
            }
            if let Some(best) = &self.best {
                writer.write(&name(at, "best"), best.values[at].elements().as_bytes())?;
            }
        }
        writer.finish()
    }

    /// The steps of the whole run that wrote a file. An error if it is no such file.
    pub fn steps_of(path: &Path) -> Result<u64> {
        number(&TensorFile::open(path)?, path, "steps", 10)
    }

    /// Goes on from a file that this run wrote, and gives back the note. An error, after which nothing has changed, if
    /// it is no such file, or of another run.
    pub fn resume(&mut self, path: &Path) -> Result<String> {
        let file = TensorFile::open(path)?;
        let refuse = |reason: String| Error::file(path, reason);
        let entry = |key: &str| entry(&file, path, key);
        let number = |key: &str, radix: u32| number(&file, path, key, radix);
        let version = entry(VERSION.0)?;
        if version != VERSION.1 {
            return Err(refuse(format!("is of version {version}, {} is known here", VERSION.1)));
        }
        if number("identity", 16)? != self.identity {
            return Err(refuse(
                "is the state of another run: the model, the texts or the flags are not those it was begun with".into(),
            ));
        }
        let done = number("done", 10)?;
        if done > self.steps {
            return Err(refuse(format!("says that {done} of {} steps are done", self.steps)));
        }
        let trained: Vec<&Tensor> = self.trainable.trained().map(|(_, value, _)| value).collect();
        let read = |kind: &str| -> Result<Vec<Matrix>> {
            let one = |(at, value): (usize, &&Tensor)| {
                let matrix = file.matrix(&name(at, kind))?;
                expect_shape(&name(at, kind), (matrix.rows(), matrix.cols()), (value.rows(), value.cols()))?;
                Ok(matrix.cast(DType::F32))
            };
            trained.iter().enumerate().map(one).collect()
        };
        let (values, ms, vs) = (read("value")?, read("m")?, read("v")?);
        let best = if file.metadata().contains_key("best_loss") {
            let loss = f64::from_bits(number("best_loss", 16)?);
            Some(Best { loss, step: number("best_step", 10)?, values: read("best")? })
        } else {
            None
        };
        let note = entry("note")?.to_owned();
        let device = self.trainable.device();
        for (((value, [m, v]), new), [new_m, new_v]) in
            trained.iter().zip(&self.moments).zip(&values).zip(ms.iter().zip(&vs).map(|(m, v)| [m, v]))
        {
            device.write(value, new)?;
            device.write(m, new_m)?;
            device.write(v, new_v)?;
        }
        device.submit(&self.trainable.repack(|_| true)?)?;
        (self.done, self.best, self.part_cache) = (done, best, None);
        Ok(note)
    }
}

/// An entry of the metadata of a file, at a path.
fn entry<'a>(file: &'a TensorFile, path: &Path, key: &str) -> Result<&'a str> {
    let missing = || Error::file(path, format!("is no state of a retraining: its metadata has no {key}"));
    file.metadata().get(key).map(String::as_str).ok_or_else(missing)
}

fn number(file: &TensorFile, path: &Path, key: &str, radix: u32) -> Result<u64> {
    let text = entry(file, path, key)?;
    let not = |_| Error::file(path, format!("has the {key} {text:?}, which is no number"));
    u64::from_str_radix(text, radix).map_err(not)
}

fn name(at: usize, kind: &str) -> String {
    format!("{at:04}.{kind}")
}
