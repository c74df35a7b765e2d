//! Other people's 2:4 formats: their files read and written bit for bit, every layout against every other, folders and
//! shards, and files that lie.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;
use serde_json::{Value, json};
use sparse24::format::{Bytes, Storage};
use sparse24::io::{Dtype, Item, Layout, Source, Spec, Spec24, Stored, Writer, save_matrices, save_sparse24};
use sparse24::{DType, Elements, Matrix, Sparse24, TensorFile, VectorLen, prune};

/// The types that a file's values can have.
const TYPES: [Dtype; 7] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::I8, Dtype::U8];

fn vectors(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name)
}

fn v(v: usize) -> VectorLen {
    VectorLen::new(v).unwrap()
}

#[track_caller]
fn item<'a>(source: &'a Source, name: &str) -> &'a Item {
    source.item(name).unwrap_or_else(|| panic!("no {name} in {}", source.path().display()))
}

/// Compressed bytes of a dense matrix.
fn compressed(m: usize, k: usize, dtype: Dtype, dense: &[u8], vector: Option<VectorLen>) -> Sparse24<Bytes> {
    Sparse24::from_elements(m, k, &Bytes::new(dtype, dense.to_vec()).unwrap(), vector).unwrap()
}

fn decompressed(s: &Sparse24<Bytes>) -> Vec<u8> {
    s.to_elements().into_vec()
}

/// Writes one matrix in a layout.
fn write(
    path: &Path,
    layout: Layout,
    name: &str,
    sparse: &Sparse24<Bytes>,
    vector: Option<VectorLen>,
) -> sparse24::Result<()> {
    let spec = Spec24 { name: name.into(), m: sparse.m(), k: sparse.k(), dtype: sparse.values().file_dtype(), vector };
    let metadata: BTreeMap<_, _> = layout.metadata(&spec).into_iter().collect();
    let mut writer = Writer::create(path, &layout.specs(&spec)?, &metadata)?;
    layout.write(&mut writer, name, sparse)?;
    writer.finish()
}

/// A safetensors file put together by hand, so that it can lie.
fn by_hand(path: &Path, metadata: &Value, tensors: &[(&str, &str, Value, Vec<u8>)]) {
    let mut header = serde_json::Map::new();
    if !metadata.is_null() {
        header.insert("__metadata__".into(), metadata.clone());
    }
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        header.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string().into_bytes();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat()).unwrap();
}

