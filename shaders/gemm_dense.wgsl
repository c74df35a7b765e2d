// Dense GEMM: the baseline of every ratio. Twin: `Oracle` of src/reference.rs with `Weights::Dense`.
//
// Weights: `w`, m x k row-major. Main loop: shared/dense_tile.wgsl. Tile, grid, layouts and residues: shared/gemm.wgsl.

@group(0) @binding(1) var<storage, read> w: array<Storage>;

fn load_w(lane: u32, feature0: u32, k0: u32) {
    for (var e = lane; e < TILE_K * TILE_M; e += THREADS) {
        let kk = e % TILE_K;
        let ff = e / TILE_K;
        let i = k0 + kk;
        let feature = feature0 + ff;
        var value = 0.0;
        if i < params.k && feature < params.m {
            value = f32(w[feature * params.k + i]);
        }
        w_tile[kk * W_STRIDE + ff] = value;
    }
}
