//! Which schedule is best on the device at hand: measured once, kept in a file, believed by the planner from then on.
//!
//! Estimates choose well between kernels that differ much and badly between those that differ little, and what differs
//! little on one GPU differs much on the next. So [`try_all`] races the candidates of a problem, and a [`Cache`] keeps
//! the winners for the one thing they hold for: an adapter, its driver, this version of the crate and its shader
//! checks, together the [`TuningKey`]. [`Cache::tuning`] is what [`Device::set_tuning`] takes. Nothing here runs by
//! itself: opening a device reads no files.
//!
//! Invariants: a plan whose result was wrong is never a winner. A cache that was loaded is sound in every field and
//! belongs to the key that it was loaded for; any other file is an error that says what is wrong with it, and none of
//! it is used. Of several programs that tune into one folder at the same time, none undoes what another has found:
//! [`Cache::save`] reads the file again, and both under a lock.
//!
//! # The file
//! JSON, schema `sparse24-tuning/1`, one file per key. Times are seconds per call, ceilings as in benchmark files (null
//! where the device has no such arithmetic), dates RFC 3339:
//! ```text
//! {"schema": "sparse24-tuning/1", "version": "0.1.0", "adapter": "name of the adapter", "driver": "name and version",
//!  "backend": "vulkan", "shader_checks": "trusted",
//!  "ceilings": {"fma_f32_tflops": 1.5, "fma_f16_tflops": null, "cooperative_f16_tflops": null, "copy_gb_per_s": 100.0},
//!  "entries": [{"op": "sparse24", "vector": 32, "dtype": "f16", "m": 768, "n": 512, "k": 3072,
//!               "way": "128x128x16", "splits": 4, "seconds": 1e-3, "date": "2026-11-22T10:00:00Z"}]}
//! ```
//! An entry that a budget cut off has a further field, `untried`: the schedules, with their splits as in
//! `"64x64x16/2"`, that are still to be tried. Beside the files lies `tuning.lock`, which is empty.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::engine::{Device, DeviceInfo};
use crate::error::{Error, Result};
use crate::io::write_atomically;
use crate::kernels::{Caps, Rates, Schedule};
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::measure::{self, Case, Ceilings, Policy, Trial};
use crate::plan::{Algorithm, MAX_SPLITS, Plan, Tuned, Tuning};
use crate::problem::{Op, Problem};

/// Name and version of the file's schema.
pub const SCHEMA: &str = "sparse24-tuning/1";

/// Candidates whose estimate is this many times the lowest one are not tried: estimates are not that wrong.
const HOPELESS: f64 = 6.0;

/// Held while a file of its folder is read and written again. It stays where it is: a lock file that is removed can be
/// locked twice.
const LOCK: &str = "tuning.lock";

/// A larger file is no cache: an entry takes 200 bytes.
const MAX_BYTES: u64 = 64 << 20;

/// No call takes longer, in seconds.
const LONGEST_CALL: f64 = 3600.0;

/// What measured times hold for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TuningKey {
    version: String,
    adapter: String,
    driver: String,
    backend: String,
    shader_checks: String,
}

impl TuningKey {
    /// The key of a GPU; `None` for the CPU device, which has nothing to choose between, and for a GPU that
    /// emulates cooperative matrices.
    pub fn of(device: &Device) -> Option<Self> {
        let (DeviceInfo::Gpu(info), Some(checks)) = (device.info(), device.shader_checks()) else { return None };
        (!info.caps.emulates_cooperative).then(|| Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            adapter: info.name,
            driver: info.driver,
            backend: info.backend,
            shader_checks: checks.name().to_owned(),
        })
    }

    /// The fields, by their names in the file.
    fn fields(&self) -> [(&'static str, &str); 5] {
        [
            ("version", &self.version),
            ("adapter", &self.adapter),
            ("driver", &self.driver),
            ("backend", &self.backend),
            ("shader_checks", &self.shader_checks),
        ]
    }

    /// Name of the cache's file: readable, and different for every key.
    pub fn file_name(&self) -> String {
        // FNV-1a, which stays the same from version to version.
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in self.fields().iter().flat_map(|(_, value)| value.bytes().chain([0])) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        format!("{}{hash:016x}.json", self.prefix())
    }

    /// What the names of all files of this adapter start with, whatever its driver and the crate's version.
    fn prefix(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let slug: String = self.adapter.chars().take(40).map(plain).collect();
        format!("{slug}-{}-{}-", self.backend, self.shader_checks)
    }
}

