//! Machine code as drivers print it: blocks of classified instructions, loops, and how often each block runs.
//!
//! Four dialects are read: AMD's as Mesa's ACO prints it, NVIDIA's as NAK does, Adreno's IR3, and Apple's AGX. Only
//! what an estimate needs is kept of an instruction: its [`Class`]. Invariant: an instruction that is not known is an
//! error, so that no count leaves out what a new compiler version came up with.
//!
//! How often a block runs for once through the code that surrounds it is its *share*: 1 where no branch skips it, 1
//! also for the body of an `if` without `else` (the guards of prefetches and stores, which hold nearly always), and one
//! half for either side of an `if` with `else` (a thread brings weights or activations, not both). A side that neither
//! reads, writes nor multiplies is where a loop is left: then the other side counts whole.

use std::collections::HashMap;

/// What an instruction is, as far as its cost goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Class {
    /// f32 or f16 multiply-adds, so many per lane.
    MultiplyAdd(u32),
    /// A cooperative multiply, so many multiply-adds for the subgroup.
    Matrix(u32),
    /// Other arithmetic in floating point.
    Float,
    /// Integers, bits, comparisons, selections.
    Integer,
    /// Products of 32-bit integers.
    Product,
    /// Conversions between integers and floats, or of widths.
    Convert,
    /// Exponentials, reciprocals, roots.
    Special,
    /// Copies between registers.
    Move,
    /// Reads and writes of workgroup memory.
    Shared,
    /// Reads and writes of buffers.
    Global,
    /// Work for a whole subgroup on a unit of its own: addresses, loop counters, constants.
    Scalar,
    /// Branches, barriers, masks of active lanes.
    Control,
    /// Waits and hints, which take a place in the code and no unit.
    Hint,
    /// Reads and writes of spilled registers.
    Spill,
}

/// The printed form of machine code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Aco,
    Nak,
    Ir3,
    Agx,
}

impl Dialect {
    /// The one that this representation of a driver's is in, if it is machine code.
    pub(super) fn of(representation: &str) -> Option<Self> {
        match representation {
            "Assembly" => Some(Self::Aco),
            "NAK assembly" => Some(Self::Nak),
            "IR3 Assembly" => Some(Self::Ir3),
            "AGX assembly" => Some(Self::Agx),
            _ => None,
        }
    }
}

/// Instructions that run one after another.
#[derive(Clone, Debug, Default)]
struct Block {
    instructions: Vec<Class>,
    successors: Vec<usize>,
    /// Whether its branch chooses between two sides of which a lane takes one, though both are skipped like an `if`
    /// without `else`.
    alternative: bool,
}

impl Block {
    /// Whether it reads, writes or multiplies.
    fn works(&self) -> bool {
        let work = |c: &Class| matches!(c, Class::MultiplyAdd(_) | Class::Matrix(_) | Class::Shared | Class::Global);
        self.instructions.iter().any(work)
    }
}

/// A loop, and what runs in it outside of inner loops.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Loop {
    /// Instructions of each class for one iteration, weighted by their blocks' shares.
    pub(super) counts: Counts,
    /// Loops in it, in the order of the code.
    pub(super) inner: Vec<Loop>,
}

/// Numbers of instructions by class.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counts(pub(super) Vec<(Class, f64)>);

impl Counts {
    fn add(&mut self, class: Class, count: f64) {
        match self.0.iter_mut().find(|(c, _)| *c == class) {
            Some((_, n)) => *n += count,
            None => self.0.push((class, count)),
        }
    }

    /// Adds another's, so many times.
    pub(super) fn merge(&mut self, other: &Self, times: f64) {
        other.0.iter().for_each(|&(class, count)| self.add(class, count * times));
    }

    /// Instructions, without hints.
    pub(super) fn instructions(&self) -> f64 {
        self.sum(|class| f64::from(u8::from(class != Class::Hint)))
    }

    /// Multiply-adds per lane.
    pub(super) fn multiply_adds(&self) -> f64 {
        self.sum(|class| match class {
            Class::MultiplyAdd(n) => f64::from(n),
            _ => 0.0,
        })
    }

    /// Multiply-adds of cooperative matrices, of a subgroup.
    pub(super) fn matrix(&self) -> f64 {
        self.sum(|class| match class {
            Class::Matrix(n) => f64::from(n),
            _ => 0.0,
        })
    }

    /// Reads and writes of workgroup memory.
    pub(super) fn shared(&self) -> f64 {
        self.sum(|class| f64::from(u8::from(class == Class::Shared)))
    }

    fn sum(&self, weight: impl Fn(Class) -> f64) -> f64 {
        self.0.iter().map(|&(class, count)| weight(class) * count).sum()
    }
}

/// Machine code that was read.
pub(super) struct Parsed {
    /// What runs outside of all loops, and the loops as its inner ones.
    pub(super) whole: Loop,
    /// Bytes of the widest load of workgroup memory: ACO makes two of a load whose alignment it cannot prove.
    pub(super) widest_load: u32,
}

