// Gradient of normalisation by the root of the mean of squares with respect to X. With z = X[t] * factor, factor = 1 /
// sqrt(mean of squares + epsilon), and g = dY[t] * gamma, over the WIDTH features of each token:
//     dX[t] = (g - z * mean of g * z) * factor
// dX is the binding Y, which is overwritten or added to. Zero, for a mean that is not taken away, and the factor of each
// token are left for norm_sums.wgsl. Twin: src/reference/rms_norm.rs.
//
// Tile, dispatch grid, workgroup memory and residue: shared/norm.wgsl, with two sums, for the mean of squares and that of
// g * z. The first is computed again from X, as in rms_norm.wgsl.

const SUMS: u32 = 2u;

// dX: 0 is not written, 1 is overwritten, 2 is added to.
override TARGET: u32 = 1u;

@group(0) @binding(4) var<storage, read> dy: array<f32>;
// Mean and factor of each token.
@group(0) @binding(5) var<storage, read_write> statistics: array<vec2<f32>>;

// dY * gamma of four features, zero past the end.
fn incoming(start: u32, column: u32) -> vec4<f32> {
    let at = places(column) + start;
    return vec4(dy[at.x], dy[at.y], dy[at.z], dy[at.w]) * scales(column) * inside(column);
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
    let token = id * TOKENS + lane / 32u;
    let start = min(token, params.tokens - 1u) * WIDTH;
    let first = lane % 32u * 4u;

    var squares = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let four = load4(start, column, WIDTH);
        squares += four * four;
    }
    let factor = inverse_root(total(squares, 0u, lane) / f32(WIDTH) + params.epsilon);

    var alongs = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        alongs += incoming(start, column) * (load4(start, column, WIDTH) * factor);
    }
    let along = total(alongs, 1u, lane) / f32(WIDTH);

    if token < params.tokens {
        if lane % 32u == 0u {
            statistics[token] = vec2(0.0, factor);
        }
        if TARGET > 0u {
            for (var column = first; column < WIDTH; column += 128u) {
                let z = load4(start, column, WIDTH) * factor;
                var gradient = (incoming(start, column) - z * along) * factor;
                if TARGET > 1u {
                    gradient += stored4(start, column, WIDTH);
                }
                store4(start, column, WIDTH, gradient);
            }
        }
    }
}
