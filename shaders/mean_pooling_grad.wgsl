// Gradient of mean pooling: each real token of a sequence gets dM / length, where dM is the gradient of the mean M. Without
// NORMALIZE that is dY. With it Y = M * factor, factor = 1 / max(length of M, 1e-12), and
//     dM = (dY - Y * (Y . dY)) * factor, or dY * factor where the length is below 1e-12.
// Rows of padding become zeros, or with ADD stay as they are. mean_pooling.wgsl has computed the means. Twin:
// src/reference/mean_pooling.rs.
//
// Tile: a workgroup of 256 per 16 rows of a sequence: a thread owns every 256th feature of them. Each workgroup of a
// sequence computes the length of the mean again, which is little beside the rows. Dispatch grid: runs of rows, then
// sequences, over x and y. Workgroup memory: each thread's sums of squares and of products with dY; all threads add them up
// in the same order. Residue: threads past the last feature add zeros; the last run ends with the sequence's rows.

override NORMALIZE: bool = true;
override ADD: bool = false;

const THREADS: u32 = 256u;
const ROWS: u32 = 16u;

// src/ops/mean_pooling/grad.rs has the same.
struct Params {
    // Rows of dY.
    sequences: u32,
    // Features of a row.
    width: u32,
    // Rows of a sequence of dX.
    seq: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// As long as dY; nothing without NORMALIZE.
@group(0) @binding(1) var<storage, read> means: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read_write> dx: array<f32>;

var<workgroup> parts: array<vec2<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let runs = (params.seq + ROWS - 1u) / ROWS;
    let sequence = id / runs;
    if sequence >= params.sequences {
        return;
    }
    let row0 = id % runs * ROWS;
    let rows = min(row0 + ROWS, params.seq);
    let length = min(lengths[sequence], params.seq);
    let start = sequence * params.width;

    var factor = 1.0;
    var along = 0.0;
    if NORMALIZE {
        var sums = vec2<f32>();
        for (var column = lane; column < params.width; column += THREADS) {
            let mean = means[start + column];
            sums += vec2(mean * mean, mean * dy[start + column]);
        }
        parts[lane] = sums;
        workgroupBarrier();
        var total = vec2<f32>();
        for (var l = 0u; l < THREADS; l++) {
            total += parts[l];
        }
        // The root of 1e-24 is 1e-12. A NaN is not less, and stays.
        let short = total.x < 1e-24;
        factor = inverse_root(select(total.x, 1e-24, short));
        along = select(total.y * factor, 0.0, short);
    }
    let count = f32(max(length, 1u));
    for (var column = lane; column < params.width; column += THREADS) {
        var gradient = dy[start + column];
        if NORMALIZE {
            gradient = (gradient - means[start + column] * factor * along) * factor;
        }
        gradient /= count;
        for (var row = row0; row < rows; row++) {
            let at = (sequence * params.seq + row) * params.width + column;
            if ADD {
                if row < length {
                    dx[at] += gradient;
                }
            } else {
                dx[at] = select(0.0, gradient, row < length);
            }
        }
    }
}
