//! Whatever a container writes: one pass over odd files, and what comes out.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use regex_lite::Regex;
use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::cluster::{ClusterState, Object};
use stanchion_core::logs::LogBatch;
use stanchion_core::logs::record::{Layout, Merge, RecordOptions};
use stanchion_core::logs::settings::{HostFiles, LogSettings, Redaction, Route};
use stanchion_daemon::logs::{ShipReport, TailerParts, ship_once};

/// Messages by stream, with their times.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Streams>>);

/// Times and messages by stream.
type Streams = BTreeMap<String, Vec<(i64, String)>>;

impl LogSink for Memory {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        let mut streams = self.0.lock().unwrap();
        let stream = streams.entry(batch.stream().to_owned()).or_default();
        stream.extend(batch.events().map(|event| (event.timestamp_ms, event.message)));
        Ok(Rejected::default())
    }

    async fn create_group(&self, _group: &str, _spec: &LogGroupSpec) -> Result<(), SinkError> {
        Ok(())
    }

    async fn create_stream(&self, _group: &str, _stream: &str) -> Result<(), SinkError> {
        Ok(())
    }
}

fn name(pod: &str) -> String {
    format!("{pod}_shop_app-{}.log", "ab".repeat(32))
}

fn raw() -> LogSettings {
    LogSettings { age: None, stream_puts: 1, ..LogSettings::new(Layout::Raw) }
}

async fn ship(dir: &Path, settings: LogSettings, cluster: ClusterState) -> (ShipReport, Vec<(String, Vec<(i64, String)>)>) {
    let parts = TailerParts { settings, log_dir: dir.to_owned(), node: "n".to_owned(), cluster_name: "c".to_owned() };
    let sink = Memory::default();
    let report = ship_once(parts, Arc::new(cluster), sink.clone(), SystemTime::now).await.unwrap();
    let streams = std::mem::take(&mut *sink.0.lock().unwrap());
    (report, streams.into_iter().collect())
}

async fn texts(dir: &Path, settings: LogSettings) -> Vec<String> {
    let (_, streams) = ship(dir, settings, ClusterState::default()).await;
    streams.into_iter().flat_map(|(_, events)| events).map(|(_, text)| text).collect()
}

#[tokio::test]
async fn odd_lines_of_a_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(dir.path().join(name("web"))).unwrap();
    for line in [
        &b"2026-11-20T10:00:00Z stdout F no fraction"[..],
        b"2026-11-20T10:00:00.123456789Z stdout F nine digits",
        b"2026-11-20T15:30:01+05:30 stdout F another zone",
        b"2026-11-20T10:00:02Z stdout F ",
        b"2026-11-20T10:00:03Z stdout F carriage return\r",
        b"2026-11-20T10:00:04Z stdout F nul \0 here",
        b"2026-11-20T10:00:05Z stdout F bad \xff\xfe utf8 \xf0\x9f\x98",
        b"",
        b"2026-11-20T10:00:06Z stdout P out ",
        b"2026-11-20T10:00:06Z stderr P err ",
        b"2026-11-20T10:00:06Z stdout F put",
        b"2026-11-20T10:00:07Z stderr F or",
        b"\0\0\0\x002026-11-20T10:00:08Z stdout F after a hole",
        b"2026-11-20T10:00:09Z stdout P last words",
    ] {
        file.write_all(line).unwrap();
        file.write_all(b"\n").unwrap();
    }
    let (report, streams) = ship(dir.path(), raw(), ClusterState::default()).await;
    let base = 1_795_168_800_000;
    let expected = [
        (0, "no fraction"),
        (123, "nine digits"),
        (1000, "another zone"),
        (3000, "carriage return"),
        (4000, "nul \0 here"),
        (5000, "bad \u{fffd}\u{fffd} utf8 \u{fffd}"),
        (6000, "out put"),
        (6000, "err or"),
        (8000, "after a hole"),
        (9000, "last words"),
    ];
    let mut expected: Vec<_> = expected.map(|(ms, text)| (base + ms, text.to_owned())).into();
    expected.sort();
    let mut events = streams[0].1.clone();
    events.sort();
    assert_eq!(events, expected);
    assert_eq!(report.counters.dropped_empty, 1, "an empty line has no message in this layout");
}

