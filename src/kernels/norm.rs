//! What the normalisations over the features of a token share: the host's side of shaders/shared/norm.wgsl, and the
//! programs that sum the gradients of their parameters over the tokens.
//!
//! Invariant: a workgroup of a normalisation has whole tokens, and sums over tokens are cut up by their number alone.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::{
    Binding, Caps, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, WORKGROUP,
    add_override, add_suffix, fields, target_override, target_suffix,
};
use crate::error::Result;
use crate::matrix::DType;

/// Mirror of `Params` in shaders/shared/norm.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NormParams {
    pub(crate) tokens: u32,
    /// What is added to the mean of squares under the root.
    pub(crate) epsilon: f32,
}

impl NormParams {
    pub(crate) const LAYOUT: ParamsLayout = fields!(NormParams: tokens epsilon);
}

/// Which tokens: of so many features, read in this way, from one type to another. Its name (`Display`) is made of its
/// parts, such as `f16f32-d384-quads`: types of input and sums, features of a token, and how these are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NormLayout {
    width: u32,
    access: FeatureAccess,
    types: Types,
}

impl NormLayout {
    /// Tokens of `width` features. An error for a type that kernels do not store.
    pub(crate) fn new(width: u32, storage: DType, output: DType) -> Result<Self> {
        Ok(Self { width, access: FeatureAccess::of(width), types: Types::new(storage, output)? })
    }

    /// One of every text.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let sizes = Types::all().flat_map(|types| WIDTHS.map(|width| (types, width)));
        sizes.map(|(types, width)| Self { width, access: FeatureAccess::of(width), types })
    }

    /// The one that stands for all of its text.
    pub(crate) fn module(self) -> Self {
        Self { width: 0, ..self }
    }

    /// The shared text, and a kernel's own.
    pub(crate) fn text(self, own: &'static str) -> Result<Text> {
        self.types.text(&[
            self.access.text(),
            include_str!("../../shaders/shared/inverse_root.wgsl"),
            include_str!("../../shaders/shared/norm.wgsl"),
            own,
        ])
    }

    /// Values of the `override`s.
    pub(crate) fn overrides(self) -> Vec<(&'static str, f64)> {
        vec![("WIDTH", f64::from(self.width))]
    }

    /// Workgroups for so many tokens.
    pub(crate) fn workgroups(self, tokens: usize) -> usize {
        if self.width == 0 { 0 } else { tokens.div_ceil(WORKGROUP / 32) }
    }

    /// Whether a device can run a kernel that takes so many bytes of workgroup memory; if not, what is missing.
    pub(crate) fn supported_by(self, caps: &Caps, bytes: u32) -> std::result::Result<(), String> {
        self.types.supported_by(caps, WORKGROUP as u32, bytes)
    }
}

impl fmt::Display for NormLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, access, types } = self;
        write!(f, "{}f32-d{width}-{}{}", types.storage(), access.name(), types.suffix())
    }
}

/// The normalisations that have gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Norm {
    Layer,
    Rms,
}

/// The program of a normalisation's gradient with respect to what is normalised (shaders/layer_norm_grad.wgsl and
/// rms_norm_grad.wgsl), which leaves what [`NormSums`] needs. All is f32. Its name (`Display`) is made of its parts,
/// such as `layer_norm_grad-f32f32-d384-quads-add`: as of the normalisation itself, and `add` where the gradient is
/// added to what is there, `sums` where it is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NormGrad {
    norm: Norm,
    layout: NormLayout,
    /// Whether the gradient is added to what is there; `None` where it is not wanted.
    add: Option<bool>,
}

impl NormGrad {
    /// Of tokens of `width` features.
    pub(crate) fn new(norm: Norm, width: u32, add: Option<bool>) -> Self {
        Self { norm, layout: NormLayout { width, access: FeatureAccess::of(width), types: Types::F32 }, add }
    }

