//! Cooperative matrices: the units that drivers multiply by, the tiles that kernels make of them, and the check that
//! tells whether a driver's are right.
//!
//! Drivers differ in the blocks that they multiply and in the lanes of a subgroup, which no API tells. One text serves
//! all: a [`CoopUnit`] brings in both, with its tiles. [`Caps::cooperative_lanes`] is what shaders/coop_check.wgsl saw
//! when the device was opened: it multiplies blocks of whole numbers from different places in workgroup memory, in a
//! workgroup like the kernels' own. Wrong products, and drivers that are known to be wrong, are left in
//! [`Caps::cooperative_refused`].
//!
//! Invariant: a tile's sizes are whole numbers of its unit's blocks, and fit the workgroup memory that devices with
//! that unit have.

use std::fmt;

use super::Caps;
use super::wgsl::Text;
use crate::error::Result;
use crate::mask::VectorLen;
use crate::problem::Op;

/// One cooperative-matrix multiply that the hardware does: C (`m x n`) += A (`m x k`) · B (`k x n`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoopShape {
    /// Rows of A and C.
    pub m: u32,
    /// Columns of B and C.
    pub n: u32,
    /// Columns of A.
    pub k: u32,
    /// Element type of A and B.
    pub ab: &'static str,
    /// Element type of C.
    pub c: &'static str,
}

impl fmt::Display for CoopShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{} {}->{}", self.m, self.n, self.k, self.ab, self.c)
    }
}

/// What multiplies cooperative matrices: blocks of `edge x edge x edge`, f16 factors and f32 sums, by subgroups of so
/// many lanes. Its name (`Display`) is `8s32` for edge 8 and 32 lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CoopUnit {
    pub(super) edge: u32,
    pub(super) lanes: u32,
}

impl CoopUnit {
    /// Those that kernels are registered for: llvmpipe of Mesa 26, Apple's GPUs, NVIDIA's and RDNA's in wave32, and
    /// RDNA's in wave64, which is what RADV makes of a pipeline unless it is told otherwise.
    pub const ALL: [Self; 4] = [
        Self { edge: 8, lanes: 8 },
        Self { edge: 8, lanes: 32 },
        Self { edge: 16, lanes: 32 },
        Self { edge: 16, lanes: 64 },
    ];

    /// Rows and columns of a block.
    pub const fn edge(self) -> u32 {
        self.edge
    }

    /// Lanes of a subgroup.
    pub const fn lanes(self) -> u32 {
        self.lanes
    }

    /// What a driver must list.
    pub const fn shape(self) -> CoopShape {
        CoopShape { m: self.edge, n: self.edge, k: self.edge, ab: "f16", c: "f32" }
    }

    /// Brings EDGE and LANES into a text, and the types of the instructions where it has them.
    pub(crate) fn specialise(self, primitives: Primitives, text: &mut Text) -> Result<()> {
        let Self { edge, lanes } = self;
        text.set("const EDGE: u32", edge as usize)?;
        text.set("const LANES: u32", lanes as usize)?;
        if !primitives.emulated {
            for (alias, element, role) in [("FragmentA", "f16", "A"), ("FragmentB", "f16", "B"), ("Sum", "f32", "C")] {
                text.replace(&format!("alias {alias}"), &format!("coop_mat{edge}x{edge}<{element}, {role}>"))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for CoopUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s{}", self.edge, self.lanes)
    }
}

/// Whose cooperative matrices a text gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Primitives {
    /// Emulated in plain WGSL.
    emulated: bool,
    /// Tiles held as scalars.
    scalars: bool,
}

impl Primitives {
    /// The hardware's, with tiles held as vectors.
    pub(super) const NATIVE: Self = Self { emulated: false, scalars: false };

    /// Those of a device.
    pub(super) const fn of(caps: &Caps) -> Self {
        Self { emulated: caps.emulates_cooperative, scalars: caps.cooperative_scalars }
    }

    /// Puts their texts before another one: directives come first.
    pub(crate) fn precede(self, text: &mut Text) {
        let own = if self.emulated { COOP_EMULATED } else { COOP_NATIVE };
        let held = if self.scalars { COOP_SCALARS } else { COOP_QUADS };
        text.precede([own, held]);
    }
}

/// A tile of cooperative matrices: a workgroup owns `m x n` outputs and walks k by 32, a subgroup owns `frags_m x
/// frags_n` blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CoopTile {
    pub(super) unit: CoopUnit,
    pub(super) m: u32,
    pub(super) n: u32,
    pub(super) frags_m: u32,
    pub(super) frags_n: u32,
    /// Steps of k that workgroup memory holds.
    pub(super) buffers: u32,
}

