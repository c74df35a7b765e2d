//! The vector instructions that the CPU device's kernels are written in, and which of them this processor has.
//!
//! A kernel is a `Work`: code over any `Instructions`, written once. `Simd::run` compiles it for each level and
//! enters the one that was asked for, so that a kernel reads the same for AVX-512, AVX2 and everything else, and its
//! portable form is tested on the machines that have more. Invariant: a `Simd` names instructions that this processor
//! has.
#![allow(unsafe_code, reason = "vector intrinsics; callers hold a Simd, which proves that the processor has them")]

use std::fmt;
use std::str::FromStr;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::matrix::{DType, Element};

/// A set of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SimdLevel {
    /// Plain loops over four lanes, which the compiler turns into what the target always has: SSE2, NEON.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// x86-64 with AVX-512F: 16 lanes.
    Avx512,
}

impl SimdLevel {
    /// All levels, the widest last.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// `scalar`, `avx2` or `avx512`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Lanes of f32 in a vector.
    pub const fn lanes(self) -> usize {
        match self {
            Self::Scalar => Portable::LANES,
            Self::Avx2 => 8,
            Self::Avx512 => 16,
        }
    }

    /// Whether this processor has the instructions.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let (avx2, avx512) = {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            (avx2, avx2 && is_x86_feature_detected!("avx512f"))
        };
        #[cfg(not(target_arch = "x86_64"))]
        let (avx2, avx512) = (false, false);
        match self {
            Self::Scalar => true,
            Self::Avx2 => avx2,
            Self::Avx512 => avx512,
        }
    }
}

impl fmt::Display for SimdLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SimdLevel {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|level| level.name() == text).ok_or_else(|| {
            Error::invalid(format!("SIMD level {text:?} is none of {}", Self::ALL.map(Self::name).join(", ")))
        })
    }
}

/// A level that this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Simd(SimdLevel);

impl Simd {
    /// The widest level of this processor, or the one that is asked for.
    pub(crate) fn new(wanted: Option<SimdLevel>) -> Result<Self> {
        match wanted {
            Some(level) if !level.is_supported() => Err(Error::missing_feature("the processor", level.name())),
            Some(level) => Ok(Self(level)),
            None => {
                let widest = SimdLevel::ALL.into_iter().rev().find(|level| level.is_supported());
                Ok(Self(widest.unwrap_or(SimdLevel::Scalar)))
            }
        }
    }

    pub(crate) fn level(self) -> SimdLevel {
        self.0
    }

    /// Does the work with these instructions.
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2<W: Work>(work: W) -> W::Output {
                // SAFETY: the caller has these instructions.
                unsafe { work.run::<x86::Avx2>() }
            }
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            unsafe fn avx512<W: Work>(work: W) -> W::Output {
                // SAFETY: the caller has these instructions.
                unsafe { work.run::<x86::Avx512>() }
            }
            match self.0 {
                // SAFETY: a `Simd` exists only for a level that the processor has.
                SimdLevel::Avx2 => return unsafe { avx2(work) },
                // SAFETY: as above.
                SimdLevel::Avx512 => return unsafe { avx512(work) },
                SimdLevel::Scalar => {}
            }
        }
        // SAFETY: needs no instructions beyond the target's own.
        unsafe { work.run::<Portable>() }
    }
}

/// What a kernel does, over any instructions. `run` must be `#[inline(always)]`, and so must be all that it calls with
/// these instructions, or they are compiled as calls.
pub(crate) trait Work {
    type Output;

    /// # Safety
    /// The processor must have the instructions `S`.
    unsafe fn run<S: Instructions>(self) -> Self::Output;
}

/// The vector operations that kernels need. A vector is `LANES` f32; pointers need no alignment.
///
/// # Safety
/// Every function needs a processor with the instructions, and pointers to as many elements as it says.
pub(crate) trait Instructions: Copy {
    const LANES: usize;
    /// Whether a·b + c is one instruction. Without it, `f32::mul_add` is a call.
    const FUSED: bool;
    /// A vector of f32.
    type F32: Copy;
    /// For each lane, the position of an element within its four lanes.
    type Picks: Copy;

