// Attention of one sequence and head on cooperative matrices, for f16 and heads of DEPTH features. What is computed,
// operands, padding and dispatch grid are as in attention.wgsl. Twin: src/reference/attention.rs, with weights
// that are rounded to f16. coop_native.wgsl says how subgroups multiply.
//
// Tile: a workgroup owns QUERIES queries of one head, a subgroup of LANES lanes EDGE of them; keys go by KEYS. A
// cooperative matrix has no accessible elements, so sums cannot be multiplied when a maximum grows: the keys are walked
// twice. The first time finds each query's maximum and the sum of its exponentials, the second computes the scores
// again, rounds the weights to f16 and multiplies them with the values. Half again as many multiply-adds as scores and
// values take, of a unit that is several times as fast as plain ones.
//
// Scores leave through `stage`, EDGE queries x SPAN = 16 keys of each subgroup at a time, one block of EDGE x EDGE or
// two: SHARERS = LANES / EDGE lanes share a query, and each has LANE_QUADS fours of its keys. They meet once, at the end
// of the first walk. Weights are scaled by 2^12, so that those that f16 flushes are below 2^-26 of the largest; sums are
// f32.
//
// Workgroup memory: rows of DEPTH f16 and 16 bytes, an odd number of 16-byte units (see shared/coop.wgsl).
// - `w_tile`: KEYS rows of keys, then DEPTH rows of values, turned, KEYS of them to a row. KEYS is DEPTH, for rows of
//   one length.
// - `x_tile`: QUERIES rows of queries, then as many of weights, KEYS to a row.
// - `stage`: a block of EDGE x 20 f32 per subgroup.
// Bytes: 16 * (DEPTH / 4 + 2) * (DEPTH + QUERIES) + 80 * QUERIES.
//
// Occupancy, threads per core at least: rdna3 256, rdna4 256, ampere 256, ada 256.
//
// Residues: as in attention.wgsl; a key that is not seen has the weight zero, and past the length its values are read
// as zeros.

// Features of a head: DEPTH.
override HEAD_DIM: u32 = 64u;

const QUERIES: u32 = 64u;
const DEPTH: u32 = 64u;
// Blocks of EDGE in DEPTH and in SPAN, and spans in DEPTH.
const BLOCKS: u32 = 4u;
const SPAN_BLOCKS: u32 = 1u;
const SPANS: u32 = 4u;
// Fours of keys that a lane has of a span, and lanes that share a query.
const LANE_QUADS: u32 = 2u;
const SHARERS: u32 = 2u;
// Fours of queries and of keys, and blocks of 4 x 4 values, that a thread brings, at most.
const Q_STEPS: u32 = 8u;
const K_STEPS: u32 = 8u;
const V_STEPS: u32 = 2u;

const KEYS: u32 = DEPTH;
const SPAN: u32 = 16u;
const THREADS: u32 = LANES * (QUERIES / EDGE);
const QUADS: u32 = DEPTH / 4u;
const STRIDE: u32 = QUADS + 2u;
const STAGE_STRIDE: u32 = SPAN + 4u;
const STAGE_SIZE: u32 = EDGE * STAGE_STRIDE;
const WEIGHT_SCALE: f32 = 4096.0;

const_assert EDGE * BLOCKS == DEPTH && EDGE * SPAN_BLOCKS == SPAN && SPAN * SPANS == DEPTH;
const_assert EDGE * SHARERS == LANES && 4u * LANE_QUADS * SHARERS == SPAN;
const_assert K_STEPS * THREADS >= KEYS * QUADS && V_STEPS * THREADS >= QUADS * QUADS;
const_assert Q_STEPS * THREADS >= QUERIES * QUADS;

var<workgroup> w_tile: array<Held, HELD * 2u * KEYS * STRIDE>;
var<workgroup> x_tile: array<Held, HELD * 2u * QUERIES * STRIDE>;
var<workgroup> stage: array<f32, QUERIES / EDGE * STAGE_SIZE>;

fn bring_keys(place: Place, key0: u32, lane: u32) {
    // unroll
    for (var s = 0u; s < K_STEPS; s++) {
        let e = s * THREADS + lane;
        if e < KEYS * QUADS {
            hold_w(e / QUADS * STRIDE + e % QUADS, Quad(fetch(place, key0 + e / QUADS, 1u, e % QUADS * 4u)));
        }
    }
}

fn bring_values(place: Place, key0: u32, lane: u32) {
    // unroll
    for (var s = 0u; s < V_STEPS; s++) {
        let e = s * THREADS + lane;
        let key = e % QUADS * 4u;
        let feature = e / QUADS * 4u;
        if e < QUADS * QUADS {
            let four = transpose(mat4x4<f32>(
                fetch(place, key0 + key, 2u, feature),
                fetch(place, key0 + key + 1u, 2u, feature),
                fetch(place, key0 + key + 2u, 2u, feature),
                fetch(place, key0 + key + 3u, 2u, feature),
            ));
            // unroll
            for (var c = 0u; c < 4u; c++) {
                hold_w((KEYS + feature + c) * STRIDE + key / 4u, Quad(four[c]));
            }
        }
    }
}

// Brings the scores of the subgroup's queries and one span of keys to its stage.
fn stage_scores(span: u32, subgroup: u32, lane: u32) {
    var scores: array<Sum, SPAN_BLOCKS>;
    // unroll
    for (var kk = 0u; kk < BLOCKS; kk++) {
        let b = load_b(EDGE * subgroup * STRIDE + EDGE / 4u * kk, lane);
        // unroll
        for (var i = 0u; i < SPAN_BLOCKS; i++) {
            let a = load_a((SPAN * span + EDGE * i) * STRIDE + EDGE / 4u * kk, lane);
            scores[i] = multiply_add(a, b, scores[i]);
        }
    }
    // unroll
    for (var i = 0u; i < SPAN_BLOCKS; i++) {
        stage_sum(scores[i], subgroup * STAGE_SIZE + EDGE * i, lane);
    }
}

