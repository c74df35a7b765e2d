// Mean of a sequence's real tokens, and with NORMALIZE that mean over its Euclidean length, 1e-12 at least. A sequence
// without tokens becomes zeros. Twin: src/reference/mean_pooling.rs.
//
// Tile: a workgroup of 256 per sequence, since its length is a sum over all features. A thread owns four neighbouring
// features; where there are fewer fours than threads, as many runs of threads as fit share the tokens, and where there
// are more, a thread goes on to the next. Dispatch grid: sequences over x and y. Workgroup memory: the sums of the
// runs, then those of the squares. Means are stored as they come and read again by the thread that wrote them. Residue:
// threads past the last feature add zeros. A mean whose length's square overflows becomes NaNs.

override NORMALIZE: bool = true;

const THREADS: u32 = 256u;

// src/ops/mean_pooling.rs has the same.
struct Params {
    // Rows of Y.
    sequences: u32,
    // Features of a row.
    width: u32,
    // Rows of a sequence of X.
    seq: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;

var<workgroup> parts: array<vec4<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = workgroup.y * grid.x + workgroup.x;
    if sequence >= params.sequences {
        return;
    }
    let length = min(lengths[sequence], params.seq);
    let quads = (params.width + 3u) / 4u;
    // Threads of a run, and runs.
    let across = min(quads, THREADS);
    let runs = THREADS / across;
    let run = lane / across;
    let start = sequence * params.width;

    var squares = 0.0;
    for (var quad0 = 0u; quad0 < quads; quad0 += across) {
        let column = (quad0 + lane % across) * 4u;
        var sum = vec4<f32>();
        if run < runs {
            for (var token = run; token < length; token += runs) {
                sum += load4((sequence * params.seq + token) * params.width, column, params.width);
            }
        }
        parts[lane] = sum;
        workgroupBarrier();
        if run == 0u {
            for (var r = 1u; r < runs; r++) {
                sum += parts[r * across + lane];
            }
            let mean = sum / f32(max(length, 1u));
            store4(start, column, params.width, mean);
            squares += dot(mean, mean);
        }
        workgroupBarrier();
    }

    if NORMALIZE {
        parts[lane] = vec4(squares, 0.0, 0.0, 0.0);
        workgroupBarrier();
        var total = 0.0;
        for (var l = 0u; l < across; l++) {
            total += parts[l].x;
        }
        // The root of 1e-24 is 1e-12. A NaN is not less, and stays.
        let factor = inverse_root(select(total, 1e-24, total < 1e-24));
        if run == 0u {
            for (var quad0 = 0u; quad0 < quads; quad0 += across) {
                let column = (quad0 + lane) * 4u;
                store4(start, column, params.width, stored4(start, column, params.width) * factor);
            }
        }
    }
}
