//! Channels between two layers of a model, and the model without some of them: smaller, and dense as before.
//!
//! A feed-forward part's features, or the channels within an inverted bottleneck, are made by some layers and read by
//! one other ([`HiddenChannels`]). Without such a channel its rows of the layers that make it, their biases and norms,
//! and its columns of the layer that reads it are gone. That is a matter of stored tensors: what stays keeps every bit,
//! and no norm has to be folded and taken out again. The model computes what it would compute if the reading layer's
//! columns were zero.
//!
//! ```text
//!  Graph::hidden ─► scores: HiddenChannels::weights, ::norm_scale, Checkpoint::active_shares
//!                     │  prune::Units, prune::prune_units: which stay
//!                     ▼
//!                  Removal ─► shape and bytes of each tensor, fields of the config      (written by io::NewModel)
//! ```
//! Invariant: at least one channel stays of each.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::batches::{Batches, Batching};
use super::checkpoint::Checkpoint;
use super::forward::Parts;
use super::{Graph, ParamId, ValueId};
use crate::engine::Device;
use crate::error::{Error, Result, checked_mul};
use crate::io::{Item, Source, Stored};
use crate::matrix::{DType, Elements, Matrix};
use crate::problem::Activation;

/// Where a config says how many channels there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SizeField {
    /// A field for all blocks, whose channels must be as many.
    Shared(&'static str),
    /// An entry of an object, which has one for each block.
    Own(&'static str, String),
}

/// Channels that some layers make and one layer reads, to be added to a graph: [`Graph::add_hidden`].
#[derive(Clone, Debug)]
pub struct HiddenSpec<'a> {
    /// The nodes whose outputs have these channels, in the order in which they run. All rows of their weights and all
    /// entries of their biases are the channels.
    pub makers: &'a [&'a str],
    /// The linear layer that reads them: the columns of its weights, of a convolution those of each tap, are the
    /// channels.
    pub reader: &'a str,
    /// What the channels have gone through when they are read, if that is all; none of gated ones.
    pub activation: Option<Activation>,
    /// The batch norm before that activation, if there is one, by the name of its γ.
    pub norm: Option<String>,
    /// Where their number is said.
    pub size: SizeField,
}

/// Channels between layers, which can be removed.
#[derive(Clone, Debug, PartialEq)]
pub struct HiddenChannels {
    /// The name of the first node that makes them.
    pub name: String,
    /// Their number.
    pub count: usize,
    /// What the reading layer reads.
    pub value: ValueId,
    /// What they have gone through when they are read, if that is all.
    pub activation: Option<Activation>,
    /// The name of γ of the batch norm before that activation, if there is one.
    pub norm: Option<String>,
    /// Where a config says their number.
    pub size: SizeField,
    makers: Vec<ParamId>,
    reader: ParamId,
}

/// Whose weights a channel is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelWeights {
    /// The layers that make it: its filters (Li et al. 2016, [arXiv:1608.08710](https://arxiv.org/abs/1608.08710)).
    Making,
    /// The layer that reads it: its columns there.
    Reading,
}

impl Graph {
    /// Declares channels that can be removed. An error if there are no such nodes, the reading layer is not the only
    /// one to read its input, or a stored tensor has another number of channels.
    pub fn add_hidden(&mut self, spec: HiddenSpec<'_>) -> Result<()> {
        let HiddenSpec { makers, reader, activation, norm, size } = spec;
        let name = makers.first().copied().unwrap_or_default().to_owned();
        let fail = |what: String| Err(Error::invalid(format!("hidden channels {name}: {what}")));
        let layer = self.linear_named(reader)?;
        let (value, weights) = (layer.x, layer.weights);
        let count = self.value(value).cols;
        if self.readers(value).count() != 1 || self.outputs.contains(&value) {
            return fail(format!("{reader} is not alone in reading them"));
        }
        let mut params = Vec::new();
        for maker in makers {
            match self.nodes.iter().find(|node| node.name == *maker) {
                Some(node) => params.extend(node.params()),
                None => return fail(format!("there is no node {maker}")),
            }
        }
        let places = params.iter().map(|param| (*param, 0)).chain([(weights, 1)]);
        for (stored, dim) in places.flat_map(|(param, dim)| self.param(param).stored.iter().map(move |s| (s, dim))) {
            if stored.shape.get(dim) != Some(&count) {
                return fail(format!("{} has shape {:?}, not {count} of them", stored.names[0], stored.shape));
            }
        }
        self.hidden.push(HiddenChannels {
            name,
            count,
            value,
            activation,
            norm,
            size,
            makers: params,
            reader: weights,
        });
        Ok(())
    }

