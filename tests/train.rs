//! Retraining as a whole, on models of a few thousand weights: what a step, a resumed run and a bad input do.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/tiny_llama.rs"]
mod tiny_llama;

use sparse24::graph::{Checkpoint, Model, Sparsity};
use sparse24::models::bert::{BertConfig, Sizes};
use sparse24::reference::kl_divergence;
use sparse24::train::{LogitsWeights, Objective, SimilarityWeights, Step, TrainOptions, Trainer};
use sparse24::{Activation, DType, Device, HostWeights, Matrix, Options, VectorLen};

const SIZES: Sizes =
    Sizes { vocabulary: 50, hidden: 32, layers: 2, heads: 4, intermediate: 64, positions: 16, types: 1 };

fn dense(sizes: Sizes) -> Checkpoint {
    let mut graph = BertConfig::new(sizes, 1e-6, Activation::Gelu).unwrap().graph().unwrap();
    let last = *graph.outputs().last().unwrap();
    let pooled = graph.mean_pooling("pooled", last, true).unwrap();
    graph.add_output(pooled);
    let mut checkpoint = Checkpoint::random(graph, DType::F32, 24).unwrap();
    let names: Vec<String> = checkpoint.linears().map(|(name, _)| name).collect();
    for (i, name) in names.iter().enumerate() {
        let (m, k) = (checkpoint.linear(name).unwrap().m(), checkpoint.linear(name).unwrap().k());
        let w: Vec<f32> =
            Matrix::uniform(m, k, DType::F32, i as u64).unwrap().elements().to_f32().iter().map(|x| x * 0.3).collect();
        checkpoint.set_linear(name, Matrix::from_f32(m, k, &w).unwrap().into()).unwrap();
    }
    checkpoint
}

fn pruned(dense: &Checkpoint) -> Checkpoint {
    let mut pruned = dense.clone();
    pruned.prune(Sparsity::TwoFour(VectorLen::new(16).unwrap())).unwrap();
    pruned
}

fn texts() -> Vec<Vec<u32>> {
    (0..200u32).map(|i| (0..2 + i % 9).map(|t| (i * 7 + t * 13) % 50).collect()).collect()
}

fn options() -> TrainOptions {
    TrainOptions { batch: 16, learning_rate: 3e-3, ..TrainOptions::default() }
}

fn cpu(threads: usize) -> Device {
    Device::open("cpu", Options { threads: Some(threads), ..Default::default() }).unwrap()
}

fn trainer(device: &Device, steps: u64) -> Trainer {
    trainer_with(device, steps, options())
}

fn trainer_with(device: &Device, steps: u64, options: TrainOptions) -> Trainer {
    let teacher = dense(SIZES);
    Trainer::new(device, &pruned(&teacher), &teacher, texts(), steps, options).unwrap()
}

/// One after the other: two blocks of attention and feed-forward each.
fn blocks() -> TrainOptions {
    TrainOptions { objective: Objective::Blocks, learning_rate: 1e-2, ..options() }
}

/// Values of all linear layers.
fn weights(checkpoint: &Checkpoint) -> Vec<Matrix> {
    checkpoint.linears().map(|(_, w)| w.to_dense().unwrap()).collect()
}

#[test]
fn a_pruned_model_comes_nearer_to_the_dense_one_and_stays_pruned() {
    let mut trainer = trainer(&cpu(2), 60);
    let before = trainer.evaluate().unwrap();
    let mut steps: Vec<Step> = Vec::new();
    while let Some(step) = trainer.step().unwrap() {
        steps.push(step);
    }
    let after = trainer.evaluate().unwrap();
    assert!(after < 0.5 * before, "{after} of {before}");
    assert_eq!((steps.len(), trainer.best().unwrap()), (60, (after, 60)));
    // Up in the first tenth, then down to all but nothing.
    assert!(steps[0].rate < steps[5].rate && steps[59].rate < 0.01 * steps[6].rate);
    let result = trainer.result().unwrap();
    let (start, teacher) = (pruned(&dense(SIZES)), dense(SIZES));
    for ((name, before), (_, after)) in start.linears().zip(result.linears()) {
        let HostWeights::Sparse24(before) = before else { unreachable!() };
        let HostWeights::Sparse24(after) = after else { unreachable!("{name}") };
        assert_eq!((before.vector(), before.meta()), (after.vector(), after.meta()), "{name}");
        assert_ne!(before.values(), after.values(), "{name}");
    }
    assert_ne!(weights(&result), weights(&teacher));
}

