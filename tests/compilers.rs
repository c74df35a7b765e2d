//! What real GPU compilers make of every kernel, on devices that Mesa pretends to have: no spills but known ones, no
//! refusal, no less occupancy than a kernel's header states, and ratios that hold.
//!
//! Needs a Debian tree with Mesa 26 or newer and its shims (SPARSE24_MESA names its root; tests/run.sh says how), whose
//! loader runs this program's binary with that tree's libraries. Ignored unless asked for. SPARSE24_COMPILED names a
//! folder for the JSON of every device, which is made if there is none.
#![cfg(all(feature = "cli", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it measured")]

#[path = "common/binary.rs"]
mod binary;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use binary::{Ran, Run, SPARSE24, isolated};
use serde_json::Value;

/// A device that a driver is made to see.
struct Pretended {
    /// The architecture, as `--architecture` names it.
    architecture: &'static str,
    /// Part of the name that its driver gives it.
    name: &'static str,
    /// The driver's manifest, and the shim that it is loaded with.
    driver: &'static str,
    shim: &'static str,
    environment: &'static [(&'static str, &'static str)],
    /// Whether it has cooperative matrices that kernels are made for.
    cooperative: bool,
    /// Threads that a core holds of the smallest kernels, where nothing else tells the chip.
    most_threads: Option<f64>,
}

const NVK: &[(&str, &str)] = &[("NVK_I_WANT_A_BROKEN_VULKAN_DRIVER", "1")];

const DEVICES: [Pretended; 7] = [
    radeon("rdna2", "NAVI21", false, &[("AMDGPU_GPU_ID", "navi21")]),
    radeon("rdna3", "NAVI31", true, &[("AMDGPU_GPU_ID", "navi31")]),
    radeon("rdna4", "GFX1201", true, &[("AMDGPU_GPU_ID", "gfx1201")]),
    nvidia("ampere", 2048.0, &[("NOUVEAU_CHIPSET", "170")]),
    nvidia("ada", 1536.0, &[("NOUVEAU_CHIPSET", "190")]),
    Pretended {
        architecture: "apple-m1",
        name: "Apple M1",
        driver: "asahi_icd.json",
        shim: "libasahi_noop_drm_shim.so",
        environment: &[("AGX_MESA_DEBUG", "shaders")],
        cooperative: false,
        most_threads: None,
    },
    Pretended {
        architecture: "adreno",
        name: "Adreno (TM) 740",
        driver: "freedreno_icd.json",
        shim: "libfreedreno_noop_drm_shim.so",
        environment: &[("FD_GPU_ID", "740")],
        cooperative: false,
        most_threads: None,
    },
];

type Environment = &'static [(&'static str, &'static str)];

const fn radeon(
    architecture: &'static str,
    name: &'static str,
    cooperative: bool,
    environment: Environment,
) -> Pretended {
    let (driver, shim) = ("radeon_icd.json", "libamdgpu_noop_drm_shim.so");
    Pretended { architecture, name, driver, shim, environment, cooperative, most_threads: None }
}

/// A pretended one has no name of its own.
const fn nvidia(architecture: &'static str, most_threads: f64, environment: Environment) -> Pretended {
    let (driver, shim) = ("nouveau_icd.json", "libnouveau_noop_drm_shim.so");
    let most_threads = Some(most_threads);
    Pretended { architecture, name: "NVK", driver, shim, environment, cooperative: true, most_threads }
}

/// The version of Mesa by which ratios were recorded: another one's compilers may be better or worse.
const RECORDED: &str = "Mesa 26.2.6";

/// Where they are recorded, below benches/results.
const RUNS: &str = "2026-11-29-kernels";

/// What a device has no kernel of.
const NONE: f64 = 0.0;

/// How far below what was recorded a ratio may fall before it counts as lost.
const SLACK: f64 = 0.01;

