//! The oracle against itself: its two paths agree, its bound holds for plain f32 arithmetic and is not vacuous, and
//! it refuses what is wrong. Inputs are built by hand, so that nothing the oracle checks is used to check it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stdout, reason = "how tight the bounds are is worth reading; the harness hides it otherwise")]

use ndarray::{Array2, array};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use sparse24::reference::{Expected, Operands, Oracle, Sample, activation, gamma};
use sparse24::{
    Activation, DType, Elements, Epilogue, Form, HostWeights, Mask, Matrix, Op, Problem, Sparse24, VectorLen, Verdict,
};

const U: f64 = 1.0 / (1 << 24) as f64;
const LEGAL: [u32; 6] = [0x4, 0x8, 0x9, 0xc, 0xd, 0xe];
/// Empty, one, around a group of 4, around a metadata word of 32 columns (and, as `m`, around V = 4 and V = 32).
const SIZES: [usize; 8] = [0, 1, 3, 4, 5, 31, 32, 33];

/// Owned inputs of one problem.
#[derive(Clone)]
struct Case {
    problem: Problem,
    weights: HostWeights,
    x: Matrix,
    bias: Option<Vec<f32>>,
    residual: Option<Matrix>,
}

fn uniform(rng: &mut impl Rng) -> f32 {
    // 24 random bits in [-1, 1), exact in f32; zero is as likely as any other.
    (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}

fn matrix(rows: usize, cols: usize, dtype: DType, rng: &mut impl Rng) -> Matrix {
    let data: Vec<f32> = (0..rows * cols).map(|_| uniform(rng)).collect();
    Matrix::from_f32(rows, cols, &data).unwrap().cast(dtype)
}

impl Case {
    fn random(problem: Problem, weights: DType, seed: u64) -> Self {
        let rng = &mut Pcg64Mcg::seed_from_u64(seed);
        let Problem { m, k, epilogue, .. } = problem;
        let sparse = problem.op.vector().map(|vector| {
            let (meta_rows, meta_cols, groups) = (m.div_ceil(vector.get()), k.div_ceil(32), k.div_ceil(4));
            let mut meta = vec![0u32; meta_rows * meta_cols];
            for g in (0..meta_rows).flat_map(|r| (0..groups).map(move |g| (r, g))) {
                let code = LEGAL[rng.next_u32() as usize % 6];
                meta[g.0 * meta_cols + g.1 / 8] |= code << (4 * (g.1 % 8));
            }
            let mut values = vec![0.0; m * groups * 2];
            for (i, value) in values.iter_mut().enumerate() {
                let (row, group, slot) = (i / (groups * 2), i / 2 % groups, i % 2);
                let code = meta[row / vector.get() * meta_cols + group / 8] >> (4 * (group % 8));
                if 4 * group + (code >> (2 * slot) & 3) as usize >= k {
                    continue; // padding
                }
                *value = uniform(rng);
            }
            Sparse24::from_parts(m, k, vector, Elements::from_f32(weights, &values), meta).unwrap()
        });
        let (x_rows, x_cols) = problem.x_shape();
        let (y_rows, y_cols) = problem.y_shape();
        let dense = matrix(m, k, weights, rng);
        let mask = Mask::from_fn(m, k, |_, _| rng.next_u32().is_multiple_of(2)).unwrap();
        let weights = match (problem.op, sparse) {
            (Op::Masked | Op::Masked24, _) => HostWeights::Masked(dense, mask),
            (_, Some(sparse)) => HostWeights::Sparse24(sparse),
            (_, None) => HostWeights::Dense(dense),
        };
        Self {
            problem,
            weights,
            x: matrix(x_rows, x_cols, problem.storage, rng),
            bias: epilogue.bias.then(|| (0..m).map(|_| uniform(rng)).collect()),
            residual: epilogue.residual.then(|| matrix(y_rows, y_cols, problem.output, rng)),
        }
    }

    fn oracle(&self) -> Oracle<'_> {
        let (bias, residual) = (self.bias.as_deref(), self.residual.as_ref());
        Oracle::new(&self.problem, Operands { weights: &self.weights, x: &self.x, bias, residual }).unwrap()
    }

    /// The output as a simple device computes it: one f32 accumulator per element, in increasing k.
    fn naive(&self) -> Matrix {
        let w = self.oracle().decompressed().mapv(|w| w as f32);
        let Problem { form, m, n, k, output, epilogue, .. } = self.problem;
        let (rows, cols) = self.problem.y_shape();
        let mut y = vec![0.0; rows * cols];
        for (feature, token) in (0..m).flat_map(|f| (0..n).map(move |t| (f, t))) {
            let linear = form == Form::Linear;
            let x = |p| if linear { self.x.get(token, p) } else { self.x.get(p, token) };
            let (row, col) = if linear { (token, feature) } else { (feature, token) };
            let mut acc = (0..k).fold(0f32, |acc, p| acc + w[[feature, p]] * x(p));
            if let Some(bias) = &self.bias {
                acc += bias[feature];
            }
            acc = activation_f32(epilogue.activation, acc, 0.0, 0.0);
            if let Some(residual) = &self.residual {
                acc += residual.get(row, col);
            }
            y[row * cols + col] = acc;
        }
        Matrix::from_f32(rows, cols, &y).unwrap().cast(output)
    }

    fn verify(&self, y: &Matrix) -> Verdict {
        self.oracle().verify(y, Sample::All).unwrap()
    }
}

