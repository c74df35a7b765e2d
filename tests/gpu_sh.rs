//! `benches/gpu.sh` as its users run it: the folder that it leaves, its table and its exit codes.
#![cfg(all(feature = "cli", target_os = "linux"))]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;
mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use binary::{Run, SPARSE24, isolated, json, text};

/// The script with arguments.
fn gpu_sh(arguments: &[&str]) -> Command {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gpu.sh");
    let mut command = Command::new("bash");
    command.arg(script).args(arguments);
    command
}

#[test]
fn what_is_wrong_is_named_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let bin = text(Path::new(SPARSE24).parent().unwrap());
    for (arguments, code, named) in [
        (&["--bin", bin][..], 2, "OUT"),
        (&["--bin", bin, "--parts", "env,nonsense", text(&out)], 2, "nonsense"),
        (&["--nonsense", text(&out)], 2, "--nonsense"),
        (&["--bin", text(folder.path()), text(&out)], 1, "sparse24"),
        (&["--bin", bin, "/"], 1, "new or empty folder"),
        (&["--bin", bin, text(&out)], 1, "no adapter"),
    ] {
        let stderr = isolated(&mut gpu_sh(arguments)).run().refused(code);
        assert!(stderr.contains(named), "{arguments:?}: {stderr}");
        assert!(!out.exists() || fs::read_dir(&out).unwrap().next().is_none());
    }
    let (usage, _) = gpu_sh(&["--help"]).run().exits(0);
    assert!(usage.contains("--bundle DIR") && usage.contains("--quick"), "{usage}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_quick_run_leaves_json_tables_and_a_summary() {
    let Some(device) = common::gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let bin = text(Path::new(SPARSE24).parent().unwrap());
    let name = device.info().name().to_owned();
    let arguments = ["--quick", "--parts", "env,ceilings,square", "--device", &name, "--bin", bin, text(&out)];
    let stdout = gpu_sh(&arguments).run().fine();
    assert!(stdout.contains(&name), "{stdout}");

    let f16 = device.caps().unwrap().f16;
    let files = if f16 { &["ceilings", "square-f32", "square-f16"][..] } else { &["ceilings", "square-f32"] };
    for file in files {
        let run = json(&out.join(format!("{file}.json")));
        assert_eq!(
            (&run["schema"], &run["environment"]["device"]),
            (&"sparse24-bench/1".into(), &name.as_str().into())
        );
        let rows = run["rows"].as_array().unwrap();
        assert!(!rows.is_empty() && rows.iter().all(|row| row["verified"] == true), "{file}");
        assert!(run["ceilings"]["fma_f32_tflops"].as_f64().unwrap() > 0.0);
        assert!(fs::read_to_string(out.join(format!("{file}.txt"))).unwrap().contains(" verified\n"));
    }
    assert_eq!(json(&out.join("devices.json"))["schema"], "sparse24-devices/1");
    assert!(fs::read_to_string(out.join("env.txt")).unwrap().contains("processor: "));

    let summary = fs::read_to_string(out.join("README.md")).unwrap();
    for part in [
        "## Ceilings\nOf `ceilings.json`",
        "128x128x128",
        "| square-f32 | ok |",
        "- correctness: not asked for",
        "vs dense: this device's own",
    ] {
        assert!(summary.contains(part), "{part:?} is missing from\n{summary}");
    }
    assert_eq!(summary.contains("square-f16: the adapter has no f16"), !f16, "{summary}");
    for entry in fs::read_dir(&out).unwrap() {
        let path = entry.unwrap().path();
        let content = fs::read_to_string(&path).unwrap();
        assert!(!content.contains(text(folder.path())) && !content.contains(bin), "{}", path.display());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_part_that_fails_is_reported_and_stops_no_other() {
    let Some(device) = common::gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    // The binary, but for runs whose output has a name that is made to fail.
    for (failing, exit, expected) in [("ceilings.json", 7, 1), ("ceilings.json", 3, 3)] {
        let script =
            format!("#!/bin/sh\ncase $* in *{failing}*) echo broken; exit {exit} ;; esac\nexec '{SPARSE24}' \"$@\"\n");
        fs::write(bin.join("sparse24"), script).unwrap();
        fs::set_permissions(bin.join("sparse24"), fs::Permissions::from_mode(0o755)).unwrap();
        let out = folder.path().join(format!("out-{exit}"));
        let name = device.info().name().to_owned();
        let parts = "ceilings,correctness,f32";
        let arguments = ["--quick", "--parts", parts, "--device", &name, "--bin", text(&bin), text(&out)];
        gpu_sh(&arguments).run().exits(expected);
        let summary = fs::read_to_string(out.join("README.md")).unwrap();
        for part in ["- ceilings: broken", "| correctness | failed |", "| square-f32 | ok |", "## Ceilings"] {
            assert!(summary.contains(part), "{part:?} is missing from\n{summary}");
        }
        assert!(
            summary.contains(if exit == 3 { "| ceilings | wrong |" } else { "| ceilings | failed |" }),
            "{summary}"
        );
    }
}
