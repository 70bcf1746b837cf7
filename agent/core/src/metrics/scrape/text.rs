//! The text that pods answer with.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::collections::HashMap;
use std::fmt::Write as _;

/// What `# TYPE` says of a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Grows until its process starts anew.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Quantiles, sum and count.
    Summary,
    /// Buckets, sum and count.
    Histogram,
    /// Nothing was said.
    #[default]
    Untyped,
}

impl Kind {
    /// As written in the text, and in `prom_metric_type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Summary => "summary",
            Self::Histogram => "histogram",
            Self::Untyped => "untyped",
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<'a> {
    /// With its suffix: `http_requests_total`, `rpc_seconds_sum`.
    pub name: &'a str,
    /// Of its family.
    pub kind: Kind,
    /// In the order of the text, escapes undone.
    pub labels: Vec<(String, String)>,
    /// May be infinite or no number.
    pub value: f64,
}

impl Sample<'_> {
    /// Whether it only grows.
    pub fn is_cumulative(&self) -> bool {
        match self.kind {
            Kind::Counter => true,
            Kind::Summary => self.name.ends_with("_sum") || self.name.ends_with("_count"),
            Kind::Gauge | Kind::Histogram | Kind::Untyped => false,
        }
    }

    /// Name and labels as a key.
    pub fn series(&self) -> String {
        let mut out = self.name.to_owned();
        for (key, value) in &self.labels {
            // Writing to a String cannot fail; quotes keep "a=b" apart from two labels.
            let _ = write!(out, "\n{key}={value:?}");
        }
        out
    }
}

/// The samples of a text; a line of another form is left out. Time stamps are left out too: what counts is when it was asked.
pub fn parse(text: &str) -> impl Iterator<Item = Sample<'_>> {
    let mut kinds: HashMap<&str, Kind> = HashMap::new();
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(comment) = line.strip_prefix('#') {
            let mut words = comment.split_ascii_whitespace();
            if words.next() == Some("TYPE")
                && let (Some(name), Some(kind)) = (words.next(), words.next())
            {
                let known = [Kind::Counter, Kind::Gauge, Kind::Summary, Kind::Histogram];
                kinds.insert(name, known.into_iter().find(|known| known.name() == kind).unwrap_or_default());
            }
            return None;
        }
        let end = line.find(|letter: char| letter == '{' || letter.is_ascii_whitespace())?;
        let (name, rest) = line.split_at(end);
        if name.is_empty() {
            return None;
        }
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(inside) => labels(inside)?,
            None => (Vec::new(), rest),
        };
        let value = rest.split_ascii_whitespace().next()?;
        let value = match value {
            "+Inf" => f64::INFINITY,
            "-Inf" => f64::NEG_INFINITY,
            number => number.parse().ok()?,
        };
        Some(Sample { name, kind: kind_of(&kinds, name), labels, value })
    })
}

/// The family's type: that of the name itself, or of the name without a suffix that the type gives its series.
fn kind_of(kinds: &HashMap<&str, Kind>, name: &str) -> Kind {
    if let Some(kind) = kinds.get(name) {
        return *kind;
    }
    let of = |suffix: &str| name.strip_suffix(suffix).and_then(|base| kinds.get(base)).copied();
    if let Some(kind) = of("_sum").or_else(|| of("_count")).filter(|kind| matches!(kind, Kind::Summary | Kind::Histogram)) {
        return kind;
    }
    // OpenMetrics names a counter's family without the suffix of its series.
    of("_bucket").filter(|kind| *kind == Kind::Histogram).or_else(|| of("_total").filter(|kind| *kind == Kind::Counter)).unwrap_or_default()
}

/// The labels up to the closing brace, and what follows it.
fn labels(text: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    let mut rest = text.trim_start();
    loop {
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (key, after) = rest.split_once('=')?;
        let mut value = String::new();
        let mut letters = after.trim_start().strip_prefix('"')?.char_indices();
        let quoted = after.trim_start().strip_prefix('"')?;
        let end = loop {
            match letters.next()? {
                (at, '"') => break at,
                (_, '\\') => match letters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.push((key.trim().to_owned(), value));
        rest = quoted[end + 1..].trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
}
