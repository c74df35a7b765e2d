// 2:4 sparse product with few tokens. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// Weights: `w`, kept values in panels of 32 features in 16-byte units, and `bits`, words of eight 4-bit codes: field s of two
// bits is the place in its group of the row's kept value s. Tile, workgroup memory and way through k: shared/gemv.wgsl.
//
// Bytes against the dense kernel's, V = 1: 0.531 for f32, 0.5625 for f16, so at most 1.88 and 1.78 times its speed. Predicted per
// f16 value with eight tokens: 8 multiply-adds, 2 reads of the stage, about 4 for the address and the widening; at an
// H200's 4.3 TB/s an SM gets 9.3 values per clock, which takes 4.1 of its 4 issue slots: bytes and issue are level there.

fn multiply_word(sums: ptr<function, array<Tokens, TOKEN_VECS>>, panel: u32, row: u32, k0: u32, local: u32) {
    let at = (panel * (params.k / 2u / UNIT) + k0 / 2u / UNIT) * 32u + row;
    var units: array<vec4<u32>, UNITS>;
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        units[u] = w[at + u * 32u];
    }
    let word = bits[word_at(panel * 32u + row, k0)];
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        // unroll
        for (var e = 0u; e < UNIT; e++) {
            let slot = u * UNIT + e;
            let k = local + 4u * (slot / 2u) + ((word >> (2u * slot)) & 3u);
            // unroll
            for (var v = 0u; v < TOKEN_VECS; v++) {
                (*sums)[v] += value(units[u], e) * stage[k * TOKEN_VECS + v];
            }
        }
    }
}