    unsafe fn splat(x: f32) -> Self::F32;
    /// Reads `LANES` f32.
    unsafe fn load(p: *const f32) -> Self::F32;
    /// Reads and widens `LANES` f16.
    unsafe fn load_f16(p: *const f16) -> Self::F32;
    /// Reads and widens `LANES` bf16.
    unsafe fn load_bf16(p: *const bf16) -> Self::F32;
    /// Writes `LANES` f32.
    unsafe fn store(p: *mut f32, v: Self::F32);
    /// a·b + c, rounded once where there is an instruction for it.
    unsafe fn fma(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The sum of the lanes of each of four vectors, formed in the same order for all of them.
    unsafe fn totals(v: [Self::F32; 4]) -> [f32; 4];
    /// The lanes whose bit is set, of vector `part` of 16 lanes; zero elsewhere.
    unsafe fn keep(v: Self::F32, bits: u16, part: usize) -> Self::F32;
    /// Positions for vector `part` of 16 lanes from 2-bit fields. With `SHARED`, two fields (a code) serve four lanes
    /// (f0 f1 f0 f1), so that two rows of a pair take the same elements, and 16 bits are used; else there is a field
    /// for each lane.
    unsafe fn picks<const SHARED: bool>(codes: u32, part: usize) -> Self::Picks;
    /// The elements of each four lanes that `picks` names.
    unsafe fn pick(v: Self::F32, picks: Self::Picks) -> Self::F32;
    /// Of eight vectors, `stride` f32 apart, each of whose four lanes belong to two rows (two lanes each): the sum of
    /// each row's lanes, 16 numbers.
    #[inline(always)]
    unsafe fn sum_rows(from: *const f32, stride: usize, to: *mut f32) {
        for row in 0..16 {
            let mut sum = 0.0;
            for four in (0..Self::LANES).step_by(4) {
                // SAFETY: within the vectors and the numbers that the caller vouches for.
                sum += unsafe {
                    let lanes = from.add(row / 2 * stride + four + row % 2 * 2);
                    *lanes + *lanes.add(1)
                };
            }
            // SAFETY: as above.
            unsafe { *to.add(row) = sum };
        }
    }
    /// Asks for the cache line of `p` in the second-level cache. `p` may point anywhere.
    unsafe fn prefetch(p: *const f32);

    /// Transposes a block of 8 x 8 f32, whose rows are `from_stride` and `to_stride` f32 apart.
    #[inline(always)]
    unsafe fn transpose8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..8 {
            for col in 0..8 {
                // SAFETY: within the block that the caller vouches for.
                unsafe { *to.add(col * to_stride + row) = *from.add(row * from_stride + col) };
            }
        }
    }
}

/// a·b + c of numbers in plain loops, rounded once where there is an instruction for it.
#[inline(always)]
pub(crate) fn multiply_add<S: Instructions>(a: f32, b: f32, c: f32) -> f32 {
    if S::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// The same pointer, of which the compiler does not know how it was computed: it is kept in one register, and memory is
/// addressed by that and a displacement. Intel's cores make two micro-operations of a multiply-add whose operand in
/// memory is addressed by two registers, which are one otherwise. Measured with AVX-512 alone.
#[inline(always)]
pub(crate) fn opaque(p: *const f32) -> *const f32 {
    #[cfg(target_arch = "x86_64")]
    {
        let mut p = p;
        // SAFETY: the text is a comment: nothing is read or written.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(pure, readonly, nostack, preserves_flags)) };
        p
    }
    #[cfg(not(target_arch = "x86_64"))]
    p
}

/// Transposes 16 rows, `stride` numbers apart: each vector of `to` has one number of all of them.
pub(crate) struct Transpose16<'a> {
    pub(crate) from: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) to: &'a mut [[f32; 16]],
}

