// Masked product with few tokens. Twin: `Oracle` of src/reference.rs with `Weights::Masked`.
//
// Weights: `w`, panels of 32 features in 16-byte units, and `bits` as in gemm_masked.wgsl. Tile, workgroup memory and
// way through k: shared/gemv.wgsl.

// Whether the mask is given as 2:4 codes.
const CODES: bool = false;

fn multiply_word(sums: ptr<function, array<Tokens, TOKEN_VECS>>, panel: u32, row: u32, k0: u32, local: u32) {
    let at = (panel * (params.k / UNIT) + k0 / UNIT) * 32u + row;
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
            let k = u * UNIT + e;
            var on = (word & (1u << k)) != 0u;
            if CODES {
                let code = word >> (k / 4u * 4u);
                on = (code & 3u) == k % 4u || ((code >> 2u) & 3u) == k % 4u;
            }
            let weight = select(0.0, value(units[u], e), on);
            // unroll
            for (var v = 0u; v < TOKEN_VECS; v++) {
                (*sums)[v] += weight * stage[local * TOKEN_VECS + stage_at(k, v)];
            }
        }
    }
}
