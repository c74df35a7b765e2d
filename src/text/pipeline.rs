//! What follows the encoder: how the last states of a text's tokens become its embedding.
//!
//! A folder of Sentence Transformers lists it in `modules.json`: a pooling, and then any of Dense, LayerNorm,
//! Normalize. Without that list it is the mean of the states, brought to length 1. The mean, and a Normalize right
//! after it, are computed on the device as a part of the forward pass. Everything else is small beside the encoder and
//! is computed here, on the host in f32, from the mean or from the states that are read back.
//!
//! What each module computes is that of Sentence Transformers 6.2 (read in its source, and run against it; see
//! tests/pipeline.rs). Invariant: every step takes as many features as the one before it gives, the first pooled ones.

use std::path::Path;

use ndarray::{Array2, ArrayView1, ArrayViewMut1, Axis};
use serde_json::{Map, Value};

use super::files::{Files, flag, modules_of, object};
use crate::error::{Error, Result, checked_mul};
use crate::graph::{Ablation, Checkpoint, Reader};
use crate::io::{Source, Store};
use crate::matrix::{DType, Elements, Matrix};
use crate::weights::HostWeights;

/// What turns the last states of a text's tokens into its embedding.
///
/// ```
/// use sparse24::text::{Pipeline, Pooling};
/// let pipeline = Pipeline::default();
/// assert_eq!((pipeline.poolings(), pipeline.width(384)), (&[Pooling::Mean][..], 384));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    /// Whose results stand side by side.
    poolings: Vec<Pooling>,
    include_prompt: bool,
    /// Tokens at the start of every text that are its prompt, `[CLS]` included.
    prompt_tokens: usize,
    steps: Vec<Step>,
}

/// How the states of a text's tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's state.
    Cls,
    /// The largest number of each feature.
    Max,
    /// The mean.
    Mean,
    /// The sum over the square root of the number of tokens.
    MeanSqrtLen,
    /// The mean in which token i, from 1, counts i times.
    WeightedMean,
    /// The last token's state.
    LastToken,
}

impl Pooling {
    /// All of them, in the order in which the older files' flags put them side by side.
    pub const ALL: [Self; 6] =
        [Self::Cls, Self::Max, Self::Mean, Self::MeanSqrtLen, Self::WeightedMean, Self::LastToken];

    /// The name that Sentence Transformers gives it in `pooling_mode`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cls => "cls",
            Self::Max => "max",
            Self::Mean => "mean",
            Self::MeanSqrtLen => "mean_sqrt_len_tokens",
            Self::WeightedMean => "weightedmean",
            Self::LastToken => "lasttoken",
        }
    }

    /// The flag of older files that asks for it.
    fn flag(self) -> &'static str {
        match self {
            Self::Cls => "pooling_mode_cls_token",
            Self::Max => "pooling_mode_max_tokens",
            Self::Mean => "pooling_mode_mean_tokens",
            Self::MeanSqrtLen => "pooling_mode_mean_sqrt_len_tokens",
            Self::WeightedMean => "pooling_mode_weightedmean_tokens",
            Self::LastToken => "pooling_mode_lasttoken",
        }
    }

    /// Pools the states of a text, one row a token, of which the first `skipped` are left out. There is one after them.
    fn pool(self, states: &[ArrayView1<'_, f32>], skipped: usize, mut to: ArrayViewMut1<'_, f32>) {
        let pooled = &states[skipped..];
        for (feature, to) in to.iter_mut().enumerate() {
            let of = |state: &ArrayView1<'_, f32>| f64::from(state[feature]);
            let sum = || pooled.iter().map(of).sum::<f64>();
            let tokens = pooled.len() as f64;
            *to = match self {
                Self::Cls => of(&pooled[0]),
                Self::LastToken => of(&pooled[pooled.len() - 1]),
                // Not `f64::max`, which would hide a NaN.
                Self::Max => {
                    pooled.iter().map(of).fold(f64::NEG_INFINITY, |m, x| if x > m || x.is_nan() { x } else { m })
                }
                Self::Mean => sum() / tokens,
                Self::MeanSqrtLen => sum() / tokens.sqrt(),
                // The tokens that are left out have had their numbers, too.
                Self::WeightedMean => {
                    let weights = (skipped + 1..).map(|place| place as f64);
                    let weighted: f64 = weights.clone().zip(pooled).map(|(weight, state)| weight * of(state)).sum();
                    weighted / weights.take(pooled.len()).sum::<f64>()
                }
            } as f32;
        }
    }
}

