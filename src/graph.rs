//! A model as data: named nodes that compute named values from named parameters.
//!
//! ```text
//!  config.json ─► models::load ─► Graph        nodes, values, parameters, channels     (this file)
//!                                   │
//!  *.safetensors ───────────────► Checkpoint   its parameters on the host              checkpoint
//!                                   │  Model::new        uploaded once                 model
//!                                   ▼
//!  token ids ───────────────────► Forward      one for each (batch, sequence)          forward
//!                                   │  one submission; any value can be tapped
//!                                   ▼
//!                                 values        ◄─ twin: the same nodes evaluated in f64, as the reference
//!
//!  Trainable ─► TrainingPass    the same with gradients, forwards and then in reverse        backward
//!
//!  Decoder                      passes over new tokens, with a cache of the earlier ones        decoder
//!
//!  tools on any graph: calibrate (statistics of inputs), ablation (one layer replaced), permute (orders of
//!  channels), removal (a model with fewer channels), times (a pass and its layers)
//! ```
//! A [`Node`] is an operation of [`ops`](crate::ops) with what it reads and the one value that it writes. Its operation
//! is behind the trait [`NodeOp`], which an operation's file implements: nothing here knows which operations there are.
//! A model's file ([`models`](crate::models)) calls builder methods such as [`Graph::linear`], each of which adds a
//! node and the parameters that it needs, and declares which channels may be reordered together. Nothing else knows an
//! architecture.
//!
//! Values have a number of rows for every (batch, sequence): one per token, one per sequence, or a fixed number per
//! sequence. There is no other shape inference. An image is a sequence, too: its tokens are its pixels, each by the
//! number `0xRRGGBB` ([`Graph::for_images`]), so that whatever runs texts through a graph runs images. Nodes stand in
//! the order in which they run, so that the backward pass meets every reader of a value before the node that makes it.
//!
//! Invariants: a node reads values of nodes before it; names of nodes and of parameters are unique; each weights
//! parameter is read by one node.

mod ablation;
mod backward;
mod batches;
mod calibrate;
mod checkpoint;
mod convolution;
mod decoder;
mod forward;
mod model;
mod permute;
mod removal;
mod times;
pub mod twin;

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use ndarray::Array2;

pub use ablation::{Ablation, Outputs};
pub use backward::{HeadLoss, HeadPass, Target, Trainable, TrainingPass};
pub use batches::{Batch, Batching, batches};
pub use calibrate::{Calibration, CalibrationInputs, Visit};
#[cfg(feature = "text")]
pub(crate) use checkpoint::Reader;
pub use checkpoint::{Checkpoint, LinearTensor, Sparsity};
use convolution::StoredKernel;
pub use convolution::{BatchNorm, ConvolutionSpec};
pub use decoder::Decoder;
#[cfg(feature = "text")]
pub(crate) use decoder::token_loss;
pub use forward::Forward;
pub use model::Model;
pub use permute::{Kept, Permuted};
pub use removal::{ChannelWeights, HiddenChannels, HiddenSpec, Removal, SizeField};
pub use times::{Times, time_forwards};

use crate::engine::{Device, Indices, Prepared, Tensor};
use crate::error::{Error, Result, checked_mul};
use crate::linear::Linear;
use crate::matrix::{DType, Matrix};
use crate::ops::Gradient;
use crate::ops::gemm::TrainableWeights;
use crate::problem::Epilogue;

/// A value that a node computes, by its place in [`Graph::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(usize);

/// A parameter, by its place in [`Graph::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(usize);

/// How many rows a value has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One for each token of each sequence, padding included.
    Tokens,
    /// One for each sequence.
    Sequences,
    /// So many for each sequence, whatever its tokens: the positions of an image after a convolution.
    Each(usize),
}

impl Rows {
    /// Their number for so many sequences of `seq` tokens.
    pub fn count(self, batch: usize, seq: usize) -> Result<usize> {
        match self {
            Self::Tokens => checked_mul("tokens of a batch", batch, seq),
            Self::Sequences => Ok(batch),
            Self::Each(rows) => checked_mul("rows of a batch", batch, rows),
        }
    }
}

/// The element type of a value or a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// That of the model's activations, which its user chooses: f32 or f16.
    Model,
    /// f32, whatever the model's is.
    F32,
}

impl Precision {
    /// The element type in a model of this one.
    pub fn of(self, model: DType) -> DType {
        match self {
            Self::Model => model,
            Self::F32 => DType::F32,
        }
    }
}

/// What a node computes: a matrix on the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// The name of the node that writes it.
    pub name: String,
    /// Number of rows.
    pub rows: Rows,
    /// Number of columns.
    pub cols: usize,
    /// Element type.
    pub precision: Precision,
}

