// The main loop of the families whose tile of weights is dense once it is loaded: gemm_dense and gemm_masked. The family
// supplies `load_w`, which fills `w_tile`.
//
// Per step of k each thread reads THREAD_M + THREAD_N words of workgroup memory and does THREAD_M * THREAD_N
// multiply-adds. Tile, grid, layouts and residues: gemm.wgsl.

// Weights, k-major: weight k of feature f at k * W_STRIDE + f.
var<workgroup> w_tile: array<f32, TILE_K * W_STRIDE>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = place(workgroup, lane);
    var sums: array<array<f32, THREAD_N>, THREAD_M>;

    for (var k0 = 0u; k0 < params.k; k0 += TILE_K) {
        load_w(lane, at.feature0, k0);
        load_x(lane, at.token0, k0);
        workgroupBarrier();
        for (var kk = 0u; kk < TILE_K; kk++) {
            var a: array<f32, THREAD_M>;
            var b: array<f32, THREAD_N>;
            for (var i = 0u; i < THREAD_M; i++) {
                a[i] = w_tile[kk * W_STRIDE + at.feature + i];
            }
            for (var j = 0u; j < THREAD_N; j++) {
                b[j] = x_tile[kk * X_STRIDE + at.token + j];
            }
            for (var i = 0u; i < THREAD_M; i++) {
                for (var j = 0u; j < THREAD_N; j++) {
                    sums[i][j] += a[i] * b[j];
                }
            }
        }
        workgroupBarrier();
    }

    for (var j = 0u; j < THREAD_N; j++) {
        for (var i = 0u; i < THREAD_M; i++) {
            store(at.feature0 + at.feature + i, at.token0 + at.token + j, sums[i][j]);
        }
    }
}
