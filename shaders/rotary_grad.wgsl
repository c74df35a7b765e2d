// Gradient of rotary positions: the turn back. For features c and HALF + c of a head in dY,
//     dX[c] = dY[c] * cos + dY[HALF + c] * sin,  dX[HALF + c] = dY[HALF + c] * cos - dY[c] * sin
// and the features that were copied are copied; with ADD all are added to dX. Twin: src/reference/rotary.rs.
//
// Tile, dispatch grid and residue: as of rotary.wgsl.

// Half of the features of a head.
override HALF: u32 = 1u;
override ADD: bool = false;

const THREADS: u32 = 256u;

// src/ops/rotary.rs has the same.
struct Params {
    tokens: u32,
    // Features of a token, and how many of them were turned.
    width: u32,
    rotated: u32,
    // The last position of the tables.
    last: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read_write> dx: array<f32>;
// HALF numbers for each position.
@group(0) @binding(3) var<storage, read> cosines: array<f32>;
@group(0) @binding(4) var<storage, read> sines: array<f32>;
@group(0) @binding(5) var<storage, read> positions: array<u32>;

fn put(at: u32, gradient: f32) {
    var value = gradient;
    if ADD {
        value += dx[at];
    }
    dx[at] = value;
}

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
        put(start + pairs + item, dy[start + pairs + item]);
        return;
    }
    let pair = item % HALF;
    let first = start + item / HALF * 2u * HALF + pair;
    let at = min(positions[token], params.last) * HALF + pair;
    let a = dy[first];
    let b = dy[first + HALF];
    put(first, a * cosines[at] + b * sines[at]);
    put(first + HALF, b * cosines[at] - a * sines[at]);
}
