// What the three GEMM families share: operands, the tile of activations, the thread map and the epilogue.
//
// Computation: for every feature f < m and token t < n
//     Y[t, f] = act(sum over i < k of W[f, i] * X[t, i]  + bias[f]) + residual[t, f]      (linear form)
//     C[f, t] = act(sum over i < k of W[f, i] * B[i, t]  + bias[f]) + residual[f, t]      (plain form)
// accumulated in f32 whatever the storage. The family's file adds how W is stored and multiplied, and the entry point.
//
// Tile: a workgroup owns TILE_M features x TILE_N tokens and walks k in steps of TILE_K; each thread owns THREAD_M
// consecutive features x THREAD_N consecutive tokens in registers. A weight read from workgroup memory is used
// THREAD_N times; how often an activation is, the family says.
//
// Dispatch grid: (ceil(m / TILE_M), ceil(n / TILE_N), 1) workgroups of THREADS invocations.
//
// Workgroup memory: both tiles are stored k-major, one row of features or tokens per k, so that the inner loop walks
// rows while threads read along them. Rows are one word longer than the tile: loading writes down a column (memory has k
// contiguous), and an odd stride spreads that column over all banks.
//
// Residues: loads outside m, n or k give 0 and so add nothing; stores outside are skipped. k = 0 leaves the
// accumulator 0 and runs the epilogue.
//
// The host replaces the values of the `const`s and `alias`es below by name (see src/kernel.rs); the defaults are one legal
// choice, so that this text is valid as it stands. The `override`s are set when the pipeline is made.

const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
const TILE_K: u32 = 32u;
const THREAD_M: u32 = 4u;
const THREAD_N: u32 = 4u;

// Element type of W and X, and of Y and the residual.
alias Storage = f32;
alias Output = f32;

// Whether X and Y are token-major (linear form) or B and C are row-major (plain form).
override LINEAR: bool = true;
override HAS_BIAS: bool = false;
// 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu.
override ACTIVATION: u32 = 0u;
override HAS_RESIDUAL: bool = false;

const THREADS_M: u32 = TILE_M / THREAD_M;
const THREADS_N: u32 = TILE_N / THREAD_N;
const THREADS: u32 = THREADS_M * THREADS_N;
const W_STRIDE: u32 = TILE_M + 1u;
const X_STRIDE: u32 = TILE_N + 1u;

struct Params {
    m: u32,
    n: u32,
    k: u32,
    // Words in one row of metadata (2:4) or mask bits (masked); 0 for dense.
    meta_cols: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// Bindings 1 and 2, the weights, belong to the family.
@group(0) @binding(3) var<storage, read> x: array<Storage>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> residual: array<Output>;
@group(0) @binding(6) var<storage, read_write> y: array<Output>;

var<workgroup> x_tile: array<f32, TILE_K * X_STRIDE>;

// Where one thread works: its place in the workgroup's tile, and that tile's place in the output.
struct Place {
    // First feature and first token of the workgroup.
    feature0: u32,
    token0: u32,
    // First feature and first token of this thread, within the tile.
    feature: u32,
    token: u32,
}

fn place(workgroup: vec3<u32>, lane: u32) -> Place {
    // Neighbouring threads take neighbouring addresses of the output: features in the linear form, else tokens.
    var across = vec2(lane % THREADS_M, lane / THREADS_M);
    if !LINEAR {
        across = vec2(lane / THREADS_N, lane % THREADS_N);
    }
    return Place(workgroup.x * TILE_M, workgroup.y * TILE_N, across.x * THREAD_M, across.y * THREAD_N);
}

// Loads activations k0 .. k0 + TILE_K of the workgroup's tokens. Neighbouring threads read neighbouring addresses.
fn load_x(lane: u32, token0: u32, k0: u32) {
    for (var e = lane; e < TILE_K * TILE_N; e += THREADS) {
        var kk = e % TILE_K;
        var tt = e / TILE_K;
        if !LINEAR {
            kk = e / TILE_N;
            tt = e % TILE_N;
        }
        let i = k0 + kk;
        let token = token0 + tt;
        var value = 0.0;
        if i < params.k && token < params.n {
            value = f32(x[select(i * params.n + token, token * params.k + i, LINEAR)]);
        }
        x_tile[kk * X_STRIDE + tt] = value;
    }
}

// erf(v) by Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7.
fn erf(v: f32) -> f32 {
    let a = abs(v);
    let t = 1.0 / (1.0 + 0.3275911 * a);
    let p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    let e = 1.0 - p * exp(-a * a);
    return select(e, -e, v < 0.0);
}

// 1 / (1 + exp(-v)) without an intermediate that overflows.
fn sigmoid(v: f32) -> f32 {
    let t = exp(-abs(v));
    return select(1.0, t, v < 0.0) / (1.0 + t);
}

fn activate(v: f32) -> f32 {
    switch ACTIVATION {
        // Not max, which may turn NaN into 0.
        case 1u: { return select(v, 0.0, v < 0.0); }
        case 2u: { return 0.5 * v * (1.0 + erf(v * 0.7071067811865476)); }
        // (1 + tanh u) / 2 = sigmoid(2u), with u = sqrt(2 / pi) (v + 0.044715 v^3).
        case 3u: { return v * sigmoid(1.5957691216057308 * v * (1.0 + 0.044715 * v * v)); }
        case 4u: { return v * sigmoid(v); }
        default: { return v; }
    }
}

// Epilogue of one output.
fn store(feature: u32, token: u32, accumulated: f32) {
    if feature >= params.m || token >= params.n {
        return;
    }
    var value = accumulated;
    if HAS_BIAS {
        value += bias[feature];
    }
    value = activate(value);
    let at = select(feature * params.n + token, token * params.m + feature, LINEAR);
    if HAS_RESIDUAL {
        value += f32(residual[at]);
    }
    y[at] = Output(value);
}