/// The activations as the kernels write them. `exp_off` and `div_off` shift each exp and each division by that share of
/// the error that WGSL allows them: 3 + 2|x| and 2.5 ULP.
#[allow(clippy::excessive_precision, reason = "the coefficients as they are published")]
fn activation_f32(activation: Activation, x: f32, exp_off: f32, div_off: f32) -> f32 {
    let exp = |x: f32| x.exp() * (1.0 + exp_off * (3.0 + 2.0 * x.abs()) * f32::EPSILON);
    let div = |a: f32, b: f32| a / b * (1.0 + div_off * 2.5 * f32::EPSILON);
    match activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::Gelu => {
            let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
            let t = div(1.0, 1.0 + 0.3275911 * z);
            let poly =
                t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
            let erf = (1.0 - poly * exp(-z * z)).copysign(x);
            0.5 * x * (1.0 + erf)
        }
        Activation::GeluTanh => {
            let z = 0.797_884_6 * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + (1.0 - div(2.0, exp(2.0 * z) + 1.0)))
        }
        Activation::Silu => div(x, 1.0 + exp(-x)),
    }
}

/// Every op and V, form, combination of types and epilogue, with sizes that run through `SIZES` on the way.
fn cases() -> impl Iterator<Item = Case> {
    let ops = [Op::Dense, Op::Masked].into_iter().chain(VectorLen::ALL.map(Op::Sparse24));
    let types = [(DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::F16, DType::F16)];
    let mut problems = Vec::new();
    for op in ops {
        for form in [Form::Linear, Form::Gemm] {
            for (storage, weights) in types {
                for output in [DType::F32, DType::F16] {
                    for epilogue in Epilogue::all() {
                        problems.push((op, form, storage, weights, output, epilogue));
                    }
                }
            }
        }
    }
    let rng = &mut Pcg64Mcg::seed_from_u64(24);
    let mut size = || SIZES[rng.next_u32() as usize % SIZES.len()];
    let drawn: Vec<_> = problems.into_iter().map(|p| (p, [size(), size(), size()])).collect();
    drawn.into_iter().enumerate().map(|(seed, ((op, form, storage, weights, output, epilogue), [m, n, k]))| {
        Case::random(Problem { op, form, m, n, k, storage, output, epilogue }, weights, seed as u64)
    })
}

/// A case without epilogue whose every output has a useful bound.
fn plain(op: Op, m: usize, n: usize, k: usize) -> Case {
    Case::random(Problem::linear(op, m, n, k, DType::F32), DType::F32, 7)
}

/// One dense f32 or f16 output, given both operands.
fn one(storage: DType, output: DType, w: &[f32], x: &[f32]) -> Expected {
    let cast = |data: &[f32]| Matrix::from_f32(1, data.len(), data).unwrap().cast(storage);
    let (w, x) = (cast(w), cast(x));
    let problem = Problem { output, ..Problem::linear(Op::Dense, 1, 1, w.cols(), storage) };
    let weights = HostWeights::from(&w);
    let operands = Operands::new(&weights, &x);
    Oracle::new(&problem, operands).unwrap().element(0, 0)
}

#[test]
fn both_paths_agree() {
    for case in cases() {
        let (oracle, Problem { form, m, n, .. }) = (case.oracle(), case.problem);
        let full = oracle.full();
        assert_eq!(full.dim(), case.problem.y_shape());
        for (feature, token) in (0..m).flat_map(|f| (0..n).map(move |t| (f, t))) {
            let place = if form == Form::Linear { [token, feature] } else { [feature, token] };
            let Expected { value, bound, .. } = oracle.element(feature, token);
            // The bound is of f32 arithmetic, 2^29 times coarser than f64.
            assert!(
                (full[place] - value).abs() <= 1e-7 * bound,
                "{:?} {place:?}: {}, {value}",
                case.problem,
                full[place]
            );
        }
    }
}

