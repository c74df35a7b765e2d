// Element types of the operations between the GEMMs. quads.wgsl or scalars.wgsl follows for those that read features of
// tokens, and each operation declares its own parameters, on binding 0.
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
