// Ceiling of cooperative matrices: every subgroup runs CHAINS independent chains of EDGE x EDGE x EDGE multiply-adds,
// f16 factors and f32 sums, ROUNDS times. 2 * EDGE^3 * CHAINS * ROUNDS operations per subgroup of LANES; factors are
// loaded once from workgroup memory, CHAINS blocks of sums per subgroup are written.
//
// Types, EDGE, LANES and loads are those of coop_native.wgsl, which comes first.

const THREADS: u32 = 128u;
const CHAINS: u32 = 8u;
const ROUNDS: u32 = 512u;

// A module without overrides is compiled before it is known to be trusted. Small, so that sums stay finite.
override FACTOR: f32 = 0.0078125;

const STRIDE: u32 = EDGE / 4u;
const STAGE_STRIDE: u32 = EDGE;
const BLOCK: u32 = EDGE * EDGE;

@group(0) @binding(0) var<storage, read_write> y: array<f32>;

var<workgroup> w_tile: array<Held, BLOCK / 4u * HELD>;
var<workgroup> x_tile: array<Held, BLOCK / 4u * HELD>;
var<workgroup> stage: array<f32, THREADS / LANES * BLOCK>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    if lane < BLOCK / 4u {
        let four = Quad(f16(FACTOR) * f16(lane % 4u + 1u));
        hold_w(lane, four);
        hold_x(lane, four);
    }
    workgroupBarrier();
    let a = load_a(0u, lane);
    let b = load_b(0u, lane);
    var sums: array<Sum, CHAINS>;
    for (var r = 0u; r < ROUNDS; r++) {
        // unroll
        for (var i = 0u; i < CHAINS; i++) {
            sums[i] = multiply_add(a, b, sums[i]);
        }
    }
    let subgroup = lane / LANES;
    let at = (workgroup.x * (THREADS / LANES) + subgroup) * BLOCK * CHAINS;
    // unroll
    for (var i = 0u; i < CHAINS; i++) {
        stage_sum(sums[i], subgroup * BLOCK, lane);
        workgroupBarrier();
        for (var e = lane % LANES; e < BLOCK; e += LANES) {
            y[at + BLOCK * i + e] = stage[subgroup * BLOCK + e];
        }
        workgroupBarrier();
    }
}
