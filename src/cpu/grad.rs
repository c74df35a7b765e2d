//! Gradients of products on the CPU: of the activations, and of the weights that are kept.
//!
//! For Y = X·Wᵀ with W `m x k`, dX = dY·W and dW = dYᵀ·X. Dense and masked weights go to the crate `gemm`. With 2:4
//! weights both halve their multiply-adds where enough rows share a pattern, without a dense copy of W:
//!
//! **dX** ([`grad_x`]). A row of W adds to two columns of each group, and with them all rows that share its pattern. So
//! vectors hold tokens, as in the product itself: of two groups the sums for their four kept columns stay in registers
//! while up to [`ROWS`] rows pass by, and are then added to the columns that the codes name, in a panel of dX that is
//! column-major. Weights are read in the layout of the product.
//!
//! **dW** ([`grad_values`]). Vectors hold rows of W that share a pattern, and a token adds to each of them its
//! activation in a kept column, times its gradient: which column that is, is decided once for a tile. Both operands are
//! cut into panels that are read from start to end.
//!
//! With fewer rows to a pattern than that, W is expanded into scratch, or dW computed in full there, and the crate
//! `gemm` multiplies. Invariant: every element's sum is formed by one thread in an order that the shape decides, so
//! that results do not depend on the number of threads.
#![allow(unsafe_code, reason = "kernels over vector instructions; threads write disjoint parts of buffers")]
#![allow(clippy::needless_range_loop, reason = "counters of loops that are unrolled, over arrays of registers")]

use super::memory::Parts;
use super::rows::work;
use super::sparse::Transpose;
use super::weights::{BLOCK, Codes, CpuWeights, Dense, Packed, UNIT, Values};
use super::{Cpu, Pool, Scratch};
use crate::simd::{Instructions, Simd, Work};

/// Rows that pass by while the sums of a pattern stay in registers: enough for what is done with these at the end to
/// weigh little, few enough for their weights to stay in the first-level cache while all columns of a unit use them.
const ROWS: usize = 32;

/// Fewest rows of a pattern with which dX is computed from 2:4 weights as they are.
const SHARED_X: usize = 8;

/// Vectors of tokens in a panel of dX: with sums for four columns, as many as AVX2's registers hold.
const VECTORS: usize = 3;

/// Tokens whose panels stay in the first-level cache while dW's tile goes over all columns.
const TOKENS: usize = 256;

impl Cpu {
    /// dX = dY·W, or with `add` that and what `dx` holds, for the f32 weights of a product.
    pub(crate) fn grad_x(&self, w: &CpuWeights, dy: &[f32], add: bool, dx: &mut [f32]) {
        let Self { pool, scratch, .. } = self;
        if dx.is_empty() {
            return;
        }
        match w {
            CpuWeights::Dense(w) => {
                let Dense { m, k, stride, .. } = *w;
                let Values::F32(values) = &w.values else { return };
                product(pool, (k, dx.len() / k, m), (values, 1, stride), (dy, m, 1), add, dx);
            }
            CpuWeights::Sparse24(w) if w.vector.get() >= SHARED_X => grad_x(pool, scratch, w, dy, add, dx),
            CpuWeights::Sparse24(w) => scratch.with(w.m * w.k, |full| {
                expand(pool, w, full);
                product(pool, (w.k, dx.len() / w.k, w.m), (full, w.k, 1), (dy, w.m, 1), add, dx);
            }),
        }
    }

    /// dW = dYᵀ·X of every weight, or with `add` that and what `dw` holds; `bits` are those of a mask.
    pub(crate) fn grad_w(&self, (m, k): (usize, usize), x: &[f32], dy: &[f32], add: bool, dw: &mut [f32]) {
        if !dw.is_empty() {
            let n = dy.len() / m;
            product(&self.pool, (k, m, n), (x, k, 1), (dy, 1, m), add, dw);
        }
    }

    /// Of dW, what belongs to the values of 2:4 weights, in the order of the format: `m x 2·ceil(k / 4)`.
    pub(crate) fn grad_values(&self, w: &CpuWeights, x: &[f32], dy: &[f32], add: bool, dvalues: &mut [f32]) {
        let CpuWeights::Sparse24(w) = w else { return };
        let Self { pool, scratch, .. } = self;
        if dvalues.is_empty() {
            return;
        }
        let lanes = pool.simd().level().lanes();
        match w.vector.get() / lanes {
            0 => scratch.with(w.m * w.k, |full| {
                product(pool, (w.k, w.m, dy.len() / w.m), (x, w.k, 1), (dy, 1, w.m), false, full);
                sample(pool, w, full, add, dvalues);
            }),
            1 => grad_values::<1, 6>(pool, scratch, w, x, dy, add, dvalues),
            _ => grad_values::<2, 3>(pool, scratch, w, x, dy, add, dvalues),
        }
    }
}

