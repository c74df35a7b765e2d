//! What follows the encoder, as folders of Sentence Transformers ask for it: against Sentence Transformers itself,
//! against the f64 twin, and what is refused.
//!
//! The expected embeddings are in vectors/sentence_transformers.json. vectors/sentence_transformers.py computes them
//! from the folders that this test writes where SPARSE24_WRITE_PIPELINES names a place for them.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::gpu;
use serde_json::{Value, json};
use sparse24::graph::{Ablation, Batching, Checkpoint};
use sparse24::text::{Encoder, Files, Pipeline, Pooling, Similarity, Tokenizer, twin};
use sparse24::{DType, Device, Matrix, models};
use tempfile::TempDir;
use tiny_bert::TinyBert;

const TEXTS: [&str; 4] = ["The cats sat on the mat.", "dog", "", "the dog ran on the mat . cats"];

/// Writes the folder of a module, with a tensor of random numbers for each name and shape.
fn module(folder: &Path, name: &str, config: &Value, tensors: &[(&str, &[usize])]) {
    let at = folder.join(name);
    fs::create_dir_all(&at).unwrap();
    fs::write(at.join("config.json"), config.to_string()).unwrap();
    let matrices: Vec<_> = tensors
        .iter()
        .enumerate()
        .map(|(i, (_, shape))| Matrix::uniform(1, shape.iter().product(), DType::F32, 70 + i as u64).unwrap())
        .collect();
    let views = tensors.iter().zip(&matrices).map(|((name, shape), matrix)| {
        let view = safetensors::tensor::TensorView::new(
            safetensors::tensor::Dtype::F32,
            shape.to_vec(),
            matrix.elements().as_bytes(),
        );
        (*name, view.unwrap())
    });
    if !tensors.is_empty() {
        safetensors::serialize_to_file(views, None, &at.join("model.safetensors")).unwrap();
    }
}

/// Writes `modules.json`: folders and classes.
fn list(folder: &Path, modules: &[(&str, &str)]) {
    let entry = |(i, (path, class)): (usize, &(&str, &str))| json!({"idx": i, "name": i.to_string(), "path": path, "type": format!("sentence_transformers.models.{class}")});
    let entries: Vec<_> = modules.iter().enumerate().map(entry).collect();
    fs::write(folder.join("modules.json"), json!(entries).to_string()).unwrap();
}

fn dense(inputs: usize, outputs: usize, function: &str) -> Value {
    json!({"in_features": inputs, "out_features": outputs, "bias": true,
           "activation_function": format!("torch.nn.modules.{function}")})
}

