//! Prometheus text, and OpenMetrics text of the same samples.
//!
//! A family is written only through its [`Family`] in a table, so that a name cannot be misspelt at one of its uses and tests
//! can compare the table with what dashboards expect.
//! Formats: <https://prometheus.io/docs/instrumenting/exposition_formats/>,
//! <https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md>.

use std::fmt::Write as _;

/// Samples of one family that are written: what is beyond is counted, so that no dashboard drowns.
pub const MAX_SAMPLES: usize = 1000;
/// The upper bounds of histograms, seconds: those of Prometheus' own clients.
pub const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What a family's samples mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the process starts anew.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Sum and count, without quantiles.
    Summary,
    /// Observations in [`BUCKETS`].
    Histogram,
}

impl Kind {
    /// As `# TYPE` says it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Summary => "summary",
            Self::Histogram => "histogram",
        }
    }
}

/// A name with its type and labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// `awscni_eni_max`
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Names of its labels, in the order of the values.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

/// Which text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `text/plain; version=0.0.4`
    #[default]
    Prometheus,
    /// `application/openmetrics-text; version=1.0.0`: counters of aws-node whose names lack `_total` become of unknown type there, because
    /// that format demands it.
    OpenMetrics,
}

impl Format {
    /// The format that a scraper's Accept header asks for.
    pub fn accepted(header: Option<&str>) -> Self {
        match header {
            Some(accepted) if accepted.contains("application/openmetrics-text") => Self::OpenMetrics,
            _ => Self::Prometheus,
        }
    }

    /// The value of Content-Type.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// A text under construction.
#[derive(Debug, Default)]
pub struct Exposition {
    format: Format,
    out: String,
    /// Samples left out for [`MAX_SAMPLES`].
    capped: usize,
}

/// Writes samples of one family.
#[derive(Debug)]
pub struct Samples<'a> {
    exposition: &'a mut Exposition,
    family: &'static Family,
    written: usize,
}

impl Exposition {
    /// An empty text.
    pub fn new(format: Format) -> Self {
        Self { format, ..Self::default() }
    }

    /// A family's samples; its heading is written with the first one. A family is written once.
    pub fn family(&mut self, family: &'static Family) -> Samples<'_> {
        Samples { exposition: self, family, written: 0 }
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, family: &'static Family, value: f64) {
        self.family(family).value(&[], value);
    }

    /// Samples left out so far.
    pub fn capped(&self) -> usize {
        self.capped
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.out.push_str("# EOF\n");
        }
        self.out
    }

    fn heading(&mut self, family: &Family) {
        let (name, kind) = match (self.format, family.kind) {
            (Format::OpenMetrics, Kind::Counter) => match family.name.strip_suffix("_total") {
                Some(base) => (base, "counter"),
                None => (family.name, "unknown"),
            },
            (_, kind) => (family.name, kind.name()),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "# HELP {name} {}", escape(family.help, self.format == Format::OpenMetrics));
        let _ = writeln!(self.out, "# TYPE {name} {kind}");
    }
}

impl Samples<'_> {
    /// One sample; `labels` are the values of the family's labels.
    pub fn value(&mut self, labels: &[&str], value: f64) {
        debug_assert!(matches!(self.family.kind, Kind::Counter | Kind::Gauge));
        if self.begin(labels) {
            self.line("", labels, None, value);
        }
    }

    /// A summary.
    pub fn summary(&mut self, labels: &[&str], sum: f64, count: u64) {
        debug_assert_eq!(self.family.kind, Kind::Summary);
        if self.begin(labels) {
            self.line("_sum", labels, None, sum);
            self.line("_count", labels, None, count as f64);
        }
    }

    /// A histogram of these observations.
    pub fn histogram(&mut self, labels: &[&str], observations: &[f64]) {
        debug_assert_eq!(self.family.kind, Kind::Histogram);
        if !self.begin(labels) {
            return;
        }
        for bound in BUCKETS {
            let count = observations.iter().filter(|value| **value <= bound).count();
            self.line("_bucket", labels, Some(("le", &bound_text(bound))), count as f64);
        }
        self.line("_bucket", labels, Some(("le", "+Inf")), observations.len() as f64);
        self.line("_sum", labels, None, observations.iter().sum());
        self.line("_count", labels, None, observations.len() as f64);
    }

    fn begin(&mut self, labels: &[&str]) -> bool {
        debug_assert_eq!(labels.len(), self.family.labels.len(), "{}", self.family.name);
        if self.written == MAX_SAMPLES {
            self.exposition.capped += 1;
            return false;
        }
        if self.written == 0 {
            self.exposition.heading(self.family);
        }
        self.written += 1;
        true
    }

    fn line(&mut self, suffix: &str, labels: &[&str], extra: Option<(&str, &str)>, value: f64) {
        let out = &mut self.exposition.out;
        out.push_str(self.family.name);
        out.push_str(suffix);
        let pairs = self.family.labels.iter().copied().zip(labels.iter().copied()).chain(extra);
        let mut open = false;
        for (name, value) in pairs {
            out.push(if open { ',' } else { '{' });
            open = true;
            let _ = write!(out, "{name}=\"{}\"", escape(value, true));
        }
        if open {
            out.push('}');
        }
        let _ = match value {
            value if value == f64::INFINITY => writeln!(out, " +Inf"),
            value if value == f64::NEG_INFINITY => writeln!(out, " -Inf"),
            value => writeln!(out, " {value}"),
        };
    }
}

