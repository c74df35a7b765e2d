//! Records for people and for programs: a table, and `sparse24-bench/1` JSON.
//!
//! Nothing is measured here. Invariant: every figure that is shown comes with its unit, and rows that lose or fail stay
//! in.

mod chart;
pub mod compare;
mod datasheet;
pub mod file;
pub mod page;

use std::fmt::Write as _;

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

use crate::engine::{CpuInfo, Device, DeviceInfo};
use crate::measure::{Ceilings, Policy, Record};
use crate::plan::Tuning;
use crate::simd::SimdLevel;

/// Name and version of the JSON that [`Report::to_json`] writes. Fields may be added to it, never renamed.
pub const SCHEMA: &str = "sparse24-bench/1";

/// Name and version of the JSON of whole models.
pub const MODEL_SCHEMA: &str = "sparse24-model-bench/1";

/// The table's columns of numbers, from V to MB.
const NUMBERS: std::ops::RangeInclusive<usize> = 4..=12;

/// One run of the benchmark: where and how it was made, and what came out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    schema: &'static str,
    environment: Environment,
    ceilings: Ceilings,
    rows: Vec<Record>,
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
    os: &'static str,
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
    sample_ms: f64,
}

impl Environment {
    /// Describes a run on `device`, with the tuning that it has now, that starts now.
    pub fn new(device: &Device, policy: &Policy, seed: u64, command: String) -> Self {
        let sample_ms = policy.sample.as_secs_f64() * 1e3;
        let sampling = Sampling { seed, samples: policy.samples, sample_ms };
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
            date: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
            os: std::env::consts::OS,
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
}

/// `SPARSE24_COMMIT`, for binaries that were carried away from their tree or outlived it; else what git says now of
/// that tree.
pub fn commit() -> Option<String> {
    std::env::var("SPARSE24_COMMIT").ok().filter(|commit| !commit.is_empty()).or_else(git_commit)
}

fn git_commit() -> Option<String> {
    let tree = env!("CARGO_MANIFEST_DIR");
    let git = std::process::Command::new("git")
        .args(["-C", tree, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .stderr(std::process::Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(git.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|t| git.status.success() && !t.is_empty())
}

impl Report {
    /// A run and its rows, which get their shares of the ceilings.
    pub fn new(environment: Environment, ceilings: Ceilings, mut rows: Vec<Record>) -> Self {
        rows.iter_mut().for_each(|row| row.compare_with(&ceilings));
        Self { schema: SCHEMA, environment, ceilings, rows }
    }

    /// Rows whose result was not within its error bound.
    pub fn failures(&self) -> impl Iterator<Item = &Record> {
        self.rows.iter().filter(|r| !r.verified)
    }

    /// The run as JSON, indented, with a newline at the end.
    pub fn to_json(&self) -> crate::Result<String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| crate::Error::Invalid(e.to_string()))?;
        Ok(text + "\n")
    }

    /// The run as text: what was measured on what, the rows, and what the columns mean.
    pub fn table(&self) -> String {
        let env = &self.environment;
        let mut text = format!("sparse24 {} on {}", env.version, env.device);
        let driver = env.driver.iter().zip(&env.backend).map(|(d, b)| format!("{} adapter, {b}, {d}", env.kind));
        let cpu = env.simd.iter().zip(&env.threads).map(|(s, t)| format!("CPU device, {s}, {t} threads"));
        let checks = env.shader_checks.map(|c| format!("{c} shaders"));
        let details: Vec<_> = driver.chain(cpu).chain(checks).collect();
        let _ = writeln!(text, " ({})", details.join(", "));

        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
        table.set_header([
            "layer",
            "m x n x k",
            "type",
            "op",
            "V",
            "ms",
            "spread",
            "effective",
            "executed",
            "vs dense",
            "of peak",
            "err/bound",
            "MB",
            "kernel",
        ]);
        let mut last = "";
        for row in &self.rows {
            let number = |x: Option<f64>, digits| x.map_or_else(|| "-".to_owned(), |x| significant(x, digits));
            let spread = row.median_ms.zip(row.max_ms).zip(row.min_ms);
            // A layer's name stands on its first row only.
            let name = if row.name == last { "" } else { &row.name };
            last = &row.name;
            let ratio = row.speedup_vs_dense.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}x"));
            table.add_row([
                name.to_owned(),
                format!("{}x{}x{}", row.m, row.n, row.k),
                row.dtype.to_owned(),
                row.op.to_owned(),
                row.vector.map(|v| v.to_string()).unwrap_or_default(),
                number(row.median_ms, 4),
                spread
                    .map_or_else(|| "-".to_owned(), |((mid, max), min)| format!("{:.0} %", (max - min) / mid * 100.0)),
                number(row.effective_tflops, 3),
                number(row.executed_tflops, 3),
                ratio,
                share(row),
                if row.verified { number(row.error_over_bound, 2) } else { "FAILED".to_owned() },
                significant(row.weight_bytes as f64 / 1e6, 3),
                row.tile.clone(),
            ]);
        }
        for column in NUMBERS {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let _ = writeln!(text, "\n{}", table.trim_fmt());
        let clock = self.rows.iter().find_map(|r| r.clock).unwrap_or("no clock");
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
        if ceilings.is_empty() {
            text.push_str("\nof peak: no ceilings are measured on this device\n");
        } else {
            let _ = writeln!(
                text,
                "\nceilings, measured in this run: {}\n\
                 of peak: the larger share of them, a: executed operations of f32 multiply-adds (coop kernels: of cooperative\n\
                 matrices), m: the operands' bytes of the {}",
                ceilings.join(", "),
                if copy_gb_per_s.is_some() { "copy" } else { "read" }
            );
        }
        let sampling = match &env.sampling {
            Some(Sampling { samples, sample_ms, .. }) => {
                format!("median of {samples} samples of {sample_ms:.0} ms or more")
            }
            None => "the median".to_owned(),
        };
        let _ = writeln!(
            text,
            "\nms: {sampling} ({clock}); spread: (slowest - fastest) / median\n\
             effective: 2mnk / t in TFLOPS; executed: without the weights that are skipped (tile padding not counted); sums in f32\n\
             vs dense: this device's own dense row of the same shape and run over this one ({}); below 1 is slower\n\
             err/bound: largest error over what f32 arithmetic may lose, 1 is the limit; MB: weights on the device\n\
             verified: outputs drawn from all over the result against an f64 reference, on these operands and on whole\n\
             numbers, where no error is allowed; none of the others left unwritten",
            if env.simd.is_some() { "the gemm crate, or columns of this crate" } else { "gemm_dense of this crate" },
        );
        let failed = self.failures().count();
        let _ = match failed {
            0 => writeln!(text, "all {} rows verified", self.rows.len()),
            _ => writeln!(text, "{failed} of {} rows FAILED verification and were not timed", self.rows.len()),
        };
        text
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

    #[test]
    fn numbers_keep_their_significant_digits() {
        let cases = [(0.0, "0"), (1234.5, "1234"), (12.345, "12.35"), (0.0123456, "0.01235"), (4.2e-9, "4.200e-9")];
        for (x, text) in cases {
            assert_eq!(significant(x, 4), text);
        }
    }
}
