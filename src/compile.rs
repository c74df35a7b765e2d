//! What GPU compilers make of the kernels, found without running them: registers, spills, occupancy, machine code, and
//! a static estimate.
//!
//! ```text
//!  Program ── naga, wgpu's options ──► SPIR-V                      spirv
//!  anyone's shader ── its words ──► entry points, bindings         reflect
//!                                        │  a Vulkan driver        vulkan: on a real device or a pretended one
//!                                        ▼
//!                  statistics, machine code ─► classes, loops      isa: four dialects
//!                                                  │  rates        architecture
//!                                                  ▼
//!  Kernel ── executed lane by lane ──► accesses ──► prologue + trips x step      estimate
//!             trace                     banks
//! ```
//! A driver compiles for its GPU whether or not there is one: Mesa's open on a pretended device. What they say of
//! registers and spills is fact for that compiler version. They are not NVIDIA's own compiler nor Apple's Metal, and
//! the estimate is static: it knows no latencies and no caches, and nothing here was timed. Say so beside every figure.
//!
//! Invariant: what a driver refuses, and what is not understood of its code, is in the record with its reason.

mod architecture;
pub mod banks;
mod estimate;
mod isa;
mod reflect;
mod spirv;
pub mod trace;
mod vulkan;

use serde::Serialize;

pub use reflect::Module;
pub(crate) use spirv::module;
pub use spirv::spirv;
pub use vulkan::Compiler;

use crate::error::Result;
use crate::kernels::{Architecture, Kernel, Program, Schedule};
use crate::problem::Op;
use estimate::Cost;
use isa::{Counts, Loop};
use vulkan::Executable;

/// Input features that estimates are made for: BERT-base's and a large language model's.
pub const DEPTHS: [usize; 2] = [768, 4096];

/// What a driver made of one program.
#[derive(Clone, Debug, Serialize)]
pub struct Compiled {
    /// The program.
    pub kernel: String,
    /// Why the driver did not compile it; then all else is absent.
    pub refused: Option<String>,
    /// Lanes of a subgroup.
    pub subgroup: Option<u32>,
    /// Invocations of a workgroup.
    pub threads: u32,
    /// Bytes of workgroup memory, as the shader declares them.
    pub workgroup_bytes: u32,
    /// 32-bit registers of a lane.
    pub registers: Option<f64>,
    /// Registers kept in memory, or instructions that move them there: 0 where none are.
    pub spills: Option<f64>,
    /// Invocations that a core holds at once, by the driver's statistics.
    pub resident_threads: Option<f64>,
    /// What the shader's header states of that for the architecture: it should be no less.
    pub stated_threads: Option<u32>,
    /// The driver's own statistics, by its own names.
    pub statistics: Vec<(String, f64)>,
    /// What the machine code consists of, where the driver gives it.
    pub code: Option<CodeSummary>,
    /// Of a [`Module`], whose rounds nobody knows: its loops in the order of the code.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub loops: Vec<LoopMix>,
    /// Why there is no `code`, or no estimate.
    pub note: Option<String>,
    /// For GEMMs whose machine code is understood, on an architecture whose rates are known.
    pub estimates: Vec<StaticEstimate>,
    /// The representations that the driver gives, by their names; not in the record.
    #[serde(skip)]
    pub representations: Vec<(String, String)>,
    #[serde(skip)]
    program: Option<Program>,
}

/// Instructions of machine code. Of a GEMM with an estimate the step is what 16 k take; else it is one round of the
/// loop with the most multiply-adds, and what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CodeSummary {
    /// The step.
    pub step: Mix,
    /// All else.
    pub prologue: Mix,
}

/// What instructions do, per lane; sides of an `if` with `else` count half.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mix {
    /// All but waits and hints.
    pub instructions: f64,
    /// Multiply-adds of a lane.
    pub multiply_adds: f64,
    /// Multiply-adds of cooperative matrices, of a subgroup.
    pub matrix: f64,
    /// Reads and writes of workgroup memory.
    pub shared: f64,
}