fn i64s(numbers: &[i64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// Zeros and other numbers of a type: of every group at most two are not zero, in a pattern that `vector` rows share.
/// Zeros have either sign, where there is one.
fn two_of_four(m: usize, k: usize, dtype: Dtype, vector: VectorLen, seed: u64) -> Vec<u8> {
    let mut rng = Pcg32::new(seed, 3);
    let mask = prune::random(m, k, vector, seed).unwrap();
    let (width, float) = (dtype.bitsize() / 8, !matches!(dtype, Dtype::I8 | Dtype::U8));
    let mut bytes = Vec::new();
    for at in 0..m * k {
        let mut element = vec![0; width];
        if mask.mask().get(at / k, at % k) && !rng.next_u32().is_multiple_of(8) {
            element.iter_mut().for_each(|byte| *byte = rng.next_u32() as u8);
        } else if float && rng.next_u32().is_multiple_of(4) {
            *element.last_mut().unwrap() = 0x80;
        }
        bytes.extend(element);
    }
    bytes
}

/// The same bytes with -0.0 made +0.0.
fn unsigned_zeros(dtype: Dtype, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if !matches!(dtype, Dtype::I8 | Dtype::U8) {
        for element in bytes.chunks_exact_mut(dtype.bitsize() / 8) {
            if let [low @ .., last] = element
                && *last == 0x80
                && low.iter().all(|&b| b == 0)
            {
                *last = 0;
            }
        }
    }
    bytes
}

// ---- their files, bit for bit ----

#[test]
fn their_files_are_read_and_written_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["matrix_f16_64x128", "matrix_bf16_32x64", "matrix_f32_32x64", "matrix_i8_32x64"] {
        let source = Source::open(vectors(&format!("{name}.safetensors"))).unwrap();
        let pruned = item(&source, "pruned24");
        let dense = source.dense(pruned).unwrap();
        let sparse = source.sparse24_bytes(pruned).unwrap();
        assert_eq!(decompressed(&sparse), dense, "{name}");

        let mut forms = vec![("ct24.layer.weight", Stored::Bitmask), ("ctbm.layer.weight", Stored::SparseBitmask)];
        if name != "matrix_f32_32x64" {
            forms.push(("cutlass", Stored::Cutlass));
        }
        for (form, stored) in forms {
            let theirs = item(&source, form);
            assert_eq!((theirs.stored, &theirs.shape, theirs.dtype), (stored, &pruned.shape, pruned.dtype), "{name}");
            assert_eq!(source.dense(theirs).unwrap(), dense, "{name}, {form}");
            assert_eq!(source.sparse24_bytes(theirs).unwrap(), sparse, "{name}, {form}");
            let layout = match stored {
                Stored::Bitmask => Layout::Bitmask,
                Stored::Cutlass => Layout::Cutlass,
                _ => continue,
            };
            let path = dir.path().join("ours");
            write(&path, layout, form, &sparse, None).unwrap();
            let ours = TensorFile::open(&path).unwrap();
            assert_eq!(ours.tensors().count(), theirs.parts.len());
            for part in &theirs.parts {
                let file = source.file_of(part).unwrap();
                assert_eq!(ours.info(part).unwrap().spec(), file.info(part).unwrap().spec(), "{name}");
                assert_eq!(ours.bytes(part).unwrap(), file.bytes(part).unwrap(), "{name}, {part}");
            }
        }
    }
}

#[test]
fn under_full_groups_are_theirs_too() {
    let source = Source::open(vectors("edge_le2_f16_32x64.safetensors")).unwrap();
    let dense = source.dense(item(&source, "pruned24")).unwrap();
    let sparse = source.sparse24_bytes(item(&source, "pruned24")).unwrap();
    // The same codes and values; the bitmask chooses other positions for zeros, which must not be changed.
    assert_eq!(source.sparse24_bytes(item(&source, "cutlass")).unwrap(), sparse);
    for form in ["cutlass", "ct24.layer.weight", "ctbm.layer.weight"] {
        let theirs = source.dense(item(&source, form)).unwrap();
        assert_eq!(unsigned_zeros(Dtype::F16, &theirs), unsigned_zeros(Dtype::F16, &dense), "{form}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ours");
    for (layout, form) in [(Layout::Cutlass, "cutlass"), (Layout::Bitmask, "ct24.layer.weight")] {
        let theirs = item(&source, form);
        write(&path, layout, form, &source.sparse24_bytes(theirs).unwrap(), None).unwrap();
        let ours = TensorFile::open(&path).unwrap();
        for part in &theirs.parts {
            assert_eq!(ours.bytes(part).unwrap(), source.files()[0].bytes(part).unwrap(), "{part}");
        }
    }
}

#[test]
fn unstructured_bitmasks_decode_and_say_where_they_are_not_2_4() {
    let source = Source::open(vectors("bitmask_f32_5x13.safetensors")).unwrap();
    let theirs = item(&source, "ctbm.layer.weight");
    assert_eq!((theirs.stored, &theirs.shape[..]), (Stored::SparseBitmask, &[5, 13][..]));
    assert_eq!(source.dense(theirs).unwrap(), source.files()[0].bytes("dense").unwrap());
    let error = source.sparse24_bytes(theirs).unwrap_err();
    assert_eq!(error.tensor().map(|(_, tensor)| tensor), Some("ctbm.layer.weight"), "{error}");
    let cause = error.into_cause().to_string();
    assert_eq!(cause, "row 2, group 0 (columns 0..4): 4 positions are non-zero or kept, 2:4 allows 2");
    let source = Source::open(vectors("ct24_f16_5x12.safetensors")).unwrap();
    let theirs = item(&source, "ct24.layer.weight");
    assert_eq!(source.dense(theirs).unwrap(), source.files()[0].bytes("pruned24").unwrap());
}

/// The parts of a tensor of bytes as a `sparse-bitmask`, offsets in the shape that torch gives them.
fn bitmask_parts(name: &str, shape: &[usize], dense: &[u8]) -> Vec<(String, &'static str, Value, Vec<u8>)> {
    let k = *shape.last().unwrap();
    let rows = &shape[..shape.len() - 1];
    let mut bits = Vec::new();
    let mut counts = Vec::new();
    for row in dense.chunks(k) {
        let bit = |chunk: &[u8]| (0..).zip(chunk).fold(0u8, |bits, (i, &x)| bits | u8::from(x != 0) << i);
        bits.extend(row.chunks(8).map(bit));
        counts.push(row.iter().filter(|&&x| x != 0).count() as i64);
    }
    // Sums of all earlier ones along the first dimension alone.
    let inner: usize = rows.iter().skip(1).product();
    let before = |row: usize| (row % inner..row).step_by(inner.max(1)).map(|row| counts[row]).sum();
    let offsets: Vec<i64> = (0..counts.len()).map(before).collect();
    let values: Vec<u8> = dense.iter().copied().filter(|&x| x != 0).collect();
    let sizes: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    vec![
        (format!("{name}.compressed"), "I8", json!([values.len()]), values),
        (format!("{name}.bitmask"), "U8", json!([rows, &[k.div_ceil(8)]].concat()), bits),
        (format!("{name}.shape"), "I64", json!([sizes.len()]), i64s(&sizes)),
        (format!("{name}.row_offsets"), "I64", json!(rows), i64s(&offsets)),
    ]
}

/// As releases up to 0.8.1 of compressed-tensors write it: every tensor of a model, under its full name.
#[test]
fn bitmasks_of_any_tensor_and_under_either_name_are_decoded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let any = |shape: &[usize], seed: u64| -> Vec<u8> {
        let mut rng = Pcg32::new(seed, 5);
        (0..shape.iter().product()).map(|_| (rng.next_u32() % 3 * (rng.next_u32() % 80)) as u8).collect()
    };
    let old: [(&str, &[usize]); 6] = [
        ("l.0.up.weight", &[5, 19]),
        ("l.0.up.bias", &[5]),
        ("norm.weight", &[19]),
        ("conv.weight", &[3, 2, 9]),
        ("patch.weight", &[2, 3, 2, 4]),
        ("A_log", &[4, 3]),
    ];
    let new = ["l.0.up", "bias", "norm", "conv", "patch", "head"];
    for full_names in [true, false] {
        let mut tensors = Vec::new();
        let mut expected = BTreeMap::new();
        for (i, (name, shape)) in old.into_iter().enumerate() {
            let (stem, name) = match full_names {
                true => (name, name.to_owned()),
                false => (new[i], format!("{}.weight", new[i])),
            };
            let dense = any(shape, i as u64);
            tensors.extend(bitmask_parts(stem, shape, &dense));
            expected.insert(name, (shape.to_vec(), dense));
        }
        // numpy makes a list of the one offset that a vector has.
        tensors[7].2 = json!([1]);
        let borrowed: Vec<_> = tensors.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.clone(), b.clone())).collect();
        by_hand(&path, &json!({"format": "pt"}), &borrowed);
        let source = Source::open(&path).unwrap();
        let found: BTreeMap<_, _> = source
            .items()
            .inspect(|item| assert_eq!(item.stored, Stored::SparseBitmask))
            .map(|item| (item.name.clone(), (item.shape.clone(), source.dense(item).unwrap())))
            .collect();
        assert_eq!(found, expected, "full names: {full_names}");
    }

    // sparse-24-bitmask under full names; and our own, whose metadata says how they are called.
    let sparse = compressed(2, 8, Dtype::I8, &[1, 0, 0, 2, 0, 3, 4, 0, 0, 0, 5, 6, 7, 8, 0, 0], None);
    for (name, stem) in [("up.weight", "up"), ("up.weight.weight", "up.weight"), ("up", "up"), ("up.bias", "up.bias")] {
        write(&path, Layout::Bitmask, name, &sparse, None).unwrap();
        let source = Source::open(&path).unwrap();
        assert_eq!(item(&source, name).parts[0], format!("{stem}.compressed"));
        let file = &source.files()[0];
        let parts: Vec<_> = file
            .tensors()
            .map(|t| {
                let part = t.name.rsplit('.').next().unwrap();
                let dtype = ["I64", "I8", "U8"][usize::from(part != "shape") + usize::from(part == "bitmask")];
                (format!("up.weight.{part}"), dtype, json!(t.shape), file.bytes(&t.name).unwrap())
            })
            .collect();
        let parts: Vec<_> = parts.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.clone(), b.clone())).collect();
        let theirs = dir.path().join("theirs");
        by_hand(&theirs, &json!({"format": "pt"}), &parts);
        let theirs = Source::open(&theirs).unwrap();
        assert_eq!(
            theirs.items().map(|item| (&*item.name, item.stored)).collect::<Vec<_>>(),
            [("up.weight", Stored::Bitmask)]
        );
        assert_eq!(theirs.dense(item(&theirs, "up.weight")).unwrap(), decompressed(&sparse));
    }
}

