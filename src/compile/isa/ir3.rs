//! Adreno's machine code, as Mesa's IR3 prints it.

use super::{Block, Builder, Class, unknown};

/// What Turnip calls it.
pub(super) const NAME: &str = "IR3 Assembly";

/// `l75:`, and instructions such as `(ss)(nop2) mad.f32 r1.x, r2.x, r3.x, r1.x`; `(rpt2)` does one three times.
pub(super) fn blocks(code: &str) -> Result<Vec<Block>, String> {
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
                let class = class_of(name, stem, operands).ok_or_else(|| unknown(line))?;
                (0..times).for_each(|_| builder.push(class));
            }
        }
    }
    builder.finish()
}

fn class_of(name: &str, stem: &str, operands: &str) -> Option<Class> {
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
        | "max" | "absneg" | "shrm" | "shlm" | "shrg" | "shlg" | "andg" | "clz" | "bary" | "bfrev" | "cbits"
        | "getbit" | "mgen" | "setrm" => Class::Integer,
        "ldl" | "stl" | "ldlw" | "stlw" => Class::Shared,
        // An address in brackets of `l` is one in workgroup memory.
        "atomic" if operands.contains("l[") => Class::Shared,
        "atomic" => Class::Global,
        "ldp" | "stp" => Class::Spill,
        "isam" | "ldib" | "stib" | "ldg" | "stg" | "resinfo" | "ldgb" | "stgb" => Class::Global,
        "ldc" | "stc" | "stsc" | "alias" => Class::Scalar,
        "predt" | "predf" | "prede" | "shpe" | "bar" | "fence" | "jump" | "kill" => Class::Control,
        "nop" => Class::Control,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::whole;
    use super::*;

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
            "atomic.or.untyped.1d.u32.1.l r3.y, l[r2.w], r3.x",
            "(nop2) bfrev.b r4.x, r3.w",
            "stib.b.untyped.1d.u32.1.imm.base0 r0.x, r1.x, 6",
            "end",
            "nop",
            "; CL prog 22/1",
        ]
        .join("\n");
        let whole = whole(blocks, &code).unwrap();
        let [step] = &whole.inner[..] else { panic!("{whole:?}") };
        assert_eq!((step.counts.multiply_adds(), step.counts.instructions()), (4.0, 4.0 + 3.0 + 2.0));
        assert_eq!(whole.counts.instructions(), 7.0);
    }
}