// Four of a lane's staged scores: those of its query with `key` and the next three keys of the sequence. For those that
// it does not see the lowest there is, whose exponential is zero beside any score.
fn scores_at(place: Place, at: u32, query: u32, key: u32) -> vec4<f32> {
    var four = vec4(stage[at], stage[at + 1u], stage[at + 2u], stage[at + 3u]) * params.scale;
    if BIASED {
        // unroll
        for (var i = 0u; i < 4u; i++) {
            four[i] += bias_of(place, query, key + i);
        }
    }
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u);
    var seen = keys < vec4(place.length);
    if CAUSAL {
        seen = seen & (keys <= vec4(query));
    }
    return select(vec4(LOWEST), four, seen);
}

fn highest_of(v: vec4<f32>) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

fn sum_of(v: vec4<f32>) -> f32 {
    return v.x + v.y + v.z + v.w;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let place = place_of(workgroup, grid);
    if !place.there {
        return;
    }
    let query0 = place.query0;

    let subgroup = lane / LANES;
    // The lane's query among the subgroup's EDGE, and its first key or feature of each span.
    let row = lane % EDGE;
    let part = lane / EDGE % SHARERS * 4u * LANE_QUADS;
    let staged = subgroup * STAGE_SIZE + row * STAGE_STRIDE + part;
    let query = query0 + EDGE * subgroup + row;

    // unroll
    for (var s = 0u; s < Q_STEPS; s++) {
        let e = s * THREADS + lane;
        if e < QUERIES * QUADS {
            hold_x(e / QUADS * STRIDE + e % QUADS, Quad(fetch(place, query0 + e / QUADS, 0u, e % QUADS * 4u)));
        }
    }

    var maximum = LOWEST;
    var total = 0.0;
    var scores: array<vec4<f32>, LANE_QUADS>;
    for (var key0 = 0u; key0 < place.keys; key0 += KEYS) {
        workgroupBarrier();
        bring_keys(place, key0, lane);
        workgroupBarrier();
        for (var span = 0u; span < SPANS; span++) {
            stage_scores(span, subgroup, lane);
            workgroupBarrier();
            var highest = maximum;
            // unroll
            for (var q = 0u; q < LANE_QUADS; q++) {
                scores[q] = scores_at(place, staged + 4u * q, query, key0 + SPAN * span + part + 4u * q);
                highest = max(highest, highest_of(scores[q]));
            }
            total *= exp(maximum - highest);
            // unroll
            for (var q = 0u; q < LANE_QUADS; q++) {
                total += sum_of(exp(scores[q] - highest));
            }
            maximum = highest;
            workgroupBarrier();
        }
    }
    // The lanes of a query.
    let own = subgroup * STAGE_SIZE + lane % LANES * 2u;
    stage[own] = maximum;
    stage[own + 1u] = total;
    workgroupBarrier();
    let first = subgroup * STAGE_SIZE + row * 2u;
    var highest = LOWEST;
    // unroll
    for (var s = 0u; s < SHARERS; s++) {
        highest = max(highest, stage[first + 2u * EDGE * s]);
    }
    total = 0.0;
    // unroll
    for (var s = 0u; s < SHARERS; s++) {
        total += stage[first + 2u * EDGE * s + 1u] * exp(stage[first + 2u * EDGE * s] - highest);
    }

    var sums: array<Sum, BLOCKS>;
    for (var key0 = 0u; key0 < place.keys; key0 += KEYS) {
        workgroupBarrier();
        bring_keys(place, key0, lane);
        bring_values(place, key0, lane);
        workgroupBarrier();
        for (var span = 0u; span < SPANS; span++) {
            stage_scores(span, subgroup, lane);
            workgroupBarrier();
            let at = (QUERIES + EDGE * subgroup + row) * STRIDE + (SPAN * span + part) / 4u;
            // unroll
            for (var q = 0u; q < LANE_QUADS; q++) {
                let four = scores_at(place, staged + 4u * q, query, key0 + SPAN * span + part + 4u * q);
                hold_x(at + q, Quad(exp(four - highest) * WEIGHT_SCALE));
            }
            workgroupBarrier();
        }
        // unroll
        for (var kk = 0u; kk < BLOCKS; kk++) {
            let b = load_b((QUERIES + EDGE * subgroup) * STRIDE + EDGE / 4u * kk, lane);
            // unroll
            for (var d = 0u; d < BLOCKS; d++) {
                let a = load_a((KEYS + EDGE * d) * STRIDE + EDGE / 4u * kk, lane);
                sums[d] = multiply_add(a, b, sums[d]);
            }
        }
    }

    let start = (place.row0 + query) * params.width + place.head0;
    let factor = 1.0 / (WEIGHT_SCALE * total);
    // unroll
    for (var d = 0u; d < SPANS; d++) {
        workgroupBarrier();
        // unroll
        for (var i = 0u; i < SPAN_BLOCKS; i++) {
            stage_sum(sums[d * SPAN_BLOCKS + i], subgroup * STAGE_SIZE + EDGE * i, lane);
        }
        workgroupBarrier();
        if query < params.seq {
            // unroll
            for (var q = 0u; q < LANE_QUADS; q++) {
                let at = staged + 4u * q;
                let value = vec4(stage[at], stage[at + 1u], stage[at + 2u], stage[at + 3u]) * factor;
                store4(start, SPAN * d + part + 4u * q, HEAD_DIM, select(vec4<f32>(), value, query < place.length));
            }
        }
    }
}
