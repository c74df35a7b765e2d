// Stand-in for coop_native.wgsl in plain WGSL: the same functions and types for any device with f16, whatever its
// subgroups, so that all index arithmetic of the cooperative-matrix kernels is tested without such hardware. Not for
// use beyond tests: it reads two vec4s of workgroup memory for every four multiply-adds.
//
// 32 consecutive lanes play a subgroup. A factor is not held but remembered by its place in workgroup memory, which
// nobody overwrites before the next barrier; of a sum each lane holds eight elements: element q = 32 e + lane is row q
// % 16, column q / 16.

enable f16;

struct Fragment {
    at: u32,
    lane: u32,
}

alias FragmentA = Fragment;
alias FragmentB = Fragment;
alias Sum = array<f32, 8>;

fn load_a(at: u32, lane: u32) -> FragmentA {
    return Fragment(at, lane % 32u);
}

fn load_b(at: u32, lane: u32) -> FragmentB {
    return Fragment(at, lane % 32u);
}

fn multiply_add(a: FragmentA, b: FragmentB, sum: Sum) -> Sum {
    var result = sum;
    for (var e = 0u; e < 8u; e++) {
        let q = 32u * e + a.lane;
        let row = a.at + q % 16u * STRIDE;
        let column = b.at + q / 16u * STRIDE;
        for (var k = 0u; k < 4u; k++) {
            result[e] += dot(vec4<f32>(w_tile[row + k]), vec4<f32>(x_tile[column + k]));
        }
    }
    return result;
}

fn stage_sum(sum: Sum, at: u32, lane: u32) {
    var held = sum;
    for (var e = 0u; e < 8u; e++) {
        let q = 32u * e + lane % 32u;
        stage[at + q / 16u * STAGE_STRIDE + q % 16u] = held[e];
    }
}
