//! Metric declarations, in the form of the CloudWatch agent's `emf_processor` section.

use std::collections::BTreeMap;

use regex_lite::Regex;
use serde::Deserialize;

use super::super::emf::{Directive, MAX_DIMENSIONS};

/// Where metrics go unless the rules say otherwise.
const NAMESPACE: &str = "ContainerInsights/Prometheus";

/// The file: either the section itself or an agent's whole configuration around it.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    metric_namespace: Option<String>,
    #[serde(default)]
    metric_declaration: Vec<Declaration>,
}

#[derive(Deserialize)]
struct Declaration {
    source_labels: Vec<String>,
    label_matcher: String,
    #[serde(default = "semicolon")]
    label_separator: String,
    #[serde(default)]
    dimensions: Vec<Vec<String>>,
    metric_selectors: Vec<String>,
}

fn semicolon() -> String {
    ";".to_owned()
}

/// What becomes a metric, under which dimensions; without declarations nothing does.
#[derive(Debug)]
pub struct Rules {
    namespace: String,
    declarations: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    source_labels: Vec<String>,
    separator: String,
    matcher: Regex,
    dimensions: Vec<Vec<String>>,
    selectors: Vec<Regex>,
}

/// Why rules cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuleError {
    /// Not JSON, or not of the form.
    #[error("the metric declarations are no JSON object with metric_declaration")]
    Form(#[source] serde_json::Error),
    /// A pattern.
    #[error("metric_declaration[{index}]: {pattern:?} is no pattern that can be used")]
    Pattern {
        /// Counted from 0.
        index: usize,
        /// As written.
        pattern: String,
        /// What is wrong with it.
        source: regex_lite::Error,
    },
    /// More dimensions than CloudWatch takes.
    #[error("metric_declaration[{index}]: a set of {count} dimensions; CloudWatch takes {MAX_DIMENSIONS}")]
    Dimensions {
        /// Counted from 0.
        index: usize,
        /// How many.
        count: usize,
    },
}

impl Default for Rules {
    fn default() -> Self {
        Self { namespace: NAMESPACE.to_owned(), declarations: Vec::new() }
    }
}

impl Rules {
    /// Reads `{"metric_namespace": …, "metric_declaration": […]}`, alone or where the CloudWatch agent's configuration has it
    /// (`logs.metrics_collected.prometheus.emf_processor`).
    ///
    /// # Errors
    /// When the text is of another form, or a pattern cannot be used.
    pub fn parse(text: &str) -> Result<Self, RuleError> {
        let whole: serde_json::Value = serde_json::from_str(text).map_err(RuleError::Form)?;
        let inner = whole.pointer("/logs/metrics_collected/prometheus/emf_processor").cloned().unwrap_or(whole);
        let file: File = serde_json::from_value(inner).map_err(RuleError::Form)?;
        let mut declarations = Vec::new();
        for (index, declaration) in file.metric_declaration.into_iter().enumerate() {
            let pattern = |text: &str| Regex::new(text).map_err(|source| RuleError::Pattern { index, pattern: text.to_owned(), source });
            if let Some(set) = declaration.dimensions.iter().find(|set| set.len() > MAX_DIMENSIONS) {
                return Err(RuleError::Dimensions { index, count: set.len() });
            }
            declarations.push(Rule {
                matcher: pattern(&declaration.label_matcher)?,
                selectors: declaration.metric_selectors.iter().map(|text| pattern(text)).collect::<Result<_, _>>()?,
                source_labels: declaration.source_labels,
                separator: declaration.label_separator,
                dimensions: declaration.dimensions,
            });
        }
        Ok(Self { namespace: file.metric_namespace.unwrap_or_else(|| NAMESPACE.to_owned()), declarations })
    }

    /// The directives for a document with these labels and metrics: every declaration that matches adds its own. A dimension set
    /// counts only where the document has all of its labels.
    pub(super) fn directives<'a>(
        &self,
        labels: &BTreeMap<String, String>,
        metrics: impl Iterator<Item = &'a str> + Clone,
    ) -> Vec<Directive> {
        let mut out = Vec::new();
        for rule in &self.declarations {
            let values: Vec<&str> = rule.source_labels.iter().map(|label| labels.get(label).map_or("", String::as_str)).collect();
            if !rule.matcher.is_match(&values.join(&rule.separator)) {
                continue;
            }
            let dimensions: Vec<_> =
                rule.dimensions.iter().filter(|set| set.iter().all(|label| labels.contains_key(label))).cloned().collect();
            let selected = metrics.clone().filter(|name| rule.selectors.iter().any(|selector| selector.is_match(name)));
            let metrics: Vec<String> = selected.map(str::to_owned).collect();
            if !dimensions.is_empty() && !metrics.is_empty() {
                out.push(Directive { namespace: self.namespace.clone(), dimensions, metrics });
            }
        }
        out
    }
}
