//! Documents of metrics that are not Container Insights' own (scraped, statsd), in version 0 of the embedded metric format.

use serde_json::{Map, Value};

/// Dimensions of a set at most: <https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html>
pub const MAX_DIMENSIONS: usize = 30;
/// Metrics of a directive at most.
pub const MAX_METRICS: usize = 100;

/// What CloudWatch is to make of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directive {
    /// The CloudWatch namespace.
    pub namespace: String,
    /// Sets of members whose values are dimensions.
    pub dimensions: Vec<Vec<String>>,
    /// Members that are metrics.
    pub metrics: Vec<String>,
}

/// One document: its members, and the directives that their metrics need, split at [`MAX_METRICS`].
pub fn document(wall_ms: i64, mut members: Map<String, Value>, directives: &[Directive]) -> String {
    let mut out = Vec::new();
    for Directive { namespace, dimensions, metrics } in directives {
        for metrics in metrics.chunks(MAX_METRICS) {
            let metrics: Vec<Value> = metrics.iter().map(|name| serde_json::json!({ "Name": name })).collect();
            out.push(serde_json::json!({ "Namespace": namespace, "Dimensions": dimensions, "Metrics": metrics }));
        }
    }
    members.insert("Version".into(), "0".into());
    members.insert("Timestamp".into(), wall_ms.to_string().into());
    if !out.is_empty() {
        members.insert("CloudWatchMetrics".into(), out.into());
    }
    Value::Object(members).to_string()
}

/// A number as a document's member; none where JSON has no such number.
pub fn number(value: f64) -> Option<Value> {
    // Whole numbers without ".0"; 2^53 bounds what a double holds exactly.
    if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
        return Some((value as i64).into());
    }
    serde_json::Number::from_f64(value).map(Value::Number)
}
