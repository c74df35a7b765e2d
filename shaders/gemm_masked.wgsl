// Masked-dense GEMM: dense weights times any bit mask, fused. Twin: `Oracle` of src/reference.rs with `Weights::Masked`.
//
// Weights: `w`, m x k row-major, and `mask`, m x meta_cols words, column c being bit c % 32 of word c / 32. The bit is
// applied while the tile is loaded, so no masked copy of W ever exists in memory: a masked product reads what
// a dense one does and a word of mask per 32 weights. Main loop: shared/dense_tile.wgsl. Tile, grid, layouts and residues: shared/gemm.wgsl.

@group(0) @binding(1) var<storage, read> w: array<Storage>;
@group(0) @binding(2) var<storage, read> mask: array<u32>;

// A tile of k within one word per row: what lets `load_w` leave out a test of i against k.
const_assert 32u % TILE_K == 0u;

fn load_w(lane: u32, feature0: u32, k0: u32) {
    for (var e = lane; e < TILE_K * TILE_M; e += THREADS) {
        let kk = e % TILE_K;
        let ff = e / TILE_K;
        let i = k0 + kk;
        let feature = feature0 + ff;
        var value = 0.0;
        // Bits past the last column are zero, and a tile never reaches past the last word.
        if feature < params.m {
            let word = mask[feature * params.meta_cols + i / 32u];
            if ((word >> (i % 32u)) & 1u) == 1u {
                value = f32(w[feature * params.k + i]);
            }
        }
        w_tile[kk * W_STRIDE + ff] = value;
    }
}
