//! A graph's parameters on the host: read from safetensors or drawn at random, pruned, mixed layer by layer.
//!
//! A linear layer may be several stored ones, such as Q, K and V, their rows one under the other, because they are one
//! product on the device. Parameters are shared between clones until they change. Invariant: every parameter has the
//! shape that the [`Graph`] says, and no element is infinite or NaN.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::convolution::{StoredKernel, StoredNorm, transposed};
use super::{Blocks, Graph, LinearLayer, Param, ParamId, ParamKind, StoredTensor};
use crate::error::{Error, Result, expect_shape};
use crate::format::Sparse24;
use crate::io::{Action, Content, Item, Source, Spec24, Store, Stored};
use crate::mask::{Mask, VectorLen};
use crate::matrix::{DType, Elements, Matrix};
use crate::prune;
use crate::weights::{HostWeights, finite};

/// What to prune dense linear layers to, by magnitude: `none`, `2:4`, or `V:2:4` where V rows share a pattern.
///
/// ```
/// use sparse24::graph::Sparsity;
/// use sparse24::VectorLen;
/// assert_eq!("none".parse::<Sparsity>()?, Sparsity::None);
/// assert_eq!("2:4".parse::<Sparsity>()?, Sparsity::TwoFour(VectorLen::ONE));
/// assert_eq!("32:2:4".parse::<Sparsity>()?.to_string(), "32:2:4");
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sparsity {
    /// Leave them as they are.
    #[default]
    None,
    /// Two of every four weights, in a pattern shared by so many rows.
    TwoFour(VectorLen),
}

impl FromStr for Sparsity {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "2:4" => Ok(Self::TwoFour(VectorLen::ONE)),
            _ => match text.strip_suffix(":2:4") {
                Some(vector) => Ok(Self::TwoFour(vector.parse()?)),
                None => Err(Error::invalid(format!("sparsity {text:?} is not none, 2:4 or V:2:4"))),
            },
        }
    }
}

impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::TwoFour(VectorLen::ONE) => f.write_str("2:4"),
            Self::TwoFour(vector) => write!(f, "{vector}:2:4"),
        }
    }
}

/// A parameter on the host.
#[derive(Clone, Debug)]
pub(super) enum HostParam {
    Weights(Arc<HostWeights>),
    Matrix(Arc<Matrix>),
}

impl From<HostWeights> for HostParam {
    fn from(w: HostWeights) -> Self {
        Self::Weights(Arc::new(w))
    }
}

impl From<Matrix> for HostParam {
    fn from(matrix: Matrix) -> Self {
        Self::Matrix(Arc::new(matrix))
    }
}

/// Which part of which linear layer a tensor is.
struct PartOf<'a> {
    layer: LinearLayer<'a>,
    is_bias: bool,
    /// Of the layer's rows, those of the part.
    rows: Range<usize>,
}

/// A part of a linear layer, as [`Checkpoint::linear_tensor`] finds it.
#[derive(Clone, Debug, PartialEq)]
pub enum LinearTensor {
    /// Its weights.
    Weights(HostWeights),
    /// Its bias, one row of f32.
    Bias(Matrix),
}

/// A model's parameters on the host.
///
/// ```
/// use sparse24::graph::{Checkpoint, Sparsity};
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::{Activation, DType, HostWeights, VectorLen};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// let mut checkpoint = Checkpoint::random(graph, DType::F32, 24)?;
/// let dense = checkpoint.linears().next().map(|(_, w)| w.clone());
///
/// // All layers 2:4, but for the first one's Q, K and V, which stay dense.
/// checkpoint.prune(Sparsity::TwoFour(VectorLen::new(4)?))?;
/// checkpoint.set_linear("encoder.layer.0.attention.self.qkv", dense.ok_or(sparse24::Error::invalid("none"))?)?;
/// let sparse = checkpoint.linears().filter(|(_, w)| matches!(w, HostWeights::Sparse24(_))).count();
/// assert_eq!((checkpoint.linears().count(), sparse), (8, 7));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    graph: Arc<Graph>,
    dtype: DType,
    params: Vec<HostParam>,
    /// For weights of convolutions, by their place in `params`: what batch norm has multiplied each row by.
    factors: BTreeMap<usize, Arc<[f32]>>,
}

