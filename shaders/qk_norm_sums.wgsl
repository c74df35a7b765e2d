// The first half of the gradients of qk_norm.wgsl's gammas: sums over a block of `block` tokens, and over their heads
// of Q and of K apart, for each of the WIDTH features of a head, of dY * X * factor. The factor of each head comes from
// qk_norm_grad.wgsl. norm_fold.wgsl adds up the blocks. Twin: src/reference/qk_norm.rs.
//
// Tile: 256 neighbouring features of Q, then K, of a block of tokens to a workgroup, so that neighbours read a run of a
// head; a thread walks the tokens, and the heads of each, in their order. Sums depend on shapes alone. Dispatch grid:
// runs of features, then blocks, over x and y. Nothing is kept in workgroup memory. Residue: threads past the last
// feature of K do nothing; the last block ends with the tokens.

override WIDTH: u32 = 4u;
override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;

const THREADS: u32 = 256u;

// src/ops/qk_norm/grad.rs has the same.
struct Params {
    tokens: u32,
    // Tokens of a block.
    block: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read> factors: array<f32>;
// Two rows for each block: of Q, and of K.
@group(0) @binding(4) var<storage, read_write> parts: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let runs = (2u * WIDTH + THREADS - 1u) / THREADS;
    let block = id / runs;
    let first = block * params.block;
    let column = id % runs * THREADS + lane;
    if first >= params.tokens || column >= 2u * WIDTH {
        return;
    }
    let of_q = column < WIDTH;
    let first_head = select(HEADS, 0u, of_q);
    let heads = select(KV_HEADS, HEADS, of_q);
    var sum = 0.0;
    for (var token = first; token < min(first + params.block, params.tokens); token++) {
        for (var head = 0u; head < heads; head++) {
            let row = token * (HEADS + 2u * KV_HEADS) + first_head + head;
            let at = row * WIDTH + column % WIDTH;
            sum += dy[at] * (x[at] * factors[row]);
        }
    }
    parts[block * 2u * WIDTH + column] = sum;
}
