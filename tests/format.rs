//! The format against other people's files, against its own specification, and against files that lie.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;
use sparse24::format::{code_of, positions_of};
use sparse24::io::{self, Entry, save, save_matrices, save_sparse24, write_atomically};
use sparse24::{DType, Elements, Error, Mask, Mask24, Matrix, Sparse24, TensorFile, VectorLen, prune};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

fn vectors(name: &str) -> TensorFile {
    TensorFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name)).unwrap()
}

fn v(v: usize) -> VectorLen {
    VectorLen::new(v).unwrap()
}

/// The metadata in the order of a file, where it can be compared with metadata of narrower words.
fn meta_bytes(s: &Sparse24) -> Vec<u8> {
    s.meta().iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A matrix of arbitrary bits, among them every special number: NaN, infinities, subnormals, both zeros.
fn any_bits(rows: usize, cols: usize, dtype: DType, seed: u64) -> Matrix {
    let mut rng = Pcg32::new(seed, 1);
    let specials = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, -6e-8, 1e-40];
    let mut bytes = Vec::new();
    for _ in 0..rows * cols {
        let bits = rng.next_u32();
        let element = match bits % 4 {
            0 => Elements::from_f32(dtype, &[specials[bits as usize / 4 % specials.len()]]),
            _ => Elements::from_bytes(dtype, &rng.next_u32().to_le_bytes()[..dtype.bytes()]).unwrap(),
        };
        bytes.extend_from_slice(element.as_bytes());
    }
    Matrix::new(rows, cols, Elements::from_bytes(dtype, &bytes).unwrap()).unwrap()
}

/// A 2:4 mask with under-full groups: a random pattern, of which `density` eighths of the bits stay.
fn any_mask(rows: usize, cols: usize, vector: VectorLen, density: u32, seed: u64) -> Mask24 {
    let full = prune::random(rows, cols, vector, seed).unwrap();
    let mut rng = Pcg32::new(seed, 2);
    let thin = Mask::from_fn(rows, cols, |r, c| full.mask().get(r, c) && rng.next_u32() >> 29 < density);
    Mask24::new(thin.unwrap(), vector).unwrap()
}

fn raw(w: &Matrix) -> Vec<u8> {
    w.elements().as_bytes().to_vec()
}

/// The bits of an element with -0.0 made +0.0, the one difference that compression may make.
fn bits(w: &Matrix, row: usize, col: usize) -> Vec<u8> {
    let size = w.dtype().bytes();
    let at = (row * w.cols() + col) * size;
    if w.get(row, col) == 0.0 { vec![0; size] } else { w.elements().as_bytes()[at..at + size].to_vec() }
}

fn assert_same(a: &Matrix, b: &Matrix) {
    assert_eq!((a.rows(), a.cols(), a.dtype()), (b.rows(), b.cols(), b.dtype()));
    for row in 0..if a.cols() == 0 { 0 } else { a.rows() } {
        for col in 0..a.cols() {
            assert_eq!(bits(a, row, col), bits(b, row, col), "row {row}, column {col}");
        }
    }
}

// ---- other people's files ----

#[test]
fn values_and_codes_are_those_of_torch() {
    for name in ["matrix_f16_64x128.safetensors", "matrix_bf16_32x64.safetensors"] {
        let file = vectors(name);
        let (dense, kept) = (file.matrix("dense").unwrap(), file.bytes("mask24").unwrap());
        let mask = Mask::from_fn(dense.rows(), dense.cols(), |r, c| kept[r * dense.cols() + c] == 1).unwrap();
        let mask = Mask24::new(mask, VectorLen::ONE).unwrap();
        assert_eq!(mask, prune::magnitude(&dense, VectorLen::ONE).unwrap(), "{name}: magnitudes are distinct");

        let s = Sparse24::compress(&dense, &mask).unwrap();
        // k is a multiple of 32 here, so two of torch's 16-bit words are one of ours.
        assert_eq!(meta_bytes(&s), file.bytes("cutlass.meta_logical").unwrap(), "{name}");
        assert_eq!(s.values().as_bytes(), file.matrix("cutlass.values").unwrap().elements().as_bytes(), "{name}");
        assert_eq!(
            s.values().as_bytes(),
            file.matrix("ct24.layer.compressed").unwrap().elements().as_bytes(),
            "{name}"
        );
        let pruned = file.matrix("pruned24").unwrap();
        assert_eq!(s.decompress().elements().as_bytes(), pruned.elements().as_bytes(), "{name}");
        assert_eq!(s.mask().unwrap(), mask, "{name}");
        assert_eq!(Sparse24::from_dense(&pruned, VectorLen::ONE).unwrap(), s, "{name}");
    }
    let file = vectors("matrix_f16_64x128.safetensors");
    let s = Sparse24::from_dense(&file.matrix("pruned24").unwrap(), VectorLen::ONE).unwrap();
    assert_eq!(s.meta()[0] & 0xffff, 0x8c4c, "the example of the specification");
}

