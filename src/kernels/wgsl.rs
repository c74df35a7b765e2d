//! WGSL on its way to a driver: parts put together, constants set, marked loops unrolled.
//!
//! Invariant: what is specialised is declared in the text; a name that is not is an error.

use crate::error::{Error, Result};
use crate::matrix::DType;
use crate::problem::{Activation, Epilogue, Form};

const ENABLE_F16: &str = "enable f16;\n";

/// Values of the `override`s of shaders/shared/gemm.wgsl and activation.wgsl.
pub(super) fn overrides(form: Form, epilogue: Epilogue) -> Vec<(&'static str, f64)> {
    vec![
        ("LINEAR", f64::from(u8::from(form == Form::Linear))),
        ("HAS_BIAS", f64::from(u8::from(epilogue.bias))),
        activation_override(epilogue.activation),
        ("HAS_RESIDUAL", f64::from(u8::from(epilogue.residual))),
    ]
}

/// Value of the `override` of shaders/shared/activation.wgsl.
pub(crate) fn activation_override(activation: Activation) -> (&'static str, f64) {
    let number = match activation {
        Activation::None => 0.0,
        Activation::Relu => 1.0,
        Activation::Gelu => 2.0,
        Activation::GeluTanh => 3.0,
        Activation::Silu => 4.0,
        Activation::Relu6 => 5.0,
    };
    ("ACTIVATION", number)
}

/// Value of the `override` of gradients that may not be wanted: whether it is added to, or `None`.
pub(crate) fn target_override(add: Option<bool>) -> (&'static str, f64) {
    ("TARGET", add.map_or(0.0, |add| if add { 2.0 } else { 1.0 }))
}

/// The end of the names of such programs.
pub(crate) fn target_suffix(add: Option<bool>) -> &'static str {
    add.map_or("-sums", add_suffix)
}

/// Value of the `override` of gradients: whether it is added to what is there.
pub(crate) fn add_override(add: bool) -> (&'static str, f64) {
    ("ADD", f64::from(u8::from(add)))
}

/// The end of the names of such programs.
pub(crate) fn add_suffix(add: bool) -> &'static str {
    if add { "-add" } else { "" }
}

/// WGSL on its way to be specialised.
pub(crate) struct Text {
    text: String,
    /// The files that it is made of.
    files: Vec<&'static str>,
}

