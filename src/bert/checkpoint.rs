//! The weights of a BERT on the host: read from safetensors or drawn at random, pruned, mixed layer by layer.
//!
//! Q, K and V are one linear layer here, their rows one under the other, because they are one product on the device.
//! Tables and linear weights have one element type, that of the activations to come; biases and LayerNorm's two vectors
//! are f32. Invariant: every tensor has the shape that the [`Config`] says, and no element is infinite or NaN.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::config::Config;
use super::files::Files;
use super::pipeline::Pipeline;
use crate::error::{Error, Result, expect_shape};
use crate::format::Sparse24;
use crate::io::{Item, Source, Stored};
use crate::linear::LinearWeights;
use crate::mask::{Mask, VectorLen};
use crate::matrix::{DType, Element, Elements, Matrix, each_dtype};
use crate::measure;
use crate::prune;

/// What to prune dense linear layers to, by magnitude: `none`, `2:4`, or `V:2:4` where V rows share a pattern.
///
/// ```
/// use sparse24::bert::Sparsity;
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
                None => Err(Error::Invalid(format!("sparsity {text:?} is not none, 2:4 or V:2:4"))),
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

/// LayerNorm's factor and summand, `1 x hidden` f32 each.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    pub(super) gamma: Matrix,
    pub(super) beta: Matrix,
}

/// A linear layer's weights, and its bias, `1 x m` f32.
#[derive(Clone, Debug)]
pub(super) struct Dense {
    pub(super) weights: LinearWeights,
    pub(super) bias: Matrix,
}

/// One encoder layer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) qkv: Dense,
    pub(super) attended: Dense,
    pub(super) attention_norm: Norm,
    pub(super) ffn_in: Dense,
    pub(super) ffn_out: Dense,
    pub(super) output_norm: Norm,
}

/// The linear layers of an encoder layer in the order in which they run, by the names of their tensors.
const LINEARS: [&str; 4] = ["attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense"];

/// The tensors that are one linear layer here.
const QKV: [&str; 3] = ["query", "key", "value"];

/// Which part of which linear layer a tensor is.
struct PartOf {
    /// Encoder layer.
    layer: usize,
    /// Linear layer in it.
    linear: usize,
    is_bias: bool,
    /// Of the linear layer's rows, those of Q, K or V; none for all.
    rows: Option<Range<usize>>,
}

/// A part of a linear layer, as [`Checkpoint::linear_tensor`] finds it.
#[derive(Clone, Debug, PartialEq)]
pub enum LinearTensor {
    /// Its weights, or those of Q, K or V.
    Weights(LinearWeights),
    /// Its bias, one row of f32.
    Bias(Matrix),
}

/// The name of a linear layer of encoder layer `i`.
pub(super) fn name_of(i: usize, linear: usize) -> String {
    format!("encoder.layer.{i}.{}", LINEARS[linear])
}

impl Layer {
    pub(super) fn linears(&self) -> [&Dense; 4] {
        [&self.qkv, &self.attended, &self.ffn_in, &self.ffn_out]
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Dense; 4] {
        [&mut self.qkv, &mut self.attended, &mut self.ffn_in, &mut self.ffn_out]
    }
}

/// A BERT's weights on the host.
///
/// ```
/// use sparse24::bert::{Checkpoint, Config, Sizes, Sparsity};
/// use sparse24::{Activation, DType, LinearWeights, VectorLen};
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 2, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let config = Config::new(sizes, 1e-12, Activation::Gelu)?;
/// let mut checkpoint = Checkpoint::random(config, DType::F32, 24)?;
/// let dense = checkpoint.linears().next().map(|(_, w)| w.clone());
///
/// // All layers 2:4, but for the first one's Q, K and V, which stay dense.
/// checkpoint.prune(Sparsity::TwoFour(VectorLen::new(4)?))?;
/// checkpoint.set_linear("encoder.layer.0.attention.self.qkv", dense.ok_or(sparse24::Error::Invalid("none".into()))?)?;
/// let sparse = checkpoint.linears().filter(|(_, w)| matches!(w, LinearWeights::Sparse24(_))).count();
/// assert_eq!((checkpoint.linears().count(), sparse), (8, 7));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub(super) config: Config,
    pub(super) dtype: DType,
    pub(super) words: Matrix,
    pub(super) positions: Matrix,
    pub(super) types: Matrix,
    pub(super) norm: Norm,
    pub(super) layers: Vec<Layer>,
    pub(super) pipeline: Pipeline,
}

