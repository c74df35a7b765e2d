// What the kernels between the GEMMs share: parameters, and the types of what they read and write. quads.wgsl or
// scalars.wgsl follows for those that read activations.
//
// Tensors are token-major: one row of features per token. A sequence is `seq` consecutive rows, of which the first so
// many are real tokens and the others padding; `lengths` has their number for each sequence. Arithmetic is f32 whatever
// the storage.
//
// The host replaces the values of the `const`s and `alias`es by name and unrolls the loops marked so (see
// src/kernels.rs); the defaults are one legal choice. The `override`s are set when the pipeline is made: a loop over
// features then has a constant bound, and a trusted module has the override that wgpu asks for.

// Element type of what is read and of what is written.
alias Storage = f32;
alias Output = f32;

// src/kernels/glue.rs has the same.
struct Params {
    // Rows of the output, or for attention of the input.
    tokens: u32,
    // Features of a row of the output.
    width: u32,
    // Rows of a sequence.
    seq: u32,
    heads: u32,
    // What scores are multiplied by.
    scale: f32,
    // What is added to a variance.
    epsilon: f32,
    // Rows of each table.
    rows0: u32,
    rows1: u32,
    rows2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;

// 1 / sqrt(t) of a mean or sum of squares, and NaN of one that has overflowed: zero, its limit, would make finite numbers
// of what cannot be told. By the bits, since compilers may take it that no number is infinite: with its highest fraction
// bit an infinity is a NaN.
fn inverse_root(t: f32) -> f32 {
    let bits = bitcast<u32>(t);
    return select(inverseSqrt(t), bitcast<f32>(bits | 0x00400000u), (bits & 0x7f800000u) == 0x7f800000u);
}