impl Text {
    /// Files that have no element types to set.
    pub(crate) fn as_it_stands(files: &[&'static str]) -> Self {
        Self { text: files.join("\n"), files: files.to_vec() }
    }

    /// Files that declare the types of what is read and written.
    pub(crate) fn new(files: &[&'static str], storage: DType, output: DType) -> Result<Self> {
        let mut text = Self::as_it_stands(files);
        text.replace("alias Storage", storage.name())?;
        text.replace("alias Output", output.name())?;
        if storage == DType::F16 || output == DType::F16 {
            text.text.insert_str(0, ENABLE_F16);
        }
        Ok(text)
    }

    /// Sets a type that is declared beside these two.
    pub(crate) fn set_type(&mut self, alias: &str, dtype: DType) -> Result<()> {
        self.replace(&format!("alias {alias}"), dtype.name())?;
        if dtype == DType::F16 && !self.text.starts_with(ENABLE_F16) {
            self.text.insert_str(0, ENABLE_F16);
        }
        Ok(())
    }

    pub(super) fn push(&mut self, file: &'static str) {
        self.text.push('\n');
        self.text.push_str(file);
        self.files.push(file);
    }

    /// Puts files before all others. They have the directives, which come first.
    pub(super) fn precede(&mut self, files: [&'static str; 2]) {
        self.text = format!("{}\n{}", files.join("\n"), self.text.trim_start_matches(ENABLE_F16));
        self.files.splice(0..0, files);
    }

    /// The files as they stand.
    pub(super) fn files(&self) -> String {
        self.files.join("\n")
    }

    /// Sets a constant that is a number or a truth value.
    pub(crate) fn set(&mut self, declaration: &str, value: impl Literal) -> Result<()> {
        self.replace(declaration, &value.literal())
    }

    /// Replaces the value in the line `{declaration} = ...;`.
    pub(crate) fn replace(&mut self, declaration: &str, value: &str) -> Result<()> {
        let start = format!("\n{declaration} = ");
        let found = self.text.find(&start).map(|at| at + start.len());
        let end = found.and_then(|at| self.text[at..].find(';').map(|len| at + len));
        let (Some(from), Some(to)) = (found, end) else {
            return Err(Error::invalid(format!("shader does not declare `{declaration}`")));
        };
        self.text.replace_range(from..to, value);
        Ok(())
    }

    pub(super) fn finish(self, unrolled: bool) -> Result<String> {
        if unrolled { unroll(&self.text, &self.text) } else { Ok(self.text) }
    }
}

pub(crate) trait Literal {
    fn literal(&self) -> String;
}

impl Literal for usize {
    fn literal(&self) -> String {
        format!("{self}u")
    }
}

impl Literal for bool {
    fn literal(&self) -> String {
        self.to_string()
    }
}

/// Repeats the body of every loop that follows a line `// unroll`, with the counter as a constant. The loop has the
/// form `for (var i = 0u; i < BOUND; i++) {`, where `BOUND` is a number or the name of a constant that `whole` declares
/// as one.
fn unroll(text: &str, whole: &str) -> Result<String> {
    const MARK: &str = "// unroll\n";
    let Some(mark) = text.find(MARK) else { return Ok(text.to_owned()) };
    let malformed = || {
        let near: String = text[mark..].chars().take(120).collect();
        Error::invalid(format!("shader has a loop that cannot be unrolled: {near}"))
    };
    let after = &text[mark + MARK.len()..];
    let header = after.trim_start();
    let (name, rest) = header.strip_prefix("for (var ").and_then(|h| h.split_once(" = 0u; ")).ok_or_else(malformed)?;
    let rest = rest.strip_prefix(name).and_then(|r| r.strip_prefix(" < ")).ok_or_else(malformed)?;
    let (bound, rest) = rest.split_once("; ").ok_or_else(malformed)?;
    let rest = rest.strip_prefix(name).and_then(|r| r.strip_prefix("++) {")).ok_or_else(malformed)?;
    let number = |text: &str| text.strip_suffix('u').and_then(|n| n.parse::<usize>().ok());
    let named = || {
        let (_, value) = whole.split_once(&format!("\nconst {bound}: u32 = "))?;
        number(value.split_once(';')?.0)
    };
    let count = number(bound).or_else(named).ok_or_else(malformed)?;
    let mut depth = 1;
    let end = rest.char_indices().find(|&(_, c)| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0
    });
    let (end, _) = end.ok_or_else(malformed)?;
    let body = unroll(&rest[..end], whole)?;
    let mut out = text[..mark].to_owned();
    for i in 0..count {
        out.push_str(&format!("{{\nconst {name} = {i}u;{body}}}\n"));
    }
    out.push_str(&unroll(&rest[end + 1..], whole)?);
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn marked_loops_are_unrolled_from_the_inside() {
        let text = "\nconst N: u32 = 2u;\n// unroll\nfor (var i = 0u; i < N; i++) {\n// unroll\nfor (var j = 0u; j < 2u; j++) {\nf(i, j);\n}\n}\ng();";
        let out = unroll(text, text).unwrap();
        assert_eq!(out.matches("f(i, j);").count(), 4);
        assert!(!out.contains("for (") && out.ends_with("g();"), "{out}");
        assert_eq!((out.matches("const i = 1u;").count(), out.matches("const j = 1u;").count()), (1, 2));
    }

    #[test]
    fn loops_of_unknown_length_are_refused() {
        let text = "// unroll\nfor (var i = 0u; i < M; i++) {}";
        assert!(unroll(text, text).unwrap_err().to_string().contains("unrolled"));
    }
}
