//! How weights lie in the CPU device's memory: in the order in which its kernels read them, in their storage type.
//!
//! **2:4.** Rows are cut into *blocks* of [`BLOCK`], and k into *units* of [`UNIT`]. Two neighbouring rows are a
//! *pair*; a unit of a pair is 16 consecutive values, four for each group: the two of the upper row, then the two of
//! the lower. So one vector of activations, permuted within its groups, meets one vector of values (see `gemv` in
//! sparse.rs). Units lie by block, then by *step* of k, then by pair, then along k. A step is what a panel of
//! activations in the first-level cache holds, so both kernels read a block from start to end, as hardware prefetchers
//! like it: with rows contiguous instead, each pair began on a page of its own, and the product with many tokens took
//! 1.1 to 1.25 times as long (EPYC 7003, AVX2, 768x512x3072 and 4096x128x4096).
//!
//! Codes lie in the same order. At V = 1 a unit has a word: for each group a nibble of the upper row, then one of the
//! lower. At V > 1 rows of a pair share their codes, and each V rows of a block have 16 bits per unit.
//!
//! **Dense and masked.** k-major, rows padded to [`UNIT`]: the crate `gemm` packs W anew in every call, and with few
//! tokens packing from row-major weights costs more than the product (768 x 32 x 3072 took 8.5 ms, and 1.7 ms from
//! k-major weights: benches/results/2026-11-22-amd-epyc). Mask bits lie alike, 16 rows to a word.
//!
//! Invariants: padding is zero, and codes of padding name elements of their own group.

use half::{bf16, f16};

use super::Cpu;
use super::memory::{Aligned, Arena};
use crate::format::Sparse24;
use crate::mask::{Mask, VectorLen};
use crate::matrix::{DType, Element, Elements, Matrix, each_dtype};

/// Rows of a block of 2:4 weights. No pattern spans two: the longest vector length is as long.
pub(crate) const BLOCK: usize = 128;

/// k of a unit: four groups. Also what rows of dense weights and mask bits are padded to.
pub(super) const UNIT: usize = 16;

/// Weights as this device keeps them.
#[derive(Debug)]
pub(crate) enum CpuWeights {
    Dense(Dense),
    Sparse24(Packed),
}

/// Elements in their storage type.
#[derive(Debug)]
pub(super) enum Values {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    Bf16(Aligned<bf16>),
}

/// Runs `$body` with `$v` bound to the elements, whatever their type.
macro_rules! each_type {
    ($values:expr, $v:ident => $body:expr) => {
        match $values {
            $crate::cpu::weights::Values::F32($v) => $body,
            $crate::cpu::weights::Values::F16($v) => $body,
            $crate::cpu::weights::Values::Bf16($v) => $body,
        }
    };
}
pub(super) use each_type;

/// Elements that a [`Values`] can hold.
trait Kept: Element {
    fn keep(data: Aligned<Self>) -> Values;
}

impl Kept for f32 {
    fn keep(data: Aligned<Self>) -> Values {
        Values::F32(data)
    }
}

impl Kept for f16 {
    fn keep(data: Aligned<Self>) -> Values {
        Values::F16(data)
    }
}

impl Kept for bf16 {
    fn keep(data: Aligned<Self>) -> Values {
        Values::Bf16(data)
    }
}

impl Values {
    fn bytes(&self) -> usize {
        each_type!(self, v => size_of_val(&**v))
    }

    fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }
}

/// Dense weights, k-major, and the mask that may go with them.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(super) m: usize,
    pub(super) k: usize,
    /// `m` padded to [`UNIT`].
    pub(super) stride: usize,
    /// `k` rows of `stride`.
    pub(super) values: Values,
    /// `k` rows of `stride / UNIT` words.
    pub(super) mask: Option<Vec<u16>>,
}

/// 2:4 weights.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(super) vector: VectorLen,
    pub(super) m: usize,
    pub(super) k: usize,
    /// Units of a step of k; the last step may have fewer.
    pub(super) step: usize,
    pub(super) values: Values,
    pub(super) codes: Codes,
}

/// The codes of 2:4 weights.
#[derive(Debug)]
pub(super) enum Codes {
    /// V = 1: a word for each unit of a pair.
    Own(Aligned<u32>),
    /// V > 1: 16 bits for each unit of V rows.
    Shared(Aligned<u16>),
}