impl Work for Transpose16<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { from, stride, to } = self;
        assert!(to.len() <= stride && from.len() >= 16 * stride, "{} of {stride}, of {}", to.len(), from.len());
        let whole = to.len() / 8 * 8;
        for column in (0..whole).step_by(8) {
            for row in [0, 8] {
                let (from, to) = (&from[row * stride + column..], &mut to[column..]);
                // SAFETY: the caller has the instructions. Eight rows of eight numbers follow in `from`, and as many
                // halves of vectors in `to`, by the assertion.
                unsafe { S::transpose8(from.as_ptr(), stride, to.as_mut_ptr().cast::<f32>().add(row), 16) };
            }
        }
        for (column, to) in to.iter_mut().enumerate().skip(whole) {
            *to = std::array::from_fn(|row| from[row * stride + column]);
        }
    }
}

/// An element that a vector can be read from.
pub(crate) trait Loaded: Element {
    /// Reads and widens `LANES` elements.
    ///
    /// # Safety
    /// As [`Instructions`].
    unsafe fn vector<S: Instructions>(p: *const Self) -> S::F32;

    /// Widens as many elements as there are in `to`.
    fn widen(from: &[Self], to: &mut [f32]);

    /// The elements, if there is nothing to widen.
    fn as_f32(elements: &[Self]) -> Option<&[f32]> {
        (Self::DTYPE == DType::F32).then(|| bytemuck::cast_slice(elements))
    }
}

macro_rules! loaded {
    ($type:ty, $load:ident, $widen:expr) => {
        impl Loaded for $type {
            #[inline(always)]
            unsafe fn vector<S: Instructions>(p: *const Self) -> S::F32 {
                // SAFETY: passed on.
                unsafe { S::$load(p) }
            }

            fn widen(from: &[Self], to: &mut [f32]) {
                $widen(from, to);
            }
        }
    };
}
loaded!(f32, load, |from: &[f32], to: &mut [f32]| to.copy_from_slice(from));
loaded!(f16, load_f16, |from: &[f16], to: &mut [f32]| from.convert_to_f32_slice(to));
loaded!(bf16, load_bf16, |from: &[bf16], to: &mut [f32]| from.convert_to_f32_slice(to));

/// Four lanes of plain arithmetic.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Portable {
    #[inline(always)]
    fn each(f: impl Fn(usize) -> f32) -> [f32; 4] {
        [f(0), f(1), f(2), f(3)]
    }
}