#[test]
fn under_full_groups_are_coded_as_torch_codes_them() {
    let file = vectors("edge_le2_f16_32x64.safetensors");
    let pruned = file.matrix("pruned24").unwrap();
    let s = Sparse24::from_dense(&pruned, VectorLen::ONE).unwrap();
    assert_eq!(meta_bytes(&s), file.bytes("cutlass.meta_logical").unwrap());
    assert_eq!(s.values().as_bytes(), file.matrix("cutlass.values").unwrap().elements().as_bytes());
    assert_same(&s.decompress(), &pruned);
}

#[test]
fn values_are_those_of_the_bitmask_form() {
    // f32, which torch stores as 1:2, and rows of 12 columns, which leave a word of metadata half empty.
    for (name, prefix) in [("matrix_f32_32x64.safetensors", "ct24.layer"), ("ct24_f16_5x12.safetensors", "ct24.layer")]
    {
        let file = vectors(name);
        let pruned = file.matrix("pruned24").unwrap();
        let s = Sparse24::from_dense(&pruned, VectorLen::ONE).unwrap();
        assert_eq!(s.decompress().elements().as_bytes(), pruned.elements().as_bytes(), "{name}");
        let (mask, bitmask) = (s.mask().unwrap(), file.bytes(&format!("{prefix}.bitmask")).unwrap());
        if mask.mask().count() == Mask::of_nonzeros(&pruned).unwrap().count() {
            let compressed = file.matrix(&format!("{prefix}.compressed")).unwrap();
            assert_eq!(s.values().as_bytes(), compressed.elements().as_bytes(), "{name}");
            let per_row = pruned.cols().div_ceil(8);
            for (row, bytes) in bitmask.chunks(per_row).enumerate() {
                let words = &mask.mask().words()[row * mask.mask().words_per_row()..][..mask.mask().words_per_row()];
                let ours: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).take(per_row).collect();
                assert_eq!(ours, bytes, "{name}: row {row}");
            }
        } else {
            assert_eq!(name, "ct24_f16_5x12.safetensors", "only this one has under-full groups");
        }
    }
}

#[test]
fn over_full_groups_are_refused_where_torch_drops_weights() {
    let file = vectors("over_dense_f16_32x64.safetensors");
    let dense = file.matrix("dense").unwrap();
    let error = Sparse24::from_dense(&dense, VectorLen::ONE).unwrap_err();
    assert!(
        error.is_over_full() && error.place() == Some((0, 7)) && error.to_string().contains(": 3 positions"),
        "{error}"
    );
    assert!(error.to_string().starts_with("row 0, group 7 (columns 28..32): 3 positions"), "{error}");

    // With those groups emptied, the others (all eleven patterns of at most two) have torch's codes.
    let non_zero = Mask::of_nonzeros(&dense).unwrap();
    let fits = |row, group| non_zero.group(row, group).count_ones() <= 2;
    let mask = Mask::from_fn(32, 64, |r, c| fits(r, c / 4)).unwrap();
    let s = Sparse24::from_dense(&mask.apply(&dense).unwrap(), VectorLen::ONE).unwrap();
    let (ours, theirs) = (meta_bytes(&s), file.bytes("cutlass.meta_logical").unwrap());
    let code = |bytes: &[u8], row: usize, group: usize| bytes[row * 8 + group / 2] >> (4 * (group % 2)) & 0xf;
    let mut seen = [false; 16];
    for (row, group) in (0..32).flat_map(|r| (0..16).map(move |g| (r, g))).filter(|&(r, g)| fits(r, g)) {
        assert_eq!(code(&ours, row, group), code(&theirs, row, group), "row {row}, group {group}");
        seen[non_zero.group(row, group) as usize] = true;
    }
    assert_eq!(seen.iter().filter(|&&s| s).count(), 11);
}

// ---- the specification ----

