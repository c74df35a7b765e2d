//! The tuner: how plans follow measured times, and `sparse24 tune` as a user runs it. What needs a GPU is ignored
//! unless asked for (`-- --include-ignored`); the rest sees no Vulkan driver.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[cfg(feature = "cli")]
#[path = "common/binary.rs"]
mod binary;
mod common;

use sparse24::kernels::{Caps, Rates, Schedule};
use sparse24::plan::Tuned;
use sparse24::{DType, Op, Plan, Problem, Tuning, VectorLen};

const SPARSE: Op = Op::Sparse24(VectorLen::ONE);

/// What a large GPU offers.
fn caps() -> Caps {
    Caps {
        architecture: None,
        f16: true,
        subgroups: Some((32, 32)),
        cooperative: Vec::new(),
        cooperative_lanes: None,
        cooperative_refused: None,
        cooperative_scalars: false,
        emulates_cooperative: false,
        unrolls: true,
        timestamps: true,
        workgroup_memory: 48 << 10,
        workgroup_threads: 1024,
        grid: 65535,
        busy_threads: 1 << 17,
        rates: Rates { fma: 2e13, cooperative: 1e14, memory: 2e12, cache: 4e12, dispatch: 3e-6 },
        binding_bytes: 1 << 31,
        buffer_bytes: 1 << 40,
    }
}

/// A way that the estimates do not choose, with its splits, measured at `n` tokens.
fn unlikely(problem: &Problem, n: usize, seconds: f64) -> Tuned {
    let schedule = Schedule::named(problem.op, problem.storage, "gemv_32x1_t256").unwrap();
    assert_ne!(Plan::gpu(problem, &caps(), &Tuning::default()).unwrap().schedule(), "gemv_32x1_t256/2");
    Tuned { n, schedule, splits: 2, seconds }
}

#[test]
fn a_plan_follows_the_nearest_measurement_within_half_as_many_tokens_again() {
    let problem = |n| Problem::linear(Op::Dense, 768, n, 3072, DType::F32);
    let mut tuning = Tuning::default();
    tuning.insert(&problem(512), unlikely(&problem(512), 512, 1e-5));
    let schedule = |n| Plan::gpu(&problem(n), &caps(), &tuning).unwrap().schedule();
    let untuned = |n| Plan::gpu(&problem(n), &caps(), &Tuning::default()).unwrap().schedule();
    for n in [512, 342, 500, 768] {
        assert_eq!(schedule(n), "gemv_32x1_t256/2", "{n}");
    }
    for n in [1, 341, 769, 2048] {
        assert_eq!(schedule(n), untuned(n), "{n}");
    }
    // Another layer, type or operation is another matter.
    for other in [
        Problem { m: 769, ..problem(512) },
        Problem { k: 3068, ..problem(512) },
        Problem::linear(Op::Dense, 768, 512, 3072, DType::F16),
        Problem { op: Op::Masked, ..problem(512) },
    ] {
        assert_ne!(Plan::gpu(&other, &caps(), &tuning).unwrap().schedule(), "gemv_32x1_t256/2", "{other:?}");
    }
    // Of two within reach the nearer one counts.
    let near = Schedule::named(Op::Dense, DType::F32, "32x32x16").unwrap();
    tuning.insert(&problem(640), Tuned { n: 640, schedule: near, splits: 1, seconds: 1e-5 });
    let plan = Plan::gpu(&problem(600), &caps(), &tuning).unwrap();
    assert_eq!(plan.schedule(), "32x32x16");
    assert!(plan.explain().contains("lowest measured time at 640 tokens: 10.0 µs"), "{}", plan.explain());
    assert_eq!(tuning.len(), 2);
}

#[test]
fn a_measured_way_that_the_device_cannot_run_is_passed_over() {
    let problem = Problem::linear(Op::Dense, 768, 512, 3072, DType::F32);
    let mut tuning = Tuning::default();
    tuning.insert(&problem, unlikely(&problem, 512, 1e-5));
    let small = Caps { workgroup_memory: 16 << 10, ..caps() };
    let plan = Plan::gpu(&problem, &small, &tuning).unwrap();
    assert_eq!(plan.schedule(), Plan::gpu(&problem, &small, &Tuning::default()).unwrap().schedule());
}