/// What of the texts a node reads: one number for each token, or for each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The ids of the tokens; 0 past the end of a text.
    Ids,
    /// Position ids, counted from `first`. With `padding_idx` they are those that Hugging Face's
    /// `create_position_ids_from_input_ids` makes: a token of this id is not counted and gets `first - 1` (0 if `first`
    /// is 0). Rows past the end of a text count on.
    Positions {
        /// The position id of the first token that is counted.
        first: u32,
        /// The model's `padding_idx`, if it has one.
        padding_idx: Option<u32>,
    },
    /// The same number for each token.
    Constant(u32),
    /// The number of tokens of each text.
    Lengths,
}

impl Input {
    /// How many numbers it has.
    pub(crate) fn rows(self) -> Rows {
        match self {
            Self::Lengths => Rows::Sequences,
            Self::Ids | Self::Positions { .. } | Self::Constant(_) => Rows::Tokens,
        }
    }

    /// Whether they are the same whatever the texts, as long as these start at their first token.
    pub(crate) fn is_fixed(self) -> bool {
        matches!(self, Self::Constant(_) | Self::Positions { padding_idx: None, .. })
    }

    /// The numbers of one text, padded to `to.len()` tokens, or its length; `past` tokens of it have been before.
    pub(crate) fn write(self, ids: &[u32], past: u32, to: &mut [u32]) {
        match self {
            Self::Ids => {
                // Rows past the end get id 0, which every embedding table has.
                to.fill(0);
                to[..ids.len()].copy_from_slice(ids);
            }
            Self::Positions { first, padding_idx } => {
                let mut next = first.saturating_add(past);
                for (token, to) in to.iter_mut().enumerate() {
                    let counts = ids.get(token).copied() != padding_idx || padding_idx.is_none();
                    *to = if counts { next } else { first.saturating_sub(1) };
                    next += u32::from(counts);
                }
            }
            Self::Constant(value) => to.fill(value),
            Self::Lengths => to.fill(ids.len() as u32),
        }
    }
}

/// One operand of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Read {
    /// What another node computes.
    Value(ValueId),
    /// What the model has learnt.
    Param(ParamId),
    /// What the texts are.
    Input(Input),
}

/// How a parameter is used, and held on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// The weights of a linear layer, in any form of [`HostWeights`](crate::HostWeights).
    Weights,
    /// The weights of a linear layer that is neither pruned nor trained, such as a language model's head.
    DenseWeights,
    /// A matrix.
    Matrix(Precision),
}

impl ParamKind {
    /// Whether they are a linear layer's weights.
    pub(crate) fn is_weights(self) -> bool {
        matches!(self, Self::Weights | Self::DenseWeights)
    }
}

/// A stored tensor that a parameter is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// What it may be called, the usual name first.
    pub names: Vec<String>,
    /// Its shape. Several tensors are concatenated along dimension 0; with a conversion ([`Graph::set_conversion`]) any
    /// two-dimensional shape is allowed.
    pub shape: Vec<usize>,
}

/// What turns a stored matrix into the parameter that nodes read.
type Convert = Arc<dyn Fn(&Matrix) -> Result<Matrix> + Send + Sync>;

/// Something that the model has learnt.
#[derive(Clone)]
pub struct Param {
    /// Unique among parameters: that of the tensor that it is stored as, or of the layer that several are.
    pub name: String,
    /// How it is used.
    pub kind: ParamKind,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// The tensors that it is made of, concatenated along dimension 0.
    pub stored: Vec<StoredTensor>,
    /// Mean of its random initial values ([`Checkpoint::random`]): 1 for norm scales, else 0.
    pub around: f32,
    convert: Option<Convert>,
    /// How it is stored, if it is the weights of a convolution.
    kernel: Option<StoredKernel>,
    /// Its fixed value, if it is not learnt.
    constant: Option<Arc<Matrix>>,
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, kind, rows, cols, stored, .. } = self;
        write!(f, "{name}: {kind:?}, {rows} x {cols} of {stored:?}")
    }
}

/// An operand of a node on a device, for one batch size and sequence length.
#[derive(Clone, Copy, Debug)]
pub enum NodeOperand<'a> {
    /// A value or a parameter.
    Tensor(&'a Tensor),
    /// An input.
    Indices(&'a Indices),
    /// Weights, with the node's epilogue.
    Linear(&'a Linear),
    /// Weights that are trained.
    Trainable(&'a TrainableWeights),
}

impl NodeOperand<'_> {
    /// What it holds, for errors.
    fn kind(&self) -> &'static str {
        match self {
            Self::Tensor(_) => "a tensor",
            Self::Indices(_) => "indices",
            Self::Linear(_) => "weights",
            Self::Trainable(_) => "weights to be trained",
        }
    }
}

/// What a node is called with: device, batch size, sequence length, operands and output.
#[derive(Debug)]
pub struct NodeArgs<'a> {
    /// The device.
    pub device: &'a Device,
    /// Batch size: the number of sequences.
    pub batch: usize,
    /// Sequence length: the tokens of each sequence, padding included.
    pub seq: usize,
    /// The operands, in the order of [`Node::reads`].
    pub reads: Vec<NodeOperand<'a>>,
    /// The output.
    pub y: &'a Tensor,
}

