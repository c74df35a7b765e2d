// An activation by itself: Y = act(X), or act(X) + residual, element by element. Activations: shared/activation.wgsl.
// Twin: src/reference/activation.rs.
//
// Tile: a thread per element, 256 to a workgroup, so that neighbours read a run; nothing is reused, so nothing is kept in
// workgroup memory. Dispatch grid: workgroups over x and y. Residue: threads past the last element do nothing.

// As in shared/activation.wgsl.
override ACTIVATION: u32 = 0u;
override HAS_RESIDUAL: bool = false;

const THREADS: u32 = 256u;

// src/ops/activation.rs has the same.
struct Params {
    elements: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<Storage>;
@group(0) @binding(2) var<storage, read> residual: array<Output>;
@group(0) @binding(3) var<storage, read_write> y: array<Output>;

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
    var value = activate(f32(x[e]));
    if HAS_RESIDUAL {
        value += f32(residual[e]);
    }
    y[e] = Output(value);
}
