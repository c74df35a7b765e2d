// Activations with any number of features: read and written one by one. quads.wgsl is for whole fours.

@group(0) @binding(1) var<storage, read> x: array<Storage>;
@group(0) @binding(2) var<storage, read_write> y: array<Output>;

// Elements column .. column + 4 of a run of `width` that starts at element `start`, as many as there are. Zeros are
// read, and nothing is written, past the run.
fn load4(start: u32, column: u32, width: u32) -> vec4<f32> {
    var four = vec4<f32>();
    // unroll
    for (var i = 0u; i < 4u; i++) {
        if column + i < width {
            four[i] = f32(x[start + column + i]);
        }
    }
    return four;
}

fn store4(start: u32, column: u32, width: u32, value: vec4<f32>) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
        if column + i < width {
            y[start + column + i] = Output(value[i]);
        }
    }
}

// What store4 has written.
fn stored4(start: u32, column: u32, width: u32) -> vec4<f32> {
    var four = vec4<f32>();
    // unroll
    for (var i = 0u; i < 4u; i++) {
        if column + i < width {
            four[i] = f32(y[start + column + i]);
        }
    }
    return four;
}
