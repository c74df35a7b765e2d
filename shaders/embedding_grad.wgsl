// Gradient of a table of embeddings: dTable[row] = sum of dY[t] over the tokens t with ids[t] = row, in their order, with ADD
// from what is there on. An id past the end of the table is its last row, as in embedding.wgsl. Twin:
// src/reference/embedding.rs.
//
// Tile: a workgroup of 256 per row of the table and 256 neighbouring features of it, a thread per feature. 256 ids at a time
// are compared with the row, and every thread adds the tokens whose bits are set. No two workgroups write one element, and
// the order of a sum is that of the tokens. Dispatch grid: runs of features, then rows, over x and y. Workgroup memory: a bit
// for each of the 256 ids. Residue: threads past the last feature compare ids and store nothing; ids past the last token
// count for none.

override ADD: bool = false;

const THREADS: u32 = 256u;
const WORDS: u32 = THREADS / 32u;

// src/ops/embedding/grad.rs has the same.
struct Params {
    // Rows of dY.
    tokens: u32,
    // Features of a row.
    width: u32,
    // Rows of the table.
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> table: array<f32>;

var<workgroup> found: array<atomic<u32>, WORDS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let runs = (params.width + THREADS - 1u) / THREADS;
    let row = id / runs;
    if row >= params.rows {
        return;
    }
    let column = id % runs * THREADS + lane;
    let inside = column < params.width;
    let at = row * params.width + column;
    var sum = 0.0;
    if ADD {
        if inside {
            sum = table[at];
        }
    }
    for (var first = 0u; first < params.tokens; first += THREADS) {
        if lane < WORDS {
            atomicStore(&found[lane], 0u);
        }
        workgroupBarrier();
        let token = first + lane;
        if token < params.tokens {
            if min(ids[token], params.rows - 1u) == row {
                atomicOr(&found[lane / 32u], 1u << (lane % 32u));
            }
        }
        workgroupBarrier();
        for (var word = 0u; word < WORDS; word++) {
            // Always the same number of rounds for all threads of a workgroup.
            var bits = atomicLoad(&found[word]);
            while bits != 0u {
                if inside {
                    sum += dy[(first + word * 32u + countTrailingZeros(bits)) * params.width + column];
                }
                bits &= bits - 1u;
            }
        }
        workgroupBarrier();
    }
    if inside {
        table[at] = sum;
    }
}
