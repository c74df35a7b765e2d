//! What is asked of a device: the words that the planner, the kernels and the oracle share.
//!
//! A [`Problem`] is one GEMM with its epilogue: shapes, types and operation, and nothing about how it is done.

use std::fmt;

use crate::mask::VectorLen;
use crate::matrix::DType;

/// How the weights W are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// Every weight, `m x k`.
    Dense,
    /// Compressed 2:4 values and metadata whose pattern is shared by this many rows.
    Sparse24(VectorLen),
    /// Every weight, and a bit mask that is applied while they are loaded.
    Masked,
    /// The same, with the mask given as 2:4 codes, one per row and group.
    Masked24,
}

impl Op {
    /// `dense`, `sparse24` or `masked`: the `op` field of benchmark files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Sparse24(_) => "sparse24",
            Self::Masked | Self::Masked24 => "masked",
        }
    }

    /// All operations, 2:4 at every vector length.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Dense, Self::Masked, Self::Masked24].into_iter().chain(VectorLen::ALL.map(Self::Sparse24))
    }

    /// The part of a kernel's name: as [`Op::name`], but `masked24` where the mask is given as codes.
    pub(crate) const fn kernel_name(self) -> &'static str {
        match self {
            Self::Masked24 => "masked24",
            other => other.name(),
        }
    }

    /// The vector length of a 2:4 operation.
    pub const fn vector(self) -> Option<VectorLen> {
        match self {
            Self::Sparse24(v) => Some(v),
            Self::Dense | Self::Masked | Self::Masked24 => None,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sparse24(v) => write!(f, "2:4 at V = {v}"),
            Self::Dense => f.write_str("dense"),
            Self::Masked => f.write_str("masked"),
            Self::Masked24 => f.write_str("masked by 2:4 codes"),
        }
    }
}

/// How the other operand and the output are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Form {
    /// The linear layer: X is `n x k` and Y is `n x m`, both token-major. Y = act(X·Wᵀ + bias) + residual.
    Linear,
    /// The plain product of row-major matrices: B is `k x n` and C is `m x n`. C = act(W·B + bias) + residual, where
    /// bias has one entry per row of C.
    Gemm,
}

impl Form {
    /// `linear` or `gemm`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Gemm => "gemm",
        }
    }
}

/// The function applied to each output after the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Activation {
    /// The identity.
    None,
    /// max(x, 0).
    Relu,
    /// min(max(x, 0), 6), as in MobileNet and EfficientNet-Lite.
    Relu6,
    /// x·Φ(x) with the error function, as in BERT (Hendrycks & Gimpel 2016).
    Gelu,
    /// The tanh approximation of [`Activation::Gelu`], as in GPT-2.
    GeluTanh,
    /// x·σ(x), also called swish.
    Silu,
}

impl Activation {
    /// All activations.
    pub const ALL: [Self; 6] = [Self::None, Self::Relu, Self::Relu6, Self::Gelu, Self::GeluTanh, Self::Silu];

    /// `none`, `relu`, `relu6`, `gelu`, `gelu_tanh` or `silu`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Relu => "relu",
            Self::Relu6 => "relu6",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Silu => "silu",
        }
    }
}

/// What is done to the accumulator before it is stored: act(acc + bias) + residual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epilogue {
    /// Add one f32 per output feature.
    pub bias: bool,
    /// Then apply this.
    pub activation: Activation,
    /// Then add a matrix of the output's shape, layout and type.
    pub residual: bool,
}

impl Epilogue {
    /// Store the accumulator as it is.
    pub const NONE: Self = Self { bias: false, activation: Activation::None, residual: false };

    /// All epilogues.
    pub fn all() -> impl Iterator<Item = Self> {
        Activation::ALL.into_iter().flat_map(|activation| {
            [(false, false), (false, true), (true, false), (true, true)].map(|(bias, residual)| Self {
                bias,
                activation,
                residual,
            })
        })
    }
}

impl fmt::Display for Epilogue {
    /// The parts that are there, joined by underscores, such as `bias_gelu_residual`; `none` if there are none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let activation = (self.activation != Activation::None).then(|| self.activation.name());
        let parts = [self.bias.then_some("bias"), activation, self.residual.then_some("residual")];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        f.write_str(if parts.is_empty() { "none".into() } else { parts.join("_") }.as_str())
    }
}

/// One GEMM with its epilogue: `m` output features, `n` tokens, `k` input features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// How the weights are given.
    pub op: Op,
    /// How X and Y are laid out.
    pub form: Form,
    /// Output features: rows of W.
    pub m: usize,
    /// Tokens.
    pub n: usize,
    /// Input features: columns of W before compression.
    pub k: usize,
    /// Element type of W and X: f32 or f16. (bf16 weights are for f32 problems: widened when they are uploaded, or on
    /// the CPU when they are used.)
    pub storage: DType,
    /// Element type of Y and of the residual: f32 or f16.
    pub output: DType,
    /// What is done to each output before it is stored.
    pub epilogue: Epilogue,
}

impl Problem {
    /// A linear layer without epilogue whose output has the storage type.
    pub fn linear(op: Op, m: usize, n: usize, k: usize, storage: DType) -> Self {
        Self { op, form: Form::Linear, m, n, k, storage, output: storage, epilogue: Epilogue::NONE }
    }

    /// Floating-point operations of the dense product, 2·m·n·k: what effective TFLOPS count.
    pub fn effective_flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// Floating-point operations that the operation asks for: half of them for 2:4. A masked product multiplies by its
    /// zeros, and so does a 2:4 product whose [plan](crate::plan::Plan::executed_flops) expands the weights or takes
    /// dense ones.
    pub fn executed_flops(&self) -> f64 {
        match self.op {
            // Two products per group, the last group padded.
            Op::Sparse24(_) => 4.0 * self.m as f64 * self.n as f64 * self.k.div_ceil(4) as f64,
            Op::Dense | Op::Masked | Op::Masked24 => self.effective_flops(),
        }
    }

    /// Shape of X (linear form) or B (plain form).
    pub fn x_shape(&self) -> (usize, usize) {
        match self.form {
            Form::Linear => (self.n, self.k),
            Form::Gemm => (self.k, self.n),
        }
    }

    /// Shape of Y (linear form) or C (plain form), and of the residual.
    pub fn y_shape(&self) -> (usize, usize) {
        match self.form {
            Form::Linear => (self.n, self.m),
            Form::Gemm => (self.m, self.n),
        }
    }
}