    /// Every text of a normalisation.
    pub(crate) fn all(norm: Norm) -> impl Iterator<Item = Program> {
        WIDTHS.into_iter().map(move |width| Program::new(Self::new(norm, width, Some(false))))
    }

    /// Workgroups for so many tokens.
    pub(crate) fn workgroups(self, tokens: usize) -> usize {
        self.layout.workgroups(tokens)
    }
}

impl Shader for NormGrad {
    fn module(&self) -> String {
        Self { layout: self.layout.module(), add: Some(false), ..*self }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.layout.text(match self.norm {
            Norm::Layer => include_str!("../../shaders/layer_norm_grad.wgsl"),
            Norm::Rms => include_str!("../../shaders/rms_norm_grad.wgsl"),
        })
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        [self.layout.overrides(), vec![target_override(self.add)]].concat()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "gamma"),
                Binding::read(4, "dy"),
                Binding::write(5, "statistics"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        NormParams::LAYOUT
    }

    fn workgroup_bytes(&self) -> u32 {
        let sums = match self.norm {
            Norm::Layer => 4,
            Norm::Rms => 2,
        };
        sums * 4 * WORKGROUP as u32
    }

    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.layout.supported_by(caps, self.workgroup_bytes())
    }
}

impl fmt::Display for NormGrad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let norm = match self.norm {
            Norm::Layer => "layer_norm",
            Norm::Rms => "rms_norm",
        };
        write!(f, "{norm}_grad-{}{}", self.layout, target_suffix(self.add))
    }
}

/// Mirror of `Params` in shaders/norm_sums.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NormSumsParams {
    pub(crate) tokens: u32,
    pub(crate) block: u32,
}

/// The program (shaders/norm_sums.wgsl) that sums a normalisation's gradients of its parameters over blocks of tokens:
/// so many rows of sums for each. Its name (`Display`) is made of its parts, such as `norm_sums-d384-2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NormSums {
    width: u32,
    sums: u32,
}

impl NormSums {
    /// For tokens of `width` features; of the factors alone, or of factors and addends.
    pub(crate) fn new(width: u32, sums: u32) -> Self {
        Self { width, sums }
    }

    /// Tokens of a block: few, so that there are workgroups for a GPU, but no more than 128 blocks, whose sums one
    /// thread adds up.
    pub(crate) fn block(tokens: u32) -> u32 {
        tokens.div_ceil(128).max(16)
    }
}

impl Shader for NormSums {
    fn module(&self) -> String {
        "norm_sums".into()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/norm_sums.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("WIDTH", f64::from(self.width)), ("SUMS", f64::from(self.sums))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::read(2, "dy"),
                Binding::read(3, "statistics"),
                Binding::write(4, "parts"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(NormSumsParams: tokens block)
    }
}

impl fmt::Display for NormSums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "norm_sums-d{}-{}", self.width, self.sums)
    }
}

/// Mirror of `Params` in shaders/norm_fold.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct NormFoldParams {
    pub(crate) width: u32,
    pub(crate) blocks: u32,
    pub(crate) first: u32,
    pub(crate) sums: u32,
}

/// The program (shaders/norm_fold.wgsl) that adds up the sums over blocks of tokens. Its name (`Display`) is
/// `norm_fold`, or `norm_fold-add` where they are added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NormFold {
    add: bool,
}

impl NormFold {
    /// One that overwrites, or adds.
    pub(crate) fn new(add: bool) -> Self {
        Self { add }
    }
}

impl Shader for NormFold {
    fn module(&self) -> String {
        "norm_fold".into()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../shaders/norm_fold.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![add_override(self.add)]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "parts"), Binding::write(2, "y")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(NormFoldParams: width blocks first sums)
    }
}

impl fmt::Display for NormFold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "norm_fold{}", add_suffix(self.add))
    }
}

/// What the gradients of all normalisations need beside their own programs.
pub(crate) fn norm_sums() -> impl Iterator<Item = Program> {
    [Program::new(NormSums::new(WIDTHS[0], 2)), Program::new(NormFold::new(false))].into_iter()
}
