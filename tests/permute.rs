//! Orders of channels: what the search finds against all orders of small problems and against what pruning keeps, what
//! it must not do, and that a BERT whose channels are permuted is the same function.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::slice;
use std::time::{Duration, Instant};

use ndarray::{Array2, Axis};
use proptest::prelude::*;
use sparse24::prune::permute::{self, Bound, Budget, Found, Moves, Use, kept, search};
use sparse24::{DType, Matrix, VectorLen, prune};

fn v(v: usize) -> VectorLen {
    VectorLen::new(v).unwrap()
}

/// Scores in [0, 1).
fn scores(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    Matrix::uniform(rows, cols, DType::F32, seed).unwrap().to_array().mapv(f32::abs)
}

/// The largest value of `f` over all orders of `n` channels.
fn best_of_all(n: usize, f: &mut impl FnMut(&[usize]) -> f64) -> f64 {
    fn place(order: &mut Vec<usize>, at: usize, f: &mut impl FnMut(&[usize]) -> f64) -> f64 {
        if at == order.len() {
            return f(order);
        }
        let mut best = f64::NEG_INFINITY;
        for other in at..order.len() {
            order.swap(at, other);
            best = best.max(place(order, at + 1, f));
            order.swap(at, other);
        }
        best
    }
    place(&mut (0..n).collect(), 0, f)
}

fn is_order(order: &[usize]) -> bool {
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    sorted.into_iter().eq(0..order.len())
}

/// The share that magnitude pruning keeps of a matrix.
fn pruned_share(scores: &Array2<f32>, vector: VectorLen) -> f64 {
    let w = Matrix::from_array(scores.view());
    prune::kept_magnitude(&w, prune::magnitude(&w, vector).unwrap().mask()).unwrap()
}

#[test]
fn the_best_order_of_few_channels_is_found() {
    // 7 columns: a ragged group of three. 8 rows for V = 2 and 4: pairs and halves. Both at once: groups of four inside
    // of blocks of rows, around them, and the same.
    for (name, n, uses) in [
        ("columns", 8, vec![Use::columns(scores(5, 8, 1).view(), v(1))]),
        ("ragged columns", 7, vec![Use::columns(scores(5, 7, 2).view(), v(2))]),
        ("rows in pairs", 8, vec![Use::rows(scores(8, 12, 33).view(), v(2))]),
        ("rows in halves", 8, vec![Use::rows(scores(8, 9, 4).view(), v(4))]),
        ("ragged rows", 7, vec![Use::rows(scores(7, 12, 5).view(), v(4))]),
        (
            "rows in a group",
            8,
            vec![Use::rows(scores(8, 12, 6).view(), v(2)), Use::columns(scores(3, 8, 7).view(), v(2))],
        ),
        ("both alike", 8, vec![Use::rows(scores(8, 12, 18).view(), v(4)), Use::columns(scores(3, 8, 19).view(), v(4))]),
        (
            "groups in blocks",
            8,
            vec![Use::rows(scores(8, 12, 10).view(), v(8)), Use::columns(scores(9, 8, 11).view(), v(8))],
        ),
    ] {
        let uses = uses.into_iter().collect::<sparse24::Result<Vec<_>>>().unwrap();
        let best = best_of_all(n, &mut |order| kept(&uses, order).unwrap());
        let found = search(&uses, Moves::All, &Budget::sweeps(2000)).unwrap();
        assert!((found.after - best).abs() < 1e-12, "{name}: {found:?}, best {best}");
        assert!(best > found.before, "{name}: nothing to find");
        assert_eq!(kept(&uses, &found.order).unwrap(), found.after);
    }
}

#[test]
fn weights_decide_between_uses() {
    let uses = |rows: f32, columns: f32| {
        [
            Use::rows(scores(8, 12, 12).view(), v(2)).unwrap().weighted(rows).unwrap(),
            Use::columns(scores(6, 8, 13).view(), v(1)).unwrap().weighted(columns).unwrap(),
        ]
    };
    let found = |rows, columns| search(&uses(rows, columns), Moves::All, &Budget::sweeps(2000)).unwrap();
    let [alone, both] = [found(1.0, 0.0), found(1.0, 3.0)];
    let [rows, columns] = uses(1.0, 1.0).map(|u| {
        let one = [u];
        move |found: &Found| kept(&one, &found.order).unwrap()
    });
    assert_eq!(alone.after, rows(&alone));
    assert!(rows(&alone) > rows(&both) && columns(&alone) < columns(&both));
    assert!((both.after - (rows(&both) + 3.0 * columns(&both)) / 4.0).abs() < 1e-15);
}

