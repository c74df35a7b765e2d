// The primitives of the cooperative-matrix kernels, EDGE x EDGE x EDGE with f16 factors and f32 sums, as the subgroup's
// own instructions. coop_emulated.wgsl has the same four functions and three types in plain WGSL, for devices without
// them.
//
// This file comes first in a module: directives precede declarations. Its types are those of EDGE; the host replaces
// them (`CoopUnit` in src/kernels/coop.rs). The subgroup must be LANES wide, which a probe finds out (coop_check.wgsl).
//
// How `w_tile` and `x_tile` are held, and what `at` counts: coop_quads.wgsl or coop_scalars.wgsl, which follows. Vulkan
// wants a matrix's address and stride to be multiples of 16 bytes; the rows of shared/coop.wgsl are.
//
// naga declares the Vulkan memory model but marks no access as shared with other invocations. That a lane sees after a
// barrier what another stored before it is then up to the driver: compare with the twin on the device before use.
//
// Both loads find k contiguous: A (features x k) is row-major, B (k x tokens) column-major. Neither needs the
// transposing form of the hardware's load. Sums (features x tokens) are stored column-major, features contiguous, as Y
// has them.

enable f16;
enable wgpu_cooperative_matrix;

// Rows and columns of a block, and lanes of a subgroup.
const EDGE: u32 = 16u;
const LANES: u32 = 32u;

alias FragmentA = coop_mat16x16<f16, A>;
alias FragmentB = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;

// `lane` is for the emulation's sake: here a fragment is spread over the subgroup as the hardware likes.
fn load_a(at: u32, lane: u32) -> FragmentA {
    return coopLoadT<FragmentA>(&w_tile[HELD * at], HELD * STRIDE);
}

fn load_b(at: u32, lane: u32) -> FragmentB {
    return coopLoad<FragmentB>(&x_tile[HELD * at], HELD * STRIDE);
}

fn multiply_add(a: FragmentA, b: FragmentB, sum: Sum) -> Sum {
    return coopMultiplyAdd(a, b, sum);
}

fn stage_sum(sum: Sum, at: u32, lane: u32) {
    coopStore(sum, &stage[at], STAGE_STRIDE);
}
