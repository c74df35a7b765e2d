// Brings activations to the shape that every kernel reads: token-major, k padded with zeros to a multiple of 32. Needed
// where the caller's k is no such multiple, and for the plain form, whose B is k x n.
//
// Tile: a workgroup moves 32 k x 32 tokens through workgroup memory, so that reads and writes both run along memory.
// Dispatch grid: tiles_m blocks of k times tiles_n blocks of tokens, over x and y. Params: `k` padded, `k_given` as it
// is. Workgroup memory: rows of tokens, one element longer than the tile, so that reading down a column meets all
// banks. Params, `y` (here the packed X) and LINEAR: shared/gemm.wgsl.

const THREADS: u32 = 256u;
const STRIDE: u32 = 33u;

@group(0) @binding(3) var<storage, read> x: array<Storage>;

var<workgroup> block: array<Storage, 32 * STRIDE>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    if id >= params.tiles_m * params.tiles_n {
        return;
    }
    let k0 = id % params.tiles_m * 32u;
    let token0 = id / params.tiles_m * 32u;
    for (var s = 0u; s < 4u; s++) {
        // Neighbouring threads read neighbouring memory.
        var kk = lane % 32u;
        var tt = lane / 32u + 8u * s;
        if !LINEAR {
            kk = lane / 32u + 8u * s;
            tt = lane % 32u;
        }
        let i = k0 + kk;
        let token = token0 + tt;
        var value = Storage(0.0);
        if i < params.k_given && token < params.n {
            value = x[select(i * params.n + token, token * params.k_given + i, LINEAR)];
        }
        block[tt * STRIDE + kk] = value;
    }
    workgroupBarrier();
    for (var s = 0u; s < 4u; s++) {
        let kk = lane % 32u;
        let tt = lane / 32u + 8u * s;
        if token0 + tt < params.n {
            y[(token0 + tt) * params.k + k0 + kk] = block[tt * STRIDE + kk];
        }
    }
}