impl CpuWeights {
    /// Dense weights, and the mask to apply whenever they are used.
    pub(crate) fn dense(w: &Matrix, mask: Option<&Mask>, cpu: &Cpu) -> Self {
        fn k_major<T: Kept>(w: &[T], m: usize, k: usize, stride: usize, arena: &Arena) -> Values {
            let mut out = arena.zeros::<T>(k * stride);
            // In blocks, so that neither side strides through more lines than the cache holds.
            for row0 in (0..m).step_by(UNIT) {
                for col in 0..k {
                    for row in row0..m.min(row0 + UNIT) {
                        out[col * stride + row] = w[row * k + col];
                    }
                }
            }
            T::keep(out)
        }
        let (m, k) = (w.rows(), w.cols());
        // Without columns there is nothing to lay out, however many rows there are said to be.
        let rows = if k == 0 { 0 } else { m };
        let stride = m.checked_next_multiple_of(UNIT).unwrap_or(m);
        let values = each_dtype!(w.elements(), v => k_major(v, rows, k, stride, &cpu.arena));
        let mask = mask.map(|mask| {
            let words = stride / UNIT;
            let mut bits = vec![0u16; k * words];
            for row in 0..rows {
                for (word, &kept) in
                    mask.words()[row * mask.words_per_row()..][..mask.words_per_row()].iter().enumerate()
                {
                    let mut kept = kept;
                    while kept != 0 {
                        let col = 32 * word + kept.trailing_zeros() as usize;
                        bits[col * words + row / UNIT] |= 1 << (row % UNIT);
                        kept &= kept - 1;
                    }
                }
            }
            bits
        });
        Self::Dense(Dense { m, k, stride, values, mask })
    }

    /// 2:4 weights, in steps of k that suit the device's vectors and caches.
    pub(crate) fn sparse24(w: &Sparse24, cpu: &Cpu) -> Self {
        let packed = Packed {
            vector: w.vector(),
            m: w.m(),
            k: w.k(),
            step: super::sparse::step_units(w.vector(), cpu.simd().level(), cpu.first_cache),
            values: Values::F32(Aligned::EMPTY),
            codes: Codes::Own(Aligned::EMPTY),
        };
        let mut packed = packed.sized(w.dtype(), &cpu.arena);
        packed.fill(w.values(), w.meta());
        Self::Sparse24(packed)
    }

    /// Compressed weights of the same sizes, type and vector length in place of these, which are 2:4.
    pub(crate) fn replace(&mut self, values: &Elements, meta: &[u32]) {
        if let Self::Sparse24(packed) = self {
            packed.fill(values, meta);
        }
    }

    /// The compressed weights that these are, which are 2:4, over others of the same sizes and type.
    pub(crate) fn compressed(&self, values: &mut Elements, meta: &mut [u32]) {
        if let Self::Sparse24(packed) = self {
            packed.compressed(values, meta);
        }
    }

    /// The type in which values are kept.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Dense(Dense { values, .. }) | Self::Sparse24(Packed { values, .. }) => values.dtype(),
        }
    }

    /// Bytes that [`CpuWeights::dense`] will take.
    pub(crate) fn dense_bytes(m: usize, k: usize, dtype: DType, masked: bool) -> u128 {
        let padded = k as u128 * (m as u128).next_multiple_of(UNIT as u128);
        padded * dtype.bytes() as u128 + if masked { padded / 8 } else { 0 }
    }

    /// Bytes that [`CpuWeights::sparse24`] will take.
    pub(crate) fn sparse24_bytes(m: usize, k: usize, vector: VectorLen, dtype: DType) -> u128 {
        let units = k.div_ceil(UNIT) as u128;
        let values = m.div_ceil(2) as u128 * units * (UNIT * dtype.bytes()) as u128;
        let codes = match vector {
            VectorLen::ONE => m.div_ceil(2) as u128 * units * 4,
            shared => m.div_ceil(shared.get()) as u128 * units * 2,
        };
        values + codes
    }

    /// Bytes that the weights take on this device.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.values.bytes() + w.mask.as_ref().map_or(0, |mask| size_of_val(&**mask)),
            Self::Sparse24(w) => {
                let codes = match &w.codes {
                    Codes::Own(words) => size_of_val(&**words),
                    Codes::Shared(words) => size_of_val(&**words),
                };
                w.values.bytes() + codes
            }
        }
    }
}

/// Where the units of some step of a block begin.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Units of k.
    pub(super) units: usize,
    /// First unit of the values, and of the codes at V = 1. Pair `p` begins `p * units` later.
    pub(super) values: usize,
    /// First unit of the codes at V > 1. Pattern `p` of the block begins `p * units` later.
    pub(super) codes: usize,
}

impl Packed {
    /// Units of k of a row.
    pub(super) fn units(&self) -> usize {
        self.k.div_ceil(UNIT)
    }

    /// Number of blocks of rows.
    pub(super) fn blocks(&self) -> usize {
        self.m.div_ceil(BLOCK)
    }

    /// Rows of a block, without padding.
    pub(super) fn rows(&self, block: usize) -> usize {
        BLOCK.min(self.m - block * BLOCK)
    }

