//! A table for people, and what stands above and below it, as text or as Markdown.
//!
//! Invariants: as text without `wide` no line is longer than [`WIDTH`], as long as the cells of a row are not; what is
//! shown holds no control characters, whatever the names in a file.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use crate::error::printable;

/// Columns of a terminal that text fits.
pub const WIDTH: usize = 100;

/// Where a column is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Always.
    Always,
    /// Only without `--wide`.
    Narrow,
    /// Only with `--wide`.
    Wide,
}

#[derive(Clone, Debug)]
struct Column {
    name: String,
    alignment: CellAlignment,
    shown: Shown,
}

/// The table. Rows are in groups, such as those of one layer.
#[derive(Clone, Debug)]
pub struct Sheet {
    group: &'static str,
    columns: Vec<Column>,
    rows: Vec<(String, Vec<String>)>,
}

impl Sheet {
    /// A table without columns or rows, whose groups are called this.
    pub fn new(group: &'static str) -> Self {
        Self { group, columns: Vec::new(), rows: Vec::new() }
    }

    /// One more column, of words.
    pub fn words(self, name: &str, shown: Shown) -> Self {
        self.column(name, CellAlignment::Left, shown)
    }

    /// One more column, of numbers.
    pub fn numbers(self, name: &str, shown: Shown) -> Self {
        self.column(name, CellAlignment::Right, shown)
    }

    fn column(mut self, name: &str, alignment: CellAlignment, shown: Shown) -> Self {
        self.columns.push(Column { name: name.to_owned(), alignment, shown });
        self
    }

    /// One more row, with a cell for every column, shown or not. The group may have no name.
    pub fn push<const N: usize>(&mut self, group: &str, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len());
        let cells = cells.iter().map(|cell| printable(cell).into_owned());
        self.rows.push((printable(group).into_owned(), cells.collect()));
    }

    fn shown(&self, wide: bool) -> Vec<usize> {
        let hidden = if wide { Shown::Narrow } else { Shown::Wide };
        (0..self.columns.len()).filter(|&at| self.columns[at].shown != hidden).collect()
    }

    /// Whether a group has a name.
    fn grouped(&self) -> bool {
        self.rows.iter().any(|(group, _)| !group.is_empty())
    }

    /// The group of a row if it is another than the last row's.
    fn heading(&self, row: usize) -> Option<&str> {
        let group = &self.rows[row].0;
        (row == 0 || self.rows[row - 1].0 != *group).then_some(group)
    }

    /// As text: the group of rows on a line above them, or with `wide` in a column of its own.
    pub(super) fn text(&self, wide: bool) -> String {
        // Models have neither layers nor shapes.
        let has_cells = |at: &usize| self.rows.is_empty() || self.rows.iter().any(|(_, cells)| !cells[*at].is_empty());
        let columns: Vec<_> = self.shown(wide).into_iter().filter(has_cells).collect();
        let own_column = wide && self.grouped();
        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
        let row = |group: &str, cell: &dyn Fn(usize) -> String| {
            own_column
                .then(|| group.to_owned())
                .into_iter()
                .chain(columns.iter().map(|&at| cell(at)))
                .collect::<Vec<_>>()
        };
        table.set_header(row(self.group, &|at| self.columns[at].name.clone()));
        for (at, (_, cells)) in self.rows.iter().enumerate() {
            table.add_row(row(self.heading(at).unwrap_or_default(), &|at| cells[at].clone()));
        }
        for (place, &at) in columns.iter().enumerate() {
            if let Some(column) = table.column_mut(place + usize::from(own_column)) {
                column.set_cell_alignment(self.columns[at].alignment);
            }
        }
        let mut text = String::new();
        for (at, line) in table.trim_fmt().lines().enumerate() {
            // Two lines of headings come first.
            let heading = at.checked_sub(2).and_then(|row| self.heading(row));
            if let Some(group) = heading.filter(|_| !wide && self.grouped()) {
                let _ = writeln!(text, "{}", shortened(group, WIDTH));
            }
            let _ = writeln!(text, "{}", line.strip_prefix(' ').unwrap_or(line));
        }
        text
    }

    /// As a Markdown table, with the group in a column of its own.
    fn markdown(&self, wide: bool) -> String {
        let columns = self.shown(wide);
        let grouped = self.grouped();
        let row = |group: &str, cell: &dyn Fn(usize) -> String| -> Vec<String> {
            let cells = grouped.then(|| group.to_owned()).into_iter().chain(columns.iter().map(|&at| cell(at)));
            cells.map(|cell| cell.replace('\\', "\\\\").replace('|', "\\|")).collect()
        };
        let mut rows = vec![row(self.group, &|at| self.columns[at].name.clone())];
        rows.extend(self.rows.iter().map(|(group, cells)| row(group, &|at| cells[at].clone())));
        let left = |place: usize| {
            let at = place.checked_sub(usize::from(grouped)).map(|place| columns[place]);
            at.is_none_or(|at| self.columns[at].alignment == CellAlignment::Left)
        };
        let chars = |cell: &String| cell.chars().count();
        let widths: Vec<_> =
            (0..rows[0].len()).map(|c| rows.iter().map(|r| chars(&r[c])).max().unwrap_or(0).max(3)).collect();
        let mut text = String::new();
        for (at, row) in rows.iter().enumerate() {
            for (place, cell) in row.iter().enumerate() {
                let width = widths[place];
                let _ = if left(place) { write!(text, "| {cell:<width$} ") } else { write!(text, "| {cell:>width$} ") };
            }
            text.push_str("|\n");
            if at == 0 {
                for (place, width) in widths.iter().enumerate() {
                    let dashes = "-".repeat(width - 1);
                    let _ = if left(place) { write!(text, "| {dashes}- ") } else { write!(text, "| {dashes}: ") };
                }
                text.push_str("|\n");
            }
        }
        text
    }
}

