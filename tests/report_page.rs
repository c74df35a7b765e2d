//! The page `sparse24 report` writes, as a browser shows it: wide and narrow, light and dark, and on paper. Skipped
//! where there is no Chromium, unless SPARSE24_REQUIRE_CHROMIUM is 1.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/browser.rs"]
mod browser;

use std::fs;
use std::path::{Path, PathBuf};

use binary::{Run, command};
use browser::{Browser, Page};
use serde_json::json;

/// Files of every kind, of the CPU and of a GPU's stand-ins, of this program and of others, and of three runs of one
/// device. That of a sensitivity analysis is made up.
const FILES: [&str; 17] = [
    "2026-11-25-peers/sparse24-threads1.json",
    "2026-11-25-peers/sparse24-tokens-threads1.json",
    "2026-11-25-peers/numpy-threads1.json",
    "2026-11-25-peers/torch-threads1.json",
    "2026-11-25-peers/matrixmultiply-threads1.json",
    "2026-11-25-peers/numr-threads1.json",
    "2026-11-25-peers/llvmpipe-384x128x384.json",
    "2026-11-23-llvmpipe/384x128x384.json",
    "2026-11-23-llvmpipe/384x128x384-checked.json",
    "2026-11-25-peers/cubek-llvmpipe-384x128x384.json",
    "2026-11-25-peers/swiftshader-256x64x256.json",
    "2026-11-25-peers/onnxruntime-webgpu-256x64x256.json",
    "2026-11-25-peers/minilm-32x64-threads2-1.json",
    "2026-11-25-peers/onnxruntime-32x64-threads2-1.json",
    "2026-11-25-minilm-pruning/dense.eval.json",
    "2026-11-25-minilm-pruning/sparsegpt-v32.eval.json",
    "2026-11-25-minilm-pruning/sparsegpt-v32.prune.json",
];

/// What must be read on the page: the programs, and the sections that need more than one kind of file.
const SEEN: [&str; 11] = [
    "numpy 2",
    "torch 2",
    "matrixmultiply 0",
    "numr 0",
    "cubek-matmul 0",
    "onnxruntime-webgpu 1",
    "onnxruntime 1",
    "Speedup against tokens",
    "Accuracy beside speed",
    "Runs of one device",
    "What pruning one layer alone costs",
];

/// A desktop's window and a phone's.
const SIZES: [(u32, u32); 2] = [(1280, 800), (390, 844)];

const PAGE_FAULTS: &str = include_str!("common/page_faults.js");

/// Size of a PNG, its number of colours, and the share of its commonest, found by the browser itself: no crate here
/// reads PNGs.
const PICTURE: &str = "async text => {
  const bytes = Uint8Array.from(text, letter => letter.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], { type: 'image/png' }));
  const { width, height } = picture;
  const context = new OffscreenCanvas(width, height).getContext('2d');
  context.drawImage(picture, 0, 0);
  const counts = new Map();
  const pixels = new Uint32Array(context.getImageData(0, 0, width, height).data.buffer);
  for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) || 0) + 1);
  return { width, height, colours: counts.size, share: Math.max(...counts.values()) / pixels.length };
}";

/// What is wrong with a page, in sentences; empty for a page that is fine.
fn faults(page: &mut Page, width: u32, dark: bool) -> Vec<String> {
    let found = page.evaluate(&format!("({PAGE_FAULTS})({width}, {dark})")).unwrap();
    let mut faults: Vec<String> =
        found["faults"].as_array().unwrap().iter().map(|fault| fault.as_str().unwrap().to_owned()).collect();
    let tree = page.accessibility_tree().unwrap();
    let mains = tree.iter().filter(|(role, _)| role == "main").count();
    if mains != 1 {
        faults.push(format!("{mains} main landmarks"));
    }
    let pictures: Vec<_> = tree.iter().filter(|(role, _)| role == "image" || role == "img").collect();
    let named = pictures.iter().filter(|(_, name)| !name.trim().is_empty()).count() as u64;
    if named != found["drawings"] {
        faults.push(format!("{named} named pictures for {} drawings: {pictures:?}", found["drawings"]));
    }
    faults
}

/// Writes a page of the test's own.
fn write(dir: &Path, html: &str) -> PathBuf {
    let path = dir.join("a page, 100 %.html");
    fs::write(&path, html).unwrap();
    path
}

