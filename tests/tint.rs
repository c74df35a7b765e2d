//! Every shader in Tint, the WGSL compiler of Chromium and Dawn. naga, which wgpu compiles with, accepts some WGSL that
//! the specification refuses, and then a browser is the first to say so.
//!
//! Modules of cooperative matrices are left out: they are in naga's own dialect. Chromium's SwiftShader has no f16, so
//! Dawn's null driver compiles what needs it. Each test is skipped aloud where its compiler is missing. Shaders are the
//! same whatever the features are, so that one pass of the tests is enough.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips and saw")]

#[path = "common/browser.rs"]
mod browser;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use browser::Browser;
use serde_json::{Map, Value, json};
use sparse24::kernels::{Caps, Program, Rates};

const COMPILE: &str = include_str!("common/tint.js");

/// Programs that are compiled at once: a few more than a machine has cores.
const CHUNK: usize = 16;
/// SwiftShader takes seconds for a pipeline, and a test is not alone on its machine.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a browser offers: no cooperative matrices, and the limits that it names. Loops are left rolled, which compile
/// sooner.
fn caps(f16: bool, limits: &Value) -> Caps {
    let limit = |name: &str| limits[name].as_u64().unwrap();
    Caps {
        architecture: None,
        f16,
        subgroups: None,
        cooperative: Vec::new(),
        cooperative_lanes: None,
        cooperative_refused: None,
        cooperative_scalars: false,
        emulates_cooperative: false,
        unrolls: false,
        timestamps: false,
        workgroup_memory: limit("maxComputeWorkgroupStorageSize") as u32,
        workgroup_threads: limit("maxComputeInvocationsPerWorkgroup") as u32,
        grid: limit("maxComputeWorkgroupsPerDimension") as u32,
        busy_threads: 512,
        rates: Rates { fma: 1e9, cooperative: 1e9, memory: 1e9, cache: 1e9, dispatch: 1e-5 },
        binding_bytes: limit("maxStorageBufferBindingSize"),
        buffer_bytes: limit("maxBufferSize"),
    }
}

/// Every program without cooperative matrices, once for each text.
fn programs() -> Vec<Program> {
    let all = Program::all().filter(Program::is_representative);
    let mut programs: Vec<_> = all.filter(|program| !program.source().unwrap().contains("coop_mat")).collect();
    // Without this, an order by shape would leave the slow ones in one chunk.
    programs.sort_by_key(|program| program.to_string());
    programs
}

/// What programs share that differ in vector length, tile and shape alone.
fn family(program: &Program) -> String {
    let name = program.to_string();
    let operation = name.split('-').next().unwrap();
    let schedule = program.gemm().map(|kernel| kernel.schedule().to_string()).unwrap_or_default();
    // `gemv_32x1_t256` is a gemv; `128x128x16` is the tile alone.
    let kind = schedule.split('_').next().filter(|kind| kind.starts_with(char::is_alphabetic));
    format!("{operation} {}", kind.unwrap_or_default())
}

fn entry(name: &Program, code: String, constants: Option<Map<String, Value>>) -> Value {
    json!({ "name": name.to_string(), "code": code, "constants": constants })
}