/// The best schedule that was found for one problem, and when.
#[derive(Clone, Debug, PartialEq)]
pub struct TuningEntry {
    problem: Problem,
    tuned: Tuned,
    date: String,
    untried: Vec<String>,
}

impl TuningEntry {
    /// The problem, in the linear form and without an epilogue.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The best schedule of those that were tried.
    pub fn tuned(&self) -> &Tuned {
        &self.tuned
    }

    /// Ways that there was no time for, with their splits, as [`Plan::schedule`] names them.
    pub fn untried(&self) -> &[String] {
        &self.untried
    }
}

/// What has been measured on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Cache {
    key: TuningKey,
    ceilings: Ceilings,
    entries: Vec<TuningEntry>,
    /// What has changed here since the file was last read.
    changed: Vec<Problem>,
    ceilings_changed: bool,
}

impl Cache {
    /// A cache with nothing in it.
    pub fn new(key: TuningKey) -> Self {
        let ceilings = Ceilings::default();
        Self { key, ceilings, entries: Vec::new(), changed: Vec::new(), ceilings_changed: false }
    }

    /// The cache of this key in a folder; `None` if there is no such file. An error says what is wrong with the file.
    pub fn load(folder: &Path, key: &TuningKey) -> Result<Option<Self>> {
        let path = folder.join(key.file_name());
        let file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|e| Error::io(&path, e))?,
        };
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(|e| Error::io(&path, e))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(Error::file(&path, format!("more than {MAX_BYTES} bytes")));
        }
        let json = serde_json::from_slice(&text).map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
        Self::from_json(&json, key).map(Some).map_err(|reason| Error::file(&path, reason))
    }

    /// Writes the cache into a folder, which is made if need be, and returns the file's path. The file appears complete
    /// or not at all. What other programs have found and written meanwhile is taken over first, so that it is neither
    /// lost nor measured twice. A file that is not sound is replaced: [`Cache::load`] says so.
    pub fn save(&mut self, folder: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        // Released when it is closed, however this ends.
        let _lock = lock(&folder.join(LOCK))?;
        if let Ok(Some(stored)) = Self::load(folder, &self.key) {
            self.merge(stored);
        }
        let path = folder.join(self.key.file_name());
        write_atomically(&path, |out| writeln!(out, "{:#}", self.to_json()))?;
        self.changed.clear();
        self.ceilings_changed = false;
        Ok(path)
    }

    /// Takes over what is stored, but for what has changed here.
    fn merge(&mut self, stored: Self) {
        if !self.ceilings_changed && stored.ceilings != Ceilings::default() {
            self.ceilings = stored.ceilings;
        }
        for own in std::mem::replace(&mut self.entries, stored.entries) {
            let at = self.entries.iter().position(|e| same(&e.problem, &own.problem));
            // What was cut off is no better than what went to its end.
            let worse = |stored: &TuningEntry| stored.untried.is_empty() && !own.untried.is_empty();
            match at {
                Some(at) if !self.changed.iter().any(|p| same(p, &own.problem)) || worse(&self.entries[at]) => {}
                Some(at) => {
                    self.entries.remove(at);
                    self.entries.push(own);
                }
                None => self.entries.push(own),
            }
        }
    }

    /// Whether a folder holds a cache of the same adapter for another driver or another version of this crate.
    pub fn has_outdated(folder: &Path, key: &TuningKey) -> bool {
        let (prefix, own) = (key.prefix(), key.file_name());
        let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.into_string().ok()).any(|name| name.starts_with(&prefix) && name != own)
    }

    /// What it holds for.
    pub fn key(&self) -> &TuningKey {
        &self.key
    }

    /// What the device can do, as far as it was measured.
    pub fn ceilings(&self) -> &Ceilings {
        &self.ceilings
    }

    /// Takes over what the device was measured to do.
    pub fn set_ceilings(&mut self, ceilings: Ceilings) {
        self.ceilings = ceilings;
        self.ceilings_changed = true;
    }

    /// What was found for exactly this operation, type and shape.
    pub fn get(&self, problem: &Problem) -> Option<&TuningEntry> {
        self.entries.iter().find(|e| same(&e.problem, problem))
    }

    /// Adds what was found for a problem just now, in place of what was there.
    pub fn insert(&mut self, problem: &Problem, tuned: Tuned) {
        self.insert_unfinished(problem, tuned, Vec::new());
    }

    /// The same where these schedules are still to be tried.
    pub fn insert_unfinished(&mut self, problem: &Problem, tuned: Tuned, untried: Vec<String>) {
        let Problem { op, m, n, k, storage, .. } = *problem;
        let problem = Problem::linear(op, m, n, k, storage);
        let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        self.entries.retain(|e| !same(&e.problem, &problem));
        self.entries.push(TuningEntry { problem, tuned, date, untried });
        self.changed.push(problem);
    }

    /// All that was found.
    pub fn entries(&self) -> &[TuningEntry] {
        &self.entries
    }

    /// For [`Device::set_tuning`]: the best schedules, and rates where ceilings were measured.
    pub fn tuning(&self, caps: &Caps) -> Tuning {
        let mut tuning = Tuning::new(rates(&self.ceilings, &caps.rates));
        for entry in &self.entries {
            tuning.insert(&entry.problem, entry.tuned);
        }
        tuning
    }

    fn to_json(&self) -> Value {
        let entries: Vec<_> = self.entries.iter().map(TuningEntry::to_json).collect();
        let ceilings = ceiling_fields(&self.ceilings).map(|(name, value)| (name.to_owned(), json!(value)));
        let ceilings = Map::from_iter(ceilings);
        let mut json = json!({ "schema": SCHEMA, "ceilings": ceilings, "entries": entries });
        for (name, value) in self.key.fields() {
            json[name] = value.into();
        }
        json
    }

    fn from_json(json: &Value, key: &TuningKey) -> std::result::Result<Self, String> {
        for (name, wanted) in [("schema", SCHEMA)].into_iter().chain(key.fields()) {
            match json[name].as_str() {
                Some(found) if found == wanted => {}
                Some(found) => return Err(format!("made for {name} {found:?}, not {wanted:?}")),
                None => return Err(format!("has no {name}")),
            }
        }
        let mut cache = Self::new(key.clone());
        let Some(ceilings) = json["ceilings"].as_object() else { return Err("has no ceilings".into()) };
        let ceiling = |name: &str| match ceilings.get(name) {
            Some(Value::Null) => Ok(None),
            Some(value) => positive(value, f64::MAX).map(Some).ok_or(format!("{name} is {value}")),
            None => Err(format!("has no {name}")),
        };
        cache.ceilings = Ceilings {
            fma_f32_tflops: ceiling("fma_f32_tflops")?,
            fma_f16_tflops: ceiling("fma_f16_tflops")?,
            cooperative_f16_tflops: ceiling("cooperative_f16_tflops")?,
            copy_gb_per_s: ceiling("copy_gb_per_s")?,
            // Of the CPU device, which is not tuned.
            read_gb_per_s: None,
        };
        for (i, entry) in json["entries"].as_array().ok_or("has no entries")?.iter().enumerate() {
            let entry = TuningEntry::from_json(entry).map_err(|e| format!("entry {i}: {e}"))?;
            if cache.get(&entry.problem).is_some() {
                return Err(format!("entry {i}: the same problem as an earlier one"));
            }
            cache.entries.push(entry);
        }
        Ok(cache)
    }
}

