//! Pruning by the inputs of a layer: the criteria, SparseGPT against what brute force finds, and how masks compose.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::{Array1, Array2, s};
use proptest::prelude::*;
use sparse24::prune::{self, Criterion, Method, Norm, SparseGpt, Statistics};
use sparse24::{DType, Mask, Matrix, VectorLen};

fn v(v: usize) -> VectorLen {
    VectorLen::new(v).unwrap()
}

/// Statistics of `tokens` inputs of k features, each the sum of its own noise and of what all share.
fn correlated(tokens: usize, k: usize, seed: u64) -> Statistics {
    let own = Matrix::uniform(tokens, k, DType::F32, seed).unwrap().to_array();
    let shared = Matrix::uniform(tokens, 2, DType::F32, seed + 1).unwrap().to_array();
    let x = Array2::from_shape_fn((tokens, k), |(t, c)| own[[t, c]] + (1 + c % 3) as f32 * shared[[t, c % 2]]);
    let mut statistics = Statistics::full(k).unwrap();
    statistics.add(&Matrix::from_array(x.view())).unwrap();
    statistics
}

/// H + λI as SparseGPT damps it, in f64.
fn damped(statistics: &Statistics, damping: f64) -> Array2<f64> {
    let h = statistics.gram().unwrap().to_owned();
    let mean = h.diag().mean().unwrap();
    h / mean + Array2::<f64>::eye(statistics.k()) * damping
}

/// x with a·x = b, by Gaussian elimination with pivots.
fn solve(mut a: Array2<f64>, mut b: Array1<f64>) -> Array1<f64> {
    let n = b.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&p, &q| a[[p, i]].abs().total_cmp(&a[[q, i]].abs())).unwrap();
        for c in 0..n {
            a.swap([i, c], [pivot, c]);
        }
        b.swap(i, pivot);
        for r in i + 1..n {
            let factor = a[[r, i]] / a[[i, i]];
            for c in i..n {
                a[[r, c]] -= factor * a[[i, c]];
            }
            b[r] -= factor * b[i];
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|c| a[[i, c]] * b[c]).sum();
        b[i] = (b[i] - known) / a[[i, i]];
    }
    b
}

/// The least (ŵ - w)·H·(ŵ - w)ᵀ over all ŵ with non-zeros where `kept` says so, and that ŵ.
fn best(w: &Array1<f64>, h: &Array2<f64>, kept: &[usize]) -> (f64, Array1<f64>) {
    // H_KK·ŵ_K = (H·w)_K.
    let target = h.dot(w);
    let a = Array2::from_shape_fn((kept.len(), kept.len()), |(i, j)| h[[kept[i], kept[j]]]);
    let found = solve(a, kept.iter().map(|&i| target[i]).collect());
    let mut all = Array1::zeros(w.len());
    for (&at, x) in kept.iter().zip(found) {
        all[at] = x;
    }
    let lost = &all - w;
    (lost.dot(&h.dot(&lost)), all)
}

#[test]
fn statistics_are_sums_of_products_whatever_the_pieces() {
    // More columns than a block of the product, and more tokens than are summed in f32.
    let (tokens, k) = (4100, 150);
    let x = Matrix::uniform(tokens, k, DType::F32, 1).unwrap();
    let (mut whole, mut pieces) = (Statistics::full(k).unwrap(), Statistics::full(k).unwrap());
    whole.add(&x).unwrap();
    pieces.add(&x.rows_of(0..7).unwrap()).unwrap();
    pieces.add(&x.rows_of(7..tokens).unwrap()).unwrap();
    let x = x.to_array().mapv(f64::from);
    let expected = x.t().dot(&x);
    for statistics in [&whole, &pieces] {
        assert_eq!(statistics.tokens(), tokens as u64);
        let off = &statistics.gram().unwrap() - &expected;
        assert!(off.iter().all(|x| x.abs() < 1e-2), "{:e}", off.iter().fold(0f64, |m, x| m.max(x.abs())));
        for (c, &square) in statistics.squares().iter().enumerate() {
            assert!((square - expected[[c, c]]).abs() < 1e-6 * square);
        }
    }
}

