// Workgroup memory of the cooperative-matrix kernels as vec4<f16>, so that threads store 8 or 16 bytes at once. SPIR-V
// lets a cooperative load point at a vector and counts its stride in elements of the pointed-to type, here vec4s. naga
// takes the matrix's scalar from that pointer too, which is why the tiles cannot be vec4<u32>. coop_scalars.wgsl is for
// languages whose loads want a pointer to a scalar.
//
// A tile's places are counted in vec4s by the kernels, whatever it is made of: HELD elements of `Held` to a vec4.

alias Quad = vec4<f16>;
alias Held = Quad;
const HELD: u32 = 1u;

fn hold_w(at: u32, value: Quad) {
    w_tile[at] = value;
}

fn hold_x(at: u32, value: Quad) {
    x_tile[at] = value;
}

fn held_w(at: u32) -> Quad {
    return w_tile[at];
}

fn held_x(at: u32) -> Quad {
    return x_tile[at];
}
