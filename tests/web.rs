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
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use binary::{command, sparse24};
use browser::{Browser, Page};
use serde_json::{Value, json};
use sparse24::graph::{Batching, Sparsity};
use sparse24::text::{Encoder, Files, LoadOptions, TextModel};
use sparse24::{Device, VectorLen};
use tiny_bert::TinyBert;

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

/// Notes from now on how long the page's own thread was busy at a time.
const LONG_TASKS: &str = "window.tasks = []; new PerformanceObserver(list => list.getEntries().forEach(task => \
                          tasks.push(task.duration))).observe({ type: 'longtask' }); null";

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
    page.evaluate(LONG_TASKS).unwrap();
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
    if let Some(commit) = environment["commit"].as_str() {
        assert!(commit.trim_end_matches("-dirty").bytes().all(|c| c.is_ascii_hexdigit()), "{commit}");
    }
    let own = page.requests.iter().all(|request| {
        request.starts_with(&server.url) || ["data:", "blob:", "about:"].iter().any(|kind| request.starts_with(kind))
    });
    assert!(own, "{:?}", page.requests);
    assert_eq!(page.complaints, Vec::<String>::new());
}

/// Two texts of words that the tiny model knows, and one that it does not.
const TEXTS: [&str; 2] = ["The cat sat on the mat.", "A dog ran."];

/// How far the page's similarity may be from the native one: both are sums in f32, in other orders, and each embedding
/// is held to 5e-5 of its size.
const SIMILARITY_TOLERANCE: f64 = 2e-5;

/// The similarities of the texts by the library on the CPU: as the folder's weights are, and pruned at V = 1 and 32.
fn native(folder: &Path, texts: [&str; 2]) -> [f64; 3] {
    let sparsities = [1, 32].map(|v| Sparsity::TwoFour(VectorLen::new(v).unwrap()));
    [Sparsity::None, sparsities[0], sparsities[1]].map(|sparsity| {
        let mut model = TextModel::load(&Files::in_folder(folder), LoadOptions::default()).unwrap();
        model.checkpoint.prune(sparsity).unwrap();
        let ids = model.tokenizer.encode(&texts).unwrap().ids;
        let encoder = Encoder::new(&Device::cpu().unwrap(), &model.checkpoint, model.pipeline).unwrap();
        model.similarity.of_pairs(&encoder.embed(&ids, Batching::default()).unwrap())[0]
    })
}

/// A tiny model as Sentence Transformers keeps it: its pooling in a folder of its own.
fn tiny_folder(folder: &Path, seed: u64) {
    TinyBert::new(seed).write(folder);
    let module = |at: usize, name: &str, path: &str| {
        let class = format!("sentence_transformers.models.{name}");
        json!({"idx": at, "name": at.to_string(), "path": path, "type": class})
    };
    let modules =
        json!([module(0, "Transformer", ""), module(1, "Pooling", "1_Pooling"), module(2, "Normalize", "2_Normalize")]);
    fs::write(folder.join("modules.json"), modules.to_string()).unwrap();
    fs::create_dir_all(folder.join("1_Pooling")).unwrap();
    let pooling = json!({"word_embedding_dimension": 40, "pooling_mode_mean_tokens": true});
    fs::write(folder.join("1_Pooling/config.json"), pooling.to_string()).unwrap();
    // What the page is not to read: it would be megabytes.
    fs::create_dir_all(folder.join("onnx")).unwrap();
    fs::write(folder.join("onnx/config.json"), "no JSON").unwrap();
}

/// Drops a model, waits until the page has said what it makes of it, and returns that.
fn drop_model(page: &mut Page, path: &Path) -> String {
    page.evaluate("document.getElementById('model-said').textContent = ''; null").unwrap();
    page.drop_files(&[path]).unwrap();
    until(page, "/ is read|This is no model|no GPU/.test(document.getElementById('model-said').textContent)");
    page.evaluate("document.getElementById('model-said').textContent").unwrap().as_str().unwrap().to_owned()
}

