//! What is done to sums before they are stored, on the CPU: act(sum + bias) + residual, rounded to the output's type.
//!
//! The activations are plain f32 arithmetic without branches or calls, so that the compiler turns a run of outputs into
//! vectors; their formulas are those of shaders/shared/activation.wgsl. Invariant: an output does not depend on where
//! in a run it stands, and so not on how the work was cut up.
#![allow(unsafe_code, reason = "threads write disjoint parts of one output; a kernel over vector instructions")]

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::memory::Parts;
use crate::matrix::Elements;
use crate::problem::{Activation, Form, Problem};
use crate::simd::{Instructions, Simd, Work};

/// Most outputs in a run.
const RUN: usize = 256;

/// Features and tokens that are brought into the output's order at a time where sums lie by feature: a line of each.
const SIDE: usize = 16;

/// Bias of a run.
#[derive(Clone, Copy)]
enum Bias<'a> {
    None,
    /// One for each output: the run is along the features.
    Each(&'a [f32]),
    /// One for all: the run is along the tokens of a feature.
    Same(f32),
}

/// The output that several threads write.
enum Output<'a> {
    F32(Parts<'a, f32>),
    F16(Parts<'a, f16>),
}

/// The epilogue of one call, and where its outputs go.
pub(super) struct Finish<'a> {
    problem: Problem,
    bias: Option<&'a [f32]>,
    residual: Option<&'a Elements>,
    output: Output<'a>,
    simd: Simd,
}

impl<'a> Finish<'a> {
    /// `None` for bf16, which plans refuse as an output.
    pub(super) fn new(
        problem: &Problem,
        bias: Option<&'a [f32]>,
        residual: Option<&'a Elements>,
        y: &'a mut Elements,
        simd: Simd,
    ) -> Option<Self> {
        let output = match y {
            Elements::F32(y) => Output::F32(Parts::new(y)),
            Elements::F16(y) => Output::F16(Parts::new(y)),
            Elements::Bf16(_) => return None,
        };
        Some(Self { problem: *problem, bias, residual, output, simd })
    }

    /// Stores the sums of consecutive features of a token.
    ///
    /// # Safety
    /// No other thread may store the same outputs.
    pub(super) unsafe fn store_features(&self, feature0: usize, token: usize, sums: &mut [f32]) {
        match self.problem.form {
            // SAFETY: passed on.
            Form::Linear => unsafe { self.store(feature0, token, sums) },
            Form::Gemm => {
                for (feature, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: passed on.
                    unsafe { self.store(feature0 + feature, token, std::slice::from_mut(sum)) };
                }
            }
        }
    }

    /// Stores a run of sums, of as many consecutive outputs from `(feature, token)` on: features in the linear form,
    /// tokens in the plain one.
    ///
    /// # Safety
    /// No other thread may store the same outputs.
    pub(super) unsafe fn store(&self, feature: usize, token: usize, sums: &mut [f32]) {
        let Problem { form, m, n, .. } = self.problem;
        let (start, bias) = match form {
            Form::Linear => (token * m + feature, self.bias.map(|b| Bias::Each(&b[feature..feature + sums.len()]))),
            Form::Gemm => (feature * n + token, self.bias.map(|b| Bias::Same(b[feature]))),
        };
        let bias = bias.unwrap_or(Bias::None);
        for (i, sums) in sums.chunks_mut(RUN).enumerate() {
            let bias = match bias {
                Bias::Each(b) => Bias::Each(&b[i * RUN..][..sums.len()]),
                other => other,
            };
            let range = start + i * RUN..start + i * RUN + sums.len();
            let mut wide = [0.0; RUN];
            let residual = self.residual.map(|residual| match residual {
                Elements::F32(r) => &r[range.clone()],
                Elements::F16(r) => {
                    r[range.clone()].convert_to_f32_slice(&mut wide[..sums.len()]);
                    &wide[..sums.len()]
                }
                Elements::Bf16(_) => &[],
            });
            self.simd.run(Apply { activation: self.problem.epilogue.activation, bias, residual, sums });
            match &self.output {
                // SAFETY: passed on.
                Output::F32(y) => unsafe { y.part(range) }.copy_from_slice(sums),
                // SAFETY: passed on.
                Output::F16(y) => unsafe { y.part(range) }.convert_from_f32_slice(sums),
            }
        }
    }

