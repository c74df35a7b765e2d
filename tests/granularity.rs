//! Masks of any granularity: those of `torch.nn.utils.prune`, bit for bit, and what torch leaves open.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use serde_json::Value;
use sparse24::prune::{Amount, Granularity, Importance, Units, prune_units};
use sparse24::{DType, Mask, Matrix};

const L1: Importance = Importance::Ln(1.0);

fn vectors() -> Value {
    serde_json::from_str(include_str!("vectors/torch_prune.json")).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// A tensor of torch's as a matrix: the kernel of a convolution, `[out, in, lines, columns]`, with its channels side by
/// side, tap by tap.
struct Tensor {
    shape: Vec<usize>,
    w: Matrix,
}

impl Tensor {
    fn all() -> BTreeMap<String, Self> {
        let of = |(name, tensor): (&String, &Value)| {
            let shape: Vec<_> = list(&tensor["shape"]).iter().map(|size| size.as_u64().unwrap() as usize).collect();
            let weights: Vec<_> = list(&tensor["weights"]).iter().map(|w| w.as_f64().unwrap() as f32).collect();
            let (m, k) = (shape[0], shape[1..].iter().product());
            let mut tensor = Self { shape, w: Matrix::zeros(m, k, DType::F32).unwrap() };
            let ours: Vec<_> = (0..m * k).map(|at| weights[at / k * k + tensor.theirs(at % k)]).collect();
            tensor.w = Matrix::from_f32(m, k, &ours).unwrap();
            (name.clone(), tensor)
        };
        vectors()["tensors"].as_object().unwrap().iter().map(of).collect()
    }

    fn taps(&self) -> usize {
        self.shape[2..].iter().product()
    }

    /// Where torch has what is in this column.
    fn theirs(&self, col: usize) -> usize {
        let channels = self.shape[1];
        col % channels * self.taps() + col / channels
    }

    /// A mask as torch writes it.
    fn bits(&self, mask: &Mask) -> String {
        let mut bits = vec!['?'; self.w.rows() * self.w.cols()];
        for (row, col) in (0..self.w.rows()).flat_map(|row| (0..self.w.cols()).map(move |col| (row, col))) {
            bits[row * self.w.cols() + self.theirs(col)] = if mask.get(row, col) { '1' } else { '0' };
        }
        bits.into_iter().collect()
    }

    /// The units of a step of torch's.
    fn units<'a>(&self, step: &Value, before: Option<&'a Mask>) -> Units<'a> {
        let granularity = match step["dim"].as_u64() {
            None => Granularity::Weight,
            Some(0) => Granularity::Row,
            Some(_) => Granularity::Column { taps: self.taps() },
        };
        let importance = match (step["method"].as_str().unwrap(), &step["n"]) {
            (method, _) if method.starts_with("random") => Importance::Random { seed: 7 },
            (_, Value::String(n)) => Importance::Ln(n.parse().unwrap()),
            (_, n) => Importance::Ln(n.as_f64().unwrap_or(1.0)),
        };
        Units::new(&self.w, granularity, importance, before).unwrap()
    }
}

/// As Python prints it.
fn amount(value: &Value) -> Amount {
    value.to_string().parse().unwrap()
}

#[test]
fn masks_are_those_of_torch() {
    let (all, tensors) = (vectors(), Tensor::all());
    assert_eq!(list(&all["cases"]).len(), 21 + 84 + 2 + 15);
    for case in list(&all["cases"]) {
        let tensor = &tensors[case["tensor"].as_str().unwrap()];
        let mut mask: Option<Mask> = None;
        for step in list(&case["steps"]) {
            let next = tensor.units(step, mask.as_ref()).mask(amount(&step["amount"])).unwrap();
            mask = Some(next);
        }
        assert_eq!(
            tensor.bits(&mask.unwrap()),
            case["mask"].as_str().unwrap(),
            "{}: {}",
            case["tensor"],
            case["steps"]
        );
    }
}