    /// The channels that can be removed, in the order of their layers.
    pub fn hidden(&self) -> &[HiddenChannels] {
        &self.hidden
    }

    /// What a source has for a tensor of these names, whatever may be in front of them.
    fn stored_item<'a>(&self, source: &'a Source, names: &[String]) -> Result<&'a Item> {
        let is = |item: &&Item| self.names_of(&item.name).iter().any(|name| names.iter().any(|known| known == name));
        let missing = || Error::file(source.path(), format!("tensor {} is missing", names.join(" or ")));
        source.items().find(is).ok_or_else(missing)
    }
}

impl HiddenChannels {
    /// Names and dimension of the stored tensors that have these channels.
    fn places<'a>(&'a self, graph: &'a Graph) -> impl Iterator<Item = (&'a [String], &'a [usize], usize)> {
        let params = self.makers.iter().map(|param| (*param, 0)).chain([(self.reader, 1)]);
        params
            .flat_map(move |(param, dim)| graph.param(param).stored.iter().map(move |of| (&*of.names, &*of.shape, dim)))
    }

    /// The weights of each channel as a row of f32, as they are stored: without biases, and before a norm is folded
    /// into them. To be scored by [`Units`](crate::prune::Units) of rows. An error if a tensor is missing or
    /// compressed.
    pub fn weights(&self, graph: &Graph, source: &Source, of: ChannelWeights) -> Result<Matrix> {
        let wanted = if of == ChannelWeights::Making { 0 } else { 1 };
        let mut rows: Vec<Vec<f32>> = vec![Vec::new(); self.count];
        for (names, shape, dim) in self.places(graph).filter(|(_, shape, dim)| *dim == wanted && shape.len() > 1) {
            let item = graph.stored_item(source, names)?;
            check(source, item, shape)?;
            let dtype = DType::try_from(item.dtype).map_err(|e| source.at(item, e))?;
            let elements = Elements::from_bytes(dtype, &source.dense(item)?)?.to_f32();
            let inner = shape[dim + 1..].iter().product::<usize>().max(1);
            for (at, run) in elements.chunks_exact(inner).enumerate() {
                // Along dimension 1 the channels come again for each output.
                rows[at % self.count].extend(run);
            }
        }
        let width = rows.first().map_or(0, Vec::len);
        Matrix::from_f32(self.count, width, &rows.concat())
    }

    /// |γ| of each channel's batch norm, as it is stored (Liu et al. 2017, "Network Slimming",
    /// [arXiv:1708.06519](https://arxiv.org/abs/1708.06519)). An error if there is no norm before the activation.
    pub fn norm_scale(&self, graph: &Graph, source: &Source) -> Result<Vec<f32>> {
        let Some(norm) = &self.norm else {
            return Err(Error::invalid(format!("{}: there is no batch norm before these channels", self.name)));
        };
        let item = graph.stored_item(source, std::slice::from_ref(norm))?;
        check(source, item, &[self.count])?;
        let dtype = DType::try_from(item.dtype).map_err(|e| source.at(item, e))?;
        let scale = Elements::from_bytes(dtype, &source.dense(item)?)?.to_f32();
        Ok(scale.into_iter().map(f32::abs).collect())
    }
}

