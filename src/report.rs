//! Records for people and for programs: a table, and `sparse24-bench/1` JSON.
//!
//! Nothing is measured here. Invariant: every figure that is shown comes with its unit, and rows that lose or fail stay
//! in.

mod chart;
pub mod compare;
mod datasheet;
pub mod file;
pub mod page;
pub mod sheet;

use std::borrow::Cow;
use std::time::SystemTime;

use serde::Serialize;

use crate::engine::{CpuInfo, Device, DeviceInfo};
use crate::measure::noise::{Interval, MEDIAN_BOUND, RATIO_BOUND};
use crate::measure::{Ceilings, Policy, Record};
use crate::plan::Tuning;
use crate::simd::SimdLevel;
use sheet::{Printout, Sheet, Shown};

/// Name and version of the JSON that [`Report::to_json`] writes. Fields may be added to it, never renamed.
pub const SCHEMA: &str = "sparse24-bench/1";

/// Name and version of the JSON of whole models.
pub const MODEL_SCHEMA: &str = "sparse24-model-bench/1";

/// One run of the benchmark: where and how it was made, and what came out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    schema: &'static str,
    environment: Environment,
    ceilings: Ceilings,
    rows: Vec<Record>,
    skipped: Vec<Skipped>,
}

/// Something that was to be measured and could not be.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Name of the tensor.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Where and how a run was made.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// Other programs whose runs are put beside this one's name themselves here.
    program: &'static str,
    version: &'static str,
    /// What `SPARSE24_COMMIT` says, else the commit at which the source tree of the binary stands when the run starts,
    /// where it is still there; `-dirty` if changed.
    commit: Option<String>,
    /// Start of the run, RFC 3339, UTC.
    date: String,
    os: Cow<'static, str>,
    /// Of a run in a browser, its name and version.
    #[serde(skip_serializing_if = "Option::is_none")]
    browser: Option<String>,
    arch: &'static str,
    cpu: String,
    device: String,
    /// `cpu`, or the kind of the adapter.
    kind: &'static str,
    driver: Option<String>,
    backend: Option<String>,
    simd: Option<&'static str>,
    threads: Option<usize>,
    shader_checks: Option<&'static str>,
    /// `cache` where kernels were chosen by earlier measurements, `none` where by estimates alone.
    tuning: &'static str,
    /// Problems that these measurements are of.
    tuned: usize,
    #[serde(flatten)]
    sampling: Option<Sampling>,
    command: String,
}

/// How times were sampled, where they were.
#[derive(Clone, Debug, Serialize)]
struct Sampling {
    seed: u64,
    samples: usize,
    max_samples: usize,
    sample_ms: f64,
}

impl Environment {
    /// Describes a run on `device`, with the tuning that it has now, that starts now.
    pub fn new(device: &Device, policy: &Policy, seed: u64, command: String) -> Self {
        let sample_ms = policy.sample.as_secs_f64() * 1e3;
        let sampling = Sampling { seed, samples: policy.samples, max_samples: policy.max_samples, sample_ms };
        Self { sampling: Some(sampling), ..Self::unsampled(device, command) }
    }

    /// The same of a run that takes no samples and draws no data.
    pub fn unsampled(device: &Device, command: String) -> Self {
        let info = device.info();
        let (kind, driver, backend) = match &info {
            DeviceInfo::Gpu(gpu) => (gpu.kind.name(), Some(gpu.driver.clone()), Some(gpu.backend.clone())),
            DeviceInfo::Cpu(_) => ("cpu", None, None),
        };
        let (simd, threads) = match &info {
            DeviceInfo::Gpu(_) => (None, None),
            DeviceInfo::Cpu(cpu) => (Some(cpu.simd.name()), Some(cpu.threads)),
        };
        let tuning = device.tuning();
        Self {
            program: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            date: humantime::format_rfc3339_seconds(now()).to_string(),
            os: std::env::consts::OS.into(),
            browser: None,
            arch: std::env::consts::ARCH,
            cpu: CpuInfo::host(SimdLevel::Scalar, 0).name,
            device: info.name().to_owned(),
            kind,
            driver,
            backend,
            simd,
            threads,
            shader_checks: device.shader_checks().map(|c| c.name()),
            tuning: if tuning == Tuning::default() { "none" } else { "cache" },
            tuned: tuning.len(),
            sampling: None,
            command,
        }
    }

