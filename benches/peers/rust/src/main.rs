//! Measures matrix multiplications of other Rust crates in the terms of `sparse24 bench`: the same shapes, the same
//! error bound, the same JSON (schema `sparse24-bench/1`). One program a file:
//!
//! ```text
//! cargo run --release --manifest-path benches/peers/rust/Cargo.toml -- \
//!     --peer matrixmultiply --threads 1 --out matrixmultiply.json
//! ```
//!
//! Exit codes: 0 fine, 1 error, 2 usage, 3 a row failed verification (the file is written, that row without times).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

#[cfg(feature = "cubek")]
mod cubek;
#[cfg(feature = "matrixmultiply")]
mod matrixmultiply;
#[cfg(feature = "numr")]
mod numr;
mod problem;

use problem::{Numbers, Problem, Shape, Verdict};

const MANIFEST: &str = "benches/peers/rust/Cargo.toml";
const SHAPES: &str = "768x128x768,3072x128x768,768x128x3072,1024x1024x1024,4096x1x4096";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// sgemm of the crate `matrixmultiply`, dense, on the CPU.
    Matrixmultiply,
    /// numr's 2:4 and dense matmul: on the CPU, or with --device on a GPU through wgpu.
    Numr,
    /// cubek-matmul, dense, on a GPU through cubecl's wgpu runtime.
    Cubek,
}

/// Measures a matrix multiplication of another crate and writes sparse24-bench/1 JSON.
#[derive(Parser)]
struct Options {
    /// What to measure. Peers other than matrixmultiply need the cargo feature of their name.
    #[arg(long)]
    peer: Name,
    /// Shapes MxNxK: output features, tokens, input features.
    #[arg(long, value_delimiter = ',', default_value = SHAPES)]
    shapes: Vec<Shape>,
    /// Threads of a peer on the CPU.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
    /// Part of the name of the GPU to use.
    #[arg(long, value_name = "PART_OF_NAME")]
    device: Option<String>,
    /// Few and short samples: shows that everything works, measures nothing.
    #[arg(long)]
    quick: bool,
    /// Where the JSON goes, instead of stdout.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[arg(long, default_value_t = 24)]
    seed: u64,
}

/// Where a peer runs.
#[derive(Clone)]
struct Place {
    program: &'static str,
    /// Packages whose versions matter, and how these start: the lock file may hold several.
    libraries: Vec<(&'static str, &'static str)>,
    device: String,
    kind: &'static str,
    driver: Option<String>,
    backend: Option<String>,
    simd: Option<&'static str>,
    threads: Option<u32>,
}

impl Place {
    fn on_cpu(program: &'static str, threads: u32) -> Self {
        Self {
            program,
            libraries: vec![],
            device: cpu(),
            kind: "cpu",
            driver: None,
            backend: None,
            simd: simd(),
            threads: Some(threads),
        }
    }
}

/// One way of one peer to multiply. Of several with the same `op`, the one that needs least time is measured.
struct Call<'a> {
    op: &'static str,
    kernel: String,
    /// Multiply-adds that one output takes.
    depth: usize,
    weight_bytes: usize,
    /// Multiplies that many times and waits until all of it is done.
    run: Box<dyn FnMut(usize) -> Result<()> + 'a>,
    output: Box<dyn FnMut() -> Result<Vec<f32>> + 'a>,
}

trait Peer {
    fn place(&self) -> Place;
    /// The same calls in the same order for every problem of one shape.
    fn calls<'a>(&'a self, problem: &'a Problem) -> Result<Vec<Call<'a>>>;
}

struct Sampling {
    samples: usize,
    sample: Duration,
    warm_up: Duration,
}

/// A call that takes part in a shape's measurement.
struct Entrant<'a> {
    call: Call<'a>,
    verdict: Verdict,
    /// Milliseconds a call, one for each sample.
    times: Vec<f64>,
    calls: usize,
}

impl Entrant<'_> {
    /// Calls until `least` is over, each round as many as the rounds before suggest. Milliseconds a call.
    fn sample(&mut self, least: Duration) -> Result<f64> {
        let (start, mut done, mut next) = (Instant::now(), 0, self.calls.max(1));
        loop {
            (self.call.run)(next)?;
            done += next;
            let elapsed = start.elapsed();
            if elapsed >= least {
                self.calls = done;
                return Ok(elapsed.as_secs_f64() * 1e3 / done as f64);
            }
            let missing = (least - elapsed).as_secs_f64() / elapsed.as_secs_f64().max(1e-7);
            next = ((done as f64 * missing * 1.05).ceil() as usize).clamp(1, 10 * done);
        }
    }
}