/// Rows of four kinds, each with a pattern of its own, and columns likewise, shuffled: an order that loses nothing is
/// there and is found.
#[test]
fn what_was_shuffled_is_put_in_order() {
    let shuffled = |i: usize| i * 37 % 64; // 37 has no factor of 64
    let kind = |channel: usize| shuffled(channel) / 16;
    let patterns: [[usize; 2]; 4] = [[0, 1], [1, 3], [2, 3], [0, 2]];
    let by_rows = Array2::from_shape_fn((64, 32), |(channel, col)| {
        let here = patterns[(kind(channel) + col / 4) % 4].contains(&(col % 4));
        if here { 1.0 + (channel * 7 + col * 3) as f32 % 5.0 } else { 0.0 }
    });
    let uses = [Use::rows(by_rows.view(), v(16)).unwrap()];
    let found = search(&uses, Moves::All, &Budget::sweeps(60)).unwrap();
    assert!(found.before < 0.9 && found.after > 1.0 - 1e-9, "{found:?}");

    // Half of the columns are zero for each row: of every four that stand together two should be.
    let by_columns =
        Array2::from_shape_fn(
            (24, 64),
            |(row, channel)| {
                if (shuffled(channel) / 32 + row / 8) % 2 == 0 { 1.0 } else { 0.0 }
            },
        );
    // Before, some group is of one kind.
    let sorted: Vec<usize> = (0..64).map(|i| (0..64).position(|c| shuffled(c) == i).unwrap()).collect();
    let by_columns = by_columns.select(Axis(1), &sorted);
    let uses = [Use::columns(by_columns.view(), v(8)).unwrap()];
    let found = search(&uses, Moves::All, &Budget::sweeps(60)).unwrap();
    assert!((found.before - 0.5).abs() < 1e-9 && found.after > 1.0 - 1e-9, "{found:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The share is what pruning the permuted matrix keeps, for every V and ragged sizes; the search improves on it, or
    /// leaves the order alone; and it is the same on any number of threads.
    #[test]
    fn shares_are_those_of_pruning(
        n in 1usize..90, m in 1usize..40, k in 1usize..40, at in 0usize..8, sweeps in 0u64..4, seed: u64,
    ) {
        let vector = VectorLen::ALL[at];
        let (first, second) = (scores(n, k, seed), scores(m, n, seed ^ 1));
        let uses = [Use::rows(first.view(), vector).unwrap(), Use::columns(second.view(), vector).unwrap()];
        let budget = Budget { bound: Bound::Sweeps(sweeps), threads: 1, seed };
        let found = search(&uses, Moves::All, &budget).unwrap();
        prop_assert!(is_order(&found.order));
        prop_assert!(found.after >= found.before);
        let share = |order: &[usize]| {
            (pruned_share(&first.select(Axis(0), order), vector) + pruned_share(&second.select(Axis(1), order), vector))
                / 2.0
        };
        let identity: Vec<_> = (0..n).collect();
        prop_assert!((found.before - share(&identity)).abs() < 1e-6, "{} {}", found.before, share(&identity));
        prop_assert!((found.after - share(&found.order)).abs() < 1e-6, "{} {}", found.after, share(&found.order));
        let threads = Budget { threads: 3, ..budget };
        prop_assert_eq!(found, search(&uses, Moves::All, &threads).unwrap());
    }

    /// Heads: nothing leaves its block, or blocks move with their inner order, or both; sizes that units do not divide
    /// and are not divided by, too.
    #[test]
    fn blocks_are_respected(blocks in 1usize..9, at in 0usize..6, vector in 0usize..7, seed: u64) {
        let size = [1, 4, 6, 8, 16, 32][at];
        let (n, vector) = (blocks * size, VectorLen::ALL[vector]);
        let (first, second) = (scores(n, 20, seed), scores(9, n, seed ^ 1));
        let uses = [Use::rows(first.view(), vector).unwrap(), Use::columns(second.view(), vector).unwrap()];
        let budget = Budget { seed, ..Budget::sweeps(4) };
        for moves in [Moves::Inside(size), Moves::Wholes(size), Moves::Both(size)] {
            let found = search(&uses, moves, &budget).unwrap();
            prop_assert!(is_order(&found.order) && found.after >= found.before);
            prop_assert_eq!(found.after, kept(&uses, &found.order).unwrap());
            for (place, members) in found.order.chunks(size).enumerate() {
                let block = members[0] / size;
                prop_assert!(members.iter().all(|channel| channel / size == block), "{:?}: {:?}", moves, found);
                prop_assert!(!matches!(moves, Moves::Inside(_)) || block == place);
                let as_they_were = members.iter().enumerate().all(|(i, channel)| channel % size == i);
                prop_assert!(!matches!(moves, Moves::Wholes(_)) || as_they_were);
            }
        }
    }
}

#[test]
fn blocks_find_the_best_place() {
    // Eight heads of 2 to blocks of 8 rows, by all orders.
    let scored = scores(16, 24, 21);
    let uses = [Use::rows(scored.view(), v(8)).unwrap()];
    let expand = |order: &[usize]| order.iter().flat_map(|&head| [2 * head, 2 * head + 1]).collect::<Vec<_>>();
    let best = best_of_all(8, &mut |order| kept(&uses, &expand(order)).unwrap());
    let found = search(&uses, Moves::Wholes(2), &Budget::sweeps(2000)).unwrap();
    assert!((found.after - best).abs() < 1e-12 && best > found.before, "{found:?}, best {best}");
    // Inner orders add to it, where a group of columns sees them.
    let uses = [uses[0].clone(), Use::columns(scores(5, 16, 22).view(), v(1)).unwrap()];
    let [wholes, both] = [Moves::Wholes(8), Moves::Both(8)].map(|m| search(&uses, m, &Budget::sweeps(50)).unwrap());
    assert_eq!(wholes.after, wholes.before);
    assert!(both.after > both.before);
}

#[test]
fn time_ends_a_search() {
    let uses = [Use::columns(scores(32, 256, 31).view(), v(1)).unwrap()];
    let began = Instant::now();
    let found = search(&uses, Moves::All, &Budget { threads: 2, ..Budget::time(Duration::from_millis(300)) }).unwrap();
    let took = began.elapsed();
    assert!(found.rounds > 0 && found.after > found.before, "{found:?}");
    // With room for a machine that does other things.
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(20), "{took:?}");
    let none = search(&uses, Moves::All, &Budget::time(Duration::ZERO)).unwrap();
    assert_eq!((none.rounds, none.after), (0, none.before));
    assert!(none.order.into_iter().eq(0..256));
}