/// Reads machine code. An error names the instruction or the target that is not known.
pub(super) fn parse(dialect: Dialect, code: &str) -> Result<Parsed, String> {
    let blocks = match dialect {
        Dialect::Aco => aco(code),
        Dialect::Nak => nak(code),
        Dialect::Ir3 => ir3(code),
        Dialect::Agx => agx(code),
    }?;
    if blocks.iter().all(|b| b.instructions.is_empty()) {
        return Err("no instructions in the driver's machine code".into());
    }
    let narrow = dialect == Dialect::Aco && !code.contains("ds_load_b128") && !code.contains("ds_read_b128");
    Ok(Parsed { whole: loops(&blocks), widest_load: if narrow { 8 } else { 16 } })
}

// ---------------------------------------------------------------------------------------------------------------------
// The dialects.

/// Code in the making: blocks end at labels and after branches; targets are labels until all are known.
#[derive(Default)]
struct Builder {
    blocks: Vec<Block>,
    labels: HashMap<String, usize>,
    targets: Vec<(usize, String)>,
    /// Whether the last block goes on into the next one.
    falls: bool,
}

impl Builder {
    fn start(&mut self) -> usize {
        if self.falls {
            let next = self.blocks.len();
            if let Some(last) = self.blocks.last_mut() {
                last.successors.push(next);
            }
        }
        self.blocks.push(Block::default());
        self.falls = true;
        self.blocks.len() - 1
    }

    fn label(&mut self, label: &str) {
        let at = self.start();
        self.labels.insert(label.to_owned(), at);
    }

    fn current(&mut self) -> &mut Block {
        if self.blocks.is_empty() {
            self.start();
        }
        let last = self.blocks.len() - 1;
        &mut self.blocks[last]
    }

    fn push(&mut self, class: Class) {
        self.current().instructions.push(class);
    }

    /// Ends the block with a branch to these labels, and into the next block if it may not be taken.
    fn branch(&mut self, labels: &[&str], may_fall: bool) {
        self.push(Class::Control);
        let at = self.blocks.len() - 1;
        self.targets.extend(labels.iter().map(|&label| (at, label.to_owned())));
        self.falls = may_fall;
        self.start();
    }

    fn finish(mut self) -> Result<Vec<Block>, String> {
        for (at, label) in self.targets {
            let target =
                *self.labels.get(&label).ok_or_else(|| format!("a branch goes to {label}, which is nowhere"))?;
            self.blocks[at].successors.push(target);
        }
        Ok(self.blocks)
    }
}

fn unknown(line: &str) -> String {
    format!("unknown instruction: {}", line.trim())
}