impl Cpu {
    /// Gives the weights of a product other f32 values, in the order of the format (of dense ones row by row).
    pub(crate) fn repack(&self, w: &mut CpuWeights, values: &[f32]) {
        match w {
            CpuWeights::Dense(w) => {
                let Dense { m, k, stride, .. } = *w;
                let Values::F32(own) = &mut w.values else { return };
                if values.is_empty() {
                    return;
                }
                let parts = Parts::new(own);
                self.pool.each(k.div_ceil(UNIT), |task| {
                    let columns = task * UNIT..k.min((task + 1) * UNIT);
                    // SAFETY: each task has its own columns.
                    let to = unsafe { parts.part(columns.start * stride..columns.end * stride) };
                    let from = &values[columns.start..];
                    let transpose =
                        Transpose { from, from_stride: k, rows: m, cols: columns.len(), to, to_stride: stride };
                    self.pool.simd().run(transpose);
                });
            }
            CpuWeights::Sparse24(w) => {
                let mut own = std::mem::replace(&mut w.values, Values::F32(super::memory::Aligned::EMPTY));
                if let Values::F32(own) = &mut own {
                    let parts = Parts::new(own);
                    let stride = 2 * w.k.div_ceil(4);
                    self.pool.each(w.blocks(), |block| {
                        let first = block * BLOCK / 2 * w.units() * UNIT;
                        // SAFETY: each task has its own block, which lies in one piece.
                        let to = unsafe { parts.part(first..first + w.pairs(block) * w.units() * UNIT) };
                        for row in block * BLOCK..block * BLOCK + w.rows(block) {
                            let values = &values[row * stride..(row + 1) * stride];
                            w.each_unit_of(row, |unit, at| {
                                let pairs = values[8 * unit..].as_chunks::<2>().0;
                                for (group, pair) in pairs.iter().take(4).enumerate() {
                                    to[at - first + 4 * group..][..2].copy_from_slice(pair);
                                }
                            });
                        }
                    });
                }
                w.values = own;
            }
        }
    }

    /// The sum of the rows of a matrix.
    pub(crate) fn sum_rows(&self, x: &[f32], add: bool, to: &mut [f32]) {
        const COLUMNS: usize = 64;
        let cols = to.len();
        self.each_chunk(to, COLUMNS, |task, to| {
            let first = task * COLUMNS;
            self.pool.simd().run(SumRows { x, cols, first, add, to });
        });
    }
}

work!(SumRows<>, { x: &'a [f32], cols: usize, first: usize, add: bool, to: &'a mut [f32] },
    sum_rows(x, cols, first, add, to));

/// Sums of some columns.
#[inline(always)]
fn sum_rows(x: &[f32], cols: usize, first: usize, add: bool, to: &mut [f32]) {
    if !add {
        to.fill(0.0);
    }
    for row in x.chunks_exact(cols) {
        to.iter_mut().zip(&row[first..]).for_each(|(to, x)| *to += x);
    }
}

/// A product by the crate `gemm`: of `lhs` (rows x depth) and `rhs` (depth x cols), each with its distance between
/// rows' and columns' neighbours: `(data, along columns, along rows)`. The result is column-major.
fn product(
    pool: &Pool,
    (rows, cols, depth): (usize, usize, usize),
    (lhs, lhs_col, lhs_row): (&[f32], usize, usize),
    (rhs, rhs_col, rhs_row): (&[f32], usize, usize),
    add: bool,
    to: &mut [f32],
) {
    let last = |(rows, cols): (usize, usize), col: usize, row: usize| {
        if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row + (cols - 1) * col + 1 }
    };
    assert!(to.len() == rows * cols);
    assert!(lhs.len() >= last((rows, depth), lhs_col, lhs_row) && rhs.len() >= last((depth, cols), rhs_col, rhs_row));
    if depth == 0 {
        if !add {
            to.fill(0.0);
        }
        return;
    }
    // SAFETY: by the assertions all elements are there with these strides, and `to` is borrowed exclusively. What `to`
    // holds is read only if it is to be added to.
    pool.by_rayon(|parallelism| unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            rows,
            cols,
            depth,
            to.as_mut_ptr(),
            rows as isize,
            1,
            add,
            lhs.as_ptr(),
            lhs_col as isize,
            lhs_row as isize,
            rhs.as_ptr(),
            rhs_col as isize,
            rhs_row as isize,
            if add { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    });
}

