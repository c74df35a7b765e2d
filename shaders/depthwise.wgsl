// Depthwise convolution: Y[p, c] = act(sum over taps t of X[pixel of t, c] * weights[t, c] + bias[c]), where taps
// outside of the image count as zero. Activations: shared/activation.wgsl. Twin: src/reference/depthwise.rs.
//
// Tile: a thread per four channels of a position, 256 to a workgroup, so that neighbours read and write runs; what
// windows share is left to the caches. Dispatch grid: workgroups over x and y. Workgroup memory: none. Residue: threads
// past the last four do nothing; where channels are no multiple of four, the last four of a position are cut off.

// As in shared/activation.wgsl.
override ACTIVATION: u32 = 0u;
override HAS_BIAS: bool = false;

const THREADS: u32 = 256u;

// Tap by tap, a weight for each channel.
@group(0) @binding(3) var<storage, read> weights: array<f32>;
// One for each channel.
@group(0) @binding(4) var<storage, read> bias: array<f32>;

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
    let position = thread / quads;
    let column = thread % quads * 4u;
    var sum = vec4<f32>();
    for (var line = 0u; line < KERNEL_LINES; line++) {
        for (var across = 0u; across < KERNEL_COLUMNS; across++) {
            let pixel = pixel_of(position, line, across);
            if pixel != ~0u {
                let w = (line * KERNEL_COLUMNS + across) * params.channels + column;
                let four = load4(pixel * params.channels, column, params.channels);
                let own = vec3(weight(w, column, 1u), weight(w, column, 2u), weight(w, column, 3u));
                sum += four * vec4<f32>(weights[w], own);
            }
        }
    }
    // unroll
    for (var i = 0u; i < 4u; i++) {
        if HAS_BIAS && column + i < params.channels {
            sum[i] += bias[column + i];
        }
        sum[i] = activate(sum[i]);
    }
    store4(position * params.channels, column, params.channels, sum);
}

// The weight of channel column + i, if there is such a channel.
fn weight(start: u32, column: u32, i: u32) -> f32 {
    if column + i < params.channels {
        return weights[start + i];
    }
    return 0.0;
}
