//! Eight groups of four columns at a time: what pruning, compressing and decompressing do to one word of bits.
//!
//! A word of a mask and a word of 2:4 codes cover the same 32 columns, a nibble to a group, so choices are made in *bits*
//! (column c in bit c) by a handful of word operations for all eight groups, and elements are moved by plain loops over
//! lanes, one for each group, without a branch: the compiler turns those into whatever vectors the target has. Elements
//! are handled as bit patterns, never as numbers, so that NaN payloads, the sign of zero and subnormals come through.
//! Invariant: no function here looks at more than its 32 columns, and columns past a matrix's last one are given as
//! zeros.

use bytemuck::Zeroable;
use half::{bf16, f16};

use crate::matrix::Element;

/// Columns of a word.
pub(crate) const COLUMNS: usize = 32;

/// Values of a word.
pub(crate) const VALUES: usize = COLUMNS / 2;

/// Groups of a word, each a lane.
const GROUPS: usize = 8;

/// The lowest bit of each group.
const ONES: u32 = 0x1111_1111;

/// Elements as bit patterns.
pub(crate) trait Bits: Element {
    /// The bits of |∞|; larger ones are NaN. The bit above them is the sign.
    const INFINITE: u32;
    fn bits(self) -> u32;
    /// From the lowest bits.
    fn of_bits(bits: u32) -> Self;
    /// |self| in f32, exact, NaN staying NaN.
    fn magnitude(self) -> f32;
}

/// The bits of |x|.
#[inline(always)]
fn absolute<T: Bits>(x: T) -> u32 {
    x.bits() & (u32::MAX >> (8 * (4 - size_of::<T>()) + 1))
}

impl Bits for f32 {
    const INFINITE: u32 = 0x7f80_0000;

    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits()
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits)
    }

    #[inline(always)]
    fn magnitude(self) -> f32 {
        self.abs()
    }
}

impl Bits for f16 {
    const INFINITE: u32 = 0x7c00;

    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }

    #[inline(always)]
    fn magnitude(self) -> f32 {
        // Not `to_f32`, which asks the processor what it has for each element. Exponents differ by 112 in their bias; a
        // subnormal becomes normal in the product.
        let bits = absolute(self);
        let scaled = f32::from_bits(bits << 13) * f32::from_bits((127 + 112) << 23);
        let top = if bits >= Self::INFINITE { f32::INFINITY.to_bits() } else { 0 };
        f32::from_bits(scaled.to_bits() | top)
    }
}

impl Bits for bf16 {
    const INFINITE: u32 = 0x7f80;

    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }

    #[inline(always)]
    fn magnitude(self) -> f32 {
        f32::from_bits(absolute(self) << 16)
    }
}

/// What columns are ranked by: larger is better.
pub(crate) trait Score: Copy + PartialOrd {
    const ZERO: Self;
    /// Above every number; all NaNs are equal.
    const NAN: Self;
}

impl Score for i32 {
    const ZERO: Self = 0;
    const NAN: Self = Self::MAX;
}

impl Score for i64 {
    const ZERO: Self = 0;
    const NAN: Self = Self::MAX;
}

/// The rank of |x| among elements of its type: the bits of |x|, which are in the order of the numbers.
#[inline(always)]
pub(crate) fn rank<T: Bits>(x: T) -> i32 {
    let bits = absolute(x);
    if bits > T::INFINITE { i32::NAN } else { bits as i32 }
}

/// The rank of a sum of magnitudes.
#[inline(always)]
pub(crate) fn rank_sum(sum: f64) -> i64 {
    if sum.is_nan() { i64::NAN } else { sum.to_bits() as i64 }
}

/// The bit of position `i` of group `group`.
#[inline(always)]
const fn bit(group: usize, i: usize) -> u32 {
    1 << (4 * group + i)
}

/// One number for each column, by position and then by group: a lane for each group.
pub(crate) type Lanes<S> = [[S; GROUPS]; 4];

/// What `f` makes of each column.
#[inline(always)]
pub(crate) fn lanes<T: Copy, S: Score>(x: &[T; COLUMNS], f: impl Fn(T) -> S) -> Lanes<S> {
    let mut lanes = [[S::ZERO; GROUPS]; 4];
    for group in 0..GROUPS {
        for i in 0..4 {
            lanes[i][group] = f(x[4 * group + i]);
        }
    }
    lanes
}

/// The two columns of each group with the largest scores, ties to the lower column.
#[inline(always)]
pub(crate) fn best_two<S: Score>([a, b, c, d]: &Lanes<S>) -> u32 {
    let mut word = 0;
    for group in 0..GROUPS {
        let [a, b, c, d] = [a[group], b[group], c[group], d[group]];
        let (ab, ac, ad, bc, bd, cd) = (a >= b, a >= c, a >= d, b >= c, b >= d, c >= d);
        // Of four columns those stay that win two of their three comparisons or more.
        let two = |x: bool, y: bool, z: bool| (x & y) | (x & z) | (y & z);
        let kept = [two(ab, ac, ad), two(!ab, bc, bd), two(!ac, !bc, cd), two(!ad, !bd, !cd)];
        for (i, kept) in kept.into_iter().enumerate() {
            word |= if kept { bit(group, i) } else { 0 };
        }
    }
    word
}

/// Columns whose score is not zero.
#[inline(always)]
pub(crate) fn scored<S: Score>(lanes: &Lanes<S>) -> u32 {
    let mut word = 0;
    for (i, lane) in lanes.iter().enumerate() {
        for (group, &score) in lane.iter().enumerate() {
            word |= if score == S::ZERO { 0 } else { bit(group, i) };
        }
    }
    word
}

/// Columns that are not zero; -0.0 is.
#[inline(always)]
pub(crate) fn non_zeros<T: Bits>(x: &[T; COLUMNS]) -> u32 {
    scored(&lanes(x, |x| absolute(x) as i32))
}

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
    let (first, second) = positions(codes);
    for group in 0..GROUPS {
        let (a, b) = (values[2 * group].bits(), values[2 * group + 1].bits());
        for i in 0..4 {
            let one = if first & bit(group, i) == 0 { 0 } else { a };
            let other = if second & bit(group, i) == 0 { 0 } else { b };
            x[4 * group + i] = T::of_bits(one | other);
        }
    }
}

/// Makes a row of `B`s out of a row of `A`s word by word, `IN` elements to a word becoming `OUT`. The last word may be
/// ragged on both sides: what it lacks reads as zero, and what it has too much is dropped.
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