/// A table and what is said about it, a paragraph to an item.
#[derive(Clone, Debug)]
pub struct Printout {
    /// What was measured, on what.
    pub head: Vec<String>,
    /// The figures.
    pub sheet: Sheet,
    /// What the figures come to.
    pub notes: Vec<String>,
    /// Notes about columns that only `wide` shows.
    pub wide_notes: Vec<String>,
    /// What the columns mean.
    pub legend: Vec<String>,
    /// Where the program and the figures come from: in what is pasted elsewhere, not on the terminal of who just ran
    /// it.
    pub source: String,
}

impl Printout {
    /// The page as text, of lines that fit [`WIDTH`] unless `wide`.
    pub fn text(&self, wide: bool, legend: bool) -> String {
        let mut text: String = self.head.iter().map(|line| wrapped(line)).collect();
        let _ = writeln!(text, "\n{}", self.sheet.text(wide));
        let wide_notes = self.wide_notes.iter().filter(|_| wide);
        wide_notes.chain(&self.notes).for_each(|note| text += &wrapped(note));
        if legend {
            text.push('\n');
            self.legend.iter().for_each(|line| text += &wrapped(line));
        } else {
            let hides = self.sheet.shown(true) != self.sheet.shown(false);
            let more = if wide || !hides { "" } else { ", --wide shows more of them" };
            let _ = writeln!(text, "--legend explains the columns{more}");
        }
        text
    }

    /// The page as Markdown, the table first.
    pub fn markdown(&self, wide: bool, legend: bool) -> String {
        let mut text = self.sheet.markdown(wide);
        let wide_notes = self.wide_notes.iter().filter(|_| wide);
        let legend = self.legend.iter().filter(|_| legend);
        for line in self.head.iter().chain(Some(&self.source)).chain(wide_notes).chain(&self.notes).chain(legend) {
            let _ = writeln!(text, "\n{}", printable(line));
        }
        text
    }
}

/// The beginning and the end of a name that is too long.
fn shortened(name: &str, width: usize) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= width {
        return name.to_owned();
    }
    let head = (width - 1) / 2;
    let tail = width - 1 - head;
    chars[..head].iter().chain(&['…']).chain(&chars[chars.len() - tail..]).collect()
}

/// A paragraph in lines of at most [`WIDTH`], those after the first one indented. A longer word has a line of its own.
pub(super) fn wrapped(paragraph: &str) -> String {
    let mut text = String::new();
    let mut width = 0;
    for word in printable(paragraph).split(' ') {
        let chars = word.chars().count();
        if width > 0 && width + 1 + chars > WIDTH {
            text.push_str("\n ");
            width = 1;
        }
        if width > 0 {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += chars;
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(names: &[&str]) -> Printout {
        let mut sheet = Sheet::new("layer")
            .words("shape", Shown::Always)
            .numbers("ms", Shown::Narrow)
            .numbers("milliseconds", Shown::Wide)
            .words("kernel", Shown::Wide);
        for name in names {
            sheet.push(name, ["1x2".into(), "3".into(), "3.0".into(), "a|b".into()]);
        }
        let line = |text: &str| vec![text.to_owned()];
        let (head, notes) = (line("on a device"), line("a note"));
        Printout { head, sheet, notes, wide_notes: line("of wide"), legend: line("ms: time"), source: "build".into() }
    }

    #[test]
    fn groups_stand_above_their_rows_or_beside_the_first() {
        let page = page(&["a", "a", "b"]);
        let narrow = "on a device\n\nshape   ms\n------------\na\n1x2      3\n1x2      3\nb\n1x2      3\n\n\
                      a note\n--legend explains the columns, --wide shows more of them\n";
        assert_eq!(page.text(false, false), narrow);
        let wide = page.text(true, true);
        assert!(wide.contains("layer   shape   milliseconds   kernel\n") && wide.contains("\na       1x2"), "{wide}");
        assert!(wide.ends_with("of wide\na note\n\nms: time\n"), "{wide}");
        // Without names there are no groups.
        let unnamed = super::tests::page(&["", ""]);
        assert!(unnamed.text(false, false).contains("\n1x2      3\n1x2      3\n"));
        assert!(!unnamed.text(true, false).contains("layer") && !unnamed.markdown(false, false).contains("layer"));
    }

    #[test]
    fn markdown_is_a_table_that_pastes() {
        let text = page(&["a", "|"]).markdown(true, false);
        let lines: Vec<_> = text.lines().take(4).collect();
        assert_eq!(
            lines,
            [
                "| layer | shape | milliseconds | kernel |",
                "| ----- | ----- | -----------: | ------ |",
                "| a     | 1x2   |          3.0 | a\\|b   |",
                "| \\|    | 1x2   |          3.0 | a\\|b   |",
            ]
        );
        assert!(text.ends_with("\non a device\n\nbuild\n\nof wide\n\na note\n"), "{text}");
    }

    #[test]
    fn no_line_is_too_long_and_no_name_commands_the_terminal() {
        let long = "encoder.".repeat(40);
        let mut page = page(&[&long, "\u{1b}[31mred\u{7}"]);
        page.head = vec!["word ".repeat(60), "name\u{1b}]0;x".into()];
        let text = page.text(false, true);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.contains("…") && text.contains("\\u{1b}[31mred\\u{7}"), "{text}");
        for text in [text, page.text(true, true), page.markdown(true, true)] {
            assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{text:?}");
        }
    }
}