/// The least loss on held-out texts decides, not the last step.
#[test]
fn the_best_parameters_are_the_result() {
    let teacher = dense(SIZES);
    let wild = TrainOptions { learning_rate: 10.0, max_grad_norm: 1e9, ..options() };
    let mut trainer = Trainer::new(&cpu(2), &pruned(&teacher), &teacher, texts(), 3, wild).unwrap();
    let before = trainer.evaluate().unwrap();
    while trainer.step().unwrap().is_some() {}
    assert!(trainer.evaluate().unwrap() > before);
    assert_eq!(trainer.best(), Some((before, 0)));
    assert_eq!(weights(&trainer.result().unwrap()), weights(&pruned(&teacher)));
}

/// Each part has its quarter of the steps, in which nothing else moves, and brings the whole nearer to the teacher.
#[test]
fn blocks_are_trained_one_after_the_other() {
    let mut trainer = trainer_with(&cpu(2), 102, blocks());
    let mut losses = vec![trainer.evaluate().unwrap()];
    let mut before = weights(&trainer.result().unwrap());
    let mut now = |trainer: &mut Trainer, steps: usize| {
        for _ in 0..steps {
            trainer.step().unwrap().unwrap();
        }
        losses.push(trainer.evaluate().unwrap());
        let after = weights(&trainer.result().unwrap());
        let moved: Vec<usize> = (0..after.len()).filter(|&i| after[i] != before[i]).collect();
        before = after;
        moved
    };
    // Q, K and V are one layer; 102 steps are 26, 26, 25 and 25.
    let moved = [26, 26, 25, 25].map(|steps| now(&mut trainer, steps));
    assert_eq!(moved, [vec![0, 1], vec![2, 3], vec![4, 5], vec![6, 7]]);
    assert_eq!(trainer.step().unwrap(), None);
    assert!(losses.is_sorted_by(|a, b| a > b) && losses[4] < 0.6 * losses[0], "{losses:?}");
}

/// So little that what the teacher makes of the longer texts is computed again in every epoch.
const FOR_SHORT_TEXTS: u64 = 200 << 10;

/// What the teacher makes of the texts is the same whether it is kept, but for its rounding to bf16.
#[test]
fn what_the_teacher_says_is_kept_or_computed_again() {
    // Two epochs of 12 batches.
    let run = |memory| {
        let mut trainer = trainer_with(&cpu(2), 24, TrainOptions { memory, ..options() });
        std::iter::from_fn(|| trainer.step().unwrap()).map(|step| step.loss).collect::<Vec<_>>()
    };
    let (kept, some, again) = (run(1 << 30), run(FOR_SHORT_TEXTS), run(1 << 10));
    assert!(kept != again && some != kept && some != again);
    for ((kept, some), again) in kept.iter().zip(&some).zip(&again) {
        for loss in [kept, some] {
            assert!((loss - again).abs() < 2e-3 * again, "{loss}, not {again}");
        }
    }
}

