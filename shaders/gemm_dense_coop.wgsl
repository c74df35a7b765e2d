// Dense GEMM on cooperative matrices: the kernel that the speed of the others on cooperative matrices is compared with.
// Twin: `Oracle` of src/reference.rs with `Weights::Dense`.
//
// Weights: `w`, panels of 32 features (src/layout.rs). Tile, grid, workgroup memory, k loop, edge tiles and predicted
// cost: shared/coop.wgsl; activations: shared/coop_dense.wgsl.

fn fetch_word(feature: u32, k: u32) -> u32 {
    return 0u;
}

fn stash_w(cell: Cell, unit: Unit, half: u32) {
    let at = (half * TILE_M + cell.row) * STRIDE + 2u * cell.unit;
    hold_w(at, unit.low);
    hold_w(at + 1u, unit.high);
}
