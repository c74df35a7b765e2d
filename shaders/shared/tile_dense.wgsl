// A step of the register-tiled kernels whose weight tile holds all 16 k: gemm_dense, gemm_masked, and
// gemm_sparse24_expand.
//
// Per k a thread reads FEATURE_QUADS + TOKEN_QUADS vec4s of workgroup memory and does 16 multiply-adds for each pair of
// them.

fn multiply(sums: ptr<function, array<vec4<f32>, SUMS>>, at: Place, half: u32) {
    // unroll
    for (var q = 0u; q < K_QUADS; q++) {
        let column = at.tn ^ (2u * q);
        // unroll
        for (var c = 0u; c < 4u; c++) {
            let row = half * TILE_K + 4u * q + c;
            var a: array<vec4<f32>, FEATURE_QUADS>;
            var b: array<vec4<f32>, TOKEN_QUADS>;
            // unroll
            for (var u = 0u; u < FEATURE_QUADS; u++) {
                a[u] = w_tile[row][u * THREADS_M + at.tm];
            }
            // unroll
            for (var v = 0u; v < TOKEN_QUADS; v++) {
                b[v] = x_tile[half * K_QUADS + q][c][v * THREADS_N + column];
            }
            // unroll
            for (var f = 0u; f < THREAD_M; f++) {
                // unroll
                for (var v = 0u; v < TOKEN_QUADS; v++) {
                    (*sums)[f * TOKEN_QUADS + v] += a[f / 4u][f % 4u] * b[v];
                }
            }
        }
    }
}
