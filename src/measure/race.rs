//! The tuner's race: many plans of one operation, of which those that fall far behind are not sampled again.
//!
//! Apart from [`run`](super::run), because what it decides is other: not how fast a plan is beside dense, but which of
//! dozens is worth its samples. The operands are the same for all, so that their results are compared with each other,
//! element by element, and the oracle is asked where two differ. Invariant: no plan is timed before its result on whole
//! numbers was found right.

use web_time::Instant;

use super::{Case, MAX_SETS, Policy, Sets, Timer, Workload, claim_operands, median, sample, wrong};
use crate::engine::Device;
use crate::error::Result;
use crate::matrix::Matrix;
use crate::plan::Plan;
use crate::problem::{Op, Problem};
use crate::reference::{Operands, Oracle};

/// How one plan fared in a [`race`].
#[derive(Clone, Debug, PartialEq)]
pub enum Trial {
    /// Its result was right; the median seconds of a call.
    Timed(f64),
    /// Its result was right, but its first sample, in seconds per call, lay too far behind for more.
    Behind(f64),
    /// Its result was wrong: where.
    Wrong(String),
    /// It did not run: why.
    Refused(String),
    /// There was no time for it.
    Untried,
}

impl Trial {
    /// Seconds of a call, from however many samples there are.
    pub fn seconds(&self) -> Option<f64> {
        match *self {
            Self::Timed(seconds) | Self::Behind(seconds) => Some(seconds),
            Self::Wrong(_) | Self::Refused(_) | Self::Untried => None,
        }
    }
}

/// Calls of a plan until it has been checked, warmed up and sampled once, at least.
const FIRST_CALLS: f64 = 4.0;

/// A plan whose first sample takes this many times the best one's is not sampled again.
const FAR_BEHIND: f64 = 2.0;

/// Finds out which of several plans for one operation takes the least time, giving up on those that are far behind.
///
/// No plan is timed before its result on whole numbers has been found right. Plans that keep up are then sampled in
/// turns, so that a machine that slows down slows all alike. All plans must solve `case.problem(op)` with weights of
/// that operation. `progress` is called with 0 once the operands are on the device, and with the number of plans that
/// have been tried. Only a lost device, or a case that does not fit into memory, is an error. Where the policy has a
/// deadline, plans that there is no time for are left untried, with time kept for the samples of the others.
pub fn race(
    device: &Device,
    case: &Case,
    op: Op,
    plans: &[Plan],
    policy: &Policy,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Trial>> {
    let shape = (case.w.rows(), case.x.rows(), case.w.cols());
    claim_operands(&device.info(), shape, case.w.dtype(), std::iter::once((op, op)))?;
    let whole = case.whole(seed)?;
    let whole_sets = Sets::new(device, &whole, op, op, 1)?;
    let operands = Operands::new(&whole_sets.host, &whole.x);
    let problem = case.problem(op);
    let mut referee = Referee { oracle: Oracle::new(&problem, operands)?, problem, seed, right: None };
    let sets = Sets::new(device, case, op, op, MAX_SETS)?;
    let timer = Timer::new(device, *policy);
    let mut best = f64::INFINITY;
    let mut runners: Vec<std::result::Result<Workload, Trial>> = Vec::new();
    progress(0);
    // The longest that a plan took, and what is still to be sampled of those that keep up.
    let (mut longest, mut samples_due) = (policy.deadline.map_or(0.0, |end| end.step), 0.0);
    for plan in plans {
        if !policy.has_time_for(longest.max(FIRST_CALLS * plan.estimated_seconds()) + samples_due) {
            break;
        }
        let began = Instant::now();
        let output = || pollster::block_on(whole_sets.output(device, &whole_sets.bind(device, plan)?[0]));
        let first_sample = || {
            let mut runner = Workload::rotation(sets.bind(device, plan)?);
            timer.calibrate(&mut runner)?;
            timer.sample(&mut runner)?;
            Ok(runner)
        };
        let started = output().and_then(|output| referee.judge(output)).and_then(|judgement| {
            if let Some(what) = judgement.overturns {
                runners.iter_mut().filter(|r| r.is_ok()).for_each(|r| *r = Err(Trial::Wrong(what.clone())));
                best = f64::INFINITY;
            }
            judgement.wrong.map_or_else(|| first_sample().map(Ok), |what| Ok(Err(Trial::Wrong(what))))
        });
        let mut runner = match started {
            Ok(started) => started,
            Err(e) if e.is_device_lost() => return Err(e),
            Err(e) => Err(Trial::Refused(e.to_string())),
        };
        if let Ok(runner) = &mut runner {
            best = best.min(runner.seconds()[0]);
            if runner.seconds()[0] > FAR_BEHIND * best {
                runner.release();
            } else {
                samples_due += (policy.samples - 1) as f64 * runner.expected();
            }
        }
        runners.push(runner);
        longest = longest.max(began.elapsed().as_secs_f64());
        progress(runners.len());
    }
    // The best may have come late.
    let keeps_up = |runner: &Workload| runner.seconds()[0] <= FAR_BEHIND * best;
    timer.sample_in_turns(runners.iter_mut().flatten().filter(|runner| keeps_up(runner)), |_| {})?;
    let trial = |runner: std::result::Result<Workload, Trial>| match runner {
        Err(failed) => failed,
        Ok(runner) if keeps_up(&runner) => Trial::Timed(median(&mut runner.seconds().to_vec())),
        Ok(runner) => Trial::Behind(runner.seconds()[0]),
    };
    let untried = plans.len() - runners.len();
    Ok(runners.into_iter().map(trial).chain(std::iter::repeat_n(Trial::Untried, untried)).collect())
}

/// Judges many outputs for the same whole numbers, where sums are exact in every order: the oracle checks a sample of
/// the first output, and all elements of the others are compared with it. Where two outputs differ, the oracle says
/// which is wrong.
struct Referee<'a> {
    oracle: Oracle<'a>,
    /// In the linear form, without epilogue.
    problem: Problem,
    seed: u64,
    /// An output in which nothing wrong has been found.
    right: Option<Matrix>,
}

