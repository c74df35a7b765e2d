//! `sparse24 inspect`: what is in a model's files, what 2:4 would make of it, and whether what says that it is 2:4 is.
//!
//! Tensors are read one at a time, so memory stays near the largest one, and nothing is printed before all were read: a
//! file that turns out to be broken gives an error and no half of a listing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::args::Json;
use super::{Outcome, print, progress, say, scaled, size};
use sparse24::error::{Error, printable};
use sparse24::format::{Bytes, Sparse24, Storage};
use sparse24::io::{Item, Source, SparsityClaim, Stored, config_of, in_by_out};
use sparse24::mask::{Mask, VectorLen};
use sparse24::matrix::{DType, Elements, Matrix};
use sparse24::prune;

const EXAMPLES: &str = "\
Examples:
  sparse24 inspect model.safetensors
  # the tensors that are 2:4 already
  sparse24 inspect model.safetensors --json | jq '.tensors[] | select(.matrix.vector)'
  # does a folder keep what its files say?
  sparse24 inspect --check model-2of4/

Columns:
  density  share of elements that are not zero (-0.0 is zero)
  2:4?     no, or the most rows V of which each block can share its patterns
  kept     share of the sum of |w| that 2:4 at V=1 keeps: the two largest of four
  dense    bytes of all elements
  COO      bytes of value, row and column (4 bytes each) of every non-zero
  2:4      bytes of values and metadata, pruned to 2:4 at V=1; what a matrix that
           is stored as 2:4 takes

Of matrices of which a tenth or more is zero a second table says what forms for any pattern
take: CSR (value and column of every non-zero, 4 bytes for each row) and a bitmask (values and
a bit for each element); and from which share of zeros on COO and CSR take fewer bytes than
dense (`COO<dense`), bitmask (`COO<bits`) and 2:4 (`COO<2:4`); never is a dash.

A matrix is a tensor of two dimensions and type f32, f16 or bf16, or one that is stored
as 2:4 in any type; of others, shape, type and bytes are listed. Stored as 2:4 means:
sparse24's own format (sparse24), sparse-24-bitmask, or torch's CUTLASS pair (cutlass);
they are checked throughout, and an illegal one is an error. sparse-bitmask, torch-mask
and asp-mask are listed as what they are when decoded and masked. Matrices of in features
x out features (Conv1D of GPT-2 and its relatives, kernels of Flax and Keras) are marked
`in x out`, and looked at along the in features, which are their rows.

--check looks at what claims to be 2:4: those forms but for sparse-bitmask, matrices with
a mask of torch's or ASP's, and in a folder whose config.json says sparsity_structure 2:4,
the weights that it says it of: those of its targets, or of all linear layers where it
names none. It exits with 3 at the first that is not.";

/// The widest line that is laid out generously.
const WIDTH: usize = 100;

/// List a model's tensors: how they are stored, density, whether they are 2:4, what 2:4 would keep, and bytes in each
/// form; or check those that claim to be 2:4.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    json: Json,
    /// Print one line if all that claims to be 2:4 is; else exit with 3 and name the first tensor, row and group that
    /// is not.
    #[arg(long, conflicts_with = "json")]
    check: bool,
}

/// What is looked at.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// A safetensors file, an index of shards, or a model's folder.
    #[arg(value_name = "FILE.safetensors|DIR")]
    path: Option<PathBuf>,
    /// The same, by name.
    #[arg(long, value_name = "FILE.safetensors|DIR")]
    model: Option<PathBuf>,
}

impl Which {
    fn get(&self) -> &Path {
        // clap's group lets exactly one through.
        self.path.as_deref().or(self.model.as_deref()).unwrap_or(Path::new(""))
    }
}

#[derive(Serialize)]
struct Listing {
    schema: &'static str,
    file: String,
    tensors: Vec<Row>,
    total: Total,
}

/// One tensor, or one matrix that is stored as several.
#[derive(Serialize)]
struct Row {
    name: String,
    shape: Vec<usize>,
    dtype: String,
    /// As [`Stored::name`] has it.
    stored: &'static str,
    /// Whether its rows are the in features, so that `matrix` is about its transpose.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    in_by_out: bool,
    /// What it takes in the files.
    bytes: u64,
    /// What is known of matrices of f32, f16 and bf16 alone.
    matrix: Option<Facts>,
}