#[test]
fn plain_f32_passes_and_the_bound_is_not_vacuous() {
    let (mut largest, mut checked) = (0f64, 0);
    for case in cases() {
        let verdict = case.verify(&case.naive());
        assert!(verdict.passed() && verdict.undecided == 0, "{:?}: {verdict}", case.problem);
        assert_eq!(verdict.checked, case.problem.m * case.problem.n);
        if case.problem.output == DType::F32 {
            largest = largest.max(verdict.error_over_bound);
            checked += verdict.checked;
        }
    }
    println!("largest error/bound of {checked} f32 outputs: {largest}");
    assert!(largest > 0.05 && largest < 1.0, "{largest}");
    // Round-off grows like √K and its bound like K: at the k of a large layer the ratio must still show.
    for op in [Op::Dense, Op::Sparse24(VectorLen::ONE), Op::Masked] {
        let case = plain(op, 4, 4, 4099);
        let verdict = case.verify(&case.naive());
        println!("{} k = 4099: {verdict}", op.name());
        assert!(verdict.passed() && verdict.error_over_bound > 1e-4, "{verdict}");
    }
}

#[test]
fn hand_computed() {
    // Row 0 keeps columns 0, 2 (code 8) and 4, 5 (code 4); row 1 keeps 2, 3 (code e) and 4, 5.
    let values = Elements::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let w = Sparse24::from_parts(2, 6, VectorLen::ONE, values, vec![0x48, 0x4e]).unwrap();
    let x = Matrix::from_f32(1, 6, &[1.0, 10.0, 100.0, 1e3, 1e4, 1e5]).unwrap();
    let problem = Problem::linear(Op::Sparse24(VectorLen::ONE), 2, 1, 6, DType::F32);
    let weights = HostWeights::from(&w);
    let oracle = Oracle::new(&problem, Operands::new(&weights, &x));
    let oracle = oracle.unwrap();
    assert_eq!(oracle.decompressed(), array![[1.0, 0.0, 2.0, 0.0, 3.0, 4.0], [0.0, 0.0, 5.0, 6.0, 7.0, 8.0]]);
    assert_eq!(oracle.full(), array![[430201.0, 876500.0]]);
    assert_eq!([oracle.element(0, 0).value, oracle.element(1, 0).value], [430201.0, 876500.0]);
    assert_eq!(oracle.element(0, 0).bound, 0.0, "whole numbers below 2^24 are exact");
    let x = Matrix::from_f32(1, 6, &[1.1, 0.0, 0.0, 0.0, -1.3, 0.0]).unwrap();
    let weights = HostWeights::from(&w);
    let want = Oracle::new(&problem, Operands::new(&weights, &x));
    // Five roundings: 2 products per group, 2 groups, and the spare one; 8 flushes.
    let abs = f64::from(1.1f32) + 3.0 * f64::from(1.3f32);
    let bound = gamma(5, U) * abs + (1.0 + gamma(5, U)) * 8.0 * f64::from(f32::MIN_POSITIVE);
    assert_eq!(want.unwrap().element(0, 0).bound, bound);

    // V = 2: rows 0 and 1 keep 1, 2 (code 9), row 2 keeps 0, 3 (code c). Plain form, with every part of the epilogue.
    let values = Elements::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let two = VectorLen::new(2).unwrap();
    let w = Sparse24::from_parts(3, 4, two, values, vec![0x9, 0xc]).unwrap();
    let x = Matrix::from_f32(4, 2, &[1.0, 0.0, 10.0, 1.0, 100.0, 0.0, 1000.0, 0.0]).unwrap();
    let epilogue = Epilogue { bias: true, activation: Activation::Relu, residual: true };
    let problem = Problem { form: Form::Gemm, epilogue, ..Problem::linear(Op::Sparse24(two), 3, 2, 4, DType::F32) };
    let residual = Matrix::from_f32(3, 2, &[0.0, 0.5, 0.0, 0.0, 0.25, 0.0]).unwrap();
    let bias = [-2.0, 0.0, -6004.0];
    let weights = &HostWeights::from(&w);
    let oracle = Oracle::new(&problem, Operands::new(weights, &x).bias(&bias).residual(&residual)).unwrap();
    let want = array![[208.0, 0.5], [430.0, 3.0], [1.25, 0.0]];
    assert_eq!(oracle.full(), want);
    assert_eq!(Array2::from_shape_fn((3, 2), |(feature, token)| oracle.element(feature, token).value), want);

    // The ninth group is in the second word. Code d keeps columns 33 and 35.
    let mut values = vec![0.0; 18];
    values[16..].copy_from_slice(&[7.0, 9.0]);
    let w = Sparse24::from_parts(1, 36, VectorLen::ONE, Elements::F32(values), vec![0xeeee_eeee, 0xd]).unwrap();
    let x = Matrix::from_f32(1, 36, &(0..36).map(|c| c as f32).collect::<Vec<_>>()).unwrap();
    let problem = Problem::linear(Op::Sparse24(VectorLen::ONE), 1, 1, 36, DType::F32);
    let weights = HostWeights::from(&w);
    let oracle = Oracle::new(&problem, Operands::new(&weights, &x));
    assert_eq!(oracle.unwrap().element(0, 0).value, 7.0 * 33.0 + 9.0 * 35.0);
}

