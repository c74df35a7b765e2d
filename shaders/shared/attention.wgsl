// What the attention kernels share: where a workgroup's queries lie, how its operands are read, and which keys a query
// sees. attention.wgsl or attention_coop.wgsl follows; both declare HEAD_DIM, QUERIES and DEPTH.

// Query heads that share a head of keys and values.
override SHARE: u32 = 1u;
// Whether a query sees no key behind it.
override CAUSAL: bool = false;
// Whether a number is added to each score that depends on head and distance alone.
override BIASED: bool = false;

// The lowest score there is, whose exponential is zero beside any other.
const LOWEST: f32 = -3.4028234e38;

// src/ops/attention.rs has the same.
struct Params {
    // Rows of X and Y.
    tokens: u32,
    // Features of a row of Y.
    width: u32,
    // Rows of a sequence.
    seq: u32,
    heads: u32,
    // What scores are multiplied by.
    scale: f32,
    // Largest distance that the bias has, `reach` on both sides of zero.
    reach: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
// A row of 2 * reach + 1 for each head: that of distance key - query = d at d + reach.
@group(0) @binding(4) var<storage, read> bias: array<f32>;

// What a workgroup works on.
struct Place {
    // First row of the sequence, and how many of its rows are real.
    row0: u32,
    length: u32,
    // The head, its first feature among the queries, and that of its keys among the keys.
    head: u32,
    head0: u32,
    key_head0: u32,
    // First of the workgroup's queries, and first feature of its output.
    query0: u32,
    feature0: u32,
    // How many keys it walks.
    keys: u32,
    // Whether there is anything for it: the grid may be larger than it has to be.
    there: bool,
}

// Workgroups are numbered by pieces of queries, of the head's features, heads and sequences, in this order from the
// inside.
fn place_of(workgroup: vec3<u32>, grid: vec3<u32>) -> Place {
    let pieces_q = (params.seq + QUERIES - 1u) / QUERIES;
    let pieces_d = (HEAD_DIM + DEPTH - 1u) / DEPTH;
    let sequences = params.tokens / params.seq;
    let id = workgroup.y * grid.x + workgroup.x;
    let piece = id / pieces_q;
    let head = piece / pieces_d;
    let sequence = min(head / params.heads, sequences - 1u);
    var place: Place;
    place.row0 = sequence * params.seq;
    place.length = min(lengths[sequence], params.seq);
    place.head = head % params.heads;
    place.head0 = place.head * HEAD_DIM;
    place.key_head0 = place.head / SHARE * HEAD_DIM;
    place.query0 = id % pieces_q * QUERIES;
    place.feature0 = piece % pieces_d * DEPTH;
    // Padding has no use for keys.
    place.keys = select(place.length, 0u, place.query0 >= place.length);
    if CAUSAL {
        // Behind the last query nothing is seen.
        place.keys = min(place.keys, place.query0 + QUERIES);
    }
    place.there = id < pieces_q * pieces_d * params.heads * sequences;
    return place;
}

// Four features of one token from `feature` of the head on. `part` is 0 for Q, 1 for K, 2 for V.
fn fetch(place: Place, token: u32, part: u32, feature: u32) -> vec4<f32> {
    if token >= place.length {
        return vec4<f32>();
    }
    // Features of all keys, and of all values.
    let shared_width = params.width / SHARE;
    let first = select(params.width + (part - 1u) * shared_width + place.key_head0, place.head0, part == 0u);
    return load4((place.row0 + token) * (params.width + 2u * shared_width) + first, feature, HEAD_DIM);
}

// What is added to the score of a query and a key. Distances that the bias does not have are none of real tokens.
fn bias_of(place: Place, query: u32, key: u32) -> f32 {
    return bias[place.head * (2u * params.reach + 1u) + min(key + params.reach - query, 2u * params.reach)];
}
