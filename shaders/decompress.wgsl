// Decompression: the row-major W that values and codes stand for, zero wherever no value is coded. Twins: `expand_rows`
// of src/format.rs and src/reference/decompress.rs.
//
// Tile: a thread per word of W, 256 to a workgroup: one f32, or two f16, which may belong to different groups or rows.
// Neighbours read the same word of codes and neighbouring values. Dispatch grid: workgroups over x and y. No workgroup
// memory: nothing is reused. Residue: threads past the last word do nothing; where the last of an odd number of f16
// shares its word with memory that is no part of W, that stays.

const THREADS: u32 = 256u;

@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read> codes: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;

// The bits of element `e` of W.
fn element(e: u32) -> u32 {
    let row = e / params.cols;
    let col = e % params.cols;
    let group = col / 4u;
    let code = (codes[word_at(row / VECTOR, col / 32u)] >> (4u * (group % 8u))) & 15u;
    let upper = col % 4u == code >> 2u;
    if !upper && col % 4u != (code & 3u) {
        return 0u;
    }
    let at = pair_at(row, group);
    if HALVES {
        return (values[at] >> select(0u, 16u, upper)) & 0xffffu;
    }
    return values[2u * at + select(0u, 1u, upper)];
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 elements: the host sees to it. The grid may be larger than they need.
    let elements = params.rows * params.cols;
    let count = select(elements, (elements + 1u) / 2u, HALVES);
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (count - 1u) / THREADS {
        return;
    }
    let at = id * THREADS + lane;
    if at >= count {
        return;
    }
    if !HALVES {
        y[at] = element(at);
    } else if 2u * at + 1u < elements {
        y[at] = element(2u * at) | (element(2u * at + 1u) << 16u);
    } else {
        y[at] = element(2u * at) | (y[at] & 0xffff0000u);
    }
}