#[test]
fn zeros_and_seeds() {
    let zeros = [Use::rows(Array2::zeros((8, 8)).view(), v(4)).unwrap()];
    let found = search(&zeros, Moves::All, &Budget::sweeps(3)).unwrap();
    assert_eq!((found.before, found.after), (1.0, 1.0));
    // A matrix without rows, one without columns, no channels at all.
    for (rows, cols) in [(0, 8), (8, 0), (0, 0)] {
        for one in [Use::rows(scores(rows, cols, 1).view(), v(2)), Use::columns(scores(rows, cols, 1).view(), v(2))] {
            let found = search(&[one.unwrap()], Moves::All, &Budget::sweeps(3)).unwrap();
            assert_eq!((found.before, found.after), (1.0, 1.0));
        }
    }
    let uses = [Use::columns(scores(16, 96, 41).view(), v(1)).unwrap()];
    let [a, b] = [1, 2].map(|seed| search(&uses, Moves::All, &Budget { seed, ..Budget::sweeps(2) }).unwrap().order);
    assert_ne!(a, b);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut bad = scores(3, 4, 1);
    for (score, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1.0, "-1")] {
        bad[(1, 2)] = score;
        for refused in [Use::columns(bad.view(), v(1)), Use::rows(bad.view(), v(1))] {
            let expected = format!("the score at row 1, column 2 is {shown}, expected a finite number of at least 0");
            assert_eq!(refused.unwrap_err().to_string(), expected);
        }
    }
    let one = Use::columns(scores(3, 8, 1).view(), v(1)).unwrap();
    let other = Use::rows(scores(9, 8, 1).view(), v(1)).unwrap();
    let error = |uses: &[Use], moves| search(uses, moves, &Budget::sweeps(1)).unwrap_err().to_string();
    assert_eq!(error(&[], Moves::All), "no use of the channels");
    assert_eq!(error(&[one.clone(), other], Moves::All), "one use has 8 channels, another has 9");
    assert_eq!(error(slice::from_ref(&one), Moves::Inside(3)), "blocks of 3 channels do not divide 8");
    assert_eq!(error(slice::from_ref(&one), Moves::Both(0)), "blocks of 0 channels do not divide 8");
    let weightless = one.clone().weighted(0.0).unwrap();
    assert_eq!(error(&[weightless], Moves::All), "all uses have weight 0");
    assert!(one.clone().weighted(-1.0).is_err() && one.clone().weighted(f32::NAN).is_err());

    let message = |order: &[usize]| kept(slice::from_ref(&one), order).unwrap_err().to_string();
    assert_eq!(message(&[0, 1, 2, 3, 4, 5, 6, 8]), "order has 8 at place 7, there are 8");
    assert_eq!(message(&[0, 1, 2, 3, 4, 5, 5, 7]), "order has 5 at place 6 for the second time");
    assert_eq!(message(&[0]), "order has shape [1], expected [8]");
}

