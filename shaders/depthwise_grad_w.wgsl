// Gradient of a depthwise convolution's weights: dW[t, c] = the sum of dY[p, c] * X[pixel of t, c] over all positions p
// whose tap t lies in the image. Twin: src/reference/depthwise.rs.
//
// Tile: a workgroup of 256 per 64 channels of a tap: four threads share a channel, each with every fourth position.
// Dispatch grid: runs of channels, then taps, over x and y. Workgroup memory: the sums of the four. Residue: threads
// past the last channel add zeros and store nothing.

override ADD: bool = false;

const THREADS: u32 = 256u;
const CHANNELS: u32 = 64u;

// `params.threads` is the number of positions of all images.
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> dw: array<f32>;

var<workgroup> parts: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let runs = (params.channels + CHANNELS - 1u) / CHANNELS;
    let tap = id / runs;
    if tap >= KERNEL_LINES * KERNEL_COLUMNS {
        return;
    }
    let channel = id % runs * CHANNELS + lane % CHANNELS;
    var sum = 0.0;
    if channel < params.channels {
        for (var position = lane / CHANNELS; position < params.threads; position += THREADS / CHANNELS) {
            let pixel = pixel_of(position, tap / KERNEL_COLUMNS, tap % KERNEL_COLUMNS);
            if pixel != ~0u {
                sum += x[pixel * params.channels + channel] * dy[position * params.channels + channel];
            }
        }
    }
    parts[lane] = sum;
    workgroupBarrier();
    if lane < CHANNELS && channel < params.channels {
        for (var other = lane + CHANNELS; other < THREADS; other += CHANNELS) {
            sum += parts[other];
        }
        let at = tap * params.channels + channel;
        if ADD {
            sum += dw[at];
        }
        dw[at] = sum;
    }
}
