//! What `eval` reads: rows of CSV files, and lines of text.
//!
//! Invariant: a row of a CSV file counts in full or reading fails; a line of text that is left out is counted.

use std::collections::BTreeSet;
use std::io::Read;

use anyhow::{Result, anyhow, bail, ensure};

use crate::cli::args;

/// Two sentences, and how similar they are to people.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::cli) struct Pairs {
    pub(in crate::cli) sentences: Vec<String>,
    pub(in crate::cli) scores: Vec<f64>,
    /// The line on which each pair starts.
    pub(super) lines: Vec<usize>,
}

impl Pairs {
    /// Errors name the line on which a row starts.
    pub(in crate::cli) fn parse(mut from: impl Read) -> Result<Self> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes)?;
        let mut pairs = Self { sentences: Vec::new(), scores: Vec::new(), lines: Vec::new() };
        let mut first = true;
        rows(bytes, ["sentence", "sentence", "score"], |line, [a, b, score]| {
            match score.trim().parse::<f64>() {
                Ok(score) if score.is_finite() => {
                    pairs.sentences.extend([a.to_owned(), b.to_owned()]);
                    pairs.scores.push(score);
                    pairs.lines.push(line);
                }
                Err(_) if first => {}
                _ => bail!("line {line}: the score {score:?} is not a finite number"),
            }
            first = false;
            Ok(())
        })?;
        let count = pairs.scores.len();
        ensure!(count >= 2, "{count} {} too few for a correlation", if count == 1 { "pair is" } else { "pairs are" });
        Ok(pairs)
    }
}

/// Texts, each of a class.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Labelled {
    pub(super) texts: Vec<String>,
    /// The class of each, by its place in `classes`.
    pub(super) labels: Vec<usize>,
    /// In the order of their names.
    pub(super) classes: Vec<String>,
    pub(super) lines: Vec<usize>,
}

impl Labelled {
    /// Texts of at least two classes, each of at least two texts: one to fit a classifier to, and one to try it on.
    pub(super) fn parse(bytes: Vec<u8>) -> Result<Self> {
        let (texts, labels, lines) = labelled(bytes)?;
        let classes: Vec<String> = labels.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        match &classes[..] {
            [] => bail!("has no texts"),
            [one] => bail!("all texts are of the class {one:?}: there is nothing to tell apart"),
            _ => {}
        }
        if let Some(alone) = classes.iter().find(|class| labels.iter().filter(|label| label == class).count() == 1) {
            bail!("the class {alone:?} has one text: two are needed, to learn it from one and try it on the other");
        }
        let labels = labels.iter().filter_map(|label| classes.binary_search(label).ok()).collect();
        Ok(Self { texts, labels, classes, lines })
    }

    /// Texts of classes that are known. An error names the line with another.
    pub(super) fn parse_of(bytes: Vec<u8>, classes: &[String]) -> Result<Self> {
        let (texts, labels, lines) = labelled(bytes)?;
        ensure!(!texts.is_empty(), "has no texts");
        let label = |(label, line): (&String, &usize)| {
            let known = classes.binary_search(label);
            known.map_err(|_| anyhow!("line {line}: no text that is learned from has the label {label:?}"))
        };
        let labels = labels.iter().zip(&lines).map(label).collect::<Result<_>>()?;
        Ok(Self { texts, labels, classes: classes.to_vec(), lines })
    }
}

/// Texts, labels and the lines on which their rows start.
fn labelled(bytes: Vec<u8>) -> Result<(Vec<String>, Vec<String>, Vec<usize>)> {
    let (mut texts, mut labels, mut lines) = (Vec::new(), Vec::new(), Vec::new());
    let mut first = true;
    rows(bytes, ["text", "label"], |line, [text, label]| {
        let label = label.trim();
        ensure!(!label.is_empty(), "line {line}: the label is empty");
        if !(first && label.eq_ignore_ascii_case("label")) {
            texts.push(text.to_owned());
            labels.push(label.to_owned());
            lines.push(line);
        }
        first = false;
        Ok(())
    })?;
    Ok((texts, labels, lines))
}

/// A line that has fewer words is a title or a caption.
pub(super) const MIN_WORDS: usize = 5;

