//! NVIDIA's machine code, as Mesa's NAK lists it, with the edges between blocks.

use super::{Block, Class, unknown};

/// What NVK calls it.
pub(super) const NAME: &str = "NAK assembly";

/// `block.u 5 L8 [3, 4] -> {`, instructions such as `@!p0 r1 = ffma.ftz r2 r3 r1 // delay=1`, `} -> [7]`.
pub(super) fn blocks(code: &str) -> Result<Vec<Block>, String> {
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
        let class = class_of(result.trim(), name).ok_or_else(|| unknown(line))?;
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

fn class_of(result: &str, name: &str) -> Option<Class> {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::whole;
    use super::*;

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
        let whole = whole(blocks, &code).unwrap();
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
        let whole = whole(blocks, &code).unwrap();
        let [step] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!((step.counts.multiply_adds(), step.counts.of(Class::Move)), (32.0, 4.5));
    }
}
