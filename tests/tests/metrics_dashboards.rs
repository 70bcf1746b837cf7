//! Dashboards and alarms ask only for metrics that exist, under dimensions that the standard preset tells.

use std::collections::BTreeSet;

use serde_json::Value;
use stanchion_core::metrics::catalog::{NAMESPACE, Preset, field_name};
use stanchion_core::metrics::exposition::{Family, Kind};
use stanchion_core::metrics::families;

/// Words of PromQL that are no metrics.
const PROMQL: &[&str] = &["sum", "max", "min", "avg", "rate", "increase", "topk", "by", "without", "label_values"];

fn load(name: &str) -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/dashboards").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The series that a family makes.
fn series(family: &Family) -> Vec<String> {
    let suffixes: &[&str] = match family.kind {
        Kind::Counter | Kind::Gauge => &[""],
        Kind::Summary => &["_sum", "_count"],
        Kind::Histogram => &["_sum", "_count", "_bucket"],
    };
    suffixes.iter().map(|suffix| format!("{}{suffix}", family.name)).collect()
}

/// Metric names and label names in a query: identifiers, without what stands in quotes.
fn words(query: &str) -> Vec<String> {
    let unquoted: String = query.split('"').step_by(2).collect::<Vec<_>>().join(" ");
    // Durations such as [5m] are no identifiers.
    let mut outside = String::new();
    let mut depth = 0;
    for letter in unquoted.chars() {
        depth += i32::from(letter == '[') - i32::from(letter == ']');
        outside.push(if depth > 0 || letter == ']' { ' ' } else { letter });
    }
    outside
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        .filter(|word| word.starts_with(|letter: char| letter.is_ascii_alphabetic()))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_query_of_grafana_names_a_family_that_is_served() {
    let all: Vec<&Family> = families::AWS_NODE.iter().chain(families::OWN).chain(families::NODE).copied().collect();
    let known: BTreeSet<String> = all.iter().flat_map(|family| series(family)).collect();
    // Prometheus adds the target's name.
    let labels: BTreeSet<&str> = all.iter().flat_map(|family| family.labels).copied().chain(["instance"]).collect();
    let mut asked = BTreeSet::new();
    for name in ["grafana-network.json", "grafana-telemetry.json"] {
        let dashboard = load(name);
        let panels = dashboard["panels"].as_array().expect("panels");
        assert!(!panels.is_empty());
        let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
        assert_eq!(ids.len(), panels.len(), "{name}: ids of panels are unique");
        for panel in panels {
            for target in panel["targets"].as_array().expect("targets") {
                let query = target["expr"].as_str().expect("a query");
                assert_eq!(query.matches(['(', '{', '[']).count(), query.matches([')', '}', ']']).count(), "{query}");
                let words = words(query);
                let metrics: Vec<_> = words.iter().filter(|word| known.contains(*word)).cloned().collect();
                assert!(!metrics.is_empty(), "{name}: {query} names no metric of ours");
                for word in &words {
                    let fine = known.contains(word) || labels.contains(word.as_str()) || PROMQL.contains(&word.as_str());
                    assert!(fine, "{name}: {word} in {query}");
                }
                asked.extend(metrics);
            }
        }
    }
    assert!(asked.len() > 25, "{asked:?}");
}

#[test]
fn every_metric_of_cloudwatch_is_told_under_its_dimensions() {
    let told = |metric: &str, dimensions: &BTreeSet<&str>| {
        Preset::Standard.directives().iter().any(|directive| {
            let named = directive.fields.iter().any(|field| {
                let (prefix, name) = field_name(directive.doc, field);
                format!("{prefix}{name}") == metric
            });
            named && directive.dimensions.iter().any(|set| set.iter().map(|tag| tag.name()).collect::<BTreeSet<_>>() == *dimensions)
        })
    };
    let template = load("cloudwatch.json");
    let resources = template["Resources"].as_object().expect("resources");
    let (mut alarms, mut lines) = (0, 0);
    for (name, resource) in resources {
        let properties = &resource["Properties"];
        match resource["Type"].as_str() {
            Some("AWS::CloudWatch::Alarm") => {
                assert_eq!(properties["Namespace"], NAMESPACE);
                let dimensions = properties["Dimensions"].as_array().expect("dimensions");
                let set = dimensions.iter().map(|dimension| dimension["Name"].as_str().expect("a name")).collect();
                let metric = properties["MetricName"].as_str().expect("a metric");
                assert!(told(metric, &set), "{name}: {metric} {set:?}");
                alarms += 1;
            }
            Some("AWS::CloudWatch::Dashboard") => {
                let body: Value = serde_json::from_str(properties["DashboardBody"]["Fn::Sub"].as_str().expect("a text")).expect("JSON");
                for widget in body["widgets"].as_array().expect("widgets") {
                    for metric in widget["properties"]["metrics"].as_array().expect("metrics") {
                        let parts: Vec<&str> = metric.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
                        assert_eq!(parts[0], NAMESPACE);
                        let set = parts[2..].chunks(2).map(|pair| pair[0]).collect();
                        assert!(told(parts[1], &set), "{} {set:?}", parts[1]);
                        lines += 1;
                    }
                }
            }
            other => panic!("{name} is a {other:?}"),
        }
    }
    assert!(alarms >= 5 && lines >= 10);
}
