// Magnitude pruning and compression in one pass: of each group of four columns, the two with the largest sum of |w| over
// VECTOR rows stay, ties to the lower column, and are written as values and codes in the format of src/format.rs. Twins:
// `sparsify_rows` of src/prune/magnitude.rs, whose bytes these are, and src/reference/sparsify.rs.
//
// Scores are sums in f64, in the order of the rows, which integers act out here: WGSL has no f64, leaves it open how f32
// is rounded, and may take subnormals for zero. All NaNs rank alike, above infinity, so that a NaN is kept and seen.
//
// Tile: a thread owns a group of one block of VECTOR rows and reads it twice, to score it and to copy it; 8 neighbours
// own the groups of a word, so that they read 128 bytes of a row, and 32 blocks make a workgroup of 256, so that packed
// values, which lie by rows, are written in whole sectors. Dispatch grid: words, then runs of 32 blocks, over x and y.
// Workgroup memory: a code for each thread, shifted to its place; the first of 8 puts the word together. Residue: columns
// past the last one read as zero, groups past it have no values and code 0, and blocks past the last row do nothing.
// Padding of packed weights is never written: it is zero since they were uploaded.

const THREADS: u32 = 256u;
// |infinity| in f32; what is larger is NaN.
const INFINITE: u32 = 0x7f800000u;

@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read_write> values: array<u32>;
@group(0) @binding(3) var<storage, read_write> codes: array<u32>;

var<workgroup> nibbles: array<u32, THREADS>;

// The bits of an element.
fn element(row: u32, col: u32) -> u32 {
    if col >= params.cols {
        return 0u;
    }
    let e = row * params.cols + col;
    if HALVES {
        return (w[e / 2u] >> (16u * (e % 2u))) & 0xffffu;
    }
    return w[e];
}

// The f32 bits of the absolute value of an element.
fn magnitude(bits: u32) -> u32 {
    if !HALVES {
        return bits & 0x7fffffffu;
    }
    let h = bits & 0x7fffu;
    if h >= 0x7c00u {
        return ((h - 0x7c00u) << 13u) | INFINITE;
    }
    if h >= 0x400u {
        return (h << 13u) + (112u << 23u);
    }
    if h == 0u {
        return 0u;
    }
    // A subnormal: h * 2^-24.
    let top = firstLeadingBit(h);
    return (h << (23u - top)) + ((top + 102u) << 23u);
}

// Non-negative f64 are compared as the 64-bit integers of their bits, x the upper half.
fn at_least(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y >= b.y);
}

// A positive finite f32 as f64.
fn widened(bits: u32) -> vec2<u32> {
    var shift = 0u;
    if bits < 0x800000u {
        shift = 23u - firstLeadingBit(bits);
    }
    let normal = bits << shift;
    return vec2((normal >> 3u) + ((896u - shift) << 20u), normal << 29u);
}

// The sum of two finite f64 that are not negative and, if not zero, normal; rounded to nearest, ties to even.
fn sum64(p: vec2<u32>, q: vec2<u32>) -> vec2<u32> {
    let ordered = at_least(p, q);
    let x = select(q, p, ordered);
    let y = select(p, q, ordered);
    let apart = (x.x >> 20u) - (y.x >> 20u);
    // Less than half of the last place of x.
    if apart > 54u || (y.x | y.y) == 0u {
        return x;
    }
    // 53 bits, and three more below them: the last one stands for all that fell off.
    let x_high = (((x.x & 0xfffffu) | 0x100000u) << 3u) | (x.y >> 29u);
    let x_low = x.y << 3u;
    var y_high = (((y.x & 0xfffffu) | 0x100000u) << 3u) | (y.y >> 29u);
    var y_low = y.y << 3u;
    var lost = 0u;
    if apart >= 32u {
        lost = y_low | (y_high & ((1u << (apart - 32u)) - 1u));
        y_low = y_high >> (apart - 32u);
        y_high = 0u;
    } else if apart > 0u {
        lost = y_low & ((1u << apart) - 1u);
        y_low = (y_low >> apart) | (y_high << (32u - apart));
        y_high = y_high >> apart;
    }
    y_low |= select(0u, 1u, lost != 0u);
    var low = x_low + y_low;
    var high = x_high + y_high + select(0u, 1u, low < x_low);
    var exponent = x.x >> 20u;
    if high >= 0x1000000u {
        low = (low >> 1u) | (high << 31u) | (low & 1u);
        high = high >> 1u;
        exponent += 1u;
    }
    let rest = low & 7u;
    low = (low >> 3u) | (high << 29u);
    high = high >> 3u;
    if rest > 4u || (rest == 4u && (low & 1u) == 1u) {
        low += 1u;
        high += select(0u, 1u, low == 0u);
    }
    // The leading one adds to the exponent, a second one after rounding does too.
    return vec2(((exponent - 1u) << 20u) + high, low);
}

