// One token: its activations and sums are scalars.

const TOKEN_LANES: u32 = 1u;
alias Tokens = f32;

fn tokens_of(all: vec4<f32>) -> Tokens {
    return all.x;
}

fn store_tokens(feature: u32, token: u32, split: u32, sums: Tokens) {
    store(feature, token, split, sums);
}