#[test]
fn types_that_2_4_matrices_do_not_have_are_placed_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let parts = |bits: u8| {
        [
            ("w.compressed", "I16", json!([1, 4]), [1u16, 2, 3, 4].iter().flat_map(|n| n.to_le_bytes()).collect()),
            ("w.bitmask", "U8", json!([1, 1]), vec![bits]),
            ("w.shape", "I64", json!([2, 1]), i64s(&[1, 8])),
        ]
    };
    by_hand(&path, &Value::Null, &parts(0b0110_1001));
    let source = Source::open(&path).unwrap();
    let dense: Vec<u8> = [1u16, 0, 0, 2, 0, 3, 4, 0].iter().flat_map(|n| n.to_le_bytes()).collect();
    assert_eq!(source.dense(item(&source, "w.weight")).unwrap(), dense);
    by_hand(&path, &Value::Null, &parts(0b0111_1000));
    let source = Source::open(&path).unwrap();
    let error = source.dense(item(&source, "w.weight")).unwrap_err().to_string();
    assert!(error.ends_with("w.weight: row 0, group 0: 1 bits are set, expected 2"), "{error}");
}

/// What is stored as in x out is known by its bias, by the kind of model, or by its shape: in that order.
#[test]
fn matrices_of_in_x_out_are_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let found = |tensors: &[(&str, &[usize])], config: Value| -> Vec<String> {
        let zeros = |shape: &[usize]| vec![0u8; shape.iter().product()];
        let tensors: Vec<_> = tensors.iter().map(|(name, shape)| (*name, "I8", json!(shape), zeros(shape))).collect();
        by_hand(&path, &Value::Null, &tensors);
        let source = Source::open(&path).unwrap();
        sparse24::io::in_by_out(&source, Some(&config).filter(|c| !c.is_null())).into_iter().collect()
    };
    let (attention, out, fc, proj) =
        ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight");
    let gpt2: [(&str, &[usize]); 6] = [
        (attention, &[4, 12]),
        (out, &[4, 4]),
        (fc, &[4, 16]),
        (proj, &[16, 4]),
        ("wte.weight", &[9, 4]),
        ("lm_head.weight", &[9, 4]),
    ];
    let linear: [(&str, &[usize]); 4] = [(attention, &[12, 4]), (out, &[4, 4]), (fc, &[16, 4]), (proj, &[4, 16])];
    let all = [attention, out, fc, proj];
    for config in [
        json!({"model_type": "gpt2"}),
        json!({"architectures": ["GPT2LMHeadModel"]}),
        json!({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}),
        json!({"n_embd": 4}),
        Value::Null,
    ] {
        assert_eq!(found(&gpt2, config.clone()), all, "{config}");
    }
    for config in [json!({"model_type": "gpt_bigcode"}), json!({"model_type": "gpt_neo"}), Value::Null] {
        assert_eq!(found(&linear, config), [""; 0]);
    }
    // A square one alone tells nothing.
    assert_eq!(found(&gpt2[1..2], Value::Null), [""; 0]);
    // The bias of an out feature each, whatever else is said.
    let of = |weights: &[usize], bias: usize| {
        found(&[(fc, weights), ("h.0.mlp.c_fc.bias", &[bias]), (out, &[4, 4])], json!({"model_type": "mine"}))
    };
    assert_eq!(of(&[4, 16], 16), [out, fc]);
    assert_eq!(of(&[16, 4], 16), [""; 0]);
    let liar = found(&[(fc, &[16, 4]), ("h.0.mlp.c_fc.bias", &[16])], json!({"model_type": "gpt2"}));
    assert_eq!(liar, [""; 0]);
    // Flax and Keras.
    let kernels: [(&str, &[usize]); 4] =
        [("a.kernel", &[4, 4]), ("b/c/kernel:0", &[4, 8]), ("d.kernel", &[1, 2, 3]), ("e.kernel.weight", &[4, 4])];
    assert_eq!(found(&kernels, json!({"model_type": "bert"})), ["a.kernel", "b/c/kernel:0"]);
}

