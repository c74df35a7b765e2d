//! A run of retraining with its progress, its checkpoint and what is reported of it: of `retrain`, and of `prune
//! --retrain`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cli::{progress, say};
use sparse24::Device;
use sparse24::graph::Checkpoint;
use sparse24::train::{Objective, Pace, Step, TrainOptions, Trainer};

/// How long a run is.
#[derive(Clone, Copy)]
pub(in crate::cli) enum Length {
    Steps(u64),
    Epochs(f64),
    /// Until then, measured from the start of [`Training::run`].
    Minutes(f64),
}

/// What a run needs. Both models end in embeddings, if the device computes them.
pub(in crate::cli) struct Training<'a> {
    pub(in crate::cli) device: &'a Device,
    pub(in crate::cli) student: &'a Checkpoint,
    pub(in crate::cli) teacher: &'a Checkpoint,
    pub(in crate::cli) texts: Vec<Vec<u32>>,
    pub(in crate::cli) length: Length,
    pub(in crate::cli) options: TrainOptions,
    /// The file that an interrupted run goes on from, and how often it is written.
    pub(in crate::cli) checkpoint: Option<(&'a Path, Duration)>,
}

/// What is known of a run so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(in crate::cli) struct History {
    pub(super) steps: Vec<Step>,
    /// After how many steps the texts that are held out had which loss.
    pub(super) held_out: Vec<(u64, f64)>,
    /// Of all sittings, evaluations included.
    seconds: f64,
}

impl History {
    /// Whether the loss on texts that are held out has risen for good: half of the steps or more are done, and the last
    /// three losses are all above the least before them. Earlier than that the learning rate is high, and it may still
    /// fall.
    fn has_turned(&self, steps: u64) -> bool {
        const LAST: usize = 3;
        if (self.steps.len() as u64) < steps / 2 {
            return false;
        }
        let Some(before) = self.held_out.len().checked_sub(LAST).filter(|&before| before > 0) else { return false };
        let (before, last) = self.held_out.split_at(before);
        let least = before.iter().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
        last.iter().all(|(_, loss)| *loss > least)
    }
}

/// What is reported of a run.
#[derive(Clone, Debug, Serialize)]
pub(in crate::cli) struct Summary {
    /// Texts that were trained on, and those that were held out.
    texts: usize,
    held_out_texts: usize,
    objective: &'static str,
    batch: usize,
    learning_rate: f64,
    seed: u64,
    /// The steps of the whole run, which those that were done may be fewer than.
    planned_steps: u64,
    /// Seconds, as measured before the run, where minutes were asked for.
    pace: Option<Pace>,
    best_step: u64,
    best_loss: f64,
    #[serde(flatten)]
    pub(super) history: History,
}