impl TuningEntry {
    fn to_json(&self) -> Value {
        let Problem { op, m, n, k, storage, .. } = self.problem;
        let Tuned { schedule, splits, seconds, .. } = self.tuned;
        let mut json = json!({
            "op": op.kernel_name(), "vector": op.vector().map(VectorLen::get), "dtype": storage.name(), "m": m, "n": n, "k": k,
            "way": schedule.to_string(), "splits": splits, "seconds": seconds, "date": self.date,
        });
        if !self.untried.is_empty() {
            json["untried"] = json!(self.untried);
        }
        json
    }

    fn from_json(json: &Value) -> std::result::Result<Self, String> {
        let bad = |name: &str| format!("{name} is {}", json[name]);
        let vector = match &json["vector"] {
            Value::Null => None,
            v => Some(v.as_u64().and_then(|v| VectorLen::new(v as usize).ok()).ok_or_else(|| bad("vector"))?),
        };
        let op = Op::all().find(|op| json["op"] == op.kernel_name() && op.vector() == vector);
        let op = op.ok_or_else(|| format!("{} at vector {}", bad("op"), json["vector"]))?;
        let storage = [DType::F32, DType::F16].into_iter().find(|d| json["dtype"] == d.name());
        let storage = storage.ok_or_else(|| bad("dtype"))?;
        let size = |name: &str, most: usize| {
            let size = json[name].as_u64().and_then(|size| usize::try_from(size).ok());
            size.filter(|size| (1..=most).contains(size)).ok_or_else(|| bad(name))
        };
        // What kernels can count.
        let most = u32::MAX as usize;
        let (m, n, k) = (size("m", most)?, size("n", most)?, size("k", most)?);
        let splits = size("splits", MAX_SPLITS)?;
        let schedule =
            json["way"].as_str().and_then(|name| Schedule::named(op, storage, name)).ok_or_else(|| bad("way"))?;
        let seconds = positive(&json["seconds"], LONGEST_CALL).ok_or_else(|| bad("seconds"))?;
        let date = json["date"].as_str().filter(|d| humantime::parse_rfc3339(d).is_ok()).ok_or_else(|| bad("date"))?;
        let untried = match &json["untried"] {
            Value::Null => Vec::new(),
            names => serde_json::from_value(names.clone()).map_err(|_| bad("untried"))?,
        };
        Ok(Self {
            problem: Problem::linear(op, m, n, k, storage),
            tuned: Tuned { n, schedule, splits, seconds },
            date: date.to_owned(),
            untried,
        })
    }
}