#[test]
fn masks_are_read_beside_their_weights_and_applied() {
    let source = Source::open(vectors("prune_with_mask.safetensors")).unwrap();
    let masked = item(&source, "fc.weight");
    assert_eq!((masked.stored, masked.bytes), (Stored::TorchMask, 2 * 32 * 64 * 4));
    let (w, mask) = source.masked(masked).unwrap();
    let removed = TensorFile::open(vectors("prune_removed.safetensors")).unwrap();
    let expected = removed.matrix("fc.weight").unwrap();
    assert_eq!(mask.apply(&w).unwrap(), expected, "equal up to the sign of zero");
    assert_eq!(source.matrix(masked).unwrap(), expected);
    assert_ne!(w, expected);
    assert_eq!(Sparse24::try_from(source.sparse24_bytes(masked).unwrap()).unwrap().decompress(), expected);

    // ASP's, of a module within another and of the model itself.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("asp");
    let weights: Vec<u8> = [1f32, 0.0, 0.0, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    by_hand(
        &path,
        &Value::Null,
        &[
            ("fc.weight", "F32", json!([1, 4]), weights.clone()),
            ("fc.__weight_mma_mask", "BOOL", json!([1, 4]), vec![1, 0, 0, 1]),
            ("weight", "F32", json!([1, 4]), weights.clone()),
            ("__weight_mma_mask", "BOOL", json!([1, 4]), vec![1, 1, 1, 1]),
            ("alone.__weight_mma_mask", "BOOL", json!([1, 4]), vec![1, 1, 1, 1]),
        ],
    );
    let source = Source::open(&path).unwrap();
    let found: Vec<_> = source.items().map(|item| (item.name.as_str(), item.stored)).collect();
    let expected =
        [("alone.__weight_mma_mask", Stored::Dense), ("fc.weight", Stored::AspMask), ("weight", Stored::AspMask)];
    assert_eq!(found, expected);
    assert_eq!(source.dense(item(&source, "fc.weight")).unwrap(), weights);

    // What is no mask.
    by_hand(
        &path,
        &Value::Null,
        &[
            ("fc.weight_orig", "F32", json!([1, 4]), weights.clone()),
            ("fc.weight_mask", "F32", json!([1, 4]), weights.clone()),
        ],
    );
    let source = Source::open(&path).unwrap();
    let error = source.dense(item(&source, "fc.weight")).unwrap_err().to_string();
    assert!(error.ends_with("tensor fc.weight_mask: element 3 of the mask is neither 0 nor 1"), "{error}");
    by_hand(
        &path,
        &Value::Null,
        &[("fc.weight_orig", "F32", json!([1, 4]), weights), ("fc.weight_mask", "BOOL", json!([4]), vec![1; 4])],
    );
    let error = Source::open(&path).unwrap_err().to_string();
    assert!(error.ends_with("tensor fc.weight_mask: mask has shape [4], expected [1, 4]"), "{error}");
}

// ---- every layout against every other ----

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any type, odd shapes, patterns shared by any number of rows: what a layout takes, it gives back.
    #[test]
    fn layouts_lose_nothing(m in 0usize..70, k in 0usize..70, kind in 0usize..7, vector in 0usize..8, seed: u64) {
        let (dtype, vector) = (TYPES[kind], VectorLen::ALL[vector]);
        let dense = two_of_four(m, k, dtype, vector, seed);
        let sparse = compressed(m, k, dtype, &dense, Some(vector));
        // Zeros at coded positions keep their sign.
        prop_assert_eq!(unsigned_zeros(dtype, &decompressed(&sparse)), unsigned_zeros(dtype, &dense));
        let largest = compressed(m, k, dtype, &dense, None);
        prop_assert!(largest.vector() >= vector);
        prop_assert_eq!(sparse.clone().widest().unwrap().vector(), largest.vector());

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for layout in Layout::ALL {
            for name in ["up.weight", "up"] {
                let fits = match layout {
                    Layout::Native | Layout::Dense => true,
                    Layout::Bitmask => k % 4 == 0,
                    Layout::Cutlass => false,
                };
                let written = write(&path, layout, name, &sparse, Some(vector));
                if layout == Layout::Cutlass && written.is_ok() {
                    prop_assert!(m % 16 == 0 && k % 32 == 0, "{}", m);
                } else {
                    prop_assert_eq!(written.is_ok(), fits);
                    if !fits {
                        continue;
                    }
                }
                let source = Source::open(&path).unwrap();
                let read = item(&source, name);
                prop_assert_eq!((read.shape.as_slice(), read.dtype), (&[m, k][..], dtype));
                prop_assert_eq!(source.dense(read).unwrap(), decompressed(&sparse));
                if layout != Layout::Dense {
                    prop_assert_eq!(&source.sparse24_bytes(read).unwrap(), &sparse, "{}", layout);
                }
            }
        }
    }

    /// The pair of torch's in shapes that it takes.
    #[test]
    fn reordered_metadata_comes_back(m in 0usize..5, k in 1usize..4, kind in 0usize..4, vector in 0usize..8, seed: u64) {
        let dtype = [Dtype::F16, Dtype::BF16, Dtype::I8, Dtype::U8][kind];
        let (m, k) = if kind < 2 { (32 * m, 32 * k) } else { (16 * m, 64 * k) };
        let vector = VectorLen::ALL[vector];
        let sparse = compressed(m, k, dtype, &two_of_four(m, k, dtype, vector, seed), Some(vector));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&path, Layout::Cutlass, "w", &sparse, Some(vector)).unwrap();
        let source = Source::open(&path).unwrap();
        prop_assert_eq!(&source.sparse24_bytes(item(&source, "w")).unwrap(), &sparse);
    }

    /// A file that is cut off or has bytes changed is an error or other numbers, and never a panic.
    #[test]
    fn garbage_is_no_panic(file in 0usize..9, cut: Option<u16>, at: u32, byte: u8, places in 1usize..4) {
        let names = [
            "matrix_i8_32x64", "matrix_bf16_32x64", "edge_le2_f16_32x64", "bitmask_f32_5x13", "ct24_f16_5x12",
            "prune_with_mask", "ct_ckpt_sparse24_f16/model", "ct_ckpt_bitmask_f16/model", "native",
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        if names[file] == "native" {
            let w = Matrix::new(5, 13, Elements::from_bytes(DType::F32, &two_of_four(5, 13, Dtype::F32, v(2), 1)).unwrap());
            save_sparse24(&path, &[("w", &Sparse24::from_dense(&w.unwrap(), v(2)).unwrap())]).unwrap();
        } else {
            fs::copy(vectors(&format!("{}.safetensors", names[file])), &path).unwrap();
        }
        let mut bytes = fs::read(&path).unwrap();
        for i in 0..places {
            // Half of the changes are in the header.
            let range = if at.is_multiple_of(2) { bytes.len().min(1500) } else { bytes.len() };
            let place = (at as usize / 2).wrapping_mul(i * 7919 + 1) % range;
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(usize::from(cut) % bytes.len());
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        if let Ok(source) = Source::open(&path) {
            for item in source.items() {
                let (dense, sparse) = (source.dense(item), source.sparse24_bytes(item));
                let _ = (source.matrix(item), source.masked(item), sparse.map(|sparse| sparse.widest()), dense);
            }
        }
    }
}

#[test]
fn layouts_refuse_what_they_have_no_place_for() {
    let spec = |m, k, dtype| Spec24 { name: "w".into(), m, k, dtype, vector: None };
    let refused = |layout: Layout, m, k, dtype| layout.specs(&spec(m, k, dtype)).unwrap_err().to_string();
    for (m, k, dtype, takes) in [
        (32, 64, Dtype::F32, "F16, BF16, I8 and U8"),
        (32, 64, Dtype::F8_E4M3, "F16, BF16, I8 and U8"),
        (16, 32, Dtype::F16, "multiples of 32 x 32"),
        (32, 48, Dtype::BF16, "multiples of 32 x 32"),
        (8, 64, Dtype::I8, "multiples of 16 x 64"),
        (16, 32, Dtype::I8, "multiples of 16 x 64"),
    ] {
        assert_eq!(
            refused(Layout::Cutlass, m, k, dtype),
            format!("{m} x {k} {dtype}: the layout cutlass takes {takes}")
        );
    }
    assert_eq!(
        refused(Layout::Bitmask, 8, 6, Dtype::F32),
        "8 x 6 F32: the layout bitmask takes multiples of 4 columns"
    );
    for layout in Layout::ALL {
        let error = refused(layout, 8, 8, Dtype::F64);
        assert!(error.starts_with("is F64, a 2:4 matrix is F32, F16"), "{error}");
    }
    assert_eq!(
        "csr".parse::<Layout>().unwrap_err().to_string(),
        "layout \"csr\" is not native, dense, bitmask or cutlass"
    );
}

#[test]
fn forms_that_lie_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("liar");
    // A sparse-24-bitmask of 1 x 8: kept 0 and 3, 1 and 2.
    let good = || {
        [
            ("w.compressed", "I8", json!([1, 4]), vec![1, 2, 3, 4]),
            ("w.bitmask", "U8", json!([1, 1]), vec![0b0110_1001]),
            ("w.shape", "I64", json!([2, 1]), i64s(&[1, 8])),
        ]
    };
    let error = |metadata: Value, tensors: &[(&str, &str, Value, Vec<u8>)]| {
        by_hand(&path, &metadata, tensors);
        let error = Source::open(&path)
            .and_then(|source| source.items().try_for_each(|item| source.sparse24_bytes(item).map(|_| ())));
        let error = error.unwrap_err().to_string();
        error.strip_prefix(&format!("{}: tensor ", path.display())).unwrap_or(&error).to_owned()
    };
    by_hand(&path, &Value::Null, &good());
    let source = Source::open(&path).unwrap();
    assert_eq!(source.dense(item(&source, "w.weight")).unwrap(), [1, 0, 0, 2, 0, 3, 4, 0]);

    let with = |part: usize, dtype: &'static str, shape: Value, bytes: Vec<u8>| {
        let mut tensors = good();
        tensors[part] = (tensors[part].0, dtype, shape, bytes);
        tensors
    };
    let bits = |bits: u8| error(Value::Null, &with(1, "U8", json!([1, 1]), vec![bits]));
    assert_eq!(
        bits(0b0111_0011),
        "w.weight: row 0, group 1 (columns 4..8): 3 positions are non-zero or kept, 2:4 allows 2"
    );
    assert_eq!(bits(0b0000_0011), "w.weight: row 0, group 1: 0 bits are set, expected 2");
    let shape = |shape: &[i64]| error(Value::Null, &with(2, "I64", json!([shape.len()]), i64s(shape)));
    assert_eq!(shape(&[1, -8]), "w.shape: [1, -8] is no shape of a tensor");
    assert_eq!(shape(&[1, 8, 1]), "w.bitmask: a part of 1 x 8 x 1 has shape [1, 1], expected [1, 8, 1]");
    assert_eq!(shape(&[8]), "w.bitmask: a part of 8 has shape [1, 1], expected [1]");
    assert_eq!(shape(&[]), "w.shape: is I64 of shape [0], expected a list of I64");
    let vector = [
        ("w.compressed", "I8", json!([4]), vec![1, 2, 3, 4]),
        ("w.bitmask", "U8", json!([1]), vec![0b0110_1001]),
        ("w.shape", "I64", json!([1]), i64s(&[8])),
    ];
    let vector = error(Value::Null, &vector);
    assert_eq!(vector, "w.shape: [8] is no shape of a matrix, as a sparse-24-bitmask is");
    assert_eq!(shape(&[2, 8]), "w.bitmask: a part of 2 x 8 has shape [1, 1], expected [2, 1]");
    assert_eq!(shape(&[1, 4]), "w.compressed: a part of 1 x 4 has shape [1, 4], expected [1, 2]");
    assert!(shape(&[1, 6]).starts_with("w.compressed: sparse-24-bitmask of 1 x 6: columns are no multiple of 4"));
    assert!(shape(&[i64::MAX, i64::MAX]).starts_with("w.bitmask: a part of "));
    assert_eq!(error(Value::Null, &with(1, "I8", json!([1, 1]), vec![0])), "w.bitmask: is I8, expected U8");
    assert_eq!(error(Value::Null, &good()[..2]), "w.shape: there is no such tensor");
    let vector = error(json!({"w.weight.layout": "bitmask,3"}), &good());
    assert!(vector.starts_with("w.weight: vector length 3 is not one of"), "{vector}");

    // A vector length that the codes do not have.
    let rows = [
        ("w.compressed", "I8", json!([2, 2]), vec![1, 2, 3, 4]),
        ("w.bitmask", "U8", json!([2, 1]), vec![0b1001, 0b0101]),
        ("w.shape", "I64", json!([2, 1]), i64s(&[2, 4])),
    ];
    let vector = error(json!({"w.weight.layout": "bitmask,2"}), &rows);
    assert_eq!(vector, "w.weight: vector length 2: rows that would share codes have different ones");
    // A stray bit past the last column.
    let mut stray = rows.clone();
    stray[1].3[1] |= 0x10;
    assert_eq!(error(Value::Null, &stray), "w.weight: row 1, group 1: 1 bits are set, expected 0");

    // sparse-bitmask.
    let sparse = |bits: u8, offset: i64, nnz: usize| {
        let tensors = [
            ("w.compressed", "I8", json!([nnz]), vec![7; nnz]),
            ("w.bitmask", "U8", json!([1, 1]), vec![bits]),
            ("w.shape", "I64", json!([2]), i64s(&[1, 6])),
            ("w.row_offsets", "I64", json!([1]), i64s(&[offset])),
        ];
        error(Value::Null, &tensors)
    };
    assert_eq!(sparse(0b11, 1, 2), "w.weight: row 0 starts at value 1, the rows before have 0");
    assert_eq!(sparse(0b11, 0, 3), "w.weight: 3 values, of which the mask places 2");
    assert_eq!(sparse(0b11, 0, 1), "w.weight: row 0: the bit of column 1 has no value");
    assert_eq!(sparse(0b0100_0001, 0, 2), "w.weight: row 0: the bit of column 6 has no value");
    assert!(sparse(0b111, 0, 3).starts_with("w.weight: row 0, group 0 (columns 0..4): 3 positions"));

    // Torch's pair: a code that is none, and a claim without tensors.
    let source = Source::open(vectors("matrix_i8_32x64.safetensors")).unwrap();
    let mut meta = source.files()[0].bytes("cutlass.meta").unwrap();
    meta[0] = meta[0] & 0xf0 | 5;
    let values = source.files()[0].bytes("cutlass.values").unwrap();
    let pair = [("w.values", "I8", json!([32, 32]), values), ("w.meta", "I32", json!([32, 2]), meta)];
    assert_eq!(error(Value::Null, &pair), "w: meta row 0, group 0: code 0x5 is not one of 4, 8, 9, c, d, e");
    let claim = error(json!({"w.layout": "cutlass"}), &pair[..1]);
    assert_eq!(claim, "w: \"w.layout\" is \"cutlass\", but there are no tensors of that layout");

    // A key without any tensor of its own is another program's.
    by_hand(&path, &json!({"x.layout": "cutlass", "y.layout": "bitmask,3", "z.layout": "NCHW"}), &good());
    assert_eq!(Source::open(&path).unwrap().items().count(), 1);

    // Two tensors that would be one.
    let mut twice = good().to_vec();
    twice.push(("w.weight", "I8", json!([1, 8]), vec![0; 8]));
    assert_eq!(error(Value::Null, &twice), "w.weight: is stored in two forms");
}

