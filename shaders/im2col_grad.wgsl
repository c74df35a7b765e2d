// Gradient of the windows of images: dX[pixel, c] = the sum of dY over all windows that see the pixel, each at the tap
// by which it does. Twin: src/reference/im2col.rs.
//
// Tile: a thread per channel of a pixel, 256 to a workgroup, so that neighbours read and write runs; a thread gathers
// what is its own, so that nothing is added by two. Dispatch grid: workgroups over x and y. Workgroup memory: none.
// Residue: threads past the last element do nothing.

override ADD: bool = false;

const THREADS: u32 = 256u;

@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 threads: the host sees to it. The grid may be larger than they need.
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.threads - 1u) / THREADS {
        return;
    }
    let thread = id * THREADS + lane;
    if thread >= params.threads {
        return;
    }
    let pixel = thread / params.channels;
    let channel = thread % params.channels;
    var sum = 0.0;
    for (var line = 0u; line < KERNEL_LINES; line++) {
        for (var across = 0u; across < KERNEL_COLUMNS; across++) {
            let position = position_of(pixel, line, across);
            if position != ~0u {
                let run = position * (KERNEL_LINES * KERNEL_COLUMNS) + line * KERNEL_COLUMNS + across;
                sum += dy[run * params.channels + channel];
            }
        }
    }
    if ADD {
        sum += dx[thread];
    }
    dx[thread] = sum;
}