/// A loop of machine code, without the loops in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LoopMix {
    /// Loops around it, and itself: 1 for an outermost one.
    pub depth: usize,
    /// One round.
    #[serde(flatten)]
    pub mix: Mix,
}

/// The static estimate of a GEMM over one k: prologue + trips x step, each the larger of issue and passes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StaticEstimate {
    /// Input features.
    pub k: usize,
    /// Steps of 16 k.
    pub trips: f64,
    /// Cycles of a core's schedulers for one step, per workgroup.
    pub step_issue: f64,
    /// Cycles of its workgroup memory.
    pub step_passes: f64,
    /// The same for all else.
    pub prologue_issue: f64,
    /// The same for all else.
    pub prologue_passes: f64,
    /// Cycles of a core for each output.
    pub cycles_per_output: f64,
}

impl StaticEstimate {
    fn new(cost: &Cost, k: usize) -> Self {
        Self {
            k,
            trips: cost.trips(k),
            step_issue: cost.step.issue,
            step_passes: cost.step.passes,
            prologue_issue: cost.prologue.issue,
            prologue_passes: cost.prologue.passes,
            cycles_per_output: cost.cycles_per_output(k),
        }
    }
}

impl From<&Counts> for Mix {
    fn from(counts: &Counts) -> Self {
        Self {
            instructions: counts.instructions(),
            multiply_adds: counts.multiply_adds(),
            matrix: counts.matrix(),
            shared: counts.shared(),
        }
    }
}

impl LoopMix {
    fn of_loops(code: &Loop, depth: usize) -> Vec<Self> {
        let inner = code.inner.iter().flat_map(|inner| {
            let own = Self { depth, mix: (&inner.counts).into() };
            std::iter::once(own).chain(Self::of_loops(inner, depth + 1))
        });
        inner.collect()
    }
}

impl CodeSummary {
    fn of_loops(code: &Loop) -> Self {
        fn all(of: &Loop, counts: &mut Counts) {
            counts.merge(&of.counts, 1.0);
            of.inner.iter().for_each(|inner| all(inner, counts));
        }
        fn step(of: &Loop) -> Option<&Loop> {
            let work = |l: &&Loop| l.counts.multiply_adds() + l.counts.matrix();
            let candidates = of.inner.iter().flat_map(|inner| [Some(inner), step(inner)]).flatten();
            candidates.filter(|l| work(l) > 0.0).max_by(|a, b| work(a).total_cmp(&work(b)))
        }
        let (mut total, mut inside) = (Counts::default(), Counts::default());
        all(code, &mut total);
        if let Some(step) = step(code) {
            all(step, &mut inside);
        }
        total.merge(&inside, -1.0);
        Self { step: (&inside).into(), prologue: (&total).into() }
    }
}

/// Every program there is, in every form, epilogue and output type.
pub fn every_program() -> impl Iterator<Item = Program> {
    Program::all()
}

/// The programs of one text each that a planner can choose: the linear form with one epilogue, output as stored.
pub fn programs() -> impl Iterator<Item = Program> {
    let own = |kernel: &Kernel| kernel.output() == kernel.storage();
    Program::all().filter(move |program| program.is_representative() && program.gemm().is_none_or(own))
}

impl Compiler {
    /// Compiles a program and describes what it became. With `architecture`, GEMMs get estimates.
    pub fn compile(&self, program: &Program, architecture: Option<Architecture>) -> Compiled {
        let mut compiled = Compiled { program: Some(program.clone()), ..Compiled::named(program.to_string()) };
        if let (Some(architecture), Ok(source)) = (architecture, program.source()) {
            compiled.stated_threads = stated_threads(&source, architecture);
        }
        let made = spirv::lower(program, self.vulkan()).and_then(|lowered| {
            (compiled.threads, compiled.workgroup_bytes) = (lowered.threads, lowered.workgroup_bytes);
            self.executable(program, &lowered, true)
        });
        let Some((parsed, subgroup)) = self.record(&mut compiled, made) else { return compiled };
        if let (Some(kernel), Some(architecture)) = (program.gemm(), architecture) {
            let target = estimate::Target { architecture, subgroup, widest: parsed.widest_load };
            match estimate::cost(kernel, &parsed.whole, target) {
                Ok(cost) => {
                    let (step, prologue) = ((&cost.step_counts).into(), (&cost.prologue_counts).into());
                    compiled.code = Some(CodeSummary { step, prologue });
                    compiled.estimates = DEPTHS.iter().map(|&k| StaticEstimate::new(&cost, k)).collect();
                }
                Err(e) => compiled.note = Some(e.to_string()),
            }
        }
        compiled
    }