/// A folder of each kind in `place`, with the number of features of its embeddings.
fn folders(place: &Path) -> Vec<(&'static str, PathBuf, usize)> {
    let mut made = Vec::new();
    let mut new = |name: &'static str, width: usize| {
        let folder = place.join(name);
        TinyBert::new(24).write(&folder);
        fs::write(folder.join("sentence_bert_config.json"), r#"{"max_seq_length": 24, "do_lower_case": true}"#)
            .unwrap();
        made.push((name, folder.clone(), width));
        folder
    };
    let flags = |on: &[&str]| -> Value {
        let all =
            ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"];
        let flag = |name: &&str| (format!("pooling_mode_{name}"), on.contains(name).into());
        let mut json: serde_json::Map<String, Value> = all.iter().map(flag).collect();
        json.insert("word_embedding_dimension".into(), 40.into());
        json.into()
    };
    let settings = |folder: &Path, json: Value| {
        fs::write(folder.join("config_sentence_transformers.json"), json.to_string()).unwrap();
    };

    let folder = new("cls", 40);
    list(&folder, &[("", "Transformer"), ("2_Pooling", "Pooling")]);
    module(&folder, "2_Pooling", &flags(&["cls_token"]), &[]);

    let folder = new("mean, without Normalize", 40);
    list(&folder, &[("", "Transformer"), ("1_Pooling", "Pooling"), ("3", "Dropout")]);
    module(&folder, "1_Pooling", &flags(&["mean_tokens"]), &[]);
    module(&folder, "3", &json!({"dropout": 0.5}), &[]);

    let folder = new("all poolings, Tanh", 16);
    list(&folder, &[("", "Transformer"), ("pool/here", "Pooling"), ("2_Dense", "Dense")]);
    let all = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"];
    module(&folder, "pool/here", &flags(&all), &[]);
    module(
        &folder,
        "2_Dense",
        &dense(240, 16, "activation.Tanh"),
        &[("linear.bias", &[16]), ("linear.weight", &[16, 240])],
    );

    let folder = new("max, GELU and its input, LayerNorm, Normalize", 40);
    let modules = [("", "Transformer"), ("1", "Pooling"), ("2", "Dense"), ("3", "LayerNorm"), ("4", "Normalize")];
    list(&folder, &modules);
    module(&folder, "1", &json!({"embedding_dimension": 40, "pooling_mode": "max"}), &[]);
    let mut residual = dense(40, 40, "activation.GELU");
    (residual["use_residual"], residual["bias"]) = (json!(true), json!(false));
    module(&folder, "2", &residual, &[("linear.weight", &[40, 40])]);
    module(&folder, "3", &json!({"dimension": 40}), &[("norm.bias", &[40]), ("norm.weight", &[40])]);

    let folder = new("lasttoken and mean, SiLU and a projection, Sigmoid", 8);
    list(&folder, &[("", "Transformer"), ("1", "Pooling"), ("2", "Dense"), ("3", "Dense"), ("4", "Normalize")]);
    module(&folder, "1", &json!({"embedding_dimension": 40, "pooling_mode": ["lasttoken", "mean"]}), &[]);
    let mut projected = dense(80, 12, "activation.SiLU");
    projected["use_residual"] = json!(true);
    let tensors: [(&str, &[usize]); 3] =
        [("linear.bias", &[12]), ("linear.weight", &[12, 80]), ("residual.weight", &[12, 80])];
    module(&folder, "2", &projected, &tensors);
    module(&folder, "3", &dense(12, 8, "activation.Sigmoid"), &[("linear.bias", &[8]), ("linear.weight", &[8, 12])]);

    let folder = new("mean, ReLU, Identity", 20);
    list(&folder, &[("", "Transformer"), ("1", "Pooling"), ("2", "Dense"), ("3", "Dense")]);
    module(&folder, "1", &flags(&["mean_tokens"]), &[]);
    module(&folder, "2", &dense(40, 10, "activation.ReLU"), &[("linear.bias", &[10]), ("linear.weight", &[10, 40])]);
    module(&folder, "3", &dense(10, 20, "linear.Identity"), &[("linear.bias", &[20]), ("linear.weight", &[20, 10])]);

    let folder = new("a prompt", 40);
    list(&folder, &[("", "Transformer"), ("1", "Pooling"), ("2", "Normalize")]);
    module(&folder, "1", &flags(&["mean_tokens"]), &[]);
    let prompts = json!({"prompts": {"query": "The cat ran: ", "document": ""}, "default_prompt_name": "query"});
    settings(&folder, prompts.clone());

    let folder = new("a prompt that is not pooled", 200);
    list(&folder, &[("", "Transformer"), ("1", "Pooling")]);
    let mut pooling = flags(&all[1..]);
    pooling["include_prompt"] = json!(false);
    module(&folder, "1", &pooling, &[]);
    settings(&folder, prompts);

    // The encoder in a folder of its own, as older versions have it.
    let folder = new("a folder for the Transformer", 40);
    list(&folder, &[("0_Transformer", "Transformer"), ("1", "Pooling"), ("2", "Normalize")]);
    module(&folder, "1", &flags(&["mean_sqrt_len_tokens"]), &[]);
    fs::create_dir_all(folder.join("0_Transformer")).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors", "sentence_bert_config.json"] {
        fs::rename(folder.join(file), folder.join("0_Transformer").join(file)).unwrap();
    }
    made
}

