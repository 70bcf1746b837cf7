//! Flow records as a log: what is alike within a window is one line, and lines go where the [`LogSink`] puts them.
//!
//! Input: flow records, shutdown. Output: batches of lines. Without denied packets the task sleeps. If it panics, policy
//! goes on and the log ends; the supervisor says so.

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use stanchion_core::cloud::{LogEvent, LogGroupSpec, LogSink};
use stanchion_core::ids::PodName;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::follow::FlowRecords;
use super::handle::{FlowDirection, FlowRecord, FlowVerdict};
use crate::telemetry::{ShipCounters, ship};

/// Packets that differ in nothing but their source port are one line for so long.
const WINDOW: Duration = Duration::from_secs(10);
/// Lines that a window may have before it is sent early.
const MOST_LINES: usize = 4_096;
/// How long the last window may take when the agent stops.
const LAST: Duration = Duration::from_secs(2);
/// Windows that wait for the shipper, which itself keeps several MiB.
const WAITING: usize = 4;

/// Where the log goes.
#[derive(Clone, Debug)]
pub struct FlowLogSettings {
    /// The log group.
    pub group: String,
    /// How the group is made.
    pub group_spec: LogGroupSpec,
    /// The node: the stream's name, and a field of every line.
    pub node: String,
}

/// What became of the records.
#[derive(Clone, Debug, Default)]
pub struct FlowLog {
    shipped: Arc<ShipCounters>,
    lost: Arc<AtomicU64>,
}

/// Counters of a [`FlowLog`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FlowLogCounters {
    /// Lines that the log group took.
    pub lines_sent: u64,
    /// Lines that were refused, or too old after an outage.
    pub lines_dropped: u64,
    /// Records that came faster than they could be gathered.
    pub records_lost: u64,
}

impl FlowLog {
    /// As of now.
    pub fn counters(&self) -> FlowLogCounters {
        FlowLogCounters {
            lines_sent: self.shipped.sent.load(Ordering::Relaxed),
            lines_dropped: self.shipped.dropped.load(Ordering::Relaxed),
            records_lost: self.lost.load(Ordering::Relaxed),
        }
    }
}

/// Starts the log of the records.
pub fn spawn<S: LogSink>(
    records: FlowRecords,
    settings: FlowLogSettings,
    sink: Arc<S>,
    shutdown: CancellationToken,
) -> (FlowLog, JoinHandle<()>) {
    let log = FlowLog::default();
    let (documents, received) = mpsc::channel(WAITING);
    let shipped = Arc::clone(&log.shipped);
    let gives_up = CancellationToken::new();
    let (group, stream, spec) = (settings.group.clone(), settings.node.clone(), settings.group_spec.clone());
    let shipping = ship::run(sink, ship::Destination { group, stream, spec, emf: false }, received, shipped, gives_up.clone());
    let gathering = gather(records, settings, documents, Arc::clone(&log.lost), shutdown);
    let task = tokio::spawn(async move {
        let mut shipping = pin!(shipping);
        tokio::select! {
            () = &mut shipping => {}
            () = async { gathering.await; sleep(LAST).await } => {
                gives_up.cancel();
                shipping.await;
            }
        }
    });
    (log, task)
}

async fn gather(
    mut records: FlowRecords,
    settings: FlowLogSettings,
    documents: mpsc::Sender<Vec<LogEvent>>,
    lost: Arc<AtomicU64>,
    shutdown: CancellationToken,
) {
    let mut window = Window::default();
    let mut due = Instant::now();
    loop {
        let ends = tokio::select! {
            () = shutdown.cancelled() => {
                // What came before the end; policy's task ends too.
                while let Ok(Ok(record)) = timeout(Duration::ZERO, records.recv()).await {
                    window.add(&record);
                }
                if !window.is_empty() {
                    // The shipper ends only after this.
                    let _sent = documents.send(window.take(&settings.node)).await;
                }
                return;
            }
            () = sleep_until(due), if !window.is_empty() => true,
            record = records.recv() => match record {
                Ok(record) => {
                    if window.is_empty() {
                        due = Instant::now() + WINDOW;
                    }
                    window.add(&record);
                    window.lines.len() >= MOST_LINES
                }
                Err(RecvError::Lagged(count)) => {
                    lost.fetch_add(count, Ordering::Relaxed);
                    warn!(records = count, "flows are not in the flow log: they came faster than they could be gathered");
                    false
                }
                Err(RecvError::Closed) => return,
            },
        };
        if ends && documents.send(window.take(&settings.node)).await.is_err() {
            return;
        }
    }
}

