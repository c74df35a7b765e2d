//! The library in a browser's worker: measures what [`sparse24::measure`] measures, on the GPU behind WebGPU, and makes
//! the page that `sparse24 report` makes; and runs a model of the visitor's on two texts.
//!
//! ```text
//!  static/page.js, model.js   what people see and press      the page's thread
//!      │  call.js             a call is a message, and its answer a promise
//!      ▼
//!  static/worker.js           one call of a session at a time   a worker
//!      ▼
//!  Session                    a device: products, ceilings, JSON     (this file)
//!  ModelFiles ─► model        a folder in memory: texts, similarity     model
//!  html, markdown             files of results as a page     sparse24::report
//! ```
//! Everything that waits is a promise, and the reference, which computes for seconds, runs in the worker, so that the
//! page's own thread stays free. WebAssembly that has panicked cannot be called again: the panic's text goes to the
//! page, which starts another worker. Invariant: a row that is handed out was verified before it was timed.

mod model;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sparse24::engine::{AdapterKind, DeviceInfo};
use sparse24::measure::{self, Case, Ceilings, PlannedBy, Policy, Record, Request};
use sparse24::models::LAYER_SHAPES;
use sparse24::report::file::File;
use sparse24::report::page::{Page, PageInput};
use sparse24::report::{Environment, Report, Skipped};
use sparse24::{DType, Device, Matrix, Op, Options, Problem, VectorLen};
use wasm_bindgen::prelude::*;

use crate::model::{Loaded, ModelFiles};

/// Seeds of weights and activations: a run measures the same numbers on every machine.
const SEEDS: [u64; 2] = [24, 42];

/// Samples as a browser's clock allows them: GPU timestamps are rounded to 0.1 ms there, so that of 40 ms is 0.25 %.
const POLICY: Policy = Policy {
    sample: Duration::from_millis(40),
    samples: 7,
    max_samples: 15,
    warm_up: Duration::from_millis(40),
    deadline: None,
};

/// Vector lengths of the 2:4 products.
const VECTORS: [usize; 3] = [1, 4, 32];

/// A first layer, with V = 32 alone and no mask, that is measured within seconds even where the processor plays the
/// GPU's part: there the two kernels take three seconds to compile.
const FIRST: Layer = Layer { name: "first look", m: 256, n: 32, k: 256, dtype: "f32" };
/// It gets no more samples where the machine is not quiet.
const FIRST_POLICY: Policy = Policy { max_samples: POLICY.samples, ..POLICY };

/// What the page knows of the browser that it is in.
#[derive(Deserialize)]
struct Place {
    browser: String,
    os: String,
    /// What the adapter is called, as far as the browser tells.
    gpu: String,
    /// The page's address.
    url: String,
}

impl Place {
    /// What measures again what was measured here.
    fn command(&self) -> String {
        format!("sparse24 web, then {}", self.url)
    }

    /// A run that starts now.
    fn environment(&self, device: &Device) -> Environment {
        let environment = Environment::new(device, &POLICY, SEEDS[0], self.command());
        environment.in_browser(self.browser.clone(), self.os.clone())
    }
}

/// One product to measure.
#[derive(Clone, Copy, Serialize)]
struct Layer {
    name: &'static str,
    m: usize,
    n: usize,
    k: usize,
    dtype: &'static str,
}

/// What a device is and offers, for people.
#[derive(Serialize)]
struct About {
    name: String,
    kind: &'static str,
    facts: Vec<(&'static str, String)>,
}

#[wasm_bindgen]
extern "C" {
    /// Tells the page that nothing here can be called any more: a function of `static/worker.js`.
    fn panicked(text: &str);
}

/// Makes a panic known to the page: a promise that panics is never kept.
#[wasm_bindgen(start)]
pub fn start() {
    std::panic::set_hook(Box::new(|info| panicked(&info.to_string())));
}

/// A device and what was measured on it.
#[wasm_bindgen]
pub struct Session {
    device: Device,
    place: Place,
    environment: Environment,
    /// What the present run measures.
    layers: Vec<Layer>,
    ceilings: Ceilings,
    rows: Vec<Record>,
    skipped: Vec<Skipped>,
    /// What the page was given, the last one last.
    models: Vec<Loaded>,
}

#[wasm_bindgen]
impl Session {
    /// Opens the browser's adapter. `place` is JSON.
    pub async fn open(place: String) -> Result<Session, JsError> {
        let place: Place = serde_json::from_str(&place)?;
        let device = Device::open_async("auto", Options::default()).await?.called(&place.gpu);
        if device.caps().is_none() {
            return Err(JsError::new("the browser gives its workers no GPU"));
        }
        let environment = place.environment(&device);
        let (layers, rows, skipped, models) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let ceilings = Ceilings::default();
        let session = Self { device, place, environment, layers, ceilings, rows, skipped, models };
        // The browser compiles them while its visitor reads. What goes wrong is said where they are measured.
        if let Ok(first) = session.requests(0, &FIRST) {
            let _ = first.iter().try_for_each(|request| session.device.compile(&request.plan));
        }
        Ok(session)
    }

