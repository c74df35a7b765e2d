// The second half of the gradients of a normalisation's parameters: Y[c] is the sum of row `first` of each block's `sums`
// rows, in the order of the blocks, or with ADD that added to Y[c]. norm_sums.wgsl computes the blocks. Twins:
// src/reference/layer_norm.rs and rms_norm.rs.
//
// Tile: a thread per feature, 256 to a workgroup, so that neighbours read a run of a row. Dispatch grid: workgroups over
// x and y. Nothing is kept in workgroup memory. Residue: threads past the last feature do nothing; no blocks sum to zero.

override ADD: bool = false;

const THREADS: u32 = 256u;

// src/kernels/norm.rs has the same.
struct Params {
    // Features of a row.
    width: u32,
    blocks: u32,
    // Which of a block's rows is summed, and how many it has.
    first: u32,
    sums: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let column = (workgroup.y * grid.x + workgroup.x) * THREADS + lane;
    if column >= params.width {
        return;
    }
    var sum = 0.0;
    for (var block = 0u; block < params.blocks; block++) {
        sum += parts[(block * params.sums + params.first) * params.width + column];
    }
    if ADD {
        sum += y[column];
    }
    y[column] = sum;
}
