// Normalisation by the root of the mean of squares: Y[t] = X[t] / sqrt(mean of squares + epsilon) * gamma over the WIDTH
// features of each token. Twin: src/reference/rms_norm.rs.
//
// Tile, dispatch grid, workgroup memory and residue: shared/norm.wgsl, with one sum. A token whose mean of squares
// overflows becomes NaNs.
//
// Occupancy, threads per core at least: rdna2 2048, rdna3 2048, rdna4 2048, ampere 2048, ada 1536, apple-m1 1024,
// adreno 2048.

const SUMS: u32 = 1u;

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

    if token < params.tokens {
        for (var column = first; column < WIDTH; column += 128u) {
            store4(start, column, WIDTH, load4(start, column, WIDTH) * factor * scales(column));
        }
    }
}
