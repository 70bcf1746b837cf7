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
        let shipped = Event { timestamp: event["timestamp"].as_i64(), message: message(&text("message")) };
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
        stream.extend(batch.events().map(|event| Event { timestamp: Some(event.timestamp_ms), message: message(&event.message) }));
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
    let parts =
        TailerParts { settings, log_dir: golden().join("containers"), node: "ip-10-0-1-23".to_owned(), cluster_name: "gold".to_owned() };
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

fn settings(record: RecordOptions, honour_exclude: bool) -> LogSettings {
    // What Fluent Bit recorded grows old.
    LogSettings { record, honour_exclude, age: None, ..LogSettings::new(Layout::FluentBit) }
}

#[tokio::test]
async fn container_insights_options() {
    let record = RecordOptions { merge: Merge::Under("log_processed".into()), ..RecordOptions::default() };
    compare("aws.jsonl", settings(record, false)).await;
}

#[tokio::test]
async fn everything_merged_and_labelled() {
    let record = RecordOptions { merge: Merge::Top, keep_log: false, labels: true, annotations: true, layout: Layout::FluentBit };
    compare("full.jsonl", settings(record, true)).await;
}

#[tokio::test]
async fn log_key_only() {
    compare("logkey.jsonl", settings(RecordOptions { layout: Layout::Raw, ..RecordOptions::default() }, false)).await;
}

#[tokio::test]
async fn stack_traces_joined() {
    let mut settings = settings(RecordOptions::default(), false);
    settings.rules = [Rule::Java, Rule::Go, Rule::Python].into();
    compare("multiline.jsonl", settings).await;
}