#[tokio::test]
async fn parts_on_both_sides_of_a_rotation_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join(name("web"));
    fs::write(format!("{}.20261121-000001", live.display()), "2026-11-20T10:00:00Z stdout F a\n2026-11-20T10:00:01Z stdout P be").unwrap();
    // The kubelet's next rotation compressed the first file.
    let mut gz = flate2::write::GzEncoder::new(
        fs::File::create(format!("{}.20261121-000000.gz", live.display())).unwrap(),
        flate2::Compression::fast(),
    );
    gz.write_all(b"2026-11-20T09:59:59Z stdout F oldest\n").unwrap();
    gz.finish().unwrap();
    fs::write(&live, "2026-11-20T10:00:01Z stdout F fore and after\n").unwrap();
    assert_eq!(texts(dir.path(), raw()).await, ["oldest", "a", "before and after"]);
}

#[tokio::test]
async fn lines_of_many_megabytes_and_files_without_any() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(dir.path().join(name("big"))).unwrap();
    // A joined line of 3 MiB, then one of a runtime that does not split: 2 MiB without a newline in sight.
    for part in 0..192 {
        writeln!(file, "2026-11-20T10:00:00Z stdout {} {}", if part == 191 { "F" } else { "P" }, "j".repeat(16 << 10)).unwrap();
    }
    writeln!(file, "2026-11-20T10:00:01Z stdout F {}", "k".repeat(2 << 20)).unwrap();
    writeln!(file, "{}", "l".repeat(5 << 18)).unwrap();
    writeln!(file, "2026-11-20T10:00:02Z stdout F end").unwrap();
    fs::File::create(dir.path().join(name("empty"))).unwrap();
    fs::File::create(dir.path().join(name("sparse"))).unwrap().set_len(3 << 20).unwrap();
    let events = texts(dir.path(), raw()).await;
    let count = |letter: u8| events.iter().map(|text| memchr::memchr_iter(letter, text.as_bytes()).count()).sum::<usize>();
    assert_eq!((count(b'j'), count(b'k'), count(b'l')), (3 << 20, 2 << 20, 5 << 18));
    assert_eq!(events.iter().map(String::len).sum::<usize>(), (5 << 20) + (5 << 18) + "end".len() + count(0), "nothing else");
    assert!(events.iter().all(|text| text.len() <= 1_048_550));
    assert!(events.contains(&"end".to_owned()));
}

/// Runtimes write a long line in parts of 16 KiB.
#[tokio::test]
async fn objects_of_many_parts_are_merged() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(dir.path().join(name("web"))).unwrap();
    let sizes = [40_000, 45_000, 100_000, 500_000, 1_048_600];
    let lines = sizes.map(|bytes| format!(r#"{{"bytes":{bytes},"text":"{}"}}"#, "x".repeat(bytes - 30)));
    for line in &lines {
        for at in (0..line.len()).step_by(16 << 10) {
            let end = line.len().min(at + (16 << 10));
            writeln!(file, "2026-11-20T10:00:00Z stdout {} {}", if end == line.len() { "F" } else { "P" }, &line[at..end]).unwrap();
        }
    }
    for merge in [Merge::Under("m".into()), Merge::Top] {
        for keep_log in [true, false] {
            let record = RecordOptions { merge: merge.clone(), keep_log, ..RecordOptions::default() };
            let records = texts(dir.path(), LogSettings { record, ..raw() }).await;
            let records: Vec<serde_json::Value> = records.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
            for (record, line) in records.iter().zip(&lines[..4]) {
                let object: serde_json::Value = serde_json::from_str(line).unwrap();
                let found = if merge == Merge::Top { record } else { &record["m"] };
                assert_eq!((&found["bytes"], &found["text"]), (&object["bytes"], &object["text"]), "{merge:?} {keep_log}");
                assert_eq!(record.get("log").and_then(|log| log.as_str()), keep_log.then_some(line.as_str()));
            }
            // What no event has room for is split, as text.
            assert!(records.len() > 5 && records[4..].iter().all(|record| record.get("m").is_none() && record.get("bytes").is_none()));
            let rest: String = records[4..].iter().map(|record| record["log"].as_str().unwrap()).collect();
            assert_eq!(rest, lines[4]);
        }
    }
}

#[tokio::test]
async fn nothing_that_is_to_be_masked_leaves_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(dir.path().join(name("web"))).unwrap();
    let secret = "Zx9".repeat(300);
    let line = format!("{} token={secret} {} card 4111-1111-1111-1111 end", "a".repeat(16_300), "b".repeat(40_000));
    for at in (0..line.len()).step_by(16 << 10) {
        let piece = &line[at..line.len().min(at + (16 << 10))];
        let tag = if at + (16 << 10) < line.len() { "P" } else { "F" };
        writeln!(file, "2026-11-20T10:00:00Z stdout {tag} {piece}").unwrap();
    }
    // One line without any split, longer than what is read at once; the secret lies across the end of the block.
    writeln!(file, "2026-11-20T10:00:01Z stdout F {}token={secret} {}", "c".repeat((256 << 10) - 200), "~".repeat(1_500_000)).unwrap();
    writeln!(file, "{{\"user\":\"u\",\"token=\":\"x\",\"t\":\"token={secret}\"}}").unwrap();
    let mask = |pattern: &str| Redaction { pattern: Regex::new(pattern).unwrap(), replacement: "#".to_owned() };
    let redactions: Arc<[Redaction]> = [mask(r"token=[A-Za-z0-9]+"), mask(r"\d{4}-\d{4}-\d{4}-\d{4}")].into();
    for layout in [Layout::Raw, Layout::FluentBit] {
        let record =
            RecordOptions { layout, merge: if layout == Layout::Raw { Merge::Off } else { Merge::Top }, ..RecordOptions::default() };
        let settings = LogSettings { record, redactions: redactions.clone(), ..raw() };
        let (report, streams) = ship(dir.path(), settings, ClusterState::default()).await;
        assert!(report.counters.redacted >= 3, "{}", report.counters.redacted);
        let all: String = streams.into_iter().flat_map(|(_, events)| events).map(|(_, text)| text).collect();
        assert!(!all.contains("Zx9") && !all.contains("4111"), "{layout:?}");
        assert!(all.contains(&format!("{} # {}", "a".repeat(100), "b".repeat(100))), "{layout:?}");
        assert_eq!(all.matches('~').count(), 1_500_000, "{layout:?}");
    }
}

