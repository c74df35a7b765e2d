// 2:4 sparse GEMM on cooperative matrices, by gathering activations, for V >= 16. Twin: `Oracle` of src/reference.rs
// with `Weights::Sparse24`.
//
// V = VECTOR: consecutive rows of W (features) that share one 2:4 pattern.
//
// Computation: features that share a pattern keep the same k, so their product is a dense one over the kept half of k
// with the activations' other half left out. Activations are gathered between registers and workgroup memory, once for
// each of the PATTERNS = max(TILE_M / VECTOR, 1) patterns of the tile; subgroups then multiply kept values with the
// copy of their features' pattern, half the multiply-adds of the dense kernel.
//
// Weights: `w`, kept values in panels of 32 features and units of 16 bytes (src/layout.rs), and `bits`, words of eight
// 4-bit codes, the low one first; code = position of the first kept value | position of the second << 2. A unit of kept
// values spans 16 k: UNIT_K = 16, DEPTH = TILE_K / 2.
//
// Workgroup memory: a row of the weight tile is a feature's kept values, a row of the activation tile a token's kept
// activations, 8 bytes from each unit of 16; pattern p's copy follows that of p - 1. Tile, grid, k loop and edge tiles:
// shared/coop.wgsl. Padding along k multiplies a zero value.
//
// Copies of the activations take workgroup memory: `CoopTile::of` in src/kernels/coop.rs lists the tiles that fit for
// each number of patterns.
//
// Predicted for 128 x 128 x 32 at one pattern, per subgroup and step (dense kernel in brackets): 32 (64) hardware
// multiply-adds, 8 (16) fragment loads, 6 (8) 16-byte global loads, plus about 14 instructions per activation unit to
// pick 4 of 8 (56 per step and pattern). That is about 150 issue slots in the 32 x 8 cycles of the tensor unit, about
// 210 at two patterns. Expected speedup: 2 if arithmetic or its latency limits, 1.33 if L2 bandwidth does (12 KiB
// against 16 KiB per step). A tile of 256 x 128 with 8 subgroups reads 8 (12) KiB for each 128 x 128 x 32.

fn fetch_word(feature: u32, k: u32) -> u32 {
    return 0u;
}

fn stash_w(cell: Cell, unit: Unit, half: u32) {
    let at = (half * TILE_M + cell.row) * STRIDE + 2u * cell.unit;
    hold_w(at, unit.low);
    hold_w(at + 1u, unit.high);
}

// All units of activations that a thread brings have the same number along k, and so the same word.
fn fetch_pattern(p: u32, lane: u32, feature0: u32, k0: u32) -> u32 {
    return bits[word_at(feature0 + p * PATTERN_M, k0 + lane % X_UNITS * 8u)];
}

// The two activations that a code keeps of a group. The pair of neighbours is chosen first, as one register.
fn kept(group: Quad, code: u32) -> vec2<f16> {
    let first = select(group.xy, group.zw, (code & 2u) != 0u);
    let second = select(group.xy, group.zw, (code & 8u) != 0u);
    return vec2(select(first.x, first.y, (code & 1u) != 0u), select(second.x, second.y, (code & 4u) != 0u));
}

fn stash_x(cell: Cell, unit: Unit, words: Words, half: u32) {
    // unroll
    for (var p = 0u; p < PATTERNS; p++) {
        let codes = words[p] >> (8u * (cell.unit % 4u));
        let at = ((half * PATTERNS + p) * TILE_N + cell.row) * STRIDE + cell.unit;
        hold_x(at, Quad(kept(unit.low, codes), kept(unit.high, codes >> 4u)));
    }
}