impl Instructions for Portable {
    const LANES: usize = 4;
    const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
    type F32 = [f32; 4];
    type Picks = [usize; 4];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: the caller vouches for four elements; an array of f32 may be read unaligned.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> [f32; 4] {
        // SAFETY: as `load`.
        let v = unsafe { p.cast::<[f16; 4]>().read_unaligned() };
        Self::each(|i| v[i].to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> [f32; 4] {
        // SAFETY: as `load`.
        let v = unsafe { p.cast::<[bf16; 4]>().read_unaligned() };
        Self::each(|i| v[i].to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: as `load`.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        Self::each(|i| multiply_add::<Self>(a[i], b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn totals(v: [[f32; 4]; 4]) -> [f32; 4] {
        v.map(|v| (v[0] + v[1]) + (v[2] + v[3]))
    }
    #[inline(always)]
    unsafe fn keep(v: [f32; 4], bits: u16, part: usize) -> [f32; 4] {
        Self::each(|i| if bits >> (4 * part + i) & 1 != 0 { v[i] } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn picks<const SHARED: bool>(codes: u32, part: usize) -> [usize; 4] {
        let own = codes as usize >> if SHARED { 4 * part } else { 8 * part };
        [own & 3, own >> 2 & 3, own >> if SHARED { 0 } else { 4 } & 3, own >> if SHARED { 2 } else { 6 } & 3]
    }
    #[inline(always)]
    unsafe fn pick(v: [f32; 4], picks: [usize; 4]) -> [f32; 4] {
        Self::each(|i| v[picks[i]])
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::Instructions;

    /// Eight lanes.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2;

    // SAFETY (all blocks): the caller has the instructions and vouches for the pointers.
    impl Instructions for Avx2 {
        const LANES: usize = 8;
        const FUSED: bool = true;
        type F32 = __m256;
        type Picks = __m256i;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m256 {
            // SAFETY: as above. bf16 is the upper half of f32.
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn totals(v: [__m256; 4]) -> [f32; 4] {
            // SAFETY: as above.
            unsafe { totals(v) }
        }
        #[inline(always)]
        unsafe fn keep(v: __m256, bits: u16, part: usize) -> __m256 {
            // SAFETY: as above.
            unsafe {
                let lane = match part {
                    0 => _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128),
                    _ => _mm256_setr_epi32(1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15),
                };
                let own = _mm256_and_si256(_mm256_set1_epi16(bits as i16), lane);
                _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lane)))
            }
        }
        #[inline(always)]
        unsafe fn picks<const SHARED: bool>(codes: u32, part: usize) -> __m256i {
            // SAFETY: as above. VPERMILPS looks at the two lowest bits of each lane. Both broadcasts are single loads.
            unsafe {
                let shifts = match (SHARED, part) {
                    (true, 0) => _mm256_setr_epi32(0, 2, 0, 2, 4, 6, 4, 6),
                    (true, _) => _mm256_setr_epi32(8, 10, 8, 10, 12, 14, 12, 14),
                    (false, 0) => _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
                    (false, _) => _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30),
                };
                let codes = match SHARED {
                    true => _mm256_set1_epi16(codes as i16),
                    false => _mm256_set1_epi32(codes as i32),
                };
                _mm256_srlv_epi32(codes, shifts)
            }
        }
        #[inline(always)]
        unsafe fn pick(v: __m256, picks: __m256i) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_permutevar_ps(v, picks) }
        }
        #[inline(always)]
        unsafe fn sum_rows(from: *const f32, stride: usize, to: *mut f32) {
            // SAFETY: as above. Neighbours are added, and then the halves of the vectors.
            unsafe {
                for half in 0..2 {
                    let from = from.add(4 * half * stride);
                    let ab = _mm256_hadd_ps(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(stride)));
                    let cd =
                        _mm256_hadd_ps(_mm256_loadu_ps(from.add(2 * stride)), _mm256_loadu_ps(from.add(3 * stride)));
                    let (low, high) = (_mm256_permute2f128_ps::<0x20>(ab, cd), _mm256_permute2f128_ps::<0x31>(ab, cd));
                    _mm256_storeu_ps(to.add(8 * half), _mm256_add_ps(low, high));
                }
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            // SAFETY: a prefetch cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn transpose8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: as above.
            unsafe { transpose8(from, from_stride, to, to_stride) }
        }
    }

    /// Sixteen lanes.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512;

    // SAFETY (all blocks): as for `Avx2`.
    impl Instructions for Avx512 {
        const LANES: usize = 16;
        const FUSED: bool = true;
        type F32 = __m512;
        type Picks = __m512i;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m512 {
            // SAFETY: as above. bf16 is the upper half of f32.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn totals(v: [__m512; 4]) -> [f32; 4] {
            // SAFETY: as above; AVX-512 includes what the rest needs.
            unsafe {
                let mut halves = [_mm256_setzero_ps(); 4];
                for (half, v) in halves.iter_mut().zip(v) {
                    let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
                    *half = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
                }
                totals(halves)
            }
        }
        #[inline(always)]
        unsafe fn keep(v: __m512, bits: u16, _: usize) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_maskz_mov_ps(bits, v) }
        }
        #[inline(always)]
        unsafe fn picks<const SHARED: bool>(codes: u32, _: usize) -> __m512i {
            // SAFETY: as above. VPERMILPS looks at the two lowest bits of each lane.
            unsafe {
                let shifts = match SHARED {
                    true => _mm512_setr_epi32(0, 2, 0, 2, 4, 6, 4, 6, 8, 10, 8, 10, 12, 14, 12, 14),
                    false => _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                };
                _mm512_srlv_epi32(_mm512_set1_epi32(codes as i32), shifts)
            }
        }
        #[inline(always)]
        unsafe fn pick(v: __m512, picks: __m512i) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_permutevar_ps(v, picks) }
        }
        #[inline(always)]
        unsafe fn sum_rows(from: *const f32, stride: usize, to: *mut f32) {
            // SAFETY: as above. Neighbours are added, and then twice the halves of the vectors.
            unsafe {
                let mut sums = [_mm512_setzero_ps(); 4];
                for (i, sum) in sums.iter_mut().enumerate() {
                    let (a, b) =
                        (_mm512_loadu_ps(from.add(2 * i * stride)), _mm512_loadu_ps(from.add((2 * i + 1) * stride)));
                    *sum = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
                }
                let [a, b, c, d] = sums;
                let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                let all = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
                _mm512_storeu_ps(to, all);
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            // SAFETY: a prefetch cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn transpose8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: as above; AVX-512 includes what it needs.
            unsafe { transpose8(from, from_stride, to, to_stride) }
        }
    }

