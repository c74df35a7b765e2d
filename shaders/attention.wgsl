// Attention of one sequence and head: Y = softmax(Q Kt * scale + bias) V over the real tokens of the sequence. Twin:
// src/reference/attention.rs.
//
// X has a row of Q | K | V per token, `width` features of Q and as many over SHARE of K and of V, HEAD_DIM of them to a
// head. Keys at or past the sequence's length contribute nothing, whatever they hold; rows of queries there become
// zeros. CAUSAL: keys behind a query have the weight zero, and steps in which all are behind all queries are left out.
//
// Tile: a workgroup owns QUERIES queries and DEPTH features of a head's output and walks the keys by KEYS. The softmax
// is computed on the way (M. Milakov, N. Gimelshein 2018, arXiv:1805.02867): what was summed so far is multiplied by
// exp(old maximum - new maximum) whenever the maximum grows, so that scores exist for one step only and no scratch is
// needed, however long the sequence. Heads of more than DEPTH features are cut: scores are summed over pieces of DEPTH,
// and each piece of the output has a workgroup of its own, which computes the scores anew.
//
// Threads: 8 along keys and features, QUERIES / 4 along queries. For the scores a thread owns 4 queries x 4 keys, for
// the output the same 4 queries and DEPTH / 8 features: per feature of a score two vec4s are read for 16 multiply-adds,
// per key of the output 1 + DEPTH / 32 vec4s for DEPTH / 2. Neighbouring threads own neighbouring queries: what they
// read of keys and values is the same address.
//
// Dispatch grid: pieces of queries, of the head's features, heads and sequences, in this order from the inside, over x
// and y. Workgroups that share keys and values are neighbours.
//
// Workgroup memory, bytes 4 * (QUERIES * DEPTH + KEYS * DEPTH + KEYS * QUERIES):
// - `q_tile`, feature-major, a vec4 of four queries; scaled.
// - `kv_tile`, keys feature-major like the queries, then values key-major, a vec4 of four features.
// - `p_tile`, key-major, a vec4 of four queries: the raw scores, of which every thread finds its queries' maxima, and
//   then their exponentials, of which every thread adds up its queries' sums along with the products. Both are computed
//   eight times over, for 1/8 of the step's instructions and without anything to pass around.
//
// Occupancy, threads per core at least: rdna2 256, rdna3 256, rdna4 256, ampere 768, ada 768, apple-m1 384, adreno 128.
// Of a tile's registers 4 * SUMS are sums and 16 scores; the rest are addresses and what is on its way.
//
// Residues: rows and features past the end are read as zeros. A key that a query does not see gets the lowest score
// there is for the maximum and the weight zero; every query sees the first key, so no maximum stays the lowest.

// Features of a head.
override HEAD_DIM: u32 = 64u;

const QUERIES: u32 = 64u;
const DEPTH: u32 = 64u;
// Fours of features that a thread owns of the output.
const COLUMN_QUADS: u32 = 2u;
// 4 * COLUMN_QUADS.
const SUMS: u32 = 8u;
// Blocks of 4 x 4 that a thread brings of the queries and of the keys, and fours of values, at most.
const Q_STEPS: u32 = 2u;
const K_STEPS: u32 = 1u;
const V_STEPS: u32 = 4u;

const KEYS: u32 = 32u;
const QUERY_QUADS: u32 = QUERIES / 4u;
const KEY_QUADS: u32 = KEYS / 4u;
const DEPTH_QUADS: u32 = DEPTH / 4u;
const THREADS: u32 = QUERY_QUADS * KEY_QUADS;

const_assert COLUMN_QUADS * 32u == DEPTH && SUMS == 4u * COLUMN_QUADS && QUERIES % 4u == 0u;
const_assert Q_STEPS * THREADS >= QUERY_QUADS * DEPTH_QUADS && K_STEPS * THREADS >= KEY_QUADS * DEPTH_QUADS;
const_assert V_STEPS * THREADS >= KEYS * DEPTH_QUADS;

var<workgroup> q_tile: array<vec4<f32>, DEPTH * QUERY_QUADS>;
var<workgroup> kv_tile: array<vec4<f32>, DEPTH * KEY_QUADS>;
var<workgroup> p_tile: array<vec4<f32>, KEYS * QUERY_QUADS>;

// The same for four tokens, turned: a vec4 of tokens for each feature.
fn fetch_turned(place: Place, token: u32, part: u32, feature: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        fetch(place, token, part, feature),
        fetch(place, token + 1u, part, feature),
        fetch(place, token + 2u, part, feature),
        fetch(place, token + 3u, part, feature),
    ));
}

