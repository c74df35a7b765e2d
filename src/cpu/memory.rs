//! Memory of the CPU device: aligned buffers, and outputs that several threads write in parts.
//!
//! Invariant: an [`Aligned`] buffer starts on a cache line, so that no vector of a kernel straddles two.
#![allow(unsafe_code, reason = "threads write disjoint parts of one output")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::{Pod, Zeroable};

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