// ---- folders and shards ----

#[test]
fn shards_are_one_source_and_lying_indices_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // The parts of one matrix in two shards.
    by_hand(
        &at("one.safetensors"),
        &json!({"format": "pt"}),
        &[("up.compressed", "I8", json!([1, 2]), vec![5, 6]), ("up.shape", "I64", json!([2, 1]), i64s(&[1, 4]))],
    );
    by_hand(
        &at("two.safetensors"),
        &json!({"format": "pt", "by": "hand"}),
        &[("up.bitmask", "U8", json!([1, 1]), vec![0b1010]), ("bias", "F32", json!([1]), vec![0; 4])],
    );
    let index = |map: Value| {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(at("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    let map = json!({"up.compressed": "one.safetensors", "up.shape": "one.safetensors",
                     "up.bitmask": "two.safetensors", "bias": "two.safetensors"});
    index(map.clone());
    for path in [dir.path().to_path_buf(), at("model.safetensors.index.json")] {
        let source = Source::open(path).unwrap();
        assert_eq!(source.items().map(|item| item.name.as_str()).collect::<Vec<_>>(), ["bias", "up.weight"]);
        assert_eq!(source.dense(item(&source, "up.weight")).unwrap(), [0, 5, 0, 6]);
        assert_eq!(source.path_of(item(&source, "up.weight")), at("one.safetensors"));
        assert_eq!(
            source.metadata(),
            BTreeMap::from([("format", "pt"), ("by", "hand")].map(|(k, v)| (k.into(), v.into())))
        );
    }
    let folder = dir.path().display().to_string();
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut map = map.clone();
        change(&mut map);
        index(map);
        Source::open(dir.path()).unwrap_err().to_string().replace(&folder, "DIR")
    };
    let of_index = "DIR/model.safetensors.index.json";
    assert_eq!(
        refused(&|map| map["bias"] = json!("three.safetensors")),
        format!("{of_index}: tensor bias: its shard three.safetensors is missing")
    );
    assert_eq!(
        refused(&|map| map["bias"] = json!("one.safetensors")),
        format!("DIR/one.safetensors: tensor bias: {of_index} says that it is here, and it is not")
    );
    assert_eq!(
        refused(&|map| map["bias"] = json!("../x.safetensors")),
        format!(
            "{of_index}: tensor bias: its shard is \"../x.safetensors\", expected the name of a file beside the index"
        )
    );
    assert_eq!(refused(&|map| *map = json!([])), format!("{of_index}: has no object \"weight_map\""));
    by_hand(
        &at("one.safetensors"),
        &Value::Null,
        &[
            ("up.compressed", "I8", json!([1, 2]), vec![5, 6]),
            ("up.shape", "I64", json!([2, 1]), i64s(&[1, 4])),
            ("bias", "F32", json!([1]), vec![0; 4]),
        ],
    );
    assert_eq!(refused(&|_| {}), "DIR/two.safetensors: tensor bias: is in DIR/one.safetensors too");
    fs::write(at("model.safetensors.index.json"), "{").unwrap();
    let error = Source::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("index.json: is no JSON: "), "{error}");

    // The one file is taken before an index, and a folder without either is said.
    save_matrices(at("model.safetensors"), &[("w", &Matrix::zeros(1, 1, DType::F32).unwrap())]).unwrap();
    assert_eq!(Source::open(dir.path()).unwrap().items().count(), 1);
    let empty = tempfile::tempdir().unwrap();
    let error = Source::open(empty.path()).unwrap_err().to_string();
    assert!(error.ends_with("the folder has neither model.safetensors nor model.safetensors.index.json"), "{error}");
}

