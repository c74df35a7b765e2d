// Gradient of the weights of a linear layer: dW = dYᵀ · X; X is n x k, dY is n x m, row-major f32. Twin:
// src/reference/gemm.rs.
//
// FORM: 0 dense, dW is m x k; 1 masked, dW is m x k and 0 where the mask bit is 0; 2 sparse 2:4, dW has only the kept
// values, and VECTOR consecutive rows share their codes. ADD: add to dW in place of overwriting it (masked-out entries
// are always set to 0).
//
// Tile: 64 rows by 64 columns to a workgroup of 256. A thread owns 4 rows and the 4 columns of a group; for 2:4 weights
// only the two kept columns, so half the multiply-adds: the code is known before the loop. Dispatch grid: tiles, along
// columns first, over x and y. Workgroup memory: 16 tokens of dY for the tile's rows, and of X for its columns. Edge
// tiles: tokens, rows and columns past the last are read as 0; rows and columns past the last are not stored.
//
// Occupancy, threads per core at least: rdna2 1024, rdna3 1024, rdna4 1024, ampere 1024, ada 1024, apple-m1 512,
// adreno 512.

override FORM: u32 = 0u;
override VECTOR: u32 = 1u;
override ADD: bool = false;

const THREADS: u32 = 256u;
const TILE: u32 = 64u;
const TOKENS: u32 = 16u;

// src/ops/gemm/grad_kernels.rs has the same.
struct Params {
    m: u32,
    n: u32,
    k: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> words: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<f32>;
@group(0) @binding(4) var<storage, read_write> dw: array<f32>;

var<workgroup> gradients: array<f32, TOKENS * TILE>;
var<workgroup> activations: array<f32, TOKENS * TILE>;

// The code of a group in a row.
fn code(row: u32, group: u32) -> u32 {
    let word = words[min(row, params.m - 1u) / VECTOR * ((params.k + 31u) / 32u) + min(group, (params.k - 1u) / 4u) / 8u];
    return (word >> (4u * (group % 8u))) & 15u;
}

fn store(at: u32, sum: f32) {
    dw[at] = sum + select(0.0, dw[at], ADD);
}

// A weight of the dense form; zero where the mask has no bit.
fn store_column(row: u32, column: u32, sum: f32) {
    if column >= params.k {
        return;
    }
    var is_kept = true;
    if FORM == 1u {
        let word = words[row * ((params.k + 31u) / 32u) + column / 32u];
        is_kept = ((word >> (column % 32u)) & 1u) != 0u;
    }
    if is_kept {
        store(row * params.k + column, sum);
    } else {
        dw[row * params.k + column] = 0.0;
    }
}

// What a row has in a group: the two values that are kept, or four columns.
fn store_row(row: u32, group: u32, sums: vec4<f32>) {
    if row >= params.m || 4u * group >= params.k {
        return;
    }
    if FORM == 2u {
        let start = row * 2u * ((params.k + 3u) / 4u) + 2u * group;
        store(start, sums.x);
        store(start + 1u, sums.y);
    } else {
        store_column(row, 4u * group, sums.x);
        store_column(row, 4u * group + 1u, sums.y);
        store_column(row, 4u * group + 2u, sums.z);
        store_column(row, 4u * group + 3u, sums.w);
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
    let row0 = id / across * TILE;
    let column0 = id % across * TILE;
    if row0 >= params.m {
        return;
    }
    let own_rows = lane / 16u * 4u;
    let own_group = lane % 16u;
    let row = row0 + own_rows;
    let group = column0 / 4u + own_group;
    var codes = vec4<u32>();
    if FORM == 2u {
        codes = vec4(code(row, group), code(row + 1u, group), code(row + 2u, group), code(row + 3u, group));
    }
    let kept0 = 4u * own_group + (codes & vec4(3u));
    let kept1 = 4u * own_group + (codes >> vec4(2u));

    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    for (var token0 = 0u; token0 < params.n; token0 += TOKENS) {
        workgroupBarrier();
        for (var i = lane; i < TOKENS * TILE; i += THREADS) {
            let token = i / TILE;
            let place = i % TILE;
            let start = min(token0 + token, params.n - 1u);
            let is_token = token0 + token < params.n;
            gradients[i] =
                select(0.0, dy[start * params.m + min(row0 + place, params.m - 1u)], is_token && row0 + place < params.m);
            activations[i] =
                select(0.0, x[start * params.k + min(column0 + place, params.k - 1u)], is_token && column0 + place < params.k);
        }
        workgroupBarrier();
        for (var token = 0u; token < TOKENS; token++) {
            let start = token * TILE;
            let at = start + own_rows;
            let rows = vec4(gradients[at], gradients[at + 1u], gradients[at + 2u], gradients[at + 3u]);
            if FORM != 2u {
                let column = start + 4u * own_group;
                sum0 += activations[column] * rows;
                sum1 += activations[column + 1u] * rows;
                sum2 += activations[column + 2u] * rows;
                sum3 += activations[column + 3u] * rows;
            } else if VECTOR >= 4u {
                sum0 += activations[start + kept0.x] * rows;
                sum1 += activations[start + kept1.x] * rows;
            } else {
                let own0 = vec4(start) + kept0;
                let own1 = vec4(start) + kept1;
                sum0 += vec4(activations[own0.x], activations[own0.y], activations[own0.z], activations[own0.w]) * rows;
                sum1 += vec4(activations[own1.x], activations[own1.y], activations[own1.z], activations[own1.w]) * rows;
            }
        }
    }

    store_row(row, group, vec4(sum0.x, sum1.x, sum2.x, sum3.x));
    store_row(row + 1u, group, vec4(sum0.y, sum1.y, sum2.y, sum3.y));
    store_row(row + 2u, group, vec4(sum0.z, sum1.z, sum2.z, sum3.z));
    store_row(row + 3u, group, vec4(sum0.w, sum1.w, sum2.w, sum3.w));
}
