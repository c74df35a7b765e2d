// The gradient of attention with respect to its queries, and what the other two programs need of it. Twin: `grad` of
// src/reference/attention.rs. With P = softmax(Q Kt * scale + bias) and dP = dY Vt: dS = P (dP - D), D of a query the product
// of its rows of dY and Y, and dQ = scale * dS K.
//
// Tile: a workgroup owns 32 queries of a head and DEPTH features of their gradient, and walks the keys by 32, twice: first
// for the softmax's maximum and sum, then for dS. Heads of more than DEPTH features are cut: each piece has a workgroup of
// its own, which computes the scores anew. Threads and tiles: shared/attention_grad.wgsl.
//
// Dispatch grid: pieces of queries, of the head's features, heads and sequences, in this order from the inside, over x and
// y.
//
// It also writes for each query the maximum, 1 / sum and D to `statistics`, a vec4 each, head by head; and with BIAS_GRAD,
// for each workgroup a row of `sums`: dS summed over the pairs of each distance. Distance key - query = d is at d + 31 +
// first query of the workgroup; a row has seq rounded up to whole steps and 32 more, and zeros where there is no pair. A
// thread sums one diagonal of a step; those that the next step shares wait in `carry`.
//
// Workgroup memory: 12 KiB of tiles, and 128 bytes.
//
// Occupancy, threads per core at least: rdna2 256, rdna3 256, rdna4 256, ampere 384, ada 256, apple-m1 128, adreno 64.
//
// Residues: rows and features past the end are read as zeros. A key that a query does not see has the weight zero, by
// selection; so keys of padding contribute nothing whatever they hold.

// Features of a head.
override HEAD_DIM: u32 = 64u;
// Whether the sums for the bias are wanted.
override BIAS_GRAD: bool = false;

@group(0) @binding(6) var<storage, read> attended: array<f32>;
@group(0) @binding(7) var<storage, read_write> statistics: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> sums: array<f32>;

var<workgroup> carry: array<f32, 32>;

// Whether each of the four queries from `query` on sees a key.
fn sees(place: Place, query: u32, key: u32) -> vec4<bool> {
    let real = vec4(key < place.length);
    if !CAUSAL {
        return real;
    }
    return real & (vec4(key) <= vec4(query) + vec4(0u, 1u, 2u, 3u));
}

// Scores of a thread's four queries with its four keys.
fn scores_of(place: Place, query: u32, key0: u32, lane: u32) -> array<vec4<f32>, 4> {
    var scores = products(place, OF_Q, place.query0, OF_K, key0, lane);
    // unroll
    for (var j = 0u; j < 4u; j++) {
        scores[j] *= params.scale;
        if BIASED {
            // unroll
            for (var i = 0u; i < 4u; i++) {
                scores[j][i] += bias_of(place, query + i, key0 + lane / QUADS * 4u + j);
            }
        }
    }
    return scores;
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
    let row = lane % QUADS;
    let quad = lane / QUADS;
    let query = place.query0 + 4u * row;

    // D: each thread has some features of its queries.
    var part = vec4<f32>();
    for (var feature = 4u * quad; feature < HEAD_DIM; feature += PIECE) {
        // unroll
        for (var i = 0u; i < 4u; i++) {
            let four = dy4(place, query + i, feature);
            if query + i < place.length {
                let start = (place.row0 + query + i) * params.width + place.head0 + feature;
                // unroll
                for (var c = 0u; c < 4u; c++) {
                    if feature + c < HEAD_DIM {
                        part[i] += four[c] * attended[start + c];
                    }
                }
            }
        }
    }
    weight_tile[lane] = part;
    workgroupBarrier();
    var d = vec4<f32>();
    for (var q = 0u; q < QUADS; q++) {
        d += weight_tile[q * QUADS + row];
    }

    var maximum = vec4(LOWEST);
    var total = vec4<f32>();
    for (var key0 = 0u; key0 < place.keys; key0 += OTHERS) {
        var scores = scores_of(place, query, key0, lane);
        // unroll
        for (var j = 0u; j < 4u; j++) {
            let key = 4u * quad + j;
            weight_tile[key * QUADS + row] = select(vec4(LOWEST), scores[j], sees(place, query, key0 + key));
        }
        workgroupBarrier();
        var highest = maximum;
        for (var key = 0u; key < OTHERS; key++) {
            highest = max(highest, weight_tile[key * QUADS + row]);
        }
        total *= exp(maximum - highest);
        for (var key = 0u; key < OTHERS; key++) {
            let weight = exp(weight_tile[key * QUADS + row] - highest);
            total += select(vec4<f32>(), weight, sees(place, query, key0 + key));
        }
        maximum = highest;
    }
    let inverse = 1.0 / total;
    if place.feature0 == 0u && quad == 0u {
        // unroll
        for (var i = 0u; i < 4u; i++) {
            if query + i < place.length {
                statistics[statistics_at(place, params.heads, query + i)] = vec4(maximum[i], inverse[i], d[i], 0.0);
            }
        }
    }

    let pieces = (params.seq + QUERIES - 1u) / QUERIES;
    let columns = pieces * QUERIES + OTHERS;
    let sums0 = (place.row0 / params.seq * params.heads + place.head) * pieces + place.query0 / QUERIES;
    var dq: array<vec4<f32>, SUMS>;
    for (var key0 = 0u; key0 < place.keys; key0 += OTHERS) {
        var scores = scores_of(place, query, key0, lane);
        var dp = products(place, OF_DY, place.query0, OF_V, key0, lane);
        // unroll
        for (var j = 0u; j < 4u; j++) {
            let key = 4u * quad + j;
            let ds = exp(scores[j] - maximum) * inverse * (dp[j] - d);
            weight_tile[key * QUADS + row] = select(vec4<f32>(), ds, sees(place, query, key0 + key));
        }
        if BIAS_GRAD && place.feature0 == 0u {
            workgroupBarrier();
            // The diagonal of distance lane - 31 in this step.
            var sum = 0.0;
            for (var q = 0u; q < QUERIES; q++) {
                let key = q + lane - 31u;
                if key < OTHERS {
                    sum += weight_tile[key * QUADS + q / 4u][q % 4u];
                }
            }
            if lane < 32u {
                sums[sums0 * columns + key0 + lane] = sum + select(0.0, carry[lane], key0 > 0u);
            }
            workgroupBarrier();
            if lane >= 32u {
                carry[lane - 32u] = sum;
            }
        }
        accumulate(&dq, place, OF_K, key0, lane);
    }
    if BIAS_GRAD && place.feature0 == 0u {
        workgroupBarrier();
        let end = (place.keys + OTHERS - 1u) / OTHERS * OTHERS;
        for (var at = end + lane; at < columns; at += THREADS) {
            sums[sums0 * columns + at] = select(0.0, carry[(at - end) % 32u], place.keys > 0u && at - end < 32u);
        }
    }
    put(&dq, place, query, place.head0, params.scale, lane);
}