impl Checkpoint {
    /// For hidden channels that have gone through an activation alone, the share of positions (tokens of texts, pixels
    /// of images) at which each channel is above 0, by the names of [`Graph::hidden`].
    ///
    /// After ReLU and ReLU6 that is 1 less the average percentage of zeros, APoZ (Hu et al. 2016, "Network Trimming",
    /// [arXiv:1607.03250](https://arxiv.org/abs/1607.03250)): channels of which most activations are zero go first.
    /// GELU and SiLU are hardly ever 0, but where ReLU would be they are small, from -0.17 and -0.28 to 0: what is not
    /// above 0 counts as zero there.
    ///
    /// An error if there are no texts, or a text is no input of the model.
    pub fn active_shares<T: AsRef<[u32]>>(
        &self,
        device: &Device,
        texts: &[T],
        batching: Batching,
    ) -> Result<BTreeMap<String, Vec<f32>>> {
        let graph = Arc::clone(self.graph());
        let mut batches = Batches::new(&graph, texts, batching)?;
        let mut parts = Arc::new(Parts::new(device, self)?);
        let mut shares = BTreeMap::new();
        for hidden in graph.hidden.iter().filter(|hidden| hidden.activation.is_some()) {
            let Some(reader) = graph.linear_of(hidden.reader) else { continue };
            let from = batches.node();
            batches.advance(&[&parts], reader.node)?;
            if batches.node() > from {
                parts = Arc::new(parts.rest_from(batches.node()));
            }
            let (mut active, mut positions) = (vec![0u64; hidden.count], 0u64);
            let rows = graph.value(hidden.value).rows;
            batches.run(&[&parts], reader.node, hidden.value, |batch, x| {
                for x in &x {
                    let x = batch.real(x, rows)?.elements().to_f32();
                    for x in x.chunks_exact(hidden.count) {
                        positions += 1;
                        active.iter_mut().zip(x).for_each(|(active, x)| *active += u64::from(*x > 0.0));
                    }
                }
                Ok(())
            })?;
            let share = |active: u64| (active as f64 / positions.max(1) as f64) as f32;
            shares.insert(hidden.name.clone(), active.into_iter().map(share).collect());
        }
        Ok(shares)
    }
}

/// An error if a tensor cannot be cut.
fn check(source: &Source, item: &Item, shape: &[usize]) -> Result<()> {
    let at = |e: Error| source.at(item, e);
    if item.stored != Stored::Dense {
        let reason = format!(
            "is stored as {}, of which no channels can be removed: convert it to dense first",
            item.stored.name()
        );
        return Err(at(Error::invalid(reason)));
    }
    if item.shape != shape {
        return Err(at(Error::shape("weight", item.shape.clone(), shape.to_vec())));
    }
    Ok(())
}

/// Which channels of a model stay, and what is left of its tensors then.
///
/// ```
/// use std::collections::BTreeMap;
/// use sparse24::graph::Removal;
/// use sparse24::models::bert::{BertConfig, Sizes};
/// use sparse24::Activation;
/// let sizes = Sizes { vocabulary: 9, hidden: 8, layers: 1, heads: 2, intermediate: 16, positions: 4, types: 1 };
/// let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu)?.graph()?;
/// let hidden = &graph.hidden()[0];
/// assert_eq!((&*hidden.name, hidden.count), ("encoder.layer.0.intermediate.dense", 16));
/// let removal = Removal::new(&graph, &BTreeMap::from([(hidden.name.clone(), vec![0, 3, 4, 9])]))?;
/// assert_eq!(removal.cut("encoder.layer.0.intermediate.dense.weight"), Some(vec![(0, &[0, 3, 4, 9][..])]));
/// assert_eq!(removal.cut("encoder.layer.0.output.dense.weight"), Some(vec![(1, &[0, 3, 4, 9][..])]));
/// assert_eq!(removal.config(), [(vec!["intermediate_size".to_owned()], 4)]);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Removal<'a> {
    graph: &'a Graph,
    /// Of each tensor, by each of its names, along which dimensions what stays.
    cuts: BTreeMap<&'a str, Vec<(usize, Vec<usize>)>>,
    /// Of each tensor, by each of its names, its shape before.
    shapes: BTreeMap<&'a str, &'a [usize]>,
    config: Vec<(Vec<String>, usize)>,
}

