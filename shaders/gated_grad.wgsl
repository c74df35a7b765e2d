// Gradients of a gate, of both halves of each row: with a the first half of a row of X, b the second,
//     dA = act'(a) * b * dY, dB = act(a) * dY
// side by side in dX, which is overwritten, or with ADD added to. Activations: shared/activation.wgsl; their slopes:
// shared/slope.wgsl. Twin: src/reference/gated.rs.
//
// Tile: a thread per feature of dY, 256 to a workgroup, so that neighbours read a run of each half; nothing is reused, so
// nothing is kept in workgroup memory. Dispatch grid: workgroups over x and y. Residue: threads past the last feature do
// nothing.

// As in shared/activation.wgsl.
override ACTIVATION: u32 = 0u;
override ADD: bool = false;

const THREADS: u32 = 256u;

// src/ops/gated.rs has the same.
struct Params {
    tokens: u32,
    // Features of a row of dY: half of those of X.
    width: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 elements: the host sees to it. The grid may be larger than they need.
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens * params.width - 1u) / THREADS {
        return;
    }
    let e = id * THREADS + lane;
    if e >= params.tokens * params.width {
        return;
    }
    let first = e / params.width * 2u * params.width + e % params.width;
    let second = first + params.width;
    var of_first = slope(x[first]) * (x[second] * dy[e]);
    var of_second = activate(x[first]) * dy[e];
    if ADD {
        of_first += dx[first];
        of_second += dx[second];
    }
    dx[first] = of_first;
    dx[second] = of_second;
}
