//! `sparse24 devices`.

use anyhow::Result;

use super::Outcome;

/// List devices.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<Outcome> {
    Ok(Outcome::Fine)
}
