// Layer normalisation: Y[t] = (X[t] - mean) / sqrt(variance + epsilon) * gamma + beta over the WIDTH features of each
// token, with the biased variance. Twin: src/reference/layer_norm.rs.
//
// Two passes over a token, mean first: the variance is a mean of squared differences, which loses nothing where the
// mean is large beside them. The row is read again from the cache, since how long it is, is not known when registers
// are given out.
//
// Tile: 8 tokens to a workgroup of 256, 32 neighbouring lanes to a token; a lane takes every 32nd four of its features.
// Dispatch grid: workgroups over x and y. Workgroup memory: the 32 partial sums of each token, for the mean and for the
// variance apart, so that one barrier serves each; all lanes of a token read the same words, and add them in the same
// order. Residue: tokens past the last one repeat it and store nothing. A token whose variance overflows becomes NaNs.

override WIDTH: u32 = 4u;

const THREADS: u32 = 256u;
const TOKENS: u32 = THREADS / 32u;

// src/ops/layer_norm.rs has the same.
struct Params {
    tokens: u32,
    // What is added to a variance.
    epsilon: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> gamma: array<f32>;
@group(0) @binding(4) var<storage, read> beta: array<f32>;

var<workgroup> parts: array<f32, 2 * THREADS>;

// The sum over the lanes of a token.
fn total(part: f32, half: u32, lane: u32) -> f32 {
    parts[half * THREADS + lane] = part;
    workgroupBarrier();
    let first = half * THREADS + lane / 32u * 32u;
    var sum = 0.0;
    for (var l = 0u; l < 32u; l++) {
        sum += parts[first + l];
    }
    return sum;
}

// One where the features go on, zero past them.
fn inside(column: u32) -> vec4<f32> {
    return select(vec4<f32>(), vec4<f32>(1.0), vec4(column) + vec4(0u, 1u, 2u, 3u) < vec4(WIDTH));
}

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

    var sums = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        sums += load4(start, column, WIDTH);
    }
    let mean = total(sums.x + sums.y + sums.z + sums.w, 0u, lane) / f32(WIDTH);

    var squares = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let centred = (load4(start, column, WIDTH) - mean) * inside(column);
        squares += centred * centred;
    }
    let variance = total(squares.x + squares.y + squares.z + squares.w, 1u, lane) / f32(WIDTH);
    let factor = inverse_root(variance + params.epsilon);

    if token < params.tokens {
        for (var column = first; column < WIDTH; column += 128u) {
            // A feature past the end reads the last one's numbers, and is not stored.
            let at = min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(WIDTH - 1u));
            let scales = vec4(gamma[at.x], gamma[at.y], gamma[at.z], gamma[at.w]);
            let shifts = vec4(beta[at.x], beta[at.y], beta[at.z], beta[at.w]);
            store4(start, column, WIDTH, (load4(start, column, WIDTH) - mean) * factor * scales + shifts);
        }
    }
}
