//! `sparse24 devices`: what there is to compute on, what each device offers to the kernels, and how to name it.
//!
//! Invariant: the CPU device is always listed, last; a `device` that is shown opens exactly the entry beside it.

use anyhow::Result;
use serde::Serialize;

use super::args::Json;
use super::{Outcome, size};
use sparse24::engine::{AdapterInfo, Device, DeviceInfo};

const EXAMPLES: &str = "\
Examples:
  sparse24 devices
  sparse24 devices --json devices.json                   # beside the text, for a report of a fault
  sparse24 devices --json | jq -r '.devices[].device'    # what --device takes

`auto` takes the first discrete GPU, else the first integrated one, else the CPU
device. Drivers that compute on the processor, such as llvmpipe and SwiftShader,
are used only when named.";

/// List every adapter and the CPU device: driver, kind, the features that matter here, and which one `auto` takes.
///
/// The schema of the JSON is sparse24-devices/1.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    json: Json,
}

#[derive(Serialize)]
struct Listing {
    schema: &'static str,
    /// The `device` of the entry that `auto` takes.
    auto: Option<String>,
    devices: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    /// What `--device` takes for this entry; none if an earlier one always matches first.
    device: Option<String>,
    name: String,
    /// That of [`sparse24::engine::AdapterKind`], or `cpu`.
    kind: &'static str,
    auto: bool,
    #[serde(flatten)]
    details: Details,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Details {
    Gpu { backend: String, driver: String, features: Features },
    Cpu { simd: &'static str, threads: usize, cache_bytes: u64 },
}

#[derive(Serialize)]
struct Features {
    f16: bool,
    subgroup_min: Option<u32>,
    subgroup_max: Option<u32>,
    cooperative_matrix: Vec<String>,
    /// Lanes of the subgroups that multiply those, where that was tried and came out right.
    cooperative_matrix_lanes: Option<u32>,
    /// Why those are not used.
    cooperative_matrix_refused: Option<String>,
    timestamps: bool,
    workgroup_memory_bytes: u32,
    workgroup_threads: u32,
    grid: u32,
    binding_bytes: u64,
    buffer_bytes: u64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    args.json.file()?;
    let listing = Listing::new()?;
    args.json.emit(&listing.text(), &listing)?;
    Ok(Outcome::Fine)
}

impl Listing {
    fn new() -> Result<Self> {
        let adapters = Device::adapters();
        let auto = Device::auto_adapter();
        // Of two alike, `auto` takes the first.
        let same =
            |a: &AdapterInfo, b: &AdapterInfo| (&a.name, &a.backend, &a.driver) == (&b.name, &b.backend, &b.driver);
        let auto = auto.and_then(|auto| adapters.iter().position(|a| same(a, &auto)));
        let names: Vec<_> = adapters.iter().map(|a| a.name.clone()).collect();
        let gpus = adapters.into_iter().enumerate().map(|(i, adapter)| {
            let device = selector(&names, i);
            // What cooperative matrices are worth is found out when a device is opened.
            let mut caps = adapter.caps.clone();
            match &device {
                _ if caps.cooperative.is_empty() => {}
                None => caps.cooperative_refused = Some("not tried, since the device cannot be named".into()),
                Some(name) => match Device::gpu(name) {
                    Ok(opened) => caps = opened.caps().cloned().unwrap_or(caps),
                    Err(e) => caps.cooperative_refused = Some(e.to_string()),
                },
            }
            Entry::gpu(AdapterInfo { caps, ..adapter }, device, auto == Some(i))
        });
        let mut devices: Vec<_> = gpus.collect();
        devices.push(Entry::cpu(Device::cpu()?.info(), auto.is_none()));
        let auto = devices.iter().find(|d| d.auto).and_then(|d| d.device.clone());
        Ok(Self { schema: "sparse24-devices/1", auto, devices })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for entry in &self.devices {
            text += &format!("{} {}\n", if entry.auto { '*' } else { ' ' }, entry.name);
            for (what, value) in entry.lines() {
                text += &format!("    {what:<18}  {}\n", wrap(&value, 76, 24));
            }
            text.push('\n');
        }
        if self.devices.len() == 1 {
            text += "no GPU: no Vulkan, Metal or DX12 driver offers an adapter\n";
        }
        let taken = self.devices.iter().find(|d| d.auto);
        let reason = match taken.map(|d| d.kind) {
            Some("cpu") if self.devices.len() > 1 => {
                "no discrete or integrated GPU; the adapters above only when named"
            }
            Some("cpu") => "the only device",
            Some(kind) => &format!("the first {kind} GPU"),
            None => "",
        };
        text + &format!("* auto takes {}: {reason}\n", taken.map_or("", |d| &d.name))
    }
}

impl Entry {
    fn gpu(info: AdapterInfo, device: Option<String>, auto: bool) -> Self {
        let caps = info.caps;
        let features = Features {
            f16: caps.f16,
            subgroup_min: caps.subgroups.map(|s| s.0),
            subgroup_max: caps.subgroups.map(|s| s.1),
            cooperative_matrix: caps.cooperative.iter().map(ToString::to_string).collect(),
            cooperative_matrix_lanes: caps.cooperative_lanes,
            cooperative_matrix_refused: caps.cooperative_refused,
            timestamps: caps.timestamps,
            workgroup_memory_bytes: caps.workgroup_memory,
            workgroup_threads: caps.workgroup_threads,
            grid: caps.grid,
            binding_bytes: caps.binding_bytes,
            buffer_bytes: caps.buffer_bytes,
        };
        let details = Details::Gpu { backend: info.backend, driver: info.driver, features };
        Self { device, name: info.name, kind: info.kind.name(), auto, details }
    }

    fn cpu(info: DeviceInfo, auto: bool) -> Self {
        let name = info.name().to_owned();
        let details = match info {
            DeviceInfo::Cpu(cpu) => {
                Details::Cpu { simd: cpu.simd.name(), threads: cpu.threads, cache_bytes: cpu.cache_bytes }
            }
            // Not what `Device::cpu` is; nothing is known of it then.
            DeviceInfo::Gpu(_) => Details::Cpu { simd: "unknown", threads: 0, cache_bytes: 0 },
        };
        Self { device: Some("cpu".into()), name, kind: "cpu", auto, details }
    }

    /// What is printed below the name.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let device = match &self.device {
            Some(device) if device.contains(|c: char| !c.is_alphanumeric()) => format!("\"{device}\""),
            Some(device) => device.clone(),
            None => "cannot be named: an entry above has the same name".into(),
        };
        let mut lines = vec![("--device", device)];
        match &self.details {
            Details::Cpu { simd, threads, cache_bytes } => lines.extend([
                ("kind", "the CPU device: this process, no driver".to_owned()),
                ("SIMD", (*simd).to_owned()),
                ("threads", threads.to_string()),
                ("last-level cache", size(*cache_bytes)),
            ]),
            Details::Gpu { backend, driver, features: f } => {
                let yes = |flag| if flag { "yes" } else { "no" }.to_owned();
                let subgroups = match (f.subgroup_min, f.subgroup_max) {
                    (Some(min), Some(max)) if min == max => max.to_string(),
                    (Some(min), Some(max)) => format!("{min} to {max}"),
                    _ => "no".into(),
                };
                let shapes = match (&f.cooperative_matrix_refused, f.cooperative_matrix_lanes) {
                    _ if f.cooperative_matrix.is_empty() => "no".into(),
                    (Some(why), _) => format!("{}; not used: {why}", f.cooperative_matrix.join(", ")),
                    (None, Some(lanes)) => {
                        format!("{}; tried, in subgroups of {lanes}", f.cooperative_matrix.join(", "))
                    }
                    (None, None) => {
                        format!("{}; not used: no kernel is made for these", f.cooperative_matrix.join(", "))
                    }
                };
                let memory = size(f.workgroup_memory_bytes.into());
                let kind = match self.kind {
                    "software" => "software: a driver that computes on the processor".into(),
                    kind => format!("{kind} GPU"),
                };
                lines.extend([
                    ("kind", kind),
                    ("driver", format!("{backend}: {driver}")),
                    ("f16", yes(f.f16)),
                    ("subgroups", subgroups),
                    ("cooperative matrix", shapes),
                    ("timestamps", yes(f.timestamps)),
                    ("workgroup", format!("{memory} of memory, {} threads", f.workgroup_threads)),
                    ("binding", format!("at most {} (buffer: {})", size(f.binding_bytes), size(f.buffer_bytes))),
                ]);
            }
        }
        lines
    }
}