#[test]
fn pruned_weights_are_not_multiplied_and_masked_ones_may_be() {
    let x = Matrix::from_f32(1, 4, &[1.0, f32::INFINITY, 1.0, 1.0]).unwrap();
    let value = |weights: &HostWeights, op| {
        let operands = Operands::new(weights, &x);
        Oracle::new(&Problem::linear(op, 1, 1, 4, DType::F32), operands).unwrap().element(0, 0)
    };
    // Code 8 keeps 0 and 2, away from the infinity; code 4 keeps it.
    for (code, want) in [(0x8, 5.0), (0x4, f64::INFINITY)] {
        let w = Sparse24::from_parts(1, 4, VectorLen::ONE, Elements::F32(vec![2.0, 3.0]), vec![code]).unwrap();
        assert_eq!(value(&HostWeights::from(&w), Op::Sparse24(VectorLen::ONE)).value, want);
    }
    let w = Matrix::from_f32(1, 4, &[2.0, 3.0, 3.0, f32::NAN]).unwrap();
    // Nothing or 0·∞ = NaN where the infinity is masked out, so nothing is decided; the NaN weight never matters.
    for (keep, want, bound) in [(0b0101, 5.0, f64::INFINITY), (0b0111, f64::INFINITY, 0.0)] {
        let mask = Mask::new(1, 4, vec![keep]).unwrap();
        let got = value(&HostWeights::Masked(w.clone(), mask.clone()), Op::Masked);
        assert_eq!((got.value, got.bound), (want, bound), "{keep:b}");
    }
}

#[test]
fn an_output_just_past_its_bound_fails() {
    for op in [Op::Dense, Op::Masked, Op::Sparse24(VectorLen::ONE)] {
        let case = plain(op, 5, 6, 67);
        let exact: Vec<f32> = case.oracle().full().iter().map(|&y| y as f32).collect();
        for (feature, token) in (0..5).flat_map(|f| (0..6).map(move |t| (f, t))) {
            let Expected { value, bound, .. } = case.oracle().element(feature, token);
            for (step, passes) in [(-1.02, false), (-0.98, true), (0.98, true), (1.02, false)] {
                let mut y = exact.clone();
                y[token * 5 + feature] = (value + step * bound) as f32;
                let verdict = case.verify(&Matrix::from_f32(6, 5, &y).unwrap());
                assert_eq!(verdict.passed(), passes, "{step}: {verdict}");
                let worst = verdict.worst.unwrap();
                assert_eq!((worst.feature, worst.token, worst.want, worst.bound), (feature, token, value, bound));
                let shown =
                    format!("feature {feature}, token {token} is {:e}, expected {value:e} ± {bound:e}", worst.got);
                assert_eq!(verdict.to_string().contains(&shown), !passes, "{verdict}");
            }
        }
    }
}

#[test]
fn whole_numbers_admit_no_error() {
    let k = 20_000;
    let w: Vec<f32> = (0..k).map(|i| (i % 17) as f32 - 8.0).collect();
    let x: Vec<f32> = (0..k).map(|i| ((i % 23) as f32 - 11.0) / 64.0).collect();
    let want = one(DType::F32, DType::F32, &w, &x);
    let got = w.iter().zip(&x).fold(0f32, |acc, (w, x)| acc + w * x);
    assert_eq!((want.bound, want.error_over_bound(f64::from(got))), (0.0, 0.0));
    assert_eq!(want.error_over_bound(f64::from(got + 1.0 / 64.0)), f64::INFINITY, "the least wrong product");
    // 24 bits are just enough for 2^24, not for twice 2^23 + 1, and one inexact operand spoils the sum.
    let exact = |w: &[f32]| one(DType::F32, DType::F32, w, &vec![1.0; w.len()]).bound == 0.0;
    let half = 2f32.powi(23);
    assert!(exact(&[half, half]) && exact(&[0.5 * half, 0.5]) && exact(&[0.0, -0.0, 3.0]));
    assert!(!exact(&[half + 1.0, half]) && !exact(&[half, 0.25]) && !exact(&[1.0, 2f32.powi(-126), 1.0]));
    // Partial sums are exact, but too small for a device that flushes.
    assert!(one(DType::F32, DType::F32, &[2f32.powi(-100)], &[2f32.powi(-30)]).bound > 0.0);
}

