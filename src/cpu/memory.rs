//! Memory of the CPU device: aligned buffers, and outputs that several threads write in parts, of elements one after
//! another or of columns.
//!
//! Invariant: an [`Aligned`] buffer starts on a cache line, so that no vector of a kernel straddles two.
#![allow(unsafe_code, reason = "threads write disjoint parts of one output")]

use std::alloc::Layout;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytemuck::{Pod, Zeroable};

use super::Cpu;

/// A cache line.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Elements that start on a cache line.
#[derive(Debug)]
pub(crate) struct Aligned<T> {
    lines: Lines,
    len: usize,
    element: PhantomData<T>,
}

/// Where elements lie.
#[derive(Debug)]
enum Lines {
    Own(Vec<Line>),
    /// A piece of what an [`Arena`] holds.
    Piece(Piece),
}

impl Lines {
    fn get(&self) -> &[Line] {
        match self {
            Self::Own(lines) => lines,
            // SAFETY: the piece's own lines, borrowed as it is.
            Self::Piece(piece) => unsafe { std::slice::from_raw_parts(piece.start, piece.len) },
        }
    }

    fn get_mut(&mut self) -> &mut [Line] {
        match self {
            Self::Own(lines) => lines,
            // SAFETY: as above.
            Self::Piece(piece) => unsafe { std::slice::from_raw_parts_mut(piece.start, piece.len) },
        }
    }
}

impl<T: Pod> Aligned<T> {
    pub(super) const EMPTY: Self = Self { lines: Lines::Own(Vec::new()), len: 0, element: PhantomData };

    /// Elements that there is room for.
    pub(super) fn room(&self) -> usize {
        size_of_val(self.lines.get()) / size_of::<T>()
    }

    /// Makes room for `len` elements: new ones are zero, others keep what they hold.
    pub(super) fn resize(&mut self, len: usize) {
        let lines = lines_of::<T>(len);
        if lines > self.lines.get().len() {
            let mut own = match std::mem::replace(&mut self.lines, Lines::Own(Vec::new())) {
                Lines::Own(lines) => lines,
                piece @ Lines::Piece(_) => piece.get().to_vec(),
            };
            own.resize(lines, Line::zeroed());
            self.lines = Lines::Own(own);
        }
        self.len = len;
    }
}

fn lines_of<T>(len: usize) -> usize {
    (len * size_of::<T>()).div_ceil(size_of::<Line>())
}

/// Memory for what is read from end to end, in pieces that follow each other in large blocks, for which the system is
/// asked for large pages: with pages of 4 KiB the processor looks up a page for every 64 lines, and hardware
/// prefetchers begin anew in each. A single matrix is often smaller than a large page. A block is given back with its
/// last piece, and not before.
#[derive(Debug, Default)]
pub(crate) struct Arena(Mutex<Option<(Weak<Block>, usize)>>);

/// Lines of an [`Arena`] that nobody else has.
#[derive(Debug)]
struct Piece {
    start: *mut Line,
    len: usize,
    /// Keeps the lines.
    _block: Arc<Block>,
}

// SAFETY: nobody else has the lines, as with a `Vec`.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

/// Zeroed memory.
#[derive(Debug)]
struct Block {
    start: *mut u8,
    layout: Layout,
    /// Lines, from the first large page on.
    lines: usize,
}

// SAFETY: plain memory, which pieces alone look at.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Arena {
    /// `len` zeros.
    pub(super) fn zeros<T: Pod>(&self, len: usize) -> Aligned<T> {
        let lines = lines_of::<T>(len);
        if lines == 0 {
            return Aligned::EMPTY;
        }
        let mut present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = present.as_ref().and_then(|(block, used)| Some((block.upgrade()?, *used)));
        let (block, used) = match room.filter(|(block, used)| block.lines - used >= lines) {
            Some(room) => room,
            // What would leave much of a block unused has its own.
            None if lines > Block::LINES / 4 => return Arc::new(Block::new(lines)).piece(0, lines).holding(len),
            None => (Arc::new(Block::new(Block::LINES)), 0),
        };
        *present = Some((Arc::downgrade(&block), used + lines));
        block.piece(used, lines).holding(len)
    }
}

impl Piece {
    fn holding<T: Pod>(self, len: usize) -> Aligned<T> {
        Aligned { lines: Lines::Piece(self), len, element: PhantomData }
    }
}

impl Block {
    /// A large page of most processors.
    const PAGE: usize = 2 << 20;

    /// Lines of a block: more than allocators cut from what they hold already, so that the system gives it anew.
    const LINES: usize = (64 << 20) / size_of::<Line>();

    fn new(lines: usize) -> Self {
        let bytes = lines * size_of::<Line>() + Self::PAGE;
        // Aligned as every block is, for allocators to take zeroed memory from the system instead of writing it.
        let layout = Layout::from_size_align(bytes, 16).unwrap_or_else(|_| std::process::abort());
        // SAFETY: not of no size.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        if start.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        let own = Self { start, layout, lines };
        #[cfg(target_os = "linux")]
        // SAFETY: whole pages of the block. Advice changes nothing of what they hold; a system without large pages
        // refuses it.
        unsafe {
            libc::madvise(own.first().cast(), lines * size_of::<Line>() / Self::PAGE * Self::PAGE, libc::MADV_HUGEPAGE);
        }
        own
    }

    /// Where the first large page begins.
    fn first(&self) -> *mut Line {
        // SAFETY: there is a page more than lines.
        unsafe { self.start.add(self.start.align_offset(Self::PAGE)).cast() }
    }

    /// The lines from `first` on, of which each is given out once.
    fn piece(self: &Arc<Self>, first: usize, len: usize) -> Piece {
        assert!(first + len <= self.lines);
        // SAFETY: within the block.
        Piece { start: unsafe { self.first().add(first) }, len, _block: Arc::clone(self) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no piece is left.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(self.lines.get())[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(self.lines.get_mut())[..self.len]
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// Pieces lie in one block until it is full, are zero whatever lay there before, and take it along with the last.
    #[test]
    fn a_block_is_shared_and_goes_with_its_last_piece() {
        let arena = Arena::default();
        let block = || arena.0.lock().unwrap().as_ref().map(|(block, _)| block.clone()).unwrap();
        let (mut a, b) = (arena.zeros::<f32>(100), arena.zeros::<u16>(33));
        assert_eq!((a.len(), b.len()), (100, 33));
        let starts = [a.as_ptr().addr(), b.as_ptr().addr()];
        assert!(starts.iter().all(|start| start.is_multiple_of(size_of::<Line>())));
        a.fill(1.0);
        assert!(b.iter().all(|&x| x == 0));
        let first = block();
        assert_eq!(first.strong_count(), 2);
        // What does not fit, and would leave much of a new block unused, has one of its own.
        let own = arena.zeros::<f32>(16 << 20);
        assert!(own.iter().all(|&x| x == 0.0) && first.strong_count() == 2);
        drop((a, b));
        assert_eq!(first.strong_count(), 0);
        let c = arena.zeros::<f32>(100);
        assert!(c.iter().all(|&x| x == 0.0) && block().strong_count() == 1);
        assert_eq!(arena.zeros::<f32>(0).len(), 0);
        // What grows beyond its piece keeps its numbers.
        let mut grown = c;
        grown.fill(2.0);
        grown.resize(200);
        assert!(grown[..100].iter().all(|&x| x == 2.0) && grown[112..].iter().all(|&x| x == 0.0));
    }
}
