//! Retraining: a pruned model learns from the dense one what pruning took from it.
//!
//! On unlabelled text the student (the pruned model) is trained to reproduce the hidden states and embeddings of the
//! teacher (the dense model), and a language model's logits if wanted. Only the kept weights are trained, so a 2:4
//! model stays 2:4.
//!
//! ```text
//!   token ids ──► batches of like length, mixed anew in every epoch             train/texts.rs, train/order.rs
//!                            │
//!              ┌─────────────┴──────────────┐
//!        teacher: graph::Model      student: graph::TrainingPass, forwards
//!              │ hidden states, embeddings: │ hidden states, embeddings
//!              │ cached for the next epoch  │                                     train/teacher.rs, train/kept.rs
//!              └────────►  losses  ◄────────┘        RelativeError on the device; similarity on the host;
//!                            │                       logits, some tokens at a time: graph::HeadPass
//!                            │ gradients of hidden states and embeddings
//!                     student, backwards ──► gradients of the kept weights
//!                            │ SumSquares: clipped by their global norm
//!                          AdamW ──► Repack: the packed weights that GEMMs read   train/part.rs
//! ```
//! What is trained together is a part of the graph: all of it, or with [`Objective::Blocks`] what lies between two
//! hidden states, one part after the other, each on what the trained parts before it make of the texts.
//!
//! With [`Objective::Logits`] the teacher's logits are computed from its last hidden state each time they are needed.
//! That state is cached, and its numbers are rounded to bf16 there, by 1/512 of themselves at most. Logits are not: a
//! token of SmolLM2-135M has 49152 of them, and all of its hidden states together have 35136 numbers.
//!
//! The learning rate rises linearly over the first tenth of a part's steps and falls along half a cosine to 0. The
//! schedule depends on the number of steps, so that number is fixed before the first step (derived from a timing if
//! minutes are given, [`Pace`]), and a resumed run must have the same number. Some of the texts are held out; the
//! parameters that had the least loss on them are the result.
//!
//! ```
//! use sparse24::graph::{Checkpoint, Sparsity};
//! use sparse24::models::bert::{BertConfig, Sizes};
//! use sparse24::train::{TrainOptions, Trainer};
//! use sparse24::{Activation, DType, Device, VectorLen};
//!
//! let sizes = Sizes { vocabulary: 50, hidden: 16, layers: 1, heads: 2, intermediate: 32, positions: 8, types: 1 };
//! let graph = BertConfig::new(sizes, 1e-6, Activation::Gelu)?.graph()?;
//! let dense = Checkpoint::random(graph, DType::F32, 24)?;
//! let mut pruned = dense.clone();
//! pruned.prune(Sparsity::TwoFour(VectorLen::new(8)?))?;
//!
//! let texts = (0..100).map(|i| vec![i % 50, i % 7, i % 11]).collect();
//! let options = TrainOptions { batch: 16, learning_rate: 3e-3, ..TrainOptions::default() };
//! let mut trainer = Trainer::new(&Device::cpu()?, &pruned, &dense, texts, 30, options)?;
//! let before = trainer.evaluate()?;
//! while trainer.step()?.is_some() {}
//! assert!(trainer.evaluate()? < 0.9 * before);
//! let retrained = trainer.result()?;
//! # Ok::<(), sparse24::Error>(())
//! ```
//! On the CPU device a run is the same to the bit whatever the number of threads, and whether it was interrupted or
//! not: it goes on from a file ([`Trainer::save`]) with parameters, the optimiser's state and the number of the step.
//! Invariant: between steps all gradients are zero, and the packed weights that the GEMMs read hold the current trained
//! values.

mod kept;
mod order;
mod pace;
mod part;
mod shapes;
mod similarity;
mod state;
mod teacher;
mod texts;

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ndarray::Array2;

