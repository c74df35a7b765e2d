//! What a model's `config.json` claims of the sparsity of its weights, in the words of compressed-tensors.
//!
//! Modules are named there as Python code names them: by name, by class, or by an expression of Python's `re`, which is
//! what the people who wrote the files tried it with.

use std::path::Path;

use fancy_regex::Regex;
use serde_json::Value;

use super::folder::{read_config, sparsity_configs};
use super::source::Item;
use crate::error::{Error, Result, printable};

/// The modules whose weights a `sparsity_config` says are 2:4. Needs the feature `cli`.
///
/// ```
/// use sparse24::io::{self, Source, SparsityClaim};
/// use sparse24::{DType, Matrix};
/// let dir = tempfile::tempdir().unwrap();
/// let zeros = Matrix::zeros(4, 4, DType::F32)?;
/// io::save_matrices(dir.path().join("model.safetensors"), &[("head.weight", &zeros), ("up.weight", &zeros)])?;
/// let config = r#"{"sparsity_config": {"sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["re:h.*"]}}"#;
/// std::fs::write(dir.path().join("config.json"), config).unwrap();
///
/// let claim = SparsityClaim::of(dir.path())?.unwrap();
/// let source = Source::open(dir.path())?;
/// let covered = source.items().map(|item| claim.covers(item)).collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(covered, [false, true]);
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Debug)]
pub struct SparsityClaim {
    /// None means all linear layers.
    targets: Option<Vec<Target>>,
    ignore: Vec<Target>,
}

/// Modules, by their name, by an expression for it, or by their class in torch.
#[derive(Debug)]
enum Target {
    Name(String),
    Matching(Regex),
}

impl Target {
    fn all(list: Option<&Value>) -> Result<Vec<Self>> {
        let names = match list {
            None | Some(Value::Null) => &[],
            Some(Value::Array(names)) => &names[..],
            Some(one) => std::slice::from_ref(one),
        };
        let target = |name: &Value| {
            let name = name
                .as_str()
                .ok_or_else(|| Error::invalid(format!("{} is no name of modules", printable(&name.to_string()))))?;
            Ok(match name.strip_prefix("re:") {
                Some(re) => Self::Matching(python_match(re)?),
                None => Self::Name(name.to_owned()),
            })
        };
        names.iter().map(target).collect()
    }

    fn names(&self, module: &str) -> Result<bool> {
        match self {
            Self::Name(name) => Ok(name == module),
            Self::Matching(re) => re
                .is_match(module)
                .map_err(|e| Error::invalid(format!("{} on {}: {e}", printable(re.as_str()), printable(module)))),
        }
    }
}

/// An expression that matches what Python's `re.match` does: from the start of the name.
fn python_match(re: &str) -> Result<Regex> {
    Regex::new(&format!(r"\A(?:{})", translated(re))).map_err(|e| Error::invalid(format!("re:{}: {e}", printable(re))))
}

/// An expression of Python's `re` in the syntax of Rust's crates, where the two give the same text another meaning:
/// `\Z` is the very end in Python, and in its classes of characters `[`, `&` and `~` stand for themselves. The rest
/// means the same, or is refused when it is parsed.
fn translated(re: &str) -> String {
    let mut out = String::new();
    let (mut in_class, mut chars) = (false, re.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('Z') if !in_class => out += r"\z",
                Some(escaped) => out.extend([c, escaped]),
                None => out.push(c),
            },
            '[' if !in_class => {
                in_class = true;
                out.push(c);
                out.extend(chars.next_if_eq(&'^'));
                // A bracket that comes first does not close the class.
                if chars.next_if_eq(&']').is_some() {
                    out += r"\]";
                }
            }
            '[' | '&' | '~' if in_class => out.extend(['\\', c]),
            ']' => {
                in_class = false;
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    out
}

impl SparsityClaim {
    /// The claim of a folder's config that its weights are 2:4, if it makes it. An error if its lists of modules cannot
    /// be read.
    pub fn of(folder: &Path) -> Result<Option<Self>> {
        let Some(config) = read_config(folder)? else { return Ok(None) };
        let claimed = sparsity_configs(&config).find(|s| s.get("sparsity_structure").is_some_and(|s| s == "2:4"));
        let Some(sparsity) = claimed else { return Ok(None) };
        let of = |key: &str| {
            Target::all(sparsity.get(key))
                .map_err(|e| Error::file(&folder.join("config.json"), format!("{key} of its sparsity_config: {e}")))
        };
        Ok(Some(Self { targets: Some(of("targets")?).filter(|t| !t.is_empty()), ignore: of("ignore")? }))
    }

    /// Whether a tensor is among those that are claimed to be 2:4. A file does not say of which class a module is: the
    /// weights of every module count as those of a linear layer, if they have two dimensions and are no embedding by
    /// their name.
    pub fn covers(&self, item: &Item) -> Result<bool> {
        let (Some(module), Some(_)) = (item.name.strip_suffix(".weight"), item.matrix()) else { return Ok(false) };
        let last = module.rsplit('.').next().unwrap_or(module);
        let linear = !last.contains("embed") && !matches!(last, "wte" | "wpe" | "shared");
        let among = |targets: &[Target]| -> Result<bool> {
            for target in targets {
                let is_linear = linear && matches!(target, Target::Name(name) if name == "Linear");
                if is_linear || target.names(module)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let targeted = match &self.targets {
            Some(targets) => among(targets)?,
            None => linear,
        };
        Ok(targeted && !among(&self.ignore)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_match_as_pythons_do() -> std::result::Result<(), Box<dyn std::error::Error>> {
        // Each as `re.match(re, name) is not None` of Python 3 has it.
        for (re, name, matches) in [
            (r"(?!.*lm_head).*", "model.layers.0.up", true),
            (r"(?!.*lm_head).*", "model.lm_head", false),
            (r"^(?!model\.layers\.0\.).*proj$", "model.layers.0.up_proj", false),
            (r"^(?!model\.layers\.0\.).*proj$", "model.layers.1.up_proj", true),
            (r".*(?<!down)_proj", "a.down_proj", false),
            ("head", "lm_head", false),
            ("lm", "lm_head", true),
            (r"lm\Z", "lm_head", false),
            (r"(?P<n>a)\.(?P=n)\Z", "a.a", true),
            (r"(?P<n>a)\.(?P=n)\Z", "a.b", false),
            (r"(a)\.\1", "a.a", true),
            (r"[]]x", "]x", true),
            (r"[^]]x", "]x", false),
            (r"a[[.]b", "a[b", true),
            (r"a[a-z&&[b]]", "ab]", true),
            (r"[a~~b]{2}", "~~", true),
            (r"(?i)LM_HEAD", "lm_head", true),
            (r"a|lm_head", "lm_head", true),
            (r"[\]x]+\Z", "]x]", true),
        ] {
            assert_eq!(python_match(re)?.is_match(name)?, matches, "{re} on {name}");
        }
        let error = python_match("(?P<a").map(|_| ()).map_err(|e| e.to_string());
        assert!(error.is_err_and(|e| e.starts_with("re:(?P<a: ")));
        Ok(())
    }
}
