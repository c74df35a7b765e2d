//! Models of texts: encoders and language models.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::Instant;

use numpy::{PyArray1, PyArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use sparse24::graph::{Batching, Sparsity};
use sparse24::text::{
    self, ChatTemplate, Files, Finish, GenerateOptions, LanguageModel, LoadOptions, Message, Sampling, Similarity,
    TextModel, Tokenizer,
};

use crate::arrays::dtype as dtype_of;
use crate::device::Device;
use crate::errors::to_py;
use crate::process::{self, Owned, PATIENCE, interruptible};

/// Texts that are made tokens of and embedded together: enough for batches of one length, few enough for any number of
/// texts.
const WINDOW: usize = 4096;

/// A model's folder.
fn files(folder: &str) -> PyResult<Files> {
    match std::path::Path::new(folder).is_dir() {
        true => Ok(Files::in_folder(folder)),
        false => Err(pyo3::exceptions::PyFileNotFoundError::new_err(format!("there is no folder {folder}"))),
    }
}

/// Asks Python now and then whether the user wants to stop.
struct Signals {
    last: Instant,
    raised: Option<PyErr>,
}

impl Signals {
    fn new() -> Self {
        Self { last: Instant::now(), raised: None }
    }

    /// Ends what is going on if there is a reason.
    fn look(&mut self) -> ControlFlow<()> {
        if self.last.elapsed() < PATIENCE {
            return ControlFlow::Continue(());
        }
        let looked = Python::attach(|py| py.check_signals());
        self.last = Instant::now();
        self.keep(looked)
    }

    fn keep(&mut self, result: PyResult<()>) -> ControlFlow<()> {
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                self.raised = Some(e);
                ControlFlow::Break(())
            }
        }
    }
}

/// A model that makes embeddings of texts.
#[pyclass(module = "sparse24", frozen)]
pub(crate) struct Encoder {
    device: Py<Device>,
    encoder: Owned<text::Encoder>,
    tokenizer: Tokenizer,
    prompt: Option<String>,
    similarity: Similarity,
}

#[pymethods]
impl Encoder {
    #[new]
    fn new(
        py: Python<'_>,
        folder: &str,
        sparsity: &str,
        device: Py<Device>,
        dtype: &str,
        weights: Option<String>,
        prompt: Option<String>,
    ) -> PyResult<Self> {
        let sparsity: Sparsity = sparsity.parse().map_err(to_py)?;
        let (files, dtype) = (files(folder)?, dtype_of(dtype)?);
        let on = device.get().device.clone();
        let loaded = interruptible(py, move || {
            let options =
                LoadOptions { dtype, weights: weights.as_deref().map(|w| w.as_ref()), prompt: prompt.as_deref() };
            let TextModel { tokenizer, mut checkpoint, pipeline, prompt, similarity } =
                TextModel::load(&files, options)?;
            checkpoint.prune(sparsity)?;
            Ok((text::Encoder::new(&on, &checkpoint, pipeline)?, tokenizer, prompt, similarity))
        })?;
        let (encoder, tokenizer, prompt, similarity) = loaded;
        Ok(Self { device, encoder: Owned::new(encoder), tokenizer, prompt, similarity })
    }

    /// Features of an embedding.
    #[getter]
    fn width(&self) -> usize {
        self.encoder.width()
    }

    /// Tokens of a text, at most.
    #[getter]
    fn max_tokens(&self) -> usize {
        self.tokenizer.max_tokens()
    }

    /// What is put in front of every text.
    #[getter]
    fn prompt(&self) -> Option<&str> {
        self.prompt.as_deref()
    }

    /// How embeddings are compared.
    #[getter]
    fn similarity(&self) -> &'static str {
        self.similarity.name()
    }

    /// The embeddings of texts, one a row, and how many texts were cut off.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyList>,
        batch: usize,
    ) -> PyResult<(Bound<'py, PyAny>, usize)> {
        process::enter()?;
        if batch == 0 {
            return Err(PyValueError::new_err("batch_size is 0"));
        }
        let batching = Batching { texts: batch, ..Batching::default() };
        let width = self.encoder.width();
        let (mut all, mut truncated) = (Vec::new(), 0);
        let mut signals = Signals::new();
        let mut done = 0;
        while done < texts.len() {
            py.check_signals()?;
            let window = window_of(texts, done)?;
            let device = self.device.get();
            let embedded = py.detach(|| {
                let tokens = device.install(|| self.tokenizer.encode(&window))?;
                truncated += tokens.truncated;
                self.encoder.embed_while(&tokens.ids, batching, &mut |_| signals.look())
            });
            let embedded = embedded.map_err(|e| match e.text() {
                // By its place among all texts.
                Some(text) => PyValueError::new_err(format!("text {}: {}", done + text, e.into_cause())),
                None => to_py(e),
            })?;
            match (embedded, signals.raised.take()) {
                (Some(embeddings), None) if done == 0 => all = embeddings.elements().to_f32(),
                (Some(embeddings), None) => all.extend(embeddings.elements().to_f32()),
                (_, Some(raised)) => return Err(raised),
                (None, None) => return Err(PyValueError::new_err("the texts were not embedded to their end")),
            }
            done += window.len();
        }
        let embeddings = PyArray1::from_vec(py, all).reshape([done, width])?;
        Ok((embeddings.into_any(), truncated))
    }
}