#[test]
fn several_matrices_are_pruned_together_as_torch_does() {
    let (all, tensors) = (vectors(), Tensor::all());
    for case in list(&all["global"]) {
        let of: Vec<_> = list(&case["tensors"]).iter().map(|name| &tensors[name.as_str().unwrap()]).collect();
        let before: Vec<Option<Mask>> = of
            .iter()
            .map(|tensor| {
                let step = Some(&case["before"]).filter(|step| step.is_object())?;
                Some(tensor.units(step, None).mask(amount(&step["amount"])).unwrap())
            })
            .collect();
        let units: Vec<_> = of
            .iter()
            .zip(&before)
            .map(|(tensor, before)| Units::new(&tensor.w, Granularity::Weight, L1, before.as_ref()).unwrap())
            .collect();
        let masks = prune_units(&units, amount(&case["amount"])).unwrap();
        let bits: Vec<_> = of.iter().zip(&masks).map(|(tensor, mask)| tensor.bits(mask)).collect();
        assert_eq!(Value::from(bits), case["masks"], "{} {}", case["before"], case["amount"]);
    }
}

#[test]
fn random_masks_remove_as_many_as_torch_and_follow_from_their_seed() {
    let tensors = Tensor::all();
    for case in list(&vectors()["random"]) {
        let tensor = &tensors[case["tensor"].as_str().unwrap()];
        let units = tensor.units(&case["step"], None);
        let mask = units.mask(amount(&case["step"]["amount"])).unwrap();
        let removed = tensor.w.rows() * tensor.w.cols() - mask.count();
        assert_eq!(removed as u64, case["removed"].as_u64().unwrap(), "{case}");
        assert_eq!(mask, tensor.units(&case["step"], None).mask(amount(&case["step"]["amount"])).unwrap());
    }
    let of = |seed| {
        let w = Matrix::zeros(64, 64, DType::F16).unwrap();
        Units::new(&w, Granularity::Weight, Importance::Random { seed }, None)
            .unwrap()
            .mask(Amount::count(2048))
            .unwrap()
    };
    assert_ne!(of(1), of(2));
    // Any weight may go: of 32 masks, each keeps some and no weight stays in all.
    let kept = |row, col| (0..32).filter(|&seed| of(seed).get(row, col)).count();
    let counts: Vec<_> = (0..64).map(|at| kept(at, 63 - at)).collect();
    assert!(counts.iter().all(|&count| (2..31).contains(&count)), "{counts:?}");
}

/// The mask's bits, row by row.
fn rows(mask: &Mask) -> Vec<String> {
    let bit = |row, col| if mask.get(row, col) { '1' } else { '0' };
    (0..mask.rows()).map(|row| (0..mask.cols()).map(|col| bit(row, col)).collect()).collect()
}

#[test]
fn of_equal_scores_the_last_go() {
    let w = Matrix::from_f32(2, 4, &[1., -1., 0., -0., 1., 2., -0., 0.]).unwrap();
    let weights = Units::new(&w, Granularity::Weight, L1, None).unwrap();
    let mask = |count| rows(&weights.mask(Amount::count(count)).unwrap());
    // Zeros first, whatever their sign, from the end on.
    assert_eq!(mask(3), ["1110", "1100"]);
    assert_eq!(mask(5), ["1100", "0100"]);
    assert_eq!(mask(7), ["0000", "0100"]);
    // Ties over several matrices, too.
    let masks = prune_units(&[weights.clone(), weights.clone()], Amount::count(9)).unwrap();
    assert_eq!(
        (rows(&masks[0]), rows(&masks[1])),
        (vec!["1100".into(), "1100".into()], vec!["1100".into(), "0100".into()])
    );
}

