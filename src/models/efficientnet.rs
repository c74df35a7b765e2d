//! EfficientNet-Lite (Tan & Le 2019, [arXiv:1905.11946](https://arxiv.org/abs/1905.11946); its lite variants have no
//! squeeze and excitation, and ReLU6): config and names of tensors to graph.
//!
//! A block widens its channels by a 1x1 convolution, convolves each by itself, and narrows them by another 1x1
//! convolution, whose output is added to the block's input where these have one shape (Sandler et al. 2018,
//! MobileNetV2, [arXiv:1801.04381](https://arxiv.org/abs/1801.04381)). All but the depthwise convolutions are GEMMs: of
//! Lite0's weights 95 %. Names of tensors are those of `efficientnet_lite_pytorch`; padding is TensorFlow's. Lists of a
//! config have an entry for each stage, scaled for the variant already.
//!
//! Invariant: an [`EfficientNetConfig`] has no size of zero, and its lists are of one length.

use std::collections::BTreeMap;

use super::{Fields, check_size};
use crate::error::{Error, Result, checked_mul};
use crate::graph::{BatchNorm, Blocks, ConvolutionSpec, Graph, HiddenSpec, SizeField, ValueId};
use crate::ops::gemm::LinearSpec;
use crate::problem::Activation;
use crate::window::Window;

/// Blocks of one shape, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Lines and columns of the depthwise kernel.
    pub kernel: usize,
    /// Of the first block; the others have 1.
    pub stride: usize,
    /// How many times as many channels a block has within.
    pub expand: usize,
    /// Channels of its output.
    pub channels: usize,
    /// Number of blocks.
    pub blocks: usize,
}

/// What an EfficientNet-Lite is made of beside its weights.
///
/// ```
/// use sparse24::models::efficientnet::EfficientNetConfig;
/// let graph = EfficientNetConfig::lite0().graph()?;
/// assert_eq!((graph.image(), graph.output_width(), graph.linears().count()), (Some([224, 224]), 1000, 34));
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct EfficientNetConfig {
    /// Lines and columns of an image.
    pub image: usize,
    /// What red, green and blue have subtracted, of 255.
    pub mean: [f32; 3],
    /// What they are divided by then.
    pub std: [f32; 3],
    /// Channels of the first convolution.
    pub stem: usize,
    /// Stages, first to last.
    pub stages: Vec<Stage>,
    /// Channels of the last convolution.
    pub head: usize,
    /// Classes.
    pub classes: usize,
    /// What batch norms add to the variance.
    pub eps: f32,
    /// After every convolution but those that narrow channels.
    pub activation: Activation,
    /// Of blocks by their numbers, how many channels they have within, where that is not what `expand` says: some have
    /// been removed.
    pub expanded: BTreeMap<usize, usize>,
}

/// The field of a config that has [`EfficientNetConfig::expanded`].
const EXPANDED: &str = "expanded_channels";

impl EfficientNetConfig {
    /// EfficientNet-Lite0 for ImageNet's 1000 classes.
    pub fn lite0() -> Self {
        let stage = |(kernel, stride, expand, channels, blocks)| Stage { kernel, stride, expand, channels, blocks };
        let stages = [
            (3, 1, 1, 16, 1),
            (3, 2, 6, 24, 2),
            (5, 2, 6, 40, 2),
            (3, 2, 6, 80, 3),
            (5, 1, 6, 112, 3),
            (5, 2, 6, 192, 4),
            (3, 1, 6, 320, 1),
        ];
        Self {
            image: 224,
            mean: [127.0; 3],
            std: [128.0; 3],
            stem: 32,
            stages: stages.map(stage).into(),
            head: 1280,
            classes: 1000,
            eps: 1e-3,
            activation: Activation::Relu6,
            expanded: BTreeMap::new(),
        }
    }

    /// Reads the fields of a `config.json`. An error names one that is missing or of another type, and lists that
    /// differ in length. The number of classes is `num_labels`, or that of `id2label`.
    pub fn parse(text: &str) -> Result<Self> {
        let fields = Fields::parse(text)?;
        fields.one_of("model_type", &["efficientnet_lite"])?;
        Self::of(&fields)
    }

    pub(super) fn of(fields: &Fields) -> Result<Self> {
        let kernels = fields.sizes("kernel_sizes")?;
        let list = |name: &str| -> Result<Vec<usize>> {
            let sizes = fields.sizes(name)?;
            match sizes.len() == kernels.len() {
                true => Ok(sizes),
                false => {
                    Err(Error::invalid(format!("{name} has {} stages, kernel_sizes {}", sizes.len(), kernels.len())))
                }
            }
        };
        let (strides, expands) = (list("strides")?, list("expand_ratios")?);
        let (channels, blocks) = (list("out_channels")?, list("num_block_repeats")?);
        let stage = |i: usize| Stage {
            kernel: kernels[i],
            stride: strides[i],
            expand: expands[i],
            channels: channels[i],
            blocks: blocks[i],
        };
        let labels = fields.object("id2label")?.map(|labels| labels.count());
        let config = Self {
            image: fields.size("image_size", None)?,
            mean: fields.triple("image_mean")?,
            std: fields.triple("image_std")?,
            stem: fields.size("stem_channels", None)?,
            stages: (0..kernels.len()).map(stage).collect(),
            head: fields.size("hidden_dim", None)?,
            classes: fields.size("num_labels", labels)?,
            eps: fields.number("batch_norm_eps", 1e-3)? as f32,
            activation: fields.activation("hidden_act", Activation::Relu6)?,
            expanded: fields.numbered(EXPANDED)?,
        };
        config.check()?;
        Ok(config)
    }

