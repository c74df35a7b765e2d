// The windows of images, side by side: row p of Y is window p, its taps line by line, and of each tap all channels of
// the pixel there, or zeros outside of the image. Twin: src/reference/im2col.rs.
//
// Tile: a thread per four channels of a tap of a position, 256 to a workgroup, so that neighbours read and write runs;
// what windows share is left to the caches. Dispatch grid: workgroups over x and y. Workgroup memory: none. Residue:
// threads past the last four do nothing; where channels are no multiple of four, the last four of a tap are cut off.

const THREADS: u32 = 256u;

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
    let quads = (params.channels + 3u) / 4u;
    let run = thread / quads;
    let column = thread % quads * 4u;
    let taps = KERNEL_LINES * KERNEL_COLUMNS;
    let tap = run % taps;
    let pixel = pixel_of(run / taps, tap / KERNEL_COLUMNS, tap % KERNEL_COLUMNS);
    var value = vec4<f32>();
    if pixel != ~0u {
        value = load4(pixel * params.channels, column, params.channels);
    }
    store4(run * params.channels, column, params.channels, value);
}