#[tokio::test]
async fn routes_and_files_of_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("log");
    let containers = dir.path().join("containers");
    fs::create_dir(&node).unwrap();
    fs::create_dir(&containers).unwrap();
    fs::write(node.join("messages"), "Nov 20 10:00:00 host kernel: up\nsecond\n").unwrap();
    fs::write(node.join("messages.1"), "older, and never read before\n").unwrap();
    fs::write(node.join("other"), "not asked for\n").unwrap();
    fs::write(containers.join(name("kube-proxy-1")), "2026-11-20T10:00:00Z stdout F proxy\n").unwrap();
    fs::write(containers.join(name("web")), "2026-11-20T10:00:00Z stdout F web\n").unwrap();
    let settings = LogSettings {
        host_files: vec![HostFiles {
            path: format!("{}/mess*s", node.display()),
            group: "host".to_owned().try_into().unwrap(),
            stream: "{node}.host.{file}".to_owned().try_into().unwrap(),
        }],
        routes: vec![Route {
            files: vec!["kube-proxy-*".into()],
            group: "dataplane".to_owned().try_into().unwrap(),
            stream: "dp.{pod}".to_owned().try_into().unwrap(),
            kubernetes: true,
            node: false,
        }],
        ..raw()
    };
    let (_, streams) = ship(&containers, settings, ClusterState::default()).await;
    let streams: BTreeMap<_, _> =
        streams.into_iter().map(|(stream, events)| (stream, events.into_iter().map(|(_, text)| text).collect::<Vec<_>>())).collect();
    assert_eq!(streams["n.host.messages"], ["Nov 20 10:00:00 host kernel: up", "second"]);
    assert_eq!(streams["dp.kube-proxy-1"], ["proxy"]);
    assert_eq!(streams[&format!("n-application.var.log.containers.{}", name("web"))], ["web"]);
    assert_eq!(streams.len(), 3);
}