// A column of a block: the largest magnitude, and the sum of those that are finite.
struct Column {
    top: u32,
    sum: vec2<u32>,
}

fn including(column: Column, bits: u32) -> Column {
    let x = magnitude(bits);
    var sum = column.sum;
    if VECTOR > 1u && x > 0u && x < INFINITE {
        sum = sum64(sum, widened(x));
    }
    return Column(max(column.top, x), sum);
}

// What columns are ranked by.
fn score(column: Column) -> vec2<u32> {
    if VECTOR == 1u || column.top >= INFINITE {
        // Of one row, the magnitude itself. Of more, above every finite sum: those of 128 f32 begin with 0x485fffff at
        // most.
        return vec2(min(column.top, INFINITE + 1u), 0u);
    }
    return column.sum;
}

fn two_of(a: bool, b: bool, c: bool) -> bool {
    return (a && b) || (a && c) || (b && c);
}

fn pair_of(n: vec4<bool>) -> bool {
    return (n.x && n.y) || (n.x && n.z) || (n.x && n.w) || (n.y && n.z) || (n.y && n.w) || (n.z && n.w);
}

// Writes the values of a group of some rows, and returns its code.
fn sparsify(row0: u32, rows: u32, group: u32) -> u32 {
    let col = 4u * group;
    var a = Column();
    var b = Column();
    var c = Column();
    var d = Column();
    for (var r = 0u; r < rows; r++) {
        a = including(a, element(row0 + r, col));
        b = including(b, element(row0 + r, col + 1u));
        c = including(c, element(row0 + r, col + 2u));
        d = including(d, element(row0 + r, col + 3u));
    }
    let ab = at_least(score(a), score(b));
    let ac = at_least(score(a), score(c));
    let ad = at_least(score(a), score(d));
    let bc = at_least(score(b), score(c));
    let bd = at_least(score(b), score(d));
    let cd = at_least(score(c), score(d));
    // Of four columns those stay that win two of their three comparisons or more.
    let kept = vec4(two_of(ab, ac, ad), two_of(!ab, bc, bd), two_of(!ac, !bc, cd), two_of(!ad, !bd, !cd));
    // Non-zeros are coded, and in an under-full group position 2, then 3, where they are missing.
    var coded = kept & (vec4(a.top, b.top, c.top, d.top) != vec4(0u));
    coded.z = coded.z || !pair_of(coded);
    coded.w = coded.w || !pair_of(coded);
    let first = select(select(2u, 1u, coded.y), 0u, coded.x);
    let second = select(select(1u, 2u, coded.z), 3u, coded.w);
    let keeps_first = select(select(kept.z, kept.y, coded.y), kept.x, coded.x);
    let keeps_second = select(select(kept.y, kept.z, coded.z), kept.w, coded.w);
    for (var r = 0u; r < rows; r++) {
        let lower = select(0u, element(row0 + r, col + first), keeps_first);
        let upper = select(0u, element(row0 + r, col + second), keeps_second);
        let at = pair_at(row0 + r, group);
        if HALVES {
            values[at] = lower | (upper << 16u);
        } else {
            values[2u * at] = lower;
            values[2u * at + 1u] = upper;
        }
    }
    return first | (second << 2u);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let id = workgroup.y * grid.x + workgroup.x;
    let blocks = (params.rows + VECTOR - 1u) / VECTOR;
    if id >= words() * ((blocks + 31u) / 32u) {
        return;
    }
    let word = id % words();
    let block = id / words() * 32u + lane / 8u;
    let group = word * 8u + lane % 8u;
    var nibble = 0u;
    if block < blocks && group < groups() {
        nibble = sparsify(block * VECTOR, min(VECTOR, params.rows - block * VECTOR), group);
    }
    nibbles[lane] = nibble << (4u * (lane % 8u));
    workgroupBarrier();
    if lane % 8u == 0u && block < blocks {
        var bits = 0u;
        for (var g = 0u; g < 8u; g++) {
            bits |= nibbles[lane + g];
        }
        codes[word_at(block, word)] = bits;
    }
}
