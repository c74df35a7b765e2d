//! Embeddings of texts by a pruned BERT, from a folder of Hugging Face's.
//!
//! `bash tests/fetch-minilm.sh model/minilm && cargo run --release --example bert`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use sparse24::graph::{Batching, Sparsity};
use sparse24::text::{Encoder, Files, LoadOptions, TextModel};
use sparse24::{Device, VectorLen};

pub(crate) fn main() -> sparse24::Result<()> {
    similarity(&std::env::args().nth(1).unwrap_or_else(|| "model/minilm".into())).map(drop)
}

pub(crate) fn similarity(folder: &str) -> sparse24::Result<f64> {
    let mut model = TextModel::load(&Files::in_folder(folder), LoadOptions::default())?;
    model.checkpoint.prune(Sparsity::TwoFour(VectorLen::ONE))?; // by magnitude; prune:: has better
    let encoder = Encoder::new(&Device::auto()?, &model.checkpoint, model.pipeline)?;
    let tokens = model.tokenizer.encode(&["The cat sat on the mat.", "A cat was sitting on a rug."])?;
    let embeddings = encoder.embed(&tokens.ids, Batching::default())?.elements().to_f32();
    let (a, b) = embeddings.split_at(encoder.width());
    let similarity = model.similarity.of(a, b);
    println!("{} of the two texts: {similarity:.3}", model.similarity.name());
    Ok(similarity)
}