impl Checkpoint {
    /// Reads the weights of a model, in f32, f16 or bf16, with or without `bert.` in front of their names, and rounds
    /// tables and linear weights to `dtype`, f32 or f16.
    ///
    /// `files.weights` and `over` may be a file, a folder or the index of shards, in any form that a
    /// [`Source`](crate::io::Source) knows. Linear layers that are stored compressed stay so, those with a mask of
    /// torch's keep it to be applied while they are used, and those with a mask of ASP's are compressed if that is 2:4.
    /// Compressed layers may lack the `.weight` in their names. What follows the encoder is read, too: see
    /// [`Pipeline::load`] and its errors.
    ///
    /// `over` is asked first for every tensor; what it lacks comes from `files.weights`, which need not be there if it
    /// lacks nothing. Q, K and V become one layer: 2:4 if all three are, with the longest vector that fits them; masked
    /// if all three are; else dense.
    ///
    /// An error names a tensor that is missing or has another shape, with the shape that `config` wants, one of a layer
    /// that `config` does not have, and the first element that is infinite or NaN, as `dtype` or already in the file.
    pub fn load(config: Config, files: &Files, over: Option<&Path>, dtype: DType) -> Result<Self> {
        let mut sources: Vec<_> = over.map(Source::open).transpose()?.into_iter().collect();
        if over.is_none() || files.weights.exists() {
            sources.push(Source::open(&files.weights)?);
        }
        let absent = (!files.weights.exists()).then(|| files.weights.clone());
        let reader = Reader { sources, absent, dtype: activation_dtype(dtype)? };
        let s = config.sizes();
        reader.no_layers_past(s.layers)?;
        let d = s.hidden;
        let mut layers = Vec::new();
        for i in 0..s.layers {
            let at = |name: &str| format!("encoder.layer.{i}.{name}");
            layers.push(Layer {
                qkv: reader.fused(&QKV.map(|part| at(&format!("attention.self.{part}"))), d)?,
                attended: reader.dense(&at("attention.output.dense"), d, d)?,
                attention_norm: reader.norm(&at("attention.output.LayerNorm"), d)?,
                ffn_in: reader.dense(&at("intermediate.dense"), s.intermediate, d)?,
                ffn_out: reader.dense(&at("output.dense"), d, s.intermediate)?,
                output_norm: reader.norm(&at("output.LayerNorm"), d)?,
            });
        }
        Ok(Self {
            config,
            dtype,
            words: reader.matrix("embeddings.word_embeddings.weight", s.vocabulary, d)?,
            positions: reader.matrix("embeddings.position_embeddings.weight", s.positions, d)?,
            types: reader.matrix("embeddings.token_type_embeddings.weight", s.types, d)?,
            norm: reader.norm("embeddings.LayerNorm", d)?,
            layers,
            pipeline: Pipeline::load(files, d)?,
        })
    }

    /// Weights drawn by a seeded generator, for measurements that need no real ones: uniform, with the standard
    /// deviation of 0.02 that BERT is initialised with; biases too; LayerNorm's factor is near one.
    pub fn random(config: Config, dtype: DType, seed: u64) -> Result<Self> {
        let dtype = activation_dtype(dtype)?;
        let mut part = 0u64;
        let mut draw = |rows, cols, dtype, around: f32| -> Result<Matrix> {
            part += 1;
            let mut w = measure::uniform(rows, cols, DType::F32, seed.wrapping_add(part.wrapping_mul(PARTS)))?;
            if let Elements::F32(data) = w.elements_mut() {
                // A uniform number in [-1, 1) has the standard deviation 1/√3.
                data.iter_mut().for_each(|x| *x = around + *x * 0.02 * 3f32.sqrt());
            }
            Ok(w.cast(dtype))
        };
        let s = config.sizes();
        let d = s.hidden;
        let mut layers = Vec::new();
        for _ in 0..s.layers {
            let mut dense = |m, k| -> Result<Dense> {
                Ok(Dense { weights: LinearWeights::Dense(draw(m, k, dtype, 0.0)?), bias: draw(1, m, DType::F32, 0.0)? })
            };
            let (qkv, attended) = (dense(3 * d, d)?, dense(d, d)?);
            let (ffn_in, ffn_out) = (dense(s.intermediate, d)?, dense(d, s.intermediate)?);
            let mut norm = || -> Result<Norm> {
                Ok(Norm { gamma: draw(1, d, DType::F32, 1.0)?, beta: draw(1, d, DType::F32, 0.0)? })
            };
            layers.push(Layer { qkv, attended, attention_norm: norm()?, ffn_in, ffn_out, output_norm: norm()? });
        }
        Ok(Self {
            config,
            dtype,
            words: draw(s.vocabulary, d, dtype, 0.0)?,
            positions: draw(s.positions, d, dtype, 0.0)?,
            types: draw(s.types, d, dtype, 0.0)?,
            norm: Norm { gamma: draw(1, d, DType::F32, 1.0)?, beta: draw(1, d, DType::F32, 0.0)? },
            layers,
            pipeline: Pipeline::default(),
        })
    }

