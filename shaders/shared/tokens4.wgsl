// Tokens by fours: the activations of one k are read as a vec4.

const TOKEN_LANES: u32 = 4u;
alias Tokens = vec4<f32>;

fn tokens_of(all: vec4<f32>) -> Tokens {
    return all;
}

fn store_tokens(feature: u32, token: u32, split: u32, sums: Tokens) {
    // unroll
    for (var j = 0u; j < 4u; j++) {
        store(feature, token + j, split, sums[j]);
    }
}
