// Ceiling of memory traffic: copies `x` to `y`, 16 bytes at a time, four per thread and a grid apart, each read once.
// Bytes moved: twice the copied ones. Params: `n` vectors in all.

const THREADS: u32 = 256u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<u32>>;

// src/kernels/probes.rs has the same.
struct Params {
    n: u32,
}

// A module without overrides is compiled before it is known to be trusted.
override COPIES: u32 = 4u;

@compute @workgroup_size(THREADS)
fn main(@builtin(global_invocation_id) thread: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let stride = grid.x * THREADS;
    for (var c = 0u; c < COPIES; c++) {
        let at = c * stride + thread.x;
        if at < params.n {
            y[at] = x[at];
        }
    }
}