#[test]
fn the_page_is_whole_legible_and_alone() {
    let Some(chromium) = Browser::find_or_skip() else { return };
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.html");
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let sensitivity = dir.path().join("sensitivity.json");
    let row = |at: usize| {
        let layer = format!("encoder.layer.{}.attention.self.query", at / 2);
        let vector = if at.is_multiple_of(2) { 1 } else { 32 };
        json!({ "layer": layer, "vector": vector, "weights": 1000, "drop": 0.01 * at as f64 - 0.005 })
    };
    let made_up = json!({
        "schema": "sparse24-sensitivity/1", "model": "model/minilm", "dense": 0.867, "linear_weights": 6000,
        "settings": { "method": "magnitude", "metric": "spearman" }, "rows": (0..12).map(row).collect::<Vec<_>>(),
    });
    fs::write(&sensitivity, made_up.to_string()).unwrap();
    let files = FILES.map(|file| results.join(file));
    command(["report"]).args(files).arg(sensitivity).arg("--out").arg(&report).run().exits(0);

    let pictures = std::env::var_os("SPARSE24_SCREENSHOTS").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    let pictures = Path::new(&pictures);
    fs::create_dir_all(pictures).unwrap();
    for (width, height) in SIZES {
        for (dark, scheme) in [(false, "light"), (true, "dark")] {
            let name = format!("report-{width}-{scheme}");
            let mut page = Browser::open(&chromium, &report, width, height, dark).unwrap();
            let png = page.screenshot(true).unwrap();
            fs::write(pictures.join(format!("{name}.png")), &png).unwrap();

            assert_eq!(faults(&mut page, width, dark), Vec::<String>::new(), "{name}");
            let text = page.evaluate("document.body.innerText").unwrap();
            for seen in SEEN {
                assert!(text.as_str().unwrap().contains(seen), "{name}: {seen} is not there");
            }
            let text: String = png.iter().map(|byte| char::from(*byte)).collect();
            let seen = page.evaluate(&format!("({PICTURE})({})", json!(text))).unwrap();
            // Less than the window's by a scroll bar; that it is not more is among the faults.
            let laid_out = page.evaluate("document.documentElement.clientWidth").unwrap();
            assert_eq!(seen["width"], laid_out, "{name}: {seen}");
            assert!(seen["height"].as_u64().unwrap() >= u64::from(height), "{name}: {seen}");
            assert!(seen["colours"].as_u64().unwrap() > 8, "{name}: {seen}");
            assert!(seen["share"].as_f64().unwrap() < 0.995, "{name}: {seen}");

            let pdf = page.pdf().unwrap();
            assert!(pdf.starts_with(b"%PDF-") && pdf.len() > 1000, "{name}: {} bytes", pdf.len());
            // Last, so that what the checks and the printing made the page do counts too.
            assert_eq!(page.requests, [page.url.as_str()], "{name}");
            assert_eq!(page.complaints, Vec::<String>::new(), "{name}");
        }
    }
}

#[test]
fn the_driver_sees_requests_complaints_and_exceptions() {
    let Some(chromium) = Browser::find_or_skip() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        dir.path(),
        "<!doctype html><script>console.log('fine'); console.error('x', 1)</script>\
         <img src='http://127.0.0.1:9/x.png'><script>throw new Error('y')</script>",
    );
    let mut page = Browser::open(&chromium, &path, 600, 400, true).unwrap();
    assert_eq!(page.requests, [page.url.as_str(), "http://127.0.0.1:9/x.png"]);
    assert!(page.url.ends_with("/a%20page%2C%20100%20%25.html"), "{}", page.url);
    let has = |start: &str| page.complaints.iter().any(|complaint| complaint.starts_with(start));
    assert!(has("error: x 1") && has("exception: Error: y") && has("network error: "), "{:?}", page.complaints);
    assert!(!page.complaints.iter().any(|complaint| complaint.contains("fine")), "{:?}", page.complaints);

    let size = page.evaluate("[innerWidth, innerHeight, matchMedia('(prefers-color-scheme: dark)').matches]").unwrap();
    assert_eq!(size, json!([600, 400, true]));
    assert_eq!(page.evaluate("Promise.resolve('é\\0')").unwrap(), "é\0");
    assert!(page.evaluate("null.z").unwrap_err().contains("TypeError"));
    assert!(page.evaluate("(").unwrap_err().contains("SyntaxError"));
}

/// A page with every fault, so that a check that finds nothing has been seen to find something.
#[test]
fn the_checks_find_faults() {
    let Some(chromium) = Browser::find_or_skip() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        dir.path(),
        "<!doctype html><meta name='viewport' content='width=device-width, initial-scale=1'>
         <body style='background: #333; color: #777'><h1>a</h1><h1>b</h1>faint
         <table style='width: 700px'><tr><td>in</td><td>wide</td></tr></table>
         <svg width='100' height='40' viewBox='0 0 400 160'><rect width='400' height='160' fill='#fff'/>
         <text x='10' y='90' font-size='20'>small</text><text x='300' y='40' font-size='60'>cut off</text>
         <text x='10' y='150' font-size='60' fill='#ccc'>pale</text></svg>",
    );
    let mut page = Browser::open(&chromium, &path, 390, 844, false).unwrap();
    let faults = faults(&mut page, 390, false);
    for wanted in [
        "no language",
        "no title",
        "not one h1",
        "overflows: ",
        "outside the window: <td> \"wide\"",
        "cut by its svg: <text> \"cut off\"",
        "text of 5.0 px: <text> \"small\"",
        "a background of luminance 0.03",
        "contrast of 2.82: <body>",
        "contrast of 1.61: <text> \"pale\"",
        "a drawing without role img",
        "0 main landmarks",
        "0 named pictures for 1 drawings",
    ] {
        assert!(faults.iter().any(|fault| fault.starts_with(wanted)), "{wanted}\n{faults:#?}");
    }

    // Without a viewport a phone lays a page out as a desktop would.
    let path = write(dir.path(), "<!doctype html><p>wide");
    let mut page = Browser::open(&chromium, &path, 390, 844, true).unwrap();
    let faults = self::faults(&mut page, 390, true);
    assert!(faults.iter().any(|fault| fault == "laid out 980 px wide"), "{faults:#?}");
    assert!(faults.iter().any(|fault| fault == "a background of luminance 1.00"), "{faults:#?}");
}

#[test]
fn what_does_not_start_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "<!doctype html>");
    let error = Browser::open(Path::new("/no/such/program"), &path, 600, 400, false).err().unwrap();
    assert!(error.contains("/no/such/program"), "{error}");
    // One that says nothing and ends.
    let error = Browser::open(Path::new("false"), &path, 600, 400, false).err().unwrap();
    assert!(error.starts_with("Target.createTarget: "), "{error}");
    let error = Browser::open(Path::new("false"), &dir.path().join("none"), 600, 400, false).err().unwrap();
    assert!(error.contains("none"), "{error}");
}
