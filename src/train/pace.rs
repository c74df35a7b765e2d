//! How long a run takes: measured before it, so that minutes become a number of steps.

use web_time::Instant;

use super::{Objective, TrainOptions, Trainer};
use crate::engine::Device;
use crate::error::Result;
use crate::graph::Checkpoint;

/// How long things take, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "report", derive(serde::Serialize))]
pub struct Pace {
    /// The student forwards in a step, with its losses.
    pub forward: f64,
    /// The student backwards.
    pub backward: f64,
    /// The optimiser, and the new form of the weights.
    pub optimiser: f64,
    /// The teacher for a batch, and with [`Objective::Blocks`] the student forwards, to where each part begins.
    pub teacher: f64,
    /// The loss of the texts that are held out.
    pub evaluation: f64,
    /// Batches of an epoch.
    batches: u64,
    /// Of these, the batches whose teacher's values are kept: for the record.
    kept: u64,
    /// What of the teacher's time for an epoch the later epochs take.
    again: f64,
    /// Parts that the steps are divided among, each with the batches of its own steps.
    parts: u64,
    /// Batches of a step.
    accumulate: u64,
}

impl Pace {
    /// Seconds of a step: the student and the optimiser.
    pub fn step(&self) -> f64 {
        self.forward + self.backward + self.optimiser
    }

    /// Seconds of a run with so many steps and evaluations.
    pub fn seconds(&self, steps: u64, evaluations: u64) -> f64 {
        let batches = steps.div_ceil(self.parts) * self.accumulate;
        let first = batches.min(self.batches);
        let taught = first as f64 + (batches - first) as f64 * self.again;
        steps as f64 * self.step() + taught * self.teacher + evaluations as f64 * self.evaluation
    }

    /// The most steps that so many seconds have room for, with as many evaluations as `evaluations` says of a number of
    /// steps; 1 at least.
    pub fn steps(&self, seconds: f64, evaluations: impl Fn(u64) -> u64) -> u64 {
        let fits = |steps: u64| self.seconds(steps, evaluations(steps)) <= seconds;
        let (mut most, mut too_many) = (1, 2);
        while fits(too_many) && too_many < u64::MAX / 2 {
            (most, too_many) = (too_many, 2 * too_many);
        }
        while too_many - most > 1 {
            let between = most + (too_many - most) / 2;
            if fits(between) {
                most = between;
            } else {
                too_many = between;
            }
        }
        most
    }
}

impl Trainer {
    /// How long a run takes, as measured on batches of every length that texts have. Trains a student that is thrown
    /// away.
    pub fn measure(
        device: &Device,
        student: &Checkpoint,
        teacher: &Checkpoint,
        texts: &[Vec<u32>],
        options: &TrainOptions,
    ) -> Result<Pace> {
        const BATCHES: usize = 8;
        // So many that each part has steps for all batches.
        const STEPS: u64 = 1 << 40;
        let mut trainer = Self::new(device, student, teacher, texts.to_vec(), STEPS, options.clone())?;
        let mut epoch = trainer.texts.first_batches().to_vec();
        let all = epoch.len() as u64;
        let is_in_parts = options.objective == Objective::Blocks;
        let tokens = |batches: &mut dyn Iterator<Item = &Vec<usize>>| {
            batches.map(|batch| trainer.texts.seq(batch) * batch.len()).sum::<usize>() as f64
        };
        let is_kept = |batch: &&Vec<usize>| is_in_parts || trainer.teacher.keeps(batch);
        let kept = epoch.iter().filter(is_kept).count() as u64;
        let again = tokens(&mut epoch.iter().filter(|batch| !is_kept(batch))) / tokens(&mut epoch.iter()).max(1.0);
        epoch.retain(|batch| batch.len() == options.batch);
        epoch.sort_by_key(|batch| trainer.texts.seq(batch));
        let chosen = BATCHES.min(epoch.len());
        let batches: Vec<_> = (0..chosen).map(|i| epoch[(2 * i + 1) * epoch.len() / (2 * chosen)].clone()).collect();
        let (mut passes, mut forwards, mut updates, mut teacher) = (0.0, 0.0, 0.0, 0.0);
        let parts = if is_in_parts { trainer.parts.len() - 1 } else { 1 };
        for part in 0..parts {
            let start = Instant::now();
            trainer.start_part(part, &batches)?;
            teacher += if is_in_parts { start.elapsed().as_secs_f64() } else { 0.0 };
            for batch in &batches {
                // Once to make room for it, and for the teacher's values.
                trainer.pass(part, batch, true)?;
                for (backward, seconds) in [(false, &mut forwards), (true, &mut passes)] {
                    let start = Instant::now();
                    for _ in 0..options.accumulate {
                        trainer.pass(part, batch, backward)?;
                    }
                    device.wait()?;
                    *seconds += start.elapsed().as_secs_f64();
                }
                let start = Instant::now();
                trainer.update(part, 1, 0.0)?;
                device.wait()?;
                updates += start.elapsed().as_secs_f64();
                if !is_in_parts {
                    let start = Instant::now();
                    trainer.teacher.compute(&trainer.parts[part], &trainer.texts, batch)?;
                    let seconds = start.elapsed().as_secs_f64();
                    teacher += seconds;
                    // Else the passes had it, too.
                    let twice = if trainer.teacher.keeps(batch) { 0.0 } else { seconds * options.accumulate as f64 };
                    (forwards, passes) = (forwards - twice, passes - twice);
                }
            }
        }
        trainer.evaluate()?;
        let start = Instant::now();
        trainer.evaluate()?;
        let each = (chosen.max(1) * parts) as f64;
        Ok(Pace {
            forward: forwards / each,
            backward: (passes - forwards) / each,
            optimiser: updates / each,
            teacher: teacher / chosen.max(1) as f64,
            evaluation: start.elapsed().as_secs_f64(),
            batches: all,
            kept,
            again,
            parts: parts as u64,
            accumulate: options.accumulate as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_fill_the_time_that_there_is() {
        let pace = Pace {
            forward: 0.125,
            backward: 0.25,
            optimiser: 0.125,
            teacher: 0.25,
            evaluation: 2.0,
            batches: 100,
            kept: 100,
            again: 0.0,
            parts: 1,
            accumulate: 1,
        };
        // 100 steps with the teacher, and 42 without.
        assert_eq!(pace.steps(100.0, |_| 2), 142);
        assert_eq!(pace.seconds(142, 2), 100.0);
        assert_eq!(Pace { kept: 0, again: 1.0, ..pace }.steps(100.0, |_| 2), 128);
        // Half of the teacher's time is spent again.
        assert_eq!(Pace { kept: 60, again: 0.5, ..pace }.seconds(140, 2), 104.0);
        assert_eq!(pace.steps(0.1, |_| 2), 1);
        // Four parts have the same 30 batches.
        let parts = Pace { parts: 4, ..pace };
        assert_eq!(parts.seconds(120, 0), 67.5);
        // Two batches to a step: after 50 steps all are kept.
        let twice = Pace { accumulate: 2, ..pace };
        assert_eq!((twice.seconds(40, 0), twice.seconds(60, 0)), (40.0, 55.0));
    }
}
