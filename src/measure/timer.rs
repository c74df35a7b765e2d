//! The one timer of calls that can run again and again: how they are warmed up, what makes a sample, and when there are
//! enough samples.
//!
//! A [`Workload`] is a list of calls, and how many of them make a *pass*. A kernel's calls on many sets of operands are
//! a rotation: each is a pass. The calls of a model are one pass together. [`Timer::calibrate`] runs a workload for
//! [`Policy::warm_up`] and finds how many passes take [`Policy::sample`]. [`Timer::sample_in_turns`] then takes one
//! sample of each workload in every round, so that a machine that slows down slows all alike, and goes on by the rule
//! of [`noise`].
//!
//! A sample must be long beside the clock's resolution and the cost of a submission. Where the machine has become
//! faster since the calibration, a sample can turn out too short. It does not count then, and is taken again with more
//! passes.
//!
//! Work that is done once is not timed here: a batch of texts, a step of training, a search. How long it took is a
//! duration on the host's clock, without a spread.
//!
//! Invariant: no sample is shorter than the policy's, but for workloads without calls.

use std::time::Duration;

use super::noise::{self, Estimate};
use super::{MeasuredTimes, Policy, Summary};
use crate::engine::{Clock, Device, Prepared, Timing};
use crate::error::{Error, Result};

/// A sample with more calls than this means that the clock does not run.
const MAX_CALLS: usize = 1 << 22;

/// Times workloads on a device.
///
/// ```
/// use sparse24::measure::{Policy, Timer, Workload, noise::Estimate};
/// use sparse24::{DType, Device, LayerNorm, Matrix};
/// let device = Device::cpu()?;
/// let (gamma, beta) = (device.zeros(1, 64, DType::F32)?, device.zeros(1, 64, DType::F32)?);
/// let mut workloads = Vec::new();
/// for rows in [8, 800] {
///     let x = device.upload(&Matrix::uniform(rows, 64, DType::F32, 24)?)?;
///     let y = device.zeros(rows, 64, DType::F32)?;
///     let norm = LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps: 1e-6, y: &y };
///     workloads.push(Workload::pass([device.prepare(&norm)?]));
/// }
/// let timer = Timer::new(&device, Policy::QUICK);
/// workloads.iter_mut().try_for_each(|workload| timer.calibrate(workload))?;
/// timer.sample_in_turns(&mut workloads, |_| {})?;
/// let [few, many] = [0, 1].map(|i| workloads[i].seconds());
/// assert_eq!((few.len(), many.len()), (3, 3));
/// let slower = Estimate::of_ratio(many, few).map(|ratio| ratio.value);
/// assert!(slower > Some(1.0), "{slower:?}");
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Timer<'a> {
    device: &'a Device,
    policy: Policy,
}

/// Calls that are timed over and over, and their samples so far.
#[derive(Clone, Debug)]
pub struct Workload {
    is_part: bool,
    calls: Vec<Prepared>,
    calls_per_pass: usize,
    passes: usize,
    /// The call that the next sample begins with.
    next: usize,
    clock: Option<Clock>,
    seconds: Vec<f64>,
}

impl Workload {
    /// A pass is one of these calls: that which follows the last one's.
    pub fn rotation(calls: impl IntoIterator<Item = Prepared>) -> Self {
        Self::new(calls.into_iter().collect(), 1)
    }

    /// A pass is all of these calls. Without any it takes no time.
    pub fn pass(calls: impl IntoIterator<Item = Prepared>) -> Self {
        let calls: Vec<_> = calls.into_iter().collect();
        let calls_per_pass = calls.len();
        Self::new(calls, calls_per_pass)
    }

    fn new(calls: Vec<Prepared>, calls_per_pass: usize) -> Self {
        Self { is_part: false, calls, calls_per_pass, passes: 1, next: 0, clock: None, seconds: Vec::new() }
    }

    /// The same as a part of another workload, whose share of it is asked for: its noise is no reason for more samples.
    pub fn as_part(self) -> Self {
        Self { is_part: true, ..self }
    }

    /// Seconds of a pass in each sample, in the order of the rounds.
    pub fn seconds(&self) -> &[f64] {
        &self.seconds
    }

