//! Eight groups of four columns at a time: what pruning, compressing and decompressing do to one word of bits.
//!
//! A word of a mask and a word of 2:4 codes cover the same 32 columns, a nibble to a group, so choices are made in
//! *bits* (column c in bit c) by a handful of word operations for all eight groups, and elements are compared and moved
//! by plain loops without a branch, whose time does not depend on the weights. Elements are handled as bit patterns,
//! never as numbers, so that NaN payloads, the sign of zero and subnormals come through. Invariant: no function here
//! looks at more than its 32 columns, and columns past a matrix's last one are given as zeros.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use crate::matrix::Element;

/// Columns of a word.
pub(crate) const COLUMNS: usize = 32;

/// Values of a word.
pub(crate) const VALUES: usize = COLUMNS / 2;

/// Groups of a word.
const GROUPS: usize = 8;

/// The lowest bit of each group.
const ONES: u32 = 0x1111_1111;

/// Elements as bit patterns: all that is looked at of what is only stored.
pub(crate) trait Bits: Pod + Send + Sync {
    /// The bits without the sign of a floating-point number: all 0 in a zero, and in nothing else.
    fn absolute(self) -> u32;
}

macro_rules! bits {
    ($($type:ty, $x:ident => $absolute:expr;)*) => {$(
        impl Bits for $type {
            #[inline(always)]
            fn absolute(self) -> u32 {
                let $x = self;
                $absolute
            }
        }
    )*};
}
// Arrays are floating-point numbers as files have them, at any address and little-endian; bytes are whole numbers.
bits! {
    f32, x => x.to_bits() & 0x7fff_ffff;
    f16, x => u32::from(x.to_bits() & 0x7fff);
    bf16, x => u32::from(x.to_bits() & 0x7fff);
    [u8; 4], x => u32::from_le_bytes(x) & 0x7fff_ffff;
    [u8; 2], x => u32::from(u16::from_le_bytes(x) & 0x7fff);
    [u8; 1], x => u32::from(x[0] & 0x7f);
    u8, x => u32::from(x);
}

/// Whether it is not zero. -0.0 is zero, NaN is not.
#[inline(always)]
pub(crate) fn non_zero<T: Bits>(x: T) -> bool {
    x.absolute() != 0
}

/// Elements that are compared as numbers.
pub(crate) trait Float: Bits + Element {
    /// The bits of |∞|; larger ones are NaN.
    const INFINITE: u32;
    /// |self| in f32, exact, NaN staying NaN.
    fn magnitude(self) -> f32;
}

impl Float for f32 {
    const INFINITE: u32 = 0x7f80_0000;

    #[inline(always)]
    fn magnitude(self) -> f32 {
        self.abs()
    }
}

impl Float for f16 {
    const INFINITE: u32 = 0x7c00;

    #[inline(always)]
    fn magnitude(self) -> f32 {
        // Not `to_f32`, which asks the processor what it has for each element. Exponents differ by 112 in their bias; a
        // subnormal becomes normal in the product.
        let bits = self.absolute();
        let scaled = f32::from_bits(bits << 13) * f32::from_bits((127 + 112) << 23);
        let top = if bits >= Self::INFINITE { f32::INFINITY.to_bits() } else { 0 };
        f32::from_bits(scaled.to_bits() | top)
    }
}

impl Float for bf16 {
    const INFINITE: u32 = 0x7f80;

    #[inline(always)]
    fn magnitude(self) -> f32 {
        f32::from_bits(self.absolute() << 16)
    }
}

/// What columns are ranked by.
pub(crate) trait Score: Copy + Zeroable {
    type Rank: Copy + Ord + From<bool>;
    /// Above the rank of every number.
    const NAN: Self::Rank;
    /// In the order of the numbers; 0 for zero, and [`Score::NAN`] or more for a NaN.
    fn bits_of(self) -> Self::Rank;
    /// The same, and for every NaN [`Score::NAN`].
    #[inline(always)]
    fn rank(self) -> Self::Rank {
        self.bits_of().min(Self::NAN)
    }
}

/// Of magnitudes: their bits, which are in the order of the numbers.
impl<T: Float> Score for T {
    type Rank = i32;
    const NAN: i32 = T::INFINITE as i32 + 1;

    #[inline(always)]
    fn bits_of(self) -> i32 {
        self.absolute() as i32
    }
}

/// A sum of magnitudes.
#[derive(Clone, Copy, Default, Zeroable)]
#[repr(transparent)]
pub(crate) struct Sum(pub(crate) f64);

impl Score for Sum {
    type Rank = i64;
    const NAN: i64 = f64::INFINITY.to_bits() as i64 + 1;