    /// What it is made of.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Element type of tables and linear weights, and of a model's activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What turns the last states into embeddings.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// The same, to be told how many tokens a prompt has ([`Pipeline::set_prompt_tokens`]).
    pub fn pipeline_mut(&mut self) -> &mut Pipeline {
        &mut self.pipeline
    }

    /// Every linear layer by name, in the order in which they run: `encoder.layer.0.attention.self.qkv` and so on.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LinearWeights)> {
        self.layers.iter().enumerate().flat_map(|(i, layer)| {
            layer.linears().into_iter().enumerate().map(move |(linear, dense)| (name_of(i, linear), &dense.weights))
        })
    }

    /// The names of the tensors that the weights of a linear layer are stored as, without `bert.` in front: three for Q, K
    /// and V, which are one layer here, and one for each other. None if there is no layer of that name.
    pub fn tensors_of(&self, name: &str) -> Vec<String> {
        match self.place_of(name) {
            None => Vec::new(),
            Some((i, 0)) => QKV.map(|part| format!("encoder.layer.{i}.attention.self.{part}.weight")).to_vec(),
            Some(_) => vec![format!("{name}.weight")],
        }
    }

    /// The linear layer that a stored tensor is a part of, with or without `bert.` in front of its name; weights may lack
    /// their `.weight`, as in [`Checkpoint::load`].
    pub fn layer_of(&self, tensor: &str) -> Option<String> {
        self.part_of(tensor).map(|part| name_of(part.layer, part.linear))
    }

    /// What this checkpoint has for such a tensor, to write it back; none for other tensors.
    pub fn linear_tensor(&self, tensor: &str) -> Result<Option<LinearTensor>> {
        let Some(PartOf { layer, linear, is_bias, rows }) = self.part_of(tensor) else { return Ok(None) };
        let dense = self.layers[layer].linears()[linear];
        Ok(Some(match (is_bias, rows) {
            (false, None) => LinearTensor::Weights(dense.weights.clone()),
            (false, Some(rows)) => LinearTensor::Weights(dense.weights.rows_of(rows)?),
            (true, None) => LinearTensor::Bias(dense.bias.clone()),
            (true, Some(rows)) => {
                let bias = &dense.bias.elements().to_f32()[rows];
                LinearTensor::Bias(Matrix::from_f32(1, bias.len(), bias)?)
            }
        }))
    }

    fn part_of(&self, tensor: &str) -> Option<PartOf> {
        let name = tensor.strip_prefix("bert.").unwrap_or(tensor);
        let (module, is_bias) = match name.strip_suffix(".bias") {
            Some(module) => (module, true),
            None => (name.strip_suffix(".weight").unwrap_or(name), false),
        };
        let of_qkv = module.rsplit_once('.').filter(|(self_attention, _)| self_attention.ends_with("attention.self"));
        let (name, rows) = match of_qkv {
            Some((layer, last)) => {
                let (d, part) = (self.config.hidden(), QKV.iter().position(|part| *part == last)?);
                (format!("{layer}.qkv"), Some(part * d..(part + 1) * d))
            }
            None => (module.to_owned(), None),
        };
        let (layer, linear) = self.place_of(&name)?;
        // Q, K and V are no tensor together.
        ((linear == 0) == rows.is_some()).then_some(PartOf { layer, linear, is_bias, rows })
    }

    /// Encoder layer and linear layer of this name.
    pub(super) fn place_of(&self, name: &str) -> Option<(usize, usize)> {
        let all = (0..self.layers.len()).flat_map(|i| (0..LINEARS.len()).map(move |linear| (i, linear)));
        all.into_iter().find(|&(i, linear)| name_of(i, linear) == name)
    }

    /// Gives a linear layer other weights, in any form; they are rounded to the checkpoint's element type. An error if
    /// there is no layer of that name, shapes differ, or an element is infinite or NaN.
    pub fn set_linear(&mut self, name: &str, weights: LinearWeights) -> Result<()> {
        let Some((i, linear)) = self.place_of(name) else {
            return Err(Error::Invalid(format!("there is no linear layer {name:?}")));
        };
        let dtype = self.dtype;
        let dense = &mut *self.layers[i].linears_mut()[linear];
        let shape = (dense.weights.m(), dense.weights.k());
        dense.weights = fitted(name, weights, shape, dtype)?;
        Ok(())
    }

    /// The longest vector of at most `vector` rows whose blocks do not straddle the tensors that the linear layer `name`
    /// is made of: shorter only for Q, K and V of a hidden size that `vector` does not divide.
    pub fn fitting_vector(&self, name: &str, vector: VectorLen) -> VectorLen {
        let fits = |v: &VectorLen| *v <= vector && self.config.hidden().is_multiple_of(v.get());
        match self.place_of(name) {
            Some((_, 0)) => VectorLen::ALL.into_iter().rev().find(fits).unwrap_or(VectorLen::ONE),
            _ => vector,
        }
    }

    /// Prunes every dense linear layer by magnitude and compresses it; layers of other forms stay. Q, K and V are pruned
    /// as one matrix, which for V that divides the hidden size is the same as each by itself.
    pub fn prune(&mut self, sparsity: Sparsity) -> Result<()> {
        let Sparsity::TwoFour(vector) = sparsity else { return Ok(()) };
        for dense in self.layers.iter_mut().flat_map(Layer::linears_mut) {
            if let LinearWeights::Dense(w) = &dense.weights {
                dense.weights = LinearWeights::Sparse24(prune::sparsify(w, vector)?);
            }
        }
        Ok(())
    }

    /// Gives every dense linear layer the mask of magnitude pruning, to be applied while it is used; layers of other
    /// forms stay.
    pub fn mask(&mut self, vector: VectorLen) -> Result<()> {
        for dense in self.layers.iter_mut().flat_map(Layer::linears_mut) {
            if let LinearWeights::Dense(w) = &dense.weights {
                let mask = prune::magnitude(w, vector)?.into_mask();
                dense.weights = LinearWeights::Masked(w.clone(), mask);
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
        DType::Bf16 => Err(Error::DType { what: "activations".into(), got: dtype, expected: DType::F32 }),
    }
}

/// The item of the first of these names that there is, with or without `bert.` in front.
fn find<'a>(source: &'a Source, names: &[&str]) -> Option<&'a Item> {
    let prefixed = names.iter().flat_map(|name| [(*name).to_owned(), format!("bert.{name}")]);
    prefixed.into_iter().find_map(|name| source.item(&name))
}