/// `BB7:`, and below it a tab, the instruction, and `; its code in hexadecimal`.
fn aco(code: &str) -> Result<Vec<Block>, String> {
    let mut builder = Builder::default();
    for line in code.lines() {
        if let Some(label) = line.strip_suffix(':').filter(|l| l.starts_with("BB")) {
            builder.label(label);
            continue;
        }
        let Some(line) = line.strip_prefix('\t') else { continue };
        let text = line.split(';').next().unwrap_or_default().trim();
        let (name, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        match name {
            // "(then repeated 3 times)": alignment after the end.
            "" | "(then" => {}
            "s_endpgm" | "s_code_end" => {
                builder.push(Class::Control);
                builder.falls = false;
                builder.start();
            }
            "s_branch" => builder.branch(&[operands.trim()], false),
            _ if name.starts_with("s_cbranch") => builder.branch(&[operands.trim()], true),
            _ => {
                // The lanes that did not take the first side take the second.
                let other_side = ["s_and_not1_b", "s_andn2_b", "s_xor_b"].iter().any(|p| name.starts_with(p));
                if other_side && operands.starts_with("exec") {
                    builder.current().alternative = true;
                }
                let class = aco_class(text, name).ok_or_else(|| unknown(line))?;
                builder.push(class);
            }
        }
    }
    let mut blocks = builder.finish()?;
    pair_sides(&mut blocks);
    Ok(blocks)
}

/// A side that is skipped, then the other side that is skipped: of both a lane takes one. Blocks that begin a second
/// side are marked; those that begin the first one get the mark here, and it is taken from what has no first side.
fn pair_sides(blocks: &mut [Block]) {
    for at in 0..blocks.len() {
        if !blocks[at].alternative {
            continue;
        }
        let first = (0..at).rev().find(|&b| blocks[b].successors.len() == 2);
        let skips_to = |b: usize| blocks[b].successors.iter().copied().max();
        match first.filter(|&b| skips_to(b).is_some_and(|target| target <= at && target > b + 1)) {
            Some(first) if blocks[at].successors.len() == 2 => blocks[first].alternative = true,
            _ => blocks[at].alternative = false,
        }
    }
}

fn aco_class(text: &str, name: &str) -> Option<Class> {
    let has = |part: &str| name.contains(part);
    let float = has("_f32") || has("_f16");
    Some(match name.split_once('_')?.0 {
        "v" if name.starts_with("v_dual_") => {
            let fused = |part: &str| ["v_dual_fmac", "v_dual_fmaak", "v_dual_fmamk"].iter().any(|f| part.contains(f));
            match text.split("::").filter(|part| fused(part)).count() as u32 {
                0 => Class::Float,
                n => Class::MultiplyAdd(n),
            }
        }
        "v" if has("wmma") => Class::Matrix(16 * 16 * 16),
        // A conversion is written as a multiply-add with 1 and 0.
        "v" if has("v_fma_mix") && (text.contains(", 1.0,") || text.contains("neg(0)")) => Class::Convert,
        "v" if has("v_pk_fma") || has("v_dot2") => Class::MultiplyAdd(2),
        "v" if ["v_fma", "v_mad_f", "v_mac_f"].iter().any(|p| name.starts_with(p)) => Class::MultiplyAdd(1),
        "v" if ["_mul_lo_u32", "_mul_hi_", "_mad_u64", "_mad_co_u64", "_mul_lo_i32"].iter().any(|&p| has(p)) => {
            Class::Product
        }
        "v" if ["v_rcp", "v_exp", "v_log", "v_sqrt", "v_rsq", "v_sin", "v_cos", "v_s_"]
            .iter()
            .any(|p| name.starts_with(p)) =>
        {
            Class::Special
        }
        "v" if has("v_cvt") => Class::Convert,
        "v" if has("v_mov") || has("v_swap") || has("v_readfirstlane") || has("v_readlane") || has("v_writelane") => {
            Class::Move
        }
        "v" if float && !has("cmp") => Class::Float,
        "v" => Class::Integer,
        "ds" => Class::Shared,
        "buffer" | "global" | "flat" => Class::Global,
        "scratch" => Class::Spill,
        "s" if ["s_wait", "s_delay_alu", "s_clause", "s_nop", "s_set_inst", "s_inst_pref", "s_sendmsg"]
            .iter()
            .any(|p| name.starts_with(p)) =>
        {
            Class::Hint
        }
        "s" if has("barrier") => Class::Control,
        "s" => Class::Scalar,
        _ => return None,
    })
}

/// `block.u 5 L8 [3, 4] -> {`, instructions such as `@!p0 r1 = ffma.ftz r2 r3 r1 // delay=1`, `} -> [7]`.
fn nak(code: &str) -> Result<Vec<Block>, String> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    for line in code.lines() {
        if line.starts_with("block") {
            inside = true;
            blocks.push(Block::default());
            continue;
        }
        if let Some(end) = line.strip_prefix("} -> ") {
            let list = end.trim().trim_start_matches('[').trim_end_matches(']');
            let successors = list.split(',').map(str::trim).filter(|s| !s.is_empty());
            let successors: Result<Vec<usize>, _> = successors.map(str::parse).collect();
            if let Some(block) = blocks.last_mut() {
                block.successors = successors.map_err(|_| unknown(line))?;
            }
            inside = false;
            continue;
        }
        let text = line.split("//").next().unwrap_or_default().trim();
        if !inside || text.is_empty() {
            continue;
        }
        // A predicate comes first.
        let text = match text.strip_prefix('@') {
            Some(rest) => rest.split_once(char::is_whitespace).map_or("", |(_, text)| text.trim()),
            None => text,
        };
        let (result, operation) = text.split_once(" = ").unwrap_or(("", text));
        let name = operation.split_whitespace().next().unwrap_or_default();
        let class = nak_class(result.trim(), name).ok_or_else(|| unknown(line))?;
        if let Some(block) = blocks.last_mut() {
            block.instructions.push(class);
        }
    }
    let count = blocks.len();
    match blocks.iter().flat_map(|b| &b.successors).find(|&&s| s >= count) {
        Some(target) => Err(format!("a branch goes to block {target}, which is nowhere")),
        None => Ok(blocks),
    }
}