/// Modules as a GPU gets them, and pipelines, of rolled texts, as far as the adapter's limits allow. SwiftShader takes
/// seconds to compile a pipeline, so one of each family is made, unless SPARSE24_TEST_ALL is 1.
#[test]
fn chromium_takes_every_shader() {
    let Some(chromium) = Browser::find_or_skip() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("page.html");
    std::fs::write(&file, "<!doctype html><title>WGSL</title>").unwrap();
    let mut page = Browser::open_webgpu(&chromium, &file).unwrap();
    page.patience = PATIENCE;
    let open = "(async () => {
      const adapter = await navigator.gpu?.requestAdapter();
      if (!adapter) throw new Error('no WebGPU adapter');
      const names = ['maxComputeWorkgroupStorageSize', 'maxComputeInvocationsPerWorkgroup',
        'maxComputeWorkgroupSizeX', 'maxStorageBufferBindingSize', 'maxBufferSize', 'maxStorageBuffersPerShaderStage'];
      const requiredLimits = Object.fromEntries(names.map(name => [name, adapter.limits[name]]));
      const f16 = adapter.features.has('shader-f16');
      globalThis.device = await adapter.requestDevice({ requiredFeatures: f16 ? ['shader-f16'] : [], requiredLimits });
      const { maxComputeWorkgroupsPerDimension } = device.limits;
      return { f16, limits: { ...requiredLimits, maxComputeWorkgroupsPerDimension } };
    })()";
    let opened = page.evaluate(open).unwrap();
    let f16 = opened["f16"] == true;
    let caps = caps(f16, &opened["limits"]);

    let mut entries = Vec::new();
    let mut pipelines = 0;
    let mut families = HashSet::new();
    let all = std::env::var("SPARSE24_TEST_ALL").is_ok_and(|value| value == "1");
    for program in programs() {
        let code = program.source().unwrap();
        if f16 || !code.contains("enable f16") {
            entries.push(entry(&program, code, None));
        }
        if program.supported_by(&caps).is_ok() && (all || families.insert(family(&program))) {
            let constants = program.overrides().into_iter().map(|(name, value)| (name.to_owned(), json!(value)));
            entries.push(entry(&program, program.source_for(&caps).unwrap(), Some(constants.collect())));
            pipelines += 1;
        }
    }
    let mut refused = Vec::new();
    for chunk in entries.chunks(CHUNK) {
        let lines = page.evaluate(&format!("({COMPILE})(device, {})", Value::from(chunk))).unwrap();
        refused.extend(lines.as_array().unwrap().iter().map(|line| line.as_str().unwrap().to_owned()));
    }
    let modules = entries.len() - pipelines;
    eprintln!(
        "Chromium: {} of {} modules and pipelines refused ({modules} modules, {pipelines} pipelines)",
        refused.len(),
        entries.len()
    );
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    assert!(modules >= 120 && pipelines >= 20, "only {modules} modules and {pipelines} pipelines are left");
    assert_eq!(page.complaints, Vec::<String>::new());
}

/// npm's package `webgpu`, as SPARSE24_DAWN names its folder.
fn dawn() -> Option<PathBuf> {
    let found = std::env::var_os("SPARSE24_DAWN").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    if found.is_none() {
        let required = std::env::var("SPARSE24_REQUIRE_DAWN").is_ok_and(|value| value == "1");
        assert!(!required, "Dawn is required: SPARSE24_DAWN must name the folder of npm's package webgpu");
        eprintln!("skipped: no Dawn (SPARSE24_DAWN)");
    }
    found
}

#[test]
fn dawn_takes_every_shader() {
    let Some(folder) = dawn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("programs.json");
    // The null driver makes pipelines, too, within its limits, which are WebGPU's default ones.
    let limits = json!({
        "maxComputeWorkgroupStorageSize": 16384, "maxComputeInvocationsPerWorkgroup": 256,
        "maxComputeWorkgroupsPerDimension": 65535, "maxStorageBufferBindingSize": 128 << 20, "maxBufferSize": 256 << 20,
    });
    let caps = caps(true, &limits);
    let constants = |program: &Program| {
        let values = program.overrides().into_iter().map(|(name, value)| (name.to_owned(), json!(value)));
        program.supported_by(&caps).is_ok().then(|| values.collect())
    };
    let programs = programs();
    let entries: Vec<_> =
        programs.iter().map(|program| entry(program, program.source().unwrap(), constants(program))).collect();
    std::fs::write(&file, Value::from(&entries[..]).to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/dawn.mjs");
    let run = Command::new("node").arg(script).arg(folder.join("index.js")).arg(&file).output().unwrap();
    assert!(run.status.success(), "{}: {}", run.status, String::from_utf8_lossy(&run.stderr));
    let refused: Vec<String> = serde_json::from_slice(&run.stdout).unwrap();
    let pipelines = entries.iter().filter(|entry| !entry["constants"].is_null()).count();
    eprintln!("Dawn: {} of {} modules refused, {pipelines} with their pipelines", refused.len(), entries.len());
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    assert!(entries.len() >= 500 && pipelines >= 60, "only {} modules and {pipelines} pipelines", entries.len());
}
