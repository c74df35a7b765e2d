// Where the words of mask bits or 2:4 codes lie: one word per 32 columns (eight groups) and per VECTOR features.

const VECTOR: u32 = 1u;

// Rows of words in a panel of 32 features, at least one.
const WORD_ROWS: u32 = max(32u / VECTOR, 1u);

// Index of the word that holds column k0 of a feature. Features past the last panel read the last one; words of
// neighbouring features of one panel are neighbours.
fn word_at(feature: u32, k0: u32) -> u32 {
    let row = (min(feature / 32u, (params.m - 1u) / 32u) * 32u + feature % 32u) / VECTOR;
    return (row / WORD_ROWS * (params.k / 32u) + k0 / 32u) * WORD_ROWS + row % WORD_ROWS;
}

// The words of four features from a multiple of four on: one, two or four different ones.
fn fetch_bits(feature: u32, k0: u32) -> vec4<u32> {
    let at = word_at(feature, k0);
    return vec4(bits[at], bits[at + 1u / VECTOR], bits[at + 2u / VECTOR], bits[at + 3u / VECTOR]);
}