use self::kept::HiddenStateCache;
pub use self::pace::Pace;
use self::part::Part;
use self::shapes::PassCache;
pub use self::similarity::SimilarityWeights;
use self::teacher::{Teacher, TeacherValues};
use self::texts::Texts;
use crate::engine::{Device, Tensor};
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Graph, HeadLoss, HeadPass, Model, Target, Trainable, TrainingPass, ValueId};
use crate::matrix::{DType, Matrix};
use crate::ops::adamw::AdamWStep;

/// What of the teacher the student is trained to reproduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The hidden states after the attention and after the feed-forward sublayer of every block ([`Graph::states`]),
    /// and the embeddings.
    States,
    /// The same, but the sublayers are trained one after the other, each by itself on what the trained ones before it
    /// make of the texts. The loss of each is that of its own hidden state, so that its steps are short; the last one
    /// has the loss of the embeddings, too.
    Blocks,
    /// The embeddings alone.
    Embeddings,
    /// The hidden states as in `States`, and a language model's distribution of the next token, by its divergence
    /// from the teacher's (`KL(teacher ‖ student)`). The head, which makes the logits, stays as it is. An error if the
    /// model has none.
    Logits,
}

impl Objective {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::States, Self::Blocks, Self::Embeddings, Self::Logits];

    /// As it is written on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::States => "states",
            Self::Blocks => "blocks",
            Self::Embeddings => "embeddings",
            Self::Logits => "logits",
        }
    }
}

impl FromStr for Objective {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|objective| objective.name() == text);
        found.ok_or_else(|| Error::invalid(format!("objective {text:?} is not one of {}", names())))
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How much each term of [`Objective::Logits`] counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitsWeights {
    /// Of the loss of each hidden state; 1 as in [`Objective::States`].
    pub states: f64,
    /// Of the mean divergence over tokens, in nats; 4. On a model of a few thousand weights 0, 16 and 64 leave a larger
    /// divergence on other texts, and 1 does at low learning rates; it was tuned on no larger model.
    pub divergence: f64,
}

impl Default for LogitsWeights {
    fn default() -> Self {
        Self { states: 1.0, divergence: 4.0 }
    }
}

/// How a model is retrained.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// What of the teacher the student is trained to reproduce.
    pub objective: Objective,
    /// Texts of a batch.
    pub batch: usize,
    /// Batches of a step, whose gradients are added up (gradient accumulation): for more texts than fit into memory at
    /// once.
    pub accumulate: usize,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Share of the steps in which the learning rate rises.
    pub warm_up: f64,
    /// AdamW's β₁ and β₂.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// Gradients are clipped to this global L2 norm.
    pub max_grad_norm: f64,
    /// Weights of the two embedding-loss terms; the loss of each hidden state has weight 1.
    pub similarity: SimilarityWeights,
    /// Weights of the hidden states and of the divergence with [`Objective::Logits`].
    pub logits: LogitsWeights,
    /// Share of the texts that are held out.
    pub held_out: f64,
    /// Upper limit of held-out texts: enough to choose the best parameters, few enough to evaluate in seconds.
    pub max_held_out: usize,
    /// Seed of the order of texts.
    pub seed: u64,
    /// Memory budget in bytes. At most two thirds hold cached hidden states and embeddings: the teacher's, and with
    /// [`Objective::Blocks`] those between parts (an error if these do not fit). Where the teacher's do not fit, those
    /// of the longest texts are computed again each time they are needed. One eighth is for the teacher's passes, and
    /// with [`Objective::Logits`] one sixteenth for the logits of some tokens at a time (of eight at least). The rest
    /// is for the student's passes, which recompute some values (activation checkpointing) where it is too little.
    pub memory: u64,
}

impl Default for TrainOptions {
    /// What MiniLM and MPNet were retrained with.
    fn default() -> Self {
        Self {
            objective: Objective::States,
            batch: 32,
            accumulate: 1,
            learning_rate: 4e-4,
            warm_up: 0.1,
            betas: [0.9, 0.98],
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            similarity: SimilarityWeights { cosine: 4.0, pairs: 4.0 },
            logits: LogitsWeights::default(),
            held_out: 0.1,
            max_held_out: 256,
            seed: 24,
            memory: 1920 << 20,
        }
    }
}