#[test]
fn bad_inputs_are_refused_by_place() {
    let mut statistics = Statistics::full(4).unwrap();
    let error = statistics.add(&Matrix::from_f32(1, 3, &[1.; 3]).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "inputs has shape [1, 3], expected [1, 4]");
    let error = statistics.add(&Matrix::from_f32(1, 4, &[1., 2., f32::NAN, 0.]).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "input 2 of token 0 is NaN");

    let x = Matrix::from_f32(1, 4, &[1., 2., 3., 0.]).unwrap();
    for paired_first in [true, false] {
        let mut statistics = Statistics::full(4).unwrap();
        let mut both = [statistics.add_pair(&x, &x), Ok(())];
        if !paired_first {
            statistics = Statistics::full(4).unwrap();
            both[0] = statistics.add(&x);
        }
        both[1] = if paired_first { statistics.add(&x) } else { statistics.add_pair(&x, &x) };
        assert!(both[0].is_ok());
        let error = both[1].as_ref().unwrap_err().to_string();
        assert_eq!(error, "pairs of inputs are for full statistics of pairs alone");
    }
    let empty = Method::Wanda.prune(&x, VectorLen::ONE, Some(&Statistics::diagonal(4)), 1).unwrap_err().to_string();
    assert_eq!(empty, "wanda needs statistics of the layer's inputs");
    let far = Matrix::from_f32(1, 4, &[60000., 3000., 3000., 60000.]).unwrap().cast(DType::F16);
    let mut twins = Statistics::full(4).unwrap();
    twins.add(&Matrix::from_f32(3, 4, &[1., 0., 0., 1., 0., 9., 0., 0., 0., 0., 9., 0.]).unwrap()).unwrap();
    let error = SparseGpt { damping: 1e-3, ..SparseGpt::new(VectorLen::ONE) };
    let error = error.prune(&far, &twins, None).map(|(w, _)| w.elements().to_f32());
    assert!(error.as_ref().is_err_and(|e| e.to_string().contains("which is no f16")), "{error:?}");

    let w = Matrix::from_f32(1, 4, &[1., 2., 3., f32::NAN]).unwrap();
    let one = VectorLen::ONE;
    let nan = |result: sparse24::Result<_>| {
        let error = result.unwrap_err();
        assert!(error.is_nan() && error.place() == Some((0, 3)), "{error}");
    };
    nan(Criterion::magnitude(Norm::L1).mask(&w, one, None).map(|_| ()));
    nan(Criterion::wanda(&correlated(9, 4, 1)).scores(&w, None).map(|_| ()));
    let error = SparseGpt::new(one).prune(&w, &correlated(9, 4, 1), None).unwrap_err().to_string();
    assert_eq!(error, "weight at row 0, column 3 is NaN");
    let w = Matrix::zeros(1, 4, DType::F32).unwrap();
    let error = SparseGpt::new(one).prune(&w, &Statistics::diagonal(4), None).unwrap_err().to_string();
    assert_eq!(error, "second-order pruning needs statistics with a full Gram matrix");
    let error = Method::Wanda.prune(&w, one, None, 1).unwrap_err().to_string();
    assert_eq!(error, "wanda needs statistics of the layer's inputs");
}

