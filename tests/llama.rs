//! Language models of Llama's kind: their graphs against what torch computes, on devices and in f64, token by token
//! with a cache, and the commands that run them.
//!
//! The models are small; they and what torch makes of them are in tests/vectors (see its README). Tests that need a GPU
//! are ignored unless asked for. The real model is in tests/smollm2.rs.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[cfg(feature = "cli")]
#[path = "common/binary.rs"]
mod binary;
mod common;
#[path = "common/tiny_llama.rs"]
mod tiny_llama;

use common::gpu;
use sparse24::graph::{Checkpoint, Model, Sparsity, twin};
use sparse24::{DType, Device, Matrix, VectorLen, models};
use tiny_llama::{TinyLlama, tiny};

/// The largest distance of rows of a matrix to numbers.
fn distance(got: &Matrix, expected: &[f64]) -> f64 {
    let got = got.elements().to_f32();
    assert_eq!(got.len(), expected.len());
    assert!(got.iter().all(|x| x.is_finite()));
    got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}

/// Torch computed in f64, and eight digits were written. Tables of cosines and sines are f32 here.
#[test]
fn the_twin_agrees_with_torch() {
    for TinyLlama { name, checkpoint, texts } in tiny(DType::F32) {
        let logits = checkpoint.graph().outputs()[0];
        for (ids, expected) in texts {
            let got = twin::values(&checkpoint, &[logits], &[&ids]).unwrap();
            let off = got[0].iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(got[0].len() == expected.len() && off < 1e-5, "{name}, {} tokens: {off:.2e}", ids.len());
        }
    }
}

fn agrees_with_torch(device: &Device) {
    let half = device.caps().is_none_or(|caps| caps.f16);
    for (dtype, allowed) in [(DType::F32, 5e-5), (DType::F16, 3e-2)].into_iter().take(1 + usize::from(half)) {
        for TinyLlama { name, checkpoint, texts } in tiny(dtype) {
            let model = Model::new(device, &checkpoint).unwrap();
            for (ids, expected) in &texts {
                // Padded by three tokens, which nobody sees.
                let logits = model.forward(1, ids.len() + 3).unwrap().run_on(&[ids]).unwrap();
                let off = distance(&logits.rows_of(0..ids.len()).unwrap(), expected);
                assert!(off < allowed, "{name}, {dtype}, {} tokens on {}: {off:.2e}", ids.len(), device.info().name());
            }
        }
    }
}

