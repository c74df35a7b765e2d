//! Arithmetic of the interpreter, lane by lane on 32-bit words: WGSL's operators, functions and conversions, and
//! scalars in memory.
//!
//! Invariant: no state. What WGSL leaves open, and what the interpreter does not know, is an error.

use half::f16;
use naga::{BinaryOperator, Literal, MathFunction, Scalar, ScalarKind};

use super::{Lanes, unknown};
use crate::error::Result;

pub(super) fn float(bits: u32) -> f32 {
    f32::from_bits(bits)
}

/// Applies a function to the components of two operands, of which one may be a scalar.
pub(super) fn zip(lanes: usize, left: &[u32], right: &[u32], f: impl Fn(u32, u32) -> u32) -> Vec<u32> {
    match (left.len(), right.len()) {
        (l, r) if l == r => left.iter().zip(right).map(|(&a, &b)| f(a, b)).collect(),
        (l, _) if l == lanes => right.iter().enumerate().map(|(i, &b)| f(left[i % lanes], b)).collect(),
        _ => left.iter().enumerate().map(|(i, &a)| f(a, right[i % lanes])).collect(),
    }
}

pub(super) fn map(operand: &[u32], f: impl Fn(u32) -> u32) -> Vec<u32> {
    operand.iter().map(|&a| f(a)).collect()
}

pub(super) fn to_f16(bits: u32) -> u32 {
    f16::from_f32(float(bits)).to_f32().to_bits()
}

/// A scalar of memory as a word. The range has been checked.
pub(super) fn read(memory: &[u8], at: usize, scalar: Scalar) -> Result<u32> {
    match (scalar.width, scalar.kind) {
        (4, ScalarKind::Float | ScalarKind::Sint | ScalarKind::Uint) => {
            Ok(u32::from_le_bytes([memory[at], memory[at + 1], memory[at + 2], memory[at + 3]]))
        }
        (2, ScalarKind::Float) => Ok(f16::from_le_bytes([memory[at], memory[at + 1]]).to_f32().to_bits()),
        _ => Err(unknown(&scalar)),
    }
}

