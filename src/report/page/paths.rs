//! Text of files as the page shows it: without the folders of whoever made them.
//!
//! Commands and names of models hold paths, and absolute ones tell a user's name and what else lies on a machine, in a
//! page that is made to be passed on. Invariant: of a path that is absolute, or climbs out of the folder that it starts
//! from, nothing but its last part is shown, and of a home folder `~`.

/// `text` with its paths shortened. What only looks like one, such as `16/2` or a URL, stays as it is.
pub(super) fn shown(text: &str) -> String {
    let mut short = String::new();
    let mut rest = text;
    // A path begins a word, or follows what joins words to options and to each other.
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let length = if joins(before) { path_length(rest, before) } else { 0 };
        if length > 0 {
            let (path, after) = rest.split_at(length);
            short += &last_part(path);
            before = 'x';
            rest = after;
        } else {
            short.push(c);
            before = c;
            rest = &rest[c.len_utf8()..];
        }
    }
    short
}

/// Whether a path can begin behind this.
fn joins(c: char) -> bool {
    c.is_whitespace() || "='\"`,;:([{<>|@".contains(c)
}

fn is_separator(c: char) -> bool {
    c == '/' || c == '\\'
}

/// How many bytes of `text`, which stands behind `before`, are a path that must be shortened.
fn path_length(text: &str, before: char) -> usize {
    let bytes = text.as_bytes();
    let drive = bytes.len() > 2 && bytes[0].is_ascii_alphabetic() && bytes[1] == b':' && is_separator(bytes[2].into());
    let file_url = text.starts_with("file:/");
    let absolute = text.starts_with('/') || text.starts_with("\\\\") || drive || file_url;
    // `https://`: its colon stands before a path, too.
    if before == ':' && text.starts_with("//") {
        return 0;
    }
    // A quoted word ends with its quote, another with a space that no backslash stands before.
    let quote = Some(before).filter(|c| "'\"`".contains(*c));
    let mut escaped = false;
    let end = text.char_indices().find(|&(at, c)| {
        let ends = match quote {
            Some(quote) => c == quote,
            None => {
                let next = &text[at + c.len_utf8()..];
                let in_list =
                    ",;:".contains(c) && at > 1 && !file_url && (next.starts_with('/') || next.starts_with('~'));
                (c.is_whitespace() && !escaped) || "'\"`)]}<>|".contains(c) || in_list
            }
        };
        escaped = c == '\\' && !drive;
        ends
    });
    let path = &text[..end.map_or(text.len(), |(at, _)| at)];
    let climbs = || path.split(is_separator).any(|part| part == "..") && path.contains(is_separator);
    let home = path.starts_with('~') && path.contains(is_separator);
    // A lone slash is none, nor is a number behind one.
    let named = path.chars().any(|c| !is_separator(c) && c != '.');
    if named && (absolute || home || climbs()) { path.len() } else { 0 }
}

/// The last part of a path; `~` for a home folder itself, whose name is its user's.
fn last_part(path: &str) -> String {
    let mut parts: Vec<&str> = path.split(is_separator).filter(|part| !part.is_empty()).collect();
    let last = parts.pop().unwrap_or_default();
    let home = parts.last().is_some_and(|folder| ["home", "users"].contains(&folder.to_ascii_lowercase().as_str()));
    let roots = path.starts_with("/root") && last == "root";
    if home || roots || last.starts_with('~') || last == ".." { "~".to_owned() } else { last.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_path_that_tells_of_its_machine_the_last_part_is_left() {
        let cases = [
            ("sparse24 bench --json run.json", "sparse24 bench --json run.json"),
            ("sparse24 bench --json /home/alice/runs/run.json", "sparse24 bench --json run.json"),
            ("sparse24 bench --json=/home/alice/run.json --quick", "sparse24 bench --json=run.json --quick"),
            ("sparse24 report before=/tmp/a.json /tmp/b.json", "sparse24 report before=a.json b.json"),
            ("sparse24 eval --model '/home/al ice/my model/' --pairs x", "sparse24 eval --model 'my model' --pairs x"),
            ("sparse24 eval --model \"/home/al ice/m\" -", "sparse24 eval --model \"m\" -"),
            (r"embed --model /home/al\ ice/m --text a", "embed --model m --text a"),
            (
                "HF_HOME=/home/alice/hf /usr/bin/python3 benches/peers/numpy.py",
                "HF_HOME=hf python3 benches/peers/numpy.py",
            ),
            ("prune ~/models/minilm out", "prune minilm out"),
            ("prune ~alice/minilm out", "prune minilm out"),
            ("prune ../../home/alice/minilm out/v32", "prune minilm out/v32"),
            (r"prune C:\Users\alice\minilm D:/models/out", "prune minilm out"),
            (r"prune \\server\share\minilm", "prune minilm"),
            ("open file:///home/alice/a.html", "open a.html"),
            ("--cache /home/alice", "--cache ~"),
            ("--cache /Users/alice/", "--cache ~"),
            ("--cache /root", "--cache ~"),
            ("--cache '/home/alice'", "--cache '~'"),
            ("PATH=/home/alice/bin:/usr/bin x", "PATH=bin:bin x"),
            ("a,/home/alice/b.json,/home/bob/c.json", "a,b.json,c.json"),
            ("cannot open (/home/alice/x.json): No such file", "cannot open (x.json): No such file"),
            // These are no paths.
            ("https://example.com/a/b", "https://example.com/a/b"),
            ("kernel 64x64x16/2, 3 / 4, a / b", "kernel 64x64x16/2, 3 / 4, a / b"),
            (
                "model/minilm of sentence-transformers/all-MiniLM-L6-v2",
                "model/minilm of sentence-transformers/all-MiniLM-L6-v2",
            ),
            (
                "--filter 'encoder.*dense' --ops dense,sparse24 ...",
                "--filter 'encoder.*dense' --ops dense,sparse24 ...",
            ),
            ("Mesa 22.3.6 (LLVM 15.0.6) ~ .. /", "Mesa 22.3.6 (LLVM 15.0.6) ~ .. /"),
            ("", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(shown(text), expected, "{text}");
        }
    }
}
