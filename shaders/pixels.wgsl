// Pixels: Y[p, c] = (channel c of pixel p - mean) * scale, of red, green and blue. Twin: src/reference/pixels.rs.
//
// Tile: a thread per pixel, 256 to a workgroup. Dispatch grid: workgroups over x and y. Workgroup memory: none.
// Residue: threads past the last pixel do nothing.

// A module without overrides is compiled before it is known to be trusted.
override CHANNELS: u32 = 3u;

const THREADS: u32 = 256u;

// src/ops/pixels.rs has the same.
struct Params {
    pixels: u32,
    mean0: f32,
    mean1: f32,
    mean2: f32,
    scale0: f32,
    scale1: f32,
    scale2: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
// 0xRRGGBB.
@group(0) @binding(1) var<storage, read> pixels: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<Output>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 pixels: the host sees to it. The grid may be larger than they need.
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.pixels - 1u) / THREADS {
        return;
    }
    let p = id * THREADS + lane;
    if p >= params.pixels {
        return;
    }
    let pixel = pixels[p];
    let at = p * CHANNELS;
    y[at] = Output((f32((pixel >> 16u) & 255u) - params.mean0) * params.scale0);
    y[at + 1u] = Output((f32((pixel >> 8u) & 255u) - params.mean1) * params.scale1);
    y[at + 2u] = Output((f32(pixel & 255u) - params.mean2) * params.scale2);
}