#[derive(Debug, Default, PartialEq)]
struct Judgement {
    /// What is wrong with the output, if anything.
    wrong: Option<String>,
    /// What has turned out to be wrong with every output that was found right before.
    overturns: Option<String>,
}

/// Differences between two outputs that the oracle is asked about. Where storing an output rounds, both may be right.
const MAX_DIFFERENCES: usize = 1000;

impl Referee<'_> {
    fn judge(&mut self, output: Matrix) -> Result<Judgement> {
        let Some(right) = &self.right else {
            let verdict = self.oracle.verify(&output, sample(&self.problem, self.seed))?;
            let wrong = wrong(&verdict, &output).map(|what| format!("on whole numbers: {what}"));
            self.right = wrong.is_none().then_some(output);
            return Ok(Judgement { wrong, overturns: None });
        };
        let differences: Vec<_> = differences(&output, right).take(MAX_DIFFERENCES).collect();
        for at in differences {
            let (token, feature) = (at / self.problem.m, at % self.problem.m);
            let expected = self.oracle.element(feature, token);
            let wrong = |y: &Matrix| {
                let got = f64::from(y.get(token, feature));
                let text =
                    format!("on whole numbers: {got} at feature {feature}, token {token}, not {}", expected.value);
                (expected.error_over_bound(got) > 1.0).then_some(text)
            };
            if let Some(what) = wrong(&output) {
                return Ok(Judgement { wrong: Some(what), overturns: None });
            }
            if let Some(what) = wrong(right) {
                self.right = None;
                return Ok(Judgement { overturns: Some(what), ..self.judge(output)? });
            }
        }
        Ok(Judgement::default())
    }
}

/// The elements in which two matrices of one shape differ as numbers: zeros of both signs are equal.
fn differences(a: &Matrix, b: &Matrix) -> impl Iterator<Item = usize> + use<> {
    let (a, b) = (a.elements().to_f32(), b.elements().to_f32());
    a.into_iter().zip(b).enumerate().filter(|(_, (a, b))| a != b).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::poison;
    use super::*;
    use crate::matrix::{DType, Elements};
    use crate::weights::HostWeights;

    #[test]
    fn a_referee_sees_every_element_and_takes_back_what_was_wrong() {
        let case = super::super::tests::case(100, 90, 8, DType::F32).whole(3).unwrap();
        let problem = case.problem(Op::Dense);
        let weights = HostWeights::Dense(case.w.clone());
        let operands = || Operands::new(&weights, &case.x);
        let referee = || Referee { oracle: Oracle::new(&problem, operands()).unwrap(), problem, seed: 1, right: None };
        let full = Oracle::new(&problem, operands()).unwrap().full();
        let right = Matrix::from_f32(90, 100, &full.iter().map(|&y| y as f32).collect::<Vec<_>>()).unwrap();
        // An element that the sample leaves out.
        let with_error = |at: usize| {
            let mut y = right.clone();
            if let Elements::F32(y) = y.elements_mut() {
                y[at] += 1.0;
            }
            y
        };
        let passes = |y: &Matrix| referee().judge(y.clone()).unwrap() == Judgement::default();
        let unseen = (0..9000).map(with_error).find(passes).unwrap();

        let judged = |referee: &mut Referee<'_>, y: &Matrix| {
            let Judgement { wrong, overturns } = referee.judge(y.clone()).unwrap();
            (wrong.is_some(), overturns.is_some())
        };
        let mut first_right = referee();
        assert_eq!(judged(&mut first_right, &right), (false, false));
        assert_eq!(judged(&mut first_right, &unseen), (true, false));
        assert_eq!(judged(&mut first_right, &right), (false, false));

        let mut first_wrong = referee();
        assert_eq!(judged(&mut first_wrong, &unseen), (false, false));
        assert_eq!(judged(&mut first_wrong, &right), (false, true));
        assert_eq!(judged(&mut first_wrong, &right), (false, false));
        assert_eq!(judged(&mut first_wrong, &unseen), (true, false));
        let unwritten = poison(90, 100, DType::F32).unwrap();
        assert_eq!(judged(&mut first_wrong, &unwritten), (true, false));
        assert_eq!(judged(&mut referee(), &unwritten), (true, false));
    }
}