impl Checkpoint {
    /// Reads the parameters of a model, in f32, f16 or bf16, with or without what its names may start with, and rounds
    /// matrices and weights to `dtype`, f32 or f16.
    ///
    /// `weights` and `over` may be a file, a folder or the index of shards, in any form that a
    /// [`Source`](crate::io::Source) knows. Linear layers that are stored compressed stay so, those with a mask of
    /// torch's keep it to be applied while they are used, and those with a mask of ASP's are compressed if that is 2:4.
    /// Compressed layers may lack the `.weight` in their names.
    ///
    /// `over` is asked first for every tensor; what it lacks comes from `weights`, which need not be there if it lacks
    /// nothing. Parts that are one layer here become 2:4 if all are, with the longest vector that fits them; masked if
    /// all are; else dense.
    ///
    /// An error names a tensor that is missing or has another shape, with the shape that the graph wants, one of a
    /// block that the model does not have, and the first element that is infinite or NaN, as `dtype` or already in the
    /// file.
    pub fn load(graph: Graph, weights: &Path, over: Option<&Path>, dtype: DType) -> Result<Self> {
        Self::load_in(&Store::disk(), graph, weights, over, dtype)
    }

    /// [`Checkpoint::load`] of files of a store.
    pub fn load_in(store: &Store, graph: Graph, weights: &Path, over: Option<&Path>, dtype: DType) -> Result<Self> {
        let open = |path| Source::open_in(store, path);
        let mut sources: Vec<_> = over.map(open).transpose()?.into_iter().collect();
        if over.is_none() || store.exists(weights) {
            sources.push(open(weights)?);
        }
        let absent = (!store.exists(weights)).then(|| weights.to_owned());
        let reader = Reader { sources, absent, dtype: activation_dtype(dtype)?, prefixes: &graph.prefixes };
        if let Some(blocks) = &graph.blocks {
            reader.none_past(blocks)?;
        }
        let mut factors = BTreeMap::new();
        for (at, param) in graph.params.iter().enumerate() {
            if let Some(norm) = param.kernel.as_ref().and_then(|kernel| kernel.norm.as_ref()) {
                factors.insert(at, reader.factors(norm)?);
            }
        }
        let read = |(at, param): (usize, &Param)| reader.param(param, factors.get(&at).map(|of| &**of));
        let params = graph.params.iter().enumerate().map(read).collect::<Result<_>>()?;
        Ok(Self { graph: Arc::new(graph), dtype, params, factors })
    }

    /// Parameters drawn by a seeded generator, for measurements that need no real ones: uniform, with the standard
    /// deviation of 0.02 that transformers are initialised with, biases too; factors of norms are near one.
    pub fn random(graph: Graph, dtype: DType, seed: u64) -> Result<Self> {
        let dtype = activation_dtype(dtype)?;
        let draw = |(at, param): (usize, &Param)| -> Result<HostParam> {
            if let Some(constant) = &param.constant {
                return Ok(HostParam::Matrix(Arc::clone(constant)));
            }
            let seed = seed.wrapping_add((at as u64 + 1).wrapping_mul(PARTS));
            let mut w = Matrix::uniform(param.rows, param.cols, DType::F32, seed)?;
            if let Elements::F32(data) = w.elements_mut() {
                // A uniform number in [-1, 1) has the standard deviation 1/√3.
                data.iter_mut().for_each(|x| *x = param.around + *x * 0.02 * 3f32.sqrt());
            }
            Ok(match param.kind {
                ParamKind::Weights | ParamKind::DenseWeights => HostWeights::Dense(w.cast(dtype)).into(),
                ParamKind::Matrix(precision) => w.cast(precision.of(dtype)).into(),
            })
        };
        let params = graph.params.iter().enumerate().map(draw).collect::<Result<_>>()?;
        Ok(Self { graph: Arc::new(graph), dtype, params, factors: BTreeMap::new() })
    }