#[test]
fn all_and_nothing_and_empty_matrices() {
    let w = Matrix::uniform(3, 8, DType::Bf16, 5).unwrap();
    let block = Granularity::Block { rows: 2, cols: 3 };
    for granularity in [Granularity::Weight, Granularity::Row, Granularity::Column { taps: 2 }, block] {
        let units = Units::new(&w, granularity, L1, None).unwrap();
        let count = |text: &str| units.mask(text.parse().unwrap()).unwrap().count();
        assert_eq!((count("0"), count("0.0"), count("0%"), count("1.0"), count("100%")), (24, 24, 24, 0, 0));
        // After all are gone there is nothing of which a share could be taken.
        let none = units.mask(Amount::share(1.0).unwrap()).unwrap();
        let again = Units::new(&w, granularity, L1, Some(&none)).unwrap();
        assert_eq!((again.left(), again.mask(Amount::share(0.5).unwrap()).unwrap()), (0, none.clone()));
        for (m, k) in [(0, 8), (3, 0), (0, 0)] {
            let empty = Matrix::zeros(m, k, DType::F32).unwrap();
            for n in [0.0, 1.0, -1.0, f64::INFINITY, f64::NEG_INFINITY] {
                let units = Units::new(&empty, granularity, Importance::Ln(n), None).unwrap();
                assert_eq!(units.mask(Amount::share(1.0).unwrap()).unwrap().count(), 0);
            }
        }
    }
    assert!(prune_units(&[], Amount::share(0.5).unwrap()).unwrap().is_empty());
    let error = prune_units(&[], Amount::count(1)).unwrap_err().to_string();
    assert_eq!(error, "1 are to be pruned, and there are 0");
}

#[test]
fn blocks_of_an_edge_are_compared_with_whole_ones() {
    // Blocks of 2 x 2 of a matrix of 3 x 5. The last one is a single weight.
    let w = Matrix::from_f32(3, 5, &[1., 1., 5., 5., 2., 1., 1., 5., 5., 2., 9., 0., 4., 4., 3.]).unwrap();
    let units = Units::new(&w, Granularity::Block { rows: 2, cols: 2 }, L1, None).unwrap();
    assert_eq!(units.left(), 6);
    let mask = |count| rows(&units.mask(Amount::count(count)).unwrap());
    assert_eq!(mask(1), ["00111", "00111", "11111"]);
    assert_eq!(mask(3), ["00110", "00110", "11110"]);
    // (9 + 0) / 2 is more than 4.
    assert_eq!(mask(4), ["00110", "00110", "11000"]);
}

#[test]
fn every_type_has_the_mask_of_its_numbers() {
    for dtype in [DType::F16, DType::Bf16] {
        let w = Matrix::uniform(16, 24, DType::F32, 9).unwrap().cast(dtype);
        for granularity in [Granularity::Weight, Granularity::Row, Granularity::Column { taps: 1 }] {
            let mask = |w: &Matrix| {
                Units::new(w, granularity, Importance::Ln(2.0), None).unwrap().mask("0.4".parse().unwrap())
            };
            assert_eq!(mask(&w).unwrap(), mask(&w.cast(DType::F32)).unwrap());
        }
    }
}