impl TrainOptions {
    /// An error if these options make no run.
    fn check(&self) -> Result<()> {
        let Self { batch, accumulate, held_out, warm_up, .. } = *self;
        let is_share = |share: f64| (0.0..1.0).contains(&share);
        if batch == 0 || accumulate == 0 || !is_share(held_out) || !is_share(warm_up) {
            return Err(Error::invalid(format!(
                "no run has batches of {batch} texts, {accumulate} of them a step, a share of {held_out} held out and \
                 one of {warm_up} to warm up"
            )));
        }
        Ok(())
    }

    /// The learning rate of a step, counted from 0, of so many.
    fn learning_rate_of(&self, step: u64, steps: u64) -> f64 {
        let (at, steps) = (step as f64 + 0.5, steps as f64);
        let rising = (self.warm_up * steps).max(1.0);
        if at < rising {
            return self.learning_rate * at / rising;
        }
        let gone = (at - rising) / (steps - rising).max(1.0);
        self.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * gone.min(1.0)).cos())
    }
}

/// The figures of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize, serde::Deserialize))]
pub struct Step {
    /// Its number, from 1.
    pub number: u64,
    /// The loss of its batch, before it.
    pub loss: f64,
    /// The part of `loss` that is due to the embeddings.
    #[cfg_attr(feature = "report", serde(rename = "similarity"))]
    pub embedding_loss: f64,
    /// The part of `loss` that is due to the logits.
    #[cfg_attr(feature = "report", serde(rename = "logits", default))]
    pub logits_loss: f64,
    /// The learning rate.
    pub rate: f64,
    /// Global gradient norm before clipping.
    #[cfg_attr(feature = "report", serde(rename = "gradient"))]
    pub grad_norm: f64,
}

/// A run of retraining.
#[derive(Debug)]
pub struct Trainer {
    options: TrainOptions,
    /// Steps of the whole run.
    steps: u64,
    /// Steps that are done.
    done: u64,
    trainable: Arc<Trainable>,
    teacher: Teacher,
    texts: Texts,
    /// The parts in training order. The last is the whole model, on which held-out texts are evaluated; it is trained
    /// itself unless the objective is `Blocks`.
    parts: Vec<Part>,
    /// AdamW's two moments of each trained parameter, in the order of [`Trainable::trained`].
    moments: Vec<[Tensor; 2]>,
    /// The numbers of a step that AdamW reads on the device ([`AdamWStep`]); written before each update.
    adamw_step: Tensor,
    /// An epoch and its batches: the one that the last batch was of.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
    passes: PassCache<StudentPass>,
    /// Both models' heads, if logits are compared.
    head: Option<Arc<HeadLoss>>,
    /// The cache of the part in training; `None` until it is filled, and where the whole model is trained.
    part_cache: Option<PartCache>,
    best: Option<Best>,
    /// Hash of models, texts, options and number of steps; a saved state with another hash is refused.
    identity: u64,
}

/// The parameters with the least loss on texts that are held out.
#[derive(Clone, Debug)]
struct Best {
    loss: f64,
    step: u64,
    values: Vec<Matrix>,
}

/// A part of the student for batches of one shape.
#[derive(Debug)]
struct StudentPass {
    pass: TrainingPass,
    /// The teacher's hidden states of the batch, which the student's are compared with.
    targets: Vec<(ValueId, Tensor)>,
    /// The loss of the logits, if these are compared.
    head: Option<HeadPass>,
}

/// What a batch adds to the loss of a step.
#[derive(Clone, Copy, Debug, Default)]
struct Losses {
    all: f64,
    /// What of it is due to the embeddings.
    embeddings: f64,
    /// What of it is due to the logits.
    logits: f64,
}

