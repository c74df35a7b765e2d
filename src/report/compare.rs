//! A run beside an earlier one: which rows became slower, which faster, and which of them one cannot tell.
//!
//! Nothing is measured here. On a shared machine the median of the same program wanders by some percent from run to
//! run, and a single sample strays by far more, so neither the medians nor the slowest samples alone say that anything
//! changed. The rule: a row is *slower* if its median grew by more than the given percentage and the middle halves of
//! its samples do not overlap, which leaves two strays on each side out of ten samples; it is *faster* if its median
//! shrank, by however little, and they do not overlap either. The 95 % intervals of the medians must not overlap, too:
//! with few samples they reach further than the middle halves. Files without quartiles are judged by all their samples.
//!
//! A row whose median is [noisy](crate::measure::noise) in either run was measured while something else went on, and
//! that may have gone on all through one of the runs. It is *noisy*, neither slower nor faster, unless the two runs are
//! further apart than the noise that was seen: the fastest sample of the slower run is slower than the slowest one of
//! the faster run by a larger factor than the samples of either run differ by.
//!
//! Invariant: every row of both runs is in the comparison, with its verdict or the reason why it has none, and at least
//! one of them was measured both times.

use std::cmp::Ordering;
use std::fmt;
use std::fmt::Write as _;
use std::path::Path;

use super::file::{File, Origin, RowTimes};
use super::sheet::{Sheet, Shown, wrapped};
use super::{or_dash, plural, significant};
use crate::error::{Error, Result};
use crate::mask::VectorLen;
use crate::matrix::DType;
use crate::measure::PlannedBy;
use crate::problem::Op;

/// What a run is of. Runs of different scopes have no row in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Single products, of any layers.
    Layers,
    /// One model, in batches of one shape.
    Model {
        /// Name or folder, as given.
        name: String,
        /// Texts of a batch.
        batch: usize,
        /// Tokens of each.
        seq: usize,
    },
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layers => write!(f, "single layers"),
            Self::Model { name, batch, seq } => write!(f, "the model {name} in batches of {batch} x {seq} tokens"),
        }
    }
}

/// What makes rows of two runs of one scope the same measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowKey {
    /// Name of the layer; the phase of a language model, and empty for another model.
    pub name: String,
    /// `m`, `n` and `k` of a layer.
    pub shape: Option<(usize, usize, usize)>,
    /// `dense`, `sparse24`, `masked`, `masked24` or `auto`.
    pub op: String,
    /// Vector length of 2:4 rows.
    pub vector: Option<usize>,
    /// Element type.
    pub dtype: String,
}

impl RowKey {
    /// The key of a model's row; that of a layer has a name and a shape, too.
    pub fn new(op: Op, planned_by: PlannedBy, dtype: DType) -> Self {
        Self {
            name: String::new(),
            shape: None,
            op: if planned_by == PlannedBy::Auto { "auto" } else { op.kernel_name() }.to_owned(),
            vector: op.vector().map(VectorLen::get),
            dtype: dtype.to_string(),
        }
    }

    fn shape(&self) -> String {
        self.shape.map(|(m, n, k)| format!("{m}x{n}x{k}")).unwrap_or_default()
    }
}

impl fmt::Display for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.shape.is_some() {
            write!(f, "{} {} ", self.name, self.shape())?;
        } else if !self.name.is_empty() {
            write!(f, "{} ", self.name)?;
        }
        write!(f, "{}", self.op)?;
        if let Some(v) = self.vector {
            write!(f, " V={v}")?;
        }
        write!(f, " {}", self.dtype)
    }
}

/// One row of a run, of whichever kind.
#[derive(Clone, Debug)]
struct Measured {
    key: RowKey,
    kernel: String,
    clock: Option<String>,
    times: RowTimes,
    verified: bool,
}

impl Measured {
    /// Whether both the median and the middle half of the samples are known.
    fn sampled(&self) -> bool {
        self.times.median.is_some() && self.times.middle().is_some()
    }
}

/// A run that was read from a file.
#[derive(Clone, Debug)]
pub struct Run {
    scope: Scope,
    environment: Origin,
    rows: Vec<Measured>,
}

