//! What a program is: something that is compiled for a GPU, with its text, its bindings and its needs.
//!
//! Every kernel is a small type that implements [`Shader`]; a [`Program`] is any of them. Whoever compiles, binds or
//! tests programs knows no more of them than that trait, so a new kernel changes none of it. [`crate::ops`] has the
//! list of all programs. Invariant: two programs of one name are the same program.

use std::any::Any;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::wgsl::Text;
use super::{Caps, Kernel, Primitives, WORKGROUP, workgroup_supported};
use crate::error::Result;

/// What a program does with a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BindingAccess {
    /// The parameters, a uniform buffer.
    Uniform,
    /// A storage buffer that is read.
    Read,
    /// A storage buffer that is written, and may be read.
    Write,
}

/// A binding of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// Its number, in group 0.
    pub number: u32,
    /// The variable's name in the WGSL.
    pub name: &'static str,
    /// What is done with it.
    pub access: BindingAccess,
}

impl Binding {
    /// The parameters: number 0.
    pub(crate) const PARAMS: Self = Self { number: 0, name: "params", access: BindingAccess::Uniform };

    /// An operand that is read.
    pub(crate) const fn read(number: u32, name: &'static str) -> Self {
        Self { number, name, access: BindingAccess::Read }
    }

    /// An operand that is written.
    pub(crate) const fn write(number: u32, name: &'static str) -> Self {
        Self { number, name, access: BindingAccess::Write }
    }
}

/// The members of a host's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamsLayout {
    /// Names and byte offsets, in their order.
    pub fields: &'static [(&'static str, usize)],
    /// Size of all.
    pub bytes: usize,
}

impl ParamsLayout {
    /// A program without parameters.
    pub(crate) const NONE: Self = Self { fields: &[], bytes: 0 };
}

/// The [`ParamsLayout`] of a struct with these members: a test compares it with what naga makes of the shader's.
macro_rules! fields {
    ($params:ty: $($field:ident)+) => {
        $crate::kernels::ParamsLayout {
            fields: &[$((stringify!($field), ::std::mem::offset_of!($params, $field))),+],
            bytes: ::std::mem::size_of::<$params>(),
        }
    };
}
pub(crate) use fields;

/// Something that is compiled for a GPU. `Display` gives its name, which tells it from all others. What most kernels
/// have in common is here: a workgroup of [`WORKGROUP`] invocations that keep nothing in its memory.
pub(crate) trait Shader: fmt::Display + fmt::Debug + Any + Send + Sync {
    /// Name of the program that stands for all that have the same text: they differ in `override`s alone. Unless there
    /// are such others, its own.
    fn module(&self) -> String {
        self.to_string()
    }

    /// Whether it stands for all that differ from it in form and epilogue alone.
    fn is_representative(&self) -> bool {
        true
    }

    /// Its WGSL, on the way to be specialised.
    fn text(&self, primitives: Primitives) -> Result<Text>;

    /// Values of the text's `override`s: all of them.
    fn overrides(&self) -> Vec<(&'static str, f64)>;

    /// Its bindings, as the text declares them: parameters first, where it has any.
    fn bindings(&self) -> &'static [Binding];

    /// The struct that the host writes for its parameters.
    fn params(&self) -> ParamsLayout {
        ParamsLayout::NONE
    }

    /// Invocations per workgroup.
    fn threads(&self) -> u32 {
        WORKGROUP as u32
    }

    /// Bytes of workgroup memory that a workgroup takes.
    fn workgroup_bytes(&self) -> u32 {
        0
    }

    /// Whether a device can run it; if not, what is missing.
    fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        workgroup_supported(caps, self.threads(), self.workgroup_bytes())
    }
}

/// Anything that is compiled for a GPU. `Display` gives its name.
#[derive(Clone)]
pub struct Program(Arc<dyn Shader>);

impl Program {
    pub(crate) fn new(shader: impl Shader) -> Self {
        Self(Arc::new(shader))
    }

    /// The GEMM kernel that it is, if it is one.
    pub fn gemm(&self) -> Option<&Kernel> {
        self.downcast()
    }

    /// The kernel of a type that it is, if it is one.
    pub(crate) fn downcast<S: Shader>(&self) -> Option<&S> {
        (&*self.0 as &dyn Any).downcast_ref()
    }

    /// Name of the program that stands for all that have the same text.
    pub fn module(&self) -> String {
        self.0.module()
    }

    /// Whether it stands for all that differ from it in form and epilogue alone.
    pub fn is_representative(&self) -> bool {
        self.0.is_representative()
    }

    /// The specialised WGSL, as a GPU gets it: see [`Kernel::source`].
    pub fn source(&self) -> Result<String> {
        self.0.text(Primitives::NATIVE)?.finish(true)
    }

    /// The specialised WGSL as a device with these capabilities gets it.
    pub fn source_for(&self, caps: &Caps) -> Result<String> {
        self.0.text(Primitives::of(caps))?.finish(caps.unrolls)
    }

    /// The shader files that it is made of, one after another as they stand.
    #[doc(hidden)]
    pub fn files(&self) -> Result<String> {
        Ok(self.0.text(Primitives::NATIVE)?.files())
    }

    /// Values of the shader's `override`s.
    pub fn overrides(&self) -> Vec<(&'static str, f64)> {
        self.0.overrides()
    }

    /// Its bindings: parameters first, where it has any.
    pub fn bindings(&self) -> &'static [Binding] {
        self.0.bindings()
    }

    /// How the host lays out its parameters.
    pub fn params(&self) -> ParamsLayout {
        self.0.params()
    }

    /// Invocations per workgroup.
    pub fn threads(&self) -> u32 {
        self.0.threads()
    }

    /// Bytes of workgroup memory that a workgroup takes.
    pub fn workgroup_bytes(&self) -> u32 {
        self.0.workgroup_bytes()
    }

    /// Whether a device can run it; if not, what is missing.
    pub fn supported_by(&self, caps: &Caps) -> std::result::Result<(), String> {
        self.0.supported_by(caps)
    }
}

impl From<Kernel> for Program {
    fn from(kernel: Kernel) -> Self {
        Self::new(kernel)
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({self})")
    }
}

impl PartialEq for Program {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl Eq for Program {}

impl Hash for Program {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.to_string().hash(state);
    }
}
