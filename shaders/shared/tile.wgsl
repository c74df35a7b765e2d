// The k loop of the register-tiled kernels. The family's file says how a tile of weights is stashed (`fetch_bits`,
// `stash_w`) and how a step is multiplied (`multiply`).
//
// Tile: a workgroup owns TILE_M features x TILE_N tokens and walks k in steps of 16; a thread owns 4 * FEATURE_QUADS
// consecutive features x TOKEN_QUADS runs of four tokens, their sums in registers. 32 neighbouring threads cover ACROSS
// x 32 / ACROSS threads' blocks. With 8 x 4 a read of either tile by a subgroup of 32 touches few distinct addresses
// and the rest is broadcast. With 32 x 1 all read the same tokens, of which a 2:4 gather reads at most the four rows of
// a group.
//
// Pipeline: while a step is multiplied, the next one's operands are on their way from memory to registers; they are
// stashed into the other half of workgroup memory afterwards. One barrier per step.
//
// Workgroup memory: both tiles k-major, four features or tokens of one k as a vec4, so that every read is 16 bytes.
// Memory has k contiguous, so a thread loads a 4 x 4 block (four 4-element reads along k) and stashes its transpose
// (four writes along features or tokens).
// - Weights: column u * THREADS_M + tm holds the quad FEATURE_QUADS * tm + u of features: neighbouring threads read
//   neighbouring columns. With two quads per thread, stores of neighbouring threads alternate between two runs of
//   columns and meet in pairs in the same banks: two passes for one, a thirtieth of a dense step's passes.
// - Activations: column c of the rows of quad q is at c ^ 2q. Neighbouring threads load neighbouring q and so write
//   rows four apart, which without the exclusive or would lie in the same banks. X_PAD spreads the four rows of a 2:4
//   group, among which the threads of a subgroup choose.
//
// Occupancy, threads per core at least: rdna2 384, rdna3 384, rdna4 384, ampere 512, ada 512, apple-m1 384, adreno 128.
// That is one workgroup or two of 256 threads: of a 128 x 128 tile a thread holds 64 sums, 16 to 20 words on their way,
// and 12 to 16 that it multiplies.

const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
// Per thread: quads of features, and of tokens.
const FEATURE_QUADS: u32 = 2u;
const TOKEN_QUADS: u32 = 1u;
// Features of a thread.
const THREAD_M: u32 = 8u;
// Threads along m among 32 neighbours: 8 or 32.
const ACROSS: u32 = 8u;
// Blocks that a thread loads per step.
const STEPS: u32 = 1u;
// Elements along k of one 16-byte unit of a weight panel, in quads: 1 for f32, 2 for f16.
const UNIT_QUADS: u32 = 1u;
// Rows of the weight tile, and quads along k that are read for them: 16 and 4 for dense weights, 8 and 2 for kept
// values (whose tile has 16 rows again if it is expanded).
const W_ROWS: u32 = 16u;
const W_QUADS: u32 = 4u;
// Columns added to the rows of the activation tile.
const X_PAD: u32 = 0u;

const TILE_K: u32 = 4u * K_QUADS;
const K_QUADS: u32 = 4u;
const M_QUADS: u32 = TILE_M / 4u;
const N_QUADS: u32 = TILE_N / 4u;
const THREADS_M: u32 = M_QUADS / FEATURE_QUADS;
const THREADS_N: u32 = N_QUADS / TOKEN_QUADS;
const THREADS: u32 = THREADS_M * THREADS_N;
const SUMS: u32 = THREAD_M * TOKEN_QUADS;
const W_BLOCKS: u32 = M_QUADS * W_QUADS;
const X_BLOCKS: u32 = N_QUADS * K_QUADS;
const X_STRIDE: u32 = N_QUADS + X_PAD;
// Whether every thread has a block in every step.
const EVEN: bool = STEPS * THREADS == W_BLOCKS + X_BLOCKS;

const_assert THREAD_M == 4u * FEATURE_QUADS;
const_assert STEPS == (W_BLOCKS + X_BLOCKS + THREADS - 1u) / THREADS;
// The exclusive or must stay within a run of columns that belongs to one token quad of every thread.
const_assert THREADS_M % ACROSS == 0u && THREADS_N % 8u == 0u;

alias Quad = vec4<Storage>;

@group(0) @binding(1) var<storage, read> w: array<Quad>;
@group(0) @binding(2) var<storage, read> bits: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<Quad>;

// Two tiles of each. They are nested, so that an address is a sum with one term for each index. Compilers put the terms of
// constant indices into the instruction. Of a k that is chosen in its group of four at run time, one multiply-add is left.
var<workgroup> w_tile: array<array<vec4<f32>, M_QUADS>, 2 * W_ROWS>;
var<workgroup> x_tile: array<array<array<vec4<f32>, X_STRIDE>, 4>, 2 * K_QUADS>;

// Where a thread works in its workgroup's tile.
struct Place {
    tm: u32,
    tn: u32,
}

