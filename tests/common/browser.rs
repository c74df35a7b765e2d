//! A headless Chromium for tests, driven over the DevTools protocol through a pipe: opens a file, says what the page
//! asked for and complained about, runs JavaScript in it, and returns pictures of it.
#![allow(dead_code, unreachable_pub, reason = "each test file that includes this uses its own part")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long one answer, or the page's load, may take, unless [`Page::patience`] says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long Chromium may take to leave by itself before it is killed.
const FAREWELL: Duration = Duration::from_secs(5);

/// Chromium reads commands on descriptor 3 and answers on 4; a child of std's has only 0 to 2.
const PIPE: &str = r#"exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>/dev/null"#;

/// Without a sandbox, since Chromium refuses one to root and containers lack it: pages are the tests' own. The rest
/// keeps it from asking the network or the desktop anything, and from `/dev/shm`, which is small in containers.
const FLAGS: &[&str] = &[
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-pings",
    "--password-store=basic",
    "--use-mock-keychain",
    "--force-color-profile=srgb",
    "about:blank",
];

/// What a page that is only looked at needs, and what WebGPU needs: SwiftShader, which no blocklist turns away.
const LOOKED_AT: &[&str] = &["--disable-gpu"];
const WEBGPU: &[&str] = &["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

/// Finds and starts Chromium.
pub struct Browser;

impl Browser {
    /// The program SPARSE24_CHROMIUM names, whether it is there or not, else the first on PATH. `None` on Windows,
    /// whose processes do not inherit descriptors 3 and 4.
    pub fn find() -> Option<PathBuf> {
        if cfg!(windows) {
            return None;
        }
        if let Some(named) = std::env::var_os("SPARSE24_CHROMIUM").filter(|name| !name.is_empty()) {
            return Some(named.into());
        }
        let path = std::env::var_os("PATH")?;
        let names = ["chromium", "chromium-browser", "google-chrome", "chrome"];
        names.iter().find_map(|name| std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()))
    }

    /// [`Browser::find`] for a test, which says that it is skipped without one, or fails if `SPARSE24_REQUIRE_CHROMIUM`
    /// is 1.
    pub fn find_or_skip() -> Option<PathBuf> {
        let found = Self::find();
        if found.is_none() {
            let required = std::env::var("SPARSE24_REQUIRE_CHROMIUM").is_ok_and(|value| value == "1");
            assert!(!required, "Chromium is required: none on PATH, and SPARSE24_CHROMIUM does not name one");
            eprintln!("skipped: no Chromium");
        }
        found
    }

    /// Opens a file in a browser of its own, in a window of that size (a phone's below 500 pixels) and a light or dark
    /// colour scheme. Returns once the page is loaded and drawn.
    pub fn open(program: &Path, page: &Path, width: u32, height: u32, dark: bool) -> Result<Page, String> {
        Self::open_with(LOOKED_AT, program, page, (width, height), dark)
    }

    /// Opens a file in a browser whose WebGPU runs on SwiftShader.
    pub fn open_webgpu(program: &Path, page: &Path) -> Result<Page, String> {
        Self::open_with(WEBGPU, program, page, (1280, 800), false)
    }

    /// Opens a page that is served, in a browser whose WebGPU runs on SwiftShader, or in one that has none.
    pub fn open_url(program: &Path, url: &str, webgpu: bool, size: (u32, u32), dark: bool) -> Result<Page, String> {
        Self::open_at(if webgpu { WEBGPU } else { LOOKED_AT }, program, url.to_owned(), size, dark)
    }

    fn open_with(flags: &[&str], program: &Path, page: &Path, size: (u32, u32), dark: bool) -> Result<Page, String> {
        let file = page.canonicalize().map_err(|e| format!("{}: {e}", page.display()))?;
        Self::open_at(flags, program, file_url(&file)?, size, dark)
    }

    fn open_at(
        flags: &[&str],
        program: &Path,
        url: String,
        (width, height): (u32, u32),
        dark: bool,
    ) -> Result<Page, String> {
        let mut page = Page::start(program, flags, url)?;
        page.load(width, height, dark).map_err(|e| format!("{e}{}", page.last_words()))?;
        Ok(page)
    }
}

/// A loaded page, whose browser ends when this is dropped.
pub struct Page {
    /// The page's own address.
    pub url: String,
    /// Every URL the page and its frames requested, its own included, in order, up to the last call's answer.
    pub requests: Vec<String>,
    /// Warnings and errors of the console, exceptions nobody caught, and what the browser logged about the page.
    pub complaints: Vec<String>,
    /// How long an answer may take.
    pub patience: Duration,
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    last_id: u64,
    session: Option<String>,
    /// The loader of each document whose load event came.
    loaded: Vec<String>,
    crashed: bool,
    /// The profile and what Chromium wrote to stderr; removed after the browser has ended.
    dir: TempDir,
}

