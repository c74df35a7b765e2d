//! What one workgroup of a program does in memory, found by executing it: every access of workgroup memory with the
//! address of each lane, how often each loop runs, and the bytes of its storage buffers.
//!
//! [`run`] executes naga's IR of a program (the module that a driver gets, its overrides replaced by their values) for
//! all threads of a workgroup in lock step. Nothing is estimated: addresses are those that the shader computes from
//! real parameters and operands, 2:4 codes among them. [`gemm`] makes these for a GEMM kernel;
//! [`banks`](super::banks) counts what the accesses cost by the rules of an architecture. Invariant: what is not
//! understood, and what is out of bounds, is an error.
//!
//! # What is not what a compiler makes of it
//! - An access is one of the shader's text: a scalar or a vector. A compiler may merge neighbouring ones, split one in
//!   two (which [`banks`](super::banks) can be told), or find that it has a value already.
//! - Variables of workgroup memory follow each other in the order of the text. Another start shifts all lanes of an
//!   access alike, so that they meet in banks as before.
//! - Which lane loads what of a cooperative matrix is the hardware's own affair. A load is counted as one access of the
//!   whole matrix, 16 bytes per lane: eight lanes take eight lines of contiguous elements (rows of A, columns of B), 16
//!   bytes of each, and the next eight lanes the next eight lines. Sums are stored by the element, in the layout of
//!   registers that NVIDIA documents for its own: a lane has two neighbours of a row, four lanes a row of eight.

mod machine;

use crate::compile::banks::Rules;
use crate::error::{Error, Result};
use crate::format::Sparse24;
use crate::kernels::{Kernel, Params, Program, Schedule};
use crate::layout;
use crate::mask::VectorLen;
use crate::matrix::{DType, Matrix};
use crate::problem::Op;
use crate::prune;
use crate::weights::HostWeights;

/// Lanes whose activity decides how often a loop ran.
const FIRST_SUBGROUP: usize = 32;

/// The address of a lane that takes no part in an access.
const INACTIVE: u32 = u32::MAX;

/// What a workgroup is started with.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// Contents of each binding of group 0, by its number: the uniform parameters, and whole storage buffers.
    pub bindings: Vec<(u32, Vec<u8>)>,
    /// Which workgroup it is.
    pub workgroup: [u32; 3],
    /// Workgroups of the dispatch.
    pub grid: [u32; 3],
}

/// One load or store of workgroup memory, by all threads of the workgroup that reach it together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Number of the place in the program: accesses of one place that a loop or several calls repeat share it only if
    /// the whole chain of calls is the same.
    pub site: u32,
    /// Which of [`Trace::variables`].
    pub variable: usize,
    /// Bytes per lane: 2, 4, 8, 12 or 16.
    pub bytes: u32,
    /// Whether it is a store.
    pub write: bool,
}

/// A variable of workgroup memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name in the shader.
    pub name: String,
    /// Byte at which it starts.
    pub start: u32,
    /// Its size.
    pub bytes: u32,
}

/// A loop of the program, as often as the text has it: a function that is called twice has its loops twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop {
    /// The function in whose text it stands.
    pub function: String,
    /// How often its body ran, over all times that it was entered. An iteration counts if any of the first 32 threads
    /// reaches the end of the body (or a `continue`): the last test, which only leaves the loop, does not. For a
    /// subgroup of 64 these are the iterations of its first half.
    pub iterations: u64,
    /// The loops in its body, in the order of the text.
    pub inner: Vec<Self>,
}

/// What a workgroup did.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Threads of the workgroup.
    pub threads: usize,
    /// Workgroup memory, in the order of the text.
    pub variables: Vec<Variable>,
    /// Loads and stores of workgroup memory, in order.
    pub accesses: Vec<Access>,
    /// One per access and thread, in bytes.
    addresses: Vec<u32>,
    /// The program's outermost loops, in the order of the text.
    pub loops: Vec<Loop>,
    /// Bytes that the threads loaded from storage buffers, each thread's own even where neighbours ask for the same.
    pub loaded_bytes: u64,
    /// Bytes that they stored.
    pub stored_bytes: u64,
    /// What the bindings held afterwards.
    pub bindings: Vec<(u32, Vec<u8>)>,
}

impl Trace {
    /// The accesses with the byte address of each thread, `None` for a thread that takes no part.
    pub fn each(&self) -> impl Iterator<Item = (Access, impl ExactSizeIterator<Item = Option<u32>> + '_)> {
        self.accesses
            .iter()
            .zip(self.addresses.chunks(self.threads.max(1)))
            .map(|(&access, addresses)| (access, addresses.iter().map(|&at| (at != INACTIVE).then_some(at))))
    }

    /// What a binding held afterwards.
    pub fn binding(&self, number: u32) -> Option<&[u8]> {
        self.bindings.iter().find(|(at, _)| *at == number).map(|(_, bytes)| bytes.as_slice())
    }

