//! The oracle of sums of squares.
//!
//! Invariant: no code is shared with the devices.

/// The sum of the squares of each `part` elements.
pub fn exact(x: &[f64], part: usize) -> Vec<f64> {
    x.chunks(part).map(|part| part.iter().map(|x| x * x).sum()).collect()
}
