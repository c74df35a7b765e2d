// Keys and values of new tokens, put into a cache. X has `seq` rows of Q | K | V for each sequence: K | V of token i
// goes to row past + i of the `capacity` rows that the sequence has in the cache. Padding and tokens past the capacity
// are left out. Twin: src/reference/kv_append.rs.
//
// Tile: a thread per element that may be copied, 256 to a workgroup, so that neighbours copy a run of one row; nothing
// is kept in workgroup memory. Dispatch grid: workgroups over x and y. Residue: threads past the last element do
// nothing.

// Features of K and V of a token: of a row of the cache, and the last of a row of X.
override WIDTH: u32 = 2u;

const THREADS: u32 = 256u;

// src/ops/kv_append.rs has the same.
struct Params {
    // Rows of X.
    tokens: u32,
    // Features of a row of X.
    features: u32,
    // Rows of a sequence in X, and in the cache.
    seq: u32,
    capacity: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<Storage>;
@group(0) @binding(2) var<storage, read_write> cache: array<Output>;
// New tokens of each sequence, and tokens that the cache has of it.
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> past: array<u32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 elements: the host sees to it. The grid may be larger than they need.
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens * WIDTH - 1u) / THREADS {
        return;
    }
    let e = id * THREADS + lane;
    if e >= params.tokens * WIDTH {
        return;
    }
    let token = e / WIDTH;
    let column = e % WIDTH;
    let sequence = token / params.seq;
    let i = token % params.seq;
    // What is left of the capacity, so that no sum can be past 2^32.
    let room = params.capacity - min(past[sequence], params.capacity);
    if i < min(lengths[sequence], room) {
        let row = sequence * params.capacity + past[sequence] + i;
        let source = token * params.features + (params.features - WIDTH) + column;
        cache[row * WIDTH + column] = Output(f32(x[source]));
    }
}