impl Training<'_> {
    /// Retrains the student. Returns the parameters with the least loss on texts that are held out.
    pub(in crate::cli) fn run(self) -> Result<(Checkpoint, Summary)> {
        let Self { device, student, teacher, texts, length, options, checkpoint } = self;
        let start = Instant::now();
        let (steps, pace) = match length {
            Length::Steps(steps) => (steps, None),
            Length::Epochs(epochs) => {
                let each = Trainer::steps_of_epoch(texts.len(), &options)? as f64;
                (((epochs * each).round() as u64).max(1), None)
            }
            // What the first sitting measured.
            Length::Minutes(_) if checkpoint.is_some_and(|(path, _)| path.exists()) => {
                let path = checkpoint.map_or(Path::new(""), |(path, _)| path);
                (Trainer::steps_of(path).context("--checkpoint")?, None)
            }
            Length::Minutes(minutes) => {
                let pace = Trainer::measure(device, student, teacher, &texts, &options)?;
                let left = minutes * 60.0 - start.elapsed().as_secs_f64();
                let steps = pace.steps(left, |steps| evaluations(steps) + 1);
                say(&format!(
                    "retraining: {minutes} minutes have room for {steps} steps of {:.2} s (forwards {:.2}, backwards {:.2}, \
                     optimiser {:.2}), and {:.2} s of the teacher for each batch: --steps {steps}",
                    pace.step(),
                    pace.forward,
                    pace.backward,
                    pace.optimiser,
                    pace.teacher
                ));
                (steps, Some(pace))
            }
        };
        let TrainOptions { objective, batch, learning_rate, seed, .. } = options;
        let mut trainer = Trainer::new(device, student, teacher, texts, steps, options)?;
        let mut history = History::default();
        if let Some((path, _)) = checkpoint.filter(|(path, _)| path.exists()) {
            history = serde_json::from_str(&trainer.resume(path).context("--checkpoint")?).context("--checkpoint")?;
            say(&format!("{}: going on after step {} of {steps}", path.display(), trainer.done()));
        }
        let keep = |trainer: &Trainer, history: &History| match checkpoint {
            Some((path, _)) => Ok::<_, anyhow::Error>(trainer.save(path, &serde_json::to_string(history)?)?),
            None => Ok(()),
        };
        let bar = progress(steps as usize);
        let every = steps.div_ceil(evaluations(steps)).max(1);
        let before = history.seconds;
        let start = Instant::now();
        let mut saved = Instant::now();
        bar.set_position(trainer.done());
        bar.reset_eta();
        if history.held_out.is_empty() {
            history.held_out.push((0, trainer.evaluate()?));
        }
        // Parts that are trained one after the other are all to have their steps.
        while objective == Objective::Blocks || !history.has_turned(steps) {
            // What a run that stops here, by itself or not, is to go on from is the state before this step.
            let step = trainer.step().inspect_err(|_| {
                let _ = keep(&trainer, &history);
            })?;
            let Some(step) = step else { break };
            history.steps.push(step);
            bar.set_position(step.number);
            bar.set_message(format!("loss {:.4}", step.loss));
            if step.number.is_multiple_of(every) || step.number == steps {
                history.held_out.push((step.number, trainer.evaluate()?));
            }
            history.seconds = before + start.elapsed().as_secs_f64();
            if checkpoint.is_some_and(|(_, each)| saved.elapsed() >= each) {
                keep(&trainer, &history)?;
                saved = Instant::now();
            }
        }
        keep(&trainer, &history)?;
        bar.finish_and_clear();
        let [texts, held_out_texts] = trainer.texts();
        let (best_loss, best_step) = trainer.best().context("no evaluation was made")?;
        let objective = objective.name();
        let summary = Summary {
            texts,
            held_out_texts,
            objective,
            batch,
            learning_rate,
            seed,
            planned_steps: steps,
            pace,
            best_step,
            best_loss,
            history,
        };
        Ok((trainer.result()?, summary))
    }
}

impl Summary {
    /// The losses, and what the run was.
    pub(in crate::cli) fn text(&self) -> String {
        let Self { planned_steps, texts, held_out_texts, best_step, best_loss, history, .. } = self;
        let mut text = String::new();
        for (step, loss) in &history.held_out {
            text += &format!("step {step:>6}: loss on held-out texts {loss:.4}\n");
        }
        let (done, minutes) = (history.steps.len(), history.seconds / 60.0);
        let early = match (done as u64) < *planned_steps {
            true => format!(" of {planned_steps}, as the last losses were all above the least,"),
            false => String::new(),
        };
        text + &format!(
            "retrained: {done} steps{early} on {texts} texts ({held_out_texts} held out) in {minutes:.1} minutes; the \
             least loss, {best_loss:.4}, is that of step {best_step}\n"
        )
    }
}

/// Evaluations of a run of so many steps.
fn evaluations(steps: u64) -> u64 {
    (steps / 100).clamp(2, 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_stops_when_the_loss_on_held_out_texts_only_rises() {
        let turned = |losses: &[f64]| {
            let held_out = losses.iter().enumerate().map(|(i, &loss)| (i as u64, loss)).collect();
            History { held_out, ..History::default() }.has_turned(1)
        };
        assert!(!turned(&[]) && !turned(&[3.0, 4.0, 5.0]) && !turned(&[4.0, 3.0, 3.1, 3.2]));
        assert!(turned(&[4.0, 3.0, 3.1, 3.2, 3.3]) && turned(&[1.0, 9.0, 8.0, 7.0]));
        assert!(!turned(&[4.0, 3.0, 3.1, 2.9, 3.3]) && !turned(&[9.0, 8.0, 7.0, 6.0, 5.0]));
        let held_out = [1.0, 2.0, 2.0, 2.0].into_iter().enumerate().map(|(i, loss)| (i as u64, loss)).collect();
        let early = History { held_out, ..History::default() };
        assert!(early.has_turned(1) && !early.has_turned(4));
    }
}
