//! Prometheus text of pods as CloudWatch documents, by the rules of the CloudWatch agent.
//!
//! Gauges and quantiles of summaries go as they are. Counters, and sums and counts of summaries, go as what they grew by since the
//! scrape before, so from the second scrape on. Histograms and untyped series are left out. Series of one target whose labels are
//! equal share a document. Metric declarations say which of them become CloudWatch metrics under which dimensions.
//! <https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/ContainerInsights-Prometheus-metrics-conversion.html>

mod rules;
mod text;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::emf;
use crate::cluster::ClusterState;
use crate::objects::Pod;

pub use rules::{RuleError, Rules};
pub use text::{Kind, Sample, parse};

/// Series of a target that are taken; more are counted as dropped.
pub const MAX_SERIES: usize = 10_000;

/// A pod that asks to be scraped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `http://10.0.1.7:9102/metrics`
    pub url: String,
    /// What every series of it carries besides its own labels.
    pub labels: BTreeMap<String, String>,
}

/// This node's running pods whose annotations say `prometheus.io/scrape: "true"`; the port is the annotation's, else the first that a
/// container declares.
pub fn targets(cluster: &ClusterState, node: &str, cluster_name: &str) -> Vec<Target> {
    cluster.pods.values().filter(|pod| pod.spec.node_name == node).filter_map(|pod| target(pod, cluster_name)).collect()
}

fn target(pod: &Arc<Pod>, cluster_name: &str) -> Option<Target> {
    let annotation = |name: &str| pod.metadata.annotations.get(&format!("prometheus.io/{name}")).map(String::as_str);
    if annotation("scrape") != Some("true") || pod.status.phase != "Running" {
        return None;
    }
    let declared = || pod.spec.containers.iter().flat_map(|container| &container.ports).map(|port| port.container_port).next();
    let port = match annotation("port") {
        Some(port) => port.parse::<u16>().ok()?,
        None => declared()?,
    };
    let scheme = annotation("scheme").filter(|scheme| matches!(*scheme, "http" | "https")).unwrap_or("http");
    let path = annotation("path").unwrap_or("/metrics");
    let address = std::net::SocketAddr::new(pod.status.pod_ip?, port);
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut labels: BTreeMap<String, String> = [
        ("ClusterName", cluster_name.to_owned()),
        ("Namespace", pod.metadata.namespace.clone()),
        ("pod_name", pod.metadata.name.clone()),
        ("NodeName", pod.spec.node_name.clone()),
        ("instance", address.to_string()),
        ("job", "kubernetes-pod".to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if let [container] = &pod.spec.containers[..] {
        labels.insert("container_name".into(), container.name.clone());
    }
    Some(Target { url: format!("{scheme}://{address}{slash}{path}"), labels })
}

/// The last value of every counter that was scraped.
#[derive(Debug, Default)]
pub struct Scraper {
    rules: Rules,
    counters: HashMap<String, HashMap<String, f64>>,
}

/// What a scrape gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scraped {
    /// Documents.
    pub documents: Vec<String>,
    /// Series left out: histograms, untyped ones, no numbers, or too many.
    pub dropped: usize,
}

impl Scraper {
    /// With these declarations.
    pub fn new(rules: Rules) -> Self {
        Self { rules, counters: HashMap::new() }
    }

    /// Forgets targets that are no more.
    pub fn keep(&mut self, targets: &[Target]) {
        self.counters.retain(|url, _| targets.iter().any(|target| target.url == *url));
    }

    /// Documents of what a target answered at `wall_ms`.
    pub fn documents(&mut self, target: &Target, text: &str, wall_ms: i64) -> Scraped {
        let mut out = Scraped::default();
        let last = self.counters.remove(&target.url).unwrap_or_default();
        let mut now = HashMap::with_capacity(last.len());
        // By type and labels: what a document has in common.
        let mut documents: BTreeMap<(Kind, BTreeMap<String, String>), Map<String, Value>> = BTreeMap::new();
        for (index, sample) in parse(text).enumerate() {
            if index >= MAX_SERIES || matches!(sample.kind, Kind::Histogram | Kind::Untyped) || !sample.value.is_finite() {
                out.dropped += 1;
                continue;
            }
            let value = if sample.is_cumulative() {
                let key = sample.series();
                let before = last.get(&key).copied();
                now.insert(key, sample.value);
                match before {
                    // Counted anew since a restart: all of it is new.
                    Some(before) if sample.value < before => sample.value,
                    Some(before) => sample.value - before,
                    None => continue,
                }
            } else {
                sample.value
            };
            let Some(value) = emf::number(value) else { continue };
            let mut labels = target.labels.clone();
            // The target's own labels win, as with Prometheus' honor_labels: false.
            for (key, value) in sample.labels {
                labels.entry(key).or_insert(value);
            }
            documents.entry((sample.kind, labels)).or_default().insert(sample.name.to_owned(), value);
        }
        self.counters.insert(target.url.clone(), now);
        for ((kind, labels), metrics) in documents {
            let directives = self.rules.directives(&labels, metrics.keys().map(String::as_str));
            let mut members: Map<String, Value> = labels.into_iter().map(|(key, value)| (key, Value::from(value))).collect();
            members.insert("prom_metric_type".into(), kind.name().into());
            members.extend(metrics);
            out.documents.push(emf::document(wall_ms, members, &directives));
        }
        out
    }
}

#[cfg(test)]
mod tests;