    /// The same of a run in a browser, of this name and version, on this operating system. A browser has neither
    /// variables nor git: the commit is what `SPARSE24_COMMIT` said when this was compiled.
    pub fn in_browser(self, browser: String, os: String) -> Self {
        let commit = option_env!("SPARSE24_COMMIT").filter(|commit| !commit.is_empty()).map(str::to_owned);
        Self { program: "sparse24 web", browser: Some(browser), os: os.into(), commit, ..self }
    }

    /// The program and the start of the run, for those who find its figures elsewhere.
    pub fn source(&self) -> String {
        let commit = self.commit.iter().map(|commit| format!(", commit {commit}")).collect::<String>();
        format!("build: sparse24 {}{commit}; {}; `{}`", self.version, self.date, self.command)
    }

    /// Least and most samples, and the milliseconds of each, where there are any.
    pub fn sampling(&self) -> Option<(usize, usize, f64)> {
        self.sampling.as_ref().map(|s| (s.samples, s.max_samples, s.sample_ms))
    }
}

/// The time, on the browser's clock where std has none.
fn now() -> SystemTime {
    let since = web_time::SystemTime::now().duration_since(web_time::UNIX_EPOCH);
    SystemTime::UNIX_EPOCH + since.unwrap_or_default()
}

/// `SPARSE24_COMMIT`, for binaries that were carried away from their tree or outlived it; else what git says now of
/// that tree.
pub fn commit() -> Option<String> {
    std::env::var("SPARSE24_COMMIT").ok().filter(|commit| !commit.is_empty()).or_else(git_commit)
}

