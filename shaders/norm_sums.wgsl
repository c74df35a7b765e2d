// The first half of the gradients of a normalisation's parameters: sums over a block of `block` tokens, for each feature,
// of dY * (X - mean) * factor and, with SUMS = 2, of dY alone. Mean and factor of each token come from the dispatch
// before. norm_fold.wgsl adds up the blocks. Twins: src/reference/layer_norm.rs and rms_norm.rs.
//
// Tile: 256 neighbouring features of a block of tokens to a workgroup, so that neighbours read a run of a row; a thread
// walks the tokens of its feature in their order. Sums depend on shapes alone. Dispatch grid: runs of features, then
// blocks, over x and y. Nothing is kept in workgroup memory. Residue: threads past the last feature do nothing; the last
// block ends with the tokens.

override WIDTH: u32 = 4u;
override SUMS: u32 = 2u;

const THREADS: u32 = 256u;

// src/kernels/norm.rs has the same.
struct Params {
    tokens: u32,
    // Tokens of a block.
    block: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read> statistics: array<vec2<f32>>;
// SUMS rows for each block.
@group(0) @binding(4) var<storage, read_write> parts: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let runs = (WIDTH + THREADS - 1u) / THREADS;
    let first = id / runs * params.block;
    let column = id % runs * THREADS + lane;
    if first >= params.tokens || column >= WIDTH {
        return;
    }
    var scaled = 0.0;
    var plain = 0.0;
    for (var token = first; token < min(first + params.block, params.tokens); token++) {
        let at = token * WIDTH + column;
        let own = statistics[token];
        scaled += dy[at] * ((x[at] - own.x) * own.y);
        plain += dy[at];
    }
    let at = id / runs * SUMS * WIDTH + column;
    parts[at] = scaled;
    if SUMS > 1u {
        parts[at + WIDTH] = plain;
    }
}
