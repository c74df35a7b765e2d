//! What a GEMM kernel's machine code costs, without running it: prologue + trips x step.
//!
//! A *step* is 16 k: all that grows with k, wherever in the code it stands. The *prologue* is all else, the epilogue
//! among it. Either costs the larger of *issue* (its instructions by the rates of [`Architecture`]) and
//! *workgroup-memory passes* (its accesses, traced lane by lane: [`trace`]). Neither term can be traded for the other:
//! a gather reads 16 bytes for every four multiply-adds, and looks better than it is by instructions alone.
//!
//! Left out are latencies, the bytes that buffers give, and the caches: two kernels of one tile that wait for the same
//! bytes can be compared by it, and where arithmetic limits. A GEMV waits for the bytes of its weights.
//!
//! Invariant: the rounds of every loop are those that the shader makes when it is executed, and the multiply-adds of a
//! step are those of its tile, counted in the machine code. Where loops or multiply-adds do not come out, as after an
//! unrolling that was not understood, there is no estimate.

use super::isa::{Counts, Loop};
use super::trace::{self, Trace};
use crate::error::{Error, Result};
use crate::kernels::{Architecture, Kernel, Schedule};

/// Input features of a step.
const STEP: f64 = 16.0;

/// Cycles that one workgroup keeps a core busy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cycles {
    /// Of its schedulers' busiest pipe.
    pub(super) issue: f64,
    /// Of its workgroup memory.
    pub(super) passes: f64,
}

impl Cycles {
    /// What limits: the larger of both.
    pub(super) fn total(&self) -> f64 {
        self.issue.max(self.passes)
    }
}

/// The cost of a kernel, and the instructions that it is of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cost {
    /// For 16 k.
    pub(super) step: Cycles,
    /// For all that does not grow with k.
    pub(super) prologue: Cycles,
    pub(super) step_counts: Counts,
    pub(super) prologue_counts: Counts,
    /// Outputs of a workgroup.
    outputs: f64,
}

impl Cost {
    /// Steps over so many input features.
    pub(super) fn trips(&self, k: usize) -> f64 {
        k as f64 / STEP
    }

    /// Cycles of a core for each output over so many input features.
    pub(super) fn cycles_per_output(&self, k: usize) -> f64 {
        (self.prologue.total() + self.trips(k) * self.step.total()) / self.outputs
    }
}

/// What a kernel was compiled for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) architecture: Architecture,
    pub(super) subgroup: u32,
    /// Bytes of the widest load of workgroup memory.
    pub(super) widest: u32,
}

/// The cost of a kernel by its machine code.
pub(super) fn cost(kernel: &Kernel, code: &Loop, target: Target) -> Result<Cost> {
    let Target { architecture, subgroup, widest } = target;
    let invalid = |what: String| Error::invalid(format!("{kernel}: {what}"));
    if subgroup == 0 {
        return Err(invalid("the driver does not tell its subgroups".into()));
    }
    let depths = trace::traced_k(kernel);
    // Neighbouring accesses count as one, for dense kernels as for others: the best that a compiler makes of them.
    let traced = |k: usize| Ok::<_, Error>(trace::gemm(kernel, k, trace::SEED)?.merged(16));
    let traces = [traced(depths[0])?, traced(depths[1])?];
    let rules = architecture.rules().with_widest(widest);
    let line = trace::line_of(&traces, depths, &rules, subgroup as usize);

    let mut counts = [Counts::default(), Counts::default()];
    for (at, counts) in counts.iter_mut().enumerate() {
        add_up(
            code,
            1.0,
            [(1, &traces[0]), (1, &traces[1])].map(|(n, t): (u64, &Trace)| (n, &t.loops[..])),
            at,
            counts,
        )
        .map_err(invalid)?;
    }
    let [short, long] = counts;
    let mut step_counts = Counts::default();
    let share = STEP / (depths[1] - depths[0]) as f64;
    step_counts.merge(&long, share);
    step_counts.merge(&short, -share);
    let mut prologue_counts = short;
    prologue_counts.merge(&step_counts, -(depths[0] as f64) / STEP);

    let subgroups = f64::from(kernel.schedule().threads()) / f64::from(subgroup);
    let issue =
        |counts: &Counts| architecture.issue(counts, subgroup).cycles() * subgroups / f64::from(rules.schedulers);
    let (m, n) = kernel.schedule().tile();
    let outputs = f64::from(m) * f64::from(n);
    let found = match kernel.schedule() {
        Schedule::Coop(_) => step_counts.matrix() * subgroups,
        _ => step_counts.multiply_adds() * f64::from(kernel.schedule().threads()),
    };
    let expected = outputs * STEP * if kernel.skips() { 0.5 } else { 1.0 };
    if (found / expected - 1.0).abs() > 0.02 {
        return Err(invalid(format!("its machine code has {:.2} of the multiply-adds of its tile", found / expected)));
    }
    Ok(Cost {
        step: Cycles { issue: issue(&step_counts), passes: line.per_k16 },
        prologue: Cycles { issue: issue(&prologue_counts).max(0.0), passes: line.fixed.max(0.0) },
        step_counts,
        prologue_counts,
        outputs,
    })
}

