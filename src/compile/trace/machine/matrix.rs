//! Cooperative matrices of the interpreter: where their elements are, in memory and among lanes.
//!
//! A matrix is spread over the consecutive lanes of a subgroup, which the shader's constant LANES tells: element q =
//! LANES e + lane is component e, row q % rows, column q / rows. What loads and stores cost is said in
//! [`trace`](super::super).

use naga::{CooperativeData, Expression, Handle, Literal, Module, Scalar, TypeInner};

use super::arithmetic::{float, read, to_f16, write};
use super::{Frame, Machine, Mask, Root, invalid, parts, pointee, unknown};
use crate::error::Result;

impl<'m> Machine<'m> {
    /// Where the elements of a cooperative matrix are: the variable, the bytes from one line of contiguous elements to
    /// the next, and for each subgroup the byte of the first element, or none where the subgroup is inactive.
    fn matrix_place(
        &mut self,
        frame: &mut Frame<'m>,
        data: CooperativeData,
        active: &Mask,
    ) -> Result<(usize, usize, Vec<Option<usize>>)> {
        let pointer = self.pointer(frame, data.pointer, active)?;
        let Root::Memory(at) = pointer.root else {
            return Err(invalid("a cooperative matrix in registers"));
        };
        let element: usize = parts(self.module, &pointee(self.module, frame, data.pointer)?)?
            .iter()
            .map(|part| part.components * usize::from(part.scalar.width))
            .sum();
        let strides = self.data(frame, data.stride, active)?;
        let mut starts = Vec::new();
        let mut stride = None;
        for first in (0..self.lanes).step_by(self.matrix_lanes) {
            let lanes = first..(first + self.matrix_lanes).min(self.lanes);
            let same = |lane: usize| {
                active[lane] == active[first]
                    && (!active[lane]
                        || (pointer.offset.of(lane) == pointer.offset.of(first)
                            && *stride.get_or_insert(strides[lane]) == strides[lane]))
            };
            if lanes.len() < self.matrix_lanes || !lanes.clone().all(same) {
                return Err(invalid("a cooperative matrix that the lanes of a subgroup do not agree on"));
            }
            starts.push(active[first].then(|| pointer.offset.of(first) as usize));
        }
        Ok((at, stride.unwrap_or_default() as usize * element, starts))
    }

    pub(super) fn load_matrix(
        &mut self,
        frame: &mut Frame<'m>,
        site: usize,
        ty: &TypeInner,
        data: CooperativeData,
        active: &Mask,
    ) -> Result<Vec<u32>> {
        let TypeInner::CooperativeMatrix { rows, columns, scalar, .. } = *ty else { return Err(unknown(ty)) };
        let (rows, columns, width) = (rows as usize, columns as usize, usize::from(scalar.width));
        let (at, stride, starts) = self.matrix_place(frame, data, active)?;
        let (lines, line) = if data.row_major { (rows, columns) } else { (columns, rows) };
        // Sixteen bytes per lane, the lines of one column of such units after each other.
        let units = lines * line * width / 16;
        for round in 0..units.div_ceil(self.matrix_lanes) {
            let offsets: Vec<_> = (0..self.lanes)
                .map(|lane| {
                    let unit = round * self.matrix_lanes + lane % self.matrix_lanes;
                    let start = starts[lane / self.matrix_lanes].filter(|_| unit < units)?;
                    Some((start + unit % lines * stride + unit / lines * 16) as u32)
                })
                .collect();
            self.touch((frame.path, 2 * site, round), at, 16, false, &offsets)?;
        }
        let memory = &self.memories[at].bytes;
        let mut out = vec![0; rows * columns / self.matrix_lanes * self.lanes];
        for (at, word) in out.iter_mut().enumerate() {
            let lane = at % self.lanes;
            let q = at / self.lanes * self.matrix_lanes + lane % self.matrix_lanes;
            let Some(start) = starts[lane / self.matrix_lanes] else { continue };
            let (row, column) = (q % rows, q / rows);
            let (line, along) = if data.row_major { (row, column) } else { (column, row) };
            *word = read(memory, start + line * stride + along * width, scalar)?;
        }
        Ok(out)
    }

    pub(super) fn store_matrix(
        &mut self,
        frame: &mut Frame<'m>,
        site: usize,
        matrix: Handle<Expression>,
        data: CooperativeData,
        active: &Mask,
    ) -> Result<()> {
        let ty = frame.info[matrix].ty.inner_with(&self.module.types);
        let TypeInner::CooperativeMatrix { rows, columns, scalar, .. } = *ty else { return Err(unknown(ty)) };
        let (rows, columns, width) = (rows as usize, columns as usize, usize::from(scalar.width));
        let values = self.data(frame, matrix, active)?;
        let (at, stride, starts) = self.matrix_place(frame, data, active)?;
        let offset = |start: usize, row: usize, column: usize| {
            let (line, along) = if data.row_major { (row, column) } else { (column, row) };
            start + line * stride + along * width
        };
        // The usual layout in registers: rows of four lanes with two neighbouring columns each, 8 columns wide.
        let tall = self.matrix_lanes / 4;
        for e in 0..rows * columns / self.matrix_lanes {
            let offsets: Vec<_> = (0..self.lanes)
                .map(|lane| {
                    let (l, block) = (lane % self.matrix_lanes, e / 2);
                    let row = l / 4 + tall * (block % (rows / tall));
                    let column = 2 * (l % 4) + e % 2 + 8 * (block / (rows / tall));
                    starts[lane / self.matrix_lanes].map(|start| offset(start, row, column) as u32)
                })
                .collect();
            self.touch((frame.path, 2 * site + 1, e), at, width as u32, true, &offsets)?;
        }
        let memory = &mut self.memories[at].bytes;
        for (at, &word) in values.iter().enumerate() {
            let lane = at % self.lanes;
            let q = at / self.lanes * self.matrix_lanes + lane % self.matrix_lanes;
            let Some(start) = starts[lane / self.matrix_lanes] else { continue };
            write(memory, offset(start, q % rows, q / rows), scalar, word)?;
        }
        Ok(())
    }
}

/// What a module's constant LANES says; 32 where there is none.
pub(super) fn matrix_lanes(module: &Module) -> usize {
    let lanes = module.constants.iter().find(|(_, constant)| constant.name.as_deref() == Some("LANES"));
    match lanes.map(|(_, constant)| &module.global_expressions[constant.init]) {
        Some(&Expression::Literal(Literal::U32(lanes))) if lanes > 0 => lanes as usize,
        _ => 32,
    }
}

/// C + A · B of each subgroup, where A is `m x k` and B `k x n`.
pub(super) fn multiply_add(
    (lanes, matrix_lanes): (usize, usize),
    (m, n, k): (usize, usize, usize),
    scalar: Scalar,
    a: &[u32],
    b: &[u32],
    c: &[u32],
) -> Vec<u32> {
    // Element (row, column) of a matrix of so many rows that a subgroup's lanes hold.
    let at = |first: usize, rows: usize, row: usize, column: usize| {
        let q = column * rows + row;
        q / matrix_lanes * lanes + first + q % matrix_lanes
    };
    let mut out = c.to_vec();
    for first in (0..lanes).step_by(matrix_lanes) {
        for column in 0..n {
            for row in 0..m {
                let products = (0..k).map(|i| float(a[at(first, m, row, i)]) * float(b[at(first, k, i, column)]));
                let slot = &mut out[at(first, m, row, column)];
                let sum = (float(*slot) + products.sum::<f32>()).to_bits();
                *slot = if scalar.width == 2 { to_f16(sum) } else { sum };
            }
        }
    }
    out
}