/// A folder as the commands load it, with a prompt's name if one is asked for.
fn load(folder: &Path, prompt: Option<&str>) -> sparse24::Result<(Tokenizer, Checkpoint, Pipeline)> {
    let files = Files::in_folder(folder);
    let graph = models::load(&files.config)?;
    let limits = graph.limits();
    let settings = files.settings()?;
    let tokenizer = Tokenizer::load(&files.tokenizer, limits)?.truncated_at(files.max_tokens(limits)?)?;
    let tokenizer = tokenizer.lower_case(files.lower_case()?).with_prompt(settings.prompt(prompt)?.unwrap_or_default());
    let checkpoint = Checkpoint::load(graph, &files.weights, None, DType::F32)?;
    let mut pipeline = Pipeline::load(&files, checkpoint.graph().output_width())?;
    pipeline.set_prompt_tokens(tokenizer.prompt_tokens()?);
    Ok((tokenizer, checkpoint, pipeline))
}

/// The largest distance, over the largest number of a row of the second one where that is above 1.
fn distance(got: &Matrix, expected: impl Fn(usize, usize) -> f64) -> f64 {
    let mut worst = 0f64;
    for row in 0..got.rows() {
        let scale = (0..got.cols()).map(|col| expected(row, col).abs()).fold(1.0, f64::max);
        for col in 0..got.cols() {
            let off = (f64::from(got.get(row, col)) - expected(row, col)).abs() / scale;
            worst = worst.max(if off.is_nan() { f64::INFINITY } else { off });
        }
    }
    worst
}