impl Run {
    /// Reads and checks a file of `sparse24 bench`, with or without `--model`.
    ///
    /// # Errors
    ///
    /// What [`File::open`] refuses, and files without times; the file is named.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(File::open(path)?).map_err(|e| Error::invalid(format!("{}: {e}", path.display())))
    }

    /// The run that a file is of.
    ///
    /// # Errors
    ///
    /// A file of a schema that has no times.
    pub fn new(file: File) -> Result<Self> {
        let no_times = |schema: &str| {
            let (layers, models) = (super::SCHEMA, super::MODEL_SCHEMA);
            Err(Error::invalid(format!("schema {schema} has no times to compare with; {layers} and {models} have")))
        };
        Ok(match file {
            File::Bench(bench) => {
                let rows = bench.rows.into_iter().map(|row| Measured {
                    times: row.times,
                    key: RowKey {
                        name: row.name,
                        shape: Some((row.m, row.n, row.k)),
                        op: row.op,
                        vector: row.vector,
                        dtype: row.dtype,
                    },
                    kernel: row.kernel,
                    clock: row.clock,
                    verified: row.verified,
                });
                Self { scope: Scope::Layers, environment: bench.environment, rows: rows.collect() }
            }
            File::Model(bench) => {
                let rows = bench.rows.into_iter().map(|row| Measured {
                    times: row.times,
                    key: RowKey {
                        name: row.phase.unwrap_or_default(),
                        shape: None,
                        op: row.op,
                        vector: row.vector,
                        dtype: row.dtype,
                    },
                    kernel: row.kernels.join(", "),
                    clock: None,
                    verified: row.verified,
                });
                let scope = Scope::Model { name: bench.model, batch: bench.batch, seq: bench.seq };
                Self { scope, environment: bench.environment, rows: rows.collect() }
            }
            File::Eval(_) => return no_times("sparse24-eval/1"),
            File::Prune(_) => return no_times("sparse24-prune/1"),
            File::Train(_) => return no_times("sparse24-train/1"),
            File::Sensitivity(_) => return no_times("sparse24-sensitivity/1"),
            File::Compile(_) => return no_times("sparse24-compile/1"),
        })
    }

    /// Whether a run of `scope` with rows of these keys can be compared with this one: to be asked before it is made.
    ///
    /// # Errors
    ///
    /// Another scope, or no row in common that was timed: a comparison of nothing would find nothing slower.
    pub fn covers<'a>(&self, scope: &Scope, keys: impl IntoIterator<Item = &'a RowKey>) -> Result<()> {
        if self.scope != *scope {
            return Err(Error::invalid(format!("is a run of {}, and this one is of {scope}", self.scope)));
        }
        let mut own = Vec::new();
        for key in keys {
            own.extend(self.rows.iter().filter(|row| row.key == *key));
        }
        if own.is_empty() {
            let first = self.rows.first().map(|row| format!("; its first is {}", row.key)).unwrap_or_default();
            return Err(Error::invalid(format!("has no row in common with this run{first}")));
        }
        if !own.iter().any(|row| row.sampled()) {
            return Err(Error::invalid("has no times of the rows that it has in common with this run"));
        }
        Ok(())
    }

    /// Compares a later run with this one. Rows that grew by no more than `percent` are not slower.
    ///
    /// # Errors
    ///
    /// As [`Run::covers`].
    pub fn compare(&self, later: &Self, percent: f64) -> Result<Comparison> {
        self.covers(&later.scope, later.rows.iter().map(|row| &row.key))?;
        // Rows of one key, such as unnamed tensors of one shape, are matched in order.
        let mut left: Vec<&Measured> = self.rows.iter().collect();
        let mut rows = Vec::new();
        for now in &later.rows {
            let before = left.iter().position(|row| row.key == now.key).map(|at| left.remove(at));
            rows.push(Change::new(before, Some(now), &now.key, percent));
        }
        rows.extend(left.into_iter().map(|before| Change::new(Some(before), None, &before.key, percent)));
        Ok(Comparison { date: self.environment.date.clone(), differences: differences(self, later), rows, percent })
    }
}

/// What was found of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// The median grew by more than the percentage, and the middle halves of the samples are apart.
    Slower,
    /// The median shrank, and the middle halves of the samples are apart.
    Faster,
    /// The middle halves of the samples overlap.
    WithinSpread,
    /// The median grew, by no more than the percentage.
    WithinPercent,
    /// The samples are apart, and noise that was seen may be why.
    Noisy,
    /// Not measured both times, for this reason.
    NotCompared(&'static str),
}

/// A row of either run or of both.
#[derive(Clone, Debug)]
pub struct Change {
    key: RowKey,
    before_ms: Option<f64>,
    now_ms: Option<f64>,
    /// Both kernels, if they differ.
    kernels: Option<(String, String)>,
    kind: ChangeKind,
}

