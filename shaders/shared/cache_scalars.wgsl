// A cache of keys and values whose heads have any number of features: read one by one. cache_quads.wgsl is for whole
// fours.

// Element type of the cache.
alias Cached = f32;

@group(0) @binding(3) var<storage, read> cache: array<Cached>;

// As load4 of scalars.wgsl.
fn cached4(start: u32, column: u32, width: u32) -> vec4<f32> {
    var four = vec4<f32>();
    // unroll
    for (var i = 0u; i < 4u; i++) {
        if column + i < width {
            four[i] = f32(cache[start + column + i]);
        }
    }
    return four;
}