impl<'a> NodeArgs<'a> {
    fn operand(&self, at: usize) -> Result<NodeOperand<'a>> {
        self.reads.get(at).copied().ok_or_else(|| no_operand(at, self.reads.len()))
    }

    /// Operand `at`, a tensor. An error is a mistake of the node's operation.
    pub fn tensor(&self, at: usize) -> Result<&'a Tensor> {
        match self.operand(at)? {
            NodeOperand::Tensor(tensor) => Ok(tensor),
            other => Err(wrong_operand(at, other.kind(), "a tensor")),
        }
    }

    /// Operand `at`, indices.
    pub fn indices(&self, at: usize) -> Result<&'a Indices> {
        match self.operand(at)? {
            NodeOperand::Indices(indices) => Ok(indices),
            other => Err(wrong_operand(at, other.kind(), "indices")),
        }
    }

    /// Operand `at`, weights.
    pub fn linear(&self, at: usize) -> Result<&'a Linear> {
        match self.operand(at)? {
            NodeOperand::Linear(linear) => Ok(linear),
            other => Err(wrong_operand(at, other.kind(), "weights")),
        }
    }

    /// Operand `at`, weights that are trained.
    pub fn trainable(&self, at: usize) -> Result<&'a TrainableWeights> {
        match self.operand(at)? {
            NodeOperand::Trainable(weights) => Ok(weights),
            other => Err(wrong_operand(at, other.kind(), "weights to be trained")),
        }
    }
}

/// What a node that [keeps numbers of tokens](NodeOp::cache_width) has of the earlier ones of each sequence, in a
/// [`Decoder`].
#[derive(Clone, Copy, Debug)]
pub struct NodeCache<'a> {
    /// `batch·capacity` rows of the node's width: of each sequence its tokens, one after the other.
    pub tensor: &'a Tensor,
    /// How many tokens of each sequence it has before this call.
    pub past: &'a Indices,
    /// Whether it is known to have none of any sequence.
    pub is_empty: bool,
}

/// What a node's backward is called with: all that its forward was called with, in f32, and the gradients.
#[derive(Debug)]
pub struct BackwardArgs<'a> {
    /// What the forward was called with. The output may be overwritten: all nodes that read it are done with it.
    pub forward: NodeArgs<'a>,
    /// What the forward saved for this call: see [`NodeOp::saves`].
    pub saved: Option<&'a Tensor>,
    /// The gradient of the node's value.
    pub dy: &'a Tensor,
    /// Where the gradient of each operand goes, in the order of [`Node::reads`]; `None` where none is wanted.
    pub gradients: Vec<Option<Gradient<'a>>>,
}

impl<'a> BackwardArgs<'a> {
    /// Where the gradient of operand `at` goes, if it is wanted.
    pub fn gradient(&self, at: usize) -> Option<Gradient<'a>> {
        self.gradients.get(at).copied().flatten()
    }
}

/// An operand of a node in the f64 reference ([`twin`]), for one text.
#[derive(Clone, Copy, Debug)]
pub enum ReferenceOperand<'a> {
    /// A value or a parameter. Pruned weights are 0.
    Matrix(&'a Array2<f64>),
    /// An input.
    Indices(&'a [u32]),
}

/// What a node is called with in the f64 reference ([`twin`]): its operands for one text, in the order of
/// [`Node::reads`].
#[derive(Clone, Debug)]
pub struct ReferenceArgs<'a>(pub Vec<ReferenceOperand<'a>>);

impl<'a> ReferenceArgs<'a> {
    /// Number of operands.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn operand(&self, at: usize) -> Result<ReferenceOperand<'a>> {
        self.0.get(at).copied().ok_or_else(|| no_operand(at, self.0.len()))
    }

    /// Operand `at`, a matrix. An error is a mistake of the node's operation.
    pub fn matrix(&self, at: usize) -> Result<&'a Array2<f64>> {
        match self.operand(at)? {
            ReferenceOperand::Matrix(matrix) => Ok(matrix),
            ReferenceOperand::Indices(_) => Err(wrong_operand(at, "indices", "a matrix")),
        }
    }

    /// Operand `at`, a vector such as a bias: the elements of its matrix.
    pub fn row(&self, at: usize) -> Result<Vec<f64>> {
        Ok(self.matrix(at)?.iter().copied().collect())
    }

    /// Operand `at`, indices.
    pub fn indices(&self, at: usize) -> Result<&'a [u32]> {
        match self.operand(at)? {
            ReferenceOperand::Indices(indices) => Ok(indices),
            ReferenceOperand::Matrix(_) => Err(wrong_operand(at, "a matrix", "indices")),
        }
    }
}

