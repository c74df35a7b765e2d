// The sum of the squares of each PART elements: y[first + p] = Σ x[i]² over i from p·PART to (p + 1)·PART. Twin:
// src/reference/sum_squares.rs.
//
// A workgroup of 256 to a part; dispatch grid: workgroups over x and y. Workgroup memory: a sum for each thread, added up
// by halves. Residue: the last part may be shorter, and workgroups past it do nothing.

override PART: u32 = 16384u;

const THREADS: u32 = 256u;

struct Params {
    len: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let part = workgroup.y * grid.x + workgroup.x;
    if part > (params.len - 1u) / PART {
        return;
    }
    let end = min(params.len, (part + 1u) * PART);
    var sum = 0.0;
    for (var i = part * PART + lane; i < end; i += THREADS) {
        sum += x[i] * x[i];
    }
    sums[lane] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            sums[lane] += sums[lane + half];
        }
    }
    if lane == 0u {
        y[params.first + part] = sums[0];
    }
}
