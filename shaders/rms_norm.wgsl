// Normalisation by the root of the mean of squares: Y[t] = X[t] / sqrt(mean of squares + epsilon) * gamma over the WIDTH
// features of each token. Twin: src/reference/rms_norm.rs.
//
// Tile: 8 tokens to a workgroup of 256, 32 neighbouring lanes to a token; a lane takes every 32nd four of its features,
// and reads them again from the cache to write, since how long a row is, is not known when registers are given out.
// Dispatch grid: workgroups over x and y. Workgroup memory: the 32 partial sums of each token; all lanes of a token read
// the same words, and add them in the same order. Residue: tokens past the last one repeat it and store nothing. A token
// whose mean of squares overflows becomes NaNs.
//
// Occupancy, threads per core at least: rdna2 2048, rdna3 2048, rdna4 2048, ampere 2048, ada 1536, apple-m1 1024,
// adreno 2048.

override WIDTH: u32 = 4u;

const THREADS: u32 = 256u;
const TOKENS: u32 = THREADS / 32u;

// src/ops/rms_norm.rs has the same.
struct Params {
    tokens: u32,
    // What is added to a mean of squares.
    epsilon: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> gamma: array<f32>;

var<workgroup> parts: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens - 1u) / TOKENS {
        return;
    }
    let token = id * TOKENS + lane / 32u;
    let start = min(token, params.tokens - 1u) * WIDTH;
    let first = lane % 32u * 4u;

    var squares = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let four = load4(start, column, WIDTH);
        squares += four * four;
    }
    parts[lane] = squares.x + squares.y + squares.z + squares.w;
    workgroupBarrier();
    var sum = 0.0;
    for (var l = 0u; l < 32u; l++) {
        sum += parts[lane / 32u * 32u + l];
    }
    let factor = inverse_root(sum / f32(WIDTH) + params.epsilon);

    if token < params.tokens {
        for (var column = first; column < WIDTH; column += 128u) {
            // A feature past the end reads the last one's number, and is not stored.
            let at = min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(WIDTH - 1u));
            let scales = vec4(gamma[at.x], gamma[at.y], gamma[at.z], gamma[at.w]);
            store4(start, column, WIDTH, load4(start, column, WIDTH) * factor * scales);
        }
    }
}
