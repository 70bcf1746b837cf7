//! The node's journal, from files that systemd wrote: each entry once to each of its streams, through growth, rename, restart.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use stanchion_core::logs::journal::JournalSettings;
use stanchion_core::logs::positions::{Positions, VERSION};
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::{LogSettings, ReadFrom, Redaction};
use stanchion_daemon::logs::{Now, Restored, Tailer, TailerParts};

/// Where the header counts the entries that are complete.
const ENTRIES_AT: u64 = 152;
const ALL: u64 = 308;
/// A little after the newest entry, in milliseconds since 1970.
const AFTER: i64 = 1_795_169_200_000;

struct Node {
    root: tempfile::TempDir,
    mono: i64,
}

impl Node {
    /// A node whose journal has `entries`.
    fn new(entries: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("journal/machine")).unwrap();
        fs::create_dir(root.path().join("containers")).unwrap();
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/testdata/journal/zstd-compact.journal.gz");
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(fs::File::open(packed).unwrap()).read_to_end(&mut bytes).unwrap();
        let node = Self { root, mono: 0 };
        fs::write(node.live(), bytes).unwrap();
        node.grow(entries);
        node
    }

    fn live(&self) -> PathBuf {
        self.root.path().join("journal/machine/system.journal")
    }

    /// The writer completes entries up to this many.
    fn grow(&self, entries: u64) {
        let file = fs::File::options().write(true).open(self.live()).unwrap();
        file.write_all_at(&entries.to_le_bytes(), ENTRIES_AT).unwrap();
    }

    fn tailer(&self, read_from: ReadFrom, restored: Restored) -> Tailer {
        let dirs = vec![self.root.path().join("journal").to_string_lossy().into_owned(), "/nonexistent/journal".to_owned()];
        let journal = JournalSettings { dirs, read_from, ..JournalSettings::default() };
        let mask = Redaction { pattern: regex_lite::Regex::new("publickey").unwrap(), replacement: "***".to_owned() };
        let settings = LogSettings { journal: Some(journal), redactions: [mask].into(), ..LogSettings::new(Layout::FluentBit) };
        let log_dir = self.root.path().join("containers");
        Tailer::new(TailerParts { settings, log_dir, node: "n".into(), cluster_name: "gold".into() }, restored)
    }

    /// Everything that can be read now is read and acknowledged; events by stream.
    fn ship(&mut self, tailer: &mut Tailer) -> BTreeMap<String, Vec<String>> {
        let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
        tailer.scan(self.now()).unwrap();
        tailer.hurry();
        loop {
            self.mono += 1;
            let progress = tailer.turn(self.now()).progress;
            if !progress {
                tailer.seal_all();
            }
            let ready = tailer.take_ready();
            if ready.is_empty() && !progress {
                return seen;
            }
            for sealed in ready {
                let messages = sealed.batch.events().map(|event| event.message);
                seen.entry(sealed.batch.stream().to_owned()).or_default().extend(messages);
                tailer.acknowledge(sealed.id, None, self.now());
            }
        }
    }

    fn now(&self) -> Now {
        Now { mono: self.mono, wall: AFTER }
    }
}

fn counts(seen: &BTreeMap<String, Vec<String>>) -> Vec<(&str, usize)> {
    seen.iter().map(|(stream, events)| (stream.as_str(), events.len())).collect()
}

const WHOLE: [(&str, usize); 5] = [
    ("n-dataplane.systemd.containerd.service", 2),
    ("n-dataplane.systemd.kubelet.service", 301),
    ("n.host.dmesg", 1),
    ("n.host.messages", 304),
    ("n.host.secure", 1),
];