/// Ratios to the dense kernel of the same tile and type, as recorded in [`RUNS`] and rounded down: kernel, k, and the
/// devices in the order of [`DEVICES`]. Of older records the higher ones stand, but for Ada's at V = 4: those kernels
/// take as many cycles as before, and dense takes fewer.
#[rustfmt::skip]
const RATIOS: [(&str, usize, [f64; 7]); 34] = [
    ("sparse24-f32f32-v128-128x128x16", 768, [1.75, 1.69, 1.69, 1.94, 1.62, 1.81, 1.79]),
    ("sparse24-f32f32-v128-128x128x16", 4096, [1.76, 1.71, 1.71, 1.95, 1.64, 1.83, 1.83]),
    ("sparse24-f32f32-v32-128x128x16", 768, [1.75, 1.69, 1.69, 1.94, 1.62, 1.81, 1.79]),
    ("sparse24-f32f32-v32-128x128x16", 4096, [1.76, 1.71, 1.71, 1.95, 1.64, 1.83, 1.83]),
    ("sparse24-f32f32-v8-128x128x16", 768, [1.75, 1.68, 1.68, 1.94, 1.62, 1.53, 1.52]),
    ("sparse24-f32f32-v8-128x128x16", 4096, [1.76, 1.70, 1.70, 1.95, 1.63, 1.54, 1.54]),
    ("sparse24-f32f32-v4-128x128x16", 768, [1.68, 1.41, 1.41, 1.91, 1.50, 1.01, 1.01]),
    ("sparse24-f32f32-v4-128x128x16", 4096, [1.69, 1.42, 1.42, 1.92, 1.50, 1.01, 1.01]),
    ("sparse24-f32f32-v4-lanes_128x128x16", 768, [1.74, 1.41, 1.41, 1.94, 1.57, 1.17, 1.16]),
    ("sparse24-f32f32-v4-lanes_128x128x16", 4096, [1.75, 1.42, 1.42, 1.95, 1.58, 1.17, 1.17]),
    ("sparse24-f32f32-v1-expand_128x128x16", 768, [0.94, 0.94, 0.94, 0.99, 0.92, 0.99, 0.99]),
    ("sparse24-f32f32-v1-expand_128x128x16", 4096, [0.94, 0.94, 0.94, 0.99, 0.92, 0.99, 0.99]),
    ("masked-f32f32-128x128x16", 768, [0.99, 0.97, 0.97, 0.99, 0.96, 0.99, 0.99]),
    ("masked-f32f32-128x128x16", 4096, [0.99, 0.97, 0.97, 0.99, 0.96, 0.99, 0.99]),
    ("sparse24-f32f32-v32-gemv_32x8_t256", 768, [1.73, 1.74, 1.74, 1.32, 1.32, 1.78, 1.77]),
    ("sparse24-f32f32-v32-gemv_32x8_t256", 4096, [1.85, 1.85, 1.85, 1.47, 1.47, 1.90, 1.90]),
    ("sparse24-f16f32-v128-128x128x16", 768, [1.66, 1.50, 1.50, 1.94, 1.62, 1.81, 1.79]),
    ("sparse24-f16f32-v128-128x128x16", 4096, [1.67, 1.51, 1.51, 1.95, 1.63, 1.83, 1.83]),
    ("sparse24-f16f32-v32-128x128x16", 768, [1.66, 1.50, 1.50, 1.94, 1.62, 1.81, 1.79]),
    ("sparse24-f16f32-v32-128x128x16", 4096, [1.67, 1.51, 1.51, 1.95, 1.63, 1.83, 1.83]),
    ("sparse24-f16f32-v8-128x128x16", 768, [1.66, 1.50, 1.50, 1.94, 1.61, 1.53, 1.52]),
    ("sparse24-f16f32-v8-128x128x16", 4096, [1.67, 1.51, 1.51, 1.95, 1.63, 1.54, 1.54]),
    ("sparse24-f16f32-v4-128x128x16", 768, [1.60, 1.42, 1.42, 1.91, 1.52, 1.01, 1.01]),
    ("sparse24-f16f32-v4-128x128x16", 4096, [1.61, 1.43, 1.43, 1.92, 1.55, 1.01, 1.01]),
    ("sparse24-f16f32-v4-lanes_128x128x16", 768, [1.66, 1.48, 1.48, 1.94, 1.58, 1.17, 1.16]),
    ("sparse24-f16f32-v4-lanes_128x128x16", 4096, [1.67, 1.49, 1.49, 1.95, 1.59, 1.17, 1.17]),
    ("sparse24-f16f32-v1-expand_128x128x16", 768, [0.92, 0.91, 0.90, 0.99, 0.93, 0.99, 0.99]),
    ("sparse24-f16f32-v1-expand_128x128x16", 4096, [0.92, 0.91, 0.91, 0.99, 0.93, 0.99, 0.99]),
    ("masked-f16f32-128x128x16", 768, [0.97, 0.95, 0.95, 0.99, 0.97, 0.99, 1.00]),
    ("masked-f16f32-128x128x16", 4096, [0.97, 0.95, 0.95, 0.99, 0.97, 0.99, 1.00]),
    ("sparse24-f16f32-v32-gemv_32x8_t256", 768, [1.73, 1.73, 1.74, 1.40, 1.40, 1.78, 1.77]),
    ("sparse24-f16f32-v32-gemv_32x8_t256", 4096, [1.85, 1.85, 1.85, 1.59, 1.59, 1.90, 1.90]),
    ("sparse24-f16f32-v128-coop16s64_128x128x32_t256", 768, [NONE, 1.62, 1.45, NONE, NONE, NONE, NONE]),
    ("sparse24-f16f32-v128-coop16s64_128x128x32_t256", 4096, [NONE, 1.67, 1.50, NONE, NONE, NONE, NONE]),
];