/// What to take tensors from, in the order in which it is asked, and the type that they are rounded to.
pub(super) struct Reader {
    sources: Vec<Source>,
    /// The model's own file, where there is none.
    absent: Option<PathBuf>,
    dtype: DType,
}

impl Reader {
    /// One that asks a single source.
    pub(super) fn of(source: Source, dtype: DType) -> Self {
        Self { sources: vec![source], absent: None, dtype }
    }

    /// What there is no tensor for.
    fn missing(&self, name: &str, shape: &[usize]) -> Error {
        let files: Vec<_> = self.sources.iter().map(|s| s.path().display().to_string()).collect();
        let absent = self.absent.as_ref().map(|file| format!(", and there is no {}", file.display()));
        let absent = absent.unwrap_or_default();
        Error::Invalid(format!("{}: tensor {name} of shape {shape:?} is missing{absent}", files.join(" and ")))
    }

    /// An error that names a tensor of an encoder layer that a model of so many does not have: without it the result
    /// would be another model's.
    fn no_layers_past(&self, layers: usize) -> Result<()> {
        for source in &self.sources {
            for item in source.items() {
                let name = item.name.strip_prefix("bert.").unwrap_or(&item.name);
                let number = name.strip_prefix("encoder.layer.").and_then(|rest| rest.split('.').next()?.parse().ok());
                if number.is_some_and(|number: usize| number >= layers) {
                    let e = Error::Invalid(format!("is past the config's num_hidden_layers of {layers}"));
                    return Err(e.in_tensor(source.path_of(item), &item.name));
                }
            }
        }
        Ok(())
    }

