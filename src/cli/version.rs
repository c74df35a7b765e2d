//! `sparse24 --version`: what a report of a fault has to say about the program and the processor that it ran on.

use sparse24::report::commit;
use sparse24::simd::SimdLevel;

/// Cargo features that the binary was built with, by name.
const FEATURES: [(&str, bool); 5] = [
    ("avx512", cfg!(feature = "avx512")),
    ("cli", cfg!(feature = "cli")),
    ("compile", cfg!(feature = "compile")),
    ("hub", cfg!(feature = "hub")),
    ("text", cfg!(feature = "text")),
];

/// No crate tells its version at run time, and wgpu's decides which shaders a driver gets.
const LOCK: &str = include_str!("../../Cargo.lock");

/// The version, commit, features, SIMD level of this machine, and the version of wgpu: a line each.
pub(super) fn long() -> String {
    let commit = commit().unwrap_or_else(|| "unknown".into());
    let features: Vec<_> = FEATURES.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    let simd = SimdLevel::ALL.into_iter().rfind(|level| level.is_supported()).unwrap_or(SimdLevel::Scalar);
    format!(
        "sparse24 {}\n\
         commit:   {commit}\n\
         features: {}\n\
         SIMD:     {simd}, the widest of this machine\n\
         wgpu:     {} in Cargo.lock\n\
         target:   {} {}\n",
        env!("CARGO_PKG_VERSION"),
        features.join(", "),
        locked("wgpu").unwrap_or("unknown"),
        std::env::consts::ARCH,
        std::env::consts::OS,
    )
}

/// The version of a crate in `Cargo.lock`.
fn locked(name: &str) -> Option<&'static str> {
    let after = LOCK.split(&format!("name = \"{name}\"\nversion = \"")).nth(1)?;
    after.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_come_from_the_lock() {
        assert_eq!(locked("sparse24"), Some(env!("CARGO_PKG_VERSION")));
        assert!(locked("wgpu").is_some_and(|version| version.starts_with("30.")));
        assert_eq!(locked("wgp"), None);
    }
}