/// W as a dense matrix.
fn expand(pool: &Pool, w: &Packed, full: &mut [f32]) {
    let Values::F32(values) = &w.values else { return };
    let parts = Parts::new(full);
    pool.each(w.blocks(), |block| {
        let rows = block * BLOCK..block * BLOCK + w.rows(block);
        // SAFETY: each task has its own rows.
        let to = unsafe { parts.part(rows.start * w.k..rows.end * w.k) };
        to.fill(0.0);
        for (row, to) in rows.zip(to.chunks_exact_mut(w.k)) {
            w.each_unit_of(row, |unit, at| {
                for group in 4 * unit..w.k.div_ceil(4).min(4 * unit + 4) {
                    let at = at + 4 * (group % 4);
                    for (column, value) in w.columns(row, group).into_iter().zip(&values[at..at + 2]) {
                        // A code may name a column past the last, where the value is padding.
                        if let Some(to) = to.get_mut(4 * group + column) {
                            *to = *value;
                        }
                    }
                }
            });
        }
    });
}

/// Of a dense matrix, what 2:4 weights keep.
fn sample(pool: &Pool, w: &Packed, full: &[f32], add: bool, values: &mut [f32]) {
    let stride = 2 * w.k.div_ceil(4);
    let parts = Parts::new(values);
    pool.each(w.blocks(), |block| {
        for row in block * BLOCK..block * BLOCK + w.rows(block) {
            // SAFETY: each task has its own rows.
            let to = unsafe { parts.part(row * stride..(row + 1) * stride) };
            let full = &full[row * w.k..(row + 1) * w.k];
            for (group, to) in to.chunks_exact_mut(2).enumerate() {
                for (to, column) in to.iter_mut().zip(w.columns(row, group)) {
                    let new = full.get(4 * group + column).copied().unwrap_or(0.0);
                    *to = if add { *to + new } else { new };
                }
            }
        }
    });
}

/// dX from 2:4 weights of which at least [`SHARED_X`] rows share a pattern.
fn grad_x(pool: &Pool, scratch: &Scratch, w: &Packed, dy: &[f32], add: bool, dx: &mut [f32]) {
    let Values::F32(values) = &w.values else { return };
    let (m, k, n, simd) = (w.m, w.k, dx.len() / w.k, pool.simd());
    let lanes = simd.level().lanes();
    let vectors = n.div_ceil(lanes);
    let panels = vectors.div_ceil(VECTORS);
    let parts = Parts::new(dx);
    pool.each(panels, |panel| {
        let (from, to) = (vectors * panel / panels, vectors * (panel + 1) / panels);
        let width = (to - from) * lanes;
        let tokens = from * lanes..n.min(to * lanes);
        let (rows, columns) = (m.next_multiple_of(2), w.units() * UNIT);
        scratch.with((rows + columns) * width, |buffer| {
            let (dz, sums) = buffer.split_at_mut(rows * width);
            let own = &dy[tokens.start * m..tokens.end * m];
            column_major(simd, own, tokens.len(), m, dz, width);
            sums.fill(0.0);
            match to - from {
                1 => simd.run(GradX::<1> { w, values, dz, sums }),
                2 => simd.run(GradX::<2> { w, values, dz, sums }),
                _ => simd.run(GradX::<3> { w, values, dz, sums }),
            }
            // SAFETY: each task has its own tokens.
            let dx = unsafe { parts.part(tokens.start * k..tokens.end * k) };
            row_major(sums, width, k, add, dx);
        });
    });
}

/// `width` tokens side by side for each of `cols` columns, zeros past the last token and column.
fn column_major(simd: Simd, from: &[f32], tokens: usize, cols: usize, to: &mut [f32], width: usize) {
    if tokens < width {
        to.fill(0.0);
    }
    to[cols * width..].fill(0.0);
    simd.run(Transpose { from, from_stride: cols, rows: tokens, cols, to, to_stride: width });
}

/// The way back, for the first `cols` columns.
fn row_major(from: &[f32], width: usize, cols: usize, add: bool, to: &mut [f32]) {
    // In blocks, so that neither side strides through more lines than the cache holds.
    const COLUMNS: usize = 16;
    for first in (0..cols).step_by(COLUMNS) {
        let last = cols.min(first + COLUMNS);
        for (token, to) in to.chunks_exact_mut(cols).enumerate() {
            for (column, to) in (first..last).zip(&mut to[first..last]) {
                let new = from[column * width + token];
                *to = if add { *to + new } else { new };
            }
        }
    }
}