fn nak_class(result: &str, name: &str) -> Option<Class> {
    let stem = name.split('.').next()?;
    // Registers and predicates that a subgroup shares have a unit of their own.
    let uniform = result.starts_with("ur") || result.starts_with("up");
    Some(match stem {
        "ffma" => Class::MultiplyAdd(1),
        "hfma2" => Class::MultiplyAdd(2),
        "hmma" => {
            let shape = name.split('.').find_map(|part| part.strip_prefix('m'))?;
            let mut sizes = shape.split(['n', 'k']).map(|size| size.parse::<u32>().ok());
            Class::Matrix(sizes.next()?? * sizes.next()?? * sizes.next()??)
        }
        "fadd" | "fmul" | "hadd2" | "hmul2" | "fswzadd" | "fchk" => Class::Float,
        "mufu" => Class::Special,
        "f2f" | "f2i" | "i2f" | "f2fp" | "i2i" | "frnd" => Class::Convert,
        "mov" | "sel" | "prmt" | "s2r" | "cs2r" | "r2ur" | "redux" | "shfl" | "vote" | "p2r" | "r2p"
            if uniform || !matches!(stem, "sel" | "prmt") =>
        {
            if uniform || matches!(stem, "s2r" | "cs2r" | "r2ur") {
                Class::Scalar
            } else {
                Class::Move
            }
        }
        "imad" | "imad64" if !uniform => Class::Product,
        // Comparisons of floats are the integers' unit's.
        "fmnmx" | "fsetp" | "fset" | "fsel" | "hmnmx2" | "hsetp2" => Class::Integer,
        "iadd3" | "iadd2" | "lea" | "lop3" | "lop2" | "shf" | "shl" | "shr" | "isetp" | "imnmx" | "iabs" | "sel"
        | "prmt" | "plop3" | "bmsk" | "flo" | "popc" | "brev" | "sgxt" | "imad" | "imad64" | "psetp" | "bfe"
        | "bfi" => {
            if uniform {
                Class::Scalar
            } else {
                Class::Integer
            }
        }
        "ldc" => Class::Scalar,
        "ldsm" | "lds" | "sts" => Class::Shared,
        "ld" | "st" if name.contains(".shared") => Class::Shared,
        "ld" | "st" if name.contains(".local") => Class::Spill,
        "ldl" | "stl" => Class::Spill,
        "ld" | "st" | "ldg" | "stg" | "atom" | "ccctl" => Class::Global,
        "bra" | "bar" | "bssy" | "bsync" | "bclear" | "break" | "exit" | "warpsync" | "membar" | "brx" => {
            Class::Control
        }
        "nop" | "depbar" => Class::Hint,
        _ => return None,
    })
}

/// `l75:`, and instructions such as `(ss)(nop2) mad.f32 r1.x, r2.x, r3.x, r1.x`; `(rpt2)` does one three times.
fn ir3(code: &str) -> Result<Vec<Block>, String> {
    let mut builder = Builder::default();
    let mut ended = false;
    for line in code.lines() {
        let mut text = line.trim();
        if let Some(label) = text.strip_suffix(':').filter(|l| l.starts_with('l')) {
            builder.label(label);
            continue;
        }
        if ended || text.is_empty() || text.starts_with(['@', ';']) || text.starts_with("Native code") {
            continue;
        }
        let (mut times, mut idle) = (1, 0);
        while let Some((flag, rest)) = text.strip_prefix('(').and_then(|t| t.split_once(')')) {
            times += flag.strip_prefix("rpt").and_then(|n| n.parse::<usize>().ok()).unwrap_or_default();
            idle += flag.strip_prefix("nop").and_then(|n| n.parse::<usize>().ok()).unwrap_or_default();
            text = rest.trim_start();
        }
        let (name, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let stem = name.split('.').next().unwrap_or_default();
        // Idle cycles before it take issue slots, as instructions do.
        (0..idle).for_each(|_| builder.push(Class::Control));
        let targets: Vec<&str> = operands.split(',').filter_map(|o| o.trim().strip_prefix('#')).collect();
        match stem {
            "br" | "brao" | "braa" | "brac" | "getone" | "getlast" | "shps" => builder.branch(&targets, true),
            "jump" => builder.branch(&targets, false),
            "end" => {
                builder.push(Class::Control);
                builder.falls = false;
                ended = true;
            }
            _ => {
                let class = ir3_class(name, stem).ok_or_else(|| unknown(line))?;
                (0..times).for_each(|_| builder.push(class));
            }
        }
    }
    builder.finish()
}

fn ir3_class(name: &str, stem: &str) -> Option<Class> {
    let float = name.ends_with(".f") || name.ends_with(".f32") || name.ends_with(".f16");
    Some(match stem {
        "mad" if float => Class::MultiplyAdd(1),
        "add" | "mul" | "max" | "min" | "cmps" | "cmpv" | "sign" | "floor" | "rndne" | "trunc" | "absneg"
            if name.contains(".f") =>
        {
            Class::Float
        }
        "rcp" | "rsq" | "sqrt" | "exp2" | "log2" | "sin" | "cos" | "hrsq" | "hlog2" | "hexp2" => Class::Special,
        "cov" => Class::Convert,
        "mov" | "mova1" | "mova" | "swz" | "movs" | "movmsk" => Class::Move,
        // 32-bit products take three of these.
        "mull" | "mul" | "madsh" | "mad" | "mulls" => Class::Integer,
        "add" | "sub" | "shr" | "shl" | "ashr" | "and" | "or" | "xor" | "not" | "sel" | "sad" | "cmps" | "min"
        | "max" | "absneg" | "shrm" | "shlm" | "shrg" | "shlg" | "andg" | "clz" | "bary" | "cbits" | "mgen"
        | "setrm" => Class::Integer,
        "ldl" | "stl" | "ldlw" | "stlw" => Class::Shared,
        "ldp" | "stp" => Class::Spill,
        "isam" | "ldib" | "stib" | "ldg" | "stg" | "resinfo" | "ldgb" | "stgb" => Class::Global,
        "ldc" | "stc" | "stsc" | "alias" => Class::Scalar,
        "predt" | "predf" | "prede" | "shpe" | "bar" | "fence" | "jump" | "kill" => Class::Control,
        "nop" => Class::Control,
        _ => return None,
    })
}

/// `  4c: 20c0187e0000           jmp_none 32280`: an offset, the code in hexadecimal, the instruction. Masks of active
/// lanes make the structure: `if`, `else`, `while`, `pop_exec`; a jump's distance counts from its own offset.
fn agx(code: &str) -> Result<Vec<Block>, String> {
    struct Line<'a> {
        offset: i64,
        name: &'a str,
        operands: &'a str,
        text: &'a str,
    }
    let mut lines = Vec::new();
    for text in code.lines() {
        let Some((offset, rest)) = text.trim().split_once(':') else { continue };
        let Ok(offset) = i64::from_str_radix(offset, 16) else { continue };
        let Some((_, operation)) = rest.trim().split_once(char::is_whitespace) else { continue };
        let operation = operation.trim();
        let (name, operands) = operation.split_once(char::is_whitespace).unwrap_or((operation, ""));
        // What sets up the constants has its own offsets, and runs once for all.
        if lines.last().is_some_and(|last: &Line<'_>| offset <= last.offset) {
            break;
        }
        if lines.is_empty() && offset != 0 {
            continue;
        }
        lines.push(Line { offset, name, operands: operands.trim(), text });
    }
    let mut builder = Builder::default();
    let target = |line: &Line<'_>| {
        let distance = line.operands.parse::<i64>().map_err(|_| unknown(line.text))?;
        Ok::<_, String>(format!("{:x}", line.offset + distance))
    };
    let mut jumped_to = std::collections::HashSet::new();
    for line in lines.iter().filter(|l| l.name.starts_with("jmp")) {
        jumped_to.insert(target(line)?);
    }
    for line in &lines {
        let here = format!("{:x}", line.offset);
        if jumped_to.contains(&here) {
            builder.label(&here);
        }
        match line.name {
            "jmp_none" | "jmp_any" | "jmp_exec_any" | "jmp_exec_none" => {
                let to = target(line)?;
                builder.branch(&[&to], true);
            }
            "jmp" => {
                let to = target(line)?;
                builder.branch(&[&to], false);
            }
            "stop" => {
                builder.push(Class::Control);
                builder.falls = false;
                builder.start();
            }
            "else" => {
                builder.current().alternative = true;
                builder.push(Class::Control);
            }
            name => {
                let class = agx_class(name).ok_or_else(|| unknown(line.text))?;
                builder.push(class);
            }
        }
    }
    let mut blocks = builder.finish()?;
    pair_sides(&mut blocks);
    Ok(blocks)
}