    /// The same parameters for a graph that goes on from this one: with more nodes, such as a pooling, and no more
    /// parameters.
    pub fn extended(&self, extend: impl FnOnce(&mut Graph) -> Result<()>) -> Result<Self> {
        let mut graph = Graph::clone(&self.graph);
        extend(&mut graph)?;
        if graph.params.len() != self.params.len() {
            return Err(Error::invalid("a graph that is extended gets no new parameters"));
        }
        Ok(Self { graph: Arc::new(graph), ..self.clone() })
    }

    /// What it is the parameters of.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Element type of matrices and weights, and of a model's activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn params(&self) -> impl Iterator<Item = &HostParam> {
        self.params.iter()
    }

    pub(super) fn param(&self, id: ParamId) -> &HostParam {
        &self.params[id.0]
    }

    fn weights(&self, id: ParamId) -> Option<&Arc<HostWeights>> {
        match self.param(id) {
            HostParam::Weights(w) => Some(w),
            HostParam::Matrix(_) => None,
        }
    }

    /// Puts a parameter of the same shape and kind in the place of another.
    pub(super) fn set_param(&mut self, id: ParamId, param: HostParam) {
        self.params[id.0] = param;
    }

    /// Every linear layer by name, in the order in which they run: `encoder.layer.0.attention.self.qkv` and so on.
    pub fn linears(&self) -> impl Iterator<Item = (String, &HostWeights)> {
        self.graph.linears().filter_map(|layer| Some((layer.name.to_owned(), &**self.weights(layer.weights)?)))
    }

    /// The weights of a linear layer. An error if there is none of that name.
    pub fn linear(&self, name: &str) -> Result<&Arc<HostWeights>> {
        let layer = self.graph.linear_named(name)?;
        self.weights(layer.weights).ok_or_else(|| Error::invalid(format!("{name} has no weights")))
    }

    /// The names of the tensors that the weights of a linear layer are stored as, without anything in front: three for
    /// Q, K and V, which are one layer here, and one for each other. None if there is no layer of that name.
    pub fn tensors_of(&self, name: &str) -> Vec<String> {
        match self.graph.linear_named(name) {
            Ok(layer) => self.graph.params[layer.weights.0].stored.iter().map(|part| part.names[0].clone()).collect(),
            Err(_) => Vec::new(),
        }
    }

    /// The linear layer that a stored tensor is a part of, whatever may be in front of its name; weights may lack their
    /// `.weight`, as in [`Checkpoint::load`].
    pub fn layer_of(&self, tensor: &str) -> Option<String> {
        self.part_of(tensor).map(|part| part.layer.name.to_owned())
    }

    /// What this checkpoint has for such a tensor, to write it back; none for other tensors.
    pub fn linear_tensor(&self, tensor: &str) -> Result<Option<LinearTensor>> {
        let Some(PartOf { layer, is_bias, rows }) = self.part_of(tensor) else { return Ok(None) };
        Ok(match (is_bias, layer.bias.map(|bias| self.param(bias)), self.weights(layer.weights)) {
            (true, Some(HostParam::Matrix(bias)), _) => {
                let bias = &bias.elements().to_f32()[rows];
                Some(LinearTensor::Bias(Matrix::from_f32(1, bias.len(), bias)?))
            }
            (false, _, Some(w)) if self.factors.contains_key(&layer.weights.0) => {
                let factors = &self.factors[&layer.weights.0];
                // A row of zeros is one of any weights times 0.
                let unfolded = |row: usize, w: f32| if factors[row] == 0.0 { 0.0 } else { w / factors[row] };
                Some(LinearTensor::Weights(w.map_rows(unfolded)?))
            }
            (false, _, Some(w)) if rows == (0..w.m()) => Some(LinearTensor::Weights(HostWeights::clone(w))),
            (false, _, Some(w)) => Some(LinearTensor::Weights(w.rows_of(rows)?)),
            _ => None,
        })
    }

    /// What this checkpoint has for a stored vector that is a parameter, such as a norm's: one row.
    pub fn vector_tensor(&self, tensor: &str) -> Result<Option<Matrix>> {
        let names = self.graph.names_of(tensor);
        for (param, of) in self.graph.params.iter().zip(&self.params) {
            let mut first = 0;
            for stored in &param.stored {
                let columns = first..first + stored.shape.iter().product::<usize>();
                first = columns.end;
                if param.rows == 1
                    && param.convert.is_none()
                    && stored.names.iter().any(|name| names.contains(&&**name))
                {
                    let HostParam::Matrix(row) = of else { continue };
                    let row = &row.elements().to_f32()[columns];
                    return Ok(Some(Matrix::from_f32(1, row.len(), row)?));
                }
            }
        }
        Ok(None)
    }

    /// What is to be done with an item of a model's file so that the new file has the numbers of this checkpoint.
    pub fn action(&self, item: &Item) -> Result<Action> {
        Ok(match self.linear_tensor(&item.name)? {
            Some(LinearTensor::Weights(HostWeights::Sparse24(w))) if item.stored != Stored::Dense => {
                let name = item.name.clone();
                Action::Compress(Spec24 { name, m: w.m(), k: w.k(), dtype: item.dtype, vector: Some(w.vector()) })
            }
            None if self.vector_tensor(&item.name)?.is_none() => Action::Copy,
            _ => Action::Dense,
        })
    }

    /// What is to be written for such an item. An error if a number is too large for the item's type, or the item is no
    /// part of a layer.
    pub fn content(&self, item: &Item, action: &Action) -> Result<Content> {
        match (self.linear_tensor(&item.name)?, action) {
            (Some(LinearTensor::Weights(HostWeights::Sparse24(w))), Action::Compress(_)) => {
                Content::sparse24(&w, item.dtype)
            }
            (Some(LinearTensor::Weights(w)), _) => Content::dense(&self.as_stored(item, w.to_dense()?)?, item.dtype),
            (Some(LinearTensor::Bias(bias)), _) => Content::dense(&bias, item.dtype),
            (None, _) => match self.vector_tensor(&item.name)? {
                Some(row) => Content::dense(&row, item.dtype),
                None => Err(Error::invalid("is no part of a layer")),
            },
        }
    }

    /// Dense weights in the order of an item: those of a convolution may be stored as `out x in x lines x columns`.
    fn as_stored(&self, item: &Item, w: Matrix) -> Result<Matrix> {
        match item.shape[..] {
            [_, c, lines, columns] if c * lines * columns == w.cols() => {
                let elements = transposed(&w.elements().to_f32(), lines * columns, c);
                Matrix::from_f32(w.rows(), w.cols(), &elements)
            }
            _ => Ok(w),
        }
    }

    /// Hands over all that tells it from others: names, forms and numbers of its parameters.
    pub(crate) fn each_part(&self, see: &mut impl FnMut(&[u8])) -> Result<()> {
        for ((_, param), value) in self.graph.params().zip(self.params()) {
            see(param.name.as_bytes());
            match value {
                HostParam::Weights(w) => {
                    see(w.op().to_string().as_bytes());
                    see(w.to_dense()?.elements().as_bytes());
                }
                HostParam::Matrix(matrix) => see(matrix.elements().as_bytes()),
            }
        }
        Ok(())
    }

    /// Gives dense linear layers that are 2:4 already the form that says so, with the longest vector that fits, and
    /// those with other zeros the mask of these: what training is to keep. How files store pruned layers that know no
    /// 2:4.
    pub fn find_sparsity(&mut self) -> Result<()> {
        self.each_dense(|w| {
            let nonzeros = Mask::of_nonzeros(w)?;
            // What a dense matrix has of zeros by chance.
            if nonzeros.count() * 10 > 9 * w.rows() * w.cols() {
                return Ok(w.clone().into());
            }
            match Sparse24::vector_len_of(&nonzeros) {
                Some(vector) => Ok(Sparse24::from_dense(w, vector)?.into()),
                None => Ok(HostWeights::Masked(w.clone(), nonzeros)),
            }
        })
    }

    fn part_of(&self, tensor: &str) -> Option<PartOf<'_>> {
        let names = self.graph.names_of(tensor);
        let part = |param: ParamId| {
            let mut first = 0;
            self.graph.params[param.0].stored.iter().find_map(|stored| {
                let rows = first..first + stored.shape[0];
                first = rows.end;
                stored.names.iter().any(|name| names.contains(&name.as_str())).then_some(rows)
            })
        };
        self.graph.linears().find_map(|layer| {
            let weights = part(layer.weights).map(|rows| (false, rows));
            // A bias that is computed from other tensors is none of them.
            let stored = |bias: &ParamId| self.graph.params[bias.0].convert.is_none();
            let (is_bias, rows) = weights.or_else(|| Some((true, part(layer.bias.filter(stored)?)?)))?;
            Some(PartOf { layer, is_bias, rows })
        })
    }

    /// Gives a linear layer other weights, in any form; they are rounded to the checkpoint's element type. An error if
    /// there is no layer of that name, shapes differ, or an element is infinite or NaN.
    pub fn set_linear(&mut self, name: &str, weights: HostWeights) -> Result<()> {
        let id = self.graph.linear_named(name)?.weights;
        let Param { rows, cols, .. } = self.graph.params[id.0];
        let weights = weights.fitted(name, (rows, cols), self.dtype)?;
        self.set_param(id, weights.into());
        Ok(())
    }

    /// The longest vector of at most `vector` rows whose blocks do not straddle the tensors that the linear layer
    /// `name` is made of: shorter only for layers of several tensors, such as Q, K and V, whose rows `vector` does not
    /// divide.
    pub fn fitting_vector(&self, name: &str, vector: VectorLen) -> VectorLen {
        let Ok(layer) = self.graph.linear_named(name) else { return vector };
        let stored = &self.graph.params[layer.weights.0].stored;
        let fits = |v: &VectorLen| {
            *v <= vector && (stored.len() == 1 || stored.iter().all(|part| part.shape[0].is_multiple_of(v.get())))
        };
        VectorLen::ALL.into_iter().rev().find(fits).unwrap_or(VectorLen::ONE)
    }

    /// Prunes every dense linear layer by magnitude and compresses it; layers of other forms stay. Q, K and V are
    /// pruned as one matrix, which for V that divides the rows of each is the same as each by itself.
    pub fn prune(&mut self, sparsity: Sparsity) -> Result<()> {
        let Sparsity::TwoFour(vector) = sparsity else { return Ok(()) };
        self.each_dense(|w| Ok(HostWeights::Sparse24(prune::sparsify(w, vector)?)))
    }

    /// Gives every dense linear layer the mask of magnitude pruning, to be applied while it is used; layers of other
    /// forms stay.
    pub fn mask(&mut self, vector: VectorLen) -> Result<()> {
        self.each_dense(|w| Ok(HostWeights::Masked(w.clone(), prune::magnitude(w, vector)?.into_mask())))
    }

    /// Makes every linear layer dense, with the zeros that it has.
    pub fn densify(&mut self) -> Result<()> {
        for param in &mut self.params {
            if let HostParam::Weights(weights) = param
                && !matches!(**weights, HostWeights::Dense(_))
            {
                *param = HostWeights::Dense(weights.to_dense()?).into();
            }
        }
        Ok(())
    }

    fn each_dense(&mut self, change: impl Fn(&Matrix) -> Result<HostWeights>) -> Result<()> {
        for (param, of) in self.params.iter_mut().zip(&self.graph.params) {
            if let HostParam::Weights(weights) = param
                && let HostWeights::Dense(w) = &**weights
                && of.kind == ParamKind::Weights
            {
                *param = change(w)?.into();
            }
        }
        Ok(())
    }
}