    #[inline(always)]
    fn bits_of(self) -> i64 {
        // A NaN's sign may be anything.
        self.0.abs().to_bits() as i64
    }
}

/// The two of each group of 32 columns with the largest scores, ties to the lower column. Without `NAN` there must be
/// none.
#[inline(always)]
pub(crate) fn best_two<S: Score, const NAN: bool>(x: &[S; COLUMNS]) -> u32 {
    let mut kept = 0;
    for group in 0..GROUPS {
        let (a, b, c, d) = (x[4 * group], x[4 * group + 1], x[4 * group + 2], x[4 * group + 3]);
        let (a, b, c, d) = match NAN {
            true => (a.rank(), b.rank(), c.rank(), d.rank()),
            false => (a.bits_of(), b.bits_of(), c.bits_of(), d.bits_of()),
        };
        let wins = flag(a >= b, 0) | flag(a >= c, 1) | flag(a >= d, 2) | flag(b >= c, 3) | flag(b >= d, 4);
        kept |= u32::from(BEST_TWO[(wins | flag(c >= d, 5)) as usize]) << (4 * group);
    }
    kept
}

/// Columns for which a condition holds, such as [`non_zero`].
#[inline(always)]
pub(crate) fn columns<T: Copy>(x: &[T; COLUMNS], condition: impl Fn(T) -> bool) -> u32 {
    let mut word = 0;
    for (col, &x) in x.iter().enumerate() {
        word |= flag(condition(x), col);
    }
    word
}

/// A flag as a bit.
#[inline(always)]
fn flag(set: bool, at: usize) -> u32 {
    u32::from(set) << at
}

/// The columns that win two of their three comparisons or more, by who wins: 0 over 1, 0 over 2, 0 over 3, 1 over 2, 1
/// over 3, 2 over 3, a bit each. A table, so that nothing here is left to how a compiler deals with branches.
const BEST_TWO: [u8; 64] = {
    const fn two(x: usize, y: usize, z: usize) -> u8 {
        (x + y + z >= 2) as u8
    }
    let mut table = [0; 64];
    let mut wins = 0;
    while wins < 64 {
        let [ab, ac, ad, bc, bd, cd] =
            [wins & 1, wins >> 1 & 1, wins >> 2 & 1, wins >> 3 & 1, wins >> 4 & 1, wins >> 5];
        let (a, b) = (two(ab, ac, ad), two(1 - ab, bc, bd));
        let (c, d) = (two(1 - ac, 1 - bc, cd), two(1 - ad, 1 - bd, 1 - cd));
        table[wins] = a | b << 1 | c << 2 | d << 3;
        wins += 1;
    }
    table
};

/// The lowest bit of each group in which two bits or more are set.
const fn pairs(bits: u32) -> u32 {
    let (a, b, c, d) = (bits, bits >> 1, bits >> 2, bits >> 3);
    ((a & b) | (a & c) | (a & d) | (b & c) | (b & d) | (c & d)) & ONES
}

/// The lowest bit of each group in which three bits or more are set.
pub(crate) const fn over_full(bits: u32) -> u32 {
    let (a, b, c, d) = (bits, bits >> 1, bits >> 2, bits >> 3);
    ((a & b & (c | d)) | (c & d & (a | b))) & ONES
}

/// The coded positions of groups in which at most two bits are set: those, and in an under-full group the others that
/// the [format](mod@crate::format) says.
pub(crate) const fn coded(bits: u32) -> u32 {
    // As torch's converter: position 2 where one is missing, then position 3.
    let bits = bits | (ONES & !pairs(bits)) << 2;
    bits | (ONES & !pairs(bits)) << 3
}

/// The codes of groups in which two bits are set.
pub(crate) const fn codes(bits: u32) -> u32 {
    let (a, b, c, d) = (bits & ONES, bits >> 1 & ONES, bits >> 2 & ONES, bits >> 3 & ONES);
    // The lower position is 0, 1 or 2, the upper one 3, 2 or 1.
    let first = (!a & b) | (ONES & !a & !b) << 1;
    let second = (d | (ONES & !c)) | (c | d) << 1;
    first | second << 2
}

/// The lower and the upper positions that codes stand for, as bits. A nibble of zero, which is padding, is twice
/// position 0.
pub(crate) const fn positions(codes: u32) -> (u32, u32) {
    const fn one_hot(low: u32, high: u32) -> u32 {
        let (low, high) = (low & ONES, high & ONES);
        (ONES & !low & !high) | (low & !high) << 1 | (high & !low) << 2 | (low & high) << 3
    }
    (one_hot(codes, codes >> 1), one_hot(codes >> 2, codes >> 3))
}