impl CoopTile {
    pub(super) const K: u32 = 32;

    /// The tiles registered for an operation and unit: for blocks of 16 within 48 KiB of workgroup memory, at least one
    /// of them within 32; for blocks of 8 all within 32, which is what the devices that have them offer. Tiles of one
    /// kind differ by unit in the blocks of a subgroup, so that each lane keeps at most 128 sums in registers, and each
    /// thread brings a whole 16-byte unit of each operand per step.
    pub(super) fn of(op: Op, unit: CoopUnit) -> impl Iterator<Item = Self> {
        // m, n, frags_m, frags_n, buffers. A copy of the activations for each pattern of a tile's features takes memory
        // from the tile.
        type Sizes = (u32, u32, u32, u32, u32);
        let vector = op.vector().map_or(1, VectorLen::get);
        let sizes: &[Sizes] = match (unit.edge, unit.lanes > 32, vector) {
            (8, _, 128 | 64) if unit.lanes >= 32 => &[(128, 64, 8, 4, 2), (64, 64, 4, 4, 2), (32, 32, 2, 4, 2)],
            (8, _, 1..=8) if unit.lanes >= 32 => &[(128, 64, 8, 4, 1), (64, 64, 4, 4, 2), (32, 32, 2, 4, 2)],
            (8, ..) => &[(64, 64, 4, 4, 2), (32, 32, 2, 4, 2)],
            (_, false, 128) => &[(128, 128, 4, 4, 2), (128, 256, 4, 4, 2), (64, 64, 2, 2, 2)],
            (_, false, 64) => &[(128, 128, 4, 4, 2), (64, 64, 2, 2, 2)],
            (_, false, 32) => &[(128, 128, 4, 4, 1), (64, 64, 2, 2, 2)],
            (_, false, 16) => &[(128, 64, 4, 2, 1), (64, 64, 2, 2, 1)],
            (_, false, _) => &[(128, 128, 4, 4, 2), (256, 128, 4, 4, 1), (128, 128, 4, 2, 1), (64, 64, 2, 2, 2)],
            (_, true, 128) => &[(128, 128, 4, 4, 2), (128, 256, 8, 4, 2), (64, 64, 4, 2, 2)],
            (_, true, 64) => &[(128, 128, 4, 4, 2), (64, 64, 4, 2, 2)],
            (_, true, 32) => &[(128, 128, 4, 4, 1), (64, 64, 4, 2, 2)],
            (_, true, 16) => &[(128, 64, 4, 2, 1), (64, 64, 4, 2, 1)],
            (_, true, _) => &[(128, 128, 4, 4, 2), (256, 128, 4, 4, 1), (128, 128, 8, 4, 1), (64, 64, 4, 2, 2)],
        };
        sizes.iter().map(move |&(m, n, frags_m, frags_n, buffers)| Self { unit, m, n, frags_m, frags_n, buffers })
    }

    pub(super) const fn threads(self) -> u32 {
        let Self { unit, m, n, frags_m, frags_n, .. } = self;
        unit.lanes * (m / (unit.edge * frags_m)) * (n / (unit.edge * frags_n))
    }

    /// Patterns among the features of a tile.
    pub(super) fn patterns(self, op: Op) -> u32 {
        match op.vector() {
            Some(v) if v.get() >= 16 => (self.m / v.get() as u32).max(1),
            _ => 1,
        }
    }
}

const COOP_NATIVE: &str = include_str!("../../shaders/shared/coop_native.wgsl");

const COOP_EMULATED: &str = include_str!("../../shaders/shared/coop_emulated.wgsl");

const COOP_QUADS: &str = include_str!("../../shaders/shared/coop_quads.wgsl");

const COOP_SCALARS: &str = include_str!("../../shaders/shared/coop_scalars.wgsl");

/// Invocations of the check of cooperative matrices: a multiple of 64, as the kernels have, since drivers choose the
/// width of subgroups by that, too.
pub(super) const CHECK_THREADS: usize = 128;

/// Blocks along features and tokens in that check.
const CHECK_BLOCKS: usize = 4;

