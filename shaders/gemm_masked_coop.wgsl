// Masked-dense GEMM on cooperative matrices: dense weights times a mask, fused. Twin: `Oracle` of src/reference.rs with
// `Weights::Masked`.
//
// Weights: `w`, panels of 32 features (src/layout.rs), and `bits`, for each panel and 32 columns the words of its
// features: a bit per weight (column c is bit c % 32), or with CODES the 4-bit codes of 2:4 groups. The mask is applied
// between registers and workgroup memory; there is no masked copy of W. Tile, grid, workgroup memory, k loop and edge
// tiles: shared/coop.wgsl; activations: shared/coop_dense.wgsl.
//
// Predicted: per unit of 8 weights about 24 instructions more than the dense kernel, for its bit tests and selects, 96
// per subgroup and step of 128 x 128 x 32 with 4 x 4 blocks, in issue slots that the dense kernel leaves idle; and a
// word per 32 weights, which the units of a feature share where a thread has several.

// Whether the mask is given as 2:4 codes.
const CODES: bool = false;

fn fetch_word(feature: u32, k: u32) -> u32 {
    return bits[word_at(feature, k)];
}

// Four weights, those that the low four bits of `mask` keep. With CODES, `mask` is the group's code.
fn masked(weights: Quad, mask: u32) -> Quad {
    var kept = mask;
    if CODES {
        kept = (1u << (mask & 3u)) | (1u << ((mask >> 2u) & 3u));
    }
    return select(Quad(), weights, (vec4(kept) & vec4(1u, 2u, 4u, 8u)) != vec4(0u));
}

fn stash_w(cell: Cell, unit: Unit, half: u32) {
    let at = (half * TILE_M + cell.row) * STRIDE + 2u * cell.unit;
    // k of a step is a multiple of 32, so a unit's eight bits are those of its number.
    let mask = unit.word >> (8u * (cell.unit % 4u));
    hold_w(at, masked(unit.low, mask));
    hold_w(at + 1u, masked(unit.high, mask >> 4u));
}
