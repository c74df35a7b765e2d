// 2:4 sparse GEMM for every vector length. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// Weights: `values`, m x k/2 row-major (k rounded up to a multiple of 4), and `metadata`, ceil(m / VECTOR) x meta_cols words of
// eight 4-bit codes, the low one first; code = position of the first kept value | position of the second << 2. Nothing is
// ever decompressed: the code selects which two rows of the k-major tile of activations a thread multiplies, so only half
// the multiply-adds of the dense kernel are done.
//
// The features of one thread that share a pattern (SHARE = min(VECTOR, THREAD_M)) share the gathered activations too: per
// group a thread reads 2 * THREAD_N words of activations per SHARE features and does 2 * THREAD_N * SHARE multiply-adds. At
// VECTOR = 1 that is a word per multiply-add, which is why V = 1 loses to dense where arithmetic is the limit.
//
// The codes of a tile are one word per row of metadata, held in a register for its eight groups.
// Tile, grid, layouts and residues otherwise: shared/gemm.wgsl. A gather past k reads a zero of the tile, and the value it
// multiplies is padding, a zero as well.

const VECTOR: u32 = 1u;

@group(0) @binding(1) var<storage, read> values: array<Storage>;
@group(0) @binding(2) var<storage, read> metadata: array<u32>;

// One word of codes per row of metadata and tile.
const_assert TILE_K == 32u;

const SHARE: u32 = min(VECTOR, THREAD_M);
const PATTERNS: u32 = THREAD_M / SHARE;
const GROUPS: u32 = TILE_K / 4u;
// Kept values per row and tile.
const SLOTS: u32 = TILE_K / 2u;

// Kept values, slot-major: slot s of feature f at s * W_STRIDE + f.
var<workgroup> w_tile: array<f32, SLOTS * W_STRIDE>;

fn load_values(lane: u32, feature0: u32, k0: u32) {
    let k_physical = (params.k + 3u) / 4u * 2u;
    for (var e = lane; e < SLOTS * TILE_M; e += THREADS) {
        let slot = e % SLOTS;
        let ff = e / SLOTS;
        let i = k0 / 2u + slot;
        let feature = feature0 + ff;
        var value = 0.0;
        if i < k_physical && feature < params.m {
            value = f32(values[feature * k_physical + i]);
        }
        w_tile[slot * W_STRIDE + ff] = value;
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = place(workgroup, lane);
    var sums: array<array<f32, THREAD_N>, THREAD_M>;

    for (var k0 = 0u; k0 < params.k; k0 += TILE_K) {
        load_values(lane, at.feature0, k0);
        load_x(lane, at.token0, k0);
        var codes: array<u32, PATTERNS>;
        for (var p = 0u; p < PATTERNS; p++) {
            let feature = at.feature0 + at.feature + p * SHARE;
            codes[p] = 0u;
            if feature < params.m {
                codes[p] = metadata[feature / VECTOR * params.meta_cols + k0 / TILE_K];
            }
        }
        workgroupBarrier();
        for (var g = 0u; g < GROUPS; g++) {
            for (var p = 0u; p < PATTERNS; p++) {
                let code = codes[p] >> (4u * g);
                let row0 = (4u * g + (code & 3u)) * X_STRIDE + at.token;
                let row1 = (4u * g + ((code >> 2u) & 3u)) * X_STRIDE + at.token;
                var b0: array<f32, THREAD_N>;
                var b1: array<f32, THREAD_N>;
                for (var j = 0u; j < THREAD_N; j++) {
                    b0[j] = x_tile[row0 + j];
                    b1[j] = x_tile[row1 + j];
                }
                for (var i = 0u; i < SHARE; i++) {
                    let slot = 2u * g * W_STRIDE + at.feature + p * SHARE + i;
                    let a0 = w_tile[slot];
                    let a1 = w_tile[slot + W_STRIDE];
                    for (var j = 0u; j < THREAD_N; j++) {
                        sums[p * SHARE + i][j] += a0 * b0[j];
                        sums[p * SHARE + i][j] += a1 * b1[j];
                    }
                }
            }
        }
        workgroupBarrier();
    }

    for (var j = 0u; j < THREAD_N; j++) {
        for (var i = 0u; i < THREAD_M; i++) {
            store(at.feature0 + at.feature + i, at.token0 + at.token + j, sums[i][j]);
        }
    }
}