fn agx_class(name: &str) -> Option<Class> {
    Some(match name {
        "ffma" | "hfma" => Class::MultiplyAdd(1),
        "fadd" | "fmul" | "hadd" | "hmul" | "fcmpsel" | "fmin" | "fmax" | "floor" | "ceil" | "trunc" | "rint" => {
            Class::Float
        }
        "rcp" | "rsqrt" | "exp2" | "log2" | "sin_pt_1" | "sin_pt_2" | "sqrt" | "dfdx" => Class::Special,
        "convert" | "u32_to_f" | "s32_to_f" | "f_to_u32" | "f_to_s32" | "u16_to_f" | "s16_to_f" => Class::Convert,
        "imadd" | "imsub" | "imul" | "imad" => Class::Product,
        "mov" | "mov_imm" | "ldimm" | "get_sr" | "collect" => Class::Move,
        "iadd" | "isub" | "xor" | "and" | "or" | "not" | "shl" | "shr" | "asr" | "csel" | "icmpsel" | "bfeil"
        | "bfi" | "extr" | "shlhi" | "shrhi" | "bitrev" | "popcount" | "ffs" | "bitop" | "nor" | "andn1" | "andn2"
        | "orn1" | "orn2" | "nand" | "xnor" | "icmp" | "fcmp" | "ballot" | "fcmp_ballot" | "icmp_ballot" => {
            Class::Integer
        }
        "lload" | "lstore" => Class::Shared,
        "load" | "store" | "device_load" | "device_store" | "uniform_store" => Class::Global,
        "stack_load" | "stack_store" | "stack_adjust" => Class::Spill,
        "if" | "else" | "while" | "pop_exec" | "barrier" | "break" | "trap" => Class::Control,
        "wait" | "nop" => Class::Hint,
        _ => return None,
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// Loops and shares, of any dialect.

/// Blocks of one loop, by the block that all its rounds begin with.
#[derive(Debug)]
struct Body {
    header: usize,
    members: Vec<bool>,
}

impl Body {
    fn size(&self) -> usize {
        self.members.iter().filter(|&&m| m).count()
    }
}

/// The loops of blocks, weighted, as the inner loops of the whole.
fn loops(blocks: &[Block]) -> Loop {
    let next: Vec<&[usize]> = blocks.iter().map(|b| b.successors.as_slice()).collect();
    let bodies = bodies(&next);
    let once = once_through(&next, &bodies);
    let order = from_above(&once);
    let shares = shares(blocks, &once, &order);
    // Loops in the order of the code, each in the smallest that holds it; `bodies` are sorted by size.
    let place: HashMap<usize, usize> = order.iter().enumerate().map(|(place, &block)| (block, place)).collect();
    let holds = |outer: usize, inner: usize| outer > inner && bodies[outer].members[bodies[inner].header];
    let parent = |inner: usize| (inner + 1..bodies.len()).find(|&outer| holds(outer, inner));
    fn build(
        of: Option<usize>,
        (blocks, bodies, shares): (&[Block], &[Body], &[f64]),
        parent: &dyn Fn(usize) -> Option<usize>,
        place: &HashMap<usize, usize>,
    ) -> Loop {
        let mut whole = Loop::default();
        // A loop counts from its header's share: once in for each time that it is met.
        let met = of.map_or(1.0, |l| shares[bodies[l].header]);
        for (at, block) in blocks.iter().enumerate() {
            let innermost = bodies.iter().position(|body| body.members[at]);
            if innermost == of && shares[at] > 0.0 {
                for &class in &block.instructions {
                    whole.counts.add(class, shares[at] / met);
                }
            }
        }
        let mut inner: Vec<usize> = (0..bodies.len()).filter(|&l| parent(l) == of).collect();
        inner.sort_by_key(|&l| place.get(&bodies[l].header));
        whole.inner = inner.into_iter().map(|l| build(Some(l), (blocks, bodies, shares), parent, place)).collect();
        whole
    }
    build(None, (blocks, &bodies, &shares), &parent, &place)
}

/// Blocks that are reached, each before those that it leads to unless an edge goes back.
fn from_above<T: AsRef<[usize]>>(next: &[T]) -> Vec<usize> {
    let mut seen = vec![false; next.len()];
    let mut order = Vec::new();
    let mut stack = Vec::new();
    if !next.is_empty() {
        seen[0] = true;
        stack.push((0, 0));
    }
    while let Some((block, edge)) = stack.pop() {
        match next[block].as_ref().get(edge) {
            Some(&to) => {
                stack.push((block, edge + 1));
                if !seen[to] {
                    seen[to] = true;
                    stack.push((to, 0));
                }
            }
            None => order.push(block),
        }
    }
    order.reverse();
    order
}

/// The block through which all ways to a block lead last, for each block but the first; by places in `order`.
fn dominators<T: AsRef<[usize]>>(next: &[T], order: &[usize]) -> Vec<usize> {
    let mut place = vec![usize::MAX; next.len()];
    order.iter().enumerate().for_each(|(at, &block)| place[block] = at);
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); order.len()];
    for (at, &block) in order.iter().enumerate() {
        next[block].as_ref().iter().for_each(|&to| before[place[to]].push(at));
    }
    // Edges that go back are met again until nothing changes.
    let mut above = vec![usize::MAX; order.len()];
    if let Some(first) = above.first_mut() {
        *first = 0;
    }
    let mut changed = true;
    while changed {
        changed = false;
        for at in 1..order.len() {
            let known = before[at].iter().copied().filter(|&b| above[b] != usize::MAX);
            let meet = known.reduce(|mut a, mut b| {
                while a != b {
                    if a > b { a = above[a] } else { b = above[b] }
                }
                a
            });
            let meet = meet.unwrap_or(0);
            changed |= above[at] != meet;
            above[at] = meet;
        }
    }
    above
}

/// Natural loops, smallest first.
fn bodies(next: &[&[usize]]) -> Vec<Body> {
    let order = from_above(next);
    let above = dominators(next, &order);
    let mut place = vec![usize::MAX; next.len()];
    order.iter().enumerate().for_each(|(at, &block)| place[block] = at);
    let dominates = |header: usize, mut at: usize| {
        while at > header {
            at = above[at];
        }
        at == header
    };
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); next.len()];
    for &block in &order {
        next[block].iter().for_each(|&to| before[to].push(block));
    }
    let mut found: Vec<Body> = Vec::new();
    for &block in &order {
        for &header in next[block].iter().filter(|&&to| dominates(place[to], place[block])) {
            let known = found.iter().position(|body| body.header == header).unwrap_or_else(|| {
                let mut members = vec![false; next.len()];
                members[header] = true;
                found.push(Body { header, members });
                found.len() - 1
            });
            let members = &mut found[known].members;
            let mut stack = vec![block];
            while let Some(at) = stack.pop() {
                if !std::mem::replace(&mut members[at], true) {
                    stack.extend(&before[at]);
                }
            }
        }
    }
    found.sort_by_key(Body::size);
    found
}

