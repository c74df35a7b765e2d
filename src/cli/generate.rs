//! `sparse24 generate`: a prompt in, what a language model goes on with out, token by token.

use std::io::{Read, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::{DASH, Json, Usage};
use super::language::{Language, LanguageArgs};
use super::{Outcome, harmless, model, say};
use sparse24::text::{Finish, GenerateOptions, Generated, Message, Sampling};

/// Go on with a prompt by a language model (Llama, Mistral, Qwen2, Qwen3, SmolLM), dense or 2:4.
///
/// The text appears as it is made; how fast that was is said on stderr. A model that has a chat template gets the
/// prompt as what a user says, and answers; --raw gives it the prompt as it is, to be gone on with.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 generate --model model/smollm2 --prompt 'What is a sparse matrix?'
  sparse24 generate model/smollm2 --sparsity 2:4 --raw --prompt 'The capital of France is'
  sparse24 generate model/smollm2 --temperature 0.8 --seed 7 --prompt - < question.txt")]
pub(crate) struct Args {
    #[command(flatten)]
    model: LanguageArgs,
    /// What the model is asked; `-` for stdin.
    #[arg(long, value_name = "TEXT|-", allow_hyphen_values = true)]
    prompt: String,
    /// What the model is told before, where its chat template has a place for it.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Give the model the prompt as it is, without its chat template.
    #[arg(long)]
    raw: bool,
    /// The most new tokens.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// What logits are divided by before a token is drawn; at 0 the most likely one is taken.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the most likely tokens only, whose probabilities together reach this share.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 24)]
    seed: u64,
    #[command(flatten)]
    json: Json,
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    model: String,
    sparsity: String,
    linear_layers: Vec<model::Form>,
    dtype: String,
    device: String,
    sampling: Draws,
    prompt: String,
    prompt_tokens: usize,
    text: String,
    tokens: Vec<u32>,
    finish: &'static str,
    cache_bytes: usize,
    /// From the prompt to its last token's logits, with what is prepared the first time.
    prompt_seconds: f64,
    decoded: usize,
    decode_seconds: f64,
}

#[derive(Serialize)]
struct Draws {
    temperature: f64,
    top_p: f64,
    seed: u64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    args.model.check()?;
    args.json.file()?;
    let &Args { max_tokens, temperature, top_p, seed, .. } = args;
    let sampling = Sampling { temperature, top_p, seed };
    sparse24::text::Sampler::new(sampling).map_err(|e| Usage::error(e.to_string()))?;
    let given = args.prompt()?;
    let Language { device, generator, chat_template, forms, .. } = args.model.open()?;
    let tokenizer = generator.tokenizer();
    let (prompt, ids) = match chat_template.filter(|_| !args.raw) {
        Some(template) => {
            let system = args.system.as_deref().map(|text| Message::new("system", text));
            let messages: Vec<_> = system.into_iter().chain([Message::new("user", &given)]).collect();
            let prompt = template.render(&messages)?;
            let ids = tokenizer.rendered_prompt(&prompt).context("--prompt")?;
            (prompt, ids)
        }
        None if args.system.is_some() => {
            anyhow::bail!("--system: the model has no chat template with a place for it");
        }
        None => {
            let ids = tokenizer.prompt(&given).context("--prompt")?;
            (given, ids)
        }
    };
    let mut text = String::new();
    let mut failed = None;
    let show = !args.json.on_stdout();
    let generated = generator.generate(&ids, GenerateOptions { max_tokens, sampling }, &mut |new| {
        text += new;
        let mut stdout = std::io::stdout().lock();
        let written = match show {
            true => stdout.write_all(harmless(new).as_bytes()).and_then(|()| stdout.flush()),
            false => Ok(()),
        };
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failed = Some(e);
                ControlFlow::Break(())
            }
        }
    })?;
    match failed {
        // A reader that has enough, as `head` has, ends the text.
        Some(e) if e.kind() != std::io::ErrorKind::BrokenPipe => return Err(e).context("cannot write to stdout"),
        _ => {}
    }
    say(&format!("{}{}", if show { "\n" } else { "" }, summary(ids.len(), &generated)));
    let Generated { ids: tokens, finish, prompt_time, decode_time, decoded, cache_bytes } = generated;
    let report = Report {
        schema: "sparse24-generate/1",
        version: env!("CARGO_PKG_VERSION"),
        model: args.model.name.get().to_owned(),
        sparsity: model::sparsity_of(&forms),
        linear_layers: forms,
        dtype: args.model.dtype().to_string(),
        device: device.info().name().to_owned(),
        sampling: Draws { temperature, top_p, seed },
        prompt,
        prompt_tokens: ids.len(),
        text,
        tokens,
        finish: word(finish),
        cache_bytes,
        prompt_seconds: prompt_time.as_secs_f64(),
        decoded,
        decode_seconds: decode_time.as_secs_f64(),
    };
    args.json.emit("", &report)?;
    Ok(Outcome::Fine)
}

impl Args {
    /// The prompt, from stdin where it is `-`.
    fn prompt(&self) -> Result<String> {
        if self.prompt != DASH {
            return Ok(self.prompt.clone());
        }
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("--prompt: cannot read stdin")?;
        // The end of its last line is the shell's.
        text.truncate(text.trim_end_matches(['\n', '\r']).len());
        Ok(text)
    }
}

fn word(finish: Finish) -> &'static str {
    match finish {
        Finish::Eos => "eos",
        Finish::MaxTokens => "max_tokens",
        Finish::Context => "context",
        Finish::Stopped => "stopped",
    }
}

/// How fast it was, and why it ended.
fn summary(prompt: usize, generated: &Generated) -> String {
    let per_second = |tokens: usize, time: std::time::Duration| match tokens {
        0 => "—".to_owned(),
        tokens => format!("{:.1} tokens/s", tokens as f64 / time.as_secs_f64()),
    };
    let &Generated { ref ids, finish, prompt_time, decode_time, decoded, .. } = generated;
    let why = match finish {
        Finish::Eos => "the model ended it",
        Finish::MaxTokens => "as many as --max-tokens says",
        Finish::Context => "the model takes no more",
        Finish::Stopped => "it was stopped",
    };
    format!(
        "prompt: {prompt} tokens, {}; decode: {decoded} passes, {}; {} new tokens: {why}",
        per_second(prompt, prompt_time),
        per_second(decoded, decode_time),
        ids.len()
    )
}
