// Activations whose features come in whole fours: read and written by the vec4. scalars.wgsl is for any other number.

@group(0) @binding(1) var<storage, read> x: array<vec4<Storage>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<Output>>;

// Elements column .. column + 4 of a run of `width` that starts at element `start`: all of them, or none at the end.
// Zeros are read, and nothing is written, past the run. `start`, `column` and `width` are multiples of four.
fn load4(start: u32, column: u32, width: u32) -> vec4<f32> {
    if column >= width {
        return vec4<f32>();
    }
    return vec4<f32>(x[(start + column) / 4u]);
}

fn store4(start: u32, column: u32, width: u32, value: vec4<f32>) {
    if column < width {
        y[(start + column) / 4u] = vec4<Output>(value);
    }
}

// What store4 has written.
fn stored4(start: u32, column: u32, width: u32) -> vec4<f32> {
    if column >= width {
        return vec4<f32>();
    }
    return vec4<f32>(y[(start + column) / 4u]);
}