    /// Compiles the compute shaders of a module, and describes what each became. They are called by this name, and of
    /// several each by its entry point's, too: `name:main`.
    ///
    /// # Safety
    /// The module must be valid by the rules of Vulkan, which `spirv-val --target-env vulkan1.3` checks: drivers take
    /// it for granted, and may do anything with one that is not. What can be read from its declarations is checked
    /// here: a shader that needs more than the device has is described as refused.
    #[allow(unsafe_code, reason = "nobody can vouch for a file of anyone's but who names it")]
    pub unsafe fn compile_module(&self, name: &str, module: &Module) -> Vec<Compiled> {
        let entries = module.entries();
        let compile = |entry: &reflect::Entry| {
            let name = if entries.len() == 1 { name.to_owned() } else { format!("{name}:{}", entry.name) };
            let mut compiled = Compiled::named(name);
            (compiled.threads, compiled.workgroup_bytes) = (entry.threads(), entry.workgroup_bytes);
            // SAFETY: the caller vouches for the module. Gain: as of `executable_of`.
            let made = unsafe { self.executable_of(module, entry) };
            if let Some((parsed, _)) = self.record(&mut compiled, made) {
                compiled.loops = LoopMix::of_loops(&parsed.whole, 1);
            }
            compiled
        };
        entries.iter().map(compile).collect()
    }

    /// Writes down what a driver said; the machine code, where it is understood, and the lanes of a subgroup.
    fn record(&self, compiled: &mut Compiled, made: Result<Executable>) -> Option<(isa::Parsed, u32)> {
        let executable = match made {
            Ok(executable) => executable,
            Err(e) => {
                compiled.refused = Some(e.to_string());
                return None;
            }
        };
        let subgroup = executable.subgroup;
        compiled.subgroup = Some(subgroup);
        compiled.read_statistics(&executable.statistics, subgroup);
        // Numbers of pipelines say nothing, and lose digits as floats.
        compiled.statistics = executable.statistics.into_iter().filter(|(name, _)| !name.contains("ash")).collect();
        let parsed = isa::parse(&executable.representations);
        compiled.representations = executable.representations;
        match parsed {
            None => {
                let apple = if self.driver().contains("Honeykrisp") {
                    ": it prints it where AGX_MESA_DEBUG=shaders is set"
                } else {
                    ""
                };
                compiled.note = Some(format!("the driver gives no machine code{apple}"));
                None
            }
            Some(Err(e)) => {
                compiled.note = Some(e);
                None
            }
            Some(Ok(parsed)) => {
                compiled.code = Some(CodeSummary::of_loops(&parsed.whole));
                Some((parsed, subgroup))
            }
        }
    }
}

impl Compiled {
    /// Of which nothing is known yet.
    fn named(kernel: String) -> Self {
        Self {
            kernel,
            refused: None,
            subgroup: None,
            threads: 0,
            workgroup_bytes: 0,
            registers: None,
            spills: None,
            resident_threads: None,
            stated_threads: None,
            statistics: Vec::new(),
            code: None,
            loops: Vec::new(),
            note: None,
            estimates: Vec::new(),
            representations: Vec::new(),
            program: None,
        }
    }