/// The root of the tree with newer drivers. Who asks for these tests has one.
fn tree() -> PathBuf {
    let root = std::env::var_os("SPARSE24_MESA").unwrap_or_else(|| panic!("SPARSE24_MESA is not set"));
    // Drivers are loaded from elsewhere, too.
    std::fs::canonicalize(&root).unwrap_or_else(|e| panic!("SPARSE24_MESA={}: {e}", root.display()))
}

/// This program's binary, run with the libraries of the tree and a driver on its pretended device.
fn sparse24(root: &Path, device: &Pretended, arguments: &[&str]) -> Ran {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let manifest = root.join("usr/share/vulkan/icd.d").join(device.driver);
    let runtime = tempfile::tempdir().unwrap();
    let mut command = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&libraries).arg("--preload").arg(libraries.join(device.shim));
    isolated(command.arg(SPARSE24).args(arguments).stdin(Stdio::null()));
    command.env("VK_DRIVER_FILES", &manifest).env("VK_ICD_FILENAMES", &manifest);
    // The program would start itself anew without the other loader.
    command.env("XDG_RUNTIME_DIR", runtime.path()).env("MESA_SHADER_CACHE_DISABLE", "1");
    command.envs(NVK.iter().copied()).envs(device.environment.iter().copied());
    command.run()
}

/// Most spills that are known: a row of dQ, or of dK and dV, is more than Apple's registers hold.
const SPILLS: [(&str, &str, f64); 2] =
    [("apple-m1", "attention_grad_q", 128.0), ("apple-m1", "attention_grad_kv", 224.0)];

