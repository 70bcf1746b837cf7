//! A node that has no inotify instance left: looking is enough.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::logs::{JsonLines, LogsParts, spawn};
use tokio_util::sync::CancellationToken;

/// The limit is that of a user namespace of its own, so that nobody else's instances run out.
#[test]
fn lines_arrive_where_inotify_has_no_instance_left() {
    let program = std::env::current_exe().unwrap();
    let script = "echo 0 > /proc/sys/user/max_inotify_instances && exec \"$0\" --ignored --exact ships_without_events --nocapture";
    let output = Command::new("unshare").args(["--user", "--map-root-user", "sh", "-c", script]).arg(program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "is the process that the other test starts"]
fn ships_without_events() {
    assert!(notify::recommended_watcher(|_| {}).is_err(), "the limit holds");
    let root = tempfile::tempdir().unwrap();
    let containers = root.path().join("containers");
    fs::create_dir(&containers).unwrap();
    let live = containers.join(format!("web_shop_app-{:064x}.log", 1));
    let out = root.path().join("out");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        write(&live, "first");
        let shutdown = CancellationToken::new();
        let (_cluster, receiver) = tokio::sync::watch::channel(Default::default());
        let (_handle, task) = spawn(LogsParts {
            settings: LogSettings { flush: Duration::from_millis(100), ..LogSettings::new(Layout::Raw) }.in_order(),
            sink: JsonLines::file(&out).unwrap(),
            cluster: receiver,
            node: "n".into(),
            cluster_name: "c".into(),
            state_dir: root.path().to_owned(),
            log_dir: containers.clone(),
            shutdown: shutdown.clone(),
            grace: Duration::from_secs(5),
            wall: SystemTime::now,
        });
        arrives(&out, "first").await;
        write(&live, "grown");
        arrives(&out, "grown").await;
        fs::rename(&live, live.with_extension("log.1")).unwrap();
        write(&live, "after a rotation");
        arrives(&out, "after a rotation").await;
        write(&containers.join(format!("new_shop_app-{:064x}.log", 2)), "another container");
        arrives(&out, "another container").await;
        shutdown.cancel();
        task.await.unwrap();
    });
}

fn write(file: &Path, text: &str) {
    let mut file = fs::File::options().create(true).append(true).open(file).unwrap();
    writeln!(file, "2026-11-20T10:00:00Z stdout F {text}").unwrap();
}

/// Within two sweeps.
async fn arrives(out: &Path, text: &str) {
    let seen = async {
        while !fs::read_to_string(out).unwrap_or_default().contains(text) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(25), seen).await.unwrap_or_else(|_| panic!("{text:?} did not arrive"));
}