fn git_commit() -> Option<String> {
    let tree = env!("CARGO_MANIFEST_DIR");
    let git = |arguments: &[&str]| {
        let mut command = std::process::Command::new("git");
        command.args(["-C", tree]).args(arguments).env_remove("GIT_DIR").env_remove("GIT_WORK_TREE");
        let output = command.stderr(std::process::Stdio::null()).output().ok()?;
        String::from_utf8(output.stdout).ok().filter(|_| output.status.success())
    };
    // Sources unpacked within another repository, as a package may be, are not at its commit.
    git(&["ls-files", "--error-unmatch", "Cargo.toml"])?;
    let text = git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

impl Report {
    /// A run and its rows, which get their shares of the ceilings.
    pub fn new(environment: Environment, ceilings: Ceilings, mut rows: Vec<Record>, skipped: Vec<Skipped>) -> Self {
        rows.iter_mut().for_each(|row| row.compare_with(&ceilings));
        Self { schema: SCHEMA, environment, ceilings, rows, skipped }
    }

    /// The rows, each with its shares of the ceilings.
    pub fn rows(&self) -> &[Record] {
        &self.rows
    }

    /// What was not measured.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Rows whose result was not within its error bound.
    pub fn failures(&self) -> impl Iterator<Item = &Record> {
        self.rows.iter().filter(|r| !r.verified)
    }

    /// The run as JSON, indented, with a newline at the end.
    pub fn to_json(&self) -> crate::Result<String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| crate::Error::invalid(e.to_string()))?;
        Ok(text + "\n")
    }

    /// The run for people: what was measured on what, the rows, and what the columns mean.
    pub fn page(&self) -> Printout {
        let env = &self.environment;
        let checks = env.shader_checks.map(|c| format!("{c} shaders"));
        let driver = env.driver.iter().zip(&env.backend).map(|(d, b)| format!("{} adapter, {b}, {d}", env.kind));
        let threads = |n: &usize| plural(*n, "thread");
        let cpu = env.simd.iter().zip(&env.threads).map(|(s, t)| format!("CPU device, {s}, {}", threads(t)));
        let details: Vec<_> = driver.chain(cpu).chain(checks).collect();
        let head = format!("sparse24 {} on {} ({})", env.version, env.device, details.join(", "));

        // A shape that was given as such needs no name.
        let only_shapes = self.rows.iter().all(|row| row.name == "shape");
        let unit = Unit::of(self.rows.iter().filter_map(|row| row.effective_tflops));
        let mut sheet = Sheet::new("layer")
            .words("m x n x k", Shown::Always)
            .words("type", Shown::Always)
            .words("op", Shown::Always)
            .numbers("V", Shown::Always)
            .numbers("ms", Shown::Wide)
            .numbers("ms \u{b1} %", Shown::Narrow)
            .numbers("spread", Shown::Wide)
            .numbers(unit.name, Shown::Narrow)
            .numbers("effective", Shown::Wide)
            .numbers("executed", Shown::Wide)
            .numbers("vs dense", Shown::Always)
            .words("verified", Shown::Narrow)
            .numbers("of peak", Shown::Wide)
            .numbers("err/bound", Shown::Wide)
            .numbers("MB", Shown::Wide)
            .words("kernel", Shown::Wide);
        for row in &self.rows {
            let times = [row.times.median_ms, row.times.median_low_ms, row.times.median_high_ms];
            let spread = row.times.median_ms.zip(row.times.max_ms).zip(row.times.min_ms);
            sheet.push(
                if only_shapes { "" } else { &row.name },
                [
                    format!("{}x{}x{}", row.m, row.n, row.k),
                    row.dtype.to_owned(),
                    row.op.to_owned(),
                    row.vector.map(|v| v.to_string()).unwrap_or_default(),
                    marked(row.times.noisy, or_dash(row.times.median_ms, 4)),
                    median_cell(times, row.times.noisy),
                    spread_cell(spread),
                    or_dash(row.effective_tflops.map(|x| x * unit.per_tflops), 3),
                    or_dash(row.effective_tflops, 3),
                    or_dash(row.executed_tflops, 3),
                    ratio_cell(row.speedup.vs_dense, row.speedup.noisy),
                    verified_cell(row.verified),
                    share(row),
                    if row.verified { or_dash(row.error_over_bound, 2) } else { FAILED.to_owned() },
                    significant(row.weight_bytes as f64 / 1e6, 3),
                    row.tile.clone(),
                ],
            );
        }

        let noisy = self.rows.iter().filter(|row| row.times.noisy || row.speedup.noisy).count();
        let mut notes: Vec<_> = noise_note(noisy).into_iter().collect();
        notes.extend(self.skipped.iter().map(|Skipped { name, reason }| format!("not measured: {name}: {reason}")));
        notes.push(verified_note(self.rows.len(), self.failures().count()));
        let clock = self.rows.iter().find_map(|r| r.clock).unwrap_or("no clock");
        let baseline =
            if env.simd.is_some() { "the gemm crate, or columns of this crate" } else { "gemm_dense of this crate" };
        let of_memory = if self.ceilings.copy_gb_per_s.is_some() { "copy" } else { "read" };
        let legend = [
            "m x n x k: out features, tokens and in features; V: rows of W that share one pattern".to_owned(),
            times_legend(env.sampling(), clock),
            format!("{}, effective: 2mnk / ms, whatever was skipped; executed: without the weights that are skipped, tile padding not counted; both in TFLOPS with --wide; sums in f32", unit.name),
            format!("vs dense: this device's own dense row of the same shape and run over this one ({baseline}); below 1 is slower"),
            "verified: outputs drawn from all over the result against an f64 reference, on these operands and on whole numbers, where no error is allowed; none of the others left unwritten".to_owned(),
            noise_legend(),
            format!("of peak (--wide): the larger share of the ceilings, a: executed operations of f32 multiply-adds (coop kernels: of cooperative matrices), m: the operands' bytes of the {of_memory}"),
            "err/bound: largest error over what f32 arithmetic may lose, 1 is the limit; MB: weights on the device; spread: (slowest - fastest) / median".to_owned(),
        ];
        Printout {
            head: vec![head],
            sheet,
            notes,
            wide_notes: vec![self.ceilings_note()],
            legend: legend.to_vec(),
            source: env.source(),
        }
    }

    fn ceilings_note(&self) -> String {
        let ceiling =
            |name: &str, value: Option<f64>, unit: &str| value.map(|v| format!("{name} {} {unit}", significant(v, 3)));
        let Ceilings { fma_f32_tflops, fma_f16_tflops, cooperative_f16_tflops, copy_gb_per_s, read_gb_per_s } =
            self.ceilings;
        let ceilings: Vec<_> = [
            ceiling("f32 multiply-adds", fma_f32_tflops, "TFLOPS"),
            ceiling("f16 multiply-adds", fma_f16_tflops, "TFLOPS"),
            ceiling("cooperative matrices", cooperative_f16_tflops, "TFLOPS"),
            ceiling("copy", copy_gb_per_s, "GB/s"),
            ceiling("read", read_gb_per_s, "GB/s"),
        ]
        .into_iter()
        .flatten()
        .collect();
        match &ceilings[..] {
            [] => "of peak: no ceilings are measured on this device".to_owned(),
            some => format!("ceilings, measured in this run: {}", some.join(", ")),
        }
    }
}

