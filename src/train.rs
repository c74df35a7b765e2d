//! Retraining: a pruned model learns from the dense one what pruning took from it.
//!
//! The dense model is the teacher: on unlabelled text the pruned one, the student, is to have the same states and the same
//! embeddings. Only what is kept is trained, so a 2:4 model stays 2:4.
//!
//! ```text
//!   token ids ──order──► batches of like length, mixed anew in every epoch           train/order.rs
//!                            │
//!              ┌─────────────┴──────────────┐
//!        teacher: graph::Model      student: graph::TrainingPass, forwards
//!              │ states, embeddings         │ states, embeddings
//!              └────────►  losses  ◄────────┘        RelativeError on the device; similarity on the host
//!                            │ gradients of states and embeddings
//!                     student, backwards ──► gradients of what is kept
//!                            │ SumSquares: clipped together
//!                          AdamW ──► Repack: the form of the products
//! ```
//! The learning rate rises in a straight line over the first tenth of the steps and falls along half a cosine to nothing:
//! so the number of steps is fixed before the first, and what a resumed run is to go on with. Some of the texts are held
//! out; the parameters that had the least loss on them are the result.
//!
//! On the CPU device a run is the same to the bit whatever the number of threads, and whether it was interrupted or not:
//! what it goes on from is a file ([`Trainer::save`]) with parameters, the optimiser's state and the number of the step.
//! Invariant: between steps all gradients are zero, and the form that products read is that of the values.

mod order;
pub mod similarity;
mod state;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use ndarray::Array2;

use self::similarity::SimilarityWeights;
use crate::engine::{Device, Prepared, Tensor};
use crate::error::{Error, Result};
use crate::graph::{Checkpoint, Forward, Graph, Model, Rows, Target, Trainable, TrainingPass, ValueId};
use crate::matrix::{DType, Matrix};
use crate::ops::adamw::{AdamW, AdamWStep};
use crate::ops::sum_squares::SumSquares;

/// What the student is to have from the teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The states between the parts of all blocks, and the embeddings.
    States,
    /// The embeddings alone.
    Embeddings,
}

/// How a model is retrained.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// What the student is to have from the teacher.
    pub objective: Objective,
    /// Texts of a step.
    pub batch: usize,
    /// Batches that a step adds up, one after the other: for more texts than memory has room for.
    pub accumulate: usize,
    /// Largest learning rate.
    pub rate: f64,
    /// Share of the steps in which the rate rises.
    pub warm_up: f64,
    /// AdamW's β₁ and β₂.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// AdamW's weight decay.
    pub decay: f64,
    /// Gradients whose length, all together, is more than this are shortened to it.
    pub clip: f64,
    /// What embeddings count beside the states of a layer.
    pub similarity: SimilarityWeights,
    /// Share of the texts that are held out.
    pub held_out: f64,
    /// Most texts that are held out: as many as say which parameters are best, in seconds.
    pub most_held_out: usize,
    /// Seed of the order of texts.
    pub seed: u64,
    /// Bytes that a batch's values and gradients may take; values are computed twice where that is too little.
    pub memory: u64,
}

impl Default for Options {
    /// What MiniLM and MPNet were retrained with.
    fn default() -> Self {
        Self {
            objective: Objective::States,
            batch: 32,
            accumulate: 1,
            rate: 4e-4,
            warm_up: 0.1,
            betas: [0.9, 0.98],
            eps: 1e-8,
            decay: 0.0,
            clip: 1.0,
            similarity: SimilarityWeights { cosine: 4.0, pairs: 4.0 },
            held_out: 0.1,
            most_held_out: 256,
            seed: 24,
            memory: 1 << 30,
        }
    }
}

/// What a step was.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub struct Step {
    /// Its number, from 1.
    pub number: u64,
    /// The loss of its batch, before it.
    pub loss: f64,
    /// Of it, that of the embeddings.
    pub similarity: f64,
    /// The learning rate.
    pub rate: f64,
    /// The length of all gradients together, before they were shortened.
    pub gradient: f64,
}

/// How long things take, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// A step.
    pub step: f64,
    /// The loss of the texts that are held out.
    pub evaluation: f64,
}

/// A student on its way.
#[derive(Debug)]
pub struct Trainer {
    options: Options,
    /// Steps of the whole run.
    steps: u64,
    /// Steps that are done.
    done: u64,
    trainable: Arc<Trainable>,
    teacher: Model,
    /// Where the states are compared.
    states: Vec<ValueId>,
    /// The embeddings, if the model has them.
    embedding: Option<ValueId>,
    texts: Vec<Vec<u32>>,
    held_out: Vec<Vec<u32>>,
    moments: Vec<[Tensor; 2]>,
    update: Vec<Prepared>,
    norms: Vec<Prepared>,
    sums: Tensor,
    step: Tensor,
    /// The epoch whose batches these are.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
    passes: Vec<Pass>,
    best: Option<Best>,
    /// What a file of another run differs in.
    identity: u64,
}