    /// Pairs of rows of a block; the last of an odd number of rows is half padding.
    pub(super) fn pairs(&self, block: usize) -> usize {
        self.rows(block).div_ceil(2)
    }

    /// The two columns of a group that a row keeps, counted from the group's first. Of groups past the last, any two.
    pub(super) fn columns(&self, row: usize, group: usize) -> [usize; 2] {
        if group >= self.k.div_ceil(4) || row >= self.m {
            return [0, 1];
        }
        let (block, within) = (row / BLOCK, row % BLOCK);
        let step = group / 4 / self.step;
        let Step { units, values, codes } = self.step(block, step);
        let unit = group / 4 - step * self.step;
        let code = match &self.codes {
            Codes::Own(words) => words[values + within / 2 * units + unit] >> (8 * (group % 4) + 4 * (row % 2)),
            Codes::Shared(words) => {
                u32::from(words[codes + within / self.vector.get() * units + unit]) >> (4 * (group % 4))
            }
        };
        [code & 3, code >> 2 & 3].map(|column| column as usize)
    }

    /// Tells of each unit of a row which it is, and where the first of its values lies: two of each group, four apart.
    #[inline(always)]
    pub(super) fn each_unit_of(&self, row: usize, mut f: impl FnMut(usize, usize)) {
        let (block, within) = (row / BLOCK, row % BLOCK);
        for step in 0..self.steps() {
            let Step { units, values, .. } = self.step(block, step);
            for unit in 0..units {
                f(step * self.step + unit, (values + within / 2 * units + unit) * UNIT + row % 2 * 2);
            }
        }
    }

    /// Patterns of a block at V > 1.
    pub(super) fn patterns(&self, block: usize) -> usize {
        self.rows(block).div_ceil(self.vector.get())
    }

    pub(super) fn steps(&self) -> usize {
        self.units().div_ceil(self.step)
    }

    pub(super) fn step(&self, block: usize, step: usize) -> Step {
        let first = step * self.step;
        Step {
            units: self.step.min(self.units() - first),
            values: block * (BLOCK / 2) * self.units() + first * self.pairs(block),
            codes: block * (BLOCK / self.vector.get()) * self.units() + first * self.patterns(block),
        }
    }

    /// With room for values and codes, all zero.
    fn sized(mut self, dtype: DType, arena: &Arena) -> Self {
        // Without columns there is nothing to lay out, however many rows there are said to be.
        let rows = if self.k == 0 { 0 } else { self.m };
        let units = rows.div_ceil(2) * self.units();
        self.values = match dtype {
            DType::F32 => Values::F32(arena.zeros(units * UNIT)),
            DType::F16 => Values::F16(arena.zeros(units * UNIT)),
            DType::Bf16 => Values::Bf16(arena.zeros(units * UNIT)),
        };
        self.codes = if self.vector == VectorLen::ONE {
            Codes::Own(arena.zeros(units))
        } else {
            let patterns: usize = (0..rows.div_ceil(BLOCK)).map(|b| self.patterns(b)).sum();
            Codes::Shared(arena.zeros(patterns * self.units()))
        };
        self
    }

    /// Takes over values and metadata, laid out as in the format.
    fn fill(&mut self, values: &Elements, meta: &[u32]) {
        let Self { values: own, codes, .. } = self;
        let (mut own, mut codes) =
            (std::mem::replace(own, Values::F32(Aligned::EMPTY)), std::mem::replace(codes, Codes::Own(Aligned::EMPTY)));
        match (&mut own, values) {
            (Values::F32(own), Elements::F32(values)) => self.place(own, values),
            (Values::F16(own), Elements::F16(values)) => self.place(own, values),
            (Values::Bf16(own), Elements::Bf16(values)) => self.place(own, values),
            // Refused when the call is prepared.
            _ => {}
        }
        let (v, words) = (self.vector.get(), self.k.div_ceil(32));
        let code = |row: usize, group: usize| meta[row / v * words + group / 8] >> (4 * (group % 8)) & 0xf;
        match &mut codes {
            Codes::Own(codes) => {
                codes.fill(0);
                self.each_group(|row, group, unit, _| {
                    codes[unit] |= code(row, group) << (8 * (group % 4) + 4 * (row % 2));
                });
            }
            Codes::Shared(codes) => {
                codes.fill(0);
                self.each_group(|row, group, _, unit| {
                    if row % v == 0 {
                        codes[unit] |= (code(row, group) << (4 * (group % 4))) as u16;
                    }
                });
            }
        }
        (self.values, self.codes) = (own, codes);
    }