/// The rows of a run as CSV, with all their fields; those of a field that has fields itself each on its own.
///
/// # Errors
///
/// Rows that are no objects.
pub fn csv<T: Serialize>(rows: &[T]) -> crate::Result<String> {
    let invalid = |e: &dyn std::fmt::Display| crate::Error::invalid(format!("cannot write CSV: {e}"));
    let mut names: Vec<String> = Vec::new();
    let mut lines = Vec::new();
    for row in rows {
        // As text first: that keeps the fields in their order.
        let text = serde_json::to_string(row).map_err(|e| invalid(&e))?;
        let Fields(fields) = serde_json::from_str(&text).map_err(|e| invalid(&e))?;
        for (name, _) in &fields {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        lines.push(fields);
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(&names).map_err(|e| invalid(&e))?;
    for fields in lines {
        let of = |name: &String| fields.iter().find(|(own, _)| own == name).map_or("", |(_, value)| value);
        writer.write_record(names.iter().map(of)).map_err(|e| invalid(&e))?;
    }
    let bytes = writer.into_inner().map_err(|e| invalid(&e))?;
    String::from_utf8(bytes).map_err(|e| invalid(&e))
}

/// The fields of a JSON object in their order, as the cells of a CSV file have them.
struct Fields(Vec<(String, String)>);

impl<'de> serde::Deserialize<'de> for Fields {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> serde::de::Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, serde_json::Value>()? {
                    match value {
                        serde_json::Value::Object(own) => {
                            fields.extend(own.iter().map(|(part, value)| (format!("{name}.{part}"), cell(value))));
                        }
                        value => fields.push((name, cell(&value))),
                    }
                }
                Ok(Fields(fields))
            }
        }
        from.deserialize_map(Object)
    }
}

/// A value as a cell: null is empty, and items of a list are apart by spaces.
fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

/// What a noisy figure is marked with.
const NOISE: &str = "~";

/// What stands for a row that did not pass.
const FAILED: &str = "FAILED";

/// The unit of a column of speeds.
struct Unit {
    name: &'static str,
    per_tflops: f64,
}

impl Unit {
    /// TFLOPS if there is one or more, else GFLOPS.
    fn of(tflops: impl Iterator<Item = f64>) -> Self {
        match tflops.fold(0.0, f64::max) {
            most if most >= 1.0 => Self { name: "TFLOPS", per_tflops: 1.0 },
            _ => Self { name: "GFLOPS", per_tflops: 1e3 },
        }
    }
}

/// `1 layer`, `2 layers`.
pub fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// A number of so many digits, or a dash.
pub fn or_dash(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "-".to_owned(), |x| significant(x, digits))
}

/// A cell, with the mark of noise in front if it is noisy.
pub fn marked(noisy: bool, cell: String) -> String {
    if noisy { format!("{NOISE}{cell}") } else { cell }
}

/// A median, from where to where it lies, as the share that it may be off, and whether that is noise.
pub fn median_cell([median, low, high]: [Option<f64>; 3], noisy: bool) -> String {
    let Some(((value, low), high)) = median.zip(low).zip(high) else { return or_dash(median, 4) };
    let reach = 100.0 * Interval { low, high }.reach(value);
    let reach = if reach < 9.5 { format!("{reach:.1}") } else { format!("{reach:.0}") };
    marked(noisy, format!("{} \u{b1} {reach:>3}", significant(value, 4)))
}

