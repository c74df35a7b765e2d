// 2:4 sparse GEMM by gathering activations. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// Weights: `w`, kept values in panels of 32 features, and `bits`, words of eight 4-bit codes, the low one first; code =
// position of the first kept value | position of the second << 2. Nothing is decompressed: a code selects which two of
// the group's four rows of the activation tile a thread multiplies, so only half the multiply-adds of the dense kernel
// are done.
//
// The SHARE = min(VECTOR, THREAD_M) features of a thread that share a pattern share the gathered activations too: per
// group and pattern a thread reads 2 * TOKEN_QUADS vec4s of activations for 8 * TOKEN_QUADS * SHARE multiply-adds. From
// V = 8 on that is as much as the dense kernel reads. (NVIDIA's hardware packs a read in which lanes come in equal
// pairs: the dense kernel's reads of activations always do, gathers from V = 16 on.) At V = 1
// it would be a word per multiply-add, which loses to dense everywhere, and is not registered.
//
// Workgroup memory: the weight tile has a row per kept value; the codes of a step's four groups, a word per feature,
// lie beside it. Tile and way through k: shared/tile.wgsl; grid and residues: shared/gemm.wgsl. Padding along k
// multiplies a zero value.
//
// By real compilers' machine code and the addresses of all lanes (`sparse24 kernels --compile`; static, not timed): in
// the 128 x 128 tile 1.5 to 2.0 times dense from V = 8 on, 1.0 to 1.9 at V = 4, 0.6 to 1.7 at V = 2. At V = 2 and 4
// workgroup memory decides: hardware serves reads of 16 bytes by eights of a subgroup, so the reads of a group take 80
// and 48 passes, and a step of four groups with its codes and stores 341 and 211 on NVIDIA's (traced,
// src/compile/trace.rs). On RDNA 2 and 3 it may be up to 1.8 times as many, since which eight lanes are served together
// is not public.

// Features of a thread that share a pattern, and patterns of a thread.
const SHARE: u32 = 2u;
const PATTERNS: u32 = 4u;

const_assert SHARE * PATTERNS == THREAD_M;

var<workgroup> code_tile: array<u32, 2 * TILE_M>;

fn stash_w(quad: u32, q: u32, block: Block, half: u32, k0: u32) {
    let column = w_column(quad);
    // unroll
    for (var c = 0u; c < 4u; c++) {
        w_tile[half * W_ROWS + 4u * q + c][column] = transposed(block, c);
    }
    if q == 0u {
        // unroll
        for (var i = 0u; i < 4u; i++) {
            code_tile[half * TILE_M + 4u * quad + i] = block.bits[i] >> (k0 % 32u);
        }
    }
}

fn multiply(sums: ptr<function, array<vec4<f32>, SUMS>>, at: Place, half: u32) {
    var codes: array<u32, PATTERNS>;
    // unroll
    for (var p = 0u; p < PATTERNS; p++) {
        codes[p] = code_tile[half * TILE_M + at.tm * THREAD_M + p * SHARE];
    }
    // unroll
    for (var g = 0u; g < K_QUADS; g++) {
        let column = at.tn ^ (2u * g);
        // One kept value of the group after the other, so that few of both operands are held at once.
        // unroll
        for (var r = 0u; r < 2u; r++) {
            var a: array<vec4<f32>, FEATURE_QUADS>;
            // unroll
            for (var u = 0u; u < FEATURE_QUADS; u++) {
                a[u] = w_tile[half * W_ROWS + 2u * g + r][u * THREADS_M + at.tm];
            }
            // unroll
            for (var p = 0u; p < PATTERNS; p++) {
                let place = (codes[p] >> (4u * g + 2u * r)) & 3u;
                // unroll
                for (var v = 0u; v < TOKEN_QUADS; v++) {
                    let b = x_tile[half * K_QUADS + g][place][v * THREADS_N + column];
                    // unroll
                    for (var i = 0u; i < SHARE; i++) {
                        (*sums)[(p * SHARE + i) * TOKEN_QUADS + v] += a[(p * SHARE + i) / 4u][(p * SHARE + i) % 4u] * b;
                    }
                }
            }
        }
    }
}