/// No filter of Container Insights merges them.
#[tokio::test]
async fn a_json_line_of_the_nodes_files_stays_text() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("audit"), "{\"a\":1}\n\r\n\n").unwrap();
    let [group, stream] = ["host", "{file}"].map(|text| text.to_owned().try_into().unwrap());
    let host_files = vec![HostFiles { path: dir.path().join("audit").display().to_string(), group, stream }];
    let settings = LogSettings { host_files, age: None, stream_puts: 1, ..LogSettings::container_insights(Layout::FluentBit) };
    let containers = tempfile::tempdir().unwrap();
    // A line of nothing but a carriage return is one, as with Fluent Bit.
    assert_eq!(texts(containers.path(), settings).await, [r#"{"log":"{\"a\":1}"}"#, r#"{"log":"\r"}"#]);
}

#[tokio::test]
async fn a_pod_names_the_parser_of_its_lines() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join(name("web")),
        "2026-11-20T10:00:00Z stdout F level=info n=1\n2026-11-20T10:00:01Z stderr F {\"json\":1}\n2026-11-20T10:00:02Z stdout F {\"json\":2}\n",
    )
    .unwrap();
    let pod = serde_json::json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u", "annotations": {
            "fluentbit.io/parser_stdout-app": "logfmt", "fluentbit.io/parser": "unheard-of"}},
        "spec": {"nodeName": "n", "containers": [{"name": "app", "image": "i"}]},
        "status": {},
    });
    let mut shipped = Vec::new();
    for honour_parser in [true, false] {
        let mut cluster = ClusterState::default();
        cluster.apply(Object::Pod(serde_json::from_value(pod.clone()).unwrap()));
        let record = RecordOptions { merge: Merge::Under("m".into()), keep_log: false, ..RecordOptions::default() };
        let settings = LogSettings { record, honour_parser, ..raw() };
        let (report, streams) = ship(dir.path(), settings, cluster).await;
        assert_eq!(report.counters.unparsed, u64::from(honour_parser), "a line that logfmt is not for");
        let records = streams[0].1.iter().map(|(_, text)| serde_json::from_str::<serde_json::Value>(text).unwrap());
        shipped.push(records.map(|record| (record["m"].clone(), record["log"].clone())).collect::<Vec<_>>());
    }
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let null = serde_json::Value::Null;
    assert_eq!(
        shipped[0],
        [
            (json(r#"{"level":"info","n":"1"}"#), null.clone()),
            (json(r#"{"json":1}"#), null.clone()),
            (null.clone(), json(r#""{\"json\":2}""#))
        ]
    );
    assert_eq!(
        shipped[1],
        [(null.clone(), json(r#""level=info n=1""#)), (json(r#"{"json":1}"#), null.clone()), (json(r#"{"json":2}"#), null)]
    );
}

#[tokio::test]
async fn hundreds_of_compressed_files_are_read_a_few_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    for pod in 0..60 {
        let live = dir.path().join(name(&format!("p{pod}")));
        fs::write(&live, "2026-11-20T10:00:09Z stdout F live\n").unwrap();
        for rotation in 0..3 {
            let path = format!("{}.20261121-00000{rotation}.gz", live.display());
            let mut gz = flate2::write::GzEncoder::new(fs::File::create(path).unwrap(), flate2::Compression::fast());
            for line in 0..50 {
                writeln!(gz, "2026-11-20T10:00:0{rotation}Z stdout F {pod} {rotation} {line}").unwrap();
            }
            gz.finish().unwrap();
        }
    }
    let events = texts(dir.path(), raw()).await;
    assert_eq!(events.len(), 60 * 151);
    // One that is broken in the middle does not keep the rest of its family back.
    let broken = format!("{}.20261121-000001.gz", dir.path().join(name("p0")).display());
    let whole = fs::read(&broken).unwrap();
    fs::write(&broken, &whole[..whole.len() / 2]).unwrap();
    let (report, streams) = ship(dir.path(), raw(), ClusterState::default()).await;
    let count: usize = streams.iter().map(|(_, events)| events.len()).sum();
    assert!((60 * 151 - 50..60 * 151).contains(&count), "{count}");
    assert!(report.counters.file_errors > 0 && !report.failed.is_empty(), "and it is told");
}

/// Pods that mount the node's /var/log can put anything there.
#[tokio::test]
async fn what_is_no_log_file_is_told_and_holds_up_nobody() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let (logs, pods) = (dir.path().join("containers"), dir.path().join("pods/shop_good_1/app"));
    fs::create_dir(&logs).unwrap();
    fs::create_dir_all(&pods).unwrap();
    fs::write(pods.join("0.log"), "2026-11-21T00:00:00.000000000Z stdout F a line\n").unwrap();
    symlink(pods.join("0.log"), logs.join(name("good"))).unwrap();
    symlink("/etc/passwd", logs.join(name("thief"))).unwrap();
    nix::unistd::mkfifo(&logs.join(name("pipe")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/dev/zero", logs.join(name("endless"))).unwrap();
    symlink(logs.join(name("loop")), logs.join(name("loop"))).unwrap();
    fs::create_dir(logs.join(name("directory"))).unwrap();
    // Beside a good file: a rotated one that is none.
    symlink("/etc/passwd", pods.join("0.log.20261121-000000")).unwrap();
    let (report, streams) = ship(&logs, raw(), ClusterState::default()).await;
    let lines: Vec<_> = streams.iter().flat_map(|(_, lines)| lines.iter().map(|(_, text)| text.as_str())).collect();
    assert_eq!(lines, ["a line"]);
    let failed: Vec<_> = report.failed.iter().map(|(path, why)| format!("{path}: {why}")).collect();
    for (what, why) in
        [("thief", "/etc/passwd"), ("pipe", "regular"), ("endless", "/dev/zero"), ("directory", "regular"), ("0.log.2026", "")]
    {
        assert!(failed.iter().any(|told| told.contains(what) && told.contains(why)), "{what}: {failed:?}");
    }
}