impl Page {
    /// Runs JavaScript and returns its value as JSON; that of a promise once it is fulfilled.
    pub fn evaluate(&mut self, js: &str) -> Result<Value, String> {
        let params = json!({ "expression": js, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", params)?;
        match answer.get("exceptionDetails") {
            Some(details) => Err(exception(details)),
            None => Ok(answer["result"]["value"].take()),
        }
    }

    /// Drops files and folders onto the page, as a visitor drags them there.
    pub fn drop_files(&mut self, paths: &[&Path]) -> Result<(), String> {
        let paths: Vec<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
        let data = json!({ "items": [], "files": paths, "dragOperationsMask": 1 });
        for kind in ["dragEnter", "dragOver", "drop"] {
            self.call("Input.dispatchDragEvent", json!({ "type": kind, "x": 100, "y": 100, "data": data }))?;
        }
        Ok(())
    }

    /// A PNG of the window, or of the whole page.
    pub fn screenshot(&mut self, full_page: bool) -> Result<Vec<u8>, String> {
        let mut params = json!({ "format": "png" });
        if full_page {
            let size = self.call("Page.getLayoutMetrics", json!({}))?["cssContentSize"].take();
            let (width, height) = (&size["width"], &size["height"]);
            params["clip"] = json!({ "x": 0, "y": 0, "width": width, "height": height, "scale": 1 });
            params["captureBeyondViewport"] = json!(true);
        }
        let answer = self.call("Page.captureScreenshot", params)?;
        base64(answer["data"].as_str().ok_or("a screenshot without data")?)
    }

    /// The page as it is printed, as a PDF.
    pub fn pdf(&mut self) -> Result<Vec<u8>, String> {
        let answer = self.call("Page.printToPDF", json!({ "printBackground": true }))?;
        base64(answer["data"].as_str().ok_or("a PDF without data")?)
    }

    /// Role and name of everything the page shows to assistive technology, in the order of the tree's nodes. Roles are
    /// Chromium's: `role="img"` is "image".
    pub fn accessibility_tree(&mut self) -> Result<Vec<(String, String)>, String> {
        let answer = self.call("Accessibility.getFullAXTree", json!({}))?;
        let nodes = answer["nodes"].as_array().ok_or("an accessibility tree without nodes")?;
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        let exposed = nodes.iter().filter(|node| node["ignored"] != true);
        Ok(exposed.map(|node| (text(&node["role"]), text(&node["name"]))).collect())
    }

    fn start(program: &Path, flags: &[&str], url: String) -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("cannot start {}: {e}", program.display());
        let dir = tempfile::tempdir().map_err(failed)?;
        let mut profile = std::ffi::OsString::from("--user-data-dir=");
        profile.push(dir.path().join("profile"));
        let mut command = Command::new("sh");
        command.args(["-c", PIPE]).arg(program).arg(profile).args(flags).args(FLAGS);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(dir.path().join("stderr")).map_err(failed)?);
        let mut child = command.spawn().map_err(failed)?;
        let (Some(commands), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a child without pipes".into());
        };
        // A thread, since a pipe of std's cannot be read with a timeout. It ends with the browser.
        let (sender, messages) = mpsc::channel();
        std::thread::spawn(move || {
            for message in BufReader::new(answers).split(0) {
                let message = message.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
                if message.is_none_or(|message| sender.send(message).is_err()) {
                    break;
                }
            }
        });
        Ok(Self {
            url,
            requests: Vec::new(),
            complaints: Vec::new(),
            patience: PATIENCE,
            child,
            commands,
            messages,
            last_id: 0,
            session: None,
            loaded: Vec::new(),
            crashed: false,
            dir,
        })
    }