#[test]
fn scores_of_the_callers_decide() {
    let scores = vec![3.0, -0.0, 2.0, 0.0];
    let before = Mask::from_fn(4, 2, |row, _| row != 2).unwrap();
    let units = |before| Units::given(4, 2, Granularity::Row, scores.clone(), before).unwrap();
    assert_eq!(rows(&units(None).mask(Amount::count(2)).unwrap()), ["11", "00", "11", "00"]);
    // The row that is gone is none of the two.
    assert_eq!(rows(&units(Some(&before)).mask(Amount::count(2)).unwrap()), ["11", "00", "00", "00"]);
    let message = |scores: &[f32]| Units::given(2, 4, Granularity::Row, scores.into(), None).unwrap_err().to_string();
    assert_eq!(message(&[1.0]), "scores of rows has shape [1], expected [2]");
    assert_eq!(message(&[1.0, f32::NAN]), "the score 1 of rows is NaN, expected a number of at least 0");
    assert_eq!(message(&[-1.0, 2.0]), "the score 0 of rows is -1, expected a number of at least 0");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut data = vec![1.0; 24];
    data[2 * 8 + 5] = f32::NAN;
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let w = Matrix::from_f32(3, 8, &data).unwrap().cast(dtype);
        for importance in [L1, Importance::Ln(f64::NEG_INFINITY), Importance::Random { seed: 1 }] {
            let error = Units::new(&w, Granularity::Row, importance, None).unwrap_err();
            assert!(error.is_nan() && error.place() == Some((2, 5)), "{error}");
        }
    }
    let w = Matrix::zeros(3, 8, DType::F32).unwrap();
    let message = |granularity, n| Units::new(&w, granularity, Importance::Ln(n), None).unwrap_err().to_string();
    assert_eq!(message(Granularity::Weight, f64::NAN), "the n of an Ln norm is NaN");
    assert_eq!(message(Granularity::Column { taps: 3 }, 1.0), "8 columns are no channels of 3 taps each");
    assert_eq!(message(Granularity::Column { taps: 0 }, 1.0), "8 columns are no channels of 0 taps each");
    assert_eq!(message(Granularity::Block { rows: 4, cols: 0 }, 1.0), "a block of 4x0 has no weights");
    let other = Mask::from_fn(8, 3, |_, _| true).unwrap();
    assert!(Units::new(&w, Granularity::Row, L1, Some(&other)).unwrap_err().is_shape());
    let error = Units::new(&w, Granularity::Row, L1, None).unwrap().mask(Amount::count(4)).unwrap_err();
    assert_eq!(error.to_string(), "rows: 4 are to be pruned, and there are 3");

    let parse = |text: &str| text.parse::<Amount>();
    for (text, shown) in [("0.25", "0.25"), ("25%", "0.25"), ("1", "1"), ("1.0", "1.0"), ("1e-1", "0.1"), ("7", "7")] {
        assert_eq!(parse(text).unwrap().to_string(), shown);
    }
    for text in ["1.5", "-0.1", "NaN", "101%", "-1"] {
        assert!(parse(text).unwrap_err().to_string().ends_with("is no share from 0 to 1"), "{text}");
    }
    assert!(parse("half").unwrap_err().to_string().contains("neither a share, as 0.5 and 50%, nor a whole number"));
}

#[cfg(feature = "cli")]
#[path = "common/binary.rs"]
mod binary;

/// The command line.
#[cfg(feature = "cli")]
mod command {
    use std::path::Path;

    use serde_json::Value;
    use sparse24::io::{self, Source, Stored};
    use sparse24::{Sparse24, VectorLen, prune};

    use super::binary::{sparse24, text};
    use super::*;

    /// A file of three matrices, of which one is spared by its name, and what is written of it.
    fn pruned(dir: &Path, flags: &[&str]) -> (Vec<Matrix>, Vec<Matrix>, Value) {
        let (from, to) = (dir.join("from.safetensors"), dir.join("to.safetensors"));
        let named = ["down.weight", "token_embedding.weight", "up.weight"];
        let matrices: Vec<_> = [(8, 20, DType::F32), (8, 20, DType::F32), (12, 8, DType::F16)]
            .into_iter()
            .enumerate()
            .map(|(i, (m, k, dtype))| Matrix::uniform(m, k, dtype, 50 + i as u64).unwrap())
            .collect();
        let entries: Vec<_> = named.into_iter().zip(&matrices).collect();
        io::save_matrices(&from, &entries).unwrap();
        let report = sparse24([&["prune", text(&from), text(&to), "--json"], flags].concat()).json();
        let source = Source::open(&to).unwrap();
        let written = named.map(|name| source.matrix(source.item(name).unwrap()).unwrap());
        assert_eq!(written[1], matrices[1], "{flags:?}");
        (matrices, written.into(), report)
    }

