// 2:4 sparse GEMM by expanding weights on their way to workgroup memory. Twin: `Oracle` of src/reference.rs with
// `Weights::Sparse24`.
//
// It does the multiply-adds of the dense kernel and reads the bytes of the sparse one. Where arithmetic is the limit,
// and V = VECTOR, the number of consecutive rows of W (features) that share one 2:4 pattern, is too small to gather
// activations, it keeps 2:4 weights at dense speed without a dense copy of them.
//
// Weights: `w`, kept values in panels of 32 features (src/layout.rs), and `bits`, words of eight 4-bit codes. A block
// of 4 features x 4 values becomes 4 features x 8 k. Tile and k loop: shared/tile.wgsl; step: shared/tile_dense.wgsl;
// grid and edge tiles: shared/gemm.wgsl.

fn stash_w(quad: u32, q: u32, block: Block, half: u32, k0: u32) {
    let column = w_column(quad);
    // unroll
    for (var h = 0u; h < 2u; h++) {
        let code = block.bits >> vec4(k0 % 32u + 8u * q + 4u * h);
        let first = code & vec4(3u);
        let second = (code >> vec4(2u)) & vec4(3u);
        let value0 = transposed(block, 2u * h);
        let value1 = transposed(block, 2u * h + 1u);
        // unroll
        for (var c = 0u; c < 4u; c++) {
            let weights = select(select(vec4(0.0), value1, second == vec4(c)), value0, first == vec4(c));
            w_tile[half * W_ROWS + 8u * q + 4u * h + c][column] = weights;
        }
    }
}