/// The lock of a folder, once nobody else has it. Some file systems know no locks: what is read and written there at
/// the same time can be lost, as it would be without any.
fn lock(path: &Path) -> Result<File> {
    let file = File::options().create(true).write(true).truncate(false).open(path).map_err(|e| Error::io(path, e))?;
    let _ = file.lock();
    Ok(file)
}

/// Whether two problems share an entry: form, output and epilogue make little difference.
fn same(a: &Problem, b: &Problem) -> bool {
    (a.op, a.storage, a.m, a.n, a.k) == (b.op, b.storage, b.m, b.n, b.k)
}

fn positive(value: &Value, most: f64) -> Option<f64> {
    value.as_f64().filter(|x| x.is_finite() && *x > 0.0 && *x <= most)
}

fn ceiling_fields(ceilings: &Ceilings) -> [(&'static str, Option<f64>); 4] {
    [
        ("fma_f32_tflops", ceilings.fma_f32_tflops),
        ("fma_f16_tflops", ceilings.fma_f16_tflops),
        ("cooperative_f16_tflops", ceilings.cooperative_f16_tflops),
        ("copy_gb_per_s", ceilings.copy_gb_per_s),
    ]
}

/// Measured rates for the planner, in place of those guessed from the device's kind. No probe measures the last cache,
/// whose ratio to memory is kept, nor what a dispatch costs. `None` unless arithmetic and memory were measured.
pub fn rates(ceilings: &Ceilings, guess: &Rates) -> Option<Rates> {
    let memory = ceilings.copy_gb_per_s? * 1e9;
    // Ceilings count two operations per multiply-add.
    Some(Rates {
        fma: ceilings.fma_f32_tflops? * 1e12 / 2.0,
        cooperative: ceilings.cooperative_f16_tflops.map_or(guess.cooperative, |x| x * 1e12 / 2.0),
        memory,
        cache: guess.cache * memory / guess.memory,
        dispatch: guess.dispatch,
    })
}

/// The plans for a problem that are worth measuring on a GPU: those whose estimate is not hopeless, and what is planned
/// where nothing was measured. That one is the first, for others to be compared with; the rest follow by their
/// estimates.
pub fn candidates(device: &Device, problem: &Problem) -> Result<Vec<Plan>> {
    let Some(caps) = device.caps() else { return Ok(Vec::new()) };
    let mut plans = vec![Plan::gpu(problem, caps, &Tuning::default())?];
    let all = device.candidates(problem)?;
    let limit = HOPELESS * all.first().map_or(0.0, Plan::estimated_seconds);
    let worth = all.into_iter().filter(|plan| plan.estimated_seconds() <= limit);
    let others: Vec<_> = worth.filter(|plan| plan.schedule() != plans[0].schedule()).collect();
    plans.extend(others);
    Ok(plans)
}

/// The plans that go on with an entry: the best one so far, for others to be compared with, and what was left untried.
pub fn remaining(device: &Device, entry: &TuningEntry) -> Result<Vec<Plan>> {
    let Some(caps) = device.caps() else { return Ok(Vec::new()) };
    let Tuned { schedule, splits, .. } = entry.tuned;
    let mut plans = vec![Plan::gpu_with(&entry.problem, caps, schedule, splits)?];
    let all = device.candidates(&entry.problem)?.into_iter();
    plans.extend(all.filter(|plan| entry.untried.contains(&plan.schedule())));
    Ok(plans)
}

/// The candidates of a problem and how each of them fared.
#[derive(Clone, Debug)]
pub struct Tried {
    trials: Vec<(Plan, Trial)>,
}

/// Races candidates (those of [`candidates`] or [`remaining`], in their order) on a case, until the policy's deadline.
/// `progress` is called with 0 when all is ready, and then with the number of those that have been tried.
pub fn try_all(
    device: &Device,
    case: &Case,
    op: Op,
    candidates: Vec<Plan>,
    policy: &Policy,
    seed: u64,
    progress: impl FnMut(usize),
) -> Result<Tried> {
    let trials = measure::race(device, case, op, &candidates, policy, seed, progress)?;
    Ok(Tried { trials: candidates.into_iter().zip(trials).collect() })
}

impl Tried {
    /// Every candidate, the first one in front.
    pub fn trials(&self) -> &[(Plan, Trial)] {
        &self.trials
    }

    /// The plan with the lowest median among those with a right result, and its seconds.
    pub fn best(&self) -> Option<(&Plan, f64)> {
        let timed = self.trials.iter().filter_map(|(plan, trial)| match trial {
            Trial::Timed(seconds) => Some((plan, *seconds)),
            Trial::Behind(_) | Trial::Wrong(_) | Trial::Refused(_) | Trial::Untried => None,
        });
        timed.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The best plan, for [`Cache::insert`].
    pub fn tuned(&self) -> Option<Tuned> {
        let (plan, seconds) = self.best()?;
        let Algorithm::Gpu(algorithm) = plan.algorithm() else { return None };
        Some(Tuned {
            n: plan.problem().n,
            schedule: algorithm.kernel().schedule(),
            splits: algorithm.splits(),
            seconds,
        })
    }

    /// Seconds of the first candidate, which is what would run if nothing had been measured, over those of the best.
    pub fn gain(&self) -> Option<f64> {
        // A plan that was given up after one sample has no median to compare.
        let Trial::Timed(untuned) = self.trials.first()?.1 else { return None };
        Some(untuned / self.best()?.1)
    }

    /// The candidates whose result was wrong or that did not run, and why.
    pub fn failures(&self) -> impl Iterator<Item = (&Plan, &str)> {
        self.trials.iter().filter_map(|(plan, trial)| match trial {
            Trial::Wrong(what) | Trial::Refused(what) => Some((plan, what.as_str())),
            Trial::Timed(_) | Trial::Behind(_) | Trial::Untried => None,
        })
    }

    /// The schedules of the candidates that there was no time for.
    pub fn untried(&self) -> Vec<String> {
        let untried = self.trials.iter().filter(|(_, trial)| *trial == Trial::Untried);
        untried.map(|(plan, _)| plan.schedule()).collect()
    }

    /// How many candidates gave a wrong result.
    pub fn wrong(&self) -> usize {
        self.trials.iter().filter(|(_, trial)| matches!(trial, Trial::Wrong(_))).count()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn key() -> TuningKey {
        let own = |s: &str| s.to_owned();
        TuningKey {
            version: own("0.1.0"),
            adapter: own("llvmpipe (LLVM 15, 256 bits)"),
            driver: own("llvmpipe Mesa 22"),
            backend: own("vulkan"),
            shader_checks: own("trusted"),
        }
    }

    fn cache() -> Cache {
        let mut cache = Cache::new(key());
        cache.ceilings = Ceilings { fma_f32_tflops: Some(0.5), copy_gb_per_s: Some(8.0), ..Ceilings::default() };
        for op in Op::all() {
            for storage in [DType::F32, DType::F16] {
                for (i, schedule) in Schedule::of(op, storage).into_iter().enumerate() {
                    let problem = Problem::linear(op, 768, 1 << i, 3072, storage);
                    cache.insert(&problem, Tuned { n: 1 << i, schedule, splits: 1 << (i % 5), seconds: 0.25 });
                }
            }
        }
        cache.changed.clear();
        cache
    }

    /// Writes a cache after `change` and loads it.
    fn reloaded(change: impl FnOnce(&mut Value)) -> Result<Option<Cache>> {
        let folder = tempfile::tempdir().unwrap();
        let mut json = cache().to_json();
        change(&mut json);
        std::fs::write(folder.path().join(key().file_name()), json.to_string()).unwrap();
        Cache::load(folder.path(), &key())
    }

    #[test]
    fn a_cache_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("made").join("for it");
        assert_eq!(Cache::load(&inner, &key()).unwrap(), None, "a missing file is no error");
        let mut cache = cache();
        let path = cache.save(&inner).unwrap();
        assert_eq!(path.file_name().unwrap().to_str().unwrap(), key().file_name());
        // Every schedule of every operation finds itself by its name.
        assert_eq!(Cache::load(&inner, &key()).unwrap().unwrap(), cache);
        std::fs::write(&path, cache.to_json().to_string()).unwrap();
        assert_eq!(Cache::load(&inner, &key()).unwrap().unwrap(), cache);
        // No temporary file is left.
        let mut names: Vec<_> = std::fs::read_dir(&inner).unwrap().map(|f| f.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [key().file_name().into(), LOCK.into()] as [std::ffi::OsString; 2]);
    }

    /// A problem that is told from others by its `n`, and a result for it that is told by its seconds.
    fn found(n: usize, seconds: f64) -> (Problem, Tuned) {
        let schedule = Schedule::of(Op::Dense, DType::F32)[0];
        (Problem::linear(Op::Dense, 64, n, 64, DType::F32), Tuned { n, schedule, splits: 1, seconds })
    }

    fn add(cache: &mut Cache, n: usize, seconds: f64) {
        let (problem, tuned) = found(n, seconds);
        cache.insert(&problem, tuned);
    }

    fn seconds(cache: &Cache, n: usize) -> Option<f64> {
        Some(cache.get(&found(n, 0.0).0)?.tuned.seconds)
    }

    /// Two that began with the same file: each has what only it found, and nobody's newer result gives way to an older
    /// one that was merely read.
    #[test]
    fn of_two_that_save_neither_undoes_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let mut first = Cache::new(key());
        [1, 2].into_iter().for_each(|n| add(&mut first, n, 1.0));
        first.set_ceilings(Ceilings { copy_gb_per_s: Some(8.0), ..Ceilings::default() });
        first.save(folder).unwrap();
        let mut second = Cache::load(folder, &key()).unwrap().unwrap();

        add(&mut first, 1, 2.0);
        add(&mut first, 3, 3.0);
        first.set_ceilings(Ceilings { copy_gb_per_s: Some(9.0), ..Ceilings::default() });
        first.save(folder).unwrap();
        add(&mut second, 4, 4.0);
        second.save(folder).unwrap();
        let stored = Cache::load(folder, &key()).unwrap().unwrap();
        assert_eq!([1, 2, 3, 4].map(|n| seconds(&stored, n)), [2.0, 1.0, 3.0, 4.0].map(Some));
        assert_eq!(stored.ceilings.copy_gb_per_s, Some(9.0));
        // What others found is not measured twice.
        assert_eq!(second, stored);

        // What was measured again counts, here and there.
        add(&mut first, 2, 5.0);
        add(&mut second, 2, 6.0);
        second.save(folder).unwrap();
        first.save(folder).unwrap();
        assert_eq!(seconds(&Cache::load(folder, &key()).unwrap().unwrap(), 2), Some(5.0));

        // But not what was cut off in place of what was not.
        let (problem, tuned) = found(4, 7.0);
        first.insert_unfinished(&problem, tuned, vec!["64x64x16/2".into()]);
        first.save(folder).unwrap();
        assert_eq!(seconds(&first, 4), Some(4.0));
        let (problem, tuned) = found(5, 7.0);
        first.insert_unfinished(&problem, tuned, vec!["64x64x16/2".into()]);
        first.save(folder).unwrap();
        let stored = Cache::load(folder, &key()).unwrap().unwrap();
        assert_eq!(stored.get(&problem).unwrap().untried(), ["64x64x16/2"]);

        // A file that is not sound is replaced.
        std::fs::write(folder.join(key().file_name()), "{").unwrap();
        second.save(folder).unwrap();
        assert_eq!(Cache::load(folder, &key()).unwrap().unwrap(), second);
    }

    /// Many at once, each saving after every result, as `tune` does.
    #[test]
    fn no_result_is_lost_where_many_save_at_once() {
        const WRITERS: usize = 6;
        const RESULTS: usize = 12;
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let folder = folder.path();
                scope.spawn(move || {
                    let mut cache = Cache::load(folder, &key()).unwrap().unwrap_or_else(|| Cache::new(key()));
                    for result in 0..RESULTS {
                        add(&mut cache, 1 + writer * RESULTS + result, 1.0);
                        cache.save(folder).unwrap();
                    }
                });
            }
        });
        let stored = Cache::load(folder.path(), &key()).unwrap().unwrap();
        assert_eq!(stored.entries.len(), WRITERS * RESULTS);
    }

    #[test]
    fn an_entry_takes_the_place_of_the_one_before() {
        let mut cache = cache();
        let (count, entry) = (cache.entries.len(), cache.entries[3].clone());
        cache.insert(&entry.problem, Tuned { seconds: 0.125, ..entry.tuned });
        assert_eq!((cache.entries.len(), cache.get(&entry.problem).unwrap().tuned.seconds), (count, 0.125));
        assert!(cache.get(&Problem { n: 3, ..entry.problem }).is_none());
    }

    #[test]
    fn files_differ_for_every_part_of_the_key() {
        let other = || "other".to_owned();
        let keys = [
            key(),
            TuningKey { version: other(), ..key() },
            TuningKey { adapter: other(), ..key() },
            TuningKey { driver: other(), ..key() },
            TuningKey { backend: other(), ..key() },
            TuningKey { shader_checks: other(), ..key() },
        ];
        let mut names: Vec<_> = keys.iter().map(TuningKey::file_name).collect();
        assert!(names[0].starts_with("llvmpipe--llvm-15--256-bits--vulkan-trusted-"), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), keys.len());
        // The name must not change from build to build.
        assert!(names.iter().any(|n| n.ends_with("-81c13ec041255adb.json")), "{names:?}");

        let folder = tempfile::tempdir().unwrap();
        assert!(!Cache::has_outdated(&folder.path().join("none"), &keys[0]));
        Cache::new(keys[0].clone()).save(folder.path()).unwrap();
        assert!(!Cache::has_outdated(folder.path(), &keys[0]) && !Cache::has_outdated(folder.path(), &keys[2]));
        assert!(Cache::has_outdated(folder.path(), &keys[1]) && Cache::has_outdated(folder.path(), &keys[3]));
    }

    #[test]
    fn what_is_not_sound_is_refused_by_name() {
        let set =
            |pointer: &'static str, value: Value| move |json: &mut Value| *json.pointer_mut(pointer).unwrap() = value;
        let entry = |field: &'static str, value: Value| move |json: &mut Value| json["entries"][1][field] = value;
        type Change = Box<dyn FnOnce(&mut Value)>;
        let cases: Vec<(Change, &str)> = vec![
            (Box::new(set("/schema", json!("sparse24-tuning/2"))), "schema"),
            (Box::new(set("/version", json!("0.0.9"))), "version \"0.0.9\", not \"0.1.0\""),
            (Box::new(set("/adapter", json!("other"))), "adapter"),
            (Box::new(set("/driver", json!("Mesa 23"))), "driver \"Mesa 23\""),
            (Box::new(set("/backend", json!(7))), "has no backend"),
            (Box::new(set("/shader_checks", json!("checked"))), "shader_checks"),
            (Box::new(set("/entries", json!({}))), "has no entries"),
            (Box::new(set("/ceilings", Value::Null)), "has no ceilings"),
            (Box::new(set("/ceilings/copy_gb_per_s", json!(-8.0))), "copy_gb_per_s is -8.0"),
            (Box::new(set("/ceilings/fma_f32_tflops", json!("0.5"))), "fma_f32_tflops"),
            (Box::new(|json| *json = json!([])), "has no schema"),
            (Box::new(entry("way", json!("64x64x17"))), "entry 1: way is \"64x64x17\""),
            // A schedule of another operation.
            (Box::new(entry("way", json!("lanes_128x128x16"))), "way"),
            (Box::new(entry("splits", json!(0))), "splits is 0"),
            (Box::new(entry("splits", json!(17))), "splits is 17"),
            (Box::new(entry("seconds", json!(-1e-3))), "seconds is -0.001"),
            (Box::new(entry("seconds", json!(0.0))), "seconds"),
            (Box::new(entry("seconds", json!(f64::NAN))), "seconds is null"),
            (Box::new(entry("seconds", json!(1e300))), "seconds"),
            (Box::new(entry("m", json!(0))), "m is 0"),
            (Box::new(entry("n", json!(1u64 << 32))), "n is 4294967296"),
            (Box::new(entry("k", json!(u64::MAX))), "k is"),
            (Box::new(entry("k", json!(-1))), "k is -1"),
            (Box::new(entry("k", json!(0.5))), "k is 0.5"),
            (Box::new(entry("op", json!("sparse"))), "op"),
            (Box::new(entry("vector", json!(32))), "at vector 32"),
            (Box::new(entry("vector", json!(3))), "vector is 3"),
            (Box::new(entry("dtype", json!("bf16"))), "dtype"),
            (Box::new(entry("date", json!("yesterday"))), "date"),
            (Box::new(entry("untried", json!([1]))), "untried is [1]"),
            (Box::new(|json| json["entries"][1] = json["entries"][0].clone()), "entry 1: the same problem"),
        ];
        for (change, named) in cases {
            let error = reloaded(change).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains(&key().file_name()), "{named}: {error}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(key().file_name());
        let whole = cache().to_json().to_string();
        for text in ["", "{", &whole[..whole.len() - 1], &whole[..whole.len() / 2], "NaN", "\0\0\0"] {
            std::fs::write(&path, text).unwrap();
            assert!(Cache::load(folder.path(), &key()).unwrap_err().to_string().contains("not JSON"), "{text}");
        }
        let overflow = whole.replacen("0.25", "1e999", 1);
        std::fs::write(&path, overflow).unwrap();
        assert!(Cache::load(folder.path(), &key()).is_err());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Cache::load(folder.path(), &key()).is_err(), "a folder is no file");
    }

    #[test]
    fn rates_come_from_ceilings_where_those_were_measured() {
        let guess = Rates { fma: 1.0, cooperative: 7.0, memory: 2.0, cache: 6.0, dispatch: 9.0 };
        let measured = Ceilings { fma_f32_tflops: Some(4.0), copy_gb_per_s: Some(3.0), ..Ceilings::default() };
        let expected = Rates { fma: 2e12, cooperative: 7.0, memory: 3e9, cache: 9e9, dispatch: 9.0 };
        assert_eq!(rates(&measured, &guess), Some(expected));
        let coop = Ceilings { cooperative_f16_tflops: Some(10.0), ..measured };
        assert_eq!(rates(&coop, &guess), Some(Rates { cooperative: 5e12, ..expected }));
        assert_eq!(rates(&Ceilings { copy_gb_per_s: None, ..measured }, &guess), None);
        assert_eq!(rates(&Ceilings::default(), &guess), None);
    }
}