#[test]
fn embeddings_are_those_of_sentence_transformers() {
    if let Some(place) = std::env::var_os("SPARSE24_WRITE_PIPELINES") {
        folders(Path::new(&place));
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/sentence_transformers.json");
    let expected: BTreeMap<String, Vec<Vec<f64>>> = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let (dir, device) = (TempDir::new().unwrap(), Device::cpu().unwrap());
    let folders = folders(dir.path());
    assert_eq!(folders.len(), expected.len());
    for (name, folder, width) in folders {
        let (tokenizer, checkpoint, pipeline) = load(&folder, None).unwrap();
        let model = Encoder::new(&device, &checkpoint, pipeline).unwrap();
        let got = model.embed(&tokenizer.encode(&TEXTS).unwrap().ids, Batching::default()).unwrap();
        let rows = &expected[name];
        assert_eq!((got.cols(), rows[0].len(), model.width()), (width, width, width), "{name}");
        let off = distance(&got, |row, col| rows[row][col]);
        // Sums of f32 in another order, in front of a Dense of 240 inputs that are not small: 8e-6. Another pooling, or
        // a token more or less in it, is above 1e-2.
        assert!(off < 2e-5, "{name}: {off:.2e}");
    }
}

fn agrees_with_the_twin(device: &Device) {
    let dir = TempDir::new().unwrap();
    for (name, folder, _) in folders(dir.path()) {
        let (tokenizer, checkpoint, pipeline) = load(&folder, None).unwrap();
        let ids = tokenizer.encode(&TEXTS).unwrap().ids;
        let expected = twin::embeddings(&checkpoint, &pipeline, &ids).unwrap();
        let model = Encoder::new(device, &checkpoint, pipeline.clone()).unwrap();
        // In one batch with padding, in several, and by the way that replaces a layer.
        let (_, w) = checkpoint.linears().next().map(|(name, w)| (name, w.clone())).unwrap();
        let attached = pipeline.attach(&checkpoint).unwrap();
        let mut ablation = Ablation::new(device, &attached, &ids, Batching { texts: 3, tokens: 99 }).unwrap();
        for got in [
            model.embed_batch(&model.forward(4, 24).unwrap(), &ids).unwrap(),
            model.embed(&ids, Batching { texts: 2, tokens: 40 }).unwrap(),
            pipeline.ablated(&mut ablation, "encoder.layer.0.attention.self.qkv", w).unwrap(),
        ] {
            let off = distance(&got, |row, col| expected[(row, col)]);
            assert!(off < 1e-5, "{name} on {}: {off:.2e}", device.info().name());
        }
        // Only the mean, and a Normalize right after it, is the device's own work.
        let pooled = model.model().graph().value_named("pooling").is_some();
        let mean = pipeline.poolings() == [Pooling::Mean] && pipeline.includes_prompt();
        assert_eq!(pooled, mean, "{name}");
        assert!(pooled || !["mean, without Normalize", "a prompt"].contains(&name), "{name}");
    }
}

#[test]
fn the_cpu_agrees_with_the_twin_in_every_pipeline() {
    agrees_with_the_twin(&Device::cpu().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_agrees_with_the_twin_in_every_pipeline() {
    gpu().iter().for_each(agrees_with_the_twin);
}

/// Tanh and Sigmoid make finite numbers of infinite ones, and a maximum passes over NaNs.
#[test]
fn states_that_overflow_are_named_whatever_follows() {
    let (dir, device) = (TempDir::new().unwrap(), Device::cpu().unwrap());
    for (name, folder, _) in folders(dir.path()) {
        let mut tiny = TinyBert::new(24);
        tiny.tensors.get_mut("encoder.layer.1.output.LayerNorm.weight").unwrap().1.fill(3e38);
        let at = if folder.join("0_Transformer").exists() { folder.join("0_Transformer") } else { folder.clone() };
        tiny.write(&at);
        let (tokenizer, checkpoint, pipeline) = load(&folder, None).unwrap();
        let ids = tokenizer.encode(&TEXTS[..1]).unwrap().ids;
        let error = Encoder::new(&device, &checkpoint, pipeline).unwrap().embed(&ids, Batching::default()).unwrap_err();
        assert_eq!(error.to_string(), "text 0: activations are not finite in f32", "{name}");
    }
}

#[test]
fn prompts_go_in_front_of_texts_and_can_be_chosen() {
    let dir = TempDir::new().unwrap();
    let folders = folders(dir.path());
    let folder = |name: &str| &folders.iter().find(|(of, ..)| *of == name).unwrap().1;
    let ids = |prompt: Option<&str>, text: &str| {
        let (tokenizer, _, pipeline) = load(folder("a prompt"), prompt).unwrap();
        assert!(pipeline.includes_prompt());
        (tokenizer.encode(&[text]).unwrap().ids.remove(0), tokenizer.prompt_tokens().unwrap())
    };
    // [CLS] the cat ran [UNK] dog [SEP]; of these the first five are there without the text.
    assert_eq!(ids(None, "Dog"), (vec![2, 5, 6, 13, 1, 12, 3], 5));
    assert_eq!(ids(Some("query"), "Dog"), ids(None, "Dog"));
    for none in ["", "document"] {
        assert_eq!(ids(Some(none), "dog"), (vec![2, 12, 3], 0));
    }
    let error = |name: &str, prompt: &str| load(folder(name), Some(prompt)).unwrap_err().to_string();
    let unknown = error("a prompt", "passage");
    assert_eq!(unknown, r#"the model has no prompt "passage"; it has "document", "query""#);
    assert_eq!(error("cls", "query"), r#"the model has no prompts, so no "query""#);

    // Without special tokens a prompt alone leaves nothing to pool.
    let bare = folder("a prompt that is not pooled");
    let mut tiny = TinyBert::new(24);
    tiny.tokenizer["post_processor"] = json!(null);
    tiny.write(bare);
    let (tokenizer, checkpoint, pipeline) = load(bare, None).unwrap();
    let ids = tokenizer.encode(&["dog", "dog cat cat", ""]).unwrap().ids;
    assert_eq!((tokenizer.prompt_tokens().unwrap(), &ids[2]), (4, &vec![5, 6, 13, 1]));
    let model = Encoder::new(&Device::cpu().unwrap(), &checkpoint, pipeline).unwrap();
    let error = model.embed(&ids, Batching::default()).unwrap_err().to_string();
    assert_eq!(error, "text 2: has 4 tokens, and the 4 of the prompt are left out of the pooling");
}

#[test]
fn a_folder_without_a_list_has_the_mean_or_the_pooling_that_it_names() {
    let dir = TempDir::new().unwrap();
    TinyBert::new(0).write(dir.path());
    let pipeline = || Pipeline::load(&Files::in_folder(dir.path()), 40);
    assert_eq!(pipeline().unwrap(), Pipeline::default());
    module(dir.path(), "1_Pooling", &json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}), &[]);
    let cls = pipeline().unwrap();
    assert_eq!((cls.poolings(), cls.width(40)), (&[Pooling::Cls][..], 40));
    // The list decides, wherever its pooling lies.
    list(dir.path(), &[("", "Transformer"), ("here", "Pooling"), ("there", "Normalize")]);
    module(dir.path(), "here", &json!({}), &[]);
    assert_eq!(pipeline().unwrap(), Pipeline::default());
}

/// Every module, pooling, activation and field that is not known is refused by its name and file.
#[test]
fn what_is_not_known_or_does_not_fit_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    TinyBert::new(0).write(dir.path());
    let at = |name: &str| dir.path().join(name).display().to_string();
    let refused = || Pipeline::load(&Files::in_folder(dir.path()), 40).unwrap_err().to_string();
    let of_list = |modules: &[(&str, &str)]| {
        list(dir.path(), modules);
        refused().strip_prefix(&format!("{}: ", at("modules.json"))).unwrap().to_owned()
    };
    let (transformer, pooling) = (("", "Transformer"), ("1", "Pooling"));
    module(dir.path(), "1", &json!({"pooling_mode": "mean"}), &[]);
    for class in ["LSTM", "CNN", "WordWeights", "Router", "SpladePooling", "StaticEmbedding"] {
        let error = format!("asks for the module {class}, which is not known here");
        assert_eq!(of_list(&[transformer, pooling, ("2", class)]), error);
    }
    assert_eq!(of_list(&[]), "lists no modules");
    assert_eq!(of_list(&[transformer]), "has no Pooling: its tokens have states, and a text no embedding");
    assert_eq!(of_list(&[transformer, pooling, ("2", "Pooling")]), "has a second Pooling: Pooling in 2");
    let early = of_list(&[transformer, ("2", "Normalize"), pooling]);
    assert_eq!(early, "has no Pooling right after the Transformer: Normalize in 2");
    let first = "entry 0 is a Pooling; the first one, and only that, is a Transformer";
    assert_eq!(of_list(&[pooling]), first);
    assert_eq!(of_list(&[transformer, ("../x", "Pooling")]), "../x is not a folder beside it");
    let own = json!([{"path": "", "type": "custom.Transformer"}]);
    fs::write(dir.path().join("modules.json"), own.to_string()).unwrap();
    assert!(refused().ends_with(r#"asks for "custom.Transformer", which is not a module of Sentence Transformers"#));
    fs::write(dir.path().join("modules.json"), "{}").unwrap();
    assert!(refused().ends_with("modules.json: is not a JSON array"));

    list(dir.path(), &[transformer, pooling]);
    let of_pooling = |config: Value| {
        module(dir.path(), "1", &config, &[]);
        refused().strip_prefix(&format!("{}: ", at("1/config.json"))).unwrap().to_owned()
    };
    let known = "which is not one of cls, max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken";
    assert_eq!(of_pooling(json!({"pooling_mode": "median"})), format!("asks for the pooling \"median\", {known}"));
    assert_eq!(of_pooling(json!({"pooling_mode": ["cls", 3]})), format!("asks for the pooling 3, {known}"));
    let odd = json!({"pooling_mode_mean_tokens": true, "pooling_mode_odd": true});
    assert_eq!(of_pooling(odd), format!("asks for the pooling pooling_mode_odd, {known}"));
    assert_eq!(of_pooling(json!({"pooling_mode_mean_tokens": false})), "asks for no pooling");
    assert_eq!(of_pooling(json!({"pooling_mode": []})), "asks for no pooling");
    let wide = of_pooling(json!({"word_embedding_dimension": 384}));
    assert_eq!(wide, "word_embedding_dimension is 384, and 40 features come before it");
    assert_eq!(of_pooling(json!({"include_prompt": "no"})), "include_prompt is \"no\", expected true or false");
    assert_eq!(of_pooling(json!([])), "is not a JSON object");

    module(dir.path(), "1", &json!({}), &[]);
    list(dir.path(), &[transformer, pooling, ("2", "Dense")]);
    let tensors: [(&str, &[usize]); 2] = [("linear.bias", &[4]), ("linear.weight", &[4, 40])];
    let of_dense = |field: &str, value: Value| {
        let mut config = dense(40, 4, "activation.Tanh");
        config[field] = value;
        module(dir.path(), "2", &config, &tensors);
        refused().strip_prefix(&format!("{}/", at("2"))).unwrap().to_owned()
    };
    for name in ["torch.nn.modules.activation.Mish", "my.code.Tanh"] {
        let error = of_dense("activation_function", json!(name));
        let known = "which is not one of torch's Identity, Tanh, ReLU, GELU, SiLU, Sigmoid";
        assert_eq!(error, format!("config.json: activation_function is \"{name}\", {known}"));
    }
    let tokens = of_dense("module_input_name", json!("token_embeddings"));
    assert!(tokens.starts_with("config.json: module_input_name is \"token_embeddings\"; a Dense is "), "{tokens}");
    let narrow = "config.json: in_features is 39, and 40 features come before it";
    assert_eq!(of_dense("in_features", json!(39)), narrow);
    assert_eq!(of_dense("out_features", json!(null)), "config.json: out_features is missing or no whole number");
    assert_eq!(of_dense("out_features", json!(0)), "config.json: out_features is 0");
    let shape = "model.safetensors: tensor linear.weight: weight has shape [4, 40], expected [5, 40]";
    assert!(
        [
            shape,
            &shape.replace(
                "weight: weight has shape [4, 40], expected [5, 40]",
                "bias: weight has shape [4], expected [5]"
            )
        ]
        .contains(&of_dense("out_features", json!(5)).as_str())
    );
    let projection = of_dense("use_residual", json!(true));
    assert_eq!(projection, "model.safetensors: tensor residual.weight of shape [4, 40] is missing");
    fs::rename(dir.path().join("2/model.safetensors"), dir.path().join("2/pytorch_model.bin")).unwrap();
    module(dir.path(), "2", &dense(40, 4, "activation.Tanh"), &[]);
    assert!(refused().ends_with(
        "2/model.safetensors: is missing, and pytorch_model.bin is not read: save the module as safetensors"
    ));
}

#[test]
fn settings_are_read_or_refused_by_field() {
    let dir = TempDir::new().unwrap();
    TinyBert::new(0).write(dir.path());
    let settings = |json: Value| {
        fs::write(dir.path().join("config_sentence_transformers.json"), json.to_string()).unwrap();
        let files = Files::in_folder(dir.path());
        files.settings().map_err(|e| e.to_string().rsplit_once("json: ").unwrap().1.to_owned())
    };
    for similarity in Similarity::ALL {
        let read = settings(json!({"similarity_fn_name": similarity.name()})).unwrap();
        assert_eq!((read.similarity(), read.prompt(None).unwrap()), (similarity, None));
    }
    assert_eq!(settings(json!({"similarity_fn_name": null})).unwrap().similarity(), Similarity::Cosine);
    for (json, error) in [
        (json!({"similarity_fn_name": "jaccard"}), "similarity_fn_name is \"jaccard\", expected one of cosine, dot"),
        (json!({"prompts": ["a"]}), "prompts is [\"a\"], expected an object of texts"),
        (json!({"prompts": {"q": 1}}), "the prompt \"q\" is 1, expected a text"),
        (json!({"default_prompt_name": "q"}), "default_prompt_name is \"q\", which is none of its prompts"),
        (json!({"model_type": "SparseEncoder"}), "model_type is \"SparseEncoder\", expected \"SentenceTransformer\""),
    ] {
        let refused = settings(json).unwrap_err();
        assert!(refused.starts_with(error), "{refused}");
    }
    // No direction, no angle.
    assert_eq!(Similarity::Cosine.of(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
    assert!(Similarity::Cosine.of(&[f32::NAN], &[1.0]).is_nan());
}
