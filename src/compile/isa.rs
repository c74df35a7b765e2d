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

mod aco;
mod agx;
mod ir3;
mod loops;
mod nak;

use std::collections::HashMap;

/// Reads machine code of one dialect into its blocks. An error names the instruction or the target that is not known.
type Reader = fn(&str) -> Result<Vec<Block>, String>;

/// The dialects, by the names under which drivers hand over their machine code.
const DIALECTS: [(&str, Reader); 4] =
    [(aco::NAME, aco::blocks), (nak::NAME, nak::blocks), (ir3::NAME, ir3::blocks), (agx::NAME, agx::blocks)];

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

/// The name of machine code that a driver prints instead of handing it over: Apple's, by Honeykrisp.
pub(super) const PRINTED: &str = agx::NAME;

/// Reads the machine code among a driver's representations, name and text; `None` if there is none.
pub(super) fn parse(representations: &[(String, String)]) -> Option<Result<Parsed, String>> {
    let ((name, reader), text) = representations.iter().find_map(|(name, text)| {
        let dialect = DIALECTS.into_iter().find(|(known, _)| known == name)?;
        Some((dialect, text))
    })?;
    let widest_load = if name == aco::NAME { aco::widest_load(text) } else { 16 };
    Some(whole(reader, text).map(|whole| Parsed { whole, widest_load }))
}

/// What runs outside of all loops, and the loops as its inner ones.
fn whole(reader: Reader, code: &str) -> Result<Loop, String> {
    let blocks = reader(code)?;
    if blocks.iter().all(|b| b.instructions.is_empty()) {
        return Err("no instructions in the driver's machine code".into());
    }
    Ok(loops::loops(&blocks))
}

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

#[cfg(test)]
impl Counts {
    /// Instructions of one class.
    fn of(&self, class: Class) -> f64 {
        self.sum(|other| f64::from(u8::from(other == class)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_is_found_by_its_name() {
        let named = |name: &str| [("NIR".to_owned(), String::new()), (name.to_owned(), "\ts_endpgm ; bf\n".to_owned())];
        assert!(parse(&named("ACO IR")).is_none());
        assert!(parse(&named("Assembly")).is_some_and(|parsed| parsed.is_ok()));
        // Code without instructions is not taken for code that costs nothing.
        assert!(parse(&named("NAK assembly")).is_some_and(|parsed| parsed.is_err()));
    }
}
