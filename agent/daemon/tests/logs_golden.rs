//! Event by event against what Fluent Bit 5.1.1 sent for the same files (`testdata/fluent-bit-golden`).
//!
//! Where this agent differs, and why:
//!
//! | options | Fluent Bit | here | why |
//! |---|---|---|---|
//! | all | bytes that are not UTF-8 become a private-use character, or nothing | each ill-formed part is U+FFFD | what everybody else shows for them |
//! | multiline | the line that ends a Python traceback is sent again alone | once | a duplicate |
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::Config;
use stanchion_core::logs::LogBatch;
use stanchion_core::logs::multiline::Rule;
use stanchion_core::logs::record::{Layout, Merge, RecordOptions};
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::logs::{TailerParts, ship_once};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/fluent-bit-golden")
}

/// An event as the expectation has it; `None` for the time of lines without one.
#[derive(Clone, Debug, PartialEq)]
struct Event {
    timestamp: Option<i64>,
    message: Value,
    /// As it was sent.
    text: String,
}

type Streams = BTreeMap<(String, String), Vec<Event>>;

fn message(text: &str) -> Value {
    // A record is compared by value; a bare line by its text.
    match serde_json::from_str(text) {
        Ok(record @ Value::Object(_)) => record,
        _ => Value::from(text),
    }
}

fn expected(name: &str) -> Streams {
    let mut streams = Streams::new();
    for line in std::fs::read_to_string(golden().join("expected").join(name)).unwrap().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let text = |field: &str| event[field].as_str().unwrap().to_owned();
        let shipped = Event { timestamp: event["timestamp"].as_i64(), message: message(&text("message")), text: text("message") };
        streams.entry((text("group"), text("stream"))).or_default().push(shipped);
    }
    streams
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Streams>>);

impl LogSink for Memory {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        let mut streams = self.0.lock().unwrap();
        let stream = streams.entry((batch.group().to_owned(), batch.stream().to_owned())).or_default();
        stream.extend(batch.events().map(|event| Event {
            timestamp: Some(event.timestamp_ms),
            message: message(&event.message),
            text: event.message,
        }));
        Ok(Rejected::default())
    }

    async fn create_group(&self, _group: &str, _spec: &LogGroupSpec) -> Result<(), SinkError> {
        Ok(())
    }

    async fn create_stream(&self, _group: &str, _stream: &str) -> Result<(), SinkError> {
        Ok(())
    }
}

/// A time after the corpus's last line, 2026-11-20T11:00:00Z: a line without a time of its own gets the time of its reading,
/// and batches are in order of time.
fn just_after() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_172_400)
}

async fn shipped(settings: LogSettings) -> Streams {
    let mut cluster = ClusterState::default();
    for file in std::fs::read_dir(golden().join("pods")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        cluster.apply(stanchion_core::cluster::Object::Pod(serde_json::from_str(&text).unwrap()));
    }
    shipped_from(&golden().join("containers"), cluster, settings).await
}

async fn shipped_from(log_dir: &Path, cluster: ClusterState, settings: LogSettings) -> Streams {
    let parts = TailerParts { settings, log_dir: log_dir.to_owned(), node: "ip-10-0-1-23".to_owned(), cluster_name: "gold".to_owned() };
    let sink = Memory::default();
    let report = ship_once(parts, Arc::new(cluster), sink.clone(), just_after).await.unwrap();
    assert_eq!(report.failed, []);
    let streams = sink.0.lock().unwrap().clone();
    assert_eq!(report.counters.events_shipped, streams.values().map(Vec::len).sum::<usize>() as u64);
    streams
}

/// The table above, applied to what Fluent Bit sent.
fn with_differences(mut streams: Streams) -> Streams {
    for events in streams.values_mut() {
        for event in events.iter_mut() {
            let log = match &mut event.message {
                Value::Object(record) => record.get_mut("log"),
                line => Some(line),
            };
            if let Some(log) = log.filter(|log| log.as_str().is_some_and(|log| log.starts_with("bad utf8 "))) {
                *log = "bad utf8 \u{FFFD}\u{FFFD} end".into();
            }
        }
        let joined =
            events.iter().any(|event| event.message["log"].as_str().is_some_and(|log| log.starts_with("Traceback") && log.contains('\n')));
        if joined {
            events.retain(|event| event.message["log"] != "ValueError: bad");
        }
    }
    streams
}