    /// Takes what drivers call by different names, and count in different units.
    fn read_statistics(&mut self, statistics: &[(String, f64)], subgroup: u32) {
        let get = |name: &str| statistics.iter().find(|(n, _)| n == name).map(|&(_, value)| value);
        let lanes = f64::from(subgroup);
        if let Some(registers) = get("VGPRs") {
            // RADV counts a subgroup of 64 as two of 32. A compute unit has two SIMDs.
            self.registers = Some(registers);
            self.spills = get("Spilled VGPRs").map(|spilled| spilled + get("Scratch size").unwrap_or(0.0) / 4.0);
            self.resident_threads = get("Subgroups per SIMD").map(|subgroups| 2.0 * subgroups * 32.0);
        } else if let Some(registers) = get("Number of GPRs") {
            // NVK.
            self.registers = Some(registers);
            self.spills = get("Spills to memory").zip(get("Fills from memory")).map(|(a, b)| a + b);
            self.resident_threads = get("Max warps/SM").map(|warps| warps * lanes);
        } else if let Some(halves) = get("GPRs") {
            // Honeykrisp counts registers of 16 bits.
            self.registers = Some(halves / 2.0);
            self.spills = get("Spills").zip(get("Fills")).map(|(a, b)| a + b);
            self.resident_threads = get("Threads");
        } else if let Some(vectors) = get("Registers used") {
            // Turnip counts registers of four words.
            self.registers = Some(4.0 * vectors);
            self.spills = get("STP Count").zip(get("LDP Count")).map(|(a, b)| a + b);
            self.resident_threads = get("Max Waves Per Core").map(|waves| waves * lanes);
        } else {
            // NVIDIA's own driver, which tells this much alone. Of others there is what they call it, in `statistics`.
            self.registers = get("Register Count");
        }
    }

    /// Whether a core holds fewer threads of it than its header states.
    pub fn fits_fewer(&self) -> bool {
        self.resident_threads.zip(self.stated_threads).is_some_and(|(holds, stated)| holds < f64::from(stated))
    }

    /// Whether the driver refused it, spilled registers to memory, or leaves a core less than the header states.
    pub fn failed(&self) -> bool {
        self.refused.is_some() || self.spills.is_some_and(|spills| spills > 0.0) || self.fits_fewer()
    }

    /// Cycles per output for a k that was estimated.
    pub fn cycles_per_output(&self, k: usize) -> Option<f64> {
        self.estimates.iter().find(|e| e.k == k).map(|e| e.cycles_per_output)
    }
}

/// What a shader's header states of the threads that a core holds at least: a sentence that begins with `Occupancy` and
/// has the architecture's name and the number.
fn stated_threads(source: &str, architecture: Architecture) -> Option<u32> {
    let (_, after) = source.split_once("// Occupancy")?;
    let sentence = after.split_once('.')?.0.replace("//", " ");
    let mut words = sentence.split([' ', ',', ':', '\n']).filter(|word| !word.is_empty());
    words.find(|word| *word == architecture.name())?;
    words.next()?.parse().ok()
}

/// How a kernel's estimate compares with the dense one's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// The kernel.
    pub kernel: String,
    /// Input features.
    pub k: usize,
    /// Dense kernel of the same schedule, and its cycles over this kernel's: above 1 this one is faster.
    pub same: Option<(String, f64)>,
    /// Dense kernel with the fewest cycles per output for as many tokens, and its cycles over this kernel's.
    pub best: Option<(String, f64)>,
}

/// Ratios of all estimated kernels that are not dense.
pub fn ratios(compiled: &[Compiled]) -> Vec<Ratio> {
    let gemm = |c: &Compiled| c.program.as_ref().and_then(Program::gemm).copied();
    let alike = |a: &Kernel, b: &Kernel| {
        let rest = |k: &Kernel| (k.storage(), k.output(), k.form(), k.epilogue());
        rest(a) == rest(b)
    };
    let dense = |like: Kernel, k: usize| {
        compiled.iter().filter_map(move |c| {
            let kernel = gemm(c).filter(|d| d.op() == Op::Dense && alike(d, &like))?;
            Some((kernel, c.cycles_per_output(k)?))
        })
    };
    let mut found = Vec::new();
    for c in compiled {
        let Some(kernel) = gemm(c).filter(|kernel| kernel.op() != Op::Dense) else { continue };
        for &k in &DEPTHS {
            let Some(cycles) = c.cycles_per_output(k) else { continue };
            let same = dense(kernel, k).find(|(d, _)| tile(d.schedule()) == tile(kernel.schedule()));
            let few = tokens(kernel.schedule());
            let best = dense(kernel, k).filter(|(d, _)| tokens(d.schedule()) == few).min_by(|a, b| a.1.total_cmp(&b.1));
            let against = |d: (Kernel, f64)| (d.0.to_string(), d.1 / cycles);
            found.push(Ratio { kernel: c.kernel.clone(), k, same: same.map(against), best: best.map(against) });
        }
    }
    found
}

