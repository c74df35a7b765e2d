// 2:4 sparse GEMM by gathering activations. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// V = VECTOR: consecutive rows of W (features) that share one 2:4 pattern.
//
// Weights: `w`, kept values in panels of 32 features (src/layout.rs), and `bits`, words of eight 4-bit codes, the low
// one first; code = position of the first kept value | position of the second << 2. Nothing is decompressed: a code
// selects which two of the group's four rows of the activation tile a thread multiplies, so only half the multiply-adds
// of the dense kernel are done.
//
// The SHARE = min(VECTOR, THREAD_M) features of a thread that share a pattern share the gathered activations too: per
// group and pattern a thread reads 2 * TOKEN_QUADS vec4s of activations for 8 * TOKEN_QUADS * SHARE multiply-adds. From
// V = 8 on a thread reads no more per multiply-add than in the dense kernel. (NVIDIA serves a read in half as many
// passes where the lanes of every neighbouring pair read the same address, src/compile/banks.rs: those of the dense
// kernel always do, gathers from V = 16 on.) At V = 1 it would be a word per multiply-add, which loses to dense
// everywhere, and is not registered.
//
// Workgroup memory: the weight tile has a row per kept value; the codes of a step's four groups, a word per feature,
// lie beside it. Tile and k loop: shared/tile.wgsl; grid and edge tiles: shared/gemm.wgsl. Padding along k multiplies a
// zero value.
//
// Estimated speed relative to the dense kernel (higher is faster; static estimate by `sparse24 kernels --compile`, not
// timed), 128 x 128 tile: 1.5-2.0 for V >= 8, 1.0-1.9 for V = 4, 0.6-1.7 for V = 2. For V = 2 and 4 the bandwidth of
// workgroup memory is the limit: a 16-byte read is served eight lanes at a time (one pass, Nsight's "wavefront"). The
// reads of a group take 80 and 48 passes; a k step of four groups, with its codes and stores, takes 341 and 211 on
// NVIDIA (src/compile/trace.rs). On RDNA 2 and 3, where it is not public which eight lanes are served together, it may
// take up to 568 and 328.

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
