// Activations, in f32: 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu, 5 relu6. Who uses them declares ACTIVATION:
// GEMMs for their epilogue (gemm.wgsl), and gated.wgsl.

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
        // Not clamp, which may turn NaN into a number.
        case 5u: { return select(select(v, 6.0, v > 6.0), 0.0, v < 0.0); }
        default: { return v; }
    }
}
