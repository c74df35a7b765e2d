// Dense product with few tokens. Twin: `Oracle` of src/reference.rs with `Weights::Dense`.
//
// Weights: `w`, panels of 32 features in 16-byte units. Tile, workgroup memory and k loop: shared/gemv.wgsl.

fn multiply_word(sums: ptr<function, array<Tokens, TOKEN_VECS>>, panel: u32, row: u32, k0: u32, local: u32) {
    let at = (panel * (params.k / UNIT) + k0 / UNIT) * 32u + row;
    var units: array<vec4<u32>, UNITS>;
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        units[u] = w[at + u * 32u];
    }
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        // unroll
        for (var e = 0u; e < UNIT; e++) {
            // unroll
            for (var v = 0u; v < TOKEN_VECS; v++) {
                (*sums)[v] += value(units[u], e) * stage[local * TOKEN_VECS + stage_at(u * UNIT + e, v)];
            }
        }
    }
}
