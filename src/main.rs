//! The `sparse24` binary: parses the command line, runs it, and turns its result into an exit code.

mod cli;

use std::process::ExitCode;

use cli::Outcome;

fn main() -> ExitCode {
    match cli::run() {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::VerificationFailed | Outcome::Slower) => ExitCode::from(3),
        Err(e) => {
            cli::say(&format!("error: {e:#}"));
            if e.is::<cli::Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