#[test]
fn one_corrupted_code_value_or_mask_bit_fails() {
    let rng = &mut Pcg64Mcg::seed_from_u64(11);
    for vector in VectorLen::ALL {
        let case = plain(Op::Sparse24(vector), 130, 8, 45);
        let y = case.naive();
        assert!(case.verify(&y).passed());
        let HostWeights::Sparse24(w) = &case.weights else { unreachable!() };
        for _ in 0..8 {
            let mut meta = w.meta().to_vec();
            // Group 11 is ragged: another code there would point its values at padding.
            let (row, group) = (rng.next_u32() as usize % w.meta_rows(), rng.next_u32() as usize % 11);
            let (word, shift) = (row * w.meta_cols() + group / 8, 4 * (group % 8));
            let other = LEGAL.into_iter().find(|&code| code != meta[word] >> shift & 0xf).unwrap();
            meta[word] = meta[word] & !(0xf << shift) | other << shift;
            let sparse = Sparse24::from_parts(130, 45, vector, w.values().clone(), meta).unwrap();
            assert!(!Case { weights: sparse.into(), ..case.clone() }.verify(&y).passed(), "code {row} {group}");

            let mut values = w.values().to_f32();
            let row = rng.next_u32() as usize % 130;
            values[row * w.k_physical() + 2 * group] += 0.001;
            let sparse = Sparse24::from_parts(130, 45, vector, Elements::F32(values), w.meta().to_vec()).unwrap();
            assert!(!Case { weights: sparse.into(), ..case.clone() }.verify(&y).passed(), "value {row} {group}");
        }
    }
    let case = plain(Op::Masked, 130, 8, 45);
    let y = case.naive();
    for _ in 0..32 {
        let (row, col) = (rng.next_u32() as usize % 130, rng.next_u32() as usize % 45);
        let HostWeights::Masked(w, mask) = &case.weights else { unreachable!() };
        let mut words = mask.words().to_vec();
        words[row * 2 + col / 32] ^= 1 << (col % 32);
        let mask = Mask::new(130, 45, words).unwrap();
        let weights = HostWeights::Masked(w.clone(), mask);
        assert!(!Case { weights, ..case.clone() }.verify(&y).passed(), "mask bit {row} {col}");
    }
}

#[test]
fn activations_have_f64_precision() {
    // x·Φ(x), from Φ to 16 digits. Its condition number in the left tail is x².
    let gelu = [
        (0.0, 0.0),
        (1.0, 0.841_344_746_068_542_9),
        (-1.0, -0.158_655_253_931_457_07),
        (2.0, 2.0 * 0.977_249_868_051_820_8),
        (0.5, 0.5 * 0.691_462_461_274_013_1),
        (-5.0, -5.0 * 2.866_515_718_791_939e-7),
        (-10.0, -10.0 * 7.619_853_024_160_527e-24),
        (40.0, 40.0),
    ];
    for (x, want) in gelu {
        let got = activation(Activation::Gelu, x);
        assert!((got - want).abs() <= 2e-16 * (4.0 + x * x) * want.abs(), "gelu({x}) = {got:e}, not {want:e}");
    }
    for i in -400..=400 {
        let x = f64::from(i) / 20.0;
        let tanh = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        let close = |a: Activation, want: f64| {
            assert!((activation(a, x) - want).abs() <= 1e-14 * (1.0 + x.abs()), "{a:?}({x}) is not {want}");
        };
        close(Activation::GeluTanh, 0.5 * x * (1.0 + tanh.tanh()));
        close(Activation::Silu, x * 0.5 * (1.0 + (x / 2.0).tanh()));
        close(Activation::Gelu, 0.5 * x * (1.0 + libm::erf(x * 0.5f64.sqrt())));
        close(Activation::Relu, x.max(0.0));
        close(Activation::Relu6, 6.0 - (6.0 - x.max(0.0)).max(0.0));
        close(Activation::None, x);
    }
    for a in Activation::ALL {
        assert!(activation(a, f64::NAN).is_nan(), "{a:?}");
        let end = |x: f64| if a == Activation::Relu6 { 6.0 } else { x };
        assert_eq!([f64::INFINITY, 1e30].map(|x| activation(a, x)), [f64::INFINITY, 1e30].map(end), "{a:?}");
    }
}

#[test]
fn the_bound_covers_what_activations_do_to_errors() {
    let slopes = [(Activation::Gelu, 1.13), (Activation::GeluTanh, 1.13), (Activation::Silu, 1.1)];
    for (a, slope) in slopes {
        let steepest = (-80_000..80_000).fold(0f64, |max, i| {
            let x = f64::from(i) * 1e-4;
            max.max(((activation(a, x + 1e-4) - activation(a, x)) / 1e-4).abs())
        });
        println!("steepest slope of {}: {steepest}", a.name());
        assert!(steepest <= slope && steepest > slope - 0.002, "{a:?}: {steepest}");

        // The bias is x itself, so pre is exact, and all that may differ is the evaluation.
        let mut largest = 0f64;
        for x in (-2400..=2400).map(|i| i as f32 / 73.0) {
            let epilogue = Epilogue { bias: true, activation: a, residual: false };
            let problem = Problem { epilogue, ..Problem::linear(Op::Dense, 1, 1, 0, DType::F32) };
            let (w, bias) = (Matrix::zeros(1, 0, DType::F32).unwrap(), [x]);
            let weights = HostWeights::from(&w);
            let operands = Operands::new(&weights, &w).bias(&bias);
            let want = Oracle::new(&problem, operands).unwrap().element(0, 0);
            let evaluation = 8.0 * U * (1.0 + f64::from(x).abs());
            assert!(want.bound >= evaluation && want.bound < evaluation * 1.2, "{x}: {want:?}");
            for (exp_off, div_off) in [(0.0, 0.0), (-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)] {
                let got = f64::from(activation_f32(a, x, exp_off, div_off));
                largest = largest.max((got - want.value).abs() / evaluation);
            }
        }
        println!("largest evaluation error of {}: {largest} of 8u(1+|x|)", a.name());
        assert!(largest < 1.0 && largest > 0.1, "{a:?}: {largest}");
    }
}