impl Change {
    fn new(before: Option<&Measured>, now: Option<&Measured>, key: &RowKey, percent: f64) -> Self {
        let both = before.zip(now);
        let kind = match both {
            None if now.is_some() => ChangeKind::NotCompared("new"),
            None => ChangeKind::NotCompared("not measured now"),
            Some((before, now)) => kind(before, now, percent),
        };
        let kernels = both.filter(|(before, now)| before.kernel != now.kernel);
        Self {
            key: key.clone(),
            before_ms: before.and_then(|row| row.times.median),
            now_ms: now.and_then(|row| row.times.median),
            kernels: kernels.map(|(before, now)| (before.kernel.clone(), now.kernel.clone())),
            kind,
        }
    }

    /// The row.
    pub fn key(&self) -> &RowKey {
        &self.key
    }

    /// What was found of it.
    pub fn kind(&self) -> ChangeKind {
        self.kind
    }

    /// By how many percent the median grew, where there are both.
    pub fn percent(&self) -> Option<f64> {
        self.before_ms.zip(self.now_ms).map(|(before, now)| (now / before - 1.0) * 100.0)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ms: Option<f64>| ms.map_or_else(|| "no".to_owned(), |ms| significant(ms, 4));
        write!(f, "{}: {} ms before, {} ms now", self.key, ms(self.before_ms), ms(self.now_ms))?;
        self.percent().map_or(Ok(()), |percent| write!(f, " ({percent:+.1} %)"))
    }
}

fn kind(before: &Measured, now: &Measured, percent: f64) -> ChangeKind {
    match (before.verified, now.verified) {
        (true, true) => {}
        (true, false) => return ChangeKind::NotCompared("FAILED now"),
        (false, true) => return ChangeKind::NotCompared("FAILED before"),
        (false, false) => return ChangeKind::NotCompared("FAILED before and now"),
    }
    if before.clock.is_some() && now.clock.is_some() && before.clock != now.clock {
        return ChangeKind::NotCompared("another clock");
    }
    let (Some(old), Some(new), Some(order)) = (before.times.median, now.times.median, now.times.against(before.times))
    else {
        return ChangeKind::NotCompared("spread unknown");
    };
    if order != Ordering::Equal && (before.times.noisy || now.times.noisy) && !beyond_noise(before.times, now.times) {
        return ChangeKind::Noisy;
    }
    match order {
        Ordering::Greater if new > old * (1.0 + percent / 100.0) => ChangeKind::Slower,
        Ordering::Greater => ChangeKind::WithinPercent,
        Ordering::Less => ChangeKind::Faster,
        Ordering::Equal => ChangeKind::WithinSpread,
    }
}

/// Whether two runs are further apart than the samples of either: see the [module](self).
fn beyond_noise(before: RowTimes, now: RowTimes) -> bool {
    let Some((old, new)) = before.factor().zip(now.factor()) else { return false };
    let between = |fast: RowTimes, slow: RowTimes| slow.min.zip(fast.max).map_or(0.0, |(slow, fast)| slow / fast);
    between(before, now).max(between(now, before)) > old.max(new)
}

/// What of the two runs' environments may explain a change, one line each.
fn differences(before: &Run, now: &Run) -> Vec<String> {
    let (old, new) = (&before.environment, &now.environment);
    let mut lines = Vec::new();
    if old.device != new.device {
        lines.push(format!(
            "ANOTHER DEVICE: {} before, {} now: changes are the device's as much as the program's",
            old.device, new.device
        ));
    }
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let sampling = |of: &Origin| match (of.samples, of.sample_ms) {
        (Some(samples), Some(ms)) => format!("{samples} samples of {ms} ms"),
        (Some(samples), None) => format!("{samples} samples"),
        _ => String::new(),
    };
    let libraries =
        |of: &Origin| of.libraries.iter().map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>();
    let clocks = |run: &Run| {
        let mut clocks: Vec<_> = run.rows.iter().filter_map(|row| row.clock.clone()).collect();
        clocks.sort();
        clocks.dedup();
        clocks.join(", ")
    };
    // A CPU that is the device was named above.
    let cpu = |of: &Origin| if of.kind == "cpu" { String::new() } else { of.cpu.clone() };
    let threads = |of: &Origin| of.threads.map(|t| t.to_string()).unwrap_or_default();
    for (name, old, new) in [
        ("kind of device", old.kind.clone(), new.kind.clone()),
        ("driver", text(&old.driver), text(&new.driver)),
        ("backend", text(&old.backend), text(&new.backend)),
        ("threads", threads(old), threads(new)),
        ("vector instructions", text(&old.simd), text(&new.simd)),
        ("shaders", text(&old.shader_checks), text(&new.shader_checks)),
        ("tuning", text(&old.tuning), text(&new.tuning)),
        ("sampling", sampling(old), sampling(new)),
        ("clock", clocks(before), clocks(now)),
        ("host's processor", cpu(old), cpu(new)),
        ("system", format!("{} {}", old.os, old.arch), format!("{} {}", new.os, new.arch)),
        ("program", old.program.clone(), new.program.clone()),
        ("version", old.version.clone(), new.version.clone()),
        ("commit", text(&old.commit), text(&new.commit)),
        ("libraries", libraries(old).join(", "), libraries(new).join(", ")),
    ] {
        if old != new {
            let or_none = |x: String| if x.is_empty() { "none".to_owned() } else { x };
            lines.push(format!("{name}: {} before, {} now", or_none(old), or_none(new)));
        }
    }
    lines
}

