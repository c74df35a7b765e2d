//! The options of `sparse24 bench`, and what follows from them alone, for layers and for models.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use regex::Regex;

use crate::cli::command::{command_line, quoted};
use crate::cli::output::Output;
use crate::cli::shapes::{self, Float, OpName, Shape};
use crate::cli::{compare, kernels, tuning};
use sparse24::engine::{Device, DeviceInfo, Options};
use sparse24::kernels::{Architecture, ShaderChecks};
use sparse24::mask::VectorLen;
use sparse24::matrix::DType;
use sparse24::measure::{PlannedBy, Policy};
use sparse24::problem::Op;
use sparse24::report::Environment;
use sparse24::simd::SimdLevel;

/// Measure dense, 2:4 and masked GEMMs side by side, every result verified first.
///
/// Computes Y = X·Wᵀ for weights W of m output features by k input features and n tokens. 2:4 weights and the mask are
/// the dense weights pruned by magnitude.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:
  sparse24 bench --shapes llama-8b --tokens 1,512 --dtype f16 --vector 1,32,128
  sparse24 bench --device llvmpipe --shapes 65x33x100 --ops dense,sparse24 --json run.json
  sparse24 bench --weights model.safetensors --filter 'encoder.*dense' --tokens 128
  sparse24 bench --model bert-base --batch 8 --seq 128 --vector 32 --json bert.json
  sparse24 bench --explain --architecture rdna3 --shapes llama-8b   # a GPU elsewhere
  sparse24 bench --format md                             # a table to paste
  sparse24 bench --compare before.json --fail-slower 5   # exit code 3 if slower

Exit codes:
  0  every row is verified
  1  an error, or tensors of --weights that could not be measured beside others
  2  wrong options
  3  a row failed verification, or is slower than --fail-slower allows",
    mut_arg("json", |json| json.alias("out"))
)]
pub(crate) struct Args {
    /// Device: `auto`, `cpu`, or part of an adapter's name (see `sparse24 devices`).
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(super) device: String,
    /// Layers: bert-base, bert-large, minilm, llama-8b, square, or MxNxK (out features x tokens x in features).
    #[arg(long, value_name = "SHAPE,...", value_delimiter = ',', default_value = "bert-base")]
    pub(super) shapes: Vec<Shape>,
    /// Tokens of the named models and of --weights; MxNxK and square have their own.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    pub(super) tokens: Vec<NonZeroUsize>,
    /// Measure a whole model instead of single layers: a folder with config.json and model.safetensors, in a binary
    /// built with the feature `hub` the name of one on the Hugging Face hub, or one of minilm, bert-base, bert-large,
    /// smollm2, llama-1b, llama-8b for random weights of that model's sizes.
    #[arg(long, value_name = "DIR|NAME", conflicts_with_all = ["shapes", "tokens", "weights", "plan"])]
    pub(super) model: Option<String>,
    /// Texts of a batch of the --model; 32 unless given, 1 for a language model.
    #[arg(long, value_name = "B", requires = "model")]
    pub(super) batch: Option<NonZeroUsize>,
    /// Tokens of each of its texts; 64 unless given, 512 for a language model: of a prompt, after which a token is
    /// timed.
    #[arg(long, value_name = "S", requires = "model")]
    pub(super) seq: Option<NonZeroUsize>,
    /// Element type of weights, activations and output; f32, or with --weights the file's own (bf16 as f32), unless
    /// given.
    #[arg(long)]
    pub(super) dtype: Option<Float>,
    /// Vector lengths of the 2:4 rows: how many rows of W share one pattern. [default: 1,32; with --model 1,32,128]
    #[arg(long, value_name = "V,...", value_delimiter = ',')]
    pub(super) vector: Vec<VectorLen>,
    /// Operations. `auto` is 2:4 as an embedder's `Linear` runs it with the same tuning: dense unless 2:4 is
    /// faster by a margin; `masked24` holds the mask as 2:4 codes. [default: dense,sparse24,masked; with --model
    /// dense,sparse24,auto,masked]
    #[arg(long, value_name = "OP,...", value_delimiter = ',')]
    pub(super) ops: Vec<OpName>,
    /// Kernel: `auto` for the planner's choice, or a name as in the last column of --wide or the JSON's `kernel`: on
    /// the CPU device gemm_crate, columns, tile, gather, gemv or permute, on a GPU a size such as 64x64x16. Operations
    /// that have no such kernel are left to the planner, and so is `auto`.
    #[arg(long, value_name = "auto|KERNEL", default_value = "auto")]
    pub(super) plan: String,
    /// Print for each row which kernel was chosen and why, its predicted bound, padding, bytes and operations.
    #[arg(long)]
    pub(super) explain: bool,
    /// With --explain: say what would be chosen on a GPU of this architecture, by the machine code that its compiler
    /// made of the kernels, and run nothing: rdna2, rdna3, rdna4, ampere (GA100 alone), ada, apple-m1, adreno. Matrices
    /// of 8 x 8, which Apple's has, are left out.
    #[arg(long, value_name = "NAME", requires = "explain", value_parser = kernels::architecture,
        conflicts_with_all = ["device", "model", "weights", "plan", "threads", "cache", "no_tuning",
            "no_pipeline_cache", "json", "format", "wide", "legend", "compare", "fail_slower", "quick", "checked",
            "seed"])]
    pub(super) architecture: Option<Architecture>,
    /// Threads of the CPU device; one per core unless given. No effect on a GPU.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) threads: Option<u16>,
    /// Vector instructions of the CPU device's kernels: scalar, avx2 or avx512; the widest there are unless given. The
    /// crate `gemm`, which multiplies dense weights, takes the widest (without this crate's feature `avx512`, AVX2).
    #[arg(long, value_name = "LEVEL", env = "SPARSE24_SIMD")]
    pub(super) simd: Option<SimdLevel>,
    /// Measure on the 2-D float tensors of this file instead of random weights.
    #[arg(long, value_name = "FILE.safetensors", conflicts_with = "shapes")]
    pub(super) weights: Option<PathBuf>,
    /// Take only tensors whose name matches.
    #[arg(long, value_name = "REGEX", requires = "weights")]
    pub(super) filter: Option<Regex>,
    /// Seed of the random weights and activations.
    #[arg(long, default_value_t = 24)]
    pub(super) seed: u64,
    /// Three short samples instead of ten of 20 ms, or up to thirty where the machine is not quiet: to see that it
    /// runs, not how fast.
    #[arg(long)]
    pub(super) quick: bool,
    /// Keep the run-time checks in the shaders.
    #[arg(long)]
    pub(super) checked: bool,
    /// Folder of the caches of `sparse24 tune` (see there), from which a GPU's kernels are chosen.
    #[arg(long, value_name = "DIR")]
    pub(super) cache: Option<PathBuf>,
    /// Choose kernels by estimates, whatever was tuned.
    #[arg(long, conflicts_with = "cache")]
    pub(super) no_tuning: bool,
    /// Compile a GPU's kernels anew, and keep none beside the caches of `sparse24 tune` for the next command.
    #[arg(long)]
    pub(super) no_pipeline_cache: bool,
    #[command(flatten)]
    pub(super) output: Output,
    #[command(flatten)]
    pub(super) compare: compare::Flags,
}

