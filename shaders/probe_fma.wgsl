// Ceiling of multiply-adds: every thread runs CHAINS independent chains of vec4 fused multiply-adds in registers,
// ROUNDS times. 2 * 4 * CHAINS * ROUNDS operations per thread; nothing is read, one vector per thread is written.
// Params: shared/gemm.wgsl.

const THREADS: u32 = 256u;
const CHAINS: u32 = 8u;
const ROUNDS: u32 = 512u;

alias Number = vec4<Storage>;

@compute @workgroup_size(THREADS)
fn main(@builtin(global_invocation_id) thread: vec3<u32>) {
    // From the parameters, so that no compiler can compute it beforehand; 1 at run time, so that nothing overflows.
    let factor = Number(Storage(params.m));
    var chains: array<Number, CHAINS>;
    // unroll
    for (var i = 0u; i < CHAINS; i++) {
        chains[i] = Number(Storage(thread.x % 8u + i));
    }
    for (var r = 0u; r < ROUNDS; r++) {
        // unroll
        for (var i = 0u; i < CHAINS; i++) {
            chains[i] = fma(chains[i], factor, Number(0.0009765625));
        }
    }
    var sum = Number();
    // unroll
    for (var i = 0u; i < CHAINS; i++) {
        sum += chains[i];
    }
    y[thread.x] = Output(sum.x + sum.y + sum.z + sum.w);
}