/// `1.0`, not `1`: OpenMetrics wants bounds in the canonical form.
fn bound_text(bound: f64) -> String {
    if bound.fract() == 0.0 { format!("{bound:.1}") } else { bound.to_string() }
}

fn escape(text: &str, quotes: bool) -> std::borrow::Cow<'_, str> {
    if !text.contains(['\\', '\n', '"']) {
        return text.into();
    }
    let escaped = text.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { escaped.replace('"', "\\\"").into() } else { escaped.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    static UPSTREAM: Family = Family { name: "awscni_add_ip_req_count", kind: Kind::Counter, labels: &[], help: "Adds" };
    static OURS: Family = Family { name: "stanchion_x_total", kind: Kind::Counter, labels: &["reason"], help: "A \\ b\nc" };
    static TIMES: Family = Family { name: "t_seconds", kind: Kind::Histogram, labels: &["ok"], help: "T" };
    static LATENCY: Family = Family { name: "l_ms", kind: Kind::Summary, labels: &["api"], help: "L" };

    fn write(format: Format) -> String {
        let mut text = Exposition::new(format);
        text.single(&UPSTREAM, 3.0);
        text.family(&OURS).value(&["a \"b\" \\ \n"], 0.5);
        text.family(&TIMES).histogram(&["true"], &[0.3, 20.0]);
        text.family(&LATENCY).summary(&["x"], 12.5, 2);
        let _nothing_written = text.family(&UPSTREAM);
        text.finish()
    }

    #[test]
    fn prometheus_text() {
        let text = write(Format::Prometheus);
        assert!(
            text.starts_with("# HELP awscni_add_ip_req_count Adds\n# TYPE awscni_add_ip_req_count counter\nawscni_add_ip_req_count 3\n")
        );
        assert!(text.contains("# HELP stanchion_x_total A \\\\ b\\nc\n"));
        assert!(text.contains("stanchion_x_total{reason=\"a \\\"b\\\" \\\\ \\n\"} 0.5\n"));
        assert!(text.contains("t_seconds_bucket{ok=\"true\",le=\"0.25\"} 0\nt_seconds_bucket{ok=\"true\",le=\"0.5\"} 1\n"));
        assert!(
            text.contains("t_seconds_bucket{ok=\"true\",le=\"+Inf\"} 2\nt_seconds_sum{ok=\"true\"} 20.3\nt_seconds_count{ok=\"true\"} 2\n")
        );
        assert!(text.ends_with("l_ms_sum{api=\"x\"} 12.5\nl_ms_count{api=\"x\"} 2\n"));
    }

    #[test]
    fn open_metrics_text() {
        let text = write(Format::OpenMetrics);
        assert!(text.contains("# TYPE awscni_add_ip_req_count unknown\n"));
        assert!(text.contains("# TYPE stanchion_x counter\nstanchion_x_total{"));
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(Format::accepted(Some("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")), Format::OpenMetrics);
        assert_eq!(Format::accepted(None), Format::Prometheus);
    }

    #[test]
    fn a_family_is_capped() {
        let mut text = Exposition::new(Format::Prometheus);
        let mut samples = text.family(&OURS);
        (0..MAX_SAMPLES + 5).for_each(|n| samples.value(&[&n.to_string()], 1.0));
        assert_eq!(text.capped(), 5);
        assert_eq!(text.finish().lines().count(), MAX_SAMPLES + 2);
    }
}
