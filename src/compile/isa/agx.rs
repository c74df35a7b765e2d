//! Apple's machine code, as Mesa's AGX prints it.

use super::{Block, Builder, Class, pair_sides, unknown};

/// What it is called here: Honeykrisp prints it, and gives it no name.
pub(super) const NAME: &str = "AGX assembly";

/// `  4c: 20c0187e0000           jmp_none 32280`: an offset, the code in hexadecimal, the instruction. Masks of active
/// lanes make the structure: `if`, `else`, `while`, `pop_exec`; a jump's distance counts from its own offset.
pub(super) fn blocks(code: &str) -> Result<Vec<Block>, String> {
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
                let class = class_of(name).ok_or_else(|| unknown(line.text))?;
                builder.push(class);
            }
        }
    }
    let mut blocks = builder.finish()?;
    pair_sides(&mut blocks);
    Ok(blocks)
}

fn class_of(name: &str) -> Option<Class> {
    Some(match name {
        "ffma" | "hfma" => Class::MultiplyAdd(1),
        "fadd" | "fmul" | "hadd" | "hmul" | "fcmpsel" | "fmin" | "fmax" | "floor" | "ceil" | "trunc" | "rint" => {
            Class::Float
        }
        "rcp" | "rsqrt" | "rsqrts" | "exp2" | "log2" | "sin_pt_1" | "sin_pt_2" | "sqrt" | "dfdx" => Class::Special,
        "convert" | "u32_to_f" | "s32_to_f" | "f_to_u32" | "f_to_s32" | "u16_to_f" | "s16_to_f" => Class::Convert,
        "imadd" | "imsub" | "imul" | "imad" => Class::Product,
        "mov" | "mov_imm" | "ldimm" | "get_sr" | "collect" => Class::Move,
        "iadd" | "isub" | "xor" | "and" | "or" | "not" | "shl" | "shr" | "asr" | "csel" | "icmpsel" | "bfeil"
        | "bfi" | "extr" | "shlhi" | "shrhi" | "bitrev" | "popcount" | "ffs" | "bitop" | "nor" | "andn1" | "andn2"
        | "orn1" | "orn2" | "nand" | "xnor" | "icmp" | "fcmp" | "ballot" | "fcmp_ballot" | "icmp_ballot" => {
            Class::Integer
        }
        "lload" | "lstore" | "latomic" => Class::Shared,
        "load" | "store" | "device_load" | "device_store" | "uniform_store" => Class::Global,
        "stack_load" | "stack_store" | "stack_adjust" => Class::Spill,
        "if" | "else" | "while" | "pop_exec" | "barrier" | "break" | "trap" => Class::Control,
        "wait" | "nop" => Class::Hint,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::whole;
    use super::*;

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
        let whole = whole(blocks, &code).unwrap();
        let [step] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!((step.counts.multiply_adds(), step.counts.instructions()), (1.0, 4.0));
        assert_eq!(whole.counts.of(Class::Global), 0.0);
    }
}