/// Compares two texts, and returns the rows: model, form, similarity to all digits, and the other cells.
fn compare(page: &mut Page, texts: [&str; 2]) -> Vec<(String, String, f64, Vec<String>)> {
    let js = format!(
        "document.getElementById('model-said').textContent = ''; [document.getElementById('first').value, \
         document.getElementById('second').value] = {}; document.getElementById('compare').click(); null",
        json!(texts)
    );
    page.evaluate(&js).unwrap();
    until(page, "document.getElementById('model-said').textContent !== ''");
    let said = page.evaluate("document.getElementById('model-said').textContent").unwrap();
    assert_eq!(said, "Compared.");
    let js = "[...document.querySelectorAll('#model-rows tr')].map(row => \
              [Number(row.dataset.similarity), ...[...row.cells].map(cell => cell.textContent)])";
    let rows = page.evaluate(js).unwrap();
    let row = |row: &Value| {
        let cells: Vec<String> = row.as_array().unwrap()[1..].iter().map(|x| x.as_str().unwrap().to_owned()).collect();
        (cells[0].clone(), cells[1].clone(), row[0].as_f64().unwrap(), cells[2..].to_vec())
    };
    rows.as_array().unwrap().iter().map(row).collect()
}

/// Opens the page with a GPU.
fn opened(chromium: &Path, server: &Server) -> Page {
    let mut page = Browser::open_url(chromium, &server.url, true, SIZES[0], false).unwrap();
    page.patience = PATIENCE;
    until(&mut page, OPENED);
    page
}

#[test]
fn a_model_on_the_page_gives_the_similarities_that_it_gives_natively() {
    let (Some(chromium), Some(folder)) = (Browser::find_or_skip(), folder_or_skip()) else { return };
    let server = Server::start(&folder);
    let mut page = opened(&chromium, &server);
    page.evaluate(LONG_TASKS).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (dense, pruned) = (dir.path().join("tiny"), dir.path().join("tiny-pruned"));
    tiny_folder(&dense, 7);
    let prune = ["prune", dense.to_str().unwrap(), pruned.to_str().unwrap(), "--vector", "4"];
    sparse24(prune).exits(0);

    assert_eq!(drop_model(&mut page, &dense), "tiny is read.");
    let expected = native(&dense, TEXTS);
    let rows = compare(&mut page, TEXTS);
    let forms: Vec<_> = rows.iter().map(|(model, form, ..)| (&**model, &**form)).collect();
    let dense_forms = [("tiny", "dense"), ("tiny", "2:4, V = 1, by magnitude"), ("tiny", "2:4, V = 32, by magnitude")];
    assert_eq!(forms, dense_forms);
    for ((_, form, similarity, cells), expected) in rows.iter().zip(expected) {
        assert!((similarity - expected).abs() < SIMILARITY_TOLERANCE, "{form}: {similarity}, natively {expected}");
        assert_eq!((&cells[0], &*cells[3]), (&format!("{expected:.4}"), "yes"), "{form}: {cells:?}");
        assert!(cells[1].trim_start_matches('~').parse::<f64>().is_ok_and(|ms| ms > 0.0), "{form}: {cells:?}");
        assert!(cells[2].ends_with('x'), "{form}: {cells:?}");
    }
    // The forms are told apart by more than the tolerance, or the comparison would say nothing.
    let apart = |a: usize, b: usize| (expected[a] - expected[b]).abs() > 100.0 * SIMILARITY_TOLERANCE;
    assert!(apart(0, 1) && apart(1, 2) && apart(0, 2), "{expected:?}");

    // What is pruned stays as it is, beside the model that it was made of; and weights alone go into that folder.
    assert_eq!(drop_model(&mut page, &pruned), "tiny-pruned is read.");
    assert_eq!(drop_model(&mut page, &pruned.join("model.safetensors")), "model.safetensors is read.");
    let listed = page.evaluate("document.getElementById('models').textContent").unwrap();
    let listed = listed.as_str().unwrap();
    let said = "tiny-pruned: linear layers 2:4, V = 4; pruned magnitude V=4";
    assert!(listed.contains("tiny: linear layers dense") && listed.contains(said), "{listed}");
    let rows = compare(&mut page, TEXTS);
    let forms: Vec<_> = rows.iter().map(|(model, form, ..)| (&**model, &**form)).collect();
    let more = ["tiny-pruned", "model.safetensors"]
        .iter()
        .flat_map(|model| [(*model, "dense, with the same zeros"), (*model, "2:4, V = 4")]);
    assert_eq!(forms, dense_forms.into_iter().chain(more).collect::<Vec<_>>());
    let [expected, ..] = native(&pruned, TEXTS);
    for (model, form, similarity, _) in &rows[3..] {
        assert!((similarity - expected).abs() < SIMILARITY_TOLERANCE, "{model}, {form}: {similarity}, not {expected}");
    }

    let remove = "document.querySelector('#models button[aria-label=\"Remove tiny\"]').click(); null";
    page.evaluate(remove).unwrap();
    let rows = compare(&mut page, [TEXTS[0], TEXTS[0]]);
    assert_eq!(rows.len(), 4);
    assert!(rows.iter().all(|(_, _, similarity, _)| (similarity - 1.0).abs() < 1e-6), "{rows:?}");
    let blocked = page.evaluate("Math.max(0, ...tasks)").unwrap();
    eprintln!("longest task of the page's thread: {blocked} ms");
    for (width, height) in SIZES {
        page.resize(width, height, false).unwrap();
        assert_eq!(faults(&mut page, width, false), json!([]));
    }
    assert_eq!(page.complaints, Vec::<String>::new());
}

