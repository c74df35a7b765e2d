// The sum of the rows of a matrix, such as the gradient of a bias: Y[c] = Σ X[r][c], added to what is there with ADD. Twin:
// src/reference/gemm.rs.
//
// A thread to a column, which it adds up from the first row to the last; neighbouring threads read neighbouring columns.
// Dispatch grid: workgroups over x and y. No workgroup memory. Residue: threads past the last column do nothing.

override ADD: bool = false;

const THREADS: u32 = 256u;

// src/ops/gemm/grad_kernels.rs has the same.
struct Params {
    rows: u32,
    cols: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let column = (workgroup.y * grid.x + workgroup.x) * THREADS + lane;
    if column >= params.cols {
        return;
    }
    var sum = 0.0;
    for (var row = 0u; row < params.rows; row++) {
        sum += x[row * params.cols + column];
    }
    y[column] = sum + select(0.0, y[column], ADD);
}