// Whether each of the four queries from `query` on sees a key.
fn sees(place: Place, query: u32, key: u32) -> vec4<bool> {
    let real = vec4(key < place.length);
    if !CAUSAL {
        return real;
    }
    return real & (vec4(key) <= vec4(query) + vec4(0u, 1u, 2u, 3u));
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
    let pieces_d = (HEAD_DIM + DEPTH - 1u) / DEPTH;

    let tq = lane % QUERY_QUADS;
    let tk = lane / QUERY_QUADS;
    var sums: array<vec4<f32>, SUMS>;
    var maximum = vec4(LOWEST);
    var total = vec4<f32>();
    for (var key0 = 0u; key0 < place.keys; key0 += KEYS) {
        var scores: array<vec4<f32>, 4>;
        for (var piece = 0u; piece < pieces_d; piece++) {
            workgroupBarrier();
            if pieces_d > 1u || key0 == 0u {
                // unroll
                for (var s = 0u; s < Q_STEPS; s++) {
                    let e = s * THREADS + lane;
                    let f = e / QUERY_QUADS * 4u;
                    if f < DEPTH {
                        let four = fetch_turned(place, query0 + e % QUERY_QUADS * 4u, 0u, piece * DEPTH + f);
                        // unroll
                        for (var c = 0u; c < 4u; c++) {
                            q_tile[(f + c) * QUERY_QUADS + e % QUERY_QUADS] = four[c] * params.scale;
                        }
                    }
                }
            }
            // unroll
            for (var s = 0u; s < K_STEPS; s++) {
                let e = s * THREADS + lane;
                let f = e / KEY_QUADS * 4u;
                if f < DEPTH {
                    let four = fetch_turned(place, key0 + e % KEY_QUADS * 4u, 1u, piece * DEPTH + f);
                    // unroll
                    for (var c = 0u; c < 4u; c++) {
                        kv_tile[(f + c) * KEY_QUADS + e % KEY_QUADS] = four[c];
                    }
                }
            }
            workgroupBarrier();
            for (var q = 0u; q < DEPTH_QUADS; q++) {
                // unroll
                for (var c = 0u; c < 4u; c++) {
                    let queries = q_tile[(4u * q + c) * QUERY_QUADS + tq];
                    let four = kv_tile[(4u * q + c) * KEY_QUADS + tk];
                    // unroll
                    for (var j = 0u; j < 4u; j++) {
                        scores[j] += four[j] * queries;
                    }
                }
            }
        }
        // unroll
        for (var j = 0u; j < 4u; j++) {
            let key = 4u * tk + j;
            if BIASED {
                // unroll
                for (var i = 0u; i < 4u; i++) {
                    scores[j][i] += bias_of(place, query0 + 4u * tq + i, key0 + key);
                }
            }
            p_tile[key * QUERY_QUADS + tq] = select(vec4(LOWEST), scores[j], sees(place, query0 + 4u * tq, key0 + key));
        }
        workgroupBarrier();

        // Scores are complete, and the keys are done with.
        var highest = maximum;
        for (var key = 0u; key < KEYS; key++) {
            highest = max(highest, p_tile[key * QUERY_QUADS + tq]);
        }
        // unroll
        for (var s = 0u; s < V_STEPS; s++) {
            let e = s * THREADS + lane;
            if e < KEYS * DEPTH_QUADS {
                kv_tile[e] = fetch(place, key0 + e / DEPTH_QUADS, 2u, place.feature0 + e % DEPTH_QUADS * 4u);
            }
        }
        workgroupBarrier();
        // unroll
        for (var j = 0u; j < 4u; j++) {
            let key = 4u * tk + j;
            let at = key * QUERY_QUADS + tq;
            // Read back, so that no register holds a score while the values are on their way.
            let weight = exp(p_tile[at] - highest);
            p_tile[at] = select(vec4<f32>(), weight, sees(place, query0 + 4u * tq, key0 + key));
        }
        let shrink = exp(maximum - highest);
        maximum = highest;
        total *= shrink;
        // unroll
        for (var i = 0u; i < 4u; i++) {
            // unroll
            for (var u = 0u; u < COLUMN_QUADS; u++) {
                sums[i * COLUMN_QUADS + u] *= shrink[i];
            }
        }
        workgroupBarrier();
        for (var key = 0u; key < KEYS; key++) {
            let weights = p_tile[key * QUERY_QUADS + tq];
            total += weights;
            // unroll
            for (var u = 0u; u < COLUMN_QUADS; u++) {
                let values = kv_tile[key * DEPTH_QUADS + u * KEY_QUADS + tk];
                // unroll
                for (var i = 0u; i < 4u; i++) {
                    sums[i * COLUMN_QUADS + u] += weights[i] * values;
                }
            }
        }
    }

    // unroll
    for (var i = 0u; i < 4u; i++) {
        let query = query0 + 4u * tq + i;
        if query < params.seq {
            let start = (place.row0 + query) * params.width + place.head0;
            // unroll
            for (var u = 0u; u < COLUMN_QUADS; u++) {
                let value = sums[i * COLUMN_QUADS + u] / total[i];
                let feature = place.feature0 + (u * KEY_QUADS + tk) * 4u;
                store4(start, feature, HEAD_DIM, select(vec4<f32>(), value, query < place.length));
            }
        }
    }
}