#[test]
fn criteria_add_up_over_rows_as_their_table_says() {
    let w = Matrix::from_f32(2, 4, &[3., 2., 1., 0., 0., 2., 1.5, 3.5]).unwrap();
    let kept = |criterion: Criterion| criterion.mask(&w, v(2), None).unwrap().mask().group(0, 0);
    // |w|: 3, 4, 2.5, 3.5. w²: 9, 8, 3.25, 12.25.
    assert_eq!(kept(Criterion::magnitude(Norm::L1)), 0b1010);
    assert_eq!(kept(Criterion::magnitude(Norm::L2)), 0b1001);
    // Σx² = 1, 4, 9, 0: norms 1, 2, 3, 0.
    let mut statistics = Statistics::diagonal(4);
    statistics.add(&Matrix::from_f32(1, 4, &[1., -2., 3., 0.]).unwrap()).unwrap();
    // |w|·‖x‖: 3, 8, 7.5, 0. w²·Σx²: 9, 32, 29.25, 0.
    assert_eq!(kept(Criterion::wanda(&statistics)), 0b0110);
    assert_eq!(kept(Criterion::second_order(&statistics)), 0b0110);
    let scores = Criterion::second_order(&statistics).scores(&w, None).unwrap();
    assert_eq!(scores.row(0).to_vec(), [4.5, 8.0, 4.5, 0.0]);
    let scores = Criterion::wanda(&statistics).scores(&w, None).unwrap();
    assert_eq!(scores.row(1).to_vec(), [0.0, 4.0, 4.5, 0.0]);
}

#[test]
fn magnitude_by_criterion_is_magnitude() {
    for vector in [1, 4, 32] {
        let w = Matrix::uniform(33, 50, DType::F32, 5).unwrap();
        let by_criterion = Criterion::magnitude(Norm::L1).mask(&w, v(vector), None).unwrap();
        assert_eq!(by_criterion, prune::magnitude(&w, v(vector)).unwrap());
    }
}

#[test]
fn a_pruned_weight_stays_pruned_by_every_method() {
    let (m, k) = (16, 24);
    let w = Matrix::uniform(m, k, DType::F32, 3).unwrap();
    let statistics = correlated(100, k, 4);
    // Whole columns, scattered weights, and a group of which nothing is left.
    let before = Mask::from_fn(m, k, |row, col| col % 7 != 3 && (row * 5 + col * 3) % 11 != 0 && col / 4 != 2).unwrap();
    let w = before.apply(&w).unwrap();
    for method in Method::ALL {
        for vector in [1, 4, 16] {
            let (pruned, mask) = method.prune(&w, v(vector), Some(&statistics), 9).unwrap();
            for (row, col) in (0..m).flat_map(|row| (0..k).map(move |col| (row, col))) {
                let what = format!("{method}, V={vector}, row {row}, column {col}");
                assert!(!mask.mask().get(row, col) || before.get(row, col), "{what} is kept again");
                assert!(mask.mask().get(row, col) || pruned.get(row, col) == 0.0, "{what} is no zero");
                // Where two positions or fewer were left to a whole group at V = 1, nothing more goes.
                let left = before.group(row, col / 4).count_ones();
                if vector == 1 && left <= 2 && before.get(row, col) && method != Method::Random {
                    assert!(mask.mask().get(row, col), "{what} is gone");
                }
            }
        }
    }
}

#[test]
fn a_group_loses_the_pair_that_costs_least_of_all_six() {
    let mut differs = 0;
    for seed in 0..40 {
        let statistics = correlated(30, 4, seed);
        let w = Matrix::uniform(3, 4, DType::F32, 100 + seed).unwrap();
        let h = damped(&statistics, SparseGpt::new(VectorLen::ONE).damping);
        let rows: Vec<Array1<f64>> =
            w.to_array().mapv(f64::from).rows().into_iter().map(|row| row.to_owned()).collect();
        let cost = |kept: &[usize]| rows.iter().map(|row| best(row, &h, kept).0).sum::<f64>();
        let pairs = [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]];
        let least = pairs.into_iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap();
        // Three rows of one pattern: the block is ragged.
        let (_, mask) = SparseGpt::new(v(4)).prune(&w, &statistics, None).unwrap();
        let expected = least.iter().fold(0u8, |bits, i| bits | 1 << i);
        assert_eq!(mask.mask().group(0, 0), expected, "seed {seed}");
        let diagonal = Criterion::second_order(&statistics).mask(&w, v(4), None).unwrap();
        differs += usize::from(diagonal.mask().group(0, 0) != expected);
    }
    assert!(differs > 3, "the diagonal alone finds all but {differs}: the inputs are not correlated enough to tell");
}

