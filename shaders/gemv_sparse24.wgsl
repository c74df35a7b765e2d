// 2:4 sparse product with few tokens. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// Weights: `w`, kept values in panels of 32 features in 16-byte units, and `bits`, words of eight 4-bit codes: field s
// of two bits is the place in its group of the row's kept value s. Tile, workgroup memory and way through k:
// shared/gemv.wgsl.
//
// Bytes against the dense kernel's, V = 1: 0.531 for f32, 0.5625 for f16, so at most 1.88 and 1.78 times its speed.
// Predicted for f16 and eight tokens, from the instructions of a CUDA twin (sm_90, read, not timed) at 18.6 bytes per
// clock and SM: a word of 32 k of 32 features takes 62 clocks for its bytes, 68 for its instructions and 40 of
// workgroup memory, against 110, 100 and 72 in the dense kernel: about 1.6 times dense, with issue as the limit. (If
// the hardware serves reads of 16 bytes by eights of a subgroup, workgroup memory limits both, at 136 and 264.)

const SWIZZLE: u32 = select(0xffaa5500u, 0u, TOKEN_LANES == 1u);

fn multiply_word(sums: ptr<function, array<Tokens, TOKEN_VECS>>, panel: u32, row: u32, k0: u32, local: u32) {
    let at = (panel * (params.k / 2u / UNIT) + k0 / 2u / UNIT) * 32u + row;
    var units: array<vec4<u32>, UNITS>;
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        units[u] = w[at + u * 32u];
    }
    // The places in the group, each with the exclusive or of `stage_at`: the number of its four k, halved.
    let places = bits[word_at(panel * 32u + row, k0)] ^ SWIZZLE;
    // unroll
    for (var u = 0u; u < UNITS; u++) {
        // unroll
        for (var e = 0u; e < UNIT; e++) {
            let slot = u * UNIT + e;
            let k = (local | ((places >> (2u * slot)) & 3u)) + 4u * (slot / 2u);
            // unroll
            for (var v = 0u; v < TOKEN_VECS; v++) {
                (*sums)[v] += value(units[u], e) * stage[k * TOKEN_VECS + (v ^ ((slot / 2u) & (TOKEN_VECS - 1u)))];
            }
        }
    }
}