/// The elements at the positions that `codes` stand for, two to a group, of the columns that `kept` has; zero in place
/// of others.
#[inline(always)]
pub(crate) fn gather<T: Bits>(x: &[T; COLUMNS], codes: u32, kept: u32, values: &mut [T; VALUES]) {
    let (first, second) = positions(codes);
    if (first | second) & !kept == 0 {
        return pick(x, codes, values);
    }
    let mut rest = *x;
    for (i, x) in rest.iter_mut().enumerate() {
        if kept >> i & 1 == 0 {
            *x = T::zeroed();
        }
    }
    pick(&rest, codes, values);
}

/// The elements at the positions that `codes` stand for.
#[inline(always)]
fn pick<T: Bits>(x: &[T; COLUMNS], codes: u32, values: &mut [T; VALUES]) {
    for (i, value) in values.iter_mut().enumerate() {
        *value = x[i / 2 * 4 + (codes >> (2 * i) & 3) as usize];
    }
}

/// The inverse of [`gather`]: two values to a group back at their positions, and zeros elsewhere.
#[inline(always)]
pub(crate) fn scatter<T: Bits>(values: &[T; VALUES], codes: u32, x: &mut [T; COLUMNS]) {
    *x = [T::zeroed(); COLUMNS];
    for (i, &value) in values.iter().enumerate() {
        x[i / 2 * 4 + (codes >> (2 * i) & 3) as usize] = value;
    }
}

/// Makes one row out of another, dense or compressed, word by word, `IN` elements to a word becoming `OUT`. The last
/// word may be ragged on both sides: what it lacks reads as zero, and what it has too much is dropped.
#[inline(always)]
pub(crate) fn each_word<T: Bits, const IN: usize, const OUT: usize>(
    from: &[T],
    to: &mut [T],
    mut word: impl FnMut(usize, &[T; IN], &mut [T; OUT]),
) {
    let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<IN>(), to.as_chunks_mut::<OUT>());
    for (w, (from, to)) in from.iter().zip(to.iter_mut()).enumerate() {
        word(w, from, to);
    }
    // Three columns or two have a whole group's values, so that one side may end with a whole word where the other
    // does not.
    if let Some(last) = to.get_mut(from.len()) {
        word(from.len(), &padded(from_rest), last);
    } else if !to_rest.is_empty() {
        let mut rest = [T::zeroed(); OUT];
        match from.get(to.len()) {
            Some(last) => word(to.len(), last, &mut rest),
            None => word(from.len(), &padded(from_rest), &mut rest),
        }
        to_rest.copy_from_slice(&rest[..to_rest.len()]);
    }
}

/// The elements that a ragged word has, and zeros.
#[inline(always)]
pub(crate) fn padded<T: Copy + Zeroable, const N: usize>(x: &[T]) -> [T; N] {
    let mut all = [T::zeroed(); N];
    all[..x.len()].copy_from_slice(x);
    all
}

/// The bits of the first so many columns of a word.
pub(crate) const fn first(columns: usize) -> u32 {
    if columns >= COLUMNS { u32::MAX } else { (1 << columns) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{code_of, positions_of};

    /// Every group's bits, in every place of a word, against the tables of the format.
    #[test]
    fn words_do_to_each_group_what_the_tables_say() {
        for bits in 0..16u32 {
            for group in 0..GROUPS {
                // The other groups hold two that must not leak.
                let word = 0x9999_9999 & !(0xf << (4 * group)) | bits << (4 * group);
                assert_eq!(over_full(word) >> (4 * group) & 0xf, u32::from(bits.count_ones() > 2), "{bits:04b}");
                let Some(code) = code_of(bits as u8) else { continue };
                let all = coded(word);
                assert_eq!(codes(all) >> (4 * group) & 0xf, u32::from(code), "{bits:04b} in group {group}");
                assert_eq!(codes(all) | 0xf << (4 * group), 0xcccc_cccc | 0xf << (4 * group));
                let expected = positions_of(code).map(|(a, b)| (1 << a, 1 << b));
                let (first, second) = positions(codes(all));
                assert_eq!(Some((first >> (4 * group) & 0xf, second >> (4 * group) & 0xf)), expected);
                assert_eq!(first | second, all);
            }
        }
        assert_eq!(positions(0), (ONES, ONES));
    }

    #[test]
    fn magnitudes_of_halves_are_exact() {
        for bits in 0..=u16::MAX {
            let (x, y) = (f16::from_bits(bits), bf16::from_bits(bits));
            let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same(x.magnitude(), x.to_f32().abs()), "{bits:04x}");
            assert!(same(y.magnitude(), y.to_f32().abs()), "{bits:04x}");
        }
    }
}
