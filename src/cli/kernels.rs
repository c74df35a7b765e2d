//! `sparse24 kernels`: which GPU kernels there are, their WGSL and SPIR-V, and what a driver's compiler makes of them.
//!
//! Invariant: nothing is run on a device here, and every figure says so.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::args::ensure_usage;
use super::command::command_line;
use super::output::Output;
use super::{Outcome, progress, say, writable};
use sparse24::compile::{self, Compiled, Compiler, DEPTHS, Module, Ratio};
use sparse24::error::printable;
use sparse24::io::write_atomically;
use sparse24::kernels::{Architecture, Program};
use sparse24::report::sheet::{Printout, Sheet, Shown};
use sparse24::report::{commit, plural};

/// List the GPU kernels, write their WGSL and SPIR-V, or see what a driver's compiler makes of them.
///
/// With --compile every kernel that the device can run is compiled by its Vulkan driver, and described: registers,
/// spills to memory, threads that fit a core at once, and where the driver gives its machine code (Mesa's do), the
/// instructions of 16 k and a static estimate of their cycles: the larger of issue and workgroup-memory passes. Nothing
/// is run, so that Mesa's pretended devices do as well as real ones. With --module the same is said of anyone's compute
/// shaders, but for estimates: nobody knows how often their loops run, which are all in the JSON. The schema of the
/// JSON is sparse24-compile/1, and without --compile sparse24-kernels/1.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 kernels                                    # one kernel of each shader text
  sparse24 kernels v32-128x128 --dump wgsl            # WGSL and SPIR-V of those with this name part
  sparse24 kernels --compile --json compiled.json     # by the first Vulkan driver that tells
  sparse24 kernels dense,v32 --compile --device Radeon --dump code    # its machine code, too
  sparse24 kernels --compile --module mine.spv        # your own shader instead
  sparse24 kernels dense-f32f32-64x64 --compile --module *.spv    # beside one of these

Drivers that compute on the processor, such as llvmpipe and SwiftShader, do not tell what they compile.
Mesa's driver for Apple's GPUs prints its machine code only where AGX_MESA_DEBUG=shaders is set.
A driver takes a module for valid, and may crash if it is not: ask spirv-val first.
Exit code 3: the driver refused a kernel, spilled registers to memory, or leaves a core fewer threads
than the kernel's header states.")]
pub(crate) struct Args {
    /// Parts of names: kernels that have one of them. [default: all]
    #[arg(value_name = "PART,...", value_delimiter = ',')]
    parts: Vec<String>,
    /// Every form, epilogue and output type, not one kernel of each text.
    #[arg(long)]
    all: bool,
    /// Write NAME.wgsl and NAME.spv to this folder, and with --compile what the driver makes of them.
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// Compile them by a Vulkan driver.
    #[arg(long)]
    compile: bool,
    /// Part of a Vulkan device's name. [default: the first one]
    #[arg(long, value_name = "NAME", requires = "compile")]
    device: Option<String>,
    /// Whose rates estimates are by, where the device's name does not tell: rdna2, rdna3, rdna4, ampere (GA100, the
    /// A100 alone), ada, apple-m1, adreno.
    #[arg(long, value_name = "NAME", requires = "compile", value_parser = architecture)]
    architecture: Option<Architecture>,
    /// SPIR-V of compute shaders that use buffers and no images: compiled instead of kernels, or beside those that
    /// PARTs name. Specialisation constants keep the values that it gives them.
    #[arg(long, value_name = "FILE.spv", requires = "compile", num_args = 1..)]
    module: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
}

pub(super) fn architecture(name: &str) -> std::result::Result<Architecture, String> {
    Architecture::named(name).ok_or_else(|| {
        let names: Vec<_> = Architecture::ALL.iter().map(|a| a.name()).collect();
        format!("it is one of {}", names.join(", "))
    })
}

