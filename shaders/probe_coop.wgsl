// Ceiling of cooperative matrices: every subgroup runs CHAINS independent chains of 16 x 16 x 16 multiply-adds, f16
// factors and f32 sums, ROUNDS times. 2 * 16 * 16 * 16 * CHAINS * ROUNDS operations per subgroup of 32; factors are loaded
// once from workgroup memory, CHAINS blocks of sums per subgroup are written.

enable f16;
enable wgpu_cooperative_matrix;

const THREADS: u32 = 128u;
const CHAINS: u32 = 8u;
const ROUNDS: u32 = 512u;

// A module without overrides is compiled before it is known to be trusted. Small, so that sums stay finite.
override FACTOR: f32 = 0.0078125;

@group(0) @binding(6) var<storage, read_write> y: array<f32>;

var<workgroup> factors: array<vec4<f16>, 64>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    if lane < 64u {
        factors[lane] = vec4(f16(FACTOR) * f16(lane % 4u + 1u));
    }
    workgroupBarrier();
    let a = coopLoadT<coop_mat16x16<f16, A>>(&factors[0], 4u);
    let b = coopLoad<coop_mat16x16<f16, B>>(&factors[0], 4u);
    var sums: array<coop_mat16x16<f32, C>, CHAINS>;
    for (var r = 0u; r < ROUNDS; r++) {
        // unroll
        for (var i = 0u; i < CHAINS; i++) {
            sums[i] = coopMultiplyAdd(a, b, sums[i]);
        }
    }
    let at = (workgroup.x * THREADS + lane / 32u * 32u) * 8u * CHAINS;
    // unroll
    for (var i = 0u; i < CHAINS; i++) {
        coopStore(sums[i], &y[at + 256u * i], 16u);
    }
}