/// The parameters with the least loss on texts that are held out.
#[derive(Clone, Debug)]
struct Best {
    loss: f64,
    step: u64,
    values: Vec<Matrix>,
}

/// Both models for batches of one shape.
#[derive(Debug)]
struct Pass {
    batch: usize,
    seq: usize,
    teacher: Forward,
    student: TrainingPass,
}

/// What padding goes to: shapes that occur again.
const PADDED: usize = 8;

impl Trainer {
    /// A student of a teacher, which has the same graph, on texts given as token ids; `steps` steps are the whole run. Both
    /// are f32. An error if the graphs differ, or there are too few texts to hold some out.
    pub fn new(
        device: &Device,
        student: &Checkpoint,
        teacher: &Checkpoint,
        texts: Vec<Vec<u32>>,
        steps: u64,
        options: Options,
    ) -> Result<Self> {
        let graph = Arc::clone(student.graph());
        same_graph(&graph, teacher.graph())?;
        for (i, text) in texts.iter().enumerate() {
            graph.check_ids(text).map_err(|e| e.of_text(i))?;
        }
        let [texts, held_out] = split(texts, &options)?;
        let trainable = Arc::new(Trainable::new(device, student, &graph.trained_params())?);
        let step = device.zeros(1, AdamWStep::LEN, DType::F32)?;
        let (mut moments, mut update, mut norms, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let parts: usize = trainable.trained().map(|(_, _, gradient)| SumSquares::parts(gradient)).sum();
        let sums = device.zeros(1, parts, DType::F32)?;
        for (_, w, gradient) in trainable.trained() {
            let zeros = || device.zeros(w.rows(), w.cols(), DType::F32);
            let [m, v] = [zeros()?, zeros()?];
            update.push(device.prepare(&AdamW { w, gradient, m: &m, v: &v, step: &step })?);
            norms.push(device.prepare(&SumSquares { x: gradient, y: &sums, first })?);
            first += SumSquares::parts(gradient);
            moments.push([m, v]);
        }
        update.extend(trainable.repack()?);
        let states = match options.objective {
            Objective::States => graph.states(),
            Objective::Embeddings => Vec::new(),
        };
        let last = graph.outputs().last().copied();
        let embedding = last.filter(|&value| graph.value(value).rows == Rows::Sequences);
        if embedding.is_none() && states.is_empty() {
            return Err(Error::Invalid("the model has no embeddings on the device to compare".into()));
        }
        let identity = state::identity(student, &texts, steps, &options)?;
        Ok(Self {
            steps,
            done: 0,
            teacher: Model::new(device, teacher)?,
            trainable,
            states,
            embedding,
            texts,
            held_out,
            moments,
            update,
            norms,
            sums,
            step,
            epoch: None,
            passes: Vec::new(),
            best: None,
            identity,
            options,
        })
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Steps that are done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Texts that are trained on, and those that are held out.
    pub fn texts(&self) -> [usize; 2] {
        [self.texts.len(), self.held_out.len()]
    }

    /// Steps in which every text is trained on once.
    pub fn steps_of_epoch(texts: usize, options: &Options) -> u64 {
        texts.div_ceil(options.batch * options.accumulate) as u64
    }

    /// Seconds that a step takes, as measured on batches of every length that texts have, and an evaluation: to fix the
    /// number of steps by. Trains a student that is thrown away.
    pub fn measure(
        device: &Device,
        student: &Checkpoint,
        teacher: &Checkpoint,
        texts: &[Vec<u32>],
        options: &Options,
    ) -> Result<Pace> {
        // Each is run once before it is timed.
        const BATCHES: usize = 8;
        let mut trainer = Self::new(device, student, teacher, texts.to_vec(), u64::MAX, options.clone())?;
        let longest = |batch: &Vec<usize>| batch.iter().map(|&text| trainer.texts[text].len()).max().unwrap_or(0);
        let lengths: Vec<usize> = trainer.texts.iter().map(Vec::len).collect();
        let mut batches = order::epoch(&lengths, options.batch, options.seed, 0);
        batches.retain(|batch| batch.len() == options.batch);
        batches.sort_by_key(longest);
        let chosen = BATCHES.min(batches.len());
        let batches: Vec<_> =
            (0..chosen).map(|i| batches[(2 * i + 1) * batches.len() / (2 * chosen)].clone()).collect();
        let mut seconds = 0.0;
        for batch in &batches {
            for is_timed in [false, true] {
                let start = Instant::now();
                for _ in 0..options.accumulate {
                    let texts: Vec<Vec<u32>> = batch.iter().map(|&text| trainer.texts[text].clone()).collect();
                    trainer.pass(&texts, true)?;
                }
                trainer.update(0.0)?;
                device.wait()?;
                seconds += if is_timed { start.elapsed().as_secs_f64() } else { 0.0 };
            }
        }
        let start = Instant::now();
        trainer.evaluate()?;
        Ok(Pace { step: seconds / chosen.max(1) as f64, evaluation: start.elapsed().as_secs_f64() })
    }

    /// The learning rate of a step, counted from 0.
    fn rate(&self, step: u64) -> f64 {
        let Options { rate, warm_up, .. } = self.options;
        let (at, steps) = (step as f64 + 0.5, self.steps as f64);
        let rising = (warm_up * steps).max(1.0);
        if at < rising {
            return rate * at / rising;
        }
        let gone = (at - rising) / (steps - rising).max(1.0);
        rate * 0.5 * (1.0 + (std::f64::consts::PI * gone.min(1.0)).cos())
    }

    /// One step: a batch forwards and backwards, and the optimiser. `None` when all are done. An error if the loss is no
    /// number, which names the step and the first state that is none: parameters are then as they were before.
    pub fn step(&mut self) -> Result<Option<Step>> {
        if self.done >= self.steps {
            return Ok(None);
        }
        let number = self.done + 1;
        let (mut loss, mut similarity) = (0.0, 0.0);
        let accumulate = self.options.accumulate as u64;
        for part in 0..accumulate {
            let batch = self.batch(self.done * accumulate + part);
            let texts: Vec<Vec<u32>> = batch.iter().map(|&text| self.texts[text].clone()).collect();
            let [all, of_similarity] = self.pass(&texts, true).map_err(|e| in_step(e, number))?;
            loss += all;
            similarity += of_similarity;
        }
        let rate = self.rate(self.done);
        let gradient = self.update(rate).map_err(|e| in_step(e, number))?;
        self.done = number;
        Ok(Some(Step { number, loss, similarity, rate, gradient }))
    }

    /// The optimiser's part of a step. Returns the length of all gradients together.
    fn update(&mut self, rate: f64) -> Result<f64> {
        let device = self.trainable.device();
        device.submit(&self.norms)?;
        let squares: f64 = device.read(&self.sums)?.elements().to_f32().iter().map(|&x| f64::from(x)).sum();
        let gradient = squares.sqrt();
        if !gradient.is_finite() {
            return Err(Error::Invalid(format!("the gradient's length is {gradient}")));
        }
        let Options { betas, eps, decay, clip, .. } = self.options;
        let factor = if gradient > clip { clip / gradient } else { 1.0 };
        let numbers = AdamWStep { number: self.done + 1, rate, factor, betas, eps, decay };
        device.write(&self.step, &numbers.to_matrix()?)?;
        device.submit(&self.update)?;
        Ok(gradient)
    }

    /// The texts of batch number `at` since the start.
    fn batch(&mut self, at: u64) -> Vec<usize> {
        let lengths = || self.texts.iter().map(Vec::len).collect::<Vec<_>>();
        let of_epoch = self.texts.len().div_ceil(self.options.batch) as u64;
        let (epoch, place) = (at / of_epoch, at % of_epoch);
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, order::epoch(&lengths(), self.options.batch, self.options.seed, epoch)));
        }
        self.epoch.as_ref().map(|(_, batches)| batches[place as usize].clone()).unwrap_or_default()
    }

    /// What some texts add to the loss of a step, and of it what their embeddings do; with `backward` their gradients are
    /// added to those that are there.
    fn pass(&mut self, texts: &[Vec<u32>], backward: bool) -> Result<[f64; 2]> {
        let share = 1.0 / self.options.accumulate as f64;
        let device = self.trainable.device().clone();
        let longest = texts.iter().map(Vec::len).max().unwrap_or(1);
        let seq = longest.next_multiple_of(PADDED).min(self.trainable.graph().limits().tokens.max(longest));
        let at = self.prepared(texts.len(), seq)?;
        let Pass { teacher, student, .. } = &self.passes[at];
        teacher.write(texts)?;
        teacher.run()?;
        student.write(texts)?;
        student.forward()?;
        let mut similarity = 0.0;
        if let Some(value) = self.embedding {
            let read = |tensor: Option<&Tensor>| {
                let missing = || Error::Invalid("a pass lacks the embeddings".into());
                Ok::<_, Error>(device.read(tensor.ok_or_else(missing)?)?.to_array().mapv(f64::from))
            };
            let (s, t) = (read(student.value(value))?, read(teacher.tap(value))?);
            let (loss, gradient) = similarity::loss(s.view(), t.view(), self.options.similarity);
            if !loss.is_finite() {
                return Err(Error::Invalid(format!("the loss of the embeddings is {loss}")));
            }
            similarity = loss * share;
            if let Some(to) = student.gradient(value) {
                device.write(to, &matrix_of(&(gradient * share))?)?;
            }
        }
        if backward {
            student.backward()?;
        } else {
            student.measure()?;
        }
        let losses = student.losses()?;
        for (value, loss) in losses.iter() {
            if !loss.is_finite() {
                let name = &self.trainable.graph().value(*value).name;
                return Err(Error::Invalid(format!("the loss of {name} is {loss}")));
            }
        }
        let states: f64 = losses.iter().map(|(_, loss)| loss).sum();
        Ok([states + similarity, similarity])
    }

    /// The place of the passes for batches of this shape.
    fn prepared(&mut self, batch: usize, seq: usize) -> Result<usize> {
        if let Some(at) = self.passes.iter().position(|pass| (pass.batch, pass.seq) == (batch, seq)) {
            // The shape used last is the last to give way.
            let pass = self.passes.remove(at);
            self.passes.push(pass);
            return Ok(self.passes.len() - 1);
        }
        let weight = 1.0 / self.options.accumulate as f32;
        let mut taps = self.states.clone();
        taps.extend(self.embedding);
        let teacher = self.teacher.tapped(&taps, batch, seq)?;
        let states =
            self.states.iter().filter_map(|&value| Some(Target::States { value, target: teacher.tap(value)?, weight }));
        let targets: Vec<Target<'_>> = states.chain(self.embedding.map(Target::Given)).collect();
        let nodes = 0..self.trainable.graph().nodes().len();
        let student = TrainingPass::new(&self.trainable, nodes, (batch, seq), &targets, self.options.memory)?;
        let mut all = student.bytes() + self.passes.iter().map(|pass| pass.student.bytes()).sum::<u64>();
        while all > self.options.memory && !self.passes.is_empty() {
            all -= self.passes.remove(0).student.bytes();
        }
        self.passes.push(Pass { batch, seq, teacher, student });
        Ok(self.passes.len() - 1)
    }

    /// The mean loss of the texts that are held out. Parameters that have the least so far are kept as the result.
    pub fn evaluate(&mut self) -> Result<f64> {
        let batches: Vec<Vec<Vec<u32>>> = self.held_out.chunks(self.options.batch).map(<[_]>::to_vec).collect();
        let (mut sum, mut texts) = (0.0, 0);
        for batch in &batches {
            let [loss, _] = self.pass(batch, false).map_err(|e| in_step(e, self.done))?;
            sum += loss * self.options.accumulate as f64 * batch.len() as f64;
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

/// The texts that are trained on, and those that are held out: every so manyth, up to the most.
fn split(texts: Vec<Vec<u32>>, options: &Options) -> Result<[Vec<Vec<u32>>; 2]> {
    let wanted = ((texts.len() as f64 * options.held_out) as usize).min(options.most_held_out);
    if wanted == 0 || texts.len() < 2 * options.batch {
        return Err(Error::Invalid(format!(
            "{} texts are too few to retrain on: {} are needed, of which some are held out",
            texts.len(),
            (2 * options.batch).max((1.0 / options.held_out).ceil() as usize)
        )));
    }
    let every = texts.len() / wanted;
    let (mut kept, mut held_out) = (Vec::new(), Vec::new());
    for (i, text) in texts.into_iter().enumerate() {
        if i % every == 0 && held_out.len() < wanted { held_out.push(text) } else { kept.push(text) }
    }
    held_out.sort_by_key(Vec::len);
    Ok([kept, held_out])
}

/// An error unless two models compute the same from parameters of the same shapes.
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
                return Err(Error::Invalid(format!("the teacher is another model: {reason}")));
            }
            None => return Err(Error::Invalid(format!("the teacher is another model: it has no {name}"))),
        }
    }
    let names = |graph: &Graph| graph.nodes().iter().map(|node| node.name.clone()).collect::<Vec<_>>();
    if student.params().len() != others.len() || names(student) != names(teacher) {
        return Err(Error::Invalid("the teacher is another model: it computes something else".into()));
    }
    Ok(())
}

fn in_step(e: Error, step: u64) -> Error {
    Error::Invalid(format!("step {step}: {e}"))
}

fn matrix_of(array: &Array2<f64>) -> Result<Matrix> {
    let numbers: Vec<f32> = array.iter().map(|&x| x as f32).collect();
    Matrix::from_f32(array.nrows(), array.ncols(), &numbers)
}