#[test]
fn the_refit_finds_the_best_weights_under_the_mask() {
    for (m, k, vector) in [(5, 23, 1), (6, 140, 2)] {
        let statistics = correlated(300, k, 7);
        let w = Matrix::uniform(m, k, DType::F32, 8).unwrap();
        let h = damped(&statistics, SparseGpt::new(VectorLen::ONE).damping);
        let (pruned, mask) =
            SparseGpt { refit_steps: 200, ..SparseGpt::new(v(vector)) }.prune(&w, &statistics, None).unwrap();
        let without = SparseGpt { refit_steps: 0, ..SparseGpt::new(v(vector)) }.prune(&w, &statistics, None).unwrap();
        assert_eq!(without.1, mask, "the refit leaves the mask alone");
        for row in 0..m {
            let kept: Vec<_> = (0..k).filter(|&col| mask.mask().get(row, col)).collect();
            let original: Array1<f64> = (0..k).map(|col| f64::from(w.get(row, col))).collect();
            let (least, expected) = best(&original, &h, &kept);
            let cost = |w: &Matrix| {
                let lost: Array1<f64> = (0..k).map(|col| f64::from(w.get(row, col)) - original[col]).collect();
                lost.dot(&h.dot(&lost))
            };
            let off = (0..k).map(|col| (f64::from(pruned.get(row, col)) - expected[col]).abs()).fold(0.0, f64::max);
            assert!(off < 2e-3, "{m}x{k}, row {row}: off by {off:e}");
            assert!(cost(&pruned) < least * 1.0001 + 1e-9, "row {row}: {} over {least}", cost(&pruned));
            assert!(cost(&pruned) <= cost(&without.0) * 1.0001, "row {row}: {} before", cost(&without.0));
        }
    }
}

#[test]
fn a_feature_that_is_always_zero_and_one_that_repeats_another_do_no_harm() {
    let mut x = Matrix::uniform(50, 8, DType::F32, 2).unwrap().to_array();
    x.column_mut(2).fill(0.0);
    let twin = x.column(4).to_owned();
    x.column_mut(5).assign(&twin);
    let mut statistics = Statistics::full(8).unwrap();
    statistics.add(&Matrix::from_array(x.view())).unwrap();
    let w = Matrix::uniform(4, 8, DType::F32, 3).unwrap();
    let (pruned, _) = SparseGpt::new(VectorLen::ONE).prune(&w, &statistics, None).unwrap();
    assert!(pruned.elements().to_f32().iter().all(|x| x.is_finite()));
    assert!(statistics.lost(&w, &pruned).unwrap() < 0.5);
}