/// Separates the seeds of a checkpoint's tensors.
const PARTS: u64 = 0x9e37_79b9_7f4a_7c15;

/// The element types that activations can have.
fn activation_dtype(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F32 | DType::F16 => Ok(dtype),
        DType::Bf16 => Err(Error::dtype("activations", dtype, DType::F32)),
    }
}

/// What to take tensors from, in the order in which it is asked, and the type that they are rounded to.
pub(crate) struct Reader<'a> {
    sources: Vec<Source>,
    /// The model's own file, where there is none.
    absent: Option<PathBuf>,
    dtype: DType,
    prefixes: &'a [String],
}

impl Reader<'_> {
    /// One that asks a single source, by names as they are.
    #[cfg(feature = "text")]
    pub(crate) fn of(source: Source, dtype: DType) -> Self {
        Self { sources: vec![source], absent: None, dtype, prefixes: &[] }
    }

    /// A parameter, the rows of a convolution's weights multiplied by these factors.
    fn param(&self, param: &Param, factors: Option<&[f32]>) -> Result<HostParam> {
        if let Some(constant) = &param.constant {
            return Ok(HostParam::Matrix(Arc::clone(constant)));
        }
        let named = || param.stored.iter().map(|part| (part.names.iter().map(String::as_str), &part.shape));
        match param.kind {
            ParamKind::Weights | ParamKind::DenseWeights => {
                if let (Some(kernel), [stored]) = (&param.kernel, &param.stored[..]) {
                    return Ok(self.kernel(stored, kernel, factors)?.into());
                }
                let parts: Vec<_> = named().map(|(names, shape)| self.weights(names, shape)).collect::<Result<_>>()?;
                Ok(HostWeights::stacked(parts)?.into())
            }
            ParamKind::Matrix(precision) => {
                let dtype = precision.of(self.dtype);
                let mut parts: Vec<Matrix> =
                    named().map(|(names, shape)| self.tensor(names, shape, dtype)).collect::<Result<_>>()?;
                let whole = match parts.pop() {
                    Some(one) if parts.is_empty() => one,
                    // Vectors, one after the other.
                    last => {
                        let all: Vec<f32> =
                            parts.iter().chain(&last).flat_map(|part| part.elements().to_f32()).collect();
                        let shape = if param.convert.is_some() { (1, all.len()) } else { (param.rows, param.cols) };
                        Matrix::new(shape.0, shape.1, Elements::from_f32(dtype, &all))?
                    }
                };
                let whole = if let Some(convert) = &param.convert { convert(&whole)? } else { whole };
                expect_shape(&param.name, (whole.rows(), whole.cols()), (param.rows, param.cols))?;
                Ok(whole.into())
            }
        }
    }

    /// What batch norm multiplies the rows of weights by.
    fn factors(&self, norm: &StoredNorm) -> Result<Arc<[f32]>> {
        let [gamma, variance] = &norm.stored;
        let row = |of: &StoredTensor| self.tensor(of.names.iter().map(String::as_str), &of.shape, DType::F32);
        Ok(norm.factors(&row(gamma)?, &row(variance)?).into())
    }

    /// The weights of a convolution: dense, as they are trained, or the matrix of a GEMM in any form.
    fn kernel(&self, stored: &StoredTensor, kernel: &StoredKernel, factors: Option<&[f32]>) -> Result<HostWeights> {
        let names = || stored.names.iter().map(String::as_str);
        let (taps, m, c) = (kernel.kernel[0] * kernel.kernel[1], stored.shape[0], stored.shape[1]);
        let matrix = [m, taps * c];
        let (source, item) = self.item_of(names(), &[&stored.shape, &matrix])?;
        let named = |e: Error| e.in_tensor(source.path_of(item), &item.name);
        let weights = if item.shape == stored.shape {
            let elements = flat(source, item)?.elements().to_f32();
            Matrix::from_f32(m, taps * c, &transposed(&elements, c, taps))?.into()
        } else {
            self.stored_weights(source, item)?
        };
        let weights = match factors {
            Some(factors) => weights.map_rows(|row, w| w * factors[row])?,
            None => weights,
        };
        weights.cast(self.dtype).map_err(named)
    }

    /// What there is no tensor for.
    fn missing(&self, name: &str, shape: &[usize]) -> Error {
        let files: Vec<_> = self.sources.iter().map(|s| s.path().display().to_string()).collect();
        let absent = self.absent.as_ref().map(|file| format!(", and there is no {}", file.display()));
        let absent = absent.unwrap_or_default();
        Error::invalid(format!("{}: tensor {name} of shape {shape:?} is missing{absent}", files.join(" and ")))
    }

    /// An error that names a tensor of a block that a model of so many does not have: without it the result would be
    /// another model's.
    fn none_past(&self, blocks: &Blocks) -> Result<()> {
        let Blocks { prefix, count, field } = blocks;
        for source in &self.sources {
            for item in source.items() {
                let names = self.prefixes.iter().filter_map(|p| item.name.strip_prefix(p)).chain([&*item.name]);
                let number = |name: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
                if names.filter_map(number).any(|number| number >= *count) {
                    let e = Error::invalid(format!("is past the config's {field} of {count}"));
                    return Err(e.in_tensor(source.path_of(item), &item.name));
                }
            }
        }
        Ok(())
    }

    /// The first source that has one of these names, and what it has.
    fn item<'n>(&self, names: impl Iterator<Item = &'n str> + Clone, shape: &[usize]) -> Result<(&Source, &Item)> {
        self.item_of(names, &[shape])
    }

    /// The same of one of these shapes, the usual one first.
    fn item_of<'n>(
        &self,
        names: impl Iterator<Item = &'n str> + Clone,
        shapes: &[&[usize]],
    ) -> Result<(&Source, &Item)> {
        let shape = shapes[0];
        let with_prefixes = |name: &str| {
            let prefixed = self.prefixes.iter().map(|prefix| format!("{prefix}{name}"));
            std::iter::once(name.to_owned()).chain(prefixed).collect::<Vec<_>>()
        };
        let all: Vec<String> = names.clone().flat_map(with_prefixes).collect();
        let found =
            self.sources.iter().find_map(|source| Some((source, all.iter().find_map(|name| source.item(name))?)));
        let (source, item) = found.ok_or_else(|| self.missing(names.clone().next().unwrap_or_default(), shape))?;
        if !shapes.contains(&&*item.shape) {
            let shape = Error::shape("weight", item.shape.clone(), shape.to_vec());
            return Err(shape.in_tensor(source.path_of(item), &item.name));
        }
        Ok((source, item))
    }

    /// A tensor of two dimensions, or of any other number of them as a row.
    pub(crate) fn tensor<'n>(
        &self,
        names: impl Iterator<Item = &'n str> + Clone,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Matrix> {
        let (source, item) = self.item(names, shape)?;
        let matrix = if item.shape.len() == 2 { source.matrix(item)? } else { flat(source, item)? }.cast(dtype);
        finite(matrix.elements(), matrix.cols()).map_err(|e| e.in_tensor(source.path_of(item), &item.name))?;
        Ok(matrix)
    }

    /// The weights of a layer from the first source that has them, in whichever form.
    pub(crate) fn weights<'n>(
        &self,
        names: impl Iterator<Item = &'n str> + Clone,
        shape: &[usize],
    ) -> Result<HostWeights> {
        let (source, item) = self.item(names, shape)?;
        let named = |e: Error| e.in_tensor(source.path_of(item), &item.name);
        self.stored_weights(source, item)?.cast(self.dtype).map_err(named)
    }

    /// Weights as they are stored.
    fn stored_weights(&self, source: &Source, item: &Item) -> Result<HostWeights> {
        let named = |e: Error| e.in_tensor(source.path_of(item), &item.name);
        Ok(match item.stored {
            Stored::Dense => source.matrix(item)?.into(),
            // Any number of elements may be zero in this form; where that is 2:4, it is taken as such.
            Stored::SparseBitmask => match Sparse24::from_dense(&source.matrix(item)?, VectorLen::ONE) {
                Ok(compressed) => compressed.into(),
                Err(_) => source.matrix(item)?.into(),
            },
            Stored::Native | Stored::Bitmask | Stored::Cutlass => {
                Sparse24::try_from(source.sparse24_bytes(item)?).map_err(named)?.into()
            }
            Stored::TorchMask | Stored::AspMask => {
                let (w, mask) = source.masked(item)?;
                // ASP zeroes what it prunes, so that its mask adds nothing; before it prunes, its mask is all ones.
                match Sparse24::from_dense(&mask.apply(&w)?, VectorLen::ONE) {
                    Ok(compressed) if item.stored == Stored::AspMask => compressed.into(),
                    _ => HostWeights::Masked(w, mask),
                }
            }
        })
    }
}

/// All elements of a tensor as a row.
fn flat(source: &Source, item: &Item) -> Result<Matrix> {
    if item.shape.len() == 1 {
        return source.matrix(item);
    }
    let dtype = DType::try_from(item.dtype).map_err(|e| source.at(item, e))?;
    let elements = Elements::from_bytes(dtype, &source.dense(item)?).map_err(|e| source.at(item, e))?;
    Matrix::new(1, elements.len(), elements)
}