/// With [`Objective::Blocks`]: the cached input and targets of the part in training.
#[derive(Debug)]
struct PartCache {
    /// The part in training.
    part: usize,
    /// The student's hidden states at the part's input; `None` for the first part.
    input: Option<HiddenStateCache>,
    /// The teacher's values at the part's output.
    targets: TeacherValues,
}

impl PartCache {
    /// The largest number of bytes at any time: the student's input, the teacher's input and the teacher's output of a
    /// part.
    fn bytes(graph: &Graph, parts: &[Part], texts: &Texts) -> u64 {
        let values = parts.iter().flat_map(Part::values).chain(parts.iter().filter_map(|part| part.input));
        let is_trained = |text: usize| !texts.is_held_out(text);
        3 * values.map(|value| texts.room_bytes(graph, value, is_trained)).max().unwrap_or_default()
    }
}

impl Trainer {
    /// A student of a teacher, which has the same graph, on texts given as token ids; `steps` steps are the whole run.
    /// Both are f32. An error if the graphs differ, or there are too few texts to hold some out.
    pub fn new(
        device: &Device,
        student: &Checkpoint,
        teacher: &Checkpoint,
        texts: Vec<Vec<u32>>,
        steps: u64,
        options: TrainOptions,
    ) -> Result<Self> {
        let graph = Arc::clone(student.graph());
        same_graph(&graph, teacher.graph())?;
        options.check()?;
        for (i, text) in texts.iter().enumerate() {
            graph.check_ids(text).map_err(|e| e.of_text(i))?;
        }
        let texts = Texts::new(texts, graph.limits().tokens, &options)?;
        let trainable = Arc::new(Trainable::new(device, student, &graph.trained_params())?);
        let adamw_step = device.zeros(1, AdamWStep::LEN, DType::F32)?;
        let mut moments = Vec::new();
        for (_, w, _) in trainable.trained() {
            let zeros = || device.zeros(w.rows(), w.cols(), DType::F32);
            moments.push([zeros()?, zeros()?]);
        }
        let cuts = part::cuts(&graph, options.objective)?;
        let trained = cuts.len() - usize::from(options.objective == Objective::Blocks);
        let mut parts = Vec::new();
        for (at, cut) in cuts.into_iter().enumerate() {
            let of = |at: usize| steps / trained as u64 * at as u64 + (steps % trained as u64).min(at as u64);
            let steps = if at < trained { of(at)..of(at + 1) } else { steps..steps };
            parts.push(Part::new(cut, steps, &trainable, &moments, &adamw_step)?);
        }
        let identity = state::identity([student, teacher], texts.all(), steps, &options)?;
        let whole = &parts[parts.len() - 1];
        // Where parts are trained by themselves, the part cache has the targets of training; the teacher's own cache is
        // for held-out texts only.
        let is_whole = trained == parts.len();
        let is_wanted = |text: usize| is_whole || texts.is_held_out(text);
        let (most, of_passes) = (options.memory / 3 * 2, options.memory / 8);
        let part_cache = if is_whole { 0 } else { PartCache::bytes(&graph, &parts, &texts) };
        if part_cache > most {
            return Err(Error::invalid(format!(
                "the hidden states of all texts between two parts take {} MiB: more than two thirds of the memory that \
                 is given",
                part_cache.div_ceil(1 << 20)
            )));
        }
        let memory = [most - part_cache, of_passes];
        let teacher = Model::new(device, teacher)?;
        let head = match options.objective {
            Objective::Logits => Some(Arc::new(HeadLoss::new(&trainable, &teacher, options.memory / 16)?)),
            Objective::States | Objective::Blocks | Objective::Embeddings => None,
        };
        let of_head = head.as_ref().map_or(0, |head| head.bytes());
        let teacher = Teacher::new(teacher, whole, &texts, is_wanted, memory);
        let memory = options.memory - of_passes - part_cache - teacher.kept_bytes();
        // Eight rows of logits may take more than there is.
        let memory = memory.saturating_sub(of_head);
        Ok(Self {
            steps,
            done: 0,
            teacher,
            trainable,
            texts,
            parts,
            moments,
            adamw_step,
            epoch: None,
            passes: PassCache::new(memory),
            head,
            part_cache: None,
            best: None,
            identity,
            options,
        })
    }