#[test]
fn the_code_table_is_the_one_specified() {
    // Written out a second time, from the specification.
    let table = [
        (0b0000, 0xE),
        (0b0001, 0x8),
        (0b0010, 0x9),
        (0b0100, 0xE),
        (0b1000, 0xE),
        (0b0011, 0x4),
        (0b0101, 0x8),
        (0b0110, 0x9),
        (0b1001, 0xC),
        (0b1010, 0xD),
        (0b1100, 0xE),
    ];
    for bits in 0..16u8 {
        assert_eq!(code_of(bits), table.iter().find(|t| t.0 == bits).map(|t| t.1), "{bits:04b}");
    }
    let legal = [(4, (0, 1)), (8, (0, 2)), (9, (1, 2)), (0xC, (0, 3)), (0xD, (1, 3)), (0xE, (2, 3))];
    for code in 0..=255u8 {
        assert_eq!(positions_of(code), legal.iter().find(|l| l.0 == code).map(|l| l.1), "{code:x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compression_loses_nothing(
        // Past two blocks of the longest vector once in a while, past two words of metadata, and every residue.
        m in prop_oneof![0..12usize, 0..12usize, 120..260usize],
        k in 0..75usize,
        vector in prop::sample::select(VectorLen::ALL.to_vec()),
        dtype in prop::sample::select(DTYPES.to_vec()),
        density in 0..=8u32,
        seed: u64,
    ) {
        let (w, mask) = (any_bits(m, k, dtype, seed), any_mask(m, k, vector, density, seed));
        let s = Sparse24::compress(&w, &mask).unwrap();
        let pruned = mask.mask().apply(&w).unwrap();
        let dense = s.decompress();
        assert_same(&dense, &pruned);

        // Shapes and codes, from their definition.
        let groups = k.div_ceil(4);
        prop_assert_eq!((s.meta_rows(), s.meta_cols()), (m.div_ceil(vector.get()), k.div_ceil(32)));
        prop_assert_eq!(s.values().len(), m * 2 * groups);
        prop_assert_eq!(s.meta().len(), s.meta_rows() * s.meta_cols());
        prop_assert_eq!(s.bytes(), s.values().len() * dtype.bytes() + s.meta().len() * 4);
        for block in 0..s.meta_rows() {
            for group in 0..8 * s.meta_cols() {
                let mut union: Vec<usize> = Vec::new();
                for row in block * vector.get()..m.min((block + 1) * vector.get()) {
                    let non_zero = |&i: &usize| 4 * group + i < k && pruned.get(row, 4 * group + i) != 0.0;
                    union.extend((0..4).filter(non_zero));
                }
                union.sort();
                union.dedup();
                let code = match union[..] {
                    _ if group >= groups => 0,
                    [] | [2] | [3] => 0xE,
                    [0] => 8,
                    [1] => 9,
                    [a, b] => (a | b << 2) as u32,
                    _ => panic!("over-full: {union:?}"),
                };
                prop_assert_eq!(s.meta()[block * s.meta_cols() + group / 8] >> (4 * (group % 8)) & 0xf, code);
            }
        }

        // The coded positions cover the non-zeros, two to a group, the same for a block.
        let coded = s.mask().unwrap();
        prop_assert_eq!(coded.vector(), vector);
        prop_assert!(Sparse24::vector_len_of(coded.mask()) >= Some(vector));
        for row in 0..if k == 0 { 0 } else { m } {
            for group in 0..groups {
                let (a, b) = s.code(row, group);
                let bits = (1u8 << a | 1 << b) & (0xf >> (4 - (k - 4 * group).min(4)));
                prop_assert_eq!(coded.mask().group(row, group), bits);
            }
            for col in (0..k).filter(|&col| pruned.get(row, col) != 0.0) {
                prop_assert!(coded.mask().get(row, col));
            }
        }

        // What was decompressed compresses again, by bits: NaN is not equal to itself.
        let again = Sparse24::from_dense(&dense, vector).unwrap();
        prop_assert_eq!(again.meta(), s.meta());
        prop_assert_eq!(again.values().as_bytes(), s.values().as_bytes());
        let (m2, k2, vector2, values, meta) = again.into_parts();
        let again = Sparse24::from_parts(m2, k2, vector2, values, meta).unwrap();
        prop_assert_eq!(raw(&again.decompress()), raw(&dense));
        for other in VectorLen::ALL {
            let blocks = s.meta().chunks(s.meta_cols().max(1) * other.get().div_ceil(vector.get()));
            let shared = { blocks }.all(|rows| rows.chunks(s.meta_cols()).all(|row| row == &rows[..s.meta_cols()]));
            prop_assert!(shared || other > vector);
            match s.clone().with_vector(other) {
                Ok(t) => {
                    prop_assert!(shared);
                    prop_assert_eq!(t.mask().unwrap().mask().words().to_vec(), coded.mask().words());
                    prop_assert_eq!(raw(&t.decompress()), raw(&dense));
                    let (m, k, vector, values, meta) = t.into_parts();
                    prop_assert!(Sparse24::from_parts(m, k, vector, values, meta).is_ok());
                }
                Err(e) => prop_assert!(!shared, "{}", e),
            }
        }
    }

    #[test]
    fn the_vector_length_of_a_mask_is_the_largest_that_is_accepted(
        rows in 0..140usize, cols in 0..70usize,
        vector in prop::sample::select(VectorLen::ALL.to_vec()),
        stray in prop::option::of((0..140usize, 0..70usize)),
        seed: u64,
    ) {
        let full = prune::random(rows, cols, vector, seed).unwrap();
        let mask = Mask::from_fn(rows, cols, |r, c| full.mask().get(r, c) || stray == Some((r, c))).unwrap();
        let accepted = VectorLen::ALL.into_iter().filter(|&v| Mask24::new(mask.clone(), v).is_ok()).max();
        prop_assert_eq!(Sparse24::vector_len_of(&mask), accepted);
    }
}

#[test]
fn negative_zero_keeps_its_place_but_makes_none() {
    // Column 1 is coded because it is non-zero, column 3 because the group is full with it; -0.0 in column 0 is
    // dropped.
    let w = Matrix::from_f32(2, 4, &[-0.0, 1.0, -0.0, -0.0, 0.0, -0.0, 0.0, 2.0]).unwrap();
    let s = Sparse24::from_dense(&w, v(2)).unwrap();
    assert_eq!(s.meta(), [0xD]);
    let bits: Vec<u32> = s.values().to_f32().iter().map(|x| x.to_bits()).collect();
    assert_eq!(bits, [1f32, -0.0, -0.0, 2.0].map(f32::to_bits));
    // A masked-out element is +0.0 even where its position is coded.
    let mask = Mask::from_fn(2, 4, |r, c| (r, c) != (0, 3) && (c == 1 || c == 3)).unwrap();
    let s = Sparse24::compress(&w, &Mask24::new(mask, v(2)).unwrap()).unwrap();
    assert_eq!(s.values().to_f32()[1].to_bits(), 0);
}

#[test]
fn the_union_of_a_block_is_what_must_fit() {
    let row = |positions: &[usize]| (0..4).map(|i| f32::from(u8::from(positions.contains(&i)))).collect::<Vec<_>>();
    // Rows 2 and 3 do not go together; 4 starts a block of its own.
    let rows = [row(&[0, 1]), row(&[1]), row(&[0, 2]), row(&[3]), row(&[1, 3])].concat();
    let w = Matrix::from_f32(5, 4, &rows).unwrap();
    assert!(Sparse24::from_dense(&w, v(1)).is_ok());
    let error = Sparse24::from_dense(&w, v(2)).unwrap_err();
    assert!(
        error.is_over_full() && error.place() == Some((2, 0)) && error.to_string().contains(": 3 positions"),
        "{error}"
    );
    assert_eq!(Sparse24::vector_len_of(&Mask::of_nonzeros(&w).unwrap()), Some(v(1)));
}

#[test]
fn shapes_of_no_elements_are_matrices() {
    // Those with more rows or columns than could be walked through come from headers, which may claim anything.
    let shapes = [(0, 0), (0, 5), (5, 0), (usize::MAX, 0), (0, usize::MAX)];
    for ((m, k), vector) in shapes.into_iter().flat_map(|s| [v(1), v(128)].map(|v| (s, v))) {
        let w = Matrix::zeros(m, k, DType::F16).unwrap();
        let s = Sparse24::compress(&w, &prune::random(m, k, vector, 0).unwrap()).unwrap();
        assert_eq!((s.m(), s.k(), s.bytes()), (m, k, 0));
        assert_eq!(s.decompress(), w);
        assert_eq!(s.mask().unwrap().mask().count(), 0);
        assert_eq!(s.clone().with_vector(v(1)).unwrap().m(), m);
        assert_eq!(prune::magnitude(&w, vector).unwrap(), s.mask().unwrap());
        let (m, k, vector, values, meta) = s.clone().into_parts();
        assert_eq!(Sparse24::from_parts(m, k, vector, values, meta).unwrap(), s);
    }
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let parts = |m, k, vector, values: usize, meta: &[u32]| {
        Sparse24::from_parts(m, k, v(vector), Elements::zeros(DType::F32, values), meta.to_vec())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(parts(2, 8, 1, 7, &[0x44, 0x44]), "values has shape [7], expected [2, 4]");
    assert_eq!(parts(2, 8, 1, 8, &[0x44]), "meta has shape [1], expected [2, 1]");
    assert_eq!(parts(2, 8, 2, 8, &[0x44, 0x44]), "meta has shape [2], expected [1, 1]");
    assert_eq!(parts(2, 8, 1, 8, &[0x44, 0x54]), "meta row 1, group 1: code 0x5 is not one of 4, 8, 9, c, d, e");
    assert_eq!(parts(2, 8, 1, 8, &[0x44, 0x4]), "meta row 1, group 1: code 0x0 is not one of 4, 8, 9, c, d, e");
    assert_eq!(parts(2, 8, 2, 8, &[0x444]), "meta: row 0, group 2 is padding and must be zero");
    assert!(parts(usize::MAX, 8, 1, 8, &[]).starts_with("values overflows: "));
    // Nine columns: in the last group only position 0 exists.
    let parts = |code: u32, pair: [f32; 2]| {
        let values = [[1.0, 2.0], [3.0, 4.0], pair].concat();
        Sparse24::from_parts(1, 9, v(1), Elements::F32(values), vec![0x44 | code << 8])
    };
    assert!(parts(0x8, [5.0, 0.0]).is_ok() && parts(0xE, [0.0, 0.0]).is_ok() && parts(0x4, [0.0, 0.0]).is_ok());
    for (code, pair) in [(0x8, [5.0, 6.0]), (0xE, [0.0, 6.0]), (0xE, [5.0, 0.0]), (0x4, [0.0, f32::NAN])] {
        let error = parts(code, pair).unwrap_err().to_string();
        assert_eq!(error, "values: row 0, group 2 is padding and must be zero", "{code:x} {pair:?}");
    }
    // Any legal code will do where a value is zero.
    let odd = Sparse24::from_parts(1, 4, v(1), Elements::F32(vec![0.0, 7.0]), vec![0x9]).unwrap();
    assert_eq!(odd.decompress().elements().to_f32(), [0.0, 0.0, 7.0, 0.0]);
}

#[test]
fn every_flipped_bit_shows() {
    // Distinct non-zero values and no padding but for the metadata's, so that every stored bit means something.
    let w = Matrix::from_f32(4, 12, &(1..=48).map(|x| x as f32).collect::<Vec<_>>()).unwrap();
    for dtype in DTYPES {
        for vector in [1, 2, 4] {
            let mask = prune::random(4, 12, v(vector), 3).unwrap();
            let s = Sparse24::compress(&w.cast(dtype), &mask).unwrap();
            let (m, k, vector, values, meta) = s.clone().into_parts();
            for bit in 0..32 * meta.len() {
                let mut meta = meta.clone();
                meta[bit / 32] ^= 1 << (bit % 32);
                if let Ok(t) = Sparse24::from_parts(m, k, vector, values.clone(), meta) {
                    assert_ne!(t.decompress(), s.decompress(), "meta bit {bit}");
                    assert_ne!(t.mask().unwrap(), mask, "meta bit {bit}");
                }
            }
            for bit in 0..8 * values.as_bytes().len() {
                let mut bytes = values.as_bytes().to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let values = Elements::from_bytes(dtype, &bytes).unwrap();
                let t = Sparse24::from_parts(m, k, vector, values, meta.clone()).unwrap();
                let (t, s) = (t.decompress(), s.decompress());
                let differ = std::iter::zip(t.elements().as_bytes(), s.elements().as_bytes()).filter(|(a, b)| a != b);
                assert_eq!(differ.count(), 1, "value bit {bit}");
            }
            for (row, col) in (0..4).flat_map(|r| (0..12).map(move |c| (r, c))) {
                let flipped = Mask::from_fn(4, 12, |r, c| mask.mask().get(r, c) ^ ((r, c) == (row, col))).unwrap();
                match Mask24::new(flipped, vector) {
                    Ok(flipped) => assert_ne!(Sparse24::compress(&w.cast(dtype), &flipped).unwrap(), s),
                    Err(e) => assert!(e.is_over_full(), "{e}"),
                }
            }
        }
    }
}

#[test]
fn a_mask_of_another_shape_is_refused() {
    let w = Matrix::zeros(4, 8, DType::F32).unwrap();
    let mask = prune::random(8, 4, v(1), 0).unwrap();
    let error = Sparse24::compress(&w, &mask).unwrap_err().to_string();
    assert_eq!(error, "mask has shape [8, 4], expected [4, 8]");
}

// ---- files ----

/// A safetensors file of the given header and data, byte for byte.
fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    fs::write(path, bytes).unwrap();
}

fn names_in(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn files_hold_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let sizes = [(0, 0), (0, 9), (3, 0), (1, 1), (5, 13), (130, 64)];
    let mut stored = Vec::new();
    for (i, &(m, k)) in sizes.iter().enumerate() {
        for (dtype, vector) in [(DType::F32, v(1)), (DType::F16, v(2)), (DType::Bf16, v(128))] {
            let s = Sparse24::compress(&any_bits(m, k, dtype, 5), &any_mask(m, k, vector, 6, i as u64)).unwrap();
            stored.push((format!("layer.{i}.{dtype}"), s));
        }
    }
    let list: Vec<_> = stored.iter().map(|(name, s)| (name.as_str(), s)).collect();
    save_sparse24(&path, &list).unwrap();
    let first = fs::read(&path).unwrap();
    save_sparse24(&path, &list.iter().rev().copied().collect::<Vec<_>>()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first, "the same entries make the same bytes");
    assert_eq!(names_in(dir.path()), std::slice::from_ref(&path), "no temporary file is left");

    let file = TensorFile::open(&path).unwrap();
    let mut names: Vec<_> = stored.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    assert_eq!(file.sparse24_names().unwrap(), names);
    for (name, s) in &stored {
        let t = file.sparse24(name).unwrap();
        assert_eq!((t.m(), t.k(), t.vector(), t.dtype(), t.meta()), (s.m(), s.k(), s.vector(), s.dtype(), s.meta()));
        assert_eq!(t.values().as_bytes(), s.values().as_bytes(), "{name}");
    }
    // As specified, read by the library that every other reader uses.
    let foreign = safetensors::SafeTensors::deserialize(&first).unwrap();
    let meta = foreign.tensor("layer.4.f16.meta").unwrap();
    assert_eq!((meta.dtype(), meta.shape()), (safetensors::Dtype::U32, &[3, 1][..]));
    let values = foreign.tensor("layer.4.f16.values").unwrap();
    assert_eq!((values.dtype(), values.shape()), (safetensors::Dtype::F16, &[5, 8][..]));
    let key = |key: &str| file.metadata()[key].as_str();
    let keys = ["format", "version", "layer.4.f16.shape", "layer.4.f16.vector"].map(key);
    assert_eq!(keys, ["sparse24", "1", "5,13", "2"]);
}

#[test]
fn other_tensors_are_copied_and_dense_ones_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let header = r#"{"ids":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},"flag":{"dtype":"BOOL","shape":[],"data_offsets":[16,17]}}"#;
    write_raw(&from, header, b"abcdefghijklmnopX");
    let source = TensorFile::open(&from).unwrap();
    let w = any_bits(3, 5, DType::Bf16, 9);
    save(&to, &[("ids", Entry::Copy(&source)), ("w", Entry::Matrix(&w)), ("flag", Entry::Copy(&source))]).unwrap();
    let file = TensorFile::open(&to).unwrap();
    assert_eq!(file.bytes("ids").unwrap(), b"abcdefghijklmnop");
    assert_eq!(file.bytes("flag").unwrap(), b"X");
    assert_eq!(file.matrix("w").unwrap().elements().as_bytes(), w.elements().as_bytes());
    let info = file.info("ids").unwrap();
    assert_eq!((info.dtype, &info.shape[..], info.bytes), (safetensors::Dtype::I64, &[2][..], 16));
    assert_eq!(file.sparse24_names().unwrap(), Vec::<String>::new());
    // Over the file that is being read, which stays readable.
    save(&from, &[("flag", Entry::Copy(&source))]).unwrap();
    assert_eq!(source.bytes("ids").unwrap(), b"abcdefghijklmnop");
    assert_eq!(TensorFile::open(&from).unwrap().tensors().count(), 1);
    save_matrices(&to, &[]).unwrap();
    assert_eq!(TensorFile::open(&to).unwrap().tensors().count(), 0);
}