pub(super) fn write(memory: &mut [u8], at: usize, scalar: Scalar, word: u32) -> Result<()> {
    match (scalar.width, scalar.kind) {
        (4, ScalarKind::Float | ScalarKind::Sint | ScalarKind::Uint) => {
            memory[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        (2, ScalarKind::Float) => memory[at..at + 2].copy_from_slice(&f16::from_f32(float(word)).to_le_bytes()),
        _ => return Err(unknown(&scalar)),
    }
    Ok(())
}

pub(super) fn word(literal: Literal) -> Result<u32> {
    Ok(match literal {
        Literal::F32(value) => value.to_bits(),
        Literal::F16(value) => value.to_f32().to_bits(),
        Literal::U32(value) => value,
        Literal::I32(value) => value.cast_unsigned(),
        Literal::Bool(value) => u32::from(value),
        other => return Err(unknown(&other)),
    })
}

pub(super) fn binary(
    lanes: usize,
    op: BinaryOperator,
    scalar: Scalar,
    left: &[u32],
    right: &[u32],
) -> Result<Vec<u32>> {
    use BinaryOperator as Op;
    let floats = |f: fn(f32, f32) -> f32| {
        let out = zip(lanes, left, right, |a, b| f(float(a), float(b)).to_bits());
        if scalar.width == 2 { map(&out, to_f16) } else { out }
    };
    let truths = |f: fn(f32, f32) -> bool| zip(lanes, left, right, |a, b| u32::from(f(float(a), float(b))));
    let signed =
        |f: fn(i32, i32) -> bool| zip(lanes, left, right, |a, b| u32::from(f(a.cast_signed(), b.cast_signed())));
    Ok(match (scalar.kind, op) {
        (ScalarKind::Float, Op::Add) => floats(|a, b| a + b),
        (ScalarKind::Float, Op::Subtract) => floats(|a, b| a - b),
        (ScalarKind::Float, Op::Multiply) => floats(|a, b| a * b),
        (ScalarKind::Float, Op::Divide) => floats(|a, b| a / b),
        (ScalarKind::Float, Op::Modulo) => floats(|a, b| a % b),
        (ScalarKind::Float, Op::Equal) => truths(|a, b| a == b),
        (ScalarKind::Float, Op::NotEqual) => truths(|a, b| a != b),
        (ScalarKind::Float, Op::Less) => truths(|a, b| a < b),
        (ScalarKind::Float, Op::LessEqual) => truths(|a, b| a <= b),
        (ScalarKind::Float, Op::Greater) => truths(|a, b| a > b),
        (ScalarKind::Float, Op::GreaterEqual) => truths(|a, b| a >= b),
        (ScalarKind::Sint | ScalarKind::Uint, Op::Add) => zip(lanes, left, right, u32::wrapping_add),
        (ScalarKind::Sint | ScalarKind::Uint, Op::Subtract) => zip(lanes, left, right, u32::wrapping_sub),
        (ScalarKind::Sint | ScalarKind::Uint, Op::Multiply) => zip(lanes, left, right, u32::wrapping_mul),
        // WGSL's own values for a division by zero.
        (ScalarKind::Uint, Op::Divide) => zip(lanes, left, right, |a, b| a.checked_div(b).unwrap_or(a)),
        (ScalarKind::Uint, Op::Modulo) => zip(lanes, left, right, |a, b| a.checked_rem(b).unwrap_or(0)),
        (ScalarKind::Sint, Op::Divide) => {
            zip(lanes, left, right, |a, b| a.cast_signed().checked_div(b.cast_signed()).map_or(a, i32::cast_unsigned))
        }
        (ScalarKind::Sint, Op::Modulo) => {
            zip(lanes, left, right, |a, b| a.cast_signed().checked_rem(b.cast_signed()).map_or(0, i32::cast_unsigned))
        }
        (ScalarKind::Sint | ScalarKind::Uint | ScalarKind::Bool, Op::Equal) => {
            zip(lanes, left, right, |a, b| u32::from(a == b))
        }
        (ScalarKind::Sint | ScalarKind::Uint | ScalarKind::Bool, Op::NotEqual) => {
            zip(lanes, left, right, |a, b| u32::from(a != b))
        }
        (ScalarKind::Uint, Op::Less) => zip(lanes, left, right, |a, b| u32::from(a < b)),
        (ScalarKind::Uint, Op::LessEqual) => zip(lanes, left, right, |a, b| u32::from(a <= b)),
        (ScalarKind::Uint, Op::Greater) => zip(lanes, left, right, |a, b| u32::from(a > b)),
        (ScalarKind::Uint, Op::GreaterEqual) => zip(lanes, left, right, |a, b| u32::from(a >= b)),
        (ScalarKind::Sint, Op::Less) => signed(|a, b| a < b),
        (ScalarKind::Sint, Op::LessEqual) => signed(|a, b| a <= b),
        (ScalarKind::Sint, Op::Greater) => signed(|a, b| a > b),
        (ScalarKind::Sint, Op::GreaterEqual) => signed(|a, b| a >= b),
        (ScalarKind::Sint | ScalarKind::Uint | ScalarKind::Bool, Op::And | Op::LogicalAnd) => {
            zip(lanes, left, right, |a, b| a & b)
        }
        (ScalarKind::Sint | ScalarKind::Uint | ScalarKind::Bool, Op::InclusiveOr | Op::LogicalOr) => {
            zip(lanes, left, right, |a, b| a | b)
        }
        (ScalarKind::Sint | ScalarKind::Uint, Op::ExclusiveOr) => zip(lanes, left, right, |a, b| a ^ b),
        (ScalarKind::Sint | ScalarKind::Uint, Op::ShiftLeft) => zip(lanes, left, right, u32::wrapping_shl),
        (ScalarKind::Uint, Op::ShiftRight) => zip(lanes, left, right, u32::wrapping_shr),
        (ScalarKind::Sint, Op::ShiftRight) => {
            zip(lanes, left, right, |a, b| a.cast_signed().wrapping_shr(b).cast_unsigned())
        }
        other => return Err(unknown(&other)),
    })
}

pub(super) fn math(lanes: usize, fun: MathFunction, scalar: Scalar, operands: &[Lanes]) -> Result<Vec<u32>> {
    use MathFunction as Fun;
    let arg = |at: usize| operands.get(at).map(|o| o.as_slice()).ok_or_else(|| unknown(&fun));
    let first = arg(0)?;
    let round = |out: Vec<u32>| if scalar.width == 2 { map(&out, to_f16) } else { out };
    let unary = |f: fn(f32) -> f32| round(map(first, |a| f(float(a)).to_bits()));
    let is = |kind: ScalarKind| scalar.kind == kind;
    let pick = |f: fn(f32, f32) -> f32, u: fn(u32, u32) -> u32, s: fn(i32, i32) -> i32, a: &[u32], b: &[u32]| {
        match scalar.kind {
            ScalarKind::Float => zip(lanes, a, b, |a, b| f(float(a), float(b)).to_bits()),
            ScalarKind::Sint => zip(lanes, a, b, |a, b| s(a.cast_signed(), b.cast_signed()).cast_unsigned()),
            _ => zip(lanes, a, b, u),
        }
    };
    Ok(match fun {
        Fun::Abs if is(ScalarKind::Float) => unary(f32::abs),
        Fun::Abs if is(ScalarKind::Sint) => map(first, |a| a.cast_signed().unsigned_abs()),
        Fun::Abs => first.to_vec(),
        Fun::Min => pick(f32::min, u32::min, i32::min, first, arg(1)?),
        Fun::Max => pick(f32::max, u32::max, i32::max, first, arg(1)?),
        Fun::Clamp => {
            let least = pick(f32::max, u32::max, i32::max, first, arg(1)?);
            pick(f32::min, u32::min, i32::min, &least, arg(2)?)
        }
        Fun::Exp if is(ScalarKind::Float) => unary(f32::exp),
        Fun::Exp2 if is(ScalarKind::Float) => unary(f32::exp2),
        Fun::Log if is(ScalarKind::Float) => unary(f32::ln),
        Fun::Log2 if is(ScalarKind::Float) => unary(f32::log2),
        Fun::Sqrt if is(ScalarKind::Float) => unary(f32::sqrt),
        Fun::InverseSqrt if is(ScalarKind::Float) => unary(|a| 1.0 / a.sqrt()),
        Fun::Tanh if is(ScalarKind::Float) => unary(f32::tanh),
        Fun::Floor if is(ScalarKind::Float) => unary(f32::floor),
        Fun::Ceil if is(ScalarKind::Float) => unary(f32::ceil),
        Fun::Trunc if is(ScalarKind::Float) => unary(f32::trunc),
        Fun::Round if is(ScalarKind::Float) => unary(f32::round_ties_even),
        Fun::Fma if is(ScalarKind::Float) => {
            let (b, c) = (arg(1)?, arg(2)?);
            round((0..first.len()).map(|i| float(first[i]).mul_add(float(b[i]), float(c[i])).to_bits()).collect())
        }
        Fun::Dot if is(ScalarKind::Float) => {
            let other = arg(1)?;
            let sum = |lane: usize| -> f32 {
                (lane..first.len()).step_by(lanes).map(|at| float(first[at]) * float(other[at])).sum()
            };
            round((0..lanes).map(|lane| sum(lane).to_bits()).collect())
        }
        Fun::CountOneBits => map(first, u32::count_ones),
        Fun::Unpack2x16float => {
            let half = |shift: u32| first.iter().map(move |&a| f16::from_bits((a >> shift) as u16).to_f32().to_bits());
            half(0).chain(half(16)).collect()
        }
        Fun::Pack2x16float => {
            let half = |at: usize| u32::from(f16::from_f32(float(first[at])).to_bits());
            (0..lanes).map(|lane| half(lane) | half(lanes + lane) << 16).collect()
        }
        other => return Err(unknown(&other)),
    })
}

/// A conversion to another kind and width, or without a width another reading of the same bits.
pub(super) fn convert_to(from: Scalar, kind: ScalarKind, width: Option<u8>, operand: &[u32]) -> Result<Vec<u32>> {
    use ScalarKind::{Bool, Float, Sint, Uint};
    Ok(match (from.kind, kind, width) {
        (_, _, None) if from.width == 4 => operand.to_vec(),
        (_, Bool, Some(_)) => map(operand, |a| u32::from(if from.kind == Float { float(a) != 0.0 } else { a != 0 })),
        (Float, Float, Some(2)) => map(operand, to_f16),
        (Float, Float, Some(4)) => operand.to_vec(),
        (Float, Uint, Some(4)) => map(operand, |a| float(a) as u32),
        (Float, Sint, Some(4)) => map(operand, |a| (float(a) as i32).cast_unsigned()),
        (Uint | Bool, Float, Some(width @ (2 | 4))) => {
            let out = map(operand, |a| (a as f32).to_bits());
            if width == 2 { map(&out, to_f16) } else { out }
        }
        (Sint, Float, Some(width @ (2 | 4))) => {
            let out = map(operand, |a| (a.cast_signed() as f32).to_bits());
            if width == 2 { map(&out, to_f16) } else { out }
        }
        (Uint | Sint | Bool, Uint | Sint, Some(4)) => operand.to_vec(),
        other => return Err(unknown(&other)),
    })
}