#[test]
fn the_cpu_agrees_with_torch() {
    agrees_with_torch(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_agrees_with_torch() {
    gpu().iter().for_each(agrees_with_torch);
}

/// Three sequences at once, of other lengths, that grow by prompts and by tokens: the last logits of each are torch's
/// of the whole text.
fn a_cache_changes_nothing(device: &Device) {
    for TinyLlama { name, checkpoint, texts } in tiny(DType::F32) {
        let model = Model::new(device, &checkpoint).unwrap();
        let (ids, expected) = &texts[2];
        let vocabulary = checkpoint.graph().limits().vocabulary;
        // What each sequence gets in each pass: some get none, and the last one starts late.
        let steps: [[usize; 3]; 6] = [[5, 12, 0], [1, 1, 0], [1, 0, 9], [1, 1, 1], [7, 1, 16], [1, 1, 1]];
        let mut decoder = model.decoder(3, 40).unwrap();
        for (pass, step) in steps.into_iter().enumerate() {
            let before = decoder.lens().to_vec();
            let new: Vec<&[u32]> = before.iter().zip(step).map(|(&len, new)| &ids[len..len + new]).collect();
            let logits = decoder.forward(&new).unwrap();
            for (row, (before, new)) in before.iter().zip(step).enumerate().filter(|(_, (_, new))| *new > 0) {
                let last = before + new - 1;
                let off =
                    distance(&logits.rows_of(row..row + 1).unwrap(), &expected[last * vocabulary..][..vocabulary]);
                let on = device.info();
                assert!(off < 5e-5, "{name}, pass {pass}, sequence {row} on {}: {off:.2e}", on.name());
            }
        }
        assert_eq!(decoder.lens(), [16, 16, 27]);

        // Back to an earlier length, and from there again.
        decoder.truncate(1, 4);
        let logits = decoder.forward(&[&ids[..0], &ids[4..8], &ids[..0]]).unwrap();
        let off = distance(&logits.rows_of(1..2).unwrap(), &expected[7 * vocabulary..][..vocabulary]);
        assert!(off < 5e-5, "{name}, after a truncation: {off:.2e}");

        // What does not fit changes nothing.
        let error = decoder.forward(&[&ids[..25], &ids[..1], &ids[..1]]).unwrap_err();
        assert_eq!(
            (error.text(), error.into_cause().to_string().as_str()),
            (Some(0), "the text has 41 tokens; there is room for 40")
        );
        assert_eq!(decoder.lens(), [16, 8, 27]);
    }
}

#[test]
fn on_the_cpu_a_cache_changes_nothing() {
    a_cache_changes_nothing(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_a_cache_changes_nothing() {
    gpu().iter().for_each(a_cache_changes_nothing);
}

/// So many sequences that a chunk has two tokens of each: prompts of other lengths go through several passes, and a
/// sequence may have no token in some.
#[test]
fn prompts_in_chunks_are_prompts() {
    let TinyLlama { checkpoint, texts, .. } = tiny(DType::F32).remove(0);
    let (ids, expected) = &texts[2];
    let vocabulary = checkpoint.graph().limits().vocabulary;
    let model = Model::new(&Device::cpu().unwrap(), &checkpoint).unwrap();
    let mut decoder = model.decoder(1024, 40).unwrap();
    for lens in [[9, 2, 0, 5, 1], [10, 7, 8, 5, 6], [40, 8, 9, 6, 40]] {
        let before = decoder.lens().to_vec();
        let new: Vec<&[u32]> = (0..1024).map(|at| &ids[before[at]..*lens.get(at).unwrap_or(&before[at])]).collect();
        let logits = decoder.forward(&new).unwrap();
        for (row, len) in lens.into_iter().enumerate().filter(|(row, len)| *len > before[*row]) {
            let off =
                distance(&logits.rows_of(row..row + 1).unwrap(), &expected[(len - 1) * vocabulary..][..vocabulary]);
            assert!(off < 5e-5, "sequence {row}, {len} tokens: {off:.2e}");
        }
        assert_eq!(decoder.lens()[..5], lens);
    }
}

/// A text of more tokens than a chunk has, scored in rows that are not all of a whole group.
#[test]
fn long_texts_are_scored_across_chunks() {
    let graph = models::parse(
        r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 12, "max_position_embeddings": 2300}"#,
    );
    let checkpoint = Checkpoint::random(graph.unwrap(), DType::F32, 3).unwrap();
    let ids: Vec<u32> = (0..2200u32).map(|at| at * at % 11).collect();
    let logits = twin::values(&checkpoint, &[checkpoint.graph().outputs()[0]], &[&ids]).unwrap().remove(0);
    let model = Model::new(&Device::cpu().unwrap(), &checkpoint).unwrap();
    let losses = model.decoder(1, 2300).unwrap().score(&ids).unwrap();
    assert_eq!(losses.len(), 2199);
    for (at, loss) in losses.into_iter().enumerate() {
        let row = logits.row(at);
        let expected = row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[ids[at + 1] as usize];
        assert!((loss - expected).abs() < 1e-5, "token {at}: {loss} of {expected}");
    }
}

/// Published configs have `rope_scaling` beside `rope_theta`, or both in `rope_parameters`: the same model.
#[test]
fn both_layouts_of_rotary_positions_are_one() {
    use sparse24::models::llama::LlamaConfig;
    for name in ["llama3", "linear", "qwen2"] {
        let newer = tiny_llama::config(name);
        let mut older = newer.clone();
        let mut scaling = older["rope_parameters"].take();
        older["rope_theta"] = scaling["rope_theta"].take();
        older["rope_scaling"] = scaling;
        let parse = |config: &serde_json::Value| LlamaConfig::parse(&config.to_string()).unwrap();
        assert_eq!(parse(&older), parse(&newer), "{name}");
        older["rope_scaling"]["type"] = older["rope_scaling"]["rope_type"].take();
        assert_eq!(parse(&older), parse(&newer), "{name}, by the field's older name");
        let mut plain = newer;
        plain["rope_parameters"] = serde_json::json!({"rope_type": "default", "rope_theta": older["rope_theta"]});
        assert_ne!(parse(&older), parse(&plain), "{name}");
    }
}

/// The losses of a text's tokens are those of torch's logits.
#[test]
fn scores_are_the_logarithms_of_probabilities() {
    let TinyLlama { checkpoint, texts, .. } = tiny(DType::F32).remove(0);
    let (ids, logits) = &texts[2];
    let model = Model::new(&Device::cpu().unwrap(), &checkpoint).unwrap();
    let mut decoder = model.decoder(1, 48).unwrap();
    let mut losses = decoder.score(&ids[..30]).unwrap();
    losses.extend(decoder.score(&ids[30..]).unwrap());
    let vocabulary = checkpoint.graph().limits().vocabulary;
    let expected = |at: usize| {
        let row = &logits[at * vocabulary..][..vocabulary];
        row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[ids[at + 1] as usize]
    };
    // The first of the second call has nobody who predicts it there.
    let expected: Vec<f64> = (0..39).filter(|at| *at != 29).map(expected).collect();
    assert_eq!(losses.len(), expected.len());
    for (loss, expected) in losses.iter().zip(&expected) {
        assert!((loss - expected).abs() < 1e-5, "{loss} of {expected}");
    }
    assert!(model.decoder(2, 48).unwrap().score(ids).is_err());
}

/// The head stays dense, whatever prunes; all other linear layers do not.
#[test]
fn pruning_leaves_the_head_dense() {
    for TinyLlama { name, mut checkpoint, texts } in tiny(DType::F32) {
        let graph = checkpoint.graph();
        assert_eq!(graph.head().map(|head| head.name), Some("lm_head"));
        assert_eq!(checkpoint.linears().count(), 8, "{name}");
        checkpoint.prune(Sparsity::TwoFour(VectorLen::ONE)).unwrap();
        let (ids, _) = &texts[1];
        let logits = checkpoint.graph().outputs()[0];
        let expected = twin::values(&checkpoint, &[logits], &[ids]).unwrap().remove(0);
        let model = Model::new(&Device::cpu().unwrap(), &checkpoint).unwrap().no_dense_fallback();
        let mut decoder = model.decoder(1, 10).unwrap();
        decoder.forward(&[&ids[..6]]).unwrap();
        let last = decoder.forward(&[&ids[6..]]).unwrap();
        let off = distance(&last, expected.row(6).to_slice().unwrap());
        assert!(off < 5e-5, "{name}: {off:.2e}");
    }
}

#[test]
fn configs_that_are_none_are_refused_by_field() {
    let parse = |field: &str, value: serde_json::Value| {
        let mut config = tiny_llama::config("llama3");
        config[field] = value;
        models::parse(&config.to_string()).map(|graph| graph.limits().tokens).map_err(|e| e.to_string())
    };
    assert_eq!(parse("hidden_act", "silu".into()), Ok(48));
    // A window makes texts shorter, where the model has one.
    assert_eq!(parse("sliding_window", 7.into()), Ok(48));
    let mistral = r#"{"model_type": "mistral", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 32, "sliding_window": 16}"#;
    assert_eq!(models::parse(mistral).unwrap().limits().tokens, 16);
    let rope = |kind: &str| serde_json::json!({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0});
    for (field, value, error) in [
        ("num_key_value_heads", 3.into(), "num_attention_heads is 4, which num_key_value_heads, 3, does not divide"),
        ("head_dim", 7.into(), "head_dim is 7; rotary positions turn pairs of features"),
        ("hidden_act", "tanh".into(), "hidden_act is \"tanh\", expected gelu, gelu_new, relu, relu6 or silu"),
        ("attention_bias", "yes".into(), "attention_bias is \"yes\", expected true or false"),
        ("partial_rotary_factor", 0.5.into(), "partial_rotary_factor: heads that are turned in part are not supported"),
        (
            "rope_parameters",
            rope("longrope"),
            "rope_type is \"longrope\", expected default or linear or dynamic or yarn or llama3",
        ),
        ("rope_parameters", "plain".into(), "rope_parameters is \"plain\", expected an object"),
        ("rope_parameters", serde_json::json!({"rope_type": "linear"}), "factor of rope_scaling is missing"),
        ("vocab_size", 0.into(), "vocab_size is 0, expected 1 to 4294967295"),
    ] {
        assert_eq!(parse(field, value), Err(error.to_owned()), "{field}");
    }
    let encoder = Checkpoint::random(models::named("minilm").unwrap(), DType::F32, 1).unwrap();
    let error = Model::new(&Device::cpu().unwrap(), &encoder).unwrap().decoder(1, 8).unwrap_err().to_string();
    assert_eq!(error, "is no language model: its last layer has no logits");
}

/// The whole way through the command line, on a folder of a small model whose tokens are letters.
#[cfg(feature = "cli")]
mod command_line {
    use std::fs;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::binary::sparse24;
    use super::tiny_llama;

    fn folder(dir: &Path) -> String {
        let folder = dir.join("model");
        tiny_llama::write("llama", &folder);
        folder.to_str().unwrap().to_owned()
    }

    #[test]
    fn it_goes_on_with_a_prompt() {
        let dir = tempfile::tempdir().unwrap();
        let model = folder(dir.path());
        let args = ["generate", &model, "--prompt", "abcab", "--max-tokens", "12", "--device", "cpu"];
        let (text, note) = sparse24(args).exits(0);
        assert!(text.len() == 12 && text.bytes().all(|c| c.is_ascii_lowercase()), "{text}");
        assert!(note.contains("prompt: 5 tokens, ") && note.contains("decode: 11 passes, "), "{note}");
        assert!(note.ends_with("12 new tokens: as many as --max-tokens says\n"), "{note}");
        // The same text once more, as JSON.
        let (json, _) = sparse24(args.into_iter().chain(["--json"])).exits(0);
        let report: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&report["text"], &report["prompt_tokens"]), (&json!(text), &json!(5)));
        assert_eq!(report["linear_layers"], json!([{"form": "dense", "vector": null, "stored": true, "layers": 14}]));

        // Draws depend on the seed alone.
        let draw = |seed: &str| {
            let more = ["--temperature", "2", "--top-p", "0.9", "--seed", seed, "--sparsity", "2:4"];
            sparse24(args.into_iter().chain(more)).exits(0).0
        };
        assert_eq!(draw("1"), draw("1"));
        assert_ne!(draw("1"), draw("2"));

        // The tokenizer's last letter ends a text: a model that says nothing else ends at once.
        let config = Path::new(&model).join("generation_config.json");
        fs::write(&config, r#"{"eos_token_id": [25, 3]}"#).unwrap();
        let ended =
            sparse24(["generate", &model, "--prompt", "abcab", "--temperature", "9", "--device", "cpu"]).exits(0).1;
        assert!(ended.ends_with("the model ended it\n"), "{ended}");
        fs::write(&config, r#"{"eos_token_id": 26}"#).unwrap();
        let error = sparse24(args).refused(1);
        assert!(error.contains("the tokenizer has no token 26, which ends a text of this model's"), "{error}");
    }

    #[test]
    fn a_chat_template_makes_the_prompt() {
        let dir = tempfile::tempdir().unwrap();
        let model = folder(dir.path());
        let template = Path::new(&model).join("chat_template.jinja");
        let source = "{% for m in messages %}\n{% if m.role == 'system' %}{{ m.content.upper().lower() }}q\
                      {% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}z{% endif %}";
        fs::write(&template, source).unwrap();
        let run = |more: &[&str]| {
            let args = ["generate", &model, "--prompt", "abc", "--max-tokens", "1", "--device", "cpu", "--json"];
            let (json, _) = sparse24(args.iter().chain(more)).exits(0);
            serde_json::from_str::<Value>(&json).unwrap()["prompt"].clone()
        };
        assert_eq!(run(&[]), "abcz");
        assert_eq!(run(&["--system", "xy"]), "xyqabcz");
        assert_eq!(run(&["--raw"]), "abc");
        fs::write(&template, "{{ raise_exception('roles must alternate') }}").unwrap();
        let error = sparse24(["generate", &model, "--prompt", "abc", "--device", "cpu"]).refused(1);
        assert!(
            error.contains("chat_template.jinja: the chat template fails: ") && error.contains("roles must alternate")
        );
        fs::remove_file(&template).unwrap();
        let error = sparse24(["generate", &model, "--prompt", "abc", "--system", "x", "--device", "cpu"]).refused(1);
        assert!(error.contains("--system: the model has no chat template"), "{error}");
    }

    #[test]
    fn what_cannot_be_said_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let model = folder(dir.path());
        let refused = |args: &[&str], code| sparse24(args.iter().chain(&["--device", "cpu"])).refused(code);
        let long = "ab".repeat(25);
        let error = refused(&["generate", &model, "--prompt", &long], 1);
        assert!(error.contains("the prompt has 50 tokens; the model takes 48"), "{error}");
        assert!(refused(&["generate", &model, "--prompt", ""], 1).contains("the prompt has no tokens"));
        assert!(refused(&["generate", &model, "--prompt", "a", "--top-p", "0"], 2).contains("top-p is 0"));
        assert!(
            refused(&["embed", &model, "--text", "a"], 1).contains("is of a language model, which makes no embeddings")
        );
        let text = dir.path().join("text.txt");
        fs::write(&text, "abc").unwrap();
        let error = refused(&["perplexity", &model, "--text", text.to_str().unwrap(), "--context", "8"], 1);
        assert!(error.contains("3 tokens are no window of 8"), "{error}");
        // A context that the prompt fills up ends the text.
        let (_, note) = sparse24(["generate", &model, "--prompt", &long[..47], "--device", "cpu"]).exits(0);
        assert!(note.ends_with("2 new tokens: the model takes no more\n"), "{note}");
        // A weight that is not finite is found when it is loaded.
        tiny_llama::spoil(Path::new(&model));
        assert!(refused(&["generate", &model, "--prompt", "a"], 1).contains("model.layers.0.mlp.up_proj.weight"));
    }

    #[test]
    fn its_perplexity_is_that_of_torchs_logits() {
        let dir = tempfile::tempdir().unwrap();
        let model = folder(dir.path());
        let (ids, logits) = tiny_llama::texts("llama").remove(2);
        let text: String = ids.iter().map(|&id| char::from(b'a' + id as u8)).collect();
        let file = dir.path().join("text.txt");
        // Two windows, of which the second is the first once more, and a rest.
        fs::write(&file, format!("{text}{text}abc")).unwrap();
        let file = file.to_str().unwrap();
        let args = ["perplexity", &model, "--text", file, "--context", "40", "--device", "cpu", "--json"];
        let (json, _) = sparse24(args).exits(0);
        let report: Value = serde_json::from_str(&json).unwrap();
        let loss = |at: usize| {
            let row = &logits[at * 26..][..26];
            row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[ids[at + 1] as usize]
        };
        let expected = ((0..39).map(loss).sum::<f64>() / 39.0).exp();
        let got = report["perplexity"].as_f64().unwrap();
        assert!((got / expected - 1.0).abs() < 1e-5, "{got} of {expected}");
        assert_eq!((&report["windows"], &report["tokens_in_text"]), (&json!(2), &json!(83)));
        assert_eq!(report["standard_error"].as_f64(), Some(0.0));
    }

    #[test]
    fn layers_are_chosen_by_how_well_tokens_are_predicted() {
        let dir = tempfile::tempdir().unwrap();
        let model = folder(dir.path());
        let file = dir.path().join("text.txt");
        // Three windows of the model's 48 tokens, of which two are read.
        fs::write(&file, (0..150).map(|i| char::from(b'a' + (i * i % 25) as u8)).collect::<String>()).unwrap();
        let (file, out) = (file.to_str().unwrap(), dir.path().join("pruned"));
        let out = out.to_str().unwrap();
        let on_cpu = |args: &[&str]| -> Value {
            let (json, _) = sparse24(args.iter().chain(&["--device", "cpu", "--json"])).exits(0);
            serde_json::from_str(&json).unwrap()
        };
        let loss = |model: &str| {
            on_cpu(&["perplexity", model, "--text", file, "--context", "48", "--windows", "2"])["mean_loss"]
                .as_f64()
                .unwrap()
        };
        let dense = loss(&model);
        let report = on_cpu(&["sensitivity", &model, "--input", file, "--windows", "2", "--vector", "1,4"]);
        assert!((report["dense"].as_f64().unwrap() + dense).abs() < 2e-6, "{report}");
        let settings = &report["settings"];
        assert_eq!((&settings["metric"], &settings["windows"]), (&json!("log_likelihood"), &json!(2)));
        let rows = report["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 2 * 2 * 4, "four products in each of two layers");
        for (layer, vector) in [("layers.0.mlp.down_proj", "1"), ("layers.1.self_attn.o_proj", "4")] {
            let row = rows.iter().find(|row| {
                row["layer"].as_str().is_some_and(|name| name.starts_with(layer))
                    && row["vector"] == json!(vector.parse::<u64>().unwrap())
            });
            let drop = row.unwrap_or_else(|| panic!("{layer}: {report}"))["drop"].as_f64().unwrap();
            on_cpu(&["prune", &model, out, "--include", layer, "--vector", vector]);
            let expected = loss(out) - dense;
            assert!((drop - expected).abs() < 2e-6 && drop.abs() > 1e-4, "{layer}: {drop} of {expected}");
            fs::remove_dir_all(out).unwrap();
        }
        let report = on_cpu(&["prune", &model, out, "--max-drop", "0.02", "--input", file, "--windows", "2"]);
        let chosen = &report["chosen"];
        assert_eq!(chosen["metric"], "log_likelihood");
        assert!(chosen["metric_of"].as_str().unwrap().starts_with("text.txt (2 windows, "), "{chosen}");
        let drop = chosen["metric_drop"].as_f64().unwrap();
        assert!(drop <= 0.02 && (drop - (loss(out) - dense)).abs() < 2e-6, "{chosen}");
        assert!(report["pruned_share"].as_f64().unwrap() > 0.1, "{report}");

        let refused = |args: &[&str], code| sparse24(args.iter().chain(&["--device", "cpu"])).refused(code);
        let error = refused(&["sensitivity", &model, "--pairs", file], 2);
        assert!(error.contains("--pairs is of embeddings, which a language model does not make"), "{error}");
        assert!(refused(&["prune", &model, "x", "--max-drop", "1", "--windows", "2"], 2).contains("--input"));
        let error = refused(&["prune", &model, "x", "--target-speedup", "1.1", "--input", file], 1);
        assert!(error.contains("--target-speedup times passes over texts"), "{error}");
        fs::write(file, "abc").unwrap();
        let error = refused(&["sensitivity", &model, "--input", file], 1);
        assert!(error.contains("3 tokens are no window of 48"), "{error}");
    }

    #[test]
    fn it_is_pruned_and_retrained_and_its_passes_are_timed() {
        let dir = tempfile::tempdir().unwrap();
        let model = folder(dir.path());
        let texts = dir.path().join("texts.txt");
        let line = |i: usize| {
            "abcdefghijklmnopqrstuvwxy".chars().cycle().skip(i).step_by(1 + i % 5).take(12).collect::<String>()
        };
        fs::write(&texts, (0..90).map(|i| line(i) + "\n").collect::<String>()).unwrap();
        let texts = texts.to_str().unwrap();
        for method in ["magnitude", "wanda", "sparsegpt"] {
            let out = dir.path().join(method).to_str().unwrap().to_owned();
            let mut args = vec!["prune", &model, &out, "--method", method, "--vector", "2", "--device", "cpu"];
            args.extend((method != "magnitude").then_some(["--calibration", texts]).into_iter().flatten());
            sparse24(args).exits(0);
            let (json, _) =
                sparse24(["generate", &out, "--prompt", "abc", "--max-tokens", "3", "--device", "cpu", "--json"])
                    .exits(0);
            let report: Value = serde_json::from_str(&json).unwrap();
            assert_eq!(report["linear_layers"], json!([{"form": "2:4", "vector": 2, "stored": true, "layers": 14}]));
        }
        let (pruned, out) = (dir.path().join("sparsegpt"), dir.path().join("retrained"));
        let (pruned, out) = (pruned.to_str().unwrap(), out.to_str().unwrap());
        let args = [
            "retrain",
            pruned,
            out,
            "--teacher",
            &model,
            "--input",
            texts,
            "--steps",
            "40",
            "--learning-rate",
            "0.01",
            "--device",
            "cpu",
            "--json",
        ];
        let (json, _) = sparse24(args).exits(0);
        let report: Value = serde_json::from_str(&json).unwrap();
        let losses: Vec<f64> =
            report["held_out"].as_array().unwrap().iter().map(|of| of[1].as_f64().unwrap()).collect();
        assert!(losses[losses.len() - 1] < 0.9 * losses[0], "{losses:?}");
        // By its logits, too.
        let by_logits = dir.path().join("by-logits");
        let mut args = args.to_vec();
        args[2] = by_logits.to_str().unwrap();
        let (json, _) = sparse24(args.into_iter().chain(["--objective", "logits"])).exits(0);
        let report: Value = serde_json::from_str(&json).unwrap();
        let logits = |step: usize| report["steps"][step]["logits"].as_f64().unwrap();
        assert!(report["objective"] == "logits" && 0.0 < logits(39) && logits(39) < 0.9 * logits(0), "{report}");

        let args =
            ["bench", "--model", &model, "--seq", "16", "--ops", "dense,sparse24", "--vector", "1", "--device", "cpu"];
        let (json, _) = sparse24(args.into_iter().chain(["--quick", "--json"])).exits(0);
        let report: Value = serde_json::from_str(&json).unwrap();
        let rows = report["rows"].as_array().unwrap();
        let phases: Vec<_> = rows.iter().map(|row| (row["phase"].as_str(), row["op"].as_str())).collect();
        let [dense, sparse] = ["dense", "sparse24"].map(Some);
        let [prefill, decode] = ["prefill", "decode"].map(Some);
        assert_eq!(phases, [(prefill, dense), (prefill, sparse), (decode, dense), (decode, sparse)]);
        assert!(
            rows.iter().all(|row| row["verified"] == true && row["tokens_per_second"].as_f64() > Some(0.0)),
            "{report}"
        );
    }
}