#[test]
fn dense_weights_stand_in_where_they_were_measured_to_take_less_time() {
    let problem = |op, n| Problem::linear(op, 4096, n, 4096, DType::F32);
    let tuned = |op, sparse_n, dense_n, sparse_seconds: f64| {
        let mut tuning = Tuning::default();
        let (sparse, dense) = (problem(op, sparse_n), problem(Op::Dense, dense_n));
        tuning.insert(&sparse, unlikely(&sparse, sparse_n, sparse_seconds));
        tuning.insert(&dense, unlikely(&dense, dense_n, 1e-3));
        tuning
    };
    let weights = |tuning: &Tuning, op| {
        let plan = Plan::gpu_or_dense(&problem(op, 512), &caps(), tuning).unwrap();
        (plan.weights(), plan.explain())
    };
    let vector32 = Op::Sparse24(VectorLen::new(32).unwrap());
    for op in [SPARSE, vector32] {
        // Measurements decide, whichever way the estimates point.
        let (kept, why) = weights(&tuned(op, 512, 512, 0.9e-3), op);
        assert!(kept == op && why.contains("measured at 1.11 times the speed of dense"), "{why}");
        let (stood_in, why) = weights(&tuned(op, 512, 512, 1.1e-3), op);
        assert!(stood_in == Op::Dense && why.contains("measured at 0.91 times the speed of dense"), "{why}");
        // Times at different numbers of tokens cannot be compared.
        let (by_estimate, why) = weights(&tuned(op, 400, 512, 1e-9), op);
        assert_eq!(by_estimate, weights(&Tuning::default(), op).0, "{why}");
        assert!(why.contains("estimated at"), "{why}");
    }
}

#[cfg(feature = "cli")]
mod command {
    use std::path::PathBuf;

    use serde_json::{Value, json};

    use super::binary::{Run, command, json, sparse24, text, with_drivers};
    use super::common::gpu;