/// Lines of running text.
pub(super) struct Lines {
    pub(super) texts: Vec<String>,
    /// The number of each line.
    pub(super) lines: Vec<usize>,
    /// Lines that are not blank and not among them.
    pub(super) left_out: usize,
}

impl Lines {
    /// Lines that do not begin with `=`, as WikiText's headings do, and have at least [`MIN_WORDS`] words, which are
    /// what blanks part and has a letter.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut found = Self { texts: Vec::new(), lines: Vec::new(), left_out: 0 };
        for (at, line) in args::lines(bytes)?.iter().enumerate() {
            let line = line.trim();
            let words = line.split_whitespace().filter(|word| word.contains(char::is_alphabetic)).count();
            if !line.starts_with('=') && words >= MIN_WORDS {
                found.texts.push(line.to_owned());
                found.lines.push(at + 1);
            } else if !line.is_empty() {
                found.left_out += 1;
            }
        }
        ensure!(!found.texts.is_empty(), "has no line of {MIN_WORDS} words or more");
        Ok(found)
    }
}

/// Hands the first N columns of every row to `row`, with the line on which it starts. Errors name that line; `columns`
/// is what they say is wanted.
fn rows<const N: usize>(
    mut bytes: Vec<u8>,
    columns: [&str; N],
    mut row: impl FnMut(usize, [&str; N]) -> Result<()>,
) -> Result<()> {
    // A row after the last one, which that swallows if its quotes are open.
    const END: &[u8] = b"end";
    bytes.push(b'\n');
    bytes.extend_from_slice(END);
    // Flexible: the library's own error about a row's length does not say what is wanted.
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(&bytes[..]);
    let mut record = csv::ByteRecord::new();
    let (mut line, mut counted) = (1, 0);
    while reader.read_byte_record(&mut record)? {
        // The library counts no lines that are blank or end in two characters.
        let at = record.position().map_or(0, |position| position.byte() as usize);
        let is_end = |byte: &&u8| matches!(byte, b'\r' | b'\n');
        let at = at + bytes[at..].iter().take_while(is_end).count();
        line += ends(&bytes[counted..at]);
        counted = at;
        if reader.position().byte() as usize == bytes.len() {
            ensure!(record.iter().eq([END]), "line {line}: quotes are opened in this row and not closed");
            break;
        }
        if let Some(column) = record.iter().skip(N).position(|field| field.iter().any(|byte| is_end(&byte))) {
            bail!("line {line}: column {} goes on to another line, as if its quotes were not closed", column + N + 1);
        }
        let few = match record.len() {
            1 => "1 column".to_owned(),
            few => format!("{few} columns"),
        };
        ensure!(record.len() >= N, "line {line} has {few}, expected {}", columns.join(", "));
        let mut fields = [""; N];
        for (column, field) in fields.iter_mut().enumerate() {
            let text = std::str::from_utf8(&record[column]);
            *field = text.map_err(|_| anyhow!("line {line}: column {} is not UTF-8", column + 1))?;
        }
        row(line, fields)?;
    }
    Ok(())
}

