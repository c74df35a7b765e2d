//! A folder of a BERT of two small layers, made by the test: config, tokenizer and weights, each of which a test may
//! spoil.
#![allow(dead_code, unreachable_pub, reason = "each test file includes this and uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sparse24::matrix::{DType, Elements, Matrix};

/// Words of the vocabulary, of which the id is the place.
pub const WORDS: [&str; 14] =
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ".", "##s", "dog", "ran"];

/// The parts of the folder.
pub struct TinyBert {
    pub config: Value,
    pub tokenizer: Value,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub dtype: DType,
}

impl TinyBert {
    /// 40 features: no multiple of 32, so that kernels pad k, in 5 heads of 8; 72 between the feed-forward layers; 24
    /// positions. Weights reach 0.4, so that attention is far from uniform.
    pub fn new(seed: u64) -> Self {
        Self::of_width(seed, 40, 72)
    }

    /// The same with `d` features, a multiple of 5, and `inner` ones between the feed-forward layers.
    pub fn of_width(seed: u64, d: usize, inner: usize) -> Self {
        let (words, positions) = (WORDS.len(), 24);
        let config = json!({
            "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": d,
            "intermediate_size": inner, "layer_norm_eps": 1e-12, "max_position_embeddings": positions,
            "num_attention_heads": 5, "num_hidden_layers": 2, "position_embedding_type": "absolute",
            "type_vocab_size": 2, "vocab_size": words,
        });
        let vocabulary: BTreeMap<_, _> = WORDS.iter().enumerate().map(|(id, word)| (word, id)).collect();
        let special = |id: usize| {
            json!({"id": id, "special": true, "content": WORDS[id], "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        };
        let token = |word: &str| json!({"SpecialToken": {"id": word, "type_id": 0}});
        let entry = |word: &str, id: usize| json!({"id": word, "ids": [id], "tokens": [word]});
        // Truncates and pads to 4 tokens, as the file of all-MiniLM-L6-v2 does to 128.
        let tokenizer = json!({
            "version": "1.0",
            "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "[PAD]"},
            "added_tokens": (0..5).map(special).collect::<Vec<_>>(),
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [token("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, token("[SEP]")],
                "pair": [token("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, token("[SEP]"),
                         {"Sequence": {"id": "B", "type_id": 1}}, token("[SEP]")],
                "special_tokens": {"[CLS]": entry("[CLS]", 2), "[SEP]": entry("[SEP]", 3)},
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": vocabulary},
        });
        let mut tensors = BTreeMap::new();
        let mut part = seed;
        let mut add = |name: String, shape: &[usize], around: f32| {
            part += 1;
            let numbers = Matrix::uniform(1, shape.iter().product(), DType::F32, part).unwrap().elements().to_f32();
            let numbers = numbers.into_iter().map(|x| around + 0.4 * x).collect();
            tensors.insert(name, (shape.to_vec(), numbers));
        };
        let embeddings = [("word_embeddings", words), ("position_embeddings", positions), ("token_type_embeddings", 2)];
        for (name, rows) in embeddings {
            add(format!("embeddings.{name}.weight"), &[rows, d], 0.0);
        }
        let mut norms = vec!["embeddings.LayerNorm".to_owned()];
        for layer in 0..2 {
            let at = format!("encoder.layer.{layer}");
            for (name, m, k) in [
                ("attention.self.query", d, d),
                ("attention.self.key", d, d),
                ("attention.self.value", d, d),
                ("attention.output.dense", d, d),
                ("intermediate.dense", inner, d),
                ("output.dense", d, inner),
            ] {
                add(format!("{at}.{name}.weight"), &[m, k], 0.0);
                add(format!("{at}.{name}.bias"), &[m], 0.0);
            }
            norms.extend([format!("{at}.attention.output.LayerNorm"), format!("{at}.output.LayerNorm")]);
        }
        for norm in norms {
            add(format!("{norm}.weight"), &[d], 1.0);
            add(format!("{norm}.bias"), &[d], 0.0);
        }
        // What a checkpoint has and this crate does not use.
        add("pooler.dense.weight".into(), &[d, d], 0.0);
        Self { config, tokenizer, tensors, dtype: DType::F32 }
    }

    /// The first element of a tensor.
    pub fn first(&mut self, name: &str) -> &mut f32 {
        &mut self.tensors.get_mut(name).unwrap().1[0]
    }

    /// Gives tensors other names.
    pub fn rename(&mut self, name: impl Fn(&str) -> String) {
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(n, t)| (name(&n), t)).collect();
    }

    /// Writes the folder.
    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        fs::write(folder.join("tokenizer.json"), self.tokenizer.to_string()).unwrap();
        let dtype = match self.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
        };
        let data: Vec<_> = self.tensors.values().map(|(_, x)| Elements::from_f32(self.dtype, x)).collect();
        let views = self.tensors.iter().zip(&data).map(|((name, (shape, _)), data)| {
            (name.as_str(), TensorView::new(dtype, shape.clone(), data.as_bytes()).unwrap())
        });
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}