/// Two runs, row by row.
#[derive(Clone, Debug)]
pub struct Comparison {
    date: String,
    differences: Vec<String>,
    rows: Vec<Change>,
    percent: f64,
}

impl Comparison {
    /// Every row of either run: the later one's in its order, then those that only the earlier one has.
    pub fn rows(&self) -> &[Change] {
        &self.rows
    }

    /// What else changed between the runs, one line each.
    pub fn differences(&self) -> &[String] {
        &self.differences
    }

    /// The rows that are slower by more than the percentage and the spread.
    pub fn slower(&self) -> impl Iterator<Item = &Change> {
        self.rows.iter().filter(|row| row.kind == ChangeKind::Slower)
    }

    /// The rows of which noise leaves open whether they changed.
    pub fn noisy(&self) -> impl Iterator<Item = &Change> {
        self.rows.iter().filter(|row| row.kind == ChangeKind::Noisy)
    }

    /// The comparison as text, with `earlier` for the file of the earlier run.
    pub fn text(&self, earlier: &str) -> String {
        let mut text = wrapped(&format!("compared with {earlier} of {}", self.date));
        self.differences.iter().for_each(|line| text += &wrapped(line));

        let within = format!("within {} %", self.percent);
        let mut sheet = Sheet::new("layer")
            .words("m x n x k", Shown::Always)
            .words("op", Shown::Always)
            .numbers("V", Shown::Always)
            .words("type", Shown::Always)
            .numbers("before ms", Shown::Always)
            .numbers("now ms", Shown::Always)
            .numbers("change", Shown::Always)
            .words("verdict", Shown::Always);
        // A shape that was given as such needs no name.
        let only_shapes = self.rows.iter().all(|row| row.key.name == "shape");
        for row in &self.rows {
            let Change { key, .. } = row;
            let kind = match row.kind {
                ChangeKind::Slower => "slower",
                ChangeKind::Faster => "faster",
                ChangeKind::WithinSpread => "within the spread",
                ChangeKind::WithinPercent => &within,
                ChangeKind::Noisy => "noisy",
                ChangeKind::NotCompared(reason) => reason,
            };
            sheet.push(
                if only_shapes { "" } else { &key.name },
                [
                    key.shape(),
                    key.op.clone(),
                    key.vector.map(|v| v.to_string()).unwrap_or_default(),
                    key.dtype.clone(),
                    or_dash(row.before_ms, 4),
                    or_dash(row.now_ms, 4),
                    row.percent().map_or_else(|| "-".to_owned(), |percent| format!("{percent:+.1} %")),
                    kind.to_owned(),
                ],
            );
        }
        let _ = writeln!(text, "\n{}", sheet.text(false));
        for row in &self.rows {
            if let Some((before, now)) = &row.kernels {
                text += &wrapped(&format!("{}: kernel {before} -> {now}", row.key));
            }
        }
        text += &wrapped(&format!(
            "change: of the median, + is slower; slower: by more than {} %, and the middle halves of the samples and the \
             95 % intervals of the medians are apart; faster: by however little, if they are apart; noisy: they are \
             apart by no more than noise that was seen",
            self.percent
        ));
        let of = |kind: fn(ChangeKind) -> bool| self.rows.iter().filter(|row| kind(row.kind)).count();
        let noisy = match self.noisy().count() {
            0 => String::new(),
            some => format!("{some} noisy, "),
        };
        let _ = writeln!(
            text,
            "of {} {} slower, {} faster, {} unchanged, {noisy}{} not compared",
            plural(self.rows.len(), "row"),
            of(|v| v == ChangeKind::Slower),
            of(|v| v == ChangeKind::Faster),
            of(|v| matches!(v, ChangeKind::WithinSpread | ChangeKind::WithinPercent)),
            of(|v| matches!(v, ChangeKind::NotCompared(_))),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn environment() -> Value {
        json!({
            "version": "1", "date": "2026-01-01T00:00:00Z", "os": "linux", "arch": "x86_64", "cpu": "a cpu",
            "device": "a cpu", "kind": "cpu", "threads": 1, "simd": "avx2", "samples": 10, "sample_ms": 20.0,
            "command": "sparse24 bench",
        })
    }

    /// A row of `op` with min, q1, median, q3, max; without any, one that failed.
    fn row(op: &str, times: Option<[f64; 5]>) -> Value {
        let of = |i: usize| times.map(|t| t[i]);
        let tflops = of(2).map(|ms| 2.0 * 4.0 * 5.0 * 8.0 / (ms * 1e9));
        json!({
            "name": "layer", "op": op, "m": 4, "n": 5, "k": 8, "dtype": "f32", "accumulate": "f32",
            "vector": (op == "sparse24").then_some(1), "kernel": "a kernel", "device": "a cpu", "threads": 1,
            "min_ms": of(0), "q1_ms": of(1), "median_ms": of(2), "q3_ms": of(3), "max_ms": of(4), "samples": 10,
            "clock": "host_wall", "effective_tflops": tflops, "executed_tflops": tflops, "speedup_vs_dense": null,
            "error_over_bound": 0.1, "verified": times.is_some(), "command": "sparse24 bench",
        })
    }

    /// A row whose middle half is from 2 % below its median to 2 % above, and whose strays are far off.
    fn around(op: &str, ms: f64) -> Value {
        row(op, Some([0.5 * ms, 0.98 * ms, ms, 1.02 * ms, 5.0 * ms]))
    }

    fn file(environment: Value, rows: &[Value]) -> Result<Run> {
        let json = json!({"schema": crate::report::SCHEMA, "environment": environment, "ceilings": {}, "rows": rows});
        Run::new(File::parse(&json.to_string())?)
    }

    fn run(rows: &[Value]) -> Result<Run> {
        file(environment(), rows)
    }

    fn verdicts(before: &[Value], now: &[Value], percent: f64) -> Result<Vec<ChangeKind>> {
        Ok(run(before)?.compare(&run(now)?, percent)?.rows.iter().map(Change::kind).collect())
    }

    fn model(model: &str, batch: usize, ops: &[(&str, f64)]) -> Result<Run> {
        let row = |&(op, ms): &(&str, f64)| {
            json!({
                "op": op, "vector": null, "dtype": "f32", "kernels": ["a", "b"], "min_ms": ms, "q1_ms": ms,
                "median_ms": ms, "q3_ms": ms, "max_ms": ms, "parts": null, "speedup_vs_dense": null,
                "sequences_per_second": batch as f64 / ms * 1e3, "weight_bytes": 1, "verified": true, "command": "x",
            })
        };
        let rows: Vec<_> = ops.iter().map(row).collect();
        let json = json!({
            "schema": crate::report::MODEL_SCHEMA, "environment": environment(), "model": model, "linear_weights": 9,
            "batch": batch, "seq": 64, "rows": rows,
        });
        Run::new(File::parse(&json.to_string())?)
    }

    #[test]
    fn a_change_counts_beyond_the_percentage_and_the_middle_halves_of_the_samples() -> Result<()> {
        use ChangeKind::*;
        for (ms, percent, expected) in [
            (1.0, 0.0, WithinSpread),
            // 1.03 * 0.98 is below 1.02.
            (1.03, 0.0, WithinSpread),
            (0.97, 0.0, WithinSpread),
            (1.06, 0.0, Slower),
            (1.06, 5.0, Slower),
            (1.06, 7.0, WithinPercent),
            (0.94, 0.0, Faster),
            // The percentage is about what is slower alone.
            (0.94, 50.0, Faster),
            (100.0, 50.0, Slower),
        ] {
            let verdicts = verdicts(&[around("dense", 1.0)], &[around("dense", ms)], percent)?;
            assert_eq!(verdicts, [expected], "{ms} ms, {percent} %");
        }
        // A wide spread explains what a narrow one does not, on either side.
        let wide = row("dense", Some([0.4, 0.5, 1.0, 1.5, 1.6]));
        let high = row("dense", Some([1.1, 1.3, 1.4, 1.9, 2.0]));
        assert_eq!(verdicts(std::slice::from_ref(&wide), &[around("dense", 1.4)], 5.0)?, [WithinSpread]);
        assert_eq!(verdicts(&[around("dense", 1.35)], &[high], 0.0)?, [WithinSpread]);
        Ok(())
    }

    #[test]
    fn noise_that_was_seen_is_no_change() -> Result<()> {
        use ChangeKind::*;
        let noisy = |mut row: Value| {
            row["noisy"] = true.into();
            row
        };
        // Samples of one run differ by a factor of 1.6.
        let at = |ms: f64| row("dense", Some([0.8, 0.9, 1.0, 1.1, 1.28].map(|t| t * ms)));
        for (before, now, expected) in [
            (at(1.0), at(3.0), Slower),
            (noisy(at(1.0)), at(1.5), Noisy),
            (at(1.0), noisy(at(1.5)), Noisy),
            (noisy(at(1.0)), noisy(at(0.6)), Noisy),
            // 0.8 * 2.5 over 1.28 is less than 1.6, and 0.8 * 2.6 over it is more.
            (noisy(at(1.0)), at(2.5), Noisy),
            (noisy(at(1.0)), at(2.6), Slower),
            (at(2.6), noisy(at(1.0)), Faster),
            (noisy(at(1.0)), at(1.1), WithinSpread),
        ] {
            let found = verdicts(std::slice::from_ref(&before), std::slice::from_ref(&now), 5.0)?;
            assert_eq!(found, [expected], "{before} {now}");
        }
        let comparison = run(&[noisy(at(1.0))])?.compare(&run(&[at(1.5)])?, 5.0)?;
        assert_eq!((comparison.slower().count(), comparison.noisy().count()), (0, 1));
        assert!(comparison.text("x").ends_with("of 1 row 0 slower, 0 faster, 0 unchanged, 1 noisy, 0 not compared\n"));

        // The interval of a median may reach further than the middle half of few samples.
        let mut open = around("dense", 1.1);
        (open["median_low_ms"], open["median_high_ms"]) = (0.9.into(), 1.3.into());
        assert_eq!(verdicts(&[around("dense", 1.0)], std::slice::from_ref(&open), 0.0)?, [WithinSpread]);
        (open["median_low_ms"], open["median_high_ms"]) = (1.05.into(), 1.15.into());
        assert_eq!(verdicts(&[around("dense", 1.0)], std::slice::from_ref(&open), 0.0)?, [Slower]);
        (open["median_low_ms"], open["median_high_ms"]) = (1.3.into(), 0.9.into());
        assert!(run(&[open]).is_err_and(|e| e.to_string().contains("no interval")));
        Ok(())
    }

    #[test]
    fn tables_fit_a_terminal() -> Result<()> {
        let long = |op: &str, times| {
            let mut row = row(op, times);
            (row["name"], row["m"], row["n"], row["k"]) =
                ("llama-8b.gate_up".into(), 14336.into(), 4096.into(), 14336.into());
            if let Some(ms) = row["median_ms"].as_f64() {
                let tflops = 2.0 * 14336.0 * 4096.0 * 14336.0 / (ms * 1e9);
                (row["effective_tflops"], row["executed_tflops"]) = (tflops.into(), tflops.into());
            }
            row["kernel"] = "gemm_sparse24-f16f32-v128-coop_128x128x16_t256-bias_gelu_tanh_residual-split16".into();
            row
        };
        let (before, mut now) = (long("masked24", None), long("masked24", None));
        now["kernel"] = "another".into();
        let both = [long("sparse24", Some([12345.0; 5])), before];
        let text =
            run(&both)?.compare(&run(&[long("sparse24", Some([0.001234; 5])), now])?, 1e6)?.text(&"x".repeat(90));
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        Ok(())
    }

    #[test]
    fn files_without_quartiles_are_judged_by_all_samples_and_files_without_a_spread_not_at_all() -> Result<()> {
        let without = |fields: &[&str], ms: f64| {
            let mut row = around("dense", ms);
            fields.iter().for_each(|field| row[field] = Value::Null);
            row
        };
        let old = ["q1_ms", "q3_ms"];
        // From 0.5 to 5 ms before; from 3 ms now, then from 6.
        let before = [without(&old, 1.0)];
        assert_eq!(verdicts(&before, &[without(&old, 6.0)], 0.0)?, [ChangeKind::WithinSpread]);
        assert_eq!(verdicts(&before, &[without(&old, 12.0)], 0.0)?, [ChangeKind::Slower]);
        assert_eq!(verdicts(&before, &[around("dense", 6.0)], 0.0)?, [ChangeKind::Slower]);
        assert_eq!(verdicts(&[around("dense", 6.0)], &before, 0.0)?, [ChangeKind::Faster]);

        let unknown = without(&["q1_ms", "q3_ms", "max_ms"], 1.0);
        let rows = [around("dense", 1.0), around("masked", 1.0)];
        let mut masked = around("masked", 1.0);
        masked["max_ms"] = Value::Null;
        assert_eq!(
            verdicts(&[unknown.clone(), masked], &rows, 0.0)?,
            [ChangeKind::NotCompared("spread unknown"), ChangeKind::WithinSpread]
        );
        let nothing = verdicts(&[unknown], &rows, 0.0);
        assert!(nothing.is_err_and(|e| e.to_string().contains("no times")));
        Ok(())
    }

    #[test]
    fn rows_timed_by_different_clocks_are_not_compared() -> Result<()> {
        let mut by_gpu = around("dense", 9.0);
        by_gpu["clock"] = "gpu_timestamps".into();
        assert_eq!(verdicts(&[around("dense", 1.0)], &[by_gpu], 0.0)?, [ChangeKind::NotCompared("another clock")]);
        Ok(())
    }

    #[test]
    fn rows_without_a_counterpart_or_without_times_stay_in() -> Result<()> {
        let before = [around("sparse24", 1.0), row("masked24", None), around("masked", 1.0), around("dense", 1.0)];
        let mut other = around("dense", 1.0);
        other["name"] = "another".into();
        let now = [around("dense", 1.0), around("masked24", 1.0), row("masked", None), other];
        let comparison = run(&before)?.compare(&run(&now)?, 0.0)?;
        let reasons = ["FAILED before", "FAILED now", "new", "not measured now"].map(ChangeKind::NotCompared);
        let verdicts: Vec<_> = comparison.rows.iter().map(Change::kind).collect();
        assert_eq!(verdicts, [&[ChangeKind::WithinSpread], &reasons[..]].concat());
        let text = comparison.text("old.json");
        for part in ["FAILED before", "FAILED now", "new", "not measured now", "another", "sparse24"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.ends_with("of 5 rows 0 slower, 0 faster, 1 unchanged, 4 not compared\n"), "{text}");

        let failed = [around("dense", 1.0), row("masked", None)];
        assert_eq!(
            run(&failed)?.compare(&run(&failed)?, 0.0)?.rows[1].kind,
            ChangeKind::NotCompared("FAILED before and now")
        );
        Ok(())
    }

    #[test]
    fn rows_of_one_key_are_matched_in_order() -> Result<()> {
        let twice = |a, b| [around("dense", a), around("masked", 1.0), around("dense", b)];
        use ChangeKind::*;
        assert_eq!(verdicts(&twice(1.0, 3.0), &twice(1.0, 3.0), 0.0)?, [WithinSpread; 3]);
        assert_eq!(verdicts(&twice(1.0, 3.0), &twice(3.0, 1.0), 0.0)?, [Slower, WithinSpread, Faster]);
        let more = [around("dense", 1.0), around("dense", 3.0), around("dense", 1.0)];
        assert_eq!(
            verdicts(&twice(1.0, 3.0), &more, 0.0)?,
            [WithinSpread, WithinSpread, NotCompared("new"), NotCompared("not measured now")]
        );
        Ok(())
    }

    #[test]
    fn every_part_of_the_key_tells_rows_apart() -> Result<()> {
        let before = [around("sparse24", 1.0)];
        for (field, value) in
            [("name", json!("x")), ("dtype", json!("f16")), ("vector", json!(2)), ("op", json!("auto"))]
        {
            let mut now = before.clone();
            now[0][field] = value;
            let error = run(&before)?.compare(&run(&now)?, 0.0).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("no row in common") && error.contains("layer 4x5x8 sparse24 V=1 f32"), "{error}");
        }
        for (field, factor) in [("m", 2), ("n", 2), ("k", 2)] {
            let mut now = around("sparse24", factor as f64);
            now[field] = json!(now[field].as_u64().map(|x| factor * x));
            assert!(verdicts(&before, &[now], 0.0).is_err(), "{field}");
        }
        let of = |op, planned_by| RowKey::new(op, planned_by, DType::F16).to_string();
        assert_eq!(of(Op::Masked24, PlannedBy::User), "masked24 f16");
        assert_eq!(of(Op::Sparse24(VectorLen::ONE), PlannedBy::Auto), "auto V=1 f16");
        // All that there was failed: nothing was compared.
        let failed = verdicts(&[row("sparse24", None)], &before, 0.0);
        assert!(failed.is_err_and(|e| e.to_string().contains("no times")));
        Ok(())
    }

    #[test]
    fn models_are_compared_by_operation_if_they_ran_alike() -> Result<()> {
        let before = model("minilm", 8, &[("dense", 10.0), ("masked", 10.0)])?;
        let comparison = before.compare(&model("minilm", 8, &[("dense", 10.0), ("masked", 11.0)])?, 5.0)?;
        let verdicts: Vec<_> = comparison.rows.iter().map(Change::kind).collect();
        assert_eq!(verdicts, [ChangeKind::WithinSpread, ChangeKind::Slower]);
        let text = comparison.text("old.json");
        assert!(text.contains("+10.0 %") && !text.contains("m x n x k") && !text.contains("kernel"), "{text}");
        let slow: Vec<_> = comparison.slower().map(ToString::to_string).collect();
        assert_eq!(slow, ["masked f32: 10.00 ms before, 11.00 ms now (+10.0 %)"]);

        for other in [model("minilm", 9, &[("dense", 1.0)])?, model("bert", 8, &[("dense", 1.0)])?] {
            let error = before.compare(&other, 0.0).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("minilm in batches of 8 x 64 tokens"), "{error}");
        }
        let layers = before.compare(&run(&[around("dense", 1.0)])?, 0.0);
        assert!(layers.is_err_and(|e| e.to_string().contains("single layers")));
        Ok(())
    }

