//! The GPU programs of attention's gradient: of queries, of keys and values, of a relative bias.
//!
//! Invariant: a gradient takes no atomics. Each element is summed by one thread in an order that the shapes decide.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use crate::error::Result;
use crate::kernels::{Binding, FeatureAccess, ParamsLayout, Primitives, Program, Shader, Text, Types, WIDTHS, fields};
use crate::matrix::DType;
use crate::ops::attention::Params;

/// Rows that a workgroup owns, and rows that it walks at a time.
pub(super) const ROWS: usize = 32;
/// Features of a gradient that a workgroup owns.
pub(super) const DEPTH: usize = 64;
/// Distances that a workgroup of the bias's program owns.
pub(super) const DISTANCES: usize = 256;

/// What the two large programs are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Options {
    /// Features of a head, not 0.
    pub(super) head_dim: u32,
    /// Query heads that share their keys.
    pub(super) share: u32,
    pub(super) causal: bool,
    pub(super) biased: bool,
    /// Whether gradients are added.
    pub(super) add: bool,
}

impl Options {
    /// Those that tests compile: for each way of reading features none, and all.
    fn all() -> impl Iterator<Item = Self> {
        WIDTHS.into_iter().flat_map(|head_dim| {
            let plain = Self { head_dim, share: 1, causal: false, biased: false, add: false };
            [plain, Self { share: 4, causal: true, biased: true, add: true, ..plain }]
        })
    }

    /// The one that stands for all of the same text.
    fn module(self) -> Self {
        Self {
            head_dim: if self.head_dim.is_multiple_of(4) { 4 } else { 1 },
            share: 1,
            causal: false,
            biased: false,
            add: false,
        }
    }

    fn text(self, own: &'static str) -> Result<Text> {
        const SHARED: [&str; 2] = [
            include_str!("../../../shaders/shared/attention.wgsl"),
            include_str!("../../../shaders/shared/attention_grad.wgsl"),
        ];
        let types = Types::new(DType::F32, DType::F32)?;
        types.text(&[FeatureAccess::of(self.head_dim).text(), SHARED[0], SHARED[1], own])
    }

    fn overrides(self) -> Vec<(&'static str, f64)> {
        let flag = |set| f64::from(u8::from(set));
        vec![
            ("HEAD_DIM", f64::from(self.head_dim)),
            ("SHARE", f64::from(self.share)),
            ("CAUSAL", flag(self.causal)),
            ("BIASED", flag(self.biased)),
            ("ADD", flag(self.add)),
        ]
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { head_dim, share, causal, biased, add } = self;
        write!(f, "f32-d{head_dim}-{}", FeatureAccess::of(*head_dim).name())?;
        if *share > 1 {
            write!(f, "-share{share}")?;
        }
        for (name, _) in [("causal", causal), ("bias", biased), ("add", add)].into_iter().filter(|(_, set)| **set) {
            write!(f, "-{name}")?;
        }
        Ok(())
    }
}

/// The program of the queries' gradient (shaders/attention_grad_q.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AttentionGradQ {
    pub(super) options: Options,
    /// Whether it leaves sums for the bias's gradient.
    pub(super) bias_grad: bool,
}

impl Shader for AttentionGradQ {
    fn module(&self) -> String {
        Self { options: self.options.module(), bias_grad: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.options.text(include_str!("../../../shaders/attention_grad_q.wgsl"))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        let own = ("BIAS_GRAD", f64::from(u8::from(self.bias_grad)));
        self.options.overrides().into_iter().chain([own]).collect()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "lengths"),
                Binding::read(4, "bias"),
                Binding::read(5, "dy"),
                Binding::read(6, "attended"),
                Binding::write(7, "statistics"),
                Binding::write(8, "sums"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width seq heads scale reach)
    }

    fn threads(&self) -> u32 {
        64
    }

    fn workgroup_bytes(&self) -> u32 {
        TILE_BYTES + 128
    }
}

impl fmt::Display for AttentionGradQ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attention_grad_q-{}{}", self.options, if self.bias_grad { "-dbias" } else { "" })
    }
}

/// Bytes of the tiles of shaders/shared/attention_grad.wgsl.
const TILE_BYTES: u32 = 3 * 4 * (ROWS * ROWS) as u32;

/// The program of the gradients of keys and values (shaders/attention_grad_kv.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AttentionGradKv(pub(super) Options);

impl Shader for AttentionGradKv {
    fn module(&self) -> String {
        Self(self.0.module()).to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        self.0.text(include_str!("../../../shaders/attention_grad_kv.wgsl"))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.0.overrides()
    }

    fn bindings(&self) -> &'static [Binding] {
        const {
            &[
                Binding::PARAMS,
                Binding::read(1, "x"),
                Binding::write(2, "y"),
                Binding::read(3, "lengths"),
                Binding::read(4, "bias"),
                Binding::read(5, "dy"),
                Binding::read(6, "statistics"),
            ]
        }
    }

    fn params(&self) -> ParamsLayout {
        fields!(Params: tokens width seq heads scale reach)
    }

    fn threads(&self) -> u32 {
        64
    }

    fn workgroup_bytes(&self) -> u32 {
        TILE_BYTES
    }
}

impl fmt::Display for AttentionGradKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attention_grad_kv-{}", self.0)
    }
}

/// Mirror of `Params` in shaders/attention_grad_bias.wgsl.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct BiasParams {
    pub(super) heads: u32,
    pub(super) sequences: u32,
    pub(super) pieces: u32,
    pub(super) columns: u32,
    pub(super) reach: u32,
}

/// The program of the bias's gradient (shaders/attention_grad_bias.wgsl).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AttentionGradBias {
    /// Whether it is added.
    pub(super) add: bool,
}

impl Shader for AttentionGradBias {
    fn module(&self) -> String {
        Self { add: false }.to_string()
    }

    fn text(&self, _: Primitives) -> Result<Text> {
        Ok(Text::as_it_stands(&[include_str!("../../../shaders/attention_grad_bias.wgsl")]))
    }

    fn overrides(&self) -> Vec<(&'static str, f64)> {
        vec![("ADD", f64::from(u8::from(self.add)))]
    }

    fn bindings(&self) -> &'static [Binding] {
        const { &[Binding::PARAMS, Binding::read(1, "sums"), Binding::write(2, "dbias")] }
    }

    fn params(&self) -> ParamsLayout {
        fields!(BiasParams: heads sequences pieces columns reach)
    }

    fn threads(&self) -> u32 {
        DISTANCES as u32
    }
}

impl fmt::Display for AttentionGradBias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attention_grad_bias-f32{}", if self.add { "-add" } else { "" })
    }
}

/// Every text, with no option and with all.
pub(super) fn shaders() -> impl Iterator<Item = Program> {
    let queries = Options::all().map(|options| AttentionGradQ { options, bias_grad: options.biased });
    let keys = Options::all().map(AttentionGradKv);
    let bias = [false, true].map(|add| AttentionGradBias { add });
    queries.map(Program::new).chain(keys.map(Program::new)).chain(bias.map(Program::new))
}
