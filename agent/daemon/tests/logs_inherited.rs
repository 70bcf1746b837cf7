//! The first start after Fluent Bit: no line of what it sent is sent again, none of what it did not send is lost.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, params};
use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::cluster::ClusterState;
use stanchion_core::logs::LogBatch;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::{LogSettings, ReadFrom};
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::logs::{LogsParts, spawn};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What was sent.
#[derive(Clone, Default)]
struct Sent(Arc<Mutex<Vec<String>>>);

impl LogSink for Sent {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        self.0.lock().unwrap().extend(batch.events().map(|event| event.message));
        Ok(Rejected::default())
    }

    async fn create_group(&self, _: &str, _: &LogGroupSpec) -> Result<(), SinkError> {
        Ok(())
    }

    async fn create_stream(&self, _: &str, _: &str) -> Result<(), SinkError> {
        Ok(())
    }
}

/// A node with /var/log/pods, the links of /var/log/containers, and Fluent Bit's state.
struct Node {
    root: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for dir in ["pods", "containers", "state", "flb/flb-storage/tail.0"] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        Self { root }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn link(&self, pod: &str) -> PathBuf {
        self.dir("containers").join(format!("{pod}_shop_app-{pod}id.log"))
    }

    fn live(&self, pod: &str) -> PathBuf {
        self.dir("pods").canonicalize().unwrap().join(format!("shop_{pod}_uid-{pod}/app/0.log"))
    }

    /// Writes to a container's log, which is there from then on; the file's size.
    fn write(&self, pod: &str, text: &str) -> u64 {
        let live = self.live(pod);
        if !live.exists() {
            fs::create_dir_all(live.parent().unwrap()).unwrap();
            fs::write(&live, "").unwrap();
            drop(fs::remove_file(self.link(pod)));
            symlink(&live, self.link(pod)).unwrap();
        }
        fs::File::options().append(true).open(&live).unwrap().write_all(text.as_bytes()).unwrap();
        fs::metadata(&live).unwrap().len()
    }

    /// As the kubelet does it.
    fn rotate(&self, pod: &str) -> PathBuf {
        let rotated = PathBuf::from(format!("{}.20261122-100000", self.live(pod).display()));
        fs::rename(self.live(pod), &rotated).unwrap();
        rotated
    }

    /// Fluent Bit's database, open.
    fn fluent_bit(&self) -> FluentBit {
        let connection = Connection::open(self.dir("flb/flb_container.db")).unwrap();
        connection.execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL").unwrap();
        let table = "CREATE TABLE IF NOT EXISTS in_tail_files (id INTEGER PRIMARY KEY, name TEXT NOT NULL, offset INTEGER, inode INTEGER, created INTEGER, rotated INTEGER DEFAULT 0)";
        connection.execute(table, []).unwrap();
        FluentBit(connection)
    }

    /// Lines that an agent sends which never ran here, until everything was read.
    async fn sent(&self) -> Vec<String> {
        self.sent_from(ReadFrom::Head).await
    }

    async fn sent_from(&self, read_from: ReadFrom) -> Vec<String> {
        let (sent, shutdown) = (Sent::default(), CancellationToken::new());
        let state = self.dir("flb");
        let (handle, task) = spawn(LogsParts {
            settings: LogSettings { age: None, read_from, fluent_bit_state: state, ..LogSettings::new(Layout::Raw) },
            sink: sent.clone(),
            cluster: ClusterHandle::fixed(ClusterState { synced: true, ..ClusterState::default() }).watch(),
            node: "n".to_owned(),
            cluster_name: "c".to_owned(),
            state_dir: self.dir("state"),
            log_dir: self.dir("containers"),
            shutdown: shutdown.clone(),
            grace: Duration::from_secs(10),
            wall: SystemTime::now,
        });
        tokio::time::sleep(Duration::from_secs(2)).await;
        let asked = Instant::now();
        assert!(handle.snapshot().await.is_some() && asked.elapsed() < Duration::from_secs(2), "it answers whatever it waits for");
        tokio::time::sleep(Duration::from_mins(2)).await;
        shutdown.cancel();
        task.await.unwrap();
        let mut lines = sent.0.lock().unwrap().clone();
        lines.sort();
        lines
    }
}

