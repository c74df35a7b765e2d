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