/// Number of f32 that shaders/coop_check.wgsl writes, at most.
pub(crate) const fn check_len(edge: u32) -> usize {
    CHECK_THREADS + CHECK_THREADS / 8 * (edge * edge) as usize
}

/// What shaders/coop_check.wgsl has found: the lanes of a subgroup, or what is wrong.
pub(crate) fn check_result(edge: u32, y: &[f32]) -> std::result::Result<u32, String> {
    let edge = edge as usize;
    let (widths, sums) = y.split_at(CHECK_THREADS.min(y.len()));
    let width = widths.first().map_or(0, |&w| w as usize);
    if widths.len() < CHECK_THREADS || widths.iter().any(|&w| w as usize != width) {
        return Err("its subgroups differ in width within a workgroup".into());
    }
    if !(8..=CHECK_THREADS).contains(&width) || !CHECK_THREADS.is_multiple_of(width) {
        return Err(format!("its subgroups of {width} take no part of a workgroup"));
    }
    // The numbers of shaders/coop_check.wgsl.
    let number = |row: usize, k: usize, a: usize, b: usize| ((row * a + k * b + row * row) % 11) as f32 - 5.0;
    for subgroup in 0..CHECK_THREADS / width {
        let (w_row, x_row) = (edge * (subgroup % CHECK_BLOCKS), edge * ((subgroup + 1) % CHECK_BLOCKS));
        for t in 0..edge {
            for f in 0..edge {
                let products =
                    (0..CoopTile::K as usize).map(|k| number(w_row + f, k, 7, 3) * number(x_row + t, k, 5, 4));
                let (expected, got) = (products.sum::<f32>(), sums.get((subgroup * edge + t) * edge + f).copied());
                if got != Some(expected) {
                    let got = got.unwrap_or(f32::NAN);
                    return Err(format!("it multiplies blocks of whole numbers to {got} in place of {expected}"));
                }
            }
        }
    }
    Ok(width as u32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// What a driver writes that is right but for one thing.
    fn checked(edge: usize, width: usize, x_block: impl Fn(usize) -> usize) -> Vec<f32> {
        let number = |row: usize, k: usize, a: usize, b: usize| ((row * a + k * b + row * row) % 11) as f32 - 5.0;
        let mut y = vec![width as f32; CHECK_THREADS];
        for s in 0..CHECK_THREADS / width {
            for (t, f) in (0..edge * edge).map(|e| (e / edge, e % edge)) {
                let (w, x) = (edge * (s % 4) + f, edge * x_block(s) + t);
                y.push((0..32).map(|k| number(w, k, 7, 3) * number(x, k, 5, 4)).sum());
            }
        }
        y.resize(check_len(edge as u32), f32::NAN);
        y
    }

    #[test]
    fn a_driver_that_multiplies_as_it_should_tells_its_width() {
        for unit in CoopUnit::ALL {
            let y = checked(unit.edge() as usize, unit.lanes() as usize, |s| (s + 1) % 4);
            assert_eq!(check_result(unit.edge(), &y), Ok(unit.lanes()), "{unit}");
        }
    }

    #[test]
    fn a_driver_that_multiplies_wrongly_is_found_out() {
        // Loads that return the first block, whichever is asked for; and none at all.
        for unit in CoopUnit::ALL {
            let (edge, lanes) = (unit.edge(), unit.lanes() as usize);
            let wrong = check_result(edge, &checked(edge as usize, lanes, |_| 0)).unwrap_err();
            assert!(wrong.contains("in place of"), "{wrong}");
            let zeros = [vec![lanes as f32; CHECK_THREADS], vec![0.0; check_len(edge) - CHECK_THREADS]].concat();
            assert!(check_result(edge, &zeros).is_err());
        }
        // One wrong element of the last subgroup; widths that differ, and that make no sense.
        let mut y = checked(16, 32, |s| (s + 1) % 4);
        y[CHECK_THREADS + 4 * 256 - 1] += 1.0;
        assert!(check_result(16, &y).is_err());
        let mut y = checked(16, 32, |s| (s + 1) % 4);
        y[127] = 64.0;
        assert!(check_result(16, &y).unwrap_err().contains("differ in width"));
        assert!(check_result(16, &vec![0.0; check_len(16)]).is_err() && check_result(8, &[]).is_err());
    }
}