/// What comes after pooling.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// `function(x Wᵀ + bias) + residual`.
    Dense(Box<Dense>),
    /// LayerNorm over the features.
    LayerNorm { gamma: Vec<f32>, beta: Vec<f32> },
    /// Division by the Euclidean length, or by 1e-12 where that is smaller.
    Normalize,
}

/// A Dense module.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Dense {
    /// `out x in`, f32.
    pub(super) weights: Matrix,
    /// `1 x out`, f32.
    pub(super) bias: Option<Matrix>,
    pub(super) function: Function,
    pub(super) residual: Residual,
}

/// What a Dense module adds to its result.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Residual {
    None,
    /// Its input.
    Input,
    /// Its input times these weights, `out x in`.
    Projected(Matrix),
}

/// The activation of a Dense module, with torch's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Identity,
    Tanh,
    Relu,
    /// By the error function.
    Gelu,
    Silu,
    Sigmoid,
}

/// What torch's LayerNorm adds to the variance unless told otherwise. The module's file has no field for it.
pub(super) const NORM_EPS: f64 = 1e-5;

impl Function {
    const ALL: [(&'static str, Self); 6] = [
        ("Identity", Self::Identity),
        ("Tanh", Self::Tanh),
        ("ReLU", Self::Relu),
        ("GELU", Self::Gelu),
        ("SiLU", Self::Silu),
        ("Sigmoid", Self::Sigmoid),
    ];

    fn apply(self, x: f32) -> f32 {
        let sigmoid = || 1.0 / (1.0 + libm::expf(-x));
        match self {
            Self::Identity => x,
            Self::Tanh => libm::tanhf(x),
            Self::Relu => x.max(0.0),
            Self::Gelu => 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::Silu => x * sigmoid(),
            Self::Sigmoid => sigmoid(),
        }
    }
}

impl Step {
    /// Features after it, given those before it.
    fn width(&self, before: usize) -> usize {
        match self {
            Self::Dense(dense) => dense.weights.rows(),
            Self::LayerNorm { .. } | Self::Normalize => before,
        }
    }