    /// Begins a run of a set of layers, `small` or `large`, and forgets the one before. Returns the layers as JSON: the
    /// first is measured within seconds.
    pub fn begin(&mut self, set: &str) -> Result<String, JsError> {
        self.environment = self.place.environment(&self.device);
        self.layers = layers(set, self.device.caps().is_some_and(|caps| caps.f16));
        self.ceilings = Ceilings::default();
        self.rows.clear();
        self.skipped.clear();
        Ok(serde_json::to_string(&self.layers)?)
    }

    /// What the GPU is and what it offers, as JSON.
    pub fn about(&self) -> Result<String, JsError> {
        let info = self.device.info();
        let mut facts = Vec::new();
        if let Some(caps) = self.device.caps() {
            let yes = |has: bool| if has { "yes" } else { "no" }.to_owned();
            let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
            facts.push(("f16 arithmetic", yes(caps.f16)));
            facts.push(("GPU timestamps", yes(caps.timestamps)));
            let subgroups = caps.subgroups.map(|(low, high)| format!("{low} to {high} lanes"));
            facts.push(("subgroups", subgroups.unwrap_or_else(|| "no".into())));
            facts.push(("workgroup memory", format!("{} KiB", caps.workgroup_memory >> 10)));
            facts.push(("threads of a workgroup", caps.workgroup_threads.to_string()));
            facts.push(("largest binding", mib(caps.binding_bytes)));
        }
        let kind = if is_software(&self.device) { "software" } else { "GPU" };
        Ok(serde_json::to_string(&About { name: info.name().to_owned(), kind, facts })?)
    }

    /// Measures what the GPU can do at most.
    pub async fn measure_ceilings(&mut self) -> Result<(), JsError> {
        self.ceilings = measure::ceilings_async(&self.device, &POLICY).await?;
        Ok(())
    }

    /// Measures dense, 2:4 and masked products of a layer, by its number, each verified first, and returns its rows as
    /// JSON. `progress` is called with the share that is done.
    pub async fn measure(&mut self, number: usize, progress: js_sys::Function) -> Result<String, JsError> {
        let layer = self.layers.get(number).ok_or_else(|| JsError::new("the run has no such layer"))?;
        let Layer { name, m, n, k, .. } = *layer;
        let (dtype, requests) = (layer.dtype(), self.requests(number, layer)?);
        let (w, x) = (Matrix::uniform(m, k, dtype, SEEDS[0])?, Matrix::uniform(n, k, dtype, SEEDS[1])?);
        let case = Case { name: name.to_owned(), w, x };
        let policy = if number == 0 { FIRST_POLICY } else { POLICY };
        let steps = measure::steps(requests.len(), &policy) as f64;
        let told = |step: usize| {
            // A page that is gone needs no progress.
            let _ = progress.call1(&JsValue::NULL, &JsValue::from_f64(step as f64 / steps));
        };
        let mut rows = measure::run_async(&self.device, &case, &requests, &policy, SEEDS[0], told).await?;
        rows.iter_mut().for_each(|row| row.command = self.place.command());
        let json = serde_json::to_string(&rows)?;
        self.rows.extend(rows);
        Ok(json)
    }

    /// Notes that a layer could not be measured.
    pub fn skip(&mut self, name: String, reason: String) {
        self.skipped.push(Skipped { name, reason });
    }

    /// Reads a model's folder, or weights alone for the model that was read last, and returns what it is as JSON. It
    /// has the next number from 0.
    pub fn add_model(&mut self, files: ModelFiles) -> Result<String, JsError> {
        let loaded = Loaded::new(files, self.models.last()).map_err(|e| JsError::new(&e))?;
        let about = serde_json::to_string(&loaded.about())?;
        self.models.push(loaded);
        Ok(about)
    }

