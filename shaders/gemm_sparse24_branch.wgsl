// 2:4 sparse GEMM by branching on the pattern. Twin: `Oracle` of src/reference.rs with `Weights::Sparse24`.
//
// With short patterns a gather reads workgroup memory for every few multiply-adds. Here nothing is gathered: a thread
// holds the four activations of a group for its tokens in registers, and the code decides which two are used by a
// branch, each of whose six leaves names its registers. The branch costs nothing in divergence, because the pattern is
// uniform: all lanes run over tokens, and the workgroup's features, codes and values depend on the workgroup id and
// loop counters alone.
//
// Tile: TILE_M = 16 features x 512 tokens; 64 threads of 8 tokens each, 128 sums in registers. Workgroup memory: the
// step's 16 k of activations, k-major, 32 KiB; column c of the rows of quad q is at c ^ 2q, since neighbouring threads
// load neighbouring q. Grid and residues: shared/gemm.wgsl; weights: as in gemm_sparse24.wgsl.
//
// Predicted, from the instructions of a CUDA twin (sm_90, read, not timed): about 11 around the 16 * VECTOR
// multiply-adds of a branch, none of them for convergence, and 16 % for loading: 1.06 per dense multiply-add at V = 1,
// 0.92 at V = 2 and 0.85 at V = 4 against the dense kernel's 1.20, so 1.13, 1.31 and 1.41 times dense if issue were the
// limit. But a step's activations serve 16 features only, where the dense tile's serve 128: per multiply-add it asks
// the cache for 8 times dense's bytes, near 64 per clock and SM, which is all an H200's L2 gives. Expected to lose
// there unless neighbouring workgroups find the activations in L1.

// Features that share a pattern, and patterns of the 16 features.
const VECTOR_ROWS: u32 = 1u;
const PATTERNS: u32 = 16u;

const TILE_M: u32 = 16u;
const TILE_N: u32 = 512u;
const TILE_K: u32 = 16u;
const THREADS: u32 = 64u;
const N_QUADS: u32 = TILE_N / 4u;
const K_QUADS: u32 = TILE_K / 4u;
const BLOCKS_PER_THREAD: u32 = N_QUADS * K_QUADS / THREADS;
// Pairs of kept values in a 16-byte unit: 2 for f32, 4 for f16.
const UNIT_PAIRS: u32 = 2u;

const_assert VECTOR_ROWS * PATTERNS == TILE_M;

alias Quad = vec4<Storage>;

// Half panels of 16 features: the pairs of kept values in a unit of each.
@group(0) @binding(1) var<storage, read> w: array<array<array<vec2<Storage>, UNIT_PAIRS>, 16>>;
@group(0) @binding(2) var<storage, read> bits: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<Quad>;

var<workgroup> x_tile: array<vec4<f32>, TILE_K * N_QUADS>;

fn load_x(lane: u32, token0: u32, k0: u32) {
    for (var s = 0u; s < BLOCKS_PER_THREAD; s++) {
        let e = s * THREADS + lane;
        let q = e % K_QUADS;
        let column = e / K_QUADS;
        var rows: array<vec4<f32>, 4>;
        // unroll
        for (var i = 0u; i < 4u; i++) {
            let token = min(token0 + 4u * column + i, params.n - 1u);
            rows[i] = vec4<f32>(x[token * (params.k / 4u) + k0 / 4u + q]);
        }
        // unroll
        for (var c = 0u; c < 4u; c++) {
            x_tile[(4u * q + c) * N_QUADS + (column ^ (2u * q))] = vec4(rows[0][c], rows[1][c], rows[2][c], rows[3][c]);
        }
    }
}