    /// Applies it to embeddings, one a row.
    fn apply(&self, x: Array2<f32>) -> Result<Array2<f32>> {
        Ok(match self {
            Self::Dense(dense) => {
                let mut y = x.dot(&dense.weights.view::<f32>()?.t());
                if let Some(bias) = &dense.bias {
                    y += &bias.view::<f32>()?;
                }
                y.mapv_inplace(|x| dense.function.apply(x));
                match &dense.residual {
                    Residual::None => {}
                    Residual::Input => y += &x,
                    Residual::Projected(weights) => y += &x.dot(&weights.view::<f32>()?.t()),
                }
                y
            }
            Self::LayerNorm { gamma, beta } => each_row(x, |row| {
                let n = row.len() as f64;
                let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
                let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
                let scale = 1.0 / (variance + NORM_EPS).sqrt();
                for ((x, gamma), beta) in row.iter_mut().zip(gamma).zip(beta) {
                    *x = ((f64::from(*x) - mean) * scale * f64::from(*gamma) + f64::from(*beta)) as f32;
                }
            }),
            Self::Normalize => each_row(x, |row| {
                let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(1e-12);
                row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
            }),
        })
    }
}

fn each_row(mut x: Array2<f32>, change: impl Fn(&mut ArrayViewMut1<'_, f32>)) -> Array2<f32> {
    x.axis_iter_mut(Axis(0)).for_each(|mut row| change(&mut row));
    x
}

impl Default for Pipeline {
    /// The mean of all tokens' states, brought to length 1.
    fn default() -> Self {
        Self { poolings: vec![Pooling::Mean], include_prompt: true, prompt_tokens: 0, steps: vec![Step::Normalize] }
    }
}

impl Pipeline {
    /// That of a language model, of whose outputs no embedding is made.
    pub fn none() -> Self {
        Self { poolings: Vec::new(), include_prompt: true, prompt_tokens: 0, steps: Vec::new() }
    }

    /// Reads what a folder asks for, for states of `hidden` features: the modules of its `modules.json`, or where there
    /// is none the pooling of `1_Pooling`, brought to length 1, or the default.
    ///
    /// An error names the file and what it asks for if that is a module, a pooling or an activation that is not known
    /// here, or one that does not fit the one before it, or if weights are missing.
    pub fn load(files: &Files, hidden: usize) -> Result<Self> {
        let mut pipeline = Self::default();
        let Some(list) = &files.modules else {
            if let Some(path) = &files.pooling {
                pipeline.read_pooling(&files.store, path, hidden)?;
            }
            return Ok(pipeline);
        };
        let folder = list.parent().unwrap_or(Path::new(""));
        pipeline.steps.clear();
        let mut pooled = false;
        let mut width = hidden;
        for module in &modules_of(&files.store, list)?[1..] {
            let at = folder.join(&module.folder);
            let config = at.join("config.json");
            let class = module.class.as_str();
            if pooled == (class == "Pooling") {
                let why = if pooled { "a second Pooling" } else { "no Pooling right after the Transformer" };
                return Err(Error::file(list, format!("has {why}: {class} in {}", module.folder.display())));
            }
            match class {
                "Pooling" => {
                    pipeline.read_pooling(&files.store, &config, hidden)?;
                    width *= pipeline.poolings.len();
                    pooled = true;
                }
                "Dense" => pipeline.steps.push(read_dense(&files.store, &config, &at, width)?),
                "LayerNorm" => pipeline.steps.push(read_norm(&files.store, &config, &at, width)?),
                "Normalize" => pipeline.steps.push(Step::Normalize),
                // Nothing is dropped but in training.
                "Dropout" => {}
                _ => {
                    let reason = format!("asks for the module {class}, which is not known here");
                    return Err(Error::file(list, reason));
                }
            }
            width = pipeline.steps.last().map_or(width, |step| step.width(width));
        }
        match pooled {
            true => Ok(pipeline),
            false => Err(Error::file(list, "has no Pooling: its tokens have states, and a text no embedding")),
        }
    }

    /// What stands side by side after pooling.
    pub fn poolings(&self) -> &[Pooling] {
        &self.poolings
    }

    /// Features of an embedding, given those of a state.
    pub fn width(&self, hidden: usize) -> usize {
        self.steps.iter().fold(hidden * self.poolings.len(), |width, step| step.width(width))
    }

    /// Whether the tokens of a prompt are pooled like others. Where they are not, [`Pipeline::set_prompt_tokens`] says
    /// how many they are.
    pub fn includes_prompt(&self) -> bool {
        self.include_prompt
    }

    /// Says how many tokens at the start of every text are those of its prompt, `[CLS]` included: see
    /// [`Tokenizer::prompt_tokens`](super::Tokenizer::prompt_tokens). They are left out of the pooling if the model
    /// asks for that.
    pub fn set_prompt_tokens(&mut self, tokens: usize) {
        self.prompt_tokens = tokens;
    }

    /// Tokens at the start of every text that are not pooled.
    pub(super) fn skipped(&self) -> usize {
        if self.include_prompt { 0 } else { self.prompt_tokens }
    }

    pub(super) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether a device pools, and if so, whether it brings the mean to length 1, too.
    pub(super) fn on_device(&self) -> Option<bool> {
        let mean = self.poolings == [Pooling::Mean] && self.skipped() == 0;
        mean.then(|| self.steps.first() == Some(&Step::Normalize))
    }

    /// The model of a checkpoint with as much of the pipeline as a device computes: the mean, and a Normalize right
    /// after it. [`Pipeline::embeddings`] goes on from its output.
    pub fn attach(&self, checkpoint: &Checkpoint) -> Result<Checkpoint> {
        let Some(normalize) = self.on_device() else { return Ok(checkpoint.clone()) };
        checkpoint.extended(|graph| {
            let states = graph.outputs().last().copied();
            let states = states.ok_or_else(|| Error::invalid("the model has no states to pool"))?;
            let pooled = graph.mean_pooling("pooling", states, normalize)?;
            graph.add_output(pooled);
            Ok(())
        })
    }

    /// The embeddings of all texts of an ablation, one a row, with `weights` in place of the linear layer `name`. Its
    /// checkpoint is one that this pipeline was [attached](Pipeline::attach) to. Errors are those of [`Ablation::run`].
    ///
    /// ```
    /// use sparse24::graph::{Ablation, Batching, Checkpoint};
    /// use sparse24::models::bert::{BertConfig, Sizes};
    /// use sparse24::text::Pipeline;
    /// use sparse24::{Activation, DType, Device, Matrix};
    /// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
    /// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
    /// let (checkpoint, pipeline) = (Checkpoint::random(graph, DType::F32, 24)?, Pipeline::default());
    /// let texts = [vec![1, 2, 3, 4], vec![5]];
    /// let model = pipeline.attach(&checkpoint)?;
    /// let mut ablation = Ablation::new(&Device::cpu()?, &model, &texts, Batching::default())?;
    /// let zeros = Matrix::zeros(16, 8, DType::F32)?;
    /// let embeddings = pipeline.ablated(&mut ablation, "encoder.layer.0.intermediate.dense", zeros.into())?;
    /// assert_eq!((embeddings.rows(), embeddings.cols()), (2, 8));
    /// # Ok::<(), sparse24::Error>(())
    /// ```
    pub fn ablated(&self, ablation: &mut Ablation, name: &str, weights: HostWeights) -> Result<Matrix> {
        let (texts, lengths) = (ablation.texts(), ablation.lengths());
        let mut all: Vec<f32> = Vec::new();
        let mut width = 0;
        ablation.run(name, weights, &mut |of, seq, output| {
            let lengths: Vec<_> = of.iter().map(|&text| lengths[text]).collect();
            let embeddings = self.embeddings(output, seq, &lengths)?;
            width = embeddings.cols();
            all.resize(checked_mul("embeddings", texts, width)?, 0.0);
            for (&text, from) in of.iter().zip(embeddings.elements().to_f32().chunks_exact(width)) {
                all[text * width..][..width].copy_from_slice(from);
            }
            Ok(())
        })?;
        Matrix::new(texts, width, Elements::F32(all))
    }

    /// The embeddings of a batch, one a row, from the output of a model that this pipeline was
    /// [attached](Pipeline::attach) to: what the device pooled, or the states of texts of these lengths, padded to
    /// `seq` tokens each. A row whose states are not finite is NaN.
    ///
    /// An error for a text that has no token beside those of its prompt, which are left out: [`Error::text`] says
    /// which.
    pub fn embeddings(&self, end: &Matrix, seq: usize, lengths: &[usize]) -> Result<Matrix> {
        let (mut x, steps) = match self.on_device() {
            Some(normalized) => (end.to_array(), &self.steps[usize::from(normalized)..]),
            None => (self.pool(end, seq, lengths)?, &self.steps[..]),
        };
        if !steps.is_empty() {
            // Tanh would make a finite number of an infinite one.
            let broken: Vec<bool> = x.rows().into_iter().map(|row| !row.iter().all(|x| x.is_finite())).collect();
            for step in steps {
                x = step.apply(x)?;
            }
            for (mut row, _) in x.rows_mut().into_iter().zip(broken).filter(|(_, broken)| *broken) {
                row.fill(f32::NAN);
            }
        }
        Ok(Matrix::from_array(x.view()))
    }

    fn pool(&self, states: &Matrix, seq: usize, lengths: &[usize]) -> Result<Array2<f32>> {
        let (states, hidden, skipped) = (states.to_array(), states.cols(), self.skipped());
        let mut pooled = Array2::zeros((lengths.len(), hidden * self.poolings.len()));
        for (text, (&length, mut row)) in lengths.iter().zip(pooled.rows_mut()).enumerate() {
            if length <= skipped {
                let reason =
                    format!("has {length} tokens, and the {skipped} of the prompt are left out of the pooling");
                return Err(Error::invalid(reason).of_text(text));
            }
            let tokens: Vec<_> = (text * seq..text * seq + length).map(|token| states.row(token)).collect();
            for (pooling, to) in self.poolings.iter().zip(row.axis_chunks_iter_mut(Axis(0), hidden)) {
                pooling.pool(&tokens, skipped, to);
            }
        }
        Ok(pooled)
    }

    fn read_pooling(&mut self, store: &Store, path: &Path, hidden: usize) -> Result<()> {
        let json = object(store, path)?;
        for name in ["word_embedding_dimension", "embedding_dimension"] {
            expect_size(path, &json, name, hidden)?;
        }
        self.poolings = poolings_of(path, &json)?;
        self.include_prompt = flag(path, &json, "include_prompt", true)?;
        Ok(())
    }
}

/// The poolings that a file asks for: by name in `pooling_mode`, or, as older files do, by a flag for each.
fn poolings_of(path: &Path, json: &Map<String, Value>) -> Result<Vec<Pooling>> {
    let refuse = |asked: &dyn std::fmt::Display| {
        let known = Pooling::ALL.map(Pooling::name).join(", ");
        Err(Error::file(path, format!("asks for the pooling {asked}, which is not one of {known}")))
    };
    let named = match json.get("pooling_mode") {
        None | Some(Value::Null) => None,
        Some(Value::Array(names)) => Some(names.iter().collect()),
        Some(name) => Some(vec![name]),
    };
    let poolings = match named {
        Some(names) => {
            let mut poolings = Vec::new();
            for name in names {
                let of_name = |pooling: &Pooling| name.as_str().is_some_and(|name| name == pooling.name());
                match Pooling::ALL.into_iter().find(of_name) {
                    Some(pooling) => poolings.push(pooling),
                    None => return refuse(name),
                }
            }
            poolings
        }
        None => {
            let flags = || json.keys().filter(|key| key.starts_with("pooling_mode_"));
            if flags().next().is_none() {
                return Ok(vec![Pooling::Mean]);
            }
            for name in flags() {
                let known = Pooling::ALL.into_iter().any(|pooling| pooling.flag() == name);
                if !known && flag(path, json, name, false)? {
                    return refuse(name);
                }
            }
            let mut poolings = Vec::new();
            for pooling in Pooling::ALL {
                if flag(path, json, pooling.flag(), false)? {
                    poolings.push(pooling);
                }
            }
            poolings
        }
    };
    if poolings.is_empty() { Err(Error::file(path, "asks for no pooling")) } else { Ok(poolings) }
}

/// An error if a size is there and another.
fn expect_size(path: &Path, json: &Map<String, Value>, name: &str, expected: usize) -> Result<()> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_u64() == Some(expected as u64) => Ok(()),
        Some(value) => Err(Error::file(path, format!("{name} is {value}, and {expected} features come before it"))),
    }
}