    /// An error if a size is 0 or more than a kernel counts to, or a number is none that can be divided by.
    fn check(&self) -> Result<()> {
        let Self { image, stem, stages, head, classes, eps, std, mean, expanded, .. } = self;
        for (name, size) in
            [("image_size", image), ("stem_channels", stem), ("hidden_dim", head), ("num_labels", classes)]
        {
            check_size(name, *size)?;
        }
        for Stage { kernel, stride, expand, channels, blocks } in stages {
            for (name, size) in [
                ("kernel_sizes", kernel),
                ("strides", stride),
                ("expand_ratios", expand),
                ("out_channels", channels),
                ("num_block_repeats", blocks),
            ] {
                check_size(&format!("a number of {name}"), *size)?;
            }
        }
        let mut blocks = stages.iter().flat_map(|stage| std::iter::repeat_n(stage.expand > 1, stage.blocks));
        let mut next = 0;
        for (&number, &size) in expanded {
            check_size(&format!("a number of {EXPANDED}"), size)?;
            if blocks.nth(number - next) != Some(true) {
                return Err(Error::invalid(format!("{EXPANDED} has block {number}, which has no channels within")));
            }
            next = number + 1;
        }
        if !(*eps >= 0.0 && eps.is_finite()) {
            return Err(Error::invalid(format!("batch_norm_eps is {eps}, expected a number of at least 0")));
        }
        match std.iter().chain(mean).find(|number| !number.is_finite()).or(std.iter().find(|std| **std == 0.0)) {
            Some(number) => Err(Error::invalid(format!("image_mean or image_std has {number}"))),
            None => Ok(()),
        }
    }

    /// The model as a graph, from an image to a logit for each class.
    pub fn graph(&self) -> Result<Graph> {
        let &Self { image, mean, std, stem, ref stages, head, classes, .. } = self;
        let mut graph = Graph::for_images([image, image])?;
        let count = stages.iter().map(|stage| stage.blocks).sum();
        graph.set_blocks(Blocks { prefix: "_blocks.".to_owned(), count, field: "num_block_repeats" });
        let pixels = graph.pixels("pixels", mean, std.map(|std| 1.0 / std))?;
        let mut at = Image { value: pixels, size: image };
        at = self.add(&mut graph, "_conv_stem", "_bn0", at, stem, (3, 2))?;
        let mut number = 0;
        for stage in stages {
            for block in 0..stage.blocks {
                let stride = if block == 0 { stage.stride } else { 1 };
                at = self.add_block(&mut graph, number, at, stage, stride)?;
                number += 1;
            }
        }
        let last = self.add(&mut graph, "_conv_head", "_bn1", at, head, (1, 1))?;
        let pooled = graph.mean_pooling("_avg_pooling", last.value, false)?;
        let logits = graph.linear(LinearSpec::new("_fc", pooled, classes))?;
        graph.add_output(logits);
        Ok(graph)
    }

    fn add_block(&self, graph: &mut Graph, number: usize, x: Image, stage: &Stage, stride: usize) -> Result<Image> {
        let &Stage { kernel, expand, channels, .. } = stage;
        let name = |part: &str| format!("_blocks.{number}.{part}");
        let wide = match expand {
            1 => x,
            _ => {
                let all = checked_mul("channels of a block", expand, graph.value(x.value).cols)?;
                let channels = self.expanded.get(&number).copied().unwrap_or(all);
                self.add(graph, &name("_expand_conv"), &name("_bn0"), x, channels, (1, 1))?
            }
        };
        let window = Window::same([wide.size; 2], [kernel; 2], [stride; 2])?;
        let (depthwise, norm) = (name("_depthwise_conv"), name("_bn1"));
        let spec = ConvolutionSpec {
            name: &depthwise,
            x: wide.value,
            channels: graph.value(wide.value).cols,
            window,
            norm: Some(BatchNorm { name: &norm, eps: self.eps }),
            activation: self.activation,
            residual: None,
        };
        let filtered = Image { value: graph.depthwise_convolution(spec)?, size: window.positions()[0] };
        let (project, norm) = (name("_project_conv"), name("_bn2"));
        let same = stride == 1 && graph.value(x.value).cols == channels;
        let spec = ConvolutionSpec {
            name: &project,
            x: filtered.value,
            channels,
            window: Window::same([filtered.size; 2], [1; 2], [1; 2])?,
            norm: Some(BatchNorm { name: &norm, eps: self.eps }),
            activation: Activation::None,
            residual: same.then_some(x.value),
        };
        let value = graph.convolution(spec)?;
        if expand != 1 {
            graph.add_hidden(HiddenSpec {
                makers: &[&name("_expand_conv"), &depthwise],
                reader: &project,
                activation: Some(self.activation),
                norm: Some(name("_bn1.weight")),
                size: SizeField::Own(EXPANDED, number.to_string()),
            })?;
        }
        Ok(Image { value, ..filtered })
    }

    /// Adds a convolution with its norm and the activation.
    fn add(
        &self,
        graph: &mut Graph,
        name: &str,
        norm: &str,
        x: Image,
        channels: usize,
        (kernel, stride): (usize, usize),
    ) -> Result<Image> {
        let window = Window::same([x.size; 2], [kernel; 2], [stride; 2])?;
        let spec = ConvolutionSpec {
            name,
            x: x.value,
            channels,
            window,
            norm: Some(BatchNorm { name: norm, eps: self.eps }),
            activation: self.activation,
            residual: None,
        };
        Ok(Image { value: graph.convolution(spec)?, size: window.positions()[0] })
    }
}

/// A value that is an image of so many lines and as many columns.
#[derive(Clone, Copy)]
struct Image {
    value: ValueId,
    size: usize,
}
