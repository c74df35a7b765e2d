// Whether a driver's cooperative matrices can be trusted, and how wide their subgroups are: run once when a device is
// opened, before any kernel is compiled. Twin: `check_result` of src/kernels/coop.rs.
//
// No API tells what a driver makes of a pipeline: RADV chooses between subgroups of 32 and 64 for each, and wgpu can
// ask for neither. So this one looks like the kernels to it: tiles in workgroup memory, the primitives of
// coop_native.wgsl, a workgroup of a multiple of 64, no subgroup operation. Nothing depends on the width but which
// blocks a subgroup takes. (naga takes the builtin without the directive `enable subgroups`, which it does not know.)
//
// Computation: W and X are ROWS x 32 whole numbers. Subgroup s multiplies features and tokens of its own, from EDGE *
// (s % BLOCKS) and EDGE * ((s + 1) % BLOCKS) on, over all 32 k, so a driver that loads another place shows. Whole
// numbers: every sum is exact.
//
// Output `y`: for each thread the subgroup's width; then for each subgroup the sums of its blocks, features contiguous.
// Dispatch: one workgroup. Workgroup memory: rows of 32 f16 and 16 bytes, as in shared/coop.wgsl, and a block of sums
// per subgroup, of which there are at most SUBGROUPS.

// A module without overrides is compiled before it is known to be trusted.
override ONE: f32 = 1.0;

const THREADS: u32 = 128u;
const K_STEPS: u32 = 2u;

const BLOCKS: u32 = 4u;
const SUBGROUPS: u32 = THREADS / 8u;
const ROWS: u32 = BLOCKS * EDGE;
const STRIDE: u32 = 10u;
const STAGE_STRIDE: u32 = EDGE + 4u;
const STAGE_SIZE: u32 = EDGE * STAGE_STRIDE;

const_assert K_STEPS * EDGE == 32u;

@group(0) @binding(0) var<storage, read_write> y: array<f32>;

var<workgroup> w_tile: array<Held, HELD * ROWS * STRIDE>;
var<workgroup> x_tile: array<Held, HELD * ROWS * STRIDE>;
var<workgroup> stage: array<f32, SUBGROUPS * STAGE_SIZE>;

// Four of the whole numbers of a matrix, -5 to 5. No two of its blocks are alike, and none is symmetric.
fn numbers(row: u32, k: u32, a: u32, b: u32) -> Quad {
    let four = (vec4(row * a) + (vec4(k) + vec4(0u, 1u, 2u, 3u)) * b + vec4(row * row)) % vec4(11u);
    return Quad(ONE * (vec4<f32>(four) - 5.0));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(subgroup_size) width: u32) {
    for (var e = lane; e < ROWS * 8u; e += THREADS) {
        hold_w(e / 8u * STRIDE + e % 8u, numbers(e / 8u, e % 8u * 4u, 7u, 3u));
        hold_x(e / 8u * STRIDE + e % 8u, numbers(e / 8u, e % 8u * 4u, 5u, 4u));
    }
    workgroupBarrier();
    let subgroup = min(lane / width, SUBGROUPS - 1u);
    let w_row = EDGE * (subgroup % BLOCKS);
    let x_row = EDGE * ((subgroup + 1u) % BLOCKS);
    var sums: array<Sum, 1>;
    // unroll
    for (var kk = 0u; kk < K_STEPS; kk++) {
        let a = load_a(w_row * STRIDE + EDGE / 4u * kk, lane);
        let b = load_b(x_row * STRIDE + EDGE / 4u * kk, lane);
        sums[0] = multiply_add(a, b, sums[0]);
    }
    stage_sum(sums[0], subgroup * STAGE_SIZE, lane);
    workgroupBarrier();
    y[lane] = f32(width);
    for (var e = lane; e < min(THREADS / width, SUBGROUPS) * EDGE * EDGE; e += THREADS) {
        y[THREADS + e] = stage[e / EDGE * STAGE_STRIDE + e % EDGE];
    }
}