#[test]
fn metadata_of_others_is_no_claim() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let tensor = r#""w.values":{"dtype":"F32","shape":[1,4],"data_offsets":[0,16]}"#;
    // Null is none, as for the safetensors library.
    for (metadata, entries) in [
        ("null", 0),
        (r#"{"x.vector":"12","x.shape":"a"}"#, 2),
        (r#"{"format":"pt","w.vector":"12"}"#, 2),
        (r#"{"format":"sparse24"}"#, 1),
        (r#"{"format":"sparse24","version":"1","x.vector":"12","x.shape":"8,8"}"#, 4),
    ] {
        write_raw(&path, &format!(r#"{{"__metadata__":{metadata},{tensor}}}"#), &[0; 16]);
        let bytes = fs::read(&path).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok(), "{metadata}");
        let file = TensorFile::open(&path).unwrap();
        assert_eq!((file.sparse24_names().unwrap(), file.metadata().len()), (vec![], entries), "{metadata}");
        assert_eq!(io::Source::open(&path).unwrap().items().count(), 1);
    }
    // Half a matrix is a lie still, and so is another version.
    for (metadata, says) in [
        (
            r#"{"format":"sparse24","version":"1","w.vector":"1","w.shape":"1,8"}"#,
            "tensor w.meta: there is no such tensor",
        ),
        (r#"{"format":"sparse24","version":"2"}"#, "sparse24 version \"2\""),
        (r#"{"format":"sparse24","w.vector":"1"}"#, "a sparse24 file without a version"),
    ] {
        write_raw(&path, &format!(r#"{{"__metadata__":{metadata},{tensor}}}"#), &[0; 16]);
        let error = io::Source::open(&path).unwrap_err().to_string();
        assert!(error.contains(says), "{metadata}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn written_files_are_not_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
    write_atomically(&ours, |out| out.write_all(b"x")).unwrap();
    fs::write(&plain, b"x").unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&plain));
}

#[test]
fn files_that_lie_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("liar.safetensors");
    let t = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    // Header, bytes of data, and what the message must say after the path.
    let cases = [
        ("not json".into(), 0, "header is no JSON object"),
        ("[1]".into(), 0, "header is no JSON object"),
        (r#"{"__metadata__":{"a":1}}"#.into(), 0, "__metadata__: "),
        (r#"{"odd":7}"#.into(), 0, "tensor odd: "),
        (format!(r#"{{"odd":{}}}"#, t("F99", "[1]", 0, 4)), 4, "tensor odd: unknown variant `F99`"),
        (format!(r#"{{"odd":{}}}"#, t("F32", "[-1]", 0, 4)), 4, "tensor odd: invalid value: integer `-1`"),
        (
            format!(r#"{{"odd":{}}}"#, t("F32", "[2,2]", 0, 12)),
            12,
            "tensor odd: F32 of shape [2, 2] does not fit its 12 bytes",
        ),
        (
            format!(r#"{{"odd":{}}}"#, t("F32", "[4294967296,4294967296]", 0, 0)),
            0,
            "tensor odd: F32 of shape [4294967296, 4294967296] does not fit its 0 bytes: overflow",
        ),
        (format!(r#"{{"odd":{}}}"#, t("F32", "[2]", 8, 0)), 8, "tensor odd: ends at byte 0, before its start at 8"),
        (
            format!(r#"{{"ok":{},"odd":{}}}"#, t("F32", "[1]", 0, 4), t("F32", "[2]", 4, 12)),
            11,
            "tensor odd: ends at byte 12 of the data, the file holds 11: truncated",
        ),
        (
            format!(r#"{{"ok":{},"odd":{}}}"#, t("F32", "[2]", 0, 8), t("F32", "[1]", 4, 8)),
            8,
            "tensor odd: overlaps the tensor before it or leaves a gap",
        ),
        (
            format!(r#"{{"ok":{},"odd":{}}}"#, t("F32", "[1]", 0, 4), t("F32", "[1]", 8, 12)),
            12,
            "tensor odd: overlaps the tensor before it or leaves a gap",
        ),
        (format!(r#"{{"ok":{}}}"#, t("F32", "[1]", 0, 4)), 6, "2 bytes follow the last tensor"),
    ];
    for (header, len, says) in cases {
        write_raw(&path, &header, &vec![0; len]);
        let error = TensorFile::open(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: {says}", path.display())), "{header}: {error}");
    }
    for (bytes, says) in [
        (vec![1; 7], "7 bytes are too few for a safetensors file"),
        (vec![0xff; 64], "not a safetensors file: a header of 18446744073709551615 bytes is claimed, 56 bytes follow"),
        (
            [&9u64.to_le_bytes()[..], b"{}      "].concat(),
            "not a safetensors file: a header of 9 bytes is claimed, 8 bytes",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: {says}", path.display())), "{error}");
    }
    // Long enough for what it claims, which is more than the format allows. (A hole: nothing is stored.)
    fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
    let error = TensorFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("a header of 100000001 bytes is claimed"), "{error}");
    let error = TensorFile::open(dir.path().join("absent")).unwrap_err().to_string();
    assert!(error.starts_with(&dir.path().join("absent").display().to_string()), "{error}");
}

#[test]
fn tensors_of_another_kind_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    write_raw(
        &path,
        r#"{"cube":{"dtype":"F32","shape":[1,1,1],"data_offsets":[0,4]},"int":{"dtype":"I32","shape":[1,1],"data_offsets":[4,8]}}"#,
        &[0; 8],
    );
    let file = TensorFile::open(&path).unwrap();
    let says = |e: Error| e.to_string().strip_prefix(&format!("{}: ", path.display())).unwrap().to_owned();
    assert_eq!(says(file.matrix("cube").unwrap_err()), "tensor cube: has shape [1, 1, 1], a matrix has two dimensions");
    assert_eq!(says(file.matrix("int").unwrap_err()), "tensor int: is I32, expected F32, F16 or BF16");
    assert_eq!(says(file.matrix("none").unwrap_err()), "tensor none: there is no such tensor");
    assert_eq!(says(file.sparse24("cube").unwrap_err()), "tensor cube: the file's format is None, not \"sparse24\"");
    // A file that shrinks while it is open.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(20).unwrap();
    let error = says(file.bytes("int").unwrap_err());
    assert!(error.starts_with("tensor int: "), "{error}");
    let error = says(save(dir.path().join("g"), &[("int", Entry::Copy(&file))]).unwrap_err());
    assert!(error.starts_with("tensor int: "), "{error}");
    assert_eq!(names_in(dir.path()), [path], "nothing half-written is left");
}

#[test]
fn compressed_matrices_that_lie_are_refused_by_name() {
    /// A file of one matrix `p` of 2 x 9 at V = 2, with parts replaced.
    struct Parts<'a> {
        metadata: &'a str,
        values: (&'a str, &'a str, &'a [u8]),
        meta: (&'a str, &'a str, &'a [u8]),
    }
    const METADATA: &str = r#""format":"sparse24","version":"1","p.shape":"2,9","p.vector":"2""#;
    let values = [0u8; 24];
    let good =
        || Parts { metadata: METADATA, values: ("F16", "[2,6]", &values), meta: ("U32", "[1,1]", &[0x44, 0x08, 0, 0]) };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.safetensors");
    let open = |p: Parts<'_>| {
        let t = |(dtype, shape, data): (&str, &str, &[u8]), start: usize| {
            format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{}]}}"#, start + data.len())
        };
        let (values, meta) = (t(p.values, 0), t(p.meta, p.values.2.len()));
        let header = format!(r#"{{"__metadata__":{{{}}},"p.values":{values},"p.meta":{meta}}}"#, p.metadata);
        write_raw(&path, &header, &[p.values.2, p.meta.2].concat());
        TensorFile::open(&path).unwrap()
    };
    assert!(open(good()).sparse24("p").is_ok());
    let swap = |from: &str, to: &str| METADATA.replace(from, to);
    let metadata = [
        (swap("sparse24", "pt"), r#"tensor p: the file's format is Some("pt"), not "sparse24""#),
        (swap(r#""1""#, r#""2""#), r#"sparse24 version "2", this reader knows version "1""#),
        (swap(r#""version":"1","#, ""), "a sparse24 file without a version"),
        (swap(r#""p.shape":"2,9","#, ""), r#"tensor p: __metadata__ has no "p.shape""#),
        (swap(r#","p.vector":"2""#, ""), r#"tensor p: __metadata__ has no "p.vector""#),
        (swap("2,9", "2x9"), r#"tensor p: shape "2x9" is not of the form m,k"#),
        (swap("2,9", "2,-9"), r#"tensor p: shape "2,-9" is not of the form m,k"#),
        (swap(r#"r":"2""#, r#"r":"3""#), "tensor p: vector length 3 is not one of"),
        (swap(r#"r":"2""#, r#"r":"two""#), r#"tensor p: vector length "two" is not a number"#),
        (swap("2,9", "3,9"), "tensor p.values: values has shape [2, 6], expected [3, 6]"),
        (swap("2,9", "2,13"), "tensor p.values: values has shape [2, 6], expected [2, 8]"),
        (
            swap("2,9", "18446744073709551615,18446744073709551615"),
            "tensor p.values: values has shape [2, 6], expected",
        ),
        (swap(r#"r":"2""#, r#"r":"1""#), "tensor p.meta: meta has shape [1, 1], expected [2, 1]"),
    ];
    let mut cases: Vec<_> =
        metadata.iter().map(|(metadata, says)| (Parts { metadata, ..good() }, says.to_string())).collect();
    let mut stray = values;
    stray[11] = 1;
    let data: [(Parts<'_>, &str); 6] = [
        (Parts { values: ("I16", "[2,6]", &values), ..good() }, "tensor p.values: is I16, expected F32, F16 or BF16"),
        (
            Parts { values: ("F16", "[3,4]", &values), ..good() },
            "tensor p.values: values has shape [3, 4], expected [2, 6]",
        ),
        (Parts { values: ("F16", "[2,6]", &stray), ..good() }, "tensor p.values: values: row 0, group 2 is padding"),
        (Parts { meta: ("I32", "[1,1]", &[0x44, 8, 0, 0]), ..good() }, "tensor p.meta: is I32, expected U32"),
        (
            Parts { meta: ("U32", "[1,1]", &[0x64, 8, 0, 0]), ..good() },
            "tensor p.meta: meta row 0, group 1: code 0x6 is not",
        ),
        (
            Parts { meta: ("U32", "[1,1]", &[0x44, 0x48, 0, 0]), ..good() },
            "tensor p.meta: meta: row 0, group 3 is padding",
        ),
    ];
    cases.extend(data.map(|(parts, says)| (parts, says.to_owned())));
    for (parts, says) in cases {
        let error = open(parts).sparse24("p").unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: {says}", path.display())), "{error}\nexpected {says}");
    }
    let newer = swap(r#""1""#, r#""2""#);
    let error = open(Parts { metadata: &newer, ..good() }).sparse24_names().unwrap_err().to_string();
    assert!(error.contains("version \"2\""), "{error}");
    let error = open(good()).sparse24("q").unwrap_err().to_string();
    assert!(error.ends_with("tensor q: __metadata__ has no \"q.shape\""), "{error}");
    write_raw(&path, &format!(r#"{{"__metadata__":{{{METADATA}}}}}"#), &[]);
    let error = TensorFile::open(&path).unwrap().sparse24("p").unwrap_err().to_string();
    assert!(error.ends_with("tensor p.values: there is no such tensor"), "{error}");
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let fail = || {
        write_atomically(&path, |out| {
            out.write_all(&[7; 3 << 20])?;
            Err(std::io::Error::other("the disk is tired"))
        })
    };
    assert_eq!(fail().unwrap_err().to_string(), format!("{}: the disk is tired", path.display()));
    assert_eq!(names_in(dir.path()), Vec::<PathBuf>::new());
    fs::write(&path, b"before").unwrap();
    fail().unwrap_err();
    let w = Matrix::zeros(1, 4, DType::F32).unwrap();
    let s = Sparse24::from_dense(&w, v(1)).unwrap();
    for (entries, name) in [
        ([("w", Entry::Matrix(&w)), ("w", Entry::Matrix(&w))], "w"),
        ([("w", Entry::Sparse24(&s)), ("w.meta", Entry::Matrix(&w))], "w.meta"),
        ([("w", Entry::Matrix(&w)), ("__metadata__", Entry::Matrix(&w))], "__metadata__"),
    ] {
        let error = save(&path, &entries).unwrap_err().to_string();
        assert_eq!(error, format!("{}: tensor {name}: the name is taken", path.display()));
    }
    assert_eq!((fs::read(&path).unwrap(), names_in(dir.path())), (b"before".to_vec(), vec![path.clone()]));
    let absent = dir.path().join("absent").join("out");
    let error = save_matrices(&absent, &[("w", &w)]).unwrap_err().to_string();
    assert!(error.starts_with(&absent.display().to_string()), "{error}");
}