// Two products more.
fn mac(sum: vec4<f32>, pair: vec2<f32>, x0: vec4<f32>, x1: vec4<f32>) -> vec4<f32> {
    return sum + pair.x * x0 + pair.y * x1;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    if id >= params.tiles_m * params.tiles_n {
        return;
    }
    let tile = tile_at(id);
    let feature0 = tile.x * TILE_M;
    let token0 = tile.y * TILE_N;
    let k_end = min(params.k, (workgroup.z + 1u) * params.k_split);
    // The first of the workgroup's half panels of pairs: its 16 features lie in one panel.
    let panel = feature0 / 32u * (params.k / 4u / UNIT_PAIRS) * 2u + feature0 / 16u % 2u;

    var sums: array<vec4<f32>, 32>;
    for (var k0 = workgroup.z * params.k_split; k0 < k_end; k0 += TILE_K) {
        workgroupBarrier();
        load_x(lane, token0, k0);
        workgroupBarrier();
        let word0 = word_at(feature0, k0);
        for (var g = 0u; g < K_QUADS; g++) {
            let group = k0 / 4u + g;
            let unit = panel + group / UNIT_PAIRS * 2u;
            let column = lane ^ (2u * g);
            var xs: array<vec4<f32>, 8>;
            // unroll
            for (var c = 0u; c < 4u; c++) {
                xs[2u * c] = x_tile[(4u * g + c) * N_QUADS + column];
                xs[2u * c + 1u] = x_tile[(4u * g + c) * N_QUADS + 64u + column];
            }
            // unroll
            for (var p = 0u; p < PATTERNS; p++) {
                let code = bits[word0 + p] >> (k0 % 32u + 4u * g);
                var pairs: array<vec2<f32>, VECTOR_ROWS>;
                // unroll
                for (var i = 0u; i < VECTOR_ROWS; i++) {
                    pairs[i] = vec2<f32>(w[unit][p * VECTOR_ROWS + i][group % UNIT_PAIRS]);
                }
                // By single bits: a switch compiles to a jump table, which costs more.
                if (code & 2u) != 0u {
                    // unroll
                    for (var i = 0u; i < VECTOR_ROWS; i++) {
                        sums[2u * (p * VECTOR_ROWS + i)] = mac(sums[2u * (p * VECTOR_ROWS + i)], pairs[i], xs[4], xs[6]);
                        sums[2u * (p * VECTOR_ROWS + i) + 1u] = mac(sums[2u * (p * VECTOR_ROWS + i) + 1u], pairs[i], xs[5], xs[7]);
                    }
                } else if (code & 1u) != 0u {
                    if (code & 4u) != 0u {
                        // unroll
                        for (var i = 0u; i < VECTOR_ROWS; i++) {
                            sums[2u * (p * VECTOR_ROWS + i)] = mac(sums[2u * (p * VECTOR_ROWS + i)], pairs[i], xs[2], xs[6]);
                            sums[2u * (p * VECTOR_ROWS + i) + 1u] = mac(sums[2u * (p * VECTOR_ROWS + i) + 1u], pairs[i], xs[3], xs[7]);
                        }
                    } else {
                        // unroll
                        for (var i = 0u; i < VECTOR_ROWS; i++) {
                            sums[2u * (p * VECTOR_ROWS + i)] = mac(sums[2u * (p * VECTOR_ROWS + i)], pairs[i], xs[2], xs[4]);
                            sums[2u * (p * VECTOR_ROWS + i) + 1u] = mac(sums[2u * (p * VECTOR_ROWS + i) + 1u], pairs[i], xs[3], xs[5]);
                        }
                    }
                } else if (code & 8u) == 0u {
                    // unroll
                    for (var i = 0u; i < VECTOR_ROWS; i++) {
                        sums[2u * (p * VECTOR_ROWS + i)] = mac(sums[2u * (p * VECTOR_ROWS + i)], pairs[i], xs[0], xs[2]);
                        sums[2u * (p * VECTOR_ROWS + i) + 1u] = mac(sums[2u * (p * VECTOR_ROWS + i) + 1u], pairs[i], xs[1], xs[3]);
                    }
                } else if (code & 4u) != 0u {
                    // unroll
                    for (var i = 0u; i < VECTOR_ROWS; i++) {
                        sums[2u * (p * VECTOR_ROWS + i)] = mac(sums[2u * (p * VECTOR_ROWS + i)], pairs[i], xs[0], xs[6]);
                        sums[2u * (p * VECTOR_ROWS + i) + 1u] = mac(sums[2u * (p * VECTOR_ROWS + i) + 1u], pairs[i], xs[1], xs[7]);
                    }
                } else {
                    // unroll
                    for (var i = 0u; i < VECTOR_ROWS; i++) {
                        sums[2u * (p * VECTOR_ROWS + i)] = mac(sums[2u * (p * VECTOR_ROWS + i)], pairs[i], xs[0], xs[4]);
                        sums[2u * (p * VECTOR_ROWS + i) + 1u] = mac(sums[2u * (p * VECTOR_ROWS + i) + 1u], pairs[i], xs[1], xs[5]);
                    }
                }
            }
        }
    }

    // unroll
    for (var f = 0u; f < 16u; f++) {
        // unroll
        for (var v = 0u; v < 2u; v++) {
            // unroll
            for (var j = 0u; j < 4u; j++) {
                let token = token0 + 4u * (v * THREADS + lane) + j;
                store(feature0 + f, token, workgroup.z, sums[2u * f + v][j]);
            }
        }
    }
}