/// What the weights of a module's folder are read by.
fn reader(store: &Store, folder: &Path) -> Result<Reader<'static>> {
    let weights = store.weights_in(folder);
    if !store.exists(&weights) && store.exists(folder.join("pytorch_model.bin")) {
        let reason = "is missing, and pytorch_model.bin is not read: save the module as safetensors";
        return Err(Error::file(&weights, reason));
    }
    Ok(Reader::of(Source::open_in(store, &weights)?, DType::F32))
}

fn read_dense(store: &Store, config: &Path, folder: &Path, width: usize) -> Result<Step> {
    let json = object(store, config)?;
    let refuse = |reason: String| Err(Error::file(config, reason));
    for name in ["module_input_name", "module_output_name"] {
        if let Some(value) = json.get(name).filter(|value| !value.is_null() && *value != "sentence_embedding") {
            return refuse(format!("{name} is {value}; a Dense is applied to \"sentence_embedding\" alone"));
        }
    }
    let Some(out) = json.get("out_features").and_then(Value::as_u64).and_then(|out| usize::try_from(out).ok()) else {
        return refuse("out_features is missing or no whole number".into());
    };
    if out == 0 {
        return refuse("out_features is 0".into());
    }
    expect_size(config, &json, "in_features", width)?;
    let function = match json.get("activation_function") {
        // What the module does by itself.
        None => Function::Tanh,
        Some(Value::Null) => Function::Identity,
        Some(value) => {
            // One class has several paths, such as torch.nn.Tanh and torch.nn.modules.activation.Tanh.
            let class = value.as_str().filter(|class| class.starts_with("torch.nn."));
            let class = class.and_then(|class| class.rsplit('.').next());
            match Function::ALL.into_iter().find(|(name, _)| Some(*name) == class) {
                Some((_, function)) => function,
                None => {
                    let known = Function::ALL.map(|(name, _)| name).join(", ");
                    return refuse(format!("activation_function is {value}, which is not one of torch's {known}"));
                }
            }
        }
    };
    let reader = reader(store, folder)?;
    let dense = |name: &str| {
        let with_suffix = format!("{name}.weight");
        reader.weights([with_suffix.as_str(), name].into_iter(), &[out, width])?.to_dense()
    };
    let residual = match flag(config, &json, "use_residual", false)? {
        false => Residual::None,
        true if out == width => Residual::Input,
        true => Residual::Projected(dense("residual")?),
    };
    let bias = flag(config, &json, "bias", true)?
        .then(|| reader.tensor(["linear.bias"].into_iter(), &[out], DType::F32))
        .transpose()?;
    Ok(Step::Dense(Box::new(Dense { weights: dense("linear")?, bias, function, residual })))
}

fn read_norm(store: &Store, config: &Path, folder: &Path, width: usize) -> Result<Step> {
    expect_size(config, &object(store, config)?, "dimension", width)?;
    let reader = reader(store, folder)?;
    let vector = |name: &str| Ok(reader.tensor([name].into_iter(), &[width], DType::F32)?.elements().to_f32());
    Ok(Step::LayerNorm { gamma: vector("norm.weight")?, beta: vector("norm.bias")? })
}