#[test]
fn a_run_is_the_same_to_the_bit_whatever_the_threads() {
    for options in [options(), blocks()] {
        let run = |threads| {
            let mut trainer = trainer_with(&cpu(threads), 4, options.clone());
            let steps: Vec<Step> = std::iter::from_fn(|| trainer.step().unwrap()).collect();
            (steps, weights(&trainer.result().unwrap()))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }
}

#[test]
fn a_resumed_run_is_the_same_to_the_bit() {
    // Into the second epoch of 12 batches; into the third of four parts, and between two.
    let some_kept = TrainOptions { memory: FOR_SHORT_TEXTS, ..options() };
    for (options, at) in [(options(), 13), (some_kept, 15), (blocks(), 12), (blocks(), 10)] {
        let (dir, device) = (tempfile::tempdir().unwrap(), cpu(2));
        let path = dir.path().join("state.safetensors");
        let mut whole = trainer_with(&device, 20, options.clone());
        whole.evaluate().unwrap();
        let all: Vec<Step> = std::iter::from_fn(|| whole.step().unwrap()).collect();
        whole.evaluate().unwrap();

        let mut first = trainer_with(&device, 20, options.clone());
        first.evaluate().unwrap();
        let mut steps: Vec<Step> = (0..at).map(|_| first.step().unwrap().unwrap()).collect();
        first.save(&path, "so far").unwrap();
        drop(first);
        let mut rest = trainer_with(&device, 20, options);
        assert_eq!(rest.resume(&path).unwrap(), "so far");
        assert_eq!(rest.done(), at);
        steps.extend(std::iter::from_fn(|| rest.step().unwrap()));
        rest.evaluate().unwrap();
        assert_eq!((steps, rest.best()), (all, whole.best()));
        assert_eq!(weights(&rest.result().unwrap()), weights(&whole.result().unwrap()));
    }
}

#[test]
fn the_state_of_another_run_is_refused() {
    let (dir, device) = (tempfile::tempdir().unwrap(), cpu(2));
    let path = dir.path().join("state.safetensors");
    trainer(&device, 20).save(&path, "").unwrap();
    assert_eq!(Trainer::steps_of(&path).unwrap(), 20);
    let other = |mut trainer: Trainer| {
        let other = trainer.resume(&path).unwrap_err().to_string();
        assert!(other.contains("state.safetensors") && other.contains("another run"), "{other}");
    };
    other(trainer(&device, 21));
    // Another teacher, and another text among those that are held out.
    let mut teacher = dense(SIZES);
    let start = pruned(&teacher);
    let made = |teacher: &Checkpoint, texts| Trainer::new(&device, &start, teacher, texts, 20, options()).unwrap();
    let mut texts_now = texts();
    texts_now[0] = vec![3, 4];
    other(made(&teacher, texts_now));
    let (name, w) = teacher.linears().map(|(name, w)| (name, w.to_dense().unwrap())).next().unwrap();
    let halves: Vec<f32> = w.elements().to_f32().iter().map(|x| x * 0.5).collect();
    teacher.set_linear(&name, Matrix::from_f32(w.rows(), w.cols(), &halves).unwrap().into()).unwrap();
    other(made(&teacher, texts()));
    let not = dir.path().join("weights.safetensors");
    sparse24::io::save_matrices(&not, &[("w", &Matrix::zeros(2, 2, DType::F32).unwrap())]).unwrap();
    let not = trainer(&device, 20).resume(&not).unwrap_err().to_string();
    assert!(not.contains("no state of a retraining"), "{not}");
    std::fs::write(&path, b"nothing").unwrap();
    assert!(trainer(&device, 20).resume(&path).is_err());
}

/// A loss that is no number names the step and the state, and no weight has changed.
#[test]
fn a_loss_that_is_no_number_is_named() {
    let mut teacher = dense(SIZES);
    let start = pruned(&teacher);
    let name = "encoder.layer.1.intermediate.dense";
    let (m, k) = (teacher.linear(name).unwrap().m(), teacher.linear(name).unwrap().k());
    teacher.set_linear(name, Matrix::from_f32(m, k, &vec![3e38; m * k]).unwrap().into()).unwrap();
    let mut trainer = Trainer::new(&cpu(2), &start, &teacher, texts(), 5, options()).unwrap();
    let error = trainer.step().unwrap_err().to_string();
    assert!(error.starts_with("step 1: the loss of encoder.layer.1.output") && trainer.done() == 0, "{error}");
    assert_eq!(weights(&trainer.result().unwrap()), weights(&start));
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (device, teacher) = (cpu(2), dense(SIZES));
    let start = pruned(&teacher);
    let error = |teacher: &Checkpoint, texts: Vec<Vec<u32>>| {
        Trainer::new(&device, &start, teacher, texts, 5, options()).unwrap_err().to_string()
    };
    assert!(error(&dense(Sizes { layers: 3, ..SIZES }), texts()).contains("another model"));
    let wide = error(&dense(Sizes { intermediate: 128, ..SIZES }), texts());
    assert!(wide.contains("128 x 32, not 64 x 32") || wide.contains("1 x 128, not 1 x 64"), "{wide}");
    assert!(error(&teacher, texts()[..20].to_vec()).contains("20 texts are too few"));
    assert!(error(&teacher, Vec::new()).contains("0 texts are too few"));
    let none = Trainer::check(&texts(), &TrainOptions { batch: 0, ..options() }).unwrap_err().to_string();
    assert!(none.contains("batches of 0 texts"), "{none}");
    let blocks = TrainOptions { memory: 1 << 10, ..blocks() };
    let large = Trainer::new(&device, &start, &teacher, texts(), 5, blocks).unwrap_err().to_string();
    assert!(large.contains("MiB: more than two thirds"), "{large}");
    let mut strange = texts();
    strange[3] = vec![50];
    assert!(error(&teacher, strange).contains("50"));
}

/// What a step adds up from two batches has the loss and the gradient of both together.
#[test]
fn gradients_of_several_batches_are_added_up() {
    let step = |batch, accumulate| {
        let options = TrainOptions { batch, accumulate, held_out: 0.5, ..options() };
        // Texts of one length, so that two batches of 16 have the tokens of one of 32; pairs are of one batch, and left
        // out.
        let options = TrainOptions { similarity: SimilarityWeights { cosine: 4.0, pairs: 0.0 }, ..options };
        let texts: Vec<Vec<u32>> = (0..64u32).map(|i| (0..5).map(|t| (i * 7 + t * 13) % 50).collect()).collect();
        let teacher = dense(SIZES);
        let mut trainer = Trainer::new(&cpu(2), &pruned(&teacher), &teacher, texts, 9, options).unwrap();
        trainer.step().unwrap().unwrap()
    };
    // 32 texts are trained on: all of them in a step.
    let (once, twice) = (step(32, 1), step(16, 2));
    assert!((once.loss - twice.loss).abs() < 1e-5 * once.loss, "{once:?}, {twice:?}");
    assert!((once.grad_norm - twice.grad_norm).abs() < 1e-4 * once.grad_norm, "{once:?}, {twice:?}");
}

#[test]
fn embeddings_alone_are_learned() {
    let options = TrainOptions { objective: Objective::Embeddings, ..options() };
    let mut trainer = trainer_with(&cpu(2), 40, options);
    let before = trainer.evaluate().unwrap();
    while let Some(step) = trainer.step().unwrap() {
        assert_eq!(step.loss, step.embedding_loss);
    }
    assert!(trainer.evaluate().unwrap() < 0.6 * before);
}

/// A small language model, of 26 tokens, and the same pruned.
fn language_models() -> [Checkpoint; 2] {
    let dense = tiny_llama::tiny(DType::F32).into_iter().find(|model| model.name == "llama").unwrap().checkpoint;
    let mut pruned = dense.clone();
    pruned.prune(Sparsity::TwoFour(VectorLen::new(8).unwrap())).unwrap();
    [dense, pruned]
}

/// Texts of 2 to 13 tokens; of another `seed` there are other ones.
fn letters(seed: u32) -> Vec<Vec<u32>> {
    (0..200u32).map(|i| (0..2 + i % 12).map(|t| (i * 7 + t * (13 + i % 5) + seed * (t + 3)) % 26).collect()).collect()
}

fn logits() -> TrainOptions {
    TrainOptions { objective: Objective::Logits, learning_rate: 1e-2, ..options() }
}

fn language_trainer(device: &Device, steps: u64, options: TrainOptions) -> Trainer {
    let [dense, pruned] = language_models();
    Trainer::new(device, &pruned, &dense, letters(0), steps, options).unwrap()
}

/// The mean divergence of a model's next tokens from the dense one's, on texts that no run has.
fn divergence(of: &Checkpoint) -> f64 {
    let (device, texts) = (cpu(2), letters(5));
    let logits = |model: &Checkpoint, text: &[u32]| {
        let model = Model::new(&device, model).unwrap();
        model.forward(1, text.len()).unwrap().run_on(&[text]).unwrap().to_array().mapv(f64::from)
    };
    let [dense, _] = language_models();
    let (mut sum, mut tokens) = (0.0, 0);
    for text in texts.iter().step_by(9) {
        let (x, wanted) = (logits(of, text), logits(&dense, text));
        let lengths = vec![1; text.len()];
        sum += kl_divergence::exact(x.view(), wanted.view(), &lengths, 1, 1.0).0.iter().sum::<f64>();
        tokens += text.len();
    }
    sum / f64::from(tokens as u32)
}

/// A language model that is compared by its logits, too, gives other texts' tokens more of the dense one's
/// probabilities than one that is compared by its states alone.
#[test]
fn logits_are_learned() {
    let [_, start] = language_models();
    let run = |options: TrainOptions| {
        let mut trainer = language_trainer(&cpu(2), 60, options);
        let before = trainer.evaluate().unwrap();
        let steps: Vec<Step> = std::iter::from_fn(|| trainer.step().unwrap()).collect();
        let after = trainer.evaluate().unwrap();
        (before, after, steps, trainer.result().unwrap())
    };
    let slow = TrainOptions { learning_rate: 3e-3, ..logits() };
    let (before, after, steps, result) = run(slow.clone());
    assert!(after < 0.8 * before, "{after} of {before}");
    assert!(steps.iter().all(|step| step.logits_loss > 0.0 && step.logits_loss < step.loss));
    assert!(steps[59].logits_loss < 0.8 * steps[0].logits_loss, "{steps:?}");
    let (.., steps, by_states) = run(TrainOptions { objective: Objective::States, ..slow });
    assert!(steps.iter().all(|step| step.logits_loss == 0.0));
    let [start_at, by_logits, by_states] = [&start, &result, &by_states].map(divergence);
    assert!(by_logits < 0.97 * by_states && by_states < 0.9 * start_at, "{start_at}, {by_states}, {by_logits}");
    for ((name, before), (_, after)) in start.linears().zip(result.linears()) {
        let HostWeights::Sparse24(before) = before else { unreachable!("{name}") };
        let HostWeights::Sparse24(after) = after else { unreachable!("{name}") };
        assert_eq!((before.vector(), before.meta()), (after.vector(), after.meta()), "{name}");
        assert_ne!(before.values(), after.values(), "{name}");
    }
}

/// What a step says of the logits is `divergence` times their mean divergence; the states count for what they are
/// given.
#[test]
fn weights_of_logits_and_states_are_those_of_the_options() {
    let step = |states, divergence| {
        let options = TrainOptions { logits: LogitsWeights { states, divergence }, ..logits() };
        language_trainer(&cpu(2), 9, options).step().unwrap().unwrap()
    };
    let (both, divergence, states) = (step(0.5, 2.0), step(0.0, 1.0), step(1.0, 0.0));
    let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * b;
    assert!(divergence.loss == divergence.logits_loss && states.logits_loss == 0.0);
    assert!(near(both.logits_loss, 2.0 * divergence.loss), "{both:?}, {divergence:?}");
    assert!(near(both.loss - both.logits_loss, 0.5 * states.loss), "{both:?}, {states:?}");
    assert!(divergence.grad_norm > 0.0 && states.grad_norm > 0.0);
}

/// Eight rows of logits at a time and what is computed twice, or all of a batch: the same but for the order of sums and
/// the rounding of what is cached.
#[test]
fn logits_are_compared_in_little_memory() {
    let run = |memory| {
        let mut trainer = language_trainer(&cpu(2), 12, TrainOptions { memory, ..logits() });
        std::iter::from_fn(|| trainer.step().unwrap()).map(|step| step.loss).collect::<Vec<_>>()
    };
    let (all, eight) = (run(1 << 30), run(1 << 10));
    assert!(all != eight);
    for (all, eight) in all.iter().zip(&eight) {
        assert!((all - eight).abs() < 3e-3 * eight, "{all}, not {eight}");
    }
}

#[test]
fn a_run_by_logits_is_the_same_to_the_bit() {
    // Whatever the threads, and in two sittings; runs of 256 rows and of eight.
    for options in [logits(), TrainOptions { memory: FOR_SHORT_TEXTS, ..logits() }] {
        let run = |threads| {
            let mut trainer = language_trainer(&cpu(threads), 15, options.clone());
            let steps: Vec<Step> = std::iter::from_fn(|| trainer.step().unwrap()).collect();
            (steps, trainer.evaluate().unwrap(), weights(&trainer.result().unwrap()))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.safetensors");
        let mut first = language_trainer(&cpu(2), 15, options.clone());
        let mut steps: Vec<Step> = (0..13).map(|_| first.step().unwrap().unwrap()).collect();
        first.save(&path, "").unwrap();
        let mut rest = language_trainer(&cpu(2), 15, options.clone());
        rest.resume(&path).unwrap();
        steps.extend(std::iter::from_fn(|| rest.step().unwrap()));
        assert!(one == (steps, rest.evaluate().unwrap(), weights(&rest.result().unwrap())));
    }
}

/// Two batches to a step weigh as one of both.
#[test]
fn logits_of_several_batches_are_added_up() {
    let step = |batch, accumulate| {
        let options = TrainOptions { batch, accumulate, held_out: 0.5, ..logits() };
        let texts: Vec<Vec<u32>> = (0..64u32).map(|i| (0..5).map(|t| (i * 7 + t * 13) % 26).collect()).collect();
        let [dense, pruned] = language_models();
        let mut trainer = Trainer::new(&cpu(2), &pruned, &dense, texts, 9, options).unwrap();
        trainer.step().unwrap().unwrap()
    };
    let (once, twice) = (step(32, 1), step(16, 2));
    assert!((once.loss - twice.loss).abs() < 1e-5 * once.loss, "{once:?}, {twice:?}");
    assert!((once.logits_loss - twice.logits_loss).abs() < 1e-5 * once.logits_loss, "{once:?}, {twice:?}");
    assert!((once.grad_norm - twice.grad_norm).abs() < 1e-4 * once.grad_norm, "{once:?}, {twice:?}");
}

/// A model without a head is refused.
#[test]
fn logits_need_a_head() {
    let (device, teacher) = (cpu(2), dense(SIZES));
    let options = TrainOptions { objective: Objective::Logits, ..options() };
    let error = Trainer::new(&device, &pruned(&teacher), &teacher, texts(), 5, options).unwrap_err().to_string();
    assert!(error.contains("no head") && error.contains("logits"), "{error}");
}
