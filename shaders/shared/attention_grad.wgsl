// What the two large programs of attention's gradient share: tiles of 32 rows, products of rows with rows, and sums of
// rows. attention_grad_q.wgsl or attention_grad_kv.wgsl follows, shared/attention.wgsl comes before. `x` is Q | K | V of
// each token, `y` their gradients. A workgroup owns 32 rows, queries or keys, and walks 32 others at a time.
//
// Threads: 8 along the others and along features, 8 along the rows that are owned. Of products a thread has 4 owned rows x
// 4 others, of sums the same 4 owned rows x 4 features of each piece.

// Whether gradients are added to what is there.
override ADD: bool = false;

const QUERIES: u32 = 32u;
// Features of a gradient that a workgroup owns, in pieces of 32.
const DEPTH: u32 = 64u;
const PIECES: u32 = 2u;
const PIECE: u32 = 32u;
// 4 * PIECES.
const SUMS: u32 = 8u;
const OTHERS: u32 = 32u;
// Fours of rows, of others and of features of a piece.
const QUADS: u32 = 8u;
const THREADS: u32 = 64u;

// What rows are of.
const OF_Q: u32 = 0u;
const OF_K: u32 = 1u;
const OF_V: u32 = 2u;
const OF_DY: u32 = 3u;

@group(0) @binding(5) var<storage, read> dy: array<f32>;

// Of one piece of the features, feature-major: a vec4 of four owned rows, and of four others; or of the others row-major,
// a vec4 of four features.
var<workgroup> own_tile: array<vec4<f32>, PIECE * QUADS>;
var<workgroup> other_tile: array<vec4<f32>, OTHERS * QUADS>;
// For each of the others a vec4 of what four owned rows have of it.
var<workgroup> weight_tile: array<vec4<f32>, OTHERS * QUADS>;

// Four features of dY or, from another tensor of its shape, of the same token and head.
fn dy4(place: Place, token: u32, feature: u32) -> vec4<f32> {
    var four = vec4<f32>();
    if token < place.length {
        let start = (place.row0 + token) * params.width + place.head0 + feature;
        // unroll
        for (var i = 0u; i < 4u; i++) {
            if feature + i < HEAD_DIM {
                four[i] = dy[start + i];
            }
        }
    }
    return four;
}

// Four features of a token's row of Q, K, V or dY; zeros past the sequence and the head.
fn four_of(place: Place, kind: u32, token: u32, feature: u32) -> vec4<f32> {
    if kind == OF_DY {
        return dy4(place, token, feature);
    }
    return fetch(place, token, kind, feature);
}

// The same for four tokens, turned: a vec4 of tokens for each feature.
fn turned(place: Place, kind: u32, token: u32, feature: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        four_of(place, kind, token, feature),
        four_of(place, kind, token + 1u, feature),
        four_of(place, kind, token + 2u, feature),
        four_of(place, kind, token + 3u, feature),
    ));
}

// Products of rows from `own0` on with others from `other0` on: for each of a thread's four others a vec4 of its four rows.
// Begins with a barrier, before which nobody may still read the tiles' last content.
fn products(place: Place, own: u32, own0: u32, other: u32, other0: u32, lane: u32) -> array<vec4<f32>, 4> {
    let row = lane % QUADS;
    let quad = lane / QUADS;
    var sums: array<vec4<f32>, 4>;
    for (var feature = 0u; feature < HEAD_DIM; feature += PIECE) {
        workgroupBarrier();
        let a = turned(place, own, own0 + 4u * row, feature + 4u * quad);
        let b = turned(place, other, other0 + 4u * row, feature + 4u * quad);
        // unroll
        for (var c = 0u; c < 4u; c++) {
            own_tile[(4u * quad + c) * QUADS + row] = a[c];
            other_tile[(4u * quad + c) * QUADS + row] = b[c];
        }
        workgroupBarrier();
        for (var f = 0u; f < PIECE; f++) {
            let rows = own_tile[f * QUADS + row];
            let others = other_tile[f * QUADS + quad];
            // unroll
            for (var j = 0u; j < 4u; j++) {
                sums[j] += others[j] * rows;
            }
        }
    }
    return sums;
}

// Adds to the sums of a thread's four rows the rows of the others from `other0` on, each times the row's weight for it.
// Begins with a barrier, before which the weights are written.
fn accumulate(sums: ptr<function, array<vec4<f32>, SUMS>>, place: Place, other: u32, other0: u32, lane: u32) {
    // unroll
    for (var u = 0u; u < PIECES; u++) {
        if place.feature0 + u * PIECE < HEAD_DIM {
            workgroupBarrier();
            // unroll
            for (var s = 0u; s < 4u; s++) {
                let e = s * THREADS + lane;
                let feature = place.feature0 + u * PIECE + e % QUADS * 4u;
                other_tile[e] = four_of(place, other, other0 + e / QUADS, feature);
            }
            workgroupBarrier();
            for (var r = 0u; r < OTHERS; r++) {
                let weights = weight_tile[r * QUADS + lane % QUADS];
                let four = other_tile[r * QUADS + lane / QUADS];
                // unroll
                for (var i = 0u; i < 4u; i++) {
                    (*sums)[i * PIECES + u] += weights[i] * four;
                }
            }
        }
    }
}

// Writes the gradients of a thread's four rows from `row` on, whose head begins at feature `first` of Q | K | V.
fn put(sums: ptr<function, array<vec4<f32>, SUMS>>, place: Place, row: u32, first: u32, factor: f32, lane: u32) {
    let features = params.width + 2u * (params.width / SHARE);
    // unroll
    for (var i = 0u; i < 4u; i++) {
        let token = row + i;
        // Padding has the gradient zero, and adds nothing.
        if token < params.seq && !(ADD && token >= place.length) {
            let start = (place.row0 + token) * features + first;
            // unroll
            for (var u = 0u; u < PIECES; u++) {
                let feature = place.feature0 + u * PIECE + lane / QUADS * 4u;
                var value = select(vec4<f32>(), factor * (*sums)[i * PIECES + u], token < place.length);
                if ADD {
                    value += stored4(start, feature, HEAD_DIM);
                }
                store4(start, feature, HEAD_DIM, value);
            }
        }
    }
}

// Where the statistics of a query lie.
fn statistics_at(place: Place, heads: u32, query: u32) -> u32 {
    return place.row0 * heads + place.head * params.seq + query;
}
