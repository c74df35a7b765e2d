// Gradient of qk_norm.wgsl with respect to X. With z = X[head] * factor, factor = 1 / sqrt(mean of squares + epsilon),
// and g = dY[head] * gamma, over the WIDTH features of each head of Q, and with the gamma of K of each head of K:
//     dX[head] = (g - z * mean of g * z) * factor
// and dX[head] = dY[head] for those of V. dX is the binding Y, which is overwritten or added to. The factor of each
// head is left for qk_norm_sums.wgsl. Twin: src/reference/qk_norm.rs.
//
// Tile, dispatch grid, workgroup memory and residue: shared/norm.wgsl, with two sums, for the mean of squares and that
// of g * z, and a head for a token there. The first is computed again from X, as in qk_norm.wgsl. Lanes of V's heads
// add up what nobody uses, so that all lanes meet at the barriers.

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;

const SUMS: u32 = 2u;

// dX: 0 is not written, 1 is overwritten, 2 is added to.
override TARGET: u32 = 1u;

@group(0) @binding(4) var<storage, read> k_gamma: array<f32>;
@group(0) @binding(5) var<storage, read> dy: array<f32>;
// The factor of each head.
@group(0) @binding(6) var<storage, read_write> factors: array<f32>;

// dY of four features, zero past the end.
fn incoming(start: u32, column: u32) -> vec4<f32> {
    let at = places(column) + start;
    return vec4(dy[at.x], dy[at.y], dy[at.z], dy[at.w]) * inside(column);
}

// The gammas of four features of a head of Q or K.
fn gammas(column: u32, of_q: bool) -> vec4<f32> {
    if of_q {
        return scales(column);
    }
    let at = places(column);
    return vec4(k_gamma[at.x], k_gamma[at.y], k_gamma[at.z], k_gamma[at.w]);
}

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
    let head = row % (HEADS + 2u * KV_HEADS);

    var squares = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let four = load4(start, column, WIDTH);
        squares += four * four;
    }
    let factor = inverse_root(total(squares, 0u, lane) / f32(WIDTH) + params.epsilon);

    var alongs = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let g = incoming(start, column) * gammas(column, head < HEADS);
        alongs += g * (load4(start, column, WIDTH) * factor);
    }
    let along = total(alongs, 1u, lane) / f32(WIDTH);

    if row < params.tokens {
        if lane % 32u == 0u {
            factors[row] = factor;
        }
        if TARGET > 0u {
            for (var column = first; column < WIDTH; column += 128u) {
                var gradient = incoming(start, column);
                if head < HEADS + KV_HEADS {
                    let z = load4(start, column, WIDTH) * factor;
                    gradient = (gradient * gammas(column, head < HEADS) - z * along) * factor;
                }
                if TARGET > 1u {
                    gradient += stored4(start, column, WIDTH);
                }
                store4(start, column, WIDTH, gradient);
            }
        }
    }
}
