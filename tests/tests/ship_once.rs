//! `stanchion ship --once` as a person uses it in a pipe.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use stanchion_lab::binaries::Binaries;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

#[tokio::test]
async fn a_reader_that_goes_away_ends_it() {
    let logs = tempfile::tempdir().unwrap();
    let name = format!("web-1_shop_app-{}.log", "5".repeat(64));
    let lines: String = (0..200_000).map(|number| format!("2026-11-21T10:00:00.000000001Z stdout F line {number}\n")).collect();
    fs::write(logs.path().join(name), lines).unwrap();
    let mut ship = Command::new(Binaries::find().unwrap().stanchion)
        .args(["ship", "--once", "--node-name", "node1", "--cluster-name", "c", "--record", "compact", "--sink", "stdout", "--log-dir"])
        .arg(logs.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut read = BufReader::new(ship.stdout.take().unwrap()).lines();
    let first: serde_json::Value = serde_json::from_str(&read.next_line().await.unwrap().expect("a line")).unwrap();
    assert_eq!(first["message"], "line 0");
    drop(read);
    let ended = tokio::time::timeout(Duration::from_secs(20), ship.wait()).await.expect("it ends with its reader").unwrap();
    assert!(!ended.success(), "not everything was read: {ended}");
}