    /// The median of these, and what they leave open; `None` where there are none.
    pub fn median(&self) -> Option<Estimate> {
        Estimate::of_median(&self.seconds)
    }

    /// All that a record has of them.
    pub fn times(&self) -> MeasuredTimes {
        let (median, spread) = (self.median(), self.summary());
        let ms = |seconds: f64| seconds * 1e3;
        MeasuredTimes {
            median_ms: spread.map(|s| ms(s.median)),
            min_ms: spread.map(|s| ms(s.min)),
            max_ms: spread.map(|s| ms(s.max)),
            q1_ms: spread.map(|s| ms(s.q1)),
            q3_ms: spread.map(|s| ms(s.q3)),
            median_low_ms: median.map(|m| ms(m.interval.low)),
            median_high_ms: median.map(|m| ms(m.interval.high)),
            noisy: median.is_some_and(|m| m.noisy),
            samples: self.seconds.len(),
            calls_per_sample: if self.seconds.is_empty() { 0 } else { self.passes },
        }
    }

    /// How these spread; `None` where there are none.
    pub fn summary(&self) -> Option<Summary> {
        Summary::of(&mut self.seconds.clone())
    }

    /// Passes in a sample, now.
    pub fn passes(&self) -> usize {
        self.passes
    }

    /// The clock of the samples; `None` where there are none.
    pub fn clock(&self) -> Option<Clock> {
        self.clock
    }

    /// Gives up the calls, and their memory on the device: there are no more samples.
    pub(super) fn release(&mut self) {
        self.calls = Vec::new();
    }

    /// Seconds that the next sample should take.
    pub(super) fn expected(&self) -> f64 {
        self.seconds.last().map_or(0.0, |pass| pass * self.passes as f64)
    }

    /// Runs a sample's calls, and the next time those after them.
    async fn run(&mut self, device: &Device) -> Result<Timing> {
        let count = self.passes * self.calls_per_pass;
        let timing = device.time_async(self.calls.iter().cycle().skip(self.next).take(count)).await?;
        self.next = (self.next + count) % self.calls.len().max(1);
        Ok(timing)
    }

    /// Runs for so long that it is a sample, with as many passes as that takes, and says how long all of it took, too.
    async fn run_for(
        &mut self,
        sample: Duration,
        run: impl AsyncFn(&mut Self) -> Result<Timing>,
    ) -> Result<(Timing, Duration)> {
        let mut spent = Duration::ZERO;
        loop {
            let timing = run(self).await?;
            spent += timing.elapsed;
            if timing.elapsed >= sample || self.calls.is_empty() {
                return Ok((timing, spent));
            }
            self.lengthen(timing.elapsed, sample)?;
        }
    }

    /// More passes in a sample than now, which took `elapsed`: at most eightfold, for a first one can be slow; a fifth
    /// more than seems needed, so that few samples fall short.
    fn lengthen(&mut self, elapsed: Duration, sample: Duration) -> Result<()> {
        let wanted = 1.2 * sample.as_secs_f64() / elapsed.as_secs_f64().max(1e-9);
        self.passes = (self.passes as f64 * wanted.clamp(1.2, 8.0)).ceil() as usize;
        if self.passes.saturating_mul(self.calls_per_pass) > MAX_CALLS {
            return Err(Error::invalid(format!("{MAX_CALLS} calls take less than {sample:?}")));
        }
        Ok(())
    }
}

impl<'a> Timer<'a> {
    /// A timer of workloads of this device.
    pub fn new(device: &'a Device, policy: Policy) -> Self {
        Self { device, policy }
    }

    /// [`Workload::run_for`] a sample on the device.
    async fn run(&self, workload: &mut Workload) -> Result<(Timing, Duration)> {
        workload.run_for(self.policy.sample, async |workload: &mut Workload| workload.run(self.device).await).await
    }

    /// Warms a workload up, and finds how many passes make a sample.
    pub fn calibrate(&self, workload: &mut Workload) -> Result<()> {
        pollster::block_on(self.calibrate_async(workload))
    }

    /// [`Timer::calibrate`] where nothing may block.
    pub async fn calibrate_async(&self, workload: &mut Workload) -> Result<()> {
        let mut spent = self.run(workload).await?.1;
        while spent < self.policy.warm_up && !workload.calls.is_empty() {
            spent += self.run(workload).await?.1;
        }
        Ok(())
    }

