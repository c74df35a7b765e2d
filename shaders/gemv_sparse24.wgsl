// 2:4 sparse product with few tokens. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// Weights: `w`, kept values in panels of 32 features in 16-byte units, and `bits`, words of eight 4-bit codes: field s
// of two bits is the place in its group of the row's kept value s. Tile, workgroup memory and k loop:
// shared/gemv.wgsl.
//
// Bytes against the dense kernel's, V = 1: 0.531 for f32, 0.5625 for f16, so at most 1.88 and 1.78 times its speed.
// Predicted for f16 and eight tokens, from the instructions of a CUDA twin (sm_90, read, not timed) at 18.6 bytes per
// clock and SM: a word of 32 k of 32 features takes 62 clocks for its bytes and 68 for its instructions, against 110
// and 100 in the dense kernel. Workgroup memory takes longer (traced, src/compile/trace.rs). 16 bytes go back to each
// of 32 lanes in four clocks, on NVIDIA's hardware in two if lanes come in equal pairs, as they do in the dense kernel
// and from V = 2 on. So on NVIDIA's a word takes 136 clocks in both kernels at V = 1, which is no gain, and 72 from
// V = 2 on, 1.9 times dense; on RDNA 136 against 264. Four tokens take half of that, less than the bytes of dense
// weights: 1.6 times dense. One token reads 4 bytes at a time, in 20 clocks against 36, and bytes alone decide.

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