/// What makes packets alike.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Alike {
    verdict: FlowVerdict,
    direction: FlowDirection,
    source: (IpAddr, Option<PodName>),
    destination: (IpAddr, Option<PodName>),
    destination_port: u16,
    protocol: String,
    policy: String,
    rule: String,
    reason: &'static str,
}

/// What is told of them together.
struct Together {
    first: SystemTime,
    last: SystemTime,
    source_port: u16,
    packets: u64,
    bytes: u64,
}

/// Lines until they are sent.
#[derive(Default)]
struct Window {
    lines: HashMap<Alike, Together>,
}

/// A line of the log.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    until: String,
    node: &'a str,
    verdict: FlowVerdict,
    direction: FlowDirection,
    source: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_pod: Option<String>,
    source_port: u16,
    destination: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination_pod: Option<String>,
    destination_port: u16,
    protocol: &'a str,
    policy: &'a str,
    rule: &'a str,
    reason: &'static str,
    packets: u64,
    bytes: u64,
}

impl Window {
    fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    fn add(&mut self, record: &FlowRecord) {
        let alike = Alike {
            verdict: record.verdict,
            direction: record.direction,
            source: (record.source, record.source_pod().cloned()),
            destination: (record.destination, record.destination_pod().cloned()),
            destination_port: record.destination_port,
            protocol: record.protocol.clone(),
            policy: record.policy.clone(),
            rule: record.rule.clone(),
            reason: record.reason,
        };
        let new = Together { first: record.time, last: record.time, source_port: record.source_port, packets: 0, bytes: 0 };
        let together = self.lines.entry(alike).or_insert(new);
        together.last = record.time;
        together.packets += 1;
        together.bytes += u64::from(record.length);
    }

    /// The window's lines as events, each at the time of its first packet.
    fn take(&mut self, node: &str) -> Vec<LogEvent> {
        let events = self.lines.drain().filter_map(|(alike, together)| {
            let Alike { verdict, direction, source, destination, destination_port, protocol, policy, rule, reason } = alike;
            let line = Line {
                time: written(together.first),
                until: written(together.last),
                node,
                verdict,
                direction,
                source: source.0,
                source_pod: source.1.map(|pod| pod.to_string()),
                source_port: together.source_port,
                destination: destination.0,
                destination_pod: destination.1.map(|pod| pod.to_string()),
                destination_port,
                protocol: &protocol,
                policy: &policy,
                rule: &rule,
                reason,
                packets: together.packets,
                bytes: together.bytes,
            };
            let timestamp_ms = i64::try_from(together.first.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(i64::MAX);
            Some(LogEvent { timestamp_ms, message: serde_json::to_string(&line).ok()? })
        });
        events.collect()
    }
}

fn written(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(source_port: u16, destination_port: u16, milliseconds: u64) -> FlowRecord {
        FlowRecord {
            time: UNIX_EPOCH + Duration::from_millis(milliseconds),
            verdict: FlowVerdict::Denied,
            direction: FlowDirection::Ingress,
            pod: Some(PodName::new("shop", "db-0")),
            peer: Some(PodName::new("shop", "web-1")),
            source: IpAddr::from([10, 0, 0, 2]),
            destination: IpAddr::from([10, 0, 0, 1]),
            protocol: "TCP".to_owned(),
            source_port,
            destination_port,
            length: 74,
            policy: "NetworkPolicy shop/db".to_owned(),
            rule: "ingress[0]".to_owned(),
            reason: "policy",
        }
    }

    #[test]
    fn packets_that_are_alike_are_one_line() {
        let mut window = Window::default();
        for (source_port, port, time) in [(4_000, 5432, 1_000), (4_001, 5432, 1_500), (4_002, 22, 2_000)] {
            window.add(&record(source_port, port, time));
        }
        let mut events = window.take("node1");
        assert!(window.is_empty());
        events.sort_by_key(|event| event.timestamp_ms);
        assert_eq!(events.iter().map(|event| event.timestamp_ms).collect::<Vec<_>>(), [1_000, 2_000]);
        let line: serde_json::Value = serde_json::from_str(&events[0].message).unwrap();
        let expected = serde_json::json!({
            "time": "1970-01-01T00:00:01.000Z", "until": "1970-01-01T00:00:01.500Z", "node": "node1", "verdict": "denied", "direction": "ingress",
            "source": "10.0.0.2", "source_pod": "shop/web-1", "source_port": 4_000, "destination": "10.0.0.1", "destination_pod": "shop/db-0",
            "destination_port": 5432, "protocol": "TCP", "policy": "NetworkPolicy shop/db", "rule": "ingress[0]", "reason": "policy",
            "packets": 2, "bytes": 148,
        });
        assert_eq!(line, expected);
    }
}
