//! AMD's machine code, as Mesa's ACO prints it.

use super::{Block, Builder, Class, pair_sides, unknown};

/// What RADV calls it.
pub(super) const NAME: &str = "Assembly";

/// Bytes of the widest load of workgroup memory: ACO makes two of a load whose alignment it cannot prove.
pub(super) fn widest_load(code: &str) -> u32 {
    if ["ds_load_b128", "ds_read_b128"].iter().any(|load| code.contains(load)) { 16 } else { 8 }
}

/// `BB7:`, and below it a tab, the instruction, and `; its code in hexadecimal`.
pub(super) fn blocks(code: &str) -> Result<Vec<Block>, String> {
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
                let class = class_of(text, name).ok_or_else(|| unknown(line))?;
                builder.push(class);
            }
        }
    }
    let mut blocks = builder.finish()?;
    pair_sides(&mut blocks);
    Ok(blocks)
}

fn class_of(text: &str, name: &str) -> Option<Class> {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::super::whole;
    use super::*;

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
        let read = whole(blocks, &code).unwrap();
        let [step] = &read.inner[..] else { panic!("{read:?}") };
        assert_eq!((step.counts.multiply_adds(), step.counts.of(Class::MultiplyAdd(1))), (2.0, 2.0));
        // Either side counts half.
        assert_eq!((step.counts.shared(), step.counts.of(Class::Global)), (1.0, 0.0));
        assert_eq!((read.counts.of(Class::Global), widest_load(&code)), (1.0, 16));
        let narrow = code.replace("ds_load_b128 v[0:3]", "ds_load_b64 v[0:1]");
        assert_eq!(widest_load(&narrow), 8);
        let error = whole(blocks, &code.replace("ds_load", "xs_load")).err().unwrap();
        assert!(error.contains("unknown instruction: xs_load_b128"), "{error}");
        let error = whole(blocks, &code.replace("BB4:\n", "")).err().unwrap();
        assert!(error.contains("BB4"), "{error}");
    }
}
