//! Commands as text, which results carry so that they can be measured again.

/// The command that runs.
pub(super) fn command_line() -> String {
    let given: Vec<_> = std::env::args_os().skip(1).map(|a| quoted(&a.to_string_lossy())).collect();
    if given.is_empty() { "sparse24 bench".into() } else { format!("sparse24 {}", given.join(" ")) }
}

/// A word as a POSIX shell takes it.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