    /// The same trace as a compiler has it that merges accesses: one that follows another, for the same lanes and of
    /// the bytes right behind, is made one with it as long as they are together of 8 or 16 bytes, no wider than
    /// `widest` and aligned to their size. Compilers see no further than their own analysis does, so this is the best
    /// of them.
    #[must_use]
    pub(super) fn merged(&self, widest: u32) -> Self {
        let mut trace = Self { accesses: Vec::new(), addresses: Vec::new(), ..self.clone() };
        // Pairs of 4 become 8, then pairs of 8 become 16.
        let mut from = self.clone();
        for half in [4, 8] {
            trace.accesses.clear();
            trace.addresses.clear();
            let mut at = 0;
            while at < from.accesses.len() {
                let (access, lanes) = (from.accesses[at], from.lanes(at));
                let joins = |next: &Access| {
                    let behind = lanes.iter().zip(from.lanes(at + 1)).all(|(&first, &second)| match first {
                        INACTIVE => second == INACTIVE,
                        _ => second == first + half && first.is_multiple_of(2 * half),
                    });
                    let Access { variable, bytes, write, .. } = *next;
                    (variable, bytes, write) == (access.variable, access.bytes, access.write) && behind
                };
                let wide = 2 * half <= widest && access.bytes == half && from.accesses.get(at + 1).is_some_and(joins);
                trace.accesses.push(Access { bytes: if wide { 2 * half } else { access.bytes }, ..access });
                trace.addresses.extend_from_slice(lanes);
                at += if wide { 2 } else { 1 };
            }
            from = trace.clone();
        }
        trace
    }

    /// The addresses of an access, [`INACTIVE`] among them.
    fn lanes(&self, at: usize) -> &[u32] {
        &self.addresses[at * self.threads..(at + 1) * self.threads]
    }
}

/// Executes one workgroup of a program. An error names the out-of-bounds access, or what the interpreter does not know.
pub fn run(program: &Program, launch: Launch) -> Result<Trace> {
    let (module, info) = super::module(program)?;
    let traced = machine::Machine::new(&module, &info, launch).and_then(machine::Machine::run);
    traced.map_err(|cause| Error::invalid(format!("{program}: {cause}")))
}

/// Executes the one workgroup of a GEMM whose output is a single whole tile of the kernel, over `k` input features (a
/// multiple of 32). Weights and activations are uniform in [-1, 1), 2:4 patterns and masks random, all of them
/// functions of `seed`: every legal code is equally likely.
pub fn gemm(kernel: &Kernel, k: usize, seed: u64) -> Result<Trace> {
    let (m, n) = kernel.schedule().tile();
    Operands::new(kernel, (m as usize, n as usize, k), seed)?.trace(kernel)
}

/// What a kernel's accesses of workgroup memory cost, as a line over k: cycles of the memory's pipe per workgroup, all
/// its subgroups together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Line {
    /// Whatever k is: the sums of a GEMV's slices, the stage through which cooperative matrices leave.
    pub(super) fixed: f64,
    /// For each 16 k, which is one step of a register tile and half of one of a cooperative kernel.
    pub(super) per_k16: f64,
}

/// The k that estimates trace. Between them every run of threads of a GEMV has the same work, and codes enough are
/// drawn that an average over random patterns is steady.
pub(super) fn traced_k(kernel: &Kernel) -> [usize; 2] {
    match kernel.schedule() {
        Schedule::Gemv { slices, .. } => [32, 64].map(|k| k * slices as usize),
        Schedule::Tile(_) | Schedule::Expand(_) | Schedule::Coop(_) => [64, 192],
    }
}

/// What accesses of workgroup memory cost by the rules of an architecture, whose subgroups have so many lanes: the line
/// through two traces. At V = 2 and 4 conflicts depend on the codes, and this is an average over random ones.
pub(super) fn line_of(traces: &[Trace; 2], [short, long]: [usize; 2], rules: &Rules, subgroup: usize) -> Line {
    let cost = |trace: &Trace| rules.total(trace, subgroup) as f64;
    line((short, cost(&traces[0])), (long, cost(&traces[1])))
}

/// Seed of the operands that are traced.
pub(super) const SEED: u64 = 24;

/// The line through two costs, each at its k.
fn line((k0, cost0): (usize, f64), (k1, cost1): (usize, f64)) -> Line {
    let per_k16 = (cost1 - cost0) * 16.0 / (k1 - k0) as f64;
    Line { fixed: cost0 - per_k16 * k0 as f64 / 16.0, per_k16 }
}

/// What a GEMM is given.
struct Operands {
    shape: (usize, usize, usize),
    weights: HostWeights,
    /// Token-major.
    x: Matrix,
    bias: Matrix,
    residual: Matrix,
}

impl Operands {
    fn new(kernel: &Kernel, shape: (usize, usize, usize), seed: u64) -> Result<Self> {
        let (m, n, k) = shape;
        if !k.is_multiple_of(layout::WORD) {
            return Err(Error::invalid(format!("k = {k} is no multiple of {}, which kernels ask for", layout::WORD)));
        }
        let w = Matrix::uniform(m, k, kernel.storage(), seed)?;
        let weights = match kernel.op() {
            Op::Dense => HostWeights::Dense(w),
            Op::Masked => HostWeights::Masked(w, prune::random(m, k, VectorLen::ONE, seed)?.into_mask()),
            Op::Masked24 => HostWeights::Masked24(w, prune::random(m, k, VectorLen::ONE, seed)?),
            Op::Sparse24(v) => HostWeights::Sparse24(Sparse24::compress(&w, &prune::random(m, k, v, seed)?)?),
        };
        let x = Matrix::uniform(n, k, kernel.storage(), seed.wrapping_add(1))?;
        let bias = Matrix::uniform(1, m, DType::F32, seed.wrapping_add(2))?;
        let residual = Matrix::uniform(n, m, kernel.output(), seed.wrapping_add(3))?;
        Ok(Self { shape, weights, x, bias, residual })
    }