impl<'a> Removal<'a> {
    /// The removal of all channels but these, by the names of [`Graph::hidden`]; of those that are not named all stay.
    /// An error if there are no channels of a name, the places of those that stay are not in order, none stay, or a
    /// config has one number for several that would differ.
    pub fn new(graph: &'a Graph, kept: &BTreeMap<String, Vec<usize>>) -> Result<Self> {
        if let Some(name) = kept.keys().find(|name| graph.hidden.iter().all(|hidden| hidden.name != **name)) {
            return Err(Error::invalid(format!("there are no hidden channels {name:?}")));
        }
        let mut removal = Self { graph, cuts: BTreeMap::new(), shapes: BTreeMap::new(), config: Vec::new() };
        let mut shared: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
        for hidden in &graph.hidden {
            let HiddenChannels { name, count, .. } = hidden;
            let left = match kept.get(name) {
                Some(kept) => {
                    if !kept.is_sorted_by(|a, b| a < b) || kept.last().is_none_or(|last| last >= count) {
                        return Err(Error::invalid(format!(
                            "{name}: those that stay of {count} channels must be some, and in order"
                        )));
                    }
                    for (names, shape, dim) in hidden.places(graph) {
                        for tensor in names {
                            let cuts = removal.cuts.entry(tensor).or_default();
                            // A norm is a part of both its layer's weights and its bias.
                            if cuts.iter().all(|(other, _)| *other != dim) {
                                cuts.push((dim, kept.clone()));
                            }
                            removal.shapes.insert(tensor, shape);
                        }
                    }
                    kept.len()
                }
                None => *count,
            };
            match &hidden.size {
                SizeField::Shared(field) => match shared.get(field) {
                    Some((other, size)) if *size != left => {
                        return Err(Error::invalid(format!(
                            "{other} would have {size} channels and {name} {left}, and a config has one {field} for all"
                        )));
                    }
                    Some(_) => {}
                    None => {
                        shared.insert(*field, (name, left));
                        removal.config.push((vec![(*field).to_owned()], left));
                    }
                },
                SizeField::Own(field, key) if kept.contains_key(name) => {
                    removal.config.push((vec![(*field).to_owned(), key.clone()], left));
                }
                SizeField::Own(..) => {}
            }
        }
        Ok(removal)
    }

    /// Along which dimensions a stored tensor is cut, and which places stay there; none for tensors that stay whole.
    pub fn cut(&self, tensor: &str) -> Option<Vec<(usize, &[usize])>> {
        let cuts = self.graph.names_of(tensor).into_iter().find_map(|name| self.cuts.get(name))?;
        Some(cuts.iter().map(|(dim, kept)| (*dim, &**kept)).collect())
    }

    /// The shape of an item afterwards; none for items that stay whole. An error if it is compressed, or has another
    /// shape than the graph says.
    pub fn shape(&self, source: &Source, item: &Item) -> Result<Option<Vec<usize>>> {
        let Some(cuts) = self.cut(&item.name) else { return Ok(None) };
        if let Some(shape) = self.graph.names_of(&item.name).into_iter().find_map(|name| self.shapes.get(name)) {
            check(source, item, shape)?;
        }
        let mut shape = item.shape.clone();
        cuts.into_iter().for_each(|(dim, kept)| shape[dim] = kept.len());
        Ok(Some(shape))
    }

    /// The little-endian bytes of an item afterwards.
    pub fn content(&self, source: &Source, item: &Item) -> Result<Vec<u8>> {
        let mut bytes = source.dense(item)?;
        let Some(cuts) = self.cut(&item.name) else { return Ok(bytes) };
        let mut shape = item.shape.clone();
        for (dim, kept) in cuts {
            let element = item.dtype.bitsize() / 8;
            let run = shape[dim + 1..].iter().try_fold(element, |run, &n| checked_mul("tensor", run, n))?;
            let whole = checked_mul("tensor", run, shape[dim])?.max(1);
            let outer = bytes.chunks_exact(whole);
            bytes = outer.flat_map(|x| kept.iter().flat_map(move |&at| &x[at * run..][..run])).copied().collect();
            shape[dim] = kept.len();
        }
        Ok(bytes)
    }

    /// The fields of a config that say the new numbers: the way to each, and its number.
    pub fn config(&self) -> &[(Vec<String>, usize)] {
        &self.config
    }
}
