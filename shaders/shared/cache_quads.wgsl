// A cache of keys and values whose heads have whole fours of features: read by the vec4. cache_scalars.wgsl is for any
// other number.

// Element type of the cache.
alias Cached = f32;

@group(0) @binding(3) var<storage, read> cache: array<vec4<Cached>>;

// As load4 of quads.wgsl.
fn cached4(start: u32, column: u32, width: u32) -> vec4<f32> {
    if column >= width {
        return vec4<f32>();
    }
    return vec4<f32>(cache[(start + column) / 4u]);
}
