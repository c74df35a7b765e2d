//! SmolLM2-135M-Instruct against what torch computes with it (tests/vectors/smollm2.json).
//!
//! The model comes by `bash tests/fetch-smollm2.sh`: weights that were stored in four and eight bits. Ignored unless
//! asked for.

#![cfg(feature = "text")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::ops::ControlFlow;

use common::gpu;
use serde_json::Value;
use sparse24::text::{Files, Finish, GenerateOptions, Generator, LanguageModel, LoadOptions};
use sparse24::{DType, Device};

fn load(dtype: DType) -> LanguageModel {
    let files = Files::in_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/model/smollm2"));
    LanguageModel::load(&files, LoadOptions { dtype, ..LoadOptions::default() }).unwrap()
}

fn prompts() -> Vec<Value> {
    let json: Value = serde_json::from_str(include_str!("vectors/smollm2.json")).unwrap();
    json["prompts"].as_array().unwrap().clone()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Token ids, the last token's logits and what follows greedily, of so many prompts.
fn goes_on_as_torch_does(device: &Device, count: usize) {
    let generator = Generator::new(device, &load(DType::F32)).unwrap();
    for prompt in &prompts()[..count] {
        let text = prompt["text"].as_str().unwrap();
        let prompt_ids = generator.tokenizer().prompt(text).unwrap();
        assert_eq!(prompt_ids, ids(&prompt["ids"]), "{text}");

        let logits = generator.model().decoder(1, 64).unwrap().forward(&[&prompt_ids]).unwrap();
        let top = prompt["last_logits_top20"].as_array().unwrap();
        let of_top = top.iter().map(|of| (of[0].as_u64().unwrap() as usize, of[1].as_f64().unwrap()));
        let every = prompt["last_logits_every_1000"].as_array().unwrap().iter().enumerate();
        let every = every.map(|(at, of)| (1000 * at, of.as_f64().unwrap()));
        let largest = top[0][1].as_f64().unwrap();
        for (token, expected) in of_top.chain(every) {
            let off = (f64::from(logits.get(0, token)) - expected).abs() / largest;
            assert!(off < 2e-3, "{text}, token {token} on {}: {off:.2e}", device.info().name());
        }

        let options = GenerateOptions { max_tokens: 24, ..GenerateOptions::default() };
        let mut said = String::new();
        let generated = generator.generate(&prompt_ids, options, &mut |text| {
            said += text;
            ControlFlow::Continue(())
        });
        let generated = generated.unwrap();
        assert_eq!(generated.ids, ids(&prompt["greedy"]), "{text}");
        assert_eq!((said.as_str(), generated.finish), (prompt["greedy_text"].as_str().unwrap(), Finish::MaxTokens));
    }
}

#[test]
#[ignore = "needs model/smollm2"]
fn the_cpu_goes_on_as_torch_does() {
    goes_on_as_torch_does(&Device::cpu().unwrap(), 4);
}

#[test]
#[ignore = "needs a GPU and model/smollm2"]
fn a_gpu_goes_on_as_torch_does() {
    gpu().iter().for_each(|device| goes_on_as_torch_does(device, 2));
}

/// What the tokenizer and the chat template make of a question.
#[test]
#[ignore = "needs model/smollm2"]
fn its_chat_template_is_rendered_as_by_transformers() {
    use sparse24::text::Message;
    let model = load(DType::F16);
    let prompt = model.chat_template.unwrap().render(&[Message::new("user", "Hi 123\n there é")]).unwrap();
    let expected = [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
        198, 1, 4093, 198, 26843, 216, 33, 34, 35, 198, 665, 26411, 2, 198, 1, 520, 9531, 198,
    ];
    assert_eq!(model.tokenizer.rendered_prompt(&prompt).unwrap(), expected);
}