/// What is written as JSON.
#[derive(Serialize)]
struct Run {
    schema: &'static str,
    program: &'static str,
    version: &'static str,
    commit: Option<String>,
    date: String,
    command: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceRecord>,
    kernels: Vec<Entry>,
    /// What kernels need that the device lacks, and how many.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    lacking: BTreeMap<String, usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ratios: Vec<Ratio>,
}

#[derive(Serialize)]
struct DeviceRecord {
    name: String,
    driver: String,
    /// Whose rates the estimates are by.
    architecture: Option<&'static str>,
    /// What is taken for granted where nobody documents it.
    assumed: String,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Entry {
    Listed { kernel: String },
    Compiled(Box<Compiled>),
}

/// A line of the table and of the CSV. Estimates are for the largest k.
#[derive(Serialize)]
struct Row {
    kernel: String,
    refused: Option<String>,
    subgroup: Option<u32>,
    threads: u32,
    workgroup_bytes: u32,
    registers: Option<f64>,
    spills: Option<f64>,
    resident_threads: Option<f64>,
    stated_threads: Option<u32>,
    step_instructions: Option<f64>,
    step_multiply_adds: Option<f64>,
    step_shared: Option<f64>,
    k: Option<usize>,
    step_issue: Option<f64>,
    step_passes: Option<f64>,
    prologue_issue: Option<f64>,
    prologue_passes: Option<f64>,
    cycles_per_output: Option<f64>,
    of_dense: Option<f64>,
    note: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    args.output.check()?;
    let programs = args.programs();
    let modules = args.modules()?;
    ensure_usage!(!programs.is_empty() || !modules.is_empty(), "no kernel has {} in its name", args.parts.join(" or "));
    for part in args.parts.iter().filter(|part| !programs.iter().any(|p| p.to_string().contains(part.as_str()))) {
        say(&format!("no kernel has {part} in its name"));
    }
    let compiler = args.compile.then(|| Compiler::open(args.device.as_deref())).transpose()?;
    if let Some(dir) = &args.dump {
        std::fs::create_dir_all(dir).with_context(|| format!("--dump {}", dir.display()))?;
    }
    match &compiler {
        None => args.list(&programs),
        Some(compiler) => args.compiled(compiler, programs, &modules),
    }
}

impl Args {
    fn programs(&self) -> Vec<Program> {
        if self.parts.is_empty() && !self.module.is_empty() {
            return Vec::new();
        }
        let all: Vec<Program> = match self.all {
            true => compile::every_program().collect(),
            false => compile::programs().collect(),
        };
        let wanted = |name: &str| self.parts.is_empty() || self.parts.iter().any(|part| name.contains(part.as_str()));
        all.into_iter().filter(|program| wanted(&program.to_string())).collect()
    }

    /// The modules by the names of their files.
    fn modules(&self) -> Result<BTreeMap<String, Module>> {
        let mut modules = BTreeMap::new();
        for path in &self.module {
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
            let name = printable(&name).into_owned();
            let module = Module::open(path)?;
            ensure_usage!(modules.insert(name.clone(), module).is_none(), "--module: two files are called {name}");
        }
        Ok(modules)
    }

    fn run_of(&self, schema: &'static str, device: Option<DeviceRecord>, kernels: Vec<Entry>) -> Run {
        Run {
            schema,
            program: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            date: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
            command: command_line(),
            device,
            kernels,
            lacking: BTreeMap::new(),
            ratios: Vec::new(),
        }
    }

    fn list(&self, programs: &[Program]) -> Result<Outcome> {
        for program in programs {
            self.dump(program, (1, 3))?;
        }
        let names: Vec<String> = programs.iter().map(ToString::to_string).collect();
        let mut sheet = Sheet::new("").words("kernel", Shown::Always);
        names.iter().for_each(|name| sheet.push("", [name.clone()]));
        let page = Printout {
            head: vec![plural(names.len(), "kernel")],
            sheet,
            notes: Vec::new(),
            wide_notes: Vec::new(),
            legend: vec!["kernel: operation, storage and accumulation type, V, schedule and tile, epilogue.".into()],
            source: String::new(),
        };
        let rows: Vec<Entry> = names.into_iter().map(|kernel| Entry::Listed { kernel }).collect();
        let run = self.run_of("sparse24-kernels/1", None, rows);
        self.output.emit(&run, &run.kernels, &page)?;
        Ok(Outcome::Fine)
    }

