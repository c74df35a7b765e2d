//! What one workgroup of a program does in memory, found by executing it: every access of workgroup memory with the
//! address of each lane, how often each loop runs, and the bytes of its storage buffers.
//!
//! [`run`] executes naga's IR of a program (the module that a driver gets, its overrides replaced by their values) for
//! all threads of a workgroup in lock step. Nothing is estimated: addresses are those that the shader computes from
//! real parameters and operands, 2:4 codes among them. [`gemm`] makes these for a GEMM kernel, [`passes`] counts what
//! the accesses cost by the rules of an architecture. Invariant: what is not understood, and what is out of bounds, is
//! an error.
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

use crate::error::{Error, Result};
use crate::format::Sparse24;
use crate::kernel::{Kernel, Params, Program};
use crate::layout;
use crate::mask::Mask24;
use crate::matrix::{DType, Matrix};
use crate::measure::uniform;
use crate::problem::Op;
use crate::prune;

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
    /// Bytes per lane: 2, 4, 8, 12 or 16.
    pub bytes: u32,
    /// Whether it is a store.
    pub write: bool,
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
        self.accesses.iter().zip(self.addresses.chunks(self.threads.max(1))).map(|(&access, addresses)| {
            (access, addresses.iter().map(|&at| (at != INACTIVE).then_some(at)))
        })
    }

    /// What a binding held afterwards.
    pub fn binding(&self, number: u32) -> Option<&[u8]> {
        self.bindings.iter().find(|(at, _)| *at == number).map(|(_, bytes)| bytes.as_slice())
    }

    /// Iterations of all loops of the function `main` that have no loop around them: the steps along k of a GEMM.
    pub fn outer_iterations(&self) -> u64 {
        self.loops.iter().filter(|l| l.function == "main").map(|l| l.iterations).sum()
    }
}

/// Executes one workgroup of a program. An error names the out-of-bounds access, or what the interpreter does not know.
pub fn run(program: &Program, launch: Launch) -> Result<Trace> {
    let (module, info) = super::module(program)?;
    let traced = machine::Machine::new(&module, &info, launch).and_then(machine::Machine::run);
    traced.map_err(|cause| Error::Invalid(format!("{program}: {cause}")))
}

/// Executes the one workgroup of a GEMM whose output is a single whole tile of the kernel, over `k` input features (a
/// multiple of 32). Weights and activations are uniform in [-1, 1), 2:4 patterns and masks random, all of them functions
/// of `seed`: every legal code is equally likely.
pub fn gemm(kernel: &Kernel, k: usize, seed: u64) -> Result<Trace> {
    let (m, n) = kernel.way().tile();
    Operands::new(kernel, (m as usize, n as usize, k), seed)?.trace(kernel)
}

/// Weights, as the operation wants them.
enum Weights {
    Dense,
    Masked(Mask24),
    Sparse24(Sparse24),
}

/// What a GEMM is given.
struct Operands {
    shape: (usize, usize, usize),
    w: Matrix,
    weights: Weights,
    /// Token-major.
    x: Matrix,
    bias: Matrix,
    residual: Matrix,
}

impl Operands {
    fn new(kernel: &Kernel, shape: (usize, usize, usize), seed: u64) -> Result<Self> {
        let (m, n, k) = shape;
        if !k.is_multiple_of(layout::WORD) {
            return Err(Error::Invalid(format!("k = {k} is no multiple of {}, which kernels ask for", layout::WORD)));
        }
        let w = uniform(m, k, kernel.storage(), seed)?;
        let weights = match kernel.op() {
            Op::Dense => Weights::Dense,
            Op::Masked | Op::Masked24 => Weights::Masked(prune::random(m, k, crate::mask::VectorLen::ONE, seed)?),
            Op::Sparse24(v) => Weights::Sparse24(Sparse24::compress(&w, &prune::random(m, k, v, seed)?)?),
        };
        let x = uniform(n, k, kernel.storage(), seed.wrapping_add(1))?;
        let bias = uniform(1, m, DType::F32, seed.wrapping_add(2))?;
        let residual = uniform(n, m, kernel.output(), seed.wrapping_add(3))?;
        Ok(Self { shape, w, weights, x, bias, residual })
    }

    /// The step of a plan that solves it without splits or pieces.
    fn launch(&self, kernel: &Kernel) -> Result<Launch> {
        let (m, n, k) = self.shape;
        let (tile_m, tile_n) = kernel.way().tile();
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
            Weights::Dense => (layout::values(op, self.w.elements(), k, k, 0..m), Vec::new()),
            Weights::Masked(mask) => {
                let words = if op == Op::Masked24 { mask.codes()? } else { mask.mask().words().to_vec() };
                (layout::values(op, self.w.elements(), k, k, 0..m), layout::words(op, &words, k, 0..m))
            }
            Weights::Sparse24(s) => {
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
        run(&Program::Gemm(*kernel), self.launch(kernel)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::kernel::Way;
    use crate::mask::VectorLen;
    use crate::problem::{Activation, Epilogue, Form, Problem};
    use crate::reference::{self, Oracle, Sample};

    const SEED: u64 = 24;

    /// The kernel of an operation by the name of its way.
    fn kernel(op: Op, storage: DType, way: &str) -> Kernel {
        Kernel::new(&Problem::linear(op, 1, 1, 32, storage), Way::named(op, storage, way).unwrap()).unwrap()
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
            Matrix::from_f32(matrix.cols(), matrix.rows(), matrix.to_array().t().as_standard_layout().as_slice().unwrap())
                .unwrap()
                .cast(matrix.dtype())
        };
        let x = if linear { operands.x.clone() } else { turned(&operands.x) };
        let residual = match linear {
            true => operands.residual.clone(),
            false => Matrix::new(m, n, operands.residual.elements().clone()).unwrap(),
        };
        let bias = operands.bias.elements().to_f32();
        let weights = match &operands.weights {
            Weights::Dense => reference::Weights::Dense(&operands.w),
            Weights::Masked(mask) => reference::Weights::Masked(&operands.w, mask.mask()),
            Weights::Sparse24(s) => reference::Weights::Sparse24(s),
        };
        let epilogue = kernel.epilogue();
        let given = reference::Operands {
            weights,
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
        for (op, storage, way) in [
            (Op::Dense, DType::F32, "32x32x16"),
            (Op::Dense, DType::F16, "64x64x16"),
            (Op::Masked, DType::F32, "32x32x16"),
            (Op::Masked24, DType::F16, "32x32x16"),
            (sparse(1), DType::F32, "32x32x16"),
            (sparse(4), DType::F16, "128x32x16"),
            (sparse(1), DType::F32, "expand_32x32x16"),
            (sparse(32), DType::F32, "64x64x16"),
            (Op::Dense, DType::F32, "gemv_32x1_t256"),
            (sparse(1), DType::F16, "gemv_32x8_t256"),
            (sparse(128), DType::F32, "gemv_32x4_t256"),
            (Op::Masked, DType::F16, "gemv_32x4_t256"),
            (Op::Dense, DType::F16, "coop_64x64x32_t128"),
            (Op::Masked24, DType::F16, "coop_64x64x32_t128"),
            (sparse(1), DType::F16, "coop_64x64x32_t128"),
            (sparse(16), DType::F16, "coop_64x64x32_t128"),
        ] {
            let kernel = kernel(op, storage, way);
            let (m, n) = kernel.way().tile();
            verify(&kernel, (m as usize, n as usize, 64));
        }
    }
}