/// The next texts of a list.
fn window_of(texts: &Bound<'_, PyList>, from: usize) -> PyResult<Vec<String>> {
    let until = texts.len().min(from + WINDOW);
    let text = |place: usize| {
        let item = texts.get_item(place)?;
        let text = item.cast::<PyString>().map_err(|_| {
            let is = item.get_type().name().map_or_else(|_| "something else".into(), |name| name.to_string());
            PyTypeError::new_err(format!("text {place} is no str, but {is}"))
        })?;
        text.to_str().map(str::to_owned)
    };
    (from..until).map(text).collect()
}

/// A language model.
#[pyclass(module = "sparse24", frozen)]
pub(crate) struct Generator {
    generator: Owned<text::Generator>,
    chat_template: Option<ChatTemplate>,
}

#[pymethods]
impl Generator {
    #[new]
    fn new(
        py: Python<'_>,
        folder: &str,
        sparsity: &str,
        device: &Device,
        dtype: &str,
        weights: Option<String>,
    ) -> PyResult<Self> {
        let sparsity: Sparsity = sparsity.parse().map_err(to_py)?;
        let (files, dtype) = (files(folder)?, dtype_of(dtype)?);
        let on = device.device.clone();
        let (generator, chat_template) = interruptible(py, move || {
            let options = LoadOptions { dtype, weights: weights.as_deref().map(|w| w.as_ref()), prompt: None };
            let mut model = LanguageModel::load(&files, options)?;
            model.checkpoint.prune(sparsity)?;
            Ok((text::Generator::new(&on, &model)?, model.chat_template))
        })?;
        Ok(Self { generator: Owned::new(generator), chat_template })
    }

    /// Whether a prompt becomes what a user says.
    #[getter]
    fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// Tokens of a text, at most, the prompt included.
    #[getter]
    fn max_tokens(&self) -> usize {
        self.generator.tokenizer().max_tokens()
    }

    /// How a prompt goes on.
    #[allow(clippy::too_many_arguments, reason = "Python's side names them all and gives them defaults")]
    fn generate<'py>(
        &self,
        py: Python<'py>,
        prompt: &str,
        system: Option<&str>,
        raw: bool,
        max_tokens: usize,
        temperature: f64,
        top_p: f64,
        seed: u64,
        on_text: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        process::enter()?;
        let tokenizer = self.generator.tokenizer();
        let ids = match self.chat_template.as_ref().filter(|_| !raw) {
            Some(template) => {
                let system = system.map(|text| Message::new("system", text));
                let messages: Vec<_> = system.into_iter().chain([Message::new("user", prompt)]).collect();
                template.render(&messages).and_then(|prompt| tokenizer.rendered_prompt(&prompt))
            }
            None if system.is_some() => {
                return Err(PyValueError::new_err("the model has no chat template with a place for a system prompt"));
            }
            None => tokenizer.prompt(prompt),
        };
        let ids = ids.map_err(to_py)?;
        let options = GenerateOptions { max_tokens, sampling: Sampling { temperature, top_p, seed } };
        let signals = Mutex::new(Signals::new());
        let mut text = String::new();
        let generated = py.detach(|| {
            self.generator.generate(&ids, options, &mut |new| {
                text += new;
                let Ok(mut signals) = signals.lock() else { return ControlFlow::Break(()) };
                signals.look()?;
                let Some(on_text) = &on_text else { return ControlFlow::Continue(()) };
                let goes_on = Python::attach(|py| {
                    let answer = on_text.call1(py, (new,))?;
                    let ends = answer.bind(py).is_instance_of::<pyo3::types::PyBool>() && !answer.is_truthy(py)?;
                    Ok(!ends)
                });
                match goes_on {
                    Ok(true) => ControlFlow::Continue(()),
                    Ok(false) => ControlFlow::Break(()),
                    Err(e) => signals.keep(Err(e)),
                }
            })
        });
        if let Some(raised) = signals.into_inner().ok().and_then(|signals| signals.raised) {
            return Err(raised);
        }
        let generated = generated.map_err(to_py)?;
        let finish = match generated.finish {
            Finish::Eos => "eos",
            Finish::MaxTokens => "max_tokens",
            Finish::Context => "context",
            Finish::Stopped => "stopped",
        };
        let record = PyDict::new(py);
        record.set_item("text", text)?;
        record.set_item("tokens", generated.ids)?;
        record.set_item("finish", finish)?;
        record.set_item("prompt_tokens", ids.len())?;
        record.set_item("prompt_seconds", generated.prompt_time.as_secs_f64())?;
        record.set_item("decoded", generated.decoded)?;
        record.set_item("decode_seconds", generated.decode_time.as_secs_f64())?;
        Ok(record)
    }
}