    /// Takes a sample, and returns the seconds of a pass.
    pub fn sample(&self, workload: &mut Workload) -> Result<f64> {
        pollster::block_on(self.sample_async(workload))
    }

    async fn sample_async(&self, workload: &mut Workload) -> Result<f64> {
        let (Timing { elapsed, clock }, _) = self.run(workload).await?;
        let seconds = elapsed.as_secs_f64() / workload.passes as f64;
        workload.seconds.push(seconds);
        workload.clock = Some(clock);
        Ok(seconds)
    }

    /// Samples workloads in turns: as many rounds as the policy asks for, those counted that all have already, and more
    /// while one is [noisy](noise). At the policy's deadline they have the samples that there was time for, one at
    /// least. `progress` is called with the number of rounds done.
    pub fn sample_in_turns<'w>(
        &self,
        workloads: impl IntoIterator<Item = &'w mut Workload>,
        progress: impl FnMut(usize),
    ) -> Result<()> {
        pollster::block_on(self.sample_in_turns_async(workloads, progress))
    }

    /// [`Timer::sample_in_turns`] where nothing may block.
    pub async fn sample_in_turns_async<'w>(
        &self,
        workloads: impl IntoIterator<Item = &'w mut Workload>,
        mut progress: impl FnMut(usize),
    ) -> Result<()> {
        let mut workloads: Vec<_> = workloads.into_iter().collect();
        let mut rounds = workloads.iter().map(|workload| workload.seconds.len()).min().unwrap_or(0);
        let watched = |workloads: &[&mut Workload], rounds| {
            let samples = workloads.iter().filter(|workload| !workload.is_part).map(|workload| workload.seconds());
            noise::wants_more(&self.policy, rounds, samples)
        };
        while watched(&workloads, rounds) {
            for workload in &mut workloads {
                if workload.seconds.is_empty() || self.policy.has_time_for(workload.expected()) {
                    self.sample_async(workload).await?;
                }
            }
            rounds += 1;
            progress(rounds);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use web_time::Instant;

    use super::super::Deadline;
    use super::*;
    use crate::matrix::{DType, Matrix};
    use crate::ops::LayerNorm;

    /// Norms of so many rows, on a device of one thread.
    fn norms(device: &Device, rows: &[usize]) -> Vec<Prepared> {
        let prepare = |&rows: &usize| {
            let x = device.upload(&Matrix::uniform(rows, 32, DType::F32, 1).unwrap()).unwrap();
            let [gamma, beta] = [1.0, 0.0].map(|x| device.upload(&Matrix::from_f32(1, 32, &[x; 32]).unwrap()).unwrap());
            let y = device.zeros(rows, 32, DType::F32).unwrap();
            device.prepare(&LayerNorm { x: &x, gamma: &gamma, beta: &beta, eps: 1e-6, y: &y }).unwrap()
        };
        rows.iter().map(prepare).collect()
    }

    const POLICY: Policy = Policy { sample: Duration::from_millis(1), samples: 4, max_samples: 4, ..Policy::QUICK };

    /// By a made-up clock: a machine that becomes ten times as fast.
    #[test]
    fn a_sample_that_turns_out_too_short_does_not_count() {
        let device = Device::cpu().unwrap();
        let mut workload = Workload::rotation(norms(&device, &[5]));
        let mut run = |pass: Duration| {
            let clock = async |workload: &mut Workload| {
                let elapsed = pass * workload.passes as u32;
                Ok(Timing { elapsed, clock: Clock::HostWall })
            };
            let (timing, spent) = pollster::block_on(workload.run_for(POLICY.sample, clock)).unwrap();
            (timing.elapsed.as_micros(), spent.as_micros(), workload.passes)
        };
        assert_eq!(run(Duration::from_micros(300)), (1200, 1500, 4));
        assert_eq!(run(Duration::from_micros(300)), (1200, 1200, 4));
        // Eightfold at most, and then a fifth more than seems needed.
        assert_eq!(run(Duration::from_micros(30)), (1200, 120 + 960 + 1200, 40));
        assert_eq!(run(Duration::from_micros(300)), (12_000, 12_000, 40));
    }

    #[test]
    fn all_workloads_get_samples_as_long_as_the_policy_says() {
        let device = Device::cpu().unwrap();
        let timer = Timer::new(&device, POLICY);
        let mut workloads = [Workload::rotation(norms(&device, &[5; 3])), Workload::pass(norms(&device, &[5; 3]))];
        workloads.iter_mut().for_each(|workload| timer.calibrate(workload).unwrap());
        let mut rounds = Vec::new();
        timer.sample_in_turns(&mut workloads, |round| rounds.push(round)).unwrap();
        assert_eq!(rounds, [1, 2, 3, 4]);
        for workload in &workloads {
            assert_eq!((workload.seconds().len(), workload.clock()), (4, Some(Clock::HostWall)));
            assert!(workload.expected() >= 0.999e-3, "{workload:?}");
        }
    }

    #[test]
    fn a_rotation_goes_on_where_it_stopped_and_a_pass_is_whole() {
        let device = Device::cpu().unwrap();
        let mut rotation = Workload { passes: 2, ..Workload::rotation(norms(&device, &[1, 2, 3])) };
        for next in [2, 1, 0, 2] {
            pollster::block_on(rotation.run(&device)).unwrap();
            assert_eq!(rotation.next, next);
        }
        let mut pass = Workload { passes: 5, ..Workload::pass(norms(&device, &[1, 2, 3])) };
        pollster::block_on(pass.run(&device)).unwrap();
        assert_eq!((pass.next, pass.calls_per_pass), (0, 3));
    }

    #[test]
    fn nothing_takes_no_time_and_a_clock_that_stands_still_is_an_error() {
        let device = Device::cpu().unwrap();
        let timer = Timer::new(&device, Policy { warm_up: Duration::from_millis(1), ..POLICY });
        for mut nothing in [Workload::pass([]), Workload::rotation([])] {
            timer.calibrate(&mut nothing).unwrap();
            timer.sample_in_turns([&mut nothing], |_| {}).unwrap();
            assert!(nothing.seconds().len() == 4 && nothing.median().unwrap().value < 1e-3);
        }
        let mut still = Workload::pass(norms(&device, &[1; 3]));
        let error =
            std::iter::repeat_with(|| still.lengthen(Duration::ZERO, POLICY.sample)).find_map(|result| result.err());
        assert!(error.unwrap().to_string().contains("calls take less than 1ms"));
        assert!((MAX_CALLS..8 * MAX_CALLS + 24).contains(&(3 * still.passes)));
    }

    #[test]
    fn rounds_count_samples_that_are_there_and_end_at_the_deadline() {
        let device = Device::cpu().unwrap();
        let timer = Timer::new(&device, POLICY);
        let mut workloads = [0, 1].map(|_| Workload::pass(norms(&device, &[9])));
        workloads.iter_mut().for_each(|workload| assert!(timer.sample(workload).unwrap() > 0.0));
        timer.sample_in_turns(&mut workloads, |_| {}).unwrap();
        assert_eq!(workloads.each_ref().map(|workload| workload.seconds().len()), [4, 4]);

        let over = Policy { deadline: Some(Deadline { at: Instant::now(), step: 0.0 }), samples: 9, ..POLICY };
        Timer::new(&device, over).sample_in_turns(&mut workloads, |_| {}).unwrap();
        assert_eq!(workloads.each_ref().map(|workload| workload.seconds().len()), [4, 4]);
        // What was verified has a time all the same.
        let mut late = Workload::pass(norms(&device, &[9]));
        Timer::new(&device, over).sample_in_turns([&mut late], |_| {}).unwrap();
        assert_eq!(late.times().samples, 1);
    }

    /// A workload whose samples are nowhere near each other is watched, unless it is a part of another one.
    #[test]
    fn noise_of_a_part_asks_for_no_more_samples() {
        let device = Device::cpu().unwrap();
        let timer = Timer::new(&device, Policy { max_samples: 5, ..POLICY });
        let noisy = || Workload { seconds: vec![1.0, 2.0, 3.0, 4.0], ..Workload::pass([]) };
        for (mut workload, samples) in [(noisy(), 5), (noisy().as_part(), 4)] {
            timer.sample_in_turns([&mut workload], |_| {}).unwrap();
            assert_eq!(workload.seconds().len(), samples);
        }
    }
}
