// The gradient of attention's relative bias: of what attention_grad_q.wgsl has left, a row of sums for each workgroup, the
// sum over all workgroups of a head. Twin: `grad` of src/reference/attention.rs.
//
// Tile: a workgroup owns 256 distances of a head, a thread one of them, which it sums over sequences and pieces of queries
// in their order. Dispatch grid: pieces of distances, then heads, over x and y.
//
// Occupancy, threads per core at least: rdna2 1024, rdna3 1024, rdna4 1024, ampere 1024, ada 1024, apple-m1 512, adreno 256.
//
// Residues: a distance that no row has becomes zero, or adds nothing. No workgroup memory.

// Whether the gradient is added to what is there.
override ADD: bool = false;

const THREADS: u32 = 256u;
// Queries of a workgroup of attention_grad_q.wgsl.
const QUERIES: u32 = 32u;

// src/ops/attention/grad.rs has the same.
struct Params {
    heads: u32,
    sequences: u32,
    // Rows of each sequence's head, and their length.
    pieces: u32,
    columns: u32,
    // Largest distance that the bias has.
    reach: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> sums: array<f32>;
@group(0) @binding(2) var<storage, read_write> dbias: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let distances = 2u * params.reach + 1u;
    let blocks = (distances + THREADS - 1u) / THREADS;
    let id = workgroup.y * grid.x + workgroup.x;
    let head = id / blocks;
    let distance = id % blocks * THREADS + lane;
    if head >= params.heads || distance >= distances {
        return;
    }
    var sum = 0.0;
    for (var sequence = 0u; sequence < params.sequences; sequence++) {
        for (var piece = 0u; piece < params.pieces; piece++) {
            // Below zero it wraps, and is past all columns.
            let at = distance + 31u + piece * QUERIES - params.reach;
            if at < params.columns {
                sum += sums[((sequence * params.heads + head) * params.pieces + piece) * params.columns + at];
            }
        }
    }
    let to = head * distances + distance;
    if ADD {
        sum += dbias[to];
    }
    dbias[to] = sum;
}