struct FluentBit(Connection);

impl FluentBit {
    fn read(&self, name: &Path, file: &Path, offset: u64) {
        let inode = fs::metadata(file).unwrap().ino();
        let row = "INSERT INTO in_tail_files (name, offset, inode, created) VALUES (?, ?, ?, 1700000000)";
        self.0.execute(row, params![name.to_str().unwrap(), offset.cast_signed(), inode.cast_signed()]).unwrap();
    }

    fn end(self) {
        self.0.close().unwrap();
    }
}

fn line(second: u32, tag: &str, text: &str) -> String {
    format!("2026-11-22T10:00:{second:02}Z stdout {tag} {text}\n")
}

#[tokio::test(start_paused = true)]
async fn what_fluent_bit_read_is_not_sent_again() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    let size = node.write("web", &line(1, "F", "sent"));
    fluent_bit.read(&node.link("web"), &node.live("web"), size);
    node.write("web", &line(2, "F", "written while no agent ran"));

    // Rotated after Fluent Bit had read a part of it; an older one is done.
    let oldest = PathBuf::from(format!("{}.20261122-090000", node.live("job").display()));
    node.write("job", &line(1, "F", "older"));
    fs::rename(node.live("job"), &oldest).unwrap();
    let size = node.write("job", &line(2, "F", "old"));
    let rotated = node.rotate("job");
    fluent_bit.read(&rotated, &rotated, size);
    fs::File::options().append(true).open(&rotated).unwrap().write_all(line(3, "F", "the rest of a rotated file").as_bytes()).unwrap();
    node.write("job", &line(4, "F", "a file that it never saw"));

    // The runtime's parts of a long line: Fluent Bit held them and sent nothing.
    let begin = node.write("long", &line(1, "F", "short"));
    node.write("long", &line(2, "P", "one "));
    let size = node.write("long", &line(2, "P", "two "));
    fluent_bit.read(&node.link("long"), &node.live("long"), size);
    node.write("long", &line(2, "F", "three"));
    assert!(begin < size);

    node.write("new", &line(1, "F", "a pod that it never saw"));
    fluent_bit.end();
    let wanted = [
        "a file that it never saw",
        "a pod that it never saw",
        "one two three",
        "the rest of a rotated file",
        "written while no agent ran",
    ];
    assert_eq!(node.sent().await, wanted);
    assert_eq!(node.sent().await, [""; 0], "from then on our own positions count");
}

#[tokio::test(start_paused = true)]
async fn the_row_of_another_file_says_nothing() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    let size = node.write("web", &line(1, "F", "first"));
    fluent_bit.read(&node.link("gone"), &node.live("web"), size);
    node.write("cut", &line(1, "F", "written again after it was truncated"));
    fluent_bit.read(&node.link("cut"), &node.live("cut"), 10_000);
    // A rotated file that was deleted since gave its inode to the live one.
    node.write("job", &line(1, "F", "of a new file"));
    fluent_bit.read(&node.live("job").with_file_name("0.log.20261122-090000"), &node.live("job"), 10);
    fluent_bit.end();
    assert_eq!(node.sent().await, ["first", "of a new file", "written again after it was truncated"]);
}

