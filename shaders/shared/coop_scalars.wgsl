// Workgroup memory of the cooperative-matrix kernels as f16, for Metal: what naga makes of a cooperative load takes a
// pointer to a scalar there and counts the stride in scalars. Stores of four neighbours are left to the compiler to
// merge. coop_quads.wgsl has the same names for all others.

alias Quad = vec4<f16>;
alias Held = f16;
const HELD: u32 = 4u;

fn hold_w(at: u32, value: Quad) {
    w_tile[4u * at] = value.x;
    w_tile[4u * at + 1u] = value.y;
    w_tile[4u * at + 2u] = value.z;
    w_tile[4u * at + 3u] = value.w;
}

fn hold_x(at: u32, value: Quad) {
    x_tile[4u * at] = value.x;
    x_tile[4u * at + 1u] = value.y;
    x_tile[4u * at + 2u] = value.z;
    x_tile[4u * at + 3u] = value.w;
}

fn held_w(at: u32) -> Quad {
    return Quad(w_tile[4u * at], w_tile[4u * at + 1u], w_tile[4u * at + 2u], w_tile[4u * at + 3u]);
}

fn held_x(at: u32) -> Quad {
    return Quad(x_tile[4u * at], x_tile[4u * at + 1u], x_tile[4u * at + 2u], x_tile[4u * at + 3u]);
}