    /// The first source that has one of these names, and what it has.
    fn item(&self, names: &[&str], shape: &[usize]) -> Result<(&Source, &Item)> {
        let found = self.sources.iter().find_map(|source| Some((source, find(source, names)?)));
        let (source, item) = found.ok_or_else(|| self.missing(names[0], shape))?;
        if item.shape != shape {
            let shape = Error::Shape { what: "weight".into(), got: item.shape.clone(), expected: shape.to_vec() };
            return Err(shape.in_tensor(source.path_of(item), &item.name));
        }
        Ok((source, item))
    }

    /// A tensor of two dimensions, or of one as a row.
    fn tensor(&self, names: &[&str], shape: &[usize], dtype: DType) -> Result<Matrix> {
        let (source, item) = self.item(names, shape)?;
        let matrix = source.matrix(item)?.cast(dtype);
        finite(matrix.elements(), matrix.cols()).map_err(|e| e.in_tensor(source.path_of(item), &item.name))?;
        Ok(matrix)
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        self.tensor(&[name], &[rows, cols], self.dtype)
    }

    pub(super) fn norm(&self, name: &str, len: usize) -> Result<Norm> {
        // The second names are those of checkpoints converted from TensorFlow.
        let vector = |new: &str, old: &str| {
            self.tensor(&[&format!("{name}.{new}"), &format!("{name}.{old}")], &[len], DType::F32)
        };
        Ok(Norm { gamma: vector("weight", "gamma")?, beta: vector("bias", "beta")? })
    }

    pub(super) fn bias(&self, name: &str, len: usize) -> Result<Matrix> {
        self.tensor(&[&format!("{name}.bias")], &[len], DType::F32)
    }

    fn dense(&self, name: &str, m: usize, k: usize) -> Result<Dense> {
        Ok(Dense { weights: self.weights(name, m, k)?, bias: self.bias(name, m)? })
    }

    /// The weights of a layer from the first source that has them, in whichever form.
    pub(super) fn weights(&self, name: &str, m: usize, k: usize) -> Result<LinearWeights> {
        let (source, item) = self.item(&[&format!("{name}.weight"), name], &[m, k])?;
        let named = |e: Error| e.in_tensor(source.path_of(item), &item.name);
        let weights = match item.stored {
            Stored::Dense => source.matrix(item)?.into(),
            // Any number of elements may be zero in this form; where that is 2:4, it is taken as such.
            Stored::SparseBitmask => match Sparse24::from_dense(&source.matrix(item)?, VectorLen::ONE) {
                Ok(compressed) => compressed.into(),
                Err(_) => source.matrix(item)?.into(),
            },
            Stored::Native | Stored::Bitmask | Stored::Cutlass => {
                source.raw24(item)?.to_sparse24().map_err(named)?.into()
            }
            Stored::TorchMask | Stored::AspMask => {
                let (w, mask) = source.masked(item)?;
                // ASP zeroes what it prunes, so that its mask adds nothing; before it prunes, its mask is all ones.
                match Sparse24::from_dense(&mask.apply(&w)?, VectorLen::ONE) {
                    Ok(compressed) if item.stored == Stored::AspMask => compressed.into(),
                    _ => LinearWeights::Masked(w, mask),
                }
            }
        };
        cast(weights, self.dtype).map_err(named)
    }

    /// Several layers of the same input and `d` outputs each as one.
    fn fused(&self, names: &[String], d: usize) -> Result<Dense> {
        let mut weights = Vec::new();
        let mut bias = Vec::new();
        for name in names {
            let part = self.dense(name, d, d)?;
            weights.push(part.weights);
            bias.extend(part.bias.elements().to_f32());
        }
        Ok(Dense { weights: stacked(&weights)?, bias: Matrix::new(1, bias.len(), Elements::F32(bias))? })
    }
}