/// What is wrong with what a device made of the kernels, a line each.
fn faults(run: &Value, device: &Pretended) -> Vec<String> {
    let mut faults = Vec::new();
    let driver = run["device"]["driver"].as_str().unwrap();
    let found = (run["device"]["name"].as_str().unwrap(), run["device"]["architecture"].as_str().unwrap());
    assert!(found.0.contains(device.name) && found.1 == device.architecture, "{found:?}");
    for kernel in run["kernels"].as_array().unwrap() {
        let name = kernel["kernel"].as_str().unwrap();
        if let Some(reason) = kernel["refused"].as_str() {
            faults.push(format!("{name} is refused: {reason}"));
            continue;
        }
        let spills = kernel["spills"].as_f64();
        let known = SPILLS.iter().find(|(of, kernels, _)| *of == device.architecture && name.starts_with(kernels));
        let most = known.map_or(0.0, |(.., most)| *most);
        if spills.is_none_or(|spills| spills > most) {
            faults.push(format!("{name} spills {spills:?} to memory"));
        }
        if let Some(note) = kernel["note"].as_str() {
            faults.push(format!("{name}: {note}"));
        }
        // Gradients have no schedules, and so no tiles to compare.
        let is_scheduled = name.starts_with("gemm_") && !name.starts_with("gemm_grad");
        if kernel["code"].is_null() || (is_scheduled && kernel["estimates"].as_array().unwrap().is_empty()) {
            faults.push(format!("{name} has no estimate"));
        }
        let (holds, stated) = (kernel["resident_threads"].as_f64().unwrap(), kernel["stated_threads"].as_f64());
        match stated {
            Some(stated) if holds < stated => {
                faults.push(format!("{name}: a core holds {holds} threads, its header states {stated}"));
            }
            None if name.starts_with("gemm_") || name.starts_with("attention") => {
                faults.push(format!("{name}: its header states no occupancy for {}", device.architecture));
            }
            _ => {}
        }
    }
    if driver.contains(RECORDED) {
        let column = DEVICES.iter().position(|d| d.architecture == device.architecture).unwrap();
        for (kernel, k, recorded) in RATIOS {
            let name = format!("gemm_{kernel}-none");
            let mut ratios = run["ratios"].as_array().unwrap().iter();
            let found =
                ratios.find(|r| r["kernel"] == name.as_str() && r["k"] == k).map(|r| r["same"][1].as_f64().unwrap());
            match (found, recorded[column]) {
                (None, NONE) => {}
                (Some(_), NONE) => faults.push(format!("{name}: no ratio at k = {k} is recorded")),
                (None, _) => faults.push(format!("{name} was not estimated at k = {k}")),
                (Some(found), recorded) if found < recorded - SLACK => {
                    faults.push(format!("{name} is {found:.3} of dense at k = {k}, {recorded} were recorded"));
                }
                _ => {}
            }
        }
    } else {
        eprintln!("{driver}: ratios are recorded for {RECORDED}, and not judged");
    }
    faults
}

/// What was recorded of a device.
fn recorded(device: &Pretended) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results").join(RUNS);
    let text = std::fs::read_to_string(folder.join(format!("{}.json", device.architecture))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Kernels that planners choose from, by their names in the table of costs, and what the table has of each.
fn costs(run: &Value, device: &Pretended) -> BTreeMap<String, String> {
    let mut costs = BTreeMap::new();
    for kernel in run["kernels"].as_array().unwrap() {
        let name = kernel["kernel"].as_str().unwrap();
        let Some(name) = name.strip_prefix("gemm_").filter(|name| !name.starts_with("grad")) else { continue };
        // See src/plan/costs.rs.
        if name.contains("-coop") && device.shim.contains("nouveau") {
            continue;
        }
        let estimate = &kernel["estimates"][0];
        let number = |of: &Value, field: &str| of[field].as_f64().unwrap_or_else(|| panic!("{field} of {name}"));
        let [step, prologue] =
            ["step", "prologue"].map(|of| ["issue", "passes"].map(|what| number(estimate, &format!("{of}_{what}"))));
        let threads = number(kernel, "resident_threads");
        let cost = format!("cost({step:.1?}, {prologue:.1?}, {threads}, {:.1})", number(kernel, "registers"));
        costs.insert(name.trim_end_matches("-none").to_owned(), cost);
    }
    costs
}

/// The planner's table is what was recorded. With SPARSE24_WRITE_COSTS it is written.
#[test]
fn the_planners_costs_are_those_that_were_recorded() {
    let costs = DEVICES.each_ref().map(|device| costs(&recorded(device), device));
    let names: BTreeSet<_> = costs.iter().flat_map(BTreeMap::keys).collect();
    let mut table = format!(
        "//! Cycles by kernel and architecture, as benches/results/{RUNS} has them: rdna2, rdna3, rdna4, ampere, ada, apple-m1,\n\
         //! adreno. Written by tests/compilers.rs with SPARSE24_WRITE_COSTS=1, not by hand.\n\n\
         use super::{{Cost, cost}};\n\n\
         /// Whose machine code it is.\n\
         pub(in crate::plan) const COMPILERS: &str = \"{RECORDED}\";\n\n\
         #[rustfmt::skip]\n\
         pub(super) static COSTS: [(&str, [Option<Cost>; {}]); {}] = [\n",
        DEVICES.len(),
        names.len()
    );
    for name in names {
        let of = |costs: &BTreeMap<String, String>| costs.get(name).map_or("None", String::as_str).to_owned();
        table += &format!("    ({name:?}, [{}]),\n", costs.each_ref().map(of).join(", "));
    }
    table += "];\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plan/costs/table.rs");
    if std::env::var_os("SPARSE24_WRITE_COSTS").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap();
    let differ = found.lines().zip(table.lines()).find(|(found, recorded)| found != recorded);
    assert!(found == table, "{} is not what was recorded: {differ:?}", path.display());
}