    fn load(&mut self, width: u32, height: u32, dark: bool) -> Result<(), String> {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }))?["targetId"].take();
        let attached = self.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }))?;
        self.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Network", "Log", "Runtime", "Page", "Inspector"] {
            self.call(&format!("{domain}.enable"), json!({}))?;
        }
        self.call("Page.setLifecycleEventsEnabled", json!({ "enabled": true }))?;
        self.resize(width, height, dark)?;

        let going = self.call("Page.navigate", json!({ "url": self.url }))?;
        if let Some(error) = going["errorText"].as_str() {
            return Err(format!("{}: {error}", self.url));
        }
        // By its loader: `Page.loadEventFired` might be that of the blank page.
        let loader = going["loaderId"].as_str().unwrap_or_default();
        let deadline = Instant::now() + self.patience;
        while !self.loaded.iter().any(|l| l == loader) {
            self.receive(deadline, "the load event")?;
        }
        // Two frames: the first may have been under way before the last change.
        let frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))";
        self.evaluate(frames).map(|_| ())
    }

    /// Gives the window another size, a phone's below 500 pixels, and a light or dark colour scheme.
    pub fn resize(&mut self, width: u32, height: u32, dark: bool) -> Result<(), String> {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let scheme = json!({ "name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" } });
        self.call("Emulation.setEmulatedMedia", json!({ "features": [scheme] })).map(|_| ())
    }

    /// What a command answers; events that come before it are kept.
    fn call(&mut self, method: &str, params: Value) -> Result<Value, String> {
        self.send(method, params)?;
        let deadline = Instant::now() + self.patience;
        loop {
            let mut message = self.receive(deadline, method)?;
            if message["id"] != self.last_id {
                continue;
            }
            return match message.get("error") {
                Some(error) => Err(format!("{method}: {error}")),
                None => Ok(message["result"].take()),
            };
        }
    }

    fn send(&mut self, method: &str, params: Value) -> Result<(), String> {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.commands.write_all(format!("{message}\0").as_bytes()).map_err(|e| format!("{method}: {e}"))
    }

    /// The next message, its event noted.
    fn receive(&mut self, deadline: Instant, what: &str) -> Result<Value, String> {
        let left = deadline.saturating_duration_since(Instant::now());
        let message = self.messages.recv_timeout(left).map_err(|e| match e {
            RecvTimeoutError::Timeout => format!("{what}: nothing for {} s", self.patience.as_secs()),
            RecvTimeoutError::Disconnected => format!("{what}: Chromium ended"),
        })?;
        self.note(&message);
        if self.crashed { Err(format!("{what}: the page crashed")) } else { Ok(message) }
    }

    fn note(&mut self, message: &Value) {
        let params = &message["params"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match message["method"].as_str().unwrap_or_default() {
            "Network.requestWillBeSent" => self.requests.push(text(&params["request"]["url"])),
            "Runtime.consoleAPICalled" => {
                let kind = text(&params["type"]);
                if ["warning", "error", "assert"].contains(&kind.as_str()) {
                    let shown = |arg: &Value| match arg.get("value").or(arg.get("description")) {
                        Some(Value::String(text)) => text.clone(),
                        Some(value) => value.to_string(),
                        None => text(&arg["type"]),
                    };
                    let shown: Vec<_> = params["args"].as_array().into_iter().flatten().map(shown).collect();
                    self.complaints.push(format!("{kind}: {}", shown.join(" ")));
                }
            }
            "Runtime.exceptionThrown" => self.complaints.push(exception(&params["exceptionDetails"])),
            "Log.entryAdded" => {
                let entry = &params["entry"];
                let (source, level) = (text(&entry["source"]), text(&entry["level"]));
                self.complaints.push(format!("{source} {level}: {} {}", text(&entry["text"]), text(&entry["url"])));
            }
            "Page.lifecycleEvent" if params["name"] == "load" => self.loaded.push(text(&params["loaderId"])),
            "Inspector.targetCrashed" => self.crashed = true,
            _ => {}
        }
    }

    /// The end of what Chromium wrote to stderr, but for its complaints of a missing desktop bus, which mean nothing.
    fn last_words(&self) -> String {
        let bytes = fs::read(self.dir.path().join("stderr")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().filter(|line| !line.contains("dbus/")).collect();
        lines[lines.len().saturating_sub(10)..].iter().map(|line| format!("\n  {line}")).collect()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // Asked first: killed, its helpers outlive it for a moment and may write to the profile while it is removed.
        self.session = None;
        let asked = self.send("Browser.close", json!({}));
        let deadline = Instant::now() + if asked.is_ok() { FAREWELL } else { Duration::ZERO };
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn exception(details: &Value) -> String {
    let text = details["exception"]["description"].as_str().or(details["text"].as_str());
    format!("exception: {}", text.unwrap_or_default())
}

/// `file:` URL of an absolute path, escaped as Chromium does, so that it equals the request's.
fn file_url(path: &Path) -> Result<String, String> {
    let path = path.to_str().ok_or_else(|| format!("{}: not UTF-8", path.display()))?;
    let escaped = path.bytes().map(|byte| match byte {
        b'/' | b'-' | b'_' | b'.' | b'~' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    });
    Ok(format!("file://{}", escaped.collect::<String>()))
}

/// Standard Base64, padded.
fn base64(text: &str) -> Result<Vec<u8>, String> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut values = [None; 256];
    for (value, letter) in (0..).zip(ALPHABET) {
        values[usize::from(*letter)] = Some(value);
    }
    let (mut bytes, mut bits, mut count) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for letter in text.trim_end_matches('=').bytes() {
        let value: u32 = values[usize::from(letter)].ok_or("not Base64")?;
        bits = bits << 6 | value;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Ok(bytes)
}