    fn compiled(
        &self,
        compiler: &Compiler,
        programs: Vec<Program>,
        modules: &BTreeMap<String, Module>,
    ) -> Result<Outcome> {
        let known = Architecture::of(compiler.name());
        if let (Some(asked), Some(known)) = (self.architecture, known) {
            ensure_usage!(asked == known, "--architecture {asked}: {} is of {known}", compiler.name());
        }
        let architecture = self.architecture.or(known);
        let mut lacking: BTreeMap<String, usize> = BTreeMap::new();
        let mut programs = programs;
        programs.retain(|program| match program.supported_by(compiler.caps()) {
            Ok(()) => true,
            Err(lack) => {
                *lacking.entry(lack).or_default() += 1;
                false
            }
        });
        let lacks: Vec<_> =
            lacking.iter().map(|(lack, count)| format!("{} need {lack}", plural(*count, "kernel"))).collect();
        if programs.is_empty() && modules.is_empty() {
            bail!("{} can run none of these: {}", compiler.name(), lacks.join("; "));
        }
        let bar = progress(programs.len() + modules.len());
        let mut all = Vec::with_capacity(programs.len() + modules.len());
        for program in &programs {
            bar.set_message(program.to_string());
            let mut compiled = compiler.compile(program, architecture);
            self.dump(program, compiler.vulkan())?;
            self.dump_code(&mut compiled)?;
            all.push(compiled);
            bar.inc(1);
        }
        for (name, module) in modules {
            bar.set_message(name.clone());
            for mut compiled in compiled_module(compiler, name, module) {
                self.dump_code(&mut compiled)?;
                all.push(compiled);
            }
            bar.inc(1);
        }
        bar.finish_and_clear();

        let ratios = compile::ratios(&all);
        let assumed = architecture.map_or_else(String::new, Architecture::assumed_of_all);
        let device = DeviceRecord {
            name: compiler.name().to_owned(),
            driver: compiler.driver().to_owned(),
            architecture: architecture.map(Architecture::name),
            assumed,
        };
        let rows: Vec<Row> = all.iter().map(|compiled| Row::new(compiled, &ratios)).collect();
        let page = page(&device, &rows, &all, lacks);
        let failed = all.iter().any(Compiled::failed);
        let entries = all.into_iter().map(|compiled| Entry::Compiled(Box::new(compiled))).collect();
        let run = Run { ratios, lacking, ..self.run_of("sparse24-compile/1", Some(device), entries) };
        self.output.emit(&run, &rows, &page)?;
        if failed {
            say("a kernel was refused, spills registers, or leaves a core fewer threads than its header states");
        }
        Ok(if failed { Outcome::VerificationFailed } else { Outcome::Fine })
    }

    /// Writes a program's texts, if that was asked for.
    fn dump(&self, program: &Program, vulkan: (u32, u32)) -> Result<()> {
        if self.dump.is_none() {
            return Ok(());
        }
        self.write(&format!("{program}.wgsl"), program.source()?.as_bytes())?;
        let words = compile::spirv(program, vulkan)?;
        self.write(&format!("{program}.spv"), bytemuck::cast_slice(&words))
    }