async fn compare(name: &str, settings: LogSettings) {
    let expected = with_differences(expected(name));
    let shipped = shipped(settings).await;
    assert_eq!(shipped.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (stream, expected) in &expected {
        let shipped = &shipped[stream];
        for (index, (ours, theirs)) in shipped.iter().zip(expected).enumerate() {
            assert_eq!(ours.message, theirs.message, "{name}: event {index} of {stream:?}");
            if theirs.timestamp.is_some() {
                assert_eq!(ours.timestamp, theirs.timestamp, "{name}: event {index} of {stream:?}");
            }
        }
        assert_eq!(shipped.len(), expected.len(), "{name}: {stream:?}");
    }
}

/// Of the four sets only Container Insights' own has `K8S-Logging.Parser`.
fn settings(record: RecordOptions, honour_exclude: bool, honour_parser: bool) -> LogSettings {
    // What Fluent Bit recorded grows old.
    LogSettings { record, honour_exclude, honour_parser, age: None, ..LogSettings::new(Layout::FluentBit) }
}

fn aws() -> LogSettings {
    let record = RecordOptions { merge: Merge::Under("log_processed".into()), ..RecordOptions::default() };
    settings(record, false, true)
}

fn full() -> LogSettings {
    let record = RecordOptions { merge: Merge::Top, keep_log: false, labels: true, annotations: true, layout: Layout::FluentBit };
    settings(record, true, false)
}

fn log_key() -> LogSettings {
    settings(RecordOptions { layout: Layout::Raw, ..RecordOptions::default() }, false, false)
}

fn multiline() -> LogSettings {
    LogSettings { rules: [Rule::Java, Rule::Go, Rule::Python].into(), ..settings(RecordOptions::default(), false, false) }
}

#[tokio::test]
async fn container_insights_options() {
    compare("aws.jsonl", aws()).await;
}

#[tokio::test]
async fn everything_merged_and_labelled() {
    compare("full.jsonl", full()).await;
}

#[tokio::test]
async fn log_key_only() {
    compare("logkey.jsonl", log_key()).await;
}

#[tokio::test]
async fn stack_traces_joined() {
    compare("multiline.jsonl", multiline()).await;
}

/// Whoever sets nothing gets what Container Insights' own Fluent Bit sends.
#[tokio::test]
async fn the_agents_defaults() {
    let config = Config::read(&|_| None).unwrap();
    let settings = LogSettings::of_agent(&config.telemetry).unwrap();
    compare("aws.jsonl", LogSettings { age: None, ..settings }).await;
}

/// What the pods name is read where the options say so: by its own parser, not as JSON, and then only as text where it does not match.
#[tokio::test]
async fn pods_that_name_a_parser() {
    let access = r#"10.0.0.1 - - [20/Nov/2026:10:00:00 +0000] "GET / HTTP/1.1" 200 612 "-" "curl/8""#;
    let lines = [("logfmt", "level=info n=1"), ("logfmt", r#"{"a":1}"#), ("nginx", access), ("nginx", r#"{"a":1}"#)];
    for (name, settings) in [("aws", aws()), ("full", full()), ("logkey", log_key()), ("multiline", multiline())] {
        for (parser, line) in lines {
            let dir = tempfile::tempdir().unwrap();
            let file = format!("web_shop_app-{}.log", "ab".repeat(32));
            std::fs::write(dir.path().join(file), format!("2026-11-20T10:00:00Z stdout F {line}\n")).unwrap();
            let pod = serde_json::json!({"metadata": {"name": "web", "namespace": "shop", "annotations": {"fluentbit.io/parser": parser}}});
            let mut cluster = ClusterState::default();
            cluster.apply(stanchion_core::cluster::Object::Pod(serde_json::from_value(pod).unwrap()));
            let streams = shipped_from(dir.path(), cluster, settings.clone()).await;
            let [event] = &streams.values().next().unwrap()[..] else { panic!("{name}: {streams:?}") };
            let is_json = line.starts_with('{');
            match name {
                "aws" => {
                    assert_eq!(event.message["log"], line);
                    let found = &event.message["log_processed"];
                    let expected = match parser {
                        _ if is_json => Value::Null,
                        "logfmt" => serde_json::json!({"level": "info", "n": "1"}),
                        _ => found.clone(),
                    };
                    assert_eq!(*found, expected, "{parser} {line}");
                    assert_eq!(found["path"] == "/", parser == "nginx" && !is_json, "{found}");
                }
                "full" if is_json => assert_eq!((&event.message["a"], event.message.get("log")), (&1.into(), None), "{parser}"),
                "logkey" => assert_eq!(event.message, message(line), "{parser}"),
                _ => {
                    assert_eq!(event.message["log"], line, "{name} {parser}");
                    assert_eq!((event.message.get("a"), event.message.get("level"), event.message.get("path")), (None, None, None));
                }
            }
        }
    }
}

/// Container Insights' dataplane has the node in its records, not the pod, and merges nothing.
#[tokio::test]
async fn records_of_the_dataplane() {
    let dir = tempfile::tempdir().unwrap();
    let id = "cd".repeat(32);
    for pod in ["kube-proxy-x2x4z", "aws-node-b7nxx", "web"] {
        let line = "2026-11-20T10:00:00Z stdout F {\"a\":1}\n";
        std::fs::write(dir.path().join(format!("{pod}_kube-system_app-{id}.log")), line).unwrap();
    }
    let pod = |name: &str| {
        let annotations = serde_json::json!({"fluentbit.io/exclude": "true", "fluentbit.io/parser": "logfmt"});
        let pod = serde_json::json!({"metadata": {"name": name, "namespace": "kube-system", "annotations": annotations}});
        stanchion_core::cluster::Object::Pod(serde_json::from_value(pod).unwrap())
    };
    let mut cluster = ClusterState::default();
    for name in ["kube-proxy-x2x4z", "aws-node-b7nxx"] {
        cluster.apply(pod(name));
    }
    let config = Config::read(&|_| None).unwrap();
    let node = [("az", "eu-west-1a"), ("ec2_instance_id", "i-0123456789abcdef0")];
    let node: Vec<_> = node.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    for honour_exclude in [false, true] {
        let settings = LogSettings::of_agent(&config.telemetry).unwrap();
        let settings = LogSettings { age: None, node: node.clone(), honour_exclude, ..settings };
        let streams = shipped_from(dir.path(), cluster.clone(), settings).await;
        let head = r#"{"time":"2026-11-20T10:00:00Z","stream":"stdout","_p":"F","log":"{\"a\":1}","#;
        let dataplane = format!("{head}{}}}", r#""az":"eu-west-1a","ec2_instance_id":"i-0123456789abcdef0""#);
        for pod in ["kube-proxy-x2x4z", "aws-node-b7nxx"] {
            let stream = format!("ip-10-0-1-23-dataplane.tail.var.log.containers.{pod}_kube-system_app-{id}.log");
            let events = &streams[&("/aws/containerinsights/gold/dataplane".to_owned(), stream)];
            assert_eq!(events.iter().map(|event| event.text.as_str()).collect::<Vec<_>>(), [dataplane.as_str()]);
        }
        let stream = format!("ip-10-0-1-23-application.var.log.containers.web_kube-system_app-{id}.log");
        let [event] = &streams[&("/aws/containerinsights/gold/application".to_owned(), stream)][..] else { panic!("one line") };
        let kubernetes = format!(
            r#""log_processed":{{"a":1}},"kubernetes":{{"pod_name":"web","namespace_name":"kube-system","container_name":"app","docker_id":"{id}"}}"#
        );
        assert_eq!(event.text, format!("{head}{kubernetes}}}"), "of a pod that is not known the file's name says what it can");
    }
}
