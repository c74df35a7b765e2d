//! What this processor can do at most: multiply-adds in registers, and reading memory.
#![allow(unsafe_code, reason = "kernels over vector instructions")]

use super::Pool;
use super::memory::{Aligned, Arena, Parts};
use crate::simd::{Instructions, Work};

/// Chains of multiply-adds that do not wait for each other: more than latency times throughput (4 or 5 cycles, two per
/// cycle), few enough for the 16 registers of AVX2.
const CHAINS: usize = 12;

/// Multiply-adds of a chain in a call.
const ROUNDS: usize = 1 << 16;

/// Runs of memory that a thread reads at a time; see `gemv` in sparse.rs.
const RUNS: usize = 4;

/// A call that measures a ceiling.
#[derive(Debug)]
pub(crate) enum CpuProbe {
    /// Multiply-adds in registers.
    Fma,
    /// Reads the buffer.
    Read(Aligned<f32>),
}

impl CpuProbe {
    /// Reads so many bytes.
    pub(crate) fn read(bytes: usize) -> Self {
        // As weights lie.
        let mut buffer = Arena::default().zeros(bytes / 4);
        // Pages that were never written all lie in one.
        buffer.fill(1.0);
        Self::Read(buffer)
    }

    /// Operations, or bytes, of a call on so many threads.
    pub(crate) fn work(&self, lanes: usize, threads: usize) -> f64 {
        match self {
            Self::Fma => (2 * CHAINS * ROUNDS * lanes * threads) as f64,
            Self::Read(buffer) => (4 * (buffer.len() - left_out(buffer.len(), threads))) as f64,
        }
    }

    pub(super) fn run_on(&self, pool: &Pool, sums: &mut [f32]) {
        let sums = Parts::new(sums);
        pool.each(pool.len(), |thread| {
            // SAFETY: each thread has its own sum.
            let sum = &mut unsafe { sums.part(thread..thread + 1) }[0];
            *sum = match self {
                Self::Fma => pool.simd().run(Fma),
                Self::Read(buffer) => {
                    let len = part(buffer.len(), pool.len());
                    pool.simd().run(Read(&buffer[thread * len..(thread + 1) * len]))
                }
            };
        });
    }
}

/// Numbers that each thread reads: whole vectors of any width in each run.
fn part(len: usize, threads: usize) -> usize {
    len / threads / (16 * RUNS) * (16 * RUNS)
}

fn left_out(len: usize, threads: usize) -> usize {
    len - threads * part(len, threads)
}

struct Fma;

impl Work for Fma {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) -> f32 {
        // SAFETY: the caller has the instructions; the array holds the widest vector.
        unsafe {
            // Tends to 1: neither subnormal nor infinite, and not known beforehand.
            let (factor, term) = (S::splat(std::hint::black_box(0.5)), S::splat(0.5));
            let mut acc = [S::splat(0.0); CHAINS];
            for _ in 0..ROUNDS {
                for acc in &mut acc {
                    *acc = S::fma(factor, *acc, term);
                }
            }
            let mut out = [0.0; 16];
            let mut sum = 0.0;
            for acc in acc {
                S::store(out.as_mut_ptr(), acc);
                sum += out[0];
            }
            sum
        }
    }
}

struct Read<'a>(&'a [f32]);

impl Work for Read<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) -> f32 {
        assert!(self.0.len().is_multiple_of(16 * RUNS));
        let run = self.0.len() / RUNS;
        // SAFETY: the caller has the instructions; runs are whole vectors of 16, and so of any width.
        unsafe {
            let one = S::splat(1.0);
            let mut acc = [[S::splat(0.0); 2]; RUNS];
            for at in (0..run).step_by(2 * S::LANES) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (i, acc) in acc.iter_mut().enumerate() {
                        if at + i * S::LANES < run {
                            *acc = S::fma(S::load(self.0.as_ptr().add(r * run + at + i * S::LANES)), one, *acc);
                        }
                    }
                }
            }
            let mut out = [0.0; 16];
            let mut sum = 0.0;
            for acc in acc.as_flattened() {
                S::store(out.as_mut_ptr(), *acc);
                sum += out.iter().sum::<f32>();
            }
            sum
        }
    }
}
