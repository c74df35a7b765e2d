//! `sparse24 inspect`.

use anyhow::Result;

use super::Outcome;

/// List inspect.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<Outcome> {
    Ok(Outcome::Fine)
}
