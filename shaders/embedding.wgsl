// Sum of embeddings: Y[t] = sum over the tables of table[ids[t]]. Twin: src/reference/embedding.rs.
//
// Tile: a thread per element, 256 to a workgroup, so that neighbours read a run of one row; nothing is reused, so
// nothing is kept in workgroup memory. Dispatch grid: workgroups over x and y. Residue: threads past the last element
// do nothing. An id past the end of its table reads the last row: the caller knows what an id means, and says so
// before it uploads it.

// Tables, 1 to 3.
override TABLES: u32 = 3u;

const THREADS: u32 = 256u;

// src/ops/embedding.rs has the same.
struct Params {
    // Rows of Y.
    tokens: u32,
    // Features of a row.
    width: u32,
    // Rows of each table.
    rows0: u32,
    rows1: u32,
    rows2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> table0: array<Storage>;
@group(0) @binding(2) var<storage, read> ids0: array<u32>;
@group(0) @binding(3) var<storage, read> table1: array<Storage>;
@group(0) @binding(4) var<storage, read> ids1: array<u32>;
@group(0) @binding(5) var<storage, read> table2: array<Storage>;
@group(0) @binding(6) var<storage, read> ids2: array<u32>;
@group(0) @binding(7) var<storage, read_write> y: array<Output>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Fewer than 2^32 elements: the host sees to it. The grid may be larger than they need.
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens * params.width - 1u) / THREADS {
        return;
    }
    let e = id * THREADS + lane;
    if e >= params.tokens * params.width {
        return;
    }
    let token = e / params.width;
    let column = e % params.width;
    var sum = f32(table0[min(ids0[token], params.rows0 - 1u) * params.width + column]);
    if TABLES > 1u {
        sum += f32(table1[min(ids1[token], params.rows1 - 1u) * params.width + column]);
    }
    if TABLES > 2u {
        sum += f32(table2[min(ids2[token], params.rows2 - 1u) * params.width + column]);
    }
    y[e] = Output(sum);
}