#[test]
fn classes_must_match() {
    let inf = f32::INFINITY;
    let (f32_, f16_) = (DType::F32, DType::F16);
    for (w, x, value) in [
        ([1.0, 1.0], [inf, 1.0], f64::INFINITY),
        ([-1.0, 1.0], [inf, 1.0], f64::NEG_INFINITY),
        ([1.0, 1.0], [inf, -inf], f64::NAN),
        ([0.0, 1.0], [inf, 1.0], f64::NAN),
        ([f32::NAN, 1.0], [1.0, 1.0], f64::NAN),
    ] {
        let want = one(f32_, f32_, &w, &x);
        assert!(want.value == value || (want.value.is_nan() && value.is_nan()), "{w:?}·{x:?}: {want:?}");
        for got in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, f64::from(f32::MAX)] {
            let same = got == value || (got.is_nan() && value.is_nan());
            assert_eq!(want.error_over_bound(got), if same { 0.0 } else { f64::INFINITY }, "{w:?}·{x:?}: {got}");
        }
    }
    for got in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert!(one(f32_, f32_, &[1.0], &[2.0]).error_over_bound(got) > 1.0, "{got}");
        assert!(one(f16_, f16_, &[1.0], &[2.0]).error_over_bound(got) > 1.0, "{got}");
    }
    // No products: exactly zero, and nothing else.
    let nothing = one(f32_, f32_, &[], &[]);
    assert_eq!((nothing.value, nothing.bound), (0.0, 0.0));
    assert_eq!((nothing.error_over_bound(-0.0), nothing.error_over_bound(1e-30)), (0.0, 1e-30 / 0.0));
}

#[test]
fn infinities_pass_the_epilogue_as_their_class() {
    let x = Matrix::from_f32(1, 1, &[f32::NEG_INFINITY]).unwrap();
    let w = Matrix::from_f32(1, 1, &[1.0]).unwrap();
    for (a, residual, value) in [
        (Activation::None, 1.0, f64::NEG_INFINITY),
        (Activation::None, f32::INFINITY, f64::NAN),
        (Activation::Relu, 1.0, 1.0),
        (Activation::Relu6, 1.0, 1.0),
        (Activation::Gelu, 1.0, f64::NAN),
        (Activation::GeluTanh, 1.0, f64::NAN),
        (Activation::Silu, 1.0, f64::NAN),
    ] {
        let epilogue = Epilogue { bias: true, activation: a, residual: true };
        let problem = Problem { epilogue, ..Problem::linear(Op::Dense, 1, 1, 1, DType::F32) };
        let residual = Matrix::from_f32(1, 1, &[residual]).unwrap();
        let weights = HostWeights::from(&w);
        let operands = Operands::new(&weights, &x).bias(&[3.0]).residual(&residual);
        let want = Oracle::new(&problem, operands).unwrap().element(0, 0);
        assert!(want.value == value || (want.value.is_nan() && value.is_nan()), "{a:?}: {want:?}");
        assert!(want.bound.is_finite() && want.bound < 1e-6);
    }
}

#[test]
fn overflow_is_infinite_in_f16_and_undecided_in_f32() {
    let f16 = |w: f32, x: f32| one(DType::F16, DType::F16, &[w], &[x]);
    // 65536 rounds to infinity; 65504 is the largest number, and an infinity is too far from it by less than a unit;
    // 65472 is one unit further down.
    assert_eq!(f16(256.0, 256.0).error_over_bound(f64::INFINITY), 0.0);
    assert!(f16(256.0, 256.0).error_over_bound(f64::NEG_INFINITY) > 1.0);
    assert!(f16(256.0, 512.0).error_over_bound(65504.0) > 1.0);
    assert!(f16(2.0, 32752.0).error_over_bound(f64::INFINITY) <= 1.0);
    assert!(f16(2.0, 32736.0).error_over_bound(f64::INFINITY) <= 1.0);
    assert!(f16(2.0, 32720.0).error_over_bound(f64::INFINITY) > 1.0);
    // The sum is finite, but an order of summation exists that overflows.
    let want = one(DType::F32, DType::F32, &[3e38, 3e38, -3e38], &[1.0; 3]);
    assert_eq!(want.bound, f64::INFINITY);
    for got in [3e38, f64::INFINITY, f64::NAN] {
        assert_eq!(want.error_over_bound(got), 0.0);
    }
    let (w, x) = (Matrix::from_f32(1, 1, &[3e38]).unwrap(), Matrix::from_f32(2, 1, &[2.0, 1e-3]).unwrap());
    let weights = HostWeights::from(&w);
    let operands = Operands::new(&weights, &x);
    let verify = |n, y: &[f32]| {
        let x = Matrix::from_f32(n, 1, &x.elements().to_f32()[..n]).unwrap();
        let problem = Problem::linear(Op::Dense, 1, n, 1, DType::F32);
        let oracle = Oracle::new(&problem, Operands { x: &x, ..operands }).unwrap();
        oracle.verify(&Matrix::from_f32(n, 1, y).unwrap(), Sample::All).unwrap()
    };
    assert!(!verify(1, &[f32::INFINITY]).passed(), "nothing was decided");
    let verdict = verify(2, &[f32::INFINITY, 3e38 * 1e-3]);
    assert!(verdict.passed() && (verdict.checked, verdict.undecided) == (2, 1), "{verdict}");
    assert!(!verify(2, &[f32::INFINITY, 3.001e35]).passed());
}