/// `(slowest - fastest) / median` in percent, of the median, the slowest and the fastest.
pub fn spread_cell(times: Option<((f64, f64), f64)>) -> String {
    times.map_or_else(|| "-".to_owned(), |((mid, max), min)| format!("{:.0} %", (max - min) / mid * 100.0))
}

/// How many times as fast as dense.
pub fn ratio_cell(ratio: Option<f64>, noisy: bool) -> String {
    ratio.map_or_else(|| "-".to_owned(), |ratio| marked(noisy, format!("{ratio:.2}x")))
}

/// Whether a row passed.
pub fn verified_cell(verified: bool) -> String {
    if verified { "yes" } else { FAILED }.to_owned()
}

/// What stands below a table with so many rows that have noisy figures.
pub fn noise_note(rows: usize) -> Option<String> {
    (rows > 0).then(|| {
        let of = if rows == 1 { "1 row has".to_owned() } else { format!("{rows} rows have") };
        format!("{NOISE} noise: {of} figures that the samples leave too open; a quieter machine would tell more")
    })
}

/// What the mark of noise, `~`, means.
pub fn noise_legend() -> String {
    format!(
        "{NOISE}: noise. A time whose median is not known to {:.0} %; a ratio that is not known to {:.0} %, or that may as \
         well be 1 (95 % intervals by bootstrap over rounds of samples)",
        100.0 * MEDIAN_BOUND,
        100.0 * RATIO_BOUND
    )
}

/// What a column of medians is of: least and most samples of at least so many milliseconds, by this clock.
pub fn times_legend(sampling: Option<(usize, usize, f64)>, clock: &str) -> String {
    let samples = match sampling {
        Some((least, most, ms)) if most > least => {
            format!("the median of {least} samples of {ms:.0} ms or more ({clock}), of up to {most} while it is noisy")
        }
        Some((least, _, ms)) => format!("the median of {} of {ms:.0} ms or more ({clock})", plural(least, "sample")),
        None => format!("the median ({clock})"),
    };
    format!("ms: {samples}; \u{b1} %: how far off it may be")
}

/// How many rows were found right.
pub fn verified_note(rows: usize, failed: usize) -> String {
    match (rows, failed) {
        (1, 0) => "1 row verified".to_owned(),
        (_, 0) => format!("all {rows} rows verified"),
        (_, 1) => format!("1 of {} {FAILED} verification and was not timed", plural(rows, "row")),
        _ => format!("{failed} of {rows} rows {FAILED} verification and were not timed"),
    }
}

/// The larger of a row's shares of the ceilings, and which it is.
fn share(row: &Record) -> String {
    match (row.arithmetic_share, row.memory_share) {
        (Some(a), Some(m)) if m > a => format!("{:.0} % m", 100.0 * m),
        (Some(a), _) => format!("{:.0} % a", 100.0 * a),
        (None, Some(m)) => format!("{:.0} % m", 100.0 * m),
        (None, None) => "-".to_owned(),
    }
}

