// The loss of states beside others: loss[row][t] = weight / T · |x[t] - wanted[t]|² / |wanted[t]|² for each of the T tokens
// that are no padding, zero for the others; and with GRADIENT that of their sum, dx[t] = 2·weight / T · (x[t] - wanted[t]) /
// |wanted[t]|², added to what is there with ADD. Twin: src/reference/relative_error.rs.
//
// Tile: 8 tokens to a workgroup of 256, 32 neighbouring lanes to a token, each of which takes every 32nd feature. Dispatch
// grid: workgroups over x and y. Workgroup memory: the 32 partial sums of each token, of distances and of lengths apart.
// Residue: tokens past the last one repeat it and store nothing.

override GRADIENT: bool = true;
override ADD: bool = true;

const THREADS: u32 = 256u;
const TOKENS: u32 = THREADS / 32u;
// The square of a length that is divided by where there is less.
const LEAST: f32 = 1e-12;

struct Params {
    tokens: u32,
    width: u32,
    seq: u32,
    batch: u32,
    row: u32,
    weight: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> wanted: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

var<workgroup> parts: array<vec2<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    if id > (params.tokens - 1u) / TOKENS {
        return;
    }
    let place = id * TOKENS + lane / 32u;
    let token = min(place, params.tokens - 1u);
    let start = token * params.width;
    let real = token % params.seq < lengths[token / params.seq];

    var sums = vec2<f32>();
    if real {
        for (var column = lane % 32u; column < params.width; column += 32u) {
            let target_state = wanted[start + column];
            let off = x[start + column] - target_state;
            sums += vec2(off * off, target_state * target_state);
        }
    }
    parts[lane] = sums;
    workgroupBarrier();
    let first = lane / 32u * 32u;
    sums = vec2<f32>();
    for (var l = 0u; l < 32u; l++) {
        sums += parts[first + l];
    }
    var count = 0u;
    for (var sequence = 0u; sequence < params.batch; sequence++) {
        count += min(lengths[sequence], params.seq);
    }
    var scale = params.weight / f32(max(count, 1u)) / max(sums.y, LEAST);
    if !real {
        scale = 0.0;
    }

    if place < params.tokens {
        if lane % 32u == 0u {
            // A distance that is infinite or no number stays so, but not that of padding.
            loss[params.row * params.tokens + token] = select(0.0, scale * sums.x, real);
        }
        if GRADIENT {
            for (var column = lane % 32u; column < params.width; column += 32u) {
                var gradient = 0.0;
                if real {
                    gradient = 2.0 * scale * (x[start + column] - wanted[start + column]);
                }
                if ADD {
                    gradient += dx[start + column];
                }
                dx[start + column] = gradient;
            }
        }
    }
}
