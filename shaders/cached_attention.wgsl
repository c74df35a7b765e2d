// Attention of new tokens to a cache: Y = softmax(Q Kt * scale) V, where query i of a sequence sees rows 0 ..= past + i
// of its part of the cache, as far as that goes. Twin: src/reference/cached_attention.rs.
//
// X has a row of Q | K | V per new token, of which Q is read, HEAD_DIM features to a head; the cache has `capacity`
// rows of K | V for each sequence. SHARE neighbouring heads of queries share a head of keys and values. Rows that a
// query does not see may hold anything: they are not read. Rows of Y at or past a sequence's length become zeros.
//
// Tile: a workgroup owns one query of one head and walks its keys by KEYS. The softmax is computed on the way, as in
// attention.wgsl: what was summed so far is multiplied by exp(old maximum - new maximum) whenever the maximum grows.
// There are few queries, so keys and values are read once for each of them, and by neighbours from the cache: keys and
// values of a tile would be used once if they were kept in workgroup memory.
//
// Threads: 256. For the scores 8 neighbours share a key, of which they read neighbouring fours of features. For the
// output a thread owns four features and every so manyeth key of the tile, so that neighbours read a run of one value.
//
// Dispatch grid: heads, then tokens, over x and y. Workgroups that share keys are neighbours.
//
// Workgroup memory, 6656 bytes whatever the head, so that the 16 KiB which WebGPU grants everywhere are enough for two
// workgroups:
// - `query`, scaled.
// - `parts`: what each of 8 threads has of the score of a key. A row of keys is 4 longer than it must be, so that the
//   32 neighbours that write one key's or another's write to different banks. At the end, what each thread has of the
//   output, and of the sum of weights.
// - `weights`: the scores of a tile's keys, and then their exponentials. Every thread finds the maximum itself.
//
// Residue: keys past the last that is seen have the lowest score there is and the weight zero, and neither they nor
// their values are read. Threads past the last whole set of features take no part in the output.

// Features of a head, at most 4 * QUADS.
override HEAD_DIM: u32 = 64u;
// Query heads that share a head of keys and values.
override SHARE: u32 = 1u;

// The lowest score there is, whose exponential is zero beside any other.
const LOWEST: f32 = -3.4028234e38;
const THREADS: u32 = 256u;
const KEYS: u32 = 128u;
const KEY_QUADS: u32 = KEYS / 4u;
// Threads that share a key.
const SHARERS: u32 = 8u;
// Distance of the rows of `parts`.
const STRIDE: u32 = KEYS + 4u;
// Fours of features of a head, at most.
const QUADS: u32 = 64u;

const_assert SHARERS * STRIDE <= 5u * THREADS && QUADS <= THREADS && KEY_QUADS <= THREADS;

// src/ops/cached_attention.rs has the same.
struct Params {
    // Rows of X and Y.
    tokens: u32,
    // Rows of a sequence in X, and in the cache.
    seq: u32,
    capacity: u32,
    heads: u32,
    // What scores are multiplied by.
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
// New tokens of each sequence, and tokens that the cache had of it before.
@group(0) @binding(4) var<storage, read> lengths: array<u32>;
@group(0) @binding(5) var<storage, read> past: array<u32>;

var<workgroup> query: array<vec4<f32>, QUADS>;
var<workgroup> parts: array<f32, 5u * THREADS>;
var<workgroup> weights: array<vec4<f32>, KEY_QUADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // The grid may be larger than it has to be.
    let id = workgroup.y * grid.x + workgroup.x;
    if id >= params.tokens * params.heads {
        return;
    }
    let token = id / params.heads;
    let head = id % params.heads;
    let sequence = token / params.seq;
    let i = token % params.seq;
    let to = id * HEAD_DIM;
    if i >= lengths[sequence] {
        store4(to, 4u * lane, HEAD_DIM, vec4<f32>());
        return;
    }
    let seen = min(min(past[sequence], params.capacity) + i + 1u, params.capacity);

    // Features of all keys, and of all values.
    let shared_width = params.heads / SHARE * HEAD_DIM;
    let keys = sequence * params.capacity * 2u * shared_width + head / SHARE * HEAD_DIM;
    let values = keys + shared_width;
    let source = token * (params.heads * HEAD_DIM + 2u * shared_width) + head * HEAD_DIM;
    if lane < QUADS {
        query[lane] = load4(source, 4u * lane, HEAD_DIM) * params.scale;
    }

    // What this thread has of the output: four features, of every so manyeth key.
    let quads = (HEAD_DIM + 3u) / 4u;
    let sets = THREADS / quads;
    let own_set = lane / quads;
    let column = lane % quads * 4u;
    var sum = vec4<f32>();
    var total = 0.0;
    var maximum = LOWEST;
    workgroupBarrier();
    for (var key0 = 0u; key0 < seen; key0 += KEYS) {
        let here = min(KEYS, seen - key0);
        for (var key = lane / SHARERS; key < KEYS; key += THREADS / SHARERS) {
            let row = keys + (key0 + key) * 2u * shared_width;
            var part = vec4<f32>();
            // No key that is not seen is read.
            for (var quad = select(quads, lane % SHARERS, key < here); quad < quads; quad += SHARERS) {
                part += query[quad] * cached4(row, 4u * quad, HEAD_DIM);
            }
            parts[lane % SHARERS * STRIDE + key] = part.x + part.y + part.z + part.w;
        }
        workgroupBarrier();
        let first = 4u * lane;
        let is_seen = vec4(first) + vec4(0u, 1u, 2u, 3u) < vec4(here);
        if lane < KEY_QUADS {
            var scores = vec4<f32>();
            for (var s = 0u; s < SHARERS; s++) {
                let at = s * STRIDE + first;
                scores += vec4(parts[at], parts[at + 1u], parts[at + 2u], parts[at + 3u]);
            }
            weights[lane] = select(vec4(LOWEST), scores, is_seen);
        }
        workgroupBarrier();
        var highest4 = vec4(maximum);
        for (var four = 0u; four < KEY_QUADS; four++) {
            highest4 = max(highest4, weights[four]);
        }
        let highest = max(max(highest4.x, highest4.y), max(highest4.z, highest4.w));
        workgroupBarrier();
        if lane < KEY_QUADS {
            weights[lane] = select(vec4<f32>(), exp(weights[lane] - highest), is_seen);
        }
        let shrink = exp(maximum - highest);
        maximum = highest;
        sum *= shrink;
        total *= shrink;
        workgroupBarrier();
        if own_set < sets {
            for (var key = own_set; key < here; key += sets) {
                let weight = weights[key / 4u][key % 4u];
                total += weight;
                sum += weight * cached4(values + (key0 + key) * 2u * shared_width, column, HEAD_DIM);
            }
        }
    }

    // The scores were read before the last barriers.
    // unroll
    for (var c = 0u; c < 4u; c++) {
        parts[c * THREADS + lane] = sum[c];
    }
    parts[4u * THREADS + lane] = total;
    workgroupBarrier();
    if lane < quads {
        var all = vec4<f32>();
        var weight = 0.0;
        for (var s = 0u; s < sets; s++) {
            let at = s * quads + lane;
            all += vec4(parts[at], parts[THREADS + at], parts[2u * THREADS + at], parts[3u * THREADS + at]);
            weight += parts[4u * THREADS + at];
        }
        store4(to, 4u * lane, HEAD_DIM, all / weight);
    }
}