/// A positive number with this many significant digits, without an exponent unless it is tiny.
pub fn significant(x: f64, digits: usize) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    let magnitude = x.abs().log10().floor() as i32;
    if magnitude < -5 {
        return format!("{x:.*e}", digits - 1);
    }
    format!("{x:.*}", (digits as i32 - 1 - magnitude).max(0) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{MeasuredTimes, Speedup};

    /// A row of a layer with the longest of everything, as noisy as can be.
    fn long_row(ms: f64) -> Record {
        Record {
            name: "llama-8b.gate_up".into(),
            op: "masked24",
            m: 14336,
            n: 4096,
            k: 14336,
            dtype: "bf16",
            accumulate: "f32",
            vector: Some(128),
            kernel: "gemm_masked24-f16f32-coop_128x128x16_t256-none".into(),
            tile: "coop_128x128x16_t256".into(),
            chosen: "measured",
            shader_checks: Some("trusted"),
            device: "a GPU".into(),
            threads: None,
            times: MeasuredTimes {
                median_ms: Some(ms),
                min_ms: Some(ms / 9.0),
                max_ms: Some(ms * 9.0),
                q1_ms: Some(ms),
                q3_ms: Some(ms),
                median_low_ms: Some(ms / 9.0),
                median_high_ms: Some(ms * 9.0),
                noisy: true,
                samples: 30,
                calls_per_sample: 1,
            },
            operand_sets: 1,
            rotated_bytes: 1,
            clock: Some("gpu_timestamps"),
            effective_tflops: Some(0.001234 / ms),
            executed_tflops: Some(0.001234 / ms),
            arithmetic_share: None,
            memory_share: None,
            speedup: Speedup { vs_dense: Some(123.456), low: Some(0.1), high: Some(999.0), noisy: true },
            weight_bytes: 1 << 30,
            error_over_bound: Some(0.5),
            checked_outputs: 9,
            verified: true,
            failure: None,
            command: "sparse24 bench".into(),
        }
    }

    #[test]
    fn the_widest_rows_fit_a_terminal_and_are_marked() -> crate::Result<()> {
        let device = Device::cpu()?;
        let mut environment = Environment::new(&device, &Policy::FULL, 24, "sparse24 bench".into());
        environment.device = "NVIDIA GeForce RTX 4090 Laptop GPU (a long name, as some drivers have it)".into();
        environment.driver = Some("llvmpipe Mesa 22.3.6 (LLVM 15.0.6, 256 bits), and more of it".into());
        (environment.backend, environment.kind) = (Some("vulkan".into()), "discrete");
        let failed = Record {
            verified: false,
            times: MeasuredTimes { median_ms: None, median_low_ms: None, noisy: false, ..long_row(1.0).times },
            speedup: Speedup { vs_dense: None, ..long_row(1.0).speedup },
            ..long_row(1.0)
        };
        let skipped = Skipped { name: "x".repeat(60), reason: "of this reason ".repeat(9) };
        let rows = vec![long_row(0.000_012_34), long_row(12_345.6), failed];
        let report = Report::new(environment, Ceilings::default(), rows, vec![skipped]);
        for legend in [false, true] {
            let text = report.page().text(false, legend);
            assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
            assert_eq!(text.contains("2mnk"), legend, "{text}");
        }
        let text = report.page().text(false, false);
        for part in ["~12346 ± 800", "~123.46x", "FAILED", "~ noise: 3 rows have", "1 of 3 rows FAILED", "TFLOPS"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        Ok(())
    }

    #[test]
    fn speeds_have_the_unit_that_suits_the_fastest() {
        let of = |tflops: &[f64]| Unit::of(tflops.iter().copied()).name;
        assert_eq!([of(&[]), of(&[0.02, 0.999]), of(&[0.02, 1.0])], ["GFLOPS", "GFLOPS", "TFLOPS"]);
        assert_eq!(median_cell([Some(2.0), Some(1.99), Some(2.03)], false), "2.000 ± 1.5");
        assert_eq!(median_cell([Some(2.0), None, None], true), "2.000");
        assert_eq!([plural(0, "row"), plural(1, "row"), plural(2, "row")], ["0 rows", "1 row", "2 rows"]);
    }

    #[test]
    fn csv_has_every_field_in_the_order_of_the_first_rows() -> crate::Result<()> {
        #[derive(Serialize)]
        struct Row {
            z: Option<f64>,
            list: Vec<&'static str>,
            a: Option<Inner>,
            #[serde(skip_serializing_if = "Option::is_none")]
            late: Option<&'static str>,
        }
        #[derive(Serialize)]
        struct Inner {
            y: u8,
        }
        let rows = [
            Row { z: Some(0.5), list: vec!["p", "q"], a: Some(Inner { y: 1 }), late: None },
            Row { z: None, list: vec![], a: Some(Inner { y: 2 }), late: Some("with, comma") },
        ];
        assert_eq!(csv(&rows)?, "z,list,a.y,late\n0.5,p q,1,\n,,2,\"with, comma\"\n");
        assert!(csv(&[1]).is_err());
        Ok(())
    }

    #[test]
    fn numbers_keep_their_significant_digits() {
        let cases = [(0.0, "0"), (1234.5, "1234"), (12.345, "12.35"), (0.0123456, "0.01235"), (4.2e-9, "4.200e-9")];
        for (x, text) in cases {
            assert_eq!(significant(x, 4), text);
        }
    }
}
