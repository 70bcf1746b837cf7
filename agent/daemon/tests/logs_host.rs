//! Log files of the node itself, which are renamed in many ways: each line once, under whatever name.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;

use stanchion_core::logs::positions::Positions;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::{HostFiles, LogSettings, ReadFrom};
use stanchion_daemon::logs::{Now, Restored, Tailer, TailerParts};

struct Node {
    root: tempfile::TempDir,
    mono: i64,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("containers")).unwrap();
        fs::create_dir(root.path().join("log")).unwrap();
        Self { root, mono: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("log").join(name)
    }

    fn create(&self, name: &str) -> File {
        File::options().create(true).append(true).open(self.path(name)).unwrap()
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    fn tailer(&self, glob: &str, read_from: ReadFrom, restored: Restored) -> Tailer {
        let [group, stream] = ["host", "{node}.{file}"].map(|text| text.to_owned().try_into().unwrap());
        let host = HostFiles { path: self.path(glob).display().to_string(), group, stream };
        let settings = LogSettings { age: None, read_from, host_files: vec![host], ..LogSettings::new(Layout::Raw) };
        let log_dir = self.root.path().join("containers");
        Tailer::new(TailerParts { settings, log_dir, node: "n".into(), cluster_name: "c".into() }, restored)
    }

    /// Sweeps for a minute and a half, and sends and acknowledges all that can be read. The messages, in order.
    fn ship(&mut self, tailer: &mut Tailer) -> Vec<String> {
        let mut messages = Vec::new();
        for _ in 0..9 {
            messages.extend(self.look(tailer));
            self.mono += 10_000;
        }
        messages.sort();
        messages
    }

    /// Sweeps once.
    fn look(&mut self, tailer: &mut Tailer) -> Vec<String> {
        let now = Now { mono: self.mono, wall: 1_795_168_800_000 };
        let mut messages = Vec::new();
        tailer.scan(now).unwrap();
        loop {
            let progress = tailer.turn(now).progress;
            tailer.seal_all();
            for sealed in tailer.take_ready() {
                messages.extend(sealed.batch.events().map(|event| event.message));
                tailer.acknowledge(sealed.id, None, now);
            }
            if !progress {
                return messages;
            }
        }
    }
}

fn restored(tailer: &Tailer) -> Restored {
    Restored::Positions(Positions::parse(&tailer.positions().to_json(), "n").unwrap())
}

#[test]
fn files_that_are_asked_for_later_begin_as_the_setting_says() {
    let mut node = Node::new();
    writeln!(node.create("app.log"), "followed").unwrap();
    writeln!(node.create("messages"), "old").unwrap();
    let mut tailer = node.tailer("*.log", ReadFrom::Head, Restored::Fresh);
    assert_eq!(node.ship(&mut tailer), ["followed"]);
    let mut later = node.tailer("messages", ReadFrom::Tail, restored(&tailer));
    assert_eq!(node.ship(&mut later), [""; 0]);
    writeln!(node.create("messages"), "new").unwrap();
    assert_eq!(node.ship(&mut later), ["new"]);
    // A file that comes to those that were asked for before is read whole.
    let saved = restored(&tailer);
    writeln!(node.create("other.log"), "whole").unwrap();
    let mut again = node.tailer("*.log", ReadFrom::Tail, saved);
    assert_eq!(node.ship(&mut again), ["whole"]);
}