    /// Neighbours are added within halves of vectors, twice, and then the halves.
    ///
    /// # Safety
    /// As [`Instructions`].
    #[inline(always)]
    unsafe fn totals([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: the caller has the instructions; there is room for four numbers.
        unsafe {
            let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            _mm_storeu_ps(out.as_mut_ptr(), sums);
        }
        out
    }

    /// Pairs of rows are interleaved, then pairs of pairs, then halves of vectors. Loops and no closures: those would
    /// be compiled without the instructions, as calls.
    ///
    /// # Safety
    /// As [`Instructions`].
    #[inline(always)]
    unsafe fn transpose8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller vouches for both blocks.
        unsafe {
            let mut halves = [[_mm256_setzero_ps(); 4]; 2];
            for (half, out) in halves.iter_mut().enumerate() {
                let from = from.add(4 * half * from_stride);
                let (a, b) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_stride)));
                let (c, d) = (_mm256_loadu_ps(from.add(2 * from_stride)), _mm256_loadu_ps(from.add(3 * from_stride)));
                let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                out[0] = _mm256_shuffle_ps::<0x44>(ab_low, cd_low);
                out[1] = _mm256_shuffle_ps::<0xee>(ab_low, cd_low);
                out[2] = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
                out[3] = _mm256_shuffle_ps::<0xee>(ab_high, cd_high);
            }
            let [upper, lower] = halves;
            for (i, (upper, lower)) in upper.into_iter().zip(lower).enumerate() {
                _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(upper, lower));
                _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(upper, lower));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// Every operation on one vector, as numbers to compare.
    struct All;

    impl Work for All {
        type Output = Vec<Vec<f32>>;

        #[inline(always)]
        unsafe fn run<S: Instructions>(self) -> Self::Output {
            let numbers: Vec<f32> = (0..64).map(|i| i as f32 * 0.5 - 3.0).collect();
            let halves: Vec<f16> = numbers.iter().map(|&x| f16::from_f32(x)).collect();
            let upper: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f32(x)).collect();
            // Vectors of 16 numbers in as many parts as it takes, whatever the width.
            let sixteen = |f: &dyn Fn(usize) -> S::F32| {
                let mut out = vec![0.0; 16];
                for part in 0..16 / S::LANES {
                    // SAFETY: 16 numbers are a whole number of vectors.
                    unsafe { S::store(out[part * S::LANES..].as_mut_ptr(), f(part)) };
                }
                out
            };
            let codes = 0x9e4c_d8b1;
            let (mut transposed, mut totals, mut sums) = (vec![0.0; 64], vec![0.0; 4], vec![0.0; 16]);
            // SAFETY: the caller has the instructions; all reads are of numbers that are there.
            unsafe {
                let at = |part: usize| S::load(numbers[part * S::LANES..].as_ptr());
                S::transpose8(numbers.as_ptr(), 8, transposed.as_mut_ptr(), 8);
                for part in (0..16).step_by(S::LANES) {
                    let v = [0, 16, 32, 48].map(|first| S::load(numbers[first + part..].as_ptr()));
                    totals.iter_mut().zip(S::totals(v)).for_each(|(total, own)| *total += own);
                }
                // Eight vectors that begin two numbers apart, and in place of wider ones what they would add.
                for at in (0..16).step_by(S::LANES) {
                    let mut part = [0.0; 16];
                    S::sum_rows(numbers[at..].as_ptr(), 2, part.as_mut_ptr());
                    sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
                vec![
                    sixteen(&|_| S::splat(1.5)),
                    sixteen(&at),
                    sixteen(&|part| S::load_f16(halves[part * S::LANES..].as_ptr())),
                    sixteen(&|part| S::load_bf16(upper[part * S::LANES..].as_ptr())),
                    sixteen(&|part| S::fma(at(part), S::splat(3.0), at(part))),
                    sixteen(&|part| S::keep(at(part), 0xb1c6, part)),
                    sixteen(&|part| S::pick(at(part), S::picks::<false>(codes, part))),
                    sixteen(&|part| S::pick(at(part), S::picks::<true>(codes, part))),
                    transposed,
                    totals,
                    sums,
                ]
            }
        }
    }

    #[test]
    fn every_level_computes_the_same() {
        let portable = Simd::new(Some(SimdLevel::Scalar)).unwrap().run(All);
        let number = |i: usize| i as f32 * 0.5 - 3.0;
        let expected = |f: &dyn Fn(usize) -> f32| (0..16).map(f).collect::<Vec<_>>();
        assert_eq!(portable[0], [1.5; 16]);
        assert_eq!(portable[1], expected(&number));
        assert_eq!(portable[2], portable[1]);
        assert_eq!(portable[3], portable[1]);
        assert_eq!(portable[4], expected(&|i| 4.0 * number(i)));
        assert_eq!(portable[5], expected(&|i| if 0xb1c6 >> i & 1 == 1 { number(i) } else { 0.0 }));
        let field = |i: usize| 0x9e4c_d8b1u32 as usize >> (2 * i) & 3;
        assert_eq!(portable[6], expected(&|i| number(i / 4 * 4 + field(i))));
        assert_eq!(portable[7], expected(&|i| number(i / 4 * 4 + field(i / 4 * 2 + i % 2))));
        assert_eq!(portable[8], (0..64).map(|i| number(i % 8 * 8 + i / 8)).collect::<Vec<_>>());
        assert_eq!(portable[9], [0, 1, 2, 3].map(|row| (16 * row..16 * row + 16).map(number).sum::<f32>()));
        let sum = |i: usize| (0..4).map(|four| number(i / 2 * 2 + 4 * four + i % 2 * 2)).sum::<f32>();
        let next = |i: usize| (0..4).map(|four| number(i / 2 * 2 + 4 * four + i % 2 * 2 + 1)).sum::<f32>();
        assert_eq!(portable[10], expected(&|i| sum(i) + next(i)));
        for level in SimdLevel::ALL.into_iter().filter(|level| level.is_supported()) {
            assert_eq!(Simd::new(Some(level)).unwrap().run(All), portable, "{level}");
            assert_eq!(level.name().parse::<SimdLevel>().unwrap(), level);
        }
    }
}