/// The judgement itself, on what was recorded: nothing is wrong with it, and whatever is made wrong is named.
#[test]
fn what_is_wrong_with_compiled_kernels_is_named() {
    for device in &DEVICES {
        let run = recorded(device);
        assert_eq!(faults(&run, device), [""; 0]);

        const KERNEL: &str = "gemm_sparse24-f32f32-v32-128x128x16-none";
        let at = |list: &str| run[list].as_array().unwrap().iter().position(|k| k["kernel"] == KERNEL).unwrap();
        let (kernel, ratio) = (at("kernels"), at("ratios"));
        type Spoil<'a> = &'a dyn Fn(&mut Value);
        let cases: [(Spoil<'_>, &str); 8] = [
            (&|run| run["kernels"][kernel]["refused"] = "why".into(), "is refused: why"),
            (&|run| run["kernels"][kernel]["spills"] = 1.0.into(), "spills Some(1.0)"),
            (&|run| run["kernels"][kernel]["spills"] = Value::Null, "spills None"),
            (&|run| run["kernels"][kernel]["note"] = "unknown instruction".into(), "unknown instruction"),
            (&|run| run["kernels"][kernel]["estimates"] = Vec::<Value>::new().into(), "has no estimate"),
            (&|run| run["kernels"][kernel]["resident_threads"] = 32.0.into(), "a core holds 32 threads"),
            (&|run| run["kernels"][kernel]["stated_threads"] = Value::Null, "states no occupancy"),
            (
                &|run| {
                    let same = &mut run["ratios"][ratio]["same"][1];
                    *same = (same.as_f64().unwrap() - 0.03).into();
                },
                "of dense at k = 768",
            ),
        ];
        for (spoil, said) in cases {
            let mut spoilt = run.clone();
            spoil(&mut spoilt);
            let found = faults(&spoilt, device);
            assert!(found.len() == 1 && found[0].contains(KERNEL) && found[0].contains(said), "{said}: {found:?}");
        }
        // Of another version of Mesa ratios are not judged, all else is.
        let mut newer = run.clone();
        newer["device"]["driver"] = "radv Mesa 99.0.0".into();
        newer["ratios"] = Vec::<Value>::new().into();
        assert_eq!(faults(&newer, device), [""; 0]);
        newer["kernels"][kernel]["spills"] = 2.0.into();
        assert_eq!(faults(&newer, device).len(), 1);
    }
}

fn device_compiles_every_kernel(architecture: &str) {
    let root = tree();
    let device = DEVICES.iter().find(|d| d.architecture == architecture).unwrap();
    let started = std::time::Instant::now();
    // The names of most devices tell.
    let told: &[&str] = if device.name == "NVK" { &["--architecture", architecture] } else { &[] };
    let ran = sparse24(&root, device, &[&["kernels", "--compile", "--json"], told].concat());
    assert!(matches!(ran.code, 0 | 3), "{ran:?}");
    let Ran { code, stdout, stderr, .. } = ran;
    let run: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout:.500}\n{stderr}"));
    assert_eq!(run["schema"], "sparse24-compile/1");
    let kernels = run["kernels"].as_array().unwrap().len();
    eprintln!("{architecture}: {kernels} kernels, {} s", started.elapsed().as_secs());
    // All that need no cooperative matrices, and those that do where a device has them.
    let cooperative =
        run["kernels"].as_array().unwrap().iter().filter(|k| k["kernel"].as_str().unwrap().contains("-coop"));
    let cooperative = cooperative.count();
    assert!(kernels - cooperative >= 350, "only {kernels} kernels are left");
    assert_eq!(cooperative > 40, device.cooperative, "{cooperative} kernels of cooperative matrices");
    // What tells the two of NVIDIA's apart: warps of a multiprocessor.
    if let Some(most) = device.most_threads {
        let threads = run["kernels"].as_array().unwrap().iter().filter_map(|k| k["resident_threads"].as_f64());
        assert_eq!(threads.fold(0.0, f64::max), most, "{architecture}");
    }
    if let Some(folder) = std::env::var_os("SPARSE24_COMPILED") {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Path::new(&folder).join(format!("{architecture}.json")), format!("{run}\n")).unwrap();
    }
    let faults = faults(&run, device);
    assert!(faults.is_empty(), "{architecture}: {} faults:\n{}", faults.len(), faults.join("\n"));
    if run["device"]["driver"].as_str().unwrap().contains(RECORDED) {
        let (now, before) = (costs(&run, device), costs(&recorded(device), device));
        let changed: Vec<_> = now.iter().filter(|(name, cost)| before.get(*name) != Some(cost)).collect();
        assert!(
            changed.is_empty() && now.len() == before.len(),
            "{architecture}: {} kernels cost something else than {RUNS} has, the first {:?}: record them again",
            changed.len(),
            changed.first()
        );
    }
    // The program knows no spills that are known.
    let is_known = SPILLS.iter().any(|(of, ..)| *of == architecture);
    assert_eq!(code, if is_known { 3 } else { 0 }, "{stderr}");
}

