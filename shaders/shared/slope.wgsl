// Slopes of the activations of activation.wgsl, which stands before this. relu has none below zero and at it, and
// relu6 none at six and above.

fn slope(v: f32) -> f32 {
    switch ACTIVATION {
        // Not step, of which nothing is said for NaN.
        case 1u: { return select(1.0, 0.0, v <= 0.0); }
        // The normal distribution and v times its density.
        case 2u: { return 0.5 * (1.0 + erf(v * 0.7071067811865476)) + v * (0.3989422804014327 * exp(-0.5 * v * v)); }
        case 3u: {
            // u = 2 sqrt(2 / pi) (v + 0.044715 v^3), of which sigmoid is taken. Past 16 it is 0 or 1, and cubes may
            // overflow. Not clamp, which may make a number of NaN.
            let w = select(v, select(-16.0, 16.0, v > 0.0), abs(v) > 16.0);
            let u = 1.5957691216057308 * w * (1.0 + 0.044715 * w * w);
            return sigmoid(u) + w * sigmoid_slope(u) * (1.5957691216057308 * (1.0 + 0.134145 * w * w));
        }
        case 4u: { return sigmoid(v) + v * sigmoid_slope(v); }
        case 5u: { return select(1.0, 0.0, v <= 0.0 || v >= 6.0); }
        default: { return 1.0; }
    }
}

// sigmoid(v) * sigmoid(-v), without the cancellation of 1 - sigmoid(v).
fn sigmoid_slope(v: f32) -> f32 {
    let t = exp(-abs(v));
    return t / ((1.0 + t) * (1.0 + t));
}
