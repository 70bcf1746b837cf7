//! Tables that align, for people.

use std::fmt::Write as _;

/// Rows of text under headings; numbers are right-aligned where a column is made so.
pub(crate) struct Table {
    headings: Vec<&'static str>,
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Headings; one that begins with `>` is right-aligned.
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        Self {
            headings: headings.iter().map(|h| h.trim_start_matches('>')).collect(),
            right: headings.iter().map(|h| h.starts_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row of as many cells as there are headings; an empty cell shows as `-`.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.headings.len());
        self.rows.push(cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }).collect());
    }

    /// The text, or a sentence when there are no rows.
    pub(crate) fn render(&self, when_empty: &str) -> String {
        if self.rows.is_empty() {
            return format!("{when_empty}\n");
        }
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).max(self.headings[column].chars().count())
        };
        let widths: Vec<usize> = (0..self.headings.len()).map(width).collect();
        let mut text = String::new();
        let headings: Vec<String> = self.headings.iter().map(|h| (*h).to_owned()).collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                let _ = if self.right[column] { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:width$}  ") };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let mut table = Table::new(&["NAME", ">IPS"]);
        table.row(["eni-1".into(), "9".into()]);
        table.row(["e".into(), "10".into()]);
        assert_eq!(table.render(""), "NAME   IPS\neni-1    9\ne       10\n");
        assert_eq!(Table::new(&["A"]).render("nothing"), "nothing\n");
    }
}
