//! Pruning, compressing and decompressing on the CPU device: the host's own loops, dealt out by blocks of rows.
//!
//! Invariant: tasks begin where a pattern begins, at whatever vector length, and each writes what it alone reads, so
//! results do not depend on the number of threads.

use rayon::prelude::*;

use super::Cpu;
use super::weights::BLOCK;
use crate::format::expand_rows;
use crate::groups::Bits;
use crate::mask::VectorLen;
use crate::matrix::Elements;
use crate::prune::{Workspace, sparsify_rows};

/// Values and metadata of `k` columns, laid out as in the format.
pub(crate) struct Parts<V, M> {
    pub(crate) k: usize,
    pub(crate) vector: VectorLen,
    pub(crate) values: V,
    pub(crate) meta: M,
}

impl<V, M> Parts<V, M> {
    /// Elements of W, values and words of metadata of a task.
    fn task(&self) -> (usize, usize, usize) {
        let Self { k, vector, .. } = self;
        (BLOCK * k, BLOCK * 2 * k.div_ceil(4), BLOCK / vector.get() * k.div_ceil(32))
    }
}

impl Cpu {
    /// Prunes and compresses.
    pub(crate) fn sparsify(&self, w: &Elements, to: Parts<&mut Elements, &mut [u32]>) {
        let Parts { k, vector, values, meta } = to;
        match (w, values) {
            (Elements::F32(w), Elements::F32(values)) => self.sparsify_typed(w, Parts { k, vector, values, meta }),
            (Elements::F16(w), Elements::F16(values)) => self.sparsify_typed(w, Parts { k, vector, values, meta }),
            // Refused when the call is prepared.
            _ => {}
        }
    }

    fn sparsify_typed<T: Bits>(&self, w: &[T], to: Parts<&mut Vec<T>, &mut [u32]>) {
        if w.is_empty() {
            return;
        }
        let (elements, values, words) = to.task();
        let Parts { k, vector, .. } = to;
        let task = |work: &mut Workspace, ((w, values), meta): ((&[T], &mut [T]), &mut [u32])| {
            sparsify_rows(w, k, vector, work, values, meta);
        };
        match &self.pool.threads {
            Some(threads) => threads.install(|| {
                let parts = w.par_chunks(elements).zip(to.values.par_chunks_mut(values));
                parts.zip(to.meta.par_chunks_mut(words)).for_each_init(Workspace::default, task);
            }),
            None => task(&mut Workspace::default(), ((w, to.values), to.meta)),
        }
    }

    /// Decompresses.
    pub(crate) fn densify(&self, from: Parts<&Elements, &[u32]>, w: &mut Elements) {
        let Parts { k, vector, values, meta } = from;
        match (values, w) {
            (Elements::F32(values), Elements::F32(w)) => self.densify_typed(Parts { k, vector, values, meta }, w),
            (Elements::F16(values), Elements::F16(w)) => self.densify_typed(Parts { k, vector, values, meta }, w),
            // Refused when the call is prepared.
            _ => {}
        }
    }

    fn densify_typed<T: Bits>(&self, from: Parts<&Vec<T>, &[u32]>, w: &mut [T]) {
        if w.is_empty() {
            return;
        }
        let (elements, values, words) = from.task();
        let Parts { k, vector, .. } = from;
        match &self.pool.threads {
            Some(threads) => threads.install(|| {
                let parts = w.par_chunks_mut(elements).zip(from.values.par_chunks(values));
                parts
                    .zip(from.meta.par_chunks(words))
                    .for_each(|((w, values), meta)| expand_rows(values, meta, k, vector, w));
            }),
            None => expand_rows(from.values, from.meta, k, vector, w),
        }
    }
}