fn no_operand(at: usize, operands: usize) -> Error {
    Error::invalid(format!("the node has {operands} operands, operand {at} was asked for"))
}

fn wrong_operand(at: usize, holds: &str, wanted: &str) -> Error {
    Error::invalid(format!("operand {at} holds {holds}, not {wanted}"))
}

/// What a node computes, apart from its operands: the node's side of an operation of [`ops`](crate::ops).
pub trait NodeOp: fmt::Debug + Send + Sync {
    /// The operation: the stem of its four files.
    fn name(&self) -> &'static str;

    /// The call that computes the node's value.
    fn prepare(&self, args: &NodeArgs<'_>) -> Result<Prepared>;

    /// The value in f64, for one text without padding, by the operation's twin in [`reference`](mod@crate::reference).
    fn exact(&self, args: &ReferenceArgs<'_>) -> Result<Array2<f64>>;

    /// How many numbers it keeps of each token for the tokens after it. Attention to earlier tokens keeps keys and
    /// values; what treats each token by itself keeps none.
    fn cache_width(&self) -> usize {
        0
    }

    /// Whether a token's value depends on no later token, and what earlier ones have to do with it is in the cache:
    /// such operations can go on from a cache. The default is for operations that treat each token by itself.
    fn is_causal(&self) -> bool {
        true
    }

    /// The calls that compute the node's value for new tokens of sequences whose earlier ones are in the cache, and
    /// that put into the cache what later tokens need. The default is for operations that treat each token by itself.
    fn prepare_cached(&self, args: &NodeArgs<'_>, cache: Option<NodeCache<'_>>) -> Result<Vec<Prepared>> {
        let _ = cache;
        Ok(vec![self.prepare(args)?])
    }

    /// Whether its backward needs a further tensor of its value's shape that the forward saves. A linear layer with an
    /// activation saves the pre-activation X·Wᵀ + bias.
    fn saves(&self) -> bool {
        false
    }

    /// The calls that compute the node's value in a pass with gradients, and what the node [saves](Self::saves), into
    /// `saved`. Weights are [trainable](NodeArgs::trainable) there.
    fn prepare_saving(&self, args: &NodeArgs<'_>, saved: Option<&Tensor>) -> Result<Vec<Prepared>> {
        let _ = saved;
        Ok(vec![self.prepare(args)?])
    }

    /// The calls that compute the wanted gradients of the operands from the gradient of the node's value. They run in
    /// this order, after the calls of all nodes that read the value. The default is an error: the operation has no
    /// gradient.
    fn backward(&self, args: &BackwardArgs<'_>) -> Result<Vec<Prepared>> {
        let _ = args;
        Err(Error::invalid(format!("{} has no gradient", self.name())))
    }

    /// What a linear layer does to its product before it stores it; [`Epilogue::NONE`] for all other operations.
    fn epilogue(&self) -> Epilogue {
        Epilogue::NONE
    }
}

/// An operation with what it reads and writes.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique among nodes, such as `encoder.layer.0.attention.self`.
    pub name: String,
    /// What it computes.
    pub op: Arc<dyn NodeOp>,
    /// Its operands, in the order in which its operation takes them.
    pub reads: Vec<Read>,
    /// Its value.
    pub writes: ValueId,
}

impl Node {
    /// The values that it reads.
    pub fn values(&self) -> impl Iterator<Item = ValueId> {
        self.reads.iter().filter_map(|read| match read {
            Read::Value(value) => Some(*value),
            Read::Param(_) | Read::Input(_) => None,
        })
    }

    /// The parameters that it reads.
    pub fn params(&self) -> impl Iterator<Item = ParamId> {
        self.reads.iter().filter_map(|read| match read {
            Read::Param(param) => Some(*param),
            Read::Value(_) | Read::Input(_) => None,
        })
    }
}

/// A linear layer of a graph: a node that reads weights.
#[derive(Clone, Copy, Debug)]
pub struct LinearLayer<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Its place in [`Graph::nodes`].
    pub node: usize,
    /// Its activations.
    pub x: ValueId,
    /// Its weights.
    pub weights: ParamId,
    /// Its bias, if it has one.
    pub bias: Option<ParamId>,
}