    /// Steps that are done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Texts that are trained on, and those that are held out.
    pub fn texts(&self) -> [usize; 2] {
        [self.texts.trained().len(), self.texts.held_out().len()]
    }

    /// An error if there are too few texts to retrain on and hold some out.
    pub fn check(texts: &[Vec<u32>], options: &TrainOptions) -> Result<()> {
        options.check()?;
        Texts::held_out_of(texts.len(), options).map(drop)
    }

    /// Steps in which every text is trained on once that is not held out. An error if there are too few.
    pub fn steps_of_epoch(texts: usize, options: &TrainOptions) -> Result<u64> {
        options.check()?;
        let trained = texts - Texts::held_out_of(texts, options)?;
        Ok(trained.div_ceil(options.batch).div_ceil(options.accumulate) as u64)
    }

    /// One step: a batch forwards and backwards, and the optimiser. `None` when all are done. An error if a loss or a
    /// gradient is not finite; it names the step and the first such hidden state or parameter. Parameters are then as
    /// they were before.
    pub fn step(&mut self) -> Result<Option<Step>> {
        let Some(part) = self.parts.iter().position(|part| part.steps.contains(&self.done)) else { return Ok(None) };
        let number = self.done + 1;
        let accumulate = self.options.accumulate as u64;
        let steps = self.parts[part].steps.clone();
        if self.parts.len() > 1 && self.part_cache.as_ref().is_none_or(|cache| cache.part != part) {
            // Inputs and targets are cached for the texts of this part's steps only. Each part starts again at epoch 0,
            // whose batches are `first_batches`.
            let first_batches = self.texts.first_batches();
            let count = ((steps.end - steps.start) * accumulate).min(first_batches.len() as u64) as usize;
            let batches = first_batches[..count].to_vec();
            self.start_part(part, &batches).map_err(|e| in_step(e, number))?;
        }
        let step = self.step_of(part, number, self.done - steps.start, steps.end - steps.start);
        match step {
            Ok(step) => {
                self.done = number;
                Ok(Some(step))
            }
            Err(e) => {
                self.clear_gradients()?;
                Err(in_step(e, number))
            }
        }
    }

    /// Step number `at`, from 0, of the `steps` of a part, which is `number` of the run.
    fn step_of(&mut self, part: usize, number: u64, at: u64, steps: u64) -> Result<Step> {
        let accumulate = self.options.accumulate as u64;
        let (mut loss, mut embedding_loss, mut logits_loss) = (0.0, 0.0, 0.0);
        for i in 0..accumulate {
            let batch = self.batch(at * accumulate + i);
            let losses = self.pass(part, &batch, true)?;
            loss += losses.all;
            embedding_loss += losses.embeddings;
            logits_loss += losses.logits;
        }
        let rate = self.options.learning_rate_of(at, steps);
        let grad_norm = self.update(part, at + 1, rate)?;
        Ok(Step { number, loss, embedding_loss, logits_loss, rate, grad_norm })
    }

    /// Sets all gradients to 0, after a step that failed.
    fn clear_gradients(&self) -> Result<()> {
        self.trainable.trained().try_for_each(|(_, _, gradient)| {
            let zeros = Matrix::zeros(gradient.rows(), gradient.cols(), DType::F32)?;
            self.trainable.device().write(gradient, &zeros)
        })
    }

    /// The optimiser's step `number`, from 1, of a part. Returns the global gradient norm before clipping.
    fn update(&self, part: usize, number: u64, rate: f64) -> Result<f64> {
        let (device, part) = (self.trainable.device(), &self.parts[part]);
        let grad_norm = part.grad_norm(&self.trainable)?;
        let TrainOptions { betas, eps, weight_decay: decay, max_grad_norm, .. } = self.options;
        let factor = if grad_norm > max_grad_norm { max_grad_norm / grad_norm } else { 1.0 };
        let numbers = AdamWStep { number, rate, factor, betas, eps, decay };
        device.write(&self.adamw_step, &numbers.to_matrix()?)?;
        device.submit(&part.update)?;
        Ok(grad_norm)
    }