/// A panel of dX, of `A` vectors of tokens: `sums` holds it column-major, `dz` that of dY.
struct GradX<'a, const A: usize> {
    w: &'a Packed,
    values: &'a [f32],
    dz: &'a [f32],
    sums: &'a mut [f32],
}

impl<const A: usize> Work for GradX<'_, A> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { w, values, dz, sums } = self;
        let width = A * S::LANES;
        assert!(dz.len() == w.m.next_multiple_of(2) * width && sums.len() == w.units() * UNIT * width);
        let Codes::Shared(codes) = &w.codes else { return };
        let pattern = w.vector.get() / 2;
        let at_once = pattern.min(ROWS / 2);
        for block in 0..w.blocks() {
            let dz = &dz[block * BLOCK * width..];
            for first in (0..w.pairs(block)).step_by(at_once) {
                let pairs = at_once.min(w.pairs(block) - first);
                let dz = &dz[2 * first * width..][..2 * pairs * width];
                for step in 0..w.steps() {
                    let at = w.step(block, step);
                    let codes = &codes[at.codes + first / pattern * at.units..][..at.units];
                    let values = &values[(at.values + first * at.units) * UNIT..][..pairs * at.units * UNIT];
                    let sums = &mut sums[step * w.step * UNIT * width..][..at.units * UNIT * width];
                    for (unit, &code) in codes.iter().enumerate() {
                        for half in 0..2 {
                            let code = code >> (8 * half);
                            let column = |slot: usize| 4 * (slot / 2) + (code >> (2 * slot) & 3) as usize;
                            let columns = [0, 1, 2, 3].map(|slot| unit * UNIT + 8 * half + column(slot));
                            // SAFETY: the slices hold what these pairs and units have, by how they were cut; columns
                            // are those of the unit, and of two groups, each its own two.
                            unsafe {
                                let values = values.as_ptr().add(unit * UNIT + 8 * half);
                                grad_x_tile::<S, A>(pairs, at.units * UNIT, values, dz, columns, sums);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Adds to four columns of a panel what some pairs of rows have for them.
///
/// # Safety
/// The processor must have the instructions `S`; there must be `2·pairs` rows of `dz`, the pairs' eight values of two
/// groups, `stride` apart, and the columns, which must be different ones.
#[inline(always)]
unsafe fn grad_x_tile<S: Instructions, const A: usize>(
    pairs: usize,
    stride: usize,
    values: *const f32,
    dz: &[f32],
    columns: [usize; 4],
    sums: &mut [f32],
) {
    let width = A * S::LANES;
    // SAFETY: as the caller vouches.
    unsafe {
        let mut acc = [[S::splat(0.0); A]; 4];
        for pair in 0..pairs {
            let values = values.add(pair * stride);
            for row in 0..2 {
                let dz = dz.as_ptr().add((2 * pair + row) * width);
                let mut tokens = [S::splat(0.0); A];
                for a in 0..A {
                    tokens[a] = S::load(dz.add(a * S::LANES));
                }
                for slot in 0..4 {
                    // Of a group the two of the upper row, then the two of the lower.
                    let value = S::splat(*values.add(slot / 2 * 4 + row * 2 + slot % 2));
                    for a in 0..A {
                        acc[slot][a] = S::fma(value, tokens[a], acc[slot][a]);
                    }
                }
            }
        }
        for slot in 0..4 {
            let to = sums.as_mut_ptr().add(columns[slot] * width);
            for a in 0..A {
                let to = to.add(a * S::LANES);
                S::store(to, S::fma(acc[slot][a], S::splat(1.0), S::load(to)));
            }
        }
    }
}

/// dW of 2:4 values, by tiles of `R` vectors of rows, which share a pattern, and `G` groups.
fn grad_values<const R: usize, const G: usize>(
    pool: &Pool,
    scratch: &Scratch,
    w: &Packed,
    x: &[f32],
    dy: &[f32],
    add: bool,
    dvalues: &mut [f32],
) {
    let (m, k, simd) = (w.m, w.k, pool.simd());
    let (n, rows) = (dy.len() / m, R * simd.level().lanes());
    let stride = 2 * k.div_ceil(4);
    let panels = k.div_ceil(4 * G);
    scratch.with(panels * n * 4 * G, |x_panels| {
        match G {
            3 => panels_of::<12>(pool, x, k, n, x_panels),
            _ => panels_of::<24>(pool, x, k, n, x_panels),
        }
        let x_panels = &*x_panels;
        let parts = Parts::new(dvalues);
        pool.each(m.div_ceil(rows), |task| {
            let first = task * rows;
            let real = rows.min(m - first);
            scratch.with(rows * n + panels * 2 * G * rows, |buffer| {
                let (dz, sums) = buffer.split_at_mut(rows * n);
                match rows {
                    8 => panel_of::<8>(dy, m, first..first + real, dz),
                    16 => panel_of::<16>(dy, m, first..first + real, dz),
                    32 => panel_of::<32>(dy, m, first..first + real, dz),
                    _ => panel_of::<4>(dy, m, first..first + real, dz),
                }
                sums.fill(0.0);
                // Of each panel's groups the two columns that these rows keep.
                let columns: Vec<[[usize; 2]; G]> = (0..panels)
                    .map(|panel| std::array::from_fn(|g| w.columns(first, panel * G + g).map(|column| 4 * g + column)))
                    .collect();
                for from in (0..n).step_by(TOKENS) {
                    let tokens = TOKENS.min(n - from);
                    let dz = &dz[from * rows..][..tokens * rows];
                    for (panel, sums) in sums.chunks_exact_mut(2 * G * rows).enumerate() {
                        let x = &x_panels[(panel * n + from) * 4 * G..][..tokens * 4 * G];
                        simd.run(GradValues::<R, G> { tokens, dz, x, columns: columns[panel], sums });
                    }
                }
                for row in 0..real {
                    // SAFETY: each task has its own rows.
                    let to = unsafe { parts.part((first + row) * stride..(first + row + 1) * stride) };
                    for (to, sums) in to.iter_mut().zip(sums.chunks_exact(rows)) {
                        *to = if add { *to + sums[row] } else { sums[row] };
                    }
                }
            });
        });
    });
}

/// Cuts a row-major matrix of `n` rows into panels of `W` columns; columns past the last are zero.
fn panels_of<const W: usize>(pool: &Pool, from: &[f32], cols: usize, n: usize, to: &mut [f32]) {
    let parts = Parts::new(to);
    pool.each(cols.div_ceil(W), |panel| {
        // SAFETY: each task has its own panel.
        let to = unsafe { parts.part(panel * n * W..(panel + 1) * n * W) };
        panel_of::<W>(from, cols, panel * W..cols.min((panel + 1) * W), to);
    });
}

/// One panel. Its width is known when this is compiled, so that a row is a few moves and no call.
fn panel_of<const W: usize>(from: &[f32], cols: usize, columns: std::ops::Range<usize>, to: &mut [f32]) {
    for (from, to) in from.chunks_exact(cols).zip(to.as_chunks_mut::<W>().0) {
        let from = &from[columns.clone()];
        match <&[f32; W]>::try_from(from) {
            Ok(whole) => *to = *whole,
            Err(_) => {
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0.0);
            }
        }
    }
}

/// A tile of dW for some tokens: sums of `2·G` values of `R` vectors of rows, slot by slot.
struct GradValues<'a, const R: usize, const G: usize> {
    tokens: usize,
    dz: &'a [f32],
    x: &'a [f32],
    /// Of each group the two columns of the panel that are kept.
    columns: [[usize; 2]; G],
    sums: &'a mut [f32],
}

impl<const R: usize, const G: usize> Work for GradValues<'_, R, G> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Instructions>(self) {
        let Self { tokens, dz, x, columns, sums } = self;
        let rows = R * S::LANES;
        assert!(dz.len() == tokens * rows && x.len() == tokens * 4 * G && sums.len() == 2 * G * rows);
        assert!(columns.as_flattened().iter().all(|&column| column < 4 * G));
        // SAFETY: by the assertions; the caller has the instructions.
        unsafe {
            let mut acc = [[[S::splat(0.0); R]; 2]; G];
            for token in 0..tokens {
                let x = x.as_ptr().add(token * 4 * G);
                let mut own = [S::splat(0.0); R];
                for r in 0..R {
                    own[r] = S::load(dz.as_ptr().add(token * rows + r * S::LANES));
                }
                for g in 0..G {
                    for s in 0..2 {
                        let x = S::splat(*x.add(columns[g][s]));
                        for r in 0..R {
                            acc[g][s][r] = S::fma(x, own[r], acc[g][s][r]);
                        }
                    }
                }
            }
            for g in 0..G {
                for s in 0..2 {
                    for r in 0..R {
                        let to = sums.as_mut_ptr().add((2 * g + s) * rows + r * S::LANES);
                        S::store(to, S::fma(acc[g][s][r], S::splat(1.0), S::load(to)));
                    }
                }
            }
        }
    }
}
