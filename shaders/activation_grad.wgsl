// Gradient of an activation: dX = act'(X) * dY, element by element, or with ADD that added to dX. Slopes:
// shared/slope.wgsl. Twin: src/reference/activation.rs.
//
// Tile, dispatch grid, workgroup memory and residue: as of activation.wgsl.

// As in shared/activation.wgsl.
override ACTIVATION: u32 = 0u;
override ADD: bool = false;

const THREADS: u32 = 256u;

// src/ops/activation.rs has the same.
struct Params {
    elements: u32,
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
    if id > (params.elements - 1u) / THREADS {
        return;
    }
    let e = id * THREADS + lane;
    if e >= params.elements {
        return;
    }
    var gradient = slope(x[e]) * dy[e];
    if ADD {
        gradient += dx[e];
    }
    dx[e] = gradient;
}
