// Few tokens: weights are read once, and their bytes are the cost. The family's file says how the 32 k of a word are
// multiplied (`multiply_word`).
//
// Tile: a workgroup owns a panel of 32 features x TOKENS tokens. Lane l of 32 owns feature l, and each of the SLICES
// runs of 32 lanes takes every SLICES-th word (32 k) of the panel. A run reads 512 consecutive bytes of weights at a
// time, 16 per lane. No sum crosses the lanes of a run, so subgroup operations have nothing to do here: what is added
// up at the end are the slices, once.
//
// Workgroup memory: STAGE_K k of activations, k-major, all tokens of one k side by side (`stage_at`). In the dense
// kernel every lane of a run reads the same address; with 2:4 codes the lanes choose among the four k of a group, which
// lie in different banks. That is what lanes along features buy: with lanes along k a gather would read 32 different
// addresses. The sums of the slices take its place at the end.
//
// Occupancy, threads per core at least: rdna2 512, rdna3 512, rdna4 512, ampere 1024, ada 1024, apple-m1 1024, adreno
// 256. A thread holds its sums and 32 k of weights on their way, at most 32 words.

// Elements of a 16-byte unit of weights: 4 for f32, 8 for f16.
const UNIT: u32 = 4u;
// Units of 32 k: 32 / UNIT for dense weights, half of it for kept values.
const UNITS: u32 = 8u;
const TOKEN_VECS: u32 = 1u;
const SLICES: u32 = 8u;
const STAGE_K: u32 = 8192u;

const TOKENS: u32 = TOKEN_LANES * TOKEN_VECS;
const THREADS: u32 = 32u * SLICES;
// The longest run of slices that is registered needs this much for its sums.
const_assert STAGE_K >= THREADS && STAGE_K % (32u * SLICES) == 0u;

alias Quad = vec4<Storage>;

@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> bits: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<Quad>;

var<workgroup> stage: array<Tokens, STAGE_K * TOKEN_VECS>;

// Element e of a unit. An f16 keeps its value when widened.
fn value(unit: vec4<u32>, e: u32) -> f32 {
    if UNIT == 8u {
        return unpack2x16float(unit[e / 2u])[e % 2u];
    }
    return bitcast<f32>(unit[e % 4u]);
}

// Where the stage holds vector v of the tokens at k. Threads that fill the stage own four k each, so neighbours would
// write 64 or 128 bytes apart, into the same banks; the exclusive or with the number of the four spreads them. For k =
// local + i, with local a multiple of 32 and i below 32, it is local * TOKEN_VECS + stage_at(i, v).
fn stage_at(k: u32, v: u32) -> u32 {
    let q = k / 4u;
    if TOKEN_LANES == 1u {
        return k;
    }
    if TOKEN_VECS == 1u {
        return 4u * q + ((k % 4u) ^ (q / 2u % 4u));
    }
    return 8u * q + ((2u * (k % 4u) + v) ^ (q % 8u));
}

// Activations k0 .. k_end of the tokens, to the start of the stage.
fn load_stage(lane: u32, token0: u32, k0: u32, k_end: u32) {
    for (var q = lane; q < (k_end - k0) / 4u; q += THREADS) {
        // unroll
        for (var v = 0u; v < TOKEN_VECS; v++) {
            var rows: array<vec4<f32>, 4>;
            // unroll
            for (var j = 0u; j < TOKEN_LANES; j++) {
                let token = min(token0 + v * TOKEN_LANES + j, params.n - 1u);
                rows[j] = vec4<f32>(x[token * (params.k / 4u) + k0 / 4u + q]);
            }
            // unroll
            for (var c = 0u; c < 4u; c++) {
                stage[stage_at(4u * q + c, v)] = tokens_of(vec4(rows[0][c], rows[1][c], rows[2][c], rows[3][c]));
            }
        }
    }
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
    let token0 = tile.y * TOKENS;
    let row = lane % 32u;
    let slice = lane / 32u;
    let k_end = min(params.k, (workgroup.z + 1u) * params.k_split);

    var sums: array<Tokens, TOKEN_VECS>;
    var k0 = workgroup.z * params.k_split;
    while k0 < k_end {
        let k1 = min(k_end, k0 + STAGE_K);
        load_stage(lane, token0, k0, k1);
        workgroupBarrier();
        for (var k = k0 + 32u * slice; k < k1; k += 32u * SLICES) {
            multiply_word(&sums, tile.x, row, k, k - k0);
        }
        workgroupBarrier();
        k0 = k1;
    }

    // unroll
    for (var v = 0u; v < TOKEN_VECS; v++) {
        stage[lane * TOKEN_VECS + v] = sums[v];
    }
    workgroupBarrier();
    // 32 lanes of the first run for each vector of tokens.
    if slice < TOKEN_VECS {
        var total = Tokens();
        for (var s = 0u; s < SLICES; s++) {
            total += stage[(s * 32u + row) * TOKEN_VECS + slice];
        }
        store_tokens(tile.x * 32u + row, token0 + slice * TOKEN_LANES, workgroup.z, total);
    }
}
