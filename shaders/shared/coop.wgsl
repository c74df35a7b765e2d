// The k loop of the cooperative-matrix kernels. The family's file says how operands are stashed in workgroup memory
// (`fetch_word`, `stash_w`, `fetch_pattern`, `stash_x`), coop_native.wgsl how subgroups multiply.
//
// Tile: a workgroup owns TILE_M features x TILE_N tokens and walks k in steps of TILE_K; a subgroup of LANES lanes owns
// FRAGS_M x FRAGS_N blocks of EDGE x EDGE of it, their sums in registers: EDGE * EDGE / LANES registers per lane and
// block. EDGE and LANES are those of coop_native.wgsl, which comes first. Storage is f16, sums are f32. Dispatch grid,
// splits, order of tiles, edge tiles: shared/gemm.wgsl.
//
// Pipeline: a step's operands wait in registers; they are stashed in workgroup memory, the next step's are sent for,
// and the step is multiplied while those are on their way. With BUFFERS = 2 steps alternate between two halves of
// workgroup memory, and one barrier per step keeps the stashing of a step apart from the multiplying of the one two
// before; with 1, for tiles that would not fit twice, a second barrier follows the multiplying.
//
// Workgroup memory: both tiles are rows of DEPTH values along k, one row per feature, or per token and pattern, plus 16
// bytes. Places are counted in vec4s of f16; coop_quads.wgsl or coop_scalars.wgsl says how they are held.
// - A hardware load of 8 x 8 reads 16 bytes of each of eight consecutive rows. DEPTH is a multiple of 16, so a row is
//   an odd number of 16-byte units and those eight reads cover all 32 banks once.
// - Weights are stashed by runs of 32 lanes that hold one unit of 32 consecutive features, which is how a panel lies in
//   memory: 512 contiguous bytes read, and again eight consecutive rows per 128 bytes written. That holds if the
//   compiler makes one store of a unit's two halves; of 8 bytes each they take twice the passes.
// - Activations are read by the row: TILE_K / 8 neighbouring lanes read contiguous bytes of one token. The rows that
//   make up 128 written bytes are taken 8 / SPREAD apart, since neighbouring ones would overlap in the 16 bytes by
//   which a row is longer.
// - Sums leave through `stage`, f32, a block of EDGE tokens x EDGE features per subgroup, since a cooperative matrix
//   has no accessible elements. Rows are longer by 4: a lane of the usual register layout stores to tokens two apart,
//   whose banks then differ by 8, and neighbouring lanes to neighbouring features. Where rows of 16 are read back, 32
//   lanes meet in four of the banks, which takes two passes. The tiles' memory cannot serve: WGSL gives it one type.
// Bytes: 16 * (DEPTH / 8 + 1) * BUFFERS * (TILE_M + PATTERNS * TILE_N) + 4 * EDGE * (EDGE + 4) * THREADS / LANES.
//
// Predicted for subgroups of 32, blocks of 16, 128 x 128 x 32, 4 x 4 blocks, 4 subgroups, f16 dense: per step a
// subgroup issues 64 hardware multiply-adds (16 x 8 x 16, 2048 each), 16 loads of a fragment, 16 loads and 16 stores of
// 8 bytes or half as many of 16, about 60 integer instructions and a barrier: about 170 issue slots for 64 x 8 cycles
// of a tensor unit that does 256 multiply-adds per cycle. The fragments are 8 KiB per subgroup and step, so all four
// subgroups take 256 of those 512 cycles at 128 bytes per cycle. From the L2 cache come 16 KiB per step, 32
// bytes per cycle and SM at that rate, 17 at 540 multiply-adds per cycle. Registers: 128 for sums, 32 for operands on
// their way, 20 to 32 for fragments, so two workgroups of 128 per SM. Expected limits are those bytes and the latency
// that two subgroups per scheduler leave uncovered, not issue.
//
// Occupancy, threads per core at least: rdna3 256, rdna4 256, ampere 256, ada 256. That is one workgroup or two: a
// tile's sums and fragments leave room for no more.