    /// The texts of batch number `at`, from 0, of a part's steps.
    fn batch(&mut self, at: u64) -> Vec<usize> {
        let of_epoch = self.texts.first_batches().len() as u64;
        let (epoch, place) = (at / of_epoch, at % of_epoch);
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, self.texts.epoch(epoch)));
        }
        self.epoch.as_ref().map(|(_, batches)| batches[place as usize].clone()).unwrap_or_default()
    }

    /// What a batch adds to the loss of a step. With `backward` its gradients are added to those that are there.
    fn pass(&mut self, part: usize, batch: &[usize], backward: bool) -> Result<Losses> {
        let share = 1.0 / self.options.accumulate as f64;
        let whole = self.parts.len() - 1;
        let seq = self.texts.seq(batch);
        let targets = match self.part_cache.as_ref().filter(|_| part != whole) {
            Some(cache) => cache.targets.batch(self.trainable.graph(), batch, seq)?,
            None => self.teacher.values(&self.parts[whole], &self.texts, batch)?,
        };
        let at = self.forward(part, batch)?;
        let device = self.trainable.device();
        let StudentPass { pass, targets: on_device, head } = self.passes.get(at);
        for (value, to) in on_device {
            device.write(to, value_of(&targets, *value)?)?;
        }
        let mut embedding_loss = 0.0;
        if let Some(value) = self.parts[part].embedding {
            let s = device.read(pass.value(value).ok_or_else(missing)?)?.to_array().mapv(f64::from);
            let t = value_of(&targets, value)?.to_array().mapv(f64::from);
            let (loss, gradient) = similarity::loss(s.view(), t.view(), self.options.similarity);
            if !loss.is_finite() {
                // The error names the first hidden state that is not finite, where it came from.
                pass.measure()?;
                self.losses(pass)?;
                return Err(Error::invalid(format!("the loss of the embeddings is {loss}")));
            }
            embedding_loss = loss * share;
            if let Some(to) = pass.gradient(value) {
                device.write(to, &matrix_of(&(gradient * share))?)?;
            }
        }
        let mut logits_loss = 0.0;
        if let Some(head) = head {
            let rows = self.texts.real_rows(batch);
            let weight = self.options.logits.divergence * share / rows.len() as f64;
            logits_loss = head.run(&rows, weight, backward)?;
            if !logits_loss.is_finite() {
                pass.measure()?;
                self.losses(pass)?;
                return Err(Error::invalid(format!("the loss of the logits is {logits_loss}")));
            }
        }
        if backward {
            pass.backward()?;
        } else {
            pass.measure()?;
        }
        let states: f64 = self.losses(pass)?.iter().sum();
        let all = states + embedding_loss + logits_loss;
        Ok(Losses { all, embeddings: embedding_loss, logits: logits_loss })
    }

    /// The losses of a pass's hidden states. An error names the first that is not finite.
    fn losses(&self, pass: &TrainingPass) -> Result<Vec<f64>> {
        let mut losses = pass.losses()?;
        losses.sort_by_key(|(value, _)| *value);
        let check = |(value, loss): (ValueId, f64)| match loss.is_finite() {
            true => Ok(loss),
            false => {
                let name = &self.trainable.graph().value(value).name;
                Err(Error::invalid(format!("the loss of {name} is {loss}")))
            }
        };
        losses.into_iter().map(check).collect()
    }

    /// Runs the student's part forwards. Returns where its pass is.
    fn forward(&mut self, part: usize, batch: &[usize]) -> Result<usize> {
        let seq = self.texts.seq(batch);
        let at = self.prepared(part, batch.len(), seq)?;
        let StudentPass { pass, .. } = self.passes.get(at);
        pass.write(&self.texts.ids(batch))?;
        if let Some(value) = self.parts[part].input {
            let cache = self.part_cache.as_ref().and_then(|cache| cache.input.as_ref()).ok_or_else(missing)?;
            let input = cache.batch(batch, seq)?;
            self.trainable.device().write(pass.value(value).ok_or_else(missing)?, &input)?;
        }
        pass.forward()?;
        Ok(at)
    }

    /// The place of a part's pass for batches of this shape.
    fn prepared(&mut self, part: usize, batch: usize, seq: usize) -> Result<usize> {
        if let Some(at) = self.passes.find((part, batch, seq)) {
            return Ok(at);
        }
        let (trainable, of) = (&self.trainable, &self.parts[part]);
        let graph = trainable.graph();
        let of_states = match self.options.objective {
            Objective::Logits => self.options.logits.states as f32,
            Objective::States | Objective::Blocks | Objective::Embeddings => 1.0,
        };
        let weight = of_states / self.options.accumulate as f32;
        let state_targets: Vec<(ValueId, Tensor)> = of
            .states
            .iter()
            .map(|&value| Ok((value, trainable.device().zeros(batch * seq, graph.value(value).cols, DType::F32)?)))
            .collect::<Result<_>>()?;
        let states = state_targets.iter().map(|(value, target)| Target::States { value: *value, target, weight });
        let read_by_head = self.head.as_ref().map(|head| head.states());
        let given = of.embedding.into_iter().chain(read_by_head).map(Target::Given);
        let targets: Vec<Target<'_>> = states.chain(given).collect();
        let of_targets: u64 = state_targets.iter().map(|(_, target)| 4 * (target.rows() * target.cols()) as u64).sum();
        let memory = self.passes.memory().saturating_sub(of_targets);
        let bytes = of_targets + TrainingPass::bytes_of(trainable, &of.nodes, (batch, seq), &targets, memory)?;
        self.passes.make_room(bytes);
        let pass = TrainingPass::new(trainable, of.nodes.clone(), (batch, seq), &targets, memory)?;
        let bind = |head: &Arc<HeadLoss>| {
            let value = head.states();
            let wanted = state_targets.iter().find(|(of, _)| *of == value).map(|(_, target)| target);
            let (states, gradient) = (pass.value(value), pass.gradient(value));
            let (Some(states), Some(wanted), Some(gradient)) = (states, wanted, gradient) else {
                return Err(missing());
            };
            head.bind(states, wanted, gradient)
        };
        let head = self.head.as_ref().map(bind).transpose()?;
        Ok(self.passes.add((part, batch, seq), bytes, StudentPass { pass, targets: state_targets, head }))
    }

    /// Caches what part `part` needs for the texts of `batches` (of epoch 0): its input, computed by the student's part
    /// before it with its final parameters, and the teacher's targets. After a resume it does so for every part from
    /// the first on. Does nothing if the whole model is trained.
    fn start_part(&mut self, part: usize, batches: &[Vec<usize>]) -> Result<()> {
        if self.parts.len() == 1 {
            return Ok(());
        }
        let next = self.part_cache.as_ref().map_or(0, |cache| cache.part + 1);
        for part in next..=part {
            let input = match self.parts[part].input {
                None => None,
                Some(value) => {
                    let is_trained = |text: usize| !self.texts.is_held_out(text);
                    let mut cache = self.texts.room(self.trainable.graph(), value, is_trained);
                    for batch in batches {
                        let at = self.forward(part - 1, batch)?;
                        let made = self.passes.get(at).pass.value(value).ok_or_else(missing)?;
                        cache.take(batch, &self.trainable.device().read(made)?);
                    }
                    Some(cache)
                }
            };
            let before = self.part_cache.take().map(|cache| cache.targets);
            let of_part = (part, &self.parts[part]);
            let targets = self.teacher.values_of_part(of_part, &self.texts, batches, before.as_ref())?;
            self.part_cache = Some(PartCache { part, input, targets });
        }
        Ok(())
    }

    /// The mean loss of the texts that are held out. Parameters that have the least so far are kept as the result.
    pub fn evaluate(&mut self) -> Result<f64> {
        let batches: Vec<Vec<usize>> = self.texts.held_out().chunks(self.options.batch).map(<[_]>::to_vec).collect();
        let (mut sum, mut texts) = (0.0, 0);
        for batch in &batches {
            let losses = self.pass(self.parts.len() - 1, batch, false).map_err(|e| in_step(e, self.done))?;
            sum += losses.all * self.options.accumulate as f64 * batch.len() as f64;
            texts += batch.len();
        }
        let loss = sum / texts.max(1) as f64;
        if self.best.as_ref().is_none_or(|best| loss < best.loss) {
            let device = self.trainable.device();
            let values = self.trainable.trained().map(|(_, value, _)| device.read(value)).collect::<Result<_>>()?;
            self.best = Some(Best { loss, step: self.done, values });
        }
        Ok(loss)
    }

    /// The least loss on texts that are held out, and after how many steps that was.
    pub fn best(&self) -> Option<(f64, u64)> {
        self.best.as_ref().map(|best| (best.loss, best.step))
    }

    /// The student with the parameters that had the least loss on texts that are held out, or those it has now if none
    /// were measured.
    pub fn result(&self) -> Result<Checkpoint> {
        let device = self.trainable.device();
        let trained = || self.trainable.trained().map(|(_, value, _)| value);
        let Some(best) = &self.best else { return self.trainable.read() };
        let now: Vec<Matrix> = trained().map(|value| device.read(value)).collect::<Result<_>>()?;
        trained().zip(&best.values).try_for_each(|(to, best)| device.write(to, best))?;
        let result = self.trainable.read();
        trained().zip(&now).try_for_each(|(to, now)| device.write(to, now))?;
        result
    }
}

