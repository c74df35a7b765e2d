//! The page of `src/web` in a browser whose WebGPU runs on SwiftShader, served by `sparse24 web`: every row verified,
//! its file accepted by `sparse24 report`, nothing asked of any other server.
//!
//! `bash src/web/build.sh` makes the page, which needs Rust's wasm target. Skipped aloud where it was not made or where
//! there is no Chromium, unless SPARSE24_REQUIRE_WEB or SPARSE24_REQUIRE_CHROMIUM is 1.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says what it skips and saw")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/browser.rs"]
mod browser;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use binary::{command, sparse24};
use browser::{Browser, Page};
use serde_json::{Value, json};

const PAGE_FAULTS: &str = include_str!("common/page_faults.js");

/// SwiftShader takes seconds for a pipeline, and a test is not alone on its machine.
const PATIENCE: Duration = Duration::from_secs(600);

/// A desktop's window and a phone's.
const SIZES: [(u32, u32); 2] = [(1280, 800), (390, 844)];

/// The page's folder, if it was made.
fn folder_or_skip() -> Option<PathBuf> {
    let named = std::env::var_os("SPARSE24_WEB").filter(|name| !name.is_empty());
    let folder = named.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/web"), PathBuf::from);
    if folder.join("index.html").is_file() {
        return Some(folder);
    }
    let required = std::env::var("SPARSE24_REQUIRE_WEB").is_ok_and(|value| value == "1");
    assert!(!required, "the page is required: {} has none; bash src/web/build.sh makes it", folder.display());
    eprintln!("skipped: no page in {}", folder.display());
    None
}

/// `sparse24 web` on a port of its own, until this is dropped.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(folder: &Path) -> Self {
        let mut command = command(["web", "--port", "0"]);
        let mut child = command.arg(folder).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
        let url = said.split_whitespace().find(|word| word.starts_with("http://")).unwrap_or_else(|| panic!("{said}"));
        Self { url: url.to_owned(), child }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until an expression is true.
fn until(page: &mut Page, condition: &str) {
    let js = format!(
        "new Promise(done => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look(); }})"
    );
    page.evaluate(&js).unwrap_or_else(|e| panic!("{condition}: {e}\n{}", text_of(page)));
}

fn text_of(page: &mut Page) -> String {
    page.evaluate("document.body.innerText").unwrap().as_str().unwrap().to_owned()
}

fn faults(page: &mut Page, width: u32, dark: bool) -> Value {
    page.evaluate(&format!("({PAGE_FAULTS})({width}, {dark})")).unwrap()["faults"].take()
}

const OPENED: &str = "!document.getElementById('start').disabled";
const MEASURED: &str = "!document.getElementById('download').disabled";

/// The JSON that the page would download.
const DOWNLOADED: &str = "new Promise(done => {
  const make = URL.createObjectURL;
  URL.createObjectURL = blob => { blob.text().then(done); return make.call(URL, blob); };
  document.getElementById('download').click();
})";

/// Milliseconds from a click on the button to the first row.
const FIRST_ROW: &str = "new Promise(done => {
  const start = performance.now();
  const rows = document.getElementById('rows');
  new MutationObserver(() => done(performance.now() - start)).observe(rows, { childList: true });
  document.getElementById('start').click();
})";

/// What another machine measured.
fn other_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results/2026-11-25-peers/sparse24-threads1.json")
}

/// Adds a file as its input does.
fn add(page: &mut Page, name: &str, text: &str) {
    let js = format!(
        "(() => {{ const list = new DataTransfer(); list.items.add(new File([{}], {})); \
         const input = document.getElementById('files'); input.files = list.files; \
         input.dispatchEvent(new Event('change')); }})()",
        json!(text),
        json!(name)
    );
    page.evaluate(&js).unwrap();
}

