// A gate: Y[t, c] = act(X[t, c]) * X[t, width + c], the first half of each row of X through an activation, times the
// second. Activations: shared/activation.wgsl. Twin: src/reference/gated.rs.
//
// Tile: a thread per four neighbouring features of a token, 256 to a workgroup, so that neighbours read a run of each
// half; nothing is reused, so nothing is kept in workgroup memory. Dispatch grid: workgroups over x and y. Residue:
// threads past the last token do nothing; features past the end are read as zeros and not stored.
//
// Occupancy, threads per core at least: rdna2 2048, rdna3 2048, rdna4 2048, ampere 2048, ada 1536, apple-m1 1024,
// adreno 2048.

// As in shared/activation.wgsl.
override ACTIVATION: u32 = 0u;

const THREADS: u32 = 256u;

// src/ops/gated.rs has the same.
struct Params {
    tokens: u32,
    // Features of a row of Y: half of those of X.
    width: u32,
}

@group(0) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 elements: the host sees to it. The grid may be larger than they need.
    let quads = (params.width + 3u) / 4u;
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens * quads - 1u) / THREADS {
        return;
    }
    let e = id * THREADS + lane;
    if e >= params.tokens * quads {
        return;
    }
    let token = e / quads;
    let column = e % quads * 4u;
    let start = token * 2u * params.width;
    let gate = load4(start, column, params.width);
    let value = vec4(activate(gate.x), activate(gate.y), activate(gate.z), activate(gate.w));
    store4(token * params.width, column, params.width, value * load4(start + params.width, column, params.width));
}
