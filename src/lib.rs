//! 2:4 structured sparsity on any GPU that wgpu reaches, and on the CPU where there is none.
//!
//! In a 2:4 sparse matrix at most two of every four consecutive weights of a row are non-zero. Half of the
//! multiplications of a linear layer disappear, and almost half of its bytes. NVIDIA's sparse tensor cores turn that
//! into a peak of 2x since the A100 (Mishra et al. 2021, [arXiv:2104.08378](https://arxiv.org/abs/2104.08378)); this
//! crate asks how much of it is real on the hardware at hand. It prunes and compresses weights, multiplies them on the
//! GPU through WGSL compute shaders, checks results against an f64 reference, and measures dense, 2:4 and masked
//! products side by side.
//!
//! # The pipeline
//! ```text
//!  weights      Matrix        m x k, f32, f16 or bf16                 matrix
//!     │  prune::magnitude     which weights stay                      prune
//!     ▼
//!  pattern      Mask24        two of four, shared by V rows           mask
//!     │  Sparse24::compress   values + 4-bit codes                    format   (files: io)
//!     ▼
//!  compressed   Sparse24
//!     │  Device::upload_weights   once                                engine    (in any form: weights)
//!     ▼
//!  on a device  Weights                      Problem                  problem
//!     │                                         │  Device::plan       plan  ◄ kernels (the list of GEMM kernels)
//!     │                                         ▼
//!     └────────────────────────────────────►  Plan
//!                                               │  Gemm { plan, weights, operands }
//!                                               ▼
//!  Attention, LayerNorm, ... ───────────►  Operation                  ops     (the list of operations)
//!                                               │  Device::prepare    engine ─► gpu (wgpu) or cpu
//!                                               ▼
//!  activations  Tensor ──────────────────►  Prepared::run             linear: all of this, for a layer
//!                                               │
//!                                               ▼
//!  output       Tensor ◄──── Oracle::verify ── reference              measure: verify, time, record
//!                                                                     tune: the best schedule, kept in a file
//! ```
//! The right column names the module. Nodes are types; labels on arrows are the functions between them. Imports:
//! [`measure`] uses [`engine`]; [`engine`] uses the devices (`gpu`, `cpu`); these use [`plan`], [`kernels`] and
//! [`mod@format`]. [`ops`] and [`graph`] import each other. [`mod@reference`] imports nothing that it checks.
//!
//! # The words
//! W is `m x k`, [out features, in features], and sparse along `k`. X is `n x k`, Y is `n x m`: token-major. The main
//! product is the linear form, Y = act(X·Wᵀ + bias) + residual. The plain form ([`Form::Gemm`]; the operation [`Gemm`]
//! computes both forms) is C = act(W·B + bias) + residual with row-major B (`k x n`) and C (`m x n`).
//!
//! - An [`Op`] is how the weights W are given: dense, 2:4 or masked. An [`Operation`] is something that a device
//!   computes, such as [`Gemm`] or [`LayerNorm`].
//! - A *group* is four consecutive `k` of a row.
//! - The *vector length* V is how many consecutive rows of W share one pattern. V = 1 is the standard 2:4. With a
//!   larger V one gathered activation serves V rows, so that fewer multiplications can become less time on hardware
//!   without sparse tensor cores.
//! - To *gather* is to load only the activations that the codes select.
//! - A *twin* is the f64 reference implementation of an operation ([`mod@reference`]) or of a graph ([`graph::twin`]).
//! - Speeds are *effective* (2mnk / t, whatever was skipped) or *executed* (the multiply-adds really done), always
//!   labelled, and a ratio always names its baseline.
//!
//! # One layer, from weights to output
//! ```
//! use sparse24::*;
//!
//! // An 8 x 16 layer, pruned by magnitude to 2:4 and compressed.
//! let dense = Matrix::uniform(8, 16, DType::F32, 1)?;
//! let mask = prune::magnitude(&dense, VectorLen::ONE)?;
//! let compressed = Sparse24::compress(&dense, &mask)?;
//!
//! // Uploaded once. `Device::auto()` would take a GPU if there is one.
//! let device = Device::cpu()?;
//! let weights = device.upload_weights(&compressed.clone().into())?;
//! let x = device.upload(&Matrix::uniform(3, 16, DType::F32, 2)?)?;
//! let bias = device.upload(&Matrix::from_f32(1, 8, &[0.5; 8])?)?;
//! let y = device.zeros(3, 8, DType::F32)?;
//!
//! // Planned, prepared, and run as often as wanted.
//! let op = Op::Sparse24(VectorLen::ONE);
//! let epilogue = Epilogue { bias: true, activation: Activation::Gelu, residual: false };
//! let problem = Problem { epilogue, ..Problem::linear(op, 8, 3, 16, DType::F32) };
//! let plan = device.plan(&problem)?;
//! println!("{}", plan.explain());
//! let operands = GemmOperands::new(&x, &y).bias(&bias);
//! let layer = device.prepare(&Gemm { plan: &plan, weights: &weights, operands })?;
//! layer.run()?;
//!
//! // Believed only when the f64 reference agrees.
//! let (given, x) = (compressed.into(), device.read(&x)?);
//! let operands = reference::Operands::new(&given, &x).bias(&[0.5; 8]);
//! let verdict = Oracle::new(&problem, operands)?.verify(&device.read(&y)?, Sample::All)?;
//! assert!(verdict.passed(), "{verdict}");
//! # Ok::<(), sparse24::Error>(())
//! ```
//!
//! [`Linear`] does the same for a layer whose number of tokens varies: it plans for each, and takes dense weights
//! unless 2:4 is faster by a margin.
//!
//! # Where the time goes, and which kernel is for it
//! With few tokens a layer costs the bytes of its weights, and 2:4 saves almost half of them whatever V is: the GEMV
//! kernels read every weight once. With many tokens it costs multiply-adds. Halving them pays only if what selects the
//! activations is cheap beside them: from V = 8 on a gathered activation serves all features of a thread, and the
//! gathering kernel reads no more workgroup memory than the dense one does; at V = 1 every multiply-add would read a
//! word of its own. On cooperative matrices (tensor cores) 2:4 kernels gather from V = 16 on, and expand below. They
//! gather once for each pattern among the 32 to 128 rows of a workgroup's tile, so a larger V costs less, up to 128
//! rows. Where no kernel wins, 2:4 weights can still be kept and expanded on the way to workgroup memory, at dense
//! speed. CPU multiply-add instructions (x86) can take one operand from memory, so gathering costs no extra instruction
//! and pays at V = 1 too. [`kernels`] lists the GPU's schedules and [`plan::CpuSchedule`] the CPU's, [`plan`] chooses
//! by estimate, [`tune`] by measurement, and [`Plan::explain`] says why.
//!
//! # Which weights are pruned
//! Magnitude is the simplest criterion. [`prune`] also has Wanda (weight times input norm), a second-order criterion,
//! second-order pruning that updates the kept weights (SparseGPT), and channel permutation for 2:4. A new mask can be
//! combined with an existing one. Single weights, rows, columns and blocks are pruned as `torch.nn.utils.prune` does
//! ([`prune::Units`]), and channels between two layers are removed ([`graph::Removal`]). [`mod@select`] says which
//! layers to prune, by what the model may lose or by the time that it may take. Pruned matrices are stored in this
//! crate's format or in one of the others that people have: [`io`].
//!
//! # A whole model
//! What a model computes, linear layers and what is between them (embeddings, norms, rotary positions, attention,
//! gates, pooling), are operations: [`ops`]. A model is data: a [`graph`](graph::Graph) of named nodes, each an
//! operation with what it reads. A file of [`models`] makes one of a config and the names of tensors; nothing else
//! knows an architecture.
//!
//! ```text
//!  ops/<name>.rs      an operation: operands, check, GPU program, CPU loops, cost; and what it is as a node
//!        ▲            files of the same name: reference/<name>.rs, shaders/<name>.wgsl, tests/ops/<name>.rs
//!        │ nodes
//!  graph.rs           Graph: nodes, values, parameters, which channels may be permuted together
//!        ▲            Checkpoint (host) ─► Model (device) ─► Forward (one batch and sequence): one submission
//!        │ builds     tools on any graph: calibration, ablation, permutation, times; the f64 twin
//!  models/<name>.rs   bert, efficientnet, llama: config.json + names of tensors ─► Graph
//!        ▲
//!  text.rs            Encoder: a folder of files ─► embeddings of texts (feature `text`)
//!  vision.rs          Classifier: a folder of files ─► classes of pictures (feature `vision`)
//! ```
//!
//! ## The way of one weight matrix
//! `encoder.layer.0.output.dense.weight` of a folder: [`models::load`] reads its `config.json` and makes a graph in
//! which a node of the operation `gemm` reads a parameter of that name. [`graph::Checkpoint::load`] asks [`io`] for the
//! tensor and holds it as [`HostWeights`], dense. [`graph::Checkpoint::calibrate`] runs texts through the model and
//! shows it to [`prune::SparseGpt`] with the statistics of its inputs; the [`Mask24`] and the weights that come back
//! become a [`Sparse24`] by [`Sparse24::compress`], and take its place. [`graph::Model::new`] gives it to a [`Linear`],
//! which asks [`plan`] for a batch of tokens, uploads it in the form that the plan wants ([`Device::upload_weights`]),
//! and binds it as a [`Gemm`]. The plan's kernel multiplies by it, in every pass.
//!
//! ## The way of one text
//! `text::Tokenizer` makes token ids of it, `text::Encoder` puts it into a batch of texts of its length and asks
//! [`graph::Model::forward`] for the pass of that shape, whose calls are prepared once. [`graph::Forward::run_on`]
//! writes ids and lengths to the device and submits all calls at once: the node `embeddings` looks rows up, norms,
//! products and attention follow in the graph's order, each value in a buffer that is used again after its last reader.
//! The pooled states are read back, and `text::Pipeline` does on the host what is left to do. [`graph::twin`] makes the
//! same walk in f64.
//!
//! ## Convolutions
//! A convolution is a GEMM of what its windows see: [`Im2col`] packs them, unless a window is one pixel, and the same
//! kernels multiply them, dense, 2:4 or masked, with bias, activation and residual in the epilogue. Images are rows of
//! pixels whose columns are channels (NHWC), so that 2:4 runs along channels, tap by tap. Batch norms are folded into
//! weights and biases when these are loaded ([`graph::Graph::convolution`]). [`Depthwise`] convolutions are operations
//! of their own. To a graph an image is a text whose tokens are its pixels, so calibration, ablation and pruning work
//! on it as they are.
//!
//! # Weights that change
//! [`train`] brings a pruned model back to the dense one on text without labels. [`graph::TrainingPass`] walks a graph
//! forwards and in reverse: each operation has its gradient beside it, and that of a product is computed from 2:4
//! weights as they are, for the kept ones alone ([`ops::gemm`]). Weights pruned to 2:4 are not stored, so they are not
//! trained; weights pruned by any other mask are kept at zero.
//!
//! Your own training loop may keep dense weights and multiply by their 2:4 form: [`Sparsify`] prunes and compresses a
//! dense tensor and overwrites, in place on the device, the [`Weights`] that prepared GEMMs already use. See
//! [`ops::sparsify`].
//!
//! # What was measured
//! [`measure`] verifies, then times. Its records, those of other programs and of other machines can be compared and put
//! on one page: the module `report` (feature `report`).
//!
//! What a driver's compiler makes of the kernels, registers, spills and the instructions of their inner loops, can be
//! seen without a GPU, on devices that Mesa's drivers pretend to have: the module `compile` (feature `compile`).
//!
//! # Inside another program
//! A program that owns a wgpu device opens it with [`Device::descriptor`], wraps it with [`Device::from_wgpu`], its
//! buffers with [`Tensor::from_buffer`], and records layers into its own encoders with [`engine::GpuCall::record`]:
//! nothing is submitted, waited for or copied behind its back.
//!
//! In a browser nothing may block: [`Device::open_async`], [`Device::read_async`], [`Timer`](measure::Timer)'s and
//! [`measure::run_async`] are what their namesakes wait for, and there are no files: an [`io::Store`] in memory takes
//! the place of a disk. The crate in `src/web` makes a page of them that measures through WebGPU and runs a model.
//!
//! [`Device::keep_pipelines`] keeps what a Vulkan driver compiles in a folder of the caller's, for the next process.
//!
//! # What is checked, and how
//! Every figure is of a result that was verified first, against an f64 reference that shares no code with the kernels:
//! on the operands that are timed, within a bound derived from `k` and f32's round-off, and on whole numbers, where the
//! bound is zero and one wrong product shows. The outputs checked are spread over the whole result, one feature and one
//! token of every 32 (up to 512 of each), and none of the others may be left unwritten. The tests run every kernel
//! (operation, vector length, schedule, tile, storage type) against the same reference on two software drivers, with
//! epilogues, forms and output types in rotation (`SPARSE24_TEST_ALL=1` takes the whole product of 24,000), compile
//! every shader in Tint, the compiler of browsers, and hold the format bit for bit against files made by torch and
//! compressed-tensors. Kernels of cooperative matrices run with the matrices emulated in plain WGSL where their tiles
//! fit the driver's workgroup memory, and those of 8x8x8 blocks by llvmpipe's own matrices, which it has from Mesa 26
//! on. On any device a probe multiplies blocks of whole numbers first: a driver that gets them wrong, or is known to be
//! wrong, has no cooperative matrices here.
//!
//! # Limits
//! - No GPU has been timed yet: the planner's estimates rest on the machine code that Mesa's compilers make, and
//!   cooperative-matrix kernels have never run on hardware that has them: those of 16x16x16 blocks and of subgroups of
//!   32 and 64 only emulated in plain WGSL. What naga writes for Metal has never been compiled there.
//! - A device that its owner has opened ([`Device::from_wgpu`]) runs no cooperative matrices: wgpu reports their shapes
//!   only through the adapter, which such a caller does not pass.
//! - On a GPU at V = 1 with many tokens no kernel beats dense, and at V = 2 few are expected to; [`Linear`] takes dense
//!   weights there. "Never slower than dense" is as good as the estimates until [`tune`] has measured.
//! - On the CPU the dense baseline is this crate's own kernel up to 4 tokens, else the crate `gemm`, called on slices
//!   of 256 along `k` up to 256 tokens (f16 and bf16 weights are widened in slices of their own). On a GPU it is a
//!   kernel of this crate, which on llvmpipe loses to others: see benches/README.md.
//! - Without AVX2, and on ARM, the CPU device's kernels are plain loops.
//! - The plain form (B is `k x n`) is transposed into scratch first, and X is padded where `k` is no multiple of 32.
//! - GPUs widen bf16 to f32 when weights are uploaded; the CPU device widens wherever they are used.
//! - Matrices beyond one binding of a GPU (128 MiB on llvmpipe) are cut up; B and C of the plain form are refused, and
//!   so are embedding tables.
//! - If an activation is infinite or NaN, its product with a zero, pruned or masked weight is either NaN or skipped;
//!   kernels differ.
//!
//! # Map of the source
//! | file | what it owns |
//! |---|---|
//! | `dtype.rs` `matrix.rs` `mask.rs` `problem.rs` | what stages pass on: element types, matrices, bit masks, one GEMM with its epilogue |
//! | `window.rs` | windows of images: where a convolution's kernel lies |
//! | `weights.rs` | the weights of a layer on the host: dense, 2:4, masked |
//! | `format.rs` `format/` `groups.rs` | the format: its specification, compress, decompress, validate; what values are held in; groups of four, many at a time |
//! | `prune.rs` `prune/` | which weights stay: magnitude, Wanda, second order, SparseGPT; statistics; orders of channels; other granularities than 2:4 |
//! | `error.rs` `memory.rs` | the one error type; memory, asked for before it is taken |
//! | `metrics.rs` `bootstrap.rs` | what a model's quality is measured by; what data leave open of a figure |
//! | `select.rs` | which layers to prune, by what may be lost or by time |
//! | `io.rs` `io/` | safetensors, shards, folders, everybody's 2:4 layouts; what weights were made from |
//! | `ops.rs` `ops/` | operations, a file each: operands, checks, cost, GPU program, CPU loops; their list |
//! | `reference.rs` `reference/` | the f64 oracle and the error bounds, a file for each operation |
//! | `layout.rs` | how weights lie in GPU memory: panels, and pieces that fit a binding |
//! | `kernels.rs` `kernels/` | what a GPU program is; the GEMM kernels, their names and their WGSL (`shaders/`) |
//! | `plan.rs` `plan/` | problem + capabilities (+ measured times) → plan, explained |
//! | `gpu.rs` | the GPU: the only file that talks to wgpu's devices |
//! | `cpu.rs` `cpu/` `simd.rs` | the CPU device: layouts of weights, 2:4 and dense kernels, epilogue; vector instructions |
//! | `engine.rs` `engine/` | what an embedder calls: upload, prepare, run; tensors, indices and weights as operands |
//! | `linear.rs` | a layer in whichever form runs it best |
//! | `compile.rs` `compile/` | what GPU compilers make of the kernels, and of anyone's SPIR-V, without a GPU: machine code, banks, an estimate |
//! | `graph.rs` `graph/` | a model as data; its parameters, passes with and without gradients, f64 twin; calibration, ablation, permutation, removal of channels, times |
//! | `train.rs` `train/` | retraining: a student that learns from a teacher; order of texts, losses, what a run goes on from |
//! | `models.rs` `models/` | the architectures: config and names of tensors to graph, a file each |
//! | `text.rs` `text/` | encoders of texts: folders, tokens, what follows the last states; verified and timed; linear probes |
//! | `vision.rs` | classifiers of images: folders, pictures, names of classes |
//! | `measure.rs` `measure/` | verify, time, record, ceilings; the one timer, noise, the race of the tuner's candidates |
//! | `report.rs` `report/` | table and JSON; files read back and checked, runs compared, the page and its charts, claims |
//! | `tune.rs` | the best kernels of a device: raced, and kept in a cache |
//! | `main.rs` `cli.rs` `cli/` | the binary: the command line |
//! | `python/` | the Python package: a crate of its own, for a module that Python loads, and its Python |
//! | `web/` | the page that measures in a browser: a crate of its own, for WebAssembly |