#[test]
fn matrices_are_permuted_in_every_type() {
    let w = Matrix::uniform(3, 4, DType::F32, 5).unwrap();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let w = w.cast(dtype);
        let (rows, columns) = (permute::rows(&w, &[2, 0, 1]).unwrap(), permute::columns(&w, &[1, 3, 2, 0]).unwrap());
        for (row, col) in (0..3).flat_map(|row| (0..4).map(move |col| (row, col))) {
            assert_eq!(rows.get(row, col), w.get([2, 0, 1][row], col));
            assert_eq!(columns.get(row, col), w.get(row, [1, 3, 2, 0][col]));
        }
    }
    assert_eq!(permute::rows(&w, &[0, 1]).unwrap_err().to_string(), "order of rows has shape [2], expected [3]");
    assert!(permute::columns(&w, &[0, 1, 2, 2]).is_err());
}

#[cfg(feature = "text")]
mod bert {
    use sparse24::graph::{Checkpoint, Kept, Sparsity};
    use sparse24::models::bert::{BertConfig, Sizes};
    use sparse24::text::{Files, Pipeline, twin};
    use sparse24::{Activation, HostWeights, Mask, models};

    use super::*;

    const WIDTH: usize = 8;
    const HIDDEN: usize = 40;
    const INNER: usize = 72;

    /// Two layers, 5 heads of 8, 72 features between the feed-forward layers. Weights are ten times those that a BERT
    /// starts with, so that attention is far from uniform and GELU from linear.
    fn checkpoint(seed: u64) -> Checkpoint {
        let sizes =
            Sizes { vocabulary: 14, hidden: HIDDEN, layers: 2, heads: 5, intermediate: INNER, positions: 24, types: 2 };
        let graph = BertConfig::new(sizes, 1e-12, Activation::Gelu).unwrap().graph().unwrap();
        let mut checkpoint = Checkpoint::random(graph, DType::F32, seed).unwrap();
        let names: Vec<_> = checkpoint.linears().map(|(name, w)| (name, w.m(), w.k())).collect();
        for (i, (name, m, k)) in names.into_iter().enumerate() {
            let w = Matrix::uniform(m, k, DType::F32, seed + 100 + i as u64).unwrap().to_array().mapv(|x| 0.4 * x);
            checkpoint.set_linear(&name, Matrix::from_array(w.view()).into()).unwrap();
        }
        checkpoint
    }

    fn embeddings(checkpoint: &Checkpoint) -> Array2<f64> {
        let texts: Vec<Vec<u32>> = [1, 24, 7, 16].iter().map(|&n| (0..n).map(|i| (i * 5 + n) % 14).collect()).collect();
        twin::embeddings(checkpoint, &Pipeline::default(), &texts).unwrap()
    }

    /// The largest difference. Embeddings have length 1.
    fn distance(a: &Checkpoint, b: &Checkpoint) -> f64 {
        (embeddings(a) - embeddings(b))
            .iter()
            .fold(0.0, |most, x| if x.is_nan() { f64::NAN } else { most.max(x.abs()) })
    }