/// What is dropped and cannot be run gets a sentence that says what is wrong, and the page goes on.
#[test]
fn what_is_no_model_is_a_sentence() {
    let (Some(chromium), Some(folder)) = (Browser::find_or_skip(), folder_or_skip()) else { return };
    let server = Server::start(&folder);
    let mut page = opened(&chromium, &server);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let spoilt = |name: &str, spoil: &dyn Fn(&mut TinyBert)| {
        let mut tiny = TinyBert::new(3);
        spoil(&mut tiny);
        tiny.write(&at(name));
        at(name)
    };
    let whole = spoilt("whole", &|_| {});
    let without = |name: &str, file: &str| {
        let folder = spoilt(name, &|_| {});
        fs::remove_file(folder.join(file)).unwrap();
        folder
    };
    let two = at("two");
    for name in ["one", "other"] {
        TinyBert::new(3).write(&two.join(name));
    }
    let cut = spoilt("cut", &|_| {});
    let weights = fs::read(cut.join("model.safetensors")).unwrap();
    fs::write(cut.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    fs::create_dir(at("empty")).unwrap();
    let cases = [
        (
            whole.join("model.safetensors"),
            "model.safetensors has weights alone: choose the folder of their model first",
        ),
        (at("empty"), "there is no config.json"),
        (without("no-config", "config.json"), "there is no config.json"),
        (without("no-tokenizer", "tokenizer.json"), "there is no no-tokenizer/tokenizer.json"),
        (without("no-weights", "model.safetensors"), "there is no no-weights/model.safetensors"),
        (two, "two/one and two/other are two models: choose one at a time"),
        (spoilt("gpt2", &|tiny| tiny.config["model_type"] = json!("gpt2")), "model_type is \"gpt2\", expected bert"),
        (spoilt("text", &|tiny| tiny.config = json!("a text")), "config.json: "),
        (spoilt("words", &|tiny| tiny.tokenizer = json!({})), "words/tokenizer.json: "),
        (spoilt("lacking", &|tiny| drop(tiny.tensors.remove("encoder.layer.1.output.dense.weight"))), "is missing"),
        (spoilt("nan", &|tiny| *tiny.first("encoder.layer.0.output.dense.weight") = f32::NAN), "NaN"),
        (cut, "cut/model.safetensors"),
    ];
    for (path, reason) in cases {
        let said = drop_model(&mut page, &path);
        assert!(said.starts_with("This is no model that can be run here: ") && said.contains(reason), "{said}");
        assert!(said.ends_with('.') && !said.contains(".."), "{said}");
    }
    assert_eq!(drop_model(&mut page, &whole), "whole is read.");
    assert_eq!(compare(&mut page, TEXTS).len(), 3);
    assert_eq!(page.complaints, Vec::<String>::new());
}

/// MiniLM itself, where it is at hand.
#[test]
fn minilm_on_the_page_is_minilm() {
    let minilm = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/minilm");
    if !minilm.join("model.safetensors").is_file() {
        eprintln!("skipped: no {}", minilm.display());
        return;
    }
    let (Some(chromium), Some(folder)) = (Browser::find_or_skip(), folder_or_skip()) else { return };
    let server = Server::start(&folder);
    let mut page = opened(&chromium, &server);
    page.evaluate(LONG_TASKS).unwrap();
    assert_eq!(drop_model(&mut page, &minilm), "minilm is read.");
    let texts = ["The cat sat on the mat.", "A kitten was lying on the rug."];
    let rows = compare(&mut page, texts);
    for ((_, form, similarity, cells), expected) in rows.iter().zip(native(&minilm, texts)) {
        eprintln!("{form}: {similarity}, natively {expected}; {cells:?}");
        assert!((similarity - expected).abs() < SIMILARITY_TOLERANCE, "{form}: {similarity}, natively {expected}");
        assert_eq!(cells[3], "yes", "{form}");
    }
    let blocked = page.evaluate("Math.max(0, ...tasks)").unwrap();
    eprintln!("longest task of the page's thread: {blocked} ms");
    let pictures = std::env::var_os("SPARSE24_SCREENSHOTS").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    fs::create_dir_all(&pictures).unwrap();
    for (width, height) in SIZES {
        page.resize(width, height, width < 500).unwrap();
        let picture = Path::new(&pictures).join(format!("web-model-{width}.png"));
        fs::write(picture, page.screenshot(true).unwrap()).unwrap();
    }
}

/// A program that fails, at once or in the middle of a promise, is replaced: the page says so and measures again.
#[test]
fn a_worker_that_fails_is_replaced() {
    let (Some(chromium), Some(folder)) = (Browser::find_or_skip(), folder_or_skip()) else { return };
    // The page with a worker whose calls can be made to fail as WebAssembly does: it runs into `unreachable`.
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&folder).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let worker = fs::read_to_string(dir.path().join("worker.js")).unwrap();
    let trap = "const trap = () => new WebAssembly.Instance(new WebAssembly.Module(Uint8Array.of(0, 97, 115, 109, 1, 0,
        0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 7, 5, 1, 1, 116, 0, 0, 10, 5, 1, 3, 0, 0, 11))).exports.t();
        const later = () => new Promise(() => setTimeout(() => { self.panicked('a panic'); trap(); }));
        ";
    let begin = "begin: (set) => JSON.parse(session.begin(set)),";
    let add = "async addModel(files) {";
    assert!(worker.contains(begin) && worker.contains(add));
    let failing = worker
        .replace("const ofSession = {", &format!("{trap}const ofSession = {{"))
        .replace(begin, "begin: (set) => (set === \"large\" ? trap() : JSON.parse(session.begin(set))),")
        .replace(add, "async addModel(files) { await later();");
    fs::write(dir.path().join("worker.js"), failing).unwrap();
    let server = Server::start(dir.path());
    let mut page = opened(&chromium, &server);

    page.evaluate("document.querySelector('input[value=large]').click(); document.getElementById('start').click()")
        .unwrap();
    until(&mut page, "document.getElementById('said').textContent.startsWith('Stopped: ')");
    let said = page.evaluate("document.getElementById('said').textContent").unwrap();
    let expected = "Stopped: the program of this page failed (unreachable) and was started anew.";
    assert_eq!(said, expected);
    until(&mut page, "document.getElementById('status').textContent.includes('There was an error')");
    until(&mut page, OPENED);

    let models = tempfile::tempdir().unwrap();
    let model = models.path().join("tiny");
    TinyBert::new(3).write(&model);
    let said = drop_model(&mut page, &model);
    assert!(said.contains("failed (a panic) and was started anew"), "{said}");
    until(&mut page, OPENED);

    // And it measures.
    page.evaluate("document.querySelector('input[value=small]').click(); null").unwrap();
    page.evaluate(FIRST_ROW).unwrap();
    assert!(page.evaluate("document.getElementById('rows').textContent.includes('yes')").unwrap() == true);
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
