// 2:4 sparse GEMM on cooperative matrices, by expanding weights on their way to workgroup memory, for any V. Twin:
// `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// It does the multiply-adds of the dense kernel and reads the bytes of the sparse one. Where V = VECTOR, the number of
// consecutive rows of W (features) that share one 2:4 pattern, is too small to gather activations, it keeps 2:4 weights
// without a dense copy of them.
//
// Weights: `w`, kept values in panels of 32 features and units of 16 bytes (src/layout.rs), and `bits`, words of eight
// 4-bit codes. A unit of 8 kept values becomes 16 k of a row of the weight tile: UNIT_K = 16, DEPTH = TILE_K. Tile,
// grid, workgroup memory, k loop and edge tiles: shared/coop.wgsl; activations: shared/coop_dense.wgsl.
//
// Predicted: per unit about 60 instructions to place 8 values among 16, 120 per subgroup and step of 128 x 128 x 32
// with 4 x 4 blocks, in issue slots that the dense kernel leaves idle; 12 KiB of memory per step, where the dense
// kernel reads 16 KiB.

fn fetch_word(feature: u32, k: u32) -> u32 {
    return bits[word_at(feature, k)];
}

// A group of four weights from its two kept values. The first is never last and the second never first, and of the
// middle two one test tells which value it would be.
fn expanded(values: vec2<f16>, code: u32) -> Quad {
    let first = code & 3u;
    let second = (code >> 2u) & 3u;
    let y = select(values.y, values.x, first == 1u);
    let z = select(values.y, values.x, first == 2u);
    let on = (vec4((1u << first) | (1u << second)) & vec4(1u, 2u, 4u, 8u)) != vec4(0u);
    return select(Quad(), Quad(values.x, y, z, values.y), on);
}

fn stash_w(cell: Cell, unit: Unit, half: u32) {
    let at = (half * TILE_M + cell.row) * STRIDE + 4u * cell.unit;
    // k of a step is a multiple of 32, so a unit's four codes are those of its number.
    let codes = unit.word >> (16u * (cell.unit % 2u));
    hold_w(at, expanded(unit.low.xy, codes));
    hold_w(at + 1u, expanded(unit.low.zw, codes >> 4u));
    hold_w(at + 2u, expanded(unit.high.xy, codes >> 8u));
    hold_w(at + 3u, expanded(unit.high.zw, codes >> 12u));
}