fn measure(peer: &dyn Peer, shape: Shape, options: &Options, sampling: &Sampling) -> Result<Vec<Value>> {
    let whole = Problem::new(shape, Numbers::Whole, options.seed);
    let uniform = Problem::new(shape, Numbers::Uniform, options.seed.wrapping_add(1));
    let mut exact = Vec::new();
    for call in &mut peer.calls(&whole)? {
        exact.push(verify(call, &whole));
    }
    let mut entrants: Vec<Entrant<'_>> = Vec::new();
    let mut failed = Vec::new();
    for (mut call, exact) in peer.calls(&uniform)?.into_iter().zip(exact) {
        let verdict = match (exact, verify(&mut call, &uniform)) {
            (Ok(exact), Ok(uniform)) => Verdict { failure: exact.failure.or(uniform.failure), ..uniform },
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("{shape} {}: does not run: {error:#}", call.kernel);
                continue;
            }
        };
        let mut entrant = Entrant { call, verdict, times: Vec::new(), calls: 0 };
        if let Some(failure) = &entrant.verdict.failure {
            eprintln!("{shape} {}: FAILED verification: {failure}", entrant.call.kernel);
            failed.push(entrant);
            continue;
        }
        let rate = entrant.sample(sampling.warm_up)?;
        eprintln!("{shape} {}: verified, {rate:.4} ms while warming up", entrant.call.kernel);
        // Calibrated for the warm-up, which is longer than a sample.
        entrant.calls = (sampling.sample.as_secs_f64() * 1e3 / rate * 1.05).ceil().max(1.0) as usize;
        entrant.times = vec![rate];
        match entrants.iter_mut().find(|other| other.call.op == entrant.call.op) {
            Some(other) if other.times[0] <= rate => {}
            Some(other) => *other = entrant,
            None => entrants.push(entrant),
        }
    }
    ensure!(!entrants.is_empty() || !failed.is_empty(), "{shape}: nothing runs");
    entrants.iter_mut().for_each(|entrant| entrant.times.clear());
    for _ in 0..sampling.samples {
        for entrant in &mut entrants {
            let time = entrant.sample(sampling.sample)?;
            entrant.times.push(time);
        }
    }
    entrants.append(&mut failed);
    let dense = entrants.iter().find(|e| e.call.op == "dense" && e.verdict.failure.is_none()).map(|e| median(&e.times));
    Ok(entrants.iter().map(|entrant| row(entrant, shape, dense, &peer.place(), options)).collect())
}

/// Runs the call once and judges what it wrote.
fn verify(call: &mut Call<'_>, problem: &Problem) -> Result<Verdict> {
    (call.run)(1)?;
    problem.judge(&(call.output)()?, call.op != "dense", call.depth)
}

fn sorted(times: &[f64]) -> Vec<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(times: &[f64]) -> f64 {
    let (times, middle) = (sorted(times), times.len() / 2);
    if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2.0 }
}

fn row(e: &Entrant<'_>, shape: Shape, dense: Option<f64>, place: &Place, options: &Options) -> Value {
    let Shape { m, n, k } = shape;
    let time = e.verdict.failure.is_none().then(|| median(&e.times));
    // The middle half: a quarter, rounded down, lies on either side of it.
    let times = sorted(&e.times);
    let (quarter, last) = (times.len() / 4, times.len().saturating_sub(1));
    let tflops = |depth: usize| time.map(|ms| 2.0 * (m * n * depth) as f64 / (ms * 1e9));
    let mut command = format!("{} --peer {} --shapes {shape}", cargo_run(options.peer), word(options.peer));
    if let Some(threads) = place.threads {
        command += &format!(" --threads {threads}");
    }
    if let Some(device) = &options.device {
        command += &format!(" --device {}", quoted(device));
    }
    command += &format!(" --seed {}", options.seed);
    command += if options.quick { " --quick" } else { "" };
    let mut row = json!({
        "name": "shape",
        "op": e.call.op,
        "m": m,
        "n": n,
        "k": k,
        "dtype": "f32",
        "accumulate": "f32",
        "vector": (e.call.op == "sparse24").then_some(1),
        "kernel": e.call.kernel,
        "device": place.device,
        "threads": place.threads,
        "median_ms": time,
        "min_ms": time.map(|_| times[0]),
        "max_ms": time.map(|_| times[last]),
        "q1_ms": time.map(|_| times[quarter]),
        "q3_ms": time.map(|_| times[last - quarter]),
        "samples": times.len(),
        "calls_per_sample": e.calls,
        "clock": "host_wall",
        "effective_tflops": tflops(k),
        "executed_tflops": tflops(e.call.depth),
        "speedup_vs_dense": time.zip(dense).map(|(own, dense)| dense / own),
        "weight_bytes": e.call.weight_bytes,
        "error_over_bound": e.verdict.error_over_bound.is_finite().then_some(e.verdict.error_over_bound),
        "checked_outputs": e.verdict.checked,
        "verified": e.verdict.failure.is_none(),
    });
    if let Some(failure) = &e.verdict.failure {
        row["failure"] = json!(failure);
    }
    row["command"] = json!(command);
    row
}