#[test]
fn each_entry_reaches_its_streams() {
    let mut node = Node::new(ALL);
    let mut tailer = node.tailer(ReadFrom::Head, Restored::Fresh);
    let seen = node.ship(&mut tailer);
    assert_eq!(counts(&seen), WHOLE);
    assert_eq!(seen["n.host.secure"], [r#"{"host":"ip-10-0-1-23","ident":"sshd","message":"Accepted ***","pid":"77"}"#], "masked");
    let snapshot = tailer.snapshot(node.now());
    assert_eq!((snapshot.counters.journal_entries, snapshot.counters.journal_unreadable), (ALL, 0));
    let status = &snapshot.files[0];
    assert_eq!((status.lag_bytes, status.lag_seconds, status.last_error.as_deref()), (0, 0, None), "{status:?}");
    assert!(status.path.ends_with("system.journal"));
}

#[test]
fn a_fresh_agent_begins_at_the_end_and_follows_through_a_rename() {
    let mut node = Node::new(100);
    let mut tailer = node.tailer(ReadFrom::Tail, Restored::Fresh);
    // The tail of the header is that of the whole file: as if the last entries were being written.
    assert_eq!(counts(&node.ship(&mut tailer)), []);
    drop(tailer);
    let mut tailer = node.tailer(ReadFrom::Head, Restored::Fresh);
    let before = node.ship(&mut tailer)["n.host.messages"].len();
    node.grow(150);
    assert_eq!(counts(&node.ship(&mut tailer)), [("n-dataplane.systemd.kubelet.service", 50), ("n.host.messages", 50)]);
    node.grow(ALL);
    fs::rename(node.live(), node.live().with_file_name("system@archived.journal")).unwrap();
    let after = node.ship(&mut tailer)["n.host.messages"].len();
    assert_eq!(before + 50 + after, 304);
    assert!(tailer.snapshot(node.now()).files[0].path.ends_with("system@archived.journal"));
    fs::remove_file(node.live().with_file_name("system@archived.journal")).unwrap();
    assert_eq!(counts(&node.ship(&mut tailer)), []);
    assert_eq!(tailer.snapshot(node.now()).files, [], "a file that is gone and read is forgotten");
    assert_eq!(tailer.positions().files, []);
}

#[test]
fn a_restart_goes_on_behind_what_is_acknowledged() {
    for acknowledged in [true, false] {
        let mut node = Node::new(100);
        let mut tailer = node.tailer(ReadFrom::Head, Restored::Fresh);
        if acknowledged {
            node.ship(&mut tailer);
        } else {
            tailer.scan(node.now()).unwrap();
            while tailer.turn(node.now()).progress {
                node.mono += 1;
            }
        }
        let saved = tailer.positions().to_json();
        drop(tailer);
        node.grow(ALL);
        let restored = Restored::Positions(Positions::parse(&saved, "n").unwrap());
        let mut tailer = node.tailer(ReadFrom::Tail, restored);
        let seen = node.ship(&mut tailer);
        if acknowledged {
            assert_eq!(counts(&seen), [("n-dataplane.systemd.kubelet.service", 208), ("n.host.messages", 208)]);
        } else {
            assert_eq!(counts(&seen), WHOLE, "what was read and not acknowledged is read again");
        }
    }
}

#[test]
fn a_journal_that_is_asked_for_later_begins_as_the_setting_says() {
    for (read_from, expected) in [(ReadFrom::Tail, &[][..]), (ReadFrom::Head, &WHOLE)] {
        let mut node = Node::new(ALL);
        let positions = Positions { version: VERSION, node: "n".into(), files: Vec::new() };
        let mut tailer = node.tailer(read_from, Restored::Positions(positions));
        assert_eq!(counts(&node.ship(&mut tailer)), expected);
        let saved = Positions::parse(&tailer.positions().to_json(), "n").unwrap();
        let mut tailer = node.tailer(ReadFrom::Head, Restored::Positions(saved));
        assert_eq!(counts(&node.ship(&mut tailer)), [], "its place is remembered");
    }
}

#[test]
fn another_file_beside_it_is_no_harm() {
    let mut node = Node::new(ALL);
    fs::write(node.live().with_file_name("empty.journal"), "").unwrap();
    fs::write(node.live().with_file_name("other.journal~"), [7; 4096]).unwrap();
    let mut later = fs::read(node.live()).unwrap();
    later[13] = 0x40;
    fs::write(node.live().with_file_name("later.journal"), later).unwrap();
    let mut tailer = node.tailer(ReadFrom::Head, Restored::Unusable);
    assert_eq!(counts(&node.ship(&mut tailer)), WHOLE);
    assert!(tailer.snapshot(node.now()).counters.file_errors > 0, "the one of a later systemd is told");
}