/// Tokens of a kernel for few of them.
fn tokens(schedule: Schedule) -> Option<u32> {
    match schedule {
        Schedule::Gemv { tokens, .. } => Some(tokens),
        _ => None,
    }
}

/// What makes two kernels go about it alike: family, tile and threads.
fn tile(schedule: Schedule) -> (u8, (u32, u32), u32) {
    let family = match schedule {
        Schedule::Tile(_) | Schedule::Expand(_) => 0,
        Schedule::Gemv { .. } => 1,
        Schedule::Coop(_) => 2,
    };
    (family, schedule.tile(), schedule.threads())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_state_occupancy_by_architecture() {
        let source = "// Tile: x.\n// Occupancy, threads per core at least: rdna2 1024,\n// apple-m1 384, ada 512. More: \
                      ampere 1.\n";
        let stated = |architecture| stated_threads(source, architecture);
        assert_eq!((stated(Architecture::Rdna2), stated(Architecture::AppleM1)), (Some(1024), Some(384)));
        assert_eq!((stated(Architecture::Ada), stated(Architecture::Ampere)), (Some(512), None));
        assert_eq!(stated_threads("// Tile: x.", Architecture::Ada), None);
    }

    #[test]
    fn drivers_statistics_are_brought_to_one_unit() {
        let read = |statistics: &[(&str, f64)], subgroup| {
            let mut compiled = Compiled { stated_threads: Some(512), ..Compiled::named(String::new()) };
            let statistics: Vec<_> = statistics.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            compiled.read_statistics(&statistics, subgroup);
            (compiled.registers, compiled.spills, compiled.resident_threads, compiled.failed())
        };
        let radv = [("VGPRs", 120.0), ("Spilled VGPRs", 0.0), ("Scratch size", 0.0), ("Subgroups per SIMD", 8.0)];
        assert_eq!(read(&radv, 64), (Some(120.0), Some(0.0), Some(512.0), false));
        let spilled = [("VGPRs", 120.0), ("Spilled VGPRs", 3.0), ("Scratch size", 16.0), ("Subgroups per SIMD", 8.0)];
        assert_eq!(read(&spilled, 64), (Some(120.0), Some(7.0), Some(512.0), true));
        let nvk =
            [("Number of GPRs", 112.0), ("Spills to memory", 0.0), ("Fills from memory", 0.0), ("Max warps/SM", 8.0)];
        // Half of what is stated.
        assert_eq!(read(&nvk, 32), (Some(112.0), Some(0.0), Some(256.0), true));
        let apple = [("GPRs", 223.0), ("Spills", 0.0), ("Fills", 1.0), ("Threads", 512.0)];
        assert_eq!(read(&apple, 32), (Some(111.5), Some(1.0), Some(512.0), true));
        let adreno = [("Registers used", 48.0), ("STP Count", 0.0), ("LDP Count", 0.0), ("Max Waves Per Core", 8.0)];
        assert_eq!(read(&adreno, 64), (Some(192.0), Some(0.0), Some(512.0), false));
        assert_eq!(read(&[("Register Count", 96.0), ("Binary Size", 9.0)], 32), (Some(96.0), None, None, false));
        // A driver that tells nothing fails nothing.
        assert_eq!(read(&[], 32), (None, None, None, false));
    }
}