/// Adds up the instructions of a loop of the machine code that makes so many rounds, and of those in it, in the trace
/// number `at`. `shader` has, for both traces, how often the shader's loops are met and the loops.
///
/// Compilers keep loops in order, and unroll some with a known, small number of rounds: those of the shader that make
/// the same number of rounds whatever k is, each time that they are met, and of these the ones with the fewest are
/// taken to be gone until as many are left.
fn add_up(
    code: &Loop,
    rounds: f64,
    shader: [(u64, &[trace::Loop]); 2],
    at: usize,
    counts: &mut Counts,
) -> std::result::Result<(), String> {
    counts.merge(&code.counts, rounds);
    let [(met_short, fewer), (met_long, more)] = shader;
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
            Some(place) => left.remove(place),
            None => break,
        };
    }
    if left.len() != code.inner.len() {
        return Err(format!("its machine code has {} loops where the shader has {}", code.inner.len(), left.len()));
    }
    for (&pair, inner) in left.iter().zip(&code.inner) {
        let (a, b) = pairs[pair];
        let rounds = [a.iterations, b.iterations][at] as f64;
        let loops = [(a.iterations, a.inner.as_slice()), (b.iterations, b.inner.as_slice())];
        add_up(inner, rounds, loops, at, counts)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::isa::Class;
    use super::*;
    use crate::matrix::DType;
    use crate::problem::{Epilogue, Form, Op};

    fn dense() -> Kernel {
        let wanted =
            |k: &Kernel| k.op() == Op::Dense && k.storage() == DType::F32 && k.schedule().to_string() == "64x64x16";
        Kernel::all()
            .find(|k| wanted(k) && k.is_representative() && k.form() == Form::Linear && k.epilogue() == Epilogue::NONE)
            .unwrap()
    }

    /// Machine code with so many multiply-adds in a loop for 16 k, in an inner loop of four rounds or unrolled.
    fn code(multiply_adds: f64, unrolled: bool) -> Loop {
        let loop_of = |class, count, inner| Loop { counts: Counts(vec![(class, count)]), inner };
        let step = match unrolled {
            true => loop_of(Class::MultiplyAdd(1), multiply_adds, vec![]),
            false => loop_of(Class::Integer, 10.0, vec![loop_of(Class::MultiplyAdd(1), multiply_adds / 4.0, vec![])]),
        };
        loop_of(Class::Integer, 100.0, vec![step])
    }

    #[test]
    fn a_step_is_sixteen_k_wherever_its_instructions_stand() {
        let target = Target { architecture: Architecture::Ada, subgroup: 32, widest: 16 };
        // A thread of the 64 x 64 tile has 32 outputs.
        let unrolled = cost(&dense(), &code(512.0, true), target).unwrap();
        assert_eq!(unrolled.step_counts.multiply_adds(), 512.0);
        assert_eq!((unrolled.step_counts.instructions(), unrolled.prologue_counts.instructions()), (512.0, 100.0));
        // 128 threads are four subgroups, one for each scheduler.
        assert_eq!((unrolled.step.issue, unrolled.trips(4096)), (512.0, 256.0));
        let per_output = (unrolled.prologue.total() + 256.0 * unrolled.step.total()) / 4096.0;
        assert_eq!(unrolled.cycles_per_output(4096), per_output);
    }

    /// A loop of the shader in its step, which a compiler keeps or unrolls.
    #[test]
    fn an_inner_loop_counts_as_often_as_it_runs_whether_or_not_it_was_unrolled() {
        let shader = |steps: u64| {
            let inner = vec![trace::Loop { function: String::new(), iterations: 4 * steps, inner: Vec::new() }];
            [trace::Loop { function: String::new(), iterations: steps, inner }]
        };
        let (short, long) = (shader(2), shader(6));
        for (is_unrolled, each) in [(true, 512.0), (false, 522.0)] {
            for (at, steps) in [(0, 2.0), (1, 6.0)] {
                let mut counts = Counts::default();
                add_up(&code(512.0, is_unrolled), 1.0, [(1, &short), (1, &long)], at, &mut counts).unwrap();
                assert_eq!(counts.multiply_adds(), 512.0 * steps);
                assert_eq!(counts.instructions(), 100.0 + each * steps);
            }
        }
    }

    #[test]
    fn loops_and_multiply_adds_that_do_not_come_out_are_errors() {
        let target = Target { architecture: Architecture::Ada, subgroup: 32, widest: 16 };
        let error = |code: &Loop, target| cost(&dense(), code, target).unwrap_err().to_string();
        // Twice unrolled, but for the loop.
        assert!(error(&code(1024.0, true), target).contains("2.00 of the multiply-adds"));
        let mut three = code(512.0, true);
        three.inner.extend([code(1.0, true), code(1.0, true)]);
        assert!(error(&three, target).contains("loops where the shader has"));
        assert!(error(&code(512.0, true), Target { subgroup: 0, ..target }).contains("subgroups"));
    }
}