#[derive(Serialize)]
struct Facts {
    nonzeros: u64,
    /// None where there are no elements.
    density: Option<f64>,
    /// The largest vector length at which it is 2:4, or at which it is stored; none where it is not 2:4.
    vector: Option<usize>,
    /// None where it has no value, which `note` explains.
    kept_magnitude: Option<f64>,
    dense_bytes: u64,
    coo_bytes: u64,
    csr_bytes: u64,
    bitmask_bytes: u64,
    sparse24_bytes: u64,
    /// Of matrices of which a tenth or more is zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    break_even: Option<BreakEven>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// From which share of zeros on COO and CSR take fewer bytes than other forms.
#[derive(Clone, Copy, Serialize)]
struct BreakEven {
    coo: Shares,
    csr: Shares,
}

/// The share of zeros from which on fewer bytes are taken than by each of these; none where that is never so.
#[derive(Clone, Copy, Serialize)]
struct Shares {
    dense: Option<f64>,
    bitmask: Option<f64>,
    sparse24: Option<f64>,
}

/// Sums; those by form are over matrices alone.
#[derive(Default, Serialize)]
struct Total {
    tensors: usize,
    matrices: usize,
    bytes: u64,
    dense_bytes: u64,
    coo_bytes: u64,
    sparse24_bytes: u64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let path = args.which.get();
    args.json.file()?;
    let source = Source::open(path)?;
    let in_by_out = in_by_out(&source, config_of(path)?.as_ref());
    if args.check {
        return check(path, &source, &in_by_out);
    }
    let listing = Listing::read(path.display().to_string(), &source, &in_by_out)?;
    args.json.emit(&listing.text(), &listing)?;
    Ok(Outcome::Fine)
}

/// Reads everything that claims to be 2:4.
fn check(path: &Path, source: &Source, in_by_out: &BTreeSet<String>) -> Result<Outcome> {
    let claim = if path.is_dir() { SparsityClaim::of(path)? } else { None };
    let mut claimed = Vec::new();
    for item in source.items() {
        let by_config = || claim.as_ref().map_or(Ok(false), |claim| claim.covers(item));
        // A mask may be of a bias, and a type that no 2:4 matrix has makes no claim by the config either.
        let said = item.stored.claims() || by_config()?;
        if said && (matches!(item.stored, Stored::Native | Stored::Bitmask) || item.spec24().is_some()) {
            claimed.push(item);
        }
    }
    let bar = progress(claimed.len());
    for item in &claimed {
        bar.set_message(printable(&item.name).into_owned());
        let (checked, transposed) = match item.spec24() {
            // Of another type, which can still be 2:4.
            None if item.stored == Stored::Bitmask => (source.dense(item).map(drop), false),
            _ if in_by_out.contains(&item.name) => {
                let checked = source.transposed(item).and_then(|(m, k, bytes)| {
                    let w = Bytes::new(item.dtype, bytes);
                    let s = w.and_then(|w| Sparse24::from_elements(m, k, &w, Some(VectorLen::ONE)));
                    s.map(drop).map_err(|e| e.in_tensor(source.path_of(item), &item.name))
                });
                (checked, true)
            }
            _ => (source.sparse24_bytes(item).map(drop), false),
        };
        match checked {
            Ok(()) => bar.inc(1),
            // Files that cannot be read are errors like any other.
            Err(e) if e.tensor().is_some() && e.io_error().is_none() => {
                bar.finish_and_clear();
                let of = if transposed { " (of its transpose, as it is stored as in x out)" } else { "" };
                say(&format!("not 2:4: {e}{of}"));
                return Ok(Outcome::VerificationFailed);
            }
            Err(e) => return Err(e.into()),
        }
    }
    bar.finish_and_clear();
    let tensors = many(source.items().count(), "tensor", "tensors");
    let verdict = match claimed.len() {
        0 => "none claims to be 2:4".to_owned(),
        1 => "1 claims to be 2:4, and is".to_owned(),
        n => format!("{n} claim to be 2:4, and are"),
    };
    print(&format!("{}: of {tensors}, {verdict}\n", printable(&path.to_string_lossy())))?;
    Ok(Outcome::Fine)
}

impl Listing {
    fn read(file: String, source: &Source, in_by_out: &BTreeSet<String>) -> Result<Self> {
        let bar = progress(source.items().count());
        let mut rows = Vec::new();
        for item in source.items() {
            bar.set_message(printable(&item.name).into_owned());
            rows.push(Row::of(source, item, in_by_out.contains(&item.name))?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        rows.sort_by(|a, b| by_parts(&a.name).cmp(by_parts(&b.name)));
        let total = Total::of(&rows);
        Ok(Self { schema: "sparse24-inspect/1", file, tensors: rows, total })
    }

    fn text(&self) -> String {
        let t = &self.total;
        let mut text =
            format!("{}: {}, {}\n", printable(&self.file), many(t.tensors, "tensor", "tensors"), size(t.bytes));
        if !self.tensors.is_empty() {
            text.push('\n');
            let header = ["shape", "type", "density", "2:4?", "kept", "dense", "COO", "2:4", "tensor"];
            let cells: Vec<_> =
                [header.map(str::to_owned)].into_iter().chain(self.tensors.iter().map(Row::cells)).collect();
            text += &table(&cells);
            text.push('\n');
            let zeros: Vec<_> = self.tensors.iter().filter_map(Row::zeros).collect();
            if !zeros.is_empty() {
                let header = [
                    "zeros",
                    "CSR",
                    "bitmask",
                    "COO<dense",
                    "COO<bits",
                    "COO<2:4",
                    "CSR<dense",
                    "CSR<bits",
                    "CSR<2:4",
                    "tensor",
                ];
                text += &table(&[header.map(str::to_owned)].into_iter().chain(zeros).collect::<Vec<_>>());
                text.push('\n');
            }
        }
        for row in &self.tensors {
            if let Some(note) = row.matrix.as_ref().and_then(|m| m.note.as_ref()) {
                text += &format!("note: {}: {note}\n", printable(&row.name));
            }
        }
        if t.matrices > 0 {
            text += &format!(
                "{}: {} as dense, {} as COO, {} as 2:4{}\n",
                many(t.matrices, "matrix", "matrices"),
                size(t.dense_bytes),
                size(t.coo_bytes),
                size(t.sparse24_bytes),
                // 0 bytes have no share.
                if t.dense_bytes == 0 {
                    String::new()
                } else {
                    format!(" ({:.1} % of dense)", 100.0 * t.sparse24_bytes as f64 / t.dense_bytes as f64)
                }
            );
            text += "kept: share of the sum of |w| that 2:4 at V=1 keeps; K, M, G: binary units\n";
        } else {
            text += "no matrices of f32, f16 or bf16\n";
        }
        text
    }
}

impl Row {
    fn of(source: &Source, item: &Item, in_by_out: bool) -> Result<Self> {
        let at = |e: Error| e.in_tensor(source.path_of(item), &item.name);
        let float = DType::try_from(item.dtype).ok();
        let matrix = match (item.stored, float.filter(|_| item.matrix().is_some())) {
            (Stored::Bitmask | Stored::SparseBitmask, None) if item.spec24().is_none() => {
                // Not a matrix that more is said of, but checked like others that are compressed.
                source.dense(item)?;
                None
            }
            (Stored::Native | Stored::Bitmask | Stored::Cutlass, _) => {
                Some(Facts::of_compressed(source.sparse24_bytes(item)?, item.bytes).map_err(at)?)
            }
            (_, Some(dtype)) if in_by_out => {
                let (m, k, bytes) = source.transposed(item)?;
                let w = Elements::from_bytes(dtype, &bytes).and_then(|elements| Matrix::new(m, k, elements));
                Some(w.and_then(|w| Facts::of_matrix(&w)).map_err(at)?)
            }
            (_, Some(_)) => Some(Facts::of_matrix(&source.matrix(item)?).map_err(at)?),
            (_, None) => None,
        };
        Ok(Self {
            name: item.name.clone(),
            shape: item.shape.clone(),
            dtype: item.dtype.to_string().to_lowercase(),
            stored: item.stored.name(),
            in_by_out,
            bytes: item.bytes,
            matrix,
        })
    }

    /// The row of the table, in the order of its header.
    fn cells(&self) -> [String; 9] {
        let dash = || "—".to_owned();
        let shape: Vec<_> = self.shape.iter().map(ToString::to_string).collect();
        // The shape of a scalar is empty.
        let shape = if shape.is_empty() { dash() } else { shape.join("x") };
        let mut name = printable(&self.name).into_owned();
        if self.in_by_out {
            name += " (in x out)";
        }
        match self.stored {
            "dense" => {}
            "sparse24" => name += " (stored as 2:4)",
            other => name += &format!(" (stored as {other})"),
        }
        let [density, vector, kept, dense, coo, sparse24] = match &self.matrix {
            Some(m) => [
                m.density.map_or_else(dash, percent),
                m.vector.map_or("no".into(), |v| format!("V={v}")),
                m.kept_magnitude.map_or_else(dash, percent),
                short(m.dense_bytes),
                short(m.coo_bytes),
                short(m.sparse24_bytes),
            ],
            None => [dash(), dash(), dash(), short(self.bytes), dash(), dash()],
        };
        [shape, self.dtype.clone(), density, vector, kept, dense, coo, sparse24, name]
    }

    /// The row of the table of zeros, if it has one.
    fn zeros(&self) -> Option<[String; 10]> {
        let matrix = self.matrix.as_ref()?;
        let BreakEven { coo, csr } = matrix.break_even?;
        let share = |share: Option<f64>| share.map_or_else(|| "—".to_owned(), percent);
        let [a, b, c] = [coo.dense, coo.bitmask, coo.sparse24].map(share);
        let [d, e, f] = [csr.dense, csr.bitmask, csr.sparse24].map(share);
        let zeros = percent(1.0 - matrix.density?);
        let name = printable(&self.name).into_owned();
        Some([zeros, short(matrix.csr_bytes), short(matrix.bitmask_bytes), a, b, c, d, e, f, name])
    }
}

impl Facts {
    fn of_matrix(w: &Matrix) -> Result<Self, Error> {
        let mask = Mask::of_nonzeros(w)?;
        let mut facts = Self::sized(w.rows(), w.cols(), w.dtype().bytes(), mask.count());
        facts.vector = Sparse24::vector_len_of(&mask).map(VectorLen::get);
        drop(mask);
        let kept = prune::magnitude(w, VectorLen::ONE).and_then(|kept| prune::kept_magnitude(w, kept.mask()));
        (facts.kept_magnitude, facts.note) = match kept {
            Ok(kept) if kept.is_nan() => (None, Some("the sum of |w| is infinite".into())),
            Ok(kept) => (Some(kept), None),
            // One NaN makes this matrix no candidate for pruning, and the others no less interesting.
            Err(e) if e.is_nan() => (None, Some(e.to_string())),
            Err(e) => return Err(e),
        };
        Ok(facts)
    }

    fn of_compressed(s: Sparse24<Bytes>, bytes: u64) -> Result<Self, Error> {
        let mut facts = Self::sized(s.m(), s.k(), s.values().file_dtype().bitsize() / 8, s.nonzeros()?);
        // The pattern may be shared by more rows than it is stored for.
        facts.vector = Some(s.widest()?.vector().get());
        facts.kept_magnitude = Some(1.0);
        facts.sparse24_bytes = bytes;
        Ok(facts)
    }

    /// What follows from shape, bytes per element and the number of non-zeros. Nothing here can overflow for a matrix
    /// that is in memory; should it, a size too large to be true is shown.
    fn sized(m: usize, k: usize, element: usize, nonzeros: usize) -> Self {
        let product = |factors: &[usize]| factors.iter().fold(1, |p: u64, &f| p.saturating_mul(f as u64));
        let elements = product(&[m, k]);
        let (dense, bits) = (product(&[m, k, element]), product(&[m, k.div_ceil(8)]));
        let sparse24 = product(&[m, 2, k.div_ceil(4), element]).saturating_add(product(&[4, m, k.div_ceil(32)]));
        let starts = product(&[4, m.saturating_add(1)]);
        // Bytes of indices for each non-zero, and besides.
        let shares = |index: u64, more: u64| {
            let from = |bytes: u64, each: u64| {
                // Fewer non-zeros than this, where a form takes `bytes` and each non-zero `each` more than it has
                // there.
                let most = bytes.saturating_sub(more) as f64 / each as f64;
                (most > 0.0 && elements > 0).then(|| (1.0 - most / elements as f64).clamp(0.0, 1.0))
            };
            let all = element as u64 + index;
            Shares { dense: from(dense, all), bitmask: from(bits, index), sparse24: from(sparse24, all) }
        };
        let has_zeros = (nonzeros as u64).saturating_mul(10) <= elements.saturating_mul(9) && elements > 0;
        Self {
            csr_bytes: product(&[nonzeros, element + 4]).saturating_add(starts),
            bitmask_bytes: product(&[nonzeros, element]).saturating_add(bits),
            break_even: has_zeros.then(|| BreakEven { coo: shares(8, 0), csr: shares(4, starts) }),
            nonzeros: nonzeros as u64,
            density: (elements > 0).then(|| nonzeros as f64 / elements as f64),
            vector: None,
            kept_magnitude: None,
            dense_bytes: dense,
            coo_bytes: product(&[nonzeros, element + 4 + 4]),
            sparse24_bytes: sparse24,
            note: None,
        }
    }
}

impl Total {
    fn of(rows: &[Row]) -> Self {
        let mut total = Self { tensors: rows.len(), ..Self::default() };
        for row in rows {
            total.bytes = total.bytes.saturating_add(row.bytes);
            if let Some(m) = &row.matrix {
                total.matrices += 1;
                total.dense_bytes = total.dense_bytes.saturating_add(m.dense_bytes);
                total.coo_bytes = total.coo_bytes.saturating_add(m.coo_bytes);
                total.sparse24_bytes = total.sparse24_bytes.saturating_add(m.sparse24_bytes);
            }
        }
        total
    }
}

/// A number of things.
pub(super) fn many(n: usize, one: &str, more: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { more })
}

/// What names are sorted by: part by part, numbers as numbers, so that layer 10 follows layer 9.
fn by_parts(name: &str) -> impl Iterator<Item = (u64, &str)> {
    name.split('.').map(|part| (part.parse().unwrap_or(u64::MAX), part))
}

/// Columns aligned to the right, the last one, which may be of any length, to the left; a space less between them where
/// the lines would be too wide otherwise.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [_; N] = std::array::from_fn(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0));
    let gap = if widths.iter().sum::<usize>() + 2 * (N - 1) > WIDTH { " " } else { "  " };
    let line = |row: &[String; N]| {
        let cell = |(i, cell): (usize, &String)| match widths[i] {
            _ if i == N - 1 => cell.clone(),
            width => format!("{cell:>width$}{gap}"),
        };
        row.iter().enumerate().map(cell).collect::<String>() + "\n"
    };
    rows.iter().map(line).collect()
}

/// One digit after the point; 100% and 0% are what they say.
fn percent(share: f64) -> String {
    if share == 0.0 || share == 1.0 {
        format!("{}%", 100.0 * share)
    } else {
        format!("{:.1}%", (100.0 * share).clamp(0.1, 99.9))
    }
}

/// [`size`] in five characters at most, such as `44.7M`.
fn short(bytes: u64) -> String {
    let (number, unit) = scaled(bytes);
    number + unit.get(..1).unwrap_or(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_their_width_and_never_round_to_all_or_nothing() {
        let sizes = [0, 1023, 1024, 10 << 10, (1 << 20) - 1, 46_881_792, u64::MAX].map(short);
        assert_eq!(sizes, ["0B", "1023B", "1.00K", "10.0K", "1024K", "44.7M", "16.0E"]);
        assert_eq!([(2 << 30) - 1, 128 << 20, 48_234_496].map(size), ["2 GiB", "128 MiB", "46 MiB"]);
        assert_eq!([0.0, 1e-9, 0.5, 1.0 - 1e-9, 1.0].map(percent), ["0%", "0.1%", "50.0%", "99.9%", "100%"]);
    }
}