    #[test]
    fn each_granularity_is_that_of_the_library() {
        let block = |rows, cols| Granularity::Block { rows, cols };
        let random = |seed| Importance::Random { seed };
        let (weight, row, column) = (Granularity::Weight, Granularity::Row, Granularity::Column { taps: 1 });
        for (flags, granularity, importance, amount) in [
            (&["--granularity", "weight", "--amount", "0.5"][..], weight, L1, "0.5"),
            (&["--method", "l1_unstructured", "--amount", "7"], weight, L1, "7"),
            (&["--method", "random_unstructured", "--amount", "30%", "--seed", "5"], weight, random(5), "0.3"),
            (&["--granularity", "row", "--amount", "3"], row, L1, "3"),
            (
                &["--method", "magnitude-l2", "--granularity", "column", "--amount", "0.25"],
                column,
                Importance::Ln(2.0),
                "0.25",
            ),
            (
                &["--method", "ln_structured", "--norm", "-inf", "--granularity", "row", "--amount", "0.5"],
                row,
                Importance::Ln(f64::NEG_INFINITY),
                "0.5",
            ),
            (&["--method", "random_structured", "--granularity", "row", "--amount", "2"], row, random(24), "2"),
            (&["--granularity", "block", "--amount", "2"], block(4, 4), L1, "2"),
            (
                &["--granularity", "block:2x8", "--amount", "0.5", "--norm", "3"],
                block(2, 8),
                Importance::Ln(3.0),
                "0.5",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (before, after, report) = pruned(dir.path(), flags);
            for (name, at) in [("down.weight", 0), ("up.weight", 2)] {
                let importance = match importance {
                    Importance::Random { seed } => random(prune::seed_of(name, seed)),
                    importance => importance,
                };
                let mask =
                    Units::new(&before[at], granularity, importance, None).unwrap().mask(amount.parse().unwrap());
                assert_eq!(after[at], mask.unwrap().apply(&before[at]).unwrap(), "{flags:?}: {name}");
            }
            assert_eq!((&report["schema"], &report["scope"]), (&"sparse24-masks/1".into(), &"local".into()));
            assert_eq!(report["amount"], amount);
            let zeros = [0, 2].map(|at| after[at].elements().to_f32().iter().filter(|x| **x == 0.0).count() as u64);
            assert_eq!(
                [&report["layers"][0]["zeros"], &report["layers"][1]["zeros"]],
                zeros.map(Value::from).each_ref()
            );
            assert_eq!(report["zeros_share"], (zeros[0] + zeros[1]) as f64 / 256.0);
        }
    }

    #[test]
    fn a_global_amount_is_of_all_matrices() {
        for (flags, method) in [
            (&["--method", "global_unstructured", "--amount", "0.4"][..], "global_unstructured"),
            (&["--granularity", "weight", "--scope", "global", "--amount", "0.4"], "magnitude"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (before, after, report) = pruned(dir.path(), flags);
            let units = [0, 2].map(|at| Units::new(&before[at], Granularity::Weight, L1, None).unwrap());
            let masks = prune_units(&units, "0.4".parse().unwrap()).unwrap();
            for (at, mask) in [0, 2].into_iter().zip(&masks) {
                assert_eq!(after[at], mask.apply(&before[at]).unwrap());
            }
            assert_eq!((&report["scope"], &report["method"]), (&"global".into(), &method.into()));
        }
    }

    #[test]
    fn pruning_again_takes_of_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(format!("{name}.safetensors")));
        let w = Matrix::uniform(16, 24, DType::Bf16, 3).unwrap();
        io::save_matrices(&a, &[("up.weight", &w)]).unwrap();
        sparse24(["prune", text(&a), text(&b), "--granularity", "row", "--amount", "4"]).fine();
        let said = sparse24(["prune", text(&b), text(&c), "--granularity", "weight", "--amount", "0.5"]).fine();
        let rows = Units::new(&w, Granularity::Row, L1, None).unwrap().mask(Amount::count(4)).unwrap();
        let both = Units::new(&w, Granularity::Weight, L1, Some(&rows)).unwrap().mask("0.5".parse().unwrap()).unwrap();
        let source = Source::open(&c).unwrap();
        let item = source.item("up.weight").unwrap();
        assert_eq!((source.matrix(item).unwrap(), item.stored), (both.apply(&w).unwrap(), Stored::Dense));
        // 4 of 16 rows, and half of the others.
        assert!(
            said.contains("1 matrix pruned by magnitude (granularity weight, amount 0.5, local): 62.50 % of their"),
            "{said}"
        );
        let how = &source.files()[0].metadata()["sparse24.pruned"];
        let [first, second] = ["magnitude row L1 amount=4", "magnitude weight amount=0.5"]
            .map(|how| format!("{how} scope=local seed=24"));
        assert_eq!(*how, format!("{first}, then {second}"));
    }

