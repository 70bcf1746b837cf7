//! How the story is told: scenes, explanations, tables, and checks that either hold or end it.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use stanchion_lab::probe::Matrix;

/// The teller.
pub(crate) struct Story {
    terminal: bool,
    began: Instant,
    scene: u32,
    checks: u32,
}

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const CYAN: &str = "36";

impl Story {
    pub(crate) fn begin() -> Self {
        Self { terminal: std::io::stdout().is_terminal(), began: Instant::now(), scene: 0, checks: 0 }
    }

    /// A new scene and what it is about.
    pub(crate) fn scene(&mut self, title: &str, about: &str) {
        self.scene += 1;
        let title = format!("{}. {title}", self.scene);
        println!("\n{} {}", self.paint(&title, BOLD), self.paint(&format!("({})", seconds(self.began.elapsed())), DIM));
        for line in wrapped(about, 110) {
            println!("   {line}");
        }
    }

    /// Something to look at, indented.
    pub(crate) fn show(&self, text: impl Display) {
        for line in text.to_string().trim_end().lines() {
            println!("     {}", self.paint(line, CYAN));
        }
    }

    /// A remark.
    pub(crate) fn note(&self, text: impl Display) {
        println!("     {}", self.paint(&text.to_string(), DIM));
    }

    /// Does something that must succeed and tells how long it took. What it returns is shown behind the check.
    pub(crate) async fn check<T>(&mut self, what: &str, act: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        if self.terminal {
            print!("   {} {what} ...", self.paint("·", DIM));
            let _ = std::io::stdout().flush();
        }
        let began = Instant::now();
        let outcome = act.await;
        let (mark, code) = if outcome.is_ok() { ("✓", GREEN) } else { ("✗", RED) };
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        println!("{clear}   {} {what} {}", self.paint(mark, code), self.paint(&seconds(began.elapsed()), DIM));
        self.checks += 1;
        outcome.map_err(|error| error.context(format!("this did not hold: {what}")))
    }

    /// A check of something known already.
    pub(crate) async fn holds(&mut self, what: &str, held: bool, otherwise: impl Display) -> anyhow::Result<()> {
        let outcome = if held { Ok(()) } else { Err(anyhow::anyhow!("{otherwise}")) };
        self.check(what, async { outcome }).await
    }

    /// Who reaches whom.
    pub(crate) fn matrix(&self, matrix: &Matrix) {
        let width = matrix.names.iter().map(String::len).max().unwrap_or(0);
        let column = |name: &str| name.len().max(3);
        let header: Vec<String> = matrix.names.iter().map(|name| format!("{name:^w$}", w = column(name))).collect();
        println!("     {:w$}  {}", "from \\ to", header.join("  "), w = width);
        for from in &matrix.names {
            let cells: Vec<String> = matrix
                .names
                .iter()
                .map(|to| {
                    let (mark, code) = match matrix.cells.get(&(from.clone(), to.clone())) {
                        Some(true) => ("✓", GREEN),
                        Some(false) => ("✗", RED),
                        None => ("·", DIM),
                    };
                    // Padded before it is painted: escapes have no width.
                    self.paint(&format!("{mark:^w$}", w = column(to)), code)
                })
                .collect();
            println!("     {from:width$}  {}", cells.join("  "));
        }
    }

    /// The last word.
    pub(crate) fn end(&self, outcome: &anyhow::Result<()>) {
        let took = seconds(self.began.elapsed());
        match outcome {
            Ok(()) => println!("\n{}", self.paint(&format!("All {} checks held, in {took}.", self.checks), GREEN)),
            Err(error) => println!("\n{} {error:#}", self.paint(&format!("Failed after {took}:"), RED)),
        }
    }

    fn paint(&self, text: &str, code: &str) -> String {
        if self.terminal { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A table with a header; columns as wide as their widest cell.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], i: usize| row.get(i).map_or(0, |text| text.chars().count());
    let widths: Vec<usize> =
        (0..header.len()).map(|i| rows.iter().map(|row| cell(row, i)).max().unwrap_or(0).max(header[i].len())).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(text, width)| format!("{text:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(header.to_vec())];
    lines.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
    lines.join("\n")
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("never empty");
        if !line.is_empty() && line.len() + word.len() + 1 > width {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}
