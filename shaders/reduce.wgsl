// Adds up what the splits of k have left in scratch, in the order of the splits, and runs the epilogue: the second half
// of every kernel with more than one split. The order makes the result the same from run to run.
//
// Grid: one thread per output, 256 to a workgroup, over x and y. Scratch: a token-major f32 matrix per split.
// Params, operands and epilogue: shared/gemm.wgsl; `m` is all features of Y.

const THREADS: u32 = 256u;

@group(0) @binding(1) var<storage, read> partial: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let e = (workgroup.y * grid.x + workgroup.x) * THREADS + lane;
    let outputs = params.n * params.features;
    if e >= outputs {
        return;
    }
    let splits = (params.k + params.k_split - 1u) / params.k_split;
    var sum = 0.0;
    for (var s = 0u; s < splits; s++) {
        sum += partial[s * outputs + e];
    }
    store(e % params.features, e / params.features, 0u, sum);
}