    /// Writes what the driver gave of its representations, if that was asked for.
    fn dump_code(&self, compiled: &mut Compiled) -> Result<()> {
        for (name, text) in std::mem::take(&mut compiled.representations) {
            let name = format!("{}.{name}.txt", compiled.kernel).replace([' ', '/', '(', ')', ':'], "_");
            self.write(&name, text.as_bytes())?;
        }
        Ok(())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(dir) = &self.dump else { return Ok(()) };
        let path = writable(&dir.join(name))?;
        Ok(write_atomically(path, |file| std::io::Write::write_all(file, bytes))?)
    }
}

/// What a driver made of a module's shaders.
#[allow(unsafe_code, reason = "the file is the user's")]
fn compiled_module(compiler: &Compiler, name: &str, module: &Module) -> Vec<Compiled> {
    // SAFETY: the user chose the file, and --help says that it must be valid. Gain: shaders of others are described.
    unsafe { compiler.compile_module(name, module) }
}

impl Row {
    fn new(compiled: &Compiled, ratios: &[Ratio]) -> Self {
        let deepest = DEPTHS.into_iter().max();
        let ratio = ratios.iter().find(|r| r.kernel == compiled.kernel && Some(r.k) == deepest);
        let estimate = compiled.estimates.iter().find(|e| Some(e.k) == deepest);
        Self {
            kernel: compiled.kernel.clone(),
            refused: compiled.refused.clone(),
            subgroup: compiled.subgroup,
            threads: compiled.threads,
            workgroup_bytes: compiled.workgroup_bytes,
            registers: compiled.registers,
            spills: compiled.spills,
            resident_threads: compiled.resident_threads,
            stated_threads: compiled.stated_threads,
            step_instructions: compiled.code.map(|code| code.step.instructions),
            step_multiply_adds: compiled.code.map(|code| code.step.multiply_adds),
            step_shared: compiled.code.map(|code| code.step.shared),
            k: estimate.map(|e| e.k),
            step_issue: estimate.map(|e| e.step_issue),
            step_passes: estimate.map(|e| e.step_passes),
            prologue_issue: estimate.map(|e| e.prologue_issue),
            prologue_passes: estimate.map(|e| e.prologue_passes),
            cycles_per_output: estimate.map(|e| e.cycles_per_output),
            of_dense: ratio.and_then(|r| r.same.as_ref()).map(|(_, ratio)| *ratio),
            note: compiled.note.clone(),
        }
    }

