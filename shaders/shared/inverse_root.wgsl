// 1 / sqrt(t) of a mean or sum of squares, and NaN of one that has overflowed: zero, its limit, would make finite numbers
// of what cannot be told. By the bits, since compilers may take it that no number is infinite: with its highest fraction
// bit an infinity is a NaN.
fn inverse_root(t: f32) -> f32 {
    let bits = bitcast<u32>(t);
    return select(inverseSqrt(t), bitcast<f32>(bits | 0x00400000u), (bits & 0x7f800000u) == 0x7f800000u);
}
