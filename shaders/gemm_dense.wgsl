// Dense GEMM: the kernel that the speed of the others is compared with. Twin: `Oracle` of src/reference.rs with
// `Weights::Dense`.
//
// Weights: `w`, panels of 32 features (src/layout.rs). Tile, workgroup memory and k loop: shared/tile.wgsl; step:
// shared/tile_dense.wgsl; grid and edge tiles: shared/gemm.wgsl.

fn fetch_bits(feature: u32, k0: u32) -> vec4<u32> {
    return vec4<u32>();
}

fn stash_w(quad: u32, q: u32, block: Block, half: u32, k0: u32) {
    let column = w_column(quad);
    // unroll
    for (var c = 0u; c < 4u; c++) {
        w_tile[half * W_ROWS + 4u * q + c][column] = transposed(block, c);
    }
}