    fn weights(checkpoint: &Checkpoint, at: usize) -> HostWeights {
        checkpoint.linears().nth(at).unwrap().1.clone()
    }

    /// An order of `n` that leaves nothing where it was, for `n` above 1 that 7 does not divide.
    fn turned(n: usize) -> Vec<usize> {
        (0..n).map(|i| (i * 7 + 3) % n).collect()
    }

    /// Heads in the order of `heads`, each with its features in the order of `inner`.
    fn in_heads(heads: &[usize], inner: &[usize]) -> Vec<usize> {
        heads.iter().flat_map(|head| inner.iter().map(move |i| head * WIDTH + i)).collect()
    }

    fn ffn(c: &mut Checkpoint, layer: usize, order: &[usize]) -> sparse24::Result<()> {
        c.reorder(&format!("encoder.layer.{layer}.intermediate.dense"), &[order.to_vec()])
    }

    fn attention(c: &mut Checkpoint, layer: usize, queries: &[usize], values: &[usize]) -> sparse24::Result<()> {
        c.reorder(&format!("encoder.layer.{layer}.attention.self"), &[queries.to_vec(), values.to_vec()])
    }

    type Change = (&'static str, fn(&mut Checkpoint, usize) -> sparse24::Result<()>);

    const KINDS: [Change; 5] = [
        ("feed-forward", |c, layer| ffn(c, layer, &turned(INNER))),
        ("queries", |c, layer| attention(c, layer, &in_heads(&[0, 1, 2, 3, 4], &turned(8)), &straight())),
        ("values", |c, layer| attention(c, layer, &straight(), &in_heads(&[0, 1, 2, 3, 4], &turned(8)))),
        ("heads", |c, layer| {
            let order = in_heads(&turned(5), &[0, 1, 2, 3, 4, 5, 6, 7]);
            attention(c, layer, &order, &order)
        }),
        ("all of attention", |c, layer| {
            let backwards = [7, 6, 5, 4, 3, 2, 1, 0];
            attention(c, layer, &in_heads(&turned(5), &turned(8)), &in_heads(&turned(5), &backwards))
        }),
    ];

    fn straight() -> Vec<usize> {
        (0..HIDDEN).collect()
    }

    #[test]
    fn every_kind_of_order_leaves_the_function_as_it_was() {
        for masked in [false, true] {
            let mut before = checkpoint(51);
            if masked {
                before.mask(v(1)).unwrap();
            }
            for (kind, change) in KINDS {
                let mut after = before.clone();
                change(&mut after, 0).unwrap();
                change(&mut after, 1).unwrap();
                let off = distance(&before, &after);
                assert!(off <= 1e-12, "{kind}: {off:.2e} off");
                // It did change something, and each side of it alone changes the function: the comparison sees it.
                let moved: Vec<_> = (0..8).filter(|&at| weights(&before, at) != weights(&after, at)).collect();
                assert!(!moved.is_empty(), "{kind}");
                for at in moved {
                    let mut half = before.clone();
                    let (name, w) = after.linears().nth(at).map(|(name, w)| (name, w.clone())).unwrap();
                    half.set_linear(&name, w).unwrap();
                    let off = distance(&before, &half);
                    // Biases apart, Q and K by themselves belong together.
                    assert!(off > 1e-4, "{kind}, {name}: {off:.2e} off");
                }
            }
        }
    }

    #[test]
    fn the_driver_permutes_what_pruning_then_keeps_more_of() {
        for (vector, seed) in [(v(1), 61), (v(2), 62), (v(8), 63), (v(16), 64), (v(128), 65)] {
            let before = checkpoint(seed);
            let mut after = before.clone();
            let mut asked = Vec::new();
            let budget = Budget { seed, ..Budget::sweeps(12) };
            let magnitude = |w: &Matrix| Ok(w.to_array().mapv(f32::abs));
            let found = after
                .permute(vector, &budget, |name, w| {
                    asked.push(name.to_owned());
                    magnitude(w)
                })
                .unwrap();
            asked.sort();
            let mut all: Vec<_> = before.linears().map(|(name, _)| name).collect();
            all.sort();
            assert_eq!(asked, all);
            let off = distance(&before, &after);
            assert!(off <= 1e-12, "V = {vector}: {off:.2e} off");

            let share = |checkpoint: &Checkpoint, at: usize| match weights(checkpoint, at) {
                HostWeights::Dense(w) => pruned_share(&w.to_array(), vector),
                _ => panic!("not dense"),
            };
            // Attention and the feed-forward part of each layer, and each one's linear layers, in the order of the
            // model's.
            let kept: Vec<Kept> = found.iter().flat_map(|of| &of.kept).map(|(_, kept)| *kept).collect();
            assert!(
                found.iter().flat_map(|of| &of.kept).map(|(name, _)| name.clone()).eq(before.linears().map(|l| l.0))
            );
            for (at, kept) in kept.iter().enumerate() {
                assert!((kept.before - share(&before, at)).abs() < 1e-6, "V = {vector}, linear layer {at}");
                assert!((kept.after - share(&after, at)).abs() < 1e-6, "V = {vector}, linear layer {at}");
            }
            for layer in kept.chunks(4) {
                let gained = |i: usize| layer[i].after - layer[i].before;
                assert!(3.0 * gained(0) + gained(1) >= 0.0 && gained(2) + gained(3) > 0.0, "V = {vector}: {layer:?}");
            }
            // From sweeps and a seed comes the same, on any number of threads; orders lead from the old to the new.
            let mut again = before.clone();
            let threads = Budget { threads: 2, ..budget };
            assert_eq!(again.permute(vector, &threads, |_, w| magnitude(w)).unwrap(), found);
            let mut told = before.clone();
            for of in &found {
                told.reorder(&of.channels, &of.orders).unwrap();
            }
            assert!((0..8).all(|at| weights(&told, at) == weights(&after, at)), "V = {vector}");
        }
    }

    /// Real weights: the same function, and something gained in every layer.
    #[test]
    #[ignore = "needs model/minilm"]
    fn minilm_keeps_more_and_stays_the_same() {
        let files = Files::in_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/model/minilm"));
        let graph = models::load(&files.config).unwrap();
        let before = Checkpoint::load(graph, &files.weights, None, DType::F32).unwrap();
        let texts = [[101, 2023, 2003, 1037, 3231, 102], [101, 4937, 2938, 2006, 13523, 102]];
        let dense = twin::embeddings(&before, &Pipeline::default(), &texts).unwrap();
        for (vector, budget) in [(v(1), Budget::sweeps(2)), (v(32), Budget::sweeps(6)), (v(128), Budget::sweeps(6))] {
            let mut after = before.clone();
            let budget = Budget { threads: 2, ..budget };
            let found = after.permute(vector, &budget, |_, w| Ok(w.to_array().mapv(f32::abs))).unwrap();
            let off = &twin::embeddings(&after, &Pipeline::default(), &texts).unwrap() - &dense;
            assert!(off.iter().all(|x| x.abs() <= 1e-12), "V = {vector}");
            for (layer, found) in found.chunks(2).enumerate() {
                let [out, ffn_out] = [0, 1].map(|of: usize| found[of].kept[1].1);
                assert!(
                    out.after > out.before && ffn_out.after > ffn_out.before + 0.005,
                    "V = {vector}, layer {layer}"
                );
            }
        }
    }

    #[test]
    fn compressed_layers_are_left_alone() {
        let mut pruned = checkpoint(71);
        pruned.prune(Sparsity::TwoFour(v(4))).unwrap();
        let dense = checkpoint(71);
        let mut mixed = pruned.clone();
        // The first layer's attention can move, and of its feed-forward part one half.
        for at in [0, 1, 2] {
            let (name, w) = dense.linears().nth(at).map(|(name, w)| (name, w.clone())).unwrap();
            mixed.set_linear(&name, w).unwrap();
        }
        let before = mixed.clone();
        let mut asked = 0;
        let found = mixed
            .permute(v(4), &Budget::sweeps(5), |_, w| {
                asked += 1;
                Ok(w.to_array().mapv(f32::abs))
            })
            .unwrap();
        assert_eq!(asked, 2);
        assert_eq!(found.iter().map(|of| of.kept.len()).collect::<Vec<_>>(), [2, 0, 0, 0]);
        assert!(found[1].orders[0].iter().copied().eq(0..INNER) && found[2].orders[1] == straight());
        assert!((2..8).all(|at| weights(&before, at) == weights(&mixed, at)));
        assert!(weights(&before, 0) != weights(&mixed, 0) && distance(&before, &mixed) <= 1e-12);

        let error = ffn(&mut pruned, 0, &turned(INNER)).unwrap_err().to_string();
        assert_eq!(error, "the rows of compressed weights cannot be permuted, prune afterwards");
        assert!(
            attention(&mut pruned, 0, &in_heads(&turned(5), &turned(8)), &in_heads(&turned(5), &turned(8))).is_err()
        );
        // Nothing is done by halves: the rows could have moved, the columns cannot.
        let before = mixed.clone();
        let error = ffn(&mut mixed, 0, &turned(INNER)).unwrap_err().to_string();
        assert_eq!(error, "the columns of compressed weights cannot be permuted, prune afterwards");
        assert!((0..8).all(|at| weights(&before, at) == weights(&mixed, at)));
        assert_eq!(distance(&before, &mixed), 0.0);
    }

    #[test]
    fn masks_move_with_their_weights() {
        let mut masked = checkpoint(81);
        let HostWeights::Dense(w) = weights(&masked, 2) else { panic!("not dense") };
        let mask = Mask::from_fn(INNER, HIDDEN, |row, col| row % 3 != col % 2).unwrap();
        masked.set_linear("encoder.layer.0.intermediate.dense", HostWeights::Masked(w, mask.clone())).unwrap();
        let before = masked.clone();
        // Scores are of the weights in effect.
        masked
            .permute(v(4), &Budget::sweeps(3), |name, w| {
                if name == "encoder.layer.0.intermediate.dense" {
                    assert!(
                        (0..INNER).all(|row| (0..HIDDEN).all(|col| (w.get(row, col) != 0.0) == mask.get(row, col)))
                    );
                }
                Ok(w.to_array().mapv(f32::abs))
            })
            .unwrap();
        let HostWeights::Masked(_, moved) = weights(&masked, 2) else { panic!("not masked") };
        assert!(moved != mask && moved.count() == mask.count());
        assert!(distance(&before, &masked) <= 1e-12);
    }

    #[test]
    fn orders_that_do_not_fit_are_refused() {
        let mut c = checkpoint(91);
        let message = |e: sparse24::Result<()>| e.unwrap_err().to_string();
        let missing = "there are no channels \"encoder.layer.2.intermediate.dense\"";
        assert_eq!(message(ffn(&mut c, 2, &turned(INNER))), missing);
        let short = message(ffn(&mut c, 0, &[0]));
        assert_eq!(short, "order of encoder.layer.0.intermediate.dense has shape [1], expected [72]");
        let mut twice = turned(INNER);
        twice[5] = twice[4];
        assert!(message(ffn(&mut c, 0, &twice)).ends_with("at place 5 for the second time"));
        // A feature in the wrong head; a head at two places.
        let mut strayed = straight();
        strayed.swap(7, 8);
        let error = message(attention(&mut c, 0, &straight(), &strayed));
        assert_eq!(error, "place 0 of encoder.layer.0.attention.self has channels of blocks 0 and 1");
        let moved = in_heads(&[1, 0, 2, 3, 4], &[0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(message(attention(&mut c, 0, &moved, &straight())).contains("blocks 1 and 0"));
        assert!(attention(&mut c, 2, &straight(), &straight()).is_err());
        let one = message(c.reorder("encoder.layer.0.attention.self", &[straight()]));
        assert_eq!(one, "encoder.layer.0.attention.self has 2 orders, not 1");

        // What a criterion gives is checked as well, and nothing has happened by then.
        let before = c.clone();
        let error = c.permute(v(1), &Budget::sweeps(1), |_, _| Ok(Array2::zeros((3, 3)))).unwrap_err().to_string();
        assert_eq!(error, "scores of encoder.layer.0.intermediate.dense has shape [3, 3], expected [72, 40]");
        let nan = c.permute(v(1), &Budget::sweeps(1), |_, w| Ok(w.to_array().mapv(|_| f32::NAN)));
        assert!(nan.unwrap_err().to_string().starts_with("the score at row 0, column 0 is NaN"));
        assert_eq!(distance(&before, &c), 0.0);
    }
}
