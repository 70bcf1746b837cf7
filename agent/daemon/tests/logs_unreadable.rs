//! Files and directories that cannot be read: they keep nobody else's lines back, and are read when they can be.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::{HostFiles, LogSettings};
use stanchion_daemon::logs::{Now, Restored, Tailer, TailerParts};

/// A container's live log in a tree of pods, of one line.
fn container(root: &Path, pod: &str) -> PathBuf {
    let live = root.join(format!("shop_{pod}_uid-{pod}/app/0.log"));
    fs::create_dir_all(live.parent().unwrap()).unwrap();
    fs::write(&live, format!("2026-11-20T10:00:00Z stdout F of {pod}\n")).unwrap();
    live
}

fn tailer(root: &Path, restored: Restored, host_files: Vec<HostFiles>) -> Tailer {
    let settings = LogSettings { age: None, host_files, ..LogSettings::new(Layout::Raw) };
    Tailer::new(TailerParts { settings, log_dir: root.to_owned(), node: "n".into(), cluster_name: "c".into() }, restored)
}

/// Sweeps, and sends and acknowledges all that can be read. The messages, in order.
fn read(tailer: &mut Tailer, mono: i64) -> Vec<String> {
    let now = Now { mono, wall: 1_795_168_800_000 };
    tailer.scan(now).unwrap();
    // The pods are not known: their lines wait for three seconds.
    let later = Now { mono: mono + 5_000, ..now };
    let mut messages = Vec::new();
    loop {
        let progress = tailer.turn(later).progress;
        tailer.seal_all();
        for sealed in tailer.take_ready() {
            messages.extend(sealed.batch.events().map(|event| event.message));
            tailer.acknowledge(sealed.id, None, later);
        }
        if !progress {
            messages.sort();
            return messages;
        }
    }
}

#[test]
fn a_directory_that_cannot_be_listed_keeps_only_its_own_lines_back() {
    let dir = tempfile::tempdir().unwrap();
    let (root, aside) = (dir.path().join("pods"), dir.path().join("aside"));
    container(&root, "web");
    let theirs = container(&root, "db");
    let directory = theirs.parent().unwrap();
    let mut before = tailer(&root, Restored::Fresh, Vec::new());
    assert_eq!(read(&mut before, 0), ["of db", "of web"]);
    let positions = before.positions();

    // The kernel refuses to list it; so for the directory of a file of the node's.
    fs::rename(directory, &aside).unwrap();
    fs::write(directory, "in the way").unwrap();
    let [group, stream] = ["host", "n"].map(|text| text.to_owned().try_into().unwrap());
    let host = HostFiles { path: directory.join("*.log").display().to_string(), group, stream };
    let mut next = tailer(&root, Restored::Positions(positions), vec![host]);
    container(&root, "new");
    assert_eq!(read(&mut next, 0), ["of new"]);
    assert!(next.counters_mut().file_errors > 0, "and it is counted");

    fs::remove_file(directory).unwrap();
    fs::rename(&aside, directory).unwrap();
    fs::File::options().append(true).open(&theirs).unwrap().write_all(b"2026-11-20T10:00:01Z stdout F more of db\n").unwrap();
    assert_eq!(read(&mut next, 60_000), ["more of db"], "what was acknowledged is not sent again");
}

#[test]
fn a_rotated_file_that_cannot_be_opened_keeps_no_other_back() {
    let dir = tempfile::tempdir().unwrap();
    let live = container(dir.path(), "web");
    let sibling = |suffix: &str| PathBuf::from(format!("{}.{suffix}", live.display()));
    // As a crash of the node leaves them: without what was written last, or without anything.
    fs::write(sibling("20261120-090000.gz"), "").unwrap();
    fs::write(sibling("20261120-091000.gz"), "not compressed").unwrap();
    let mut tailer = tailer(dir.path(), Restored::Fresh, Vec::new());
    assert_eq!(read(&mut tailer, 0), ["of web"]);
    assert!(tailer.counters_mut().file_errors > 0);

    // Again while it is followed.
    fs::rename(&live, sibling("20261120-100000")).unwrap();
    fs::write(sibling("20261120-095000.gz"), "not compressed").unwrap();
    fs::write(&live, "2026-11-20T10:00:02Z stdout F of the next file\n").unwrap();
    assert_eq!(read(&mut tailer, 60_000), ["of the next file"]);
}