    /// Stores sums that lie by feature: from `feature` on a row of `stride` for each, of which the first `tokens`
    /// count.
    ///
    /// # Safety
    /// No other thread may store the same outputs.
    pub(super) unsafe fn store_by_feature(
        &self,
        feature: usize,
        token: usize,
        tokens: usize,
        sums: &mut [f32],
        stride: usize,
    ) {
        match self.problem.form {
            Form::Linear => self.simd.run(ByFeature { finish: self, feature, token, tokens, sums, stride }),
            Form::Gemm => {
                for (row, sums) in sums.chunks_exact_mut(stride).enumerate() {
                    // SAFETY: passed on.
                    unsafe { self.store(feature + row, token, &mut sums[..tokens]) };
                }
            }
        }
    }
}

/// Some features of some tokens, whose sums lie by feature, and their outputs by token.
struct ByFeature<'a, 'b> {
    finish: &'a Finish<'b>,
    feature: usize,
    token: usize,
    tokens: usize,
    /// A row of `stride` for each feature.
    sums: &'a mut [f32],
    stride: usize,
}

impl Work for ByFeature<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { finish, feature, token, tokens, sums, stride } = self;
        let &Finish { ref problem, bias, residual, ref output, .. } = finish;
        assert!(sums.len().is_multiple_of(stride) && tokens <= stride);
        for (row, sums) in sums.chunks_exact_mut(stride).enumerate() {
            let bias = bias.map_or(Bias::None, |bias| Bias::Same(bias[feature + row]));
            let apply =
                Apply { activation: problem.epilogue.activation, bias, residual: None, sums: &mut sums[..tokens] };
            // SAFETY: the caller has the instructions.
            unsafe { apply.run::<S>() };
        }
        let mut block = [[0.0f32; SIDE]; SIDE];
        // All features of some tokens, as the outputs of a token lie in a run of memory.
        for first in (0..tokens).step_by(SIDE) {
            let count = SIDE.min(tokens - first);
            for (i, sums) in sums.chunks(SIDE * stride).enumerate() {
                let features = sums.len() / stride;
                for col in (0..count).step_by(8) {
                    if features == SIDE && first + col + 8 <= stride {
                        for row in [0, 8] {
                            let from = &sums[row * stride + first + col..];
                            let to = &mut block[col..].as_flattened_mut()[row..];
                            // SAFETY: eight rows of eight sums follow, as all 16 rows of `stride` are there, and the
                            // block has as many; the caller has the instructions.
                            unsafe { S::transpose8(from.as_ptr(), stride, to.as_mut_ptr(), SIDE) };
                        }
                    } else {
                        for (row, sums) in sums.chunks_exact(stride).enumerate() {
                            let sums = &sums[first + col..first + count.min(col + 8)];
                            block[col..].iter_mut().zip(sums).for_each(|(block, sum)| block[row] = *sum);
                        }
                    }
                }
                for (token, block) in (token + first..).zip(block.iter_mut().take(count)) {
                    let start = token * problem.m + feature + i * SIDE;
                    let range = start..start + features;
                    let block = &mut block[..features];
                    match residual {
                        Some(Elements::F32(r)) => block.iter_mut().zip(&r[range.clone()]).for_each(|(v, r)| *v += r),
                        Some(Elements::F16(r)) => {
                            let mut wide = [0.0; SIDE];
                            r[range.clone()].convert_to_f32_slice(&mut wide[..features]);
                            block.iter_mut().zip(wide).for_each(|(v, r)| *v += r);
                        }
                        Some(Elements::Bf16(_)) | None => {}
                    }
                    match output {
                        Output::F32(y) => {
                            // SAFETY: only `store_by_feature` makes this work, and its caller vouches that no other
                            // thread stores these outputs.
                            let to = unsafe { y.part(range) };
                            // An array is copied by instructions, a slice by a call.
                            match (<&mut [f32; SIDE]>::try_from(&mut *to), <&[f32; SIDE]>::try_from(&*block)) {
                                (Ok(to), Ok(block)) => *to = *block,
                                _ => to.copy_from_slice(block),
                            }
                        }
                        // SAFETY: as above.
                        Output::F16(y) => unsafe { y.part(range) }.convert_from_f32_slice(block),
                    }
                }
            }
        }
    }
}

/// The arithmetic of a run.
struct Apply<'a> {
    activation: Activation,
    bias: Bias<'a>,
    residual: Option<&'a [f32]>,
    sums: &'a mut [f32],
}

impl Work for Apply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { activation, bias, residual, sums } = self;
        match bias {
            Bias::None => {}
            Bias::Each(bias) => sums.iter_mut().zip(bias).for_each(|(v, b)| *v += b),
            Bias::Same(bias) => sums.iter_mut().for_each(|v| *v += bias),
        }
        activate(activation, sums);
        if let Some(residual) = residual {
            sums.iter_mut().zip(residual).for_each(|(v, r)| *v += r);
        }
    }
}

