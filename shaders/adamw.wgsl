// A step of AdamW on each element of a parameter, with g = factor · gradient:
//     m = beta1 · m + (1 - beta1) · g        v = beta2 · v + (1 - beta2) · g²
//     w = keep · w - rate · m / (sqrt(power2 · v) + eps)
// and the gradient becomes zero with CLEAR. `rate` and `power2` have the corrections for means that start at zero in them, and `keep`
// is what weight decay leaves. Twin: src/reference/adamw.rs.
//
// A thread to an element; dispatch grid: workgroups over x and y. No workgroup memory. Residue: threads past the last
// element do nothing.

// Whether the gradient becomes zero, for those of the next step to be added to.
override CLEAR: bool = true;

const THREADS: u32 = 256u;

struct Params {
    len: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// rate, factor, beta1, beta2, power2, eps, keep, nothing.
@group(0) @binding(1) var<storage, read> step: array<f32>;
@group(0) @binding(2) var<storage, read_write> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(4) var<storage, read_write> m: array<f32>;
@group(0) @binding(5) var<storage, read_write> v: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (workgroup.y * grid.x + workgroup.x) * THREADS + lane;
    if i >= params.len {
        return;
    }
    let g = gradient[i] * step[1];
    let mean = step[2] * m[i] + (1.0 - step[2]) * g;
    let squares = step[3] * v[i] + (1.0 - step[3]) * g * g;
    m[i] = mean;
    v[i] = squares;
    w[i] = step[6] * w[i] - step[0] * mean / (sqrt(squares * step[4]) + step[5]);
    if CLEAR {
        gradient[i] = 0.0;
    }
}