/// The edges once every loop runs once: none goes back, a loop is left from its end alone.
fn once_through(next: &[&[usize]], bodies: &[Body]) -> Vec<Vec<usize>> {
    let innermost = |block: usize| bodies.iter().find(|body| body.members[block]);
    (0..next.len())
        .map(|at| {
            let Some(body) = innermost(at) else { return next[at].to_vec() };
            let goes_back = |to: usize| bodies.iter().any(|b| b.header == to && b.members[at]);
            let ahead: Vec<usize> = next[at].iter().copied().filter(|&to| !goes_back(to)).collect();
            let stays: Vec<usize> = ahead.iter().copied().filter(|&to| body.members[to]).collect();
            if !stays.is_empty() {
                return stays;
            }
            // The end of the loop: on to where its blocks lead outside, within the loop around it if there is one.
            let members = (0..next.len()).filter(|&b| body.members[b]);
            let mut out: Vec<usize> =
                members.flat_map(|b| next[b].iter().copied()).filter(|&to| !body.members[to]).collect();
            let around = bodies.iter().find(|b| b.members[body.header] && b.header != body.header);
            if let Some(around) = around {
                let within: Vec<usize> =
                    out.iter().copied().filter(|&to| around.members[to] && to != around.header).collect();
                match within.is_empty() {
                    false => out = within,
                    true => out.retain(|&to| to != around.header),
                }
            }
            out.sort_unstable();
            out.dedup();
            out
        })
        .collect()
}

