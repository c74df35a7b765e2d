// Rotary positions: the first `rotated` features of each token are heads of 2 * HALF features, and feature c of the first
// half of a head is turned with feature c of the second by the angle of the token's position; the others are copied.
//     Y[c] = X[c] * cos - X[HALF + c] * sin,  Y[HALF + c] = X[HALF + c] * cos + X[c] * sin
// Twin: src/reference/rotary.rs.
//
// Tile: a thread per turned pair or copied feature, 256 to a workgroup, so that neighbours read runs of one row and of
// the tables; nothing is reused, so nothing is kept in workgroup memory. Dispatch grid: workgroups over x and y.
// Residue: threads past the last item do nothing. A position past the end of the tables reads their last row.
//
// Occupancy, threads per core at least: rdna2 2048, rdna3 2048, rdna4 2048, ampere 2048, ada 1536, apple-m1 1024,
// adreno 2048.

// Half of the features of a head.
override HALF: u32 = 1u;

const THREADS: u32 = 256u;

// src/ops/rotary.rs has the same.
struct Params {
    tokens: u32,
    // Features of a token, and how many of them are turned.
    width: u32,
    rotated: u32,
    // The last position of the tables.
    last: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<Storage>;
@group(0) @binding(2) var<storage, read_write> y: array<Output>;
// HALF numbers for each position.
@group(0) @binding(3) var<storage, read> cosines: array<f32>;
@group(0) @binding(4) var<storage, read> sines: array<f32>;
@group(0) @binding(5) var<storage, read> positions: array<u32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 items: the host sees to it. The grid may be larger than they need.
    let pairs = params.rotated / 2u;
    let items = params.width - pairs;
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens * items - 1u) / THREADS {
        return;
    }
    let e = id * THREADS + lane;
    if e >= params.tokens * items {
        return;
    }
    let token = e / items;
    let item = e % items;
    let start = token * params.width;
    if item >= pairs {
        y[start + pairs + item] = Output(f32(x[start + pairs + item]));
        return;
    }
    let pair = item % HALF;
    let first = start + item / HALF * 2u * HALF + pair;
    let at = min(positions[token], params.last) * HALF + pair;
    let a = f32(x[first]);
    let b = f32(x[first + HALF]);
    y[first] = Output(a * cosines[at] - b * sines[at]);
    y[first + HALF] = Output(b * cosines[at] + a * sines[at]);
}
