// Gradient of the input of a linear layer: dX = dY · W; dX is n x k, dY is n x m, W is m x k, row-major f32. Twin:
// src/reference/gemm.rs.
//
// SPARSE: W has only the kept values of 2:4 weights, and VECTOR consecutive rows share their codes; otherwise it has
// every weight. ADD: add to dX in place of overwriting it.
//
// Tile: 64 tokens by 64 columns to a workgroup of 256; a thread owns 4 tokens and the 4 columns of a group. For 2:4
// weights it forms two products for each row in place of four. It sums them over the rows of a step that share a code,
// and then adds the two sums to the columns that the code names. Dispatch grid: tiles, along columns first, over x and
// y. Workgroup memory: 16 rows of dY for the tile's tokens, and of W for its columns (half as many values for 2:4
// weights), so that each number is read from memory once for 64 uses. Edge tiles: rows, tokens and columns past the
// last are read as 0; tokens and columns past the last are not stored.
//
// Occupancy, threads per core at least: rdna2 1024, rdna3 1024, rdna4 1024, ampere 1024, ada 1024, apple-m1 512,
// adreno 512.

override SPARSE: bool = false;
override VECTOR: u32 = 1u;
override ADD: bool = false;

const THREADS: u32 = 256u;
const TILE: u32 = 64u;
const ROWS: u32 = 16u;

// src/ops/gemm/grad_kernels.rs has the same.
struct Params {
    m: u32,
    n: u32,
    k: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<f32>;
@group(0) @binding(2) var<storage, read> words: array<u32>;
@group(0) @binding(3) var<storage, read> dy: array<f32>;
@group(0) @binding(4) var<storage, read_write> dx: array<f32>;

var<workgroup> gradients: array<f32, ROWS * TILE>;
var<workgroup> weights: array<f32, ROWS * TILE>;

fn store(token: u32, column: u32, sum: f32) {
    if column < params.k {
        let at = token * params.k + column;
        dx[at] = sum + select(0.0, dx[at], ADD);
    }
}

// The four columns of a group.
fn store4(token: u32, column: u32, sums: vec4<f32>) {
    if token < params.n {
        store(token, column, sums.x);
        store(token, column + 1u, sums.y);
        store(token, column + 2u, sums.z);
        store(token, column + 3u, sums.w);
    }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let across = (params.k + TILE - 1u) / TILE;
    let token0 = id / across * TILE;
    let column0 = id % across * TILE;
    if token0 >= params.n {
        return;
    }
    let groups = (params.k + 3u) / 4u;
    // Numbers of W that are stored for a row, and the first of this tile and how many it has.
    let stored = select(params.k, 2u * groups, SPARSE);
    let first = select(column0, column0 / 2u, SPARSE);
    let width = select(TILE, TILE / 2u, SPARSE);

    let own_tokens = lane / 16u * 4u;
    let own_group = lane % 16u;
    let group = column0 / 4u + own_group;
    // Rows of a step that share a code.
    let share = min(VECTOR, ROWS);
    let code_row = (params.k + 31u) / 32u;

    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    var product0 = vec4<f32>();
    var product1 = vec4<f32>();
    for (var row0 = 0u; row0 < params.m; row0 += ROWS) {
        workgroupBarrier();
        for (var i = lane; i < ROWS * TILE; i += THREADS) {
            // Neighbouring threads read neighbouring rows of a token.
            let row = i % ROWS;
            let token = i / ROWS;
            let inside = row0 + row < params.m && token0 + token < params.n;
            gradients[row * TILE + token] =
                select(0.0, dy[min(token0 + token, params.n - 1u) * params.m + min(row0 + row, params.m - 1u)], inside);
        }
        for (var i = lane; i < ROWS * width; i += THREADS) {
            let row = i / width;
            let column = i % width;
            let inside = row0 + row < params.m && first + column < stored;
            weights[row * width + column] =
                select(0.0, values[min(row0 + row, params.m - 1u) * stored + min(first + column, stored - 1u)], inside);
        }
        workgroupBarrier();
        if SPARSE {
            for (var block = 0u; block < ROWS; block += share) {
                product0 = vec4<f32>();
                product1 = vec4<f32>();
                for (var row = block; row < block + share; row++) {
                    let at = row * TILE + own_tokens;
                    let tokens = vec4(gradients[at], gradients[at + 1u], gradients[at + 2u], gradients[at + 3u]);
                    product0 += weights[row * width + 2u * own_group] * tokens;
                    product1 += weights[row * width + 2u * own_group + 1u] * tokens;
                }
                let pattern = min(row0 + block, params.m - 1u) / VECTOR;
                let word = words[pattern * code_row + min(group, groups - 1u) / 8u];
                let code = (word >> (4u * (group % 8u))) & 15u;
                let kept0 = code & 3u;
                let kept1 = code >> 2u;
                let zero = vec4<f32>();
                sum0 += select(zero, product0, kept0 == 0u) + select(zero, product1, kept1 == 0u);
                sum1 += select(zero, product0, kept0 == 1u) + select(zero, product1, kept1 == 1u);
                sum2 += select(zero, product0, kept0 == 2u) + select(zero, product1, kept1 == 2u);
                sum3 += select(zero, product0, kept0 == 3u) + select(zero, product1, kept1 == 3u);
            }
        } else {
            for (var row = 0u; row < ROWS; row++) {
                let at = row * TILE + own_tokens;
                let tokens = vec4(gradients[at], gradients[at + 1u], gradients[at + 2u], gradients[at + 3u]);
                let w = row * TILE + 4u * own_group;
                sum0 += weights[w] * tokens;
                sum1 += weights[w + 1u] * tokens;
                sum2 += weights[w + 2u] * tokens;
                sum3 += weights[w + 3u] * tokens;
            }
        }
    }

    store4(token0 + own_tokens, 4u * group, vec4(sum0.x, sum1.x, sum2.x, sum3.x));
    store4(token0 + own_tokens + 1u, 4u * group, vec4(sum0.y, sum1.y, sum2.y, sum3.y));
    store4(token0 + own_tokens + 2u, 4u * group, vec4(sum0.z, sum1.z, sum2.z, sum3.z));
    store4(token0 + own_tokens + 3u, 4u * group, vec4(sum0.w, sum1.w, sum2.w, sum3.w));
}