#[tokio::test(start_paused = true)]
async fn a_file_of_which_lines_were_not_sent_is_begun_anew() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    for pod in ["web", "db"] {
        let size = node.write(pod, &line(1, "F", &format!("of {pod}")));
        fluent_bit.read(&node.link(pod), &node.live(pod), size);
    }
    let chunk = |metadata: &str, lines: &str| {
        let len = u16::try_from(metadata.len()).unwrap().to_be_bytes();
        [b"\xc1\x00", &[0; 20][..], &len, metadata.as_bytes(), lines.as_bytes()].concat()
    };
    let (web, db) = (node.link("web"), node.link("db"));
    let [web, db] = [&web, &db].map(|link| link.file_name().unwrap().to_str().unwrap());
    let of_web = chunk(&format!("\u{1}application.var.log.containers.{web}"), &format!("a line that names {db}"));
    fs::write(node.dir("flb/flb-storage/tail.0/1-1795168800.1.flb"), of_web).unwrap();
    // Of another input: no file's.
    fs::create_dir(node.dir("flb/flb-storage/systemd.1")).unwrap();
    fs::write(node.dir("flb/flb-storage/systemd.1/1-1795168800.2.flb"), "dataplane.systemd.kubelet.service").unwrap();
    fluent_bit.end();
    assert_eq!(node.sent().await, ["of web"]);
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_cannot_be_read_may_be_of_any_file() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    let size = node.write("web", &line(1, "F", "of web"));
    fluent_bit.read(&node.link("web"), &node.live("web"), size);
    fs::write(node.dir("flb/flb-storage/tail.0/1-1795168800.1.flb"), "cut off").unwrap();
    fluent_bit.end();
    assert_eq!(node.sent().await, ["of web"]);
}

#[tokio::test(start_paused = true)]
async fn a_fluent_bit_that_still_runs_is_waited_for() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    let size = node.write("web", &line(1, "F", "sent"));
    node.write("web", &line(2, "F", "sent in its last second"));
    let link = node.link("web");
    let live = node.live("web");
    fluent_bit.read(&link, &live, size);
    let ends = async {
        tokio::time::sleep(Duration::from_secs(9)).await;
        let size = fs::metadata(&live).unwrap().len();
        fluent_bit.read(&link, &live, size);
        fluent_bit.end();
        node.write("web", &line(3, "F", "after its end"));
    };
    let ((), sent) = tokio::join!(ends, node.sent());
    assert_eq!(sent, ["after its end"]);
}

#[tokio::test(start_paused = true)]
async fn a_fluent_bit_that_was_killed_or_goes_on_is_not_waited_for_longer_than_it_may_take() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    let size = node.write("web", &line(1, "F", "sent"));
    fluent_bit.read(&node.link("web"), &node.live("web"), size);
    node.write("web", &line(2, "F", "not sent"));
    assert!(node.dir("flb/flb_container.db-wal").exists(), "its log holds the row");
    assert_eq!(node.sent().await, ["not sent"]);
    fluent_bit.end();
}

#[tokio::test(start_paused = true)]
async fn a_database_that_cannot_be_read_leaves_every_file_from_its_beginning() {
    let node = Node::new();
    node.write("web", &line(1, "F", "first"));
    fs::write(node.dir("flb/flb_container.db"), "not a database").unwrap();
    assert_eq!(node.sent().await, ["first"]);
}

/// As a configuration with `Read_from_Head Off` is translated.
#[tokio::test(start_paused = true)]
async fn what_began_after_fluent_bits_end_is_read_whole_also_where_old_files_are_not() {
    let node = Node::new();
    let fluent_bit = node.fluent_bit();
    let size = node.write("web", &line(1, "F", "sent"));
    fluent_bit.read(&node.link("web"), &node.live("web"), size);
    fluent_bit.end();
    node.write("new", &line(2, "F", "of a pod that came in between"));
    assert_eq!(node.sent_from(ReadFrom::Tail).await, ["of a pod that came in between"]);
}

#[tokio::test(start_paused = true)]
async fn a_database_of_no_files_says_nothing() {
    let node = Node::new();
    node.write("web", &line(1, "F", "old"));
    node.fluent_bit().end();
    assert_eq!(node.sent_from(ReadFrom::Tail).await, [""; 0], "Fluent Bit read the journal here, and no file");
}
