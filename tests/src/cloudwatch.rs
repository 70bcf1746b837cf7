//! What arrived in the fake CloudWatch Logs.

use std::collections::BTreeMap;

use crate::fake_aws::Cloud;
use crate::node::CLUSTER_NAME;
use anyhow::bail;
use serde_json::Value;

/// A container's line as it arrived.
#[derive(Clone, Debug)]
pub struct Record {
    /// Log group.
    pub group: String,
    /// Log stream.
    pub stream: String,
    /// The event's JSON.
    pub record: Value,
}

/// All container lines that arrived, by their text.
#[derive(Debug, Default)]
pub struct Delivered {
    by_text: BTreeMap<String, Vec<Record>>,
}

impl Delivered {
    /// Reads the cluster's application group.
    pub fn read(cloud: &Cloud) -> Self {
        let mut delivered = Self::default();
        let group = format!("/aws/containerinsights/{CLUSTER_NAME}/application");
        for stream in cloud.log_streams(&group) {
            for event in cloud.events(&group, &stream) {
                let Ok(record) = serde_json::from_str::<Value>(&event.message) else { continue };
                let text = record["log"].as_str().unwrap_or_default().trim_end().to_owned();
                let record = Record { group: group.clone(), stream: stream.clone(), record };
                delivered.by_text.entry(text).or_default().push(record);
            }
        }
        delivered
    }

    /// The first record with this text.
    pub fn find(&self, text: &str) -> Option<&Record> {
        self.by_text.get(text)?.first()
    }

    /// Each line arrived, and once only.
    pub fn exactly_once(&self, lines: impl IntoIterator<Item = String>) -> anyhow::Result<()> {
        self.count(lines, |count| count == 1)
    }

    /// Each line arrived: after a crash, what was not acknowledged is sent again.
    pub fn at_least_once(&self, lines: impl IntoIterator<Item = String>) -> anyhow::Result<()> {
        self.count(lines, |count| count >= 1)
    }

    fn count(&self, lines: impl IntoIterator<Item = String>, right: impl Fn(usize) -> bool) -> anyhow::Result<()> {
        for line in lines {
            let count = self.by_text.get(&line).map_or(0, Vec::len);
            if !right(count) {
                let start: String = line.chars().take(60).collect();
                bail!("{start:?} arrived {count} times; {} lines arrived in all", self.by_text.len());
            }
        }
        Ok(())
    }
}

/// The newest Container Insights document of a node.
pub fn node_document(cloud: &Cloud, node: &str) -> Option<Value> {
    let group = format!("/aws/containerinsights/{CLUSTER_NAME}/performance");
    let streams = cloud.log_streams(&group);
    let events = streams.iter().flat_map(|stream| cloud.events(&group, stream));
    let documents = events.filter_map(|event| serde_json::from_str::<Value>(&event.message).ok());
    documents.filter(|document| document["Type"] == "Node" && document["NodeName"] == node).reduce(|_, newer| newer)
}

/// A few of a document's fields, for people.
pub fn numbers(document: &Value) -> String {
    let fields = ["ClusterName", "NodeName", "Type", "node_cpu_utilization", "node_memory_utilization", "node_network_total_bytes"];
    let fields = fields.iter().filter(|field| !document[**field].is_null());
    fields.map(|field| format!("{field}: {}", document[*field])).collect::<Vec<_>>().join("\n")
}