    #[test]
    fn two_four_is_what_vector_says() {
        let dir = tempfile::tempdir().unwrap();
        let [from, a, b] = ["from", "a", "b"].map(|name| dir.path().join(format!("{name}.safetensors")));
        let w = Matrix::uniform(16, 24, DType::F32, 3).unwrap();
        io::save_matrices(&from, &[("up.weight", &w)]).unwrap();
        sparse24(["prune", text(&from), text(&a), "--granularity", "8:2:4"]).fine();
        let eight = VectorLen::new(8).unwrap();
        let expected = Sparse24::compress(&w, &prune::magnitude(&w, eight).unwrap()).unwrap();
        assert_eq!(Source::open(&a).unwrap().files()[0].sparse24("up.weight").unwrap(), expected);
        sparse24(["prune", text(&from), text(&b), "--granularity", "2:4", "--to", "dense"]).fine();
        let source = Source::open(&b).unwrap();
        let one = prune::magnitude(&w, VectorLen::ONE).unwrap().mask().apply(&w).unwrap();
        assert_eq!(source.matrix(source.item("up.weight").unwrap()).unwrap(), one);
    }

    #[test]
    fn kernels_of_convolutions_are_pruned_as_torch_does() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from.safetensors"), dir.path().join("to.safetensors"));
        let all = vectors();
        let list_of = |value: &Value| list(value).iter().map(|w| w.as_f64().unwrap() as f32).collect::<Vec<_>>();
        let weights = list_of(&all["tensors"]["c"]["weights"]);
        let bytes: Vec<_> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(io::Dtype::F32, vec![6, 5, 3, 3], &bytes).unwrap();
        safetensors::serialize_to_file([("conv.weight", view)], None, &from).unwrap();
        let mut compared = 0;
        for case in list(&all["cases"]) {
            let step = &case["steps"][0];
            if case["tensor"] != "c" || list(&case["steps"]).len() != 1 || step["amount"] == 0 || step["amount"] == 0.0
            {
                continue;
            }
            let (method, amount) = (step["method"].as_str().unwrap(), step["amount"].to_string());
            let n = step["n"].as_str().map_or_else(|| step["n"].to_string(), str::to_owned);
            let granularity = if step["dim"] == 0 { "row" } else { "column" };
            let mut flags = vec!["prune", text(&from), text(&to), "--method", method, "--amount", &amount];
            if method == "ln_structured" {
                flags.extend(["--granularity", granularity, "--norm", &n]);
            }
            sparse24(&flags).fine();
            let source = Source::open(&to).unwrap();
            let item = source.item("conv.weight").unwrap();
            assert_eq!(item.shape, [6, 5, 3, 3]);
            let bytes = source.dense(item).unwrap();
            let written: Vec<_> = bytes.as_chunks::<4>().0.iter().map(|&w| f32::from_le_bytes(w)).collect();
            let kept = case["mask"].as_str().unwrap().chars();
            let expected: Vec<_> =
                weights.iter().zip(kept).map(|(w, kept)| if kept == '1' { *w } else { 0.0 }).collect();
            assert_eq!(written, expected, "{step}");
            compared += 1;
        }
        assert_eq!(compared, 5 + 28);
    }

    #[test]
    fn rows_of_a_matrix_of_in_x_out_are_its_columns() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(format!("{name}.safetensors")));
        // A kernel of Flax: in features first.
        let w = Matrix::uniform(6, 10, DType::F32, 4).unwrap().to_array();
        io::save_matrices(&from, &[("up.kernel", &Matrix::from_array(w.view()))]).unwrap();
        let report =
            sparse24(["prune", text(&from), text(&to), "--granularity", "row", "--amount", "4", "--json"]).json();
        assert_eq!((&report["layers"][0]["m"], &report["layers"][0]["in_by_out"]), (&10.into(), &true.into()));
        let turned = Matrix::from_array(w.t());
        let mask = Units::new(&turned, Granularity::Row, L1, None).unwrap().mask(Amount::count(4)).unwrap();
        let expected = Matrix::from_array(mask.apply(&turned).unwrap().to_array().t());
        let source = Source::open(&to).unwrap();
        assert_eq!(source.matrix(source.item("up.kernel").unwrap()).unwrap(), expected);
    }

    #[test]
    fn flags_that_do_not_fit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(format!("{name}.safetensors")));
        io::save_matrices(&from, &[("up.weight", &Matrix::zeros(8, 8, DType::F32).unwrap())]).unwrap();
        for (flags, said) in [
            (&["--granularity", "weight"][..], "--granularity weight needs --amount"),
            (&["--granularity", "line", "--amount", "1"], "is not weight, 2:4, V:2:4, row, column, block"),
            (&["--granularity", "3:2:4"], "vector length 3 is not one of"),
            (&["--granularity", "block:4", "--amount", "1"], "\"4\" is no size of a block, such as 4x4"),
            (&["--granularity", "block:0x4", "--amount", "1"], "\"0x4\" is no size of a block"),
            (&["--granularity", "row", "--amount", "2.5"], "amount 2.5 is no share from 0 to 1"),
            (&["--granularity", "2:4", "--vector", "2"], "cannot be used with"),
            (&["--amount", "0.5"], "--amount is for what --granularity names other than 2:4"),
            (&["--granularity", "2:4", "--scope", "global"], "--scope is for what --granularity names"),
            (&["--granularity", "row", "--amount", "1", "--scope", "all"], "is not local or global"),
            (
                &["--granularity", "row", "--amount", "1", "--method", "wanda"],
                "--method wanda chooses two of every four",
            ),
            (&["--granularity", "row", "--amount", "1", "--to", "cutlass"], "--to cutlass has no place but for 2:4"),
            (
                &["--granularity", "row", "--amount", "1", "--permute", "2"],
                "--permute is for 2:4, not for --granularity row",
            ),
            (&["--granularity", "row", "--amount", "1", "--calibration", "x"], "--calibration is for 2:4"),
            (&["--granularity", "weight", "--amount", "1", "--norm", "2"], "--norm is not of single weights"),
            (&["--granularity", "row", "--amount", "1", "--norm", "2", "--method", "random"], "--norm is not random's"),
            (&["--granularity", "row", "--amount", "1", "--norm", "NaN"], "--norm: NaN is no number"),
            (
                &["--method", "ln_structured", "--amount", "1", "--norm", "1"],
                "prunes what --granularity says: row (dim=0)",
            ),
            (&["--method", "ln_structured", "--amount", "1", "--granularity", "row"], "needs its n: --norm N"),
            (&["--method", "l1_unstructured", "--amount", "1", "--granularity", "row"], "prunes single weights, not"),
            (&["--method", "global_unstructured", "--amount", "1", "--scope", "local"], "prunes all matrices together"),
            (&["--method", "bn-scale", "--amount", "1"], "--method bn-scale is of channels"),
            (&["--method", "apoz", "--amount", "1", "--granularity", "channel"], "--calibration is needed"),
            (&["--granularity", "channel", "--amount", "1"], "a model's folder is needed, whose config says"),
        ] {
            let stderr = sparse24([&["prune", text(&from), text(&to)], flags].concat()).refused(2);
            assert!(stderr.contains(said), "{flags:?}: {stderr}");
        }
        // What only the weights tell.
        let many = sparse24(["prune", text(&from), text(&to), "--granularity", "row", "--amount", "9"]).refused(1);
        assert!(many.contains("tensor up.weight: rows: 9 are to be pruned, and there are 0"), "{many}");
        let none = ["prune", text(&from), text(&to), "--granularity", "row", "--amount", "1", "--include", "no"];
        assert!(sparse24(none).refused(1).contains("nothing to prune"));
        let mut nan = [1.0; 16];
        nan[13] = f32::NAN;
        io::save_matrices(&from, &[("up.weight", &Matrix::from_f32(2, 8, &nan).unwrap())]).unwrap();
        let stderr = sparse24(["prune", text(&from), text(&to), "--granularity", "row", "--amount", "1"]).refused(1);
        assert!(stderr.contains("tensor up.weight: weight at row 1, column 5 is NaN"), "{stderr}");
        assert!(!to.exists());
    }

    #[test]
    fn inspect_says_where_other_forms_are_smaller() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.safetensors");
        // Of 64 x 128 weights of f32 an eighth is left in one matrix, nothing is gone of the other.
        let sparse =
            Matrix::from_f32(64, 128, &std::array::from_fn::<f32, 8192, _>(|i| if i % 8 == 0 { 1.0 } else { 0.0 }))
                .unwrap();
        let dense = Matrix::from_f32(64, 128, &[1.0; 8192]).unwrap();
        io::save_matrices(&file, &[("dense", &dense), ("sparse", &sparse)]).unwrap();
        let report = sparse24(["inspect", text(&file), "--json"]).json();
        assert!(report["tensors"][0]["matrix"].get("break_even").is_none());
        let facts = &report["tensors"][1]["matrix"];
        let bytes = |name: &str| facts[format!("{name}_bytes")].as_u64().unwrap();
        assert_eq!((bytes("dense"), bytes("coo"), bytes("csr")), (32768, 1024 * 12, 1024 * 8 + 65 * 4));
        assert_eq!((bytes("bitmask"), bytes("sparse24")), (1024 * 4 + 1024, 64 * 64 * 4 + 64 * 4 * 4));
        // At each share the two forms take the same bytes, but for a part of one non-zero.
        let taken = |form: &str, nonzeros: f64| match form {
            "coo" => 12.0 * nonzeros,
            "csr" => 8.0 * nonzeros + 260.0,
            "bitmask" => 4.0 * nonzeros + 1024.0,
            _ => bytes(form) as f64,
        };
        for form in ["coo", "csr"] {
            for other in ["dense", "bitmask", "sparse24"] {
                let share = facts["break_even"][form][other].as_f64().unwrap();
                let nonzeros = (1.0 - share) * 8192.0;
                let off = taken(form, nonzeros) - taken(other, nonzeros);
                assert!(off.abs() < 1e-6 && (0.0..1.0).contains(&share), "{form}, {other}: {share}");
            }
        }
        let said = sparse24(["inspect", text(&file)]).fine();
        let row = said.lines().find(|line| line.starts_with("87.5%")).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells, ["87.5%", "8.25K", "5.00K", "66.7%", "98.4%", "82.3%", "50.4%", "97.7%", "73.8%", "sparse"]);
        assert_eq!(said.matches("COO<dense").count(), 1, "{said}");

        // One row is too few for CSR to win anything against a bit for each weight.
        io::save_matrices(&file, &[("row", &Matrix::zeros(1, 64, DType::F16).unwrap())]).unwrap();
        let report = sparse24(["inspect", text(&file), "--json"]).json();
        let even = &report["tensors"][0]["matrix"]["break_even"];
        assert!(even["csr"]["bitmask"].is_null() && even["coo"]["bitmask"].is_number(), "{even}");
    }
}