    /// Forgets a model, by its number: those after it have one less.
    pub fn remove_model(&mut self, number: usize) {
        if number < self.models.len() {
            self.models.remove(number);
        }
    }

    /// How similar two texts are to a model, by its number, and how long they take, in each of its forms: rows as JSON.
    /// `progress` is called with the share that is done.
    pub async fn compare(
        &self,
        number: usize,
        first: String,
        second: String,
        progress: js_sys::Function,
    ) -> Result<String, JsError> {
        let model = self.models.get(number).ok_or_else(|| JsError::new("there is no such model"))?;
        let told = |share: f64| {
            // A page that is gone needs no progress.
            let _ = progress.call1(&JsValue::NULL, &JsValue::from_f64(share));
        };
        let compared = model.compare(&self.device, [&first, &second], &POLICY, told).await;
        Ok(serde_json::to_string(&compared.map_err(|e| JsError::new(&e))?)?)
    }

    /// All that was measured, as the JSON of `sparse24 bench`.
    pub fn json(&self) -> Result<String, JsError> {
        let (rows, skipped) = (self.rows.clone(), self.skipped.clone());
        Ok(Report::new(self.environment.clone(), self.ceilings, rows, skipped).to_json()?)
    }
}

impl Session {
    /// What is measured of a layer, the first of a run or a later one.
    fn requests(&self, number: usize, layer: &Layer) -> sparse24::Result<Vec<Request>> {
        let Layer { m, n, k, .. } = *layer;
        let (vectors, masked) = if number == 0 { (&[32][..], None) } else { (&VECTORS[..], Some(Op::Masked)) };
        let vectors = VectorLen::ALL.into_iter().filter(|v| vectors.contains(&v.get())).map(Op::Sparse24);
        let request = |op| {
            let plan = self.device.plan(&Problem::linear(op, m, n, k, layer.dtype()))?;
            Ok(Request { op, plan, planned_by: PlannedBy::Planner })
        };
        std::iter::once(Op::Dense).chain(vectors).chain(masked).map(request).collect()
    }
}

impl Layer {
    fn dtype(&self) -> DType {
        if self.dtype == "f16" { DType::F16 } else { DType::F32 }
    }
}

/// The layers of a set, `small` or `large`, with or without such of f16.
fn layers(set: &str, f16: bool) -> Vec<Layer> {
    let of_model = |model: &'static str, n: usize, dtype| {
        let shapes = LAYER_SHAPES.iter().find(|(name, _)| *name == model).map_or(&[][..], |(_, shapes)| shapes);
        shapes.iter().map(move |&(name, m, k)| Layer { name, m, n, k, dtype })
    };
    let mut layers = vec![FIRST];
    if set == "large" {
        layers.extend(of_model("bert-base", 512, "f32"));
        layers.extend(of_model("bert-base", 512, "f16").filter(|_| f16));
        layers.push(Layer { name: "one token", m: 4096, n: 1, k: 4096, dtype: "f32" });
    } else {
        layers.extend(of_model("minilm", 128, "f32"));
        layers.push(Layer { name: "one token", m: 1536, n: 1, k: 384, dtype: "f32" });
    }
    layers
}

/// Whether the adapter computes on the processor.
fn is_software(device: &Device) -> bool {
    matches!(device.info(), DeviceInfo::Gpu(gpu) if gpu.kind == AdapterKind::Software)
}

/// A file by its name.
#[derive(Deserialize)]
struct Given {
    name: String,
    text: String,
}

/// The page of some files of results, given as JSON, each with its name and text.
fn page(files: &str) -> Result<Page, JsError> {
    let files: Vec<Given> = serde_json::from_str(files)?;
    let input = |Given { name, text }: Given| {
        let file = File::parse(&text).map_err(|e| JsError::new(&format!("{name}: {e}")))?;
        Ok(PageInput { name, machine: None, run: None, file })
    };
    let inputs: Vec<_> = files.into_iter().map(input).collect::<Result<_, JsError>>()?;
    Ok(Page::new(&inputs)?)
}

/// The page as HTML: the charts and tables of `sparse24 report`.
#[wasm_bindgen]
pub fn html(files: &str) -> Result<String, JsError> {
    Ok(page(files)?.html()?)
}

/// The page as Markdown.
#[wasm_bindgen]
pub fn markdown(files: &str) -> Result<String, JsError> {
    Ok(page(files)?.markdown_alone()?)
}