/// A dimension (such as the hidden units of a feed-forward layer) whose channels may be reordered without changing what
/// the model computes, provided that all weights of a [set](ChannelSet) are reordered alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channels {
    /// Its name in errors and reports.
    pub name: String,
    /// Number of channels.
    pub count: usize,
    /// Channels of a block, such as one attention head; channels move only within their block. `count` if there is no
    /// such limit.
    pub width: usize,
    /// Whether whole blocks may also be reordered, by the same order in all sets.
    pub blocks_move: bool,
    /// The weights that have these channels. Within a block each set has an order of its own.
    pub sets: Vec<ChannelSet>,
}

/// Weights that must share one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelSet {
    /// (weights, first row): the channels are its [`Channels::count`] rows from there on, and the bias entries of these
    /// rows.
    pub rows: Vec<(ParamId, usize)>,
    /// Weights whose columns, all of them, are the channels.
    pub columns: Vec<ParamId>,
}

/// What texts a graph takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ids are below it.
    pub vocabulary: usize,
    /// The most tokens of a text.
    pub tokens: usize,
}

/// The repeated blocks of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// What tensor names have before the block number, such as `encoder.layer.`.
    pub prefix: String,
    /// Number of blocks.
    pub count: usize,
    /// The key of config.json that gives it, such as `num_hidden_layers`; named in errors.
    pub field: &'static str,
}

/// A model as data.
///
/// ```
/// use sparse24::graph::{Checkpoint, Model};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::{Activation, DType, Device};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// assert_eq!(graph.linears().count(), 8);
/// // Every value has a name.
/// let inner = graph.value_named("encoder.layer.1.intermediate.dense").map(|id| graph.value(id).cols);
/// assert_eq!(inner, Some(16));
///
/// let model = Model::new(&Device::cpu()?, &Checkpoint::random(graph, DType::F32, 24)?)?;
/// let forward = model.forward(2, 4)?;
/// forward.write(&[vec![1, 2, 3, 4], vec![5]])?;
/// forward.run()?;
/// assert_eq!(model.device().read(forward.output())?.rows(), 8);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Graph {
    limits: Limits,
    /// Lines and columns of the image that it takes in place of a text.
    image: Option<[usize; 2]>,
    prefixes: Vec<String>,
    blocks: Option<Blocks>,
    params: Vec<Param>,
    values: Vec<Value>,
    nodes: Vec<Node>,
    channels: Vec<Channels>,
    hidden: Vec<HiddenChannels>,
    /// Values that are kept to the end of a pass. The last is the main output.
    outputs: Vec<ValueId>,
}

impl Graph {
    /// A graph without nodes, for texts of these limits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            image: None,
            prefixes: Vec::new(),
            blocks: None,
            params: Vec::new(),
            values: Vec::new(),
            nodes: Vec::new(),
            channels: Vec::new(),
            hidden: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// A graph without nodes, for images of so many lines and columns: their pixels, line by line, stand in the place
    /// of token ids, each as `0xRRGGBB`. An error if there are none, or too many.
    pub fn for_images([lines, columns]: [usize; 2]) -> Result<Self> {
        let tokens = checked_mul("pixels of an image", lines, columns)?;
        if tokens == 0 {
            return Err(Error::invalid(format!("an image of {lines} x {columns} pixels has none")));
        }
        Ok(Self { image: Some([lines, columns]), ..Self::new(Limits { vocabulary: 1 << 24, tokens }) })
    }

    /// Lines and columns of the images that it takes, if these are what it takes.
    pub fn image(&self) -> Option<[usize; 2]> {
        self.image
    }

    /// Allows stored tensor names to start with `prefix` (such as `bert.`), as they do in checkpoints of a model with a
    /// head. Names without it stay allowed.
    pub fn add_prefix(&mut self, prefix: &str) {
        self.prefixes.push(prefix.to_owned());
    }

    /// Sets the number of blocks. Loading fails if the checkpoint has a tensor of a block beyond it.
    pub fn set_blocks(&mut self, blocks: Blocks) {
        self.blocks = Some(blocks);
    }

    /// Adds a parameter, which is stored as a tensor of its own name: of two dimensions, or of one where it is a row of
    /// f32. An error if there is one of its name.
    pub fn add_param(&mut self, name: String, kind: ParamKind, (rows, cols): (usize, usize)) -> Result<ParamId> {
        if self.params.iter().any(|param| param.name == name) {
            return Err(Error::invalid(format!("there are two parameters {name}")));
        }
        let shape = match kind {
            ParamKind::Matrix(Precision::F32) if rows == 1 => vec![cols],
            ParamKind::Weights | ParamKind::DenseWeights | ParamKind::Matrix(_) => vec![rows, cols],
        };
        let stored = vec![StoredTensor { names: vec![name.clone()], shape }];
        self.params.push(Param {
            name,
            kind,
            rows,
            cols,
            stored,
            around: 0.0,
            convert: None,
            kernel: None,
            constant: None,
        });
        Ok(ParamId(self.params.len() - 1))
    }