    /// Multiply-adds per instruction of a step.
    fn share(&self) -> Option<f64> {
        let instructions = self.step_instructions.filter(|&instructions| instructions > 0.0)?;
        Some(self.step_multiply_adds? / instructions)
    }
}

fn page(device: &DeviceRecord, rows: &[Row], all: &[Compiled], lacks: Vec<String>) -> Printout {
    // Of zero there is no negative one.
    let number = |value: Option<f64>, decimals: usize| value.map_or("-".into(), |v| format!("{:.decimals$}", v + 0.0));
    let whole = |value: Option<u32>| value.map_or("-".into(), |v| v.to_string());
    // Of a module these are all that is told.
    let (steps, cycles) = match all.iter().any(|c| !c.loops.is_empty()) {
        true => (Shown::Always, Shown::Wide),
        false => (Shown::Wide, Shown::Always),
    };
    let mut sheet = Sheet::new("")
        .words("kernel", Shown::Always)
        .numbers("lanes", Shown::Wide)
        .numbers("threads", Shown::Wide)
        .numbers("bytes", Shown::Wide)
        .numbers("regs", Shown::Always)
        .numbers("spills", Shown::Always)
        .numbers("fit", Shown::Always)
        .numbers("step", steps)
        .numbers("FMA", steps)
        .numbers("share", steps)
        .numbers("shared", steps)
        .numbers("issue", Shown::Wide)
        .numbers("passes", Shown::Wide)
        .numbers("cycles", cycles)
        .numbers("/dense", cycles)
        .words("note", Shown::Wide);
    for row in rows {
        sheet.push(
            "",
            [
                row.kernel.trim_start_matches("gemm_").to_owned(),
                whole(row.subgroup),
                row.threads.to_string(),
                row.workgroup_bytes.to_string(),
                number(row.registers, 0),
                number(row.spills, 0),
                number(row.resident_threads, 0),
                number(row.step_instructions, 0),
                number(row.step_multiply_adds, 0),
                row.share().map_or("-".into(), |share| format!("{:.0} %", 100.0 * share)),
                number(row.step_shared, 0),
                number(row.step_issue, 0),
                number(row.step_passes, 0),
                number(row.cycles_per_output, 2),
                number(row.of_dense, 2),
                row.refused.clone().or_else(|| row.note.clone()).unwrap_or_default(),
            ],
        );
    }
    let names = |wanted: &dyn Fn(&Compiled) -> bool| -> Vec<&str> {
        all.iter().filter(|c| wanted(c)).map(|c| c.kernel.as_str()).collect()
    };
    let refused = names(&|c| c.refused.is_some());
    let spilled = names(&|c| c.spills.is_some_and(|s| s > 0.0));
    let mut notes = vec![format!(
        "{} compiled, {} refused, {} with spills to memory.",
        plural(all.len() - refused.len(), "kernel"),
        refused.len(),
        spilled.len()
    )];
    let fewer = names(&Compiled::fits_fewer);
    for (what, names) in [("refused", refused), ("spills", spilled), ("fewer threads than the header states", fewer)] {
        if !names.is_empty() {
            notes.push(format!("{what}: {}", names.join(", ")));
        }
    }
    if !lacks.is_empty() {
        notes.push(format!("The device lacks something: {}.", lacks.join("; ")));
    }
    if all.iter().any(|c| c.refused.is_none() && c.spills.is_none()) {
        notes
            .push("The driver does not tell what it spills; all that it tells is in the JSON, as `statistics`.".into());
    }
    let mut reasons: Vec<&str> = all.iter().filter_map(|c| c.note.as_deref()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    if let [reason, others @ ..] = &reasons[..] {
        let more = if others.is_empty() { String::new() } else { format!(" (and {} more, see --wide)", others.len()) };
        notes.push(format!("No estimate for some: {reason}{more}."));
    }
    if rows
        .iter()
        .any(|row| row.cycles_per_output.is_some() && row.of_dense.is_none() && !row.kernel.contains("_dense"))
    {
        notes.push(
            "/dense needs the dense kernel of the same tile and type beside it: add its part, or leave all out.".into(),
        );
    }
    notes.push(
        "Static: nothing was run or timed. A GEMV waits for the bytes of its weights, which are not in it.".into(),
    );
    let rates = device
        .architecture
        .map_or_else(|| "unknown: name it by --architecture for estimates (see --help)".into(), str::to_owned);
    let assumed = if device.assumed.is_empty() { String::new() } else { format!("; assumed: {}", device.assumed) };
    Printout {
        head: vec![
            format!("{}, {}", printable(&device.name), printable(&device.driver)),
            format!("architecture {rates}{assumed}"),
        ],
        sheet,
        notes,
        wide_notes: Vec::new(),
        legend: vec![
            "kernel: without the gemm_ that names of GEMMs begin with.".into(),
            "regs: 32-bit registers of a lane. spills: registers or instructions that go to memory. fit: threads that a \
             core holds at once, by the driver."
                .into(),
            "step: instructions of 16 k; without an estimate, and of a module, of one round of the loop with the most \
             multiply-adds. FMA: multiply-adds per lane in it (cooperative matrices have none); share: of its \
             instructions. shared: its reads and writes of workgroup memory."
                .into(),
            "issue, passes: cycles of a core for 16 k of a workgroup, by its schedulers and by its workgroup memory; \
             the larger counts."
                .into(),
            "cycles: of a core for each output at k = 4096. /dense: the cycles of the dense kernel of the same tile \
             over these; above 1 this one is faster."
                .into(),
        ],
        source: format!("sparse24 {}", env!("CARGO_PKG_VERSION")),
    }
}