#[test]
fn a_browser_measures_what_is_verified_and_report_reads_it() {
    let (Some(chromium), Some(folder)) = (Browser::find_or_skip(), folder_or_skip()) else { return };
    let server = Server::start(&folder);
    let pictures = std::env::var_os("SPARSE24_SCREENSHOTS").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    let pictures = Path::new(&pictures);
    fs::create_dir_all(pictures).unwrap();
    let mut page = Browser::open_url(&chromium, &server.url, true, SIZES[0], false).unwrap();
    page.patience = PATIENCE;
    page.evaluate(
        "window.tasks = []; new PerformanceObserver(list => list.getEntries().forEach(task => \
         tasks.push(task.duration))).observe({ type: 'longtask' }); null",
    )
    .unwrap();
    until(&mut page, OPENED);
    let first = page.evaluate(FIRST_ROW).unwrap().as_f64().unwrap();
    until(&mut page, MEASURED);
    let blocked = page.evaluate("Math.max(0, ...tasks)").unwrap();
    eprintln!("first row after {first:.0} ms; longest task of the page's thread: {blocked} ms");

    let file = pictures.join("sparse24-web.json");
    let text = page.evaluate(DOWNLOADED).unwrap().as_str().unwrap().to_owned();
    fs::write(&file, &text).unwrap();
    let run: Value = serde_json::from_str(&text).unwrap();
    let environment = &run["environment"];
    assert_eq!((&environment["program"], &environment["kind"]), (&json!("sparse24 web"), &json!("software")));
    assert!(environment["browser"].as_str().unwrap().contains("Chrom"), "{environment}");
    assert!(environment["device"].as_str().unwrap().to_lowercase().contains("swiftshader"), "{environment}");
    let rows = run["rows"].as_array().unwrap();
    assert!(rows.len() == 22 && run["skipped"] == json!([]), "{} rows, {}", rows.len(), run["skipped"]);
    for row in rows {
        assert!(row["verified"] == true && row["median_ms"].as_f64() > Some(0.0), "{row}");
    }
    for (op, vector) in [("dense", None), ("sparse24", Some(1)), ("sparse24", Some(32)), ("masked", None)] {
        assert!(rows.iter().any(|row| row["op"] == op && row["vector"] == json!(vector)), "no {op} {vector:?}");
    }
    let report = pictures.join("sparse24-web.html");
    sparse24(["report", file.to_str().unwrap(), "--out", report.to_str().unwrap()]).exits(0);
    assert!(fs::read_to_string(&report).unwrap().contains("sparse24 web 0."));

    // What the page shows of it, and of a machine beside it.
    add(&mut page, "other.json", &fs::read_to_string(other_file()).unwrap());
    let beside = "document.getElementById('page').contentDocument?.body?.innerText.includes('EPYC')";
    until(&mut page, beside);
    assert!(
        page.evaluate("document.getElementById('page').contentDocument.querySelector('svg') !== null").unwrap() == true
    );
    add(&mut page, "none.json", "{}");
    until(&mut page, "document.getElementById('said').textContent.includes('none.json')");
    // The same once more would spoil every report from then on.
    add(&mut page, "again.json", &fs::read_to_string(other_file()).unwrap());
    until(&mut page, "document.getElementById('said').textContent.includes('again.json')");
    assert_eq!(page.evaluate("document.getElementById('added').children.length").unwrap(), 1);

    for (width, height) in SIZES {
        for (dark, scheme) in [(false, "light"), (true, "dark")] {
            let name = format!("web-{width}-{scheme}");
            page.resize(width, height, dark).unwrap();
            assert_eq!(faults(&mut page, width, dark), json!([]), "{name}");
            fs::write(pictures.join(format!("{name}.png")), page.screenshot(true).unwrap()).unwrap();
        }
    }
    let unnamed: Vec<_> = page.accessibility_tree().unwrap();
    let unnamed: Vec<_> = unnamed
        .into_iter()
        .filter(|(role, name)| {
            ["button", "radio", "progressbar", "Iframe"].contains(&&**role) && name.trim().is_empty()
        })
        .collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
    let own = page.requests.iter().all(|request| {
        request.starts_with(&server.url) || ["data:", "blob:", "about:"].iter().any(|kind| request.starts_with(kind))
    });
    assert!(own, "{:?}", page.requests);
    assert_eq!(page.complaints, Vec::<String>::new());
}

/// Without WebGPU the page says so, and shows files all the same.
#[test]
fn an_old_browser_is_a_sentence() {
    let (Some(chromium), Some(folder)) = (Browser::find_or_skip(), folder_or_skip()) else { return };
    let server = Server::start(&folder);
    let mut page = Browser::open_url(&chromium, &server.url, false, SIZES[1], false).unwrap();
    page.patience = PATIENCE;
    until(&mut page, "document.getElementById('status').textContent.startsWith('Nothing can be measured here')");
    assert!(page.evaluate("document.getElementById('start').disabled").unwrap() == true);
    add(&mut page, "other.json", &fs::read_to_string(other_file()).unwrap());
    until(&mut page, "document.getElementById('page').contentDocument?.body?.innerText.includes('EPYC')");
    assert_eq!(faults(&mut page, SIZES[1].0, false), json!([]));
}

/// Nothing but the folder's own files is served.
#[test]
fn the_server_stays_in_its_folder() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("page");
    fs::create_dir(&folder).unwrap();
    fs::write(dir.path().join("secret.html"), "secret").unwrap();
    for (name, text) in [("index.html", "the page"), ("a.wasm", "\0asm"), (".hidden", "hidden")] {
        fs::write(folder.join(name), text).unwrap();
    }
    let server = Server::start(&folder);
    let address = server.url.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let ask = |method: &str, path: &str| {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let get = |path: &str| ask("GET", path);
    assert!(get("/").ends_with("the page") && get("/index.html?x=1").ends_with("the page"));
    assert!(get("/a.wasm").to_lowercase().contains("content-type: application/wasm"));
    let absolute = format!("/{}", dir.path().join("secret.html").display());
    for path in ["/../secret.html", "/%2e%2e/secret.html", &absolute, "/.hidden", "/missing.js", "/page/"] {
        let answer = get(path);
        assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
    }
    // What never ends is not begun.
    #[cfg(unix)]
    assert!(get("//dev/zero").starts_with("HTTP/1.1 404"));
    assert!(ask("POST", "/").starts_with("HTTP/1.1 404"));
    let head = ask("HEAD", "/");
    assert!(head.starts_with("HTTP/1.1 200") && !head.contains("the page"), "{head}");
    let missing = dir.path().join("nothing");
    let error = sparse24(["web", missing.to_str().unwrap()]).refused(1);
    assert!(error.contains("`bash src/web/build.sh` makes the page"), "{error}");
}
