// Brings weights, or the values of 2:4 weights, from row-major f32 into the order that products read (src/layout.rs): panels
// of PANEL rows, in units of 4 numbers along a row, unit by unit and within each row by row.
//
// A thread to a number of the rows of one buffer; dispatch grid: workgroups over x and y. No workgroup memory. Residue:
// padding stays as it is, which is zero; threads past the last number do nothing.

// Rows of a panel.
override PANEL: u32 = 32u;

const THREADS: u32 = 256u;

// src/ops/gemm/grad_kernels.rs has the same.
struct Params {
    // Rows of the buffer, and the first of them among those of `values`.
    rows: u32,
    row0: u32,
    // Numbers of a row, and units of one in the panels.
    cols: u32,
    units: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<f32>;
@group(0) @binding(2) var<storage, read_write> packed: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (workgroup.y * grid.x + workgroup.x) * THREADS + lane;
    let row = i / params.cols;
    let column = i % params.cols;
    if row >= params.rows {
        return;
    }
    let unit = row / PANEL * params.units + column / 4u;
    packed[(unit * PANEL + row % PANEL) * 4u + column % 4u] = values[(params.row0 + row) * params.cols + column];
}