fn place(lane: u32) -> Place {
    let l = lane % 32u;
    let block = lane / 32u;
    const BLOCKS_M = THREADS_M / ACROSS;
    return Place(block % BLOCKS_M * ACROSS + l % ACROSS, block / BLOCKS_M * (32u / ACROSS) + l / ACROSS);
}

// A 4 x 4 block on its way: element [i][c] is row i, k number c. For weights, also the words of mask bits or codes of
// the four rows.
struct Block {
    rows: array<Quad, 4>,
    bits: vec4<u32>,
}

// A thread's blocks of the next step. Of the module and not of a function, so that a thread without a block can keep what
// it has: a variable of a function becomes zero, a move for each element in every step.
var<private> next: array<Block, STEPS>;
// Whether no subgroup of up to 64 loads both weights and activations in one step. Where one does, both sides of the branch
// write the same registers, and zeroing them first costs fewer moves (RDNA 3, V = 8, 32 x 32 tile: 8 % of a step). Tiles of
// 32 x 1 threads zero them as well, as RDNA 2 takes 1 % fewer cycles then.
const ALIKE: bool = W_BLOCKS % 64u == 0u && ACROSS == 8u;

// Index of quad q of a feature's row of `row_quads` quads. Features past the last panel read the last one.
fn w_index(feature: u32, q: u32, row_quads: u32) -> u32 {
    let panel = min(feature / 32u, (params.m - 1u) / 32u);
    let unit = (panel * (row_quads / UNIT_QUADS) + q / UNIT_QUADS) * 32u + feature % 32u;
    return unit * UNIT_QUADS + q % UNIT_QUADS;
}

fn fetch(s: u32, e: u32, feature0: u32, token0: u32, k0: u32) {
    if !ALIKE {
        next[s] = Block();
    }
    if e < W_BLOCKS {
        let feature = feature0 + 4u * (e % M_QUADS);
        let at = w_index(feature, k0 / TILE_K * W_QUADS + e / M_QUADS, params.k / TILE_K * W_QUADS);
        // unroll
        for (var i = 0u; i < 4u; i++) {
            next[s].rows[i] = w[at + i * UNIT_QUADS];
        }
        next[s].bits = fetch_bits(feature, k0);
    } else if EVEN || e < W_BLOCKS + X_BLOCKS {
        let q = (e - W_BLOCKS) % K_QUADS;
        let token = token0 + 4u * ((e - W_BLOCKS) / K_QUADS);
        // unroll
        for (var i = 0u; i < 4u; i++) {
            next[s].rows[i] = x[min(token + i, params.n - 1u) * (params.k / 4u) + k0 / 4u + q];
        }
    }
}

// Column of the weight tile of a quad of features.
fn w_column(quad: u32) -> u32 {
    return quad % FEATURE_QUADS * THREADS_M + quad / FEATURE_QUADS;
}

fn stash(e: u32, block: Block, half: u32, k0: u32) {
    if e < W_BLOCKS {
        stash_w(e % M_QUADS, e / M_QUADS, block, half, k0);
    } else if EVEN || e < W_BLOCKS + X_BLOCKS {
        let q = (e - W_BLOCKS) % K_QUADS;
        let column = ((e - W_BLOCKS) / K_QUADS) ^ (2u * q);
        // unroll
        for (var c = 0u; c < 4u; c++) {
            x_tile[half * K_QUADS + q][c][column] = transposed(block, c);
        }
    }
}

// Element c of the four rows.
fn transposed(block: Block, c: u32) -> vec4<f32> {
    let rows = block.rows;
    return vec4(f32(rows[0][c]), f32(rows[1][c]), f32(rows[2][c]), f32(rows[3][c]));
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
    let at = place(lane);
    let k_end = min(params.k, (workgroup.z + 1u) * params.k_split);

    var sums: array<vec4<f32>, SUMS>;
    var half = 0u;
    var k0 = workgroup.z * params.k_split;
    if k0 < k_end {
        // unroll
        for (var s = 0u; s < STEPS; s++) {
            fetch(s, s * THREADS + lane, feature0, token0, k0);
            stash(s * THREADS + lane, next[s], half, k0);
        }
    }
    workgroupBarrier();
    while k0 < k_end {
        let k1 = k0 + TILE_K;
        if k1 < k_end {
            // unroll
            for (var s = 0u; s < STEPS; s++) {
                fetch(s, s * THREADS + lane, feature0, token0, k1);
            }
        }
        multiply(&sums, at, half);
        half = 1u - half;
        if k1 < k_end {
            // unroll
            for (var s = 0u; s < STEPS; s++) {
                stash(s * THREADS + lane, next[s], half, k1);
            }
        }
        workgroupBarrier();
        k0 = k1;
    }

    // unroll
    for (var v = 0u; v < TOKEN_QUADS; v++) {
        // unroll
        for (var j = 0u; j < 4u; j++) {
            let token = token0 + 4u * (v * THREADS_N + at.tn) + j;
            // unroll
            for (var f = 0u; f < THREAD_M; f++) {
                store(feature0 + at.tm * THREAD_M + f, token, workgroup.z, sums[f * TOKEN_QUADS + v][j]);
            }
        }
    }
}