/// What `--device` takes for the adapter at `index`: the first word of its name that no other name contains, else the
/// whole name, which opens the first adapter that contains it.
fn selector(names: &[String], index: usize) -> Option<String> {
    let lower: Vec<_> = names.iter().map(|name| name.to_lowercase()).collect();
    let matches = |part: &str| {
        let part = part.to_lowercase();
        let reserved = matches!(part.as_str(), "" | "auto" | "cpu");
        lower
            .iter()
            .enumerate()
            .filter(move |(_, name)| !reserved && name.contains(&part))
            .map(|(i, _)| i)
            .collect::<Vec<_>>()
    };
    let name = names.get(index)?;
    // Shorter pieces, such as the R of "Intel(R)", say nothing to a reader.
    let mut words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| word.len() > 2);
    let unique = words.find(|word| matches(word) == [index]);
    unique.or_else(|| (matches(name).first() == Some(&index)).then_some(name)).map(str::to_owned)
}

/// `text` in lines of at most `width` where spaces allow it, all but the first indented.
fn wrap(text: &str, width: usize, indent: usize) -> String {
    let (mut lines, mut column) = (String::new(), 0);
    for word in text.split(' ') {
        if column > 0 && column + 1 + word.len() > width {
            lines += &format!("\n{:indent$}", "");
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines += word;
        column += word.len();
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selectors(names: &[&str]) -> Vec<Option<String>> {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        (0..names.len()).map(|i| selector(&names, i)).collect()
    }

    #[test]
    fn a_selector_opens_its_own_adapter_and_no_other() {
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(selectors(&["llvmpipe (LLVM 15.0.6, 256 bits)"]), [some("llvmpipe")]);
        // No word of the shorter name is its own, so all of it is needed; that works because it comes first.
        let laptop = "NVIDIA GeForce RTX 4090 Laptop";
        assert_eq!(selectors(&["NVIDIA GeForce RTX 4090", laptop]), [some("NVIDIA GeForce RTX 4090"), some("Laptop")]);
        assert_eq!(selectors(&[laptop, "NVIDIA GeForce RTX 4090"]), [some("Laptop"), None]);
        // Two of a kind: only the first can be had. Reserved words and scraps are no names.
        assert_eq!(selectors(&["NVIDIA H200", "NVIDIA H200"]), [some("NVIDIA H200"), None]);
        assert_eq!(selectors(&["CPU (R) Device"]), [some("Device")]);
        assert_eq!(selectors(&["cpu"]), [None]);
    }

    #[test]
    fn long_values_wrap_below_themselves() {
        assert_eq!(wrap("16x16x16 f16->f16, 16x16x16 f16->f32", 20, 2), "16x16x16 f16->f16,\n  16x16x16 f16->f32");
        assert_eq!(wrap("", 20, 2), "");
    }
}
