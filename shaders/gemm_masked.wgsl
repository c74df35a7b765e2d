// Masked-dense GEMM: dense weights times a mask, fused. Twin: `Oracle` of src/reference.rs with `Weights::Masked`.
//
// Weights: `w`, panels of 32 features (src/layout.rs), and `bits`, for each panel and 32 columns the words of its
// features: a bit per weight (column c is bit c % 32), or with CODES the 4-bit codes of 2:4 groups. The mask is applied
// on the way to workgroup memory, so no masked copy of W ever exists: a masked product reads what a dense one does and
// a word of mask per 32 weights. Tile, workgroup memory and k loop: shared/tile.wgsl; step: shared/tile_dense.wgsl;
// grid and edge tiles: shared/gemm.wgsl.

// Whether the mask is given as 2:4 codes.
const CODES: bool = false;

fn stash_w(quad: u32, q: u32, block: Block, half: u32, k0: u32) {
    let column = w_column(quad);
    // The four bits of this block's k in each row's word.
    let words = block.bits >> vec4(k0 % 32u + 4u * q);
    var kept = words;
    if CODES {
        kept = (vec4(1u) << (words & vec4(3u))) | (vec4(1u) << ((words >> vec4(2u)) & vec4(3u)));
    }
    // unroll
    for (var c = 0u; c < 4u; c++) {
        let on = ((kept >> vec4(c)) & vec4(1u)) == vec4(1u);
        w_tile[half * W_ROWS + 4u * q + c][column] = select(vec4(0.0), transposed(block, c), on);
    }
}