    /// The step of a plan that solves it without splits or pieces.
    fn launch(&self, kernel: &Kernel) -> Result<Launch> {
        let (m, n, k) = self.shape;
        let (tile_m, tile_n) = kernel.schedule().tile();
        let (tiles_m, tiles_n) = ((m as u32).div_ceil(tile_m), (n as u32).div_ceil(tile_n));
        let params = Params {
            m: m as u32,
            n: n as u32,
            k: k as u32,
            k_split: k as u32,
            features: m as u32,
            feature0: 0,
            tiles_m,
            tiles_n,
            k_given: k as u32,
        };
        let op = kernel.op();
        let (values, words) = match &self.weights {
            HostWeights::Dense(w) => (layout::values(op, w.elements(), k, k, 0..m), Vec::new()),
            HostWeights::Masked(w, mask) => {
                (layout::values(op, w.elements(), k, k, 0..m), layout::words(op, mask.words(), k, 0..m))
            }
            HostWeights::Masked24(w, mask) => {
                (layout::values(op, w.elements(), k, k, 0..m), layout::words(op, &mask.codes()?, k, 0..m))
            }
            HostWeights::Sparse24(s) => {
                (layout::values(op, s.values(), s.k_physical(), k, 0..m), layout::words(op, s.meta(), k, 0..m))
            }
        };
        let bindings = vec![
            (0, bytemuck::bytes_of(&params).to_vec()),
            (1, values),
            (2, words.iter().flat_map(|word| word.to_le_bytes()).collect()),
            (3, self.x.elements().to_le_bytes()),
            (4, self.bias.elements().to_le_bytes()),
            (5, self.residual.elements().to_le_bytes()),
            (6, vec![0xff; m * n * kernel.output().bytes()]),
        ];
        Ok(Launch { bindings, workgroup: [0; 3], grid: [tiles_m * tiles_n, 1, 1] })
    }

