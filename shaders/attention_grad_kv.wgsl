// The gradients of attention with respect to its keys and values. Twin: `grad` of src/reference/attention.rs. With P and dS
// as in attention_grad_q.wgsl, which has left the softmax's maximum and 1 / sum and D of each query in `statistics`:
// dV = Pt dY, dK = scale * dSt Q, summed over the query heads that share the keys.
//
// Tile: a workgroup owns 32 keys of a head and DEPTH features of both gradients, and walks the queries of each of the SHARE
// heads by 32. CAUSAL: steps in which all queries are before all keys are left out. Heads of more than DEPTH features are
// cut: each piece has a workgroup of its own. Threads and tiles: shared/attention_grad.wgsl.
//
// Dispatch grid: pieces of keys, of the head's features, heads of keys and sequences, in this order from the inside, over
// x and y. `params.heads` are heads of keys here, and `place.query0` is the first key.
//
// Workgroup memory: 12 KiB of tiles.
//
// Occupancy, threads per core at least: rdna2 256, rdna3 256, rdna4 256, ampere 384, ada 256, apple-m1 128, adreno 64.
//
// Residues: rows and features past the end are read as zeros. What a query does not see has the weight zero, by selection.

// Features of a head.
override HEAD_DIM: u32 = 64u;

@group(0) @binding(6) var<storage, read> statistics: array<vec4<f32>>;

// Whether a query sees each of the four keys from `key` on.
fn sees(place: Place, query: u32, key: u32) -> vec4<bool> {
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u);
    let real = (keys < vec4(place.length)) & vec4(query < place.length);
    if !CAUSAL {
        return real;
    }
    return real & (keys <= vec4(query));
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var place = place_of(workgroup, grid);
    if !place.there {
        return;
    }
    let quad = lane / QUADS;
    let key0 = place.query0;
    let key = key0 + lane % QUADS * 4u;
    let kv_head = place.head;
    place.key_head0 = kv_head * HEAD_DIM;

    let end = select(place.length, 0u, key0 >= place.length);
    var dk: array<vec4<f32>, SUMS>;
    var dv: array<vec4<f32>, SUMS>;
    for (var member = 0u; member < SHARE; member++) {
        place.head = kv_head * SHARE + member;
        place.head0 = place.head * HEAD_DIM;
        for (var query0 = select(0u, key0, CAUSAL); query0 < end; query0 += OTHERS) {
            var scores = products(place, OF_K, key0, OF_Q, query0, lane);
            var dp = products(place, OF_V, key0, OF_DY, query0, lane);
            var ds: array<vec4<f32>, 4>;
            // unroll
            for (var j = 0u; j < 4u; j++) {
                let query = query0 + 4u * quad + j;
                var score = scores[j] * params.scale;
                if BIASED {
                    // unroll
                    for (var i = 0u; i < 4u; i++) {
                        score[i] += bias_of(place, query, key + i);
                    }
                }
                let real = min(query, place.length - 1u);
                let own = statistics[statistics_at(place, params.heads * SHARE, real)];
                let weight = select(vec4<f32>(), exp(score - own.x) * own.y, sees(place, query, key));
                ds[j] = select(vec4<f32>(), weight * (dp[j] - own.z), sees(place, query, key));
                weight_tile[(4u * quad + j) * QUADS + lane % QUADS] = weight;
            }
            accumulate(&dv, place, OF_DY, query0, lane);
            workgroupBarrier();
            // unroll
            for (var j = 0u; j < 4u; j++) {
                weight_tile[(4u * quad + j) * QUADS + lane % QUADS] = ds[j];
            }
            accumulate(&dk, place, OF_Q, query0, lane);
        }
    }
    put(&dk, place, key, params.width + place.key_head0, params.scale, lane);
    put(&dv, place, key, params.width + params.width / SHARE + place.key_head0, 1.0, lane);
}
