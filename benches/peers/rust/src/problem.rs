//! Operands, and the judgement of what a peer makes of them. The bound is that of sparse24's `src/reference.rs`:
//! |y − y64| ≤ γ(K+1)·S + 2K·2⁻¹²⁶ with u = 2⁻²⁴ and S = Σ|a||b|; zero where every sum is exact.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, ensure};

/// Y[n, m] = X[n, k] · W[m, k]ᵀ.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.m, self.n, self.k)
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sizes: Option<Vec<usize>> = text.split('x').map(|size| size.parse().ok().filter(|&s| s > 0)).collect();
        match sizes.as_deref() {
            // Up to there all sums of whole numbers, 4·4·k at most, are exact in f32.
            Some(&[m, n, k]) if k % 4 == 0 && k <= 1 << 20 => Ok(Self { m, n, k }),
            _ => Err("expected MxNxK, with a K that is a multiple of 4 and at most 2^20".to_owned()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// In [−1, 1), multiples of 2⁻²³.
    Uniform,
    /// From −4 to 4: f32 sums of their products are exact in every order.
    Whole,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn fill(&mut self, numbers: Numbers, len: usize) -> Vec<f32> {
        let mut draw = || match numbers {
            Numbers::Uniform => (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0,
            Numbers::Whole => (self.next() >> 32).wrapping_mul(9).wrapping_shr(32) as f32 - 4.0,
        };
        (0..len).map(|_| draw()).collect()
    }

    /// One of every 32 of `len`, at most 512.
    fn draw(&mut self, len: usize) -> Vec<usize> {
        let step = 32.max(len.div_ceil(512));
        (0..len).step_by(step).map(|from| from + self.next() as usize % step.min(len - from)).collect()
    }
}

pub(crate) struct Problem {
    pub(crate) shape: Shape,
    /// Activations [n, k].
    pub(crate) x: Vec<f32>,
    /// Weights [m, k].
    pub(crate) w: Vec<f32>,
    /// The weights with the smaller two magnitudes of every four in a row at zero.
    pub(crate) pruned: Vec<f32>,
    numbers: Numbers,
    features: Vec<usize>,
    tokens: Vec<usize>,
}

#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) error_over_bound: f64,
    pub(crate) checked: usize,
    pub(crate) failure: Option<String>,
}

impl Problem {
    pub(crate) fn new(shape: Shape, numbers: Numbers, seed: u64) -> Self {
        let Shape { m, n, k } = shape;
        let mut random = Random(seed);
        let w = random.fill(numbers, m * k);
        let x = random.fill(numbers, n * k);
        let mut pruned = w.clone();
        for group in pruned.chunks_exact_mut(4) {
            let mut order = [0, 1, 2, 3];
            // Stable, so that ties go to the lower index.
            order.sort_by(|&a, &b| group[b].abs().total_cmp(&group[a].abs()));
            order[2..].iter().for_each(|&least| group[least] = 0.0);
        }
        let (features, tokens) = (random.draw(m), random.draw(n));
        Self { shape, x, w, pruned, numbers, features, tokens }
    }

    /// Judges `y` [n, m], the product with the weights or with the pruned ones, of `depth` multiply-adds an output.
    pub(crate) fn judge(&self, y: &[f32], pruned: bool, depth: usize) -> Result<Verdict> {
        let Shape { m, n, k } = self.shape;
        ensure!(y.len() == m * n, "{} outputs instead of {m}x{n}", y.len());
        let weights = if pruned { &self.pruned } else { &self.w };
        let terms = (depth + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
        let gamma = terms / (1.0 - terms);
        let checked = self.features.len() * self.tokens.len();
        let mut verdict = Verdict { error_over_bound: 0.0, checked, failure: None };
        if let Some(at) = y.iter().position(|value| !value.is_finite()) {
            verdict.failure = Some(format!("token {}, feature {} is {} or was not written", at / m, at % m, y[at]));
        }
        for &feature in &self.features {
            let row = &weights[feature * k..][..k];
            for &token in &self.tokens {
                let (mut sum, mut magnitude) = (0.0, 0.0);
                for (&a, &b) in row.iter().zip(&self.x[token * k..][..k]) {
                    let product = f64::from(a) * f64::from(b);
                    sum += product;
                    magnitude += product.abs();
                }
                let got = y[token * m + feature];
                let error = (f64::from(got) - sum).abs();
                let bound = match self.numbers {
                    Numbers::Whole => 0.0,
                    Numbers::Uniform => gamma * magnitude + 2.0 * depth as f64 * f64::from(f32::MIN_POSITIVE),
                };
                let ratio = match error / bound {
                    _ if error == 0.0 => 0.0,
                    ratio if ratio.is_nan() => f64::INFINITY,
                    ratio => ratio,
                };
                verdict.error_over_bound = verdict.error_over_bound.max(ratio);
                if (error.is_nan() || error > bound) && verdict.failure.is_none() {
                    verdict.failure = Some(format!(
                        "token {token}, feature {feature} is {got} instead of {sum}, which may err by {bound:e}"
                    ));
                }
            }
        }
        Ok(verdict)
    }
}