#[test]
fn flushing_subnormals_is_allowed_and_nothing_more() {
    let tiny = 2f32.powi(-16); // subnormal in f16
    // An operand may be flushed: the whole product is in doubt.
    let want = one(DType::F16, DType::F32, &[tiny, 1.0], &[1000.0, 1.0]);
    assert!(want.error_over_bound(1.0) <= 1.0 && want.error_over_bound(0.98) > 1.0, "{want:?}");
    // The same number in f32 is normal.
    let want = one(DType::F32, DType::F32, &[tiny, 1.0], &[1000.0, 1.0]);
    assert!(want.error_over_bound(1.0) > 1.0, "{want:?}");
    // A subnormal result may be flushed to zero, or rounded to a neighbour, but is not arbitrary.
    let want = one(DType::F32, DType::F16, &[tiny], &[1.0]);
    assert!(want.error_over_bound(0.0) <= 1.0);
    assert!(want.error_over_bound(2f64.powi(-16) + 2f64.powi(-24)) <= 1.0);
    assert!(want.error_over_bound(2f64.powi(-16) * 1.1) > 1.0);
    assert!(one(DType::F32, DType::F16, &[4.0], &[tiny]).error_over_bound(0.0) <= 1.0, "a rounding from subnormal");
    assert!(one(DType::F32, DType::F16, &[5.0], &[tiny]).error_over_bound(0.0) > 1.0, "normal");
    // A subnormal residual may be flushed when it is loaded.
    let epilogue = Epilogue { bias: true, residual: true, ..Epilogue::NONE };
    let problem = Problem { epilogue, ..Problem::linear(Op::Dense, 1, 1, 0, DType::F16) };
    let empty = Matrix::zeros(1, 0, DType::F16).unwrap();
    let residual = Matrix::from_f32(1, 1, &[2.0 * tiny]).unwrap().cast(DType::F16);
    let bias = [4.0 * tiny];
    let weights = &HostWeights::from(&empty);
    let operands = Operands::new(weights, &empty).bias(&bias).residual(&residual);
    let want = Oracle::new(&problem, operands).unwrap().element(0, 0);
    assert_eq!(want.value, f64::from(6.0 * tiny));
    assert!(want.error_over_bound(f64::from(4.0 * tiny)) <= 1.0 && want.error_over_bound(f64::from(3.9 * tiny)) > 1.0);
    // A product below every f32.
    let want = one(DType::F32, DType::F32, &[1e-30], &[1e-30]);
    assert!(want.value > 0.0 && want.error_over_bound(0.0) <= 1.0 && want.error_over_bound(1e-36) > 1.0);
    // A subnormal operand times an infinity is an infinity or NaN.
    let want = one(DType::F16, DType::F16, &[tiny], &[f32::INFINITY]);
    assert_eq!((want.value, want.bound), (f64::INFINITY, f64::INFINITY));
}

#[test]
fn samples_cover_the_edges() {
    let case = plain(Op::Sparse24(VectorLen::ONE), 40, 90, 8);
    let y = case.naive().elements().to_f32();
    for seed in 0..4 {
        let sample = Sample::Random { features: 5, tokens: 6, seed };
        let oracle = case.oracle();
        let verify = |y: &[f32]| oracle.verify(&Matrix::from_f32(90, 40, y).unwrap(), sample).unwrap();
        assert_eq!(verify(&y).checked, 9 * 10);
        assert_eq!(verify(&y), verify(&y));
        for (feature, token) in [0, 37, 38, 39].into_iter().flat_map(|f| [0, 87, 88, 89].map(|t| (f, t))) {
            let mut wrong = y.clone();
            wrong[token * 40 + feature] += 1.0;
            let worst = verify(&wrong).worst.unwrap();
            assert_eq!((worst.feature, worst.token), (feature, token));
            assert!(!verify(&wrong).passed());
        }
    }
    // Different seeds draw different elements; as many as there are is all of them; more than 64 tokens are blocks.
    let y = Matrix::from_f32(90, 40, &y).unwrap();
    let draw = |features, tokens, seed| case.oracle().verify(&y, Sample::Random { features, tokens, seed }).unwrap();
    assert_ne!(draw(5, 6, 0).worst, draw(5, 6, 1).worst);
    assert_eq!(draw(36, usize::MAX, 0), case.verify(&y));
    assert_eq!(case.verify(&y).checked, 40 * 90);
    let empty = plain(Op::Dense, 0, 3, 4);
    let verdict = empty.verify(&Matrix::zeros(3, 0, DType::F32).unwrap());
    assert!(verdict.passed() && verdict.worst.is_none());
}