    fn place<T: Kept>(&self, own: &mut [T], values: &[T]) {
        let stride = 2 * self.k.div_ceil(4);
        self.each_group(|row, group, unit, _| {
            let at = unit * UNIT + group % 4 * 4 + row % 2 * 2;
            own[at..at + 2].copy_from_slice(&values[row * stride + 2 * group..][..2]);
        });
    }

    /// The inverse of [`Packed::fill`].
    fn compressed(&self, values: &mut Elements, meta: &mut [u32]) {
        match (&self.values, values) {
            (Values::F32(own), Elements::F32(values)) => self.gather_values(own, values),
            (Values::F16(own), Elements::F16(values)) => self.gather_values(own, values),
            (Values::Bf16(own), Elements::Bf16(values)) => self.gather_values(own, values),
            // Refused when the call is prepared.
            _ => {}
        }
        meta.fill(0);
        let (v, words) = (self.vector.get(), self.k.div_ceil(32));
        self.each_group(|row, group, unit, shared| {
            if row % v == 0 {
                let code = match &self.codes {
                    Codes::Own(codes) => codes[unit] >> (8 * (group % 4) + 4 * (row % 2)) & 0xf,
                    Codes::Shared(codes) => u32::from(codes[shared] >> (4 * (group % 4)) & 0xf),
                };
                meta[row / v * words + group / 8] |= code << (4 * (group % 8));
            }
        });
    }

    fn gather_values<T: Kept>(&self, own: &[T], values: &mut [T]) {
        let stride = 2 * self.k.div_ceil(4);
        self.each_group(|row, group, unit, _| {
            let at = unit * UNIT + group % 4 * 4 + row % 2 * 2;
            values[row * stride + 2 * group..][..2].copy_from_slice(&own[at..at + 2]);
        });
    }

    /// Calls `f` with each row and group, the unit of its values and the unit of its shared codes.
    #[inline(always)]
    fn each_group(&self, mut f: impl FnMut(usize, usize, usize, usize)) {
        let groups = self.k.div_ceil(4);
        for row in 0..if groups == 0 { 0 } else { self.m } {
            let (block, within) = (row / BLOCK, row % BLOCK);
            let pattern = within / self.vector.get();
            for step in 0..self.steps() {
                let Step { units, values, codes } = self.step(block, step);
                let (values, codes) = (values + within / 2 * units, codes + pattern * units);
                let first = step * self.step * 4;
                for group in first..groups.min(first + 4 * units) {
                    f(row, group, values + (group - first) / 4, codes + (group - first) / 4);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::prune;
    use crate::simd::SimdLevel;

    /// Every unit of values and codes is that of exactly one place of the matrix.
    #[test]
    fn packed_weights_hold_each_value_and_code_once() {
        for (m, k) in [(1, 1), (2, 16), (3, 33), (129, 100), (260, 90)] {
            for v in VectorLen::ALL {
                let numbers: Vec<f32> = (0..m * k).map(|i| (i * 7919 % 4093) as f32 + 1.0).collect();
                let w = Matrix::from_f32(m, k, &numbers).unwrap();
                let w = Sparse24::compress(&w, &prune::random(m, k, v, 7).unwrap()).unwrap();
                let CpuWeights::Sparse24(packed) =
                    CpuWeights::sparse24(&w, &Cpu::new(Some(1), Some(SimdLevel::Scalar)).unwrap())
                else {
                    unreachable!()
                };
                let bytes = CpuWeights::sparse24_bytes(m, k, v, DType::F32);
                let codes = match &packed.codes {
                    Codes::Own(words) => size_of_val(&**words),
                    Codes::Shared(words) => size_of_val(&**words),
                };
                assert_eq!(bytes, (packed.values.bytes() + codes) as u128, "m {m}, k {k}, V {v}");
                let Values::F32(values) = &packed.values else { unreachable!() };
                let mut kept = 0;
                packed.each_group(|row, group, unit, shared| {
                    let at = unit * UNIT + group % 4 * 4 + row % 2 * 2;
                    let expected = [0, 1].map(|j| w.values().get(row * w.k_physical() + 2 * group + j));
                    assert_eq!(values[at..at + 2], expected);
                    kept += expected.iter().filter(|x| **x != 0.0).count();
                    let code = w.meta()[row / v.get() * w.meta_cols() + group / 8] >> (4 * (group % 8)) & 0xf;
                    let packed = match &packed.codes {
                        Codes::Own(words) => words[unit] >> (8 * (group % 4) + 4 * (row % 2)) & 0xf,
                        Codes::Shared(words) => u32::from(words[shared] >> (4 * (group % 4)) & 0xf),
                    };
                    assert_eq!(packed, code, "m {m}, k {k}, V {v}, row {row}, group {group}");
                });
                // Nothing beside them.
                assert_eq!(values.iter().filter(|x| **x != 0.0).count(), kept);
            }
        }
    }
}