/// A word as a POSIX shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn word(peer: Name) -> String {
    peer.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn cargo_run(peer: Name) -> String {
    let features = match peer {
        Name::Matrixmultiply => String::new(),
        _ => format!(" --features {}", word(peer)),
    };
    format!("cargo run --release --manifest-path {MANIFEST}{features} --")
}

/// The version of a package in this crate's lock file; of several, the one whose version starts with `like`.
fn locked(package: &str, like: &str) -> Option<&'static str> {
    let mut lines = include_str!("../Cargo.lock").lines();
    while let Some(line) = lines.next() {
        if line == format!("name = \"{package}\"") {
            let version = lines.next()?.strip_prefix("version = \"")?.strip_suffix('"')?;
            if version.starts_with(like) {
                return Some(version);
            }
        }
    }
    None
}

/// The CPU's name as the kernel reports it.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The widest instructions that a kernel which chooses when it runs can use here.
fn simd() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return Some("avx512");
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return Some("avx2");
    }
    None
}

fn environment(place: &Place, options: &Options, sampling: &Sampling) -> Result<Value> {
    let version = |package: &str, like: &str| locked(package, like).with_context(|| format!("no {package} locked"));
    let mut libraries = serde_json::Map::new();
    for (package, like) in &place.libraries {
        libraries.insert((*package).to_owned(), json!(version(package, like)?));
    }
    let typed: Vec<String> = std::env::args().skip(1).map(|word| quoted(&word)).collect();
    Ok(json!({
        "program": place.program,
        "version": version(place.program, "")?,
        "libraries": libraries,
        "commit": null,
        "date": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cpu": cpu(),
        "device": place.device,
        "kind": place.kind,
        "driver": place.driver,
        "backend": place.backend,
        "simd": place.simd,
        "threads": place.threads,
        "seed": options.seed,
        "samples": sampling.samples,
        "sample_ms": sampling.sample.as_secs_f64() * 1e3,
        "command": format!("{} {}", cargo_run(options.peer), typed.join(" ")),
    }))
}

/// Writes under a temporary name first, so that a file that exists is whole.
fn write(path: &Path, text: &str) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path))?;
    Ok(())
}

fn peer(options: &Options) -> Result<Box<dyn Peer>> {
    match options.peer {
        #[cfg(feature = "matrixmultiply")]
        Name::Matrixmultiply => Ok(Box::new(matrixmultiply::Matrixmultiply::new(options.threads)?)),
        #[cfg(feature = "numr")]
        Name::Numr => numr::peer(options.device.as_deref(), options.threads),
        #[cfg(feature = "cubek")]
        Name::Cubek => cubek::peer(options.device.as_deref()),
        #[allow(unreachable_patterns, reason = "with all features there is nothing left")]
        _ => bail!("built without this peer: add --features {}", word(options.peer)),
    }
}

fn run(options: &Options) -> Result<bool> {
    let sampling = if options.quick {
        Sampling { samples: 3, sample: Duration::from_millis(2), warm_up: Duration::ZERO }
    } else {
        Sampling { samples: 10, sample: Duration::from_millis(20), warm_up: Duration::from_millis(100) }
    };
    let peer = peer(options)?;
    let mut rows = Vec::new();
    for &shape in &options.shapes {
        rows.append(&mut measure(&*peer, shape, options, &sampling)?);
    }
    let verified = rows.iter().all(|row| row["verified"] == true);
    let file = json!({
        "schema": "sparse24-bench/1",
        "environment": environment(&peer.place(), options, &sampling)?,
        "ceilings": {},
        "rows": rows,
    });
    let text = format!("{file:#}\n");
    match &options.out {
        Some(path) => write(path, &text).with_context(|| path.display().to_string())?,
        None => std::io::stdout().write_all(text.as_bytes())?,
    }
    Ok(verified)
}

fn main() -> ExitCode {
    let options = Options::parse();
    let threads = options.threads.to_string();
    for pool in ["MATMUL_NUM_THREADS", "RAYON_NUM_THREADS"] {
        // SAFETY: no other thread exists yet. Both pools read their variable when they are first used.
        unsafe { std::env::set_var(pool, &threads) };
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