#[test]
fn operands_that_are_not_the_problems_are_refused() {
    let matrix = |r, c, dtype| Matrix::zeros(r, c, dtype).unwrap();
    let (w, x) = (matrix(4, 8, DType::F32), matrix(3, 8, DType::F32));
    let mask = Mask::from_fn(4, 4, |_, _| true).unwrap();
    let sparse = plain(Op::Sparse24(VectorLen::ONE), 4, 3, 8).weights;
    let problem = Problem::linear(Op::Dense, 4, 3, 8, DType::F32);
    let weights = HostWeights::from(&w);
    let good = Operands::new(&weights, &x);
    let refused = |problem: Problem, operands| Oracle::new(&problem, operands).map(|_| ()).unwrap_err();
    assert!(Oracle::new(&problem, good).is_ok());

    let four = Op::Sparse24(VectorLen::new(4).unwrap());
    let error = refused(Problem { op: four, ..problem }, Operands { weights: &sparse, ..good });
    let want = "weights was made for sparse24 with vector length 1, but sparse24 with vector length 4 is needed";
    assert_eq!(error.to_string(), want);
    assert!(refused(Problem { op: Op::Masked, ..problem }, good).is_mismatch());
    assert!(refused(Problem { k: 9, ..problem }, good).is_shape());
    assert!(refused(Problem { form: Form::Gemm, ..problem }, good).is_shape());
    let masked = Operands { weights: &HostWeights::Masked(w.clone(), mask.clone()), ..good };
    assert!(refused(Problem { op: Op::Masked, ..problem }, masked).is_shape());
    assert!(refused(Problem { storage: DType::F16, ..problem }, good).is_dtype());
    // bf16 weights are widened to f32 when they are uploaded, never narrowed to f16.
    let bf16 = matrix(4, 8, DType::Bf16);
    let widened = Operands { weights: &HostWeights::from(&bf16), ..good };
    assert!(Oracle::new(&problem, widened).is_ok());
    let half = matrix(3, 8, DType::F16);
    assert!(Oracle::new(&Problem { storage: DType::F16, ..problem }, Operands { x: &half, ..widened }).is_err());
    assert!(refused(problem, Operands { x: &half, ..good }).is_dtype());

    let extra = refused(problem, Operands { bias: Some(&[0.0; 4]), ..good }).to_string();
    assert!(extra.starts_with("a bias is given, but"), "{extra}");
    let epilogue = Epilogue { bias: true, residual: true, ..Epilogue::NONE };
    let full = Problem { epilogue, ..problem };
    let residual = matrix(3, 4, DType::F32);
    let given = Operands { bias: Some(&[0.0; 4]), residual: Some(&residual), ..good };
    assert!(Oracle::new(&full, given).is_ok());
    assert!(refused(full, Operands { bias: Some(&[0.0; 3]), ..given }).is_shape());
    let absent = refused(full, Operands { residual: None, ..given }).to_string();
    assert!(absent.ends_with("but no residual is given"), "{absent}");
    assert!(refused(full, Operands { residual: Some(&w), ..given }).is_shape());
    assert!(refused(Problem { output: DType::F16, ..full }, given).is_dtype());

    let oracle = Oracle::new(&problem, good).unwrap();
    assert!(oracle.verify(&matrix(4, 3, DType::F32), Sample::All).is_err_and(|e| e.is_shape()));
    assert!(oracle.verify(&matrix(3, 4, DType::F16), Sample::All).is_err_and(|e| e.is_dtype()));
}

#[test]
#[ignore = "measures the time of one verification; run it by name"]
fn time_of_a_verification() {
    for op in [Op::Dense, Op::Sparse24(VectorLen::ONE), Op::Masked] {
        for form in [Form::Linear, Form::Gemm] {
            let problem = Problem { form, ..Problem::linear(op, 64, 64, 28672, DType::F16) };
            let case = Case::random(problem, DType::F16, 1);
            let (rows, cols) = problem.y_shape();
            let y = Matrix::zeros(rows, cols, DType::F16).unwrap();
            let start = std::time::Instant::now();
            let verdict = case.verify(&y);
            println!("{} {}: {:?} ({verdict})", op.name(), form.name(), start.elapsed());
        }
    }
}