/// An error unless two models have the same operations, in the same order, on parameters of the same shapes.
fn same_graph(student: &Graph, teacher: &Graph) -> Result<()> {
    let shapes = |graph: &Graph| -> HashMap<String, (usize, usize)> {
        graph.params().map(|(_, param)| (param.name.clone(), (param.rows, param.cols))).collect()
    };
    let others = shapes(teacher);
    for (_, param) in student.params() {
        let (name, rows, cols) = (&param.name, param.rows, param.cols);
        match others.get(name) {
            Some(&shape) if shape == (rows, cols) => {}
            Some((r, c)) => {
                let reason = format!("its {name} is {r} x {c}, not {rows} x {cols}");
                return Err(Error::invalid(format!("the teacher is another model: {reason}")));
            }
            None => return Err(Error::invalid(format!("the teacher is another model: it has no {name}"))),
        }
    }
    let nodes = |graph: &Graph| -> Vec<_> {
        graph.nodes().iter().map(|node| format!("{} {:?} {:?}", node.name, node.op, node.reads)).collect()
    };
    if student.params().len() != others.len() || nodes(student) != nodes(teacher) {
        return Err(Error::invalid("the teacher is another model: it computes something else"));
    }
    Ok(())
}

/// The teacher's value of this id.
fn value_of(targets: &[(ValueId, Matrix)], value: ValueId) -> Result<&Matrix> {
    targets.iter().find(|(of, _)| *of == value).map(|(_, matrix)| matrix).ok_or_else(missing)
}

/// A mistake of this crate: passes have what they are asked for.
fn missing() -> Error {
    Error::invalid("a pass lacks a value of a part that is trained")
}

fn in_step(e: Error, step: u64) -> Error {
    Error::invalid(format!("step {step}: {e}"))
}

fn matrix_of(array: &Array2<f64>) -> Result<Matrix> {
    let numbers: Vec<f32> = array.iter().map(|&x| x as f32).collect();
    Matrix::from_f32(array.nrows(), array.ncols(), &numbers)
}
