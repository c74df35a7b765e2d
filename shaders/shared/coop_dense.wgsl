// Activations of the cooperative-matrix kernels that multiply over all of k: gemm_dense_coop, gemm_masked_coop, and
// gemm_sparse24_coop_expand. They are stashed as they come.

fn fetch_pattern(p: u32, lane: u32, feature0: u32, k0: u32) -> u32 {
    return 0u;
}

fn stash_x(cell: Cell, unit: Unit, words: Words, half: u32) {
    let at = (half * TILE_N + cell.row) * STRIDE + 2u * cell.unit;
    hold_x(at, unit.low);
    hold_x(at + 1u, unit.high);
}