    #[test]
    fn files_without_times_are_refused_by_their_schema() -> Result<()> {
        let eval = json!({
            "schema": "sparse24-eval/1", "model": "m", "sparsity": "none", "dtype": "f32", "spearman": 0.5,
            "pearson": 0.5, "pairs": 1, "environment": {"command": "x"},
        });
        let prune = json!({
            "schema": "sparse24-prune/1", "input": "a", "output": "b", "method": "magnitude", "layers": [],
            "pruned_share": 0.5, "command": "x",
        });
        let train = json!({
            "schema": "sparse24-train/1", "input": "b", "output": "c", "provenance": {}, "texts": 9, "held_out_texts": 1,
            "objective": "states", "steps": [{}], "held_out": [[0, 2.0], [1, 1.0]], "seconds": 1.0, "best_step": 1,
            "best_loss": 1.0, "environment": {"command": "x"},
        });
        for json in [eval, prune, train] {
            let error = Run::new(File::parse(&json.to_string())?).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(json["schema"].as_str().unwrap_or("no schema")), "{error}");
        }
        Ok(())
    }

    #[test]
    fn what_may_explain_a_change_stands_above_it() -> Result<()> {
        let rows = [around("dense", 1.0)];
        let same = run(&rows)?.compare(&run(&rows)?, 0.0)?;
        assert!(same.differences.is_empty(), "{:?}", same.differences);

        let mut other = environment();
        other["threads"] = json!(2);
        other["simd"] = Value::Null;
        other["commit"] = json!("abc");
        other["program"] = json!("another");
        other["samples"] = json!(3);
        other["date"] = json!("2027-01-01T00:00:00Z");
        let mut kernel = around("dense", 1.0);
        kernel["kernel"] = json!("another kernel");
        kernel["clock"] = json!("gpu_timestamps");
        let comparison = run(&rows)?.compare(&file(other.clone(), &[kernel])?, 0.0)?;
        assert_eq!(
            comparison.differences,
            [
                "threads: 1 before, 2 now",
                "vector instructions: avx2 before, none now",
                "sampling: 10 samples of 20 ms before, 3 samples of 20 ms now",
                "clock: host_wall before, gpu_timestamps now",
                "program: sparse24 before, another now",
                "commit: none before, abc now",
            ]
        );
        assert!(comparison.text("x").contains("a kernel -> another kernel"), "{}", comparison.text("x"));

        for (field, value) in
            [("device", "a gpu"), ("kind", "discrete"), ("driver", "535"), ("backend", "Vulkan"), ("tuning", "cache")]
        {
            other[field] = json!(value);
        }
        other["shader_checks"] = json!("checked");
        let mut moved = around("dense", 1.0);
        moved["device"] = json!("a gpu");
        let comparison = run(&rows)?.compare(&file(other, &[moved])?, 0.0)?;
        assert!(comparison.differences[0].starts_with("ANOTHER DEVICE: a cpu before, a gpu now"));
        for line in [
            "driver: none before, 535 now",
            "backend: none before, Vulkan now",
            "tuning: none before, cache now",
            "shaders: none before, checked now",
        ] {
            assert!(comparison.differences.iter().any(|d| d == line), "{line}: {:?}", comparison.differences);
        }
        Ok(())
    }
}
