//! What compilers make of the kernels: static figures read off machine code, never times.

use super::paths::shown;
use super::{PageInput, Section, Table};
use crate::report::file::{Compile, File};

/// The fastest schedule of one operation, vector length, type and k.
struct Best<'a> {
    what: String,
    storage: &'a str,
    k: usize,
    ratio: f64,
    kernel: &'a str,
    dense: &'a str,
}

pub(super) fn compilers(inputs: &[PageInput]) -> Option<Section> {
    let files: Vec<_> = inputs
        .iter()
        .filter_map(|input| match &input.file {
            File::Compile(compile) => Some((input, compile)),
            _ => None,
        })
        .collect();
    if files.is_empty() {
        return None;
    }
    let mut section = Section {
        id: "compilers".into(),
        title: "What compilers make of it (static, not timed)".into(),
        text: vec![
            "Nothing here was run: a driver compiled each kernel, perhaps for a device that it was only made to \
             see, and the figures are read off its machine code. An estimate is prologue + trips x step, a step \
             the larger of instruction issue by the architecture's rates and of workgroup-memory passes by its \
             banks; it knows no latencies, no caches and not the bytes that come from memory, which kernels for \
             few tokens wait for. Mesa's compilers are not NVIDIA's own nor Apple's. A ratio is the cycles per \
             output of the fastest dense kernel over those of the kernel named, the fastest of its operation by \
             the same estimate; kernels for few tokens stand apart."
                .into(),
        ],
        ..Section::default()
    };
    for (input, compile) in files {
        let Compile { device, kernels, .. } = compile;
        let file = match &input.machine {
            Some(machine) => format!("{machine} ({})", shown(&input.name)),
            None => shown(&input.name),
        };
        let refused = kernels.iter().filter(|k| k.refused.is_some()).count();
        let spilled = kernels.iter().filter(|k| k.spills.is_some_and(|s| s > 0.0)).count();
        let name = if device.name.is_empty() { "a device without a name" } else { &device.name };
        let rates = device.architecture.as_deref().unwrap_or("unknown");
        let assumed = match device.assumed.as_str() {
            "" => String::new(),
            assumed => format!(" Assumed, since nobody documents it: {assumed}."),
        };
        section.text.push(format!(
            "{file}: {name}, {}; rates of {rates}; {} kernels compiled, {refused} refused, {spilled} with spills to \
             memory.{assumed}",
            device.driver,
            kernels.len() - refused
        ));
        let title = format!("{file}: {name}, {}", device.driver);
        let head = ["op", "dtype", "#k", "#static ratio to dense", "kernel", "dense kernel"];
        let mut table = Table::new(title, false, &head);
        table.rows.extend(best(compile).into_iter().map(|b| {
            vec![
                b.what,
                b.storage.to_owned(),
                b.k.to_string(),
                format!("{:.2}", b.ratio),
                b.kernel.to_owned(),
                b.dense.to_owned(),
            ]
        }));
        if !table.rows.is_empty() {
            section.tables.push(table);
        }
    }
    Some(section)
}

/// The fastest kernel of each operation, type and k by the estimate, those for few tokens apart.
fn best(compile: &Compile) -> Vec<Best<'_>> {
    let mut all: Vec<Best<'_>> = Vec::new();
    for ratio in &compile.ratios {
        let Some((dense, value)) = &ratio.best else { continue };
        // Such as gemm_sparse24-f16f32-v32-128x128x16-none.
        let mut parts = ratio.kernel.split('-');
        let op = parts.next().unwrap_or_default().trim_start_matches("gemm_");
        let storage = parts.next().and_then(|types| types.get(..3)).unwrap_or_default();
        let vector = parts.clone().next().filter(|p| p.starts_with('v') && p[1..].parse::<u32>().is_ok());
        let few = ratio.kernel.split("-gemv_32x").nth(1).and_then(|rest| rest.split('_').next());
        let mut what = op.to_owned();
        if let Some(vector) = vector {
            what += &format!(" V={}", &vector[1..]);
        }
        if let Some(tokens) = few {
            what += &format!(", {tokens} token{}", if tokens == "1" { "" } else { "s" });
        }
        let this = Best { what, storage, k: ratio.k, ratio: *value, kernel: &ratio.kernel, dense };
        let known = all.iter_mut().find(|b| (&b.what, b.storage, b.k) == (&this.what, this.storage, this.k));
        match known {
            Some(known) if known.ratio < this.ratio => *known = this,
            Some(_) => {}
            None => all.push(this),
        }
    }
    all
}