#[test]
fn what_is_lost_is_the_output_error() {
    let x = Matrix::uniform(20, 6, DType::F32, 1).unwrap();
    let (w, other) = (Matrix::uniform(3, 6, DType::F32, 2).unwrap(), Matrix::uniform(3, 6, DType::F32, 3).unwrap());
    let mut statistics = Statistics::full(6).unwrap();
    statistics.add(&x).unwrap();
    let [x, w64, other64] = [&x, &w, &other].map(|m| m.to_array().mapv(f64::from));
    let energy = |w: &Array2<f64>| x.dot(&w.t()).mapv(|y| y * y).sum();
    let expected = energy(&(&other64 - &w64)) / energy(&w64);
    assert!((statistics.lost(&w, &other).unwrap() - expected).abs() < 1e-5 * expected);
    assert_eq!(statistics.lost(&w, &w).unwrap(), 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Over shapes with ragged blocks, groups and panels: legal, and never worse than the diagonal criterion's mask
    /// with the weights that it leaves.
    #[test]
    fn compensation_beats_none(m in 1usize..40, k in 4usize..150, vector in 0usize..6, seed in 0u64..1000) {
        let vector = VectorLen::ALL[vector];
        let statistics = correlated(2 * k + 10, k, seed);
        let w = Matrix::uniform(m, k, DType::F32, seed + 7).unwrap();
        let (pruned, mask) = SparseGpt::new(vector).prune(&w, &statistics, None).unwrap();
        prop_assert_eq!(mask.vector(), vector);
        for group in 0..k / 4 {
            prop_assert_eq!(mask.mask().group(0, group).count_ones(), 2);
        }
        let diagonal = Criterion::second_order(&statistics).mask(&w, vector, None).unwrap().mask().apply(&w).unwrap();
        let (ours, theirs) = (statistics.lost(&w, &pruned).unwrap(), statistics.lost(&w, &diagonal).unwrap());
        prop_assert!(ours <= theirs * 1.02 + 1e-9, "{} against {}", ours, theirs);
    }
}

#[test]
fn sizes_beyond_one_block_and_f16_storage() {
    let (m, k) = (70, 300);
    let statistics = correlated(900, k, 11);
    let w = Matrix::uniform(m, k, DType::F32, 12).unwrap();
    let (full, mask) = SparseGpt::new(v(32)).prune(&w, &statistics, None).unwrap();
    let (half, _) = SparseGpt::new(v(32)).prune(&w.cast(DType::F16), &statistics, None).unwrap();
    assert_eq!((full.dtype(), half.dtype()), (DType::F32, DType::F16));
    assert!(statistics.lost(&w, &half).unwrap() < statistics.lost(&w, &full).unwrap() * 1.1 + 1e-4);
    // Compensation crosses the block of 128 columns: later columns are not what they were.
    let untouched = mask.mask().apply(&w).unwrap().to_array();
    let moved = &full.to_array() - &untouched;
    assert!(moved.slice(s![.., 200..]).iter().any(|x| x.abs() > 1e-3));
}

#[test]
fn what_goes_is_made_up_for_by_all_columns_on_its_right() {
    // More columns than a block, between which the update is a matrix product.
    let (m, k) = (5, 150);
    let statistics = correlated(400, k, 21);
    let w = Matrix::uniform(m, k, DType::F32, 22).unwrap();
    let (pruned, mask) =
        SparseGpt { refit_steps: 0, ..SparseGpt::new(VectorLen::ONE) }.prune(&w, &statistics, None).unwrap();

    // U from the inverse, column by column, and its Cholesky factor.
    let h = damped(&statistics, SparseGpt::new(VectorLen::ONE).damping);
    let mut inverse = Array2::zeros((k, k));
    for c in 0..k {
        let unit = Array1::from_shape_fn(k, |i| f64::from(u8::from(i == c)));
        inverse.column_mut(c).assign(&solve(h.clone(), unit));
    }
    let mut lower = Array2::<f64>::zeros((k, k));
    for i in 0..k {
        for j in 0..=i {
            let known: f64 = (0..j).map(|c| lower[[i, c]] * lower[[j, c]]).sum();
            let left = inverse[[i, j]] - known;
            lower[[i, j]] = if i == j { left.sqrt() } else { left / lower[[j, j]] };
        }
    }
    for row in 0..m {
        let mut expected: Array1<f64> = (0..k).map(|col| f64::from(w.get(row, col))).collect();
        for c in (0..k).filter(|&c| !mask.mask().get(row, c)) {
            let error = expected[c] / lower[[c, c]];
            expected[c] = 0.0;
            for right in c + 1..k {
                expected[right] -= error * lower[[right, c]];
            }
        }
        let off = (0..k).map(|c| (f64::from(pruned.get(row, c)) - expected[c]).abs()).fold(0.0, f64::max);
        assert!(off < 1e-4, "row {row}: off by {off:e}");
    }
}