    fn trace(&self, kernel: &Kernel) -> Result<Trace> {
        run(&Program::from(*kernel), self.launch(kernel)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::kernels::{NormParams, Pack};
    use crate::ops::{attention, layer_norm};
    use crate::problem::{Activation, Epilogue, Form, Problem};
    use crate::reference::{self, Oracle, Sample};

    /// The kernel of an operation by the name of its way.
    fn kernel(op: Op, storage: DType, schedule: &str) -> Kernel {
        Kernel::new(&Problem::linear(op, 1, 1, 32, storage), Schedule::named(op, storage, schedule).unwrap()).unwrap()
    }

    fn sparse(v: usize) -> Op {
        Op::Sparse24(VectorLen::new(v).unwrap())
    }

    /// Whether what a traced kernel left in Y is what the oracle says, every element of it.
    fn verify(kernel: &Kernel, shape: (usize, usize, usize)) {
        let (m, n, k) = shape;
        let operands = Operands::new(kernel, shape, SEED).unwrap();
        let trace = operands.trace(kernel).unwrap();
        let problem = Problem {
            form: kernel.form(),
            output: kernel.output(),
            epilogue: kernel.epilogue(),
            ..Problem::linear(kernel.op(), m, n, k, kernel.storage())
        };
        let linear = kernel.form() == Form::Linear;
        // The caller's B is k x n; kernels get it packed, token-major.
        let turned = |matrix: &Matrix| {
            Matrix::from_f32(
                matrix.cols(),
                matrix.rows(),
                matrix.to_array().t().as_standard_layout().as_slice().unwrap(),
            )
            .unwrap()
            .cast(matrix.dtype())
        };
        let x = if linear { operands.x.clone() } else { turned(&operands.x) };
        let residual = match linear {
            true => operands.residual.clone(),
            false => Matrix::new(m, n, operands.residual.elements().clone()).unwrap(),
        };
        let bias = operands.bias.elements().to_f32();
        let epilogue = kernel.epilogue();
        let given = reference::Operands {
            weights: &operands.weights,
            x: &x,
            bias: epilogue.bias.then_some(&bias),
            residual: epilogue.residual.then_some(&residual),
        };
        let y = crate::matrix::Elements::from_bytes(kernel.output(), trace.binding(6).unwrap()).unwrap();
        let (rows, cols) = problem.y_shape();
        let verdict = Oracle::new(&problem, given).unwrap().verify(&Matrix::new(rows, cols, y).unwrap(), Sample::All);
        let verdict = verdict.unwrap();
        assert!(verdict.passed() && verdict.checked == m * n, "{kernel} {shape:?}: {verdict}");
    }

    #[test]
    fn the_interpreter_computes_what_the_oracle_says() {
        for (op, storage, schedule) in [
            (Op::Dense, DType::F32, "32x32x16"),
            (Op::Dense, DType::F16, "64x64x16"),
            (Op::Masked, DType::F32, "32x32x16"),
            (Op::Masked24, DType::F16, "32x32x16"),
            (sparse(2), DType::F32, "32x32x16"),
            (sparse(4), DType::F16, "128x32x16"),
            (sparse(1), DType::F32, "expand_32x32x16"),
            (sparse(2), DType::F16, "lanes_128x128x16"),
            (sparse(32), DType::F32, "64x64x16"),
            (Op::Dense, DType::F32, "gemv_32x1_t256"),
            (sparse(1), DType::F16, "gemv_32x8_t256"),
            (sparse(128), DType::F32, "gemv_32x4_t1024"),
            (Op::Masked24, DType::F16, "gemv_32x4_t256"),
            (Op::Dense, DType::F16, "coop16s32_64x64x32_t128"),
            (Op::Masked24, DType::F16, "coop16s32_64x64x32_t128"),
            (sparse(1), DType::F16, "coop16s32_64x64x32_t128"),
            (sparse(16), DType::F16, "coop16s32_64x64x32_t128"),
            (sparse(32), DType::F16, "coop16s64_64x64x32_t128"),
            (Op::Dense, DType::F16, "coop8s8_64x64x32_t32"),
            (sparse(128), DType::F16, "coop8s32_64x64x32_t128"),
        ] {
            let kernel = kernel(op, storage, schedule);
            let (m, n) = kernel.schedule().tile();
            let (m, n) = (m as usize, n as usize);
            // A whole tile over some k, and one with residues, over the least k.
            verify(&kernel, (m, n, 96));
            verify(&kernel, (m - 5, n - n / 4, 32));
        }
        // Epilogues, the plain form and another output type, over no k at all as well.
        for epilogue in Epilogue::all() {
            let activation = epilogue.activation != Activation::None;
            let form = if epilogue.residual { Form::Gemm } else { Form::Linear };
            let output = if activation { DType::F16 } else { DType::F32 };
            let problem = Problem { epilogue, form, output, ..Problem::linear(sparse(8), 1, 1, 32, DType::F32) };
            let kernel = Kernel::new(&problem, Schedule::named(problem.op, DType::F32, "32x32x16").unwrap()).unwrap();
            verify(&kernel, (31, 30, 32));
        }
        verify(&kernel(Op::Dense, DType::F32, "32x32x16"), (32, 32, 0));
    }

    /// Every shader text of a GEMM, except that only the output type is left at the storage's.
    #[test]
    fn every_kernel_is_understood() {
        let mut ran = 0;
        for kernel in Kernel::all().filter(|k| k.is_representative() && k.output() == k.storage()) {
            let trace = gemm(&kernel, 32, SEED).unwrap();
            let bytes: u32 = trace.variables.iter().map(|v| v.bytes).sum();
            assert_eq!(bytes, kernel.workgroup_bytes(), "{kernel}");
            assert!(!trace.accesses.is_empty(), "{kernel}");
            ran += 1;
        }
        assert!(ran > 200, "only {ran} kernels are left");
    }

    /// Trips of a loop and of those within.
    fn trips(l: &Loop) -> (u64, Vec<u64>) {
        (l.iterations, l.inner.iter().map(|l| l.iterations).collect())
    }

    #[test]
    fn loops_run_as_often_as_the_shader_says() {
        let trips =
            |kernel: Kernel, k: usize| gemm(&kernel, k, SEED).unwrap().loops.iter().map(trips).collect::<Vec<_>>();
        // A step is 16 k, whose four quads or groups are unrolled; without k nothing runs.
        for op in [Op::Dense, sparse(2), sparse(32)] {
            let tile = kernel(op, DType::F32, "64x64x16");
            assert_eq!(trips(tile, 96), [(6, vec![])], "{op}");
            assert_eq!(trips(tile, 0), [(0, vec![])], "{op}");
        }
        // A stage of 1024 k of eight tokens: each of 256 threads brings four k, each run takes every eighth word of 32.
        // Then the sums of eight slices.
        let gemv = kernel(Op::Dense, DType::F16, "gemv_32x8_t256");
        assert_eq!(trips(gemv, 2048), [(2, vec![2, 8]), (8, vec![])]);
        // The first of eight runs takes the 33rd word, too.
        assert_eq!(trips(gemv, 1024 + 32), [(2, vec![2, 5]), (8, vec![])]);
        // A step of 32 k; each of 2 x 2 blocks leaves in 256 elements for 32 lanes.
        let coop = kernel(Op::Dense, DType::F16, "coop16s32_64x64x32_t128");
        assert_eq!(trips(coop, 96), [(3, vec![]), (8, vec![]), (8, vec![]), (8, vec![]), (8, vec![])]);
    }

    #[test]
    fn bytes_of_storage_are_those_of_the_tiles() {
        let trace = gemm(&kernel(sparse(2), DType::F16, "64x64x16"), 64, SEED).unwrap();
        // Kept values and activations once, and for every 16 k and block of weights the words of its four features.
        let words = 4 * (64 / 16) * (2 * 64);
        assert_eq!(trace.loaded_bytes, 2 * 64 * 32 + 2 * 64 * 64 + words);
        assert_eq!(trace.stored_bytes, 2 * 64 * 64);
    }

    #[test]
    fn what_is_wrong_is_an_error_that_names_it() {
        let kernel = kernel(sparse(2), DType::F32, "32x32x16");
        let launch = || Operands::new(&kernel, (32, 32, 32), SEED).unwrap().launch(&kernel).unwrap();
        let error = |launch: Launch| run(&Program::from(kernel), launch).unwrap_err().to_string();
        let without = |number: u32| {
            let mut launch = launch();
            launch.bindings.retain(|(at, _)| *at != number);
            launch
        };
        assert!(
            error(without(3)).contains("reads 16 bytes at 0 of x (binding 3), which has 0"),
            "{}",
            error(without(3))
        );
        let mut short = launch();
        short.bindings[6].1.truncate(4092);
        assert!(error(short).contains("lane 63 writes 4 bytes at 4092 of y (binding 6)"));
        assert!(error(without(0)).contains("params (binding 0)"));
        assert!(gemm(&kernel, 40, SEED).unwrap_err().to_string().contains("k = 40"));
    }

    fn passes(kernel: &Kernel, rules: &Rules, subgroup: usize) -> Result<Line> {
        let depths = traced_k(kernel);
        let traces = [gemm(kernel, depths[0], SEED)?, gemm(kernel, depths[1], SEED)?];
        Ok(line_of(&traces, depths, rules, subgroup))
    }

    fn traced(op: Op, storage: DType, schedule: &str, k: usize) -> Trace {
        gemm(&kernel(op, storage, schedule), k, SEED).unwrap()
    }

    /// Passes of the loads or stores of some variables, per subgroup of 32.
    fn part(trace: &Trace, rules: Rules, write: bool, names: &[&str]) -> f64 {
        let wanted = |a: &Access| a.write == write && names.contains(&trace.variables[a.variable].name.as_str());
        let cost =
            |lanes: Vec<Option<u32>>, bytes| -> u64 { lanes.chunks(32).map(|l| rules.passes(l, bytes, write)).sum() };
        let costs = trace.each().filter(|(a, _)| wanted(a)).map(|(a, lanes)| cost(lanes.collect(), a.bytes));
        costs.sum::<u64>() as f64 / (trace.threads / 32) as f64
    }

    /// The most different addresses that one subgroup's load of a variable has.
    fn different(trace: &Trace, name: &str) -> usize {
        let loads = trace.each().filter(|(a, _)| !a.write && trace.variables[a.variable].name == name);
        let of = |lanes: &[Option<u32>]| lanes.iter().flatten().collect::<std::collections::HashSet<_>>().len();
        loads.map(|(_, lanes)| lanes.collect::<Vec<_>>().chunks(32).map(of).max().unwrap()).max().unwrap()
    }

    /// Passes of an inner step, per 16 k and subgroup of 32, as traced for each architecture: by accesses of 16 bytes,
    /// and for RDNA 3 by halves of them, too.
    #[test]
    fn passes_of_a_step_are_these() {
        const RULES: [Rules; 5] = [Rules::ADA, Rules::RDNA3, Rules::RDNA3.with_widest(8), Rules::RDNA4, Rules::APPLE];
        let tile = |op, expected| (op, DType::F32, "128x128x16", expected);
        let half = |op, schedule, expected| (op, DType::F16, schedule, expected);
        for (op, storage, schedule, expected) in [
            tile(Op::Dense, [216.0, 280.0, 288.0, 280.0, 576.0]),
            tile(Op::Masked, [216.0, 280.0, 288.0, 280.0, 576.0]),
            tile(sparse(128), [116.0, 148.0, 156.0, 148.0, 316.0]),
            tile(sparse(32), [116.0, 161.0, 156.0, 148.0, 316.0]),
            tile(sparse(16), [116.0, 184.5, 156.0, 148.0, 343.5]),
            tile(sparse(8), [146.5, 207.75, 156.0, 148.0, 374.0]),
            tile(sparse(4), [210.5, 327.75, 222.0, 214.0, 568.5]),
            tile(sparse(2), [341.25, 568.0, 354.0, 346.0, 955.5]),
            (sparse(2), DType::F32, "lanes_128x128x16", [310.0, 310.0, 354.0, 310.0, 870.5]),
            (sparse(4), DType::F32, "lanes_128x128x16", [178.0, 178.0, 222.0, 178.0, 493.0]),
            (sparse(1), DType::F32, "expand_128x128x16", [216.0, 280.0, 288.0, 280.0, 576.0]),
            (Op::Dense, DType::F32, "64x64x16", [184.0, 216.0, 224.0, 216.0, 448.0]),
            (sparse(32), DType::F32, "64x64x16", [100.0, 121.5, 124.0, 116.0, 253.0]),
            half(Op::Dense, "gemv_32x1_t256", [2.25, 2.25, 2.25, 2.25, 4.5]),
            half(sparse(1), "gemv_32x1_t256", [1.25, 1.25, 1.25, 1.25, 2.5]),
            half(Op::Dense, "gemv_32x4_t256", [4.25, 8.25, 8.5, 8.25, 17.0]),
            half(sparse(1), "gemv_32x4_t256", [4.25, 4.25, 4.5, 4.25, 9.0]),
            half(Op::Dense, "gemv_32x8_t256", [8.5, 16.5, 17.0, 16.5, 33.0]),
            half(sparse(1), "gemv_32x8_t256", [8.5, 8.5, 9.0, 8.5, 24.12]),
            half(sparse(32), "gemv_32x8_t256", [4.5, 8.5, 9.0, 8.5, 17.0]),
            half(Op::Dense, "coop16s32_128x128x32_t128", [64.0, 96.0, 96.0, 64.0, 128.0]),
            half(sparse(128), "coop16s32_128x128x32_t128", [28.0, 44.0, 44.0, 28.0, 56.0]),
            half(sparse(1), "coop16s32_128x128x32_t128", [64.0, 96.0, 96.0, 64.0, 128.0]),
        ] {
            let kernel = kernel(op, storage, schedule);
            let subgroups = f64::from(kernel.schedule().threads() / 32);
            let traces = traced_k(&kernel).map(|k| (k, gemm(&kernel, k, SEED).unwrap()));
            let found = RULES.map(|rules| {
                let [short, long] = [0, 1].map(|at| (traces[at].0, rules.total(&traces[at].1, 32) as f64));
                line(short, long).per_k16 / subgroups
            });
            let close = found.iter().zip(expected).all(|(found, expected)| (found / expected - 1.0).abs() < 1e-3);
            assert!(close, "{kernel}: {found:?}, expected {expected:?}");
        }
        // The function that others call says the same.
        let dense = passes(&kernel(Op::Dense, DType::F32, "128x128x16"), &Rules::ADA, 32).unwrap();
        assert_eq!(dense, Line { fixed: 0.0, per_k16: 8.0 * 216.0 });
    }

    /// A third k lies on the line through the two: exactly, unless conflicts depend on random codes.
    #[test]
    fn passes_grow_with_k_in_a_straight_line() {
        for (op, storage, schedule) in [
            (Op::Dense, DType::F32, "64x64x16"),
            (sparse(128), DType::F32, "64x64x16"),
            (sparse(2), DType::F32, "64x64x16"),
            (sparse(1), DType::F32, "expand_64x64x16"),
            (sparse(1), DType::F16, "gemv_32x8_t256"),
            (Op::Masked, DType::F32, "gemv_32x1_t512"),
            (Op::Dense, DType::F16, "coop16s32_64x64x32_t128"),
        ] {
            let kernel = kernel(op, storage, schedule);
            for rules in Rules::ALL {
                let line = passes(&kernel, &rules, 32).unwrap();
                let third = 3 * traced_k(&kernel)[1];
                let cost = rules.total(&gemm(&kernel, third, SEED).unwrap(), 32) as f64;
                let slack = if op == sparse(1) || op == sparse(2) { 0.02 } else { 1e-9 };
                assert!(
                    ((line.fixed + line.per_k16 * third as f64 / 16.0) / cost - 1.0).abs() < slack,
                    "{kernel}, {}: {line:?}, {cost}",
                    rules.name
                );
            }
        }
    }

    /// shaders/shared/tile.wgsl.
    #[test]
    fn tiles_lie_in_banks_as_their_header_says() {
        let k16 = |op, schedule, rules, write, name| {
            let [short, long] = [64, 128].map(|k| part(&traced(op, DType::F32, schedule, k), rules, write, &[name]));
            (long - short) / 4.0
        };
        // Few distinct addresses: eight quads of features, four of tokens.
        let dense = traced(Op::Dense, DType::F32, "128x128x16", 64);
        assert_eq!((different(&dense, "w_tile"), different(&dense, "x_tile")), (8, 4));
        // A gather among four rows for each of four quads of tokens; of one quad where 32 threads share it.
        assert!((4..=16).contains(&different(&traced(sparse(2), DType::F32, "128x128x16", 64), "x_tile")));
        assert!(different(&traced(sparse(2), DType::F32, "lanes_128x128x16", 64), "x_tile") <= 3);
        // 128 bytes a pass: no read conflicts where eight neighbours share a phase. Per k two reads of each tile.
        let schedule = "128x128x16";
        for name in ["w_tile", "x_tile"] {
            assert_eq!(k16(Op::Dense, schedule, Rules::RDNA4, false, name), 16.0 * 2.0 * 4.0);
        }
        // Nor do stores of activations, half of the subgroups' four; those of weights, to a column from each of two
        // runs, meet in pairs.
        assert_eq!(k16(Op::Dense, schedule, Rules::RDNA4, true, "x_tile"), 0.5 * 4.0 * 4.0);
        assert_eq!(k16(Op::Dense, schedule, Rules::RDNA4, true, "w_tile"), 2.0 * 0.5 * 4.0 * 4.0);
        assert_eq!(k16(sparse(2), schedule, Rules::RDNA4, true, "x_tile"), 0.5 * 4.0 * 4.0);
    }

    /// shaders/gemm_sparse24.wgsl.
    #[test]
    fn gathers_take_the_passes_that_their_header_says() {
        let group = |v: usize, rules| {
            let reads = |k| part(&traced(sparse(v), DType::F32, "128x128x16", k), rules, false, &["w_tile", "x_tile"]);
            (reads(192) - reads(64)) / 32.0
        };
        for (v, expected) in [(2, 80.0), (4, 48.0), (8, 32.0), (32, 32.0)] {
            assert_eq!(group(v, Rules::RDNA4), expected, "V = {v}");
            assert!(group(v, Rules::ADA) <= expected, "V = {v}");
        }
        // NVIDIA packs what pairs of lanes share: from V = 16 on all gathers, below only what random codes give.
        assert_eq!((group(16, Rules::ADA), group(32, Rules::ADA)), (24.0, 24.0));
        assert!(group(8, Rules::ADA) > 31.0 && group(2, Rules::ADA) > 76.0);
        // Half of the multiply-adds, from V = 8 on half of the reads.
        let reads =
            |op| traced(op, DType::F32, "128x128x16", 64).each().filter(|(a, _)| !a.write && a.bytes == 16).count();
        assert_eq!((2 * reads(sparse(8)), 2 * reads(sparse(32))), (reads(Op::Dense), reads(Op::Dense)));
    }

    /// shaders/shared/gemv.wgsl and shaders/gemv_sparse24.wgsl: a word of 32 k and 32 features by one run of threads.
    #[test]
    fn gemv_takes_the_passes_that_its_header_says() {
        let word = |op, schedule, rules: Rules| {
            let kernel = kernel(op, DType::F16, schedule);
            passes(&kernel, &rules, 32).unwrap().per_k16 * 2.0
        };
        for (op, ada, rdna4) in [(Op::Dense, 136.0, 264.0), (sparse(1), 136.0, 136.0), (sparse(32), 72.0, 136.0)] {
            assert_eq!(word(op, "gemv_32x8_t256", Rules::ADA), ada, "{op}");
            assert_eq!(word(op, "gemv_32x8_t256", Rules::RDNA4), rdna4, "{op}");
        }
        assert_eq!(word(sparse(2), "gemv_32x8_t256", Rules::ADA), 72.0);
        assert_eq!(word(Op::Dense, "gemv_32x4_t256", Rules::ADA), 68.0);
        assert_eq!(word(sparse(1), "gemv_32x4_t256", Rules::ADA), 68.0);
        assert_eq!(word(Op::Dense, "gemv_32x1_t256", Rules::ADA), 36.0);
        assert_eq!(word(sparse(1), "gemv_32x1_t256", Rules::ADA), 20.0);
        // All lanes read one address, or choose among the four k of a group, in different banks.
        let reads = |op, schedule| {
            let trace = traced(op, DType::F16, schedule, 256);
            let stage: Vec<_> =
                trace.each().filter(|(a, _)| !a.write).map(|(a, l)| (a, l.collect::<Vec<_>>())).collect();
            // All but the last, which add up the slices.
            let reads = stage[..stage.len() - 8].iter();
            let addresses =
                |lanes: &[Option<u32>]| lanes.iter().flatten().collect::<std::collections::HashSet<_>>().len();
            let most = reads.clone().flat_map(|(_, lanes)| lanes.chunks(32).map(addresses)).max().unwrap();
            let least = |bytes: u32| u64::from(bytes / 4);
            let conflicts = reads.flat_map(|(a, lanes)| {
                lanes.chunks(32).map(|l| Rules::RDNA4.passes(l, a.bytes, false) - least(a.bytes)).collect::<Vec<_>>()
            });
            (most, conflicts.sum::<u64>())
        };
        for schedule in ["gemv_32x1_t256", "gemv_32x4_t256", "gemv_32x8_t256"] {
            assert_eq!(reads(Op::Dense, schedule), (1, 0), "{schedule}");
            // Of four places the first value has one of the first three, the second one of the last three.
            assert_eq!(reads(sparse(1), schedule), (3, 0), "{schedule}");
        }
    }

    /// shaders/shared/coop.wgsl.
    #[test]
    fn cooperative_tiles_lie_in_banks_as_their_header_says() {
        let k32 = |rules, write, names: &[&str], widest| {
            let schedule = "coop16s32_128x128x32_t128";
            let cost = |k| part(&traced(Op::Dense, DType::F16, schedule, k).merged(widest), rules, write, names);
            (cost(128) - cost(64)) / 2.0
        };
        // 8 KiB of fragments, 128 bytes a pass.
        assert_eq!(k32(Rules::RDNA4, false, &["w_tile", "x_tile"], 16), 64.0);
        // Eight units of 16 bytes are stored in four passes each, or in eight if a compiler leaves them in halves.
        assert_eq!(k32(Rules::RDNA4, true, &["w_tile", "x_tile"], 16), 8.0 * 4.0);
        assert_eq!(k32(Rules::RDNA4, true, &["w_tile", "x_tile"], 8), 8.0 * 8.0);
        // Sums are stored without conflicts, and read back in two passes.
        let trace = traced(Op::Dense, DType::F16, "coop16s32_128x128x32_t128", 32);
        assert_eq!(part(&trace, Rules::RDNA4, true, &["stage"]), 16.0 * 8.0);
        assert_eq!(part(&trace, Rules::RDNA4, false, &["stage"]), 16.0 * 8.0 * 2.0);
    }

    #[test]
    fn neighbouring_accesses_are_merged() {
        let words =
            |trace: &Trace| [4, 8, 16].map(|bytes| trace.each().filter(|(a, _)| !a.write && a.bytes == bytes).count());
        // One token of 256 k: 32 activations that follow each other, and the sums of eight slices, which do not.
        let trace = traced(Op::Dense, DType::F16, "gemv_32x1_t256", 256);
        assert_eq!(words(&trace), [32 + 8, 0, 0]);
        assert_eq!((words(&trace.merged(8)), words(&trace.merged(16))), ([8, 16, 0], [8, 0, 8]));
        assert_eq!(words(&trace.merged(4)), words(&trace));
        // What is read stays the same.
        let bytes = |t: &Trace| t.each().map(|(a, l)| u64::from(a.bytes) * l.flatten().count() as u64).sum::<u64>();
        assert_eq!(bytes(&trace), bytes(&trace.merged(16)));
    }

    /// Other programs than GEMMs, as plain loops or the oracle have them.
    #[test]
    fn what_runs_beside_gemms_is_understood() {
        // Packing a B of 40 x 20 to 20 tokens of 64 k.
        let b: Vec<f32> = (0..40 * 20).map(|i| i as f32).collect();
        let params = Params { n: 20, k: 64, tiles_m: 2, tiles_n: 1, k_given: 40, ..Params::default() };
        let mut packed = vec![0; 4 * 64 * 20];
        for id in 0..2 {
            let bindings =
                vec![(0, bytemuck::bytes_of(&params).to_vec()), (3, bytemuck::cast_slice(&b).to_vec()), (6, packed)];
            let program = Program::new(Pack { form: Form::Gemm, storage: DType::F32 });
            let trace = run(&program, Launch { bindings, workgroup: [id, 0, 0], grid: [2, 1, 1] }).unwrap();
            packed = trace.binding(6).unwrap().to_vec();
        }
        let expected: Vec<f32> =
            (0..20 * 64).map(|i| if i % 64 < 40 { b[i % 64 * 20 + i / 64] } else { 0.0 }).collect();
        assert_eq!(packed, bytemuck::cast_slice::<_, u8>(&expected));

        let floats = |rows, cols, dtype, seed| Matrix::uniform(rows, cols, dtype, seed).unwrap();
        let outcome = |program: Program, params: &[u8], operands: &[(u32, &[u8])], shape: (usize, usize)| {
            let mut bindings = vec![(0, params.to_vec()), (2, vec![0; 4 * shape.0 * shape.1])];
            bindings.extend(operands.iter().map(|&(at, bytes)| (at, bytes.to_vec())));
            let launch = Launch { bindings, workgroup: [0; 3], grid: [1; 3] };
            let y = run(&program, launch).unwrap().binding(2).unwrap().to_vec();
            Matrix::new(shape.0, shape.1, crate::matrix::Elements::from_bytes(DType::F32, &y).unwrap()).unwrap()
        };
        // Eight tokens of 64 features.
        let (x, gamma, beta) =
            (floats(8, 64, DType::F16, 1), floats(1, 64, DType::F32, 2), floats(1, 64, DType::F32, 3));
        let program = Program::new(layer_norm::LayerNormKernel::new(64, DType::F16, DType::F32).unwrap());
        let params = NormParams { tokens: 8, epsilon: 1e-5 };
        let bytes = |matrix: &Matrix| matrix.elements().to_le_bytes();
        let operands = [(1, bytes(&x)), (3, bytes(&gamma)), (4, bytes(&beta))];
        let operands = operands.each_ref().map(|(at, bytes)| (*at, &bytes[..]));
        let y = outcome(program, bytemuck::bytes_of(&params), &operands, (8, 64));
        let [gamma, beta] = [gamma, beta].map(|m| m.elements().to_f32());
        let verdict = reference::layer_norm::expect(&x, &gamma, &beta, 1e-5, DType::F32).unwrap().verify(&y).unwrap();
        assert!(verdict.passed() && verdict.checked == 8 * 64, "{verdict}");
        // One sequence of 32 tokens, of which 20 are real, and one head of 64 features, by both kinds of tiles.
        for tile in attention::AttentionTile::ALL.into_iter().filter(|tile| tile.to_string().ends_with("x64")) {
            let coop = tile.is_cooperative();
            let qkv = floats(32, 3 * 64, DType::F16, 4);
            let program = Program::new(attention::AttentionKernel::new(tile, 64, DType::F16, DType::F32).unwrap());
            let params = attention::Params { tokens: 32, width: 64, seq: 32, heads: 1, scale: 0.125, reach: 0 };
            let operands = [(3, &20u32.to_le_bytes()[..]), (1, &bytes(&qkv))];
            let y = outcome(program, bytemuck::bytes_of(&params), &operands, (32, 64));
            let weights = if coop { DType::F16 } else { DType::F32 };
            let expected =
                reference::attention::expect(&qkv, &[20], (32, 1), &Default::default(), weights, DType::F32).unwrap();
            let verdict = expected.verify(&y).unwrap();
            assert!(verdict.passed() && verdict.checked == 32 * 64, "{tile}: {verdict}");
        }
    }
}
