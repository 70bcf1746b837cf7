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
fn a_file_renamed_to_a_name_that_is_followed_too_is_sent_once() {
    let mut node = Node::new();
    let mut old = node.create("app.log");
    write!(old, "one\ntwo\nthree\n").unwrap();
    let mut tailer = node.tailer("*.log", ReadFrom::Head, Restored::Fresh);
    assert_eq!(node.ship(&mut tailer), ["one", "three", "two"]);
    node.rename("app.log", "app-1.log");
    let mut new = node.create("app.log");
    writeln!(new, "of the new file").unwrap();
    writeln!(old, "late").unwrap();
    assert_eq!(node.ship(&mut tailer), ["late", "of the new file"]);
    writeln!(old, "later still").unwrap();
    writeln!(new, "more").unwrap();
    assert_eq!(node.ship(&mut tailer), ["later still", "more"]);
    // Once more, and both at once.
    node.rename("app-1.log", "app-2.log");
    node.rename("app.log", "app-1.log");
    writeln!(node.create("app.log"), "of the third file").unwrap();
    writeln!(new, "last").unwrap();
    assert_eq!(node.ship(&mut tailer), ["last", "of the third file"]);
}

#[test]
fn a_file_renamed_while_nobody_looked_is_sent_once() {
    for name in ["app-1.log", "bpp.log"] {
        let mut node = Node::new();
        let mut old = node.create("app.log");
        write!(old, "one\ntwo\n").unwrap();
        let mut tailer = node.tailer("*.log", ReadFrom::Head, Restored::Fresh);
        assert_eq!(node.ship(&mut tailer), ["one", "two"]);
        let saved = restored(&tailer);
        node.rename("app.log", name);
        writeln!(old, "late").unwrap();
        writeln!(node.create("app.log"), "of the new file").unwrap();
        let mut tailer = node.tailer("*.log", ReadFrom::Head, saved);
        assert_eq!(node.ship(&mut tailer), ["late", "of the new file"], "{name}");
        let mut tailer = node.tailer("*.log", ReadFrom::Head, restored(&tailer));
        assert_eq!(node.ship(&mut tailer), [""; 0], "{name}");
    }
}

#[test]
fn numbers_that_move_up_by_one_send_nothing_twice() {
    let mut node = Node::new();
    let mut tailer = node.tailer("messages*", ReadFrom::Head, Restored::Fresh);
    for round in 0..5 {
        for number in (0..round).rev() {
            let name = |number| if number == 0 { "messages".to_owned() } else { format!("messages.{number}") };
            node.rename(&name(number), &name(number + 1));
        }
        writeln!(node.create("messages"), "line {round}").unwrap();
        assert_eq!(node.ship(&mut tailer), [format!("line {round}")]);
    }
    let mut tailer = node.tailer("messages*", ReadFrom::Head, restored(&tailer));
    assert_eq!(node.ship(&mut tailer), [""; 0]);
}

#[test]
fn another_file_with_the_inode_of_a_renamed_one_is_read_from_its_beginning() {
    let mut node = Node::new();
    writeln!(node.create("app.log"), "one").unwrap();
    let mut tailer = node.tailer("*.log", ReadFrom::Head, Restored::Fresh);
    assert_eq!(node.ship(&mut tailer), ["one"]);
    let saved = restored(&tailer);
    fs::write(node.path("app.log"), "another\n").unwrap();
    node.rename("app.log", "app-1.log");
    let mut tailer = node.tailer("*.log", ReadFrom::Head, saved);
    assert_eq!(node.ship(&mut tailer), ["another"]);
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