    #[test]
    fn the_cpu_has_nothing_to_tune() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        for device in ["cpu", "auto"] {
            let (stdout, stderr) = sparse24(["tune", "--device", device, "--cache", text(&cache)]).exits(0);
            assert!(stdout.is_empty() && stderr.contains("nothing to tune"), "{stdout}{stderr}");
        }
        assert!(!cache.exists());
        let (stdout, _) = sparse24(["tune", "--budget", "2.5", "--json"]).exits(0);
        let run: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((&run["schema"], &run["budget_seconds"]), (&json!("sparse24-tune/1"), &json!(2.5)));
        assert_eq!((&run["operations"], &run["environment"]["kind"]), (&json!([]), &json!("cpu")));
    }

    #[test]
    fn bad_flags_are_named_and_exit_with_2() {
        for (flags, named) in [
            (["--shapes", "4x0x4"], "zero"),
            (["--shapes", "bert-tiny"], "bert-base"),
            (["--tokens", "0"], "--tokens"),
            (["--vector", "3"], "vector length 3"),
            (["--dtype", "bf16"], "--dtype"),
            (["--ops", "sparse"], "--ops"),
            (["--budget", "inf"], "--budget"),
            (["--budget", "NaN"], "--budget"),
            (["--budget", "soon"], "not a number of seconds"),
        ] {
            let (stdout, stderr) = sparse24(["tune", flags[0], flags[1]]).exits(2);
            assert!(stdout.is_empty() && stderr.contains(named), "{flags:?}: {stderr}");
        }
        sparse24(["bench", "--no-tuning", "--cache", "x"]).exits(2);
        let (_, stderr) = sparse24(["tune", "--quick"]).exits(2);
        assert!(stderr.contains("--cache"), "{stderr}");
        let (_, stderr) = sparse24(["tune", "--device", "no such device"]).exits(1);
        assert!(stderr.contains("--device") && stderr.contains("cpu"), "{stderr}");
    }

    /// A bench on the CPU device neither reads a cache nor speaks of one.
    #[test]
    fn what_is_not_tuned_is_not_looked_up() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run.json");
        let arguments = ["bench", "--device", "cpu", "--quick", "--shapes", "8x8x8", "--json", out.to_str().unwrap()];
        let (_, stderr) = command(arguments).env("SPARSE24_CACHE", folder.path()).run().exits(0);
        let run = json(&out);
        let environment = &run["environment"];
        assert_eq!((&environment["tuning"], &environment["tuned"]), (&json!("none"), &json!(0)));
        assert!(stderr.is_empty(), "{stderr}");
    }

    /// A GPU, a folder for its cache, and the shape that is tuned there.
    struct Setup {
        device: String,
        folder: tempfile::TempDir,
    }

    impl Setup {
        fn new() -> Option<Self> {
            let device = gpu()?.info().name().to_owned();
            Some(Self { device, folder: tempfile::tempdir().unwrap() })
        }

        /// Runs a command on the small layer and returns stdout and stderr.
        fn run(&self, command: &str, ops: &str, more: &[&str]) -> (String, String) {
            let common = [command, "--device", &self.device, "--quick", "--ops", ops, "--vector", "1,32"];
            let arguments = [&common[..], &["--shapes", "64x24x96"], more].concat();
            with_drivers(arguments).env("SPARSE24_CACHE", self.folder.path()).run().exits(0)
        }

        /// The one file of a tuning in the folder.
        fn file(&self) -> PathBuf {
            let files = std::fs::read_dir(self.folder.path()).unwrap().map(|f| f.unwrap().path());
            let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "json")).collect();
            assert_eq!(files.len(), 1, "{files:?}");
            files[0].clone()
        }

        fn bench(&self, more: &[&str]) -> (Value, String) {
            let out = tempfile::tempdir().unwrap();
            let out = out.path().join("run.json");
            let (_, stderr) = self.run("bench", "dense", &[more, &["--json", out.to_str().unwrap()]].concat());
            (json(&out), stderr)
        }
    }

    /// What the driver made of kernels goes to the folder and is taken from there; a file that is none is made anew.
    /// How much a driver puts into it is its own matter.
    #[test]
    #[ignore = "needs a GPU"]
    fn compiled_kernels_are_kept_unless_they_are_not_to_be() {
        let Some(setup) = Setup::new() else { return };
        let files =
            || -> Vec<_> { std::fs::read_dir(setup.folder.path()).unwrap().map(|file| file.unwrap().path()).collect() };
        setup.bench(&["--no-pipeline-cache"]);
        assert_eq!(files(), Vec::<PathBuf>::new());
        setup.bench(&[]);
        let sparse24::engine::DeviceInfo::Gpu(info) = gpu().unwrap().info() else { return };
        if info.backend != "vulkan" {
            assert_eq!(files(), Vec::<PathBuf>::new());
            return;
        }
        let file = match &files()[..] {
            [file] if file.extension().is_some_and(|end| end == "bin") => file.clone(),
            others => panic!("{others:?}"),
        };
        let (first, written) = (std::fs::read(&file).unwrap(), file.metadata().unwrap().modified().unwrap());
        // The same kernels: the file has them, and is left alone. SwiftShader hands out other data each time.
        setup.bench(&[]);
        let is_steady = std::fs::read(&file).unwrap() == first;
        assert!(is_steady || setup.device.contains("SwiftShader"), "{}", setup.device);
        assert!(!is_steady || file.metadata().unwrap().modified().unwrap() == written);
        let mut changed = first.clone();
        changed[first.len() / 2] ^= 1;
        for spoilt in [b"garbage".to_vec(), Vec::new(), first[..first.len() - 1].to_vec(), changed] {
            std::fs::write(&file, &spoilt).unwrap();
            let (run, stderr) = setup.bench(&[]);
            assert!(run["rows"][0]["verified"] == true && stderr.is_empty(), "{stderr}");
            let now = std::fs::read(&file).unwrap();
            assert!(now != spoilt && (now == first || !is_steady), "{} bytes", spoilt.len());
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn what_was_tuned_is_not_measured_again() {
        let Some(setup) = Setup::new() else { return };
        // No time: nothing is measured, and that is said.
        let (stdout, stderr) = setup.run("tune", "auto", &["--budget", "0"]);
        assert!(stdout.is_empty() && stderr.contains("of 3, 3 not tuned and 0 in part"), "{stdout}{stderr}");
        assert_eq!(std::fs::read_dir(setup.folder.path()).unwrap().count(), 0);

        let (stdout, stderr) = setup.run("tune", "auto", &[]);
        assert!(stdout.contains("64x24x96") && stdout.contains("3 operations in"), "{stdout}{stderr}");
        // Stderr is no terminal here: a line for each thing that is done.
        let lines: Vec<_> = stderr.lines().collect();
        assert!(lines[0].starts_with("measuring what the device can do"), "{stderr}");
        for (at, op) in ["dense", "2:4 at V = 1", "2:4 at V = 32"].iter().enumerate() {
            let line = lines.iter().find(|l| l.starts_with(&format!("{} of 3: shape 64x24x96, {op}: ", at + 1)));
            assert!(line.is_some_and(|line| line.ends_with(" candidates")), "{stderr}");
        }
        let file = setup.file();
        assert!(stdout.contains(file.to_str().unwrap()), "{stdout}");
        let first = std::fs::read(&file).unwrap();
        let cache = json(&file);
        assert_eq!(cache["schema"], "sparse24-tuning/1");
        assert_eq!(cache["adapter"], setup.device.as_str());
        let ops: Vec<_> = cache["entries"].as_array().unwrap().iter().map(|e| (&e["op"], &e["vector"])).collect();
        let (dense, sparse) = (json!("dense"), json!("sparse24"));
        assert_eq!(ops, [(&dense, &Value::Null), (&sparse, &json!(1)), (&sparse, &json!(32))]);

        // All of it is there, with time or without; a further operation is added to it.
        for budget in [&[][..], &["--budget", "0"]] {
            let (stdout, stderr) = setup.run("tune", "auto", budget);
            assert!(stderr.is_empty() && stdout.matches("cached").count() == 3, "{stdout}{stderr}");
            assert_eq!(std::fs::read(&file).unwrap(), first);
        }
        let (stdout, _) = setup.run("tune", "dense,masked", &[]);
        assert!(stdout.matches("cached").count() == 1 && stdout.contains("4 operations in"), "{stdout}");
        assert_eq!(json(&file)["entries"].as_array().unwrap()[..3], cache["entries"].as_array().unwrap()[..]);
        // Unless it is to be measured again.
        // A result that was cut off goes on with what was left of it, and is then like any other.
        let mut cut = json(&file);
        let first_way = cut["entries"][0]["way"].as_str().unwrap().to_owned();
        let other = if first_way == "32x32x16" { "gemv_32x1_t256" } else { "32x32x16" };
        cut["entries"][0]["untried"] = json!([other, "no such way"]);
        std::fs::write(&file, cut.to_string()).unwrap();
        let (stdout, stderr) = setup.run("tune", "dense", &["--json"]);
        assert!(stderr.starts_with("1 of 1: shape 64x24x96, dense: 2 candidates"), "{stderr}");
        let run: Value = serde_json::from_str(&stdout).unwrap();
        let operation = &run["operations"][0];
        assert_eq!((&operation["status"], &operation["tried"]), (&json!("tuned"), &json!(2)));
        assert_eq!((&operation["vs_untuned"], &run["cached"]), (&Value::Null, &json!(4)));
        assert_eq!(json(&file)["entries"].as_array().unwrap().iter().filter(|e| e.get("untried").is_some()).count(), 0);
        let (stdout, _) = setup.run("tune", "dense", &["--force"]);
        assert!(!stdout.contains("cached") && stdout.contains("4 operations in"), "{stdout}");
        assert_ne!(json(&file)["ceilings"], cache["ceilings"]);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn bench_believes_a_sound_cache_only() {
        let Some(setup) = Setup::new() else { return };
        setup.run("tune", "dense", &[]);
        let file = setup.file();
        let mut cache = json(&file);
        let (run, stderr) = setup.bench(&[]);
        let entry = &cache["entries"][0];
        let splits = entry["splits"].as_u64().unwrap();
        let tile =
            format!("{}{}", entry["way"].as_str().unwrap(), if splits > 1 { format!("/{splits}") } else { "".into() });
        assert_eq!(run["rows"][0]["tile"], tile.as_str());
        assert_eq!((&run["environment"]["tuning"], &run["environment"]["tuned"]), (&json!("cache"), &json!(1)));
        assert!(
            !run.to_string().contains(setup.folder.path().to_str().unwrap()),
            "no folder of the user's in a report"
        );
        assert!(stderr.is_empty(), "{stderr}");

        // A way that nothing but the cache would choose, so that it is seen to be followed.
        cache["entries"][0]["way"] = "gemv_32x1_t256".into();
        cache["entries"][0]["splits"] = 1.into();
        let written = |cache: &Value| std::fs::write(&file, cache.to_string()).unwrap();
        written(&cache);
        let tile_and_warning = |more: &[&str]| {
            let (run, stderr) = setup.bench(more);
            let tuning = run["environment"]["tuning"].as_str().unwrap().to_owned();
            (run["rows"][0]["tile"].as_str().unwrap().to_owned(), tuning, stderr)
        };
        assert_eq!(tile_and_warning(&[]), ("gemv_32x1_t256".into(), "cache".into(), String::new()));
        let (tile, tuning, stderr) = tile_and_warning(&["--no-tuning"]);
        assert!(tile != "gemv_32x1_t256" && tuning == "none" && stderr.is_empty(), "{tile} {tuning} {stderr}");
        // Checked shaders are another device to the tuner.
        let (tile, tuning, _) = tile_and_warning(&["--checked"]);
        assert!(tile != "gemv_32x1_t256" && tuning == "none", "{tile} {tuning}");

        let damaged = |field: &str, value: Value| {
            let mut cache = cache.clone();
            *cache.pointer_mut(field).unwrap() = value;
            cache.to_string()
        };
        let whole = cache.to_string();
        for (text, named) in [
            (whole[..whole.len() / 2].to_owned(), "not JSON"),
            (damaged("/driver", json!("another driver")), "another driver"),
            (damaged("/version", json!("0.0.0")), "0.0.0"),
            (damaged("/entries/0/way", json!("gemv_32x2_t256")), "gemv_32x2_t256"),
            (damaged("/entries/0/seconds", json!(-1.0)), "seconds is -1"),
            (damaged("/entries/0/m", json!(1u64 << 40)), "m is 1099511627776"),
        ] {
            std::fs::write(&file, text).unwrap();
            let (tile, tuning, stderr) = tile_and_warning(&[]);
            assert!(tile != "gemv_32x1_t256" && tuning == "none", "{named}: {tile} {tuning}");
            assert!(stderr.starts_with("warning: tuning cache ignored") && stderr.contains(named), "{named}: {stderr}");
        }
        // Another driver's file, under its own name.
        std::fs::rename(&file, file.to_str().unwrap().replace(".json", "0.json")).unwrap();
        let (_, tuning, stderr) = tile_and_warning(&[]);
        assert!(tuning == "none" && stderr.contains("another driver or another version"), "{stderr}");
        // A damaged one is begun anew.
        std::fs::write(&file, "{").unwrap();
        let (stdout, stderr) = setup.run("tune", "dense", &[]);
        assert!(stderr.contains("ignored") && !stdout.contains("cached"), "{stdout}{stderr}");
        assert_eq!(json(&file)["entries"].as_array().unwrap().len(), 1);
    }

    /// More than there is time for: what is under way is cut off, what was found is kept, and the next run goes on.
    #[test]
    #[ignore = "needs a GPU"]
    fn a_budget_is_kept_and_what_was_found_is_too() {
        let Some(setup) = Setup::new() else { return };
        let tune = || {
            let mut command =
                with_drivers(["tune", "--device", &setup.device, "--shapes", "512x256x512", "--budget", "10"]);
            command.args(["--ops", "dense,sparse24,masked", "--vector", "1,2,4,8,16,32,64,128", "--json"]);
            let (stdout, stderr) = command.env("SPARSE24_CACHE", setup.folder.path()).run().exits(0);
            (serde_json::from_str::<Value>(&stdout).unwrap(), stderr)
        };
        let (run, stderr) = tune();
        // A machine that slows down in the middle of a step, as one does that runs other tests, is forgiven.
        assert!(run["seconds"].as_f64().unwrap() < 15.0, "{run}\n{stderr}");
        let count = |run: &Value, status: &str| {
            run["operations"].as_array().unwrap().iter().filter(|o| o["status"] == status).count()
        };
        if count(&run, "not_tuned") + count(&run, "unfinished") == 0 {
            // A fast GPU.
            return;
        }
        assert!(stderr.contains("out of time"), "{stderr}");
        let known = |cache: &Value| cache["entries"].as_array().unwrap().len();
        assert_eq!(known(&json(&setup.file())), count(&run, "tuned") + count(&run, "unfinished"), "{run}");
        let (again, _) = tune();
        let done = |run: &Value| count(run, "tuned") + count(run, "cached");
        assert!(done(&again) > done(&run) || count(&again, "unfinished") > 0, "{run}\n{again}");
        assert!(count(&again, "cached") >= count(&run, "tuned"));
    }

    /// Two at once, into one folder: both results are there.
    #[test]
    #[ignore = "needs a GPU"]
    fn two_runs_at_once_share_a_cache() {
        let Some(setup) = Setup::new() else { return };
        std::thread::scope(|scope| {
            for ops in ["dense", "masked"] {
                let setup = &setup;
                scope.spawn(move || setup.run("tune", ops, &[]));
            }
        });
        let cache = json(&setup.file());
        let mut ops: Vec<_> = cache["entries"].as_array().unwrap().iter().map(|e| e["op"].as_str().unwrap()).collect();
        ops.sort_unstable();
        assert_eq!(ops, ["dense", "masked"]);
    }
}
