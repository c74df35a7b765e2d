// Layer normalisation: Y[t] = (X[t] - mean) / sqrt(variance + epsilon) * gamma + beta over the WIDTH features of each
// token, with the biased variance. Twin: src/reference/layer_norm.rs.
//
// Two passes over a token, mean first: the variance is a mean of squared differences, which loses nothing where the
// mean is large beside them.
//
// Tile, dispatch grid, workgroup memory and residue: shared/norm.wgsl, with two sums, for the mean and for the variance.
// A token whose variance overflows becomes NaNs.

const SUMS: u32 = 2u;

@group(0) @binding(4) var<storage, read> beta: array<f32>;

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

    var sums = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        sums += load4(start, column, WIDTH);
    }
    let mean = total(sums, 0u, lane) / f32(WIDTH);

    var squares = vec4<f32>();
    for (var column = first; column < WIDTH; column += 128u) {
        let centred = (load4(start, column, WIDTH) - mean) * inside(column);
        squares += centred * centred;
    }
    let variance = total(squares, 1u, lane) / f32(WIDTH);
    let factor = inverse_root(variance + params.epsilon);

    if token < params.tokens {
        for (var column = first; column < WIDTH; column += 128u) {
            let at = places(column);
            let shifts = vec4(beta[at.x], beta[at.y], beta[at.z], beta[at.w]);
            store4(start, column, WIDTH, (load4(start, column, WIDTH) - mean) * factor * scales(column) + shifts);
        }
    }
}
