// The loss of logits beside others: loss[row][t] = weight · Σ p·ln(p/q) for each token t that is no padding, zero for
// the others, with p the softmax of wanted[t] and q that of x[t]; and with GRADIENT that of their sum, dx[t] = weight ·
// (q - p), added to what is there with ADD. What is added up is q - p - p·ln(q/p): the sum is the same, as p and q each
// add up to 1, and no term is negative. Twin: src/reference/kl_divergence.rs.
//
// Tile: a workgroup of 256 to a token, each lane of which takes every 256th logit, twice: for the largest logits and
// the sums of exponentials relative to them, and for the loss and its gradient. Dispatch grid: workgroups over x and y.
// Workgroup memory: of each lane the largest logits and the sums, of x and of wanted; then its part of the loss. Both
// are put together by halves. Residue: workgroups past the last token do nothing.

override GRADIENT: bool = true;
override ADD: bool = true;

const THREADS: u32 = 256u;
// What a lane without logits has: below all that are finite, and finite itself.
const LOWEST: f32 = -3.4028234e38;

struct Params {
    tokens: u32,
    width: u32,
    seq: u32,
    row: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> wanted: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> weight: array<f32>;
@group(0) @binding(5) var<storage, read_write> loss: array<f32>;
@group(0) @binding(6) var<storage, read_write> dx: array<f32>;

// The largest logits (of x, of wanted), and the sums of exponentials relative to them.
var<workgroup> parts: array<vec4<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let token = workgroup.y * grid.x + workgroup.x;
    if token >= params.tokens {
        return;
    }
    let start = token * params.width;
    let real = token % params.seq < lengths[token / params.seq];

    var highest = vec2(LOWEST);
    var sums = vec2<f32>();
    if real {
        for (var column = lane; column < params.width; column += THREADS) {
            let logits = vec2(x[start + column], wanted[start + column]);
            // The smaller relative to the larger. A logit that is no number is not above, and comes into the sum.
            let share = exp(-abs(logits - highest));
            let above = logits > highest;
            sums = select(sums + share, sums * share + 1.0, above);
            highest = select(highest, logits, above);
        }
    }
    parts[lane] = vec4(highest, sums);
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            let a = parts[lane];
            let b = parts[lane + half];
            let both = max(a.xy, b.xy);
            parts[lane] = vec4(both, a.zw * exp(a.xy - both) + b.zw * exp(b.xy - both));
        }
    }
    workgroupBarrier();
    let totals = parts[0].xy + log(parts[0].zw);
    // Before parts are overwritten.
    workgroupBarrier();

    let scale = weight[0];
    var sum = 0.0;
    if real {
        for (var column = lane; column < params.width; column += THREADS) {
            let logs = vec2(x[start + column], wanted[start + column]) - totals;
            let shares = exp(logs);
            // What is impossible where it should be adds nothing, whatever its logarithm is.
            sum += shares.x - shares.y - select(0.0, shares.y * (logs.x - logs.y), shares.y > 0.0);
            if GRADIENT {
                var gradient = scale * (shares.x - shares.y);
                if ADD {
                    gradient += dx[start + column];
                }
                dx[start + column] = gradient;
            }
        }
    } else if GRADIENT && !ADD {
        for (var column = lane; column < params.width; column += THREADS) {
            dx[start + column] = 0.0;
        }
    }
    parts[lane] = vec4(sum, 0.0, 0.0, 0.0);
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            parts[lane] += parts[lane + half];
        }
    }
    if lane == 0u {
        loss[params.row * params.tokens + token] = scale * parts[0].x;
    }
}
