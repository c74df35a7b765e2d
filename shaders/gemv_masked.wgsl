// Masked product with few tokens. Twin: `Oracle` of src/reference.rs with `Weights::Masked`.
//
// Weights: `w`, panels of 32 features in 16-byte units, and `bits` as in gemm_masked.wgsl. Tile, workgroup memory and
// k loop: shared/gemv.wgsl.

// Whether the mask is given as 2:4 codes.
const CODES: bool = false;

// The bits of the weights that are kept, by a word of codes: eight groups side by side, not a comparison for each weight,
// which SwiftShader compiles for minutes.
fn kept_bits(codes: u32) -> u32 {
    const LOW = 0x11111111u;
    var kept = 0u;
    // unroll
    for (var s = 0u; s < 2u; s++) {
        // The two bits of each group's place.
        let bit0 = (codes >> (2u * s)) & LOW;
        let bit1 = (codes >> (2u * s + 1u)) & LOW;
        let both = bit0 & bit1;
        kept |= (LOW ^ (bit0 | bit1)) | ((bit0 ^ both) << 1u) | ((bit1 ^ both) << 2u) | (both << 3u);
    }
    return kept;
}

fn multiply_word(sums: ptr<function, array<Tokens, TOKEN_VECS>>, panel: u32, row: u32, k0: u32, local: u32) {
    let at = (panel * (params.k / UNIT) + k0 / UNIT) * 32u + row;
    var units: array<vec4<u32>, UNITS>;
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        units[u] = w[at + u * 32u];
    }
    var kept = bits[word_at(panel * 32u + row, k0)];
    if CODES {
        kept = kept_bits(kept);
    }
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        // unroll
        for (var e = 0u; e < UNIT; e++) {
            let k = u * UNIT + e;
            let on = (kept & (1u << k)) != 0u;
            let weight = select(0.0, value(units[u], e), on);
            // unroll
            for (var v = 0u; v < TOKEN_VECS; v++) {
                (*sums)[v] += weight * stage[local * TOKEN_VECS + stage_at(k, v)];
            }
        }
    }
}