/// A kernel's own SPIR-V, given as anyone's module, becomes what the kernel does.
fn device_takes_a_module(architecture: &str) {
    let root = tree();
    let device = DEVICES.iter().find(|d| d.architecture == architecture).unwrap();
    const KERNEL: &str = "gemm_sparse24-f32f32-v32-64x64x16-none";
    let folder = tempfile::tempdir().unwrap();
    let dumped = folder.path().join("dumped");
    sparse24(&root, device, &["kernels", KERNEL, "--dump", dumped.to_str().unwrap()]).exits(0);
    let module = dumped.join(format!("{KERNEL}.spv"));
    let arguments = ["kernels", KERNEL, "--compile", "--json", "--module", module.to_str().unwrap()];
    let (stdout, _) = sparse24(&root, device, &arguments).exits(0);
    let run: Value = serde_json::from_str(&stdout).unwrap();
    let [own, module] = &run["kernels"].as_array().unwrap()[..] else { panic!("{stdout}") };
    assert_eq!(module["kernel"], format!("{KERNEL}.spv"));
    let same = ["refused", "subgroup", "threads", "workgroup_bytes", "registers", "spills", "resident_threads"];
    for field in same.into_iter().chain(["statistics", "note"]) {
        assert_eq!(own[field], module[field], "{architecture}: {field}");
    }
    // Of 16 k each of 128 threads has 32 outputs, and 2:4 half of their multiply-adds.
    let loops = module["loops"].as_array().unwrap();
    let most = loops.iter().map(|l| l["multiply_adds"].as_f64().unwrap()).fold(0.0, f64::max);
    assert_eq!((most, &own["code"]["step"]["multiply_adds"]), (256.0, &module["code"]["step"]["multiply_adds"]));
    assert!(own["loops"].is_null() && module["estimates"].as_array().unwrap().is_empty());
}

#[test]
#[ignore = "needs a tree with Mesa's drivers and shims"]
fn every_compiler_takes_a_module_of_anyones() {
    for device in &DEVICES {
        device_takes_a_module(device.architecture);
    }
}

macro_rules! devices {
    ($($test:ident $architecture:literal;)*) => {$(
        #[test]
        #[ignore = "needs a tree with Mesa's drivers and shims"]
        fn $test() {
            device_compiles_every_kernel($architecture);
        }
    )*};
}

devices! {
    adas_compiler_takes_every_kernel "ada";
    amperes_compiler_takes_every_kernel "ampere";
    rdna2s_compiler_takes_every_kernel "rdna2";
    rdna3s_compiler_takes_every_kernel "rdna3";
    rdna4s_compiler_takes_every_kernel "rdna4";
    apples_compiler_takes_every_kernel "apple-m1";
    adrenos_compiler_takes_every_kernel "adreno";
}
