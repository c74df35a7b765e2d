//! The library in a browser's worker: measures what [`sparse24::measure`] measures, on the GPU behind WebGPU, and makes
//! the page that `sparse24 report` makes.
//!
//! `static/worker.js` calls this, and `static/page.js` shows what comes back. Everything that waits is a promise, and
//! the reference, which computes for seconds, runs in the worker, so that the page's own thread stays free. Invariant:
//! a row that is handed out was verified before it was timed.

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
/// GPU's part.
const FIRST: Layer = Layer { name: "first look", m: 256, n: 64, k: 256, dtype: "f32" };

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

/// Names the panic's place in the console.
#[wasm_bindgen(start)]
pub fn start() {
    console_error_panic_hook::set_once();
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
        let (layers, ceilings) = (Vec::new(), Ceilings::default());
        Ok(Self { device, place, environment, layers, ceilings, rows: Vec::new(), skipped: Vec::new() })
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
        let Layer { name, m, n, k, dtype } = *layer;
        let dtype = if dtype == "f16" { DType::F16 } else { DType::F32 };
        let (vectors, masked) = if number == 0 { (&[32][..], None) } else { (&VECTORS[..], Some(Op::Masked)) };
        let vectors = VectorLen::ALL.into_iter().filter(|v| vectors.contains(&v.get())).map(Op::Sparse24);
        let mut requests = Vec::new();
        for op in std::iter::once(Op::Dense).chain(vectors).chain(masked) {
            let plan = self.device.plan(&Problem::linear(op, m, n, k, dtype))?;
            requests.push(Request { op, plan, planned_by: PlannedBy::Planner });
        }
        let (w, x) = (Matrix::uniform(m, k, dtype, SEEDS[0])?, Matrix::uniform(n, k, dtype, SEEDS[1])?);
        let case = Case { name: name.to_owned(), w, x };
        let steps = measure::steps(requests.len(), &POLICY) as f64;
        let told = |step: usize| {
            // A page that is gone needs no progress.
            let _ = progress.call1(&JsValue::NULL, &JsValue::from_f64(step as f64 / steps));
        };
        let mut rows = measure::run_async(&self.device, &case, &requests, &POLICY, SEEDS[0], told).await?;
        rows.iter_mut().for_each(|row| row.command = self.place.command());
        let json = serde_json::to_string(&rows)?;
        self.rows.extend(rows);
        Ok(json)
    }

    /// Notes that a layer could not be measured.
    pub fn skip(&mut self, name: String, reason: String) {
        self.skipped.push(Skipped { name, reason });
    }

    /// All that was measured, as the JSON of `sparse24 bench`.
    pub fn json(&self) -> Result<String, JsError> {
        let (rows, skipped) = (self.rows.clone(), self.skipped.clone());
        Ok(Report::new(self.environment.clone(), self.ceilings, rows, skipped).to_json()?)
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