    /// Adds a matrix of f32 that is known beforehand and stored nowhere. An error if there is a parameter of its name.
    pub fn add_constant(&mut self, name: String, matrix: Matrix) -> Result<ParamId> {
        let id = self.add_param(name, ParamKind::Matrix(Precision::F32), (matrix.rows(), matrix.cols()))?;
        let param = &mut self.params[id.0];
        (param.stored, param.constant) = (Vec::new(), Some(Arc::new(matrix.cast(DType::F32))));
        Ok(id)
    }

    /// Says which tensors a parameter is stored as, other than one of its own name.
    pub fn set_stored(&mut self, param: ParamId, stored: Vec<StoredTensor>) {
        self.params[param.0].stored = stored;
    }

    /// Says what a parameter is made of: a function of the stored tensors, put together, which gives as many rows and
    /// columns as the parameter has. [`Graph::set_stored`] says which shapes they have before.
    pub fn set_conversion(
        &mut self,
        param: ParamId,
        convert: impl Fn(&Matrix) -> Result<Matrix> + Send + Sync + 'static,
    ) {
        self.params[param.0].convert = Some(Arc::new(convert));
    }

    /// Sets the mean of a parameter's random initial values ([`Checkpoint::random`]), 0 unless set: 1 for norm scales.
    pub fn set_around(&mut self, param: ParamId, around: f32) {
        self.params[param.0].around = around;
    }

    /// Adds a node, and the value that it writes. A node that reads weights is a linear layer: its activations are the
    /// first value that it reads, and its bias is the other parameter, if there is one. An error if there is a node of
    /// this name, it reads what is not there, it reads two weights parameters, or another node reads the same weights.
    pub fn add_node(
        &mut self,
        name: &str,
        op: impl NodeOp + 'static,
        reads: Vec<Read>,
        (rows, cols, precision): (Rows, usize, Precision),
    ) -> Result<ValueId> {
        if self.nodes.iter().any(|node| node.name == name) {
            return Err(Error::invalid(format!("there are two nodes {name}")));
        }
        let writes = ValueId(self.values.len());
        let node = Node { name: name.to_owned(), op: Arc::new(op), reads, writes };
        let weights = |param: &ParamId| self.params[param.0].kind.is_weights();
        if node.values().any(|value| value >= writes) || node.params().any(|param| param.0 >= self.params.len()) {
            return Err(Error::invalid(format!("{name} reads what the graph does not have before it")));
        }
        if let Some(own) = node.params().find(weights) {
            let read = self.nodes.iter().any(|other| other.params().any(|param| param == own));
            if read || node.params().filter(weights).count() > 1 {
                let taken = &self.params[own.0].name;
                return Err(Error::invalid(format!(
                    "{name} cannot read {taken}: a node may read one weights parameter, and no other node may read the \
                     same one"
                )));
            }
        }
        self.values.push(Value { name: name.to_owned(), rows, cols, precision });
        self.nodes.push(node);
        Ok(writes)
    }

    /// Makes a value an output, which is kept to the end of a pass. The last one added is the model's main output.
    pub fn add_output(&mut self, value: ValueId) {
        self.outputs.push(value);
    }

