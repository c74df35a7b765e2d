// What sparsify.wgsl and decompress.wgsl share: parameters, and where values and codes lie.
//
// Elements are handled as bit patterns in words of 32 bits, one f32 or two f16 to a word: so NaN payloads, -0.0 and
// subnormals come through whatever a device does to numbers, and f16 needs no feature of the device.
//
// Two values make a pair, for each row and group. In parts, as the format has them, pairs of a row follow one another,
// and so do the words of codes of VECTOR rows. Packed, as src/layout.rs has them, they lie in panels of 32 rows.

// Two f16 to a word instead of one f32.
override HALVES: bool = false;
// Rows that share a code.
override VECTOR: u32 = 1u;
override PACKED: bool = false;

// src/kernels/sparse24.rs has the same.
struct Params {
    // Of W: all rows, or some of a matrix too large for one binding.
    rows: u32,
    cols: u32,
    // The row of the compressed weights that the first of these is: a multiple of VECTOR.
    row0: u32,
}

@group(0) @binding(0) var<uniform> params: Params;

fn groups() -> u32 {
    return (params.cols + 3u) / 4u;
}

fn words() -> u32 {
    return (params.cols + 31u) / 32u;
}

// Index of the pair of values of a row and group.
fn pair_at(row_of_w: u32, group: u32) -> u32 {
    let row = params.row0 + row_of_w;
    if PACKED {
        // Pairs of a unit of 16 bytes.
        let pairs = select(2u, 4u, HALVES);
        let units = words() * 8u / pairs;
        return ((row / 32u * units + group / pairs) * 32u + row % 32u) * pairs + group % pairs;
    }
    return row * groups() + group;
}

// Index of a word of codes of a block of VECTOR rows.
fn word_at(block_of_w: u32, word: u32) -> u32 {
    let block = params.row0 / VECTOR + block_of_w;
    if PACKED {
        let lanes = max(32u / VECTOR, 1u);
        return (block / lanes * words() + word) * lanes + block % lanes;
    }
    return block * words() + word;
}
