//! What a GEMM kernel's machine code costs, without running it: prologue + trips x step.
//!
//! A *step* is one round of the innermost loop that does most of the multiply-adds; all else, before it, after it and
//! around it, is the *prologue*. Either costs the larger of *issue* (its instructions by the rates of
//! [`Architecture`]) and *workgroup-memory passes* (its accesses, traced lane by lane: [`trace`]). Neither term can be
//! traded for the other: a gather reads 16 bytes for every four multiply-adds, and looks better than it is by
//! instructions alone.
//!
//! Left out are latencies, waits for buffers, and the caches: two kernels of one tile that wait for the same bytes can be
//! compared by it, and where arithmetic limits. Invariant: the trips of every loop are those that the shader makes when
//! it is executed; where the loops of machine code are not those of the shader, there is no estimate.

use super::architecture::Architecture;
use super::isa::{Counts, Loop};
use super::trace;
use crate::error::{Error, Result};
use crate::kernel::Kernel;

/// Cycles that one workgroup keeps a core busy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cycles {
    /// Of its schedulers' busiest pipe.
    pub issue: f64,
    /// Of its workgroup memory.
    pub passes: f64,
}

impl Cycles {
    /// What limits: the larger of both.
    pub fn total(&self) -> f64 {
        self.issue.max(self.passes)
    }
}

/// The cost of a kernel for a problem of one k.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Input features.
    pub k: usize,
    /// Rounds of the step's loop that a subgroup makes.
    pub trips: f64,
    /// One round.
    pub step: Cycles,
    /// All else.
    pub prologue: Cycles,
    /// Outputs of the workgroup.
    pub outputs: f64,
}

impl Estimate {
    /// Cycles of a core for each output.
    pub fn cycles_per_output(&self) -> f64 {
        (self.prologue.total() + self.trips * self.step.total()) / self.outputs
    }
}

/// A loop of the machine code beside the one of the shader that it is.
struct Matched<'a> {
    code: &'a Loop,
    /// Rounds of all its runs together.
    rounds: f64,
    inner: Vec<Matched<'a>>,
}

/// What a kernel was compiled for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) architecture: Architecture,
    pub(super) subgroup: u32,
    /// Bytes of the widest access of workgroup memory.
    pub(super) widest: u32,
}

/// Estimates a kernel over each number of input features, from its machine code.
pub(super) fn estimates(kernel: &Kernel, code: &Loop, target: Target, depths: &[usize]) -> Result<Vec<Estimate>> {
    let Target { architecture, subgroup, widest } = target;
    let [short, long] = trace::traced_k(kernel);
    let traces = [trace::gemm(kernel, short, trace::SEED)?, trace::gemm(kernel, long, trace::SEED)?];
    let rules = architecture.rules().with_widest(widest);
    let cost = |at: usize| rules.total(&traces[at], subgroup as usize) as f64;
    let line = trace::line((short, cost(0)), (long, cost(1)));
    let subgroups = f64::from(kernel.way().threads()) / f64::from(subgroup);
    let share = subgroups / f64::from(rules.schedulers);
    let issue = |counts: &Counts| architecture.issue(counts, subgroup).cycles() * share;
    let (m, n) = kernel.way().tile();
    let estimate = |&k: &usize| {
        let whole = matched(code, 1.0, &traces.each_ref().map(|t| (1, t.loops.as_slice())), (short, long), k)
            .map_err(|e| Error::Invalid(format!("{kernel}: {e}")))?;
        let mut step: Option<&Matched<'_>> = None;
        most_work(&whole, &mut step);
        let Some(step) = step else {
            return Err(Error::Invalid(format!("{kernel}: no loop of its machine code multiplies")));
        };
        let (mut all, mut one) = (Counts::default(), Counts::default());
        sum(&whole, 1.0, &mut all);
        sum(step, 1.0 / step.rounds, &mut one);
        all.merge(&one, -step.rounds);
        Ok(Estimate {
            k,
            trips: step.rounds,
            // What grows with k are the step's passes.
            step: Cycles { issue: issue(&one), passes: line.per_k16 * k as f64 / 16.0 / step.rounds },
            prologue: Cycles { issue: issue(&all), passes: line.fixed.max(0.0) },
            outputs: f64::from(m) * f64::from(n),
        })
    };
    depths.iter().map(estimate).collect()
}

/// The loop with the most multiply-adds over all its rounds.
fn most_work<'a, 'b>(within: &'b Matched<'a>, best: &mut Option<&'b Matched<'a>>) {
    for inner in &within.inner {
        let work = |m: &Matched<'_>| m.rounds * (m.code.counts.multiply_adds() + m.code.counts.matrix());
        if work(inner) > best.map_or(0.0, work) {
            *best = Some(inner);
        }
        most_work(inner, best);
    }
}

/// Instructions of a loop and all in it, for all rounds, times a factor.
fn sum(of: &Matched<'_>, factor: f64, counts: &mut Counts) {
    counts.merge(&of.code.counts, of.rounds * factor);
    of.inner.iter().for_each(|inner| sum(inner, factor, counts));
}

/// Finds for every loop of the machine code the one of the shader. Compilers keep loops in order, and unroll some with
/// a known, small number of rounds: those of the shader that make the same number of rounds whatever k is, each time
/// that they are met, and of these the ones with the fewest are taken to be gone until as many are left. `shader` has,
/// for either traced k, how often the loops are met and the loops.
fn matched<'a>(
    code: &'a Loop,
    rounds: f64,
    shader: &[(u64, &[trace::Loop]); 2],
    (short, long): (usize, usize),
    k: usize,
) -> std::result::Result<Matched<'a>, String> {
    let [(met_short, fewer), (met_long, more)] = *shader;
    let pairs: Vec<_> = fewer.iter().zip(more).collect();
    let mut left: Vec<usize> = (0..pairs.len()).collect();
    while left.len() > code.inner.len() {
        let unrolled = left
            .iter()
            .enumerate()
            .filter(|&(_, &at)| {
                let (a, b) = pairs[at];
                a.inner.is_empty() && a.iterations * met_long == b.iterations * met_short
            })
            .min_by_key(|&(_, &at)| pairs[at].0.iterations);
        match unrolled.map(|(place, _)| place) {
            Some(place) => {
                left.remove(place);
            }
            None => break,
        }
    }
    if left.len() != code.inner.len() {
        return Err(format!("its machine code has {} loops where the shader has {}", code.inner.len(), left.len()));
    }
    let inner = left.iter().zip(&code.inner).map(|(&at, code)| {
        let (a, b) = pairs[at];
        let (fewer, more) = (a.iterations as f64, b.iterations as f64);
        let rounds = fewer + (more - fewer) * (k as f64 - short as f64) / (long as f64 - short as f64);
        let inner = [(a.iterations, a.inner.as_slice()), (b.iterations, b.inner.as_slice())];
        matched(code, rounds, &inner, (short, long), k)
    });
    Ok(Matched { code, rounds, inner: inner.collect::<std::result::Result<_, String>>()? })
}
