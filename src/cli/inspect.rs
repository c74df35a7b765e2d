//! `sparse24 inspect`: what is in a safetensors file, and what 2:4 would make of it.
//!
//! Tensors are read one at a time, so memory stays near the largest one, and nothing is printed before all were read: a
//! file that turns out to be broken gives an error and no half of a listing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::{Outcome, print, print_json, progress, scaled, size};
use sparse24::error::Error;
use sparse24::format::Sparse24;
use sparse24::io::{Dtype, TensorFile, TensorInfo};
use sparse24::mask::{Mask, VectorLen};
use sparse24::matrix::Matrix;
use sparse24::prune;

const EXAMPLES: &str = "\
Examples:
  sparse24 inspect model.safetensors
  # the tensors that are 2:4 already
  sparse24 inspect model.safetensors --json | jq '.tensors[] | select(.matrix.vector)'

Columns:
  density  share of elements that are not zero (-0.0 is zero)
  2:4?     no, or the most rows V of which each block can share its patterns
  kept     share of the sum of |w| that 2:4 at V=1 keeps: the two largest of four
  dense    bytes of all elements
  COO      bytes of value, row and column (4 bytes each) of every non-zero
  2:4      bytes of values and metadata, pruned to 2:4 at V=1; what a matrix that
           is stored as 2:4 takes

A matrix is a tensor of two dimensions and type f32, f16 or bf16; of others, shape,
type and bytes are listed. A matrix that is stored in sparse24's own format is
checked throughout, and an illegal one is an error.";

/// The widest line that is laid out generously.
const WIDTH: usize = 100;

/// List a safetensors file's tensors: density, whether they are 2:4, what 2:4 would keep, and bytes in each form.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file to read.
    #[arg(value_name = "FILE.safetensors")]
    file: PathBuf,
    /// Print JSON (schema sparse24-inspect/1) instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listing {
    schema: &'static str,
    file: String,
    tensors: Vec<Row>,
    total: Total,
}

/// One tensor, or one matrix in the compressed format, which is two.
#[derive(Serialize)]
struct Row {
    name: String,
    shape: Vec<usize>,
    dtype: String,
    /// `dense` or `sparse24`.
    stored: &'static str,
    /// What it takes in the file.
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
    sparse24_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
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
    let listing = Listing::read(&TensorFile::open(&args.file)?)?;
    if args.json {
        print_json(&listing)?
    } else {
        print(&listing.text())?
    }
    Ok(Outcome::Fine)
}

impl Listing {
    fn read(file: &TensorFile) -> Result<Self> {
        // The two tensors of a compressed matrix give way to one row.
        let mut tensors: BTreeMap<&str, _> = file.tensors().map(|info| (info.name.as_str(), info)).collect();
        let compressed = file.sparse24_names()?;
        for name in &compressed {
            for part in ["values", "meta"] {
                tensors.remove(format!("{name}.{part}").as_str());
            }
        }
        let bar = progress(tensors.len() + compressed.len());
        let mut rows = Vec::new();
        for info in tensors.into_values() {
            bar.set_message(printable(&info.name));
            rows.push(Row::of_tensor(file, info)?);
            bar.inc(1);
        }
        for name in &compressed {
            bar.set_message(printable(name));
            rows.push(Row::of_sparse24(name, &file.sparse24(name)?));
            bar.inc(1);
        }
        bar.finish_and_clear();
        rows.sort_by(|a, b| by_parts(&a.name).cmp(by_parts(&b.name)));
        let total = Total::of(&rows);
        Ok(Self { schema: "sparse24-inspect/1", file: file.path().display().to_string(), tensors: rows, total })
    }

    fn text(&self) -> String {
        let t = &self.total;
        let many = |n: usize, one: &str, more: &str| format!("{n} {}", if n == 1 { one } else { more });
        let mut text = format!("{}: {}, {}\n", self.file, many(t.tensors, "tensor", "tensors"), size(t.bytes));
        if !self.tensors.is_empty() {
            text.push('\n');
            let header = ["shape", "type", "density", "2:4?", "kept", "dense", "COO", "2:4", "tensor"];
            let cells: Vec<_> =
                [header.map(str::to_owned)].into_iter().chain(self.tensors.iter().map(Row::cells)).collect();
            text += &table(&cells);
            text.push('\n');
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
    fn of_tensor(file: &TensorFile, info: &TensorInfo) -> Result<Self> {
        let float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let matrix = match info.shape[..] {
            [_, _] if float => {
                let facts = file
                    .matrix(&info.name)
                    .and_then(|w| Facts::of_matrix(&w).map_err(|e| e.in_tensor(file.path(), &info.name)));
                Some(facts?)
            }
            _ => None,
        };
        Ok(Self {
            name: info.name.clone(),
            shape: info.shape.clone(),
            dtype: info.dtype.to_string().to_lowercase(),
            stored: "dense",
            bytes: info.bytes as u64,
            matrix,
        })
    }

    fn of_sparse24(name: &str, s: &Sparse24) -> Self {
        let nonzeros = s.values().to_f32().iter().filter(|&&x| x != 0.0).count();
        let mut facts = Facts::sized(s.m(), s.k(), s.dtype().bytes(), nonzeros);
        // The pattern may be shared by more rows than it is stored for.
        let shared = s.mask().ok().and_then(|m| Sparse24::vector_len_of(m.mask()));
        facts.vector = Some(shared.unwrap_or(s.vector()).get());
        facts.kept_magnitude = Some(1.0);
        facts.sparse24_bytes = s.bytes() as u64;
        Self {
            name: name.to_owned(),
            shape: vec![s.m(), s.k()],
            dtype: s.dtype().to_string(),
            stored: "sparse24",
            bytes: s.bytes() as u64,
            matrix: Some(facts),
        }
    }

    /// The row of the table, in the order of its header.
    fn cells(&self) -> [String; 9] {
        let dash = || "—".to_owned();
        let shape: Vec<_> = self.shape.iter().map(ToString::to_string).collect();
        // The shape of a scalar is empty.
        let shape = if shape.is_empty() { dash() } else { shape.join("x") };
        let mut name = printable(&self.name);
        if self.stored == "sparse24" {
            name += " (stored as 2:4)";
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
            Err(e @ Error::Nan { .. }) => (None, Some(e.to_string())),
            Err(e) => return Err(e),
        };
        Ok(facts)
    }

    /// What follows from shape, bytes per element and the number of non-zeros. Nothing here can overflow for a matrix
    /// that is in memory; should it, a size too large to be true is shown.
    fn sized(m: usize, k: usize, element: usize, nonzeros: usize) -> Self {
        let product = |factors: &[usize]| factors.iter().fold(1, |p: u64, &f| p.saturating_mul(f as u64));
        let elements = product(&[m, k]);
        Self {
            nonzeros: nonzeros as u64,
            density: (elements > 0).then(|| nonzeros as f64 / elements as f64),
            vector: None,
            kept_magnitude: None,
            dense_bytes: product(&[m, k, element]),
            coo_bytes: product(&[nonzeros, element + 4 + 4]),
            sparse24_bytes: product(&[m, 2, k.div_ceil(4), element]).saturating_add(product(&[4, m, k.div_ceil(32)])),
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

/// A name from a file as it can be shown on a terminal: without line breaks and escape sequences.
fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
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
