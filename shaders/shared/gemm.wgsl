// What every GEMM kernel shares: parameters, operands, the order of tiles, and what is done to an output before it is
// stored.
//
// Computation: for every feature f < m and token t < n
//     Y[t, f] = act(sum over i < k of W[f, i] * X[t, i]  + bias[f]) + residual[t, f]      (linear form)
//     C[f, t] = act(sum over i < k of W[f, i] * B[i, t]  + bias[f]) + residual[f, t]      (plain form)
// accumulated in f32 whatever the storage. The files after this one add how W is stored and how a workgroup multiplies.
//
// Operands as every kernel finds them: X token-major, k a multiple of 32. Where the caller's X has another k, or is the
// B of the plain form, pack_x.wgsl has brought it to that shape first. W lies in panels of 32 features (src/layout.rs),
// its rows padded with zeros to the same k. So no kernel has a partial step along k.
//
// Dispatch grid: tiles_m * tiles_n tiles over x and y, and splits of k over z. Split z owns k from z * k_split; with
// more than one split, Y is a scratch buffer of one f32 matrix per split, which reduce.wgsl adds up in order.
//
// Edge tiles (partly filled) along m and n: loads past the last panel or token read the last one, and stores outside
// are skipped. k = 0 leaves the accumulator 0 and runs the epilogue.
//
// The host replaces the values of the `const`s and `alias`es by name and unrolls the loops marked so (see
// src/kernels.rs); the defaults are one legal choice, so that this text is valid as it stands. The `override`s are set
// when the pipeline is made.

// Element type of W and X, and of Y and the residual.
alias Storage = f32;
alias Output = f32;

// Whether Y is token-major (linear form) or C is feature-major (plain form).
override LINEAR: bool = true;
override HAS_BIAS: bool = false;
// As in activation.wgsl.
override ACTIVATION: u32 = 0u;
override HAS_RESIDUAL: bool = false;

struct Params {
    // Features in these weights: all of them, or one of several pieces of a matrix too large for one binding.
    m: u32,
    n: u32,
    // Padded to a multiple of 32.
    k: u32,
    // k per split, a multiple of 32.
    k_split: u32,
    // Features of Y, and the first one that these weights make.
    features: u32,
    feature0: u32,
    // Tiles along m and n.
    tiles_m: u32,
    tiles_n: u32,
    // k of the caller's X.
    k_given: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// Bindings 1 and 2, the weights, and 3, the activations, belong to the files that read them.
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> residual: array<Output>;
@group(0) @binding(6) var<storage, read_write> y: array<Output>;

// Tiles of this many rows along m are walked column by column, so that workgroups that run together share weights and
// activations in the cache.
const GROUP: u32 = 8u;

// Tile (along m, along n) of a workgroup.
fn tile_at(id: u32) -> vec2<u32> {
    let width = GROUP * params.tiles_n;
    let first = id / width * GROUP;
    let height = min(params.tiles_m - first, GROUP);
    let within = id % width;
    return vec2(first + within % height, within / height);
}

// Epilogue of one output. `feature` counts from the first of these weights.
fn store(feature: u32, token: u32, split: u32, accumulated: f32) {
    if feature >= params.m || token >= params.n {
        return;
    }
    let column = params.feature0 + feature;
    var value = accumulated;
    if HAS_BIAS {
        value += bias[column];
    }
    value = activate(value);
    let at = split * params.n * params.features
        + select(column * params.n + token, token * params.features + column, LINEAR);
    if HAS_RESIDUAL {
        value += f32(residual[at]);
    }
    y[at] = Output(value);
}