/// Matrices of the same type and number of columns one under the other. 2:4 if all are, masked if all are, dense
/// otherwise.
fn stacked(parts: &[LinearWeights]) -> Result<LinearWeights> {
    fn join<'a>(parts: impl Iterator<Item = &'a Elements>, dtype: DType) -> Elements {
        fn of<'a, T: Element>(parts: impl Iterator<Item = &'a Elements>) -> Elements {
            T::wrap(parts.filter_map(T::of).flatten().copied().collect())
        }
        match dtype {
            DType::F32 => of::<f32>(parts),
            DType::F16 => of::<half::f16>(parts),
            DType::Bf16 => of::<half::bf16>(parts),
        }
    }
    let Some(first) = parts.first() else { return Err(Error::Invalid("no matrices to stack".into())) };
    let (rows, k, dtype) = (parts.iter().map(LinearWeights::m).sum(), first.k(), first.dtype());
    let compressed: Option<Vec<&Sparse24>> = parts
        .iter()
        .map(|part| match part {
            LinearWeights::Sparse24(w) => Some(w),
            _ => None,
        })
        .collect();
    if let Some(compressed) = compressed {
        // Rows of one block lie in one part.
        let fits = |v: &VectorLen| compressed.iter().all(|w| w.vector() >= *v && w.m().is_multiple_of(v.get()));
        let vector = VectorLen::ALL.into_iter().rev().find(fits).unwrap_or(VectorLen::ONE);
        let parts: Vec<_> = compressed.iter().map(|w| w.with_vector(vector)).collect::<Result<_>>()?;
        let values = join(parts.iter().map(|w| w.values()), dtype);
        let meta = parts.iter().flat_map(|w| w.meta()).copied().collect();
        return Ok(LinearWeights::Sparse24(Sparse24::from_parts(rows, k, vector, values, meta)?));
    }
    let masked: Option<Vec<(&Matrix, &Mask)>> = parts
        .iter()
        .map(|part| match part {
            LinearWeights::Masked(w, mask) => Some((w, mask)),
            _ => None,
        })
        .collect();
    if let Some(masked) = masked {
        let weights = Matrix::new(rows, k, join(masked.iter().map(|(w, _)| w.elements()), dtype))?;
        let words = masked.iter().flat_map(|(_, mask)| mask.words()).copied().collect();
        return Ok(LinearWeights::Masked(weights, Mask::new(rows, k, words)?));
    }
    let dense: Vec<_> = parts.iter().map(LinearWeights::to_dense).collect::<Result<_>>()?;
    Ok(LinearWeights::Dense(Matrix::new(rows, k, join(dense.iter().map(Matrix::elements), dtype))?))
}

/// Weights to take the place of others of this shape and element type.
pub(super) fn fitted(name: &str, weights: LinearWeights, shape: (usize, usize), dtype: DType) -> Result<LinearWeights> {
    expect_shape(name, (weights.m(), weights.k()), shape)?;
    if let LinearWeights::Masked(_, mask) = &weights {
        expect_shape(&format!("mask of {name}"), (mask.rows(), mask.cols()), shape)?;
    }
    cast(weights, dtype).map_err(|e| Error::Invalid(format!("{name}: {e}")))
}

/// The same weights in another element type, all of them finite in it.
fn cast(weights: LinearWeights, dtype: DType) -> Result<LinearWeights> {
    let weights = match weights {
        LinearWeights::Dense(w) => LinearWeights::Dense(w.cast(dtype)),
        LinearWeights::Masked(w, mask) => LinearWeights::Masked(w.cast(dtype), mask),
        LinearWeights::Sparse24(w) if w.dtype() == dtype => LinearWeights::Sparse24(w),
        LinearWeights::Sparse24(w) => {
            let (m, k, vector, values, meta) = w.into_parts();
            let values = Elements::from_f32(dtype, &values.to_f32());
            LinearWeights::Sparse24(Sparse24::from_parts(m, k, vector, values, meta)?)
        }
    };
    match &weights {
        LinearWeights::Dense(w) | LinearWeights::Masked(w, _) => finite(w.elements(), w.cols())?,
        LinearWeights::Sparse24(w) => finite(w.values(), w.k_physical())?,
    }
    Ok(weights)
}

/// An error that names the first element that is infinite or NaN, by its place in a matrix of so many columns.
fn finite(elements: &Elements, cols: usize) -> Result<()> {
    let found = each_dtype!(elements, v => v.iter().position(|x| !x.to_f32().is_finite()));
    match found {
        None => Ok(()),
        Some(at) => Err(Error::Invalid(format!(
            "row {}, column {} is {} as {}",
            at / cols,
            at % cols,
            elements.get(at),
            elements.dtype()
        ))),
    }
}