impl Default for Args {
    /// What `bench` without flags means.
    fn default() -> Self {
        #[derive(Parser)]
        struct Bench {
            #[command(flatten)]
            args: Args,
        }
        Bench::parse_from(["bench"]).args
    }
}

impl Args {
    /// Texts of a batch and tokens of a text, for `--model`.
    pub(super) fn batch_and_seq(&self, default: (usize, usize)) -> (usize, usize) {
        (self.batch.map_or(default.0, NonZeroUsize::get), self.seq.map_or(default.1, NonZeroUsize::get))
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype.map_or(DType::F32, DType::from)
    }

    /// The run that this one is compared with, read now.
    pub(super) fn earlier(&self) -> Result<Option<compare::Earlier<'_>>> {
        self.compare.open()
    }

    /// The operations asked for, in the order of their rows.
    pub(super) fn operations(&self) -> Vec<(Op, PlannedBy)> {
        let model = self.model.is_some();
        let vectors = match &self.vector[..] {
            [] if model => shapes::vectors([1, 32, 128]),
            [] => shapes::vectors([1, 32]),
            given => given.to_vec(),
        };
        let ops = match &self.ops[..] {
            [] if model => &[OpName::Dense, OpName::Sparse24, OpName::Auto, OpName::Masked][..],
            [] => &[OpName::Dense, OpName::Sparse24, OpName::Masked],
            given => given,
        };
        shapes::operations(ops, &vectors)
    }

    /// Opens the device, and describes the run that starts now.
    pub(super) fn environment(&self) -> Result<(Device, Policy, Environment)> {
        let checks = if self.checked { ShaderChecks::Checked } else { ShaderChecks::Trusted };
        let options = Options { threads: self.threads.map(usize::from), simd: self.simd, checks, ..Options::default() };
        let device = Device::open(&self.device, options).context("--device")?;
        if !self.no_tuning {
            tuning::apply(&device, self.cache.as_deref())?;
        }
        if !self.no_pipeline_cache {
            tuning::keep_pipelines(&device, self.cache.as_deref());
        }
        let policy = if self.quick { Policy::QUICK } else { Policy::FULL };
        let environment = Environment::new(&device, &policy, self.seed, command_line());
        Ok((device, policy, environment))
    }

    /// The command that measures one row on what `source` says, with the dense one that it is compared with.
    pub(super) fn command_of(
        &self,
        device: &Device,
        source: Vec<String>,
        dtype: DType,
        op: Op,
        planned_by: PlannedBy,
    ) -> String {
        // The device itself, since `auto` is another one elsewhere.
        let device = match device.info() {
            DeviceInfo::Gpu(gpu) => quoted(&gpu.name),
            DeviceInfo::Cpu(_) => "cpu".to_owned(),
        };
        let mut words = vec!["sparse24".to_owned(), "bench".into(), "--device".into(), device];
        words.extend(source);
        words.extend(["--dtype".into(), dtype.to_string(), "--ops".into()]);
        match op {
            Op::Dense => words.push("dense".into()),
            Op::Masked => words.push("dense,masked".into()),
            Op::Masked24 => words.push("dense,masked24".into()),
            Op::Sparse24(v) => {
                let op = if planned_by == PlannedBy::Auto { "auto" } else { "sparse24" };
                words.extend([format!("dense,{op}"), "--vector".into(), v.to_string()]);
            }
        }
        if planned_by == PlannedBy::User {
            words.extend(["--plan".into(), self.plan.clone()]);
        }
        if let Some(threads) = self.threads {
            words.extend(["--threads".into(), threads.to_string()]);
        }
        if let Some(simd) = self.simd {
            words.extend(["--simd".into(), simd.to_string()]);
        }
        words.extend(["--seed".into(), self.seed.to_string()]);
        words.extend(self.quick.then(|| "--quick".into()));
        words.extend(self.checked.then(|| "--checked".into()));
        words.extend(self.no_tuning.then(|| "--no-tuning".into()));
        if let Some(cache) = &self.cache {
            words.extend(["--cache".into(), quoted(&cache.display().to_string())]);
        }
        words.join(" ")
    }
}