pub mod bootstrap;
#[cfg(feature = "compile")]
pub mod compile;
mod cpu;
mod dtype;
pub mod engine;
pub mod error;
pub mod format;
mod gpu;
pub mod graph;
mod groups;
pub mod io;
pub mod kernels;
mod layout;
pub mod linear;
pub mod mask;
pub mod matrix;
pub mod measure;
mod memory;
pub mod metrics;
pub mod models;
pub mod ops;
pub mod plan;
pub mod problem;
pub mod prune;
pub mod reference;
#[cfg(feature = "report")]
pub mod report;
pub mod select;
pub mod simd;
#[cfg(feature = "text")]
pub mod text;
pub mod train;
pub mod tune;
#[cfg(feature = "vision")]
pub mod vision;
pub mod weights;
mod window;

macro_rules! operations {
    ($($stem:ident::$operation:ident)*) => {
        pub use ops::{$($operation),*};
    };
}
crate::each_operation!(operations);

pub use engine::{Compressed, Device, Indices, Options, Prepared, Tensor, Weights, wgpu};
pub use error::{Error, Result};
pub use format::Sparse24;
pub use io::TensorFile;
pub use linear::Linear;
pub use mask::{Mask, Mask24, VectorLen};
pub use matrix::{DType, Element, Elements, Matrix};
pub use ops::activation::ActivateGrad;
pub use ops::depthwise::{DepthwiseGradW, DepthwiseGradX};
pub use ops::embedding::EmbeddingGrad;
pub use ops::gated::GatedGrad;
pub use ops::gemm::GemmOperands;
pub use ops::im2col::Im2colGrad;
pub use ops::layer_norm::LayerNormGrad;
pub use ops::mean_pooling::MeanPoolingGrad;
pub use ops::qk_norm::QkNormGrad;
pub use ops::rms_norm::RmsNormGrad;
pub use ops::rotary::RotaryGrad;
pub use ops::{Cost, Gradient, Operation};
pub use plan::{Plan, Tuning};
pub use problem::{Activation, Epilogue, Form, Op, Problem};
pub use reference::{Oracle, Sample, Verdict};
pub use weights::HostWeights;
pub use window::Window;

/// The README's example, compiled and run with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