// ---- the writer ----

#[test]
fn a_writer_takes_what_was_announced_in_any_order_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let specs =
        [Spec::new("a", Dtype::U8, &[3]), Spec::new("b", Dtype::F32, &[1, 1]), Spec::new("none", Dtype::F16, &[0, 9])];
    let create = || Writer::create(&path, &specs, &BTreeMap::from([("k".to_owned(), "v".to_owned())])).unwrap();
    let mut files = Vec::new();
    for order in [["a", "b", "none"], ["none", "b", "a"]] {
        let mut writer = create();
        for name in order {
            let bytes: &[u8] = match name {
                "a" => b"xyz",
                "b" => b"1234",
                _ => b"",
            };
            writer.write(name, bytes).unwrap();
        }
        writer.finish().unwrap();
        files.push(fs::read(&path).unwrap());
    }
    assert_eq!(files[0], files[1]);
    let file = TensorFile::open(&path).unwrap();
    assert_eq!((file.bytes("a").unwrap(), file.bytes("b").unwrap()), (b"xyz".to_vec(), b"1234".to_vec()));
    assert_eq!(file.metadata()["k"], "v");

    let mut writer = create();
    let says = |result: sparse24::Result<()>| {
        result.unwrap_err().to_string().strip_prefix(&format!("{}: tensor ", path.display())).unwrap().to_owned()
    };
    assert_eq!(says(writer.write("c", b"")), "c: was not announced, or is written already");
    assert_eq!(says(writer.write("a", b"xy")), "a: 2 bytes are to be written, 3 were announced");
    writer.write("a", b"abc").unwrap();
    assert_eq!(says(writer.write("a", b"abc")), "a: was not announced, or is written already");
    assert_eq!(says(writer.finish()), "b: was never written, and 1 others");
    drop(create());
    // What was there is there still, and nothing else.
    assert_eq!(fs::read(&path).unwrap(), files[0]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let refused = |specs: &[Spec]| says(Writer::create(&path, specs, &BTreeMap::new()).map(|_| ()));
    assert_eq!(refused(&[specs[0].clone(), specs[0].clone()]), "a: the name is taken");
    let huge = Spec::new("w", Dtype::F32, &[1 << 40, 1 << 40]);
    assert!(refused(&[huge]).starts_with("w: tensor overflows: shape"));
    let large = |name: &str| Spec::new(name, Dtype::U8, &[usize::MAX / 8 - 7]);
    let many: Vec<_> = (0..9).map(|i| large(&format!("w{i}"))).collect();
    assert!(refused(&many).starts_with("w8: file size overflows: "));
}
