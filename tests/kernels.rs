//! `sparse24 kernels` on a machine without a Vulkan driver: the list, what is written of it, and what is refused. What
//! compilers make of kernels is in tests/compilers.rs.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/binary.rs"]
mod binary;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use binary::{Run, command};
use serde_json::Value;

/// Runs to this exit code, and returns stdout and stderr.
#[track_caller]
fn kernels(code: i32, arguments: &[&str]) -> (String, String) {
    command(["kernels"]).args(arguments).run().exits(code)
}

fn names(stdout: &str) -> Vec<String> {
    let run: Value = serde_json::from_str(stdout).unwrap();
    assert_eq!((run["schema"].as_str(), run["program"].as_str()), (Some("sparse24-kernels/1"), Some("sparse24")));
    run["kernels"].as_array().unwrap().iter().map(|k| k["kernel"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_list_has_each_text_once_and_with_all_every_kernel() {
    let (json, stderr) = kernels(0, &["--json"]);
    let texts = names(&json);
    assert_eq!((stderr.as_str(), texts.len()), ("", texts.iter().collect::<BTreeSet<_>>().len()));
    for known in ["gemm_dense-f32f32-128x128x16-none", "gemm_sparse24-f16f32-v1-expand_64x64x16-none", "coop_check-8"] {
        assert!(texts.iter().any(|name| name == known), "{known}");
    }
    let all = names(&kernels(0, &["--all", "--json"]).0);
    assert!(all.len() > 10 * texts.len() && texts.iter().all(|name| all.contains(name)), "{}", all.len());

    // Parts of names, and of these the ones that no kernel has.
    let (json, stderr) = kernels(0, &["v32-128x128,no such part", "--json"]);
    assert!(names(&json).iter().all(|name| name.contains("v32-128x128")) && names(&json).len() == 2);
    assert_eq!(stderr, "no kernel has no such part in its name\n");
    let (table, _) = kernels(0, &["v32-128x128"]);
    assert!(table.starts_with("2 kernels\n") && !table.contains("--wide"), "{table}");
    let (csv, _) = kernels(0, &["v32-128x128x16", "--format", "csv"]);
    assert_eq!(csv.lines().next(), Some("kernel"));
}

#[test]
fn what_is_dumped_is_the_shader_and_its_spirv() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("wgsl");
    kernels(0, &["v32-64x64", "--dump", at.to_str().unwrap()]);
    let files: Vec<_> = fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 4, "{files:?}");
    for storage in ["f32", "f16"] {
        let name = format!("gemm_sparse24-{storage}f32-v32-64x64x16-none");
        let text = fs::read_to_string(at.join(format!("{name}.wgsl"))).unwrap();
        assert!(text.contains("fn main(") && naga::front::wgsl::parse_str(&text).is_ok(), "{name}");
        // SPIR-V begins with its number, and has nothing but words.
        let spirv = fs::read(at.join(format!("{name}.spv"))).unwrap();
        assert_eq!((&spirv[..4], spirv.len() % 4), (&0x0723_0203_u32.to_le_bytes()[..], 0), "{name}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let (_, stderr) = kernels(2, &["no such kernel"]);
    assert!(stderr.contains("no kernel has no such kernel in its name"), "{stderr}");
    let (_, stderr) = kernels(2, &["--device", "x"]);
    assert!(stderr.contains("--compile"), "{stderr}");
    let (_, stderr) = kernels(2, &["--compile", "--architecture", "gcn"]);
    for name in ["rdna2", "rdna3", "rdna4", "ampere", "ada", "apple-m1", "adreno"] {
        assert!(stderr.contains(name), "{stderr}");
    }
    // Without a driver, and without a folder left behind.
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("code");
    let (stdout, stderr) = kernels(1, &["--compile", "--dump", at.to_str().unwrap()]);
    assert!(stdout.is_empty() && stderr.starts_with("error: ") && !Path::new(&at).exists(), "{stderr}");
}

/// Modules of others are read before a driver is looked for, and what is wrong with one is said with its file.
#[test]
fn modules_that_are_none_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dumped = folder.path().join("dumped");
    kernels(0, &["dense-f32f32-32x32", "--dump", dumped.to_str().unwrap()]);
    let good = dumped.join("gemm_dense-f32f32-32x32x16-none.spv");
    let bytes = fs::read(&good).unwrap();
    let text = folder.path().join("text.spv");
    fs::write(&text, "@compute fn main() {}").unwrap();
    let cut = folder.path().join("cut.spv");
    fs::write(&cut, &bytes[..bytes.len() - 5]).unwrap();
    let missing = folder.path().join("missing.spv");
    for (path, said) in [(&text, "is not SPIR-V"), (&cut, "is cut off"), (&missing, "No such file")] {
        let (_, stderr) = kernels(1, &["--compile", "--module", good.to_str().unwrap(), path.to_str().unwrap()]);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(stderr.contains(name) && stderr.contains(said), "{name}: {stderr}");
    }
    // A good one fails where there is no driver.
    let (_, stderr) = kernels(1, &["--compile", "--module", good.to_str().unwrap()]);
    assert!(!stderr.contains(".spv"), "{stderr}");
    let (_, stderr) = kernels(2, &["--module", good.to_str().unwrap()]);
    assert!(stderr.contains("--compile"), "{stderr}");
    let (_, stderr) = kernels(2, &["--compile", "--module", good.to_str().unwrap(), good.to_str().unwrap()]);
    assert!(stderr.contains("two files are called gemm_dense"), "{stderr}");
}
