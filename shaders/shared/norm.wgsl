// What layer_norm.wgsl, rms_norm.wgsl and their gradients share: parameters, and how the WIDTH features of a token are
// dealt out.
//
// Tile: 8 tokens to a workgroup of 256, 32 neighbouring lanes to a token; a lane takes every 32nd four of its features,
// and reads them from the cache each time, since how long a row is, is not known when registers are given out. Dispatch
// grid: workgroups over x and y. Workgroup memory: the 32 partial sums of each token, for each of SUMS sums apart, so
// that one barrier serves each; all lanes of a token read the same words, and add them in the same order. Residue: tokens
// past the last one repeat it and store nothing.

override WIDTH: u32 = 4u;

const THREADS: u32 = 256u;
const TOKENS: u32 = THREADS / 32u;

// src/kernels/norm.rs has the same.
struct Params {
    tokens: u32,
    // What is added to the mean of squares under the root.
    epsilon: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> gamma: array<f32>;

var<workgroup> parts: array<f32, SUMS * THREADS>;

// Sum number `which` of a token, from what the four places of each of its lanes come to.
fn total(part: vec4<f32>, which: u32, lane: u32) -> f32 {
    parts[which * THREADS + lane] = part.x + part.y + part.z + part.w;
    workgroupBarrier();
    let first = which * THREADS + lane / 32u * 32u;
    var sum = 0.0;
    for (var l = 0u; l < 32u; l++) {
        sum += parts[first + l];
    }
    return sum;
}

// Where the numbers of four features lie. One past the end reads the last one's, and is not stored.
fn places(column: u32) -> vec4<u32> {
    return min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(WIDTH - 1u));
}

fn scales(column: u32) -> vec4<f32> {
    let at = places(column);
    return vec4(gamma[at.x], gamma[at.y], gamma[at.z], gamma[at.w]);
}

// One where the features go on, zero past them.
fn inside(column: u32) -> vec4<f32> {
    return select(vec4<f32>(), vec4<f32>(1.0), vec4(column) + vec4(0u, 1u, 2u, 3u) < vec4(WIDTH));
}
