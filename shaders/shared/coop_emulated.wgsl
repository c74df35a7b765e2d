// Stand-in for coop_native.wgsl in plain WGSL: the same functions and types for any device with f16, whatever its
// subgroups, so that all index arithmetic of the cooperative-matrix kernels is tested without such hardware. Not for
// use beyond tests: it reads two vec4s of workgroup memory for every four multiply-adds.
//
// LANES consecutive lanes play a subgroup. A factor is not held but remembered by its place in workgroup memory, which
// nobody overwrites before the next barrier; of a sum each lane holds EDGE * EDGE / LANES elements: element q = LANES *
// e + lane is row q % EDGE, column q / EDGE.

enable f16;

// Rows and columns of a block, and lanes of a subgroup.
const EDGE: u32 = 16u;
const LANES: u32 = 32u;

struct Fragment {
    at: u32,
    lane: u32,
}

alias FragmentA = Fragment;
alias FragmentB = Fragment;
alias Sum = array<f32, EDGE * EDGE / LANES>;

fn load_a(at: u32, lane: u32) -> FragmentA {
    return Fragment(at, lane % LANES);
}

fn load_b(at: u32, lane: u32) -> FragmentB {
    return Fragment(at, lane % LANES);
}

fn multiply_add(a: FragmentA, b: FragmentB, sum: Sum) -> Sum {
    var result = sum;
    for (var e = 0u; e < EDGE * EDGE / LANES; e++) {
        let q = LANES * e + a.lane;
        let row = a.at + q % EDGE * STRIDE;
        let column = b.at + q / EDGE * STRIDE;
        for (var k = 0u; k < EDGE / 4u; k++) {
            result[e] += dot(vec4<f32>(held_w(row + k)), vec4<f32>(held_x(column + k)));
        }
    }
    return result;
}

fn stage_sum(sum: Sum, at: u32, lane: u32) {
    var held = sum;
    for (var e = 0u; e < EDGE * EDGE / LANES; e++) {
        let q = LANES * e + lane % LANES;
        stage[at + q / EDGE * STAGE_STRIDE + q % EDGE] = held[e];
    }
}