/// Replaces numbers by their activations.
#[inline(always)]
pub(crate) fn activate(activation: Activation, numbers: &mut [f32]) {
    match activation {
        Activation::None => {}
        // Not f32::max, which turns NaN into 0.
        Activation::Relu => numbers.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v }),
        // Two selections by one comparison each, as one of three ways is not made an instruction. NaN stays.
        Activation::Relu6 => numbers.iter_mut().for_each(|v| {
            let above = if *v < 0.0 { 0.0 } else { *v };
            *v = if above > 6.0 { 6.0 } else { above };
        }),
        Activation::Gelu => numbers.iter_mut().for_each(|v| *v = gelu(*v)),
        Activation::GeluTanh => {
            numbers.iter_mut().for_each(|v| *v *= sigmoid(1.595_769_2 * *v * (1.0 + 0.044_715 * *v * *v)));
        }
        Activation::Silu => numbers.iter_mut().for_each(|v| *v *= sigmoid(*v)),
    }
}

/// Replaces numbers by the slopes of their activations there; below zero and at it, ReLU has none,
/// and ReLU6 none at six and above. As shaders/shared/slope.wgsl.
#[inline(always)]
pub(crate) fn slope(activation: Activation, numbers: &mut [f32]) {
    match activation {
        Activation::None => numbers.fill(1.0),
        Activation::Relu => numbers.iter_mut().for_each(|v| *v = if *v <= 0.0 { 0.0 } else { 1.0 }),
        Activation::Relu6 => numbers.iter_mut().for_each(|v| *v = if *v <= 0.0 || *v >= 6.0 { 0.0 } else { 1.0 }),
        // The normal distribution and v times its density.
        Activation::Gelu => numbers.iter_mut().for_each(|v| {
            let density = 0.398_942_3 * exp(-0.5 * *v * *v);
            *v = 0.5 * (1.0 + erf(*v * std::f32::consts::FRAC_1_SQRT_2)) + *v * density;
        }),
        Activation::GeluTanh => numbers.iter_mut().for_each(|v| {
            // Past 16 the slope is 0 or 1, and cubes may overflow. NaN stays.
            let w = v.clamp(-16.0, 16.0);
            let u = 1.595_769_2 * w * (1.0 + 0.044_715 * w * w);
            *v = sigmoid(u) + w * sigmoid_slope(u) * (1.595_769_2 * (1.0 + 0.134_145 * w * w));
        }),
        Activation::Silu => numbers.iter_mut().for_each(|v| *v = sigmoid(*v) + *v * sigmoid_slope(*v)),
    }
}

/// v·Φ(v), by the error function.
#[inline(always)]
fn gelu(v: f32) -> f32 {
    0.5 * v * (1.0 + erf(v * std::f32::consts::FRAC_1_SQRT_2))
}

/// erf(v) by Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7.
#[inline(always)]
fn erf(v: f32) -> f32 {
    const C: [f32; 5] = [0.254_829_6, -0.284_496_72, 1.421_413_8, -1.453_152, 1.061_405_4];
    let a = v.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (C[0] + t * (C[1] + t * (C[2] + t * (C[3] + t * C[4]))));
    (1.0 - p * exp(-a * a)).copysign(v)
}

/// 1 / (1 + e⁻ᵛ), without an intermediate that overflows.
#[inline(always)]
fn sigmoid(v: f32) -> f32 {
    let t = exp(-v.abs());
    (if v < 0.0 { t } else { 1.0 }) / (1.0 + t)
}

/// The slope of [`sigmoid`]: σ(v)·σ(−v), without the cancellation of 1 − σ(v).
#[inline(always)]
fn sigmoid_slope(v: f32) -> f32 {
    let t = exp(-v.abs());
    t / ((1.0 + t) * (1.0 + t))
}

/// eˣ for x ≤ 0, to about an ulp; 0 below -87, short of where it would be subnormal.
///
/// x = i·ln 2 + r with |r| ≤ ln 2 / 2, ln 2 in two parts (Cody & Waite 1980); eʳ by its Taylor polynomial of degree 7,
/// which leaves out less than r⁸/8! = 5e-9; 2ⁱ by its exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Added and taken away, it rounds to whole numbers, and its lowest bits hold them.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let i = shifted - ROUND;
    let r = (x - i * LN2_HIGH) - i * LN2_LOW;
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)))))));
    let power = f32::from_bits(shifted.to_bits().wrapping_shl(23).wrapping_add(0x3f80_0000));
    // NaN compares with nothing and stays.
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_three_roundings() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error <= 2.0 * 2f64.powi(-24) * 1.5, "exp({x}) is {} off by {error}", exp(x));
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }
}