const TILE_M: u32 = 128u;
const TILE_N: u32 = 128u;
const TILE_K: u32 = 32u;
// Values along k of a row of workgroup memory: TILE_K, or half of it where activations are gathered.
const DEPTH: u32 = 32u;
// k that a 16-byte unit of a weight panel spans: 8, or 16 for kept values.
const UNIT_K: u32 = 8u;
// Blocks of EDGE x EDGE per subgroup.
const FRAGS_M: u32 = 4u;
const FRAGS_N: u32 = 4u;
const SUMS: u32 = 16u;
// Multiply-adds along k per step.
const K_STEPS: u32 = 2u;
// 16-byte units of each operand that a thread brings per step.
const W_STEPS: u32 = 4u;
const X_STEPS: u32 = 4u;
// Halves of workgroup memory, 1 or 2.
const BUFFERS: u32 = 2u;
// Patterns that the tile's features have, a copy of the activations for each; patterns among a subgroup's features; and
// blocks of EDGE features that share one.
const PATTERNS: u32 = 1u;
const RUNS: u32 = 1u;
const RUN_FRAGS: u32 = 4u;

const SUBGROUP_M: u32 = EDGE * FRAGS_M;
const SUBGROUP_N: u32 = EDGE * FRAGS_N;
const SUBGROUPS_M: u32 = TILE_M / SUBGROUP_M;
const SUBGROUPS_N: u32 = TILE_N / SUBGROUP_N;
const THREADS: u32 = LANES * SUBGROUPS_M * SUBGROUPS_N;
const W_UNITS: u32 = TILE_K / UNIT_K;
const X_UNITS: u32 = TILE_K / 8u;
const PATTERN_M: u32 = TILE_M / PATTERNS;
// Rows that fill 128 bytes.
const SPREAD: u32 = max(64u / DEPTH, 1u);
// Lengths of rows, in vec4s and in f32s.
const STRIDE: u32 = DEPTH / 4u + 2u;
const STAGE_STRIDE: u32 = EDGE + 4u;
const STAGE_SIZE: u32 = EDGE * STAGE_STRIDE;

const_assert TILE_M % SUBGROUP_M == 0u && TILE_N % SUBGROUP_N == 0u && SUMS == FRAGS_M * FRAGS_N;
const_assert TILE_K == 32u && DEPTH == EDGE * K_STEPS && (DEPTH == TILE_K || 2u * DEPTH == TILE_K);
const_assert W_STEPS * THREADS == TILE_M * W_UNITS && X_STEPS * THREADS == TILE_N * X_UNITS;
const_assert RUNS * RUN_FRAGS == FRAGS_M && (BUFFERS == 1u || BUFFERS == 2u);
// A run must lie within one pattern, and differ from its neighbour's only where there are several.
const_assert PATTERN_M % (EDGE * RUN_FRAGS) == 0u && (RUNS == 1u || PATTERN_M == EDGE * RUN_FRAGS);
const_assert SPREAD <= 8u && THREADS % X_UNITS == 0u;

@group(0) @binding(1) var<storage, read> w: array<Quad>;
@group(0) @binding(2) var<storage, read> bits: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<Quad>;

var<workgroup> w_tile: array<Held, HELD * BUFFERS * TILE_M * STRIDE>;
var<workgroup> x_tile: array<Held, HELD * BUFFERS * PATTERNS * TILE_N * STRIDE>;
var<workgroup> stage: array<f32, THREADS / LANES * STAGE_SIZE>;

// Eight f16 along k on their way, and for weights the word of mask bits or codes that covers them.
struct Unit {
    low: Quad,
    high: Quad,
    word: u32,
}

// Words of 2:4 codes that the activations of a step are gathered by, one per pattern.
alias Words = array<u32, PATTERNS>;

// Where unit e of a tile belongs: the row, and the unit's number along k.
struct Cell {
    row: u32,
    unit: u32,
}

fn w_cell(e: u32) -> Cell {
    return Cell(e % TILE_M, e / TILE_M);
}

fn x_cell(e: u32) -> Cell {
    let row = e / X_UNITS;
    return Cell(row / 8u * 8u + row % SPREAD * (8u / SPREAD) + row % 8u / SPREAD, e % X_UNITS);
}

fn fetch_w(cell: Cell, feature0: u32, k0: u32) -> Unit {
    let k = k0 + cell.unit * UNIT_K;
    let feature = feature0 + cell.row;
    let panel = min(feature / 32u, (params.m - 1u) / 32u);
    let at = 2u * ((panel * (params.k / UNIT_K) + k / UNIT_K) * 32u + feature % 32u);
    return Unit(w[at], w[at + 1u], fetch_word(feature, k));
}

