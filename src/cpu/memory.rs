//! Memory of the CPU device: aligned buffers, and outputs that several threads write in parts, of elements one after
//! another or of columns.
//!
//! Invariant: an [`Aligned`] buffer starts on a cache line, so that no vector of a kernel straddles two.
#![allow(unsafe_code, reason = "threads write disjoint parts of one output")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::{Pod, Zeroable};

use super::Cpu;

/// A cache line.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Elements that start on a cache line.
#[derive(Debug)]
pub(crate) struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    pub(super) const EMPTY: Self = Self { lines: Vec::new(), len: 0, element: PhantomData };

    /// `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let mut own = Self::EMPTY;
        own.resize(len);
        own
    }

    /// Elements that there is room for.
    pub(super) fn room(&self) -> usize {
        self.lines.len() * size_of::<Line>() / size_of::<T>()
    }

    /// Makes room for `len` elements: new ones are zero, others keep what they hold.
    pub(super) fn resize(&mut self, len: usize) {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        if lines > self.lines.len() {
            self.lines.resize(lines, Line::zeroed());
        }
        self.len = len;
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

/// A slice of which several threads borrow disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are borrowed by `part` alone, whose callers vouch that they are disjoint.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Borrows a part.
    ///
    /// # Panics
    /// If the part is not within the slice.
    ///
    /// # Safety
    /// No other borrowed part may overlap it.
    #[allow(clippy::mut_from_ref, reason = "disjoint parts, as the caller vouches")]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: within the slice, which is borrowed for 'a, and disjoint from all other parts.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// A slice as chunks of `len` elements, the last of which may be shorter, that several threads borrow.
pub(super) struct Chunks<'a, T> {
    parts: Parts<'a, T>,
    len: usize,
}

impl<'a, T> Chunks<'a, T> {
    /// # Panics
    /// If elements are cut into chunks of none.
    pub(super) fn new(slice: &'a mut [T], len: usize) -> Self {
        assert!(len > 0 || slice.is_empty(), "chunks of no elements");
        Self { parts: Parts::new(slice), len }
    }

    pub(super) fn count(&self) -> usize {
        self.parts.len.div_ceil(self.len.max(1))
    }

    /// Borrows a chunk.
    ///
    /// # Panics
    /// If there is none of this number.
    ///
    /// # Safety
    /// It must not be borrowed twice.
    #[allow(clippy::mut_from_ref, reason = "disjoint chunks, as the caller vouches")]
    pub(super) unsafe fn get(&self, i: usize) -> &'a mut [T] {
        let start = i * self.len;
        // SAFETY: chunks are disjoint, and each is borrowed once.
        unsafe { self.parts.part(start..self.parts.len.min(start + self.len)) }
    }
}

/// Columns that are dealt out to strips: strip `s` has the `width` columns from `first + s * width` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) first: usize,
    pub(crate) width: usize,
}

/// How a matrix of so many columns is cut into blocks of rows, and each block into strips, which have some columns of
/// each run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strips<'a> {
    pub(crate) columns: usize,
    pub(crate) rows: usize,
    pub(crate) strips: usize,
    /// From left to right.
    pub(crate) runs: &'a [Run],
}

/// One strip of one block of rows.
pub(crate) struct Strip<'a> {
    y: Parts<'a, f32>,
    cut: Strips<'a>,
    block: usize,
    strip: usize,
}

impl Strip<'_> {
    /// Its columns of a run, in one row of its block.
    ///
    /// # Panics
    /// If the block has no such row.
    pub(crate) fn row(&mut self, row: usize, run: usize) -> &mut [f32] {
        let Strips { columns, rows, runs, .. } = self.cut;
        assert!(row < rows, "row {row} of {rows}");
        let Run { first, width } = runs[run];
        let start = (self.block * rows + row) * columns + first + self.strip * width;
        // SAFETY: `each_strip` makes one strip of each number in a block, of columns that no other has, and what is
        // lent here is lent until the next call.
        unsafe { self.y.part(start..start + width) }
    }
}

impl Cpu {
    /// Gives the threads every strip of a matrix, with its number (those of the first block first) and `own_len`
    /// elements of `own` that are its alone.
    ///
    /// # Panics
    /// If runs overlap or reach past the columns, or `own` is too short.
    pub(crate) fn each_strip(
        &self,
        y: &mut [f32],
        cut: Strips<'_>,
        (own, own_len): (&mut [f32], usize),
        work: impl Fn(usize, Strip<'_>, &mut [f32]) + Sync + Send,
    ) {
        let Strips { columns, rows, strips, runs } = cut;
        let end = runs.iter().fold(0, |end, run| {
            assert!(end <= run.first, "runs overlap: {runs:?}");
            run.first + strips * run.width
        });
        assert!(end <= columns, "{runs:?} are more than {columns} columns");
        let blocks = y.len().checked_div(rows * columns).unwrap_or(0);
        let (y, own) = (Parts::new(y), Parts::new(own));
        self.pool.each(blocks * strips, |task| {
            let strip = Strip { y, cut, block: task / strips, strip: task % strips };
            // SAFETY: each task has a part of its own.
            work(task, strip, unsafe { own.part(task * own_len..(task + 1) * own_len) });
        });
    }
}
