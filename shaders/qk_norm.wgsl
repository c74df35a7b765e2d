// Normalisation of the heads of Q and of K, each by the root of the mean of its squares: of the HEADS + 2 * KV_HEADS
// heads of WIDTH features that a token has in X,
//     Y[head] = X[head] / sqrt(mean of squares + epsilon) * gamma
// for those of Q, with a gamma of its own for those of K, and Y[head] = X[head] for those of V. Twin:
// src/reference/qk_norm.rs.
//
// Tile, dispatch grid, workgroup memory and residue: shared/norm.wgsl, with one sum and a head for a token there. Lanes
// of V's heads add up squares that nobody uses, so that all lanes meet at the barrier. A head whose mean of squares
// overflows becomes NaNs.

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;

const SUMS: u32 = 1u;

@group(0) @binding(4) var<storage, read> k_gamma: array<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens - 1u) / TOKENS {
        return;
    }
    let row = id * TOKENS + lane / 32u;
    let start = min(row, params.tokens - 1u) * WIDTH;
    let first = lane % 32u * 4u;

    var squares = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let four = load4(start, column, WIDTH);
        squares += four * four;
    }
    let factor = inverse_root(total(squares, 0u, lane) / f32(WIDTH) + params.epsilon);

    let head = row % (HEADS + 2u * KV_HEADS);
    if row < params.tokens {
        for (var column = first; column < WIDTH; column += 128u) {
            var four = load4(start, column, WIDTH);
            if head < HEADS {
                four *= factor * scales(column);
            } else if head < HEADS + KV_HEADS {
                let at = places(column);
                four *= factor * vec4(k_gamma[at.x], k_gamma[at.y], k_gamma[at.z], k_gamma[at.w]);
            }
            store4(start, column, WIDTH, four);
        }
    }
}