    /// Declares channels that may be reordered. An error if there are channels of this name, their number is not a
    /// multiple of a block's, weights do not have as many of them, or rows or columns are listed twice.
    pub fn add_channels(&mut self, channels: Channels) -> Result<()> {
        let Channels { name, count, width, sets, .. } = &channels;
        if self.channels.iter().any(|other| other.name == *name) {
            return Err(Error::invalid(format!("the channels {name} are declared twice")));
        }
        if *width == 0 || !count.is_multiple_of(*width) {
            return Err(Error::invalid(format!("{name}: {count} channels cannot be divided into blocks of {width}")));
        }
        let mut rows: Vec<(ParamId, usize)> = sets.iter().flat_map(|set| &set.rows).copied().collect();
        let mut columns: Vec<ParamId> = sets.iter().flat_map(|set| &set.columns).copied().collect();
        let fits = |param: ParamId, channels: fn(&Param) -> usize, last: usize, exactly: bool| {
            let param = self.params.get(param.0).filter(|param| param.kind == ParamKind::Weights);
            param.is_some_and(|param| if exactly { channels(param) == last } else { channels(param) >= last })
        };
        let misfit = |place: &ParamId| {
            let place = self.params.get(place.0).map_or("a parameter of another graph", |param| &*param.name);
            Err(Error::invalid(format!("{name}: {place} does not have {count} channels there")))
        };
        if let Some((param, _)) = rows.iter().find(|(param, first)| !fits(*param, |p| p.rows, first + count, false)) {
            return misfit(param);
        }
        if let Some(param) = columns.iter().find(|param| !fits(**param, |p| p.cols, *count, true)) {
            return misfit(param);
        }
        rows.sort_unstable();
        columns.sort_unstable();
        let overlap = rows.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].1 + count);
        if overlap || columns.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::invalid(format!("{name}: a place is named twice")));
        }
        self.channels.push(channels);
        Ok(())
    }

    /// What a stored tensor may be called without what stands in front, and as it is.
    fn names_of<'a>(&self, tensor: &'a str) -> Vec<&'a str> {
        self.prefixes.iter().filter_map(|prefix| tensor.strip_prefix(prefix)).chain([tensor]).collect()
    }

    /// What texts it takes.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Its blocks, if it has said so.
    pub fn blocks(&self) -> Option<&Blocks> {
        self.blocks.as_ref()
    }

    /// All nodes in the order in which they run.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All values, each by its [`ValueId`].
    pub fn values(&self) -> impl ExactSizeIterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().map(|(at, value)| (ValueId(at), value))
    }

    /// A value. `id` must come from this graph; an id of another graph returns an unrelated value, or panics if it is
    /// out of range.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0]
    }

    /// The value that the node of this name writes.
    pub fn value_named(&self, name: &str) -> Option<ValueId> {
        self.values.iter().position(|value| value.name == name).map(ValueId)
    }

    /// All parameters, each by its [`ParamId`].
    pub fn params(&self) -> impl ExactSizeIterator<Item = (ParamId, &Param)> {
        self.params.iter().enumerate().map(|(at, param)| (ParamId(at), param))
    }

    /// A parameter. `id` must come from this graph; an id of another graph returns an unrelated parameter, or panics if
    /// it is out of range.
    pub fn param(&self, id: ParamId) -> &Param {
        &self.params[id.0]
    }

    /// The channels that may be reordered.
    pub fn channels(&self) -> &[Channels] {
        &self.channels
    }

    /// The values that are kept to the end of a pass.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// Features of the last output: of an encoder's states.
    pub fn output_width(&self) -> usize {
        self.outputs.last().map_or(0, |&value| self.value(value).cols)
    }

    /// The nodes that read a value.
    pub fn readers(&self, value: ValueId) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.values().any(|read| read == value))
    }

    /// The linear layers in the order in which they run, but for those that [stay dense](ParamKind::DenseWeights).
    /// Their nodes read activations, weights, and a bias if they add one.
    pub fn linears(&self) -> impl Iterator<Item = LinearLayer<'_>> {
        self.weights_of_kind(|kind| kind == ParamKind::Weights)
    }

    /// The linear layers whose weights are of some kinds.
    pub(crate) fn weights_of_kind(&self, of: impl Fn(ParamKind) -> bool) -> impl Iterator<Item = LinearLayer<'_>> {
        self.nodes.iter().enumerate().filter_map(move |(at, node)| {
            let weights = node.params().find(|param| of(self.params[param.0].kind))?;
            let bias = node.params().find(|param| *param != weights);
            Some(LinearLayer { name: &node.name, node: at, x: node.values().next()?, weights, bias })
        })
    }

    /// The last layer of a language model, whose value is a logit for each token of the vocabulary: the one that the
    /// last output is of, if that stays dense.
    pub fn head(&self) -> Option<LinearLayer<'_>> {
        let logits = *self.outputs.last()?;
        self.weights_of_kind(|kind| kind == ParamKind::DenseWeights)
            .find(|layer| self.nodes[layer.node].writes == logits)
    }

    /// The linear layer of this name.
    pub fn linear_named(&self, name: &str) -> Result<LinearLayer<'_>> {
        let missing = || Error::invalid(format!("there is no linear layer {name:?}"));
        self.linears().find(|linear| linear.name == name).ok_or_else(missing)
    }

    /// The layer whose weights these are.
    pub(crate) fn linear_of(&self, weights: ParamId) -> Option<LinearLayer<'_>> {
        self.linears().find(|linear| linear.weights == weights)
    }

    /// Weights of all linear layers together, biases left out: what 2:4 halves.
    pub fn linear_weights(&self) -> usize {
        let of = |linear: LinearLayer<'_>| self.params[linear.weights.0].rows * self.params[linear.weights.0].cols;
        self.linears().map(of).sum()
    }

    /// An error if a text is no input of the model.
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let Limits { vocabulary, tokens } = self.limits;
        if let Some([lines, columns]) = self.image.filter(|_| ids.len() != tokens) {
            let pixels = ids.len();
            return Err(Error::invalid(format!("the image has {pixels} pixels; the model takes {lines} x {columns}")));
        }
        if ids.is_empty() || ids.len() > tokens {
            return Err(Error::invalid(format!("the text has {} tokens; the model takes 1 to {tokens}", ids.len())));
        }
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            Some(id) => Err(Error::invalid(format!("token id {id} is outside of the vocabulary of {vocabulary}"))),
            None => Ok(()),
        }
    }

    /// Tokens of a batch, or an error if there are no texts, no tokens, or more than the model takes.
    pub(crate) fn tokens_of(&self, batch: usize, seq: usize) -> Result<usize> {
        let most = self.limits.tokens;
        if let Some([lines, columns]) = self.image.filter(|_| batch == 0 || seq != most) {
            return Err(Error::invalid(format!(
                "a batch of {batch} images of {seq} pixels; at least one image is needed, of {lines} x {columns}"
            )));
        }
        if batch == 0 || seq == 0 || seq > most {
            return Err(Error::invalid(format!(
                "a batch of {batch} texts of {seq} tokens; at least one text is needed, and 1 to {most} tokens"
            )));
        }
        checked_mul("tokens of a batch", batch, seq)
    }

    /// The place of the node that writes a value.
    pub(crate) fn node_of(&self, value: ValueId) -> usize {
        value.0
    }

    /// The values that nodes before place `at` have computed and nodes from there on, or the user, read.
    pub(crate) fn live_at(&self, at: usize) -> Vec<ValueId> {
        let made: HashSet<_> = self.nodes[..at].iter().map(|node| node.writes).collect();
        let read = self.nodes[at..].iter().flat_map(Node::values).chain(self.outputs.iter().copied());
        let mut live: Vec<_> = read.filter(|value| made.contains(value)).collect();
        live.sort_unstable();
        live.dedup();
        live
    }

    /// The last place up to node `at` where only one value is live, or the start: what is computed from there on needs
    /// no other state than that value. In a transformer there is such a place before each sublayer of a block.
    pub(crate) fn cut_before(&self, at: usize) -> (usize, Option<ValueId>) {
        let cuts = (1..=at).rev().find_map(|at| match self.live_at(at)[..] {
            [one] => Some((at, Some(one))),
            _ => None,
        });
        cuts.unwrap_or((0, None))
    }

    /// For the nodes of a range, which buffer each of their values gets. A buffer is reused as soon as the last reader
    /// of its value has run, but only by values of the same shape and type. Values that come from before the range,
    /// outputs, and those in `kept` have a buffer of their own. The buffers' values are returned first, one for each.
    pub(crate) fn buffers(&self, range: Range<usize>, kept: &[ValueId]) -> (Vec<ValueId>, Vec<(ValueId, usize)>) {
        let (mut buffers, mut of): (Vec<ValueId>, Vec<(ValueId, usize)>) = (Vec::new(), Vec::new());
        let mut free: Vec<usize> = Vec::new();
        let shared = |value: ValueId| !kept.contains(&value) && !self.outputs.contains(&value);
        let shape = |value: ValueId| {
            let Value { rows, cols, precision, .. } = self.value(value);
            (*rows, *cols, *precision)
        };
        for at in range.clone() {
            for value in self.nodes[at].values() {
                if !of.iter().any(|(known, _)| *known == value) {
                    of.push((value, buffers.len()));
                    buffers.push(value);
                }
            }
            let value = self.nodes[at].writes;
            let reused =
                free.iter().position(|&buffer| shape(buffers[buffer]) == shape(value)).filter(|_| shared(value));
            let buffer = match reused {
                Some(place) => free.swap_remove(place),
                None => {
                    buffers.push(value);
                    buffers.len() - 1
                }
            };
            of.push((value, buffer));
            // After the node's own value has its buffer: that must not be one of what it reads.
            for value in self.nodes[at].values().filter(|&value| shared(value)) {
                let made_here = self.nodes[range.start..at].iter().any(|node| node.writes == value);
                let read_later = self.nodes[at + 1..range.end].iter().any(|node| node.values().any(|v| v == value));
                let known = of.iter().find(|(known, _)| *known == value).map(|(_, buffer)| *buffer);
                if let Some(buffer) = known.filter(|buffer| made_here && !read_later && !free.contains(buffer)) {
                    free.push(buffer);
                }
            }
        }
        (buffers, of)
    }
}
