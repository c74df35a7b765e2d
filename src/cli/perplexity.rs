//! `sparse24 perplexity`: how well a language model predicts a text.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::{Json, name_of, whole_text};
use super::command::command_line;
use super::language::{Language, LanguageArgs};
use super::sensitivity::identity_of;
use super::{Outcome, model, progress};
use sparse24::io::Provenance;
use sparse24::report::Environment;

/// Say how well a language model predicts a text: its perplexity, dense or 2:4.
///
/// The file is tokenised as a whole, without special tokens, and cut into windows of --context tokens side by side. In
/// each window every token but the first is predicted from those before it; the perplexity is the exponential of the
/// mean negative logarithm of the probabilities. A last window of fewer tokens is left out.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  sparse24 perplexity --model model/smollm2 --text wikitext2-valid.txt --windows 40
  sparse24 perplexity model/smollm2 --text wikitext2-valid.txt --sparsity 2:4")]
pub(crate) struct Args {
    #[command(flatten)]
    model: LanguageArgs,
    /// Text file, UTF-8 (`-` is stdin).
    #[arg(long, value_name = "FILE|-")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,
    /// The most windows; all that the text has unless given.
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    #[command(flatten)]
    json: Json,
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    environment: Environment,
    model: String,
    weights: Option<String>,
    sparsity: String,
    linear_layers: Vec<model::Form>,
    /// What the weights' file says of how they were made.
    provenance: Provenance,
    dtype: String,
    device: String,
    text: String,
    /// Tells the text from others.
    text_identity: String,
    tokens_in_text: usize,
    context: usize,
    windows: usize,
    perplexity: f64,
    mean_loss: f64,
    /// Of the mean over windows.
    standard_error: f64,
    window_losses: Vec<f64>,
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    args.model.check()?;
    args.json.file()?;
    let (text, name) = (whole_text(&args.text)?, name_of(&args.text));
    let Language { device, generator, forms, provenance, .. } = args.model.open()?;
    let environment = Environment::unsampled(&device, command_line());
    let ids = generator.tokenizer().long_text(&text).with_context(|| name.clone())?;
    let most = args.windows.unwrap_or(usize::MAX);
    let bar = progress((ids.len() / args.context.max(1)).min(most));
    let started = Instant::now();
    let perplexity =
        generator.perplexity(&ids, args.context, most, &mut |_| bar.inc(1)).with_context(|| name.clone())?;
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let report = Report {
        schema: "sparse24-perplexity/1",
        version: env!("CARGO_PKG_VERSION"),
        environment,
        model: args.model.name.get().to_owned(),
        weights: args.model.weights.as_ref().map(|path| path.display().to_string()),
        sparsity: model::sparsity_of(&forms),
        linear_layers: forms,
        provenance,
        dtype: args.model.dtype().to_string(),
        device: device.info().name().to_owned(),
        text: name,
        text_identity: identity_of(text.as_bytes()),
        tokens_in_text: ids.len(),
        context: args.context,
        windows: perplexity.window_losses.len(),
        perplexity: perplexity.value(),
        mean_loss: perplexity.mean_loss(),
        standard_error: perplexity.standard_error(),
        window_losses: perplexity.window_losses,
        seconds,
    };
    args.json.emit(&report.text(), &report)?;
    Ok(Outcome::Fine)
}

impl Report {
    fn text(&self) -> String {
        let Self { windows, context, tokens_in_text, seconds, mean_loss, standard_error: error, .. } = self;
        let of = |loss: f64| loss.exp();
        format!(
            "{}, {}, on {}\n{}{}: perplexity {:.3} (one standard error of the windows: {:.3} to {:.3}) over {windows} \
             windows of {context} tokens, of {tokens_in_text} tokens in all\n{:.0} tokens/s\n",
            self.model,
            self.dtype,
            self.device,
            model::about(&self.linear_layers, &self.provenance),
            self.text,
            self.perplexity,
            of(mean_loss - error),
            of(mean_loss + error),
            (windows * context) as f64 / seconds,
        )
    }
}