fn fetch_x(cell: Cell, token0: u32, k0: u32) -> Unit {
    let k = k0 + cell.unit * 8u;
    let at = min(token0 + cell.row, params.n - 1u) * (params.k / 4u) + k / 4u;
    return Unit(x[at], x[at + 1u], 0u);
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
    // The subgroup's place in the tile.
    let subgroup = lane / LANES;
    let sub_m = subgroup % SUBGROUPS_M * SUBGROUP_M;
    let sub_n = subgroup / SUBGROUPS_M * SUBGROUP_N;
    let k_end = min(params.k, (workgroup.z + 1u) * params.k_split);

    var sums: array<Sum, SUMS>;
    var next_w: array<Unit, W_STEPS>;
    var next_x: array<Unit, X_STEPS>;
    var words: Words;
    var half = 0u;
    var k0 = workgroup.z * params.k_split;
    if k0 < k_end {
        // unroll
        for (var p = 0u; p < PATTERNS; p++) {
            words[p] = fetch_pattern(p, lane, feature0, k0);
        }
        // unroll
        for (var s = 0u; s < W_STEPS; s++) {
            next_w[s] = fetch_w(w_cell(s * THREADS + lane), feature0, k0);
        }
        // unroll
        for (var s = 0u; s < X_STEPS; s++) {
            next_x[s] = fetch_x(x_cell(s * THREADS + lane), token0, k0);
        }
    }
    while k0 < k_end {
        // unroll
        for (var s = 0u; s < W_STEPS; s++) {
            stash_w(w_cell(s * THREADS + lane), next_w[s], half);
        }
        // unroll
        for (var s = 0u; s < X_STEPS; s++) {
            stash_x(x_cell(s * THREADS + lane), next_x[s], words, half);
        }
        workgroupBarrier();
        k0 += TILE_K;
        if k0 < k_end {
            // unroll
            for (var p = 0u; p < PATTERNS; p++) {
                words[p] = fetch_pattern(p, lane, feature0, k0);
            }
            // unroll
            for (var s = 0u; s < W_STEPS; s++) {
                next_w[s] = fetch_w(w_cell(s * THREADS + lane), feature0, k0);
            }
            // unroll
            for (var s = 0u; s < X_STEPS; s++) {
                next_x[s] = fetch_x(x_cell(s * THREADS + lane), token0, k0);
            }
        }

        let w_row = half * TILE_M + sub_m;
        // unroll
        for (var kk = 0u; kk < K_STEPS; kk++) {
            // unroll
            for (var r = 0u; r < RUNS; r++) {
                let pattern = (sub_m + EDGE * RUN_FRAGS * r) / PATTERN_M;
                let x_row = (half * PATTERNS + pattern) * TILE_N + sub_n;
                var b: array<FragmentB, FRAGS_N>;
                // unroll
                for (var j = 0u; j < FRAGS_N; j++) {
                    b[j] = load_b((x_row + EDGE * j) * STRIDE + EDGE / 4u * kk, lane);
                }
                // unroll
                for (var i = 0u; i < RUN_FRAGS; i++) {
                    let a = load_a((w_row + EDGE * (r * RUN_FRAGS + i)) * STRIDE + EDGE / 4u * kk, lane);
                    // unroll
                    for (var j = 0u; j < FRAGS_N; j++) {
                        sums[(r * RUN_FRAGS + i) * FRAGS_N + j] =
                            multiply_add(a, b[j], sums[(r * RUN_FRAGS + i) * FRAGS_N + j]);
                    }
                }
            }
        }

        if BUFFERS == 2u {
            half = 1u - half;
        } else {
            workgroupBarrier();
        }
    }

    // Lanes run along what is contiguous in memory: features of Y, tokens of C.
    let stage0 = subgroup * STAGE_SIZE;
    // unroll
    for (var j = 0u; j < FRAGS_N; j++) {
        // unroll
        for (var i = 0u; i < FRAGS_M; i++) {
            stage_sum(sums[i * FRAGS_N + j], stage0, lane);
            workgroupBarrier();
            for (var e = lane % LANES; e < EDGE * EDGE; e += LANES) {
                let f = select(e / EDGE, e % EDGE, LINEAR);
                let t = select(e % EDGE, e / EDGE, LINEAR);
                let feature = feature0 + sub_m + EDGE * i + f;
                store(feature, token0 + sub_n + EDGE * j + t, workgroup.z, stage[stage0 + t * STAGE_STRIDE + f]);
            }
            workgroupBarrier();
        }
    }
}