/// Ends of lines in a text: `\n`, `\r\n`, or `\r` alone.
fn ends(text: &[u8]) -> usize {
    let after = text.iter().skip(1).map(Some).chain([None]);
    text.iter().zip(after).filter(|&(byte, after)| *byte == b'\n' || *byte == b'\r' && after != Some(&b'\n')).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_in_full_or_refused_with_their_line() {
        let parse = |text: &str| Pairs::parse(text.as_bytes()).map_err(|e| format!("{e:#}"));
        let pairs = parse("a,\"b, \"\"c\"\"\nd\",1\ne,f, 2.5 ,more\n");
        let sentences = ["a", "b, \"c\"\nd", "e", "f"].map(String::from).to_vec();
        assert_eq!(pairs, Ok(Pairs { sentences, scores: vec![1.0, 2.5], lines: vec![1, 3] }));
        assert_eq!(parse("s,t,score\na,b,1\nc,d,2\n").map(|p| p.scores), Ok(vec![1.0, 2.0]));
        for (text, error) in [
            ("a,\"b\nb\",1\nc,d\n", "line 3 has 2 columns, expected sentence, sentence, score"),
            ("a,b,1\nc,d,x\n", "line 2: the score \"x\" is not a finite number"),
            ("a,b,nan\nc,d,1\n", "line 1: the score \"nan\" is not a finite number"),
            ("s,t,score\na,b,1\n", "1 pair is too few for a correlation"),
            ("", "0 pairs are too few for a correlation"),
            ("a,\u{e9},1\n", "1 pair is too few for a correlation"),
            // Quotes that swallow rows, in a column that counts and in one that does not, closed by chance or not.
            ("a b,c d,1,\ncat,d,2\ne,f,3,\"x\ng,h,4\n", "line 3: quotes are opened in this row and not closed"),
            ("a,b,1\nc,\"d,2\ne,f,3", "line 2: quotes are opened in this row and not closed"),
            ("a,b,1\nc,d,2\n\"", "line 3: quotes are opened in this row and not closed"),
            (
                "a,b,1\nc,d,2,x,\"y\ne,f,3\ng,h,4,\"\ni,j,5\n",
                "line 2: column 5 goes on to another line, as if its quotes were not closed",
            ),
        ] {
            assert_eq!(parse(text), Err(error.to_owned()), "{text:?}");
        }
        // Rows are counted by the file's lines, whichever end these have.
        let lines = |text: &str| parse(text).map(|p| p.lines);
        assert_eq!(lines("s,t,n\r\na,b,1\r\n\r\n\r\n\"c\r\nc\",d,2\r\ne,f,3"), Ok(vec![2, 5, 7]));
        assert_eq!(lines("\n\n\na,b,1\n\n\nc,d,2\n"), Ok(vec![4, 7]));
        assert_eq!(lines("a,b,1\rc,d,2\r\re,f,3\r"), Ok(vec![1, 2, 4]));
        assert_eq!(lines("\u{feff}a,b,1\nc,d,2"), Ok(vec![1, 2]));
        let latin1 = Pairs::parse(&b"a,b,1\r\n\r\nc,d\xff,2"[..]).map_err(|e| format!("{e:#}"));
        assert_eq!(latin1, Err("line 3: column 2 is not UTF-8".to_owned()));
        assert!(parse("a,b,1\nc,d,2\n").is_ok());
    }

    #[test]
    fn texts_have_labels_of_two_classes_or_more() {
        let parse = |text: &str| Labelled::parse(text.into()).map_err(|e| format!("{e:#}"));
        let found =
            parse("text,Label\n\"a, b\",y\nc, x ,more\nd,x\ne,y\n").map(|l| (l.texts, l.labels, l.classes, l.lines));
        let strings = |all: &[&str]| all.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
        let expected = (strings(&["a, b", "c", "d", "e"]), vec![1, 0, 0, 1], strings(&["x", "y"]), vec![2, 3, 4, 5]);
        assert_eq!(found, Ok(expected));
        for (text, error) in [
            ("", "has no texts"),
            ("text,label\n", "has no texts"),
            ("a,x\nb,x\n", "all texts are of the class \"x\": there is nothing to tell apart"),
            ("a,x\nb\n", "line 2 has 1 column, expected text, label"),
            ("a,x\nb, \n", "line 2: the label is empty"),
            (
                "a,x\nb,x\nc,y\n",
                "the class \"y\" has one text: two are needed, to learn it from one and try it on the other",
            ),
        ] {
            assert_eq!(parse(text), Err(error.to_owned()), "{text:?}");
        }
        let of = |text: &str| Labelled::parse_of(text.into(), &strings(&["x", "y"])).map_err(|e| format!("{e:#}"));
        assert_eq!(of("a,y\n").map(|l| l.labels), Ok(vec![1]));
        assert_eq!(of("a,y\nb,z\n"), Err("line 2: no text that is learned from has the label \"z\"".to_owned()));
        assert_eq!(of(""), Err("has no texts".to_owned()));
    }

    #[test]
    fn headings_and_short_lines_are_left_out() {
        let text = "\n = A title of more than five words = \n\n one two , three four 5 five \none two three four , 5\n";
        let found = Lines::parse(text.as_bytes()).map(|l| (l.texts, l.lines, l.left_out)).map_err(|e| e.to_string());
        assert_eq!(found, Ok((vec!["one two , three four 5 five".to_owned()], vec![4], 2)));
        let none = Lines::parse(b"one two three four\n").map(|_| ()).map_err(|e| e.to_string());
        assert_eq!(none, Err("has no line of 5 words or more".to_owned()));
    }
}