/// How often each block runs for once through the whole, if every loop ran once.
fn shares(blocks: &[Block], next: &[Vec<usize>], order: &[usize]) -> Vec<f64> {
    let end = order.len();
    let mut place = vec![usize::MAX; next.len()];
    order.iter().enumerate().for_each(|(at, &block)| place[block] = at);
    // Where all ways on from a block meet, by place; `end` is the end.
    let mut meets = vec![end; end + 1];
    for at in (0..end).rev() {
        let ways = next[order[at]].iter().map(|&to| place[to]).filter(|&to| to > at);
        meets[at] = ways
            .reduce(|mut a, mut b| {
                while a != b {
                    if a < b { a = meets[a] } else { b = meets[b] }
                }
                a
            })
            .unwrap_or(end);
    }
    let above = dominators(next, order);
    let mut shares = vec![0.0; blocks.len()];
    for at in 0..end {
        if at == 0 {
            shares[order[0]] = 1.0;
            continue;
        }
        let from = above[at];
        let always = std::iter::successors(Some(from), |&b| (b < end).then(|| meets[b])).any(|b| b == at);
        let branch = &blocks[order[from]];
        let sides = &next[order[from]];
        let skipped = sides.iter().any(|&to| place[to] == meets[from]) && !branch.alternative;
        let idle = |side: usize| !blocks[side].works() && next[side].len() == 1 && place[next[side][0]] == meets[from];
        let whole = always || skipped || sides.iter().any(|&to| place[to] != at && idle(to));
        shares[order[at]] = shares[order[from]] * if whole { 1.0 } else { 0.5 };
    }
    shares
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn counts(of: &Loop, class: Class) -> f64 {
        of.counts.0.iter().filter(|(c, _)| *c == class).map(|(_, n)| n).sum()
    }

    /// A loop with two sides, of which a wave takes one, in the order in which ACO puts it: test at the end.
    #[test]
    fn acos_loops_are_found_wherever_their_test_is() {
        let code = [
            "BB0:",
            "\ts_mov_b32 s0, 0 ; be",
            "\ts_branch BB4 ; bf",
            "BB1:",
            "\tv_cmpx_gt_u32_e32 0x80, v0 ; 7d",
            "\ts_cbranch_execz BB2 ; bf",
            "\tds_load_b128 v[0:3], v4 ; d8",
            "BB2:",
            "\ts_and_not1_b64 exec, -1, exec ; 91",
            "\ts_cbranch_execz BB3 ; bf",
            "\tds_store_b128 v4, v[0:3] ; d8",
            "BB3:",
            "\tv_dual_fmac_f32 v0, v1, v2 :: v_dual_mul_f32 v3, v4, v5 ; ca",
            "\tv_fmac_f32_e32 v0, v1, v2 ; 56",
            "BB4:",
            "\ts_cmp_lt_u32 s0, s1 ; bf",
            "\ts_cbranch_scc1 BB1 ; bf",
            "BB5:",
            "\tbuffer_store_b32 v0, v1, s[0:3], 0 ; e0",
            "\ts_endpgm ; bf",
            "\ts_code_end ; bf",
            "",
        ]
        .join("\n");
        let parsed = parse(Dialect::Aco, &code).unwrap();
        let [step] = &parsed.whole.inner[..] else { panic!("{:?}", parsed.whole) };
        assert_eq!((step.counts.multiply_adds(), counts(step, Class::MultiplyAdd(1))), (2.0, 2.0));
        // Either side counts half.
        assert_eq!((step.counts.shared(), counts(step, Class::Global)), (1.0, 0.0));
        assert_eq!((counts(&parsed.whole, Class::Global), parsed.widest_load), (1.0, 16));
        let narrow = code.replace("ds_load_b128 v[0:3]", "ds_load_b64 v[0:1]");
        assert_eq!(parse(Dialect::Aco, &narrow).unwrap().widest_load, 8);
        let error = parse(Dialect::Aco, &code.replace("ds_load", "xs_load")).err().unwrap();
        assert!(error.contains("unknown instruction: xs_load_b128"), "{error}");
        let error = parse(Dialect::Aco, &code.replace("BB4:\n", "")).err().unwrap();
        assert!(error.contains("BB4"), "{error}");
    }

    /// Loops in a loop, and one behind it: of NAK's listing, with its edges.
    #[test]
    fn naks_loops_nest() {
        let block =
            |number: usize, body: &str, to: &str| format!("block {number} L{number} [] -> {{\n{body}}} -> [{to}]\n");
        let ffma =
            "      r1        = ffma.ftz r2 r3 r1       // delay=1\n@!p0              bra L1         // delay=1\n";
        let code = [
            block(0, "      r0        = mov rZ // delay=1\n", "1"),
            block(1, "      p0        = isetp.lt.u32 r1 r2 // delay=9\n", "2, 5"),
            block(2, ffma, "2, 3"),
            block(3, &ffma.repeat(2), "3, 4"),
            block(4, "                  bra pT L1 // delay=1\n", "1"),
            block(5, "      r8..12    = hmma.m16n8k16.f32 r0..4 r4..6 r8..12 // delay=1\n", "5, 6"),
            block(6, "                  exit // delay=1\n", ""),
        ]
        .concat();
        let whole = parse(Dialect::Nak, &code).unwrap().whole;
        let [outer, last] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!(last.counts.matrix(), 2048.0);
        let inner: Vec<_> = outer.inner.iter().map(|l| l.counts.multiply_adds()).collect();
        assert_eq!((inner, outer.counts.instructions()), (vec![1.0, 2.0], 2.0));
        assert_eq!(whole.counts.instructions(), 2.0);
    }

    /// NAK leaves a loop from a side of its own, which only sets what comes out of it.
    #[test]
    fn a_side_that_only_leaves_the_loop_halves_nothing() {
        let block =
            |number: usize, body: &str, to: &str| format!("block {number} L{number} [] -> {{\n{body}}} -> [{to}]\n");
        let code = [
            block(0, "      r0        = mov rZ // delay=1\n", "1"),
            block(1, "@!p0              bra L3 // delay=1\n", "2, 3"),
            block(2, &"      r4        = mov r1 // delay=1\n".repeat(9), "4"),
            block(3, &"      r1        = ffma.ftz r2 r3 r1 // delay=1\n".repeat(32), "4"),
            block(4, "@!p1              bra L1 // delay=1\n", "5, 1"),
            block(5, "                  exit // delay=1\n", ""),
        ]
        .concat();
        let whole = parse(Dialect::Nak, &code).unwrap().whole;
        let [step] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!((step.counts.multiply_adds(), counts(step, Class::Move)), (32.0, 4.5));
    }

    /// Repeated and idle cycles count, and so does what follows a loop that is left at its head.
    #[test]
    fn adrenos_repeats_and_idle_cycles_count() {
        let code = [
            "Native code for unnamed CL shader",
            "@const(c12.x) 0x4f7ffffe",
            "mov.u32u32 r0.x, 0",
            "l7:",
            "(ss)br p0.x, #l9",
            "(sy)(rpt3)mad.f32 r1.x, r2.x, r3.x, r1.x",
            "(nop2) add.u r0.x, r0.x, 1",
            "jump #l7",
            "l9:",
            "stib.b.untyped.1d.u32.1.imm.base0 r0.x, r1.x, 6",
            "end",
            "nop",
            "; CL prog 22/1",
        ]
        .join("\n");
        let whole = parse(Dialect::Ir3, &code).unwrap().whole;
        let [step] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!((step.counts.multiply_adds(), step.counts.instructions()), (4.0, 4.0 + 3.0 + 2.0));
        assert_eq!(whole.counts.instructions(), 3.0);
    }

    /// Jumps are relative, and what prepares the constants is left out.
    #[test]
    fn apples_jumps_are_relative() {
        let code = [
            "shader: MESA_SHADER_COMPUTE",
            "   0: 62000000               ldimm    r0l, 0",
            "   4: 522c9e822508           while    $r79, r12, 1, ult",
            "   a: 20c026350000           jmp_none 22",
            "  10: 3a29                   ffma     r1, r2, r3, r1",
            "  12: 3800                   wait     a",
            "  1a: 00c0dacaffff           jmp_any  -22",
            "  20: 520e00000000           pop_exec 1",
            "  26: 8800                   stop",
            "   0: 0501900d00c43200       load     r0_r1, du0, 9",
        ]
        .join("\n");
        let whole = parse(Dialect::Agx, &code).unwrap().whole;
        let [step] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!((step.counts.multiply_adds(), step.counts.instructions()), (1.0, 4.0));
        assert_eq!(counts(&whole, Class::Global), 0.0);
    }
}
